"""Looking inside: weights of chosen heads and rows, scores, entropy, span, rollout, and the mass of many segments."""

import tracemalloc

import numpy as np
import pytest
from inputs import random_qkv

import fastattn

pytestmark = pytest.mark.usefixtures("backend")

RNG = np.random.default_rng(5)
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window and lengths": {"window": (20, 3), "kv_lengths": [90, 33], "query_offset": [70, 0]},
    "mask": {"mask": RNG.random((2, 1, 30, 90)) < 0.6},
    "bias": {"mask": RNG.standard_normal((4, 30, 90)), "softcap": 2.0, "scale": 0.3},
    "one column": {"mask": RNG.random((30, 1)) < 0.6},
    "sinks and slopes": {"causal": True, "sinks": [0.0, 1.0, 2.0, -np.inf], "alibi_slopes": fastattn.alibi_slopes(4)},
}
everywhere = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def arrays(dtype="float32"):
    return random_qkv(2, 4, 30, 90, 16, kv_heads=2, dtype=dtype)[:2]


@everywhere
def test_chosen_heads_and_rows_are_those_of_the_whole(options):
    q, k = arrays()
    for function in (fastattn.attention_weights, fastattn.attention_scores):
        whole = function(q, k, **options)
        some = function(q, k, heads=[3, -3], rows=[29, 4, 5, 6, 0, -2], **options)
        np.testing.assert_allclose(some, whole[:, [3, 1]][:, :, [29, 4, 5, 6, 0, 28]], atol=1e-6)
        np.testing.assert_allclose(function(q, k, heads=2, rows=slice(3, 20, 4), **options), whole[:, 2:3, 3:20:4], atol=1e-6)
        assert function(q, k, heads=[], rows=[], **options).shape == (2, 0, 0, 90)


