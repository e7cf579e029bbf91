"""What the numbers may be: large, tiny, far apart, alike, NaN and inf, on every engine."""

import numpy as np
import pytest
from inputs import DTYPES, dtype_of, random_qkv
from oracle import assert_matches, check

import fastattn

pytestmark = pytest.mark.usefixtures("engine")

INF, NAN = np.inf, np.nan


# Large, tiny, and all alike


@pytest.mark.parametrize("magnitude", [30, 100, 1e4])
@pytest.mark.parametrize("causal", [False, True])
def test_large_logits(magnitude, causal):
    q, k, v = random_qkv(1, 2, 60, 700, 32)
    assert_matches(q, k, v, scale=magnitude / np.sqrt(32), causal=causal)


SIZES_APART = {
    "some queries are large": lambda q, k, v: (q * np.where(np.arange(90) % 7 == 3, 40, 1)[:, None], k, v),
    "some queries are tiny": lambda q, k, v: (q * np.where(np.arange(90) % 7 == 3, 2.0**-12, 1)[:, None], k, v),
    "a query and a key are 0": lambda q, k, v: (q * (np.arange(90) != 5)[:, None], k * (np.arange(200) != 5)[:, None], v),
    "some keys are large": lambda q, k, v: (q, k * np.where(np.arange(200) % 9 == 3, 40, 1)[:, None], v),
    "some keys are tiny": lambda q, k, v: (q, k * np.where(np.arange(200) % 9 == 3, 2.0**-12, 1)[:, None], v),
    "keys have a large number": lambda q, k, v: (q, k + 30 * (np.arange(64) == 7), v),
    "both have a large number": lambda q, k, v: (q + 5 * (np.arange(64) == 7), k + 30 * (np.arange(64) == 7), v),
    "the first value is small": lambda q, k, v: (q, k, v * np.where(np.arange(200) == 0, 0.01, 1)[:, None]),
    "no value is like another": lambda q, k, v: (q, k, v * np.exp2(np.arange(200) * 77 % 25 - 12)[:, None]),
    "later values are large": lambda q, k, v: (q, k, v * np.where(np.arange(200) < 90, 1, 500)[:, None]),
    "values have a large number": lambda q, k, v: (q, k, v * np.where(np.arange(64) == 7, 50, 1)),
    "all are large": lambda q, k, v: (q * 2**7, k * 2**7, v * 2**7),
    "all are tiny": lambda q, k, v: (q * 2.0**-12, k * 2.0**-12, v * 2.0**-12),
    "values are next to nothing": lambda q, k, v: (q, k, v * 2.0**-100),
    "products are subnormal": lambda q, k, v: (q, k, v * 2.0**-120),
}


@pytest.mark.parametrize("how", SIZES_APART)
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_of_very_different_size(engine, how, dtype):
    """What one row sees must be exact whatever its neighbours are, in memory or in a tile; causal, so that they differ."""
    q, k, v = (x.astype(dtype_of(dtype)) for x in SIZES_APART[how](*random_qkv(1, 2, 90, 200, 64)))
    if how == "products are subnormal" and fastattn.explain(q, k, v)["kernel"].startswith("bfloat16_"):
        # VDPBF16PS and the tiles of AMX take subnormal numbers for 0, in operands and in results: up to 2**-126 a key is lost.
        out = fastattn.attention(q, k, v).astype(np.float64)
        wide = fastattn.attention(*(x.astype(np.float32) * np.float32(2.0**100) ** (x is v) for x in (q, k, v)))
        np.testing.assert_allclose(out, wide.astype(np.float64) * 2.0**-100, rtol=0, atol=200 * 2.0**-126)
        return
    assert_matches(q, k, v)
    assert_matches(q, k, v, causal=True, query_offset=0)
    few = q[:, :, :30]  # a maximum over rows that see little
    assert_matches(few, k, v, causal=True, query_offset=0)


OVERFLOWS = {  # the shape, kv_heads and keywords of a call
    "one query": ((1, 2, 1, 400, 16), 2, {}),
    "few queries": ((1, 4, 3, 400, 16), 2, {"mask": np.arange(400) % 3 != 1}),
    "few queries, keys in parts": ((1, 4, 1, 5000, 24), 1, {"kv_lengths": np.array([4500])}),
    "many queries": ((2, 2, 70, 400, 17), 2, {"causal": True}),
    "many queries, keys in parts": ((1, 2, 40, 3000, 8), 1, {"window": (2500, 0)}),
    "with a sink": ((1, 2, 20, 100, 8), 2, {"sinks": np.float32([1, -1]), "softcap": 2.0}),
    "blocks": ((1, 2, 96, 96, 8), 2, {"mask": fastattn.BlockMask.strided(96, stride=20, block_size=16)}),
}


