"""How near the roofline a call runs: its time over the least that memory and multipliers of this machine allow.

    python bench/roofline.py                              # float32 and bfloat16, 1 to 256 rows over 8192 keys
    python bench/roofline.py --dtype float32 --rows 1 4 16 --steps
    python bench/roofline.py --minimum                    # on a machine that others use too

The roofline of a call is the larger of

    its bytes / the read bandwidth:  K and V (of short sequences also q and the output), by the best of several plain reading
                                     loops over as many bytes, in the same run
    its flops / our own rate:        that of 1, 8/8, 2048, 2048, 128 in the same dtype, in the same run

Loops, calls and the square that gives the rate alternate, and medians are compared. The loops are in C, compiled here: a
compiler with OpenMP is needed. The exit status is 1 when a limit is missed.
"""

import argparse
import ctypes
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import fastattn
from fastattn import _bench

# Time over roofline, at most, by the number of rows over 8192 keys.
_LIMITS = {
    **dict.fromkeys((1, 2, 4), 1.25),
    **dict.fromkeys((8, 12), 1.4),
    **dict.fromkeys((16, 24, 32), 1.5),
    **dict.fromkeys((48, 64, 96), 1.35),
    128: 1.3,
    256: 1.15,
}
_STEP_LIMIT = 1.15  # from one number of rows to the next
_MASK_LIMIT = 1.15  # a call with an arbitrary mask over the same without
_MERGE_LIMIT = 1.2  # merging states over reading them and writing one
_CALL_LIMIT = 2e-6  # seconds of the smallest call, with any one keyword

_READERS = r"""
#include <stddef.h>
#include <stdint.h>
typedef uint64_t vector __attribute__((vector_size(64), aligned(8)));
enum { STREAMS = 4, LINES = 64 };

/* Reads `lines` cache lines, a share on each thread, and returns what keeps the compiler from leaving that out. */
#define READER(name, body)                                                      \
    uint64_t name(const vector *all, ptrdiff_t lines, int threads) {            \
        uint64_t found = 0;                                                     \
        _Pragma("omp parallel for num_threads(threads) reduction(^ : found)")   \
        for (int t = 0; t < threads; t++) {                                     \
            const vector *from = all + lines / threads * t;                     \
            const ptrdiff_t n = lines / threads;                                \
            vector sum[STREAMS] = {{0}};                                        \
            body                                                                \
            sum[0] ^= sum[1] ^ sum[2] ^ sum[3];                                 \
            for (int i = 0; i < 8; i++) found ^= sum[0][i];                     \
        }                                                                       \
        return found;                                                           \
    }

READER(forward, for (ptrdiff_t i = 0; i + STREAMS <= n; i += STREAMS)
    for (int s = 0; s < STREAMS; s++) sum[s] ^= from[i + s];)
READER(ahead, for (ptrdiff_t i = 0; i + STREAMS <= n; i += STREAMS)
    for (int s = 0; s < STREAMS; s++) {
        __builtin_prefetch((const void *)((uintptr_t)(from + i + s) + LINES * sizeof(vector)), 0, 2);
        sum[s] ^= from[i + s];
    })
READER(streams, for (ptrdiff_t i = 0; i < n / STREAMS; i++)
    for (int s = 0; s < STREAMS; s++) sum[s] ^= from[n / STREAMS * s + i];)

/* Reads `parts` arrays that lie one behind another and writes one. */
uint64_t combine(const vector *all, ptrdiff_t lines, int parts, vector *out, int threads) {
    _Pragma("omp parallel for num_threads(threads)")
    for (ptrdiff_t i = 0; i < lines; i++) {
        vector sum = all[i];
        for (int p = 1; p < parts; p++) sum ^= all[p * lines + i];
        out[i] = sum;
    }
    return 0;
}
"""
_READER_NAMES = ("forward", "ahead", "streams")


@dataclass(frozen=True)
class Call:
    """A call, the bytes and flops that its roofline is made of, and how many times that it may take."""

    name: str
    shape: tuple[int, int, int, int, int, int, int]  # B, Hq, Hkv, Lq, Lk, D, Dv
    limit: float | None
    dtype: str = "float32"
    all_bytes: bool = False  # q and the output count, too
    values_in_keys: bool = False  # the values are the first numbers of the keys

    @property
    def flops(self):
        batch, heads, _, q_len, kv_len, dim, v_dim = self.shape
        return 2 * batch * heads * q_len * kv_len * (dim + v_dim)

    @property
    def bytes(self):
        batch, heads, kv_heads, q_len, kv_len, dim, v_dim = self.shape
        numbers = kv_heads * kv_len * (dim if self.values_in_keys else dim + v_dim)
        if self.all_bytes:
            numbers += heads * q_len * (dim + v_dim)
        return batch * numbers * _bench._dtype(self.dtype).itemsize

    def inputs(self):
        """The arrays (q, k, v), K and V side by side in memory."""
        batch, heads, kv_heads, q_len, kv_len, dim, v_dim = self.shape
        rng, dtype = np.random.default_rng(0), _bench._dtype(self.dtype)
        q = rng.standard_normal((batch, heads, q_len, dim), np.float32).astype(dtype)
        k = rng.standard_normal((batch, kv_heads, kv_len, dim), np.float32).astype(dtype)
        if self.values_in_keys:
            return q, k, k[..., :v_dim]
        return q, k, rng.standard_normal((batch, kv_heads, kv_len, v_dim), np.float32).astype(dtype)

    def __str__(self):
        batch, heads, kv_heads, q_len, kv_len, dim, v_dim = self.shape
        return f"{batch}, {heads}/{kv_heads}, {q_len}, {kv_len}, {dim}" + (f" and {v_dim}" if v_dim != dim else "")


