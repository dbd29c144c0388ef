"""Write the map of the rooms into CONTRIBUTING.md, between its two marks: each notebook with its own first line, wing by wing."""
import json, re
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT/"CONTRIBUTING.md"
WINGS = dict(text="where words come from and become tokens", model="GPT-2, faster and smaller", planning="what a run takes, before it runs",
             engine="the training itself", storage="what outlives the machine", panels="the notebook's widgets", legacy="the command line of 2020")


def rooms():
    "(wing, path, subtitle) of each numbered notebook; the entrance lies between the wings, on the ground floor."
    for path in sorted((ROOT/"nbs").rglob("[0-9]*.ipynb"), key=lambda path: path.name):
        title = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        wing = path.parent.name if path.parent.name in WINGS else "ground" if path.name < "1" else "entrance"
        yield wing, path.relative_to(ROOT).as_posix(), re.search(r"(?m)^> (.+)$", title)[1]


def tables():
    "The map as Markdown."
    about = {"ground": "what every room stands on", "entrance": "what a user calls", **WINGS}
    for wing, found in groupby(rooms(), key=lambda room: room[0]):
        yield f"**{wing}**: {about[wing]}\n\n| notebook | what it is about |\n|---|---|"
        yield from (f"| [{Path(path).stem}]({path}) | {subtitle} |" for _, path, subtitle in found)
        yield ""


def with_rooms(page):
    "The page with today's map."
    return re.sub(r"(?s)(<!-- rooms -->\n).*?(<!-- /rooms -->)", lambda marks: marks[1] + "\n".join(tables()) + marks[2], page)


if __name__ == "__main__": PAGE.write_text(with_rooms(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
