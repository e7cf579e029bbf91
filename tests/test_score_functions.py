"""Score functions: in C, however they have been come by, compiled from a scalar function, or callables of arrays."""

import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from inputs import DTYPES, random_qkv
from oracle import check

import fastattn

SLOPES = np.array([0.5, 0.25, 0.1, 0.02], np.float32)
SIGNATURE = b"void (float *, int64_t, int64_t, int64_t, int64_t, int64_t, void *)"
PROTOTYPE = ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_float), *[ctypes.c_int64] * 5, ctypes.c_void_p)

SOURCE = """
#include <stdint.h>
#include <stdlib.h>
void alibi(float *scores, int64_t keys, int64_t batch, int64_t head, int64_t query, int64_t first_key, void *context) {
    const float slope = ((const float *)context)[head];
    (void)batch;
    for (int64_t n = 0; n < keys; n++) scores[n] -= slope * (float)llabs(query - first_key - n);
}
"""
DECLARATION = "void alibi(float *, int64_t, int64_t, int64_t, int64_t, int64_t, void *);"


def alibi(s, b, h, i, j):
    return s - SLOPES[h] * np.abs(i - j)


def compiled(function):
    pytest.importorskip("numba", reason="numba is not installed")
    return fastattn.score_function(function)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A library with ALiBi in C, whose context are the slopes."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("score_function")
    (folder / "alibi.c").write_text(SOURCE)
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", folder / "alibi.so", folder / "alibi.c"], check=True)
    return folder / "alibi.so"


def from_ctypes(library):
    function = ctypes.CDLL(str(library)).alibi
    function.argtypes, function.restype = PROTOTYPE._argtypes_, None
    return function


OPENED = []  # what cffi has opened it closes with the last reference to it, and a function is none


def from_cffi(library):
    cffi = pytest.importorskip("cffi", reason="cffi is not installed")
    ffi = cffi.FFI()
    ffi.cdef(DECLARATION)
    OPENED.append(ffi.dlopen(str(library)))
    return OPENED[-1].alibi


def capsule(function, name=SIGNATURE, context=None):
    new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(("PyCapsule_New", ctypes.pythonapi))
    made = new(ctypes.cast(function, ctypes.c_void_p).value, name, None)
    if context is not None:
        set_context = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_void_p)(("PyCapsule_SetContext", ctypes.pythonapi))
        set_context(made, context.ctypes.data)
    return made


def as_capsule(library):
    return capsule(from_ctypes(library))


def compare(function, sizes=(70, 600), dtype="float32", **options):
    """ALiBi from position 0 by a function and by rule."""
    q, k, v = random_qkv(batch=2, heads=4, kv_heads=2, q_len=sizes[0], kv_len=sizes[1], head_dim=16, dtype=dtype)
    options["query_offset"] = 0
    out, lse = fastattn.attention(q, k, v, score_function=function, return_lse=True, **options)
    check(out, lse, q, k, v, alibi_slopes=SLOPES, **options)
    return out


@pytest.mark.parametrize("make", [from_ctypes, from_cffi, as_capsule])
@pytest.mark.parametrize("sizes", [(1, 3000), (5, 37), (70, 600)], ids=str)
def test_functions_in_c(engine, library, make, sizes):
    function = make(library)
    out = compare((function, SLOPES), sizes, causal=True)
    np.testing.assert_array_equal(compare((function, SLOPES.ctypes.data), sizes, causal=True), out)


def test_the_context_of_a_capsule(engine, library):
    function = from_ctypes(library)
    compare(capsule(function, context=SLOPES))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 3000), (5, 37), (70, 300)], ids=str)
def test_compiled_and_plain_functions(engine, dtype, sizes):
    function = compiled(lambda s, b, h, i, j: s - SLOPES[h] * abs(i - j))
    compare(function, sizes, dtype)
    compare(alibi, sizes, dtype)


def test_cfunc(engine):
    numba = pytest.importorskip("numba", reason="numba is not installed")

    @numba.cfunc("void(CPointer(float32), int64, int64, int64, int64, int64, voidptr)")
    def function(scores, keys, batch, head, query, first_key, context):
        for n in range(keys):
            scores[n] -= SLOPES[head] * abs(query - first_key - n)

    compare(function, window=(30, None))


def test_a_function_of_python_by_ctypes(engine):
    @PROTOTYPE
    def function(scores, keys, batch, head, query, first_key, context):
        s = np.ctypeslib.as_array(scores, (keys,))
        s -= SLOPES[head] * np.abs(query - first_key - np.arange(keys))

    compare(function, (5, 40))


