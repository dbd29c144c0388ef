"""Faults of disks, Drives and machines, one table of them: where each strikes, what the user reads, what is then on the
disk, and what the same command does when it is over. And twelve faults of a Drive that no training dies of, and whose
copies are made when the same command runs again."""
import builtins, errno, hashlib, importlib, io, json, os, re, signal, sys, time
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.colab_stub import SOURCE
from helpers.disks import resize, small_disk
from helpers.forks import forked
from transformers import GPT2Config

from colab_gpt2.model.loading import load_tokenizer, new_model

STEPS, FIRST, SECOND, LAST = 6, "checkpoint-2", "checkpoint-4", "checkpoint-6"
RAW = re.compile(r"Traceback|\[Errno|os error|enforce fail|inline_container|Error while|SafetensorError|object at 0x"
                 r"|Expecting|codec|invalid JSON|NoneType")  # a library's own words


# What strikes: generators in the process of a row. They begin it, yield, end it, and may yield again to clean up

def nothing(): yield


def at_step(n, act):
    "Call `act()` at the end of step `n`, once: its checkpoint is not written yet."
    from transformers.trainer_callback import CallbackHandler
    inner, acts = CallbackHandler.on_step_end, [act]
    def on_step_end(self, args, state, control):
        if state.global_step == n and acts: acts.pop()()
        return inner(self, args, state, control)
    CallbackHandler.on_step_end = on_step_end


def error_of(layer, number):
    "How one of the layers that write files tells of a system's error."
    from safetensors import SafetensorError
    why = os.strerror(number)
    if layer == "weights": return SafetensorError(f"Error while serializing: I/O error: {why} (os error {number})")
    if layer != "optimizer": return OSError(number, why)
    opened = number in (errno.EACCES, errno.EROFS)  # torch's C++ says why it cannot open a file, and no more
    said = f"open file failed with strerror: {why}" if opened else "unexpected pos 5 vs 3"
    return RuntimeError(f"[enforce fail at inline_container.cc:672] . {said}")


LAYERS = {"weights": ("transformers.modeling_utils", "safe_save_file"), "optimizer": ("torch", "save")}

def after_first(): return Path("out", FIRST).exists()

def after_last(): return Path("out", LAST).exists()

def always(): return True


def failing(layer, number, times=99, when=after_first):
    """A layer fails so many times with this errno: that of the weights, of the optimizer, or Python's own `open` where
    it writes to a path that has the regular expression `layer`."""
    module, name = LAYERS.get(layer, ("builtins", "open"))
    module, left = importlib.import_module(module), [times]
    real = getattr(module, name)
    def call(*args, **options):
        mode = str([*args[1:2], options.get("mode"), "r"][0] or "r")
        mine = layer in LAYERS or re.search(layer, str(args[0])) and "r" not in mode
        if not (mine and left[0] and when()): return real(*args, **options)
        left[0] -= 1
        raise error_of(layer, number)
    setattr(module, name, call)
    if module is builtins: io.open = call
    yield
    setattr(module, name, real)
    if module is builtins: io.open = real


def own_disk(size, where="out"):
    "The folder is a disk of its own, too small for the run."
    os.makedirs(where)
    small_disk(where, size)
    yield
    resize(where, 64 << 20)


def filled(step, left):
    "The output folder is a disk of its own, on which other files leave so many bytes from this step on."
    os.makedirs("out")
    small_disk("out", 64 << 20)
    def fill():
        disk = os.statvfs("out")
        Path("out/ballast").write_bytes(bytes(disk.f_bavail * disk.f_frsize - left))
    at_step(step, fill)
    yield
    os.unlink("out/ballast")


def on_drive(step=3, **faults):
    "A Drive is mounted that has these faults from this step on."
    sys.path.insert(0, str(SOURCE))
    from google.colab import _stub, drive
    from colab_gpt2 import runtime
    runtime.MOUNT = Path("content/drive").absolute()
    os.makedirs("content")
    with _stub.pretend(drive="backing"):
        drive.mount("content/drive")
        at_step(step, lambda: _stub.faults.set(**faults))
        yield
        _stub.faults.set(**vars(_stub.Faults()))
        yield


