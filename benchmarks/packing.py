"""How fast, and in how much memory, is a text tokenised and packed into blocks? Ours against what transformers'
run_clm does with datasets: map the tokenizer over the lines, then map group_texts, each in as many processes as there
are cores. The text is 10 MB that do not repeat. Times are from the text file to blocks on the disk, without imports.
Memory is that of all processes of a side together, sampled every 20 ms, ours for the text once and many times over;
with --gigabytes also that of a text of its lines in another order each time, over what the imports took."""
import itertools, os, random, sys, tempfile, time
from pathlib import Path

from harness import alternate, compare, emit, peak_bytes, report
from targets import target
from task import DATA, device_environment, parser, settle, side_command

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def pack_ours(options, tokenizer) -> int:
    from colab_gpt2.text.token_store import tokenize_file
    return len(tokenize_file(options.text, tokenizer, options.block_size, progress=False))


def pack_with_map(options, tokenizer) -> int:
    """As in transformers' examples/pytorch/language-modeling/run_clm.py: batches of 1,000 lines, whose rests are
    dropped."""
    from datasets import disable_progress_bars, load_dataset
    disable_progress_bars()

    def tokenize(batch): return tokenizer(batch["text"])

    def group_texts(batch):
        joined = {name: list(itertools.chain(*batch[name])) for name in batch}
        length = len(joined["input_ids"]) // options.block_size * options.block_size
        starts = range(0, length, options.block_size)
        blocks = {name: [ids[i:i + options.block_size] for i in starts] for name, ids in joined.items()}
        return {**blocks, "labels": blocks["input_ids"].copy()}

    lines = load_dataset("text", data_files=str(options.text), split="train", keep_linebreaks=True)
    tokens = lines.map(tokenize, batched=True, num_proc=CORES, remove_columns=["text"])
    return len(tokens.map(group_texts, batched=True, num_proc=CORES))


def pack_side(options) -> dict:
    "One side in this process: seconds and blocks."
    import colab_gpt2.text.token_store, datasets
    from colab_gpt2.model.loading import load_tokenizer
    tokenizer, pack = load_tokenizer(options.tokenizer), pack_with_map if options.side == "map" else pack_ours
    imported = peak_bytes()
    started = time.perf_counter()
    blocks = pack(options, tokenizer)
    return dict(pack_seconds=time.perf_counter() - started, blocks=blocks, imported_bytes=imported)


def repeated(text, times, folder) -> Path:
    "A file of `text` so many times over."
    path = Path(folder)/f"{times}-times.txt"
    path.write_bytes(Path(text).read_bytes() * times)
    return path


def shuffled(text, gigabytes, folder) -> Path:
    "A file of so many gigabytes of the lines of `text`, in another order each time."
    lines, chance, path = Path(text).read_bytes().splitlines(True), random.Random(0), Path(folder)/"shuffled.txt"
    with open(path, "wb") as f:
        while f.tell() < gigabytes * 1e9:
            chance.shuffle(lines)
            f.writelines(lines)
    return path


def rows_of(options, results) -> list:
    def speed(run): return run["blocks"] / run["pack_seconds"]
    goal = target("packing, blocks/s", "map") if options.times == 1 else None
    how_often = "once" if options.times == 1 else f"{options.times} times"
    once = f"peak memory of packing, {2 * options.times} times the text against once"
    return [compare(f"packing the text {how_often}, blocks/s", results, speed, "map", target=goal),
            compare(once, results, "tree_peak_bytes", "ours, x1", "ours, many",
                    target=target("peak memory of packing", "ours, x1")),
            compare("peak memory of packing", results, "tree_peak_bytes", "map"), *large_row(options, results)]


def large_row(options, results) -> list:
    if not options.gigabytes: return []
    figure = f"peak memory of packing {options.gigabytes:g} GB, over the imports"
    runs = results["ours, large"]
    taken = {"ours": [dict(bytes=run["tree_peak_bytes"] - run["imported_bytes"]) for run in runs],
             "500 MB": [dict(bytes=5e8)] * len(runs)}
    return [compare(figure, taken, "bytes", "500 MB", target=target(figure, "500 MB"))]


def main():
    options = parser(__doc__, steps=1, rounds=5)
    options.set_defaults(text=DATA/"wikitext-2-articles"/"articles.unk.txt")
    options.add_argument("--times", type=int, default=1,
                         help="the text so many times over for the speed, and twice as many for the memory")
    options.add_argument("--gigabytes", type=float, default=0, help="also pack so much text, for the memory")
    options = settle(options.parse_args())
    if options.side: return emit(**pack_side(options))
    if str(options.text) == "python-docs": raise SystemExit("Packing reads a file: give --text a path.")
    times = {"ours": options.times, "map": options.times, "ours, x1": 1, "ours, many": 2 * options.times}
    with tempfile.TemporaryDirectory() as folder:
        texts = {label: repeated(options.text, n, folder) for label, n in times.items()}
        if options.gigabytes: texts["ours, large"] = shuffled(options.text, options.gigabytes, folder)
        commands = {label: side_command(__file__, options, label.split(",")[0], text=path)
                    for label, path in texts.items()}
        env = dict.fromkeys(commands, device_environment(options))
        results = alternate(commands, options.rounds, env=env, tree=True)
    report("packing", results, rows_of(options, results), commands=commands, device=options.device,
           folder=options.results, processes=CORES)


if __name__ == "__main__": main()
