"""The tile loop in Numba: online softmax over a panel of query rows.

A work item is up to ``lanes`` query rows that share one kv head: the rows of a GQA group side by side, so that keys and
values are read once for all of them. Scores and weights are kept transposed, a query row being a lane of every vector::

    for each block of keys:
        S^T [j][lane] = scale * K Q^T
        m, l, P^T     : maxima and sums over j are plain vertical operations
        O             = O * alpha + P V
    out = O / l

Where rows are few, a vector of S^T and P^T holds several keys, each of which has ``slots`` lanes, and the lanes of a row share
their m. How the products go depends on the number of rows as well: see `_numba_products`. Each block gets fresh accumulators,
which also keeps rounding errors from growing with the number of keys.

A key that is hidden from a row has the score -inf and the weight -0.0. Negative zero adds nothing to a sum, and tells a
hidden key from one whose weight underflowed where that matters: next to a NaN or inf among the values.
"""

from collections import namedtuple

import numpy as np
from numba import float32, float64, from_dtype, int32, int64, types, uint8, uint16

from ._numba_numbers import (
    BFLOAT16, FLOAT16, FLOAT32, INT4, INT8, LOWEST, all_finite, bias_row, decode_row, exp, fill, float_of, inline, jit, magnitude_of,
    narrow, narrow_row, replace_row, tanh, widen, widen_row,
)  # fmt: skip
from ._numba_products import Rows, careful_values, pack, scores, transpose_all, unpack, values
from ._numba_simd import add, blank, call_score_function, count, div, elements, fma, lanes, load, mul, splat, store, sub, where_less, width

WHOLE, PARTS, MERGE = range(3)
ACTIVATIONS = ("softmax", "sigmoid", "relu", "polynomial")
SOFTMAX, SIGMOID, RELU, POLYNOMIAL = range(4)
MOST_RISE = 40.0  # what sums by segment may be larger than the weights they are relative to, as a logarithm
MIN_PART = 512  # keys for which it pays to split

# What `attend` is told. Addresses and strides are in bytes; an address of 0 means that the thing is absent.
PLAN = np.dtype(
    [(name, np.int64) for name in (
        "q", "k", "v", "out", "lse", "mask", "alibi", "sinks",
        "q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row",
        "out_batch", "out_head", "out_row", "lse_batch", "lse_head", "lse_row",
        "mask_batch", "mask_head", "mask_row", "mask_key", "alibi_batch", "alibi_head",
        "q_code", "kv_code", "v_code", "mask_code", "head_dim", "v_head_dim", "kv_group", "causal", "window_left", "window_right",
        # Units of work. `groups` x `group` are the query heads of a batch entry. The query rows of a head form bands of
        # `band` rows, one but for a block mask; the rows of a band, of all heads of a group, are cut into panels.
        "block_table", "table_row", "page_size", "entries", "n_entries", "groups", "group", "band", "units", "parts",
        "indptr", "indices", "partial", "element_bits", "block_size", "pattern_batch", "pattern_head",
        "slots", "head_pitch", "v_head_pitch", "block_keys", "widened", "states", "own_states", "state_bytes",
        "activation", "power", "activation_bias", "additive", "additive_head", "segments", "segments_row", "num_segments",
        "score_function", "score_context",
        # Keys that rows list: what is counted are places in a list. A band is one row, so that all lanes have the same.
        "lists", "list_batch", "list_head", "list_row", "index_size",
    )]
    + [(name, np.float32) for name in ("scale", "softcap", "shrink")]  # `shrink`: what weights are multiplied by, 1 or `SHRINK`
)  # fmt: skip

# Sums of values may overflow where their mean, which is finite, does not. What is not finite in the end is then computed again from
# weights that are this much smaller.
SHRINK = 2.0**-64


# The batch entries of a plan, each with a shape of its own, as rows of int64. Rows and keys of an entry count from its first.
Entry = namedtuple(
    "Entry",
    "batch query key"  # where its first row and key are in the arrays
    " start"  # the key of the masks that is its first
    " q_len kv_len offset"  # its rows and keys, and the position of its first row, where that of its first key is 0
    " keys"  # as many, but where keys are listed: then it has places in a list
    " bands panels split unit",  # how its work is cut; `unit` is the first of its units
)
ENTRY_BYTES = 8 * len(Entry._fields)


