"The command line in this process: it refuses in one line and in its own names, and a command offers what it reads."
import io, json, shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.forks import forked
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from colab_gpt2.cli import answer, name_of, one_line
from colab_gpt2.errors import Sentence
from colab_gpt2.model.loading import TINY, load_tokenizer
from colab_gpt2.reporting import reporting

QUICK = ("--model", "tiny", "--block-size", "64", "--max-new-tokens", "8", "--output-dir", "out")


@pytest.fixture
def cli(tmp_path, monkeypatch):
    "Call `colab-gpt2` in an empty folder; -> returncode, stdout and stderr."
    from typer.testing import CliRunner
    from colab_gpt2.cli import app
    monkeypatch.chdir(tmp_path)
    def call(*words):
        ran = CliRunner().invoke(app, [str(word) for word in words])
        return SimpleNamespace(returncode=ran.exit_code, stdout=ran.stdout, stderr=ran.stderr, exception=ran.exception)
    return call


@pytest.fixture
def own(tmp_path):
    "Options for two small texts of the user's own."
    for name, word, articles in (("train", "tide", 90), ("eval", "moon", 20)):
        page = (f" = Article {i} = \n \n The {word} of day {i} came in at {i % 12} o'clock . \n"
                for i in range(articles))
        (tmp_path/f"{name}.txt").write_text("".join(page))
    return "--train-file", "train.txt", "--eval-file", "eval.txt", "--cache-dir", "cache"


def refused(ran, code, *said):
    assert ran.returncode == code, ran.stdout + ran.stderr
    assert ran.stdout == "" and "Traceback" not in ran.stderr
    last = ran.stderr.strip().splitlines()[-1]
    for words in said: assert words in last, ran.stderr


def test_what_an_encoding_has_not_is_printed_as_its_number(monkeypatch):
    "A pipe on Windows."
    from colab_gpt2 import cli
    def asked(**options):
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), "cp1252"))
        monkeypatch.setattr(cli, "app", lambda prog_name: answer(lambda: ["größte 潮水 🌊"], {}, **options))
        cli.main()
        cli.sys.stdout.flush()
        return cli.sys.stdout.buffer.getvalue().decode("cp1252")
    monkeypatch.setattr(cli, "ENDING", ())
    assert asked() == "größte \\u6f6e\\u6c34 \\U0001f30a\n"
    assert json.loads(asked(as_json=True)) == ["größte 潮水 🌊"]


def test_a_folder_at_home_is_there(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path/"data").mkdir()
    assert "There is no folder" not in cli("check", "--path", "~/data").stderr
    assert "There is no folder ~/none" in cli("check", "--path", "~/none").stderr


# The steps

@pytest.mark.same
def test_steps_one_by_one(cli, own):
    "Each step as a subcommand of its own, on what the one before left."
    def ask(*words):
        ran = cli(*words, "--json")
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)
    assert ask("check")["precision"]["reason"]
    assert ask("fetch", *own)["bytes"]["train"] == Path("train.txt").stat().st_size
    assert ask("plan", "--model", "tiny", *own, "--block-size", "64")["fits"] is True
    assert ask("finetune", *QUICK, *own, "--max-steps", "3")["steps"] == 3
    assert "eval.txt" in json.dumps(ask("evaluate", "--model", "out", *own, "--block-size", "64"))
    assert len(ask("generate", "--model", "out", "--samples", "2", "--max-new-tokens", "5")["samples"]) == 2
    assert ask("archive", "--folder", "out")["path"] == "out.tar.gz"
    assert Path(ask("save", "--archive", "out.tar.gz", "--drive", "drive")["path"]).name == "out.tar.gz"
    back = ask("restore", "--name", "out.tar.gz", "--folder", "back", "--drive", "drive")
    assert {"model.safetensors", "config.json"} <= set(back["files"])
    measured = ask("bench", "--train-file", "train.txt", "--block-size", "64", "--cache-dir", "cache", "--steps", "3")
    assert measured["tokens_per_second"] > 0


