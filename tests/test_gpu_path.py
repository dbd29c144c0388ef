"""What a run does on a GPU, without one: on a pretended GPU, which has no values (helpers/pretend_gpu), and with real
numbers on the CPU where only the order of operations, or the scaling of gradients in fp16, is asked for."""
import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, TrainerCallback, default_data_collator

from colab_gpt2.config import FinetuneConfig
from colab_gpt2.engine.trainer import make_trainer
from colab_gpt2.model.loading import load_tokenizer, new_model
from colab_gpt2.model.loss import linear_cross_entropy
from colab_gpt2.model.tune import gradient_checkpointing
from colab_gpt2.planning.plan import plan_run
from colab_gpt2.runtime import check_runtime
from colab_gpt2.text.token_store import tokenize_file
from colab_gpt2.training import train_model

SHAPE = dict(n_layer=2, n_embd=64, n_head=2, n_positions=64, resid_pdrop=0., embd_pdrop=0., attn_pdrop=0.)
WIDE = GPT2Config(n_layer=2, n_embd=256, n_head=4, n_positions=256)  # with GPT-2's vocabulary and dropout
DEEP = GPT2Config(n_layer=4, n_embd=256, n_head=4, n_positions=256, vocab_size=1000)  # activations outweigh the rest


def train(*args, **options):
    from helpers.pretend_gpu.device import train  # in the process that has the GPU
    return train(*args, **options)


# With numbers, on the CPU

@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    page = "".join(f" = Article {i} = \n \n The tide of day {i} came in at {i % 12} o'clock and went out again . \n"
                   for i in range(60))
    (folder/"train.txt").write_text(page)
    return tokenize_file(folder/"train.txt", load_tokenizer("tiny"), 64, cache_dir=folder, progress=False)


def trainer_of(blocks, folder, precision="fp32", callbacks=(), micro_batch=2, **changes):
    "(a trainer of steps of 8 blocks in `precision`, its plan)"
    options = dict(model="tiny", output_dir=str(folder), block_size=64, effective_batch_size=8, logging_steps=1,
                   per_device_train_batch_size=micro_batch, max_steps=8, save_steps=4, seed=1, learning_rate=1e-3,
                   warmup_steps=0, torch_compile=False)
    config = FinetuneConfig(**{**options, **changes})
    model = new_model(GPT2Config(vocab_size=8192, **SHAPE), seed=0)
    plan = plan_run(model, blocks, check_runtime(), replace(config, precision="fp32"))
    plan = replace(plan, recipe=replace(plan.recipe, precision=precision))
    return make_trainer(config, model, load_tokenizer("tiny"), blocks, plan, callbacks), plan


class Waits(TorchDispatchMode):
    "Operations whose answer a program waits for."
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = str(operation)
        if name.startswith(("aten._local_scalar_dense", "aten.nonzero", "aten.equal")): self.seen.append(name)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("changes", [{}, dict(gradient_checkpointing=True), dict(method="lora")], ids=str)
def test_no_wait_in_a_micro_batch(blocks, tmp_path, changes, monkeypatch):
    monkeypatch.setattr("colab_gpt2.model.loss.those_that_count", lambda *given: given[:2])  # as on a GPU
    trainer, _ = trainer_of(blocks, tmp_path, "bf16", **changes)
    model, trainer.current_gradient_accumulation_steps = trainer.accelerator.prepare(trainer.model).train(), 1
    inputs = default_data_collator([blocks[i] for i in range(8)])
    around = gradient_checkpointing(model) if changes.get("gradient_checkpointing") else contextlib.nullcontext()
    with around, Waits() as waits: trainer.training_step(model, inputs)
    assert waits.seen == [] and all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("multiple", [1, 64])
@pytest.mark.parametrize("rows", [300, 3000], ids="{} rows".format)
def test_autograd_adds_the_heads_gradient_in_place(rows, multiple):
    "To the embedding's, which is the same weight: a padded head's gradient is no view either."
    weight, ids = torch.nn.Parameter(torch.randn(5003, 16)), torch.randint(5003, (rows,))
    def step():
        hidden = torch.nn.functional.embedding(ids, weight)
        with torch.autocast("cpu", torch.bfloat16): loss = linear_cross_entropy(hidden, weight, ids, multiple=multiple)
        loss.backward()
    step()
    weight.grad = None
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen: step()
    added = [e.name for e in seen.events() if e.name in ("aten::add", "aten::add_") and [5003, 16] in e.input_shapes]
    assert "aten::add" not in added and "aten::add_" in added


def test_gradients_of_the_loss_are_as_near_in_fp16_as_their_rounding():
    "Rows that no power of two divides, some that do not count, and the loss scaled as in training."
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(1500, 64), torch.randn(5003, 64) / 2, torch.randint(5003, (1500,))
    hidden[:, 0] *= 20
    labels[:700], labels[::9] = 7, -100
    for dtype, bound in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float32, 2e-6)):
        h, w = hidden.to(dtype, copy=True).requires_grad_(), torch.nn.Parameter(weight.clone())
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            (linear_cross_entropy(h, w, labels, multiple=64) * 65536).backward()
        exact = [t.to(dtype).double().requires_grad_() for t in (hidden, weight)]
        (torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, labels) * 65536).backward()
        for ours, theirs in zip((h.grad, w.grad), exact):
            assert (ours.double() - theirs.grad).norm() / theirs.grad.norm() < bound, dtype


