"""fastattn.flash_attn: flash-attn's names, order of arguments, layout and defaults, for tensors and arrays."""

import inspect

import numpy as np
import pytest
from inputs import random_qkv
from oracle import attention as expected_attention

import fastattn
from fastattn import flash_attn

KINDS = ["array", pytest.param("tensor", marks=pytest.mark.torch)]
SLOPES = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
RULES = [  # flash-attn's keywords, and what they mean
    ({}, {}),
    ({"causal": True}, {"causal": True}),
    ({"window_size": (3, -1)}, {"window": (3, None)}),
    ({"causal": True, "window_size": (4, 2), "softcap": 2.0}, {"causal": True, "window": (4, 2), "softcap": 2.0}),
    ({"softmax_scale": 0.3, "alibi_slopes": SLOPES}, {"scale": 0.3, "alibi_slopes": SLOPES}),
]


@pytest.fixture(params=KINDS)
def kind(request):
    """How arrays are given: as they are, or as tensors."""
    if request.param == "array":
        return lambda x: x
    torch = pytest.importorskip("torch")
    return lambda x: torch.from_numpy(x) if isinstance(x, np.ndarray) else x


def assert_is(actual, expected, like=None):
    assert like is None or type(actual) is type(like)
    np.testing.assert_allclose(np.asarray(actual), expected, atol=3e-6, rtol=1e-6)


def blhd(*arrays):
    return [np.ascontiguousarray(x.swapaxes(1, 2)) for x in arrays]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("rules, meaning", RULES, ids=str)
@pytest.mark.parametrize("q_len, kv_len", [(7, 7), (3, 9), (9, 3), (1, 20)])
def test_dense(kind, rules, meaning, q_len, kv_len):
    q, k, v = random_qkv(2, 4, q_len, kv_len, 8, 6, kv_heads=2)
    expected, expected_lse = expected_attention(q, k, v, **meaning)
    given = [kind(x) for x in blhd(q, k, v)]
    rules = {name: kind(x) for name, x in rules.items()}
    assert_is(flash_attn.flash_attn_func(*given, **rules), expected.swapaxes(1, 2), given[0])
    out, lse, probabilities = flash_attn.flash_attn_func(*given, **rules, return_attn_probs=True)
    assert_is(out, expected.swapaxes(1, 2), given[0])
    assert_is(lse, expected_lse, given[0])
    assert probabilities is None


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_dtypes(dtype, kind):
    q, k, v = blhd(*random_qkv(1, 2, 5, 9, 8, dtype="float32"))
    exact = flash_attn.flash_attn_func(q, k, v)
    narrow = [x.astype(random_qkv(dtype=dtype)[0].dtype) for x in (q, k, v)]
    if kind(q) is not q:
        torch = pytest.importorskip("torch")
        narrow = [torch.from_numpy(x).to(getattr(torch, dtype)) for x in (q, k, v)]
    for out in (
        flash_attn.flash_attn_func(*narrow),
        flash_attn.flash_attn_varlen_func(*(x[0] for x in narrow), np.array([0, 5]), np.array([0, 9]))[None],
    ):
        assert out.dtype == narrow[0].dtype
        np.testing.assert_allclose(out.float().numpy() if hasattr(out, "float") else out.astype(np.float32), exact, atol=0.03)