def test_generate_takes_its_own_prompt_and_seed(cli):
    words = "generate", "--model", "tiny", "--prompt", "The city", "--max-new-tokens", "5"
    one, again = (cli(*words, "--seed", "3") for _ in range(2))
    assert one.stdout.startswith("The city") and not one.stderr and one.stdout == again.stdout
    assert "note: seed" in cli(*words).stderr


def test_a_text_of_less_than_a_block_can_be_evaluated(cli, tmp_path):
    (tmp_path/"short.txt").write_text("The tide came in .")
    ran = cli("evaluate", "--model", "tiny", "--eval-file", "short.txt", "--cache-dir", "cache")
    assert ran.returncode == 0 and "short.txt, per token" in ran.stdout, ran.stderr


# In its own names

def test_a_stride_beyond_the_block_is_refused_by_its_name(cli, own):
    refused(cli("evaluate", "--model", "tiny", *own, "--block-size", "64", "--eval-stride", "65"), 1,
            "--eval-stride is 65; it must be a number ≤ 64.")


def test_a_file_that_is_called_like_a_field_keeps_its_name(cli, own):
    refused(cli("finetune", *QUICK, *own, "--train-file", "train_file.txt"), 1, "train_file.txt does not exist")
    refused(cli("evaluate", "--model", "output_dir", "--dataset", "python-docs"), 1, "'output_dir'")


def test_a_sentence_gets_the_options_names():
    told = "{output_dir} {path} is full; set {method=lora}, {from_scratch=True}, {tune=False}."
    said = Sentence(told, path="resume.txt")
    assert one_line(OSError(said)) == "--output-dir resume.txt is full; set --method lora, --from-scratch, --no-tune."


# Only the options that a command reads

@pytest.mark.parametrize("command, option", [
    ("evaluate", "learning-rate"), ("evaluate", "output-dir"), ("evaluate", "prompt"), ("bench", "output-dir"),
    ("bench", "eval-file"), ("bench", "resume"), ("plan", "prompt"), ("plan", "output-dir"), ("fetch", "model")])
def test_an_option_that_the_command_does_not_read_is_unknown(cli, command, option):
    refused(cli(command, f"--{option}", "1"), 2, f"No such option: --{option}")


@pytest.mark.parametrize("command", ["finetune", "run", "demo"])
@pytest.mark.parametrize("typed", [("--resume",), ("--resume", "--seed", "3"), ("--no-resume",)])
def test_resume_without_a_value_says_what_it_takes_now(cli, command, typed):
    refused(cli(command, *typed), 2, "--resume now takes auto, never or a folder. Leave it out: the same command")


@pytest.mark.parametrize("command", ["plan", "finetune", "run", "demo", "bench"])
@pytest.mark.parametrize("no", ["", "no-"])
def test_an_option_of_before_is_refused_with_the_one_of_now(cli, command, no):
    refused(cli(command, f"--{no}attention-dropout"), 2, f"--{no}attention-dropout", f"--{no}keep-attention-dropout")


def test_every_name_that_a_command_offers_is_a_field_once():
    from colab_gpt2 import cli
    for words in (cli.OF_TEXT, cli.WORK):
        offered = [p.name for p in cli.config_options(cli.FinetuneConfig(), words)]
        assert sorted(words.split()) == sorted(offered)


# Values that cannot be used

@pytest.mark.parametrize("name, content, said", [
    ("missing.txt", None, "missing.txt"), ("empty.txt", b"", "empty"), ("binary.txt", b"\x00\x01\x02" * 50, "binary"),
    ("latin.txt", "caf\xe9 ".encode("latin-1") * 40, "UTF-8"), ("short.txt", b"too short", "block")])
def test_text_that_cannot_be_used(cli, own, tmp_path, name, content, said):
    if content is not None: (tmp_path/name).write_bytes(content)
    refused(cli("finetune", *QUICK, *own, "--train-file", name), 1, said)
    assert not (tmp_path/"out").exists() and (content is None or (tmp_path/name).read_bytes() == content)


