"Cutting a text never changes a token."
import functools, io, json, random
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np, pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, GPT2Config, PreTrainedTokenizerFast

import colab_gpt2
from colab_gpt2.errors import fields_of
from colab_gpt2.generation import encode_prompt
from colab_gpt2.model.fitting import end_ids
from colab_gpt2.model.loading import new_model
from colab_gpt2.text import tokens
from colab_gpt2.text.formats import END
from colab_gpt2.text.tokens import (Encoder, check_ids, cut_patterns, end_mark, notes_on, opened, opening_ids,
                                    read_windows)

DATA = Path(__file__).parents[1]/"../shared/data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real texts and tokenizer (../shared/data) are not here")
TINY = Path(colab_gpt2.__file__).parent/"assets/tiny"

@pytest.fixture(scope="module")
def tiny(): return AutoTokenizer.from_pretrained(TINY)

@pytest.fixture(scope="module", params=["tiny", pytest.param("gpt2", marks=needs_data)])
def tokenizer(request): return AutoTokenizer.from_pretrained(TINY if request.param == "tiny" else DATA/"gpt2-tokenizer")

@pytest.fixture(scope="module")
def encoder(tokenizer): return Encoder(tokenizer)

def in_pieces(encoder, text, size, context):
    "The ids of `text` in windows of `size` characters, and how many there were."
    pieces = list(read_windows(io.StringIO(text, newline=""), encoder.encode, size=size, context=context))
    assert "".join(text for text, _ in pieces) == text and all(text for text, _ in pieces)
    return [id for _, ids in pieces for id in ids], len(pieces)

NASTY = [
    "a  b", "a \n\n b", "\n\t\n x\t\ty", "it's  'tis we'll  'll\n's 're", "a\r\n\r\nb\rc", "\xa0 \xa0a \xa0\n\xa0b",
    "a\x1c b\x1c\n c \x1c\x1d x", "\u3000\u3000中文字。\n\u3000\u3000第二段 日本語\u3000かな", "😀 😀\n👩‍👩‍👧  e\u0301 \u0301x",
    "x<|endoftext|> y  <|endoftext|>  z \n<|endoftext|>\n", " <|endoftext|", "<  |endof text|>",
    "a \u180e b\u200b \u200bc \u2028d\u2029 e \x85f", "1 2  3\n4 ½ Ⅷ ²  _x", " ", "\n", "\n\n\n", " a", "a ",
    "\ufeffa \ufeffb", "\U00010400 \U0001d7d8 \u2160", "".join(map(chr, range(1, 160))),
    " ".join(map(chr, range(1, 160))),
    " " * 5000 + "x" + "\n" * 5000, "a" * 5000 + " " + "é" * 5000, "\t \n" * 3000 + "<", "😀" * 2000]

@pytest.mark.parametrize("text", NASTY)
def test_a_cut_changes_no_token(tokenizer, encoder, text):
    for whole in (text * 3, "b " + text + " c", text + "\n" + text):
        expected = tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
        for size in (1, 60): assert in_pieces(encoder, whole, size, 16)[0] == expected

def test_a_cut_changes_no_token_of_random_texts(encoder):
    chance, cuts = random.Random(0), 0
    parts = [*" \n\t\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u180e\u2003\u2028\u3000\u200b", "  ", " \n", "\r\n",
             *"aZé中1٣½'’.,<|>_-=\u0301😀\x00", "'s", "'ll", "<|endoftext|>", "the", "don't"]
    for _ in range(150):
        text = "".join(chance.choices(parts, k=chance.randint(100, 300)))
        ids, pieces = in_pieces(encoder, text, 50, 16)
        assert ids == encoder.slowly([text])[0].tolist(), ascii(text)
        cuts += pieces - 1
    assert cuts > 300  # else the test shows nothing

@needs_data
@pytest.mark.parametrize("size, context, memory", [(1000, 50, 0), (20_000, 1 << 10, 100), (1 << 18, 1 << 10, 1 << 20)])
def test_neither_the_size_of_a_window_nor_what_is_remembered_changes_a_token(size, context, memory):
    text = (DATA/"wikitext-2-raw/wiki.test.raw").read_bytes().decode()[:200_000]
    encoder = Encoder(AutoTokenizer.from_pretrained(DATA/"gpt2-tokenizer"), memory)
    assert in_pieces(encoder, text, size, context)[0] == encoder.slowly([text])[0].tolist()

# Where a text may surely be cut

GREEDY = [AddedToken("<a>", lstrip=True), AddedToken("<a>", rstrip=True), AddedToken("<a>", single_word=True)]

@pytest.mark.parametrize("token", [*GREEDY, AddedToken("New York")])
def test_tokens_that_reach_beyond_themselves_are_not_cut_at(tiny, token):
    backend = Tokenizer.from_str(tiny.backend_tokenizer.to_str())
    assert cut_patterns(backend)
    backend.add_tokens([token])
    assert cut_patterns(backend) == []

