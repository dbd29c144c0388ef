"Of a conversation the answers are learnt, as TRL counts them; no conversation sees another; what is left out is said."
import copy, json, os, random, re, signal, time, warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest, torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, GPT2Config, LlamaConfig, PreTrainedTokenizerFast, TrainerCallback
from transformers import TrainingArguments
from transformers import default_data_collator

import colab_gpt2
from colab_gpt2 import encode_chat, finetune, generate, load_corpus, perplexity, report_card, tokenize_chats, tune_model
from colab_gpt2.engine.trainer import BlockTrainer
from colab_gpt2.errors import fields_of
from colab_gpt2.model.fitting import add_rows, end_ids, set_ids
from colab_gpt2.model.loading import new_model
from colab_gpt2.preparing import keeps_apart
from colab_gpt2.text.chats import code, first_question, give_template, notes_on, pack

TINY = Path(colab_gpt2.__file__).parent/"assets/tiny"
WORDS = "The tide 潮水 día 🦖🦖 <b> is ...".split() + ["`def f(x):\n    return x`", "Zoë\n\n", " - one\n - two ", "\t&"]


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
    return first + [dict(role=role, content=said()) for role in ("user", "assistant") * draw.randint(1, 4)]


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


def test_answers_found_by_comparing_renderings_are_those_that_trl_finds_by_marks(tokenizer):
    "Both sides ask transformers where a template has marks. Without them ours finds the answer and the line's end."
    rows, unmarked = [dict(messages=conversation(n)) for n in range(200)], copy.deepcopy(tokenizer)
    unmarked.chat_template = re.sub(r"\{%- (end)?generation %\}", "", tokenizer.chat_template)
    (line,), end = tokenizer("\n")["input_ids"], tokenizer.eos_token_id
    found = [(ids, [-100 if (before, label) == (end, line) else label for before, label in zip([0, *ids], labels)])
             for ids, labels in labels_of_ours(unmarked, rows)]
    assert found == labels_of_trl(tokenizer, rows, assistant_only=True)


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


def spoken(question, answer): return [dict(role="user", content=question), dict(role="assistant", content=answer)]


def write_rows(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def chats(tokenizer, tmp_path):
    "Blocks of conversations of several lengths."
    rows = [dict(messages=spoken("Is it? " * (n % 7 + 1), "It is. " * (n % 5 + 1)) * (n % 3 + 1)) for n in range(60)]
    return tokenize_chats(write_rows(tmp_path/"a.jsonl", rows), tokenizer, 128, cache_dir=tmp_path, progress=False)


SHAPES = dict(
    gpt2=GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=256, vocab_size=8192, attn_pdrop=0., resid_pdrop=0.,
                    embd_pdrop=0., bos_token_id=0, eos_token_id=0),
    llama=LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                      vocab_size=8192))


@pytest.mark.parametrize("architecture", SHAPES)
def test_a_conversation_in_a_block_is_learnt_as_if_it_stood_alone(chats, architecture):
    model = new_model(SHAPES[architecture], seed=0)
    assert keeps_apart(model)
    tune_model(model)
    model.train()
    number = max(range(len(chats)), key=lambda i: len(chats.packed[i]))
    block, alone = {name: value[None] for name, value in chats[number].items()}, []
    for start, n in chats.pieces[chats.packed[number]]:
        coded = torch.from_numpy(chats.coded[start:start + n].astype(np.int64))[None]
        ids, labels = coded >> 2, torch.where(coded % 2 > 0, coded >> 2, -100)
        alone.append(model(input_ids=ids, labels=labels).loss * (labels >= 0).sum())
    assert len(alone) > 2
    together = model(**block).loss * (block["labels"] >= 0).sum()
    assert torch.allclose(together, sum(alone), rtol=1e-5)
    del block["position_ids"]
    assert not torch.allclose(model(**block).loss, together / (block["labels"] >= 0).sum(), rtol=1e-5)


