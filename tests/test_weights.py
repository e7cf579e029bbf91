"""attention_weights, the probabilities themselves, and attention_mass, their sums."""

import numpy as np
import pytest
from inputs import DTYPES, random_qkv
from oracle import attention as expected_attention

import fastattn

pytestmark = pytest.mark.usefixtures("backend")

OPTIONS = [
    {},
    {"causal": True},
    {"window": (4, 1), "query_offset": 3, "kv_lengths": [20, 9]},
    {"softcap": 2.0, "scale": 3.0, "alibi_slopes": np.float32([0.1, 0.2, 0.3, 0.4])},
    {"sinks": np.float32([0, 1, 2, -1]), "causal": True, "query_offset": -5},
    {"mask": np.random.default_rng(0).random((13, 20)) < 0.4},
    {"mask": np.where(np.random.default_rng(0).random((4, 13, 20)) < 0.4, 1.5, -np.inf)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights(options, dtype):
    """Values that are the unit vectors make attention return its weights."""
    q, k, _ = random_qkv(2, 4, 13, 20, 8, kv_heads=2, dtype=dtype)
    unit = np.broadcast_to(np.eye(20), (2, 2, 20, 20))
    expected, _ = expected_attention(q, k, unit, **options)
    weights = fastattn.attention_weights(q, k, **options)
    assert weights.dtype == np.float32 and weights.shape == (2, 4, 13, 20)
    np.testing.assert_allclose(weights, expected, atol=1e-6)
    np.testing.assert_array_equal(weights == 0, expected.astype(np.float32) == 0)


@pytest.mark.parametrize("rank", [2, 3])
def test_ranks(rank):
    q, k, _ = (x[(0,) * (4 - rank)] for x in random_qkv(1, 2, 13, 20, 8))
    weights = fastattn.attention_weights(q, k)
    assert weights.shape == (*q.shape[:-1], 20)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-6)


def test_they_are_the_weights_of_attention():
    q, k, v = random_qkv(1, 2, 30, 50, 8)
    weights = fastattn.attention_weights(q, k, causal=True)
    np.testing.assert_allclose(weights @ v, fastattn.attention(q, k, v, causal=True), atol=1e-6)


def test_hidden_poison_has_no_weight():
    q, k, _ = random_qkv(1, 1, 10, 10, 8)
    k[0, 0, 6] = np.nan
    weights = fastattn.attention_weights(q, k, causal=True)
    assert np.isfinite(weights[0, 0, :6]).all() and np.isnan(weights[0, 0, 6:, :7]).all()
    assert not np.triu(weights[0, 0], 1).any()


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
@pytest.mark.parametrize("dtype", DTYPES)
def test_mass(options, dtype):
    q, k, _ = random_qkv(2, 4, 13, 20, 8, kv_heads=2, dtype=dtype)
    segments = np.random.default_rng(0).integers(-1, 3, (2, 20))
    weights = fastattn.attention_weights(q, k, **options)
    expected = np.stack(
        [np.where(segments[:, None, None] == n, weights, 0).sum(axis=-1, dtype=np.float64) for n in range(4)], axis=-1
    )
    mass = fastattn.attention_mass(q, k, segments, num_segments=4, **options)
    assert mass.dtype == np.float32 and mass.shape == (2, 4, 13, 4)
    np.testing.assert_allclose(mass, expected, atol=1e-6)
    assert not mass[..., 3].any()


@pytest.mark.parametrize("rank", [2, 3])
def test_mass_of_one_table_of_segments(rank):
    q, k, _ = (x[(0,) * (4 - rank)] for x in random_qkv(1, 2, 13, 20, 8))
    mass = fastattn.attention_mass(q, k, np.arange(20) >= 15)
    assert mass.shape == (*q.shape[:-1], 2)
    weights = fastattn.attention_weights(q, k)
    np.testing.assert_allclose(mass, np.stack([weights[..., :15].sum(-1), weights[..., 15:].sum(-1)], axis=-1), atol=1e-6)
    assert fastattn.attention_mass(q, k, np.full(20, -1)).shape == (*q.shape[:-1], 0)


def test_padding_on_either_side():
    """The weights are the attention to values of one key each, and nothing in a row that is padding."""
    q, k, _ = random_qkv(2, 4, 5, 9, 8, kv_heads=2)
    one_each = np.broadcast_to(np.eye(9, dtype=np.float32), (2, 2, 9, 9))
    options = {"kv_starts": [2, 0], "kv_lengths": [9, 6], "q_lengths": [3, 5], "causal": True}
    expected = fastattn.attention(q, k, one_each, **options)
    np.testing.assert_allclose(fastattn.attention_weights(q, k, **options), expected, atol=1e-6)
    assert (fastattn.attention_scores(q, k, stage="bias", **options)[0, :, 3:] == -np.inf).all()
    assert not expected[0, :, 3:].any() and expected[1].any()
