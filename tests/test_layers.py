"That norms and gated MLPs that keep less give the numbers of the stock ones, or are left as they are."
import copy

import pytest
import torch
from test_heads import CONFIGS, gradients, text
from torch import nn

from colab_gpt2.model.layers import does_the_same, gated_forward, keep_less, norm_forward
from colab_gpt2.model.loading import new_model
from colab_gpt2.model.lora import add_adapters
from colab_gpt2.model.tune import gradient_checkpointing, tune_model

GATED = ["llama", "qwen2", "qwen3", "smollm3", "mistral", "gemma", "gemma2", "gemma3", "granite", "hyperclovax"]


@pytest.mark.parametrize("name", GATED)
def test_every_norm_and_gated_layer_of_a_llama_keeps_less(name):
    model = new_model(CONFIGS[name], seed=0)
    of_kind = [m for m in model.modules() if type(m).__name__.endswith(("RMSNorm", "MLP"))]
    assert keep_less(model) == len(of_kind) >= 7 and all("forward" in vars(module) for module in of_kind)


def kept(model, ids):
    "Bytes that autograd keeps for the backward pass, without the weights, each once."
    weights, saved = {p.data_ptr() for p in model.parameters()}, {}
    def note(t):
        if t.data_ptr() not in weights: saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t): loss = model.model(ids).last_hidden_state
    return sum(saved.values()), loss


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
def test_a_layer_keeps_two_thirds_and_with_checkpointing_no_more_than_the_stock_one(again):
    stock = new_model(CONFIGS["llama"], seed=0).train()
    tuned, ids = copy.deepcopy(stock), torch.randint(97, (4, 32))
    tune_model(tuned)
    if not again: assert kept(tuned, ids)[0] < 0.7 * kept(stock, ids)[0]
    else:
        with gradient_checkpointing(tuned), gradient_checkpointing(stock):
            assert kept(tuned, ids)[0] <= kept(stock, ids)[0]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_autocast_in_bf16_is_as_near_as_its_rounding(name):
    stock = new_model(CONFIGS[name], seed=0).train()
    tuned = copy.deepcopy(stock)
    tune_model(tuned)
    exact = gradients(stock, *text())
    with torch.autocast("cpu", torch.bfloat16): near, far = gradients(tuned, *text()), gradients(stock, *text())
    whole = torch.cat([g.flatten() for g in exact[1].values()]).norm()
    def away(found): return torch.cat([(found[1][n] - g).flatten() for n, g in exact[1].items()]).norm() / whole
    assert away(near) < 1.2 * away(far) + 1e-3


@pytest.mark.parametrize("name", ["llama", "gemma", "gemma3"])
def test_norms_of_weights_in_bf16_are_rounded_as_often_as_the_stock_ones(name):
    "Gemma's only once, after the product with the weight; llama's before it, too."
    model = new_model(CONFIGS[name], seed=0).bfloat16()
    stock = next(m for m in model.modules() if type(m).__name__.endswith("RMSNorm"))
    torch.nn.init.normal_(stock.weight, std=0.3, generator=torch.Generator().manual_seed(1))
    hidden = torch.randn(64, len(stock.weight), generator=torch.Generator().manual_seed(2)).bfloat16()
    wanted = stock(hidden)
    tune_model(model)
    found = stock(hidden)
    assert found.dtype == wanted.dtype == torch.bfloat16 and "forward" in vars(stock)
    assert (found == wanted).float().mean() > 0.999


def test_adapters_inside_a_gated_layer_and_weights_in_half_precision():
    pytest.importorskip("peft")
    stock = new_model(CONFIGS["llama"], seed=0).train()
    tuned = copy.deepcopy(stock)
    tune_model(tuned)
    found = []
    for model in (stock, tuned):
        adapted = add_adapters(model, 2, "bf16", seed=0).train()
        with torch.no_grad():
            for name, p in adapted.named_parameters(): "lora_B" in name and p.fill_(0.01)
        with torch.autocast("cpu", torch.bfloat16): found.append(gradients(adapted, *text()))
    (expected, wanted), (loss, ours) = found
    assert abs(loss - expected) < 0.01 * expected and ours.keys() == wanted.keys()
    whole = torch.cat([g.flatten() for g in wanted.values()]).norm()
    for name, g in wanted.items(): assert (ours[name] - g).norm() < 0.05 * whole, name


class Shifted(nn.Module):
    "Called a norm, it does something else."
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6
    def forward(self, x): return nn.functional.rms_norm(x, (8,), self.weight, self.eps) + 0.01


class Biased(nn.Module):
    "A gated MLP whose last layer has a bias."
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.act_fn = nn.SiLU()
    def forward(self, x): return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Plain(nn.Module):
    "An MLP without a gate."
    def __init__(self):
        super().__init__()
        self.up_proj = nn.Linear(8, 8)
    def forward(self, x): return self.up_proj(x)


class Weightless(nn.Module):
    "A norm without a weight, as FalconMamba has."
    eps = 1e-6
    def forward(self, x): return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


@pytest.mark.parametrize("kind, forward", [(Shifted, norm_forward), (Biased, gated_forward), (Plain, gated_forward),
                                           (Weightless, norm_forward), (Weightless, gated_forward)])
def test_what_does_something_else_is_left_alone(kind, forward): assert not does_the_same(kind(), forward)


def test_looking_at_a_model_takes_no_random_number():
    model, state = new_model(CONFIGS["gemma3"], seed=0), torch.get_rng_state()
    weights = copy.deepcopy(model.state_dict())
    keep_less(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_compiled_block_has_its_own_forwards():
    "Traced in one piece, to the same numbers."
    model = new_model(CONFIGS["llama"], seed=0).train()
    expected, _ = gradients(model, *text())
    tune_model(model)
    for layer in model.model.layers: layer.compile(backend="eager", fullgraph=True)
    found, of = gradients(model, *text())
    assert abs(found - expected) < 1e-6 * expected and all(g.isfinite().all() for g in of.values())
