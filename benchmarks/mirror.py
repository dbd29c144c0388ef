"""What does the mirror cost? While GPT-2 trains, a checkpoint is copied to a slow folder, over and over, in every
second stretch of steps; nothing is copied in the others. One run has both: a machine that slows down for a while slows
both.

That is more than a run has: there a copy begins every five minutes. The folder takes as many megabytes a second as a
Drive under load, writing and reading back."""
import os, time
from pathlib import Path

from harness import compare, emit, report, run_side
from targets import STANDARD, target
from task import device_environment, load_blocks, make_clock, make_config, our_trainer, parser, settle, side_command
from task import warm_up_steps

ON, OFF = "mirror", "no mirror"


def slow_mirror(folder, megabytes_a_second):
    "A Mirror whose target is slow, and holds nothing: what is offered again is copied again."
    from colab_gpt2.storage.mirror import Mirror
    from colab_gpt2.storage.targets import FolderTarget

    class Slow(FolderTarget):
        moved = 0  # bytes, written or read back
        def names(self): return []

        def put(self, entry, source, report):
            last = [None, 0]
            def slowed(what, done, total):
                new = done - (last[1] if what == last[0] else 0)
                last[:], self.moved = (what, done), self.moved + new
                time.sleep(new / (megabytes_a_second * 1e6))
                report(what, done, total)
            super().put(entry, source, slowed)
    return Mirror(Slow(folder, "run"))


def make_checkpoint(folder, megabytes):
    "A complete checkpoint of one file of noise."
    from colab_gpt2.engine.checkpoints import write_manifest
    (folder := Path(folder)).mkdir(parents=True)
    with open(folder/"model.safetensors", "wb") as file:
        for _ in range(megabytes): file.write(os.urandom(10**6))
    write_manifest(folder, {})
    return folder


def make_turns(first, length, open_mirror, checkpoint):
    """A TrainerCallback: after `first` steps, stretches of `length` with a mirror and without. The first step of each
    does not count: in it the copy begins, or the one before is given up."""
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def __init__(self): self.mirror, self.moved = None, []

        def on_step_end(self, args, state, control, **kwargs):
            turn, step = divmod(state.global_step - first, length + 1)
            if step == 0 and turn >= 0: self.end() if turn % 2 else self.begin(state, turn)
            if self.mirror and not self.mirror.in_use(): self.mirror.offer(checkpoint)
            while self.mirror and not (self.mirror.target.moved or self.mirror.error): time.sleep(0.001)  # it begins

        def begin(self, state, turn):
            if state.global_step < state.max_steps: self.mirror = open_mirror()

        def end(self):
            self.moved.append(self.mirror.target.moved)
            if self.mirror.error: raise self.mirror.error[1]
            self.mirror.stopped = True
            self.mirror.queue.set(pending=None, ending=True)
            self.mirror.queue.thread.join()
            self.mirror = None
    return Turns()


def train_side(options) -> dict:
    "`options.rounds` stretches with a mirror and as many without, in turn: label -> runs."
    tokenizer, blocks = load_blocks(options)
    config, first = make_config(options, blocks.vocabulary_size), warm_up_steps(options, options.batch)
    length, tokens = options.steps, options.batch * options.block_size
    options.steps = first + 2 * options.rounds * (length + 1)
    trainer, _, train = our_trainer(options, config, tokenizer, blocks)
    turns = make_turns(first, length, lambda: slow_mirror("disk", options.rate),
                       make_checkpoint("output/checkpoint-1", options.megabytes))
    clock = make_clock(options.device)
    for callback in (clock, turns): trainer.add_callback(callback)
    train()
    found, seconds = {ON: [], OFF: []}, clock.seconds()[first:]
    for turn in range(2 * options.rounds):
        counted = seconds[turn * (length + 1) + 1:(turn + 1) * (length + 1)]
        speed = dict(tokens_per_second=tokens * length / sum(counted), step_seconds=counted)
        moved = dict(megabytes=turns.moved[turn // 2] / 1e6)
        found[(ON, OFF)[turn % 2]].append(speed | ({} if turn % 2 else moved))
    return found


def main():
    options = parser(__doc__, steps=4, rounds=5, batch=1, steps_are="optimizer steps of a stretch that count")
    options.add_argument("--rate", type=float, default=5.0, help="megabytes a second that the slow folder takes")
    options.add_argument("--megabytes", type=int, default=200, help="size of the checkpoint")
    options = settle(options.parse_args())
    if options.side: return emit(**train_side(options))
    command = side_command(__file__, options, "run")
    ran = run_side(command, env=device_environment(options))
    results = {label: ran[label] for label in (ON, OFF)}
    goal = target("training, tokens/s", OFF) if options.size == STANDARD else None
    rows = [compare("training, tokens/s", results, "tokens_per_second", OFF, ON, target=goal)]
    report("mirror", results, rows, commands=dict(run=command), device=options.device, folder=options.results)


if __name__ == "__main__": main()
