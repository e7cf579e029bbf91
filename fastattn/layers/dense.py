"""What is done to each row by itself: products with weights, norms, feed-forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .._check import as_array, finite
from . import functional

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .._typing import Array


def weights(name: str, value: Any, *shape: int) -> NDArray[Any]:
    """`value` as weights: float32, or float64 if they are given so; of this shape, in which -1 stands for any length."""
    array = as_array(name, value)
    if array.dtype.kind not in "f" and array.dtype.name != "bfloat16":
        raise TypeError(f"{name} must hold floats; got {array.dtype}")
    if array.ndim != len(shape) or any(n not in (-1, m) for n, m in zip(shape, array.shape)):
        wanted = ", ".join("n" if n == -1 else str(n) for n in shape)
        raise ValueError(f"{name} must have shape ({wanted}{',' if len(shape) == 1 else ''}); got {array.shape}")
    return np.require(array, np.float64 if array.dtype == np.float64 else np.float32, "A")


class Linear:
    """``x @ weight.T + bias``.

    Parameters
    ----------
    weight : array_like, (outputs, inputs)
        As PyTorch and most checkpoints have it. Kept, not copied, if it is float32 (or float64, for the NumPy backend).
    bias : array_like, (outputs,), optional
    """

    def __init__(self, weight: Array, bias: Array | None = None) -> None:
        self.weight = weights("weight", weight, -1, -1)
        self.bias = None if bias is None else weights("bias", bias, len(self.weight))

    def __repr__(self) -> str:
        return f"<Linear {self.inputs} -> {self.outputs}{'' if self.bias is None else ' with a bias'}>"

    @property
    def inputs(self) -> int:
        """Numbers of a row that comes in."""
        return self.weight.shape[1]

    @property
    def outputs(self) -> int:
        """Numbers of a row that goes out."""
        return self.weight.shape[0]

    def __call__(self, x: NDArray[Any]) -> NDArray[Any]:
        """(..., inputs) to (..., outputs)."""
        y = x @ self.weight.T
        if self.bias is not None:
            y += self.bias
        return y

    @classmethod
    def joined(cls, *parts: Linear) -> Linear:
        """One product in the place of several of the same input; outputs lie side by side."""
        biases = [np.zeros(part.outputs, part.weight.dtype) if part.bias is None else part.bias for part in parts]
        some = any(part.bias is not None for part in parts)
        return cls(np.concatenate([part.weight for part in parts]), np.concatenate(biases) if some else None)

    def part(self, start: int, stop: int) -> Linear:
        """The outputs from `start` to `stop`, in the memory of this one's weights."""
        return Linear(self.weight[start:stop], None if self.bias is None else self.bias[start:stop])


def linear(name: str, value: Any) -> Linear:
    """A layer from what may be one, or its weight, or its weight and its bias."""
    if isinstance(value, Linear):
        return value
    weight, bias = value if isinstance(value, tuple) else (value, None)
    try:
        return Linear(weight, bias)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


class LayerNorm:
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` of each row (Ba et al., 2016).

    Parameters
    ----------
    weight : array_like, (n,)
    bias : array_like, (n,), optional
    eps : float
    """

    centred = True

    def __init__(self, weight: Array, bias: Array | None = None, *, eps: float = 1e-5) -> None:
        self.weight = weights("weight", weight, -1)
        self.bias = None if bias is None else weights("bias", bias, self.weight.size)
        self.eps = finite("eps", eps)
        if self.eps < 0:
            raise ValueError(f"eps must be at least 0; got {eps!r}")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.weight.size}>"

    def __call__(self, x: NDArray[Any]) -> NDArray[Any]:
        """(..., n) to (..., n)."""
        return functional.normalize(x, self.weight, self.bias, self.eps, centred=self.centred)

    def of_sum(self, x: NDArray[Any], y: NDArray[Any], *, keep: bool) -> NDArray[Any]:
        """The norm of ``x + y`` for rows (rows, n), in one pass; the sum takes the place of `y`, or if it is not kept the norm does."""
        keywords = {"add": y, "keep_sum": True} if keep else {"add": y, "out": y}
        return functional.normalize(x, self.weight, self.bias, self.eps, centred=self.centred, **keywords)


class RMSNorm(LayerNorm):
    """``x / sqrt(mean(x**2) + eps) * weight`` of each row (Zhang and Sennrich, 2019).

    Parameters
    ----------
    weight : array_like, (n,)
    bias : array_like, (n,), optional
        Hardly any model has one.
    eps : float
    """

    centred = False


class FeedForward:
    """Two products with something that is not linear between them.

    ::

        down(activation(up(x)))               plain
        down(activation(gate(x)) * up(x))     gated (Shazeer, "GLU Variants Improve Transformer", 2020)

    Parameters
    ----------
    up, down : Linear or array_like or (array_like, array_like)
        A layer, or its weight ``(outputs, inputs)``, or that and its bias.
    gate : Linear or array_like or (array_like, array_like), optional
    activation : str
        ``"gelu"`` (by the error function), ``"gelu_tanh"`` (its approximation), ``"silu"``, ``"relu"``, or the names that transformers
        has for these (``"gelu_new"``, ``"gelu_pytorch_tanh"``, ``"swish"``).
    """

    def __init__(self, up: Any, down: Any, *, gate: Any = None, activation: str = "gelu") -> None:
        up, self.down = linear("up", up), linear("down", down)
        self.activation = functional.activation(activation)
        self.gated = gate is not None
        if self.gated:
            gate = linear("gate", gate)
            if (gate.inputs, gate.outputs) != (up.inputs, up.outputs):
                raise ValueError(f"gate must have the shape of up, {up.weight.shape}; got {gate.weight.shape}")
        if self.down.inputs != up.outputs:
            raise ValueError(f"down must have inputs for the outputs of up, {up.outputs}; got shape {self.down.weight.shape}")
        self.up = Linear.joined(gate, up) if self.gated else up

    def __repr__(self) -> str:
        hidden = self.down.inputs
        return f"<FeedForward {self.up.inputs} -> {hidden} -> {self.down.outputs}, {self.activation}{', gated' if self.gated else ''}>"

    def __call__(self, x: NDArray[Any]) -> NDArray[Any]:
        """(..., E) to (..., E)."""
        return self.down(functional.activate(x @ self.up.weight.T, self.activation, bias=self.up.bias, gated=self.gated))
