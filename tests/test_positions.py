"""Positions: rotary embedding on every engine, and the tables, sinusoids, slopes and biases that are data."""

import math

import numpy as np
import pytest
from inputs import DTYPES, dtype_of, read_only, unaligned
from oracle import assert_close, ulp

import fastattn

# Rotary embedding


def turned(x, cos, sin, interleaved, dtype):
    """The definition, in the given dtype; cos and sin broadcast to the rows of x."""
    out, pairs = x.astype(dtype), cos.shape[-1]
    at = np.arange(pairs)
    first, second = (2 * at, 2 * at + 1) if interleaved else (at, pairs + at)
    a, b, cos, sin = out[..., first], out[..., second], cos.astype(dtype), sin.astype(dtype)
    out[..., first], out[..., second] = a * cos - b * sin, b * cos + a * sin
    return out


def assert_turned(out, x, cos, sin, interleaved=False):
    expected, plain = (turned(x, cos, sin, interleaved, dtype) for dtype in (np.float64, np.float32))
    assert out.dtype == x.dtype
    assert_close(out, expected, plain.astype(x.dtype), ulp(x.dtype) * np.abs(expected).max(initial=0) / 2)


def rows(shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype_of(dtype))


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "dim, rotary_dim",
    [(2, 2), (6, 6), (14, 14), (30, 30), (32, 32), (34, 34), (80, 80), (128, 128), (130, 62), (7, 4), (5, 0)],
)
def test_rope_is_its_definition(engine, dim, rotary_dim, dtype, interleaved):
    x = rows((2, 6, 5, dim), dtype)
    cos, sin = fastattn.rope_table(5, rotary_dim)
    out = fastattn.apply_rope(x, cos, sin, interleaved=interleaved, rotary_dim=rotary_dim)
    assert_turned(out, x, cos, sin, interleaved)
    np.testing.assert_array_equal(out[..., rotary_dim:], x[..., rotary_dim:])
    fastattn.apply_rope(x, cos, sin, interleaved=interleaved, out=x)
    np.testing.assert_array_equal(x, out)


@pytest.mark.parametrize(
    "shape",
    [
        *[(9, 16), (3, 9, 16), (1, 1, 1, 16), (2, 3, 700, 16), (2, 5, 1, 16)],
        *[(0, 3, 4, 16), (2, 0, 4, 16), (2, 3, 0, 16), (2, 3, 4, 0)],
    ],
)
def test_rope_of_any_shape(engine, shape):
    x = rows(shape)
    cos, sin = fastattn.rope_table(shape[-2], shape[-1])
    assert_turned(fastattn.apply_rope(x, cos, sin), x, cos, sin)


def test_rope_with_positions_of_each_entry(engine):
    x = rows((3, 2, 8, 32))
    positions = np.array([5, 0, 1000])[:, None] + np.arange(8)
    cos, sin = fastattn.rope_table(positions, 32)
    out = fastattn.apply_rope(x, cos, sin)
    assert_turned(out, x, cos[:, None], sin[:, None])
    for b in range(3):
        np.testing.assert_array_equal(out[b], fastattn.apply_rope(x[b], cos[b], sin[b]))


def test_rope_with_angles_of_each_head(engine):
    x, angles = rows((2, 6, 7, 20)), rows((1, 6, 7, 10), seed=1)
    out = fastattn.apply_rope(x, np.cos(angles), np.sin(angles))
    assert_turned(out, x, np.cos(angles), np.sin(angles))


