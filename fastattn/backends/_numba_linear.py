"""The linear family in Numba: the recurrence itself, token by token, on a few columns of the state.

Columns of the state never meet, so a work item is as many of them as a row of registers has lanes, of one state: a strip of
``head_dim`` rows that stays in the first-level cache. A token goes over it twice::

    u = v, or with the delta rule beta * (v - sum_d (a_d k_d) S[d])
    S[d] = a_d S[d] + k_d u;  o = sum_d q_d S[d]
"""

import numpy as np
from numba import float32, from_dtype, int64, types

from ._numba_numbers import FLOAT32, exp, fill, jit, magnitude_of, narrow_row, widen, widen_row
from ._numba_simd import add, blank, count, elements, fma, lanes, load, mul, splat, store, sub, where_less, width

IDENTITY, ELU, RELU = range(3)
_SMALLEST = float(np.finfo(np.float32).tiny)
_SWEEP = 64  # tokens after which what has become subnormal is made 0

# What `attend` is told. Addresses and strides are in bytes; an address of 0 means that the thing is absent.
PLAN = np.dtype(
    [(name, np.int64) for name in (
        "q", "k", "v", "out", "decay", "beta", "state", "new_state", "starts", "lengths",
        "q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row",
        "out_batch", "out_head", "out_row", "decay_batch", "decay_head", "decay_row", "beta_batch", "beta_head", "beta_row",
        "state_batch", "state_head", "state_row", "new_state_batch", "new_state_head", "new_state_row",
        "q_code", "kv_code", "decay_code", "beta_code", "decay_rows", "decay_log", "q_len", "kv_len", "head_dim", "v_head_dim",
        "q_heads", "k_heads", "v_heads", "states", "heads", "strips", "items", "packed", "causal", "normalize", "feature_map", "pitch",
    )]
    + [("scale", np.float32)]
)  # fmt: skip


@jit
def stage(source, code, n, pitch, feature_map, scale, target, one):
    """Write `n` numbers as float32 features, times `scale`, and zeros up to `pitch`."""
    widen_row(source, code, n, target)
    for d in range(0, n, width(one)):
        x = load(target + 4 * d, one)
        if feature_map == ELU:
            x = where_less(x, 0.0, exp(where_less(x, 0.0, x, 0.0)), add(x, 1.0))
        elif feature_map == RELU:
            x = where_less(x, 0.0, 0.0, x)
        store(target + 4 * d, mul(x, scale))
    fill(target, 0.0, n, pitch)


@jit
def dot(a, b, n, room, one):
    """The sum of products of two arrays of float32, `n` being a multiple of the width of a register."""
    total = splat(0.0, one)
    for d in range(0, n, width(one)):
        total = fma(load(a + 4 * d, one), load(b + 4 * d, one), total)
    store(room, total)
    x, s = elements(room, float32), float32(0.0)
    for lane in range(width(one)):
        s += x[lane]
    return s


@jit
def divisor(plan, y, z, room, one):
    """What divides an answer: 1 unless sums are normalised; its reciprocal, and 0 for 0."""
    if not plan.normalize:
        return float32(1.0)
    s = dot(y, z, plan.pitch, room, one)
    return float32(0.0) if s == 0.0 else float32(1.0) / s


@jit
def put(plan, o, factor, b, head, row, column, n, room):
    """Write the answer of a strip."""
    store(room, o)
    out = plan.out + b * plan.out_batch + head * plan.out_head + row * plan.out_row
    narrow_row(room, factor, plan.q_code, n, out + column * (4 if plan.q_code == FLOAT32 else 2))


@jit
def take_decay(plan, b, s, row, a):
    """The factors of a token, one for each row of the state."""
    to = elements(a, float32)
    if not plan.decay:
        return
    at = plan.decay + b * plan.decay_batch + s * plan.decay_head + row * plan.decay_row
    for d in range(plan.head_dim if plan.decay_rows else 1):
        x = widen(at, d, plan.decay_code)
        to[d] = np.exp(x) if plan.decay_log else x
    if not plan.decay_rows:
        fill(a, to[0], 0, plan.head_dim)


@jit
def answer(plan, b, head, t, column, columns, q, queries, z, total, room, row, one):
    at = plan.q + b * plan.q_batch + head * plan.q_heads // plan.heads * plan.q_head + t * plan.q_row
    stage(at, plan.q_code, plan.head_dim, plan.pitch, plan.feature_map, plan.scale, q, one)
    o = splat(0.0, row)
    for d in range(plan.head_dim):
        o = fma(load(total + d * 4 * lanes(row), row), queries[d], o)
    factor = divisor(plan, q, z, room, one)
    put(plan, o, factor, b, head, t, column, columns, room)


