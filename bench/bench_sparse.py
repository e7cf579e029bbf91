"""Block-sparse attention: time against density, against the built-in masks and against PyTorch; and its memory.

    python bench/bench_sparse.py                       # the judge: exit status 1 when a limit is exceeded
    python bench/bench_sparse.py --only density --dtype float32
    python bench/bench_sparse.py --flex                # also torch's flex_attention, which needs a C++ compiler
    pytest bench/bench_sparse.py                       # times under pytest-benchmark, one group for each shape

The judge alternates both sides in one process and compares medians, as `fastattn._bench` describes. A pattern of random
whole blocks must not take much more than its density's share of the dense call, whose overhead it has as well:

    time <= slack * density * dense time + 3 % of dense time,    slack = 1.15, for blocks of 32 1.4
"""

import argparse
import functools
import importlib.util
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import peers
import pytest

import fastattn
from fastattn import BlockMask, _bench

LENGTH = 8192
HEADS = 2
DENSITIES = (0.5, 0.25, 0.1, 0.03)
PEER_DENSITIES = (0.9, 0.5, 0.1)
BLOCK_SIZES = (32, 64, 128)
HEAD_DIMS = (64, 128)
DTYPES = ("float32", "bfloat16")

_MEMORY_LIMIT = 128 << 20


@dataclass(frozen=True)
class Trial:
    """A call and what it is measured against; `limit` is the largest allowed ratio of their times."""

    name: str
    dtype: str
    head_dim: int
    mask: BlockMask
    call: Callable
    against: str
    reference: Callable
    limit: float

    def row(self, seconds):
        ours, theirs = (statistics.median(seconds[call]) for call in (self.call, self.reference))
        ratios = np.divide(seconds[self.call], seconds[self.reference])
        return [
            *(self.name, self.dtype, str(self.head_dim), str(self.mask.block_size), f"{self.mask.density:.3f}"),
            *(self.against, f"{ours * 1e3:.1f} ms", f"{theirs * 1e3:.1f} ms", f"{ours / theirs:.3f}"),
            "{:.3f}-{:.3f}".format(*np.quantile(ratios, (0.25, 0.75))),
            *(f"{self.limit:.3f}", "pass" if ours / theirs <= self.limit else "slow"),
        ]


_HEADER = [
    *("case", "dtype", "D", "block", "density", "against", "ours", "theirs", "ratio", "quartiles", "limit", "verdict"),
]


def case(dtype, head_dim):
    """The dense call."""
    return _bench.Case("sparse", (1, HEADS, HEADS, LENGTH, LENGTH, head_dim), dtype)


def inputs(dtype, head_dim):
    """``(q, k, v)``."""
    return case(dtype, head_dim).inputs()[:3]


def random_blocks(block_size, density):
    """As many random blocks in each block row, all of them whole."""
    n = LENGTH // block_size
    rng = np.random.default_rng(0)
    count = max(1, round(density * n))
    rows = np.sort(rng.permuted(np.tile(np.arange(n), (n, 1)), axis=1)[:, :count], axis=1)
    return BlockMask(block_size, np.arange(n + 1) * count, rows.reshape(-1), (LENGTH, LENGTH))


def sparse(arrays, mask):
    """A call through the mask."""
    return lambda: fastattn.attention(*arrays, mask=mask)


def density_trials(dtype, head_dim, block_size):
    """Random blocks against the dense call."""
    arrays = inputs(dtype, head_dim)
    slack = 1.4 if block_size < 64 else 1.15

    def dense():
        fastattn.attention(*arrays)

    for density in DENSITIES:
        mask = random_blocks(block_size, density)
        limit = slack * mask.density + 0.03
        yield Trial("density", dtype, head_dim, mask, sparse(arrays, mask), "dense", dense, limit)


def built_in_trials(dtype, head_dim):
    """Patterns for which there is an argument: the same visible elements, so the same time."""
    arrays = inputs(dtype, head_dim)
    for name, options in (("causal", {"causal": True}), ("window", {"window": (1023, 0)})):
        build = BlockMask.causal if name == "causal" else BlockMask.sliding_window
        for block_size in (64, 128):
            mask = build(LENGTH, block_size=block_size, **({} if name == "causal" else options))
            built_in = functools.partial(fastattn.attention, *arrays, **options)
            yield Trial(name, dtype, head_dim, mask, sparse(arrays, mask), "argument", built_in, 1.05)


def torch_trials(dtype, head_dim, density, flex):
    """Random blocks against torch: SDPA with the same mask, dense and boolean, or flex_attention with the same blocks."""
    import torch

    arrays = inputs(dtype, head_dim)
    mask = random_blocks(128, density)
    visible = torch.from_numpy(mask.to_dense())
    q, k, v = (peers.tensor(array) for array in arrays)
    if flex:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        seen = visible[0, 0]
        sizes = None, None, LENGTH, LENGTH
        blocks = create_block_mask(lambda b, h, i, j: seen[i, j], *sizes, device="cpu", BLOCK_SIZE=128)
        compiled = torch.compile(flex_attention)

        def reference():
            with torch.no_grad():
                compiled(q, k, v, block_mask=blocks)
    else:

        def reference():
            torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)

    against = "torch flex" if flex else "torch SDPA"
    yield Trial("torch", dtype, head_dim, mask, sparse(arrays, mask), against, reference, 1.0)


