"""A plain training loop after nanoGPT (github.com/karpathy/nanoGPT, its train.py and model.py), with its defaults: no
dropout, a vocabulary in multiples of 64, torch's own attention, one loss over all logits, fused AdamW, blocks that
begin anywhere in a memory map. On a CPU it is fp32; on a GPU it is compiled and in half precision. No Trainer."""
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

LOG_STEPS = 10  # steps between two losses


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.inward, self.outward = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        parts = self.inward(x).split(x.shape[-1], dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.outward(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm_1, self.norm_2, self.attention = nn.LayerNorm(width), nn.LayerNorm(width), Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    "The mean loss of `targets` after `ids`, both (blocks, tokens)."
    def __init__(self, config):
        super().__init__()
        width, rows = config.n_embd, -(-config.vocab_size // 64) * 64
        self.tokens, self.places = nn.Embedding(rows, width), nn.Embedding(config.n_positions, width)
        self.blocks = nn.Sequential(*(Block(width, config.n_head) for _ in range(config.n_layer)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, rows, bias=False)
        self.head.weight = self.tokens.weight
        for name, weight in self.named_parameters():
            out = name.endswith(("outward.weight", "mlp.2.weight"))
            if weight.dim() == 2: nn.init.normal_(weight, std=0.02 / (2 * config.n_layer)**0.5 if out else 0.02)

    def forward(self, ids, targets):
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        return F.cross_entropy(self.head(self.norm(self.blocks(x))).flatten(0, 1), targets.flatten())


class PlainLoop:
    "One block a step; as much of a Trainer as `task.measure` asks for."
    def __init__(self, options, config, blocks, precision):
        torch.manual_seed(options.seed)
        self.options, self.stream, self.state = options, blocks.stream, SimpleNamespace(log_history=[])
        model = GPT(config).to(options.device)
        by_decay = {decays: [p for p in model.parameters() if (p.dim() >= 2) is decays] for decays in (True, False)}
        groups = [dict(params=found, weight_decay=0.1 * decays) for decays, found in by_decay.items()]
        self.optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True)
        on_gpu = options.device == "cuda"
        self.model = torch.compile(model) if on_gpu else model
        kinds = dict(bf16=torch.bfloat16, fp16=torch.float16)
        self.cast = torch.autocast("cuda", kinds[precision]) if on_gpu else nullcontext()
        self.scaler = torch.amp.GradScaler(options.device, enabled=on_gpu and precision == "fp16")

    def add_callback(self, clock): self.clock = clock

    def batch(self):
        "The ids of a block that begins anywhere, and those that follow each."
        size = self.options.block_size
        start = torch.randint(len(self.stream) - size, (1,)).item()
        ids = torch.from_numpy(self.stream[start:start + size + 1].astype(np.int64))
        if self.options.device == "cuda": ids = ids.pin_memory().to("cuda", non_blocking=True)
        return ids[None, :-1], ids[None, 1:]

    def step(self, batch):
        "Learn from `batch`; the loss, and the next batch, read while the GPU computes."
        with self.cast: loss = self.model(*batch)
        batch = self.batch()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, batch

    def train(self):
        batch, losses = self.batch(), []
        self.clock.on_train_begin(None, None, None)
        for n in range(self.options.steps):
            loss, batch = self.step(batch)
            losses.append(loss.detach())
            if n % LOG_STEPS == 0: self.state.log_history.append(dict(loss=loss.item()))
            self.clock.on_step_end(None, None, None)
        self.state.log_history.append(dict(train_loss=torch.stack(losses).mean().item()))
