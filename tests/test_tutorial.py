"""The notebook that people open in Colab: its links, what it carries, Run all without GPU or network, folded Python;
the one for Kaggle, which is made of it; and the page for whom one GPU is not enough."""
import configparser, json, os, re, shutil, sys
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import colab_gpt2
import kaggle
from colab_gpt2 import FinetuneConfig, check_runtime, plan, tasks
from colab_gpt2.config import PROMPT
from colab_gpt2.model.loading import TINY
from helpers.forks import forked

ROOT = Path(__file__).parents[1]
PATH = ROOT/"nbs"/"tutorials"/"colab_gpt2.ipynb"


@pytest.fixture(scope="module")
def notebook(): return nbformat.read(PATH, as_version=4)


def markdown(notebook): return "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")


def test_it_opens_in_colab_with_a_gpu(notebook):
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT/"settings.ini", encoding="utf-8")
    start = "https://colab.research.google.com/github/{user}/{repo}/blob/{branch}/".format(**settings["DEFAULT"])
    address = start + PATH.relative_to(ROOT).as_posix()
    badge = f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({address})"
    assert badge in notebook.cells[0].source and badge in (ROOT/"README.md").read_text(encoding="utf-8")
    assert notebook.metadata.accelerator == "GPU" and notebook.metadata.colab.gpuType == "T4"
    assert notebook.cells[0].source.splitlines()[2].startswith("> Runtime → Run all on a free T4")


def test_links_follow_the_settings(tmp_path, shell):
    notebooks = ("nbs/index.ipynb", "nbs/tutorials/colab_gpt2.ipynb", "nbs/tutorials/kaggle_gpt2.ipynb")
    for name in (*notebooks, "tools/links.py", "settings.ini"):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/name, tmp_path/name)
    settings = (tmp_path/"settings.ini").read_text()
    for name in ("user", "repo", "branch"): settings = re.sub(rf"(?m)^{name} = .*", f"{name} = other-{name}", settings)
    (tmp_path/"settings.ini").write_text(settings)
    assert shell(sys.executable, "tools/links.py").returncode == 0
    for name in notebooks:
        text = (tmp_path/name).read_text(encoding="utf-8")
        where = "other-user/other-repo/blob/other-branch/nbs/tutorials/"
        for_colab = f"https://colab.research.google.com/github/{where}colab_gpt2.ipynb"
        for_kaggle = f"https://kaggle.com/kernels/welcome?src=https://github.com/{where}kaggle_gpt2.ipynb"
        assert (for_colab in text, for_kaggle in text) == ("kaggle_" not in name, "colab_" not in Path(name).name)
        assert "git+https://github.com/other-user/other-repo" in text
        assert "github.com/colab-gpt2/" not in text


def test_it_is_small_and_carries_nothing_of_a_machine(notebook):
    assert PATH.stat().st_size < 40_000
    assert "widgets" not in notebook.metadata
    panels = [c for c in notebook.cells if c.cell_type == "code" and "Panel(" in c.source]
    # or Notebook 7 squeezes a tall output into a box
    assert [c.metadata.get("scrolled") for c in panels] == [False] * 5
    assert [c.outputs for c in notebook.cells if c.cell_type == "code" and c.outputs] == []


def test_each_step_is_a_short_cell_with_python_beneath(notebook):
    "The cells of installing and of the Drive; five with a panel, directly beneath each a fold; and one's own text."
    *code, _, _, _, _ = [i for i, c in enumerate(notebook.cells) if c.cell_type == "code"]
    panels = [re.findall(r"(\w+)Panel", notebook.cells[i].source)[0] for i in code[2:]]
    assert panels == ["Runtime", "Data", "Finetune", "Generate", "Drive"]
    assert max(len(notebook.cells[i].source.splitlines()) for i in code) <= 6
    for i in code[2:]: assert len(folded(notebook.cells[i + 1].source)) == 1


@pytest.mark.parametrize("gpu", ["T4", "L4"])
def test_the_minutes_in_its_table_are_forecasts(notebook, gpu):
    row = next(line for line in markdown(notebook).splitlines() if line.startswith(f"| {gpu} GPU"))
    told = {model: int(minutes) for model, minutes in re.findall(r"(gpt2[\w-]*)(?: by LoRA,)? (\d+) min", row)}
    models = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
    assert told == {model: round(plan(model=model, gpu=gpu, progress=False).seconds / 60) for model in models}


