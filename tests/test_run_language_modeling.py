"The command of 2020 as it was typed, in processes of their own; and what it says where it cannot go on."
import json, os, shlex, shutil, signal, subprocess, sys, time

import pytest

from colab_gpt2.legacy.flags import name_of, parse
from colab_gpt2.legacy.run_language_modeling import translate, with_texts
from colab_gpt2.text.corpus import load_corpus

COMMAND = ("--output_dir=output --model_type=gpt2 --model_name_or_path=tiny --do_train "
           "--train_data_file=wikitext-2-raw/wiki.train.raw --do_eval --eval_data_file=wikitext-2-raw/wiki.test.raw "
           "--per_gpu_train_batch_size=1 --save_steps=-1 --num_train_epochs=2")
MODULE = [sys.executable, "-m", "colab_gpt2.run_language_modeling"]


def environment(folder):
    "No Hub behind 127.0.0.1:9, and caches of its own."
    return {**os.environ, "XDG_CACHE_HOME": str(folder/"cache"), "HF_HOME": str(folder/"hf"),
            "HF_ENDPOINT": "http://127.0.0.1:9"}


def run(folder, flags, **options):
    words, options = [*MODULE, *shlex.split(flags)], dict(text=True, capture_output=True, timeout=300, **options)
    return subprocess.run(words, cwd=folder, env=environment(folder), **options)


def results(path):
    pairs = (line.split(" = ") for line in path.read_text().splitlines())
    return {key: float(value) for key, value in pairs}


