"Archives: the same bytes, nothing that leads elsewhere, every fault, and what is left on disk."
import gzip, io, os, re, shutil, subprocess, sys, tarfile, tracemalloc, types
from pathlib import Path

import pytest

from colab_gpt2.core import current_umask, sha256_of
from colab_gpt2.errors import fields_of, shortened
from colab_gpt2.storage.archives import archive_model, check_archive_path, check_whole, extract_archive
from colab_gpt2.storage.archives import plain_members, reading_archive
from colab_gpt2.storage.drive import copy_verified, mount_drive
from colab_gpt2.tasks import packed_result, run_in
from helpers.archives import archive, make_model, model, tree
from helpers.colab_stub import colab, stub


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

def test_what_the_tutorial_types_unpacks_an_archive(archive, model, shell):
    page = (Path(__file__).parents[1]/"nbs"/"tutorials"/"colab_gpt2.ipynb").read_text(encoding="utf-8")
    for command in re.search(r"\(`(mkdir [^`]+)`, then `(tar [^`]+)`\)", page).groups():
        assert shell(*command.split(), cwd=archive.path.parent).returncode == 0
    assert tree(archive.path.parent/"gpt2-tuned") == tree(model)


def test_same_bytes_from_another_place_time_umask_and_user(archive, model, tmp_path):
    other = shutil.copytree(model, tmp_path/"elsewhere"/"named otherwise", copy_function=shutil.copyfile)
    for path in other.iterdir(): path.chmod(0o600)
    code = f"""
import os
from colab_gpt2 import archive_model
os.umask(0o077)
archive_model({str(other)!r}, 'x.tar.gz', progress=False)"""
    elsewhere = {**os.environ, "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=elsewhere)
    assert (tmp_path/"x.tar.gz").read_bytes() == archive.path.read_bytes()


def test_memory_does_not_grow_with_the_model(tmp_path):
    model = make_model(tmp_path/"output", 64 << 20)
    assert peak_of(lambda: archive_model(model, tmp_path/"a.tar.gz", progress=False)) < 8 << 20
    assert peak_of(lambda: extract_archive(tmp_path/"a.tar.gz", tmp_path/"back", progress=False)) < 8 << 20
    assert peak_of(lambda: copy_verified(model/"model.safetensors", tmp_path/"copy", progress=False)) < 8 << 20
    copies = tmp_path/"back/model.safetensors", tmp_path/"copy"
    assert {sha256_of(path) for path in copies} == {sha256_of(model/"model.safetensors")}


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


@pytest.mark.parametrize("name, missing", [("config.json", "config.json"), ("model.safetensors", "*.safetensors")])
def test_no_model_no_archive(model, tmp_path, name, missing):
    (model/name).unlink()
    (tmp_path/"a.tar.gz").write_text("old")
    line = f"{model} holds no complete model: it has no {missing}. Give the output folder of a finished fine-tuning."
    with pytest.raises(FileNotFoundError, match=re.escape(line)): archive_model(model, tmp_path/"a.tar.gz")
    os.mkfifo(model/name)  # which would be waited for
    with pytest.raises(FileNotFoundError, match=re.escape(line)): archive_model(model, tmp_path/"a.tar.gz")
    assert (tmp_path/"a.tar.gz").read_bytes() == b"old"


TAKEN = "{} exists. Give another path, or overwrite=True to overwrite it."
BAD_NAME = "{} is not a valid archive name: it must end in .tar.gz or .tgz."


@pytest.mark.parametrize("name, overwrite, kind, line", [
    ("notes.tar.gz", False, FileExistsError, TAKEN),
    ("dangling.tgz", False, FileExistsError, TAKEN),
    ("notes.txt", True, ValueError, BAD_NAME),
    ("output/model.safetensors", True, ValueError, BAD_NAME),
    ("output", True, IsADirectoryError, "{} is a folder; name a file in it that ends in .tar.gz.")])
def test_no_file_is_replaced_unasked(model, tmp_path, name, overwrite, kind, line):
    for known in ("notes.tar.gz", "notes.txt"): (tmp_path/known).write_text("a year of notes")
    (tmp_path/"dangling.tgz").symlink_to(tmp_path/"elsewhere")
    before = tree(tmp_path)
    for action in (lambda: check_archive_path(tmp_path/name, overwrite),
                   lambda: archive_model(model, tmp_path/name, overwrite=overwrite, progress=False)):
        with pytest.raises(kind) as e: action()
        assert str(e.value) == line.format(tmp_path/name)
        assert fields_of(e.value) == (("overwrite",) if kind is FileExistsError else ())
        assert tree(tmp_path) == before and (tmp_path/"dangling.tgz").is_symlink()


def test_replaced_when_that_is_said(archive, model, tmp_path):
    (tmp_path/"b.tgz").write_text("old")
    again = archive_model(model, tmp_path/"b.tgz", overwrite=True, progress=False)
    assert again.sha256 == archive.sha256 == sha256_of(tmp_path/"b.tgz")


@pytest.mark.parametrize("checkpoints", [False, True])
def test_leftovers_of_a_killed_save_are_not_packed(archive, model, tmp_path, checkpoints):
    for name in (".saving.abc", "samples/.saving.def"): make_model(model/name, 1000)
    os.truncate(model/".saving.abc"/"model.safetensors", 10)
    for name in (".DS_Store", "._model.safetensors"): (model/name).write_text("x")
    again = archive_model(model, tmp_path/"b.tar.gz", checkpoints=checkpoints, progress=False)
    assert again.files == ("config.json", "model.safetensors") and again.sha256 == archive.sha256


def test_what_a_killed_packing_left_goes_with_the_next(archive, model, tmp_path):
    (left := tmp_path/".b.tar.gz.999999999.abcdefgh.part").mkdir()
    (left/"b.tar.gz").write_text("half")
    archive_model(model, tmp_path/"b.tar.gz", progress=False)
    assert not left.exists()


def test_half_written_model_is_not_packed(model, tmp_path):
    os.truncate(model/"model.safetensors", 1000)
    with pytest.raises(ValueError, match="model.safetensors is truncated or corrupted"):
        archive_model(model, tmp_path/"a.tar.gz")
    assert not (tmp_path/"a.tar.gz").exists()


@pytest.mark.parametrize("fault, line", [
    (dict(full=50_000), "the disk, or Drive's quota, is full"), (dict(read_only=True), "the folder is read-only"),
    (dict(io_error=True), "an input/output error (errno 5)"), (dict(quota=1000), "has 0 B free")])
def test_archive_that_cannot_be_written(colab, model, my_drive, fault, line):
    (my_drive/"a.tar.gz").write_text("old")
    with colab.faults(**fault), pytest.raises(OSError, match=re.escape(line)) as e:
        archive_model(model, my_drive/"a.tar.gz", overwrite=True, progress=False)
    assert f"Packing {model} into {my_drive/'a.tar.gz'}" in str(e.value) and "\n" not in str(e.value)
    assert tree(my_drive) == {"a.tar.gz": b"old"}


def test_progress_is_on_stderr_and_can_be_turned_off(tmp_path, capsys):
    model = make_model(tmp_path/"output", 3 << 20)
    archive_model(model, tmp_path/"a.tar.gz", progress=False)
    assert capsys.readouterr() == ("", "")
    archive = archive_model(model, tmp_path/"a.tar.gz", overwrite=True)
    copy_verified(archive.path, tmp_path/"b.tar.gz")
    out, err = capsys.readouterr()
    assert out == "" and "Packing a.tar.gz: 100%" in err
    assert "Copying a.tar.gz: 100%" in err and "Reading a.tar.gz back: 100%" in err


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


LETTERS, DEEP, LONG = "a name with control characters", "more than 64 folders deep", "a name of more than 255 bytes"
ABSOLUTE, PARENT, LINK, DEVICE = "is an absolute path", "is a path with '..'", "is a link", "is a device file"
EVIL = [
    (dict(name="/etc/evil"), ABSOLUTE), (dict(name="C:\\evil"), ABSOLUTE),
    (dict(name="../evil"), PARENT), (dict(name="a/../../evil"), PARENT), (dict(name="..\\evil"), PARENT),
    (dict(name="link", type=tarfile.SYMTYPE, linkname="config.json"), LINK),
    (dict(name="link", type=tarfile.SYMTYPE, linkname="/etc"), LINK),
    (dict(name="link", type=tarfile.LNKTYPE, linkname="config.json"), LINK),
    (dict(name="null", type=tarfile.CHRTYPE, devmajor=1, devminor=3), DEVICE),
    (dict(name="disk", type=tarfile.BLKTYPE), DEVICE), (dict(name="pipe", type=tarfile.FIFOTYPE), DEVICE),
    *((dict(name=f"a{c}b"), f"is {LETTERS}") for c in "\x1b \a \n \r \x7f \x9b \u202e \u2066".split(" ")),
    (dict(name="a/" * 1200 + "b"), f"is {DEEP}"), (dict(name="a/" * 1200, type=tarfile.DIRTYPE), f"is {DEEP}"),
    (dict(name="x" * 300), f"is {LONG}"), (dict(name="d/" + "é" * 128), f"is {LONG}"),
    (dict(name=""), "is a file without a name"), (dict(name="."), "is a file without a name"),
    (dict(name="config.json"), "appears twice"), (dict(name="config.json/x"), "is a file inside a file")]


@pytest.mark.parametrize("fields, reason", EVIL, ids=[f"{i}-{reason}" for i, (_, reason) in enumerate(EVIL)])
@pytest.mark.parametrize("filtered", [True, False], ids=["with data_filter", "as before 3.10.12"])
def test_evil_archives_write_nothing(tmp_path, monkeypatch, fields, reason, filtered):
    if not filtered: monkeypatch.delattr(tarfile, "data_filter", raising=False)
    (tmp_path/"in").mkdir()
    path = evil(tmp_path/"in"/"evil.tar.gz", **fields)
    before = tree(tmp_path)
    name = shortened(repr(fields["name"].rstrip("/") or fields["name"]), 99)
    line = f"{path} holds {name}, which {reason}. Nothing was unpacked"
    with pytest.raises(ValueError, match=re.escape(line)): extract_archive(path, tmp_path/"in"/"new")
    assert tree(tmp_path) == before and os.listdir(tmp_path/"in") == ["evil.tar.gz"]


def test_a_name_that_is_no_text_is_refused(tmp_path):
    "A byte of Latin-1, in an archive of the old format."
    with tarfile.open(tmp_path/"a.tar.gz", "w:gz", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        tar.addfile(tarfile.TarInfo("caf\xe9.json"))
    with pytest.raises(ValueError, match=re.escape(f"'caf\\udce9.json', which is {LETTERS}")):
        extract_archive(tmp_path/"a.tar.gz", tmp_path/"new")


def zeros(path, size, names=("a",), **fields):
    "An archive of files of zeros, whose bytes are not there if `size` is too much to write."
    with gzip.open(path, "wb", 1) as file:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = size
            for field, value in fields.items(): setattr(member, field, value)
            file.write(member.tobuf(tarfile.GNU_FORMAT))
            file.write(bytes(min(size, 1 << 20)))
    return path


@pytest.mark.parametrize("size, line", [
    (10 << 30, "holds more than 10,000 files or 1.1 GB. Nothing was unpacked."), (1 << 60, "holds more than 10,000")])
def test_a_bomb_is_refused_at_its_header(tmp_path, size, line):
    path = zeros(tmp_path/"a.tar.gz", size)
    with pytest.raises(ValueError, match=re.escape(line)): extract_archive(path, tmp_path/"new")
    assert os.listdir(tmp_path) == ["a.tar.gz"]


def test_room_is_looked_for_before_an_archive_is_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=1 << 20))
    with pytest.raises(OSError, match="Unpacking .* needs 3.0 MB and .* has 1.0 MB free"):
        extract_archive(zeros(tmp_path/"a.tar.gz", 3_000_000, ["a", "b"]), tmp_path/"new")  # truncated, too


