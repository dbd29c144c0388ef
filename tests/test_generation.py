"Generation against transformers' own, and at its edges: half characters, stop strings, full contexts, bad input."
import inspect, random, warnings

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from colab_gpt2 import generation
from colab_gpt2.errors import fields_of
from colab_gpt2.evaluation import evaluation_mode
from colab_gpt2.generation import Request, TextPieces, encode_prompt, generate, stream
from colab_gpt2.model.loading import load_model, load_tokenizer

PROMPT = " = Toronto Raptors = \n"


@pytest.fixture(scope="module")
def tokenizer(): return load_tokenizer("tiny")


@pytest.fixture(scope="module")
def tiny(): return load_model("tiny").eval()


@pytest.fixture(scope="module")
def small():
    "Random weights, the vocabulary of tiny, a context of 32: its texts are full of half characters."
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_embd=32, n_head=2, n_positions=32, vocab_size=8192)
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def theirs(model, tokenizer, prompt, new, **options):
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    greedy = dict(do_sample=False, max_new_tokens=new, pad_token_id=0, attention_mask=torch.ones_like(ids))
    new_ids = model.generate(ids, **greedy, **options)[0, ids.shape[1]:]
    return tokenizer.decode(new_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("prompt", [PROMPT, " = Toronto Raptors = ", "The  city\n\n was", "日本"])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_is_that_of_transformers(tiny, tokenizer, prompt, penalty):
    sample, = generate(tiny, prompt, tokenizer=tokenizer, top_k=1, repetition_penalty=penalty, max_new_tokens=25)
    assert sample.text == theirs(tiny, tokenizer, prompt, 25, repetition_penalty=penalty)
    assert str(sample) == prompt + sample.text


def test_another_architecture(tokenizer):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=8192)
    llama = LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=0)).eval()
    sample, = generate(llama, PROMPT, tokenizer=tokenizer, top_k=1, max_new_tokens=20)
    assert sample.text == theirs(llama, tokenizer, PROMPT, 20)


def test_model_that_does_not_know_logits_to_keep(small, tokenizer):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.config = small, small.config
        def get_input_embeddings(self): return self.inner.get_input_embeddings()
        def forward(self, input_ids, past_key_values=None, use_cache=None):
            return self.inner(input_ids, past_key_values=past_key_values, use_cache=use_cache)
    options = dict(tokenizer=tokenizer, max_new_tokens=10, seed=1)
    assert generate(Wrapped(), "a", **options) == generate(small, "a", **options)


def test_tokens_are_drawn_as_often_as_they_are_likely(small, tokenizer):
    ids = torch.tensor([tokenizer("The").input_ids])
    probabilities = (small.eval()(ids).logits[0, -1] / 0.02).topk(5).values.softmax(-1)  # cold, so that the five differ
    options = dict(tokenizer=tokenizer, max_new_tokens=1, temperature=0.02, top_k=5)
    drawn = [s.text for s in generate(small, "The", samples=4000, seed=0, **options)]
    shares = sorted((drawn.count(text) / 4000 for text in set(drawn)), reverse=True)
    assert shares == pytest.approx(sorted(probabilities.tolist(), reverse=True)[:len(shares)], abs=0.03)


def test_seed_gives_the_same_text_and_leaves_the_global_generator_alone(small, tokenizer):
    before = torch.get_rng_state()
    ask = lambda **options: generate(small, "The", tokenizer=tokenizer, max_new_tokens=12, samples=3, **options)
    first = ask(seed=5)
    assert first == ask(seed=5) != ask(seed=6)
    assert len({s.text for s in first}) == 3
    unseeded = ask()
    assert unseeded == ask(seed=unseeded[0].seed) != ask()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("seed", range(8))
