"Of a conversation the answers are learnt, as TRL counts them; no conversation sees another; what is left out is said."
import copy, json, random, re, warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest, torch
from transformers import AutoTokenizer, GPT2Config, LlamaConfig

import colab_gpt2
from colab_gpt2 import encode_chat, generate, tokenize_chats
from colab_gpt2.errors import fields_of
from colab_gpt2.model.fitting import end_ids
from colab_gpt2.model.loading import new_model
from colab_gpt2.text.chats import give_template, notes_on

TINY = Path(colab_gpt2.__file__).parent/"assets/tiny"
WORDS = ["The", "tide", "潮水", "día", "🦖🦖", "`def f(x):\n    return x`", "...", "Zoë\n\n", " - one\n - two ", "<b>", "\t&", "is"]


@pytest.fixture(scope="module")
def tokenizer():
    made = AutoTokenizer.from_pretrained(TINY)
    give_template(made)
    return made


def conversation(number, system=True):
    "Of one to four questions with their answers, some after a system message, every fortieth very long."
    draw = random.Random(number)
    def said(): return draw.choice(["Yes", "No.", "🦖"]) + " ".join(draw.choices(WORDS, k=draw.randint(1, most)))
    most = 800 if number % 40 == 7 else 30
    first = [dict(role="system", content=draw.choice(["", "Be brief."]))] * (system and draw.random() < 0.5)
    return first + [dict(role=role, content=said()) for _ in range(draw.randint(1, 4)) for role in ("user", "assistant")]


def labels_of_trl(tokenizer, rows, assistant_only):
    "What TRL's SFTTrainer makes of `rows` before it trains on them: (input_ids, labels) of each."
    from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from trl.chat_template_utils import get_training_chat_template
    from trl.trainer.sft_trainer import SFTTrainer
    given = SimpleNamespace(dataset_num_proc=None, dataset_text_field="text", assistant_only_loss=assistant_only,
                            max_length=None, shuffle_dataset=False)
    template = get_training_chat_template(tokenizer) if assistant_only else None
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=template, completion_only_loss=True, args=given)
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try: made = SFTTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tokenizer, given, False, None, "train")
    finally:
        if shown: enable_progress_bars()
    return [(row["input_ids"], row["labels"]) for row in made]


def labels_of_ours(tokenizer, rows):
    encoded = [encode_chat(tokenizer, row) for row in rows]
    return [(ids, [i if counts else -100 for i, counts in zip(ids, mask)]) for ids, mask in encoded]


@pytest.mark.parametrize("kind", ["messages", "prompt and completion", "texts"])
def test_masks_of_two_hundred_conversations_are_those_of_trl(tokenizer, kind):
    whole = [conversation(n) for n in range(200)]
    rows = {"messages": [dict(messages=m) for m in whole],
            "prompt and completion": [dict(prompt=m[:-1], completion=m[-1:]) for m in whole],
            "texts": [dict(prompt=m[-2]["content"], completion=" " + m[-1]["content"]) for m in whole]}[kind]
    ours = labels_of_ours(tokenizer, rows)
    assert ours == labels_of_trl(tokenizer, rows, assistant_only=kind == "messages")
    assert max(len(ids) for ids, _ in ours) > 2000 and all(max(labels) >= 0 > min(labels) for _, labels in ours)


@pytest.mark.parametrize("name", ["llama3", "gemma", "phi3"])
def test_templates_that_mark_no_answer_give_the_masks_of_those_that_trl_marks(tokenizer, name):
    import trl
    template = (Path(trl.__file__).parent/"chat_templates"/f"{name}.jinja").read_text(encoding="utf-8")
    marks = dict.fromkeys(re.findall(r"<\|\w+\|>|<(?:start|end)_of_turn>", template))
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens(dict(additional_special_tokens=[m for m in marks if m not in other.get_vocab()]))
    other.chat_template = template
    rows = [dict(messages=conversation(n, system=name != "gemma")) for n in range(50)]
    assert labels_of_ours(other, rows) == labels_of_trl(other, rows, assistant_only=True)
