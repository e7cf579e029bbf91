"""The two products of attention for a block of keys, ``S = scale * Q K^T`` and ``O = O * alpha + P V``, in two arrangements.

*Across* the queries, for many of them: each is a lane of every vector, so Q and O are kept transposed, and keys and values are
broadcast element by element, as they lie in memory::

    S^T [j][lane] = sum over d of  K [j][d]   . Q^T [d][lane]
    O^T [d][lane] = sum over j of  V^T [d][j] . P^T [j][lane]

*Along* the head dimension, for so few queries that most lanes would be empty and that time goes into reading keys and values:
vectors are pieces of rows. Those of keys and values are loaded once for several queries, and widened on the way::

    S^T [j][i]  = sum over lanes and d of  K [j][d..] . Q [i][d..]
    O [i][d..]  = sum over j of            P^T [j][i] . V [j][d..]

Scores and weights lie as ``[j][slot]`` either way. The argument `storage` says which way it is: None for across, for along the type
of keys and values in memory. So Numba compiles one of the two. `tile` and `row` stand for their types alone: the shape of the
registers, and of the lanes of queries.

Where there are few queries, a step takes no longer than its keys and values take to arrive. So one product asks for the operand of
the next (`ahead`) bit by bit.
"""

from collections import namedtuple

from numba import float32

from ._numba_numbers import FLOAT32, LOWEST, fill, inline, jit, tanh, widen, widen_row
from ._numba_simd import (
    add, column, div, dots, elements, fma, itemsize, lanes, load, mul, partial_sums, prefetch, rank_one, rescale, rows, splat, spread,
    store, sums, transpose, where_less, width,
)  # fmt: skip

Rows = namedtuple("Rows", "address stride n nbytes")  # n rows of so many bytes, `stride` bytes apart


@inline
def ask_for(ahead, j, low, high):
    """Prefetch the bytes `low` to `high` of row j."""
    for byte in range(low, high, 64):
        prefetch(ahead.address + j * ahead.stride + byte)


