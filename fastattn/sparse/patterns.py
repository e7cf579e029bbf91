"""The constructors of `BlockMask` that need no data: functions of the class, ``cls``, which become its class methods.

Three shapes of visibility make all the published patterns. None of them walks the elements of the mask; each finds the
blocks that it touches, and computes elements only of the blocks that it cuts, once for those that look alike.

- `_bands`: row ``i`` sees the keys ``lo[i] <= j < hi[i]`` (causal, windows, documents);
- `_template`: row ``i`` sees a fixed set of keys, shifted to ``shift[i]`` (strides, dilation, neighbourhoods);
- `_cross`: some rows see some keys (global tokens, summary columns).

Throughout, ``q_len`` rows stand at the positions ``p = i + query_offset`` of a sequence of ``k_len`` keys, as in
`fastattn.attention`: ``k_len`` defaults to ``q_len``, and ``query_offset`` to ``k_len - q_len``, so that the last row
stands at the last key.
"""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from .blocks import WHOLE, examine, examine_alike, ranges, sorted_unique, unique_rows
from .checks import (
    check_cu_seqlens,
    check_document_ids,
    check_grid,
    check_int,
    check_per_axis,
    check_positions,
    check_window,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike, NDArray

    from .._typing import Window
    from .mask import BlockMask

_Constructor = TypeVar("_Constructor")

_BLOCK_SIZE = """\
block_size : int
    Rows and columns of a block."""

# What several docstrings say.
_PARAGRAPHS = {
    "block_size": _BLOCK_SIZE,
    "line": f"""\
q_len, k_len : int
    Rows and keys; ``k_len`` is ``q_len`` by default.
{_BLOCK_SIZE}
query_offset : int, optional
    The position of row 0; by default ``k_len - q_len``, so that the last row sees the last key.""",
    "stride": """\
stride : int, optional
    By default the rounded square root of ``k_len``. A multiple of ``block_size`` makes the fewest blocks.""",
    "returns": """\
Returns
-------
BlockMask""",
    "beltagy": 'Beltagy, Peters, Cohan, "Longformer: The Long-Document Transformer", 2020, arXiv:2004.05150',
    "child": 'Child, Gray, Radford, Sutskever, "Generating Long Sequences with Sparse Transformers", 2019, arXiv:1904.10509',
}


def _documented(constructor: _Constructor) -> _Constructor:
    """The same function, its docstring with the paragraphs that it names in braces."""
    if constructor.__doc__:  # python -OO leaves none
        constructor.__doc__ = inspect.cleandoc(constructor.__doc__).format(**_PARAGRAPHS)
    return constructor


@_documented
def from_dense(cls: type[BlockMask], mask: ArrayLike, block_size: int = 64) -> BlockMask:
    """The blocks of a dense mask.

    Parameters
    ----------
    mask : array of bool, shape (B, H, q_len, k_len), (H, q_len, k_len) or (q_len, k_len)
        True where the key is visible.
    {block_size}

    {returns}
    """
    mask = np.asarray(mask)
    if mask.dtype != bool:
        raise TypeError(f"mask must hold bool; got {mask.dtype}")
    if not 2 <= mask.ndim <= 4:
        raise ValueError(f"mask must have shape (B, H, q_len, k_len), (H, q_len, k_len) or (q_len, k_len); got {mask.shape}")
    grid = check_grid(block_size, mask.shape)
    if mask.size == 0:
        return cls._blank(grid)
    patterns = mask.reshape(grid.patterns, *grid.shape[2:])
    touched = patterns
    for axis in (1, 2):
        touched = np.logical_or.reduceat(touched, np.arange(0, mask.shape[axis - 3], grid.block_size), axis=axis)
    blocks = np.flatnonzero(touched)
    return cls._from_blocks(grid, blocks, *examine(grid, blocks, lambda p, i, j: patterns[p][i, j]))


@_documented
def from_function(
    cls: type[BlockMask],
    mask_mod: Callable[[int, int, NDArray[np.int64], NDArray[np.int64]], Any],
    q_len: int,
    *,
    k_len: int | None = None,
    batch: int = 1,
    heads: int = 1,
    block_size: int = 64,
    within: BlockMask | None = None,
) -> BlockMask:
    """The blocks in which a function is somewhere true.

    Parameters
    ----------
    mask_mod : callable
        ``mask_mod(b, h, q_idx, k_idx) -> bool``, the form of FlexAttention [1]_: ``b`` and ``h`` are ints, ``q_idx``
        and ``k_idx`` arrays of int64 that broadcast against each other. It is called on a bounded number of elements at
        a time.
    q_len, k_len : int
    batch, heads : int
        How many patterns; 1 is shared by all.
    {block_size}
    within : BlockMask, optional
        Look only into its blocks; the result is its intersection with the function. Without it every one of the
        ``q_len * k_len`` elements of each pattern is evaluated.

    {returns}

    References
    ----------
    .. [1] Dong et al., "Flex Attention: A Programming Model for Generating Optimized Attention Kernels", 2024,
       arXiv:2412.05496
    """
    patterns = check_int("batch", batch, 0), check_int("heads", heads, 0)
    grid = check_grid(block_size, (*patterns, *_lengths(q_len, k_len)))
    if within is None:
        blocks = np.arange(grid.num_blocks)
    else:
        within = cls._blank(grid) | within  # which checks and broadcasts it
        grid, blocks = within._grid, within._block_numbers()

    def see(pattern, q_idx, k_idx):
        visible = np.asarray(mask_mod(*divmod(pattern, grid.shape[1]), q_idx, k_idx))
        if visible.dtype != bool:
            raise TypeError(f"mask_mod must return bool; got {visible.dtype}")
        return visible

    found = cls._from_blocks(grid, blocks, *examine(grid, blocks, see))
    return found if within is None else found & within


@_documented
def causal(
    cls: type[BlockMask], q_len: int, *, k_len: int | None = None, block_size: int = 64, query_offset: int | None = None
) -> BlockMask:
    """Keys up to the row's own position: ``j <= p``.

    Parameters
    ----------
    {line}

    {returns}

    References
    ----------
    Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762
    """
    grid, position = _line(q_len, k_len, block_size, query_offset)
    return _bands(cls, grid, np.zeros_like(position), position + 1)


@_documented
def sliding_window(
    cls: type[BlockMask],
    q_len: int,
    *,
    k_len: int | None = None,
    window: int | Window,
    block_size: int = 64,
    causal: bool = False,
    query_offset: int | None = None,
) -> BlockMask:
    """Keys near the row's own position: ``p - left <= j <= p + right``.

    Parameters
    ----------
    {line}
    window : int or (int or None, int or None)
        ``(left, right)``, inclusive, None for no bound on that side; an int stands for both sides.
    causal : bool
        Also require ``j <= p``.

    {returns}

    References
    ----------
    {beltagy};
    Jiang et al., "Mistral 7B", 2023, arXiv:2310.06825
    """
    grid, position = _line(q_len, k_len, block_size, query_offset)
    left, right = check_window(window, causal)
    lo = np.zeros_like(position) if left is None else position - left
    hi = np.full_like(position, grid.shape[3]) if right is None else position + right + 1
    return _bands(cls, grid, lo, hi)


@_documented
def dilated(
    cls: type[BlockMask],
    q_len: int,
    *,
    k_len: int | None = None,
    window: int | Window,
    dilation: int,
    block_size: int = 64,
    causal: bool = False,
    query_offset: int | None = None,
) -> BlockMask:
    """Every ``dilation``-th key near the row's own position: ``j = p + t * dilation`` for ``-left <= t <= right``.

    Parameters
    ----------
    {line}
    window : int or (int or None, int or None)
        ``(left, right)`` in steps of ``dilation``, inclusive, None for no bound on that side; an int stands for both
        sides.
    dilation : int
        1 is `sliding_window`.
    causal : bool
        Also require ``j <= p``.

    {returns}

    References
    ----------
    {beltagy}, section 3.1
    """
    grid, position = _line(q_len, k_len, block_size, query_offset)
    dilation = check_int("dilation", dilation, 1)
    left, right = check_window(window, causal)
    distance = _distances(grid, position)
    visible = distance % dilation == 0
    if left is not None:
        visible &= distance >= -left * dilation
    if right is not None:
        visible &= distance <= right * dilation
    return _template(cls, grid, position, distance, visible)


@_documented
def strided(
    cls: type[BlockMask],
    q_len: int,
    *,
    k_len: int | None = None,
    stride: int | None = None,
    block_size: int = 64,
    causal: bool = True,
    query_offset: int | None = None,
) -> BlockMask:
    """The strided pattern of the Sparse Transformer: the last ``stride`` keys, and every ``stride``-th before them.

    The paper gives each part to a head of its own; here one pattern holds both. Row ``p`` sees ``p - stride <= j <= p``
    and all ``j <= p`` with ``(p - j) % stride == 0``: ``O(sqrt(n))`` keys when ``stride`` is about ``sqrt(n)``.

    Parameters
    ----------
    {line}
    {stride}
    causal : bool
        False mirrors the pattern to later keys.

    {returns}

    References
    ----------
    {child}
    """
    grid, position = _line(q_len, k_len, block_size, query_offset)
    stride = _stride(stride, grid)
    distance = _distances(grid, position)
    visible = (np.abs(distance) <= stride) | (distance % stride == 0)
    if causal:
        visible &= distance <= 0
    return _template(cls, grid, position, distance, visible)


@_documented
def fixed(
    cls: type[BlockMask],
    q_len: int,
    *,
    k_len: int | None = None,
    stride: int | None = None,
    summary: int | None = None,
    block_size: int = 64,
    causal: bool = True,
    query_offset: int | None = None,
) -> BlockMask:
    """The fixed pattern of the Sparse Transformer: the row's own segment, and the end of every segment.

    The paper gives each part to a head of its own; here one pattern holds both. Segments are ``stride`` long. Row ``p``
    sees the keys of its segment, ``j // stride == p // stride``, and the last ``summary`` keys of all segments,
    ``j % stride >= stride - summary``; all with ``j <= p``.

    Parameters
    ----------
    {line}
    {stride}
    summary : int, optional
        The paper's ``c``; by default 8, or ``stride`` if that is less.
    causal : bool
        False leaves out ``j <= p``.

    {returns}

    References
    ----------
    {child}
    """
    grid, position = _line(q_len, k_len, block_size, query_offset)
    stride = _stride(stride, grid)
    summary = min(8, stride) if summary is None else check_int("summary", summary, 1)
    if summary > stride:
        raise ValueError(f"summary must be at most stride = {stride}; got {summary}")
    start = position // stride * stride
    own = _bands(cls, grid, start, position + 1 if causal else start + stride)
    ends = np.arange(grid.shape[3]) % stride >= stride - summary
    return own | _cross(cls, grid, np.ones(grid.shape[2], bool), ends, before=start if causal else None)


@_documented
def longformer(
    cls: type[BlockMask],
    q_len: int,
    *,
    k_len: int | None = None,
    window: int | Window,
    global_tokens: int | ArrayLike,
    block_size: int = 64,
    causal: bool = False,
    query_offset: int | None = None,
) -> BlockMask:
    """A sliding window, and global tokens that see and are seen by all.

    Parameters
    ----------
    {line}
    window : int or (int or None, int or None)
        As in `sliding_window`: ``(left, right)``, or both sides. The paper's window of ``w`` is ``w // 2`` here.
    global_tokens : int or array of int
        The first so many positions, or their list.
    causal : bool
        Require ``j <= p`` of everything.

    {returns}

    References
    ----------
    {beltagy}
    """
    grid, position = _line(q_len, k_len, block_size, query_offset)
    near = sliding_window(cls, q_len, k_len=k_len, window=window, block_size=block_size, query_offset=query_offset)
    keys = check_positions("global_tokens", global_tokens, grid.shape[3])
    rows = np.zeros(len(position), bool)
    on_keys = (position >= 0) & (position < len(keys))
    rows[on_keys] = keys[position[on_keys]]
    mask = near | _cross(cls, grid, rows, np.ones_like(keys)) | _cross(cls, grid, np.ones_like(rows), keys)
    return mask & _bands(cls, grid, np.zeros_like(position), position + 1) if causal else mask


@_documented
def bigbird(
    cls: type[BlockMask],
    q_len: int,
    *,
    k_len: int | None = None,
    window_blocks: int = 3,
    global_blocks: int = 1,
    random_blocks: int = 3,
    heads: int = 1,
    seed: int | np.random.Generator = 0,
    block_size: int = 64,
    causal: bool = False,
    query_offset: int | None = None,
) -> BlockMask:
    """Window, global and random blocks.

    The pattern is one of whole blocks: rows whose first one stands in key block ``c`` see the ``window_blocks`` around
    ``c``, the first and the last ``global_blocks``, and ``random_blocks`` others; where ``c`` is itself one of the
    global blocks, they see all.

    Parameters
    ----------
    {line}
    window_blocks : int
        Odd: ``c`` and as many on both sides.
    global_blocks : int
        At each end of the sequence.
    random_blocks : int
        Drawn without replacement among the blocks that are not visible anyway, with ``causal`` among those that are not
        in the future; where there are fewer, all of them.
    heads : int
        How many patterns, with random blocks of their own; 1 is shared by all heads.
    seed : int or numpy.random.Generator
        Of the random blocks: the same seed, the same mask.
    causal : bool
        Require ``j <= p`` of everything.

    {returns}

    References
    ----------
    Zaheer et al., "Big Bird: Transformers for Longer Sequences", 2020, arXiv:2007.14062
    """
    grid = check_grid(block_size, (check_int("heads", heads, 1), *_lengths(q_len, k_len)))
    position = place(grid, query_offset)
    window_blocks = check_int("window_blocks", window_blocks, 1)
    if window_blocks % 2 == 0:
        raise ValueError(f"window_blocks must be odd; got {window_blocks}")
    global_blocks = min(check_int("global_blocks", global_blocks, 0), grid.cols)
    random_blocks = check_int("random_blocks", random_blocks, 0)
    if grid.num_blocks == 0:
        return cls._blank(grid)

    centre = position[:: grid.block_size] // grid.block_size
    last = position[np.minimum(np.arange(1, grid.rows + 1) * grid.block_size, len(position)) - 1]
    reach = np.clip(last // grid.block_size + 1, 0, grid.cols) if causal else np.full(grid.rows, grid.cols)
    window = centre[:, None] + np.arange(window_blocks) - window_blocks // 2
    ends = np.append(np.arange(global_blocks), np.arange(grid.cols - global_blocks, grid.cols))
    local = np.concatenate([window, np.broadcast_to(ends, (grid.rows, len(ends)))], axis=1)

    rows = np.tile(np.arange(grid.rows), grid.patterns)
    random = _draw_others(np.random.default_rng(seed), local[rows], reach[rows], random_blocks)
    cols = np.concatenate([local[rows], random], axis=1)
    blocks = (np.arange(len(rows)) * grid.cols)[:, None] + cols
    global_rows = np.flatnonzero(np.isin(centre, ends)[rows])
    everything = (global_rows * grid.cols)[:, None] + np.arange(grid.cols)
    blocks = np.concatenate([blocks[(cols >= 0) & (cols < grid.cols)], everything.reshape(-1)])
    blocks = sorted_unique(blocks)
    return cls._from_blocks(grid, blocks, *(cut_causal(grid, position, blocks) if causal else ()))


@_documented
def neighborhood(
    cls: type[BlockMask],
    shape: int | tuple[int, ...],
    *,
    window: int | tuple[int, ...],
    dilation: int | tuple[int, ...] = 1,
    causal: bool = False,
    block_size: int = 64,
) -> BlockMask:
    """The nearest keys on a grid of one, two or three axes: sequences, images, videos.

    Tokens are the cells of the grid in C order. Along each axis a cell sees the ``window`` cells around it; near an
    edge the window is moved inwards, not cut, so that every row sees the same number of keys. An even window reaches
    one cell farther back than ahead. With a dilation, the axis falls into ``dilation`` interleaved axes, each with windows
    of its own. This is the definition of NATTEN.

    Parameters
    ----------
    shape : int or tuple of int
        The grid: ``length``, ``(height, width)`` or ``(depth, height, width)``.
    window, dilation : int or tuple of int
        For all axes, or for each; ``window * dilation`` may not exceed the axis.
    causal : bool
        Along the first axis, see no later cell: the window ends at the cell, and is cut at the edge. For time in a
        video.
    {block_size}

    {returns}

    References
    ----------
    Hassani et al., "Neighborhood Attention Transformer", 2022, arXiv:2204.07143;
    Hassani and Shi, "Dilated Neighborhood Attention Transformer", 2022, arXiv:2209.15001
    """
    shape = tuple(check_int("shape", n, 1) for n in np.atleast_1d(shape).tolist())
    if not 1 <= len(shape) <= 3:
        raise ValueError(f"shape must have 1, 2 or 3 axes; got {shape}")
    windows = check_per_axis("window", window, len(shape))
    dilations = check_per_axis("dilation", dilation, len(shape))
    for axis, (n, w, d) in enumerate(zip(shape, windows, dilations)):
        if w * d > n:
            raise ValueError(f"window * dilation must be at most {n}, the size of axis {axis}; got {w} * {d}")

    first, offsets = np.zeros(1, np.int64), np.zeros(1, np.int64)
    for axis, (n, w, d) in enumerate(zip(shape, windows, dilations)):
        cell = np.arange(n)
        rank, phase = np.divmod(cell, d)
        if causal and axis == 0:
            start = rank - (w - 1)
        else:
            start = np.clip(rank - w // 2, 0, (n - phase + d - 1) // d - w)
        first = np.add.outer(first * n, start * d + phase).reshape(-1)
        offsets = np.add.outer(offsets * n, np.arange(w) * d).reshape(-1)
    visible = np.zeros(offsets[-1] + 1, bool)
    visible[offsets] = True
    grid = check_grid(block_size, (math.prod(shape),) * 2)
    return _template(cls, grid, first, np.arange(len(visible)), visible)


@_documented
def document(
    cls: type[BlockMask],
    cu_seqlens: ArrayLike | None = None,
    *,
    ids: ArrayLike | None = None,
    causal: bool = False,
    block_size: int = 64,
) -> BlockMask:
    """Packed documents: each row sees the keys of its own document.

    Parameters
    ----------
    cu_seqlens : array of int, shape (documents + 1,), optional
        Document ``n`` is rows and keys ``cu_seqlens[n]`` to ``cu_seqlens[n + 1] - 1``.
    ids : array of int, shape (length,) or (B, length), optional
        In place of ``cu_seqlens``: the document of each token; each document is one run of tokens.
    causal : bool
        Also require ``j <= i``.
    {block_size}

    {returns}

    References
    ----------
    Krell et al., "Efficient Sequence Packing without Cross-contamination", 2021, arXiv:2107.02027
    """
    if (cu_seqlens is None) == (ids is None):
        raise TypeError("exactly one of cu_seqlens and ids must be given")
    bounds = [check_cu_seqlens("cu_seqlens", cu_seqlens)] if ids is None else check_document_ids("ids", ids)
    lo = np.stack([np.repeat(b[:-1], np.diff(b)) for b in bounds])
    hi = np.stack([np.repeat(b[1:], np.diff(b)) for b in bounds])
    batch, length = lo.shape
    grid = check_grid(block_size, (batch, 1, length, length))
    return _bands(cls, grid, lo, np.broadcast_to(np.arange(1, length + 1), lo.shape) if causal else hi)


def _lengths(q_len, k_len):
    q_len = check_int("q_len", q_len, 0)
    return q_len, q_len if k_len is None else check_int("k_len", k_len, 0)


def place(grid, query_offset):
    """The positions of the rows."""
    q_len, k_len = grid.shape[2:]
    return np.arange(q_len) + (k_len - q_len if query_offset is None else check_int("query_offset", query_offset))


def cut_causal(grid, position, blocks):
    """``(kinds, bits)`` of some blocks of which the elements with ``j <= p`` are visible."""
    _, row, col = grid.split(blocks)
    lead = col * grid.block_size - position[row * grid.block_size]
    cut = np.flatnonzero(lead + grid.block_size > 1)
    kinds = np.full(len(blocks), WHOLE, np.int32)
    key = lead[cut] - lead[cut].min(initial=0)
    kinds[cut], bits = examine_alike(grid, blocks[cut], key, lambda p, i, j: j <= position[i])
    return kinds, bits


def _line(q_len, k_len, block_size, query_offset):
    """The grid of one pattern, and the positions of its rows."""
    grid = check_grid(block_size, _lengths(q_len, k_len))
    return grid, place(grid, query_offset)


def _distances(grid, position):
    """All values of ``j - p``, ascending."""
    return np.arange(-position[-1], grid.shape[3] - position[0]) if len(position) else np.arange(0)


def _stride(stride, grid):
    return max(1, round(math.sqrt(grid.shape[3]))) if stride is None else check_int("stride", stride, 1)


def _bands(cls, grid, lo, hi):
    """Row ``i`` sees the keys ``lo[i] <= j < hi[i]``; the arrays are (q_len,) or (patterns, q_len)."""
    if grid.num_blocks == 0:
        return cls._blank(grid)
    size, k_len = grid.block_size, grid.shape[3]
    lo, hi = (np.clip(x, 0, k_len).reshape(grid.patterns, -1) for x in (lo, hi))
    blind = lo >= hi
    lo[blind], hi[blind] = k_len, 0  # widens no union of rows, empties every intersection

    def over_rows(reduce, x):
        return reduce.reduceat(x, np.arange(0, x.shape[1], size), axis=1).reshape(-1)

    first, stop = over_rows(np.minimum, lo) // size, -(-over_rows(np.maximum, hi) // size)
    inner_first, inner_stop = -(-over_rows(np.maximum, lo) // size), over_rows(np.minimum, hi)
    inner_stop = np.where(inner_stop == k_len, grid.cols, inner_stop // size)

    count = np.maximum(0, stop - first)
    blocks = ranges(np.arange(len(count)) * grid.cols + first, count)
    kinds = np.full(len(blocks), WHOLE, np.int32)
    # The list of a block row: cut blocks, whole blocks from position `left` to `right`, cut blocks.
    begin = np.cumsum(count) - count
    left = np.clip(inner_first - first, 0, count)
    right = np.clip(inner_stop - first, left, count)
    cut = np.sort(np.append(ranges(begin, left), ranges(begin + right, count - right)))
    kinds[cut], bits = examine(grid, blocks[cut], lambda p, i, j: (lo[p][i] <= j) & (j < hi[p][i]))
    return cls._from_blocks(grid, blocks, kinds, bits)


def _template(cls, grid, shift, offsets, visible):
    """Row ``i`` sees key ``shift[i] + offsets[t]`` where ``visible[t]``; ``offsets`` are consecutive numbers."""
    if grid.num_blocks == 0:
        return cls._blank(grid)
    size, q_len, k_len = grid.block_size, *grid.shape[2:]

    # Runs of visible offsets. A gap shorter than a block holds no block: the runs beside it may be taken as one.
    edges = np.flatnonzero(np.diff(visible, prepend=False, append=False))
    run_start, run_stop = edges[::2], edges[1::2]
    apart = np.flatnonzero(run_start[1:] - run_stop[:-1] >= size)
    run_start = offsets[0] + run_start[np.append(0, apart + 1)] if len(run_start) else run_start
    run_stop = offsets[0] + run_stop[np.append(apart, -1)] if len(run_stop) else run_stop

    # Stretches of rows, each within one block, over which the shift stands still or moves with the row: together they
    # see, of each run, one interval of keys.
    step = np.diff(shift)
    starts = sorted_unique(np.append(np.arange(0, q_len, size), np.flatnonzero((step != 0) & (step != 1)) + 1))
    stops = np.append(starts[1:], q_len)
    lo = np.clip(shift[starts][:, None] + run_start, 0, k_len) // size
    hi = -(-np.clip(shift[stops - 1][:, None] + run_stop, 0, k_len) // size)
    first = (starts // size * grid.cols)[:, None] + lo
    blocks = sorted_unique(ranges(first.reshape(-1), np.maximum(0, hi - lo).reshape(-1)))

    # Two blocks look alike when the shifts of their rows differ by a constant, and their columns by the same.
    heads = shift[::size]
    moves = np.append(shift, np.full(-q_len % size, shift[-1])).reshape(grid.rows, size) - heads[:, None]
    _, alike = unique_rows(moves)
    _, row, col = grid.split(blocks)
    lead = col * size - heads[row]
    key = alike[row] * (np.ptp(lead) + 1 if len(lead) else 1) + lead - lead.min(initial=0)
    padded, origin = np.pad(visible, 1), offsets[0] - 1
    kinds, bits = examine_alike(grid, blocks, key, lambda p, i, j: padded.take(j - shift[i] - origin, mode="clip"))
    return cls._from_blocks(grid, blocks, kinds, bits)


def _cross(cls, grid, rows, keys, before=None):
    """The flagged ``rows`` see the flagged ``keys``, row ``i`` only those below ``before[i]``."""
    if grid.num_blocks == 0:
        return cls._blank(grid)
    size, q_len, k_len = grid.block_size, *grid.shape[2:]
    before = np.full(q_len, k_len) if before is None else np.clip(before, 0, k_len)
    (row_flags, row_kind), (key_flags, key_kind) = (
        unique_rows(np.append(flags, np.zeros(-len(flags) % size, bool)).reshape(-1, size)) for flags in (rows, keys)
    )
    row, col = np.flatnonzero(row_flags.any(axis=1)[row_kind]), np.flatnonzero(key_flags.any(axis=1)[key_kind])
    most, least = (reduce.reduceat(before, np.arange(0, q_len, size)) for reduce in (np.maximum, np.minimum))
    count = np.searchsorted(col * size, most[row])
    row, col = np.repeat(row, count), col[ranges(np.zeros_like(count), count)]
    key = row_kind[row] * len(key_flags) + key_kind[col]
    cut = np.flatnonzero(np.minimum((col + 1) * size, k_len) > least[row])
    key[cut] = len(row_flags) * len(key_flags) + np.arange(len(cut))
    blocks = row * grid.cols + col
    kinds, bits = examine_alike(grid, blocks, key, lambda p, i, j: rows[i] & keys[j] & (j < before[i]))
    return cls._from_blocks(grid, blocks, kinds, bits)


def _draw_others(rng, taken, limit, count):
    """For each row ``count`` distinct random numbers below ``limit``, none of them ``taken``; -1 where none is left."""
    taken = np.sort(np.where((taken < 0) | (taken >= limit[:, None]), limit[:, None], taken), axis=1)
    repeated = np.zeros(taken.shape, bool)
    repeated[:, 1:] = taken[:, 1:] == taken[:, :-1]
    taken[repeated] = limit.max(initial=0)  # never reached
    taken.sort(axis=1)
    free = limit - (taken < limit[:, None]).sum(axis=1)

    drawn = np.empty((len(taken), 0), np.int64)  # ascending ranks among the free numbers
    for n in range(count):
        rank = (rng.random(len(taken)) * (free - n)).astype(np.int64)
        for column in drawn.T:
            rank += rank >= column
        drawn = np.sort(np.column_stack([drawn, np.where(n < free, rank, limit)]), axis=1)
    missing = drawn >= free[:, None]
    for column in taken.T:
        drawn += drawn >= column[:, None]
    return np.where(missing, -1, drawn)
