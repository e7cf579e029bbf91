"""Kernels compiled by Numba: nearly the speed of the C library where there is no compiler.

The kernels (`_numba_kernels`) are plain machine code that knows nothing of threads: each thread takes work items from a shared
counter until none is left. The threads are ordinary Python threads that run it without the GIL, not those of one of Numba's
threading layers. So nothing depends on which layer is installed: concurrent callers cannot upset it (``workqueue`` ends the
process), a forked child starts threads of its own (GNU OpenMP's are gone), and Numba's settings stay the user's.

Compiled code is cached on disk where Numba finds a folder for it: beside this file, else in the user's cache folder, or
in ``NUMBA_CACHE_DIR``. Without any it is compiled again in each process.
"""

import inspect
import os
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cache, partial

import numpy as np
from numba import config, njit

from .. import _settings
from .._quantized import kind_of
from . import _numba_kernels, _numba_linear, _numba_numbers, _numba_products, _numba_simd, numpy
from ._numba_kernels import ACTIVATIONS, MERGE, MIN_PART, PARTS, PLAN, SHRINK, WHOLE, Entry
from .numpy import (  # what NumPy does as well
    normalize as normalize,
    pointwise as pointwise,
    select_keys as select_keys,
    store as store,
)

if config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set")

_CODES = {
    "float32": _numba_numbers.FLOAT32,
    "float16": _numba_numbers.FLOAT16,
    "bfloat16": _numba_numbers.BFLOAT16,
    "float64": _numba_numbers.FLOAT64,
    "bool": _numba_numbers.BOOL,
    "int8": _numba_numbers.INT8,
    "int4": _numba_numbers.INT4,
}
_OWN_FIELDS = (
    "n_entries", "kv_group", "groups", "group", "band", "units", "parts", "head_pitch", "v_head_pitch", "slots", "block_keys",
    "widened", "own_states", "state_bytes",
)  # fmt: skip
_MIN_UNITS = 16  # an entry with fewer units of work has its keys split
_WORK_OF_A_THREAD = 4_000_000  # multiply-adds for which it pays to wake one
_WORK_OF_A_LONG_CALL = 1_000_000_000  # that somebody may want to interrupt
_NO_ITEM = 1 << 62
_MERGE_ROWS = 64
_ROPE_ROWS = 256
_MAX_POOL = 1024

# The lanes of a register; the registers in which query rows are few; and the register tile, (rows, registers of a row):
# accumulators in all registers but those that a row of operands and a broadcast take.
_WIDTH, _FEW, _TILE = {
    "avx512": (16, 1, (4, 4)),
    "avx2": (8, 1, (4, 3)),
    "neon": (4, 2, (4, 6)),
    "portable": (4, 2, (4, 3)),
}[_numba_simd.ISA]
_ONE_ROW = (1, 8)
_STRIP = 4  # registers of a strip of the linear family's state

dtypes = frozenset({"float16", "bfloat16", "float32"})


class _State:
    """What outlives a call."""

    def __init__(self):
        self.threads = 1
        self.kernels = {}
        self.renew()

    def renew(self):
        """Start without threads and locks, as a forked child must."""
        self.lock = threading.Lock()
        self.pool = None


_state = _State()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_state.renew)


def set_num_threads(n):
    """Use at most `n` threads in later calls, where the calling context has set no number."""
    _state.threads = n


def attention(call):
    """Fill ``call.out`` and ``call.lse``."""
    if _is_for_numpy(call):
        numpy.attention(call)
        return
    if call.visibility.indices is not None:
        call.check_indices()
    for work in _works(call):
        kernel = _kernel(_numba_kernels.build_attention, *work.shape)
        plan, states = work.plan(), _scratch(work.states_bytes)
        plan["states"] = _address(states)

        def run(phase, counter, work=work, kernel=kernel, plan=plan):
            scratch = _scratch(work.scratch_bytes)
            kernel(plan, phase, _address(scratch), counter)

        for phase in (PARTS, MERGE) if work.states_bytes else (WHOLE,):
            _share(partial(run, phase), work.threads, work.is_long and threading.current_thread() is threading.main_thread())
    call.clear_padding()


