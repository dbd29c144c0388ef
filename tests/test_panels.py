"The panels without a browser: they do what library and command line do, and a click works while a real run trains."
import random, re, signal, subprocess, sys, types
from dataclasses import replace
from pathlib import Path

import pytest

import colab_gpt2
from colab_gpt2.config import FinetuneConfig
from colab_gpt2.errors import Sentence
from colab_gpt2.panels.snippets import as_python, as_shell, differing, quoted
from helpers.colab_stub import colab, stub


def page(n, word="tide"):
    article = " = Article {0} = \n \n The {1} of day {0} came in at {2} o'clock and went out again . \n \n"
    return "".join(article.format(i, word, i % 12) for i in range(n))


@pytest.fixture
def quick(tmp_path, small):
    "A config of a run of twelve short steps."
    (tmp_path/"train.txt").write_text(page(60))
    (tmp_path/"eval.txt").write_text(page(30, "moon"))
    places = dict(train_file="train.txt", eval_file="eval.txt", output_dir="out", cache_dir="cache")
    paths = {name: str(tmp_path/place) for name, place in places.items()}
    return FinetuneConfig(model=small, block_size=64, effective_batch_size=2, max_steps=12, max_new_tokens=6,
                          prompt="The tide", logging_steps=1, **paths)


# The lines of Python and of shell that a panel shows make the very config that it holds.

CONFIGS = [FinetuneConfig(),
           FinetuneConfig(model="tiny", dataset="python-docs", num_train_epochs=3, learning_rate=5e-4, seed=7,
                          prompt=' = "Strings" = \n \n It\'s'),
           FinetuneConfig(train_file="my text.txt", resume="never", tune=False, torch_compile=False,
                          gradient_checkpointing=True, optim="adamw_bnb_8bit", trainer_args={
                              "adam_beta2": 0.95, "lr_scheduler_kwargs": {"num_cycles": 0.3}, "run_name": "a b"})]


@pytest.mark.parametrize("config", CONFIGS)
def test_the_python_line_makes_the_config(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "colab_gpt2", types.SimpleNamespace(finetune=FinetuneConfig))
    made = {}
    exec(as_python("finetune", differing(config)), made)
    assert made["result"] == config


def commands(script):
    "The words of each call of `colab-gpt2` in a script, as bash understands them."
    script = "colab-gpt2() { printf '%s\\0' \"$@\" END; }\n" + script
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    return [call.split("\0")[:-1] for call in said.split("END\0")[:-1]]


@pytest.mark.parametrize("config", CONFIGS)
def test_the_shell_line_makes_the_config(config):
    import typer
    from colab_gpt2.cli import app, take_config
    [[subcommand, *flags]] = commands(as_shell("finetune", differing(config)))
    command = typer.main.get_command(app).commands[subcommand]
    assert take_config(dict(command.make_context(subcommand, flags).params)) == config


@pytest.mark.parametrize("panel", ["RuntimePanel", "DataPanel", "GeneratePanel", "DrivePanel", "ComparePanel"])
def test_the_other_panels_name_flags_and_arguments_that_are_there(panel):
    import inspect, typer
    from colab_gpt2.cli import app
    made = getattr(colab_gpt2, panel)()
    for subcommand, *flags in commands(made.shell()):
        typer.main.get_command(app).commands[subcommand].make_context(subcommand, flags)
    def binding(name): return lambda **given: inspect.signature(getattr(colab_gpt2, name)).bind(**given)
    names = {name: binding(name) for name in re.findall(r"import (\w+)", made.python())}
    code = re.sub(r"from colab_gpt2 import \w+", "", made.python())
    assert names
    exec(code, names)


def test_a_cell_of_a_notebook_passes_on_the_text_as_it_is():
    "IPython reads {…} and $… in a line of shell as Python, quotes or not, before bash does."
    from IPython.core.interactiveshell import InteractiveShell
    parts = ["{", "}", "$", "{1 + 1}", "$name", "${name}", "{name}", "'", '"', "\\", "\\x7b", "\n", "\t", " ",
             "`id`", "!", "a", "7b", "é", "\u200b", "\x1b", "$(id)", "%", "?", "=", "#", "~", "\\frac{a}",
             '{"a": 1}']
    chance = random.Random(0)
    texts = ["".join(chance.choices(parts, k=chance.randrange(1, 9))) for _ in range(400)]
    lines = [f"printf '%s\\0' {quoted(text)}" for text in texts]
    cell = types.SimpleNamespace(user_ns=dict(name="x"))
    assert [InteractiveShell.var_expand(cell, line) for line in lines] == lines
    said = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, check=True).stdout
    assert said.decode().split("\0")[:-1] == texts


# Without a GPU, without a network, with one panel after the other

def test_panels_begin_with_what_works_here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("colab_gpt2.runtime.find_device", lambda: ("cpu", ""))
    panel = colab_gpt2.FinetunePanel().ready()
    assert (panel.config.model, panel.config.dataset) == ("tiny", "python-docs")
    assert "no GPU" in panel.text.value and not panel.buttons["start"].disabled
    panel.values.set(model="gpt2")
    assert "no GPU" not in panel.text.value and "no GPU" not in colab_gpt2.FinetunePanel(model="gpt2").text.value
    monkeypatch.setattr("colab_gpt2.runtime.find_device", lambda: ("cuda", ""))
    monkeypatch.setattr("colab_gpt2.text.hub.hub_trouble", lambda: "gave no answer")
    text = colab_gpt2.DataPanel().ready()
    assert "The Hub gave no answer" in text.said
    with monkeypatch.context() as here:
        here.setattr("colab_gpt2.runtime.find_device", lambda: ("cpu", ""))
        text.start()
        assert text.error is None
        training = colab_gpt2.FinetunePanel(text).ready()
        assert "The Hub gave no answer" in training.text.value  # though the text's panel has said something else since
    monkeypatch.setattr("colab_gpt2.text.hub.hub_trouble", lambda: "")
    assert colab_gpt2.DataPanel().config == FinetuneConfig()


