"""What every benchmark of training does: GPT-2 with random weights learns from blocks of a text, by the stock Trainer
or by ours."""
import argparse, statistics, sys, time
from pathlib import Path

from colab_gpt2.errors import check_number
from harness import RESULTS, ROOT, peak_bytes

DATA = ROOT.parent/"shared"/"data"  # beside a developer's checkout
TEXT, TOKENIZER = DATA/"wikitext-2-raw"/"wiki.valid.raw", DATA/"gpt2-tokenizer"
SIZES = ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]
ARCHITECTURES = {  # name: (class, what its config sets): small published shapes, long ones cut
    "smollm2-135m": ("Llama", dict(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rope_theta=100_000., rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0)),  # its config.json
    "qwen": ("Qwen2", dict(vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=6,
                           num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True)),  # 6 of 24 layers
    "gemma": ("Gemma", dict(vocab_size=65_536, hidden_size=640, intermediate_size=2048, num_hidden_layers=12,
                            num_attention_heads=4, num_key_value_heads=1, head_dim=256)),  # like 270M's, fewer tokens
    "gpt-neox": ("GPTNeoX", dict(vocab_size=50_304, hidden_size=512, intermediate_size=2048, num_hidden_layers=6,
                                 num_attention_heads=8)),  # Pythia-70M
    "opt": ("OPT", dict(vocab_size=50_272, hidden_size=768, ffn_dim=3072, num_hidden_layers=12,
                        num_attention_heads=12, word_embed_proj_dim=768))}  # OPT-125M
# blocks that a side learns from before its steps count: caches, torch.compile, a heap that grows for ten blocks
WARM_UP = 12


# Options

class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    "Shows defaults, and keeps the description's line ends."


def parser(doc, *, steps, rounds, batch=8, steps_are="optimizer steps of every run") -> argparse.ArgumentParser:
    "The options that all benchmarks of training share. A side gets all of them again."
    options = argparse.ArgumentParser(description=doc, formatter_class=Formatter)
    add = options.add_argument
    add("--size", default="gpt2", choices=[*SIZES, *ARCHITECTURES, "toy"],
        help="a GPT-2, or the shape of another model, with random weights; toy only tries the program out")
    add("--block-size", type=int, default=1024, help="tokens in a block")
    add("--batch", type=int, default=batch, help="blocks in an optimizer step")
    add("--steps", type=int, default=steps, help=steps_are)
    add("--warm-up", type=int, default=WARM_UP, help="blocks that a side learns from before its steps count")
    add("--rounds", type=int, default=rounds, help="how often every side runs, in turn with the others")
    add("--text", default=TEXT, help="a UTF-8 text to train on, or python-docs")
    add("--tokenizer", default=TOKENIZER, help="a folder, or tiny")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: the GPU if there is one")
    add("--results", default=RESULTS, type=Path, help="folder for the JSON")
    add("--seed", type=int, default=42, help="of the weights and of the order of the blocks")
    add("--side", help=argparse.SUPPRESS)
    return options


COUNTS = ("block_size", "batch", "micro_batch", "micro_batches", "steps", "warm_up", "rounds", "times", "samples",
          "tokens", "requests")  # options of one program or another


def check_counts(options):
    "SystemExit with one line where a count among the options is not 1 or more."
    for name in COUNTS:
        given, flag = getattr(options, name, None), f"--{name.replace('_', '-')}"
        if given is None: continue
        try:
            for value in given if isinstance(given, list) else [given]:
                check_number(flag, value, minimum=1, integer=True)
        except ValueError as e: raise SystemExit(str(e)) from None


def settle(options):
    """Make options mean the same in any folder: absolute paths, a device named. SystemExit with one line for a number
    below 1, and where a text, a tokenizer or a GPU is missing."""
    check_counts(options)
    for name, known in (("text", "python-docs"), ("tokenizer", "tiny")):
        if str(given := getattr(options, name, known)) == known: continue
        if not Path(given).exists(): raise SystemExit(f"There is no {given}. Give --{name} a path, or {known}.")
        setattr(options, name, Path(given).resolve())
    options.results = options.results.resolve()
    if options.device != "cpu":
        import torch
        if options.device == "cuda" and not torch.cuda.is_available():
            raise SystemExit("There is no CUDA GPU here: torch.cuda.is_available() is False.")
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options


