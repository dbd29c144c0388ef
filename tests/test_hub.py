"load_dataset and from_pretrained against a small Hub on 127.0.0.1: each case has an empty cache."
import hashlib, io, json, os, shutil, subprocess, sys, tempfile, warnings, zipfile
from types import SimpleNamespace

import huggingface_hub, pytest
from datasets import Dataset
from transformers import GPT2Config

from colab_gpt2.model.loading import TINY, new_model
from colab_gpt2.text.corpus import WIKITEXT
from colab_gpt2.text.hub import hub_trouble, write_split
from helpers.colab_stub import stub
from helpers.servers import Hub

LINES = {
    "train": [" \n", " = One = \n", " \n", " Some text . \n"] * 50,
    "validation": [" \n", " = Two = \n", " \n", " Größe . \n"],
    "test": [" \n", " = Three = \n"],
}
TEXTS = {split: "".join(lines) for split, lines in LINES.items()}
SHAS = {split: hashlib.sha256(text.encode()).hexdigest() for split, text in TEXTS.items()}
NAME = "wikitext-2-raw-v1"
SOURCE = "hf://datasets/Salesforce/wikitext"
CLOSED = "http://127.0.0.1:9"  # the port of RFC 863, closed everywhere
DETOURS = ("http_proxy", "https_proxy", "all_proxy", "hf_hub_offline")


def dataset(lines):
    "The files of Salesforce/wikitext with these lines, as the Hub has them: a card that names the splits, and parquet."
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    splits = "".join(f"  - split: {s}\n    path: {NAME}/{s}-*\n" for s in lines)
    card = f"---\nconfigs:\n- config_name: {NAME}\n  data_files:\n{splits}---\n"
    files = {"README.md": card.encode()}
    for split, texts in lines.items():
        memory = io.BytesIO()
        parquet.write_table(arrow.table({"text": ["" if t == " \n" else t for t in texts]}), memory)
        files[f"{NAME}/{split}-00000-of-00001.parquet"] = memory.getvalue()
    return files


def a_zip(texts):
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as z:
        for split, text in texts.items():
            name = "valid" if split == "validation" else split
            z.writestr(f"wikitext-2-raw/wiki.{name}.raw", text)
    return memory.getvalue()