def byte_level(**changes):
    gpt2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return dict(pre_tokenizer=gpt2 | changes)

OTHERS = [dict(normalizer={"type": "NFC"}), byte_level(add_prefix_space=True), byte_level(use_regex=False),
          dict(pre_tokenizer=None)]

@pytest.mark.parametrize("change", OTHERS)
def test_other_tokenizers_have_no_sure_cut(tiny, change):
    assert cut_patterns(Tokenizer.from_str(json.dumps(json.loads(tiny.backend_tokenizer.to_str()) | change))) == []

# Tokenizers of other designs: their text is cut where their own ids show that a cut is harmless.

@functools.cache
def prose(): return "\n".join(topics[name] for name in sorted(topics)[::4])

def trained(model, trainer, pre_tokenizer, normalizer=None):
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizer
    if normalizer: made.normalizer = normalizer
    made.train_from_iterator(prose()[:60_000].splitlines(), trainer)
    return made

def pieces_of_bytes(): return ["<unk>", *(f"<0x{n:02X}>" for n in range(256))]

def llama(prepend=True, split=None):
    "Llama's first (the text is one word), or Gemma's: spaces are letters, what is unknown comes as bytes."
    bpe = models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    made = trained(bpe, trainers.BpeTrainer(vocab_size=1500, special_tokens=pieces_of_bytes(), show_progress=False),
                   pre_tokenizers.Metaspace())
    space = normalizers.Replace(" ", "▁")
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prepend else space
    made.pre_tokenizer = split or pre_tokenizers.Sequence([])
    return made

