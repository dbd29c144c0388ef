"Ids on the disk are those of the text, memory stays flat, and a file is complete, or as it was, or resumed."
import errno, functools, hashlib, importlib, itertools, json, multiprocessing, os, random, resource, signal, subprocess
import sys, time, warnings
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace

import numpy as np, psutil, pytest
from helpers.forks import forked, launched
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

import colab_gpt2
from colab_gpt2.config import FinetuneConfig, count_steps
from colab_gpt2.errors import fields_of
from colab_gpt2.preparing import prepare, warn_of_few_steps, warn_of_few_tokens
from colab_gpt2.text import token_store
from colab_gpt2.text.corpus import load_corpus
from colab_gpt2.text.chats import tokenize_corpus
from colab_gpt2.text.token_store import tokenize_file

DATA = Path(__file__).parents[1]/"../shared/data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real texts and tokenizer (../shared/data) are not here")
TINY = Path(colab_gpt2.__file__).parent/"assets/tiny"

@pytest.fixture(scope="module")
def tiny(): return AutoTokenizer.from_pretrained(TINY)

@pytest.fixture(autouse=True)
def by_one_process(monkeypatch):
    "However many cores there are; see `ids_by` for several."
    monkeypatch.setattr(token_store, "processes", lambda: 1)

def digest(path): return hashlib.sha256(path.read_bytes()).hexdigest()

@needs_data
@pytest.mark.parametrize("name, tokens, blocks_of_1024", [
    ("wikitext-2-raw/wiki.valid.raw", 249_887, 244), ("wikitext-2-raw/wiki.test.raw", None, None),
    ("wikitext-2-articles/articles.unk.txt", None, None)])
def test_a_cut_changes_no_token_of_a_real_text(tmp_path, name, tokens, blocks_of_1024):
    path, tokenizer = DATA/name, AutoTokenizer.from_pretrained(DATA/"gpt2-tokenizer")
    if (DATA/name).stat().st_size > 3 << 20:  # two megabytes are eight windows
        path = tmp_path/"a.txt"
        path.write_text((DATA/name).read_text(encoding="utf-8")[:2 << 20], encoding="utf-8")
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
    (tmp_path/"a.txt").write_text("word " * 60_000)  # many times the context, and more than a window
    tokenize_file(tmp_path/"a.txt", tiny, 8, cache_dir=tmp_path)
    out, err = capfd.readouterr()
    assert out == "" and "Tokenising a.txt" in err and "longer than" not in err and not list(recwarn)

@pytest.mark.parametrize("content, message", [
    (None, "a.txt does not exist"), (b"", "empty"), (b"\x00\x01\x02" * 99, "binary"), (b"caf\xe9 " * 99, "UTF-8"),
    (b"x", "The text has 1 token, which is 0 blocks of block_size 8")])
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
        told = "^The tokens of .*a.txt could not be written to .*tokens: .*another cache_dir"
        with pytest.raises(OSError, match=told):
            tokenize_file(path, tiny, 8, **options)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {f.name: f.read_bytes() for f in blocks.path.parent.iterdir()} == old

# A run that ends before its time. The text has a byte order mark, characters of several bytes and \r\n: resuming at a
# wrong place would show.

def tokenise(text, cache, pieces):
    "`text`, with an entry in the journal after each piece; after so many `pieces` it hangs. -> how much was encoded."
    token_store.EVERY, token_store.processes = 1, lambda: 1
    read, encoded = token_store.read_windows, []
    def slowly(*given):
        for piece in read(*given):
            if len(encoded) == pieces: time.sleep(600)
            encoded.append(len(piece[0]))
            yield piece
    token_store.read_windows = slowly
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    (cache.parent/"ready").touch()
    tokenize_file(text, tokenizer, 64, cache_dir=cache, progress=False)
    return sum(encoded)

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

