"""Inputs for the tests: seeded, shaped, and placed in awkward memory."""

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


class ArrayInterfaceOnly:
    """An image or a buffer of an older library."""

    def __init__(self, array):
        self._array = array  # keeps the memory alive
        self.__array_interface__ = array.__array_interface__
