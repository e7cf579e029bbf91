"""The linear family beside its targets: our own softmax, the chunked form written with torch's operations, and the state's bandwidth.

    python bench/bench_linear.py [--threads N] [--rounds N]

The sides of a comparison alternate in one process; medians.
"""

import argparse
import importlib

import numpy as np
import peers

import fastattn
from fastattn import _bench

CHUNK = 64


def medians(sides, rounds):
    """Milliseconds of each of the named functions, which take turns."""
    return {name: 1e3 * seconds for name, seconds in zip(sides, _bench.medians(*sides.values(), rounds=rounds))}


def torch_linear(torch, q, k, v):
    """Causal linear attention, chunk by chunk: all heads and rows of a chunk in one product."""
    q, k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    state, total = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]), q.new_zeros(*q.shape[:2], 1, q.shape[3])
    outs = []
    for start in range(0, q.shape[2], CHUNK):
        a, b, c = (x[:, :, start : start + CHUNK] for x in (q, k, v))
        weights = (a @ b.transpose(-1, -2)).tril()
        divisor = weights.sum(-1, keepdim=True) + (a * total).sum(-1, keepdim=True)
        outs.append((weights @ c + a @ state) / divisor)
        state, total = state + b.transpose(-1, -2) @ c, total + b.sum(2, keepdim=True)
    return torch.cat(outs, 2)


def torch_delta(torch, q, k, v, beta, log_decay):
    """The gated delta rule, chunk by chunk, the triangular system solved by torch."""
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    eye, outs, scale = torch.eye(CHUNK), [], q.shape[3] ** -0.5
    for start in range(0, q.shape[2], CHUNK):
        a, b, c, rate, g = (x[:, :, start : start + CHUNK] for x in (q, k, v, beta, log_decay))
        g = g.cumsum(-1)
        between, before = (g[..., :, None] - g[..., None, :]).tril().exp().tril(), g.exp()[..., None]
        system = eye + (rate[..., None] * (b @ b.transpose(-1, -2)) * between).tril(-1)
        u = torch.linalg.solve_triangular(system, rate[..., None] * (c - (b * before) @ state), upper=False, unitriangular=True)
        outs.append(scale * ((a * before) @ state + ((a @ b.transpose(-1, -2)) * between) @ u))
        state = g[..., -1:, None].exp() * state + (b * (g[..., -1:] - g).exp()[..., None]).transpose(-1, -2) @ u
    return torch.cat(outs, 2)


def report(what, wanted, seen):
    print(f"{what:58} wanted {wanted:24} seen {seen}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=_bench.positive, default=2)
    parser.add_argument("--rounds", type=_bench.positive, default=7)
    args = parser.parse_args()
    with peers.same_threads(args.threads):
        compare(importlib.import_module("torch") if "torch" in peers.installed() else None, args)


def compare(torch, args):
    rng = np.random.default_rng(0)

    q, k, v = rng.standard_normal((3, 1, 16, 8192, 64), np.float32)
    sides = {"ours": lambda: fastattn.linear_attention(q, k, v), "softmax": lambda: fastattn.attention(q, k, v, causal=True)}
    if torch:
        tensors = [torch.from_numpy(x) for x in (q, k, v)]
        sides["torch"] = lambda: torch_linear(torch, *tensors)
        error = np.abs(torch_linear(torch, *tensors).numpy() - fastattn.linear_attention(q, k, v)).max()
        assert error < 1e-3, error
    t = medians(sides, args.rounds)
    report("linear, causal, 1, 16, 8192, 64", "10 x our softmax", f"{t['softmax'] / t['ours']:.1f} x ({t['ours']:.2f} ms)")
    if torch:
        report("", "3 x chunked torch", f"{t['torch'] / t['ours']:.1f} x")

    q, k, v = (x[:, :, :2048].copy() for x in (q, k, v))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta = rng.uniform(0, 1, (1, 16, 2048)).astype(np.float32)
    log_decay = -rng.exponential(0.1, (1, 16, 2048)).astype(np.float32)
    sides = {"ours": lambda: fastattn.gated_delta_rule(q, k, v, beta, log_decay=log_decay)}
    if torch:
        tensors = [torch.from_numpy(x) for x in (q, k, v, beta, log_decay)]
        sides["torch"] = lambda: torch_delta(torch, *tensors)
        error = np.abs(torch_delta(torch, *tensors).numpy() - sides["ours"]()).max()
        assert error < 1e-3, error
    t = medians(sides, args.rounds)
    report("gated delta rule, 1, 16, 2048, 64", "below 28.8 ms", f"{t['ours']:.2f} ms")
    if torch:
        report("", "5 x chunked torch", f"{t['torch'] / t['ours']:.1f} x")

    q, k, v = rng.standard_normal((3, 1, 16, 1, 128), np.float32)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    state, other = rng.standard_normal((2, 1, 16, 128, 128), np.float32)
    one = {"beta": beta[:, :, :1].copy(), "log_decay": log_decay[:, :, :1].copy(), "state": state, "state_out": state}
    sides = {"ours": lambda: fastattn.gated_delta_rule(q, k, v, **one), "copy": lambda: np.copyto(other, state)}
    t = medians(sides, args.rounds)
    report("one step, 1, 16, 1, 128", "a copy of its state", f"{t['ours'] / t['copy']:.2f} x ({1e3 * t['ours']:.1f} us)")

    sides = {}
    for length in (32768, 131072):
        q, k, v = rng.standard_normal((3, 1, 8, length, 64), np.float32)
        decay = rng.uniform(0.9, 1, (1, 8, length)).astype(np.float32)
        out = np.zeros_like(q)
        sides[length] = lambda a=(q, k, v, decay), out=out: fastattn.gated_linear_attention(*a, out=out)
    t = medians(sides, args.rounds)
    report("gated, 1, 8, 131072, 64", "4 x 32768, within 10 %", f"{t[131072] / t[32768]:.2f} x ({t[131072]:.1f} ms)")


if __name__ == "__main__":
    main()
