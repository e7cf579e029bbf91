"""Norms and activations of rows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import runtime
from .._check import check_dtype, kernel_ready

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ACTIVATIONS = {  # names elsewhere: the names here
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}


def activation(name: str) -> str:
    """The name of an activation in this package."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}; got {name!r}")
    return _ACTIVATIONS[name]


def normalize(
    x: NDArray[Any],
    weight: NDArray[Any],
    bias: NDArray[Any] | None,
    eps: float,
    *,
    centred: bool,
    add: NDArray[Any] | None = None,
    keep_sum: bool = False,
    out: NDArray[Any] | None = None,
) -> Any:
    """Rows (..., n) normalised over the last axis: those of `x`, or of ``x + add``.

    `add` is (rows, n), as `x` is then; with `keep_sum` their sum takes its place.
    """
    if x.shape[-1:] != weight.shape:
        raise ValueError(f"x must have a last axis of {weight.size}; got shape {x.shape}")
    backend, x = runtime.backend(), kernel_ready(x.astype(weight.dtype, copy=False))
    check_dtype("weight", weight, backend)
    given = x.reshape(math.prod(x.shape[:-2]), *(1, *x.shape)[-2:]) if x.ndim != 3 else x
    result = np.empty(x.shape, x.dtype) if out is None else out
    added = None if add is None else add[None]
    backend.normalize(given, added, None, added if keep_sum else None, weight, bias, result.reshape(given.shape), eps, centred)
    return result


def activate(x: NDArray[Any], kind: str, *, bias: NDArray[Any] | None = None, gated: bool = False) -> NDArray[Any]:
    """An activation of ``x + bias``; `x` is overwritten. Gated: that of the first half of each row, times the second half."""
    backend = runtime.backend()
    check_dtype("x", x, backend)
    width = x.shape[-1] // 2 if gated else x.shape[-1]
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    out = np.empty((len(rows), width), x.dtype) if gated else rows
    backend.pointwise(rows, bias, out, kind, gated)
    return out.reshape(*x.shape[:-1], width)
