"What several test files need."
import gc, os, signal, subprocess, sys
from pathlib import Path

import pytest
from helpers import pretend_gpu
from helpers.forks import command, forked

from colab_gpt2.signals import ENDING

ROOT = Path(__file__).parents[1]
COMMAND_LINE = [sys.executable, "-c", "from colab_gpt2.cli import main; main()"]  # in a process of its own


@pytest.fixture(scope="session")
def shared():
    "Real text, a tokenizer and Colab's package lists: a folder beside a developer's checkout, never part of it."
    folder = ROOT.parent/"shared"
    if not folder.is_dir(): pytest.skip("the real text and lists of ../shared are not beside this checkout")
    return folder


@pytest.fixture
def shell(tmp_path):
    """Run a command in an empty folder; -> CompletedProcess with text. `colab-gpt2` is the command line of this
    environment: forked from a process that has imported torch, unless the test sets environment variables,
    which libraries read at import."""
    def run(*words, timeout=300, cwd=tmp_path, **env):
        words = [str(w) for w in words]
        if words[0] == "colab-gpt2" and not env: return forked(command, *words[1:], cwd=cwd, timeout=timeout)
        if words[0] == "colab-gpt2": words = [*COMMAND_LINE, *words[1:]]
        options = dict(text=True, capture_output=True, timeout=timeout)
        return subprocess.run(words, cwd=cwd, env={**os.environ, **env}, **options)
    return run


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    "A model of two narrow layers with the tokenizer of `tiny`, for what any model shows; -> its folder."
    from helpers.toys import write_toy
    from colab_gpt2.model.loading import load_config
    folder, shape = tmp_path_factory.mktemp("models")/"small", load_config("tiny")
    shape.n_layer, shape.n_embd, shape.n_head = 2, 64, 2
    write_toy(folder, shape)
    return str(folder)


@pytest.fixture(scope="session")
def on_gpu(tmp_path_factory):
    "Call a function in a process with a pretended GPU, see `helpers.pretend_gpu`; `on_gpu(train, \"gpt2\")`."
    if reason := pretend_gpu.why_not(): pytest.skip(reason)
    with pretend_gpu.process(tmp_path_factory.mktemp("gpu")) as call: yield call


FROZEN = [0]  # modules that were imported when garbage was last set apart


@pytest.fixture(autouse=True)
def the_libraries_are_no_garbage():
    "Half a million objects of torch and transformers, which each collection would look through again: half the time."
    if len(sys.modules) < FROZEN[0] + 100: return
    gc.collect()
    gc.freeze()
    FROZEN[0] = len(sys.modules)


@pytest.fixture(autouse=True)
def what_a_test_pretends_ends_with_it():
    "Colab, and handlers of signals: or the next test of this process would have them too."
    signals = [signal.getsignal(number) for number in ENDING]
    yield
    assert "COLAB_RELEASE_TAG" not in os.environ and signals == [signal.getsignal(number) for number in ENDING]
