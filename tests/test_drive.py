"Archives and Drive: every fault, the line that the user reads, and what is left on disk."
import errno, io, json, os, re, shutil, subprocess, sys, tarfile, threading, time, tracemalloc
from pathlib import Path

import pytest

from colab_gpt2 import ask_for_drive
from colab_gpt2.storage import archives
from colab_gpt2.storage.archives import archive_model, check_archive_path, extract_archive
from colab_gpt2.core import sha256_of
from colab_gpt2.storage.drive import copy_verified, mount_drive, restore_from_drive, save_to_drive
from helpers.colab_stub import colab, environment, stub

def tree(folder):
    "name -> content of all the files below `folder`; a temporary that was left would show."
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def make_model(folder, size=200_000):
    "A folder that holds a model whose weights have `size` bytes that do not shrink (of which at most 1 MB is not zero)."
    folder.mkdir(parents=True)
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with open(folder/"model.safetensors", "wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        f.write(os.urandom(min(size, 1 << 20)))
        f.truncate(8 + len(header) + size)
    (folder/"config.json").write_text("{}")
    return folder


@pytest.fixture
def model(tmp_path): return make_model(tmp_path/"output")


@pytest.fixture
def archive(model, tmp_path): return archive_model(model, tmp_path/"gpt2-tuned.tar.gz", progress=False)


@pytest.fixture
def my_drive(colab): return mount_drive(colab.mountpoint)


def peak_of(action):
    "Bytes of Python memory that `action` needed at its peak."
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()


# ---- archives

def test_same_bytes_from_another_place_time_umask_and_user(archive, model, tmp_path):
    other = shutil.copytree(model, tmp_path/"elsewhere"/"named otherwise", copy_function=shutil.copyfile)
    for path in other.iterdir(): path.chmod(0o600)
    code = f"import os; os.umask(0o077); from colab_gpt2 import archive_model; archive_model({str(other)!r}, 'x.tar.gz', progress=False)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={**os.environ, "TZ": "Asia/Tokyo", "LC_ALL": "C"})
    assert (tmp_path/"x.tar.gz").read_bytes() == archive.path.read_bytes()


def test_memory_does_not_grow_with_the_model(tmp_path):
    model = make_model(tmp_path/"output", 64 << 20)
    assert peak_of(lambda: archive_model(model, tmp_path/"a.tar.gz", progress=False)) < 8 << 20
    assert peak_of(lambda: extract_archive(tmp_path/"a.tar.gz", tmp_path/"back", progress=False)) < 8 << 20
    assert peak_of(lambda: copy_verified(model/"model.safetensors", tmp_path/"copy", progress=False)) < 8 << 20
    assert sha256_of(tmp_path/"back/model.safetensors") == sha256_of(model/"model.safetensors") == sha256_of(tmp_path/"copy")


def test_a_link_to_a_file_is_packed_as_the_file(model, tmp_path):
    """The Hub's cache is a folder of links into another."""
    (tmp_path/"blob").write_text("content")
    (model/"vocab.json").symlink_to(tmp_path/"blob")
    archive_model(model, tmp_path/"a.tar.gz", progress=False)
    back = extract_archive(tmp_path/"a.tar.gz", tmp_path/"back", progress=False)
    assert not (back/"vocab.json").is_symlink() and (back/"vocab.json").read_text() == "content"


def test_packed_inside_its_own_folder(model):
    first = archive_model(model, model/"gpt2-tuned.tar.gz", progress=False)
    assert archive_model(model, model/"gpt2-tuned.tar.gz", overwrite=True, progress=False) == first
    assert first.files == ("config.json", "model.safetensors")


@pytest.mark.parametrize("name, line", [("config.json", "holds no whole model: it has no config.json."), ("model.safetensors", "holds no whole model: it has no *.safetensors.")])
def test_no_model_no_archive(model, tmp_path, name, line):
    (model/name).unlink()
    (tmp_path/"a.tar.gz").write_text("old")
    with pytest.raises(FileNotFoundError, match=re.escape(f"{model} {line} Give the output folder of a finished fine-tuning.")): archive_model(model, tmp_path/"a.tar.gz")
    assert tree(tmp_path)["a.tar.gz"] == b"old"


@pytest.mark.parametrize("name, overwrite, kind, line", [
    ("notes.tar.gz", False, FileExistsError, "{} exists. Give another path, or overwrite=True to replace it."),
    ("dangling.tgz", False, FileExistsError, "{} exists. Give another path, or overwrite=True to replace it."),
    ("notes.txt", True, ValueError, "{} is no name for an archive: it must end in .tar.gz or .tgz, such as notes.txt.tar.gz."),
    ("output/model.safetensors", True, ValueError, "{} is no name for an archive: it must end in .tar.gz or .tgz, such as model.safetensors.tar.gz."),
    ("output", True, IsADirectoryError, "{0} is a folder; name a file, such as {0}/gpt2-tuned.tar.gz.")])
def test_no_file_is_replaced_unasked(model, tmp_path, name, overwrite, kind, line):
    for known in ("notes.tar.gz", "notes.txt"): (tmp_path/known).write_text("a year of notes")
    (tmp_path/"dangling.tgz").symlink_to(tmp_path/"elsewhere")
    before = tree(tmp_path)
    for action in (lambda: check_archive_path(tmp_path/name, overwrite), lambda: archive_model(model, tmp_path/name, overwrite=overwrite, progress=False)):
        with pytest.raises(kind) as e: action()
        assert str(e.value) == line.format(tmp_path/name) and tree(tmp_path) == before and (tmp_path/"dangling.tgz").is_symlink()


def test_replaced_when_that_is_said(archive, model, tmp_path):
    (tmp_path/"b.tgz").write_text("old")
    assert archive_model(model, tmp_path/"b.tgz", overwrite=True, progress=False).sha256 == archive.sha256 == sha256_of(tmp_path/"b.tgz")


@pytest.mark.parametrize("checkpoints", [False, True])
def test_leftovers_of_a_killed_save_are_not_packed(archive, model, tmp_path, checkpoints):
    for name in (".saving.abc", "samples/.saving.def"): make_model(model/name, 1000)
    os.truncate(model/".saving.abc"/"model.safetensors", 10)
    for name in (".DS_Store", "._model.safetensors"): (model/name).write_text("x")
    again = archive_model(model, tmp_path/"b.tar.gz", checkpoints=checkpoints, progress=False)
    assert again.files == ("config.json", "model.safetensors") and again.sha256 == archive.sha256


def test_half_written_model_is_not_packed(model, tmp_path):
    os.truncate(model/"model.safetensors", 1000)
    with pytest.raises(ValueError, match="model.safetensors is half written or damaged"): archive_model(model, tmp_path/"a.tar.gz")
    assert not (tmp_path/"a.tar.gz").exists()


@pytest.mark.parametrize("fault, line", [(dict(full=50_000), "the disk, or Drive's quota, is full"), (dict(read_only=True), "the folder is read-only"),
                                         (dict(io_error=True), "an input/output error (errno 5)"), (dict(quota=1000), "has 0 B free")])
def test_archive_that_cannot_be_written(colab, model, my_drive, fault, line):
    (my_drive/"a.tar.gz").write_text("old")
    with colab.faults(**fault), pytest.raises(OSError, match=re.escape(line)) as e: archive_model(model, my_drive/"a.tar.gz", overwrite=True, progress=False)
    assert f"Packing {model} into {my_drive/'a.tar.gz'}" in str(e.value) and "\n" not in str(e.value)
    assert tree(my_drive) == {"a.tar.gz": b"old"}


def test_progress_is_on_stderr_and_can_be_turned_off(model, tmp_path, capsys):
    archive_model(model, tmp_path/"a.tar.gz", progress=False)
    assert capsys.readouterr() == ("", "")
    archive = archive_model(model, tmp_path/"a.tar.gz", overwrite=True)
    copy_verified(archive.path, tmp_path/"b.tar.gz")
    out, err = capsys.readouterr()
    assert out == "" and "packing a.tar.gz: 100%" in err and "copying a.tar.gz: 100%" in err


# ---- unpacking what others made

def evil(path, **fields):
    "An archive of a good file and then one with `fields`."
    with tarfile.open(path, "w:gz") as tar:
        for kind in (dict(name="config.json"), fields):
            member = tarfile.TarInfo()
            for name, value in kind.items(): setattr(member, name, value)
            member.size = 2 if member.isreg() else 0
            tar.addfile(member, io.BytesIO(b"{}"))
    return path


EVIL = [(dict(name="/etc/evil"), "an absolute path"), (dict(name="../evil"), "a path with .."), (dict(name="a/../../evil"), "a path with .."),
        (dict(name="C:\\evil"), "an absolute path"), (dict(name="..\\evil"), "a path with .."),
        (dict(name="link", type=tarfile.SYMTYPE, linkname="config.json"), "a link"), (dict(name="link", type=tarfile.SYMTYPE, linkname="/etc"), "a link"),
        (dict(name="link", type=tarfile.LNKTYPE, linkname="config.json"), "a link"), (dict(name="null", type=tarfile.CHRTYPE, devmajor=1, devminor=3), "a device file"),
        (dict(name="disk", type=tarfile.BLKTYPE), "a device file"), (dict(name="pipe", type=tarfile.FIFOTYPE), "a device file"),
        (dict(name="config.json"), "there twice"), (dict(name="config.json/x"), "a file inside a file")]


@pytest.mark.parametrize("fields, reason", EVIL, ids=[f"{i}-{reason}" for i, (_, reason) in enumerate(EVIL)])
@pytest.mark.parametrize("filtered", [True, False], ids=["with data_filter", "as before 3.10.12"])
def test_evil_archives_write_nothing(tmp_path, monkeypatch, fields, reason, filtered):
    if not filtered: monkeypatch.delattr(tarfile, "data_filter", raising=False)
    (tmp_path/"in").mkdir()
    path = evil(tmp_path/"in"/"evil.tar.gz", **fields)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"{path} holds {fields['name']!r}, which is {reason}. Nothing was unpacked")): extract_archive(path, tmp_path/"in"/"new")
    assert tree(tmp_path) == before and os.listdir(tmp_path/"in") == ["evil.tar.gz"]


