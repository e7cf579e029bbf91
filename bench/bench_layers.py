"""An encoder block against PyTorch's own, with padding and without; and the steps of it one by one.

    python bench/bench_layers.py                            # the judge: exit status 1 when the limit is missed
    python bench/bench_layers.py --rounds 31 --threads 1

Both sides have the same weights and the same input, on as many threads, in turn in one process (`fastattn._bench`); medians are compared.
PyTorch is ``nn.TransformerEncoderLayer`` in inference mode, whose fast path it takes, with padding as `src_key_padding_mask`; its dtype
is float32, as ours. Wanted: at least 1.2 times its speed where padding is honoured. Products are most of a block, and they are BLAS's on
either side: what this library adds is the rest, and to leave padding out of all of it.
"""

import argparse
import sys

import numpy as np
import peers

from fastattn import _bench, layers

LEAST_OF_TORCH = 1.2
BATCH, LENGTH, WIDTH, HEADS, HIDDEN = 8, 128, 384, 12, 1536
PADDING = {  # tokens of each sequence
    "none": [LENGTH] * BATCH,
    "mixed": [128, 17, 79, 41, 128, 96, 30, 62],
}


def sides(lengths, norm_first):
    """Our call and torch's on the same padded batch, and what they give where there are tokens."""
    import torch

    torch.manual_seed(0)
    module = torch.nn.TransformerEncoderLayer(
        WIDTH, HEADS, HIDDEN, activation="gelu", batch_first=True, norm_first=norm_first
    ).eval()
    block = layers.TransformerBlock.from_torch(module)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    padding = torch.arange(LENGTH) >= torch.tensor(lengths)[:, None]
    mask = padding if padding.any() else None
    ours, theirs = x.numpy(), torch.inference_mode()(lambda: module(x, src_key_padding_mask=mask))
    return (lambda: block(ours, lengths=lengths)), theirs, ~padding.numpy()


def steps():
    """What a block does, one thing at a time: name and call."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((BATCH * LENGTH, WIDTH), np.float32)
    hidden = rng.standard_normal((BATCH * LENGTH, HIDDEN), np.float32)
    norm = layers.LayerNorm(np.ones(WIDTH, np.float32), np.zeros(WIDTH, np.float32))
    wide = layers.Linear(rng.standard_normal((HIDDEN, WIDTH), np.float32))
    bias, other = np.zeros(HIDDEN, np.float32), rows.copy()
    yield "product 384 -> 1536", lambda: wide(rows)
    yield "norm", lambda: norm(rows)
    yield "sum and norm", lambda: norm.of_sum(rows, other, keep=False)
    yield "bias and GELU", lambda: layers.functional.activate(hidden, "gelu", bias=bias)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=_bench.positive, default=2)
    parser.add_argument("--rounds", type=_bench.positive, default=15)
    args = parser.parse_args()
    todo = [(padding, norm_first) for padding in PADDING for norm_first in (False, True)]
    rows, slow = [], 0
    with peers.same_threads(args.threads), _bench.Progress(len(todo) + 1) as progress:
        for padding, norm_first in todo:
            progress.step(f"padding {padding}")
            ours, theirs, real = sides(PADDING[padding], norm_first)
            gap = float(np.abs(ours()[real] - theirs().numpy()[real]).max())
            seconds = _bench.medians(ours, theirs, rounds=args.rounds)
            missed = padding != "none" and seconds[1] / seconds[0] < LEAST_OF_TORCH
            slow += missed
            norm, verdict = "pre" if norm_first else "post", "-" if padding == "none" else "slow" if missed else "pass"
            rows.append([padding, norm, *(f"{1e3 * s:.2f} ms" for s in seconds), f"{seconds[1] / seconds[0]:.2f} x", f"{gap:.0e}", verdict])
        progress.step("steps")
        names, calls = zip(*steps())
        parts = _bench.medians(*calls, rounds=args.rounds, min_time=0.02)
    _bench.print_environment({**_bench.environment(args.threads), **peers.versions()}, [])
    print(f"a block of {BATCH} x {LENGTH} x {WIDTH}, {HEADS} heads, wanted with padding: at least {LEAST_OF_TORCH} x torch's speed\n")
    _bench.print_table(["padding", "norm", "fastattn", "torch", "torch / ours", "difference", ""], rows)
    print()
    _bench.print_table(["step", "time"], [[name, f"{1e3 * s:.3f} ms"] for name, s in zip(names, parts)])
    return slow > 0


if __name__ == "__main__":
    sys.exit(main())