@pytest.fixture
def scaler_on_cpu(monkeypatch):
    "Accelerate with a gradient scaler on the CPU, of the scale that is set."
    set_to, begin = SimpleNamespace(init_scale=2.**16), Accelerator.__init__
    def init(self, *args, **options):
        begin(self, *args, **options)
        if self.state.mixed_precision != "fp16": return
        self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", init_scale=set_to.init_scale)
    monkeypatch.setattr(Accelerator, "__init__", init)
    return set_to


class Steps(TrainerCallback):
    "The weights before and after each step."
    def __init__(self): self.moved = []
    def on_step_begin(self, args, state, control, model, **kwargs):
        self.before = [p.detach().clone() for p in model.parameters()]
    def on_step_end(self, args, state, control, model, **kwargs):
        self.moved.append(not all(torch.equal(a, b) for a, b in zip(self.before, model.parameters())))


def losses(trainer): return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def exact(blocks, tmp_path_factory):
    "A trainer that has taken five steps in fp32."
    trainer, plan = trainer_of(blocks, tmp_path_factory.mktemp("fp32"), save_steps=-1, max_steps=5)
    train_model(trainer, plan)
    return trainer


@pytest.mark.parametrize("micro_batch", [8, 2])
def test_fp16_with_a_scaler_learns_what_fp32_learns(blocks, tmp_path, exact, scaler_on_cpu, micro_batch):
    """So gradients are unscaled once, however many micro-batches add up to them. The first loss is that of the same
    weights (measured: 1e-6 apart); from then on AdamW makes as much of a rounded gradient as of an exact one (2e-5)."""
    half, plan = trainer_of(blocks, tmp_path/"fp16", "fp16", micro_batch=micro_batch, save_steps=-1, max_steps=5)
    after = train_model(half, plan)
    assert half.accelerator.scaler.get_scale() == 2.**16 and not any("skipped" in reason for reason in after.reasons)
    assert losses(half)[0] == pytest.approx(losses(exact)[0], rel=1e-5)
    assert losses(half) == pytest.approx(losses(exact), rel=1e-4)
    norms = [[entry["grad_norm"] for entry in t.state.log_history if "grad_norm" in entry] for t in (half, exact)]
    assert norms[0] == pytest.approx(norms[1], rel=2e-3)  # unscaled twice, or not at all: 65,536 times off


@pytest.mark.parametrize("scale, all_of_them", [(2.**40, True), (2.**22, False)])
def test_a_step_with_infinite_gradients_changes_nothing_and_is_told(
        blocks, tmp_path, scaler_on_cpu, scale, all_of_them):
    scaler_on_cpu.init_scale = scale
    steps = Steps()
    trainer, plan = trainer_of(blocks, tmp_path, "fp16", [steps], save_steps=-1)
    after = train_model(trainer, plan)
    skipped = steps.moved.count(False)
    assert skipped and (skipped == 8) is all_of_them and trainer.accelerator.scaler.get_scale() == scale / 2**skipped
    assert after.reasons[-1] == f"Steps skipped because a gradient was infinite in fp16: {skipped} of 8."


def test_a_run_in_fp16_resumes_to_the_bit(blocks, tmp_path, scaler_on_cpu):
    "With steps skipped before the checkpoint: the scale is in it, and the count of the steps that were taken."
    scaler_on_cpu.init_scale = 2.**23
    whole, plan = trainer_of(blocks, tmp_path, "fp16")
    told = train_model(whole, plan).reasons[-1]
    resumed, plan = trainer_of(blocks, tmp_path/"resumed", "fp16")
    assert train_model(resumed, plan, tmp_path/"checkpoint-4").reasons[-1] == told and "skipped" in told
    for a, b in zip(whole.model.parameters(), resumed.model.parameters()): assert torch.equal(a, b)


class Infinite(TrainerCallback):
    "Every step has an infinite gradient."
    def on_substep_end(self, args, state, control, model, **kwargs):
        gradient = next(model.parameters()).grad
        if gradient is not None: gradient[0] = torch.inf


def test_a_run_whose_scale_collapses_ends(blocks, tmp_path, scaler_on_cpu):
    scaler_on_cpu.init_scale = 4.
    trainer, plan = trainer_of(blocks, tmp_path, "fp16", [Infinite()])
    told = "By step 3 all gradients are infinite in fp16; start again with precision='fp32'"
    with pytest.raises(FloatingPointError, match=told): train_model(trainer, plan)
    assert not list(tmp_path.glob("checkpoint-*"))


# On a pretended GPU

WAYS = [dict(kind="T4"), dict(kind="A100"),
        dict(kind="T4", gradient_checkpointing=True), dict(kind="T4", method="lora")]