def trained(strikes):
    "The run is finished before something strikes."
    assert run(words_of("out"))[0] == 0
    yield from strikes


def second_run():
    "Another process is in the middle of the same run; when it is over, that one has finished."
    if not (pid := os.fork()):
        at_step(3, lambda: os.kill(os.getpid(), signal.SIGSTOP))
        code = run(words_of("out"))[0]
        os._exit(code)
    os.waitpid(pid, os.WUNTRACED)
    yield
    os.kill(pid, signal.SIGCONT)
    assert os.waitpid(pid, 0)[1] == 0


# Between two commands: the first was killed at the end of step 5

def damaged(name, how):
    yield
    how(Path("out", SECOND, name))

def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)

def cut(path): os.truncate(path, path.stat().st_size // 2)

def zero(path): path.write_bytes(bytes(path.stat().st_size))


def clock_back(days=400):
    "When the command runs again it is more than a year earlier, and all files are of the future."
    yield
    now = time.time
    time.time = lambda: now() - 86400 * days


# The table

@dataclass
class Fault:
    "One row."
    name: str
    where: str
    strikes: object  # what makes the generator
    reads: tuple  # words of what the user reads: under the fault, or after a kill when the command runs again
    intact: tuple  # checkpoints that are complete and undamaged then
    again: str | None  # from which the same command resumes; None: it begins again; "finished": it was finished
    out: str = "out"
    command: tuple | None = None  # another than the run

    @property
    def killed(self): return self.name in KILLS


KILLS = "kill -9", "one byte changed", "cut short", "power loss: zeros in a file", "clock moved back"
BOTH, AT_2 = (FIRST, SECOND), "Resuming at step 2 of 6"
KEPT = SECOND, LAST  # at the end of a run
PACKING = dict(command=("archive", "--folder", "out", "--path", "packed/out.tar.gz"))
ON_DRIVE = dict(out="content/drive/MyDrive/out")
FAULTS = [
    Fault("disk full", "before the run", lambda: own_disk(4 << 20), ("needs", "free"), (), None),
    Fault("disk full", "checkpoint, weights", lambda: filled(3, 1 << 20), ("is full", "Kept: checkpoint-2", "again"),
          (FIRST,), FIRST),
    Fault("disk full", "checkpoint, optimizer", lambda: filled(3, 2 << 20), ("is full", "Kept: checkpoint-2", "again"),
          (FIRST,), FIRST),
    Fault("disk full", "model", lambda: failing("weights", errno.ENOSPC, when=after_last),
          ("is full", "Kept: checkpoint-4, checkpoint-6", "again"), KEPT, LAST),
    Fault("errno 5, twice", "checkpoint, weights", lambda: failing("weights", errno.EIO, times=2), (), KEPT,
          "finished"),
    Fault("errno 5", "checkpoint, weights", lambda: failing("weights", errno.EIO), ("input/output error",), (FIRST,),
          FIRST),
    Fault("errno 5", "checkpoint, optimizer", lambda: failing("optimizer", errno.EIO), ("input/output error",),
          (FIRST,), FIRST),
    Fault("errno 5", "checkpoint, state", lambda: failing("trainer_state.json", errno.EIO), ("input/output error",),
          (FIRST,), FIRST),
    Fault("errno 107", "checkpoint, weights", lambda: failing("weights", errno.ENOTCONN), ("mount has gone",), (FIRST,),
          FIRST),
    Fault("errno 107", "checkpoint on the Drive", lambda: on_drive(disconnected=True), ("Drive's mount has gone",),
          (FIRST,), FIRST, **ON_DRIVE),
    Fault("quota", "checkpoint, weights", lambda: failing("weights", errno.EDQUOT), ("full",), (FIRST,), FIRST),
    Fault("quota", "checkpoint on the Drive", lambda: on_drive(over_quota=True), ("quota",), (FIRST,), FIRST,
          **ON_DRIVE),
    Fault("permission denied", "checkpoint on the Drive", lambda: on_drive(denied=True), ("permission",), (FIRST,),
          FIRST, **ON_DRIVE),
    Fault("permission denied", "checkpoint, optimizer", lambda: failing("optimizer", errno.EACCES), ("permission",),
          (FIRST,), FIRST),
    Fault("read-only", "checkpoint, state", lambda: failing("trainer_state.json", errno.EROFS), ("read-only",),
          (FIRST,), FIRST),
    Fault("silent truncation", "checkpoint on the Drive", lambda: on_drive(truncated=1000), ("truncated",),
          (FIRST,), FIRST, **ON_DRIVE),
    Fault("corruption", "checkpoint on the Drive", lambda: on_drive(corrupted=True), ("differ",), (FIRST,), FIRST,
          **ON_DRIVE),
    Fault("kill -9", "step 5", nothing, ("Resuming at step 4 of 6",), BOTH, SECOND),
    Fault("one byte changed", "checkpoint, weights", lambda: damaged("model.safetensors", flip),
          ("checkpoint-4 is skipped", "model.safetensors", "corrupted", AT_2), (FIRST,), FIRST),
    Fault("one byte changed", "checkpoint, manifest", lambda: damaged("whole.json", flip),
          ("checkpoint-4 is skipped", "whole.json", AT_2), (FIRST,), FIRST),
    Fault("cut short", "checkpoint, optimizer", lambda: damaged("optimizer.pt", cut),
          ("checkpoint-4 is skipped", "optimizer.pt", "bytes", AT_2), (FIRST,), FIRST),
    Fault("power loss: zeros in a file", "checkpoint, state", lambda: damaged("trainer_state.json", zero),
          ("checkpoint-4 is skipped", "trainer_state.json", AT_2), (FIRST,), FIRST),
    Fault("clock moved back", "the machine", clock_back, ("Resuming at step 4 of 6",), BOTH, SECOND),
    Fault("disk full", "token cache", lambda: own_disk(4096, "cache"), ("No space left", "--cache-dir"), (),
          None),
    Fault("permission denied", "token cache", lambda: failing("/tokens/", errno.EACCES, when=always),
          ("Permission denied", "--cache-dir"), (), None),
    Fault("disk full", "archive", lambda: trained(own_disk(1 << 19, "packed")), ("needs", "free"), KEPT, "finished",
          **PACKING),
    Fault("errno 5", "archive", lambda: trained(failing("tar.gz", errno.EIO, when=always)), ("input/output error",),
          KEPT, "finished", **PACKING),
    Fault("permission denied", "archive", lambda: trained(failing("tar.gz", errno.EACCES, when=always)),
          ("no permission",), KEPT, "finished", **PACKING),
    Fault("two runs at once", "output folder", second_run, ("in use by process", "since"),
          KEPT, "finished")]


# A row, in a process that is forked for it

def words_of(out):
    words = ("finetune --model ../toy --train-file ../train.txt --eval-file ../eval.txt --cache-dir cache "
             f"--max-steps {STEPS} --save-steps 2 --effective-batch-size 2 --max-new-tokens 1 --precision fp32")
    return [*words.split(), "--output-dir", out]


def run(words) -> tuple:
    "`colab-gpt2` in this process: (exit code, what the user read, without bars)."
    from typer.testing import CliRunner
    from colab_gpt2.cli import app
    ran = CliRunner().invoke(app, words)
    return ran.exit_code, "\n".join(re.findall(r"(?:note|colab-gpt2|Usage|Error): .*", ran.stderr.replace("\r", "\n")))


def killed(words, step=5):
    "The command in a process that is killed at the end of a step."
    if pid := os.fork(): return os.waitpid(pid, 0)
    at_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL))
    run(words)
    os._exit(1)


