# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False, freethreading_compatible=True
"""The door to the C library: pointers in, a call without the GIL, a status out.

Arrays arrive checked (see ``fastattn._call``), except in the short ways, ``..._plain``, which check for themselves. 16-bit storage is
handled as memory: nothing here computes with an element.

Nothing here needs the GIL: what threads share are the settings of the process, each a number that is read once, and numbers that all
of them would find alike.
"""

from cpython.object cimport PyTypeObject
from cpython.ref cimport Py_INCREF
from cpython.contextvars cimport get_value
from cpython.pythread cimport PyThread_get_thread_ident
from libc.stdint cimport int32_t, int64_t, uint8_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

cimport numpy as np

from .libfastattn cimport *

import numpy as np
from threading import main_thread as _main_thread

from ._settings import scoped as _scoped

np.import_array()


cdef extern from "Python.h":
    int PyErr_CheckSignals() noexcept  # -1 leaves an exception behind

cdef extern from "numpy/arrayobject.h":
    np.ndarray PyArray_NewFromDescr(
        PyTypeObject *subtype, np.dtype dtype, int rank, np.npy_intp *shape, np.npy_intp *strides, void *data, int flags, object context
    )


cdef extern from "core/layers.h" nogil:
    ctypedef struct fastattn_norm_args:
        size_t size
        int64_t outer, inner, width
        const float *x
        const float *add
        float *sum
        float *out
        int64_t x_strides[2]
        int64_t add_strides[2]
        int64_t sum_strides[2]
        int64_t out_strides[2]
        const float *add_bias
        const float *weight
        const float *bias
        float eps
        int centred
        fastattn_isa isa
        int num_threads
        fastattn_threading threading

    ctypedef enum fastattn_pointwise_kind:
        FASTATTN_POINTWISE_GELU

    ctypedef struct fastattn_pointwise_args:
        size_t size
        int64_t rows, width
        fastattn_pointwise_kind kind
        int gated
        const float *x
        float *out
        int64_t x_stride, out_stride
        const float *bias
        fastattn_isa isa
        int num_threads
        fastattn_threading threading

    fastattn_status fastattn_normalize(const fastattn_norm_args *args)
    fastattn_status fastattn_pointwise(const fastattn_pointwise_args *args)


OK = FASTATTN_OK
ERROR_MEMORY = FASTATTN_ERROR_MEMORY
ERROR_DECAY = FASTATTN_ERROR_DECAY
ERROR_NOT_FINITE = FASTATTN_ERROR_NOT_FINITE
ERROR_INDICES = FASTATTN_ERROR_INDICES

cdef str HIGHEST = "highest"
cdef dict PRECISIONS = {
    HIGHEST: FASTATTN_PRECISION_HIGHEST,
    "high": FASTATTN_PRECISION_HIGH,
    "medium": FASTATTN_PRECISION_MEDIUM,
}

cdef str SOFTMAX = "softmax"
ACTIVATIONS = (SOFTMAX, "sigmoid", "relu", "polynomial")  # as the library numbers them

cdef np.dtype FLOAT32 = np.dtype("float32")
cdef object np_arange = np.arange
cdef int bfloat16_type = -1  # the number NumPy gave to ml_dtypes.bfloat16, once such an array has been seen


# How a call is computed, as far as its arguments do not say it.
cdef struct engine_settings:
    fastattn_isa isa
    int num_threads
    fastattn_threading threading

cdef engine_settings process
process.isa, process.num_threads, process.threading = FASTATTN_ISA_BEST, 1, FASTATTN_THREADING_POOL
cdef bint forked = False
cdef object scoped = _scoped
cdef unsigned long main_thread = _main_thread().ident


def set_num_threads(int n):
    process.num_threads = n


def set_isa(int code):
    process.isa = <fastattn_isa>code


def set_threading(int code):
    process.threading = <fastattn_threading>code


def note_fork():
    """In a child: the thread that has forked is the main one now, and OpenMP's are not there."""
    global forked, main_thread
    forked, main_thread = True, PyThread_get_thread_ident()


