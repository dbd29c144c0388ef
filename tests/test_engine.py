"That the engine computes what the stock model computes, and that each way of training leaves a stock checkpoint."
import copy, errno, importlib, os, re, shutil, subprocess, sys, warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.colab_stub import watch_deletions
from helpers.forks import forked
from helpers.toys import NO_DROPOUT, write_tide
from safetensors import SafetensorError
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, GPT2LMHeadModel, TrainerCallback

from colab_gpt2.engine.callbacks import Listener, Meter
from colab_gpt2.generation import stream
from colab_gpt2.training import finetune
from colab_gpt2.model.loss import linear_cross_entropy
from colab_gpt2.model.loading import load_model, load_tokenizer, new_model
from colab_gpt2.model.tune import tune_model

CONFIG = GPT2Config(n_layer=2, n_embd=64, n_head=2, n_positions=32, vocab_size=203, **NO_DROPOUT)


def losses(rows, dtype, width=24, vocabulary=203, chunk_size=16, multiple=1):
    "(loss, d hidden, d weight) of the chunked loss, and of the plain one in fp32 on the same half-precision numbers."
    torch.manual_seed(rows)
    hidden, weight = torch.randn(rows, width, dtype=dtype), torch.randn(vocabulary, width) * 0.3
    labels = torch.randint(vocabulary, (rows,))
    labels[::7] = -100
    found = []
    for plain in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if plain: loss = F.cross_entropy(h.float() @ w.to(dtype).float().T, labels)
        else:
            with torch.autocast("cpu", dtype):
                loss = linear_cross_entropy(h, w, labels, chunk_size=chunk_size, multiple=multiple)
        assert loss.dtype == torch.float32
        loss.backward()
        found.append((loss.detach(), h.grad.float(), w.grad))
        assert h.grad.dtype == dtype and w.grad.dtype == torch.float32
    return found


def error(a, b): return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.01), (torch.float16, 0.002)])
@pytest.mark.parametrize("rows, multiple", [(16, 1), (37, 8), (5, 64)])
def test_half_precision_is_as_near_as_its_rounding(dtype, bound, rows, multiple):
    ours, plain = losses(rows, dtype, multiple=multiple)
    assert abs(ours[0] - plain[0]) < bound * plain[0]
    for a, b in zip(ours[1:], plain[1:]): assert error(a, b) < bound


SIZES = [(4096, 1001, 1), (1500, 5003, 64), (1027, 5003, 64), (1027, 1001, 1)]

@pytest.mark.parametrize("rows, vocabulary, multiple", SIZES, ids=str)
def test_fp16_under_a_gradient_scaler_that_starts_at_65536(rows, vocabulary, multiple):
    "Rows that divide the chunk of 1,024, or leave many or three over; a head as it is, and a padded one."
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(rows, 32), torch.randn(vocabulary, 32), torch.randint(vocabulary, (rows,))
    labels[:3 * rows // 4] = 7  # a text that says one thing over and over: its row of the weight adds up
    labels[-1] = vocabulary - 1  # beside the padding
    hidden[:, 0] *= 100
    parameter, scaler = nn.Parameter(weight.clone()), torch.amp.GradScaler("cpu", init_scale=65536.)
    optimizer = torch.optim.SGD([parameter], lr=1.)
    h = hidden.half().requires_grad_()
    with torch.autocast("cpu", torch.float16): loss = linear_cross_entropy(h, parameter, labels, multiple=multiple)
    scaler.scale(loss).backward()
    assert torch.isfinite(loss) and torch.isfinite(h.grad).all() and torch.isfinite(parameter.grad).all()
    scaler.step(optimizer), scaler.update()
    assert scaler.get_scale() == 65536  # no step was skipped
    exact, plain = hidden.half().float().requires_grad_(), weight.half().float().requires_grad_()
    expected = F.cross_entropy(exact @ plain.T, labels)
    expected.backward()
    assert abs(loss - expected) < 0.002 * expected
    assert error(h.grad.float() / 65536, exact.grad) < 0.01  # logits in the hundreds are rounded to 1/4
    assert error(weight - parameter.detach(), plain.grad) < 0.005


def test_several_losses_before_one_backward_pass():
    model, ids = new_model(CONFIG, seed=0).train(), torch.randint(203, (4, 32))
    other = copy.deepcopy(model)
    tune_model(model)
    (model(input_ids=ids[:2], labels=ids[:2]).loss + model(input_ids=ids[2:], labels=ids[2:]).loss).backward()
    (other(input_ids=ids[:2], labels=ids[:2]).loss + other(input_ids=ids[2:], labels=ids[2:]).loss).backward()
    for a, b in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4)


