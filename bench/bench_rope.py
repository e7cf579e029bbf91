"""Rotary embedding: its time against that of copying its input, and against PyTorch's usual lines.

    python bench/bench_rope.py                              # the judge: exit status 1 when a limit is exceeded
    python bench/bench_rope.py --dtype bfloat16 --rounds 31

All sides write to memory that they are given, on as many threads, in turn in one process (`fastattn._bench`); medians are compared. The
copy is torch's, which shares it among threads; without torch it is NumPy's, on one. Wanted: at most 1.3 times the copy and, against
torch's lines, a third of their time. Small inputs take less time than a call through Python does and are only shown.
"""

import argparse
import importlib.util
import statistics
import sys

import numpy as np
import peers

import fastattn
from fastattn import _bench

MOST_OF_A_COPY, LEAST_OF_TORCH = 1.3, 3.0
SMALL = 1 << 20  # bytes of x
SHAPES = {
    "decode": (1, 32, 1, 128),
    "decode, 8 entries": (8, 32, 1, 128),
    "encoder": (8, 12, 384, 64),
    "prefill": (1, 32, 2048, 128),
    "long": (1, 8, 16384, 128),
    "80 numbers": (2, 32, 1500, 80),
}
LAYOUTS = ("heads apart", "heads side by side")


def inputs(shape, dtype, layout):
    """x and an out, in the layout, and the tables."""
    batch, heads, length, dim = shape
    rng = np.random.default_rng(0)
    lie = shape if layout == "heads apart" else (batch, length, heads, dim)
    x, out = (rng.standard_normal(lie, np.float32).astype(_bench._dtype(dtype)) for _ in range(2))
    if layout != "heads apart":
        x, out = x.swapaxes(1, 2), out.swapaxes(1, 2)
    return x, out, *fastattn.rope_table(length, dim)


def torch_lines(x, cos, sin, interleaved):
    """What model code writes, in the dtype of x."""
    import torch

    x, cos, sin = (peers.tensor(array) for array in (x, cos, sin))
    if interleaved:
        cos, sin = cos.repeat_interleave(2, -1).to(x.dtype), sin.repeat_interleave(2, -1).to(x.dtype)

        def turn():
            return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin
    else:
        cos, sin = torch.cat((cos, cos), -1).to(x.dtype), torch.cat((sin, sin), -1).to(x.dtype)
        half = x.shape[-1] // 2

        def turn():
            return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin

    return turn


def sides(x, out, cos, sin, interleaved):
    """Name and call of each: ours, ours in place, a copy, and torch's lines."""
    yield "rope", lambda: fastattn.apply_rope(x, cos, sin, interleaved=interleaved, out=out)
    again = out.copy(order="K")
    yield "in place", lambda: fastattn.apply_rope(again, cos, sin, interleaved=interleaved, out=again)
    if importlib.util.find_spec("torch"):
        target, source = peers.tensor(out), peers.tensor(x)
        yield "copy", lambda: target.copy_(source)
        yield "torch", torch_lines(x, cos, sin, interleaved)
    else:
        yield "copy", lambda: np.copyto(out, x)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=_bench.positive, default=fastattn.get_num_threads())
    parser.add_argument("--rounds", type=_bench.positive, default=15)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    args = parser.parse_args()
    todo = [
        (name, layout, dtype, interleaved)
        for name in args.shape
        for layout in LAYOUTS
        for dtype in args.dtype
        for interleaved in (False, True)
    ]
    rows, slow = [], 0
    with peers.same_threads(args.threads), _bench.Progress(len(todo)) as progress:
        for name, layout, dtype, interleaved in todo:
            progress.step(f"{name}, {layout}, {dtype}")
            arrays = inputs(SHAPES[name], dtype, layout)
            names, calls = zip(*sides(*arrays, interleaved))
            times = _bench.alternate(calls, rounds=args.rounds, min_time=0.01)
            seconds = {side: statistics.median(taken) for side, taken in zip(names, times)}
            of_copy, of_torch = seconds["rope"] / seconds["copy"], seconds.get("torch", np.nan) / seconds["rope"]
            judged = arrays[0].nbytes >= SMALL
            missed = judged and (of_copy > MOST_OF_A_COPY or of_torch < LEAST_OF_TORCH)
            slow += missed
            rows.append(
                [f"{name} {SHAPES[name]}", layout, dtype, "interleaved" if interleaved else "halves"]
                + [f"{seconds[side] * 1e6:.1f} us" if side in seconds else "-" for side in ("rope", "in place", "copy", "torch")]
                + [f"{of_copy:.2f} x", f"{of_torch:.1f} x", "slow" if missed else "pass" if judged else "small"]
            )
    _bench.print_environment({**_bench.environment(args.threads), **peers.versions()}, [])
    print(f"wanted: at most {MOST_OF_A_COPY} x the copy, at least {LEAST_OF_TORCH} x torch's speed\n")
    _bench.print_table(["x", "layout", "dtype", "pairs", "rope", "in place", "copy", "torch", "of copy", "torch / rope", ""], rows)
    return slow > 0


if __name__ == "__main__":
    sys.exit(main())
