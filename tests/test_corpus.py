"Own files, folders and zips, Python's documentation, the real WikiText: what comes out; own files stay as they are."
import json, os, subprocess, sys, tracemalloc, zipfile

import pytest

from colab_gpt2.core import sha256_of
from colab_gpt2.errors import fields_of
from colab_gpt2.text.corpus import SPLITS, WIKITEXT, cached, check_text, load_corpus, recall, titles

ARTICLES = "".join(f" \n = Number {n} = \n \n It is {n} , and {'very ' * n}large . \n" for n in range(30))


@pytest.fixture
def load(tmp_path):
    return lambda *args, **options: load_corpus(*args, cache_dir=tmp_path/"cache", progress=False, **options)


def snapshot(folder): return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def test_a_text_is_cut_between_articles_and_left_alone(load, tmp_path):
    mine = tmp_path/"mine"
    mine.mkdir()
    (mine/"numbers.txt").write_text(ARTICLES)
    before = snapshot(mine)
    corpus = load(mine/"numbers.txt")
    parts = [corpus.path(s).read_text() for s in SPLITS]
    assert "".join(parts) == ARTICLES
    assert [t for s in SPLITS for t in corpus.articles(s)] == [f"Number {n}" for n in range(30)]
    assert all(p.startswith((" = Number", " \n = Number")) for p in parts)
    assert 0.7 < len(parts[0]) / len(ARTICLES) < 0.9 and len(parts[1]) > 100 and len(parts[2]) > 100
    assert snapshot(mine) == before and load(str(mine/"numbers.txt")) == corpus


def test_another_text_under_the_same_name_is_another_corpus(load, tmp_path):
    path = tmp_path/"mine.txt"
    path.write_text(ARTICLES)
    first = load(path)
    path.write_text(ARTICLES.replace("large", "small"))
    assert load(path).sha256 != first.sha256 and "large" in first.train.read_text()


def test_paragraphs_stay_complete_where_there_are_no_articles(load, tmp_path):
    paragraphs = [f"Line one of {n}\nline two of {n}\n" for n in range(40)]
    (tmp_path/"prose.txt").write_text("\n".join(paragraphs))
    corpus = load(tmp_path/"prose.txt")
    assert [p + "\n" for s in SPLITS for p in corpus.path(s).read_text().strip().split("\n\n")] == paragraphs


def test_windows_line_ends_and_a_huge_line(load, tmp_path):
    (tmp_path/"dos.txt").write_bytes(ARTICLES.replace("\n", "\r\n").encode())
    assert len(list(load(tmp_path/"dos.txt").articles())) >= 20
    (tmp_path/"lines.txt").write_text("é" * 1_500_000 + "\nb\nc\n")
    corpus = load(tmp_path/"lines.txt")
    assert [corpus.path(s).read_text()[-2:] for s in SPLITS] == ["é\n", "b\n", "c\n"]


def test_too_little_to_hold_any_out(load, tmp_path):
    (tmp_path/"one.txt").write_text("just one line")
    with pytest.raises(ValueError, match="one.txt has fewer than three lines") as e: load(tmp_path/"one.txt")
    assert fields_of(e.value) == ("train_file", "eval_file")
    assert list((tmp_path/"cache"/"corpora").iterdir()) == []


def test_two_files_are_used_in_place(load, tmp_path):
    train, evaluation = tmp_path/"a.txt", tmp_path/"b.txt"
    train.write_text("first")
    evaluation.write_text("second")
    corpus = load(train_file=str(train), eval_file=evaluation)
    assert (corpus.name, corpus.train, corpus.validation, corpus.test) == ("a", train, evaluation, None)
    assert corpus.sha256 == {"train": sha256_of(train), "validation": sha256_of(evaluation)}
    assert corpus.bytes == {"train": 5, "validation": 6}
    assert not (tmp_path/"cache").exists()
    assert load(eval_file=evaluation).bytes == {"validation": 6}
    assert load(train_file=train, hold_out=False).bytes == {"train": 5}
    json.dumps(corpus.to_dict())
    with pytest.warns(UserWarning, match="hold the same text") as warned: load(train_file=train, eval_file=train)
    assert fields_of(warned[0].message) == ("train_file", "eval_file")


@pytest.mark.parametrize("content, message", [
    (None, "does not exist"), (b"", "is empty"), (b"\n \n", "is empty"), (b"\x89PNG\0", "is binary, not text: byte 4"),
    ("größe".encode("latin-1"), "is not UTF-8: byte 2 is 0xf6"), (b"abc\xe2\x82", "is not UTF-8: byte 3 is 0xe2")])
@pytest.mark.parametrize("argument", ["name", "train_file", "eval_file"])
def test_a_bad_file_gets_a_clear_line(load, tmp_path, content, message, argument):
    path = tmp_path/"bad.txt"
    if content is not None: path.write_bytes(content)
    kind = FileNotFoundError if content is None else ValueError
    with pytest.raises(kind, match=f"bad.txt {message}") as e: load(**{argument: path})
    assert "\n" not in str(e.value) and fields_of(e.value) == ("dataset" if argument == "name" else argument,)
    assert {p.name for p in tmp_path.iterdir()} <= {"bad.txt", "cache"}


