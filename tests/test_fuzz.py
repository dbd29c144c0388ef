"""Whatever is given to a config, a command line, a manifest, an archive or the splitter: it is taken, or refused in one
line that names a field. The same examples on every machine; a case that once failed stands as an @example."""
import contextlib, gzip, io, itertools, json, math, os, re, sys, tarfile, warnings
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from colab_gpt2 import cli, training
from colab_gpt2.config import FinetuneConfig
from colab_gpt2.core import CONTROLS, printable
from colab_gpt2.engine.checkpoints import check_intact, find_checkpoints, read_manifest, write_manifest
from colab_gpt2.errors import Sentence, fields_of, worded
from colab_gpt2.legacy.flags import FLAGS, parse
from colab_gpt2.legacy.run_language_modeling import translate
from colab_gpt2.model.loading import load_tokenizer
from colab_gpt2.storage.archives import extract_archive
from colab_gpt2.resuming import found_in, newest_intact
from colab_gpt2.storage.heartbeat import read_heartbeat, refuse, silence
from colab_gpt2.storage.targets import read_entry
from colab_gpt2.text.tokens import Encoder, read_windows

FIELDS = {f.name: f for f in fields(FinetuneConfig)}


def examples(n):
    "The same `n` examples everywhere: no database, no clock. A folder of the test may serve all of them."
    return settings(derandomize=True, database=None, deadline=None, max_examples=n,
                    suppress_health_check=list(HealthCheck))


def is_plain(line, longest=1100):
    "One line for a terminal, of a length that can be read, without Python's or a library's innards."
    innards = "Traceback|object at 0x|NoneType|unexpected keyword|JSONDecodeError|codec can't|Errno"
    return "\n" not in line and len(line) <= longest and not CONTROLS.search(line) and not re.search(innards, line)


# Values that people, programs and files give

NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([0, -1, 1, 10**400, -0.0, 1e-320, 2**63, 2**64]))
TEXTS = st.one_of(st.text(max_size=40), st.sampled_from(
    ["", " ", "auto", "never", "off", "hub:", "hub:a/b", "{", "}", "{0}", "{resume}", "{x.__class__}", "%s", "\ud800",
     "a\0b", "\x1b[2J", "~", "~nobody/x", "../..", "/", "a\nb", "x" * 5000, "nan", "-1", "true", "1e999"]))
SMALL = NUMBERS.filter(lambda n: n != 10**400)  # a longer number is no text and no JSON in Python
JSON = st.recursive(st.one_of(st.none(), st.booleans(), SMALL, TEXTS),
                    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
                    max_leaves=6)
VALUES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS, JSON, st.binary(max_size=4), st.just(Path("a")))


# The config

def check_config(given):
    "A config of these values, or a ValueError that says of a given field, in one line, what is wrong."
    try: FinetuneConfig(**given)
    except ValueError as e:
        assert set(fields_of(e)) & set(given), (given, e)
        assert isinstance(e.args[0], Sentence) and is_plain(printable(worded(e)).replace("\n", " ")), e


@examples(400)
@given(st.sampled_from(sorted(FIELDS)), VALUES)
def test_a_field_takes_a_value_or_says_why_not(name, value): check_config({name: value})


@examples(300)
@given(st.dictionaries(st.sampled_from(sorted(FIELDS)), VALUES, min_size=2, max_size=2))
def test_two_fields_take_their_values_or_say_why_not(given): check_config(given)


def test_numpys_numbers_are_plain_ones_in_a_config():
    config = FinetuneConfig(seed=np.int64(3), max_steps=np.int8(2), learning_rate=np.float32(0.5))
    plain = FinetuneConfig(seed=3, max_steps=2, learning_rate=0.5).to_dict()
    assert json.loads(json.dumps(config.to_dict())) == plain


# The command line and the flags of 2020

@pytest.fixture(scope="module")
def call():
    "`colab-gpt2` with these words, where no command does its work; -> (exit code, what stands on stderr)."
    import typer
    command = typer.main.get_command(cli.app)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "answer", lambda function, arguments, as_json, debug: None)
        def call(*words):
            err = io.StringIO()
            patch.setattr(sys, "stderr", err)
            try: code = command.main([*words], prog_name="colab-gpt2", standalone_mode=True)
            except SystemExit as e: code = e.code
            patch.setattr(sys, "stderr", sys.__stderr__)
            return code, err.getvalue()
        call.commands = command.commands
        yield call