def test_stream_is_generate_in_pieces(small, tokenizer, seed):
    options = dict(tokenizer=tokenizer, max_new_tokens=60, top_k=0, seed=seed)
    whole, = generate(small, "The", **options)
    pieces = list(stream(small, "The", **options))
    assert "".join(pieces) == whole.text and all(pieces) and len(pieces) > 30
    cut = random.Random(seed)
    stops = [whole.text[at:at + cut.randint(1, 9)] for at in cut.sample(range(len(whole.text) - 9), 2)]
    stopped, = generate(small, "The", stop=stops, **options)
    assert stopped.stopped == "stop" and stopped.tokens <= whole.tokens
    assert any(whole.text.startswith(stopped.text + s) for s in stops)
    assert not any(s in stopped.text for s in stops)
    assert "".join(stream(small, "The", stop=stops, **options)) == stopped.text


def test_stop_string_across_tokens(small, tokenizer):
    whole, = generate(small, "The", tokenizer=tokenizer, max_new_tokens=40, seed=2)
    stop = whole.text[20:32]
    assert len(tokenizer(stop).input_ids) > 1
    for given in (stop, [stop], ("never in it\0", stop)):
        stopped = generate(small, "The", tokenizer=tokenizer, max_new_tokens=40, seed=2, stop=given)[0]
        assert (stopped.text, stopped.stopped) == (whole.text[:whole.text.find(stop)], "stop")


def test_real_text_with_the_real_tokenizer_comes_back_whole(shared):
    gpt2 = load_tokenizer(str(shared/"data"/"gpt2-tokenizer"))
    text = (shared/"data"/"wikitext-2-raw"/"wiki.valid.raw").read_text(encoding="utf-8")[:20_000] + "日本語 🦖 naïve"
    pieces = TextPieces(gpt2, [])
    got = [pieces.push([i]) for i in gpt2(text, verbose=False).input_ids]
    assert "".join(got) + pieces.finish() == text
    assert not any("\ufffd" in piece for piece in got)


def test_end_of_text_ends_only_its_own_sample(small, tokenizer, monkeypatch):
    options = dict(tokenizer=tokenizer, max_new_tokens=30, samples=4, seed=3)
    whole = generate(small, "The", **options)
    with evaluation_mode(small): ids = torch.cat(list(Request(small, "The", **options).steps()), 1).tolist()
    monkeypatch.setattr(generation, "end_ids", lambda *which: {0, ids[0][10]})
    ended = generate(small, "The", **options)
    assert (ended[0].stopped, ended[0].tokens) == ("end", ids[0].index(ids[0][10]))
    assert whole[0].text.startswith(ended[0].text.rstrip("\ufffd")) and len(ended[0].text) < len(whole[0].text)
    assert any(s.stopped == "length" and s == w for s, w in zip(ended[1:], whole[1:]))


def test_250_tokens_though_the_context_is_32(small, tokenizer):
    samples = generate(small, "The", tokenizer=tokenizer, seed=1, samples=2)
    assert [(s.tokens, s.stopped) for s in samples] == [(250, "length")] * 2


def test_long_prompt_is_cut_from_the_left(small, tokenizer):
    long = "a b c d e f g " * 20 + "the end"
    options = dict(tokenizer=tokenizer, max_new_tokens=5, top_k=1)
    with pytest.warns(UserWarning, match="context is 32: only its last 31 are used") as caught:
        sample, = generate(small, long, **options)
    assert caught[0].filename == __file__  # the warning points at the caller
    kept = tokenizer.decode(tokenizer(long).input_ids[-31:])
    assert generate(small, kept, **options)[0].text == sample.text
    assert sample.prompt == long


def test_empty_prompt_starts_from_the_end_of_text_token(small, tokenizer):
    options = dict(tokenizer=tokenizer, max_new_tokens=5, top_k=1)
    with pytest.warns(UserWarning, match="prompt is empty"): sample, = generate(small, "", **options)
    assert sample.prompt == "" and sample.tokens == 5
    with pytest.warns(UserWarning, match="prompt is empty") as caught: pieces = stream(small, "", **options)
    assert "".join(pieces) == sample.text and caught[0].filename == __file__


