"The mirror: what a Drive does to it, what a lost session leaves, and what a new machine finds."
import dataclasses, functools, json, os, shutil, signal, threading, time, warnings
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace

import pytest, torch
from transformers import TrainerCallback

from colab_gpt2 import FinetuneConfig, finetune, mount_drive
from colab_gpt2.core import sha256_of
from colab_gpt2.engine.callbacks import Listener
from colab_gpt2.engine.guards import StopOnInterrupt
from colab_gpt2.engine.lock import this_run
from colab_gpt2.engine.checkpoints import check_intact, find_checkpoints, read_manifest, sealed
from colab_gpt2.engine.checkpoints import write_manifest
from colab_gpt2.planning.memory import Recipe
from colab_gpt2.storage import mirror as room
from colab_gpt2.storage.heartbeat import heartbeat
from colab_gpt2.storage.kept import FINISHED, FULL, OFF, WEIGHTS, other_runs
from colab_gpt2.storage.mirror import open_mirror
from colab_gpt2.storage import kept, targets
from colab_gpt2.storage.targets import FolderTarget
from helpers.toys import newest
from helpers.archives import tree
from helpers.colab_stub import colab, stub
from helpers.forks import forked
from helpers.power import Disk
from helpers.servers import Hub

HERE, COLAB = SimpleNamespace(colab=""), SimpleNamespace(colab="kernel")
SMALL = SimpleNamespace(parameters=1000, recipe=Recipe(1, 64))  # a checkpoint of about 16 kB


@pytest.fixture(autouse=True)
def nobody_waits(monkeypatch):
    "Passing errors are retried without a pause."
    retried = functools.partial(room.retried, wait=0)
    for module in "targets", "heartbeat", "kept", "mirror":
        monkeypatch.setattr(f"colab_gpt2.storage.{module}.retried", retried)
    yield
    while OPENED: OPENED.pop().pulse.end(20)


@pytest.fixture
def output(tmp_path): return tmp_path/"gpt2-tuned"


@pytest.fixture
def checkpoint(output):
    "Makes a checkpoint of a step; its weights are 3,000 bytes."
    def make(step):
        folder = output/f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder/"model.safetensors").write_bytes(f"{step:3d}".encode() * 1000)
        (folder/"optimizer.pt").write_bytes(b"moments")
        (folder/"trainer_state.json").write_text("{}")
        write_manifest(folder, {})
        return folder
    return make


@pytest.fixture
def my_drive(colab):
    return mount_drive(colab.mountpoint)


OPENED = []  # by a test, at whose end nothing is written any more

def opened(output, *, runtime=COLAB, **changes):
    "With room for one complete checkpoint and one that arrives."
    config = FinetuneConfig(output_dir=str(output), **changes)
    mirror = open_mirror(config, dict(seed=config.seed), SMALL, runtime)
    mirror.kept = 1
    if mirror.target: OPENED.append(mirror)
    return mirror


def copy(mirror, path):
    "Offer `path`, and wait until the thread has dealt with it."
    mirror.offer(path)
    while mirror.in_use(): time.sleep(0.002)


def names(mirror): return [name for name in mirror.target.names() if not name.startswith("heartbeat")]


def held(folder): return sorted(path.parent.name for path in Path(folder).rglob("whole.json"))


def told(action):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in caught]


# ---- faults of a Drive

FAULTS = [(dict(truncated=1000), "truncated in transit"), (dict(corrupted=True), "corrupted in transit"),
          (dict(full=1500), "No space left"), (dict(quota=100), "No space left"), (dict(read_only=True), "Read-only"),
          (dict(io_error=True), "Input/output error"), (dict(io_error=5), "Input/output error"),
          (dict(disconnected=True), "not mounted")]


@pytest.mark.parametrize("fault, status", FAULTS)
def test_a_fault_of_the_drive_is_told_and_the_next_checkpoint_tries_again(colab, my_drive, output, checkpoint, fault,
                                                                         status):
    "What is there stays, nothing incomplete counts, and the local checkpoint is untouched."
    mirror = opened(output)
    copy(mirror, checkpoint(100))
    assert mirror.status().startswith("Drive: checkpoint-100, ")
    with colab.faults(**fault):
        copy(mirror, path := checkpoint(200))
        assert mirror.status().startswith("Drive: checkpoint-200 failed (") and status in mirror.status()
    assert held(colab.backing) == ["checkpoint-100"] and check_intact(path)
    if fault.get("disconnected"): mount_drive(colab.mountpoint, force_remount=True)
    copy(mirror, checkpoint(300))
    assert mirror.status().startswith("Drive: checkpoint-300, ") and told(mirror.close) == []
    assert held(colab.backing) == ["checkpoint-300"]
    assert not list(colab.backing.rglob("*.part")) and not list(colab.backing.rglob("heartbeat*"))


@pytest.mark.parametrize("fault", ["io_error", "disconnected"])
def test_an_error_that_passes_is_retried(colab, my_drive, output, checkpoint, fault):
    mirror = opened(output)
    with colab.faults(**{fault: 1}): copy(mirror, checkpoint(100))
    assert mirror.error is None and held(colab.backing) == ["checkpoint-100"]
    mirror.close()


def test_a_drive_that_is_unmounted_and_mounted_again(colab, my_drive, output, checkpoint):
    "Nothing is made in its place, which would be on this machine's disk."
    from google.colab import drive
    mirror = opened(output)
    drive._unmount()
    copy(mirror, checkpoint(100))
    assert mirror.status() == "Drive: checkpoint-100 failed (not mounted)" and os.listdir(colab.mountpoint) == []
    mount_drive(colab.mountpoint)
    copy(mirror, checkpoint(200))
    assert held(colab.backing) == ["checkpoint-200"]
    mirror.close()


def test_a_drive_that_is_unmounted_when_a_copy_is_complete_is_named(colab, my_drive, output, checkpoint, monkeypatch):
    from google.colab import drive
    sync, mirror = targets.sync, opened(output)
    def unmounted(path):
        if ".new-" in str(path): drive._unmount()
        sync(path)
    monkeypatch.setattr(targets, "sync", unmounted)
    copy(mirror, checkpoint(100))
    assert mirror.status() == "Drive: checkpoint-100 failed (not mounted)" and os.listdir(colab.mountpoint) == []


def test_a_drive_that_was_never_mounted_is_said_before_the_run(colab, output, checkpoint):
    mirror = opened(output)
    assert mirror.told.startswith("No Drive is mounted, so checkpoints are on this machine only")
    copy(mirror, checkpoint(100))
    assert (mirror.status(), mirror.newest()) == ("", None) and told(mirror.close) == []


