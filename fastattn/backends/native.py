"""The C library: its kernels for every instruction set that this processor has, threads by OpenMP."""

from itertools import count, takewhile

from .._native import attention_plain, has_openmp, set_num_threads  # first, for its error names a missing extension
from .. import _native

dtypes = frozenset({"float16", "bfloat16", "float32"})

# The library numbers its instruction sets from 1, lowest first; 0 is no limit.
_ISAS = {name: code for code, name in enumerate(takewhile(bool, map(_native.isa_name, count(1))), start=1)}


def attention(call):
    """Fill ``call.out`` and ``call.lse``."""
    _raise_unless_ok(_native.attention(call))


def merge_states(outs, lses, out, lse):
    """Fill `out` ``(rows, Dv)`` and `lse` ``(rows,)`` with the combination of the parts."""
    _raise_unless_ok(_native.merge_states(outs, lses, out, lse))


def store(rows, cache, slots):
    """Cast `rows` ``(B, L, H, D)`` into `cache` ``(pages, rows of a page, H, D)`` at `slots` ``(B, L)``; -1 leaves one out."""
    _raise_unless_ok(_native.store(rows, cache, slots))


def apply_rope(x, cos, sin, out, interleaved):
    """Fill `out` with the rows of `x` turned by the angles of the tables."""
    _raise_unless_ok(_native.apply_rope(x, cos, sin, out, interleaved))


def explain(call):
    """How `call` is computed."""
    status, plan = _native.explain(call)
    _raise_unless_ok(status)
    return {"backend": "native", **plan}


def available_isas():
    """The names of the instruction sets that can be used here, lowest first."""
    return tuple(name for name, code in _ISAS.items() if _native.isa_available(code))


def get_isa():
    """The highest instruction set to use, or None for no limit."""
    return _native.isa_name(_native.get_isa()) if _native.get_isa() else None


def set_isa(name):
    """Use no instruction set above `name`, or with None any that there is."""
    _native.set_isa(0 if name is None else _ISAS[name])


def _raise_unless_ok(status):
    """The library checks again what guards memory; what it refuses has passed the checks of Python, which name the argument."""
    if status == _native.ERROR_MEMORY:
        raise MemoryError(_native.status_string(status))
    if status != _native.OK:
        raise ValueError(_native.status_string(status))
