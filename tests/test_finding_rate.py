"A learning rate is found without a trace: the curve, what is stopped, the command line and clicks in the panel."
import json, random
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from colab_gpt2 import FinetuneConfig, FinetunePanel, bench, find_learning_rate
from colab_gpt2.cli import app
from colab_gpt2.core import sha256_of
from colab_gpt2.model.loading import load_config, load_tokenizer, new_model

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    "A config of a run of a random toy, of one layer, on a short text."
    folder = tmp_path_factory.mktemp("rates")
    lines = (f"The tide of day {i} came in at {i % 12} o'clock . \n" for i in range(200))
    (folder/"train.txt").write_text("".join(lines))
    shape = load_config("tiny")
    shape.update(dict(n_layer=1, n_embd=16, n_head=2, n_positions=32))
    new_model(shape, seed=0).save_pretrained(folder/"toy")
    load_tokenizer("tiny").save_pretrained(folder/"toy")
    return FinetuneConfig(model=str(folder/"toy"), train_file=str(folder/"train.txt"), cache_dir=str(folder/"cache"),
                          output_dir=str(folder/"out"), block_size=32, effective_batch_size=4)


def find(config, **options): return find_learning_rate(config, **{"steps": 30, "progress": False, **options})


def files(folder): return {path: sha256_of(path) for path in folder.rglob("*") if path.is_file()}


def test_the_curve_is_the_same_again_and_leaves_no_trace(quick, tmp_path):
    (tmp_path/"finetune.json").write_text("{}")
    config = replace(quick, output_dir=str(tmp_path), overwrite_output_dir=True)
    first, model = find(config), files(tmp_path)
    for seeded in (random.seed, np.random.seed, torch.manual_seed): seeded(7)
    states = random.getstate()[1], np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    again = find(config)
    assert (random.getstate()[1], np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert replace(again, seconds=0.) == replace(first, seconds=0.)
    assert files(tmp_path) == model and [path.name for path in tmp_path.iterdir()] == ["finetune.json"]
    other = find(replace(config, seed=7))
    assert other.losses != first.losses


def test_the_rate_of_a_run_of_several_processes_is_found_in_this_one(quick):
    curve = find(replace(quick, num_processes=2, fsdp="on"), steps=10)
    assert len(curve.losses) > 3 and curve.rates[0] == 1e-7


def test_the_rates_are_those_of_the_steps(quick):
    "A rate of next to nothing changes nothing, a high one much: the curve of one step more begins equal."
    curve = find(quick)
    assert curve.rates[0] == 1e-7 and curve.rates[-1] <= 0.1 and len(curve.rates) == len(curve.losses)
    ratios = [b / a for a, b in zip(curve.rates, curve.rates[1:])]
    assert max(ratios) - min(ratios) < 1e-9
    assert max(curve.losses[:5]) - min(curve.losses[:5]) < 0.2 and min(curve.losses) < curve.losses[0] - 0.3


def test_a_rate_that_explodes_is_never_suggested(quick, monkeypatch):
    monkeypatch.setattr("colab_gpt2.finding_rate.HIGHEST", 1e4)
    curve = find(quick)
    worst = curve.rates[max(range(len(curve.losses)), key=curve.losses.__getitem__)]
    assert curve.ended.startswith("the loss exploded at step") and len(curve.losses) < 30
    assert curve.suggestion is None or curve.suggestion < worst


@pytest.mark.parametrize("step, known", [(12, True), (1, False)])
def test_what_is_stopped_is_the_curve_so_far(quick, step, known):
    def stop(what, done, total):
        if what == "Trying learning rates" and done == step: raise KeyboardInterrupt("Stopped.")
    if known:
        curve = find(quick, progress=stop)
        assert curve.ended.startswith("stopped at step 1") and 10 <= len(curve.rates) == len(curve.smoothed) <= 12
    else:
        with pytest.raises(KeyboardInterrupt): find(quick, progress=stop)


def test_lora_and_other_trackers_are_tried_without_telling_them(quick):
    told = find(quick, method="lora", trainer_args=dict(report_to="tensorboard", logging_strategy="epoch"), steps=10)
    assert len(told.losses) == 10


def words(config):
    names = "model", "train_file", "cache_dir", "block_size", "effective_batch_size"
    return [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(config, name)))]


def test_the_command_line_has_a_table_and_one_json_object(quick, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    def ran(*more): return CliRunner().invoke(app, ["find-rate", *words(quick), "--steps", "12", *more])
    said = ran()
    assert "suggestion" in said.stdout and "at 1.0e-07" in said.stdout and said.exit_code == 0
    assert "note: 12 steps of" in said.stderr and "note: The text is short" not in said.stdout
    told = json.loads(ran("--json").stdout)
    assert len(told["rates"]) == len(told["losses"]) == 12 and told["ended"] == "all were taken at step 12 of 12"
    assert list(tmp_path.iterdir()) == []


def test_a_click_finds_a_rate_and_another_takes_it(quick):
    panel = FinetunePanel(quick).ready()
    assert panel.finder.box.layout.display == "none"
    panel.find.value = True
    assert panel.finder.box.layout.display == "" and panel.finder.use.disabled
    panel.finder.find.click()
    curve = panel.finder.result
    assert panel.finder.error is None, panel.finder.said
    assert panel.finder.box.layout.display == "" and "learning rate" in panel.finder.view.value
    assert any("60 steps of" in note for note in panel.finder.notes) and not panel.finder.running
    assert curve.suggestion, curve.smoothed
    panel.finder.use.click()
    assert panel.config.learning_rate == curve.suggestion and "find-rate" in panel.finder.shell()


def test_a_bench_is_no_training_that_can_be_lost(quick):
    assert bench(quick, steps=3, learning_rate=1e9, progress=False).tokens_per_second > 0


def test_stop_ends_the_search_with_the_curve_so_far(quick):
    panel = FinetunePanel(quick).ready().finder
    report = panel.report
    def stopping(what, done, total):
        if what == "Trying learning rates" and done == 7: panel.halt.click()
        report(what, done, total)
    panel.report = stopping
    curve = panel.start()
    assert curve.ended.startswith("stopped at step") and panel.use.disabled and panel.said.startswith("No suggestion")
    assert not panel.running and panel.halt.layout.display == "none"
