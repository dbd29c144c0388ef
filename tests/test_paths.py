"Paths wherever a user gives one: `~`, and a Drive that is not mounted."
import os, sys
from pathlib import Path

import huggingface_hub, pytest

from colab_gpt2 import FinetuneConfig, archive_model, check_runtime, copy_verified, extract_archive, finetune
from colab_gpt2 import load_corpus, load_tokenizer, mount_drive, restore_from_drive, save_to_drive, tokenize_file
from colab_gpt2.core import atomic, existing, home
from colab_gpt2.errors import fields_of
from colab_gpt2.engine.trainer import check_trainer_args
from colab_gpt2.legacy.run_language_modeling import translate, work
from colab_gpt2.model.loading import load_config, locate
from colab_gpt2.panels.drive import DriveConfig
from colab_gpt2.runtime import cache_folder, check_mounted
from colab_gpt2.storage.mirror import mirror_folder
from colab_gpt2.tasks import archive_name, run
from colab_gpt2.resuming import source_of, where_to_resume
from colab_gpt2.resuming import check_output_dir
from colab_gpt2.training import read_finished
from colab_gpt2.two_runs import told_by
from helpers.archives import make_model
from helpers.colab_stub import colab, stub

TIDE = "The tide came in and went out again.\n\n" * 40
OLD = dict(do_train=True, model_name_or_path="tiny", train_data_file="~/t.txt", output_dir="~/old")


# ---- ~ is the home folder

@pytest.fixture
def at_home(tmp_path, monkeypatch):
    "A home folder with texts and a model, and another one to work in."
    house, here = tmp_path/"home", tmp_path/"here"
    here.mkdir()
    make_model(house/"m")
    for name in ("t.txt", "e.txt"): (house/name).write_text(TIDE + name)
    monkeypatch.setenv("HOME", str(house))
    monkeypatch.chdir(here)
    yield house
    assert os.listdir(here) == []  # nor a folder called ~


@pytest.fixture(scope="module")
def tiny(): return load_tokenizer("tiny")


def test_archives_are_packed_saved_restored_and_unpacked_in_the_home_folder(at_home):
    assert archive_model("~/m", "~/a.tar.gz", progress=False).path == at_home/"a.tar.gz"
    assert save_to_drive("~/a.tar.gz", drive="~/d", progress=False).path == at_home/"d/colab-gpt2/a.tar.gz"
    assert restore_from_drive("a.tar.gz", "~/back", drive="~/d", progress=False) == at_home/"back"
    assert restore_from_drive("~/a.tar.gz", "~/back-2", progress=False) == at_home/"back-2"
    assert extract_archive("~/a.tar.gz", "~/back-3", progress=False) == at_home/"back-3"
    assert copy_verified("~/a.tar.gz", "~/b.tar.gz", progress=False).path == at_home/"b.tar.gz"
    assert mount_drive("~/d") == at_home/"d"
    assert archive_name("~/m") == f"{at_home}/m.tar.gz" and archive_name("~") == f"{at_home}.tar.gz"
    with pytest.raises(ValueError, match="must be a path inside Drive"): save_to_drive("~/a.tar.gz", "~/x", drive="~/d")


def test_texts_tokens_and_models_are_looked_for_in_the_home_folder(at_home, tiny):
    corpus = load_corpus(train_file="~/t.txt", eval_file="~/e.txt", cache_dir="~/c")
    assert corpus.train == at_home/"t.txt" and load_corpus("~/t.txt", cache_dir="~/c").train.is_relative_to(at_home/"c")
    assert tokenize_file("~/t.txt", tiny, 8, cache_dir="~/c", progress=False).path.is_relative_to(at_home/"c/tokens")
    assert locate("~/m") == locate(Path("~/m")) == at_home/"m"
    assert existing("~/m/none") == at_home/"m" and check_runtime("~/none").disk
    assert check_output_dir("~/out") == at_home/"out" and read_finished("~/out") is None
    (at_home/"link").symlink_to(at_home/"nowhere")
    with pytest.raises(NotADirectoryError, match="link is a link that leads nowhere"): check_output_dir("~/link")


