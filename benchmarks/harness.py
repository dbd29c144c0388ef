"""Run a program and its peer in turn, A B A B, each time in a process of its own, and keep what was measured with the
machine that measured it.

A benchmark is one file with two lives: called by a person it starts its sides and reports; called with `--side LABEL`
it is one of them, measures, and ends with `emit`."""
import contextlib, datetime, json, os, platform, re, resource, shlex, statistics, subprocess, sys, tempfile, time
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

import colab_gpt2
from colab_gpt2.core import Record, atomic, human_bytes, plain
from colab_gpt2.errors import check_number
from colab_gpt2.runtime import PACKAGES, core_count, cpu_name, memory, versions

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent/"results"
SPEED_VARIABLES = ("OMP_", "MKL_", "KMP_", "GLIBC_TUNABLES", "MALLOC_", "LD_PRELOAD", "TORCH", "PYTORCH_", "CUDA_",
                   "NVIDIA_TF32")  # beginnings of names
EVERY = 0.02  # seconds between two samples of a side's memory


# One side, in a process of its own

def emit(**values):
    "Print the last line of a side's output: `values`, and the most memory that its process held in RAM, unless given."
    print(json.dumps(plain({"peak_bytes": peak_bytes(), **values})), flush=True)


def peak_bytes() -> int:
    """The most bytes that this process held in RAM: Linux's VmHWM, which starts at exec, and again where the process
    asks for it, as the library's probe does. getrusage's figure, used elsewhere, may be inherited."""
    status = Path("/proc/self/status")
    if status.exists(): return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def resident_bytes(processes) -> int:
    "Bytes in RAM of some `psutil.Process`es. A page that several share counts once (PSS, where the system knows it)."
    def of(process):
        if len(processes) == 1: return process.memory_info().rss
        known = process.memory_full_info()  # slow: it walks the page tables
        return getattr(known, "pss", known.rss)
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.Error): total += of(process)  # it may have ended since it was listed
    return total


def watch(process) -> int:
    "Wait for the Popen `process` to end; returns the most bytes that it and its descendants held in RAM at once."
    main = psutil.Process(process.pid)
    family, peak, samples = [main], 0, 0
    while process.poll() is None:
        if samples % 10 == 0:  # to list all of a machine's processes takes longer than to ask one
            with contextlib.suppress(psutil.Error): family = [main, *main.children(recursive=True)]
        peak, samples = max(peak, resident_bytes(family)), samples + 1
        time.sleep(EVERY)
    return peak


def side_environment(scratch, env=None) -> dict:
    """This process's environment with `env` over it, no network, and empty caches in `scratch`: no run helps another.
    Only torch.compile's cache stays, since compiling is not measured."""
    own = {k: v for k, v in os.environ.items() if k not in ("HF_HOME", "HF_DATASETS_CACHE")}
    return {**own, "XDG_CACHE_HOME": str(scratch), "HF_HUB_OFFLINE": "1", **(env or {})}


def run_side(
    command,  # words; its last line on stdout must be a JSON object, as `emit` prints it
    *, env=None,  # variables of this side alone
    tree=False,  # also sample the memory of the process and its descendants; it costs the side a little time
) -> dict:
    """Run `command` in a fresh process and an empty folder: its JSON with `seconds`, and `tree_peak_bytes` if asked.
    RuntimeError with the end of its stderr where it fails."""
    with (tempfile.TemporaryDirectory() as scratch, open(Path(scratch)/"out", "w+") as out,
          open(Path(scratch)/"err", "w+") as err):
        started, words, env = time.perf_counter(), [str(w) for w in command], side_environment(scratch, env)
        with subprocess.Popen(words, cwd=scratch, env=env, stdout=out, stderr=err) as process:
            sampled = dict(tree_peak_bytes=watch(process)) if tree else {}
        seconds = time.perf_counter() - started
        out.seek(0)
        err.seek(0)
        lines, errors = out.read().strip().splitlines(), err.read()[-3000:]
    if process.returncode: raise RuntimeError(f"{typed(command)} ended with {process.returncode}:\n{errors}")
    try: return {**json.loads(lines[-1]), "seconds": seconds, **sampled}
    except (IndexError, TypeError, ValueError):
        found = f"did not end with a line of JSON but with {lines[-1:]}."
        raise RuntimeError(f"{typed(command)} {found}\n{errors}") from None


def alternate(
    sides,  # label -> command, as `run_side` takes it
    rounds=3, *, env=None,  # env: label -> variables of that side alone
    tree=False, progress=True,
    failed=None,  # a dict that gets label -> why of the sides that fail; without it the first failure is raised
    each_round=lambda results: None,  # called with the results so far, so that an interruption loses one round only
) -> dict:
    """Run all sides one after the other, `rounds` times over: label -> its results, in order. A machine that slows down
    for a while slows all sides. A side that fails does not run again, and has no results."""
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
            seconds = results[label][-1]["seconds"]
            if progress: print(f"round {n + 1} of {rounds}, {label}: {seconds:.1f} s", file=sys.stderr)
        if results: each_round(results)  # if all failed there is nothing to report, and earlier results stay
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


RULES = {"at least": lambda ratio, target: ratio >= target, "at most": lambda ratio, target: ratio <= target,
         "within": lambda ratio, target: abs(ratio - 1) <= target}


