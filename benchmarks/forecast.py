"""Does training take the memory and the time that were forecast? The plan made beforehand, the plan after one step was probed, and what the run then took."""
import sys

from harness import compare, report, run_side, tell
from task import device_environment, load_blocks, make_config, measure, our_trainer, parser, settle, side_command

T4_CAP = 14_700_000_000  # what the rehearsal lets torch's allocator take of a T4's 15.8 GB: the rest is CUDA's


def as_t4(runtime):
    "The Runtime of a T4, on a larger GPU that from now on behaves like one: no bf16, no flash attention, little memory."
    import dataclasses, torch
    from colab_gpt2.planning.memory import DEVICES
    from colab_gpt2.runtime import pick_precision
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.cuda.set_per_process_memory_fraction(T4_CAP / torch.cuda.get_device_properties(0).total_memory)
    t4 = DEVICES["T4"]
    return dataclasses.replace(runtime, device_name="Tesla T4", device_memory=t4.memory, compute_capability=t4.compute_capability,
                               precision=pick_precision("cuda", t4.compute_capability))


def said(plan) -> dict:
    "A Plan's two forecasts, under the names that `measure` gives to what happened."
    return dict(peak_bytes=plan.peak_bytes, seconds_per_step=plan.step_seconds)


def train_side(options) -> dict:
    "Plan, probe and train in this process."
    tokenizer, blocks = load_blocks(options)
    config, adapt = make_config(options, blocks.vocabulary_size), as_t4 if options.t4 else lambda runtime: runtime
    trainer, plan, train = our_trainer(options, config, tokenizer, blocks, adapt, method=options.method)
    found, probed = measure(options, trainer, options.batch, train)
    return dict(planned=said(plan), probed=said(probed), plan=plan, plan_probed=probed, **found)


FIGURES = {"peak_bytes": ("peak memory", 0.05), "seconds_per_step": ("seconds a step", 0.10)}  # key -> its name, how far off it may be: a time after the probe only


def taken(run) -> int:
    "Bytes that a run took at its peak: of the GPU, CUDA's own included, as a forecast counts them; else of the RAM."
    return run["gpu_peak_bytes"] + run["gpu_context_bytes"] if "gpu_peak_bytes" in run else run["peak_bytes"]


def rows_of(size, runs, figures=FIGURES) -> list:
    "Both forecasts of one size against what was measured; a time that nobody forecast is left out."
    measured = [dict(peak_bytes=taken(run), seconds_per_step=run["seconds_per_step"]) for run in runs]
    results = {"before": [run["planned"] for run in runs], "after the probe": [run["probed"] for run in runs], "measured": measured}
    def bar(key, when, value): return dict(rule="within", bar=value) if when == "after the probe" or key == "peak_bytes" else {}
    return [compare(f"{name} of {size}, forecast {when}", results, key, "measured", when, **bar(key, when, value))
            for key, (name, value) in figures.items() for when in ("before", "after the probe") if results[when][0][key] is not None]


def rows_of_t4(size, runs) -> list:
    "The memory of a run under a T4's cap, forecast, taken, and against the cap; one that needs more fails, and is named as failed. Its time is another GPU's, and no row."
    aim = {size: [dict(bytes=run["gpu_reserved_bytes"]) for run in runs], "14.7 GB": [dict(bytes=T4_CAP)] * len(runs)}
    fits = compare(f"memory of {size} on a T4", aim, "bytes", "14.7 GB", size, rule="at most", bar=1.0)
    return [*rows_of(size, runs, {"peak_bytes": FIGURES["peak_bytes"]}), fits]


def main():
    options = parser(__doc__, steps=5, rounds=1)
    options.add_argument("--method", default="auto", choices=("auto", "full", "lora"))
    options.add_argument("--sizes", nargs="+", help="several, one after the other; gpt2-xl:lora has a method of its own (default: --size alone)")
    options.add_argument("--t4", action="store_true", help="rehearse a Tesla T4 on a larger GPU: fp16 with a scaler, no flash attention, 14.7 GB")
    options = settle(options.parse_args())
    if options.t4 and options.device != "cuda": raise SystemExit("--t4 rehearses a Tesla T4 on a larger CUDA GPU, and this would run on the CPU: nothing was measured.")
    if options.side: return tell(**train_side(options))
    def side(name, size, method): return side_command(__file__, options, "ours", size=size, method=method or options.method, sizes=None)
    commands = {name: side(name, *f"{name}:".split(":")[:2]) for name in options.sizes or [options.size]}
    results, rows, failed = {}, [], {}
    for size, command in commands.items():
        try: results[size] = [run_side(command, env=device_environment(options)) for _ in range(options.rounds)]
        except RuntimeError as e: failed[size] = str(e)
        else: rows += (rows_of_t4 if options.t4 else rows_of)(size, results[size])  # told after each: the last may be stopped
        if results: report("rehearsal of a T4" if options.t4 else "forecast", results, rows, commands=commands, device=options.device, folder=options.results, failed=failed)
    if failed: sys.exit("\n".join(f"{size} failed: {why}" for size, why in failed.items()))


if __name__ == "__main__": main()
