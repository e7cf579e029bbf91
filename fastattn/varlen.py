"""Attention over packed sequences: rows of all of them one after the other, nothing padded; and over keys and values in pages."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from . import runtime
from ._call import Call, Names

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Unpack

    from ._typing import Activation, Array, Ints, PackedRules, Precision, Window

_PAGED_NAMES = Names(k="k_pages", v="v_pages")


@overload
def attention_varlen(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Ints,
    cu_seqlens_k: Ints,
    *,
    return_lse: Literal[False] = False,
    out: Array | None = None,
    **rules: Unpack[PackedRules],
) -> NDArray[Any]: ...
@overload
def attention_varlen(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Ints,
    cu_seqlens_k: Ints,
    *,
    return_lse: Literal[True],
    out: Array | None = None,
    **rules: Unpack[PackedRules],
) -> tuple[NDArray[Any], NDArray[np.float32]]: ...
@overload
def attention_varlen(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Ints,
    cu_seqlens_k: Ints,
    *,
    return_lse: bool,
    out: Array | None = None,
    **rules: Unpack[PackedRules],
) -> Any: ...
def attention_varlen(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Ints,
    cu_seqlens_k: Ints,
    *,
    causal: bool = False,
    window: Window | None = None,
    query_offset: Ints | None = None,
    kv_starts: Ints | None = None,
    q_lengths: Ints | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    precision: Precision = "highest",
    activation: Activation = "softmax",
    activation_bias: Array | None = None,
    power: int = 3,
    score_function: Any = None,
    invariant: bool = False,
    return_lse: bool = False,
    out: Array | None = None,
) -> Any:
    """:func:`attention` of each of a batch of packed sequences.

    Sequence ``b`` has the query rows ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]`` and the keys ``cu_seqlens_k[b]`` to
    ``cu_seqlens_k[b + 1]``; either may be none. What it gives is bitwise what :func:`attention` gives of its rows alone, and its
    positions count from its own first key: with ``causal=True`` its last query sees its last key, unless `query_offset` says
    otherwise. Long sequences are shared among the threads, and begun first.

    Parameters
    ----------
    q : array_like, (total_q, Hq, Dk)
        Queries of all sequences: float32, float16 or bfloat16, of any strides, as in :func:`attention`.
    k : array_like, (total_k, Hkv, Dk)
        Keys. `Hq` must be a multiple of `Hkv`.
    v : array_like, (total_k, Hkv, Dv)
        Values.
    cu_seqlens_q : array_like of int, (B + 1,)
        Cumulative lengths (int32 or int64): from 0, never decreasing, ending at `total_q`.
    cu_seqlens_k : array_like of int, (B + 1,)
        The same for keys and values, ending at `total_k`.
    causal, window, scale, softcap, alibi_slopes, sinks, precision, activation, activation_bias, power, score_function, invariant
        As in :func:`attention`; `alibi_slopes` is ``(Hq,)`` or ``(B, Hq)``.
    query_offset : int or array_like of int, (B,), optional
        The position of a sequence's first query. Default: its number of keys less its number of queries.
    kv_starts, q_lengths : int or array_like of int, (B,), optional
        Padding within a sequence, as in :func:`attention`.
    return_lse : bool
        Return also the natural logarithm of the softmax denominator.
    out : array, (total_q, Hq, Dv), optional
        Where to write the result.

    Returns
    -------
    out : ndarray, (total_q, Hq, Dv)
        Of the dtype of `q`; the caller's object if `out` was given.
    lse : ndarray, (Hq, total_q)
        float32, only with ``return_lse=True``.

    Raises
    ------
    ValueError, TypeError
        If the tables begin, decrease or end otherwise, and as :func:`attention` does. Nothing is written then.

    Examples
    --------
    Three sentences of 4, 0 and 7 tokens, each attending to itself:

    >>> tokens = np.random.default_rng(0).standard_normal((11, 8, 64), np.float32)
    >>> fastattn.attention_varlen(tokens, tokens, tokens, [0, 4, 4, 11], [0, 4, 4, 11]).shape
    (11, 8, 64)
    """
    backend = runtime.backend()
    call = Call(
        backend, q, k, v, packed=(cu_seqlens_q, cu_seqlens_k), causal=causal, window=window, query_offset=query_offset,
        kv_starts=kv_starts, q_lengths=q_lengths, scale=scale, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
        precision=precision, activation=activation, activation_bias=activation_bias, power=power, score_function=score_function,
        invariant=invariant, return_lse=return_lse, out=out,
    )  # fmt: skip
    backend.attention(call)
    return call.result()


def paged_plain(q, k, v, block_table, kv_lengths, causal, indices=None):
    """The backend's short way for an equal share of ordinary queries to sequences of a pool, whose heads come before rows; None where it
    has none, or they are not ordinary."""
    return runtime._state.paged_plain(q, k, v, block_table, kv_lengths, causal, indices)


def _directly(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, but that ordinary arguments go straight to the engine."""

    @wraps(function)
    def paged_attention(q, k_pages, v_pages, block_table, kv_lengths, *, causal=False, **rules):
        if not rules and type(k_pages) is type(v_pages) is np.ndarray and k_pages.ndim == v_pages.ndim == 4:
            out = paged_plain(q, k_pages.swapaxes(1, 2), v_pages.swapaxes(1, 2), block_table, kv_lengths, causal)
            if out is not None:
                return out
        return function(q, k_pages, v_pages, block_table, kv_lengths, causal=causal, **rules)

    return paged_attention


