"""Block masks: each constructor against its plain definition, and the algebra against dense algebra."""

import copy
import inspect
import pickle
import re
import tracemalloc

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from inputs import DTYPES, random_qkv
from patterns import BLOCK_SIZES, PATTERNS

from fastattn import BlockMask

LENGTHS = ((1, 1), (37, 37), (300, 300), (64, 200), (200, 64), (129, 257), (5, 512))
OFFSETS = (None, 0, 70, -33)

NAN = np.nan


def dense_where(definition, q_len, k_len, query_offset=None):
    """``definition(p, j)`` on every element, with ``p`` the positions of the rows."""
    offset = k_len - q_len if query_offset is None else query_offset
    p, j = np.arange(q_len)[:, None] + offset, np.arange(k_len)
    return np.broadcast_to(definition(p, j), (q_len, k_len))


def assert_is(mask, dense):
    """The mask has exactly these elements, and its arrays the canonical form and the layout of the C header."""
    dense = np.broadcast_to(dense, mask.shape)
    np.testing.assert_array_equal(mask.to_dense(), dense)
    assert (mask.indptr.dtype, mask.indices.dtype) == (np.int64, np.int32)
    assert mask == BlockMask.from_dense(dense, mask.block_size)
    assert mask.element_density == pytest.approx(dense.mean() if dense.size else 0)
    assert mask.element_density <= mask.density <= 1


# Constructors


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_patterns_of_a_line(name, block_size):
    build, options, definition = PATTERNS[name]
    for q_len, k_len in LENGTHS:
        if "scattered" in name and k_len < 61:
            continue
        for offset in OFFSETS:
            mask = build(q_len, k_len=k_len, **options, block_size=block_size, query_offset=offset)
            assert mask.shape == (1, 1, q_len, k_len) and mask.block_size == block_size
            assert_is(mask, dense_where(lambda p, j, n=k_len: definition(p, j, n), q_len, k_len, offset))


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_without_elements(name):
    build, options, _ = PATTERNS[name]
    options = options | ({"global_tokens": 0} if "global_tokens" in options else {})
    for q_len, k_len in ((0, 0), (0, 5), (5, 0)):
        mask = build(q_len, k_len=k_len, **options)
        assert mask.nnz == 0 and mask.density == 0 and mask.to_dense().shape == (1, 1, q_len, k_len)
        assert mask == ~mask


def test_the_second_length_defaults_to_the_first():
    assert BlockMask.causal(70, block_size=16) == BlockMask.causal(70, k_len=70, block_size=16)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("causal", [False, True])
def test_documents(block_size, causal):
    bounds = np.array([0, 5, 5, 150, 151, 300, 333])
    ids = np.repeat([7, 2, 5, 1, -3, 4], np.diff(bounds))

    def dense(ids):
        return dense_where(lambda p, j: (ids[p] == ids[j]) & ((j <= p) | (not causal)), 333, 333)

    expected = dense(ids)
    assert_is(BlockMask.document(bounds, causal=causal, block_size=block_size), expected)
    assert_is(BlockMask.document(ids=ids, causal=causal, block_size=block_size), expected)
    batch = np.stack([ids, np.zeros(333, int), np.arange(333)])
    mask = BlockMask.document(ids=batch, causal=causal, block_size=block_size)
    assert mask.shape == (3, 1, 333, 333)
    for b, ids in enumerate(batch):
        np.testing.assert_array_equal(mask.to_dense()[b, 0], dense(ids))


