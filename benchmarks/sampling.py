"""How fast is sampling? Ours against model.generate: the same model, from one prompt as many samples of as many new
tokens as batch, temperature 1 and top-k 50, in fp32, with a cache, from text to text. No end-of-text token ends a
sample early."""
import argparse, statistics, sys, time
from pathlib import Path

from harness import RESULTS, alternate, compare, emit, report
from targets import target
from task import Formatter, SIZES, TOKENIZER, device_environment, settle, side_command

PROMPT = " = Toronto Raptors = \n"
KNOBS = dict(temperature=1.0, top_k=50)


def load(options) -> tuple:
    "`(model, tokenizer)` without an end-of-text token: tiny with its weights, the others with random ones."
    from colab_gpt2.model.loading import load_model, load_tokenizer
    name, = options.models
    model = load_model("tiny") if name == "tiny" else load_model(from_scratch=True, config=name, seed=options.seed)
    tokenizer = load_tokenizer("tiny" if name == "tiny" else options.tokenizer)
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    return model.to(options.device), tokenizer


def ours(options, model, tokenizer):
    from colab_gpt2.generation import generate
    made = generate(model, PROMPT, tokenizer=tokenizer, samples=options.samples, max_new_tokens=options.tokens,
                    progress=False, **KNOBS)
    assert [sample.tokens for sample in made] == [options.tokens] * options.samples


def theirs(options, model, tokenizer):
    inputs = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    made = model.generate(**inputs, do_sample=True, use_cache=True, num_return_sequences=options.samples,
                          max_new_tokens=options.tokens, pad_token_id=0, **KNOBS)
    assert made.shape == (options.samples, inputs.input_ids.shape[1] + options.tokens)
    tokenizer.batch_decode(made)


SIDES = {"ours": ours, "model.generate": theirs}


def sample_side(options) -> dict:
    """One side in this process: seconds of every request but the first, which warms up, and tokens a second of the
    median."""
    import torch
    model, tokenizer = load(options)
    torch.manual_seed(options.seed)
    seconds = []
    for _ in range(1 + options.requests):
        started = time.perf_counter()
        SIDES[options.side](options, model, tokenizer)  # gives text, so no kernel of a GPU is still running
        seconds.append(time.perf_counter() - started)
    typical = statistics.median(seconds[1:])
    return dict(request_seconds=seconds[1:], seconds_per_step=typical / options.tokens,
                tokens_per_second=options.samples * options.tokens / typical)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add = options.add_argument
    add("--models", nargs="+", choices=["tiny", *SIZES],
        help="tiny, or a GPT-2 with random weights (default: tiny; on a GPU gpt2 too)")
    add("--samples", type=int, default=8, help="texts in a batch")
    add("--tokens", type=int, default=250, help="new tokens of each")
    add("--requests", type=int, default=3, help="measured in every run")
    add("--rounds", type=int, default=5, help="how often every side runs, in turn with the others")
    add("--tokenizer", default=TOKENIZER if TOKENIZER.exists() else "tiny", help="of GPT-2, a folder; tiny has its own")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: the GPU if there is one")
    add("--results", default=RESULTS, type=Path, help="folder for the JSON")
    add("--seed", type=int, default=42, help="of random weights")
    add("--side", choices=SIDES, help=argparse.SUPPRESS)
    return options


def row_of(options, results, model):
    "The comparison of one model's two sides."
    standard = (model, options.samples, options.tokens) == ("tiny", 8, 250)
    goal = target("sampling, tokens/s", "model.generate", options.device) if standard else None
    figure = f"sampling {options.samples} x {options.tokens} tokens with {model}, tokens/s"
    return compare(figure, results, "tokens_per_second", f"model.generate, {model}", f"ours, {model}", target=goal)


def default_models(options) -> list:
    "tiny; on a GPU GPT-2 too, where its tokenizer is at hand."
    if options.device != "cuda": return ["tiny"]
    if str(options.tokenizer) != "tiny": return ["tiny", "gpt2"]
    print("gpt2 is left out: its tokenizer is not at hand (--tokenizer FOLDER).", file=sys.stderr)
    return ["tiny"]


def main():
    options = settle(parser().parse_args())
    if options.side: return emit(**sample_side(options))
    models = options.models or default_models(options)
    commands = {f"{side}, {model}": side_command(__file__, options, side, models=[model])
                for model in models for side in SIDES}
    results = alternate(commands, options.rounds, env=dict.fromkeys(commands, device_environment(options)))
    rows = [row_of(options, results, model) for model in models]
    report("sampling", results, rows, commands=commands, device=options.device, folder=options.results)


if __name__ == "__main__": main()
