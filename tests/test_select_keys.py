"""select_keys: the keys, or the blocks of keys, with the largest scores, among equals the first; and arguments that do not fit."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from inputs import DTYPES, dtype_of

import fastattn


def arrays(batch=1, heads=4, kv_heads=1, q_len=3, kv_len=60, head_dim=16, dtype="float32", whole=False, seed=0):
    """Queries and keys; `whole` numbers have products that every order of summing gives exactly, and many equals among them."""
    rng = np.random.default_rng(seed)
    shapes = (batch, heads, q_len, head_dim), (batch, kv_heads, kv_len, head_dim)
    return tuple((rng.integers(-2, 3, s) if whole else rng.standard_normal(s)).astype(dtype_of(dtype)) for s in shapes)


def scores(q, k, weights=None, block=None):
    """(B, Hkv, Lq, Lk) by definition."""
    kv_heads, group = k.shape[1], q.shape[1] // max(k.shape[1], 1)
    s = q.astype(np.float64) @ np.repeat(k.astype(np.float64), group, axis=1).swapaxes(2, 3)
    s = s if block else np.maximum(s, 0)
    s = s * (1 if weights is None else np.broadcast_to(weights, s.shape[:3])[..., None].astype(np.float64))
    return s.reshape(s.shape[0], kv_heads, group, *s.shape[2:]).sum(axis=2)


def chosen(s, num_keys, causal=False, query_offset=None, kv_lengths=None, block=None, keep_first=0, keep_recent=0):
    """What the scores choose, row by row."""
    batch, heads, q_len, kv_len = s.shape
    unit = block or 1
    result = np.full((batch, heads, q_len, num_keys), -1, np.int32)
    lengths = np.broadcast_to(kv_len if kv_lengths is None else kv_lengths, batch)
    offsets = np.broadcast_to(lengths - q_len if query_offset is None else query_offset, batch)
    for b, h, i in np.ndindex(batch, heads, q_len):
        p = i + offsets[b]
        keys = [j for j in range(lengths[b]) if not causal or j <= p]
        best = {}
        for j in keys:
            own = np.inf if j < keep_first or p - keep_recent < j <= p else s[b, h, i, j]
            best[j // unit] = max(best.get(j // unit, -np.inf), own)
        order = sorted((-score, unit_of) for unit_of, score in best.items() if score > -np.inf)[: num_keys // unit]
        listed = [j for j in keys if j // unit in {u for _, u in order}]
        result[b, h, i, : len(listed)] = listed
    return result


CASES = {
    "one row": dict(heads=1, q_len=1, kv_len=300, head_dim=16),
    "a group of few": dict(heads=8, kv_heads=2, q_len=3, kv_len=300, head_dim=24),
    "a group of many": dict(heads=64, q_len=2, kv_len=300, head_dim=32),
    "more than a panel": dict(heads=140, q_len=2, kv_len=130, head_dim=8),
    "odd panels": dict(heads=2 * 23, kv_heads=2, q_len=7, kv_len=77, head_dim=5),
    "many rows": dict(batch=2, heads=3, q_len=70, kv_len=150, head_dim=16),
    "parts of the keys": dict(heads=4, q_len=1, kv_len=9000, head_dim=8),
    "parts, many heads": dict(heads=64, q_len=1, kv_len=9000, head_dim=8),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", ["keys", "blocks"])
def test_the_largest_are_chosen_and_among_equals_the_first(engine, case, dtype, rule):
    q, k = arrays(dtype=dtype, whole=True, **case)
    block = None if rule == "keys" else 16
    weights = np.random.default_rng(2).integers(-1, 3, q.shape[:3]).astype(np.float32)
    s = scores(q, k, weights, block)
    for n in (16, 160):
        for causal in (False, True):
            found = fastattn.select_keys(q, k, n, weights=weights, causal=causal, block=block)
            assert found.dtype == np.int32
            np.testing.assert_array_equal(found, chosen(s, n, causal, block=block))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [None, 32])
def test_numbers_of_any_size(engine, dtype, block):
    """What is chosen has no smaller a score than what is not, but for rounding."""
    q, k = arrays(1, 16, 2, 3, 2500, 64, dtype)
    found = fastattn.select_keys(q, k, 320, block=block)
    s = scores(q, k, block=block)
    for place in np.ndindex(found.shape[:3]):
        own = s[place]
        if block:
            own = np.repeat(np.maximum.reduceat(own, np.arange(0, 2500, block)), block)[:2500]
        listed = found[place][found[place] >= 0]
        assert (np.diff(listed) > 0).all() and (listed.size == 320 or (block and listed.size > 320 - block))
        rest = np.setdiff1d(np.arange(2500), listed)
        assert own[listed].min() >= own[rest].max() - 1e-5 * np.abs(own).max()


RULES = {
    "causal": dict(causal=True),
    "offset": dict(causal=True, query_offset=[20, -2]),
    "lengths": dict(kv_lengths=[41, 0], causal=True),
    "kept": dict(keep_first=5, keep_recent=9, causal=True),
    "kept, at an offset": dict(keep_first=3, keep_recent=4, query_offset=[10, 70]),
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("block", [None, 8, 7])
def test_what_is_seen_and_what_is_kept(engine, rules, block):
    q, k = arrays(2, 4, 2, 5, 60, whole=True)
    n = 4 * (block or 8)
    expected = chosen(scores(q, k, block=block), n, block=block, **rules)
    np.testing.assert_array_equal(fastattn.select_keys(q, k, n, block=block, **rules), expected)


@given(st.data())
def test_any_choice_is_right(engine, data):
    kv_heads, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 5))
    q_len, kv_len, head_dim = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 50)), data.draw(st.integers(0, 9))
    q, k = arrays(2, kv_heads * group, kv_heads, q_len, kv_len, head_dim, whole=True)
    block = data.draw(st.none() | st.integers(1, 12))
    n = data.draw(st.integers(0, 8)) * (block or 1)
    rules = dict(causal=data.draw(st.booleans()), block=block)
    np.testing.assert_array_equal(fastattn.select_keys(q, k, n, **rules), chosen(scores(q, k, block=block), n, **rules))


def test_blocks_as_models_are_trained_with_them(engine):
    """MiniMax-M3: blocks of 128, the 16 with the largest score of a visible key, the first and the local block among them."""
    q, k = arrays(1, 8, 2, 2, 5000, 16, whole=True)
    rule = dict(block=128, keep_first=1, keep_recent=1, causal=True)
    found = fastattn.select_keys(q, k, 2048, **rule)
    np.testing.assert_array_equal(found, chosen(scores(q, k, block=128), 2048, **rule))
    assert (found[..., :128] == np.arange(128)).all()
    assert all(set(range(4992, 4998 + i + 1)) <= set(found[0, h, i]) for h in range(2) for i in range(2))
    assert (found[0, :, 0] == 4999).sum() == 0  # the first row does not see the last key


def test_what_is_not_finite(engine):
    q, k = arrays(1, 4, 1, 2, 60, 16)
    k[0, 0, 7] = np.nan
    found = fastattn.select_keys(q, k, 60)
    assert (found == np.append(np.setdiff1d(np.arange(60), [7]), -1)).all()
    q[0, :, 1] = np.nan  # the other row is as it was
    again = fastattn.select_keys(q, k, 60)
    np.testing.assert_array_equal(again[:, :, 0], found[:, :, 0])
    assert (again[:, :, 1] == -1).all()


def test_choices_do_not_depend_on_threads_or_company(engine):
    q, k = arrays(3, 8, 2, 2, 9000, 16)
    with fastattn.threads(1):
        expected = fastattn.select_keys(q, k, 500)
    for threads in 2, 7:  # keys are in parts, where there are too few entries for all of these
        with fastattn.threads(threads):
            np.testing.assert_array_equal(fastattn.select_keys(q, k, 500), expected)
            for b in range(3):
                np.testing.assert_array_equal(fastattn.select_keys(q[b : b + 1], k[b : b + 1], 500)[0], expected[b])
    padded = np.concatenate([k, np.full((3, 2, 3000, 16), np.nan, np.float32)], axis=2)
    np.testing.assert_array_equal(fastattn.select_keys(q, padded, 500, kv_lengths=9000), expected)


def test_ranks_and_weights(engine):
    q, k = arrays(1, 4, 1, 3, 60, whole=True)
    w = np.float32([1, 2, -1, 3])
    expected = fastattn.select_keys(q, k, 16, weights=w)
    np.testing.assert_array_equal(expected, chosen(scores(q, k, w[:, None]), 16))
    np.testing.assert_array_equal(fastattn.select_keys(q[0], k[0], 16, weights=np.repeat(w[:, None], 3, axis=1)), expected[0])
    np.testing.assert_array_equal(fastattn.select_keys(q.astype(np.float64) if repr(engine) == "numpy" else q, k, 16, weights=w), expected)
    one = fastattn.select_keys(q[0, 0], k[0, 0], 16)
    np.testing.assert_array_equal(one, chosen(scores(q[:, :1], k), 16)[0, 0])
    swapped = np.ascontiguousarray(k.swapaxes(1, 2)).swapaxes(1, 2)[..., ::-1][..., ::-1]
    np.testing.assert_array_equal(fastattn.select_keys(q[:, ::-1][:, ::-1], swapped, 16, weights=w), expected)


def test_scores_of_nothing_are_equal(engine):
    k = np.ones((2, 3, 20, 8), np.float32)
    for heads, dim in ((0, 8), (3, 0), (0, 0)):
        found = fastattn.select_keys(np.ones((2, heads, 2, dim), np.float32), k[..., :dim], 5, causal=True, query_offset=3)
        np.testing.assert_array_equal(found, np.broadcast_to([[0, 1, 2, 3, -1], [0, 1, 2, 3, 4]], (2, 3, 2, 5)))


def test_chosen_keys_go_into_attention(engine):
    q, k = arrays(1, 8, 2, 3, 400, 16)
    lists = fastattn.select_keys(q, k, 400, causal=True)
    out = fastattn.attention_indexed(q, k, k, lists, causal=True)
    np.testing.assert_allclose(out, fastattn.attention(q, k, k, causal=True), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(num_keys=-1), ValueError, "num_keys must be at least 0; got -1"),
        (dict(num_keys=1.5), TypeError, "num_keys must be an int"),
        (dict(num_keys=2**24), ValueError, "num_keys must be less than"),
        (dict(num_keys=20, block=16), ValueError, "num_keys must be a multiple of block, 16; got 20"),
        (dict(block=0), ValueError, "block must be at least 1"),
        (dict(keep_first=17), ValueError, "keep_first and keep_recent must fit into num_keys, 16; got 17 and 0"),
        (dict(keep_first=8, keep_recent=9), ValueError, "must fit"),
        (dict(num_keys=32, block=16, keep_first=1, keep_recent=2), ValueError, "must fit into num_keys, 32, in blocks of 16"),
        (dict(keep_recent=-1), ValueError, "keep_recent must be at least 0"),
        (dict(weights=np.ones(3)), ValueError, r"weights must have shape \(4,\), \(4, 3\) or \(1, 4, 3\)"),
        (dict(weights=[1, 2, np.nan, 1]), ValueError, "weights must be finite"),
        (dict(causal=1), TypeError, "causal must be True or False"),
        (dict(kv_lengths=61), ValueError, "kv_lengths must lie between 0 and 60"),
        (dict(k=np.zeros((1, 3, 60, 16), np.float32)), ValueError, "k must have a number of heads that divides that of q, 4; got 3"),
        (dict(k=np.zeros((1, 1, 60, 15), np.float32)), ValueError, "k must have the batch size and the head size of q"),
        (dict(k=np.zeros((1, 60, 16), np.float32)), ValueError, "k must have as many axes as q"),
        (dict(k=np.zeros((1, 1, 60, 16), np.int8)), TypeError, "k must be"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(engine, change, error, message):
    q, k = arrays()
    with pytest.raises(error, match=message):
        fastattn.select_keys(**{"q": q, "k": k, "num_keys": 16, **change})
