"Models from complete and incomplete folders, with new weights, and with the wrong tokenizer."
import json, math, os, shutil, warnings
from dataclasses import replace

import pytest, torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers import BertConfig, BloomConfig, GPT2Config, GPTJConfig, GPTNeoXConfig, LlamaConfig, PhiConfig
from transformers import T5Config

from colab_gpt2.config import FinetuneConfig
from colab_gpt2.engine.checkpoints import save_model
from colab_gpt2.errors import fields_of
from colab_gpt2.generation import generate
from colab_gpt2.model.fitting import add_rows, check_match, end_ids, save_tokenizer, set_ids
from colab_gpt2.model.loading import MODELS, TINY, load_config, load_model, load_tokenizer, model_context, new_model
from colab_gpt2.panels.forecast import Forecaster
from colab_gpt2.planning.plan import TextSize, plan_run
from colab_gpt2.preparing import prepare, starting_model
from colab_gpt2.runtime import check_runtime
from colab_gpt2.storage.archives import check_model
from colab_gpt2.tasks import plan
from colab_gpt2.training import check_run, finetune

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
    with pytest.raises(ValueError, match=f"^{folder/file} is damaged: .*$") as e: load_model(folder)
    assert "\n" not in str(e.value)


def test_weights_with_a_nan_are_named_before_anything_is_done_with_them(folder):
    weights = load_file(folder/"model.safetensors")
    weights["transformer.ln_f.bias"][0] = math.nan
    save_file(weights, folder/"model.safetensors", dict(format="pt"))
    with pytest.raises(ValueError, match=f"^{folder} is damaged: transformer.ln_f.bias is NaN"): load_model(folder)


