"""Attention to chosen keys, each query row's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import numpy as np

from . import runtime
from ._call import NAMES, Call, known_keywords
from ._check import (
    MAX_OFFSET,
    as_array,
    as_float32,
    check_dtype,
    flag,
    integer,
    integers,
    kernel_ready,
    most_kept,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Unpack

    from ._typing import Array, Ints, Rules


@overload
def attention_indexed(
    q: Array, k: Array, v: Array, indices: Array, *, return_lse: Literal[False] = False, out: Array | None = None, **rules: Unpack[Rules]
) -> NDArray[Any]: ...
@overload
def attention_indexed(
    q: Array, k: Array, v: Array, indices: Array, *, return_lse: Literal[True], out: Array | None = None, **rules: Unpack[Rules]
) -> tuple[NDArray[Any], NDArray[np.float32]]: ...
@overload
def attention_indexed(
    q: Array, k: Array, v: Array, indices: Array, *, return_lse: bool, out: Array | None = None, **rules: Unpack[Rules]
) -> Any: ...
def attention_indexed(q: Array, k: Array, v: Array, indices: Array, **keywords: Any) -> Any:
    """:func:`attention` in which each query row sees no keys but those that it lists.

    The keys of a list are read where they lie, once for all query heads of a kv head, and nothing else is: time and memory are those of
    attention over ``n`` keys, however many there are (DeepSeek-AI, "DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models",
    2025; Yuan et al., "Native Sparse Attention", 2025). :func:`select_keys` makes such lists.

    Parameters
    ----------
    q : array_like, (B, Hq, Lq, Dk)
        As in :func:`attention`, like `k` and `v`; rank 3 and 2 as well.
    k : array_like, (B, Hkv, Lk, Dk)
    v : array_like, (B, Hkv, Lk, Dv)
    indices : array_like of int, (B, Hkv, Lq, n) or (B, 1, Lq, n)
        The keys of each row, from 0 to ``Lk - 1``, in any order; -1 stands for none, wherever it stands. A list of its own for each kv
        head, or one for all. int32 and int64 are taken as they are. Of `q` of rank 3 ``(Hkv or 1, Lq, n)``, of rank 2 ``(Lq, n)``. The
        lists of rows beyond `q_lengths` are not looked at.
    **keywords
        As for :func:`attention`. A listed key is visible if these let it be seen as well: `causal`, `window`, `kv_starts`, `kv_lengths`
        and `mask`, which must not be a BlockMask. Positions, and with other activations the number of keys, are those of all keys.

    Returns
    -------
    out : ndarray, (B, Hq, Lq, Dv)
        Of the dtype of `q`.
    lse : ndarray, (B, Hq, Lq)
        float32, only with ``return_lse=True``: over the listed keys. Where that over all keys is known, ``exp(lse - lse_of_all)`` is the
        share of the attention that the list has covered.

    Raises
    ------
    ValueError, TypeError
        If an index is out of range or stands twice in a list, with its place; and as :func:`attention` does. Nothing is written then.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((1, heads, length, 64), np.float32) for heads, length in ((8, 1), (2, 5000), (2, 5000)))
    >>> fastattn.attention_indexed(q, k, v, [[[[17, 4999, 3, -1]]]]).shape
    (1, 8, 1, 64)
    """
    if indices is None:
        raise TypeError("indices must be an array of ints; got None")
    result = runtime._state.attention_plain(q, k, v, indices, **keywords)
    if result is not None:
        return result
    known_keywords("attention_indexed", keywords)
    backend = runtime.backend()
    call = Call(backend, q, k, v, NAMES, indices=indices, **keywords)
    backend.attention(call)
    return call.result()


class Selection(NamedTuple):
    """A checked call of :func:`select_keys`: what every backend receives."""

    q: np.ndarray  # (B, Hq, Lq, D)
    k: np.ndarray  # (B, Hkv, Lk, D), or pages (pages, Hkv, rows of a page, D)
    weights: np.ndarray | None  # (B, Hq, Lq) float32
    rectified: bool  # products below 0 count as 0
    causal: bool
    query_offset: np.ndarray  # (B,) int64
    kv_lengths: np.ndarray
    block_table: np.ndarray | None  # (B, most) int32
    block: int  # keys that are chosen together; 0 for keys one by one
    keep_first: int
    keep_recent: int
    indices: np.ndarray  # (B, Hkv, Lq, n) int32, to be filled

    @property
    def kv_len(self):
        return self.k.shape[2] * (1 if self.block_table is None else self.block_table.shape[1])


def select_keys(
    q: Array,
    k: Array,
    num_keys: int,
    *,
    weights: Array | None = None,
    causal: bool = False,
    query_offset: Ints | None = None,
    kv_lengths: Ints | None = None,
    block: int | None = None,
    keep_first: int = 0,
    keep_recent: int = 0,
) -> NDArray[np.int32]:
    """The keys that matter most to each query row, as :func:`attention_indexed` takes them.

    For query row ``i`` of the heads ``h`` of a group, which share a kv head, and key ``j``::

        s[j] = sum(weights[h, i] * max(dot(q[h, i], k[j]), 0) for h in the group)

    and the `num_keys` visible keys with the largest ``s`` are chosen, among equals those with the lower index: the indexer of [1]_, whose
    `q` and `k` are few, narrow and of their own. With `block` whole blocks are chosen, as in [2]_: by the largest ``s`` of a visible key
    of each, products below 0 being counted as they are. Scores exist for a tile of rows and keys at a time, never for all.

    Parameters
    ----------
    q : array_like, (B, Hq, Lq, D)
        Queries of the index. Also rank 3, ``(Hq, Lq, D)``, or 2. float32, float16 or bfloat16 (float64 with the NumPy backend).
    k : array_like, (B, Hkv, Lk, D)
        Keys of the index: often one head for all queries, or one for each kv head of the attention. `Hq` must be a multiple of `Hkv`; of
        the dtype of `q` or a narrower one.
    num_keys : int
        Keys to choose, with `block` a multiple of it: 2,048 in [1]_, 16 blocks of 128 in [2]_.
    weights : array_like, (Hq,), (Hq, Lq) or (B, Hq, Lq), optional
        Of heads, finite. Default: 1.
    causal : bool
        Key ``j`` is visible when ``j <= i + query_offset``.
    query_offset : int or array_like of int, (B,), optional
        The position of the first query. Default: ``kv_lengths - Lq``.
    kv_lengths : int or array_like of int, (B,), optional
        The keys of each entry. Default: ``Lk``.
    block : int, optional
        Keys of a block, from key 0 on.
    keep_first, keep_recent : int
        Keys that are chosen whatever their scores: the first of all, and the last up to the row's own position; with `block` those blocks
        that hold one of them. They count among `num_keys` and must fit into it.

    Returns
    -------
    ndarray, (B, Hkv, Lq, num_keys)
        int32: ascending, and -1 behind the last, where fewer are visible. Fewer axes for `q` of fewer. A key whose ``s`` is NaN or -inf
        is not chosen.

    Raises
    ------
    ValueError, TypeError
        As :func:`attention` does; and for what is to be kept and does not fit into `num_keys`.

    References
    ----------
    .. [1] DeepSeek-AI, "DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models", 2025
    .. [2] Lai et al., "MiniMax Sparse Attention", 2026; with more than one index head in a group their scores are summed

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> q, k = (rng.standard_normal((1, heads, length, 64), np.float32) for heads, length in ((8, 3), (1, 5000)))
    >>> fastattn.select_keys(q, k, 256, causal=True).shape
    (1, 1, 3, 256)
    """
    backend = runtime.backend()
    q, k = as_array("q", q), as_array("k", k)
    if q.ndim not in (2, 3, 4):
        raise ValueError(f"q must have shape (B, Hq, Lq, D), (Hq, Lq, D) or (Lq, D); got {q.shape}")
    if k.ndim != q.ndim:
        raise ValueError(f"k must have as many axes as q, {q.ndim}; got shape {k.shape}")
    for name, array in (("q", q), ("k", k)):
        check_dtype(name, array, backend)
    if q.dtype != k.dtype and q.itemsize <= k.itemsize:
        raise TypeError(f"q must have the dtype of k, {k.dtype}, or a wider one; got {q.dtype}")
    lift = 4 - q.ndim
    q, k = kernel_ready(q)[(None,) * lift], kernel_ready(k)[(None,) * lift]
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1:3]
    if k.shape[0] != batch or k.shape[3] != head_dim:
        raise ValueError(f"k must have the batch size and the head size of q, {batch} and {head_dim}; got shape {k.shape[lift:]}")
    if num_heads % num_kv_heads if num_kv_heads else num_heads:
        raise ValueError(f"k must have a number of heads that divides that of q, {num_heads}; got {num_kv_heads}")
    if kv_len >= 2**31:
        raise ValueError(f"k must have fewer than 2**31 keys; got {kv_len}")
    if weights is not None:
        weights = as_float32("weights", weights)
        shapes = (num_heads,), (num_heads, q_len), (batch, num_heads, q_len)
        if weights.shape not in shapes:
            raise ValueError(f"weights must have shape {', '.join(map(str, shapes[:-1]))} or {shapes[-1]}; got {weights.shape}")
        if not np.isfinite(weights).all():
            raise ValueError("weights must be finite; got NaN or inf")
        weights = np.broadcast_to(weights[:, None] if weights.ndim == 1 else weights, shapes[-1])
    kv_lengths = np.full(batch, kv_len, np.int64) if kv_lengths is None else integers("kv_lengths", kv_lengths, batch, 0, kv_len)
    if query_offset is None:
        query_offset = kv_lengths - q_len
    else:
        query_offset = integers("query_offset", query_offset, batch, -MAX_OFFSET, MAX_OFFSET)
    num_keys, unit = integer("num_keys", num_keys, 0), 1 if block is None else integer("block", block, 1)
    keep_first, keep_recent = integer("keep_first", keep_first, 0), integer("keep_recent", keep_recent, 0)
    if num_keys >= 2**24:
        raise ValueError(f"num_keys must be less than 2**24; got {num_keys}")
    if num_keys % unit:
        raise ValueError(f"num_keys must be a multiple of block, {unit}; got {num_keys}")
    if most_kept(keep_first, keep_recent, unit) > num_keys // unit:
        of = "" if block is None else f", in blocks of {unit}"
        raise ValueError(f"keep_first and keep_recent must fit into num_keys, {num_keys}{of}; got {keep_first} and {keep_recent}")
    indices = np.empty((batch, num_kv_heads, q_len, num_keys), np.int32)
    backend.select_keys(
        Selection(
            q, k, weights, block is None, flag("causal", causal), query_offset, kv_lengths, None, 0 if block is None else unit, keep_first,
            keep_recent, indices,
        )  # fmt: skip
    )
    return indices[(0,) * lift]
