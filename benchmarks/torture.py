"""Is the model of a run that is killed, and started again, the model of a run that was left alone?

A toy run of `colab-gpt2 finetune` is ended by SIGKILL: at a random moment, at a random file event in its output folder
or its mirror, or a few ms after one, within the writing. Then the same command runs again, no flag changed, until it
has finished; on a new machine the output folder and the caches are gone first, and only the mirror is left. The weights
and the losses must be those of an uninterrupted run, bit for bit. The stock Trainer and its just-in-time checkpoints
stand in the same harness.

Processes are forked from one that has imported everything, so that a kill falls into the run and not into imports."""
import argparse, hashlib, json, os, random, shutil, signal, sys, tempfile, threading, time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.table import Table

from colab_gpt2.core import Record
from harness import RESULTS, ROOT, compare, console, report
from targets import target

sys.path.insert(0, str(ROOT/"tests"))
from helpers.forks import FORKS, command, launched

FORKS.set_forkserver_preload(["torch", "colab_gpt2.cli", "colab_gpt2.training"])
MINUTES = 0.005  # between two checkpoints: 0.3 s
STOCK_STEPS = 6  # steps between two checkpoints of the stock Trainer, about as many seconds
AGAIN = 6  # starts after which a trial is given up
OURS, STOCK, JIT = "ours", "stock Trainer", "stock Trainer, enable_jit_checkpoint"
MOMENT, EVENT, MACHINE = "at a random moment", "at a file event", "and on a new machine"
ON_NEW = ", a new machine"


# The run

SHAPE = dict(n_layer=2, n_embd=64, n_head=2, n_positions=64, vocab_size=8192)  # with GPT-2's dropout

def page(articles, word) -> str:
    said = " = Article {i} = \n \n The {word} of day {i} came in at {hour} o'clock and went out again by {j} . \n"
    return "".join(said.format(i=i, j=i * 7919 % 997, word=word, hour=i % 12) for i in range(articles))


def make_job(folder, articles):
    "A model with random weights and two texts in `folder`. Two epochs of eight articles are one step."
    from transformers import GPT2Config
    from colab_gpt2.model.loading import load_tokenizer, new_model
    folder = Path(folder)
    tokenizer = load_tokenizer("tiny")
    new_model(GPT2Config(**SHAPE, bos_token_id=0, eos_token_id=0), seed=0).save_pretrained(folder/"toy")
    tokenizer.save_pretrained(folder/"toy")
    for name, size, word in (("train", articles, "tide"), ("eval", 40, "moon")):
        (folder/f"{name}.txt").write_text(page(size, word))
    return folder


def typed(job, *more) -> list:
    "The words of the command; all its paths but the job's are in the folder of the trial."
    read = "--num-train-epochs", "2", "--effective-batch-size", "8", "--block-size", "64"  # of itself it would be more
    return ["finetune", "--model", f"{job}/toy", "--train-file", f"{job}/train.txt", "--eval-file", f"{job}/eval.txt",
            "--max-new-tokens", "8", "--output-dir", "out", *read, *more]


def ours(job, *more):
    "What the child process of a trial does."
    command(*typed(job, *more))