def test_unknown_names_get_the_nearest(load):
    with pytest.raises(ValueError, match="not a known dataset.* mean 'wikitext-103-v1'") as e: load("wikitext-103")
    assert fields_of(e.value) == ("dataset",)
    with pytest.raises(ValueError, match="Did you mean 'python-docs'"): load("python_docs")
    with pytest.raises(FileNotFoundError, match="nowhere/a.txt does not exist"): load("nowhere/a.txt")


@pytest.mark.parametrize("names", [
    ("wiki.train.raw", "wiki.valid.raw", "wiki.test.raw"), ("train.txt", "validation.txt", "test.txt"),
    ("wikitext-2/wiki.train.tokens", "wikitext-2/wiki.valid.tokens", "wikitext-2/wiki.test.tokens")])
def test_folders_and_zips_in_wikitexts_layout(load, tmp_path, names):
    folder = tmp_path/"mine"
    with zipfile.ZipFile(tmp_path/"mine.zip", "w") as z:
        for name in names:
            (folder/name).parent.mkdir(parents=True, exist_ok=True)
            (folder/name).write_text(f" {name}")
            z.write(folder/name, name)
    before = snapshot(folder)
    for corpus in (load(folder), load(tmp_path/"mine.zip")):
        assert [corpus.path(s).read_text() for s in SPLITS] == [f" {n}" for n in names] and corpus.name == "mine"
    assert load(folder).train == folder/names[0] and snapshot(folder) == before
    assert load(tmp_path/"mine.zip") == load(tmp_path/"mine.zip")


def test_a_folder_without_text(load, tmp_path):
    (tmp_path/"empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no corpus"): load(tmp_path/"empty")
    for name in ("train.txt", "wiki.train.raw"): (tmp_path/"empty"/name).write_text("a")
    with pytest.raises(ValueError, match="two files for one split: train.txt, wiki.train.raw"): load(tmp_path/"empty")


def test_a_folder_of_parquet(load, tmp_path):
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    (tmp_path/"rows").mkdir()
    for split, rows in {"train": ["", " = A = \n", "", " b \n"], "validation": ["no line end"]}.items():
        parquet.write_table(arrow.table({"text": rows}), tmp_path/"rows"/f"{split}-00000-of-00001.parquet")
    corpus = load(tmp_path/"rows")
    assert corpus.train.read_text() == " \n = A = \n \n b \n"
    assert corpus.validation.read_text() == "no line end\n" and corpus.test is None
    assert load(tmp_path/"rows") == corpus


def test_two_runs_that_make_one_corpus_both_get_it(tmp_path):
    def make(stage):
        (stage/"a.txt").write_text("text")
        return {"train": stage/"a.txt"}
    def make_while_another_does(stage):
        cached(tmp_path/"corpus", "name", "source", make)
        return make(stage)
    corpus = cached(tmp_path/"corpus", "name", "source", make_while_another_does)
    assert corpus == recall(tmp_path/"corpus")
    assert [p.name for p in tmp_path.iterdir()] == ["corpus"]


OFFLINE = """
import json, sys
from colab_gpt2.text.corpus import load_corpus
corpus = load_corpus("python-docs", cache_dir=sys.argv[1])
heavy = {"torch", "transformers", "datasets", "huggingface_hub"} & set(sys.modules)
print(json.dumps([corpus.to_dict(), sorted(heavy)]))
"""


def test_python_docs_need_no_network_and_no_heavy_import(tmp_path):
    nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    command = [sys.executable, "-c", OFFLINE, tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | nowhere)
    corpus, heavy = json.loads(run.stdout)
    assert heavy == [] and sum(corpus["bytes"].values()) > 300_000 and len(list(titles(corpus["test"]))) >= 5


def test_memory_does_not_grow_with_the_text(load, tmp_path):
    path = tmp_path/"long.txt"
    with open(path, "w") as f:
        for n in range(4000): f.write(f" \n = Number {n} = \n \n {'word ' * 1000}\n")  # 20 MB
    tracemalloc.start()
    corpus = load(path)
    assert next(corpus.articles("test")).startswith("Number 3")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6, f"{peak:,} bytes for a text of {path.stat().st_size:,}"


def test_the_real_wikitext(shared):
    corpus = load_corpus(shared/"data"/"wikitext-2-raw")
    published = WIKITEXT["wikitext-2-raw-v1"].files
    assert corpus.train is None and corpus.sha256 == {s: published[s] for s in ("validation", "test")}
    assert [len(list(corpus.articles(s))) for s in ("validation", "test")] == [60, 60]
    assert next(corpus.articles("validation")) == "Homarus gammarus"
    assert check_text(corpus.test) == corpus.test
    with pytest.raises(ValueError, match="has no split 'train'; it has validation, test"): corpus.path("train")
