"Downloads from a mirror that is right, lies, breaks off, refuses or is busy: the result, the message, what is left."
import hashlib, io, os, time, zipfile

import pytest, requests

from colab_gpt2.text.corpus import Published, load_corpus
from colab_gpt2.text.downloads import USER_AGENT, download
from colab_gpt2.errors import fields_of
from colab_gpt2.reporting import reporting
from helpers.servers import Mirror

CONTENT = os.urandom(300_000)
SHA = hashlib.sha256(CONTENT).hexdigest()
TEXTS = {"train": " \n = One = \n \n Some text . \n" * 50, "valid": " \n = Two = \n \n More . \n",
         "test": " \n = Three = \n \n Yet more . \n"}


@pytest.fixture
def mirror(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Mirror({"/a.bin": CONTENT}) as m: yield m


@pytest.fixture
def get(mirror, tmp_path):
    "Download /a.bin into the empty folder tmp_path, without pauses."
    return lambda sha=SHA, **more: download(mirror.url + "/a.bin", tmp_path/"a.bin", sha, **{"wait": 0, **more})


def left(folder): return sorted(p.name for p in folder.iterdir())
def ranges(mirror): return [headers.get("Range") for _, _, headers in mirror.log]


def wikitext_zip(texts=TEXTS):
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as z:
        for split, text in texts.items(): z.writestr(f"wikitext-2-raw/wiki.{split}.raw", text)
    return memory.getvalue()


def published(content, *sources): return {"w-raw": Published(sources, hashlib.sha256(content).hexdigest())}


def test_right_bytes_come_in_one_request_under_our_own_name(mirror, get, tmp_path):
    assert get().read_bytes() == CONTENT
    assert left(tmp_path) == ["a.bin"]
    assert [h["User-Agent"] for _, _, h in mirror.log] == [USER_AGENT]
    get()
    assert len(mirror.log) == 1  # what is there and right is not asked for again


def test_resumes_where_it_broke_off(mirror, get, tmp_path):
    mirror.lie("/a.bin", "cut")
    assert get().read_bytes() == CONTENT
    assert ranges(mirror) == [None, "bytes=150000-"]
    assert left(tmp_path) == ["a.bin"]


def test_resumes_in_the_next_call(mirror, get, tmp_path):
    mirror.lie("/a.bin", "cut", "cut")
    with pytest.raises(ConnectionError, match=r"broke off after 225.0 kB of 300.0 kB"): get(tries=2)
    assert left(tmp_path) == ["a.bin.part"]
    assert (tmp_path/"a.bin.part").read_bytes() == CONTENT[:225_000]
    assert get().read_bytes() == CONTENT
    assert ranges(mirror)[-1] == "bytes=225000-"
    assert left(tmp_path) == ["a.bin"]


def test_wrong_bytes_leave_nothing(mirror, get, tmp_path):
    mirror.lie("/a.bin", *["wrong"] * 9)
    with pytest.raises(ConnectionError, match=f"sent wrong bytes .* instead of {SHA[:12]}"): get()
    assert left(tmp_path) == [] and len(mirror.log) == 1


@pytest.mark.parametrize("part", [b"spoiled", b"x" * 300_000, b"longer" * 100_000])
def test_a_spoiled_part_is_fetched_once_more(mirror, get, tmp_path, part):
    (tmp_path/"a.bin.part").write_bytes(part)
    assert get().read_bytes() == CONTENT
    assert ranges(mirror) == [f"bytes={len(part)}-", None]


def test_a_spoiled_part_and_a_liar_end(mirror, get, tmp_path):
    (tmp_path/"a.bin.part").write_bytes(b"spoiled")
    mirror.lie("/a.bin", "wrong", "cut", "wrong", "wrong", "wrong")
    with pytest.raises(ConnectionError, match="wrong bytes"): get()
    assert left(tmp_path) == [] and len(mirror.log) == 3


def test_a_complete_part_becomes_the_file(get, tmp_path):
    (tmp_path/"a.bin.part").write_bytes(CONTENT)
    assert get().read_bytes() == CONTENT and left(tmp_path) == ["a.bin"]


def test_range_ignored_starts_over(mirror, get):
    mirror.ranges = False
    mirror.lie("/a.bin", "cut")
    assert get().read_bytes() == CONTENT
    assert ranges(mirror) == [None, "bytes=150000-"]


def test_busy_once_then_fine_after_the_time_it_asked_for(mirror, get):
    mirror.lie("/a.bin", (503, {"Retry_After": 1}), 429)
    began = time.monotonic()
    assert get().read_bytes() == CONTENT
    assert 1 <= time.monotonic() - began < 60 and len(mirror.log) == 3


def test_busy_for_good(mirror, get, tmp_path):
    mirror.lie("/a.bin", *[503] * 9)
    with pytest.raises(ConnectionError, match="answered 503 Service Unavailable"): get()
    assert len(mirror.log) == 4 and left(tmp_path) == []


def test_an_hour_is_not_waited_for(mirror, get):
    mirror.lie("/a.bin", (503, {"Retry_After": 3600}))
    with pytest.raises(ConnectionError, match="answered 503 .* and asks to wait 3600 s"): get()
    assert len(mirror.log) == 1


def test_pythons_user_agents_are_refused_and_ours_is_not(mirror, get, tmp_path):
    mirror.refuse = ("python-requests", "Python-urllib")
    assert requests.get(mirror.url + "/a.bin").status_code == 403
    assert get().read_bytes() == CONTENT
    mirror.refuse = ("colab-gpt2",)
    b = tmp_path/"b"
    with pytest.raises(ConnectionError, match="answered 403 Forbidden"): download(mirror.url + "/a.bin", b, SHA, wait=0)


def test_nobody_there(tmp_path):
    with Mirror() as gone: url = gone.url + "/a.bin"
    began = time.monotonic()
    with pytest.raises(ConnectionError, match="could not be reached"): download(url, tmp_path/"a.bin", SHA)
    assert time.monotonic() - began < 60 and left(tmp_path) == []


def test_no_space_is_said_before_the_first_byte(mirror, get, tmp_path, monkeypatch):
    (tmp_path/"a.bin").write_text("old")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match="needs 300.0 kB and .* has 1.0 kB free") as e: get()
    assert fields_of(e.value) == ("cache_dir",)
    assert left(tmp_path) == ["a.bin"] and (tmp_path/"a.bin").read_text() == "old"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full, a disk that is always full")
