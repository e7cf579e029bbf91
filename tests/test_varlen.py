"""Packed sequences: each is what it is alone, whatever lies beside it."""

import numpy as np
import pytest
from hypothesis import given, strategies as st
from inputs import DTYPES, random_qkv
from oracle import check

import fastattn

# Lengths of queries and keys: across panels and splits, few rows, none, no keys, and one sequence far longer than the rest.
SEQUENCES = {
    "self": ([5, 0, 130, 1, 64, 12, 65], None),
    "cross": ([3, 200, 0, 17, 4], [9, 0, 40, 100, 2500]),
    "long": ([1, 2, 700, 3], [1, 2500, 700, 60]),
}


def table(lengths, dtype=np.int32):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(dtype)


def packed(q_lengths, k_lengths, heads=4, kv_heads=2, head_dim=16, v_head_dim=None, dtype="float32", seed=0):
    sizes = dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim, v_head_dim=v_head_dim, dtype=dtype, seed=seed)
    q, k, v = random_qkv(q_len=sum(q_lengths), kv_len=sum(k_lengths), **sizes)
    return tuple(np.ascontiguousarray(x[0].swapaxes(0, 1)) for x in (q, k, v))


def alone(q, k, v, cu_q, cu_k, b, **options):
    """Sequence b as :func:`attention` computes it: ``(out, lse)`` in the packed layout."""
    arrays = q[cu_q[b] : cu_q[b + 1]], k[cu_k[b] : cu_k[b + 1]], v[cu_k[b] : cu_k[b + 1]]
    out, lse = fastattn.attention(*(x.swapaxes(0, 1)[None].copy() for x in arrays), return_lse=True, **options)
    return out[0].swapaxes(0, 1), lse[0]


