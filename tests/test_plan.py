"Plans for machines that are not at hand, from configs alone."
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from colab_gpt2.plan import count_parameters, forecast_memory, memory_terms, plan_run
from colab_gpt2.runtime import Runtime, pick_precision

SIZES = {"gpt2": (12, 768, 12, 124_439_808), "gpt2-medium": (24, 1024, 16, 354_823_168), "gpt2-large": (36, 1280, 20, 774_030_080), "gpt2-xl": (48, 1600, 25, 1_557_611_200)}
WIKITEXT_2 = 2_391_884  # GPT-2 tokens of its training split


def config_of(name):
    layers, width, heads, _ = SIZES[name]
    return GPT2Config(n_layer=layers, n_embd=width, n_head=heads)


def machine(name, memory, capability, ram_free=11_000_000_000, cores=2, cpu=()):
    device = "cuda" if capability else "cpu"
    return Runtime("", device, name, memory, capability, pick_precision(device, capability, cpu), cores, 13 * 10**9, ram_free, 10**11, 10**11, {}, "")


T4 = machine("Tesla T4", 15_828_320_256, (7, 5))
H100 = machine("NVIDIA H100 80GB HBM3", 85_017_493_504, (9, 0))
CPU = machine("EPYC", None, None)


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_those_of_the_real_module(name):
    with torch.device("meta"): model = AutoModelForCausalLM.from_config(config_of(name))
    assert count_parameters(config_of(name)) == sum(p.numel() for p in model.parameters()) == SIZES[name][3]


def test_forecast_grows_with_everything_that_costs():
    base = dict(micro_batch=4, block_size=512, precision="bf16")
    less = forecast_memory(config_of("gpt2"), **base)
    for more in (dict(micro_batch=5), dict(block_size=513), dict(parameters=125_000_000)): assert forecast_memory(config_of("gpt2"), **{**base, **more}) > less
    assert forecast_memory(config_of("gpt2-medium"), **base) > less
    half, full = (forecast_memory(config_of("gpt2"), **{**base, "precision": p}) for p in ("fp16", "fp32"))
    assert full - half == 69*4*512*12*768 - 2*124_439_808


def saved_bytes(layers, dropout, bf16, T=256):
    "What autograd keeps of one forward pass of a stock model on the CPU, counted storage by storage, weights left out."
    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=layers, n_embd=192, n_head=3, n_positions=T, vocab_size=100, attn_pdrop=dropout, bos_token_id=0, eos_token_id=0)).train()
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}
    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own: kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor is held, so that no address is used twice
        return tensor
    ids = torch.randint(100, (4, T))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=bf16): model(input_ids=ids, labels=ids)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_layer_keeps_what_the_forecast_says(dropout, precision):
    measured = saved_bytes(3, dropout, precision == "bf16") - saved_bytes(2, dropout, precision == "bf16")
    config = GPT2Config(n_layer=1, n_embd=192, n_head=3, n_positions=256, attn_pdrop=dropout)
    terms = memory_terms(config, micro_batch=4, block_size=256, precision=precision, device="cpu", parameters=12 * 192**2)
    expected = terms["activations"] + terms["attention matrices"] + terms["half-precision copies of the weights"]
    assert measured == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("name, runtime, fits, micro", [
    ("gpt2", T4, True, 8), ("gpt2-medium", T4, True, 2), ("gpt2-large", T4, False, 1), ("gpt2-xl", T4, False, 1), ("gpt2-xl", H100, True, 4), ("gpt2", CPU, True, 1)])
def test_the_largest_micro_batch_that_fits(name, runtime, fits, micro):
    plan = plan_run(config_of(name), WIKITEXT_2, runtime)
    assert (plan.fits, plan.micro_batch, plan.micro_batch * plan.gradient_accumulation_steps) == (fits, micro, 8)
    assert plan.fits == (plan.peak_bytes <= plan.limit_bytes)
    assert plan.peak_bytes == forecast_memory(config_of(name), micro_batch=micro, block_size=1024, precision=plan.precision, device=runtime.device)
    assert plan.seconds > 0 and "estimate" in plan.reasons[-1] and plan.steps == 292


def test_block_size_that_would_fit_is_named():
    plan = plan_run(config_of("gpt2-medium"), WIKITEXT_2, machine("Small", 10_000_000_000, (7, 5)))
    assert not plan.fits and "Lower block_size to 512" in plan.reasons[0]


def test_a_given_micro_batch_is_respected():
    plan = plan_run(config_of("gpt2"), WIKITEXT_2, T4, per_device_train_batch_size=2)
    assert (plan.micro_batch, plan.gradient_accumulation_steps, plan.fits) == (2, 4, True)
    plan = plan_run(config_of("gpt2"), WIKITEXT_2, T4, per_device_train_batch_size=32)
    assert (plan.micro_batch, plan.gradient_accumulation_steps, plan.fits) == (32, 1, False)
    assert "Lower per_device_train_batch_size to" in plan.reasons[0] and "32 instead of 8" in plan.reasons[0]


def test_time_is_not_made_up_and_follows_the_precision():
    assert plan_run(config_of("gpt2"), WIKITEXT_2, machine("Unheard-of GPU", 20 * 10**9, (8, 0))).seconds is None
    bf16 = plan_run(config_of("gpt2"), WIKITEXT_2, machine("EPYC", None, None, cpu={"avx512_bf16"}))
    assert bf16.precision == "bf16" and bf16.seconds < plan_run(config_of("gpt2"), WIKITEXT_2, CPU).seconds


@pytest.mark.parametrize("wrong, words", [
    (dict(block_size=1), "block_size is 1"), (dict(block_size=1025), "The model's context is 1024"), (dict(effective_batch_size=0), "effective_batch_size is 0"),
    (dict(per_device_train_batch_size=0), "per_device_train_batch_size is 0"), (dict(num_train_epochs=0), "num_train_epochs is 0"),
    (dict(num_train_epochs=float("nan")), "num_train_epochs is nan"), (dict(max_steps=0), "max_steps is 0"), (dict(max_steps=-2), "max_steps is -2"),
    (dict(tokens=0), "tokens is 0"), (dict(tokens=1023), "not one block")])
def test_bad_input_gets_a_line(wrong, words):
    with pytest.raises(ValueError, match=words): plan_run(config_of("gpt2"), **{"tokens": WIKITEXT_2, "runtime": T4, **wrong})


def test_to_dict_has_what_a_program_asks_for():
    plan = json.loads(json.dumps(plan_run(config_of("gpt2"), WIKITEXT_2, T4).to_dict()))
    assert {"fits", "method", "peak_bytes", "limit_bytes", "seconds", "micro_batch", "gradient_accumulation_steps", "precision", "optimizer", "recompute", "reasons"} <= set(plan)
