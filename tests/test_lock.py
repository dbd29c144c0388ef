"One run in one folder: who is refused, and whose lock stops nobody."
import errno, json, multiprocessing, os, threading, time
from pathlib import Path

import psutil
import pytest

from colab_gpt2.engine import lock
from colab_gpt2.engine.lock import LOCK, only_run, this_run


def hold(folder, pipe):
    with only_run(folder):
        pipe.send("begun")
        pipe.recv()


@pytest.fixture
def another(tmp_path):
    "Another process that runs in the folder `run`, until the test ends."
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=hold, args=(tmp_path/"run", there))
    process.start()
    assert here.poll(60)
    yield process
    process.kill()
    process.join(60)


def left_by(folder, age=0., **changes):
    "The lock of a run that ended without a word."
    folder.mkdir(exist_ok=True)
    (folder/LOCK).write_text(json.dumps({**this_run(), **changes}))
    os.utime(folder/LOCK, (time.time() - age,) * 2)
    return folder


def test_a_second_run_is_refused_and_told_whose_folder_it_is(another, tmp_path):
    before = (tmp_path/"run"/LOCK).read_bytes()
    (tmp_path/"link").symlink_to("run")
    for folder in (tmp_path/"run", tmp_path/"link", tmp_path/"run"/".."/"run"):
        with pytest.raises(BlockingIOError, match=f"in use by process {another.pid} on .+ since 20"):
            with only_run(folder): pass
    assert (tmp_path/"run"/LOCK).read_bytes() == before
    assert [p.name for p in (tmp_path/"run").iterdir()] == [LOCK]


def test_a_run_that_was_killed_stops_nobody(another, tmp_path):
    another.kill()
    another.join()
    with only_run(tmp_path/"run"): assert json.loads((tmp_path/"run"/LOCK).read_text())["process"] == os.getpid()
    assert list((tmp_path/"run").iterdir()) == []