cdef int find_settings(engine_settings *found) except -1:
    """The settings of the process, and over them those of the calling context; 1 if the latter has chosen another backend."""
    cdef bint elsewhere = False
    found[0] = process
    settings = get_value(scoped)
    if settings is not None:
        backend, threads, isa, way = settings
        elsewhere = backend is not None and backend != "native"
        if threads is not None:
            found.num_threads = threads
        if isa is not None:
            found.isa = <fastattn_isa><int>isa
        if way is not None:
            found.threading = <fastattn_threading><int>way
    if forked and found.threading != FASTATTN_THREADING_POOL:
        found.num_threads = 1
    return elsewhere


def get_isa():
    cdef engine_settings found
    find_settings(&found)
    return <int>found.isa


def get_threading():
    cdef engine_settings found
    find_settings(&found)
    return <int>found.threading


def threading_name(int code):
    """The name of a way of threading."""
    return fastattn_threading_name(<fastattn_threading>code).decode()


cdef int interrupted(void *context) noexcept with gil:
    """Lets Python handle signals, Ctrl-C for one; whether a handler has raised an exception, which then stays pending."""
    return PyErr_CheckSignals() != 0


cdef int raise_pending() except -1:
    return -1


def isa_name(int code):
    """The name of an instruction set, or None past the last one."""
    cdef const char *name = fastattn_isa_name(<fastattn_isa>code)
    return None if name is NULL else name.decode()


def isa_available(int code):
    return bool(fastattn_isa_available(<fastattn_isa>code))


def has_openmp():
    return bool(fastattn_has_openmp())


def version():
    return fastattn_version().decode()


def status_string(int status):
    return fastattn_status_string(<fastattn_status>status).decode()


cdef fastattn_dtype dtype_code(np.ndarray array):
    """The library's name for a dtype that has been found to be one of its own."""
    global bfloat16_type
    cdef int type_num = np.PyArray_TYPE(array)
    if type_num == np.NPY_FLOAT32:
        return FASTATTN_FLOAT32
    if type_num == np.NPY_FLOAT16:
        return FASTATTN_FLOAT16
    if type_num == np.NPY_FLOAT64:
        return FASTATTN_FLOAT64
    if type_num == np.NPY_BOOL:
        return FASTATTN_BOOL
    if type_num == np.NPY_VOID:  # records
        return FASTATTN_INT8 if array.dtype.names[0] == "integers" else FASTATTN_INT4
    bfloat16_type = type_num
    return FASTATTN_BFLOAT16


cdef inline void copy_strides(int64_t *strides, np.ndarray array, int count) noexcept:
    cdef int axis
    for axis in range(count):
        strides[axis] = np.PyArray_STRIDES(array)[axis]


cdef int take_arrays(
    fastattn_attention_args *args, np.ndarray q, np.ndarray k, np.ndarray v, np.ndarray out
) except -1:
    """Fill in what every call has; 1 if the calling context has chosen another backend."""
    cdef engine_settings found
    cdef int elsewhere = find_settings(&found)
    args.batch, args.num_heads, args.q_len, args.head_dim = q.shape[0], q.shape[1], q.shape[2], q.shape[3]
    args.num_kv_heads, args.kv_len, args.v_head_dim = v.shape[1], v.shape[2], out.shape[3]
    args.q = np.PyArray_DATA(q)
    args.k = np.PyArray_DATA(k)
    args.v = np.PyArray_DATA(v)
    args.out = np.PyArray_DATA(out)
    copy_strides(args.q_strides, q, 3)
    copy_strides(args.k_strides, k, 3)
    copy_strides(args.v_strides, v, 3)
    copy_strides(args.out_strides, out, 3)
    args.isa, args.num_threads, args.threading = found.isa, found.num_threads, found.threading
    if PyThread_get_thread_ident() == main_thread:  # no other handles signals
        args.interrupted = interrupted
    return elsewhere