def test_the_fields_of_a_config_know_the_home_folder(at_home):
    config = FinetuneConfig(model="~/m", train_file="~/t.txt", output_dir=Path("~/o"), cache_dir="~", prompt="~/x")
    assert (config.model, config.train_file) == (f"{at_home}/m", f"{at_home}/t.txt")
    assert (config.output_dir, config.cache_dir, config.prompt) == (at_home/"o", str(at_home), "~/x")
    panel = DriveConfig(model="~/m", drive="~/d")
    assert (panel.model, panel.archive_path, panel.drive) == (f"{at_home}/m", f"{at_home}/m.tar.gz", f"{at_home}/d")


def test_the_flags_of_2020_know_the_home_folder(at_home):
    config = translate(OLD | dict(cache_dir="~/c")).config
    found = config.output_dir, config.train_file, config.cache_dir
    assert found == tuple(f"{at_home}/{name}" for name in ("old", "t.txt", "c"))
    pattern = {name: value for name, value in OLD.items() if name != "train_data_file"}
    assert translate(pattern | dict(train_data_files="~/*.txt")).config.train_file == f"{at_home}/*.txt"
    with pytest.raises(ValueError, match=f"{at_home}/old has no complete checkpoint"):
        translate(OLD | dict(should_continue=True))


@pytest.mark.parametrize("path", ["a~", "x/~", "a/~/b", "a~b/c"])
def test_a_tilde_within_a_name_is_a_letter(path):
    assert str(home(path)) == path and getattr(FinetuneConfig(output_dir=path), "output_dir") == path


def test_homes_of_others(tmp_path, monkeypatch):
    "`~root` is a home as the system knows it; a file of one's own may begin with ~."
    pwd = pytest.importorskip("pwd")
    monkeypatch.chdir(tmp_path)
    assert str(home("~root/x")) == f"{pwd.getpwuid(0).pw_dir}/x"
    (tmp_path/"~draft.txt").write_text(TIDE)
    assert str(home("~draft.txt")) == "~draft.txt"
    with pytest.raises(ValueError, match="output_dir is '~nobody-here/x': there is no user 'nobody-here' here") as e:
        FinetuneConfig(output_dir="~nobody-here/x")
    assert fields_of(e.value) == ("output_dir",)