def test_a_folder_with_a_model_in_it_says_where(folder):
    with pytest.raises(FileNotFoundError, match=f"Did you mean {folder}[?]$"): load_model(folder.parent)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_pointer_of_git_lfs_is_told_from_a_damaged_file(folder, file):
    (folder/file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(ValueError, match=f"^{folder/file} is damaged: Git LFS's pointer; run"): load_model(folder)


def test_a_damaged_tokenizer_gets_one_line(tmp_path):
    for text, told in {"{": "tokenizer.json is damaged: ", "{}": ": KeyError "}.items():
        (tmp_path/"tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match=told) as e: load_tokenizer(tmp_path)
        assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)


def test_weights_of_another_shape_get_one_line(folder):
    change_config(folder, n_positions=48)
    told = r"has not the shapes of its config: transformer.wpe.weight is \(64, 32\), not \(48, 32\)\.$"
    with pytest.raises(ValueError, match=f"^{folder} {told}"): load_model(folder)


@pytest.mark.parametrize("change, told", [
    (dict(n_layer=-1), "has num_hidden_layers -1; it must be"), (dict(n_layer=0), "layers 0; it"),
    (dict(n_layer="6"), "'n_layer' expected int, got str"),
    (dict(activation_function="glu"), "KeyError 'glu'")], ids=lambda x: str(x)[:22])
def test_a_config_that_makes_no_model_says_why_in_one_line(folder, change, told):
    change_config(folder, **change)
    with pytest.raises(ValueError, match=told) as e: load_model(folder)
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
    told = "Unknown (model|tokenizer) 'DistilGPT', .* Did you mean 'distilgpt2'"
    with pytest.raises(ValueError, match=told): load("DistilGPT")
    with pytest.raises(FileNotFoundError, match="There is no folder .*/output"): load(tmp_path/"output")
    for name in "output/", "my folder/model", "a//b":
        with pytest.raises(FileNotFoundError, match=f"There is no folder {name}"): load(name)
    for name, how in ("a.tar.gz", "colab-gpt2 restore --name"), ("A.TGZ", "restore --name"), ("a.zip", "unzip"):
        with pytest.raises(ValueError, match=f"an archive. Restore it first: .*{how} .*{name}, then give its"):
            load(tmp_path/name)
    with pytest.raises(ValueError, match="restore --name 'a b.tgz', then"): load("a b.tgz")
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
    assert fields_of(e.value) == ("tokenizer", "model", "from_scratch")


def test_tiny_is_loaded_from_the_package_as_by_transformers():
    assert load_tokenizer("tiny").get_vocab() == AutoTokenizer.from_pretrained(TINY).get_vocab()
    ids = torch.tensor([load_tokenizer("tiny")(" = Toronto Raptors = \n \n The")["input_ids"]])
    with torch.no_grad(): assert torch.isfinite(load_model("tiny")(ids).logits).all()


# ---- where a text ends

def tagged(*tags, **tokens):
    "The tokenizer of `tiny` with special `tags`, and tokens such as a pad_token."
    tokenizer = load_tokenizer("tiny")
    tokenizer.add_special_tokens({**tokens, **({"additional_special_tokens": list(tags)} if tags else {})})
    return tokenizer


def bert_tokenizer():
    "Characters in BERT's manner, with [CLS] and [SEP] and no eos, as Chinese GPT-2s have them."
    from tokenizers import Tokenizer, models, pre_tokenizers
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh"]
    backend = Tokenizer(models.WordPiece({c: i for i, c in enumerate(entries)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", sep_token="[SEP]", cls_token="[CLS]",
                                   pad_token="[PAD]")


def small_model(rows=8192, **fields):
    return new_model(GPT2Config(n_layer=1, n_embd=8, n_head=1, n_positions=64, vocab_size=rows, **fields), seed=0)


@pytest.mark.parametrize("tokenizer, ids, ends", [
    (tagged, 8191, {0}),  # an ordinary token, here the piece "lie"
    (tagged, [0, 8191], {0}),
    (tagged, 50256, {0}),  # GPT-2's own config with another tokenizer
    (tagged, None, {0}),
    (lambda: tagged("<|im_end|>"), [8192, 0], {0, 8192}),  # several, as Qwen's
    (lambda: tagged(eos_token="<|im_end|>"), 0, {8192, 0}),  # config.json of the base model
    (bert_tokenizer, 3, {3}), (bert_tokenizer, 50256, {3}), (bert_tokenizer, 7, {3})])
def test_the_tokenizer_says_what_ends_a_text(tokenizer, ids, ends):
    tokenizer = tokenizer()
    model = small_model(len(tokenizer), eos_token_id=None)
    model.generation_config.eos_token_id = ids
    assert end_ids(model, tokenizer) == ends


def test_a_model_of_another_library_has_no_ids():
    assert end_ids(torch.nn.Linear(2, 2), load_tokenizer("tiny")) == {0}


@pytest.mark.parametrize("config, generation", [(8191, 8191), ([0, 8191], [0, 8191]), (50256, 50256)])
def test_a_model_is_saved_with_the_ids_of_its_tokenizer(config, generation, tmp_path):
    model = small_model(bos_token_id=8191, eos_token_id=config, pad_token_id=8190)
    model.generation_config.eos_token_id = generation
    set_ids(model, load_tokenizer("tiny"))
    model.save_pretrained(tmp_path/"saved")
    for name in ("config.json", "generation_config.json"):
        saved = json.loads((tmp_path/"saved"/name).read_text())
        assert (saved["bos_token_id"], saved["eos_token_id"], saved.get("pad_token_id")) == (0, 0, None), name


def test_several_ends_are_kept_where_they_are_special_tokens(tmp_path):
    tokenizer = tagged(eos_token="<|im_end|>")
    model = small_model(len(tokenizer), eos_token_id=0)
    set_ids(model, tokenizer)
    model.save_pretrained(tmp_path/"saved")
    assert json.loads((tmp_path/"saved"/"generation_config.json").read_text())["eos_token_id"] == [8192, 0]


def test_an_end_that_is_a_word_in_a_file_is_passed_over(tmp_path):
    small_model(eos_token_id=0).save_pretrained(tmp_path)
    load_tokenizer("tiny").save_pretrained(tmp_path)
    path = tmp_path/"generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(eos_token_id="<|endoftext|>")))
    assert generate(str(tmp_path), "a", max_new_tokens=1, seed=0, device="cpu")[0].tokens == 1


def test_an_id_beyond_the_embedding_is_not_saved():
    model = small_model()  # of 8192 rows
    set_ids(model, tagged(pad_token="[PAD]"))  # 8192
    assert (model.config.pad_token_id, model.generation_config.pad_token_id) == (None, None)


def test_an_end_that_is_an_ordinary_token_is_named_when_a_model_is_read(tmp_path):
    small_model(eos_token_id=8191).save_pretrained(tmp_path)
    load_tokenizer("tiny").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="model ends a text with token 8191, which is 'lie' to its tokenizer") as told:
        generate(str(tmp_path), "a", max_new_tokens=1, seed=0, device="cpu")
    assert len(told) == 1


@pytest.mark.parametrize("name", ["tiny", "padded"])
def test_a_model_whose_ids_fit_gets_no_note(name, recwarn):
    model = load_model("tiny") if name == "tiny" else small_model(8448, eos_token_id=50256)
    check_match(model, load_tokenizer("tiny"))
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]


# ---- more tokens than rows

def test_an_added_token_without_a_row_is_no_reason_to_refuse():
    check_match(load_model("tiny"), tagged(pad_token="[PAD]"))
    check_match(load_model("tiny"), tagged("<A>", "<B>", "<C>"))
    check_match(small_model(8191), load_tokenizer("tiny"))  # german-gpt2: 52,000 rows, ids up to 52,000


TIED = dict(n_layer=1, n_embd=8, n_head=1, n_positions=32)
GATED = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)


