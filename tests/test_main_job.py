"The main job as a user meets it: the command line in a process of its own, on real input, and what it leaves on disk when things go wrong."
import json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest

QUICK = ("--model", "tiny", "--block-size", "64", "--max-new-tokens", "8", "--output-dir", "out")
PROMISED = ("runtime model parameters dataset train_tokens perplexity_before perplexity_after steps epochs tokens_per_second seconds "
            "output_dir archive drive samples").split()


def page(n, word="tide"):
    return "".join(f" = Article {i} = \n \n The {word} of day {i} came in at {i % 12} o'clock and went out again . \n" for i in range(n))


@pytest.fixture
def own(tmp_path):
    "Flags for two small texts of the user's own."
    (tmp_path/"train.txt").write_text(page(80))
    (tmp_path/"eval.txt").write_text(page(30, "moon"))
    return ("--train-file", "train.txt", "--eval-file", "eval.txt", "--cache-dir", "cache")


def test_run_gives_what_it_promises(shell, own, tmp_path):
    ran = shell("colab-gpt2", "run", *QUICK, *own, "--max-steps", "12", "--drive", "drive", "--json")
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    assert [k for k in PROMISED if k not in said] == []
    before, after = said["perplexity_before"], said["perplexity_after"]
    assert [before[k] for k in ("unit", "split", "stride", "tokens")] == [after[k] for k in ("unit", "split", "stride", "tokens")]
    assert after["value"] < before["value"]
    assert said["samples"]["before"]["prompt"] == said["samples"]["after"]["prompt"] and said["samples"]["before"]["seed"] == said["samples"]["after"]["seed"]
    assert set(said["archive"]) >= {"path", "bytes", "sha256"} and Path(tmp_path, said["archive"]["path"]).stat().st_size == said["archive"]["bytes"]
    assert Path(tmp_path, said["drive"]["path"]).exists()
    assert "fine-tuning" in ran.stderr and "Traceback" not in ran.stderr


def test_steps_one_by_one(shell, own, tmp_path):
    "Each step as a subcommand of its own, on what the one before left."
    def ask(*words):
        ran = shell("colab-gpt2", *words, "--json")
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)
    assert ask("check")["precision"]["reason"]
    assert ask("fetch", *own)["bytes"]["train"] == len(page(80))
    assert ask("plan", "--model", "tiny", *own, "--block-size", "64")["fits"] is True
    assert ask("finetune", *QUICK, *own, "--max-steps", "3")["steps"] == 3
    assert "eval.txt" in json.dumps(ask("evaluate", "--model", "out", *own, "--block-size", "64"))
    assert len(ask("generate", "--model", "out", "--prompt", "The tide", "--samples", "2", "--max-new-tokens", "5")["samples"]) == 2
    assert ask("archive", "--folder", "out")["path"] == "out.tar.gz"
    assert Path(ask("save", "--archive", "out.tar.gz", "--drive", "drive")["path"]).name == "out.tar.gz"
    assert {"model.safetensors", "config.json"} <= set(ask("restore", "--name", "out.tar.gz", "--folder", "back", "--drive", "drive")["files"])
    assert ask("bench", *QUICK, *own, "--steps", "3")["tokens_per_second"] > 0


def test_generate_streams_to_stdout(shell):
    ran = shell("colab-gpt2", "generate", "--model", "tiny", "--prompt", "The city", "--seed", "1", "--max-new-tokens", "5")
    assert ran.returncode == 0 and ran.stdout.strip() and not ran.stderr, ran.stderr


def test_real_text_improves_on_the_test_split(shell, shared, tmp_path):
    "WikiText-2's validation split is trained on, its test split measured; sixty steps and the first 60 kB of the test split here."
    raw = shared/"data"/"wikitext-2-raw"
    (tmp_path/"wiki.test.raw").write_bytes((raw/"wiki.test.raw").read_bytes()[:60_000])
    ran = shell("colab-gpt2", "run", "--model", "tiny", "--train-file", raw/"wiki.valid.raw", "--eval-file", "wiki.test.raw", "--output-dir", "out",
                "--max-steps", "60", "--block-size", "128", "--max-new-tokens", "8", "--cache-dir", "cache", "--json", timeout=600)
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
    (tmp_path/"eval.txt").write_text(text[60_000:64_000], encoding="utf-8")
    ran = shell("colab-gpt2", "finetune", "--model", "gpt2-124m", "--train-file", "train.txt", "--eval-file", "eval.txt", "--output-dir", "out", "--max-steps", "6",
                "--block-size", "128", "--effective-batch-size", "4", "--learning-rate", "3e-4", "--logging-steps", "1", "--save-steps", "-1", "--max-new-tokens", "4",
                "--cache-dir", "cache", "--json", timeout=600)
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


