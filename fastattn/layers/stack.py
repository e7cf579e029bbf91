"""Blocks, one after another, between an embedding and a norm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..kvcache import KVCache
from .attention import Angles, Keys, are_packed
from .dense import LayerNorm, Linear, linear
from .embedding import PatchEmbedding, TokenEmbedding
from .rows import Rows

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from typing_extensions import Self

    from .._typing import Array, Ints
    from .block import TransformerBlock


class _Stack:
    """What encoders and decoders share."""

    def __init__(
        self,
        blocks: Sequence[TransformerBlock],
        *,
        embedding: TokenEmbedding | PatchEmbedding | None = None,
        norm: LayerNorm | None = None,
    ) -> None:
        self.blocks, self.embedding, self.norm = list(blocks), embedding, norm

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self.blocks)} blocks{f' such as {self.blocks[0]!r}' if self.blocks else ''}>"

    def _embedded(self, x, pack, types, positions, start, lengths, attention_mask, cu_seqlens):
        """The rows of what was given, where they are, and their positions."""
        x = np.asarray(x)
        if isinstance(self.embedding, PatchEmbedding):
            x = self.embedding(x)
        of_tokens = isinstance(self.embedding, TokenEmbedding) and x.dtype.kind in "iu"
        rows = Rows(x.shape if of_tokens else x.shape[:-1], lengths, attention_mask, cu_seqlens, pack)
        angles = Angles(rows, start, positions)
        picked = rows.pick(x)
        if of_tokens:
            if types is not None:
                types = rows.pick(np.broadcast_to(np.asarray(types), x.shape))
            picked = self.embedding(picked, angles.positions(), types)
        elif types is not None:
            raise TypeError("types must not be given without tokens and a TokenEmbedding")
        return picked, rows, angles

    @classmethod
    def from_torch(cls, module: Any) -> Self:
        """The stack that a ``torch.nn.TransformerEncoder`` or ``TransformerDecoder`` is, in evaluation mode.

        A decoder's blocks are causal here.
        """
        from .torch import stack

        return stack(cls, module)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], prefix: str = "", *, layout: str, config: Mapping[str, Any]) -> Self:
        """A model from the arrays of a checkpoint.

        Parameters
        ----------
        state : mapping of str to array_like
            Arrays by their names in the checkpoint.
        prefix : str
            What stands before all names that `layout` has. (What usually may, such as ``"bert."``, is found.)
        layout : str
            Whose names they are: one of ``layers.layouts.LAYOUTS``.
        config : mapping
            The checkpoint's ``config.json``, by the names of transformers.
        """
        from .layouts import Reader

        return Reader(state, layout, config, prefix).stack(cls)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> Self:
        """A model from a GGUF file, or from a folder with ``config.json`` and ``model.safetensors`` (of one or several parts).

        Raises
        ------
        ValueError
            If the model is of a kind that no layout is known for, or tensors are missing or of other shapes than they must be.
        """
        from .checkpoints import read_checkpoint
        from .layouts import layout_of

        state, config = read_checkpoint(path)
        return cls.from_state_dict(state, layout=layout_of(config), config=config)


class Encoder(_Stack):
    """Blocks over whole sequences.

    Parameters
    ----------
    blocks : sequence of TransformerBlock
    embedding : TokenEmbedding or PatchEmbedding, optional
        Without one, the encoder is given rows.
    norm : LayerNorm or RMSNorm, optional
        Behind the last block.

    Examples
    --------
    >>> encoder = layers.Encoder.from_pretrained("all-MiniLM-L6-v2")           # a folder
    >>> hidden = encoder(tokens, attention_mask=attention_mask)                # (B, L, 384)
    """

    def __call__(
        self,
        x: Array,
        *,
        lengths: Ints | None = None,
        attention_mask: Array | None = None,
        cu_seqlens: Ints | None = None,
        types: Array | None = None,
        positions: Array | None = None,
        mask: Array | None = None,
    ) -> NDArray[Any]:
        """Encode.

        Parameters
        ----------
        x : array_like of int, (B, L), (L,) or (total,); or rows with one more axis; or images (B, channels, height, width)
            What the embedding takes.
        lengths, attention_mask, cu_seqlens : optional
            Which rows are tokens, as for :class:`MultiHeadAttention`.
        types : array_like of int, of the shape of the tokens, optional
            BERT's ``token_type_ids``.
        positions : array_like of int, of the shape of the tokens, optional
            Default: from 0 in each sequence.
        mask : array_like, optional
            For the attention of every block.

        Returns
        -------
        ndarray, (B, L, E), (L, E) or (total, E)
            Rows of padding are 0.
        """
        x, rows, angles = self._embedded(x, mask is None, types, positions, None, lengths, attention_mask, cu_seqlens)
        for block in self.blocks:
            x = block.run(x, rows, angles, mask=mask)
        return rows.restore(x if self.norm is None else self.norm(x))


class Decoder(_Stack):
    """Blocks over sequences that grow, with a cache for each block and scores of the next token.

    Parameters
    ----------
    blocks : sequence of TransformerBlock
        Whose attention is causal, as a rule.
    embedding : TokenEmbedding, optional
    norm : LayerNorm or RMSNorm, optional
    head : Linear or array_like, (vocabulary, E), optional
        Default: the table of the embedding.

    Examples
    --------
    >>> decoder = layers.Decoder.from_pretrained("SmolLM2-135M-Instruct.gguf")
    >>> cache = decoder.new_cache()
    >>> logits = decoder.logits(decoder([prompt], cache=cache)[:, -1])
    >>> logits = decoder.logits(decoder([[logits.argmax()]], cache=cache)[:, -1])
    """

    def __init__(
        self,
        blocks: Sequence[TransformerBlock],
        *,
        embedding: TokenEmbedding | None = None,
        norm: LayerNorm | None = None,
        head: Linear | Array | None = None,
    ) -> None:
        super().__init__(blocks, embedding=embedding, norm=norm)
        if head is None and embedding is not None:
            head = embedding.table
        self.head = None if head is None else linear("head", head)

    def new_cache(self, batch: int = 1, capacity: int | None = None, dtype: Any = "float32", **keywords: Any) -> list[KVCache]:
        """Empty caches, one for each block; arguments are those of :class:`fastattn.KVCache`."""
        parts = [block.attention for block in self.blocks]
        return [KVCache(batch, a.num_kv_heads, capacity, a.head_dim, a.v_head_dim, dtype, **keywords) for a in parts]

    def keys(
        self, context: Array, *, lengths: Ints | None = None, attention_mask: Array | None = None, cu_seqlens: Ints | None = None
    ) -> list[Keys]:
        """Keys and values of an encoder's output for the cross-attention of each block, made once.

        Arguments are those of :meth:`MultiHeadAttention.keys`.
        """
        rows = {"lengths": lengths, "attention_mask": attention_mask, "cu_seqlens": cu_seqlens}
        return [block.cross_attention.keys(context, **rows) for block in self.blocks]

    def __call__(
        self,
        x: Array,
        context: Array | Sequence[Keys] | None = None,
        *,
        lengths: Ints | None = None,
        attention_mask: Array | None = None,
        cu_seqlens: Ints | None = None,
        context_lengths: Ints | None = None,
        positions: Array | None = None,
        mask: Array | None = None,
        cache: Sequence[Any] | None = None,
    ) -> NDArray[Any]:
        """Hidden states of tokens, which follow those in the cache.

        Parameters
        ----------
        x : array_like of int, (B, L), (L,) or (total,); or rows with one more axis
        context : array_like, (B, S, F), or what :meth:`keys` returned, optional
            For blocks with cross-attention.
        lengths, attention_mask, cu_seqlens : optional
            Which rows are tokens, as for :class:`MultiHeadAttention`.
        context_lengths : optional
            Rows of each entry of `context`.
        positions : array_like of int, of the shape of the tokens, optional
            Default: from the length of the cache.
        mask : array_like, optional
            For the self-attention of every block.
        cache : sequence of KVCache or Pages, one for each block, optional
            What :meth:`new_cache` returned, or pages. If it is full, nothing has been appended to any of them.

        Returns
        -------
        ndarray, (B, L, E), (L, E) or (total, E)
            What :meth:`logits` takes. Rows of padding are 0.
        """
        caches = [None] * len(self.blocks) if cache is None else list(cache)
        if len(caches) != len(self.blocks):
            raise ValueError(f"cache must hold one for each of {len(self.blocks)} blocks; got {len(caches)}")
        if context is None:
            keys = [None] * len(self.blocks)
        elif isinstance(context, list) and all(isinstance(part, Keys) for part in context):
            keys = context
        else:
            keys = self.keys(context, lengths=context_lengths)
        if len(keys) != len(self.blocks):
            raise ValueError(f"context must hold keys for each of {len(self.blocks)} blocks; got {len(keys)}")
        start = caches[0].lengths if cache else None
        x, rows, angles = self._embedded(x, are_packed(mask, *caches), None, positions, start, lengths, attention_mask, cu_seqlens)
        for block, block_keys, block_cache in zip(self.blocks, keys, caches):
            x = block.run(x, rows, angles, keys=block_keys, mask=mask, cache=block_cache)
        return rows.restore(x if self.norm is None else self.norm(x))

    def logits(self, hidden: NDArray[Any]) -> NDArray[Any]:
        """Scores (..., vocabulary) of the next token, from hidden states (..., E)."""
        if self.head is None:
            raise TypeError("the decoder has neither a head nor an embedding whose table could be one")
        return self.head(hidden)
