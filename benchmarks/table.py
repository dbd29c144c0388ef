"The closing table of all benchmarks: what the JSON files of a folder say, one table a machine."
import argparse, json
from pathlib import Path

from harness import COLUMNS, RESULTS, Row, Spread, console, printed_row, table_of


def row_from(kept) -> Row:
    "A Row as `report` wrote it."
    return Row(**{name: Spread(**value) if isinstance(value, dict) else value for name, value in kept.items() if name != "reached"})


def read_results(folder=RESULTS) -> dict:
    "machine's device -> the results measured there, in the order of their files' names."
    found = {}
    for path in sorted(Path(folder).glob("*.json")):
        kept = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(kept["machine"]["device"], []).append(kept)
    return found


def under(results) -> str:
    "Where and when these results were measured, in one line a group of them that agrees."
    lines = {}
    for kept in results:
        made, here = kept["machine"]["versions"], kept["machine"]
        said = f"python {made['python']}, torch {made['torch']}, transformers {made['transformers']}, revision {here['revision']}, {kept['date'][:10]}"
        lines.setdefault(said, []).append(kept["question"])
    return "\n".join(f"{', '.join(questions)}: {said}" for said, questions in lines.items())


SHORT = ("figure", "peer is", "ratio", "spread", "bar")  # columns of README's table

def markdown(results, columns=COLUMNS) -> str:
    "The rows of some results as a Markdown table."
    rows = [dict(zip(COLUMNS, printed_row(row_from(row)))) for kept in results for row in kept["rows"]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ("---",) * len(columns), *([row[c] for c in columns] for row in rows)))


def show(folder=RESULTS, device=None):
    "Print what was measured, on one device or on each."
    for name, results in read_results(folder).items():
        if device in (None, name): console().print(table_of(name, [row_from(row) for kept in results for row in kept["rows"]]), under(results), sep="\n")


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--results", default=RESULTS, type=Path, help="folder of the JSON files")
    options.add_argument("--markdown", action="store_true", help="as a Markdown table")
    options.add_argument("--short", action="store_true", help="the same with README's columns")
    options = options.parse_args()
    found = read_results(options.results)
    if not found: raise SystemExit(f"There are no results in {options.results}; run a benchmark first.")
    columns = SHORT if options.short else COLUMNS
    if options.markdown or options.short: print("\n\n".join(f"{device}\n\n{markdown(results, columns)}" for device, results in found.items()))
    else: show(options.results)


if __name__ == "__main__": main()
