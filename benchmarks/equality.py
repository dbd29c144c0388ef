"""Does ours learn what the stock Trainer learns? The same weights, blocks and settings, no dropout: the losses of the
same steps, in fp32 and in half precision."""
from harness import alternate, compare, emit, report
from targets import target
from task import (device_environment, half_precision, load_blocks, make_config, measure, our_trainer, parser, settle,
                  side_command, stock_model, stock_trainer)

PRECISIONS = ("fp32", "bf16", "fp16")
SAME = dict(learning_rate=5e-5, weight_decay=0.01, warmup_steps=2, lr_scheduler_type="linear", max_grad_norm=1.0,
            logging_steps=1)


def train_side(options) -> dict:
    "One side in this process, `who` in `precision`; the loss of every step is logged."
    who, precision = options.side.split("-")
    tokenizer, blocks = load_blocks(options)
    config = make_config(options, blocks.vocabulary_size, dropout=False)
    if who == "ours":
        trainer, _, train = our_trainer(options, config, tokenizer, blocks, precision=precision, **SAME)
        found, plan = measure(options, trainer, options.batch, train)
        return {**found, "plan": plan}
    model, half = stock_model(config, options.seed), {} if precision == "fp32" else {precision: True}
    # Unset, as in GPT2LMHeadModel, transformers 5.23 divides a block's loss by T, not by the T-1 tokens predicted.
    model.loss_type = "ForCausalLM"
    trainer = stock_trainer(options, model, blocks, per_device_train_batch_size=1,
                            gradient_accumulation_steps=options.batch, **SAME, **half)
    return measure(options, trainer, options.batch, trainer.train)[0]


def furthest(ours, stock) -> int:
    "The step, from 0, whose two losses differ most in proportion."
    return max(range(len(stock)), key=lambda n: abs(ours[n] / stock[n] - 1))


def loss_at(n): return lambda run: run["losses"][n]


def rows_of(results, precisions) -> list:
    rows = []
    for precision in precisions:
        sides = dict(ours=f"ours-{precision}", peer=f"stock-{precision}")
        ours, stock = (results[label][0]["losses"] for label in sides.values())
        worst = furthest(ours, stock)
        last, furthest_off = (f"loss at step {n}" for n in (len(stock), worst + 1))
        rows += [compare(f"{last}, {precision}", results, loss_at(-1), **sides,
                         target=target(f"last loss, {precision}", "stock")),
                 compare(f"{furthest_off}, which differs most, {precision}", results, loss_at(worst), **sides)]
    return rows


def main():
    options = parser(__doc__, steps=20, rounds=1, batch=1)
    options.add_argument("--precisions", nargs="+", choices=PRECISIONS,
                         help="default: fp32 and the half precision that the device is best at")
    options = settle(options.parse_args())
    if options.side: return emit(**train_side(options))
    precisions = options.precisions or ["fp32", *half_precision(options)]
    labels = [f"{who}-{precision}" for precision in precisions for who in ("stock", "ours")]
    commands = {label: side_command(__file__, options, label) for label in labels}
    results = alternate(commands, options.rounds, env=dict.fromkeys(commands, device_environment(options)))
    report("equality", results, rows_of(results, precisions), commands=commands, device=options.device,
           folder=options.results, settings=SAME)


if __name__ == "__main__": main()