@pytest.mark.parametrize("flags, code, said", [
    (("--block-size", "100000"), 1, "context is 512"), (("--block-size", "1"), 2, "--block-size is 1"),
    (("--num-train-epochs", "0"), 2, "--num-train-epochs is 0"),
    (("--learning-rate", "nan"), 2, "--learning-rate is nan"), (("--seed", "1" + "0" * 400), 2, "≤ 4294967295"),
    (("--learning-rate", "-1"), 2, "--learning-rate is -1"), (("--max-steps", "0"), 2, "--max-steps is 0"),
    (("--effective-batch-size", "-4"), 2, "--effective-batch-size is -4"), (("--seed", "3 GB"), 2, "'3 GB'"),
    (("--model", "gtp2-medium"), 1, "gpt2-medium"), (("--eval-split", "tset"), 2, "Did you mean 'test'?"),
    (("--no-such-option",), 2, "--no-such-option"), (("--lerning-rate", "1"), 2, "--learning-rate"),
    (("--train-file", ""), 2, "train"), (("--precision", "fp16"), 1, "use --precision auto"),
    (("--eval-stride", "1000"), 1, "--eval-stride is 1000"),
    (("--trainer-arg", "foo"), 2, "--trainer-arg is 'foo'; write NAME=VALUE"),
    (("--trainer-arg", "adam_bet2=1"), 2, "adam_beta2"),
    (("--trainer-arg", "output_dir=x"), 2, "set --output-dir instead"),
    (("--trainer-arg", "optim=addam"), 2, "optim"), (("--trainer-arg", "adam_beta2=NaN"), 2, "adam_beta2=nan"),
    (("--trainer-arg", "adam_beta2=5"), 2, "{'adam_beta2': 5}"),
    (("--trainer-arg", "adam_beta2=hello"), 2, "--trainer-arg has adam_beta2='hello'; it must be a number."),
    (("--trainer-arg", "adam_epsilon=true"), 2, "adam_epsilon=True; it must be a number."),
    (("--trainer-arg", "dataloader_num_workers=1.5"), 2, "dataloader_num_workers=1.5; it must be a whole number."),
    (("--trainer-arg", "dataloader_drop_last=yes"), 2, "dataloader_drop_last='yes'; it must be true or false."),
    (("--trainer-arg", "report_to=nobody"), 2, "nobody"), (("--trainer-arg", "log_level=loud"), 2, "log_level"),
    (("--trainer-arg", "eval_strategy=epoch"), 2, "eval_strategy"),
    (("--cache-dir", "train.txt"), 2, "train.txt, which is a file; give a folder."),
    (("--cache-dir", "train.txt/below"), 2, "train.txt, which is a file; give a folder."),
    (("--trainer-arg", "dataloader_num_workers=-1"), 2, "dataloader_num_workers"),
    (("--train-file", "nowhere/*.txt"), 1, "nowhere/*.txt"),
    (("--prompt", "a\udcffb"), 2, "--prompt is 'a\\udcffb'; it must be text in UTF-8."),
    (("--method", "lora", "--lora-rank", "1000000"), 2, "--lora-rank is 1000000; it must be"),
    (("--model", "nowhere/checkpoint-3"), 1, "There is no folder nowhere/checkpoint-3."),
    (("--tokenizer", "nosuch"), 1, "Unknown --tokenizer 'nosuch', and no folder here."),
    (("--tokenizer", "./nosuch"), 1, "There is no folder ./nosuch."),
    (("--train-file", "nosuch.txt"), 1, "--train-file: nosuch.txt does not exist."),
    (("--mirror", "/proc/nosuch"), 1, "--mirror: Making /proc/nosuch failed"),
    (("--block-size", "abc"), 2, "Invalid value for '--block-size': 'abc' is no whole number."),
    (("--learning-rate", "fast"), 2, "'fast' is no number."),
    (("--output-dir", "train.txt/below"), 1, "train.txt/below")])
def test_values_that_cannot_be_used(cli, own, tmp_path, flags, code, said):
    refused(cli("finetune", *QUICK, *own, *flags), code, said)
    assert {p.name for p in tmp_path.iterdir()} <= {"train.txt", "eval.txt", "cache"}


