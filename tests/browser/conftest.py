"A browser, a server for each of the three front ends, a notebook in it."
import contextlib, re, shutil
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import sync_playwright

from front_ends import FRONT_ENDS, ROOT, serving
from pages import Notebook

CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]
BADGE = ("<svg xmlns='http://www.w3.org/2000/svg' width='117' height='20'>"  # for the only picture from elsewhere
         "<rect width='117' height='20' rx='3' fill='#555'/></svg>")
SHOTS = ROOT/"tests"/"browser"/"screenshots"


@pytest.fixture(scope="session")
def browser():
    assert Path(CHROMIUM).exists(), f"{CHROMIUM} is missing; `make test-browser` installs it"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=60_000)  # a new profile
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def shots():
    "The folder of screenshots, emptied of those of the run before."
    shutil.rmtree(SHOTS, ignore_errors=True)
    SHOTS.mkdir()
    return SHOTS


@pytest.fixture(scope="module", params=FRONT_ENDS, ids=lambda f: f.name)
def opened(request, browser, shots, tmp_path_factory):
    "A function: open `notebook` in one of the front ends; -> pages.Notebook."
    with contextlib.ExitStack() as stack:
        def open(notebook, width=1280, height=2800):  # as high as the tallest panel, which is taken a picture of
            folder = tmp_path_factory.mktemp(request.param.name)
            context = stack.enter_context(browser.new_context(viewport=dict(width=width, height=height)))
            context.set_default_timeout(20_000)
            elsewhere = re.compile(r"^https?://(?!127\.0\.0\.1)")
            context.route(elsewhere, lambda route: route.fulfill(content_type="image/svg+xml", body=BADGE))
            (folder/"notebooks").mkdir()
            nbformat.write(notebook, folder/"notebooks"/"tutorial.ipynb")
            server = stack.enter_context(serving(request.param, folder))
            return Notebook(context.new_page(), server, "tutorial.ipynb", shots).open()
        yield open


def pytest_terminal_summary(terminalreporter):
    "What was measured, beneath the results: each test tells it by record_property."
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    told = [(report.nodeid, name, value) for report in reports for name, value in report.user_properties]
    if told: terminalreporter.section("measured")
    for nodeid, name, value in told: terminalreporter.line(f"{nodeid.split('::')[1]}  {name}: {value}")
