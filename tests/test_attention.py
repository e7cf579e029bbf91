"""Sections 1 and 2 of the contract, rule by rule, on every engine."""

import warnings

import numpy as np
import pytest
from inputs import DTYPES, SIZES, ArrayInterfaceOnly, DLPackOnly, dtype_of, random_qkv, read_only, unaligned
from numpy.lib.stride_tricks import as_strided
from oracle import assert_matches, check

import fastattn

pytestmark = pytest.mark.usefixtures("engine")

INF, NAN = np.inf, np.nan


# Sizes


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("axis", ["q_len", "kv_len", "head_dim", "v_head_dim"])
def test_every_size_on_every_axis(axis, size):
    shape = {"heads": 2, "q_len": 6, "kv_len": 37, "head_dim": 19, "v_head_dim": 21, axis: size}
    assert_matches(*random_qkv(**shape, seed=size))


@pytest.mark.parametrize("kv_len, q_len", list(zip(SIZES, SIZES[7:] + SIZES[:7])))
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_together(q_len, kv_len, dtype):
    q, k, v = random_qkv(2, 4, q_len, kv_len, 33, 17, kv_heads=2, dtype=dtype, seed=q_len)
    assert_matches(q, k, v, causal=True, query_offset=0)


@pytest.mark.parametrize("head_dim, v_head_dim", [(128, 128), (192, 128), (160, 80), (256, 256), (299, 300), (1, 257)])
@pytest.mark.parametrize("q_len", [1, 40])
def test_head_sizes(head_dim, v_head_dim, q_len):
    assert_matches(*random_qkv(1, 2, q_len, 70, head_dim, v_head_dim))


@pytest.mark.parametrize("kv_len", [255, 257, 511, 513, 1023, 1025, 2049])
@pytest.mark.parametrize("q_len", [1, 3, 37])
def test_many_keys(q_len, kv_len):
    assert_matches(*random_qkv(1, 2, q_len, kv_len, 24, kv_heads=1), causal=True)


@pytest.mark.parametrize("causal", [False, True])
def test_many_queries_and_keys(causal):
    assert_matches(*random_qkv(1, 2, 700, 650, 40, 48), causal=causal)


@pytest.mark.parametrize("q_len", [1, 2])
def test_very_many_keys(q_len):
    """Long enough for the keys of one row to be split."""
    q, k, v = random_qkv(1, 4, q_len, 20_000, 16, kv_heads=1)
    assert_matches(q, k, v)
    assert_matches(q, k, v, window=(12_345, None), sinks=np.zeros(4, np.float32))


