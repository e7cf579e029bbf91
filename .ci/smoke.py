"""A few calls against the formula, and whether the installation is the one that was meant; NumPy is all it needs.

    python .ci/smoke.py [--backend NAME] [--isa NAME] [--openmp yes|no]
"""

import argparse
import sys
import warnings

import numpy as np

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastattn

BOUND = 5e-6


def formula(q, k, v, visible, softcap=None):
    """Attention in float64; ``visible`` broadcasts to the scores and hides nothing in at least one key of every row."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.astype(float), np.repeat(k, group, 1).astype(float), np.repeat(v, group, 1).astype(float)
    s = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    if softcap:
        s = softcap * np.tanh(s / softcap)
    s = np.where(visible, s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True) @ v


def largest_error():
    rng = np.random.default_rng(0)
    worst = 0.0
    for heads, kv_heads, n_q, n_k, dim, v_dim in [(4, 2, 1, 700, 64, 64), (3, 3, 67, 131, 40, 17), (8, 1, 5, 33, 128, 96)]:
        q = rng.standard_normal((2, heads, n_q, dim), dtype=np.float32)
        k = rng.standard_normal((2, kv_heads, n_k, dim), dtype=np.float32)
        v = rng.standard_normal((2, kv_heads, n_k, v_dim), dtype=np.float32)
        distance = np.arange(n_k) - np.arange(n_q)[:, None] - (n_k - n_q)
        mask = rng.random((2, 1, n_q, n_k)) < 0.5
        mask[..., 0] = True
        for keywords, visible in [
            ({}, True),
            ({"causal": True}, distance <= 0),
            ({"window": (20, 3)}, (distance >= -20) & (distance <= 3)),
            ({"mask": mask}, mask),
            ({"softcap": 2.0}, True),
        ]:
            out = fastattn.attention(q, k, v, **keywords)
            worst = max(worst, abs(out - formula(q, k, v, visible, keywords.get("softcap"))).max())
    return worst


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend")
    parser.add_argument("--isa")
    parser.add_argument("--openmp", choices=["yes", "no"])
    expected = parser.parse_args()

    config = fastattn.show_config(mode="dicts")
    error = largest_error()
    print(f"Python {config['python']}, NumPy {config['numpy']}, {fastattn.__path__[0]}:", end=" ")
    print(f"{config['backend']}, isa {config['isa']}, OpenMP {config['openmp']}, largest error {error:.1e}")

    failures = []
    if not error < BOUND:
        failures.append(f"the error is above {BOUND}")
    openmp = {"yes": True, "no": False, None: None}[expected.openmp]
    for name, wanted in [("backend", expected.backend), ("isa", expected.isa), ("openmp", openmp)]:
        if wanted not in (None, config[name]):
            failures.append(f"{name} is {config[name]!r}, not {wanted!r}")
    warned = [str(warning.message) for warning in caught if issubclass(warning.category, fastattn.BackendWarning)]
    if len(warned) != (config["backend"] != "native"):
        failures.append(f"warnings at import: {warned}")
    for failure in failures:
        print("smoke:", failure)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
