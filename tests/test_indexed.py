"""attention_indexed: what attention gives under a mask of the listed keys, whatever their order; and lists that do not fit."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from inputs import DTYPES, random_qkv, read_only
from oracle import check

import fastattn


def random_lists(shape, kv_len, n, absent=0.1, dtype=np.int32, seed=1):
    """Lists of n different keys in any order, some of them -1."""
    rng = np.random.default_rng(seed)
    lists = np.full((*shape, n), -1, dtype)
    for place in np.ndindex(shape):
        some = rng.permutation(kv_len)[:n]
        lists[place][: some.size] = some
    lists[rng.random(lists.shape) < absent] = -1
    return lists


def listed(lists, num_heads, num_kv_heads, kv_len):
    """The mask (B, Hq, Lq, Lk) of what lists name."""
    lists = np.broadcast_to(lists, (lists.shape[0], num_kv_heads, *lists.shape[2:]))
    mask = np.zeros((*lists.shape[:3], kv_len + 1), bool)
    np.put_along_axis(mask, lists.astype(np.int64), True, axis=-1)
    return np.repeat(mask[..., :-1], num_heads // max(num_kv_heads, 1), axis=1)


def check_indexed(q, k, v, lists, mask=None, **options):
    """Right as the oracle judges attention under the mask of what is listed."""
    out, lse = fastattn.attention_indexed(q, k, v, lists, mask=mask, return_lse=True, **options)
    seen = listed(lists, q.shape[1], k.shape[1], k.shape[2])
    if mask is not None:
        seen = seen & mask if mask.dtype == bool else np.where(seen, mask, -np.inf)
    check(out, lse, q, k, v, mask=seen, **options)
    return out, lse


# Query and kv heads, queries, keys, listed, head sizes.
CASES = {
    "one of each": (1, 1, 1, 1, 1, 3, 5),
    "decoding": (8, 2, 1, 300, 200, 64, 64),
    "drafts": (4, 4, 5, 300, 257, 33, 17),
    "a group of many": (70, 1, 2, 300, 290, 24, 40),
    "sixteen heads": (16, 1, 3, 120, 100, 16, 16),
    "parts of the keys": (4, 1, 1, 3000, 2500, 16, 16),
    "more places than keys": (2, 2, 3, 20, 50, 8, 8),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_listed_keys_are_what_a_mask_shows(engine, case, dtype):
    heads, kv_heads, q_len, kv_len, n, head_dim, v_head_dim = case
    q, k, v = random_qkv(2, heads, q_len, kv_len, head_dim, v_head_dim, kv_heads, dtype)
    for of, index in ((kv_heads, np.int32), (1, np.int64)):
        check_indexed(q, k, v, random_lists((2, of, q_len), kv_len, n, dtype=index))


RULES = {
    "causal": dict(causal=True),
    "window": dict(window=(40, 3), query_offset=60),
    "lengths": dict(kv_lengths=[90, 0], kv_starts=[17, 0], q_lengths=[6, 3], causal=True),
    "softcap and sinks": dict(softcap=2.0, sinks=np.float32([0.5, -np.inf, 2, -1])),
    "alibi": dict(alibi_slopes=np.float32([0.5, 0.25, 0.1, 0.02]), causal=True),
    "alibi from a start": dict(alibi_slopes=np.float32([[0.5, 0.25, 0.1, 0.02]] * 2), kv_starts=[5, 60]),
    "scale": dict(scale=-0.3),
    "sigmoid": dict(activation="sigmoid"),
    "relu": dict(activation="relu", kv_starts=[3, 50]),
    "square": dict(activation="polynomial", power=2, kv_lengths=[100, 70]),
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_other_rules_still_hold(engine, rules, kv_heads):
    q, k, v = random_qkv(2, 4, 6, 120, 20, 12, kv_heads)
    lists = random_lists((2, kv_heads, 6), 120, 70)
    if "activation" in rules:
        out = fastattn.attention_indexed(q, k, v, lists, **rules)
        check(out, None, q, k, v, mask=listed(lists, 4, kv_heads, 120), **rules)
    else:
        check_indexed(q, k, v, lists, **rules)


@pytest.mark.parametrize("dtype", ["bool", "float16", "float32", "float64"])
@pytest.mark.parametrize("rows", [1, 20])
def test_masks_are_looked_up(engine, dtype, rows):
    q, k, v = random_qkv(2, rows, 3, 90, 16)
    mask = np.random.default_rng(3).standard_normal((2, rows, 3, 90))
    mask = mask > 0 if dtype == "bool" else np.where(mask > 1, -np.inf, mask).astype(dtype)
    lists = random_lists((2, rows, 3), 90, 60)
    check_indexed(q, k, v, lists, mask)
    check_indexed(q, k, v, lists, mask[:, :1, ::-1, ::-1], alibi_slopes=np.linspace(0, 1, rows, dtype=np.float32), kv_starts=[0, 7])


def test_score_functions_are_told_which_key_it_is(engine):
    q, k, v = random_qkv(2, 4, 3, 50, 16, kv_heads=2)
    lists = random_lists((2, 2, 3), 50, 40)
    lists[0, 0] = np.arange(5, 45)  # keys that follow each other
    for start in (0, 9):
        check_indexed(q, k, v, lists, kv_starts=start, score_function=lambda s, b, h, i, j: s - 0.1 * (b + h + 1) * abs(i - j % 7))


@given(st.data())
def test_any_lists_are_right(engine, data):
    sizes = st.integers(0, 12)
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    q_len, kv_len, n = data.draw(sizes), data.draw(st.integers(0, 40)), data.draw(st.integers(0, 40))
    q, k, v = random_qkv(2, kv_heads * group, q_len, kv_len, data.draw(sizes), data.draw(sizes), kv_heads)
    lists = random_lists((2, data.draw(st.sampled_from((1, kv_heads))), q_len), kv_len, n, data.draw(st.sampled_from((0, 0.5, 1))))
    window = data.draw(st.none() | st.tuples(st.integers(0, 20), st.integers(0, 20)))
    check_indexed(q, k, v, lists[:, :, :, ::-1], causal=data.draw(st.booleans()), window=window)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_listed_is_never_read(engine, dtype):
    q, k, v = random_qkv(1, 4, 3, 400, 16, kv_heads=2, dtype=dtype)
    lists = random_lists((1, 2, 3), 400, 90)
    expected = fastattn.attention_indexed(q, k, v, lists)
    for h in range(2):
        rest = np.setdiff1d(np.arange(400), lists[0, h])
        k[0, h, rest], v[0, h, rest] = np.nan, np.inf
    np.testing.assert_array_equal(fastattn.attention_indexed(q, k, v, lists), expected)
    v[0, 0, lists[0, 0, 1, lists[0, 0, 1] >= 0][7]] = np.nan  # of the second row, and of whichever else lists it
    with np.errstate(invalid="ignore"):
        check_indexed(q, k, v, lists)
        check_indexed(q, k, v, lists, kv_lengths=200, causal=True)


def test_a_full_list_in_order_is_attention(engine):
    q, k, v = random_qkv(1, 8, 2, 200, 32, kv_heads=2)
    lists = np.broadcast_to(np.arange(200), (1, 1, 2, 200))
    expected = fastattn.attention(q, k, v, causal=True)
    np.testing.assert_allclose(fastattn.attention_indexed(q, k, v, lists, causal=True), expected, rtol=2e-5, atol=2e-6)


def test_bits_do_not_depend_on_threads_or_company(engine):
    q, k, v = random_qkv(3, 8, 4, 3000, 16, kv_heads=2)
    lists = random_lists((3, 2, 4), 3000, 2100)
    expected = fastattn.attention_indexed(q, k, v, lists, causal=True)
    with fastattn.threads(3):
        np.testing.assert_array_equal(fastattn.attention_indexed(q, k, v, lists, causal=True), expected)
    for b in range(3):
        alone = fastattn.attention_indexed(*(x[b : b + 1] for x in (q, k, v, lists)), causal=True)
        np.testing.assert_array_equal(alone[0], expected[b])


def test_ranks_dtypes_and_layouts(engine):
    q, k, v = random_qkv(1, 4, 3, 60, 16, kv_heads=2)
    lists = random_lists((1, 2, 3), 60, 40)
    expected = fastattn.attention_indexed(q, k, v, lists)
    np.testing.assert_array_equal(fastattn.attention_indexed(q[0], k[0], v[0], lists[0]), expected[0])
    np.testing.assert_array_equal(fastattn.attention_indexed(q, k, v, read_only(lists.astype(np.int16))), expected)
    np.testing.assert_array_equal(fastattn.attention_indexed(q, k, v, lists.astype(">i8")), expected)
    np.testing.assert_array_equal(fastattn.attention_indexed(q, k, v, np.repeat(lists, 2, axis=3)[..., ::2].tolist()), expected)
    one = fastattn.attention_indexed(q[0, 0], k[0, 0], v[0, 0], lists[0, 0])
    np.testing.assert_allclose(one, expected[0, 0], rtol=1e-5, atol=1e-6)
    out = np.empty_like(expected)
    assert fastattn.attention_indexed(q, k, v, lists, out=out) is out
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
    ("lists", "error", "message"),
    [
        ([[[[0, 1.5]]]], TypeError, "indices must hold ints; got float64"),
        (None, TypeError, "indices must be an array of ints; got None"),
        ([[[0, 1]]], ValueError, r"indices must have shape \(2, 2, 3, n\), or 1 in the place of 2 heads; got \(1, 1, 2\)"),
        (np.zeros((2, 3, 3, 1), int), ValueError, r"indices must have shape \(2, 2, 3, n\)"),
        (np.zeros((1, 2, 3, 1), int), ValueError, r"indices must have shape \(2, 2, 3, n\)"),
    ],
    ids=str,
)
def test_wrong_shapes_and_dtypes(engine, lists, error, message):
    q, k, v = random_qkv(2, 4, 3, 60, 16, kv_heads=2)
    with pytest.raises(error, match=message):
        fastattn.attention_indexed(q, k, v, lists)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("sort", [True, False])
def test_wrong_indices_are_named_with_their_place_and_nothing_is_written(engine, dtype, sort):
    q, k, v = random_qkv(2, 4, 3, 60, 16, kv_heads=2)
    out = np.full((2, 4, 3, 16), 7, np.float32)
    lists = random_lists((2, 2, 3), 60, 40, absent=0, dtype=dtype)
    if sort:
        lists.sort(axis=-1)
    least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
    for n in (0, 17, 39):
        for wrong in (60, -2, least, most):
            bad = lists.copy()
            bad[1, 0, 2, n] = wrong
            with pytest.raises(ValueError, match=rf"indices must lie between -1 and 59; got {wrong} at \(1, 0, 2, {n}\)"):
                fastattn.attention_indexed(q, k, v, bad, out=out)
    bad = lists.copy()
    bad[0, 1, 1, 31] = bad[0, 1, 1, 30]
    with pytest.raises(ValueError, match=rf"indices must not name a key twice in a list; got {bad[0, 1, 1, 31]} at \(0, 1, 1, 31\)"):
        fastattn.attention_indexed(q, k, v, bad, out=out)
    bad = np.full((2, 1, 3, 5), -1, dtype)  # none may stand as often as it likes
    bad[1, 0, 0] = 3, -1, 2, -1, 3
    with pytest.raises(ValueError, match=r"indices must not name a key twice in a list; got 3 at \(1, 0, 0, 4\)"):
        fastattn.attention_indexed(q, k, v, bad, out=out)
    with pytest.raises(ValueError, match=r"got 3 at \(0, 0, 4\)"):
        fastattn.attention_indexed(q[1], k[1], v[1], bad[1])
    assert (out == 7).all()
    fastattn.attention_indexed(q, k, v, bad, q_lengths=[3, 0], out=out)  # lists of padding are not looked at
    assert not out.any()


def test_keys_far_apart_are_told_apart(engine):
    """Beyond what a set of keys holds at once."""
    q, k, v = random_qkv(1, 1, 1, 200_000, 4)
    lists = np.array([[[[199_999, 3, 70_000, 65_539, 131_075]]]])
    check_indexed(q, k, v, lists)
    with pytest.raises(ValueError, match=r"got 131075 at \(0, 0, 0, 5\)"):
        fastattn.attention_indexed(q, k, v, np.append(lists, [[[[131_075]]]], axis=3))


def test_what_does_not_go_with_lists(engine):
    q, k, v = random_qkv(1, 2, 3, 60, 16)
    lists = random_lists((1, 2, 3), 60, 40)
    with pytest.raises(ValueError, match="mask must be an array where keys are chosen by indices"):
        fastattn.attention_indexed(q, k, v, lists, mask=fastattn.BlockMask.causal(3, k_len=60, block_size=16))
    with pytest.raises(TypeError, match=r"attention_indexed\(\) has no argument caussal"):
        fastattn.attention_indexed(q, k, v, lists, caussal=True)
    with pytest.raises(ValueError, match="v must have the shape of k"):
        fastattn.attention_indexed(q, k, v[:, :, :-1], lists)


def test_a_number_of_keys_that_no_array_of_32_bits_could_name(engine, huge_zeros):
    if repr(engine) not in ("native-avx2", "native-avx512", "native-portable"):
        pytest.skip("one kernel after the other: the address is the same for all")
    kv_len = 2**31 + 5
    k = np.lib.stride_tricks.as_strided(huge_zeros((1, 1, 8, 4)), (1, 1, kv_len, 4), (0, 0, 0, 4))
    q = np.ones((1, 1, 1, 4), np.float32)
    out = fastattn.attention_indexed(q, k, k, np.array([[[[kv_len - 1, 0]]]]))
    assert not out.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 16, 37])
def test_caches_and_pages_give_the_bits_of_arrays(engine, dtype, page_size):
    lengths, q_lengths = [200, 77, 1], [3, 1, 1]
    cache = fastattn.KVCache(3, 2, 256, 24, 40, dtype)
    pool = fastattn.PagedKVCache(300, page_size, 2, 24, 40, dtype)
    sequences = [pool.new_sequence() for _ in lengths]
    outs, lists = [], []
    q, k, v = random_qkv(3, 8, 3, 200, 24, 40, 2, dtype)
    cache.append(k, v, lengths)
    for b, (n, rows) in enumerate(zip(lengths, q_lengths)):
        pool.append(sequences[b : b + 1], k[b, :, :n].swapaxes(0, 1), v[b, :, :n].swapaxes(0, 1))
        lists.append(random_lists((2, 3), n, 60, seed=b))
        own = q[b, :, :rows], k[b, :, :n], v[b, :, :n], lists[b][:, :rows]
        outs.append(fastattn.attention_indexed(*own, causal=True, return_lse=True))
    out, lse = cache.attend(q, indices=np.array(lists), q_lengths=q_lengths, return_lse=True)
    for b, rows in enumerate(q_lengths):
        np.testing.assert_array_equal(out[b, :, :rows], outs[b][0])
        np.testing.assert_array_equal(lse[b, :, :rows], outs[b][1])
    packed = [np.concatenate([x[b, :, :rows].swapaxes(0, 1) for b, rows in enumerate(q_lengths)]) for x in (q, np.array(lists))]
    out, lse = pool.attend(sequences, packed[0], np.cumsum([0, *q_lengths]), indices=packed[1], cascade=True, return_lse=True)
    np.testing.assert_array_equal(out.swapaxes(0, 1), np.concatenate([x for x, _ in outs], axis=1))
    np.testing.assert_array_equal(lse, np.concatenate([x for _, x in outs], axis=1))


def test_trees_of_drafts_choose_keys(engine):
    q, k, v = random_qkv(1, 4, 3, 60, 16, kv_heads=2)
    cache = fastattn.KVCache(1, 2, 100, 16, dtype="float32")
    cache.append(k, v)
    tail = np.tri(3, dtype=bool)
    tail[2, 1] = False
    lists = random_lists((1, 1, 3), 60, 50)
    seen = np.concatenate([np.ones((3, 57), bool), tail], axis=1)
    expected = fastattn.attention_indexed(q, k, v, lists, mask=seen)
    np.testing.assert_array_equal(cache.attend(q, tail_mask=tail, indices=lists), expected)


def test_wrong_lists_of_caches_and_pages(engine):
    ring = fastattn.KVCache(1, 1, 8, 4, window=8)
    with pytest.raises(ValueError, match="indices must be None on a ring"):
        ring.attend(np.zeros((1, 1, 1, 4), np.float32), indices=[[[[0]]]])
    pool = fastattn.PagedKVCache(4, 16, 2, 4, dtype="float32")
    sequences = [pool.new_sequence(), pool.new_sequence()]
    k = np.ones((40, 2, 4), np.float32)
    pool.append(sequences, k, k)
    q = np.ones((2, 2, 4), np.float32)
    for wrong, place in ((32, (1, 0, 1)), (-2, (0, 1, 0)), (5, (1, 1, 1))):
        lists = np.array([[[5, 19], [3, -1]], [[0, 7], [5, 1]]])
        lists[place] = wrong
        what = f"must lie between -1 and 31; got {wrong}" if wrong != 5 else "must not name a key twice in a list; got 5"
        with pytest.raises(ValueError, match=rf"indices {what} at \({', '.join(map(str, place))}\)"):
            pool.attend(sequences, q, indices=lists)
    with pytest.raises(ValueError, match=r"indices must have shape \(2, 2, n\), or 1 in the place of 2 heads; got \(2, 3, 1\)"):
        pool.attend(sequences, q, indices=np.zeros((2, 3, 1), int))
    lists = np.array([[[5, 25]], [[31, 7]]])  # beyond the length of 20, within the pages: not there to be seen
    np.testing.assert_array_equal(pool.attend(sequences, q, indices=lists), q)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("heads", [1, 4, 20])
def test_quantised_keys_are_chosen(engine, dtype, heads):
    q, k, v = random_qkv(1, heads, 3, 300, 32)[:1] + random_qkv(1, 1, 3, 300, 32)[1:]
    stored = [fastattn.quantize(x, dtype) for x in (k, v)]
    lists = random_lists((1, 1, 3), 300, 270)
    expected = fastattn.attention_indexed(q, *map(fastattn.dequantize, stored), lists, causal=True)
    found = fastattn.attention_indexed(q, *stored, lists, causal=True)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    cache, turned = (fastattn.KVCache(1, 1, 300, 32, dtype=dtype, rotate=rotate) for rotate in (False, True))
    pool = fastattn.PagedKVCache(30, 16, 1, 32, dtype=dtype)
    sequence = pool.new_sequence()
    cache.append(k, v)
    turned.append(k, v)
    pool.append([sequence], k[0].swapaxes(0, 1), v[0].swapaxes(0, 1))
    np.testing.assert_array_equal(cache.attend(q, indices=lists), found)
    paged = pool.attend([sequence], q[0].swapaxes(0, 1), indices=lists[0].swapaxes(0, 1))
    np.testing.assert_array_equal(paged.swapaxes(0, 1), found[0])
    np.testing.assert_allclose(turned.attend(q, indices=lists), found, atol=0.05 if dtype == "int8" else 0.6)
