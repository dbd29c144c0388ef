"That every causal model with a linear output layer trains by the chunked loss, to the stock model's numbers."
import copy

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig, BloomConfig, CohereConfig, CTRLConfig, FalconConfig, Gemma2Config, Gemma3TextConfig, GemmaConfig,
    GPT2Config, GPTJConfig, GPTNeoXConfig, GraniteConfig, HyperCLOVAXConfig, Lfm2Config, LlamaConfig, MambaConfig,
    MistralConfig, MixtralConfig, OPTConfig, PhiConfig, Qwen2Config, Qwen3Config, SmolLM3Config, StableLmConfig,
    XLMConfig)

from colab_gpt2.config import FinetuneConfig
from colab_gpt2.model import loss
from colab_gpt2.model.heads import hidden_states, output_head
from colab_gpt2.model.loading import new_model
from colab_gpt2.model.lora import add_adapters
from colab_gpt2.model.loss import linear_cross_entropy
from colab_gpt2.model.tune import CHUNKED, OWN_LOSS, gradient_checkpointing, tune_model
from colab_gpt2.planning.plan import TextSize, named_runtime, plan_run

SIZE = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2)
PAIRS = dict(SIZE, num_key_value_heads=2)
HEADS = dict(PAIRS, head_dim=8)
CAPPED = dict(HEADS, final_logit_softcapping=5., initializer_range=0.3)
NO_DROPOUT = dict(resid_pdrop=0., embd_pdrop=0., attn_pdrop=0.)
SMALL = dict(n_layer=2, n_embd=32, n_head=4, n_positions=32, vocab_size=97, **NO_DROPOUT)
CONFIGS = dict(
    gpt2=GPT2Config(**SMALL), gptj=GPTJConfig(**SMALL, rotary_dim=4), llama=LlamaConfig(**PAIRS), ctrl=CTRLConfig(
        **{name: SMALL[name] for name in ("n_layer", "n_embd", "n_head", "n_positions", "vocab_size")}, dff=48,
        resid_pdrop=0., embd_pdrop=0.),
    llama_tied=LlamaConfig(**PAIRS, tie_word_embeddings=True), qwen2=Qwen2Config(**PAIRS), qwen3=Qwen3Config(**HEADS),
    smollm3=SmolLM3Config(**PAIRS), mistral=MistralConfig(**PAIRS, sliding_window=8), gemma=GemmaConfig(**HEADS),
    gemma2=Gemma2Config(**CAPPED), gemma3=Gemma3TextConfig(**CAPPED), phi=PhiConfig(**SIZE),
    gpt_neox=GPTNeoXConfig(**SIZE),
    bloom=BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
    opt=OPTConfig(**SIZE, ffn_dim=48, word_embed_proj_dim=16, dropout=0.),
    cohere=CohereConfig(**PAIRS, logit_scale=0.3),
    granite=GraniteConfig(**PAIRS, logits_scaling=7.), falcon=FalconConfig(**SIZE),
    stablelm=StableLmConfig(**PAIRS),
    mamba=MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4), lfm2=Lfm2Config(
        **PAIRS, layer_types=["conv", "full_attention"]),
    hyperclovax=HyperCLOVAXConfig(**PAIRS, logits_scaling=0.2), mixtral=MixtralConfig(**PAIRS, num_local_experts=2),
    bert=BertConfig(**SIZE, is_decoder=True, hidden_dropout_prob=0., attention_probs_dropout_prob=0.))


def pair(config):
    "A stock model, and the same tuned; both train, in fp32, without dropout."
    stock = new_model(config, seed=0).train()
    tuned = copy.deepcopy(stock)
    return stock, tuned, tune_model(tuned)


def text(rows=3, length=16):
    "(ids, labels), of which some do not count, as in a conversation."
    torch.manual_seed(1)
    ids = torch.randint(3, 97, (rows, length))
    labels = ids.clone()
    labels[1, 2:9] = labels[2, :-3] = -100
    return ids, labels


