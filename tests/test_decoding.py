"Decoding against transformers' own: which models GPT2Reader reads, their numbers, and the distribution of a step."
import contextlib, copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from colab_gpt2.model.decoding import GPT2Reader, GraphReader, ModelReader, Noise, decode, is_stock_gpt2, open_reader
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
@pytest.mark.parametrize("name, new", [("tiny", 40), ("wide", 10)])
def test_greedy_is_that_of_transformers(name, new, samples, request):
    model = request.getfixturevalue(name)
    assert type(open_reader(model, samples, 8, new)) is GPT2Reader
    for prompt in (prompt_for(model, length) for length in (1, 7, 100)):
        assert greedy(model, prompt, new, samples) == theirs(model, prompt, new) * samples  # each row as if alone


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
        list(decode(tiny, prompt_for(tiny, 10), Sampling(), Noise(0, range(2), "cpu"), 5, 2, context))
    assert made == [(6, 2, 2, 4, 15, 64), (6, 2, 2, 4, 12, 64)]


def test_beyond_the_context_readers_agree():
    model = small()
    prompt = prompt_for(model, 9)
    lean = greedy(model, prompt, 150, 2)
    model.transformer.h[1].register_forward_hook(lambda module, inputs, output: None)  # changes nothing, and is a hook
    assert not is_stock_gpt2(model) and greedy(model, prompt, 150, 2) == lean


