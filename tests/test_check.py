"""Every error: its type, the argument that it names, what that must be, and what it was. Nothing is written before it."""

import gc
import re

import numpy as np
import pytest
from inputs import ArrayInterfaceOnly, BFloat16DLPack, DLPackOnly, dtype_of, random_qkv, read_only, unaligned

import fastattn
from fastattn._check import as_array, kernel_ready

pytestmark = pytest.mark.usefixtures("backend")

q, k, v = random_qkv(2, 4, 5, 7, 8, 6, kv_heads=2)
LARGE = 2**56  # positions beyond this are refused


def with_shape(*shape):
    return np.zeros(shape, np.float32)


class Unreadable:
    """A tensor in the memory of another device."""

    def __dlpack__(self, **options):
        raise BufferError("the memory is on a GPU")

    def __dlpack_device__(self):
        return (2, 0)


ARRAYS = [
    # q, k and v
    ((with_shape(8), k, v), ValueError, "q must have shape (B, Hq, Lq, D), (Hq, Lq, D) or (Lq, D); got (8,)"),
    ((np.float32(1), k, v), ValueError, "q must have shape"),
    ((with_shape(1, 2, 4, 5, 8), k, v), ValueError, "q must have shape"),
    ((q, k[0], v), ValueError, "k must have as many axes as q, 4; got shape (2, 7, 8)"),
    ((q[0], k[0], v), ValueError, "v must have as many axes as q, 3; got shape (2, 2, 7, 6)"),
    ((q, with_shape(3, 2, 7, 8), v), ValueError, "k must have the batch size of q, 2; got shape (3, 2, 7, 8)"),
    ((q, with_shape(1, 2, 7, 8), v), ValueError, "k must have the batch size of q, 2"),
    ((q, with_shape(2, 2, 7, 9), v), ValueError, "k must have the head size of q, 8; got shape (2, 2, 7, 9)"),
    ((q, with_shape(2, 3, 7, 8), v), ValueError, "k must have a number of heads that divides that of q, 4; got 3"),
    ((q, with_shape(2, 0, 7, 8), v), ValueError, "k must have a number of heads that divides that of q, 4; got 0"),
    ((q, with_shape(2, 8, 7, 8), v), ValueError, "k must have a number of heads that divides that of q, 4; got 8"),
    (
        (q, k, with_shape(2, 2, 8, 6)),
        ValueError,
        "v must have the shape of k, (2, 2, 7, 8), in all but the last axis; got (2, 2, 8, 6)",
    ),
    ((q, k, with_shape(2, 1, 7, 6)), ValueError, "v must have the shape of k"),
    ((q, k, with_shape(1, 2, 7, 6)), ValueError, "v must have the shape of k"),
    ((q, k, v.astype(np.float16)), TypeError, "v must have the dtype of k, float32; got float16"),
    ((q.astype(np.float16), k, v), TypeError, "q must have the dtype of k and v, float32, or a wider one; got float16"),
    ((q.astype(int), k, v), TypeError, "got int64"),
    ((q, k.astype(np.complex64), v), TypeError, "k must be"),
    ((q, k, v > 0), TypeError, "v must be"),
    ((q.astype(object), k, v), TypeError, "q must be"),
    (("words", k, v), ValueError, "q must have shape (B, Hq, Lq, D), (Hq, Lq, D) or (Lq, D); got ()"),
    ((None, k, v), ValueError, "q must have shape"),
    ((Unreadable(), k, v), TypeError, "q must be an array in the memory of the CPU; got Unreadable (the memory is on a GPU)"),
    ((q, k, [[1.0], [2.0, 3.0]]), TypeError, "v must be an array"),
    ((np.ma.array(q, mask=q > 0), k, v), TypeError, "q must be a plain array; got a MaskedArray, whose mask would be ignored"),
    ((q, k, np.ma.array(v)), TypeError, "v must be a plain array; got a MaskedArray"),
]