def train(model, steps, precision, batches):
    "Losses of some AdamW steps."
    optimizer, seen = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), []
    model.train()
    for ids in batches[:steps]:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward(), optimizer.step(), optimizer.zero_grad()
        seen.append(loss.item())
    return seen


@pytest.mark.parametrize("precision, bound", [("fp32", 1e-4), ("bf16", 5e-3)])
def test_twenty_steps_lose_what_the_stock_model_loses(precision, bound):
    stock = new_model(CONFIG, seed=0)
    tuned, batches = copy.deepcopy(stock), [torch.randint(203, (4, 32)) for _ in range(20)]
    tune_model(tuned)
    ours, theirs = (train(model, 20, precision, batches) for model in (tuned, stock))
    assert max(abs(a - b) / b for a, b in zip(ours, theirs)) < bound


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_tide(tmp_path_factory.mktemp("text"), 60, n_layer=2, n_embd=64, n_head=2, n_positions=128)


def run(text, output_dir, **changes):
    files = {f"{name}_file": str(text/f"{name}.txt") for name in ("train", "eval")}
    options = dict(model=str(text/"toy"), block_size=64, max_steps=8, learning_rate=5e-4, prompt="The",
                   max_new_tokens=4, precision="fp32", cache_dir=str(text/"cache"), output_dir=str(output_dir),
                   progress=False, **files)
    return finetune(**{**options, **changes})


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory): return tmp_path_factory.mktemp("plain")


@pytest.fixture(scope="module")
def plain(text, plain_folder):
    "The run that others are compared with, done once; it lies in `plain_folder`."
    return run(text, plain_folder)


WAYS = [dict(tune=False), dict(gradient_checkpointing=True), dict(per_device_train_batch_size=2),
        dict(torch_compile=True)]

@pytest.mark.parametrize("changes", WAYS, ids=lambda c: next(iter(c)))
def test_every_way_of_training_gives_the_same_model(text, tmp_path, plain, plain_folder, changes):
    other = run(text, tmp_path/"other", **changes)
    assert other.perplexity_after.value == pytest.approx(plain.perplexity_after.value, rel=1e-4)
    assert [e["loss"] for e in other.losses] == pytest.approx([e["loss"] for e in plain.losses], rel=1e-4)
    assert plain.plan.source == other.plan.source == "probe"
    weights = (load_model(str(folder)).state_dict() for folder in (plain_folder, tmp_path/"other"))
    for (name, a), b in zip(next(weights).items(), next(weights).values()):
        assert error(a, b) < 1e-3, name  # not each number: AdamW amplifies rounding where a gradient is zero


def test_the_parts_of_a_step_share_the_copies_in_half_precision(text, tmp_path):
    "Each weight of a product is copied once a step, however many parts that has."
    copies = []
    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, kind, types, arguments=(), options=None):
            copy = kind is torch.ops.aten._to_copy.default and options["dtype"] == torch.bfloat16
            if copy and arguments[0].shape == (64, 256):
                copies.append(arguments[0].data_ptr())
            return kind(*arguments, **(options or {}))
    class Counting(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs): self.mode = Count().__enter__()
        def on_step_end(self, args, state, control, **kwargs): self.mode.__exit__(None, None, None)
    run(text, tmp_path/"out", precision="bf16", max_steps=1, effective_batch_size=4, per_device_train_batch_size=1,
        callbacks=[Counting()])
    assert len(copies) == len(set(copies)) == 2  # c_fc of each layer