# A process that has the libraries, one for each endpoint, which huggingface_hub reads at import. It forks for each
# question, so that each begins with nothing but what an earlier one of its test left on the disk.
ASKED = """
import json, os, sys
{imports}
def failing(f, *args, **kwargs):
    try: return f(*args, **kwargs) and "no error"
    except Exception as e: return f"{type(e).__name__}: {e}"
for line in sys.stdin:
    if not os.fork():
        result = {}
        exec(json.loads(line))
        print("RESULT", json.dumps(result), flush=True)
        os._exit(0)
    print("DONE", os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""
MODELS = "import colab_gpt2.model.fitting, transformers.models.gpt2.modeling_gpt2"
TEXTS_ALONE = "from colab_gpt2.text.corpus import SPLITS, Published, load_corpus"


@pytest.fixture(scope="module")
def home(tmp_path_factory): return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def only_hub():
    with Hub() as h: yield h


@pytest.fixture
def hub(only_hub, home):
    "An empty Hub, and empty caches."
    for kept in (only_hub.repos, only_hub.refusals, only_hub.log): kept.clear()
    for folder in home.iterdir(): shutil.rmtree(folder)
    return only_hub


@pytest.fixture(scope="module")
def process(home):
    "Start what is ASKED at an endpoint, with these imports, or give what runs already."
    ours = dict(HF_HOME=str(home/"hf"), XDG_CACHE_HOME=str(home/"cache"), HF_HUB_DISABLE_TELEMETRY="1")
    inherited = {k: v for k, v in os.environ.items() if k.lower() not in DETOURS}
    running, pipe = {}, subprocess.PIPE

    def start(endpoint, imports):
        if (endpoint, imports) not in running:
            errors = tempfile.TemporaryFile("a+")
            words, env = [sys.executable, "-c", ASKED.replace("{imports}", imports)], {**inherited, **ours}
            running[endpoint, imports] = subprocess.Popen(
                words, env={**env, "HF_ENDPOINT": endpoint}, stdin=pipe, stdout=pipe, stderr=errors, text=True)
            running[endpoint, imports].errors = errors
        return running[endpoint, imports]

    yield start
    for each in running.values():
        each.stdin.close()
        each.wait(timeout=60)


@pytest.fixture
def ask(hub, process):
    "Run `code` against the Hub, or against a closed door; -> what it puts into `result`, as JSON knows it."
    def run(code, endpoint=hub.url, imports=TEXTS_ALONE):
        asked, said = process(endpoint, imports), []
        before = asked.errors.seek(0, os.SEEK_END)
        asked.stdin.write(json.dumps(code) + "\n")
        asked.stdin.flush()
        while (line := asked.stdout.readline()) and not line.startswith("DONE"): said.append(line)
        asked.errors.seek(before)
        told = asked.errors.read()
        assert line == "DONE 0\n", told
        assert len(said) == 1 and said[0].startswith("RESULT"), said  # nothing else on stdout
        return json.loads(said[0][6:]) | dict(stderr=told)
    return run


def loading(files, zip_sha="", sources=(SOURCE, "hf://datasets/ggml-org/ci/w.zip")):
    "The arguments of a `load_corpus` from `sources`."
    return f"{NAME!r}, sources={{{NAME!r}: Published({sources!r}, {zip_sha!r}, {files!r})}}, progress=False"


def corpus_code(files, zip_sha=""):
    return (f"c = load_corpus({loading(files, zip_sha)})\n"
            "texts = {s: c.path(s).read_bytes().decode() for s in SPLITS}\n"
            "result |= c.to_dict() | dict(heavy='datasets' in sys.modules, texts=texts)")


def test_wikitext_from_the_hub_is_the_published_file_and_stays(hub, ask):
    hub.add("datasets", "Salesforce/wikitext", dataset(LINES))
    result = ask(corpus_code(SHAS))
    assert (result["texts"], result["sha256"], result["source"]) == (TEXTS, SHAS, SOURCE)
    again = ask(corpus_code(SHAS), endpoint=CLOSED)
    assert again["texts"] == TEXTS and again["heavy"] is False  # from the cache: no network, not even the library


def test_wrong_text_on_the_hub_is_noticed_and_the_zip_there_serves(hub, ask, home):
    hub.add("datasets", "Salesforce/wikitext", dataset({**LINES, "test": [" = Forged = \n"]}))
    content = a_zip(TEXTS)
    hub.add("datasets", "ggml-org/ci", {"w.zip": content})
    result = ask(corpus_code(SHAS, hashlib.sha256(content).hexdigest()))
    assert result["texts"] == TEXTS and result["source"] == "hf://datasets/ggml-org/ci/w.zip"
    assert "/datasets/ggml-org/ci/resolve/main/w.zip" in hub.paths("GET")
    assert os.listdir(home/"cache"/"colab_gpt2"/"corpora") == [NAME]


def test_what_each_source_answered(hub, ask, home):
    hub.add("datasets", "Salesforce/wikitext", dataset({**LINES, "test": [" = Forged = \n"]}))
    sources = (SOURCE, "hf://datasets/Salesforce/gone", "hf://datasets/ggml-org/ci/w.zip")
    said = ask(f"result['said'] = failing(load_corpus, {loading(SHAS, sources=sources)})")["said"]
    assert said.startswith(f"ConnectionError: {NAME} could not be fetched: ") and "\n" not in said
    assert "wikitext sent a text that is not the published one (SHA-256 of test); " in said
    assert "gone answered with DatasetNotFoundError: " in said
    assert "w.zip answered 404 Not Found. Without a network" in said
    assert os.listdir(home/"cache"/"colab_gpt2"/"corpora") == []


def test_the_real_splits_survive_the_way_through_the_hub(hub, ask, shared):
    def lines(split):
        text = (shared/"data"/"wikitext-2-raw"/f"wiki.{split}.raw").read_text(encoding="utf-8")
        return [line + "\n" for line in text.split("\n")[:-1]]
    real = {"train": LINES["train"], "validation": lines("valid"), "test": lines("test")}
    hub.add("datasets", "Salesforce/wikitext", dataset(real))
    known = {s: WIKITEXT[NAME].files[s] for s in ("validation", "test")}
    result = ask(corpus_code(known) + "\ndel result['texts']")
    assert {s: result["sha256"][s] for s in known} == known


MODEL_CODE = """
from colab_gpt2.model.fitting import check_match
from colab_gpt2.model.loading import load_config, load_model, load_tokenizer
import time
began = time.monotonic()
for name in ("gpt2", "owner/name"):
    model, tokenizer = load_model(name), load_tokenizer(name)
    check_match(model, tokenizer)
    result[name] = [model.num_parameters(), str(model.dtype), len(tokenizer)]
