"""Measure the embedded model and write its card, colab_gpt2/assets/tiny/README.md.

    python tools/tiny_card.py FOLDER_WITH_wiki.valid.raw_AND_wiki.test.raw [--training TEXT]

Perplexity is measured on the two raw splits of WikiText-2, which the model has not seen; TEXT says how it was trained.
"""
import argparse, platform
from pathlib import Path

import torch

from colab_gpt2 import load_model, load_tokenizer, report_card, tokenize_file
from colab_gpt2.core import sha256_of

HERE = Path(__file__).parents[1]/"colab_gpt2"/"assets"/"tiny"
CARD = """---
language: en
license: cc-by-sa-3.0
library_name: transformers
pipeline_tag: text-generation
---
# tiny

A GPT-2 of {parameters:,} parameters for machines without GPU or network: {layers} layers, width {width}, {heads} heads, a context of
{context} tokens and a byte-level BPE of its own with {vocabulary:,} entries. It exists so that the whole of colab-gpt2 can be run, tested
and learnt from in minutes. It is no model to get facts, or sense, from.

## Training

{training}

`tools/pretrain_tiny.py` trains weights and tokenizer on English Wikipedia articles in WikiText's layout, rare words replaced, and on nothing
else. The articles are Wikipedia's, under CC BY-SA 3.0 and GFDL; so is what is learnt from them, as far as
that can be said of weights.

## Perplexity

On WikiText-2 raw v1, which it has not seen ({machine}; `python tools/tiny_card.py`):

| split | unit | stride | perplexity |
|---|---|---|---|
{rows}

Per word and per byte can be compared between models; per token only between models with the same tokenizer. The context is {context} tokens.

## Files

| file | sha256 |
|---|---|
{files}
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--training", default="", help="the run in a few sentences: articles, steps, tokens, time, machine")
    args = parser.parse_args()
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    rows = []
    for split, name in (("validation", "wiki.valid.raw"), ("test", "wiki.test.raw")):
        blocks = tokenize_file(args.folder/name, tokenizer, model.config.n_positions, split=split)
        rows += report_card(model, blocks).rows
    c = model.config
    machine = f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}, fp32"
    (HERE/"README.md").write_text(CARD.format(
        parameters=model.num_parameters(), layers=c.n_layer, width=c.n_embd, heads=c.n_head, context=c.n_positions, vocabulary=c.vocab_size,
        training=args.training, machine=machine, rows="\n".join(f"| {p.split} | {p.unit} | {p.stride} | {p.value:.2f} |" for p in rows),
        files="\n".join(f"| {f.name} | {sha256_of(f)} |" for f in sorted(HERE.glob("*.[js]*")))), encoding="utf-8")


if __name__ == "__main__": main()
