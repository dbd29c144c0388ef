"A text of one's own and a model, chosen in a page as a reader does."
import io, re, zipfile

from nbformat import v4

CELLS = ("from colab_gpt2 import DataPanel, FinetunePanel\ntext = DataPanel(model='tiny')\ntext",
         "training = FinetunePanel(text)\ntraining")
LINE = "On day {} the tide came in at {} o'clock, and went out again. "


def upload(panel, path):
    with panel.page.expect_file_chooser() as chooser: panel.get_by_role("button", name="Upload a text").click()
    chooser.value.set_files(path)


# A file that is let go over a place, as from the desktop: browsers let no script make one with a path.
DROP = """(zone, [name, text]) => {
    const carried = new DataTransfer();
    carried.items.add(new File([text], name, {type: 'text/plain'}));
    zone.dispatchEvent(new DragEvent('drop', {dataTransfer: carried, bubbles: true, cancelable: true})); }"""


def both_panels(opened):
    "(the notebook of CELLS that has run, the panel of the text, that of the training)"
    kernel = dict(kernelspec=dict(name="python3", display_name="Python"))
    notebook = opened(v4.new_notebook(cells=[v4.new_code_cell(cell) for cell in CELLS], metadata=kernel))
    notebook.run_all()
    notebook.wait_until_run(120)
    return notebook, *map(notebook.panel, ("2. The text", "3. Fine-tune"))


def word(text):
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        archive.writestr("word/document.xml", f"<d xmlns:w='w'><w:p><w:t>{text}</w:t></w:p></d>")
    return file.getvalue()


def test_a_click_or_a_drop_loads_a_text_and_a_key_chooses_a_model(opened, tmp_path):
    notebook, text, training = both_panels(opened)
    assert text.get_by_role("alert").count() == 0  # nothing is wrong before something was done
    (tmp_path/"mine.docx").write_bytes(word("".join(LINE.format(n, n % 12) for n in range(1000))))
    (tmp_path/"mine.txt").write_bytes(b"\x89PNG\0")
    upload(text, tmp_path/"mine.docx")
    text.get_by_text(re.compile("mine.docx: 14,000 words, .* tokens: enough to learn a style")).wait_for()
    assert "On day 0" in text.get_by_label("How the text begins").inner_text()
    upload(text, tmp_path/"mine.txt")
    text.get_by_text(re.compile("mine.txt is binary.* Still chosen: mine.docx")).wait_for()
    text.locator(".cg-drop").first.evaluate(DROP, ["dropped.txt", "The moon rose . " * 3000])
    text.get_by_text(re.compile("dropped.txt: 12,000 words, .* tokens")).wait_for()
    assert re.findall(r'button "(Upload.*)"', text.aria_snapshot()) == ["Upload a text"]  # and no count of files
    assert not text.get_by_role("button", name="Load text").is_visible()
    cards = training.get_by_role("radio")
    assert re.match(r"tiny\s+7 M parameters\s+about (?s:.*)✓ fits", cards.first.locator("..").inner_text())
    cards.first.focus()
    notebook.page.keyboard.press("Tab")
    notebook.page.keyboard.press("Space")
    text.get_by_text(re.compile("dropped.txt: 12,000 words, about .* tokens")).wait_for()  # GPT-2's: not counted
    assert training.get_by_label("or another", exact=True).input_value() == "gpt2"
    notebook.picture("own-text-and-card")
