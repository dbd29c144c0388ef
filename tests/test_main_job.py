"""The main job as a user meets it: the command line in a process of its own, on real input, and what it leaves on disk
when things go wrong."""
import json, os, re, shutil, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.forks import forked
from transformers import TrainerCallback

from colab_gpt2 import FinetuneConfig, runs, tasks, training
from colab_gpt2.engine.checkpoints import write_manifest

QUICK = ("--model", "small", "--block-size", "64", "--max-new-tokens", "8", "--output-dir", "out")
PROMISED = """runtime model parameters dataset train_tokens perplexity_before perplexity_after steps epochs
tokens_per_second seconds output_dir archive drive samples""".split()


def page(n, word="tide"):
    article = " = Article {i} = \n \n The {word} of day {i} came in at {hour} o'clock and went out again . \n"
    return "".join(article.format(i=i, word=word, hour=i % 12) for i in range(n))


@pytest.fixture
def own(tmp_path, small):
    "Flags for two small texts of the user's own, and the folder of a small model."
    (tmp_path/"small").symlink_to(small)
    (tmp_path/"train.txt").write_text(page(80))
    (tmp_path/"eval.txt").write_text(page(30, "moon"))
    return ("--train-file", "train.txt", "--eval-file", "eval.txt", "--cache-dir", "cache")


def test_run_gives_what_it_promises(shell, own, tmp_path):
    ran = shell("colab-gpt2", "run", *QUICK, *own, "--max-steps", "12", "--drive", "drive", "--json")
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    assert [k for k in PROMISED if k not in said] == []
    before, after = said["perplexity_before"], said["perplexity_after"]
    assert all(before[k] == after[k] for k in ("unit", "split", "stride", "tokens"))
    assert after["value"] < before["value"]
    first, second = said["samples"]["before"], said["samples"]["after"]
    assert (first["prompt"], first["seed"]) == (second["prompt"], second["seed"])
    assert set(said["archive"]) >= {"path", "bytes", "sha256"}
    assert Path(tmp_path, said["archive"]["path"]).stat().st_size == said["archive"]["bytes"]
    assert Path(tmp_path, said["drive"]["path"]).exists()
    assert "Fine-tuning" in ran.stderr and "Traceback" not in ran.stderr


def test_generate_streams_to_stdout(shell):
    words = "--model", "tiny", "--prompt", "The city", "--seed", "1", "--max-new-tokens", "5"
    ran = shell("colab-gpt2", "generate", *words)
    assert ran.returncode == 0 and ran.stdout.startswith("The city") and not ran.stderr, ran.stderr


def test_real_text_improves_on_the_test_split(shell, shared, tmp_path):
    "Thirty steps on WikiText-2's validation split, evaluated on the first 10 kB of its test split."
    raw = shared/"data"/"wikitext-2-raw"
    (tmp_path/"wiki.test.raw").write_bytes((raw/"wiki.test.raw").read_bytes()[:10_000])
    text = "--train-file", raw/"wiki.valid.raw", "--eval-file", "wiki.test.raw", "--cache-dir", "cache"
    words = "--model", "tiny", "--max-steps", "30", "--block-size", "128", "--effective-batch-size", "2", "--json"
    ran = shell("colab-gpt2", "run", *QUICK, *text, *words, timeout=600)
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    assert said["perplexity_after"]["value"] < said["perplexity_before"]["value"]
    assert said["perplexity_after"]["split"] == "wiki.test.raw"


