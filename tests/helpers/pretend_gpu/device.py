"""Tensors on a GPU that is not there, and the library's own training on it. Only for the process that has it.

torch's FakeTensorMode gives every operation's dtype, shape and device without computing it. hooks.cpp lets such tensors
of CUDA go through autograd, under CUDA's own rules of autocast. Here torch.cuda answers as a T4 or an A100 would, every
allocation is counted, every wait for the device is noted, and memory can run out.

It cannot show values, speed and CUDA's own workspaces. Nor whether autograd adds a gradient in place: to a tensor
subclass, as fake tensors are, it never does.
"""
import collections, contextlib, tempfile, time, traceback, warnings, weakref
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM

from colab_gpt2.config import FinetuneConfig
from colab_gpt2.engine.callbacks import TRAINING, Listener
from colab_gpt2.engine.trainer import make_trainer
from colab_gpt2.model.heads import Head, output_form
from colab_gpt2.model.layers import keep_less
from colab_gpt2.model.loading import load_config, model_context
from colab_gpt2.planning.plan import plan_run
from colab_gpt2.runtime import check_runtime
from colab_gpt2.training import train_model

KINDS = dict(T4=("Tesla T4", 15_828_320_256, (7, 5)), A100=("NVIDIA A100-SXM4-40GB", 42_477_846_528, (8, 0)))
CONTEXT = 300_000_000  # bytes of CUDA itself
ANSWERS = {torch.bool: True, torch.float32: 2.5, torch.float64: 2.5}  # to .item(), where there are no values
MOVES = ("aten._to_copy", "aten.copy_")


def tensors(*nested): return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, torch.Tensor)]


class Gpu(TorchDispatchMode):
    "A kind of `KINDS`, on which `limit` bytes of tensors have room. `count`: how many GPUs torch sees."
    def __init__(self, kind="T4", limit=None, traced=False, count=1):
        super().__init__()
        self.name, self.memory, self.capability = KINDS[kind]
        self.limit, self.count, self.traced = limit or self.memory - CONTEXT, count, traced
        self.live, self.now, self.peak, self.stage = WeakIdKeyDictionary(), 0, 0, ""
        self.waits, self.mixed, self.operations = collections.Counter(), collections.Counter(), []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name, kwargs, given = str(operation), kwargs or {}, tensors(args, kwargs)
        if name.startswith("aten._local_scalar_dense"):
            if given[0].is_cuda: self.wait("item")
            return ANSWERS.get(given[0].dtype, 1)
        if name.startswith("aten.nonzero") and given[0].is_cuda: self.wait("nonzero")
        made = operation(*args, **kwargs)
        waits = not kwargs.get("non_blocking") and not (name.startswith("aten.copy_") and args[2:] == (True,))
        self.look(name, given, tensors(made), waits)
        if self.now > self.limit:
            del made
            raise torch.OutOfMemoryError(f"CUDA out of memory (pretended) in {name}: {self.now / 1e9:.2f} GB")
        return made

    def look(self, name, given, made, waits):
        for tensor in made: self.allocate(tensor)
        devices = {tensor.device.type for tensor in given + made}
        if len(devices) > 1 and not name.startswith(MOVES): self.mixed[name] += 1
        if len(devices) > 1 and name.startswith(MOVES) and waits: self.wait("copy")
        if self.traced: self.operations.append((self.stage, name, shapes(given), shapes(made)))

    def allocate(self, tensor):
        "As CUDA's allocator does, in multiples of 512 bytes; a storage that is seen for the second time is there."
        storage = tensor.untyped_storage()
        if not tensor.is_cuda or storage in self.live: return
        size = -(-storage.nbytes() // 512) * 512
        self.live[storage] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.free, size)

    def free(self, size): self.now -= size

    def wait(self, kind):
        "Who asked: the innermost two functions outside torch."
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
        self.waits[(self.stage, kind, " < ".join(f.name for f in reversed(frames[-2:])))] += 1

    def forget_peak(self, device=None): self.peak = self.now


def shapes(some): return tuple((str(t.dtype).removeprefix("torch."), tuple(t.shape)) for t in some)