def square(dtype):
    """The call whose flops a second are our own rate."""
    return Call("square", (1, 8, 8, 2048, 2048, 128, 128), None, dtype)


def rows_over_keys(rows, dtype):
    """The table: `rows` queries over 8192 keys."""
    return Call(f"{rows} rows", (1, 8, 8, rows, 8192, 128, 128), _LIMITS.get(rows), dtype)


def others(dtype):
    """Latent attention, and short sequences."""
    yield Call("latent", (1, 128, 1, 1, 8192, 576, 512), 1.25, dtype, values_in_keys=True)
    if dtype == "float32":
        yield Call("short 24", (256, 12, 12, 24, 24, 64, 64), 2.5, dtype, all_bytes=True)
        yield Call("short 128", (64, 12, 12, 128, 128, 32, 32), 1.8, dtype, all_bytes=True)
        yield Call("short 16", (16, 12, 12, 16, 16, 128, 128), None, dtype, all_bytes=True)
        yield Call("short 8", (128, 12, 12, 8, 8, 32, 32), None, dtype, all_bytes=True)
        yield Call("short 4", (256, 12, 12, 4, 4, 32, 32), None, dtype, all_bytes=True)
        yield Call("keys of 77", (1, 16, 16, 1024, 77, 80, 80), None, dtype, all_bytes=True)