def test_without_a_home_folder_the_cache_is_asked_for(monkeypatch):
    "A container's user without an entry in /etc/passwd."
    monkeypatch.setattr("os.path.expanduser", lambda path: os.fspath(path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(ValueError, match="cache_dir is .*no home folder is known here") as e: cache_folder()
    assert fields_of(e.value) == ("cache_dir",)


# ---- a Drive that is not mounted

@pytest.fixture(params=["content/drive/MyDrive", "content/drive/My Drive", "content/drive/Shareddrives/ours", "link"])
def unmounted(request, tmp_path, monkeypatch):
    "A folder on a Drive that is not mounted, as it may be typed; nothing is made there."
    (tmp_path/"content").mkdir()
    (tmp_path/"link").symlink_to("content/drive/MyDrive")
    (tmp_path/"t.txt").write_text(TIDE)
    make_model(tmp_path/"m")
    archive_model(tmp_path/"m", tmp_path/"a.tar.gz", progress=False)
    monkeypatch.chdir(tmp_path)
    yield request.param + "/x"
    assert os.listdir(tmp_path/"content") == []


def load_published(monkeypatch, **variables):
    "In an environment with these variables, a Hub that answers, and a text or a model that is not in a cache."
    import datasets
    for name, path in variables.items():
        place = datasets.config if name == "HF_DATASETS_CACHE" else huggingface_hub.constants
        with monkeypatch.context() as around:
            for at in ("text.hub", "model.loading"): around.setattr(f"colab_gpt2.{at}.hub_trouble", lambda: "")
            around.setattr(place, name, str(path))
            if name == "HF_HOME": around.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "hub")
            load_corpus(cache_dir="cache") if place is datasets.config else load_config("owner/model")


def test_no_door_makes_the_folder_of_a_drive_that_is_not_mounted(unmounted, tmp_path, tiny, monkeypatch):
    files = dict(train_file="t.txt", eval_file="t.txt")
    old = OLD | dict(output_dir=unmounted, train_data_file="t.txt")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", unmounted)
    doors = dict(
        output_dir=lambda path: finetune(model="tiny", output_dir=path, **files, progress=False),
        old_output=lambda path: work(translate(old)),
        cache_dir=lambda path: load_corpus("t.txt", cache_dir=path),
        tokens=lambda path: tokenize_file("t.txt", tiny, 8, cache_dir=path),
        hub=lambda path: load_tokenizer("gpt2", cache_dir=path),
        hub_of_the_environment=lambda path: load_config("owner/model"),
        datasets=lambda path: load_published(monkeypatch, HF_DATASETS_CACHE=path),
        home_of_the_hub=lambda path: load_published(monkeypatch, HF_HOME=path),
        archive=lambda path: archive_model("m", f"{path}.tar.gz"),
        archive_path=lambda path: run(output_dir="o", archive_path=f"{path}.tar.gz"),
        unpack=lambda path: extract_archive("a.tar.gz", path),
        restore=lambda path: restore_from_drive("a.tar.gz", path),
        copy=lambda path: copy_verified("a.tar.gz", path))
    for name, door in doors.items():
        for path in (unmounted, str(tmp_path/unmounted), Path(unmounted)):
            line = "Drive is not mounted: there is no folder .*. Run mount_drive.. in a cell first"
            with pytest.raises(FileNotFoundError, match=line) as e: door(path)
            field = dict(output_dir="output_dir", old_output="output_dir", cache_dir="cache_dir", tokens="cache_dir",
                         hub="cache_dir", hub_of_the_environment="cache_dir", datasets="dataset").get(name)
            assert fields_of(e.value) == ((field,) if field else ()), name
    assert not (tmp_path/"o").exists()


def test_what_is_read_from_a_drive_that_is_not_mounted_is_missed_there(unmounted):
    doors = dict(
        text=lambda path: load_corpus(train_file=f"{path}/t.txt"), model=locate, archive=archive_model, run=told_by,
        pattern=lambda path: load_corpus(train_file=f"{path}/*.txt"), dataset=lambda path: load_corpus(f"{path}/t.txt"),
        unpack=lambda path: extract_archive(f"{path}.tar.gz", "n"),
        resume=lambda path: source_of(FinetuneConfig(resume=path), {}))
    for name, door in doors.items():
        with pytest.raises(FileNotFoundError, match="Drive is not mounted: there is no folder") as e: door(unmounted)
        assert "mount_drive() in a cell" in str(e.value), name


def test_the_drive_can_be_mounted_after_a_door_refused_it(stub, tmp_path):
    (tmp_path/"content").mkdir()
    place = tmp_path/"content/drive/MyDrive/x"
    with pytest.raises(FileNotFoundError, match="Drive is not mounted"): check_output_dir(place)
    with stub.pretend():
        for path in ("MyDrive/x", "gdrive/MyDrive/x", place.parent.parent/"x"):  # there one is anywhere
            with pytest.raises(FileNotFoundError, match="Drive is not mounted"): check_mounted(path)
        found = mount_drive(tmp_path/"content/drive")
        assert check_output_dir(tmp_path/"content/drive/My Drive/x") == found/"x"


def test_no_mirror_and_no_log_makes_colabs_mountpoint(colab):
    "Nor a Drive, whose mount may come back."
    for field, door in dict(
            mirror=lambda path: mirror_folder(FinetuneConfig(mirror=path, output_dir="o"), "kernel"),
            trainer_args=lambda path: check_trainer_args(dict(logging_dir=path))).items():
        with pytest.raises(FileNotFoundError, match="Drive is not mounted") as e: door(colab.mountpoint/"backup")
        assert fields_of(e.value) == (field,)
    gone = colab.mountpoint/"MyDrive"/"backup"
    assert mirror_folder(FinetuneConfig(mirror=gone, output_dir="o"), "kernel") == (gone, "")
    assert not gone.exists()


def test_a_drive_that_was_unmounted_meanwhile_is_not_made(stub, tmp_path):
    "What a run has begun to write there it cannot end; the mountpoint stays empty."
    (tmp_path/"content").mkdir()
    with stub.pretend():
        place = mount_drive(tmp_path/"content/drive")/"run"
        with atomic(place/"a.txt") as file: file.write_text("x")
        from google.colab import drive
        drive.flush_and_unmount()
        with pytest.raises(OSError, match="not connected"):
            with atomic(place/"a.txt") as file: file.write_text("y")
        assert os.listdir(tmp_path/"content/drive") == []


def test_a_mount_that_has_gone_is_said(stub, tmp_path):
    (tmp_path/"content").mkdir()
    with stub.pretend():
        place = mount_drive(tmp_path/"content/drive")/"run"
        with stub.faults(disconnected=True):
            for door in (check_output_dir, cache_folder, lambda path: archive_model(path, path/"a.tar.gz")):
                with pytest.raises(OSError, match="Drive's mount has gone .errno 107.") as e: door(place)
                assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["MyDrive", "My Drive", "content/drive/MyDrive"])