@pytest.mark.parametrize("config", [
    GPT2Config(vocab_size=100, **TIED), GPT2Config(vocab_size=100, tie_word_embeddings=False, **TIED),
    LlamaConfig(vocab_size=100, pad_token_id=99, **GATED),
    GPTJConfig(vocab_size=100, rotary_dim=4, tie_word_embeddings=False, **TIED)],  # its output layer has a bias
    ids=["tied", "untied", "padding", "bias"])
def test_rows_for_new_tokens_are_the_mean_of_the_old(config):
    model = new_model(config, seed=0)
    with torch.no_grad():
        if getattr(model.lm_head, "bias", None) is not None: model.lm_head.bias.normal_()
    before = [(p.detach().clone(), p.mean(0)) for p in both(model)]
    add_rows(model, 103)
    for weight, (old, mean) in zip(both(model), before, strict=True):
        assert torch.equal(weight[:100], old) and torch.allclose(weight[100:], mean.expand_as(weight[100:]))
    assert model.config.vocab_size == 103 and model(input_ids=torch.tensor([[102]])).logits.shape == (1, 1, 103)


def both(model):
    "The weights with a row for each token, and a bias."
    parts = model.get_input_embeddings().weight, model.lm_head.weight, getattr(model.lm_head, "bias", None)
    return [p for p in parts if p is not None]


def test_rows_that_pad_an_embedding_serve_new_tokens():
    model = small_model(8448)
    add_rows(model, 8195)
    assert model.config.vocab_size == 8448


# ---- files that may be loaded

def shards(folder, tmp_path):
    "A model in several files."
    load_model(folder).save_pretrained(tmp_path/"parts", max_shard_size="50KB")
    return tmp_path/"parts"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../model/model.safetensors", "/etc/passwd", "a/b.safetensors",
                                  "..\\x.safetensors", ".safetensors/../x.bin", 7, None, ["a.safetensors"]])
@pytest.mark.parametrize("read", [load_model, check_model])
def test_an_index_may_name_only_safetensors_of_its_own_folder(folder, tmp_path, name, read, monkeypatch):
    parts = shards(folder, tmp_path)
    index = parts/"model.safetensors.index.json"
    told = json.loads(index.read_text())
    torch.save({}, parts/"pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    told["weight_map"][next(iter(told["weight_map"]))] = name
    index.write_text(json.dumps(told))
    with pytest.raises(ValueError, match="but weights are safetensors files in its own folder") as e: read(parts)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}, "metadata": {}}',
                                  '{"weight_map": {"a": "a.safetensors"}, "metadata": []}'])