def test_lora_leaves_a_whole_stock_model_and_goes_on_from_adapters(text, tmp_path):
    whole = run(text, tmp_path/"whole", method="lora", learning_rate=5e-3)
    assert whole.plan.recipe.method == "lora" and whole.perplexity_after.value < 0.9 * whole.perplexity_before.value
    saved = AutoModelForCausalLM.from_pretrained(tmp_path/"whole")
    assert type(saved).__name__ == "GPT2LMHeadModel" and saved.num_parameters() == whole.parameters

    with pytest.raises(KeyboardInterrupt):
        run(text, tmp_path/"broken", method="lora", learning_rate=5e-3, save_steps=3, callbacks=[Stop(4)])
    resumed = run(text, tmp_path/"broken", method="lora", learning_rate=5e-3, save_steps=3)
    assert resumed.resumed_from.endswith("checkpoint-3") and resumed.steps == 8
    models = [load_model(str(tmp_path/name)) for name in ("whole", "broken")]
    for a, b in zip(*(model.parameters() for model in models)): assert torch.equal(a, b)
    with pytest.raises(FileExistsError, match="method was lora, now it is full"):
        run(text, tmp_path/"broken", method="full", learning_rate=5e-3)
    with pytest.raises(FileExistsError, match="lora_rank was 16, now it is 4"):
        run(text, tmp_path/"broken", method="lora", lora_rank=4, learning_rate=5e-3)


ON_CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
                      "you tried to allocate 412 bytes. Error code 12 (Cannot allocate memory)")

SCARCE = [(torch.OutOfMemoryError("pretended"), 7), (ON_CPU, 7), (ON_CPU, 1)]  # the call that fails; the probe has 3

@pytest.mark.parametrize("error, first", SCARCE, ids=["gpu", "cpu", "cpu, in the probe"])
def test_out_of_memory_in_a_run_costs_no_step(text, tmp_path, monkeypatch, plain, error, first):
    calls = scarce_memory(monkeypatch, 2, error, first)
    with pytest.warns(UserWarning, match="Not enough memory for a micro-batch of 4; the step is repeated with 2"):
        scarce = run(text, tmp_path/"scarce")
    assert scarce.steps == plain.steps and calls[:2] == ([8, 8] if first > 1 else [8, 4])
    assert max(calls[-8:]) == scarce.plan.recipe.micro_batch == 2
    assert scarce.perplexity_after.value == pytest.approx(plain.perplexity_after.value, rel=1e-4)


def test_nothing_left_to_divide_is_said(text, tmp_path, monkeypatch):
    scarce_memory(monkeypatch, 0, ON_CPU)
    said = "Out of memory.*; set a smaller block_size"
    with pytest.warns(UserWarning, match="repeated with 1"), pytest.raises(MemoryError, match=said):
        run(text, tmp_path/"out")


def test_another_error_of_a_step_is_raised_as_it_is(text, tmp_path, monkeypatch):
    calls = scarce_memory(monkeypatch, 2, RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 7)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"): run(text, tmp_path/"out")
    assert not {2, 4} & set(calls)  # nothing was divided; an epoch's last step has the one block that is left


def scarce_memory(monkeypatch, room, error, first=1):
    "From the training's call `first` on, more than `room` blocks raise `error`; -> the blocks of each call."
    module, calls = importlib.import_module("colab_gpt2.engine.trainer"), []
    tune = module.tune_model

    def tuned(model, **options):
        told = tune(model, **options)
        forward = model.forward
        def scarce(*args, input_ids=None, **kwargs):
            if model.training: calls.append(len(input_ids))
            if len(calls) >= first and len(input_ids) > room and model.training: raise error
            return forward(*args, input_ids=input_ids, **kwargs)
        model.forward = scarce
        return told

    monkeypatch.setattr(module, "tune_model", tuned)
    return calls


def test_no_checkpoint_is_made_of_lost_weights(text, tmp_path):
    with pytest.raises(FloatingPointError, match="learning_rate"):
        run(text, tmp_path/"lost", learning_rate=1e20, save_steps=4, max_grad_norm=1e9, on_divergence="stop")
    assert not list((tmp_path/"lost").glob("checkpoint-*"))  # though logging_steps is 10


