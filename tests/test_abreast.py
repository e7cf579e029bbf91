"""Heads that lie beside each other in (batch, length, heads, head_dim) memory, which the native engine reads some at a time where each
has few rows, and as one panel where each has one: right, and bit for bit what any number of threads and each head in memory of its own
give."""

import numpy as np
import pytest
from inputs import DTYPES, random_qkv
from oracle import check

import fastattn

MANY = 2300  # keys: some blocks, and more than one part


def beside(x):
    """The same array in (B, L, H, D) memory."""
    return np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)


def compare(engine, arrays, **options):
    """Attention over heads beside each other, which is right and the same for any number of threads: they share out the heads."""
    views = [beside(x) for x in arrays]
    has_lse = options.get("activation", "softmax") == "softmax"

    def attend(arrays, threads):
        with fastattn.threads(threads):
            result = fastattn.attention(*arrays, return_lse=has_lse, **options)
        return result if has_lse else (result, None)

    out, lse = attend(views, 1)
    check(out, lse, *arrays, **options)
    others = [attend(views, 2), attend(views, 5)]
    if engine.backend == "native":
        others.append(attend(arrays, 1))
    for other_out, other_lse in others:
        np.testing.assert_array_equal(other_out, out)
        np.testing.assert_array_equal(other_lse, lse)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "q_len"), [(1, 1), (4, 1), (1, 5), (3, 4), (12, 1)], ids=str)