cdef take_block_mask(fastattn_block_mask *block_mask, mask):
    cdef np.ndarray indptr = mask.indptr, indices = mask.indices, partial, element_bits
    memset(block_mask, 0, sizeof(fastattn_block_mask))
    block_mask.size = sizeof(fastattn_block_mask)
    block_mask.block_size = mask.block_size
    block_mask.num_rows = indptr.shape[0] - 1
    block_mask.batch_stride, block_mask.head_stride = mask.row_strides
    block_mask.indptr = <const int64_t *>np.PyArray_DATA(indptr)
    block_mask.indices = <const int32_t *>np.PyArray_DATA(indices)
    if mask.partial is not None:
        partial, element_bits = mask.partial, mask.element_bits
        block_mask.partial = <const int32_t *>np.PyArray_DATA(partial)
        block_mask.element_bits = <const uint8_t *>np.PyArray_DATA(element_bits)
        block_mask.num_element_masks = element_bits.shape[0]


cdef take_entries(fastattn_attention_args *args, entries, np.ndarray k):
    """From ``Entries``: how many queries and keys there are, at which positions, and where."""
    cdef np.ndarray array
    array = entries.query_offset
    args.query_offset = <const int64_t *>np.PyArray_DATA(array)
    array = entries.kv_lengths
    args.kv_lengths = <const int64_t *>np.PyArray_DATA(array)
    array = entries.kv_starts
    args.kv_starts = <const int64_t *>np.PyArray_DATA(array)
    array = entries.q_lengths
    args.q_lengths = <const int64_t *>np.PyArray_DATA(array)
    args.batch = array.shape[0]
    if entries.cu_seqlens_q is not None:
        array = entries.cu_seqlens_q
        args.cu_seqlens_q = <const int64_t *>np.PyArray_DATA(array)
    if entries.cu_seqlens_k is not None:
        array = entries.cu_seqlens_k
        args.cu_seqlens_k = <const int64_t *>np.PyArray_DATA(array)
    if entries.block_table is not None:
        array = entries.block_table
        args.block_table = <const int32_t *>np.PyArray_DATA(array)
        args.block_table_stride = 4 * array.shape[1]
        args.num_pages, args.page_size = k.shape[0], k.shape[2]
        args.kv_len = args.page_size * array.shape[1]


cdef take_visibility(fastattn_attention_args *args, fastattn_block_mask *block_mask, visibility):
    """From ``Visibility``: which query may see which key."""
    cdef np.ndarray array
    args.causal = visibility.causal
    args.window_left, args.window_right = visibility.window
    if visibility.indices is not None:
        array = visibility.indices
        args.indices, args.indices_size, args.num_indices = np.PyArray_DATA(array), np.PyArray_ITEMSIZE(array), array.shape[3]
        copy_strides(args.indices_strides, array, 3)
    if visibility.mask is not None:
        array = visibility.mask
        args.mask = np.PyArray_DATA(array)
        args.mask_dtype = dtype_code(array)
        copy_strides(args.mask_strides, array, 4)
    if visibility.block_mask is not None:
        take_block_mask(block_mask, visibility.block_mask)
        args.block_mask = block_mask


cdef take_scores(fastattn_attention_args *args, scores):
    """From ``Scores``: what is made of products."""
    cdef np.ndarray array
    args.scale, args.softcap = scores.scale, scores.softcap
    args.activation, args.power = <fastattn_activation><int>ACTIVATIONS.index(scores.activation), scores.power
    if scores.alibi_slopes is not None:
        array = scores.alibi_slopes
        args.alibi_slopes = <const float *>np.PyArray_DATA(array)
        copy_strides(args.alibi_strides, array, 2)
    if scores.sinks is not None:
        array = scores.sinks
        args.sinks = <const float *>np.PyArray_DATA(array)
    if scores.activation_bias is not None:
        array = scores.activation_bias
        args.activation_bias = <const float *>np.PyArray_DATA(array)
    if scores.additive is not None:
        array = scores.additive
        args.additive, args.additive_stride = <const float *>np.PyArray_DATA(array), array.strides[0]
    if scores.function is not None and scores.function.address:
        args.score_function = <fastattn_score_function><size_t>scores.function.address
        args.score_context = <void *><size_t>scores.function.context


