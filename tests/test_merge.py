"""merge_states: attention over disjoint sets of keys, put together."""

import numpy as np
import pytest
from inputs import DTYPES, dtype_of, random_qkv
from oracle import assert_close, ulp

import fastattn

pytestmark = pytest.mark.usefixtures("backend")


def parts(q, k, v, cuts, **options):
    """The attention of q over each slice of the keys."""
    edges = [0, *cuts, k.shape[2]]
    states = [
        fastattn.attention(q, k[:, :, a:b], v[:, :, a:b], return_lse=True, query_offset=0, **options)
        for a, b in zip(edges, edges[1:])
    ]
    return [list(x) for x in zip(*states)]


def by_definition(outs, lses, dtype):
    """The formula, in the given dtype."""
    outs, lses = np.asarray(outs).astype(dtype), np.asarray(lses).astype(dtype)
    top = lses.max(axis=0)
    weights = np.exp(lses - top)
    total = weights.sum(axis=0)
    return (weights[..., None] * outs).sum(axis=0) / total[..., None], top + np.log(total)


CUTS = [[], [1], [20], [5, 5, 30], [40], list(range(1, 40))]


@pytest.mark.parametrize("cuts", CUTS, ids=len)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_make_the_whole(cuts, dtype):
    q, k, v = random_qkv(2, 4, 7, 40, 16, 9, kv_heads=2, dtype=dtype)
    outs, lses = parts(q, k, v, cuts)
    out, lse = fastattn.merge_states(outs, lses)
    assert out.dtype == q.dtype and out.shape == outs[0].shape
    whole, whole_lse = fastattn.attention(q, k, v, return_lse=True)
    # Each part has been rounded to its dtype, which is an error of half an ulp in a number of about 3.
    np.testing.assert_allclose(out.astype(np.float32), whole.astype(np.float32), atol=4 * ulp(dtype))
    np.testing.assert_allclose(lse, whole_lse, atol=2e-6)


@pytest.mark.parametrize("spread", [0.1, 5, 100, 1e4])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_accuracy(spread, count):
    rng = np.random.default_rng(0)
    outs = list(rng.standard_normal((count, 300, 9)).astype(np.float32))
    lses = list((spread * rng.standard_normal((count, 300))).astype(np.float32))
    out, lse = fastattn.merge_states(outs, lses)
    (expected, expected_lse), (plain, plain_lse) = (by_definition(outs, lses, dtype) for dtype in (np.float64, np.float32))
    assert_close(out, expected, plain, 2 * ulp("float32") * np.abs(expected).max())
    assert_close(lse, expected_lse, plain_lse, 2 * ulp("float32") * np.abs(expected_lse).max(), "lse")


def test_many_parts_of_equal_weight():
    """Merging does not let the earlier parts fade."""
    rng = np.random.default_rng(0)
    outs = list(rng.standard_normal((500, 20, 9)).astype(np.float32))
    lses = [np.full(20, 77.7, np.float32)] * 500
    out, lse = fastattn.merge_states(outs, lses)
    np.testing.assert_allclose(out, np.mean(outs, axis=0, dtype=np.float64), atol=1e-6)
    np.testing.assert_allclose(lse, np.float32(77.7) + np.log(500), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("count", [2, 3, 40])
def test_parts_near_the_largest_number(count, dtype):
    """A weighted mean is no larger than the largest part."""
    rng = np.random.default_rng(0)
    largest = np.float32(3.3895314e38 if dtype == "bfloat16" else 3.4028235e38)
    outs = [np.full((20, 9), largest).astype(dtype_of(dtype)) for _ in range(count)]
    for out in outs:
        out[:, 1:5] = rng.choice([-3e38, 3e38], (20, 4)).astype(np.float32)
    lses = list(rng.standard_normal((count, 20)).astype(np.float32))
    out, _ = fastattn.merge_states(outs, lses)
    expected, _ = by_definition(outs, lses, np.float64)
    np.testing.assert_allclose(out.astype(np.float64), expected, rtol=0, atol=4 * ulp(dtype) * float(largest))


def test_an_empty_part_contributes_nothing_whatever_it_holds():
    q, k, v = random_qkv(1, 2, 9, 60, 8)
    outs, lses = parts(q, k, v, [])
    for garbage in (np.nan, np.inf, 0):
        empty = np.full_like(outs[0], garbage), np.full_like(lses[0], -np.inf)
        out, lse = fastattn.merge_states([empty[0], outs[0], empty[0]], [empty[1], lses[0], empty[1]])
        np.testing.assert_allclose(out, outs[0], rtol=1e-6)
        np.testing.assert_allclose(lse, lses[0], rtol=1e-6)


def test_only_empty_parts():
    out, lse = fastattn.merge_states([np.full((3, 5), np.nan, np.float32)] * 2, [np.full(3, -np.inf, np.float32)] * 2)
    assert (out == 0).all() and (lse == -np.inf).all()


def test_nan_stays_nan_in_its_row():
    outs = [np.ones((3, 5), np.float32), np.ones((3, 5), np.float32)]
    outs[0][1, 2] = np.nan
    lses = [np.zeros(3, np.float32), np.zeros(3, np.float32)]
    lses[1][2] = np.nan
    out, lse = fastattn.merge_states(outs, lses)
    assert np.isfinite(out[0]).all() and np.isnan(out[1, 2]) and np.isfinite(out[1, :2]).all()
    assert np.isnan(out[2]).all() and np.isnan(lse[2])


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 4, 3)])
@pytest.mark.parametrize("width", [0, 1, 7, 64, 129])
def test_shapes(shape, width):
    rng = np.random.default_rng(0)
    outs = [rng.standard_normal((*shape, width)).astype(np.float32) for _ in range(3)]
    lses = [rng.standard_normal(shape).astype(np.float32) * 5 for _ in range(3)]
    out, lse = fastattn.merge_states(outs, lses)
    weights = np.exp(np.float64(lses))
    np.testing.assert_allclose(lse, np.log(weights.sum(axis=0)), atol=2e-6)
    np.testing.assert_allclose(out, (weights[..., None] * outs).sum(axis=0) / weights.sum(axis=0)[..., None], atol=1e-6)


def test_layouts():
    rng = np.random.default_rng(0)
    outs = [rng.standard_normal((4, 6, 10)).astype(np.float32) for _ in range(2)]
    lses = [rng.standard_normal((4, 6)).astype(np.float32) for _ in range(2)]
    expected = fastattn.merge_states(outs, lses)
    views = [np.asfortranarray(outs[0]), outs[1][::-1].copy()[::-1]]
    for actual, same in zip(fastattn.merge_states(views, [np.asfortranarray(x) for x in lses]), expected):
        np.testing.assert_array_equal(actual, same)
    for actual, same in zip(fastattn.merge_states(np.stack(outs), np.stack(lses)), expected):
        np.testing.assert_array_equal(actual, same)


def test_zero_rows():
    out, lse = fastattn.merge_states([np.zeros((0, 5), np.float32)], [np.zeros(0, np.float32)])
    assert out.shape == (0, 5) and lse.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_bits(dtype):
    rng = np.random.default_rng(0)
    outs = [rng.standard_normal((2, 1000, 65)).astype(dtype_of(dtype)) for _ in range(3)]
    lses = [rng.standard_normal((2, 1000)).astype(np.float32) for _ in range(3)]
    with fastattn.threads(1):
        alone = fastattn.merge_states(outs, lses)
    with fastattn.threads(3):
        shared = fastattn.merge_states(outs, lses)
    for one, many in zip(alone, shared):
        np.testing.assert_array_equal(one.view(np.uint8), many.view(np.uint8))
