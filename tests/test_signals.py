"A run that is asked to stop: wherever it is, what it says is on the disk, and its exit code says why."
import json, multiprocessing, os, signal, threading, time
from pathlib import Path
from unittest.mock import patch

import pytest
from helpers.forks import command, forked

WORDS = ("finetune --model toy --train-file train.txt --eval-file eval.txt --block-size 64 --effective-batch-size 2 "
         "--max-steps 8 --max-new-tokens 2 --method full --no-torch-compile --mirror off "
         "--cache-dir cache --output-dir ")


def make_toy():
    "A small model and two texts in this folder."
    from colab_gpt2.model.loading import load_config, load_tokenizer, new_model
    shape = load_config("tiny")
    shape.n_layer, shape.n_embd, shape.n_head = 2, 64, 2
    new_model(shape, seed=0).save_pretrained("toy")
    load_tokenizer("tiny").save_pretrained("toy")
    for name, word in (("train", "day"), ("eval", "night")):
        lines = (f" = Article {i} = \n \n The tide of {word} {i} came in at {i % 12} o'clock . \n" for i in range(20))
        Path(f"{name}.txt").write_text("".join(lines))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("toy")
    assert forked(make_toy, cwd=place).returncode == 0
    return place


def run(words, moment=None, sent=(), pause=0., ignored=()):
    "The command, which sends itself the signals at a moment: a stage, 'step 3', 'archive', or 'save 3', in the middle."
    from colab_gpt2 import tasks, training
    from colab_gpt2.engine import trainer
    from colab_gpt2.engine.callbacks import Listener
    for name in ignored: signal.signal(getattr(signal, name), signal.SIG_IGN)

    def at(now):
        if now != moment: return
        for name in sent:
            if name == "hang up": os.close(TERMINAL[0])
            else: signal.raise_signal(getattr(signal, name))
            time.sleep(pause)

    class Sends(Listener):
        def on_stage(self, stage, **facts): at(stage)
        def on_step_begin(self, args, state, control, **kwargs): at(f"step {state.global_step + 1}")

    def write_manifest(folder, *args, **kwargs):
        at(folder.name.replace("checkpoint-", "save "))
        return written(folder, *args, **kwargs)

    finetune, written = training.finetune, trainer.write_manifest
    with (patch.object(training, "finetune", lambda config, **options: finetune(config, callbacks=[Sends()])),
          patch.object(tasks, "archive_model", lambda *args, **kwargs: at("archive")),
          patch.object(trainer, "write_manifest", write_manifest)): command(*words.split())


TERMINAL = []


def run_in_terminal(*given):
    "`run` in a terminal of its own, which it can close."
    import fcntl, termios
    os.setsid()
    TERMINAL[:] = os.openpty()
    fcntl.ioctl(TERMINAL[1], termios.TIOCSCTTY, 0)
    for output in (0, 1, 2): os.dup2(TERMINAL[1], output)
    run(*given)


def checkpoints(out): return sorted(path.name for path in out.glob("checkpoint-*")) if out.exists() else None


BEFORE = "Stopped before the training; nothing was trained."
STEP = "Stopping after this step and saving; once more to stop at once, without saving."
LATER = "Run the same again to resume."


