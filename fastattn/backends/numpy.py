"""The readable oracle: attention in NumPy, for any floating dtype.

It is the loop of the C engine in the terms of the paper: tiles of query rows against blocks of keys, a running maximum
`m`, denominator `l` and accumulator `acc` for each row. Keys that no row of a tile sees are not loaded at all. Arithmetic is
float32 for 16-bit and float32 storage, and of the dtype of `q` where that is wider.
"""

import math

import numpy as np

from .._quantized import encoded, kind_of, turned

_TILE_ROWS = 256
_TILE_KEYS = 4096
_ALIKE_KEYS = 256  # of a tile where rows are invariant
_SELECTED = 1 << 20  # scores of a tile of rows and all keys

dtypes = frozenset({"float16", "bfloat16", "float32", "float64", np.dtype(np.longdouble).name})


def set_num_threads(n):
    """Do nothing: the threads of NumPy are those of its BLAS library."""


def attention(call):
    """Fill ``call.out`` and ``call.lse``."""
    if call.visibility.indices is not None:
        call.check_indices()
    with np.errstate(all="ignore"):  # NaN and inf pass through, as in the formula
        for b, h, i0, i1 in _tiles(call):
            entry = call.entry(b)
            out, lse = _attend_tile(call, entry, b, h, i0, i1)
            entry.out[h, i0:i1] = out
            if entry.lse is not None:
                entry.lse[h, i0:i1] = lse
    call.clear_padding()


def weights(call, heads, rows):
    """Yield ``(tile, probabilities)`` for some heads and query rows; each row sums to 1, to less with a sink, to 0 where it sees no key.

    `tile` is the index ``(b, n, i)`` of the probabilities, ``(rows, Lk)`` in float32, among those of all heads and rows that are chosen.
    """
    for tile, b, h, i0, i1 in _chosen_tiles(call, heads, rows):
        probabilities = np.zeros((i1 - i0, call.k.shape[2]), np.float32)
        with np.errstate(all="ignore"):
            blocks = list(_score_blocks(call, call.entry(b), b, h, i0, i1))
            m, l = _empty_state(call, i1 - i0)
            softmax = call.scores.activation == "softmax"
            for _, some, _ in blocks if softmax else ():
                m, l, _, _ = _softmax_step(m, l, some)
            m, l, _ = _add_sink(call.scores.sinks, h, m, l)
            for keys, some, visible in blocks:
                p = np.exp(some - _shift(m)[:, None]) / l[:, None] if softmax else _activate(call, b, some)
                probabilities[:, keys] = np.where(visible, p, 0)
        probabilities[_padding(call, b, i0)] = 0
        yield tile, probabilities


