"A browser, a server for each of the three front ends, a notebook in it."
import contextlib, shutil
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import sync_playwright

from front_ends import FRONT_ENDS, ROOT, serving
from pages import Notebook

CHROMIUM = "/usr/bin/chromium"
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync").split()
SHOTS = ROOT/"tests"/"browser"/"screenshots"


@pytest.fixture(scope="session")
def browser():
    assert Path(CHROMIUM).exists(), f"{CHROMIUM} is missing; `make test-browser` installs it"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=60_000)  # with a fresh profile
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def shots():
    "The folder of screenshots, emptied of those of the run before."
    shutil.rmtree(SHOTS, ignore_errors=True)
    SHOTS.mkdir()
    return SHOTS


@pytest.fixture(params=FRONT_ENDS, ids=lambda f: f.name)
def front_end(request): return request.param


@pytest.fixture
def opened(browser, front_end, shots, tmp_path):
    "A function: open `notebook` in the front end, with a kernel of Colab's or a plain one; -> pages.Notebook."
    with contextlib.ExitStack() as stack:
        def open(notebook, colab=False, width=1100, height=1000):
            context = stack.enter_context(browser.new_context(viewport=dict(width=width, height=height)))
            context.set_default_timeout(20_000)
            (tmp_path/"notebooks").mkdir()
            nbformat.write(notebook, tmp_path/"notebooks"/"tutorial.ipynb")
            return Notebook(context.new_page(), stack.enter_context(serving(front_end, tmp_path, colab)), "tutorial.ipynb", shots).open()
        yield open
