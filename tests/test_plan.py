"Plans for machines that are not at hand, from configs alone."
import itertools, json, math, re, sys, weakref
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, BertConfig, GPT2Config, T5Config
from transformers import Lfm2Config, LlamaConfig, Mamba2Config, MambaConfig, RwkvConfig

from colab_gpt2 import runtime, tasks
from colab_gpt2.config import OPTIMIZERS, FinetuneConfig
from colab_gpt2.errors import fields_of, worded
from colab_gpt2.model.loading import MODELS, TINY, load_config, new_model
from colab_gpt2.model.lora import add_adapters
from colab_gpt2.model.tune import casting_once, tune_model
from colab_gpt2.planning.memory import COSTS, Recipe, StepMemory, TracedMemory, forecast_memory, shape_of, step_memory
from colab_gpt2.planning.plan import (BYTES_A_TOKEN, TextSize, effective_batch, estimate_text, named_runtime,
                                      out_of_memory_told, plan_run, smaller_micro_batch)
from colab_gpt2.planning.trace import count_step, trace_step
from colab_gpt2.planning.speed import DEVICES, flops_per_token, forecast_step, token_bytes, work

SIZES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
WIKITEXT_2 = TextSize(2_417_786, 1024, "known")
T4, H100, CPU = map(named_runtime, ("T4", "H100", "CPU"))
BOTH = {"peft": "0.20.0", "bitsandbytes": "0.49.0"}


known = cache(load_config)


def plan_of(name, runtime, text=WIKITEXT_2, **options):
    return plan_run(known(name), text, runtime, FinetuneConfig(model=name, **options))


def of_memory(runtime, memory, versions=BOTH): return replace(runtime, device_memory=int(memory), versions=versions)


# The forecast

@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_those_of_the_real_module(name):
    with torch.device("meta"): model = AutoModelForCausalLM.from_config(load_config(name))
    assert shape_of(model) == shape_of(load_config(name))
    assert shape_of(model).parameters == sum(p.numel() for p in model.parameters()) == MODELS[name].parameters


def small(attention=0.0, residual=0.1, layers=3, vocabulary=5000, inner=None):
    return GPT2Config(n_layer=layers, n_embd=192, n_head=3, n_inner=inner, n_positions=256, vocab_size=vocabulary,
                      attn_pdrop=attention, resid_pdrop=residual, embd_pdrop=residual, bos_token_id=0, eos_token_id=0)


def model_for(config, recipe):
    model = new_model(config, seed=0).train()
    if recipe.tune: tune_model(model, keep_attention_dropout=recipe.keep_attention_dropout)
    if recipe.lora: model = add_adapters(model, recipe.lora_rank, recipe.precision)
    if recipe.gradient_checkpointing: model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def loss_of(model, config, recipe):
    "Of one micro-batch."
    ids = torch.randint(config.vocab_size, (recipe.micro_batch, recipe.block_size))
    kept = not recipe.gradient_checkpointing
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.half, cache_enabled=kept):
        return model(input_ids=ids, labels=ids).loss


def take_step(model, config, recipe, optimizer):
    with casting_once("cpu"):
        for _ in range(recipe.gradient_accumulation_steps): loss_of(model, config, recipe).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


# Tensors are counted on fake ones, which have sizes and no data: what a CPU's kernels borrow for a moment depends on
# its instructions and is not counted, and half precision takes no time where it would be emulated

@pytest.fixture
def fake(monkeypatch):
    "A mode in which tensors are fake. What transformers asks of position ids' values is answered as it is for blocks."
    asked = "transformers.masking_utils.find_packed_sequence_indices"
    monkeypatch.setattr(asked, lambda position_ids: None, raising=False)
    return FakeTensorMode()


def faked(model, fake):
    "`model` with fake parameters and buffers; tied ones stay tied."
    made = {}
    def fake_of(tensor):
        if tensor in made: return made[tensor]
        made[tensor] = fake.from_tensor(tensor.detach())
        if isinstance(tensor, torch.nn.Parameter):
            made[tensor] = torch.nn.Parameter(made[tensor], tensor.requires_grad)
        return made[tensor]
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: fake_of(tensor) for name, tensor in tensors.items() if tensor is not None})
    return model


