"What several test files need."
import os, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared():
    "The folder of real text, tokenizer and Colab's package lists, which lies beside a developer's checkout and is never part of it."
    folder = ROOT.parent/"shared"
    if not folder.is_dir(): pytest.skip("the real text and lists of ../shared are not beside this checkout")
    return folder


@pytest.fixture
def shell(tmp_path):
    "Run a command in an empty folder; -> CompletedProcess with text. `colab-gpt2` is the command line of this environment."
    def run(*words, timeout=300, cwd=tmp_path, **env):
        words = [sys.executable, "-c", "from colab_gpt2.cli import main; main()", *words[1:]] if words[0] == "colab-gpt2" else list(words)
        return subprocess.run([str(w) for w in words], cwd=cwd, env={**os.environ, **env}, text=True, capture_output=True, timeout=timeout)
    return run


@pytest.fixture(autouse=True)
def nothing_of_colab_stays():
    "A test that pretends to be on Colab has ended that when it is over: the next one in this process would be there too."
    yield
    assert "COLAB_RELEASE_TAG" not in os.environ