@pytest.mark.same
def test_lost_weights_replace_no_good_model(text, tmp_path):
    "Nothing is logged between the first step and the last, and no checkpoint is made."
    run(text, tmp_path/"out", max_steps=2, save_steps=-1)
    good = (tmp_path/"out"/"model.safetensors").read_bytes()
    with pytest.raises(FloatingPointError, match="learning_rate"):
        run(text, tmp_path/"out", learning_rate=1e30, max_steps=4, save_steps=-1, max_grad_norm=1e9,
            overwrite_output_dir=True, on_divergence="stop")
    assert (tmp_path/"out"/"model.safetensors").read_bytes() == good


@pytest.mark.same
def test_speed_is_of_the_tokens_that_there_are(text, tmp_path, monkeypatch):
    "A batch that no text fills counts for what it is. Every step takes a second here."
    monkeypatch.setattr(Meter, "tokens_per_second", lambda self, tokens_per_step, newest=None: tokens_per_step)
    result = run(text, tmp_path/"out", effective_batch_size=4096, max_steps=4)
    steps = [reason for reason in result.plan.reasons if "blocks;" in reason]
    assert result.tokens_per_second == result.train_tokens // 64 * 64 and "4 steps of 4096" not in steps[0]


REPLICA = """
import os, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config
from colab_gpt2.model.loading import new_model
from colab_gpt2.model.tune import tune_model
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
shape = dict(n_layer=1, n_embd=32, n_head=2, n_positions=16, vocab_size=77)
model = new_model(GPT2Config(**shape, resid_pdrop=0., embd_pdrop=0., attn_pdrop=0.), seed=0)
tune_model(model)
parallel, ids = DistributedDataParallel(model.train()), torch.arange(4 * 16).view(4, 16) * 7 % 77
with parallel.no_sync(): parallel(input_ids=ids[rank:rank + 1], labels=ids[rank:rank + 1]).loss.backward()
parallel(input_ids=ids[2 + rank:3 + rank], labels=ids[2 + rank:3 + rank]).loss.backward()
torch.save({name: p.grad for name, p in model.named_parameters()}, f"{store}-{rank}.pt")
dist.barrier()
os._exit(0)  # gloo's threads may abort a process that takes itself apart
"""


def test_the_loss_under_ddp_with_accumulation(tmp_path):
    "Two processes, two parts each: every one ends with the mean over processes of the sum over parts."
    store = tmp_path/"store"
    words = [[sys.executable, "-c", REPLICA, rank, str(store)] for rank in "01"]
    pair = [subprocess.Popen(each, stderr=subprocess.PIPE, text=True) for each in words]
    for process in pair: assert process.wait(timeout=300) == 0, process.stderr.read()
    shape = GPT2Config(n_layer=1, n_embd=32, n_head=2, n_positions=16, vocab_size=77, **NO_DROPOUT)
    model = new_model(shape, seed=0).train()
    ids = torch.arange(4 * 16).view(4, 16) * 7 % 77
    (2 * model(input_ids=ids, labels=ids).loss).backward()
    for rank in (0, 1):
        for name, gradient in torch.load(f"{store}-{rank}.pt").items():
            torch.testing.assert_close(gradient, model.get_parameter(name).grad, atol=1e-6, rtol=1e-4)


class Stop(TrainerCallback):
    "An interrupt in the middle of a step."
    def __init__(self, step): self.step = step
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step: raise KeyboardInterrupt


def test_a_run_goes_on_with_the_learning_rate_that_is_set_now(text, tmp_path):
    "The optimizer's state in a checkpoint has the old one, and the old weight decay. The schedule is where it was."
    with pytest.raises(KeyboardInterrupt): run(text, tmp_path/"out", save_steps=3, warmup_steps=0, callbacks=[Stop(4)])
    used = []
    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer, **kwargs):
            used.append([(group["lr"], group["weight_decay"]) for group in optimizer.param_groups])
    run(text, tmp_path/"out", save_steps=3, warmup_steps=0, resume=str(tmp_path/"out"), learning_rate=8e-6,
        weight_decay=0.3, callbacks=[Look()])
    assert [first for first, _ in used] == [(pytest.approx(1e-6 * left), 0.3) for left in (5, 4, 3, 2, 1)]
    assert {second[1] for _, second in used} == {0.}


