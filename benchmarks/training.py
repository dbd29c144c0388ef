"""How fast does GPT-2, or with --size smollm2-135m a Llama, learn, and in how much memory? Ours against five peers:

tutorial        what the command of 2020 maps to: the stock Trainer's defaults, fp32, one block at a time
trl             TRL's SFTTrainer with its defaults (recomputed activations, its own loss in chunks), one block at a
                time, in the device's best half precision, if any
nanogpt         nanoGPT's plain loop with its defaults, without dropout, in fp32 on a CPU, one block at a time
stock           the stock Trainer in the device's best half precision, with as many blocks a step as ours, in the
                fastest of the micro-batches tried
stock-compiled  the same with torch_compile

ours is the default configuration; ours-compiled has torch_compile on whatever the plan says; ours-single takes one
block a step, as the tutorial does. Its memory is compared: without accumulation, neither side keeps gradients between
micro-batches.

Every side learns from as many blocks before its steps count, and from as many in those that do, however many blocks it
takes a step."""
import statistics, sys

from harness import alternate, compare, emit, report, run_side
from targets import STANDARD, target
from task import (ARCHITECTURES, device_environment, gpu_peak, half_precision, load_blocks, make_config, measure,
                  memory_field, model_flops_utilisation, our_trainer, parser, settle, side_command, stock_model,
                  stock_trainer, trl_trainer, warm_up_steps)

COMPILED = {"stock": False, "stock-compiled": True}
PEERS, OURS = ("tutorial", "trl", "nanogpt", *COMPILED), ("ours", "ours-single", "ours-compiled")
SINGLE = ("tutorial", "trl", "nanogpt", "ours-single")  # one block a step
PROBED = 3  # micro-batches that the library's probe learns from before the first step


def our_side(options, config, tokenizer, blocks) -> dict:
    changes = dict(torch_compile=True) if options.side == "ours-compiled" else {}
    trainer, plan, train = our_trainer(options, config, tokenizer, blocks, **changes)
    found, plan = measure(options, trainer, options.batch, train, done=PROBED * plan.recipe.micro_batch)
    if changes and not plan.torch_compile:
        raise SystemExit("torch.compile failed here, and nothing compiled was measured.")
    return {**found, "plan": plan}