@pytest.mark.parametrize("fault", [dict(io_error=True), dict(disconnected=True)])
def test_a_drive_that_fails_at_the_start_is_used_when_it_works(colab, my_drive, output, checkpoint, fault):
    "And what is on it already, which could not be read, stays until something newer is complete."
    first = opened(output)
    copy(first, checkpoint(300))
    first.close()
    with colab.faults(**fault):
        mirror = opened(output)
        assert mirror.told.startswith("Nothing can be copied to the Drive now")
        with pytest.warns(UserWarning, match="from the Drive, which cannot be read"): assert mirror.newest() is None
    copy(mirror, checkpoint(200))
    assert held(colab.backing) == ["checkpoint-200", "checkpoint-300"]
    copy(mirror, checkpoint(400))
    assert held(colab.backing) == ["checkpoint-400"]
    mirror.close()


def test_the_end_of_a_run_tries_once_more_and_says_what_is_missing(colab, my_drive, output, checkpoint):
    mirror = opened(output)
    copy(mirror, checkpoint(100))
    with colab.faults(full=10):
        copy(mirror, path := checkpoint(200))
        [said] = told(mirror.close)
    assert said.startswith(f"Not copied to the Drive: checkpoint-200 ({path} on this machine). The reason: the disk")
    assert said.endswith("The newest there is checkpoint-100.") and "\n" not in said
    late = opened(output)
    with colab.faults(full=10): copy(late, path)
    assert told(late.close) == [] and held(colab.backing) == ["checkpoint-200"]


def hanging(mirror, monkeypatch):
    "The target's next `put` waits for the Event that this returns."
    go_on, put = threading.Event(), mirror.target.put
    monkeypatch.setattr(mirror.target, "put", lambda *args: (go_on.wait(), put(*args)))
    return go_on


def test_a_write_that_hangs_holds_up_neither_the_training_nor_for_ever_its_end(colab, my_drive, output, checkpoint,
                                                                              monkeypatch):
    mirror, paths = opened(output), [checkpoint(step) for step in (100, 200, 300)]
    go_on, start = hanging(mirror, monkeypatch), time.monotonic()
    for path in paths: mirror.offer(path)
    assert mirror.in_use()[-1] == paths[2] and time.monotonic() - start < 20
    [said] = told(lambda: mirror.close(seconds=60, still=0.2))
    assert "the Drive: checkpoint-300 (" in said and time.monotonic() - start < 30
    go_on.set()  # nobody waits any more: the thread gives up
    mirror.queue.thread.join(20)
    assert held(colab.backing) == [] and not mirror.queue.thread.is_alive()


def test_the_waiting_at_the_end_is_told_and_can_be_interrupted(colab, my_drive, output, checkpoint, monkeypatch):
    mirror, heard = opened(output), []
    go_on = hanging(mirror, monkeypatch)
    mirror.offer(checkpoint(100))
    def report(*told):
        heard.append(told)
        raise KeyboardInterrupt
    with pytest.warns(UserWarning, match="Not copied to .*: checkpoint-100"), pytest.raises(KeyboardInterrupt):
        mirror.close(report)
    assert heard == [("Copying to the Drive", 0, 100)]
    go_on.set()
    mirror.queue.thread.join(20)


def test_a_slow_drive_gets_the_newest_only(colab, my_drive, output, checkpoint):
    mirror, paths = opened(output), [checkpoint(step) for step in (100, 200, 300)]
    with colab.faults(slow=0.01):
        for path in paths:
            mirror.offer(path)
            while not mirror.queue.current: time.sleep(0.001)
        assert "copying checkpoint-100" in mirror.status() and mirror.in_use() == [paths[0], paths[2]]
        assert told(mirror.close) == []
    assert held(colab.backing) == ["checkpoint-300"]


# ---- what is removed

def test_only_what_a_newer_one_replaces_is_removed_and_empty(colab, my_drive, output, checkpoint, monkeypatch):
    "Another run's stays; so does the older one until the newer is complete; the Drive's trash gets empty files."
    other = opened(output, seed=7)
    copy(other, checkpoint(50))
    mirror, sizes, unlink = opened(output), [], os.unlink
    copy(mirror, checkpoint(100))
    def unlinked(path, *, dir_fd=None):
        if "checkpoint-200" in held(colab.backing):
            sizes.append(os.stat(path, dir_fd=dir_fd, follow_symlinks=False).st_size)
        unlink(path, dir_fd=dir_fd)
    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", unlinked)
        copy(mirror, checkpoint(200))
    assert held(colab.backing) == ["checkpoint-200", "checkpoint-50"] and mirror.error is None
    assert sizes[-4:] == [0] * 4
    for each in (other, mirror): each.close()


def test_what_a_lost_session_left_incomplete_is_not_resumed_and_is_removed(my_drive, colab, output, checkpoint):
    first = opened(output)
    copy(first, checkpoint(100))
    first.close()
    [folder] = (my_drive/"colab-gpt2"/"runs").iterdir()
    (folder/"checkpoint-200").mkdir()
    (folder/"checkpoint-200"/".model.safetensors.vm-1.part").write_text("half")
    mirror = opened(output)
    with pytest.warns(UserWarning, match="checkpoint-200 in the Drive is skipped: it is incomplete"):
        assert mirror.newest().name == "checkpoint-100"
    copy(mirror, checkpoint(300))
    assert sorted(p.name for p in folder.glob("c*")) == ["checkpoint-300"]
    mirror.close()


def test_what_is_out_of_sight_for_a_moment_stays_until_a_newer_one_is_complete(tmp_path, output, checkpoint,
                                                                              monkeypatch, full):
    "A mount that says for a while that manifests, or files, are not there."
    mirror = opened(output, runtime=HERE, mirror=str(tmp_path/"disk"))
    mirror.kept = 2
    for step in 100, 200: copy(mirror, checkpoint(step))
    def blind(self, name): raise FileNotFoundError(name)
    for blinded, full[0] in (("read", "optimizer.pt"), ("sizes", None)):
        with monkeypatch.context() as patched:
            patched.setattr(FolderTarget, blinded, blind)
            copy(mirror, checkpoint(300 if full[0] else 400))
    assert held(tmp_path/"disk") == ["checkpoint-100", "checkpoint-200", "checkpoint-400"]
    (mirror.target.folder/"checkpoint-200"/"optimizer.pt").unlink()
    new = opened(output, runtime=HERE, mirror=str(tmp_path/"disk"))
    copy(new, checkpoint(500))
    assert held(tmp_path/"disk") == ["checkpoint-500"]


def test_a_copy_without_its_files_is_no_spare(tmp_path, output, checkpoint, monkeypatch):
    monkeypatch.setattr(FolderTarget, "uploads", 0)
    mirror = opened(output, runtime=HERE, mirror=str(tmp_path/"disk"))
    mirror.kept = 2
    for step in 100, 200: copy(mirror, checkpoint(step))
    mirror.close()
    (mirror.target.folder/"checkpoint-200"/"model.safetensors").write_bytes(b"")
    new = opened(output, runtime=HERE, mirror=str(tmp_path/"disk"))
    new.kept = 2
    copy(new, checkpoint(300))
    assert held(tmp_path/"disk") == ["checkpoint-100", "checkpoint-300"]


