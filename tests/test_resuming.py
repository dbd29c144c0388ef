"The same command again: from where the run was, to the same weights, whatever stopped it; what is another's stays."
import json, os, random, shutil, time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, TrainerCallback

from colab_gpt2 import finetune
from colab_gpt2.core import sha256_of
from colab_gpt2.engine.callbacks import AFTER, Listener
from colab_gpt2.errors import fields_of
from colab_gpt2.model.loading import load_tokenizer, new_model
from colab_gpt2.signals import Interrupted
from colab_gpt2.your_runs import unfinished


pytestmark = pytest.mark.filterwarnings("ignore:Resuming at", "ignore:.* in all; 100 or more")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    "Two texts, and a small GPT-2 with dropout everywhere."
    folder = tmp_path_factory.mktemp("text")
    for name, word, articles in (("train", "day", 60), ("eval", "night", 30)):
        page = (f" = Article {i} = \n \n The tide of {word} {i} came in at {i % 12} o'clock and went out . \n"
                for i in range(articles))
        (folder/f"{name}.txt").write_text("".join(page))
    toy = GPT2Config(n_layer=1, n_embd=32, n_head=2, n_positions=64, vocab_size=8192, attn_pdrop=0.1)
    new_model(toy, seed=0).save_pretrained(folder/"toy")
    load_tokenizer("tiny").save_pretrained(folder/"toy")
    return folder


@pytest.fixture(scope="module")
def run(text):
    def run(output_dir, **changes):
        files = {f"{name}_file": str(text/f"{name}.txt") for name in ("train", "eval")}
        place = output_dir and str(output_dir)
        options = dict(model=str(text/"toy"), block_size=32, effective_batch_size=8, num_train_epochs=2, prompt="The",
                       max_new_tokens=2, precision="fp32", cache_dir=str(text/"cache"), output_dir=place,
                       learning_rate=1e-3, logging_steps=4, progress=False, keep_attention_dropout=True, **files)
        return finetune(**{**options, **changes})
    return run


class Dies(TrainerCallback):
    "The process is gone after so many steps: nothing is saved any more. Random numbers are drawn in each step."
    def __init__(self, step=None): self.step = step
    def on_step_end(self, args, state, control, **kwargs):
        random.random(), np.random.rand(), torch.rand(3)
        if state.global_step == self.step: raise RuntimeError("killed")


class Asks(Listener):
    "Asks the run to stop after a step, as a signal does."
    stop = None
    def __init__(self, step): self.step = step
    def on_stage(self, stage, stop=None, **facts): self.stop = stop or self.stop
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step: self.stop.ask()


def killed(run, folder, step, **changes):
    with pytest.raises(RuntimeError, match="killed"): run(folder, callbacks=[Dies(step)], **changes)


@pytest.fixture(scope="module")
def plain(run, tmp_path_factory):
    "A run that nothing stops, for each set of changes."
    made = {}
    def plain(**changes):
        key = str(changes)
        if key not in made:
            folder = tmp_path_factory.mktemp("plain")/"out"
            made[key] = run(folder, callbacks=[Dies()], **changes), folder
        return made[key]
    return plain


WAYS = [dict(), dict(method="lora", lora_rank=4, use_dora=True, use_rslora=True),
        dict(load_in_4bit=True, lora_rank=32, optim="adamw_bnb_8bit", eval_steps=2, early_stopping_patience=0),
        dict(trainer_args=dict(neftune_noise_alpha=5.0))]

@pytest.mark.parametrize("changes", WAYS, ids=str)
def test_a_killed_run_ends_with_the_weights_and_losses_of_one_that_was_not(run, plain, tmp_path, changes):
    "It dies twice, inside an epoch and between two log entries; its checkpoints are not at the plain run's steps."
    result, folder = plain(**changes)
    killed(run, tmp_path/"out", 3, save_steps=2, **changes)
    killed(run, tmp_path/"out", 6, save_steps=5, **changes)
    again = run(tmp_path/"out", callbacks=[Dies()], save_steps=7, **changes)
    assert again.resumed_from.endswith("checkpoint-5") and again.losses == result.losses and again.steps == result.steps
    assert sha256_of(folder/"model.safetensors") == sha256_of(tmp_path/"out"/"model.safetensors")


