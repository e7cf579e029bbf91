"""Which rows of a matrix make a sequence."""

from __future__ import annotations

import math

import numpy as np

from .._check import as_array, integers, seqlens
from ..attention import attention
from ..varlen import attention_varlen


class Rows:
    """Sequences whose rows are those of one matrix, one sequence after the other.

    `lengths`, ``(B,)``, is None where all sequences have the `length` of the matrix's share; `cu_seqlens` is None unless rows are
    packed. Padded rows are packed by `pick` and padded again by `restore`; with ``pack=False`` (a cache or a mask then says where
    rows are) they stay.
    """

    def __init__(self, shape, lengths=None, attention_mask=None, cu_seqlens=None, pack=True, names=("lengths", "cu_seqlens")):
        """Of an array with leading axes of this shape: (B, L), (L,) or, with `cu_seqlens`, (total,)."""
        if sum(x is not None for x in (lengths, attention_mask, cu_seqlens)) > 1:
            raise TypeError("lengths, attention_mask and cu_seqlens exclude each other: each says which rows are tokens")
        self.shape, self.lengths, self.cu_seqlens, self._picked = shape, None, None, None
        if cu_seqlens is not None:
            if len(shape) != 1:
                raise ValueError(f"x must have shape (total, E) with {names[1]}; got leading axes {shape}")
            self.cu_seqlens = seqlens(names[1], cu_seqlens, shape[0], "x")
            self.batch, self.length = len(self.cu_seqlens) - 1, None
            return
        if len(shape) not in (1, 2):
            raise ValueError(f"x must have shape (B, L, E) or (L, E); got leading axes {shape}")
        self.batch, self.length = (1, *shape)[-2:]
        if attention_mask is not None:
            real = self._mask(attention_mask)
            lengths = real.sum(axis=1)
        elif lengths is not None:
            lengths = integers(names[0], lengths, self.batch, 0, self.length)
            real = np.arange(self.length) < lengths[:, None]
        if lengths is None or (lengths == self.length).all():
            return
        if not pack and attention_mask is not None and not (real[:, :-1] >= real[:, 1:]).all():
            raise ValueError("attention_mask must have its padding on the right where there is a cache or a mask")
        self.lengths = lengths
        if pack:
            self._picked = np.flatnonzero(real)
            self.cu_seqlens = np.concatenate([[0], lengths.cumsum()])

    def _mask(self, attention_mask):
        mask = as_array("attention_mask", attention_mask)
        if mask.dtype.kind not in "biu":
            raise TypeError(f"attention_mask must hold bools, or ints of which 1 is a token; got {mask.dtype}")
        if mask.shape not in (self.shape, (self.batch, self.length)):
            raise ValueError(f"attention_mask must have shape {self.shape}; got {mask.shape}")
        return mask.reshape(self.batch, self.length) != 0

    def pick(self, x):
        """The rows of an array (*shape, ...), without padding if they are packed here."""
        rows = x.reshape(math.prod(self.shape), *x.shape[len(self.shape) :])
        return rows if self._picked is None else rows[self._picked]

    def restore(self, rows):
        """An array (*shape, ...) of rows; zeros stand where padding was."""
        if self._picked is not None:
            packed, rows = rows, np.zeros((self.batch * self.length, *rows.shape[1:]), rows.dtype)
            rows[self._picked] = packed
        elif self.lengths is not None:
            padding = np.arange(self.length) >= self.lengths[:, None]
            rows[padding.reshape(-1)] = 0
        return rows.reshape(*self.shape, *rows.shape[1:])

    def positions(self, start=None):
        """The position of each row in its sequence, which begins at `start`, (B,)."""
        if self.cu_seqlens is None:
            place = np.arange(self.length)
            if start is None:
                return place if self.batch == 1 else np.tile(place, self.batch)
            return (start[:, None] + place).reshape(-1)
        begin = self.cu_seqlens[:-1] if start is None else self.cu_seqlens[:-1] - start
        return np.arange(self.cu_seqlens[-1]) - np.repeat(begin, np.diff(self.cu_seqlens))

    def ends(self):
        """All sequences' bounds, whether they are packed or not."""
        return np.arange(self.batch + 1) * self.length if self.cu_seqlens is None else self.cu_seqlens

    def split(self, rows):
        """Rows (rows, H, D) as attention takes them, (B, H, L, D): a view, or of packed sequences a copy with zeros behind them."""
        if self.cu_seqlens is None:
            return rows.reshape(self.batch, self.length, *rows.shape[1:]).swapaxes(1, 2)
        places = self._places()
        padded = np.zeros((*places.shape, *rows.shape[1:]), rows.dtype)
        padded[places] = rows
        return padded.swapaxes(1, 2)

    def join(self, heads):
        """The reverse of `split`, heads side by side: (rows, H * D)."""
        batch, count, length, dim = heads.shape
        rows = heads.swapaxes(1, 2).reshape(batch, length, count * dim)
        return rows.reshape(batch * length, count * dim) if self.cu_seqlens is None else rows[self._places()]

    def _places(self):
        """Where the rows of packed sequences are if those are padded: (B, L) bool."""
        counts = np.diff(self.cu_seqlens)
        return np.arange(counts.max(initial=0)) < counts[:, None]

    def counts(self):
        """How many rows each sequence has, (B,), or None where all have the length of the matrix's share."""
        return self.lengths if self.cu_seqlens is None else np.diff(self.cu_seqlens)

    def attend(self, keys, q, k, v, rules):
        """Attention of rows to those of `keys`: q (rows, Hq, D), k and v (keys' rows, Hkv, D) to (rows, Hq * Dv)."""
        if keys.batch != self.batch:
            raise ValueError(f"context must have as many sequences as x, {self.batch}; got {keys.batch}")
        out = np.empty((len(q), q.shape[1], v.shape[2]), q.dtype)
        if self.cu_seqlens is None and keys.cu_seqlens is None:
            attention(
                self.split(q), keys.split(k), keys.split(v), q_lengths=self.lengths, kv_lengths=keys.lengths, out=self.split(out), **rules
            )
        else:
            attention_varlen(q, k, v, self.ends(), keys.ends(), out=out, **rules)
        return out.reshape(len(q), q.shape[1] * v.shape[2])
