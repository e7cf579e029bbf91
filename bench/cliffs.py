"""Where a small change of the input once cost much: what is wanted and what is seen.

    python bench/cliffs.py                       # the judge: exit status 1 when a limit is exceeded
    python bench/cliffs.py --only mask --rounds 31

Each line is a ratio of two calls that alternate in one process (`fastattn._bench`), medians over medians: the call at the cliff over the
one beside it, or ours over PyTorch's, where that is installed.
"""

import argparse
import importlib.util
import statistics
import sys

import numpy as np
import peers

import fastattn
from fastattn import _bench


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def calling(*arrays, **keywords):
    return lambda: fastattn.attention(*arrays, **keywords)


def side_by_side(array):
    """The same numbers in (batch, length, heads, dim) memory."""
    return np.ascontiguousarray(array.swapaxes(1, 2)).swapaxes(1, 2)


def strides():
    """Decoding over keys whose rows are a power of two apart."""
    for heads, dim in ((32, 64), (8, 128)):
        q, k, v = normal(1, heads, 1, dim), normal(1, heads, 1024, dim), normal(1, heads, 1024, dim)
        name = f"decoding, {heads} heads of {dim}, rows {heads * dim * 4} bytes apart"
        yield name, 1.15, calling(q, side_by_side(k), side_by_side(v)), calling(q, k, v)


def mask():
    """Masks that do not lie key by key, and one of doubles."""
    q, k, v = (normal(1, 8, 1024, 64) for _ in range(3))
    shown = np.random.default_rng(0).random((1024, 1024)) < 0.8
    apart = np.zeros((1024, 2048), bool)
    apart[:, ::2] = shown
    masks = {
        "transposed": np.asfortranarray(shown),
        "stride 0": np.broadcast_to(shown[:, :1] | True, shown.shape),
        "every second element": apart[:, ::2],
        "float64": np.where(shown, 0.0, -1.0),
    }
    for name, array in masks.items():
        yield f"mask, {name}", 1.2, calling(q, k, v, mask=array), calling(q, k, v)


def mass():
    """The mass on many segments, against attention without values."""
    q, k = normal(1, 8, 256, 64), normal(1, 8, 16384, 64)
    nothing = np.empty((1, 8, 16384, 0), np.float32)
    for segments in (64, 16384):
        of_key = np.arange(16384) * segments // 16384

        def call(of_key=of_key):
            return fastattn.attention_mass(q, k, of_key)

        yield f"attention_mass, {segments} segments", 1.3, call, calling(q, k, nothing)


def rows():
    """One row more than a vector of rows."""
    k, v = normal(1, 8, 8192, 128), normal(1, 8, 8192, 128)
    for count in (4, 8, 12, 16, 24, 32, 64):
        more, fewer = normal(1, 8, count + 1, 128), normal(1, 8, count, 128)
        yield f"{count + 1} rows instead of {count}", 1.15, calling(more, k, v), calling(fewer, k, v)


def tiny():
    """Calls of little work for an entry or a head, against PyTorch, on one thread."""
    if not importlib.util.find_spec("torch"):
        return
    for name, (batch, heads, q_len, k_len, dim) in {
        "10,000 entries of one token": (10000, 1, 1, 1, 64),
        "768 heads with one key": (1, 768, 1, 1, 64),
        "head size 1": (1, 8, 128, 128, 1),
        "head size 3": (1, 8, 128, 128, 3),
    }.items():
        q, k, v = normal(batch, heads, q_len, dim), normal(batch, heads, k_len, dim), normal(batch, heads, k_len, dim)
        case = _bench.Case(name, (batch, heads, heads, q_len, k_len, dim))
        yield name, 1.0, calling(q, k, v), peers.torch(case, q, k, v, None).call


CLIFFS = {cliff.__name__: cliff for cliff in (strides, mask, mass, rows, tiny)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CLIFFS, default=list(CLIFFS))
    parser.add_argument("--rounds", type=_bench.positive, default=15)
    args = parser.parse_args()
    missed = 0
    for name in args.only:
        with peers.same_threads(1 if name == "tiny" else fastattn.get_num_threads()):
            for what, wanted, first, second in CLIFFS[name]():
                seconds = _bench.alternate((first, second), rounds=args.rounds, min_time=0.01)
                seen = statistics.median(seconds[0]) / statistics.median(seconds[1])
                missed += seen > wanted
                print(f"{what:52} wanted {wanted:5.2f}  seen {seen:5.2f}{'  misses' if seen > wanted else ''}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
