"""Multi-head attention with its projections."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .._call import known_keywords
from .._check import integer
from ..positions import rope_table
from ..rope import apply_rope
from .dense import LayerNorm, Linear, linear
from .rows import Rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from .._typing import Array, Ints
    from ..pagedcache import PagedKVCache, Sequence

_BY_CALL = ("mask", "kv_lengths", "kv_starts", "q_lengths", "query_offset", "return_lse", "out")  # keywords that a layer has not


class Rope:
    """The angles of rotary positions for :class:`MultiHeadAttention`: tables that grow with the positions that are met.

    Parameters
    ----------
    dim : int
        Numbers of a head that are turned, from the first.
    base : float
    scaling : mapping, optional
        As :func:`fastattn.rope_table` takes them.
    interleaved : bool
        As :func:`fastattn.apply_rope` takes it.
    """

    def __init__(
        self, dim: int, base: float = 10000.0, *, scaling: Mapping[str, Any] | None = None, interleaved: bool = False
    ) -> None:
        self.dim, self.base, self.scaling, self.interleaved = dim, base, scaling, interleaved
        self._tables = rope_table(0, dim, base=base, scaling=scaling)
        kind = (scaling or {}).get("rope_type") or (scaling or {}).get("type")
        self._by_length = kind == "dynamic"  # then a longer text changes all angles

    def __repr__(self) -> str:
        return f"<Rope of {self.dim} numbers, base {self.base:g}{f', {dict(self.scaling)}' if self.scaling else ''}>"

    def tables(self, positions: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Cosines and sines (n, dim // 2) for positions (n,)."""
        if self._by_length:
            return rope_table(positions, self.dim, base=self.base, scaling=self.scaling)
        length = int(positions.max(initial=-1)) + 1
        if length > len(self._tables[0]):
            length = 1 << (length - 1).bit_length()
            self._tables = rope_table(length, self.dim, base=self.base, scaling=self.scaling)
        cos, sin = self._tables
        return cos[positions], sin[positions]


class Keys(NamedTuple):
    """Keys and values of a context, projected once: what :meth:`MultiHeadAttention.keys` returns."""

    k: NDArray[Any]
    v: NDArray[Any]
    rows: Rows