@pytest.mark.parametrize("name, content, said", [("missing.txt", None, "missing.txt"), ("empty.txt", b"", "empty"), ("binary.txt", b"\x00\x01\x02" * 50, "binary"),
                                                 ("latin.txt", "caf\xe9 ".encode("latin-1") * 40, "UTF-8"), ("short.txt", b"too short", "block")])
def test_text_that_cannot_be_used(shell, own, tmp_path, name, content, said):
    if content is not None: (tmp_path/name).write_bytes(content)
    refused(shell("colab-gpt2", "finetune", *QUICK, *own, "--train-file", name), 1, said)
    assert not any((tmp_path/"out").glob("*")) and (content is None or (tmp_path/name).read_bytes() == content)


@pytest.mark.parametrize("flags, code, said", [
    (("--block-size", "100000"), 1, "the model's context is 512"), (("--block-size", "1"), 2, "--block-size is 1"), (("--num-train-epochs", "0"), 2, "--num-train-epochs is 0"),
    (("--learning-rate", "nan"), 2, "--learning-rate is nan"), (("--seed", "1" + "0" * 400), 2, "4294967295 or less"), (("--learning-rate", "-1"), 2, "--learning-rate is -1"), (("--max-steps", "0"), 2, "--max-steps is 0"),
    (("--effective-batch-size", "-4"), 2, "--effective-batch-size is -4"), (("--seed", "x"), 2, "valid int"), (("--model", "gtp2-medium"), 1, "gpt2-medium"),
    (("--dataset", "wikitext-2-rw-v1"), 1, "wikitext-2-raw-v1"), (("--eval-split", "tset"), 2, "Did you mean 'test'?"),
    (("--no-such-flag",), 2, "--no-such-flag"), (("--lerning-rate", "1"), 2, "--learning-rate"), (("--trainer-arg", "adam_bet2=1"), 1, "adam_beta2"),
    (("--precision", "fp16"), 1, "slower than fp32"), (("--eval-stride", "1000"), 1, "stride"),
    (("--train-file", ""), 2, "train"), (("--trainer-arg", "output_dir=x"), 1, "which the run sets itself"), (("--trainer-arg", "optim=addam"), 1, "optim"),
    (("--trainer-arg", "adam_beta2=NaN"), 1, "--trainer-arg has adam_beta2=nan"), (("--trainer-arg", "adam_beta2=5"), 1, "--trainer-arg {'adam_beta2': 5}"),
    (("--trainer-arg", "eval_strategy=epoch"), 1, "eval_strategy")])
def test_values_that_cannot_be_used(shell, own, tmp_path, flags, code, said):
    if "--dataset" in flags: own = ()
    refused(shell("colab-gpt2", "finetune", *QUICK, *own, *flags), code, said)
    assert not any((tmp_path/"out").glob("*"))


@pytest.mark.parametrize("flags, code, said", [(("--temperature", "0"), 2, "top_k=1"), (("--top-p", "0"), 2, "top_p is 0"), (("--top-p", "2"), 2, "top_p is 2"),
                                               (("--max-new-tokens", "0"), 2, "max_new_tokens is 0"), (("--seed", "-1"), 2, "seed is -1"),
                                               (("--samples", "0"), 2, "samples is 0"), (("--model", "out"), 1, "out")])
def test_generate_refuses(shell, flags, code, said):
    refused(shell("colab-gpt2", "generate", "--model", "tiny", *flags), code, said.replace("max_new_tokens", "--max-new-tokens"))