@pytest.mark.parametrize("read", [load_model, check_model])
def test_a_damaged_index_is_named(folder, tmp_path, text, read):
    parts = shards(folder, tmp_path)
    (parts/"model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="index.json is damaged: it needs a weight_map and metadata") as e: read(parts)
    assert "\n" not in str(e.value)


def test_a_link_to_a_pickle_is_not_read_as_one(folder, tmp_path, monkeypatch):
    torch.save({}, tmp_path/"outside.bin")
    (folder/"model.safetensors").unlink()
    (folder/"model.safetensors").symlink_to(tmp_path/"outside.bin")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    with pytest.raises(ValueError, match="is damaged"): load_model(folder)


def test_weights_elsewhere_are_not_loaded_by_a_name_in_the_config(folder, tmp_path):
    small_model(100).save_pretrained(tmp_path/"other")
    (tmp_path/"other"/"model.safetensors").rename(folder/"other.safetensors")
    change_config(folder, transformers_weights="other.safetensors")
    assert load_model(folder).num_parameters() == new_model(SMALL, seed=0).num_parameters()


def test_adapters_beside_a_model_are_not_put_into_it(folder):
    adapters = folder/"adapter_config.json"
    adapters.write_text(json.dumps(dict(base_model_name_or_path="some/one", peft_type="LORA")))
    with pytest.raises(ValueError, match="holds adapters .adapter_config.json.. Merge them"): load_model(folder)


@pytest.mark.parametrize("fields", [
    dict(_attn_implementation="evil/kernel"), dict(attn_implementation="evil/kernel"),
    dict(_attn_implementation="flash_attention_2"), dict(_experts_implementation="evil/kernel"),
    dict(return_dict=False), dict(output_attentions=True), dict(output_hidden_states=True), dict(use_cache=False),
    dict(auto_map={"AutoModelForCausalLM": "evil/code--model.Model", "AutoConfig": "evil/code--model.Config"}),
    dict(custom_generate="evil/code", use_kernels=True, kernel_config="evil/kernel")], ids=str)
def test_no_code_and_no_shape_of_output_comes_from_a_config(folder, fields, monkeypatch):
    from transformers import dynamic_module_utils, modeling_utils
    for module, name in ((dynamic_module_utils, "get_class_from_dynamic_module"),
                         (modeling_utils, "lazy_import_flash_attention")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("code was asked for"))
    change_config(folder, **fields)
    for model in (load_model(folder), load_model(folder, from_scratch=True)):
        assert model.config._attn_implementation in ("sdpa", "eager")
        assert model(input_ids=torch.tensor([[1, 2]])).logits.shape == (1, 2, 100)


def test_a_quantized_model_is_refused(folder):
    change_config(folder, quantization_config=dict(quant_method="gptq", bits=4))
    with pytest.raises(ValueError, match="is quantized, and is not loaded here"): load_model(folder)


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn], ids=str)
def test_weights_that_are_no_floats_are_refused_though_no_config_says_so(folder, kind):
    weights = load_file(folder/"model.safetensors")
    changed = {name: w.to(kind) if ".mlp." in name and w.ndim == 2 else w for name, w in weights.items()}
    save_file(changed | {"transformer.h.0.attn.bias": torch.ones(4, 4, dtype=torch.bool)}, folder/"model.safetensors")
    told = rf"{folder}/model.safetensors is quantized .transformer.h.0.mlp.c_fc.weight is ([IU]8|BOOL|F8_E4M3)\)"
    with pytest.raises(ValueError, match=told): load_model(folder)
    mask = weights | {"transformer.h.0.attn.bias": torch.ones(4, 4, dtype=torch.uint8)}  # as old files of GPT-2 have
    save_file(mask, folder/"model.safetensors", metadata=dict(format="pt"))
    load_model(folder)


@pytest.mark.parametrize("fields", [dict(n_layer=1_000_000), dict(n_layer=5000), dict(n_embd=10**6, n_head=1),
                                    dict(vocab_size=10**12), dict(n_positions=10**12)], ids=str)
@pytest.mark.parametrize("from_scratch", [False, True])
def test_a_config_of_absurd_size_is_one_line_at_once(folder, fields, from_scratch, monkeypatch):
    change_config(folder, **fields)
    monkeypatch.setattr(GPT2LMHeadModel, "__init__", lambda *_, **__: pytest.fail("a layer was made"))
    with pytest.raises(ValueError, match="asks for .* of weights .*. Choose a smaller one") as e:
        load_model(folder, from_scratch=from_scratch)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("by_far", [10**7, 10**10], ids=["more than the files hold", "more than the memory"])
def test_a_config_that_asks_for_more_than_there_is_is_refused_unbuilt(folder, kind, by_far, monkeypatch):
    "By numbers, too, that no formula of a model's size knows."
    if kind == "llama":
        shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=100)
        new_model(LlamaConfig(**shape), seed=0).save_pretrained(folder)
    change_config(folder, **{dict(gpt2="n_inner", llama="intermediate_size")[kind]: by_far})
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were made"))
    with pytest.raises(ValueError, match="asks for .*B of weights .*: take their own config.json.$"):
        load_model(folder)


def test_new_weights_that_the_memory_does_not_hold_are_not_allocated(monkeypatch):
    monkeypatch.setattr("colab_gpt2.model.loading.memory", lambda: (10**6, 10**6))
    with pytest.raises(ValueError, match="asks for .* of weights"): small_model(60_000)


