"""Rotary position embedding: the one position that has to be computed with, row by row, and so goes through the backends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import runtime
from ._check import as_array, check_dtype, check_out, flag, is_kernel_ready, kernel_ready

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ._typing import Array


def apply_rope(
    x: Array,
    cos: Array,
    sin: Array,
    *,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    out: Array | None = None,
) -> NDArray[Any]:
    """Turn each pair of numbers of a row by the angle that belongs to the row's position and the pair (RoPE).

    ::

        out[a] = x[a] * cos[n] - x[b] * sin[n]
        out[b] = x[b] * cos[n] + x[a] * sin[n]      for n < rotary_dim // 2

    Scores of queries and keys that are treated so depend on differences of positions alone. Which two numbers make pair ``n`` is a
    property of the model: ``(n, n + rotary_dim // 2)``, as in GPT-NeoX and in the checkpoints of Llama and its successors in
    transformers' format, or, with ``interleaved=True``, ``(2 n, 2 n + 1)``, as in the paper, GPT-J, and Meta's and most GGUF files.

    Parameters
    ----------
    x : array_like, (B, H, L, D), (H, L, D) or (L, D)
        Queries or keys: float32, float16 or bfloat16; the NumPy backend takes float64 too. Any strides, as in :func:`attention`:
        for ``(B, L, H, D)``, or packed ``(total, H, D)``, give ``x.swapaxes(-3, -2)``.
    cos, sin : array_like of real numbers, (L, rotary_dim // 2)
        The tables of :func:`rope_table`, row ``i`` for row ``i`` of `x`. For positions that differ from one batch entry to the
        next ``(B, L, rotary_dim // 2)``, as ``rope_table(positions, dim)`` gives them for ``positions`` ``(B, L)``. An array
        with as many axes as `x` broadcasts to it. Tokens that follow a cache take a slice, ``cos[start : start + L]``.
    interleaved : bool
    rotary_dim : int, optional
        How many numbers of a row are turned, from the first; the others are copied. Default: twice the width of the tables, which is
        the only value that agrees with them.
    out : array, of the shape and dtype of `x`, optional
        Where to write. It may be `x` itself; it must not overlap `x` in any other way, nor the tables.

    Returns
    -------
    ndarray
        Of the dtype and, unless `out` was given, in the memory order of `x`. Computed in float32 and rounded once.

    Notes
    -----
    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.

    Examples
    --------
    >>> cos, sin = fastattn.rope_table(128, 64)
    >>> q = np.random.default_rng(0).standard_normal((1, 8, 128, 64), np.float32)
    >>> fastattn.apply_rope(q, cos, sin, out=q).shape
    (1, 8, 128, 64)
    """
    result = runtime._state.rope_plain(x, cos, sin, interleaved, rotary_dim, out)
    if result is not None:
        return result
    backend = runtime.backend()
    given = as_array("x", x)
    if given.ndim not in (2, 3, 4):
        raise ValueError(f"x must have shape (B, H, L, D), (H, L, D) or (L, D); got {given.shape}")
    check_dtype("x", given, backend)
    tables = {"cos": _as_table("cos", cos, given), "sin": _as_table("sin", sin, given)}
    pairs = tables["cos"].shape[-1]
    if tables["sin"].shape[-1] != pairs:
        raise ValueError(f"sin must have the last axis of cos, {pairs}; got shape {np.shape(sin)}")
    if 2 * pairs > given.shape[-1]:
        raise ValueError(f"cos must have a last axis of at most half the head size, {given.shape[-1] // 2}; got shape {np.shape(cos)}")
    if rotary_dim is not None and rotary_dim != 2 * pairs:
        raise ValueError(f"rotary_dim must be twice the last axis of cos, {2 * pairs}; got {rotary_dim!r}")
    interleaved = flag("interleaved", interleaved)

    ready = kernel_ready(given)
    if out is None:
        target = result = _empty_like(ready)
    else:
        target = as_array("out", out)
        in_place = _address(target) == _address(given) and target.strides == given.strides
        inputs = tables if in_place else {"x": given, **tables}
        target = check_out(out, given.shape, given.dtype, inputs.items(), q="x")
        result = target if is_kernel_ready(target) else _empty_like(ready)
    lift = (None,) * (4 - given.ndim)
    backend.apply_rope(ready[lift], tables["cos"][lift], tables["sin"][lift], result[lift], interleaved)
    if result is not target:
        target[...] = result
    return target if out is None else out


def _as_table(name, value, x):
    """A table of cosines or sines as a view broadcast to the rows of `x`, in the dtype that they are multiplied in."""
    table = as_array(name, value)
    if table.dtype.kind not in "fiu" and table.dtype.name != "bfloat16":
        raise TypeError(f"{name} must hold real numbers; got {table.dtype}")
    if table.ndim < 2:
        raise ValueError(f"{name} must have shape (L, rotary_dim // 2) or (B, L, rotary_dim // 2); got {table.shape}")
    wide = x.dtype.kind == "f" and x.dtype.itemsize > 4
    table = kernel_ready(table.astype(x.dtype.newbyteorder("=") if wide else np.float32, copy=False))
    by_entry = table[:, None] if table.ndim == 3 and x.ndim == 4 else table
    try:
        return np.broadcast_to(by_entry, (*x.shape[:-1], table.shape[-1]))
    except ValueError as error:
        shapes = f"{x.shape[-2:-1]} or {(x.shape[0], x.shape[2])}" if x.ndim == 4 else f"{x.shape[-2:-1]}"
        raise ValueError(f"{name} must have shape {shapes} and a last axis, for x of shape {x.shape}; got {table.shape}") from error


def _empty_like(x):
    """An array in the memory order of `x`, unless that puts another axis than the last one last, as it may where `x` was broadcast."""
    like = np.empty_like(x, subok=False)
    return like if x.shape[-1] <= 1 or like.strides[-1] == x.itemsize else np.empty(x.shape, x.dtype)


def _address(array):
    return array.__array_interface__["data"][0]