class Event:
    def __init__(self, **options): pass
    def record(self, *args): self.second = time.perf_counter()
    def query(self): return True
    def synchronize(self): pass
    def elapsed_time(self, other): return 1000 * max(1e-6, other.second - self.second)


def answers(gpu):
    "What torch.cuda says."
    major, minor = gpu.capability
    properties = SimpleNamespace(
        name=gpu.name, total_memory=gpu.memory, major=major, minor=minor, multi_processor_count=40, warp_size=32,
        is_integrated=0, is_multi_gpu_board=0, L2_cache_size=2**22)
    def same(value): return lambda *args, **options: value
    silent = ("init", "_lazy_init", "set_device", "empty_cache", "synchronize", "manual_seed", "manual_seed_all",
              "set_rng_state")
    return dict(
        Event=Event, is_available=same(True), is_initialized=same(True), device_count=same(gpu.count),
        current_device=same(0), get_device_properties=same(properties), _get_device_properties=same(properties),
        get_device_capability=same(gpu.capability), get_device_name=same(gpu.name), _is_in_bad_fork=same(False),
        get_arch_list=same([f"sm_{major}{minor}"]), is_current_stream_capturing=same(False),
        is_bf16_supported=lambda including_emulation=True: including_emulation or major >= 8,
        get_rng_state=lambda *args: torch.zeros(16, dtype=torch.uint8), reset_peak_memory_stats=gpu.forget_peak,
        mem_get_info=lambda *args: (gpu.memory - CONTEXT - gpu.now, gpu.memory),
        memory_reserved=lambda *args: gpu.now, memory_allocated=lambda *args: gpu.now,
        max_memory_allocated=lambda *args: gpu.peak, **dict.fromkeys(silent, same(None)))


def attention(gpu):
    "F.scaled_dot_product_attention with the kernel that CUDA takes: flash since Ampere, the memory-efficient before."
    def call(q, k, v, attn_mask=None, dropout_p=0., is_causal=False, scale=None, enable_gqa=False):
        assert q.is_cuda and attn_mask is None
        if torch.is_autocast_enabled("cuda"): q, k, v = (t.to(torch.get_autocast_dtype("cuda")) for t in (q, k, v))
        if gpu.capability >= (8, 0) and q.dtype != torch.float32:
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            return flash(q, k, v, dropout_p, is_causal, False, scale=scale)[0]
        backward = torch.is_grad_enabled() and q.requires_grad
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(q, k, v, None, backward, dropout_p, is_causal, scale=scale)[0]
    return call


def packed(gpu):
    "transformers' question whether texts are packed into a block, which it leaves out for fake tensors: they are not."
    def call(position_ids): gpu.wait("item")
    return call


def move(module, *args, **kwargs):
    "nn.Module.to for fake parameters, which torch cannot replace in place. Tied ones stay tied."
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    moved = {}
    def other(old):
        wanted = dtype if old.is_floating_point() and dtype else old.dtype
        if (device is None or old.device.type == device.type) and old.dtype == wanted: return old
        if old not in moved:
            new = old.detach().to(device=device, dtype=wanted)
            moved[old] = torch.nn.Parameter(new, old.requires_grad) if isinstance(old, torch.nn.Parameter) else new
        return moved[old]
    for each in module.modules():
        for owned in (each._parameters, each._buffers):
            owned.update({name: other(old) for name, old in owned.items() if old is not None})
    return module


REAL_TENSOR = torch.tensor

def tensor(data, *args, device=None, **options):
    "torch.tensor, which would write its numbers to the device."
    if device is None or torch.device(device).type == "cpu": return REAL_TENSOR(data, *args, **options)
    real = REAL_TENSOR(np.asarray(data).tolist(), *args, **options)
    return torch.empty(real.shape, dtype=real.dtype, device=device)


@contextlib.contextmanager
def pretended(kind="T4", limit=None, **options):
    "A `Gpu`; inside, torch sees it, and tensors have no values."
    gpu = Gpu(kind, limit, **options)
    changes = [patch.multiple(torch.cuda, create=True, **answers(gpu)), patch.object(torch, "tensor", tensor),
               patch.object(torch.nn.functional, "scaled_dot_product_attention", attention(gpu)),
               patch.object(transformers.masking_utils, "find_packed_sequence_indices", packed(gpu)),
               *(patch.object(owner, "to", move) for owner in (torch.nn.Module, transformers.PreTrainedModel))]
    with contextlib.ExitStack() as around:
        for change in (*changes, FakeTensorMode(allow_non_fake_inputs=True), gpu): around.enter_context(change)
        yield gpu