def test_packed_forms(kind):
    q, k, v = random_qkv(2, 4, 6, 6, 8)
    expected, _ = expected_attention(q, k, v, causal=True)
    qkv = np.stack(blhd(q, k, v), axis=2)
    assert_is(flash_attn.flash_attn_qkvpacked_func(kind(qkv), causal=True), expected.swapaxes(1, 2))
    assert_is(flash_attn.flash_attn_kvpacked_func(kind(qkv[:, :, 0]), kind(qkv[:, :, 1:]), causal=True), expected.swapaxes(1, 2))
    flat, starts = kind(qkv.reshape(12, 3, 4, 8)), kind(np.array([0, 6, 12], np.int32))
    assert_is(flash_attn.flash_attn_varlen_qkvpacked_func(flat, starts, 6, causal=True), expected.swapaxes(1, 2).reshape(12, 4, 8))
    assert_is(
        flash_attn.flash_attn_varlen_kvpacked_func(flat[:, 0], flat[:, 1:], starts, starts, 6, 6, causal=True),
        expected.swapaxes(1, 2).reshape(12, 4, 8),
    )


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("rules, meaning", RULES, ids=str)
def test_varlen(kind, rules, meaning):
    starts_q, starts_k = np.array([0, 3, 3, 9, 10], np.int32), np.array([0, 5, 9, 12, 40], np.int64)
    q, k, v = (x[0].swapaxes(0, 1) for x in random_qkv(1, 4, 10, 40, 8, 6, kv_heads=2))
    _, k, v = (np.ascontiguousarray(x) for x in (q, k, v))
    rules = {name: kind(x) for name, x in rules.items()}
    out, lse, _ = flash_attn.flash_attn_varlen_func(
        *map(kind, (np.ascontiguousarray(q), k, v, starts_q, starts_k)), 6, 28, **rules, return_attn_probs=True
    )
    pages, table = paged(k, v, starts_k, 4)
    from_pages = flash_attn.flash_attn_varlen_func(
        kind(np.ascontiguousarray(q)), *map(kind, pages), kind(starts_q), kind(starts_k), **rules, block_table=kind(table)
    )
    for b in range(4):
        rows, keys = slice(*starts_q[b : b + 2]), slice(*starts_k[b : b + 2])
        expected, expected_lse = expected_attention(*(x.swapaxes(0, 1) for x in (q[rows], k[keys], v[keys])), **meaning)
        assert_is(out[rows], expected.swapaxes(0, 1))
        assert_is(lse[:, rows], expected_lse)
        assert_is(from_pages[rows], expected.swapaxes(0, 1))


