"""How fast does GPT-2 learn, and in how much memory? Ours against three peers:

tutorial        what the command of 2020 maps to: the stock Trainer's defaults, fp32, one block at a time
stock           the stock Trainer in the device's best half precision, with as many blocks a step as ours, in the micro-batches that it is fastest with
stock-compiled  the same with torch_compile

ours is the default configuration; ours-compiled has torch_compile on whatever the plan says; ours-single takes one block a step, as the tutorial does,
with which its memory is compared: gradients are then not kept from one part of a step to the next, on either side.

Every side learns from as many blocks before its steps count, and from as many in those that do, however many blocks it takes a step."""
import statistics, sys

from harness import alternate, compare, report, run_side, tell
from task import (device_environment, gpu_peak, half_precision, load_blocks, make_config, measure, memory_field, model_flops_utilisation, our_trainer, parser,
                  settle, side_command, stock_model, stock_trainer, warm_up_steps)

COMPILED = {"stock": False, "stock-compiled": True}
PEERS, OURS = ("tutorial", *COMPILED), ("ours", "ours-single", "ours-compiled")
SINGLE = ("tutorial", "ours-single")  # one block a step
PROBED = 3  # micro-batches that the library's probe learns from before the first step


def our_side(options, config, tokenizer, blocks) -> dict:
    changes = dict(torch_compile=True) if options.side == "ours-compiled" else {}
    trainer, plan, train = our_trainer(options, config, tokenizer, blocks, **changes)
    found, plan = measure(options, trainer, options.batch, train, done=PROBED * plan.recipe.micro_batch)
    if changes and not plan.torch_compile: raise SystemExit("torch.compile failed here, and nothing compiled was measured.")
    return {**found, "plan": plan}


def peer_side(options, config, blocks) -> dict:
    micro = options.micro_batch or 1
    faster = {} if options.side == "tutorial" else dict(torch_compile=COMPILED[options.side], **half_precision(options))
    arguments = dict(per_device_train_batch_size=micro, gradient_accumulation_steps=options.batch // micro, **faster)
    trainer = stock_trainer(options, stock_model(config, options.seed), blocks, **arguments)
    found, _ = measure(options, trainer, options.batch, trainer.train)
    return {**found, "arguments": arguments}


def train_side(options) -> dict:
    "One side in this process: what `measure` found, how it was set, and the MFU. `options.steps` count; those that warm up come before them."
    options.steps += warm_up_steps(options, options.batch)
    tokenizer, blocks = load_blocks(options)
    config = make_config(options, blocks.vocabulary_size)
    found, peak = peer_side(options, config, blocks) if options.side in PEERS else our_side(options, config, tokenizer, blocks), gpu_peak(options)
    return {**found, "mfu": peak and model_flops_utilisation(config, options.block_size, found["tokens_per_second"], peak)}


def fastest_micro_batch(options, side, env) -> tuple:
    "`(micro_batch, {micro_batch: tokens/s})`: each of `options.micro_batches` that divides the batch, tried in steps of its own size for as many blocks as the others."
    possible = [n for n in options.micro_batches if options.batch % n == 0]
    if not possible: raise SystemExit(f"None of --micro-batches {options.micro_batches} divides --batch {options.batch}.")
    most = max(possible)
    tried = {n: speed_or_none(side_command(__file__, options, side, micro_batch=n, batch=n, steps=-(-most // n), warm_up=2 * most), env) for n in possible}
    return max(possible, key=lambda n: tried[n] or 0), tried


def speed_or_none(command, env) -> float | None:
    "Tokens a second of one side; None, and a word on stderr, where it does not run: more blocks at once may need more memory than there is."
    try: return run_side(command, env=env)["tokens_per_second"]
    except RuntimeError as e: print(e, file=sys.stderr)


def rows_of(options, results) -> list:
    "The comparisons. The bars were set for GPT-2 124M, on a CPU with two cores and on an H100."
    def bar(rule, value, device="cpu"): return dict(rule=rule, bar=value) if (options.device, options.size) == (device, "gpt2") else {}
    def speed(label): return statistics.median(run["tokens_per_second"] for run in results[label])
    rows, stock = [], sorted(set(results) & set(COMPILED), key=speed, reverse=True)
    if "ours" not in results: return rows
    if "tutorial" in results:
        rows += [compare("training, tokens/s", results, "tokens_per_second", "tutorial", **bar("at least", 3.0)),
                 compare("peak memory of training", results, memory_field(options), "tutorial")]
        if "ours-single" in results:
            rows += [compare("training one block a step, tokens/s", results, "tokens_per_second", "tutorial", "ours-single", **bar("at least", 3.0)),
                     compare("peak memory of training one block a step", results, memory_field(options), "tutorial", "ours-single", **bar("at most", 0.55))]
    for n, label in enumerate(stock):  # the bar is set against the better one
        best = bar("at least", 2.0) | bar("at least", 1.3, "cuda") if n == 0 else {}
        rows += [compare("training, tokens/s", results, "tokens_per_second", label, **(best if options.device == "cpu" or "ours-compiled" not in results else {})),
                 compare("peak memory of training", results, memory_field(options), label)]
        if n == 0 and "ours-single" in results: rows.append(compare("training one block a step, tokens/s", results, "tokens_per_second", label, "ours-single"))
        if "ours-compiled" in results: rows.append(compare("training compiled, tokens/s", results, "tokens_per_second", label, "ours-compiled", **(best if options.device == "cuda" else {})))
    own = sorted({"ours", "ours-compiled"} & set(results), key=speed) if results["ours"][0]["mfu"] else []
    for label in own:  # the bar is for the faster one
        aim = {**results, "45%": [dict(mfu=0.45)] * len(results[label])}
        rows.append(compare(f"MFU, {label}", aim, "mfu", "45%", label, **(bar("at least", 1.0, "cuda") if label == own[-1] else {})))
    return rows


def main():
    options = parser(__doc__, steps=2, rounds=3, batch=4, steps_are="steps of --batch blocks that count; a side with one block a step takes as many blocks")
    options.add_argument("--sides", nargs="+", default=[*PEERS, *OURS], choices=(*PEERS, *OURS), help="ours always runs")
    options.add_argument("--micro-batches", type=int, nargs="+", default=[1, 2], help="micro-batches that the stock Trainer may choose from")
    options.add_argument("--micro-batch", type=int, help="of one side")
    options = settle(options.parse_args())
    if options.side: return tell(**train_side(options))
    env = device_environment(options)
    chosen = {label: fastest_micro_batch(options, label, env) for label in COMPILED if label in options.sides}
    def command(label):
        blocks = 1 if label in SINGLE else options.batch
        return side_command(__file__, options, label, micro_batch=chosen.get(label, (None,))[0], batch=blocks, steps=options.steps * options.batch // blocks)
    commands = {label: command(label) for label in dict.fromkeys([*options.sides, "ours"])}
    failed, micro = {}, {label: dict(chosen=n, tried=tried) for label, (n, tried) in chosen.items()}
    def tell_all(results): report("training", results, rows_of(options, results), commands=commands, device=options.device, folder=options.results, micro_batches=micro, failed=failed)
    alternate(commands, options.rounds, env=dict.fromkeys(commands, env), failed=failed, each_round=tell_all)
    if failed: sys.exit(f"Failed: {', '.join(failed)}")


if __name__ == "__main__": main()