@inline
def share(ahead, d, n_columns):
    """The part of a row that is asked for before column d of so many, in whole cache lines."""
    return 64 * -(-ahead.nbytes * d // (64 * n_columns))


@inline
def product(a, a_stride, a_step, b, b_step, n, n_columns, tile, storage, ahead=None, low=0, high=0):
    """``sum_s a[t][s] * b[s][:]`` over n steps, the sums kept in registers; for `n_columns` see `rank_one`."""
    total = splat(0.0, tile)
    for s in range(n):
        if ahead is not None:
            ask_for(ahead, s, low, high)
        total = rank_one(total, a, a_stride, b, n_columns, storage)
        a += a_step
        b += b_step
    return total


@jit
def transpose_all(source, source_row, n_rows, n_columns, target, target_row, row):
    """Transpose an array of float32; both sizes are multiples of the width of a register."""
    for i in range(0, n_rows, width(row)):
        for j in range(0, n_columns, width(row)):
            transpose(source + i * source_row + 4 * j, source_row, target + j * target_row + 4 * i, target_row, row)


@jit
def pack(plan, at, target, row, storage):
    """Arrange the queries of ``at.turned``, a row each, or what lies there in their place, for `scores`."""
    if storage is None:
        transpose_all(at.turned, 4 * plan.head_pitch, lanes(row), plan.head_pitch, target, 4 * lanes(row), row)
    else:
        widen_row(at.turned, FLOAT32, lanes(row) * plan.head_pitch, target)


@jit
def unpack(plan, at, row, storage):
    """Make ``at.o``, as `values` left it, O^T."""
    if storage is not None:
        transpose_all(at.o, 4 * plan.v_head_pitch, lanes(row), plan.v_head_pitch, at.turned, 4 * lanes(row), row)
        widen_row(at.turned, FLOAT32, lanes(row) * plan.v_head_pitch, at.o)


@jit
def scores(plan, at, k, n_rows, ahead, tile, row, storage):
    """``S^T = scale * K Q^T``, or the additive scores ``scale * sum over d of weights . tanh(K + Q)``"""
    if plan.additive:
        if storage is None:
            additive_across(plan, at, k, row)
        else:
            additive_along(plan, at, k, n_rows, row)
    elif storage is None:
        scores_across(plan, at, k, ahead, tile, row)
    else:
        scores_along(plan, at, k, n_rows, ahead, tile, row, storage)


@jit
def values(plan, at, v, n_rows, ahead, tile, row, storage):
    """``O = O * alpha + P V``"""
    if storage is None:
        values_across(plan, at, v, ahead, tile, row)
    else:
        values_along(plan, at, v, n_rows, ahead, tile, row, storage)


@jit
def careful_values(plan, at, v, code, row, storage):
    """The same for values with NaN or inf among them, which must not reach the rows that do not see their key."""
    if storage is None:
        careful_values_across(plan, at, v, code, at.o, row)
    else:
        transpose_all(at.o, 4 * plan.v_head_pitch, lanes(row), plan.v_head_pitch, at.turned, 4 * lanes(row), row)
        careful_values_across(plan, at, v, code, at.turned, row)
        transpose_all(at.turned, 4 * lanes(row), plan.v_head_pitch, lanes(row), at.o, 4 * plan.v_head_pitch, row)


# Across. The last tile of keys overlaps the one before where their number is no multiple of its rows.


@jit
def scores_across(plan, at, k, ahead, tile, row):
    pitch = 4 * lanes(row)
    if k.n < rows(tile):
        for j in range(k.n):
            total = product(k.address + j * k.stride, 0, 4, at.q, pitch, plan.head_dim, None, row, float32)
            store(at.st + j * pitch, mul(total, plan.scale))
        return
    for first in range(0, k.n, rows(tile)):
        for j in range(first, min(first + rows(tile), k.n)):
            ask_for(ahead, j, 0, ahead.nbytes)
        j = min(first, k.n - rows(tile))
        total = product(k.address + j * k.stride, k.stride, 4, at.q, pitch, plan.head_dim, None, tile, float32)
        store(at.st + j * pitch, mul(total, plan.scale))


@jit
def values_across(plan, at, v, ahead, tile, row):
    pitch = 4 * lanes(row)
    alpha = load(at.alpha, row)
    d = 0
    while d + rows(tile) <= plan.v_head_dim:
        low, high = share(ahead, d, plan.v_head_dim), share(ahead, d + rows(tile), plan.v_head_dim)
        total = product(v.address + 4 * d, 4, v.stride, at.st, pitch, v.n, None, tile, float32, ahead, low, high)
        store(at.o + d * pitch, fma(load(at.o + d * pitch, tile), alpha, total))
        d += rows(tile)
    while d < plan.v_head_dim:
        total = product(v.address + 4 * d, 4, v.stride, at.st, pitch, v.n, None, row, float32)
        store(at.o + d * pitch, fma(load(at.o + d * pitch, row), alpha, total))
        d += 1


@jit
def careful_values_across(plan, at, v, code, ot, row):
    pitch = 4 * lanes(row)
    alpha = load(at.alpha, row)
    for d in range(plan.v_head_dim):
        total = splat(0.0, row)
        for j in range(v.n):
            p = load(at.st + 4 * j * plan.slots, row)
            hidden = div(1.0, p)  # -inf for -0.0
            total = where_less(hidden, LOWEST, total, fma(p, widen(v.address + j * v.stride, d, code), total))
        store(ot + d * pitch, fma(load(ot + d * pitch, row), alpha, total))


@jit
def additive_across(plan, at, k, row):
    pitch = 4 * lanes(row)
    for j in range(k.n):
        key = elements(k.address + j * k.stride, float32)
        total = splat(0.0, row)
        for d in range(plan.head_dim):
            total = fma(load(at.weights + d * pitch, row), tanh(add(load(at.q + d * pitch, row), key[d])), total)
        store(at.st + j * pitch, mul(total, plan.scale))


@jit
def additive_along(plan, at, k, n_rows, row):
    """Keys are moved to where they can be read in whole vectors; the weights beyond their numbers are 0."""
    key, sums = at.turned, elements(at.turned + 4 * plan.head_pitch, float32)
    fill(key, 0.0, plan.head_dim, plan.head_pitch)
    for j in range(k.n):
        widen_row(k.address + j * k.stride, FLOAT32, plan.head_dim, key)
        for i in range(n_rows):
            total = splat(0.0, row)
            at_row = 4 * i * plan.head_pitch
            for d in range(0, plan.head_pitch, lanes(row)):
                x = tanh(add(load(at.q + at_row + 4 * d, row), load(key + 4 * d, row)))
                total = fma(load(at.weights + at_row + 4 * d, row), x, total)
            store(at.turned + 4 * plan.head_pitch, total)
            score = sums[0]
            for lane in range(1, lanes(row)):
                score += sums[lane]
            elements(at.st, float32)[j * plan.slots + i] = score * plan.scale


# Along. The rows of the tile are queries, zeros where there are fewer.


@inline
def inner_products(k, k_row, q, q_row, head_dim, tile, row, storage):
    """The product of key j of a group and query i in lane ``j * rows(tile) + i``."""
    total = partial_sums(row)
    d = 0
    while d + width(row) <= head_dim:
        total = dots(total, k + d * itemsize(storage), k_row, q + 4 * d, q_row, None, storage, tile)
        d += width(row)
    if d < head_dim:
        total = dots(total, k + d * itemsize(storage), k_row, q + 4 * d, q_row, head_dim - d, storage, tile)
    return sums(total)


@jit
def scores_along(plan, at, k, n_rows, ahead, tile, row, storage):
    pitch, q_row = 4 * plan.slots, 4 * plan.head_pitch
    group = lanes(row) // rows(tile)
    single = k.n < group  # a key takes the place of all of its group; what it writes too many, those after it overwrite
    for first in range(0, k.n, 1 if single else group):
        j, k_row = (first, 0) if single else (min(first, k.n - group), k.stride)
        for next_j in range(first, min(first + group, k.n)):
            ask_for(ahead, next_j, 0, ahead.nbytes)
        for i in range(0, n_rows, rows(tile)):
            total = inner_products(k.address + j * k.stride, k_row, at.q + i * q_row, q_row, plan.head_dim, tile, row, storage)
            spread(at.st + j * pitch + 4 * i, pitch, mul(total, plan.scale), tile)


@inline
def add_values(plan, at, v, i, d, n_columns, ahead, tile, row, storage):
    """The values of a tile: those of the queries from i and the columns from d on."""
    low = share(ahead, d, plan.v_head_dim)
    high = share(ahead, d + lanes(tile), plan.v_head_dim) if i == 0 else low
    address = v.address + d * itemsize(storage)
    total = product(at.st + 4 * i, 4, 4 * plan.slots, address, v.stride, v.n, n_columns, tile, storage, ahead, low, high)
    rescale(at.o + 4 * (i * plan.v_head_pitch + d), 4 * plan.v_head_pitch, at.alpha + 4 * i, total)


@jit
def values_along(plan, at, v, n_rows, ahead, tile, row, storage):
    for i in range(0, n_rows, rows(tile)):
        d = 0
        while d + lanes(tile) <= plan.v_head_dim:
            add_values(plan, at, v, i, d, None, ahead, tile, row, storage)
            d += lanes(tile)
        while d + width(row) <= plan.v_head_dim:
            add_values(plan, at, v, i, d, None, ahead, column(tile), row, storage)
            d += width(row)
        if d < plan.v_head_dim:
            add_values(plan, at, v, i, d, plan.v_head_dim - d, ahead, column(tile), row, storage)