def paged(k, v, starts, page_size):
    """Packed keys and values scattered over pages in a random order, and the table that finds them."""
    rng = np.random.default_rng(0)
    counts = -(-np.diff(starts) // page_size)
    order = rng.permutation(counts.sum())
    table = np.full((len(counts), counts.max()), -1, np.int32)
    pages = [np.full((len(order), page_size, *x.shape[1:]), np.nan, x.dtype) for x in (k, v)]
    for b, count in enumerate(counts):
        table[b, :count], order = order[:count], order[count:]
        for n in range(starts[b + 1] - starts[b]):
            for x, x_pages in zip((k, v), pages):
                x_pages[table[b, n // page_size], n % page_size] = x[starts[b] + n]
    return pages, table


def filled_cache(batch=3, capacity=16, new=2):
    q, k, v = blhd(*random_qkv(batch, 4, new, capacity, 8, kv_heads=2))
    k_new, v_new = blhd(*random_qkv(batch, 2, new, new, 8, seed=1)[1:])
    return q, k, v, k_new, v_new


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("rules, meaning", RULES, ids=str)
@pytest.mark.parametrize("form", ["contiguous", "rows", "pages", "left padding"])
def test_cache(kind, rules, meaning, form):
    q, k, v, k_new, v_new = filled_cache()
    lengths = np.array([3, 14, 7], np.int32)
    rows, starts = np.arange(3), np.zeros(3, int)
    where = {}
    k_cache, v_cache = k.copy(), v.copy()
    if form == "rows":
        rows = np.array([2, 0, 3])
        where["cache_batch_idx"] = rows.astype(np.int32)
        k_cache, v_cache = (np.zeros((5, *x.shape[1:]), x.dtype) for x in (k, v))
        k_cache[rows], v_cache[rows] = k, v
    if form == "left padding":
        starts = np.array([1, 4, 0])
        where["cache_leftpad"] = starts.astype(np.int32)
    if form == "pages":
        (k_cache, v_cache), where["block_table"] = paged(k.reshape(48, 2, 8), v.reshape(48, 2, 8), np.array([0, 16, 32, 48]), 4)
    for b in range(3):
        k[b, lengths[b] : lengths[b] + 2], v[b, lengths[b] : lengths[b] + 2] = k_new[b], v_new[b]

    given = [kind(x) for x in (q, k_cache, v_cache, k_new, v_new)]
    rules = {name: kind(x) for name, x in (rules | where).items()}
    out, lse = flash_attn.flash_attn_with_kvcache(*given, cache_seqlens=kind(lengths), **rules, return_softmax_lse=True)
    again = flash_attn.flash_attn_with_kvcache(*given[:3], cache_seqlens=kind(lengths + 2), **rules)  # now they are in the cache
    for b in range(3):
        keys = slice(starts[b], lengths[b] + 2)
        expected, expected_lse = expected_attention(*(x.swapaxes(0, 1) for x in (q[b], k[b, keys], v[b, keys])), **meaning)
        assert_is(out[b], expected.swapaxes(0, 1))
        assert_is(lse[b], expected_lse)
        assert_is(again[b], expected.swapaxes(0, 1))
        if form in ("contiguous", "rows"):
            np.testing.assert_array_equal(k_cache[rows[b]], k[b])  # in place, and nothing else


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_cache_with_rotation(kind, interleaved, causal):
    q, k, v, k_new, v_new = filled_cache()
    lengths = np.array([3, 14, 7], np.int32)
    angles = np.arange(20)[:, None] / 10.0 ** np.arange(3)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def rotate(x, position):  # complex numbers turn by the angle
        x = x.astype(np.float64).copy()
        pairs = x[..., :6].reshape(-1, 3, 2) if interleaved else np.stack([x[..., :3], x[..., 3:6]], -1).reshape(-1, 3, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles[position])
        pairs = np.stack([turned.real, turned.imag], -1)
        x[..., :6] = (pairs if interleaved else pairs.swapaxes(1, 2)).reshape(*x.shape[:-1], 6)
        return x

    out = flash_attn.flash_attn_with_kvcache(
        *map(kind, (q, k.copy(), v.copy(), k_new, v_new, cos, sin)), cache_seqlens=kind(lengths), causal=causal,
        rotary_interleaved=interleaved,
    )  # fmt: skip
    for b, length in enumerate(lengths):
        q_b = np.stack([rotate(q[b, i], length + i * causal) for i in range(2)])
        k_b = np.concatenate([k[b, :length], [rotate(k_new[b, i], length + i) for i in range(2)]])
        v_b = np.concatenate([v[b, :length], v_new[b]])
        expected, _ = expected_attention(*(x.swapaxes(0, 1) for x in (q_b, k_b, v_b)), causal=causal)
        assert_is(out[b], expected.swapaxes(0, 1))


def test_cache_by_defaults(kind):
    """No lengths: all of the cache; one int: the same for all."""
    q, k, v, *_ = filled_cache()
    for length in (None, 9):
        expected, _ = expected_attention(*(x[:, :length].swapaxes(1, 2) for x in (q, k, v)))
        assert_is(flash_attn.flash_attn_with_kvcache(*map(kind, (q, k, v)), cache_seqlens=length), expected.swapaxes(1, 2))


def test_signatures_are_those_of_flash_attn():
    """The first arguments are given by position in programs that exist."""
    order = {
        "flash_attn_func": "q k v dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic",
        "flash_attn_qkvpacked_func": "qkv dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic",
        "flash_attn_kvpacked_func": "q kv dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic",
        "flash_attn_varlen_func": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale causal",
        "flash_attn_varlen_qkvpacked_func": "qkv cu_seqlens max_seqlen dropout_p softmax_scale causal window_size softcap",
        "flash_attn_varlen_kvpacked_func": "q kv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale",
        "flash_attn_with_kvcache": "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad "
        "block_table softmax_scale causal window_size softcap rotary_interleaved alibi_slopes num_splits return_softmax_lse",
    }
    assert set(order) == set(flash_attn.__all__)
    for name, arguments in order.items():
        names = list(inspect.signature(getattr(flash_attn, name)).parameters)
        assert names[: len(arguments.split())] == arguments.split()


def test_what_is_refused(kind):
    q, k, v, k_new, v_new = map(kind, filled_cache())
    with pytest.raises(NotImplementedError, match="dropout_p"):
        flash_attn.flash_attn_func(q, k, v, 0.1)
    with pytest.raises(ValueError, match="batch"):
        flash_attn.flash_attn_func(q[0], k[0], v[0]) if not hasattr(q, "detach") else flash_attn.flash_attn_func(q[:2], k, v)
    with pytest.raises(ValueError, match="cu_seqlens_k"):
        flash_attn.flash_attn_varlen_func(q[0], k[0], v[0], np.array([0, 2]), np.array([0, 15]))
    with pytest.raises(ValueError, match="cu_seqlens_q"):
        flash_attn.flash_attn_varlen_func(q[0], k[0], v[0], np.array([0, 3, 2]), np.array([0, 15, 16]))
    with pytest.raises(ValueError, match="qkv"):
        flash_attn.flash_attn_qkvpacked_func(q)
    with pytest.raises(ValueError, match="cache_seqlens"):
        flash_attn.flash_attn_with_kvcache(q, k, v, k_new, v_new)
    with pytest.raises(ValueError, match="room for 2 new"):
        flash_attn.flash_attn_with_kvcache(q, k, v, k_new, v_new, cache_seqlens=15)
    with pytest.raises(ValueError, match="block_table"):
        flash_attn.flash_attn_with_kvcache(q, k, v, cache_seqlens=9, block_table=np.full((3, 2), 7, np.int32))
    with pytest.raises(TypeError, match="window_size"):
        flash_attn.flash_attn_func(q, k, v, window_size=3)


@pytest.mark.torch
def test_gradients_are_refused():
    torch = pytest.importorskip("torch")
    q, k, v, *_ = map(torch.from_numpy, filled_cache())
    q.requires_grad_()
    for call in (
        lambda: flash_attn.flash_attn_func(q, k, v),
        lambda: flash_attn.flash_attn_varlen_func(q[0], k[0], v[0], np.array([0, 2]), np.array([0, 16])),
        lambda: flash_attn.flash_attn_with_kvcache(q, k, v),
    ):
        with pytest.raises(RuntimeError, match="no backward pass"):
            call()


@pytest.mark.torch
def test_the_dense_form_compiles():
    torch = pytest.importorskip("torch")
    q, k, v, *_ = map(torch.from_numpy, filled_cache())

    def attend(q, k, v):
        return flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(5, 0)) + 1

    torch.testing.assert_close(torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v), attend(q, k, v))


@pytest.mark.torch
def test_the_packed_form_compiles():
    torch = pytest.importorskip("torch")
    q, k, v, *_ = (torch.from_numpy(x).flatten(0, 1) for x in filled_cache())
    starts_q, starts_k = torch.tensor([0, 1, 4, 6]), torch.tensor([0, 20, 20, 48], dtype=torch.int32)

    def attend(q, k, v):
        out, lse, _ = flash_attn.flash_attn_varlen_func(
            q, k, v, starts_q, starts_k, 3, 28, causal=True, window_size=(5, 0), return_attn_probs=True
        )
        return out + 1, flash_attn.flash_attn_varlen_func(q, k, v, starts_q, starts_k) + lse.sum()

    torch.testing.assert_close(torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v), attend(q, k, v))


