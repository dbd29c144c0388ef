"""Make nbs/tutorials/kaggle_gpt2.ipynb out of the notebook for Colab: the same cells, in Kaggle's words, with both of its T4s and without a Drive.

A row of CHANGES replaces words, or, where it ends in …, the paragraph that begins so. One that finds nothing is an error: whoever
rewrites a sentence of the Colab notebook is sent here."""
import json, re
from pathlib import Path

ROOT = Path(__file__).parents[1]
COLAB, KAGGLE = (ROOT/"nbs"/"tutorials"/f"{host}_gpt2.ipynb" for host in ("colab", "kaggle"))
DROPPED = "## Connect Google Drive", "ask_for_drive"  # what their cells have in them
METADATA = dict(accelerator="nvidiaTeslaT4", dataSources=[], isGpuEnabled=True, isInternetEnabled=True, language="python", sourceType="notebook")

CHANGES = {
    "> Runtime → Run all …": "> Run All on the two T4s that Kaggle lends for free, and about ten minutes later you'll have your own language model.",
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/":
        "[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/",
    f"tutorials/{COLAB.name}": f"tutorials/{KAGGLE.name}",
    "You need a Google account": "You need a Kaggle account",
    "**How.** …": """**How.** Make the three settings below, then choose *Run All*. Everything else has a default, so you don't have to type anything, and you can leave it alone. If the session ends too early, choose *Run All* again: training resumes where it left off. (If you have uploaded a text, see *When the session ends too early* in step 3 first.) Each step below has a few sentences, a panel and, under it, the same in plain Python, to be copied into a new cell.""",
    "On a T4, training should take about 4 minutes": "On two T4s, training should take about 2 minutes",
    "stays on this machine and is gone when the session ends; the model, its checkpoints and its samples go to your Drive.": "stays on this machine.",
    "**Without a GPU or a network** the notebook": "**Without a GPU** the notebook",
    "## Install": """## Before you start

Three settings, in the notebook's menu *Settings*, or at the right under *Session options*:

| setting | choose | why |
|:--|:--|:--|
| Accelerator | GPU T4 x2 | you get two GPUs, for about 30 hours a week, and the training uses both |
| Internet | on | the package, the model and the text have to be downloaded |
| Persistence | Files only | what is in `/kaggle/working` is there again in the next session |

For the first two, Kaggle asks you once to verify your phone number.

## Install""",
    "Colab already has": "Kaggle already has",
    "*Runtime → Change runtime type* lists what Colab offers. The free one is the **T4**, and it is enough.":
        "*Settings → Accelerator* lists what Kaggle offers. Choose **GPU T4 x2**.",
    "| in the menu …": """| in the menu | memory | which GPT-2 it trains on WikiText-2, the text of step 2, and how long reading that twice takes (forecast) |
|:--|:--|:--|
| GPU T4 x2 | 15 GB each | gpt2 2 min, gpt2-medium 6 min, gpt2-large 13 min; gpt2-xl by LoRA, 17 min |
| GPU P100 | 16 GB | none: today's PyTorch has no code for it any more |
| None | – | `tiny`; gpt2 would take a day or two |""",
    "from colab_gpt2 import FinetunePanel\n\ntraining = FinetunePanel(text)":
        "from colab_gpt2 import FinetunePanel, check_runtime\n\ntraining = FinetunePanel(text, num_processes=check_runtime().gpus or 1)",
    "You can look at samples on the way, save, or stop and continue later.":
        "You can save, or stop and continue later; with one GPU you can look at samples on the way, too. *Processes* is the number of GPUs: each trains on its share of every step, and the model becomes what a single GPU would train, but for rounding and the chance in dropout.",
    "*Run all* starts that by itself": "*Run All* starts that by itself",
    '`FinetunePanel(text, model="restored", output_dir="further")`': '`FinetunePanel(text, model="gpt2-tuned", output_dir="further", num_processes=2)`',
    "**When the session ends too early.** …": """**When the session ends too early.** Kaggle ends a session after 20 minutes in which you change and run nothing, and after 12 hours in any case. With *Persistence* at *Files only*, `/kaggle/working` comes back with the next one: open this notebook again, choose the same accelerator and *Run All*. It finds the newest checkpoint, the panel says at which step it resumes, and you get the same model as if nothing had happened. You lose about five minutes of training at most.""",
    "What you typed into a panel, …": """What you typed into a panel, or uploaded, is lost with the session. So that *Run All* finds it next time, write it into the cells: `FinetunePanel(text, num_train_epochs=4, num_processes=2)`, or `DataPanel(train_file="/kaggle/input/my-text/my.txt")`. [What is saved, where, and when](https://github.com/colab-gpt2/colab-gpt2/blob/main/nbs/tutorials/what_is_saved.md) has the details; what it says of a Drive is about Colab.

**With the browser closed.** *Save Version → Save & Run All* runs the whole notebook in a session of its own, which lasts up to 12 hours and needs nobody to look at it. Afterwards the model is in that version's *Output*. A training that takes longer would be lost with its session, so give it `max_minutes=660` in the cell above: it stops in time with a checkpoint. To resume, choose *Add Input* and, under your work, that version's output; copy its path, and run `!cp -r PATH/gpt2-tuned .` before step 3 of the next version.""",
    "**If you choose Run all again**": "**If you choose Run All again**",
    'num_train_epochs=2, output_dir="by-hand")': 'num_train_epochs=2, num_processes=2, output_dir="by-hand")',
    "and copies that to your Drive. The copy is read back and compared byte for byte.": "in `/kaggle/working`, checks it, and gives you a link to download it.",
    "A model that is already on the Drive stays there": "A model that is already there stays",
    "One thing cannot be checked from here. …": """What is in `/kaggle/working` is listed under *Output* at the right. To keep it for good, choose *Save Version → Quick Save* and, under *Advanced settings*, to save the output with it: up to 20 GB belong to a version, and other notebooks can take them as an input.""",
    "DrivePanel(training)": 'DrivePanel(training, drive=".", folder=".")',
    "from colab_gpt2 import archive_model, save_to_drive\n\narchive = archive_model": "from colab_gpt2 import archive_model\n\narchive_model",
    '\nsave_to_drive(archive, "colab-gpt2")': "",
    "Add your file in Colab's *Files* panel (📁 at the left) and put its name between the quotes; without a name":
        "Add your file with *Upload*, at the right under *Input*, copy its path and put that between the quotes; without a path",
    "# my.txt, my.csv, my.jsonl, or a path on the Drive": "# /kaggle/input/my-text/my.txt, or a .csv, a .jsonl, a folder",
    "from colab_gpt2.tasks import suggest\n\n": "from colab_gpt2 import check_runtime\nfrom colab_gpt2.tasks import suggest\n\ngpus = check_runtime().gpus or 1\n",
    'output_dir="my-model")': 'output_dir="my-model", num_processes=gpus)',
    "in a new session, run the two cells at the top, then `from colab_gpt2 import DrivePanel` and `DrivePanel()`: open *Load a saved model*, choose one and press *Restore*; then `from colab_gpt2 import GeneratePanel` and `GeneratePanel(model=\"restored\")` generate with it. Or in Python: `from colab_gpt2 import restore_from_drive`, then":
        "in a new notebook, add this one's output as an input, run the cell at the top, then `from colab_gpt2 import restore_from_drive` and",
    'restore_from_drive("gpt2-tuned.tar.gz", "gpt2-tuned")`.': 'restore_from_drive("PATH/gpt2-tuned.tar.gz", "gpt2-tuned")`, with the path of that input; then `from colab_gpt2 import GeneratePanel` and `GeneratePanel(model="gpt2-tuned")` generate with it.',
    "- For several GPUs: …": "- For more than two GPUs: [When one GPU is not enough](https://github.com/colab-gpt2/colab-gpt2/blob/main/nbs/tutorials/when_one_gpu_is_not_enough.md).",
    "`colab-gpt2 run --model gpt2 --dataset wikitext-2-raw-v1`": "`colab-gpt2 run --model gpt2 --dataset wikitext-2-raw-v1 --num-processes 2`",
}


def changed(source, found):
    "A cell in Kaggle's words; the rows of CHANGES that it needed are `found`."
    source = re.sub(r"^#@title .*\n", "", source)  # Colab's forms
    for old, new in CHANGES.items():
        pattern = re.escape(old.removesuffix("…")) + (r"(?:.|\n(?!\n))*" if old.endswith("…") else "")
        source, count = re.subn(pattern, lambda _: new, source)
        if count: found.add(old)
    return source


def made():
    "The notebook for Kaggle, as text."
    notebook, found = json.loads(COLAB.read_text(encoding="utf-8")), set()
    notebook["cells"] = [cell for cell in notebook["cells"] if not any(words in "".join(cell["source"]) for words in DROPPED)]
    for cell in notebook["cells"]: cell["source"] = changed("".join(cell["source"]), found).splitlines(True)
    for old in CHANGES.keys() - found: raise SystemExit(f"{COLAB.name} has no such words any more, change tools/kaggle.py: {old}")
    notebook["metadata"] = dict(kaggle=METADATA, kernelspec=notebook["metadata"]["kernelspec"])
    return json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__": KAGGLE.write_text(made(), encoding="utf-8")