def test_a_run_of_one_step_learns_something(text, tmp_path):
    "A warm-up of five percent of it would be that step, at a rate of 0."
    result = run(text, tmp_path/"out", max_steps=1)
    assert result.perplexity_after != result.perplexity_before


def test_a_run_that_began_in_fp16_goes_on_in_another_precision(text, tmp_path, plain):
    "Its checkpoints have the scaler's state, of which nothing else has a use."
    with pytest.raises(KeyboardInterrupt): run(text, tmp_path/"out", save_steps=3, callbacks=[Stop(4)])
    torch.save(torch.amp.GradScaler("cpu", init_scale=65536.).state_dict(), tmp_path/"out"/"checkpoint-3"/"scaler.pt")
    result = run(text, tmp_path/"out", save_steps=3)
    assert result.resumed_from.endswith("checkpoint-3")
    assert result.perplexity_after.value == plain.perplexity_after.value


def test_a_resumed_run_saves_and_logs_at_the_steps_that_are_set_now(text, tmp_path):
    run(text, tmp_path/"out", max_steps=2, save_steps=10)
    result = run(text, tmp_path/"out", max_steps=7, resume=str(tmp_path/"out"), save_steps=3, save_total_limit=9,
                 logging_steps=2)
    assert {p.name for p in (tmp_path/"out").glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (2, 3, 6, 7)}
    assert [entry["step"] for entry in result.losses] == [1, 2, 4, 6, 7]  # the first of each run too


def test_a_held_out_text_shorter_than_a_block_begins_the_samples_too(text, tmp_path):
    (tmp_path/"short.txt").write_text("The moon rose.\nThe tide came in.\n")
    result = run(text, tmp_path/"out", max_steps=1, prompt=None, eval_file=str(tmp_path/"short.txt"))
    assert result.samples["before"].prompt == result.samples["after"].prompt == "The moon rose.\n"


def test_a_pad_token_without_a_row_is_not_saved(text, tmp_path):
    "The Trainer gives the model the tokenizer's ids; a Llama with padding beyond its embedding could not be loaded."
    small = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=8192)
    tokenizer = load_tokenizer("tiny")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    new_model(LlamaConfig(**small, max_position_embeddings=128), seed=0).save_pretrained(tmp_path/"llama")
    tokenizer.save_pretrained(tmp_path/"llama")
    run(text, tmp_path/"out", model=str(tmp_path/"llama"), max_steps=1)
    for folder in ("out", "out/checkpoint-1"): assert load_model(str(tmp_path/folder)).config.pad_token_id is None


def compile_with(monkeypatch, backend, **options):
    def compile(self): self._compiled_call_impl = torch.compile(self._call_impl, backend=backend, **options)
    monkeypatch.setattr(nn.Module, "compile", compile)