@pytest.mark.parametrize("sizes", [(4, 90), (70, 90)], ids=str)
def test_where_it_is_called(engine, sizes):
    """After scale and softcap, before bias, ALiBi and visibility; with the indices of the caller's arrays."""
    q, k, v = random_qkv(batch=2, heads=4, kv_heads=2, q_len=sizes[0], kv_len=sizes[1], head_dim=16)
    mask = np.where(np.random.default_rng(1).random((2, 1, *sizes)) < 0.7, 0.3, -np.inf).astype(np.float32)

    def function(s, b, h, i, j):
        return s * (1 + 0.1 * b) + 0.01 * h - 0.02 * i + 0.03 * j

    for options in (
        dict(softcap=2.0, mask=mask, alibi_slopes=SLOPES, causal=True),
        dict(scale=-0.5, kv_starts=[3, 20], kv_lengths=[80, 21], q_lengths=[sizes[0] - 1, 2]),
        dict(scale=0.0, window=(20, 5), query_offset=30, sinks=np.float32([1, 0, 2, -1])),
        dict(activation="sigmoid", softcap=3.0),
        dict(activation="polynomial", mask=mask),
    ):
        for f in (function, compiled(function)):
            softmax = "activation" not in options
            found = fastattn.attention(q, k, v, score_function=f, return_lse=softmax, **options)
            out, lse = found if softmax else (found, None)
            check(out, lse, q, k, v, score_function=function, **options)


def test_softcap_by_function(engine):
    q, k, v = random_qkv(heads=2, q_len=40, kv_len=50, head_dim=8)
    expected = fastattn.attention(q, k, v, softcap=1.5)
    for f in (lambda s, b, h, i, j: 1.5 * np.tanh(s / 1.5), compiled(lambda s, b, h, i, j: 1.5 * np.tanh(s / np.float32(1.5)))):
        np.testing.assert_allclose(fastattn.attention(q, k, v, score_function=f), expected, rtol=1e-5, atol=1e-6)


def test_relative_bias_of_t5_before_and_after_a_softcap(engine):
    q, k, v = random_qkv(heads=4, q_len=40, kv_len=50, head_dim=8)
    table = np.random.default_rng(2).standard_normal((32, 4)).astype(np.float32)
    bias = np.ascontiguousarray(fastattn.t5_bias(table, 40, 50)).reshape(4, 40, 50)
    added = compiled(lambda s, b, h, i, j: s + bias[h, i, j])
    np.testing.assert_allclose(
        fastattn.attention(q, k, v, score_function=added), fastattn.attention(q, k, v, mask=bias[None]), rtol=1e-5, atol=1e-6
    )
    bent = compiled(lambda s, b, h, i, j: 2 * np.tanh((s + bias[h, i, j]) / 2))

    def plain(s, b, h, i, j):
        return 2 * np.tanh((s + bias[h, i, j]) / 2)

    check(fastattn.attention(q, k, v, score_function=bent), None, q, k, v, score_function=plain)


def test_packed_sequences_and_block_masks(engine):
    q, k, v = random_qkv(heads=4, q_len=90, kv_len=90, head_dim=8)
    table = np.array([0, 30, 30, 90])
    packed = fastattn.attention_varlen(*(x[0].swapaxes(0, 1).copy() for x in (q, k, v)), table, table, score_function=alibi)
    for first, last in ((0, 30), (30, 90)):
        own = [x[:, :, first:last] for x in (q, k, v)]
        np.testing.assert_array_equal(packed[first:last].swapaxes(0, 1)[None], fastattn.attention(*own, score_function=alibi))
    blocks = fastattn.BlockMask.sliding_window(90, window=(30, 7), block_size=16)
    shown = blocks.to_dense()
    check(fastattn.attention(q, k, v, mask=blocks, score_function=alibi), None, q, k, v, mask=shown, score_function=alibi)


def test_chosen_keys(engine):
    """Some of a list follow each other, most do not, and some places are empty."""
    q, k, v = random_qkv(batch=2, heads=4, kv_heads=2, q_len=5, kv_len=70, head_dim=16)
    rng = np.random.default_rng(3)
    indices = np.stack([rng.permutation(70)[:40] for _ in range(2 * 2 * 5)]).reshape(2, 2, 5, 40).astype(np.int32)
    indices[:, :, :, 7], indices[0, 0, 0] = -1, np.where(np.arange(40) // 9 % 2, np.arange(40), -1)
    options = {"causal": True, "query_offset": 40}
    expected = fastattn.attention_indexed(q, k, v, indices, alibi_slopes=SLOPES, **options)
    for f in (compiled(lambda s, b, h, i, j: s - SLOPES[h] * abs(i + 40 - j)), lambda s, b, h, i, j: s - SLOPES[h] * np.abs(i + 40 - j)):
        found = fastattn.attention_indexed(q, k, v, indices, score_function=f, **options)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_hidden_scores_are_hidden_whatever_becomes_of_them(engine):
    q, k, v = random_qkv(q_len=20, kv_len=20, head_dim=8)
    expected = fastattn.attention(q, k, v, causal=True)
    out = fastattn.attention(q, k, v, causal=True, score_function=lambda s, b, h, i, j: np.where(j > i, np.nan, s))
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-7)
    nothing = fastattn.attention(q, k, v, score_function=lambda s, b, h, i, j: np.where(i == 3, np.nan, s))
    assert np.isnan(nothing[0, 0, 3]).all() and np.isfinite(np.delete(nothing[0, 0], 3, axis=0)).all()


class Odd(Exception):
    pass


