"""Inputs for the tests: seeded, shaped, and placed in awkward memory."""

import ctypes

import numpy as np
import pytest

# On both sides of every vector and tile width.
SIZES = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 95, 97, 127, 129)

DTYPES = ("float32", "float16", "bfloat16")


def dtype_of(name):
    """The NumPy dtype of that name; the test is skipped where bfloat16 is asked for without ml_dtypes."""
    if name == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes", reason="bfloat16 arrays need ml_dtypes").bfloat16)
    return np.dtype(name)


def random_qkv(
    batch=1, heads=1, q_len=5, kv_len=37, head_dim=19, v_head_dim=None, kv_heads=None, dtype="float32", kv_dtype=None, seed=0
):
    """Standard normal ``(q, k, v)`` of rank 4."""
    rng = np.random.default_rng(seed)
    kv_heads = heads if kv_heads is None else kv_heads
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    q = rng.standard_normal((batch, heads, q_len, head_dim)).astype(dtype_of(dtype))
    k = rng.standard_normal((batch, kv_heads, kv_len, head_dim)).astype(dtype_of(kv_dtype or dtype))
    v = rng.standard_normal((batch, kv_heads, kv_len, v_head_dim)).astype(dtype_of(kv_dtype or dtype))
    return q, k, v


def unaligned(array):
    """A copy of the array that starts at an odd address."""
    buffer = np.empty(array.nbytes + 1, np.uint8)
    result = buffer[1:].view(array.dtype).reshape(array.shape)
    result[...] = array
    assert not result.flags.aligned or array.itemsize == 1
    return result


def read_only(array):
    """A read-only copy."""
    result = array.copy()
    result.flags.writeable = False
    return result


class DLPackOnly:
    """A tensor of another library."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


class _DLManagedTensor(ctypes.Structure):
    """DLPack's struct, https://dmlc.github.io/dlpack/latest/c_api.html: DLTensor, manager_ctx, deleter."""

    _fields_ = [
        ("data", ctypes.c_void_p), ("device", ctypes.c_int32 * 2), ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64), ("manager_ctx", ctypes.c_void_p), ("deleter", ctypes.c_void_p),
    ]  # fmt: skip


_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)


class BFloat16DLPack:
    """A bfloat16 tensor of a library that is not torch, for which NumPy's own DLPack has no dtype."""

    def __init__(self, array):
        self.array, self.freed = array, []
        shape, strides = ((ctypes.c_int64 * array.ndim)(*n) for n in (array.shape, [n // 2 for n in array.strides]))
        self._free = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.freed.append)
        self._tensor = _DLManagedTensor(array.ctypes.data - 2, (1, 0), array.ndim, 4, 16, 1, shape, strides, 2)

    def __dlpack__(self):
        return _new_capsule(ctypes.addressof(self._tensor), b"dltensor", ctypes.cast(self._free, ctypes.c_void_p))

    def __dlpack_device__(self):
        return (1, 0)


class ArrayInterfaceOnly:
    """An image or a buffer of an older library."""

    def __init__(self, array):
        self._array = array  # keeps the memory alive
        self.__array_interface__ = array.__array_interface__


def random(*shape, seed=0, scale=0.3):
    """Normal numbers that depend on shape and seed alone, float32."""
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) * scale).astype(np.float32)