def gradients(model, ids, labels, **options):
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=ids, labels=labels, **options).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, stock, bound=1e-6):
    "Of all gradients together: one that is 0 but for rounding has no relative error."
    (loss, found), (expected, wanted) = ours, stock
    assert abs(loss - expected) <= bound * abs(expected) and found.keys() == wanted.keys()
    whole = torch.cat([g.flatten() for g in wanted.values()]).norm()
    for name, g in wanted.items():
        assert (found[name] - g).norm() <= bound * max(g.norm(), whole / 10), name


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_the_stock_models(name):
    stock, tuned, changed = pair(CONFIGS[name])
    assert changed[0] == CHUNKED and tuned(input_ids=text()[0], labels=text()[0]).logits is None
    assert_same(gradients(tuned, *text()), gradients(stock, *text()))


def test_the_sum_of_a_step_is_divided_by_its_items():
    stock, tuned, _ = pair(CONFIGS["granite"])
    assert_same(gradients(tuned, *text(), num_items_in_batch=45), gradients(stock, *text(), num_items_in_batch=45))


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom"])
def test_padded_blocks_and_computing_layers_again(name):
    stock, tuned, _ = pair(CONFIGS[name])
    ids, labels = text()
    seen = torch.ones_like(ids)
    seen[0, 10:], labels[0, 10:] = 0, -100
    expected = gradients(stock, ids, labels, attention_mask=seen)
    with gradient_checkpointing(tuned): assert_same(gradients(tuned, ids, labels, attention_mask=seen), expected)


@pytest.mark.parametrize("name", ["llama_tied", "phi"])
def test_a_frozen_output_layer_beside_adapters(name):
    "Only adapters learn; a head that peft has wrapped takes the model's own loss."
    pytest.importorskip("peft")
    stock, tuned, _ = pair(CONFIGS[name])
    adapted, plain = (add_adapters(model, 2, seed=0).train() for model in (tuned, stock))
    for model in (adapted, plain):
        for parameter in model.parameters(): parameter.requires_grad and parameter.data.add_(0.02)
    assert_same(gradients(adapted, *text()), gradients(plain, *text()))
    assert adapted(input_ids=text()[0], labels=text()[0]).logits is None
    assert tuned.get_output_embeddings().weight.grad is None


def test_adapters_on_the_output_layer_itself():
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
    stock, tuned, _ = pair(CONFIGS["llama"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ours = gradients(peft.get_peft_model(tuned, settings).train(), *text())
        torch.manual_seed(0)
        assert_same(ours, gradients(peft.get_peft_model(stock, settings).train(), *text()))


BALANCED = MixtralConfig(**PAIRS, num_local_experts=2, output_router_logits=True)
XLM = XLMConfig(vocab_size=97, emb_dim=32, n_layers=1, n_heads=2, max_position_embeddings=32, causal=True)

@pytest.mark.parametrize("config", [BALANCED, XLM], ids=["experts", "xlm"])
def test_a_model_with_another_loss_keeps_it(config):
    stock, tuned, changed = pair(config)
    assert changed[0] == OWN_LOSS and output_head(stock) is None
    for model in (stock, tuned):
        for module in model.modules():
            if hasattr(module, "dropout") and isinstance(module.dropout, float): module.dropout = 0.
    assert_same(gradients(tuned, *text()), gradients(stock, *text()))


class Twice(type(new_model(CONFIGS["llama"]))):
    "An architecture that nobody has heard of: its output is not linear."
    def forward(self, input_ids=None, labels=None, **kwargs):
        out = super().forward(input_ids=input_ids, **kwargs)
        out.logits = out.logits + out.logits.relu()
        if labels is not None: out.loss = self.loss_function(out.logits, labels, self.config.vocab_size)
        return out


class Learned(type(new_model(CONFIGS["llama"]))):
    "Its scale is trained."
    def __init__(self, config):
        super().__init__(config)
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, input_ids=None, labels=None, **kwargs):
        out = super().forward(input_ids=input_ids, **kwargs)
        out.logits = out.logits * self.temperature
        if labels is not None: out.loss = self.loss_function(out.logits, labels, self.config.vocab_size)
        return out


@pytest.mark.parametrize("kind", [Twice, Learned])
def test_an_unknown_output_is_found_out(kind):
    model = kind(CONFIGS["llama"])
    assert output_head(model) is None and tune_model(model)[0] == OWN_LOSS
    assert model.train()(input_ids=text()[0], labels=text()[0]).logits is not None


def test_asking_a_model_disturbs_nothing():
    model = new_model(CONFIGS["opt"], seed=0).eval()
    model.model.decoder.layers[0].train()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    weights = copy.deepcopy(model.state_dict())
    with torch.no_grad(): head = output_head(model)
    assert head.weight is model.lm_head.weight and [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert "forward" not in vars(model.lm_head)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gemma3", "granite", "bert"])
def test_hidden_states_are_what_the_output_layer_gets(name):
    model, (ids, labels) = new_model(CONFIGS[name], seed=0).eval(), text()
    head, hidden = output_head(model), hidden_states(model, ids)
    with torch.no_grad(): logits = model(ids).logits
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    assert abs(head.loss(hidden[:, :-1], labels[:, 1:], reduction="sum") - expected) < 1e-6 * expected


@pytest.mark.parametrize("chunk_size, multiple", [(8, 1), (8, 64), (100, 8)])
def test_autograd_agrees_on_bias_scale_and_cap(chunk_size, multiple):
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.double).requires_grad_() for shape in ((19, 6), (23, 6), (23,))]
    labels = torch.randint(23, (19,))
    labels[3:6] = -100
    def loss(hidden, weight, bias):
        form = dict(bias=bias, scale=0.7, softcap=2., chunk_size=chunk_size, multiple=multiple)
        return linear_cross_entropy(hidden, weight, labels, **form)
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.02), (torch.float16, 0.005)])
def test_a_capped_head_in_half_precision(dtype, bound):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(600, 24), torch.randn(203, 24), torch.randn(203)
    labels, found = torch.randint(203, (600,)), []
    for kind in ("ours", "plain"):
        inputs = [each.clone().requires_grad_() for each in (hidden, weight, bias)]
        if kind == "plain":
            h, w, b = inputs
            loss = nn.functional.cross_entropy(30 * torch.tanh((h @ w.T + b) * 0.5 / 30), labels)
        else:
            with torch.autocast("cpu", dtype):
                loss = linear_cross_entropy(inputs[0], inputs[1], labels, bias=inputs[2], scale=0.5, softcap=30.,
                                            chunk_size=256, multiple=8)
        (loss * (65536 if dtype == torch.float16 and kind == "ours" else 1)).backward()
        found.append([loss.detach(), *(i.grad for i in inputs)])
    scale = 65536 if dtype == torch.float16 else 1
    assert abs(found[0][0] - found[1][0]) < bound * found[1][0]
    for ours, plain in zip(found[0][1:], found[1][1:]): assert (ours / scale - plain).norm() < bound * plain.norm()