def test_the_prompt_is_taken_as_typed(tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for prompt in (" = Toronto Raptors = ", "  two  spaces \n\n", " ", "\t"):
            ids = encode_prompt(prompt, tokenizer, 512)
            assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == prompt


@pytest.mark.parametrize("field, value, words", [
    ("temperature", 0, "temperature is 0; it must be > 0. To always take the most likely token, set top_k=1"),
    ("temperature", -1, "temperature is -1"), ("temperature", float("nan"), "temperature is nan"),
    ("temperature", float("inf"), "temperature is inf"),
    ("top_p", 0, "top_p is 0"), ("top_p", 2, "top_p is 2"), ("top_p", float("nan"), "top_p is nan"),
    ("top_k", -1, "top_k is -1"), ("top_k", 1.5, "top_k is 1.5"), ("repetition_penalty", 0, "repetition_penalty is 0"),
    ("samples", 0, "samples is 0"), ("samples", 10**9, "samples is 1000000000; it must be .* ≤ 1000000"),
    ("max_new_tokens", 0, "max_new_tokens is 0"), ("max_new_tokens", 10**12, "max_new_tokens is 1000000000000"),
    ("max_new_tokens", -5, "max_new_tokens is -5"), ("seed", -1, "seed is -1"), ("seed", "x", "seed is 'x'"),
    ("stop", "", "stop has ''"), ("stop", ["a", ""], "stop has ''"), ("stop", [3], "stop is 3"),
    ("stop", 3, "stop is 3; it must be text"), ("stop", b"x", "stop is b'x'"),
    ("prompt", 7, "prompt is 7; it must be text"), ("prompt", b"a", "prompt is b'a'"),
    ("prompt", "a\udcff", "prompt is 'a.udcff'; it must be text in UTF-8"), ("prompt", "\ud83e\udd96" * 999, "ud83e"),
    ("tokenizer", None, "needs a loaded tokenizer")])
def test_bad_input_gets_a_line_that_knows_its_field(small, tokenizer, field, value, words):
    options = {"prompt": "The", "tokenizer": tokenizer, "max_new_tokens": 2, field: value}
    with pytest.raises(ValueError, match=words) as error: generate(small, **options)
    assert "\n" not in str(error.value) and fields_of(error.value)[0] == field
    if field == "samples": return
    with pytest.raises(ValueError, match=words): stream(small, **options)  # at the call, before a piece is read


def test_an_unknown_setting_is_no_setting(small, tokenizer):
    with pytest.raises(TypeError, match="temprature"): generate(small, "The", tokenizer=tokenizer, temprature=1)
    with pytest.raises(TypeError, match="samples"): stream(small, "The", tokenizer=tokenizer, samples=2)
    assert inspect.signature(generate).parameters["top_k"].default == 50


def test_tokenizer_of_another_model(small, shared):
    with pytest.raises(ValueError, match="do not belong together"):
        generate(small, "The", tokenizer=str(shared/"data"/"gpt2-tokenizer"))


def test_damaged_weights_are_named(tokenizer):
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, n_positions=16, vocab_size=8192))
    with torch.no_grad(): model.transformer.ln_f.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="logits are NaN"): generate(model, "The", tokenizer=tokenizer)


def test_numpys_numbers_give_the_same_text(small, tokenizer):
    numbers = dict(seed=3, max_new_tokens=4, samples=2)
    wanted = generate(small, "The", tokenizer=tokenizer, **numbers)
    given = {name: np.int16(n) for name, n in numbers.items()}
    assert generate(small, "The", tokenizer=tokenizer, **given) == wanted


def test_training_mode_comes_back(small, tokenizer):
    small.train()
    small.transformer.drop.eval()
    modes = [m.training for m in small.modules()]
    generate(small, "The", tokenizer=tokenizer, max_new_tokens=2)
    assert [m.training for m in small.modules()] == modes
    pieces = stream(small, "The", tokenizer=tokenizer)
    next(pieces)
    assert not small.training and torch.is_grad_enabled()
    pieces.close()  # as a reader does who has seen enough
    assert [m.training for m in small.modules()] == modes
    assert all(p.requires_grad for p in small.parameters())


def test_a_name_is_loaded(tokenizer, tiny):
    options = dict(max_new_tokens=3, seed=1)
    assert generate("tiny", PROMPT, device="cpu", **options) == generate(tiny, PROMPT, tokenizer="tiny", **options)


