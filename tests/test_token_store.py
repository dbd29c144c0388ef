"Ids on the disk are those of the text, memory stays flat, and a file is complete, or as it was, or resumed."
import errno, hashlib, json, random, resource, signal, subprocess, sys, time
from pathlib import Path

import numpy as np, pytest
from transformers import AutoTokenizer, ByT5Tokenizer

import colab_gpt2
from colab_gpt2.errors import fields_of
from colab_gpt2.text import token_store
from colab_gpt2.text.corpus import load_corpus
from colab_gpt2.text.token_store import tokenize_corpus, tokenize_file
from colab_gpt2.text.tokens import Encoder

DATA = Path(__file__).parents[1]/"../shared/data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real texts and tokenizer (../shared/data) are not here")
TINY = Path(colab_gpt2.__file__).parent/"assets/tiny"

@pytest.fixture(scope="module")
def tiny(): return AutoTokenizer.from_pretrained(TINY)

def digest(path): return hashlib.sha256(path.read_bytes()).hexdigest()

@needs_data
@pytest.mark.parametrize("name, tokens, blocks_of_1024", [
    ("wikitext-2-raw/wiki.valid.raw", 249_887, 244), ("wikitext-2-raw/wiki.test.raw", None, None),
    ("wikitext-2-articles/articles.unk.txt", None, None)])
def test_a_cut_changes_no_token_of_a_real_text(tmp_path, name, tokens, blocks_of_1024):
    path, tokenizer = DATA/name, AutoTokenizer.from_pretrained(DATA/"gpt2-tokenizer")
    text = path.read_bytes().decode()
    expected = np.asarray(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids, "uint16")
    blocks = tokenize_file(path, tokenizer, 1024, cache_dir=tmp_path, progress=False)
    assert np.array_equal(blocks.stream, expected) and blocks.dtype == "uint16" and blocks.vocabulary_size == 50257
    assert (blocks.words, blocks.bytes, blocks.sha256) == (len(text.split()), path.stat().st_size, digest(path))
    if tokens: assert (blocks.tokens, len(blocks)) == (tokens, blocks_of_1024)  # as published with the data

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

@pytest.mark.parametrize("content, message", [
    (None, "a.txt does not exist"), (b"", "empty"), (b"a\x00b" * 99, "binary"), (b"caf\xe9 " * 99, "UTF-8"),
    (b"x", "The text has 1 tokens, which is 0 blocks of block_size 8")])
def test_bad_texts_leave_nothing(tiny, tmp_path, content, message):
    if content is not None: (tmp_path/"a.txt").write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as e:
        tokenize_file(tmp_path/"a.txt", tiny, 8, cache_dir=tmp_path/"cache", progress=False, minimum_blocks=1)
    assert "\n" not in str(e.value)
    if content != b"x": assert not (tmp_path/"cache").exists()

def test_a_stop_before_the_first_token_leaves_nothing(tiny, tmp_path):
    (tmp_path/"a.txt").write_text("one two three " * 50)
    def stop(*told): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): tokenize_file(tmp_path/"a.txt", tiny, 8, cache_dir=tmp_path, progress=stop)
    assert list((tmp_path/"tokens").iterdir()) == []

def test_the_checksum_that_a_corpus_knows_is_not_computed_again(tiny, tmp_path, monkeypatch):
    (tmp_path/"a.txt").write_text("one two three\n" * 50)
    corpus = load_corpus(train_file=tmp_path/"a.txt", cache_dir=tmp_path)
    monkeypatch.setattr(token_store, "sha256_of", None)
    splits = tokenize_corpus(corpus, tiny, 8, cache_dir=tmp_path, progress=False)
    assert {split: blocks.sha256 for split, blocks in splits.items()} == corpus.sha256