result["config"] = load_config("https://huggingface.co/owner/name/tree/main").n_positions
for name in ("owner/nmae", "owner/pickle", "owner/index", "gpt2-medium"):
    result[name], result[name + " tokenizer"] = failing(load_model, name), failing(load_tokenizer, name)
result["seconds"] = time.monotonic() - began
"""


def test_models_from_the_hub_then_from_its_cache(hub, ask):
    files = {f: (TINY/f).read_bytes() for f in os.listdir(TINY)}
    pickled = {f: b for f, b in files.items() if f != "model.safetensors"} | {"pytorch_model.bin": b"cos\nsystem\n"}
    for name in ("openai-community/gpt2", "owner/name"): hub.add("models", name, files)
    hub.add("models", "owner/pickle", pickled)
    index = dict(metadata={}, weight_map={"wte": "pytorch_model.bin"})
    hub.add("models", "owner/index", pickled | {"model.safetensors.index.json": json.dumps(index).encode()})
    online = ask(MODEL_CODE, imports=MODELS)
    config = json.loads(files["config.json"])
    for name in ("gpt2", "owner/name"): assert online[name][1:] == ["torch.float32", config["vocab_size"]]
    assert online["config"] == config["n_positions"]
    assert online["owner/nmae"].startswith("ValueError: There is no model 'owner/nmae' on the Hub")
    assert "There is no model" in online["owner/nmae tokenizer"]
    assert "There is no model 'openai-community/gpt2-medium'" in online["gpt2-medium"]
    assert online["owner/pickle"].startswith("ValueError: owner/pickle has its weights as pytorch_model.bin, a pickle")
    assert "names 'pytorch_model.bin', but weights are safetensors files" in online["owner/index"]
    assert "pytorch_model.bin" not in " ".join(hub.paths("GET"))
    stderr = online.pop("stderr")
    assert not any("\n" in said for said in online.values() if isinstance(said, str))
    assert "LOAD REPORT" not in stderr and "Loading weights" not in stderr

    with hub.closed(): offline = ask(MODEL_CODE, imports=MODELS)
    for name in ("gpt2", "owner/name", "config"): assert offline[name] == online[name]
    assert offline["gpt2-medium"] == (
        "ConnectionError: The Hub gave no answer and openai-community/gpt2-medium is not complete in the cache. "
        "Without a network use 'tiny' or the folder of a model.")
    assert offline["seconds"] < 20  # huggingface_hub alone would retry for half a minute, twice for each


DAMAGED_CODE = """
from colab_gpt2.model.loading import load_model, load_tokenizer
from pathlib import Path
other = os.environ["HF_HOME"] + "/other"
for name, load, cache in (("tokenizer.json", load_tokenizer, None), ("model.safetensors", load_model, other),
                          ("config.json", load_model, None)):
    load("owner/name", cache_dir=cache)
    file = next(Path(cache or os.environ["HF_HOME"] + "/hub").rglob(f"snapshots/*/{name}")).resolve()
    file.write_bytes(file.read_bytes()[:100])
    said = failing(load, "owner/name", cache_dir=cache)
    file.unlink()
    load("owner/name", cache_dir=cache)
    result[name] = [said, str(file)]
