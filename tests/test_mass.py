"""attention_mass on every engine: sums of weights over segments, which no number of segments makes more than the result."""

import numpy as np
import pytest
from inputs import random_qkv

import fastattn

pytestmark = pytest.mark.usefixtures("engine")

RNG = np.random.default_rng(9)
ROWS = [1, 6, 20, 130]  # each way of taking rows
KEYS = 700
SEGMENTS = {
    "few": np.arange(KEYS) * 5 // KEYS,
    "each key": np.arange(KEYS),
    "backwards": np.arange(KEYS)[::-1],
    "scattered": RNG.integers(-1, 300, KEYS),
    "of each entry": RNG.integers(-1, 9, (2, KEYS)),
    "none": np.full(KEYS, -1),
}
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "steep": {"alibi_slopes": np.float32([2.0, 0.5]), "causal": True},
    "rising": {"mask": np.linspace(-400, 400, KEYS, dtype=np.float32)},
    "falling": {"mask": np.linspace(400, -400, KEYS, dtype=np.float32)},
    "hidden": {"mask": np.arange(KEYS) % 7 > 9},
    "lengths": {"kv_starts": [3, 0], "kv_lengths": [600, 65], "sinks": [1.0, -np.inf]},
    "sigmoid": {"activation": "sigmoid"},
}


def expected_mass(weights, segments, count):
    """The sums of float64 weights by the definition."""
    mass = np.zeros((*weights.shape[:-1], count))
    for b, of_keys in enumerate(np.broadcast_to(segments, (len(weights), KEYS))):
        mass[b] = weights[b] @ (of_keys[:, None] == np.arange(count))
    return mass


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("q_len", ROWS)
def test_mass_of_any_segments(q_len, options):
    q, k, _ = random_qkv(2, 2, q_len, KEYS, 16, kv_heads=1)
    weights = fastattn.attention_weights(q, k, **options).astype(np.float64)
    for name, segments in SEGMENTS.items():
        mass = fastattn.attention_mass(q, k, segments, num_segments=KEYS, **options)
        np.testing.assert_allclose(mass, expected_mass(weights, segments, KEYS), atol=5e-6, err_msg=name)
        if (segments >= 0).all():  # the share of the keys is that of the row
            np.testing.assert_allclose(mass.sum(axis=-1), weights.sum(axis=-1), atol=1e-6, err_msg=name)


def test_rows_that_see_nothing_and_padding():
    q, k, _ = random_qkv(2, 2, 20, KEYS, 16)
    mass = fastattn.attention_mass(q, k, np.arange(KEYS) % 3, q_lengths=[20, 7], causal=True, query_offset=-5)
    assert not mass[:, :, :5].any() and not mass[1, :, 7:].any()
    np.testing.assert_allclose(mass[0, :, 5:].sum(axis=-1), 1, atol=1e-6)


def test_a_visible_nan_reaches_its_rows_alone():
    q, k, _ = random_qkv(1, 1, 20, KEYS, 16)
    k[..., 10, :] = np.nan
    mass = fastattn.attention_mass(q, k, np.arange(KEYS), causal=True, query_offset=0)
    assert np.isnan(mass[0, 0, 10:]).all() and np.isfinite(mass[0, 0, :10]).all()


@pytest.mark.parametrize("q_len", ROWS)
def test_bits_depend_on_neither_threads_nor_company(q_len):
    q, k, _ = random_qkv(3, 4, q_len, KEYS, 16, kv_heads=2)
    segments = SEGMENTS["scattered"]
    with fastattn.threads(1):
        alone = [fastattn.attention_mass(q[b : b + 1], k[b : b + 1], segments, num_segments=300) for b in range(3)]
    with fastattn.threads(3):
        np.testing.assert_array_equal(fastattn.attention_mass(q, k, segments, num_segments=300), np.concatenate(alone))


@pytest.mark.parametrize("q_len", ROWS)
def test_packed_sequences_are_what_they_are_alone(q_len):
    q, k, _ = random_qkv(1, 4, 2 * q_len + 3, 3 * 90, 16, kv_heads=2)
    q, k = q[0].swapaxes(0, 1), k[0].swapaxes(0, 1)
    starts_q, starts_k = [0, q_len, q_len, 2 * q_len, 2 * q_len + 3], [0, 70, 80, 250, 270]
    segments = SEGMENTS["scattered"][: len(k)]
    options = {"causal": True, "kv_starts": [2, 0, 30, 20]}
    mass = fastattn.attention_mass(q, k, segments, num_segments=300, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, **options)
    assert mass.shape == (len(q), 4, 300)
    for b, start in enumerate(options["kv_starts"]):
        rows, keys = slice(*starts_q[b : b + 2]), slice(*starts_k[b : b + 2])
        own = q[rows].swapaxes(0, 1)[None], k[keys].swapaxes(0, 1)[None]
        alone = fastattn.attention_mass(*own, segments[keys], num_segments=300, causal=True, kv_starts=start)
        np.testing.assert_array_equal(mass[rows], alone[0].swapaxes(0, 1))