cdef take_call(fastattn_attention_args *args, fastattn_block_mask *block_mask, call):
    """Fill `args`, and `block_mask` if there is one, from a ``Call``, which keeps the arrays alive."""
    cdef np.ndarray q = call.q, k = call.k, array
    fastattn_attention_args_init(args, sizeof(fastattn_attention_args))
    take_arrays(args, q, k, call.v, call.out)
    args.q_dtype, args.kv_dtype, args.v_dtype = dtype_code(q), dtype_code(k), dtype_code(call.v)
    if call.lse is not None:
        array = call.lse
        args.lse = <float *>np.PyArray_DATA(array)
        copy_strides(args.lse_strides, array, 3)
    take_entries(args, call.entries, k)
    take_visibility(args, block_mask, call.visibility)
    take_scores(args, call.scores)
    args.precision = <fastattn_precision><int>PRECISIONS[call.precision]
    args.invariant = call.invariant
    if call.segments is not None:
        array = call.segments
        args.segments, args.segments_stride = <const int32_t *>np.PyArray_DATA(array), array.strides[0]
        args.num_segments, args.v_head_dim = call.num_segments, 0


cdef class CalledBack:
    """A score function in Python during a call, and what it has raised."""

    cdef object function
    cdef object error

    def __cinit__(self, function):
        self.function = function


cdef void call_back(
    float *scores, int64_t keys, int64_t batch, int64_t head, int64_t query, int64_t first_key, void *context
) noexcept with gil:
    """One run of scores through the function; nothing more after it has raised."""
    cdef CalledBack called = <CalledBack>context
    if called.error is not None:
        return
    try:
        s = array_at(<size_t>scores, (1, keys), (keys, 1), FLOAT32, called)
        changed = called.function.apply(s.copy(), batch, head, np_arange(query, query + 1), np_arange(first_key, first_key + keys))
        s[...] = changed
    except BaseException as error:
        called.error = error


cdef int ended(void *context) noexcept with gil:
    """Whether the function has raised, or a signal's handler has."""
    return (<CalledBack>context).error is not None or PyErr_CheckSignals() != 0


def array_at(size_t address, shape, strides, np.dtype dtype, owner):
    """An array over another library's memory, which `owner` keeps alive; `strides` count elements. Nothing is checked."""
    cdef np.npy_intp lengths[32]
    cdef np.npy_intp steps[32]
    cdef int axis, rank = len(shape)
    if rank > 32:
        raise ValueError(f"at most 32 axes; got {rank}")
    for axis in range(rank):
        lengths[axis] = shape[axis]
        steps[axis] = <np.npy_intp>strides[axis] * dtype.itemsize
    Py_INCREF(dtype)  # the array takes a reference
    array = PyArray_NewFromDescr(<PyTypeObject *>np.ndarray, dtype, rank, lengths, steps, <void *>address, np.NPY_ARRAY_WRITEABLE, None)
    np.set_array_base(array, owner)
    np.PyArray_UpdateFlags(array, np.NPY_ARRAY_ALIGNED | np.NPY_ARRAY_C_CONTIGUOUS | np.NPY_ARRAY_F_CONTIGUOUS)
    return array


def attention(call):
    """Fill ``call.out`` and ``call.lse``; the status."""
    cdef fastattn_attention_args args
    cdef fastattn_block_mask block_mask
    cdef fastattn_status status
    cdef CalledBack called = None
    function = call.scores.function
    take_call(&args, &block_mask, call)
    if function is not None and not function.address:
        called = CalledBack(function)
        args.score_function, args.score_context = call_back, <void *>called
        args.num_threads = 1  # which would wait for each other
        if args.interrupted is not NULL:
            args.interrupted, args.interrupted_context = ended, <void *>called
    with nogil:
        status = fastattn_attention(&args, NULL, 0)
    if called is not None and called.error is not None:
        raise called.error
    if status == FASTATTN_ERROR_INTERRUPTED:
        raise_pending()
    return <int>status


