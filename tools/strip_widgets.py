"Take the state of widgets out of the notebooks, where `nbdev_clean` leaves it: it belongs to a kernel that is gone, and GitHub shows nothing of a notebook that has a broken one."
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]


if __name__ == "__main__":
    for path in sorted((ROOT/"nbs").rglob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        if notebook["metadata"].pop("widgets", None) is not None: path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