def words(values):
    "A dict of options as the words of a command line; what is None or False is left out."
    for name, value in values.items():
        if value is None or value is False: continue
        yield f"--{name.replace('_', '-')}"
        if value is not True: yield from map(str, value if isinstance(value, list) else [value])


def side_command(program, options, side, **changes) -> list:
    "The command that runs one side of `program` with `options`, some of them changed."
    return [sys.executable, str(Path(program).resolve()), *words({**vars(options), **changes, "side": side})]


def device_environment(options, no_bf16=False) -> dict:
    "What hides the GPU from a side that is to run on the CPU, and its bfloat16, as `make test-no-bf16` does."
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {}
    if not no_bf16: return hidden
    return {**hidden, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "PYTHONPATH": str(ROOT/"tests"/"no_bf16")}


# What is trained, and on what

def load_blocks(options):
    "`(tokenizer, Blocks)` of the text, made again in every process."
    from colab_gpt2.text.token_store import tokenize_file
    from colab_gpt2.text.corpus import load_corpus
    from colab_gpt2.model.loading import load_tokenizer
    tokenizer = load_tokenizer(options.tokenizer)
    text = load_corpus("python-docs", progress=False).train if str(options.text) == "python-docs" else options.text
    return tokenizer, tokenize_file(text, tokenizer, options.block_size, split="train", progress=False,
                                    minimum_blocks=options.batch)


def make_config(options, vocabulary, dropout=True):
    """The transformers config of `options.size`, with GPT-2's dropout or without. `toy` has the `vocabulary` of the
    text; SystemExit where another model has fewer tokens."""
    from colab_gpt2.model.loading import load_config
    import transformers
    if options.size in ARCHITECTURES:
        kind, shape = ARCHITECTURES[options.size]
        if vocabulary <= shape["vocab_size"]: return getattr(transformers, f"{kind}Config")(**shape)
        raise SystemExit(f"{options.size} has {shape['vocab_size']:,} tokens, and the tokenizer {vocabulary:,}. "
                         "Give --tokenizer tiny.")
    none = {} if dropout else dict(attn_pdrop=0., resid_pdrop=0., embd_pdrop=0.)
    if options.size == "toy":
        return transformers.GPT2Config(
            n_layer=2, n_embd=64, n_head=2, n_positions=options.block_size, vocab_size=vocabulary, bos_token_id=0,
            eos_token_id=0, **none)
    config = load_config(options.size)
    config.update(none)
    return config


def stock_model(config, seed):
    "The model as transformers makes it, in fp32."
    import torch
    from transformers import AutoModelForCausalLM
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def half_precision(options) -> dict:
    "TrainingArguments for the precision that the device is best at: `bf16`, `fp16`, or neither."
    from colab_gpt2.runtime import pick_precision
    best = pick_precision(options.device).dtype
    return {} if best == "fp32" else {best: True}


def stock_trainer(options, model, blocks, **arguments):
    "transformers' own Trainer with its own defaults but for `arguments`; it saves, shows and reports nothing."
    from transformers import Trainer, TrainingArguments, default_data_collator
    given = TrainingArguments(output_dir="output", max_steps=options.steps, seed=options.seed, save_strategy="no",
                              report_to="none", disable_tqdm=True, use_cpu=options.device == "cpu", **arguments)
    return Trainer(model=model, args=given, train_dataset=blocks, data_collator=default_data_collator)


def trl_trainer(options, model, tokenizer, blocks):
    "TRL's SFTTrainer with its own defaults, one block a step; half precision only where the device has it."
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    given = SFTConfig(output_dir="output", max_steps=options.steps, seed=options.seed, save_strategy="no",
                      per_device_train_batch_size=1, max_length=options.block_size, report_to="none",
                      disable_tqdm=True, use_cpu=options.device == "cpu", **({"bf16": False} | half_precision(options)))
    taken = Dataset.from_dict({"input_ids": [blocks[n]["input_ids"].tolist()
                                             for n in range(min(options.steps, len(blocks)))]})
    return SFTTrainer(model=model, args=given, train_dataset=taken, processing_class=tokenizer)