def head_by(form, model):
    "The output layer in a form that was found where numbers are."
    layer = model.get_output_embeddings()
    return form and Head(layer.weight, layer.bias, *form)


def checked(model):
    "What is checked on small copies of modules, which have numbers."
    with _disable_current_modes(): return keep_less(model)


class Text:
    "Blocks of zeros, as many as WikiText-2's."
    vocabulary_size, source, sha256 = 50257, "made up", "0"
    def __init__(self, blocks, block_size): self.blocks, self.block_size = blocks, block_size
    def __len__(self): return self.blocks
    def __getitem__(self, i): return dict.fromkeys(("input_ids", "labels"), np.zeros(self.block_size, dtype=np.int64))

    @property
    def tokens(self): return self.blocks * self.block_size


class Loader:
    "Steps of `batch` blocks that lie on the GPU."
    def __init__(self, text, batch): self.dataset, self.batch, self.steps = text, batch, -(-len(text) // batch)
    def __len__(self): return self.steps

    def __iter__(self):
        for start in range(0, len(self.dataset), self.batch):
            size = min(self.batch, len(self.dataset) - start)
            ids = torch.zeros(size, self.dataset.block_size, dtype=torch.long, device="cuda")
            yield dict(input_ids=ids, labels=ids)


class Watch(Listener):
    "Sets the limit that begins with the training, and looks at the last step alone."
    def __init__(self, gpu, later): self.gpu, self.later = gpu, later

    def on_stage(self, stage, **facts):
        self.gpu.stage = stage
        if stage == TRAINING and self.later: self.gpu.limit = self.later

    def on_step_begin(self, args, state, control, **kwargs):
        self.gpu.stage = f"step {state.global_step + 1}"
        self.gpu.operations.clear()
        self.gpu.forget_peak()

    def on_step_end(self, args, state, control, **kwargs): self.gpu.stage = "after the step"


def train(model, kind="T4", *, limit=None, later=None, probed=True, traced=False, count=1, blocks=2361, **changes):
    """`train_model` with fp16 or bf16, scaler, probe (if `probed`) and all, on a `kind` of GPU with room for `limit`
    bytes, from the training on for `later`; `model`: a size's name, or a config. Two steps unless `changes` say more.

    -> the `plan` and the plan `after`, the `peak` bytes of tensors since the last step began, its operations if
    `traced`, all `waits` and `mixed` devices, what was `said` in warnings, `losses`."""
    shape = load_config(model) if isinstance(model, str) else model
    with torch.device("meta"): twin = AutoModelForCausalLM.from_config(shape)
    form = output_form(twin)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fixed = dict(output_dir=folder, logging_steps=100, save_steps=-1, max_steps=2, torch_compile=False,
                     trainer_args=dict(dataloader_pin_memory=False))
        config = FinetuneConfig(**{**fixed, **changes})
        with pretended(kind, limit, traced=traced, count=count) as gpu, contextlib.ExitStack() as around:
            if not probed: around.enter_context(patch("colab_gpt2.training.settle", lambda trainer, plan: plan))
            runtime = check_runtime()  # before the model takes memory
            text = Text(blocks, config.block_size or min(model_context(shape), 1024))
            network = AutoModelForCausalLM.from_config(shape, dtype=torch.float32).to("cuda")
            plan = plan_run(network, text, runtime, config)
            with patch.multiple("colab_gpt2.model.tune", output_head=lambda model: head_by(form, model),
                                keep_less=checked):
                trainer = make_trainer(config, network, None, text, plan, [Watch(gpu, later)])
            trainer.get_train_dataloader = lambda: Loader(text, plan.blocks_per_step)
            after = train_model(trainer, plan)
    operations = [done for done in gpu.operations if done[0].startswith("step")]
    return SimpleNamespace(plan=plan, after=after, peak=gpu.peak, operations=operations, waits=gpu.waits,
                           mixed=gpu.mixed, said=[str(w.message) for w in said], losses=trainer.state.log_history)