def test_outside_colab_a_stand_in_may_have_any_name(tmp_path, monkeypatch, name):
    make_model(tmp_path/"m")
    monkeypatch.chdir(tmp_path)
    archive = archive_model("m", "a.tar.gz", progress=False)
    saved = save_to_drive(archive, drive=f"./{name}", progress=False)
    assert saved.path == Path(name, "colab-gpt2/a.tar.gz") and saved.path.exists()
    assert restore_from_drive("a.tar.gz", "back", drive=name, progress=False) == tmp_path/"back"
    assert mount_drive(name) == Path(name)
    if "drive" not in name: assert check_output_dir(f"{name}/run") == Path(name, "run")


# ---- a text where a path belongs

@pytest.mark.parametrize("field, value, told", [
    ("train_file", "https://example.com/tides.txt", "an address, not a path"), ("mirror", "gs://bucket", "an address"),
    ("train_file", "https://me:hidden@example.com/a.txt", "https://example.com/a.txt'"),
    ("output_dir", "https://huggingface.co/me/out", "an address"), ("model", "https://example.com/m", "an address"),
    ("cache_dir", "s3://bucket/c", "an address"), ("dataset", "https://example.com/tides.zip", "an address")])
def test_an_address_is_no_path_and_the_hubs_are_of_models_and_data_sets(field, value, told):
    with pytest.raises(ValueError, match=told) as e: FinetuneConfig(**{field: value})
    assert fields_of(e.value) == (field,)
    page = FinetuneConfig(model="https://HuggingFace.co/gpt2", dataset="hf.co/datasets/a/b").dataset
    with pytest.raises(ValueError, match="train_file is on the Hub: give dataset_test_split, no eval_file"):
        load_corpus(train_file=page, eval_file="e.txt")


@pytest.mark.parametrize("given", [None, 3, b"t.txt", ["t.txt", "e.txt"]], ids=str)
def test_what_is_not_one_path_is_told(given, tmp_path):
    calls = [home, lambda path: load_corpus(**{"train_file" if path else "name": path}, cache_dir=tmp_path)]
    for call in calls:
        with pytest.raises(TypeError, match="is not one path, a text or a Path"): call(given)


@pytest.mark.parametrize("given", ["tiny", 3, {"model": "tiny"}], ids=str)
def test_what_is_no_config_is_told(given):
    with pytest.raises(TypeError, match="is no config; set fields by name, as model='tiny'"): finetune(given)


def test_a_run_is_not_called_as_a_checkpoint_of_the_run_above(tmp_path):
    with pytest.raises(ValueError, match=f"checkpoint-9 is called as a checkpoint; give {tmp_path} to cont") as told:
        finetune(model="tiny", output_dir=tmp_path/"checkpoint-9")
    assert fields_of(told.value) == ("output_dir",) and not any(tmp_path.iterdir())


def test_no_door_repeats_thousands_of_characters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path/"m")
    for long in ("x9" * 2500, "a/" * 3000, "/" + "x9" * 2500, f"{'x9' * 2500}.txt", f"m/{'x9' * 2500}"):
        doors = (lambda: load_corpus(long), lambda: load_corpus(train_file=long), lambda: load_tokenizer(long),
                 lambda: archive_model(long), lambda: archive_model("m", f"{long}.tar.gz"),
                 lambda: extract_archive(long, "b"), lambda: save_to_drive(long), lambda: mount_drive(long),
                 lambda: restore_from_drive(long, "b"), lambda: copy_verified(long, "a"),
                 lambda: FinetuneConfig(output_dir=long), lambda: archive_name(long))
        for door in doors:
            with pytest.raises(ValueError, match="characters long, too long for a path") as e: door()
            assert len(str(e.value)) < 200


# ---- what a killed process leaves

@pytest.mark.parametrize("number", [1, 999_999_999])
def test_a_folder_with_nothing_but_what_a_killed_run_left_is_a_new_one(tmp_path, number):
    "Its process number may live again: on a new machine the low ones do."
    (tmp_path/"run"/f".checkpoint-2.{number}.abcdefgh.part").mkdir(parents=True)
    assert where_to_resume(FinetuneConfig(output_dir=str(tmp_path/"run")), {}) is None