# Between the products: scores become weights.


@jit
def repeat(address, slots, row):
    """Copy the lanes of the first key of a vector to those of the others."""
    x = elements(address, float32)
    for lane in range(slots, lanes(row)):
        x[lane] = x[lane - slots]


@jit
def agree(address, slots, row):
    """Give all lanes of a query row the largest of their numbers, none of which is NaN."""
    x = elements(address, float32)
    for lane in range(slots, lanes(row)):
        x[lane % slots] = max(x[lane % slots], x[lane])
    repeat(address, slots, row)


@jit
def cap(at, n, softcap, row):
    """Bend n vectors of scores, so that none is beyond `softcap`."""
    for j in range(n):
        vector = at.st + 4 * j * lanes(row)
        store(vector, mul(tanh(div(load(vector, row), softcap)), softcap))


@jit
def adjust(plan, at, n, bias, slopes, row):
    """What is added to scores in n vectors, then -inf where a row does not see a key: outside ``low <= key < high`` or by the bias."""
    pitch = 4 * lanes(row)
    for j in range(n):
        x = load(at.st + j * pitch, row)
        key = add(load(at.key, row), j * (lanes(row) // plan.slots))
        if slopes:
            away = magnitude_of(sub(load(at.distance, row), key))
            x = sub(x, mul(load(slopes, row), away))
        if bias:
            b = load(bias + j * pitch, row)
            x = where_less(b, LOWEST, b, add(x, b))
        x = where_less(key, load(at.low, row), -np.inf, x)
        x = where_less(key, load(at.high, row), x, -np.inf)
        store(at.st + j * pitch, x)


@jit
def softmax(plan, at, n, row):
    """Turn n vectors of scores into weights, update the running m and l, and note what earlier weights shrink by."""
    pitch = 4 * lanes(row)
    before = load(at.m, row)
    m = before
    for j in range(n):
        x = load(at.st + j * pitch, row)
        m = where_less(m, x, x, m)
    store(at.m, m)
    agree(at.m, plan.slots, row)
    m = load(at.m, row)
    shift = where_less(m, LOWEST, 0.0, m)  # lest -inf - -inf give NaN
    alpha = exp(sub(before, shift))
    total = splat(0.0, row)
    for j in range(n):
        x = load(at.st + j * pitch, row)
        p = where_less(x, LOWEST, -0.0, exp(sub(x, shift)))
        store(at.st + j * pitch, p)
        total = add(total, p)
    store(at.l, fma(load(at.l, row), alpha, total))
    store(at.alpha, alpha)
    if plan.shrink != 1.0:
        for j in range(n):
            store(at.st + j * pitch, mul(load(at.st + j * pitch, row), plan.shrink))


@inline
def activation_of(plan, entry):
    """What is added to the scores of an entry, and what its weights are multiplied by."""
    n = float64(max(entry.keys, int64(1)))
    if plan.activation == SIGMOID:
        given = elements(plan.activation_bias, float32)[entry.batch] if plan.activation_bias else np.float32(-np.log(n))
        return given, np.float32(1.0)
    return np.float32(0.0), np.float32(1.0 / n if plan.activation == RELU else 1.0 / np.sqrt(n))


@jit
def activate(plan, entry, at, n, row):
    """Turn n vectors of scores into weights one by one: m stays 0, and earlier weights stay as they are."""
    pitch = 4 * lanes(row)
    bias, factor = activation_of(plan, entry)
    store(at.alpha, splat(1.0, row))
    for j in range(n):
        x = load(at.st + j * pitch, row)
        if plan.activation == SIGMOID:
            y = add(x, bias)
            e = exp(sub(0.0, magnitude_of(y)))
            p = div(where_less(y, 0.0, e, 1.0), add(1.0, e))
        elif plan.activation == RELU:
            p = where_less(x, 0.0, 0.0, mul(x, factor))
        else:
            p = splat(factor, row)
            for _ in range(plan.power):
                p = mul(p, x)
        store(at.st + j * pitch, where_less(x, LOWEST, -0.0, add(p, 0.0)))  # no weight of a visible key is -0.0


# Work items

Panel = namedtuple(
    "Panel",
    "entry head0 i0"  # batch entry, first query head, first query row of the band
    " first n_rows"  # lane 0 is row `first` of the band, row r of which is query i0 + r // group of head head0 + r % group
    " low high"  # the keys that some row of the panel sees
    " inner_low inner_high",  # the keys that every row sees, but for masks
)

# Where things are. The first four are a state: m, l and seen, a row each, and O. Lane by lane, `key` is the key within a vector.
# The weights of additive scores lie where other keys are widened.
Places = namedtuple("Places", "m l seen o turned key low high distance slopes alpha base rise q st bias k v weights")


@inline
def places(plan, state, scratch, row):
    pitch = 4 * lanes(row)
    key = scratch + max(plan.head_pitch, plan.v_head_pitch, plan.block_keys) * pitch
    q = key + 8 * pitch
    st = q + plan.head_pitch * pitch
    bias = st + plan.block_keys * pitch
    k = bias + plan.block_keys * pitch
    v = k + 4 * plan.block_keys * plan.head_dim
    return Places(
        state, state + pitch, state + 2 * pitch, state + 3 * pitch,
        scratch, key, key + pitch, key + 2 * pitch, key + 3 * pitch, key + 4 * pitch, key + 5 * pitch,
        key + 6 * pitch, key + 7 * pitch, q, st, bias, k, v, k,
    )  # fmt: skip


@inline
def entry_at(plan, n):
    x = elements(plan.entries + ENTRY_BYTES * n, int64)
    return Entry(x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8], x[9], x[10], x[11])


@jit
def locate(plan, unit, row):
    """The panel of a unit of work, its keys left out."""
    low, high = int64(0), plan.n_entries
    while high - low > 1:
        middle = (low + high) // 2
        if entry_at(plan, middle).unit <= unit:
            low = middle
        else:
            high = middle
    entry = entry_at(plan, low)
    rest, panel = divmod(unit - entry.unit, entry.panels)
    group, band = divmod(rest, entry.bands)
    i0, first = band * plan.band, panel * lanes(row)
    n_rows = min(plan.band, entry.q_len - i0) * plan.group - first  # less than 1 in the last band of a block mask
    zero = int64(0)
    return Panel(entry, group * plan.group, i0, first, min(n_rows, lanes(row)), zero, zero, zero, zero)


@inline
def row_of(plan, panel, lane):
    """The query row and the head of a lane."""
    r = panel.first + lane
    return panel.i0 + r // plan.group, panel.head0 + r % plan.group


@inline
def out_row(plan, panel, lane):
    """The address of a lane's row of the output."""
    i, head = row_of(plan, panel, lane)
    return plan.out + panel.entry.batch * plan.out_batch + head * plan.out_head + (panel.entry.query + i) * plan.out_row


@inline
def interval(plan, entry, i):
    """The keys ``low <= j < high`` that lengths, causal and window leave to query row `i`; of listed ones all places."""
    if plan.lists:
        return int64(0), entry.kv_len
    return keys_seen(plan, entry, i)


@inline
def keys_seen(plan, entry, i):
    position = i + entry.offset
    low, high = int64(0), entry.keys
    if plan.causal:
        high = min(high, position + 1)
    if plan.window_right >= 0:
        high = min(high, position + plan.window_right + 1)
    if plan.window_left >= 0:
        low = max(low, position - plan.window_left)
    return low, max(low, high)


@inline
def key_at(plan, entry, kv_head, i, place):
    """The key in a place; of a list that of row `i`, or -1 where there is none that it sees."""
    if not plan.lists:
        return place
    line = plan.lists + entry.batch * plan.list_batch + kv_head * plan.list_head + (entry.query + i) * plan.list_row
    key = elements(line, int64)[place] if plan.index_size == 8 else int64(elements(line, int32)[place])
    low, high = keys_seen(plan, entry, i)
    return key - entry.start if low <= key - entry.start < high else int64(-1)


@inline
def keys_of_part(entry):
    return max(-(-entry.kv_len // entry.split), int64(1) if entry.split == 1 else int64(MIN_PART))


@inline
def parts_of(entry):
    """The parts into which the keys of an entry are split, by the shape of that entry alone."""
    return max(-(-entry.kv_len // keys_of_part(entry)), int64(1))


@inline
def part_range(entry, part):
    """The keys of one of the parts."""
    chunk = keys_of_part(entry)
    return part * chunk, min((part + 1) * chunk, entry.kv_len)


@jit
def open_panel(plan, unit, part, at, row, storage):
    """The panel of a unit of work and a part of its keys, with its queries packed and the state of rows that have seen nothing."""
    panel = locate(plan, unit, row)
    store(at.m, splat(-np.inf if plan.activation == SOFTMAX else 0.0, row))
    fill(at.l, 0.0, 0, (2 + plan.v_head_pitch) * lanes(row))
    fill(at.slopes, 0.0, 0, lanes(row))
    store(at.base, load(at.m, row))
    store(at.rise, splat(1.0, row))
    for lane in range(lanes(row)):
        elements(at.key, float32)[lane] = lane // plan.slots
    fill(at.turned, 0.0, 0, plan.head_pitch * lanes(row))
    low, high = part_range(panel.entry, part)
    some_low, some_high, inner_low, inner_high = high, low, low, high
    for lane in range(panel.n_rows):
        i, head = row_of(plan, panel, lane)
        q = plan.q + panel.entry.batch * plan.q_batch + head * plan.q_head + (panel.entry.query + i) * plan.q_row
        widen_row(q, plan.q_code, plan.head_dim, at.turned + 4 * lane * plan.head_pitch)
        if plan.alibi:
            slope = elements(plan.alibi + panel.entry.batch * plan.alibi_batch + head * plan.alibi_head, float32)[0]
            elements(at.slopes, float32)[lane] = slope
        if plan.segments:
            fill(out_row(plan, panel, lane), 0.0, 0, plan.num_segments)
        row_low, row_high = interval(plan, panel.entry, i)
        inner_low, inner_high = max(inner_low, row_low), min(inner_high, row_high)
        if row_low < row_high:
            some_low, some_high = min(some_low, row_low), max(some_high, row_high)
    repeat(at.slopes, plan.slots, row)
    pack(plan, at, at.q, row, storage)
    if plan.additive:
        for lane in range(panel.n_rows):
            weights = plan.additive + row_of(plan, panel, lane)[1] * plan.additive_head
            widen_row(weights, FLOAT32, plan.head_pitch, at.turned + 4 * lane * plan.head_pitch)
        pack(plan, at, at.weights, row, storage)
    low, high = max(low, some_low), min(high, some_high)
    return Panel(panel.entry, panel.head0, panel.i0, panel.first, panel.n_rows, low, high, inner_low, inner_high)


@inline
def listed_blocks(plan, panel):
    """The range of the list of key blocks that belongs to a panel; without a block mask, a list of one."""
    if not plan.indptr:
        return int64(0), int64(1)
    pattern = panel.entry.batch * plan.pattern_batch + panel.head0 * plan.pattern_head + panel.i0 // plan.band
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
    start = panel.entry.start
    low = int64(block[n]) * plan.block_size - start
    high, bits = low + plan.block_size, int64(0)
    n += 1
    if is_partial(plan, n - 1):
        bytes_per_key = (plan.block_size + 7) // 8
        mask = int64(elements(plan.partial, int32)[n - 1])
        bits = plan.element_bits + (mask * plan.block_size - low) * bytes_per_key
    else:
        while n < end and int64(block[n]) * plan.block_size - start == high and not is_partial(plan, n):
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
        row_low, row_high = interval(plan, panel.entry, row_of(plan, panel, lane)[0])
        row_low, row_high = max(row_low, j), min(row_high, j + n)
        low[lane], high[lane] = row_low - j, row_high - j
        if row_low < row_high:
            seen[lane] = 1.0
    repeat(at.low, plan.slots, row)
    repeat(at.high, plan.slots, row)


@jit
def see_list(plan, panel, i, head, j, n, mask, slope, line):
    """Write the bias of n places of a list from j on for a row: mask and ALiBi of the key that is there, or -inf."""
    x = elements(line, float32)
    for place in range(n):
        key = key_at(plan, panel.entry, head // plan.kv_group, i, j + place)
        x[place] = 0.0 if key >= 0 else -np.inf
        if key >= 0 and plan.mask:
            bias_row(mask + key * plan.mask_key, plan.mask_key, plan.mask_code, 1, line + 4 * place)
        if slope != 0.0:
            x[place] -= slope * np.float32(abs(i + panel.entry.offset - key))


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
        low, high = interval(plan, panel.entry, i)
        low = min(max(low - j, 0), n)
        high = min(max(high - j, low), n)
        mask = plan.mask + panel.entry.batch * plan.mask_batch + head * plan.mask_head
        mask += (panel.entry.query + i) * plan.mask_row
        mask += panel.entry.start * plan.mask_key
        if plan.lists:
            see_list(plan, panel, i, head, j, n, mask, elements(at.slopes, float32)[lane], line)
        elif plan.mask:
            bias_row(mask + (j + low) * plan.mask_key, plan.mask_key, plan.mask_code, high - low, line + 4 * low)
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
        if plan.slots == lanes(row):
            n_columns = -(-n // width(row)) * width(row)
            transpose_all(at.turned, pitch, lanes(row), n_columns, at.bias, 4 * lanes(row), row)
        else:
            bias = elements(at.bias, float32)
            for lane in range(plan.slots):
                for key in range(n):
                    bias[key * plan.slots + lane] = elements(at.turned + lane * pitch, float32)[key]
    return any_visible


Stored = namedtuple("Stored", "address batch head row n_columns code")  # keys or values: where, strides of the axes, numbers in a row


@inline
def row_at(plan, entry, kv_head, i, stored, place):
    """The address of a key, or of its values; of the first one for a place without a key."""
    head, key = stored.address + kv_head * stored.head, max(key_at(plan, entry, kv_head, i, place), 0)
    if not plan.block_table:
        return head + entry.batch * stored.batch + (entry.key + key) * stored.row
    page, row = divmod(entry.key + key, plan.page_size)
    return head + elements(plan.block_table + entry.batch * plan.table_row, int32)[page] * stored.batch + row * stored.row


@jit
def find_rows(plan, entry, kv_head, query, stored, j, n, target):
    """The rows of n keys from j on: where they lie, or, if that is in several pages or they have to be float32, as a copy."""
    itemsize = 4 if stored.code == FLOAT32 else 2
    scattered = plan.lists != 0 or (plan.block_table != 0 and (entry.key + j) % plan.page_size + n > plan.page_size)
    if not (scattered or plan.widened):
        return Rows(row_at(plan, entry, kv_head, query, stored, j), stored.row, n, itemsize * stored.n_columns)
    if plan.widened:
        itemsize = 4
    nbytes = itemsize * stored.n_columns
    for i in range(n):
        source, to = row_at(plan, entry, kv_head, query, stored, j + i), target + i * nbytes
        if stored.code == INT8 or stored.code == INT4:
            decode_row(source, stored.code, stored.n_columns, to)
        elif plan.widened:
            widen_row(source, stored.code, stored.n_columns, to)
        else:
            halves, copy = elements(source, uint16), elements(to, uint16)
            for byte in range(0, nbytes, 2):
                copy[byte // 2] = halves[byte // 2]
    return Rows(target, nbytes, n, nbytes)


@inline
def multiply(x, n, factor):
    for i in range(n):
        x[i] *= factor


@jit
def gather(plan, panel, j, n, at):
    """Add the weights of n keys from j on to the sums of their segments, which are in the rows of the output.

    The sums of a row are relative to a maximum of its own, `base`. It is not moved with every other one, for that would take all of
    the row each time: weights are multiplied by ``rise = exp(m - base)``, as long as this leaves float32 room for their sums.
    """
    segment = elements(plan.segments + panel.entry.batch * plan.segments_row + 4 * (panel.entry.key + j), int32)
    m, alpha = elements(at.m, float32), elements(at.alpha, float32)
    base, rise = elements(at.base, float32), elements(at.rise, float32)
    p = elements(at.st, float32)
    for lane in range(panel.n_rows):
        sums = elements(out_row(plan, panel, lane), float32)
        if alpha[lane] != 1.0 and m[lane] != np.float32(-np.inf):
            away = float64(m[lane]) - float64(base[lane])
            if not away <= MOST_RISE:
                if base[lane] != np.float32(-np.inf):
                    multiply(sums, plan.num_segments, np.float32(np.exp(-away)))
                base[lane] = m[lane]
                away = float64(m[lane]) - float64(base[lane])
            rise[lane] = np.exp(away)
        for key in range(n):
            if segment[key] >= 0:
                sums[segment[key]] += rise[lane] * p[key * plan.slots + lane]


@jit
def call_function(plan, panel, j, n, at):
    """Have the caller's function change the scores of n keys from j on: row by row, in runs of keys that follow each other."""
    s, line = elements(at.st, float32), elements(at.turned, float32)
    for lane in range(panel.n_rows):
        i, head = row_of(plan, panel, lane)
        for place in range(n):
            line[place] = s[place * plan.slots + lane]
        first = int64(0)
        while first < n:
            key, end = key_at(plan, panel.entry, head // plan.kv_group, i, j + first), first + 1 if plan.lists else n
            while end < n and key >= 0 and key_at(plan, panel.entry, head // plan.kv_group, i, j + end) == key + end - first:
                end += 1
            if key >= 0:
                call_score_function(
                    plan.score_function, at.turned + 4 * first, end - first, panel.entry.batch, head, i, panel.entry.start + key,
                    plan.score_context,
                )  # fmt: skip
            first = end
        for place in range(n):
            s[place * plan.slots + lane] = line[place]


@jit
def step(plan, panel, j, high, bits, at, tile, row, storage):
    """Take a block of keys from j on, but none from `high` on, into the state."""
    n = min(high - j, plan.block_keys)
    masked = bits != 0 or plan.mask != 0 or plan.lists != 0
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

    kv_head, entry = panel.head0 // plan.kv_group, panel.entry
    stored_k = Stored(plan.k, plan.k_batch, plan.k_head, plan.k_row, plan.head_dim, plan.kv_code)
    stored_v = Stored(plan.v, plan.v_batch, plan.v_head, plan.v_row, plan.v_head_dim, plan.v_code)
    k = find_rows(plan, entry, kv_head, panel.i0, stored_k, j, n, at.k)
    v = find_rows(plan, entry, kv_head, panel.i0, stored_v, j, n, at.v)
    itemsize = 4 if plan.kv_code == FLOAT32 else 2
    ahead = int64(0) if plan.block_table != 0 or plan.lists != 0 or j + n >= high else itemsize * plan.head_dim
    next_keys = Rows(row_at(plan, entry, kv_head, panel.i0, stored_k, j) + n * plan.k_row, plan.k_row, n, ahead)
    code = FLOAT32 if plan.widened else plan.kv_code

    scores(plan, at, k, panel.n_rows, v, tile, row, storage)
    n_vectors = -(-n * plan.slots // lanes(row))
    full = n_vectors * lanes(row) == n * plan.slots
    if plan.softcap != 0.0:
        cap(at, n_vectors, plan.softcap, row)
    if plan.score_function:
        call_function(plan, panel, j, n, at)
    if partial or not full or plan.alibi != 0:
        sloped = plan.alibi != 0 and plan.lists == 0  # for listed keys that is in the bias
        if sloped:
            offset = entry.offset - j
            for lane in range(panel.n_rows):
                elements(at.distance, float32)[lane] = row_of(plan, panel, lane)[0] + offset
            repeat(at.distance, plan.slots, row)
        bias = at.bias if masked else int64(0)
        slopes = at.slopes if sloped else int64(0)
        adjust(plan, at, n_vectors, bias, slopes, row)
    if plan.activation == SOFTMAX:
        softmax(plan, at, n_vectors, row)
    else:
        activate(plan, entry, at, n_vectors, row)
    if plan.segments:
        gather(plan, panel, j, n, at)
    elif partial and not all_finite(v.address, v.stride, n, plan.v_head_dim, code):
        careful_values(plan, at, v, code, row, storage)
    else:
        values(plan, at, v, panel.n_rows, next_keys, tile, row, storage)


@jit
def attend(plan, unit, part, state, scratch, tile, row, storage):
    """The state of one unit of work over one part of its keys."""
    at = places(plan, state, scratch, row)
    panel = open_panel(plan, unit, part, at, row, storage)
    block, end = listed_blocks(plan, panel)
    while block < end:
        low, high, bits, block = next_run(plan, panel, block, end)
        for j in range(low, high, plan.block_keys):
            step(plan, panel, j, high, bits, at, tile, row, storage)
    l = elements(at.l, float32)
    for lane in range(plan.slots, lanes(row)):
        l[lane % plan.slots] += l[lane]
    unpack(plan, at, row, storage)


@jit
def fold(state, other, v_head_dim, row):
    """Add another part of the keys to a state."""
    pitch = 4 * lanes(row)
    a, b = load(state, row), load(other, row)
    m = where_less(a, b, b, a)
    shift = where_less(m, LOWEST, 0.0, m)
    alpha, beta = exp(sub(a, shift)), exp(sub(b, shift))
    store(state, m)
    store(state + pitch, fma(load(state + pitch, row), alpha, mul(load(other + pitch, row), beta)))
    store(state + 2 * pitch, add(load(state + 2 * pitch, row), load(other + 2 * pitch, row)))
    for d in range(3, 3 + v_head_dim):
        store(state + d * pitch, fma(load(state + d * pitch, row), alpha, mul(load(other + d * pitch, row), beta)))


@jit
def finish(plan, unit, state, scratch, row):
    """Divide by the denominator and write the rows of a unit to `out` and `lse`; whether sums have overflown."""
    overflown = False
    at = places(plan, state, scratch, row)
    panel = locate(plan, unit, row)
    m, l, seen = elements(at.m, float32), elements(at.l, float32), elements(at.seen, float32)
    transpose_all(at.o, 4 * lanes(row), plan.v_head_pitch, lanes(row), at.turned, 4 * plan.v_head_pitch, row)
    for lane in range(panel.n_rows):
        i, head = row_of(plan, panel, lane)
        top, total, factor = float64(m[lane]), float64(l[lane]), 1.0
        sink = float64(elements(plan.sinks, float32)[head]) if plan.sinks else -np.inf
        if sink > -np.inf:
            top = max(top, sink)
            factor = np.exp(m[lane] - top)
            total = total * factor + np.exp(sink - top)
        if plan.lse:
            lse = plan.lse + panel.entry.batch * plan.lse_batch + head * plan.lse_head + (panel.entry.query + i) * plan.lse_row
            elements(lse, float32)[0] = top + np.log(total)
        if plan.activation != SOFTMAX:
            total = 1.0
        factor /= total
        line = at.turned + 4 * lane * plan.v_head_pitch
        if not seen[lane]:
            fill(line, 0.0, 0, plan.v_head_dim)
            factor = 1.0
        out = out_row(plan, panel, lane)
        if plan.segments:
            share = factor / elements(at.rise, float32)[lane] if seen[lane] else 0.0
            multiply(elements(out, float32), plan.num_segments, np.float32(share))
            continue
        if plan.shrink != 1.0:
            replace_row(line, factor / plan.shrink, plan.q_code, plan.v_head_dim, out)
            continue
        narrow_row(line, np.float32(factor), plan.q_code, plan.v_head_dim, out)
        overflown |= np.isfinite(factor) and not all_finite(line, 0, 1, plan.v_head_dim, FLOAT32)
    return overflown and plan.activation == SOFTMAX


@jit
def compute(plan, unit, state, apart, attended, scratch, tile, row, storage):
    """A unit of work with all parts of its keys, whose states are there where `attended`, and `apart` where they are kept; whether
    sums have overflown."""
    for part in range(parts_of(locate(plan, unit, row).entry)):
        other = state + (part if apart else min(part, 1)) * plan.state_bytes
        if not attended:
            attend(plan, unit, part, other, scratch, tile, row, storage)
        if part > 0:
            fold(state, other, plan.v_head_dim, row)
    return finish(plan, unit, state, scratch, row)


# What a thread runs. Numba's disk cache keeps a function under the values that it closes over, so that each shape of the registers
# and each change of the source has an entry of its own.


def build_attention(stamp, tile_rows, registers, width, row_registers, code):
    """The function that computes work items for tiles of a shape, and its signature.

    `code` is the storage type of keys and values for the products along the head dimension, None for those across the queries.

    It takes work items from a shared counter until none is left. An item is, by `phase`,

    - WHOLE: a unit of work with all parts of its keys, one after the other,
    - PARTS: one part of a unit; its state is left in ``plan.states``,
    - MERGE: a unit whose parts have been computed.

    The arithmetic is the same in WHOLE and in PARTS with MERGE. The second of the plans is that for sums that overflow.
    """

    storage = {None: None, FLOAT32: float32, FLOAT16: types.float16, BFLOAT16: uint16}[code]

    def attention(plans, phase, scratch, counter):
        stamp  # noqa: B018
        tile = blank(tile_rows, registers, width)
        row = blank(1, row_registers, width)
        plan = plans[0]
        parts, size = plan.parts, plan.state_bytes
        n_items = plan.units * parts if phase == PARTS else plan.units
        while True:
            item = count(counter)
            if item >= n_items:
                return
            if phase == PARTS:
                if item % parts < parts_of(locate(plan, item // parts, row).entry):
                    attend(plan, item // parts, item % parts, plan.states + item * size, scratch, tile, row, storage)
                continue
            merging = phase == MERGE
            state = plan.states + item * parts * size if merging else scratch + plan.own_states
            if compute(plan, item, state, merging, merging, scratch, tile, row, storage):
                compute(plans[1], item, state, merging, False, scratch, tile, row, storage)

    record = types.Array(from_dtype(PLAN), 1, "C")
    return attention, types.void(record, int64, int64, types.Array(int64, 1, "C"))


def build_merge(stamp, rows_of_item):
    """The function that computes rows of `merge_states`, and its signature.

    `parts` holds the addresses of the `out` of each part, then those of the `lse` of each.
    """

    def merge(parts, n_parts, n_rows, v_head_dim, code, out, lse, scratch, counter):
        stamp  # noqa: B018
        total = elements(scratch, float64)  # which no number of parts overflows
        largest = float64(float_of(np.uint32(0x7F7F0000 if code == BFLOAT16 else 0x7F7FFFFF)))
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
                        total[d] += weight * widen(source, d, code)
                elements(lse, float32)[r] = m + np.log(l)
                for d in range(v_head_dim):
                    mean = total[d] / l if l != 0.0 else 0.0
                    x = np.float32(min(max(mean, -largest), largest) if np.isfinite(mean) else mean)
                    if code == FLOAT32:
                        elements(out, float32)[r * v_head_dim + d] = x
                    else:
                        elements(out, uint16)[r * v_head_dim + d] = narrow(x, code)

    integers = types.Array(int64, 1, "C")
    return merge, types.void(integers, *[int64] * 7, integers)


def build_rope(stamp, code, interleaved, rows_of_item):
    """The function that turns the pairs of rows, and its signature.

    `at` holds the addresses of x, out, cos and sin, and `strides` for each of them those of batch entries, heads and rows. Rows are
    counted so that the heads of a position follow each other, for they share a row of the tables.
    """

    def rope(at, strides, num_heads, length, n_rows, head_dim, pairs, counter):
        stamp  # noqa: B018
        step, apart = (2, 1) if interleaved else (1, pairs)
        while True:
            begin = count(counter) * rows_of_item
            if begin >= n_rows:
                return
            for row in range(begin, min(begin + rows_of_item, n_rows)):
                b, i, h = row // (num_heads * length), row // num_heads % length, row % num_heads
                x = at[0] + b * strides[0, 0] + h * strides[0, 1] + i * strides[0, 2]
                out = at[1] + b * strides[1, 0] + h * strides[1, 1] + i * strides[1, 2]
                cos = elements(at[2] + b * strides[2, 0] + h * strides[2, 1] + i * strides[2, 2], float32)
                sin = elements(at[3] + b * strides[3, 0] + h * strides[3, 1] + i * strides[3, 2], float32)
                for n in range(pairs):
                    first, second = widen(x, n * step, code), widen(x, n * step + apart, code)
                    one, other = first * cos[n] - second * sin[n], second * cos[n] + first * sin[n]
                    if code == FLOAT32:
                        elements(out, float32)[n * step] = one
                        elements(out, float32)[n * step + apart] = other
                    else:
                        elements(out, uint16)[n * step] = narrow(one, code)
                        elements(out, uint16)[n * step + apart] = narrow(other, code)
                for d in range(2 * pairs, head_dim):
                    if code == FLOAT32:
                        elements(out, float32)[d] = elements(x, float32)[d]
                    else:
                        elements(out, uint16)[d] = elements(x, uint16)[d]

    integers = types.Array(int64, 1, "C")
    return rope, types.void(integers, types.Array(int64, 2, "C"), *[int64] * 5, integers)
