"""Quantised caches beside bfloat16: a step, four drafts and a chunk of a prompt over many keys, and what an append takes beside a memcpy.

    python bench/bench_quantized.py [--keys 65536] [--rounds N]

Sides alternate round by round, and figures are medians. Queries are bfloat16; heads are 32 over 8 of 128. Exit status 1 when a ratio is
above what is wanted.
"""

import argparse
import sys

import ml_dtypes
import numpy as np

import fastattn
from fastattn import _bench

HEADS, KV_HEADS, DIM = 32, 8, 128
KINDS = [("int8", False), ("int4", False), ("int8", True), ("int4", True)]
WANTED = {1: {"int8": 0.58, "int4": 0.36}, 4: {"int8": 0.65, "int4": 0.5}, 512: {"int8": 1.1, "int4": 1.1}}  # of bfloat16's time


def name_of(kind, rotate):
    return kind + (", rotated" if rotate else "")


def attending(rounds, keys, rng):
    """Ratios to bfloat16 by number of queries; True when all are as wanted."""
    k, v = (rng.standard_normal((1, KV_HEADS, keys, DIM), np.float32) for _ in range(2))
    caches = {}
    for kind, rotate in [("bfloat16", False), *KINDS]:
        caches[kind, rotate] = fastattn.KVCache(1, KV_HEADS, keys, DIM, dtype=kind, rotate=rotate)
        caches[kind, rotate].append(k, v)
    reached = True
    print(f"{'queries':>8} {'cache':15} {'ms':>9} {'of bfloat16':>12} {'wanted':>7}")
    for rows, wanted in WANTED.items():
        q = rng.standard_normal((1, HEADS, rows, DIM), np.float32).astype(ml_dtypes.bfloat16)
        seconds = _bench.medians(*(lambda cache=cache: cache.attend(q) for cache in caches.values()), rounds=rounds)  # noqa: B023
        for (kind, rotate), own in zip(caches, seconds):
            ratio, limit = own / seconds[0], None if rotate else wanted.get(kind)
            reached &= limit is None or ratio <= limit
            print(f"{rows:8} {name_of(kind, rotate):15} {1e3 * own:9.3f} {ratio:12.2f} {limit or '':>7}")
    return reached


def appending(rounds, rng):
    """A prompt of 4096 tokens into a cache, beside copying its float32."""
    k = rng.standard_normal((1, KV_HEADS, 4096, DIM), np.float32)
    copies = np.empty_like(k), np.empty_like(k)
    caches = {(kind, rotate): fastattn.KVCache(1, KV_HEADS, 4096, DIM, dtype=kind, rotate=rotate) for kind, rotate in KINDS}

    def refill(cache):
        cache.truncate(0)
        cache.append(k, k)

    def copy():
        for each in copies:
            np.copyto(each, k)

    with fastattn.threads(1):  # as a memcpy has
        base, *seconds = _bench.medians(copy, *(lambda cache=cache: refill(cache) for cache in caches.values()), rounds=rounds)
    reached = True
    for (kind, rotate), own in zip(caches, seconds):
        wanted = 2.5 if rotate else 1.5
        reached &= own / base <= wanted
        print(f"append to {name_of(kind, rotate):15} {1e3 * own:8.3f} ms, {own / base:.2f} of a memcpy (wanted {wanted})")
    return reached


def main():
    """Run the program and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--keys", type=_bench.positive, default=65536)
    parser.add_argument("--rounds", type=_bench.positive, default=9)
    arguments = parser.parse_args()
    _bench.print_environment(_bench.environment(fastattn.get_num_threads()), [])
    rng = np.random.default_rng(0)
    reached = [attending(arguments.rounds, arguments.keys, rng), appending(arguments.rounds, rng)]
    return 0 if all(reached) else 1


if __name__ == "__main__":
    sys.exit(main())