LAYOUTS = {
    "heads side by side": lambda x: np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2),
    "reversed": lambda x: np.ascontiguousarray(x[:, ::-1, ::-1])[:, ::-1, ::-1],
    "part of a projection": lambda x: np.concatenate([x, x], -1)[..., : x.shape[-1]],
    "columns apart": lambda x: np.repeat(x, 2, -1)[..., ::2],
    "unaligned": unaligned,
    "byte-swapped": lambda x: x.astype(x.dtype.newbyteorder()),
    "read-only": read_only,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rope_of_any_layout(engine, layout):
    x, (cos, sin) = rows((2, 5, 33, 24)), fastattn.rope_table(33, 24)
    expected = fastattn.apply_rope(x, cos, sin)
    y = LAYOUTS[layout](x)
    np.testing.assert_array_equal(fastattn.apply_rope(y, cos, sin), expected)
    out = LAYOUTS[layout](np.zeros_like(x))
    if layout == "read-only":
        return
    assert fastattn.apply_rope(y, cos, sin, out=out) is out
    np.testing.assert_array_equal(out, expected)
    fastattn.apply_rope(y, cos, sin, out=y)
    np.testing.assert_array_equal(y, expected)


def test_rope_keeps_the_order_of_memory(backend):
    x = rows((2, 7, 3, 8)).swapaxes(1, 2)
    assert fastattn.apply_rope(x, *fastattn.rope_table(7, 8)).strides == x.strides


def test_rope_of_broadcast_rows(engine):
    x, (cos, sin) = np.broadcast_to(rows((1, 1, 1, 16)), (2, 5, 9, 16)), fastattn.rope_table(9, 16)
    assert_turned(fastattn.apply_rope(x, cos, sin), x, cos, sin)