def job(tmp_path, long_text, pieces=-1): return launched(tokenise, long_text, tmp_path/"cache", pieces)

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
    sizes, read = [], token_store.read_windows
    def counting(*given, **more):
        for piece in read(*given, **more):
            sizes.append(len(piece[0]))
            yield piece
    monkeypatch.setattr(token_store, "read_windows", counting)
    return sizes

def test_a_killed_run_is_resumed(tiny, tmp_path, long_text, expected, encoded):
    cache, done = tmp_path/"cache", 0
    for _ in range(2):  # killed, resumed, killed again
        with job(tmp_path, long_text, pieces=2) as process:
            wait_for_entry(cache, above=done)
            process.kill()
        assert process.done.returncode == -signal.SIGKILL
        entry = wait_for_entry(cache)  # it may have made one more
        assert entry["bytes"] > done and suffixes(cache) == [".journal", ".lock", ".part"]
        done = entry["bytes"]
    part = next((cache/"tokens").glob("[!.]*.part"))
    with open(part, "ab") as more: more.write(b"torn")  # ids that came after the entry
    blocks = tokenize_file(long_text, tiny, 64, cache_dir=cache, progress=False)
    assert digest(blocks.path) == expected and suffixes(cache) == [".ids", ".json"]
    text = long_text.read_bytes().decode("utf-8-sig")
    assert (blocks.words, blocks.bytes) == (len(text.split()), len(text.encode()))
    assert blocks.tokens == blocks.path.stat().st_size // 2
    assert sum(encoded) == len(text.encode()[done:].decode()) < len(text)  # not from the beginning

def interrupted(tiny, cache, long_text, monkeypatch, error, every=1):
    "Tokenise `long_text` until `error` comes with the fourth piece; -> the error that the caller sees."
    read = token_store.read_windows
    def failing(*given):
        yield from itertools.islice(read(*given), 3)
        raise error
    with monkeypatch.context() as patch:
        patch.setattr(token_store, "read_windows", failing)
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

def test_two_processes_do_the_work_once(tmp_path, long_text, expected):
    with job(tmp_path, long_text) as one, job(tmp_path, long_text) as other:
        for process in (one, other): process.join(300)
    assert one.done.result + other.done.result == len(long_text.read_bytes().decode("utf-8-sig")), one.done.stderr
    assert digest(next((tmp_path/"cache/tokens").glob("*.ids"))) == expected
    assert suffixes(tmp_path/"cache") == [".ids", ".json"]

def test_who_waits_resumes_where_the_killed_one_stopped(tmp_path, long_text, expected):
    with job(tmp_path, long_text, pieces=3) as first:
        wait_for_entry(tmp_path/"cache")
        (tmp_path/"ready").unlink()
        with job(tmp_path, long_text) as second:
            while not (tmp_path/"ready").exists(): time.sleep(0.02)
            second.join(1)
            assert second.is_alive()  # the first one, which lives, holds the part
            first.kill()
            second.join(300)
    assert second.done.result < len(long_text.read_bytes().decode("utf-8-sig")), second.done.stderr
    assert digest(next((tmp_path/"cache/tokens").glob("*.ids"))) == expected
    assert suffixes(tmp_path/"cache") == [".ids", ".json"]

# A long text is shared among processes.

def ids_by(processes, path, tokenizer, cache, **patches):
    "The bytes of the ids, and the words and bytes of the text, by so many processes with shares of 200 to 400 kB."
    given = dict(SHARE=400_000, LEAST=200_000, processes=lambda: processes) | patches
    with pytest.MonkeyPatch.context() as patch:
        for name, value in given.items(): patch.setattr(token_store, name, value)
        blocks = tokenize_file(path, tokenizer, 64, cache_dir=cache, progress=False)
    return blocks.path.read_bytes(), blocks.words, blocks.bytes

def closed():
    "The embedded tokenizer with <s> and </s> around a text."
    backend = Tokenizer.from_file(str(TINY/"tokenizer.json"))
    backend.add_special_tokens(["<s>", "</s>"])
    ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")

