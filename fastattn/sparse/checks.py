"""What the arguments of masks must be; every error names one, says what it must be and then what it was."""

import operator

import numpy as np

from .blocks import Grid, block_numbers, pack


def check_grid(block_size, shape):
    return Grid(check_int("block_size", block_size, 1), _check_shape(shape))


def check_int(name, value, least=None):
    """``value`` as an int, of at least ``least``."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer; got {value!r}") from None
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}; got {number}")
    return number


def _check_shape(shape):
    try:
        sizes = tuple(map(operator.index, shape))
    except TypeError:
        raise TypeError(f"shape must be a tuple of integers; got {shape!r}") from None
    if not 2 <= len(sizes) <= 4 or min(sizes) < 0:
        raise ValueError(
            f"shape must be (B, H, q_len, k_len), (H, q_len, k_len) or (q_len, k_len), none negative; got {sizes}"
        )
    return (1,) * (4 - len(sizes)) + sizes


def _check_int_array(name, value, length):
    array = np.asarray(value)
    if array.size == 0:
        array = array.astype(np.int64)  # an empty list is of float64
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers; got {array.dtype}")
    if array.ndim != 1 or len(array) != length:
        raise ValueError(f"{name} must have shape ({length},); got {array.shape}")
    return array.astype(np.int64)


def check_csr(grid, indptr, indices):
    indptr = _check_int_array("indptr", indptr, grid.patterns * grid.rows + 1)
    indices = _check_int_array("indices", indices, np.size(indices))
    if indptr[0] != 0 or indptr[-1] != len(indices):
        raise ValueError(f"indptr must go from 0 to len(indices) = {len(indices)}; got {indptr[0]} to {indptr[-1]}")
    falling = np.flatnonzero(np.diff(indptr) < 0)
    if len(falling):
        raise ValueError(f"indptr must not decrease; got {indptr[falling[0] + 1]} after {indptr[falling[0]]}")
    outside = np.flatnonzero((indices < 0) | (indices >= grid.cols))
    if len(outside):
        raise ValueError(
            f"indices must be below {grid.cols}, the number of key blocks, and not negative; got {indices[outside[0]]}"
        )
    # In ascending block numbers, the last index of a row is below the first one of the next.
    unsorted = np.flatnonzero(np.diff(block_numbers(grid, indptr, indices)) <= 0)
    if len(unsorted):
        n = unsorted[0]
        raise ValueError(f"indices must strictly ascend within a block row; got {indices[n + 1]} after {indices[n]}")
    return indptr, indices


def check_element_mask(grid, nnz, element_mask):
    """``(kinds, bits)`` of `canonical`."""
    size = grid.block_size
    if element_mask is None:
        return None, None
    if not isinstance(element_mask, tuple):
        masks = np.asarray(element_mask)
        if masks.dtype != bool:
            raise TypeError(f"element_mask must hold bool; got {masks.dtype}")
        if masks.shape != (nnz, size, size):
            raise ValueError(f"element_mask must have shape {(nnz, size, size)}; got {masks.shape}")
        return np.arange(nnz), pack(masks.swapaxes(1, 2))
    if len(element_mask) != 2:
        raise ValueError(f"element_mask must be an array or a pair (partial, masks); got a tuple of {len(element_mask)}")
    partial, masks = element_mask
    partial = _check_int_array("element_mask[0]", partial, nnz)
    masks = np.asarray(masks)
    if masks.dtype == bool:
        cell = (size, size)
    elif masks.dtype == np.uint8:
        cell = grid.frames().shape[1:]
    else:
        raise TypeError(f"element_mask[1] must hold bool, or uint8 as element_bits does; got {masks.dtype}")
    if masks.ndim != 3 or masks.shape[1:] != cell:
        raise ValueError(f"element_mask[1] must have shape (n, {cell[0]}, {cell[1]}); got {masks.shape}")
    outside = np.flatnonzero((partial < -1) | (partial >= len(masks)))
    if len(outside):
        raise ValueError(
            f"element_mask[0] must hold -1 or the index of one of {len(masks)} element masks; got {partial[outside[0]]}"
        )
    return partial, pack(masks.swapaxes(1, 2)) if masks.dtype == bool else masks


def check_window(window, causal):
    """``(left, right)`` of a window that is an int or a pair; None, in a pair also -1, is no bound."""
    if not isinstance(window, (tuple, list)):
        left = right = None if window is None else check_int("window", window, 0)
    elif len(window) == 2:
        left, right = (None if side in (None, -1) else check_int("window", side, 0) for side in window)
    else:
        raise ValueError(f"window must be an int or a pair (left, right); got {window!r}")
    return left, 0 if causal else right


def check_per_axis(name, value, axes):
    """A tuple of ``axes`` positive ints, from one int or a sequence of them."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * axes
    if len(values) != axes:
        raise ValueError(f"{name} must be an int, or one for each of {axes} axes; got {value!r}")
    return tuple(check_int(name, n, 1) for n in values)


def check_positions(name, value, length):
    """Flags ``(length,)`` of the first ``value`` positions, or of an array of them."""
    flags = np.zeros(length, bool)
    if np.ndim(value) == 0:
        flags[: check_int(name, value, 0)] = True
        return flags
    positions = _check_int_array(name, value, np.size(value))
    outside = positions[(positions < 0) | (positions >= length)]
    if len(outside):
        raise ValueError(
            f"{name} must be positions below {length}, the number of keys, and not negative; got {outside[0]}"
        )
    flags[positions] = True
    return flags


def check_cu_seqlens(name, value):
    """``value`` as int64, ascending from 0."""
    bounds = _check_int_array(name, value, np.size(value))
    if len(bounds) == 0 or bounds[0] != 0 or np.any(np.diff(bounds) < 0):
        raise ValueError(f"{name} must begin with 0 and not decrease; got {bounds}")
    return bounds


def check_document_ids(name, value):
    """The ``cu_seqlens`` of each row of an array (length,) or (B, length) of document numbers."""
    ids = np.asarray(value)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers; got {ids.dtype}")
    if ids.ndim not in (1, 2):
        raise ValueError(f"{name} must have shape (length,) or (B, length); got {ids.shape}")
    result = []
    for row in np.atleast_2d(ids):
        starts = np.flatnonzero(np.append(True, row[1:] != row[:-1])[: len(row)])
        if len(np.unique(row[starts])) != len(starts):
            raise ValueError(f"{name} must hold each document as one run of tokens; got one in several pieces")
        result.append(np.append(starts, len(row)))
    return result


def check_heads(q, k):
    """``q`` and ``k`` with four axes each."""
    q, k = np.asarray(q), np.asarray(k)
    if q.ndim != k.ndim or not 2 <= q.ndim <= 4:
        raise ValueError(f"q and k must both have 4, 3 or 2 axes; got shapes {q.shape} and {k.shape}")
    q, k = (x[(None,) * (4 - x.ndim)] for x in (q, k))
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"k must have the batch and head size of q, {q.shape}; got {k.shape}")
    if q.shape[1] % max(1, k.shape[1]) or (k.shape[1] == 0 and q.shape[1]):
        raise ValueError(f"k must have a number of heads that divides that of q, {q.shape[1]}; got {k.shape[1]}")
    return q, k
