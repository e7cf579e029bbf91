"""Arrays of other libraries as ndarrays that share their memory."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import numpy as np


def as_array(name: str, value: Any) -> np.ndarray:
    """`value` as an ndarray that shares its memory wherever the CPU can see it; `TypeError` where it cannot."""
    if type(value) is np.ndarray:
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name} must be a plain array; got a MaskedArray, whose mask would be ignored: give {name}.filled(...), "
            "and hide keys by mask="
        )
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return _of_tensor(name, value, torch)
    try:
        if hasattr(value, "__dlpack__") and not hasattr(value, "__array__") and not hasattr(value, "__array_interface__"):
            return _of_dlpack(value)
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError, BufferError, ImportError) as error:
        raise TypeError(f"{name} must be an array in the memory of the CPU; got {type(value).__name__} ({error})") from error


def _of_tensor(name, tensor, torch):
    """A tensor of PyTorch, or the one thing that is to be done before it can be taken."""
    if tensor.requires_grad:
        raise TypeError(
            f"{name} must not require a gradient, since there is no backward pass; got a {tensor.dtype} tensor that does: "
            f"give {name}.detach()"
        )
    if tensor.device.type == "meta":
        raise TypeError(f"{name} must be an array in the memory of the CPU; got a tensor on the meta device, without numbers")
    if tensor.device.type != "cpu":
        raise TypeError(f"{name} must be an array in the memory of the CPU; got a tensor on {tensor.device}: give {name}.cpu()")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a strided array; got a tensor of layout {tensor.layout}: give {name}.to_dense()")
    try:
        if tensor.dtype is torch.bfloat16:  # torch exports none to NumPy, but the same bits as integers
            return tensor.view(torch.int16).numpy().view(_bfloat16())
        return tensor.numpy()
    except (TypeError, RuntimeError, ImportError) as error:
        hint = f": give {name}.to(torch.bfloat16)" if "float8" in str(tensor.dtype) else ""
        raise TypeError(f"{name} must be an array that NumPy can see; got a {tensor.dtype} tensor ({error}){hint}") from error


def _bfloat16():
    try:
        from ml_dtypes import bfloat16
    except ImportError as error:
        raise ImportError("bfloat16 arrays need the package ml_dtypes") from error
    return bfloat16


def _of_dlpack(value):
    """A tensor that speaks DLPack; NumPy knows each of its dtypes but bfloat16."""
    bits = _Bits.of(value)
    return np.from_dlpack(value) if bits is None else np.asarray(bits).view(_bfloat16())


# DLPack's C interface, https://dmlc.github.io/dlpack/latest/c_api.html


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _DLManagedTensorVersioned(ctypes.Structure):
    _fields_ = [
        ("version", ctypes.c_uint32 * 2),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    ]


_CPU, _BFLOAT, _READ_ONLY = 1, 4, 1  # of DLDeviceType, DLDataTypeCode and the flags
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))


class _Bits:
    """The numbers of a bfloat16 tensor as 16-bit integers. Keeps the capsule, which frees the tensor when it is collected."""

    def __init__(self, capsule, tensor, read_only):
        self._capsule = capsule
        self.__array_interface__ = {
            "version": 3,
            "typestr": np.dtype(np.int16).str,
            "shape": tuple(tensor.shape[: tensor.ndim]),
            "strides": tuple(2 * n for n in tensor.strides[: tensor.ndim]) if tensor.strides else None,
            "data": ((tensor.data or 0) + tensor.byte_offset, read_only),
        }

    @classmethod
    def of(cls, value):
        """None where `value` is anything else than bfloat16 in the memory of the CPU."""
        if value.__dlpack_device__()[0] != _CPU:
            return None
        try:
            capsule = value.__dlpack__(max_version=(1, 0))
        except TypeError:  # an older producer
            capsule = value.__dlpack__()
        if _is_valid(capsule, b"dltensor_versioned"):
            managed = _DLManagedTensorVersioned.from_address(_pointer_of(capsule, b"dltensor_versioned"))
            tensor, read_only = managed.tensor, bool(managed.flags & _READ_ONLY)
        else:
            tensor, read_only = _DLTensor.from_address(_pointer_of(capsule, b"dltensor")), False
        is_bfloat16 = (tensor.code, tensor.bits, tensor.lanes) == (_BFLOAT, 16, 1)
        return cls(capsule, tensor, read_only) if is_bfloat16 else None
