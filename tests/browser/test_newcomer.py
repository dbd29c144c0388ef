"The tutorial as a newcomer meets it, in each front end: open, Run all, read; then the five panels by hand. Each test needs no more than that all was run once."
import re, time
from pathlib import Path

import nbformat
import pytest

from front_ends import ROOT

pytestmark = pytest.mark.timeout(300)
MACHINE, TEXT, TRAINING, WRITING, DRIVE = "1. The machine", "2. The text", "3. Fine-tune", "4. Generate", "5. Save to Drive"


@pytest.fixture(scope="module")
def ran(opened):
    "The tutorial after Run all; a picture was taken while it trained."
    notebook = opened(nbformat.read(ROOT/"nbs"/"tutorials"/"colab_gpt2.ipynb", as_version=4))
    notebook.picture("opened")
    notebook.run_all()
    training = notebook.panel(TRAINING)
    training.locator("svg polyline").first.wait_for(timeout=120_000)
    notebook.picture("training", training)
    notebook.wait_until_run(200)
    return notebook


def said(panel): return panel.get_by_role("status").or_(panel.get_by_role("alert")).last.inner_text()


def wait_said(panel, words, seconds=60):
    "Until the panel's sentence of state begins with `words`; -> the sentence. The traceback that is folded into one may have any words."
    panel.locator(".cg-note, .cg-error").filter(has_text=re.compile(rf"^\W*{re.escape(words)}")).last.wait_for(timeout=seconds * 1000)
    return said(panel)


def fill(panel, label, text):
    "Type into a field, and leave it."
    panel.get_by_label(label, exact=True).fill(text)
    panel.get_by_label(label, exact=True).press("Tab")


def press(panel, name): panel.get_by_role("button", name=name, exact=True).click()


def test_run_all(ran, record_property):
    "To the end, with a model on the Drive; nothing on stderr, no error, no complaint of the page, and a picture that stays when the kernel is gone."
    saved = ran.saved()
    outputs = [output for cell in saved.cells for output in cell.get("outputs", ())]
    assert [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr" and o.text != "Mounted at /content/drive\n"] == []  # so says Colab
    assert "No GPU" in ran.panel(MACHINE).inner_text() and "Done in" in said(ran.panel(TRAINING))
    assert said(ran.panel(DRIVE)).startswith("✓ Saved gpt2-tuned.tar.gz"), said(ran.panel(DRIVE))
    assert (ran.server.folder.parent/"drive"/"MyDrive"/"colab-gpt2"/"gpt2-tuned.tar.gz").exists()
    assert any("image/svg+xml" in o.get("data", {}) for o in outputs)
    assert ran.complaints == []
    spent, seconds = map(float, ran.server.ask("print(training.live.spent, training.result.seconds)").split())
    record_property("pump and pictures", f"{spent:.2f} s of {seconds:.0f} s, {spent/seconds:.2%}")
    assert spent / seconds < 0.02
    for name, title in dict(machine=MACHINE, text=TEXT, trained=TRAINING, written=WRITING, saved=DRIVE).items(): ran.picture(name, ran.panel(title))


def test_train_by_hand(ran, record_property):
    "Values changed, a bad one marked; the curve grows, a sample comes, Stop is obeyed, and Start goes on."
    panel = ran.panel(TRAINING)
    fill(panel, "Learning rate", "-1")
    panel.get_by_text("Learning rate is -1").wait_for()
    assert panel.get_by_role("button", name="Start", exact=True).is_disabled()
    ran.picture("bad-value", panel)
    for label, text in {"Learning rate": "5e-4", "Epochs": "0.6", "Output folder": "by-hand"}.items(): fill(panel, label, text)
    panel.get_by_text("Advanced", exact=True).click()
    assert panel.get_by_label("Optimizer", exact=True).locator("option:checked").text_content() == "automatic"
    fill(panel, "Log every", "1")
    press(panel, "Start")
    curve = panel.locator("svg polyline").first
    curve.wait_for(state="detached")  # that of the run before
    curve.wait_for(timeout=60_000)
    points = lambda: len(curve.get_attribute("points").split())
    before = points()
    press(panel, "Sample now")
    panel.get_by_text("At step").wait_for(timeout=30_000)
    ran.page.wait_for_timeout(2_000)
    assert points() > before
    clicked = time.monotonic()
    press(panel, "Stop")
    sentence = wait_said(panel, "Stopped at step")
    seconds = time.monotonic() - clicked
    record_property("seconds from Stop to stopped and saved", f"{seconds:.2f}")
    ran.picture("stopped", panel)
    assert seconds < 3
    step = int(re.search(r"Stopped at step (\d+)", sentence)[1])
    press(panel, "Start")
    wait_said(panel, "Done in", 120)
    assert ran.server.ask("print(training.result.resumed_from)").strip() == str(Path("by-hand")/f"checkpoint-{step}")


def test_generate_by_hand(ran):
    panel = ran.panel(WRITING)
    panel.get_by_label("Prompt", exact=True).fill(" = Lists = \n")
    fill(panel, "Seed", "7")
    press(panel, "Generate")
    assert "with seed 7" in wait_said(panel, "Done, with seed 7")
    texts = panel.locator("pre[tabindex]").all_inner_texts()
    assert len(texts) == 2 and all("= Lists =" in text for text in texts) and texts[0] != texts[1]
    panel.get_by_role("button", name="Copy").last.click()
    panel.get_by_text(re.compile("Copied|Selected")).wait_for()
    ran.picture("generated", panel)


def test_drive_by_hand(ran):
    "Mounted, saved, broken: what went wrong is a sentence that says what to do, and mended it works again."
    panel = ran.panel(DRIVE)
    press(panel, "Mount")
    wait_said(panel, "The Drive is at /content/drive/MyDrive")
    fill(panel, "Folder on it", "elsewhere")
    ran.server.ask("from google.colab import _stub; _stub.faults.set(full=4096)")
    press(panel, "Pack and save")
    sentence = wait_said(panel, "Copying gpt2-tuned.tar.gz")
    ran.picture("drive-full", panel)
    assert sentence.startswith("⚠") and "is full. Free some space" in sentence and "Traceback" not in sentence
    ran.server.ask("_stub.faults.set(full=None)")
    press(panel, "Pack and save")
    wait_said(panel, "Saved gpt2-tuned.tar.gz")
    assert (ran.server.folder.parent/"drive"/"MyDrive"/"elsewhere"/"gpt2-tuned.tar.gz").exists()


def test_it_fits_a_narrow_window(ran):
    if ran.server.front_end.name == "lab": ran.page.keyboard.press("Control+b")  # its list of files takes a third of so narrow a window
    ran.page.set_viewport_size(dict(width=800, height=3600))
    wide = ran.page.locator(".cg-panel").evaluate_all("panels => panels.filter(p => p.scrollWidth > p.clientWidth + 1).length")
    ran.picture("narrow", ran.panel(TRAINING))
    assert wide == 0