def test_pythons_own_filter_is_asked_too(tmp_path, monkeypatch):
    if not hasattr(tarfile, "data_filter"): pytest.skip("this Python has no tarfile.data_filter")
    def refuse(member, folder): raise tarfile.SpecialFileError(member)
    monkeypatch.setattr(tarfile, "data_filter", refuse)
    with pytest.raises(ValueError, match="is a special file. Nothing was unpacked"): extract_archive(evil(tmp_path/"a.tar.gz", name="b"), tmp_path/"new")


def test_modes_and_owners_of_an_archive_do_not_come_along(tmp_path):
    extract_archive(evil(tmp_path/"a.tar.gz", name="x", mode=0o6777, uid=12345, gid=12345), tmp_path/"new", progress=False)
    status, mask = (tmp_path/"new"/"x").stat(), archives.current_umask()
    assert status.st_mode & 0o7777 == 0o666 & ~mask and (tmp_path/"new").stat().st_mode & 0o777 == 0o777 & ~mask
    assert (status.st_uid, status.st_gid) == (os.getuid(), os.getgid())


def test_an_archive_made_by_tar(model, tmp_path):
    if not shutil.which("tar"): pytest.skip("there is no tar here")
    subprocess.run(["tar", "-czf", tmp_path/"2020.tar.gz", "-C", tmp_path, "output/"], check=True)
    assert tree(extract_archive(tmp_path/"2020.tar.gz", tmp_path/"back", progress=False)/"output") == tree(model)


