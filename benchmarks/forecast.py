"""Does training take the memory and the time that were forecast? The plan made before the run, the plan after the
probe, and what the run then took."""
import sys

from harness import compare, emit, report, run_side
from targets import target
from task import device_environment, load_blocks, make_config, measure, our_trainer, parser, settle, side_command

T4_CAP = 14_700_000_000  # bytes that the rehearsal gives torch's allocator of a T4's 15.8 GB: the rest is CUDA's


def as_t4(runtime):
    """The Runtime of a T4, on a larger GPU that from now on behaves like one: no bf16, no flash attention, little
    memory."""
    import dataclasses, torch
    from colab_gpt2.planning.speed import DEVICES
    from colab_gpt2.runtime import pick_precision
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.cuda.set_per_process_memory_fraction(T4_CAP / torch.cuda.get_device_properties(0).total_memory)
    t4 = DEVICES["T4"]
    return dataclasses.replace(runtime, device_name="Tesla T4", device_memory=t4.memory,
                               compute_capability=t4.compute_capability,
                               precision=pick_precision("cuda", t4.compute_capability))


def forecasts(plan) -> dict:
    "A Plan's two forecasts, under the names of what `measure` measures."
    return dict(peak_bytes=plan.peak_bytes, seconds_per_step=plan.step_seconds)


def train_side(options) -> dict:
    "Plan, probe and train in this process."
    tokenizer, blocks = load_blocks(options)
    config = make_config(options, blocks.vocabulary_size)
    adapt = as_t4 if options.t4 else lambda runtime: runtime
    trainer, plan, train = our_trainer(options, config, tokenizer, blocks, adapt, method=options.method)
    found, probed = measure(options, trainer, options.batch, train)
    return dict(planned=forecasts(plan), probed=forecasts(probed), plan=plan, plan_probed=probed, **found)


FIGURES = {"peak_bytes": "peak memory", "seconds_per_step": "seconds a step"}  # key -> its name


def taken(run) -> int:
    "Bytes that a run took at its peak: of the GPU, CUDA's own included, as a forecast counts them; else of the RAM."
    return run["gpu_peak_bytes"] + run["gpu_context_bytes"] if "gpu_peak_bytes" in run else run["peak_bytes"]


def rows_of(size, runs, figures=FIGURES) -> list:
    "Both forecasts of one size against what was measured; a time that was not forecast is left out."
    results = {"before": [run["planned"] for run in runs], "after the probe": [run["probed"] for run in runs],
               "measured": [dict(peak_bytes=taken(run), seconds_per_step=run["seconds_per_step"]) for run in runs]}
    rows = []
    for key, name in figures.items():
        for when in ("before", "after the probe"):
            if results[when][0][key] is None: continue
            meant = when == "after the probe" or key == "peak_bytes"  # a time before the probe is a guess
            rows.append(compare(f"{name} of {size}, forecast {when}", results, key, "measured", when,
                                target=target(name, "measured") if meant else None))
    return rows


def rows_of_t4(size, runs) -> list:
    """The memory of a run under a T4's cap: forecast, taken, and against the cap. One that needs more fails, and is
    named as failed. Its time is another GPU's, and no row."""
    cap = "14.7 GB"
    against = {size: [dict(bytes=run["gpu_reserved_bytes"]) for run in runs], cap: [dict(bytes=T4_CAP)] * len(runs)}
    goal = target("memory on a T4", cap, "cuda")
    fits = compare(f"memory of {size} on a T4", against, "bytes", cap, size, target=goal)
    return [*rows_of(size, runs, {"peak_bytes": FIGURES["peak_bytes"]}), fits]


def main():
    options = parser(__doc__, steps=5, rounds=1)
    options.add_argument("--method", default="auto", choices=("auto", "full", "lora"))
    add = options.add_argument
    add("--sizes", nargs="+",
        help="several, one after the other; gpt2-xl:lora has a method of its own (default: --size alone)")
    add("--t4", action="store_true",
        help="rehearse a Tesla T4 on a larger GPU: fp16 with a scaler, no flash attention, 14.7 GB")
    options = settle(options.parse_args())
    if options.t4 and options.device != "cuda":
        raise SystemExit("--t4 rehearses a Tesla T4 on a larger CUDA GPU, and this would run on the CPU: "
                         "nothing was measured.")
    if options.side: return emit(**train_side(options))
    def command(name):
        size, _, method = name.partition(":")
        return side_command(__file__, options, "ours", size=size, method=method or options.method, sizes=None)
    commands = {name: command(name) for name in options.sizes or [options.size]}
    question, rows_for = ("rehearsal of a T4", rows_of_t4) if options.t4 else ("forecast", rows_of)
    results, rows, failed = {}, [], {}
    for size in commands:
        env = device_environment(options)
        try: results[size] = [run_side(commands[size], env=env) for _ in range(options.rounds)]
        except RuntimeError as e: failed[size] = str(e)
        else: rows += rows_for(size, results[size])
        if results:  # after each: the last may be stopped
            report(question, results, rows, commands=commands, device=options.device, folder=options.results,
                   failed=failed)
    if failed: sys.exit("\n".join(f"{size} failed: {why}" for size, why in failed.items()))


if __name__ == "__main__": main()