def spaced():
    "The embedded tokenizer with a space before the text."
    backend = Tokenizer.from_file(str(TINY/"tokenizer.json"))
    backend.pre_tokenizer.add_prefix_space = True
    return PreTrainedTokenizerFast(tokenizer_object=backend)

@pytest.mark.skipif(sys.platform != "linux", reason="only there processes are forked")
@pytest.mark.parametrize("kind, processes", [("tiny", 2), ("tiny", 3), ("spaced", 2), ("closed", 2)])
def test_shares_change_no_token(tiny, tmp_path, long_text, encoded, kind, processes):
    (path := tmp_path/"a.txt").write_bytes(b"".join(long_text.read_bytes().splitlines(True)[:2500]))
    tokenizer = dict(tiny=lambda: tiny, spaced=spaced, closed=closed)[kind]()
    alone = ids_by(1, path, tokenizer, tmp_path/"1")
    encoded.clear()
    assert ids_by(processes, path, tokenizer, tmp_path/"several") == alone
    assert sum(encoded) < 200_000 * processes  # the rest, by this process

def without_a_share(failing, how):
    "`tokenise_share` that fails for the share that begins at the byte `failing` or after it."
    real = token_store.tokenise_share
    def share(path, encoder, start, *rest):
        if start >= failing: how()
        return real(path, encoder, start, *rest)
    return share

ENDS = {"killed": lambda: os.kill(os.getpid(), signal.SIGKILL), "no memory": lambda: sys.exit(1)}

@pytest.mark.skipif(sys.platform != "linux", reason="only there processes are forked")
@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("failing", [0, 1_000_000])
def test_one_process_goes_on_where_a_share_fails(tiny, tmp_path, long_text, expected, encoded, failing, how):
    share = without_a_share(failing, ENDS[how])
    ids, words, size = ids_by(2, long_text, tiny, tmp_path, tokenise_share=share)
    text = long_text.read_bytes().decode("utf-8-sig")
    assert hashlib.sha256(ids).hexdigest() == expected and (words, size) == (len(text.split()), len(text.encode()))
    assert sum(encoded) == len(text) if not failing else 0 < sum(encoded) < len(text)
    assert not multiprocessing.active_children()

@pytest.mark.skipif(sys.platform != "linux", reason="only there processes are forked")
def test_no_share_outlives_an_interrupted_run(tiny, tmp_path, long_text):
    "Its traceback may be kept, as in a notebook, and the pipes with it."
    def stop(what, done, total):
        if done: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt) as kept, pytest.MonkeyPatch.context() as patch:
        for name, value in dict(SHARE=400_000, LEAST=200_000, processes=lambda: 3).items():
            patch.setattr(token_store, name, value)
        tokenize_file(long_text, tiny, 64, cache_dir=tmp_path, progress=stop)
    assert kept.traceback and not multiprocessing.active_children() and suffixes(tmp_path) == []

def share_out(text, cache):
    token_store.SHARE, token_store.LEAST, token_store.processes = 400_000, 200_000, lambda: 2
    tokenize_file(text, AutoTokenizer.from_pretrained(TINY), 64, cache_dir=cache, progress=False)

@pytest.mark.skipif(sys.platform != "linux", reason="only there processes are forked")
def test_no_share_outlives_a_killed_run(tmp_path, long_text):
    with launched(share_out, long_text, tmp_path) as process:
        shares = []
        while len(shares) < 2 and process.is_alive(): shares = psutil.Process(process.pid).children()
        process.kill()
    assert len(shares) == 2 and psutil.wait_procs(shares, 60)[1] == []

