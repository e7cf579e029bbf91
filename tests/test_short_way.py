"""The native engine's short way through Python: it takes what is ordinary, leaves the rest, and changes nothing."""

from contextlib import contextmanager

import numpy as np
import pytest
from inputs import dtype_of, random_qkv, unaligned
from test_check import ARRAYS, OPTIONS

import fastattn
from fastattn import runtime

native = pytest.importorskip("fastattn._native", reason="the extension was not built")

q, k, v = random_qkv(2, 4, 5, 7, 8, 6, kv_heads=2)
rng = np.random.default_rng(0)
float_mask = rng.standard_normal((2, 1, 5, 7))
float_mask[..., 3] = -np.inf
wide = np.zeros((2, 5, 4, 16), np.float32).swapaxes(1, 2)

ORDINARY = [
    {},
    {"causal": True},
    {"causal": True, "return_lse": True},
    {"scale": 0.25, "softcap": 3.0},
    {"scale": -0.0, "softcap": 0.0},
    {"window": (2, 1)},
    {"window": (None, 1), "return_lse": True},
    {"window": (-1, -1)},
    {"window": (2**56, 2**57)},
    {"query_offset": 0, "causal": True},
    {"query_offset": np.array([-3, 2]), "causal": True},
    {"kv_lengths": 3},
    {"kv_lengths": np.array([7, 0])},
    {"kv_lengths": np.array([9, 7, 9, 2])[1::2], "causal": True},
    {"kv_lengths": np.array([1, 7], np.int32)},
    {"mask": float_mask[0, 0] > 0},
    {"mask": np.asfortranarray(float_mask > 0)},
    {"mask": np.array(True)},
    {"mask": (float_mask > 0)[..., ::-1, :]},
    {"mask": float_mask},
    {"mask": float_mask.astype(np.float32)[:, :, :1]},
    {"mask": float_mask.astype(np.float16)[0, :, :, :1]},
    {"alibi_slopes": np.linspace(0, 1, 4, dtype=np.float32)},
    {"alibi_slopes": np.linspace(0, 1, 8, dtype=np.float32).reshape(4, 2).T},
    {"sinks": np.float32([0, -np.inf, 3, 1])},
    {"precision": "high"},
    {"precision": "medium"},
    {"activation": "softmax", "activation_bias": None, "power": 3, "score_function": None},
    {"out": np.empty((2, 4, 5, 6), np.float32)},
    {"out": wide[..., 2:8], "return_lse": True},
    {"out": np.empty((2, 4, 5, 6), np.float32)[::-1], "mask": float_mask, "sinks": np.zeros(4, np.float32)},
]


@contextmanager
def without(way):
    """Calls go through every check."""
    former = getattr(runtime._state, way)
    setattr(runtime._state, way, runtime._no_short_way)
    try:
        yield
    finally:
        setattr(runtime._state, way, former)


def long_way(*arrays, **options):
    """The same call through every check."""
    with without("attention_plain"):
        return fastattn.attention(*arrays, **options)


def copied(result):
    return [np.array(x) for x in (result if isinstance(result, tuple) else (result,))]


@pytest.fixture(autouse=True)
def native_backend():
    with fastattn.use_backend("native"):
        yield