def compile_readers(folder):
    """The reading loops as functions of an array and a number of threads; and `combine` as one of parts, out and threads."""
    source, library = Path(folder, "readers.c"), Path(folder, "readers.so")
    source.write_text(_READERS)
    cc = shlex.split(os.environ.get("CC", "cc"))
    subprocess.run([*cc, "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", source, "-o", library], check=True)
    loaded = ctypes.CDLL(str(library))

    def reader(name):
        function = getattr(loaded, name)
        function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int], ctypes.c_uint64
        return lambda memory, threads: function(memory.ctypes.data, memory.nbytes // 64, threads)

    loaded.combine.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_int]

    def combine(parts, out, threads):
        loaded.combine(parts.ctypes.data, out.nbytes // 64, len(parts), out.ctypes.data, threads)

    return {name: reader(name) for name in _READER_NAMES}, combine


def measure(call, readers, args):
    """Seconds of the call, its roofline in seconds, and what the roofline is made of."""
    q, k, v = call.inputs()
    memory = np.ones(-(-call.bytes // 8), np.int64)
    base = square(call.dtype)
    base_inputs = base.inputs()
    sides = [
        lambda: fastattn.attention(q, k, v),
        lambda: fastattn.attention(*base_inputs),
        *(lambda read=read: read(memory, args.threads) for read in readers.values()),
    ]
    for side in sides:
        side()
    seconds = _bench.alternate(sides, rounds=args.rounds, min_time=args.min_time)
    taken, of_square, *of_readers = map(min if args.minimum else statistics.median, seconds)
    bandwidth, rate = call.bytes / min(of_readers), base.flops / of_square
    return taken, max(call.bytes / bandwidth, call.flops / rate), bandwidth, rate


def report(call, readers, args):
    """A row of the table, whether the limit was missed, and seconds of the call."""
    taken, roofline, bandwidth, rate = measure(call, readers, args)
    ratio, missed = taken / roofline, call.limit is not None and taken > call.limit * roofline
    row = [
        *(call.name, call.dtype, str(call)),
        *(f"{taken * 1e3:.3f}", f"{roofline * 1e3:.3f}", f"{bandwidth / 1e9:.1f}", f"{rate / 1e9:.0f}"),
        *(f"{ratio:.2f}", f"{call.limit:.2f}" if call.limit else "-", ("missed" if missed else "met") if call.limit else "-"),
    ]
    return row, missed, taken


def report_mask(args):
    """Decoding with an arbitrary boolean mask beside the same call without one."""
    q, k, v = Call("", (1, 32, 8, 32, 8192, 128, 128), None).inputs()
    mask = np.random.default_rng(1).random((1, 1, 32, 8192)) < 0.75
    sides = [lambda: fastattn.attention(q, k, v), lambda: fastattn.attention(q, k, v, mask=mask)]
    seconds = _bench.alternate(sides, rounds=args.rounds, min_time=args.min_time)
    without, with_mask = map(min if args.minimum else statistics.median, seconds)
    ratio = with_mask / without
    print(f"\n1, 32/8, 32, 8192, 128 with a mask over without: {ratio:.2f} (limit {_MASK_LIMIT})")
    return ratio > _MASK_LIMIT


def report_merge(combine, args):
    """Merging states beside a plain loop that reads as many bytes and writes as many; both sides write to new memory."""
    verdicts = [
        _report_merge(combine, args, parts, rows, dtype)
        for dtype in args.dtype
        for parts, rows in ((2, 16384), (8, 4096), (2, 262144))
    ]
    return any(verdicts)


def _report_merge(combine, args, parts, rows, dtype):
    outs = np.random.default_rng(0).standard_normal((parts, rows, 128), np.float32).astype(_bench._dtype(dtype))
    lses = np.random.default_rng(1).standard_normal((parts, rows), np.float32)
    sides = [lambda: fastattn.merge_states(outs, lses), lambda: combine(outs, np.empty_like(outs[0]), args.threads)]
    for side in sides:
        side()
    seconds = _bench.alternate(sides, rounds=args.rounds, min_time=args.min_time)
    merge, plain = map(min if args.minimum else statistics.median, seconds)
    size = (outs.nbytes + outs[0].nbytes) / 2**20
    print(f"merge_states, {parts} x {rows} x 128 {dtype}, {size:.0f} MiB read and written: ", end="")
    print(f"{merge * 1e3:.2f} ms, plain loop {plain * 1e3:.2f}, ratio {merge / plain:.2f} (limit {_MERGE_LIMIT})")
    return merge > _MERGE_LIMIT * plain


def report_calls(args):
    """The smallest call, plain and with each keyword."""
    q, k, v = Call("", (1, 1, 1, 1, 16, 64, 64), None).inputs()
    keywords = {
        "plain": {},
        "out": {"out": np.empty_like(q)},
        "kv_lengths": {"kv_lengths": np.array([12])},
        "query_offset": {"query_offset": 3},
        "mask": {"mask": np.ones((1, 16), bool)},
        "sinks": {"sinks": np.zeros(1, np.float32)},
        "window": {"window": (8, 0)},
        "softcap": {"softcap": 30.0},
        "alibi_slopes": {"alibi_slopes": np.ones(1, np.float32)},
        "return_lse": {"return_lse": True},
    }
    sides = [lambda kw=kw: fastattn.attention(q, k, v, **kw) for kw in keywords.values()]
    seconds = _bench.alternate(sides, rounds=args.rounds, min_time=args.min_time)
    taken = [min(of) if args.minimum else statistics.median(of) for of in seconds]
    print("\n1, 1/1, 1, 16, 64, microseconds: ", end="")
    print(", ".join(f"{name} {x * 1e6:.2f}" for name, x in zip(keywords, taken)), f"(limit {_CALL_LIMIT * 1e6:g})")
    return max(taken) > _CALL_LIMIT


def main():
    args = _parser().parse_args()
    header = ["call", "dtype", "B, Hq/Hkv, Lq, Lk, D", "ms", "roofline", "GB/s", "GF/s", "ratio", "limit", "verdict"]
    table, missed, steps = [], False, []
    with tempfile.TemporaryDirectory() as folder, _bench.same_threads(args.threads):
        readers, combine = compile_readers(folder)
        for dtype in args.dtype:
            before = None
            for rows in range(args.rows[0], args.rows[-1] + 1) if args.steps else args.rows:
                row, beyond, taken = report(rows_over_keys(rows, dtype), readers, args)
                table.append(row)
                missed |= beyond
                if args.steps and before and taken > _STEP_LIMIT * before:
                    steps.append(f"{dtype}: {rows} rows take {taken / before:.2f} x the time of {rows - 1}")
                before = taken
            for call in others(dtype) if args.others else ():
                row, beyond, _ = report(call, readers, args)
                table.append(row)
                missed |= beyond
        about = _bench.environment(args.threads)
        print(*(f"{name}: {value}" for name, value in about.items()), "", sep="\n")
        _bench.print_table(header, table)
        if args.others:
            missed |= report_mask(args)
            missed |= report_merge(combine, args)
            missed |= report_calls(args)
    print(*steps, sep="\n")
    return int(missed or bool(steps))


def _parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dtype", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16", "float16"), help="storage"
    )
    parser.add_argument("--rows", type=_bench.positive, nargs="+", default=list(_LIMITS), metavar="N", help="queries")
    parser.add_argument("--steps", action="store_true", help="every number of rows from the first to the last given")
    parser.add_argument("--rows-only", dest="others", action="store_false", help="only the rows over 8192 keys")
    parser.add_argument("--threads", type=_bench.positive, default=fastattn.get_num_threads(), metavar="N")
    parser.add_argument("--rounds", type=_bench.positive, default=15, metavar="N")
    parser.add_argument("--min-time", type=float, default=0.005, metavar="S", help="seconds of calls in each round")
    parser.add_argument("--minimum", action="store_true", help="compare minima, not medians")
    return parser


if __name__ == "__main__":
    sys.exit(main())