def test_sequences_go_in_one_call(monkeypatch, kind):
    """Not one after the other: packed, and padded on either side within a cache."""
    calls = []

    def seen(function):
        return lambda *args, **options: calls.append(options) or function(*args, **options)

    q, k, v, *_ = map(kind, filled_cache())
    for module in (flash_attn, *([fastattn.torch] if hasattr(q, "detach") else [])):
        monkeypatch.setattr(module, "_attention", seen(fastattn.attention))
        name = "_attention_varlen" if module is not flash_attn else "attention_varlen"
        monkeypatch.setattr(module, name, seen(fastattn.attention_varlen))
    monkeypatch.setattr(flash_attn, "paged_attention", seen(fastattn.paged_attention))
    flash_attn.flash_attn_varlen_func(q[0], k[0], v[0], kind(np.array([0, 1, 2])), kind(np.array([0, 9, 16])))
    flash_attn.flash_attn_with_kvcache(q, k, v, cache_seqlens=kind(np.array([3, 14, 7])), cache_leftpad=kind(np.array([1, 4, 0])))
    assert len(calls) == 2
    where = {"cache_seqlens": kind(np.array([3, 14, 7])), "cache_batch_idx": kind(np.array([2, 0, 1]))}
    flash_attn.flash_attn_with_kvcache(q, k, v, **where)
    assert len(calls) == 3


def test_is_reached_from_the_package():
    assert fastattn.flash_attn is flash_attn
