"""merge_states: attention over disjoint sets of keys, put together."""

import numpy as np
import pytest
from inputs import DTYPES, dtype_of, random_qkv
from oracle import check

import fastattn

pytestmark = pytest.mark.usefixtures("engine")


def parts(q, k, v, cuts, **options):
    """The attention of q over each slice of the keys."""
    edges = [0, *cuts, k.shape[2]]
    states = [
        fastattn.attention(q, k[:, :, a:b], v[:, :, a:b], return_lse=True, query_offset=0, **options)
        for a, b in zip(edges, edges[1:])
    ]
    return [list(x) for x in zip(*states)]


@pytest.mark.parametrize("cuts", [[], [1], [20], [5, 5, 30], [40], list(range(1, 40))], ids=len)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_make_the_whole(cuts, dtype):
    q, k, v = random_qkv(2, 4, 7, 40, 16, 9, kv_heads=2, dtype=dtype)
    outs, lses = parts(q, k, v, cuts)
    out, lse = fastattn.merge_states(outs, lses)
    assert out.dtype == q.dtype and out.shape == outs[0].shape
    if dtype == "float32":
        check(out, lse, q, k, v)
    else:  # each part has been rounded already
        whole = fastattn.attention(q, k, v)
        np.testing.assert_allclose(
            out.astype(np.float32), whole.astype(np.float32), atol=3 * {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
        )


def test_parts_of_very_different_weight():
    q, k, v = random_qkv(1, 2, 9, 60, 8)
    k[:, :, :20] *= 100
    outs, lses = parts(q, k, v, [20, 40], scale=10.0)
    check(*fastattn.merge_states(outs, lses), q, k, v, scale=10.0)


def test_an_empty_part_contributes_nothing_whatever_it_holds():
    q, k, v = random_qkv(1, 2, 9, 60, 8)
    outs, lses = parts(q, k, v, [])
    for garbage in (np.nan, np.inf, 0):
        empty = np.full_like(outs[0], garbage), np.full_like(lses[0], -np.inf)
        out, lse = fastattn.merge_states([empty[0], outs[0], empty[0]], [empty[1], lses[0], empty[1]])
        np.testing.assert_array_equal(out, outs[0])
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
def test_the_order_of_the_parts_does_not_matter(dtype):
    rng = np.random.default_rng(0)
    outs = [rng.standard_normal((50, 6)).astype(dtype_of(dtype)) for _ in range(2)]
    lses = [rng.standard_normal(50).astype(np.float32) for _ in range(2)]
    one = fastattn.merge_states(outs, lses)
    other = fastattn.merge_states(outs[::-1], lses[::-1])
    np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_array_equal(one[1], other[1])
