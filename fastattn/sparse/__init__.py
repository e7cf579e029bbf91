"""Block-sparse patterns: which blocks of keys each block of query rows may see.

A `BlockMask` is a description only. `fastattn.attention` takes it as ``mask=`` and computes the listed blocks, so that
work and memory are proportional to them. Build one from a pattern (`BlockMask.sliding_window`, `BlockMask.bigbird`,
...), from the data (`BlockMask.top_k`), from a function or from a dense mask, and combine masks with ``&``, ``|`` and
``~``.

The modules: ``blocks`` numbers, packs and normalises blocks, ``patterns`` and ``selection`` build lists of them,
``mask`` holds the class.
"""

from .mask import BlockMask

__all__ = ["BlockMask"]