@jit
def attend(plan, item, scratch, row, one):
    """One strip of the columns of one state, over all tokens of its sequence."""
    strip, s, n = item % plan.strips, item // plan.strips % plan.states, item // plan.strips // plan.states
    first, real = elements(plan.starts, int64)[n], elements(plan.lengths, int64)[n]
    rows = elements(plan.starts, int64)[n + 1] - first if plan.packed else plan.kv_len
    b = 0 if plan.packed else n
    column = strip * lanes(row)
    columns = min(lanes(row), plan.v_head_dim - column)
    step, size, group = 4 * lanes(row), 4 if plan.kv_code == FLOAT32 else 2, plan.heads // plan.states
    k, q, a, z, room = (scratch, scratch + 4 * plan.pitch, scratch + 8 * plan.pitch, scratch + 12 * plan.pitch, scratch + 16 * plan.pitch)
    total = room + step

    fill(a, 1.0, 0, plan.pitch)
    fill(z, 0.0, 0, plan.pitch)
    fill(total, 0.0, 0, plan.head_dim * lanes(row))
    if plan.state:
        for d in range(plan.head_dim):
            given = plan.state + n * plan.state_batch + s * plan.state_head + d * plan.state_row
            widen_row(given + 4 * column, FLOAT32, columns, total + d * step)
            if plan.normalize:
                elements(z, float32)[d] = elements(given, float32)[plan.v_head_dim]

    weights, queries, factors = elements(k, float32), elements(q, float32), elements(a, float32)
    keys = plan.k + b * plan.k_batch + s * plan.k_heads // plan.states * plan.k_head
    values = plan.v + b * plan.v_batch + s * plan.v_heads // plan.states * plan.v_head
    for t in range(first, first + real):
        stage(keys + t * plan.k_row, plan.kv_code, plan.head_dim, plan.pitch, plan.feature_map, 1.0, k, one)
        take_decay(plan, b, s, t, a)
        if plan.normalize:
            for d in range(0, plan.pitch, width(one)):
                store(z + 4 * d, fma(load(z + 4 * d, one), load(a + 4 * d, one), load(k + 4 * d, one)))
        fill(room, 0.0, 0, lanes(row))
        widen_row(values + t * plan.v_row + column * size, plan.kv_code, columns, room)
        u = load(room, row)
        if plan.beta:
            known = splat(0.0, row)
            for d in range(plan.head_dim):
                known = fma(load(total + d * step, row), factors[d] * weights[d], known)
            beta = widen(plan.beta + b * plan.beta_batch + s * plan.beta_head + t * plan.beta_row, 0, plan.beta_code)
            u = mul(sub(u, known), beta)
        for d in range(plan.head_dim):
            store(total + d * step, fma(u, weights[d], mul(load(total + d * step, row), factors[d])))
        if t % _SWEEP == 0 and plan.decay:
            for d in range(plan.head_dim):
                x = load(total + d * step, row)
                store(total + d * step, where_less(magnitude_of(x), _SMALLEST, 0.0, x))
        for g in range(group if plan.causal else 0):
            answer(plan, b, s * group + g, t, column, columns, q, queries, z, total, room, row, one)
    for t in range(first + real, first + (rows if plan.causal else 0)):
        for g in range(group):
            put(plan, splat(0.0, row), float32(1.0), b, s * group + g, t, column, columns, room)
    if not plan.causal:
        for t in range(first, first + (rows if plan.packed else plan.q_len)):
            for g in range(group):
                answer(plan, b, s * group + g, t, column, columns, q, queries, z, total, room, row, one)

    if plan.new_state:
        for d in range(plan.head_dim):
            to = plan.new_state + n * plan.new_state_batch + s * plan.new_state_head + d * plan.new_state_row
            widen_row(total + d * step, FLOAT32, columns, to + 4 * column)
            if plan.normalize and strip == 0:
                elements(to, float32)[plan.v_head_dim] = elements(z, float32)[d]


def build_linear(stamp, registers, lanes_of_register):
    """The function that computes items until none is left, for strips of so many registers, and its signature."""

    def linear(plans, scratch, counter):
        stamp  # noqa: B018
        row, one = blank(1, registers, lanes_of_register), blank(1, 1, lanes_of_register)
        plan = plans[0]
        while True:
            item = count(counter)
            if item >= plan.items:
                return
            attend(plan, item, scratch, row, one)

    record = types.Array(from_dtype(PLAN), 1, "C")
    return linear, types.void(record, int64, types.Array(int64, 1, "C"))
