"Decoding against transformers' own: which models GPT2Reader reads, their numbers, and the distribution of a step."
import copy

import pytest
import torch
from torch import nn
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from colab_gpt2.model.decoding import GPT2Reader, GraphReader, ModelReader, decode, is_stock_gpt2, open_reader
from colab_gpt2.model.sampling import Sampling, candidates, penalise
from colab_gpt2.model.loading import load_model, new_model
from colab_gpt2.model.tune import tune_model

SMALL = dict(n_layer=3, n_embd=48, n_head=4, n_positions=64, vocab_size=500, initializer_range=0.2)


@pytest.fixture(scope="module")
def tiny(): return load_model("tiny").eval()


@pytest.fixture(scope="module")
def wide(): return new_model(GPT2Config(n_layer=2), seed=0).eval()  # GPT-2 124M but for ten layers


def small(**changes): return new_model(GPT2Config(**{**SMALL, **changes}), seed=0).eval()


def random_ids(seed, *shape, vocabulary=8192):
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def prompt_for(model, length): return random_ids(length, 1, length, vocabulary=model.config.vocab_size)


def greedy(model, prompt, new, samples=1):
    steps = decode(model, prompt, Sampling(top_k=1), None, new, samples, model.config.n_positions)
    return torch.cat(list(steps), 1).tolist()


def theirs(model, prompt, new, samples=1):
    "transformers' greedy search; no token ends it."
    rows = prompt.expand(samples, -1)
    config = GenerationConfig(max_new_tokens=new, pad_token_id=0)
    out = model.generate(rows, attention_mask=torch.ones_like(rows), generation_config=config)
    return out[:, prompt.shape[1]:].tolist()


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("name", ["tiny", "wide"])
def test_greedy_is_that_of_transformers(name, samples, request):
    model = request.getfixturevalue(name)
    assert type(open_reader(model, samples, 8, 40)) is GPT2Reader
    for prompt in (prompt_for(model, length) for length in (1, 7, 100)):
        assert greedy(model, prompt, 40, samples) == theirs(model, prompt, 40, samples)


@pytest.mark.parametrize("changes", [
    dict(activation_function="gelu_new"), dict(activation_function="gelu_pytorch_tanh"), dict(n_inner=31),
    dict(tie_word_embeddings=False), dict(layer_norm_epsilon=0.5), dict(scale_attn_weights=False),
    dict(scale_attn_by_inverse_layer_idx=True), dict(attn_implementation="eager")], ids=str)
def test_a_stock_gpt2_whatever_its_config(changes):
    model = small(**changes)
    prompt = prompt_for(model, 5)
    assert is_stock_gpt2(model) and greedy(model, prompt, 30, 2) == theirs(model, prompt, 30, 2)
    stock = greedy(model, prompt, 30)
    tune_model(model)
    assert is_stock_gpt2(model) and greedy(model, prompt, 30) == stock


def with_hook(model): model.transformer.h[1].attn.c_proj.register_forward_hook(lambda layer, inputs, output: output * 2)
def with_pre_hook(model): model.transformer.h[1].mlp.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
def with_forward_of_its_own(model): model.transformer.h[0].ln_1.forward = lambda x: x
def with_another_activation(model): model.transformer.h[2].mlp.act = nn.ReLU()
def with_exact_gelu(model): model.transformer.h[2].mlp.act = nn.GELU()
def without_activation(model): model.transformer.h[0].mlp.act = nn.Dropout(0.5).eval()
def with_a_bias(model): model.lm_head = nn.Linear(48, 500)


def with_a_layer_of_another_type(model):
    class Doubled(nn.LayerNorm):
        def forward(self, x): return 2 * super().forward(x)
    model.transformer.ln_f = Doubled(48)


def with_adapters(model):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    peft.inject_adapter_in_model(settings, model)


def with_parametrization(model):
    class Halved(nn.Module):
        def forward(self, weight): return weight / 2
    torch.nn.utils.parametrize.register_parametrization(model.transformer.wte, "weight", Halved())


ALTERED = (with_hook, with_pre_hook, with_forward_of_its_own, with_another_activation, with_exact_gelu,
           without_activation, with_a_bias, with_a_layer_of_another_type, with_adapters, with_parametrization)

@pytest.mark.parametrize("alter", ALTERED, ids=lambda f: f.__name__)
def test_an_altered_gpt2_is_read_with_its_own_forward(alter):
    model = small()
    prompt = prompt_for(model, 5)
    before = model(prompt).logits
    alter(model)
    model.eval()
    assert type(open_reader(model, 1, 8, 30)) is ModelReader and not torch.equal(model(prompt).logits, before)
    assert greedy(model, prompt, 30) == theirs(model, prompt, 30)


@pytest.mark.parametrize("changes", [
    dict(activation_function="relu"), dict(activation_function="gelu"), dict(reorder_and_upcast_attn=True),
    dict(add_cross_attention=True)], ids=str)
def test_an_unusual_config_is_read_with_the_models_own_forward(changes):
    model = small(**changes)
    prompt = prompt_for(model, 5)
    assert not is_stock_gpt2(model) and greedy(model, prompt, 30) == theirs(model, prompt, 30)


def test_no_gpt2_is_read_as_one():
    class Mine(GPT2LMHeadModel):
        def forward(self, *words, **options): raise AssertionError
    assert not is_stock_gpt2(Mine(GPT2Config(**SMALL))) and not is_stock_gpt2(nn.Linear(3, 3))