@pytest.mark.skipif(sys.platform != "linux", reason="only there processes are forked")
def test_a_text_that_cannot_be_cut_is_not_shared(tiny, tmp_path, encoded):
    (tmp_path/"a.txt").write_text("the first line\n" + " " * 1_000_000)  # which is one token's white space, or two
    alone = ids_by(1, tmp_path/"a.txt", tiny, tmp_path/"1")
    encoded.clear()
    assert ids_by(2, tmp_path/"a.txt", tiny, tmp_path/"2") == alone and sum(encoded) == 1_000_015

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
@pytest.mark.parametrize("normalizer, few, many", [(None, 8, 20), ({"type": "NFC"}, 8, 12)])
def test_memory_does_not_grow_with_the_text(tiny, tmp_path, normalizer, few, many):
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghijklmnoprstu", k=chance.randint(2, 9))) for _ in range(20_000)]
    text = " ".join(chance.choices(words, k=100_000)) + "\n"  # 650 kB: more than is encoded at a time
    paths = [tmp_path/f"{n}.txt" for n in (few, many)]
    for path, n in zip(paths, (few, many)): path.write_text(text * n)
    tiny.save_pretrained(tmp_path/"tokenizer")
    file = tmp_path/"tokenizer"/"tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": normalizer}))
    words = [sys.executable, "-c", PEAK, tmp_path/"tokenizer", tmp_path, *paths]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    small, large = map(int, done.stdout.split())
    assert large < 1.15 * small, f"{small} MiB for {few * 0.65} MB, {large} MiB for {many * 0.65} MB"

def test_a_text_in_windows_has_the_ids_and_words_of_one_piece(tmp_path):
    backend = json.loads((TINY/"tokenizer.json").read_text()) | {"normalizer": {"type": "NFC"}}
    nfc = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)))
    genome = "".join(random.Random(0).choices("ACGT", k=400_000))
    text = "".join(f"{topics[name]}é\u0301 " for name in sorted(topics)) + genome
    (tmp_path/"a.txt").write_text(text, encoding="utf-8")
    blocks = tokenize_file(tmp_path/"a.txt", nfc, 64, cache_dir=tmp_path, progress=False)
    assert blocks.stream.tolist() == nfc.backend_tokenizer.encode(text, add_special_tokens=False).ids
    assert (blocks.words, blocks.bytes) == (len(text.split()), len(text.encode()))

def test_a_text_begins_as_its_tokenizer_begins_one_and_is_never_closed(tmp_path, monkeypatch):
    tokenizer = closed()
    (tmp_path/"a.txt").write_text("One.</s>Two.")
    blocks = tokenize_file(tmp_path/"a.txt", tokenizer, 4, cache_dir=tmp_path, progress=False)
    assert tokenizer.decode(blocks.stream) == "<s>One.</s><s>Two."
    assert blocks.tokens == len(blocks.stream)

def test_a_resumed_text_opens_its_documents(tmp_path, monkeypatch):
    "Cuts are also between the end token and the next document."
    tokenizer, text = closed(), "one two three</s>four five</s>six" * 12
    (tmp_path/"a.txt").write_text(text)
    read = functools.partial(token_store.read_windows, size=40, context=16)
    monkeypatch.setattr(token_store, "EVERY", 1)
    monkeypatch.setattr(token_store, "CONTEXT", 16)
    monkeypatch.setattr(token_store, "read_windows", read)
    options = dict(block_size=4, progress=False)
    def ids(folder): return tokenize_file(tmp_path/"a.txt", tokenizer, cache_dir=tmp_path/folder, **options).stream
    whole = ids("whole").tolist()
    assert "</s><s>four" in tokenizer.decode(whole)
    for last in range(1, 9):  # killed after each piece
        def dying(*given):
            yield from itertools.islice(read(*given), last)
            raise KeyboardInterrupt
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(token_store, "read_windows", dying)
            ids(str(last))
        assert ids(str(last)).tolist() == whole

def test_a_run_with_windows_is_resumed(tmp_path, long_text, monkeypatch, encoded):
    "A prefix space stands at the beginning of the text alone."
    tokenizer = spaced()
    text = long_text.read_bytes().decode("utf-8-sig")
    interrupted(tokenizer, tmp_path, long_text, monkeypatch, KeyboardInterrupt())
    encoded.clear()
    blocks = tokenize_file(long_text, tokenizer, 64, cache_dir=tmp_path, progress=False)
    expected = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    assert blocks.stream.tolist() == expected and sum(encoded) < len(text) and blocks.words == len(text.split())