"""


def test_a_damaged_file_in_the_cache_is_named_and_fetched_again_once_it_is_deleted(hub, ask, tmp_path):
    small = GPT2Config(n_layer=1, n_head=1, n_embd=8, n_positions=8, vocab_size=8192)
    new_model(small, seed=0).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"): shutil.copy(TINY/name, tmp_path)
    hub.add("models", "owner/name", {f: (tmp_path/f).read_bytes() for f in os.listdir(tmp_path)})
    told = ask(DAMAGED_CODE, imports=MODELS)
    del told["stderr"]
    for name, (said, file) in told.items():
        assert f"{name} is damaged: " in said and said.endswith(f"To fetch it again, delete {file}")


BUSY_CODE = """
from colab_gpt2.model.loading import load_model, load_tokenizer
import time
began = time.monotonic()
result["said"] = [failing(load, "owner/name") for load in (load_model, load_tokenizer)]
result["seconds"] = time.monotonic() - began
"""


ADVICE = "Without a network use 'tiny' or the folder of a model."

@pytest.mark.parametrize("refusals, said", [
    ({"/": 503}, f"The Hub answers 503 Service Unavailable and owner/name is not complete in the cache. {ADVICE}"),
    ({"/api": 429}, f"The Hub answers 429 Too Many Requests for owner/name. Try again later. {ADVICE}")])
def test_a_hub_that_is_down_or_busy_is_named_and_the_cache_serves(hub, ask, refusals, said):
    hub.add("models", "owner/name", {f: (TINY/f).read_bytes() for f in os.listdir(TINY)})
    hub.refusals.update(refusals)
    assert ask(BUSY_CODE, imports=MODELS)["said"] == [f"ConnectionError: {said}"] * 2
    hub.refusals.clear()
    assert ask(BUSY_CODE, imports=MODELS)["said"] == ["no error"] * 2
    hub.refusals.update(refusals)
    cached = ask(BUSY_CODE, imports=MODELS)
    assert cached["said"] == ["no error"] * 2 and cached["seconds"] < 30


def test_wikitext_from_a_hub_that_is_down(hub, ask):
    hub.refusals["/"] = 503
    said = ask(f"result['said'] = failing(load_corpus, {loading(SHAS, sources=(SOURCE,))})")["said"]
    assert "wikitext answers 503 Service Unavailable. Without a network these work" in said


TOKEN_CODE = """
import os
os.environ["HF_TOKEN"] = "hf_expired"
from colab_gpt2.model.loading import load_config, load_tokenizer
result["said"] = [failing(load, "owner/name") for load in (load_tokenizer, load_config)]
"""


def test_a_token_that_has_expired_is_named(hub, ask):
    hub.add("models", "owner/name", {f: (TINY/f).read_bytes() for f in os.listdir(TINY)})
    hub.refusals["/api"] = 401
    answer = ask(TOKEN_CODE, imports=MODELS)
    refused = "refuses the token in HF_TOKEN or of `hf auth login`: remove or renew it"
    assert answer["said"] == [f"ConnectionError: The Hub {refused}. A public model needs none."] * 2
    hub.refusals.clear()
    assert ask(TOKEN_CODE, imports=MODELS)["said"] == ["no error"] * 2


def test_a_token_that_has_expired_is_named_for_a_data_set_too(hub, ask):
    hub.add("datasets", "me/tides", {"train.jsonl": b'{"text": "It ebbs."}'})
    hub.refusals["/api"] = 401
    code = "import os\nos.environ['HF_TOKEN'] = 'hf_expired'\nresult['said'] = failing(open_hub, 'me/tides')"
    told = "The Hub refuses the token in HF_TOKEN or of `hf auth login`: remove or renew it."
    assert ask(code, imports=HUB_ALONE)["said"] == f"ConnectionError: {told}"


@pytest.mark.parametrize("secrets, timeout", [({}, False), ({"HF_TOKEN": None}, False), ({}, True)],
                         ids=["none", "denied", "no answer"])
def test_colabs_secret_is_asked_for_once_and_not_missed(stub, monkeypatch, secrets, timeout):
    "What is public can be had without: nothing is said, whatever the front end answers."
    auth = huggingface_hub.utils._auth
    for name, value in (("is_google_colab", lambda: True), ("_IS_GOOGLE_COLAB_CHECKED", False),
                        ("_get_token_from_file_refreshed", lambda: None)):
        monkeypatch.setattr(auth, name, value, raising=name[0] == "_I")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("requests.head", lambda *args, **options: SimpleNamespace(status_code=200, reason="OK"))
    with stub.pretend(), stub.faults(secret_timeout=timeout), monkeypatch.context() as patched:
        patched.setattr(stub, "secrets", secrets)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert [hub_trouble(), hub_trouble(), huggingface_hub.get_token()] == ["", "", None]
        assert [kind for kind, _ in stub.requests].count("GetSecret") == 1


# ---- any other data set

CARD = """---
configs:
- config_name: {0}
  data_files:
  - {{split: train, path: a/train.jsonl}}
  - {{split: dev, path: a/dev.jsonl}}