@pytest.mark.parametrize("arrays, error, message", ARRAYS, ids=[message[:40] for _, _, message in ARRAYS])
def test_arrays(arrays, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fastattn.attention(*arrays)
    with pytest.raises(error, match=re.escape(message)):  # with every rule, which the shortest way into the engine lacks
        fastattn.attention(*arrays, softcap=1.0, causal=True)


def test_dtypes_of_equal_width_do_not_mix():
    half, brain = q.astype(np.float16), [x.astype(dtype_of("bfloat16")) for x in (k, v)]
    with pytest.raises(TypeError, match="q must have the dtype of k and v, bfloat16, or a wider one; got float16"):
        fastattn.attention(half, *brain)


@pytest.mark.parametrize("wrap", [DLPackOnly, ArrayInterfaceOnly, lambda x: x])
def test_accepted_arrays_are_not_copied(wrap):
    for array in (q, q[:, ::-1], q.swapaxes(1, 2), np.broadcast_to(q[:1], q.shape), read_only(q)):
        assert np.shares_memory(as_array("q", wrap(array)), array)
        assert np.shares_memory(kernel_ready(array), array)
    for array in (q[..., ::2], q.astype(">f4"), unaligned(q)):
        assert np.array_equal(kernel_ready(array), array) and not np.shares_memory(kernel_ready(array), array)


OPTIONS = [
    ({"mask": with_shape(5, 8)}, ValueError, "mask must broadcast to (B, Hq, Lq, Lk) = (2, 4, 5, 7); got shape (5, 8)"),
    ({"mask": with_shape(3, 1, 5, 7)}, ValueError, "mask must broadcast"),
    ({"mask": with_shape(1, 2, 4, 5, 7)}, ValueError, "mask must broadcast"),
    (
        {"mask": np.ones((5, 7), int)},
        TypeError,
        "mask must be a BlockMask or an array of bool, float16, bfloat16, float32, float64; got int64: give mask.astype(bool)",
    ),
    ({"mask": np.ones((5, 7), np.uint8)}, TypeError, "got uint8: give mask.astype(bool), if what is not 0 is visible"),
    ({"mask": np.ma.array(np.ones((5, 7), bool))}, TypeError, "mask must be a plain array; got a MaskedArray"),
    (
        {"mask": np.ones((2, 7), bool)},
        ValueError,
        "got shape (2, 7): of a mask of padding, (B, Lk), give mask[:, None, None, :], or kv_lengths",
    ),
    ({"mask": np.ones((5, 7), complex)}, TypeError, "mask must be"),
    ({"mask": "causal"}, TypeError, "mask must be"),
    ({"causal": 1}, TypeError, "causal must be True or False; got 1"),
    ({"causal": "yes"}, TypeError, "causal must be True or False; got 'yes'"),
    ({"causal": None}, TypeError, "causal must be True or False; got None"),
    ({"return_lse": 1}, TypeError, "return_lse must be True or False; got 1"),
    (
        {"window": 3},
        TypeError,
        "window must be a pair (left, right) of ints or None; got 3: write (2, 0) for a row's own key and the 2 before it, "
        "(3, 3) for 3 on both sides",
    ),
    ({"window": -1}, TypeError, "window must be a pair (left, right) of ints or None; got -1"),
    ({"window": (1, 2, 3)}, TypeError, "window must be a pair"),
    ({"window": (1.5, 0)}, TypeError, "window must be a pair"),
    ({"window": (-3, 0)}, ValueError, "window must have sides that are at least 0, or None or -1 (unbounded); got (-3, 0)"),
    ({"window": (0, -2)}, ValueError, "window must have sides"),
    ({"kv_lengths": -1}, ValueError, "kv_lengths must lie between 0 and 7; got -1"),
    ({"kv_lengths": 8}, ValueError, "kv_lengths must lie between 0 and 7; got 8"),
    ({"kv_lengths": [3, 8]}, ValueError, "kv_lengths must lie between 0 and 7; got [3, 8]"),
    ({"kv_lengths": np.array([2**63, 0], np.uint64)}, ValueError, "kv_lengths must lie between 0 and 7"),
    (
        {"kv_lengths": [1, 2, 3]},
        ValueError,
        "kv_lengths must be an int or have shape (2,), one entry for each batch entry; got shape (3,)",
    ),
    ({"kv_lengths": [1]}, ValueError, "kv_lengths must be an int or have shape (2,)"),
    ({"kv_lengths": [[1, 2]]}, ValueError, "kv_lengths must be an int or have shape (2,)"),
    ({"kv_lengths": 3.0}, TypeError, "kv_lengths must be an int or an integer array; got float64"),
    ({"kv_lengths": [True, False]}, TypeError, "kv_lengths must be an int or an integer array; got bool"),
    ({"query_offset": 1.0}, TypeError, "query_offset must be an int or an integer array; got float64"),
    ({"query_offset": [1, 2, 3]}, ValueError, "query_offset must be an int or have shape (2,)"),
    ({"query_offset": LARGE + 1}, ValueError, f"query_offset must lie between {-LARGE} and {LARGE}; got {LARGE + 1}"),
    ({"query_offset": [0, -LARGE - 1]}, ValueError, "query_offset must lie between"),
    ({"query_offset": 2**70}, (ValueError, TypeError), "query_offset"),
    ({"scale": np.inf}, ValueError, "scale must be finite in float32; got inf"),
    ({"scale": np.nan}, ValueError, "scale must be finite in float32; got nan"),
    ({"scale": 1e39}, ValueError, "scale must be finite in float32; got 1e+39"),
    ({"scale": "1"}, TypeError, "scale must be a real number; got '1'"),
    ({"scale": 1j}, TypeError, "scale must be a real number"),
    ({"scale": np.ones(2)}, TypeError, "scale must be a real number"),
    ({"softcap": -1.0}, ValueError, "softcap must be positive, or None or 0 for none; got -1.0"),
    ({"softcap": np.nan}, ValueError, "softcap must be finite in float32; got nan"),
    ({"softcap": np.inf}, ValueError, "softcap must be finite in float32; got inf"),
    ({"softcap": []}, TypeError, "softcap must be a real number"),
    ({"alibi_slopes": with_shape(3)}, ValueError, "alibi_slopes must have shape (4,) or (2, 4); got (3,)"),
    ({"alibi_slopes": with_shape(4, 2)}, ValueError, "alibi_slopes must have shape (4,) or (2, 4); got (4, 2)"),
    ({"alibi_slopes": 1.0}, ValueError, "alibi_slopes must have shape"),
    ({"alibi_slopes": ["a"] * 4}, TypeError, "alibi_slopes must hold real numbers"),
    ({"alibi_slopes": [0, 0, np.nan, 0]}, ValueError, "alibi_slopes must be finite; got NaN or inf"),
    ({"alibi_slopes": np.full((2, 4), -np.inf)}, ValueError, "alibi_slopes must be finite; got NaN or inf"),
    ({"sinks": with_shape(2)}, ValueError, "sinks must have shape (4,), one logit for each query head; got (2,)"),
    ({"sinks": with_shape(2, 4)}, ValueError, "sinks must have shape (4,)"),
    ({"sinks": np.full(4, np.inf)}, ValueError, "sinks must be finite, or -inf for a head without one; got NaN or inf"),
    ({"sinks": [0, 0, np.nan, 0]}, ValueError, "sinks must be finite, or -inf for a head without one; got NaN or inf"),
    ({"sinks": np.full(4, 1j)}, TypeError, "sinks must hold real numbers; got complex128"),
    ({"precision": "low"}, ValueError, "precision must be one of ('highest', 'high', 'medium'); got 'low'"),
    ({"precision": None}, ValueError, "precision must be one of"),
    ({"out": with_shape(2, 4, 5, 8)}, ValueError, "out must have shape (2, 4, 5, 6); got (2, 4, 5, 8)"),
    ({"out": with_shape(4, 5, 6)}, ValueError, "out must have shape (2, 4, 5, 6); got (4, 5, 6)"),
    ({"out": np.zeros((2, 4, 5, 6))}, TypeError, "out must be float32, the dtype of q; got float64"),
    ({"out": np.zeros((2, 4, 5, 6), np.float16)}, TypeError, "out must be float32, the dtype of q; got float16"),
    ({"out": [[0.0]]}, TypeError, "out must be an array; got list"),
    ({"out": np.broadcast_to(np.float32(0), (2, 4, 5, 6))}, ValueError, "out must be writable; got a read-only array"),
]


@pytest.mark.parametrize("options, error, message", OPTIONS, ids=[f"{next(iter(o[0]))}-{n}" for n, o in enumerate(OPTIONS)])
def test_options(options, error, message):
    out = np.full((2, 4, 5, 6), 99, np.float32)
    with np.errstate(all="raise"), pytest.raises(error, match=re.escape(message)):
        fastattn.attention(q, k, v, **{"out": out, **options})
    assert (out == 99).all()


def test_bfloat16_of_other_libraries():
    """Taken without a copy from whoever speaks DLPack, and given back when the last view of it is gone."""
    array = random_qkv(2, 4, 5, 7, 8, dtype="bfloat16")[0].swapaxes(1, 2)
    tensor = BFloat16DLPack(array)
    taken = as_array("q", tensor)
    assert np.shares_memory(taken, array) and taken.strides == array.strides
    assert taken.dtype == array.dtype and np.array_equal(taken, array)
    view = taken[1:]
    del taken
    gc.collect()
    freed = len(tensor.freed)
    del view
    gc.collect()
    assert len(tensor.freed) == freed + 1
    np.testing.assert_array_equal(fastattn.attention(tensor, tensor, tensor), fastattn.attention(array, array, array))


def test_unknown_keywords():
    with pytest.raises(TypeError, match="dropout"):
        fastattn.attention(q, k, v, dropout=0.1)
    with pytest.raises(TypeError):
        fastattn.attention(q, k, v, None)  # keywords only


def test_out_may_not_repeat_an_element():
    out = np.lib.stride_tricks.as_strided(np.zeros(30, np.float32), (2, 4, 5, 6), (0, 0, 24, 4))
    with pytest.raises(ValueError, match="out must not overlap itself"):
        fastattn.attention(q, k, v, out=out)


@pytest.mark.parametrize("name", ["q", "k", "v", "mask", "alibi_slopes", "sinks"])
def test_out_may_not_overlap_an_input(name):
    memory = np.zeros(1000, np.float32)
    shared = {
        "q": lambda: memory[100:420].reshape(2, 4, 5, 8),
        "k": lambda: memory[239:463].reshape(2, 2, 7, 8),
        "v": lambda: memory[:168].reshape(2, 2, 7, 6),
        "mask": lambda: memory[239:274].reshape(5, 7),
        "alibi_slopes": lambda: memory[200:204],
        "sinks": lambda: memory[0:4],
    }
    arrays = {"q": q, "k": k, "v": v, name: shared[name]()}
    out = memory[:240].reshape(2, 4, 5, 6)
    with pytest.raises(ValueError, match=f"out must not overlap an input; it overlaps {name}"):
        fastattn.attention(arrays.pop("q"), arrays.pop("k"), arrays.pop("v"), out=out, **arrays)


def test_out_may_interleave_with_an_input():
    """Sharing memory is harmless as long as no element is shared."""
    memory = np.zeros((2, 4, 5, 16), np.float32)
    memory[..., 8:] = q
    fastattn.attention(memory[..., 8:], k, v, out=memory[..., :6])
    np.testing.assert_array_equal(memory[..., :6], fastattn.attention(q, k, v))
    np.testing.assert_array_equal(memory[..., 8:], q)


MERGES = [
    (([], []), ValueError, "outs and lses must have the same number of parts, 1 or more; got 0 and 0"),
    (
        ([with_shape(3, 5)], [with_shape(3)] * 2),
        ValueError,
        "outs and lses must have the same number of parts, 1 or more; got 1 and 2",
    ),
    (
        ([with_shape(3, 5), with_shape(3, 4)], [with_shape(3)] * 2),
        ValueError,
        "outs[1] must have the shape of outs[0], (3, 5); got (3, 4)",
    ),
    (
        ([with_shape(3, 5), np.zeros((3, 5), np.float16)], [with_shape(3)] * 2),
        TypeError,
        "outs[1] must have the dtype of outs[0], float32; got float16",
    ),
    (([with_shape(3, 5)], [with_shape(4)]), ValueError, "lses[0] must have shape (3,); got (4,)"),
    (([np.zeros((3, 5), int)], [with_shape(3)]), TypeError, "outs[0] must be"),
    (([with_shape(3, 5)], [np.zeros(3, complex)]), TypeError, "lses[0] must hold real numbers; got complex128"),
    (([np.float32(0)], [with_shape()]), ValueError, "outs[0] must have shape (..., Dv); got a scalar"),
    ((None, [with_shape(3)]), TypeError, "outs must be a sequence of arrays; got None"),
    (([with_shape(3, 5)], 1.0), TypeError, "lses must be a sequence of arrays; got 1.0"),
]


@pytest.mark.parametrize("arguments, error, message", MERGES, ids=[message[:40] for _, _, message in MERGES])
def test_merge_states(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fastattn.merge_states(*arguments)


SDPA = [
    ((q, k, v), {"dropout_p": 0.5}, ValueError, "dropout_p must be 0: dropout is for training; got 0.5"),
    (
        (q, k, v),
        {"is_causal": True, "attn_mask": np.ones((5, 7), bool), "enable_gqa": True},
        ValueError,
        "attn_mask must be None when is_causal is True",
    ),
    (
        (q, k, v),
        {},
        ValueError,
        "query, key and value must have leading axes that broadcast; got [(2, 4), (2, 2), (2, 2)]; "
        "heads may differ with enable_gqa=True",
    ),
    ((q, k, v[:, :1]), {"enable_gqa": True}, ValueError, "value must have the number of heads of key, 2; got 1"),
    ((q[0, 0, 0], k, v), {}, ValueError, "query must have at least 2 axes, (..., L, E); got shape (8,)"),
    ((q[0, 0], k[0, 0], v[0, 0]), {"enable_gqa": True}, ValueError, "enable_gqa must have arrays with a heads axis"),
    (
        (q, k, v),
        {"enable_gqa": True, "attn_mask": with_shape(5, 8)},
        ValueError,
        "attn_mask must broadcast to (N, ..., Hq, L, S) = (2, 4, 5, 7); got shape (5, 8)",
    ),
    (
        (q, k, v),
        {"enable_gqa": True, "attn_mask": np.ones((2, 7), bool)},
        ValueError,
        "got shape (2, 7): of a mask of padding, (B, Lk), give attn_mask[:, None, None, :], or kv_lengths",
    ),
    (
        (q, k, v),
        {"enable_gqa": True, "attn_mask": np.ones((5, 7), int)},
        TypeError,
        "attn_mask must be a BlockMask or an array of bool, float16, bfloat16, float32, float64; got int64: give attn_mask.astype",
    ),
    (
        (q, k, v),
        {"enable_gqa": True, "attn_mask": fastattn.BlockMask.causal(5, k_len=9)},
        ValueError,
        "attn_mask must be a BlockMask for (2, 4, 5, 7), 1 standing for any batch size or heads; got (1, 1, 5, 9)",
    ),
    ((q.astype(int), q, q), {}, TypeError, "query must be"),
    ((q, q.astype(np.float16), q), {}, TypeError, "value must have the dtype of key, float16; got float32"),
    (
        (q.astype(np.float16), q, q),
        {},
        TypeError,
        "query must have the dtype of key and value, float32, or a wider one; got float16",
    ),
    ((q, q[..., :3], q), {}, ValueError, "key must have the head size of query, 8; got shape (2, 4, 5, 3)"),
    (
        (q, k, v[:, :, :3]),
        {"enable_gqa": True},
        ValueError,
        "value must have the shape of key, (2, 2, 7, 8), in all but the last axis",
    ),
    (
        (q, k[:, :1].repeat(3, 1), v[:, :1].repeat(3, 1)),
        {"enable_gqa": True},
        ValueError,
        "key must have a number of heads that divides that of query, 4; got 3",
    ),
    (("q", k, v), {}, ValueError, "query must have at least 2 axes"),
    ((q, Unreadable(), v), {}, TypeError, "key must be an array in the memory of the CPU"),
    ((q, k, v), {"enable_gqa": 1}, TypeError, "enable_gqa must be True or False; got 1"),
    ((q, k, v), {"enable_gqa": True, "is_causal": 1}, TypeError, "is_causal must be True or False; got 1"),
]


@pytest.mark.parametrize("arrays, options, error, message", SDPA, ids=[message[:40] for *_, message in SDPA])
def test_scaled_dot_product_attention(arrays, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fastattn.scaled_dot_product_attention(*arrays, **options)


@pytest.mark.parametrize("keyword", ["return_lse", "out"])
def test_keywords_that_weights_do_not_have(keyword):
    with pytest.raises(TypeError, match=r"attention_weights\(\) has no argument names"):
        fastattn.attention_weights(q, k, names=None)
    with pytest.raises(TypeError, match=r"explain\(\) has no argument dropout"):
        fastattn.explain(q, k, v, dropout=0.1)
    with pytest.raises(TypeError, match=rf"attention_weights\(\) has no argument {keyword}"):
        fastattn.attention_weights(q, k, **{keyword: None})
    with pytest.raises(TypeError, match=rf"attention_mass\(\) has no argument {keyword}"):
        fastattn.attention_mass(q, k, np.zeros(7, int), **{keyword: None})


SEGMENTS = [
    (np.zeros(7), TypeError, "segments must hold ints; got float64"),
    (np.zeros(8, int), ValueError, "segments must have shape (7,) or (2, 7); got (8,)"),
    (np.full(7, 3), ValueError, "segments must lie between -1 and 2; got 3 to 3"),
    (np.arange(-2, 5), ValueError, "segments must lie between -1 and 2; got -2 to 4"),
]


@pytest.mark.parametrize("segments, error, message", SEGMENTS, ids=[message for *_, message in SEGMENTS])
def test_attention_mass(segments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fastattn.attention_mass(q, k, segments, num_segments=3)


def test_arguments_of_attention_mass():
    with pytest.raises(ValueError, match=re.escape("k must have shape (B, Hkv, Lk, D), (Hkv, Lk, D) or (Lk, D); got (7,)")):
        fastattn.attention_mass(q, k[0, 0, :, 0], np.zeros(7, int))
    with pytest.raises(TypeError, match="num_segments must be an int; got 2.5"):
        fastattn.attention_mass(q, k, np.zeros(7, int), num_segments=2.5)
    with pytest.raises(ValueError, match="num_segments must be at least 0; got -1"):
        fastattn.attention_mass(q, k, np.zeros(7, int), num_segments=-1)