def peer_side(options, config, tokenizer, blocks) -> dict:
    if options.side == "trl":
        trainer = trl_trainer(options, stock_model(config, options.seed), tokenizer, blocks)
        return measure(options, trainer, options.batch, trainer.train)[0]
    if options.side == "nanogpt":
        from nanogpt import PlainLoop
        loop = PlainLoop(options, config, blocks, next(iter(half_precision(options)), "fp32"))
        return measure(options, loop, options.batch, loop.train)[0]
    micro = options.micro_batch or 1
    faster = {} if options.side == "tutorial" else dict(torch_compile=COMPILED[options.side], **half_precision(options))
    arguments = dict(per_device_train_batch_size=micro, gradient_accumulation_steps=options.batch // micro, **faster)
    trainer = stock_trainer(options, stock_model(config, options.seed), blocks, **arguments)
    found, _ = measure(options, trainer, options.batch, trainer.train)
    return {**found, "arguments": arguments}


def train_side(options) -> dict:
    """One side in this process: what `measure` found, how it was set, and the MFU. `options.steps` count; those that
    warm up come before them."""
    options.steps += warm_up_steps(options, options.batch)
    tokenizer, blocks = load_blocks(options)
    config = make_config(options, blocks.vocabulary_size)
    if options.side in PEERS: found = peer_side(options, config, tokenizer, blocks)
    else: found = our_side(options, config, tokenizer, blocks)
    peak = gpu_peak(options)
    mfu = peak and model_flops_utilisation(config, options.block_size, found["tokens_per_second"], peak)
    return {**found, "mfu": mfu}


def fastest_micro_batch(options, side, env) -> tuple:
    """`(micro_batch, {micro_batch: tokens/s})`: each of `options.micro_batches` that divides the batch, tried in
    steps of its own size for as many blocks as the others."""
    possible = [n for n in options.micro_batches if options.batch % n == 0]
    if not possible:
        raise SystemExit(f"None of --micro-batches {options.micro_batches} divides --batch {options.batch}.")
    most, tried = max(possible), {}
    for n in possible:
        steps = -(-most // n)
        command = side_command(__file__, options, side, micro_batch=n, batch=n, steps=steps, warm_up=2 * most)
        tried[n] = speed_or_none(command, env)
    return max(possible, key=lambda n: tried[n] or 0), tried


def speed_or_none(command, env) -> float | None:
    """Tokens a second of one side; None, and a line on stderr, where it does not run: it may need more memory than
    there is."""
    try: return run_side(command, env=env)["tokens_per_second"]
    except RuntimeError as e:
        print(e, file=sys.stderr)
        return None


def speed(results, label) -> float: return statistics.median(run["tokens_per_second"] for run in results[label])


def against_one_block(options, results, peer, goal) -> list:
    "The rows for a peer with its own defaults, one block a step."
    memory = memory_field(options)
    def row(figure, field, ours="ours"):
        return compare(figure, results, field, peer, ours, target=goal(figure, peer))
    rows = [row("training, tokens/s", "tokens_per_second"), row("peak memory of training", memory)]
    if "ours-single" not in results: return rows
    return rows + [row("training one block a step, tokens/s", "tokens_per_second", "ours-single"),
                   row("peak memory of training one block a step", memory, "ours-single")]


def against_stock(options, results, peer, goal, faster, memory=None) -> list:
    """The rows for one stock Trainer; `goal` is the target of our side that is compared with it, `memory` that of its
    peak, None for the slower Trainer."""
    aims = {"ours-compiled" if options.device == "cuda" and "ours-compiled" in results else "ours": goal}
    def row(figure, field, ours="ours", **target): return compare(figure, results, field, peer, ours, **target)
    rows = [row("training, tokens/s", "tokens_per_second", target=aims.get("ours")),
            row("peak memory of training", memory_field(options), target=memory)]
    if faster and "ours-single" in results:
        rows.append(row("training one block a step, tokens/s", "tokens_per_second", "ours-single"))
    if "ours-compiled" in results:
        aim = aims.get("ours-compiled")
        rows.append(row("training compiled, tokens/s", "tokens_per_second", "ours-compiled", target=aim))
    return rows


def utilisation(results, goal) -> list:
    "Ours against 25% of the GPU's FLOP/s; the target is for the faster of our sides."
    own = sorted({"ours", "ours-compiled"} & set(results), key=lambda label: speed(results, label))
    rows = []
    for label in own:
        against = {**results, "25%": [dict(mfu=0.25)] * len(results[label])}
        aim = goal("MFU", "25%") if label == own[-1] else None
        rows.append(compare(f"MFU, {label}", against, "mfu", "25%", label, target=aim))
    return rows


def rows_of(options, results) -> list:
    "The comparisons with all peers that ran."
    of = "" if options.size == STANDARD else f", {options.size}"
    if options.no_bf16: of += ", without bf16"
    def goal(figure, peer): return target(figure + of, peer, options.device)
    if "ours" not in results: return []
    alone = [label for label in SINGLE if label in PEERS and label in results]
    rows = [row for label in alone for row in against_one_block(options, results, label, goal)]
    stock = sorted(set(results) & set(COMPILED), key=lambda label: speed(results, label), reverse=True)
    for label in stock:
        names = ("training, tokens/s", "peak memory of training")
        faster = label == stock[0]
        aim, memory = (goal(name, "faster stock Trainer") if faster else None for name in names)
        rows += against_stock(options, results, label, aim, faster, memory)
    return rows + (utilisation(results, goal) if results["ours"][0]["mfu"] else [])


def main():
    options = parser(__doc__, steps=2, rounds=3, batch=4,
                     steps_are="steps of --batch blocks that count; a side with one block a step takes as many blocks")
    add = options.add_argument
    add("--sides", nargs="+", default=[*PEERS, *OURS], choices=(*PEERS, *OURS), help="ours always runs")
    add("--micro-batches", type=int, nargs="+", default=[1, 2],
        help="micro-batches that the stock Trainer may choose from")
    add("--micro-batch", type=int, help="of one side")
    add("--no-bf16", action="store_true", help="rehearse a CPU without bfloat16, as Colab's are")
    options = settle(options.parse_args())
    if options.size in ARCHITECTURES: options.sides = [side for side in options.sides if side != "nanogpt"]  # a GPT-2
    if options.side: return emit(**train_side(options))
    env = device_environment(options, options.no_bf16)
    chosen = {label: fastest_micro_batch(options, label, env) for label in COMPILED if label in options.sides}
    def command(label):
        blocks = 1 if label in SINGLE else options.batch
        return side_command(__file__, options, label, micro_batch=chosen.get(label, (None,))[0], batch=blocks,
                            steps=options.steps * options.batch // blocks)
    commands, failed = {label: command(label) for label in dict.fromkeys([*options.sides, "ours"])}, {}
    micro = {label: dict(chosen=n, tried=tried) for label, (n, tried) in chosen.items()}
    def report_all(results):
        question = f"training {options.size}" if options.size == "smollm2-135m" else "training"
        question += " without bf16" * options.no_bf16
        report(question, results, rows_of(options, results), commands=commands, device=options.device,
               folder=options.results, micro_batches=micro, failed=failed)
    alternate(commands, options.rounds, env=dict.fromkeys(commands, env), failed=failed, each_round=report_all)
    if failed: sys.exit(f"Failed: {', '.join(failed)}")


if __name__ == "__main__": main()