def test_unpacked_into_an_empty_folder_that_stays_the_same(archive, tmp_path, monkeypatch):
    (tmp_path/"here").mkdir()
    monkeypatch.chdir(tmp_path/"here")
    extract_archive(archive.path, ".", progress=False)
    assert sorted(os.listdir()) == ["config.json", "model.safetensors"]
    with pytest.raises(FileExistsError, match="is not empty, and nothing in it will be overwritten"): extract_archive(archive.path, ".")


@pytest.mark.parametrize("cut", [0, 1, 100, 100_000, -1])
def test_archive_that_was_cut_off(archive, tmp_path, cut):
    (tmp_path/"cut.tar.gz").write_bytes(archive.path.read_bytes()[:cut])
    with pytest.raises(ValueError, match="cut.tar.gz is not a whole .tar.gz archive .* Make or copy it again."): extract_archive(tmp_path/"cut.tar.gz", tmp_path/"new")
    assert not (tmp_path/"new").exists() and not list(tmp_path.glob(".new*"))


@pytest.mark.parametrize("fault, line", [(dict(full=100_000), "the disk, or Drive's quota, is full"), (dict(read_only=True), "the folder is read-only"),
                                         (dict(quota=1000), "needs 200.1 kB and")])
def test_unpacking_that_cannot_be_written(colab, archive, my_drive, fault, line):
    with colab.faults(**fault), pytest.raises(OSError, match=re.escape(line)): extract_archive(archive.path, my_drive/"new", progress=False)
    assert os.listdir(my_drive) == []


