"Own files, folders and zips, Python's documentation, the real WikiText: what comes out; own files stay as they are."
import io, json, os, re, socket, subprocess, sys, time, tracemalloc, warnings, zipfile
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from colab_gpt2.core import sha256_of
from colab_gpt2.errors import fields_of
from colab_gpt2.text.corpus import WIKITEXT, Corpus, cached, load_corpus, recall
from colab_gpt2.text.reading import SPLITS, check_text, cut_near, cut_text
from colab_gpt2.text.splitting import Documents, Numbers

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
    text = "é" * 1_500_000 + "\nb\nc\n"
    (tmp_path/"lines.txt").write_text(text)
    corpus = load(tmp_path/"lines.txt")
    assert "".join(corpus.path(s).read_text() for s in SPLITS) == text


def test_too_little_to_hold_any_out(load, tmp_path):
    (tmp_path/"one.txt").write_text("just one line")
    with pytest.raises(ValueError, match="one.txt has 13 bytes, too few to hold") as e: load(tmp_path/"one.txt")
    assert fields_of(e.value) == ("train_file", "eval_file")
    assert list((tmp_path/"cache"/"corpora").iterdir()) == []
    for content, told in ("x", "has 1 byte, too few"), ("\n", "no text in its 1 byte."), ("", "no text in its 0 bytes"):
        (tmp_path/"one.txt").write_text(content)
        with pytest.raises(ValueError, match=told): load(tmp_path/"one.txt")


def test_a_text_of_one_line_again_and_again_is_told_without_its_duplicates(load, tmp_path):
    (tmp_path/"same.csv").write_text("text\n" + "the same words\n" * 99)
    with pytest.raises(ValueError, match="same.csv without 98 duplicates has 14 bytes, too"): load(tmp_path/"same.csv")


@pytest.mark.parametrize("content", ["<|endoftext|>" * 99, (" \n" * 20 + "<|endoftext|>") * 99])
def test_a_text_of_empty_documents_is_told_by_its_own_name(load, tmp_path, content):
    (tmp_path/"ends.txt").write_text(content)
    with pytest.raises(ValueError, match=f"^{tmp_path/'ends.txt'} is empty"): load(tmp_path/"ends.txt")


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
    ("größe".encode("latin-1"), "line 1: the byte 0xf6, which is not UTF-8. It seems to be cp1252: convert"),
    (b"abc\xe2\x82", "line 1: the byte 0xe2, which is not UTF-8")])
@pytest.mark.parametrize("argument", ["name", "train_file", "eval_file"])
def test_a_bad_file_gets_a_clear_line(load, tmp_path, content, message, argument):
    path = tmp_path/"bad.txt"
    if content is not None: path.write_bytes(content)
    kind = FileNotFoundError if content is None else ValueError
    with pytest.raises(kind, match=f"bad.txt,? {message}") as e: load(**{argument: path})
    about = ("on_bad_lines",) if "UTF-8" in message else ("dataset" if argument == "name" else argument,)
    assert "\n" not in str(e.value) and fields_of(e.value) == about
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


def test_runs_that_ask_for_one_corpus_at_once_make_it_once(tmp_path):
    def make(stage):
        (stage/"a.txt").write_text("text")
        return {"train": stage/"a.txt"}
    made = []
    def slowly(stage):
        made.append(stage)
        time.sleep(0.2)
        return make(stage)
    def get(_): return cached(tmp_path/"corpus", "name", "source", slowly)
    with ThreadPoolExecutor(3) as pool: corpora = [*pool.map(get, range(3))]
    assert corpora == [recall(tmp_path/"corpus")] * 3 and len(made) == 1
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
    assert heavy == [] and sum(corpus["bytes"].values()) > 100_000 and len(list(Corpus(**corpus).articles("test"))) >= 5


def number(n): return f" \n = Number {n} = \n \n {'word ' * 1000}\n"


SIZES = {  # shape -> 10 MB of text, in files
    "articles": ["".join(map(number, range(2000)))], "no white space": ["ACGT" * 2_500_000],
    "a giant line": ["It_ebbs_and_flows_and_ebbs_again_for_ever, " * 240_000],
    "line ends of Windows": [("It ebbs and flows for ever and ever. " * 9 + "\r\n") * 30_000],
    "many files": [number(n) * 20 for n in range(100)]}


@pytest.mark.parametrize("shape", SIZES)
def test_memory_does_not_grow_with_the_text(load, tmp_path, shape):
    for i, text in enumerate(SIZES[shape]): (tmp_path/f"{i}.txt").write_bytes(text.encode())
    tracemalloc.start()
    corpus = load(tmp_path/("0.txt" if i == 0 else "*.txt"))
    for split in SPLITS: all(corpus.articles(split))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6 and sum(corpus.bytes.values()) > 9e6, f"{peak:,} bytes"


