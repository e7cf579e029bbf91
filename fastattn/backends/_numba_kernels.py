"""The tile loop in Numba: online softmax with queries as lanes.

A work item is up to ``lanes`` query rows that share one kv head: the rows of a GQA group side by side, so that keys and
values are read once for all of them. Everything is kept transposed, a query row being a lane of every vector::

    Q^T [d][lane]     once per item
    for each block of keys:
        S^T [j][lane] = K [j][d] . Q^T [d][lane]                    K broadcast element by element, as it lies in memory
        m, l, P^T     : maxima and sums over j are plain vertical operations
        O^T [d][lane] = O^T * alpha + V^T [d][j] . P^T [j][lane]    V the same
    out = O / l, transposed back

Both products are sums of `rank_one` steps into a tile of registers, so nothing is packed. Each block gets fresh accumulators,
which also keeps rounding errors from growing with the number of keys.

A key that is hidden from a row has the score -inf and the weight -0.0. Negative zero adds nothing to a sum, and tells a
hidden key from one whose weight underflowed where that matters: next to a NaN or inf among the values (`careful_values`).
"""

from collections import namedtuple

import numpy as np
from numba import float32, float64, from_dtype, int32, int64, njit, types, uint8, uint16

from ._numba_simd import (
    CONVERTS_HALF, add, blank, convert_half, count, div, elements, fma, lanes, load, mul, prefetch, rank_one, rows, splat, store, sub,
    transpose, two_to, where_less, width,
)  # fmt: skip

FLOAT32, FLOAT16, BFLOAT16, FLOAT64, BOOL = range(5)
WHOLE, PARTS, MERGE = range(3)
MIN_PART = 512  # keys for which it pays to split

# What `attend` is told. Addresses and strides are in bytes; an address of 0 means that the thing is absent.
PLAN = np.dtype(
    [(name, np.int64) for name in (
        "q", "k", "v", "out", "lse", "mask", "alibi", "sinks", "query_offset", "kv_lengths",
        "q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row",
        "out_batch", "out_head", "out_row", "lse_batch", "lse_head", "lse_row",
        "mask_batch", "mask_head", "mask_row", "mask_key", "alibi_batch", "alibi_head",
        "q_code", "kv_code", "mask_code", "head_dim", "v_head_dim", "kv_group", "causal", "window_left", "window_right",
        # Units of work. `groups` x `group` are the query heads of a batch entry. The query rows of a head form bands of
        # `band` rows, one but for a block mask; the rows of a band, of all heads of a group, are cut into `panels`.
        "groups", "group", "q_len", "band", "bands", "panels", "units", "parts", "split",
        "indptr", "indices", "partial", "element_bits", "block_size", "pattern_batch", "pattern_head",
        "head_pitch", "v_head_pitch", "block_keys", "states", "own_states", "state_bytes",
    )]
    + [("scale", np.float32), ("softcap", np.float32)]
)  # fmt: skip

_LOWEST = float(np.finfo(np.float32).min)  # what is less than this is -inf
_LOG2E = 1.4426950408889634
_ROUND = 1.5 * 2.0**23  # adding it rounds to an integer, which is then in the low bits
_TINY = -126 * 0.6931471805599453  # below this exp is no normal number, and 0

jit = njit(error_model="numpy")
inline = njit(error_model="numpy", forceinline=True)


# Numbers in memory


@inline
def float_of(bits):
    return np.uint32(bits).view(np.float32)


@inline
def bits_of(x):
    return np.float32(x).view(np.uint32)


@inline
def widen_half(half):
    """The float32 of the bits of a float16."""
    if CONVERTS_HALF:
        return convert_half(half)
    magnitude = np.uint32(half & 0x7FFF) << np.uint32(13)
    sign = np.uint32(half & 0x8000) << np.uint32(16)
    if magnitude >= np.uint32(0x0F800000):  # inf and NaN
        return float_of(sign | (magnitude + np.uint32(0x70000000)))
    if magnitude < np.uint32(0x00800000):  # subnormals: a sum does what a shift cannot
        return float_of(sign | bits_of(float_of(magnitude + np.uint32(0x38800000)) - float_of(np.uint32(0x38800000))))
    return float_of(sign | (magnitude + np.uint32(0x38000000)))