SIZES = dict(vocab_size=500, hidden_size=32, num_hidden_layers=2)
HEADS = dict(num_attention_heads=2, num_key_value_heads=1, intermediate_size=48, head_dim=16)
KINDS = {
    "OpenAIGPT": dict(vocab_size=500, n_embd=32, n_layer=2, n_head=2, n_positions=64),  # no cache
    "CTRL": dict(vocab_size=500, n_embd=32, n_layer=2, n_head=2, dff=48, n_positions=64),
    "Mamba": dict(SIZES, state_size=4),
    "Mamba2": dict(SIZES, state_size=8, num_heads=4, head_dim=16, n_groups=1, chunk_size=8),
    "FalconMamba": dict(SIZES, state_size=4),
    "Rwkv": dict(SIZES, attention_hidden_size=32, intermediate_size=48, context_length=64),
    "Lfm2": dict(SIZES, **HEADS, layer_types=["conv", "full_attention"]),
    "RecurrentGemma": dict({**SIZES, "num_hidden_layers": 3}, **HEADS, lru_width=32, attention_window_size=8),
    "Jamba": dict(SIZES, **HEADS, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=9, mamba_d_state=4,
                  use_mamba_kernels=False),
    "Qwen3Next": dict(SIZES, **HEADS, layer_types=["linear_attention", "full_attention"], num_experts=2,
                      num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
                      linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8),
    "xLSTM": dict(vocab_size=500, hidden_size=32, num_hidden_layers=2, num_blocks=2, num_heads=2),
    "Gemma3Text": dict(SIZES, **HEADS, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
    "Mistral": dict(SIZES, **HEADS, sliding_window=8),
    "Bloom": dict(vocab_size=500, hidden_size=32, n_layer=2, n_head=2)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_cache_is_read(kind):
    "What is drawn for three texts, longer than a window, is most likely after the complete text, read from its start."
    model = new_model(getattr(transformers, f"{kind}Config")(**KINDS[kind]), seed=0).eval()
    prompt = prompt_for(model, 9)
    for samples in (3, 1):
        found = torch.cat([prompt.expand(samples, -1), torch.cat(list(
            decode(model, prompt, Sampling(top_k=2), Noise(1, range(samples), "cpu"), 12, samples, 64)), 1)], 1)
        with torch.no_grad(): logits = model(found, use_cache=False).logits[:, 8:-1].float()
        drawn, second = logits.gather(2, found[:, 9:, None])[..., 0], logits.topk(2).values[..., 1]
        assert (drawn >= second - 1e-4).all() and len(set(map(tuple, found.tolist()))) == samples
    with torch.no_grad():
        reader = ModelReader(model, 2)
        for step, ids in enumerate(found.expand(2, -1).split(1, 1)[:12]):
            logits, expected = reader.read(ids), model(found[:, :step + 1], use_cache=False).logits[:, -1]
            assert reader.length == step + 1 and torch.allclose(logits, expected.float(), atol=1e-3)


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_model_whose_cache_does_not_work_is_read_again(fails_at):
    model, calls = small(), []
    def forward(**options):
        if options["use_cache"]: calls.append(options)
        if options["use_cache"] and len(calls) >= fails_at: raise ValueError("only for attention layers")
        return GPT2LMHeadModel.forward(model, **options)
    model.forward, prompt = forward, prompt_for(model, 5)
    model.transformer.h[1].register_forward_hook(lambda module, inputs, output: None)  # no GPT2Reader for a hook
    assert not is_stock_gpt2(model) and greedy(model, prompt, 9, 2) == greedy(small(), prompt, 9, 2)
    assert len(calls) == fails_at


def test_a_lack_of_memory_is_no_fault_of_the_cache():
    "Who asked for fewer texts at a time is told; to read all again would take even more."
    model, calls = small(), []
    def forward(**options):
        calls.append(options)
        raise torch.OutOfMemoryError("pretended")
    model.forward, prompt = forward, prompt_for(model, 5)
    model.transformer.h[1].register_forward_hook(lambda module, inputs, output: None)  # no GPT2Reader for a hook
    with pytest.raises(torch.OutOfMemoryError): greedy(model, prompt, 9, 2)
    assert len(calls) == 1


def test_the_texts_of_a_request_have_random_numbers_of_their_own():
    scores = torch.zeros(4, 30)
    four, two, next_seed = Noise(7, range(4), "cpu"), Noise(7, range(2, 4), "cpu"), Noise(8, range(4), "cpu")
    steps = [four(scores) for _ in range(40)]
    assert all(torch.equal(two(scores[2:]), step[2:]) for step in steps)
    numbers = {x for noise in (steps[0], steps[1], next_seed(scores)) for x in noise.flatten().tolist()}
    assert len(numbers) > 350  # of 360: no text repeats another's
    one = torch.empty(1, 30).exponential_(generator=torch.Generator().manual_seed(7))
    assert torch.equal(steps[0][:1], one)  # as before there were several generators
    assert torch.stack(steps).mean().item() == pytest.approx(1, abs=0.1)


class Watched(TorchDispatchMode):
    "Fails where a GPU would have to be waited for, or where tensors of two devices meet."
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not {"_local_scalar_dense", "nonzero", "masked_select"} & {function.overloadpacket.__name__}, function
        made = function(*args, **(kwargs or {}))
        devices = {t.device.type for t in tree_leaves((args, kwargs, made)) if isinstance(t, torch.Tensor)}
        assert devices <= {"meta"}, (function, devices)
        return made


def test_what_a_gpu_records_waits_for_nothing_and_is_one_graph():
    model, ids, at = small(n_layer=1).to("meta"), torch.zeros(2, 1, dtype=torch.long), torch.tensor([5])
    on_device = ids.to("meta"), at.to("meta")
    with torch.no_grad(), Watched():
        logits = GPT2Reader(model, 2, 20).step(*on_device)
        with pytest.raises(AssertionError): torch.zeros(1)  # a tensor of another device is seen
    reader = GPT2Reader(small(n_layer=1), 2, 20)
    with torch.no_grad():
        recorded = torch.compile(reader.step, fullgraph=True, backend="eager")(ids, at)
        assert torch.equal(recorded, reader.step(ids, at)) and logits.shape == recorded.shape


def cuda_that_fails(monkeypatch):
    "What `GraphReader.record` asks of torch.cuda; the capture ends in an error. -> the streams that were left."
    left = []
    @contextlib.contextmanager
    def stream(which):
        yield
        left.append(which)
    @contextlib.contextmanager
    def graph(which, capture_error_mode):
        yield
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCompile with …")
    main = SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in dict(current_stream=lambda: main, Stream=lambda: SimpleNamespace(wait_stream=lambda o: None),
                               stream=stream, CUDAGraph=lambda: "graph", graph=graph).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return left


@torch.no_grad()
def test_where_no_graph_can_be_recorded_the_text_is_read_without(tiny, monkeypatch):
    cuda_that_fails(monkeypatch)
    prompt, more = prompt_for(tiny, 20), random_ids(0, 2, 6)
    reader = GraphReader(tiny, 2, 40)
    for text in range(2):
        with contextlib.ExitStack() as around:
            if not text: around.enter_context(pytest.warns(UserWarning, match="no CUDA graph .* is capturing$"))
            got = all_logits(reader, prompt, more)
        assert torch.equal(got, all_logits(GPT2Reader(tiny, 2, 40), prompt, more))
        reader.forget()


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