@pytest.mark.parametrize("words", [
    "archive --folder=", "archive --path=", "save --archive=", "save --folder=", "save --drive=", "restore --name=",
    "restore --folder=", "restore --drive=", "run --archive-path=", "run --drive=", "demo --drive=", "plan --gpu=",
    "check --path=", "finetune --prompt=", "fetch --train-file=", "generate --model=", "generate --tokenizer=",
    "generate --stop=", "bench --cache-dir=", "evaluate --eval-split="])
def test_an_option_without_its_value_is_refused(cli, tmp_path, words):
    ran = cli(*words.split())
    refused(ran, 2, words.split()[1].rstrip("="))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pair", [
    "hub_token=hf_secret", "api_key=hf_secret", "hub_token: hf_secret", "hub_token hf_secret",
    'accelerator_config={"hub_token": "hf_secret"}'])
@pytest.mark.parametrize("command", ["finetune", "bench"])
def test_a_secret_is_refused_and_not_repeated(cli, own, tmp_path, command, pair):
    words = command, "--trainer-arg", pair, *own[:2], *own[4:]
    refused(cli(*words), 2, "--trainer-arg")
    debugged = cli(*words, "--debug")
    assert "hf_secret" not in cli(*words).stderr + debugged.stderr + str(debugged.exception)
    assert not (tmp_path/"gpt2-tuned").exists()


@pytest.mark.parametrize("words", [
    "--precision {}", "--seed {}", "--max-steps {}", "--trainer-arg {}", "--trainer-arg optim={}",
    "--trainer-arg run_nam={}", "--trainer-arg log_level={}", "--train-file {}", "--model {}", "--tune{}"])
def test_a_value_of_thousands_of_characters_is_shortened(cli, own, words):
    ran = cli("finetune", *QUICK, *own, *words.format("x9" * 2500).split())
    refused(ran, ran.returncode)
    assert ran.returncode in (1, 2) and len(ran.stderr.strip().splitlines()[-1]) < 1300


def test_no_control_character_reaches_the_terminal(cli):
    orders = "\x1b[31m\x07\x9b2J\u202e"
    words = "generate", "--model", "tiny", "--prompt", f"The{orders} city", "--seed", "1", "--max-new-tokens", "3"
    told = cli(*words), cli(*words, "--json"), cli("archive", "--folder", f"no{orders}")
    assert [ran.returncode for ran in told] == [0, 0, 1]
    for ran in told:
        said = ran.stdout + ran.stderr
        assert not set(orders) & set(said) - set("[31m2J") and "\\u0007" in said
    assert json.loads(told[1].stdout)["samples"][0]["prompt"] == f"The{orders} city"


def test_an_error_in_the_middle_of_a_text_has_a_line_of_its_own(cli, monkeypatch):
    def broken(*args, **options):
        yield " tide"
        raise RuntimeError("the model broke")
    monkeypatch.setattr("colab_gpt2.generation.stream", broken)
    ran = cli("generate", "--model", "tiny", "--prompt", "The", "--seed", "1")
    assert (ran.stdout, ran.stderr, ran.returncode) == ("The tide\n", "colab-gpt2: the model broke\n", 1)


@pytest.mark.same
def test_a_run_tells_of_a_risen_perplexity_and_begins_its_samples_with_the_text(cli, own):
    ran = cli("finetune", *QUICK, *own, "--max-steps", "3", "--learning-rate", "0.3")
    assert ran.returncode == 0, ran.stderr
    risen = "lower --learning-rate, or train fewer --num-train-epochs."
    assert [text.count(f": {risen}") for text in (ran.stdout, ran.stderr)] == [1, 1]
    assert "perplexity per token, eval.txt, stride 32, context 64" in ran.stdout
    title = " = Article 0 = "
    assert json.loads(Path("out/finetune.json").read_text())["samples"]["after"]["prompt"] == f"{title}\n"
    assert cli("generate", "--model", "out", "--max-new-tokens", "3").stdout.startswith(title)
    resumed = cli("finetune", *QUICK, *own, "--max-steps", "3", "--learning-rate", "0.3")
    assert "no step was left: to train further, raise --num-train-epochs or --max-steps" in resumed.stdout