def intact(out) -> tuple:
    from colab_gpt2.engine.checkpoints import check_intact, find_checkpoints
    def is_intact(path):
        try: return bool(check_intact(path))
        except ValueError: return False
    return tuple(path.name for path in find_checkpoints(out) if is_intact(path))


def read_json(path) -> dict: return json.loads(path.read_text()) if path.exists() else {}


def outcome(out) -> dict:
    "Of a finished run: a digest of its weights, and from where it was resumed."
    told, weights = read_json(Path(out, "finetune.json")), Path(out, "model.safetensors").read_bytes()
    resumed = told["resumed_from"] and Path(told["resumed_from"]).name
    return dict(weights=hashlib.sha256(weights).hexdigest(), resumed=resumed, losses=told["losses"])


def suffer(number) -> dict:
    "The command under a fault, what is on the disk then, and the same command again."
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.01))  # passing errors are retried at once
    fault = FAULTS[number]
    words, strikes = fault.command or words_of(fault.out), fault.strikes()
    next(strikes)
    code, said = (killed(words), "") if fault.killed else run(words)
    next(strikes, None)
    left = dict(intact=intact(fault.out), parts=[p.name for p in Path(fault.out).glob(".*.part")])
    finished = "losses" in read_json(Path(fault.out, "finetune.json"))
    code_again, said_again = run(words)
    made = dict(code=code, said=said, **left, code_again=code_again, said_again=said_again, **outcome(fault.out))
    strikes.close()
    return made | dict(resumed="finished" if finished else made["resumed"])


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    "A toy model and texts."
    folder = tmp_path_factory.mktemp("faults")
    toy = GPT2Config(n_layer=1, n_embd=32, n_head=2, n_positions=64, vocab_size=8192, bos_token_id=0, eos_token_id=0)
    new_model(toy, seed=0).save_pretrained(folder/"toy")
    load_tokenizer("tiny").save_pretrained(folder/"toy")
    for name, articles in (("train", 40), ("eval", 40)):
        page = (f" = {name} {i} = \n \n The tide came in at {i} and went out again . \n" for i in range(articles))
        (folder/f"{name}.txt").write_text("".join(page))
    return folder