def test_the_real_wikitext(shared):
    corpus = load_corpus(shared/"data"/"wikitext-2-raw")
    published = WIKITEXT["wikitext-2-raw-v1"].files
    assert corpus.train is None and corpus.sha256 == {s: published[s] for s in ("validation", "test")}
    assert [len(list(corpus.articles(s))) for s in ("validation", "test")] == [60, 60]
    assert next(corpus.articles("validation")) == "Homarus gammarus"
    assert check_text(corpus.test) == corpus.test
    with pytest.raises(ValueError, match="has no split 'train'; it has validation, test"): corpus.path("train")


# ---- where a text is cut

def message(i): return f"10:{i % 60:02d} - A: message number {i} about nothing much\n"


NEAR = {  # texts -> what begins the validation text
    "a chat with two blank lines": ("".join([*map(message, range(200)), "\n", *map(message, range(200, 600)), "\n",
                                             *map(message, range(600, 2000))]), r"10:\d\d - A"),
    "a novel after a title page": ("My Novel\n\nby Someone\n\n" + "Line of the story goes on.\n" * 900, "Line"),
    "a short article and a long one": (" = One = \n \n text \n \n = Two = \n \n" + "".join(
        f" para {i} of a long article . \n \n" for i in range(500)), r" para \d+"),
    "a giant line": ("A thing, and another thing. " * 2000, "A thing"),
    "words without a full stop": ("word " * 4000 + "\nx\ny\n", "word"),
    "no white space": ("ACGTTGCA" * 2000, "[ACGT]"),
    "Chinese": ("春眠不觉晓，处处闻啼鸟。" * 500, "春眠不觉晓"),
    "emoji": ("🌊" * 900, "🌊"),
    "quotes": ('"It ebbs." she said. "It flows!" ' * 300, '("It|she)'),
    "Hindi": ("ज्वार आया। " * 400, "ज्वार"),
    "U+2028 as line ends": ("a verse of the tide\u2028" * 400, "a verse"),
    "a page of many pages": ("\f".join(f"Page {i}\n" + "It ebbs\nand flows\n" * 20 for i in range(60)), r"Page \d+"),
    "indented paragraphs": ("    It ebbs and\nflows.\n\n" * 300, "    It ebbs"),
    "chapters": ("".join(f"CHAPTER {i}\n\n" + "It ebbs.\n\n" * 5 for i in range(99)), "CHAPTER"),
    "Markdown": ("".join(f"# Tide {i}\n\n" + "It ebbs.\n\n" * 5 for i in range(99)), "# Tide"),
    "stars between poems": ("* * *\n".join(f"Poem {i}\n\nof the\n\ntide\n" for i in range(99)), r"Poem \d+"),
    "rules between poems": ("\n---\n\n".join(f"Poem {i}\n\nof the\n\ntide\n" for i in range(99)), r"\s*Poem \d+"),
    "headings that are underlined": ("".join(f"Poem {i}\n------\nof the tide\n\n" for i in range(99)), r"Poem \d+"),
    "many blank lines at the end": ("It ebbs.\n" * 200 + "\n" * 3000, "It ebbs"),
    "documents that begin with a mark": ("".join(
        f"<|endoftext|>\nStory {i}\n\nOnce there was tide {i}.\n\nIt went out.\n\n" for i in range(200)), r"Story \d+"),
    "documents with a mark between them": ("<|endoftext|>".join(
        f"Story {i}: once there was a tide. It went out." for i in range(500)), r"Story \d+:"),
    "documents in tags": ("".join(f"<|startoftext|>joke {i}.\n\nHa.<|endoftext|>\n" for i in range(99)), r"<\|start"),
    "poems with more blank lines between them than in them": ("".join(
        f"Poem {i}\n\nof the\n\ntide\n\n\n" for i in range(99)), r"Poem \d+"),
    "documents that end with <eos>": ("".join(f"joke {i}.\n\nHa.<eos>\n" for i in range(99)), "joke"),
    "documents of Llama": ("".join(f"<s>joke {i}.\n\nHa.</s>\n" for i in range(99)), "<s>joke"),
}


def documents(text): return [part.strip() for part in text.split("<|endoftext|>") if part.strip()]


