"Each notebook is one case, run by the command that its readers would run. The tutorial, which trains a model, is test_tutorial.py's; nbs/tutorials/.notest tells nbdev_test."
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if p.parent.name != "tutorials")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(notebook, shell):
    ran = shell("nbdev_test", "--path", notebook, "--do_print", cwd=ROOT)
    assert ran.returncode == 0 and "Success" in ran.stdout, ran.stdout + ran.stderr