@pytest.mark.parametrize("sequences", SEQUENCES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_sequence_has_the_bits_it_has_alone(engine, sequences, causal, dtype):
    q_lengths, k_lengths = SEQUENCES[sequences]
    k_lengths = k_lengths or q_lengths
    q, k, v = packed(q_lengths, k_lengths, dtype=dtype)
    cu_q, cu_k = table(q_lengths), table(k_lengths, np.int64)
    slopes = np.linspace(0, 0.2, 4 * len(q_lengths), dtype=np.float32).reshape(-1, 4)
    options = dict(causal=causal, window=(300, None), sinks=np.float32([0, 1, -1, 0.5]))
    out, lse = fastattn.attention_varlen(q, k, v, cu_q, cu_k, alibi_slopes=slopes, return_lse=True, **options)
    assert out.shape == q.shape and lse.shape == (4, len(q))
    for b in range(len(q_lengths)):
        own, own_lse = alone(q, k, v, cu_q, cu_k, b, alibi_slopes=slopes[b], **options)
        np.testing.assert_array_equal(out[cu_q[b] : cu_q[b + 1]], own)
        np.testing.assert_array_equal(lse[:, cu_q[b] : cu_q[b + 1]], own_lse)


@given(st.data())
def test_any_sequences_are_right(engine, data):
    count = data.draw(st.integers(0, 5))
    lengths = st.lists(st.integers(0, 40), min_size=count, max_size=count)
    q_lengths, k_lengths = data.draw(lengths), data.draw(lengths)
    q, k, v = packed(q_lengths, k_lengths, head_dim=5, v_head_dim=3)
    cu_q, cu_k = table(q_lengths), table(k_lengths)
    offset = data.draw(st.none() | st.integers(-20, 50) | st.lists(st.integers(-20, 50), min_size=count, max_size=count))
    options = dict(
        causal=data.draw(st.booleans()),
        window=data.draw(st.none() | st.tuples(st.integers(0, 20), st.integers(0, 20))),
        softcap=data.draw(st.none() | st.just(3.0)),
    )
    target = np.full((len(q), 4, 3), 7, np.float32)[:, ::-1] if data.draw(st.booleans()) else None
    out, lse = fastattn.attention_varlen(q, k, v, cu_q, cu_k, query_offset=offset, return_lse=True, out=target, **options)
    assert target is None or out is target
    for b in range(count):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        own = (x.swapaxes(0, 1) for x in (q[rows], k[keys], v[keys]))
        own_offset = None if offset is None else int(np.broadcast_to(offset, count)[b])
        check(out[rows].swapaxes(0, 1), lse[:, rows], *own, query_offset=own_offset, **options)


def test_threads_and_order_change_no_bit(engine):
    q_lengths = [3, 500, 1, 80, 7, 16]
    q, k, v = packed(q_lengths, q_lengths, dtype="bfloat16")
    cu = table(q_lengths)
    with fastattn.threads(1):
        expected = fastattn.attention_varlen(q, k, v, cu, cu, causal=True)
    for count in (2, 5):
        with fastattn.threads(count):
            np.testing.assert_array_equal(fastattn.attention_varlen(q, k, v, cu, cu, causal=True), expected)
    order = [5, 0, 3, 1, 4, 2]
    rows = np.concatenate([np.arange(cu[b], cu[b + 1]) for b in order])
    moved = table([q_lengths[b] for b in order])
    np.testing.assert_array_equal(
        fastattn.attention_varlen(q[rows], k[rows], v[rows], moved, moved, causal=True), expected[rows]
    )


def test_projections_of_one_tensor_are_read_where_they_lie(engine):
    """Strides as those of (tokens, 3, heads, head_dim), and values that are not wanted beside them."""
    qkv = np.random.default_rng(0).standard_normal((50, 3, 4, 16)).astype(np.float32)
    cu = table([20, 0, 30])
    out = fastattn.attention_varlen(qkv[:, 0], qkv[:, 1], qkv[:, 2], cu, cu)
    copies = (np.ascontiguousarray(qkv[:, n]) for n in range(3))
    np.testing.assert_array_equal(out, fastattn.attention_varlen(*copies, cu, cu))


def test_neighbours_are_not_looked_at(engine):
    q, k, v = packed([4, 30, 2], [50, 20, 33])
    cu_q, cu_k = table([4, 30, 2]), table([50, 20, 33])
    expected = fastattn.attention_varlen(q, k, v, cu_q, cu_k)
    k[:50] = v[:50] = np.nan
    k[70:] = v[70:] = np.inf
    out = fastattn.attention_varlen(q, k, v, cu_q, cu_k)
    np.testing.assert_array_equal(out[4:34], expected[4:34])


BAD_TABLES = [
    ([1, 4, 9], ValueError, "must begin with 0; got 1"),
    ([-1, 4, 9], ValueError, "must begin with 0; got -1"),
    ([0, 5, 4, 9], ValueError, "must not decrease; got 5, 4 at 1"),
    ([0, -3, 9], ValueError, "must not decrease; got 0, -3 at 0"),
    ([0, 4, 10], ValueError, "must end at the number of rows of ., 9; got 10"),
    ([0, 4, 8], ValueError, "must end at the number of rows of ., 9; got 8"),
    ([0, 2**40, 9], ValueError, "must not decrease"),
    ([0, np.iinfo(np.int64).max], ValueError, "must end at"),
    (np.array([0, 2**64 - 1], np.uint64), ValueError, "must end at"),
    ([], (TypeError, ValueError), "must"),
    (9, ValueError, "must have shape"),
    ([[0, 9]], ValueError, "must have shape"),
    ([0.0, 9.0], TypeError, "must hold ints"),
    (None, TypeError, "must"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD_TABLES)
@pytest.mark.parametrize("which", ["cu_seqlens_q", "cu_seqlens_k"])
def test_bad_tables(backend, bad, error, message, which):
    q, k, v = packed([9], [9])
    tables = {"cu_seqlens_q": [0, 9], "cu_seqlens_k": [0, 9], which: bad}
    out = np.full_like(q, 7)
    with pytest.raises(error, match=f"{which} {message}" if message != "must" else which):
        fastattn.attention_varlen(q, k, v, **tables, out=out)
    assert (out == 7).all()


def test_bad_arguments(backend):
    q, k, v = packed([4, 5], [9, 0])
    cu_q, cu_k = [0, 4, 9], [0, 9, 9]
    with pytest.raises(ValueError, match="cu_seqlens_k must have as many entries as cu_seqlens_q, 3; got 2"):
        fastattn.attention_varlen(q, k, v, cu_q, [0, 9])
    with pytest.raises(ValueError, match="q must have shape"):
        fastattn.attention_varlen(q[None], k[None], v[None], cu_q, cu_k)
    with pytest.raises(ValueError, match="query_offset must be an int or have shape"):
        fastattn.attention_varlen(q, k, v, cu_q, cu_k, query_offset=[1, 2, 3])
    with pytest.raises(ValueError, match="q_lengths must lie between 0 and the length of its sequence"):
        fastattn.attention_varlen(q, k, v, cu_q, cu_k, q_lengths=[5, 5])
    with pytest.raises(ValueError, match="out must have shape"):
        fastattn.attention_varlen(q, k, v, cu_q, cu_k, out=np.empty((4, 9, 16), np.float32))
    for name in ("mask", "kv_lengths"):
        with pytest.raises(TypeError, match=name):
            fastattn.attention_varlen(q, k, v, cu_q, cu_k, **{name: None})