@pytest.mark.parametrize("shape", NEAR)
def test_every_shape_of_text_is_cut_near_80_10_10(load, tmp_path, shape):
    text, beginning = NEAR[shape]
    (tmp_path/"mine.txt").write_text(text, encoding="utf-8")
    corpus = load(tmp_path/"mine.txt")
    parts = [corpus.path(split).read_text(encoding="utf-8") for split in SPLITS]
    if corpus.report.rule.startswith("cut"): assert "".join(parts) == text
    else: assert sorted(sum(map(documents, parts), [])) == sorted(documents(text))
    size = len(text.rstrip().encode())
    ends = [corpus.bytes["train"] / size, (corpus.bytes["train"] + corpus.bytes["validation"]) / size]
    assert 0.75 <= ends[0] <= 0.85 and 0.85 <= ends[1] <= 0.95
    for part in parts[1:]: assert re.match(beginning, part.lstrip("\n")), part[:40]


@pytest.mark.parametrize("unit", ["🌊", "é", "a tide. ", "潮水。", "It ebbs\n\n", "A tide<|endoftext|>", " \n\n\n x"])
def test_even_a_short_text_has_three_parts(unit):
    for size in range(64, 500):
        text = (unit * 500).encode()[:size].decode(errors="ignore").strip().encode()
        if len(text) < 64: continue
        first = cut_near(io.BytesIO(text), len(text), 0.8)
        second = cut_near(io.BytesIO(text), len(text), 0.9, first)
        for part in (text[:first], text[first:second], text[second:]): assert part.decode().strip()


def test_the_source_says_the_real_shares(load, tmp_path):
    (tmp_path/"mine.txt").write_text("<|endoftext|>".join("It ebbs. " * n for n in (77, 11, 12)))
    assert load(tmp_path/"mine.txt").source == f"{tmp_path/'mine.txt'}, cut 76/12/12"


def test_of_documents_that_are_too_long_a_paragraph_is_cut_off(load, tmp_path):
    (tmp_path/"two.txt").write_text("It ebbs.\n\n" * 50 + "<|endoftext|>" + "It flows.\n\n" * 50)
    corpus = load(tmp_path/"two.txt")
    assert re.search(r"cut (79|80)/", corpus.source) and corpus.validation.read_text().startswith("It flows.\n\n")


@pytest.mark.parametrize("ends", ["\r\n", "\r", "mixed"])
def test_line_ends_of_every_system_are_read_as_one(load, tmp_path, ends):
    text = "".join(f"Verse {i} of the tide\n" for i in range(300))
    lines = text.split("\n")[:-1]
    other = "".join(line + ("\n", "\r\n", "\r")[i % 3] for i, line in enumerate(lines)) if ends == "mixed" else (
        text.replace("\n", ends))
    for name, content in (("a.txt", text), ("b.txt", "\ufeff" + other)):
        (tmp_path/name).write_bytes(content.encode())
    plain, converted = load(tmp_path/"a.txt"), load(tmp_path/"b.txt")
    assert plain.sha256 == converted.sha256
    for name in ("train_file", "eval_file"):
        both = load(**{"train_file": tmp_path/"a.txt", "eval_file": tmp_path/"a.txt", name: tmp_path/"b.txt"})
        assert both.sha256["train"] == both.sha256["validation"] == sha256_of(tmp_path/"a.txt")
    (tmp_path/"set").mkdir()
    with zipfile.ZipFile(tmp_path/"set.zip", "w") as z: z.writestr("train.txt", other)
    (tmp_path/"set"/"train.txt").write_bytes(other.encode())
    for name in ("set", "set.zip"): assert load(tmp_path/name).sha256 == {"train": sha256_of(tmp_path/"a.txt")}
    assert (tmp_path/"b.txt").read_bytes() == ("\ufeff" + other).encode()


# ---- documents

def tide(day): return f"The tide of day {day}\n\ncame at {day % 12} o'clock and went out again.\n"


def parts(corpus): return {split: documents(corpus.path(split).read_text()) for split in corpus.bytes}


def test_a_document_never_changes_sides_when_the_data_grows(load, tmp_path):
    sides = {}
    for n in (400, 500, 900):  # in another order, and in files of another kind
        days = [tide(day) for day in range(n)][::-1 if n == 500 else 1]
        if n == 900: (tmp_path/"a.jsonl").write_text("\n".join(json.dumps(dict(text=day)) for day in days))
        else: (tmp_path/"a.txt").write_text("<|endoftext|>".join(days))
        corpus = load(tmp_path/("a.jsonl" if n == 900 else "a.txt"))
        assert corpus.report.documents == n and corpus.report.rule == f"each of {n} documents by its hash"
        now = {day: split for split, days in parts(corpus).items() for day in days}
        assert len(now) == n and sides.items() <= now.items()
        sides = now