def test_a_dataset_that_is_not_known(cli):
    refused(cli("finetune", *QUICK, "--dataset", "wikitext-2-rw-v1"), 1, "wikitext-2-raw-v1")


@pytest.mark.parametrize("flags, code, said", [
    (("--temperature", "0"), 2, "--top-k 1"), (("--top-p", "0"), 2, "--top-p is 0"),
    (("--top-p", "2"), 2, "--top-p is 2"),
    (("--max-new-tokens", "0"), 2, "--max-new-tokens is 0"), (("--seed", "-1"), 2, "--seed"),
    (("--samples", "0"), 2, "--samples"), (("--model", "out"), 1, "out"),
    (("--samples", "1000000000"), 2, "--samples is 1000000000; it must be a whole number ≥ 1 and ≤ 1000000"),
    (("--max-new-tokens", "1000000000000"), 2, "--max-new-tokens is 1000000000000"),
    (("--stop", ""), 2, "--stop has ''"), (("--stop", "a", "--stop", ""), 2, "--stop has ''"),
    (("--prompt", "a\udcffb"), 2, "--prompt is 'a\\udcffb'; it must be text in UTF-8."),
    (("--stop", "a\udcffb"), 2, "--stop is 'a\\udcffb'; it must be text in UTF-8."),
    (("--model", "./a\x1b[2J"), 1, "./a\\u001b[2J")])
def test_generate_refuses(cli, flags, code, said):
    refused(cli("generate", "--model", "tiny", *flags), code, said)


def test_a_stop_of_a_shell_may_be_the_end_of_a_line(cli):
    words = "generate", "--model", "tiny", "--seed", "1", "--json", "--prompt", " = Rain = \n", "--max-new-tokens", "40"
    whole, *cut = (json.loads(cli(*words, *more).stdout)["samples"][0] for more in (
        (), ("--stop", r"\n"), ("--stop", "\n"), ("--stop", r"\\n")))
    assert "\n" in whole["text"] and cut[0]["text"] == cut[1]["text"] == whole["text"].partition("\n")[0]
    assert cut[0]["stopped"] == "stop" and cut[2] == whole
    assert r"\n for a new line" in " ".join(cli("generate", "--help").stdout.split())


def test_a_question_to_a_model_without_a_chat_template_is_told(cli, tmp_path):
    words = "generate", "--seed", "1", "--max-new-tokens", "2", "--prompt", "Why?", "--chat", "--model"
    told = cli(*words, "tiny").stderr
    assert told.startswith("note: The tokenizer has no chat template: --chat writes 'User: …'")
    assert told.count("\n") == 1
    shutil.copytree(TINY, tmp_path/"spoken")
    (tmp_path/"spoken"/"chat_template.jinja").write_text("{{ messages[0].content }}")
    assert not cli(*words, str(tmp_path/"spoken")).stderr


def test_a_terminal_gets_no_control_characters(cli):
    prompt = "a\x1b]0;b\x07\x9b2J\u202ec\r\td"
    words = "generate", "--model", "tiny", "--seed", "1", "--max-new-tokens", "3", "--prompt", prompt
    for more in ((), ("--samples", "2")):
        out = cli(*words, *more).stdout
        assert out.startswith("a\\u001b]0;b\\u0007\\u009b2J\\u202ec\\u000d\td")
    out = cli(*words, "--json").stdout
    assert json.loads(out)["samples"][0]["prompt"] == prompt and "\x9b" not in out


def test_names_and_errors_steer_no_terminal_either(capsys):
    assert one_line(OSError("no file a\x1b[2J\u202e\udcff")) == "no file a\\u001b[2J\\u202e\\udcff"
    answer(lambda: ["red\x1b[31m.txt\x07", "new\nline"], {})
    with reporting(True) as report:
        for n in range(3): report("Checking a\x1b]0;b\x07", n, 2)
    out, err = capsys.readouterr()
    assert out == "red\\u001b[31m.txt\\u0007\n\nnew\nline\n"
    assert "Checking a\\u001b]0;b\\u0007" in err and "\x07" not in err


