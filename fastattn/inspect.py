"""What attention looks at: scores, weights, and what becomes of them in sums and over layers.

Weights are made with NumPy on every backend, a tile of rows at a time, so that what is asked of a long sequence costs no more than it
says: the rows and heads that were chosen, or one number for each row. Sums over segments of the keys go through the engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from . import runtime
from ._call import Call, known_keywords
from ._check import as_array, integer
from ._quantized import kind_of
from .backends import numpy as _oracle

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray
    from typing_extensions import Unpack

    from ._typing import Array, Ints, Rules

_STAGES = ("raw", "softcap", "bias")


def attention_weights(
    q: Array, k: Array, *, heads: Ints | None = None, rows: Ints | slice | None = None, **keywords: Unpack[Rules]
) -> NDArray[np.float32]:
    """The probabilities of :func:`attention`, for looking at: all of them, or those of some heads and query rows.

    Computed with NumPy on every backend. What is not asked for is not computed: a few rows of a long sequence cost little.

    Parameters
    ----------
    q, k, **keywords
        As for :func:`attention`, without `return_lse` and `out`.
    heads : int or array_like of int, optional
        Query heads, in any order; negative numbers count from the last. Default: all.
    rows : int, slice or array_like of int, optional
        Query rows, likewise. Their positions are those that they have among all rows of `q`.

    Returns
    -------
    ndarray, (B, heads, rows, Lk)
        float32. A row sums to 1, to less where a sink takes its share, and to 0 where it sees no key. A single int leaves an axis
        of length 1.

    Examples
    --------
    What the last token sees in head 3:

    >>> fastattn.attention_weights(q, k, heads=3, rows=-1)
    """
    known_keywords("attention_weights", keywords, without=("return_lse", "out"))
    call = _call(q, k, keywords)
    _, num_heads, q_len, _ = call.q.shape
    heads, rows = _chosen("heads", heads, num_heads), _chosen("rows", rows, q_len)
    probabilities = np.zeros((call.q.shape[0], heads.size, rows.size, call.k.shape[2]), np.float32)
    for tile, weights in _oracle.weights(call, heads, rows):
        probabilities[tile] = weights
    return _like(probabilities, q)


def attention_scores(
    q: Array,
    k: Array,
    stage: Literal["raw", "softcap", "bias"] = "bias",
    *,
    heads: Ints | None = None,
    rows: Ints | slice | None = None,
    **keywords: Unpack[Rules],
) -> NDArray[np.float32]:
    """The scores of :func:`attention` as they are on their way to the softmax, for looking at.

    Parameters
    ----------
    q, k, **keywords
        As for :func:`attention`, without `return_lse` and `out`.
    stage : {"raw", "softcap", "bias"}
        After multiplication with `scale`; after `softcap` too; or after masks, ALiBi and everything else that hides a key, whose score
        is then -inf. At the first two stages hidden keys have the scores that they would have.
    heads, rows
        As for :func:`attention_weights`.

    Returns
    -------
    ndarray, (B, heads, rows, Lk)
        float32; float64 on the arrays of that dtype.
    """
    known_keywords("attention_scores", keywords, without=("return_lse", "out"))
    if stage not in _STAGES:
        raise ValueError(f"stage must be one of {_STAGES}; got {stage!r}")
    call = _call(q, k, keywords)
    _, num_heads, q_len, _ = call.q.shape
    heads, rows = _chosen("heads", heads, num_heads), _chosen("rows", rows, q_len)
    dtype = np.float64 if call.q.dtype == np.float64 else np.float32
    scores = np.empty((call.q.shape[0], heads.size, rows.size, call.k.shape[2]), dtype)
    for tile, some in _oracle.scores(call, stage, heads, rows):
        scores[tile] = some
    return _like(scores, q)


def attention_entropy(q: Array, k: Array, **keywords: Unpack[Rules]) -> NDArray[np.float32]:
    """The entropy of each query's weights, in nats: 0 where one key has them all, ``log(n)`` where n keys share them evenly.

    ``exp`` of it is the effective number of keys that a row looks at. Where a sink takes a share, that of the keys counts as the whole;
    a row that sees no key has 0.

    Parameters
    ----------
    q, k, **keywords
        As for :func:`attention`, without `return_lse` and `out`.

    Returns
    -------
    ndarray, (B, Hq, Lq)
        float32.
    """

    def entropy(p, position):
        return -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=1)

    known_keywords("attention_entropy", keywords, without=("return_lse", "out"))
    return _of_rows(entropy, q, k, keywords)


def attention_span(q: Array, k: Array, **keywords: Unpack[Rules]) -> NDArray[np.float32]:
    """How far each query looks: the mean distance ``|p - j|`` between its position and the keys, by its weights.

    Where a sink takes a share, that of the keys counts as the whole; a row that sees no key has 0. (Vig and Belinkov, "Analyzing the
    Structure of Attention in a Transformer Language Model", 2019.)

    Parameters
    ----------
    q, k, **keywords
        As for :func:`attention`, without `return_lse` and `out`.

    Returns
    -------
    ndarray, (B, Hq, Lq)
        float32, in tokens.
    """

    def span(p, position):
        return np.sum(p * np.abs(position[:, None] - np.arange(p.shape[1])), axis=1)

    known_keywords("attention_span", keywords, without=("return_lse", "out"))
    return _of_rows(span, q, k, keywords)


def attention_mass(
    q: Array,
    k: Array,
    segments: Array,
    *,
    num_segments: int | None = None,
    cu_seqlens_q: Ints | None = None,
    cu_seqlens_k: Ints | None = None,
    **keywords: Unpack[Rules],
) -> NDArray[np.float32]:
    """How much of each query's attention falls on each segment of the keys, without materialising the probabilities.

    Caches have a method of this name.

    Parameters
    ----------
    q, k, **keywords
        As for :func:`attention`, without `return_lse` and `out`.
    segments : array_like of int, (Lk,) or (B, Lk)
        The segment of each key, from 0; a key at -1 is in none.
    num_segments : int, optional
        Default: the largest segment and one.
    cu_seqlens_q, cu_seqlens_k : array_like of int, (N + 1,), optional
        Where packed sequences begin and end: arrays are as for :func:`attention_varlen`, ``(total, H, D)``, and so are the keywords;
        `segments` is ``(total_k,)``.

    Returns
    -------
    ndarray, (B, Hq, Lq, num_segments) or (total_q, Hq, num_segments)
        float32 sums of probabilities. Those of a row sum to what the keys that are in a segment have of it.

    Notes
    -----
    Scores are computed once, and beside the result memory is a tile for each thread, whatever the number of segments. Segments whose
    keys lie together cost least.

    Examples
    --------
    How much the last token looks at a prompt of 100 tokens, and how much at what followed:

    >>> fastattn.attention_mass(q[:, :, -1:], k, np.arange(k.shape[2]) >= 100)
    """
    known_keywords("attention_mass", keywords, without=("return_lse", "out"))
    q, k = as_array("q", q), as_array("k", k)
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        raise ValueError("cu_seqlens_q and cu_seqlens_k must be given together")
    if cu_seqlens_q is not None:
        for name in ("mask", "kv_lengths"):
            if keywords.get(name) is not None:
                raise ValueError(f"{name} must be None with cu_seqlens_q and cu_seqlens_k; got some")
        if k.ndim != 3:
            raise ValueError(f"k must have shape (total_k, Hkv, D) with cu_seqlens_k; got {k.shape}")
        segments, count = segments_of(segments, num_segments, k.shape[:1])
        return mass(q, k, segments[None], count, packed=(cu_seqlens_q, cu_seqlens_k), **keywords)
    if k.ndim not in (2, 3, 4):
        raise ValueError(f"k must have shape (B, Hkv, Lk, D), (Hkv, Lk, D) or (Lk, D); got {k.shape}")
    batch, length = k.shape[0] if k.ndim == 4 else 1, k.shape[-2]
    segments, count = segments_of(segments, num_segments, (length,), *([(batch, length)] if k.ndim == 4 else []))
    return mass(q, k, np.broadcast_to(segments, (batch, length)), count, **keywords)


def segments_of(segments, num_segments, *shapes):
    """The segments of keys, which have one of these shapes, as int32, and how many there are."""
    segments = as_array("segments", segments)
    if segments.dtype.kind not in "biu":
        raise TypeError(f"segments must hold ints; got {segments.dtype}")
    if segments.shape not in shapes:
        raise ValueError(f"segments must have shape {' or '.join(map(str, shapes))}; got {segments.shape}")
    smallest, largest = (int(segments.min()), int(segments.max())) if segments.size else (-1, -1)
    num_segments = max(largest, -1) + 1 if num_segments is None else integer("num_segments", num_segments, 0)
    if num_segments >= 2**31:
        raise ValueError(f"num_segments must be less than {2**31}; got {num_segments}")
    if smallest < -1 or largest >= num_segments:
        raise ValueError(f"segments must lie between -1 and {num_segments - 1}; got {smallest} to {largest}")
    return segments.astype(np.int32), num_segments


def mass(q, k, segments, num_segments, **keywords):
    """:func:`attention_mass` of segments that are checked, (B, Lk) or of packed keys (1, total_k), with all arguments of a `Call`."""
    call = Call(runtime.backend(), q, k, k, segments=segments, num_segments=num_segments, **keywords)
    runtime.backend().attention(call)
    return call.result()


def rollout(weights: Iterable[Array], *, residual: float = 0.5) -> NDArray[Any]:
    """What the outputs of the last layer have of each input token, if weights are followed through the layers.

    The weights of a layer, averaged over its heads, are mixed with what its residual connection passes on, and the layers are multiplied:
    ``A = (1 - residual) * mean over heads + residual * I``, with rows that sum to 1, from the first layer to the last. It is a reading
    of the model, not an explanation of it: values and feed-forward layers are left out.

    Parameters
    ----------
    weights : sequence of array_like, each (B, H, L, L), (H, L, L) or (L, L)
        The :func:`attention_weights` of each layer, the first one first.
    residual : float
        From 0 to 1.

    Returns
    -------
    ndarray, (B, L, L) or (L, L)
        float32; rows are tokens of the last layer, columns tokens of the input. (B only where the weights have it.)

    Notes
    -----
    Abnar and Zuidema, "Quantifying Attention Flow in Transformers", 2020.
    """
    if not 0 <= residual <= 1:
        raise ValueError(f"residual must lie between 0 and 1; got {residual!r}")
    layers = [as_array(f"weights[{n}]", layer) for n, layer in enumerate(weights)]
    if not layers:
        raise ValueError("weights must have 1 layer or more; got none")
    flow = None
    for n, layer in enumerate(layers):
        if layer.ndim not in (2, 3, 4) or layer.shape[-1] != layer.shape[-2]:
            raise ValueError(f"weights[{n}] must have shape (B, H, L, L), (H, L, L) or (L, L); got {layer.shape}")
        if layer.shape[:-3] + layer.shape[-2:] != layers[0].shape[:-3] + layers[0].shape[-2:]:
            raise ValueError(f"weights[{n}] must have the shape of weights[0], {layers[0].shape}, but for its heads; got {layer.shape}")
        mean = layer.astype(np.float64) if layer.ndim == 2 else layer.mean(axis=-3, dtype=np.float64)
        mixed = (1 - residual) * mean + residual * np.eye(layer.shape[-1])
        total = mixed.sum(axis=-1, keepdims=True)
        mixed /= np.where(total > 0, total, 1)
        flow = mixed if flow is None else mixed @ flow
    return flow.astype(np.float32)


def _call(q, k, keywords):
    """The validated call, for NumPy, with values that have no numbers."""
    k = as_array("k", k)
    return Call(_oracle, q, k, k if kind_of(k.dtype) else np.broadcast_to(np.zeros((), k.dtype), (*k.shape[:-1], 0)), **keywords)


def _like(result, q):
    """A result of rank 4 or 3 in the rank that `q` has."""
    return result.reshape(result.shape[4 - np.ndim(q) :])


def _chosen(name, chosen, size):
    """Indices from 0, from what may be a number, a slice, numbers, or None for all."""
    if chosen is None:
        return np.arange(size)
    if isinstance(chosen, slice):
        return np.arange(size)[chosen]
    indices = np.atleast_1d(as_array(name, chosen))
    if indices.ndim != 1 or (indices.dtype.kind not in "iu" and indices.size):
        raise TypeError(f"{name} must be an int, a slice or a list of ints; got {chosen!r}")
    indices = indices.astype(np.int64)
    if indices.size and not (-size <= indices.min() and indices.max() < size):
        raise ValueError(f"{name} must lie between {-size} and {size - 1}; got {chosen!r}")
    return indices % max(size, 1)


def _of_rows(measure, q, k, keywords):
    """``measure(p, position)`` of the weights of each row, scaled to sum to 1, where any key is seen; else 0."""
    call = _call(q, k, keywords)
    batch, num_heads, q_len, _ = call.q.shape
    result = np.zeros((batch, num_heads, q_len), np.float32)
    rows = np.arange(q_len)
    for tile, weights in _oracle.weights(call, np.arange(num_heads), rows):
        total = weights.sum(axis=1, keepdims=True)
        p = np.divide(weights, total, out=np.zeros_like(weights), where=total != 0)
        result[tile] = measure(p, rows[tile[2]] + call.entries.query_offset[tile[0]])
    return _like(result, q)