def test_rope_is_the_same_on_any_number_of_threads(engine):
    for x in (rows((1, 9, 3000, 64)), rows((2, 1500, 5, 64)).swapaxes(1, 2)):
        table = fastattn.rope_table(x.shape[2], 64)
        with fastattn.threads(1):
            alone = fastattn.apply_rope(x, *table)
        with fastattn.threads(3):
            np.testing.assert_array_equal(fastattn.apply_rope(x, *table), alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_carries_nan_and_inf_to_their_pair(engine, dtype):
    x, (cos, sin) = rows((1, 1, 3, 12), dtype), fastattn.rope_table(3, 8)
    x[0, 0, 1, 2], x[0, 0, 2, 9], x[0, 0, 0, 3] = np.nan, np.inf, np.inf
    with np.errstate(invalid="ignore"):
        out = fastattn.apply_rope(x, cos, sin).astype(np.float32)
    assert np.argwhere(np.isnan(out)).tolist() == [[0, 0, 0, 7], [0, 0, 1, 2], [0, 0, 1, 6]]  # inf * sin(0) is NaN
    assert np.argwhere(np.isinf(out)).tolist() == [[0, 0, 0, 3], [0, 0, 2, 9]]


def test_rope_of_float64_is_for_numpy(backend):
    x, (cos, sin) = rows((2, 4, 6), "float64"), fastattn.rope_table(4, 6)
    if backend.backend == "numpy":
        np.testing.assert_allclose(fastattn.apply_rope(x, cos, sin), turned(x, cos, sin, False, np.float64), rtol=1e-15)
    else:
        with pytest.raises(TypeError, match="x must be .* float64"):
            fastattn.apply_rope(x, cos, sin)


def test_scores_depend_on_differences_of_positions(backend):
    q, k = rows((1, 2, 40, 64)), rows((1, 2, 40, 64), seed=1)
    outs = []
    for start in (0, 77):
        table = fastattn.rope_table(np.arange(start, start + 40), 64)
        outs.append(fastattn.attention(fastattn.apply_rope(q, *table), fastattn.apply_rope(k, *table), k))
    np.testing.assert_allclose(*outs, atol=1e-5)


X = np.zeros((2, 3, 4, 8), np.float32)
T = np.zeros((4, 4), np.float32)
MISTAKES = [
    (lambda: fastattn.apply_rope(X[0, 0, 0], T, T), ValueError, r"x must have shape .*got \(8,\)"),
    (lambda: fastattn.apply_rope(X.astype(int), T, T), TypeError, "x must be .*got int64"),
    (lambda: fastattn.apply_rope(X, T[0], T), ValueError, r"cos must have shape .*got \(4,\)"),
    (lambda: fastattn.apply_rope(X, T, T[:3]), ValueError, r"sin must have shape \(4,\) or \(2, 4\).*got \(3, 4\)"),
    (lambda: fastattn.apply_rope(X, T, T[:, :3]), ValueError, r"sin must have the last axis of cos, 4; got shape \(4, 3\)"),
    (lambda: fastattn.apply_rope(X, T.astype(complex), T), TypeError, "cos must hold real numbers; got complex"),
    (lambda: fastattn.apply_rope(X, np.zeros((4, 5)), np.zeros((4, 5))), ValueError, "cos must .* at most half the head size, 4"),
    (lambda: fastattn.apply_rope(X, T, T, rotary_dim=4), ValueError, "rotary_dim must be twice the last axis of cos, 8; got 4"),
    (lambda: fastattn.apply_rope(X, T, T, interleaved=1), TypeError, "interleaved must be True or False; got 1"),
    (lambda: fastattn.apply_rope(X, T, T, out=np.zeros_like(X, "f2")), TypeError, "out must be float32, the dtype of x"),
    (lambda: fastattn.apply_rope(X, T, T, out=X[:1].copy()), ValueError, "out must have shape"),
    (lambda: fastattn.apply_rope(X, T, T, out=read_only(X)), ValueError, "out must be writable"),
    (lambda: fastattn.apply_rope(X, T, T, out=X[::-1]), ValueError, "out must not overlap an input; it overlaps x"),
    (lambda: fastattn.apply_rope(Y[:-1], T, T, out=Y[1:]), ValueError, "out must not overlap an input; it overlaps x"),
    (lambda: fastattn.apply_rope(X[0, 0], Y[0, 0, :, :4], T, out=Y[0, 0]), ValueError, "it overlaps cos"),
    (lambda: fastattn.rope_table(4, 7), ValueError, "dim must be even; got 7"),
    (lambda: fastattn.rope_table(-1, 8), ValueError, "positions must be at least 0; got -1"),
    (lambda: fastattn.rope_table(2.5, 8), TypeError, "positions must be an int; got 2.5"),
    (lambda: fastattn.rope_table([1.0, np.nan], 8), ValueError, "positions must be finite"),
    (lambda: fastattn.rope_table(["a"], 8), TypeError, "positions must be a length or an array of numbers"),
    (lambda: fastattn.rope_table(4, 8, base=0), ValueError, "base must be finite and more than 0; got 0"),
    (lambda: fastattn.rope_table(4, 8, scaling="yarn"), TypeError, "scaling must be a mapping"),
    (lambda: fastattn.rope_table(4, 8, scaling={"factor": 2.0}), ValueError, "must be one of default, linear.*got None"),
    (lambda: fastattn.rope_table(4, 8, scaling={"type": "magic"}), ValueError, "must be one of default, linear.*got 'magic'"),
    (lambda: fastattn.rope_table(4, 8, scaling={"type": "linear"}), ValueError, "scaling must have a factor for 'linear'"),
    (lambda: fastattn.rope_table(4, 8, scaling={"type": "linear", "factor": -1}), ValueError, "must be finite and more than 0"),
    (lambda: fastattn.rope_table(4, 8, scaling={"type": "linear", "factor": 2, "beta": 1}), ValueError, r"got also \['beta'\]"),
    (lambda: fastattn.rope_table(4, 8, scaling={"type": "linear", "factor": 2, "rope_theta": 5.0}), ValueError, "must be base, 10000"),
    (lambda: fastattn.sinusoidal_positions(4, -1), ValueError, "dim must be at least 0"),
    (lambda: fastattn.alibi_slopes(1.5), TypeError, "num_heads must be an int; got 1.5"),
    (lambda: fastattn.t5_bias(np.zeros((3, 2)), 4, 4), ValueError, "4 buckets or more"),
    (lambda: fastattn.t5_bias(np.zeros((32, 2)), 4, 4, max_distance=8), ValueError, "max_distance must be at least 9; got 8"),
]  # fmt: skip
Y = np.zeros((3, 3, 4, 8), np.float32)


@pytest.mark.parametrize("call, error, message", MISTAKES, ids=[message for _, _, message in MISTAKES])
def test_mistakes_are_named(backend, call, error, message):
    with pytest.raises(error, match=message):
        call()
    assert not X.any() and not Y.any()


# Tables


def test_the_table_is_exact_however_far():
    positions = np.array([[0, 1, 7], [10**6, 2**31, 10**9 + 1]])
    cos, sin = fastattn.rope_table(positions, 10, base=500.0)
    assert cos.shape == sin.shape == (2, 3, 5) and cos.dtype == sin.dtype == np.float32
    for index in np.ndindex(cos.shape):
        angle = float(positions[index[:2]]) * 500.0 ** (-2 * index[2] / 10)
        assert cos[index] == pytest.approx(math.cos(angle), abs=4e-7 if angle > 1e6 else 6e-8)
        assert sin[index] == pytest.approx(math.sin(angle), abs=4e-7 if angle > 1e6 else 6e-8)


def test_a_length_is_its_positions():
    for by_length, by_positions in zip(fastattn.rope_table(9, 8), fastattn.rope_table(np.arange(9), 8)):
        np.testing.assert_array_equal(by_length, by_positions)
    assert fastattn.rope_table([3], 8)[0].shape == (1, 4)
    assert fastattn.rope_table([], 8)[0].shape == (0, 4)


def spectrum(table):
    """The frequencies and the factor that a table was made with, from its row at position 1 (no angle exceeds 1 there)."""
    cos, sin = (x[0].astype(np.float64) for x in table)
    return np.arctan2(sin, cos), np.hypot(sin, cos)


def test_ntk_scaling_keeps_the_highest_frequency_and_divides_the_lowest():
    plain, _ = spectrum(fastattn.rope_table([1], 64))
    scaled, factor = spectrum(fastattn.rope_table([1], 64, scaling={"rope_type": "ntk", "factor": 4.0}))
    np.testing.assert_allclose(scaled[[0, -1]], plain[[0, -1]] / [1, 4], rtol=1e-6)
    assert (np.diff(plain / scaled) > 0).all()
    np.testing.assert_allclose(factor, 1, atol=1e-7)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
SCALINGS = [
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 2048},
    {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 512},
    {"rope_type": "yarn", **YARN},
    {"rope_type": "yarn", **YARN, "factor": 40.0, "beta_fast": 24.0, "beta_slow": 2.0, "mscale": 1.0, "mscale_all_dim": 0.7},
    {"rope_type": "yarn", **YARN, "truncate": False, "original_max_position_embeddings": 4096},
    {"rope_type": "yarn", **YARN, "attention_factor": 0.8},
    {"rope_type": "llama3", **LLAMA3},
    {"rope_type": "llama3", **LLAMA3, "factor": 32.0, "high_freq_factor": 6.0},
]


