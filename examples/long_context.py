"""A sequence of 131,072 tokens through block-sparse patterns on this machine.

    python examples/long_context.py                         # a table, and a picture in long_context.png
    python examples/long_context.py --length 32768 --dtype float32
    python examples/long_context.py --picture ""            # no picture; it needs matplotlib

The data is synthetic, and made so that there is something to find: the text goes through sections, each on one of some
topics, and queries look for keys of their own topic and for the first key. Window, stride and random blocks do not know
that; top-k finds out from pooled queries and keys.

Every pattern is causal. For a sample of rows the exact dense result is computed as well. It gives the error of the output,
relative to the size of the exact one, and, from the two logarithms of the softmax denominator, the share of the
attention mass that the pattern sees. The dense time is that of the sample, multiplied up. The memory is the peak above
inputs and output, the building of the mask included.

Then one more token is decoded: its query attends to all of the sequence in caches of several dtypes, to the keys that an index selects,
and to the pages that promise most.
"""

import argparse
import contextlib
import importlib.util
import itertools
import statistics
import time

import numpy as np

import fastattn
from fastattn import BlockMask

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
SECTION = 512
TOPICS = 48
SAMPLES, SAMPLE_ROWS = 8, 64
PAGE, PAGES, CHOSEN = 64, 32, 2048  # tokens of a page, pages that are read, keys that are chosen
CACHES = [("float32", False), ("bfloat16", False), ("int8", False), ("int4", False), ("int4", True)]
STEPS = 9


