"""What the way from text to the GPU costs: how fast is a text packed, what does a token take on the disk, how fast are
blocks read back in a random order, and what does that order take in memory? In CPU seconds, the least of --rounds, of
one process. nbs/tutorials/when_one_gpu_is_not_enough.md has its figures."""
import resource, tempfile, time
from pathlib import Path

import torch
from task import DATA, parser, settle

from colab_gpt2.model.loading import load_tokenizer
from colab_gpt2.text.token_store import tokenize_file


def least(rounds, function):
    "The fewest CPU seconds of so many calls, each with its number."
    def took(n):
        start = time.process_time()
        function(n)
        return time.process_time() - start
    return min(map(took, range(rounds)))


def order_bytes(blocks=5_000_000):
    "What torch's RandomSampler holds for each block of an epoch, in bytes: `randperm(n).tolist()`."
    def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    before, order = peak(), torch.randperm(blocks).tolist()
    return (peak() - before) / len(order)


def main():
    options = parser(__doc__, steps=1, rounds=5)
    options.set_defaults(text=DATA/"wikitext-2-articles"/"articles.unk.txt")
    options = settle(options.parse_args())
    tokenizer, text = load_tokenizer(options.tokenizer), Path(options.text)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        def pack(n):
            return tokenize_file(text, tokenizer, options.block_size, cache_dir=f"{folder}/{n}", progress=False)
        packed = least(options.rounds, pack)
        blocks = pack(0)
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(options.seed)).tolist()
        read = least(options.rounds, lambda n: [blocks[i] for i in order])
        size, tokens = blocks.path.stat().st_size, blocks.tokens
    held, megabytes = order_bytes(), text.stat().st_size / 1e6
    print(f"{megabytes:.1f} MB of text, {tokens:,} tokens")
    print(f"packing: {megabytes / packed:.1f} MB, {tokens / packed:,.0f} tokens a core and second")
    print(f"disk: {size / tokens:.2f} bytes a token")
    print(f"order of an epoch: {held:.0f} bytes a block")
    each = f"blocks of {options.block_size} tokens a core and second"
    print(f"reading, from the page cache: {len(order) / read:,.0f} {each}")


if __name__ == "__main__": main()
