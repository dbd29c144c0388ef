"""Do several processes train the same model as one, as fast, and in the memory that the plan says? The losses of the
same steps and the perplexity of the held-out text, by two processes and by one; tokens a second of two processes of
one thread against one process of two; the peak memory of a process against the forecast; how long a text takes to
pack."""
import contextlib, json, os, socket, subprocess, sys, tempfile, time
from pathlib import Path

from harness import alternate, compare, emit, report
from packing import shuffled
from targets import STANDARD, target
from task import DATA, parser, settle, side_command

STEPS, RANK_DONE = 20, "rank-{}.json"  # steps whose losses are compared; what each process of a side leaves
LEARNING = dict(block_size=128, effective_batch_size=6, learning_rate=5e-4, eval_steps=-1, logging_steps=1)
MEDIUM = "gpt2-medium"
ONE, TWO, TWO_FSDP = "1 process", "2 processes", "2 processes, FSDP2"
SIDES = {  # label -> (what is done, processes, threads of each)
    ONE: ("learn", 1, 1), TWO: ("learn", 2, 1), TWO_FSDP: ("learn", 2, 1),
    "1 x 2 threads": ("speed", 1, 2), "2 x 1 thread": ("speed", 2, 1),
    "DDP": ("memory", 2, 1), "FSDP2": ("memory", 2, 1),
    "packing by 1": ("pack", 1, 1), "packing by 2": ("pack", 2, 1)}


# One process of a side

def config_of(options, what):
    "The FinetuneConfig of a side: `tiny` learns in fp32, the others have random weights."
    from colab_gpt2 import FinetuneConfig
    held_out = Path("held-out.txt")
    if not held_out.exists(): held_out.write_bytes(Path(options.text).read_bytes()[-20_000:])
    same = dict(train_file=str(options.text), eval_file=str(held_out), output_dir="output", cache_dir="cache",
                mirror="off", save_steps=-1, max_new_tokens=4, prompt="The", seed=options.seed,
                fsdp="on" if "FSDP2" in options.side else "off")
    if what == "learn": return FinetuneConfig(model="tiny", precision="fp32", max_steps=STEPS, **LEARNING, **same)
    size, blocks, length = ("tiny", 2, 64) if options.size == "toy" else (
        (options.size, options.batch, options.block_size) if what == "speed" else (MEDIUM, 2, options.memory_block))
    return FinetuneConfig(
        model=size, from_scratch=True, tokenizer=None if size == "tiny" else str(options.tokenizer), block_size=length,
        effective_batch_size=blocks, max_steps=options.steps, eval_steps=-1, torch_compile=False,
        **(dict(precision="fp32", method="full", gradient_checkpointing=False, per_device_train_batch_size=1)
           if what == "memory" else {}), **same)


def watcher():
    "A Listener that knows the forecast before the run, and the most memory that the steps took."
    from colab_gpt2.engine.callbacks import BEFORE, Listener
    from colab_gpt2.engine.probe import PeakMemory

    class Watcher(Listener):
        planned = bytes = 0
        def on_stage(self, stage, plan=None, **facts):
            if stage == BEFORE: self.planned = plan.peak_bytes
        def on_train_begin(self, args, *rest, **kwargs): self.memory = PeakMemory(args.device)
        def on_step_end(self, args, state, *rest, **kwargs): self.bytes = self.memory.bytes()
    return Watcher()


def train_rank(options, what) -> dict:
    "What this process of a side measures of a training."
    from colab_gpt2 import finetune
    seen = watcher()
    result = finetune(config_of(options, what), progress=False, callbacks=[seen])
    return dict(losses=[entry["loss"] for entry in result.losses], perplexity_before=result.perplexity_before.value,
                perplexity_after=result.perplexity_after.value, tokens_per_second=result.tokens_per_second,
                planned_bytes=seen.planned, step_bytes=seen.bytes)


def pack_rank(options) -> dict:
    """Seconds until this process can read the blocks: the first packs them by as many processes, the others wait. The
    text's checksum is known, as it is when `finetune` packs."""
    from colab_gpt2 import ranks
    from colab_gpt2.core import sha256_of
    from colab_gpt2.model.loading import load_tokenizer
    from colab_gpt2.text.token_store import tokenize_file
    ranks.join(60, cpu=True)
    tokenizer, sha256 = load_tokenizer(options.tokenizer), sha256_of(options.packed)
    ranks.gathered(None)  # so that all begin together
    started = time.perf_counter()
    with ranks.first_alone():
        blocks = len(tokenize_file(options.packed, tokenizer, options.block_size, cache_dir="cache", sha256=sha256,
                                   progress=False))
    return dict(pack_seconds=time.perf_counter() - started, blocks=blocks)


def rank_side(options, what):
    found = pack_rank(options) if what == "pack" else train_rank(options, what)
    Path(RANK_DONE.format(os.environ.get("RANK", 0))).write_text(json.dumps(found))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from colab_gpt2 import ranks
        ranks.leave(code=0)


# A side: its processes

