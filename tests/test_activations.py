"""Weights that are not a softmax: sigmoid, ReLU and polynomial, on the same tiles as the softmax."""

import numpy as np
import pytest
from inputs import DTYPES, SIZES, dtype_of, random_qkv
from oracle import check

import fastattn

ACTIVATIONS = {
    "sigmoid": dict(activation="sigmoid"),
    "sigmoid, bias": dict(activation="sigmoid", activation_bias=-1.5),
    "relu": dict(activation="relu"),
    "linear": dict(activation="polynomial", power=1),
    "square": dict(activation="polynomial", power=2),
    "cube": dict(activation="polynomial"),
    "fifth power": dict(activation="polynomial", power=5),
}
each_activation = pytest.mark.parametrize("how", ACTIVATIONS.values(), ids=ACTIVATIONS)
each_kind = pytest.mark.parametrize("activation", ["sigmoid", "relu", "polynomial"])


def attend(q, k, v, **options):
    """The result of attention, which is right."""
    out = fastattn.attention(q, k, v, **options)
    check(out, None, q, k, v, **options)
    return out


@each_activation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 40), (5, 37), (13, 129), (70, 300), (3, 3000), (130, 65)], ids=str)
def test_any_shape(engine, how, dtype, sizes):
    q, k, v = random_qkv(batch=2, heads=4, kv_heads=2, q_len=sizes[0], kv_len=sizes[1], head_dim=24, v_head_dim=19, dtype=dtype)
    attend(q, k, v, **how)


