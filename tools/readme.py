"Write README.md from nbs/index.ipynb: prose as it stands, code as fenced blocks, each followed by what it printed."
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOTE = "<!-- Made from nbs/index.ipynb by tools/readme.py; edit the notebook. -->\n"


def fenced(text, language=""): return f"```{language}\n{text.rstrip()}\n```"


def printed(cell):
    "The text that a code cell showed."
    for output in cell["outputs"]:
        text = output.get("text") or output.get("data", {}).get("text/plain", [])
        yield fenced("".join(text))


def rendered(cell):
    "A cell as Markdown; '' for a hidden one."
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown": return source.replace("](images/", "](nbs/images/")  # the README stands a folder higher
    if source.startswith("#| hide"): return ""
    if not cell["outputs"]: raise SystemExit(f"A cell of nbs/index.ipynb was not run, README would lack what it prints: {source.splitlines()[0]}")
    return "\n\n".join([fenced(source, "python"), *printed(cell)])


if __name__ == "__main__":
    cells = json.loads((ROOT/"nbs"/"index.ipynb").read_text(encoding="utf-8"))["cells"]
    parts = [text for cell in cells if (text := rendered(cell))]
    (ROOT/"README.md").write_text(NOTE + "\n" + "\n\n".join(parts) + "\n", encoding="utf-8")