@pytest.mark.parametrize("options", ORDINARY, ids=[str(n) + "-" + "-".join(o) for n, o in enumerate(ORDINARY)])
@pytest.mark.parametrize("dtypes", [("float32",) * 2, ("float16",) * 2, ("bfloat16",) * 2, ("float32", "bfloat16")], ids=str)
def test_takes_what_is_ordinary(options, dtypes):
    arrays = [x.astype(dtype_of(name)) for x, name in zip((q, k, v), (dtypes[0], dtypes[1], dtypes[1]))]
    if "out" in options:
        options = {**options, "out": options["out"].astype(arrays[0].dtype, copy=dtypes[0] != "float32")}
    long = copied(long_way(*arrays, **options))  # first, for it makes bfloat16 known
    short = native.attention_plain(*arrays, **options)
    assert short is not None
    if "out" in options:
        assert (short[0] if isinstance(short, tuple) else short) is options["out"]
    for a, b in zip(copied(short), long, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("n", range(len(ARRAYS)))
def test_leaves_arrays_that_are_wrong(n):
    assert native.attention_plain(*ARRAYS[n][0]) is None


@pytest.mark.parametrize("n", range(len(OPTIONS)), ids=[next(iter(options)) for options, *_ in OPTIONS])
def test_leaves_options_that_are_wrong(n):
    out = np.full((2, 4, 5, 6), 99, np.float32)
    assert native.attention_plain(q, k, v, **{"out": out, **OPTIONS[n][0]}) is None
    assert (out == 99).all()


memory = np.zeros(1000, np.float32)
UNUSUAL = [
    {"mask": unaligned(float_mask)},
    {"mask": float_mask.astype(">f8")},
    {"mask": fastattn.BlockMask.causal(5, k_len=7)},
    {"mask": [[True] * 7] * 5},
    {"alibi_slopes": np.zeros(4)},
    {"alibi_slopes": np.zeros((1, 4), np.float32)},
    {"alibi_slopes": np.zeros(1, np.float32)},
    {"sinks": np.zeros(8, np.float32)[::2]},
    {"kv_lengths": [7, 3]},
    {"kv_lengths": True},
    {"kv_lengths": np.array([7, 3], np.uint8)},
    {"query_offset": 2**80},
    {"window": [2, 1]},
    {"window": (True, 1)},
    {"window": (2**58, 1)},
    {"window": (2**80, 1)},
    {"scale": 1},
    {"scale": np.float32(0.5)},
    {"precision": np.array(["highest", "high"])},
    {"precision": ["highest"]},
    {"activation": "relu"},
    {"activation_bias": 1.0},
    {"power": np.array([3, 3])},
    {"power": 0},
    {"score_function": lambda scores, b, h, i, j: scores},
    {"strength": 2},
    {"out": unaligned(np.zeros((2, 4, 5, 6), np.float32))},
    {"out": np.zeros((2, 4, 5, 12), np.float32)[..., ::2]},
    {"out": np.lib.stride_tricks.as_strided(memory, (2, 4, 5, 6), (480, 120, 0, 4))},
    {"out": memory[:240].reshape(2, 4, 5, 6), "sinks": memory[239:243]},
    {"out": memory[100:340].reshape(2, 4, 5, 6)[::-1, ::-1], "mask": memory[339:344].reshape(5, 1)},
    {"out": memory[100:340].reshape(2, 4, 5, 6), "alibi_slopes": memory[104:96:-1].reshape(2, 4)},
]


@pytest.mark.parametrize("n", range(len(UNUSUAL)), ids=[next(iter(options)) for options in UNUSUAL])
def test_leaves_what_is_unusual(n):
    assert native.attention_plain(q, k, v, **UNUSUAL[n]) is None


LISTS = [
    (np.array([[[[6, 0, 3]] * 5]] * 2), {}),
    (np.array([[[[6, -1, 3]] * 5, [[1, 2, -1]] * 5]] * 2, np.int32), {"causal": True, "return_lse": True}),
    (np.arange(240).reshape(2, 2, 5, 12)[..., 2::6] % 7, {"mask": float_mask, "sinks": np.zeros(4, np.float32)}),
    (np.zeros((2, 1, 5, 0), np.int32), {"out": np.empty((2, 4, 5, 6), np.float32)}),
]


@pytest.mark.parametrize("n", range(len(LISTS)))
def test_takes_lists_of_keys(n):
    lists, options = LISTS[n]
    with without("attention_plain"):
        long = copied(fastattn.attention_indexed(q, k, v, lists, **options))
    before = lists.copy()
    short = native.attention_plain(q, k, v, lists, **options)
    assert short is not None
    for a, b in zip(copied(short), long, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(lists, before)


@pytest.mark.parametrize(
    "lists",
    [
        np.array([[[[6, 7]] * 5]] * 2), np.array([[[[6, 6]] * 5]] * 2), np.array([[[[-2]] * 5]] * 2), np.zeros((2, 1, 5, 1)),
        np.zeros((2, 1, 5, 1), np.uint32), np.zeros((1, 1, 5, 1), int), np.zeros((2, 4, 5, 1), int), np.zeros((2, 1, 4, 1), int),
        np.zeros((2, 5, 1), int), [[[[0]] * 5]] * 2, unaligned(np.zeros((2, 1, 5, 1), int)),
    ],
)  # fmt: skip
def test_leaves_lists_that_are_not_plain(lists):
    out = np.full((2, 4, 5, 6), 99, np.float32)
    assert native.attention_plain(q, k, v, lists, out=out) is None
    assert (out == 99).all()


def test_attention_takes_no_lists():
    with pytest.raises(TypeError, match="indices"):
        fastattn.attention(q, k, v, indices=LISTS[0][0])


def test_takes_out_beside_an_input():
    out = memory[100:340].reshape(2, 4, 5, 6)
    assert native.attention_plain(q, k, v, out=out, sinks=memory[340:344], alibi_slopes=memory[96:100]) is out


def test_leaves_large_batches_with_tables():
    """Lengths are copied to the stack, where there is room for 64."""
    arrays = random_qkv(65, 1, 1, 3, 8)
    assert native.attention_plain(*arrays, kv_lengths=np.full(65, 2)) is None
    assert native.attention_plain(*(x[:64] for x in arrays), kv_lengths=np.full(64, 2)) is not None
    np.testing.assert_array_equal(
        fastattn.attention(*arrays, kv_lengths=np.full(65, 2)), long_way(*(x[..., :2, :] for x in arrays))
    )


# The linear family

tokens = np.random.default_rng(1).standard_normal((3, 2, 4, 5, 8)).astype(np.float32)
keys = tokens[1, :, :2]
rates, factors = np.random.default_rng(2).uniform(0, 1, (2, 2, 4, 5)).astype(np.float32)
states = np.random.default_rng(3).standard_normal((2, 4, 8, 9)).astype(np.float32)

ORDINARY_LINEAR = [
    {},
    {"return_state": True},
    {"scale": 0.5, "state": states[..., :8], "return_state": True},
    {"beta": rates[:, :1], "return_state": True},
    {"beta": rates, "decay": factors.astype(np.float16), "state": states[..., :8]},
    {"decay": factors[..., None] * np.ones(8, np.float32)},
    {"log_decay": np.log(factors)[:1, ::-1], "default_scale": 1.0},
    {"feature_map": "elu", "normalize": True, "state": states, "return_state": True},
    {"feature_map": "relu", "normalize": True},
    {"out": np.empty((2, 4, 5, 16), np.float32)[..., 4:12]},
    {"state_out": np.empty((2, 4, 8, 8), np.float32), "return_state": True},
]


def long_linear(*arrays, **options):
    with without("linear_plain"):
        return fastattn.linear._compute(*arrays, **options)


@pytest.mark.parametrize("options", ORDINARY_LINEAR, ids=[str(n) + "-" + "-".join(o) for n, o in enumerate(ORDINARY_LINEAR)])
@pytest.mark.parametrize("dtypes", [("float32",) * 2, ("bfloat16",) * 2, ("float32", "float16")], ids=str)
@pytest.mark.parametrize("length", [1, 5])
def test_linear_takes_what_is_ordinary(options, dtypes, length):
    arrays = [x[:, :, :length].astype(dtype_of(name)) for x, name in zip((tokens[0], keys, tokens[2]), (dtypes[0], dtypes[1], dtypes[1]))]
    options = {name: x[:, :, :length] if name in ("beta", "decay", "log_decay", "out") else x for name, x in options.items()}
    if "out" in options:
        options["out"] = options["out"].astype(arrays[0].dtype, copy=dtypes[0] != "float32")
    long = copied(long_linear(*arrays, **options))
    short = native.linear_plain(*arrays, **options)
    assert short is not None
    first, *rest = short if isinstance(short, tuple) else (short,)
    assert first is options.get("out", first) and all(x is options.get("state_out", x) for x in rest)
    for a, b in zip(copied(short), long, strict=True):
        np.testing.assert_array_equal(a, b)


def test_linear_state_in_place():
    expected, after = long_linear(tokens[0], keys, tokens[2], beta=rates, state=states[..., :8], return_state=True)
    state = states[..., :8].copy()
    out, returned = native.linear_plain(tokens[0], keys, tokens[2], beta=rates, state=state, state_out=state, return_state=True)
    assert returned is state
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(state, after)


shared = np.zeros((2, 4, 8, 9), np.float32)
UNUSUAL_LINEAR = [
    {"kv_lengths": 3},
    {"cu_seqlens": np.array([0, 5])},
    {"causal": False},
    {"causal": 1},
    {"scale": 1},
    {"feature_map": ["elu"]},
    {"feature_map": "tanh"},
    {"beta": rates.astype(np.float64)},
    {"beta": rates[..., None]},
    {"beta": rates[:, :3]},
    {"decay": factors[..., None] * np.ones(7, np.float32)},
    {"decay": factors[..., None]},
    {"decay": factors + 1},
    {"log_decay": factors + 1},
    {"decay": unaligned(factors)},
    {"state": states},
    {"state": states[..., :8].astype(np.float64)},
    {"state": states[..., :8].tolist()},
    {"state_out": states[..., :8].astype(np.float16)},
    {"state": shared[..., :8], "state_out": shared[..., 1:]},
    {"state_out": shared[..., :8], "out": shared[:, :, :5, :8]},
    {"state": shared[..., :8], "out": shared[:, :, :5, :8]},
    {"out": np.zeros((2, 4, 5, 16), np.float32)[..., ::2]},
    {"out": np.zeros((2, 4, 6, 8), np.float32)},
    {"out": tokens[0]},
]


@pytest.mark.parametrize("n", range(len(UNUSUAL_LINEAR)), ids=["-".join(options) for options in UNUSUAL_LINEAR])
def test_linear_leaves_what_is_unusual(n):
    options = {"state_out": np.full((2, 4, 8, 8), 99, np.float32), **UNUSUAL_LINEAR[n]}
    assert native.linear_plain(tokens[0], keys, tokens[2], **options) is None
    assert UNUSUAL_LINEAR[n].keys() & {"state_out"} or (options["state_out"] == 99).all()


WRONG_SHAPES = [
    [(2, 4, 5, 8), (2, 3, 5, 8), (2, 4, 5, 8)],
    [(2, 4, 5, 8), (2, 2, 5, 8), (2, 4, 6, 8)],
    [(2, 4, 5, 8), (2, 0, 5, 8), (2, 4, 5, 8)],
    [(2, 4, 5, 8), (2, 2, 5, 7), (2, 4, 5, 8)],
    [(1, 4, 5, 8), (2, 2, 5, 8), (2, 4, 5, 8)],
    [(4, 5, 8)] * 3,
]


@pytest.mark.parametrize("shapes", WRONG_SHAPES, ids=str)
def test_linear_leaves_shapes_that_do_not_fit(shapes):
    assert native.linear_plain(*(np.zeros(shape, np.float32) for shape in shapes)) is None


# Rotary embedding

cos, sin = fastattn.rope_table(np.arange(10).reshape(2, 5), 6)  # of each entry
ORDINARY_ROPE = [
    {},
    {"interleaved": True, "rotary_dim": 6},
    {"cos": cos[0], "sin": sin[0]},
    {"cos": cos[:1], "sin": sin[0]},
    {"cos": cos[:, None], "sin": np.broadcast_to(sin[:, None], (2, 4, 5, 3))},
    {"cos": cos[..., ::-1][..., 2:], "sin": sin[..., :1]},
    {"out": np.empty((2, 4, 5, 16), np.float32)[..., 4:12]},
]


def long_rope(x, **options):
    with without("rope_plain"):
        return fastattn.apply_rope(x, **{"cos": cos, "sin": sin, **options})


def short_rope(x, **options):
    return native.rope_plain(x, **{"cos": cos, "sin": sin, **options})


@pytest.mark.parametrize("options", ORDINARY_ROPE, ids=[str(n) + "-" + "-".join(o) for n, o in enumerate(ORDINARY_ROPE)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("side_by_side", [False, True])
def test_rope_takes_what_is_ordinary(options, dtype, side_by_side):
    x = tokens[0].astype(dtype_of(dtype))
    if side_by_side:
        x = x.swapaxes(1, 2).copy().swapaxes(1, 2)
    if "out" in options:
        options = {"out": options["out"].astype(x.dtype, copy=dtype != "float32")}
    long = long_rope(x, **options)
    expected = long.copy()
    short = short_rope(x, **options)
    np.testing.assert_array_equal(short, expected)
    assert short is options["out"] if "out" in options else short.strides == long.strides
    again = x.copy(order="K")
    assert short_rope(again, **{**options, "out": again}) is again
    np.testing.assert_array_equal(again, expected)


UNUSUAL_ROPE = [
    {"cos": cos.astype(np.float64)},
    {"cos": cos.tolist()},
    {"cos": unaligned(cos)},
    {"cos": np.repeat(cos, 2, -1)[..., ::2]},
    {"cos": cos[..., :2]},
    {"sin": sin[:, :4]},
    {"sin": sin[0, 0]},
    {"cos": np.zeros((2, 5, 5), np.float32), "sin": np.zeros((2, 5, 5), np.float32)},
    {"interleaved": 1},
    {"rotary_dim": 4},
    {"rotary_dim": 6.0},
    {"out": np.zeros((2, 4, 5, 8))},
    {"out": np.zeros((2, 4, 6, 8), np.float32)},
    {"out": np.zeros((2, 4, 5, 16), np.float32)[..., ::2]},
    {"out": tokens[0, :, ::-1]},
    {"out": np.broadcast_to(np.zeros(8, np.float32), (2, 4, 5, 8))},
    {"out": memory[:320].reshape(2, 4, 5, 8), "cos": memory[300:330].reshape(2, 5, 3)},
]


@pytest.mark.parametrize("n", range(len(UNUSUAL_ROPE)), ids=["-".join(options) for options in UNUSUAL_ROPE])
def test_rope_leaves_what_is_unusual(n):
    assert short_rope(tokens[0], **UNUSUAL_ROPE[n]) is None


@pytest.mark.parametrize(
    "x",
    [tokens[0, 0], tokens[0].astype(np.float64), tokens[0][..., ::2], tokens[0].tolist()],
    ids=["rank", "dtype", "stride", "list"],
)
def test_rope_leaves_rows_that_are_unusual(x):
    assert short_rope(x) is None


STORAGE = ["float32", "float16", "bfloat16"]
new = rng.standard_normal((2, 2, 3, 8, 4)).astype(np.float32)  # keys and values of 2 entries: 3 heads of 4, up to 8 tokens
new_v = rng.standard_normal((2, 3, 8, 5)).astype(np.float32)


def caches(dtype, filled):
    cache, pool = fastattn.KVCache(2, 3, 20, 4, 5, dtype), fastattn.PagedKVCache(6, 8, 3, 4, 5, dtype)
    cache.append(new[0], new_v, [filled, filled + 1])
    sequences = [pool.new_sequence() for _ in range(3)]
    pool.append(sequences, *(x[0].swapaxes(0, 1)[: 3 * filled] for x in (new[1], new_v)))
    return cache, pool, sequences


def content(cache):
    return [np.frombuffer(x.tobytes(), np.uint8) for x in (cache._k, cache._v)]


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("of", STORAGE)
@pytest.mark.parametrize("count", [0, 1, 3, 6])
def test_store_takes_what_is_ordinary(monkeypatch, dtype, of, count):
    k, v = (x.astype(dtype_of(of))[:, ::-1, :count] for x in (new[1], new_v))
    rows = [np.concatenate([*x.swapaxes(1, 2), x.swapaxes(1, 2)[0]]) for x in (k, v)]
    taken = []
    monkeypatch.setattr(runtime._state, "store_plain", lambda *call: taken.append(native.store_plain(*call)) or taken[-1])
    cache, pool, sequences = caches(dtype, 2)
    cache.append(k, v)
    pool.append(sequences, *rows)
    assert taken[-2 if count else -1 :] == [True] * (2 if count else 1)
    monkeypatch.setattr(runtime._state, "store_plain", runtime._no_short_way)
    long, long_pool, others = caches(dtype, 2)
    long.append(k, v)
    long_pool.append(others, *rows)
    np.testing.assert_array_equal(cache.lengths, long.lengths)
    np.testing.assert_array_equal(pool.lengths(sequences), long_pool.lengths(others))
    q = rng.standard_normal((2, 3, 1, 4)).astype(np.float32)
    np.testing.assert_array_equal(cache.attend(q), long.attend(q))
    q = rng.standard_normal((3, 3, 4)).astype(np.float32)
    np.testing.assert_array_equal(pool.attend(sequences, q), long_pool.attend(others, q))


UNUSUAL_ROWS = {
    "dtype": (new[0].astype(np.float64), new_v, 4),
    "integers": (new[0], new_v.astype(np.int32), 4),
    "list": (new[0].tolist(), new_v, 4),
    "stride": (np.repeat(new[0], 2, -1)[..., ::2], new_v, 4),
    "byte order": (new[0].astype(">f4"), new_v, 4),
    "unaligned": (unaligned(new[0]), new_v, 4),
    "batch": (new[0, :1], new_v, 4),
    "heads": (new[0, :, :2], new_v, 4),
    "head_dim": (new[0], new_v[..., :4], 4),
    "length": (new[0], new_v[:, :, :7], 4),
    "tokens by another name": (new[0].reshape(4, 3, 4, 4), new_v, 4),
    "rank": (new[0, 0], new_v, 4),
    "packed": (new[0], new_v, 3),
}


@pytest.mark.parametrize("k, v, axes", UNUSUAL_ROWS.values(), ids=UNUSUAL_ROWS)
def test_store_leaves_what_is_unusual(k, v, axes):
    cache = caches("float32", 2)[0]
    before = content(cache)
    assert not native.store_plain(k, v, cache._k, cache._v, axes, list(range(16)))
    np.testing.assert_array_equal(content(cache)[0], before[0])
    np.testing.assert_array_equal(content(cache)[1], before[1])


@pytest.mark.parametrize("slots", [[0, 40], [-2, 0], [2**40, 0], list(range(65))], ids=str)
def test_store_refuses_places_that_are_not_there(slots):
    """The library checks what guards memory, whoever calls."""
    cache = caches("float32", 2)[0]
    before = content(cache)
    assert not native.store_plain(new[0, :, :, :1], new_v[:, :, :1], cache._k, cache._v, 4, slots)
    np.testing.assert_array_equal(content(cache)[0], before[0])


def test_quantized_caches_are_left():
    cache = fastattn.KVCache(2, 3, 20, 4, dtype="int8")
    assert not native.store_plain(new[0, :, :, :1], new[1, :, :, :1], cache._k, cache._v, 4, [0, 20])


def test_store_leaves_another_backend_its_calls():
    cache = caches("float32", 2)[0]
    with fastattn.use_backend("numpy"):
        assert not native.store_plain(new[0, :, :, :1], new_v[:, :, :1], cache._k, cache._v, 4, [0, 20])


def in_pool(dtype, v_head_dim=6):
    """Sequences in pages of 4, one of which is empty, and one of which shares pages."""
    pool = fastattn.PagedKVCache(12, 4, 2, 8, v_head_dim, dtype)
    sequences = [pool.new_sequence() for _ in range(3)]
    rows = [rng.standard_normal((16, 2, d)).astype(np.float32) for d in (8, v_head_dim)]
    pool.append(sequences, *rows, [0, 13, 16, 16])
    return pool, [*sequences, pool.fork(sequences[0])]


@pytest.mark.parametrize("dtypes", [("float32",) * 2, ("bfloat16",) * 2, ("float16",) * 2, ("float32", "float16")], ids=str)
@pytest.mark.parametrize("share", [1, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_pages_take_what_is_ordinary(monkeypatch, dtypes, share, causal):
    pool, sequences = in_pool(dtypes[1])
    packed = rng.standard_normal((4 * share, 4, 8)).astype(dtype_of(dtypes[0]))
    taken = []
    monkeypatch.setattr(runtime._state, "paged_plain", lambda *call: taken.append(native.paged_plain(*call)) or taken[-1])
    short = pool.attend(sequences, packed, causal=causal)
    assert taken[-1] is short
    monkeypatch.setattr(runtime._state, "paged_plain", runtime._no_short_way)
    long = pool.attend(sequences, packed, causal=causal)
    assert short.dtype == long.dtype and short.flags.c_contiguous == long.flags.c_contiguous
    np.testing.assert_array_equal(short, long)
    turned = native.paged_plain(packed[:, ::-1], pool._k, pool._v, pool.block_table(sequences), pool.lengths(sequences), causal)
    np.testing.assert_array_equal(turned, pool.attend(sequences, packed[:, ::-1], causal=causal))


@pytest.mark.parametrize("ints", [np.int32, np.int64])
@pytest.mark.parametrize("heads", [1, 2])
def test_pages_take_ordinary_lists(ints, heads):
    pool, sequences = in_pool("float32")
    packed = rng.standard_normal((8, 4, 8)).astype(np.float32)
    table, lengths = pool.block_table(sequences), pool.lengths(sequences)
    lists = np.full((8, heads, 3), -1, ints)
    for row, head in np.ndindex(8, heads):
        own = rng.permutation(lengths[row // 2])[:2]
        lists[row, head, : own.size] = own
    short = native.paged_plain(packed, pool._k, pool._v, table, lengths, True, lists)
    pages = pool._k.swapaxes(1, 2), pool._v.swapaxes(1, 2)
    long = fastattn.paged_attention(packed, *pages, np.maximum(table, 0), lengths, causal=True, indices=lists)
    np.testing.assert_array_equal(short, long)
    for unusual in (lists.tolist(), lists[:-1], lists[:, :, :, None], lists.astype(np.int16), np.repeat(lists, 3, axis=1), lists + 1000):
        assert native.paged_plain(packed, pool._k, pool._v, table, lengths, True, unusual) is None


@pytest.mark.parametrize("share", [1, 2])
def test_the_best_pages_take_the_short_way(monkeypatch, share):
    pool = fastattn.PagedKVCache(24, 4, 2, 8, dtype="float32", bounds=True)
    sequences = [pool.new_sequence() for _ in range(2)]
    pool.append(sequences, *rng.standard_normal((2, 50, 2, 8)).astype(np.float32), [0, 19, 50])
    packed, taken = rng.standard_normal((2 * share, 4, 8)).astype(np.float32), []
    monkeypatch.setattr(runtime._state, "paged_plain", lambda *call: taken.append(native.paged_plain(*call)) or taken[-1])
    short = pool.attend(sequences, packed, top_pages=2)
    assert taken[-1] is short
    long, _ = pool.attend(sequences, packed, top_pages=2, return_lse=True)
    np.testing.assert_array_equal(short, long)
    assert len(taken) == 1


packed = np.zeros((4, 4, 8), np.float32)
UNUSUAL_PACKED = {
    "list": packed.tolist(),
    "rank": packed[0],
    "dtype": packed.astype(np.float64),
    "narrower": packed.astype(np.float16),
    "stride": np.zeros((4, 4, 16), np.float32)[..., ::2],
    "unaligned": unaligned(packed),
    "byte order": packed.astype(">f4"),
    "head_dim": packed[..., :7],
    "heads": packed[:, :3],
    "shares": packed[:3],
}


@pytest.mark.parametrize("queries", UNUSUAL_PACKED.values(), ids=UNUSUAL_PACKED)
def test_pages_leave_what_is_unusual(queries):
    pool, sequences = in_pool("float32")
    arrays = pool._k, pool._v, pool.block_table(sequences), pool.lengths(sequences)
    assert native.paged_plain(packed, *arrays, True) is not None
    assert native.paged_plain(queries, *arrays, True) is None
    assert native.paged_plain(packed, *arrays, 1) is None
    with fastattn.use_backend("numpy"):
        assert native.paged_plain(packed, *arrays, True) is None


@pytest.mark.parametrize("ints", [np.int32, np.int64])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_paged_attention_takes_what_is_ordinary(monkeypatch, ints, dtype):
    pool, sequences = in_pool(dtype)
    pages, queries = (pool._k.swapaxes(1, 2), pool._v.swapaxes(1, 2)), packed.astype(dtype)
    queries[:] = rng.standard_normal(queries.shape)
    table, lengths = pool.block_table(sequences).astype(ints), pool.lengths(sequences).astype(ints)
    taken = []
    monkeypatch.setattr(runtime._state, "paged_plain", lambda *call: taken.append(native.paged_plain(*call)) or taken[-1])
    whole = np.maximum(table, 0)  # what is beyond a sequence's last page is not looked at
    short = [fastattn.paged_attention(queries, *pages, x, lengths, causal=True) for x in (whole, table)]
    assert taken[0] is short[0] and (len(taken) == 1 or taken[1] is short[1])
    monkeypatch.setattr(runtime._state, "paged_plain", runtime._no_short_way)
    for out in short:
        np.testing.assert_array_equal(out, fastattn.paged_attention(queries, *pages, whole, lengths, causal=True))


@pytest.mark.parametrize("wrong", ["page", "page of 64 bits", "length", "negative length", "rows", "heads", "no pages"])
def test_paged_attention_says_what_is_wrong(wrong):
    pool, sequences = in_pool("float32")
    k, v, table, lengths = pool._k.swapaxes(1, 2), pool._v.swapaxes(1, 2), pool.block_table(sequences), pool.lengths(sequences)
    table = np.maximum(table, 0).astype(np.int64)
    if "page" == wrong:
        table = table.astype(np.int32) + 1000
    if wrong == "page of 64 bits":
        table += 2**32
    if "length" in wrong:
        lengths = -lengths if "negative" in wrong else lengths + 1000
    v = {"rows": v[:, :-1], "heads": v[:, :, :1], "no pages": v[:0]}.get(wrong, v)
    with pytest.raises(ValueError, match="block_table|kv_lengths|v_pages"):
        fastattn.paged_attention(packed, k, v, table, lengths)


def test_pages_refuse_tables_that_do_not_fit():
    """The library checks what guards memory, whoever calls."""
    pool, sequences = in_pool("float32")
    table, lengths = pool.block_table(sequences), pool.lengths(sequences)
    for bad_table, bad_lengths in ((table + 12, lengths), (table, lengths + 100), (table, -lengths), (np.full_like(table, -1), lengths)):
        assert native.paged_plain(packed, pool._k, pool._v, bad_table, bad_lengths, True) is None
