"""Other scores and other weights beside their targets: NumPy's and torch's plain form, our own softmax, our own rules.

    python bench/bench_scores.py [--threads N] [--rounds N] [--only PART-OF-A-NAME]

The sides of a comparison alternate in one process; medians, and minima behind them.
"""

import argparse
import importlib
import statistics

import numpy as np
import peers

import fastattn
from fastattn import _bench


def measure(sides, rounds):
    """``(median, minimum)`` in milliseconds of each of the named functions, which take turns."""
    times = _bench.alternate(sides.values(), rounds=rounds, min_time=0.05)
    return {name: (1e3 * statistics.median(taken), 1e3 * min(taken)) for name, taken in zip(sides, times)}


def report(what, seen, ours="ours"):
    """One line for each side: its times, and how often ours fits into them."""
    for name, (median, least) in seen.items():
        ratio = f"{median / seen[ours][0]:7.2f} x {least / seen[ours][1]:7.2f} x" if name != ours else ""
        print(f"{what:44} {name:24} {median:9.2f} ms {least:9.2f} ms {ratio}", flush=True)


def additive(torch, rounds):
    rng = np.random.default_rng(0)
    n, width = 1024, 128
    q, k = rng.standard_normal((2, 1, 1, n, width), np.float32)
    v = rng.standard_normal((1, 1, n, 64), np.float32)
    w_q, w_k = rng.standard_normal((2, width, width), np.float32) / np.float32(np.sqrt(width))
    w_v = rng.standard_normal(width, np.float32)

    def numpy_form():
        s = np.tanh((q @ w_q)[:, :, :, None] + (k @ w_k)[:, :, None]) @ w_v
        p = np.exp(s - s.max(axis=-1, keepdims=True))
        return (p / p.sum(axis=-1, keepdims=True)) @ v

    sides = {"ours": lambda: fastattn.additive_attention(q, k, v, w_q, w_k, w_v), "numpy": numpy_form}
    sides["our tanh alone"] = tanh_alone(n * n * width)
    if torch:
        tensors = [torch.from_numpy(x) for x in (q, k, v, w_q, w_k, w_v)]

        def torch_form():
            q, k, v, w_q, w_k, w_v = tensors
            s = torch.tanh((q @ w_q)[:, :, :, None] + (k @ w_k)[:, :, None]) @ w_v
            return torch.softmax(s, dim=-1) @ v

        sides["torch"] = torch_form
    report("additive, 1 head, 1024 x 1024, A = 128", measure(sides, rounds))


def tanh_alone(count):
    """As many tanh as that, by a call of one query row and one number for each key, so that little else is done."""
    keys = 1 << 16
    q, k = np.zeros((count // keys // 64, 1, 64, 1), np.float32), np.random.default_rng(1).standard_normal((1, 1, keys, 1), np.float32)
    k = np.broadcast_to(k, (len(q), 1, keys, 1))
    one = np.ones((1, 1), np.float32)
    return lambda: fastattn.additive_attention(q, k, k[..., :0], one, one, one[0], activation="relu")


def activations(torch, rounds):
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 8, 2048, 64), np.float32)
    n, shift = 2048, float(-np.log(2048))
    forms = {
        "sigmoid": lambda torch, s: torch.sigmoid(s + shift),
        "relu": lambda torch, s: torch.relu(s) / n,
        "polynomial": lambda torch, s: s**3 / n**0.5,
    }
    tensors = [torch.from_numpy(x) for x in (q, k, v)] if torch else []
    for name, form in forms.items():
        sides = {"ours": lambda name=name: fastattn.attention(q, k, v, activation=name), "softmax": lambda: fastattn.attention(q, k, v)}
        if torch:
            sides["torch"] = lambda form=form: form(torch, tensors[0] @ tensors[1].transpose(-1, -2) / 8) @ tensors[2]
        report(f"{name}, 1, 8/8, 2048, 2048, 64", measure(sides, rounds))


def functions(torch, rounds):
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 8, 2048, 64), np.float32)
    slopes = fastattn.alibi_slopes(8)

    @fastattn.score_function
    def alibi(s, b, h, i, j):
        return s - slopes[h] * abs(i - j)

    sides = {
        "ours": lambda: fastattn.attention(q, k, v, score_function=alibi),
        "alibi_slopes": lambda: fastattn.attention(q, k, v, alibi_slopes=slopes),
        "none": lambda: fastattn.attention(q, k, v),
    }
    report("ALiBi as a function, 1, 8/8, 2048, 2048, 64", measure(sides, rounds))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=_bench.positive, default=2)
    parser.add_argument("--rounds", type=_bench.positive, default=9)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    torch = importlib.import_module("torch") if "torch" in peers.installed() else None
    with peers.same_threads(args.threads):
        for part in (additive, activations, functions):
            if args.only in part.__name__:
                part(torch, args.rounds)


if __name__ == "__main__":
    main()
