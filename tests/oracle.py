"""What the right answer is, and how close to it a result has to be.

`attention` is the definition of the operation: one row at a time, one rule after the other, in float64. It shares no
line with the package.

A result is judged as flash-attention judges its own: its largest error against float64 may be at most twice that of
the plain formula evaluated in the same dtype (float32 logits; weights and output rounded to the storage dtype), plus a floor
for the cases in which the plain formula is exact by luck: an ulp of the output, and what an ulp (of float32) in the
logits does to it. For the lse the floor is two ulps, since it is the sum of a logit and a logarithm. A plain formula of few numbers may
be closer than its rounding promises: a result that is further away than that allows is judged by the worst of the same formula with its
sums in other orders.
"""

import hashlib

import numpy as np

import fastattn


def attention(
    q,
    k,
    v,
    *,
    mask=None,
    causal=False,
    window=None,
    query_offset=None,
    kv_lengths=None,
    kv_starts=None,
    q_lengths=None,
    scale=None,
    softcap=None,
    alibi_slopes=None,
    sinks=None,
    activation="softmax",
    activation_bias=None,
    power=3,
    score_function=None,
    additive=None,
    compute=np.float64,
    store=None,
    order=lambda n: slice(n),
):
    """Attention by definition: ``(out, lse)``, computed in ``compute``, weights and output rounded to ``store``.

    Sums of n numbers are taken in the order ``order(n)``.

    With another activation than the softmax there is no lse, and in its place the largest size of a score of the row. `additive` are
    weights ``(Hq, A)``, with which a score is ``additive . tanh(q + k)``.
    """
    rank = np.ndim(q)
    q, k, v = (np.asarray(x)[(None,) * (4 - rank)] for x in (q, k, v))
    batch, num_heads, q_len, head_dim = q.shape
    group = num_heads // k.shape[1] if k.shape[1] else 1
    kv_len = k.shape[2]
    store = store or compute

    lengths = np.broadcast_to(kv_len if kv_lengths is None else kv_lengths, batch)
    starts = np.broadcast_to(0 if kv_starts is None else kv_starts, batch)
    ends = np.broadcast_to(q_len if q_lengths is None else q_lengths, batch)
    offsets = np.broadcast_to(lengths - ends if query_offset is None else query_offset, batch)
    left, right = (None, None) if window is None else window
    if mask is not None:
        mask = np.broadcast_to(mask, (batch, num_heads, q_len, kv_len))
    if alibi_slopes is not None:
        alibi_slopes = np.broadcast_to(alibi_slopes, (batch, num_heads)).astype(compute)
    if scale is None:
        scale = 1 / np.sqrt(max(head_dim, 1))

    out = np.zeros((batch, num_heads, q_len, v.shape[3]), store)
    lse = np.full((batch, num_heads, q_len), -np.inf, compute)
    j, dims = np.arange(kv_len), order(head_dim)
    for b, h in np.ndindex(batch, num_heads):
        queries, all_keys, all_values = (x.astype(compute) for x in (q[b, h], k[b, h // group], v[b, h // group]))
        for i in range(ends[b]):
            p = i + int(offsets[b])
            visible = (starts[b] <= j) & (j < lengths[b])
            if causal:
                visible &= j <= p
            if left is not None:
                visible &= j >= p - left
            if right is not None:
                visible &= j <= p + right
            if mask is not None:
                visible &= mask[b, h, i] if mask.dtype == bool else mask[b, h, i] != -np.inf
            keys, values = all_keys[visible], all_values[visible]
            with np.errstate(all="ignore"):
                s = keys[:, dims] @ queries[i][dims] if additive is None else np.tanh(keys + queries[i]) @ additive[h].astype(compute)
                s = compute(scale) * s
                if softcap is not None:
                    s = compute(softcap) * np.tanh(s / compute(softcap))
                if score_function is not None:
                    s = score_function(s, b, h, i, j[visible]).astype(compute)
                if mask is not None and mask.dtype != bool:
                    s = s + mask[b, h, i][visible].astype(compute)
                if alibi_slopes is not None:
                    s = s - alibi_slopes[b, h] * np.abs(p - j[visible]).astype(compute)
                if activation != "softmax":
                    n = compute(lengths[b] - starts[b])
                    shift = -np.log(n) if activation_bias is None else np.broadcast_to(activation_bias, batch)[b].astype(compute)
                    weights = {
                        "sigmoid": lambda s, n=n, shift=shift: 1 / (1 + np.exp(-(s + shift))),
                        "relu": lambda s, n=n: np.maximum(s, 0) / n,
                        "polynomial": lambda s, n=n: s**power / np.sqrt(n),
                    }[activation](s)
                    lse[b, h, i] = np.abs(s).max(initial=0)
                    terms = order(len(s))
                    out[b, h, i] = (weights.astype(store).astype(compute)[terms] @ values[terms]).astype(store)
                    continue
                logits = s if sinks is None or sinks[h] == -np.inf else np.append(s, compute(sinks[h]))
                if len(logits) == 0:
                    continue
                top = logits.max()
                weights = np.exp(logits - top)
                total = weights[order(len(weights))].sum()
                lse[b, h, i] = top + np.log(total)
                weights = weights[: len(s)].astype(store).astype(compute)
                terms = order(len(s))
                out[b, h, i] = (weights[terms] @ values[terms] / total).astype(store)
    return out[(0,) * (4 - rank)], lse[(0,) * (4 - rank)]


def _digest(args, options):
    state = hashlib.blake2b()
    for name, value in (*enumerate(args), *sorted(options.items())):
        array = np.asarray(value)
        state.update(f"{name} {array.dtype} {array.shape} ".encode())
        state.update(repr(value).encode() if array.dtype == object else array.tobytes())
    return state.digest()


class _Memo(dict):
    """The same case is asked for on every engine; the oracle is slow."""

    def __call__(self, args, options, compute, store):
        key = _digest(args, options), compute, store
        if key not in self:
            self[key] = attention(*args, **options, compute=compute, store=store)
        return self[key]


_memo = _Memo()


def ulp(dtype):
    """The relative spacing of a dtype, bfloat16 included."""
    return 2.0**-7 if np.dtype(dtype).name == "bfloat16" else float(np.finfo(dtype).eps)


def _largest(array):
    finite = np.abs(array[np.isfinite(array)])
    return float(finite.max()) if finite.size else 0.0


def _distance(actual, expected):
    both = np.isfinite(actual) & np.isfinite(expected)
    return _largest(actual[both].astype(np.float64) - expected[both])


def assert_close(actual, expected, plain, floor, name="out", others=()):
    """`actual` is NaN and inf where `expected` is, and elsewhere about as close to it as `plain` or, if that is too close, the `others`."""
    assert actual.shape == expected.shape
    actual = actual.astype(np.float64)
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected), f"{name}: NaN in the wrong places")
    infinite = np.isinf(expected)
    np.testing.assert_array_equal(actual[infinite], expected[infinite], f"{name}: inf in the wrong places")
    error = _distance(actual, expected)
    allowed = 2 * _distance(plain.astype(np.float64), expected) + floor
    if error > allowed:
        allowed = max([allowed, *(2 * _distance(other.astype(np.float64), expected) + floor for other in others)])
    assert np.isfinite(actual[np.isfinite(expected)]).all(), f"{name}: not finite where it should be"
    assert error <= allowed, f"{name}: error {error:.3g} exceeds {allowed:.3g}"


def assert_matches(q, k, v, **options):
    """``fastattn.attention(q, k, v, **options)`` is right: output, lse, dtype and shape. Returns ``(out, lse)``.

    For bfloat16, the same numbers in float32 at "medium" precision, which promises no less, are as right.
    """
    out, lse = fastattn.attention(q, k, v, return_lse=True, **options)
    check(out, lse, q, k, v, **options)
    if out.dtype.name == "bfloat16":
        widened = (x.astype(np.float32) for x in (q, k, v))
        medium = fastattn.attention(*widened, precision="medium", **options)
        check(medium.astype(out.dtype), None, q, k, v, **options)
    return out, lse


def check(out, lse, q, k, v, **options):
    """Judge ``(out, lse)`` as the attention of these arguments; the lse may be None."""
    arrays = q, k, v = tuple(np.asarray(x) for x in (q, k, v))
    dtype = q.dtype.newbyteorder("=")
    single = np.float64 if dtype == np.float64 else np.float32
    expected, expected_lse = _memo(arrays, options, np.float64, np.float64)
    plain, plain_lse = _memo(arrays, options, single, dtype.type)

    def in_other_orders(which):
        for seed in range(4):
            order = np.random.default_rng(seed).permutation
            yield attention(*arrays, **options, compute=single, store=dtype.type, order=order)[which]

    assert out.dtype == dtype
    logit_error = ulp(single) * _largest(expected_lse)
    assert_close(out, expected, plain, (ulp(dtype) + logit_error) * _largest(expected), others=in_other_orders(0))
    zero = (expected == 0).all(axis=-1)
    assert not out[zero].any(), "out: rows that see nothing are exactly 0"
    if lse is None:
        return
    assert lse.dtype == np.float32
    lse_floor = 2 * ulp(np.float32) * max(1.0, _largest(expected_lse))
    undefined = np.isnan(expected_lse)  # the row holds NaN or inf: its lse is not finite, and that is all we promise
    assert not np.isfinite(lse[undefined]).any()
    others = (np.where(undefined, 0, other) for other in in_other_orders(1))
    assert_close(np.where(undefined, 0, lse), np.where(undefined, 0, expected_lse), plain_lse, lse_floor, "lse", others)
