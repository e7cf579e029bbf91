"""Quantised rows of keys and values as NumPy sees them: each is one record, of its integers and their scales, as the library lays them out.

An array of rows has a last axis of one such record, in the place of that of numbers, so that it is sliced, transposed and put into pages
like any other.
"""

from functools import cache

import numpy as np

GROUP = 32  # numbers that share a scale, in int4
KINDS = ("int8", "int4")
_MOST = {"int8": np.float32(127), "int4": np.float32(7)}  # the largest integer
_TINY = np.finfo(np.float32).tiny


@cache
def row_dtype(kind, numbers):
    """The record of a row of so many numbers."""
    if kind == "int8":
        return np.dtype([("integers", np.int8, (numbers,)), ("scale", np.float32)])
    return np.dtype([("pairs", np.uint8, (numbers // 2,)), ("scales", np.float16, (numbers // GROUP,))])


@cache
def kind_of(dtype):
    """Which of the `KINDS` a dtype is of, or None."""
    return {("integers", "scale"): "int8", ("pairs", "scales"): "int4"}.get(dtype.names)


def dim_of(rows):
    """The numbers of each row of an array, quantised or not."""
    kind = kind_of(rows.dtype)
    if kind is None:
        return rows.shape[-1]
    return rows.dtype[0].shape[0] * (1 if kind == "int8" else 2)


def decoded(rows):
    """The numbers of quantised rows ``(..., 1)``: ``(..., D)``, float32."""
    rows, kind = rows[..., 0], kind_of(rows.dtype)
    with np.errstate(invalid="ignore"):  # a scale of a caller's own may be infinite
        if kind == "int8":
            return rows["integers"] * rows["scale"][..., None]
        groups = rows["scales"].shape[-1]
        pairs = rows["pairs"].reshape(*rows.shape, groups, GROUP // 2)
        integers = np.concatenate([pairs & 15, pairs >> 4], axis=-1).astype(np.float32) - 8
        return (integers * rows["scales"].astype(np.float32)[..., None]).reshape(*rows.shape, groups * GROUP)


def encoded(x, kind):
    """Numbers ``(..., D)`` as quantised rows ``(..., 1)``, or None where that cannot be."""
    rows = np.empty((*x.shape[:-1], 1), row_dtype(kind, x.shape[-1]))
    record = rows[..., 0]
    dim = x.shape[-1]
    groups = x.astype(np.float32).reshape(*x.shape[:-1], *((dim // GROUP, GROUP) if kind == "int4" else (1, dim)))
    with np.errstate(all="ignore"):
        largest = np.abs(groups).max(axis=-1, initial=0)
        scale = largest / _MOST[kind]
        scale = np.where(scale < _TINY, 0, scale) if kind == "int8" else scale.astype(np.float16)
        if not (np.isfinite(scale) & np.isfinite(largest)).all():
            return None
        wide = scale.astype(np.float32)[..., None]
        factor = np.where(wide > 0, 1 / wide, np.float32(0))
        integers = np.rint(np.clip(groups * factor, -_MOST[kind], _MOST[kind])).astype(np.int8)
    if kind == "int8":
        record["integers"], record["scale"] = integers.reshape(x.shape), scale.sum(axis=-1)
    else:
        low, high = (part.view(np.uint8) + 8 & 15 for part in np.split(integers, 2, axis=-1))
        record["pairs"] = (low | high << 4).reshape(*x.shape[:-1], dim // 2)
        record["scales"] = scale
    return rows


def block_of(dim):
    """The order of the Hadamard matrices that turn rows of so many numbers: the largest power of two that divides it."""
    return dim & -dim


def turned(x):
    """`x` ``(..., D)`` times the orthonormal Hadamard matrix of `block_of` ``(D)``, block by block; a matrix that is its own inverse."""
    block = block_of(x.shape[-1])
    y = x.astype(np.result_type(x, np.float32) if x.dtype.kind == "f" else np.float32)
    step = block // 2
    while step:
        a, b = np.moveaxis(y.reshape(*x.shape[:-1], x.shape[-1] // (2 * step), 2, step), -2, 0)
        y = np.stack([a + b, a - b], axis=-2).reshape(x.shape)
        step //= 2
    return y * y.dtype.type(1 / np.sqrt(max(block, 1)))