# ---- mounting

@pytest.mark.parametrize("fault, kind, line", [
    (dict(authorization_denied=True), PermissionError, "Drive was not authorised (MessageError: Error: credential propagation was unsuccessful). Run mount_drive() again"),
    (dict(mount_failed=True), OSError, "Drive did not mount (mount failed). Wait a minute. Mount it again, by Mount in the panel or mount_drive(force_remount=True) in a cell."),
    (dict(mount_failed=": timeout during initial read of root folder"), OSError, "(mount failed: timeout during initial read of root folder)"),
    (dict(mount_timeout=True), TimeoutError, "Drive did not answer while mounting (TIMEOUT of pexpect).")])
def test_mount_that_fails(colab, capsys, fault, kind, line):
    with colab.faults(**fault), pytest.raises(kind, match=re.escape(line)) as e: mount_drive(colab.mountpoint)
    assert "\n" not in str(e.value) and not colab.mountpoint.exists()
    assert mount_drive(colab.mountpoint) == colab.mountpoint/"MyDrive" and capsys.readouterr().out == ""


def test_the_drive_is_asked_for_before_the_work(colab, monkeypatch):
    "Refused, which stops nothing; then allowed."
    monkeypatch.setattr("colab_gpt2.storage.drive.mount_drive", lambda: mount_drive(colab.mountpoint))  # /content/drive is not ours to make
    with colab.faults(authorization_denied=True): said = ask_for_drive()
    assert said.startswith("Drive was not authorised") and said.endswith("Everything else works without it, and the last step asks again.")
    assert ask_for_drive() == f"The Drive is mounted at {colab.mountpoint/'MyDrive'}."


def test_mountpoints_that_do_not_serve(colab, tmp_path):
    (tmp_path/"a b").mkdir()
    for name, line in (("a b", "must not contain a space"), ("content", "must not already contain files"), ("none/drive", "in a directory that exists")):
        (tmp_path/"content/file").touch()
        with pytest.raises(ValueError, match=f"Drive cannot be mounted at {re.escape(str(tmp_path/name))}: .*{line}. Use mount_drive"): mount_drive(tmp_path/name)


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
    assert caught == ["Drive can only be mounted from the main thread. Call mount_drive() in a cell of its own."] and not colab.mountpoint.exists()