# ---- names

def test_a_folder_called_as_a_known_model_is_the_folder(folder, tmp_path, monkeypatch):
    for name in ("gpt2", "tiny"): shutil.copytree(folder, tmp_path/name)
    load_tokenizer("tiny").save_pretrained(tmp_path/"tiny")
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "tiny"):
        with pytest.warns(UserWarning, match=f"{name} is a known model and also a folder here: the model in"):
            assert load_model(name).config.n_embd == 32
        with pytest.warns(UserWarning): assert load_config(name).n_embd == 32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_tokenizer("tiny")  # told once, for its model


def test_a_folder_without_a_model_does_not_hide_a_known_one(tmp_path, monkeypatch):
    (tmp_path/"tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="tiny .* it holds no model, and is not used"):
        assert load_model("tiny").config.n_embd == 256
    with pytest.raises(FileNotFoundError): load_model("./tiny")


# ---- tokenizers

@pytest.mark.parametrize("make, kind", [
    (tagged, "GPT2Tokenizer"), (lambda: tagged("<A>", "<B>"), "GPT2Tokenizer"),
    (lambda: small_tokenizer("</s>"), "PreTrainedTokenizerFast"), (bert_tokenizer, "PreTrainedTokenizerFast")])
def test_a_saved_tokenizer_is_one_that_transformers_4_knows(make, kind, tmp_path):
    tokenizer = make()
    save_tokenizer(tokenizer, tmp_path/"one")
    save_tokenizer(load_tokenizer(tmp_path/"one"), tmp_path/"two")
    told = json.loads((tmp_path/"two"/"tokenizer_config.json").read_text())
    assert told["tokenizer_class"] == kind
    assert not {"is_local", "local_files_only", "extra_special_tokens"} & told.keys()
    again = load_tokenizer(tmp_path/"two")
    assert again.get_vocab() == tokenizer.get_vocab() and again.all_special_ids == tokenizer.all_special_ids
    text = "bad <A>egg</s> and<|endoftext|> [SEP]\n\n a"
    assert again(text).input_ids == tokenizer(text).input_ids


def test_a_saved_gpt2_has_the_files_of_older_tools(tmp_path):
    save_tokenizer(load_tokenizer("tiny"), tmp_path)
    entries, merges = json.loads((tmp_path/"vocab.json").read_text()), (tmp_path/"merges.txt").read_text().splitlines()
    assert entries["<|endoftext|>"] == 0 and len(entries) == 8192 and merges[0].startswith("#version")


def test_a_saved_gpt2_has_the_names_by_which_mlx_and_llama_cpp_know_it(tmp_path):
    tokenizer = load_tokenizer("tiny")
    model = starting_model(FinetuneConfig(model="tiny"), tokenizer)
    save_model(model, tokenizer, tmp_path)
    weights, config = load_file(tmp_path/"model.safetensors"), json.loads((tmp_path/"config.json").read_text())
    assert {"wte.weight", "h.0.attn.c_attn.weight", "ln_f.bias"} < {*weights} and "transformer" not in str([*weights])
    assert (config["n_ctx"], config["architectures"]) == (512, ["GPT2LMHeadModel"])
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
    assert again.lm_head.weight is again.transformer.wte.weight


def test_the_packaged_tokenizer_is_one_that_transformers_4_knows():
    assert json.loads((TINY/"tokenizer_config.json").read_text())["tokenizer_class"] == "GPT2Tokenizer"


@pytest.mark.parametrize("name", ["spiece.model", "tokenizer.model", "sentencepiece.bpe.model"])
def test_a_sentencepiece_tokenizer_says_what_it_needs(folder, name, monkeypatch):
    monkeypatch.setattr("colab_gpt2.model.loading.is_sentencepiece_available", lambda: False)
    (folder/name).write_text("x")
    with pytest.raises(ValueError, match=f"its tokenizer as {name}; to read it, `pip install sentencepiece protobuf`"):
        load_tokenizer(folder)
    load_tokenizer("tiny").save_pretrained(folder)  # a tokenizer.json needs nothing
    assert len(load_tokenizer(folder)) == 8192


def test_a_vocabulary_that_its_class_cannot_read_is_no_empty_tokenizer(folder):
    (folder/"vocab.txt").write_text("[PAD]\n[UNK]\na\n")  # BERT's, where nothing says so: read as a GPT-2's
    with pytest.raises(ValueError, match="GPT2Tokenizer that is slow or empty; one with a tokenizer.json"):
        load_tokenizer(folder)


# ---- a run with a tokenizer of one's own

def small_tokenizer(end="<|endoftext|>"):
    "Entries for bytes and a few words, of which the first ends a text."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    bpe, signs = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = dict(special_tokens=[end], initial_alphabet=signs, show_progress=False)
    bpe.train_from_iterator(["the tide came in and went out\n"] * 9, trainers.BpeTrainer(vocab_size=300, **special))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=end, eos_token=end)


