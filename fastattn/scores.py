"""Scores that are no plain product: additive (Bahdanau), Luong's forms with local attention, and functions of the caller's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from . import runtime
from ._arrays import as_array
from ._call import Call, known_keywords
from ._check import check_dtype, check_out, dtype_name, flag, is_block_mask, kernel_ready

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._typing import Array

_MOST_PAIRS = 1 << 22  # (row, key) pairs of which the bias of predictive attention is there at a time
_SCORES = ("dot", "general", "concat")
_LOCAL = (None, "monotonic", "predictive")


def additive_attention(
    q: Array,
    k: Array,
    v: Array,
    w_q: Array,
    w_k: Array,
    w_v: Array,
    bias: Array | None = None,
    *,
    out: Array | None = None,
    **keywords: Any,
) -> Any:
    """Additive attention: a small network of one hidden layer scores each query with each key.

    ::

        s[i, j] = w_v . tanh(q[i] @ w_q + k[j] @ w_k + bias)
        out[i]  = sum(softmax(scale * s over the visible keys)[j] * v[j])

    The projections are made once for each query and key; their sums and tanh, `A` for each pair of a query and a key, are never held.

    Parameters
    ----------
    q : array_like, (B, Hq, Lq, Dq)
        Queries. The arrays may also have rank 3, ``(H, L, D)``, or rank 2, ``(L, D)``, all three the same.
    k : array_like, (B, Hkv, Lk, Dk)
        Keys, whose size need not be that of the queries. `Hq` must be a multiple of `Hkv`.
    v : array_like, (B, Hkv, Lk, Dv)
        Values.
    w_q : array_like, (Dq, A) or (Hq, Dq, A)
    w_k : array_like, (Dk, A) or (Hq, Dk, A)
    w_v : array_like, (A,) or (Hq, A)
    bias : array_like, (A,) or (Hq, A), optional
        Weights, of all heads or of each. With a `w_k` for each head there are projected keys for each query head.
    out : array, (B, Hq, Lq, Dv), optional
        Where to write the result: of the dtype of `q`, writable, sharing no memory with an input.
    **keywords
        All others of :func:`attention`: mask, causal, window, kv_lengths, softcap, sinks, activation, return_lse, ... `scale`
        multiplies the scores; its default is 1.

    Returns
    -------
    out : ndarray, (B, Hq, Lq, Dv)
        Of the dtype of `q`; the caller's object if `out` was given.
    lse : ndarray, (B, Hq, Lq)
        float32, only with ``return_lse=True``.

    Notes
    -----
    Projections (NumPy's products, of the float32 values of 16-bit storage), tanh, softmax and sums are float32; in the C library and
    the Numba backend tanh is within 6 units in the last place. The result has the same bits for any number of threads of ours.

    Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate", 2014.

    Examples
    --------
    A decoder's state of 512 numbers looks at 40 annotations of 1024:

    >>> out = fastattn.additive_attention(state, annotations, annotations, w_a, u_a, v_a)  # (1, 512), (40, 1024), (40, 1024)
    """
    known_keywords("additive_attention", keywords)
    problem = _Problem(runtime.backend(), q, k, v, out, flag("invariant", keywords.get("invariant", False)))
    problem.add(w_q, w_k, w_v, bias, ("w_q", "w_k", "w_v", "bias"))
    return problem.solve(keywords)


def luong_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    score: Literal["dot", "general", "concat"] = "dot",
    w: Array | None = None,
    w_v: Array | None = None,
    local: Literal["monotonic", "predictive"] | None = None,
    window: Any = None,
    w_p: Array | None = None,
    v_p: Array | None = None,
    out: Array | None = None,
    **keywords: Any,
) -> Any:
    """Luong's attention: three scores, over all keys or over a window around a position.

    ::

        s[i, j] = q[i] . k[j]                            "dot"
                  q[i] @ w . k[j]                        "general"
                  w_v . tanh(concat(q[i], k[j]) @ w)     "concat"

    all times `scale`, which is 1 unless given. Global attention is their softmax over the visible keys. Local attention has a window of
    ``D = window`` keys on both sides of a position: the query's own (``"monotonic"``, local-m), or one that a small network predicts
    from the query, with weights that a Gaussian lowers around it (``"predictive"``, local-p)::

        p[i]   = S * sigmoid(v_p . tanh(q[i] @ w_p))            of S keys
        out[i] = sum(softmax(s over |j - p[i]| <= D)[j] * exp(-(j - p[i])**2 / (2 * (D / 2)**2) * v[j])

    As in the paper the Gaussian comes after the softmax, so that weights do not sum to 1.

    Parameters
    ----------
    q : array_like, (B, Hq, Lq, Dq)
        Queries. The arrays may also have rank 3, ``(H, L, D)``, or rank 2, ``(L, D)``, all three the same.
    k : array_like, (B, Hkv, Lk, Dk)
        Keys: of the size of the queries for "dot", of any for the others.
    v : array_like, (B, Hkv, Lk, Dv)
        Values.
    score : {"dot", "general", "concat"}
    w : array_like, optional
        ``(Dq, Dk)`` for "general", ``(Dq + Dk, A)`` for "concat"; or with an axis ``(Hq,)`` before them.
    w_v : array_like, (A,) or (Hq, A), optional
        For "concat".
    local : {None, "monotonic", "predictive"}
    window : int, or (left, right), optional
        ``D``, with `local`. Without it the window of :func:`attention`.
    w_p : array_like, (Dq, P) or (Hq, Dq, P), optional
    v_p : array_like, (P,) or (Hq, P), optional
        What predicts positions, for "predictive".
    out : array, (B, Hq, Lq, Dv), optional
        Where to write the result.
    **keywords
        All others of :func:`attention`. `query_offset` is 0 by default if "monotonic": query ``t`` stands at key ``t``. If "predictive",
        `S` is ``kv_lengths - kv_starts``, positions count from ``kv_starts``, and neither a BlockMask nor another activation is taken.

    Returns
    -------
    out : ndarray, (B, Hq, Lq, Dv)
        Of the dtype of `q`; the caller's object if `out` was given.
    lse : ndarray, (B, Hq, Lq)
        float32, only with ``return_lse=True``: of the softmax, before the Gaussian.

    Notes
    -----
    Luong, Pham and Manning, "Effective Approaches to Attention-based Neural Machine Translation", 2015.
    """
    known_keywords("luong_attention", keywords)
    if not isinstance(score, str) or score not in _SCORES:
        raise ValueError(f"score must be one of {_SCORES}; got {score!r}")
    if local is not None and (not isinstance(local, str) or local not in _LOCAL):
        raise ValueError(f"local must be one of {_LOCAL}; got {local!r}")
    of_score, of_place = {"w": w, "w_v": w_v}, {"w_p": w_p, "v_p": v_p}
    for wanted, given, why in (
        ({"dot": (), "general": ("w",), "concat": ("w", "w_v")}[score], of_score, f"score={score!r}"),
        (("w_p", "v_p") if local == "predictive" else (), of_place, f"local={local!r}"),
    ):
        for name, weights in given.items():
            if (weights is not None) != (name in wanted):
                must, got = ("given", "None") if name in wanted else ("None", "weights")
                raise ValueError(f"{name} must be {must} with {why}; got {got}")
    problem = _Problem(runtime.backend(), q, k, v, out, flag("invariant", keywords.get("invariant", False)))
    q_dim, k_dim = problem.q.shape[3], problem.k.shape[3]
    if local is not None:
        if isinstance(window, bool) or not isinstance(window, (int, np.integer)) or window < 1:
            wanted = f"an int of at least 1, the keys on each side of a position, with local={local!r}"
            raise ValueError(f"window must be {wanted}; got {window!r}")
    else:
        keywords["window"] = window
    place = problem.positions(w_p, v_p) if local == "predictive" else None  # of the queries as they are
    if score == "dot":
        if q_dim != k_dim:
            raise ValueError(f'k must have the head size of q, {q_dim}, with score="dot"; got {k_dim}')
    elif score == "general":
        problem.project(w, k_dim)
    else:
        weights = problem.weights("w", w, (q_dim + k_dim, None))
        problem.add(weights[..., :q_dim, :], weights[..., q_dim:, :], w_v, None, ("w", "w", "w_v", "bias"))
    if local == "monotonic":
        keywords["window"] = (int(window), int(window))
        if keywords.get("query_offset") is None:
            keywords["query_offset"] = 0
    if local == "predictive":
        return problem.solve_around(place, int(window), keywords)
    return problem.solve(keywords)


class _Problem:
    """Queries, keys and values of rank 4, in the dtype of the arithmetic once they are projected, and how they are scored."""

    def __init__(self, backend, q, k, v, out, rows_alone):
        self.backend, self._rows_alone = backend, rows_alone
        self.given = given = {"q": as_array("q", q), "k": as_array("k", k), "v": as_array("v", v)}
        q, k, v = given.values()
        if q.ndim not in (2, 3, 4):
            raise ValueError(f"q must have shape (B, Hq, Lq, Dq), (Hq, Lq, Dq) or (Lq, Dq); got {q.shape}")
        for name, array in given.items():
            if array.ndim != q.ndim:
                raise ValueError(f"{name} must have as many axes as q, {q.ndim}; got shape {array.shape}")
            check_dtype(name, array, backend)
        if dtype_name(v.dtype) != dtype_name(k.dtype):
            raise TypeError(f"v must have the dtype of k, {k.dtype}; got {v.dtype}")
        if dtype_name(q.dtype) != dtype_name(k.dtype) and q.itemsize <= k.itemsize:
            raise TypeError(f"q must have the dtype of k and v, {k.dtype}, or a wider one; got {q.dtype}")
        self._missing = 4 - q.ndim
        self.q, self.k, self.v = (kernel_ready(array)[(None,) * self._missing] for array in given.values())
        if self.k.shape[:1] != self.q.shape[:1]:
            raise ValueError(f"k must have the batch size of q, {self.q.shape[0]}; got shape {k.shape}")
        if self.v.shape[:3] != self.k.shape[:3]:
            raise ValueError(f"v must have the shape of k, {k.shape}, in all but the last axis; got {v.shape}")
        self.heads, self.kv_heads = self.q.shape[1], self.k.shape[1]
        if self.heads % self.kv_heads if self.kv_heads else self.heads:
            raise ValueError(f"k must have a number of heads that divides that of q, {self.heads}; got {self.kv_heads}, shape {k.shape}")
        self.result_dtype = q.dtype.newbyteorder("=")
        self.dtype = np.dtype(np.float32) if q.itemsize <= 4 else self.result_dtype
        self.additive = None
        self._out = out

    def weights(self, name, value, shape):
        """Weights of this shape, where None is any size, with an axis of all query heads before it or without."""
        array = self.given[name] = as_array(name, value)
        if array.dtype.kind not in "fiu" and dtype_name(array.dtype) != "bfloat16":
            raise TypeError(f"{name} must hold real numbers; got {array.dtype}")
        own = array.shape[-len(shape) :]
        fits = len(own) == len(shape) and all(n in (None, m) for n, m in zip(shape, own))
        if not fits or array.shape[: -len(shape)] not in ((), (self.heads,)):
            wanted = ", ".join("A" if n is None else str(n) for n in shape) + ("," if len(shape) == 1 else "")
            raise ValueError(f"{name} must have shape ({wanted}), or ({self.heads}, {wanted.rstrip(',')}) for each head; got {array.shape}")
        return array.astype(self.dtype)

    def _times(self, x, weights):
        x = x.astype(self.dtype)
        with np.errstate(all="ignore"):
            if not self._rows_alone:
                return np.matmul(x, weights)
            return np.matmul(x[..., None, :], weights[..., None, :, :] if weights.ndim == 3 else weights)[..., 0, :]

    def project(self, w, k_dim):
        """Queries become ``q @ w``."""
        self.q = self._times(self.q, self.weights("w", w, (self.q.shape[3], k_dim)))

    def positions(self, w_p, v_p):
        """The place, from 0 to 1, at which each query looks: ``(B, Hq, Lq)``."""
        w_p = self.weights("w_p", w_p, (self.q.shape[3], None))
        v_p = self.weights("v_p", v_p, w_p.shape[-1:])
        hidden = np.tanh(self._times(self.q, w_p))
        with np.errstate(all="ignore"):
            return 1 / (1 + np.exp(-self._times(hidden, v_p[..., None])[..., 0]))

    def add(self, w_q, w_k, w_v, bias, names):
        """Scores become additive."""
        w_q = w_q if names[0] == "w" else self.weights(names[0], w_q, (self.q.shape[3], None))
        width = w_q.shape[-1]
        w_k = w_k if names[1] == "w" else self.weights(names[1], w_k, (self.k.shape[3], width))
        w_v = self.weights(names[2], w_v, (width,))
        q = self._times(self.q, w_q)
        if bias is not None:
            bias = self.weights(names[3], bias, (width,))
            q += bias if bias.ndim == 1 else bias[:, None]
        if w_k.ndim == 3:  # keys of each query head
            group = self.heads // max(self.kv_heads, 1)
            self.k, self.v = np.repeat(self.k, group, axis=1), np.repeat(self.v, group, axis=1)
        self.q, self.k = q, self._times(self.k, w_k)
        self.additive = np.ascontiguousarray(np.broadcast_to(w_v, (self.heads, width)))

    def _call(self, q, v, keywords):
        """Attention of some rows, in the dtype of the arithmetic."""
        k, dtype = self.k, self.dtype
        if self.additive is not None or dtype_name(k.dtype) != dtype_name(v.dtype):  # projections are not rounded to 16 bits
            k, v = k.astype(dtype, copy=False), v.astype(dtype, copy=False)
        call = Call(self.backend, q, k, v, additive=self.additive, **keywords)
        self.backend.attention(call)
        return call.result()

    def _target(self):
        """The caller's `out`, checked."""
        if self._out is None:
            return None
        shape = (*self.q.shape[:3], self.v.shape[3])
        return check_out(self._out, shape[self._missing :], self.result_dtype, self.given.items())

    def _finish(self, out, lse, target, return_lse):
        out, lse = out[(0,) * self._missing], None if lse is None else lse[(0,) * self._missing]
        if target is None:
            out = out.astype(self.result_dtype, copy=False)
        else:
            target[...] = out
            out = self._out
        return (out, lse) if return_lse else out

    def solve(self, keywords):
        """Attention by these scores."""
        if keywords.get("scale") is None:
            keywords["scale"] = 1.0
        target = self._target()
        found = self._call(self.q, self.v, keywords)
        return_lse = isinstance(found, tuple)
        return self._finish(*(found if return_lse else (found, None)), target, return_lse)

    def solve_around(self, place, reach, keywords):
        """Attention to the keys within `reach` of each query's position, with a Gaussian on top of the softmax.

        The Gaussian as a bias gives the sums over the keys but another denominator: the quotient of both is put right by their lse.
        """
        if keywords.get("activation", "softmax") != "softmax":
            raise ValueError(f'activation must be "softmax" with local="predictive"; got {keywords["activation"]!r}')
        return_lse = flag("return_lse", keywords.pop("return_lse", False))
        target = self._target()
        batch, heads, q_len, _ = self.q.shape
        kv_len = self.k.shape[2]
        mask = keywords.pop("mask", None)
        if is_block_mask(mask):
            raise ValueError('mask must be an array with local="predictive"; got a BlockMask')
        if keywords.get("scale") is None:
            keywords["scale"] = 1.0
        # Everything else is checked, and what is left out filled in, by a call of no values.
        k, v = self.k.astype(self.dtype), self.v[..., :0].astype(self.dtype)
        whole = Call(self.backend, self.q, k, v, additive=self.additive, mask=mask, **keywords)
        for name in ("query_offset", "q_lengths"):
            keywords.pop(name, None)
        out, lse = np.empty((batch, heads, q_len, self.v.shape[3]), self.dtype), np.empty((batch, heads, q_len), np.float32)
        entries, mask = whole.entries, whole.visibility.mask
        start, keys = entries.kv_starts[:, None, None], np.arange(kv_len)
        position = start + (entries.kv_lengths - entries.kv_starts)[:, None, None] * place.astype(np.float64)
        step = max(_MOST_PAIRS // max(batch * heads * kv_len, 1), 1)
        for i in range(0, q_len, step):
            rows = slice(i, min(i + step, q_len))
            away = keys - position[:, :, rows, None]
            near = np.abs(away) <= reach
            shown, gauss = near, np.where(near, -2 * (away / reach) ** 2, -np.inf).astype(self.dtype)
            if mask is not None:
                here = mask[:, :, rows]
                if here.dtype == bool:
                    shown, gauss = near & here, np.where(here, gauss, -np.inf)
                else:
                    shown, gauss = np.where(near, here, -np.inf), np.where(near, gauss + here, -np.inf)
            options = dict(keywords, query_offset=entries.query_offset + i, q_lengths=np.clip(entries.q_lengths - i, 0, rows.stop - i))
            _, plain = self._call(self.q[:, :, rows], self.v[..., :0], dict(options, mask=shown, return_lse=True))
            found, lowered = self._call(self.q[:, :, rows], self.v, dict(options, mask=gauss, return_lse=True))
            with np.errstate(invalid="ignore"):
                factor = np.where(lowered == -np.inf, 1, np.exp(lowered - plain))
            out[:, :, rows], lse[:, :, rows] = found * factor[..., None], plain
        return self._finish(out, lse, target, return_lse)


def score_function(function: Callable[..., Any]) -> Any:
    """A C function for ``attention(score_function=)`` from a scalar one, by Numba: at full speed and on all threads.

    Parameters
    ----------
    function : callable
        ``f(s, b, h, i, j)``: the score `s` of query `i` and key `j`, of batch entry `b` and query head `h`, as it shall be. Plain
        arithmetic that Numba compiles; arrays it refers to become constants.

    Returns
    -------
    numba.core.ccallback.CFunc
        Keep it for as many calls as there are: to compile takes a moment.

    Notes
    -----
    ``attention(score_function=)`` takes scores after `softcap` and before `mask`, `alibi_slopes` and visibility. It may be

    - a C function of the signature ``void (float *scores, int64_t keys, int64_t batch, int64_t head, int64_t query, int64_t
      first_key, void *context)``, which changes the scores of one query and of `keys` keys that follow each other in place. It comes
      from ctypes, cffi, ``numba.cfunc`` or as a capsule that is named by its signature (as in ``__pyx_capi__`` of a Cython module).
      It is called by several threads at once, without the GIL, and for keys that are hidden as well;
    - a pair of one and its context, an array or an address;
    - any callable ``f(s, b, h, i, j)`` of NumPy arrays that broadcast to ``(rows, keys)``. It is slow, for Python is called for every run
      of keys, by one thread. What it raises reaches the caller, and nothing has been written then.

    Numba's backend calls functions in C from its kernels, and hands calls with a callable of arrays to NumPy's, as :func:`explain` says.

    Examples
    --------
    >>> slopes = fastattn.alibi_slopes(8)
    >>> @fastattn.score_function
    ... def alibi(s, b, h, i, j):
    ...     return s - slopes[h] * abs(i - j)
    >>> out = fastattn.attention(q, k, v, score_function=alibi)
    """
    if not callable(function):
        raise TypeError(f"function must be a function of (s, b, h, i, j); got {function!r}")
    from numba import carray, cfunc, njit, types

    scalar = function if hasattr(function, "py_func") else njit(error_model="numpy")(function)
    integers_of = [types.int64] * 5

    @cfunc(types.void(types.CPointer(types.float32), *integers_of, types.voidptr), error_model="numpy")
    def run(scores, keys, batch, head, query, first_key, context):
        s = carray(scores, (keys,))
        for n in range(keys):
            s[n] = scalar(s[n], batch, head, query, first_key + n)

    return run