def explain(call):
    """The status, and the plan as a dict."""
    cdef fastattn_attention_args args
    cdef fastattn_block_mask block_mask
    cdef fastattn_plan_info info
    cdef fastattn_status status
    take_call(&args, &block_mask, call)
    memset(&info, 0, sizeof(info))
    info.size = sizeof(info)
    status = fastattn_explain(&args, &info)
    if status != FASTATTN_OK:
        return <int>status, None
    return <int>status, {
        "isa": isa_name(info.isa),
        "kernel": info.kernel.decode(),
        "tile_rows": info.tile_rows,
        "tile_keys": info.tile_keys,
        "splits": info.splits,
        "work_items": info.work_items,
        "threads": info.num_threads,
        "threading": threading_name(info.threading),
        "workspace_bytes": info.workspace,
        "visible_fraction": info.visible_fraction,
    }


def merge_states(outs, lses, np.ndarray out, np.ndarray lse):
    """Fill `out` and `lse` from the parts; the status."""
    cdef int64_t n, parts = len(outs)
    cdef fastattn_merge_args args
    cdef fastattn_status status
    cdef engine_settings found
    memset(&args, 0, sizeof(args))
    args.size = sizeof(args)
    args.num_parts, args.rows, args.v_head_dim = parts, np.PyArray_SIZE(lse), out.shape[out.ndim - 1]
    args.dtype = dtype_code(out)
    args.out = np.PyArray_DATA(out)
    args.lse = <float *>np.PyArray_DATA(lse)
    find_settings(&found)
    args.isa, args.num_threads, args.threading = found.isa, found.num_threads, found.threading
    cdef const void **pointers = <const void **>malloc(2 * parts * sizeof(void *))
    if pointers is NULL:
        return <int>FASTATTN_ERROR_MEMORY
    for n in range(parts):
        pointers[n] = np.PyArray_DATA(<np.ndarray>outs[n])
        pointers[parts + n] = np.PyArray_DATA(<np.ndarray>lses[n])
    args.outs, args.lses = pointers, <const float **>(pointers + parts)
    with nogil:
        status = fastattn_merge(&args)
        free(pointers)
    return <int>status


def store(pairs, np.ndarray slots, bint rotate):
    """Cast or quantise the rows of each of one or two pairs into its cache at `slots`; the status."""
    cdef fastattn_store_args args[2]
    cdef fastattn_store_args *each
    cdef fastattn_status status
    cdef engine_settings found
    cdef np.ndarray rows, cache
    cdef int n
    find_settings(&found)
    memset(args, 0, sizeof(args))
    for n, (rows, cache) in enumerate(pairs):
        each = &args[n]
        each.size = sizeof(fastattn_store_args)
        each.batch, each.new_len, each.num_heads, each.head_dim = rows.shape[0], rows.shape[1], rows.shape[2], rows.shape[3]
        each.from_ = np.PyArray_DATA(rows)
        each.from_dtype = dtype_code(rows)
        copy_strides(each.from_strides, rows, 3)
        each.to = np.PyArray_DATA(cache)
        each.to_dtype = dtype_code(cache)
        each.num_pages, each.page_size = cache.shape[0], cache.shape[1]
        copy_strides(each.to_strides, cache, 3)
        each.slots = <const int64_t *>np.PyArray_DATA(slots)
        each.isa, each.num_threads, each.threading = found.isa, found.num_threads, found.threading
        each.rotate = rotate
    if len(pairs) == 2:
        args[0].also = &args[1]
    with nogil:
        status = fastattn_store(args)
    return <int>status