def test_saves_in_quick_succession_leave_a_copy_that_a_drive_has_had_time_to_upload(tmp_path, output, checkpoint):
    "And of the young ones the one that will be the next."
    mirror = opened(output, runtime=HERE, mirror=str(tmp_path/"disk"))
    mirror.kept = 2
    copy(mirror, checkpoint(100))
    def later(minutes): mirror.there = {name: when - 60 * minutes for name, when in mirror.there.items()}
    later(4)
    for step in 101, 102: copy(mirror, checkpoint(step))
    assert held(tmp_path/"disk") == ["checkpoint-100", "checkpoint-102"]
    mirror.kept = 3
    for step in 103, 104: copy(mirror, checkpoint(step))
    assert held(tmp_path/"disk") == ["checkpoint-100", "checkpoint-102", "checkpoint-104"]
    later(4)
    copy(mirror, checkpoint(105))
    assert held(tmp_path/"disk") == ["checkpoint-104", "checkpoint-105"]


# ---- room

@pytest.mark.parametrize("quota, kind, line", [
    (100_000, FULL, "Each new checkpoint, about 16.0 kB, is copied to the Drive during the training; at most 3 "
                    "are kept, which with the next one takes up to 64.0 kB of "),
    (40_000, FULL, "; at most 1 is kept, which with the next one takes up to 32.0 kB of "),
    (20_000, WEIGHTS, "only their weights are copied. From them a lost session can be continued as from a model"),
    (20_000, WEIGHTS, "free some space there, train adapters only (method='lora'), or set mirror to another folder."),
    (2_000, OFF, "nothing is copied, and a lost session is lost")])
def test_room_is_told_before_the_run(colab, my_drive, output, checkpoint, quota, kind, line):
    with colab.faults(quota=quota): mirror = opened(output)
    assert line in mirror.told
    copy(mirror, checkpoint(100))
    assert ("no room" in mirror.status()) == (kind == OFF)
    names = {FULL: ["checkpoint-100"], WEIGHTS: ["weights-100"], OFF: []}[kind]
    assert held(colab.backing) == names
    mirror.close()
    if kind != WEIGHTS: return
    with pytest.warns(UserWarning, match="has only the weights of step 100, which cannot be resumed"):
        assert mirror.newest() is None and not list(colab.backing.rglob("optimizer.pt"))


@pytest.fixture
def free(monkeypatch):
    "So many bytes are free on the mirror's disk, but for what is deleted meanwhile."
    left, discard = [10**6], targets.discard
    def discarded(path):
        left[0] += sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else 0
        discard(path)
    monkeypatch.setattr(targets, "discard", discarded)
    monkeypatch.setattr(FolderTarget, "free", lambda self: left[0])
    monkeypatch.setattr(targets, "check_space", lambda path, needed, what: 0 if left[0] >= needed else 1 / 0)
    return left


def test_where_room_is_short_the_oldest_goes_before_the_new_one_comes(tmp_path, output, checkpoint, monkeypatch, free):
    "The newest stays until then. With one copy, and no room for another, it is said that nothing will be copied."
    monkeypatch.setattr(kept, "forecast_bytes", lambda plan: (3009, 1000, 1000))
    mirror = opened(output, runtime=HERE, mirror=str(tmp_path/"disk"))
    mirror.kept = 3
    for step in 100, 200: copy(mirror, checkpoint(step))
    free[0] = 2000
    (new := opened(output, runtime=HERE, mirror=str(tmp_path/"disk"))).kept = 3
    assert new.told.startswith("Each new checkpoint, about 3.0 kB, is copied")
    with monkeypatch.context() as patched:
        patched.setattr(kept, "replaced_by", lambda *args: set())
        copy(new, checkpoint(400))
    assert held(tmp_path/"disk") == ["checkpoint-200", "checkpoint-400"] and new.error is None
    new.kept = 1
    copy(new, checkpoint(500))
    free[0] = 900
    assert "nothing is copied" in opened(output, runtime=HERE, mirror=str(tmp_path/"disk")).told
    assert held(tmp_path/"disk") == ["checkpoint-500"]


def test_adapters_need_room_for_adapters():
    "The finished model, which is far larger, has its own turn."
    plan = SimpleNamespace(parameters=10**9, recipe=Recipe(1, 64, method="lora"))
    checkpoint, _, model = kept.forecast_bytes(plan)
    assert kept.what_fits(plan, 2 * checkpoint) == (FULL, 1) and 2 * checkpoint < model


def test_what_the_drive_holds_is_told_before_the_first_copy_too(colab, my_drive, output, checkpoint):
    copy(opened(output), checkpoint(100))
    assert opened(output).status().startswith("Drive: checkpoint-100, ")


def test_a_run_that_was_lost_with_its_settings_is_named(colab, my_drive, output, checkpoint):
    copy(first := opened(output), checkpoint(100))
    for other in opened(output, seed=7), opened(output.with_name("another-name")):
        [(folder, entry)] = other_runs(other.target)
        assert (folder, entry.step) == (first.target.folder, 100)
    assert other_runs(opened(output).target) == []
    first.close()


def test_a_full_drive_is_still_resumed_from(colab, my_drive, output, checkpoint):
    mirror = opened(output)
    copy(mirror, checkpoint(100))
    mirror.close()
    with colab.faults(quota=10): mirror = opened(output)
    assert "nothing is copied" in mirror.told and mirror.newest().name == "checkpoint-100"


def test_a_disk_that_is_not_mounted_is_noticed(tmp_path, output, checkpoint):
    "Before the run a folder that is new is said; in its middle nothing is copied to this machine's disk."
    options = dict(runtime=HERE, mirror=str(tmp_path/"usb"))
    copy(mirror := opened(output, **options), checkpoint(100))
    assert f"{tmp_path/'usb'} is new: if a disk is to be mounted there, stop" in mirror.told
    assert "is new" not in opened(output, **options).told
    (tmp_path/"usb").rename(tmp_path/"unplugged")
    for there in False, True:
        if there: (tmp_path/"usb").mkdir()  # where it was mounted
        copy(mirror, checkpoint(200 + there))
        assert "failed (No such device)" in mirror.status() and held(tmp_path/"usb") == []
    assert "its disk has gone" not in mirror.status() and "disk" in room.reason(mirror.error[1])
    (tmp_path/"usb").rmdir()
    (tmp_path/"unplugged").rename(tmp_path/"usb")
    copy(mirror, checkpoint(300))
    assert held(tmp_path/"usb") == ["checkpoint-300"]


def test_an_output_folder_on_the_drive_needs_no_mirror(my_drive):
    assert opened(my_drive/"gpt2-tuned").target is None


def test_a_folder_that_cannot_be_a_mirror_is_refused(tmp_path, output):
    (tmp_path/"file").touch()
    known = {tmp_path/"file": "a file stands where a folder is needed", output/"copies": "is in output_dir"}
    for mirror, line in known.items():
        with pytest.raises((OSError, ValueError), match=line): opened(output, runtime=HERE, mirror=str(mirror))


# ---- a new machine

def another(**changes): return {**heartbeat(120), "machine": "vm-1", "boot": "", **changes}