@pytest.mark.parametrize("dtype, rotate", [("float32", False), ("bfloat16", False), ("int8", False), ("int8", True)])
@pytest.mark.parametrize("q_len", ROWS[:3])
def test_caches(q_len, dtype, rotate):
    """As arrays of what they hold, whose weights an oracle makes."""
    lengths = np.array([130, 90, 40])
    q, k, v = random_qkv(3, 4, q_len, 130, 32, kv_heads=2)
    segments = np.stack([np.arange(130) // 10, np.arange(130) % 5, np.full(130, -1)])
    cache = fastattn.KVCache(3, 2, 160, 32, dtype=dtype, rotate=rotate)
    cache.append(k, v, lengths=lengths)
    pool = fastattn.PagedKVCache(40, 16, 2, 32, dtype=dtype, rotate=rotate)
    sequences = [pool.new_sequence() for _ in lengths]
    real = np.arange(130) < lengths[:, None]
    pool.append(sequences, k.swapaxes(1, 2)[real], v.swapaxes(1, 2)[real], np.cumsum([0, *lengths]))

    mass = cache.attention_mass(q, segments, num_segments=13)
    weights = fastattn.attention_weights(q, k, kv_lengths=lengths, causal=True)
    expected = np.stack([w @ (of[:, None] == np.arange(13)) for w, of in zip(weights, segments)])
    np.testing.assert_allclose(mass, expected, atol={"float32": 5e-6, "bfloat16": 0.02, "int8": 0.02}[dtype])
    paged = pool.attention_mass(sequences, q.swapaxes(1, 2).reshape(-1, 4, 32), segments[real], num_segments=13)
    np.testing.assert_array_equal(paged.reshape(3, q_len, 4, 13).swapaxes(1, 2), mass)


def test_mistakes_with_caches_and_packed_sequences():
    q, k, _ = random_qkv(1, 2, 4, 9, 16)
    ring = fastattn.KVCache(1, 2, 16, 16, window=4)
    with pytest.raises(ValueError, match="not for a ring"):
        ring.attention_mass(q, np.zeros(0, int))
    cache = fastattn.KVCache(1, 2, 16, 16, dtype="float32")
    cache.append(k, k)
    with pytest.raises(ValueError, match=r"segments must have shape \(9,\) or \(1, 9\); got \(16,\)"):
        cache.attention_mass(q, np.zeros(16, int))
    with pytest.raises(TypeError, match=r"attention_mass\(\) has no argument kv_lengths"):
        cache.attention_mass(q, np.zeros(9, int), kv_lengths=3)
    pool = fastattn.PagedKVCache(4, 4, 2, 16)
    with pytest.raises(ValueError, match=r"segments must have shape \(0,\); got \(9,\)"):
        pool.attention_mass([pool.new_sequence()], q[0].swapaxes(0, 1), np.zeros(9, int))
    packed = q[0].swapaxes(0, 1), k[0].swapaxes(0, 1), np.zeros(9, int)
    with pytest.raises(ValueError, match="must be given together"):
        fastattn.attention_mass(*packed, cu_seqlens_q=[0, 4])
    with pytest.raises(ValueError, match="mask must be None with cu_seqlens"):
        fastattn.attention_mass(*packed, cu_seqlens_q=[0, 4], cu_seqlens_k=[0, 9], mask=np.ones((4, 9), bool))
    with pytest.raises(ValueError, match="cu_seqlens_k must"):
        fastattn.attention_mass(*packed, cu_seqlens_q=[0, 4], cu_seqlens_k=[0, 8])


def test_shapes_without_elements():
    q, k, _ = random_qkv(1, 2, 5, KEYS, 16)
    none = np.zeros(0, int)
    assert not fastattn.attention_mass(q, k[:, :, :0], none, num_segments=4).any()
    assert fastattn.attention_mass(q, k[:, :, :0], none).shape == (1, 2, 5, 0)
    assert fastattn.attention_mass(q[:, :, :0], k, SEGMENTS["few"]).shape == (1, 2, 0, 5)
    with pytest.raises(ValueError, match="num_segments must be less than 2147483648"):
        fastattn.attention_mass(q[:, :, :0], k, SEGMENTS["few"], num_segments=2**31)