@dataclass(frozen=True)
class Row(Record):
    "One comparison: what we and the peer measured, and the ratio of each pair of runs that followed each other."
    figure: str  # what it is, with its unit
    ours: Spread
    peer: Spread
    peer_label: str
    ratio: Spread  # ours ÷ the peer's, by pairs
    rule: str | None  # "at least", "at most" or "within" (of 1): how `ratio` should stand to `target`
    target: float | None

    @property
    def reached(self): return None if self.rule is None else RULES[self.rule](self.ratio.median, self.target)

    def to_dict(self): return super().to_dict() | dict(reached=self.reached)


def compare(
    figure,
    results,  # as `alternate` gives them
    field,  # a key of a run's JSON, or a function of the run
    peer, ours="ours",  # labels of two sides
    *, target=None,  # (rule, value), as in targets.py
) -> Row:
    "A Row from two sides' runs. Ratios are taken pair by pair: a machine that slows down changes both runs of a pair."
    value = field if callable(field) else lambda run: run[field]
    a, b = ([value(run) for run in results[label]] for label in (ours, peer))
    ratio = summary(x / y for x, y in zip(a, b, strict=True))
    return Row(figure, summary(a), summary(b), peer, ratio, *(target or (None, None)))


# What is shown and kept

def typed(command) -> str:
    "A command as a person would type it in the root of the checkout; of files elsewhere only the names."
    shared = ROOT.parent/"shared"  # perhaps a link
    short = {sys.executable: "python", f"{ROOT}/": "", f"{shared.resolve()}/": "../shared/", f"{ROOT.parent}/": "../"}
    words = []
    for word in map(str, command):
        for long, replacement in short.items(): word = word.replace(long, replacement)
        words.append(Path(word).name if os.path.isabs(word) else word)
    return shlex.join(words)


def machine(device="cpu") -> dict:
    "Where and with what a figure was measured."
    gpu = gpu_name() if device == "cuda" else None
    named = {k: v for k, v in sorted(os.environ.items()) if k.startswith(SPEED_VARIABLES)}
    cores = core_count()
    cpu = f"{cpu_name()}, {cores} core" if cores == 1 else f"{cpu_name()}, {cores} cores"
    return dict(device=gpu or cpu, cpu=cpu_name(), cores=cores, ram=memory()[0], gpu=gpu,
                system=f"{platform.system()} {platform.release()}", revision=revision(), environment=named,
                versions=versions((*PACKAGES, "tokenizers", "numpy")))


def gpu_name():
    import torch
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def revision() -> str | None:
    "The git commit of the code that is measured, with `+` where files differ from it; None if it is not this checkout."
    if Path(colab_gpt2.__file__).parents[1] != ROOT: return None
    def git(*words): return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    try: head = git("rev-parse", "--short=12", "HEAD")
    except FileNotFoundError: return None
    if head.returncode: return None
    changed = git("status", "--porcelain", "--", "colab_gpt2", "benchmarks", ":!benchmarks/results").stdout
    return head.stdout.strip() + ("+" if changed else "")


def slug(words) -> str: return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def number(value) -> str: return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def with_unit(figure, value) -> str: return human_bytes(value) if "memory" in figure else number(value)


def ratio_text(ratio) -> str: return f"{ratio:.4g}" if ratio == 1 or abs(ratio - 1) >= 1e-3 else f"1{ratio - 1:+.1e}"


def target_text(row) -> str:
    if row.rule is None: return ""
    return f"{row.rule} {row.target:g} of 1" if row.rule == "within" else f"{row.rule} {row.target:g}"


def spread_text(ratio) -> str:
    return "one run" if ratio.runs == 1 else f"{ratio_text(ratio.least)} to {ratio_text(ratio.most)}"


REACHED = {True: "yes", False: "NO", None: ""}
COLUMNS = {  # header -> a function of the Row
    "figure": lambda row: row.figure,
    "ours": lambda row: with_unit(row.figure, row.ours.median),
    "peer": lambda row: with_unit(row.figure, row.peer.median),
    "peer is": lambda row: row.peer_label,
    "ratio": lambda row: ratio_text(row.ratio.median),
    "spread": lambda row: spread_text(row.ratio),
    "target": target_text,
    "reached": lambda row: REACHED[row.reached]}


def printed_row(row, columns=COLUMNS) -> list:
    "A Row as people read it: a text for each of the `columns`."
    return [COLUMNS[name](row) for name in columns]


def table_of(title, rows) -> Table:
    table = Table(*COLUMNS, title=title)
    for row in rows: table.add_row(*printed_row(row))
    return table


def console() -> Console:
    "As wide as the screen; wide enough for the table where the output goes to a file."
    return Console() if sys.stdout.isatty() else Console(width=180)


def report(
    question,  # the benchmark's name
    results,  # label -> runs
    rows,
    *, commands=None,  # label -> command of each side
    device="cpu",
    folder=RESULTS,  # for the JSON
    **more,  # anything else to keep in it
) -> Path:
    "Print the table and write QUESTION-DEVICE.json with rows, raw runs, machine and commands; returns its path."
    here, now = machine(device), datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    commands = {label: typed(command) for label, command in (commands or {}).items()}
    kept = dict(question=question, date=now, command=typed([sys.executable, *sys.argv]), machine=here,
                commands=commands, rows=rows, runs=results, **more)
    path = Path(folder)/f"{slug(question)}-{slug(here['device'])}.json"
    with atomic(path) as file: file.write_text(json.dumps(plain(kept), indent=1) + "\n")
    console().print(table_of(f"{question}, {here['device']}", rows))
    print(f"Written: {path}")
    return path
