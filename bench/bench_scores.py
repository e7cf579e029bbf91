"""Other scores and other weights beside their targets: NumPy's and torch's plain form, our own softmax, our own rules.

    python bench/bench_scores.py [--threads N] [--rounds N] [--only PART-OF-A-NAME]

The sides of a comparison alternate in one process; medians, and minima behind them.
"""

import argparse
import ctypes
import importlib
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

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


def luong(torch, rounds):
    """General scores, over all keys and over a window around a predicted position."""
    rng = np.random.default_rng(0)
    n, dim, reach = 1024, 64, 32
    q, k, v = rng.standard_normal((3, 1, 8, n, dim), np.float32)
    w, w_p = rng.standard_normal((2, dim, dim), np.float32) / np.float32(dim)
    v_p = rng.standard_normal(dim, np.float32)
    tensors = [torch.from_numpy(x) for x in (q, k, v, w, w_p, v_p)] if torch else []
    keys = np.arange(n, dtype=np.float32)

    def weights_of(s):
        p = np.exp(s - s.max(axis=-1, keepdims=True))
        return p / p.sum(axis=-1, keepdims=True)

    def numpy_around():
        away = keys - n / (1 + np.exp(-np.tanh(q @ w_p) @ v_p[:, None]))
        s = np.where(np.abs(away) <= reach, q @ w @ k.swapaxes(2, 3), -np.inf)
        return (weights_of(s) * np.exp(-2 * (away / reach) ** 2)) @ v

    def torch_around():
        q, k, v, w, w_p, v_p = tensors
        away = torch.arange(n) - n * torch.sigmoid(torch.tanh(q @ w_p) @ v_p[:, None])
        s = (q @ w @ k.transpose(2, 3)).masked_fill(away.abs() > reach, -torch.inf)
        return (torch.softmax(s, dim=-1) * torch.exp(-2 * (away / reach) ** 2)) @ v

    general = {"score": "general", "w": w}
    sides = {
        "ours": lambda: fastattn.luong_attention(q, k, v, **general),
        "numpy": lambda: weights_of(q @ w @ k.swapaxes(2, 3)) @ v,
    }
    if torch:
        sides["torch"] = lambda: torch.softmax(tensors[0] @ tensors[3] @ tensors[1].transpose(2, 3), dim=-1) @ tensors[2]
    report("Luong, general, 1, 8/8, 1024, 1024, 64", measure(sides, rounds))
    around = {"local": "predictive", "window": reach, "w_p": w_p, "v_p": v_p}
    sides = {"ours": lambda: fastattn.luong_attention(q, k, v, **general, **around), "numpy": numpy_around}
    if torch:
        sides["torch"] = torch_around
    report(f"..., within {reach} of predicted positions", measure(sides, rounds))


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


ALIBI = """
#include <stdint.h>
void alibi(float *scores, int64_t keys, int64_t batch, int64_t head, int64_t query, int64_t first_key, void *context) {
    const float slope = ((const float *)context)[head];
    const int32_t away = (int32_t)(query - first_key);
    (void)batch;
    for (int32_t n = 0; n < keys; n++) scores[n] -= slope * (float)(away < n ? n - away : away - n);
}
"""


def compiled():
    """ALiBi in C, whose context are the slopes."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "alibi.so"
        subprocess.run(["cc", "-O3", "-march=native", "-shared", "-fPIC", "-xc", "-", "-o", library], input=ALIBI, text=True, check=True)
        function = ctypes.CDLL(str(library)).alibi
    function.argtypes, function.restype = [ctypes.POINTER(ctypes.c_float), *[ctypes.c_int64] * 5, ctypes.c_void_p], None
    return function


def functions(torch, rounds):
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 8, 2048, 64), np.float32)
    slopes = fastattn.alibi_slopes(8)

    @fastattn.score_function
    def alibi(s, b, h, i, j):
        return s - slopes[h] * abs(i - j)

    sides = {"ours": lambda: fastattn.attention(q, k, v, score_function=alibi)}
    if shutil.which("cc"):
        in_c = compiled(), slopes
        sides["in C"] = lambda: fastattn.attention(q, k, v, score_function=in_c)
    sides |= {
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
        for part in (additive, luong, activations, functions):
            if args.only in part.__name__:
                part(torch, args.rounds)


if __name__ == "__main__":
    main()