def test_a_prompt_can_be_left_out_of_what_is_shown(cli):
    words = "generate", "--model", "tiny", "--seed", "1", "--max-new-tokens", "5", "--prompt", "<|startoftext|>The tide"
    full, text = (cli(*words, *more).stdout for more in ((), ("--no-include-prompt",)))
    assert full == "<|startoftext|>The tide" + text and text.strip()
    both = cli(*words, "--samples", "2", "--no-include-prompt").stdout
    assert both.startswith(text.rstrip("\n")) and "startoftext" not in both


def test_an_error_while_a_text_is_written_has_a_line_of_its_own(cli, monkeypatch):
    def fails(request):
        yield "one"
        raise ValueError("no more")
    monkeypatch.setattr("colab_gpt2.generation.stream_pieces", fails)
    ran = cli("generate", "--model", "tiny", "--prompt", "The ", "--seed", "1")
    assert (ran.returncode, ran.stdout, ran.stderr) == (1, "The one\n", "colab-gpt2: no more\n")


@pytest.mark.parametrize("missing", ["mine/checkpoint-3", "mine/checkpoint-3/", "mine/final", "./mine/final"])
def test_a_missing_checkpoint_is_no_model_of_the_hub(cli, monkeypatch, missing):
    "What is there is told instead."
    monkeypatch.setattr("colab_gpt2.model.loading.hub_trouble", lambda: pytest.fail("the Hub is asked"))
    for name in ("mine", "mine/checkpoint-2", "mine/checkpoint-10"):
        Path(name).mkdir()
        Path(name, "config.json").write_text("{}")
    said = f"There is no folder {missing}. mine has checkpoint-2, checkpoint-10."
    refused(cli("generate", "--model", missing), 1, said)
    refused(cli("evaluate", "--model", missing, "--dataset", "python-docs"), 1, said)


def test_before_the_first_run_the_models_here_are_told(cli):
    for name in ("poems", "novel"): Path(name).mkdir(), Path(name, "config.json").write_text("{}")
    refused(cli("generate"), 1, "There is no folder gpt2-tuned. This folder has novel, poems.")


@pytest.mark.parametrize("ask", ["plan", "generate", "finetune --train-file nowhere.txt"])
def test_an_unknown_model_is_told_first_and_is_no_wrong_usage(cli, ask):
    refused(cli(*ask.split(), "--model", "gpt3"), 1, "Did you mean 'gpt2'?")


def test_a_note_is_written_once(cli):
    Path("rows.csv").write_text("these words are here\n" + "".join(f"the words of row {n}\n" for n in range(99)))
    ran = cli("fetch", "--train-file", "rows.csv")
    assert ran.stderr.count("is read as the names of columns") == 1, ran.stderr


def test_a_prompt_beyond_the_context_of_an_own_model_is_cut_with_a_note(cli):
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, n_positions=16, vocab_size=8192)).save_pretrained("mine")
    load_tokenizer("tiny").save_pretrained("mine")
    for more in ((), ("--samples", "2")):
        ran = cli("generate", "--model", "mine", "--prompt", "The tide " * 9, "--max-new-tokens", "3", *more)
        assert ran.returncode == 0 and "the model's context is 16: only its last 15 are used." in ran.stderr


@pytest.mark.parametrize("more", [(), ("--samples", "2"), ("--json",)])
def test_a_text_that_ends_at_once_is_noted(cli, monkeypatch, more):
    words = "generate", "--model", "tiny", "--prompt", "The", "--max-new-tokens", "3", "--seed", "1", *more
    assert not cli(*words).stderr
    monkeypatch.setattr("colab_gpt2.generation.end_ids", lambda model, tokenizer: range(8192))
    ran = cli(*words)
    note = "note: A text is empty: the model ended it at once. Set another --seed or --prompt.\n"
    assert (ran.returncode, ran.stderr) == (0, note)


@pytest.mark.parametrize("words, said", [
    (("find-rate", "--steps", "5"), "--steps is 5; it must be a whole number ≥ 10."),
    (("bench", "--steps", "1"), "--steps is 1; it must be a whole number ≥ 3."),
    (("generate", "--samples", "0"), "--samples is 0; it must be a whole number ≥ 1"),
    (("compare", "a", "b", "--seed", "-1"), "--seed is -1; it must be a whole number ≥ 0")])