def test_only_whole_parts_are_compiled(text, tmp_path, monkeypatch):
    "The last step of an epoch has fewer blocks, and a sample has a new length at every token: not compiled."
    shapes = []
    def backend(graph, inputs):
        shapes.append(next(tuple(i.shape[:2]) for i in inputs if i.ndim == 3))
        return graph.forward
    compile_with(monkeypatch, backend, dynamic=False)
    epoch = dict(max_steps=-1, num_train_epochs=1, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    plain = run(text, tmp_path/"plain", **epoch, torch_compile=False)
    assert plain.train_tokens // 64 % 8 and not shapes
    result = run(text, tmp_path/"out", **epoch, torch_compile=True)
    assert set(shapes) == {(4, 64)}
    assert result.perplexity_after.value == pytest.approx(plain.perplexity_after.value, rel=1e-4)


def test_a_run_goes_on_where_compiling_fails(text, tmp_path, monkeypatch):
    def broken(model, inputs): raise RuntimeError("no compiler")
    compile_with(monkeypatch, broken)
    with pytest.warns(UserWarning, match="torch.compile failed"):
        result = run(text, tmp_path/"out", torch_compile=True, max_steps=2)
    assert result.steps == 2 and not result.plan.torch_compile


BROKEN = [RuntimeError("Triton Error [CUDA]: no kernel image is available for execution on the device"),
          ValueError("out of resource: shared memory"), torch._dynamo.exc.TorchDynamoException("no compiler")]

@pytest.mark.parametrize("error", BROKEN, ids=lambda e: type(e).__name__)
def test_a_run_goes_on_where_a_compiled_kernel_fails(text, tmp_path, monkeypatch, error):
    "At its first launch, and not while it is compiled."
    def backend(graph, inputs):
        def fail(*inputs): raise error
        return fail
    compile_with(monkeypatch, backend)
    with pytest.warns(UserWarning, match=f"torch.compile failed .{re.escape(str(error))}"):
        result = run(text, tmp_path/"out", torch_compile=True, max_steps=2)
    assert result.steps == 2 and not result.plan.torch_compile


def fails(times, error):
    "A function that raises `error` so many times, and then is what `instead_of` was."
    left = [error] * times
    def wrap(instead_of):
        def call(*args, **options):
            if left: raise left.pop()
            return instead_of(*args, **options)
        return call
    return wrap


DRIVE = OSError(errno.EIO, "Input/output error"), OSError(errno.ENOTCONN, "Transport endpoint is not connected")
IN_WORDS = SafetensorError("Error while serializing: I/O error: Input/output error (os error 5)")

PASSING = [("a checkpoint", DRIVE[0]), ("a checkpoint", IN_WORDS), ("the model", DRIVE[1])]

@pytest.mark.parametrize("what, error", PASSING, ids=["5", "safetensors", "the model, 107"])
def test_an_error_of_a_drive_that_passes_costs_a_second(text, tmp_path, monkeypatch, plain, error, what):
    once, steps = fails(1, error), dict(save_steps=4 if what == "a checkpoint" else -1)
    monkeypatch.setattr(GPT2LMHeadModel, "save_pretrained", once(GPT2LMHeadModel.save_pretrained))
    result = run(text, tmp_path/"out", **steps)
    assert result.perplexity_after.value == plain.perplexity_after.value
    assert not list((tmp_path/"out").glob(".*"))


STAYING = list(zip(DRIVE, ["an input/output error", "mount has gone"]))

@pytest.mark.parametrize("error, why", STAYING, ids=["5", "107"])
def test_an_error_of_a_drive_that_stays_is_explained(text, tmp_path, monkeypatch, error, why):
    ever, waits = fails(9, error), []
    monkeypatch.setattr(GPT2LMHeadModel, "save_pretrained", ever(GPT2LMHeadModel.save_pretrained))
    monkeypatch.setattr("time.sleep", waits.append)
    with pytest.raises(OSError, match=f"The run in .* failed: .*{why}"):
        run(text, tmp_path/"out", save_steps=4)
    assert waits == [1, 2, 4, 8, 16]


def test_a_full_disk_that_only_safetensors_has_noticed_is_told(text, tmp_path, monkeypatch):
    "It has deleted its file, so there is room for the model again."
    full = fails(9, SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"))
    save = GPT2LMHeadModel.save_pretrained
    def second(model, *args, **options):
        if list((tmp_path/"out").glob("checkpoint-4")): return full(save)(model, *args, **options)
        return save(model, *args, **options)
    monkeypatch.setattr(GPT2LMHeadModel, "save_pretrained", second)
    with pytest.raises(OSError, match="is full: .* free. Kept: checkpoint-4. Free space, then run the same again"):
        run(text, tmp_path/"out", save_steps=4)


def test_a_run_that_its_disk_cannot_hold_to_the_end_is_refused(text, tmp_path, monkeypatch):
    "Two checkpoints are kept, with the best weights each, and a third is written before the first is deleted."
    weights = 4 * load_model(str(text/"toy")).num_parameters()
    def with_room(checkpoints):
        free = int(4 * weights * checkpoints)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free, total=free))
        return run(text, tmp_path/"out", save_steps=2)
    with pytest.raises(OSError, match="The run needs"): with_room(3.4)  # each has the tokenizer too
    assert with_room(3.6).steps == 8