@pytest.fixture
def beating(monkeypatch):
    """Whoever waits sleeps no longer than it must. Every heartbeat that a test has written goes on, as of a living
    machine; -> a list, to which a machine's name is added when it is lost."""
    lost, read, now = [], FolderTarget.read, [0]
    def goes_on(self, name):
        if not name.startswith("heartbeat") or not (text := read(self, name)): return read(self, name)
        now[0] += 1
        told = json.loads(text)
        return json.dumps({**told, "time": told["time"] + now[0] / 1e3 * (told["machine"] not in lost)})
    monkeypatch.setattr(FolderTarget, "read", goes_on)
    clock = SimpleNamespace(monotonic=lambda: 0., time=time.time, sleep=lambda seconds: None)
    monkeypatch.setattr("colab_gpt2.engine.lock.time", clock)
    return lost


@pytest.mark.parametrize("late, seconds", [(0, 150), (-76, 74), (3600, 150)], ids=["just now", "a minute ago", "ahead"])
def test_a_machine_that_was_lost_a_moment_ago_is_waited_for(tmp_path, output, monkeypatch, late, seconds):
    "By a clock of its own that may be ahead: it is lost when its heartbeat stands still. Then a copy finds nobody."
    first, heard, now = opened(output, runtime=HERE, mirror=str(tmp_path/"disk")), [], [time.monotonic()]
    first.close()
    first.target.write("heartbeat.json", json.dumps(another(time=time.time() + late)))
    monkeypatch.setattr("colab_gpt2.engine.lock.time", SimpleNamespace(
        monotonic=lambda: now[0], time=time.time, sleep=lambda seconds: now.__setitem__(0, now[0] + seconds)))
    config = FinetuneConfig(output_dir=str(output), mirror=str(tmp_path/"disk"))
    mirror = open_mirror(config, dict(seed=config.seed), SMALL, HERE, lambda *told: heard.append(told))
    OPENED.append(mirror)
    mirror.pulse.look()
    assert mirror.lost["process"] and {what for what, _, _ in heard} == {
        f"Waiting {seconds} s: the run was alive on another machine a moment ago"}
    _, done, wholes = zip(*heard)
    assert list(done) == sorted(done) and {*wholes} == {seconds}


def test_waiting_for_a_lost_machine_can_be_interrupted(tmp_path, output):
    first = opened(output, runtime=HERE, mirror=str(tmp_path/"disk"))
    first.close()
    first.target.write("heartbeat.json", json.dumps(another()))
    def stop(*told): raise KeyboardInterrupt
    config = FinetuneConfig(output_dir=str(output), mirror=str(tmp_path/"disk"))
    with pytest.raises(KeyboardInterrupt): open_mirror(config, dict(seed=config.seed), SMALL, HERE, stop)
    assert first.target.names() == ["heartbeat.json"]


def test_two_machines_do_not_train_one_run(tmp_path, output, checkpoint, beating):
    mirror = opened(output, runtime=HERE, mirror=str(tmp_path/"disk"))
    mirror.target.write("heartbeat.json", json.dumps(another(process=4711)))
    with pytest.raises(BlockingIOError, match="by process 4711 on vm-1: at step 120 .* ago.*mirror='off'"):
        opened(output, runtime=HERE, mirror=str(tmp_path/"disk"))
    opened(output, runtime=HERE, mirror=str(tmp_path/"disk"), seed=7)  # another run


def elsewhere(monkeypatch, pulse):
    "`pulse` is of another machine from here on."
    monkeypatch.setattr(pulse, "who", {**pulse.who, "machine": "vm-1"})
    pulse.write()


def test_of_two_machines_that_begin_at_once_the_later_one_is_refused_or_copies_nothing(tmp_path, output, checkpoint,
                                                                                       monkeypatch):
    "It may not see the other until it trains, or has trained for a while. The earlier one goes on."
    options = dict(runtime=HERE, mirror=str(tmp_path/"disk"))
    first, second = opened(output, **options), opened(output, **options)
    elsewhere(monkeypatch, first.pulse)
    with pytest.raises(BlockingIOError, match="being trained now, by process .* on vm-1"):
        second.on_train_begin(None, SimpleNamespace(global_step=0), None)
    copy(second, checkpoint(200))
    assert "checkpoint-200 failed (This run is being trained now" in second.status() and names(second) == []
    elsewhere(monkeypatch, second.pulse)
    first.pulse.who["machine"] = this_run()["machine"]
    first.on_train_begin(None, SimpleNamespace(global_step=0), None)
    copy(first, checkpoint(100))
    assert held(tmp_path/"disk") == ["checkpoint-100"] and first.error is None


def test_the_training_never_waits_a_second_for_a_drive_that_does_not_answer(tmp_path, output, checkpoint, monkeypatch):
    "Whatever it is told; and who trains the run elsewhere is heard of when the Drive answers."
    options = dict(runtime=HERE, mirror=str(tmp_path/"disk"))
    first, second, answers = opened(output, **options), opened(output, **options), threading.Event()
    elsewhere(monkeypatch, first.pulse)
    def late(call): return lambda *args: (answers.wait(20), call(*args))[1]
    for name in dir(FolderTarget):
        call = getattr(second.target, name)
        if callable(call) and not name.startswith("_"): monkeypatch.setattr(second.target, name, late(call))
    checkpoint(100)
    args, state = SimpleNamespace(output_dir=str(output)), SimpleNamespace(global_step=100)
    for event in [name for name in dir(TrainerCallback) if name.startswith("on_")]:
        begun = time.monotonic()
        getattr(second, event)(args, state, None, metrics={})
        assert time.monotonic() - begun < 1, event
    assert second.in_use() == [output/"checkpoint-100"]
    answers.set()
    while second.in_use() or not second.pulse.refused: time.sleep(0.002)
    with pytest.raises(BlockingIOError, match="being trained now"): second.on_step_end(args, state, None)


def test_a_run_can_be_seen_from_when_its_mirror_is_open_until_it_is_closed(tmp_path, output, monkeypatch, beating):
    "Loading, evaluating and probing come before the training."
    options = dict(runtime=HERE, mirror=str(tmp_path/"disk"))
    first = opened(output, **options)
    elsewhere(monkeypatch, first.pulse)
    with pytest.raises(BlockingIOError, match="by process .* on vm-1"): opened(output, **options)
    assert [name for name in first.target.names() if name.startswith("heartbeat")] == [first.pulse.name]
    first.close()
    assert first.target.names() == []
    opened(output, **options)


def test_a_heartbeat_that_cannot_be_read_for_a_moment_counts(tmp_path, output, monkeypatch, beating):
    options = dict(runtime=HERE, mirror=str(tmp_path/"disk"))
    first = opened(output, **options)
    first.pulse.who["since"] += 60  # by another clock: the first look decides
    elsewhere(monkeypatch, first.pulse)
    reads, read = ["error", "empty"], FolderTarget.read
    def fails(self, name):
        now = reads.pop(0) if reads else ""
        if now == "error": raise OSError(5, "Input/output error")
        return "" if now else read(self, name)  # while it is written it is empty
    monkeypatch.setattr(FolderTarget, "read", fails)
    with pytest.raises(BlockingIOError): opened(output, **options)


