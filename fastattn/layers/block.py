"""A block: attention and feed-forward, each added to the rows that it was given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .attention import Angles, Keys, MultiHeadAttention, are_packed
from .rows import Rows

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from .._typing import Array, Ints
    from .dense import FeedForward, LayerNorm


class TransformerBlock:
    """Attention and feed-forward with residual connections.

    ::

        x = x + attention(norm(x));  x = x + feed_forward(norm(x))            norm_first (pre-norm)
        x = norm(x + attention(x));  x = norm(x + feed_forward(x))            otherwise (post-norm)
        x = x + attention(norm(x)) + feed_forward(norm(x))                    parallel

    each `norm` being its own, and attention to a context between the two where there is a `cross_attention`.

    Parameters
    ----------
    attention : MultiHeadAttention
    feed_forward : FeedForward
        Or any function of rows ``(n, E)``.
    attention_norm : LayerNorm or RMSNorm
    feed_forward_norm : LayerNorm or RMSNorm, optional
        None is for `parallel` blocks whose two halves see the same normalised rows (GPT-J, Phi).
    cross_attention : MultiHeadAttention, optional
    cross_norm : LayerNorm or RMSNorm, optional
        With `cross_attention`.
    norm_first : bool
    parallel : bool
    """

    def __init__(
        self,
        attention: MultiHeadAttention,
        feed_forward: FeedForward | Callable[[NDArray[Any]], NDArray[Any]],
        *,
        attention_norm: LayerNorm,
        feed_forward_norm: LayerNorm | None = None,
        cross_attention: MultiHeadAttention | None = None,
        cross_norm: LayerNorm | None = None,
        norm_first: bool = True,
        parallel: bool = False,
    ) -> None:
        if parallel and (not norm_first or cross_attention is not None):
            raise ValueError("parallel blocks must have norm_first, and no cross_attention")
        if feed_forward_norm is None and not parallel:
            raise ValueError("feed_forward_norm must be given unless the block is parallel")
        if (cross_attention is None) != (cross_norm is None):
            raise ValueError("cross_attention and cross_norm must be given together")
        self.attention, self.attention_norm = attention, attention_norm
        self.cross_attention, self.cross_norm = cross_attention, cross_norm
        self.feed_forward, self.feed_forward_norm = feed_forward, feed_forward_norm
        self.norm_first, self.parallel = norm_first, parallel

    def __repr__(self) -> str:
        kind = "parallel" if self.parallel else "pre-norm" if self.norm_first else "post-norm"
        parts = [self.attention, self.cross_attention, self.feed_forward]
        return f"<TransformerBlock, {kind}: {', '.join(repr(part) for part in parts if part is not None)}>"

    def __call__(
        self,
        x: Array,
        context: Array | Keys | None = None,
        *,
        lengths: Ints | None = None,
        attention_mask: Array | None = None,
        cu_seqlens: Ints | None = None,
        context_lengths: Ints | None = None,
        context_cu_seqlens: Ints | None = None,
        positions: Array | None = None,
        mask: Array | None = None,
        cache: Any = None,
    ) -> NDArray[Any]:
        """Run the block; arguments are those of :class:`MultiHeadAttention`, `context` for its `cross_attention`.

        Returns
        -------
        ndarray, (B, L, E), (L, E) or (total, E)
            Rows of padding are 0.
        """
        x = np.asarray(x)
        rows = Rows(x.shape[:-1], lengths, attention_mask, cu_seqlens, pack=are_packed(mask, cache))
        if context is None and self.cross_attention is not None:
            raise TypeError("context must be given to a block with cross-attention")
        if context is not None and self.cross_attention is None:
            raise TypeError("context must not be given to a block without cross-attention")
        if context is not None and not isinstance(context, Keys):
            context = self.cross_attention._keys(context, context_lengths, None, context_cu_seqlens, mask is None)
        start = None if cache is None else cache.lengths
        angles = Angles(rows, start, positions)
        return rows.restore(self.run(rows.pick(x), rows, angles, keys=context, mask=mask, cache=cache))

    def run(
        self, x: NDArray[Any], rows: Rows, angles: Angles, *, keys: Keys | None = None, mask: Any = None, cache: Any = None
    ) -> NDArray[Any]:
        """The block on the rows of a matrix (rows, E), for layers around it: no argument is checked or reshaped."""

        def attend(x):
            return self.attention.attend(x, rows, angles, mask=mask, cache=cache)

        def attend_across(x):
            return self.cross_attention.attend(x, rows, angles, keys=keys)

        if self.parallel:
            h = self.attention_norm(x)
            other = h if self.feed_forward_norm is None else self.feed_forward_norm(x)
            y = self.feed_forward(other)
            y += attend(h)
            y += x
            return y
        steps = [(attend, self.attention_norm), (attend_across, self.cross_norm), (self.feed_forward, self.feed_forward_norm)]
        steps = [(layer, norm) for layer, norm in steps if norm is not None]
        if not self.norm_first:
            for layer, norm in steps:
                x = norm.of_sum(x, layer(x), keep=False)
            return x
        h = self.attention_norm(x)
        for (layer, _), (_, following) in zip(steps, steps[1:]):
            y = layer(h)
            h = following.of_sum(x, y, keep=True)
            x = y
        y = self.feed_forward(h)
        y += x
        return y

    @classmethod
    def from_torch(cls, module: Any) -> TransformerBlock:
        """The block that a ``torch.nn.TransformerEncoderLayer`` or ``TransformerDecoderLayer`` is, in evaluation mode.

        A decoder's layer is causal here.
        """
        from .torch import block

        return block(module)

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Any], prefix: str = "", *, layout: str, config: Mapping[str, Any], block: int = 0
    ) -> TransformerBlock:
        """One block of a checkpoint; arguments are those of :meth:`MultiHeadAttention.from_state_dict`."""
        from .layouts import Reader

        return Reader(state, layout, config).block(prefix, block)