def test_a_text_that_was_fetched_is_counted(quick, monkeypatch):
    import colab_gpt2.panels.forecast as module
    text = colab_gpt2.DataPanel(quick).ready()
    monkeypatch.setattr(module, "COUNTED", 100)  # bytes: as if the text were a long one
    training = colab_gpt2.FinetunePanel(text).ready()
    assert "an estimate from" in training.plan.value
    monkeypatch.setattr(module, "COUNTED", 10**6)
    text.start()
    assert "an estimate from" not in training.plan.value and "counted by the model" in training.plan.value


READ = "Read this text and learn ! "


def upload(widget, name, text):
    "Hand a file over as the browser does: ipywidgets 7 is sent its parts and a count, 8 the value itself."
    content = memoryview(text.encode())
    about = dict(name=name, type="text/plain", size=len(content))
    if "_counter" in widget.keys: widget.set_state(dict(metadata=[about], data=[content], _counter=widget._counter + 1))
    else: widget.set_state(dict(value=[dict(about, content=content, last_modified=0)]))


def test_two_uploads_of_one_name_stay_two_texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    panel = colab_gpt2.DataPanel(FinetuneConfig(model="tiny", cache_dir=str(tmp_path/"cache"))).ready()
    for widget, text in zip(panel.uploads, (READ, "Measure on this . ")): upload(widget, "text.txt", text * 9)
    assert panel.error is None
    kept = [Path(path).read_text() for path in (panel.config.train_file, panel.config.eval_file)]
    assert kept == [READ * 9, "Measure on this . " * 9]
    upload(panel.uploads[0], "text.txt", "Read this instead . " * 9)  # of the same field: it replaces the first
    assert Path(panel.config.train_file).read_text() == "Read this instead . " * 9 and not panel.fetch.disabled


def test_the_same_file_can_be_uploaded_again(tmp_path, monkeypatch):
    "After another text was chosen, or when another panel was busy the first time."
    monkeypatch.chdir(tmp_path)
    panel = colab_gpt2.DataPanel(FinetuneConfig(model="tiny", cache_dir=str(tmp_path/"cache"))).ready()
    for _ in range(2):
        upload(panel.uploads[0], "text.txt", READ * 9)
        assert panel.config.train_file == "uploads/train_file/text.txt"
        assert panel.said.startswith("text.txt: 54 words, ") and "too little" in panel.said
        panel.choice.value = "python-docs"
        assert panel.said == panel.view.value == ""
    other = colab_gpt2.RuntimePanel()
    panel.choice.value = "a text of my own"
    other.work(lambda: upload(panel.uploads[1], "text.txt", "Measure on this ."), "At work", str)
    assert panel.config.eval_file is None and "is busy" in panel.said
    upload(panel.uploads[1], "text.txt", "Measure on this .")
    assert panel.config.eval_file == "uploads/eval_file/text.txt"


