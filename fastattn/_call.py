"""A call of attention, validated and normalised: what every backend receives.

A `Call` has the arrays, and three parts for those who need one of them: where the entries lie (`Entries`), which query may see which key
(`Visibility`), and what is made of a product of the two (`Scores`). Each part checks the arguments that it is made of.
"""

import math
from typing import NamedTuple

import numpy as np

from . import _functions
from ._arrays import as_array
from ._check import (
    MAX_OFFSET,
    as_float32,
    broadcast_mask,
    check_dtype,
    check_out,
    dtype_name,
    finite,
    flag,
    integer,
    integers,
    is_block_mask,
    is_kernel_ready,
    kernel_ready,
    of_entries,
    seqlens,
    shares,
    spread_tail,
    take_tail_mask,
    window_sides,
)
from ._quantized import decoded, dim_of, kind_of

_MASK_DTYPES = ("bool", "float16", "bfloat16", "float32", "float64")
_PRECISIONS = ("highest", "high", "medium")
ACTIVATIONS = ("softmax", "sigmoid", "relu", "polynomial")  # in the order in which the library numbers them
_MOST_POWER = 64


class Names(NamedTuple):
    """What a function calls those arguments of attention that have other names elsewhere."""

    q: str = "q"
    k: str = "k"
    v: str = "v"
    mask: str = "mask"


NAMES = Names()


def known_keywords(function, keywords, without=()):
    """Raise unless `keywords` are some of those of attention, and none of `without`."""
    for name in keywords:
        if name not in Call.__init__.__kwdefaults__ or name in without:
            raise TypeError(f"{function}() has no argument {name}")


class PagedRows:
    """The keys or values of one head of an entry in pages: gathered when they are indexed by the numbers of keys, as an array is."""

    def __init__(self, pages, table, length):
        self._pages, self._table = pages, table
        self.shape = length, pages.shape[2]

    def __getitem__(self, keys):
        page, row = np.divmod(keys, self._pages.shape[1])
        return self._pages[self._table[page], row]


class QuantizedRows:
    """The keys or values of one head of an entry, quantised: numbers when they are indexed."""

    def __init__(self, rows, dim):
        self._rows = rows
        self.shape = rows.shape[0], dim

    def __getitem__(self, keys):
        return decoded(self._rows[keys])


class Entry(NamedTuple):
    """What is one entry's of a call: views, but for keys and values that are in pages or quantised, which have an object for each head."""

    q: np.ndarray  # (Hq, Lq, Dk), and so on
    k: np.ndarray | list[PagedRows] | list[QuantizedRows]
    v: np.ndarray | list[PagedRows] | list[QuantizedRows]
    out: np.ndarray
    lse: np.ndarray | None


