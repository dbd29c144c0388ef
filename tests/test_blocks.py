"Cutting a text never changes a token, memory does not grow with it, and what is on disk is whole or as it was."
import io, json, random, resource, subprocess, sys
from pathlib import Path
import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, ByT5Tokenizer
import colab_gpt2
from colab_gpt2.blocks import Encoder, cut_pattern, read_pieces, tokenize_file

DATA = Path(__file__).parents[1]/"../shared/data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real texts and tokenizer (../shared/data) are not on this machine")
TINY = Path(colab_gpt2.__file__).parent/"assets/tiny"

@pytest.fixture(scope="module")
def tiny(): return AutoTokenizer.from_pretrained(TINY)

@pytest.fixture(scope="module", params=["tiny", pytest.param("gpt2", marks=needs_data)])
def tokenizer(request): return AutoTokenizer.from_pretrained(TINY if request.param == "tiny" else DATA/"gpt2-tokenizer")

@pytest.fixture(scope="module")
def encoder(tokenizer): return Encoder(tokenizer)

def in_pieces(encoder, text, size):
    "The ids of all pieces of `text`, and how many pieces there were."
    pieces = list(read_pieces(io.StringIO(text, newline=""), encoder.cut, size))
    assert "".join(pieces) == text
    assert sum(len(p.split()) for p in pieces) == len(text.split())
    return [i for ids in encoder(pieces) for i in ids], len(pieces)

NASTY = ["a  b", "a \n\n b", "\n\t\n x\t\ty", "it's  'tis we'll  'll\n's 're", "a\r\n\r\nb\rc", "\xa0 \xa0a \xa0\n\xa0b", "a\x1c b\x1c\n c \x1c\x1d x",
         "\u3000\u3000中文字。\n\u3000\u3000第二段 日本語\u3000かな", "😀 😀\n👩‍👩‍👧  e\u0301 \u0301x", "x<|endoftext|> y  <|endoftext|>  z \n<|endoftext|>\n", " <|endoftext|", "<  |endof text|>",
         "a \u180e b\u200b \u200bc \u2028d\u2029 e \x85f", "1 2  3\n4 ½ Ⅷ ²  _x", " ", "\n", "\n\n\n", " a", "a ", "\ufeffa \ufeffb", "\U00010400 \U0001d7d8 \u2160"]

@pytest.mark.parametrize("text", NASTY)
def test_a_cut_changes_no_token(tokenizer, encoder, text):
    for whole in (text, text * 3, "b " + text + " c"):
        expected = tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
        for size in (1, 2, 3, 5): assert in_pieces(encoder, whole, size)[0] == expected

def test_a_cut_changes_no_token_of_random_texts(encoder):
    chance, cuts = random.Random(0), 0
    parts = [*" \n\t\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u180e\u2003\u2028\u3000\u200b", "  ", " \n", "\r\n", *"aZé中1٣½'’.,<|>_-=\u0301😀\x00", "'s", "'ll", "<|endoftext|>", "the", "don't"]
    for _ in range(1500):
        text = "".join(chance.choices(parts, k=chance.randint(1, 40)))
        ids, pieces = in_pieces(encoder, text, chance.randint(1, 12))
        assert ids == encoder([text])[0], ascii(text)
        cuts += pieces - 1
    assert cuts > 1500  # else the test shows nothing

@needs_data
def test_a_cut_changes_no_token_of_a_real_text(tmp_path):
    path, tokenizer = DATA/"wikitext-2-raw/wiki.valid.raw", AutoTokenizer.from_pretrained(DATA/"gpt2-tokenizer")
    text, encoder = path.read_bytes().decode(), Encoder(tokenizer)
    expected, = encoder([text])
    assert len(expected) == 249_887  # as published with the data
    for size in (20, 1000): assert in_pieces(encoder, text, size)[0] == expected
    blocks = tokenize_file(path, tokenizer, 1024, cache_dir=tmp_path, progress=False)
    assert blocks.stream.tolist() == expected and blocks.dtype == "uint16" and blocks.vocabulary_size == 50257
    assert (len(blocks), blocks.words, blocks.bytes) == (244, len(text.split()), 1_146_846)
    assert blocks.sha256 == "4cd0f6876d07a413aa911261ff6d363c72d757d47f0fdd6015702014c89cb9c7"

@pytest.mark.parametrize("token", [AddedToken("<a>", lstrip=True), AddedToken("<a>", rstrip=True), AddedToken("<a>", single_word=True), AddedToken("New York")])
def test_tokens_that_reach_beyond_themselves_are_not_cut_at(tiny, token):
    backend = Tokenizer.from_str(tiny.backend_tokenizer.to_str())
    assert cut_pattern(backend)
    backend.add_tokens([token])
    assert cut_pattern(backend) is None

@pytest.mark.parametrize("change", [dict(normalizer={"type": "NFC"}), dict(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}),
                                    dict(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}), dict(pre_tokenizer=None)])