@pytest.fixture
def quick(tmp_path):
    "The settings of a run of one step on own texts."
    for name in ("t", "e"): (tmp_path/f"{name}.txt").write_text("<A> The tide came in. <B> It went out again.\n\n" * 40)
    files = dict(train_file=str(tmp_path/"t.txt"), eval_file=str(tmp_path/"e.txt"), cache_dir=str(tmp_path/"c"))
    return FinetuneConfig(model="tiny", block_size=32, max_steps=1, max_new_tokens=2, save_steps=-1, prompt="<A> The",
                          output_dir=str(tmp_path/"out"), tokenizer=str(tmp_path/"own"), **files)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_tags_of_a_chosen_tokenizer_get_rows_and_are_saved(quick, method):
    tagged("<A>", "<B>", "<C>").save_pretrained(quick.tokenizer)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = finetune(replace(quick, method=method), progress=False)
    assert any("trains no embeddings" in str(w.message) for w in told) is (method == "lora")
    model, tokenizer = load_model(result.output_dir), load_tokenizer(result.output_dir)
    assert model.config.vocab_size == len(tokenizer) == 8195 and tokenizer.convert_tokens_to_ids("<C>") == 8194
    assert math.isfinite(result.perplexity_before.value) and math.isfinite(result.perplexity_after.value)
    assert tokenizer("<B>").input_ids == [8193] and model.config.eos_token_id == 0


def test_new_weights_follow_a_chosen_tokenizer_in_a_run_and_in_its_plan(quick):
    small_tokenizer().save_pretrained(quick.tokenizer)
    config = replace(quick, from_scratch=True)
    with pytest.warns(UserWarning, match="The new model has 279 embeddings, as its tokenizer has entries, not 8192"):
        planned = plan(config, progress=False)
    with pytest.warns(UserWarning, match="The new model has 279 embeddings"): shown = Forecaster().plan(config)
    assert (shown.parameters, shown.tokens, shown.steps) == (planned.parameters, planned.tokens, planned.steps)
    result = finetune(config, progress=False)
    model = load_model(result.output_dir)
    assert model.config.vocab_size == 279 and model.config.eos_token_id == 0
    assert planned.parameters == result.parameters == model.num_parameters()


def test_ids_of_another_tokenizer_mean_nothing_to_new_weights(quick):
    "The 0 that ends a text of tiny's is [PAD] here."
    bert_tokenizer().save_pretrained(quick.tokenizer)
    model = starting_model(replace(quick, from_scratch=True), load_tokenizer(quick.tokenizer))
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, 3, 0)


def test_a_pipe_in_the_place_of_weights_is_not_waited_for(tmp_path):
    small_model().save_pretrained(tmp_path)
    (tmp_path/"model.safetensors").unlink()
    os.mkfifo(tmp_path/"model.safetensors")
    with pytest.raises(FileNotFoundError, match="model.safetensors.index.json is missing"): load_model(tmp_path)


def test_a_plan_refuses_what_its_run_would(quick):
    small_tokenizer().save_pretrained(quick.tokenizer)
    for act in (plan, finetune):
        with pytest.raises(ValueError, match="tokenizer has 279 entries and model has 8192"): act(quick, progress=False)


def test_evaluation_adds_no_rows_that_nobody_trained(quick):
    tagged("<A>", "<B>").save_pretrained(quick.tokenizer)
    prepared = prepare(replace(quick, train_file=None, eval_file=quick.train_file), train=False, held_out=False)
    assert prepared.model.config.vocab_size == 8192


def test_an_output_folder_called_as_a_known_model_is_told(quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "./gpt2"):
        with pytest.warns(UserWarning, match="output_dir has the name of a known model: here model="):
            check_run(replace(quick, output_dir=name))


