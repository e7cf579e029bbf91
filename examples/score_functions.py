"""Positions, caps and ideas as functions of a score, each beside the built-in form where there is one.

    python examples/score_functions.py

A score function sees one score at a time: s, and where it stands (batch entry b, query head h, query i, key j). Written as a scalar
function and compiled (`fastattn.score_function`, which needs Numba) it runs within the engine; the same lines on NumPy's arrays are
slow, and handy to try things out.
"""

import time

import numpy as np

import fastattn

rng = np.random.default_rng(0)
HEADS, LENGTH = 8, 512
q, k, v = rng.standard_normal((3, 1, HEADS, LENGTH, 64), np.float32)


def show(what, function, **built_in):
    """Attention by the function, how long it takes, and how far it is from the built-in form."""
    fastattn.attention(q[:, :, :1], k, v, score_function=function)
    start = time.perf_counter()
    out = fastattn.attention(q, k, v, score_function=function)
    line = f"{what:42} {1e3 * (time.perf_counter() - start):7.1f} ms"
    if built_in:
        start = time.perf_counter()
        expected = fastattn.attention(q, k, v, **built_in)
        line += f", built in {1e3 * (time.perf_counter() - start):7.1f} ms, apart by {np.abs(out - expected).max():.1e}"
    print(line)
    return out


# %% ALiBi (Press et al. 2021): the further, the less. Arrays that a function refers to become constants.
slopes = fastattn.alibi_slopes(HEADS)


@fastattn.score_function
def alibi(s, b, h, i, j):
    return s - slopes[h] * abs(i - j)


show("ALiBi", alibi, alibi_slopes=slopes)


# %% The same on arrays: i is (rows, 1), j is (1, keys), and what comes back broadcasts to (rows, keys).
def alibi_of_arrays(s, b, h, i, j):
    return s - slopes[h] * np.abs(i - j)


show("ALiBi on arrays", alibi_of_arrays, alibi_slopes=slopes)


# %% Softcap (Gemma 2): scores are bent, so that none is beyond 20.
@fastattn.score_function
def softcap(s, b, h, i, j):
    return 20 * np.tanh(s / 20)


show("softcap", softcap, softcap=20.0)

# %% Relative position bias (T5, Raffel et al. 2019). The bias of a distance is one number for each head.
table = rng.standard_normal((32, HEADS)).astype(np.float32)
bias = fastattn.t5_bias(table, LENGTH, LENGTH).reshape(HEADS, LENGTH, LENGTH)
by_distance = np.concatenate([bias[:, -1, :], bias[:, 0, 1:]], axis=1)  # from the row of the last query, and that of the first


@fastattn.score_function
def t5(s, b, h, i, j):
    return s + by_distance[h, j - i + LENGTH - 1]


show("relative position bias", t5, mask=bias[None])


# %% The same bias before a softcap, which no keyword offers: keywords bend first and add afterwards.
@fastattn.score_function
def bias_then_cap(s, b, h, i, j):
    return 20 * np.tanh((s + by_distance[h, j - i + LENGTH - 1]) / 20)


show("relative position bias before a softcap", bias_then_cap)


# %% An idea of a paper's: KERPLE (Chi et al. 2022), whose penalty grows with the logarithm of the distance.
@fastattn.score_function
def kerple(s, b, h, i, j):
    return s - 2 * np.log1p(slopes[h] * abs(i - j))


show("KERPLE, logarithmic", kerple)