def test_a_machine_with_less_memory_goes_on_with_smaller_micro_batches(run, plain, tmp_path):
    "Sums in another order; without dropout, whose random numbers would differ too."
    changes = dict(keep_attention_dropout=False, tune=True, trainer_args={}, model=no_dropout(run, tmp_path))
    result, folder = plain(**changes)
    killed(run, tmp_path/"out", 6, save_steps=5, **changes)
    told = "was computed in fp32 with micro-batches of 8 before, and is in fp32 with micro-batches of 2 now"
    with pytest.warns(UserWarning, match=told):
        again = run(tmp_path/"out", per_device_train_batch_size=2, **changes)
    assert again.resumed_from.endswith("checkpoint-5") and again.plan.recipe.micro_batch == 2
    assert [e["loss"] for e in again.losses] == pytest.approx([e["loss"] for e in result.losses], rel=1e-4)


def test_what_a_session_before_could_hold_at_once_is_held_again(run, plain, tmp_path, monkeypatch):
    "The plan of another hour, with less free memory, would divide a step in another way: other sums, other weights."
    result, folder = plain()
    killed(run, tmp_path/"out", 6, save_steps=5)
    from colab_gpt2 import training
    def smaller(model, blocks, runtime, config, real=training.plan_run):
        plan = real(model, blocks, runtime, config)
        return plan if config.per_device_train_batch_size else plan.with_micro_batch(2, "less memory")
    monkeypatch.setattr(training, "plan_run", smaller)
    again = run(tmp_path/"out", callbacks=[Dies()])
    assert again.plan.recipe.micro_batch == 8 and (again.losses, again.files) == (result.losses, result.files)


def no_dropout(run, folder):
    new_model(GPT2Config(n_layer=1, n_embd=32, n_head=2, n_positions=64, vocab_size=8192, attn_pdrop=0., resid_pdrop=0.,
                         embd_pdrop=0.), seed=0).save_pretrained(folder/"plain")
    load_tokenizer("tiny").save_pretrained(folder/"plain")
    return str(folder/"plain")


def test_a_finished_run_is_returned_and_nothing_is_trained_or_written(run, plain, recwarn):
    result, folder = plain()
    recwarn.clear()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again = run(folder, precision="auto", save_steps=1, overwrite_output_dir=False, max_minutes=99)
    assert again.repeated
    assert (again.losses, again.samples, again.files) == (result.losses, result.samples, result.files)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert [str(w.message) for w in recwarn if issubclass(w.category, UserWarning)] == []


def test_a_finished_run_that_is_evaluated_in_another_way_is_not_trained_again(run, plain, tmp_path):
    _, folder = plain()
    shutil.copytree(folder, tmp_path/"out")
    again = run(tmp_path/"out", eval_stride=7, max_new_tokens=3)
    assert again.repeated and again.perplexity_after.stride == 7 and again.samples["after"].tokens == 3
    assert run(tmp_path/"out", eval_stride=7, max_new_tokens=3).to_dict() == again.to_dict()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_finished_model_that_is_damaged_is_made_again_from_the_last_checkpoint(run, plain, tmp_path, name):
    result, folder = plain()
    shutil.copytree(folder, tmp_path/"out")
    file = tmp_path/"out"/name
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.warns(UserWarning, match=f"out is skipped: {name}: missing, or corrupted"): again = run(tmp_path/"out")
    assert again.resumed_from.endswith(f"checkpoint-{result.steps}") and again.losses == result.losses
    assert again.files == result.files and sha256_of(file) == result.files[name]


@pytest.mark.parametrize("was, becomes", [('"runtime"', '"runtimf"'), ('"seed": 42', '"seed": 43'), ("}", "")])
def test_a_damaged_result_is_named_and_the_model_made_again(run, plain, tmp_path, was, becomes):
    result, folder = plain()
    shutil.copytree(folder, tmp_path/"out")
    file = tmp_path/"out"/"finetune.json"
    file.write_text(file.read_text().replace(was, becomes))
    with pytest.warns(UserWarning, match="finetune.json is skipped: it is corrupted"): again = run(tmp_path/"out")
    assert again.resumed_from.endswith(f"checkpoint-{result.steps}") and again.files == result.files


