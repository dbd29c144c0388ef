"Google Drive: every fault, the line that the user reads, and what is left on disk."
import errno, json, os, re, stat, subprocess, sys, tempfile, threading, time

import psutil, pytest

from colab_gpt2 import archive_model, ask_for_drive
from colab_gpt2.core import atomic, discard, sha256_of
from colab_gpt2.engine.checkpoints import write_manifest
from colab_gpt2.errors import GONE, REMOUNT, fields_of
from colab_gpt2.storage.drive import copy_verified, mount_drive, restore_from_drive, save_to_drive
from colab_gpt2.tasks import save_or_say_why
from helpers import toys
from helpers.archives import archive, model, tree
from helpers.colab_stub import colab, environment, stub, watch_deletions


@pytest.fixture
def my_drive(colab): return mount_drive(colab.mountpoint)


# ---- mounting

@pytest.mark.parametrize("fault, kind, line", [
    (dict(authorization_denied=True), PermissionError,
     "Drive was not authorised (MessageError: Error: credential propagation was unsuccessful). Run mount_drive()"),
    (dict(mount_failed=True), OSError,
     f"Drive did not mount (mount failed). Wait a minute. {REMOUNT}."),
    (dict(mount_failed=": timeout during initial read of root folder"), OSError,
     "(mount failed: timeout during initial read of root folder)"),
    (dict(mount_timeout=True), TimeoutError, "Drive did not answer while mounting (TIMEOUT of pexpect).")])
def test_mount_that_fails(colab, capsys, fault, kind, line):
    with colab.faults(**fault), pytest.raises(kind, match=re.escape(line)) as e: mount_drive(colab.mountpoint)
    assert "\n" not in str(e.value) and not colab.mountpoint.exists()
    assert (e.value.errno == GONE) == ("mount_failed" in fault)  # the Drive panel mounts it again then
    assert mount_drive(colab.mountpoint) == colab.mountpoint/"MyDrive" and capsys.readouterr().out == ""