def _is_for_numpy(call):
    """The kernels call no score function of Python's, and theirs is another order of sums for few rows than for many."""
    return call.invariant or (call.scores.function is not None and call.scores.function.callable is not None)


def merge_states(outs, lses, out, lse):
    """Fill `out` ``(..., Dv)`` and `lse` ``(...)`` with the combination of the parts."""
    n_rows, width = lse.size, out.shape[-1]
    kernel = _kernel(_numba_kernels.build_merge, _MERGE_ROWS)
    parts = np.array([_address(array) for array in (*outs, *lses)], np.int64)

    def run(counter):
        scratch = _scratch(8 * width)
        code = _CODES[out.dtype.name]
        kernel(parts, len(outs), n_rows, width, code, _address(out), _address(lse), _address(scratch), counter)

    _share(run, _useful_threads(-(-n_rows // _MERGE_ROWS), len(outs) * n_rows * width))


def apply_rope(x, cos, sin, out, interleaved):
    """Fill `out` with the rows of `x` turned by the angles of the tables."""
    batch, num_heads, length, head_dim = x.shape
    n_rows = batch * num_heads * length
    kernel = _kernel(_numba_kernels.build_rope, _CODES[x.dtype.name], interleaved, _ROPE_ROWS)
    arrays = x, out, cos, sin
    at, strides = np.array([_address(array) for array in arrays]), np.array([array.strides[:3] for array in arrays])

    def run(counter):
        kernel(at, strides, num_heads, length, n_rows, head_dim, cos.shape[-1], counter)

    _share(run, _useful_threads(-(-n_rows // _ROPE_ROWS), n_rows * head_dim))


def linear_attention(call):
    """Fill ``call.out`` and ``call.new_state``."""
    call.check_decay()
    head_dim, v_head_dim = call.k.shape[3], call.v.shape[3]
    lanes = _STRIP * _WIDTH
    strips = max(1, -(-v_head_dim // lanes))
    in_place = call.normalize and call.state is not None and call.new_state is not None and np.may_share_memory(call.state, call.new_state)
    state = call.state.copy() if in_place else call.state  # the sums of the keys are read by all strips
    pitch = -(-head_dim // _WIDTH) * _WIDTH
    starts = np.zeros(call.lengths.size + 1, np.int64) if call.cu_seqlens is None else call.cu_seqlens
    fields = {
        **_place("q", call.q, "q_batch", "q_head", "q_row"),
        **_place("k", call.k, "k_batch", "k_head", "k_row"),
        **_place("v", call.v, "v_batch", "v_head", "v_row"),
        **_place("out", call.out, "out_batch", "out_head", "out_row"),
        **_place("decay", call.decay, "decay_batch", "decay_head", "decay_row"),
        **_place("beta", call.beta, "beta_batch", "beta_head", "beta_row"),
        **_place("state", state, "state_batch", "state_head", "state_row"),
        **_place("new_state", call.new_state, "new_state_batch", "new_state_head", "new_state_row"),
        **_place("starts", starts),
        **_place("lengths", call.lengths),
        "q_code": _CODES[call.q.dtype.name], "kv_code": _CODES[call.k.dtype.name],
        "decay_code": 0 if call.decay is None else _CODES[call.decay.dtype.name],
        "beta_code": 0 if call.beta is None else _CODES[call.beta.dtype.name],
        "decay_rows": call.decay is not None and call.decay.ndim == 4, "decay_log": call.decay_log,
        "q_len": call.q.shape[2], "kv_len": call.k.shape[2], "head_dim": head_dim, "v_head_dim": v_head_dim,
        "q_heads": call.q.shape[1], "k_heads": call.k.shape[1], "v_heads": call.v.shape[1], "states": call.states, "heads": call.heads,
        "strips": strips, "items": call.lengths.size * call.states * strips, "packed": call.cu_seqlens is not None,
        "causal": call.causal, "normalize": call.normalize, "feature_map": call.feature_map, "pitch": pitch, "scale": call.scale,
    }  # fmt: skip
    plan = np.zeros(1, _numba_linear.PLAN)
    plan[0] = tuple([fields.get(name, 0) for name in _numba_linear.PLAN.names])
    kernel = _kernel(_numba_linear.build_linear, _STRIP, _WIDTH)

    def run(counter):
        scratch = _scratch(4 * (4 * pitch + (1 + head_dim) * lanes))
        kernel(plan, _address(scratch), counter)

    tokens = int(call.lengths.sum()) * (call.states + call.heads)
    _share(run, _useful_threads(fields["items"], tokens * head_dim * v_head_dim))


def explain(call):
    """How `call` is computed; where entries differ, what is done to those with the most rows."""
    if _is_for_numpy(call):
        return numpy.explain(call)
    works = list(_works(call)) or [_Work(call, np.arange(0), _MANY_ROWS)]
    work = works[-1]
    return {
        "backend": "numba",
        "isa": _numba_simd.ISA,
        "kernel": f"{_storage(call.k)}_{work.shape[0]}x{work.lanes}",
        "tile_rows": work.lanes,
        "tile_keys": work.block_keys,
        "splits": work.parts,
        "work_items": sum(work.units * work.parts for work in works),
        "threads": work.threads,
        "threading": "pool",
        "workspace_bytes": max(work.threads * work.scratch_bytes + work.states_bytes for work in works),
        "visible_fraction": float(sum(work.visible_pairs() for work in works) / max(call.q.shape[1] * call.entries.pairs, 1)),
    }


def _works(call):
    """The work of a call, one `_Work` for each kernel that its entries need: that for as many rows as an entry has."""
    kinds = np.array([_kind(_band(call, q_len) * _group(call)) for q_len in call.entries.q_lengths.tolist()])
    for kind in sorted(set(kinds.tolist()) - {_NO_ROWS}):
        yield _Work(call, np.flatnonzero(kinds == kind), kind)


_NO_ROWS, _MANY_ROWS = 0, 1 << 62


def _kind(rows):
    """Few rows by the lanes that each key has of a vector; and many."""
    if rows > _FEW * _WIDTH:
        return _MANY_ROWS
    return rows if rows < 2 else max(_TILE[0], 1 << (rows - 1).bit_length())


def _group(call):
    """Query heads that walk through the same keys: heads with patterns of their own cannot share a work item."""
    num_heads, mask = call.q.shape[1], call.visibility.block_mask
    return 1 if mask is not None and mask.shape[1] > 1 else num_heads // max(call.k.shape[1], 1)


def _band(call, q_len):
    return min(q_len, _band_rows(call))


def _band_rows(call):
    """Rows that walk through the same keys."""
    if call.visibility.indices is not None:
        return 1
    mask = call.visibility.block_mask
    return call.q.shape[2] if mask is None else mask.block_size


class _Work:
    """How entries of a call that share a kernel are cut into units of work; see `PLAN` and `Entry` for the terms.

    Nothing but `threads`, and with it where states are kept, depends on the number of threads or of batch entries.
    """

    def __init__(self, call, entries, kind):
        self.call = call
        num_heads, _, head_dim = call.q.shape[1:]
        num_kv_heads, v_head_dim = call.v.shape[1], _v_head_dim(call)

        self.kv_group = num_heads // max(num_kv_heads, 1)
        self.group = _group(call)
        self.groups = num_heads // max(self.group, 1)

        few = kind != _MANY_ROWS
        code = _CODES[_storage(call.k)]
        # For many rows, or without instructions for float16, keys and values are widened before they are multiplied.
        quantized = kind_of(call.k.dtype) is not None
        as_stored = few and not quantized and (code == _numba_numbers.BFLOAT16 or _numba_simd.CONVERTS_HALF)
        self.widened = code != _numba_numbers.FLOAT32 and not as_stored
        if few:
            tile = _ONE_ROW if kind == 1 else _TILE
            self.shape = (*tile, _WIDTH, _FEW, _numba_numbers.FLOAT32 if self.widened else code)
        else:
            self.shape = (*_TILE, _WIDTH, _TILE[1], None)
        self.lanes = self.shape[3] * _WIDTH
        self.slots = kind if few else self.lanes
        self.block_keys = 64 if self.lanes >= 48 else 128  # scores stay within half of a first-level cache

        self._cut(entries)
        work = int((self.units_of * self.kv_len).sum()) * self.lanes * (head_dim + v_head_dim)
        self.threads, self.is_long = _useful_threads(self.units * self.parts, work), work > _WORK_OF_A_LONG_CALL
        self.head_pitch, self.v_head_pitch = (-(-n // self.shape[2]) * self.shape[2] for n in (head_dim, v_head_dim))
        additive, self.additive = call.scores.additive, None
        if additive is not None:  # read in whole vectors
            self.head_pitch = -(-head_dim // self.lanes) * self.lanes
            self.additive = np.zeros((num_heads, self.head_pitch), np.float32)
            self.additive[:, :head_dim] = additive
        row_bytes = 4 * self.lanes
        self.state_bytes = row_bytes * (3 + self.v_head_pitch)
        turned = max(self.head_pitch, self.v_head_pitch, self.block_keys)
        gathered = self.widened or call.entries.block_table is not None or call.visibility.indices is not None
        copies = 4 * self.block_keys * (head_dim + v_head_dim) if gathered else 0
        weights = row_bytes * self.head_pitch if self.additive is not None else 0
        self.own_states = row_bytes * (turned + 8 + self.head_pitch + 2 * self.block_keys) + max(copies, weights)
        if self.parts > 1 and self.units < 4 * self.threads:  # parts of a unit on several threads
            self.states_bytes, self.scratch_bytes = self.units * self.parts * self.state_bytes, self.own_states
        else:
            self.states_bytes, self.scratch_bytes = 0, self.own_states + min(self.parts, 2) * self.state_bytes

    def _cut(self, entries):
        """Units and parts of each entry by its shape alone, the entries with the most keys first."""
        call, own, indices = self.call, self.call.entries, self.call.visibility.indices
        keys = own.kv_lengths - own.kv_starts
        kv_len = keys if indices is None else np.full_like(keys, indices.shape[3])
        entries = entries[np.argsort(-kv_len[entries], kind="stable")]
        self.q_len, self.kv_len, start = own.q_lengths[entries], kv_len[entries], own.kv_starts[entries]
        self.band = _band_rows(call)
        bands = -(-self.q_len // max(self.band, 1))
        panels = -(-np.minimum(self.q_len, self.band) * self.group // self.lanes)
        self.units_of = self.groups * bands * panels
        whole = call.visibility.block_mask is not None or call.segments is not None
        split = np.ones_like(bands) if whole else -(-_MIN_UNITS // np.maximum(self.units_of, 1))
        self.units = int(self.units_of.sum())
        self.parts = int(np.minimum(split, -(-self.kv_len // MIN_PART)).max(initial=1))
        self.n_entries, self.offset = len(entries), own.query_offset[entries] - start
        query, key = (0 if table is None else table[entries] for table in (own.cu_seqlens_q, own.cu_seqlens_k))
        columns = {
            "batch": entries, "query": query, "key": key + start, "start": start, "q_len": self.q_len, "kv_len": self.kv_len,
            "offset": self.offset, "keys": keys[entries], "bands": bands, "panels": panels, "split": split,
            "unit": np.cumsum(self.units_of) - self.units_of,
        }  # fmt: skip
        self.entries = np.empty((len(entries), len(Entry._fields)), np.int64)
        for n, name in enumerate(Entry._fields):
            self.entries[:, n] = columns[name]

    def plan(self):
        """The records that the kernels read. They hold addresses: the call must outlive them."""
        call, entries, sees, scores = self.call, self.call.entries, self.call.visibility, self.call.scores
        fields = {
            **_place("q", call.q, "q_batch", "q_head", "q_row"),
            **_place("k", call.k, "k_batch", "k_head", "k_row"),
            **_place("v", call.v, "v_batch", "v_head", "v_row"),
            **_place("out", call.out, "out_batch", "out_head", "out_row"),
            **_place("lse", call.lse, "lse_batch", "lse_head", "lse_row"),
            **_place("mask", sees.mask, "mask_batch", "mask_head", "mask_row", "mask_key"),
            **_place("alibi", scores.alibi_slopes, "alibi_batch", "alibi_head"),
            **_place("sinks", scores.sinks),
            **_place("entries", self.entries),
            "q_code": _CODES[call.q.dtype.name], "kv_code": _CODES[_storage(call.k)], "v_code": _CODES[_storage(call.v)],
            "mask_code": 0 if sees.mask is None else _CODES[sees.mask.dtype.name],
            "head_dim": call.q.shape[3], "v_head_dim": _v_head_dim(call),
            "causal": sees.causal, "window_left": sees.window[0], "window_right": sees.window[1],
            "scale": scores.scale, "softcap": scores.softcap, "activation": ACTIVATIONS.index(scores.activation), "power": scores.power,
            **_place("activation_bias", scores.activation_bias), **_place("additive", self.additive, "additive_head"),
            **_place("segments", call.segments, "segments_row"), "num_segments": call.num_segments,
        }  # fmt: skip
        if scores.function is not None:
            fields |= {"score_function": scores.function.address, "score_context": scores.function.context}
        if entries.cu_seqlens_q is not None:
            fields |= {"q_batch": 0, "out_batch": 0, "lse_batch": 0}
        if sees.indices is not None:
            fields |= _place("lists", sees.indices, "list_batch", "list_head", "list_row")
            fields |= {"index_size": sees.indices.itemsize} | ({} if entries.cu_seqlens_q is None else {"list_batch": 0})
        if entries.cu_seqlens_k is not None:
            fields |= {"k_batch": 0, "v_batch": 0, "segments_row": 0}
        if entries.block_table is not None:
            fields |= _place("block_table", entries.block_table, "table_row") | {"page_size": call.k.shape[2]}
        for name in _OWN_FIELDS:
            fields[name] = getattr(self, name)
        mask = sees.block_mask
        if mask is not None:
            for name in ("indptr", "indices", "partial", "element_bits"):
                fields |= _place(name, getattr(mask, name))
            fields |= {"block_size": mask.block_size, "pattern_batch": mask.row_strides[0], "pattern_head": mask.row_strides[1]}
        plan = np.zeros(2, PLAN)
        plan[:] = tuple([fields.get(name, 0) for name in PLAN.names])
        plan["shrink"] = 1, SHRINK
        return plan

    def visible_pairs(self):
        """The (row, key) pairs that are computed: what causal, window, lengths and a block mask leave to each item."""
        call, sees, mask = self.call, self.call.visibility, self.call.visibility.block_mask
        if sees.indices is not None:
            return call.q.shape[1] * int((self.q_len * self.kv_len).sum())
        left, right = sees.window[0], 0 if sees.causal else sees.window[1]
        computed = 0
        for b, start, q_len, kv_len, offset in zip(self.entries[:, 0], self.entries[:, 3], self.q_len, self.kv_len, self.offset):
            i0 = np.arange(0, q_len, self.band)[:, None]
            first = np.arange(0, min(self.band, q_len) * self.group, self.lanes)
            n_rows = np.clip(np.minimum(self.band, q_len - i0) * self.group - first, 0, self.lanes)
            top, bottom = i0 + offset + first // self.group, i0 + offset + (first + n_rows - 1) // self.group
            low = np.maximum(top - left, 0) if left >= 0 else np.zeros_like(top)
            high = np.full_like(top, kv_len)
            if right >= 0:
                high = np.minimum(high, bottom + right + 1)
            if mask is None:
                computed += self.groups * (n_rows * np.maximum(high - low, 0)).sum()
                continue
            for h in range(0, call.q.shape[1], self.group):
                pattern = b * mask.row_strides[0] + h * mask.row_strides[1]
                ends = mask.indptr[pattern : pattern + len(i0) + 1]
                band = np.repeat(np.arange(len(i0)), np.diff(ends))
                key = mask.block_size * mask.indices[ends[0] : ends[-1], None].astype(np.int64) - start
                listed = np.minimum(high[band], key + mask.block_size) - np.maximum(low[band], key)
                computed += (n_rows[band] * np.maximum(listed, 0)).sum()
        return computed


def _v_head_dim(call):
    """The numbers of a value; there are none where weights are summed by segments."""
    return call.out.shape[3] if call.segments is None else 0


def _storage(rows):
    return kind_of(rows.dtype) or rows.dtype.name


def _address(array):
    return array.__array_interface__["data"][0]


def _place(name, array, *axes):
    """The fields of a plan that say where an array is: its address, and its strides along the axes."""
    return {} if array is None else {name: _address(array), **dict(zip(axes, array.strides))}


def _scratch(nbytes):
    """Memory on a cache line of its own."""
    memory = np.empty(nbytes + 63, np.uint8)
    return memory[-_address(memory) % 64 :]


def _kernel(build, *shape):
    """The compiled function for a shape, made on first use."""
    kernel = _state.kernels.get((build, shape))
    if kernel is None:
        with _state.lock:
            if (build, shape) not in _state.kernels:
                _state.kernels[build, shape] = _compile(build, shape)
            kernel = _state.kernels[build, shape]
    return kernel


def _compile(build, shape):
    for cached in (True, False):
        try:
            function, signature = build(_stamp() if cached else 0, *shape)
            return njit(signature, nogil=True, error_model="numpy", cache=cached)(function)
        except Exception:  # no folder for the cache, or one that is full, damaged or unreadable, must not matter
            if not cached:
                raise


@cache
def _stamp():
    """A number for the source of the kernels: Numba itself would notice changes of one of the files only."""
    modules = _numba_simd, _numba_numbers, _numba_products, _numba_kernels, _numba_linear
    return zlib.crc32("".join(map(inspect.getsource, modules)).encode())


def _useful_threads(items, work):
    return max(1, min(_settings.get("threads") or _state.threads, items, work // _WORK_OF_A_THREAD))


def _share(run, n_threads, watch=False):
    """Call ``run(counter)`` on this thread and on up to ``n_threads - 1`` others; return when all have.

    Helpers that have not begun when this thread finds no more work are not waited for: they are busy with somebody else's. With
    `watch` one more of them works and this thread waits, in Python, which so can handle signals; if that raises, no item is begun
    any more.
    """
    counter = np.zeros(1, np.int64)
    helpers = []
    try:
        with suppress(RuntimeError):  # no more threads, or the interpreter is shutting down: those that run will do
            for _ in range(n_threads if watch else n_threads - 1):
                helpers.append(_pool().submit(run, counter))
        if watch and helpers:
            while wait(helpers, timeout=0.1).not_done:  # without a timeout Windows would not be interrupted
                pass
        else:
            run(counter)
    except BaseException:
        counter[0] = _NO_ITEM
        raise
    finally:
        begun = [helper for helper in helpers if not helper.cancel()]
        wait(begun)
    for helper in begun:
        helper.result()


def _pool():
    with _state.lock:
        if _state.pool is None:
            _state.pool = ThreadPoolExecutor(_MAX_POOL, "fastattn")
        return _state.pool