def words_of(command):
    "A strategy of words for this command: its options, and options that there are not, with and without values."
    options = st.sampled_from([name for p in command.params for name in (*p.opts, *p.secondary_opts)])
    values = st.one_of(TEXTS, SMALL.map(str), st.sampled_from(["a=1", "a=", "=", "a"]))
    words = st.one_of(st.tuples(options, values), st.tuples(options), st.tuples(values),
                      st.builds(lambda option, value: (f"{option}={value}",), options, values),
                      st.builds(lambda value: (f"--{value}",), values))
    return st.lists(words, max_size=3).map(lambda parts: [word for part in parts for word in part])


@examples(150)
@given(data=st.data())
def test_a_command_takes_its_words_or_says_why_not(call, data):
    name = data.draw(st.sampled_from(["finetune", "run", "generate", "plan", "save"]))
    words = data.draw(words_of(call.commands[name]))
    assume(not {"-h", "--help"} & set(words))
    code, said = call(name, *words)
    lines = said.strip().splitlines()
    assert code in (0, None) and not lines or code == 2 and is_plain(lines[-1], 1300), (words, code, said)


OF_2020 = st.builds(lambda name, value: f"--{name}={value}", st.sampled_from(sorted(FLAGS)), st.one_of(
    TEXTS, SMALL.map(str), st.sampled_from(["true", "false", "steps", "epoch", "1"])))
COMPLETE = ["--output_dir=output", "--do_train", "--train_data_file=a.txt", "--model_name_or_path=gpt2"]


@examples(250)
@given(st.lists(OF_2020, max_size=3), st.booleans())
def test_the_flags_of_2020_are_translated_or_refused_in_a_line(capsys, flags, complete):
    words = [*(COMPLETE if complete else ()), *flags]
    try: translate(parse(words))
    except SystemExit as e:
        said = capsys.readouterr().err.strip()
        assert e.code == 2 and is_plain(said), (words, said)
    except ValueError as e: assert str(e) and is_plain(cli.one_line(e)), (words, e)


# What is read back from a disk

MANIFESTS = st.one_of(st.binary(max_size=60), JSON.map(lambda value: json.dumps(value).encode()),
                      st.dictionaries(st.sampled_from("files sha256 run step steps saved rate_factor".split()), JSON,
                                      max_size=7).map(lambda value: json.dumps(value).encode()))

def look(tmp_path_factory, name):
    "A folder that all examples of a test share."
    folder = Path(tmp_path_factory.getbasetemp())/name
    folder.mkdir(exist_ok=True)
    return folder


@examples(200)
@given(MANIFESTS)
def test_any_manifest_is_that_of_a_complete_checkpoint_or_of_none(tmp_path_factory, content):
    output = look(tmp_path_factory, "manifests")
    folder = output/"checkpoint-1"
    folder.mkdir(exist_ok=True)
    (folder/"config.json").write_text("{}")
    (folder/"whole.json").write_bytes(content)
    found = read_manifest(folder)
    assert found is None or isinstance(found, dict)
    with contextlib.suppress(ValueError): check_intact(folder)


@examples(150)
@given(st.sampled_from(["files", "sha256", "run", "step", "steps", "saved", "rate_factor"]), JSON)
def test_a_complete_manifest_with_another_value_raises_nothing(tmp_path_factory, key, value):
    output = look(tmp_path_factory, "changed")
    folder = output/"checkpoint-1"
    folder.mkdir(exist_ok=True)
    (folder/"config.json").write_text("{}")
    write_manifest(folder, dict(seed=1))
    manifest = json.loads((folder/"whole.json").read_text())
    (folder/"whole.json").write_text(json.dumps({**manifest, key: value}))
    with contextlib.suppress(ValueError): check_intact(folder)


@examples(200)
@given(MANIFESTS)
def test_any_manifest_in_a_mirror_is_that_of_an_entry_or_damaged(content):
    try: entry = read_entry("checkpoint-1", content.decode(errors="replace"))
    except ValueError as e: assert is_plain(str(e))
    else: assert entry.step == 1 and entry.bytes >= 0


@examples(200)
@given(st.one_of(st.binary(max_size=60), JSON.map(lambda value: json.dumps(value).encode()), st.dictionaries(
    st.sampled_from("time step process started machine boot".split()), JSON, max_size=6).map(
        lambda value: json.dumps(value).encode())))
