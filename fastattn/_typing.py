"""Types of arguments, for checkers and editors; nothing of this is imported when the package runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from .sparse import BlockMask


class SupportsDLPack(Protocol):
    """A tensor of another library."""

    def __dlpack__(self) -> Any: ...
    def __dlpack_device__(self) -> tuple[Any, Any]: ...


Array = ArrayLike | SupportsDLPack
Ints = int | Sequence[int] | NDArray[np.integer[Any]] | SupportsDLPack
Window = tuple[int | None, int | None] | Sequence[int | None]
Precision = Literal["highest", "high", "medium"]
Activation = Literal["softmax", "sigmoid", "relu", "polynomial"]


class PackedRules(TypedDict, total=False):
    """The keywords of `fastattn.attention_varlen` that say which keys are seen, and how they are scored."""

    causal: bool
    window: Window | None
    query_offset: Ints | None
    kv_starts: Ints | None
    q_lengths: Ints | None
    scale: float | None
    softcap: float | None
    alibi_slopes: Array | None
    sinks: Array | None
    precision: Precision
    activation: Activation
    activation_bias: Array | None
    power: int
    score_function: Any
    invariant: bool


class Rules(PackedRules, total=False):
    """Those of `fastattn.attention`."""

    mask: Array | BlockMask | None
    kv_lengths: Ints | None


class Call(Rules, total=False):
    """All keywords of `fastattn.attention`."""

    return_lse: bool
    out: Array | None
