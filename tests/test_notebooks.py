"""Each notebook is one case, run as `nbdev_test` runs it, in a forked process. What its cells keep is what they show
now, byte for byte.

The tutorial, which trains a model, is test_tutorial.py's; nbs/tutorials/.notest tells nbdev_test. nbs/index.ipynb is
run by people for the README: its outputs, speeds among them, are not compared.
"""
import json, re
from dataclasses import replace
from pathlib import Path

import pytest
import show
from helpers.forks import forked

ROOT = Path(__file__).parents[1]


def kept_by(notebook):
    "{id of a cell: its outputs} of the cells that keep any."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return {cell["id"]: cell["outputs"] for cell in cells if cell.get("outputs")}


def run_briefly(notebook):
    "The README's notebook with a shorter demo than a reader's: 15 steps show what a hundred would."
    from colab_gpt2 import tasks
    tasks.DEMO = replace(tasks.DEMO, max_steps=15)
    return show.run(notebook)


LIBRARIES = "transformers|accelerate|datasets|huggingface_hub|tokenizers|peft|IPython|ipywidgets"
VERSIONED = re.compile(rf"(?:from|import) ({LIBRARIES})\b")


def as_case(notebook):
    "A parameter; of a notebook that imports none of the libraries whose versions Colab's image has otherwise, `same`."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    same = notebook.stem not in ("index", "91_run_language_modeling") and not any(map(VERSIONED.search, code))
    return pytest.param(notebook, id=notebook.stem, marks=[pytest.mark.same] * same)


@pytest.mark.parametrize("notebook", map(as_case, [*show.numbered(), ROOT/"nbs"/"index.ipynb"]))
def test_notebook(notebook):
    ran = forked(run_briefly if notebook.stem == "index" else show.run, notebook, cwd=ROOT/"nbs", timeout=540)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    error, shown = ran.result
    assert error == ""
    if notebook.stem == "index": return
    kept = kept_by(notebook)
    again = f"`make show`, or python tools/show.py {notebook.relative_to(ROOT)}"
    assert kept == {key: shown.get(key) for key in kept}, again


def test_the_command_that_readers_run(shell):
    ran = shell("nbdev_test", "--path", ROOT/"nbs"/"00_core.ipynb", "--do_print", cwd=ROOT)
    assert ran.returncode == 0 and "Success" in ran.stdout, ran.stdout + ran.stderr