def test_any_number_of_heads(engine, dtype, group, q_len):
    for kv_heads in range(1, 10):
        shape = dict(batch=2, heads=kv_heads * group, kv_heads=kv_heads, q_len=q_len, head_dim=24, v_head_dim=40, dtype=dtype)
        compare(engine, random_qkv(kv_len=90, **shape), causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kv_heads", "group", "q_len"), [(9, 1, 1), (8, 1, 1), (8, 3, 1), (5, 2, 6), (7, 1, 12)], ids=str)
def test_keys_in_parts(engine, dtype, kv_heads, group, q_len):
    arrays = random_qkv(batch=2, heads=kv_heads * group, kv_heads=kv_heads, q_len=q_len, kv_len=MANY, head_dim=16, dtype=dtype)
    compare(engine, arrays, causal=True)


@pytest.mark.parametrize(("head_dim", "v_head_dim"), [(160, 160), (1, 3), (300, 16), (520, 520)], ids=str)
@pytest.mark.parametrize(("heads", "q_len"), [(7, 2), (8, 1)], ids=str)
def test_rows_of_any_size(engine, head_dim, v_head_dim, heads, q_len):
    """Fewer heads at a time of long rows; those of the longest are read alone."""
    compare(engine, random_qkv(2, heads, q_len, 300, head_dim, v_head_dim))


rng = np.random.default_rng(0)
BIAS = np.where(rng.random((3, 6, 4, MANY)) < 0.7, rng.standard_normal((3, 6, 4, MANY)), -np.inf).astype(np.float32)
RULES = {
    "ragged": dict(kv_lengths=[MANY, 0, 1030], kv_starts=[5, 0, 1029], causal=True),
    "few and many": dict(kv_lengths=[17, MANY, 600], q_lengths=[4, 1, 0], causal=True),
    "window": dict(window=(700, 3), query_offset=[0, 900, 5000]),
    "mask of a head": dict(mask=BIAS > 0, kv_lengths=[1, MANY, 900]),
    "bias": dict(mask=BIAS, kv_starts=[0, 1500, 3]),
    "bias of a sequence": dict(mask=BIAS[:, :1, :, :], sinks=np.linspace(-1, 3, 6, dtype=np.float32)),
    "sinks": dict(sinks=np.float32([0, -np.inf, 3, 1, 8, -4]), kv_lengths=[3, 0, MANY]),
    "scores": dict(softcap=1.5, alibi_slopes=np.linspace(0, 0.1, 6, dtype=np.float32), scale=-0.4, causal=True),
    "sigmoid": dict(activation="sigmoid", kv_lengths=[40, MANY, 0]),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize(("kv_heads", "q_len"), [(3, 4), (6, 4), (6, 1)], ids=str)
def test_every_rule(engine, dtype, rules, kv_heads, q_len):
    rules = dict(rules)
    if "mask" in rules:
        rules["mask"] = rules["mask"][:, :, :q_len]
    if "q_lengths" in rules:
        rules["q_lengths"] = np.minimum(rules["q_lengths"], q_len)
    compare(engine, random_qkv(batch=3, heads=6, kv_heads=kv_heads, q_len=q_len, kv_len=MANY, head_dim=16, dtype=dtype), **rules)


@pytest.mark.parametrize("kv_len", [70, MANY])
def test_hidden_numbers_of_one_head_and_visible_ones_of_another(engine, kv_len):
    q, k, v = random_qkv(batch=2, heads=8, q_len=3, kv_len=kv_len, head_dim=16)
    v[0, 1, -1] = np.nan  # the last query's only
    v[1, 2, 5:9, 3] = np.inf
    k[1, 4, -2] = np.inf
    v[0, 6, 30] = np.nan
    k[0, 7, kv_len // 2] = np.nan
    mask = np.ones((2, 8, 3, kv_len), bool)
    mask[0, 6, :, 30] = mask[0, 7, :, kv_len // 2] = False
    with np.errstate(invalid="ignore"):
        out = compare(engine, (q, k, v), causal=True, mask=mask)
    assert np.isfinite(out[0, [0, 2, 3, 4, 5, 6, 7]]).all() and np.isnan(out[0, 1, 2]).all()
    with np.errstate(invalid="ignore"):
        out = compare(engine, (q[:, :, 2:], k, v), mask=mask[:, :, 2:])
    assert np.isfinite(out[0, [0, 2, 3, 4, 5, 6, 7]]).all() and np.isnan(out[0, 1]).all()


@pytest.mark.parametrize("kv_len", [70, MANY])
@pytest.mark.parametrize("q_len", [1, 2])
def test_sums_of_one_head_that_leave_float32(engine, kv_len, q_len):
    """That head is computed again, the others beside it are not touched."""
    q, k, v = random_qkv(batch=1, heads=8, q_len=q_len, kv_len=kv_len, head_dim=16)
    v[:, 5] = small = np.abs(v[:, 5])
    usual = compare(engine, (q, k, v))
    v[:, 5] = np.ldexp(small, 125)
    out = fastattn.attention(q, *(beside(x) for x in (k, v)))
    np.testing.assert_array_equal(out[:, [0, 1, 2, 3, 4, 6, 7]], usual[:, [0, 1, 2, 3, 4, 6, 7]])
    out[:, 5], v[:, 5] = np.ldexp(out[:, 5], -125), small
    check(out, None, q, k, v)


@pytest.mark.parametrize("q_len", [1, 2])
def test_keys_beside_each_other_and_values_apart(engine, q_len):
    q, k, v = random_qkv(batch=2, heads=8, q_len=q_len, kv_len=MANY, head_dim=16)
    expected = compare(engine, (q, k, v))
    for arrays in ((q, beside(k), v), (q, k, beside(v)), (beside(q), beside(k)[:, ::-1][:, ::-1], beside(v))):
        out = fastattn.attention(*arrays)
        check(out, None, q, k, v)
        if engine.backend == "native":
            np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(("kv_heads", "q_len"), [(4, 2), (8, 1)], ids=str)
def test_an_entry_alone_and_in_company(engine, kv_heads, q_len):
    """How many heads are read together depends on the company, and no bit does."""
    q, k, v = (beside(x) for x in random_qkv(batch=5, heads=8, kv_heads=kv_heads, q_len=q_len, kv_len=MANY, head_dim=16))
    out = fastattn.attention(q, k, v, causal=True)
    for b in range(5):
        np.testing.assert_array_equal(fastattn.attention(*(x[b : b + 1] for x in (q, k, v)), causal=True), out[b : b + 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [{}, {"causal": True, "scale": -2}, {"window": (0, 0)}, {"sinks": np.float32([0.5])}, {"kv_lengths": [0, 1] * 6}]
)
def test_entries_of_one_token(engine, dtype, options):
    """They are as heads beside each other to the native engine, if nothing tells them apart."""
    q, k, v = random_qkv(batch=24, heads=1, q_len=1, kv_len=1, head_dim=24, v_head_dim=40, dtype=dtype)
    for arrays in ((q[:12], k[:12], v[:12]), (q[::2], k[::-2], v[:1].repeat(12, axis=0)), (q[12:, :, :, ::-1], k[12:], v[::-1][:12])):
        out, lse = fastattn.attention(*arrays, return_lse=True, **options)
        check(out, lse, *arrays, **options)
        lengths = options.get("kv_lengths", [1] * 12)
        for b in range(12):
            own = options | ({"kv_lengths": lengths[b : b + 1]} if "kv_lengths" in options else {})
            alone = fastattn.attention(*(x[b : b + 1] for x in arrays), return_lse=True, **own)
            np.testing.assert_array_equal(alone[0], out[b : b + 1])
            np.testing.assert_array_equal(alone[1], lse[b : b + 1])
