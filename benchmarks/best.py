"""Is the model that a run saves the best one? `tiny` reads a text of 100 kB, twice and many times, with the default
settings. The peer is the best epoch found by hand: the same run without evaluations on the way, whose perplexity of the
test text is measured after every epoch. Ours never sees that text: it chooses on the validation text."""
import argparse, time
from pathlib import Path

from harness import RESULTS, alternate, compare, emit, report
from targets import target
from task import TEXT, Formatter, device_environment, settle, side_command

OURS, BY_HAND = "ours", "by hand"


def settings(options, epochs):
    "The defaults, of a model and a text that are at hand; caches in the folder of the side."
    from colab_gpt2 import FinetuneConfig
    text = Path("text.txt")
    given = Path(options.text).read_bytes()[:options.bytes].decode("utf-8", "ignore")
    text.write_text(given, encoding="utf-8", newline="")
    return FinetuneConfig(model="tiny", train_file=str(text), num_train_epochs=epochs, output_dir="tuned",
                          cache_dir="cache", max_new_tokens=1)


def ours(config) -> dict:
    "A run, with the seconds that it evaluates and keeps weights on the way."
    from unittest.mock import patch
    from colab_gpt2.engine.callbacks import TRAINING, SAVING, Listener
    from colab_gpt2.engine.choosing import Chooser
    from colab_gpt2 import finetune
    began, spent, look = {}, [], Chooser.look

    class Clock(Listener):
        def on_stage(self, stage, **facts): began[stage] = time.perf_counter()

    def timed(*given):
        start = time.perf_counter()
        look(*given)
        spent.append(time.perf_counter() - start)
    with patch.object(Chooser, "look", timed): result = finetune(config, callbacks=[Clock()], progress=False)
    training = began[SAVING] - began[TRAINING]
    return dict(perplexity=result.perplexity_after.value, last=None, steps=result.steps, best_step=result.best_step,
                evaluating=sum(spent), training=training - sum(spent), evaluations=result.evaluations,
                stopped=str(result.stopped), reasons=[str(reason) for reason in result.plan.reasons])


def by_hand(config) -> dict:
    "The perplexity of the test text after each epoch."
    from dataclasses import replace
    from transformers import TrainerCallback
    from colab_gpt2 import finetune, perplexity
    from colab_gpt2.preparing import prepare
    held_out, curve = prepare(config).held_out, []

    class Epochs(TrainerCallback):
        def on_epoch_end(self, args, state, control, model=None, **kwargs):
            curve.append(perplexity(model, held_out, precision="bf16" if args.bf16 else "fp32", progress=False).value)
    result = finetune(replace(config, eval_steps=-1), callbacks=[Epochs()], progress=False)
    return dict(perplexity=min(curve), last=result.perplexity_after.value, steps=result.steps, curve=curve,
                best_epoch=1 + curve.index(min(curve)))


def rows_of(results, epochs) -> list:
    rows = []
    for n in epochs:
        named, mine = dict(ours=f"{OURS}-{n}", peer=f"{BY_HAND}-{n}"), results[f"{OURS}-{n}"]
        rows.append(compare(f"perplexity of what is saved, {n} epochs", results, "perplexity", **named,
                            target=target("perplexity of what is saved", BY_HAND)))
        last = {named["ours"]: mine, "the last weights": results[named["peer"]]}
        rows.append(compare(f"perplexity of what is saved, {n} epochs", last,
                            lambda run: run.get("last") or run["perplexity"], "the last weights", named["ours"]))
        spent = dict(ours=[dict(s=r["evaluating"]) for r in mine], training=[dict(s=r["training"]) for r in mine])
        rows.append(compare(f"seconds of evaluating on the way, {n} epochs", spent, "s", "training",
                            target=target("seconds of evaluating", "training")))
    return rows


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add = options.add_argument
    add("--epochs", type=int, nargs="+", default=[2, 16], help="how often the text is read")
    add("--bytes", type=int, default=100_000, help="of the text, from its beginning")
    add("--text", default=TEXT, help="a UTF-8 text")
    add("--rounds", type=int, default=1, help="how often every side runs, in turn with the others")
    add("--device", default="cpu", choices=("auto", "cpu", "cuda"), help="auto: the GPU if there is one")
    add("--results", default=RESULTS, type=Path, help="folder for the JSON")
    add("--side", help=argparse.SUPPRESS)
    options = settle(options.parse_args())
    if options.side:
        who, n = options.side.rsplit("-", 1)
        return emit(**{OURS: ours, BY_HAND: by_hand}[who](settings(options, int(n))))
    labels = [f"{who}-{n}" for n in options.epochs for who in (BY_HAND, OURS)]
    commands = {label: side_command(__file__, options, label) for label in labels}
    results = alternate(commands, options.rounds, env=dict.fromkeys(commands, device_environment(options)))
    report("best", results, rows_of(results, options.epochs), commands=commands, device=options.device,
           folder=options.results)


if __name__ == "__main__": main()