@pytest.mark.parametrize("kind", [tarfile.DIRTYPE, tarfile.REGTYPE])
def test_an_archive_of_too_many_members_is_refused(tmp_path, monkeypatch, kind):
    "The same folder for ever, or a file more than is allowed."
    monkeypatch.setattr("colab_gpt2.storage.archives.MOST", 100)
    names = ["d"] * 101 if kind == tarfile.DIRTYPE else map(str, range(101))
    with pytest.raises(ValueError, match="holds more than 100 files"):
        extract_archive(zeros(tmp_path/"a.tar.gz", 0, names, type=kind), tmp_path/"new")


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_header_of_gigabytes_is_not_read_into_memory(tmp_path, kind):
    path = zeros(tmp_path/"a.tar.gz", 8 << 30, type=kind)
    def refused():
        with pytest.raises(ValueError, match="a header of 8.6 GB"): extract_archive(path, tmp_path/"new")
    assert peak_of(refused) < 8 << 20


def header(name="a", kind=tarfile.REGTYPE, **pax):
    member = tarfile.TarInfo(name)
    member.type, member.pax_headers = kind, pax
    return member.tobuf(tarfile.PAX_FORMAT)


WEARING = {
    "a name for a name for a name": header(kind=tarfile.GNUTYPE_LONGNAME) * 350 + header(),
    "a map that is none": header(**{"GNU.sparse.map": "x"}),
    "a file of less than no bytes": header("config.json") + header("b", size="-1536"),
    "a long comment": header("a", comment="x" * 100_000),
    "many comments": b"".join(header(str(n), comment="x" * 20_000) for n in range(9)),
    "a comment for all": b"".join(header(str(n), tarfile.XGLTYPE, comment="x" * 20_000) for n in range(9))}


