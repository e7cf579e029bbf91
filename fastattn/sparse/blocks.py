"""Blocks of a mask: how they are numbered, how their elements are packed, and how they are brought into canonical form.

A *block list* is what every constructor and every operator of `BlockMask` works on: ``blocks``, ascending block
numbers; ``kinds`` beside them, which is `WHOLE` (every element visible), `EMPTY` (none) or the number of an element
mask; and ``bits``, the element masks, packed as the C library reads them: one row for each key, one bit for each query
row.
"""

import numpy as np

WHOLE = -1
EMPTY = -2

# Elements that `examine` computes at once: enough to hide the interpreter, few enough to stay in a cache.
_CHUNK = 1 << 20


class Grid:
    """The blocks of a mask of shape ``(B, H, q_len, k_len)``.

    There are ``patterns = B * H`` patterns of ``rows * cols`` blocks; block ``(row, col)`` of pattern ``p`` has the
    number ``(p * rows + row) * cols + col``, so that ascending numbers are the order of the CSR arrays.
    """

    __slots__ = ("block_size", "shape", "rows", "cols", "patterns")

    def __init__(self, block_size, shape):
        batch, heads, q_len, k_len = shape
        self.block_size = block_size
        self.shape = shape
        self.rows = -(-q_len // block_size)
        self.cols = -(-k_len // block_size)
        self.patterns = batch * heads

    @property
    def num_blocks(self):
        return self.patterns * self.rows * self.cols

    def split(self, blocks):
        """The pattern, the row and the column of each block."""
        table_row, col = np.divmod(blocks, self.cols)
        pattern, row = np.divmod(table_row, self.rows)
        return pattern, row, col

    def indices(self, blocks):
        """The query indices (n, 1, block_size) and key indices (n, block_size, 1) of blocks, clipped to the mask."""
        _, row, col = self.split(blocks)
        lane = np.arange(self.block_size)
        q_idx = np.minimum(row[:, None, None] * self.block_size + lane, self.shape[2] - 1)
        k_idx = np.minimum(col[:, None, None] * self.block_size + lane[:, None], self.shape[3] - 1)
        return q_idx, k_idx

    def edge(self, blocks):
        """Which of `frames` a block has: 0 in the interior, +1 in a ragged last column, +2 in a ragged last row."""
        _, row, col = self.split(blocks)
        ragged_row = self.shape[2] % self.block_size != 0
        ragged_col = self.shape[3] % self.block_size != 0
        return 2 * (ragged_row & (row == self.rows - 1)) + (ragged_col & (col == self.cols - 1))

    def frames(self):
        """Four element masks that hold the elements within the mask, for the four cases of `edge`."""
        lane = np.arange(self.block_size)
        q_inside = lane < (self.shape[2] % self.block_size or self.block_size)
        k_inside = lane < (self.shape[3] % self.block_size or self.block_size)
        everywhere = lane >= 0
        return pack(np.stack([k[:, None] & q for q in (everywhere, q_inside) for k in (everywhere, k_inside)]))

    def extents(self, blocks):
        """The number of elements within the mask of each block."""
        _, row, col = self.split(blocks)
        sides = [
            np.minimum(length - index * self.block_size, self.block_size)
            for index, length in ((row, self.shape[2]), (col, self.shape[3]))
        ]
        return sides[0] * sides[1]


def block_numbers(grid, indptr, indices):
    """The numbers of the blocks that CSR arrays list."""
    return np.repeat(np.arange(len(indptr) - 1), np.diff(indptr)) * grid.cols + indices


def pack(elements):
    """Element masks ``(n, block_size [key], block_size [query])`` of bool as bits."""
    return np.packbits(elements, axis=-1, bitorder="little")


def unpack(bits, block_size):
    """The inverse of `pack`: bool ``(n, block_size [key], block_size [query])``."""
    return np.unpackbits(bits, axis=-1, count=block_size, bitorder="little").view(bool)


def ranges(start, count):
    """``arange(start[i], start[i] + count[i])`` for all i, one after the other."""
    end = np.cumsum(count)
    return np.arange(end[-1] if len(end) else 0) + np.repeat(start - (end - count), count)


def sorted_unique(numbers):
    """The distinct numbers, ascending: `numpy.unique` without its hash table, which loses where most are distinct."""
    numbers = np.sort(numbers)
    return numbers[np.diff(numbers, prepend=-1) != 0]  # block numbers are not negative


def distinct(codes):
    """The distinct codes, ascending, and which of them each code is; codes are not negative, and most repeat often."""
    size = int(codes.max(initial=-1)) + 1
    if size > 4 * len(codes):
        values, which = np.unique(codes, return_inverse=True)
        return values, which.reshape(-1)
    present = np.zeros(size, bool)
    present[codes] = True
    return np.flatnonzero(present), (np.cumsum(present) - 1)[codes]


def unique_rows(array):
    """The distinct rows of a 2-D array, in a fixed order, and which of them each row is."""
    array = np.ascontiguousarray(array)
    opaque = array.view(np.dtype((np.void, array.shape[1] * array.itemsize))).reshape(-1)
    _, first, which = np.unique(opaque, return_index=True, return_inverse=True)
    return array[first], which.reshape(-1)


def _unique_masks(bits):
    rows, which = unique_rows(bits.reshape(len(bits), bits.shape[1] * bits.shape[2]))
    return rows.reshape(-1, *bits.shape[1:]), which


def examine(grid, blocks, see):
    """Evaluate ``see(pattern, q_idx, k_idx) -> bool`` on every element of some blocks: ``(kinds, bits)``.

    The index arrays broadcast to ``(n, block_size [key], block_size [query])``, and all blocks of a call belong to one
    pattern.
    """
    step = max(1, _CHUNK // grid.block_size**2)
    pattern = grid.split(blocks)[0]
    changes = np.flatnonzero(np.diff(pattern)) + 1
    cuts = sorted_unique(np.concatenate([np.arange(0, len(blocks), step), changes, [len(blocks)]]))
    kinds = np.empty(len(blocks), np.int64)
    tables, total = [np.empty((0, *grid.frames().shape[1:]), np.uint8)], 0
    for start, stop in zip(cuts[:-1], cuts[1:]):
        q_idx, k_idx = grid.indices(blocks[start:stop])
        visible = see(int(pattern[start]), q_idx, k_idx)
        visible = np.broadcast_to(visible, (stop - start, grid.block_size, grid.block_size))
        table, which = _unique_masks(pack(visible))
        kinds[start:stop] = which + total
        tables.append(table)
        total += len(table)
    return kinds, np.concatenate(tables)


def examine_alike(grid, blocks, key, see):
    """`examine` for blocks of which those with the same ``key``, an integer, look the same, but for ragged edges."""
    values, which = distinct(key * 4 + grid.edge(blocks))
    examples = np.empty(len(values), np.int64)
    examples[which] = blocks
    kinds, bits = examine(grid, examples, see)
    return kinds[which], bits


def canonical(grid, blocks, kinds, bits):
    """The one form of a block list: two masks are equal when these arrays are.

    Bits beyond the mask are 0, a full element mask becomes `WHOLE`, empty blocks are gone, and the element masks are
    distinct, all used, and in a fixed order.
    """
    kinds = np.array(kinds, np.int32)
    frames = grid.frames()
    partial = np.flatnonzero(kinds >= 0)
    codes, which = distinct(kinds[partial] * np.int64(4) + grid.edge(blocks[partial]))
    frame = frames[codes % 4]
    masks = bits[codes // 4] & frame
    empty = ~masks.any(axis=(1, 2))
    whole = (masks == frame).all(axis=(1, 2))
    ordinary = ~(empty | whole)
    bits, numbers = _unique_masks(masks[ordinary])
    kind_of_code = np.where(empty, EMPTY, WHOLE)
    kind_of_code[ordinary] = numbers
    kinds[partial] = kind_of_code[which]
    listed = kinds != EMPTY
    return (blocks, kinds, bits) if listed.all() else (blocks[listed], kinds[listed], bits)