@pytest.mark.parametrize("flock", [True, False])
def test_another_thread_is_refused(tmp_path, monkeypatch, flock):
    if not flock: monkeypatch.setattr(lock, "try_flock", lambda file: False)
    refused = []
    def second():
        try: only_run(tmp_path/"run").__enter__()
        except BlockingIOError as e: refused.append(str(e))
    with only_run(tmp_path/"run"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert "is in use by another run on" in refused[0] and not (tmp_path/"run").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks_goes_by_what_the_file_says(tmp_path, monkeypatch, number):
    fcntl = pytest.importorskip("fcntl")
    def fails(*args): raise OSError(number, os.strerror(number))
    monkeypatch.setattr(fcntl, "flock", fails)
    with only_run(tmp_path/"run"):
        with pytest.raises(BlockingIOError), only_run(tmp_path/"run"): pass
    with only_run(left_by(tmp_path/"run", process=999_999_999)): pass
    assert list((tmp_path/"run").iterdir()) == []


@pytest.mark.parametrize("changes, age, free", [
    (dict(boot="of before"), time.time() - psutil.boot_time() + 9, True),  # this machine's, and perhaps this process's
    (dict(boot="its own", machine="another"), 60, False),
    (dict(boot="its own", machine="another"), 150, True),
    (dict(boot="its own"), 1, False),  # another machine of this name
    (dict(numbers="its own", process=os.getpid()), 1, False),  # another container, with a process of this number
    (dict(boot="its own", machine="another"), -3600, True),  # the clock was moved back since
    (dict(since=None, process=999_999_999), 0, True)],
    ids="before-start shared-disk lost-machine same-name container clock-back odd".split())
def test_the_lock_of_another_start_or_machine(tmp_path, monkeypatch, changes, age, free):
    "What is not lost already is watched."
    monkeypatch.setattr(lock, "try_flock", lambda file: False)  # as on a Drive
    folder, waited = left_by(tmp_path/"run", age, **changes), []
    def touched(seconds):
        waited.append(seconds)
        os.utime(folder/LOCK, (time.time() + len(waited),) * 2)
    monkeypatch.setattr(lock.time, "sleep", touched)
    if free:
        with only_run(folder): pass
    else:
        with pytest.raises(BlockingIOError, match="wait until two minutes after its end"), only_run(folder): pass
    assert (folder/LOCK).exists() is not free and bool(waited) is not free


@pytest.mark.parametrize("age, seconds", [(0, 120), (60, 60), (-60, 120)])
def test_a_machine_that_was_lost_a_moment_ago_is_waited_for(tmp_path, monkeypatch, age, seconds):
    "Whatever its clock says, it is lost when its lock stands still; the user sees a countdown."
    monkeypatch.setattr(lock, "try_flock", lambda file: False)
    folder, heard, now = left_by(tmp_path/"run", age, machine="another", boot="its own"), [], [time.monotonic()]
    monkeypatch.setattr(lock.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    with only_run(folder, lambda *told: heard.append(told)): pass
    whats, done, totals = zip(*heard)
    assert {*whats} == {f"Waiting {seconds} s: the run was alive on another machine a moment ago"}
    assert list(done) == sorted(done) and {*totals} == {seconds} and len(heard) in (seconds, seconds + 1)


@pytest.mark.parametrize("changes", [dict(machine="another"), dict(numbers="its own"), dict(process=999_999_999)])
def test_where_the_system_has_locks_they_decide_between_containers_of_one_host(tmp_path, changes):
    with only_run(left_by(tmp_path/"run", **changes)): pass


def test_the_lock_of_a_run_that_has_taken_over_stays_and_is_noticed(tmp_path, monkeypatch):
    "As after a night's sleep, on a Drive: the other saw a lock that nobody had touched."
    monkeypatch.setattr(lock, "try_flock", lambda file: False)
    monkeypatch.setattr(lock, "TOUCHED", 0.01)
    with pytest.warns(UserWarning, match="was taken over by another run.*End one of the two") as caught:
        with only_run(tmp_path):
            (tmp_path/LOCK).write_text(others := json.dumps({**this_run(), "machine": "another"}))
            until = time.monotonic() + 30
            while not caught.list and time.monotonic() < until: time.sleep(0.005)
    assert (tmp_path/LOCK).read_text() == others


def test_a_lock_that_says_nothing_stops_nobody(tmp_path):
    for content in ("", "{", "[1]", "of another tool"):
        (tmp_path/LOCK).write_text(content)
        with only_run(tmp_path): pass


def test_a_living_run_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "TOUCHED", 0.01)
    with only_run(tmp_path):
        os.utime(tmp_path/LOCK, (0, 0))
        until = time.monotonic() + 30
        while (tmp_path/LOCK).stat().st_mtime == 0 and time.monotonic() < until: time.sleep(0.01)
        assert (tmp_path/LOCK).stat().st_mtime > 0


def test_of_two_that_begin_at_once_one_runs(tmp_path):
    ran, refused, together = [], [], threading.Barrier(8)
    def begin():
        together.wait()
        try:
            with only_run(tmp_path/"new"/"run"):
                ran.append(1)
                finished.wait(60)
        except BlockingIOError:
            refused.append(1)
            if len(refused) == 7: finished.set()
    finished, threads = threading.Event(), [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join(60)
    assert (len(ran), len(refused)) == (1, 7) and not (tmp_path/"new"/"run"/LOCK).exists()


def test_an_error_of_a_drive_that_passes_stops_no_run(tmp_path, monkeypatch):
    errors = [OSError(errno.EIO, os.strerror(errno.EIO)), OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))]
    def fails_twice(*args, **kwargs):
        if errors: raise errors.pop()
        return open(*args, **kwargs)
    monkeypatch.setattr(lock, "open", fails_twice, raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with only_run(tmp_path): assert (tmp_path/LOCK).exists()
    assert errors == []


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path, monkeypatch):
    def fails(*args, **kwargs): raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    monkeypatch.setattr(lock, "open", fails, raising=False)
    with pytest.raises(PermissionError, match="The lock of .+ failed: you have no permission there"):
        with only_run(tmp_path): pass