def saved_bytes(config, recipe, fake):
    "What autograd keeps of one forward pass, counted storage by storage, weights left out."
    model, kept = faked(model_for(config, recipe), fake), {}
    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor  # kept, so that no address is used twice
        return tensor
    with fake, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor): loss_of(model, config, recipe)
    for parameter in model.parameters(): kept.pop(parameter.untyped_storage()._cdata, None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def layer(config, recipe): return StepMemory(shape_of(config), recipe).layer


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # asked for by peft
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("options, dropout, rel", [
    (dict(), (0.0, 0.0), 0.005), (dict(), (0.1, 0.1), 0.005), (dict(keep_attention_dropout=True), (0.1, 0.1), 0.08),
    (dict(gradient_checkpointing=True), (0.1, 0.1), 1e-6), (dict(tune=False), (0.1, 0.1), 0.15),
    (dict(method="lora"), (0.1, 0.1), 0.03)])
def test_a_layer_keeps_what_the_forecast_says(fake, precision, options, dropout, rel):
    recipe = Recipe(4, 256, precision=precision, device="cpu", **options)
    counted = saved_bytes(small(*dropout, 3), recipe, fake) - saved_bytes(small(*dropout, 2), recipe, fake)
    copied = 16 * 192 * recipe.lora_rank if recipe.lora else 12 * 192**2  # weights of a layer that autocast copies
    if recipe.half and not recipe.gradient_checkpointing: counted -= 2 * copied
    forecast = 4 * 4*256 * 192 if recipe.gradient_checkpointing else layer(small(*dropout), recipe)
    assert counted == pytest.approx(forecast, rel=rel)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # asked for by peft
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("options", [dict(), dict(method="lora"), dict(tune=False)])
def test_a_wider_mlp_keeps_what_the_forecast_says(fake, precision, options):
    recipe = Recipe(4, 256, precision=precision, device="cpu", **options)
    def counted(inner):
        kept = [saved_bytes(small(layers=layers, inner=inner), recipe, fake) for layers in (3, 2)]
        copied = 2 * (recipe.lora_rank if recipe.lora else 192) * inner  # weights of the MLP that autocast copies
        return kept[0] - kept[1] - (2 * copied if recipe.half else 0)
    forecast = layer(small(inner=16*192), recipe) - layer(small(inner=4*192), recipe)
    assert counted(16*192) - counted(4*192) == pytest.approx(forecast, rel=0.001)


class Live(TorchDispatchMode):
    "Counts the bytes of the storages that operations return, until they are freed, and the most that there were."
    def __init__(self):
        super().__init__()
        self.seen, self.now, self.peak = weakref.WeakSet(), 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        returned = operation(*args, **(kwargs or {}))
        for value in tree_leaves(returned):
            if isinstance(value, torch.Tensor): self.add(value.untyped_storage())
        return returned

    def add(self, storage):
        if storage in self.seen: return
        self.seen.add(storage)
        weakref.finalize(storage, self.subtract, storage.nbytes())
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def subtract(self, size): self.now -= size


def counted_peak(config, recipe, fake):
    "The most bytes in tensors during a step, the weights and AdamW's moments included."
    model, live = faked(model_for(config, recipe), fake), Live()
    for tensor in (*model.parameters(), *model.buffers()): live.add(tensor.untyped_storage())
    with fake, live:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
        take_step(model, config, recipe, optimizer)  # makes the moments
        live.peak = live.now
        take_step(model, config, recipe, optimizer)
    return live.peak


def forecast_of_tensors(config, recipe, counted=False):
    """The forecast without what no tensor is. Where operations are counted, autograd doesn't add gradients in place: at
    the end of the backward pass there is one more of the embedding."""
    memory = StepMemory(shape_of(config), recipe)
    sums = {moment: sum(terms.values()) for moment, terms in memory.moments.items()}
    if counted: sums["backward ends"] += memory.embedding_gradient
    return max(sums.values()) - COSTS.context


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("precision, checkpointing", [("fp32", False), ("bf16", True)])
@pytest.mark.parametrize("micro_batch, parts, tokens, block_size", [
    (1, 1, 5000, 256), (1, 1, 5000, 32), (2, 2, 5000, 256), (6, 1, 5000, 256), (6, 2, 500, 256)])
def test_a_step_on_a_cpu_takes_what_the_forecast_says(
        fake, precision, checkpointing, micro_batch, parts, tokens, block_size):
    config = small(vocabulary=tokens)
    recipe = Recipe(micro_batch, block_size, parts, precision, "cpu", gradient_checkpointing=checkpointing)
    forecast = forecast_of_tensors(config, recipe, counted=True)
    rel = 0.05 if checkpointing else 0.03  # what a layer needs on the way was measured on a GPU
    assert counted_peak(config, recipe, fake) == pytest.approx(forecast, rel=rel)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # asked for by peft
@pytest.mark.parametrize("options, rel", [  # a wide layer's gradients are more
    (dict(), 0.03), (dict(gradient_checkpointing=True), 0.1), (dict(method="lora"), 0.1)])
def test_a_step_of_a_wider_mlp_takes_what_the_forecast_says(fake, options, rel):
    config, recipe = small(inner=16*192), Recipe(6, 256, 2, "bf16", "cpu", **options)
    forecast = forecast_of_tensors(config, recipe, counted=True)
    assert counted_peak(config, recipe, fake) == pytest.approx(forecast, rel=rel)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # asked for by peft
@pytest.mark.parametrize("precision, micro_batch, parts", [("fp32", 1, 1), ("bf16", 6, 2)])
def test_a_step_of_lora_takes_what_the_forecast_says(fake, precision, micro_batch, parts):
    config, recipe = small(), Recipe(micro_batch, 256, parts, precision, "cpu", method="lora")
    forecast = forecast_of_tensors(config, recipe, counted=True)
    assert counted_peak(config, recipe, fake) == pytest.approx(forecast, rel=0.03)


MOMENTS = {"at the loss": (Recipe(6, 256, device="cpu"), 5000), "backward ends": (Recipe(1, 32, device="cpu"), 5000),
           "first layer again": (Recipe(6, 256, 2, device="cpu", gradient_checkpointing=True), 500)}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_real_step_has_its_peak_where_and_as_high_as_the_forecast_says(tmp_path, moment):
    "In fp32, by torch's profiler: what a CPU has in half precision depends on its instructions."
    recipe, vocabulary = MOMENTS[moment]
    config = small(vocabulary=vocabulary)
    memory, model = StepMemory(shape_of(config), recipe), model_for(config, recipe)
    sums = {name: sum(terms.values()) for name, terms in memory.moments.items()}
    assert max(sums, key=sums.get) == moment
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    take_step(model, config, recipe, optimizer)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        take_step(model, config, recipe, optimizer)
    profile.export_chrome_trace(str(tmp_path/"trace.json"))
    events = [e for e in json.loads((tmp_path/"trace.json").read_text())["traceEvents"] if e.get("name") == "[memory]"]
    allocated = itertools.accumulate(e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"]))
    peak = max(allocated) + 12 * model.num_parameters()  # weights and moments, which were there before
    assert peak == pytest.approx(forecast_of_tensors(config, recipe), rel=0.03)


LLAMA = LlamaConfig(vocab_size=2048, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4,
                    num_key_value_heads=4, max_position_embeddings=512)


@pytest.mark.parametrize("recipe", [
    Recipe(7, 256, 3, device="cpu"), Recipe(3, 64, 1, "bf16", "cpu", gradient_checkpointing=True),
    Recipe(5, 512, 1, "bf16", "cuda", method="lora")], ids=["full", "again", "lora"])
def test_all_layers_and_blocks_follow_from_a_few(recipe):
    traced = trace_step(LLAMA, recipe)
    alone = count_step(LLAMA, replace(recipe, gradient_accumulation_steps=min(2, recipe.gradient_accumulation_steps)))
    peak = max(held[:, 0].max() for held in alone["held"].values())
    assert traced.weights + traced.gradients + traced.activations == pytest.approx(peak, rel=1e-3)
    assert traced.flops == pytest.approx(alone["work"][0].max(), rel=1e-3)
    assert traced.moved == pytest.approx(alone["work"][1].max(), rel=0.05)  # its last chunk of logits may be half full


@pytest.mark.parametrize("recipe", [
    Recipe(1, 256, device="cpu"), Recipe(6, 256, 2, "bf16", "cpu", method="lora"), Recipe(6, 256, 1, "bf16", "cuda")],
    ids=["fp32", "lora", "cuda"])
def test_the_formula_of_a_gpt2_is_what_its_traced_step_takes(recipe):
    config = small()
    (traced,), memory = TracedMemory(shape_of(config), recipe).moments.values(), StepMemory(shape_of(config), recipe)
    assert sum(traced.values()) - COSTS.context == pytest.approx(forecast_of_tensors(config, recipe), rel=0.02)
    assert TracedMemory(shape_of(config), recipe).trained == memory.trained


BASE = Recipe(4, 512, 2, "bf16")


@pytest.mark.parametrize("more", [dict(micro_batch=5), dict(block_size=513), dict(tune=False), dict(precision="fp32")])
def test_forecast_grows_with_what_costs(more):
    gpt2 = load_config("gpt2")
    assert forecast_memory(gpt2, replace(BASE, **more)) > forecast_memory(gpt2, BASE)


@pytest.mark.parametrize("less", [
    dict(gradient_checkpointing=True), dict(optimizer="adamw_bnb_8bit"), dict(method="lora"),
    dict(gradient_accumulation_steps=1)])
@pytest.mark.parametrize("name", SIZES)
def test_forecast_falls_with_what_saves(less, name):
    config = load_config(name)
    assert forecast_memory(config, replace(BASE, **less)) < forecast_memory(config, BASE)


def test_time_follows_the_work():
    shape = shape_of(load_config("gpt2-xl"))
    def seconds(**options): return forecast_step(shape, replace(BASE, **options), DEVICES["A100-80"])
    full = seconds()
    assert full < seconds(gradient_checkpointing=True) < 1.4 * full
    assert seconds(method="lora") < full < seconds(method="lora", gradient_checkpointing=True)
    assert seconds(precision="fp32") > 10 * full


# operations that move nothing outside products: these themselves, attention, views, and what touches one entry a row
FREE = re.compile(r"^prim|(^|[.:_])(addmm_?|mm|bmm|\w*attention\w*|t|view|transpose|permute|expand|unsqueeze|squeeze|"
                  r"slice|select|alias|detach|split\w*|unbind|as_strided|reshape_alias|empty\w*|new_empty\w*|"
                  r"unsafe_view|gather|scatter\w*|index\w*)[.]")
FILLS = re.compile(r"aten[.](zero|fill|new_zeros|ones|full|embedding[.])")  # what is given is not read
IN_PLACE = {"aten._fused_adamw_.default": 28/16,  # of the numbers given it writes three of four
            "aten._amp_foreach_non_finite_check_and_unscale_.default": 2}
SIZE_OF = dict(float32=4, float16=2, bfloat16=2, int64=8, bool=1)


def moved_bytes(operations):
    "What the operations of a step read and write, products and attention left out."
    def size(tensors): return sum(SIZE_OF.get(dtype, 4) * math.prod(shape) for dtype, shape in tensors)
    def each(name, given, made):
        if name.endswith(".out"): return size(given)  # what it is to fill was given
        return (0 if FILLS.match(name) else IN_PLACE.get(name, 1) * size(given)) + size(made)
    return sum(each(name, given, made) for _, name, given, made in operations if not FREE.search(name))


WIDE = GPT2Config(n_layer=6, bos_token_id=0, eos_token_id=0)  # gpt2's layers, fewer of them


@pytest.mark.parametrize("gpu, micro_batch, options", [
    ("T4", 8, dict(method="full")), ("T4", 8, dict(method="full", gradient_checkpointing=True)),
    ("T4", 4, dict(method="full", gradient_checkpointing=True)), ("T4", 8, dict(method="lora")),
    ("A100", 8, dict(method="lora", gradient_checkpointing=True)), ("A100", 8, dict(method="full"))],
    ids=lambda given: "-".join(map(str, given.values())) if isinstance(given, dict) else given)
def test_a_step_on_a_gpu_takes_and_moves_as_many_bytes_as_the_forecasts_say(on_gpu, gpu, micro_batch, options):
    run = on_gpu(train_on_gpu, gpu, micro_batch, options)
    recipe, shape = run.after.recipe, shape_of(WIDE)
    assert run.peak == pytest.approx(forecast_of_tensors(WIDE, recipe, counted=True), rel=0.02)
    if micro_batch < 8: return  # further micro-batches add their gradients, which the forecast of time leaves out
    tokens, update = recipe.tokens, (48 if gpu == "T4" else 40) * StepMemory(shape, recipe).trained
    forecast = tokens * token_bytes(StepMemory(shape, recipe)) + update
    assert moved_bytes(run.operations) == pytest.approx(forecast, rel=0.1)


def train_on_gpu(gpu, micro_batch, options):
    from helpers.pretend_gpu import device
    return device.train(WIDE, gpu, per_device_train_batch_size=micro_batch, probed=False, traced=True,
                        **options)


@pytest.mark.parametrize("gpu, micro_batch, options, rel", [
    ("T4", 8, dict(method="full"), 0.02), ("A100", 2, dict(method="full", gradient_checkpointing=True), 0.06)],
    ids=["full", "again"])
def test_another_model_on_a_gpu_takes_what_its_traced_step_says(on_gpu, gpu, micro_batch, options, rel):
    peak, recipe = on_gpu(train_llama_on_gpu, gpu, micro_batch, options)
    traced, = step_memory(shape_of(LLAMA), recipe).moments.values()
    assert peak == pytest.approx(sum(traced.values()) - COSTS.context, rel=rel)


def train_llama_on_gpu(gpu, micro_batch, options):
    from helpers.pretend_gpu import device
    run = device.train(LLAMA, gpu, per_device_train_batch_size=micro_batch, probed=False, **options)
    return run.peak, run.after.recipe


@pytest.mark.parametrize("gpu", DEVICES)
@pytest.mark.parametrize("name", SIZES)
def test_no_forecast_of_time_beats_physics(gpu, name):
    "All products at the peak of the data sheet, and all other bytes at its full bandwidth."
    device, recipe = DEVICES[gpu], plan_of(name, named_runtime(gpu)).recipe
    shape, tokens = shape_of(known(name)), recipe.tokens * recipe.gradient_accumulation_steps
    products = work(recipe) * (flops_per_token(shape, 1024) - 6*shape.layers*shape.width*1024)  # attention looks back
    moved = (375 if recipe.lora else 250)*shape.layers*shape.width + 12*shape.vocabulary  # as traced
    update = 28 * StepMemory(shape, recipe).trained
    peak = device.peak_half if recipe.half else device.peak_fp32
    physics = tokens * products / peak + (tokens * moved + update) / device.bandwidth
    assert forecast_step(shape, recipe, device) > physics


# What fits where

FULL, AGAIN, LORA, LORA_AGAIN = ("full", False), ("full", True), ("lora", False), ("lora", True)
MATRIX = {"T4": (FULL, FULL, AGAIN, LORA), "L4": (FULL, FULL, FULL, LORA), "CPU": (FULL, FULL, LORA_AGAIN, LORA_AGAIN),
          **dict.fromkeys(("A100-40", "A100-80", "G4", "H100"), (FULL,) * 4)}
TOO_SMALL = ("CPU", "gpt2-xl")  # 6.2 GB of weights in fp32 and freed memory in 11 GB: the only pair without a plan


@pytest.mark.parametrize("gpu", DEVICES)
@pytest.mark.parametrize("name", SIZES)
def test_every_size_has_a_plan_on_every_machine_but_the_largest_without_a_gpu(gpu, name):
    runtime = named_runtime(gpu)
    plan = plan_of(name, runtime)
    recipe, room = plan.recipe, runtime.device_memory or runtime.ram_free
    assert (recipe.method, recipe.gradient_checkpointing) == MATRIX[gpu][SIZES.index(name)]
    assert recipe.optimizer == "adamw_torch_fused"
    assert plan.fits == (plan.peak_bytes <= plan.limit_bytes) == ((gpu, name) != TOO_SMALL)
    assert plan.limit_bytes == int(0.9 * room) and plan.peak_bytes == forecast_memory(load_config(name), recipe)
    assert plan.blocks_per_step == 8 and plan.steps == 2 * math.ceil(2361 / 8)
    assert recipe.precision == {"T4": "fp16", "CPU": "fp32"}.get(gpu, "bf16")
    assert plan.seconds == pytest.approx(plan.steps * plan.step_seconds, abs=100)
    assert plan.reasons[0].startswith("It fits" if plan.fits else "It does not fit")


@pytest.mark.parametrize("name", SIZES)
def test_a_faster_machine_is_faster_and_a_larger_model_slower(name):
    seconds = [plan_of(name, named_runtime(gpu)).step_seconds for gpu in ("CPU", "T4", "L4", "A100-80", "H100")]
    assert name == "gpt2-xl" or seconds == sorted(seconds, reverse=True)  # the largest is trained otherwise on some
    for gpu in ("H100", "G4"):
        times = [plan_of(each, named_runtime(gpu)).seconds for each in SIZES]
        assert times == sorted(times)


WAYS = [(method, optimizer, checkpointing)
        for method, optimizer in (("full", OPTIMIZERS[0]), ("full", OPTIMIZERS[1]), ("lora", OPTIMIZERS[0]))
        for checkpointing in (False, True)]


def test_as_memory_shrinks_each_way_comes_in_its_turn():
    seen, last = [], None
    for tenths in range(600, 30, -2):
        plan = plan_of("gpt2-xl", of_memory(T4, tenths * 1e8))
        if not plan.fits: break
        way = WAYS.index((plan.recipe.method, plan.recipe.optimizer, plan.recipe.gradient_checkpointing))
        if last and last[0] == way: assert plan.recipe.micro_batch <= last[1]  # in one way the micro-batch only falls
        last = way, plan.recipe.micro_batch
        if not seen or seen[-1] != way: seen.append(way)
    assert seen == list(range(6))
    assert all(not plan_of("gpt2-xl", of_memory(T4, tenths * 1e8)).fits for tenths in range(tenths, 1, -5))


def test_only_what_is_installed_is_planned():
    bare = of_memory(T4, 15e9, {})
    assert not plan_of("gpt2-xl", bare).fits and "Install peft" in plan_of("gpt2-xl", bare).reasons[0]
    assert plan_of("gpt2-xl", of_memory(T4, 22e9)).recipe.optimizer == "adamw_bnb_8bit"
    plan = plan_of("gpt2-xl", of_memory(T4, 22e9, {"peft": "0.20.0"}))
    assert plan.recipe.method == "lora" and "8-bit AdamW was not tried: bitsandbytes is not installed." in plan.reasons
    assert "8-bit" not in str(plan_of("gpt2-large", T4).reasons)  # gradient checkpointing comes before it


@pytest.mark.parametrize("batch", [64, 65, 128, 512, 1000])
def test_a_text_shorter_than_the_batch_is_a_step_of_its_own_length(batch):
    text = TextSize(64 * 1024, 1024, "known")
    plan, alone = [plan_of("gpt2", T4, text, effective_batch_size=size, num_train_epochs=2) for size in (batch, 64)]
    assert (plan.step_seconds, plan.seconds) == pytest.approx((alone.step_seconds, alone.seconds)) and plan.steps == 2
    assert plan.blocks_per_step == batch and plan.recipe.micro_batch <= 64  # a checkpoint is known by the batch
    six_minutes = plan_of("gpt2", T4, text, effective_batch_size=batch, max_steps=100)
    assert not six_minutes.torch_compile


@pytest.mark.parametrize("batch", [1, 6, 7, 8, 12, 32])
@pytest.mark.parametrize("gpu", ["T4", "CPU"])
def test_the_effective_batch_is_constant(batch, gpu):
    for name in SIZES:
        plan = plan_of(name, named_runtime(gpu), effective_batch_size=batch)
        assert plan.fits == ((gpu, name) != TOO_SMALL) and plan.blocks_per_step == batch


@pytest.mark.parametrize("fixed, expected", [
    (dict(per_device_train_batch_size=2), dict(micro_batch=2, gradient_accumulation_steps=4, fits=True)),
    (dict(gradient_accumulation_steps=2), dict(micro_batch=4, gradient_accumulation_steps=2, fits=True)),
    (dict(per_device_train_batch_size=3, gradient_accumulation_steps=5),
     dict(micro_batch=3, gradient_accumulation_steps=5, fits=True)),
    (dict(gradient_checkpointing=True), dict(gradient_checkpointing=True, method="full", fits=True)),
    (dict(method="lora"), dict(method="lora", gradient_checkpointing=False, fits=True)),
    (dict(optim="adamw_bnb_8bit"), dict(optimizer="adamw_bnb_8bit", method="full", fits=True)),
    (dict(precision="fp32"), dict(precision="fp32", fits=True)),
    (dict(torch_compile=True), dict(torch_compile=True)),
    (dict(tune=False), dict(gradient_checkpointing=False, method="full", fits=True)),
    (dict(per_device_train_batch_size=64, gradient_accumulation_steps=1, gradient_checkpointing=False),
     dict(micro_batch=64, gradient_checkpointing=False, fits=False))])
def test_what_is_asked_for_is_kept(fixed, expected):
    plan = plan_of("gpt2", T4, **fixed)
    assert {name: plan.to_dict()[name] for name in expected} == expected
    assert plan.blocks_per_step == (effective_batch(FinetuneConfig(**fixed)) or 8)


@pytest.mark.parametrize("name, fixed, words", [
    ("gpt2", dict(per_device_train_batch_size=64, gradient_accumulation_steps=1, gradient_checkpointing=False),
     "Lower per_device_train_batch_size to 16."),
    ("gpt2-xl", dict(method="full"), "Leave method to the plan: LoRA fits."),
    ("gpt2-large", dict(method="full", gradient_checkpointing=False),
     "Leave method and gradient_checkpointing to the plan: full training with gradient checkpointing fits.")])
def test_what_does_not_fit_says_what_to_change_and_it_helps(name, fixed, words):
    plan = plan_of(name, T4, **fixed)
    assert not plan.fits and plan.reasons[0].startswith("It does not fit") and plan.reasons[0].endswith(words)
    named = fields_of(plan.reasons[0])
    assert set(named) <= set(fixed) and "--" + named[0] in worded(plan.reasons[0], lambda name, *value: "--" + name)
    assert plan_of(name, T4, **{field: value for field, value in fixed.items() if field not in named}).fits


@pytest.mark.parametrize("name, runtime, smaller", [
    ("gpt2-xl", CPU, "gpt2-large"), ("gpt2-xl", of_memory(T4, 3e9), "gpt2-large"),
    ("gpt2-large", of_memory(T4, 1.5e9), "gpt2")])
def test_where_no_batch_or_block_fits_a_smaller_model_is_named_that_does(name, runtime, smaller):
    plan = plan_of(name, runtime)
    assert not plan.fits and f"choose model='{smaller}' or a device with more memory." in plan.reasons[0]
    assert fields_of(plan.reasons[0]) == ("model",) and plan_of(smaller, runtime).fits


def test_memory_that_something_else_uses_is_not_planned_with():
    "Such as a model that a notebook keeps on the GPU."
    def with_used(size): return replace(T4, device_free=T4.device_memory - int(size))
    idle, busy, full = [plan_of("gpt2", with_used(size)) for size in (0.4e9, 11e9, 15e9)]  # the first is CUDA's own
    assert idle.to_dict() == plan_of("gpt2", T4).to_dict()
    assert busy.fits and busy.recipe.micro_batch < 8 and "10.5 GB of that is in use already" in busy.reasons[0]
    assert busy.peak_bytes > 10.5e9 and busy.limit_bytes == idle.limit_bytes  # as the probe measures: all in use
    assert not full.fits and "Free the GPU: 14.5 GB of it is in use; restart the session." in full.reasons[0]


@pytest.mark.parametrize("size, recipe, half", [
    ("gpt2-large", Recipe(8, 1024, 1, "fp16", gradient_checkpointing=True), None),  # earlier gradients take more
    ("gpt2-large", Recipe(8, 1024, 1, "fp16"), 4), ("gpt2", Recipe(6, 1024, 2, "fp16"), 3),
    ("gpt2", Recipe(1, 1024), None)])
def test_a_micro_batch_is_halved_only_where_that_needs_less_memory(size, recipe, half):
    assert smaller_micro_batch(known(size), recipe) == half


def test_a_run_without_memory_is_told_only_what_it_has_not_tried():
    recipe = Recipe(8, 1024, 1, "fp16", gradient_checkpointing=True)
    assert fields_of(out_of_memory_told(replace(recipe, gradient_checkpointing=False))) == (
        "block_size", "gradient_checkpointing", "method", "model")
    assert fields_of(out_of_memory_told(recipe)) == ("block_size", "method", "model")


HEADLESS = dict(vocab_size=8192, hidden_size=32, num_hidden_layers=2)
OTHERS = [MambaConfig(**HEADLESS, state_size=4), Mamba2Config(**HEADLESS, head_dim=16, num_heads=4, n_groups=2),
          RwkvConfig(**HEADLESS, context_length=128),
          Lfm2Config(**HEADLESS, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1,
                     layer_types=["conv", "full_attention"])]


@pytest.mark.parametrize("config", OTHERS, ids=lambda config: config.model_type)
def test_a_model_without_attention_heads_is_planned_by_a_traced_step(config):
    one = FinetuneConfig(per_device_train_batch_size=1, gradient_accumulation_steps=1, gradient_checkpointing=False)
    plan = plan_run(config, TextSize(10_000, 64), CPU, one)
    assert plan.fits and plan.seconds > 0 and plan.parameters == shape_of(config).parameters
    assert f"counted on a traced step of a {config.model_type}." in str(plan.reasons)


def test_a_smaller_block_that_is_named_fits():
    tight = of_memory(T4, 4.9e9)
    assert "Lower block_size to 512." in plan_of("gpt2-xl", tight).reasons[0]
    assert plan_of("gpt2-xl", tight, TextSize(2_417_786, 512, "known")).fits


# Time, and when to compile

def test_time_is_not_made_up_and_follows_the_precision():
    unknown = plan_of("gpt2", replace(T4, device_name="Unheard-of GPU"))
    assert unknown.seconds is None and "unknown" in dict(unknown._rows())["time"]
    assert "no speed of Unheard-of GPU is known" in str(unknown.reasons)
    here = replace(CPU, device_name="EPYC")
    in_half = replace(here, precision=named_runtime("L4").precision)
    assert plan_of("gpt2", here, precision="fp32").seconds > plan_of("gpt2", in_half).seconds


def test_a_probed_step_is_planned_with_the_update_that_it_leaves_out():
    plan = plan_of("gpt2", H100)
    probed = plan.corrected(peak_bytes=1, step_seconds=0.025)
    assert 0.001 < plan.update_seconds == probed.step_seconds - 0.025 < 0.003  # 40 bytes a parameter
    assert probed.seconds == plan.steps * probed.step_seconds
    assert plan_of("gpt2", replace(T4, device_name="GeForce 9")).update_seconds == 0


def test_time_on_a_cpu_counts_the_threads_that_compute(monkeypatch, tmp_path):
    "As OMP_NUM_THREADS sets them, or the quota of a container."
    monkeypatch.setattr(runtime.os, "sched_getaffinity", lambda process: range(8), raising=False)
    def cores(threads, quota):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        monkeypatch.setattr(runtime, "cgroup_cores", lambda: quota)
        return runtime.check_runtime(tmp_path).cores
    assert [cores(8, math.inf), cores(1, math.inf), cores(8, 2)] == [8, 1, 2]
    one, two = [plan_of("gpt2", replace(CPU, device_name="EPYC", cores=n)).step_seconds for n in (1, 2)]
    assert one == pytest.approx(2 * two)


@pytest.mark.parametrize("name", SIZES)
def test_an_older_gpu_compiles_only_when_asked_to(name):
    long = TextSize(118_000_000, 1024, "known")
    assert not plan_of(name, T4, long).torch_compile and plan_of(name, T4, torch_compile=True).torch_compile


def test_compiling_is_for_long_runs():
    long = TextSize(118_000_000, 1024, "known")
    assert [plan_of("gpt2", H100, text).torch_compile for text in (WIKITEXT_2, long)] == [False, True]
    assert not plan_of("gpt2", H100, long, max_steps=20).torch_compile
    on, off = (plan_of("gpt2", H100, WIKITEXT_2, torch_compile=asked) for asked in (True, False))
    assert on.step_seconds < off.step_seconds and on.seconds > off.seconds  # faster steps, a longer run
    assert not plan_of("gpt2", CPU, long).torch_compile


# What cannot be meant

@pytest.mark.parametrize("text, options, words", [
    (TextSize(10_000, 1, ""), {}, "block_size is 1"), (TextSize(0, 1024, ""), {}, "tokens is 0"),
    (TextSize(10_000, 1025, ""), {}, "The model's context is 1024"), (TextSize(1023, 1024, ""), {}, "not one block"),
    (TextSize(float("nan"), 1024, ""), {}, "tokens is nan"),
    (WIKITEXT_2, dict(precision="fp16"), "precision is 'fp16'"),
    (WIKITEXT_2, dict(effective_batch_size=0), "effective_batch_size is 0"),
    (WIKITEXT_2, dict(per_device_train_batch_size=3, effective_batch_size=8), "does not divide"),
    (WIKITEXT_2, dict(method="all"), "method is 'all'"), (WIKITEXT_2, dict(optim="sgd"), "optim is 'sgd'"),
    (WIKITEXT_2, dict(lora_rank=0), "lora_rank is 0"),
    (WIKITEXT_2, dict(method="lora", lora_rank=10**4), "lora_rank is 10000; it must be a number ≤ 768"),
    (WIKITEXT_2, dict(lora_rank=769), "the model's width"), (WIKITEXT_2, dict(max_steps=10**12), "max_steps is 10"),
    (WIKITEXT_2, dict(num_train_epochs=1e308), "num_train_epochs is 1e.308"),
    (WIKITEXT_2, dict(tune="yes"), "tune is 'yes'"),
    (WIKITEXT_2, dict(num_train_epochs=float("nan")), "num_train_epochs is nan"),
    (WIKITEXT_2, dict(max_steps=0), "max_steps is 0")])
def test_bad_input_gets_a_line(text, options, words):
    with pytest.raises(ValueError, match=words) as e: plan_of("gpt2", CPU, text, **options)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("gpu", ["A100", "T5", "", "H100 "])
def test_an_unknown_gpu_gets_the_list(gpu):
    with pytest.raises(ValueError, match="known are T4, L4, A100-40, A100-80, G4, H100, CPU"): named_runtime(gpu)


# The command line, with and without a network

NOWHERE = "http://127.0.0.1:9"
NO_NETWORK = dict(HF_ENDPOINT=NOWHERE, HF_HUB_OFFLINE="1", HTTPS_PROXY=NOWHERE, HTTP_PROXY=NOWHERE)


PLANS = """import json
from colab_gpt2.tasks import plan
plans = plan(model="gpt2-xl", gpu="t4", progress=False), plan(model="gpt2", progress=False)
print(json.dumps([plan.to_dict() for plan in plans]))"""


def test_a_plan_needs_no_network_and_downloads_nothing(shell, tmp_path):
    "Of another machine, and of this one."
    empty = dict(HF_HOME=str(tmp_path/"hf"), XDG_CACHE_HOME=str(tmp_path/"cache"))
    ran = shell(sys.executable, "-c", PLANS, **NO_NETWORK, **empty)
    assert ran.returncode == 0, ran.stderr
    said, here = json.loads(ran.stdout)
    asked = {"fits", "method", "peak_bytes", "limit_bytes", "seconds", "micro_batch", "gradient_accumulation_steps",
             "precision", "optimizer", "gradient_checkpointing", "reasons"}
    assert asked <= set(said)
    assert (said["fits"], said["method"], said["tokens"]) == (True, "lora", 2_417_786)
    assert "nothing was downloaded" in str(said["reasons"])
    assert here["tokens"] == 2_417_786 and "nothing was downloaded" in str(here["reasons"])
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_text_of_ones_own_is_counted_or_weighed(tmp_path):
    text = tmp_path/"own.txt"
    text.write_text("The tide came in at noon and went out again . \n" * 2000)
    own = dict(train_file=str(text), eval_file=str(text), cache_dir=str(tmp_path/"cache"), gpu="T4", progress=False)
    with pytest.warns(UserWarning, match="the same text"):
        counted, weighed = [tasks.plan(model=model, **own) for model in ("tiny", "gpt2")]
    assert "counted by the model's tokenizer" in str(counted.reasons)
    assert "an estimate from 94.0 kB" in str(weighed.reasons) and weighed.tokens == int(94_000 / BYTES_A_TOKEN["gpt2"])


def test_help_names_every_device(shell):
    said = " ".join(shell("colab-gpt2", "plan", "--help").stdout.split())
    assert all(name in said for name in DEVICES)


KNOWN = ", ".join(DEVICES)


@pytest.mark.parametrize("words, said", [
    (("--gpu", "T5"), f"--gpu is 'T5'; known are {KNOWN}."), (("--gpu=",), "--gpu is empty; give a value."),
    (("--method", "loraa"), "Did you mean 'lora'?"),
    (("--gpu", "CPU", "--precision", "fp16"),
     "--precision is 'fp16', which Colab CPU computes far slower than fp32; use --precision auto.")])
def test_bad_usage_is_one_line(shell, words, said):
    ran = shell("colab-gpt2", "plan", *words)
    assert ran.returncode == (1 if "Colab CPU" in said else 2) and ran.stderr.strip().endswith(said)


@pytest.mark.parametrize("config, words", [(BertConfig(), "bert"), (T5Config(), "t5")])
def test_a_plan_of_another_kind_of_model_is_refused_in_one_line(tmp_path, config, words):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words) as e:
        tasks.plan(model=str(tmp_path), dataset="python-docs", gpu="T4", progress=False)
    assert "\n" not in str(e.value)


def test_the_known_count_is_what_the_tokenizer_gives(shared):
    """On the validation split run_clm's published count and two tokens for each blank line make our own; the training
    split is not at hand."""
    from transformers import AutoTokenizer
    text = (shared/"data"/"wikitext-2-raw"/"wiki.valid.raw").read_text(encoding="utf-8")
    blank = sum(not line.strip() for line in text.splitlines())
    for folder, name, by_line in ((shared/"data"/"gpt2-tokenizer", "gpt2", 247_289), (TINY, "tiny", None)):
        tokens = len(AutoTokenizer.from_pretrained(folder).backend_tokenizer.encode(text, add_special_tokens=False).ids)
        assert len(text.encode()) / tokens == pytest.approx(BYTES_A_TOKEN[name], rel=0.015)
        assert by_line is None or tokens == by_line + 2*blank
    estimate = estimate_text(FinetuneConfig(dataset="wikitext-103-raw-v1"), 1024)
    for name in (dict(dataset="a/poems"), dict(train_file="hf://datasets/a/poems")):
        with pytest.raises(ValueError, match="How long (dataset|train_file) .*poems is, is not known until it has"):
            estimate_text(FinetuneConfig(**name), 1024)
    assert estimate.tokens == pytest.approx(117_920_140, rel=0.02)  # run_clm's way of counting
