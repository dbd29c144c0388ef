"Checkpoints are complete or absent: damage to any of their files, a loss of power, and files that somebody else wrote."
import contextlib, functools, os, pickle, re, shutil
from types import SimpleNamespace

import pytest
import torch
from helpers.power import Disk
from helpers.toys import newest, save, small_trainer
from test_engine import Stop, run, text

from colab_gpt2 import core
from colab_gpt2.core import sha256_of
from colab_gpt2.engine import checkpoints
from colab_gpt2.engine.checkpoints import find_checkpoints, list_checkpoints, read_manifest, unsealed
from colab_gpt2.engine.checkpoints import write_manifest


# ---- damage

@pytest.fixture(scope="module")
def stopped(text, tmp_path_factory):
    "A run that was stopped at its fifth step, with checkpoints of the second and the fourth."
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(KeyboardInterrupt): run(text, folder, save_steps=2, save_total_limit=9, callbacks=[Stop(5)])
    assert [path.name for path in find_checkpoints(folder)] == ["checkpoint-2", "checkpoint-4"]
    return folder


@pytest.fixture
def folder(stopped, tmp_path): return shutil.copytree(stopped, tmp_path/"out")


def flipped(data): return data[:len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1:]


DAMAGES = dict(flipped=flipped, cut=lambda data: data[:-1], empty=lambda data: b"", zeros=lambda data: bytes(len(data)))


@pytest.mark.parametrize("kind", [*DAMAGES, "missing"])
def test_damage_to_any_file_of_a_checkpoint_is_named_and_the_older_one_taken(folder, kind):
    names = {path.name for path in (folder/"checkpoint-4").iterdir()}
    assert names > {"whole.json", "config.json", "trainer_state.json", "scheduler.pt", "optimizer.pt", "rng_state.pth"}
    for name in sorted(names):
        path = folder/"checkpoint-4"/name
        data = path.read_bytes()
        if kind == "missing": path.unlink()
        else: path.write_bytes(DAMAGES[kind](data))
        with pytest.warns(UserWarning) as said: assert newest(folder) == folder/"checkpoint-2"
        [line] = [str(warning.message) for warning in said]
        assert line.startswith(f"{folder/'checkpoint-4'} is skipped: ") and name in line and "\n" not in line
        path.write_bytes(data)
    assert newest(folder) == folder/"checkpoint-4"


def test_no_flip_of_a_bit_in_a_manifest_passes(stopped):
    text = (stopped/"checkpoint-4/whole.json").read_bytes()
    facts = unsealed(text)
    for i in range(len(text)):
        for bit in (0, 5):
            try: read = unsealed(text[:i] + bytes([text[i] ^ 1 << bit]) + text[i + 1:])
            except ValueError: continue
            assert read == facts  # white space


def test_a_run_resumes_from_the_older_checkpoint_to_the_same_weights(text, folder, tmp_path):
    "The newest one has zeros, as after a loss of power, where the header of the weights was."
    weights = folder/"checkpoint-4/model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    run(text, tmp_path/"plain")
    with pytest.warns(UserWarning, match="checkpoint-4 is skipped: model.safetensors: corrupted"):
        result = run(text, folder, save_steps=2)
    assert result.resumed_from == str(folder/"checkpoint-2")
    assert sha256_of(folder/"model.safetensors") == sha256_of(tmp_path/"plain/model.safetensors")


def test_a_run_with_no_intact_checkpoint_left_names_each_and_begins_again(text, folder):
    for path, kind in zip(find_checkpoints(folder), ("zeros", "cut")):
        (path/"optimizer.pt").write_bytes(DAMAGES[kind]((path/"optimizer.pt").read_bytes()))
    with pytest.warns(UserWarning) as said: result = run(text, folder, save_steps=3)
    told = [str(warning.message) for warning in said if "is skipped" in str(warning.message)]
    assert [re.search(r"checkpoint-\d", line)[0] for line in sorted(told)] == ["checkpoint-2", "checkpoint-4"]
    assert (result.resumed_from, result.steps) == (None, 8)


def test_what_was_skipped_is_not_kept_instead_of_what_is_new(folder, tmp_path):
    "Its step is the highest."
    trainer = small_trainer(tmp_path/"run")
    trainer.checkpoints_to_keep = 1
    save(trainer, 9)
    damaged = tmp_path/"run/checkpoint-9/optimizer.pt"
    damaged.write_bytes(flipped(damaged.read_bytes()))
    for step in (2, 4):
        save(trainer, step)
        with pytest.warns(UserWarning, match="checkpoint-9") if damaged.exists() else contextlib.nullcontext():
            assert newest(tmp_path/"run") == tmp_path/f"run/checkpoint-{step}"
    assert not damaged.exists()


# ---- what somebody else wrote