def unigram(**metaspace):
    "T5's: what is most likely of all, after NFKC."
    trainer = trainers.UnigramTrainer(vocab_size=800, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    normal = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    made = trained(models.Unigram(), trainer, pre_tokenizers.Metaspace(), normal)
    made.pre_tokenizer = pre_tokenizers.Metaspace(**metaspace)
    return made

def bert():
    trainer = trainers.WordPieceTrainer(vocab_size=1500, special_tokens=["[UNK]"], show_progress=False)
    return trained(models.WordPiece(unk_token="[UNK]"), trainer, pre_tokenizers.BertPreTokenizer(),
                   normalizers.BertNormalizer())

def words():
    trainer = trainers.WordLevelTrainer(vocab_size=1500, special_tokens=["[UNK]"], show_progress=False)
    return trained(models.WordLevel(unk_token="[UNK]"), trainer, pre_tokenizers.Whitespace())

LLAMA_3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")

def tinys(pre_tokenizer=None, normalizer=None, added=()):
    "The embedded tokenizer, changed."
    made = Tokenizer.from_file(str(TINY/"tokenizer.json"))
    if pre_tokenizer: made.pre_tokenizer = pre_tokenizer
    if normalizer: made.normalizer = normalizer
    made.add_tokens(list(added))
    return made

def split_by(pattern):
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

DESIGNS = {
    "NFC": lambda: tinys(normalizer=normalizers.NFC()), "lower case": lambda: tinys(normalizer=normalizers.Lowercase()),
    "prefix space": lambda: tinys(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "one word": lambda: tinys(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "Llama 3": lambda: tinys(split_by(LLAMA_3)),
    "digits from the right": lambda: tinys(split_by(r"\d{1,3}(?=(?:\d{3})*\b)")),
    "SmolLM": lambda: tinys(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])),
    "greedy tokens": lambda: tinys(added=[AddedToken("<mask>", lstrip=True, rstrip=True), AddedToken("in the"),
                                          AddedToken("of", single_word=True)]),
    "Llama 2": llama, "Gemma": lambda: llama(False, pre_tokenizers.Split(" ", "merged_with_previous")),
    "Mistral": lambda: llama(False, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "T5": unigram, "Unigram of one word": lambda: unigram(prepend_scheme="always", split=False),
    "BERT": bert, "words": words}

@functools.cache
def design(name):
    "The Encoder of a design; ByT5 is written in Python."
    if name == "ByT5": return Encoder(ByT5Tokenizer())
    return Encoder(PreTrainedTokenizerFast(tokenizer_object=DESIGNS[name]()))

every_design = pytest.mark.parametrize("name", [*DESIGNS, "ByT5"])

@every_design
def test_a_window_changes_no_token(name):
    encoder, text = design(name), prose()[:120_000]
    ids, pieces = in_pieces(encoder, text, 8_000, 400)
    assert ids == encoder.encode([text])[0].tolist() and pieces > 12

@every_design
@pytest.mark.parametrize("kind", ["no line end", "no space", "nasty", "old Mac", "numbers", "spaces"])
def test_a_window_changes_no_token_of_an_odd_text(name, kind):
    chance, encoder = random.Random(0), design(name)
    text = {"no line end": prose()[:40_000].replace("\n", " "), "no space": "".join(chance.choices("ACGT", k=40_000)),
            "nasty": "\n".join(NASTY[:20]) * 20, "old Mac": prose()[:40_000].replace("\n", "\r"),
            "numbers": "".join(chance.choices("0123456789", k=9_000)) + "\n" + "12 345 6789 " * 900,
            "spaces": ("a" + " " * 700 + "\n" * 700 + "<mask>") * 15}[kind]
    assert in_pieces(encoder, text, 3_000, 300)[0] == encoder.encode([text])[0].tolist()

def test_a_genome_is_read_in_windows(encoder):
    text = "A genome: " + "".join(random.Random(0).choices("ACGT", k=60_000))
    ids, pieces = in_pieces(encoder, text, 2_000, 200)
    assert ids == encoder.slowly([text])[0].tolist() and pieces > 10

def test_a_text_that_cannot_be_cut_is_refused_before_memory_is_gone(monkeypatch):
    dice = tinys()
    dice.model.dropout = 0.5
    assert cut_patterns(dice) == []  # it remembers nothing
    encoder, text = Encoder(PreTrainedTokenizerFast(tokenizer_object=dice)), prose()[:20_000]
    assert in_pieces(encoder, text, 2_000, 200)[1] == 1
    monkeypatch.setattr(tokens, "memory", lambda: (8 << 30, 1_000_000))
    with pytest.raises(MemoryError, match="memory is too short for [0-9,]+ characters in one piece") as e:
        in_pieces(encoder, text, 2_000, 200)
    assert "line" not in str(e.value)  # line ends would not help

# What stands before and after a text

def closed(pattern, **special):
    "The embedded tokenizer with tokens of its own around a text, as in `pattern`."
    backend = tinys()
    backend.add_special_tokens([*special.values()])
    pairs = [(token, backend.token_to_id(token)) for token in special.values()]
    backend.post_processor = processors.TemplateProcessing(single=pattern, special_tokens=pairs)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)

@pytest.mark.parametrize("pattern, special, before", [
    ("<s> $A </s>", dict(bos_token="<s>", eos_token="</s>"), ["<s>"]),
    ("[CLS] $A [SEP]", dict(cls_token="[CLS]", sep_token="[SEP]"), ["[CLS]"]),
    ("$A </s>", dict(eos_token="</s>"), []), ("<bos> $A", dict(bos_token="<bos>"), ["<bos>"]),
    ("</s> $A", dict(bos_token="</s>", eos_token="</s>"), ["</s>"]),  # OPT's begins a text with its end token
    ("[gMASK] <sop> $A", dict(unk_token="[gMASK]", bos_token="<sop>"), ["[gMASK]", "<sop>"])])
def test_only_what_stands_before_a_text_is_put_there(pattern, special, before):
    tokenizer = closed(pattern, **special)
    assert tokenizer.convert_ids_to_tokens(opening_ids(tokenizer)) == before
    encoder = Encoder(tokenizer)
    once, = encoder.encode(["Once"])
    assert opened(once, encoder.opening, encoder.ends).tolist() == [*opening_ids(tokenizer), *once]

def text_of(tokenizer, *parts):
    "The tokens of a text that comes in `parts`."
    encoder, before, found = Encoder(tokenizer), -1, []
    for part in parts:
        found += opened(encoder.encode([part])[0], encoder.opening, encoder.ends, before).tolist()
        before = found[-1]
    return "".join(tokenizer.convert_ids_to_tokens(found))

def test_each_document_is_opened_once():
    tokenizer = closed("<s> $A </s>", bos_token="<s>", eos_token="</s>")
    assert text_of(tokenizer, "a</s>b</s>") == "<s>a</s><s>b</s>"
    assert text_of(tokenizer, "a</s>", "b") == "<s>a</s><s>b"  # the cut is between two documents
    assert text_of(tokenizer, "<s>a</s><s>b") == "<s>a</s><s>b"  # written in the text
    assert text_of(closed("</s> $A", bos_token="</s>", eos_token="</s>"), "a</s>b") == "</s>a</s>b"

def test_the_mark_between_documents_ends_them_where_another_token_ends_a_text():
    "As in SmolLM2-Instruct, whose end token is <|im_end|>, and which has <|endoftext|> too."
    tokenizer = closed("<s> $A", bos_token="<s>", eos_token="<|im_end|>")
    assert text_of(tokenizer, "a<|endoftext|>b") == "<s>a<|endoftext|><s>b"
    assert end_ids(new_model(GPT2Config(n_layer=1, n_embd=8, n_head=1), seed=0), tokenizer) == {
        0, tokenizer.eos_token_id}

def test_a_mark_that_is_no_token_is_none_though_the_vocabulary_has_it():
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, END: 2, "?": 3, "</s>": 4}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Punctuation()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert end_mark(tokenizer) == "</s>" and Encoder(tokenizer).encode([f"a{END}b"])[0].tolist() == [0, 4, 1]