def test_only_the_places_before_an_answers_tokens_have_a_gradient(chats):
    model, block = new_model(SHAPES["llama"], seed=0), {name: value[None] for name, value in chats[0].items()}
    labels, logits = block.pop("labels"), model(**block).logits
    logits.retain_grad()
    model.loss_function(logits=logits, labels=labels, vocab_size=8192).backward()
    learns = logits.grad.abs().sum(-1)[0] > 0
    assert torch.equal(learns, torch.nn.functional.pad(labels[0, 1:], (0, 1), value=-100) >= 0)
    assert 0 < learns.sum() < len(learns) * 0.8


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_of_conversations_add_up_to_the_mean_over_all_answers(chats, tmp_path, micro_batch):
    def gradient(size):
        trainer = BlockTrainer(new_model(SHAPES["gpt2"], seed=0), train_dataset=chats,
                               args=TrainingArguments(tmp_path, use_cpu=True, report_to="none"))
        trainer.micro_batch, trainer.current_gradient_accumulation_steps = size, 1
        loss = trainer.training_step(trainer.model, default_data_collator([chats[i] for i in range(4)]))
        return torch.cat([loss.reshape(1), *(p.grad.flatten() for p in trainer.model.parameters())])
    parts, whole = gradient(micro_batch), gradient(4)
    assert (parts - whole).norm() < 1e-5 * whole.norm()


def test_what_is_longer_than_a_block_is_cut_and_counted(tokenizer, tmp_path):
    rows = [dict(messages=spoken("Why? " * 10, "So. " * 90)), dict(messages=spoken("Why? " * 90, "So.")),
            *(dict(messages=spoken(f"Is it {n}?", "It is.")) for n in range(5))]
    chats = tokenize_chats(write_rows(tmp_path/"a.jsonl", rows), tokenizer, 64, split="train", cache_dir=tmp_path,
                           progress=False)
    assert len(chats.spans) == 7 and len(chats.pieces) == 6 and chats.pieces[:, 1].max() == 64
    [note] = notes_on(chats)
    assert note == ("train: 2 of 7 conversations are longer than block_size 64: their ends are left out, and 1 of them "
                    "altogether, whose answers begin there.") and fields_of(note) == ("block_size",)
    placed = [n for block in chats.packed for n in block]
    assert sorted(placed) == list(range(6))  # each once
    for i in range(len(chats)): assert (chats[i]["labels"] >= 0).any() and len(chats[i]["input_ids"]) == 64


REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + \
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
ASKED = spoken("Is it?", "It is.")


BAD = [
    (dict(messages=ASKED[:1]), "it has no answer", None),
    (dict(messages=[]), "it has no answer", None),
    (dict(messages=[dict(role="gpt", content="It is.")]), "no role is 'assistant', the last is 'gpt'", None),
    (dict(prompt=ASKED[:1], completion=[]), "it has no answer", None),
    (dict(messages=spoken("Is it?", " \n")), "an answer is empty", None),
    (dict(prompt="Is it?", completion=""), "an answer is empty", None),
    (dict(messages=spoken("Is it?", [dict(type="text", text="")])), "an answer is empty", None),
    (dict(messages=spoken([dict(type="image_url", image_url="a.png")], "It is.")), "a part of type 'image_url'", None),
    (dict(messages=spoken(["Is it?"], "It is.")), "a part of type 'str'", None),
    (dict(messages=spoken(None, "It is.")), "no content that is a text", None),
    (dict(messages=spoken(7, "It is.")), "no content that is a text", None),
    (dict(messages=["Is it?", "It is."]), "a message has no role", None),
    (dict(messages=[dict(content="Is it?")]), "a message has no role", None),
    (dict(messages="Is it?"), "it has no messages", None),
    (dict(prompt="Is it?", completion=ASKED[1:]), "both texts or both messages", None),
    (dict(prompt=ASKED[:1]), "both texts or both messages", None),
    (dict(question="Is it?", answer="It is."), "it has no messages", None),
    (["Is it?", "It is."], "it is no object", None),
    (dict(messages=[*ASKED, dict(role="system", content="Be brief.")]), "one is system", None),
    (dict(messages=[dict(role="critic", content="Bad."), *ASKED]), "one is critic", None),
    (dict(messages=[dict(role="system", content="Be brief."), *ASKED]), "System role not supported", REFUSING),
    (dict(messages=ASKED), "division by zero", "{{ 1 / 0 }}"),
    (dict(messages=ASKED), "Encountered unknown tag", "{% nonsense %}"),
    (dict(messages=ASKED), "no answer that the chat template writes", "{{ 'Hello' }}")]


