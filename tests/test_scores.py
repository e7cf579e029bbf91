"""Additive and Luong's attention, each against its formula in float64."""

import numpy as np
import oracle
import pytest
from inputs import DTYPES, dtype_of, random_qkv
from oracle import assert_close, ulp

import fastattn

A = 21


def weights_of(q_dim, k_dim, heads=None, seed=5, width=A):
    rng = np.random.default_rng(seed)
    lead = () if heads is None else (heads,)
    shapes = {"w_q": (q_dim, width), "w_k": (k_dim, width), "w_v": (width,), "bias": (width,)}
    return {name: rng.standard_normal(lead + shape).astype(np.float32) for name, shape in shapes.items()}


def project(x, w, dtype):
    """``x @ w`` where w may be one for each head, and x is repeated for these."""
    x = x.astype(dtype)
    if w.ndim == 3 and x.shape[1] != len(w):
        x = np.repeat(x, len(w) // x.shape[1], axis=1)
    return x @ w.astype(dtype)


def additive(q, k, v, w, dtype, store, **options):
    """The definition: ``(out, lse)``."""
    bias = w["bias"].astype(dtype)
    queries, keys = project(q, w["w_q"], dtype) + (bias if bias.ndim == 1 else bias[:, None]), project(k, w["w_k"], dtype)
    values = np.repeat(v, keys.shape[1] // v.shape[1], axis=1)
    w_v = np.broadcast_to(w["w_v"], (q.shape[1], w["w_v"].shape[-1]))
    return oracle.attention(queries, keys, values, additive=w_v, **{"scale": 1.0, **options}, compute=dtype, store=store)


def assert_additive(q, k, v, w, **options):
    out, lse = fastattn.additive_attention(q, k, v, **w, return_lse=True, **options)
    assert out.dtype == q.dtype and lse.dtype == np.float32
    expected, expected_lse = additive(q, k, v, w, np.float64, np.float64, **options)
    plain, plain_lse = additive(q, k, v, w, np.float32, q.dtype.type, **options)
    size = np.abs(w["w_v"]).sum(axis=-1).max()
    assert_close(out, expected, plain, (ulp(q.dtype) + 2 * ulp("float32") * size) * np.abs(expected).max(initial=0))
    assert_close(lse, expected_lse, plain_lse, 4 * ulp("float32") * size, "lse")
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("sizes", [(1, 40), (5, 37), (70, 130), (2, 2100)], ids=str)
def test_additive(engine, dtype, per_head, sizes):
    q, _, _ = random_qkv(batch=2, heads=4, q_len=sizes[0], kv_len=1, head_dim=12, dtype=dtype)
    _, k, v = random_qkv(batch=2, heads=2, q_len=1, kv_len=sizes[1], head_dim=7, v_head_dim=5, dtype=dtype)
    assert_additive(q, k, v, weights_of(12, 7, 4 if per_head else None))


@pytest.mark.parametrize("sizes", [(6, 90), (70, 90)], ids=str)
def test_additive_under_every_rule(engine, sizes):
    q, k, v = random_qkv(batch=2, heads=4, kv_heads=2, q_len=sizes[0], kv_len=sizes[1], head_dim=9)
    w = weights_of(9, 9)
    shown = np.random.default_rng(1).random((2, 1, *sizes)) < 0.7
    assert_additive(q, k, v, w, causal=True)
    assert_additive(q, k, v, w, window=(20, 3), query_offset=50, sinks=np.float32([0, 1, -np.inf, 2]))
    assert_additive(q, k, v, w, mask=shown, kv_lengths=[80, 30], kv_starts=[3, 30], q_lengths=[sizes[0] - 1, 0])
    assert_additive(q, k, v, w, mask=np.where(shown, 0.5, -np.inf), softcap=3.0, scale=-0.7)
    assert_additive(q, k, v, w, scale=0.0, alibi_slopes=np.linspace(0, 0.1, 4))
    hidden = fastattn.additive_attention(q, k, v, **w, causal=True)
    blocks = fastattn.BlockMask.causal(sizes[0], k_len=sizes[1], block_size=16)
    np.testing.assert_allclose(fastattn.additive_attention(q, k, v, **w, mask=blocks), hidden, rtol=1e-4, atol=1e-6)
    k[:, :, -1], v[:, :, -1] = np.nan, np.inf  # which the last query alone sees
    out = fastattn.additive_attention(q, k, v, **w, causal=True)
    np.testing.assert_array_equal(out[:, :, :-1], hidden[:, :, :-1])
    assert np.isnan(out[:, :, -1]).all()


@pytest.mark.parametrize("width", [0, 1, 15, 16, 17, 64, 130])
def test_additive_of_any_width(engine, width):
    q, k, v = random_qkv(heads=2, q_len=20, kv_len=33, head_dim=4)
    for rows in (20, 3):
        assert_additive(q[:, :, :rows], k, v, weights_of(4, 4, width=width))
    for axis in ("q_len", "kv_len", "head_dim", "v_head_dim"):
        q, k, v = random_qkv(**{axis: 0})
        assert_additive(q, k, v, weights_of(q.shape[3], k.shape[3], width=width))


@pytest.mark.parametrize("by_rows", [False, True])
def test_tanh_is_within_six_units_in_the_last_place(engine, by_rows):
    """With one key, whose projection is 0, the lse is the score, and with one weight of 1 that is the tanh of the query."""
    x = np.concatenate([np.geomspace(1e-30, 100, 3000), np.linspace(0.01, 10, 5000), [0.0, 1e30, np.inf]]).astype(np.float32)
    x = np.concatenate([x, -x])
    q = x.reshape((-1, 1, 1, 1) if by_rows else (1, 1, -1, 1))
    k = np.zeros((len(q), 1, 1, 1), np.float32)
    one = np.ones((1, 1), np.float32)
    _, lse = fastattn.additive_attention(q, k, k, one, one, one[0], return_lse=True)
    exact = np.tanh(x.astype(np.float64))
    error = np.abs(lse.ravel() - exact) / np.spacing(np.abs(exact.astype(np.float32)))
    assert error.max() <= 6
    assert (np.abs(lse) <= 1 + 2**-22).all()


def test_additive_of_every_rank_and_out(engine):
    q, k, v = random_qkv(heads=2, q_len=5, kv_len=9, head_dim=4, dtype="float16")
    w = weights_of(4, 4)
    whole = fastattn.additive_attention(q, k, v, **w)
    np.testing.assert_array_equal(fastattn.additive_attention(q[0], k[0], v[0], **w), whole[0])
    np.testing.assert_array_equal(fastattn.additive_attention(q[0, 1], k[0, 1], v[0, 1], **w), whole[0, 1])
    out = np.empty(q.shape, dtype_of("float16"))
    assert fastattn.additive_attention(q, k, v, **w, out=out) is out
    np.testing.assert_array_equal(out, whole)


def test_additive_has_the_same_bits_for_any_number_of_threads(engine):
    q, k, v = random_qkv(batch=2, heads=2, q_len=40, kv_len=2500, head_dim=4)
    w = weights_of(4, 4)
    with fastattn.threads(1):
        one = fastattn.additive_attention(q, k, v, **w)
    with fastattn.threads(4):
        np.testing.assert_array_equal(fastattn.additive_attention(q, k, v, **w), one)


def test_additive_weights_of_other_activations(engine):
    q, k, v = random_qkv(q_len=20, kv_len=33, head_dim=4)
    w = weights_of(4, 4)
    out = fastattn.additive_attention(q, k, v, **w, activation="sigmoid", activation_bias=0.0)
    s = np.tanh((q @ w["w_q"])[:, :, :, None] + (k @ w["w_k"])[:, :, None] + w["bias"]) @ w["w_v"]
    np.testing.assert_allclose(out, (1 / (1 + np.exp(-s.astype(np.float64)))) @ v, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(w_q=np.ones((5, A))), r"w_q must have shape \(4, A\), or \(2, 4, A\) for each head; got \(5, 21\)"),
        (dict(w_k=np.ones((4, A + 1))), r"w_k must have shape \(4, 21\)"),
        (dict(w_v=np.ones((3, A))), r"w_v must have shape \(21,\), or \(2, 21\)"),
        (dict(bias=np.ones(3)), "bias must have shape"),
        (dict(w_q=np.ones((4, A), complex)), "w_q must hold real numbers; got complex128"),
        (dict(k=np.ones((1, 3, 9, 4), np.float32), v=np.ones((1, 3, 9, 4), np.float32)), "k must have a number of heads that divides"),
        (dict(v=np.ones((1, 2, 8, 4), np.float32)), "v must have the shape of k"),
        (dict(v=np.ones((1, 2, 9, 4), np.float16)), "v must have the dtype of k"),
        (dict(q=np.ones(4, np.float32)), "q must have shape"),
        (dict(causal=3), "causal must be True or False; got 3"),
        (dict(colour="red"), "has no argument colour"),
    ],
)
def test_bad_input_of_additive(engine, change, message):
    q, k, v = random_qkv(heads=2, q_len=5, kv_len=9, head_dim=4)
    out = np.full_like(q, 7)
    with pytest.raises((ValueError, TypeError), match=message):
        fastattn.additive_attention(**{"q": q, "k": k, "v": v, **weights_of(4, 4), "out": out, **change})
    assert (out == 7).all()
    w = np.ones((2, 4, 4), np.float32)
    with pytest.raises(ValueError, match="out must not overlap an input; it overlaps w_q"):
        fastattn.additive_attention(q[:, :, :4], k, v, w, np.ones((4, 4)), np.ones(4), out=w[None])


