"""Every shape, dtype and range error of the package, in one voice, and the normal form in which backends receive a call.

A message names the argument, says what it must be and then what it was. Nothing is written before every check has passed.
"""

import functools
import math
import operator
from typing import NamedTuple

import numpy as np

from . import _functions
from ._arrays import as_array
from ._quantized import decoded, dim_of, kind_of

_FLOAT32_MAX = float(np.finfo(np.float32).max)
MAX_OFFSET = 2**56  # positions, distances and window edges then stay far inside int64
_MASK_DTYPES = ("bool", "float16", "bfloat16", "float32", "float64")
_PRECISIONS = ("highest", "high", "medium")
ACTIVATIONS = ("softmax", "sigmoid", "relu", "polynomial")  # in the order in which the library numbers them
_MOST_POWER = 64


@functools.cache
def dtype_name(dtype):
    """``dtype.name``, which NumPy works out anew each time; of the records of quantised rows, what they hold."""
    kind = kind_of(dtype)
    return dtype.name if kind is None else f"quantized {kind}"


def is_kernel_ready(array):
    """Whether an array is native, aligned and contiguous along its last axis, as backends want it."""
    contiguous = array.shape[-1] <= 1 or array.strides[-1] == array.itemsize
    return contiguous and array.flags.aligned and array.dtype.isnative


def kernel_ready(array):
    """`array`, or the one copy of it that is."""
    if is_kernel_ready(array):
        return array
    return np.array(array, dtype=array.dtype.newbyteorder("="), order="C", copy=True, subok=False)


def as_float32(name, value):
    """`value` as a native, aligned, contiguous float32 array."""
    array = as_array(name, value)
    if array.dtype.kind not in "fiu" and dtype_name(array.dtype) != "bfloat16":
        raise TypeError(f"{name} must hold real numbers; got {array.dtype}")
    return np.require(array, np.float32, "AC")