def test_an_exception_reaches_the_caller_and_nothing_is_written(engine):
    q, k, v = random_qkv(batch=2, heads=4, q_len=70, kv_len=600, head_dim=16)
    calls = []

    def fails(s, b, h, i, j):
        calls.append(b)
        if len(calls) > 5:
            raise Odd(f"of entry {b}")
        return s

    out = np.full_like(q, 7)
    with pytest.raises(Odd, match="of entry"):
        fastattn.attention(q, k, v, score_function=fails, out=out)
    assert (out == 7).all() and len(calls) == 6
    with pytest.raises(Odd):
        fastattn.attention(q, k, v, score_function=fails)
    for wrong, error, message in (
        (lambda s, b, h, i, j: np.ones((3, 7, 9)), ValueError, "score_function must return scores of shape"),
        (lambda s, b, h, i, j: "high", TypeError, "score_function must return real numbers"),
        (lambda s, b, h, i, j: 1j * s, TypeError, "score_function must return real numbers; got complex64"),
        (lambda s: s, TypeError, "positional argument"),
    ):
        with pytest.raises(error, match=message):
            fastattn.attention(q, k, v, score_function=wrong, out=out)
        assert (out == 7).all()
    np.testing.assert_array_equal(fastattn.attention(q, k, v, score_function=lambda s, b, h, i, j: s, out=out), out)
    assert (out != 7).all()


def test_bits_depend_on_neither_threads_nor_company(engine):
    q, k, v = random_qkv(batch=3, heads=4, kv_heads=2, q_len=9, kv_len=2500, head_dim=32)
    function = compiled(lambda s, b, h, i, j: s - SLOPES[h] * abs(i - j))
    with fastattn.threads(1):
        alone = fastattn.attention(q[1:2], k[1:2], v[1:2], score_function=function)
    with fastattn.threads(4):
        np.testing.assert_array_equal(fastattn.attention(q, k, v, score_function=function)[1:2], alone)


def test_bad_functions(engine):
    q, k, v = random_qkv(q_len=5, kv_len=9)
    out = np.full_like(q, 7)
    shorter = ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_float), ctypes.c_int64)(lambda s, n: None)
    doubles = ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_double), *[ctypes.c_int64] * 5, ctypes.c_void_p)(lambda *a: None)
    answers = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_float), *[ctypes.c_int64] * 5, ctypes.c_void_p)(lambda *a: 0)
    good = PROTOTYPE(lambda *a: None)
    wrong = [shorter, doubles, answers, ctypes.CDLL(None).abs, capsule(good, b"double (double)"), capsule(good, None)]
    for function in wrong:
        with pytest.raises(TypeError, match=r"score_function must have the signature void \(float \*, int64_t"):
            fastattn.attention(q, k, v, score_function=function, out=out)
    for function in (3, "alibi", [good]):
        with pytest.raises(TypeError, match="score_function must be a function of C"):
            fastattn.attention(q, k, v, score_function=function, out=out)
    for function in ((alibi, SLOPES), (good, SLOPES, 3), (good,)):
        with pytest.raises(TypeError, match="score_function must be"):
            fastattn.attention(q, k, v, score_function=function, out=out)
    with pytest.raises(ValueError, match="context must be a contiguous array"):
        fastattn.attention(q, k, v, score_function=(good, SLOPES[::2]), out=out)
    with pytest.raises(TypeError, match="function must be a function"):
        fastattn.score_function(3)
    assert (out == 7).all()


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
def test_bad_cfunc(engine):
    import numba

    wrong = numba.cfunc("float64(float64)")(lambda x: x)
    q, k, v = random_qkv(q_len=5, kv_len=9)
    with pytest.raises(TypeError, match=r"score_function must have the signature .*; got numba.cfunc's \(float64,?\) -> float64"):
        fastattn.attention(q, k, v, score_function=wrong)


def test_a_ring_has_no_positions_for_it(engine):
    cache = fastattn.KVCache(1, 1, 8, 4, window=4)
    x = np.ones((1, 1, 2, 4), np.float32)
    cache.append(x, x)
    with pytest.raises(ValueError, match="score_function must be None on a ring"):
        cache.attend(x, score_function=alibi)


def test_explain_says_what_runs(backend):
    """The kernels of the Numba backend call functions in C; callables of arrays are the NumPy backend's there."""
    q, k, v = random_qkv(q_len=5, kv_len=9)
    name = backend.backend
    assert fastattn.explain(q, k, v, score_function=PROTOTYPE(lambda *a: None))["backend"] == name
    assert fastattn.explain(q, k, v, score_function=alibi)["backend"] == ("native" if name == "native" else "numpy")


EXAMPLE = Path(__file__).parents[1] / "examples" / "score_functions.py"


@pytest.mark.skipif(not EXAMPLE.exists(), reason="the examples are not beside the tests")
def test_the_example():
    pytest.importorskip("numba", reason="numba is not installed")
    run = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, check=True)
    apart = [float(x) for x in re.findall(r"apart by (\S+)", run.stdout)]
    assert len(apart) == 4 and max(apart) < 1e-5, run.stdout