- config_name: large
  data_files: b/train.jsonl
---
"""
ROWS = {split: "".join(json.dumps({"id": i, "story": f"Story {i} of {split}."}) + "\n" for i in range(3))
        for split in ("train", "dev")}
FILES = {f"a/{split}.jsonl": text.encode() for split, text in ROWS.items()} | {"b/train.jsonl": b'{"text": "It ebbs."}'}
HUB_ALONE = "import datasets; from colab_gpt2.text.hub import hub_documents, open_hub, pick_splits"
READ = """
def read(name, config=None, field=None, **options):
    splits = open_hub(name, config)
    return {ours: [d.text for d in hub_documents(splits[theirs], name, field)]
            for ours, theirs in pick_splits([*splits], **options).items()}
"""


def test_a_data_set_is_read_by_configuration_split_and_column(hub, ask):
    hub.add("datasets", "me/tides", {"README.md": CARD.format("small").encode(), **FILES})
    code = READ + """
result["small"], result["large"] = read("me/tides", "small"), read("me/tides", "large")
result["other"] = read("me/tides", "small", train_split="dev", test_split="train")
wrong = dict(none={}, near=dict(config="smal"), split=dict(config="small", train_split="trian"),
             test=dict(config="small", test_split="test"), field=dict(config="small", field="stroy"))
result |= {name: failing(read, "me/tides", **options) for name, options in wrong.items()}
"""
    told = ask(code, imports=HUB_ALONE)
    train, dev = ([f"Story {i} of {split}." for i in range(3)] for split in ("train", "dev"))
    assert (told["small"], told["large"]) == ({"train": train, "validation": dev}, {"train": ["It ebbs."]})
    assert told["other"] == {"train": dev, "test": train}
    assert told["none"] == "ValueError: me/tides has configurations: choose small or large by dataset_config."
    assert told["near"] == "ValueError: dataset_config is 'smal'. Did you mean 'small'?"
    assert told["split"] == "ValueError: dataset_train_split is 'trian'. Did you mean 'train'?"
    assert told["test"] == "ValueError: dataset_test_split is 'test'. Known: train, dev."
    assert told["field"].endswith("it has id (numbers), story (text). Did you mean 'story'?")


CORPORA = """
def corpus(name, **options):
    found = load_corpus(name, progress=False, **options)
    return {split: found.path(split).read_text() for split in found.bytes} | dict(source=found.source)
