"""The C library: its kernels for every instruction set that this processor has, its threads or OpenMP's."""

from itertools import count, takewhile

from .._native import (  # first, for its error names a missing extension
    attention_plain,
    has_openmp,
    linear_plain,
    note_fork,
    paged_plain,
    rope_plain,
    set_isa,
    set_num_threads,
    set_threading,
    store_plain,
)
from .. import _native

dtypes = frozenset({"float16", "bfloat16", "float32"})

# The library numbers its instruction sets from 1, lowest first; 0 is no limit.
_ISAS = {name: code for code, name in enumerate(takewhile(bool, map(_native.isa_name, count(1))), start=1)}


def attention(call):
    """Fill ``call.out`` and ``call.lse``."""
    status = _native.attention(call)
    if status == _native.ERROR_INDICES:
        call.check_indices()  # finds what the library has found, and says where
    _raise_unless_ok(status)


def merge_states(outs, lses, out, lse):
    """Fill `out` ``(..., Dv)`` and `lse` ``(...)`` with the combination of the parts."""
    _raise_unless_ok(_native.merge_states(outs, lses, out, lse))


def store(pairs, slots, rotate):
    """Cast or quantise rows ``(B, L, H, D)`` into caches ``(pages, rows of a page, H, D)`` at `slots` ``(B, L)``; -1 leaves one out."""
    status = _native.store(pairs, slots, rotate)
    if status != _native.ERROR_NOT_FINITE:
        _raise_unless_ok(status)
    return status == _native.OK


def select_keys(call):
    """Fill ``call.indices``."""
    _raise_unless_ok(_native.select_keys(call))


def apply_rope(x, cos, sin, out, interleaved):
    """Fill `out` with the rows of `x` turned by the angles of the tables."""
    _raise_unless_ok(_native.apply_rope(x, cos, sin, out, interleaved))


def normalize(x, add, add_bias, total, weight, bias, out, eps, centred):
    """Fill `out`, and `total` unless it is None, with normalised rows and what they were before."""
    _raise_unless_ok(_native.normalize(x, add, add_bias, total, weight, bias, out, eps, centred))


def pointwise(x, bias, out, kind, gated):
    """Fill `out` with an activation of rows."""
    _raise_unless_ok(_native.pointwise(x, bias, out, kind, gated))


def linear_attention(call):
    """Fill ``call.out`` and ``call.new_state``."""
    status = _native.linear_attention(call)
    if status == _native.ERROR_DECAY:
        call.check_decay()  # finds what the library has found, and says so
    _raise_unless_ok(status)


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
    code = _native.get_isa()
    return _native.isa_name(code) if code else None


def isa_code(name):
    """The number of an instruction set as a limit; that of None is no limit."""
    return 0 if name is None else _ISAS[name]


def get_threading():
    """How calls have threads: "pool", of the library's own, or "openmp"."""
    return _native.threading_name(_native.get_threading())


def threading_code(name):
    """The number of a way of threading."""
    return next(code for code in count(1) if _native.threading_name(code) == name)


def _raise_unless_ok(status):
    """The library checks again what guards memory; what it refuses has passed the checks of Python, which name the argument."""
    if status == _native.ERROR_MEMORY:
        raise MemoryError(_native.status_string(status))
    if status != _native.OK:
        raise ValueError(_native.status_string(status))