def test_any_heartbeat_is_that_of_a_machine_or_of_none(content):
    with contextlib.suppress(ValueError):
        last, drive = read_heartbeat(content.decode()), SimpleNamespace(beats=30, called="the Drive")
        assert 0 <= silence(last, drive) <= 150
        try: refuse(last, drive)
        except BlockingIOError as e: assert is_plain(str(e))


KEYS = "config files fingerprint plan losses samples runtime perplexity_before steps repeated evaluated".split()
RESULTS = st.one_of(MANIFESTS, st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4).map(
    lambda told: json.dumps(told).encode()))

@examples(200)
@given(RESULTS)
def test_any_finetune_json_is_that_of_a_finished_run_or_of_none(tmp_path_factory, content):
    folder = look(tmp_path_factory, "finished")
    (folder/"finetune.json").write_bytes(content)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert training.read_finished(folder) is None
        for found in found_in(folder): newest_intact([found])
    assert all(is_plain(cli.one_line(w.message)) for w in said)


# Archives

TYPES = [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, b"Z"]
NAMES = st.one_of(st.text(max_size=20), st.sampled_from(
    ["config.json", "a/b", "a", "../x", "/x", "C:x", "a\\..\\b", ".", "", "a/./b", "a" * 300, "d/" * 100 + "f"]))
MEMBERS = st.lists(st.tuples(NAMES, st.sampled_from(TYPES), st.binary(max_size=30), NAMES), max_size=4)

def make_tar(members) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind, content, link in members:
            member = tarfile.TarInfo(name.encode(errors="replace").decode())
            member.type, member.linkname = kind, link.encode(errors="replace").decode()
            member.size = len(content) if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def mutated(data, cuts) -> bytes:
    "`data` with some bytes replaced: (where as a share, what)."
    data = bytearray(data)
    for share, what in cuts:
        at = int(share * (len(data) - 1))
        data[at:at + len(what)] = what
    return bytes(data)


MUTATIONS = st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=12)), max_size=3)

@examples(150)
@given(MEMBERS, MUTATIONS, MUTATIONS)
def test_an_archive_is_unpacked_inside_its_folder_or_refused(tmp_path_factory, members, in_tar, in_gzip):
    place = look(tmp_path_factory, "archives")
    packed = mutated(gzip.compress(mutated(make_tar(members), in_tar), mtime=0), in_gzip)
    (place/"a.tar.gz").write_bytes(packed)
    try: extract_archive(place/"a.tar.gz", place/"back", progress=False)
    except (ValueError, OSError) as e: assert is_plain(cli.one_line(e)), e
    else:
        for path in sorted((place/"back").rglob("*"), reverse=True): path.rmdir() if path.is_dir() else path.unlink()
        (place/"back").rmdir()
    assert os.listdir(place) == ["a.tar.gz"]


# The splitter

@pytest.fixture(scope="module")
def encode(): return Encoder(load_tokenizer("tiny")).encode


PIECES = st.lists(st.one_of(st.text(max_size=12), st.sampled_from(
    [" ", "\n", "\n\n", "   ", "\r\n", "\u3000", "word", " the", "<|endoftext|>", "'s", "123", "é", "e\u0301",
     "👩‍👩‍👧"])),
    max_size=90).map("".join)

@examples(200)
@given(PIECES, st.integers(1, 60), st.integers(28, 60))
def test_a_text_in_windows_has_the_tokens_of_one_piece(encode, text, size, context):
    "A context is longer than two added tokens: the real one has 1,024 characters."
    text = text.encode(errors="replace").decode()
    pieces = list(read_windows(io.StringIO(text, newline=""), encode, size=size, context=context))
    assert "".join(piece for piece, _ in pieces) == text
    assert [i for _, ids in pieces for i in ids] == encode([text])[0].tolist()


# Words

@examples(200)
@given(st.text(max_size=30), st.sampled_from(["{resume}", "{value!r}", "{mirror=off}", "{output_dir} {value}"]))
@example("{", "{value!r}")
@example("{value}", "{output_dir} {value}")
def test_a_sentence_says_a_value_as_it_is(value, template):
    said = Sentence(f"{template}: {{value}}.", value=value)
    assert said.endswith(f": {value}.") and said.render(cli.name_of).endswith(f": {value}.")
    assert not CONTROLS.search(printable(said)) and printable(said).encode()