def test_containers_of_one_host_are_told_apart(tmp_path, output, beating):
    "They know the same start of the machine, and each counts its processes from 1."
    mirror = opened(output, runtime=HERE, mirror=str(tmp_path/"disk"))
    for changes in dict(machine="a"), dict(numbers="a"), dict(machine="a", process=999_999_999):
        mirror.target.write("heartbeat.json", json.dumps({**heartbeat(120), **changes}))
        with pytest.raises(BlockingIOError): opened(output, runtime=HERE, mirror=str(tmp_path/"disk"))


def test_another_machine_that_removes_what_is_on_its_way_leaves_the_older(tmp_path, output, checkpoint, monkeypatch):
    mirror = opened(output, runtime=HERE, mirror=str(tmp_path/"disk"))
    copy(mirror, checkpoint(100))
    check_sizes = targets.check_sizes
    def removed(*args):
        check_sizes(*args)
        mirror.target.remove(".new-checkpoint-200")
    with monkeypatch.context() as patched:
        patched.setattr(targets, "check_sizes", removed)
        copy(mirror, checkpoint(200))
    assert "checkpoint-200 failed" in mirror.status() and names(mirror) == held(tmp_path/"disk") == ["checkpoint-100"]


def test_the_last_sign_of_a_lost_machine_is_told(tmp_path, output):
    mirror = opened(output, runtime=HERE, mirror=str(tmp_path/"disk"))
    mirror.close()
    assert mirror.before_end("2026-11-28T20:00:00Z") == ""
    ended = datetime(2026, 11, 28, 20, 2, 30, tzinfo=timezone.utc).timestamp()
    mirror.target.write("heartbeat.json", json.dumps(another(time=ended)))
    mirror = opened(output, runtime=HERE, mirror=str(tmp_path/"disk"))
    said = mirror.before_end("2026-11-28T20:00:00Z")
    assert said == "Your last session saved this 2 minutes before it ended." and mirror.before_end("") == ""


def test_a_long_name_of_an_output_folder_fits(tmp_path, checkpoint):
    mirror = opened(tmp_path/("ü" * 127), runtime=HERE, mirror=str(tmp_path/"disk"))
    copy(mirror, checkpoint(100))
    assert held(tmp_path/"disk") == ["checkpoint-100"]
    mirror.close()


@pytest.mark.parametrize("text", ["", "[]", "nonsense", '{"time": null}', '{"time": "yesterday", "machine": 3}'])
def test_a_damaged_heartbeat_is_none(tmp_path, output, text):
    mirror = opened(output, runtime=HERE, mirror=str(tmp_path/"disk"))
    mirror.close()
    mirror.target.write("heartbeat.json", text)
    assert opened(output, runtime=HERE, mirror=str(tmp_path/"disk")).lost is None