def uninterrupted():
    assert run(words_of("out"))[0] == 0
    return outcome("out")


@pytest.fixture(scope="module")
def reference(job):
    "A run that nothing has struck."
    (job/"reference").mkdir()
    return forked(uninterrupted, cwd=job/"reference").result


@pytest.mark.parametrize("number", range(len(FAULTS)), ids=[f"{fault.name}, {fault.where}" for fault in FAULTS])
def test_a_fault_is_told_leaves_what_was_complete_and_costs_nothing_when_it_is_over(job, reference, number):
    (place := job/f"row-{number}").mkdir()
    fault, ran = FAULTS[number], forked(suffer, number, cwd=place)
    row = ran.result
    assert row, ran.stderr
    read = row["said_again"] if fault.killed else row["said"]
    assert fault.killed or row["code"] == (1 if fault.reads else 0), row
    assert all(words in read for words in fault.reads) and not RAW.search(read), read
    assert len(read.splitlines()) == bool(fault.reads) + (AT_2 in fault.reads), read
    assert row["intact"] == fault.intact and row["code_again"] == 0, row
    assert row["resumed"] == fault.again and row["weights"] == reference["weights"], row
    assert fault.killed or not row["parts"], row


# Twelve faults of the Drive that a mirror is on, from step 3 to the end of the run

@dataclass
class DriveFault:
    name: str
    switches: dict  # of the stub
    reads: tuple  # words in the panel's line, or in a note at the end; without any, all has arrived


DRIVE_FAULTS = [
    DriveFault("errno 5, twice", dict(io_error=2), ()),
    DriveFault("errno 5", dict(io_error=True), ("failed (Input/output error)", "Not copied to the Drive")),
    DriveFault("errno 107, twice", dict(disconnected=2), ()),
    DriveFault("errno 107", dict(disconnected=True), ("failed (not mounted)", "mount has gone")),
    DriveFault("disk full", dict(full=3000), ("failed (No space left", "full")),
    DriveFault("quota", dict(over_quota=True), ("failed (Disk quota exceeded)", "quota")),
    DriveFault("permission denied", dict(denied=True), ("failed (Permission denied)", "no permission")),
    DriveFault("read-only", dict(read_only=True), ("failed (Read-only", "read-only")),
    DriveFault("silent truncation", dict(truncated=1000), ("failed", "truncated")),
    DriveFault("corruption", dict(corrupted=True), ("failed", "corrupted")),
    DriveFault("10 kB/s", dict(bytes_per_second=10_000), ("copying", "Not copied", "had arrived")),
    DriveFault("unmounted, and mounted again", {}, ("failed (not mounted)",))]


