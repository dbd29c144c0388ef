"""Everything on one CUDA GPU, with random weights and without a network: are the losses the stock Trainer's, how fast
and in how much memory does it train, are the forecasts right for all four sizes, would a T4 do, how fast does it
sample? Each question is a program of its own; one that fails does not stop the others, and those that were skipped
are named. `--first` is for the first quarter of an hour on a kind of GPU that the library never ran on."""
import argparse, os, signal, subprocess, sys, tempfile, time
from pathlib import Path

from harness import RESULTS
from table import show
from task import Formatter, SIZES, TEXT, TOKENIZER, words
from training import PEERS

HERE = Path(__file__).parent
SIZES_ON_A_T4 = ["gpt2-large:full", "gpt2-xl:lora"]


def questions(options) -> dict:
    """title -> (program, its options), the most important first; `--quick` runs each side once, for fewer steps, and
    leaves the largest models out."""
    quick, sizes = options.quick, SIZES[:2] if options.quick else SIZES
    common = dict(tokenizer=options.tokenizer, results=options.results, device="cuda")
    trained = dict(common, text=options.text)
    t4_sizes = SIZES_ON_A_T4[:1] if quick else SIZES_ON_A_T4
    return {
        "equality": ("equality.py", dict(trained, batch=8, steps=20)),
        "training": ("training.py", dict(trained, sides=[*PEERS, "ours", "ours-compiled"], batch=8, warm_up=32,
                                         micro_batches=[8, 4, 2], steps=8 if quick else 26, rounds=1 if quick else 2)),
        "forecast": ("forecast.py", dict(trained, sizes=sizes, steps=5 if quick else 8)),
        "rehearsal of a T4": ("forecast.py", dict(trained, t4=True, sizes=t4_sizes, steps=4)),
        "sampling": ("sampling.py", dict(common, rounds=1 if quick else 2)),
    }


def first_questions(options, scratch) -> dict:
    """What could only be traced without a GPU: title -> (program, its options or words), the quickest first. Models go
    to the folder `scratch`."""
    trained = dict(text=options.text, tokenizer=options.tokenizer, results=options.results, device="cuda")
    def tiny(precision):
        return "-c", ["from colab_gpt2.cli import main; main()", "finetune", "--model", "tiny", "--dataset",
                      "python-docs", "--precision", precision, "--max-steps", 40, "--output-dir",
                      Path(scratch)/precision]
    return {
        "rates": ("rates.py", {}),
        "a recorded step": ("-m", ["pytest", "-q", HERE.parent/"tests"/"test_decoding.py", "-k", "recorded_step"]),
        "tiny in fp16": tiny("fp16"), "tiny in bf16": tiny("bf16"),
        "forecast": ("forecast.py", dict(trained, sizes=["gpt2"], steps=5)),
        "rehearsal of a T4": ("forecast.py", dict(trained, t4=True, sizes=SIZES_ON_A_T4, steps=4)),
    }


def command(program, given) -> list:
    "Of a program in this folder with its options, or of Python's `-c` or `-m` with their words."
    if isinstance(given, dict): return [sys.executable, str(HERE/program), *words(given)]
    return [sys.executable, program, *map(str, given)]


def run_question(program, given, seconds) -> str:
    """Run one program, its output shown, for at most `seconds`; returns '' or why there is no result. None of its sides
    outlives it: they would keep the GPU."""
    with subprocess.Popen(command(program, given), start_new_session=True) as process:
        try: code = process.wait(seconds)
        except subprocess.TimeoutExpired: return f"stopped after {seconds:.0f} s"
        finally:
            if process.poll() is None: os.killpg(process.pid, signal.SIGKILL)
    return f"failed with {code}" if code else ""


SHARES = {  # of the time for all
    "equality": 0.2, "training": 0.4, "forecast": 0.2, "rehearsal of a T4": 0.15, "sampling": 0.05}
FIRST_SHARES = {"rates": 0.1, "a recorded step": 0.15, "tiny in fp16": 0.15, "tiny in bf16": 0.15, "forecast": 0.15,
                "rehearsal of a T4": 0.3}


def run_all(asked, minutes, shares=SHARES) -> dict:
    """Run the questions in their order: title -> '' or why there is no result. Each has its share of the time that is
    left, by `shares` among those still to come: unused time goes to the next, and none takes all."""
    until, outcome = time.monotonic() + 60 * minutes, {}
    for n, (title, (program, given)) in enumerate(asked.items()):
        share = shares[title] / sum(shares[other] for other in list(asked)[n:])
        seconds = (until - time.monotonic()) * share
        print(f"\n{title}: {seconds / 60:.1f} minutes", file=sys.stderr, flush=True)
        if seconds > 0: outcome[title] = run_question(program, given, seconds)
        else: outcome[title] = f"skipped: the {minutes:g} minutes were over"
    return outcome


def parse(words=None):
    options = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    options.add_argument("--quick", action="store_true", help="fewer rounds and steps, smaller models: it decides less")
    options.add_argument("--first", action="store_true", help="what no other machine can show, in 15 minutes")
    options.add_argument("--minutes", type=float, help="for all questions together; 25 if none, with --first 15")
    options.add_argument("--only", nargs="+", choices={**SHARES, **FIRST_SHARES}, help="ask these alone")
    text, tokenizer = TEXT if TEXT.exists() else "python-docs", TOKENIZER if TOKENIZER.exists() else "tiny"
    options.add_argument("--text", default=text, help="a UTF-8 text to train on, or python-docs")
    options.add_argument("--tokenizer", default=tokenizer, help="a folder, or tiny")
    options.add_argument("--results", default=RESULTS, type=Path, help="folder for the JSON")
    return options.parse_args(words)


def main():
    options = parse()
    import torch
    if not torch.cuda.is_available():
        raise SystemExit("There is no CUDA GPU here (torch.cuda.is_available() is False), so nothing was measured.")
    shares, minutes = (FIRST_SHARES, 15) if options.first else (SHARES, 25)
    if options.minutes is not None: minutes = options.minutes
    with tempfile.TemporaryDirectory() as scratch:
        asked = first_questions(options, scratch) if options.first else questions(options)
        asked = {title: question for title, question in asked.items() if title in (options.only or shares)}
        missing = {title: why for title, why in run_all(asked, minutes, shares).items() if why}
    show(options.results, torch.cuda.get_device_name())
    print("\n".join(f"{title}: {why}" for title, why in missing.items()) or "Every question was answered.")
    sys.exit(bool(missing))


if __name__ == "__main__": main()