@pytest.mark.same
def test_what_goes_to_a_drives_trash_is_empty(text, tmp_path, monkeypatch):
    "Replaced checkpoints, and the weights of a former run."
    sizes, folder = watch_deletions(monkeypatch), tmp_path/"MyDrive"/"run"
    for _ in range(2): run(text, folder, max_steps=3, save_steps=1, save_total_limit=1, overwrite_output_dir=True)
    monkeypatch.undo()
    assert len(sizes) > 20 and max(sizes) == 0


def one_process(text, folder):
    run(text, folder, max_steps=1)
    return torch.distributed.is_initialized()


def test_a_single_process_of_torchrun_trains_without_ddp(text, tmp_path):
    started = dict(LOCAL_RANK="0", RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    assert forked(one_process, text, tmp_path/"out", env=started).result is False


class Writes(Listener):
    "A sample at the beginning of the training, as a panel writes one on the way."
    def on_stage(self, stage, options=None, **facts): self.options = options or getattr(self, "options", None)
    def on_train_begin(self, args, state, control, model=None, processing_class=None, **kwargs):
        self.written = "".join(stream(model, "The", tokenizer=processing_class, **self.options))


def test_a_sample_on_the_way_is_drawn_as_those_before_and_after(text, tmp_path):
    drawn = dict(temperature=0.7, top_k=20, repetition_penalty=1.3, max_new_tokens=12)
    result = run(text, tmp_path/"out", callbacks=[writes := Writes()], **drawn)
    assert writes.written == result.samples["before"].text
    assert {name: writes.options[name] for name in drawn} == drawn


def test_lora_is_quiet(text, tmp_path):
    "What peft asks of transformers, what only a download could tell it, and new rows are no warning for a user."
    tagged = load_tokenizer("tiny")
    tagged.add_tokens(["<A>", "<B>"])
    tagged.save_pretrained(tmp_path/"tagged")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run(text, tmp_path/"out", method="lora", max_steps=2, save_steps=1, tokenizer=str(tmp_path/"tagged"))
    assert [str(w.message) for w in said if w.category is FutureWarning or "peft" in w.filename] == []


@pytest.mark.same
def test_a_corrupted_checkpoint_is_skipped(text, tmp_path):
    "A bit that a copy has changed: the file is as long as it was."
    plain = run(text, tmp_path/"plain", save_steps=2)
    with pytest.raises(KeyboardInterrupt):
        run(text, tmp_path/"out", save_steps=2, save_total_limit=9, callbacks=[Stop(5)])
    weights = tmp_path/"out"/"checkpoint-4"/"model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    with pytest.warns(UserWarning, match="checkpoint-4 is skipped: model.safetensors: corrupted"):
        result = run(text, tmp_path/"out", save_steps=2)
    assert result.resumed_from.endswith("checkpoint-2")
    assert result.perplexity_after.value == plain.perplexity_after.value
    assert not list((tmp_path/"out").glob("*.before"))  # it was replaced


WORK = ["Fetching the text", "Loading the model", "Tokenising", "Perplexity", "Generating", "Fine-tuning"]

@pytest.mark.parametrize("what", WORK)
def test_what_a_report_raises_ends_the_run(text, tmp_path, what):
    "That is how Stop stops. Nothing half written is left."
    def report(now, done, total):
        if now.startswith(what) and (done or total == 1): raise KeyboardInterrupt("enough")
    with pytest.raises(KeyboardInterrupt, match="enough"):
        run(text, tmp_path/"out", progress=report, cache_dir=str(tmp_path/"cache"))
    assert not list((tmp_path/"out").glob("*")) and not list(tmp_path.glob("cache/**/*.part"))