def test_heartbeats_are_written_while_a_copy_hangs(tmp_path, output, checkpoint, monkeypatch):
    "A sync, or an upload to the Hub, may take longer than another machine waits for a sign of life."
    monkeypatch.setattr(FolderTarget, "beats", 0.01)
    mirror = opened(output, runtime=HERE, mirror=str(tmp_path/"disk"))
    go_on, mirror.pulse.step = hanging(mirror, monkeypatch), 7
    mirror.offer(checkpoint(100))
    file, until, seen = mirror.target.folder/mirror.pulse.name, time.monotonic() + 20, set()
    while len(seen) < 3 and time.monotonic() < until:
        if (text := file.read_text()) and json.loads(text)["step"] == 7: seen.add(text)
    assert len(seen) == 3 and mirror.in_use()
    go_on.set()
    mirror.close()
    assert names(mirror) == mirror.target.names() == ["checkpoint-100"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", "whole.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_file_is_named_and_the_next_checkpoint_taken(tmp_path, output, checkpoint, name, damage):
    mirror = opened(output, runtime=HERE, mirror=str(tmp_path/"disk"))
    mirror.kept = 2
    for step in (100, 200): copy(mirror, checkpoint(step))
    mirror.close()
    file = mirror.target.path("checkpoint-200", name)
    content = file.read_bytes()
    if damage == "delete": file.unlink()
    else: file.write_bytes(content[:-1] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    new = opened(tmp_path/"new machine"/"gpt2-tuned", runtime=HERE, mirror=str(tmp_path/"disk"))
    with pytest.warns(UserWarning, match="checkpoint-200 in .* is skipped") as caught:
        restored = new.restore(new.newest(), tmp_path/"new machine"/"gpt2-tuned")
    assert restored.name == "checkpoint-100" and check_intact(restored) and len(caught) == 1
    assert new.status().startswith("mirror: checkpoint-100, ")
    assert read_manifest(restored) == read_manifest(output/"checkpoint-100")
    if name != "whole.json": assert name in str(caught[0].message)


def test_what_is_here_is_not_replaced_by_an_older_one(tmp_path, output, checkpoint):
    mirror = opened(output, runtime=HERE, mirror=str(tmp_path/"disk"))
    mirror.kept = 3
    for step in (100, 200, 300): copy(mirror, checkpoint(step))
    (mirror.target.folder/"checkpoint-300"/"optimizer.pt").write_bytes(b"Moments")
    with pytest.warns(UserWarning, match="checkpoint-300 in .* is skipped"):
        assert mirror.restore(mirror.newest(), tmp_path/"new", above=200) is None
    assert not (tmp_path/"new"/"checkpoint-200").exists()


def test_where_nothing_is_intact_the_run_begins_again(tmp_path, output, checkpoint):
    mirror = opened(output, runtime=HERE, mirror=str(tmp_path/"disk"))
    copy(mirror, checkpoint(100))
    mirror.close()
    (mirror.target.folder/"checkpoint-100"/"optimizer.pt").write_bytes(b"Moments")
    new = opened(output, runtime=HERE, mirror=str(tmp_path/"disk"))
    with pytest.warns(UserWarning, match="optimizer.pt is missing or corrupted"):
        assert new.restore(new.newest(), tmp_path/"new") is None
    assert find_checkpoints(tmp_path/"new") == [] and new.newest() is None


def test_names_that_lead_out_of_the_folder_are_not_followed(tmp_path, output, checkpoint):
    mirror = opened(output, runtime=HERE, mirror=str(tmp_path/"disk"))
    copy(mirror, path := checkpoint(100))
    mirror.close()
    manifest = read_manifest(path)
    for field in ("files", "sha256"): manifest[field]["../../secret"] = manifest[field]["optimizer.pt"]
    (mirror.target.folder/"checkpoint-100"/"whole.json").write_text(sealed(manifest))
    (tmp_path/"disk"/"secret").write_bytes(b"moments")
    new = opened(output, runtime=HERE, mirror=str(tmp_path/"disk"))
    with pytest.warns(UserWarning, match="checkpoint-100 in .* is skipped"): assert new.newest() is None


def finish(output, adapters=()):
    "The output folder of a finished run."
    (output/"model.safetensors").write_bytes(b"the model")
    (output/"config.json").write_text("{}")
    files = {name: sha256_of(output/name) for name in ("model.safetensors", "config.json", *adapters)}
    (output/"finetune.json").write_text(json.dumps(dict(files=files, fingerprint={}, steps=300)))
    return {name: (output/name).read_bytes() for name in (*files, "finetune.json")}


def test_a_finished_model_takes_the_place_of_the_checkpoints(tmp_path, output, checkpoint):
    "Of the last one in a later session, which finds it there: what a Drive has taken it uploads later."
    mirror = opened(output, runtime=HERE, mirror=str(tmp_path/"disk"))
    for step in 200, 300: copy(mirror, checkpoint(step))
    files = finish(output)
    (output/"notes.txt").write_text("of the user")
    copy(mirror, output)
    assert names(mirror) == ["checkpoint-300", FINISHED] and told(mirror.close) == []
    new = opened(tmp_path/"new"/"gpt2-tuned", runtime=HERE, mirror=str(tmp_path/"disk"))
    assert new.restore(new.newest(), tmp_path/"new"/"gpt2-tuned") == tmp_path/"new"/"gpt2-tuned"
    assert tree(tmp_path/"new"/"gpt2-tuned") == files
    copy(new, tmp_path/"new"/"gpt2-tuned")
    assert names(new) == [FINISHED] and told(new.close) == []


@pytest.fixture
def full(monkeypatch):
    "With `full[0]` set to a file's name, there is no room when that one is copied."
    at, copy_once = [None], targets.copy_once
    def copying(source, destination, report):
        if source.name == at[0]: raise OSError(28, "No space left on device")
        return copy_once(source, destination, report)
    monkeypatch.setattr(targets, "copy_once", copying)
    return at


def test_a_finished_model_stays_until_its_successor_is_complete(tmp_path, output, checkpoint, full):
    "Evaluated in another way, its record differs."
    mirror = opened(output, runtime=HERE, mirror=str(tmp_path/"disk"))
    checkpoint(300)
    finish(output)
    copy(mirror, output)
    before = tree(mirror.target.path(FINISHED))
    (output/"finetune.json").write_text(json.dumps(json.loads((output/"finetune.json").read_text()) | dict(steps=301)))
    for full[0] in "model.safetensors", "finetune.json", "whole.json":
        copy(mirror, output)
        assert tree(mirror.target.path(FINISHED)) == before and names(mirror) == [FINISHED]
    full[0] = None
    copy(mirror, output)
    assert json.loads(mirror.target.read(f"{FINISHED}/finetune.json"))["steps"] == 301 and names(mirror) == [FINISHED]


def test_a_copy_of_the_same_name_that_fails_leaves_what_was_there(tmp_path, output, checkpoint, full):
    "As where a run begins again and reaches the step of the copy: the status is true."
    mirror = opened(output, runtime=HERE, mirror=str(tmp_path/"disk"))
    copy(mirror, path := checkpoint(300))
    before = tree(mirror.target.path("checkpoint-300"))
    (path/"model.safetensors").write_bytes(b"301" * 1000)
    write_manifest(path, {})
    full[0] = "optimizer.pt"
    copy(mirror, path)
    assert tree(mirror.target.path("checkpoint-300")) == before and names(mirror) == ["checkpoint-300"]
    assert "checkpoint-300 failed (No space" in mirror.status() and "; checkpoint-300, 0 seconds ago" in mirror.status()
    full[0] = None
    copy(mirror, path)
    assert mirror.newest().manifest == read_manifest(path) and mirror.error is None


def test_a_loss_of_power_leaves_a_copy_to_resume_from(tmp_path, output, checkpoint, monkeypatch):
    "What takes its place is on the disk before, with its folder, and before anything older goes."
    paths = [checkpoint(step) for step in (300, 400)]
    mirror = opened(output, runtime=HERE, mirror=str(tmp_path/"disk"))
    with monkeypatch.context() as patched:
        disk = Disk(tmp_path/"disk", patched)
        for path in (*paths, paths[1]): copy(mirror, path)
    assert (disk.faults, disk.pending, names(mirror)) == ([], {}, ["checkpoint-400"]) and mirror.error is None


def test_a_session_that_ends_while_a_copy_takes_its_place_loses_none(tmp_path, output, checkpoint, monkeypatch):
    mirror = opened(output, runtime=HERE, mirror=str(tmp_path/"disk"))
    copy(mirror, path := checkpoint(300))
    (path/"model.safetensors").write_bytes(b"301" * 1000)
    write_manifest(path, {})
    def ends(*args): raise OSError(5, "Input/output error")
    with monkeypatch.context() as patched:
        patched.setattr(targets.os, "rename", ends)
        copy(mirror, path)
        assert names(mirror) == [".new-checkpoint-300"] and "checkpoint-300 failed" in mirror.status()
    new = opened(output, runtime=HERE, mirror=str(tmp_path/"disk"))
    assert new.newest().manifest == read_manifest(path) and names(new) == ["checkpoint-300"]


def test_after_a_second_signal_no_copy_is_waited_for(colab, my_drive, output, checkpoint, monkeypatch):
    stop, mirror = StopOnInterrupt(), opened(output)
    for _ in range(2):
        stop.when = -1e9  # more than half a second ago
        with pytest.raises(KeyboardInterrupt): stop.handle(signal.SIGTERM, None)
    assert stop.signals == 2
    go_on = hanging(mirror, monkeypatch)
    mirror.offer(checkpoint(100))
    begun = time.monotonic()
    with pytest.warns(UserWarning, match="Not copied to .*: checkpoint-100"): mirror.close(seconds=0)
    assert time.monotonic() - begun < 5
    go_on.set()
    mirror.queue.thread.join(20)


def test_beginning_again_replaces_what_is_there_once_something_new_is_complete(tmp_path, output, checkpoint):
    options = dict(runtime=HERE, mirror=str(tmp_path/"disk"))
    mirror = opened(output, **options)
    copy(mirror, checkpoint(300))
    finish(output)
    copy(mirror, output)
    mirror.close()
    again = opened(output, overwrite_output_dir=True, **options)
    (output/"finetune.json").unlink()
    assert again.newest() is None and names(again) == ["checkpoint-300", FINISHED]
    copy(again, checkpoint(100))
    assert held(tmp_path/"disk") == ["checkpoint-100"]
    again.close()


# ---- a repository of the Hub

@pytest.fixture
def hub(monkeypatch):
    "A small Hub, which huggingface_hub talks to with a token."
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # which no server here speaks
    with Hub() as server:
        api = functools.partial(huggingface_hub.HfApi, endpoint=server.url, token="hf_secret")
        monkeypatch.setattr(huggingface_hub, "HfApi", api)
        yield server


ON_HUB = dict(runtime=HERE, mirror="hub:me/checkpoints")


def test_a_private_repository_of_the_hub_is_a_mirror_too(hub, tmp_path, output, checkpoint):
    mirror, files = opened(output, **ON_HUB), lambda: hub.repos["models", "me/checkpoints"]
    assert mirror.newest() is None and "hub:me/checkpoints during the training." in mirror.told
    for step in (100, 200): copy(mirror, checkpoint(step))
    assert mirror.status().startswith("Hub: checkpoint-200, ") and told(mirror.close) == []
    assert sorted({Path(path).parent.name for path in files()}) == ["checkpoint-200"] and len(files()) == 4
    assert any(path.endswith("/super-squash/main") for path in hub.paths("POST"))
    new = opened(tmp_path/"new"/"gpt2-tuned", **ON_HUB)
    restored = new.restore(new.newest(), tmp_path/"new"/"gpt2-tuned")
    assert tree(restored) == tree(output/"checkpoint-200") and check_intact(restored)
    (damaged,) = [path for path in files() if path.endswith("optimizer.pt")]
    files()[damaged] = b"Moments"
    new = opened(tmp_path/"newer"/"gpt2-tuned", **ON_HUB)
    with pytest.warns(UserWarning, match="checkpoint-200 in hub:me/checkpoints is skipped: optimizer.pt is missing or"):
        assert new.restore(new.newest(), tmp_path/"newer"/"gpt2-tuned") is None


def test_adapters_of_a_finished_model_come_back_from_the_hub_and_a_damaged_one_is_named(hub, tmp_path, output):
    (output/"adapters").mkdir(parents=True)
    adapters = "adapters/adapter_model.safetensors", "adapters/adapter_config.json"
    for name in adapters: (output/name).write_bytes(name.encode() * 40)
    finish(output, adapters)
    copy(mirror := opened(output, **ON_HUB), output)
    assert mirror.status().startswith("Hub: finished, ") and told(mirror.close) == []
    there = hub.repos["models", "me/checkpoints"]
    for name in adapters: assert [there[p] for p in there if p.endswith(f"/{FINISHED}/{name}")] == [name.encode() * 40]
    place = tmp_path/"new"/"gpt2-tuned"
    new = opened(place, **ON_HUB)
    new.restore(new.newest(), place)
    assert tree(place) == tree(output) and {*adapters} < {*map(str, tree(place))}
    there[next(path for path in there if path.endswith(adapters[0]))] = bytes(40 * len(adapters[0]))
    (place/adapters[0]).unlink()
    new = opened(tmp_path/"newer"/"gpt2-tuned", **ON_HUB)
    with pytest.warns(UserWarning, match=f"{adapters[0]} is missing or"):
        assert new.restore(new.newest(), tmp_path/"newer"/"gpt2-tuned") is None


def test_the_hub_is_told_in_a_word_and_its_token_never(hub, output, checkpoint, capsys):
    hub.refusals["/"] = 403
    mirror = opened(output, **ON_HUB)
    assert mirror.told.startswith("Nothing can be copied to hub:me/checkpoints now")
    copy(mirror, path := checkpoint(100))
    assert mirror.status() == "Hub: checkpoint-100 failed (hub:me/checkpoints failed (HfHubHTTPError, 403))"
    del hub.refusals["/"]
    copy(mirror, path)
    said = [mirror.told, *told(mirror.close), *capsys.readouterr()]
    assert "checkpoint-100" in mirror.status() and not any("hf_secret" in text for text in said)
    assert not any(b"hf_secret" in content for content in [*hub.repos["models", "me/checkpoints"].values(),
                                                           *tree(output).values()])


def test_without_a_network_the_hub_is_told_in_a_line_at_once(hub, output, checkpoint, capfd, caplog):
    with hub.closed():
        mirror = opened(output, **ON_HUB)
        copy(mirror, checkpoint(100))
        assert mirror.told.startswith("Nothing can be copied to hub:me/checkpoints now")
        assert mirror.told.endswith("the Hub gave no answer") and "checkpoint-100 failed" in mirror.status()
        told(lambda: mirror.close(seconds=1))
    assert "Retrying" not in "".join(capfd.readouterr()) + caplog.text


def test_a_repository_that_cannot_serve_is_refused_before_the_run(hub, output):
    "A public one; and one that the user has already: what is replaced leaves its history, and all of that would go."
    hub.add("models", "me/checkpoints", {".gitattributes": b"", "README.md": b"my work", "thesis.bin": b"..."})
    with pytest.raises(ValueError, match="mirror hub:me/checkpoints has README.md, which is not of a run"):
        opened(output, **ON_HUB)
    hub.private = False
    with pytest.raises(ValueError, match="mirror hub:me/checkpoints is public"): opened(output, **ON_HUB)
    with pytest.raises(ValueError, match="mirror is 'hub:checkpoints'; a repository is given as hub:USER/NAME"):
        opened(output, runtime=HERE, mirror="hub:checkpoints")
    assert len(hub.repos["models", "me/checkpoints"]) == 3


def test_what_is_put_into_the_repository_in_mid_run_keeps_its_history(hub, output, checkpoint):
    mirror = opened(output, **ON_HUB)
    copy(mirror, checkpoint(100))
    hub.repos["models", "me/checkpoints"]["README.md"] = b"my work"
    copy(mirror, checkpoint(200))
    assert names(mirror) == ["checkpoint-200"] and not any("squash" in path for path in hub.paths("POST"))


@pytest.mark.parametrize("account, who", [(None, "you are not signed in"), ("someone", "you are signed in as someone")])
def test_who_is_not_signed_in_is_told_so_and_not_that_nothing_is_there(hub, output, checkpoint, account, who):
    first = opened(output, **ON_HUB)
    copy(first, checkpoint(100))
    first.close()
    hub.account = account
    if account: hub.repos.clear()  # a stranger is told 'not found'
    mirror = opened(output, **ON_HUB)
    assert mirror.told.startswith("Nothing can be copied to hub:me/checkpoints now") and who in mirror.told
    with pytest.warns(UserWarning, match=f"Nothing is resumed from hub:me/checkpoints.*{who}"):
        assert mirror.newest() is None


def test_a_repository_of_an_organisation_is_made_too(hub, output, checkpoint):
    mirror = opened(output, runtime=HERE, mirror="hub:Our-Lab/checkpoints")
    copy(mirror, checkpoint(100))
    assert mirror.status().startswith("Hub: checkpoint-100, ")


# ---- runs

@pytest.fixture(scope="module")
def job(tmp_path_factory):
    "A small model and two texts; and the weights that a run gives which nothing interrupts."
    from transformers import GPT2Config
    from colab_gpt2.model.loading import load_tokenizer, new_model
    folder = tmp_path_factory.mktemp("job")
    shape = GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=32, vocab_size=8192, bos_token_id=0, eos_token_id=0)
    new_model(shape, seed=0).save_pretrained(folder/"toy")
    load_tokenizer("tiny").save_pretrained(folder/"toy")
    def said(i): return f"The tide of day {i} came in at {i % 12} o'clock.\n"
    for name, lines in (("train", 200), ("eval", 9)):
        (folder/f"{name}.txt").write_text("".join(map(said, range(lines))))
    ran = forked(train, folder, "off", cwd=folder)
    assert ran.result and ran.result["resumed_from"] is None, ran.stderr
    return SimpleNamespace(folder=folder, weights=(folder/"out"/"model.safetensors").read_bytes())


class Die(TrainerCallback):
    "Kills its process at a step, once `there`, a pattern, is in the mirror."
    def __init__(self, step, mirror, there): self.step, self.mirror, self.there = step, Path(mirror), there

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step < self.step: return
        while not list(self.mirror.glob(self.there)): time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGKILL)