def finite(name, value):
    """`value` as a Python float that is finite in float32."""
    try:
        number = value.__float__()
    except (AttributeError, TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a real number; got {value!r}") from error
    if not abs(number) <= _FLOAT32_MAX:
        raise ValueError(f"{name} must be finite in float32; got {value!r}")
    return number


def flag(name, value):
    """`value` as a bool."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False; got {value!r}")
    return bool(value)


def integers(name, value, batch, low, high):
    """An int or an integer array ``(batch,)`` with values in [low, high], as a private int64 array ``(batch,)``.

    `high` is a number, or one for each entry.

    The copy is checked and then trusted by the backends: nobody can change a length while a kernel runs.
    """
    array = np.array(as_array(name, value))
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{name} must be an int or an integer array; got {array.dtype}")
    if array.shape not in ((), (batch,)):
        raise ValueError(f"{name} must be an int or have shape ({batch},), one entry for each batch entry; got shape {array.shape}")
    if array.size and not (low <= int(array.min()) and np.all(array <= high)):
        most = high if np.ndim(high) == 0 else f"the length of its sequence, {high.tolist()}"
        raise ValueError(f"{name} must lie between {low} and {most}; got {value!r}")
    return np.full(batch, array, np.int64)


def seqlens(name, value, total, of):
    """Where packed sequences begin and end, ``(B + 1,)``, as a private int64 array: from 0, never decreasing, ending at `total`."""
    array = np.array(as_array(name, value))
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold ints; got {array.dtype}")
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name} must have shape (B + 1,) for B sequences; got shape {array.shape}")
    if array[0] != 0:
        raise ValueError(f"{name} must begin with 0; got {array[0]}")
    falls = np.flatnonzero(array[1:] < array[:-1])
    if falls.size:
        raise ValueError(f"{name} must not decrease; got {array[falls[0]]}, {array[falls[0] + 1]} at {falls[0]}")
    if array[-1] != total:
        raise ValueError(f"{name} must end at the number of rows of {of}, {total}; got {array[-1]}")
    return array.astype(np.int64)


def shares(name, value, batch, total, of):
    """The same for a known number of sequences, by default in equal shares: ``(batch + 1,)``."""
    if value is None:
        if total % max(batch, 1) or (total and not batch):
            raise ValueError(f"{name} must be given where {of} has no equal shares of {batch} sequences; got {total} rows")
        return np.arange(batch + 1, dtype=np.int64) * (total // max(batch, 1))
    table = seqlens(name, value, total, of)
    if len(table) != batch + 1:
        raise ValueError(f"{name} must have shape ({batch + 1},) for {batch} sequences; got shape ({len(table)},)")
    return table


def integer(name, value, least=-math.inf):
    """`value` as an int of at least `least`."""
    try:
        number = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} must be an int; got {value!r}") from error
    if number < least:
        raise ValueError(f"{name} must be at least {least}; got {number}")
    return number


def window_sides(window):
    """``(left, right)`` with -1 for an unbounded side."""
    if window is None:
        return -1, -1
    try:
        left, right = window
        sides = [-1 if side is None else operator.index(side) for side in (left, right)]
    except (TypeError, ValueError) as error:
        # One number means the last n keys to some and n keys on both sides to others.
        n = window if isinstance(window, (int, np.integer)) and window > 0 else None
        both = f"({n}, {n}) for {n} on both sides"
        hint = "" if n is None else f": write ({n - 1}, 0) for a row's own key and the {n - 1} before it, {both}"
        raise TypeError(f"window must be a pair (left, right) of ints or None; got {window!r}{hint}") from error
    if min(sides) < -1:
        raise ValueError(f"window must have sides that are at least 0, or None or -1 (unbounded); got {window!r}")
    return tuple(min(side, 2 * MAX_OFFSET) for side in sides)


def known_keywords(function, keywords, without=()):
    """Raise unless `keywords` are some of those of attention, and none of `without`."""
    for name in keywords:
        if name not in Call.__init__.__kwdefaults__ or name in without:
            raise TypeError(f"{function}() has no argument {name}")


class Names(NamedTuple):
    """What a function calls those arguments of attention that have other names elsewhere."""

    q: str = "q"
    k: str = "k"
    v: str = "v"
    mask: str = "mask"


NAMES = Names()


def is_block_mask(mask):
    """Whether it is a BlockMask, which this module need not know."""
    return hasattr(type(mask), "dense_rows")


def broadcast_mask(name, array, shape, axes="(B, Hq, Lq, Lk)"):
    """A view of a dense mask that has the shape of all scores."""
    try:
        return np.broadcast_to(array, shape)
    except ValueError as error:
        padding = len(shape) == 4 and array.shape == (shape[0], shape[3])
        hint = f": of a mask of padding, (B, Lk), give {name}[:, None, None, :], or kv_lengths" if padding else ""
        raise ValueError(f"{name} must broadcast to {axes} = {shape}; got shape {array.shape}{hint}") from error


def most_kept(keep_first, keep_recent, unit):
    """In how many blocks of `unit` keys the first and the recent ones may lie, wherever the last of these does."""
    return -(-keep_first // unit) + ((keep_recent + unit - 2) // unit + 1 if keep_recent else 0)


def take_tail_mask(tail_mask, q_len, lengths):
    """A checked `tail_mask`, (1 or B, Lq, Lt), of entries with so many queries each and these numbers of keys."""
    mask, batch = as_array("tail_mask", tail_mask), len(lengths)
    if mask.dtype != bool:
        raise TypeError(f"tail_mask must hold bools; got {mask.dtype}")
    if mask.shape[:-1] not in ((q_len,), (batch, q_len)):
        raise ValueError(f"tail_mask must have shape ({q_len}, Lt) or ({batch}, {q_len}, Lt); got {mask.shape}")
    if batch and mask.shape[-1] > lengths.min():
        b = int(lengths.argmin())
        raise ValueError(f"tail_mask must not be longer than an entry; entry {b} has {lengths[b]} keys, got {mask.shape}")
    return mask if mask.ndim == 3 else mask[None]


def spread_tail(tail_mask, lengths, token):
    """The mask (B or 1, 1, Lq, Lk) that a `tail_mask` makes of keys that are these tokens, (Lk,) or (B, Lk)."""
    tail = tail_mask.shape[2]
    if (lengths == lengths[:1]).all() and token.ndim == 1:
        lengths = lengths[:1]
    place = token - (lengths[:, None] - tail)  # (B or 1, Lk), from 0 in the tail
    tail_mask = np.concatenate([tail_mask, np.ones((*tail_mask.shape[:2], 1), bool)], axis=2)  # and what is before it
    place = np.where((place >= 0) & (place < tail), place, tail)
    return np.take_along_axis(tail_mask, place[:, None], axis=2)[:, None]


def _overlap(a, b):
    """Whether two arrays share an element; where that takes too long to decide, they are said to."""
    if not np.may_share_memory(a, b):
        return False
    try:
        return np.shares_memory(a, b, max_work=100_000)
    except np.exceptions.TooHardError:
        return True


def check_dtype(name, array, backend):
    """Raise unless `backend` computes with arrays of this dtype."""
    name_of_dtype = dtype_name(array.dtype)
    if name_of_dtype not in backend.dtypes:
        hint = ', which fastattn.use_backend("numpy") alone computes' if name_of_dtype == "float64" else ""
        raise TypeError(f"{name} must be {', '.join(sorted(backend.dtypes))}; got {array.dtype}{hint}")


def check_out(out, shape, dtype, inputs, q="q", argument="out"):
    """The caller's `out` as an ndarray: writable, of this shape, the dtype of `q`, apart from each of the named `inputs`."""
    if not (isinstance(out, np.ndarray) or hasattr(out, "__array_interface__") or hasattr(out, "__dlpack__")):
        raise TypeError(f"{argument} must be an array; got {type(out).__name__}")
    array = as_array(argument, out)
    if array.dtype != dtype:
        raise TypeError(f"{argument} must be {dtype}, the dtype of {q}; got {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{argument} must have shape {shape}; got {array.shape}")
    if not array.flags.writeable:
        raise ValueError(f"{argument} must be writable; got a read-only array")
    if array.size and any(n > 1 and stride == 0 for n, stride in zip(array.shape, array.strides)):
        raise ValueError(f"{argument} must not overlap itself; got strides {array.strides}")
    for name, other in inputs:
        if _overlap(array, other):
            raise ValueError(f"{argument} must not overlap an input; it overlaps {name}")
    return array


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


class Call:
    """One call of attention, validated and normalised: what every backend receives.

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
    mask : ndarray or None
        A view broadcast to ``(B, Hq, Lq, Lk)``: bool, float16, bfloat16, float32 or float64. Its rows are those of `q`, packed or not.
    block_mask : BlockMask or None
    causal : bool
    window : tuple of int
        ``(left, right)``; -1 is unbounded.
    query_offset, kv_lengths, kv_starts, q_lengths : ndarray
        ``(B,)`` int64, defaults resolved.
    cu_seqlens_q, cu_seqlens_k : ndarray or None
        ``(B + 1,)`` int64: the first row, of `q` and of `k`, of each packed sequence and the end of the last.
    block_table : ndarray or None
        ``(B, most)`` int32, contiguous: the pages of each entry, which are there for all keys from `kv_starts` to `kv_lengths`.
    indices : ndarray or None
        ``(B, Hkv, Lq, n)`` int32 or int64, the last axis contiguous: the keys that each row has chosen, -1 for none. Their values are
        for the backend to check (`check_indices`), unless the library does it.
    scale, softcap : float
        Finite; a softcap of 0 is none.
    alibi_slopes : ndarray or None
        A finite float32 view broadcast to ``(B, Hq)``.
    sinks : ndarray or None
        ``(Hq,)`` float32, contiguous; finite, or -inf for none in that head.
    precision : str
    activation : str
        One of `ACTIVATIONS`. But for "softmax" there are neither `lse` nor `sinks`.
    activation_bias : ndarray or None
        ``(B,)`` float32, with "sigmoid" and when it is given.
    power : int
    score_function : ScoreFunction or None
    invariant : bool
        The bits of a row depend on its query, the keys it sees, their distance from `kv_starts` and the rules alone.
    additive : ndarray or None
        ``(Hq, A)``, contiguous, of the dtype that scores have: these are ``additive . tanh(q + k)`` in place of ``q . k``.
    segments : ndarray or None
        ``(B, Lk)`` int32, the last axis contiguous, from -1 to ``num_segments - 1``: `out` is float32, ``(B, Hq, Lq, num_segments)``,
        and holds the weights of each segment's keys in place of values times weights. Values then have no numbers.
    num_segments : int
    """

    __slots__ = (
        "q", "k", "v", "out", "lse", "mask", "block_mask", "causal", "window", "query_offset", "kv_lengths",
        "kv_starts", "q_lengths", "cu_seqlens_q", "cu_seqlens_k", "block_table", "indices", "scale", "softcap", "alibi_slopes", "sinks",
        "precision", "activation", "activation_bias", "power", "score_function", "invariant", "additive", "segments", "num_segments",
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
        batch, num_heads, q_len, head_dim = self.q.shape
        kv_len, v_head_dim = self.v.shape[2], dim_of(self.v)
        lse_shape, q_rows = (batch, num_heads, q_len), q_len
        self.segments, self.num_segments = segments, num_segments
        out_shape = (*lse_shape, v_head_dim if segments is None else num_segments)
        self.cu_seqlens_q = self.cu_seqlens_k = self.block_table = None
        if paged is not None:
            self.block_table, cu_seqlens_q = self._pages(*paged)
            batch, most = self.block_table.shape
            self.cu_seqlens_q = shares("cu_seqlens_q", cu_seqlens_q, batch, q_len, names.q)
            q_len, kv_len = np.diff(self.cu_seqlens_q), most * kv_len
        elif packed is not None:
            self.cu_seqlens_q, self.cu_seqlens_k = (
                seqlens(name, table, total, of)
                for name, table, total, of in zip(("cu_seqlens_q", "cu_seqlens_k"), packed, (q_len, kv_len), names)
            )
            batch = len(self.cu_seqlens_q) - 1
            if len(self.cu_seqlens_k) != batch + 1:
                raise ValueError(f"cu_seqlens_k must have as many entries as cu_seqlens_q, {batch + 1}; got {len(self.cu_seqlens_k)}")
            q_len, kv_len = np.diff(self.cu_seqlens_q), np.diff(self.cu_seqlens_k)

        packed = self.cu_seqlens_q is not None
        self.causal = flag("causal", causal)
        self.window = window_sides(window)
        if kv_lengths is None:
            self.kv_lengths = np.full(batch, kv_len, np.int64)
        else:
            self.kv_lengths = integers("kv_lengths", kv_lengths, batch, 0, kv_len)
        self.kv_starts = np.zeros(batch, np.int64) if kv_starts is None else integers("kv_starts", kv_starts, batch, 0, kv_len)
        if kv_starts is not None and (self.kv_starts > self.kv_lengths).any():
            raise ValueError(f"kv_starts must be at most kv_lengths, {self.kv_lengths.tolist()}; got {kv_starts!r}")
        if paged is not None:
            self._check_pages(names)
        self.q_lengths = np.full(batch, q_len, np.int64) if q_lengths is None else integers("q_lengths", q_lengths, batch, 0, q_len)
        if query_offset is None:
            self.query_offset = self.kv_lengths - self.q_lengths
        else:
            self.query_offset = integers("query_offset", query_offset, batch, -MAX_OFFSET, MAX_OFFSET)
        self.scale = 1.0 / math.sqrt(max(head_dim, 1)) if scale is None else finite("scale", scale)
        self.softcap = 0.0 if softcap is None else finite("softcap", softcap)
        if self.softcap < 0:
            raise ValueError(f"softcap must be positive, or None or 0 for none; got {softcap!r}")
        if not isinstance(precision, str) or precision not in _PRECISIONS:
            raise ValueError(f"precision must be one of {_PRECISIONS}; got {precision!r}")
        self.precision = precision
        self.invariant = flag("invariant", invariant)

        self.indices = None if indices is None else self._take_indices(indices, packed)
        self.mask = self.block_mask = self.alibi_slopes = self.sinks = None
        if tail_mask is not None:
            self._take_tail(tail_mask, q_len, kv_len)
        if mask is not None:
            self._take_mask(names.mask, mask, given)
        if alibi_slopes is not None:
            slopes = given["alibi_slopes"] = as_float32("alibi_slopes", alibi_slopes)
            if slopes.shape not in ((num_heads,), (batch, num_heads)):
                raise ValueError(f"alibi_slopes must have shape ({num_heads},) or {(batch, num_heads)}; got {slopes.shape}")
            if not np.isfinite(slopes).all():
                raise ValueError("alibi_slopes must be finite; got NaN or inf")
            self.alibi_slopes = np.broadcast_to(slopes, (batch, num_heads))
        if sinks is not None:
            self.sinks = given["sinks"] = as_float32("sinks", sinks)
            if self.sinks.shape != (num_heads,):
                raise ValueError(f"sinks must have shape ({num_heads},), one logit for each query head; got {self.sinks.shape}")
            if not (self.sinks < np.inf).all():
                raise ValueError("sinks must be finite, or -inf for a head without one; got NaN or inf")

        self.additive = additive
        self.score_function = None if score_function is None else _functions.take(score_function)
        self._take_activation(activation, activation_bias, power, batch, flag("return_lse", return_lse))
        self.lse = np.empty(lse_shape, np.float32) if return_lse else None
        self._given_out = out
        self._copy_to = None
        if packed:  # rows come before heads
            out_shape = (1, q_rows, num_heads, v_head_dim)
        if out is None:
            self.out = np.empty(out_shape, self.q.dtype if segments is None else np.float32)
        else:
            target = check_out(out, out_shape[4 - self._rank :], self.q.dtype, given.items(), names.q)
            ready = is_kernel_ready(target)
            if self.score_function is not None and self.score_function.callable is not None:
                ready = False  # it may raise, and then nothing is written
            target = target[(None,) * (4 - self._rank)]
            self.out = target if ready else np.empty(out_shape, self.q.dtype)
            self._copy_to = None if ready else target
        if packed:
            self.out = self.out.swapaxes(1, 2)

    def _take_activation(self, activation, bias, power, batch, return_lse):
        """How scores become weights."""
        if not isinstance(activation, str) or activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {ACTIVATIONS}; got {activation!r}")
        self.activation, self.activation_bias, self.power = activation, None, integer("power", power, 1)
        if self.power > _MOST_POWER:
            raise ValueError(f"power must be at most {_MOST_POWER}; got {power}")
        if bias is not None:
            if activation != "sigmoid":
                raise ValueError(f'activation_bias must be None but for activation="sigmoid"; got {bias!r} with {activation!r}')
            bias = as_float32("activation_bias", bias)
            if bias.shape not in ((), (batch,)):
                raise ValueError(f"activation_bias must be a number or have shape ({batch},), one for each entry; got {bias.shape}")
            if not np.isfinite(bias).all():
                raise ValueError("activation_bias must be finite; got NaN or inf")
            self.activation_bias = np.full(batch, bias, np.float32)
        if activation != "softmax":
            if return_lse:
                raise ValueError(f"return_lse must be False where no softmax has a denominator; got True with activation={activation!r}")
            if self.sinks is not None:
                raise ValueError(f"sinks must be None where no softmax has a denominator; got some with activation={activation!r}")

    def _pages(self, block_table, cu_seqlens_q):
        """A private table of pages, int32, in which -1 is whatever names none; and the other argument as it is."""
        table, pages = as_array("block_table", block_table), self.k.shape[0]
        if table.dtype.kind not in "iu":
            raise TypeError(f"block_table must hold ints; got {table.dtype}")
        if table.ndim != 2:
            raise ValueError(f"block_table must have shape (B, most_pages); got {table.shape}")
        if not (table.size and table.min() >= 0 and table.max() < min(pages, 2**31)):
            table = np.where((table >= 0) & (table < min(pages, 2**31)), table, -1)
        return np.array(table, np.int32, order="C"), cu_seqlens_q

    def _check_pages(self, names):
        """Every key that an entry is said to have has a page."""
        size = self.k.shape[2]
        if self.block_table.size and self.block_table.min() >= 0:
            return
        column = np.arange(self.block_table.shape[1])
        wanted = (column >= self.kv_starts[:, None] // size) & (column < -(-self.kv_lengths[:, None] // size))
        absent = np.argwhere(wanted & (self.block_table < 0) & (self.kv_starts < self.kv_lengths)[:, None])
        if absent.size:
            b, n = absent[0]
            raise ValueError(
                f"block_table must name pages of {names.k}, 0 to {self.k.shape[0] - 1}, for all {self.kv_lengths[b]} keys of entry {b}; "
                f"its page {n} is none of them"
            )

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
        if dtype_name(v.dtype) != dtype_name(k.dtype):
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

    def _take_mask(self, name, mask, given):
        """Keep a dense mask as a broadcast view, or a block mask as it is."""
        shape = (*self.q.shape[:3], self.k.shape[2])
        if is_block_mask(mask):
            fits = len(mask.shape) == 4 and all(m in (1, n) for m, n in zip(mask.shape[:2], shape))
            if not fits or tuple(mask.shape[2:]) != shape[2:]:
                wanted = f"a BlockMask for {shape}, 1 standing for any batch size or heads"
                raise ValueError(f"{name} must be {wanted}; got {mask.shape}")
            if self.indices is not None:
                raise ValueError(f"{name} must be an array where keys are chosen by indices, which do what a BlockMask does")
            self.block_mask = mask
            return
        array = given[name] = as_array(name, mask)
        if dtype_name(array.dtype) not in _MASK_DTYPES:
            hint = f": give {name}.astype(bool), if what is not 0 is visible" if array.dtype.kind in "iu" else ""
            raise TypeError(f"{name} must be a BlockMask or an array of {', '.join(_MASK_DTYPES)}; got {array.dtype}{hint}")
        if not (array.dtype.isnative and array.flags.aligned):
            array = np.array(array, dtype=array.dtype.newbyteorder("="), subok=False)
        self.mask = broadcast_mask(name, array, shape)

    def _take_tail(self, tail_mask, q_len, kv_len):
        """Keep who sees whom among the last keys of sequences in pages, which then have as many queries each, as a mask of all."""
        if (q_len != q_len[:1]).any():
            raise ValueError(f"tail_mask must be None where sequences have different numbers of queries; these have {q_len.tolist()}")
        tail = take_tail_mask(tail_mask, int(q_len[0]) if len(q_len) else 0, self.kv_lengths)
        mask = spread_tail(tail, self.kv_lengths, np.arange(kv_len))
        rows = np.broadcast_to(mask, (len(q_len), *mask.shape[1:])).reshape(-1, kv_len)
        self.mask = np.broadcast_to(rows, (1, self.q.shape[1], *rows.shape))

    def mask_of(self, b):
        """The dense mask of entry `b`, ``(Hq, Lq, Lk)``."""
        return self.mask[b] if self.cu_seqlens_q is None else self.mask[0, :, self.cu_seqlens_q[b] : self.cu_seqlens_q[b + 1]]

    def _take_indices(self, indices, packed):
        """A private copy, nothing of which but its shape and dtype has been checked."""
        array = as_array("indices", indices)
        if array.dtype.kind not in "iu":
            raise TypeError(f"indices must hold ints; got {array.dtype}")
        batch, heads, rows = self.q.shape[0], self.k.shape[1], self.q.shape[2]
        lead = (rows, heads) if packed else (batch, heads, rows)[4 - self._rank :]
        of_heads = 1 if packed or self._rank == 4 else 0
        shared = tuple(1 if axis == of_heads and self._rank > 2 else n for axis, n in enumerate(lead))
        if array.ndim != len(lead) + 1 or array.shape[:-1] not in (lead, shared):
            wanted = ", ".join(map(str, lead))
            hint = f", or 1 in the place of {heads} heads" if heads > 1 else ""
            raise ValueError(f"indices must have shape ({wanted}, n){hint}; got {array.shape}")
        array = np.array(array, array.dtype if array.dtype in (np.int32, np.int64) else np.int64, order="C", subok=False)
        array = array[(None,) * (4 - array.ndim)]
        return np.broadcast_to(array.swapaxes(1, 2) if packed else array, (batch, heads, rows, array.shape[3]))

    def check_indices(self):
        """Raise unless every list of keys names such as are there, each once."""
        heads = 1 if self.indices.strides[1] == 0 else self.indices.shape[1]
        for b, rows in enumerate(self.q_lengths.tolist()):
            first, of = (0, b) if self.cu_seqlens_q is None else (int(self.cu_seqlens_q[b]), 0)
            lists = self.indices[of, :heads, first : first + rows]
            wrong = np.argwhere((lists < -1) | (lists >= self.kv_len))
            if wrong.size:
                place, what = tuple(wrong[0]), f"must lie between -1 and {self.kv_len - 1}"
            else:
                order = np.argsort(lists, axis=-1, kind="stable")
                ranked = np.take_along_axis(lists, order, axis=-1)
                again = np.argwhere((ranked[..., 1:] == ranked[..., :-1]) & (ranked[..., 1:] >= 0))
                if not again.size:
                    continue
                h, i, n = again[0]
                place, what = (h, i, order[h, i, n + 1]), "must not name a key twice in a list"
            h, i, n = map(int, place)
            where = (first + i, h, n) if self.cu_seqlens_q is not None else (b, h, i, n)[4 - self._rank :]
            raise ValueError(f"indices {what}; got {lists[place]} at {where}")

    @property
    def q_rooms(self):
        """The query rows that each entry has in the arrays, padding included, ``(B,)``."""
        return np.full(len(self.q_lengths), self.q.shape[2]) if self.cu_seqlens_q is None else np.diff(self.cu_seqlens_q)

    @property
    def pairs(self):
        """All (row, key) pairs of a head, seen or not, padding included."""
        kv_rooms = self.kv_len if self.cu_seqlens_k is None else np.diff(self.cu_seqlens_k)
        return int((self.q_rooms * kv_rooms).sum())

    @property
    def kv_len(self):
        """The keys that each entry has room for; of packed sequences the keys of all."""
        return self.k.shape[2] * (1 if self.block_table is None else self.block_table.shape[1])

    def entry(self, b):
        """What belongs to entry `b` of the arrays, without the batch axis: an `Entry`."""

        def part(array, table):
            return None if array is None else array[b] if table is None else array[0, :, table[b] : table[b + 1]]

        def in_pages(array):
            return [PagedRows(array[:, h], self.block_table[b], int(self.kv_lengths[b])) for h in range(array.shape[1])]

        k, v = (part(x, self.cu_seqlens_k) if self.block_table is None else in_pages(x) for x in (self.k, self.v))
        if kind_of(self.k.dtype):
            k, v = ([QuantizedRows(x, dim_of(of)) for x in heads] for heads, of in ((k, self.k), (v, self.v)))
        q, out, lse = (part(x, self.cu_seqlens_q) for x in (self.q, self.out, self.lse))
        return Entry(q, k, v, out, lse)

    def clear_padding(self):
        """Fill the rows beyond `q_lengths`, which no backend computes."""
        for b in np.flatnonzero(self.q_lengths < self.q_rooms):
            entry = self.entry(b)
            entry.out[:, self.q_lengths[b] :] = 0
            if entry.lse is not None:
                entry.lse[:, self.q_lengths[b] :] = -np.inf

    def result(self):
        """What the caller is given once the backend has filled `out` and `lse`, in the rank that `q` had."""
        out, lse = self.out, self.lse
        if self.cu_seqlens_q is not None:
            out = out.swapaxes(1, 2)
        if self._copy_to is not None:
            self._copy_to[...] = out
        for _ in range(4 - self._rank):
            out, lse = out[0], None if lse is None else lse[0]
        if self._given_out is not None:
            out = self._given_out
        return out if lse is None else (out, lse)