def make_inputs(length, dtype):
    """``(q, k, v)``: noise, plus the direction of the section's topic; the first key suits all topics."""
    rng = np.random.default_rng(0)
    topics = rng.standard_normal((TOPICS, HEAD_DIM)).astype(np.float32)
    topics *= np.sqrt(HEAD_DIM) / np.linalg.norm(topics, axis=1, keepdims=True)
    topic = rng.integers(0, TOPICS, -(-length // SECTION)).repeat(SECTION)[:length]
    q, k, v = (np.empty((1, heads, length, HEAD_DIM), dtype) for heads in (HEADS, KV_HEADS, KV_HEADS))
    for array, strength in ((q, 1.0), (k, 1.0), (v, 0.3)):
        for head in array[0]:
            noise = rng.standard_normal((length, HEAD_DIM), np.float32)
            head[...] = (strength * topics[topic] + noise).astype(dtype)
    k[:, :, 0] = topics.mean(axis=0) * 3
    return q, k, v


def patterns(q, k):
    """The name of each pattern, and how to build it."""
    n = q.shape[2]
    return {
        "window 1024": lambda: BlockMask.sliding_window(n, window=(1023, 0), block_size=128),
        "strided 1024": lambda: BlockMask.strided(n, stride=1024, block_size=64),
        "bigbird": lambda: BlockMask.bigbird(
            n, window_blocks=3, global_blocks=1, random_blocks=8, heads=HEADS, block_size=128, causal=True
        ),
        "top-k 48": lambda: BlockMask.top_k(q, k, 48, block_size=128, causal=True, per_kv_head=True),
        "top-k 90 %": lambda: BlockMask.top_k(q, k, mass=0.9, block_size=128, causal=True, per_kv_head=True),
    }


class PeakMemory:
    """The bytes by which this process's peak of memory rises in a ``with`` block; None where Linux does not tell."""

    def __enter__(self):
        self.extra = None
        with contextlib.suppress(OSError):
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # the peak starts again from here
            self._before = self._status("VmRSS")
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError, AttributeError):
            self.extra = self._status("VmHWM") - self._before

    @staticmethod
    def _status(field):
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def dense_sample(q, k, v):
    """Some runs of rows with their exact ``(out, lse)``, and the time that the dense call would take for all rows."""
    length = q.shape[2]
    starts = np.linspace(0, length - SAMPLE_ROWS, SAMPLES).astype(int)
    fastattn.attention(q[:, :, :SAMPLE_ROWS], k, v)  # wakes the threads
    begin = time.perf_counter()
    exact = [
        fastattn.attention(q[:, :, i : i + SAMPLE_ROWS], k, v, causal=True, query_offset=int(i), return_lse=True)
        for i in starts
    ]
    seconds = (time.perf_counter() - begin) * length / (SAMPLES * SAMPLE_ROWS)
    return starts, exact, seconds


def compare(out, lse, starts, exact):
    """``(share of the mass that is seen, relative error)`` over the sampled rows."""
    shares, error, size = [], 0.0, 0.0
    for start, (exact_out, exact_lse) in zip(starts, exact):
        rows = slice(start, start + SAMPLE_ROWS)
        shares.append(np.exp(lse[:, :, rows] - exact_lse).mean())
        exact_out = exact_out.astype(np.float64)
        error += ((out[:, :, rows] - exact_out) ** 2).sum()
        size += (exact_out**2).sum()
    return np.mean(shares), np.sqrt(error / size)


def measure(name, build, q, k, v, sample):
    """Build one pattern, attend through it, compare: a dictionary."""
    out = np.empty_like(q)
    out[...] = 0  # the output is not extra memory
    with PeakMemory() as peak:
        begin = time.perf_counter()
        mask = build()
        built = time.perf_counter() - begin
        begin = time.perf_counter()
        _, lse = fastattn.attention(q, k, v, mask=mask, return_lse=True, out=out)
        seconds = time.perf_counter() - begin
    share, error = compare(out, lse, *sample)
    return dict(name=name, mask=mask, built=built, seconds=seconds, peak=peak.extra, share=share, error=error)


def decode(q, k, v):
    """A step of decoding over caches of each dtype and over few keys: dictionaries. Errors are relative to the exact output."""
    query = q[:, :, -1:]
    exact = fastattn.attention(*(x.astype(np.float32) for x in (query, k, v)))
    everything = fastattn.attention(query, k, v, return_lse=True)[1]
    results = []
    for name, attend, nbytes in itertools.chain(all_keys(query, k, v), few_keys(query, k, v)):
        taken = []
        for _ in range(STEPS):
            begin = time.perf_counter()
            out, lse = attend()
            taken.append(time.perf_counter() - begin)
        error = np.linalg.norm(out.astype(np.float32) - exact) / np.linalg.norm(exact)
        share = 1.0 if lse is None else np.exp(lse - everything).mean()
        results.append(dict(name=name, seconds=statistics.median(taken), nbytes=nbytes, error=error, share=share))
    return results


def all_keys(query, k, v):
    """Caches of each dtype: their names, functions that give ``(out, None)``, and their bytes; one cache at a time."""
    for dtype, rotate in CACHES:
        cache = fastattn.KVCache(1, KV_HEADS, k.shape[2], HEAD_DIM, dtype=dtype, rotate=rotate)
        cache.append(k, v)
        own = query if dtype in (query.dtype.name, "int8", "int4") else query.astype(np.float32)  # no narrower than what it meets
        yield dtype + (", rotated" if rotate else ""), lambda cache=cache, own=own: (cache.attend(own), None), cache.nbytes


def few_keys(query, k, v):
    """Ways of attending to a part of the keys: their names, functions that give ``(out, lse)``, and the bytes that are kept."""
    length = k.shape[2]
    chosen, pages = min(CHOSEN, length), min(PAGES, -(-length // PAGE))
    pool = fastattn.PagedKVCache(-(-length // PAGE), PAGE, KV_HEADS, HEAD_DIM, dtype=k.dtype, bounds=True)
    sequence = pool.new_sequence()
    pool.append([sequence], k[0].swapaxes(0, 1), v[0].swapaxes(0, 1))

    def of_index():
        lists = fastattn.select_keys(query, k, chosen, keep_first=1, keep_recent=1)
        return fastattn.attention_indexed(query, k, v, lists, return_lse=True)

    def of_pages():
        out, lse = pool.attend([sequence], query[0].swapaxes(0, 1), top_pages=pages, keep_first=1, return_lse=True)
        return out.swapaxes(0, 1)[None], lse[None]

    return (f"{chosen} of an index", of_index, k.nbytes + v.nbytes), (f"{pages} top pages", of_pages, pool.nbytes)


def print_decoding(results):
    """A step of decoding by the dtype of the cache."""
    print_rows(
        ["cache", "step/ms", "memory/MiB", "mass", "error"],
        [[x["name"], f"{1e3 * x['seconds']:.2f}", f"{x['nbytes'] / 2**20:.1f}", f"{x['share']:.1%}", f"{x['error']:.4f}"] for x in results],
    )


def print_table(results, dense_seconds):
    """The patterns and what they see."""
    header = ["pattern", "density", "mask/MiB", "build/s", "attend/s", "memory/MiB", "mass", "error"]
    rows = [
        [
            result["name"],
            f"{result['mask'].density:.2%}",
            f"{result['mask'].nbytes / 2**20:.1f}",
            f"{result['built']:.2f}",
            f"{result['seconds']:.2f}",
            "-" if result["peak"] is None else f"{result['peak'] / 2**20:.1f}",
            f"{result['share']:.1%}",
            f"{result['error']:.3f}",
        ]
        for result in results
    ]
    rows.append(["dense", "50.00%", "-", "-", f"{dense_seconds:.1f}", "-", "100.0%", "0.000"])
    print_rows(header, rows)


def print_rows(header, rows):
    """A table, with rich where it is installed."""
    if importlib.util.find_spec("rich"):
        from rich.box import SIMPLE
        from rich.console import Console
        from rich.table import Table

        table = Table(*header, box=SIMPLE)
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    for first, *others in [header, *rows]:
        print("  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]))


def save_picture(path, results, dense_seconds, steps):
    """The patterns, the mass they see against their time, and a step of decoding by the memory of its cache."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    figure, axes = plt.subplots(2, 4, figsize=(17, 8), layout="constrained")
    for ax, result in zip(axes.flat, results):
        result["mask"].plot(ax=ax)
        ax.locator_params(nbins=4)
        ax.set_title(f"{result['name']}: {result['seconds']:.2f} s, {result['share']:.0%} of the mass")
    ax = axes.flat[len(results)]
    for result in results:
        ax.plot(result["seconds"], result["share"], "o", label=result["name"])
    ax.plot(dense_seconds, 1, "k*", label="dense")
    ax.set(xscale="log", xlabel="seconds", ylabel="share of the attention mass", ylim=(0, 1.08))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.legend()
    ax = axes.flat[len(results) + 1]
    for step in steps:
        label = f"{step['name']}: {step['share']:.0%} of the mass, error {step['error']:.2%}"
        ax.plot(step["nbytes"] / 2**20, 1e3 * step["seconds"], "o", label=label)
    ax.set(xlabel="MiB of keys and values", ylabel="ms for a step of decoding", xlim=(0, None), ylim=(0, None))
    axes.flat[-1].legend(*ax.get_legend_handles_labels(), loc="center left")
    for ax in axes.flat[len(results) + 2 :]:
        ax.set_axis_off()
    figure.savefig(path, dpi=110)
    print(f"\npicture: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=131_072, help="tokens")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16")
    parser.add_argument("--picture", default="long_context.png", metavar="FILE", help="where to save the picture")
    args = parser.parse_args()
    if args.length < SAMPLE_ROWS:
        parser.error(f"--length must be at least {SAMPLE_ROWS}")
    if args.dtype == "bfloat16":
        import ml_dtypes

        dtype = np.dtype(ml_dtypes.bfloat16)
    else:
        dtype = np.dtype(args.dtype)

    heads = f"{HEADS} query and {KV_HEADS} kv heads of {HEAD_DIM}"
    print(f"{args.length:,} tokens, {heads}, {args.dtype}, {fastattn.get_num_threads()} threads\n")
    q, k, v = make_inputs(args.length, dtype)
    *sample, dense_seconds = dense_sample(q, k, v)
    results = []
    for name, build in patterns(q, k).items():
        print(f"{name} ...", flush=True)
        results.append(measure(name, build, q, k, v, sample))
    print()
    print_table(results, dense_seconds)
    steps = decode(q, k, v)
    print(f"\na step of decoding over {args.length:,} keys\n")
    print_decoding(steps)
    if args.picture and importlib.util.find_spec("matplotlib"):
        save_picture(args.picture, results, dense_seconds, steps)
    elif args.picture:
        print("\nno picture: matplotlib is not installed")


if __name__ == "__main__":
    main()