@pytest.mark.parametrize(
    "q_len, head_dim, v_head_dim", [(8, 64, 64), (9, 33, 40), (13, 64, 17), (16, 30, 96), (17, 64, 1), (24, 63, 70), (25, 64, 64)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_some_rows_over_many_keys(dtype, q_len, head_dim, v_head_dim):
    """As many as share what is read of keys and values, but fill no panel; in two parts, the last of them ragged."""
    q, k, v = random_qkv(1, 4, q_len, 2083, head_dim, v_head_dim, kv_heads=4, dtype=dtype)
    sinks = np.linspace(-2, 2, 4, dtype=np.float32)
    assert_matches(q, k, v)
    assert_matches(q, k, v, causal=True, query_offset=1500, sinks=sinks)
    assert_matches(q, k, v, window=(700, 3), mask=np.arange(2083) % 5 != 2, softcap=5.0)
    assert_matches(q[:, :, : q_len // 2], k, v, alibi_slopes=sinks + 3)
    v[0, 0, 2080:] = np.nan  # which causal rows do not see
    v[0, 1, 5, 0] = np.inf
    out = fastattn.attention(q, k, v, causal=True, query_offset=2083 - q_len - 4)
    assert np.isfinite(out[0, 2:].astype(np.float32)).all()
    assert np.isfinite(out[0, 0].astype(np.float32)).all() and (out[0, 1, :, 0] == np.inf).all()


@pytest.mark.parametrize("axis", ["batch", "heads", "q_len", "kv_len", "head_dim", "v_head_dim"])
@pytest.mark.parametrize("q_len", [4, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_size_axes(axis, q_len, dtype):
    shape = {"batch": 2, "heads": 3, "q_len": q_len, "kv_len": 5, "head_dim": 6, "v_head_dim": 7, axis: 0}
    q, k, v = random_qkv(**shape, dtype=dtype)
    out, lse = assert_matches(q, k, v)
    if axis == "kv_len":
        assert not out.any() and (lse == -INF).all()
    if axis == "head_dim":  # every logit is 0
        mean = v.astype(np.float32).mean(axis=2, keepdims=True)
        rtol = {"float32": 1e-5, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
        np.testing.assert_allclose(out.astype(np.float32), np.broadcast_to(mean, out.shape), rtol=rtol)
    assert_matches(q, k, v, causal=True, mask=np.ones((q_len * (axis != "q_len"), 5 * (axis != "kv_len")), bool))


def test_no_keys_but_a_sink():
    q, k, v = random_qkv(heads=2, kv_len=0)
    out, lse = assert_matches(q, k, v, sinks=np.float32([0.5, -2]))
    assert not out.any()
    np.testing.assert_array_equal(lse[0], np.broadcast_to(np.float32([[0.5], [-2]]), (2, 5)))


# Heads, ranks, dtypes


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("q_len", [1, 5, 34])
def test_grouped_heads(kv_heads, q_len):
    q, k, v = random_qkv(2, 6, q_len, 45, 16, 8, kv_heads=kv_heads)
    assert_matches(q, k, v)
    assert_matches(q, k, v, causal=True, window=(20, None))


@pytest.mark.parametrize("q_len", [1, 3])
def test_large_groups(q_len):
    """More rows in a group of heads than any tile has."""
    assert_matches(*random_qkv(1, 142, q_len, 50, 8, kv_heads=2), causal=True)


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_ranks(rank):
    q, k, v = (x[(0,) * (4 - rank)] for x in random_qkv(2, 3))
    out, lse = assert_matches(q, k, v, causal=True)
    assert out.ndim == rank and lse.ndim == rank - 1
    mask = np.random.default_rng(0).random((*q.shape[:-1], k.shape[-2])) < 0.5
    heads = 1 if rank == 2 else 3
    slopes, sinks = np.linspace(0, 1, heads, dtype=np.float32), np.ones(heads, np.float32)
    assert_matches(q, k, v, mask=mask, query_offset=20, kv_lengths=30, alibi_slopes=slopes, sinks=sinks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q_len, head_dim", [(1, 64), (7, 15), (65, 33)])
def test_dtypes(dtype, q_len, head_dim):
    q, k, v = random_qkv(2, 4, q_len, 130, head_dim, kv_heads=2, dtype=dtype)
    assert_matches(q, k, v)
    assert_matches(q, k, v, causal=True, softcap=5.0)


@pytest.mark.parametrize("dtype, kv_dtype", [("float32", "float16"), ("float32", "bfloat16")])
@pytest.mark.parametrize("q_len", [1, 40])
def test_queries_wider_than_keys(dtype, kv_dtype, q_len):
    q, k, v = random_qkv(1, 2, q_len, 77, 20, dtype=dtype, kv_dtype=kv_dtype)
    out, _ = assert_matches(q, k, v, causal=True)
    assert out.dtype == np.float32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_finite_value_of_a_narrow_type(dtype):
    """Loads of 16-bit types are exact, subnormal numbers included: with one key, out is v, bit for bit."""
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype_of(dtype))
    every = every[np.isfinite(every.astype(np.float32))]
    v = every[every != 0].reshape(1, -1)
    q = np.zeros((1, 1), v.dtype)
    out = fastattn.attention(q, q, v)
    np.testing.assert_array_equal(out.view(np.uint16), v.view(np.uint16))


def test_float16_output_rounds_to_nearest_even():
    """Halfway between two neighbours, subnormal ones included."""
    q = np.zeros((1, 1), np.float16)
    k = np.zeros((2, 1), np.float16)
    v = np.float16([[1, 65504, 6e-8, 3], [1 + 2**-10, 65504, 0, 3 + 2**-9]])
    out = fastattn.attention(q, k, v)
    np.testing.assert_array_equal(out, [[1, 65504, 0, 3]])


def test_float64_is_for_the_numpy_backend(engine):
    q, k, v = (x.astype(np.float64) for x in random_qkv())
    if engine.backend == "numpy":
        out, _ = assert_matches(q, k, v, causal=True)
        assert out.dtype == np.float64
    else:
        with pytest.raises(TypeError, match="float64"):
            fastattn.attention(q, k, v)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_precision_bounds_the_error(precision, dtype):
    """A precision promises bits: of the operands of every product, that is of q, k, the weights and v."""
    bits = {"highest": 24, "high": 16, "medium": 8}[precision]
    q, k, v = random_qkv(1, 2, 50, 300, 64, dtype=dtype)
    out = fastattn.attention(q, k, v, precision=precision)
    exact = fastattn.attention(q, k, v)
    if precision == "highest" or dtype == "bfloat16":
        np.testing.assert_array_equal(out, exact)
    error = np.abs(out.astype(np.float32) - exact.astype(np.float32)).max()
    storage = {"float32": 0, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    assert error <= 4 * 2.0**-bits + storage


# Layout


LAYOUTS = {
    "BLHD": lambda x: np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2),
    "LBHD": lambda x: np.ascontiguousarray(x.transpose(2, 0, 1, 3)).transpose(1, 2, 0, 3),
    "reversed rows": lambda x: x[:, :, ::-1].copy()[:, :, ::-1],
    "reversed batch and heads": lambda x: x[::-1, ::-1].copy()[::-1, ::-1],
    "every third row": lambda x: np.repeat(x, 3, axis=2)[:, :, ::3],
    "padded rows": lambda x: np.pad(x, [(0, 0), (0, 0), (0, 0), (0, 5)], constant_values=7)[..., :-5],
    "reversed columns": lambda x: x[..., ::-1].copy()[..., ::-1],
    "every second column": lambda x: np.stack([x, np.roll(x, 1)], axis=-1).reshape(*x.shape[:-1], -1)[..., ::2],
    "Fortran": np.asfortranarray,
    "unaligned": unaligned,
    "byte-swapped": lambda x: x.astype(x.dtype.newbyteorder()),
    "read-only": read_only,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(layout, dtype):
    if layout == "byte-swapped" and dtype == "bfloat16":
        pytest.skip("ml_dtypes has no byte-swapped bfloat16")
    q, k, v = (LAYOUTS[layout](x) for x in random_qkv(2, 4, 9, 35, 17, 13, kv_heads=2, dtype=dtype))
    before = [x.copy() for x in (q, k, v)]
    assert_matches(q, k, v, causal=True)
    for x, same in zip((q, k, v), before):
        np.testing.assert_array_equal(x, same)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_change_no_bits(layout):
    """With more rows than are computed at a time, keys and values that are apart in memory are collected first."""
    q, k, v = random_qkv(1, 6, 70, 300, 17, 13, kv_heads=2)
    out, lse = fastattn.attention(*(LAYOUTS[layout](x) for x in (q, k, v)), causal=True, return_lse=True)
    dense, dense_lse = fastattn.attention(q, k, v, causal=True, return_lse=True)
    np.testing.assert_array_equal(out, dense)
    np.testing.assert_array_equal(lse, dense_lse)


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_broadcast_axes(axis):
    """Strides of 0, on the last axis too."""
    shape = [2, 2, 7, 9]
    shape[axis] = 1
    x = np.random.default_rng(axis).standard_normal(shape).astype(np.float32)
    x = np.broadcast_to(x, (2, 2, 7, 9))
    assert_matches(x, x, x)
    assert_matches(x, x, x, causal=True, mask=x[..., :7])


def with_odd_strides(x):
    """The array with meaningless strides along its axes of length 1."""
    return as_strided(x, strides=[897 if length == 1 else stride for length, stride in zip(x.shape, x.strides)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2, 7, 35, 16), (2, 1, 1, 35, 16), (2, 1, 7, 1, 16), (1, 1, 1, 1, 1)], ids=str)
def test_strides_of_axes_of_length_1(shape, dtype):
    q, k, v = map(with_odd_strides, random_qkv(*shape, dtype=dtype))
    mask = with_odd_strides(np.random.default_rng(0).standard_normal((shape[0], 1, *shape[2:4])))
    out = with_odd_strides(np.empty(q.shape, q.dtype))
    result, lse = fastattn.attention(q, k, v, out=out, return_lse=True, mask=mask, alibi_slopes=np.ones(shape[:2]))
    assert result is out
    check(out, lse, q, k, v, mask=mask, alibi_slopes=np.ones(shape[:2]))
    assert_matches(q, k, v)


def test_a_field_of_a_record():
    record = np.zeros(1, [("x", "f4", (2, 7, 16)), ("tag", "u1")])
    record["x"] = random_qkv(1, 2, 7, 7, 16)[0]
    x, out = record["x"], record.copy()["x"]
    assert x.strides == (897, 448, 64, 4)
    assert_matches(x, x, x, causal=True)
    np.testing.assert_array_equal(fastattn.attention(x, x, x, out=out), fastattn.attention(x.copy(), x.copy(), x.copy()))


def test_strides_of_arrays_without_elements():
    q, k, v = random_qkv(2, 2, 3, 0, 16)
    k, v = (as_strided(x, strides=(897, 5, 3, 4)) for x in (k, v))
    out, lse = assert_matches(q, k, v)
    assert not out.any() and (lse == -INF).all()
    assert fastattn.attention(k, q, q).shape == (2, 2, 0, 16)


def test_q_k_and_v_may_share_memory():
    """Queries, keys and values cut out of one projection (B, L, 3, H, D)."""
    packed = np.random.default_rng(0).standard_normal((2, 33, 3, 4, 16)).astype(np.float32)
    assert_matches(*(packed[:, :, n].swapaxes(1, 2) for n in range(3)), causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gap", [0, 4])
@pytest.mark.parametrize("q_len, head_dim, v_head_dim", [(1, 40, 24), (3, 24, 24), (40, 40, 33)])
def test_values_within_their_keys(engine, q_len, head_dim, v_head_dim, gap, dtype):
    """As latent attention has them: what is made of keys may serve for both, and changes nothing."""
    q, k, _ = random_qkv(2, 10, q_len, 150, head_dim + gap, kv_heads=2, dtype=dtype)
    q, k = q[..., :head_dim], k[..., :head_dim]
    v = k[..., :v_head_dim]
    for options in ({}, {"causal": True, "kv_starts": 3, "kv_lengths": [150, 77]}):
        out, lse = assert_matches(q, k, v, **options)
        if engine.backend == "native":
            apart = fastattn.attention(q, k, v.copy(), return_lse=True, **options)
            np.testing.assert_array_equal(out, apart[0])
            np.testing.assert_array_equal(lse, apart[1])
    k[:, :, 100] = NAN
    assert_matches(q, k, v, kv_lengths=100)


def test_rows_that_overlap():
    signal = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    frames = as_strided(signal, (80, 16), (4, 4))
    assert_matches(frames[:30], frames, frames, window=(10, 10))


class Subclass(np.ndarray):
    """An array whose arithmetic is nobody's business here."""

    def __array_ufunc__(self, *args, **options):
        raise AssertionError("arithmetic with a subclass")


def test_subclasses_are_seen_as_plain_arrays():
    q, k, v = random_qkv(2, 4, 9, 35, 17, 13, kv_heads=2)
    out = fastattn.attention(*(x.view(Subclass) for x in (q, k, v)), causal=True)
    np.testing.assert_array_equal(np.asarray(out), fastattn.attention(q, k, v, causal=True))
    assert type(out) is np.ndarray


@pytest.mark.parametrize("wrap", [DLPackOnly, ArrayInterfaceOnly])
def test_arrays_of_other_libraries(wrap):
    q, k, v = random_qkv(2, 4, 9, 35, 17, 13, kv_heads=2)
    mask = np.random.default_rng(0).random((9, 35)) < 0.8
    mask[:, 0] = True
    out, lse = fastattn.attention(wrap(q), wrap(k), wrap(v), mask=wrap(mask), return_lse=True)
    check(out, lse, q, k, v, mask=mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.swapaxes(1, 2), lambda x: x[:, ::-1, ::-1], lambda x: x[..., ::2]])
def test_out(dtype, view):
    """`out` is filled and returned, whatever its strides, and nothing beside it is touched."""
    q, k, v = random_qkv(2, 4, 4, 35, 16, 12, dtype=dtype)
    base = np.full((2, 4, 4, 24), 99, q.dtype)
    out = view(base)[..., :12]
    result, lse = fastattn.attention(q, k, v, out=out, return_lse=True, causal=True)
    assert result is out
    check(out, lse, q, k, v, causal=True)
    out[...] = 99
    assert (base == 99).all()


def test_out_is_not_written_when_an_error_is_raised():
    q, k, v = random_qkv()
    out = np.full((1, 1, 5, 19), 99, np.float32)
    with pytest.raises(ValueError, match="kv_lengths"):
        fastattn.attention(q, k, v, kv_lengths=38, out=out)
    assert (out == 99).all()


# Scores


@pytest.mark.parametrize("scale", [0, 1, 0.3, -0.5, np.float32(2), 1e-30])
def test_scale(scale):
    assert_matches(*random_qkv(heads=2), scale=scale)


def test_scale_of_zero_is_the_mean():
    q, k, v = random_qkv()
    out = fastattn.attention(q, k, v, scale=0.0)
    np.testing.assert_allclose(out, np.broadcast_to(v.mean(axis=2, keepdims=True), out.shape), atol=1e-6)


@pytest.mark.parametrize("softcap", [0.5, 20.0, 50, 1e4])
@pytest.mark.parametrize("scale", [None, 10.0])
def test_softcap(softcap, scale):
    assert_matches(*random_qkv(1, 2, 30, 300, 16), softcap=softcap, scale=scale)


MASK_DTYPES = ("bool", "float16", "bfloat16", "float32", "float64")


def random_mask(shape, dtype, seed=0, hidden=0.3):
    """A mask that hides some keys, and, if it holds floats, biases the others."""
    random = np.random.default_rng(seed)
    visible = random.random(shape) >= hidden
    if dtype == "bool":
        return visible
    return np.where(visible, random.standard_normal(shape) * 3, -INF).astype(dtype_of(dtype))


@pytest.mark.parametrize("dtype", MASK_DTYPES)
@pytest.mark.parametrize("shape", [(2, 4, 33, 70), (1, 1, 33, 70), (2, 1, 1, 70), (33, 70), (70,), (4, 33, 1), (1, 1), ()])
def test_masks_broadcast(dtype, shape):
    q, k, v = random_qkv(2, 4, 33, 70, 16, kv_heads=2)
    assert_matches(q, k, v, mask=random_mask(shape, dtype))


@pytest.mark.parametrize("dtype", MASK_DTYPES)
@pytest.mark.parametrize("kv_len", [1, 15, 31, 33, 65, 600])
def test_mask_sizes(dtype, kv_len):
    q, k, v = random_qkv(1, 4, 7, kv_len, 16, kv_heads=2, dtype="float16")
    assert_matches(q, k, v, mask=random_mask((4, 7, kv_len), dtype, seed=kv_len))


@pytest.mark.parametrize("dtype", ["bool", "float32", "float64"])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "byte-swapped"])
def test_mask_layouts(dtype, layout):
    q, k, v = random_qkv(2, 2, 13, 40, 8)
    assert_matches(q, k, v, mask=LAYOUTS[layout](random_mask((2, 2, 13, 40), dtype)))


def test_a_mask_of_swapped_bytes():
    q, k, v = random_qkv(2, 2, 13, 40, 8)
    assert_matches(q, k, v, mask=random_mask((13, 40), "float32").astype(">f4").astype("<f4").astype(">f4"))


def test_a_mask_that_is_transposed():
    q, k, v = random_qkv(1, 2, 50, 90, 8)
    assert_matches(q, k, v, mask=random_mask((90, 50), "float32").T)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_the_most_negative_float_is_a_bias_and_hides_nothing(dtype):
    """Among other keys it has no weight; where all keys have it, they share the weight."""
    dtype = dtype_of(dtype)
    least = dtype.type(-65504) if dtype == np.float16 else np.nextafter(dtype.type(-INF), dtype.type(0))
    q, k, v = random_qkv(1, 2, 20, 300, 8)
    everywhere = fastattn.attention(q, k, v, mask=np.full((20, 300), least), scale=0)
    np.testing.assert_allclose(everywhere, np.broadcast_to(v.mean(axis=2, keepdims=True), everywhere.shape), atol=1e-6)

    visible = random_mask((20, 300), "bool")
    some = fastattn.attention(q, k, v, mask=np.where(visible, dtype.type(0), least))
    np.testing.assert_array_equal(np.isnan(some), False)
    np.testing.assert_allclose(some, fastattn.attention(q, k, v, mask=visible), atol=1e-6)

    v[:, :, 7] = NAN  # visible, so it counts, with however little weight
    assert np.isnan(fastattn.attention(q, k, v, mask=np.full((20, 300), least))).all()


@pytest.mark.parametrize("shape", [(4,), (2, 4)])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"query_offset": 7}, {"query_offset": -3}, {"scale": 0}])
def test_alibi(shape, options):
    q, k, v = random_qkv(2, 4, 40, 90, 16, kv_heads=2)
    slopes = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    assert_matches(q, k, v, alibi_slopes=slopes, **options)


@pytest.mark.parametrize("sink", [0.0, -1e4, 5.0, 1e4])
@pytest.mark.parametrize("q_len", [1, 40])
def test_sinks(sink, q_len):
    q, k, v = random_qkv(2, 4, q_len, 90, 16, kv_heads=2)
    sinks = np.float32([sink, -1, sink + 1, 2])
    assert_matches(q, k, v, sinks=sinks)
    assert_matches(q, k, v, sinks=sinks, causal=True, scale=3.0, query_offset=-10)


@pytest.mark.parametrize("q_len", [1, 40])
def test_heads_without_a_sink(q_len):
    """-inf is none: to the bit what that head is without sinks, in rows that see nothing too."""
    q, k, v = random_qkv(2, 4, q_len, 2100, 16, kv_heads=2)
    mask = np.arange(2100) < np.linspace(0, 2100, q_len)[:, None]
    sinks = np.float32([-INF, -1, -INF, 2])
    out, lse = assert_matches(q, k, v, sinks=sinks, mask=mask)
    without, lse_without = fastattn.attention(q, k, v, return_lse=True, mask=mask)
    np.testing.assert_array_equal(out[:, ::2], without[:, ::2])
    np.testing.assert_array_equal(lse[:, ::2], lse_without[:, ::2])
    assert (lse[:, ::2, 0] == -INF).all()


# Visibility


OFFSETS = [None, 0, 3, 29, 100, -1, -20, -100, [5, -7], np.array([0, 60]), np.array([-3, 4], np.int32)]


@pytest.mark.parametrize("offset", OFFSETS, ids=str)
@pytest.mark.parametrize("lengths", [None, 17, [37, 0], np.array([12, 30])], ids=str)
def test_causal(offset, lengths):
    q, k, v = random_qkv(2, 2, 29, 37, 8)
    assert_matches(q, k, v, causal=True, query_offset=offset, kv_lengths=lengths)


WINDOWS = [(0, 0), (3, 2), (0, None), (None, 0), (20, None), (None, 20), (None, None), (10_000, 10_000), (1, 40)]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("offset", [None, 0, 11, -20, [31, -100]], ids=str)
def test_window(window, offset):
    q, k, v = random_qkv(2, 2, 29, 37, 8)
    assert_matches(q, k, v, window=window, query_offset=offset)
    assert_matches(q, k, v, window=window, query_offset=offset, causal=True, kv_lengths=[37, 30])


@pytest.mark.parametrize("window", [(100, 0), (300, 50), (None, 30), (7, None)], ids=str)
@pytest.mark.parametrize("offset", [None, 0, 400], ids=str)
def test_windows_over_many_tiles(window, offset):
    assert_matches(*random_qkv(1, 2, 300, 1100, 8, kv_heads=1), window=window, query_offset=offset)


@pytest.mark.parametrize("window", [(-1, 3), (3, -1), (-1, -1)])
def test_minus_one_is_unbounded(window):
    """As flash-attn has it, and with the bits that None gives."""
    q, k, v = random_qkv(1, 2, 40, 60, 8)
    sides = tuple(None if side == -1 else side for side in window)
    np.testing.assert_array_equal(fastattn.attention(q, k, v, window=window), fastattn.attention(q, k, v, window=sides))
    masks = [fastattn.BlockMask.sliding_window(40, k_len=60, window=w, block_size=16) for w in (window, sides)]
    assert masks[0] == masks[1]


@pytest.mark.parametrize("lengths", [0, 1, 36, 37, [0, 37], [37, 0], [0, 0], [16, 17]], ids=str)
@pytest.mark.parametrize("q_len", [1, 20])
def test_kv_lengths(lengths, q_len):
    q, k, v = random_qkv(2, 4, q_len, 37, 8, kv_heads=2)
    assert_matches(q, k, v, kv_lengths=lengths)


@pytest.mark.parametrize("offset", [2**31 - 5, 2**31 + 5, 2**40, -(2**31) - 5, -(2**40)])
def test_positions_beyond_32_bits(offset):
    q, k, v = random_qkv(1, 2, 20, 37, 8)
    assert_matches(q, k, v, causal=True, query_offset=offset)
    assert_matches(q, k, v, window=(offset, None) if offset > 0 else (None, -offset), query_offset=offset)
    assert_matches(q, k, v, window=(2**62, 2**62), query_offset=offset)


@pytest.mark.parametrize("first", [1, 255, 256, 700, 1299])
@pytest.mark.parametrize("how", ["bool", "float32"])
def test_whole_tiles_hidden_before_the_first_live_one(first, how):
    """The state of a row is empty for several tiles; the rows of a tile wake up at different keys."""
    q, k, v = random_qkv(1, 2, 40, 1400, 16)
    visible = np.arange(1400) >= first + 2 * np.arange(40)[:, None]
    visible[5] = False  # never wakes up
    visible[6] = np.arange(1400) == 1399
    visible[7] = True
    mask = visible if how == "bool" else np.where(visible, np.float32(0), np.float32(-INF))
    out, lse = assert_matches(q, k, v, mask=mask)
    assert not out[:, :, 5].any() and (lse[:, :, 5] == -INF).all()
    out, lse = assert_matches(q, k, v, mask=mask, sinks=np.float32([0.25, -7]))
    assert not out[:, :, 5].any() and (lse[0, :, 5] == np.float32([0.25, -7])).all()


HIDE_EVERYTHING = {
    "causal": {"causal": True, "query_offset": -40},
    "window before the keys": {"window": (3, 3), "query_offset": -40},
    "window behind the keys": {"window": (3, 3), "query_offset": 400},
    "lengths": {"kv_lengths": 0},
    "boolean mask": {"mask": np.zeros((30, 50), bool)},
    "one boolean": {"mask": np.zeros((), bool)},
    "additive mask": {"mask": np.full((30, 50), -INF, np.float32)},
    "a mask against causal": {"causal": True, "query_offset": 0, "mask": np.triu(np.ones((30, 50), bool), 1)},
    "lengths against a window": {"kv_lengths": 10, "window": (5, 5), "query_offset": 20},
}


@pytest.mark.parametrize("how", HIDE_EVERYTHING)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_see_nothing(how, dtype):
    """0 and -inf, or the sink: never NaN, never the mean of V, and never what was in memory before."""
    q, k, v = random_qkv(2, 2, 30, 50, 8, dtype=dtype)
    for x in (k, v):
        x[..., 0] = NAN
    out = np.full_like(q, NAN)
    _, lse = fastattn.attention(q, k, v, out=out, return_lse=True, **HIDE_EVERYTHING[how])
    assert (out == 0).all() and (lse == -INF).all()
    out[...] = NAN
    sinks = np.float32([1.5, -3])
    _, lse = fastattn.attention(q, k, v, out=out, return_lse=True, sinks=sinks, **HIDE_EVERYTHING[how])
    assert (out == 0).all() and (lse == sinks[:, None]).all()


@pytest.mark.parametrize("how", HIDE_EVERYTHING)
def test_nothing_is_raised_or_warned_of(how):
    """NaN, inf and rows that see nothing are results like others, however NumPy is told to treat them."""
    q, k, v = random_qkv(2, 2, 30, 50, 8)
    q[0, 0, 3], k[0, 0, 4], v[0, 0, 5] = NAN, INF, -INF
    with np.errstate(all="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        fastattn.attention(q, k, v, return_lse=True)
        fastattn.attention(q, k, v, return_lse=True, **HIDE_EVERYTHING[how])


# Everything at once


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask_dtype", ["bool", "float32"])
@pytest.mark.parametrize("q_len, kv_len", [(1, 700), (50, 80), (130, 700)])
def test_all_rules_compose(dtype, mask_dtype, q_len, kv_len):
    q, k, v = random_qkv(2, 4, q_len, kv_len, 24, 20, kv_heads=2, dtype=dtype)
    assert_matches(
        q,
        k,
        v,
        mask=random_mask((2, 1, q_len, kv_len), mask_dtype),
        causal=True,
        window=(200, 5),
        query_offset=[kv_len - q_len - 3, 2],
        kv_lengths=[kv_len - 1, kv_len // 2],
        scale=-0.4,
        softcap=3.0,
        alibi_slopes=np.float32([0.01, 0.02, 0, -0.01]),
        sinks=np.float32([-1, 0, 1, 2]),
    )


def test_keywords_that_change_nothing():
    """An absent rule and one that allows everything are the same."""
    q, k, v = random_qkv(2, 2, 20, 50, 8)
    plain = fastattn.attention(q, k, v)
    np.testing.assert_array_equal(fastattn.attention(q, k, v, return_lse=True)[0], plain)
    for options in (
        {"mask": None, "window": None, "softcap": None, "scale": None, "sinks": None, "alibi_slopes": None},
        {"window": (None, None)},
        {"window": (50, 50), "query_offset": [30, 0]},
        {"kv_lengths": [50, 50], "query_offset": 30},
        {"causal": True, "query_offset": 49},
        {"scale": 1 / np.sqrt(8)},
    ):
        np.testing.assert_array_equal(fastattn.attention(q, k, v, **options), plain)
    for options in ({"mask": np.ones((20, 50), bool)}, {"mask": np.zeros((20, 50))}, {"alibi_slopes": np.zeros(2)}):
        np.testing.assert_allclose(fastattn.attention(q, k, v, **options), plain, atol=1e-6)


# More than 2**31 elements


def test_more_than_2_to_the_31_keys():
    """A key index does not fit 32 bits. The arrays are one row, repeated."""
    kv_len = 2**31 + 1000
    q, k, v = random_qkv(1, 1, 3, 1, 4)
    k, v = (np.broadcast_to(x, (1, 1, kv_len, 4)) for x in (k, v))
    out, lse = fastattn.attention(q, k, v, window=(99, 0), alibi_slopes=np.float32([0.1]), return_lse=True)
    near = k[:, :, :102], v[:, :, :102]
    check(out, lse, q, *near, window=(99, 0), alibi_slopes=np.float32([0.1]))


def test_more_than_2_to_the_31_elements_apart(huge_zeros):
    """An element's offset does not fit 32 bits. Only the last pages of the arrays are ever touched."""
    rows = 2**31 // 64 + 300
    q, k, v = random_qkv(1, 1, 3, 40, 64)
    far_k, far_v = (huge_zeros((1, 1, rows, 64)) for _ in range(2))
    far_k[:, :, -40:], far_v[:, :, -40:] = k, v
    out, lse = fastattn.attention(q, far_k, far_v, window=(37, 0), return_lse=True)
    check(out, lse, q, k, v, window=(37, 0))