@pytest.mark.parametrize("row, said, template", BAD)
def test_what_cannot_be_learnt_says_why(tokenizer, row, said, template):
    other = copy.copy(tokenizer)
    if template: other.chat_template = template
    with pytest.raises(ValueError, match=re.escape(said)) as caught: code(other, row)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_learnt_is_told_with_its_line_or_left_out_and_counted(tokenizer, tmp_path):
    options, bad = dict(cache_dir=tmp_path, progress=False), [row for row, _, template in BAD if not template]
    path = write_rows(tmp_path/"a.jsonl", [dict(messages=ASKED), *bad])
    with pytest.raises(ValueError, match="a.jsonl, line 2: it has no answer") as caught:
        tokenize_chats(path, tokenizer, 64, **options)
    assert "\n" not in str(caught.value) and fields_of(caught.value) == ("on_bad_lines",)
    chats = tokenize_chats(path, tokenizer, 64, on_bad_lines="skip", **options)
    assert len(chats.spans) == 1 and sum(chats.left_out.values()) == len(bad)
    told = f"{chats.left_out['it has no answer']} of {len(bad) + 1} conversations are left out: it has no answer."
    assert told in str(notes_on(chats))
    write_rows(path, bad)
    with pytest.raises(ValueError, match="a.jsonl has no conversation that can be learnt: it has no answer; "):
        tokenize_chats(path, tokenizer, 64, on_bad_lines="skip", **options)


ANIMALS = "lobster crab whale gull seal cod heron otter eel squid".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with a toy model and conversations that it can learn."
    folder = tmp_path_factory.mktemp("chats")
    toy = GPT2Config(n_layer=1, n_embd=64, n_head=2, n_positions=128, vocab_size=8192, bos_token_id=0, eos_token_id=0)
    new_model(toy, seed=0).save_pretrained(folder/"toy")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder/"toy")
    write_rows(folder/"chats.jsonl", [dict(messages=spoken(f"What is the {ANIMALS[n % 10]} of day {n}?", "It is wet."))
                                      for n in range(300)])
    return folder