def test_a_disk_full_in_mid_write_leaves_the_old_file(get, tmp_path):
    (tmp_path/"a.bin").write_text("old")
    (tmp_path/"a.bin.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"): get()
    assert (tmp_path/"a.bin").read_text() == "old"


def test_progress_is_on_stderr(get, capfd):
    with reporting(True) as report: get(report=report)
    out, err = capfd.readouterr()
    assert out == "" and "a.bin" in err and "300k" in err


def test_the_first_source_that_is_right_serves(mirror, tmp_path):
    good = wikitext_zip()
    mirror.files |= {"/lies.zip": good, "/good.zip": good}
    mirror.lie("/lies.zip", *["wrong"] * 9)
    sources = published(good, *(mirror.url + p for p in ("/lies.zip", "/missing.zip", "/good.zip")))
    corpus = load_corpus("w-raw", sources=sources, cache_dir=tmp_path, progress=False)
    assert corpus.source == mirror.url + "/good.zip"
    assert [corpus.path(s).read_text() for s in ("train", "validation", "test")] == list(TEXTS.values())
    assert left(tmp_path/"corpora") == ["w-raw"]  # neither the zip nor a part of it
    assert left(tmp_path/"corpora"/"w-raw") == ["corpus.json", "wiki.test.raw", "wiki.train.raw", "wiki.valid.raw"]
    asked = len(mirror.log)
    assert load_corpus("w-raw", sources=sources, cache_dir=tmp_path) == corpus and len(mirror.log) == asked


def test_a_mirror_continues_what_another_began(mirror, tmp_path):
    good = wikitext_zip({**TEXTS, "train": " ".join(map(str, range(20_000)))})
    mirror.files |= {"/breaks.zip": good, "/good.zip": good}
    mirror.lie("/breaks.zip", "cut", (503, {"Retry_After": 3600}))
    sources = published(good, mirror.url + "/breaks.zip", mirror.url + "/good.zip")
    load_corpus("w-raw", sources=sources, cache_dir=tmp_path, progress=False)
    assert ranges(mirror)[-1] == f"bytes={len(good) // 2}-"


def test_when_all_fail_the_message_lists_what_each_answered(mirror, tmp_path):
    good = wikitext_zip()
    mirror.files["/lies.zip"] = good
    mirror.lie("/lies.zip", *["wrong"] * 9)
    with pytest.raises(ConnectionError) as e:
        sources = published(good, mirror.url + "/lies.zip", mirror.url + "/missing.zip")
        load_corpus("w-raw", sources=sources, cache_dir=tmp_path, progress=False)
    message = str(e.value)
    assert message.startswith("w-raw could not be fetched: ") and "\n" not in message
    assert "lies.zip sent wrong bytes" in message and "missing.zip answered 404 Not Found" in message
    assert fields_of(e.value) == ("dataset", "train_file") and "dataset='python-docs'" in message
    assert left(tmp_path/"corpora") == []


def cut_off(path): path.write_bytes(path.read_bytes()[:-3])
def change(path): path.write_bytes(path.read_bytes().replace(b"Some", b"some"))
def spoil_manifest(path): path.with_name("corpus.json").write_text('{"name"')


@pytest.mark.parametrize("damage", [cut_off, change, spoil_manifest, os.unlink])
def test_a_damaged_cache_is_noticed_and_fetched_again(mirror, tmp_path, damage, caplog):
    good = mirror.files["/good.zip"] = wikitext_zip()
    sources = published(good, mirror.url + "/good.zip")
    corpus = load_corpus("w-raw", sources=sources, cache_dir=tmp_path, progress=False)
    damage(corpus.train)
    assert load_corpus("w-raw", sources=sources, cache_dir=tmp_path, progress=False) == corpus
    assert corpus.train.read_text() == TEXTS["train"] and "is damaged; it is fetched or made again" in caplog.text


def test_a_refused_zip_leaves_nothing(mirror, tmp_path):
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as z:
        z.writestr("wiki.train.raw", "text")
        link = zipfile.ZipInfo("wiki.test.raw")
        link.external_attr = 0o120777 << 16
        z.writestr(link, "/etc/passwd")
    (tmp_path/"mine.zip").write_bytes(memory.getvalue())
    with pytest.raises(ValueError, match="member 'wiki.test.raw' is a link"):
        load_corpus(tmp_path/"mine.zip", cache_dir=tmp_path/"cache")
    assert left(tmp_path/"cache"/"corpora") == []
