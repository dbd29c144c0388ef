"The closing table of all benchmarks: what the JSON files of a folder say, one table a machine."
import argparse, json
from dataclasses import replace
from pathlib import Path

from harness import COLUMNS, RESULTS, Row, Spread, console, printed_row, table_of


def row_from(kept) -> Row:
    "A Row as `report` wrote it."
    fields = {name: value for name, value in kept.items() if name != "reached"}
    return Row(**{name: Spread(**value) if isinstance(value, dict) else value for name, value in fields.items()})


def read_results(folder=RESULTS) -> dict:
    "The machine's device -> the results measured there, in the order of their files' names."
    found = {}
    for path in sorted(Path(folder).glob("*.json")):
        kept = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(kept["machine"]["device"], []).append(kept)
    return found


def rows_of(results) -> list:
    "Of all results; what was measured without bf16 says so."
    def figure(kept, row): return row.figure + ", no bf16" * kept["question"].endswith("without bf16")
    rows = [(kept, row_from(row)) for kept in results for row in kept["rows"]]
    return [replace(row, figure=figure(kept, row)) for kept, row in rows]


def sources(results) -> str:
    "When and with what these results were measured: one line for each group of them that agrees."
    lines = {}
    for kept in results:
        made, here = kept["machine"]["versions"], kept["machine"]
        packages = ", ".join(f"{name} {made[name]}" for name in ("python", "torch", "transformers"))
        lines.setdefault(f"{packages}, revision {here['revision']}, {kept['date'][:10]}", []).append(kept["question"])
    return "\n".join(f"{', '.join(questions)}: {line}" for line, questions in lines.items())


SHORT = ("figure", "peer is", "ratio", "spread")  # columns of README's table

def markdown(rows, columns=COLUMNS) -> str:
    "Some Rows as a Markdown table."
    lines = [columns, ["---"] * len(columns), *(printed_row(row, columns) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def page(found) -> str:
    "All results as the page that stands beside them."
    parts = ["# Results\n\nMade by `python benchmarks/table.py --page`. How they are measured and read: "
             "[benchmarks](../README.md)."]
    for device, results in found.items():
        notes = "\n".join(f"- {line}" for line in sources(results).splitlines())
        parts.append(f"## {device}\n\n{markdown(rows_of(results))}\n\n{notes}")
    return "\n\n".join(parts) + "\n"


def show(folder=RESULTS, device=None):
    "Print what was measured, on one device or on each."
    for name, results in read_results(folder).items():
        if device in (None, name): console().print(table_of(name, rows_of(results)), sources(results), sep="\n")


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--results", default=RESULTS, type=Path, help="folder of the JSON files")
    options.add_argument("--markdown", action="store_true", help="as Markdown tables")
    options.add_argument("--short", action="store_true", help="the same with README's columns")
    options.add_argument("--page", action="store_true", help="also write README.md into the folder")
    options = options.parse_args()
    found = read_results(options.results)
    if not found: raise SystemExit(f"There are no results in {options.results}; run a benchmark first.")
    if options.page:
        (options.results/"README.md").write_text(page(found), encoding="utf-8")
    if not options.markdown and not options.short: return show(options.results)
    for device, results in found.items():
        print(f"{device}\n\n{markdown(rows_of(results), SHORT if options.short else COLUMNS)}\n")


if __name__ == "__main__": main()
