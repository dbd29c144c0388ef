"""Run a program and its peer in turn, A B A B, each time in a process of its own, and keep what was measured with the machine that measured it.

A benchmark is one file with two lives: called by a person it starts its sides and reports, called with `--side LABEL` it is one of them,
measures, and ends by `tell`."""
import contextlib, datetime, json, os, platform, re, resource, shlex, statistics, subprocess, sys, tempfile, time
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

import colab_gpt2
from colab_gpt2.core import Record, check_number, human_bytes, plain, replacing
from colab_gpt2.runtime import PACKAGES, core_count, cpu_name, memory, versions

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent/"results"
SPEED_VARIABLES = ("OMP_", "MKL_", "KMP_", "GLIBC_TUNABLES", "MALLOC_", "LD_PRELOAD", "TORCH", "PYTORCH_", "CUDA_", "NVIDIA_TF32")  # beginnings of names
EVERY = 0.02  # seconds between two looks at a side's memory


# One side, in a process of its own

def tell(**values):
    "The last line of a side's output: `values`, and the most memory that its process ever held in RAM, unless it kept an eye on that itself."
    print(json.dumps(plain({"peak_bytes": peak_bytes(), **values})), flush=True)


def peak_bytes() -> int:
    """The most bytes that this process held in RAM: Linux's VmHWM, which begins at exec, and anew where the process asks for it, as the library's probe
    does before the steps that it measures. getrusage's figure, used elsewhere, may be inherited."""
    status = Path("/proc/self/status")
    if status.exists(): return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_bytes(processes) -> int:
    "Bytes in RAM of some `psutil.Process`es. Of several, a page that they share counts once (PSS, where the system knows it)."
    def of(process):
        if len(processes) == 1: return process.memory_info().rss
        known = process.memory_full_info()  # slow: it walks the page tables
        return getattr(known, "pss", known.rss)
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.Error): total += of(process)  # it may have ended since it was listed
    return total


def watch(process) -> int:
    "Wait for the Popen `process` to end; -> the most bytes that it and its descendants were seen to hold in RAM at once."
    family, peak, looks = [main := psutil.Process(process.pid)], 0, 0
    while process.poll() is None:
        if looks % 10 == 0:  # to list all of a machine's processes takes longer than to ask one
            with contextlib.suppress(psutil.Error): family = [main, *main.children(recursive=True)]
        peak, looks = max(peak, resident_bytes(family)), looks + 1
        time.sleep(EVERY)
    return peak


def side_environment(scratch, env=None) -> dict:
    """This process's environment with `env` over it, no network, and empty caches in `scratch`: nothing that one run made serves the next. Only what
    torch.compile keeps stays, since compiling is not measured."""
    own = {k: v for k, v in os.environ.items() if k not in ("HF_HOME", "HF_DATASETS_CACHE")}
    return {**own, "XDG_CACHE_HOME": str(scratch), "HF_HUB_OFFLINE": "1", **(env or {})}


def run_side(
    command,  # words; its last line on stdout must be a JSON object, as `tell` prints it
    *, env=None,  # variables of this side alone
    tree=False,  # also look at the memory of the process and its descendants every 20 ms; it costs the side a little time
) -> dict:
    """Run `command` in a fresh process and an empty folder: its JSON with `seconds`, and `tree_peak_bytes` if asked. RuntimeError with the end of its
    stderr where it fails."""
    with tempfile.TemporaryDirectory() as scratch, open(Path(scratch)/"out", "w+") as out, open(Path(scratch)/"err", "w+") as err:
        started = time.perf_counter()
        with subprocess.Popen([str(w) for w in command], cwd=scratch, env=side_environment(scratch, env), stdout=out, stderr=err) as process:
            seen = dict(tree_peak_bytes=watch(process)) if tree else {}
        seconds = time.perf_counter() - started
        out.seek(0), err.seek(0)
        said, complained = out.read().strip().splitlines(), err.read()[-3000:]
    if process.returncode: raise RuntimeError(f"{shown(command)} ended with {process.returncode}:\n{complained}")
    try: return {**json.loads(said[-1]), "seconds": seconds, **seen}
    except (IndexError, TypeError, ValueError): raise RuntimeError(f"{shown(command)} did not end with a line of JSON but with {said[-1:]}.\n{complained}") from None


def alternate(
    sides,  # label -> command, as `run_side` takes it
    rounds=3, *, env=None,  # env: label -> variables of that side alone
    tree=False, progress=True,
    failed=None,  # a dict that gets label -> why of the sides that fail; without it the first failure is raised
    each_round=lambda results: None,  # called with what there is after every round, so that an end in mid-way loses one round only
) -> dict:
    """Run all sides one after the other, `rounds` times over: label -> its results, in order. What the machine does meanwhile meets every side alike.
    A side that fails does not run again, and has no results."""
    check_number("rounds", rounds, minimum=1, integer=True)
    results = {label: [] for label in sides}
    for n in range(rounds):
        for label in list(results):
            try: results[label].append(run_side(sides[label], env=(env or {}).get(label), tree=tree))
            except RuntimeError as e:
                if failed is None: raise
                failed[label] = str(e)
                del results[label]
                print(f"{label} failed and is left out: {e}", file=sys.stderr)
                continue
            if progress: print(f"round {n + 1} of {rounds}, {label}: {results[label][-1]['seconds']:.1f} s", file=sys.stderr)
        if results: each_round(results)  # where all failed there is nothing to tell, and what was kept before stands
    return results