def scores(call, stage, heads, rows):
    """Yield ``(tile, scores)`` likewise: products and scale, after the softcap, or after all that adds to a score or hides its key."""
    dtype = _compute_dtype(call.q.dtype)
    for tile, b, h, i0, i1 in _chosen_tiles(call, heads, rows):
        with np.errstate(all="ignore"):
            if stage == "bias":
                found = np.full((i1 - i0, call.k.shape[2]), -np.inf, dtype)
                for keys, some, _ in _score_blocks(call, call.entry(b), b, h, i0, i1):
                    found[:, keys] = some
                found[_padding(call, b, i0)] = -np.inf
            else:
                keys = call.k[b, h // (call.q.shape[1] // call.k.shape[1])].astype(dtype)
                found = call.q[b, h, i0:i1].astype(dtype) @ keys.T
                found *= dtype.type(call.scores.scale)
                if stage == "softcap":
                    found = _capped(call.scores, found)
        yield tile, found


def merge_states(outs, lses, out, lse):
    """Fill `out` ``(..., Dv)`` and `lse` ``(...)`` with the combination of the parts."""
    dtype = _compute_dtype(out.dtype)
    with np.errstate(all="ignore"):
        m = np.max(lses, axis=0, initial=-np.inf)
        weights = [np.exp(part_lse - _shift(m), dtype=dtype) for part_lse in lses]
        l = sum(weights, np.zeros(lse.shape, dtype))
        acc, largest = np.zeros(out.shape, dtype), np.zeros(out.shape, dtype)
        for part, part_lse, weight in zip(outs, lses, weights):
            part = np.where((part_lse == -np.inf)[..., None], 0, part.astype(dtype))
            acc += (weight / np.where(l == 0, 1, l))[..., None] * part
            largest = np.maximum(largest, np.abs(part))
        lse[...] = m + np.log(l)
        out[...] = np.where(np.isfinite(largest), np.clip(acc, -largest, largest), acc)  # a mean; rounding could overflow


def store(pairs, slots, rotate):
    """Cast or quantise rows ``(B, L, H, D)`` into caches ``(pages, rows of a page, H, D)`` at `slots` ``(B, L)``; -1 leaves one out."""
    wanted, made = slots >= 0, []
    for rows, cache in pairs:
        new, kind = turned(rows[wanted]) if rotate else rows[wanted], kind_of(cache.dtype)
        made.append(new if kind is None else encoded(new, kind))
        if made[-1] is None:
            return False
    for new, (_, cache) in zip(made, pairs):
        page, row = np.divmod(slots[wanted], cache.shape[1])
        with np.errstate(over="ignore"):  # beyond the largest number is inf, as in any cast
            cache[page, row] = new
    return True


def select_keys(call):
    """Fill ``call.indices``: scores of some rows and all keys, of which each row takes the largest."""
    num_heads, q_len = call.q.shape[1:3]
    heads, kv_len = call.k.shape[1], call.kv_len
    group, dtype, unit = num_heads // max(heads, 1), _compute_dtype(call.q.dtype), max(call.block, 1)
    call.indices[...] = -1
    rows = max(1, _SELECTED // max(kv_len * group, 1))
    for b, h in np.ndindex(len(call.q), heads):
        length, offset = int(call.kv_lengths[b]), int(call.query_offset[b])
        k = call.k[b, h] if call.block_table is None else call.k[call.block_table[b], h].reshape(kv_len, call.k.shape[3])
        k = k[:length].astype(dtype)
        for i0 in range(0, q_len, rows):
            here = slice(i0, min(i0 + rows, q_len))
            of_group = slice(h * group, (h + 1) * group)
            with np.errstate(all="ignore"):
                s = call.q[b, of_group, here].astype(dtype) @ k.T
                if call.rectified:
                    s = np.maximum(s, 0)
                w = np.ones(s.shape[:2], dtype) if call.weights is None else call.weights[b, of_group, here].astype(dtype)
                s = np.einsum("gi,gij->ij", w, s)
            position, key = np.arange(here.start, here.stop)[:, None] + offset, np.arange(length)
            s[(key < call.keep_first) | ((key > position - call.keep_recent) & (key <= position))] = np.inf
            s[np.isnan(s) | (call.causal & (key > position))] = -np.inf
            if unit > 1 and length:
                s = np.maximum.reduceat(s, np.arange(0, length, unit), axis=1)
            for n, own in enumerate(s):
                best = np.sort(np.argsort(-own, kind="stable")[: call.indices.shape[3] // unit])
                best = best[own[best] > -np.inf]
                if unit > 1:
                    best = (best[:, None] * unit + np.arange(unit)).ravel()
                    best = best[best < (min(length, position[n, 0] + 1) if call.causal else length)]
                call.indices[b, h, i0 + n, : best.size] = best


def apply_rope(x, cos, sin, out, interleaved):
    """Fill `out` with the rows of `x` turned by the angles of the tables."""
    dtype, pairs = _compute_dtype(x.dtype), cos.shape[-1]
    first, second = (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)) if interleaved else (slice(pairs), slice(pairs, 2 * pairs))
    with np.errstate(all="ignore"):
        for head in np.ndindex(x.shape[:2]):
            a, b = x[head][:, first].astype(dtype), x[head][:, second].astype(dtype)
            out[head][:, first], out[head][:, second] = a * cos[head] - b * sin[head], b * cos[head] + a * sin[head]
    if out is not x:
        out[..., 2 * pairs :] = x[..., 2 * pairs :]


def normalize(x, add, add_bias, total, weight, bias, out, eps, centred):
    """Fill `out`, and `total` unless it is None, with normalised rows and what they were before."""
    if add is not None:
        x = x + add
        if add_bias is not None:
            x += add_bias
        if total is not None:
            total[...] = x
    n = x.dtype.type(max(x.shape[-1], 1))
    with np.errstate(all="ignore"):
        if centred:
            x = x - x.sum(axis=-1, keepdims=True) / n
        square = np.einsum("...i,...i->...", x, x)[..., None] / n
        np.multiply(x / np.sqrt(square + x.dtype.type(eps)), weight, out=out)
        if bias is not None:
            out += bias


def pointwise(x, bias, out, kind, gated):
    """Fill `out` with an activation of rows."""
    if bias is not None:
        x = x + bias
    width = out.shape[1]
    with np.errstate(all="ignore"):
        y = _ACTIVATIONS[kind](x[:, :width])
        np.multiply(y, x[:, width:], out=out) if gated else np.copyto(out, y)


def _sigmoid(x):
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, x.dtype.type(1)) / (1 + e)


# Half of e**(x**2 / 2) * erfc(x / sqrt(2)) for x >= 0, as a polynomial in 1 / (1 + 0.3 x) with a relative error of 9e-8 up to x = 12.
_ERFC = (
    0.036742594093084335, -0.16168344020843506, 0.21413975954055786, -0.06092599779367447, 0.13244321942329407,
    0.09871835261583328, 0.12094920128583908, 0.11961626261472702, 0.0,
)  # fmt: skip


def _gelu(x):
    if x.dtype == np.float64:  # where nothing but the function itself is exact enough
        return x * (0.5 * np.frompyfunc(math.erfc, 1, 1)(-x * math.sqrt(0.5)).astype(x.dtype))
    below = np.polyval(np.array(_ERFC, x.dtype), 1 / (1 + x.dtype.type(0.3) * np.abs(x))) * np.exp(x.dtype.type(-0.5) * x * x)
    return x * np.where(x < 0, below, 1 - below)


_ACTIVATIONS = {
    "gelu": _gelu,
    "gelu_tanh": lambda x: x * _sigmoid(x * (x.dtype.type(math.sqrt(8 / math.pi)) * (1 + x.dtype.type(0.044715) * x * x))),
    "silu": lambda x: x * _sigmoid(x),
    "relu": lambda x: np.maximum(x, 0),
}


def linear_attention(call):
    """Fill ``call.out`` and ``call.new_state``: the recurrence as it is defined, token by token, all heads at once."""
    call.check_decay()
    group, columns = call.heads // max(call.states, 1), call.v.shape[3]
    features = (lambda x: x, lambda x: np.where(x < 0, np.exp(np.minimum(x, 0)), x + 1), lambda x: np.where(x < 0, 0, x))[call.feature_map]

    def heads(array, b, n):
        """Entry b as ``(L, n, ...)`` in the dtype of the state, heads repeated where there are fewer."""
        return np.repeat(array[b].astype(call.dtype).swapaxes(0, 1), n // max(array.shape[1], 1), axis=1)

    def answer(y, total):
        found = np.einsum("hgd,hde->hge", y.reshape(call.states, group, y.shape[1]), total).reshape(call.heads, total.shape[2])
        if not call.normalize:
            return found
        return np.where(found[:, -1:] == 0, 0, found[:, :-1] / found[:, -1:])

    with np.errstate(all="ignore"):
        for n, b, first, rows, real in call.sequences():
            q = features(heads(call.q, b, call.heads)) * call.dtype.type(call.scale)
            k, v = features(heads(call.k, b, call.states)), heads(call.v, b, call.states)
            if call.normalize:  # the sum of the keys is one more column of the state, whose values are 1
                v = np.concatenate([v, np.ones((*v.shape[:2], 1), call.dtype)], axis=-1)
            decay, beta = (None if x is None else heads(x, b, call.states) for x in (call.decay, call.beta))
            if call.decay_log:
                decay = np.exp(decay)
            total = np.zeros((call.states, k.shape[2], columns + call.normalize), call.dtype)
            if call.state is not None:
                total += call.state[n]
            if call.causal:
                call.out[b, :, first : first + rows] = 0
            for t in range(first, first + real):
                if decay is not None:
                    total *= decay[t, :, None, None] if decay.ndim == 2 else decay[t, :, :, None]
                added = v[t] if beta is None else beta[t, :, None] * (v[t] - np.einsum("hd,hde->he", k[t], total))
                total += k[t, :, :, None] * added[:, None]
                if call.causal:
                    call.out[b, :, t] = answer(q[t], total)
            queries = range(first, first + rows) if call.cu_seqlens is not None else range(call.q.shape[2])
            for t in () if call.causal else queries:
                call.out[b, :, t] = answer(q[t], total)
            if call.new_state is not None:
                call.new_state[n] = total


def explain(call):
    """How `call` is computed."""
    _, num_heads, q_len, head_dim = call.q.shape
    v_head_dim = call.out.shape[3]
    tile_rows, tile_keys = min(_TILE_ROWS, q_len), min(_TILE_KEYS, call.entries.kv_rows)
    computed = 0
    for b, _, i0, i1 in _tiles(call):
        low, high = _key_range(call, b, i0, i1)
        computed += (i1 - i0) * (high - low)
    elements = 3 * tile_rows * tile_keys + tile_keys * (head_dim + v_head_dim) + 2 * tile_rows * v_head_dim
    return {
        "backend": "numpy",
        "isa": None,
        "kernel": _compute_dtype(call.q.dtype).name,
        "tile_rows": tile_rows,
        "tile_keys": tile_keys,
        "splits": 1,
        "work_items": num_heads * sum(-(-q_length // _TILE_ROWS) for q_length in call.entries.q_lengths.tolist()),
        "threads": 1,
        "threading": None,
        "workspace_bytes": elements * _compute_dtype(call.q.dtype).itemsize,
        "visible_fraction": computed / max(num_heads * call.entries.pairs, 1),
    }


def _compute_dtype(dtype):
    return dtype if dtype.kind == "f" and dtype.itemsize > 4 else np.dtype(np.float32)


def _tiles(call):
    """Every ``(b, h, i0, i1)``: query rows i0 to i1 of one head. Tiles depend on the shape of an entry alone."""
    rows = _TILE_ROWS if call.visibility.indices is None else 1  # each has a list of its own
    for b, q_length in enumerate(call.entries.q_lengths.tolist()):
        for h in range(call.q.shape[1]):
            for i0 in range(0, q_length, rows):
                yield b, h, i0, min(i0 + rows, q_length)


def _chosen_tiles(call, heads, rows):
    """Every ``(tile, b, h, i0, i1)`` that some heads and query rows make: runs of rows that follow each other."""
    starts = np.flatnonzero(np.diff(rows, prepend=rows[:1] - 2) != 1)
    for n0, n1 in zip(starts, [*starts[1:], len(rows)]):
        for n in range(n0, n1, _TILE_ROWS):
            here = slice(n, min(n + _TILE_ROWS, n1))
            for b in range(call.q.shape[0]):
                for index, h in enumerate(heads):
                    yield (b, index, here), b, int(h), int(rows[n]), int(rows[here.stop - 1]) + 1


def _padding(call, b, i0):
    """Of rows from i0 on, those beyond `q_lengths`."""
    return slice(max(int(call.entries.q_lengths[b]) - i0, 0), None)


def _key_range(call, b, i0, i1):
    """The keys ``low`` to ``high`` outside of which lengths, causal and window hide everything from rows i0 to i1."""
    entries, (left, right) = call.entries, call.visibility.window
    offset, start, high = int(entries.query_offset[b]), int(entries.kv_starts[b]), int(entries.kv_lengths[b])
    low = start
    if call.visibility.causal:
        high = min(high, i1 + offset)
    if right >= 0:
        high = min(high, i1 + offset + right)
    if left >= 0:
        low = max(low, i0 + offset - left)
    return (low, high) if low < high else (start, start)


def _score_blocks(call, entry, b, h, i0, i1):
    """Yield ``(keys, scores, visible)`` for each block of keys of which some row i0 to i1 sees one.

    `keys` are the indices of the keys that at least one row sees; `scores` is -inf where `visible` is False.
    """
    dtype = _compute_dtype(call.q.dtype)
    visibility, rules = call.visibility, call.scores
    left, right = visibility.window
    low, high = _key_range(call, b, i0, i1)
    position = np.arange(i0, i1)[:, None] + call.entries.query_offset[b]
    q = entry.q[h, i0:i1].astype(dtype)
    k = entry.k[h // (call.q.shape[1] // call.k.shape[1])]
    listed = None if visibility.block_mask is None else visibility.block_mask.dense_rows(b, h, i0, i1)

    for keys in _key_blocks(call, b, h, i0, low, high):
        span = slice(keys[0], keys[-1] + 1) if visibility.indices is None else keys
        visible = np.ones((i1 - i0, keys.size), bool)
        if visibility.causal:
            visible &= keys <= position
        if left >= 0:
            visible &= keys >= position - left
        if right >= 0:
            visible &= keys <= position + right
        if listed is not None:
            visible &= listed[:, span]
        bias = None
        if visibility.mask is not None and visibility.mask.dtype == bool:
            visible &= call.mask_of(b)[h, i0:i1][:, span]
        elif visibility.mask is not None:
            bias = call.mask_of(b)[h, i0:i1][:, span]
            visible &= bias != -np.inf

        seen = np.flatnonzero(visible.any(axis=0))
        if not seen.size:
            continue
        keys, visible = keys[seen], visible[:, seen]

        scores = _raw_scores(call, h, q, k[keys].astype(dtype), _places(call, b, keys))
        scores = _capped(rules, scores * dtype.type(rules.scale))
        if rules.function is not None:
            scores = rules.function.apply(scores, b, h, np.arange(i0, i1), keys)
        if bias is not None:
            scores += _narrow(bias[:, seen], dtype)
        if rules.alibi_slopes is not None:
            scores -= rules.alibi_slopes[b, h] * np.abs(position - keys).astype(dtype)
        yield keys, np.where(visible, scores, dtype.type(-np.inf)), visible


def _capped(rules, scores):
    """Scores after the softcap, if there is one."""
    cap = scores.dtype.type(rules.softcap)
    return cap * np.tanh(scores / cap) if cap else scores


def _key_blocks(call, b, h, i, low, high):
    """The keys from `low` to `high`, some at a time: all of them, or those that row `i` lists."""
    step = _ALIKE_KEYS if call.invariant else _TILE_KEYS
    if call.visibility.indices is None:
        start = int(call.entries.kv_starts[b])
        for j0 in range(low - (low - start) % step, high, step):
            yield np.arange(max(j0, low), min(j0 + step, high))
        return
    of, rows = call.entries.queries_of(b)
    listed = call.visibility.indices[of, h // (call.q.shape[1] // call.k.shape[1]), rows][i]
    listed = listed[(listed >= low) & (listed < high)]
    for n in range(0, listed.size, step):
        yield listed[n : n + step]


def _raw_scores(call, h, q, k, places):
    """Products, or additive scores; `places` are those of the keys in their tile."""
    additive = call.scores.additive
    if not call.invariant:
        return q @ k.T if additive is None else _additive(additive[h], q, k)
    k = _in_place(k, places)
    if additive is None:
        return _each_alone(q, k.T)[:, places]
    return np.concatenate([_additive(additive[h], row[None], k) for row in q])[:, places]


def _places(call, b, keys):
    """Where keys stand in their tile; listed ones one after the other."""
    return (keys - call.entries.kv_starts[b]) % _ALIKE_KEYS if call.visibility.indices is None else np.arange(keys.size)


def _in_place(x, places):
    """Rows at their places in a tile of which the others are 0.

    Where rows are invariant, every sum is over a whole tile: what a library adds up, and in which order, depends on the shapes that it
    is given.
    """
    tile = np.zeros((_ALIKE_KEYS, *x.shape[1:]), x.dtype)
    tile[places] = x
    return tile


def _each_alone(a, b):
    """``a @ b``, each row of `a` by a product of its own, the same one however many there are."""
    return (a[:, None] @ b)[:, 0]


def _tile_of(call, b, keys, scores, visible, v):
    """Scores, visibility and values of `keys` as they are summed up."""
    if not call.invariant:
        return scores, visible, v
    places = _places(call, b, keys)
    hidden = np.full((_ALIKE_KEYS, len(scores)), -np.inf, scores.dtype)
    hidden[places] = scores.T
    return np.ascontiguousarray(hidden.T), _in_place(visible.T, places).T, _in_place(v, places)


def _additive(weights, q, k):
    """``weights . tanh(q + k)`` of all rows and keys, some keys at a time."""
    scores = np.empty((len(q), len(k)), q.dtype)
    step = max(_TILE_KEYS // max(q.shape[1], 1), 1)
    for j in range(0, len(k), step):
        scores[:, j : j + step] = np.tanh(q[:, None] + k[None, j : j + step]) @ weights.astype(q.dtype)
    return scores


def _activate(call, b, scores):
    """The weights of scores that are weighed one by one; 0 for -inf, as hidden ones are."""
    rules = call.scores
    n = scores.dtype.type(max(int(call.entries.kv_lengths[b] - call.entries.kv_starts[b]), 1))
    if rules.activation == "relu":
        return np.maximum(scores, 0) / n
    if rules.activation == "polynomial":
        return np.where(scores == -np.inf, 0, scores**rules.power / np.sqrt(n))
    x = scores + (-np.log(n) if rules.activation_bias is None else rules.activation_bias[b].astype(scores.dtype))
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1) / (1 + e)


def _narrow(bias, dtype):
    """A bias in the dtype of the scores; a finite one stays finite, for only exact -inf hides a key."""
    if bias.dtype.kind == "f" and bias.dtype.itemsize > dtype.itemsize:
        limit = np.finfo(dtype).max
        bias = np.where(np.isfinite(bias), np.clip(bias, -limit, limit), bias)
    return bias.astype(dtype)


def _attend_tile(call, entry, b, h, i0, i1):
    """`out` and `lse` of query rows i0 to i1 of one head."""
    if call.scores.activation != "softmax":
        return _weighted_sums(call, entry, b, h, i0, i1), None
    if call.segments is not None:
        return _mean_values(call, entry, b, h, i0, i1)
    out, lse = _mean_values(call, entry, b, h, i0, i1)
    overflown = ~np.isfinite(out) & np.isfinite(lse)[:, None]
    if overflown.any():
        # The mean of finite values is no larger than the largest of them, though their sum may be: that of smaller ones is not.
        keys = np.arange(call.entries.kv_starts[b], call.entries.kv_lengths[b])
        values = np.abs(entry.v[h // (call.q.shape[1] // call.v.shape[1])][keys].astype(out.dtype))
        largest = values.max(where=np.isfinite(values), initial=0)
        down = np.ldexp(out.dtype.type(1), np.finfo(out.dtype).minexp // 2)
        small, _ = _mean_values(call, entry, b, h, i0, i1, down)
        mean = np.where(np.isfinite(small), np.clip(small / down, -largest, largest), small)
        out[overflown] = mean[overflown]
    return out, lse


def _weighted_sums(call, entry, b, h, i0, i1):
    """`out` where weights have no denominator."""
    acc = np.zeros((i1 - i0, entry.out.shape[2]), _compute_dtype(call.q.dtype))
    for keys, scores, visible in _score_blocks(call, entry, b, h, i0, i1):
        values = _values_of(call, entry, b, h, keys, acc.dtype)
        scores, visible, values = _tile_of(call, b, keys, scores, visible, values)
        _add_values(call, acc, _activate(call, b, scores), visible, values)
    return acc


def _mean_values(call, entry, b, h, i0, i1, v_scale=1):
    """The same where no sum overflows, of values times `v_scale`."""
    m, l = _empty_state(call, i1 - i0)
    acc = np.zeros((i1 - i0, entry.out.shape[2]), l.dtype)
    sees = np.zeros(i1 - i0, bool)
    for keys, scores, visible in _score_blocks(call, entry, b, h, i0, i1):
        values = _values_of(call, entry, b, h, keys, l.dtype, v_scale)
        scores, visible, values = _tile_of(call, b, keys, scores, visible, values)
        m, l, p, alpha = _softmax_step(m, l, scores)
        acc *= alpha[:, None]
        _add_values(call, acc, p, visible, values)
        sees |= visible.any(axis=1)
    m, l, alpha = _add_sink(call.scores.sinks, h, m, l)
    acc *= alpha[:, None]
    return np.where(sees[:, None], acc / l[:, None], 0), m + np.log(l)


def _empty_state(call, rows):
    """The running maximum and denominator of rows that have seen nothing."""
    dtype = _compute_dtype(call.q.dtype)
    return np.full(rows, -np.inf, dtype), np.zeros(rows, dtype)


def _softmax_step(m, l, scores):
    """Take a block of scores in: the new `m` and `l`, the weights of the block, and what earlier weights shrink by."""
    m_new = np.maximum(m, scores.max(axis=1))
    p = np.exp(scores - _shift(m_new)[:, None])
    alpha = np.exp(m - _shift(m_new))
    return m_new, l * alpha + p.sum(axis=1), p, alpha


def _add_sink(sinks, h, m, l):
    """Let the sink of head `h`, if it has one, take part in the denominator: the new `m` and `l`, and what `acc` shrinks by."""
    if sinks is None or sinks[h] == -np.inf:
        return m, l, np.ones_like(l)
    m_new = np.maximum(m, sinks[h])
    alpha = np.exp(m - m_new)
    return m_new, l * alpha + np.exp(sinks[h] - m_new), alpha


def _shift(m):
    """What to subtract before exp: `m`, or 0 for a row that has seen nothing above -inf, lest -inf - -inf give NaN."""
    return np.where(m == -np.inf, 0, m).astype(m.dtype)


def _values_of(call, entry, b, h, keys, dtype, v_scale=1):
    """What the weights of some keys go to: their values times `v_scale`, or their segments."""
    if call.segments is not None:
        table = call.entries.cu_seqlens_k
        return call.segments[b, keys] if table is None else call.segments[0, table[b] + keys]
    v = entry.v[h // (call.q.shape[1] // call.v.shape[1])]
    return v[keys].astype(dtype) * dtype.type(v_scale)


def _add_values(call, acc, p, visible, values):
    """Add the values of some keys times weights `p` to `acc`, or the weights themselves to their segments."""
    if call.segments is None:
        acc += _weighted_values(call, p, visible, values)
        return
    order = np.argsort(values, kind="stable")
    order = order[np.searchsorted(values, 0, sorter=order) :]
    if order.size:
        present, starts = np.unique(values[order], return_index=True)
        acc[:, present] += np.add.reduceat(p[:, order], starts, axis=1)


def _weighted_values(call, p, visible, v):
    """``p @ v`` in which a NaN or inf of `v` reaches only the rows that see its key."""
    product = _each_alone if call.invariant else np.matmul
    finite = np.isfinite(v).all(axis=1)
    if finite.all():
        return product(p, v)
    out = product(p, np.where(finite[:, None], v, 0))
    for j in np.flatnonzero(~finite):
        rows = visible[:, j]
        out[rows] += p[rows, j, None] * v[j]
    return out
