"""Layers of a transformer, without a framework: weights in, NumPy arrays through.

>>> from fastattn import layers
>>> model = layers.Decoder.from_pretrained("SmolLM2-135M-Instruct.gguf")
>>> logits = model.logits(model([[1, 42, 7]])[:, -1])

A layer is a function of rows. :class:`Linear`, :class:`LayerNorm`, :class:`RMSNorm` and :class:`FeedForward` do not care whose
rows they are given; :class:`MultiHeadAttention` alone mixes rows, and has to know which of them make a sequence. Three ways of
saying that are understood everywhere:

- an array ``(B, L, E)``, or ``(L, E)``: sequences of one length;
- the same with `lengths` ``(B,)`` or `attention_mask` ``(B, L)`` (1 is a token, as tokenizers have it): padded. Padding is taken out
  before the first layer and put back, as zeros, behind the last one, so that no layer spends time on it;
- an array ``(total, E)`` with `cu_seqlens` ``(B + 1,)``: packed.

:class:`TransformerBlock` puts attention and feed-forward together, :class:`Encoder` and :class:`Decoder` put blocks together, and each
of them can be had from arrays, from PyTorch's own modules (``from_torch``), from a mapping of a checkpoint's names to arrays
(``from_state_dict``), and from safetensors and GGUF files (:func:`read_checkpoint`, ``from_pretrained``).

Products with weights are NumPy's, which is to say its BLAS's. All else is this library's. Inference only: there is no backward
pass and no dropout.
"""

from .attention import Keys, MultiHeadAttention, Pages, Rope
from .block import TransformerBlock
from .checkpoints import read_checkpoint
from .dense import FeedForward, LayerNorm, Linear, RMSNorm
from .embedding import PatchEmbedding, TokenEmbedding
from .stack import Decoder, Encoder

__all__ = [
    "Decoder",
    "Encoder",
    "FeedForward",
    "Keys",
    "LayerNorm",
    "Linear",
    "MultiHeadAttention",
    "Pages",
    "PatchEmbedding",
    "RMSNorm",
    "Rope",
    "TokenEmbedding",
    "TransformerBlock",
    "read_checkpoint",
]