def test_archive_and_save_refuse(shell, tmp_path):
    (tmp_path/"out").mkdir()
    refused(shell("colab-gpt2", "archive", "--folder", "out"), 1, "out")
    (tmp_path/"a.tar.gz").write_bytes(b"mine")
    refused(shell("colab-gpt2", "save", "--archive", "a.tar.gz"), 1, "Name a folder to save in instead: --drive FOLDER")
    refused(shell("colab-gpt2", "bench", "--steps", "0"), 2, "steps is 0")
    refused(shell("colab-gpt2", "plan", "--gpu", "X5"), 2, "known are T4")
    refused(shell("colab-gpt2", "archive", "--folder", "out", "--path", "a.tar.gz"), 1, "out")
    assert {p.name for p in tmp_path.iterdir()} == {"out", "a.tar.gz"}


def test_run_looks_at_the_archive_first_and_fails_for_a_drive_that_was_asked_for(shell, own, tmp_path):
    (tmp_path/"out.tar.gz").write_bytes(b"mine")
    refused(shell("colab-gpt2", "run", *QUICK, *own), 1, "out.tar.gz exists. Set --archive-path to another file, or --overwrite-output-dir")
    assert (tmp_path/"out.tar.gz").read_bytes() == b"mine" and not (tmp_path/"out").exists()
    (tmp_path/"file").write_text("no folder")
    refused(shell("colab-gpt2", "run", *QUICK, *own, "--archive-path", "new.tar.gz", "--drive", "file"), 1, "file is a file")
    assert not (tmp_path/"out").exists()  # nothing was trained for a Drive that is none
    (tmp_path/"drive").mkdir()
    (tmp_path/"drive"/"colab-gpt2").write_text("in the way")
    ran = shell("colab-gpt2", "run", *QUICK, *own, "--max-steps", "2", "--archive-path", "new.tar.gz", "--drive", "drive", "--json")
    assert ran.returncode == 1 and "not on the Drive" in ran.stderr, ran.stderr
    assert json.loads(ran.stdout)["drive"]["why"] and (tmp_path/"new.tar.gz").exists()


def test_nothing_is_deleted_that_was_not_written(shell, own, tmp_path):
    "Checkpoints go when the next run has begun, not when it is refused; what is not ours stays."
    assert shell("colab-gpt2", "finetune", *QUICK, *own, "--max-steps", "2").returncode == 0
    (tmp_path/"out"/"checkpoint-3").mkdir()
    (tmp_path/"out"/"checkpoint-3"/"notes.txt").write_text("mine")
    refused(shell("colab-gpt2", "finetune", *QUICK, *own, "--overwrite-output-dir", "--trainer-arg", "foo=1"), 1, "foo")
    assert (tmp_path/"out"/"checkpoint-2"/"model.safetensors").exists()
    assert shell("colab-gpt2", "finetune", *QUICK, *own, "--max-steps", "3", "--overwrite-output-dir").returncode == 0
    assert (tmp_path/"out"/"checkpoint-3.before"/"notes.txt").read_text() == "mine"
    assert not (tmp_path/"out"/"checkpoint-2").exists() and (tmp_path/"out"/"checkpoint-3"/"whole.json").exists()


def test_resume_needs_the_same_run(shell, own, tmp_path):
    assert shell("colab-gpt2", "finetune", *QUICK, *own, "--max-steps", "2").returncode == 0
    weights = (tmp_path/"out"/"model.safetensors").read_bytes()
    refused(shell("colab-gpt2", "finetune", *QUICK, *own, "--max-steps", "4", "--resume", "--block-size", "32"), 1, "is of another run")
    shutil.rmtree(tmp_path/"out"/"checkpoint-2")
    refused(shell("colab-gpt2", "finetune", *QUICK, *own, "--max-steps", "4", "--resume"), 1, "no whole checkpoint")
    assert (tmp_path/"out"/"model.safetensors").read_bytes() == weights


def test_output_folder_that_is_taken(shell, own, tmp_path):
    (tmp_path/"out").mkdir()
    (tmp_path/"out"/"thesis.txt").write_text("mine")
    refused(shell("colab-gpt2", "finetune", *QUICK, *own), 1, "is not empty", "resume", "overwrite")
    ran = shell("colab-gpt2", "finetune", *QUICK, *own, "--max-steps", "2", "--overwrite-output-dir")
    assert ran.returncode == 0 and (tmp_path/"out"/"thesis.txt").read_text() == "mine", ran.stderr
    (tmp_path/"file").write_text("mine")
    refused(shell("colab-gpt2", "finetune", *QUICK, *own, "--output-dir", "file"), 1, "is a file")
    refused(shell("colab-gpt2", "finetune", *QUICK, *own, "--output-dir", "file/below"), 1, "cannot be written to")