LONGER = ("num_train_epochs was 2.0, now it is 3.0; lr_scheduler_type was linear, now it is cosine; learning_rate was "
          "0.001, now it is 0.0001. To continue it with these settings, set resume='")
OTHERS = [(dict(seed=7), "seed was 42, now it is 7. Restore that", True),
          (dict(learning_rate=1e-4, num_train_epochs=3, lr_scheduler_type="cosine"), LONGER, True),
          (dict(block_size=16, method="lora"), "block_size was 32, now it is 16; method was full, now", True),
          (dict(learning_rate=None), "learning_rate was 0.001, now it is 0.0005", False),
          (dict(from_scratch=True), "the weights of model .*toy are others. Restore", False)]

@pytest.mark.parametrize("changes, said, at_once", OTHERS, ids=lambda given: str(given)[:30])
def test_another_run_is_refused_with_all_that_differs(run, plain, changes, said, at_once):
    "What the settings say is told before a model is loaded."
    _, folder = plain()
    heard, before = Hears(), sorted(folder.rglob("*"))
    with pytest.raises(FileExistsError, match=f"holds the model of another run: {said}") as refused:
        run(folder, callbacks=[heard], **changes)
    assert ("overwrite_output_dir" in fields_of(refused.value)) and sorted(folder.rglob("*")) == before
    assert heard.stages == ([] if at_once else ["loading"])


def test_another_model_is_named_before_it_is_read(run, plain, text, tmp_path):
    "An advice to go on with the run in the folder would fail."
    _, folder = plain()
    shutil.copytree(text/"toy", tmp_path/"other")
    with pytest.raises(FileExistsError, match="model was .*toy, now it is .*other; max_steps was .* Restore that"):
        run(folder, model=str(tmp_path/"other"), max_steps=9)


class Hears(Listener):
    def __init__(self): self.stages, self.facts = [], {}
    def on_stage(self, stage, **facts):
        self.stages.append(stage)
        self.facts.update(facts)


def test_another_text_or_tokenizer_is_another_run(run, plain, text, tmp_path):
    result, folder = plain()
    (tmp_path/"other.txt").write_text((text/"eval.txt").read_text() * 2)
    with pytest.raises(FileExistsError, match="the text is another one. To train its model on this text, set model to"):
        run(folder, train_file=str(tmp_path/"other.txt"))
    moved = shutil.copy(text/"train.txt", tmp_path/"moved.txt")
    assert run(folder, train_file=str(moved), cache_dir=str(tmp_path/"cache")).repeated


def test_other_weights_of_the_same_name_are_another_run(run, plain, text, tmp_path):
    model = Path(shutil.copytree(text/"toy", tmp_path/"toy"))
    _, folder = plain()
    assert run(folder, model=str(model)).repeated  # the same weights elsewhere
    weights = load_file(model/"model.safetensors")
    weights["transformer.wpe.weight"][0, 0] += 1e-3
    save_file(weights, model/"model.safetensors", metadata=dict(format="pt"))
    with pytest.raises(FileExistsError, match="model was .*toy, now it is "): run(folder, model=str(model))


def test_a_longer_run_continues_in_the_same_folder_and_is_resumed_and_returned_like_any(run, plain, tmp_path):
    "Killed on the way, the same command goes on from its own checkpoint; so does one that no longer says from where."
    _, folder = plain()
    shutil.copytree(folder, tmp_path/"out")
    longer = dict(num_train_epochs=3, resume=str(tmp_path/"out"))
    shutil.copytree(folder, tmp_path/"one")
    whole = run(tmp_path/"one", callbacks=[Dies()], **{**longer, "resume": str(tmp_path/"one")})
    killed(run, tmp_path/"out", 15, save_steps=14, **longer)
    again = run(tmp_path/"out", callbacks=[Dies()], save_steps=14, **longer)
    assert again.resumed_from.endswith("checkpoint-14") and again.losses == whole.losses
    assert again.files == whole.files
    assert run(tmp_path/"out", **longer).repeated and run(tmp_path/"out", num_train_epochs=3).repeated


