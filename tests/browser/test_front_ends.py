"What the panels stand on, without them: a click is handled while a cell runs, and the cells after it wait."
import re, time

import pytest
from nbformat.v4 import new_code_cell, new_notebook

LOOP = """
import re, time
import ipywidgets as widgets
from colab_gpt2.panels.pump import pump
asked, button, said = [], widgets.Button(description="Stop the loop"), widgets.HTML()
button.on_click(lambda _: asked.append(True))
display(button, said)
for step in range(300):
    time.sleep(0.1)
    pump()
    said.value = f"<b>at {step}</b>"
    if asked: break
said.value = f"<b>stopped at {step}</b>"
"""


@pytest.mark.timeout(120)
def test_a_click_is_handled_while_a_cell_runs(opened, record_property):
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    cells = [new_code_cell(LOOP), new_code_cell("print('afterwards:', step)")]
    notebook = opened(new_notebook(cells=cells, metadata=kernel))
    notebook.run_all()
    notebook.page.get_by_text(re.compile(r"^at \d\d")).wait_for()
    clicked = time.monotonic()
    notebook.page.get_by_role("button", name="Stop the loop").click()
    notebook.page.get_by_text("stopped at").last.wait_for()
    seconds = time.monotonic() - clicked
    record_property("seconds from a click to its effect", f"{seconds:.2f}")
    notebook.wait_until_run(20)
    loop, after = notebook.saved().cells
    step = notebook.page.get_by_text("stopped at").last.text_content().split()[-1]
    assert after.outputs[0].text == f"afterwards: {step}\n"
    assert seconds < 3 and notebook.complaints == [], (seconds, notebook.complaints)
