"""The pictures of scores.md and linear.md: the weights of one head, which are its outputs for values that are the unit matrix.

    python docs/pictures.py
"""

from pathlib import Path

import matplotlib
import numpy as np

import fastattn

LENGTH = 48


def tokens(rng):
    """Rows that drift, so that neighbours are alike."""
    x = rng.standard_normal((LENGTH, 16), dtype=np.float32).cumsum(axis=0)
    return 3 * x / np.linalg.norm(x, axis=1, keepdims=True)


def scores(x, unit, rng):
    w_q, w_k = rng.standard_normal((2, 16, 32), dtype=np.float32) / 2
    w_v, w_p, v_p = (rng.standard_normal(shape, dtype=np.float32) for shape in (32, (16, 8), 8))
    near = {"window": 6}
    return {
        "softmax": fastattn.attention(x, x, unit, causal=True),
        "sigmoid": fastattn.attention(x, x, unit, causal=True, activation="sigmoid"),
        "ReLU": fastattn.attention(x, x, unit, causal=True, activation="relu"),
        "polynomial": fastattn.attention(x, x, unit, causal=True, activation="polynomial"),
        "additive": fastattn.additive_attention(x, x, unit, w_q, w_k, w_v, causal=True),
        "Luong, monotonic": fastattn.luong_attention(x, x, unit, local="monotonic", **near),
        "Luong, predictive": fastattn.luong_attention(x, x, unit, local="predictive", w_p=w_p / 2, v_p=v_p, **near),
        "KERPLE, a score function": fastattn.attention(
            x, x, unit, causal=True, score_function=lambda s, b, h, i, j: s - 2 * np.log1p(np.abs(i - j) / 4)
        ),
    }


def linear(x, unit):
    q, k, v = x[None, None], x[None, None] / 3, unit[None, None]
    decay, beta = np.full((2, 1, 1, LENGTH), [[[[0.9]]], [[[0.3]]]], np.float32)
    found = {
        "linear": fastattn.linear_attention(q, 3 * k, v),
        "gated, decay 0.9": fastattn.gated_linear_attention(q, k, v, decay),
        "delta rule, rate 0.3": fastattn.gated_delta_rule(q, k, v, beta),
        "gated delta rule": fastattn.gated_delta_rule(q, k, v, beta, decay),
    }
    return {name: weights[0, 0] for name, weights in found.items()}


def draw(panels, path):
    import matplotlib.pyplot as plt

    rows = -(-len(panels) // 4)
    figure, axes = plt.subplots(rows, 4, figsize=(10, 2.6 * rows), squeeze=False)
    for ax, (name, weights) in zip(axes.flat, panels.items()):
        sizes = np.abs(weights)
        fastattn.plot.heatmap(sizes / sizes.max(axis=1, keepdims=True), ax=ax)
        ax.set_title(name, fontsize=9)
        ax.set(xticks=[], yticks=[])
    figure.tight_layout()
    figure.savefig(path, dpi=80, metadata={"Software": None})


if __name__ == "__main__":
    matplotlib.use("Agg")
    rng = np.random.default_rng(0)
    x, unit = tokens(rng), np.eye(LENGTH, dtype=np.float32)
    draw(scores(x, unit, rng), Path(__file__).with_name("scores.png"))
    draw(linear(x, unit), Path(__file__).with_name("linear.png"))