# Luong


def luong(q, k, v, score, w=None, w_v=None, w_p=None, v_p=None, reach=None, local=None, shown=True):
    """The formula, in float64: ``(out, lse)``."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    if score == "concat":
        pairs = [np.broadcast_to(x, (*q.shape[:3], k.shape[2], x.shape[-1])) for x in (q[:, :, :, None], k[:, :, None])]
        s = (np.tanh(np.concatenate(pairs, axis=-1) @ w) * w_v).sum(axis=-1)
    else:
        s = (q if w is None else q @ w) @ k.swapaxes(-1, -2)
    j = np.arange(k.shape[2])
    gauss = np.ones_like(s)
    if local == "monotonic":
        shown = shown & (np.abs(j - np.arange(q.shape[2])[:, None]) <= reach)
    if local == "predictive":
        place = k.shape[2] / (1 + np.exp(-(np.tanh(q @ w_p) @ v_p)))
        shown = shown & (np.abs(j - place[..., None]) <= reach)
        gauss = np.exp(-((j - place[..., None]) ** 2) / (2 * (reach / 2) ** 2))
    s = np.where(shown, s, -np.inf)
    lse = np.log(np.exp(s).sum(axis=-1))
    return (np.exp(s - lse[..., None]) * gauss) @ v, lse


def luong_weights(score, q_dim, k_dim, seed=9):
    rng = np.random.default_rng(seed)
    if score == "dot":
        return {}
    if score == "general":
        return {"w": rng.standard_normal((q_dim, k_dim)).astype(np.float32) / 3}
    return {"w": rng.standard_normal((q_dim + k_dim, 13)).astype(np.float32), "w_v": rng.standard_normal(13).astype(np.float32)}


@pytest.mark.parametrize("score", ["dot", "general", "concat"])
@pytest.mark.parametrize("local", [None, "monotonic", "predictive"])
@pytest.mark.parametrize("sizes", [(3, 40), (40, 40)], ids=str)
def test_luong(engine, score, local, sizes):
    k_dim = 8 if score == "dot" else 5
    q, _, _ = random_qkv(batch=2, heads=4, q_len=sizes[0], kv_len=1, head_dim=8)
    _, k, v = random_qkv(batch=2, heads=2, q_len=1, kv_len=sizes[1], head_dim=k_dim, v_head_dim=6)
    w = luong_weights(score, 8, k_dim)
    options = {} if local is None else {"window": 4}
    if local == "predictive":
        rng = np.random.default_rng(3)
        w |= {"w_p": rng.standard_normal((8, 7)).astype(np.float32), "v_p": rng.standard_normal(7).astype(np.float32)}
    out, lse = fastattn.luong_attention(q, k, v, score=score, local=local, return_lse=True, **w, **options)
    expected, expected_lse = luong(q, k, v, score, **w, reach=options.get("window"), local=local)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("score", ["dot", "general", "concat"])
def test_luong_of_16_bits(engine, score, dtype):
    q, k, v = random_qkv(heads=2, q_len=20, kv_len=30, head_dim=6, dtype=dtype)
    w = luong_weights(score, 6, 6)
    out = fastattn.luong_attention(q, k, v, score=score, **w)
    assert out.dtype == q.dtype
    expected, _ = luong(q, k, v, score, **w)
    np.testing.assert_allclose(out.astype(np.float64), expected, rtol=2 * ulp(dtype), atol=2 * ulp(dtype) * np.abs(expected).max())


@pytest.mark.parametrize("kind", [bool, np.float32])
def test_luongs_window_under_a_mask(engine, kind, monkeypatch):
    monkeypatch.setattr("fastattn.scores._MOST_PAIRS", 1000)  # rows a few at a time
    q, k, v = random_qkv(heads=2, q_len=33, kv_len=40, head_dim=8)
    rng = np.random.default_rng(4)
    w = {"w_p": rng.standard_normal((8, 7)).astype(np.float32), "v_p": rng.standard_normal(7).astype(np.float32)}
    shown = rng.random((33, 40)) < 0.8
    shown[5] = False
    mask = shown if kind is bool else np.where(shown, 0, -np.inf).astype(kind)
    v[0, 1, 7] = np.nan  # and whoever does not see it does not get it
    shown[:, 7] = False
    mask[:, 7] = False if kind is bool else -np.inf
    out, lse = fastattn.luong_attention(q, k, v, local="predictive", window=6, mask=mask, return_lse=True, **w)
    with np.errstate(all="ignore"):
        expected, expected_lse = luong(q, k, np.nan_to_num(v), "dot", **w, reach=6, local="predictive", shown=shown)
    nothing = np.isneginf(expected_lse)
    assert nothing[:, :, 5].all() and not out[nothing].any() and np.isneginf(lse[nothing]).all()
    np.testing.assert_allclose(out[~nothing], expected[~nothing], rtol=1e-4, atol=2e-5)
    padded = fastattn.luong_attention(q, k, v, local="predictive", window=6, mask=mask, q_lengths=20, **w)
    np.testing.assert_allclose(padded[:, :, :20], out[:, :, :20], rtol=1e-5, atol=1e-6)
    assert not padded[:, :, 20:].any()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(score="cosine"), "score must be one of .*; got 'cosine'"),
        (dict(score="general"), "w must be given with score='general'; got None"),
        (dict(score="dot", w=np.eye(4)), "w must be None with score='dot'"),
        (dict(score="concat", w=np.ones((8, 3))), "w_v must be given with score='concat'"),
        (dict(score="concat", w=np.ones((7, 3)), w_v=np.ones(3)), r"w must have shape \(8, A\)"),
        (dict(local="somewhere", window=2), "local must be one of .*; got 'somewhere'"),
        (dict(local="monotonic"), "window must be an int of at least 1, .* with local='monotonic'; got None"),
        (dict(local="monotonic", window=0), "window must be an int of at least 1"),
        (dict(local="predictive", window=2), "w_p must be given with local='predictive'; got None"),
        (dict(local="predictive", window=2, w_p=np.ones((4, 3))), "v_p must be given"),
        (dict(local="predictive", window=2, w_p=np.ones((4, 3)), v_p=np.ones(2)), r"v_p must have shape \(3,\)"),
        (dict(window=2), "window must be a pair"),
        (dict(local="predictive", window=2, w_p=np.ones((4, 3)), v_p=np.ones(3), activation="relu"), "activation must be"),
    ],
)
def test_bad_input_of_luong(engine, options, message):
    q, k, v = random_qkv(heads=2, q_len=5, kv_len=9, head_dim=4)
    out = np.full_like(q, 7)
    with pytest.raises((ValueError, TypeError), match=message):
        fastattn.luong_attention(q, k, v, out=out, **options)
    assert (out == 7).all()
    with pytest.raises(ValueError, match="k must have the head size of q"):
        fastattn.luong_attention(q, k[..., :3], v)
