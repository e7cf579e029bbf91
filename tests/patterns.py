"""Patterns of block masks that the tests share: how each is built, and its plain definition."""

import numpy as np

from fastattn import BlockMask

BLOCK_SIZES = (16, 32, 48, 64, 80, 100, 128, 256)


def near(left, right):
    return lambda p, j: (j >= p - left) & (j <= p + right)


PATTERNS = {
    "causal": (BlockMask.causal, {}, lambda p, j, n: j <= p),
    "window": (BlockMask.sliding_window, {"window": (50, 7)}, lambda p, j, n: near(50, 7)(p, j)),
    "window of both sides": (BlockMask.sliding_window, {"window": 20}, lambda p, j, n: near(20, 20)(p, j)),
    "window of the row itself": (BlockMask.sliding_window, {"window": (0, 0)}, lambda p, j, n: j == p),
    "window without a left bound": (BlockMask.sliding_window, {"window": (None, 3)}, lambda p, j, n: j <= p + 3),
    "window without bounds": (BlockMask.sliding_window, {"window": (None, None)}, lambda p, j, n: j >= 0),
    "causal window": (BlockMask.sliding_window, {"window": (90, None), "causal": True}, lambda p, j, n: near(90, 0)(p, j)),
    "dilated": (
        BlockMask.dilated,
        {"window": (9, 4), "dilation": 7},
        lambda p, j, n: near(63, 28)(p, j) & ((j - p) % 7 == 0),
    ),
    "widely dilated": (
        BlockMask.dilated,
        {"window": (None, None), "dilation": 101, "causal": True},
        lambda p, j, n: (j <= p) & ((j - p) % 101 == 0),
    ),
    "strided": (
        BlockMask.strided,
        {"stride": 23},
        lambda p, j, n: (j <= p) & ((p - j <= 23) | ((p - j) % 23 == 0)),
    ),
    "strided in both directions": (
        BlockMask.strided,
        {"stride": 130, "causal": False},
        lambda p, j, n: (abs(p - j) <= 130) | ((p - j) % 130 == 0),
    ),
    "strided by the square root": (
        BlockMask.strided,
        {},
        lambda p, j, n: (j <= p) & ((p - j <= round(n**0.5)) | ((p - j) % round(n**0.5) == 0)),
    ),
    "fixed": (
        BlockMask.fixed,
        {"stride": 33, "summary": 5},
        lambda p, j, n: (j <= p) & ((p // 33 == j // 33) | (j % 33 >= 28)),
    ),
    "fixed, every key a summary": (BlockMask.fixed, {"stride": 33, "summary": 33}, lambda p, j, n: j <= p),
    "fixed in both directions": (
        BlockMask.fixed,
        {"stride": 150, "summary": 1, "causal": False},
        lambda p, j, n: (p // 150 == j // 150) | (j % 150 == 149),
    ),
    "longformer": (
        BlockMask.longformer,
        {"window": 30, "global_tokens": 3},
        lambda p, j, n: near(30, 30)(p, j) | (j < 3) | ((p >= 0) & (p < min(3, n))),
    ),
    "causal longformer": (
        BlockMask.longformer,
        {"window": 30, "global_tokens": 3, "causal": True},
        lambda p, j, n: (j <= p) & (near(30, 30)(p, j) | (j < 3) | ((p >= 0) & (p < min(3, n)))),
    ),
    "longformer with scattered tokens": (
        BlockMask.longformer,
        {"window": (4, 0), "global_tokens": np.array([0, 60, 33])},
        lambda p, j, n: near(4, 0)(p, j) | np.isin(j, [0, 60, 33]) | np.isin(p, [0, 60, 33]),
    ),
}
