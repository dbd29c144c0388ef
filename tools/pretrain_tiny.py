r"""Pretrain the embedded model `tiny`, its tokenizer included, and write both to a folder.

    python tools/pretrain_tiny.py ARTICLES.txt OUT

ARTICLES.txt is English text in WikiText's layout (` = Title = ` lines) with rare words as `<unk>`. Two choices follow
from that. Each `<unk>` is replaced by a rare word drawn from the same text, because the model is used on raw text,
where names and rare words do occur, and it should expect one there rather than skip the place. Every fiftieth article
is held out, to watch the loss; nothing else is measured here (perplexity on the raw splits is tools/tiny_card.py's).
"""
import argparse, copy, json, math, random, re, time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from colab_gpt2.model.fitting import save_tokenizer
from colab_gpt2.runtime import pick_precision
from colab_gpt2.model.tune import keep_freed_memory, tune_model

TITLE = re.compile(r"(?m)^ = [^=].*[^=] = $")
CONTEXT, VOCABULARY = 512, 8192


def articles(text):
    "The articles of `text`, each from its ` = Title = ` line to the next."
    starts = [m.start() for m in TITLE.finditer(text)]
    return [text[a:b] for a, b in zip(starts, starts[1:] + [len(text)])]


def fill_unknown(text, rare, rng):
    "`text` with every `<unk>` replaced by a word drawn from `rare`."
    return re.sub(r"<unk>", lambda _: rng.choice(rare), text)


def rare_words(text):
    "Capitalised and lower-case words seen up to four times: the nearest thing in the text to those it lacks."
    counts = Counter(text.split())
    return [w for w, n in counts.items() if n <= 4 and w.isalpha()]


def train_tokenizer(texts):
    "A byte-level BPE with GPT-2's pre-tokenizer, so that no text is out of its reach."
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator((t.replace("<unk>", "") for t in texts), trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end,
                                   model_max_length=CONTEXT)


def tokenize(tokenizer, texts):
    "All `texts` as one stream of uint16."
    return np.concatenate([np.array(e.ids, dtype=np.uint16) for e in tokenizer._tokenizer.encode_batch(texts)])


def new_model(seed, dropout):
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=256, n_layer=6, n_head=4,
                        activation_function="gelu_pytorch_tanh", resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=0.,
                        bos_token_id=0, eos_token_id=0, use_cache=False)
    model = GPT2LMHeadModel(config)
    tune_model(model)
    return model


def half_precision():
    "Autocast to bf16 where this CPU computes in it; the weights stay in fp32."
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=pick_precision("cpu").dtype == "bf16")


def optimizers(model, muon_lr, adam_lr):
    "Muon for the matrices of the blocks, AdamW for embeddings, gains and biases (https://kellerjordan.github.io/posts/muon)."
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".h." in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".h." in n)]
    return [torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)]


@torch.no_grad()
def mean_loss(model, tokens):
    "Mean cross-entropy in nats a token over full blocks of `tokens`."
    model.eval()
    blocks = torch.from_numpy(tokens[:len(tokens) // CONTEXT * CONTEXT].astype(np.int64)).view(-1, CONTEXT)
    with half_precision(): losses = [model(b, labels=b).loss.item() * len(b) for b in blocks.split(8)]
    model.train()
    return sum(losses) / len(blocks)


def batches(make_stream, batch, rng):
    "Blocks of CONTEXT tokens from a random offset, shuffled, one epoch after another; `make_stream(epoch)` gives the tokens."
    epoch = 0
    while True:
        stream = make_stream(epoch)
        stream = stream[rng.randrange(CONTEXT):]
        blocks = stream[:len(stream) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
        order = list(range(len(blocks)))
        rng.shuffle(order)
        for i in range(0, len(order) - batch + 1, batch):
            yield epoch, torch.from_numpy(blocks[order[i:i + batch]].astype(np.int64))
        epoch += 1


def save(model, tokenizer, out, half):
    """Weights as safetensors (in half precision for the wheel), config and tokenizer. The config has no dropout: what `tiny` is fine-tuned
    on in a demonstration is read once or twice, too seldom to learn it by heart."""
    kept = copy.deepcopy(model)
    kept.config.update(dict(use_cache=True, resid_pdrop=0., embd_pdrop=0.))
    (kept.half() if half else kept).save_pretrained(out)
    save_tokenizer(tokenizer, out)
    for name in ("vocab.json", "merges.txt"): (out/name).unlink()  # tokenizer.json has both


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("articles", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=4, help="blocks of 512 tokens a step")
    parser.add_argument("--dropout", type=float, default=0.1, help="of the embeddings and the residual stream")
    parser.add_argument("--muon-lr", type=float, default=4e-3)
    parser.add_argument("--adam-lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=250)
    args = parser.parse_args()

    keep_freed_memory()
    rng = random.Random(args.seed)
    text = args.articles.read_text(encoding="utf-8")
    kept = [a for i, a in enumerate(articles(text)) if i % 50 != 0]
    held = [a for i, a in enumerate(articles(text)) if i % 50 == 0]
    rare = rare_words("".join(kept))
    tokenizer = train_tokenizer(kept)

    def stream(epoch):
        words = random.Random(args.seed * 1000 + epoch)
        order = kept[:]
        words.shuffle(order)
        return tokenize(tokenizer, [fill_unknown(a, rare, words) for a in order])

    held_tokens = tokenize(tokenizer, [fill_unknown(a, rare, random.Random(-1)) for a in held])
    model = new_model(args.seed, args.dropout)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda s: min(1, (s + 1) / 60) * min(1, 1.25 * (1 - s / args.steps)))
                  for o in optimizers(model, args.muon_lr, args.adam_lr)]
    print(json.dumps(dict(parameters=model.num_parameters(), articles=len(kept), rare=len(rare),
                          train_tokens=len(stream(0)), held_tokens=len(held_tokens))), flush=True)
    start, tokens = time.perf_counter(), 0
    feed = batches(stream, args.batch, rng)
    for step in range(1, args.steps + 1):
        epoch, block = next(feed)
        with half_precision(): loss = model(block, labels=block).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for s in schedulers:
            s.optimizer.step(); s.optimizer.zero_grad(); s.step()
        tokens += block.numel()
        if step % 25 == 0 and not math.isfinite(loss.item()): raise SystemExit(f"The loss became {loss.item()} at step {step}: lower --muon-lr and --adam-lr.")
        if step % 25 == 0:
            print(json.dumps(dict(step=step, epoch=epoch, loss=round(loss.item(), 4), tokens_per_second=round(tokens / (time.perf_counter() - start)))), flush=True)
        if step % args.save_every == 0 or step == args.steps:
            print(json.dumps(dict(step=step, held_out_loss=round(mean_loss(model, held_tokens), 4))), flush=True)
            save(model, tokenizer, args.out, half=True)


if __name__ == "__main__": main()