@pytest.mark.parametrize("moment, sent, pause, code, said, left", [
    ("loading", ["SIGTERM"], 0, 143, BEFORE, None),
    ("loading", ["SIGHUP"], 0, 129, BEFORE, None),
    ("evaluating before", ["SIGINT"], 0, 130, BEFORE, None),
    ("probing", ["SIGTERM"], 0, 143, BEFORE, None),
    ("step 4", ["SIGINT"], 0, 130, f"Stopped at step 4 of 8; saved in out/checkpoint-4. {LATER}", [3, 4]),
    ("step 4", ["SIGTERM"], 0, 143, f"Stopped at step 4 of 8; saved in out/checkpoint-4. {LATER}", [3, 4]),
    ("step 4", ["SIGHUP"], 0, 129, f"Stopped at step 4 of 8; saved in out/checkpoint-4. {LATER}", [3, 4]),
    ("step 4", ["SIGTERM"] * 2, 0.02, 143, f"Stopped at step 4 of 8; saved in out/checkpoint-4. {LATER}", [3, 4]),
    ("step 4", ["SIGINT"] * 2, 0.6, 130,
     "Stopped at once, without a new checkpoint; the newest is out/checkpoint-3.", [3]),
    ("save 3", ["SIGINT"], 0, 130, f"Stopped at step 3 of 8; saved in out/checkpoint-3. {LATER}", [3]),
    ("save 3", ["SIGINT", "SIGTERM"], 0.6, 143, "Stopped at once, without a new checkpoint; there is none.", None),
    ("save 6", ["SIGINT", "SIGTERM"], 0.6, 143,
     "Stopped at once, without a new checkpoint; the newest is out/checkpoint-3.", [3]),
    ("step 8", ["SIGTERM"], 0, 143, "Stopped after the training; the model is saved in out.", [6, 8]),
    ("saving", ["SIGTERM"], 0, 143, "Stopped after the training; the model is saved in out.", [6, 8]),
    ("evaluating after", ["SIGHUP"], 0, 129, "Stopped after the training; the model is saved in out.", [6, 8])])
def test_a_signal_ends_a_run_in_good_order(folder, tmp_path, moment, sent, pause, code, said, left):
    words = f"{WORDS}{tmp_path}/out"
    ran = forked(run, words, moment, sent, pause, cwd=folder)
    told = ran.stderr.replace(f"{tmp_path}/", "").strip().splitlines()
    assert (ran.returncode, told[-1]) == (code, f"colab-gpt2: {said}"), ran.stderr
    assert checkpoints(tmp_path/"out") == (left if left is None else [f"checkpoint-{n}" for n in left])
    hidden = [path.name for path in tmp_path.glob("out/.*")] + [p.name for p in tmp_path.glob("out/*") if p.is_file()]
    assert hidden == [] or "the model is saved" in said and "model.safetensors" in hidden
    assert sum("Stopping" in line for line in told) == (moment.split()[0] in ("step", "save", "saving"))


def test_a_run_that_is_stopped_while_it_archives_says_that_the_model_is_saved(folder, tmp_path):
    words = f"{WORDS}{tmp_path}/out --drive {tmp_path} --archive-path {tmp_path}/a.tar.gz".replace("finetune", "run")
    ran = forked(run, words, "archive", ["SIGTERM"], cwd=folder)
    said = f"Stopped after the training; the model is saved in {tmp_path}/out. Run the same again to archive it."
    assert (ran.returncode, ran.stderr.strip().splitlines()[-1]) == (143, f"colab-gpt2: {said}"), ran.stderr
    assert (tmp_path/"out"/"finetune.json").exists() and not (tmp_path/"a.tar.gz").exists()


def test_the_same_command_afterwards_gives_the_same_model(folder, tmp_path):
    words = f"{WORDS}{tmp_path}/out"
    for moment, sent in (("step 4", ["SIGTERM"]), ("probing", ["SIGINT"]), ("save 6", ["SIGTERM"] * 2), (None, ())):
        ran = forked(run, words, moment, sent, 0.6, cwd=folder)
        if moment == "probing": assert f"training; {tmp_path}/out/checkpoint-4 is as it was." in ran.stderr
    assert ran.returncode == 0, ran.stderr
    assert forked(run, f"{WORDS}{tmp_path}/plain", cwd=folder).returncode == 0
    assert (tmp_path/"out"/"model.safetensors").read_bytes() == (tmp_path/"plain"/"model.safetensors").read_bytes()


