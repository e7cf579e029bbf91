"""Caches of keys and values: preallocated, appended in place, attended to as they lie."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import numpy as np

from ._call import known_keywords
from ._check import as_array, check_out, dtype_name, flag, integers, kernel_ready, spread_tail, take_tail_mask, window_sides
from ._quantized import KINDS, dim_of, row_dtype
from .attention import attention, merge_states
from .indexed import attention_indexed
from .inspect import mass, segments_of
from .quantized import attend_turned, check_dim, check_kind, store, store_plain, turned

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ._typing import Array, Ints

_CACHE_DTYPES = ("float32", "float16", "bfloat16")
_LEAST_ROOM = 64  # of a cache that grows
MOST_PLAIN = 64  # tokens that the short way stores


class CacheFullError(RuntimeError):
    """A cache has no room for what was to be appended; nothing has been written."""


def cache_rows(shape, head_dim, v_head_dim, dtype, v_dtype, rotate):
    """Memory for rows of keys and for those of values, in a cache of this dtype, by its name or as it is."""
    if not (isinstance(dtype, str) and dtype in KINDS):
        for name, value, wanted in (("rotate", rotate, False), ("v_dtype", v_dtype, None)):
            if value is not wanted:
                raise ValueError(f"{name} must be {wanted} in a cache that is not quantised; got {value!r} with dtype={dtype!r}")
        return tuple(np.empty((*shape, dim), _cache_dtype(dtype)) for dim in (head_dim, v_head_dim))
    v_dtype = dtype if v_dtype is None else v_dtype
    check_kind("v_dtype", v_dtype)
    check_dim("head_dim", head_dim, dtype, rotate)
    check_dim("v_head_dim", v_head_dim, v_dtype, rotate)
    return np.empty((*shape, 1), row_dtype(dtype, head_dim)), np.empty((*shape, 1), row_dtype(v_dtype, v_head_dim))


def stored_as(cache):
    """What the keys and values of a cache are, in words."""
    of_keys, of_values = dtype_name(cache.dtype), dtype_name(cache.v_dtype)
    return of_keys if of_keys == of_values else f"{of_keys} keys and {of_values} values"


def _cache_dtype(dtype):
    if dtype == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    try:
        result = np.dtype(dtype)
    except TypeError as error:
        raise TypeError(f"dtype must be one of {(*_CACHE_DTYPES, *KINDS)}; got {dtype!r}") from error
    if result.name not in _CACHE_DTYPES:
        raise TypeError(f"dtype must be one of {(*_CACHE_DTYPES, *KINDS)}; got {dtype!r}")
    return result


def size(name, value, low=0):
    """`value` as an int of at least `low`."""
    try:
        number = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} must be an int; got {value!r}") from error
    if isinstance(value, (bool, np.bool_)) or number < low:
        raise ValueError(f"{name} must be an int of at least {low}; got {value!r}")
    return number


def new_rows(name, value, shape, what):
    """New keys or values of this shape, in which -1 stands for any length, as an array that a cache can take."""
    array = as_array(name, value)
    if dtype_name(array.dtype) not in (*_CACHE_DTYPES, "float64"):
        raise TypeError(f"{name} must hold floats: float32, float16, bfloat16 or float64; got {array.dtype}")
    if array.ndim != len(shape) or any(n not in (-1, m) for n, m in zip(shape, array.shape)):
        wanted = ", ".join("n" if n == -1 else str(n) for n in shape)
        raise ValueError(f"{name} must have shape ({wanted}), {what}; got {array.shape}")
    return kernel_ready(array.astype(np.float32) if array.itemsize == 8 else array)


def check_queries(q, dim):
    """Raise unless these are queries that can be turned."""
    if dtype_name(q.dtype) not in (*_CACHE_DTYPES, "float64"):
        raise TypeError(f"q must hold floats; got {q.dtype}")
    if q.shape[-1] != dim:
        raise ValueError(f"q must have the head size of the cache, {dim}; got shape {q.shape}")


class KVCache:
    """Keys and values of a batch of sequences, each of its own length.

    The memory is there from the beginning (or grows, if that is asked for); tokens are cast to the dtype of the cache once, when
    they are appended, and read where they lie. An entry of length n gives the bits that arrays of length n give, whatever the
    capacity.

    With `window` the cache is a ring: the first `keep_first` tokens stay, and of the others the latest, in
    ``capacity - keep_first`` places. A query at position ``p`` then sees key ``j`` when ``j < keep_first`` or
    ``p - window < j <= p`` (attention sinks and a sliding window; Xiao et al., "Efficient Streaming Language Models with Attention
    Sinks", 2023), exactly what a cache of all tokens gives under that rule. What the capacity has beyond ``keep_first + window``
    is slack: that many tokens can be truncated again, or attended to by one query more in one call.

    Parameters
    ----------
    batch, num_kv_heads : int
    capacity : int or None
        Tokens that each entry has room for. None: the room doubles when it is needed (and then the tokens that are there are copied).
    head_dim : int
    v_head_dim : int, optional
        Head size of the values. Default: `head_dim`.
    dtype : {"bfloat16", "float16", "float32", "int8", "int4"} or dtype
        The last two quantise (:func:`quantize` says how); "int4" for head sizes that are a multiple of 32.
    v_dtype : {"int8", "int4"}, optional
        Of the values of a quantised cache. Default: `dtype`. Values of four bits beside keys of eight cost a model far less than keys of
        four bits do (``fastattn quality``), for an error of a key is raised to a power.
    window : int, optional
        Needs a `capacity` of at least ``keep_first + window``.
    keep_first : int
        Only with `window`.
    rotate : bool
        Of a quantised cache: multiply keys and values by a Hadamard matrix on their way in, queries likewise, and outputs back, so that a
        number which is far larger than the others of its row does not cost them their precision. The result is that without, but for
        rounding. Keys with positions (:func:`apply_rope`) are turned after those. Head sizes must be multiples of 16.

    Notes
    -----
    What a quantised cache gives is attention over the numbers that it holds (:func:`dequantize`), within float32's error; where queries
    are bfloat16 and many, those are rounded to bfloat16 first. Against attention over what was appended, scores are off by
    ``scale * |q|_1 * s / 2`` at most, where `s` is the scale of the key, and an output by half of the largest scale of the values and
    ``exp(2 e) - 1`` times the largest magnitude among them, `e` being the largest error of a score.

    Several threads may attend to one cache at once; appending to it meanwhile is for the caller to order. A cache can be pickled.

    Examples
    --------
    >>> cache = fastattn.KVCache(batch=2, num_kv_heads=8, capacity=1024, head_dim=64)
    >>> cache.append(k, v)                      # (2, 8, L, 64) each
    >>> out = cache.attend(q)                   # the queries (2, 32, L, 64) of these tokens, causal
    """

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        v_head_dim: int | None = None,
        dtype: Any = "bfloat16",
        *,
        v_dtype: str | None = None,
        window: int | None = None,
        keep_first: int = 0,
        rotate: bool = False,
    ) -> None:
        batch, heads = size("batch", batch), size("num_kv_heads", num_kv_heads)
        head_dim = size("head_dim", head_dim)
        v_head_dim = head_dim if v_head_dim is None else size("v_head_dim", v_head_dim)
        self._keep_first = size("keep_first", keep_first)
        self._window = None if window is None else size("window", window, 1)
        self._grows = capacity is None
        room = 0 if capacity is None else size("capacity", capacity)
        if self._window is None and self._keep_first:
            raise ValueError(f"keep_first must be 0 without a window; got {keep_first!r}")
        if self._window is not None and (self._grows or room < self._keep_first + self._window):
            least = self._keep_first + self._window
            raise ValueError(f"capacity must be at least keep_first + window, {least}; got {capacity!r}")
        self._rotate = flag("rotate", rotate)
        self._k, self._v = cache_rows((batch, heads, room), head_dim, v_head_dim, dtype, v_dtype, self._rotate)
        self._lengths = np.zeros(batch, np.int64)
        self._held_from = np.full(batch, self._keep_first, np.int64)  # on a ring, the oldest token behind the first ones

    def __repr__(self):
        batch, heads, room, _ = self._k.shape
        return (
            f"<KVCache of {batch} sequences with {heads} heads of {dim_of(self._k)}, {stored_as(self)}, "
            f"lengths {self._lengths.tolist()} in a capacity of {room}>"
        )

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(B,) int64: the tokens that each entry has seen. A copy."""
        return self._lengths.copy()

    @property
    def capacity(self) -> int:
        """Tokens that each entry has room for."""
        return self._k.shape[2]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the stored keys and values; of quantised ones the record of a row of keys."""
        return self._k.dtype

    @property
    def v_dtype(self) -> np.dtype[Any]:
        """Of the stored values; of quantised ones the record of a row."""
        return self._v.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, filled or not."""
        return self._k.nbytes + self._v.nbytes

    def copy(self) -> KVCache:
        """A cache of its own memory with the same content."""
        other = object.__new__(KVCache)
        other.__dict__.update(self.__dict__)
        for name in ("_k", "_v", "_lengths", "_held_from"):
            setattr(other, name, getattr(self, name).copy())
        return other

    def append(self, k: Array, v: Array, lengths: Ints | None = None) -> None:
        """Take in new tokens.

        Parameters
        ----------
        k : array_like, (B, Hkv, L, D)
            Of any strides and any of the storage types; cast to that of the cache.
        v : array_like, (B, Hkv, L, Dv)
        lengths : int or array_like of int, (B,), optional
            How many of the L tokens of each entry are real; the others are left out. Default: all.

        Raises
        ------
        CacheFullError
            If some entry has no room for its tokens. Nothing has been written then.
        ValueError
            If a number of a token that is to be quantised is NaN, infinite or too large. Nothing has been written then either.
        """
        if lengths is None and self._append_plain(k, v):
            return
        batch, heads, room, _ = self._k.shape
        k = new_rows("k", k, (batch, heads, -1, dim_of(self._k)), "(B, Hkv, L, D)")
        new_len = k.shape[2]
        v = new_rows("v", v, (batch, heads, new_len, dim_of(self._v)), "(B, Hkv, L, Dv) with the L of k")
        counts = None if lengths is None else integers("lengths", lengths, batch, 0, new_len)
        after = self._lengths + (new_len if counts is None else counts)
        longest = int(after.max(initial=0))
        caches = self._k, self._v
        if longest > room and self._window is None:
            if not self._grows:
                b = int(after.argmax())
                raise CacheFullError(
                    f"the cache has room for {room} tokens; entry {b} has {self._lengths[b]} and would get "
                    f"{after[b] - self._lengths[b]} more"
                )
            room = max(longest, 2 * room, _LEAST_ROOM)
            caches = tuple(self._with_room(cache, room) for cache in caches)

        token = np.arange(new_len)
        position = self._lengths[:, None] + token
        left_out = None if counts is None else token >= counts[:, None]
        if self._window is not None:  # nor is written what the same call would overwrite
            overwritten = (position >= self._keep_first) & (position < after[:, None] - self._ring)
            left_out = overwritten if left_out is None else left_out | overwritten
            position = np.where(position < self._keep_first, position, self._keep_first + (position - self._keep_first) % self._ring)
        slots = position + room * np.arange(batch)[:, None]
        if left_out is not None:
            slots[left_out] = -1
        parts = zip("kv", (k, v), caches)
        store([(name, rows.swapaxes(1, 2), cache.swapaxes(1, 2)) for name, rows, cache in parts], slots, self._rotate)
        (self._k, self._v), self._lengths = caches, after
        if self._window is not None:
            self._held_from = np.maximum(self._held_from, after - self._ring)

    def _append_plain(self, k, v):
        """The short way of a few ordinary tokens for which there is room; False, with nothing done, for others."""
        if self._window is not None or type(k) is not np.ndarray or k.ndim != 4:
            return False
        new_len, room, lengths = k.shape[2], self._k.shape[2], self._lengths.tolist()
        if new_len * len(lengths) > MOST_PLAIN or max(lengths, default=0) + new_len > room:
            return False
        slots = [b * room + n + i for b, n in enumerate(lengths) for i in range(new_len)]
        if not store_plain(k, v, (self._k, self._v), 4, slots):
            return False
        self._lengths = self._lengths + new_len
        return True

    def attend(
        self, q: Array, *, causal: bool = True, tail_mask: Array | None = None, indices: Array | None = None, **keywords: Any
    ) -> Any:
        """Attention of the latest tokens' queries to what the cache holds.

        Parameters
        ----------
        q : array_like, (B, Hq, Lq, D)
            The queries of the last Lq positions of each entry (of its last ``q_lengths[b]``, if these are given).
        causal : bool
        tail_mask : array_like of bool, (Lq, Lt) or (B, Lq, Lt), optional
            Who sees whom among the last Lt keys, as in a tree of drafts; keys before them are visible to all. It takes the place
            of `causal`.
        indices : array_like of int, (B, Hkv, Lq, n) or (B, 1, Lq, n), optional
            The keys that each row sees, by their positions, as in :func:`attention_indexed`. Not on a ring.
        **keywords
            As for :func:`attention`: window, scale, softcap, alibi_slopes, sinks, invariant, return_lse, out, ... but none that the
            cache knows better: query_offset and kv_lengths; nor `mask` and `invariant` on a ring.

        Returns
        -------
        out : ndarray, (B, Hq, Lq, Dv)
            Of the dtype of `q`.
        lse : ndarray, (B, Hq, Lq)
            float32, only with ``return_lse=True``.
        """
        q = self._queries("attend", q, keywords)
        if self._rotate:
            return attend_turned(self._attend, q, {"causal": causal, "tail_mask": tail_mask, "indices": indices, **keywords})
        return self._attend(q, causal, tail_mask, indices, **keywords)

    def _attend(self, q, causal, tail_mask, indices, **keywords):
        if tail_mask is not None:
            if "mask" in keywords:
                raise TypeError("attend() has either mask or tail_mask")
            tail_mask, causal = take_tail_mask(tail_mask, q.shape[2], self._lengths), False
        if self._window is not None:
            if indices is not None:
                raise ValueError("indices must be None on a ring, whose places are not the keys' positions; got some")
            return self._attend_ring(q, flag("causal", causal), tail_mask, keywords)
        longest = int(self._lengths.max(initial=0))
        if tail_mask is not None:
            keywords["mask"] = spread_tail(tail_mask, self._lengths, np.arange(longest))
        if (self._lengths != longest).any():
            keywords["kv_lengths"] = self._lengths
        k, v = self._k[:, :, :longest], self._v[:, :, :longest]
        if indices is not None:
            return attention_indexed(q, k, v, indices, causal=causal, **keywords)
        return attention(q, k, v, causal=causal, **keywords)

    def attention_mass(
        self, q: Array, segments: Array, *, num_segments: int | None = None, causal: bool = True, **keywords: Any
    ) -> NDArray[np.float32]:
        """How much of the attention of the latest tokens' queries falls on each segment of what the cache holds.

        Parameters
        ----------
        q : array_like, (B, Hq, Lq, D)
            As for :meth:`attend`.
        segments : array_like of int, (longest,) or (B, longest)
            The segment of each token, from the first on, up to the length of the longest entry; a token at -1 is in none.
        num_segments : int, optional
            Default: the largest segment and one.
        causal : bool
        **keywords
            As for :func:`fastattn.attention_mass`, but query_offset and kv_lengths. Not on a ring.

        Returns
        -------
        ndarray, (B, Hq, Lq, num_segments)
            float32.
        """
        if self._window is not None:
            raise ValueError("attention_mass() is not for a ring, whose places are not the tokens' positions")
        known_keywords("attention_mass", keywords, without=("return_lse", "out"))
        q, longest = self._queries("attention_mass", q, keywords), int(self._lengths.max(initial=0))
        shape = self._lengths.size, longest
        segments, count = segments_of(segments, num_segments, shape[1:], shape)
        rules = {"causal": causal, "kv_lengths": self._lengths, **keywords}
        return mass(turned(q) if self._rotate else q, self._k[:, :, :longest], np.broadcast_to(segments, shape), count, **rules)

    def _queries(self, method, q, keywords):
        """The queries of a call, checked, and that its keywords say nothing that the cache knows better."""
        for name in ("query_offset", "kv_lengths", *(("mask", "kv_starts") if self._window is not None else ())):
            if name in keywords:
                raise TypeError(f"{method}() has no argument {name}: the cache knows where its tokens are")
        q = as_array("q", q)
        if q.ndim != 4 or q.shape[0] != self._lengths.size:
            raise ValueError(f"q must have shape ({self._lengths.size}, Hq, Lq, {dim_of(self._k)}); got {q.shape}")
        if self._rotate:
            check_queries(q, dim_of(self._k))
        return q

    def truncate(self, lengths: Ints) -> None:
        """Forget all but the first tokens of each entry: drafts that were rejected.

        Parameters
        ----------
        lengths : int or array_like of int, (B,)
            Tokens to keep, at most those that are there. A ring can forget as many as it has slack.
        """
        new = integers("lengths", lengths, self._lengths.size, 0, int(self._lengths.max(initial=0)))
        if (new > self._lengths).any():
            b = int((new > self._lengths).argmax())
            raise ValueError(f"lengths must not exceed those that are there; entry {b} has {self._lengths[b]}, got {new[b]}")
        if self._window is not None:
            gone = np.maximum(new - self._window, self._keep_first) < self._held_from
            if gone.any():
                b = int(gone.argmax())
                raise ValueError(
                    f"lengths must leave a ring its window of {self._window} tokens; of entry {b} only those from "
                    f"{self._held_from[b]} on are still there, got {new[b]}"
                )
        self._lengths = new

    def reorder(self, indices: Array) -> None:
        """Let entry ``b`` become what entry ``indices[b]`` was, in place, as in a beam search.

        Parameters
        ----------
        indices : array_like of int, (B,)
            Entries may be repeated and left out.
        """
        batch = self._lengths.size
        indices = as_array("indices", indices)
        if indices.shape != (batch,):
            raise ValueError(f"indices must have shape ({batch},), one for each entry; got {indices.shape}")
        indices = integers("indices", indices, batch, 0, batch - 1)
        moved = np.flatnonzero(indices != np.arange(batch))
        sources = indices[moved]
        used = min(int(self._lengths[sources].max(initial=0)), self.capacity)
        for cache in (self._k, self._v):
            cache[moved, :, :used] = cache[sources, :, :used]
        self._lengths, self._held_from = self._lengths[indices], self._held_from[indices]

    @property
    def _ring(self):
        """Places that the latest tokens share."""
        return self.capacity - self._keep_first

    def _with_room(self, old, room):
        """A larger array with the tokens of this one."""
        used = int(self._lengths.max(initial=0))
        new = np.empty((*old.shape[:2], room, old.shape[3]), old.dtype)
        new[:, :, :used] = old[:, :, :used]
        return new

    def _attend_ring(self, q, causal, tail_mask, keywords):
        """Attention to the first tokens, the older turn of the ring and the newer one, merged.

        Of ``n`` tokens the newer turn holds the last ``w``, and row ``i`` of the older one is token ``n - w - ring + i``.
        """
        if flag("invariant", keywords.get("invariant", False)):
            raise ValueError("invariant must be False on a ring, whose parts are merged where it happens to begin; got True")
        if keywords.get("score_function") is not None:
            raise ValueError("score_function must be None on a ring, whose places are not the keys' positions; got one")
        n, first, ring = self._lengths, self._keep_first, self._ring
        activation = keywords.get("activation", "softmax")
        if activation != "softmax" and keywords.get("return_lse"):
            raise ValueError(f"return_lse must be False where no softmax has a denominator; got True with activation={activation!r}")
        if activation == "sigmoid" and keywords.get("activation_bias") is None:
            keywords["activation_bias"] = -np.log(np.maximum(n, 1))  # of all tokens, whichever part holds a key
        q_lengths = keywords.get("q_lengths")
        rows = q.shape[2] if q_lengths is None else integers("q_lengths", q_lengths, n.size, 0, q.shape[2])
        position = n - rows  # of the first query
        gone = np.maximum(position - self._window + 1, first) < self._held_from
        if gone.any():
            b = int(gone.argmax())
            raise ValueError(
                f"q must have fewer rows: entry {b} of the ring holds tokens from {self._held_from[b]} on, and its first query, at "
                f"{position[b]}, has a window of {self._window}; got {q.shape[2]} rows"
            )
        if q.shape[2] == 1 and tail_mask is None and self._all_visible(keywords):
            held = np.minimum(n, self.capacity)
            return attention(q, self._k, self._v, kv_lengths=held, **keywords)

        newer = np.where(n > self.capacity, (n - first) % ring, np.maximum(n - first, 0))
        older = np.where(n > self.capacity, ring, 0)
        left, right = window_sides(keywords.pop("window", None))
        beyond = None if right < 0 else right
        of_first = (None if left < 0 else left, beyond)
        of_ring = (self._window - 1 if left < 0 else min(left, self._window - 1), beyond)
        wanted = {name: keywords.pop(name, None) for name in ("out", "return_lse")}
        wide = q.astype(np.float32) if q.itemsize == 2 else q  # parts are rounded once, when they have been merged
        states = []
        # (places in the cache, the token in the first of them, where those begin and end that are of this part, window)
        for places, token, starts, ends, window in (
            (slice(first, None), n - newer, None, newer, of_ring),
            (slice(first, None), n - newer - ring, newer, older, of_ring),
            (slice(0, first), np.zeros_like(n), None, np.minimum(n, first), of_first),
        ):
            if states and not ends.any():
                continue
            k, v = self._k[:, :, places], self._v[:, :, places]
            if tail_mask is not None:
                keywords["mask"] = spread_tail(tail_mask, n, token[:, None] + np.arange(k.shape[2]))
            if starts is not None:
                keywords["kv_starts"] = np.minimum(starts, ends)
            state = attention(
                wide, k, v, causal=causal, window=window, query_offset=position - token, kv_lengths=ends,
                return_lse=activation == "softmax", **keywords,
            )  # fmt: skip
            if activation != "softmax":  # such parts add up, when all are divided by the same number of keys
                held = (ends - (starts if starts is not None else 0)) / np.maximum(n, 1)
                share = {"relu": held, "polynomial": np.sqrt(held)}.get(activation, np.ones_like(held))
                state = state * share[:, None, None, None].astype(state.dtype), None
            states.append(state)
            for name in ("sinks", "kv_starts"):  # a sink takes part once
                keywords.pop(name, None)
        if activation != "softmax":
            merged, lse = sum(out for out, _ in states), None
        else:
            merged, lse = merge_states(*map(list, zip(*states))) if len(states) > 1 else states[0]
        if wanted["out"] is None:
            out = merged.astype(q.dtype, copy=False)
        else:
            out = check_out(wanted["out"], merged.shape, q.dtype, (("q", q), ("the cache", self._k), ("the cache", self._v)))
            out[...] = merged
            out = wanted["out"]
        return (out, lse) if flag("return_lse", wanted["return_lse"] or False) else out

    def _all_visible(self, keywords):
        """Whether one query sees all that the ring holds, so that the order of its places does not matter."""
        position_matters = {"window", "alibi_slopes", "q_lengths", "activation"} & {name for name, x in keywords.items() if x is not None}
        oldest = np.maximum(self._lengths - self._window, self._keep_first)
        held = np.where(self._lengths > self.capacity, self._lengths - self._ring, self._keep_first)
        return not position_matters and (held == oldest).all() and (held == self._held_from).all()