def test_ones_own_text_from_a_table_to_a_sample(notebook, offline, monkeypatch, tmp_path):
    "Four cells, which do nothing before a file is named; the samples begin with a line of its held-out part."
    monkeypatch.chdir(tmp_path)
    poems = [f"The tide of day {i}\ncame in at {i % 12} o'clock,\nand went out again." for i in range(200)]
    lines = ["".join(f'"{poem}",{i}\n' for i, poem in enumerate(poems))]
    (tmp_path/"my.csv").write_text("".join(["text,number\n", *lines]))
    cells, shown = [c.source for c in notebook.cells if c.cell_type == "code"][-4:], []
    cells[2] = cells[2].replace("train_file=mine,", "train_file=mine, max_steps=2, block_size=32, max_new_tokens=4,")
    for mine in ("", "my.csv"):
        cells[0] = re.sub('(?<=mine = )".*?"', json.dumps(mine), cells[0])
        names = {"display": lambda *each: shown.extend(each)}
        for cell in cells: exec(compile(cell, "a cell", "exec"), names)
        assert bool(shown) == bool(mine)
    corpus, result, *samples = shown
    assert {sample.prompt for sample in samples} == {corpus.path("test").read_text().splitlines(True)[0]}
    assert samples[0].prompt.startswith("The tide of day") and result.output_dir == "my-model"


def folded(source):
    title = "<details><summary>The same in plain Python</summary>"
    return re.findall(rf"{title}\n\n```python\n(.+?)\n```\n\n</details>", source, re.S)


def test_the_folded_texts_are_those_of_the_panel(notebook):
    line = next(line for line in markdown(notebook).splitlines() if line.startswith("generate("))
    config = FinetuneConfig()
    prompt, rest = json.dumps(PROMPT), f"max_new_tokens={config.max_new_tokens}, seed={config.seed}"
    assert line == f'generate("gpt2-tuned", {prompt}, {rest})[0]'


def printed(notebook):
    "(cell, text) of everything that came out on stderr, and of every error."
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == "error": yield cell.source, output.evalue
            if output.output_type == "stream" and output.name == "stderr": yield cell.source, output.text


@pytest.fixture
def offline(monkeypatch, tmp_path):
    "A machine without network on which nothing was kept; pip is content with what is installed."
    for name in [n for n in os.environ if n.startswith("PIP_")]: monkeypatch.delenv(name)
    folders = dict(XDG_CACHE_HOME="cache", JUPYTER_DATA_DIR="jupyter", IPYTHONDIR="ipython")
    for name, folder in folders.items(): monkeypatch.setenv(name, str(tmp_path/folder))
    for name in ("PIP_NO_INDEX", "HF_HUB_OFFLINE"): monkeypatch.setenv(name, "1")


BRIEF = """
from dataclasses import replace
from colab_gpt2 import tasks
tasks.DEMO = replace(tasks.DEMO, max_steps=30)
"""


@pytest.mark.same
def test_run_all(notebook, offline, tmp_path):
    """The kernel starts with a shorter demo than a reader's: 30 steps show what a hundred would. Run all again, in a
    new kernel, finds the run finished, shows the same curve, and packs the same archive."""
    startup = tmp_path/"ipython"/"profile_default"/"startup"
    startup.mkdir(parents=True)
    (startup/"brief.py").write_text(BRIEF)
    results = []
    for _ in range(2):
        here = {"metadata": {"path": str(tmp_path)}}
        ran = NotebookClient(nbformat.from_dict(notebook), timeout=540, resources=here).execute()
        assert list(printed(ran)) == []
        archives = [p for p in tmp_path.rglob("gpt2-tuned.tar.gz")]
        assert len(archives) == 2, archives  # here, and in the folder to use instead of the Drive
        outputs = [o.get("data", {}) for c in ran.cells for o in c.get("outputs", ())]
        curves = [data["image/svg+xml"] for data in outputs if "image/svg+xml" in data]  # for a reader without a kernel
        result = (tmp_path/"gpt2-tuned"/"finetune.json").read_text()
        results.append((result, curves, *{p.read_bytes() for p in archives}))
    assert results[0] == results[1] and len(results[0]) == 3 and results[0][1]
    told = json.loads(results[0][0])
    assert told["steps"] == 30
    assert told["perplexity_after"]["value"] < told["perplexity_before"]["value"] / 10


