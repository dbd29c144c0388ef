"""Run notebooks and keep what their cells show: `make show`, or `python tools/show.py [NOTEBOOK ...]` for a few of them.

A cell keeps the value of its last expression, or what it displays: HTML, SVG or Markdown, else plain text. It keeps nothing of
streams, of widgets, of cells that are exported or hidden, and nothing that differs between two runs: with other hash seeds, another
temporary folder and another number of threads. End a cell that is to show nothing with a semicolon. tests/test_notebooks.py compares
what is kept with what running gives. `nbs/index.ipynb` and the tutorial are made by people and stay as they are.
"""
import io, json, os, subprocess, sys, tempfile
from contextlib import redirect_stderr
from pathlib import Path

ROOT = Path(__file__).parents[1]
RICH = ("text/html", "image/svg+xml", "text/markdown")  # a plain text beside one of these is left out: it would say it again
LONGEST = 40_000  # characters of one output
WIDGET = "application/vnd.jupyter.widget-view+json"


def numbered():
    "The notebooks that are modules."
    return sorted((ROOT/"nbs").rglob("[0-9]*.ipynb"), key=lambda path: path.name)


def run(path):
    "Run a notebook as nbdev_test does; -> (error or '', {id of a cell: what it shows})."
    import nbdev.test
    ran = []

    class Shell(nbdev.test.CaptureShell):
        def run_all(self, nb, **options):
            ran.append(nb)
            super().run_all(nb, **options)

    shell, nbdev.test.CaptureShell = nbdev.test.CaptureShell, Shell
    try:
        with redirect_stderr(io.StringIO()) as errors:
            passed, _ = nbdev.test.test_nb(Path(path).absolute(), skip_flags=["slow", "gpu"], basepath=ROOT)
    finally: nbdev.test.CaptureShell = shell
    shown = {cell.id: shown_by(cell) for nb in ran for cell in nb.cells if cell.cell_type == "code"}
    return "" if passed else errors.getvalue() or f"{path} failed", {key: outputs for key, outputs in shown.items() if outputs}


def shown_by(cell):
    "The outputs of a cell that has been run, those worth keeping, as a notebook stores them after nbdev_clean."
    from nbdev.clean import clean_nb
    if {"export", "exports", "exporti", "hide"} & set(cell.get("directives_") or ()): return []
    outputs = [dict(output) for output in cell.get("outputs", ()) if worth_keeping(output)]
    for output in outputs:
        rich = [kind for kind in RICH if kind in output["data"]]
        output["data"] = {kind: output["data"][kind] for kind in rich or ["text/plain"]}
    cleaned = json.loads(json.dumps(dict(metadata={}, cells=[dict(cell_type="code", id=cell.id, source=[], metadata={}, outputs=outputs)])))
    clean_nb(cleaned)
    return cleaned["cells"][0]["outputs"]


def worth_keeping(output):
    "Whether an output is a text or a picture that a page can show; a widget is none, nor is what only names its class."
    data = output.get("data", {})
    if WIDGET in data or not {*RICH, "text/plain"} & data.keys(): return False
    plain = "".join(data.get("text/plain", ""))
    if not any(kind in data for kind in RICH) and (" at 0x" in plain or plain.startswith("<")): return False
    return sum(len("".join(text)) for text in data.values()) <= LONGEST


def run_elsewhere(path, seed, threads):
    "`run` in a process of its own."
    with tempfile.TemporaryDirectory(prefix=f"show-{seed}-") as folder:
        env = {**os.environ, "PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": str(threads), "TMPDIR": folder}
        ran = subprocess.run([sys.executable, __file__, "--json", str(path)], env=env, text=True, capture_output=True)
    if ran.returncode: raise RuntimeError(f"{path} failed:\n{ran.stdout}\n{ran.stderr}")
    return json.loads(ran.stdout.splitlines()[-1])


def keep(path):
    "Run a notebook twice and store what both runs show; -> (ids of cells that keep an output, ids of cells that change)."
    first, second = run_elsewhere(path, 1, 1), run_elsewhere(path, 2, 2)
    steady = {key: outputs for key, outputs in first.items() if second.get(key) == outputs}
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code": cell["outputs"] = steady.get(cell["id"], [])
    made = json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    if made != text: path.write_text(made, encoding="utf-8")
    return list(steady), [key for key in first if key not in steady]


def main(words):
    if words[:1] == ["--json"]:
        error, shown = run(words[1])
        if error: raise SystemExit(error)
        return print("\n" + json.dumps(shown))
    failed = 0
    for path in [Path(word) for word in words] or numbered():
        try: kept, changing = keep(path)
        except RuntimeError as error:
            print(error, flush=True)
            failed += 1
            continue
        print(f"{path.stem}: {len(kept)} cells keep an output", flush=True)
        for key in changing: print(f"    cell {key} changes from run to run: end it with ;", flush=True)
    if failed: raise SystemExit(f"{failed} of them failed and stay as they were.")


if __name__ == "__main__": main(sys.argv[1:])