def neighbours(coordinate, size, window, dilation, causal):
    """The cells that one cell sees along one axis, after the definition of NATTEN."""
    alike = [x for x in range(size) if x % dilation == coordinate % dilation]
    rank = alike.index(coordinate)
    if causal:
        return alike[max(0, rank - window + 1) : rank + 1]
    start = min(max(rank - window // 2, 0), len(alike) - window)
    return alike[start : start + window]


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize(
    "shape, window, dilation, causal",
    [
        (90, 7, 1, False),
        (91, 4, 3, False),
        ((13, 17), 5, 1, False),
        ((13, 17), (3, 17), (4, 1), False),
        ((16, 16), (3, 4), 2, True),
        ((5, 6, 7), 3, 1, False),
        ((5, 6, 7), (5, 1, 2), (1, 1, 3), True),
        ((3, 1, 130), (1, 1, 9), 1, False),
    ],
)
def test_neighborhood(shape, window, dilation, causal, block_size):
    mask = BlockMask.neighborhood(shape, window=window, dilation=dilation, causal=causal, block_size=block_size)
    sizes = np.atleast_1d(shape)
    windows, dilations = np.broadcast_to(window, len(sizes)), np.broadcast_to(dilation, len(sizes))
    expected = np.zeros((*sizes, *sizes), bool)
    for cell in np.ndindex(*sizes):
        axes = [
            neighbours(x, n, w, d, causal and axis == 0)
            for axis, (x, n, w, d) in enumerate(zip(cell, sizes, windows, dilations))
        ]
        expected[cell][np.ix_(*axes)] = True
    assert_is(mask, expected.reshape(sizes.prod(), -1))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("q_len, k_len", [(1000, 1000), (300, 1001), (1001, 300), (7, 7)])
def test_bigbird(block_size, causal, q_len, k_len):
    options = {"window_blocks": 3, "global_blocks": 1, "block_size": block_size, "causal": causal}
    mask = BlockMask.bigbird(q_len, k_len=k_len, random_blocks=2, heads=3, seed=5, **options)
    assert mask.shape == (1, 3, q_len, k_len)
    rows, cols = -(-q_len // block_size), -(-k_len // block_size)
    first = np.arange(rows) * block_size + k_len - q_len
    last = np.minimum(first + block_size - 1, k_len - 1)
    centre, col = first[:, None] // block_size, np.arange(cols)
    sure = (abs(centre - col) <= 1) | (col < 1) | (col >= cols - 1) | (centre == 0) | (centre == cols - 1)
    free = ~sure & (col <= last[:, None] // block_size if causal else True)
    patterns = []
    for head in mask.to_dense()[0]:
        if causal:
            visible = dense_where(lambda p, j: j <= p, q_len, k_len)
            assert not (head & ~visible).any()
        else:
            visible = np.ones((q_len, k_len), bool)
        padded = np.zeros((rows * block_size, cols * block_size), bool)
        padded[:q_len, :k_len] = head
        listed = padded.reshape(rows, block_size, cols, block_size).any(axis=(1, 3))
        spread = listed.repeat(block_size, axis=0).repeat(block_size, axis=1)[:q_len, :k_len]
        np.testing.assert_array_equal(head, spread & visible)  # whole blocks, but for the diagonal
        padded[:q_len, :k_len] = visible
        reachable = padded.reshape(rows, block_size, cols, block_size).any(axis=(1, 3))
        np.testing.assert_array_equal(listed & ~free, sure & reachable)
        np.testing.assert_array_equal((listed & free).sum(axis=1), np.minimum(2, free.sum(axis=1)))
        patterns.append(listed)
    if free.sum(axis=1).max() > 3:
        assert not np.array_equal(patterns[0], patterns[1])
    assert mask == BlockMask.bigbird(q_len, k_len=k_len, random_blocks=2, heads=3, seed=5, **options)


def test_bigbird_draws_every_block_equally_often():
    """200 heads draw 2 of the free blocks: each is drawn about ``400 / free`` times."""
    mask = BlockMask.bigbird(160, window_blocks=3, global_blocks=1, random_blocks=2, heads=200, block_size=16)
    counts = mask.to_dense()[0, :, ::16, ::16].sum(axis=0)[5]  # row 5 of 10: 0, 4, 5, 6, 9 are sure
    assert (counts[[0, 4, 5, 6, 9]] == 200).all()
    assert counts.sum() == 5 * 200 + 2 * 200
    free = counts[[1, 2, 3, 7, 8]]
    assert free.min() > 50 and free.max() < 110  # 80 on average, with a deviation of 7


def plain_top_k(q, k, block_size, num_blocks, mass, pool, sink, recent, causal, offset, per_kv_head):
    """`BlockMask.top_k` for one batch entry, block by block in float64."""
    num_heads, q_len, head_dim = q.shape
    k_len, group = k.shape[1], num_heads // k.shape[0]
    rows = [range(i, min(i + block_size, q_len)) for i in range(0, q_len, block_size)]
    cols = [range(j, min(j + block_size, k_len)) for j in range(0, k_len, block_size)]
    shares = np.zeros((num_heads, len(rows), len(cols)))
    for h, (r, row) in ((h, x) for h in range(num_heads) for x in enumerate(rows)):
        mean = q[h, row].astype(float).mean(axis=0)
        for c, col in enumerate(cols):
            if causal and col[0] > row[-1] + offset:
                continue
            keys = k[h // group, col].astype(float)
            if pool == "mean":
                score = mean @ keys.mean(axis=0)
            else:
                score = np.maximum(mean * keys.max(axis=0), mean * keys.min(axis=0)).sum()
            shares[h, r, c] = len(col) * np.exp(score / head_dim**0.5)
        shares[h, r] /= max(shares[h, r].sum(), 1e-300)
    if per_kv_head:
        shares = shares.reshape(-1, group, len(rows), len(cols)).mean(axis=1).repeat(group, axis=0)
    dense = np.zeros((num_heads, q_len, k_len), bool)
    for h, (r, row) in ((h, x) for h in range(num_heads) for x in enumerate(rows)):
        positions = np.array(row) + offset
        recent_cols = range(positions[0] // block_size - recent + 1, positions[-1] // block_size + 1)
        chosen = {c for c in range(len(cols)) if (c < sink or c in recent_cols) and not (causal and cols[c][0] > positions[-1])}
        reached = shares[h, r, list(chosen)].sum()
        for c in np.argsort(-shares[h, r], kind="stable"):
            enough = reached >= mass if mass is not None else False
            if enough or len(chosen) >= num_blocks or shares[h, r, c] == 0:
                break
            if c not in chosen:
                chosen.add(int(c))
                reached += shares[h, r, c]
        for c in chosen:
            dense[h][np.ix_(row, cols[c])] = True
    return dense & dense_where(lambda p, j: j <= p, q_len, k_len, offset) if causal else dense


@pytest.mark.parametrize("block_size", [16, 48, 100])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("per_kv_head", [False, True])
@pytest.mark.parametrize("num_blocks, mass", [(4, None), (None, 0.6), (3, 0.9), (0, None)])
def test_top_k(block_size, causal, pool, per_kv_head, num_blocks, mass):
    for seed, (q_len, k_len, offset) in enumerate([(333, 333, None), (130, 500, None), (70, 333, 7)]):
        q, k, _ = random_qkv(2, 4, q_len, k_len, 16, kv_heads=2, seed=seed)
        q, k = q + 1, k * 3  # something to choose from
        options = {"pool": pool, "causal": causal, "query_offset": offset, "per_kv_head": per_kv_head}
        mask = BlockMask.top_k(q, k, num_blocks, mass=mass, block_size=block_size, sink_blocks=1, recent_blocks=2, **options)
        offset = k_len - q_len if offset is None else offset
        count = 10**6 if num_blocks is None else num_blocks
        for b in range(2):
            expected = plain_top_k(q[b], k[b], block_size, count, mass, pool, 1, 2, causal, offset, per_kv_head)
            np.testing.assert_array_equal(mask.to_dense()[b], expected)
        assert mask == BlockMask.from_dense(mask.to_dense(), block_size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_top_k_takes_every_rank_and_dtype(dtype):
    q, k, _ = random_qkv(1, 2, 100, 100, 8, dtype=dtype)
    expected = BlockMask.top_k(q.astype(np.float32), k.astype(np.float32), 3, block_size=16)
    assert BlockMask.top_k(q, k, 3, block_size=16) == expected
    assert BlockMask.top_k(q[0], k[0], 3, block_size=16) == expected
    single = BlockMask.top_k(q[0, 0], k[0, 0], 3, block_size=16)
    np.testing.assert_array_equal(single.to_dense()[0, 0], expected.to_dense()[0, 0])


def test_top_k_finds_the_needle():
    """One strong key in a block of weak ones: the mean may miss it, the bound may not."""
    rng = np.random.default_rng(0)
    k = rng.standard_normal((4096, 32)).astype(np.float32)
    q = np.ones((64, 32), np.float32)
    k[1234] = 4
    mask = BlockMask.top_k(q, k, 3, pool="max", block_size=64)
    assert mask.to_dense()[0, 0, :, 1234].all()


def test_top_k_with_nan_keeps_what_is_always_kept():
    q, k, _ = random_qkv(1, 1, 64, 256, 8)
    k[0, 0, 100] = NAN
    mask = BlockMask.top_k(q, k, 3, block_size=16, sink_blocks=1, recent_blocks=1)
    visible = mask.to_dense()[0, 0]
    assert visible[:, :16].all() and visible[np.arange(64), 192 + np.arange(64)].all()


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_from_dense(block_size):
    rng = np.random.default_rng(block_size)
    coarse = rng.integers(0, 3, (2, 3, 7, 5)).repeat(40, axis=2).repeat(60, axis=3)
    dense = ((coarse == 2) | ((coarse == 1) & (rng.random(coarse.shape) < 0.5)))[:, :, :263, :289]
    mask = BlockMask.from_dense(dense, block_size)
    np.testing.assert_array_equal(mask.to_dense(), dense)
    np.testing.assert_array_equal(BlockMask.from_dense(dense[0], block_size).to_dense(), dense[:1])
    np.testing.assert_array_equal(BlockMask.from_dense(dense[0, 0].T, block_size).to_dense(), dense[:1, :1].swapaxes(2, 3))
    for (b, h), (i0, i1) in zip(np.ndindex(2, 3), [(0, 263), (1, 2), (15, 17), (99, 263), (262, 263), (80, 80)]):
        np.testing.assert_array_equal(mask.dense_rows(b, h, i0, i1), dense[b, h, i0:i1])


def test_shared_patterns_serve_every_entry_and_head():
    mask = BlockMask.causal(50, block_size=16)
    np.testing.assert_array_equal(mask.dense_rows(3, 7, 10, 30), mask.to_dense()[0, 0, 10:30])
    assert mask.row_strides == (0, 0)
    dense = np.random.default_rng(0).random((2, 1, 50, 50)) < 0.1
    mask = BlockMask.from_dense(dense, 16)
    assert mask.row_strides == (4, 0)
    np.testing.assert_array_equal(mask.dense_rows(1, 5, 0, 50), dense[1, 0])


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_from_function(block_size):
    slopes = np.array([2, 5, 9])

    def see(b, h, q_idx, k_idx):
        assert type(b) is int and type(h) is int and q_idx.size * k_idx.size / block_size <= 2**24
        return (k_idx * slopes[h] <= q_idx * 3) | (k_idx % 97 == b)

    mask = BlockMask.from_function(see, 301, k_len=277, batch=2, heads=3, block_size=block_size)
    assert mask.shape == (2, 3, 301, 277)
    i, j = np.arange(301)[:, None], np.arange(277)
    dense = np.stack([[see(b, h, i, j) for h in range(3)] for b in range(2)])
    assert_is(mask, dense)
    within = BlockMask.sliding_window(301, k_len=277, window=20, block_size=block_size)
    assert_is(
        BlockMask.from_function(see, 301, k_len=277, batch=2, heads=3, block_size=block_size, within=within),
        dense & within.to_dense(),
    )
    assert_is(BlockMask.from_function(lambda b, h, q_idx, k_idx: k_idx < 3, 301, k_len=277, block_size=block_size), j < 3)
    assert_is(BlockMask.from_function(lambda *_: np.True_, 301, k_len=277, block_size=block_size), True)


@pytest.mark.parametrize(
    "build",
    [
        lambda n: BlockMask.causal(n, block_size=128),
        lambda n: BlockMask.sliding_window(n, window=1024),
        lambda n: BlockMask.strided(n, stride=512),
        lambda n: BlockMask.fixed(n, stride=512),
        lambda n: BlockMask.longformer(n, window=512, global_tokens=64),
        lambda n: BlockMask.dilated(n, window=256, dilation=4),
        lambda n: BlockMask.neighborhood((n // 512, 512), window=13),
        lambda n: BlockMask.document(np.arange(0, n + 1, 1024), causal=True),
        lambda n: BlockMask.bigbird(n),
        lambda n: BlockMask.top_k(np.ones((n, 8), np.float32), np.ones((n, 8), np.float32), 8, causal=True),
    ],
)
def test_long_patterns_never_become_dense(build):
    """131,072 tokens have 2**34 elements, and a pattern's many blocks few distinct element masks."""
    tracemalloc.start()
    try:
        mask = build(131_072)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**27
    assert mask.element_bits is None or len(mask.element_bits) <= 8


# The class


def test_plain_csr():
    mask = BlockMask(2, [0, 2, 3, 6], [0, 1, 2, 0, 2, 3], (5, 7))
    expected = ["####...", "####...", "....##.", "....##.", "##..###"]
    assert_is(mask, np.array([[c == "#" for c in row] for row in expected]))
    assert (mask.nnz, mask.partial, mask.element_bits) == (6, None, None)
    assert mask.density == pytest.approx(17 / 35)


def test_element_masks():
    rng = np.random.default_rng(0)
    masks = rng.random((3, 20, 20)) < 0.5
    masks[1], masks[2] = True, False
    indptr, indices = [0, 2, 3], [0, 2, 1]
    expected = np.zeros((40, 60), bool)
    expected[:20, :20], expected[:20, 40:] = masks[0], True
    mask = BlockMask(20, indptr, indices, (40, 55), masks)
    assert_is(mask, expected[:, :55])
    assert mask.nnz == 2 and mask.partial.tolist() == [0, -1]  # one element mask was full, and one empty
    assert BlockMask(20, indptr, indices, (40, 55), ([2, 0, 1], masks[[2, 1, 0]])) != mask
    assert BlockMask(20, indptr, indices, (40, 55), ([2, -1, 1], masks[[2, 2, 0]])) == mask
    # The layout of the C header: one row for each key, bit i % 8 of byte i / 8 for query row i.
    assert mask.element_bits.shape == (1, 20, 3) and mask.element_bits.dtype == np.uint8
    for i, j in np.ndindex(20, 20):
        assert bool(mask.element_bits[0, j, i // 8] >> (i % 8) & 1) == masks[0, i, j]
    assert BlockMask(20, mask.indptr, mask.indices, mask.shape, (mask.partial, mask.element_bits)) == mask


def test_elements_beyond_the_mask_do_not_count():
    full = BlockMask(16, [0, 1], [0], (10, 7))
    inside = np.zeros((1, 16, 16), bool)
    inside[0, :10, :7] = True
    assert BlockMask(16, [0, 1], [0], (10, 7), inside) == full
    assert full.density == full.element_density == 1
    assert BlockMask(16, [0, 1], [0], (10, 7), ~inside).nnz == 0


def test_equal_element_masks_are_stored_once():
    for mask, count in (
        (BlockMask.causal(1 << 14), 1),
        (BlockMask.causal(1000), 2),
        (BlockMask.sliding_window(1 << 14, window=512), 2),
    ):
        assert len(mask.element_bits) == count
        assert np.unique(mask.partial).tolist() == list(range(-1, count))


def test_attributes_are_read_only():
    mask = BlockMask.causal(100)
    for array in (mask.indptr, mask.indices, mask.partial, mask.element_bits):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    for name in (*mask.__slots__, "anything"):
        with pytest.raises(AttributeError, match="a BlockMask is immutable"):
            setattr(mask, name, None)
    given = np.array([0, 1])
    assert BlockMask(16, given, [0], (16, 16)).indptr is not given
    given[0] = 5
    assert mask.nbytes == sum(a.nbytes for a in (mask.indptr, mask.indices, mask.partial, mask.element_bits))


def test_density():
    mask = BlockMask.causal(100, block_size=64)  # blocks of 64 x 64, 36 x 64 and 36 x 36
    assert mask.density == pytest.approx((64 * 64 + 36 * 64 + 36 * 36) / 100**2)
    assert mask.element_density == pytest.approx(101 / 200)
    two = BlockMask.from_dense(np.stack([np.ones((32, 32), bool), np.zeros((32, 32), bool)]), 16)
    assert (two.nnz, two.density) == (4, 0.5)


dense_masks = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32)).map(
    lambda t: np.repeat(np.repeat(np.random.default_rng(t[2]).random((2, 2, *t[:2])) < 0.5, 3, axis=2), 5, axis=3)
)


@given(dense_masks, st.integers(1, 70), st.integers(0, 2**32))
def test_set_algebra(a, block_size, seed):
    rng = np.random.default_rng(seed)
    b = rng.random(a.shape) < rng.choice([0, 0.02, 0.5, 1])
    b[rng.random(a.shape[:2]) < 0.3] = True
    a, b = a[: rng.integers(1, 3), : rng.integers(1, 3)], b[: rng.integers(1, 3), : rng.integers(1, 3)]
    if rng.random() < 0.5:
        b = b[:1, :1]
    elif a.shape[0] != 1:
        b = np.broadcast_to(b[:1], (a.shape[0], *b.shape[1:]))
    if a.shape[1] > 1:
        b = b[:, :1]
    x, y = BlockMask.from_dense(a, block_size), BlockMask.from_dense(b, block_size)
    for result, expected in ((x & y, a & b), (y & x, a & b), (x | y, a | b), (y | x, a | b), (~x, ~a), (~~y, b)):
        assert result.shape == expected.shape
        assert_is(result, expected)
    assert ~(x & y) == ~x | ~y
    assert (x & ~x).nnz == 0
    assert (x | ~x).element_density == 1 and (x | ~x).partial is None


def test_set_algebra_of_patterns():
    n, size = 1000, 48
    window, causal = BlockMask.sliding_window(n, window=100, block_size=size), BlockMask.causal(n, block_size=size)
    assert window & causal == BlockMask.sliding_window(n, window=100, causal=True, block_size=size)
    assert window & causal == BlockMask.sliding_window(n, window=(100, 0), block_size=size)
    future = ~causal | BlockMask.sliding_window(n, window=0, block_size=size)
    assert future == BlockMask.sliding_window(n, window=(0, None), block_size=size)
    assert window | window == window and window & window == window


def test_set_algebra_refuses_what_does_not_fit():
    mask = BlockMask.causal(100, block_size=16)
    with pytest.raises(ValueError, match="both masks must have one block_size; got 16 and 32"):
        mask & BlockMask.causal(100, block_size=32)
    with pytest.raises(ValueError, match=r"both masks must have one shape.* got \(1, 1, 100, 100\) and \(1, 1, 100, 99\)"):
        mask | BlockMask.causal(100, k_len=99, block_size=16)
    with pytest.raises(ValueError, match=r"got \(1, 2, 8, 8\) and \(1, 3, 8, 8\)"):
        BlockMask(8, [0, 0, 0], [], (2, 8, 8)) | BlockMask(8, [0, 0, 0, 0], [], (3, 8, 8))
    for other in (np.ones((100, 100), bool), True, None):
        with pytest.raises(TypeError):
            mask & other
        with pytest.raises(TypeError):
            mask | other
        assert mask != other


@pytest.mark.parametrize("mask", [BlockMask.causal(100, block_size=16), BlockMask.bigbird(500, heads=2), BlockMask.causal(0)])
def test_copies_are_equal(mask):
    for other in (pickle.loads(pickle.dumps(mask)), copy.copy(mask), copy.deepcopy(mask)):
        assert other == mask and type(other) is BlockMask
        assert all(np.array_equal(getattr(other, name), getattr(mask, name)) for name in mask.__slots__)
    assert mask != BlockMask.causal(99, block_size=16)


def test_a_pickle_is_checked():
    build, arguments = BlockMask.causal(100, block_size=16).__reduce__()
    arguments = list(arguments)
    arguments[2] = arguments[2] + 1
    with pytest.raises(ValueError, match="indices"):
        build(*arguments)


def test_repr_and_picture():
    mask = BlockMask.causal(1024, block_size=64)
    assert repr(mask) == "BlockMask(shape=(1, 1, 1024, 1024), block_size=64, nnz=136, density=0.5312)"
    head, *picture = str(mask).splitlines()
    assert head == repr(mask)
    assert len(picture) == 16 and picture[0] == "▓" + " " * 15 and picture[15] == "█" * 15 + "▓"
    assert len(str(BlockMask.causal(100_000)).splitlines()) == 17
    faint = BlockMask(16, [0, *[1] * 625], [600], (10_000, 10_000))
    assert sum(line.count("░") for line in str(faint).splitlines()) == 1
    assert str(BlockMask.causal(0)).startswith("BlockMask")


def test_plot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    mask = BlockMask.from_dense(np.tri(70, dtype=bool)[None, :, ::-1].repeat(2, axis=0), 16)
    ax = mask.plot(head=1)
    (image,) = ax.images
    assert image.get_array().shape == (5, 5) and image.get_array()[4].tolist() == [81 / 96, 1, 1, 1, 1]
    assert mask.plot(ax=ax, cmap="viridis") is ax and ax.images[-1].get_cmap().name == "viridis"
    plt.close("all")


# Errors


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((0, [0], [], (0, 0)), ValueError, "block_size must be at least 1; got 0"),
        ((16.0, [0], [], (0, 0)), TypeError, "block_size must be an integer; got 16.0"),
        ((16, [0, 1], [0], 16), TypeError, "shape must be a tuple of integers; got 16"),
        ((16, [0, 1], [0], (16,)), ValueError, "shape must be .*none negative; got (16,)"),
        ((16, [0, 1], [0], (16, -1)), ValueError, "shape must be .*none negative; got (16, -1)"),
        ((16, [0, 1], [0], (16, 17.5)), TypeError, "shape must be a tuple of integers; got (16, 17.5)"),
        ((16, [0, 1], [0], (17, 16)), ValueError, "indptr must have shape (3,); got (2,)"),
        ((16, [0, 1], [0], (2, 16, 16)), ValueError, "indptr must have shape (3,); got (2,)"),
        ((16, [[0, 1]], [0], (16, 16)), ValueError, "indptr must have shape (2,); got (1, 2)"),
        ((16, [0.0, 1.0], [0], (16, 16)), TypeError, "indptr must hold integers; got float64"),
        ((16, [1, 1], [0], (16, 16)), ValueError, "indptr must go from 0 to len(indices) = 1; got 1 to 1"),
        ((16, [0, 2], [0], (16, 16)), ValueError, "indptr must go from 0 to len(indices) = 1; got 0 to 2"),
        ((16, [0, 2, 1, 3], [0, 1, 2], (48, 48)), ValueError, "indptr must not decrease; got 1 after 2"),
        ((16, [0, 1], [0.5], (16, 16)), TypeError, "indices must hold integers; got float64"),
        ((16, [0, 1], [True], (16, 16)), TypeError, "indices must hold integers; got bool"),
        ((16, [0, 1], [1], (16, 16)), ValueError, "indices must be below 1, the number of key blocks, and not negative; got 1"),
        ((16, [0, 1], [-1], (16, 16)), ValueError, "indices must be below 1, the number of key blocks, and not negative; got -1"),
        ((16, [0, 1], [2**32], (16, 16)), ValueError, "indices must be below 1, .*; got 4294967296"),
        ((16, [0, 2], [1, 0], (16, 32)), ValueError, "indices must strictly ascend within a block row; got 0 after 1"),
        ((16, [0, 2], [1, 1], (16, 32)), ValueError, "indices must strictly ascend within a block row; got 1 after 1"),
        ((4, [0, 1], [0], (4, 4), np.ones((1, 4, 4))), TypeError, "element_mask must hold bool; got float64"),
        ((4, [0, 1], [0], (4, 4), np.ones((1, 4, 3), bool)), ValueError, "element_mask must have shape (1, 4, 4); got (1, 4, 3)"),
        ((4, [0, 1], [0], (4, 4), ([0], np.ones((1, 4, 4), bool), 0)), ValueError, "element_mask must be .*got a tuple of 3"),
        ((4, [0, 1], [0], (4, 4), ([0, 0], np.ones((1, 4, 4), bool))), ValueError, "element_mask[0] must have shape (1,); got (2,)"),
        ((4, [0, 1], [0], (4, 4), ([1], np.ones((1, 4, 4), bool))), ValueError, "element_mask[0] must hold -1 or .*1 .*; got 1"),
        ((4, [0, 1], [0], (4, 4), ([-2], np.ones((1, 4, 4), bool))), ValueError, "element_mask[0] must hold -1 or .*; got -2"),
        ((4, [0, 1], [0], (4, 4), ([0], np.ones((1, 4, 2), np.uint8))), ValueError, "element_mask[1] must have shape (n, 4, 1)"),
        ((4, [0, 1], [0], (4, 4), ([0], np.ones((1, 4, 4)))), TypeError, "element_mask[1] must hold bool, or uint8 .*; got float64"),
    ],
)
def test_validation(arguments, error, message):
    pattern = "".join("\\" + c if c in "()[]" else c for c in message)
    with pytest.raises(error, match=pattern):
        BlockMask(*arguments)


@pytest.mark.parametrize(
    "build, error, message",
    [
        (lambda: BlockMask.causal(-1), ValueError, "q_len must be at least 0; got -1"),
        (lambda: BlockMask.causal(64, 16), TypeError, "positional argument"),  # a block size, or a number of keys?
        (lambda: BlockMask.causal(5, k_len=5.0), TypeError, "k_len must be an integer; got 5.0"),
        (lambda: BlockMask.causal(5, block_size=0), ValueError, "block_size must be at least 1; got 0"),
        (lambda: BlockMask.causal(5, query_offset=1.5), TypeError, "query_offset must be an integer; got 1.5"),
        (lambda: BlockMask.sliding_window(5, window=(1, 2, 3)), ValueError, "window must be an int or a pair"),
        (lambda: BlockMask.sliding_window(5, window=-1), ValueError, "window must be at least 0; got -1"),
        (lambda: BlockMask.dilated(5, window=1, dilation=0), ValueError, "dilation must be at least 1; got 0"),
        (lambda: BlockMask.strided(5, stride=0), ValueError, "stride must be at least 1; got 0"),
        (lambda: BlockMask.fixed(5, stride=4, summary=5), ValueError, "summary must be at most stride = 4; got 5"),
        (lambda: BlockMask.longformer(5, window=1, global_tokens=[5]), ValueError, "global_tokens must be positions below 5.*got 5"),
        (lambda: BlockMask.longformer(5, window=1, global_tokens=[0.5]), TypeError, "global_tokens must hold integers"),
        (lambda: BlockMask.longformer(5, window=1, global_tokens=-1), ValueError, "global_tokens must be at least 0"),
        (lambda: BlockMask.bigbird(5, window_blocks=2), ValueError, "window_blocks must be odd; got 2"),
        (lambda: BlockMask.bigbird(5, random_blocks=-1), ValueError, "random_blocks must be at least 0; got -1"),
        (lambda: BlockMask.neighborhood((2, 2, 2, 2), window=1), ValueError, "shape must have 1, 2 or 3 axes"),
        (lambda: BlockMask.neighborhood((4, 4), window=(3, 3, 3)), ValueError, "window must be an int, or one for each of 2 axes"),
        (lambda: BlockMask.neighborhood((4, 4), window=3, dilation=2), ValueError, "window \\* dilation must be at most 4.*axis 0"),
        (lambda: BlockMask.document(), TypeError, "exactly one of cu_seqlens and ids must be given"),
        (lambda: BlockMask.document([1, 5]), ValueError, "cu_seqlens must begin with 0 and not decrease"),
        (lambda: BlockMask.document([0, 5, 3]), ValueError, "cu_seqlens must begin with 0 and not decrease"),
        (lambda: BlockMask.document(ids=[0, 1, 0]), ValueError, "ids must hold each document as one run of tokens"),
        (lambda: BlockMask.document(ids=[0.5]), TypeError, "ids must hold integers; got float64"),
        (lambda: BlockMask.from_dense(np.ones((4, 4))), TypeError, "mask must hold bool; got float64"),
        (lambda: BlockMask.from_dense(np.ones(4, bool)), ValueError, "mask must have shape"),
        (lambda: BlockMask.from_function(lambda *_: True, 4, heads=-1), ValueError, "heads must be at least 0; got -1"),
        (lambda: BlockMask.from_function(lambda *_: True, 4, batch=0.5), TypeError, "batch must be an integer; got 0.5"),
        (lambda: BlockMask.from_function(lambda b, h, i, j: i - j, 4), TypeError, "mask_mod must return bool; got int64"),
        (lambda: BlockMask.from_function(lambda b, h, i, j: i < j, 4, within=BlockMask.causal(5)), ValueError, "both masks must have"),
        (lambda: BlockMask.top_k(np.ones((4, 2)), np.ones((1, 4, 2)), 1), ValueError, "q and k must both have"),
        (lambda: BlockMask.top_k(np.ones((4, 2)), np.ones((4, 3)), 1), ValueError, "k must have the batch and head size of q"),
        (lambda: BlockMask.top_k(np.ones((4, 4, 2)), np.ones((3, 4, 2)), 1), ValueError, "k must have a number of heads"),
        (lambda: BlockMask.top_k(np.ones((4, 2)), np.ones((4, 2))), TypeError, "num_blocks must be an integer; got None"),
        (lambda: BlockMask.top_k(np.ones((4, 2)), np.ones((4, 2)), mass=1.5), ValueError, "mass must lie between 0 and 1; got 1.5"),
        (lambda: BlockMask.top_k(np.ones((4, 2)), np.ones((4, 2)), 1, pool="sum"), ValueError, "pool must be"),
    ],
)
def test_constructors_refuse_nonsense(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize("name", [name for name, _ in inspect.getmembers(BlockMask, inspect.ismethod) if name[0] != "_"])
def test_constructors_describe_every_argument(name):
    constructor = getattr(BlockMask, name)
    parameters = inspect.getdoc(constructor).partition("Parameters\n---")[2].partition("Returns\n---")[0]
    described = [word for names in re.findall(r"^(\w[\w, ]*) : ", parameters, re.MULTILINE) for word in names.split(", ")]
    assert sorted(described) == sorted(inspect.signature(constructor).parameters)