def test_gpt2_of_full_size_from_a_folder(shell, shared, tmp_path):
    "124 million random weights and the real tokenizer, saved to a folder: a real checkpoint, on which the loss falls."
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, set_seed
    set_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(tmp_path/"gpt2-124m")
    AutoTokenizer.from_pretrained(shared/"data"/"gpt2-tokenizer").save_pretrained(tmp_path/"gpt2-124m")
    text = (shared/"data"/"wikitext-2-raw"/"wiki.valid.raw").read_text(encoding="utf-8")
    (tmp_path/"train.txt").write_text(text[:60_000], encoding="utf-8")
    (tmp_path/"eval.txt").write_text(text[60_000:61_000], encoding="utf-8")
    words = ("--model gpt2-124m --train-file train.txt --eval-file eval.txt --cache-dir cache --output-dir out "
             "--max-steps 4 --block-size 64 --effective-batch-size 4 --learning-rate 3e-4 --logging-steps 1 "
             "--save-steps -1 --max-new-tokens 4 --json").split()
    ran = shell("colab-gpt2", "finetune", *words, timeout=600)
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    losses = [row["loss"] for row in said["losses"]]
    assert said["parameters"] == 124_439_808 and losses[0] > 10 and losses[-1] < losses[0] - 0.5, losses
    assert said["perplexity_after"]["value"] < said["perplexity_before"]["value"] / 2


# Bad input: a clear line, the right exit code, and nothing lost or half written.

def refused(ran, code, *said):
    assert ran.returncode == code, ran.stdout + ran.stderr
    assert ran.stdout == "" and "Traceback" not in ran.stderr
    last = ran.stderr.strip().splitlines()[-1]
    for words in said: assert words in last, ran.stderr


def test_run_fails_at_once_for_a_drive_that_cannot_serve(shell, own, tmp_path):
    (tmp_path/"drive").mkdir()
    (tmp_path/"drive"/"colab-gpt2").write_text("in the way")
    words = "--max-steps", "2", "--archive-path", "new.tar.gz", "--drive", "drive", "--json"
    ran = shell("colab-gpt2", "run", *QUICK, *own, *words)
    refused(ran, 1, "a file stands where a folder is needed")
    assert not (tmp_path/"out").exists()


def test_nothing_is_deleted_that_was_not_written(shell, own, tmp_path):
    "Checkpoints go when the next run has begun, not when it is refused; what is not ours stays."
    assert shell("colab-gpt2", "finetune", *QUICK, *own, "--max-steps", "2").returncode == 0
    (tmp_path/"out"/"checkpoint-3").mkdir()
    (tmp_path/"out"/"checkpoint-3"/"notes.txt").write_text("mine")
    refused(shell("colab-gpt2", "finetune", *QUICK, *own, "--overwrite-output-dir", "--trainer-arg", "foo=1"), 2, "foo")
    assert (tmp_path/"out"/"checkpoint-2"/"model.safetensors").exists()
    words = "--max-steps", "3", "--save-steps", "3", "--overwrite-output-dir"
    assert shell("colab-gpt2", "finetune", *QUICK, *own, *words).returncode == 0
    assert (tmp_path/"out"/"checkpoint-3.before"/"notes.txt").read_text() == "mine"
    assert not (tmp_path/"out"/"checkpoint-2").exists() and (tmp_path/"out"/"checkpoint-3"/"whole.json").exists()


def test_resume_needs_the_same_run(shell, own, tmp_path):
    assert shell("colab-gpt2", "finetune", *QUICK, *own, "--max-steps", "2").returncode == 0
    weights = (tmp_path/"out"/"model.safetensors").read_bytes()
    resume = "colab-gpt2", "finetune", *QUICK, *own, "--max-steps", "4"
    onward = "--max-steps was 2, now it is 4. To continue it with these settings, set --resume out"
    refused(shell(*resume), 1, "--output-dir out holds the model of another run", onward)
    refused(shell(*resume, "--block-size", "32"), 1, "--block-size was 64, now it is 32; --max-steps was 2")
    same = "colab-gpt2", "finetune", *QUICK, *own, "--max-steps", "2", "--train-file", "eval.txt"
    refused(shell(*same), 1, "the text is another one", "set --model to out and --output-dir to a new folder")
    assert (tmp_path/"out"/"model.safetensors").read_bytes() == weights
    resumed = shell(*resume, "--resume", "out", "--json")
    assert json.loads(resumed.stdout)["resumed_from"] == "out/checkpoint-2", resumed.stderr
    further = "--model", "out", "--train-file", "eval.txt", "--output-dir", "further"
    assert shell("colab-gpt2", "finetune", *QUICK, *own, *further, "--max-steps", "1").returncode == 0