def test_what_a_tokenizer_cannot_tell_is_said_once_for_all_splits(tiny, tmp_path):
    (tmp_path/"a.txt").write_text("one two three</s>\n" * 50)
    corpus = load_corpus(train_file=tmp_path/"a.txt", cache_dir=tmp_path)
    with pytest.warns(UserWarning) as caught: tokenize_corpus(corpus, tiny, 8, cache_dir=tmp_path, progress=False)
    assert [str(w.message)[:18] for w in caught] == ["train.txt has </s>"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize_file(tmp_path/"a.txt", tiny, 8, cache_dir=tmp_path, progress=False, notes=False)

# Folders that cannot be used

def cache_error(tiny, tmp_path, **options):
    (tmp_path/"a.txt").write_text("one two three\n" * 50)
    with pytest.raises(OSError) as e: tokenize_file(tmp_path/"a.txt", tiny, 8, progress=False, **options)
    assert fields_of(e.value) == ("cache_dir",) and "Errno" not in str(e.value) and "\n" not in str(e.value)
    return str(e.value)

@pytest.mark.parametrize("inside", ["", "folder"])
def test_a_cache_that_is_a_file_is_named(tiny, tmp_path, inside):
    (tmp_path/"cache").write_text("")
    assert "Give another cache_dir." in cache_error(tiny, tmp_path, cache_dir=tmp_path/"cache"/inside)

@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="in Linux's /proc nobody, not even root, can write")
def test_a_home_that_cannot_be_written_to_asks_for_another_cache(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/proc/none")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    said = cache_error(tiny, tmp_path)
    assert "/proc/none/.cache" in said and "Give another cache_dir." in said and "Free some" not in said

# Windows

def without_posix(*folders):
    "Import every module of the package, and tokenise, where Python has no module and no call of POSIX."
    for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty"): sys.modules[name] = None
    for name in "fork sync statvfs mkfifo posix_fadvise sched_getaffinity killpg getpgid".split(): delattr(os, name)
    for name in ("SIGHUP", "SIGKILL", "SIGUSR1", "SIGALRM", "SIGTSTP", "alarm", "pause"): delattr(signal, name)
    for name in colab_gpt2._HOME.values(): importlib.import_module(f"colab_gpt2.{name}")
    from colab_gpt2.text.token_store import tokenize_file
    tokenizer, text, cache = folders
    return len(tokenize_file(text, AutoTokenizer.from_pretrained(tokenizer), 8, cache_dir=cache, progress=False))

def test_nothing_needs_a_module_that_windows_lacks(tmp_path):
    (tmp_path/"a.txt").write_text("one two three\n" * 50)
    ran = forked(without_posix, str(TINY), str(tmp_path/"a.txt"), str(tmp_path/"cache"))
    assert ran.returncode == 0 and ran.result > 10, ran.stderr
    assert suffixes(tmp_path/"cache") == [".ids", ".json"]

def peak_on_windows():
    from colab_gpt2.engine.probe import peak_rss
    def missing(path, **options): raise FileNotFoundError(path)
    Path.read_text, sys.modules["resource"] = missing, None
    psutil.Process = lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=5, peak_wset=7))
    return peak_rss()

def test_the_peak_of_memory_is_known_on_windows_too(): assert forked(peak_on_windows).result == 7

def test_no_open_file_is_renamed_or_removed(tiny, tmp_path, monkeypatch):
    "Windows refuses both."
    def opened(path): return any(os.path.realpath(path) == f.path for f in psutil.Process().open_files())
    def closed_only(name, call):
        def checked(path, *rest, **options):
            assert not opened(path), f"os.{name} of {path}, which is open"
            return call(path, *rest, **options)
        monkeypatch.setattr(os, name, checked)
    (tmp_path/"a.txt").write_text("one two three\n" * 50)
    for name in ("replace", "rename"): closed_only(name, getattr(os, name))
    tokenize_file(tmp_path/"a.txt", tiny, 8, cache_dir=tmp_path/"cache", progress=False)