def test_no_network_and_nothing_cached(shell, tmp_path):
    closed = dict(HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path/"hf"), https_proxy="http://127.0.0.1:9", http_proxy="http://127.0.0.1:9")
    refused(shell("colab-gpt2", "finetune", "--model", "gpt2", "--dataset", "python-docs", "--cache-dir", "cache", "--output-dir", "out", **closed), 1, "tiny")
    refused(shell("colab-gpt2", "fetch", "--dataset", "wikitext-2-raw-v1", "--cache-dir", "cache", **closed), 1, "python-docs")
    assert not list((tmp_path/"cache").rglob("*.raw"))


def test_ctrl_c_saves_and_resume_goes_on(shell, own, tmp_path):
    words = [sys.executable, "-c", "from colab_gpt2.cli import main; main()", "finetune", *QUICK, *own, "--max-steps", "4000"]
    with open(tmp_path/"stderr", "w") as err:
        process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=err, text=True)
        deadline = time.monotonic() + 120
        while not re.search(r" [1-9]\d*/4000", (tmp_path/"stderr").read_text()) and time.monotonic() < deadline: time.sleep(0.05)  # the bar leaves steps out
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    said = (tmp_path/"stderr").read_text()
    assert process.returncode == 130 and out == "" and "Traceback" not in said, said
    assert "saved in out/checkpoint-" in said.strip().splitlines()[-1] and said.strip().endswith("To go on: the same again with --resume.")
    step = int(next((tmp_path/"out").glob("checkpoint-*")).name.split("-")[1])
    half = tmp_path/"out"/f"checkpoint-{step + 5}"  # a copy that was cut short
    shutil.copytree(tmp_path/"out"/f"checkpoint-{step}", half)
    os.truncate(half/"model.safetensors", 1000)
    ran = shell("colab-gpt2", "finetune", *QUICK, *own, "--max-steps", str(step + 3), "--resume", "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["resumed_from"] == f"out/checkpoint-{step}" and json.loads(ran.stdout)["steps"] == step + 3
    assert f"checkpoint-{step + 5} is not whole" in ran.stderr and half.exists()


def test_full_disk_leaves_the_last_checkpoint(shell, own, tmp_path):
    "A real file system of 200 MB on which two checkpoints of tiny fit and the third does not."
    small = tmp_path/"small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", small], capture_output=True).returncode: pytest.skip("this user may not mount a small file system")
    try:
        ran = shell("colab-gpt2", "finetune", *QUICK, *own, "--output-dir", "small/out", "--max-steps", "6", "--save-steps", "1", "--save-total-limit", "9")
        refused(ran, 1, "is full", "Kept: checkpoint-1")
        assert {p.name for p in (small/"out").iterdir()} == {"checkpoint-1", "checkpoint-2"}
        shutil.rmtree(small/"out"/"checkpoint-1")
        ran = shell("colab-gpt2", "finetune", *QUICK, *own, "--output-dir", "small/out", "--max-steps", "3", "--save-steps", "9", "--resume", "--json")
        assert ran.returncode == 0 and json.loads(ran.stdout)["resumed_from"] == "small/out/checkpoint-2", ran.stderr
    finally: subprocess.run(["umount", small], check=True)


def test_debug_shows_the_traceback(shell):
    ran = shell("colab-gpt2", "archive", "--folder", "nothing-here", "--debug")
    assert ran.returncode == 1 and "Traceback" in ran.stderr


def test_same_seed_same_weights(shell, own, tmp_path):
    for folder in ("a", "b"):
        assert shell("colab-gpt2", "finetune", *QUICK, *own, "--output-dir", folder, "--max-steps", "3", "--from-scratch").returncode == 0
    assert (tmp_path/"a"/"model.safetensors").read_bytes() == (tmp_path/"b"/"model.safetensors").read_bytes()