def train(folder, mirror, *callbacks, **changes):
    "The run, in a folder of its own; -> what of its result says whether it was resumed, and what was told."
    torch.set_num_threads(1)
    config = FinetuneConfig(model=f"{folder}/toy", train_file=f"{folder}/train.txt", eval_file=f"{folder}/eval.txt",
                            output_dir="out", block_size=32, effective_batch_size=4, max_steps=12, save_steps=4,
                            max_new_tokens=2, torch_compile=False, mirror=str(mirror), cache_dir=f"{folder}/cache")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = finetune(dataclasses.replace(config, **changes), callbacks=callbacks, progress=False)
    return dict(resumed_from=result.resumed_from, steps=result.steps, told=[str(w.message) for w in caught],
                repeated=result.repeated)


def new_machine(tmp_path, name):
    "An empty folder: no output, nothing of the run."
    (tmp_path/name).mkdir()
    return tmp_path/name


def test_a_new_machine_resumes_a_lost_run_to_the_same_weights(job, tmp_path):
    "Killed at step 10 of 12, once checkpoint-8 was in the mirror. A third machine finds the run finished."
    first, second, third = (new_machine(tmp_path, name) for name in ("first", "second", "third"))
    disk = tmp_path/"disk"
    died = forked(train, job.folder, disk, Die(10, disk, "*/checkpoint-8/whole.json"), cwd=first)
    assert died.returncode == -signal.SIGKILL and died.result is None
    resumed = forked(train, job.folder, disk, cwd=second).result
    assert Path(resumed["resumed_from"]).name == "checkpoint-8" and resumed["steps"] == 12
    assert any("Resuming at step 8 of 12. Your last session saved this" in text for text in resumed["told"])
    assert (second/"out"/"model.safetensors").read_bytes() == job.weights
    assert held(disk)[-1] == FINISHED
    finished = forked(train, job.folder, disk, cwd=third).result
    assert finished["repeated"] and (third/"out"/"model.safetensors").read_bytes() == job.weights
    assert not list((third/"out").glob("checkpoint-*"))