@pytest.mark.torch
@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling["rope_type"])
def test_scaling_is_that_of_transformers(scaling, dim, base):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    longest = 1024
    config = transformers.LlamaConfig(
        hidden_size=4 * dim, num_attention_heads=4, max_position_embeddings=scaling.get("original_max_position_embeddings", 8192),
        rope_parameters={"rope_theta": base, **scaling},
    )  # fmt: skip
    theirs, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu", seq_len=longest)
    ours, factors = spectrum([x[:1] for x in fastattn.rope_table([1, longest - 1], dim, base=base, scaling=scaling)])
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=4e-7 * np.log(base))  # powers of the base, in float32 there
    np.testing.assert_allclose(factors, factor, rtol=2e-7)


@pytest.mark.torch
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_is_that_of_transformers(backend, interleaved):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as alternating
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as halves

    x, (cos, sin) = rows((2, 3, 9, 32)), fastattn.rope_table(9, 32)
    ours = fastattn.apply_rope(x, cos, sin, interleaved=interleaved)
    tensor, tables = torch.from_numpy(x), (torch.from_numpy(cos), torch.from_numpy(sin))
    if interleaved:
        theirs = alternating(tensor.swapaxes(1, 2), tables[1][None], tables[0][None]).swapaxes(1, 2)
    else:
        theirs, _ = halves(tensor, tensor, *(torch.cat([table, table], -1)[None] for table in tables))
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)