def test_rows_that_do_not_count_are_not_multiplied():
    hidden, weight, seen = torch.randn(40, 8), torch.randn(50, 8), []
    labels = torch.full((40,), -100)
    labels[::8] = 3
    class Rows(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            if "addmm" in str(operation): seen.append(len(args[1]))
            return operation(*args, **(kwargs or {}))
    with Rows(): linear_cross_entropy(hidden, weight, labels)
    assert seen == [5]


@pytest.mark.parametrize("config, told", [
    (CONFIGS["llama"], CHUNKED), (CONFIGS["bloom"], CHUNKED),
    (BALANCED, "Whether the loss is computed in chunks shows when the model is loaded.")],
    ids=["llama", "bloom", "experts"])
def test_the_plan_says_how_the_loss_is_computed(config, told):
    text, cpu = TextSize(10_000, 16, "made up"), named_runtime("CPU")
    assert plan_run(config, text, cpu).reasons[-1] == told
    assert plan_run(config, text, cpu, FinetuneConfig(tune=False)).reasons[-1] != told


def test_each_row_of_logits_begins_with_a_cache_line(monkeypatch):
    "In a chunk of 3 and one of 2; what pads the rows has no part in the loss."
    seen, whole = [], loss.chunk_loss
    def look(logits, *given):
        seen.append((logits.data_ptr() % loss.LINE, logits.stride(0) * logits.element_size() % loss.LINE, len(logits)))
        return whole(logits, *given)
    monkeypatch.setattr(loss, "chunk_loss", look)
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(5, 8), torch.randn(97, 8), torch.arange(5)
    found = linear_cross_entropy(hidden.double(), weight.double(), labels, chunk_size=3)
    assert abs(found - nn.functional.cross_entropy(hidden.double() @ weight.double().T, labels)) < 1e-12
    for dtype in (torch.float32, torch.bfloat16):
        linear_cross_entropy(hidden.to(dtype), weight.to(dtype), labels, chunk_size=3)
    assert seen == [(0, 0, rows) for _ in range(3) for rows in (3, 2)]