# ---- every kind of causal model

ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=5e5,
            original_max_position_embeddings=64)
TURNED = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8192)


@pytest.mark.parametrize("config, older", [
    (LlamaConfig(num_key_value_heads=1, rope_parameters=ROPE, **TURNED), dict(rope_theta=5e5, rope_scaling=ROPE)),
    (GPTNeoXConfig(rope_parameters=dict(rope_type="default", rope_theta=77.0, partial_rotary_factor=0.5), **TURNED),
     dict(rotary_emb_base=77.0, rotary_pct=0.5)),
    (PhiConfig(rope_parameters=dict(rope_type="default", rope_theta=77.0, partial_rotary_factor=0.5), **TURNED),
     dict(rope_theta=77.0, partial_rotary_factor=0.5))], ids=["llama", "neox", "phi"])
def test_rotary_angles_are_saved_in_the_words_of_transformers_4_too(config, older, tmp_path):
    model = new_model(config, seed=0)
    model.save_pretrained(tmp_path/"start")
    load_tokenizer("tiny").save_pretrained(tmp_path/"start")
    kept = starting_model(FinetuneConfig(model=str(tmp_path/"start")), load_tokenizer("tiny"))
    kept.save_pretrained(tmp_path/"saved")
    assert older.items() <= json.loads((tmp_path/"saved"/"config.json").read_text()).items()
    ids = torch.arange(30)[None]
    again = load_model(tmp_path/"saved")
    assert again.config.rope_parameters == config.rope_parameters
    assert torch.equal(again(input_ids=ids).logits, load_model(tmp_path/"start")(input_ids=ids).logits)


def of_type(kind, **fields):
    "A small model of a type, in training mode."
    return new_model(AutoConfig.for_model(kind, vocab_size=99, **fields), seed=0)


NARROW = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
DECODER = dict(d_model=8, decoder_layers=1, decoder_attention_heads=1, decoder_ffn_dim=8)
WHISPER = dict(pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=0)


@pytest.mark.parametrize("kind, fields, why", [
    ("bert-generation", NARROW, "sees the tokens to come"),
    ("cpmant", dict(hidden_size=32, num_attention_heads=2, dim_head=16, dim_ff=8, num_hidden_layers=2), "sees the"),
    ("xlnet", dict(d_model=8, n_layer=1, n_head=1, d_inner=8), "it is of type xlnet"),
    ("reformer", dict(is_decoder=True, hidden_size=8, axial_pos_embds=False, attn_layers=["local"]), "type reformer"),
    ("trocr", DECODER, "another loss than that of the next token"),
    ("whisper", dict(**DECODER, **WHISPER), "another loss than that of the next token")], ids=lambda x: str(x)[:15])
def test_a_model_that_does_not_learn_the_next_token_is_refused_when_it_is_loaded(kind, fields, why, tmp_path):
    of_type(kind, **fields).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"as a causal language model: .*{why}") as e: load_model(tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("kind, fields", [
    ("llama", dict(NARROW, num_key_value_heads=1)), ("openai-gpt", dict(n_embd=8, n_layer=1, n_head=1)),
    ("gemma3_text", dict(NARROW, num_key_value_heads=1, head_dim=8)),
    ("rwkv", dict(hidden_size=8, num_hidden_layers=2)),
    ("mamba", dict(hidden_size=8, num_hidden_layers=1, state_size=4)), ("bert", dict(NARROW, is_decoder=True)),
    ("mixtral", dict(NARROW, num_key_value_heads=1, num_local_experts=2, output_router_logits=True)),
    ("bloom", dict(hidden_size=8, n_layer=1, n_head=1)), ("opt", dict(NARROW, ffn_dim=8, word_embed_proj_dim=8))],
    ids=lambda x: x if isinstance(x, str) else "")
def test_other_causal_models_are_loaded_and_learn_the_next_token(kind, fields, tmp_path):
    of_type(kind, **fields).save_pretrained(tmp_path)
    model, ids = load_model(tmp_path).train(), torch.arange(5, 37).repeat(2, 1)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(3):
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0]


def test_the_first_positions_of_a_roberta_are_not_counted():
    model = of_type("roberta", **NARROW, is_decoder=True, max_position_embeddings=34).eval()
    assert model_context(model) == 32 and model(input_ids=torch.ones(1, 32, dtype=torch.long) * 5).logits.shape[1] == 32