@pytest.mark.parametrize("length", [dict(max_steps=8), dict(num_train_epochs=2.)])
def test_a_longer_run_resumed_has_the_learning_rates_of_its_length(own, tmp_path, monkeypatch, length):
    monkeypatch.chdir(tmp_path)
    config = FinetuneConfig(model="small", train_file="train.txt", eval_file="eval.txt", block_size=64, logging_steps=1,
                            effective_batch_size=10, max_new_tokens=1, warmup_steps=2, cache_dir="cache", tune=False)
    def rates(result):
        newest = training.find_checkpoints(result.output_dir)[-1]
        log = json.loads((newest/"trainer_state.json").read_text())["log_history"]
        return [entry["learning_rate"] for entry in log if "loss" in entry]
    def run(folder, **options): return training.finetune(config, output_dir=folder, progress=False, **options)
    complete = rates(run("one", **length))
    run("two", **{name: value / 2 if name == "num_train_epochs" else 4 for name, value in length.items()})
    resumed = run("two", resume="two", **length)
    assert resumed.resumed_from and len(complete) == resumed.steps
    before = int(resumed.resumed_from.split("-")[-1])
    assert rates(resumed)[before:] == complete[before:] and complete[-1] < complete[before] < complete[2]


def test_what_is_in_the_output_folder_stays(shell, own, tmp_path):
    (tmp_path/"out").mkdir()
    (tmp_path/"out"/"thesis.txt").write_text("mine")
    ran = shell("colab-gpt2", "finetune", *QUICK, *own, "--max-steps", "2", "--overwrite-output-dir")
    assert ran.returncode == 0 and (tmp_path/"out"/"thesis.txt").read_text() == "mine", ran.stderr


def test_no_network_and_nothing_cached(shell, tmp_path):
    nowhere = "http://127.0.0.1:9"
    closed = dict(HF_ENDPOINT=nowhere, HF_HOME=str(tmp_path/"hf"), https_proxy=nowhere, http_proxy=nowhere)
    words = "--model", "gpt2", "--dataset", "python-docs", "--cache-dir", "cache", "--output-dir", "out"
    refused(shell("colab-gpt2", "finetune", *words, **closed), 1, "tiny")
    refused(shell("colab-gpt2", "fetch", "--cache-dir", "cache", **closed), 1, "python-docs")
    assert not list((tmp_path/"cache").rglob("*.raw"))


def test_ctrl_c_saves_and_resume_goes_on(shell, own, tmp_path):
    program = [sys.executable, "-c", "from colab_gpt2.cli import main; main()"]
    words = [*program, "finetune", *QUICK, *own, "--max-steps", "4000"]
    with open(tmp_path/"stderr", "w") as err:
        process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=err, text=True)
        deadline = time.monotonic() + 300
        while not re.search(r" [1-9]\d*/4000", (tmp_path/"stderr").read_text()):  # the bar leaves steps out
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=240)
    said = (tmp_path/"stderr").read_text()
    assert process.returncode == 130 and out == "" and "Traceback" not in said, said
    last = said.strip().splitlines()[-1]
    assert "saved in out/checkpoint-" in last and "Run the same again" in last
    step = int(next((tmp_path/"out").glob("checkpoint-*")).name.split("-")[1])
    half = tmp_path/"out"/f"checkpoint-{step + 5}"  # a copy that was cut short
    shutil.copytree(tmp_path/"out"/f"checkpoint-{step}", half)
    os.truncate(half/"model.safetensors", 1000)
    ran = shell("colab-gpt2", "finetune", *QUICK, *own, "--max-steps", str(step + 3), "--resume", "out", "--json")
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    assert (result["resumed_from"], result["steps"]) == (f"out/checkpoint-{step}", step + 3)
    assert f"checkpoint-{step + 5} is skipped: model.safetensors has 1,000 of" in ran.stderr and half.exists()