# What a run begins with

def run_of(tmp_path, text, **options):
    (tmp_path/"train.txt").write_text(text)
    (tmp_path/"eval.txt").write_text("The tide came in at noon.\n" * 400)
    files = {f"{name}_file": str(tmp_path/f"{name}.txt") for name in ("train", "eval")}
    folders = dict(cache_dir=str(tmp_path/"cache"), output_dir=str(tmp_path/"out"))
    return FinetuneConfig(model="tiny", **folders, **files, **options)

FIFTY = "".join(f"Verse {i} of the song about the tide and the moon, sung at night.\n" for i in range(50))

@pytest.mark.parametrize("lines", [3, 10, 37, 50])
def test_a_short_text_is_trained_on_to_its_end(tmp_path, lines):
    config = run_of(tmp_path, "".join(FIFTY.splitlines(True)[:lines]))
    config, train = (prepared := prepare(config, held_out=False)).config, prepared.train
    assert len(train) * train.block_size > 0.95 * train.tokens and train.block_size == config.block_size <= 68
    assert count_steps(config, len(train)) >= 100

def test_a_text_that_will_be_learned_by_heart_is_noted(tmp_path):
    config = run_of(tmp_path, FIFTY, num_train_epochs=200)
    train = prepare(config, held_out=False).train
    with pytest.warns(UserWarning, match="200 times by a model of 6,967,296 .*: it will learn this by heart") as caught:
        warn_of_few_tokens(config, train, 6_967_296)
    assert fields_of(caught[0].message) == ("num_train_epochs",)
    with pytest.warns(UserWarning, match="or fewer max_steps"):
        warn_of_few_tokens(replace(config, max_steps=900), train, 6_967_296)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_few_tokens(config, train, 100)  # parameters
        warn_of_few_tokens(replace(config, num_train_epochs=4), train, 6_967_296)

def test_few_steps_are_noted_where_they_were_not_asked_for(tmp_path):
    config = run_of(tmp_path, FIFTY, block_size=512, num_train_epochs=2)
    with pytest.warns(UserWarning) as caught: warn_of_few_steps(config, prepare(config, held_out=False).train)
    [note] = [w.message for w in caught]
    assert str(note).startswith("2 steps in all; 100 or more are needed to be noticed: set max_steps=100")
    assert fields_of(note) == ("max_steps", "num_train_epochs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train = prepare(run_of(tmp_path, FIFTY, max_steps=2, block_size=64), held_out=False).train
    assert train.block_size == 64  # what was asked for

def test_a_text_with_a_token_that_the_model_lacks_is_refused_by_its_name(tmp_path, monkeypatch):
    from colab_gpt2 import preparing
    padded = AutoTokenizer.from_pretrained(TINY)
    padded.add_special_tokens({"pad_token": "[PAD]"})
    monkeypatch.setattr(preparing, "load_tokenizer", lambda *_, **__: padded)
    monkeypatch.setattr(preparing, "check_match", lambda *_: None)
    options = dict(max_steps=1, block_size=16)
    assert prepare(run_of(tmp_path, FIFTY, **options)).train.vocabulary_size == len(padded)
    with pytest.raises(ValueError, match=r"The train text has the token \[PAD\], for which the model has no embedding"):
        prepare(run_of(tmp_path, FIFTY + "[PAD]", **options))
    config = run_of(tmp_path, FIFTY, **options)
    (tmp_path/"eval.txt").write_text(FIFTY * 4 + "[PAD]")
    with pytest.raises(ValueError, match=r"The eval.txt text has the token \[PAD\]"): prepare(config, train=False)
