"""Norms and activations of rows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

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


def normalize(x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any] | None, eps: float, *, centred: bool) -> NDArray[Any]:
    """Layer or RMS normalisation over the last axis."""
    n = x.dtype.type(x.shape[-1])
    if centred:
        x = x - x.mean(axis=-1, keepdims=True)
    square = np.einsum("...i,...i->...", x, x)[..., None] / n
    y = x / np.sqrt(square + x.dtype.type(eps))
    y *= weight
    if bias is not None:
        y += bias
    return y


def activate(x: NDArray[Any], kind: str, *, bias: NDArray[Any] | None = None, gated: bool = False) -> NDArray[Any]:
    """An activation of ``x + bias``; `x` is overwritten. Gated: that of the first half of each row, times the second half."""
    if bias is not None:
        x += bias
    half = x.shape[-1] // 2
    gate = x[..., :half] if gated else x
    y = _KINDS[kind](gate)
    return y * x[..., half:] if gated else y


_erf = np.frompyfunc(math.erf, 1, 1)


def _gelu(x):
    return x * (0.5 + 0.5 * _erf(x * math.sqrt(0.5)).astype(np.float64)).astype(x.dtype)


def _gelu_tanh(x):
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return 0.5 * x * (1 + np.tanh(inner))


def _silu(x):
    return x * (0.5 + 0.5 * np.tanh(0.5 * x))  # x * sigmoid(x); exp could overflow


_KINDS = {"gelu": _gelu, "gelu_tanh": _gelu_tanh, "silu": _silu, "relu": lambda x: np.maximum(x, 0)}