@pytest.mark.filterwarnings("ignore:prompt has")
@pytest.mark.parametrize("text", ["Once", "<s>Once", "Once</s>", "Once</s>Twice", " "])
def test_a_prompt_begins_as_a_text_does(tiny, text):
    for tokenizer in (closed("<s> $A </s>", bos_token="<s>", eos_token="</s>"), tiny):
        encoder = Encoder(tokenizer)
        first = encoder.encode([text.partition("</s>")[0]])[0]
        learned = opened(first, encoder.opening, encoder.ends).tolist()
        assert encode_prompt(text, tokenizer, 64)[:len(learned)] == learned

def test_a_text_is_tokenised_again_where_another_token_opens_it(tiny):
    plain, opening = closed("$A", bos_token="<s>"), closed("<s> $A", bos_token="<s>")
    assert Encoder(plain).fingerprint != Encoder(opening).fingerprint

# What a tokenizer cannot tell

def notes(text, tokenizer): return [str(note) for note in notes_on(text.encode(), "t.txt", tokenizer, lost=True)]

def test_a_tokenizer_that_drops_line_ends_and_spaces_is_noted(tiny):
    def wrapped(name): return PreTrainedTokenizerFast(tokenizer_object=DESIGNS[name]())
    [said] = notes("two  words\n", wrapped("BERT"))
    assert said == "The tokenizer drops line ends and repeated spaces: the model can neither learn nor write them."
    assert "drops line ends:" in notes("two words\n", wrapped("words"))[0]
    assert notes("two words", wrapped("BERT")) == [] == notes("two  words\n", wrapped("Llama 2"))
    assert "drops repeated spaces:" in notes("two  words", wrapped("T5"))[0]
    assert notes("two  words\n", tiny) == [] == list(notes_on(b"two  words\n", "{prompt}", wrapped("BERT")))

def test_a_script_that_the_tokenizer_does_not_know_is_noted(tiny):
    def wrapped(name): return PreTrainedTokenizerFast(tokenizer_object=DESIGNS[name](), unk_token="[UNK]")
    assert notes("봄 잠 새벽 모르네 " * 9, wrapped("BERT"))[-1] == (
        "100% of the tokens of t.txt are [UNK]: its characters are not known.")
    assert notes(" ".join(prose()[:3000].split()), wrapped("BERT")) == []
    assert notes("봄 잠 새벽 모르네 " * 9, tiny) == [] == notes("<|endoftext|>" * 9, tiny)

def test_the_end_mark_of_another_tokenizer_is_noted(tiny):
    own = closed("<s> $A </s>", bos_token="<s>", eos_token="</s>")
    backend = json.loads(own.backend_tokenizer.to_str())
    backend["added_tokens"] = [t for t in backend["added_tokens"] if t["content"] != "<|endoftext|>"]
    del backend["model"]["vocab"]["<|endoftext|>"]
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), eos_token="</s>")
    [said] = notes("a<|endoftext|>b", other)
    assert said == "t.txt has <|endoftext|>, which becomes the end token of this tokenizer; its own end token is </s>."
    [said] = notes_on(b"a<|endoftext|>b", "{prompt}", other)
    assert said == "{prompt} has <|endoftext|>, which is plain characters to this tokenizer; its own end token is </s>."
    marked, ended, plain = (Encoder(other).encode([text])[0].tolist() for text in ("a<|endoftext|>b", "a</s>b", "ab"))
    assert marked == ended != plain
    assert Encoder(other).fingerprint != Encoder(own).fingerprint
    other.eos_token = None
    assert text_of(other, "a<|endoftext|>b").endswith(">b") and Encoder(other).end == ""
    assert notes("a<|endoftext|>b", tiny) == [] == notes("a</s>b", own)
    assert "its own end token is <|endoftext|>" in notes("a</s>b", tiny)[0]
    assert notes("<|startoftext|>a", tiny) == []  # gpt-2-simple's, plain characters to every GPT-2

def test_a_token_without_an_embedding_is_named(tiny):
    padded = AutoTokenizer.from_pretrained(TINY)
    padded.add_special_tokens({"pad_token": "[PAD]"})
    check_ids(padded("no such token").input_ids, len(tiny), padded, "{prompt}")
    with pytest.raises(ValueError, match=r"prompt has the token \[PAD\], for which the model has no embedding") as e:
        check_ids(padded("a [PAD] b").input_ids, len(tiny), padded, "{prompt}")
    assert fields_of(e.value) == ("prompt",)
