"""Keys and values at a half and a quarter of the bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import runtime
from ._check import as_array, check_out, dtype_name, flag, is_kernel_ready, kernel_ready
from ._quantized import GROUP, KINDS, block_of, decoded, kind_of, row_dtype

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ._typing import Array

_LEAST_BLOCK = 16  # of a rotation: fewer numbers than this spread little
_MOST_DIM = 8192


def quantize(x: Array, dtype: str = "int8", *, rotate: bool = False) -> NDArray[Any]:
    """Keys or values as integers and scales, for :func:`attention` and all forms of it to read in place of numbers.

    A number becomes an integer times a scale, which is the largest magnitude among the numbers that share it, divided by the largest
    integer: in ``"int8"`` all of a row and 127, in ``"int4"`` 32 of a row and 7. So it is kept to half a scale; a float16 scale of
    ``"int4"`` adds its own rounding.

    Parameters
    ----------
    x : array_like, (..., D)
        Of rank 2 to 4: float32, float16, bfloat16 or float64, finite. For ``"int4"`` `D` is a multiple of 32.
    dtype : {"int8", "int4"}
    rotate : bool
        Multiply each row by an orthonormal Hadamard matrix first, of the largest power of two that divides `D`, which is at least 16:
        what one number has in excess is then shared by all (Ashkboos et al., "QuaRot", 2024). Queries of keys that are turned have to be
        turned likewise, and outputs of such values back, by the same matrix; caches do that (``KVCache(rotate=True)``).

    Returns
    -------
    ndarray, (..., 1)
        One record for each row, of ``D + 4`` bytes (``integers`` and ``scale``) or ``D / 32 * 18`` (``pairs`` and ``scales``: number `i` of
        32 is the lower half of byte `i`, number ``16 + i`` the upper half, less 8).

    Raises
    ------
    ValueError
        If a number is NaN or infinite, or too large for a float16 scale; or if `D` does not suit.

    Examples
    --------
    >>> k, v = np.random.default_rng(0).standard_normal((2, 1, 8, 1024, 64), np.float32)
    >>> q = k[:, :, -1:]
    >>> fastattn.attention(q, fastattn.quantize(k, "int8"), fastattn.quantize(v, "int8")).shape
    (1, 8, 1, 64)
    """
    array = as_array("x", x)
    if dtype_name(array.dtype) not in ("float32", "float16", "bfloat16", "float64") or array.ndim not in (2, 3, 4):
        raise TypeError(f"x must hold floats, (..., D) of rank 2 to 4; got {array.dtype} of shape {array.shape}")
    check_kind("dtype", dtype)
    check_dim("x", array.shape[-1], dtype, flag("rotate", rotate))
    rows = kernel_ready(array.astype(np.float32) if array.itemsize == 8 else array)[(None,) * (4 - array.ndim)]
    result = np.empty((*rows.shape[:-1], 1), row_dtype(dtype, rows.shape[-1]))
    store([("x", rows.swapaxes(1, 2), result.swapaxes(1, 2))], every_slot(rows.shape[0], rows.shape[2]), rotate)
    return result.reshape(*array.shape[:-1], 1)


def dequantize(rows: Array) -> NDArray[np.float32]:
    """The numbers of rows from :func:`quantize`, ``(..., D)`` in float32; of rows that were turned, the turned ones."""
    array = as_array("rows", rows)
    if kind_of(array.dtype) is None or array.ndim == 0 or array.shape[-1] != 1:
        raise TypeError(f"rows must be quantised, (..., 1); got {array.dtype} of shape {array.shape}")
    return decoded(array)


def check_kind(name, kind):
    """Raise unless this is a way to quantise."""
    if not isinstance(kind, str) or kind not in KINDS:
        raise TypeError(f"{name} must be one of {KINDS}; got {kind!r}")


def check_dim(name, dim, dtype, rotate):
    """Raise unless rows of `dim` numbers can be quantised and turned so."""
    if dim > _MOST_DIM:
        raise ValueError(f"{name} must have rows of at most {_MOST_DIM} numbers; got {dim}")
    if dtype == "int4" and dim % GROUP:
        raise ValueError(f"{name} must have rows of a multiple of {GROUP} numbers, which share a scale in int4; got {dim}")
    if rotate and dim and block_of(dim) < _LEAST_BLOCK:
        raise ValueError(f"{name} must have rows of a multiple of {_LEAST_BLOCK} numbers to be turned; got {dim}")


def every_slot(batch, length):
    """The slots of a cache that takes all tokens, each entry in a page of its own."""
    return np.arange(batch * length, dtype=np.int64).reshape(batch, length)


def store(parts, slots, rotate=False):
    """Store several ``(name, rows, cache)`` at the same slots, or none of them."""
    if runtime.backend().store([(rows, cache) for _, rows, cache in parts], slots, rotate):
        return
    for name, rows, cache in parts:
        wide = np.abs(rows[slots >= 0].astype(np.float32))
        if not np.isfinite(wide).all():
            raise ValueError(f"{name} must be finite where it is quantised; got NaN or inf")
        if kind_of(cache.dtype) == "int4" and wide.max(initial=0) > 7e4:
            raise ValueError(f"{name} must be small enough for float16 scales; got {wide.max()}")
    names = " and ".join(name for name, _, _ in parts)
    raise ValueError(f"{names} must be small enough to be quantised; got numbers near the largest float32")


def store_plain(k, v, caches, axes, slots):
    """The backend's short way for a few ordinary rows of `axes` axes; false, with nothing stored, where it has none or they are not."""
    return runtime._state.store_plain(k, v, *caches, axes, slots)


def _turn(x, to):
    """Fill `to` with the turned rows of `x`, (B, H, L, D) or packed, (L, H, D)."""
    rows, target = (x.swapaxes(1, 2), to.swapaxes(1, 2)) if x.ndim == 4 else (x[None], to[None])
    store([("q", rows, target)], every_slot(*rows.shape[:2]), rotate=True)


def turned(q):
    """Queries, turned as keys are."""
    wide = np.empty(q.shape, np.float64 if q.dtype == np.float64 else np.float32)
    _turn(kernel_ready(q), wide)
    return wide


def attend_turned(attend, q, keywords):
    """What ``attend(q, **keywords)`` gives where keys and values are turned and its queries are not."""
    given_out = keywords.pop("out", None)
    wide = turned(q)
    if dtype_name(q.dtype) == "bfloat16":  # the products that its own dtype would have
        keywords = {**keywords, "precision": "medium"}
    result = attend(wide, **keywords)
    turned_out, *rest = result if isinstance(result, tuple) else (result,)
    dtype = q.dtype.newbyteorder("=")
    if given_out is None:
        out = target = np.empty(turned_out.shape, dtype)
    else:
        target, out = check_out(given_out, turned_out.shape, dtype, (("q", q),)), given_out
    ready = target if is_kernel_ready(target) else np.empty(target.shape, target.dtype)
    _turn(turned_out, ready)
    if ready is not target:
        target[...] = ready
    return (out, *rest) if rest else out