def test_a_full_disk_leaves_the_old_file(tiny, tmp_path):
    path, options = tmp_path/"a.txt", dict(cache_dir=tmp_path/"cache", progress=False)
    path.write_text("one two three " * 5000)
    blocks = tokenize_file(path, tiny, 8, **options)
    old = {f.name: f.read_bytes() for f in blocks.path.parent.iterdir()}
    path.write_text("four five six " * 5000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # more than 1,000 bytes fail, as on a full disk
        with pytest.raises(OSError, match="tokens of .*a.txt could not be written to .*tokens: .*another cache_dir"):
            tokenize_file(path, tiny, 8, **options)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {f.name: f.read_bytes() for f in blocks.path.parent.iterdir()} == old

# A run that ends before its time. The text has a byte order mark, characters of several bytes and \r\n: resuming at a
# wrong place would show.

JOB = """
import sys, time
from transformers import AutoTokenizer
from colab_gpt2.text import token_store
tokenizer_folder, cache, text, pieces = sys.argv[1:]  # pieces: how many to encode before it hangs
token_store.EVERY, call, encoded = 1, token_store.Encoder.__call__, []
def slowly(self, segments):
    if len(encoded) == int(pieces): time.sleep(600)
    encoded.append(sum(map(len, segments)))
    return call(self, segments)
token_store.Encoder.__call__ = slowly
print("ready", flush=True)
token_store.tokenize_file(text, AutoTokenizer.from_pretrained(tokenizer_folder), 64, cache_dir=cache, progress=False)
print(sum(encoded), flush=True)
"""

@pytest.fixture(scope="module")
def long_text(tmp_path_factory):
    "A text of eight pieces; -> its path."
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghié中", k=chance.randint(2, 9))) for _ in range(3000)]
    path = tmp_path_factory.mktemp("texts")/"long.txt"
    lines = (" ".join(chance.choices(words, k=40)) for _ in range(7500))
    path.write_bytes(("\ufeff" + "\ufeff\r\n".join(lines)).encode())
    return path

@pytest.fixture(scope="module")
def expected(long_text, tiny):
    "The SHA-256 of its ids, tokenised in one go by the tokenizer itself."
    ids = tiny(long_text.read_bytes().decode("utf-8-sig"), verbose=False)["input_ids"]
    return hashlib.sha256(np.asarray(ids, "uint16").tobytes()).hexdigest()

@pytest.fixture
def job(tmp_path, long_text):
    "Start JOB on `long_text`: -> the process, which ends with the test."
    started = []
    def start(pieces=-1):
        command = [sys.executable, "-c", JOB, TINY, tmp_path/"cache", long_text, pieces]
        started.append(subprocess.Popen([str(w) for w in command], stdout=subprocess.PIPE, text=True))
        return started[-1]
    yield start
    for process in started:
        process.kill()
        process.communicate()

def suffixes(cache): return sorted(f.suffix for f in (cache/"tokens").iterdir() if f.is_file())

def wait_for_entry(cache, above=0, seconds=120):
    "The counts of the journal, as soon as they are of more than `above` bytes of text."
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for journal in (cache/"tokens").glob("*.journal"):
            if (counts := json.loads(journal.read_text()))["bytes"] > above: return counts
        time.sleep(0.02)
    raise AssertionError(f"no entry of more than {above} bytes in {seconds} s")

@pytest.fixture
def encoded(monkeypatch):
    "How many characters this process encodes, piece by piece."
    sizes, call = [], Encoder.__call__
    def counting(self, segments):
        sizes.append(sum(map(len, segments)))
        return call(self, segments)
    monkeypatch.setattr(Encoder, "__call__", counting)
    return sizes

def test_a_killed_run_is_resumed(tiny, tmp_path, long_text, expected, job, encoded):
    cache, done = tmp_path/"cache", 0
    for _ in range(2):  # killed, resumed, killed again
        process = job(pieces=2)
        entry = wait_for_entry(cache, above=done)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        entry = wait_for_entry(cache)  # it may have made one more
        assert entry["bytes"] > done and suffixes(cache) == [".journal", ".part"]
        done = entry["bytes"]
    with open(next((cache/"tokens").glob("*.part")), "ab") as part: part.write(b"torn")  # ids that came after the entry
    blocks = tokenize_file(long_text, tiny, 64, cache_dir=cache, progress=False)
    assert digest(blocks.path) == expected and suffixes(cache) == [".ids", ".json"]
    text = long_text.read_bytes().decode("utf-8-sig")
    assert (blocks.words, blocks.bytes) == (len(text.split()), len(text.encode()))
    assert blocks.tokens == blocks.path.stat().st_size // 2
    assert sum(encoded) == len(text.encode()[done:].decode()) < len(text)  # not from the beginning

def interrupted(tiny, cache, long_text, monkeypatch, error, every=1):
    "Tokenise `long_text` until `error` comes with the fourth piece; -> the error that the caller sees."
    calls, call = [], Encoder.__call__
    def failing(self, segments):
        calls.append(1)
        if len(calls) == 4: raise error
        return call(self, segments)
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "__call__", failing)
        patch.setattr(token_store, "EVERY", every)
        with pytest.raises(type(error)) as e: tokenize_file(long_text, tiny, 64, cache_dir=cache, progress=False)
    return e.value