class MultiHeadAttention:
    """Attention between projections: self, cross or causal, with any grouping of heads.

    ::

        q, k, v = query(x), key(context), value(context)      split into heads; context is x in self-attention
        q, k = q_norm(q), k_norm(k)                           if given
        q, k = apply_rope(q), apply_rope(k)                   if given
        out(attention(q, k, v))

    Parameters
    ----------
    query, key, value : Linear or array_like or (array_like, array_like)
        A layer, or its weight ``(heads * head size, inputs)``, or that and its bias.
    out : Linear or array_like or (array_like, array_like)
        Weight ``(outputs, heads * head size of the values)``.
    num_heads : int
    num_kv_heads : int, optional
        Each serves ``num_heads // num_kv_heads`` query heads. Default: `num_heads`.
    q_norm, k_norm : LayerNorm or RMSNorm, optional
        Of each head, if its weight has the head size (Qwen3), or of all heads together (OLMo 2).
    rope : Rope, optional
    **rules
        Keywords of :func:`fastattn.attention` that hold for every call: `causal`, `window`, `scale`, `softcap`, `alibi_slopes`,
        `sinks`, `precision`.

    Examples
    --------
    >>> attend = layers.MultiHeadAttention(w_q, w_k, w_v, w_o, num_heads=12)
    >>> y = attend(x, lengths=[128, 77])                   # x (2, 128, 384), padded
    >>> y = attend(x, context)                             # cross-attention
    """

    def __init__(
        self,
        query: Any,
        key: Any,
        value: Any,
        out: Any,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        q_norm: LayerNorm | None = None,
        k_norm: LayerNorm | None = None,
        rope: Rope | None = None,
        **rules: Any,
    ) -> None:
        known_keywords(type(self).__name__, rules, without=_BY_CALL)
        query, key, value, self.out = linear("query", query), linear("key", key), linear("value", value), linear("out", out)
        self.num_heads = integer("num_heads", num_heads, 1)
        self.num_kv_heads = self.num_heads if num_kv_heads is None else integer("num_kv_heads", num_kv_heads, 1)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads, {self.num_heads}; got {self.num_kv_heads}")
        for name, layer, heads in (("query", query, self.num_heads), ("key", key, self.num_kv_heads), ("value", value, self.num_kv_heads)):
            if layer.outputs % heads:
                raise ValueError(f"{name} must have outputs for {heads} heads; got {layer.outputs}")
        self.head_dim, self.v_head_dim = query.outputs // self.num_heads, value.outputs // self.num_kv_heads
        if key.outputs != self.num_kv_heads * self.head_dim:
            raise ValueError(f"key must have outputs for {self.num_kv_heads} heads of {self.head_dim}; got {key.outputs}")
        if value.inputs != key.inputs:
            raise ValueError(f"value must have the inputs of key, {key.inputs}; got {value.inputs}")
        if self.out.inputs != self.num_heads * self.v_head_dim:
            raise ValueError(f"out must have inputs for {self.num_heads} heads of {self.v_head_dim}; got {self.out.inputs}")
        for name, norm, heads in (("q_norm", q_norm, self.num_heads), ("k_norm", k_norm, self.num_kv_heads)):
            if norm is not None and norm.weight.size not in (self.head_dim, heads * self.head_dim):
                raise ValueError(f"{name} must be of the head size, {self.head_dim}, or of all heads; got {norm.weight.size}")
        if rope is not None and rope.dim > self.head_dim:
            raise ValueError(f"rope must turn at most the head size, {self.head_dim}; got {rope.dim}")
        self.q_norm, self.k_norm, self.rope, self.rules = q_norm, k_norm, rope, rules
        if query.inputs == key.inputs:  # one product for all three; each alone is a part of it
            self._qkv = Linear.joined(query, key, value)
            self._q, self._kv = self._qkv.part(0, query.outputs), self._qkv.part(query.outputs, self._qkv.outputs)
        else:
            self._qkv, self._q, self._kv = None, query, Linear.joined(key, value)

    def __repr__(self) -> str:
        grouped = "" if self.num_kv_heads == self.num_heads else f", {self.num_kv_heads} of keys"
        return f"<MultiHeadAttention of {self.num_heads} heads{grouped}, head size {self.head_dim}, {self.rules}>"

    def __call__(
        self,
        x: Array,
        context: Array | Keys | None = None,
        *,
        lengths: Ints | None = None,
        attention_mask: Array | None = None,
        cu_seqlens: Ints | None = None,
        context_lengths: Ints | None = None,
        context_cu_seqlens: Ints | None = None,
        positions: Array | None = None,
        mask: Array | None = None,
        cache: Any = None,
    ) -> NDArray[Any]:
        """Attend.

        Parameters
        ----------
        x : array_like, (B, L, E), (L, E) or, with `cu_seqlens`, (total, E)
        context : array_like, (B, S, F), (S, F) or (total, F), or Keys, optional
            Where keys and values come from. Default: `x`. Positions of `rope` are for self-attention only.
        lengths : int or array_like of int, (B,), optional
            Tokens of each sequence; the rows behind them are padding.
        attention_mask : array_like of bool or int, (B, L), optional
            The same as 1 for tokens and 0 for padding, which may then be anywhere (with a `cache` or a `mask`: on the right).
        cu_seqlens : array_like of int, (B + 1,), optional
            Where packed sequences begin and end.
        context_lengths, context_cu_seqlens : optional
            The same for `context`.
        positions : array_like of int, (B, L), (L,) or (total,), optional
            For `rope`. Default: from 0 in each sequence, or from the length of the `cache`.
        mask : array_like, optional
            As :func:`fastattn.attention` has it, for sequences that are not packed: booleans, or a bias.
        cache : KVCache or Pages, optional
            To which the keys and values of `x` are appended, and whose tokens come before them. Anything with a KVCache's ``append``,
            ``attend`` and ``lengths`` will do. A `mask` is not for pages.

        Returns
        -------
        ndarray, (B, L, outputs), (L, outputs) or (total, outputs)
            Rows of padding are 0.
        """
        x = np.asarray(x)
        rows = Rows(x.shape[:-1], lengths, attention_mask, cu_seqlens, pack=are_packed(mask, cache))
        keys = None
        if context is not None:
            if cache is not None:
                raise TypeError("cache is for self-attention; the keys of a context, made once, are what keys() returns")
            keys = context if isinstance(context, Keys) else self._keys(context, context_lengths, None, context_cu_seqlens, mask is None)
        start = None if cache is None else cache.lengths
        return rows.restore(self.attend(rows.pick(x), rows, Angles(rows, start, positions), keys=keys, mask=mask, cache=cache))

    def keys(
        self, context: Array, *, lengths: Ints | None = None, attention_mask: Array | None = None, cu_seqlens: Ints | None = None
    ) -> Keys:
        """Keys and values of a context, for several calls: an encoder's output, while a decoder writes.

        Parameters
        ----------
        context : array_like, (B, S, F), (S, F) or, with `cu_seqlens`, (total, F)
        lengths, attention_mask, cu_seqlens : optional
            Which of its rows are tokens.
        """
        return self._keys(context, lengths, attention_mask, cu_seqlens, True)

    def _keys(self, context, lengths, attention_mask, cu_seqlens, pack):
        context = np.asarray(context)
        names = ("context_lengths", "context_cu_seqlens")
        rows = Rows(context.shape[:-1], lengths, attention_mask, cu_seqlens, pack, names)
        k, v = np.split(self._kv(rows.pick(context)), [self.num_kv_heads * self.head_dim], axis=1)
        k = self._normed(self.k_norm, k, self.num_kv_heads)
        return Keys(k.reshape(len(k), self.num_kv_heads, self.head_dim), v.reshape(len(v), self.num_kv_heads, self.v_head_dim), rows)

    def attend(
        self, x: NDArray[Any], rows: Rows, angles: Angles, *, keys: Keys | None = None, mask: Any = None, cache: Any = None
    ) -> NDArray[Any]:
        """The layer on the rows of a matrix (rows, E), for layers around it: no argument is checked or reshaped."""
        rules = self.rules if mask is None else {**self.rules, "mask": mask}
        q_size, k_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        if keys is not None:
            q = self._normed(self.q_norm, self._q(x), self.num_heads).reshape(len(x), self.num_heads, self.head_dim)
            return self.out(rows.attend(keys.rows, q, keys.k, keys.v, rules))
        if self._qkv is None:
            raise TypeError("context must be given: queries and keys have inputs of different sizes")
        qkv = self._qkv(x)
        q, k, v = qkv[:, :q_size], qkv[:, q_size : q_size + k_size], qkv[:, q_size + k_size :]
        q, k = self._normed(self.q_norm, q, self.num_heads), self._normed(self.k_norm, k, self.num_kv_heads)
        if self.rope is not None:
            cos, sin = angles.of(self.rope)
            together = qkv[:, : q_size + k_size].reshape(len(x), self.num_heads + self.num_kv_heads, self.head_dim).swapaxes(0, 1)
            apply_rope(together, cos, sin, interleaved=self.rope.interleaved, out=together)
        q = q.reshape(len(x), self.num_heads, self.head_dim)
        k = k.reshape(len(x), self.num_kv_heads, self.head_dim)
        v = v.reshape(len(x), self.num_kv_heads, self.v_head_dim)
        if cache is None:
            return self.out(rows.attend(rows, q, k, v, rules))
        if isinstance(cache, Pages):
            return self.out(cache.attend(rows, q, k, v, {"causal": False, **rules}).reshape(len(x), self.out.inputs))
        counts = rows.counts()
        cache.append(rows.split(k), rows.split(v), counts)
        padding = {} if counts is None else {"q_lengths": counts}
        return self.out(rows.join(cache.attend(rows.split(q), **{"causal": False, **rules}, **padding)))

    @staticmethod
    def _normed(norm, x, heads):
        """Rows of heads, each or all together normalised where they lie."""
        if norm is not None:
            each = x if norm.weight.size == x.shape[1] else x.reshape(len(x), heads, x.shape[1] // heads)
            each[...] = norm(each)
        return x

    @classmethod
    def from_torch(cls, module: Any, **rules: Any) -> MultiHeadAttention:
        """The layer that a ``torch.nn.MultiheadAttention`` is, in evaluation mode.

        Parameters
        ----------
        module : torch.nn.MultiheadAttention
            Without ``add_bias_kv`` and ``add_zero_attn``. The axes here are always ``(B, L, E)``, whatever its ``batch_first``.
        **rules
            As for the class.
        """
        from .torch import attention

        return attention(module, rules)

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Any], prefix: str = "", *, layout: str, config: Mapping[str, Any], block: int = 0, cross: bool = False
    ) -> MultiHeadAttention:
        """The attention layer of one block of a checkpoint.

        Parameters
        ----------
        state : mapping of str to array_like
            Arrays by their names in the checkpoint.
        prefix : str
            What stands before the names of the block that `layout` has, such as ``"model.layers.3."``.
        layout : str
            Whose names they are: one of ``layers.layouts.LAYOUTS``.
        config : mapping
            The checkpoint's ``config.json``.
        block : int
            Its number, for models whose blocks differ.
        cross : bool
            The attention to the encoder's output.
        """
        from .layouts import Reader

        return Reader(state, layout, config).attention(prefix, block, cross=cross)


