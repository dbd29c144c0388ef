"Files as they are found: formats, encodings, columns, folders; and what is wrong, in one line, with its place."
import bz2, csv, gzip, io, json, lzma, random, time, tracemalloc, zipfile
from collections import Counter

import pytest

from colab_gpt2.errors import fields_of
from colab_gpt2.text.fields import pick_field
from colab_gpt2.text.formats import END
from colab_gpt2.text.reading import find_texts, holds_chats, is_plain, read_documents, read_rows

TIDES = ["It ebbs,\nand flows.", 'He said: "It ebbs"; she said, "It\tflows".', "Größe, 潮水, 🌊", "{'a': 1}, [2]"]


def table(values, **options):
    text = io.StringIO()
    csv.writer(text, **options).writerows([["id", "text"], *enumerate(values)])
    return text.getvalue().encode()


def parquet(**columns):
    arrow, file = pytest.importorskip("pyarrow"), io.BytesIO()
    pytest.importorskip("pyarrow.parquet").write_table(arrow.table(columns), file)
    return file.getvalue()


def records(values): return [{"id": i, "text": text} for i, text in enumerate(values)]


def lines(values): return "\n".join(json.dumps(row, ensure_ascii=False) for row in values).encode()


FORMATS = {
    "a.csv": table(TIDES), "semicolons.csv": table(TIDES, delimiter=";"), "tabs.csv": table(TIDES, delimiter="\t"),
    "bars.csv": table(TIDES, delimiter="|"), "a.TSV": table(TIDES, delimiter="\t"),
    "unix.csv": table(TIDES, lineterminator="\n"), "excel.csv": b"sep=;\r\n" + table(TIDES, delimiter=";"),
    "excel with a mark.csv": b"\xef\xbb\xbfsep=\t\r\n" + table(TIDES, delimiter="\t"),
    "quoted.csv": table(TIDES, quoting=csv.QUOTE_ALL), "mac.csv": table(TIDES, lineterminator="\r"),
    "marked.csv": b"\xef\xbb\xbf" + table(TIDES), "windows.csv": table(TIDES).decode().encode("utf-16"),
    "a.jsonl": lines(records(TIDES)), "a.ndjson": lines(records(TIDES)) + b"\n\n", "alone.jsonl": lines(TIDES),
    "windows.jsonl": b"\xef\xbb\xbf" + lines(records(TIDES)).replace(b"\n", b"\r\n"),
    "lines.json": lines(records(TIDES)),
    "a.json": json.dumps(records(TIDES)).encode(), "indented.json": json.dumps(records(TIDES), indent=2).encode(),
    "list.jsonl": json.dumps(records(TIDES)).encode(), "a.parquet": parquet(id=range(4), text=TIDES)}


