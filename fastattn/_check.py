"""Checks of arguments that functions have in common, in one voice.

A message names the argument, says what it must be and then what it was. Nothing is written before every check has passed.
"""

import functools
import math
import operator

import numpy as np

from ._arrays import as_array
from ._quantized import kind_of

_FLOAT32 = np.dtype(np.float32)
_FLOAT32_MAX = float(np.finfo(np.float32).max)
MAX_OFFSET = 2**56  # positions, distances and window edges then stay far inside int64


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
    dtype = array.dtype
    if dtype is not _FLOAT32 and dtype.kind not in "fiu" and dtype_name(dtype) != "bfloat16":
        raise TypeError(f"{name} must hold real numbers; got {dtype}")
    return as_dense(array, _FLOAT32)


def as_dense(array, dtype):
    """`array` in this dtype, aligned and contiguous; itself, without the microseconds of ``np.require``, where it is that."""
    flags = array.flags
    if array.dtype == dtype and flags.c_contiguous and flags.aligned:
        return array
    return np.require(array, dtype, "AC")


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
    return of_entries(batch, array)


def of_entries(batch, value):
    """An int64 array ``(batch,)`` of one number or of each entry's, as `numpy.full` makes it, but sooner."""
    array = np.empty(batch, np.int64)
    array[...] = value
    return array


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