@pytest.mark.parametrize("how", OVERFLOWS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_that_overflow_have_means_that_do_not(how, dtype):
    """Of numbers near the largest, some columns alike, some of both signs, beside columns of ordinary, tiny and infinite ones."""
    shape, kv_heads, keywords = OVERFLOWS[how]
    q, k, v = random_qkv(*shape, kv_heads=kv_heads, dtype=dtype)
    largest = np.float32(3.3895314e38 if dtype == "bfloat16" else 3.4028235e38)
    v[..., 0] = largest
    v[..., 1] = -largest
    v[..., 2:4] = (np.sign(v[..., 2:4].astype(np.float32)) * 3e38).astype(v.dtype)
    v[..., 4] = 1e-30
    v[0, 0, shape[3] // 2, 5] = INF
    if isinstance(keywords.get("mask"), fastattn.BlockMask):
        dense = keywords["mask"].to_dense()
        out = fastattn.attention(q, k, v, **keywords)
        check(out, None, q, k, v, mask=np.broadcast_to(dense, (*q.shape[:3], k.shape[2])))
    else:
        out, _ = assert_matches(q, k, v, **keywords)
    # Columns are judged apart, for against the large ones the others' errors are nothing.
    ordinary = fastattn.attention(q, k, v[..., 4:], **keywords)
    for got, expected in zip(np.moveaxis(out[..., 4:], -1, 0), np.moveaxis(ordinary, -1, 0)):
        got, expected = got.astype(np.float64), expected.astype(np.float64)
        size = np.abs(expected[np.isfinite(expected)]).max(initial=0)
        np.testing.assert_allclose(got, expected, rtol=0, atol=size * (2**-7 if dtype == "bfloat16" else 1e-6))


def test_logits_that_grow_along_the_keys():
    """The running maximum moves in every tile, by so much that the earlier weights vanish."""
    q, k, v = random_qkv(1, 1, 20, 1500, 8)
    ramp = np.linspace(-1e4, 1e4, 1500, dtype=np.float32)
    assert_matches(q, k, v, mask=np.ascontiguousarray(np.broadcast_to(ramp, (20, 1500))))
    assert_matches(q, k, v, mask=np.ascontiguousarray(np.broadcast_to(ramp[::-1], (20, 1500))))


@pytest.mark.parametrize("value", [-3.4028235e38, -1e9, -1e4, -104.0, -87.0, 88.0, 1e4, 3e38])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_that_are_all_alike(value, dtype):
    """Only differences between logits matter, wherever on the axis of float32 they are."""
    q, k, v = random_qkv(1, 1, 20, 300, 8, dtype=dtype)
    mask = np.full((20, 300), value, np.float32)
    out, lse = assert_matches(q, k, v, scale=0, mask=mask)
    np.testing.assert_allclose(lse, value + np.log(300), rtol=1e-6)
    if dtype == "float32":
        np.testing.assert_allclose(out, np.broadcast_to(v.mean(axis=2, keepdims=True), out.shape), atol=1e-6)
    mask[:, 100:] = -INF  # the first tiles alone
    assert_matches(q, k, v, scale=0, mask=mask)


@pytest.mark.parametrize("value", [0.1, -7.7, 77.7, 1e4])
@pytest.mark.parametrize("q_len", [1, 30])
def test_early_keys_do_not_fade(value, q_len):
    """Over hundreds of tiles in which the maximum stays, earlier weights are rescaled by exactly 1."""
    q, k, _ = random_qkv(1, 1, q_len, 20_000, 8)
    v = np.repeat(np.float32([1, 0]), 10_000)[:, None] + np.zeros((1, 1, 1, 3), np.float32)
    out = fastattn.attention(q, k, v, scale=0, mask=np.full((1, 20_000), value, np.float32))
    np.testing.assert_allclose(out, 0.5, atol=1e-6)


# NaN and inf


def hiding(how, visible):
    """The keyword that hides all but the keys [a, b), for one of the mechanisms that can."""
    a, b = visible
    sees = (np.arange(600) >= a) & (np.arange(600) < b)
    return {
        "causal": {"causal": True, "query_offset": b - 1},
        "window": {"window": (b - 1 - a, 0), "query_offset": b - 1},
        "window ahead": {"window": (0, b - 1 - a), "query_offset": a},
        "lengths": {"kv_lengths": b},
        "boolean mask": {"mask": sees},
        "float32 mask": {"mask": np.where(sees, np.float32(0.5), np.float32(-INF))},
        "float16 mask": {"mask": np.where(sees, np.float16(0.5), np.float16(-INF))},
        "float64 mask": {"mask": np.where(sees, 0.5, -INF)},
    }[how]


@pytest.mark.parametrize(
    "how", ["causal", "window", "window ahead", "lengths", "boolean mask", "float32 mask", "float16 mask", "float64 mask"]
)
@pytest.mark.parametrize("a, b", [(0, 13), (0, 300), (37, 95), (590, 600)])
@pytest.mark.parametrize("poison, dtype", [(NAN, "float32"), (INF, "float32"), (-INF, "float32"), (NAN, "float16")])
def test_hidden_keys_and_values_never_touch_the_result(how, a, b, poison, dtype):
    """Not by a bit."""
    if a and how in ("causal", "lengths"):
        pytest.skip("hides only what comes after")
    q, k, v = random_qkv(1, 2, 1, 600, 20, 12, dtype=dtype)
    keywords = hiding(how, (a, b))
    clean, clean_lse = assert_matches(q, k, v, **keywords)
    for x in (k, v):
        x[:, :, :a] = poison
        x[:, :, b:] = poison
    out, lse = fastattn.attention(q, k, v, return_lse=True, **keywords)
    np.testing.assert_array_equal(out, clean)
    np.testing.assert_array_equal(lse, clean_lse)


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("key", [0, 20, 39])
@pytest.mark.parametrize("dtype", DTYPES)
def test_poison_reaches_exactly_the_rows_that_see_it(poison, where, key, dtype):
    """Through causality, some rows of a tile see the poisoned key and their neighbours do not."""
    q, k, v = random_qkv(1, 2, 40, 40, 9, dtype=dtype)
    {"q": q, "k": k, "v": v}[where][0, 1, key, 3] = poison
    assert_matches(q, k, v, causal=True)
    assert_matches(q, k, v, mask=np.arange(40) != key)
    assert_matches(q, k, v, mask=np.tri(40, dtype=bool), sinks=np.zeros(2, np.float32))


@pytest.mark.parametrize("q_len", [1, 3, 8, 12])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("poison", [NAN, INF])
def test_poison_among_few_rows(poison, where, dtype, q_len):
    """As in decoding: the products of few rows are others than those of many."""
    q, k, v = random_qkv(1, 4, q_len, 150, 40, kv_heads=2, dtype=dtype)
    {"k": k, "v": v}[where][0, 1, 147, 3] = poison
    assert_matches(q, k, v, causal=True)
    assert_matches(q, k, v, mask=np.arange(150) != 147)
    assert_matches(q, k, v, kv_lengths=np.array([147]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_infinite_value_counts_whatever_its_weight(dtype):
    """2**-80 of infinity is infinity, where the key is visible."""
    q, k, v = random_qkv(1, 2, 40, 150, 16, dtype=dtype)
    bias = np.zeros((40, 150), np.float32)
    bias[:, 3] = -55
    v[:, :, 3, 5] = INF
    assert_matches(q, k, v, mask=bias)
    assert_matches(q, k, v, mask=bias, causal=True, query_offset=0)


@pytest.mark.parametrize("poison", [NAN, INF])
def test_poison_in_many_tiles(poison):
    q, k, v = random_qkv(1, 1, 70, 1300, 16)
    k[0, 0, 100] = poison
    v[0, 0, 900, 5] = poison
    assert_matches(q, k, v, window=(300, 0))
    assert_matches(q, k, v, causal=True)


@pytest.mark.parametrize("q_len", [1, 40])
def test_the_error_of_an_lse_is_relative_to_it(q_len):
    """At most 2**-22 * max(1, |lse|) where the scores are exact: each row has an lse of another size, -275 among them."""
    levels = np.array([-275, -0.001, 0, 3, 5e4, -3e38])[:, None, None] * np.linspace(0.5, 1, q_len)[:, None]
    bias = np.float32(levels) + np.zeros((1, 1, 1, 700), np.float32)
    bias[..., ::7] = -np.inf
    q, k, v = random_qkv(1, 6, q_len, 700, 8)
    q[:] = 0
    _, lse = fastattn.attention(q, k, v, mask=bias, return_lse=True)
    expected = np.float64(bias[..., 1]) + np.log(600)
    assert (np.abs(lse - expected) <= 2.0**-22 * np.maximum(1, np.abs(expected))).all()


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 20.0}, {"sinks": np.zeros(1, np.float32)}], ids=str)
def test_visible_scores_of_minus_inf_are_not_hidden_ones(options):
    """The plain formula: NaN where all scores are -inf, no weight where some are."""
    q, k, v = random_qkv(1, 1, 6, 50, 4)
    q = np.abs(q)
    k[...] = -INF
    out, _ = assert_matches(q, k, v, **options)
    if "softcap" not in options and "sinks" not in options:
        assert np.isnan(out).all()
    k[:, :, 30] = 1
    assert_matches(q, k, v, **options)
    k[:, :, 30] = INF
    assert_matches(q, k, v, **options)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_masks_that_hold_nan_and_inf(value, dtype):
    q, k, v = random_qkv(1, 1, 40, 40, 4)
    mask = np.zeros((40, 40), dtype)
    mask[20, 10] = mask[21, 30] = value
    out, _ = assert_matches(q, k, v, mask=mask, causal=True)
    assert np.isnan(out[0, 0, 20]).all() and np.isfinite(out[0, 0, 21]).all()