def real_or_made():
    """(text to train on, held-out text) of one article, so that little training helps: the second of WikiText-2's
    validation split where that is next to the checkout, else one of its shape."""
    from conftest import ROOT
    real = ROOT.parent/"shared"/"data"/"wikitext-2-raw"/"wiki.valid.raw"
    article = " = Article {i} = \n \n The tide of day {i} came in at {hour} o'clock and went out again . \n \n"
    made = (article.format(i=i, hour=i % 12) for i in range(400))
    text = real.read_text(encoding="utf-8") if real.exists() else "".join(made)
    return text[9000:12500] + text[14500:18000], text[12500:14500]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Where the tutorial's user stands: the text is in wikitext-2-raw."
    root = tmp_path_factory.mktemp("tutorial")
    (root/"wikitext-2-raw").mkdir()
    for name, text in zip(("train", "test"), real_or_made()):
        (root/"wikitext-2-raw"/f"wiki.{name}.raw").write_text(text, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def tutorial(folder):
    return run(folder, COMMAND)


def test_what_the_command_had_no_flag_for_is_said_as_one_can_type_it(folder, tmp_path):
    (tmp_path/"latin.txt").write_bytes("La marée d'été.\n".encode("latin-1")*99 + b"The tide comes in.\n"*99)
    flags = "--output_dir=o --model_name_or_path=tiny --do_train --train_data_file=latin.txt --max_steps=1"
    ran = run(tmp_path, flags)
    last = ran.stderr.splitlines()[-1]
    assert ran.returncode == 1 and "convert it (iconv -f " in last and "or set --on_bad_lines=skip to" in last
    assert name_of("method", "lora") == "`colab-gpt2 finetune --method lora`"


def test_the_tutorials_command(folder, tutorial):
    assert tutorial.returncode == 0, tutorial.stderr
    assert tutorial.stdout == ""
    for line in ("--per_gpu_train_batch_size=1 → per_device_train_batch_size=1, gradient_accumulation_steps=1",
                 "--save_steps=-1 → save_steps=-1", "***** Eval results *****"):
        assert line in tutorial.stderr.splitlines()
    files = {p.name for p in (folder/"output").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "eval_results_lm.txt", "finetune.json"} <= files
    assert not any(name.startswith(("checkpoint-", ".")) for name in files)
    lines = (folder/"output"/"eval_results_lm.txt").read_text().splitlines()
    assert lines[0].startswith("perplexity = ")
    told = json.loads((folder/"output"/"finetune.json").read_text())
    assert float(lines[0].split(" = ")[1]) == told["perplexity_after"]["value"] < told["perplexity_before"]["value"]
    assert told["steps"] == 2 * (told["train_tokens"] // 512)  # a block is a step
    assert told["perplexity_after"]["split"] == "wiki.test.raw" and told["perplexity_after"]["stride"] == 512


@pytest.fixture
def command(folder, tmp_path, monkeypatch, capsys):
    "The same in this process, which has torch already: -> (exit code, what it said)."
    from colab_gpt2.legacy.run_language_modeling import main
    monkeypatch.chdir(folder)
    def call(flags):
        code = main(shlex.split(flags) + [f"--cache_dir={tmp_path/'cache'}", "--disable_tqdm"])
        out, err = capsys.readouterr()
        assert out == "" and "Traceback" not in err
        return code, err
    return call


def test_the_same_command_again_trains_nothing(command, folder, tutorial, monkeypatch):
    before = {p.name: p.stat().st_mtime_ns for p in (folder/"output").iterdir() if p.name != "eval_results_lm.txt"}
    was = results(folder/"output"/"eval_results_lm.txt")
    monkeypatch.setattr("colab_gpt2.training.train", lambda *args: pytest.fail("it trains again"))
    code, said = command(COMMAND)
    assert code == 0 and results(folder/"output"/"eval_results_lm.txt") == was, said
    assert "note: this run is finished already, and nothing is trained.\n" in said
    after = {p.name: p.stat().st_mtime_ns for p in (folder/"output").iterdir() if p.name in before}
    assert after == before


def test_its_output_is_refused_then_trained_further(command, folder, tutorial):
    before = {p.name: p.stat().st_mtime_ns for p in (folder/"output").iterdir()}
    again = COMMAND.replace("=tiny", "=output/")
    code, said = command(again)
    why = "--output_dir output holds the model of another run: --model_name_or_path was tiny, now it is output."
    assert code == 1 and why in said.splitlines()[-1]
    assert {p.name: p.stat().st_mtime_ns for p in (folder/"output").iterdir()} == before
    reached = results(folder/"output"/"eval_results_lm.txt")["perplexity"]
    code, said = command(again + " --overwrite_output_dir --max_steps=2")
    assert code == 0, said
    told = json.loads((folder/"output"/"finetune.json").read_text())
    assert told["perplexity_before"]["value"] == pytest.approx(reached, rel=1e-6)
    assert told["steps"] == 2


TEXT = "--do_train --train_data_file=wikitext-2-raw/wiki.train.raw"
TRAIN = f"--model_name_or_path=tiny {TEXT} --block_size=64 --per_gpu_train_batch_size=2"
EVALUATE = "--do_eval --eval_data_file=wikitext-2-raw/wiki.test.raw"


def test_only_evaluating(command, tmp_path):
    code, said = command(f"--output_dir={tmp_path/'a'} --model_name_or_path=tiny {EVALUATE} --block_size=128")
    assert code == 0, said
    assert [p.name for p in (tmp_path/"a").iterdir()] == ["eval_results_lm.txt"]
    assert results(tmp_path/"a"/"eval_results_lm.txt").keys() == {"perplexity", "stride", "tokens"}


def test_only_training_evaluates_the_text_itself_and_says_so(command, tmp_path):
    code, said = command(f"--output_dir={tmp_path/'a'} {TRAIN} --max_steps=2")
    assert code == 0, said
    assert "says nothing about new text" in said
    assert not (tmp_path/"a"/"eval_results_lm.txt").exists()
    told = json.loads((tmp_path/"a"/"finetune.json").read_text())
    assert told["perplexity_after"]["split"] == "start of wiki.train.raw (trained on)"


def test_from_scratch_with_a_tokenizer_of_another_size(command, tmp_path):
    from transformers import GPT2Config
    GPT2Config(n_layer=1, n_embd=32, n_head=2, n_positions=64).save_pretrained(tmp_path/"shape")
    new = f"--model_type=gpt2 --config_name={tmp_path/'shape'} --tokenizer_name=tiny"
    code, said = command(f"--output_dir={tmp_path/'a'} {new} {TEXT} {EVALUATE} --max_steps=2 --learning_rate=1e-3")
    assert code == 0, said
    assert "The new model has 8192 embeddings" in said
    told = json.loads((tmp_path/"a"/"finetune.json").read_text())
    assert 7000 < told["perplexity_before"]["value"] < 9500  # it knows nothing: about the vocabulary's size


def test_checkpoints_are_watched_evaluated_and_resumed(command, tmp_path):
    flags = f"--output_dir={tmp_path/'a'} {TRAIN} {EVALUATE}"
    watched = "--evaluate_during_training --logging_steps=2 --eval_all_checkpoints"
    code, said = command(f"{flags} --max_steps=4 --save_steps=2 --learning_rate=1e-3 {watched}")
    assert code == 0, said
    assert "step 2: perplexity = " in said and "step 4: perplexity = " in said
    found = results(tmp_path/"a"/"eval_results_lm.txt")
    assert found["perplexity_4"] == pytest.approx(found["perplexity"], rel=1e-4)
    assert found["perplexity_2"] > found["perplexity_4"]
    code, said = command(f"{flags} --max_steps=6")
    assert code == 1 and "--max_steps was 4, now it is 6" in said
    assert f"--resume={tmp_path/'a'}" in said.splitlines()[-1]
    unnamed = flags.replace("--model_name_or_path=tiny", "")  # the checkpoint is the model, as in 2020
    code, said = command(f"{unnamed} --max_steps=6 --should_continue --overwrite_output_dir")
    assert code == 0, said
    told = json.loads((tmp_path/"a"/"finetune.json").read_text())
    assert told["steps"] == 6 and told["resumed_from"].endswith("checkpoint-4")
    named = flags.replace("=tiny", f"={tmp_path/'a'/'checkpoint-6'}")
    code, said = command(f"{named} --max_steps=7 --overwrite_output_dir")
    assert code == 0 and json.loads((tmp_path/"a"/"finetune.json").read_text())["steps"] == 7, said
    a = tmp_path/"a"
    for steps, flag in enumerate((f"--resume_from_checkpoint={a/'checkpoint-7'}", f"--resume={a}"), 8):
        code, said = command(f"{unnamed} --max_steps={steps} {flag}")
        told = json.loads((a/"finetune.json").read_text())
        assert code == 0 and told["resumed_from"].endswith(f"checkpoint-{steps - 1}"), said
    code, said = command(f"--output_dir={a} --model_name_or_path={a} {EVALUATE} --should_continue")
    assert code == 0 and results(tmp_path/"a"/"eval_results_lm.txt")["perplexity"] > 0, said
    older = flags.replace("=tiny", f"={a/'checkpoint-2'}")
    code, said = command(f"{older} --max_steps=6 --overwrite_output_dir")
    assert code == 2 and "the newest complete checkpoint there is" in said and (tmp_path/"a"/"checkpoint-2").exists()


def test_the_same_command_resumes_and_says_so(command, tmp_path):
    flags = f"--output_dir={tmp_path/'a'} {TRAIN} --max_steps=4 --save_steps=2"
    assert command(flags)[0] == 0
    weights = (tmp_path/"a"/"model.safetensors").read_bytes()
    for path in (tmp_path/"a").iterdir():  # as a session leaves it that ends after step 2
        if path.name == "checkpoint-4": shutil.rmtree(path)
        elif path.name != "checkpoint-2": path.unlink()
    code, said = command(flags)
    assert code == 0 and "note: Resuming at step 2 of 4." in said and "should_continue" not in said
    assert (tmp_path/"a"/"model.safetensors").read_bytes() == weights
    code, said = command(f"{flags} --overwrite_output_dir")
    told = json.loads((tmp_path/"a"/"finetune.json").read_text())
    assert code == 0 and "Resuming" not in said and told["resumed_from"] is None


def test_an_incomplete_checkpoint_is_not_resumed(command, tmp_path):
    (tmp_path/"a"/"checkpoint-3").mkdir(parents=True)
    (tmp_path/"a"/"checkpoint-3"/"model.safetensors").write_bytes(b"half")
    code, said = command(f"--output_dir={tmp_path/'a'} {TRAIN} --should_continue")
    assert code == 2 and "--should_continue: " in said and "has no complete checkpoint to resume from" in said


def test_a_resume_by_the_flags_of_2020_is_done_or_told_in_a_line(command, tmp_path):
    "By name, by the newer script's name, or by default; and what cannot be is told before anything begins."
    flags = f"--output_dir={tmp_path/'a'} {TRAIN} --max_steps=1"
    for asked in "--resume=/none", "--resume_from_checkpoint=true", "--resume_from_checkpoint=/none":
        code, said = command(f"{flags} {asked}")
        assert code == 2 and asked in said and "has no complete checkpoint to resume from" in said
    code, said = command(f"{flags} --resume=/none --should_continue")
    assert code == 2 and "--should_continue and --resume ask for the same" in said.splitlines()[-1]
    assert not (tmp_path/"a").exists()
    assert command(f"{flags} --resume_from_checkpoint=False --resume=auto")[0] == 0
    code, said = command(f"{flags} --resume=never")
    assert code == 1 and "is not empty; set --resume=auto to resume its run, --overwrite_output_dir" in said


def test_ctrl_c_saves_and_says_how_to_resume(folder, tmp_path):
    words = shlex.split(f"--output_dir={tmp_path/'a'} {TRAIN} --num_train_epochs=50 --save_steps=-1")
    pipes = dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen([*MODULE, *words], cwd=folder, env=environment(folder), **pipes) as process:
        said = ""
        while "Fine-tuning" not in said and process.poll() is None: said += process.stderr.read(1)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=300)
    assert process.returncode == 130, said + rest
    assert "saved in" in rest and "Run the same again" in rest.strip().splitlines()[-1]
    assert len(list((tmp_path/"a").glob("checkpoint-*"))) == 1


@pytest.mark.parametrize("name, content, words", [
    ("train_file.txt", None, "train_file.txt does not exist"), ("empty", b"", "empty"), ("binary", b"a\0b", "binary"),
    ("latin", "é".encode("latin-1") * 9, "UTF-8")])
@pytest.mark.parametrize("which", ["train", "eval"])
def test_bad_texts(command, tmp_path, name, content, words, which):
    if content is not None: (tmp_path/name).write_bytes(content)
    code, said = command(f"--output_dir={tmp_path/'a'} {TRAIN} {EVALUATE} --{which}_data_file={tmp_path/name}")
    assert code == 1 and words in said.splitlines()[-1] and name in said.splitlines()[-1]
    assert not (tmp_path/"a").exists()


@pytest.mark.parametrize("flags, code, words", [
    ("--block_size=513", 1, "context is 512"), ("--model_name_or_path=tinny", 1, "Did you mean 'tiny'?"),
    ("--model_name_or_path=output-2/", 1, "'output-2'"), ("--output_dir=wikitext-2-raw/wiki.test.raw", 1, "is a file"),
    ("--mlm", 2, "--mlm: GPT-2 predicts the next token"), ("--run_name=", 2, "--run_name is empty; give a value."),
    ("--local_rank=0", 2, "torchrun"), ("--learning_rate=nan", 2, "--learning_rate is nan"),
    ("--num_train_epochs=0", 2, "--num_train_epochs is 0"), ("--output_dir=", 2, "--output_dir is empty"),
    ("--per_gpu_train_batch_size=0", 2, "--per_gpu_train_batch_size is 0")])
def test_bad_flags(command, tmp_path, flags, code, words):
    said = command(f"--output_dir={tmp_path/'a'} {TRAIN} {flags}")
    assert said[0] == code and words in said[1].splitlines()[-1]
    assert not (tmp_path/"a").exists()


def test_bad_usage_of_a_process_of_its_own(tmp_path):
    result = run(tmp_path, "--output_dir=a --do_train")
    assert result.returncode == 2 and result.stdout == "" and not list(tmp_path.iterdir())
    assert "--train_data_file is missing" in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("flag, words", [
    ("--lerning_rate=1e-4", "Did you mean '--learning_rate'?"), ("--seed=x", "invalid int value"),
    ("--hub_token=hf_secret", "there is no flag --hub_token."), ("--seed=" + "9x" * 2500, "invalid int value"),
    ("--x\x1b[31m", "there is no flag --x\\u001b[31m.")])
def test_a_flag_that_is_refused_is_a_short_line_without_its_secret(capsys, flag, words):
    with pytest.raises(SystemExit) as ended: parse([flag])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and words in said and len(said.splitlines()) == 1
    assert len(said) < 1200 and "hf_secret" not in said and "\x1b" not in said


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral", "bert"])
@pytest.mark.parametrize("named", ["--model_name_or_path=tiny", "--config_name=mine --tokenizer_name=tiny"])
def test_the_type_decides_nothing_where_weights_or_a_config_are_named(kind, named):
    words = f"--output_dir=a --do_train --train_data_file=t.txt {named}"
    assert translate(parse([*words.split(), f"--model_type={kind}"])).config == translate(parse(words.split())).config


def test_a_type_alone_makes_a_gpt2():
    words = "--output_dir=a --do_train --train_data_file=t.txt --tokenizer_name=tiny --model_type=".split()
    assert translate(parse([*words[:-1], "--model_type=gpt2"])).config.from_scratch
    with pytest.raises(ValueError, match="--model_type=mistral: a new model has the shape of gpt2; give --config_name"):
        translate(parse([*words[:-1], "--model_type=mistral"]))


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl"])
def test_all_of_the_text_is_learnt_where_there_is_none_to_evaluate_on(tmp_path, name, recwarn):
    "Also a text of many documents, of which the first are evaluated on."
    stories = [f"The tide of day {n} ebbs.\n" * 20 for n in range(100)]
    rows = "".join(json.dumps(dict(text=story)) + "\n" for story in stories)
    (tmp_path/name).write_text("<|endoftext|>".join(stories) if name == "t.txt" else rows)
    words = f"--output_dir=out --do_train --train_data_file={tmp_path/name} --model_name_or_path=tiny"
    config = with_texts(translate(parse(words.split())), tmp_path)
    files = dict(train_file=config.train_file, eval_file=config.eval_file)
    corpus = load_corpus(**files, cache_dir=tmp_path/"cache", progress=False)
    assert corpus.train.read_text() == "<|endoftext|>".join(stories)
    assert corpus.report.duplicates == 0 and corpus.bytes["validation"] > 10_000


def test_the_home_folder_is_meant_by_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = "--output_dir=~/out --do_train --train_data_file=t.txt --model_name_or_path=tiny"
    assert translate(parse(words.split())).config.output_dir == str(tmp_path/"out")


def test_help_is_quick_and_shows_every_flag(tmp_path):
    code = """import sys, colab_gpt2.legacy.run_language_modeling
from colab_gpt2.legacy.flags import FLAGS, make_parser
text = make_parser().format_help()
assert all(f"--{name}" in text for name in FLAGS) and "Example:" in text
assert not {"torch", "transformers", "datasets"} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_cuda_hides_the_gpu(command, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    code, _ = command(f"--output_dir={tmp_path/'a'} --model_name_or_path=tiny {EVALUATE} --no_cuda --block_size=513")
    assert code == 1
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_conversations_need_others_to_evaluate_on(tmp_path):
    (tmp_path/"a.jsonl").write_text('{"prompt": "Tide?", "completion": "It ebbs."}\n')
    given = dict(do_train=True, output_dir="o", model_name_or_path="tiny", train_data_file=str(tmp_path/"a.jsonl"))
    with pytest.raises(ValueError, match="a.jsonl holds conversations: give others in eval_file") as e:
        with_texts(translate(given), tmp_path)
    assert "--eval_data_file" in e.value.args[0].render(name_of)
