"Two runs side by side on the command line and in the panel: what there is of them, and what is refused in one line."
import json, os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from colab_gpt2 import ComparePanel, compare
from colab_gpt2.cli import app

MEASURED = dict(unit="token", split="test", stride=32, context=64, tokens=900, words=700, bytes=4000)


@pytest.fixture
def cli(tmp_path, monkeypatch):
    "Call `colab-gpt2` in an empty folder."
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(app, words)


def leave_run(name, nats=3000., **told):
    "A folder with what a finished run tells of itself, and no weights."
    Path(name).mkdir()
    told = dict(config=dict(learning_rate=None, seed=42, train_file="a.txt"), steps=40, output_dir=name,
                losses=[dict(step=1, loss=6.), dict(step=40, loss=nats / 900)], fingerprint=dict(text="5e1f", seed=42),
                evaluated=dict(text="f00d", prompt="The tide", seed=42, max_new_tokens=4), perplexity_after=dict(
                    MEASURED, value=2.718281828 ** (nats / 900), nats=nats)) | told
    Path(name, "finetune.json").write_text(json.dumps(told))


def test_two_runs_are_a_table_and_one_json_object(cli):
    leave_run("a")
    leave_run("b", 2700., fingerprint=dict(text="5e1f", seed=7, learning_rate=5e-4))
    table = cli("compare", "a", "b").stdout
    for words in ("a | b", "42 | 7", "28.03 | 20.09 (× 0.717)"): assert words in table, table
    told = json.loads(cli("compare", "a", "b", "--json").stdout)
    assert told["settings"] == dict(seed=[42, 7], learning_rate=[None, 5e-4])
    assert [run["name"] for run in told["runs"]] == ["a", "b"]


@pytest.mark.parametrize("other, said", [
    ("nowhere", "nowhere holds no finished run; give a run's output folder"), (".", ". holds no finished run"),
    ("text.txt", "text.txt holds no finished run"), ("a", "a and a are the same run"),
    ("copy", "a and copy are the same run"), ("begun", "begun holds no finished run")])
def test_what_is_no_second_run_is_told_in_one_line(cli, other, said):
    leave_run("a")
    leave_run("copy")
    Path("text.txt").write_text("no run")
    Path("begun").mkdir()
    Path("begun/finetune.json").write_text(json.dumps(dict(fingerprint=dict(seed=42))))  # its model is on its way
    ran = cli("compare", "a", other)
    assert (ran.exit_code, ran.stdout.strip()) == (1, "") and ran.stderr.count("\n") == 1 and said in ran.stderr


@pytest.mark.parametrize("changes, said", [
    (dict(evaluated=dict(text="another", prompt="The tide")), "The held-out texts are different"),
    (dict(fingerprint=dict(text="another")), "The training texts are different"),
    (dict(perplexity_after=dict(MEASURED, value=2., nats=9., stride=64)), "another stride are not comparable"),
    (dict(losses=[], perplexity_after=None), "old has no curve: a run of an older version."),
    (dict(losses=None, perplexity_after=dict(value=3.)), "old has no perplexity to compare.")])
def test_what_is_not_comparable_is_said(cli, changes, said):
    leave_run("a")
    leave_run("old", **changes)
    assert said in " ".join(compare("a", "old", progress=False).notes)
    panel = ComparePanel(run_a="a", run_b="old")
    assert panel.start() and said in panel.view.value and panel.view.value.count("<svg") == 2


def test_a_tokenizer_of_another_kind_is_compared_by_the_word(cli):
    leave_run("a")
    leave_run("b", fingerprint=dict(text="5e1f", tokenizer="0"), perplexity_after=dict(
        MEASURED, value=9., nats=2700., tokens=1234))
    compared = compare("a", "b", progress=False)
    assert [p.unit for p in compared.card.rows] == ["word", "byte"] and "another count" in " ".join(compared.notes)


# All runs

def test_the_runs_of_a_folder_are_listed(cli):
    "The newest first; an archive, an empty folder and a published model are no runs of a folder."
    for i, name in enumerate(("older", "newer")):
        leave_run(name, samples=dict(after=dict(text=f"\n {name} tide\nand more")), dataset="poems")
        os.utime(Path(name, "finetune.json"), (i, i))
    for name in ("empty", "published"): Path(name).mkdir()
    Path("published", "config.json").write_text("{}")
    told = json.loads(cli("runs", "--json").stdout)
    assert [(run["name"], run["sample"], run["text"]) for run in told] == [
        (name, f"{name} tide", "poems") for name in ("newer", "older")]
    assert told[0]["finished"] and told[0]["perplexity"] == pytest.approx(28.03, abs=0.01)
    assert "1970-01-01 00:00" in cli("runs").stdout


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"config": 7}', b'{"config": {}, "samples": 3}'])
def test_a_damaged_record_is_left_out_with_a_word(cli, content):
    leave_run("good")
    Path("bad").mkdir()
    Path("bad", "finetune.json").write_bytes(content)
    said = cli("runs", "--json")
    assert [run["name"] for run in json.loads(said.stdout)] == ["good"] and said.exit_code == 0
    assert "note: bad is damaged and left out" in said.stderr


