"""Pages by what their keys could score at most: between the smallest and the largest number of each channel.

Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", 2024. No key of a page scores more than
``sum(max(q * low, q * high))``, which is a product as well, of ``[max(q, 0), min(q, 0)]`` and ``[high, low]``: so bounds are kept as
keys of twice the head size, and pages are selected as keys are.
"""

from __future__ import annotations

import numpy as np

from . import runtime
from ._quantized import decoded, kind_of
from .indexed import Selection

_NUMBERS = 1 << 22  # that are looked through at a time


def bounds_of(keys):
    """``[high, low]`` over the rows of pages ``(n, H, rows, D)``, as ``(H, n, 2 * D)`` of their dtype; of quantised ones in float32."""
    if kind_of(keys.dtype) is not None:
        keys = decoded(keys)
    keys = keys.swapaxes(0, 1)
    if keys.dtype.itemsize != 2:
        return np.concatenate([keys.max(axis=2), keys.min(axis=2)], axis=2)
    ordered = _in_order(keys.view(np.int16))  # NumPy compares integers far faster than halves
    return _in_order(np.concatenate([ordered.max(axis=2), ordered.min(axis=2)], axis=2)).view(keys.dtype)


def _in_order(bits):
    """16 bits of floats as integers of the same order, and back."""
    return bits ^ ((bits >> 15) & 0x7FFF)


def renew(bounds, k, pages):
    """Bring the bounds of full pages up to date."""
    step = max(1, _NUMBERS // max(k[:1].size, 1))
    for n in range(0, len(pages), step):
        some = pages[n : n + step]
        bounds[:, some] = bounds_of(k[some])


def select_pages(q, bounds, table, position, lengths, count, page_size, causal, keep_first, keep_recent):
    """The pages of most promise to each query row and kv head: ``(rows, Hkv, count)`` int32, their places in the row's sequence.

    `q` is ``(rows, Hq, D)``, times the sign of the scale; `bounds` ``(Hkv, pages, 2 * D)``, which a head reads one after the other;
    `table` ``(rows, most)``, `position` and `lengths` ``(rows,)``. A group shares its pages: its heads' bounds are summed.
    """
    rows, num_heads, head_dim = q.shape
    heads = bounds.shape[0]
    of_pages = bounds.swapaxes(0, 1)[:, :, None]
    of_group = q.reshape(rows, heads, num_heads // max(heads, 1), head_dim).astype(np.float32)
    signed = np.concatenate([np.maximum(of_group, 0).sum(axis=2), np.minimum(of_group, 0).sum(axis=2)], axis=2)[:, :, None]
    seen = np.minimum(position + 1, lengths) if causal else lengths
    pages = -(-np.maximum(seen, 0) // page_size)
    newest = np.minimum(position, lengths - 1)
    recent = newest // page_size - np.maximum(newest - keep_recent + 1, 0) // page_size + 1 if keep_recent else np.zeros_like(newest)
    recent = np.where(newest < 0, 0, recent)
    found, kinds = np.empty((rows, heads, 1, count), np.int32), set(recent.tolist())
    for kept in kinds:
        own = slice(None) if len(kinds) == 1 else np.flatnonzero(recent == kept)
        part = found if len(kinds) == 1 else found[own]
        select = Selection(
            signed[own], of_pages, None, False, False, pages[own] - 1, pages[own], np.ascontiguousarray(table[own]), 0,
            -(-keep_first // page_size), kept, part,
        )  # fmt: skip
        runtime.backend().select_keys(select)
        if part is not found:
            found[own] = part
    return found[:, :, 0]


def keys_of(pages, page_size):
    """The keys of pages ``(..., n)``, -1 for those of none: ``(..., n * page_size)``."""
    keys = pages[..., None] * np.int32(page_size) + np.arange(page_size, dtype=np.int32)
    keys[pages < 0] = -1
    return keys.reshape(*pages.shape[:-1], pages.shape[-1] * page_size)