# Figures

@dataclass(frozen=True)
class Spread(Record):
    "The median of some runs, the least, the most, and how many there were."
    median: float
    least: float
    most: float
    runs: int


def summary(values) -> Spread:
    values = list(values)
    return Spread(statistics.median(values), min(values), max(values), len(values))


RULES = {"at least": lambda ratio, bar: ratio >= bar, "at most": lambda ratio, bar: ratio <= bar, "within": lambda ratio, bar: abs(ratio - 1) <= bar}


@dataclass(frozen=True)
class Row(Record):
    "One comparison: what we and the peer measured, and the ratio of each pair of runs that followed each other."
    figure: str  # what it is, with its unit
    ours: Spread
    peer: Spread
    peer_label: str
    ratio: Spread  # ours over the peer's, by pairs
    rule: str | None  # "at least", "at most" or "within" (of 1): how `ratio` must stand to `bar`
    bar: float | None

    @property
    def reached(self): return None if self.rule is None else RULES[self.rule](self.ratio.median, self.bar)

    def to_dict(self): return super().to_dict() | dict(reached=self.reached)


def compare(
    figure, results, field,  # results: as `alternate` gives them; field: a key of a run's JSON, or a function of the run
    peer, ours="ours", *, rule=None, bar=None,
) -> Row:
    "A Row from two sides' runs. The ratio is taken pair by pair, so that a machine that slows down from one round to the next does not blur it."
    value = field if callable(field) else lambda run: run[field]
    a, b = ([value(run) for run in results[label]] for label in (ours, peer))
    return Row(figure, summary(a), summary(b), peer, summary(x / y for x, y in zip(a, b, strict=True)), rule, bar)


# What is shown and kept

def shown(command) -> str:
    "A command as a person would type it in the root of the checkout."
    return shlex.join(str(w).replace(sys.executable, "python").replace(f"{ROOT}/", "").replace(f"{ROOT.parent}/", "../") for w in command)


def machine(device="cpu") -> dict:
    "Where and with what a figure was measured."
    gpu = gpu_name() if device == "cuda" else None
    named = {k: v for k, v in sorted(os.environ.items()) if k.startswith(SPEED_VARIABLES)}
    cores = core_count()
    return dict(device=gpu or f"{cpu_name()}, {cores} core{'s'[:cores != 1]}", cpu=cpu_name(), cores=cores, ram=memory()[0], gpu=gpu,
                system=f"{platform.system()} {platform.release()}", versions=versions((*PACKAGES, "tokenizers", "numpy")), revision=revision(), environment=named)


def gpu_name():
    import torch
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def revision() -> str | None:
    "The git commit of the code that is measured, with `+` where files differ from it; None where that code is not this checkout's."
    if Path(colab_gpt2.__file__).parents[1] != ROOT: return None
    def git(*words): return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    try: head = git("rev-parse", "--short=12", "HEAD")
    except FileNotFoundError: return None
    if head.returncode: return None
    return head.stdout.strip() + ("+" if git("status", "--porcelain", "--", "colab_gpt2", "benchmarks", ":!benchmarks/results").stdout else "")


def slug(words) -> str: return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def number(value) -> str: return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def written(figure, value) -> str: return human_bytes(value) if "memory" in figure else number(value)


def ratio_text(ratio) -> str: return f"{ratio:.4g}" if ratio == 1 or abs(ratio - 1) >= 1e-3 else f"1{ratio - 1:+.1e}"


COLUMNS = ("figure", "ours", "peer", "peer is", "ratio", "spread", "bar", "reached")


def printed_row(row) -> tuple:
    "A Row as people read it, a text for each of COLUMNS: medians, the ratio with its spread, and whether the bar was reached."
    ratio, bar = row.ratio, "" if row.rule is None else f"{row.rule} {row.bar:g}{' of 1' if row.rule == 'within' else ''}"
    spread = "one run" if ratio.runs == 1 else f"{ratio_text(ratio.least)} to {ratio_text(ratio.most)}"
    return (row.figure, written(row.figure, row.ours.median), written(row.figure, row.peer.median), row.peer_label, ratio_text(ratio.median), spread, bar,
            {True: "yes", False: "NO", None: ""}[row.reached])


def table_of(title, rows) -> Table:
    table = Table(*COLUMNS, title=title)
    for row in rows: table.add_row(*printed_row(row))
    return table


def console() -> Console:
    "As wide as the screen; wide enough for the table where the output goes to a file."
    return Console() if sys.stdout.isatty() else Console(width=180)


def report(
    question, results, rows,  # question: the benchmark's name; results: label -> runs; rows: Rows
    *, commands=None,  # label -> command of each side
    device="cpu", folder=RESULTS, **more,  # folder: where the JSON goes; more: anything else to keep in it
) -> Path:
    "Print the table and write QUESTION-DEVICE.json with rows, raw runs, machine, versions and commands; -> its path."
    here = machine(device)
    kept = dict(question=question, date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), command=shown([sys.executable, *sys.argv]),
                machine=here, commands={label: shown(command) for label, command in (commands or {}).items()}, rows=rows, runs=results, **more)
    path = Path(folder)/f"{slug(question)}-{slug(here['device'])}.json"
    with replacing(path) as file: file.write_text(json.dumps(plain(kept), indent=1) + "\n")
    console().print(table_of(f"{question}, {here['device']}", rows))
    print(f"Written: {path}")
    return path