def test_a_run_in_sessions_that_are_too_short_ends_with_the_same_model(folder, tmp_path):
    "`until colab-gpt2 finetune ... --max-minutes 1; do :; done`, when a minute is over before the first step."
    words, ran = f"{WORDS}{tmp_path}/out --max-steps 3", []
    while not ran or ran[-1].returncode == 75 and len(ran) < 9:
        ran.append(forked(run, f"{words} --max-minutes 0.001", cwd=folder))
    assert [each.returncode for each in ran] == [75, 75, 0], ran[-1].stderr
    assert [each.stderr.replace(f"{tmp_path}/", "").strip().splitlines()[-1] for each in ran[:2]] == [
        f"colab-gpt2: Stopped at step {step} of 3 because --max-minutes is 0.001, and the rest takes about {more}; "
        f"saved in out/checkpoint-{step}. {LATER}" for step, more in ((1, "2 more sessions"), (2, "1 more session"))]
    assert forked(run, f"{words.replace('/out', '/plain')}", cwd=folder).returncode == 0
    assert (tmp_path/"out"/"model.safetensors").read_bytes() == (tmp_path/"plain"/"model.safetensors").read_bytes()


def told_to_end_twice():
    try: command("--version")
    finally: signal.raise_signal(signal.SIGINT)


def test_a_signal_that_comes_after_the_end_changes_no_exit_code(tmp_path):
    ran = forked(told_to_end_twice, cwd=tmp_path)
    assert (ran.returncode, ran.stderr) == (0, "")


def run_unread(*given):
    "`run`, when nobody reads any more what it writes."
    here, there = os.pipe()
    os.close(here)
    for output in (1, 2): os.dup2(there, output)
    run(*given)


def test_a_run_that_nobody_reads_any_more_ends_as_any_other(folder, tmp_path):
    words = f"{WORDS}{tmp_path}/out"
    assert forked(run_unread, words, "step 4", ["SIGTERM"], cwd=folder).returncode == 143
    assert checkpoints(tmp_path/"out") == ["checkpoint-3", "checkpoint-4"]


def test_a_terminal_that_is_closed_loses_nothing(folder, tmp_path):
    words = f"{WORDS}{tmp_path}/out"
    assert forked(run_in_terminal, words, "step 4", ["hang up"], cwd=folder).returncode == 129
    assert checkpoints(tmp_path/"out") == ["checkpoint-3", "checkpoint-4"]


def test_a_run_whose_terminal_is_closed_goes_on_under_nohup(folder, tmp_path):
    words = f"{WORDS}{tmp_path}/out"
    ran = forked(run_in_terminal, words, "step 4", ["hang up"], 0., ["SIGHUP"], cwd=folder)
    assert json.loads((tmp_path/"out"/"finetune.json").read_text())["steps"] == 8
    assert ran.returncode in (0, 1, 120)  # the result could not be printed


def test_a_child_that_is_forked_meanwhile_ends_as_ever():
    from colab_gpt2.signals import catching
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    def wait():
        there.send("begun")
        time.sleep(60)
    with catching(lambda *heard: None), catching():
        child = context.Process(target=wait)
        child.start()
        assert here.poll(30)
        child.terminate()
        child.join(30)
    assert child.exitcode == -signal.SIGTERM


def test_what_somebody_else_handles_or_ignores_stays_so(folder, tmp_path):
    heard = []
    def mine(number, frame): heard.append(number)
    from colab_gpt2.signals import catching
    before = signal.signal(signal.SIGTERM, mine), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with catching():
            with pytest.raises(KeyboardInterrupt): signal.raise_signal(signal.SIGINT)
            for number in (signal.SIGTERM, signal.SIGHUP): signal.raise_signal(number)
        assert heard == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGHUP), before): signal.signal(number, handler)


def test_another_thread_than_the_main_one_takes_no_signals():
    from colab_gpt2.signals import catching
    seen = []
    def work():
        with catching(): seen.append(signal.getsignal(signal.SIGTERM))
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]
