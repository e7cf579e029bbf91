"""Chosen keys: attention over lists, the selection that makes them, and pages by bounds, each beside what it is measured by.

    python bench/bench_chosen.py [--rounds N] [--keys N]

Sides alternate round by round, and figures are medians. *Wanted* is what a line has to reach; the exit status is 1 when one does not. The
roofline of a selection is the larger of two times: to read its keys, as fast as a sum over as many bytes does in the same rounds, and to
multiply them, at the rate that attention of 2048 queries and keys has there.
"""

import argparse
import itertools
import sys
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np

import fastattn
from fastattn import _bench

BFLOAT16 = ml_dtypes.bfloat16
HEADS, KV_HEADS, DIM, CHOSEN, PAGE = 32, 8, 128, 2048, 64
LISTS = 16  # whose keys and values are more than caches hold


def line(what, seconds, beside, ratio, wanted, most=True):
    """Print a line; whether it is what it should be, if it is to be anything."""
    fits = wanted is None or (ratio <= wanted if most else ratio >= wanted)
    limit = "" if wanted is None else f" ({'at most' if most else 'at least'} {wanted})"
    print(f"{what:62} {1e3 * seconds:8.3f} ms  beside {1e3 * beside:8.3f}: {ratio:6.2f}{limit}{'' if fits else '  MISSED'}")
    return fits


def lists(arguments, rng, new):
    """One query over lists, beside attention to as many keys side by side, which are the same each time and stay in the caches.

    Last, and without a limit, other lists and other keys each time, which memory has to bring: rows apart take as long there if they are
    only read.
    """
    q, few_k, few_v = new(1, HEADS, 1, DIM), new(1, KV_HEADS, CHOSEN, DIM), new(1, KV_HEADS, CHOSEN, DIM)
    k, v = new(1, KV_HEADS, arguments.keys, DIM), new(1, KV_HEADS, arguments.keys, DIM)
    parts = max(1, arguments.keys // CHOSEN)
    slices = itertools.cycle(slice(n * CHOSEN, (n + 1) * CHOSEN) for n in range(parts))
    some = [
        np.stack([np.sort(rng.permutation(arguments.keys)[:CHOSEN]) for _ in range(KV_HEADS)])[None, :, None].astype(np.int32)
        for _ in range(min(parts, LISTS))
    ]
    own, others = some[0], itertools.cycle(some)

    def following():
        keys = next(slices)
        return fastattn.attention(q, k[:, :, keys], v[:, :, keys])

    dense, of_heads, shared, unsorted, next_keys, next_list = _bench.medians(
        lambda: fastattn.attention(q, few_k, few_v),
        lambda: fastattn.attention_indexed(q, k, v, own),
        lambda: fastattn.attention_indexed(q, k, v, own[:, :1]),
        lambda: fastattn.attention_indexed(q, k, v, own[..., ::-1]),
        following,
        lambda: fastattn.attention_indexed(q, k, v, next(others)),
        rounds=arguments.rounds,
    )
    what = f"{CHOSEN} of {arguments.keys}"
    names = "a list for each kv head", "one list for all", "in falling order"
    fits = [line(f"{what}: {n}", x, dense, x / dense, 1.4) for n, x in zip(names, (of_heads, shared, unsorted))]
    line(f"{what}: another list each time, other keys", next_list, next_keys, next_list / next_keys, None)
    return all(fits)


def selection(arguments, rng, new):
    """The best keys of one query: many index heads over one head of keys, and the heads of one group."""
    k, square = new(1, 1, arguments.keys, DIM), new(1, 8, 2048, DIM)
    threads, fits = fastattn.get_num_threads(), []
    with ThreadPoolExecutor(threads) as pool:
        read_keys = _bench.reader(k, threads, pool)
        for heads in (64, HEADS // KV_HEADS):
            q = new(1, heads, 1, DIM)
            found, read, multiply = _bench.medians(
                lambda: fastattn.select_keys(q, k, CHOSEN),  # noqa: B023
                read_keys,
                lambda: fastattn.attention(square, square, square),
                rounds=arguments.rounds,
            )
            roofline = max(read, multiply * heads * arguments.keys / (2 * 8 * 2048 * 2048))
            fits.append(line(f"select {CHOSEN} of {arguments.keys}: {heads} heads of {DIM}", found, roofline, found / roofline, 1.5))
    return all(fits)


def pages(arguments, rng, new):
    """The best pages beside all of them."""
    pool = fastattn.PagedKVCache(arguments.keys // PAGE, PAGE, KV_HEADS, DIM, bounds=True)
    sequence = pool.new_sequence()
    for _ in range(0, arguments.keys, 8192):
        pool.append([sequence], new(8192, KV_HEADS, DIM), new(8192, KV_HEADS, DIM))
    q = new(1, HEADS, DIM)
    dense, top = _bench.medians(
        lambda: pool.attend([sequence], q), lambda: pool.attend([sequence], q, top_pages=64), rounds=arguments.rounds
    )
    return line(f"the top 64 of {arguments.keys // PAGE} pages of {PAGE}", top, dense, dense / top, 12, most=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=_bench.positive, default=9)
    parser.add_argument("--keys", type=_bench.positive, default=131072)
    arguments = parser.parse_args()
    _bench.print_environment(_bench.environment(fastattn.get_num_threads()), [])
    rng = np.random.default_rng(0)

    def new(*shape):
        return rng.standard_normal(shape, np.float32).astype(BFLOAT16)

    print(f"bfloat16, {HEADS}/{KV_HEADS} heads of {DIM}, one query")
    fits = [part(arguments, rng, new) for part in (lists, selection, pages)]
    return 0 if all(fits) else 1


if __name__ == "__main__":
    sys.exit(main())