def stock(job, jit=False, save_steps=STOCK_STEPS):
    "The same run by transformers' Trainer, resumed where it finds a checkpoint, as its documentation says."
    import transformers
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator
    from colab_gpt2.model.loading import load_tokenizer
    from colab_gpt2.text.token_store import tokenize_file
    transformers.logging.set_verbosity_error()
    transformers.set_seed(42)
    blocks = tokenize_file(Path(job)/"train.txt", load_tokenizer("tiny"), 64, split="train", progress=False,
                           cache_dir="cache")
    arguments = TrainingArguments(
        output_dir="out", num_train_epochs=2, per_device_train_batch_size=8, save_steps=save_steps, save_total_limit=2,
        logging_steps=10, seed=42, use_cpu=True, bf16=True, report_to="none", disable_tqdm=True,
        enable_jit_checkpoint=jit)
    trainer = Trainer(model=AutoModelForCausalLM.from_pretrained(f"{job}/toy"), args=arguments, train_dataset=blocks,
                      data_collator=default_data_collator)
    for callback in trainer.callback_handler.callbacks:  # it waits 3 s after SIGTERM, longer than the toy runs
        if hasattr(callback, "jit_manager"): callback.jit_manager.kill_wait = 0
    trainer.train(resume_from_checkpoint=True if list(Path("out").glob("checkpoint-*")) else None)
    if trainer.state.global_step < trainer.state.max_steps: return  # just in time: the rest is for another start
    trainer.save_model("out")
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    Path("out/finetune.json").write_text(json.dumps(dict(losses=losses)))


# Crash points

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link"}

def changes(event, args) -> str | None:
    "The absolute path that an audit event is about to write, make, move or delete."
    if event not in EVENTS or event == "open" and not (isinstance(args[2], int) and args[2] & WRITING): return None
    path, place = args[0], args[-1]  # the last of an os function's is the folder that its path is in
    if isinstance(path, int): return None
    path = os.fsdecode(path)
    inside = event in ("os.remove", "os.rmdir", "os.mkdir") and isinstance(place, int) and place >= 0
    return os.path.join(os.readlink(f"/proc/self/fd/{place}") if inside else os.getcwd(), path)


def on_changes(act):
    "Call `act(path)` before each change to a file or a folder, and before each sync. It lasts as long as the process."
    def hook(event, args):
        if path := changes(event, args): act(path)
    sync = os.fsync
    def synced(handle):
        act(os.readlink(f"/proc/self/fd/{handle}") if isinstance(handle, int) else "")
        return sync(handle)
    os.fsync = synced
    sys.addaudithook(hook)


@dataclass(frozen=True)
class Crash(Record):
    "Where a process is to be killed."
    event: int | None = None  # before this change below `folder`, counted from 1
    folder: str = "out"
    later: float = 0  # so many seconds after that
    moment: float | None = None  # or so many seconds after the start
    warning: float | None = None  # SIGTERM at `moment`, and SIGKILL so many seconds after it


def kill_self(): os.kill(os.getpid(), signal.SIGKILL)


def trial_process(run, crash, log):
    "The child: note in `log` when each step and each copy ended, and how many changes there were; die at `crash`."
    import torch
    from transformers.trainer_callback import CallbackHandler
    from colab_gpt2.storage.kept import Kept
    torch.set_num_threads(1)
    steps, counts, inner, put = open(log, "a", buffering=1), {}, CallbackHandler.on_step_end, Kept.put
    def note(*words): steps.write(f"{' '.join(map(str, words))}\n")  # in one piece, from several threads
    def noted(self, path, report):
        note("copy", time.time())
        entry = put(self, path, report)
        note("copied", time.time())
        return entry
    Kept.put = noted
    def on_step_end(self, args, state, control):
        control = inner(self, args, state, control)
        note("step", state.global_step, time.time())
        return control
    CallbackHandler.on_step_end = on_step_end
    lock, here = threading.Lock(), os.getcwd()
    def act(path):
        top = os.path.relpath(path, here).split(os.sep)[0]
        if top not in ("out", "mirror"): return
        with lock: counts[top] = n = counts.get(top, 0) + 1
        if n != crash.event or top != crash.folder: return
        note("event", path)
        if not crash.later: kill_self()
        threading.Timer(crash.later, kill_self).start()
    on_changes(act)
    try: run[0](*run[1:])
    finally: note("counts", json.dumps(counts))


# A trial

@dataclass(frozen=True)
class Trial(Record):
    "What became of one run that was killed and started again."
    side: str
    kind: str
    kills: int
    starts: int
    outcome: str  # equal, refused or unequal
    why: str = ""  # of a refusal, the last line; of an inequality, what differs
    lost: list = field(default_factory=list)  # of each kill: `work_lost`, and the `longest_copy` before it
    crashes: list = field(default_factory=list)


