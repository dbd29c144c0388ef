"Counts of the source that tests/test_project.py holds as ratchets: notebooks, cells, widths, docstrings, arguments."
import ast, functools, json, re, statistics
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT/"nbs").rglob("[0-9]*.ipynb"), key=lambda path: path.name)
LIBRARY = sorted(path for path in (ROOT/"colab_gpt2").rglob("*.py") if path.name != "_modidx.py")
CHECKS = sorted(path for folder in ("tests", "benchmarks") for path in (ROOT/folder).rglob("*.py"))
ASSERTS = re.compile(r"(?m)^\s*(assert\b|test_\w+\(|with ExceptionExpected)"
                     r"|\btest_(eq|fail|close|is|warns|ne|stdout|shuffled)\(")
SEARCHES = {"replace", "split", "rsplit", "partition", "rpartition", "startswith", "endswith", "removeprefix",
            "removesuffix", "find", "index"}
OF_TORCH = {"out_of_memory", "lost_peer"}  # torch raises RuntimeError for these and all else: only words tell
ERRORS = {"e", "err", "error", "exc", "exception"}


def wide(paths, columns):
    "Lines over so many columns."
    return [f"{path.relative_to(ROOT)}:{i}" for path in paths
            for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if len(line) > columns]


@functools.cache
def cells_of(notebook): return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def source_of(cell): return "".join(cell["source"])


def is_exported(cell):
    return cell["cell_type"] == "code" and bool(re.search(r"(?m)^#\s*\|\s*exporti?s?\b", source_of(cell)))


def statements(cell): return ast.parse(re.sub(r"(?m)^#\s*\|.*\n?", "", source_of(cell))).body


@functools.cache
def exported_cells() -> list:
    "(notebook, its code cells, place of one among them, its statements) of exported cells that hold more than imports."
    found = []
    for notebook in NOTEBOOKS:
        code = [cell for cell in cells_of(notebook) if cell["cell_type"] == "code"]
        for i, cell in enumerate(code):
            body = statements(cell) if is_exported(cell) else []
            if any(not isinstance(s, (ast.Import, ast.ImportFrom)) for s in body):
                found.append((notebook, code, i, body))
    return found


def cell_sizes():
    """Lines of the exported cells, without blank ones and directives. The classes of the panels are left out: a
    widget's state and view in one."""
    def is_panel(notebook, body):
        return notebook.parent.name == "panels" and any(isinstance(n, ast.ClassDef) for n in body)
    return [len([line for line in source_of(code[i]).splitlines() if line.strip() and not re.match(r"#\s*\|", line)])
            for notebook, code, i, body in exported_cells() if not is_panel(notebook, body)]


def definitions(body):
    return [n for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]


def demonstrated():
    "{notebook:name: whether one of the next two code cells asserts and names it} of the exported names."
    def shows(cell, name):
        source = source_of(cell)
        return not is_exported(cell) and ASSERTS.search(source) and re.search(rf"\b{name}\b", source)
    return {f"{notebook.stem}:{d.name}": any(shows(cell, d.name) for cell in code[i + 1:i + 3])
            for notebook, code, i, body in exported_cells() for d in definitions(body)}


@functools.cache
def parsed(path): return ast.parse(path.read_text(encoding="utf-8"))


def trees(): return {path: parsed(path) for path in LIBRARY}


@functools.cache
def nodes(tree): return list(ast.walk(tree))


def functions(tree): return [n for n in nodes(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def arguments(function):
    every = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return [a for a in every if a.arg not in ("self", "cls")]


def documented():
    "{module:name: whether it has a docstring} of what modules define at their top."
    return {f"{path.stem}:{d.name}": bool(ast.get_docstring(d))
            for path, tree in trees().items() for d in definitions(tree.body)}


def commented(names):
    "{function(argument): whether a comment stands in its line} of the functions of these names at the top of modules."
    def has_comment(path, argument): return "#" in path.read_text(encoding="utf-8").splitlines()[argument.lineno - 1]
    return {f"{function.name}({argument.arg})": has_comment(path, argument)
            for path, tree in trees().items() for function in tree.body
            if isinstance(function, ast.FunctionDef) and function.name in names
            for argument in arguments(function)}


def both(first, second):
    "Functions that take both arguments."
    return [f"{path.stem}:{f.name}" for path, tree in trees().items() for f in functions(tree)
            if {first, second} <= {a.arg for a in arguments(f)}]


def dataclasses():
    "The names of the library's dataclasses."
    return {n.name for tree in trees().values() for n in nodes(tree) if isinstance(n, ast.ClassDef)
            and any("dataclass" in ast.unparse(decorator) for decorator in n.decorator_list)}


def positional():
    "{module:line class: positional arguments} of what constructs a dataclass of ours."
    ours = dataclasses()
    return {f"{path.stem}:{n.lineno} {name}": len(n.args) for path, tree in trees().items() for n in nodes(tree)
            if isinstance(n, ast.Call) and (name := getattr(n.func, "attr", getattr(n.func, "id", ""))) in ours}


def is_message(node):
    "str(error), or an error's message: what no code may search."
    if not isinstance(node, ast.Call) or getattr(node.func, "id", "") != "str" or len(node.args) != 1: return False
    return ast.unparse(node.args[0]).split(".")[-1] in {*ERRORS, "message"}


def read_back(trees_by_path=None):
    "Where the library searches, splits or replaces in the words of an error."
    def searches(node):
        if isinstance(node, ast.Compare):
            is_in = any(isinstance(op, (ast.In, ast.NotIn)) for op in node.ops)
            return is_in and any(map(is_message, node.comparators))
        if not isinstance(node, ast.Call) or not node.args: return False  # split() without a word joins lines
        method = node.func if isinstance(node.func, ast.Attribute) else None
        if method and method.attr in SEARCHES and is_message(method.value): return True
        return method is not None and ast.unparse(method.value) == "re" and any(map(is_message, node.args))
    def of(path, tree):
        allowed = {id(n) for f in functions(tree) if f.name in OF_TORCH for n in ast.walk(f)}
        return [f"{path.stem}:{n.lineno}" for n in nodes(tree) if searches(n) and id(n) not in allowed]
    return [place for path, tree in (trees_by_path or trees()).items() for place in of(path, tree)]


def statement_counts():
    return {path.stem: sum(isinstance(n, ast.stmt) for n in nodes(tree)) for path, tree in trees().items()}


def figures(public):
    "Every figure by its name; `public`: the names that the package exports."
    sizes = cell_sizes()
    def share(found): return round(sum(found.values()) / len(found), 3)
    return dict(
        library_over_120=len(wide(LIBRARY, 120)), library_over_160=len(wide(LIBRARY, 160)),
        checks_over_120=len(wide(CHECKS, 120)), checks_over_160=len(wide(CHECKS, 160)),
        cell_median=statistics.median(sizes), cell_p90=sorted(sizes)[int(len(sizes) * 0.9)], cell_max=max(sizes),
        demonstrated=share(demonstrated()), documented=share(documented()), commented=share(commented(public)),
        cells_with_output=sum(bool(c.get("outputs")) for n in (ROOT/"nbs").rglob("*.ipynb") for c in cells_of(n)),
        library_bytes=sum(path.stat().st_size for path in LIBRARY), shape_and_recipe=len(both("shape", "recipe")),
        positional=max(positional().values()), read_back=len(read_back()), statements=max(statement_counts().values()))