def test_an_older_checkpoint_is_continued_and_the_newer_ones_of_the_former_run_go_first(run, tmp_path):
    killed(run, tmp_path/"out", 7, save_steps=2)
    older = dict(resume=str(tmp_path/"out"/"checkpoint-4"), learning_rate=1e-4)
    killed(run, tmp_path/"out", 6, save_steps=1, **older)
    assert "checkpoint-5" in {path.name for path in (tmp_path/"out").glob("checkpoint-*")}
    assert int(run(tmp_path/"out", **older).resumed_from.rpartition("-")[2]) >= 5


def test_a_run_does_not_end_before_what_it_continues_from(run, plain, tmp_path):
    with pytest.raises(ValueError, match=r"resume is at step \d+, and this run ends at 1: give an earlier checkpoint"):
        run(tmp_path/"out", resume=str(plain()[1]), max_steps=1)


@pytest.mark.parametrize("changes", [dict(seed=7), dict(effective_batch_size=4), dict(method="lora")], ids=str)
def test_what_a_checkpoint_fixes_cannot_change(run, plain, tmp_path, changes):
    _, folder = plain()
    name = next(iter(changes))
    with pytest.raises(ValueError, match=f"resume .* is of a run that cannot continue with these settings: {name} was"):
        run(tmp_path/"out", resume=str(folder), **changes)
    assert not (tmp_path/"out").exists()


def test_a_folder_with_foreign_files_is_refused_and_one_with_leftovers_is_not(run, text, tmp_path):
    out = tmp_path/"out"
    (out/"checkpoint-3").mkdir(parents=True)
    (out/"checkpoint-3"/"model.safetensors").write_bytes(b"cut")
    (out/".out.1.abcdefgh.part").mkdir()
    (out/".running.json").write_text('{"process": 1, "machine": "another", "boot": "x", "since": 0}')
    os.utime(out/".running.json", (0, 0))
    with pytest.warns(UserWarning, match="checkpoint-3 is skipped: it has no whole.json"): run(out, max_steps=2)
    (tmp_path/"taken").mkdir()
    (tmp_path/"taken"/"thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds no run to resume .thesis.txt."): run(tmp_path/"taken")
    with pytest.raises(FileExistsError, match="is not empty; set resume='auto'"): run(out, max_steps=2, resume="never")


def test_a_run_without_checkpoints_that_is_killed_when_its_model_is_saved_begins_again(run, tmp_path, monkeypatch):
    "The folder says whose the model is before it is there."
    from colab_gpt2 import measuring
    options = dict(save_steps=-1)
    save = measuring.save_model
    def saved(*given):
        save(*given)
        raise RuntimeError("killed")
    monkeypatch.setattr(measuring, "save_model", saved)
    with pytest.raises(RuntimeError, match="killed"): run(tmp_path/"out", **options)
    monkeypatch.setattr(measuring, "save_model", save)
    again = run(tmp_path/"out", **options)
    assert again.resumed_from is None
    assert again.files["model.safetensors"] == sha256_of(tmp_path/"out"/"model.safetensors")


def test_the_run_says_where_it_resumes(run, text, tmp_path):
    killed(run, tmp_path/"out", 6, save_steps=5)
    heard = Hears()
    with pytest.warns(UserWarning, match="^Resuming at step 5 of 12.$"): run(tmp_path/"out", callbacks=[heard])
    assert str(heard.facts["resuming"]) == "Resuming at step 5 of 12."
    assert heard.facts["resumed_from"].name == "checkpoint-5"


class Spoils(TrainerCallback):
    "Loses the weights after a step, unless the learning rate was halved."
    def __init__(self, step, always=False): self.step, self.always, self.rates, self.begun = step, always, set(), []
    def on_train_begin(self, args, state, control, **kwargs): self.begun.append(state.global_step)
    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.rates.add(args.learning_rate)
        if state.global_step == self.step and (self.always or args.learning_rate == 1e-3):
            next(model.parameters()).data.fill_(float("nan"))


