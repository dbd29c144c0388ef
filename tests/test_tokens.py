"Cutting a text never changes a token."
import io, json, random
from pathlib import Path

import numpy as np, pytest
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

import colab_gpt2
from colab_gpt2.text.tokens import Encoder, cut_pattern, read_segments

DATA = Path(__file__).parents[1]/"../shared/data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real texts and tokenizer (../shared/data) are not here")
TINY = Path(colab_gpt2.__file__).parent/"assets/tiny"

@pytest.fixture(scope="module")
def tiny(): return AutoTokenizer.from_pretrained(TINY)

@pytest.fixture(scope="module", params=["tiny", pytest.param("gpt2", marks=needs_data)])
def tokenizer(request): return AutoTokenizer.from_pretrained(TINY if request.param == "tiny" else DATA/"gpt2-tokenizer")

@pytest.fixture(scope="module")
def encoder(tokenizer): return Encoder(tokenizer)

def ids_of(encoder, segments): return np.frombuffer(encoder(segments), encoder.dtype).tolist()

def in_pieces(encoder, text, size):
    "The ids of `text` read `size` characters at a time, and how many segments there were."
    pieces = list(read_segments(io.StringIO(text, newline=""), encoder.cut, size))
    segments = [s for piece in pieces for s in piece]
    assert "".join(segments) == text and all(segments)
    assert sum(len(s.split()) for s in segments) == len(text.split())
    return [i for piece in pieces for i in ids_of(encoder, piece)], len(segments)

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
    for whole in (text, text * 3, "b " + text + " c"):
        expected = tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
        for size in (1, 2, 3, 5, 1 << 18): assert in_pieces(encoder, whole, size)[0] == expected

def test_a_cut_changes_no_token_of_random_texts(encoder):
    chance, cuts = random.Random(0), 0
    parts = [*" \n\t\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u180e\u2003\u2028\u3000\u200b", "  ", " \n", "\r\n",
             *"aZé中1٣½'’.,<|>_-=\u0301😀\x00", "'s", "'ll", "<|endoftext|>", "the", "don't"]
    for _ in range(1500):
        text = "".join(chance.choices(parts, k=chance.randint(1, 40)))
        ids, pieces = in_pieces(encoder, text, chance.randint(1, 12))
        assert ids == encoder.encode([text])[0], ascii(text)
        cuts += pieces - 1
    assert cuts > 1500  # else the test shows nothing

@needs_data
@pytest.mark.parametrize("size, memory", [(20, 1 << 20), (1000, 100), (1 << 18, 0)])
def test_neither_the_size_of_a_piece_nor_what_is_remembered_changes_a_token(size, memory):
    text = (DATA/"wikitext-2-raw/wiki.test.raw").read_bytes().decode()[:200_000]
    encoder = Encoder(AutoTokenizer.from_pretrained(DATA/"gpt2-tokenizer"), memory)
    assert in_pieces(encoder, text, size)[0] == encoder.encode([text])[0]

GREEDY = [AddedToken("<a>", lstrip=True), AddedToken("<a>", rstrip=True), AddedToken("<a>", single_word=True)]

@pytest.mark.parametrize("token", [*GREEDY, AddedToken("New York")])
def test_tokens_that_reach_beyond_themselves_are_not_cut_at(tiny, token):
    backend = Tokenizer.from_str(tiny.backend_tokenizer.to_str())
    assert cut_pattern(backend)
    backend.add_tokens([token])
    assert cut_pattern(backend) is None

def byte_level(**changes):
    gpt2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return dict(pre_tokenizer=gpt2 | changes)

OTHERS = [dict(normalizer={"type": "NFC"}), byte_level(add_prefix_space=True), byte_level(use_regex=False),
          dict(pre_tokenizer=None)]

@pytest.mark.parametrize("change", OTHERS)
def test_other_tokenizers_get_the_text_in_one_go(tiny, change):
    assert cut_pattern(Tokenizer.from_str(json.dumps(json.loads(tiny.backend_tokenizer.to_str()) | change))) is None

def test_a_tokenizer_that_throws_dice_remembers_nothing(tiny):
    backend = Tokenizer.from_str(tiny.backend_tokenizer.to_str())
    backend.model.dropout = 0.5
    assert cut_pattern(backend) is None