def peak_memory():
    """Bytes above inputs and output for 131,072 tokens, window 1024 and 64 global tokens, 8 heads, D = 64, bfloat16.

    The mask counts. In a process of its own, since a peak cannot be taken back.
    """
    script = f"""
import ml_dtypes
import numpy as np
import fastattn

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

fastattn.set_num_threads({fastattn.get_num_threads()})
q, k, v, out = np.full((4, 1, 8, 131072, 64), 0.5, ml_dtypes.bfloat16)
fastattn.attention(q[:, :, :256], k[:, :, :256], v[:, :, :256])
before = status("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts again from here
mask = fastattn.BlockMask.longformer(131072, window=(1023, 0), global_tokens=64, block_size=64)
fastattn.attention(q, k, v, mask=mask, out=out)
print(status("VmHWM") - before)
"""
    return int(subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True).stdout)


def groups(args):
    """The name of each group of trials that share their inputs, and how to make them."""
    chosen = [(dtype, head_dim) for dtype in args.dtype for head_dim in HEAD_DIMS]
    if "density" in args.only:
        for dtype, head_dim in chosen:
            for block_size in BLOCK_SIZES:
                name = f"density {dtype} D={head_dim} block {block_size}"
                yield name, density_trials, (dtype, head_dim, block_size)
    if "builtin" in args.only:
        for dtype, head_dim in chosen:
            yield f"built-in masks {dtype} D={head_dim}", built_in_trials, (dtype, head_dim)
    if "torch" in args.only and importlib.util.find_spec("torch"):
        for dtype, head_dim in chosen:
            for density in PEER_DENSITIES:
                for flex in (False, True)[: 1 + args.flex]:
                    name = f"torch {'flex' if flex else 'SDPA'} {dtype} D={head_dim} density {density}"
                    yield name, torch_trials, (dtype, head_dim, density, flex)


def main():
    args = _parser().parse_args()
    rows = []
    todo = list(groups(args))
    with peers.same_threads(args.threads), _bench.Progress(len(todo)) as progress:
        for name, make, arguments in todo:
            progress.step(name)
            trials = list(make(*arguments))
            calls = list(dict.fromkeys(call for trial in trials for call in (trial.reference, trial.call)))
            for call in calls:
                call()
            seconds = dict(zip(calls, _bench.alternate(calls, rounds=args.rounds, min_time=args.min_time)))
            rows += [trial.row(seconds) for trial in trials]
        memory = peak_memory() if "memory" in args.only and os.path.exists("/proc/self/clear_refs") else None
    plans = [{"plan": _bench.plan(case(dtype, 64), *inputs(dtype, 64), None)} for dtype in args.dtype]
    _bench.print_environment(_bench.environment(args.threads) | peers.versions(), plans)
    _bench.print_table(_HEADER, rows)
    missed = sum(row[-1] != "pass" for row in rows)
    if memory is not None:
        missed += memory > _MEMORY_LIMIT
        found, limit = (f"{number / 2**20:.1f} MiB" for number in (memory, _MEMORY_LIMIT))
        print(f"\npeak memory of 131,072 tokens above inputs and output: {found}, limit {limit}")
    print(f"\n{missed} missed")
    return int(missed > 0)


def _parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = ("density", "builtin", "torch", "memory")
    parser.add_argument("--only", nargs="+", choices=everything, default=everything)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--flex", action="store_true", help="measure torch's compiled flex_attention as well")
    parser.add_argument("--threads", type=_bench.positive, default=fastattn.get_num_threads(), metavar="N")
    parser.add_argument("--rounds", type=_bench.positive, default=9, metavar="N")
    parser.add_argument("--min-time", type=float, default=0.05, metavar="S", help="seconds of calls in each round")
    return parser


@pytest.mark.parametrize("density", (1, *DENSITIES))
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_density(benchmark, dtype, head_dim, block_size, density):
    arrays, mask = inputs(dtype, head_dim), random_blocks(block_size, density)
    benchmark.group = f"{dtype} D={head_dim} block {block_size}"
    benchmark.extra_info["density"] = mask.density
    call = sparse(arrays, mask)
    call()
    _bench.settle()
    benchmark(call)


@pytest.mark.parametrize(
    "build",
    [
        lambda n: BlockMask.causal(n),
        lambda n: BlockMask.sliding_window(n, window=(1023, 0)),
        lambda n: BlockMask.strided(n),
        lambda n: BlockMask.fixed(n),
        lambda n: BlockMask.longformer(n, window=512, global_tokens=64),
        lambda n: BlockMask.bigbird(n),
        lambda n: BlockMask.neighborhood((n // 512, 512), window=13),
    ],
    ids=["causal", "sliding_window", "strided", "fixed", "longformer", "bigbird", "neighborhood"],
)
def test_building(benchmark, build):
    """The time to build a pattern of 131,072 tokens."""
    benchmark.group = "building"
    benchmark(build, 131_072)


if __name__ == "__main__":
    sys.exit(main())