def test_other_tokenizers_get_the_text_in_one_go(tiny, change):
    assert cut_pattern(Tokenizer.from_str(json.dumps(json.loads(tiny.backend_tokenizer.to_str()) | change))) is None

def test_a_tokenizer_in_python_and_a_large_vocabulary(tiny, tmp_path):
    (tmp_path/"a.txt").write_text("héllo  wörld\n" * 3, encoding="utf-8")
    slow = ByT5Tokenizer()  # needs no files: an id is a byte and 3
    blocks = tokenize_file(tmp_path/"a.txt", slow, 4, cache_dir=tmp_path, progress=False)
    assert blocks.stream.tolist() == [b + 3 for b in (tmp_path/"a.txt").read_bytes()]
    large = AutoTokenizer.from_pretrained(TINY)
    large.add_tokens([f"~{i}~" for i in range(1 << 16)])
    blocks = tokenize_file(tmp_path/"a.txt", large, 4, cache_dir=tmp_path, progress=False)
    assert blocks.dtype == "uint32" and blocks.vocabulary_size == len(large)
    assert blocks.stream.tolist() == tiny((tmp_path/"a.txt").read_text(encoding="utf-8"))["input_ids"]

def test_the_cache_knows_text_and_tokenizer_and_mends_itself(tiny, tmp_path):
    path, options = tmp_path/"a.txt", dict(cache_dir=tmp_path/"cache", progress=False)
    path.write_text("one two three " * 50)
    first = tokenize_file(path, tiny, 8, **options)
    expected = first.stream.tolist()
    other = AutoTokenizer.from_pretrained(TINY)
    other.add_tokens(["two"])
    assert tokenize_file(path, other, 8, **options).path != first.path
    first.path.write_bytes(first.path.read_bytes()[:-2])  # cut off
    assert tokenize_file(path, tiny, 8, **options).stream.tolist() == expected
    first.path.with_suffix(".json").write_text('{"tok')
    assert tokenize_file(path, tiny, 8, **options).stream.tolist() == expected
    path.write_text("one two four " * 50)
    assert tokenize_file(path, tiny, 8, **options).path != first.path

def test_no_warning_and_no_word_on_stdout(tiny, tmp_path, capfd, recwarn):
    (tmp_path/"a.txt").write_text("word " * 3000)  # several times the context
    tokenize_file(tmp_path/"a.txt", tiny, 8, cache_dir=tmp_path)
    out, err = capfd.readouterr()
    assert out == "" and "Tokenising a.txt" in err and "longer than" not in err and not list(recwarn)

@pytest.mark.parametrize("content, message", [(None, "a.txt"), (b"", "empty"), (b"a\x00b" * 99, "binary|NUL"), (b"caf\xe9 " * 99, "UTF-8"), (b"x", "The text has 1 tokens, which is 0 blocks of block_size 8")])
def test_bad_texts_leave_nothing(tiny, tmp_path, content, message):
    if content is not None: (tmp_path/"a.txt").write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as e: tokenize_file(tmp_path/"a.txt", tiny, 8, cache_dir=tmp_path/"cache", progress=False, minimum_blocks=1)
    assert "\n" not in str(e.value)
    if content != b"x": assert not (tmp_path/"cache").exists()

def test_a_full_disk_leaves_the_old_file(tiny, tmp_path):
    path, options = tmp_path/"a.txt", dict(cache_dir=tmp_path/"cache", progress=False)
    path.write_text("one two three " * 5000)
    blocks = tokenize_file(path, tiny, 8, **options)
    old = {f.name: f.read_bytes() for f in blocks.path.parent.iterdir()}
    path.write_text("four five six " * 5000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # a write beyond 1,000 bytes fails, as on a full disk
        with pytest.raises(OSError, match="tokens of .*a.txt could not be written to .*cache/tokens: .*Free some space or choose another cache_dir."): tokenize_file(path, tiny, 8, **options)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {f.name: f.read_bytes() for f in blocks.path.parent.iterdir()} == old

PEAK = """
import resource, sys
from transformers import AutoTokenizer
from colab_gpt2.blocks import tokenize_file
tokenizer_folder, cache, *texts = sys.argv[1:]
for text in texts:
    tokenize_file(text, AutoTokenizer.from_pretrained(tokenizer_folder), 512, cache_dir=cache, progress=False)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""

def test_memory_does_not_grow_with_the_text(tmp_path):
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghijklmnoprstu", k=chance.randint(2, 9))) for _ in range(20_000)]
    text = " ".join(chance.choices(words, k=100_000)) + "\n"  # 650 kB: more than is encoded at a time
    paths = [tmp_path/f"{times}.txt" for times in (1, 20)]
    for path, times in zip(paths, (1, 20)): path.write_text(text * times)
    done = subprocess.run([sys.executable, "-c", PEAK, TINY, tmp_path, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    small, large = map(int, done.stdout.split())
    assert large < 1.1 * small, f"{small} MiB for 650 kB, {large} MiB for 13 MB"