@_directly
def paged_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    block_table: Array,
    kv_lengths: Ints,
    *,
    cu_seqlens_q: Ints | None = None,
    indices: Array | None = None,
    causal: bool = False,
    window: Window | None = None,
    query_offset: Ints | None = None,
    kv_starts: Ints | None = None,
    q_lengths: Ints | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    precision: Precision = "highest",
    activation: Activation = "softmax",
    activation_bias: Array | None = None,
    power: int = 3,
    score_function: Any = None,
    invariant: bool = False,
    tail_mask: Array | None = None,
    return_lse: bool = False,
    out: Array | None = None,
) -> Any:
    """:func:`attention` of packed queries to keys and values in pages, wherever these lie.

    Key ``j`` of sequence ``b`` is row ``j % page_size`` of page ``block_table[b, j // page_size]``, as in Kwon et al., "Efficient
    Memory Management for Large Language Model Serving with PagedAttention", 2023. Sequences may share pages. Few queries read them
    where they lie, many gather a tile at a time. Each sequence gets bitwise what :func:`attention` gives of the same keys side by
    side, whatever the size of the pages.

    Parameters
    ----------
    q : array_like, (total_q, Hq, Dk)
        Queries of all sequences, one sequence after the other: prefill and decoding may be mixed.
    k_pages : array_like, (num_pages, page_size, Hkv, Dk)
        Of any strides; pages whose heads lie one after the other, as those of :class:`PagedKVCache`, are read fastest. `Hq` must be a
        multiple of `Hkv`, and the dtype that of `q` or a narrower one.
    v_pages : array_like, (num_pages, page_size, Hkv, Dv)
    block_table : array_like of int, (B, most_pages)
        The pages of each sequence; what stands beyond its last (commonly -1) is not looked at.
    kv_lengths : int or array_like of int, (B,)
        Keys of each sequence, at most ``most_pages * page_size``.
    cu_seqlens_q : array_like of int, (B + 1,), optional
        Cumulative numbers of queries: from 0, never decreasing, ending at `total_q`. Default: each sequence has an equal share.
    indices : array_like of int, (total_q, Hkv, n) or (total_q, 1, n), optional
        The keys that each row sees, as in :func:`attention_indexed`: they count from the first of the sequence. Pages that hold none of
        them are not read.
    causal, window, query_offset, kv_starts, q_lengths, scale, softcap, alibi_slopes, sinks, precision
        As in :func:`attention_varlen`; pages that lie wholly before `kv_starts` need not be there.
    activation, activation_bias, power, score_function, invariant
        Likewise.
    tail_mask : array_like of bool, (Lq, Lt) or (B, Lq, Lt), optional
        Of sequences with Lq queries each: who sees whom among the last Lt keys, as in a tree of drafts; keys before them are visible
        to all. It takes the place of `causal`.
    return_lse : bool
        Return also the natural logarithm of the softmax denominator.
    out : array, (total_q, Hq, Dv), optional
        Where to write the result.

    Returns
    -------
    out : ndarray, (total_q, Hq, Dv)
        Of the dtype of `q`; the caller's object if `out` was given.
    lse : ndarray, (Hq, total_q)
        float32, only with ``return_lse=True``.

    Raises
    ------
    ValueError, TypeError
        If a page is not there, a length exceeds the table, and as :func:`attention_varlen` does. Nothing is written then.

    Examples
    --------
    Two sequences of 40 and 21 keys that share their first page of 16, one query each:

    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal(shape, np.float32) for shape in ((2, 8, 64), (6, 16, 2, 64), (6, 16, 2, 64)))
    >>> fastattn.paged_attention(q, k, v, [[0, 3, 5], [0, 2, -1]], [40, 21], causal=True).shape
    (2, 8, 64)
    """
    backend = runtime.backend()
    if kv_lengths is None:
        raise TypeError("kv_lengths must be an int or an integer array; got None")
    call = Call(
        backend, q, k_pages, v_pages, _PAGED_NAMES, paged=(block_table, cu_seqlens_q), tail_mask=tail_mask, indices=indices,
        causal=causal if tail_mask is None else False, window=window, query_offset=query_offset, kv_lengths=kv_lengths,
        kv_starts=kv_starts, q_lengths=q_lengths, scale=scale, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
        precision=precision, activation=activation, activation_bias=activation_bias, power=power, score_function=score_function,
        invariant=invariant, return_lse=return_lse, out=out,
    )  # fmt: skip
    backend.attention(call)
    return call.result()
