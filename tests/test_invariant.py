"""invariant=True: a row's bits, however its keys are given and whatever is computed beside it."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from inputs import DTYPES, dtype_of, random_qkv
from oracle import check

import fastattn

# Keys on both sides of what engines sum up at a time: runs of 16, blocks of 64, tiles of 256, parts of 1024, two of them and more.
LENGTHS = st.sampled_from([1, 15, 47, 64, 65, 130, 257, 700, 1024, 1025, 1500, 2049, 2300])
HEADS = st.sampled_from([(1, 1), (4, 2), (6, 1)])
RULES = st.fixed_dictionaries(
    {},
    optional={
        "window": st.sampled_from([(0, None), (17, 0), (100, None), (1100, 0)]),
        "softcap": st.just(5.0),
        "scale": st.sampled_from([0.0, -0.3, 2.5, 40.0]),
        "alibi_slopes": st.just(True),
        "sinks": st.just(True),
    },
)


def rules_of(options, heads):
    """The keywords of a call for so many heads."""
    options = dict(options)
    for name in ("alibi_slopes", "sinks"):
        if options.pop(name, False):
            options[name] = np.linspace(0.01, 0.5, heads, dtype=np.float32)
    return {"causal": True, "invariant": True, **options}


def bits(array):
    return np.ascontiguousarray(array).view(np.uint8)


def check_same(name, found, wanted):
    """Out and lse, bit for bit; where they are not, which rows."""
    for what, a, b in zip(("out", "lse"), found, wanted):
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        assert np.array_equal(bits(a), bits(b)), f"{name}: {what} differs in rows {np.unique(np.argwhere(~same)[:, 2])[:8]}"


@st.composite
def cuts(draw, length):
    """A sequence cut into chunks: from 0 to `length`."""
    inner = draw(st.lists(st.integers(1, length), max_size=4))
    return sorted({0, length, *inner})


@given(data=st.data(), heads=HEADS, length=LENGTHS, dim=st.sampled_from([16, 33, 64]), dtype=st.sampled_from(DTYPES), options=RULES)
@settings(max_examples=15)
def test_chunks_tokens_and_pages(engine, data, heads, length, dim, dtype, options):
    num_heads, kv_heads = heads
    q, k, v = random_qkv(1, num_heads, length, length, dim, v_head_dim=dim + 5, kv_heads=kv_heads, dtype=dtype)
    rules = rules_of(options, num_heads)
    wanted = fastattn.attention(q, k, v, return_lse=True, **rules)

    ends = data.draw(cuts(length), label="chunks")
    for i0, i1 in zip(ends, ends[1:]):
        found = fastattn.attention(q[:, :, i0:i1], k[:, :, :i1], v[:, :, :i1], return_lse=True, **rules)
        check_same(f"rows {i0} to {i1}", found, [x[:, :, i0:i1] for x in wanted])
    for i in data.draw(st.lists(st.integers(0, length - 1), min_size=2, max_size=4), label="tokens"):
        found = fastattn.attention(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], return_lse=True, **rules)
        check_same(f"row {i}", found, [x[:, :, i : i + 1] for x in wanted])

    page_size = data.draw(st.sampled_from([1, 3, 16, 48, 300]), label="page size")
    pages = -(-length // page_size)
    table = np.random.default_rng(1).permutation(pages + 2)[:pages]
    k_pages, v_pages = (np.zeros((pages + 2, page_size, kv_heads, x.shape[3]), x.dtype) for x in (k, v))
    for paged, rows in ((k_pages, k), (v_pages, v)):
        for n, page in enumerate(table):
            some = rows[0, :, n * page_size : (n + 1) * page_size].swapaxes(0, 1)
            paged[page, : len(some)] = some
    i0 = data.draw(st.integers(0, length - 1), label="first row")
    chunks = np.concatenate([q[0, :, i0:], q[0, :, :1], q[0, :, -1:]], axis=1).swapaxes(0, 1)  # a chunk, a beginning, a token
    out, lse = fastattn.paged_attention(
        chunks, k_pages, v_pages, np.tile(table, (3, 1)), [length, 1, length],
        cu_seqlens_q=[0, length - i0, length - i0 + 1, length - i0 + 2], return_lse=True, **rules,
    )  # fmt: skip
    found = [out.swapaxes(0, 1)[None], lse[None]]
    check_same("a chunk in pages", [x[:, :, : length - i0] for x in found], [x[:, :, i0:] for x in wanted])
    check_same("a beginning in pages", [x[:, :, -2:-1] for x in found], [x[:, :, :1] for x in wanted])
    check_same("a token in pages", [x[:, :, -1:] for x in found], [x[:, :, -1:] for x in wanted])


@given(data=st.data(), kv_len=LENGTHS, dtype=st.sampled_from(DTYPES))
@settings(max_examples=15)
def test_dense_and_block_masks(engine, data, kv_len, dtype):
    size, q_len = data.draw(st.sampled_from([16, 20, 64, 100, 256])), data.draw(st.sampled_from([1, 3, 70]))
    q, k, v = random_qkv(1, 4, q_len, kv_len, 32, kv_heads=2, dtype=dtype)
    shape = (1, 1, -(-q_len // size), -(-kv_len // size))
    blocks = np.random.default_rng(data.draw(st.integers(0, 99))).random(shape) < data.draw(st.sampled_from([0.2, 0.6, 0.95]))
    dense = blocks.repeat(size, 2).repeat(size, 3)[:, :, :q_len, :kv_len]
    whole = fastattn.BlockMask.from_dense(dense, block_size=size)
    some = dense & (np.random.default_rng(3).random(dense.shape) < 0.9)
    partial = fastattn.BlockMask.from_dense(some, block_size=size)
    rules = {"invariant": True, "return_lse": True}
    if data.draw(st.booleans(), label="window"):
        rules |= {"window": (90, None), "causal": True}
    for mask, hides in ((whole, dense), (partial, some)):
        wanted = fastattn.attention(q, k, v, mask=hides, **rules)
        check_same("a block mask", fastattn.attention(q, k, v, mask=mask, **rules), wanted)
        last = fastattn.attention(q[:, :, -1:], k, v, mask=hides[:, :, -1:], **rules)
        check_same("its last row", last, [x[:, :, -1:] for x in wanted])


@pytest.mark.parametrize("dtype", DTYPES)
def test_company(engine, dtype):
    """Among many sequences, far larger scores, NaN and infinity beside it."""
    q, k, v = random_qkv(3, 4, 80, 300, 32, kv_heads=2, dtype=dtype)
    q[0] *= dtype_of(dtype).type(30)
    q[1, :, 10:20] *= dtype_of(dtype).type(1000)
    k[2, :, 200] = np.nan
    v[2, :, 250] = np.inf
    rules = {"invariant": True, "causal": True, "return_lse": True}
    wanted = fastattn.attention(q, k, v, **rules)
    for b, i in ((0, 79), (1, 9), (1, 15), (1, 25), (2, 0), (2, 79)):
        n = 300 - 79 + i
        found = fastattn.attention(q[b, :, i : i + 1], k[b, :, :n], v[b, :, :n], **rules)
        check_same(f"row {i} of entry {b}", [x[None] for x in found], [x[b : b + 1, :, i : i + 1] for x in wanted])


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_exact(engine, dtype):
    for q_len, kv_len in ((1, 2100), (40, 1100), (130, 90)):
        q, k, v = random_qkv(2, 4, q_len, kv_len, 40, kv_heads=2, dtype=dtype)
        check(*fastattn.attention(q, k, v, causal=True, invariant=True, return_lse=True), q, k, v, causal=True)


def test_any_number_of_threads_and_batch_entries(backend):
    q, k, v = random_qkv(3, 4, 7, 3000, 16, kv_heads=1)
    whole = fastattn.attention(q, k, v, invariant=True, return_lse=True)
    for n in (1, 3):
        with fastattn.threads(n):
            check_same(f"{n} threads", fastattn.attention(q[1:2], k[1:2], v[1:2], invariant=True, return_lse=True), [x[1:2] for x in whole])


def _additive(q, k, v, **rules):
    weights = np.random.default_rng(2).standard_normal((3, 16, 16), np.float32)
    return fastattn.additive_attention(q, k, v, weights[0], weights[1], weights[2, 0], **rules)


def _general(q, k, v, **rules):
    return fastattn.luong_attention(q, k, v, score="general", w=np.random.default_rng(2).standard_normal((16, 16), np.float32), **rules)


def _sigmoid(q, k, v, **rules):
    return fastattn.attention(q, k, v, activation="sigmoid", activation_bias=-3.0, **rules)


@pytest.mark.parametrize("function", [_additive, _general, _sigmoid])
def test_other_scores_and_activations(engine, function):
    q, k, v = random_qkv(1, 4, 30, 1200, 16, kv_heads=2)
    whole = function(q, k, v, causal=True, invariant=True)
    for i0, i1 in ((0, 1), (11, 12), (15, 20), (29, 30)):
        n = 1170 + i1
        some = function(q[:, :, i0:i1], k[:, :, :n], v[:, :, :n], causal=True, invariant=True)
        assert np.array_equal(bits(some), bits(whole[:, :, i0:i1]))


def test_is_a_flag(backend):
    q, k, v = random_qkv()
    with pytest.raises(TypeError, match="invariant must be True or False; got 1"):
        fastattn.attention(q, k, v, invariant=1)


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("dtype", ["int8", "int4", "bfloat16"])
def test_caches(engine, dtype, rotate):
    """Chunks and tokens, contiguous and in pages, as they are appended."""
    if rotate and dtype == "bfloat16":
        return
    length = 1100
    q, k, v = random_qkv(1, 4, length, length, 32, kv_heads=2)
    options = {"dtype": dtype} | ({"rotate": True} if rotate else {})
    whole = fastattn.KVCache(1, 2, length, 32, **options)
    whole.append(k, v)
    wanted = whole.attend(q, invariant=True)
    growing, pool = fastattn.KVCache(1, 2, length, 32, **options), fastattn.PagedKVCache(80, 16, 2, 32, **options)
    sequence = pool.new_sequence()
    for i0, i1 in ((0, 7), (7, 8), (8, 70), (70, 1030), (1030, 1031), (1031, 1100)):
        growing.append(k[:, :, i0:i1], v[:, :, i0:i1])
        pool.append([sequence], k[0, :, i0:i1].swapaxes(0, 1), v[0, :, i0:i1].swapaxes(0, 1))
        some = q[:, :, i0:i1]
        assert np.array_equal(bits(growing.attend(some, invariant=True)), bits(wanted[:, :, i0:i1]))
        paged = pool.attend([sequence], some[0].swapaxes(0, 1), invariant=True)
        assert np.array_equal(bits(paged.swapaxes(0, 1)), bits(wanted[0, :, i0:i1]))


def test_a_ring_refuses(backend):
    cache = fastattn.KVCache(1, 1, 20, 8, window=16)
    with pytest.raises(ValueError, match="invariant must be False on a ring"):
        cache.attend(np.zeros((1, 1, 1, 8), np.float32), invariant=True)
