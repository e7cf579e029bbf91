"""Rows from what is not rows yet: tokens, and patches of images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .._check import as_array, integer
from .dense import LayerNorm, linear, weights

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .._typing import Array


def _looked_up(name, table, indices):
    """Rows of a table; an index beyond it is an error rather than one from its end."""
    if indices.dtype.kind not in "iu":
        raise TypeError(f"{name} must be ints; got {indices.dtype}")
    if indices.size and not (indices.min() >= 0 and indices.max() < len(table)):
        raise ValueError(f"{name} must lie between 0 and {len(table) - 1}; got {int(indices.min())} to {int(indices.max())}")
    return table[indices]


class TokenEmbedding:
    """Rows of a table for tokens, with what tells their places and kinds apart added to them.

    Parameters
    ----------
    table : array_like, (vocabulary, E)
    positions : array_like, (positions, E), optional
        Learned positions (BERT, GPT-2). Rotary ones belong to :class:`MultiHeadAttention`.
    types : array_like, (types, E), optional
        BERT's kinds of tokens.
    norm : LayerNorm or RMSNorm, optional
        Of the sum.
    scale : float
        By which rows of `table` are multiplied (BART and Gemma have models where it is ``sqrt(E)``).
    position_offset : int
        Of the first position in `positions` (BART and RoBERTa keep the first two for something else).
    """

    def __init__(
        self,
        table: Array,
        *,
        positions: Array | None = None,
        types: Array | None = None,
        norm: LayerNorm | None = None,
        scale: float = 1.0,
        position_offset: int = 0,
    ) -> None:
        self.table = weights("table", table, -1, -1)
        width = self.table.shape[1]
        self.positions = None if positions is None else weights("positions", positions, -1, width)
        self.types = None if types is None else weights("types", types, -1, width)
        self.norm, self.scale = norm, scale
        self.position_offset = integer("position_offset", position_offset, 0)

    def __call__(self, tokens: NDArray[Any], positions: NDArray[Any], types: NDArray[Any] | None = None) -> NDArray[Any]:
        """Tokens (n,), their positions (n,), and their types (n,), by default 0, to rows (n, E)."""
        x = _looked_up("tokens", self.table, tokens)
        if self.scale != 1.0:
            x *= x.dtype.type(self.scale)
        if self.types is not None:
            x += self.types[0] if types is None else _looked_up("types", self.types, types)
        elif types is not None:
            raise TypeError("types must not be given: the model has no kinds of tokens")
        if self.positions is not None:
            x += _looked_up("positions", self.positions, positions + self.position_offset)
        return x if self.norm is None else self.norm(x)


class PatchEmbedding:
    """A row for each square patch of an image, behind a first row for the image as a whole (Dosovitskiy et al., 2020).

    Parameters
    ----------
    weight : array_like, (E, channels, size, size)
        A convolution whose stride is its size.
    bias : array_like, (E,), optional
    first : array_like, (n, E), optional
        Rows before those of the patches.
    positions : array_like, (n + patches, E), optional
    """

    def __init__(
        self, weight: Array, bias: Array | None = None, *, first: Array | None = None, positions: Array | None = None
    ) -> None:
        weight = weights("weight", weight, -1, -1, -1, -1)
        width, self.channels, *size = weight.shape
        self.size = tuple(size)
        self.projection = linear("weight", (weight.reshape(width, -1), bias))
        self.first = weights("first", np.empty((0, width), weight.dtype) if first is None else first, -1, width)
        self.positions = None if positions is None else weights("positions", positions, -1, width)

    def __call__(self, images: Array) -> NDArray[Any]:
        """Images (B, channels, height, width) of any whole number of patches to rows (B, n + patches, E)."""
        images = as_array("images", images)
        if images.ndim != 4 or images.shape[1] != self.channels or any(n % m for n, m in zip(images.shape[2:], self.size)):
            wanted = f"(B, {self.channels}, height, width), multiples of {self.size}"
            raise ValueError(f"images must have shape {wanted}; got {images.shape}")
        batch, channels, height, width = images.shape
        down, across = height // self.size[0], width // self.size[1]
        patches = images.reshape(batch, channels, down, self.size[0], across, self.size[1]).transpose(0, 2, 4, 1, 3, 5)
        n = len(self.first)
        x = np.empty((batch, n + down * across, self.projection.outputs), self.projection.weight.dtype)
        x[:, :n] = self.first
        x[:, n:] = self.projection(patches.reshape(batch, down * across, self.projection.inputs).astype(x.dtype, copy=False))
        if self.positions is not None:
            if len(self.positions) != x.shape[1]:
                raise ValueError(f"images must have {len(self.positions) - n} patches, for which there are positions; got {down * across}")
            x += self.positions
        return x
