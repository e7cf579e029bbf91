"""scaled_dot_product_attention: PyTorch's call with PyTorch's meaning."""

import numpy as np
import pytest
from inputs import random_qkv
from oracle import attention as expected_attention

import fastattn

pytestmark = pytest.mark.usefixtures("backend")
sdpa = fastattn.scaled_dot_product_attention


def assert_is(actual, q, k, v, **options):
    np.testing.assert_allclose(actual, expected_attention(q, k, v, **options)[0], atol=2e-6)
    assert actual.dtype == q.dtype


@pytest.mark.parametrize("q_len, kv_len", [(7, 7), (5, 9), (9, 5)])
def test_causal_is_top_left(q_len, kv_len):
    q, k, v = random_qkv(2, 3, q_len, kv_len, 8)
    assert_is(sdpa(q, k, v, is_causal=True), q, k, v, causal=True, query_offset=0)
    assert_is(sdpa(q, k, v), q, k, v)


def test_masks():
    q, k, v = random_qkv(2, 3, 7, 9, 8)
    boolean = np.random.default_rng(0).random((2, 1, 7, 9)) < 0.5
    additive = np.random.default_rng(0).standard_normal((7, 9)).astype(np.float32)
    assert_is(sdpa(q, k, v, boolean), q, k, v, mask=boolean)
    assert_is(sdpa(q, k, v, attn_mask=additive, scale=0.2), q, k, v, mask=additive, scale=0.2)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (4, 2, 3)])
def test_block_masks(lead):
    q, k, v = (np.broadcast_to(x[(0,) * 2], (*lead, *x.shape[2:])) for x in random_qkv(1, 1, 70, 90, 8))
    mask = fastattn.BlockMask.sliding_window(70, k_len=90, window=20, block_size=16)
    actual = sdpa(q, k, v, mask)
    assert actual.shape == (*lead, 70, 8)
    first = (0,) * len(lead)
    for index in (first, tuple(n - 1 for n in lead)):
        assert_is(actual[index], q[first], k[first], v[first], mask=mask.to_dense()[0, 0])


def test_grouped_heads_only_when_enabled():
    q, k, v = random_qkv(1, 6, 7, 9, 8, kv_heads=2)
    assert_is(sdpa(q, k, v, enable_gqa=True), q, k, v)
    with pytest.raises(ValueError, match="enable_gqa"):
        sdpa(q, k, v)


@pytest.mark.parametrize("rank", [2, 3])
def test_ranks(rank):
    """PyTorch's leading axes are all batch axes; with as many heads everywhere that makes no difference."""
    q, k, v = (x[(0,) * (4 - rank)] for x in random_qkv(2, 3, 7, 9, 8))
    assert_is(sdpa(q, k, v, is_causal=True), q, k, v, causal=True, query_offset=0)


def test_what_is_refused():
    q, k, v = random_qkv()
    with pytest.raises(ValueError, match="dropout_p"):
        sdpa(q, k, v, dropout_p=0.1)
    with pytest.raises(ValueError, match="is_causal"):
        sdpa(q, k, v, np.ones((5, 37), bool), is_causal=True)