@pytest.fixture(scope="module")
def run(place):
    def run(name, **changes):
        options = dict(model=str(place/"toy"), train_file=str(place/"chats.jsonl"), effective_batch_size=4,
                       max_steps=30, learning_rate=5e-3, max_new_tokens=12, precision="fp32",
                       cache_dir=str(place/"cache"), output_dir=str(place/name), progress=False, save_steps=-1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return finetune(**{**options, **changes})
    return run


@pytest.mark.parametrize("row", [
    dict(messages=[dict(role="system", content="Tell."), dict(role="assistant", content="It ebbs.")]),
    dict(messages=spoken("", "It ebbs.")), dict(prompt="", completion="It ebbs.")], ids=str)
def test_where_nobody_asks_the_sample_answers_a_greeting(tmp_path, row):
    write_rows(tmp_path/"a.jsonl", [row] * 3)
    assert first_question(tmp_path/"a.jsonl") == "Hello!"


def test_answers_are_learnt_and_end(run, place, shell):
    result = run("out", learning_rate=1e-2, max_steps=60)
    assert result.losses[-1]["loss"] < result.losses[0]["loss"] / 10
    asked, before, after = result.config.prompt, result.samples["before"], result.samples["after"]
    assert asked.startswith("What is the ") and after.prompt == f"User: {asked}\nAssistant:" == before.prompt
    assert (after.text, after.stopped) == (" It is wet.", "end") and before.text != after.text
    tokenizer = AutoTokenizer.from_pretrained(place/"out")
    assert "Assistant:" in tokenizer.chat_template  # saved with the model
    more = [*spoken("Is it?", "No."), dict(role="user", content="What is the eel?")]
    [sample] = generate(str(place/"out"), more, chat=True, top_k=1, progress=False)
    assert sample.prompt.startswith("User: Is it?\nAssistant: No.<|endoftext|>\nUser: What is the eel?\nAssistant:")
    assert (sample.text, sample.stopped) == (" It is wet.", "end")
    words = "--chat", "--prompt", "What is the eel?", "--top-k", 1
    said = shell("colab-gpt2", "generate", "--model", place/"out", *words)
    assert said.stdout == "It is wet.\n", said.stderr


def test_a_run_on_conversations_resumes_to_the_same_weights(run, place):
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4: signal.raise_signal(signal.SIGINT)
    first = run("one", max_steps=9)
    with pytest.raises(KeyboardInterrupt): run("two", max_steps=9, callbacks=[Stop()])
    resumed = run("two", max_steps=9)
    assert resumed.resumed_from and resumed.files == first.files
    write_rows(place/"others.jsonl", [dict(messages=spoken(f"Is it {n}?", "It is.")) for n in range(99)])
    with pytest.raises(FileExistsError, match="the text is another one"):
        run("two", max_steps=9, train_file=str(place/"others.jsonl"))


@pytest.mark.filterwarnings("ignore:The held-out text")
def test_a_table_of_texts_stays_a_text(tmp_path):
    texts = write_rows(tmp_path/"texts.jsonl", [dict(text=f"The tide of day {n}.", source="x") for n in range(300)])
    corpus = load_corpus(train_file=texts, cache_dir=tmp_path, progress=False, dataset_text_field="text")
    assert {corpus.path(split).suffix for split in corpus.bytes} == {".txt"}
    rows = [dict(prompt=f"Is it {n}?", completion=f"It is {n}.") for n in range(300)]
    chats = write_rows(tmp_path/"chats.jsonl", rows)
    corpus = load_corpus(train_file=chats, cache_dir=tmp_path, progress=False)
    assert {corpus.path(split).suffix for split in corpus.bytes} == {".jsonl"} and len(corpus.bytes) == 3
    with pytest.raises(ValueError, match="One of train_file and eval_file holds conversations, one texts.") as caught:
        load_corpus(train_file=chats, eval_file=texts, cache_dir=tmp_path, progress=False)
    assert fields_of(caught.value) == ("train_file", "eval_file")
    corpus = load_corpus(train_file=chats, cache_dir=tmp_path, progress=False, dataset_text_field="completion")
    assert {corpus.path(split).suffix for split in corpus.bytes} == {".txt"}  # as was asked for


def test_what_ends_an_answer_in_a_template_ends_a_text_and_is_saved(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens(dict(additional_special_tokens=["<|im_start|>", "<|im_end|>"]))
    other.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    model = new_model(SHAPES["gpt2"], seed=0)
    assert end_ids(model, other) == {0, other.convert_tokens_to_ids("<|im_end|>")}
    set_ids(model, other)
    assert model.generation_config.eos_token_id == 0  # there is no row for the other yet
    add_rows(model, len(other))
    set_ids(model, other)
    assert model.generation_config.eos_token_id == [0, other.convert_tokens_to_ids("<|im_end|>")]


def test_perplexity_is_of_the_answers_each_conversation_by_itself(chats):
    model = new_model(SHAPES["llama"], seed=0).eval()
    nats, counts = 0., []
    for start, n in chats.pieces:
        codes = torch.from_numpy(chats.coded[start:start + n].astype(np.int64))
        with torch.no_grad(): logs = model(input_ids=(codes >> 2)[None]).logits[0].log_softmax(-1)
        places = [i for i in range(1, n) if codes[i] & 1]
        nats -= sum(logs[i - 1, codes[i] >> 2].item() for i in places)
        counts.append(len(places))
    found = perplexity(model, chats, progress=False)
    assert found.tokens == sum(counts) == chats.answers and found.nats == pytest.approx(nats, rel=1e-5)
    assert str(found).endswith("per token (answers of unnamed split, stride 128, context 128)")
    some = perplexity(model, chats, most=20, progress=False)  # evenly over the lengths
    assert some.value == pytest.approx(found.value, rel=0.05)
    card = report_card(model, chats, progress=False)
    assert [(row.unit, row.count) for row in card.rows] == [("token", chats.answers), ("word", chats.words),
                                                            ("byte", chats.bytes)]


@pytest.mark.parametrize("prompt, completion, notes", [
    ("Is it? ", "It is.", 0), ("Is it?", "\nIt is.", 0), ("Is it?", "It is.", 1)])
def test_texts_are_learnt_as_they_stand_and_their_joint_is_told(tokenizer, tmp_path, prompt, completion, notes):
    path = write_rows(tmp_path/"a.jsonl", [dict(prompt=prompt, completion=completion)])
    chats = tokenize_chats(path, tokenizer, 64, split="train", cache_dir=tmp_path, progress=False)
    assert tokenizer.decode(chats.stream) == prompt + completion + "<|endoftext|>" and not chats.templated
    assert ["1 prompts meet their completions without a space" in note for note in notes_on(chats)] == [True] * notes


def test_an_answer_as_it_was_generated_is_written_as_any_other(tokenizer):
    one, other = (encode_chat(tokenizer, dict(messages=spoken("Is it?", answer))) for answer in ("It is.", " It is."))
    assert one == other


def test_a_saved_model_is_evaluated_on_its_answers(run, place, shell):
    result = run("evaluated", max_steps=4)
    said = shell("colab-gpt2", "evaluate", "--model", place/"evaluated", "--train-file", place/"chats.jsonl",
                 "--cache-dir", place/"cache", "--precision", "fp32", "--json")
    [row] = [row for row in json.loads(said.stdout)["rows"] if row["unit"] == "token"]
    assert row["split"] == "answers of test" and row["value"] == pytest.approx(result.perplexity_after.value, rel=1e-4)


def test_a_file_of_conversations_is_complete_or_absent(tokenizer, tmp_path):
    path, kept = write_rows(tmp_path/"a.jsonl", [dict(messages=ASKED)] * 3), tmp_path/"tokens"
    def full(what, done, total):
        if done: raise OSError(28, "No space left on device")
    said = "could not be written .* No space left on device. Give another cache_dir."
    with pytest.raises(OSError, match=said) as caught:
        tokenize_chats(path, tokenizer, 64, cache_dir=tmp_path, progress=full)
    assert caught.value.errno == 28 and not any(kept.iterdir())
    chats = tokenize_chats(path, tokenizer, 64, cache_dir=tmp_path, progress=False)
    written = chats.coded.tolist()
    chats.path.write_bytes(chats.path.read_bytes()[:-4])  # cut off since
    again = tokenize_chats(path, tokenizer, 64, cache_dir=tmp_path, progress=False)
    assert again.coded.tolist() == written and {f.suffix for f in kept.iterdir()} == {".chats", ".json"}


def test_tokenizers_that_differ_in_their_end_alone_share_no_file(tokenizer, tmp_path):
    other = copy.deepcopy(tokenizer)
    other.eos_token = "."
    path = write_rows(tmp_path/"a.jsonl", [dict(messages=ASKED)])
    one, two = (tokenize_chats(path, t, 64, cache_dir=tmp_path, progress=False) for t in (tokenizer, other))
    assert one.path != two.path and one.coded[-2] != two.coded[-2]


def test_tools_may_be_json_in_a_text(tokenizer):
    other = copy.copy(tokenizer)
    other.chat_template = "{% for t in tools or [] %}{{ t.name }} {% endfor %}" + REFUSING
    tools = [dict(name="tide")]
    texts, lists = (encode_chat(other, dict(messages=ASKED, tools=given)) for given in (json.dumps(tools), tools))
    assert texts == lists and other.decode(texts[0]).startswith("tide ")
    with pytest.raises(ValueError, match="tools are neither a list nor JSON"):
        encode_chat(other, dict(messages=ASKED, tools="tide"))


def test_one_file_to_train_and_evaluate_on_is_told_and_a_bad_row_has_its_own_line(tokenizer, tmp_path):
    rows = [dict(messages=ASKED), dict(messages=ASKED), dict(messages=spoken("Why?", "So."))]
    path, options = write_rows(tmp_path/"a.jsonl", rows), dict(cache_dir=tmp_path, progress=False)
    with pytest.warns(UserWarning, match="hold the same text, all of train"):
        corpus = load_corpus(train_file=path, eval_file=path, **options)
    assert corpus.bytes["train"] == corpus.bytes["validation"] and corpus.report.characters == 2 * 19
    corpus = load_corpus(train_file=write_rows(path, [*rows, dict(messages=[])]), hold_out=False, **options)
    with pytest.raises(ValueError, match=f"{path}, line 4: it has no answer"):
        tokenize_chats(corpus.train, tokenizer, 64, **options)


def test_a_path_of_no_conversations_is_told(tokenizer, tmp_path):
    os.mkfifo(tmp_path/"pipe.jsonl")
    for name, said in {"none.jsonl": "does not exist", "": "is a folder", "pipe.jsonl": "is a pipe"}.items():
        with pytest.raises((OSError, ValueError), match=said): tokenize_chats(tmp_path/name, tokenizer, 64)


def test_the_time_of_packing_grows_as_conversations_do():
    "Four times as many take four times as long, and not sixteen."
    def seconds(n):
        began = time.process_time()
        assert pack([600, 400] * n, 1024) == [[2 * i, 2 * i + 1] for i in range(n)]
        return time.process_time() - began
    assert min(seconds(80_000) for _ in range(3)) < 8 * min(seconds(20_000) for _ in range(3))


def test_an_answer_is_learnt_where_the_space_before_it_is_no_token():
    words = ["[UNK]", "[SEP]", "Yes", "Tide", "Assistant", "User", ":", "?"]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    dropping = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", sep_token="[SEP]")
    give_template(dropping)
    asked = [dict(role="user", content="Tide?"), dict(role="assistant", content="Yes")]
    ids, mask = encode_chat(dropping, dict(messages=asked * 2))
    assert [words[i] for i, learnt in zip(ids, mask) if learnt] == ["Yes", "[SEP]"] * 2