@pytest.mark.parametrize("step, begun", [(2, [0, 0]), (7, [0, 5]), (12, [0, 10])], ids=["first", "inside", "last"])
def test_a_run_that_diverges_goes_back_once_with_half_the_rate(run, tmp_path, step, begun):
    "To the newest good checkpoint, or the beginning; from its very last step too."
    spoils = Spoils(step)
    with pytest.warns(UserWarning, match="goes back to .* and on with half the learning rate, once"):
        result = run(tmp_path/"out", callbacks=[spoils], save_steps=5, save_total_limit=None)
    assert spoils.begun == begun and spoils.rates == {1e-3, 5e-4} and result.steps == 12
    factors = {int(p.name.split("-")[1]): json.loads((p/"whole.json").read_text())["rate_factor"]
               for p in (tmp_path/"out").glob("checkpoint-*")}
    assert factors == {n: 1. if n <= begun[-1] else 0.5 for n in (5, 10, 12)}
    assert all(value.isfinite().all() for value in load_file(tmp_path/"out"/"model.safetensors").values())


def test_what_to_do_after_a_stop_is_another_thing_with_overwrite(run, tmp_path):
    without = r"Run it again without overwrite_output_dir=True to resume\."
    for overwrite, advice in (True, without), (False, "Run the same again to resume"):
        with pytest.raises(KeyboardInterrupt, match=rf"saved in \S+checkpoint-\d+\. {advice}"):
            run(tmp_path/"out", callbacks=[Asks(3 if overwrite else 8)], overwrite_output_dir=overwrite)


def test_a_run_whose_source_is_in_its_folder_keeps_it(run, tmp_path):
    killed(run, out := tmp_path/"out", 5, save_steps=4)
    source = str(out/"checkpoint-4")
    again = run(out, model=source, resume=source, num_train_epochs=3, save_steps=2, learning_rate=1e-4)
    assert again.steps == 18 and sorted(os.listdir(out))[:3] == ["checkpoint-16", "checkpoint-18", "checkpoint-4"]


def test_a_file_that_somebody_has_changed_is_kept_beside_the_model(run, plain, tmp_path):
    "A finished model whose weights were edited, and files that were there before the model of a run that is resumed."
    result, folder = plain()
    for out in tmp_path/"edited", tmp_path/"resumed":
        shutil.copytree(folder, out)
        (out/"model.safetensors").write_bytes(b"mine")
    (out/"finetune.json").unlink()
    for out in tmp_path/"edited", tmp_path/"resumed":
        with pytest.warns(UserWarning, match=r"is kept as .*model.safetensors.before\."): again = run(out)
        assert (out/"model.safetensors.before").read_bytes() == b"mine" and not (out/"config.json.before").exists()
        assert sha256_of(out/"model.safetensors") == again.files["model.safetensors"]


def test_a_model_whose_run_was_killed_before_its_evaluation_is_not_overwritten_by_another(run, tmp_path):
    class Ends(Listener):
        def on_stage(self, stage, **facts):
            if stage == AFTER: raise RuntimeError("killed")
    with pytest.raises(RuntimeError, match="killed"): run(out := tmp_path/"out", callbacks=[Ends()], save_steps=-1)
    before = sha256_of(out/"model.safetensors")
    with pytest.raises(FileExistsError, match="holds the model of another run: seed was 42, now"): run(out, seed=7)
    assert sha256_of(out/"model.safetensors") == before


def test_a_continued_run_that_diverges_goes_back_to_where_it_continued_from(run, plain, tmp_path):
    _, folder = plain()
    spoils = Spoils(13)
    with pytest.warns(UserWarning, match="goes back to checkpoint-12"):
        run(tmp_path/"out", resume=str(folder), num_train_epochs=3, callbacks=[spoils], save_steps=5)
    assert spoils.begun == [12, 12]
    again, stops = r"start again with learning_rate=\S+, not \S+, and another output_dir\.", dict(on_divergence="stop")
    with pytest.raises(FloatingPointError, match=again):
        run(tmp_path/"new", resume=str(folder), num_train_epochs=3, callbacks=[Spoils(13)], save_steps=5, **stops)


