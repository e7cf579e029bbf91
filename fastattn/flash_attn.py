"""flash-attn's functions, by its names, argument order, layout and defaults, on the CPU, for PyTorch's tensors and NumPy's arrays.

Layout is ``(batch, length, heads, head_dim)``, packed sequences lie one after the other in ``(total, heads, head_dim)``. The causal
mask is aligned to the bottom right corner, a window of -1 is unbounded, and ``window_size=(left, right)`` counts from the position
``i + seqlen_k - seqlen_q`` of query ``i``. Results are of the kind of the arguments. A row that sees no key gives 0, and an lse of -inf
(where flash-attn has +inf).

There is no dropout and no backward pass: both are refused. `deterministic` and `num_splits` are accepted and change nothing: results
are always the same bits. `max_seqlen_q` and `max_seqlen_k` are not needed.
"""

import sys

import numpy as np

from ._check import as_array, finite, flag, integers, seqlens
from .attention import attention as _attention
from .rope import apply_rope
from .varlen import attention_varlen, paged_attention

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


# ---- Arrays and tensors ---------------------------------------------------------------------------------------------


def _is_tensor(x):
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def _bridge(q, *others):
    """``(array, result)``: a function that makes arrays of the arguments, and one that makes results of the kind of `q`."""
    if not _is_tensor(q):
        return as_array, lambda x: x
    from . import torch

    torch.prepare(q, *filter(_is_tensor, others))
    return (lambda name, x: torch.as_array(x) if _is_tensor(x) else as_array(name, x)), torch.as_tensor