def digest(folder) -> str:
    return hashlib.sha256((Path(folder)/"out"/"model.safetensors").read_bytes()).hexdigest()


def losses(folder) -> list | None:
    "(step, loss) as the run logged them; None of a run that has not finished."
    told = Path(folder)/"out"/"finetune.json"
    kept = json.loads(told.read_text()).get("losses") if told.exists() else None
    return kept and [(entry["step"], entry["loss"]) for entry in kept]


def start(folder, run, crash, log):
    "One start of the command in `folder`: CompletedProcess; its returncode is -9 where it was killed."
    env = {**os.environ, "XDG_CACHE_HOME": f"{folder}/cache", "HF_HOME": f"{folder}/cache/hf", "HF_HUB_OFFLINE": "1",
           "COLUMNS": "160"}
    with launched(trial_process, run, crash, str(log), cwd=folder, env=env) as process:
        if crash.moment is not None:
            process.join(crash.moment)
            if crash.warning is not None and process.is_alive():
                os.kill(process.pid, signal.SIGTERM)
                process.join(crash.warning)
            process.kill()
        process.join(300)
    return process.done


def read_log(log) -> tuple:
    "(steps with their times, counts of changes or None) of one start."
    words = [line.split(maxsplit=1) for line in Path(log).read_text().splitlines()] if Path(log).exists() else []
    steps = [(int(n), float(when)) for n, when in (rest.split() for kind, rest in words if kind == "step")]
    return steps, next((json.loads(rest) for kind, rest in words if kind == "counts"), None)


def longest_copy(log) -> float:
    "The seconds of the longest copy to the mirror in one start, or of what there was of it when the start was killed."
    begun, longest = None, 0.
    for line in Path(log).read_text().splitlines() if Path(log).exists() else []:
        kind, *rest = line.split()
        if kind not in ("copy", "copied", "step"): continue
        if begun is not None: longest = max(longest, float(rest[-1]) - begun)
        if kind != "step": begun = float(rest[-1]) if kind == "copy" else None
    return longest


def work_lost(before, after) -> dict:
    """What one start did and the next did again: steps, and seconds from the end of the last step that was kept; with
    the longest time from one step to the next, in which a checkpoint may have been written."""
    if not before: return dict(steps=0, seconds=0., longest=0.)
    last = before[-1][0]
    kept = min(after[0][0] - 1, last) if after else last  # no step was left: all were kept
    times = dict(before)
    began = times.get(kept, before[0][1])  # before its first step a start has done nothing
    gaps = [b - a for (_, a), (_, b) in zip(before, before[1:])]
    return dict(steps=last - max(kept, before[0][0] - 1), seconds=before[-1][1] - began, longest=max(gaps, default=0.))


def trial(side, kind, run, crashes, reference) -> Trial:
    "Start `run` in an empty folder with each of `crashes`, and then until it has finished."
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        kills, lost, earlier, copied = 0, [], [], 0.
        for n in range(AGAIN + len(crashes)):
            crash, log = crashes[n] if n < len(crashes) else Crash(), Path(folder)/f"log-{n}"
            done = start(folder, run, crash, log)
            steps, finished = read_log(log)[0], bool(losses(folder))
            if earlier: lost.append(work_lost(earlier, steps) | dict(copy=copied))
            ended = done.returncode in (-signal.SIGKILL, -signal.SIGTERM) or crash.warning is not None and not finished
            kills, earlier, copied = kills + ended, steps if ended else [], longest_copy(log)
            if not ended: break
            if kind == MACHINE:
                for gone in ("out", "cache"): shutil.rmtree(Path(folder)/gone, ignore_errors=True)
        if finished and not kills: return trial(side, kind, run, [sooner(crash) for crash in crashes], reference)
        common = dict(side=side, kind=kind, kills=kills, starts=n + 1, lost=lost, crashes=crashes)
        if done.returncode or not finished:
            said = done.stderr.strip().splitlines() or ["nothing was said"]
            return Trial(**common, outcome="refused", why=said[-1])
        found = dict(weights=digest(folder), losses=losses(folder))
        differs = [name for name, value in found.items() if value != reference[name]]
        other = "weights" in differs or differs and side == OURS  # the stock Trainer may log other steps
        return Trial(**common, outcome="unequal" if other else "equal", why=", ".join(differs))