def test_in_a_subprocess_of_colab(stub, tmp_path):
    """A !command has no kernel to ask with; what is mounted already it may use."""
    with stub.pretend(kernel=False):
        with pytest.raises(RuntimeError, match="Drive can only be mounted from a cell of the notebook, not from a script or a !command"): mount_drive(tmp_path/"drive")
        assert not (tmp_path/"drive").exists()
    with stub.pretend():
        mount_drive(tmp_path/"drive")
        code = f"from colab_gpt2 import mount_drive; print(mount_drive({str(tmp_path/'drive')!r}))"
        assert subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True).stdout == f"{tmp_path/'drive/MyDrive'}\n"


def test_on_a_runtime_that_cannot_mount(stub, tmp_path, monkeypatch):
    """Colab's front end on a machine of the user's own, and a Colab machine without the package."""
    with stub.pretend(), monkeypatch.context() as patched:
        patched.delenv("COLAB_RELEASE_TAG")
        with pytest.raises(RuntimeError, match="This runtime cannot mount Drive .NotImplementedError"): mount_drive(tmp_path/"drive")
        patched.setitem(sys.modules, "google.colab.drive", None)
        patched.delattr(sys.modules["google.colab"], "drive")
        with pytest.raises(RuntimeError, match="This runtime cannot mount Drive .(Import|ModuleNotFound)Error"): mount_drive(tmp_path/"drive")


def test_a_mount_that_has_gone(colab, my_drive, archive):
    save_to_drive(archive, drive=my_drive, progress=False)
    with colab.faults(disconnected=True):
        for action in (lambda: mount_drive(colab.mountpoint), lambda: save_to_drive(archive, drive=my_drive), lambda: restore_from_drive("gpt2-tuned.tar.gz", archive.path.parent/"new", drive=my_drive)):
            with pytest.raises(OSError, match=r"Drive's mount has gone \(errno 107\). Mount it again, by Mount in the panel or mount_drive\(force_remount=True\) in a cell; then try again.") as e: action()
            assert e.value.errno == errno.ENOTCONN
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
    (dict(truncated=1200), "gpt2-tuned.tar.gz did not arrive whole: 1.2 kB of 2"),
    (dict(truncated=0), "gpt2-tuned.tar.gz did not arrive whole: 0 B of 2"),
    (dict(corrupted=True), "gpt2-tuned.tar.gz arrived changed: its SHA-256 differs when read back")])
def test_copy_that_fails_leaves_the_old_file(colab, archive, old, fault, line):
    with colab.faults(**fault), pytest.raises(OSError, match=re.escape(line)) as e: copy_verified(archive.path, old, wait=0, progress=False)
    assert "\n" not in str(e.value)
    assert tree(old.parent) == {"gpt2-tuned.tar.gz": b"old"}
    assert copy_verified(archive.path, old, progress=False).sha256 == sha256_of(old) == archive.sha256


@pytest.mark.parametrize("fault", ["io_error", "disconnected"])
def test_passing_errors_are_retried_a_few_times(colab, archive, old, fault):
    with colab.faults(**{fault: 2}): assert copy_verified(archive.path, old, wait=0, progress=False).sha256 == archive.sha256
    assert list(tree(old.parent)) == ["gpt2-tuned.tar.gz"]
    old.write_text("old")
    with colab.faults(**{fault: 1}), pytest.raises(OSError): copy_verified(archive.path, old, attempts=1, progress=False)
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
    monkeypatch.setattr(os, "posix_fadvise", lambda f, start, length, advice: (calls.append(advice), fadvise(f, start, length, advice)))
    copy_verified(archive.path, tmp_path/"copy", progress=False)
    assert calls == ["fsync", os.POSIX_FADV_DONTNEED]