def test_under_autocast_the_model_is_read_with_its_own_forward():
    model = small()
    prompt = prompt_for(model, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_stock_gpt2(model)
        assert greedy(model, prompt, 10) == theirs(model, prompt, 10)


@torch.no_grad()
def all_logits(reader, prompt, more):
    "What `reader` says after the prompt and after each column of `more`."
    return torch.stack([reader.read(ids) for ids in (prompt, *more.split(1, 1))])


class SteppingReader(GPT2Reader):
    "What GraphReader records, on any device."
    def read(self, ids):
        if not self.length: return super().read(ids)
        self.length += 1
        return self.step(ids, torch.tensor([self.length - 1])).float()


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.003)])
@pytest.mark.parametrize("kind", [GPT2Reader, SteppingReader])
def test_readers_agree_in_every_precision(tiny, kind, dtype, bound):
    model, prompt, more = copy.deepcopy(tiny).to(dtype), prompt_for(tiny, 60), random_ids(0, 4, 20)
    assert is_stock_gpt2(model)
    expected, got = (all_logits(reader, prompt, more) for reader in (ModelReader(model, 4), kind(model, 4, 80)))
    assert expected.dtype == got.dtype == torch.float32 and expected.shape == got.shape == (21, 4, 8192)
    assert (got - expected).norm() < bound * expected.norm()


def filtered(tokens, logits, temperature, top_k, top_p, penalty):
    "The distribution that transformers draws from."
    logits = RepetitionPenaltyLogitsProcessor(penalty)(tokens, logits)
    logits = TemperatureLogitsWarper(temperature)(tokens, logits)
    if top_k: logits = TopKLogitsWarper(top_k)(tokens, logits)
    if top_p < 1: logits = TopPLogitsWarper(top_p)(tokens, logits)
    return logits.softmax(-1)


KNOBS = [(0.7, 50, 1.0), (1.0, 0, 0.9), (1.3, 40, 0.5), (0.9, 0, 1.0), (1.0, 1, 1.0), (1.0, 99999, 0.01)]


def check_distribution(logits, expected_logits, tokens, temperature, top_k, top_p, penalty):
    scores, found = candidates(penalise(logits, tokens, penalty), Sampling(temperature, top_k, top_p))
    got = scores.softmax(-1) if found is None else torch.zeros_like(logits).scatter(1, found, scores.softmax(-1))
    expected = filtered(tokens, expected_logits, temperature, top_k, top_p, penalty)
    assert torch.equal(got > 0, expected > 0) and torch.allclose(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("temperature, top_k, top_p", KNOBS)
def test_filters_are_those_of_transformers(temperature, top_k, top_p):
    torch.manual_seed(1)
    logits = torch.randn(8, 5000) * 4
    check_distribution(logits, logits, torch.randint(5000, (8, 300)), temperature, top_k, top_p, 1.2)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("temperature, top_k, top_p", KNOBS)
def test_the_distribution_of_a_step_is_that_of_transformers(tiny, temperature, top_k, top_p, penalty):
    model, prompt = copy.deepcopy(tiny).double(), prompt_for(tiny, 30)  # in fp32 the order of a sum shows
    texts = torch.cat([prompt.expand(3, -1), torch.tensor([[300], [400], [500]])], 1)
    with torch.no_grad():
        reader = GPT2Reader(model, 3, 40)
        reader.read(prompt)
        logits, expected = reader.read(texts[:, -1:]), model(texts).logits[:, -1].float()
    check_distribution(logits, expected, texts, temperature, top_k, top_p, penalty)


def test_the_cache_is_no_larger_than_needed(tiny, monkeypatch):
    made = []
    class Noted(GPT2Reader):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self.cache.shape)
    monkeypatch.setattr("colab_gpt2.model.decoding.GPT2Reader", Noted)
    for context in (512, 12):
        list(decode(tiny, prompt_for(tiny, 10), Sampling(), torch.Generator().manual_seed(0), 5, 2, context))
    assert made == [(6, 2, 2, 4, 15, 64), (6, 2, 2, 4, 12, 64)]


def test_beyond_the_context_readers_agree():
    model = small()
    prompt = prompt_for(model, 9)
    lean = greedy(model, prompt, 150, 2)
    model.transformer.h[1].register_forward_hook(lambda module, inputs, output: None)  # changes nothing, and is a hook
    assert not is_stock_gpt2(model) and greedy(model, prompt, 150, 2) == lean


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU; the step is tested above")
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.float16, 0.003)])
def test_a_recorded_step_on_a_gpu(tiny, dtype, bound):
    model = copy.deepcopy(tiny).to("cuda", dtype)
    prompt, more = prompt_for(tiny, 60).cuda(), random_ids(0, 4, 20).cuda()
    assert [type(open_reader(model, 4, 80, new)) for new in (32, 31)] == [GraphReader, GPT2Reader]
    reader = GraphReader(model, 4, 80)
    for _ in range(2):  # the second text replays what the first recorded
        expected, got = (all_logits(r, prompt, more) for r in (ModelReader(model, 4), reader))
        assert (got - expected).norm() < bound * expected.norm()
        reader.forget()
    if dtype is torch.float32: assert greedy(model, prompt, 40, 3) == theirs(model, prompt, 40, 3)
