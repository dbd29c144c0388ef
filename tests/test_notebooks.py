"""Each notebook is one case, run as `nbdev_test` runs it, in a forked process. What its cells keep is what they show
now, byte for byte.

The tutorial, which trains a model, is test_tutorial.py's; nbs/tutorials/.notest tells nbdev_test. nbs/index.ipynb is
run by people for the README: its outputs, speeds among them, are not compared.
"""
import json
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


@pytest.mark.parametrize("notebook", [*show.numbered(), ROOT/"nbs"/"index.ipynb"], ids=lambda p: p.stem)
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