def test_the_folded_python_runs(notebook, offline, monkeypatch, tmp_path):
    """Each as it stands, with no other before it, where the panels were run; but for the model and the text, which
    need a network, and the epochs, which need patience."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY, "gpt2-tuned")
    code = folded(markdown(notebook))
    for told, small in (('"gpt2"', '"tiny"'), ('"wikitext-2-raw-v1"', '"python-docs"'),
                        ("num_train_epochs=2", "max_steps=2, block_size=32"),
                        ("max_new_tokens=250", "max_new_tokens=5"), ('"colab-gpt2")', '"colab-gpt2", drive="drive")')):
        assert any(told in fold for fold in code)
        code = [fold.replace(told, small) for fold in code]
    for fold in code: exec(compile(fold, "the folded Python", "exec"), {})
    assert (tmp_path/"by-hand"/"model.safetensors").exists()
    assert (tmp_path/"drive"/"colab-gpt2"/"gpt2-by-hand.tar.gz").exists()


# Kaggle's

@pytest.fixture(scope="module")
def for_kaggle(): return nbformat.read(kaggle.KAGGLE, as_version=4)


def code_of(notebook): return [c.source for c in notebook.cells if c.cell_type == "code"]


def test_kaggles_notebook_is_made_of_colabs():
    assert kaggle.KAGGLE.read_text(encoding="utf-8") == kaggle.made(), "python tools/kaggle.py writes it"


def test_words_that_kaggle_replaces_and_colab_has_no_more_are_an_error(monkeypatch):
    monkeypatch.setitem(kaggle.CHANGES, "You need a Facebook account", "You need none")
    with pytest.raises(SystemExit, match="no such words any more, change tools/kaggle.py: You need a Facebook account"):
        kaggle.made()


def test_kaggles_notebook_opens_there_and_knows_no_drive(for_kaggle, notebook):
    picture = "[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]"
    place = re.search(r"github/(.+?)/colab_gpt2.ipynb", notebook.cells[0].source)[1]
    address = f"{picture}(https://kaggle.com/kernels/welcome?src=https://github.com/{place}/kaggle_gpt2.ipynb)"
    assert address in for_kaggle.cells[0].source and address in (ROOT/"README.md").read_text(encoding="utf-8")
    settings = for_kaggle.metadata.kaggle
    assert (settings.accelerator, settings.isInternetEnabled) == ("nvidiaTeslaT4", True)
    said = markdown(for_kaggle) + "".join(code_of(for_kaggle))
    assert "Runtime →" not in said and "MyDrive" not in said and "@title" not in said
    assert re.findall(r"(?<!restore_from_)[Dd]rive(?!Panel|=)|Colab", said) == ["Drive", "Colab"]  # what_is_saved.md's
    for fold in folded(markdown(for_kaggle)): compile(fold, "the folded Python", "exec")


def test_the_minutes_in_kaggles_table_are_forecasts(for_kaggle):
    row = next(line for line in markdown(for_kaggle).splitlines() if line.startswith("| GPU T4 x2"))
    told = re.findall(r"(gpt2[\w-]*)( by LoRA,)? (\d+) min", row)
    plans = [plan(model=model, gpu="T4", num_processes=2, progress=False) for model, *_ in told]
    assert [model for model, *_ in told] == ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]
    assert [(bool(lora), int(minutes)) for _, lora, minutes in told] == [
        (each.recipe.method == "lora", round(each.seconds / 60)) for each in plans]


def run_cells(cells):
    "As on Kaggle with two GPUs, in two processes, but on this CPU and in a few steps."
    tasks.DEMO = replace(tasks.DEMO, max_steps=4, block_size=64, eval_stride=64, max_new_tokens=4)
    colab_gpt2.check_runtime = lambda: replace(check_runtime(), gpus=2)
    names = dict(display=lambda *each: None)
    for cell in cells: exec(compile(re.sub("(?m)^!.*", "", cell), "a cell", "exec"), names)
    return names["training"].result, names["keeping"].result


def test_kaggles_cells_run_on_two_gpus_and_leave_one_file(for_kaggle, offline, tmp_path):
    here = dict(os.environ, KAGGLE_KERNEL_RUN_TYPE="Interactive")
    done = forked(run_cells, code_of(for_kaggle), cwd=tmp_path, env=here)
    assert done.returncode == 0, done.stderr
    result, saved = done.result
    assert result.steps == 4 and result.config.num_processes == 2 and result.output_dir == "gpt2-tuned"
    assert saved.copy.path == saved.archive.path == Path("gpt2-tuned.tar.gz")
    assert {p.name for p in tmp_path.glob("*") if p.name not in ("cache", "jupyter", "ipython")} == {
        "gpt2-tuned", "gpt2-tuned.tar.gz"}


# When one GPU is not enough

def test_what_training_costs_follows_from_the_figures_above_it():
    page = (kaggle.KAGGLE.parent/"when_one_gpu_is_not_enough.md").read_text(encoding="utf-8")
    def figure(pattern): return float(re.search(pattern, page)[1])
    peak, price = figure(r"\| (\d+) TFLOP/s"), figure(r"\| \$([\d.]+) an hour")
    share = figure(r"\| (\d+)% \| \*\*assumed")
    rows = re.findall(r"(?m)^\| ([\d.]+) (million|billion)(?: \(.+?\))? \| ([\d,]+) \| \$([\d.,]+) \|", page)
    assert len(rows) == 4
    for count, unit, speed, dollars in rows:
        tokens = share / 100 * peak * 1e12 / (6 * float(count) * {"million": 1e6, "billion": 1e9}[unit])
        assert float(speed.replace(",", "")) == pytest.approx(tokens, rel=5e-3)
        assert float(dollars.replace(",", "")) == pytest.approx(1e9 / tokens / 3600 * price, rel=5e-3)
    for path in re.findall(r"\]\((?!http)(.+?)\)", page): assert (kaggle.KAGGLE.parent/path).exists(), path
    linked = "tutorials/when_one_gpu_is_not_enough.md"
    for start in (ROOT/"README.md", PATH, kaggle.KAGGLE): assert linked in start.read_text(encoding="utf-8")