def die_while_copying(folder, mirror, count):
    "The run, killed before the file number `count` of what is copied after the first checkpoint."
    from colab_gpt2.storage import targets
    seen, copy_once = [], targets.copy_once
    def counted(source, destination, report):
        seen.append(destination.parent)
        if len([folder for folder in seen if folder != seen[0]]) == count: os.kill(os.getpid(), signal.SIGKILL)
        return copy_once(source, destination, report)
    targets.copy_once = counted
    return train(folder, mirror)


class DieAtRename(Listener):
    "Kills its process when a file of this name is moved into the output folder."
    def __init__(self, name): self.name = name

    def on_stage(self, stage, **facts):
        def replace(source, path, real=os.replace):
            if Path(path).name == self.name and ".part" not in str(path): os.kill(os.getpid(), signal.SIGKILL)
            real(source, path)
        os.replace = replace


def test_a_model_that_was_half_restored_is_restored_by_the_same_again(job, tmp_path):
    disk, first, second = tmp_path/"disk", new_machine(tmp_path, "first"), new_machine(tmp_path, "second")
    forked(train, job.folder, disk, cwd=first)
    for path in disk.glob("*/checkpoint-*"): shutil.rmtree(path)
    assert forked(train, job.folder, disk, DieAtRename("model.safetensors"), cwd=second).returncode == -signal.SIGKILL
    assert (second/"out/config.json").exists() and not (second/"out/model.safetensors").exists()
    again = forked(train, job.folder, disk, cwd=second).result
    assert again["repeated"] and (second/"out"/"model.safetensors").read_bytes() == job.weights


def test_a_machine_that_is_lost_while_it_copies_leaves_the_older_checkpoint(job, tmp_path):
    disk, first, second = tmp_path/"disk", *(new_machine(tmp_path, name) for name in ("first", "second"))
    died = forked(die_while_copying, job.folder, disk, 2, cwd=first)
    assert died.returncode == -signal.SIGKILL
    resumed = forked(train, job.folder, disk, cwd=second).result
    assert Path(resumed["resumed_from"]).name in ("checkpoint-4", "checkpoint-8")
    assert (second/"out"/"model.safetensors").read_bytes() == job.weights


SURVIVED = [(fault, None) for fault in (dict(io_error=1), dict(disconnected=1), dict(slow=0.01))]
ALL = [*FAULTS, *SURVIVED, ("unmounted", "not mounted"), ("hanging", "copying checkpoint-13 (0%)")]


class Faults(Listener):
    "Another of ALL for each checkpoint; notes what the mirror says of it, and what is complete here."
    def __init__(self, colab, monkeypatch):
        self.colab, self.patch, self.left, self.seen = colab, monkeypatch, [*ALL], []

    def on_stage(self, stage, mirror=None, **facts):
        if mirror: self.mirror, self.go_on = mirror, None

    def on_step_end(self, args, state, control, **kwargs):
        while self.mirror.in_use() and not (self.go_on and self.mirror.queue.current): time.sleep(0.002)
        self.seen.append((self.mirror.status(), newest(args.output_dir)))
        if self.go_on: self.go_on.set()
        self.colab.faults.set(**vars(type(self.colab.faults)()))
        mount_drive(self.colab.mountpoint)
        if self.left: self.strike(self.left.pop(0)[0])

    def strike(self, fault):
        from google.colab import drive
        if fault == "unmounted": drive._unmount()
        elif fault == "hanging": self.go_on = hanging(self.mirror, self.patch)
        else: self.colab.faults.set(**fault)


def test_a_run_goes_on_whatever_the_drive_does(colab, my_drive, job, tmp_path, monkeypatch):
    "Each checkpoint meets another fault, is complete on this machine, and is told; at the end all is well again."
    monkeypatch.chdir(tmp_path)
    faults = Faults(colab, monkeypatch)
    result = train(job.folder, "auto", faults, max_steps=len(ALL) + 1, save_steps=1)
    assert result["steps"] == len(ALL) + 1 == len(faults.seen) == 14
    for step, ((status, newest), (_, line)) in enumerate(zip(faults.seen[1:], ALL), 1):
        assert newest.name == f"checkpoint-{step}" and (line or f"Drive: checkpoint-{step}, ") in status
        assert (f"checkpoint-{step} failed" in status) == (step not in (9, 10, 11, 13))
    [said] = [text for text in result["told"] if "Drive" in text]
    assert said.startswith("Each new checkpoint, about ") and "is copied to the Drive during the training; " in said
    assert held(colab.backing) == ["checkpoint-9", FINISHED]  # the first that arrived: Drive may have uploaded it