result["small"] = corpus("me/tides", dataset_config="small")
result["large"] = corpus("https://huggingface.co/datasets/me/many/tree/main")
result["lines"] = corpus("me/wikitext", dataset_config="wikitext-2-raw-v1")
result["chats"] = corpus("me/chats")
result["own"] = corpus("python-docs", train_file="hf.co/datasets/me/many")
result["unknown"] = failing(load_corpus, "me/unknown", download=False)
result["page"] = failing(load_corpus, "https://huggingface.co/datasets/unknown", download=False)
"""


def test_a_data_set_of_the_hub_is_a_corpus_that_stays(hub, ask):
    hub.add("datasets", "me/tides", {"README.md": CARD.format("small").encode(), **FILES})
    rows = "\n".join(json.dumps({"text": f"The tide of day {n} came in."}) for n in [*range(300), *range(9)])
    hub.add("datasets", "me/many", {"train.jsonl": rows.encode()})
    hub.add("datasets", "me/wikitext", dataset(LINES))
    chat = [{"prompt": f"Day {n}?", "completion": "It ebbs."} for n in range(100)]
    hub.add("datasets", "me/chats", {"train.jsonl": "\n".join(map(json.dumps, chat)).encode()})
    told = ask(CORPORA)
    assert told["small"]["train"] == "<|endoftext|>".join(f"Story {i} of train." for i in range(3))
    assert told["small"]["source"] == "hf://datasets/me/tides" and "test" not in told["small"]
    texts = {split: told["large"][split].split("<|endoftext|>") for split in TEXTS}
    assert sorted(sum(texts.values(), [])) == sorted(f"The tide of day {n} came in." for n in range(300))
    assert 200 < len(texts["train"]) < 260
    assert {split: told["lines"][split] for split in TEXTS} == TEXTS and told["own"] == told["large"]
    assert told["unknown"] == "ConnectionError: me/unknown is not in the cache."
    assert told["page"] == "ConnectionError: unknown is not in the cache."
    kept = [json.loads(line)["prompt"] for split in TEXTS for line in told["chats"][split].splitlines()]
    assert sorted(kept) == sorted(row["prompt"] for row in chat)
    assert {**ask(CORPORA, endpoint=CLOSED), "stderr": ""} == {**told, "stderr": ""}  # from the cache


REFUSED = {
    "me/gone": "FileNotFoundError: There is no file me/gone here and no data set of this name on the Hub. ",
    "me/gated": "PermissionError: me/gated asks for a login: accept its terms on https://huggingface.co/datasets/",
    "me/script": "ValueError: me/script is a script, which the library datasets no longer runs.",
    "me/empty": "ConnectionError: me/empty on the Hub cannot be read: EmptyDatasetError: ",
    "me/numbers": "ValueError: me/numbers has no column with text; it has n (numbers)",
    "me/broken": "ConnectionError: me/broken on the Hub cannot be read: ArrowInvalid"}


def test_what_cannot_be_had_of_the_hub_is_told_in_a_line(hub, ask):
    for name, content in {"gated": {}, "script": {"script.py": b""}, "empty": {"README.md": b"Tides"},
                          "numbers": {"train.jsonl": b'{"n": 1}'}, "broken": {"train.parquet": b"PAR1"}}.items():
        hub.add("datasets", f"me/{name}", content)
    hub.gated = {"me/gated"}
    told = ask(READ + f"result |= {{name: failing(read, name) for name in {[*REFUSED]}}}", imports=HUB_ALONE)
    for name, said in REFUSED.items(): assert told[name].startswith(said) and "\n" not in told[name], told[name]
    closed = ask(READ + "result['said'] = failing(read, 'me/tides')", endpoint=CLOSED, imports=HUB_ALONE)["said"]
    assert closed.startswith("ConnectionError: The Hub gave no answer, and me/tides is not in the cache.")


# A disk that is too small for the text

STREAMING = """
import errno, itertools
import colab_gpt2.text.corpus as corpora, colab_gpt2.text.streams as streams, colab_gpt2.text.token_store as store
from colab_gpt2.model.loading import load_tokenizer
def full(*given): raise OSError(errno.ENOSPC, "No space left on device")
corpora.check_space, streams.HELD, store.EVERY = full, 2000, 1
corpus, tiny = load_corpus("me/many", progress=False), load_tokenizer("tiny")
result |= dict(train=corpus.train.name, rule=corpus.report.rule, bytes=corpus.bytes)
result["held"] = {split: corpus.path(split).read_text() for split in SPLITS[1:]}
def tokens(): return store.tokenize_file(corpus.train, tiny, 64, split="train", progress=False)
passed, documents = [], streams.hub_documents
def broken(*given):
    for n, document in enumerate(documents(*given)):
        if n == 1500: raise ConnectionError("me/many broke off after 1500 rows.")
        yield document