def test_a_number_that_is_too_low_is_told_in_our_words(cli, words, said):
    refused(cli(*words), 2, said)


def test_a_folder_that_is_not_there_is_told_before_its_disk(cli):
    ran = cli("check", "--path", "/nosuch")
    assert ran.returncode == 0 and "note: There is no folder /nosuch: the disk is that of /." in ran.stderr
    refused(cli("runs", "--folder", "nosuch"), 1, "Looking into nosuch failed: a file or folder is missing")


def test_archive_and_save_refuse(cli, tmp_path):
    (tmp_path/"out").mkdir()
    refused(cli("archive", "--folder", "out"), 1, "out")
    for name in ("a.tar.gz", "a.zip"): (tmp_path/name).write_bytes(b"mine")
    refused(cli("save", "--archive", "a.tar.gz"), 1, "a.tar.gz is truncated, corrupted or not a .tar.gz archive")
    refused(cli("save", "--archive", "a.zip"), 1, "Name a folder to save in: --drive.")
    refused(cli("bench", "--steps", "0"), 2, "--steps")
    refused(cli("plan", "--gpu", "X5"), 2, "known are T4")
    refused(cli("archive", "--folder", "out", "--path", "a.tar.gz"), 1, "out")
    assert {p.name for p in tmp_path.iterdir()} == {"out", "a.tar.gz", "a.zip"}


def test_run_looks_at_archive_and_drive_before_it_trains(cli, own, tmp_path):
    (tmp_path/"out.tar.gz").write_bytes(b"mine")
    for how in ((), ("--resume", "never")):
        refused(cli("run", *QUICK, *own, *how), 1, "out.tar.gz exists, and no run made it; set --archive-path",
                "--overwrite-output-dir to begin again")
    assert (tmp_path/"out.tar.gz").read_bytes() == b"mine" and not (tmp_path/"out").exists()
    (tmp_path/"file").write_text("no folder")
    refused(cli("run", *QUICK, *own, "--archive-path", "new.tar.gz", "--drive", "file"), 1, "file is a file")
    assert not (tmp_path/"out").exists()


def test_output_folder_that_is_taken(cli, own, tmp_path):
    (tmp_path/"out").mkdir()
    (tmp_path/"out"/"thesis.txt").write_text("mine")
    refused(cli("finetune", *QUICK, *own), 1, "--output-dir out is not empty", "--overwrite")
    (tmp_path/"file").write_text("mine")
    refused(cli("finetune", *QUICK, *own, "--output-dir", "file"), 1, "is a file")
    refused(cli("finetune", *QUICK, *own, "--output-dir", "file/below"), 1, "cannot be written to")


def test_debug_shows_the_error_itself(cli):
    assert isinstance(cli("archive", "--folder", "nothing-here", "--debug").exception, FileNotFoundError)


def of_a_reader_that_has_gone():
    from colab_gpt2.cli import errors_in_one_line
    with errors_in_one_line(): raise BrokenPipeError(32, "Broken pipe")
    print("more")


def test_a_reader_that_has_read_enough_is_no_error():
    "As `colab-gpt2 plan | head -1` is."
    ran = forked(of_a_reader_that_has_gone)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_a_plan_of_new_weights_follows_the_tokenizer(shell, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = {"<|endoftext|>": 0, "tide": 1, "moon": 2}
    own = Tokenizer(models.WordLevel(words, "<|endoftext|>"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(eos_token="<|endoftext|>", unk_token="<|endoftext|>")
    PreTrainedTokenizerFast(tokenizer_object=own, **special).save_pretrained(tmp_path/"own")
    (tmp_path/"text.txt").write_text("The tide came in.\n" * 200)
    words = "--model", "tiny", "--tokenizer", "own", "--train-file", "text.txt", "--cache-dir", "cache"
    assert "--from-scratch" in shell("colab-gpt2", "plan", *words).stderr
    ran = shell("colab-gpt2", "plan", *words, "--from-scratch")
    assert ran.returncode == 0 and "The new model has 3 embeddings" in ran.stderr, ran.stderr