def test_a_damaged_archive_on_the_drive_is_left_out_with_a_word(cli):
    place = Path("drive", "colab-gpt2")
    place.mkdir(parents=True)
    (place/"torn.tar.gz").write_bytes(b"\x1f\x8b\x08\x00torn")
    (place/"others.tar.gz").mkdir()
    said = cli("runs", "--drive", "drive", "--json")
    assert json.loads(said.stdout) == [] and "torn.tar.gz is damaged and left out" in said.stderr
    assert json.loads(cli("runs", "--drive", "nowhere", "--json").stdout) == []


def test_a_dead_link_hides_no_run_of_the_drive_and_a_home_folder_is_one(cli, monkeypatch):
    monkeypatch.setenv("HOME", os.getcwd())
    (place := Path("drive", "colab-gpt2", "runs", "tides-0123abcd", "finished")).mkdir(parents=True)
    leave_run("tides")
    os.rename("tides/finetune.json", place/"finetune.json")
    Path("drive", "colab-gpt2", "x.tar.gz").symlink_to("nowhere")
    said = cli("runs", "--drive", "~/drive", "--json")
    assert [run["name"] for run in json.loads(said.stdout)] == ["tides"] and "left out" not in said.stderr


def test_a_stopped_run_is_one_line_with_its_copy_on_the_drive(tmp_path, monkeypatch):
    "Of a real run, from its checkpoint and its mirror; finished, from its folder, its mirror and its archive."
    from colab_gpt2 import archive_model, finetune, runs, save_to_drive
    from colab_gpt2.two_runs import told_by
    from transformers import TrainerCallback
    monkeypatch.chdir(tmp_path)
    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3: raise KeyboardInterrupt
    Path("poems.txt").write_text("\n\n".join(f"The tide of day {i} came in ." for i in range(300)))
    config = dict(model="tiny", train_file="poems.txt", output_dir="mine", max_steps=4, block_size=32, save_steps=2,
                  effective_batch_size=2, max_new_tokens=4, mirror="drive/colab-gpt2/runs", progress=False)
    with pytest.raises(KeyboardInterrupt): finetune(**config, callbacks=[Stops()])
    [run] = runs(drive="drive")
    assert (run.state, run.where, run.model) == ("stopped at step 2 of 4", "here and on the Drive", "tiny")
    finetune(**config)
    save_to_drive(archive_model("mine", progress=False), drive="drive", progress=False)
    [run] = runs(drive="drive")
    assert (run.state, run.where, run.place, run.text) == ("4 steps", "here and on the Drive", "mine", "poems")
    Path("elsewhere").mkdir()
    Path("mine").rename("elsewhere/mine")
    [run] = runs(drive="drive")
    assert (run.name, run.where, told_by(run.place).name) == ("mine", "on the Drive", "mine")


def test_the_panel_shows_the_runs_and_compares_two_of_them(cli):
    "The one that was stopped is in the table and not among those to compare; a damaged one is told of."
    from colab_gpt2.engine.checkpoints import sealed
    panel = ComparePanel().ready()
    assert panel.compare.disabled and panel.said.startswith("Train a second run") and panel.table.value == ""
    leave_run("a"), leave_run("b", 2700.)
    for name in ("stopped/checkpoint-5", "bad"): Path(name).mkdir(parents=True)
    told = dict(run=dict(seed=9), step=5, steps=48, saved="2026-11-29T12:21:47Z")
    Path("stopped/checkpoint-5/whole.json").write_text(sealed(told))
    Path("bad/finetune.json").write_text("{")
    panel.again.click()
    assert "stopped at step 5 of 48" in panel.table.value and "bad is damaged and left out" in panel.table.value
    assert {place for _, place in panel.choices[0].widget.options} == {"a", "b"} and not panel.compare.disabled
    panel.compare.click()
    assert panel.error is None and "Lower is better" in panel.said and panel.view.value.count("<svg") == 2


def test_a_run_that_has_finished_is_offered(cli):
    class Training:
        config, saved, earlier, followers = type("Config", (), dict(output_dir="new", folder="new")), None, False, []
    leave_run("old")
    panel = ComparePanel(Training).ready()
    assert panel.config.run_a == "old" and panel.compare.disabled
    leave_run("new", 2700.)
    Training.saved = Training.config
    Training.followers[0](None)
    assert (panel.config.run_a, panel.config.run_b) == ("new", "old") and not panel.compare.disabled
