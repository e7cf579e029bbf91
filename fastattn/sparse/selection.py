"""`BlockMask.top_k`: a pattern chosen from the data, by the scores of pooled queries and keys."""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, Literal

import numpy as np

from .checks import check_grid, check_heads, check_int
from .patterns import cut_causal, place

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from .mask import BlockMask

# Pooled scores of a head that are held at once: they should stay in the cache.
_CHUNK = 1 << 18


def top_k(
    cls: type[BlockMask],
    q: ArrayLike,
    k: ArrayLike,
    num_blocks: int | None = None,
    *,
    mass: float | None = None,
    pool: Literal["mean", "max"] = "mean",
    sink_blocks: int = 1,
    recent_blocks: int = 1,
    causal: bool = False,
    query_offset: int | None = None,
    scale: float | None = None,
    per_kv_head: bool = False,
    block_size: int = 64,
) -> BlockMask:
    """For each block of query rows, the key blocks that promise most of the attention.

    The queries and keys of each block are pooled to one vector. With ``s`` the score of pooled query and pooled key,
    ``n * exp(s)`` estimates what a block of ``n`` keys adds to the softmax denominator, hence its share of the
    attention mass. The first ``sink_blocks`` and the ``recent_blocks`` up to the rows' own position are always kept;
    then the blocks with the largest shares: ``num_blocks`` in all, or, with ``mass``, as many as reach that share, so
    that the pattern is dense where attention is spread out and sparse where it is peaked.

    Parameters
    ----------
    q : array, shape (B, Hq, q_len, D), (Hq, q_len, D) or (q_len, D)
    k : array, shape (B, Hkv, k_len, D), (Hkv, k_len, D) or (k_len, D)
        As for `fastattn.attention`; grouped heads are understood.
    num_blocks : int, optional
        Blocks to keep for each block row, sink and recent ones included (and never fewer than those). With ``mass``: at
        most so many.
    mass : float, optional
        The share of the estimated attention mass to reach, from 0 to 1.
    pool : {"mean", "max"}
        ``"mean"`` [1]_: the means of both. ``"max"`` [2]_: the mean query, and the largest score that any key within
        the smallest and largest component of the block could have; it finds single strong keys, which a mean hides.
    sink_blocks, recent_blocks : int
        With 1 and 1, the first block, and those that hold the rows' own positions. The first keys gather attention
        whatever they hold [3]_.
    causal : bool
        Only keys ``j <= p``.
    query_offset : int, optional
        The position of row 0; by default ``k_len - q_len``.
    scale : float, optional
        Of the scores; by default ``1 / sqrt(D)``. It matters to ``mass`` and to ``per_kv_head``.
    per_kv_head : bool
        One choice for all query heads of a group, by the mean of their shares.
    block_size : int

    Returns
    -------
    BlockMask
        Of shape ``(B, Hq, q_len, k_len)``.

    References
    ----------
    .. [1] Jiang et al., "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention",
       2024, arXiv:2407.02490; for a share of the mass: Lai et al., "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient
       Long-Sequence Inference", 2025, arXiv:2502.20766
    .. [2] Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", 2024, arXiv:2406.10774
    .. [3] Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023, arXiv:2309.17453
    """
    q, k = check_heads(q, k)
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, k_len = k.shape[1:3]
    grid = check_grid(block_size, (batch, num_heads, q_len, k_len))
    position = place(grid, query_offset)
    sink_blocks = check_int("sink_blocks", sink_blocks, 0)
    recent_blocks = check_int("recent_blocks", recent_blocks, 0)
    num_blocks = grid.cols if num_blocks is None and mass is not None else check_int("num_blocks", num_blocks, 0)
    if mass is not None and not (isinstance(mass, numbers.Real) and 0 <= mass <= 1):
        raise ValueError(f"mass must lie between 0 and 1; got {mass!r}")
    if pool not in ("mean", "max"):
        raise ValueError(f"pool must be 'mean' or 'max'; got {pool!r}")
    scale = 1 / math.sqrt(max(1, head_dim)) if scale is None else float(scale)
    if grid.num_blocks == 0:
        return cls._blank(grid)

    size = grid.block_size
    first = position[::size] // size
    last = position[np.minimum(np.arange(1, grid.rows + 1) * size, q_len) - 1] // size
    reach = np.clip(last + 1, 0, grid.cols) if causal else np.full(grid.rows, grid.cols)
    log_counts = np.log(np.minimum(k_len - np.arange(grid.cols) * size, size), dtype=np.float32)
    group = num_heads // num_kv_heads
    sharing = group if per_kv_head else 1  # query heads with one pattern
    step = max(1, _CHUNK // grid.cols)

    found = []
    for b, leader in np.ndindex(batch, num_heads // sharing):
        heads = range(leader * sharing, (leader + 1) * sharing)
        keys = _pool_keys(k[b, heads[0] // group], size, pool)
        queries = [_pool_queries(q[b, h], size, pool) * np.float32(scale) for h in heads]
        for start in range(0, grid.rows, step):
            rows = slice(start, start + step)
            cols = np.arange(reach[rows].max())
            usable = cols < reach[rows, None]
            recent = (cols > first[rows, None] - recent_blocks) & (cols <= last[rows, None])
            kept = ((cols < sink_blocks) | recent) & usable
            scores = [np.where(usable, x[rows] @ keys[cols].T + log_counts[cols], -np.inf) for x in queries]
            if mass is None and sharing == 1:
                rank = scores[0]  # in the order of the shares
            else:
                rank = _log_shares(scores)
            row, col = np.nonzero(_choose(rank, kept, num_blocks, mass))
            found += [((b * num_heads + h) * grid.rows + start + row) * grid.cols + col for h in heads]
    blocks = np.sort(np.concatenate(found))
    return cls._from_blocks(grid, blocks, *(cut_causal(grid, position, blocks) if causal else ()))


def _over_blocks(reduce, x, block_size):
    """``reduce`` over the rows of each block, the last one ragged."""
    ragged = len(x) % block_size
    even = reduce.reduce(x[: len(x) - ragged].reshape(-1, block_size, x.shape[1]), axis=1)
    return np.concatenate([even, reduce.reduce(x[-ragged:], axis=0, keepdims=True)]) if ragged else even


def _pool_queries(q, block_size, pool):
    """One vector for each block, to be multiplied with those of `_pool_keys`."""
    counts = np.minimum(len(q) - np.arange(0, len(q), block_size), block_size)
    mean = _over_blocks(np.add, q.astype(np.float32, copy=False), block_size) / counts[:, None].astype(np.float32)
    return mean if pool == "mean" else np.concatenate([np.maximum(mean, 0), np.minimum(mean, 0)], axis=1)


def _pool_keys(k, block_size, pool):
    """Means; or maxima, for the positive components of a query, and minima, for the negative ones."""
    if pool == "mean":
        return _pool_queries(k, block_size, pool)
    k = k.astype(np.float32, copy=False)
    return np.concatenate([_over_blocks(reduce, k, block_size) for reduce in (np.maximum, np.minimum)], axis=1)


def _log_shares(scores):
    """The logarithm of each block's share of its row's estimated mass: the mean over the heads in ``scores``."""
    total = None
    for score in scores:
        score -= np.max(score, axis=1, keepdims=True, initial=np.finfo(np.float32).min)
        score -= np.log(np.maximum(np.exp(score).sum(axis=1, keepdims=True), np.finfo(np.float32).tiny))
        total = score if total is None else np.logaddexp(total, score)
    return total - np.float32(np.log(len(scores)))


def _choose(rank, kept, num_blocks, mass):
    """Flags of the blocks that are kept, or needed to reach ``num_blocks`` or ``mass``; ``rank`` is `_log_shares`."""
    chosen = np.zeros(rank.shape, bool)
    num_blocks = min(num_blocks, rank.shape[1])
    falling = np.where(kept, -np.inf, -rank)
    if mass is not None:
        order = np.argsort(falling, axis=1)[:, :num_blocks]
        share = np.exp(np.take_along_axis(rank, order, axis=1))
        np.put_along_axis(chosen, order, np.cumsum(share, axis=1, dtype=np.float64) - share < mass, axis=1)
    elif num_blocks:
        order = np.argpartition(falling, num_blocks - 1, axis=1)[:, :num_blocks]
        np.put_along_axis(chosen, order, True, axis=1)
    return kept | (chosen & (falling < np.inf))