def test_sample_shows_its_prompt_and_escapes_both(small, tokenizer):
    html = generate(small, "<script> & co", tokenizer=tokenizer, max_new_tokens=3, seed=9)[0]._repr_html_()
    assert "<b>&lt;script&gt; &amp; co</b>" in html and "seed 9" in html and "3 new tokens" in html


# Special tokens

def of_tiny(template, pair=None, **special):
    "tiny's tokenizer with special tokens of its own, and what it puts around a text."
    backend = Tokenizer.from_str(load_tokenizer("tiny").backend_tokenizer.to_str())
    backend.add_special_tokens(list(special.values()))
    ids = [(token, backend.token_to_id(token)) for token in special.values()]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.fixture(scope="module")
def bert():
    "A tokenizer of characters, as Chinese GPT-2s have: [CLS] text [SEP]."
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"我爱你们，。", *"abc", "##b", "day"]
    backend = Tokenizer(models.WordPiece({c: i for i, c in enumerate(tokens)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = dict(unk_token="[UNK]", sep_token="[SEP]", cls_token="[CLS]", pad_token="[PAD]")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


S = dict(bos_token="<s>", eos_token="</s>")

@pytest.mark.parametrize("template, begins", [
    ("<s> $A </s>", ["<s>"]), ("$A </s>", []), ("<s> $A", ["<s>"]), ("$A", [])])
def test_a_prompt_begins_as_its_tokenizer_has_it_and_never_ends_with_an_end_token(tokenizer, template, begins):
    closing = of_tiny(template, **S)
    ids = encode_prompt("The city", closing, 64)
    assert closing.convert_ids_to_tokens(ids[:len(begins)]) == begins
    assert ids[len(begins):] == tokenizer("The city").input_ids
    with pytest.warns(UserWarning, match="prompt is empty: the text starts from <s>"):
        assert closing.convert_ids_to_tokens(encode_prompt("", closing, 64)) == ["<s>"]


def test_a_long_prompt_keeps_what_begins_a_text():
    closing = of_tiny("<s> $A </s>", **S)
    with pytest.warns(UserWarning, match="only its last 14 are used"): ids = encode_prompt("a b c d " * 9, closing, 16)
    assert len(ids) == 15 and closing.convert_ids_to_tokens(ids[0]) == "<s>"


def test_a_prompt_of_a_chinese_gpt2(bert):
    assert bert.convert_ids_to_tokens(encode_prompt("我爱", bert, 64)) == ["[CLS]", "我", "爱"]
    with pytest.warns(UserWarning, match="prompt is empty: the text starts from .CLS."):
        assert encode_prompt(" \n", bert, 64) == [2]  # white space is no token there


def written(tokenizer, prompt, ids, **options):
    pieces = TextPieces(tokenizer, prompt, **options)
    return "".join(pieces.push([i]) for i in ids) + pieces.finish()


def test_special_tokens_are_not_printed_nor_spaces_between_chinese_characters(bert):
    ids = bert.convert_tokens_to_ids(["[CLS]", "我", "爱", "，", "你", "[PAD]", "day", "day", "我", "a", "##b", "。"])
    assert written(bert, ids[:2], ids[2:]) == "爱，你 day day 我 ab 。"
    assert written(bert, ids[:4], ids[4:5]) == "你"
    tags = of_tiny("$A", **S)
    assert written(tags, [], tags("one <s>two</s>").input_ids) == "one two"


def test_a_stop_that_is_a_special_token_ends_the_text():
    tokenizer = of_tiny("$A", **S)
    pieces = TextPieces(tokenizer, [], stops=["</s>", "never"])
    assert "".join(pieces.push([i]) for i in tokenizer("one</s>two").input_ids) + pieces.finish() == "one"
    assert pieces.stopped == "stop"


def test_half_a_character_at_the_end_is_shown_as_transformers_shows_it(tokenizer):
    for text in ("日本", "a 🦖"):
        ids = tokenizer(text).input_ids
        for n in range(1, len(ids)): assert written(tokenizer, [], ids[:n]) == tokenizer.decode(ids[:n])
    assert written(tokenizer, [], tokenizer("日本").input_ids[:-1]) == "日\ufffd"


def test_the_end_of_text_of_another_tokenizer_is_named(tokenizer):
    closing = of_tiny("<s> $A </s>", **S)
    backend = Tokenizer.from_str(closing.backend_tokenizer.to_str().replace("<|endoftext|>", "<|other|>"))
    with pytest.warns(UserWarning, match="^prompt has .* plain characters to .*; its own end token is </s>"):
        encode_prompt("a<|endoftext|>b", PreTrainedTokenizerFast(tokenizer_object=backend, **S), 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert encode_prompt("a<|endoftext|>b", tokenizer, 64)[1] == tokenizer.eos_token_id


# Many texts

def test_texts_do_not_depend_on_how_many_are_generated_together(small, tokenizer, monkeypatch):
    options = dict(tokenizer=tokenizer, max_new_tokens=20, seed=4)
    together = generate(small, "The", samples=7, **options)
    assert len({s.text for s in together}) == 7
    for most in (1, 3, 7):
        monkeypatch.setattr(generation, "most_at_once", lambda request: most)
        assert generate(small, "The", samples=7, **options) == together
    assert generate(small, "The", **options) == together[:1]
    next_seed = generate(small, "The", samples=7, **{**options, "seed": 5})
    assert not {s.text for s in next_seed} & {s.text for s in together}


def test_a_group_for_which_memory_does_not_suffice_is_halved(small, tokenizer, monkeypatch):
    options = dict(tokenizer=tokenizer, max_new_tokens=6, seed=4, samples=9)
    together, sizes, heard, decode = generate(small, "The", **options), [], [], generation.decode
    def limited(model, prompt, sampling, noise, new, rows, context):
        sizes.append(rows)
        if rows > 2: raise torch.OutOfMemoryError("CUDA out of memory.")
        return decode(model, prompt, sampling, noise, new, rows, context)
    monkeypatch.setattr(generation, "decode", limited)
    assert generate(small, "The", **options, progress=lambda *told: heard.append(told)) == together
    assert sizes == [9, 4, 2, 2, 2, 2, 1] and heard[-1] == ("Generating", 54, 54)


def test_too_little_memory_for_one_text_is_told_in_a_line(small, tokenizer, monkeypatch):
    def fails(*words): raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate")
    monkeypatch.setattr(generation, "decode", fails)
    said = "set a smaller max_new_tokens or choose a smaller model"
    with pytest.raises(MemoryError, match=said): generate(small, "The", tokenizer=tokenizer, samples=5)


def test_groups_fit_into_half_of_the_memory_that_is_free(tiny, tokenizer, monkeypatch):
    monkeypatch.setattr(generation, "memory", lambda: (None, 8 * 10**9))
    request = Request(tiny, "a", tokenizer=tokenizer, max_new_tokens=511, samples=10**6)
    group = generation.most_at_once(request)
    kept = 2 * 6 * 256 * 512 * 4  # keys and values of a text, in bytes
    assert 400 < group < 4 * 10**9 / kept
    texts = next(iter(request.steps(range(2))))
    assert texts.shape == (2, 1)


def test_a_name_goes_to_the_device_that_works(tokenizer, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # but torch has no code for this GPU
    monkeypatch.setattr(generation, "find_device", lambda: ("cpu", "no kernel image"))
    assert generate("tiny", "a", max_new_tokens=1)[0].tokens == 1


@pytest.mark.parametrize("device", ["cuda:99", "tpu", 99])
def test_a_device_that_this_machine_or_torch_lacks_is_one_line(device):
    said = f"device is '?{device}'?, which cannot be used here .*set device='cpu'"
    with pytest.raises(ValueError, match=said) as e: generate("tiny", "a", device=device)
    assert "\n" not in str(e.value) and fields_of(e.value) == ("device",)
    with pytest.raises(ValueError, match=said): next(stream("tiny", "a", device=device))
