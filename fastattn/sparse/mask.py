"""`BlockMask`: storage, set algebra and inspection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import patterns, selection
from .blocks import EMPTY, WHOLE, Grid, block_numbers, canonical, distinct, ranges, sorted_unique, unpack
from .checks import check_csr, check_element_mask, check_grid

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_BITS_SET = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)


class BlockMask:
    """A CSR list of the visible key blocks of each block of query rows.

    Query row ``i`` may see key ``j`` when the list of block row ``i // block_size`` holds ``j // block_size`` and, if
    that block is partly visible, its element mask is set at ``(i % block_size, j % block_size)``. The last block row
    and the last block column may be ragged::

        block_size = 2, shape = (5, 7)       indptr  = [0, 2, 3, 6]
                                             indices = [0, 1,  2,  0, 2, 3]
            keys 0 1 2 3 4 5 6
        row 0    # # # # . . .
            1    # # # # . . .
            2    . . . . # # .
            3    . . . . # # .
            4    # # . . # # #

    A mask is immutable. It is kept in a canonical form: an element mask in which everything is visible is dropped in
    favour of a whole block, one in which nothing is takes its block along, and equal element masks are stored once. A
    causal or sliding-window pattern therefore holds a handful of element masks, whatever its length.

    Parameters
    ----------
    block_size : int
        Rows and columns of a block; 1 or more, 16 to 256 for speed.
    indptr : array of int, shape (patterns * rows + 1,)
        ``indices[indptr[r]:indptr[r + 1]]`` is the list of block row ``r``. The ``ceil(q_len / block_size)`` rows of
        one pattern follow those of the one before, heads fastest.
    indices : array of int, shape (nnz,)
        Key blocks, strictly ascending within a block row.
    shape : tuple of int
        ``(B, H, q_len, k_len)``, ``(H, q_len, k_len)`` or ``(q_len, k_len)``. ``B`` or ``H`` of 1 is one pattern shared
        by all batch entries or query heads.
    element_mask : None, array, or (array, array), optional
        None: every listed block is wholly visible. A bool array ``(nnz, block_size, block_size)``: entry ``[n, i, j]``
        says whether row ``i`` of block ``n`` sees its key ``j``. A pair ``(partial, masks)``: ``partial`` (nnz,) is -1
        for a whole block and otherwise the index into ``masks``, which is bool ``(n, block_size, block_size)``, or
        uint8 `element_bits`. Elements beyond ``shape`` do not count.

    Attributes
    ----------
    block_size : int
    shape : tuple of int
        ``(B, H, q_len, k_len)``.
    indptr : int64 array
    indices : int32 array
    partial : int32 array (nnz,) or None
        The element mask of each block, -1 where it is whole; None when all are.
    element_bits : uint8 array (n, block_size, ceil(block_size / 8)) or None
        The distinct element masks: one row for each *key* of a block, whose bit ``i`` (least significant first) is
        query row ``i``.

    Examples
    --------
    >>> mask = BlockMask.sliding_window(4096, window=(255, 0), block_size=64)
    >>> mask | BlockMask.strided(4096, stride=64, block_size=64)
    BlockMask(shape=(1, 1, 4096, 4096), block_size=64, nnz=2080, density=0.5078)
    """

    __slots__ = ("block_size", "shape", "indptr", "indices", "partial", "element_bits")

    block_size: int
    shape: tuple[int, int, int, int]
    indptr: NDArray[np.int64]
    indices: NDArray[np.int32]
    partial: NDArray[np.int32] | None
    element_bits: NDArray[np.uint8] | None

    def __init__(
        self,
        block_size: int,
        indptr: ArrayLike,
        indices: ArrayLike,
        shape: tuple[int, ...],
        element_mask: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
    ) -> None:
        grid = check_grid(block_size, shape)
        indptr, indices = check_csr(grid, indptr, indices)
        kinds, bits = check_element_mask(grid, len(indices), element_mask)
        self._set(grid, block_numbers(grid, indptr, indices), kinds, bits)

    @classmethod
    def _blank(cls, grid):
        """The mask that lists no block."""
        return cls._from_blocks(grid, np.empty(0, np.int64))

    @classmethod
    def _from_blocks(cls, grid, blocks, kinds=None, bits=None):
        """A mask from a block list (see `fastattn.sparse.blocks`); without ``kinds`` all blocks are whole."""
        self = cls.__new__(cls)
        self._set(grid, blocks, kinds, bits)
        return self

    def _set(self, grid, blocks, kinds, bits):
        if kinds is None:
            kinds = np.full(len(blocks), WHOLE, np.int32)
            bits = grid.frames()[:0]
        blocks, kinds, bits = canonical(grid, blocks, kinds, bits)
        indptr = np.searchsorted(blocks, np.arange(grid.patterns * grid.rows + 1) * grid.cols).astype(np.int64)
        indices = (blocks % grid.cols).astype(np.int32)
        partial, element_bits = (kinds, bits) if len(bits) else (None, None)
        values = grid.block_size, grid.shape, indptr, indices, partial, element_bits
        for name, value in zip(self.__slots__, values):
            object.__setattr__(self, name, value)
        for array in self._arrays():
            array.flags.writeable = False

    def __setattr__(self, name, value):
        raise AttributeError(f"a BlockMask is immutable; {name} cannot be set")

    def _arrays(self):
        return [a for a in (self.indptr, self.indices, self.partial, self.element_bits) if a is not None]

    # Constructors, written as functions of the class in the modules that explain them.

    from_dense = classmethod(patterns.from_dense)
    from_function = classmethod(patterns.from_function)
    causal = classmethod(patterns.causal)
    sliding_window = classmethod(patterns.sliding_window)
    dilated = classmethod(patterns.dilated)
    strided = classmethod(patterns.strided)
    fixed = classmethod(patterns.fixed)
    longformer = classmethod(patterns.longformer)
    bigbird = classmethod(patterns.bigbird)
    neighborhood = classmethod(patterns.neighborhood)
    document = classmethod(patterns.document)
    top_k = classmethod(selection.top_k)

    # Inspection

    @property
    def _grid(self):
        return Grid(self.block_size, self.shape)

    @property
    def row_strides(self) -> tuple[int, int]:
        """``(batch, head)``: the pattern of ``(b, h)`` starts at block row ``b * batch + h * head`` of the table."""
        batch, heads, _, _ = self.shape
        rows = self._grid.rows
        return (heads * rows if batch > 1 else 0, rows if heads > 1 else 0)

    @property
    def nnz(self) -> int:
        """The number of listed blocks, over all patterns."""
        return len(self.indices)

    @property
    def nbytes(self) -> int:
        """The bytes of all arrays."""
        return sum(array.nbytes for array in self._arrays())

    @property
    def density(self) -> float:
        """The share of all (row, key) pairs that lie in listed blocks: what is computed, relative to dense attention."""
        return self._share(self._grid.extents(self._block_numbers()))

    @property
    def element_density(self) -> float:
        """The share of all (row, key) pairs that are visible; `density` counts a partly visible block in full."""
        return self._share(self._visible_elements())

    def _share(self, elements):
        return float(elements.sum() / max(1, np.prod(self.shape, dtype=float)))

    def _block_numbers(self):
        return block_numbers(self._grid, self.indptr, self.indices)

    def _kinds(self):
        return np.full(self.nnz, WHOLE, np.int32) if self.partial is None else self.partial

    def _bits(self):
        return self._grid.frames()[:0] if self.element_bits is None else self.element_bits

    def _visible_elements(self):
        """The number of visible elements in each listed block."""
        counts = self._grid.extents(self._block_numbers())
        if self.partial is not None:
            partial = self.partial >= 0
            counts[partial] = _BITS_SET[self.element_bits].sum(axis=(1, 2))[self.partial[partial]]
        return counts

    def to_dense(self) -> NDArray[np.bool_]:
        """The mask as a bool array of `shape`."""
        batch, heads, q_len, _ = self.shape
        dense = np.empty(self.shape, bool)
        for b, h in np.ndindex(batch, heads):
            dense[b, h] = self.dense_rows(b, h, 0, q_len)
        return dense

    def dense_rows(self, b: int, h: int, i0: int, i1: int) -> NDArray[np.bool_]:
        """Rows ``i0`` to ``i1`` of batch entry ``b`` and query head ``h`` as a bool array ``(i1 - i0, k_len)``."""
        size, (_, _, _, k_len), grid = self.block_size, self.shape, self._grid
        if i0 >= i1 or k_len == 0:
            return np.zeros((max(0, i1 - i0), k_len), bool)
        batch_stride, head_stride = self.row_strides
        base = b * batch_stride + h * head_stride
        first, last = base + i0 // size, base + -(-i1 // size)
        listed = slice(self.indptr[first], self.indptr[last])
        row = np.repeat(np.arange(last - first), np.diff(self.indptr[first : last + 1]))
        col = self.indices[listed]
        dense = np.zeros((last - first, size, grid.cols, size), bool)
        kinds = self._kinds()[listed]
        whole = kinds == WHOLE
        dense[row[whole], :, col[whole], :] = True
        dense[row[~whole], :, col[~whole], :] = unpack(self._bits()[kinds[~whole]], size).swapaxes(1, 2)
        skipped = i0 % size
        return np.ascontiguousarray(dense.reshape((last - first) * size, -1)[skipped : skipped + i1 - i0, :k_len])

    def _picture(self, batch, head, max_rows, max_cols):
        """The visible share of each cell of a coarse grid over one pattern."""
        grid = self._grid
        batch_stride, head_stride = self.row_strides
        start = batch * batch_stride + head * head_stride
        listed = slice(self.indptr[start], self.indptr[start + grid.rows])
        counts = self._visible_elements()[listed]
        _, row, col = grid.split(self._block_numbers()[listed])
        cells, sides = [], []
        axes = (row, grid.rows, self.shape[2], max_rows), (col, grid.cols, self.shape[3], max_cols)
        for index, blocks, length, limit in axes:
            size = max(1, min(blocks, limit))
            cell_of_block = np.arange(blocks) * size // max(1, blocks)
            widths = np.minimum(length - np.arange(blocks) * self.block_size, self.block_size)
            cells.append(cell_of_block[index])
            sides.append(np.bincount(cell_of_block, widths, minlength=size))
        height, width = map(len, sides)
        sums = np.bincount(cells[0] * width + cells[1], counts, minlength=height * width).reshape(height, width)
        return sums / np.maximum(1, np.multiply.outer(*sides))

    def plot(self, batch: int = 0, head: int = 0, ax: Any = None, **imshow: Any) -> Any:
        """Draw one pattern with matplotlib, dark where more is visible, and return the Axes.

        Shades are not proportional to what is visible, so that thin lines can be seen.

        Parameters
        ----------
        batch, head : int
            Which pattern.
        ax : matplotlib Axes, optional
            Where; a new figure by default.
        **imshow
            Handed to ``Axes.imshow``.
        """
        from matplotlib.colors import PowerNorm

        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.figure().add_subplot()
        _, _, q_len, k_len = self.shape
        options = {"cmap": "Greys", "norm": PowerNorm(0.3, 0, 1), "aspect": "auto"} | imshow
        ax.imshow(self._picture(batch, head, 1024, 1024), extent=(0, max(1, k_len), max(1, q_len), 0), **options)
        ax.set(xlabel="key", ylabel="query row", title=f"block {self.block_size}, density {self.density:.3g}")
        return ax

    def __repr__(self):
        size = f"shape={self.shape}, block_size={self.block_size}"
        return f"{type(self).__name__}({size}, nnz={self.nnz}, density={self.density:.4g})"

    def __str__(self):
        """`repr` with a picture of the first pattern."""
        picture = np.ceil(self._picture(0, 0, 16, 32) * 4).astype(int) if self.shape[0] and self.shape[1] else ()
        return "\n".join([repr(self), *("".join(" ░▒▓█"[shade] for shade in row) for row in picture)])

    # Comparison, copies, set algebra

    def __eq__(self, other):
        if not isinstance(other, BlockMask):
            return NotImplemented
        return (
            self.block_size == other.block_size
            and self.shape == other.shape
            and len(self._arrays()) == len(other._arrays())
            and all(np.array_equal(a, b) for a, b in zip(self._arrays(), other._arrays()))
        )

    __hash__ = None
    __array_ufunc__ = None  # an array beside an operator is refused, not taken element by element

    def __reduce__(self):
        element_mask = None if self.partial is None else (self.partial, self.element_bits)
        return type(self), (self.block_size, self.indptr, self.indices, self.shape, element_mask)

    def __and__(self, other: BlockMask) -> BlockMask:
        """The elements visible in both. Masks of one block size; a batch or head axis of 1 is broadcast."""
        if not isinstance(other, BlockMask):
            return NotImplemented
        a, b = self._aligned(other)
        return a._combine(np.bitwise_and, b, min(a, b, key=lambda mask: mask.nnz)._block_numbers())

    def __or__(self, other: BlockMask) -> BlockMask:
        """The elements visible in at least one of two masks."""
        if not isinstance(other, BlockMask):
            return NotImplemented
        a, b = self._aligned(other)
        return a._combine(np.bitwise_or, b, sorted_unique(np.concatenate([a._block_numbers(), b._block_numbers()])))

    def __invert__(self) -> BlockMask:
        """The elements that are not visible."""
        grid = self._grid
        kinds = np.full(grid.num_blocks, EMPTY, np.int32)
        kinds[self._block_numbers()] = self._kinds()
        kinds = np.where(kinds < 0, WHOLE + EMPTY - kinds, kinds)
        return self._from_blocks(grid, np.arange(grid.num_blocks), kinds, ~self._bits())

    def _combine(self, op, other, blocks):
        """``op`` of the elements of two masks of one shape on the given blocks; elsewhere nothing is visible."""
        a, b = self._kinds_at(blocks), other._kinds_at(blocks)
        # Few of the pairs of element masks are distinct. WHOLE and EMPTY are -1 and -2, here 1 and 0.
        codes, which = distinct((a - EMPTY) * (len(other._bits()) + 2) + b - EMPTY)
        pairs = np.divmod(codes, len(other._bits()) + 2)
        bits = op(*(mask._bits_with_constants()[kind] for mask, kind in zip((self, other), pairs)))
        return self._from_blocks(self._grid, blocks, which, bits)

    def _kinds_at(self, blocks):
        own = self._block_numbers()
        if not len(own):
            return np.full(len(blocks), EMPTY, np.int64)
        position = np.minimum(np.searchsorted(own, blocks), len(own) - 1)
        return np.where(own[position] == blocks, self._kinds()[position], EMPTY).astype(np.int64)

    def _bits_with_constants(self):
        template = self._grid.frames()[:1]
        return np.concatenate([np.zeros_like(template), np.full_like(template, 255), self._bits()])

    def _aligned(self, other):
        """Both masks with a pattern for each of the batch entries and heads that either tells apart."""
        if self.block_size != other.block_size:
            raise ValueError(f"both masks must have one block_size; got {self.block_size} and {other.block_size}")
        try:
            batch, heads = np.broadcast_shapes(self.shape[:2], other.shape[:2])
        except ValueError:
            batch = heads = None
        if batch is None or self.shape[2:] != other.shape[2:]:
            raise ValueError(
                "both masks must have one shape, 1 standing for any batch size or heads; "
                f"got {self.shape} and {other.shape}"
            )
        return self._expanded(batch, heads), other._expanded(batch, heads)

    def _expanded(self, batch, heads):
        if self.shape[:2] == (batch, heads):
            return self
        grid = self._grid
        source = np.broadcast_to(np.arange(grid.patterns).reshape(self.shape[:2]), (batch, heads)).reshape(-1)
        start, stop = self.indptr[source * grid.rows], self.indptr[(source + 1) * grid.rows]
        taken = ranges(start, stop - start)
        shift = (np.arange(len(source)) - source) * grid.rows * grid.cols
        blocks = self._block_numbers()[taken] + np.repeat(shift, stop - start)
        expanded = Grid(self.block_size, (batch, heads, *self.shape[2:]))
        return self._from_blocks(expanded, blocks, self._kinds()[taken], self._bits())