def test_a_continued_run_is_found_on_a_new_machine_without_its_source(run, plain, tmp_path):
    _, folder = plain()
    source = shutil.copytree(folder, tmp_path/"source")
    same = dict(resume=str(source), num_train_epochs=3, mirror=str(tmp_path/"mirror"), save_steps=2)
    killed(run, tmp_path/"out", 15, **same)
    for lost in (tmp_path/"out", source): shutil.rmtree(lost)
    again = run(tmp_path/"out", **same)
    assert again.resumed_from.endswith("checkpoint-14") and again.steps == 18


def test_a_resumed_run_keeps_half_the_rate(run, tmp_path):
    out = tmp_path/"out"
    with pytest.raises(RuntimeError, match="killed"): run(out, callbacks=[Spoils(7), Dies(11)], save_steps=5)
    assert json.loads((out/"checkpoint-10"/"whole.json").read_text())["rate_factor"] == 0.5
    after, whole = Spoils(-1), Spoils(7)
    result = run(out, callbacks=[after, Dies()])
    assert after.begun == [10] and after.rates == {5e-4}
    assert run(tmp_path/"whole", callbacks=[whole, Dies()], save_steps=5).losses == result.losses


@pytest.mark.parametrize("policy, always", [("stop", False), ("halve", True)])
def test_a_run_that_diverges_again_or_must_stop_ends_and_keeps_what_was_good(run, tmp_path, policy, always):
    run(tmp_path/"out", max_steps=2)
    good = (tmp_path/"out"/"model.safetensors").read_bytes()
    with pytest.raises(FloatingPointError, match="start again with learning_rate="):
        run(tmp_path/"out", overwrite_output_dir=True, callbacks=[Spoils(7, always)], save_steps=5,
            on_divergence=policy)
    assert (tmp_path/"out"/"model.safetensors").read_bytes() == good
    assert [p.name for p in (tmp_path/"out").glob("checkpoint-*")] == ["checkpoint-5"]


def test_a_new_machine_resumes_from_the_mirror_and_returns_what_it_holds(run, plain, tmp_path, text):
    "The output folder is gone, and the model lies elsewhere; first in mid-run, then after the end."
    result, folder = plain()
    mirror = str(tmp_path/"mirror")
    killed(run, tmp_path/"out", 8, save_steps=5, mirror=mirror)
    wait_for(lambda: list((tmp_path/"mirror").glob("out-*/checkpoint-5/whole.json")))
    shutil.rmtree(tmp_path/"out")
    again = run(tmp_path/"out", callbacks=[Dies()], mirror=mirror)
    assert again.resumed_from.endswith("checkpoint-5") and (again.losses, again.files) == (result.losses, result.files)
    shutil.rmtree(tmp_path/"out")
    last = run(tmp_path/"out", mirror=mirror)
    assert last.repeated and last.losses == result.losses
    assert sha256_of(tmp_path/"out"/"model.safetensors") == result.files["model.safetensors"]


def wait_for(seen):
    for _ in range(600):
        if seen(): return
        time.sleep(0.05)
    raise AssertionError("never seen")


def test_a_run_without_a_folder_finds_its_own_or_takes_the_next(run, tmp_path, monkeypatch):
    "Under its text's name; another machine finds it in the mirror, whatever number it has there."
    monkeypatch.chdir(tmp_path)
    mirror = dict(mirror=str(tmp_path/"mirror"), max_steps=4)
    assert run(None, **mirror).output_dir == "train"
    with pytest.raises(Interrupted): run(None, seed=7, callbacks=[Asks(2)], **mirror)
    assert [path.name for path in Path("train-2").glob("checkpoint-*")] == ["checkpoint-2"]
    [left] = unfinished(tmp_path)
    assert (left.name, left.step, left.config.seed, left.config.output_dir) == ("train-2", 2, 7, "train-2")
    again = finetune(left.config, progress=False)
    assert (again.output_dir, again.resumed_from) == ("train-2", "train-2/checkpoint-2")
    assert unfinished(tmp_path) == []
    assert run(None, **mirror).repeated and sorted(p.name for p in tmp_path.glob("train*")) == ["train", "train-2"]
    (tmp_path/"new").mkdir()
    monkeypatch.chdir(tmp_path/"new")
    there = run(None, seed=7, **mirror)
    assert (there.output_dir, there.repeated, there.files) == ("train", True, again.files)