def test_full_disk_leaves_the_last_checkpoints(own, tmp_path, monkeypatch):
    "A real file system that has room for the run, until something else takes it: two checkpoints fit, the third not."
    monkeypatch.chdir(tmp_path)
    disk = tmp_path/"disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700m", "tmpfs", disk], capture_output=True)
    if mounted.returncode: pytest.skip("this user may not mount a small file system")
    class Other(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2: (disk/"other").write_bytes(bytes(shutil.disk_usage(disk).free - 40_000_000))
    options = dict(model="tiny", block_size=64, max_new_tokens=8, train_file="train.txt", eval_file="eval.txt",
                   cache_dir="cache", output_dir="disk/out", progress=False)
    try:
        with pytest.raises(OSError, match="is full.*Kept: checkpoint-1, checkpoint-2"):
            training.finetune(**options, max_steps=6, save_steps=1, save_total_limit=9, callbacks=[Other()])
        assert {p.name for p in (disk/"out").iterdir()} == {"checkpoint-1", "checkpoint-2"}
        (disk/"other").unlink()
        resumed = training.finetune(**options, max_steps=3, save_steps=9, resume="disk/out")
        assert resumed.resumed_from == "disk/out/checkpoint-2" and resumed.steps == 3
    finally: subprocess.run(["umount", disk], check=True)


def test_same_seed_same_weights(shell, own, tmp_path):
    for folder in ("a", "b"):
        words = "--output-dir", folder, "--max-steps", "3", "--from-scratch"
        assert shell("colab-gpt2", "finetune", *QUICK, *own, *words).returncode == 0
    assert (tmp_path/"a"/"model.safetensors").read_bytes() == (tmp_path/"b"/"model.safetensors").read_bytes()


def test_a_slow_machine_takes_fewer_steps_in_the_demo(tmp_path, monkeypatch):
    "Pretended: a step of ten seconds. The perplexity still falls by more than a quarter."
    settle = training.settle
    monkeypatch.setattr(training, "settle", lambda trainer, plan: replace(settle(trainer, plan), step_seconds=10.))
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="A step takes 10 s on this machine, so the run takes 20 steps instead of"):
        ran = tasks.demo(block_size=64, effective_batch_size=4, max_new_tokens=4, progress=False).finetuned
    assert ran.steps == ran.plan.steps == 20 and ran.perplexity_after.value < 0.75 * ran.perplexity_before.value


def test_a_demo_of_a_given_length_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "run", lambda config, **options: options)
    assert [type(c).__name__ for c in tasks.demo()["callbacks"]] == ["TimeLimit"]
    assert not tasks.demo(max_steps=300)["callbacks"]
    assert not tasks.demo(replace(tasks.DEMO, num_train_epochs=9))["callbacks"]


# The same again

JOB = dict(model="small", block_size=64, max_new_tokens=4, max_steps=6, save_steps=2, logging_steps=1, progress=False)


class Killed(TrainerCallback):
    "Ends the process after step 4, when the checkpoint before it has arrived in `mirror`."
    def __init__(self, mirror): self.mirror = Path(mirror)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step != 4: return
        while not list(self.mirror.glob("*/checkpoint-2/whole.json")): time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)


def run_until_killed(options): tasks.run(**options, callbacks=[Killed(f"{options['drive']}/colab-gpt2/runs")])
def run_again(options):
    ran = tasks.run(**options)
    return ran.finetuned.resumed_from, ran.to_dict()


def test_a_run_that_was_killed_goes_on_on_a_new_machine(own, small, tmp_path):
    "The same call, with a folder in place of the Drive and nothing else left; and once more where it has finished."
    here, new, newer, other = (tmp_path/name for name in ("here", "new", "newer", "other"))
    for folder in (here, new, newer, other): folder.mkdir()
    texts = dict(train_file=f"{tmp_path}/train.txt", eval_file=f"{tmp_path}/eval.txt")
    job = JOB | texts | dict(model=small, output_dir="out")
    options = dict(job, drive=f"{tmp_path}/drive")
    assert forked(run_until_killed, options, cwd=here).returncode == -signal.SIGKILL
    assert not (here/"out"/"model.safetensors").exists() and not list((tmp_path/"drive"/"colab-gpt2").glob("*.tar.gz"))
    resumed = forked(run_again, options, cwd=new)
    assert resumed.result[0] == "out/checkpoint-2" and "Resuming at step 2 of 6." in resumed.stderr, resumed.stderr
    assert forked(run_again, dict(job, mirror="off"), cwd=other).result[0] is None
    weights = [(folder/"out"/"model.safetensors").read_bytes() for folder in (new, other)]
    assert weights[0] == weights[1]
    finished = forked(run_again, options, cwd=newer)
    assert (newer/"out"/"model.safetensors").read_bytes() == weights[0]
    for name in ("losses", "archive"): assert finished.result[1][name] == resumed.result[1][name]
    assert "It was there already" in finished.result[1]["drive"]["note"]
    assert [p.name for p in (tmp_path/"drive"/"colab-gpt2").glob("*.tar.gz")] == ["out.tar.gz"]