class Evil:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt"])
def test_no_pickle_in_a_checkpoint_is_executed(tmp_path, name):
    "Its manifest is right: the file is what its author meant it to be."
    trainer, evil = small_trainer(tmp_path/"out"), dict(state=Evil(tmp_path/"executed"))
    save(trainer, 4)
    checkpoint = tmp_path/"out"/"checkpoint-4"
    for write in (torch.save, lambda it, path: path.write_bytes(pickle.dumps(it, 2))):
        write(evil, checkpoint/name)
        write_manifest(checkpoint, {})
        assert newest(tmp_path/"out") == checkpoint
        trainer.accelerator.scaler = SimpleNamespace(load_state_dict=None)
        load = dict(rng_state=trainer._load_rng_state, scaler=trainer._load_scaler)
        load = load.get(name.partition(".")[0], trainer._load_optimizer_and_scheduler)
        with pytest.raises(ValueError, match="-4 cannot be loaded .UnpicklingError.") as e: load(str(checkpoint))
        assert "\n" not in str(e.value) and not (tmp_path/"executed").exists()


# ---- interruptions

CALLS = "open", "mkdir", "chmod", "fsync", "rename", "replace", "unlink", "rmdir"


@pytest.fixture
def interrupted(tmp_path):
    "Save the checkpoint of a step until its nth file operation, which fails; as by kill -9, each after it too."
    trainer = small_trainer(tmp_path/"out")
    def attempt(step, nth, ever):
        made = 0
        def counted(real):
            def function(*args, **options):
                nonlocal made
                made += 1
                if made == nth or ever and made > nth: raise KeyboardInterrupt
                return real(*args, **options)
            return function
        with pytest.MonkeyPatch.context() as patched:
            for name in CALLS: patched.setattr(os, name, counted(getattr(os, name)))
            try: save(trainer, step)
            except KeyboardInterrupt: return True
        return made >= nth  # the last ones tidy up
    attempt.save = lambda step: save(trainer, step)
    return attempt


@pytest.mark.parametrize("ever", [False, True], ids=["once", "kill"])
@pytest.mark.parametrize("step", [1, 2], ids=["the same step", "the next one"])
def test_a_save_interrupted_anywhere_leaves_a_complete_checkpoint(interrupted, tmp_path, step, ever, monkeypatch):
    folder, nth, lost = tmp_path/"out", 1, 0
    interrupted.save(1)
    dead = functools.partial(core.leftovers, living=True)  # as for another process
    while interrupted(step, nth, ever):
        lost += not newest(folder)
        assert find_checkpoints(folder) == list_checkpoints(folder) and not list(folder.glob("*.before"))
        with monkeypatch.context() as patched:
            for module in (core, checkpoints): patched.setattr(module, "leftovers", dead)
            checkpoints.recover(folder)
        assert newest(folder).name in ("checkpoint-1", f"checkpoint-{step}") and not list(folder.glob(".*"))
        if step == 2: shutil.rmtree(folder/"checkpoint-2", ignore_errors=True)
        nth += 1
    assert nth > 30 and lost <= (ever and step == 1)  # between two renames; the next run puts one back


# ---- a loss of power

def test_what_is_renamed_was_synced_and_nothing_older_goes_before_its_folder_is(text, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        disk = Disk(tmp_path, patched)
        run(text, tmp_path/"new"/"out", save_steps=1, max_steps=3, save_total_limit=1)
    assert disk.faults == [] and disk.pending == {}


def test_a_loss_of_power_at_any_rename_leaves_what_a_run_resumes_from(text, tmp_path, monkeypatch):
    "Whether the rename reached the disk or not."
    kept, steps, finished = [], [0], []
    def after(path):
        disk_left = [disk.left(tmp_path/f"left-{len(kept)}-{kind}", without=path if kind else None) for kind in (0, 1)]
        kept.append((path.name, steps[-1], disk_left))
        if path.name.startswith("checkpoint-"): steps.append(int(path.name.partition("-")[2]))
    with monkeypatch.context() as patched:
        disk = Disk(tmp_path/"out", patched, after)
        run(text, tmp_path/"out", save_steps=2, save_total_limit=1)
    names = [name for name, _, _ in kept]
    assert names[:4] == [f"checkpoint-{n}" for n in (2, 4, 6, 8)] and {"model.safetensors", "finetune.json"} < {*names}
    for name, before, folders in kept:
        for folder, lost in zip(folders, (False, True)):
            found, new = newest(folder), name.startswith("checkpoint-") and not lost
            if found == folder: finished.append((name, lost))
            else: assert (found.name if found else "checkpoint-0") == (name if new else f"checkpoint-{before}")
    assert finished == [("finetune.json", False)]  # the last, which says that all is there
    plain = sha256_of(tmp_path/"out/model.safetensors")
    for number, kind in ((1, 0), (2, 1), (len(kept) - 1, 1)):
        folder = kept[number][2][kind]
        run(text, folder, save_steps=2, save_total_limit=1)
        assert sha256_of(folder/"model.safetensors") == plain
