"A run that the notebook's own button interrupts, one whose page is loaded again; and `app`, the five panels in one."
import re, time

import pytest
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import expect

from test_newcomer import fill, press, wait_said

pytestmark = pytest.mark.timeout(300)
APP = "from colab_gpt2 import FinetunePanel, app\n\nshown = app()\nshown"
TEXT = """with open("tides.txt", "w") as file:
    for day in range(3000): file.write(f"The tide of day {day} came in at {day % 12} o'clock and went out again.\\n\\n")
"""  # of which little is held out
RUN = TEXT + """training = FinetunePanel(model="tiny", train_file="tides.txt", max_new_tokens=20, logging_steps=1,
                         block_size=128, effective_batch_size=4, num_train_epochs=20, output_dir="midway",
                         overwrite_output_dir=True)
display(training)
training.start();"""


@pytest.fixture(scope="module")
def begun(opened):
    "A notebook with `app` in its first cell, whose second cell trains."
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    notebook = opened(new_notebook(cells=[new_code_cell(APP), new_code_cell(RUN)], metadata=kernel))
    notebook.run_all()
    curve(notebook).wait_for(timeout=90_000)
    return notebook


def panel(notebook): return notebook.page.locator(".cg-panel").last


def curve(notebook): return panel(notebook).locator("svg polyline").first


def wait_until_it_grows(notebook):
    curve(notebook).wait_for(timeout=60_000)
    expect(curve(notebook)).not_to_have_attribute("points", curve(notebook).get_attribute("points"), timeout=30_000)


def stopped_at(notebook):
    "The step, of which there is a checkpoint."
    step = int(re.search(r"Stopped at step (\d+)", wait_said(panel(notebook), "Stopped at step"))[1])
    assert (notebook.server.folder/"midway"/f"checkpoint-{step}"/"model.safetensors").exists()
    return step


def load_again(notebook, tries=3):
    """As it is on the disk, in the middle of a run; the panel is there again and the curve in it grows.

    A widget that JupyterLab draws waits two seconds for its model, and looks ten times a second; where the kernel's
    answer comes after the last look and before the end, it says for good that there is none. Whoever sees that loads
    the page once more."""
    notebook.saved()
    notebook.page.reload()
    notebook.page.locator(notebook.at["cell"]).first.wait_for()
    lost = notebook.page.get_by_text("Error displaying widget: model not found").first
    curve(notebook).or_(lost).first.wait_for(timeout=60_000)
    if lost.count() and tries > 1: return load_again(notebook, tries - 1)
    wait_until_it_grows(notebook)


def test_the_notebooks_own_stop_button(begun):
    "■ of the toolbar, while a cell trains: stopped and saved, as the panel says; no error, and no other word."
    begun.interrupt()
    stopped_at(begun)
    begun.picture("interrupted", panel(begun))
    begun.wait_until_run(20)
    outputs = [output for cell in begun.saved().cells for output in cell.outputs]
    assert [output for output in outputs if output.output_type in ("error", "stream")] == []


def test_the_page_is_loaded_again_while_a_click_trains(begun):
    before = stopped_at(begun)
    press(panel(begun), f"Continue from step {before}")
    wait_until_it_grows(begun)
    load_again(begun)
    begun.picture("loaded-again")
    press(panel(begun), "Stop")
    assert stopped_at(begun) > before


def test_the_page_is_loaded_again_while_a_cell_trains(begun):
    begun.run_all()
    wait_until_it_grows(begun)
    load_again(begun)
    press(panel(begun), "Stop")
    stopped_at(begun)


def test_app(begun):
    "One cell that shows all five, a tab for each: the first has looked at the machine, the second follows the third."
    machine, text, training = map(begun.panel, ("1. The machine", "2. The text", "3. Fine-tune"))
    tab = lambda name: begun.page.locator(".lm-TabBar-tab, .p-TabBar-tab").filter(has_text=name).click()
    begun.page.locator(".lm-TabBar-tab, .p-TabBar-tab").first.wait_for()
    assert "No GPU" in machine.inner_text()
    begun.picture("app")
    tab("3. Fine-tune")
    press(training, "More settings")
    fill(training, "Block size", "128")
    training.get_by_text("blocks of 128 tokens a step").wait_for(state="attached")  # folded
    tab("2. Text")
    press(text, "Load text")
    wait_said(text, "python-docs: ")
    assert "blocks of 128" in text.text_content()  # folded
    tab("3. Fine-tune")
    begun.picture("app-training")


SLOW = TEXT + """import sys
from colab_gpt2 import FinetunePanel
slow = FinetunePanel(model="tiny", train_file="tides.txt", block_size=512, per_device_train_batch_size=6, max_steps=50,
                     effective_batch_size=6, max_new_tokens=20, output_dir="slow", mirror="off",
                     overwrite_output_dir=True)
made_with_torch = "torch" in sys.modules
slow"""


def test_a_panel_comes_up_at_once_and_answers_inside_a_step(opened, record_property):
    """It is on the page while what it needs is still being imported; a click in a step of seconds is told in that step.

    The targets are 1 s and 0.3 s, with a core to itself. On a machine that is slow or shared the bounds grow with what
    the same kernel needs until the panel is ready, which is the import of torch mostly, and for a step."""
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    notebook = opened(new_notebook(cells=[new_code_cell(SLOW)], metadata=kernel))
    notebook.run_all()
    began = time.monotonic()
    panel(notebook).get_by_text("Loading …").last.wait_for()
    painted = time.monotonic() - began
    expect(panel(notebook).get_by_role("button", name="Train", exact=True)).to_be_enabled(timeout=120_000)
    ready = time.monotonic() - began
    record_property("seconds to the first paint of the training panel, and until it is ready",
                    f"{painted:.2f}, {ready:.2f}")
    press(panel(notebook), "Train")
    panel(notebook).get_by_text(re.compile(r"step [1-9]\d* of 50")).wait_for(timeout=120_000)
    step, clicked = notebook.page.locator(".cg-progress").last.inner_text(), time.monotonic()
    press(panel(notebook), "Stop")
    wait_said(panel(notebook), "Stopping after this step")
    sign = time.monotonic() - clicked
    taken = re.compile(r"step \d+ of 50")
    assert taken.search(notebook.page.locator(".cg-progress").last.inner_text())[0] == taken.search(step)[0]
    wait_said(panel(notebook), "Stopped at step")
    made_with, seconds = notebook.server.ask("print(made_with_torch, slow.planned.step_seconds)").split()
    record_property("seconds from a click to the first sign, in steps of so many", f"{sign:.2f}, {float(seconds):.2f}")
    assert made_with == "False" and painted < max(1, ready / 3), (painted, ready)
    assert sign < max(0.3, float(seconds) / 4), (sign, seconds)