class Entries:
    """How many queries and keys each entry has, at which positions, and where they lie in the arrays.

    Attributes
    ----------
    q_lengths, kv_lengths, kv_starts, query_offset : ndarray
        ``(B,)`` int64, defaults resolved.
    cu_seqlens_q, cu_seqlens_k : ndarray or None
        ``(B + 1,)`` int64: the first row, of `q` and of `k`, of each packed sequence and the end of the last.
    block_table : ndarray or None
        ``(B, most)`` int32, contiguous: the pages of each entry, which are there for all keys from `kv_starts` to `kv_lengths`.
    q_rows, kv_rows : int
        The query rows that an entry has room for, and the keys; of packed sequences those of all.
    """

    __slots__ = (
        "q_lengths", "kv_lengths", "kv_starts", "query_offset", "cu_seqlens_q", "cu_seqlens_k", "block_table", "q_rows", "kv_rows",
    )  # fmt: skip

    def __init__(self, q, k, names, packed, paged, query_offset, kv_lengths, kv_starts, q_lengths):
        batch, q_len, kv_len = q.shape[0], q.shape[2], k.shape[2]
        self.cu_seqlens_q = self.cu_seqlens_k = self.block_table = None
        self.q_rows, self.kv_rows = q_len, kv_len
        if paged is not None:
            block_table, cu_seqlens_q = paged
            self.block_table = _pages(block_table, k.shape[0])
            batch, most = self.block_table.shape
            self.cu_seqlens_q = shares("cu_seqlens_q", cu_seqlens_q, batch, q_len, names.q)
            q_len, kv_len = np.diff(self.cu_seqlens_q), most * kv_len
            self.kv_rows = kv_len
        elif packed is not None:
            self.cu_seqlens_q, self.cu_seqlens_k = (
                seqlens(name, table, total, of)
                for name, table, total, of in zip(("cu_seqlens_q", "cu_seqlens_k"), packed, (q_len, kv_len), names)
            )
            batch = len(self.cu_seqlens_q) - 1
            if len(self.cu_seqlens_k) != batch + 1:
                raise ValueError(f"cu_seqlens_k must have as many entries as cu_seqlens_q, {batch + 1}; got {len(self.cu_seqlens_k)}")
            q_len, kv_len = np.diff(self.cu_seqlens_q), np.diff(self.cu_seqlens_k)

        if kv_lengths is None:
            self.kv_lengths = of_entries(batch, kv_len)
        else:
            self.kv_lengths = integers("kv_lengths", kv_lengths, batch, 0, kv_len)
        self.kv_starts = np.zeros(batch, np.int64) if kv_starts is None else integers("kv_starts", kv_starts, batch, 0, kv_len)
        if kv_starts is not None and (self.kv_starts > self.kv_lengths).any():
            raise ValueError(f"kv_starts must be at most kv_lengths, {self.kv_lengths.tolist()}; got {kv_starts!r}")
        if paged is not None:
            self._check_pages(k, names)
        self.q_lengths = of_entries(batch, q_len) if q_lengths is None else integers("q_lengths", q_lengths, batch, 0, q_len)
        if query_offset is None:
            self.query_offset = self.kv_lengths - self.q_lengths
        else:
            self.query_offset = integers("query_offset", query_offset, batch, -MAX_OFFSET, MAX_OFFSET)

    def _check_pages(self, k, names):
        """Every key that an entry is said to have has a page."""
        size = k.shape[2]
        if self.block_table.size and self.block_table.min() >= 0:
            return
        column = np.arange(self.block_table.shape[1])
        wanted = (column >= self.kv_starts[:, None] // size) & (column < -(-self.kv_lengths[:, None] // size))
        absent = np.argwhere(wanted & (self.block_table < 0) & (self.kv_starts < self.kv_lengths)[:, None])
        if absent.size:
            b, n = absent[0]
            raise ValueError(
                f"block_table must name pages of {names.k}, 0 to {k.shape[0] - 1}, for all {self.kv_lengths[b]} keys of entry {b}; "
                f"its page {n} is none of them"
            )

    @property
    def q_rooms(self):
        """The query rows that each entry has in the arrays, padding included, ``(B,)``."""
        return np.full(len(self.q_lengths), self.q_rows) if self.cu_seqlens_q is None else np.diff(self.cu_seqlens_q)

    @property
    def pairs(self):
        """All (row, key) pairs of a head, seen or not, padding included."""
        return int((self.q_rooms * (self.kv_rows if self.cu_seqlens_k is None else np.diff(self.cu_seqlens_k))).sum())

    def queries_of(self, b):
        """Where the rows of entry `b` are in an array of all queries: their place on the batch axis, and a slice of rows."""
        return _place(b, self.cu_seqlens_q)

    def keys_of(self, b):
        """Where they are in an array of all keys, which are not in pages."""
        return _place(b, self.cu_seqlens_k)


def _place(b, table):
    return (b, slice(None)) if table is None else (0, slice(int(table[b]), int(table[b + 1])))


def _pages(block_table, pages):
    """A private table of pages, int32, in which -1 is whatever names none."""
    table = as_array("block_table", block_table)
    if table.dtype.kind not in "iu":
        raise TypeError(f"block_table must hold ints; got {table.dtype}")
    if table.ndim != 2:
        raise ValueError(f"block_table must have shape (B, most_pages); got {table.shape}")
    if not (table.size and table.min() >= 0 and table.max() < min(pages, 2**31)):
        table = np.where((table >= 0) & (table < min(pages, 2**31)), table.astype(np.int64), -1)
    return np.array(table, np.int32, order="C")


class Visibility:
    """Which query may see which key, beyond what the lengths of the entries say. Rules compose, none switches another off.

    Attributes
    ----------
    causal : bool
    window : tuple of int
        ``(left, right)``; -1 is unbounded.
    mask : ndarray or None
        A view broadcast to ``(B, Hq, Lq, Lk)``: bool, float16, bfloat16, float32 or float64. Its rows are those of `q`, packed or not.
        Numbers are added to scores as well; -inf hides a key.
    block_mask : BlockMask or None
    indices : ndarray or None
        ``(B, Hkv, Lq, n)`` int32 or int64, the last axis contiguous: the keys that each row has chosen, -1 for none. Their values are
        for the backend to check (`Call.check_indices`), unless the library does it.
    """

    __slots__ = "causal", "window", "mask", "block_mask", "indices"

    def __init__(self, causal, window):
        self.causal, self.window = flag("causal", causal), window_sides(window)
        self.mask = self.block_mask = self.indices = None

    def take_mask(self, name, mask, shape):
        """Keep a block mask as it is, or a dense one as a broadcast view; the array, if it is one."""
        if is_block_mask(mask):
            fits = len(mask.shape) == 4 and all(m in (1, n) for m, n in zip(mask.shape[:2], shape))
            if not fits or tuple(mask.shape[2:]) != shape[2:]:
                wanted = f"a BlockMask for {shape}, 1 standing for any batch size or heads"
                raise ValueError(f"{name} must be {wanted}; got {mask.shape}")
            if self.indices is not None:
                raise ValueError(f"{name} must be an array where keys are chosen by indices, which do what a BlockMask does")
            self.block_mask = mask
            return None
        array = given = as_array(name, mask)
        if dtype_name(array.dtype) not in _MASK_DTYPES:
            hint = f": give {name}.astype(bool), if what is not 0 is visible" if array.dtype.kind in "iu" else ""
            raise TypeError(f"{name} must be a BlockMask or an array of {', '.join(_MASK_DTYPES)}; got {array.dtype}{hint}")
        if not (array.dtype.isnative and array.flags.aligned):
            array = np.array(array, dtype=array.dtype.newbyteorder("="), subok=False)
        self.mask = broadcast_mask(name, array, shape)
        return given

    def take_tail(self, tail_mask, entries, num_heads):
        """Keep who sees whom among the last keys of sequences in pages, which then have as many queries each, as a mask of all."""
        q_len = entries.q_rooms
        if (q_len != q_len[:1]).any():
            raise ValueError(f"tail_mask must be None where sequences have different numbers of queries; these have {q_len.tolist()}")
        tail = take_tail_mask(tail_mask, int(q_len[0]) if len(q_len) else 0, entries.kv_lengths)
        mask = spread_tail(tail, entries.kv_lengths, np.arange(entries.kv_rows))
        rows = np.broadcast_to(mask, (len(q_len), *mask.shape[1:])).reshape(-1, entries.kv_rows)
        self.mask = np.broadcast_to(rows, (1, num_heads, *rows.shape))

    def take_indices(self, indices, shape, rank, packed):
        """Keep a private copy of lists for ``(B, Hkv, Lq)``, nothing of which but its shape and dtype has been checked."""
        array = as_array("indices", indices)
        if array.dtype.kind not in "iu":
            raise TypeError(f"indices must hold ints; got {array.dtype}")
        batch, heads, rows = shape
        lead = (rows, heads) if packed else shape[4 - rank :]
        of_heads = 1 if packed or rank == 4 else 0
        shared = tuple(1 if axis == of_heads and rank > 2 else n for axis, n in enumerate(lead))
        if array.ndim != len(lead) + 1 or array.shape[:-1] not in (lead, shared):
            wanted = ", ".join(map(str, lead))
            hint = f", or 1 in the place of {heads} heads" if heads > 1 else ""
            raise ValueError(f"indices must have shape ({wanted}, n){hint}; got {array.shape}")
        array = np.array(array, array.dtype if array.dtype in (np.int32, np.int64) else np.int64, order="C", subok=False)
        array = array[(None,) * (4 - array.ndim)]
        self.indices = np.broadcast_to(array.swapaxes(1, 2) if packed else array, (batch, heads, rows, array.shape[3]))


class Scores:
    """What becomes of the product of a query and a key: first a score, and of the scores of a row weights.

    Attributes
    ----------
    scale, softcap : float
        Finite; a softcap of 0 is none.
    alibi_slopes : ndarray or None
        A finite float32 view broadcast to ``(B, Hq)``.
    additive : ndarray or None
        ``(Hq, A)``, contiguous, of the dtype that scores have: these are ``additive . tanh(q + k)`` in place of ``q . k``.
    function : ScoreFunction or None
    sinks : ndarray or None
        ``(Hq,)`` float32, contiguous; finite, or -inf for none in that head.
    activation : str
        One of `ACTIVATIONS`. But for "softmax" there are neither `lse` nor `sinks`.
    activation_bias : ndarray or None
        ``(B,)`` float32, with "sigmoid" and when it is given.
    power : int
    """

    __slots__ = "scale", "softcap", "alibi_slopes", "additive", "function", "sinks", "activation", "activation_bias", "power"

    def __init__(
        self, batch, num_heads, head_dim, scale, softcap, alibi_slopes, sinks, activation, activation_bias, power, function, additive,
        return_lse,
    ):  # fmt: skip
        self.scale = 1.0 / math.sqrt(max(head_dim, 1)) if scale is None else finite("scale", scale)
        self.softcap = 0.0 if softcap is None else finite("softcap", softcap)
        if self.softcap < 0:
            raise ValueError(f"softcap must be positive, or None or 0 for none; got {softcap!r}")
        self.alibi_slopes = self.sinks = self.activation_bias = None
        if alibi_slopes is not None:
            slopes = as_float32("alibi_slopes", alibi_slopes)
            if slopes.shape not in ((num_heads,), (batch, num_heads)):
                raise ValueError(f"alibi_slopes must have shape ({num_heads},) or {(batch, num_heads)}; got {slopes.shape}")
            if not np.isfinite(slopes).all():
                raise ValueError("alibi_slopes must be finite; got NaN or inf")
            self.alibi_slopes = np.broadcast_to(slopes, (batch, num_heads))
        if sinks is not None:
            self.sinks = as_float32("sinks", sinks)
            if self.sinks.shape != (num_heads,):
                raise ValueError(f"sinks must have shape ({num_heads},), one logit for each query head; got {self.sinks.shape}")
            if not (self.sinks < np.inf).all():
                raise ValueError("sinks must be finite, or -inf for a head without one; got NaN or inf")
        self.function = None if function is None else _functions.take(function)
        self.additive = additive
        if not isinstance(activation, str) or activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {ACTIVATIONS}; got {activation!r}")
        self.activation, self.power = activation, integer("power", power, 1)
        if self.power > _MOST_POWER:
            raise ValueError(f"power must be at most {_MOST_POWER}; got {power}")
        if activation_bias is not None:
            self.activation_bias = self._take_bias(activation_bias, batch)
        if activation != "softmax":
            if return_lse:
                raise ValueError(f"return_lse must be False where no softmax has a denominator; got True with activation={activation!r}")
            if sinks is not None:
                raise ValueError(f"sinks must be None where no softmax has a denominator; got some with activation={activation!r}")

    def _take_bias(self, bias, batch):
        if self.activation != "sigmoid":
            raise ValueError(f'activation_bias must be None but for activation="sigmoid"; got {bias!r} with {self.activation!r}')
        bias = as_float32("activation_bias", bias)
        if bias.shape not in ((), (batch,)):
            raise ValueError(f"activation_bias must be a number or have shape ({batch},), one for each entry; got {bias.shape}")
        if not np.isfinite(bias).all():
            raise ValueError("activation_bias must be finite; got NaN or inf")
        return np.full(batch, bias, np.float32)


class Call:
    """One call of attention, validated and normalised.

    Sequences may be packed: then the arrays have a batch axis of 1, and the rows of all sequences one after the other. Keys and
    values may be in pages: then the first axis of theirs is that of pages, and the third the rows of a page.

    Attributes
    ----------
    q, k, v : ndarray
        ``(B, Hq, Lq, Dk)``, ``(B, Hkv, Lk, Dk)``, ``(B, Hkv, Lk, Dv)``; native byte order, aligned, the last axis contiguous,
        any other strides. Of quantised keys and values the last axis is one record, whatever `Dk` and `Dv` are.
    out : ndarray
        ``(B, Hq, Lq, Dv)`` of the dtype of `q`, for the backend to fill.
    lse : ndarray or None
        ``(B, Hq, Lq)`` float32, for the backend to fill.
    entries : Entries
    visibility : Visibility
    scores : Scores
    precision : str
    invariant : bool
        The bits of a row depend on its query, the keys it sees, their distance from `kv_starts` and the rules alone.
    segments : ndarray or None
        ``(B, Lk)`` int32, with `cu_seqlens_k` ``(1, total_k)``, the last axis contiguous, from -1 to ``num_segments - 1``: `out` is
        float32, ``(B, Hq, Lq, num_segments)``, and holds the weights of each segment's keys in place of values times weights. Values are
        not read then.
    num_segments : int
    """

    __slots__ = (
        "q", "k", "v", "out", "lse", "entries", "visibility", "scores", "precision", "invariant", "segments", "num_segments",
        "_rank", "_given_out", "_copy_to",
    )  # fmt: skip

    def __init__(
        self, backend, q, k, v, names=NAMES, packed=None, paged=None, tail_mask=None, additive=None, indices=None, segments=None,
        num_segments=0, *, mask=None, causal=False, window=None, query_offset=None, kv_lengths=None, kv_starts=None, q_lengths=None,
        scale=None, softcap=None, alibi_slopes=None, sinks=None, precision="highest", activation="softmax", activation_bias=None, power=3,
        score_function=None, invariant=False, return_lse=False, out=None,
    ):  # fmt: skip
        given = {name: as_array(name, array) for name, array in zip(names, (q, k, v))}
        self._take_qkv(given, backend, packed is not None, paged is not None)
        _, num_heads, q_rows, head_dim = self.q.shape
        self.segments, self.num_segments = segments, num_segments
        self.entries = entries = Entries(self.q, self.k, names, packed, paged, query_offset, kv_lengths, kv_starts, q_lengths)
        packed, return_lse = entries.cu_seqlens_q is not None, flag("return_lse", return_lse)
        self.visibility = visibility = Visibility(causal, window)
        self.scores = Scores(
            len(entries.q_lengths), num_heads, head_dim, scale, softcap, alibi_slopes, sinks, activation, activation_bias, power,
            score_function, additive, return_lse,
        )  # fmt: skip
        if not isinstance(precision, str) or precision not in _PRECISIONS:
            raise ValueError(f"precision must be one of {_PRECISIONS}; got {precision!r}")
        self.precision = precision
        self.invariant = flag("invariant", invariant)

        if indices is not None:
            visibility.take_indices(indices, (self.q.shape[0], self.k.shape[1], q_rows), self._rank, packed)
        if tail_mask is not None:
            visibility.take_tail(tail_mask, entries, num_heads)
        if mask is not None:
            given[names.mask] = visibility.take_mask(names.mask, mask, (*self.q.shape[:3], self.k.shape[2]))
        self.lse = np.empty(self.q.shape[:3], np.float32) if return_lse else None
        self._take_out(out, given, names, packed)

    def _take_qkv(self, given, backend, packed, paged):
        """Check the three arrays against each other and keep them with rank 4."""
        (q_name, q), (k_name, k), (v_name, v) = given.items()
        self._rank = q.ndim
        if (packed or paged) and q.ndim != 3:
            raise ValueError(f"{q_name} must have shape (total_q, Hq, D); got {q.shape}")
        if q.ndim not in (2, 3, 4):
            raise ValueError(f"{q_name} must have shape (B, Hq, Lq, D), (Hq, Lq, D) or (Lq, D); got {q.shape}")
        for name, array in ((k_name, k), (v_name, v)):
            if paged and (array.ndim != 4 or array.shape[1] == 0):
                raise ValueError(f"{name} must have shape (num_pages, page_size, Hkv, D) and pages of 1 row or more; got {array.shape}")
            if array.ndim != q.ndim and not paged:
                raise ValueError(f"{name} must have as many axes as {q_name}, {q.ndim}; got shape {array.shape}")
        quantized = kind_of(k.dtype) is not None
        for name, array in given.items():
            if name == q_name or not kind_of(array.dtype):
                check_dtype(name, array, backend)
            elif array.shape[-1] != 1:
                raise ValueError(f"{name} must have one record for each row, (..., 1), as quantize() makes it; got shape {array.shape}")
        if dtype_name(v.dtype) != dtype_name(k.dtype) and not (quantized and kind_of(v.dtype)):
            raise TypeError(f"{v_name} must have the dtype of {k_name}, {k.dtype}; got {v.dtype}")
        if dtype_name(q.dtype) != dtype_name(k.dtype) and q.itemsize <= k.itemsize and not quantized:
            raise TypeError(f"{q_name} must have the dtype of {k_name} and {v_name}, {k.dtype}, or a wider one; got {q.dtype}")

        self.q, self.k, self.v = kernel_ready(q), kernel_ready(k), kernel_ready(v)
        if q.ndim < 4:
            lift = (None,) * (4 - q.ndim)
            self.q = self.q[lift]
            if not paged:
                self.k, self.v = self.k[lift], self.v[lift]
        if packed or paged:
            self.q, self.k, self.v = self.q.swapaxes(1, 2), self.k.swapaxes(1, 2), self.v.swapaxes(1, 2)
        batch, num_heads, _, head_dim = self.q.shape
        num_kv_heads, kv_len = self.k.shape[1:3]
        if self.k.shape[0] != batch and not paged:
            raise ValueError(f"{k_name} must have the batch size of {q_name}, {batch}; got shape {k.shape}")
        if dim_of(self.k) != head_dim:
            got = f"rows of {dim_of(k)}" if quantized else f"shape {k.shape}"
            raise ValueError(f"{k_name} must have the head size of {q_name}, {head_dim}; got {got}")
        if num_heads % num_kv_heads if num_kv_heads else num_heads:
            divides = f"a number of heads that divides that of {q_name}, {num_heads}"
            raise ValueError(f"{k_name} must have {divides}; got {num_kv_heads}, shape {k.shape}")
        if self.v.shape[:3] != self.k.shape[:3]:
            raise ValueError(f"{v_name} must have the shape of {k_name}, {k.shape}, in all but the last axis; got {v.shape}")

    def _take_out(self, out, given, names, packed):
        """Where the backend writes: into the caller's array if that is as backends want it."""
        num_heads, q_rows = self.q.shape[1:3]
        v_head_dim = dim_of(self.v) if self.segments is None else self.num_segments
        shape = (1, q_rows, num_heads, v_head_dim) if packed else (*self.q.shape[:3], v_head_dim)  # packed rows come before heads
        self._given_out, self._copy_to = out, None
        if out is None:
            self.out = np.empty(shape, self.q.dtype if self.segments is None else np.float32)
        else:
            given |= {"alibi_slopes": self.scores.alibi_slopes, "sinks": self.scores.sinks}
            inputs = [(name, array) for name, array in given.items() if array is not None]
            target = check_out(out, shape[4 - self._rank :], self.q.dtype, inputs, names.q)
            ready = is_kernel_ready(target)
            if self.scores.function is not None and self.scores.function.callable is not None:
                ready = False  # it may raise, and then nothing is written
            target = target[(None,) * (4 - self._rank)]
            self.out = target if ready else np.empty(shape, self.q.dtype)
            self._copy_to = None if ready else target
        if packed:
            self.out = self.out.swapaxes(1, 2)

    def mask_of(self, b):
        """The dense mask of entry `b`, ``(Hq, Lq, Lk)``."""
        place, rows = self.entries.queries_of(b)
        return self.visibility.mask[place, :, rows]

    def check_indices(self):
        """Raise unless every list of keys names such as are there, each once."""
        entries, indices = self.entries, self.visibility.indices
        heads = 1 if indices.strides[1] == 0 else indices.shape[1]
        for b, rows in enumerate(entries.q_lengths.tolist()):
            of, own = entries.queries_of(b)
            lists = indices[of, :heads, own][:, :rows]
            wrong = np.argwhere((lists < -1) | (lists >= entries.kv_rows))
            if wrong.size:
                place, what = tuple(wrong[0]), f"must lie between -1 and {entries.kv_rows - 1}"
            else:
                order = np.argsort(lists, axis=-1, kind="stable")
                ranked = np.take_along_axis(lists, order, axis=-1)
                again = np.argwhere((ranked[..., 1:] == ranked[..., :-1]) & (ranked[..., 1:] >= 0))
                if not again.size:
                    continue
                h, i, n = again[0]
                place, what = (h, i, order[h, i, n + 1]), "must not name a key twice in a list"
            h, i, n = map(int, place)
            where = (b, h, i, n)[4 - self._rank :] if entries.cu_seqlens_q is None else (own.start + i, h, n)
            raise ValueError(f"indices {what}; got {lists[place]} at {where}")

    def entry(self, b):
        """What belongs to entry `b` of the arrays, without the batch axis: an `Entry`."""
        entries = self.entries
        (place, rows), lse = entries.queries_of(b), self.lse
        if entries.block_table is None:
            of, keys = entries.keys_of(b)
            k, v = (x[of, :, keys] for x in (self.k, self.v))
        else:
            table, length = entries.block_table[b], int(entries.kv_lengths[b])
            k, v = ([PagedRows(x[:, h], table, length) for h in range(x.shape[1])] for x in (self.k, self.v))
        if kind_of(self.k.dtype):
            k, v = ([QuantizedRows(x, dim_of(of)) for x in heads] for heads, of in ((k, self.k), (v, self.v)))
        return Entry(self.q[place, :, rows], k, v, self.out[place, :, rows], None if lse is None else lse[place, :, rows])

    def clear_padding(self):
        """Fill the rows beyond `q_lengths`, which no backend computes."""
        lengths = self.entries.q_lengths
        for b in np.flatnonzero(lengths < self.entries.q_rooms):
            entry = self.entry(b)
            entry.out[:, lengths[b] :] = 0
            if entry.lse is not None:
                entry.lse[:, lengths[b] :] = -np.inf

    def result(self):
        """What the caller is given once the backend has filled `out` and `lse`, in the rank that `q` had."""
        out, lse = self.out, self.lse
        if self.entries.cu_seqlens_q is not None:
            out = out.swapaxes(1, 2)
        if self._copy_to is not None:
            self._copy_to[...] = out
        for _ in range(4 - self._rank):
            out, lse = out[0], None if lse is None else lse[0]
        if self._given_out is not None:
            out = self._given_out
        return out if lse is None else (out, lse)