def sooner(crash) -> Crash:
    "For a run that had ended before it was killed."
    event = crash.event and max(1, crash.event * 4 // 5)
    return replace(crash, moment=crash.moment and crash.moment * 0.8, event=event)


def measure_reference(run) -> dict:
    "An uninterrupted run: its seconds, changes, weights and losses."
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        began, log = time.perf_counter(), Path(folder)/"log"
        done = start(folder, run, Crash(), log)
        if done.returncode: raise RuntimeError(f"The uninterrupted run failed: {done.stderr}")
        steps, counts = read_log(log)
        return dict(seconds=time.perf_counter() - began, counts=counts, steps=steps[-1][0], weights=digest(folder),
                    training=steps[-1][1] - steps[0][1], losses=losses(folder))


# Which kills

def draw(random, kind, reference, mirrored=True) -> Crash:
    "A crash point: of moments all alike, of events in the output folder or the mirror one as likely as another."
    by_event = kind == EVENT or kind == MACHINE and random.random() < 0.5
    if not by_event: return Crash(moment=random.uniform(0, reference["seconds"]))
    counts = {name: n for name, n in reference["counts"].items() if n and (mirrored or name == "out")}
    folder = random.choice(sorted(counts))
    later = random.choice([0, random.uniform(0, 0.03)])
    return Crash(event=random.randint(1, counts[folder]), folder=folder, later=later)


def plan_of(seed, side, kinds, reference) -> list:
    """(kind, crashes) of each trial: `kinds` has how many of each. Of ours a quarter is killed twice or three times in
    a row; the just-in-time checkpoints get SIGTERM first, from no time to a second before."""
    drawn, planned = random.Random(f"{seed} {side}"), []
    for kind, n in kinds.items():
        for i in range(n):
            times = drawn.choice([2, 3]) if side == OURS and i % 4 == 0 else 1
            crashes = [draw(drawn, kind, reference) for _ in range(times)]
            if side == JIT: crashes = [replace(crash, warning=drawn.choice([0, 0.1, 1, 1])) for crash in crashes]
            planned.append((kind, crashes))
    return planned


FLAGS = ["--save-minutes", str(MINUTES), "--mirror", "mirror"]

def sides(job) -> dict:
    "side -> what its process calls."
    return {OURS: (ours, str(job), *FLAGS), STOCK: (stock, str(job)), JIT: (stock, str(job), True)}


def torture(job, options) -> tuple:
    "(trials of all sides, the uninterrupted runs that they were compared with)."
    run, references, planned = sides(job), {}, []
    fifth = options.trials // 5
    kinds = {OURS: {MOMENT: 2 * fifth, EVENT: options.trials - 3 * fifth, MACHINE: fifth},
             STOCK: {MOMENT: options.peers // 2, EVENT: options.peers - options.peers // 2},
             JIT: {MOMENT: options.peers}}
    for side in run:
        measure_reference(run[side])  # the first warms up
        references[side] = measure_reference(run[side])
        for kind, crashes in plan_of(options.seed, side, kinds[side], references[side]):
            planned.append((side, kind, run[side], crashes, references[side]))
    with ThreadPoolExecutor(options.jobs) as pool:
        made = []
        for n, t in enumerate(pool.map(lambda each: trial(*each), planned), 1):
            made.append(t)
            print(f"{n} of {len(planned)}: {t.side}, {t.kind}: {t.outcome} {t.why}", file=sys.stderr)
    return made, references


# What is shown

def rows_of(trials, interval=60 * MINUTES) -> list:
    """How many trials of each side and kind ended with the same model; and the most work that a kill of ours cost,
    against the save interval with the step that outlasts it and the saving itself; on a new machine with a copy too."""
    rows = []
    for side, kind in dict.fromkeys((t.side, t.kind) for t in trials):
        mine = [t for t in trials if (t.side, t.kind) == (side, kind)]
        counted = {side: [dict(n=sum(t.outcome == "equal" for t in mine))], "trials": [dict(n=len(mine))]}
        goal = target("equal after kill -9", "trials") if side == OURS else None
        rows.append(compare(f"equal after kill -9 {kind}, {side}", counted, "n", "trials", side, target=goal))
    for where, peer in (("", "save interval and a step"), (ON_NEW, "save interval, a step and a copy")):
        lost = [one for t in trials if t.side == OURS and (t.kind == MACHINE) == bool(where) for one in t.lost]
        if not lost: continue
        def may_cost(one): return interval + one["longest"] + bool(where) * one["copy"]
        most = max(lost, key=lambda one: one["seconds"] / may_cost(one))
        figures = {OURS: [dict(s=most["seconds"])], peer: [dict(s=may_cost(most))]}
        goal = target("work lost at a kill", peer)
        rows.append(compare(f"work lost at a kill{where}, s, the most", figures, "s", peer, target=goal))
    return rows


def count(trials, outcome): return str(sum(t.outcome == outcome for t in trials))


def lost_text(trials, name) -> str:
    "The median and the most that a kill cost."
    lost = sorted(one[name] for t in trials for one in t.lost)
    return f"{lost[len(lost) // 2]:.3g}, at most {lost[-1]:.3g}" if lost else ""


TALLY = {  # header -> a function of the trials of one side and kind
    "trials": lambda trials: str(len(trials)),
    "kills": lambda trials: str(sum(t.kills for t in trials)),
    "equal": lambda trials: count(trials, "equal"),
    "refused": lambda trials: count(trials, "refused"),
    "unequal": lambda trials: count(trials, "unequal"),
    "steps lost": lambda trials: lost_text(trials, "steps"),
    "seconds lost": lambda trials: lost_text(trials, "seconds")}


def tally(trials, title) -> Table:
    table = Table("side", "killed", *TALLY, title=title)
    for side, kind in dict.fromkeys((t.side, t.kind) for t in trials):
        mine = [t for t in trials if (t.side, t.kind) == (side, kind)]
        table.add_row(side, kind, *(column(mine) for column in TALLY.values()))
    return table


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = options.add_argument
    add("--trials", type=int, default=100, help="of ours; two fifths each at moments and at events, the rest elsewhere")
    add("--peers", type=int, default=12, help="of each peer")
    add("--jobs", type=int, default=2, help="trials at once")
    add("--articles", type=int, default=560, help="length of the text: 560 make 70 steps")
    add("--seed", type=int, default=0, help="of the crash points")
    add("--results", default=RESULTS, type=Path, help="folder for the JSON")
    options = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="torture-job-") as job:
        make_job(job, options.articles)
        trials, references = torture(job, options)
    for t in trials:
        if t.outcome != "equal": print(f"{t.side}, {t.kind}: {t.outcome}: {t.why}\n  {t.crashes}", file=sys.stderr)
    console().print(tally(trials, f"kill -9, {references[OURS]['steps']} steps, a checkpoint each {60 * MINUTES:g} s"))
    runs = {side: [t for t in trials if t.side == side] for side in references}
    report("torture", runs, rows_of(trials), folder=options.results, references=references, seed=options.seed)
    sys.exit(any(t.outcome != "equal" for t in runs[OURS]))


if __name__ == "__main__": main()