def test_a_run_that_ended_before_its_copy_saves_it_the_next_time(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = JOB | dict(train_file="train.txt", eval_file="eval.txt", output_dir="out", drive="drive", max_steps=2)
    with monkeypatch.context() as dying:
        def end(*args): raise KeyboardInterrupt
        dying.setattr(tasks, "save_or_say_why", end)
        with pytest.raises(KeyboardInterrupt): tasks.run(**options)
    packed = Path("out.tar.gz").read_bytes()
    monkeypatch.setattr(training, "make_trainer", lambda *args: pytest.fail("it trains again"))
    ran = tasks.run(**options)
    assert Path("out.tar.gz").read_bytes() == packed == Path(ran.drive["path"]).read_bytes()
    assert not list(tmp_path.rglob("out-2.tar.gz"))


def test_the_archive_of_another_run_stays(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = JOB | dict(train_file="train.txt", eval_file="eval.txt", max_steps=1, archive_path="a.tar.gz")
    first = tasks.run(**options, output_dir="one").archive
    with pytest.warns(UserWarning, match="a.tar.gz holds another run and stays; this one is packed into a-2.tar.gz"):
        second = tasks.run(**options, output_dir="two", seed=7).archive
    again = tasks.run(**options, output_dir="two", seed=7).archive
    assert (first.path.name, second.path.name, again) == ("a.tar.gz", "a-2.tar.gz", second)
    over = tasks.run(**options, output_dir="three", seed=8, overwrite_output_dir=True).archive
    assert over.path.name == "a.tar.gz" and over.sha256 not in (first.sha256, second.sha256)


@pytest.mark.parametrize("place, mirror, expected", [
    ("out", "auto", "drive/colab-gpt2/runs"), ("out", "off", "off"), ("drive/out", "auto", "auto")])
def test_a_folder_for_the_drive_takes_checkpoints_of_other_folders(tmp_path, monkeypatch, place, mirror, expected):
    monkeypatch.chdir(tmp_path)
    def seen(config, **options): raise InterruptedError(config.mirror)
    monkeypatch.setattr("colab_gpt2.training.finetune", seen)
    with pytest.raises(InterruptedError, match=f"^{expected}$"):
        tasks.run(model="tiny", output_dir=place, mirror=mirror, drive="drive")


def test_runs_are_looked_for_where_they_are_saved(own, tmp_path, monkeypatch):
    "In the MyDrive of a folder that has one, as a Drive has."
    (tmp_path/"drive"/"MyDrive").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    options = JOB | dict(train_file="train.txt", eval_file="eval.txt", output_dir="out", drive="drive", max_steps=2)
    ran = tasks.run(**options)
    assert Path(ran.drive["path"]) == Path("drive/MyDrive/colab-gpt2/out.tar.gz")
    (tmp_path/"elsewhere").mkdir()
    assert {run.name for run in runs("elsewhere", drive="drive")} == {"out"}


def test_what_a_stopped_run_writes_begins_with_its_own_text(tmp_path):
    checkpoint = tmp_path/"mine"/"checkpoint-2"
    checkpoint.mkdir(parents=True)
    write_manifest(checkpoint, dict(model="tiny"), step=2, steps=8, config=dict(prompt="The tide"))
    assert [tasks.prompt_of(tmp_path/"mine"/place) for place in ("", "checkpoint-2")] == ["The tide"] * 2
