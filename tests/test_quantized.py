"""Quantised keys and values: what is stored, attention over it, and caches of it."""

import numpy as np
import pytest
from inputs import dtype_of, read_only
from oracle import attention as by_definition, check

import fastattn
from fastattn import _quantized, runtime

KINDS = ("int8", "int4")
DIMS = {"int8": (1, 7, 16, 19, 33, 64, 65, 80, 128, 200), "int4": (32, 64, 96, 128, 160)}


def numbers(shape, kind="random", seed=0):
    """Keys as they are found: of one size, with scores that single out a few, or with one channel of 20 times the others."""
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    if kind == "peaked":
        x[..., ::7, :] *= 6
    if kind == "outliers":
        x[..., x.shape[-1] // 3] *= 20
    return x


def quantized(kind, *shapes, seed=0):
    """Quantised rows, and the numbers that they stand for."""
    rows = [fastattn.quantize(numbers(shape, seed=seed + n), kind) for n, shape in enumerate(shapes)]
    return [*rows, *map(fastattn.dequantize, rows)]


def seen_by(q, rows, *wide):
    """The numbers that queries attend to: rounded, as is documented, where VDPBF16PS multiplies them with many queries of bfloat16."""
    shared = q.shape[1] // rows.shape[1] * q.shape[2] > 48
    rounded = shared and fastattn.explain(q, rows, rows)["kernel"] == "bfloat16_avx512"
    return [x.astype(q.dtype) for x in wide] if rounded else wide


# What is stored


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_rows_are_those_of_the_definition(engine, kind, rotate, dtype):
    for dim in DIMS[kind]:
        if rotate and _quantized.block_of(dim) < 16:
            continue
        x = numbers((2, 3, 50, dim))
        x[0, 0, :10:2] = np.float32([0, 1e-41, 3e4, 1e-7, 5.8e-7])[:, None] * np.sign(x[0, 0, :10:2])  # the last: a scale that is far off
        x = x.astype(dtype_of(dtype))
        rows = fastattn.quantize(read_only(x)[:, :, ::2], kind, rotate=rotate)
        wide = x[:, :, ::2].astype(np.float32)
        expected = _quantized.encoded(_quantized.turned(wide) if rotate else wide, kind)
        assert rows.shape == (2, 3, 25, 1)
        np.testing.assert_array_equal(rows, expected)
        assert rows.nbytes == 150 * (dim + 4 if kind == "int8" else dim * 9 // 16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["random", "peaked", "outliers"])
def test_a_number_is_kept_to_half_a_scale(engine, kind, what):
    x = numbers((4, 2, 70, 96), what)
    size = 96 if kind == "int8" else 32
    kept = fastattn.dequantize(fastattn.quantize(x, kind))
    groups, off = (y.reshape(*y.shape[:-1], -1, size) for y in (x, kept - x))
    scale = np.abs(groups).max(axis=-1, keepdims=True) / (127 if kind == "int8" else 7)
    bound = scale / 2 * (1 + 1e-5) + (np.abs(groups) * 2.0**-11 if kind == "int4" else 0)
    assert (np.abs(off) <= bound).all()


def test_turning_is_orthonormal_and_undoes_itself():
    for dim in (16, 48, 64, 80, 128, 192):
        x = numbers((3, dim))
        once = _quantized.turned(x)
        np.testing.assert_allclose(np.linalg.norm(once, axis=1), np.linalg.norm(x, axis=1), rtol=1e-6)
        np.testing.assert_allclose(_quantized.turned(once), x, atol=1e-5)
        block = _quantized.block_of(dim)
        signs = np.array([[(-1) ** (i & j).bit_count() for j in range(block)] for i in range(block)])
        expected = x.reshape(3, -1, block).astype(np.float64) @ signs / np.sqrt(block)
        np.testing.assert_allclose(once, expected.reshape(3, dim), atol=1e-5)


# Attention

PAIRS = [("int8", "int8"), ("int4", "int4"), ("int8", "int4"), ("int4", "int8")]  # keys, values


@pytest.mark.parametrize(
    ("kind", "dims"), [("int8", (19, 33)), ("int8", (64, 64)), ("int8", (128, 80)), ("int4", (32, 64)), ("int4", (128, 96))]
)
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (1, 37), (1, 300), (1, 5000), (3, 65), (5, 2500), (13, 100), (64, 190), (9, 16)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_attention_is_that_over_the_numbers(engine, kind, dims, q_len, kv_len, dtype):
    k, v, wide_k, wide_v = quantized(kind, (1, 2, kv_len, dims[0]), (1, 2, kv_len, dims[1]))
    q = numbers((1, 6, q_len, dims[0]), seed=9).astype(dtype_of(dtype))
    for options in ({}, {"causal": True, "softcap": 2.0}) if kv_len < 2000 else ({},):
        out, lse = fastattn.attention(q, k, v, return_lse=True, **options)
        check(out, lse, q, *seen_by(q, k, wide_k, wide_v), **options)


@pytest.mark.parametrize("kinds", [("int8", "int4"), ("int4", "int8")])
@pytest.mark.parametrize("dims", [(64, 64), (128, 96)])
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (1, 300), (1, 5000), (3, 65), (13, 100), (64, 190)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keys_and_values_of_different_bits(engine, kinds, dims, q_len, kv_len, dtype):
    (k, wide_k), (v, wide_v) = (quantized(kind, (1, 2, kv_len, dim), seed=dim) for kind, dim in zip(kinds, dims))
    q = numbers((1, 6, q_len, dims[0]), seed=9).astype(dtype_of(dtype))
    out, lse = fastattn.attention(q, k, v, causal=True, return_lse=True)
    check(out, lse, q, *seen_by(q, k, wide_k, wide_v), causal=True)


@pytest.mark.parametrize("kinds", PAIRS)
@pytest.mark.parametrize("dims", [(64, 32), (128, 160)])
@pytest.mark.parametrize("spread", [8, 16, 24, 60])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_queries_whose_numbers_are_far_apart(engine, kinds, dims, spread, dtype):
    """Most numbers are down to ``2**-spread`` of the largest, where keys are 0: nothing but the small ones decides."""
    spread = min(spread, 20) if dtype == "float16" else spread
    k, v = numbers((1, 2, 200, dims[0])), numbers((1, 2, 200, dims[1]), seed=1)
    k[..., 5] = 0
    k, v = (fastattn.quantize(x, kind) for x, kind in zip((k, v), kinds))
    q = numbers((1, 6, 3, dims[0]), seed=9) * 2.0 ** -np.random.default_rng(2).integers(0, spread, (1, 6, 3, dims[0]))
    q[..., 5] = [[30, 2, 1e-3]]
    q[:, 1, :, ::3] = 0
    q = q.astype(dtype_of(dtype))
    for scale in (0.2, 4.0):
        out, lse = fastattn.attention(q, k, v, scale=scale, return_lse=True)
        check(out, lse, q, *map(fastattn.dequantize, (k, v)), scale=scale)


@pytest.mark.parametrize("kinds", PAIRS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scales_may_be_anything(engine, kinds, dtype):
    """Of a caller's own rows: negative, tiny, zero, or not finite."""
    k, v = (fastattn.quantize(numbers((1, 2, 150, 160), seed=n), kind) for n, kind in enumerate(kinds))
    name = v.dtype.names[1]
    v[name][:, :, 3] *= -1
    v[name][:, 1, 70:130] = 1e-7
    q = numbers((1, 4, 3, 160), seed=9).astype(dtype_of(dtype))
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    check(out, lse, q, *map(fastattn.dequantize, (k, v)))
    v[name][:, :, 100] = np.inf
    seen = np.arange(150) < 100
    hidden = fastattn.attention(q, k, v, mask=seen)
    np.testing.assert_array_equal(hidden, fastattn.attention(q, k[:, :, :100], v[:, :, :100]))
    assert not np.isfinite(fastattn.attention(q, k, v).astype(np.float32)).any()
    k[k.dtype.names[1]][:, 1, 2] = np.nan
    q[:, 0, 1, 7] = np.nan
    nan = np.isnan(fastattn.attention(q, k, v, mask=seen).astype(np.float32)).all(axis=-1)
    np.testing.assert_array_equal(nan, [[[False, True, False], [False] * 3, [True] * 3, [True] * 3]])


@pytest.mark.parametrize("kinds", PAIRS)
@pytest.mark.parametrize("q_len", [1, 4, 40])
def test_rules_hold(engine, kinds, q_len):
    (k, wide_k), (v, wide_v) = quantized(kinds[0], (2, 2, 150, 64)), quantized(kinds[1], (2, 2, 150, 32), seed=1)
    q = numbers((2, 4, q_len, 64), seed=9)
    rng = np.random.default_rng(1)
    for options in (
        {"mask": rng.random((2, 1, q_len, 150)) < 0.3},
        {"mask": rng.standard_normal((q_len, 150)).astype(np.float32), "causal": True},
        {"kv_lengths": [150, 77], "kv_starts": [3, 20], "window": (40, 2)},
        {"alibi_slopes": np.float32([0.1, 0.2, 0.3, 0.4]), "sinks": np.float32([0, 1, -1, 2]), "scale": -0.3},
    ):
        out, lse = fastattn.attention(q, k, v, return_lse=True, **options)
        check(out, lse, q, wide_k, wide_v, **options)
    for activation in ("sigmoid", "relu"):
        out = fastattn.attention(q, k, v, activation=activation, causal=True)
        expected = fastattn.attention(q, wide_k, wide_v, activation=activation, causal=True)
        np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.parametrize("kinds", PAIRS)
@pytest.mark.parametrize("q_len", [1, 40])
def test_what_is_hidden_is_not_touched_and_what_is_seen_comes_through(engine, kinds, q_len):
    k, v = (quantized(kind, (1, 1, 90, 64), seed=n)[0] for n, kind in enumerate(kinds))
    q = numbers((1, 2, q_len, 64), seed=9)
    seen = np.ones(90, bool)
    seen[[3, 20, 89]] = False
    clean = fastattn.attention(q, k, v, mask=seen)
    for rows in (k, v):
        rows[rows.dtype.names[1]][:, :, [3, 20, 89]] = np.nan
    np.testing.assert_array_equal(fastattn.attention(q, k, v, mask=seen), clean)
    v[v.dtype.names[1]][:, :, 5] = np.nan
    assert np.isnan(fastattn.attention(q, k, v, mask=seen)).all()


@pytest.mark.parametrize("kinds", PAIRS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_depend_on_neither_threads_nor_company_nor_pages(engine, kinds, dtype):
    k, v = (quantized(kind, (3, 2, 2500, dim), seed=dim)[0] for kind, dim in zip(kinds, (64, 96)))
    for q_len in (1, 20):
        q = numbers((3, 4, q_len, 64), seed=9).astype(dtype_of(dtype))
        lengths = [2500, 1, 1100]
        out = fastattn.attention(q, k, v, kv_lengths=lengths, causal=True)
        with fastattn.threads(3):
            np.testing.assert_array_equal(fastattn.attention(q, k, v, kv_lengths=lengths, causal=True), out)
        for b, n in enumerate(lengths):
            alone = fastattn.attention(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], causal=True)
            np.testing.assert_array_equal(alone, out[b : b + 1])
        # (B, L, H, 1), in pages of 7 tokens that are handed out backwards, and one sequence after the other
        packed = np.ascontiguousarray(q.swapaxes(1, 2)).reshape(-1, 4, 64)
        pages, tables = [], []
        for rows in (k, v):
            padded = np.zeros((3, 2506, 2, 1), rows.dtype)
            padded[:, :2500] = rows.swapaxes(1, 2)
            pages.append(padded.reshape(-1, 7, 2, 1)[::-1].copy())
        tables = np.arange(3 * 358)[::-1].reshape(3, 358)
        paged = fastattn.paged_attention(packed, *pages, tables, lengths, causal=True)
        np.testing.assert_array_equal(paged.reshape(3, q_len, 4, 96).swapaxes(1, 2), out)
        of_all = [np.concatenate([rows[b].swapaxes(0, 1)[:n] for b, n in enumerate(lengths)]) for rows in (k, v)]
        varlen = fastattn.attention_varlen(packed, *of_all, np.arange(4) * q_len, np.cumsum([0, *lengths]), causal=True)
        np.testing.assert_array_equal(varlen, paged)


def test_values_of_any_size_have_a_mean(engine):
    v = np.full((1, 1, 3000, 16), 3e38, np.float32)
    rows = fastattn.quantize(v, "int8")
    for q_len in (1, 40):
        q = numbers((1, 1, q_len, 16))
        out = fastattn.attention(q, fastattn.quantize(v * 0, "int8"), rows)
        np.testing.assert_allclose(out, np.full_like(out, 3e38), rtol=1e-5)


# Caches


@pytest.mark.parametrize("kinds", PAIRS)
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cache_gives_attention_over_what_it_holds(engine, kinds, rotate, dtype):
    k, v = numbers((2, 2, 70, 64)), numbers((2, 2, 70, 96), seed=1)
    cache = fastattn.KVCache(2, 2, 80, 64, 96, kinds[0], v_dtype=kinds[1], rotate=rotate)
    cache.append(k[:, :, :30], v[:, :, :30])
    cache.append(k[:, :, 30:], v[:, :, 30:], lengths=[40, 25])
    turn = _quantized.turned if rotate else np.asarray
    held = [turn(fastattn.dequantize(fastattn.quantize(x, kind, rotate=rotate))) for x, kind in zip((k, v), kinds)]
    for q_len in (1, 20, 32):
        q = numbers((2, 4, q_len, 64), seed=9).astype(dtype_of(dtype))
        out, lse = cache.attend(q, return_lse=True)
        if rotate:  # turning there and back rounds
            expected, _ = by_definition(q, *held, causal=True, kv_lengths=[70, 55])
            tolerance = (4e-6 if dtype == "float32" else 2.0**-6) * np.abs(expected).max()
            np.testing.assert_allclose(out.astype(np.float64), expected, atol=tolerance)
            given = np.empty_like(out)
            assert cache.attend(q, out=given) is given
            np.testing.assert_array_equal(given, out)
        else:
            check(out, lse, q, *seen_by(q, cache._k, *held), causal=True, kv_lengths=[70, 55])
    assert cache.nbytes == 2 * 2 * 80 * ({"int8": 68, "int4": 36}[kinds[0]] + {"int8": 100, "int4": 54}[kinds[1]])
    assert (cache.dtype, cache.v_dtype) == tuple(_quantized.row_dtype(kind, dim) for kind, dim in zip(kinds, (64, 96)))
    assert all(kind in repr(cache) for kind in kinds)


@pytest.mark.parametrize("kinds", PAIRS)
@pytest.mark.parametrize("rotate", [False, True])
def test_a_pool_gives_what_a_cache_gives(engine, kinds, rotate):
    k, v = numbers((1, 2, 70, 64)), numbers((1, 2, 70, 64), seed=1)
    cache = fastattn.KVCache(1, 2, 80, 64, dtype=kinds[0], v_dtype=kinds[1], rotate=rotate)
    cache.append(k, v)
    pool = fastattn.PagedKVCache(12, 16, 2, 64, dtype=kinds[0], v_dtype=kinds[1], rotate=rotate)
    assert (pool.dtype, pool.v_dtype) == (cache.dtype, cache.v_dtype)
    assert all(kind in repr(pool) for kind in kinds)
    first = pool.new_sequence()
    pool.append([first], k[0].swapaxes(0, 1)[:50], v[0].swapaxes(0, 1)[:50])
    second = pool.fork(first)
    pool.append([second], k[0].swapaxes(0, 1)[50:], v[0].swapaxes(0, 1)[50:])
    q = numbers((1, 4, 3, 64), seed=9)
    out = pool.attend([second], np.ascontiguousarray(q[0].swapaxes(0, 1)))
    np.testing.assert_array_equal(out.swapaxes(0, 1)[None], cache.attend(q))
    both = np.concatenate([q[0].swapaxes(0, 1)] * 2)
    apart, together = (pool.attend([first, second], both, cascade=cascade) for cascade in (False, True))
    np.testing.assert_allclose(together, apart, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rotate", [False, True])
def test_a_ring_gives_what_a_full_cache_gives(engine, kind, rotate):
    k, v = numbers((1, 2, 90, 32)), numbers((1, 2, 90, 32), seed=1)
    ring = fastattn.KVCache(1, 2, 36, 32, dtype=kind, window=32, keep_first=4, rotate=rotate)
    full = fastattn.KVCache(1, 2, 90, 32, dtype=kind, rotate=rotate)
    for t in range(90):
        for cache in (ring, full):
            cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
    q = numbers((1, 2, 1, 32), seed=9)
    j = np.arange(90)
    np.testing.assert_allclose(ring.attend(q), full.attend(q, mask=(j < 4) | (j > 89 - 32)), atol=2e-6)


@pytest.mark.parametrize(("kind", "bounds"), [("int8", (0.01, 0.08)), ("int4", (0.16, 1.2))])
def test_documented_bounds_against_what_was_appended(engine, kind, bounds):
    """Scores by ``scale * |q|_1 * s / 2``, outputs by what follows from it, on keys of all kinds; rotation helps with outliers."""
    errors = {}
    for what in ("random", "peaked", "outliers"):
        k, v = numbers((1, 2, 400, 128), what), numbers((1, 2, 400, 128), seed=1)
        q = numbers((1, 2, 3, 128), seed=9)
        exact, _ = by_definition(q, k, v)
        for rotate in (False, True):
            cache = fastattn.KVCache(1, 2, 400, 128, dtype=kind, rotate=rotate)
            cache.append(k, v)
            errors[what, rotate] = np.abs(cache.attend(q, causal=False) - exact).max()
            turn = _quantized.turned if rotate else np.asarray
            tk, tv, tq = turn(k), turn(v), turn(q)
            group = 128 if kind == "int8" else 32
            most = 127 if kind == "int8" else 7

            def scales(x):
                return np.abs(x.reshape(*x.shape[:-1], -1, group)).max(axis=-1) / most

            slack = 1 + (2.0**-10 * 14 if kind == "int4" else 1e-4)
            size = np.abs(tq.reshape(*tq.shape[:-1], -1, group)).sum(axis=-1)
            off = np.einsum("bhqg,bhkg->bhqk", size, scales(tk)).max() / 2 / np.sqrt(128) * slack
            length = np.sqrt(128) if rotate else 1  # an error of each turned number may go into one
            bound = length * (scales(tv).max() / 2 * slack + (np.exp(2 * off) - 1) * np.abs(tv).max())
            assert errors[what, rotate] <= bound
    for what, bound in zip(("random", "peaked"), bounds):
        assert errors[what, False] <= bound
    assert errors["outliers", True] < errors["outliers", False]


# What is refused


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["k", "v"])
def test_numbers_that_are_not_finite_leave_the_cache_as_it_was(engine, kind, rotate, bad, name):
    arrays = {"k": numbers((1, 2, 40, 32)), "v": numbers((1, 2, 40, 32), seed=1)}
    spoilt = {x: array.copy() for x, array in arrays.items()}
    spoilt[name][0, 1, 39, 7] = bad
    for options in ({}, {"window": 20}):
        cache = fastattn.KVCache(1, 2, 40, 32, dtype=kind, rotate=rotate, **options)
        cache.append(**arrays)
        before = cache._k.copy(), cache._v.copy(), cache.lengths
        if options:
            with pytest.raises(ValueError, match=f"{name} must be finite"):
                cache.append(**spoilt)
        else:
            cache.truncate(0)
            with pytest.raises(ValueError, match=f"{name} must be finite"):
                cache.append(**spoilt)
            cache._lengths = before[2]
        for now, then in zip((cache._k, cache._v, cache.lengths), before):
            np.testing.assert_array_equal(now, then)
        cache.append(**spoilt, lengths=[0])  # what is left out is not looked at
    cache = fastattn.KVCache(1, 2, None, 32, dtype=kind, rotate=rotate)
    cache.append(**arrays)
    with pytest.raises(ValueError, match=f"{name} must be finite"):
        cache.append(**spoilt)
    assert (cache.capacity, cache.lengths.tolist()) == (64, [40])
    pool = fastattn.PagedKVCache(4, 16, 2, 32, dtype=kind, rotate=rotate)
    sequence = pool.new_sequence()
    with pytest.raises(ValueError, match=f"{name} must be finite"):
        pool.append([sequence], *(x[0].swapaxes(0, 1) for x in spoilt.values()))
    assert len(sequence) == 0
    assert pool.num_free_pages == 4


def test_errors_name_the_argument(backend):
    q = numbers((1, 2, 3, 64))
    k, v = quantized("int8", (1, 2, 10, 64), (1, 2, 10, 64))[:2]
    for call, error, match in (
        (lambda: fastattn.quantize(q, "int2"), TypeError, "dtype must be one of"),
        (lambda: fastattn.quantize(q.astype(np.int8)), TypeError, "x must hold floats"),
        (lambda: fastattn.quantize(q[..., :48], "int4"), ValueError, "multiple of 32"),
        (lambda: fastattn.quantize(q[..., :40], "int8", rotate=True), ValueError, "multiple of 16"),
        (lambda: fastattn.quantize(q * 1e6, "int4"), ValueError, "x must be small enough for float16"),
        (lambda: fastattn.quantize(q, rotate=1), TypeError, "rotate must be True or False"),
        (lambda: fastattn.dequantize(q), TypeError, "rows must be quantised"),
        (lambda: fastattn.attention(q[..., :32], k, v), ValueError, "k must have the head size of q, 32; got rows of 64"),
        (lambda: fastattn.attention(q, k, q), TypeError, "v must have the dtype of k"),
        (lambda: fastattn.attention(q, q, k), TypeError, "v must have the dtype of k"),
        (lambda: fastattn.attention(k, k, v), TypeError, "q must be"),
        (lambda: fastattn.attention(q, k[..., 0], v), ValueError, "k must have as many axes"),
        (lambda: fastattn.attention(q, k.repeat(2, axis=-1), v), ValueError, "k must have one record"),
        (lambda: fastattn.KVCache(1, 1, 4, 48, dtype="int4"), ValueError, "multiple of 32"),
        (lambda: fastattn.KVCache(1, 1, 4, 64, 40, "int8", rotate=True), ValueError, "multiple of 16"),
        (lambda: fastattn.KVCache(1, 1, 4, 64, rotate=True), ValueError, "rotate must be False"),
        (lambda: fastattn.PagedKVCache(1, 1, 4, 64, dtype="int3"), TypeError, "dtype must be one of"),
        (lambda: fastattn.KVCache(1, 1, 4, 64, v_dtype="int4"), ValueError, "v_dtype must be None in a cache that is not quantised"),
        (lambda: fastattn.KVCache(1, 1, 4, 64, dtype="int8", v_dtype="float16"), TypeError, "v_dtype must be one of"),
        (lambda: fastattn.KVCache(1, 1, 4, 64, 48, "int8", v_dtype="int4"), ValueError, "v_head_dim must have .* multiple of 32"),
    ):
        with pytest.raises(error, match=match):
            call()
    assert runtime.backend() is not None
