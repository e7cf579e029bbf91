"""The native engine's short way through Python: it takes what is ordinary, leaves the rest, and changes nothing."""

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
    {"out": np.empty((2, 4, 5, 6), np.float32)},
    {"out": wide[..., 2:8], "return_lse": True},
    {"out": np.empty((2, 4, 5, 6), np.float32)[::-1], "mask": float_mask, "sinks": np.zeros(4, np.float32)},
]


def long_way(*arrays, **options):
    """The same call through every check."""
    former, runtime._state.plain = runtime._state.plain, None
    try:
        return fastattn.attention(*arrays, **options)
    finally:
        runtime._state.plain = former


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
