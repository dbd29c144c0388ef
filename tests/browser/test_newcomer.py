"The tutorial as a newcomer meets it, in each front end: open, Run all, read; then the five panels by hand."
import os, re, shutil, signal, subprocess, sys, time
from pathlib import Path
from pydoc_data.topics import topics

import nbformat
import pytest
from playwright.sync_api import TimeoutError, expect

from front_ends import ROOT

pytestmark = pytest.mark.timeout(300)
RESUMING = re.compile(r"Resuming at step \d+ of \d+\. Your last session saved this .* before it ended\.")
TITLES = MACHINE, TEXT, TRAINING, WRITING, DRIVE = (
    "1. The machine", "2. The text", "3. Fine-tune", "4. Generate", "5. Save your model")
PICTURES = dict(machine=MACHINE, text=TEXT, trained=TRAINING, written=WRITING, saved=DRIVE)


def drive_of(notebook): return notebook.server.folder.parent/"drive"


def lose_machine(notebook, kernel):
    "End the process `kernel` without a word, and take away what was on its disk; the Drive has what it has."
    os.kill(kernel, signal.SIGKILL)
    for folder in (notebook.server.folder/"gpt2-tuned", notebook.server.folder.parent/"cache"): shutil.rmtree(folder)
    shutil.rmtree(notebook.server.mount)  # it is not mounted on the next machine
    (drive_of(notebook)/"mounted-at").unlink()
    notebook.after_a_crash()


@pytest.fixture(scope="module")
def ran(opened):
    "The tutorial after Run all in two sessions: the machine of the first is lost while it trains."
    notebook = opened(nbformat.read(ROOT/"nbs"/"tutorials"/"colab_gpt2.ipynb", as_version=4))
    notebook.page.get_by_role("heading", name="Fine-tune GPT-2 for free").wait_for()
    notebook.picture("opened")
    kernel = int(notebook.server.ask("import os; print(os.getpid())"))
    notebook.run_all()
    training = notebook.panel(TRAINING)
    training.locator("svg polyline").first.wait_for(timeout=120_000)
    notebook.picture("training", training)
    notebook.height = training.bounding_box()["height"]
    notebook.wait_until(lambda: list(drive_of(notebook).glob("MyDrive/colab-gpt2/runs/*/checkpoint-*/whole.json")), 60)
    lose_machine(notebook, kernel)
    notebook.picture("lost", training)
    notebook.run_all()
    training.get_by_text(RESUMING).wait_for(timeout=120_000)
    notebook.picture("resuming", training)
    notebook.wait_until_run(200)
    return notebook


SENTENCE = """line => {
    const copy = line.cloneNode(true);
    for (const part of copy.querySelectorAll('.cg-word, details')) part.remove();
    return copy.textContent.trim().replace(/\\s+/g, ' '); }"""


def said(panel):
    "The sentence of state, after its sign and without the word that tells its kind."
    return panel.locator(".cg-state").last.evaluate(SENTENCE)


def wait_said(panel, words, seconds=60):
    "Until the panel's sentence of state begins with `words`; -> the sentence."
    begins = re.compile(rf"^\W*(?:Working|Done|Needs you|Stopped|Failed)?\W*{re.escape(words)}")
    try: panel.locator(".cg-state").filter(has_text=begins).last.wait_for(timeout=seconds * 1000)
    except TimeoutError: raise AssertionError(f"The panel says {said(panel)!r}, not {words!r}.") from None
    return said(panel)


def fill(panel, label, text):
    "Type into a field, and leave it."
    panel.get_by_label(label, exact=True).fill(text)
    panel.get_by_label(label, exact=True).press("Tab")


def press(panel, name):
    "Click a button; one that folds has an icon before its name."
    panel.get_by_role("button", name=re.compile(rf"^\W*{re.escape(name)}$")).click()


