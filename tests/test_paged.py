"""paged_attention: the bits of the same keys side by side, whatever the pages; and tables that do not fit."""

import ctypes
import mmap
import sys

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from inputs import DTYPES, dtype_of
from oracle import check

import fastattn

# Queries and keys of each sequence: decoding, drafts, prefill and chunks, parts of the keys, sequences without either.
SEQUENCES = {
    "decoding": ([1] * 6, [1, 16, 17, 300, 64, 5]),
    "mixed": ([200, 1, 0, 9, 30], [200, 260, 40, 9, 0]),
    "drafts": ([20, 12, 33], [70, 500, 33]),
    "parts": ([1, 4], [2500, 3000]),
}


class Pages:
    """Keys and values of some sequences in pages that are handed out at random; what is not in use is NaN."""

    def __init__(self, lengths, page_size, heads=2, head_dim=16, v_head_dim=None, dtype="float32", heads_first=True, seed=0):
        rng = np.random.default_rng(seed)
        dims = head_dim, head_dim if v_head_dim is None else v_head_dim
        self.lengths, self.page_size = lengths, page_size
        counts = [-(-n // page_size) for n in lengths]
        free = rng.permutation(sum(counts) + 3)
        self.table = np.full((len(lengths), max(counts, default=0) + 1), -1, np.int32)
        shape = (free.size, heads, page_size) if heads_first else (free.size, page_size, heads)
        self.k, self.v = (np.full((*shape, d), np.nan, dtype_of(dtype)) for d in dims)
        if heads_first:
            self.k, self.v = self.k.swapaxes(1, 2), self.v.swapaxes(1, 2)
        self.sequences = []
        for b, (n, count) in enumerate(zip(lengths, counts)):
            pages, free = free[:count], free[count:]
            self.table[b, :count] = pages
            rows = [rng.standard_normal((n, heads, d)).astype(dtype_of(dtype)) for d in dims]
            for array, new in zip((self.k, self.v), rows):
                for j in range(n):
                    array[pages[j // page_size], j % page_size] = new[j]
            self.sequences.append(tuple(rows))

    def attend(self, q, **options):
        return fastattn.paged_attention(q, self.k, self.v, self.table, self.lengths, **options)


def cumulated(counts, dtype=np.int64):
    return np.concatenate([[0], np.cumsum(counts)]).astype(dtype)


def queries(count, heads=4, head_dim=16, dtype="float32"):
    return np.random.default_rng(9).standard_normal((count, heads, head_dim)).astype(dtype_of(dtype))


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("page_size", [1, 3, 4, 16, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_of_several_vectors_behind_a_window(engine, page_size, dtype, invariant):
    # What is skipped is within a run of keys and within a page, or ends with either; the last keys are no whole page.
    q_lengths, lengths = [1, 2, 9, 13, 1, 9], [100, 64, 100, 77, 2100, 2100]
    pages = Pages(lengths, page_size, dtype=dtype, head_dim=40, v_head_dim=69)
    q, cu = queries(sum(q_lengths), head_dim=40, dtype=dtype), cumulated(q_lengths)
    k, v = (np.concatenate(x) for x in zip(*pages.sequences))
    for window in ((0, None), (5, 0), (40, 0)):
        options = dict(window=window, invariant=invariant)
        found = pages.attend(q, cu_seqlens_q=cu, **options)
        np.testing.assert_array_equal(found, fastattn.attention_varlen(q, k, v, cu, cumulated(lengths), **options))


@pytest.mark.parametrize("sequences", SEQUENCES)
@pytest.mark.parametrize("page_size", [1, 7, 16, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_those_of_keys_side_by_side(engine, sequences, page_size, dtype):
    q_lengths, lengths = SEQUENCES[sequences]
    pages = Pages(lengths, page_size, dtype=dtype, v_head_dim=24, heads_first=page_size != 7)
    q, cu = queries(sum(q_lengths), dtype=dtype), cumulated(q_lengths)
    k, v = (np.concatenate(x) for x in zip(*pages.sequences))
    options = dict(window=(220, None), softcap=3.0, sinks=np.float32([0, 1, -1, 0.5]), return_lse=True)
    for causal in (False, True):
        out, lse = pages.attend(q, cu_seqlens_q=cu, causal=causal, **options)
        expected, expected_lse = fastattn.attention_varlen(q, k, v, cu, cumulated(lengths), causal=causal, **options)
        np.testing.assert_array_equal(out, expected)
        np.testing.assert_array_equal(lse, expected_lse)


@pytest.mark.parametrize("heads", [2, 5, 9])
@pytest.mark.parametrize("page_size", [1, 7, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_of_a_page_that_are_read_together(engine, page_size, dtype, heads):
    """However many threads share them out."""
    q_lengths, lengths = SEQUENCES["parts"]
    pages = Pages(lengths, page_size, heads, dtype=dtype, heads_first=page_size != 7)
    q, cu = queries(sum(q_lengths), heads * (1 + heads % 2), dtype=dtype), cumulated(q_lengths)
    k, v = (np.concatenate(x) for x in zip(*pages.sequences))
    expected = fastattn.attention_varlen(q, k, v, cu, cumulated(lengths), causal=True)
    for threads in (1, 2, 5):
        with fastattn.threads(threads):
            np.testing.assert_array_equal(pages.attend(q, cu_seqlens_q=cu, causal=True), expected)


@given(st.data())
def test_any_pages_are_right(engine, data):
    lengths = data.draw(st.lists(st.integers(0, 40), max_size=4))
    q_lengths = [data.draw(st.integers(0, 20)) for _ in lengths]
    pages = Pages(lengths, data.draw(st.integers(1, 12)), head_dim=5, v_head_dim=3, heads_first=data.draw(st.booleans()))
    q, cu = queries(sum(q_lengths), head_dim=5), cumulated(q_lengths, np.int32)
    starts = [data.draw(st.integers(0, n)) for n in lengths]
    for b, start in enumerate(starts):  # pages that lie wholly before are not looked at
        pages.table[b, : start // pages.page_size] = -1 if start < lengths[b] else -7
    target = np.full((len(q), 4, 3), 7, np.float32)[:, ::-1] if data.draw(st.booleans()) else None
    options = dict(causal=data.draw(st.booleans()), window=data.draw(st.none() | st.tuples(st.integers(0, 20), st.integers(0, 20))))
    out, lse = pages.attend(q, cu_seqlens_q=cu, kv_starts=starts, return_lse=True, out=target, **options)
    assert target is None or out is target
    for b, (k, v) in enumerate(pages.sequences):
        rows = slice(cu[b], cu[b + 1])
        own = (x.swapaxes(0, 1) for x in (q[rows], k, v))
        check(out[rows].swapaxes(0, 1), lse[:, rows], *own, kv_starts=starts[b], **options)


SLOPES = np.float32([0.5, 0.25, 0.1, 0.02])


def placed(s, b, h, i, j):
    """Scores that depend on everything a score function is told; of NumPy's arrays, and simple enough to be compiled."""
    return s - SLOPES[h] * abs(i - j) + 0.125 * (b + 1) * (j % 3)


WEIGHTS = {
    "sigmoid": dict(activation="sigmoid"),
    "sigmoid, biases": dict(activation="sigmoid", activation_bias=np.linspace(-4, 1, 6, dtype=np.float32)),
    "relu": dict(activation="relu", softcap=2.0),
    "square": dict(activation="polynomial", power=2, alibi_slopes=SLOPES),
    "plain function": dict(score_function=placed),
    "compiled function": dict(score_function="compiled"),
    "function and sigmoid": dict(score_function=placed, activation="sigmoid"),
    "function, sinks and window": dict(score_function=placed, sinks=SLOPES, window=(200, None)),
}


@pytest.mark.parametrize("how", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("sequences", SEQUENCES)
@pytest.mark.parametrize(("dtype", "page_size"), [("float32", 16), ("bfloat16", 7)], ids=str)
def test_other_weights_and_scores(engine, how, sequences, dtype, page_size):
    q_lengths, lengths = SEQUENCES[sequences]
    how, single = dict(how), [dict(how) for _ in lengths]  # for all, and for each of them alone
    if how.get("score_function") == "compiled":
        pytest.importorskip("numba", reason="numba is not installed")
        how["score_function"] = fastattn.score_function(placed)
    if "activation_bias" in how:
        how["activation_bias"] = how["activation_bias"][: len(lengths)]
    for b, own in enumerate(single):
        if "activation_bias" in how:
            own["activation_bias"] = how["activation_bias"][b]
        if "score_function" in how:
            own["score_function"] = lambda s, _, h, i, j, b=b: placed(s, b, h, i, j)
    pages = Pages(lengths, page_size, dtype=dtype, v_head_dim=24)
    q, cu = queries(sum(q_lengths), dtype=dtype), cumulated(q_lengths)
    k, v = (np.concatenate(x) for x in zip(*pages.sequences))

    def judge(out, starts, **options):
        for b, (own, start) in enumerate(zip(pages.sequences, starts)):
            rows = slice(cu[b], cu[b + 1])
            arrays = (x.swapaxes(0, 1) for x in (q[rows], *own))
            check(out[rows].swapaxes(0, 1), None, *arrays, kv_starts=start, **options, **single[b])

    out = pages.attend(q, cu_seqlens_q=cu, causal=True, **how)
    np.testing.assert_array_equal(out, fastattn.attention_varlen(q, k, v, cu, cumulated(lengths), causal=True, **how))
    judge(out, [0] * len(lengths), causal=True)
    starts = [n // 5 for n in lengths]
    judge(pages.attend(q, cu_seqlens_q=cu, kv_starts=starts, **how), starts)


def test_an_exception_of_a_score_function_leaves_out_as_it_was(engine):
    pages = Pages([40, 300], 16)
    q, out, calls = queries(2), np.full((2, 4, 16), 7, np.float32), []

    def fails(s, b, h, i, j):
        calls.append(b)
        if len(calls) > 3:
            raise KeyError("of mine")
        return s

    with pytest.raises(KeyError, match="of mine"):
        pages.attend(q, score_function=fails, out=out)
    assert (out == 7).all()
    with pytest.raises(ValueError, match="return_lse"):
        pages.attend(q, activation="sigmoid", return_lse=True, out=out)
    with pytest.raises(ValueError, match="activation_bias"):
        pages.attend(q, activation="sigmoid", activation_bias=[0, 1, 2], out=out)
    assert (out == 7).all()


def test_equal_shares_and_shared_pages(engine):
    pages = Pages([30, 30, 30], 8)
    pages.table[1] = pages.table[0]
    q = queries(6)
    out = pages.attend(q, causal=True)
    np.testing.assert_array_equal(out, pages.attend(q, cu_seqlens_q=[0, 2, 4, 6], causal=True))
    np.testing.assert_array_equal(pages.attend(np.concatenate([q[:2], q[:2], q[:2]]))[:2], pages.attend(q)[:2])
    again = pages.attend(np.concatenate([q[:2]] * 3), causal=True)
    np.testing.assert_array_equal(again[:2], again[2:4])


def test_what_is_not_a_number_reaches_who_sees_it(engine):
    pages = Pages([70], 16)
    q = queries(70)
    expected = pages.attend(q, causal=True)
    pages.v[pages.table[0, 2], 5, 1, 3] = np.inf  # key 37
    out = pages.attend(q, causal=True)
    np.testing.assert_array_equal(out[:37], expected[:37])
    assert np.isinf(out[37:, 2:, 3]).all() and np.isfinite(out[:, :2]).all()


def test_threads_change_no_bit(engine):
    pages = Pages([2500, 300, 20], 16, dtype="bfloat16")
    q, cu = queries(22, dtype="bfloat16"), cumulated([1, 20, 1])
    with fastattn.threads(1):
        expected = pages.attend(q, cu_seqlens_q=cu, causal=True)
    for n in (2, 5):
        with fastattn.threads(n):
            np.testing.assert_array_equal(pages.attend(q, cu_seqlens_q=cu, causal=True), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="uses mprotect")
@pytest.mark.parametrize("rows", [1, 40])
def test_pages_that_are_not_named_are_not_touched(engine, rows):
    """Every page on memory of its own, and those that no sequence has cannot be read."""
    size, heads, dim = 16, 2, 16
    step = -(-size * heads * dim * 4 // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, 9 * step)
    whole = np.frombuffer(memory, np.float32).reshape(9, -1)[:, : size * heads * dim].reshape(9, size, heads, dim)
    whole[...] = np.random.default_rng(0).standard_normal(whole.shape)
    table, lengths = np.array([[7, 1, 3], [5, -1, -1]]), [48, 16]
    q = queries(2 * rows)
    expected = fastattn.paged_attention(q, whole, whole, table, lengths)
    libc, start = ctypes.CDLL(None), whole.ctypes.data
    try:
        for n in (0, 2, 4, 6, 8):
            assert libc.mprotect(ctypes.c_void_p(start + n * step), ctypes.c_size_t(step), 0) == 0
        np.testing.assert_array_equal(fastattn.paged_attention(q, whole, whole, table, lengths), expected)
    finally:
        libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(9 * step), 3)


def test_a_pool_larger_than_memory_is_not_copied(backend, huge_zeros):
    pool = huge_zeros((1 << 16, 16, 2, 1024))  # 8 GB, as far back as int32 cannot count
    pool[65535, 0, :, 0] = 100
    q = np.ones((1, 2, 1024), np.float32)
    out = fastattn.paged_attention(q, pool, pool, [[65535]], [2])
    np.testing.assert_allclose(out[0, :, 0], 100 / (1 + np.exp(-100 / 32)), rtol=1e-5)


BAD = [
    (dict(block_table=[[0, -1], [1, 2]]), ValueError, "block_table must name pages of k_pages, 0 to 4, for all 20 keys of entry 0"),
    (dict(block_table=[[0, 5], [1, 2]]), ValueError, "block_table must name pages"),
    (dict(block_table=[[0, 2**31], [1, 2]]), ValueError, "block_table must name pages"),
    (dict(block_table=[[0, 2**32], [1, 2]]), ValueError, "block_table must name pages"),
    (dict(block_table=np.array([[0, 2**64 - 1], [1, 2]], np.uint64)), ValueError, "block_table must name pages"),
    (dict(block_table=[[0.0, 1.0], [1, 2]]), TypeError, "block_table must hold ints"),
    (dict(block_table=[0, 1]), ValueError, "block_table must have shape"),
    (dict(block_table=None), TypeError, "block_table"),
    (dict(kv_lengths=[20, 33]), ValueError, "kv_lengths must lie between 0 and 32"),
    (dict(kv_lengths=[-1, 3]), ValueError, "kv_lengths must lie between"),
    (dict(kv_lengths=[1, 2, 3]), ValueError, "kv_lengths must be an int or have shape"),
    (dict(kv_lengths=None), TypeError, "kv_lengths must be an int"),
    (dict(kv_starts=[21, 0]), ValueError, "kv_starts must be at most kv_lengths"),
    (dict(cu_seqlens_q=[0, 4]), ValueError, "cu_seqlens_q must have shape"),
    (dict(cu_seqlens_q=[0, 5, 4]), ValueError, "cu_seqlens_q must not decrease"),
    (dict(cu_seqlens_q=[0, 2, 5]), ValueError, "cu_seqlens_q must end at"),
    (dict(q=np.zeros((3, 4, 16), np.float32)), ValueError, "cu_seqlens_q must be given"),
    (dict(q=np.zeros((1, 4, 4, 16), np.float32)), ValueError, "q must have shape"),
    (dict(q=np.zeros((4, 4, 8), np.float32)), ValueError, "k_pages must have the head size of q"),
    (dict(q=np.zeros((4, 3, 16), np.float32)), ValueError, "k_pages must have a number of heads"),
    (dict(q=np.zeros((4, 4, 16), np.float16)), TypeError, "q must have the dtype of k_pages and v_pages"),
    (dict(k_pages=np.zeros((5, 0, 2, 16), np.float32)), ValueError, "k_pages must have shape"),
    (dict(k_pages=np.zeros((5, 16, 16), np.float32)), ValueError, "k_pages must have shape"),
    (dict(v_pages=np.zeros((4, 16, 2, 16), np.float32)), ValueError, "v_pages must have the shape of k_pages"),
    (dict(v_pages=np.zeros((5, 16, 2, 16), np.float16)), TypeError, "v_pages must have the dtype of k_pages"),
    (dict(alibi_slopes=np.zeros((3, 4), np.float32)), ValueError, "alibi_slopes must have shape"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD)
def test_bad_arguments(backend, bad, error, message):
    pages = np.zeros((5, 16, 2, 16), np.float32)
    good = dict(q=np.zeros((4, 4, 16), np.float32), k_pages=pages, v_pages=pages, block_table=[[0, 1], [1, 2]], kv_lengths=[20, 32])
    fastattn.paged_attention(**good)
    out = np.full((4, 4, 16), 7, np.float32)
    with pytest.raises(error, match=message):
        fastattn.paged_attention(**(good | bad), out=out)
    assert (out == 7).all()


def test_no_pages_and_no_sequences(engine):
    pool = np.zeros((0, 16, 2, 16), np.float32)
    out, lse = fastattn.paged_attention(queries(3), pool, pool, np.zeros((3, 0), np.int32), 0, return_lse=True)
    assert not out.any() and np.isneginf(lse).all()
    none = queries(0)
    assert fastattn.paged_attention(none, pool, pool, np.zeros((0, 4), np.int32), []).shape == none.shape