def test_a_folder_is_packed_before_it_is_saved(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file .* to save; `archive` packs a model"):
        save_to_drive(tmp_path, drive=tmp_path)


def test_the_drive_is_asked_for_before_the_work(colab):
    "Refused, which stops nothing; then allowed."
    with colab.faults(authorization_denied=True): said = ask_for_drive()
    assert said.startswith("Drive was not authorised") and len(said) > len("Drive was not authorised")
    assert ask_for_drive() == f"The Drive is mounted at {colab.mountpoint/'MyDrive'}."


def test_mountpoints_that_do_not_serve(colab, tmp_path):
    (tmp_path/"a b").mkdir()
    (tmp_path/"content/file").touch()
    for name, line in (("a b", "must not contain a space"), ("content", "must not already contain files"),
                       ("none/drive", "in a directory that exists")):
        place = re.escape(str(tmp_path/name))
        with pytest.raises(ValueError, match=rf"cannot be mounted at {place} \(.*{line}"): mount_drive(tmp_path/name)


def test_mounted_once_asked_once(colab):
    found = mount_drive(colab.mountpoint)
    asked = len(colab.stub.requests)
    assert mount_drive(colab.mountpoint) == mount_drive(found) == mount_drive(colab.mountpoint/"My Drive") == found
    assert len(colab.stub.requests) == asked


def test_mount_from_a_thread_is_refused(colab):
    caught = []
    def work():
        try: mount_drive(colab.mountpoint)
        except RuntimeError as e: caught.append(str(e))
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert caught == ["Drive can only be mounted from the main thread. Call mount_drive() in a cell of its own."]
    assert not colab.mountpoint.exists()


def test_in_a_subprocess_of_colab(stub, tmp_path):
    """A !command has no kernel to ask with; what is mounted already it may use."""
    with stub.pretend(kernel=False):
        with pytest.raises(RuntimeError, match="only be mounted from a cell, not from a script or a !command"):
            mount_drive(tmp_path/"drive")
        assert not (tmp_path/"drive").exists()
    with stub.pretend():
        mount_drive(tmp_path/"drive")
        code = f"from colab_gpt2 import mount_drive; print(mount_drive({str(tmp_path/'drive')!r}))"
        ran = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
        assert ran.stdout == f"{tmp_path/'drive/MyDrive'}\n"


def test_on_a_runtime_that_cannot_mount(stub, tmp_path, monkeypatch):
    """Colab's front end on a machine of the user's own, and a Colab machine without the package."""
    with stub.pretend(), monkeypatch.context() as patched:
        patched.delenv("COLAB_RELEASE_TAG")
        with pytest.raises(NotImplementedError, match="This runtime cannot mount Drive .NotImplementedError"):
            mount_drive(tmp_path/"drive")
        patched.setitem(sys.modules, "google.colab.drive", None)
        patched.delattr(sys.modules["google.colab"], "drive")
        with pytest.raises(RuntimeError, match="This runtime cannot mount Drive .(Import|ModuleNotFound)Error"):
            mount_drive(tmp_path/"drive")


@pytest.mark.parametrize("kaggle", [False, True])
def test_a_drive_that_cannot_exist_is_no_failure(stub, archive, monkeypatch, kaggle):
    "Nobody asked for one: Colab's Docker image on a machine of the user's own, and Kaggle."
    with stub.pretend(), monkeypatch.context() as patched:
        if kaggle: patched.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
        else: patched.delenv("COLAB_RELEASE_TAG")
        saved = save_or_say_why(archive.path, "colab-gpt2", None, progress=False)
    assert saved["path"] is None and saved["why"] and not saved["failed"]


def test_a_drive_that_was_refused_is_a_failure(colab, archive):
    with colab.faults(authorization_denied=True):
        assert save_or_say_why(archive.path, "colab-gpt2", None, progress=False)["failed"]


def test_a_mount_that_has_gone(colab, my_drive, archive):
    save_to_drive(archive, drive=my_drive, progress=False)
    with colab.faults(disconnected=True):
        advice = re.escape(f"Drive's mount has gone (errno 107). {REMOUNT}, then try again.")
        for action in (lambda: mount_drive(colab.mountpoint), lambda: save_to_drive(archive, drive=my_drive),
                       lambda: restore_from_drive("gpt2-tuned.tar.gz", archive.path.parent/"new", drive=my_drive)):
            with pytest.raises(OSError, match=advice) as e: action()
            assert e.value.errno == GONE == errno.ENOTCONN
        assert mount_drive(colab.mountpoint, force_remount=True) == my_drive
        assert save_to_drive(archive, drive=my_drive, progress=False).sha256 == archive.sha256
    assert list(tree(my_drive)) == ["colab-gpt2/gpt2-tuned.tar.gz"]


# ---- copying

@pytest.fixture
def old(my_drive):
    "An older archive of the same name on Drive."
    (my_drive/"colab-gpt2").mkdir()
    (my_drive/"colab-gpt2"/"gpt2-tuned.tar.gz").write_text("old")
    return my_drive/"colab-gpt2"/"gpt2-tuned.tar.gz"


@pytest.mark.parametrize("fault, line", [
    (dict(full=50_000), "failed: the disk, or Drive's quota, is full. Free some space"),
    (dict(full=0), "failed: the disk, or Drive's quota, is full. Free some space"),
    (dict(quota=4096), "Copying gpt2-tuned.tar.gz needs 2"),
    (dict(read_only=True), "failed: the folder is read-only."),
    (dict(io_error=True), "failed: an input/output error (errno 5)."),
    (dict(truncated=1200), "gpt2-tuned.tar.gz was truncated in transit: 1.2 kB of 2"),
    (dict(truncated=0), "gpt2-tuned.tar.gz was truncated in transit: 0 B of 2"),
    (dict(corrupted=True), "gpt2-tuned.tar.gz was corrupted in transit: its SHA-256 differs")])
def test_copy_that_fails_leaves_the_old_file(colab, archive, old, fault, line):
    with colab.faults(**fault), pytest.raises(OSError, match=re.escape(line)) as e:
        copy_verified(archive.path, old, wait=0, progress=False)
    assert "\n" not in str(e.value)
    assert tree(old.parent) == {"gpt2-tuned.tar.gz": b"old"}
    assert copy_verified(archive.path, old, progress=False).sha256 == sha256_of(old) == archive.sha256


@pytest.mark.parametrize("fault", ["io_error", "disconnected"])
def test_passing_errors_are_retried_a_few_times(colab, archive, old, fault):
    with colab.faults(**{fault: 2}):
        assert copy_verified(archive.path, old, wait=0, progress=False).sha256 == archive.sha256
    assert list(tree(old.parent)) == ["gpt2-tuned.tar.gz"]
    old.write_text("old")
    with colab.faults(**{fault: 1}), pytest.raises(OSError):
        copy_verified(archive.path, old, attempts=1, progress=False)
    assert tree(old.parent) == {"gpt2-tuned.tar.gz": b"old"}


def test_a_full_disk_is_not_retried(colab, archive, old):
    start = time.monotonic()
    with colab.faults(full=0), pytest.raises(OSError): copy_verified(archive.path, old, wait=60, progress=False)
    assert time.monotonic() - start < 30


def test_a_slow_drive_takes_its_time(colab, archive, my_drive):
    with colab.faults(slow=0.05): copy = copy_verified(archive.path, my_drive/"a.tar.gz", progress=False)
    assert copy.seconds >= 0.1 and sha256_of(copy.path) == copy.sha256 == archive.sha256


def test_what_is_there_already_is_not_written_again(colab, archive, my_drive):
    copy = copy_verified(archive.path, my_drive/"a.tar.gz", progress=False)
    before = copy.path.stat()
    with colab.faults(read_only=True): again = copy_verified(archive.path, copy.path, progress=False)
    assert again.sha256 == copy.sha256 and again.note == "It was there already, the same byte for byte."
    assert (copy.path.stat().st_mtime_ns, copy.path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_read_back_comes_from_the_disk(archive, tmp_path, monkeypatch):
    if not hasattr(os, "posix_fadvise"): pytest.skip("this system has no posix_fadvise")
    calls, fsync, fadvise = [], os.fsync, os.posix_fadvise
    monkeypatch.setattr(os, "fsync", lambda f: (calls.append("fsync"), fsync(f)))
    def advised(f, start, length, advice):
        calls.append(advice)
        fadvise(f, start, length, advice)
    monkeypatch.setattr(os, "posix_fadvise", advised)
    copy_verified(archive.path, tmp_path/"copy", progress=False)
    assert calls == ["fsync", os.POSIX_FADV_DONTNEED]


@pytest.fixture
def deleted(my_drive):
    "The sizes of a Drive's files when they are deleted, and of those that another takes the place of."
    replace = os.replace
    def replaced(source, path):
        if os.path.isfile(path): sizes.append(os.stat(path).st_size)
        replace(source, path)
    with pytest.MonkeyPatch.context() as patched:  # undone before the Drive is unmounted, whose own hooks these cover
        sizes = watch_deletions(patched)
        patched.setattr(os, "replace", replaced)
        yield sizes


def test_what_is_replaced_on_a_drive_reaches_the_trash_empty(colab, model, my_drive, archive, old, deleted):
    "An archive that is packed there, one that is copied there, a model that is saved again."
    for place in (old, my_drive/"b.tar.gz"): archive_model(model, place, overwrite=True, progress=False)
    copy_verified(archive.path, my_drive/"b.tar.gz", progress=False)  # the same bytes: nothing is written
    (my_drive/"b.tar.gz").write_text("another")
    copy_verified(archive.path, my_drive/"b.tar.gz", progress=False)
    for text in ("one", "two"):
        with atomic(my_drive/"run", folder=True) as folder: (folder/"model.safetensors").write_text(text)
    assert deleted == [0, 0, 0] and (my_drive/"run/model.safetensors").read_text() == "two"
    assert sorted(tree(my_drive)) == ["b.tar.gz", "colab-gpt2/gpt2-tuned.tar.gz", "run/model.safetensors"]


def test_what_an_error_leaves_half_written_on_a_drive_is_emptied(colab, my_drive, deleted):
    for folder in (False, True):
        with colab.faults(corrupted=True), pytest.raises(OSError, match="corrupted in transit"):
            with atomic(my_drive/"a", folder=folder) as target:
                (target/"weights" if folder else target).write_text("half of the weights")
    assert deleted == [0, 0] and os.listdir(my_drive) == []


def test_a_replacement_that_fails_puts_the_former_file_back(colab, my_drive, monkeypatch):
    (my_drive/"a.txt").write_text("old")
    def fails(source, path, replace=os.replace):
        if str(path).endswith("a.txt") and "former" not in str(source): raise OSError(errno.EIO, "Input/output error")
        replace(source, path)
    with monkeypatch.context() as patched, pytest.raises(OSError, match="Errno 5"):
        patched.setattr(os, "replace", fails)
        with atomic(my_drive/"a.txt") as file: file.write_text("new")
    assert tree(my_drive) == {"a.txt": b"old"}


def test_only_files_of_a_drive_with_one_name_are_emptied(tmp_path, colab, my_drive):
    "Not what a link leads to, what a backup shares, nor what this process reads through a map: it would crash."
    import mmap
    for place in (tmp_path, my_drive):
        (place/"kept").write_text("kept")
        (place/"run").mkdir()
        (place/"run/link").symlink_to(place/"kept")
        os.link(place/"kept", place/"run/shared")
    (my_drive/"run/mapped").write_text("mapped")
    with open(my_drive/"run/mapped", "rb") as file: view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    (my_drive/"way").symlink_to(my_drive/"run")
    for place in (tmp_path, my_drive): discard(place/"run")
    discard(my_drive/"way")
    assert view[:] == b"mapped" and [(place/"kept").read_text() for place in (tmp_path, my_drive)] == ["kept"] * 2
    assert os.listdir(my_drive) == ["kept"]


def test_temporaries_reach_the_trash_empty(colab, archive, old, monkeypatch):
    sizes, unlink = [], os.unlink
    leftover = old.with_name(f".{old.name}.another-vm-7.part")
    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", lambda path, **k: (sizes.append(os.stat(path).st_size), unlink(path, **k)))
        with colab.faults(corrupted=True), pytest.raises(OSError): copy_verified(archive.path, old, progress=False)
        leftover.write_text("half of an archive")
        os.utime(leftover, (0, time.time() - 25 * 3600))
        copy_verified(archive.path, old, progress=False)
    assert sizes == [0, 0, 0] and list(tree(old.parent)) == [old.name]  # the third is the former archive


def test_killed_in_the_middle(archive, tmp_path):
    """The destination stands; the next copy from this machine does its work."""
    (tmp_path/"drive").mkdir()
    (tmp_path/"drive/gpt2-tuned.tar.gz").write_text("old")
    code = f"""
import time
from colab_gpt2 import core
from colab_gpt2.storage import drive
core.sha256_of = lambda *args, **kwargs: (print("written", flush=True), time.sleep(60))
drive.copy_verified({str(archive.path)!r}, {str(tmp_path/'drive')!r}, progress=False)"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "written\n"
    process.kill()
    process.wait()
    process.stdout.close()
    left = tree(tmp_path/"drive")
    assert left.pop("gpt2-tuned.tar.gz") == b"old" and [n.endswith(".part") for n in left] == [True]
    copy_verified(archive.path, tmp_path/"drive", progress=False)
    assert sha256_of(tmp_path/"drive/gpt2-tuned.tar.gz") == archive.sha256


def test_a_file_that_had_made_way_when_a_process_was_killed_is_put_back(colab, archive, my_drive):
    (my_drive/".a.tar.gz.host-1-2.part.former").write_text("old")  # between the two renames
    with colab.faults(truncated=0), pytest.raises(OSError):
        copy_verified(archive.path, my_drive/"a.tar.gz", progress=False)
    assert tree(my_drive) == {"a.tar.gz": b"old"}


def test_interrupted_in_the_middle(archive, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr("colab_gpt2.core.sha256_of", interrupt)
    (tmp_path/"drive").mkdir()
    with pytest.raises(KeyboardInterrupt): copy_verified(archive.path, tmp_path/"drive", progress=False)
    assert os.listdir(tmp_path/"drive") == []


# ---- saving and restoring

def test_an_archive_that_was_cut_off_is_not_saved(archive, tmp_path):
    cut = tmp_path/"cut.tar.gz"
    cut.write_bytes(archive.path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="cut.tar.gz is truncated, corrupted or not a .tar.gz archive .*make it again"):
        save_to_drive(cut, drive=tmp_path/"drive", progress=False)
    assert not (tmp_path/"drive").exists()


def test_save_and_restore_on_colab(colab, archive, model, tmp_path, monkeypatch):
    saved = save_to_drive(archive, progress=False)
    assert saved.path == colab.mountpoint/"MyDrive"/"colab-gpt2"/"gpt2-tuned.tar.gz" and saved.sha256 == archive.sha256
    assert saved.note.startswith("Read back, but from this machine: Drive uploads in the background")
    again = save_to_drive(archive, drive=colab.mountpoint/"My Drive", flush=True, progress=False)
    assert again.path == saved.path and "there already" in again.note and "flushed and unmounted" in again.note
    assert os.listdir(colab.mountpoint) == []
    assert tree(restore_from_drive("gpt2-tuned.tar.gz", tmp_path/"back", progress=False)) == tree(model)
    path = colab.mountpoint/"My Drive/colab-gpt2/gpt2-tuned.tar.gz"
    assert tree(restore_from_drive(path, tmp_path/"back-2", progress=False)) == tree(model)


def test_the_note_says_what_was_replaced(colab, archive, my_drive, old):
    saved = save_to_drive(archive, drive=my_drive, overwrite=True, progress=False)
    note = "It replaced a file of the same name with other content (3 B). Read back, but from this machine"
    assert saved.path == old and saved.note.startswith(note)
    changed = bytearray(old.read_bytes())
    changed[-1] ^= 1
    old.write_bytes(changed)  # of the same size
    assert "It replaced a file" in save_to_drive(archive, drive=my_drive, overwrite=True, progress=False).note
    assert "replaced" not in save_to_drive(archive, drive=my_drive, progress=False).note
    old.unlink()
    assert "replaced" not in save_to_drive(archive, drive=my_drive, progress=False).note


def test_the_model_of_another_day_stays(colab, archive, my_drive, old):
    "Its archive has the same name, and lies where it is found; so does the second copy of the new one."
    before = old.read_bytes()
    for _ in range(2):
        saved = save_to_drive(archive, drive=my_drive, progress=False)
        assert saved.path == old.with_name("gpt2-tuned-2.tar.gz") and old.read_bytes() == before
        assert saved.note.startswith("gpt2-tuned.tar.gz is another file there and stays as it is. ")
        assert "Read back, but from this machine" in saved.note
    assert sorted(os.listdir(old.parent)) == ["gpt2-tuned-2.tar.gz", "gpt2-tuned.tar.gz"]


@pytest.mark.parametrize("drive, folder, line", [
    ("/proc/xx", "f", "Making /proc/xx failed: a file or folder is missing, or cannot be made there."),
    ("/proc", "xx", "to /proc/xx failed: a file or folder is missing, or cannot be made there."),
    ("{}/" + 300 * "x", "f", "characters long, too long for a path."),
    ("{}", 300 * "x", "characters long, too long for a path.")])
def test_a_folder_that_cannot_be_made(archive, tmp_path, drive, folder, line):
    if drive.startswith("/proc") and not sys.platform.startswith("linux"):
        pytest.skip("only Linux has a /proc in which nobody can make a folder")
    kinds = ValueError if "long" in line else OSError
    with pytest.raises(kinds) as e: save_to_drive(archive, folder, drive=drive.format(tmp_path), progress=False)
    assert line in str(e.value) and "\n" not in str(e.value) and (kinds is ValueError or e.value.errno)


def test_flush_that_fails(colab, archive, my_drive):
    line = r"Drive did not confirm its uploads \(ValueError: flush_and_unmount failed\)"
    with colab.faults(flush_failed=True), pytest.raises(OSError, match=line):
        save_to_drive(archive, drive=my_drive, flush=True, progress=False)
    assert sha256_of(my_drive/"colab-gpt2/gpt2-tuned.tar.gz") == archive.sha256


@pytest.mark.parametrize("place, line", [
    ("content/drive/MyDrive", "Drive is not mounted: there is no folder {}. Run mount_drive() in a cell first."),
    ("content/drive", "Drive is not mounted: there is no folder {}/MyDrive. Run mount_drive() in a cell first."),
    ("content/usb", "There is no folder {}. Run mount_drive() in a cell first")])
def test_drive_not_mounted_is_not_made_on_the_local_disk(colab, archive, tmp_path, place, line):
    (tmp_path/"content").mkdir(exist_ok=True)
    for action in (lambda: save_to_drive(archive, drive=tmp_path/place),
                   lambda: restore_from_drive("a.tar.gz", tmp_path/"new", drive=tmp_path/place)):
        with pytest.raises(FileNotFoundError, match=re.escape(line.format(tmp_path/place))): action()
    assert os.listdir(tmp_path/"content") == [] and not (tmp_path/"new").exists()


def test_not_mounted_when_copying_there(archive, tmp_path):
    with pytest.raises(FileNotFoundError, match="Drive is not mounted"):
        copy_verified(archive.path, tmp_path/"drive/My Drive/x.tar.gz")
    assert not (tmp_path/"drive").exists()


def test_outside_colab_a_folder_serves(archive, model, tmp_path):
    saved = save_to_drive(archive, drive=tmp_path/"plays"/"Drive", progress=False)
    assert saved.path == tmp_path/"plays/Drive/colab-gpt2/gpt2-tuned.tar.gz" and saved.note == ""
    back = restore_from_drive("gpt2-tuned.tar.gz", tmp_path/"back", drive=tmp_path/"plays/Drive", progress=False)
    assert tree(back) == tree(model)
    for action in (mount_drive, lambda: save_to_drive(archive)):
        with pytest.raises(FileNotFoundError, match="Google Drive can be mounted on Colab only") as e: action()
        assert fields_of(e.value) == ("drive",)


@pytest.mark.parametrize("name", ["none", "missing/file", "../none.tar.gz", "/none.tar.gz", "~/none.tar.gz"])
def test_a_file_that_is_missing_is_not_looked_for_on_a_drive_that_is_not_there(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=re.escape(f"There is no archive {name} here")) as e:
        restore_from_drive(name, tmp_path/"new")
    assert fields_of(e.value) == ("drive",) and "Google" not in str(e.value)


def test_a_path_that_leads_out_of_the_drive_is_no_reason_to_mount_it(colab, tmp_path):
    asked = len(colab.stub.requests)
    with pytest.raises(FileNotFoundError, match="There is no archive /none.tar.gz here"):
        restore_from_drive("/none.tar.gz", tmp_path/"new")
    assert len(colab.stub.requests) == asked


def test_archive_that_was_changed_after_it_was_made(archive, tmp_path):
    with open(archive.path, "ab") as f: f.write(b"x")
    with pytest.raises(OSError, match="was changed after it was made"):
        save_to_drive(archive, drive=tmp_path/"drive", progress=False)


def test_restoring_a_damaged_or_unreadable_archive(colab, archive, my_drive, tmp_path):
    saved = save_to_drive(archive, drive=my_drive, progress=False)
    with colab.faults(io_error=True), pytest.raises(OSError, match="errno 5"):
        restore_from_drive(saved.path, tmp_path/"new", progress=False)
    os.truncate(saved.path, 1200)
    with pytest.raises(ValueError, match=f"{re.escape(str(saved.path))} is truncated, corrupted"):
        restore_from_drive(saved.path, tmp_path/"new", progress=False)
    assert not [*tmp_path.glob("new"), *tmp_path.glob(".restoring-*"), *tmp_path.glob(".new*")]
    known = r"There is no archive gpt2.tar.gz in .* Did you mean 'gpt2-tuned.tar.gz'\?"
    with pytest.raises(FileNotFoundError, match=known):
        restore_from_drive("gpt2.tar.gz", tmp_path/"new", drive=my_drive)


def test_records_are_for_people_and_programs(archive, tmp_path):
    saved = save_to_drive(archive, drive=tmp_path/"drive", progress=False)
    facts = json.loads(json.dumps(archive.to_dict()))
    assert facts.pop("files") == ["config.json", "model.safetensors"]
    assert facts == {"path": str(archive.path), "bytes": archive.bytes, "sha256": archive.sha256}
    assert set(saved.to_dict()) == {"path", "bytes", "sha256", "seconds", "note"}
    for record in (archive, saved): assert record.sha256 in record._repr_html_()


# ---- checkpoints on the Drive

@pytest.fixture
def small_run():
    "A function that saves the checkpoint of a step of a small run into a folder."
    from colab_gpt2.measuring import in_one_line
    def make(folder):
        trainer = toys.small_trainer(folder)
        def save(step):
            with in_one_line(trainer.args.output_dir): toys.save(trainer, step)
        return save
    return make


@pytest.fixture
def save(my_drive, small_run, monkeypatch):
    "The same, into `run` on the Drive; `waits` has the seconds between attempts."
    save = small_run(my_drive/"run")
    save.waits = []
    monkeypatch.setattr("time.sleep", save.waits.append)
    return save


@pytest.mark.parametrize("fault", [
    dict(io_error=1), dict(io_error=5), dict(disconnected=1), dict(disconnected=5), dict(slow=1),
    dict(bytes_per_second=1e4)])
def test_a_checkpoint_reaches_a_drive_that_fails_for_a_while(colab, my_drive, save, fault):
    with colab.faults(**fault): save(1)
    assert toys.newest(my_drive/"run") == my_drive/"run/checkpoint-1"
    assert [name for name in os.listdir(my_drive/"run") if name.startswith(".")] == []


@pytest.mark.parametrize("mount, back", [("drive", True), ("drive", False), ("gdrive", True), ("gdrive", False)])
def test_a_drive_that_is_unmounted_while_a_checkpoint_is_written(colab, tmp_path, small_run, monkeypatch, mount, back):
    "Mounted again meanwhile, it gets it; else nothing is written in the place of the Drive, where it would be lost."
    from google.colab import drive
    drive.mount(str(tmp_path/"content"/mount))
    folder, waits = tmp_path/"content"/mount/"MyDrive"/"run", []
    save = small_run(folder)
    save(1)
    def wait(seconds):
        waits.append(seconds)
        if back and len(waits) == 3: drive.mount(str(tmp_path/"content"/mount))
    monkeypatch.setattr("time.sleep", wait)
    write = toys.BlockTrainer.save_once
    def unmounts(trainer, *args):
        def written(*args, **how): write_manifest(*args, **how), unmount()
        monkeypatch.setattr("colab_gpt2.engine.trainer.write_manifest", written)
        return write(trainer, *args)
    def unmount():
        if not waits: drive.flush_and_unmount()
    monkeypatch.setattr(toys.BlockTrainer, "save_once", unmounts)
    if back: save(2)
    else:
        with pytest.raises(OSError, match="mount has gone .errno 107."): save(2)
        assert os.listdir(tmp_path/"content"/mount) == []
        drive.mount(str(tmp_path/"content"/mount))
    assert toys.newest(folder).name == f"checkpoint-{2 if back else 1}"


@pytest.mark.parametrize("fault, line", [
    (dict(io_error=True), "an input/output error (errno 5)"), (dict(disconnected=True), "mount has gone (errno 107)"),
    (dict(truncated=1000), "truncated in transit"), (dict(truncated=0), "truncated in transit"),
    (dict(corrupted=True), "corrupted in transit"), (dict(full=3000), "is full. Kept: checkpoint-1."),
    (dict(full=0), "is full. Kept: "), (dict(quota=4096), "is full. Kept: "),
    (dict(over_quota=True), "Drive's quota, is full"),
    (dict(denied=True), "no permission"), (dict(read_only=True), "the folder is read-only")])
def test_a_checkpoint_that_does_not_reach_the_drive_is_no_success(colab, my_drive, save, fault, line):
    "The older one stays as it was, in full; when the Drive has recovered, the next one arrives."
    save(1)
    before = tree(my_drive/"run")
    with colab.faults(**fault), pytest.raises(OSError, match=re.escape(line)) as e: save(2)
    assert "\n" not in str(e.value) and "[Errno" not in str(e.value) and ".part" not in str(e.value)
    assert tree(my_drive/"run").items() >= before.items() and toys.newest(my_drive/"run").name == "checkpoint-1"
    assert len(save.waits) == (5 if True in fault.values() and {*fault} & {"io_error", "disconnected"} else 0)
    save(3)
    assert toys.newest(my_drive/"run").name == "checkpoint-3"


def test_what_a_killed_process_staged_for_a_drive_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path/"here"))
    left = tmp_path/"here"/".checkpoint-2.999999999.abcdefgh.part"
    (left/"checkpoint-2").mkdir(parents=True)
    (left/"checkpoint-2/optimizer.pt").write_text("half")
    with atomic(tmp_path/"MyDrive/a.txt") as file: file.write_text("tide")
    assert os.listdir(tmp_path/"here") == [] and tree(tmp_path/"MyDrive") == {"a.txt": b"tide"}


def test_what_another_process_tidies_up_meanwhile_stops_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path/"here"))
    theirs = tmp_path/"here"/f".checkpoint-2.{os.getpid()}.abcdefgh.part"
    theirs.mkdir(parents=True)
    real = psutil.Process
    monkeypatch.setattr(psutil, "Process", lambda number: theirs.exists() and theirs.rmdir() or real(number))
    with atomic(tmp_path/"MyDrive/a.txt") as file: file.write_text("tide")
    assert not theirs.exists() and tree(tmp_path/"MyDrive") == {"a.txt": b"tide"}


def test_a_file_system_that_syncs_no_folders_takes_checkpoints_too(tmp_path, monkeypatch):
    def fsync(number, real=os.fsync):
        if stat.S_ISDIR(os.fstat(number).st_mode): raise OSError(errno.EINVAL, "Invalid argument")
        real(number)
    monkeypatch.setattr(os, "fsync", fsync)
    toys.save(toys.small_trainer(tmp_path/"run"), 1)
    assert toys.newest(tmp_path/"run") == tmp_path/"run/checkpoint-1"


# ---- a run whose folder is on the Drive

@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, articles in (("train", 60), ("eval", 12)):
        page = f" = {name} = \n \n The tide came in at noon and went out again . \n"
        (folder/f"{name}.txt").write_text(page * articles)
    return folder


@pytest.fixture
def train(texts, my_drive):
    "Fine-tune for three steps into `run` on the Drive; after the first checkpoint the Drive has the `faults`."
    from transformers import TrainerCallback
    from colab_gpt2 import finetune
    def run(faults=None, **changes):
        class Breaks(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 2 and faults: sys.modules["google.colab._stub"].faults.set(**faults)
        files = {f"{name}_file": str(texts/f"{name}.txt") for name in ("train", "eval")}
        options = dict(model="tiny", block_size=64, max_steps=3, save_steps=1, save_total_limit=1, max_new_tokens=1,
                       precision="fp32", cache_dir=str(texts/"cache"), output_dir=str(my_drive/"run"), mirror="off",
                       **files)
        return finetune(**{**options, **changes}, callbacks=[Breaks()], progress=False)
    return run


def test_a_run_fills_no_trash_and_outlasts_a_passing_error(colab, my_drive, train, deleted, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    train(dict(io_error=2))
    names = os.listdir(my_drive/"run")
    assert "model.safetensors" in names and [n for n in names if n.startswith("checkpoint")] == ["checkpoint-3"]
    train(overwrite_output_dir=True, max_steps=1)
    assert deleted and set(deleted) == {0}


@pytest.mark.parametrize("faults, line", [
    (dict(disconnected=True), "failed: Drive's mount has gone (errno 107)."),
    (dict(truncated=1000), "was truncated in transit: 1.0 kB of "), (dict(full=3000), "is full. Kept: checkpoint-1.")])
def test_a_run_ends_in_one_line_when_its_drive_fails(colab, my_drive, train, faults, line, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(OSError) as e: train(faults)
    assert line in str(e.value) and str(my_drive/"run") in str(e.value)
    assert "\n" not in str(e.value) and "[Errno" not in str(e.value)
    colab.faults.set(**dict.fromkeys(faults, False if "disconnected" in faults else None))
    assert [n for n in os.listdir(my_drive/"run") if not n.startswith(".")] == ["checkpoint-1"]


@pytest.mark.parametrize("faults, line", [
    (dict(disconnected=True), "Drive's mount has gone (errno 107)"), (dict(read_only=True), "cannot be written to"),
    (dict(quota=1_000_000), "The run needs")])
def test_a_run_does_not_start_on_a_drive_that_fails(colab, my_drive, train, faults, line):
    with colab.faults(**faults), pytest.raises(OSError, match=re.escape(line)) as e: train()
    assert "\n" not in str(e.value) and "[Errno" not in str(e.value)


def test_a_finished_run_that_is_resumed_has_the_same_archive(my_drive, train):
    "Nothing is copied to the Drive again."
    train(max_steps=1)
    first = archive_model(my_drive/"run", my_drive/"a.tar.gz", progress=False)
    train(max_steps=1)
    assert archive_model(my_drive/"run", my_drive/"a.tar.gz", overwrite=True, progress=False) == first