def environment(rank, ranks, threads, port) -> dict:
    "As torchrun would start a process; one alone has none of torchrun's variables."
    threaded = dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS"), str(threads))  # torch's, and tokenizers'
    found = {**os.environ, **threaded, "CUDA_VISIBLE_DEVICES": ""}
    if ranks == 1: return found
    place = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    return {**found, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)}


def run_ranks(options) -> list:
    "What each process of a side measured; RuntimeError where one failed."
    _, ranks, threads = SIDES[options.side]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = side_command(__file__, options, options.side, rank=True)
    started = [subprocess.Popen(words, env=environment(rank, ranks, threads, port)) for rank in range(ranks)]
    try: codes = [process.wait() for process in started]
    finally:
        for process in started:
            with contextlib.suppress(OSError): process.kill()
    if any(codes): raise RuntimeError(f"The processes of {options.side} ended with {codes}.")
    return [json.loads(Path(RANK_DONE.format(rank)).read_text()) for rank in range(ranks)]


def side(options) -> dict:
    "One side: what its first process measured, and of memory and time the most of all."
    found = run_ranks(options)
    most = {name: max(each[name] for each in found) for name in ("step_bytes", "pack_seconds") if name in found[0]}
    return {**found[0], **most, "ranks": found}


# What they say

def furthest(ours, theirs) -> int: return max(range(len(theirs)), key=lambda n: abs(ours[n] / theirs[n] - 1))


def learning_row(results, figure, label):
    "Of the losses the step that differs most."
    worst = furthest(*(results[name][0]["losses"] for name in (label, ONE)))
    return compare(f"{figure}, step {worst + 1} of {STEPS}, which differs most", results,
                   lambda run: run["losses"][worst], ONE, label, target=target(figure, ONE))


def forecast_row(results, way):
    "What the plan said before the run, against what its steps took."
    figure, runs = "peak memory a process, forecast", results[way]
    told = {"forecast": [dict(bytes=run["planned_bytes"]) for run in runs],
            "measured": [dict(bytes=run["step_bytes"]) for run in runs]}
    return compare(f"{figure}, {way}", told, "bytes", "measured", "forecast", target=target(figure, "measured"))


def standard(options) -> bool: return (options.size, options.batch, options.block_size) == (STANDARD, 2, 1024)


def rows_of(options, results) -> list:
    rows = [learning_row(results, "loss of 2 processes, fp32", TWO),
            learning_row(results, "loss of 2 processes under FSDP2, fp32", TWO_FSDP)]
    for when in ("before", "after"):
        goal = target("perplexity of 2 processes", ONE) if when == "before" else None  # after: of other weights
        rows.append(compare(f"perplexity {when} training, 2 processes", results, f"perplexity_{when}", ONE, TWO,
                            target=goal))
    speed, packing = "2 processes of 1 thread, tokens/s", "packing by 2 processes, seconds"
    goal = target(speed, "1 process of 2 threads") if standard(options) else None
    rows.append(compare(speed, results, "tokens_per_second", "1 x 2 threads", "2 x 1 thread", target=goal))
    rows.append(compare(f"peak memory a process of {MEDIUM}", results, "step_bytes", "DDP", "FSDP2",
                        target=target("peak memory a process", "DDP")))
    for way in ("FSDP2", "DDP"): rows.append(forecast_row(results, way))
    rows.append(compare(packing, results, "pack_seconds", "packing by 1", "packing by 2",
                        target=target(packing, "packing by 1")))
    return rows


def main():
    options = parser(__doc__, steps=3, rounds=2, batch=2)
    options.set_defaults(device="cpu")
    add = options.add_argument
    add("--packed", default=DATA/"wikitext-2-articles"/"articles.unk.txt", type=Path,
        help="the text whose lines are packed, in another order each time")
    add("--megabytes", type=int, default=200, help="how much of them")
    add("--memory-block", type=int, default=128, help=f"tokens in a block of {MEDIUM}, whose memory is measured")
    add("--rank", action="store_true", help="be one process of a side")
    options = settle(options.parse_args())
    options.packed = options.packed.resolve()
    if str(options.text) == "python-docs": raise SystemExit("Several processes read a file: give --text a path.")
    if options.rank: return rank_side(options, SIDES[options.side][0])
    if options.side: return emit(**side(options))
    once = {label for label, (what, *_) in SIDES.items() if what in ("learn", "memory")}  # their figures do not vary
    with tempfile.TemporaryDirectory() as folder:
        options.packed = shuffled(options.packed, options.megabytes / 1000, folder)
        commands = {label: side_command(__file__, options, label) for label in SIDES}
        results = alternate({label: commands[label] for label in SIDES if label in once}, 1)
        for chosen, rounds in (("speed", options.rounds), ("pack", 3 * options.rounds)):  # packing is brief, and varies
            results |= alternate({label: commands[label] for label, side in SIDES.items() if side[0] == chosen}, rounds)
    report("distributed", results, rows_of(options, results), commands=commands, device=options.device,
           folder=options.results)


if __name__ == "__main__": main()