def test_temporaries_reach_the_trash_empty(colab, archive, old, monkeypatch):
    sizes, unlink = [], os.unlink
    leftover = old.with_name(f".{old.name}.another-vm-7.part")
    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", lambda path, **k: (sizes.append(os.stat(path).st_size), unlink(path, **k)))
        with colab.faults(corrupted=True), pytest.raises(OSError): copy_verified(archive.path, old, progress=False)
        leftover.write_text("half of an archive")
        os.utime(leftover, (0, time.time() - 25 * 3600))
        copy_verified(archive.path, old, progress=False)
    assert sizes == [0, 0] and list(tree(old.parent)) == [old.name]


def test_killed_in_the_middle(archive, tmp_path):
    """The destination stands; the next copy from this machine does its work."""
    (tmp_path/"drive").mkdir()
    (tmp_path/"drive/gpt2-tuned.tar.gz").write_text("old")
    code = f"""
import time
from colab_gpt2.storage import drive
drive.sha256_of = lambda *args, **kwargs: (print("written", flush=True), time.sleep(60))
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


def test_interrupted_in_the_middle(archive, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr("colab_gpt2.storage.drive.sha256_of", interrupt)
    (tmp_path/"drive").mkdir()
    with pytest.raises(KeyboardInterrupt): copy_verified(archive.path, tmp_path/"drive", progress=False)
    assert os.listdir(tmp_path/"drive") == []


# ---- saving and restoring

def test_save_and_restore_on_colab(colab, archive, model, tmp_path, monkeypatch):
    monkeypatch.setattr("colab_gpt2.storage.drive.mount_drive", lambda: mount_drive(colab.mountpoint))  # /content/drive is not ours to make
    saved = save_to_drive(archive, progress=False)
    assert saved.path == colab.mountpoint/"MyDrive"/"colab-gpt2"/"gpt2-tuned.tar.gz" and saved.sha256 == archive.sha256
    assert saved.note.startswith("Read back whole, but from this machine: Drive uploads in the background")
    again = save_to_drive(archive, drive=colab.mountpoint/"My Drive", flush=True, progress=False)
    assert again.path == saved.path and "there already" in again.note and "flushed and unmounted" in again.note
    assert os.listdir(colab.mountpoint) == []
    assert tree(restore_from_drive("gpt2-tuned.tar.gz", tmp_path/"back", progress=False)) == tree(model)
    assert tree(restore_from_drive(colab.mountpoint/"My Drive/colab-gpt2/gpt2-tuned.tar.gz", tmp_path/"back-2", progress=False)) == tree(model)


def test_the_note_says_what_was_replaced(colab, archive, my_drive, old):
    saved = save_to_drive(archive, drive=my_drive, overwrite=True, progress=False)
    assert saved.path == old and saved.note.startswith("It replaced a file of the same name with other content (3 B). Read back whole, but from this machine")
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
        assert saved.note.startswith("gpt2-tuned.tar.gz is another file there and stays as it is. ") and "Read back whole, but from this machine" in saved.note
    assert sorted(os.listdir(old.parent)) == ["gpt2-tuned-2.tar.gz", "gpt2-tuned.tar.gz"]


@pytest.mark.parametrize("drive, folder, line", [("/proc/xx", "f", "The folder /proc/xx cannot be made (No such file or directory)."), ("/proc", "xx", "The folder /proc/xx cannot be made (No such file or directory)."),
                                                 ("{}/" + 300 * "x", "f", "cannot be made (File name too long)."), ("{}", 300 * "x", "cannot be made (File name too long).")])
def test_a_folder_that_cannot_be_made(archive, tmp_path, drive, folder, line):
    if drive.startswith("/proc") and not sys.platform.startswith("linux"): pytest.skip("only Linux has a /proc in which nobody can make a folder")
    with pytest.raises(OSError) as e: save_to_drive(archive, folder, drive=drive.format(tmp_path), progress=False)
    assert str(e.value).endswith(f"{line} Name another folder to save in.") and str(e.value).startswith("The folder ") and "\n" not in str(e.value) and e.value.errno


def test_flush_that_fails(colab, archive, my_drive):
    with colab.faults(flush_failed=True), pytest.raises(OSError, match=r"Drive did not confirm its uploads \(ValueError: flush_and_unmount failed\). Look for your files on drive.google.com"):
        save_to_drive(archive, drive=my_drive, flush=True, progress=False)
    assert sha256_of(my_drive/"colab-gpt2/gpt2-tuned.tar.gz") == archive.sha256


@pytest.mark.parametrize("place, line", [("content/drive/MyDrive", "Drive is not mounted: there is no folder {}. Run mount_drive() in a cell first."),
                                         ("content/drive", "There is no folder {}. Run mount_drive() in a cell first")])
def test_drive_not_mounted_is_not_made_on_the_local_disk(colab, archive, tmp_path, place, line):
    for action in (lambda: save_to_drive(archive, drive=tmp_path/place), lambda: restore_from_drive("a.tar.gz", tmp_path/"new", drive=tmp_path/place)):
        with pytest.raises(FileNotFoundError, match=re.escape(line.format(tmp_path/place))): action()
    assert os.listdir(tmp_path/"content") == [] and not (tmp_path/"new").exists()


def test_not_mounted_when_copying_there(archive, tmp_path):
    with pytest.raises(FileNotFoundError, match="Drive is not mounted"): copy_verified(archive.path, tmp_path/"drive/My Drive/x.tar.gz")
    assert not (tmp_path/"drive").exists()


def test_outside_colab_a_folder_serves(archive, model, tmp_path):
    saved = save_to_drive(archive, drive=tmp_path/"plays"/"Drive", progress=False)
    assert saved.path == tmp_path/"plays/Drive/colab-gpt2/gpt2-tuned.tar.gz" and saved.note == ""
    assert tree(restore_from_drive("gpt2-tuned.tar.gz", tmp_path/"back", drive=tmp_path/"plays/Drive", progress=False)) == tree(model)
    for action in (mount_drive, lambda: save_to_drive(archive), lambda: restore_from_drive("none", tmp_path/"new")):
        with pytest.raises(FileNotFoundError, match="Google Drive can be mounted on Colab only, and this is another machine. Name a folder to save in instead"): action()


def test_archive_that_was_changed_after_it_was_made(archive, tmp_path):
    with open(archive.path, "ab") as f: f.write(b"x")
    with pytest.raises(OSError, match="is no longer the archive that was made"): save_to_drive(archive, drive=tmp_path/"drive", progress=False)


def test_restoring_a_damaged_or_unreadable_archive(colab, archive, my_drive, tmp_path):
    saved = save_to_drive(archive, drive=my_drive, progress=False)
    with colab.faults(io_error=True), pytest.raises(OSError, match="errno 5"): restore_from_drive(saved.path, tmp_path/"new", progress=False)
    os.truncate(saved.path, 1200)
    with pytest.raises(ValueError, match="is not a whole .tar.gz archive"): restore_from_drive(saved.path, tmp_path/"new", progress=False)
    assert not (tmp_path/"new").exists() and not list(tmp_path.glob(".restoring-*")) and not list(tmp_path.glob(".new*"))
    with pytest.raises(FileNotFoundError, match=r"There is no archive gpt2.tar.gz in .* Did you mean 'gpt2-tuned.tar.gz'\?"): restore_from_drive("gpt2.tar.gz", tmp_path/"new", drive=my_drive)


def test_records_are_for_people_and_programs(archive, tmp_path):
    saved = save_to_drive(archive, drive=tmp_path/"drive", progress=False)
    assert json.loads(json.dumps(archive.to_dict())) == {"path": str(archive.path), "bytes": archive.bytes, "sha256": archive.sha256, "files": ["config.json", "model.safetensors"]}
    assert set(saved.to_dict()) == {"path", "bytes", "sha256", "seconds", "note"}
    for record in (archive, saved): assert record.sha256 in record._repr_html_()