@pytest.mark.parametrize("headers", WEARING.values(), ids=WEARING)
def test_headers_that_wear_a_reader_down_are_refused_at_every_door(tmp_path, headers):
    with gzip.open(path := tmp_path/"a.tar.gz", "wb") as file: file.write(headers + bytes(1024))
    for door in (lambda path: extract_archive(path, tmp_path/"new"), check_whole, packed_result):
        with pytest.raises(ValueError, match="a.tar.gz is truncated, corrupted or not a .tar.gz archive"): door(path)
    assert os.listdir(tmp_path) == ["a.tar.gz"]


def test_an_archive_of_thousands_of_files_with_dates_and_long_names_is_read(tmp_path):
    with gzip.open(path := tmp_path/"a.tar.gz", "wb", 1) as file:
        file.write(b"".join(header(f"{'é' * 100}/{n}", atime="1.5", mtime="2.5") for n in range(3000)) + bytes(1024))
    check_whole(path)
    with reading_archive(path, path) as tar: assert len(plain_members(tar, path, tmp_path)) == 3000


def test_a_record_that_is_too_deep_is_none(tmp_path):
    (tmp_path/"finetune.json").write_text("[" * 100_000)
    assert run_in(tmp_path) == {}


def test_tokens_and_keys_do_not_travel_in_archives(model, archive, tmp_path):
    (model/"checkpoint-8").mkdir()
    secret = "hf_" + "aB3" * 12
    texts = {"finetune.json": '{"config": {"trainer_args": {"hub_token": "x"}}}', "notes.txt": f"my token is {secret}",
             "checkpoint-8/training_args.bin": f"\x00hub_token{secret}", ".env": secret, "prod.env": "x", "token": "x",
             "kaggle.json": "{}", "client_secret_1.json": "{}", "a.pem": "x"}
    for name, text in texts.items(): (model/name).write_text(text)
    for checkpoints, warned in ((False, 2), (True, 3)):
        with pytest.warns(UserWarning, match="holds an access token and stays out of the archive") as caught:
            again = archive_model(model, tmp_path/"b.tar.gz", checkpoints=checkpoints, overwrite=True, progress=False)
        assert again.files == archive.files and len(caught) == warned