@inline
def widen(address, index, code):
    """Element `index` of an array of floats of any storage type, as a float32."""
    if code == FLOAT32:
        return elements(address, float32)[index]
    bits = elements(address, uint16)[index]
    if code == BFLOAT16:
        return float_of(np.uint32(bits) << np.uint32(16))
    return widen_half(bits)


@inline
def narrow(x, code):
    """The 16 bits of a float32 in storage type `code`, rounded to nearest even."""
    bits = bits_of(x)
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    if code == BFLOAT16:
        if magnitude > np.uint32(0x7F800000):  # rounding must not turn NaN into inf
            return sign | np.uint32(0x7FC0)
        return (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    if magnitude > np.uint32(0x7F800000):
        return sign | np.uint32(0x7E00)
    if magnitude >= np.uint32(0x477FF000):  # rounds to 65536 and above
        return sign | np.uint32(0x7C00)
    if magnitude < np.uint32(0x38800000):  # subnormals: adding 0.5 rounds at the right bit
        return sign | (bits_of(float_of(magnitude) + np.float32(0.5)) - np.uint32(0x3F000000))
    return sign | ((magnitude - np.uint32(0x37FFF001) + ((magnitude >> np.uint32(13)) & np.uint32(1))) >> np.uint32(13))


@jit
def widen_row(source, code, n, target):
    """Write `n` elements as float32."""
    to = elements(target, float32)
    for d in range(n):
        to[d] = widen(source, d, code)


@jit
def narrow_row(source, factor, code, n, target):
    """Write `n` float32, times a factor, in their storage type."""
    x = elements(source, float32)
    if code == FLOAT32:
        to = elements(target, float32)
        for d in range(n):
            to[d] = x[d] * factor
    else:
        bits = elements(target, uint16)
        for d in range(n):
            bits[d] = narrow(x[d] * factor, code)


@inline
def narrow_double(x):
    """A float64 bias as float32: one that is finite stays finite."""
    return np.float32(min(max(x, _LOWEST), -_LOWEST) if np.isfinite(x) else x)


@jit
def bias_row(source, step, code, n, target):
    """Write what `n` elements of the mask, `step` bytes apart, add to the scores: -inf hides, and only an exact -inf does."""
    to = elements(target, float32)
    if code == BOOL:
        if step == 1:  # a loop of its own, for it alone is vectorised
            for j in range(n):
                to[j] = 0.0 if elements(source, uint8)[j] else -np.inf
        else:
            for j in range(n):
                to[j] = 0.0 if elements(source + j * step, uint8)[0] else -np.inf
    elif code == FLOAT64:
        for j in range(n):
            to[j] = narrow_double(elements(source + j * step, float64)[0])
    elif step == (4 if code == FLOAT32 else 2):
        widen_row(source, code, n, target)
    else:
        for j in range(n):
            to[j] = widen(source + j * step, 0, code)


@jit
def fill(target, x, low, high):
    to = elements(target, float32)
    for j in range(low, high):
        to[j] = x


@jit
def transpose_all(source, source_row, n_rows, n_columns, target, target_row, row):
    """Transpose an array of float32; both sizes are multiples of the width of a register."""
    for i in range(0, n_rows, width(row)):
        for j in range(0, n_columns, width(row)):
            transpose(source + i * source_row + 4 * j, source_row, target + j * target_row + 4 * i, target_row, row)


# Functions of lanes


@inline
def exp(x):
    """``e**x`` for x <= 0 to a rounding error or two; less than 2**-126 is 0, NaN stays NaN."""
    shifted = fma(x, _LOG2E, _ROUND)
    f = fma(x, _LOG2E, sub(_ROUND, shifted))  # x = (n + f) ln 2 with f in [-1/2, 1/2]
    p = fma(f, 0.00015403530393381608, 0.0013333558146428443)  # Taylor's series of 2**f: the rest is below 2e-9
    p = fma(p, f, 0.009618129107628477)
    p = fma(p, f, 0.05550410866482158)
    p = fma(p, f, 0.24022650695910072)
    p = fma(p, f, 0.6931471805599453)
    p = fma(p, f, 1.0)
    return where_less(x, _TINY, 0.0, mul(p, two_to(shifted)))


@inline
def magnitude_of(x):
    return where_less(x, 0.0, sub(0.0, x), x)


@inline
def tanh(x):
    """Cephes' two pieces: a polynomial where 1 - 2 / (e**2|x| + 1) would cancel."""
    a = magnitude_of(x)
    e = exp(mul(a, -2.0))
    far = div(sub(1.0, e), add(1.0, e))
    z = mul(x, x)
    p = fma(z, -5.70498872745e-3, 2.06390887954e-2)
    p = fma(p, z, -5.37397155531e-2)
    p = fma(p, z, 1.33314422036e-1)
    p = fma(p, z, -3.33332819422e-1)
    near = fma(mul(p, z), x, x)
    return where_less(a, 0.625, near, where_less(x, 0.0, sub(0.0, far), far))


# Parts of a step. `tile` and `row` stand for their types alone: the shape of the registers. Where there are few query rows a step
# takes no longer than its keys take to arrive. So one product asks for the operand of the next, a share with each tile.

Rows = namedtuple("Rows", "address stride n nbytes")


@jit
def ask_for(some, low, high):
    """Prefetch those of the rows `low` to `high` that there are."""
    for j in range(low, min(high, some.n)):
        for line in range(0, some.nbytes, 64):
            prefetch(some.address + j * some.stride + line)


@inline
def product(a, a_stride, a_step, b, b_step, n, tile):
    """``sum_s a[t][s] * b[s][:]`` over n steps, the sums kept in registers."""
    total = splat(0.0, tile)
    for _ in range(n):
        total = rank_one(total, a, a_stride, b)
        a += a_step
        b += b_step
    return total


@jit
def scores(k, k_row, n, head_dim, qt, st, scale, ahead, tile, row):
    """``S^T = scale * K Q^T``; the last tile overlaps the one before where n is no multiple of its rows."""
    pitch = 4 * lanes(row)
    if n < rows(tile):
        for j in range(n):
            store(st + j * pitch, mul(product(k + j * k_row, 0, 4, qt, pitch, head_dim, row), scale))
        return
    for first in range(0, n, rows(tile)):
        ask_for(ahead, first, first + rows(tile))
        j = min(first, n - rows(tile))
        store(st + j * pitch, mul(product(k + j * k_row, k_row, 4, qt, pitch, head_dim, tile), scale))


@jit
def adjust(st, n, softcap, bias, slopes, distance, low, high, row):
    """The rules of the score, then -inf where lane i does not see key j: outside ``low <= j < high`` or by the bias."""
    pitch = 4 * lanes(row)
    for j in range(n):
        x = load(st + j * pitch, row)
        if softcap != 0.0:
            x = mul(tanh(div(x, softcap)), softcap)
        if slopes:
            away = magnitude_of(sub(load(distance, row), j))
            x = sub(x, mul(load(slopes, row), away))
        if bias:
            b = load(bias + j * pitch, row)
            x = where_less(b, _LOWEST, b, add(x, b))
        x = where_less(j, load(low, row), -np.inf, x)
        x = where_less(j, load(high, row), x, -np.inf)
        store(st + j * pitch, x)


@jit
def softmax(st, n, m_at, l_at, row):
    """Turn scores into weights, update the running m and l, and return what earlier weights shrink by."""
    pitch = 4 * lanes(row)
    before = load(m_at, row)
    m = before
    for j in range(n):
        x = load(st + j * pitch, row)
        m = where_less(m, x, x, m)
    shift = where_less(m, _LOWEST, 0.0, m)  # lest -inf - -inf give NaN
    alpha = exp(sub(before, shift))
    total = splat(0.0, row)
    for j in range(n):
        x = load(st + j * pitch, row)
        p = where_less(x, _LOWEST, -0.0, exp(sub(x, shift)))
        store(st + j * pitch, p)
        total = add(total, p)
    store(m_at, m)
    store(l_at, fma(load(l_at, row), alpha, total))
    return alpha


@jit
def values(v, v_row, n, v_head_dim, pt, ot, alpha, ahead, tile, row):
    """``O^T = O^T * alpha + V^T P^T``."""
    pitch = 4 * lanes(row)
    d = 0
    share = -(-ahead.n * rows(tile) // v_head_dim) if v_head_dim else int64(0)
    asked = int64(0)
    while d + rows(tile) <= v_head_dim:
        ask_for(ahead, asked, asked + share)
        asked += share
        total = product(v + 4 * d, 4, v_row, pt, pitch, n, tile)
        store(ot + d * pitch, fma(load(ot + d * pitch, tile), alpha, total))
        d += rows(tile)
    while d < v_head_dim:
        total = product(v + 4 * d, 4, v_row, pt, pitch, n, row)
        store(ot + d * pitch, fma(load(ot + d * pitch, row), alpha, total))
        d += 1


@jit
def careful_values(v, v_row, n, v_head_dim, pt, ot, alpha, row):
    """The same for values with NaN or inf among them, which must not reach the lanes that do not see their key."""
    pitch = 4 * lanes(row)
    for d in range(v_head_dim):
        total = splat(0.0, row)
        for j in range(n):
            p = load(pt + j * pitch, row)
            hidden = div(1.0, p)  # -inf for -0.0
            total = where_less(hidden, 0.0, total, fma(p, elements(v + j * v_row, float32)[d], total))
        store(ot + d * pitch, fma(load(ot + d * pitch, row), alpha, total))


@jit
def all_finite(v, v_row, n, v_head_dim):
    """Whether `n` rows of float32 hold no NaN and no inf."""
    exponent = np.uint32(0x7F800000)
    largest = np.uint32(0)
    for j in range(n):
        bits = elements(v + j * v_row, types.uint32)
        for d in range(v_head_dim):
            largest = max(largest, bits[d] & exponent)
    return largest < exponent


# Work items

Panel = namedtuple(
    "Panel",
    "b head0 i0"  # batch entry, first query head, first query row of the band
    " first n_rows"  # lane 0 is row `first` of the band, row r of which is query i0 + r // group of head head0 + r % group
    " low high"  # the keys that some row of the panel sees
    " inner_low inner_high",  # the keys that every row sees, but for masks
)

# Where things are. The first four are a state: m, l and seen, a row each, and O^T.
Places = namedtuple("Places", "m l seen ot turned low high distance slopes qt st bias k v")


@inline
def places(plan, state, scratch, row):
    pitch = 4 * lanes(row)
    low = scratch + max(plan.head_pitch, plan.v_head_pitch, plan.block_keys) * pitch
    qt = low + 4 * pitch
    st = qt + plan.head_pitch * pitch
    bias = st + plan.block_keys * pitch
    k = bias + plan.block_keys * pitch
    v = k + 4 * plan.block_keys * plan.head_dim
    return Places(
        state, state + pitch, state + 2 * pitch, state + 3 * pitch,
        scratch, low, low + pitch, low + 2 * pitch, low + 3 * pitch, qt, st, bias, k, v,
    )  # fmt: skip


@inline
def locate(plan, unit, row):
    """The panel of a unit of work, its keys left out."""
    unit, panel = divmod(unit, plan.panels)
    unit, band = divmod(unit, plan.bands)
    b, group = divmod(unit, plan.groups)
    i0, first = band * plan.band, panel * lanes(row)
    n_rows = min(plan.band, plan.q_len - i0) * plan.group - first  # less than 1 in the last band of a block mask
    zero = int64(0)
    return Panel(b, group * plan.group, i0, first, min(n_rows, lanes(row)), zero, zero, zero, zero)


@inline
def row_of(plan, panel, lane):
    """The query row and the head of a lane."""
    r = panel.first + lane
    return panel.i0 + r // plan.group, panel.head0 + r % plan.group


@inline
def interval(plan, b, i):
    """The keys ``low <= j < high`` that lengths, causal and window leave to query row `i`."""
    position = i + elements(plan.query_offset, int64)[b]
    low = int64(0)
    high = elements(plan.kv_lengths, int64)[b]
    if plan.causal:
        high = min(high, position + 1)
    if plan.window_right >= 0:
        high = min(high, position + plan.window_right + 1)
    if plan.window_left >= 0:
        low = max(low, position - plan.window_left)
    return low, max(low, high)


@inline
def part_range(plan, b, part):
    """The keys of one of the parts into which the keys of an entry are split, by the shape of that entry alone."""
    length = elements(plan.kv_lengths, int64)[b]
    if plan.split == 1:
        return int64(0), length
    chunk = max(-(-length // plan.split), int64(MIN_PART))
    return part * chunk, min((part + 1) * chunk, length)


@jit
def open_panel(plan, unit, part, at, row):
    """The panel of a unit of work and a part of its keys, with its queries packed and the state of rows that have seen nothing."""
    panel = locate(plan, unit, row)
    store(at.m, splat(-np.inf, row))
    fill(at.l, 0.0, 0, (2 + plan.v_head_pitch) * lanes(row))
    fill(at.slopes, 0.0, 0, lanes(row))
    fill(at.turned, 0.0, 0, plan.head_pitch * lanes(row))
    low, high = part_range(plan, panel.b, part)
    some_low, some_high, inner_low, inner_high = high, low, low, high
    for lane in range(panel.n_rows):
        i, head = row_of(plan, panel, lane)
        q = plan.q + panel.b * plan.q_batch + head * plan.q_head + i * plan.q_row
        widen_row(q, plan.q_code, plan.head_dim, at.turned + 4 * lane * plan.head_pitch)
        if plan.alibi:
            slope = elements(plan.alibi + panel.b * plan.alibi_batch + head * plan.alibi_head, float32)[0]
            elements(at.slopes, float32)[lane] = slope
        row_low, row_high = interval(plan, panel.b, i)
        inner_low, inner_high = max(inner_low, row_low), min(inner_high, row_high)
        if row_low < row_high:
            some_low, some_high = min(some_low, row_low), max(some_high, row_high)
    transpose_all(at.turned, 4 * plan.head_pitch, lanes(row), plan.head_pitch, at.qt, 4 * lanes(row), row)
    low, high = max(low, some_low), min(high, some_high)
    return Panel(panel.b, panel.head0, panel.i0, panel.first, panel.n_rows, low, high, inner_low, inner_high)


@inline
def listed_blocks(plan, panel):
    """The range of the list of key blocks that belongs to a panel; without a block mask, a list of one."""
    if not plan.indptr:
        return int64(0), int64(1)
    pattern = panel.b * plan.pattern_batch + panel.head0 * plan.pattern_head + panel.i0 // plan.band
    indptr = elements(plan.indptr, int64)
    return indptr[pattern], indptr[pattern + 1]


@inline
def is_partial(plan, n):
    return plan.partial != 0 and elements(plan.partial, int32)[n] >= 0


@jit
def next_run(plan, panel, n, end):
    """The keys ``low <= j < high`` of a run that begins with block `n` of the list, and the first block after it.

    A run is a partial block or whole blocks that touch; without a block mask it is all keys. For a partial block there is also the
    address of the element mask of key 0, as it would be if the mask began there.
    """
    if not plan.indptr:
        return panel.low, panel.high, int64(0), end
    block = elements(plan.indices, int32)
    low = int64(block[n]) * plan.block_size
    high, bits = low + plan.block_size, int64(0)
    n += 1
    if is_partial(plan, n - 1):
        bytes_per_key = (plan.block_size + 7) // 8
        mask = int64(elements(plan.partial, int32)[n - 1])
        bits = plan.element_bits + (mask * plan.block_size - low) * bytes_per_key
    else:
        while n < end and int64(block[n]) * plan.block_size == high and not is_partial(plan, n):
            high += plan.block_size
            n += 1
    return max(low, panel.low), min(high, panel.high), bits, n


@jit
def see_interval(plan, panel, j, n, at, row):
    """Note for each lane which of the keys j to j + n are visible, relative to j, where no mask has a say."""
    low, high, seen = elements(at.low, float32), elements(at.high, float32), elements(at.seen, float32)
    fill(at.low, 0.0, 0, lanes(row))
    fill(at.high, 0.0, 0, lanes(row))
    for lane in range(panel.n_rows):
        row_low, row_high = interval(plan, panel.b, row_of(plan, panel, lane)[0])
        row_low, row_high = max(row_low, j), min(row_high, j + n)
        low[lane], high[lane] = row_low - j, row_high - j
        if row_low < row_high:
            seen[lane] = 1.0


@jit
def see_mask(plan, panel, j, n, bits, at, row):
    """Write the bias of n keys from j on, -inf where a lane does not see the key; whether any lane sees any."""
    pitch = 4 * plan.block_keys
    bytes_per_key = (plan.block_size + 7) // 8
    any_visible = False
    fill(at.turned, -np.inf, 0, lanes(row) * plan.block_keys)
    for lane in range(panel.n_rows):
        line = at.turned + lane * pitch
        x = elements(line, float32)
        i, head = row_of(plan, panel, lane)
        low, high = interval(plan, panel.b, i)
        low = min(max(low - j, 0), n)
        high = min(max(high - j, low), n)
        if plan.mask:
            mask = plan.mask + panel.b * plan.mask_batch + head * plan.mask_head + i * plan.mask_row + (j + low) * plan.mask_key
            bias_row(mask, plan.mask_key, plan.mask_code, high - low, line + 4 * low)
        else:
            fill(line, 0.0, low, high)
        if bits:
            byte, bit = bits + j * bytes_per_key + ((i - panel.i0) >> 3), np.uint8((i - panel.i0) & 7)
            for key in range(low, high):
                if not (elements(byte + key * bytes_per_key, uint8)[0] >> bit) & 1:
                    x[key] = -np.inf
        hidden = 0
        for key in range(low, high):
            hidden += x[key] == np.float32(-np.inf)
        if hidden < high - low:
            elements(at.seen, float32)[lane] = 1.0
            any_visible = True
    if any_visible:
        n_columns = -(-n // width(row)) * width(row)
        transpose_all(at.turned, pitch, lanes(row), n_columns, at.bias, 4 * lanes(row), row)
    return any_visible


@jit
def step(plan, panel, j, high, bits, at, tile, row):
    """Take a block of keys from j on, but none from `high` on, into the state."""
    n = min(high - j, plan.block_keys)
    masked = bits != 0 or plan.mask != 0
    partial = masked or j < panel.inner_low or j + n > panel.inner_high
    if masked and not see_mask(plan, panel, j, n, bits, at, row):
        return
    if partial and not masked:
        see_interval(plan, panel, j, n, at, row)
    else:
        store(at.low, splat(0.0, row))
        store(at.high, splat(n, row))
    if not partial:
        store(at.seen, splat(1.0, row))

    kv_head = panel.head0 // plan.kv_group
    k = plan.k + panel.b * plan.k_batch + kv_head * plan.k_head + j * plan.k_row
    v = plan.v + panel.b * plan.v_batch + kv_head * plan.v_head + j * plan.v_row
    k_row, v_row, itemsize = plan.k_row, plan.v_row, 4 if plan.kv_code == FLOAT32 else 2
    these_values = Rows(v, v_row, n, itemsize * plan.v_head_dim)
    next_keys = Rows(k + n * k_row, k_row, min(high - j - n, plan.block_keys), itemsize * plan.head_dim)
    if plan.kv_code != FLOAT32:
        for key in range(n):
            widen_row(k + key * k_row, plan.kv_code, plan.head_dim, at.k + 4 * key * plan.head_dim)
            widen_row(v + key * v_row, plan.kv_code, plan.v_head_dim, at.v + 4 * key * plan.v_head_dim)
        k, k_row, v, v_row = at.k, 4 * plan.head_dim, at.v, 4 * plan.v_head_dim

    scores(k, k_row, n, plan.head_dim, at.qt, at.st, plan.scale, these_values, tile, row)
    if partial or plan.softcap != 0.0 or plan.alibi != 0:
        if plan.alibi:
            offset = elements(plan.query_offset, int64)[panel.b] - j
            for lane in range(panel.n_rows):
                elements(at.distance, float32)[lane] = row_of(plan, panel, lane)[0] + offset
        bias = at.bias if masked else int64(0)
        slopes = at.slopes if plan.alibi else int64(0)
        adjust(at.st, n, plan.softcap, bias, slopes, at.distance, at.low, at.high, row)
    alpha = softmax(at.st, n, at.m, at.l, row)
    if partial and not all_finite(v, v_row, n, plan.v_head_dim):
        careful_values(v, v_row, n, plan.v_head_dim, at.st, at.ot, alpha, row)
    else:
        values(v, v_row, n, plan.v_head_dim, at.st, at.ot, alpha, next_keys, tile, row)


@jit
def attend(plan, unit, part, state, scratch, tile, row):
    """The state of one unit of work over one part of its keys."""
    at = places(plan, state, scratch, row)
    panel = open_panel(plan, unit, part, at, row)
    block, end = listed_blocks(plan, panel)
    while block < end:
        low, high, bits, block = next_run(plan, panel, block, end)
        for j in range(low, high, plan.block_keys):
            step(plan, panel, j, high, bits, at, tile, row)


@jit
def fold(state, other, v_head_dim, row):
    """Add another part of the keys to a state."""
    pitch = 4 * lanes(row)
    a, b = load(state, row), load(other, row)
    m = where_less(a, b, b, a)
    shift = where_less(m, _LOWEST, 0.0, m)
    alpha, beta = exp(sub(a, shift)), exp(sub(b, shift))
    store(state, m)
    store(state + pitch, fma(load(state + pitch, row), alpha, mul(load(other + pitch, row), beta)))
    store(state + 2 * pitch, add(load(state + 2 * pitch, row), load(other + 2 * pitch, row)))
    for d in range(3, 3 + v_head_dim):
        store(state + d * pitch, fma(load(state + d * pitch, row), alpha, mul(load(other + d * pitch, row), beta)))


@jit
def finish(plan, unit, state, scratch, row):
    """Divide by the denominator and write the rows of a unit to `out` and `lse`."""
    at = places(plan, state, scratch, row)
    panel = locate(plan, unit, row)
    m, l, seen = elements(at.m, float32), elements(at.l, float32), elements(at.seen, float32)
    transpose_all(at.ot, 4 * lanes(row), plan.v_head_pitch, lanes(row), at.turned, 4 * plan.v_head_pitch, row)
    for lane in range(panel.n_rows):
        i, head = row_of(plan, panel, lane)
        top, total, factor = float64(m[lane]), float64(l[lane]), 1.0
        if plan.sinks:
            sink = float64(elements(plan.sinks, float32)[head])
            top = max(top, sink)
            factor = np.exp(m[lane] - top)
            total = total * factor + np.exp(sink - top)
        if plan.lse:
            lse = plan.lse + panel.b * plan.lse_batch + head * plan.lse_head + i * plan.lse_row
            elements(lse, float32)[0] = top + np.log(total)
        factor /= total
        line = at.turned + 4 * lane * plan.v_head_pitch
        if not seen[lane]:
            fill(line, 0.0, 0, plan.v_head_dim)
            factor = 1.0
        out = plan.out + panel.b * plan.out_batch + head * plan.out_head + i * plan.out_row
        narrow_row(line, np.float32(factor), plan.q_code, plan.v_head_dim, out)


# What a thread runs. Numba's disk cache keeps a function under the values that it closes over, so that each shape of the registers
# and each change of the source has an entry of its own.


def build_attention(stamp, tile_rows, registers, width):
    """The function that computes work items for tiles of a shape, and its signature.

    It takes work items from a shared counter until none is left. An item is, by `phase`,

    - WHOLE: a unit of work with all parts of its keys, one after the other,
    - PARTS: one part of a unit; its state is left in ``plan.states``,
    - MERGE: a unit whose parts have been computed.

    The arithmetic is the same in WHOLE and in PARTS with MERGE.
    """

    def attention(plans, phase, scratch, counter):
        stamp  # noqa: B018
        tile = blank(tile_rows, registers, width)
        row = blank(1, registers, width)
        plan = plans[0]
        parts, size = plan.parts, plan.state_bytes
        n_items = plan.units * parts if phase == PARTS else plan.units
        while True:
            item = count(counter)
            if item >= n_items:
                return
            if phase == PARTS:
                attend(plan, item // parts, item % parts, plan.states + item * size, scratch, tile, row)
                continue
            state = plan.states + item * parts * size if phase == MERGE else scratch + plan.own_states
            for part in range(parts):
                other = state + (part if phase == MERGE else min(part, 1)) * size
                if phase == WHOLE:
                    attend(plan, item, part, other, scratch, tile, row)
                if part > 0:
                    fold(state, other, plan.v_head_dim, row)
            finish(plan, item, state, scratch, row)

    record = types.Array(from_dtype(PLAN), 1, "C")
    return attention, types.void(record, int64, int64, types.Array(int64, 1, "C"))


def build_merge(stamp, rows_of_item):
    """The function that computes rows of `merge_states`, and its signature.

    `parts` holds the addresses of the `out` of each part, then those of the `lse` of each.
    """

    def merge(parts, n_parts, n_rows, v_head_dim, code, out, lse, scratch, counter):
        stamp  # noqa: B018
        total = elements(scratch, float32)
        while True:
            first = count(counter) * rows_of_item
            if first >= n_rows:
                return
            for r in range(first, min(first + rows_of_item, n_rows)):
                m = -np.inf
                for part in range(n_parts):
                    m = max(m, float64(elements(parts[n_parts + part], float32)[r]))
                for d in range(v_head_dim):
                    total[d] = 0.0
                l = 0.0
                for part in range(n_parts):
                    part_lse = float64(elements(parts[n_parts + part], float32)[r])
                    if part_lse == -np.inf:
                        continue
                    weight = np.exp(part_lse - m)
                    l += weight
                    source = parts[part] + r * v_head_dim * (4 if code == FLOAT32 else 2)
                    for d in range(v_head_dim):
                        total[d] += np.float32(weight) * widen(source, d, code)
                elements(lse, float32)[r] = m + np.log(l)
                for d in range(v_head_dim):
                    x = total[d] / np.float32(l) if l != 0.0 else np.float32(0.0)
                    if code == FLOAT32:
                        elements(out, float32)[r * v_head_dim + d] = x
                    else:
                        elements(out, uint16)[r * v_head_dim + d] = narrow(x, code)

    integers = types.Array(int64, 1, "C")
    return merge, types.void(integers, *[int64] * 7, integers)
