"""Score functions in one form: a C function and what it is given, or a callable of NumPy arrays."""

import ctypes
from typing import Any, NamedTuple

import numpy as np

from ._arrays import as_array

SIGNATURE = "void (float *, int64_t, int64_t, int64_t, int64_t, int64_t, void *)"
_PROTOTYPE = ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_float), *[ctypes.c_int64] * 5, ctypes.c_void_p)
_NUMBA = "(float32*, int64, int64, int64, int64, int64, void*) -> none"


class ScoreFunction(NamedTuple):
    """`address` is that of a C function, whose last argument is `context`; or it is 0 and `callable` takes arrays."""

    callable: Any
    address: int
    context: int
    owners: tuple  # what must outlive a call

    def apply(self, s, b, h, i, j):
        """The scores `s` ``(rows, keys)`` of the query rows `i` and the keys `j` as the function changes them."""
        if self.address:
            return self._by_runs(s, b, h, i, j)
        result = np.asarray(self.callable(s, b, h, i[:, None], j[None, :]))
        if result.dtype.kind not in "fiub" and result.dtype.name != "bfloat16":
            raise TypeError(f"score_function must return real numbers; got {result.dtype}")
        try:
            return np.broadcast_to(result, s.shape).astype(s.dtype)
        except ValueError as error:
            raise ValueError(f"score_function must return scores of shape {s.shape}; got {result.shape}") from error

    def _by_runs(self, s, b, h, i, j):
        """Each row of each run of keys that follow each other on its own, in float32, which the C function takes."""
        function = _PROTOTYPE(self.address)
        result = np.ascontiguousarray(s, np.float32)
        pointer = ctypes.POINTER(ctypes.c_float)
        starts = np.flatnonzero(np.diff(j, prepend=j[:1] - 2) != 1)
        for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(j)]):
            for row, query in zip(result, i.tolist()):
                function(row[start:end].ctypes.data_as(pointer), end - start, b, h, query, int(j[start]), self.context)
        return result.astype(s.dtype)


def take(value):
    """A `ScoreFunction` of what the caller has given as `score_function`: a function, or a pair of one and its context."""
    function, context, owners = value, 0, (value,)
    if isinstance(value, tuple):
        if len(value) != 2:
            raise TypeError(f"score_function must be a function, or a pair (function, context); got {len(value)} of them")
        function, context = value
        if isinstance(context, (int, np.integer)):
            context = int(context)
        else:
            array = as_array("score_function's context", context)
            if not array.flags.c_contiguous:
                raise ValueError(f"score_function's context must be a contiguous array; got strides {array.strides}")
            context, owners = array.ctypes.data, (function, array)
    for address_of in (_of_ctypes, _of_capsule, _of_numba, _of_cffi):
        address = address_of(function)
        if address:
            return ScoreFunction(None, address, context or _context_of(function), owners)
    if not callable(function):
        raise TypeError(f"score_function must be a function of C (ctypes, cffi, a capsule, numba.cfunc) or a callable; got {function!r}")
    if isinstance(value, tuple):
        raise TypeError("score_function must be a C function to have a context; got a Python callable, which needs none")
    return ScoreFunction(function, 0, 0, owners)


def _wrong(found):
    return TypeError(f"score_function must have the signature {SIGNATURE}; got {found}")


def _of_ctypes(function):
    if not isinstance(function, ctypes._CFuncPtr):
        return 0
    arguments = function.argtypes or getattr(type(function), "_argtypes_", None)
    result = function.restype
    if arguments is None or [*map(_kind, arguments)] != [*map(_kind, _PROTOTYPE._argtypes_)] or result is not None:
        raise _wrong(f"ctypes' {getattr(result, '__name__', result)} ({', '.join(a.__name__ for a in arguments or ())})")
    return ctypes.cast(function, ctypes.c_void_p).value


def _kind(argument):
    """What an argument is to the machine: pointers to floats and to anything, and integers by their size."""
    if issubclass(argument, ctypes._Pointer):
        return argument._type_
    return argument if argument is ctypes.c_void_p else (argument._type_ in "bhilq", ctypes.sizeof(argument))


def _pythonapi(name, result):
    return ctypes.PYFUNCTYPE(result, ctypes.py_object, ctypes.c_char_p)((name, ctypes.pythonapi))


def _of_capsule(function):
    if type(function).__name__ != "PyCapsule":
        return 0
    name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi))(function)
    if _plain(name) != _plain(SIGNATURE.encode()):
        raise _wrong(f"a capsule of {name!r}")
    return _pythonapi("PyCapsule_GetPointer", ctypes.c_void_p)(function, name)


def _plain(signature):
    """A signature without spaces and words that change nothing, for comparisons."""
    return (signature or b"").replace(b"__pyx_t_5numpy_", b"").replace(b"npy_int64", b"int64_t").replace(b" ", b"")


def _context_of(function):
    """What a capsule keeps for its function."""
    if type(function).__name__ != "PyCapsule":
        return 0
    return ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object)(("PyCapsule_GetContext", ctypes.pythonapi))(function) or 0


def _of_numba(function):
    if not (type(function).__module__.startswith("numba.") and hasattr(function, "address")):
        return 0
    signature = str(getattr(function, "_sig", None))
    if signature.replace("voidptr", "void*") != _NUMBA:
        raise _wrong(f"numba.cfunc's {signature}")
    return function.address


def _of_cffi(function):
    if type(function).__module__ != "_cffi_backend":
        return 0
    import _cffi_backend

    ffi = _cffi_backend.FFI()
    kind = ffi.typeof(function)
    if kind.kind == "function":
        names = [a.cname for a in kind.args]
        if (kind.result.cname, names[:1], names[1:6], names[6:]) == ("void", ["float *"], ["int64_t"] * 5, ["void *"]):
            return int(ffi.cast("uintptr_t", function))
    raise _wrong(f"cffi's {kind.cname}")