def counting(*given):
    for document in documents(*given): passed.append(document); yield document
streams.hub_documents = broken
read = store.read_windows
store.read_windows = lambda file, encode, before, **size: read(file, encode, before, 4096)
result["broken"] = failing(tokens)
result["left"] = sorted(path.suffix for path in corpora.cache_folder(None).joinpath("tokens").iterdir())
streams.hub_documents = counting
blocks = tokens()
whole = "<|endoftext|>".join(streams.Stream.from_dict(json.loads(corpus.train.read_text())).training([]))
assert blocks.stream.tolist() == tiny(whole, verbose=False)["input_ids"] and blocks.bytes == len(whole.encode())
result |= dict(text=whole, blocks=len(blocks))
"""


def test_a_data_set_that_the_disk_has_no_room_for_is_tokenised_from_the_hub(hub, ask, home):
    days = [f"The tide of day {day} came at {day % 12} o'clock.\n" for day in range(3000)]
    rows = "\n".join(json.dumps(dict(text=day)) for day in days + days[:9])
    hub.add("datasets", "me/many", {"train.jsonl": rows.encode()})
    told = ask(STREAMING)
    assert told["train"] == "train.stream" and "read from the Hub as it is tokenised" in told["rule"]
    assert told["broken"] == "ConnectionError: me/many broke off after 1500 rows."
    assert told["left"] == [".journal", ".part"]  # what is tokenised stays
    train, held = (text.split("<|endoftext|>") for text in (told["text"], "<|endoftext|>".join(told["held"].values())))
    assert len(train) == len({*train}) and {*train}.isdisjoint(held) and 2300 < len(train) < 2500
    assert all(2000 <= len(text) < 2100 for text in told["held"].values())
    folder = home/"cache"/"colab_gpt2"
    assert sum(path.stat().st_size for path in folder.joinpath("corpora").rglob("*")) < 40_000  # of 140 kB of text
    again = ask("import colab_gpt2.text.token_store as store\n"
                "from colab_gpt2.model.loading import load_tokenizer\n"
                "corpus = load_corpus('me/many', progress=False)\n"
                "blocks = store.tokenize_file(corpus.train, load_tokenizer('tiny'), 64, progress=False)\n"
                "result['blocks'] = len(blocks)", endpoint=CLOSED)
    assert again["blocks"] == told["blocks"]  # without a network


def test_conversations_are_known_by_more_than_the_first_row(tmp_path):
    said = [dict(role="user", content="Tide?"), dict(role="assistant", content="It ebbs.")]
    rows = Dataset.from_list([dict(messages=None, kind="open"), dict(messages=said, kind="closed")])
    written = write_split(rows, "some/chats", tmp_path/"train.txt")
    assert [json.loads(line)["messages"] for line in written.read_text().splitlines()] == [None, said]