@pytest.fixture
def read(tmp_path):
    "The texts in a file with this content, or in files that are there."
    def run(name, content=None, field=None, **options):
        if content is not None: (tmp_path/name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return [document.text for document in read_documents(find_texts(tmp_path/name), field, **options)]
    return run


@pytest.fixture
def refused(read, tmp_path):
    "What is said of a file with this content: in one line, without the folder."
    def run(*args, **options):
        with pytest.raises((ValueError, OSError)) as e: read(*args, **options)
        assert "\n" not in str(e.value)
        return str(e.value).replace(f"{tmp_path}/", "")
    return run


# ---- what is read

@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("packed", ["", ".gz", ".bz2", ".XZ"])
def test_every_format_gives_the_same_documents(read, name, packed):
    packing = {".gz": gzip.compress, ".bz2": bz2.compress, ".XZ": lzma.compress}
    assert read(name + packed, packing.get(packed, bytes)(FORMATS[name])) == TIDES


@pytest.mark.parametrize("name, text", [
    ("a.txt", "It ebbs.\r\nIt flows.\r\n\x1a"), ("b.txt", "It ebbs.\nIt flows.\n" + "\x1a" * 99),
    ("c.csv", "text\r\n\"It ebbs.\nIt flows.\n\"\r\n\x1a"), ("d.jsonl", '{"text": "It ebbs.\\nIt flows.\\n"}\n\x1a')])
def test_the_ctrl_z_that_ends_a_text_of_dos_is_dropped_and_told(read, name, text):
    counts = Counter()
    assert read(name, text, skipped=counts) == ["It ebbs.\nIt flows.\n"]
    assert counts["Ctrl-Z at the end"] == 1


def test_a_ctrl_z_within_a_text_stays(read):
    assert read("a.txt", "It ebbs.\x1a\n\x1aIt flows.\n") == ["It ebbs.\x1a\n\x1aIt flows.\n"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", ["It ebbs,\nand flows.\n", "潮水来了。\n潮水退了。\n" * 9, "Größe\nПрилив\n"])
def test_every_encoding_of_unicode_is_recognised(read, text, encoding):
    assert read("a.txt", text.replace("\n", "\r\n").encode(encoding)) == [text]
    assert read("a.txt.gz", gzip.compress(text.encode(encoding))) == [text]


def test_documents_of_a_text_stay_documents(read, tmp_path):
    parts = ["One.\n", "\nTwo\n\n", "Three" * 300_000, "Four."]
    assert read("a.txt", END.join([" \n", *parts, "\n"])) != parts  # the third is long
    found = list(read_documents([tmp_path/"a.txt"]))
    assert any(document.more for document in found)
    assert "".join(d.text + "|" * (not d.more) for d in found) == "|".join([*parts, ""])


def test_a_mark_is_found_wherever_the_reading_pauses(read, tmp_path):
    ones = [f"{'x' * n}" for n in range((1 << 16) - 40, (1 << 16) + 40, 7)]
    assert read("a.txt", END.join(ones)) == ones


def test_texts_and_tables_of_a_folder_are_read_in_order(read, tmp_path):
    (tmp_path/"set"/"deep").mkdir(parents=True)
    files = {"10.txt": b"Ten.", "9.md": b"Nine.", "deep/a.jsonl": lines(records(["A."])), "b.csv": table(["B."]),
             "c.parquet": parquet(text=["C."]), "d.txt.gz": gzip.compress(b"D."), "e.json": b'["E."]',
             ".hidden.txt": b"hidden", "blank.md": b" \n"}
    for name, content in files.items(): (tmp_path/"set"/name).write_bytes(content)
    assert read("set") == ["Nine.", "Ten.", "B.", "C.", "D.", "A.", "E."]
    assert read("set/*.[cj]s*") == ["B.", "E."]


def test_links_that_lead_in_a_circle_are_not_followed(read, tmp_path):
    (tmp_path/"set").mkdir()
    (tmp_path/"set"/"a.txt").write_text("It ebbs.")
    (tmp_path/"set"/"again").symlink_to(tmp_path/"set")
    (tmp_path/"set"/"self.txt").symlink_to(tmp_path/"set"/"self.txt")
    assert read("set") == ["It ebbs."]


# ---- which column

@pytest.mark.parametrize("row, column", [
    ({"text": "Ebb.", "title": "The great tide"}, "text"), ({"Content": "It ebbs.", "url": "http://a.b"}, "Content"),
    ({"id": "17", "label": "pos", "review": "It ebbs and flows."}, "review"), ({"word": "ebb", "n": "4"}, "word"),
    ({"document": 17, "summary": "It ebbs and flows."}, "summary"),
    ({"date": "2020-01-01 10:00", "post": "It ebbs."}, "post")])
def test_the_column_of_the_text_is_found(read, row, column):
    assert read("a.jsonl", lines([row])) == [row[column]]
    assert read("a.csv", "\n".join([",".join(row), ",".join(map(str, row.values()))])) == [row[column]]


FILMS = lines([{"title": "The great tide", "review": "It ebbs and flows.", "stars": 4, "tags": ["a"]}])


@pytest.mark.parametrize("field, said", [
    (None, "a.jsonl has 2 columns that may hold the text: title (text), review (text), stars (numb"),
    ("reviews", "dataset_text_field is 'reviews', which .*a.jsonl has not; it has title .*Did you mean 'review'?"),
    ("stars", "dataset_text_field is 'stars', which holds numbers in "), ("tags", "'tags', which holds lists in ")])
def test_a_column_that_is_not_clear_is_asked_for(read, field, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(").replace(")", r"\)").replace("?", r"\?")) as e:
        read("a.jsonl", FILMS, field)
    assert fields_of(e.value) == ("dataset_text_field",)


def test_questions_and_answers_under_other_names_are_told_what_to_call_them(read):
    with pytest.raises(ValueError, match="name the columns of a question and its answer prompt and completion.$"):
        read("a.jsonl", lines([dict(instruction="Tell of tides.", input="", output="It ebbs and flows.")]))
    assert read("a.jsonl", FILMS, "review") == ["It ebbs and flows."]


def test_tables_of_one_folder_may_have_different_columns(read, tmp_path):
    (tmp_path/"set").mkdir()
    (tmp_path/"set"/"1.csv").write_bytes(table(["It ebbs."]))
    (tmp_path/"set"/"2.jsonl").write_bytes(lines([{"story": "It flows."}]))
    assert read("set") == ["It ebbs.", "It flows."]
    with pytest.raises(ValueError, match="2.jsonl has not; it has story"): read("set", field="text")


def test_empty_rows_are_left_out_and_counted(read):
    counts = Counter()
    values = [*records(["It ebbs.", "", " \n", "It flows."]), {"text": None}]
    assert read("a.jsonl", lines(values), skipped=counts) == ["It ebbs.", "It flows."] and counts["empty"] == 3
    assert read("a.csv", table(["It ebbs.", "", " "])) == ["It ebbs."]
    assert read("a.csv", "text,text,,\nIt ebbs.,b,,\n") == ["It ebbs."]  # of two with one name, the first


def test_where_nothing_is_left_it_is_said_why(read, refused):
    assert refused("a.csv", table(["", " "]), "text") == "a.csv holds no text (empty: 2)."
    with pytest.warns(UserWarning, match="2 bad lines are left out"):
        assert refused("b.jsonl", '{"a\n{"text": "It', on_bad_lines="skip") == "b.jsonl has no rows."


def test_a_table_without_names_of_columns_is_noted(read):
    with pytest.warns(UserWarning, match="The first line of .*a.csv is read as the names of columns: 'The tide"):
        assert read("a.csv", "The tide came in.\nIt went out.\n") == ["It went out."]


@pytest.mark.parametrize("rows, chats", [
    ([{"messages": [{"role": "user", "content": "Tide?"}]}], True),
    ([{"prompt": "Tide?", "completion": "It ebbs."}], True),
    ([{"messages": None, "kind": "open question"}, {"messages": [{"role": "user", "content": "Tide?"}]}], True),
    ([{"prompt": "Tide?"}, {"prompt": "Tide?", "completion": "It ebbs."}], True),
    ([{"text": "It ebbs."}], False), (["It ebbs."], False), ([{"prompt": "Tide?"}], False)])
def test_conversations_are_recognised_and_given_as_they_are(tmp_path, rows, chats):
    (tmp_path/"a.jsonl").write_bytes(lines(rows))
    assert holds_chats([tmp_path/"a.jsonl"]) is chats
    if chats: assert [row.values for row in read_rows([tmp_path/"a.jsonl"])] == rows


@pytest.mark.parametrize("row", [
    dict(instruction="Translate.", input="The tide", output="La marée"),
    dict(instruction="Translate.", context="The tide", response="La marée", category="words")], ids=["Alpaca", "Dolly"])
def test_an_instruction_with_its_input_and_output_is_a_question_and_its_answer(tmp_path, row):
    (tmp_path/"a.jsonl").write_bytes(lines([row, row | dict(input="", context="")]))
    asked, answer = (dict(role="user", content="Translate.\n\nThe tide"), dict(role="assistant", content="La marée"))
    found = [row.values for row in read_rows([tmp_path/"a.jsonl"])]
    assert holds_chats([tmp_path/"a.jsonl"])
    assert found == [dict(prompt=[asked], completion=[answer]),
                     dict(prompt=[asked | dict(content="Translate.")], completion=[answer])]


def test_answers_of_a_word_or_a_number_do_not_leave_the_questions_alone_as_the_text():
    for answer in ("Paris", "42", 42):
        with pytest.raises(ValueError, match="2 columns that may hold the text.* prompt and completion"):
            pick_field([dict(question="What is the capital?", answer=answer)], None, "a.csv")


# ---- what is wrong, and where

BAD = {  # name -> (content, what is said, what is left with on_bad_lines="skip")
    "quote.csv": ('id,text\n1,"It ebbs."\n2,"It "flows"."\n3,Twice.\n', "line 3: a quotation mark is not closed", 2),
    "open.csv": ('id,text\n1,"It\nebbs."\n2,"It flows.\n3,Twice.\n4,"Thrice."\n', "line 4: a quotation mark is not", 3),
    "end.csv": ('id,text\n1,"It ebbs."\n2,"It flows.', "line 3: a quotation mark is not closed", 1),
    "long.csv": ("id,text\n1,It ebbs.\n2,It ebbs, it flows.\n", "line 3: 3 columns, where the first line has 2", 1),
    "short.csv": ('id,text\n1,"It\n\nebbs."\n2\n3,Twice.\n', "line 5: 1 column, where the first line has 2", 2),
    "zero.csv": ("id,text\n1,It ebbs.\n2,It\0flows.\n", "line 3: a zero byte", 1),
    "latin.csv": ("id,text\n1,It ebbs.\n2,größe\n".encode("latin-1"), "line 3: the byte 0xf6, which is not UTF-8", 1),
    "cut.jsonl": ('{"text": "It ebbs."}\n\n{"text": "It fl', "line 3: broken or cut off JSON", 1),
    "middle.jsonl": ('{"text": "It ebbs."}\n{"text": "It fl\n{"text": "Twice."}\n', "line 2: broken or cut off", 2),
    "deep.jsonl": ('{"text": "It ebbs."}\n' + "[" * 99_999, "line 2: broken or cut off JSON", 1),
    "digits.jsonl": ('{"text": "It ebbs."}\n{"text": "It flows.", "id": ' + "9" * 5_000 + "}\n",
                     "line 2: broken or cut off JSON (too deep, or a number is too long)", 1),
    "other.jsonl": ('{"text": "It ebbs."}\n{"body": "It flows."}\n', "line 2: there is no 'text'", 1),
    "number.jsonl": ('{"text": "It ebbs."}\n{"text": 7}\n', "line 2: 'text' is no text but int", 1),
    "nested.jsonl": ('{"text": "It ebbs."}\n{"text": {"a": "b"}}\n', "line 2: 'text' is no text but dict", 1),
    "half.jsonl": ('{"text": "It ebbs."}\n{"text": "\\ud83d"}\n', "line 2: 'text' has half of a character", 1),
    "latin.jsonl": ('{"text": "It ebbs."}\n{"text": "größe"}\n'.encode("latin-1"), "line 2: the byte 0xf6", 1),
    "list.jsonl": ('{"text": "It ebbs."}\n[1, 2]\n', "line 2: no record ({…}) but [1, 2]", 1),
    "cut.json": ('[{"text": "It ebbs."},\n {"text": "It fl', "line 2: broken or cut off JSON; what follows", 1),
    "comma.json": ('[{"text": "It ebbs."},\n {"text": "It flows."}', "line 2: broken or cut off JSON; what follows", 1),
    "after.json": ('[{"text": "It ebbs."}]\n{"text": "It flows."}', "line 1: the list ends here", 1),
    "latin.txt": ("It ebbs.\nDie größte Brücke.\nTwice.\n".encode("cp1252"), "line 2: the byte 0xf6", 1),
    "cut.txt.gz": (gzip.compress(b"It ebbs.\n" * 9 + random.Random(1).randbytes(99).hex().encode())[:-20],
                   "the compressed file is cut off or damaged here", 1),
    "damaged.xz": (lzma.compress(b"It ebbs.\n" + random.Random(1).randbytes(99_999).hex().encode())[:-99] + bytes(99),
                   "the compressed file is cut off or damaged here", 1),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_broken_is_told_with_its_line_or_left_out(read, refused, name):
    content, said, left = BAD[name]
    told = refused(name, content)
    assert told.startswith(f"{name}, line ") and said in told and "set on_bad_lines='skip'" in told
    counts = Counter()
    with pytest.warns(UserWarning, match=rf"{name}: 1 bad line is left out; the first is line "):
        assert len(read(name, on_bad_lines="skip", skipped=counts)) == left
    assert counts["bad lines"] == 1


REFUSED = {
    "text.csv": ("id,text\n", "text.csv has no rows."),
    "n.parquet": (parquet(n=[1, 2]), "n.parquet has no column with text"),
    "no.parquet": (b"PAR1 no", "no.parquet is no parquet file, or is damaged"),
    "plain.gz": (b"It ebbs.", "plain.gz is no intact .gz file"),
    "a.csv.gz": (b"id,text\n1,a", "a.csv.gz is no intact .gz file"),
    "plain.bz2": (b"It ebbs.", "plain.bz2 is no intact .bz2 file. Compress it again, or take .bz2 off its name."),
    "cut.xz": (lzma.compress(b"It ebbs.")[:20], "cut.xz is no intact .xz file"),
    "one.json": ('{\n "text": "It ebbs."}', "one.json is one JSON obj"),
    "photo.txt": (b"\xff\xd8\xff\xe0\0\x10JFIF\0\1", "photo.txt is binary, not text: byte 4 is zero"),
    "nested.json": ('{"data": [{"text": "It ebbs."}]}', "nested.json has no column with text; it has data (lists)"),
    "shared.json": ('[{"conversations": [{"from": "human", "value": "Why?"}]}]', "it has conversations (lists). "
                    "Give 'messages' with role and content to learn conversations."),
    "numbers.csv": ("id,n\n1,2\n", "numbers.csv has no column with text; it has id (numbers), n (numbers)"),
    "empty.csv": ("id,text\n1,\n2, \n", "empty.csv has no column with text; it has id (numbers), text (empty)"),
    "names.csv": ('"a\nb",c\n1,2\n', "names.csv has no column with text; it has a\\nb (numbers), c (numbers)"),
    "a.docx": (b"\xd0\xcf\x11\xe0", "a.docx is no Word document that can be read (File is not a zip file)"),
    "a.pdf": (b"%PDF-1.7", "a.pdf is a .pdf file, not plain text. Open it in Word or Google Docs, and save it as"),
    "a.xlsx": (b"PK", "a.xlsx is a .xlsx file, not plain text"), "a.tar.gz": (b"PK", "a.tar.gz is a .tar file"),
    "koi.txt": ("Прилив пришёл на рассвете, и лодки ушли в море.\n" * 20,
                "It seems to be koi8_r: convert it (iconv -f koi8_r"),
}


def word(*paragraphs, head=""):
    "A Word document, as Word writes it."
    tabs = '<w:pPr><w:tabs><w:tab w:val="left" w:pos="720"/></w:tabs></w:pPr>'
    body = "".join(f"<w:p>{tabs}{paragraph}</w:p>" for paragraph in paragraphs)
    names = "xmlns:w='http://schemas.openxmlformats.org/wordprocessingml/2006/main' xmlns:mc='compatibility'"
    with zipfile.ZipFile(file := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
        archive.writestr("word/document.xml", f"{head}<w:document {names}><w:body>{body}</w:body></w:document>")
    return file.getvalue()


def run(text): return f"<w:r><w:t xml:space='preserve'>{text}</w:t></w:r>"


@pytest.mark.parametrize("name", ["a.docx", "A.DOCX", "a.docx.gz"])
def test_a_word_document_is_read_a_line_a_paragraph(tmp_path, name):
    deleted = "<w:del><w:r><w:delText>never </w:delText></w:r></w:del><w:instrText>PAGE</w:instrText>"
    box = f"<mc:Choice><w:p>{run('A box.')}</w:p></mc:Choice><mc:Fallback><w:p>{run('A box.')}</w:p></mc:Fallback>"
    broken = run("潮水, “🌊”") + deleted + "<w:r><w:br/></w:r>" + run("at 7")
    data = word(run("It ") + run("ebbs &amp; flows."), "", broken, run("Beside ") + box)
    (tmp_path/name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    [text] = read_documents(find_texts(tmp_path))
    assert text.text == "It ebbs & flows.\n\n潮水, “🌊”\nat 7\nBeside \nA box.\n\n" and not is_plain(tmp_path/name)


def test_a_long_word_document_takes_little_memory(tmp_path):
    (tmp_path/"long.docx").write_bytes(word(*[run(f"On day {n} it ebbed and flowed.") for n in range(10_000)]))
    tracemalloc.start()
    try:
        size = sum(len(document.text) for document in read_documents([tmp_path/"long.docx"]))
        assert size > 320_000 and tracemalloc.get_traced_memory()[1] < 6e6  # 2 MB; all of it at once takes 15
    finally: tracemalloc.stop()


def test_a_word_document_made_to_fill_the_memory_is_refused(refused, monkeypatch):
    entities = "".join(f"<!ENTITY a{n} '{f'&a{n - 1};' * 10}'>" for n in range(1, 12))
    head = f"<!DOCTYPE d [<!ENTITY a0 'It ebbs.'>{entities}]>"
    assert "is no Word document" in refused("a.docx", word(run("&a11;"), head=head))
    monkeypatch.setattr("colab_gpt2.text.formats.HUGE", 10_000)
    assert "(it is too large)" in refused("b.docx", word(run("It ebbs. " * 10_000)))


def test_of_encodings_that_read_equally_well_all_are_named_the_western_one_first(refused):
    text = "Børnene løb over åen, og så så de en stor, rød bil på vejen.\n"
    assert "seems to be cp1252 or cp1250: convert it (iconv -f cp1252" in refused("da.txt", text.encode("cp1252") * 20)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_in_a_line(refused, name):
    content, said = REFUSED[name]
    assert said in refused(name, content.encode("koi8_r") if name == "koi.txt" else content)


def test_of_mixed_encodings_in_a_folder_the_file_is_named(refused, tmp_path):
    (tmp_path/"set").mkdir()
    for name, encoding in (("1.txt", "utf-8"), ("2.txt", "utf-16"), ("3.txt", "cp1251")):
        (tmp_path/"set"/name).write_text("Прилив пришёл на рассвете, и лодки ушли в море.\n", encoding=encoding)
    assert "3.txt, line 1: the byte 0xcf, which is not UTF-8. It seems to be cp1251" in refused("set")


@pytest.mark.parametrize("names, said", [
    ([], "set holds no corpus: it is empty."),
    (["a.jpg", "b.png"], "none of its 2 files (.jpg, .png) is a text or a table."),
    (["a.txt", "b.md"], "set holds no text: all 2 files are empty.")])
def test_a_folder_without_text_says_what_it_has(refused, tmp_path, names, said):
    (tmp_path/"set").mkdir()
    for name in names: (tmp_path/"set"/name).touch()
    assert said in refused("set")


def test_a_name_of_two_lines_is_told_in_one(refused):
    assert refused("po\nem.csv", "id,text\n1\n").startswith("po\\nem.csv, line 2: 1 column,")


def test_what_may_be_used_where_it_stands(tmp_path):
    plain = {"a.txt": b"It ebbs.", "b.raw": b"\xef\xbb\xbfIt ebbs.\n", "c.txt": b"a\r\n", "d.txt": b"\xf6",
             "e.csv": b"a", "f.txt.gz": b"a", "g.txt": "a".encode("utf-16"), "h.txt": b"It\0ebbs.",
             "i.txt.xz": b"a", "j.txt": b"It ebbs.\n\x1a"}
    for name, content in plain.items(): (tmp_path/name).write_bytes(content)
    assert [name for name in plain if is_plain(tmp_path/name)] == ["a.txt", "b.raw"]


# ---- memory

def story(n): return f"Story {n}: " + "the tide came in at dawn. " * 40


def big(name):
    texts = [story(n) for n in range(9000)]
    return dict(csv=table, jsonl=lambda t: lines(records(t)), json=lambda t: json.dumps(records(t)).encode(),
                txt=lambda t: END.join(t).encode(), parquet=lambda t: parquet(text=t))[name](texts)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "txt", "parquet"])
def test_memory_does_not_grow_with_a_table(tmp_path, kind):
    (tmp_path/f"a.{kind}").write_bytes(big(kind))
    tracemalloc.start()
    count = sum(len(document.text) > 900 for document in read_documents([tmp_path/f"a.{kind}"]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 9000 and peak < 4e6, f"{peak:,} bytes"


def test_a_quote_that_is_never_closed_does_not_fill_memory(tmp_path, monkeypatch):
    limit = csv.field_size_limit(1 << 18)
    try:
        (tmp_path/"a.csv").write_text('id,text\n1,"' + f"{story(1)}\n" * 9000)
        tracemalloc.start()
        with pytest.raises(ValueError, match="line 2: a quotation mark is not closed"):
            list(read_documents([tmp_path/"a.csv"]))
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()
        csv.field_size_limit(limit)


def test_what_is_read_is_reported_in_bytes(tmp_path):
    (tmp_path/"a.csv").write_bytes(table([story(n) for n in range(3000)]))
    heard = []
    list(read_documents([tmp_path/"a.csv"], report=lambda *said: heard.append(said)))
    size = (tmp_path/"a.csv").stat().st_size
    assert heard[-1] == ("Reading a.csv", size, size) and len(heard) > 3


@pytest.mark.parametrize("seed", range(3))
def test_tables_of_any_texts_come_back(read, seed):
    draw = random.Random(seed)
    texts = ["".join(draw.choices('ab ,;\t|"\'\n\\{}[]:é🌊', k=draw.randint(1, 60))) + "x" for _ in range(200)]
    files = {"a.csv": table(texts), "a.tsv": table(texts, delimiter="\t"), "a.jsonl": lines(records(texts)),
             "a.json": json.dumps(records(texts)).encode(), "a.parquet": parquet(text=texts)}
    for name, content in files.items(): assert read(name, content, "text") == texts, name


PIECES = b'"', b"\0", b"\r", b"[", b"{", b"\xff\xfe", b"\xf6", b",", b"}", b"]", b"\\", b"\n\n", b";", b"\t"


def spoilt(data, draw):
    "`data` with a few bytes changed, put in, left out or repeated."
    data = bytearray(data)
    for _ in range(draw.randint(1, 5)):
        at, kind = draw.randrange(len(data) + 1), draw.randrange(4)
        if kind == 0: data[at:at] = draw.choice(PIECES)
        if kind == 1: del data[at:at + draw.randint(1, 20)]
        if kind == 2: data[at:at + 1] = draw.randbytes(1)
        if kind == 3: data += data[:at]
    return bytes(data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["a.csv", "tabs.csv", "a.jsonl", "a.json", "a.parquet", "b.txt"])
def test_whatever_the_bytes_an_error_is_one_line(tmp_path, name):
    draw, packed = random.Random(name), name == "a.json"
    for _ in range(100):
        data = spoilt(FORMATS.get(name, f"It ebbs.{END}Größe\r\n".encode()), draw)
        path = tmp_path/f"{name}{'.gz' * packed}"
        path.write_bytes(gzip.compress(data)[:draw.choice([None, -9, 40])] if packed else data)
        for on_bad_lines in ("error", "skip"):
            try: list(read_documents(find_texts(path), None, on_bad_lines))
            except ValueError as e: assert "\n" not in str(e)


def test_columns_without_white_space_or_of_almost_numbers_take_no_time(read):
    "Pictures, genes, pages of Chinese."
    began, long = time.process_time(), 200_000
    row = dict(image="iVBORw0KGgo" * (long // 11), n="1 2 3 " * (long // 6) + "V", zh="潮水" * (long // 2))
    row["text"] = "A caption."
    assert read("a.jsonl", lines([row] * 9)) == ["A caption."] * 9
    assert time.process_time() - began < 60  # on any machine; hours, if each place were looked at again


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_zip_or_word_document_is_named(refused, tmp_path, method):
    from colab_gpt2.text.downloads import unzip
    def damaged(name):
        content = random.Random(0).randbytes(9000).hex()
        with zipfile.ZipFile(file := io.BytesIO(), "w", method) as made: made.writestr(name, content)
        return file.getvalue()[:300] + b"\xff" * 200 + file.getvalue()[500:]
    (path := tmp_path/"a.zip").write_bytes(damaged("wiki.train.raw"))
    with pytest.raises(ValueError, match=f"{path} cannot be unpacked: "): unzip(path, tmp_path)
    assert "a.docx is no Word document that can be read" in refused("a.docx", damaged("word/document.xml"))


def test_a_word_document_of_empty_paragraphs_is_read_in_little_memory(read):
    tracemalloc.start()
    try:
        with zipfile.ZipFile(file := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as made:
            made.writestr("word/document.xml", b"<d>" + b"<p/>" * 100_000 + b"<p><t>It ebbs.</t></p></d>")
        assert [text.strip() for text in read("a.docx", file.getvalue())] == ["It ebbs."]
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally: tracemalloc.stop()


@pytest.mark.parametrize("name, content", [
    ("a.jsonl", '{"text": "It ebbs."}\n{"text": "%s"}\n{"text": "It flows."}'),
    ("a.csv", 'id,text\n1,It ebbs.\n2,%s\n3,It flows.')])
def test_a_line_that_never_ends_is_a_bad_line(read, refused, monkeypatch, name, content):
    monkeypatch.setattr("colab_gpt2.text.formats.FIELD", 1000)
    at = 2 if name == "a.jsonl" else 3
    assert f"{name}, line {at}: over 1,000 characters. Correct it" in refused(name, content % ("It ebbs. " * 999))
    with pytest.warns(UserWarning, match="1 bad line is left out"): told = read(name, on_bad_lines="skip")
    assert told == ["It ebbs.", "It flows."]


def test_a_file_without_conversations_among_some_is_named(tmp_path):
    (tmp_path/"a.jsonl").write_bytes(lines([{"prompt": "Tide?", "completion": "It ebbs."}]))
    (tmp_path/"README.md").write_text("On tides.")
    with pytest.raises(ValueError, match="a.jsonl holds conversations, and .*README.md none: give files of one kind"):
        holds_chats(find_texts(tmp_path))