def select_keys(call):
    """Fill ``call.indices`` of a ``Selection``; the status."""
    cdef fastattn_select_args args
    cdef fastattn_status status
    cdef engine_settings found
    cdef np.ndarray q = call.q, k = call.k, indices = call.indices, array
    memset(&args, 0, sizeof(args))
    args.size = sizeof(args)
    args.batch, args.num_heads, args.q_len, args.head_dim = q.shape[0], q.shape[1], q.shape[2], q.shape[3]
    args.num_kv_heads, args.kv_len = k.shape[1], k.shape[2]
    args.q_dtype, args.k_dtype = dtype_code(q), dtype_code(k)
    args.q, args.k = np.PyArray_DATA(q), np.PyArray_DATA(k)
    copy_strides(args.q_strides, q, 3)
    copy_strides(args.k_strides, k, 3)
    if call.weights is not None:
        array = call.weights
        args.weights = <const float *>np.PyArray_DATA(array)
        copy_strides(args.weights_strides, array, 3)
    args.rectified, args.causal = call.rectified, call.causal
    array = call.query_offset
    args.query_offset = <const int64_t *>np.PyArray_DATA(array)
    array = call.kv_lengths
    args.kv_lengths = <const int64_t *>np.PyArray_DATA(array)
    if call.block_table is not None:
        array = call.block_table
        args.block_table = <const int32_t *>np.PyArray_DATA(array)
        args.block_table_stride = array.strides[0]
        args.num_pages, args.page_size = k.shape[0], k.shape[2]
        args.kv_len = args.page_size * array.shape[1]
    args.num_keys, args.block_size = indices.shape[3], call.block
    args.keep_first, args.keep_recent = call.keep_first, call.keep_recent
    args.indices = <int32_t *>np.PyArray_DATA(indices)
    copy_strides(args.indices_strides, indices, 3)
    find_settings(&found)
    args.isa, args.num_threads, args.threading = found.isa, found.num_threads, found.threading
    with nogil:
        status = fastattn_select_keys(&args)
    return <int>status


cdef fastattn_status turn(fastattn_rope_args *args, np.ndarray x, np.ndarray cos, np.ndarray sin, np.ndarray out, engine_settings *found):
    """Turn the rows of `x`, of rank 4, by the angles of tables whose strides `args` holds."""
    args.size = sizeof(args[0])
    args.batch, args.num_heads, args.length, args.head_dim = x.shape[0], x.shape[1], x.shape[2], x.shape[3]
    args.rotary_dim = 2 * cos.shape[np.PyArray_NDIM(cos) - 1]
    args.dtype = dtype_code(x)
    args.x = np.PyArray_DATA(x)
    args.out = np.PyArray_DATA(out)
    args.cos = <const float *>np.PyArray_DATA(cos)
    args.sin = <const float *>np.PyArray_DATA(sin)
    copy_strides(args.x_strides, x, 3)
    copy_strides(args.out_strides, out, 3)
    args.isa, args.num_threads, args.threading = found.isa, found.num_threads, found.threading
    with nogil:
        return fastattn_rope(args)


def apply_rope(np.ndarray x, np.ndarray cos, np.ndarray sin, np.ndarray out, interleaved):
    """Fill `out` with the rows of `x` turned by the angles of the tables, all of rank 4; the status."""
    cdef fastattn_rope_args args
    cdef engine_settings found
    memset(&args, 0, sizeof(args))
    copy_strides(args.cos_strides, cos, 3)
    copy_strides(args.sin_strides, sin, 3)
    args.interleaved = interleaved
    find_settings(&found)
    return <int>turn(&args, x, cos, sin, out, &found)


cdef inline float *floats_of(array) except? NULL:
    """Where the numbers of a float32 array are; null for None."""
    return NULL if array is None else <float *>np.PyArray_DATA(<np.ndarray?>array)


POINTWISE = ("gelu", "gelu_tanh", "silu", "relu")  # as the library numbers them


def normalize(np.ndarray x, add, add_bias, total, weight, bias, np.ndarray out, float eps, bint centred):
    """Fill `out`, and `total` if it is not None, with rows of rank 3, all of float32; the status."""
    cdef fastattn_norm_args args
    cdef fastattn_status status
    cdef engine_settings found
    memset(&args, 0, sizeof(args))
    args.size = sizeof(args)
    args.outer, args.inner, args.width = x.shape[0], x.shape[1], x.shape[2]
    args.x, args.add, args.sum, args.out = floats_of(x), floats_of(add), floats_of(total), floats_of(out)
    copy_strides(args.x_strides, x, 2)
    copy_strides(args.out_strides, out, 2)
    if add is not None:
        copy_strides(args.add_strides, add, 2)
    if total is not None:
        copy_strides(args.sum_strides, total, 2)
    args.add_bias, args.weight, args.bias = floats_of(add_bias), floats_of(weight), floats_of(bias)
    args.eps, args.centred = eps, centred
    find_settings(&found)
    args.isa, args.num_threads, args.threading = found.isa, found.num_threads, found.threading
    with nogil:
        status = fastattn_normalize(&args)
    return <int>status