def our_trainer(options, config, tokenizer, blocks, adapt=lambda runtime: runtime, **changes):
    """`(trainer, Plan, train)` as `colab_gpt2.training` makes them for a model with random weights: planned for two
    epochs of the text, as by default, and stopped after `options.steps`. `train()` returns the Plan as the probe
    corrected it. `adapt` may change the Runtime, `changes` the FinetuneConfig."""
    from dataclasses import replace
    from colab_gpt2.beginning import plan_training
    from colab_gpt2.config import FinetuneConfig
    from colab_gpt2.engine.trainer import make_trainer
    from colab_gpt2.model.loading import load_model
    from colab_gpt2.planning.plan import pick_run_precision
    from colab_gpt2.runtime import check_runtime
    from colab_gpt2.training import train_model
    whole = FinetuneConfig(effective_batch_size=options.batch, block_size=options.block_size, seed=options.seed,
                           save_steps=-1, output_dir="output", **changes)
    ours, runtime = replace(whole, max_steps=options.steps), adapt(pick_run_precision(whole, check_runtime()))
    model = load_model(from_scratch=True, config=config, seed=options.seed).to(runtime.device)
    plan = plan_training(whole, model, blocks, runtime)
    trainer = make_trainer(ours, model, tokenizer, blocks, plan)
    return trainer, plan, lambda: train_model(trainer, plan)


# What is measured

def make_clock(device):
    """A TrainerCallback that notes when steps end; on a GPU by events in its stream, since to ask for the time would
    stall it."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self): self.moments = []

        def note(self, args, state, control, **kwargs):
            if device == "cuda":
                self.moments.append(torch.cuda.Event(enable_timing=True))
                self.moments[-1].record()
            else: self.moments.append(time.perf_counter())

        on_train_begin = on_step_end = note

        def seconds(self) -> list:
            "Of every step, from the end of the one before to its own."
            pairs = list(zip(self.moments, self.moments[1:]))
            if device != "cuda": return [b - a for a, b in pairs]
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1000 for a, b in pairs]
    return Clock()


def warm_up_steps(options, blocks_per_step, done=0) -> int:
    """The steps, one at least, after which a side has learnt from about `options.warm_up` blocks; `done` blocks came
    before the first."""
    return max(1, round((options.warm_up - done) / blocks_per_step))


def measure(options, trainer, blocks_per_step, train, done=0) -> tuple:
    """`(found, what train() returned)`: the seconds of the steps, tokens a second over the median step of those that
    count, the losses that the Trainer logged, and the GPU's peak. `done`: blocks that train() learns from in a probe,
    before its first step."""
    clock, tokens = make_clock(options.device), blocks_per_step * options.block_size
    earlier = peak_bytes()  # the library's probe has Linux start again
    trainer.add_callback(clock)
    if options.device == "cuda":
        import torch
        torch.cuda.reset_peak_memory_stats()
    returned = train()
    seconds, history = clock.seconds(), trainer.state.log_history
    left_out = min(warm_up_steps(options, blocks_per_step, done), len(seconds) - 1)
    typical = statistics.median(seconds[left_out:])
    training_loss = next(entry["train_loss"] for entry in reversed(history) if "train_loss" in entry)
    found = dict(step_seconds=seconds, left_out=left_out, seconds_per_step=typical, tokens_per_step=tokens,
                 tokens_per_second=tokens / typical, losses=[entry["loss"] for entry in history if "loss" in entry],
                 training_loss=training_loss, peak_bytes=max(earlier, peak_bytes()))
    if options.device == "cuda": found |= gpu_memory()
    return found, returned


def gpu_memory() -> dict:
    "Bytes of the GPU: the most that tensors took, the most that torch's allocator reserved, and what CUDA itself uses."
    import torch
    free, total = torch.cuda.mem_get_info()
    return dict(gpu_peak_bytes=torch.cuda.max_memory_allocated(), gpu_reserved_bytes=torch.cuda.max_memory_reserved(),
                gpu_context_bytes=total - free - torch.cuda.memory_reserved())


def memory_field(options) -> str: return "gpu_peak_bytes" if options.device == "cuda" else "peak_bytes"


def model_flops_utilisation(config, block_size, tokens_per_second, peak) -> float:
    "MFU = tokens/s x (6·N + 12·L·C·T) / peak, N without the position embeddings; `peak` in FLOP/s."
    from colab_gpt2.planning.memory import shape_of
    from colab_gpt2.planning.speed import flops_per_token
    return tokens_per_second * flops_per_token(shape_of(config), block_size) / peak


def gpu_peak(options) -> float | None:
    "FLOP/s of the GPU in half precision by its data sheet; None on a CPU, or where the library does not know it."
    if options.device == "cpu": return None
    from colab_gpt2.planning.speed import device_of
    from colab_gpt2.runtime import check_runtime
    known = device_of(check_runtime())
    return known and known.peak_half