def train_with_a_mirror(number) -> dict:
    "A run on Colab, whose mirror is on a Drive with a fault; and the same again, and on a new machine, without it."
    fault, lines = DRIVE_FAULTS[number], []
    sys.path.insert(0, str(SOURCE))
    from google.colab import _stub, drive
    from transformers.trainer_callback import CallbackHandler
    from colab_gpt2 import runtime
    from colab_gpt2.storage import mirror
    runtime.MOUNT = Path("content/drive").absolute()
    sleep, now, on_step_end = time.sleep, time.monotonic, CallbackHandler.on_step_end
    patience = 60
    if "bytes_per_second" in fault.switches:  # ten minutes take two seconds
        patience = 0.2
        time.sleep, time.monotonic = (lambda seconds: sleep(seconds / 300)), lambda: 300 * now()
    else: time.sleep = lambda seconds: sleep(min(seconds, 0.01))
    def look(self, args, state, control):
        "The line of the panel, once the copy of the last checkpoint has come to an end, or would take minutes."
        mirrors, until = [c for c in self.callbacks if isinstance(c, mirror.Mirror)], now() + patience
        while mirrors[0].in_use() and now() < until: sleep(0.005)
        lines.append(mirrors[0].status())
        return on_step_end(self, args, state, control)
    CallbackHandler.on_step_end = look
    os.makedirs("content")
    with _stub.pretend(drive="backing"):
        drive.mount("content/drive")
        if fault.name.startswith("unmounted"):
            at_step(3, drive.flush_and_unmount)
            at_step(5, lambda: drive.mount("content/drive"))
        else: at_step(3, lambda: _stub.faults.set(**fault.switches))
        code, said = run(words_of("out"))
        _stub.faults.set(**vars(_stub.Faults()))
        row = dict(code=code, said=said, lines=[*lines], intact=intact("out"), held=held_there(), **outcome("out"))
        time.sleep, time.monotonic = sleep, now
        row["again"] = [(*run(words_of("out")), held_there())]
        os.rename("out", "lost")
        row["again"] += [(*run(words_of("out")), held_there())]
    return row | dict(trained=len(lines), there=outcome("out")["weights"])


def held_there(): return [path.parent.name for path in Path("backing").rglob("whole.json") if taken_for_complete(path)]


def taken_for_complete(manifest) -> bool:
    "Whether a new machine would restore this; and if so, that all of it is there."
    from colab_gpt2.storage.targets import read_entry
    try: entry = read_entry(manifest.parent.name, manifest.read_text())
    except ValueError: return False
    for name, digest in entry.manifest["sha256"].items():
        assert hashlib.sha256((manifest.parent/name).read_bytes()).hexdigest() == digest, name
    return True


@pytest.mark.parametrize("number", range(len(DRIVE_FAULTS)), ids=[fault.name for fault in DRIVE_FAULTS])
def test_a_training_survives_its_drive(job, reference, number):
    """With complete checkpoints here, nothing taken for complete there that is not, and a true sentence. When the fault
    is over, the same command copies what was missing and trains nothing, and so does a new machine."""
    (place := job/f"drive-{number}").mkdir()
    fault, ran = DRIVE_FAULTS[number], forked(train_with_a_mirror, number, cwd=place)
    row = ran.result
    assert row, ran.stderr
    read = "\n".join([*row["lines"], row["said"]])
    assert row["code"] == 0 and row["weights"] == reference["weights"] and set(KEPT) <= {*row["intact"]}, row
    assert all(words in read for words in fault.reads) and not RAW.search(read), read
    arrived = not fault.reads or fault.name.startswith("unmounted")
    begun, *complaints = row["said"].splitlines()
    assert begun.startswith("note: Each new checkpoint, about ")
    assert ("finished" in row["held"]) == arrived and bool(complaints) == (not arrived), row
    assert row["trained"] == STEPS and row["there"] == reference["weights"], row
    for code, said, there in row["again"]:
        assert code == 0 and "Not copied" not in said and not RAW.search(said) and "finished" in there, row
