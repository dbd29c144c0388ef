"Perplexity agrees with a slow, obvious loop, scores everything once and leaves the model as it was."
import math
from dataclasses import replace

import numpy as np, pytest, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, RwkvConfig, RwkvForCausalLM

from colab_gpt2.errors import fields_of
from colab_gpt2.evaluation import ReportCard, perplexity, report_card
from colab_gpt2.model.loading import TINY
from colab_gpt2.text.token_store import Blocks, tokenize_file

TEXT = (" = Ada Lovelace = \n\n Ada Lovelace was an English mathematician and writer , "
        "known for her work on the Analytical Engine . \n") * 4
RANDOM = np.random.default_rng

@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Models this small spend most of their time handing work from thread to thread."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    sizes = dict(vocab_size=60, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.4))

@pytest.fixture(scope="module")
def tiny(): return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)

@pytest.fixture(scope="module")
def tiny_blocks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder/"ada.txt").write_text(TEXT)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    return tokenize_file(folder/"ada.txt", tokenizer, 32, split="test", cache_dir=folder, progress=False)

@pytest.fixture
def make_blocks(tmp_path):
    def make(ids, block_size=16, vocabulary_size=60):
        np.asarray(ids, dtype=np.uint16).tofile(tmp_path/"ids")
        facts = dict(tokens=len(ids), words=len(ids) // 2, bytes=3 * len(ids), vocabulary_size=vocabulary_size)
        return Blocks(tmp_path/"ids", block_size, **facts, dtype="uint16", split="test", sha256="")
    return make

def loop_of_the_page(model, ids, max_length, stride):
    """The perplexity of https://huggingface.co/docs/transformers/perplexity, in its names. The page counts one label
    less than each window has; only a window that scores its first token loses one."""
    encodings, nll_sum, n_tokens, prev_end_loc = torch.tensor([ids]), 0.0, 0, 0
    seq_len = encodings.size(1)
    for begin_loc in range(0, seq_len, stride):
        end_loc = min(begin_loc + max_length, seq_len)
        trg_len = end_loc - prev_end_loc  # may be different from stride on last loop
        input_ids = encodings[:, begin_loc:end_loc]
        target_ids = input_ids.clone()
        target_ids[:, :-trg_len] = -100
        num_loss_tokens = (target_ids[:, 1:] != -100).sum().item()
        if num_loss_tokens:
            with torch.no_grad(): loss = model.eval()(input_ids, labels=target_ids).loss.item()
            nll_sum, n_tokens = nll_sum + loss * num_loss_tokens, n_tokens + num_loss_tokens
        prev_end_loc = end_loc
        if end_loc == seq_len: break
    return math.exp(nll_sum / n_tokens)

@pytest.mark.parametrize("tokens, context, stride", [
    (50, 16, 8), (50, 16, 16), (49, 16, 16), (50, 16, 5), (50, 7, 1), (33, 16, 16), (50, 16, 15),
    (17, 16, 3), (17, 16, 16), (16, 16, 16), (9, 16, 8), (2, 16, 8), (20, 2, 1), (20, 2, 2)])
def test_perplexity_is_that_of_the_page_it_cites(small, make_blocks, tokens, context, stride):
    ids = RANDOM(tokens).integers(0, 60, tokens).tolist()
    measured = perplexity(small, make_blocks(ids), stride=stride, context=context, progress=False)
    assert measured.value == pytest.approx(loop_of_the_page(small, ids, context, stride), rel=1e-5)
    assert measured.tokens == tokens - 1 and measured.value == pytest.approx(math.exp(measured.nats / (tokens - 1)))

@pytest.mark.parametrize("stride", [16, 32])
def test_tiny_against_the_page(tiny, tiny_blocks, stride):
    measured, ids = perplexity(tiny, tiny_blocks, stride=stride, progress=False), tiny_blocks.stream.tolist()
    slow = (len(ids) - 1) * math.log(loop_of_the_page(tiny, ids, 32, stride))
    assert measured.nats == pytest.approx(slow, rel=1e-5)
    assert measured.per("word").value == pytest.approx(math.exp(slow / len(TEXT.split())), rel=1e-3)
    assert measured.per("byte").value == pytest.approx(math.exp(slow / len(TEXT.encode())), rel=1e-4)

def test_what_is_left_over_counts_and_a_short_text_can_be_measured(small, make_blocks):
    ids = RANDOM(1).integers(0, 60, 40).tolist()
    nats = [perplexity(small, make_blocks(some), stride=16, progress=False).nats for some in (ids, ids[:32])]
    assert nats[0] != nats[1]
    short = make_blocks(ids[:9])
    assert len(short) == 0 and perplexity(small, short, progress=False).tokens == 8

def test_the_batch_size_changes_nothing(small, make_blocks):
    blocks = make_blocks(RANDOM(2).integers(0, 60, 200))
    values = [perplexity(small, blocks, stride=8, batch_size=n, progress=False).nats for n in (1, 3, 100, None)]
    assert values == pytest.approx([values[0]] * 4, rel=1e-6)

class Stubborn(torch.nn.Module):
    "A model whose forward computes all logits."
    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config
    def get_input_embeddings(self): return self.model.get_input_embeddings()
    def forward(self, input_ids, use_cache): return self.model(input_ids=input_ids, use_cache=use_cache)

def test_a_model_without_logits_to_keep(small, make_blocks):
    blocks = make_blocks(RANDOM(3).integers(0, 60, 60))
    stubborn, own = (perplexity(model, blocks, progress=False) for model in (Stubborn(small), small))
    assert stubborn.nats == pytest.approx(own.nats, rel=1e-6)

def test_no_logits_are_in_memory(small, make_blocks, monkeypatch):
    "By the model's Head at most a chunk; by the forward of a model without one what is scored."
    shapes, blocks = [], make_blocks(np.zeros(60, int))
    hook = small.lm_head.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    by_head = perplexity(small, blocks, stride=4, progress=False)
    assert {shape[-1] for shape in shapes[1:]} == {1}  # the first is of three tokens, to know the Head
    shapes.clear()
    monkeypatch.setattr("colab_gpt2.evaluation.logits_batch", lambda *args: 2)
    monkeypatch.setattr("colab_gpt2.evaluation.output_head", lambda model: None)
    assert perplexity(small, blocks, stride=4, progress=False).nats == pytest.approx(by_head.nats, rel=1e-6)
    hook.remove()
    assert shapes[0] == (1, 15, 60) and {s[:2] for s in shapes[1:-1]} <= {(2, 4), (1, 4)}

def test_the_model_is_left_as_it_was(small, make_blocks):
    blocks = make_blocks(np.zeros(40, int))
    small.train()
    small.transformer.h[1].eval()
    modes = {name: m.training for name, m in small.named_modules()}
    first = perplexity(small, blocks, progress=False)
    assert perplexity(small, blocks, progress=False) == first  # dropout is off
    assert {name: m.training for name, m in small.named_modules()} == modes
    with pytest.raises(ValueError): perplexity(small, blocks, precision="int8", progress=False)
    assert {name: m.training for name, m in small.named_modules()} == modes
    loss = small(input_ids=torch.zeros(1, 8, dtype=torch.long), labels=torch.zeros(1, 8, dtype=torch.long)).loss
    loss.backward()  # nothing of inference mode stayed behind
    small.zero_grad()

def test_weights_that_a_model_divides_to_evaluate_are_whole_again_afterwards(make_blocks):
    shape = RwkvConfig(vocab_size=97, context_length=16, hidden_size=16, num_hidden_layers=2, rescale_every=1)
    model = RwkvForCausalLM(shape).train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    perplexity(model, make_blocks(np.arange(40)), context=16, progress=False)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_autocast(small, make_blocks):
    blocks = make_blocks(RANDOM(4).integers(0, 60, 60))
    full, half = (perplexity(small, blocks, precision=p, progress=False) for p in ("fp32", "bf16"))
    assert half.nats != full.nats and half.nats == pytest.approx(full.nats, rel=0.02) and half.precision == "bf16"

def test_a_report_ends_the_work(small, make_blocks):
    def stop(what, done, total):
        if done: raise KeyboardInterrupt(f"{what}: {done} of {total}")
    with pytest.raises(KeyboardInterrupt, match="Perplexity of test: 15 of 59"):
        perplexity(small, make_blocks(np.zeros(60, int)), progress=stop)

@pytest.mark.parametrize("options, message", [
    (dict(stride=0), "stride is 0; it must be a whole number ≥ 1 and ≤ 16"),
    (dict(stride=9, context=8), "stride is 9; .* ≤ 8"), (dict(stride=math.nan), "stride is nan"),
    (dict(context=17), "context is 17; .* The model's context is 16 tokens."), (dict(context=1), "context is 1"),
    (dict(batch_size=0), "batch_size is 0"), (dict(precision="half"), "precision is 'half'"),
    (dict(device="cuda:99"), "device is 'cuda:99', which cannot be used here .*set device='cpu'")])
def test_bad_settings(small, make_blocks, options, message):
    blocks = make_blocks(np.zeros(40, int))
    with pytest.raises(ValueError, match=message) as e: perplexity(small, blocks, progress=False, **options)
    assert "\n" not in str(e.value) and fields_of(e.value) == (next(iter(options)),)

def test_bad_texts(small, make_blocks):
    with pytest.raises(ValueError, match="The test text has 1 token; perplexity needs 2 or more. Give a longer eval_f"):
        perplexity(small, make_blocks([5]), progress=False)
    with pytest.raises(ValueError, match="has the token 61 and the model's vocabulary ends at 59"):
        perplexity(small, make_blocks([1, 61, 2], vocabulary_size=62), progress=False)
    unused = make_blocks([1, 59, 2], vocabulary_size=62)  # a larger vocabulary, which the text does not use
    assert perplexity(small, unused, progress=False).tokens == 2

def test_a_damaged_model(small, make_blocks):
    broken = GPT2LMHeadModel(small.config)
    broken.transformer.ln_f.weight.data[3] = math.inf
    damaged = "is nan: its weights are damaged .transformer.ln_f.weight is NaN or infinite"
    with pytest.raises(RuntimeError, match=damaged):
        perplexity(broken, make_blocks(np.zeros(40, int)), progress=False)

def test_report_card(tiny, tiny_blocks):
    card = report_card(tiny, tiny_blocks, progress=False)
    expected = [(unit, stride, "test") for stride in (32, 16) for unit in ("token", "word", "byte")]
    assert [(p.unit, p.stride, p.split) for p in card.rows] == expected
    worse = GPT2LMHeadModel(tiny.config).eval()
    before = report_card(worse, tiny_blocks, progress=False).rows
    both = ReportCard(card.rows, before)
    assert all(ratio < 1 for ratio in both.ratios) and len(both.to_dict()["before"]) == 6
    page = both._repr_html_()
    shown = "test, per word, stride 16, context 32", f"→ {card.rows[0].value:.2f}", f"{both.ratios[0]:.3f}"
    assert all(text in page for text in shown)


@pytest.mark.parametrize("name, value", dict(split="validation", stride=8, context=16, tokens=7).items())
def test_cards_that_are_not_comparable(tiny, tiny_blocks, name, value):
    card = report_card(tiny, tiny_blocks, strides=[32], progress=False)
    with pytest.raises(ValueError, match="are not comparable"):
        ReportCard(card.rows, tuple(replace(p, **{name: value}) for p in card.rows))


@pytest.mark.parametrize("words, bytes_, has", [(10, 60, True), (1, 300, False), (0, 300, False), (10, 410, False)])
def test_a_language_without_spaces_has_no_perplexity_per_word(small, make_blocks, words, bytes_, has):
    text = replace(make_blocks(RANDOM(5).integers(0, 60, 100)), words=words, bytes=bytes_)
    card = report_card(small, text, progress=False)
    assert [p.unit for p in card.rows] == ["token", *["word"] * has, "byte"] * 2
    assert all(math.isfinite(row["value"]) for row in card.to_dict()["rows"])
    bits = card.find("byte").nats / bytes_ / math.log(2)
    assert f"({bits:.3f} bits)" in card._repr_html_()
    if has: return
    with pytest.raises(ValueError, match="no words between white space"): card.find("token").per("word")


def test_a_perplexity_beyond_all_numbers_is_still_a_number(small, make_blocks):
    measured = replace(perplexity(small, make_blocks(RANDOM(5).integers(0, 60, 40)), progress=False), nats=1e6)
    assert 1e300 < measured.per("token").to_dict()["value"] < math.inf and len(str(measured.per("token"))) < 80