@pytest.mark.parametrize("kB, said", [(1, "too little"), (50, "a style"), (1_000, "a style"), (10_000, "a subject")])
def test_an_upload_is_told_how_much_it_is_and_what_it_is_enough_for(kB, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("colab_gpt2.tasks.tokenizer_for_plan", lambda config, download: None)  # not to be fetched now
    panel = colab_gpt2.DataPanel(FinetuneConfig(model="gpt2", cache_dir=str(tmp_path/"cache"))).ready()
    line = "On day {} the tide came in at {} o'clock and went out again.\n"
    text = "".join(line.format(n, n * 7 % 12) for n in range(kB * 16))
    upload(panel.uploads[0], "mine.txt", text)
    words = f"{float(f'{len(text.split()):.3g}'):,.0f} words"
    assert panel.said.startswith(f"mine.txt: {words}, about ") and said in panel.said
    assert ("Needs you" in panel.status.value) == (kB == 1) and "On day 0" in panel.view.value


def test_a_refused_upload_leaves_the_text_that_was_chosen_and_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    panel = colab_gpt2.DataPanel(FinetuneConfig(model="tiny", cache_dir=str(tmp_path/"cache"))).ready()
    upload(panel.uploads[0], "a.csv", "n,text\n" + f"1,{READ}\n" * 9)
    looked = panel.view.value
    upload(panel.uploads[0], "b.txt", "\0\0\0")
    assert panel.said == ("b.txt is binary, not text: byte 0 is zero. Save its text as UTF-8 in a .txt file. "
                          "Still chosen: a.csv.")
    assert "For a bug report" not in panel.status.value and panel.view.value == looked
    assert "cg-invalid" in panel.uploads[0]._dom_classes and not panel.values.problems
    upload(panel.uploads[0], "c.csv", "one,two\n" + "".join(f"{READ},{READ * n}\n" for n in range(9)))  # which of them?
    assert "Choose one by “Column”" in panel.said and panel.more.value
    panel.own.rows["dataset_text_field"].widget.value = "two"
    assert panel.said.startswith("c.csv: ") and "cg-invalid" not in panel.uploads[0]._dom_classes


def test_a_slip_in_the_models_name_and_back_keeps_what_was_chosen_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("colab_gpt2.runtime.find_device", lambda: ("cpu", ""))
    values = colab_gpt2.DataPanel(temperature=0.5).ready().values
    values.set(block_size=128)
    began = values.config
    for name in ("gpt3", "tiny", "gpt2", "gpt2-medium", "tiny"):
        values.offer(dict(model=name))
        assert values.config.block_size == 128 and values.config.temperature == 0.5
    assert values.config == began and began.learning_rate


def test_another_text_of_the_same_name_is_another_forecast(quick, tmp_path):
    panel = colab_gpt2.FinetunePanel(quick, max_steps=-1).ready()
    before = panel.forecaster.plan(panel.config).tokens
    Path(quick.train_file).write_text(Path(quick.train_file).read_text() * 5)
    panel.values.set(seed=8)
    assert panel.forecaster.plan(panel.config).tokens > 3 * before


def test_a_path_that_no_file_can_have_is_marked(quick):
    "Such as the text itself, pasted where its path belongs."
    panel = colab_gpt2.DataPanel(quick).ready()
    field = panel.own.rows["train_file"]
    good = field.widget.value
    refused = {"The tide came in. " * 20: "characters long, too long for a path", "a\0b": "There is no file",
               "~nobody-here/text.txt": "there is no user 'nobody-here'"}
    for bad, said in refused.items():
        field.widget.value = bad
        assert panel.fetch.disabled and said in field.hint.value and (panel.start(), panel.running) == (None, False)
        field.widget.value = good
        assert not panel.fetch.disabled
    assert panel.start()


def test_start_is_on_again_when_what_refused_it_has_gone(quick):
    "The folder was emptied in the file browser, of which no panel hears."
    Path(quick.output_dir).mkdir()
    (Path(quick.output_dir)/"notes.txt").write_text("x")
    panel = colab_gpt2.FinetunePanel(quick).ready()
    assert panel.buttons["start"].disabled and panel.again.layout.display == ""
    (Path(quick.output_dir)/"notes.txt").unlink()
    panel.again.click()
    assert not panel.buttons["start"].disabled and panel.again.layout.display == "none"
    (Path(quick.output_dir)/"notes.txt").write_text("x")
    panel.again.click()
    (Path(quick.output_dir)/"notes.txt").unlink()
    assert panel.start()


def test_a_model_that_was_restored_into_the_awaited_folder_serves(quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = colab_gpt2.FinetunePanel(quick, max_steps=2, output_dir="tuned").ready()
    first.start()
    assert colab_gpt2.DrivePanel(first, drive="mine").start()
    Path("tuned").rename("moved"), Path("tuned.tar.gz").unlink()
    panel = colab_gpt2.FinetunePanel(quick, output_dir="tuned").ready()
    writing = colab_gpt2.GeneratePanel(panel).ready()
    keeping = colab_gpt2.DrivePanel(panel, drive="mine", restore_to="tuned")
    assert writing.start() is None and "no finished model yet" in writing.said
    keeping.loading.value = True  # the fold lists what is there
    assert keeping.restore() and writing.start() and keeping.start()
    panel.form.rows["output_dir"].widget.value = "new"
    assert panel.saved is None and writing.start() is None and not panel.buttons["start"].disabled
    panel.form.rows["output_dir"].widget.value = "moved"
    assert panel.saved.output_dir == writing.config.model == "moved" and writing.start()
    assert "earlier run" in writing.status.value


def test_another_output_folder_in_mid_run_is_not_gone_on_in(quick):
    panel = colab_gpt2.FinetunePanel(quick).ready()
    def leave(): panel.form.rows["output_dir"].widget.value = "elsewhere"; panel.live.stop()
    assert panel.start(callbacks=[At(2, leave)]) is None and "Stopped at step" in panel.said
    assert f"set “Output folder” to {quick.output_dir} again" in panel.said


@pytest.mark.parametrize("value", [{"text.txt": dict(metadata={}, content=READ.encode() * 9)},
                                   ({"name": "text.txt", "content": memoryview(READ.encode() * 9)},)])
def test_an_upload_is_received_in_the_shape_of_either_version(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    panel = colab_gpt2.DataPanel(FinetuneConfig(model="tiny", cache_dir=str(tmp_path/"cache"))).ready()
    panel.receive("train_file", value)
    assert Path(panel.config.train_file).read_text() == READ * 9 and "too little to learn from" in panel.said


def test_two_panels_edit_one_config(quick):
    text = colab_gpt2.DataPanel(quick).ready()
    training = colab_gpt2.FinetunePanel(text, seed=3).ready()
    training.more.rows["block_size"].widget.value = "32"
    assert training.config == text.config == replace(quick, block_size=32, seed=3)
    assert "blocks of 32" in dict(text.start().details())["Train"]
    text.own.rows["train_file"].widget.value = "nowhere.txt"
    assert training.buttons["start"].disabled
    text.choice.value = "python-docs"
    assert not training.buttons["start"].disabled and "python-docs" in training.text.value


# A run, and what may happen to it

class At:
    "A callback that does something at a step, and may lose all weights there."
    def __new__(cls, step, action, lose=False):
        from transformers import TrainerCallback
        class Does(TrainerCallback):
            def on_step_begin(self, args, state, control, model=None, **kwargs):
                if state.global_step != step: return
                if lose: next(model.parameters()).data.fill_(float("nan"))
                action()
        return Does()


def test_the_interrupt_button_is_stop_and_save(quick, capfd):
    panel = colab_gpt2.FinetunePanel(quick).ready()
    assert panel.start(callbacks=[At(4, lambda: signal.raise_signal(signal.SIGINT))]) is None
    saved = Path(quick.output_dir)/"checkpoint-5"
    assert panel.said == f"Stopped at step 5 of 12; saved in {saved}. Press Continue to go on from there."
    assert "<b>Stopped</b>" in panel.progress.value
    assert panel.error is None and (Path(quick.output_dir)/"checkpoint-5").is_dir()
    assert panel.start().resumed_from.endswith("checkpoint-5") and "<b>Done</b>" in panel.progress.value
    capfd.readouterr()
    assert panel.start().steps == 12 and panel.said.startswith("Shown as it ended")
    assert capfd.readouterr() == ("", "")


def test_what_follows_waits_for_a_finished_model_or_tries_a_checkpoint(quick):
    "An older model lies in the folder; the run that is to replace it is stopped, and later resumed to its end."
    import shutil
    from colab_gpt2.model.loading import TINY
    from colab_gpt2.panels.panel import UNFINISHED
    shutil.copytree(TINY, quick.output_dir)
    panel = colab_gpt2.FinetunePanel(quick, overwrite_output_dir=True).ready()
    writing = colab_gpt2.GeneratePanel(panel).ready()
    keeping = colab_gpt2.DrivePanel(panel, drive=str(Path(quick.output_dir).parent/"drive"))
    panel.start(callbacks=[At(4, lambda: signal.raise_signal(signal.SIGINT))])
    assert (keeping.start(), keeping.said, keeping.result, writing.said) == (None, UNFINISHED, None, "")
    assert "(step 5 of 12, not finished)" in writing.choice.value
    titles = f"Before: {quick.model}", f"After: {quick.output_dir} (step 5 of 12, not finished)"
    assert writing.start().titles == titles
    assert "Note: " in writing.status.value and "step 5 of 12, not finished" in writing.kept
    assert panel.start().steps == 12 and "not finished" not in "".join(writing.start().titles)


@pytest.mark.parametrize("what", ["Fetching", "Loading", "train.txt", "eval.txt", "Perplexity", "Generating"])
def test_stop_works_before_the_training(quick, what):
    "In whatever stands before the first step: in a sentence, and nothing half written is left."
    from colab_gpt2.engine.callbacks import Listener
    panel, heard = colab_gpt2.FinetunePanel(replace(quick, max_new_tokens=40)).ready(), []
    class Press(Listener):
        def on_stage(self, stage, **facts): panel.live.pump = self.click
        def click(self):
            if what not in panel.live.what or heard: return
            heard.append(panel.live.what)
            panel.buttons["stop"].click()
    for kept in Path(quick.cache_dir).glob("tokens/*"): kept.unlink()  # the forecast has counted them
    assert panel.start(callbacks=[Press()]) is None and panel.error is None
    assert panel.said == "Stopped before the training; nothing was trained."
    assert len(heard) == 1 and not panel.buttons["start"].disabled
    assert not Path(quick.output_dir).exists() and not list(Path(quick.cache_dir).glob("tokens/*.part"))
    assert panel.start().steps == 12


@pytest.mark.parametrize("where, left", [("training", False), ("evaluating after", True)])
def test_the_result_is_that_of_the_last_run(quick, where, left):
    "The first run ends, the second is stopped: while it trains it leaves no model, afterwards one without a result."
    panel = colab_gpt2.FinetunePanel(quick).ready()
    writing = colab_gpt2.GeneratePanel(panel).ready()
    keeping = colab_gpt2.DrivePanel(panel, drive=str(Path(quick.output_dir).parent/"drive"))
    assert panel.start() is panel.result is not None and writing.start().whole
    panel.values.set(overwrite_output_dir=True, seed=7)
    def stop():
        if panel.live.stage == where: panel.buttons["stop"].click()
    assert panel.start(callbacks=[At(2, lambda: setattr(panel.live, "pump", stop))]) is None
    assert panel.result is None and panel.said.startswith("Stopped")
    assert bool(panel.saved) == (keeping.awaited is None) == left
    assert writing.start().whole and ("not finished" in writing.result.titles[1]) != left


def test_a_run_that_is_refused_leaves_the_result(quick):
    panel = colab_gpt2.FinetunePanel(quick).ready()
    result = panel.start()
    panel.values.set(seed=7)
    assert panel.buttons["start"].disabled and "“Seed” was 42, now it is 7" in panel.outlook.value
    assert panel.start() is None and panel.said.startswith("Not started")
    assert panel.result is result and panel.saved
    assert panel.again.layout.display == "none"  # its own run has left what refuses the next: nothing is missing


def test_after_out_of_memory_the_way_to_other_settings_is_said(quick):
    def fail(): raise MemoryError(Sentence("Out of memory at a micro-batch of 1; set a smaller {block_size}."))
    panel = colab_gpt2.FinetunePanel(quick, save_steps=3).ready()
    assert panel.start(callbacks=[At(4, fail)]) is None and "“Block size”" in panel.said
    rows = panel.more.rows
    rows["block_size"].widget.value = "32"
    assert panel.buttons["start"].disabled and "“Block size” was 64, now it is 32" in panel.outlook.value
    assert "“Overwrite”" in panel.outlook.value
    rows["overwrite_output_dir"].widget.value = True
    assert not panel.buttons["start"].disabled and "from the beginning" in panel.outlook.value
    assert panel.start().plan.recipe.block_size == 32


@pytest.mark.parametrize("error, said", [
    (OSError(28, "No space left on device"), "checkpoint-3"),
    (MemoryError("Out of memory"), "Out of memory"), (KeyboardInterrupt(), "Stopped.")])
def test_an_error_in_the_middle_is_a_sentence_and_start_goes_on(quick, error, said):
    def fail(): raise error
    panel = colab_gpt2.FinetunePanel(quick, save_steps=3, overwrite_output_dir=True).ready()
    assert panel.start(callbacks=[At(4, fail)]) is None
    assert said in panel.said and panel.buttons["start"].description == "Continue from step 3"
    assert not panel.buttons["start"].disabled
    result = panel.start()
    assert result.steps == 12 and result.resumed_from.endswith("checkpoint-3") and panel.error is None


def test_another_run_is_refused_by_what_differs(quick):
    "What lies in the folder is another run's: it is neither resumed nor overwritten, unless that is said."
    colab_gpt2.FinetunePanel(quick, max_steps=2).start()
    panel = colab_gpt2.FinetunePanel(quick).ready()
    assert panel.buttons["start"].disabled and "“Max steps” was 2, now it is 12" in panel.outlook.value
    panel.more.rows["resume"].widget.value = quick.output_dir  # to train it further
    assert not panel.buttons["start"].disabled and "continues from" in panel.outlook.value
    assert panel.start().resumed_from.endswith("checkpoint-2")


# Run all again, on this machine or on a new one

def test_restart_and_run_all_three_times(quick, tmp_path, monkeypatch):
    "Nothing is trained again, every step does what it did before, and one archive is here and one on the Drive."
    monkeypatch.chdir(tmp_path)
    def run_all():
        training = colab_gpt2.FinetunePanel(quick, eval_steps=4).ready()
        panels = (training, colab_gpt2.GeneratePanel(training, seed=1),
                  colab_gpt2.DrivePanel(training, drive="mine"))
        before = training.outlook.value
        return panels, before, [panel.start() for panel in panels]
    (first, *_), _, (result, sides, saved) = run_all()
    for _ in range(2):
        panels, before, (again, *after) = run_all()
        assert "finished already" in before and panels[0].said.startswith("Shown as it ended")
        assert (again.perplexity_after, panels[0].drawn) == (result.perplexity_after, first.drawn)
        for panel in (first, panels[0]): assert "evaluated every 4 steps" in panel.plan.value  # in the reasons
        assert panels[0].live.samples == first.live.samples and panels[0].live.losses == first.live.losses
        assert after[0] == sides and after[1].copy.sha256 == saved.copy.sha256
        assert [panel.error for panel in panels] == [None] * 3 and not any(panel.notes for panel in panels)
    assert f"best: step {result.best_step}: " in first.drawn and len(result.evaluations) == 3
    assert len(list(tmp_path.rglob("*.tar.gz"))) == 2


class Heard:
    "A Listener that keeps what `panel` says when the training begins."
    def __new__(cls, panel, said):
        from colab_gpt2.engine.callbacks import TRAINING, Listener
        class Hears(Listener):
            def on_stage(self, stage, **facts): said.append(panel.said) if stage == TRAINING else None
        return Hears()


def interrupt(): signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("lost", [False, True])
def test_another_session_resumes_without_a_field_touched(quick, tmp_path, lost):
    "After a restart of the kernel, and on a new machine that has only the mirror: the same weights as in one go."
    import shutil
    def weights(folder): return Path(folder, "model.safetensors").read_bytes()
    whole = colab_gpt2.FinetunePanel(quick, output_dir=str(tmp_path/"whole")).start()
    quick = replace(quick, mirror=str(tmp_path/"mirror"))
    colab_gpt2.FinetunePanel(quick).start(callbacks=[At(4, interrupt)])
    if lost: shutil.rmtree(quick.output_dir), shutil.rmtree(quick.cache_dir)
    panel, said = colab_gpt2.FinetunePanel(quick).ready(), []
    assert lost or "resumes at step 5 of 12" in panel.outlook.value
    assert panel.start(callbacks=[Heard(panel, said)]) and panel.error is None
    assert said[0].startswith("Resuming at step 5 of 12") and "It resumed from" in panel.kept
    assert weights(quick.output_dir) == weights(whole.output_dir)
    assert "finished" in panel.progress.value  # on the mirror, in its line


def test_a_run_out_of_time_says_how_it_resumes(quick):
    "A session that is too short for the run: the next Start, or Run all, does the rest."
    panel = colab_gpt2.FinetunePanel(quick, max_minutes=1e-3).ready()
    assert panel.start() is None and panel.error is None
    assert re.match(r"Stopped at step \d+ of 12.*; saved in .* Press Continue to go on from there\.$", panel.said)
    assert panel.buttons["start"].description.startswith("Continue from step")
    assert not panel.outlook.value and not panel.buttons["start"].disabled  # the state and the button say it


def test_a_run_that_diverges_goes_back_and_says_so(quick):
    "The weights are lost at a step: from the checkpoint before it the run ends, at half the rate, with a note."
    panel, lost = colab_gpt2.FinetunePanel(quick, save_steps=3).ready(), [True]
    result = panel.start(callbacks=[At(4, lost.clear, lose=lost)])
    assert result and result.steps == 12 and panel.error is None and panel.said.startswith("Done in")
    assert "learning rate" in panel.status.value.lower() and "Note:" in panel.status.value


def test_a_mirror_that_fails_is_a_line_and_the_run_goes_on(quick, tmp_path):
    (tmp_path/"mirror").mkdir()
    def fail(): (tmp_path/"mirror").rename(tmp_path/"gone"); (tmp_path/"mirror").write_text("in its place")
    panel = colab_gpt2.FinetunePanel(quick, mirror=str(tmp_path/"mirror"), save_steps=3).ready()
    assert panel.start(callbacks=[At(4, fail)]) and panel.error is None
    assert "Training goes on; what is not copied is on this machine only." in panel.progress.value


def test_the_model_of_an_earlier_run_serves_and_is_called_so(quick, monkeypatch, tmp_path):
    "As after a second Run all: the training is refused, and the steps after it use what is there."
    monkeypatch.chdir(tmp_path)
    colab_gpt2.FinetunePanel(quick, max_steps=2).start()
    panel = colab_gpt2.FinetunePanel(quick).ready()
    writing = colab_gpt2.GeneratePanel(panel).ready()
    keeping = colab_gpt2.DrivePanel(panel, drive=str(tmp_path/"drive"))
    assert panel.start() is None and writing.start().before is not None and keeping.start().copy.path.exists()
    assert all("Note: This model is from an earlier run" in after.status.value for after in (writing, keeping))
    panel.values.set(overwrite_output_dir=True)
    assert panel.start() and writing.start() and "earlier run" not in writing.status.value


def test_what_was_suggested_for_tiny_is_not_left_to_another_model(monkeypatch):
    "A panel made for GPT-2 has the defaults, without a GPU too; one that leaves `tiny` leaves its learning rate."
    monkeypatch.setattr("colab_gpt2.runtime.find_device", lambda: ("cpu", ""))
    assert colab_gpt2.FinetunePanel(model="gpt2").config == FinetuneConfig()
    text = colab_gpt2.DataPanel().ready()
    training = colab_gpt2.FinetunePanel(text).ready()
    training.form.rows["num_train_epochs"].widget.value = "3"
    training.form.rows["model"].widget.value = "gpt2"
    text.choice.value = "wikitext-2-raw-v1"
    assert training.config == FinetuneConfig(num_train_epochs=3)


def test_a_bad_value_is_marked_where_it_was_typed(quick):
    panel = colab_gpt2.FinetunePanel(quick).ready()
    rows = panel.form.rows | panel.more.rows
    typed = ("model", "./nofolder"), ("model", "no-such/model"), ("tokenizer", "nope"), ("eval_stride", "100000")
    for name, bad in typed:
        good = rows[name].widget.value
        rows[name].widget.value = bad
        assert panel.buttons["start"].disabled
        assert [marked for marked, row in rows.items() if "cg-bad" in row.hint.value] == [name]
        assert bad in rows[name].hint.value
        rows[name].widget.value = good
        assert not panel.buttons["start"].disabled


def test_a_perplexity_that_rises_is_no_success(quick):
    panel = colab_gpt2.FinetunePanel(quick, model="tiny", learning_rate=0.02, max_steps=4).ready()
    assert panel.start() and "Note: The perplexity has risen from" in panel.status.value
    assert "lower “Learning rate”, or train fewer “Epochs”" in panel.status.value


def test_the_samples_begin_with_ones_own_text(quick):
    "And so do the texts of the panel after it, and of a panel for that folder on another day."
    panel = colab_gpt2.FinetunePanel(quick, max_steps=2, prompt=None).ready()
    assert panel.more.rows["prompt"].widget.placeholder == "automatic" and "prompt" not in panel.python()
    writing = colab_gpt2.GeneratePanel(panel).ready()
    assert panel.start() and [prompt for _, prompt, _ in panel.live.samples] == [" = Article 0 = \n"] * 2
    later = colab_gpt2.GeneratePanel(model=quick.output_dir).ready()
    assert writing.config.prompt == later.config.prompt == " = Article 0 = \n"
    panel.values.set(prompt="The", overwrite_output_dir=True)
    assert panel.start() and writing.config.prompt == "The"


def test_the_panels_after_a_run_use_the_folder_with_its_number(quick, tmp_path, monkeypatch):
    "Nobody chose a folder, and that of the text's name has something else: stopped and finished, it is mine-2."
    monkeypatch.chdir(tmp_path)
    Path(quick.train_file).rename("mine.txt")
    (tmp_path/"mine").mkdir()
    (tmp_path/"mine"/"notes.txt").touch()
    panel = colab_gpt2.FinetunePanel(quick, train_file="mine.txt", output_dir=None, prompt=None, max_steps=4).ready()
    writing, keeping = colab_gpt2.GeneratePanel(panel).ready(), colab_gpt2.DrivePanel(panel, drive="drive").ready()
    assert panel.start(callbacks=[At(2, panel.stop)]) is None and panel.folder == "mine-2"
    assert writing.start().titles[1] == "After: mine-2 (step 3 of 4, not finished)"
    assert writing.result.prompt == " = Article 0 = \n"
    assert panel.start().output_dir == "mine-2" and writing.start().titles[1] == "After: mine-2"
    assert keeping.config.model == "mine-2" and panel.config.output_dir is None


def test_two_runs_write_side_by_side_and_each_text_keeps_how_it_was_made(tmp_path, monkeypatch):
    "Another temperature, another model: what is below says which text is whose, and stays in the notebook."
    import shutil
    from colab_gpt2.model.loading import TINY
    monkeypatch.chdir(tmp_path)
    for run in "ab": shutil.copytree(TINY, run), Path(run, "finetune.json").write_text("{}")
    writing = colab_gpt2.GeneratePanel(model="a", compare_with="b", prompt="The", max_new_tokens=5).ready()
    first = writing.start()
    assert (first.titles, first.before, first.settings["temperature"]) == (("b", "a"), first.after, 0.8)
    writing.values.set(temperature=1.5, model="tiny", compare_with=None)
    assert writing.said == "" and writing.start().settings["temperature"] == 1.5
    for shown in (writing.older.value, writing.kept):
        assert f"b · a · temperature 0.8 · top k 50 · up to 5 tokens · seed {first.seed}" in shown
    assert {"a", "b", "tiny"} <= {*writing.form.rows["model"].widget.options}
    assert [key[0] for key in writing.writer.loaded] == ["tiny"]


def test_the_kept_texts_leave_the_notebook_small(tmp_path):
    "Five pairs of a thousand tokens each, of characters that HTML writes in six."
    from colab_gpt2.panels.generate import GenerateConfig, Sides, kept_texts
    long = Sides(prompt="'<" * 300, before="'" * 5000, after="&'" * 2500, seed=1, whole=True, titles=("a", "b"),
                 settings=GenerateConfig().settings())
    assert len(kept_texts([long] * 5).encode()) <= 16_000 and kept_texts([long]).count("<pre") == 2


@pytest.mark.parametrize("name", ["save", "stop"])
def test_a_click_saves_no_weights_that_are_lost(quick, name):
    "A loss that nobody logs: the click comes when the training's own look at it is over for this step."
    panel = colab_gpt2.FinetunePanel(quick, logging_steps=100, save_steps=3, on_divergence="stop").ready()
    click = At(4, lambda: setattr(panel.live, "pump", panel.buttons[name].click), lose=True)
    assert panel.start(callbacks=[click]) is None and isinstance(panel.error, FloatingPointError)
    assert "“Learning rate”" in panel.said
    assert [path.name for path in Path(quick.output_dir).glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_run_outlives_its_pump_and_its_picture(quick, recwarn):
    def fail(**parts): raise RuntimeError("not today")
    panel = colab_gpt2.FinetunePanel(quick).ready()
    result = panel.start(callbacks=[At(2, lambda: vars(panel.live).update(pump=fail, show=fail))])
    assert result.steps == 12 and panel.error is None and not [w for w in recwarn if "switched off" in str(w.message)]
    for what in ("Listening for clicks", "Drawing the run"):
        assert panel.status.value.count(f"Note: {what} failed") == 1


def test_a_warning_of_the_forecast_is_a_note(quick, recwarn):
    from colab_gpt2.planning.plan import named_runtime
    panel = colab_gpt2.FinetunePanel(quick).ready()
    panel.forecaster.runtime = named_runtime("T4")
    panel.values.set(precision="bf16")
    assert panel.outlook.value.count("has no bf16 in hardware and will emulate it") == 1
    assert not panel.buttons["start"].disabled
    assert not [w for w in recwarn if "bf16" in str(w.message)]


def test_a_second_panel_waits_while_one_is_at_work(quick):
    panel, other = colab_gpt2.FinetunePanel(quick).ready(), colab_gpt2.GeneratePanel(model="tiny")
    assert panel.start(callbacks=[At(2, other.start)]) is not None
    assert other.result is None and other.said == "3. Fine-tune is busy. Wait until it is done, or stop it."


def test_pump_and_pictures_cost_under_two_percent(quick):
    "A step of the smallest model is the hardest case: 16 blocks of 256 tokens take it some seconds."
    Path(quick.train_file).write_text(page(4000))
    panel = colab_gpt2.FinetunePanel(quick, model="tiny", block_size=256, effective_batch_size=16, max_steps=4).ready()
    result = panel.start()
    share = panel.live.spent / result.seconds
    assert share < 0.02, f"{share:.1%} of {result.seconds:.1f} s"


# The Drive, with the stub of Colab

def tiny_panel(tmp_path, **values):
    from colab_gpt2.model.loading import TINY
    return colab_gpt2.DrivePanel(model=str(TINY), archive=str(tmp_path/"tiny.tar.gz"), **values).ready()


def shown(panel): return [name for name, made in panel.buttons.items() if made.layout.display != "none"]


def test_on_the_stubs_drive(colab, tmp_path, monkeypatch):
    "Save mounts it, Download hands the file to the browser, and Restore numbers its folder."
    monkeypatch.chdir(tmp_path)
    assert colab_gpt2.DrivePanel().config.drive is None  # the mounted one
    panel = tiny_panel(tmp_path, drive=str(colab.mountpoint), restore_to=str(tmp_path/"back"))
    panel.loading.value = True
    assert shown(panel) == ["save", "mount"] and panel.said == ""  # nobody is asked for a look
    saved = panel.start()
    assert panel.error is None and "MyDrive" in str(saved.copy.path) and "look for it" in panel.view.value.lower()
    assert shown(panel) == ["save", "download", "restore"] and panel.link.html == ""
    panel.buttons["download"].click()
    assert colab.stub.downloads == [str(tmp_path/"tiny.tar.gz")] and "browser downloads tiny.tar.gz" in panel.said
    (tmp_path/"tiny.tar.gz").unlink()
    panel.buttons["download"].click()  # from the Drive
    assert colab.stub.downloads[1:] == [str(saved.copy.path)]
    assert [(panel.restore()/"config.json").exists() and panel.restored.name for _ in "ab"] == ["back", "back-2"]


def test_a_saved_model_is_found_in_a_later_session(colab, tmp_path):
    tiny_panel(tmp_path, drive=str(colab.mountpoint)).start()
    panel = tiny_panel(tmp_path, drive=str(colab.mountpoint), restore_to=str(tmp_path/"back"))
    panel.loading.value = True
    assert shown(panel) == ["save", "restore"] and panel.said == "Choose a model and press Restore."
    assert (panel.restore()/"config.json").exists()


def test_a_copy_that_failed_is_tried_again(colab, tmp_path):
    panel = tiny_panel(tmp_path, drive=str(colab.mountpoint))
    with colab.faults(full=4096): assert panel.start() is None and "is full" in panel.said
    assert shown(panel) == ["save", "mount"]
    assert panel.start().copy.path.stat().st_size == (tmp_path/"tiny.tar.gz").stat().st_size


def test_a_drive_that_is_refused_is_a_sentence(colab, tmp_path):
    panel = tiny_panel(tmp_path, drive=str(colab.mountpoint))
    with colab.faults(authorization_denied=True): assert panel.start() is None
    assert panel.said.startswith("Drive was not authorised") and shown(panel) == ["save", "mount"]
    assert panel.start()


def test_outside_colab_there_is_a_link_and_nothing_to_mount(tmp_path, monkeypatch):
    "The link is relative to the notebook, and in an output, where front ends make it one of theirs."
    monkeypatch.chdir(tmp_path)
    panel = tiny_panel(tmp_path, drive="mine")
    panel.loading.value = True
    assert shown(panel) == ["save"] and panel.start() and shown(panel) == ["save", "restore"]
    assert "href='tiny.tar.gz' download>Download tiny.tar.gz (" in panel.link.html
    assert str(tmp_path/"tiny.tar.gz") in panel.view.value
    panel.values.set(archive=str(tmp_path.parent/"elsewhere.tar.gz"))
    assert panel.link.html == "" and panel.view.value == panel.said == ""  # that was of another file
    assert panel.start() and panel.link.html == ""  # no front end looks there
    (tmp_path.parent/"elsewhere.tar.gz").unlink()


def test_a_mount_that_has_gone_is_offered_anew(colab, tmp_path):
    panel = tiny_panel(tmp_path, drive=str(colab.mountpoint))
    panel.mount()
    panel.values.set(folder="elsewhere")
    with colab.faults(disconnected=True):
        panel.loading.value = True
        assert shown(panel) == ["save", "mount"] and panel.chosen == ""
        assert panel.mount() is None and "mount has gone" in panel.said
        assert panel.mount() and panel.error is None  # once more mounts it again


def test_a_strangers_archive_stays_and_is_told_of(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in (b"of another", None):
        if content: (tmp_path/"tiny.tar.gz").write_bytes(content)
        panel = tiny_panel(tmp_path, drive="mine")
        assert panel.start().archive.path.name == "tiny-2.tar.gz"
        assert "tiny.tar.gz is another file and stays" in panel.status.value or not content
    assert (tmp_path/"tiny.tar.gz").read_bytes() == b"of another" and len(list(tmp_path.glob("*.tar.gz"))) == 2


def test_a_restored_model_is_written_with_and_trained_further(quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    training = colab_gpt2.FinetunePanel(quick, max_steps=2)
    writing, keeping = colab_gpt2.GeneratePanel(training), colab_gpt2.DrivePanel(training, drive="mine")
    assert training.start() and keeping.start() and keeping.restore() == Path("restored")
    keeping.buttons["use"].click()
    assert writing.config.model == training.config.model == "restored" and keeping.config.model == quick.output_dir
    assert writing.start() and "restored" in keeping.said


# In a real kernel

START = """
from pathlib import Path
from transformers import TrainerCallback
from colab_gpt2 import FinetunePanel
from colab_gpt2.config import FinetuneConfig
class Says(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs): print("step", state.global_step, flush=True)
panel = FinetunePanel({config!r}, max_steps=4000, save_steps=-1).ready()
display(panel)
print(panel.buttons["stop"].model_id)
"""


IN_A_SUBSHELL = """
import ipywidgets as widgets
other = widgets.Button()
other.on_click(lambda _: setattr(panel.buttons["start"], "tooltip", "touched"))
print(other.model_id, panel.buttons["start"].model_id)
"""


def test_the_interrupt_button_stops_and_saves_a_run_in_a_subshell(quick):
    "JupyterLab handles the click on Start in a second thread; the signal comes to the main one. See test_pump.py."
    from jupyter_client.manager import start_new_kernel
    from test_pump import click, idle, listen, run
    manager, client = start_new_kernel(kernel_name="python3", startup_timeout=180)
    try:
        features = client.kernel_info(reply=True, timeout=120)["content"].get("supported_features", [])
        if "kernel subshells" not in features: pytest.skip("this ipykernel is older than subshells, 7.0")
        client.control_channel.send(client.session.msg("create_subshell_request"))
        subshell = client.get_control_msg(timeout=120)["content"]["subshell_id"]
        run(client, START.format(config=quick))
        other, start = run(client, IN_A_SUBSHELL).split()
        listen(client, idle(click(client, other, subshell)))
        running = click(client, start, subshell)
        trained = re.compile(r"step [1-9]\d* of 4,000")
        def has_trained(m): return m["msg_type"] == "comm_msg" and trained.search(str(m["content"]))
        listen(client, has_trained, timeout=120)
        manager.interrupt_kernel()
        listen(client, idle(running), timeout=120)
        said = run(client, "print(panel.said)")
        assert re.match(r"Stopped at step \d+ of 4000; saved in .* Press Continue", said)
        assert list(Path(quick.output_dir).glob("checkpoint-*"))
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_a_click_on_stop_works_within_a_step_and_a_picture_stays(quick):
    from jupyter_client.manager import start_new_kernel
    from test_pump import click, idle, listen, printed, run
    manager, client = start_new_kernel(kernel_name="python3", startup_timeout=180)
    try:
        stop = run(client, START.format(config=quick)).split()[-1]
        running = client.execute("panel.start(callbacks=[Says()]);")
        listen(client, lambda m: m["msg_type"] == "stream" and "step 3" in m["content"]["text"], timeout=120)
        click(client, stop)
        heard = listen(client, idle(running), timeout=120)
        last = int(re.findall(r"step (\d+)", "step 3 " + printed(heard))[-1])
        assert run(client, "print(panel.said)").startswith(f"Stopped at step {last} of 4000; saved in")
        updates = [m["content"]["data"] for m in heard if m["msg_type"] == "update_display_data"]
        words, drawing = updates[-2:]
        assert "Stopped at step" in words["text/html"] and "<svg" not in words["text/html"]
        assert drawing["image/svg+xml"].startswith("<svg")
        assert "text/html" not in drawing  # which would be shown instead, and on GitHub without the curve
        assert last < 50, "steps of some 50 ms: far more than one went by"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_a_text_of_ones_own_leaves_the_demos_settings_to_its_length(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("colab_gpt2.runtime.find_device", lambda: ("cpu", ""))
    text = colab_gpt2.DataPanel().ready()
    began = text.config
    Path("mine.txt").write_text(page(60))
    text.values.set(train_file="mine.txt")
    for name in ("num_train_epochs", "block_size", "effective_batch_size", "learning_rate"):
        assert getattr(began, name) and getattr(text.config, name) is None, name
    text.values.set(train_file=None)
    assert text.config == began


def test_stopped_runs_are_looked_for_once_and_after_a_run_not_at_each_setting(quick, monkeypatch):
    looked = []
    monkeypatch.setattr("colab_gpt2.your_runs.unfinished", lambda: looked.append(1) or [])
    panel = colab_gpt2.FinetunePanel(quick, max_steps=2).ready()
    for seed in (7, 8): panel.values.set(seed=seed)
    assert len(looked) == 1 and panel.start() and len(looked) == 2