def are_packed(mask, *caches):
    """Whether padding is taken out: a mask, and a cache of entries, say where rows are."""
    return mask is None and all(cache is None or isinstance(cache, Pages) for cache in caches)


class Pages:
    """Sequences of a :class:`fastattn.PagedKVCache` as the `cache` of a layer. A stack takes one for each block, of pools of their own.

    Parameters
    ----------
    pool : PagedKVCache
    sequences : iterable of Sequence
        One for each sequence of the rows that the layer is given, padded or packed.
    cascade : bool
        Read pages that sequences share once for all of them, as :meth:`fastattn.PagedKVCache.attend` says.

    Examples
    --------
    >>> cache = [layers.Pages(pool, [pool.new_sequence() for _ in prompts]) for pool in pools]
    >>> hidden = decoder(np.concatenate(prompts), cu_seqlens=bounds, cache=cache)
    """

    def __init__(self, pool: PagedKVCache, sequences: Iterable[Sequence], *, cascade: bool = False) -> None:
        self.pool, self.sequences, self.cascade = pool, list(sequences), cascade

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(B,) int64: the tokens of each sequence."""
        return self.pool.lengths(self.sequences)

    def attend(
        self, rows: Rows, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], rules: Mapping[str, Any]
    ) -> NDArray[Any]:
        """Append keys and values of rows, (rows, Hkv, D), and let their queries attend: (rows, Hq, Dv)."""
        if len(self.sequences) != rows.batch:
            raise ValueError(f"cache must hold {rows.batch} sequences, as many as x; got {len(self.sequences)}")
        if "mask" in rules:
            raise TypeError("mask is not for a cache of pages")
        ends = rows.ends()
        self.pool.append(self.sequences, k, v, ends)
        return self.pool.attend(self.sequences, q, ends, cascade=self.cascade, **rules)


class Angles:
    """Cosines and sines for the positions of rows, made once for all layers that turn alike."""

    def __init__(self, rows, start=None, positions=None):
        self._rows, self._start, self._positions, self._made = rows, start, positions, {}

    def positions(self):
        """(rows,) int."""
        if self._positions is None:
            return self._rows.positions(self._start)
        shape = self._rows.shape
        try:
            given = np.broadcast_to(np.asarray(self._positions), shape)
        except ValueError as error:
            raise ValueError(f"positions must have shape {shape}; got {np.shape(self._positions)}") from error
        if given.dtype.kind not in "iu" or (given.size and given.min() < 0):
            raise ValueError(f"positions must be ints of at least 0; got {self._positions!r}")
        return self._rows.pick(given)

    def of(self, rope):
        """The tables of a :class:`Rope`."""
        if rope not in self._made:
            self._made[rope] = rope.tables(self.positions())
        return self._made[rope]