@pytest.fixture(scope="module", params=WAYS, ids=lambda way: "-".join(map(str, way.values())))
def traced(request, on_gpu):
    "The last step of a run, in two micro-batches, operation by operation."
    sizes = dict(effective_batch_size=4, per_device_train_batch_size=2)
    run = on_gpu(train, WIDE, traced=True, probed=False, **sizes, **request.param)
    run.half, run.lora = "float16" if request.param["kind"] == "T4" else "bfloat16", "method" in request.param
    run.checkpointed = "gradient_checkpointing" in request.param
    return run


PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten._scaled_dot_product")

def test_products_on_a_gpu_are_in_half_precision(traced):
    products = [(name, given) for _, name, given, _ in traced.operations if name.startswith(PRODUCTS)]
    assert len(products) > 2 * 2 * 5 * 2  # micro-batches, layers, products of a layer, at least as many backward
    inputs = {dtype for name, given in products for dtype, shape in given[:3] if len(shape) > 1 and 0 not in shape}
    assert inputs == {traced.half}


def test_no_operation_has_tensors_of_two_devices(traced):
    "But the filling of the padding with a number that the CPU has, which is no wait."
    assert {name for name in traced.mixed if not name.startswith("aten.fill_")} == set()


def test_a_step_on_a_gpu_copies_each_weight_to_half_precision_once(traced):
    "However many micro-batches it has; with gradient checkpointing only the current layer's copies are kept."
    def casts(shape):
        copy = ("float32", shape), (traced.half, shape)
        return sum(name.startswith("aten._to_copy") and (given[0], made[0]) == copy
                   for _, name, given, made in traced.operations)
    times = 0 if traced.lora else 2 * 2 if traced.checkpointed else 1
    assert casts((256, 1024)) == 2 * times  # c_fc, of two layers
    assert not traced.lora or casts((16, 256)) > 0


def test_adapters_get_their_inputs_in_half_precision(traced):
    "No activation as wide as the MLP is copied to fp32."
    wide = [name for _, name, given, made in traced.operations if name.startswith("aten._to_copy")
            and made[0][0] == "float32" and made[0][1][1:] == (256, 1024)]
    assert wide == []


def test_a_step_on_a_gpu_waits_for_nothing(traced):
    "The log after the last step does."
    assert [wait for wait in traced.waits if wait[0].startswith("step")] == []


TOUCH_FEW = ("aten.mm", "aten.addmm", "aten.gather", "aten.scatter",
             "aten.slice", "aten.split", "aten.permute", "prim.device")

def test_what_the_loss_moves_for_a_logit(traced):
    "12 bytes: fp16 to logarithms in fp32, and these to probabilities. bf16 is copied to fp32 first, 8 more."
    width = {"float16": 2, "bfloat16": 2, "float32": 4}
    def moved(tensors): return sum(width[dtype] for dtype, shape in tensors if shape == (256, 50304))
    bytes_of = [moved(given) + (0 if ".out" in name else moved(made)) for _, name, given, made in traced.operations
                if not name.startswith(TOUCH_FEW)]
    slices = sum(name.startswith("aten._log_softmax") for _, name, *_ in traced.operations)
    assert slices and sum(bytes_of) / slices == (12 if traced.half == "float16" else 20)


def test_two_gpus_are_one_for_a_run_and_nothing_is_said(on_gpu):
    run = on_gpu(train, WIDE, count=2, method="lora", max_steps=1, effective_batch_size=2)
    assert run.said == []


def test_memory_that_runs_out_on_a_gpu_lowers_the_micro_batch(on_gpu):
    "In the probe, and in the training; a step begins again, and the result says what was used."
    run = dict(effective_batch_size=8, method="lora")
    least, most = (on_gpu(train, DEEP, **run, probed=False, per_device_train_batch_size=n).peak for n in (2, 8))
    between = (least + most) // 2
    probed, trained = on_gpu(train, DEEP, **run, limit=between), on_gpu(train, DEEP, **run, later=between)
    for each in (probed, trained):
        assert each.plan.recipe.micro_batch == 8 and each.after.recipe.micro_batch in (4, 2)
        assert each.after.blocks_per_step == 8 and each.losses[-1]["step"] == 2
    assert any("A probed step did not fit with a micro-batch of 8" in reason for reason in probed.after.reasons)
    assert any("Memory ran out with a micro-batch of 8" in reason for reason in trained.after.reasons)
    assert any("the step is repeated with 4" in said for said in trained.said)


ADVICE = [(dict(method="full", gradient_checkpointing=True), ["method='lora'"], ["gradient_checkpointing"]),
          (dict(method="full"), ["method='lora'", "gradient_checkpointing=True"], []),
          (dict(method="lora", gradient_checkpointing=True), ["block_size"], ["lora", "gradient_checkpointing"])]

@pytest.mark.parametrize("changes, offered, not_offered", ADVICE, ids=["checkpointed", "full", "lora"])
def test_where_nothing_fits_only_what_is_not_on_is_advised(on_gpu, changes, offered, not_offered):
    with pytest.raises(MemoryError) as told:
        on_gpu(train, DEEP, later=10_000_000, probed=False, effective_batch_size=2, **changes)
    said = str(told.value)
    assert all(words in said for words in offered) and not any(words in said for words in not_offered)
