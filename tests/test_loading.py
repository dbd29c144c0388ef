"Models from complete and incomplete folders, with new weights, and with the wrong tokenizer."
import json

import pytest, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import BertConfig, BloomConfig, GPT2Config, GPTNeoXConfig, T5Config

from colab_gpt2.errors import fields_of
from colab_gpt2.generation import generate
from colab_gpt2.model.loading import MODELS, TINY, check_match, load_model, load_tokenizer, model_context, new_model
from colab_gpt2.planning.plan import TextSize, plan_run
from colab_gpt2.runtime import check_runtime

SMALL = GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=64, vocab_size=100)


@pytest.fixture
def folder(tmp_path):
    new_model(SMALL, seed=0).save_pretrained(tmp_path/"model")
    return tmp_path/"model"


def change_config(folder, **changes):
    "Write another config.json into `folder`."
    config = json.loads((folder/"config.json").read_text())
    (folder/"config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_an_incomplete_folder_names_what_is_missing(folder, missing):
    (folder/missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no complete model: {missing}.* is missing"): load_model(folder)


def test_a_model_without_a_tokenizer(folder):
    with pytest.raises(FileNotFoundError, match="holds no complete tokenizer: tokenizer.json or vocab.json is missing"):
        load_tokenizer(folder)


def test_pickled_weights_are_refused(folder):
    (folder/"model.safetensors").rename(folder/"pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin, a pickle, which can run any code"): load_model(folder)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_damaged_file_gets_one_line(folder, file):
    (folder/file).write_bytes((folder/file).read_bytes()[:50])
    with pytest.raises(ValueError, match=f"^{folder} is damaged: .*$") as e: load_model(folder)
    assert "\n" not in str(e.value)


def test_a_damaged_tokenizer_gets_one_line(tmp_path):
    (tmp_path/"tokenizer.json").write_text("{")
    with pytest.raises(ValueError) as e: load_tokenizer(tmp_path)
    assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)


def test_weights_of_another_shape_get_one_line(folder):
    change_config(folder, n_embd=64)
    with pytest.raises(ValueError) as e: load_model(folder)
    assert str(folder) in str(e.value) and "\n" not in str(e.value)


def test_a_missing_layer_is_not_made_up(folder):
    change_config(folder, n_layer=3)
    with pytest.raises(ValueError, match=r"lacks 12 of its weights, such as transformer.h.2"): load_model(folder)


def test_an_index_of_several_weight_files(folder, tmp_path):
    model = load_model(folder)
    model.save_pretrained(tmp_path/"parts", max_shard_size="50KB")
    assert not (tmp_path/"parts"/"model.safetensors").exists()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), load_model(tmp_path/"parts").parameters()))


def test_one_of_several_weight_files_is_missing(folder, tmp_path):
    load_model(folder).save_pretrained(tmp_path/"parts", max_shard_size="50KB")
    next((tmp_path/"parts").glob("*-of-*.safetensors")).unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=str(tmp_path/"parts")) as e: load_model(tmp_path/"parts")
    assert "\n" not in str(e.value)


SMALL_BLOCKS = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=100)


def test_another_causal_model(tmp_path):
    new_model(GPTNeoXConfig(max_position_embeddings=48, **SMALL_BLOCKS), seed=0).save_pretrained(tmp_path/"neox")
    assert model_context(load_model(tmp_path/"neox")) == 48


def test_models_that_are_not_causal_are_refused(tmp_path):
    with pytest.raises(ValueError, match="T5Config cannot be loaded as a causal language model") as e:
        load_model("tiny", from_scratch=True, config=T5Config())
    assert "\n" not in str(e.value)
    AutoModelForCausalLM.from_config(BertConfig(**SMALL_BLOCKS)).save_pretrained(tmp_path/"bert")
    with pytest.raises(ValueError, match="bert cannot be loaded as a causal language model: it is of type bert"):
        load_model(tmp_path/"bert")


def test_a_model_that_sets_no_limit_to_its_context(tmp_path):
    config = BloomConfig(vocab_size=MODELS["tiny"].vocabulary, hidden_size=32, n_layer=2, n_head=2)
    new_model(config, seed=0).save_pretrained(tmp_path/"bloom")
    load_tokenizer("tiny").save_pretrained(tmp_path/"bloom")
    model = load_model(tmp_path/"bloom")
    assert model_context(model) == 2048
    assert plan_run(model, TextSize(10_000, 2048, ""), check_runtime(tmp_path)).parameters == model.num_parameters()
    ids = torch.randint(MODELS["tiny"].vocabulary, (1, 64))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(2):
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[1] < losses[0]
    sample, = generate(tmp_path/"bloom", " = Toronto Raptors = \n", max_new_tokens=20, seed=0, device="cpu")
    assert sample.tokens == 20 or sample.stopped == "end"


def test_new_weights_follow_the_seed_and_nothing_else():
    torch.manual_seed(0)
    one = load_model("anything/goes", from_scratch=True, config=SMALL, seed=5)
    torch.manual_seed(1)
    two = load_model("tiny", from_scratch=True, config=SMALL, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    assert {p.dtype for p in one.parameters()} == {torch.float32} and not one.training


@pytest.mark.parametrize("kind", [str, lambda folder: folder], ids=["str", "Path"])
def test_a_config_may_be_a_folder(folder, kind):
    assert load_model("gpt2", from_scratch=True, config=kind(folder), seed=0).config.n_embd == 32


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_unknown_names(load, tmp_path):
    with pytest.raises(ValueError, match="Unknown model 'distilgpt'. Did you mean 'distilgpt2'"): load("distilgpt")
    with pytest.raises(FileNotFoundError, match="There is no folder .*/output"): load(tmp_path/"output")
    (tmp_path/"file").touch()
    with pytest.raises(NotADirectoryError, match="is a file; a model is a folder"): load(tmp_path/"file")


def test_nothing_is_printed(folder, capfd):
    load_model(folder)
    load_model("tiny")
    load_tokenizer("tiny")
    assert capfd.readouterr() == ("", "")


def test_the_real_tokenizer_fits_gpt2_and_not_tiny(shared):
    tokenizer = load_tokenizer(shared/"data"/"gpt2-tokenizer")
    assert tokenizer("Hello world")["input_ids"] == [15496, 995] and len(tokenizer) == MODELS["gpt2"].vocabulary
    check_match(new_model(GPT2Config(n_layer=1, n_embd=8, n_head=1)), tokenizer)
    with pytest.raises(ValueError, match="tokenizer has 50257 entries and model has 8192") as e:
        check_match(load_model("tiny"), tokenizer)
    assert fields_of(e.value) == ("tokenizer", "model")


def test_tiny_is_loaded_from_the_package_as_by_transformers():
    assert load_tokenizer("tiny").get_vocab() == AutoTokenizer.from_pretrained(TINY).get_vocab()
    ids = torch.tensor([load_tokenizer("tiny")(" = Toronto Raptors = \n \n The")["input_ids"]])
    with torch.no_grad(): assert torch.isfinite(load_model("tiny")(ids).logits).all()