def test_rows_of_a_long_sequence_do_not_cost_the_rest():
    q, k = (np.broadcast_to(x, (1, 8, 100_000, 4)) for x in RNG.standard_normal((2, 1, 8, 1, 4)).astype(np.float32))
    tracemalloc.start()
    weights = fastattn.attention_weights(q, k, heads=5, rows=[-1, 1000], causal=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(weights[0, 0, 0], 1e-5, rtol=1e-4)
    np.testing.assert_allclose(weights[0, 0, 1], np.where(np.arange(100_000) <= 1000, 1 / 1001, 0), atol=1e-8)
    assert peak < 20 << 20


@everywhere
def test_scores_become_the_weights(options):
    q, k = arrays()
    scores = fastattn.attention_scores(q, k, **options).astype(np.float64)
    weights = fastattn.attention_weights(q, k, **options)
    sinks = np.asarray(options.get("sinks", [-np.inf] * 4))[:, None, None]
    with np.errstate(invalid="ignore"):
        powers = np.exp(scores)
        expected = powers / (powers.sum(axis=-1, keepdims=True) + np.exp(sinks))
    np.testing.assert_allclose(weights, np.nan_to_num(expected), atol=1e-6)


def test_stages_of_scores():
    q, k = arrays()
    options = {"causal": True, "softcap": 0.5, "scale": 0.7, "mask": RNG.standard_normal((30, 90)).astype(np.float32)}
    raw = 0.7 * q @ np.repeat(k, 2, axis=1).swapaxes(-1, -2)
    np.testing.assert_allclose(fastattn.attention_scores(q, k, "raw", **options), raw, atol=1e-5)
    capped = 0.5 * np.tanh(raw / 0.5)
    np.testing.assert_allclose(fastattn.attention_scores(q, k, "softcap", **options), capped, atol=1e-5)
    seen = np.arange(90) <= np.arange(30)[:, None] + 60
    biased = np.where(seen, capped + options["mask"], -np.inf)
    np.testing.assert_allclose(fastattn.attention_scores(q, k, "bias", **options), biased, atol=1e-5)
    with pytest.raises(ValueError, match="stage must be one of .*got 'softmax'"):
        fastattn.attention_scores(q, k, "softmax")


@everywhere
def test_entropy_and_span(options):
    q, k = arrays()
    weights = fastattn.attention_weights(q, k, **options).astype(np.float64)
    total = weights.sum(axis=-1, keepdims=True)
    p = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(axis=-1)
    np.testing.assert_allclose(fastattn.attention_entropy(q, k, **options), entropy, atol=1e-5)
    offset = np.asarray(options.get("query_offset", [60, 60]))[:, None]
    distance = np.abs(np.arange(30) + offset)[:, None, :, None] * 0 + np.abs((np.arange(30) + offset)[:, None, :, None] - np.arange(90))
    np.testing.assert_allclose(fastattn.attention_span(q, k, **options), (p * distance).sum(axis=-1), rtol=1e-4, atol=1e-5)


def test_weights_of_quantised_keys_are_those_of_their_numbers():
    q, k, _ = random_qkv(1, 2, 5, 40, 32)
    for dtype in ("int8", "int4"):
        quantised = fastattn.quantize(k, dtype)
        for f in (fastattn.attention_weights, fastattn.attention_scores, fastattn.attention_entropy, fastattn.attention_span):
            np.testing.assert_allclose(f(q, quantised, causal=True), f(q, fastattn.dequantize(quantised), causal=True), atol=1e-6)


def test_entropy_of_even_weights_and_of_one_key():
    q, k = np.zeros((1, 2, 5, 8), np.float32), np.ones((1, 2, 7, 8), np.float32)
    np.testing.assert_allclose(fastattn.attention_entropy(q, k), np.log(7), rtol=1e-6)
    assert not fastattn.attention_entropy(q, k, window=(0, 0)).any()
    assert not fastattn.attention_span(q, k, window=(0, 0)).any()
    assert not fastattn.attention_entropy(q, k, kv_lengths=0).any()


def test_rank_is_that_of_q():
    q, k = arrays()
    assert fastattn.attention_weights(q[0], k[0], rows=0).shape == (4, 1, 90)
    assert fastattn.attention_scores(q[0, 0], k[0, 0]).shape == (1, 30, 90)[1:]
    assert fastattn.attention_entropy(q[0, 0], k[0, 0]).shape == (30,)


@pytest.mark.parametrize("name", ["heads", "rows"])
@pytest.mark.parametrize(
    "chosen, error", [(99, ValueError), ([0, -99], ValueError), (1.5, TypeError), ([[0]], TypeError), ("all", TypeError)]
)
def test_what_cannot_be_chosen(name, chosen, error):
    with pytest.raises(error, match=f"{name} must"):
        fastattn.attention_weights(*arrays(), **{name: chosen})


# Sums over segments


def summed(weights, segments, num_segments):
    mass = np.zeros((*weights.shape[:-1], num_segments))
    for b in range(len(weights)):
        for j, segment in enumerate(segments if segments.ndim == 1 else segments[b]):
            if segment >= 0:
                mass[b, :, :, segment] += weights[b, :, :, j]
    return mass


SEGMENTS = {
    "each key": np.arange(90),
    "runs": np.arange(90) * 70 // 90,
    "scattered": RNG.integers(-1, 80, 90),
    "of each entry": RNG.integers(-1, 80, (2, 90)),
    "some in none": np.where(np.arange(90) % 3, np.arange(90), -1),
}


@everywhere
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mass_of_many_segments(segments, options, dtype):
    q, k = arrays(dtype)
    mass = fastattn.attention_mass(q, k, segments, num_segments=90, **options)
    weights = fastattn.attention_weights(q, k, **options).astype(np.float64)
    assert mass.dtype == np.float32 and mass.shape == (2, 4, 30, 90)
    expected = summed(weights, segments, 90)
    np.testing.assert_allclose(mass, expected, atol=2e-6)
    counted = np.where(segments >= 0, weights, 0) if segments.ndim == 1 else expected
    np.testing.assert_allclose(mass.sum(axis=-1), counted.sum(axis=-1), atol=1e-6)


def test_mass_of_many_segments_through_a_block_mask():
    q, k = arrays()
    mask = fastattn.BlockMask.from_dense(RNG.random((30, 90)) < 0.5, block_size=16)
    mass = fastattn.attention_mass(q, k, np.arange(90), mask=mask)
    np.testing.assert_allclose(mass, fastattn.attention_weights(q, k, mask=mask), atol=2e-6)


def test_mass_of_as_many_segments_as_keys_needs_little_memory():
    q, k = random_qkv(1, 1, 2, 8192, 8)[:2]
    fastattn.attention_mass(q, k[:, :, :100], np.arange(100))
    tracemalloc.start()
    mass = fastattn.attention_mass(q, k, np.arange(8192))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(mass.sum(axis=-1), 1, atol=1e-6)
    assert peak < 8 << 20  # a table of all segments for all keys has 256 MiB


# Rollout


def test_rollout_is_the_paper_s_product():
    layers = [w / w.sum(axis=-1, keepdims=True) for w in RNG.random((3, 2, 4, 6, 6))]
    flow = fastattn.rollout(layers)
    mixed = [0.5 * w.mean(axis=1) + 0.5 * np.eye(6) for w in layers]
    np.testing.assert_allclose(flow, mixed[2] @ mixed[1] @ mixed[0], rtol=1e-5)
    np.testing.assert_allclose(flow.sum(axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(fastattn.rollout([w[0] for w in layers]), flow[0], rtol=1e-6)
    np.testing.assert_allclose(fastattn.rollout(layers, residual=1), np.broadcast_to(np.eye(6), (2, 6, 6)))
    np.testing.assert_allclose(fastattn.rollout([layers[0]], residual=0), layers[0].mean(axis=1), rtol=1e-6)


@pytest.mark.parametrize(
    "weights, keywords, message",
    [
        ([], {}, "1 layer or more"),
        ([np.ones((2, 3))], {}, r"weights\[0\] must have shape"),
        ([np.ones((3, 3)), np.ones((2, 4, 4))], {}, r"weights\[1\] must have the shape of weights\[0\]"),
        ([np.ones((3, 3))], {"residual": 2}, "residual must lie between 0 and 1; got 2"),
    ],
)
def test_rollout_names_mistakes(weights, keywords, message):
    with pytest.raises(ValueError, match=message):
        fastattn.rollout(weights, **keywords)