def test_a_run_takes_no_token_that_its_files_would_hold():
    from colab_gpt2.engine.trainer import check_trainer_args
    with pytest.raises(ValueError, match="trainer_args has 'hub_token': secrets would stand in finetune.json") as e:
        check_trainer_args(dict(hub_token="hf_secret"))
    assert "hf_secret" not in str(e.value)


def test_pythons_own_filter_is_asked_too(tmp_path, monkeypatch):
    if not hasattr(tarfile, "data_filter"): pytest.skip("this Python has no tarfile.data_filter")
    def refuse(member, folder): raise tarfile.SpecialFileError(member)
    monkeypatch.setattr(tarfile, "data_filter", refuse)
    with pytest.raises(ValueError, match="is a special file. Nothing was unpacked"):
        extract_archive(evil(tmp_path/"a.tar.gz", name="b"), tmp_path/"new")


def test_modes_and_owners_of_an_archive_do_not_come_along(tmp_path):
    foreign = evil(tmp_path/"a.tar.gz", name="x", mode=0o6777, uid=12345, gid=12345)
    extract_archive(foreign, tmp_path/"new", progress=False)
    status, mask = (tmp_path/"new"/"x").stat(), current_umask()
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
    with pytest.raises(FileExistsError, match="is not empty, and nothing in it is overwritten"):
        extract_archive(archive.path, ".")


@pytest.mark.parametrize("cut", [0, 1, 100, 100_000, -1])
def test_archive_that_was_cut_off(archive, tmp_path, cut):
    (tmp_path/"cut.tar.gz").write_bytes(archive.path.read_bytes()[:cut])
    with pytest.raises(ValueError, match="cut.tar.gz is truncated, corrupted or not a .tar.gz"):
        extract_archive(tmp_path/"cut.tar.gz", tmp_path/"new")
    assert not (tmp_path/"new").exists() and not list(tmp_path.glob(".new*"))


@pytest.mark.parametrize("fault, line", [
    (dict(full=100_000), "the disk, or Drive's quota, is full"), (dict(read_only=True), "the folder is read-only"),
    (dict(quota=1000), "needs 200.1 kB and")])
def test_unpacking_that_cannot_be_written(colab, archive, my_drive, fault, line):
    with colab.faults(**fault), pytest.raises(OSError, match=re.escape(line)):
        extract_archive(archive.path, my_drive/"new", progress=False)
    assert os.listdir(my_drive) == []