# Sinusoids, slopes, biases


@pytest.mark.parametrize("dim", [0, 1, 6, 7])
def test_sinusoids(dim):
    table = fastattn.sinusoidal_positions(50, dim)
    assert table.shape == (50, dim) and table.dtype == np.float32
    for p in (0, 1, 49):
        for d in range(dim):
            angle = p / 10000 ** ((d - d % 2) / dim)
            assert table[p, d] == pytest.approx(math.cos(angle) if d % 2 else math.sin(angle), abs=1e-7)


def test_slopes_of_powers_of_two_are_a_geometric_sequence():
    for n in (1, 2, 8, 32):
        np.testing.assert_allclose(fastattn.alibi_slopes(n), [2.0 ** (-8 * i / n) for i in range(1, n + 1)], rtol=1e-7)


def test_slopes_of_other_numbers_of_heads_follow_the_published_rule():
    published = {  # get_slopes(n) of the authors' code
        3: [0.0625, 0.00390625, 0.25],
        6: [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125],
        12: [2.0**-n for n in range(1, 9)] + [2.0**-n for n in (0.5, 1.5, 2.5, 3.5)],
    }
    for n, slopes in published.items():
        np.testing.assert_allclose(fastattn.alibi_slopes(n), slopes, rtol=1e-7)
    assert fastattn.alibi_slopes(0).shape == (0,)


def test_t5_buckets_are_those_of_the_paper_s_code():
    table = np.arange(32, dtype=np.float32)[:, None]
    behind = fastattn.t5_bias(table, 200, 200, bidirectional=False)[0, -1, ::-1]  # by distance
    np.testing.assert_array_equal(behind[:17], [*range(16), 16])
    assert behind[127] == 31 and (behind[128:] == 31).all() and (np.diff(behind) >= 0).all()
    both = fastattn.t5_bias(table, 200, 200)[0, 100]
    np.testing.assert_array_equal(both[92:109], [8, 7, 6, 5, 4, 3, 2, 1, 0, 17, 18, 19, 20, 21, 22, 23, 24])


def test_t5_bias_is_a_view_of_one_vector_for_each_head():
    bias = fastattn.t5_bias(rows((32, 4)), 300, 500)
    low, high = np.lib.array_utils.byte_bounds(bias)
    assert bias.shape == (4, 300, 500) and high - low == 4 * 4 * (300 + 500 - 1)
    assert not bias.flags.writeable


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q_len, kv_len, offset", [(70, 70, None), (5, 90, None), (1, 90, None), (90, 33, 0), (33, 90, 7)])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_t5_bias_in_attention(engine, q_len, kv_len, offset, bidirectional, dtype):
    q, k, v = rows((2, 4, q_len, 16), dtype), rows((2, 2, kv_len, 16), dtype, 1), rows((2, 2, kv_len, 8), dtype, 2)
    bias = fastattn.t5_bias(rows((32, 4), seed=3), q_len, kv_len, bidirectional=bidirectional, query_offset=offset)
    options = {"causal": not bidirectional, "query_offset": offset, "scale": 1.0}
    out = fastattn.attention(q, k, v, mask=bias, **options)
    np.testing.assert_array_equal(out, fastattn.attention(q, k, v, mask=np.ascontiguousarray(bias), **options))


@pytest.mark.torch
@pytest.mark.parametrize("bidirectional", [False, True])
def test_t5_bias_is_that_of_transformers(bidirectional):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.models.t5.modeling_t5 import T5Attention

    for num_buckets, max_distance in ((4, 60), (32, 64), (32, 128), (64, 500), (100, 1000)):
        distance = np.arange(700) - np.arange(600)[:, None] - 100
        theirs = T5Attention._relative_position_bucket(torch.from_numpy(distance), bidirectional, num_buckets, max_distance)
        table = np.arange(num_buckets, dtype=np.float32)[:, None]
        ours = fastattn.t5_bias(table, 600, 700, bidirectional=bidirectional, max_distance=max_distance)
        np.testing.assert_array_equal(ours[0], theirs.numpy())