def pointwise(np.ndarray x, bias, np.ndarray out, str kind, bint gated):
    """Fill `out` with what becomes of the rows of `x`, both of rank 2 and of float32; the status."""
    cdef fastattn_pointwise_args args
    cdef fastattn_status status
    cdef engine_settings found
    memset(&args, 0, sizeof(args))
    args.size = sizeof(args)
    args.rows, args.width = out.shape[0], out.shape[1]
    args.kind = <fastattn_pointwise_kind><int>POINTWISE.index(kind)
    args.gated = gated
    args.x, args.out, args.bias = floats_of(x), floats_of(out), floats_of(bias)
    copy_strides(&args.x_stride, x, 1)
    copy_strides(&args.out_stride, out, 1)
    find_settings(&found)
    args.isa, args.num_threads, args.threading = found.isa, found.num_threads, found.threading
    with nogil:
        status = fastattn_pointwise(&args)
    return <int>status


FEATURE_MAPS = {"identity": FASTATTN_FEATURE_IDENTITY, "elu": FASTATTN_FEATURE_ELU, "relu": FASTATTN_FEATURE_RELU}


def linear_attention(call):
    """Fill ``call.out`` and ``call.new_state`` of a ``LinearCall``; the status."""
    cdef fastattn_linear_args args
    cdef fastattn_status status
    cdef engine_settings found
    cdef np.ndarray q = call.q, k = call.k, v = call.v, array
    fastattn_linear_args_init(&args, sizeof(args))
    array = call.lengths
    args.batch, args.kv_lengths = array.shape[0], <const int64_t *>np.PyArray_DATA(array)
    args.num_q_heads, args.q_len, args.head_dim = q.shape[1], q.shape[2], q.shape[3]
    args.num_k_heads, args.num_v_heads, args.kv_len, args.v_head_dim = k.shape[1], v.shape[1], v.shape[2], v.shape[3]
    args.q_dtype, args.kv_dtype = dtype_code(q), dtype_code(k)
    args.q, args.k, args.v = np.PyArray_DATA(q), np.PyArray_DATA(k), np.PyArray_DATA(v)
    copy_strides(args.q_strides, q, 3)
    copy_strides(args.k_strides, k, 3)
    copy_strides(args.v_strides, v, 3)
    array = call.out
    args.out = np.PyArray_DATA(array)
    copy_strides(args.out_strides, array, 3)
    if call.decay is not None:
        array = call.decay
        args.decay, args.decay_dtype = np.PyArray_DATA(array), dtype_code(array)
        args.decay_rows, args.decay_log = array.ndim == 4, call.decay_log
        copy_strides(args.decay_strides, array, 3)
    if call.beta is not None:
        array = call.beta
        args.beta, args.beta_dtype = np.PyArray_DATA(array), dtype_code(array)
        copy_strides(args.beta_strides, array, 3)
    if call.state is not None:
        array = call.state
        args.state = <const float *>np.PyArray_DATA(array)
        copy_strides(args.state_strides, array, 3)
    if call.new_state is not None:
        array = call.new_state
        args.new_state = <float *>np.PyArray_DATA(array)
        copy_strides(args.new_state_strides, array, 3)
    args.scale, args.normalize, args.causal = call.scale, call.normalize, call.causal
    args.feature_map = <fastattn_feature_map><int>call.feature_map
    if call.cu_seqlens is not None:
        array = call.cu_seqlens
        args.cu_seqlens = <const int64_t *>np.PyArray_DATA(array)
    find_settings(&found)
    args.isa, args.num_threads, args.threading = found.isa, found.num_threads, found.threading
    with nogil:
        status = fastattn_linear_attention(&args, NULL, 0)
    return <int>status


include "_short_ways.pxi"