# ---- One shape for all sequences ------------------------------------------------------------------------------------


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """``flash_attn.flash_attn_func``.

    Parameters
    ----------
    q : Tensor or array_like, (B, Lq, Hq, D)
        float32, bfloat16 or float16, of any strides.
    k, v : Tensor or array_like, (B, Lk, Hkv, D), (B, Lk, Hkv, Dv)
        `Hq` must be a multiple of `Hkv`.
    dropout_p : float
        Must be 0.
    softmax_scale : float, optional
        Default: ``1 / sqrt(D)``.
    causal : bool
        Query ``i`` sees keys ``j <= i + Lk - Lq``.
    window_size : (left, right)
        Query ``i`` sees keys from ``i + Lk - Lq - left`` to ``i + Lk - Lq + right``; -1 is unbounded.
    softcap : float
        Bound of the scores; 0 is none.
    alibi_slopes : Tensor or array_like, (Hq,) or (B, Hq), optional
        ``-slope * abs(i + Lk - Lq - j)`` is added to the scores.
    deterministic : bool
        Accepted; results are deterministic always.
    return_attn_probs : bool
        Return ``(out, softmax_lse, None)``; there are no probabilities to return, as flash-attn returns them for its own tests only.

    Returns
    -------
    out : Tensor or ndarray, (B, Lq, Hq, Dv)
    softmax_lse : Tensor or ndarray, (B, Hq, Lq)
        float32.
    """
    _refuse_dropout(dropout_p)
    keywords = _rules(softmax_scale, causal, window_size, softcap, alibi_slopes)
    if _is_tensor(q):
        from . import torch

        if all(map(_is_tensor, (k, v))):  # by way of the operator, which can be compiled
            out, lse = torch.attention(*(x.transpose(1, 2) for x in (q, k, v)), return_lse=True, **keywords)
            out = out.transpose(1, 2)
            return (out, lse, None) if return_attn_probs else out
    q, k, v = (as_array(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must have shape (batch, length, heads, head_dim); got {x.shape}")
    out, lse = _dense(q, k, v, keywords)
    return (out, lse, None) if return_attn_probs else out


def _dense(q, k, v, keywords):
    """``(out, lse)`` of arrays ``(B, L, H, D)``, `out` contiguous in that order."""
    out = np.empty((*q.shape[:3], v.shape[3]), q.dtype)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return out, _attention(q, k, v, return_lse=True, out=out.swapaxes(1, 2), **keywords)[1]


def flash_attn_qkvpacked_func(
    qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """``flash_attn.flash_attn_qkvpacked_func``: :func:`flash_attn_func` of `qkv` ``(B, L, 3, H, D)``, which is not copied."""
    q, k, v = _unpack("qkv", qkv, 3, 5)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_kvpacked_func(
    q, kv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """``flash_attn.flash_attn_kvpacked_func``: :func:`flash_attn_func` of `kv` ``(B, Lk, 2, Hkv, D)``, which is not copied."""
    k, v = _unpack("kv", kv, 2, 5)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


# ---- Packed sequences -----------------------------------------------------------------------------------------------


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    """``flash_attn.flash_attn_varlen_func``: sequences of different length, packed one after the other.

    Parameters
    ----------
    q : Tensor or array_like, (total_q, Hq, D)
    k, v : Tensor or array_like, (total_k, Hkv, D), (total_k, Hkv, Dv)
        With `block_table`: pages, ``(num_pages, page_size, Hkv, D)``.
    cu_seqlens_q, cu_seqlens_k : Tensor or array_like of int, (B + 1,)
        Where sequences begin and end: from 0, non-decreasing, the last one the total (of the keys without `block_table`).
    block_table : Tensor or array_like of int, (B, most_pages), optional
        The pages of each sequence.
    max_seqlen_q, max_seqlen_k : int, optional
        Accepted, and not needed.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As in :func:`flash_attn_func`, for each sequence.

    Returns
    -------
    out : Tensor or ndarray, (total_q, Hq, Dv)
    softmax_lse : Tensor or ndarray, (Hq, total_q)
        float32, and then None, only with ``return_attn_probs=True``.
    """
    _refuse_dropout(dropout_p)
    keywords = _rules(softmax_scale, causal, window_size, softcap, alibi_slopes)
    if block_table is None and all(map(_is_tensor, (q, k, v))):
        from . import torch

        result = torch.attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, return_lse=return_attn_probs, **keywords)
        return (*result, None) if return_attn_probs else result
    array, result = _bridge(q, k, v)
    q, k, v, starts = array("q", q), array("k", k), array("v", v), array("cu_seqlens_k", cu_seqlens_k)
    if "alibi_slopes" in keywords:
        keywords["alibi_slopes"] = array("alibi_slopes", keywords["alibi_slopes"])
    starts_q, options = array("cu_seqlens_q", cu_seqlens_q), {"return_lse": return_attn_probs, **keywords}
    if block_table is None:
        out = attention_varlen(q, k, v, starts_q, starts, **options)
    else:
        total = starts[-1] if starts.ndim == 1 and starts.size else 0
        lengths = np.diff(seqlens("cu_seqlens_k", starts, total, "the pages"))
        out = paged_attention(q, k, v, array("block_table", block_table), lengths, cu_seqlens_q=starts_q, **options)
    return (result(out[0]), result(out[1]), None) if return_attn_probs else result(out)


def flash_attn_varlen_qkvpacked_func(
    qkv, cu_seqlens, max_seqlen=None, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """``flash_attn.flash_attn_varlen_qkvpacked_func``: :func:`flash_attn_varlen_func` of `qkv` ``(total, 3, H, D)``, not copied."""
    q, k, v = _unpack("qkv", qkv, 3, 4)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """``flash_attn.flash_attn_varlen_kvpacked_func``: :func:`flash_attn_varlen_func` of `kv` ``(total_k, 2, Hkv, D)``, not copied."""
    k, v = _unpack("kv", kv, 2, 4)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


# ---- A cache --------------------------------------------------------------------------------------------------------


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
    cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False,
):  # fmt: skip
    """``flash_attn.flash_attn_with_kvcache``: write new keys and values into a cache, in place, and attend to all of it.

    Parameters
    ----------
    q : Tensor or array_like, (B, Lq, Hq, D)
    k_cache, v_cache : Tensor or array, (B_cache, capacity, Hkv, D), (B_cache, capacity, Hkv, Dv)
        With `block_table`: pages, ``(num_pages, page_size, Hkv, D)``. Written where `k` and `v` are given.
    k, v : Tensor or array_like, (B, Lnew, Hkv, D), (B, Lnew, Hkv, Dv), optional
        New keys and values, written behind the first ``cache_seqlens[b]`` of entry ``b``.
    rotary_cos, rotary_sin : Tensor or array_like, (at least capacity, rotary_dim / 2), optional
        `k` is rotated by the positions ``cache_seqlens[b] + i``, `q` by the same if `causal` or a window is given, and else all of
        it by ``cache_seqlens[b]``.
    cache_seqlens : int or Tensor or array_like of int, (B,), optional
        Tokens in the cache before this call; required with `k`, otherwise by default all.
    cache_batch_idx : Tensor or array_like of int, (B,), optional
        The row of the cache for each entry.
    cache_leftpad : Tensor or array_like of int, (B,), optional
        Where the tokens of each entry begin.
    block_table : Tensor or array_like of int, (B, most_pages), optional
        The pages of each entry.
    rotary_interleaved : bool
        Rotate numbers 0 and 1, 2 and 3, ... (GPT-J) rather than the first and second half (GPT-NeoX).
    softmax_scale, causal, window_size, softcap, alibi_slopes, num_splits
        As in :func:`flash_attn_func`.
    return_softmax_lse : bool

    Returns
    -------
    out : Tensor or ndarray, (B, Lq, Hq, Dv)
    softmax_lse : Tensor or ndarray, (B, Hq, Lq)
        float32, only with ``return_softmax_lse=True``.
    """
    array, result = _bridge(q, k_cache, v_cache, k, v)
    keywords = _rules(softmax_scale, causal, window_size, softcap, alibi_slopes)
    if (k is None) != (v is None):
        raise ValueError("k and v must be given together")
    q, k_cache, v_cache = array("q", q), array("k_cache", k_cache), array("v_cache", v_cache)
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if x.ndim != 4:
            raise ValueError(f"{name} must have 4 axes; got shape {x.shape}")
    batch, q_len = q.shape[:2]
    paged = block_table is not None
    if paged and (cache_batch_idx is not None or cache_leftpad is not None):
        raise ValueError("block_table must be None where cache_batch_idx or cache_leftpad is given")
    capacity = k_cache.shape[1]
    if paged:
        block_table = array("block_table", block_table)
        capacity *= block_table.shape[-1] if block_table.ndim == 2 else 0
    if cache_seqlens is None:
        if k is not None:
            raise ValueError("cache_seqlens must be given with k: it says where k is written")
        cache_seqlens = capacity
    lengths = integers("cache_seqlens", array("cache_seqlens", cache_seqlens), batch, 0, capacity)
    new_lengths = lengths
    if k is not None:
        k, v = array("k", k), array("v", v)
        for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
            if x.ndim != 4 or x.shape[0] != batch or x.shape[2:] != cache.shape[2:] or x.shape[1] != k.shape[1]:
                raise ValueError(f"{name} must have shape ({batch}, new, {cache.shape[2]}, {cache.shape[3]}); got {x.shape}")
            if x.dtype != cache.dtype:
                raise TypeError(f"{name} must have the dtype of its cache, {cache.dtype}; got {x.dtype}")
            if not cache.flags.writeable:
                raise ValueError(f"{name}_cache must be writable")
        new_lengths = lengths + k.shape[1]
        if new_lengths.size and new_lengths.max() > capacity:
            raise ValueError(f"cache_seqlens must leave room for {k.shape[1]} new tokens of {capacity}; got {lengths.tolist()}")
    table = _pages(block_table, k_cache, batch, new_lengths) if paged else None
    rows = np.arange(batch)
    if cache_batch_idx is not None:
        rows = integers("cache_batch_idx", array("cache_batch_idx", cache_batch_idx), batch, 0, k_cache.shape[0] - 1)
    elif not paged and k_cache.shape[0] != batch:
        raise ValueError(f"k_cache must have the batch size of q, {batch}, unless cache_batch_idx is given; got {k_cache.shape}")
    starts = np.zeros(batch, np.int64)
    if cache_leftpad is not None:
        starts = np.minimum(integers("cache_leftpad", array("cache_leftpad", cache_leftpad), batch, 0, capacity), new_lengths)
    if rotary_cos is not None:
        cos, sin = array("rotary_cos", rotary_cos), array("rotary_sin", rotary_sin)
        moving = causal or tuple(window_size) != (-1, -1)
        q = _rotate(q, cos, sin, lengths[:, None] + np.arange(q_len) * moving - starts[:, None], rotary_interleaved)
        if k is not None:
            k = _rotate(k, cos, sin, lengths[:, None] + np.arange(k.shape[1]) - starts[:, None], rotary_interleaved)

    if k is not None:
        for b in range(batch):
            at = lengths[b] + np.arange(k.shape[1])
            place = (table[b, at // k_cache.shape[1]], at % k_cache.shape[1]) if paged else (rows[b], at)
            k_cache[place], v_cache[place] = k[b], v[b]

    if "alibi_slopes" in keywords:
        keywords["alibi_slopes"] = array("alibi_slopes", keywords["alibi_slopes"])
    if paged or cache_batch_idx is not None:  # rows of a cache are pages, of which each entry has one
        out, lse = paged_attention(
            q.reshape(-1, *q.shape[2:]), k_cache, v_cache, table if paged else rows[:, None], new_lengths, kv_starts=starts,
            return_lse=True, **keywords,
        )  # fmt: skip
        out, lse = out.reshape(*q.shape[:3], -1), lse.reshape(-1, batch, q_len).swapaxes(0, 1)
    else:
        out, lse = _dense(q, k_cache, v_cache, {"kv_starts": starts, "kv_lengths": new_lengths, **keywords})
    return (result(out), result(lse)) if return_softmax_lse else result(out)


# ---- Arguments ------------------------------------------------------------------------------------------------------


def _refuse_dropout(dropout_p):
    if finite("dropout_p", dropout_p) != 0.0:
        raise NotImplementedError(f"fastattn has no dropout: dropout_p must be 0; it is {dropout_p!r}")


def _rules(softmax_scale, causal, window_size, softcap, alibi_slopes):
    """flash-attn's arguments as keywords of :func:`fastattn.attention`."""
    keywords = {"causal": flag("causal", causal)}
    if softmax_scale is not None:
        keywords["scale"] = finite("softmax_scale", softmax_scale)
    try:
        left, right = (int(side) for side in window_size)
    except (TypeError, ValueError) as error:
        raise TypeError(f"window_size must be a pair (left, right) of ints; got {window_size!r}") from error
    if left >= 0 or right >= 0:
        keywords["window"] = left if left >= 0 else None, right if right >= 0 else None
    if softcap:
        keywords["softcap"] = softcap
    if alibi_slopes is not None:
        keywords["alibi_slopes"] = alibi_slopes
    return keywords


def _unpack(name, packed, count, rank):
    shape = tuple(np.shape(packed))
    if len(shape) != rank or shape[-3] != count:
        expected = f"({'batch, length' if rank == 5 else 'total'}, {count}, heads, head_dim)"
        raise ValueError(f"{name} must have shape {expected}; got {shape}")
    if not _is_tensor(packed):
        packed = as_array(name, packed)
    return [packed[..., n, :, :] for n in range(count)]


def _pages(block_table, pages, batch, lengths):
    """A checked block table: every page that the lengths need exists."""
    if block_table.ndim != 2 or block_table.shape[0] != batch or block_table.dtype.kind not in "iu":
        raise ValueError(f"block_table must be an int array ({batch}, most_pages); got {block_table.dtype} of shape {block_table.shape}")
    num_pages, page_size = pages.shape[:2]
    needed = -(-np.asarray(lengths) // max(page_size, 1))
    if needed.size and needed.max() > block_table.shape[1]:
        raise ValueError(f"block_table must have {needed.max()} pages for the longest sequence; got {block_table.shape[1]}")
    used = block_table[np.arange(block_table.shape[1]) < needed[:, None]]
    if used.size and not 0 <= used.min() <= used.max() < num_pages:
        raise ValueError(f"block_table must hold pages from 0 to {num_pages - 1}; got {used.min()} to {used.max()}")
    return block_table


def _rotate(x, cos, sin, positions, interleaved):
    """`x` (B, L, H, D) with its first ``2 * cos.shape[1]`` numbers rotated by `positions` (B, L)."""
    if positions.size and not 0 <= positions.min() <= positions.max() < len(cos):
        raise ValueError(f"rotary_cos must have a row for each position up to {positions.max()}; got {len(cos)} rows")
    return apply_rope(x.swapaxes(1, 2), cos[positions], sin[positions], interleaved=bool(interleaved)).swapaxes(1, 2)