@each_kind
def test_any_size(engine, activation):
    for n, size in enumerate(SIZES):
        q, k, v = random_qkv(q_len=SIZES[-n], kv_len=size, head_dim=SIZES[n // 2], v_head_dim=SIZES[n - 5])
        attend(q, k, v, activation=activation)
    for axis in ("heads", "q_len", "kv_len", "head_dim", "v_head_dim"):
        attend(*random_qkv(**{axis: 0, **({"kv_heads": 1} if axis == "heads" else {})}), activation=activation)


@each_activation
@pytest.mark.parametrize("sizes", [(6, 2300), (80, 200)], ids=str)
def test_every_rule(engine, how, sizes):
    q, k, v = random_qkv(batch=2, heads=4, kv_heads=2, q_len=sizes[0], kv_len=sizes[1], head_dim=16)
    rng = np.random.default_rng(1)
    shown = rng.random((2, 1, *sizes)) < 0.7
    bias = np.where(shown, rng.standard_normal((2, 1, *sizes)), -np.inf).astype(np.float32)
    attend(q, k, v, causal=True, **how)
    attend(q, k, v, window=(40, 3), query_offset=50, **how)
    attend(q, k, v, mask=shown, kv_lengths=[sizes[1] - 7, 30], kv_starts=[3, 30], q_lengths=[sizes[0] - 1, 0], **how)
    attend(q, k, v, mask=bias, scale=-0.3, **how)
    attend(q, k, v, softcap=1.5, alibi_slopes=np.linspace(0, 0.1, 4), causal=True, scale=0, **how)


@each_activation
@pytest.mark.parametrize("q_len", [3, 150])
def test_block_masks(engine, how, q_len):
    q, k, v = random_qkv(heads=2, q_len=q_len, kv_len=150, head_dim=16)
    visible = np.random.default_rng(2).random((1, 2, q_len, 150)) < np.array([0, 0.5, 1])[np.arange(150) // 50]
    mask = fastattn.BlockMask.from_dense(visible, block_size=32)
    out = fastattn.attention(q, k, v, mask=mask, **how)
    check(out, None, q, k, v, mask=visible, **how)


@each_kind
def test_packed_sequences_are_what_they_are_alone(engine, activation):
    lengths = np.array([5, 0, 130, 1, 1200])
    table = np.concatenate([[0], lengths.cumsum()])
    q, k, v = (x[0].swapaxes(0, 1).copy() for x in random_qkv(heads=2, q_len=table[-1], kv_len=table[-1], head_dim=8))
    bias = np.linspace(-3, 0, 5).astype(np.float32) if activation == "sigmoid" else None
    out = fastattn.attention_varlen(q, k, v, table, table, causal=True, activation=activation, activation_bias=bias)
    for b in np.flatnonzero(lengths):
        own = (x[table[b] : table[b + 1]].swapaxes(0, 1).copy() for x in (q, k, v))
        alone = fastattn.attention(*own, causal=True, activation=activation, activation_bias=None if bias is None else bias[b])
        np.testing.assert_array_equal(out[table[b] : table[b + 1]], alone.swapaxes(0, 1))


@each_kind
@pytest.mark.parametrize("window", [None, 12])
def test_caches(engine, activation, window):
    q, k, v = random_qkv(batch=2, heads=4, kv_heads=2, q_len=40, kv_len=40, head_dim=8)
    cache = fastattn.KVCache(2, 2, 40 if window is None else 17, 8, dtype="float32", window=window, keep_first=3 if window else 0)
    ends = [0, 5, 6, 9, 10, 14, 15, 40] if window is None else range(41)
    for first, last in zip(ends, ends[1:]):
        cache.append(k[:, :, first:last], v[:, :, first:last])
        out = cache.attend(q[:, :, first:last], activation=activation)
        options = dict(activation=activation, causal=True)
        if window is not None:
            keys = np.arange(last)
            options["mask"] = ((keys < 3) | (keys > last - 1 - window))[None, None, None]
        check(out, None, q[:, :, first:last], k[:, :, :last], v[:, :, :last], **options)


@each_kind
def test_bits_depend_on_neither_threads_nor_company(engine, activation):
    q, k, v = random_qkv(batch=3, heads=4, kv_heads=2, q_len=9, kv_len=2500, head_dim=32)
    with fastattn.threads(1):
        alone = fastattn.attention(q[1:2], k[1:2], v[1:2], activation=activation)
    with fastattn.threads(4):
        np.testing.assert_array_equal(fastattn.attention(q, k, v, activation=activation)[1:2], alone)


@each_activation
@pytest.mark.parametrize("q_len", [2, 70])
def test_hidden_numbers_are_never_touched_and_visible_ones_propagate(engine, how, q_len):
    q, k, v = random_qkv(q_len=q_len, kv_len=90, head_dim=8)
    shown = np.ones((1, 1, q_len, 90), bool)
    shown[..., 30] = shown[..., 31] = False
    shown[0, 0, 0] = False
    clean = attend(q, k, v, mask=shown, **how)
    assert not clean[0, 0, 0].any()
    k[0, 0, 30], v[0, 0, 31] = np.nan, np.inf
    np.testing.assert_array_equal(fastattn.attention(q, k, v, mask=shown, **how), clean)
    v[0, 0, 40, 3] = np.nan
    out = fastattn.attention(q, k, v, mask=shown, **how)
    assert np.isnan(out[0, 0, 1:, 3]).all() and np.isfinite(np.delete(out, 3, axis=-1)).all() and not out[0, 0, 0].any()
    k[0, 0, 50, 0] = np.nan
    assert np.isnan(fastattn.attention(q, k, v, mask=shown, **how)[0, 0, 1:]).all()


@each_kind
def test_weights_to_look_at(engine, activation):
    q, k, v = random_qkv(heads=2, q_len=7, kv_len=30, head_dim=8)
    weights = fastattn.attention_weights(q, k, activation=activation, causal=True)
    np.testing.assert_allclose(weights @ v, fastattn.attention(q, k, v, activation=activation, causal=True), rtol=2e-5, atol=2e-6)


@each_kind
def test_large_scores(engine, activation):
    q, k, v = random_qkv(q_len=3, kv_len=50, head_dim=8)
    attend(100 * q, k, v, activation=activation)
    attend(1e4 * q, 1e4 * k, v, activation=activation)


def test_float64_on_the_oracle():
    with fastattn.use_backend("numpy"):
        q, k, v = (x.astype(np.float64) for x in random_qkv(q_len=5, kv_len=9))
        for how in ACTIVATIONS.values():
            attend(q, k, v, **how)


def test_out_is_taken(engine):
    q, k, v = random_qkv(q_len=5, kv_len=9, dtype="float16")
    out = np.empty_like(q, dtype=dtype_of("float16"))
    assert fastattn.attention(q, k, v, activation="relu", out=out) is out
    np.testing.assert_array_equal(out, fastattn.attention(q, k, v, activation="relu"))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(activation="gelu"), "activation must be one of .*'relu'.*; got 'gelu'"),
        (dict(activation=None), "activation must be one of"),
        (dict(activation="relu", return_lse=True), "return_lse must be False .*; got True with activation='relu'"),
        (dict(activation="relu", sinks=[0.0]), "sinks must be None"),
        (dict(activation="polynomial", power=0), "power must be at least 1; got 0"),
        (dict(activation="polynomial", power=65), "power must be at most 64; got 65"),
        (dict(activation="polynomial", power=2.5), "power must be an int; got 2.5"),
        (dict(activation="sigmoid", activation_bias=np.inf), "activation_bias must be finite"),
        (dict(activation="sigmoid", activation_bias=[1.0, 2.0]), "activation_bias must be a number or have shape"),
        (dict(activation="relu", activation_bias=1.0), "activation_bias must be None"),
        (dict(activation_bias=1.0), "activation_bias must be None"),
    ],
)
def test_bad_input(engine, options, message):
    q, k, v = random_qkv(q_len=5, kv_len=9)
    out = np.full_like(q, 7)
    with pytest.raises((ValueError, TypeError), match=message):
        fastattn.attention(q, k, v, out=out, **options)
    assert (out == 7).all()