def test_run_all(ran, record_property):
    "To the end, with a model on the Drive; no error, nothing on stderr, no complaint, a picture that stays."
    saved = ran.saved()
    outputs = [output for cell in saved.cells for output in cell.get("outputs", ())]
    mounted = f"Mounted at {ran.server.mount}\n"  # so says Colab
    assert [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr" and o.text != mounted] == []
    assert "No GPU" in ran.panel(MACHINE).inner_text() and "Done in" in said(ran.panel(TRAINING))
    assert "There is no GPU here, so this starts with the small embedded model" in ran.panel(TRAINING).text_content()
    told = [panel.inner_text() for panel in ran.page.locator(".cg-panel").all()]
    notes = [note for text in told for note in re.findall(r"Note: .*", text)]  # as a panel begins a warning
    assert [note for note in notes if not note.startswith("Note: Each new checkpoint")] == []  # what is copied
    assert said(ran.panel(DRIVE)).startswith("✓ Saved gpt2-tuned.tar.gz"), said(ran.panel(DRIVE))
    assert (drive_of(ran)/"MyDrive"/"colab-gpt2"/"gpt2-tuned.tar.gz").exists()
    assert any("image/svg+xml" in o.get("data", {}) for o in outputs)
    assert ran.complaints == []
    spent, seconds = map(float, ran.server.ask("print(training.live.spent, training.result.seconds)").split())
    record_property("pump and pictures", f"{spent:.2f} s of {seconds:.0f} s, {spent/seconds:.2%}")
    assert spent / seconds < 0.02
    for name, title in PICTURES.items(): ran.picture(name, ran.panel(title))
    kilobytes = (ran.server.folder/ran.name).stat().st_size / 1000
    record_property("saved notebook", f"{kilobytes:.0f} kB")
    record_property("height of the panel while it trains", f"{ran.height:.0f} px")
    assert kilobytes <= 60 and ran.height <= 800  # 1280 px wide


UNINTERRUPTED = """
import hashlib
from dataclasses import replace
from colab_gpt2 import finetune
finetune(replace(training.config, output_dir="uninterrupted", mirror="off"), progress=False)
"""
uninterrupted = {}  # the environment of a kernel -> weights: made once in each


def test_a_lost_machine_costs_nothing(ran):
    "The model is that of a run that nothing interrupts, bit for bit; no field was touched."
    def weights(folder): return (ran.server.folder/folder/"model.safetensors").read_bytes()
    if (made_in := ran.server.front_end.environment) not in uninterrupted:
        ran.server.ask(UNINTERRUPTED, 200)
        uninterrupted[made_in] = weights("uninterrupted")
    assert weights("gpt2-tuned") == uninterrupted[made_in]


def test_run_all_again(ran):
    "The result is shown without training, written from and packed again, with the same bytes as before."
    archive = drive_of(ran)/"MyDrive"/"colab-gpt2"/"gpt2-tuned.tar.gz"
    before = archive.read_bytes()
    ran.run_all()
    ran.wait_until_run(100)
    assert said(ran.panel(TRAINING)).startswith("✓ Shown as it ended")
    ran.picture("again", ran.panel(TRAINING))
    assert said(ran.panel(WRITING)).startswith("✓ Done") and said(ran.panel(DRIVE)).startswith("✓ Saved")
    assert [path.read_bytes() for path in archive.parent.glob("*.tar.gz")] == [before]


MAIN = re.compile("^(Train|Continue from|Replace and|Show the)")  # the words of the training's button


def errors_of(notebook):
    return [o for cell in notebook.saved().cells for o in cell.get("outputs", ()) if o.output_type == "error"]


def test_restart_and_run_all(ran):
    "The kernel is started again and all cells run: each time the result is shown, and nothing is refused."
    archives = drive_of(ran)/"MyDrive"/"colab-gpt2"
    before = {path.name: path.read_bytes() for path in archives.glob("*.tar.gz")}
    for _ in range(3 if ran.server.front_end.name == "lab" else 1):
        os.kill(int(ran.server.ask("import os; print(os.getpid())")), signal.SIGKILL)
        ran.after_a_crash()
        ran.run_all()
        ran.wait_until_run(150)
        assert errors_of(ran) == [] and said(ran.panel(TRAINING)).startswith("✓ Shown as it ended")
        assert said(ran.panel(WRITING)).startswith("✓ Done") and said(ran.panel(DRIVE)).startswith("✓ Saved")
    assert {path.name: path.read_bytes() for path in archives.glob("*.tar.gz")} == before


@pytest.fixture(scope="session")
def manual(tmp_path_factory):
    "A text of 50 kB that is unlike what `tiny` has read: help texts of Python."
    path = tmp_path_factory.mktemp("own")/"manual.txt"
    path.write_text("\n\n".join(topics[name] for name in sorted(topics))[:50_000])
    return path


BY_HAND = dict(model="tiny", block_size=256, effective_batch_size=4, num_train_epochs=12, learning_rate=5e-4)


@pytest.fixture(scope="session")
def by_hand(manual):
    "The perplexity of the manual's held-out text with the best of the settings that were tried by hand."
    code = f"print(finetune(train_file='manual.txt', output_dir='by-hand', progress=False, **{BY_HAND})"
    words = [sys.executable, "-c", f"from colab_gpt2 import finetune; {code}.perplexity_after.value)"]
    return float(subprocess.run(words, cwd=manual.parent, check=True, capture_output=True, text=True).stdout)


@pytest.mark.timeout(300, func_only=True)  # the other training, by hand, is a fixture
def test_own_text_in_five_clicks(ran, manual, by_hand, record_property):
    """From a finished Run all to a model of a text of one's own, saved: upload, train, save, and nothing typed. It is
    nearly as good as one whose settings were sought by hand."""
    clicks = 0
    upload(ran.panel(TEXT), "Upload a text", manual)
    clicks += 3  # the button, the file, the dialog's own button
    wait_said(ran.panel(TEXT), "manual.txt: ")
    press(ran.panel(TRAINING), "Train")
    clicks += 1
    done = ran.panel(TRAINING).locator(".cg-state").filter(has_text="saved in manual")  # and not of the run before
    done.wait_for(timeout=200_000)
    ran.picture("own-trained", ran.panel(TRAINING))
    press(ran.panel(DRIVE), "Save")
    clicks += 1
    wait_said(ran.panel(DRIVE), "Saved manual.tar.gz")
    record_property("clicks to a model of one's own text, saved", clicks)
    said = "r = training.result; p = r.perplexity_after; print(r.plan.steps, p.value, p.context, r.output_dir)"
    steps, reached, context, output = ran.server.ask(said).split()
    record_property("steps, perplexity on 50 kB, and by hand", (steps, reached, by_hand))
    assert clicks <= 5 and output == "manual" and (ran.server.folder/"manual"/"model.safetensors").exists()
    assert int(steps) >= 100 and float(reached) <= 1.1 * by_hand and int(context) == BY_HAND["block_size"]
    choose(ran.panel(TEXT), "or use", "Python's documentation (0.1 MB, no network)")


def test_train_by_hand(ran, record_property):
    "Values changed, a bad one marked; the curve grows, a sample comes, Stop works, and Start resumes."
    panel = ran.panel(TRAINING)
    press(panel, "Settings")
    press(panel, "More settings")
    fill(panel, "Learning rate", "-1")
    panel.get_by_text("“Learning rate” is -1").wait_for()
    expect(panel.get_by_role("button", name=MAIN).first).to_be_disabled()
    border = panel.get_by_label("Learning rate", exact=True).evaluate("e => getComputedStyle(e).borderColor")
    assert border == "rgb(220, 38, 38)"
    ran.picture("bad-value", panel)
    fill(panel, "Learning rate", "1e-3")
    context = panel.get_by_label("Block size", exact=True).input_value()
    fill(panel, "Block size", "4096")
    refused = panel.get_by_text("“Block size” is 4096, but the model's context is")
    expect(refused).to_have_count(2)  # at the field, and in place of the forecast
    expect(panel.get_by_role("button", name=MAIN).first).to_be_disabled()
    settings = {"Block size": context, "Learning rate": "5e-4", "Output folder": "by-hand"}
    for label, text in settings.items(): fill(panel, label, text)
    assert panel.get_by_label("Optimizer", exact=True).locator("option:checked").text_content() == "automatic"
    for label, text in {"Log every": "1", "Max steps": "30"}.items(): fill(panel, label, text)
    press(panel, "Train")
    curve = panel.locator("svg polyline").first
    curve.wait_for(state="detached")  # that of the run before
    curve.wait_for(timeout=60_000)
    press(panel, "Sample now")
    panel.get_by_text("At step").wait_for(timeout=30_000)
    press(panel, "Save now")
    kept = re.search(r"Saved (checkpoint-\d+) in by-hand", wait_said(panel, "Saved checkpoint-"))[1]
    assert (ran.server.folder/"by-hand"/kept/"model.safetensors").exists()
    points = curve.get_attribute("points")
    expect(curve).not_to_have_attribute("points", points, timeout=20_000)  # the curve grows
    assert len(curve.get_attribute("points").split()) > len(points.split())
    before, clicked = said(panel), time.monotonic()
    press(panel, "Stop")
    ran.wait_until(lambda: said(panel) != before)  # "Saved checkpoint-…"
    seconds = time.monotonic() - clicked
    sentence = wait_said(panel, "Stopped at step")
    record_property("seconds from Stop to saved", f"{seconds:.2f}")
    record_property("seconds from Stop to copied to the Drive", f"{time.monotonic() - clicked:.2f}")
    ran.picture("stopped", panel)
    assert panel.evaluate(WHOLE)
    assert seconds < 3
    step = int(re.search(r"Stopped at step (\d+)", sentence)[1])
    press(panel, f"Continue from step {step}")
    wait_said(panel, "Done in", 120)
    assert ran.server.ask("print(training.result.resumed_from)").strip() == str(Path("by-hand")/f"checkpoint-{step}")


def test_look_again_by_hand(ran):
    "Check again looks at the machine again, and shows what it has found."
    panel, looked = ran.panel(MACHINE), "print(id(machine.result))"
    before = ran.server.ask(looked)
    press(panel, "Check again")
    ran.wait_until(lambda: ran.server.ask(looked) != before)
    ran.server.ask("from colab_gpt2.core import human_bytes as h")
    free, memory = ran.server.ask("r = machine.result; print(h(r.ram_free), h(r.ram), sep='|')").strip().split("|")
    panel.get_by_text(f"{free} free of {memory}").wait_for()
    assert "No GPU" in said(panel)


# in no box that scrolls
WHOLE = "panel => panel.closest('.jp-Cell-outputArea, .output').clientHeight >= panel.offsetHeight"


def choose(panel, label, text): panel.get_by_label(label, exact=True).select_option(label=text)


def upload(panel, button, path):
    "As a reader does: a click on `button`, and a file chosen in the browser's own dialog."
    with panel.page.expect_file_chooser() as chooser: panel.get_by_role("button", name=button).click()
    chooser.value.set_files(path)


def test_own_text_by_hand(ran, tmp_path):
    "What is no text is refused in a sentence; a text is kept, shown, and taken by the training. Then the first again."
    panel, (bad, own) = ran.panel(TEXT), (tmp_path/"picture.txt", tmp_path/"mine.txt")
    bad.write_bytes(b"\x89PNG\xff\xfe\x00")
    own.write_text(" = My Cat = \n\nThe cat sat on the mat, and the mat was flat. \n" * 2000)
    upload(panel, "Upload a text", bad)
    assert "Traceback" not in wait_said(panel, "picture.txt is binary, not text")
    ran.picture("refused-text", panel)
    upload(panel, "Upload a text", own)
    assert "enough to learn a style" in wait_said(panel, "mine.txt: ")
    assert "The cat sat on the mat" in panel.get_by_label("How the text begins").inner_text()
    expect(ran.panel(TRAINING)).to_contain_text("uploads/train_file/mine.txt")  # among the folded settings
    ran.picture("own-text", panel)
    choose(panel, "or use", "WikiText-2, raw (11 MB of Wikipedia)")
    press(panel, "Load text")
    sentence = wait_said(panel, "wikitext-2-raw-v1 could not be fetched")
    ran.picture("no-network", panel)
    assert sentence.startswith("✗") and "Traceback" not in sentence
    choose(panel, "or use", "Python's documentation (0.1 MB, no network)")
    press(panel, "Load text")
    wait_said(panel, "python-docs: ")
    assert "mat" not in panel.get_by_label("How the text begins").inner_text()


def test_generate_by_hand(ran):
    panel = ran.panel(WRITING)
    panel.get_by_label("Prompt", exact=True).fill(" = Lists = \n")
    press(panel, "More settings")
    fill(panel, "Seed", "7")
    press(panel, "Generate")
    assert "seed 7" in wait_said(panel, "Done · seed 7")
    newest = panel.locator(".cg-columns").first  # those of the run before are below, folded
    texts = newest.locator("pre[tabindex]").all_inner_texts()
    assert len(texts) == 2 and all("= Lists =" in text for text in texts) and texts[0] != texts[1]
    newest.get_by_role("button", name="Copy").last.click()
    panel.get_by_text("Copied").wait_for()
    ran.page.context.grant_permissions(["clipboard-read"])
    assert ran.page.evaluate("navigator.clipboard.readText()") == texts[1]
    ran.picture("generated", panel)


def test_stop_the_texts(ran, record_property):
    "Stop, which takes the place of Generate while the words come."
    panel = ran.panel(WRITING)
    fill(panel, "New tokens", "1000")
    press(panel, "Generate")
    text = panel.locator(".cg-columns").first.locator("pre[tabindex]").last
    began = text.inner_text()
    expect(text).not_to_have_text(began)
    ran.picture("writing", panel)
    clicked = time.monotonic()
    press(panel, "Stop")
    wait_said(panel, "Stopped · seed")
    seconds = time.monotonic() - clicked
    record_property("seconds from Stop to stopped", f"{seconds:.2f}")
    assert seconds < 3 and ran.server.ask("print(writing.result.whole)") == "False\n"


def test_drive_by_hand(ran):
    "Mounted, saved, broken: what went wrong is a sentence that says what to do; then it works again."
    panel = ran.panel(DRIVE)
    press(panel, "More")
    fill(panel, "Drive folder", "elsewhere")
    ran.server.ask("from google.colab import _stub; _stub.faults.set(full=4096)")
    press(panel, "Save")
    sentence = wait_said(panel, "Copying")
    ran.picture("drive-full", panel)
    assert sentence.startswith("✗") and "is full. Free some space" in sentence and "Traceback" not in sentence
    ran.server.ask("_stub.faults.set(full=None)")
    press(panel, "Save")
    archive = re.search(r"Saved (\S+),", wait_said(panel, "Saved"))[1]
    assert (drive_of(ran)/"MyDrive"/"elsewhere"/archive).exists()
    press(panel, "Load a saved model")
    press(panel, "Restore")
    wait_said(panel, "Restored to")
    ran.picture("restored", panel)
    folders = panel.get_by_label("Model", exact=True).input_value(), "restored"
    weights = [(ran.server.folder/folder/"model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]


# A control in playwright's picture of what a screen reader is told; what has a name shows it in quotes.
NAMELESS = r"- (button|checkbox|combobox|listbox|spinbutton|textbox)(?! \")"


def test_every_control_has_a_name(ran):
    "For those who hear the page. A slider, to which ipywidgets gives none, stands next to a field that has one."
    heard = [panel.aria_snapshot() for panel in ran.page.locator(".cg-panel").all()]
    assert len(heard) == 5 and [re.findall(rf"^ *{NAMELESS}.*", told, re.M) for told in heard] == [[]] * 5
    assert all(re.search('- (button|textbox|combobox) "', told) for told in heard)


CONTROL = "'input, select, textarea, button, summary'"
STANDING = f"""panel => {{
    const controls = [...panel.querySelectorAll({CONTROL})].filter(e => e.checkVisibility() && !e.disabled);
    const seen = controls.map(e => [e.getBoundingClientRect(), e]);
    seen.sort(([a], [b]) => a.top - b.top || a.left - b.left)[0][1].focus();
    return seen.map(([_, e]) => (e.labels?.[0] ?? e).textContent.trim()); }}"""
FOCUSED = f"""panel => {{
    const e = document.activeElement;
    if (!panel.contains(e)) return null;
    return e.matches({CONTROL}) ? (e.labels?.[0] ?? e).textContent.trim() : ''; }}"""


def test_by_keyboard(ran):
    "Tab goes through the controls of each panel in the order in which they stand, and out of it."
    for title in TITLES:
        panel, passed = ran.panel(title), []
        standing = panel.evaluate(STANDING)  # the first of them has the focus now
        while (name := panel.evaluate(FOCUSED)) is not None and len(passed) <= len(standing):
            passed += [name] * bool(name)  # what can be scrolled or slid is passed too
            ran.page.keyboard.press("Tab")
        assert passed == standing, title


CONTRAST = """panel => {
    const numbers = color => { const [r, g, b, a = 1] = color.match(/[0-9.]+/g).map(Number); return [r, g, b, a]; };
    const over = ([r, g, b, a], under) => [r, g, b].map((c, i) => c * a + under[i] * (1 - a));
    const linear = c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
    const luminance = ([r, g, b]) => .2126 * linear(r / 255) + .7152 * linear(g / 255) + .0722 * linear(b / 255);
    const above = e => e ? [...above(e.parentElement), e] : [];
    const ratio = e => {
        const styles = above(e).map(up => getComputedStyle(up)), style = styles.at(-1), drawn = e instanceof SVGElement;
        const opacity = styles.reduce((product, up) => product * up.opacity, drawn ? style.fillOpacity : 1);
        const ground = styles.reduce((under, up) => over(numbers(up.backgroundColor), under), [255, 255, 255]);
        const [r, g, b, a] = numbers(drawn ? style.fill : style.color), text = over([r, g, b, a * opacity], ground);
        const [dark, light] = [luminance(text), luminance(ground)].sort((a, b) => a - b);
        return (light + .05) / (dark + .05);
    };
    const words = e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    const spoken = e => words(e) || e.matches('input, textarea, select');
    const seen = e => !e.matches('style, option, :disabled') && e.checkVisibility();
    return [...panel.querySelectorAll('*')].filter(e => seen(e) && spoken(e))
        .map(e => [(e.value ?? e.textContent).trim().slice(0, 40), ratio(e)]); }"""


def read_contrasts(notebook):
    return [told for panel in notebook.page.locator(".cg-panel").all() for told in panel.evaluate(CONTRAST)]


def test_readable(ran):
    "Every text in a panel has a contrast of 4.5 to its ground (WCAG 2, 1.4.3), in the light theme and in the dark."
    breaks = ran.page.locator(".cg-panel pre").evaluate_all("texts => texts.map(e => getComputedStyle(e).wordBreak)")
    assert set(breaks) == {"normal"}  # no word cut in the middle
    light = read_contrasts(ran)
    assert len(light) > 100 and [told for told in light if told[1] < 4.5] == []
    if ran.server.front_end.name == "notebook-6": return
    ran.set_theme("JupyterLab Dark")
    for name, title in PICTURES.items(): ran.picture(f"dark-{name}", ran.panel(title))
    dark = read_contrasts(ran)
    ran.set_theme("JupyterLab Light")
    assert [told for told in dark if told[1] < 4.5] == []


# The frame of a cell, as pages that were copied from Colab show it.
COLAB = "<body><div id='output-area'><div id='output-body'>{}</div></div></body>"


def test_what_is_kept_in_colabs_frame(ran):
    "Words and charts that stay in the notebook are hidden while the live panel is there too, and seen without it."
    live = "<div class='cg-panel " + ran.server.ask("print(training.mark)").strip() + "'>live</div>"
    words, charts = ran.server.ask("print(training.kept, training.drawn, sep='|||')").split("|||")
    page = ran.page.context.new_page()
    for shown, outputs in {False: (live, words, charts), True: (words, charts)}.items():
        frame = "<div class='display_data output-id-{}'><div class='output_subarea'>{}</div></div>"
        page.set_content(COLAB.format("".join(frame.format(n, output) for n, output in enumerate(outputs, 1))))
        for part in (".cg-kept", "svg.cg-charts"): assert page.locator(part).is_visible() == shown, (part, shown)
    page.close()


def test_it_fits_a_narrow_window(ran):
    if ran.server.front_end.name == "lab": ran.page.keyboard.press("Control+b")  # its list of files takes a third
    ran.page.set_viewport_size(dict(width=800, height=3600))
    ran.page.wait_for_timeout(1000)  # until the notebook has found its new place
    too_wide = "panels => panels.filter(p => p.scrollWidth > p.clientWidth + 1).length"
    wide = ran.page.locator(".cg-panel").evaluate_all(too_wide)
    ran.picture("narrow", ran.panel(TRAINING))
    assert wide == 0 and ran.page.locator(".cg-panel").evaluate_all(f"panels => panels.map({WHOLE})") == [True] * 5