def changed(**values):
    def change(part, journal): journal.write_text(json.dumps(json.loads(journal.read_text()) | values))
    return change

SPOIL = {"part too short": lambda part, journal: part.write_bytes(part.read_bytes()[:1000]),
         "no part": lambda part, journal: part.unlink(),
         "half a journal": lambda part, journal: journal.write_text('{"tok'),
         "another text": changed(text_sha256="0"), "another tokenizer": changed(tokenizer_sha256="0")}

@pytest.mark.parametrize("how", SPOIL)
def test_a_part_without_a_right_journal_is_done_again(tiny, tmp_path, long_text, expected, monkeypatch, encoded, how):
    interrupted(tiny, tmp_path, long_text, monkeypatch, KeyboardInterrupt())
    SPOIL[how](*(next((tmp_path/"tokens").glob(f"*.{suffix}")) for suffix in ("part", "journal")))
    encoded.clear()
    assert digest(tokenize_file(long_text, tiny, 64, cache_dir=tmp_path, progress=False).path) == expected
    assert sum(encoded) == len(long_text.read_bytes().decode("utf-8-sig")) and suffixes(tmp_path) == [".ids", ".json"]

def test_without_an_entry_an_interrupted_run_leaves_nothing(tiny, tmp_path, long_text, monkeypatch):
    interrupted(tiny, tmp_path, long_text, monkeypatch, KeyboardInterrupt(), every=1 << 26)
    assert suffixes(tmp_path) == []

def test_a_full_disk_leaves_what_is_done(tiny, tmp_path, long_text, expected, monkeypatch, encoded):
    error = interrupted(tiny, tmp_path, long_text, monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    assert error.errno == errno.ENOSPC and fields_of(error) == ("cache_dir",)
    assert str(error).endswith("What is done stays, and the next run resumes from there.")
    assert suffixes(tmp_path) == [".journal", ".part"]
    encoded.clear()
    assert digest(tokenize_file(long_text, tiny, 64, cache_dir=tmp_path, progress=False).path) == expected
    assert sum(encoded) < len(long_text.read_bytes().decode("utf-8-sig"))

def test_two_processes_do_the_work_once(tmp_path, long_text, expected, job):
    both = [job(), job()]
    said = [process.communicate(timeout=300)[0].split() for process in both]
    assert [p.returncode for p in both] == [0, 0]
    assert sum(int(words[-1]) for words in said) == len(long_text.read_bytes().decode("utf-8-sig"))
    assert digest(next((tmp_path/"cache/tokens").glob("*.ids"))) == expected
    assert suffixes(tmp_path/"cache") == [".ids", ".json"]

def test_who_waits_resumes_where_the_killed_one_stopped(tmp_path, long_text, expected, job):
    first = job(pieces=3)
    wait_for_entry(tmp_path/"cache")
    second = job()
    assert second.stdout.readline() == "ready\n"
    with pytest.raises(subprocess.TimeoutExpired): second.wait(timeout=2)  # the first one, alive, holds the part
    first.kill()
    assert int(second.communicate(timeout=300)[0]) < len(long_text.read_bytes().decode("utf-8-sig"))
    assert digest(next((tmp_path/"cache/tokens").glob("*.ids"))) == expected
    assert suffixes(tmp_path/"cache") == [".ids", ".json"]

PEAK = """
import re, sys
from pathlib import Path
from transformers import AutoTokenizer
from colab_gpt2.text.token_store import tokenize_file
tokenizer_folder, cache, *texts = sys.argv[1:]
for text in texts:
    tokenize_file(text, AutoTokenizer.from_pretrained(tokenizer_folder), 512, cache_dir=cache, progress=False)
    status = Path("/proc/self/status").read_text()  # ru_maxrss would begin with the parent's
    print(int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) // 1024)
"""

@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux's /proc knows a process's peak of memory")
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


def test_a_cache_that_is_a_file_is_one_line(tiny, tmp_path):
    (tmp_path/"a.txt").write_text("It ebbs.")
    with pytest.raises(OSError, match="could not be written to .*a.txt/tokens: Not a directory.*another cache_dir") as e:
        tokenize_file(tmp_path/"a.txt", tiny, 8, cache_dir=tmp_path/"a.txt", progress=False)
    assert fields_of(e.value) == ("cache_dir",)