def test_exact_duplicates_are_dropped_and_counted(load, tmp_path):
    days = [tide(day % 300) + "\n" * (day // 300) for day in range(400)]  # but for white space around them
    (tmp_path/"a.txt").write_text("<|endoftext|>".join(days))
    corpus = load(tmp_path/"a.txt")
    assert (corpus.report.documents, corpus.report.duplicates) == (300, 100)
    assert corpus.report.rule == "each of 300 documents by its hash"
    assert sorted(sum(parts(corpus).values(), [])) == sorted({tide(day).strip() for day in range(300)})
    assert corpus.report.characters == sum(len(tide(day)) for day in range(300))
    assert load(tmp_path/"a.txt") == corpus and "100 duplicates were dropped" in corpus._repr_html_()


def test_duplicates_of_a_few_documents_are_dropped_before_they_are_cut(load, tmp_path):
    (tmp_path/"poems").mkdir()
    for i in range(4): (tmp_path/"poems"/f"{i}.txt").write_text(f"Poem {i % 3}\n" * 9)
    corpus = load(tmp_path/"poems")
    assert (corpus.report.documents, corpus.report.duplicates) == (3, 1)
    assert corpus.report.rule == "cut by the place: 3 documents give no fair shares"
    assert "".join(corpus.path(s).read_text() for s in SPLITS).count("Poem 0") == 9


def test_what_is_held_out_is_not_trained_on(load, tmp_path):
    (tmp_path/"a.txt").write_text("<|endoftext|>".join(map(tide, range(50))))
    (tmp_path/"b.txt").write_text("<|endoftext|>".join(map(tide, range(40, 60))))
    corpus = load(train_file=tmp_path/"a.txt", eval_file=tmp_path/"b.txt")
    assert [len(days) for days in parts(corpus).values()] == [40, 20] and corpus.report.duplicates == 10
    assert corpus.report.rule == "as they are" and not {*parts(corpus)["train"]} & {*parts(corpus)["validation"]}
    with pytest.warns(UserWarning, match="hold the same text"):
        same = load(train_file=tmp_path/"a.txt", eval_file=tmp_path/"a.txt")
    assert same.train.read_bytes() == same.validation.read_bytes() == (tmp_path/"a.txt").read_bytes()


def test_a_training_text_that_is_held_out_as_a_whole_is_told(load, tmp_path):
    for name, days in (("a", 10), ("b", 12)):
        (tmp_path/f"{name}.txt").write_text("<|endoftext|>".join(map(tide, range(days))))
    with pytest.warns(UserWarning, match="hold the same text, all of train"):
        load(train_file=tmp_path/"a.txt", eval_file=tmp_path/"b.txt")


def test_a_folder_or_text_called_test_among_others_takes_none_of_them_away(load, tmp_path):
    for name in ("books/a.txt", "books/b.txt", "books/old/train.txt", "proj/book.txt", "proj/test/x.txt"):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_text(f"{name} " * 99)
    for name in "books", "proj":
        corpus = load(tmp_path/name)
        read = "".join(corpus.path(split).read_text() for split in SPLITS)
        assert all(str(path.relative_to(tmp_path)) in read for path in (tmp_path/name).rglob("*.txt"))
    (tmp_path/"proj"/"train.txt").write_text("tide " * 99)
    with pytest.warns(UserWarning, match="passed over: book.txt"): load(tmp_path/"proj")


def test_a_conversation_with_another_number_or_order_of_keys_is_the_same(load, tmp_path):
    def row(n, i):
        pairs = [("id", i), ("messages", [dict(role="user", content=f"{n}?"), dict(role="assistant", content="Yes.")])]
        return json.dumps(dict(pairs[::-1] if i % 2 else pairs))
    (tmp_path/"a.jsonl").write_text("\n".join(row(n % 300, n) for n in range(600)))
    corpus = load(tmp_path/"a.jsonl")
    assert (corpus.report.documents, corpus.report.duplicates) == (300, 300)


@pytest.mark.parametrize("name, text", [("a.jsonl", '{"text": "It ebbs'), ("a.csv", 'n,text\n1\n2\n')])
def test_a_table_of_bad_rows_alone_is_told_with_the_line(load, tmp_path, name, text):
    (tmp_path/name).write_text(text)
    with pytest.raises(ValueError, match=r"line [12]\b"): load(tmp_path/name)


def test_documents_of_very_unequal_lengths_are_cut_by_the_place(load, tmp_path):
    (tmp_path/"a.txt").write_text("<|endoftext|>".join([tide(0) * 900, *map(tide, range(1, 99)), tide(100) * 900]))
    corpus = load(tmp_path/"a.txt")
    assert corpus.report.rule == "cut by the place: 100 documents give no fair shares"
    assert 0.79 < corpus.report.shares["train"] < 0.81 and re.search(", cut 80/10/10$", corpus.source)
    assert corpus.report.longest == 900 * len(tide(100))


def test_the_report_says_what_was_read(load, tmp_path):
    (tmp_path/"set").mkdir()
    (tmp_path/"set"/"a.txt").write_bytes("ebb\r\nund Flut, größer".encode("utf-16"))
    rows = [json.dumps(dict(text=text)) for text in ("It flows.", "", "It ebbs. " * 99)]
    (tmp_path/"set"/"b.jsonl").write_text("\n".join(rows) + '\n{"te')
    with pytest.warns(UserWarning): corpus = load(train_file=tmp_path/"set", on_bad_lines="skip")
    report = corpus.report
    assert (report.documents, report.longest) == (3, 9 * 99) and report.skipped == {"empty": 1, "bad lines": 1}
    assert report.line_ends == {"Windows": 1, "Unix": 1} and report.encodings == {"utf-16": 1, "utf-8": 1}
    assert abs(sum(report.shares.values()) - 1) < 1e-9
    for said in ("bad lines: 1", "Windows: 1", "utf-16: 1"): assert said in corpus._repr_html_()
    assert Corpus.from_dict(json.loads(json.dumps(corpus.to_dict()))) == corpus


def test_a_corpus_of_older_rules_is_made_again(load, tmp_path, monkeypatch):
    (tmp_path/"a.txt").write_text("<|endoftext|>".join(map(tide, range(400))))
    new = load(tmp_path/"a.txt")
    monkeypatch.setattr("colab_gpt2.text.corpus.RULES", 1)
    assert load(tmp_path/"a.txt").train.parent != new.train.parent
    manifest = new.train.parent/"corpus.json"
    known = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({name: value for name, value in known.items() if name != "report"}))
    assert recall(new.train.parent) is None


# ---- folders and patterns

@pytest.fixture
def poems(tmp_path):
    for name in ("10.TXT", "2.txt", "1.txt", "more/11.md", ".draft.txt", ".git/12.txt", "13.txt"):
        (tmp_path/"poems"/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/"poems"/name).write_bytes(f"Poem {name}\r\nof the tide\n".encode() if name != "13.txt" else b" \n")
    return tmp_path/"poems"


POEMS = [f"Poem {name}\nof the tide\n" for name in ("1.txt", "2.txt", "10.TXT", "more/11.md")]


def test_a_folder_of_texts_is_read_in_order_as_documents(load, poems):
    before = snapshot(poems)
    for corpus in (load(poems), load(train_file=poems), load(str(poems))):
        assert "".join(corpus.path(s).read_text() for s in SPLITS) == "<|endoftext|>".join(POEMS)
        assert corpus.name == "poems" and corpus.source.startswith(f"4 files of {poems}, cut ")
    both = load(train_file=poems/"1.txt", eval_file=poems)
    assert both.train.read_text() == POEMS[0] and both.validation.read_text() == "<|endoftext|>".join(POEMS)
    assert snapshot(poems) == before


def test_a_pattern_stands_for_its_files(load, poems, monkeypatch):
    expected = "<|endoftext|>".join(POEMS[:3])
    corpus = load(train_file=poems/"*.[tT]*", hold_out=False)
    assert corpus.train.read_text() == expected and corpus.name == "texts"
    monkeypatch.chdir(poems)
    (poems/"3.txt").write_text("Poem 3\n" * 9)
    with pytest.raises(ValueError, match=r"2 files of \[12\].txt has 58 bytes, too few"): load("[12].txt")
    for name in ("*.txt", "./*.txt"): assert load(name).source.startswith("3 files of *.txt, cut ")
    (poems/"a[1].txt").write_text("It ebbs. " * 20)  # a name, and not a pattern
    assert load(poems/"a[1].txt").name == "a[1]"
    with pytest.raises(FileNotFoundError, match=r"No text matches .*poems/\*\.doc\.") as e:
        load(train_file=poems/"*.doc")
    assert fields_of(e.value) == ("train_file",)


@pytest.mark.parametrize("folders", [("train", "valid"), ("train", "test"), ("train", "val", "test"), ("train", "dev")])
def test_a_folder_for_each_split(load, tmp_path, folders):
    for folder in folders:
        (tmp_path/"set"/folder).mkdir(parents=True)
        for i in (10, 9): (tmp_path/"set"/folder/f"{i}.txt").write_text(f"{folder} {i}\n")
    corpus = load(tmp_path/"set")
    assert [*corpus.bytes] == [dict.fromkeys(("val", "valid", "dev"), "validation").get(f, f) for f in folders]
    texts = [corpus.path(split).read_text() for split in corpus.bytes]
    assert texts == [f"{folder} 9\n<|endoftext|>{folder} 10\n" for folder in folders]
    assert load(train_file=tmp_path/"set") == corpus


def test_a_poem_called_test_is_no_split(load, poems):
    (poems/"test.txt").write_text("Poem called test\n" * 9)
    assert "Poem 1.txt" in load(poems).train.read_text()


def test_of_a_folder_only_texts_are_read_and_a_bad_one_is_named(load, poems):
    (poems/"cover.jpg").write_bytes(b"\xff\xd8\xff\0")
    assert load(poems).source.startswith("4 files of ")
    (poems/"3.txt").write_bytes("größe".encode("latin-1"))
    with pytest.raises(ValueError, match="3.txt, line 1: the byte 0xf6"): load(poems)
    for path in [*poems.rglob("*.*")]: path.suffix in (".txt", ".TXT", ".md") and path.unlink()
    with pytest.raises(FileNotFoundError, match=r"poems holds no corpus.* by a pattern, as .*poems/\*.tex"): load(poems)


def test_documents_stay_complete_in_a_folder_of_many(load, tmp_path):
    (tmp_path/"many").mkdir()
    for i in range(200):
        (tmp_path/"many"/f"{i}.txt").write_text(f"Story {i}\n\nOnce there was a tide.\n\nIt ebbed {i}.\n")
    corpus = load(tmp_path/"many")
    parts = [corpus.path(split).read_text() for split in SPLITS]
    assert all(part.startswith("Story ") for part in parts) and sum(p.count("Story") for p in parts) == 200
    assert re.search(r", split by document (7|8)\d/\d+/\d+$", corpus.source)


# ---- what is no text

OTHERS = dict.fromkeys(("d.html", "d.doc", "d.PDF", "d.rtf", "d.tar.gz", "d.xlsx"),
                       (b"a,b", r"a \.\w+ file, not plain text"))
OTHERS |= {"bom.txt": (b"\xef\xbb\xbf \n", "empty:"), "picture.md": (b"\x89PNG\0", "binary, not text: byte 4")}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_of_another_kind_is_named_as_what_it_is(load, tmp_path, name):
    content, said = OTHERS[name]
    (tmp_path/name).write_bytes(content)
    for argument in ("train_file", "eval_file"):
        with pytest.raises(ValueError, match=f"{name} is {said}") as e: load(**{argument: tmp_path/name})
        assert "\n" not in str(e.value) and fields_of(e.value) == (argument,)


@pytest.mark.parametrize("line", ['{"text": "It ebbs."}', '[{"text": "It ebbs."},', "<!DOCTYPE html>", "<?xml ?>",
                                  r"{\rtf1\ansi It ebbs.}", "%PDF-1.4", "%!PS-Adobe-3.0"])
def test_a_text_in_the_syntax_of_another_program_is_noted(load, tmp_path, line):
    (tmp_path/"a.txt").write_text(f"{line}\n" * 900)
    with pytest.warns(UserWarning, match="a.txt is JSON, HTML or RTF, whose syntax will be"):
        load(tmp_path/"a.txt")


@pytest.mark.parametrize("sign", [",", ";", "\t", "|"])
def test_a_table_called_txt_is_noted(load, tmp_path, sign):
    rows = [["id", "text"], *([f"{n}", f'"It ebbs{sign} and{sign}\nit ""flows""."'] for n in range(200))]
    (tmp_path/"a.txt").write_text("\n".join(map(sign.join, rows)))
    with pytest.warns(UserWarning, match="a.txt is a table .CSV., whose syntax will be"): load(tmp_path/"a.txt")
    (tmp_path/"b.txt").write_text("It ebbs and flows.\n" * 200)
    with pytest.warns(UserWarning, match="a.txt is a table"):
        load(train_file=tmp_path/"b.txt", eval_file=tmp_path/"a.txt")


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_file_that_gets_its_right_name_is_read_again(load, tmp_path, name):
    rows = ["text,n", *(f"It ebbs at {n}.,{n}" for n in range(200))]
    if name == "a.jsonl": rows = [json.dumps(dict(text=f"It ebbs at {n}.")) for n in range(200)]
    (tmp_path/"a.txt").write_text("\n".join(rows))
    with pytest.warns(UserWarning, match="whose syntax will be learned"): load(tmp_path/"a.txt")
    (tmp_path/"a.txt").rename(tmp_path/name)
    corpus = load(tmp_path/name)
    assert corpus.report.documents == 200 and corpus.train.read_text().startswith("It ebbs")


@pytest.mark.parametrize("given", [dict(dataset_train_split="validation"), dict(dataset_test_split="train"),
                                   dict(dataset_config="x"), dict(dataset_text_field="text")])
def test_an_option_that_does_nothing_with_a_text_is_refused(load, tmp_path, given):
    (tmp_path/"a.csv").write_text("text\n" + "It ebbs and flows.\n" * 200)
    [(field, value)] = given.items()
    texts = [("python-docs", {})] if field == "dataset_text_field" else [
        ("python-docs", {}), (tmp_path/"a.csv", {}), ("wikitext-2-raw-v1", dict(train_file=tmp_path/"a.csv"))]
    for name, files in texts:
        with pytest.raises(ValueError, match=f"^{field} is {value!r}, which only data sets on the Hub have; ") as e:
            load(name, **files, **given)
        assert fields_of(e.value) == (field,) and "\n" not in str(e.value)


def test_a_file_that_is_called_as_a_published_text_is_named(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"python-docs").mkdir()
    (tmp_path/"python-docs"/"a.txt").write_text("It ebbs and flows.\n" * 200)
    with pytest.warns(UserWarning, match="here too, which is not read: give ./python-docs for it"):
        assert load("python-docs").name == "python-docs"
    assert "ebbs" in load("./python-docs").train.read_text()


@pytest.mark.parametrize("lines", [
    "The tide came in, and went out.\n" * 90, "It ebbs,\n" * 200, "\tindented\n" * 200, "It ebbs.\n\n" * 200,
    "“No,” she said,\n" * 90, "11,000 men; 12,000 women\nand so on\n" * 90,
    "".join(f"<|startoftext|>It ebbs {n}.<|endoftext|>\n" for n in range(99)),
    "<|user|>Does it ebb?<|assistant|>It flows.\n" * 90])
def test_verse_and_prose_are_no_table(load, tmp_path, recwarn, lines):
    (tmp_path/"a.txt").write_text(lines)
    load(tmp_path/"a.txt")
    assert not [w for w in recwarn if "syntax" in str(w.message)]


@pytest.mark.parametrize("name", ["deep/page.html", "LICENSE"])
def test_what_is_passed_over_in_a_folder_is_noted(load, tmp_path, name):
    (tmp_path/"set"/"deep").mkdir(parents=True)
    for file, text in (("a.txt", "It ebbs.\n" * 500), (".hidden.csv", "a,b\n"), (name, "a,b\n")):
        (tmp_path/"set"/file).write_text(text)
    kind = name[name.find("."):] if "." in name else name
    with pytest.warns(UserWarning, match=f"1 of 2 files are passed over .{kind}.; .txt, .md, .*are read"):
        load(tmp_path/"set")


def test_braces_and_brackets_of_prose_are_not_noted(load, tmp_path, recwarn):
    for i, line in enumerate(("{Enter a ghost}", "<!-- by me -->", "[1] It ebbs.", "1984", "<s>It ebbs.</s>")):
        (tmp_path/f"{i}.txt").write_text(f"{line}\n" * 3000)
        load(tmp_path/f"{i}.txt")
    assert not recwarn.list


@pytest.mark.parametrize("argument", ["name", "train_file", "eval_file"])
def test_a_pipe_a_device_or_a_socket_is_refused_at_once(load, tmp_path, argument, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    os.mkfifo(tmp_path/"pipe.txt")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind("socket.txt")
        for path in (tmp_path/"pipe.txt", tmp_path/"socket.txt", "/dev/zero", "/dev/null"):
            with pytest.raises(ValueError, match=f"{path} is a pipe or a device") as e: load(**{argument: path})
            assert fields_of(e.value) == ("dataset" if argument == "name" else argument,)


def test_what_cannot_be_read_or_written_is_one_line(tmp_path):
    with pytest.raises(OSError, match="/proc/self/mem cannot be read: Input/output error") as e:
        load_corpus(train_file="/proc/self/mem", cache_dir=tmp_path)
    assert fields_of(e.value) == ("train_file",)
    (tmp_path/"file").write_text("It ebbs. " * 20)
    for cache_dir in (tmp_path/"file", "/proc/none"):
        with pytest.raises(OSError, match="corpora cannot be made: .*. Give another cache_dir.") as e:
            load_corpus(train_file=tmp_path/"file", cache_dir=cache_dir)
        assert fields_of(e.value) == ("cache_dir",)


# ---- too little text

def test_little_held_out_text_is_noted(load, tmp_path):
    small, large = tmp_path/"small.txt", tmp_path/"large.txt"
    small.write_text("Verse of the song about the tide.\n" * 50)
    large.write_text("Verse of the song about the tide.\n" * 400)
    for arguments in (dict(train_file=small), dict(name=small), dict(train_file=large, eval_file=small)):
        if "eval_file" in arguments: small.write_text("A verse.\n")
        with pytest.warns(UserWarning, match=r"Only \d+ bytes of .* are held out") as warned: load(**arguments)
        assert fields_of(warned[0].message) == ("eval_file",)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(large)
        load(train_file=small, hold_out=False)


# ---- what is like something else

def test_hashes_take_sixteen_bytes_each():
    known = Numbers()
    for number in range(1, 50_001): known.add(number * 0x9E3779B97F4A7C15 % 2**64)
    assert known.count == 50_000 and len(known.table) * 8 <= 16 * 50_000


def test_ones_own_file_may_be_called_stream(load, tmp_path):
    (tmp_path/"mountain.stream").write_text(ARTICLES)
    assert load(train_file=tmp_path/"mountain.stream", hold_out=False).bytes == {"train": len(ARTICLES)}


@pytest.mark.filterwarnings("ignore:The held-out text")
def test_bad_lines_of_a_zip_and_null_rows_of_wikitext_are_no_end(load, tmp_path):
    with zipfile.ZipFile(tmp_path/"a.zip", "w") as archive:
        for split in SPLITS: archive.writestr(f"wiki.{split}.raw", b"It ebbs.\nIt fl\xf6ws.\nThe " + split.encode())
    with pytest.raises(ValueError, match="line 2: the byte 0xf6"): load(tmp_path/"a.zip")
    with pytest.warns(UserWarning, match="1 bad line is left out"): corpus = load(tmp_path/"a.zip", on_bad_lines="skip")
    assert corpus.test.read_text() == "It ebbs.\nThe test"
    rows = [None, " = Tide = \n", "", None, " It ebbs . \n"]
    (tmp_path/"set").mkdir()
    (tmp_path/"set"/"train.jsonl").write_text("\n".join(json.dumps(dict(text=row)) for row in rows))
    assert load(tmp_path/"set").train.read_text() == " \n = Tide = \n \n \n It ebbs . \n"


def test_conversations_that_the_disk_has_no_room_for_are_told_and_leave_nothing(load, tmp_path, monkeypatch):
    from datasets import Dataset
    rows = {"train": Dataset.from_list([dict(prompt="High?", completion="No.")]).to_iterable_dataset()}
    def full(*given): raise OSError(28, "No space left on device")
    for module in ("corpus", "streams"): monkeypatch.setattr(f"colab_gpt2.text.{module}.open_hub", lambda *given: rows)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *given: SimpleNamespace(sha="5e1f"))
    monkeypatch.setattr("colab_gpt2.text.corpus.check_space", full)
    with pytest.raises(OSError, match="a/b holds conversations, for which the disk has no room.* cache_dir") as caught:
        load("a/b")
    assert "\n" not in str(caught.value) and not any((tmp_path/"cache"/"corpora").iterdir())


def test_a_cache_that_cannot_be_locked_is_told_in_a_line(tmp_path, monkeypatch):
    def refused(path): raise PermissionError(13, "Permission denied", path)
    monkeypatch.setattr("colab_gpt2.text.corpus.sole_owner", refused)
    with pytest.raises(PermissionError, match="^Writing name to .* failed: ") as caught:
        cached(tmp_path/"corpus", "name", "source", lambda stage: {})
    assert "\n" not in str(caught.value) and not any(tmp_path.iterdir())


def test_marks_alone_are_no_text_to_evaluate_on(load, tmp_path):
    (tmp_path/"a.txt").write_text(ARTICLES)
    (tmp_path/"b.txt").write_text("<|endoftext|>\n" * 3)
    with pytest.raises(ValueError, match="b.txt is empty: all of its documents are"):
        load(train_file=tmp_path/"a.txt", eval_file=tmp_path/"b.txt")


def test_millions_of_blanks_take_neither_memory_nor_time(tmp_path):
    blank, began = b" " * (8 << 20), time.process_time()
    for name, content in dict(inside=b"It" + blank + b"ebbs.", after=b"It ebbs. " * 20 + blank).items():
        (tmp_path/name).write_bytes(content)
    tracemalloc.start()
    try:
        assert Documents(tmp_path/"inside", Numbers()).kept == 1
        cut_text(tmp_path/"after", tmp_path, "after")
        assert tracemalloc.get_traced_memory()[1] < 6 << 20
    finally: tracemalloc.stop()
    assert 0 < os.path.getsize(tmp_path/"train.txt") < 180 and time.process_time() - began < 20
