# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False, freethreading_compatible=True
"""The door to the C library: pointers in, a call without the GIL, a status out.

Arrays arrive checked (see ``fastattn._call``), except in :func:`attention_plain`, :func:`linear_plain`, :func:`paged_plain`,
:func:`rope_plain` and :func:`store_plain`, which check for themselves. 16-bit storage is handled as memory: nothing here computes with an
element.

Nothing here needs the GIL: what threads share are the settings of the process, each a number that is read once, and numbers that all
of them would find alike.
"""

from cpython.object cimport PyTypeObject
from cpython.tuple cimport PyTuple_GET_ITEM, PyTuple_GET_SIZE
from cpython.ref cimport Py_INCREF
from cpython.contextvars cimport get_value
from cpython.pythread cimport PyThread_get_thread_ident
from libc.float cimport FLT_MAX
from libc.math cimport fabs, sqrt
from libc.stdint cimport int32_t, int64_t, uint8_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

cimport numpy as np

import numpy as np
from threading import main_thread as _main_thread

from ._settings import scoped as _scoped

np.import_array()


cdef extern from "Python.h":
    int PyErr_CheckSignals() noexcept  # -1 leaves an exception behind
    long long PyLong_AsLongLongAndOverflow(object value, int *overflow)

cdef extern from "numpy/arrayobject.h":
    bint PyArray_IS_C_CONTIGUOUS(np.ndarray array)
    np.ndarray PyArray_NewLikeArray(np.ndarray prototype, np.NPY_ORDER order, void *dtype, int subok)
    np.ndarray PyArray_NewFromDescr(
        PyTypeObject *subtype, np.dtype dtype, int rank, np.npy_intp *shape, np.npy_intp *strides, void *data, int flags, object context
    )


cdef extern from "fastattn.h" nogil:
    ctypedef enum fastattn_status:
        FASTATTN_OK
        FASTATTN_ERROR_MEMORY
        FASTATTN_ERROR_INTERRUPTED
        FASTATTN_ERROR_DECAY
        FASTATTN_ERROR_NOT_FINITE
        FASTATTN_ERROR_INDICES

    ctypedef enum fastattn_dtype:
        FASTATTN_FLOAT32
        FASTATTN_FLOAT16
        FASTATTN_BFLOAT16
        FASTATTN_FLOAT64
        FASTATTN_BOOL
        FASTATTN_INT8
        FASTATTN_INT4

    ctypedef enum fastattn_isa:
        FASTATTN_ISA_BEST

    ctypedef enum fastattn_threading:
        FASTATTN_THREADING_POOL

    ctypedef enum fastattn_precision:
        FASTATTN_PRECISION_HIGHEST
        FASTATTN_PRECISION_HIGH
        FASTATTN_PRECISION_MEDIUM

    ctypedef enum fastattn_activation:
        FASTATTN_SOFTMAX

    ctypedef void (*fastattn_score_function)(
        float *scores, int64_t keys, int64_t batch, int64_t head, int64_t query, int64_t first_key, void *context
    ) noexcept

    ctypedef struct fastattn_block_mask:
        size_t size
        int64_t block_size, num_rows, batch_stride, head_stride
        const int64_t *indptr
        const int32_t *indices
        const int32_t *partial
        const uint8_t *element_bits
        int64_t num_element_masks

    ctypedef struct fastattn_attention_args:
        size_t size
        int64_t batch, num_heads, num_kv_heads, q_len, kv_len, head_dim, v_head_dim
        fastattn_dtype q_dtype, kv_dtype
        const void *q
        const void *k
        const void *v
        void *out
        float *lse
        int64_t q_strides[3]
        int64_t k_strides[3]
        int64_t v_strides[3]
        int64_t out_strides[3]
        int64_t lse_strides[3]
        float scale, softcap
        fastattn_precision precision
        int causal
        int64_t window_left, window_right
        const int64_t *query_offset
        const int64_t *kv_lengths
        const void *mask
        fastattn_dtype mask_dtype
        int64_t mask_strides[4]
        const float *alibi_slopes
        int64_t alibi_strides[2]
        const float *sinks
        const fastattn_block_mask *block_mask
        fastattn_isa isa
        int num_threads
        fastattn_threading threading
        int (*interrupted)(void *context)
        void *interrupted_context
        const int64_t *kv_starts
        const int64_t *q_lengths
        const int64_t *cu_seqlens_q
        const int64_t *cu_seqlens_k
        fastattn_activation activation
        int power
        const float *activation_bias
        const float *additive
        int64_t additive_stride
        fastattn_score_function score_function
        void *score_context
        const int32_t *block_table
        int64_t block_table_stride, num_pages, page_size
        int invariant
        const void *indices
        int64_t indices_size
        int64_t indices_strides[3]
        int64_t num_indices
        const int32_t *segments
        int64_t segments_stride, num_segments

    ctypedef struct fastattn_plan_info:
        size_t size
        fastattn_isa isa
        const char *kernel
        int64_t tile_rows, tile_keys, splits, work_items
        int num_threads
        size_t workspace
        double visible_fraction
        fastattn_threading threading

    ctypedef struct fastattn_merge_args:
        size_t size
        int64_t num_parts, rows, v_head_dim
        const void *const *outs
        const float *const *lses
        fastattn_dtype dtype
        void *out
        float *lse
        fastattn_isa isa
        int num_threads
        fastattn_threading threading

    ctypedef struct fastattn_store_args:
        size_t size
        int64_t batch, new_len, num_heads, head_dim
        const void *from_ "from"
        fastattn_dtype from_dtype
        int64_t from_strides[3]
        void *to
        fastattn_dtype to_dtype
        int64_t num_pages, page_size
        int64_t to_strides[3]
        const int64_t *slots
        fastattn_isa isa
        int num_threads
        fastattn_threading threading
        const fastattn_store_args *also
        int rotate

    ctypedef struct fastattn_select_args:
        size_t size
        int64_t batch, num_heads, num_kv_heads, q_len, kv_len, head_dim
        fastattn_dtype q_dtype, k_dtype
        const void *q
        const void *k
        int64_t q_strides[3]
        int64_t k_strides[3]
        const float *weights
        int64_t weights_strides[3]
        int rectified, causal
        const int64_t *query_offset
        const int64_t *kv_lengths
        const int32_t *block_table
        int64_t block_table_stride, num_pages, page_size
        int64_t num_keys, block_size, keep_first, keep_recent
        int32_t *indices
        int64_t indices_strides[3]
        fastattn_isa isa
        int num_threads
        fastattn_threading threading

    ctypedef struct fastattn_rope_args:
        size_t size
        int64_t batch, num_heads, length, head_dim, rotary_dim
        fastattn_dtype dtype
        int interleaved
        const void *x
        void *out
        const float *cos
        const float *sin
        int64_t x_strides[3]
        int64_t out_strides[3]
        int64_t cos_strides[3]
        int64_t sin_strides[3]
        fastattn_isa isa
        int num_threads
        fastattn_threading threading

    ctypedef enum fastattn_feature_map:
        FASTATTN_FEATURE_IDENTITY
        FASTATTN_FEATURE_ELU
        FASTATTN_FEATURE_RELU

    ctypedef struct fastattn_linear_args:
        size_t size
        int64_t batch, num_q_heads, num_k_heads, num_v_heads, q_len, kv_len, head_dim, v_head_dim
        fastattn_dtype q_dtype, kv_dtype
        const void *q
        const void *k
        const void *v
        void *out
        int64_t q_strides[3]
        int64_t k_strides[3]
        int64_t v_strides[3]
        int64_t out_strides[3]
        const void *decay
        fastattn_dtype decay_dtype
        int decay_rows, decay_log
        int64_t decay_strides[3]
        const void *beta
        fastattn_dtype beta_dtype
        int64_t beta_strides[3]
        const float *state
        float *new_state
        int64_t state_strides[3]
        int64_t new_state_strides[3]
        float scale
        fastattn_feature_map feature_map
        int normalize, causal
        const int64_t *kv_lengths
        const int64_t *cu_seqlens
        fastattn_isa isa
        int num_threads
        fastattn_threading threading

    const char *fastattn_status_string(fastattn_status status)
    const char *fastattn_isa_name(fastattn_isa isa)
    int fastattn_isa_available(fastattn_isa isa)
    int fastattn_has_openmp()
    const char *fastattn_threading_name(fastattn_threading threading)
    const char *fastattn_version()
    fastattn_status fastattn_attention_args_init(fastattn_attention_args *args, size_t size)
    fastattn_status fastattn_attention(const fastattn_attention_args *args, void *workspace, size_t workspace_size)
    fastattn_status fastattn_explain(const fastattn_attention_args *args, fastattn_plan_info *info)
    fastattn_status fastattn_store(const fastattn_store_args *args)
    fastattn_status fastattn_merge(const fastattn_merge_args *args)
    fastattn_status fastattn_select_keys(const fastattn_select_args *args)
    fastattn_status fastattn_rope(const fastattn_rope_args *args)
    fastattn_status fastattn_linear_args_init(fastattn_linear_args *args, size_t size)
    fastattn_status fastattn_linear_attention(const fastattn_linear_args *args, void *workspace, size_t workspace_size)


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
    args.q_dtype, args.kv_dtype = dtype_code(q), dtype_code(k)
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


FEATURE_MAPS = {"identity": FASTATTN_FEATURE_IDENTITY, "elu": FASTATTN_FEATURE_ELU, "relu": FASTATTN_FEATURE_RELU}

# The short way into the engine: ordinary arguments, checked without a Python object being made. Whatever is not ordinary, errors
# included, is left to ``fastattn._call``, whose messages have one source.


cdef enum:
    MOST_ENTRIES = 64  # of a batch with lengths or offsets, which are copied: nobody can change them while a kernel runs

cdef int64_t MOST_OFFSET = 1 << 56  # as in fastattn._check


cdef inline bint lies_well(array) noexcept:
    """Whether `array` is an ndarray proper whose numbers can be read as they lie."""
    return np.PyArray_CheckExact(array) and np.PyArray_ISALIGNED(<np.ndarray>array) and np.PyArray_ISNOTSWAPPED(<np.ndarray>array)


cdef inline bint is_plain(array, int type_num) noexcept:
    """The same for one of rank 4, of this dtype, contiguous along its last axis."""
    cdef np.ndarray a
    if not lies_well(array):
        return False
    a = array
    return (
        np.PyArray_NDIM(a) == 4
        and np.PyArray_TYPE(a) == type_num
        and (a.strides[3] == np.PyArray_ITEMSIZE(a) or a.shape[3] <= 1)
    )


cdef inline bint take_number(value, double *number) noexcept:
    """A float that is finite in float32."""
    if type(value) is not float or not fabs(<double>value) <= FLT_MAX:
        return False
    number[0] = value
    return True


cdef inline bint take_int(value, int64_t low, int64_t high, int64_t *number) noexcept:
    cdef int overflow = 0
    if type(value) is not int:
        return False
    number[0] = PyLong_AsLongLongAndOverflow(value, &overflow)
    return overflow == 0 and low <= number[0] <= high


cdef bint take_ints(value, int64_t batch, int64_t low, int64_t high, int64_t *table) noexcept:
    """An int, or one for each batch entry."""
    cdef np.ndarray array
    cdef int64_t b, number
    cdef const char *at
    if batch > MOST_ENTRIES:
        return False
    if type(value) is int:
        if not take_int(value, low, high, &number):
            return False
        for b in range(batch):
            table[b] = number
        return True
    if not lies_well(value):
        return False
    array = value
    if np.PyArray_NDIM(array) != 1 or array.shape[0] != batch:
        return False
    if np.PyArray_TYPE(array) != np.NPY_INT64 and np.PyArray_TYPE(array) != np.NPY_INT32:
        return False
    at = <const char *>np.PyArray_DATA(array)
    for b in range(batch):
        table[b] = (<const int64_t *>at)[0] if np.PyArray_ITEMSIZE(array) == 8 else (<const int32_t *>at)[0]
        if not low <= table[b] <= high:
            return False
        at += array.strides[0]
    return True


cdef bint take_window(window, fastattn_attention_args *args) noexcept:
    if type(window) is not tuple or PyTuple_GET_SIZE(window) != 2:
        return False
    left, right = <object>PyTuple_GET_ITEM(window, 0), <object>PyTuple_GET_ITEM(window, 1)
    return (left is None or take_int(left, -1, 2 * MOST_OFFSET, &args.window_left)) and (
        right is None or take_int(right, -1, 2 * MOST_OFFSET, &args.window_right)
    )


cdef bint take_table(value, int type_num, int64_t *shape, int64_t *strides, int axes) noexcept:
    """An array of this dtype that broadcasts to a shape, and its strides there."""
    cdef np.ndarray array
    cdef int axis, own
    if not lies_well(value):
        return False
    array = value
    if np.PyArray_TYPE(array) != type_num or np.PyArray_NDIM(array) > axes:
        return False
    for axis in range(axes):
        own = axis - axes + np.PyArray_NDIM(array)
        if own < 0 or (array.shape[own] == 1 and shape[axis] != 1):
            strides[axis] = 0
        elif array.shape[own] == shape[axis]:
            strides[axis] = array.strides[own]
        else:
            return False
    return True


cdef inline bint is_mask_type(int type_num) noexcept:
    return (
        type_num == np.NPY_BOOL
        or type_num == np.NPY_FLOAT32
        or type_num == np.NPY_FLOAT16
        or type_num == np.NPY_FLOAT64
        or type_num == bfloat16_type
    )


cdef void extent(np.ndarray array, const char **low, const char **high) noexcept:
    """The addresses between which an array that has elements lies."""
    cdef int axis
    low[0] = high[0] = <const char *>np.PyArray_DATA(array)
    high[0] += np.PyArray_ITEMSIZE(array)
    for axis in range(np.PyArray_NDIM(array)):
        if array.strides[axis] < 0:
            low[0] += (array.shape[axis] - 1) * array.strides[axis]
        else:
            high[0] += (array.shape[axis] - 1) * array.strides[axis]


cdef bint are_apart(np.ndarray a, b) noexcept:
    """Whether two arrays lie apart; b may be None."""
    cdef const char *ends[4]
    if b is None:
        return True
    if np.PyArray_SIZE(a) == 0 or np.PyArray_SIZE(<np.ndarray>b) == 0:
        return True
    extent(a, &ends[0], &ends[1])
    extent(b, &ends[2], &ends[3])
    return ends[1] <= ends[2] or ends[3] <= ends[0]


cdef bint are_operands(q, k, v, int *type_num) noexcept:
    """Whether these are plain arrays of dtypes that go together; that of `q`."""
    cdef int kv_type_num
    if not (np.PyArray_CheckExact(q) and np.PyArray_CheckExact(k)):
        return False
    type_num[0], kv_type_num = np.PyArray_TYPE(<np.ndarray>q), np.PyArray_TYPE(<np.ndarray>k)
    if kv_type_num != np.NPY_FLOAT32 and kv_type_num != np.NPY_FLOAT16 and kv_type_num != bfloat16_type:
        return False
    if type_num[0] != kv_type_num and type_num[0] != np.NPY_FLOAT32:
        return False
    return is_plain(q, type_num[0]) and is_plain(k, kv_type_num) and is_plain(v, kv_type_num)


def attention_plain(
    q, k, v, mask=None, causal=False, window=None, query_offset=None, kv_lengths=None, kv_starts=None, q_lengths=None, scale=None,
    softcap=None, alibi_slopes=None, sinks=None, precision="highest", activation=SOFTMAX, activation_bias=None, power=3, score_function=None,
    invariant=False, return_lse=False, out=None, **others,
):  # fmt: skip
    """What ``fastattn.attention`` returns for ordinary arguments, or None where any of them, or another, is out of the ordinary."""
    cdef fastattn_attention_args args
    cdef fastattn_status status
    cdef np.ndarray q_array, k_array, v_array, out_array, lse
    cdef np.npy_intp shape[4]
    cdef int64_t scores[4]
    cdef int64_t lengths[MOST_ENTRIES]
    cdef int64_t starts[MOST_ENTRIES]
    cdef int64_t rows[MOST_ENTRIES]
    cdef int64_t offsets[MOST_ENTRIES]
    cdef int type_num, axis
    cdef double factor = 0, cap = 0

    if not are_operands(q, k, v, &type_num):
        return None
    if others or activation is not SOFTMAX or activation_bias is not None or score_function is not None:
        return None
    if type(power) is not int or power != 3:
        return None
    q_array, k_array, v_array = q, k, v
    for axis in range(3):
        shape[axis] = scores[axis] = q_array.shape[axis]
        if k_array.shape[axis] != v_array.shape[axis]:
            return None
    shape[3], scores[3] = v_array.shape[3], k_array.shape[2]
    if (
        k_array.shape[0] != shape[0]
        or k_array.shape[3] != q_array.shape[3]
        or k_array.shape[1] == 0
        or shape[1] % k_array.shape[1]
        or q_array.shape[3] == 0
    ):
        return None

    fastattn_attention_args_init(&args, sizeof(args))
    if scale is None:
        factor = 1.0 / sqrt(<double>q_array.shape[3])
    elif not take_number(scale, &factor):
        return None
    if softcap is not None and not take_number(softcap, &cap):
        return None
    if (causal is not True and causal is not False) or (return_lse is not True and return_lse is not False):
        return None
    if invariant is not True and invariant is not False:
        return None
    args.invariant = invariant is True
    if window is not None and not take_window(window, &args):
        return None
    if kv_lengths is not None:
        if not take_ints(kv_lengths, shape[0], 0, scores[3], lengths):
            return None
        args.kv_lengths = lengths
    if kv_starts is not None:
        if not take_ints(kv_starts, shape[0], 0, scores[3], starts):
            return None
        args.kv_starts = starts
    if q_lengths is not None:
        if not take_ints(q_lengths, shape[0], 0, shape[2], rows):
            return None
        args.q_lengths = rows
    if query_offset is not None:
        if not take_ints(query_offset, shape[0], -MOST_OFFSET, MOST_OFFSET, offsets):
            return None
        args.query_offset = offsets
    if mask is not None:
        if not np.PyArray_CheckExact(mask) or not is_mask_type(np.PyArray_TYPE(<np.ndarray>mask)):
            return None
        if not take_table(mask, np.PyArray_TYPE(<np.ndarray>mask), scores, args.mask_strides, 4):
            return None
        args.mask, args.mask_dtype = np.PyArray_DATA(<np.ndarray>mask), dtype_code(mask)
    if alibi_slopes is not None:
        if not take_table(alibi_slopes, np.NPY_FLOAT32, scores, args.alibi_strides, 2):
            return None
        axis = np.PyArray_NDIM(<np.ndarray>alibi_slopes)
        if axis == 0 or np.PyArray_SIZE(<np.ndarray>alibi_slopes) != (shape[1] if axis == 1 else shape[0] * shape[1]):
            return None
        args.alibi_slopes = <const float *>np.PyArray_DATA(<np.ndarray>alibi_slopes)
    if sinks is not None:
        if not lies_well(sinks) or np.PyArray_TYPE(<np.ndarray>sinks) != np.NPY_FLOAT32 or np.PyArray_NDIM(<np.ndarray>sinks) != 1:
            return None
        if (<np.ndarray>sinks).shape[0] != shape[1] or not PyArray_IS_C_CONTIGUOUS(<np.ndarray>sinks):
            return None
        args.sinks = <const float *>np.PyArray_DATA(<np.ndarray>sinks)
    if precision is not HIGHEST:
        if type(precision) is not str or precision not in PRECISIONS:
            return None
        args.precision = <fastattn_precision><int>PRECISIONS[precision]

    if out is None:
        out_array = np.PyArray_EMPTY(4, shape, type_num, 0)
    else:
        if not is_plain(out, type_num) or not np.PyArray_ISWRITEABLE(<np.ndarray>out):
            return None
        out_array = out
        for axis in range(4):
            if out_array.shape[axis] != shape[axis]:
                return None
        for array in (q, k, v, mask, alibi_slopes, sinks):
            if not are_apart(out_array, array):
                return None
    if take_arrays(&args, q_array, k_array, v_array, out_array):
        return None
    args.q_dtype, args.kv_dtype = dtype_code(q_array), dtype_code(k_array)
    args.scale, args.softcap = <float>factor, <float>cap
    args.causal = causal is True
    if return_lse is True:
        lse = np.PyArray_EMPTY(3, shape, np.NPY_FLOAT32, 0)
        args.lse = <float *>np.PyArray_DATA(lse)
        copy_strides(args.lse_strides, lse, 3)
    with nogil:
        status = fastattn_attention(&args, NULL, 0)
    if status == FASTATTN_ERROR_INTERRUPTED:
        raise_pending()
    if status != FASTATTN_OK:
        return None
    return (out_array, lse) if return_lse is True else out_array


def paged_plain(q, np.ndarray k, np.ndarray v, np.ndarray block_table, np.ndarray kv_lengths, causal):
    """What a pool with pages ``(n, H, rows, D)`` gives for an equal share of ordinary queries ``(L, H, D)`` to each sequence, or None.

    The pages, and the tables, int32 ``(B, most)`` and int64 ``(B,)``, are those of the pool, and nobody else has the latter."""
    cdef fastattn_attention_args args
    cdef fastattn_status status
    cdef engine_settings found
    cdef np.ndarray queries, out
    cdef np.npy_intp shape[3]
    cdef int64_t starts[MOST_ENTRIES + 1]
    cdef int64_t b, batch = block_table.shape[0]
    cdef int type_num, kv_type_num = np.PyArray_TYPE(k)
    if not lies_well(q) or np.PyArray_NDIM(<np.ndarray>q) != 3 or kv_type_num == np.NPY_VOID or (causal is not True and causal is not False):
        return None
    queries, type_num = q, np.PyArray_TYPE(<np.ndarray>q)
    if (type_num != kv_type_num and type_num != np.NPY_FLOAT32) or queries.shape[2] != k.shape[3] or queries.shape[2] == 0:
        return None
    if queries.strides[2] != np.PyArray_ITEMSIZE(queries) and queries.shape[2] > 1:
        return None
    if k.shape[1] == 0 or queries.shape[1] % k.shape[1] or batch == 0 or batch > MOST_ENTRIES or queries.shape[0] % batch:
        return None
    if find_settings(&found):
        return None
    for b in range(batch + 1):
        starts[b] = b * (queries.shape[0] // batch)
    shape[0], shape[1], shape[2] = queries.shape[0], queries.shape[1], v.shape[3]
    out = np.PyArray_EMPTY(3, shape, type_num, 0)
    fastattn_attention_args_init(&args, sizeof(args))
    args.batch, args.num_heads, args.num_kv_heads, args.q_len = batch, shape[1], k.shape[1], shape[0]
    args.head_dim, args.v_head_dim = k.shape[3], v.shape[3]
    args.q_dtype, args.kv_dtype = dtype_code(queries), dtype_code(k)
    args.q, args.k, args.v, args.out = np.PyArray_DATA(queries), np.PyArray_DATA(k), np.PyArray_DATA(v), np.PyArray_DATA(out)
    args.q_strides[1], args.q_strides[2] = queries.strides[1], queries.strides[0]
    args.out_strides[1], args.out_strides[2] = out.strides[1], out.strides[0]
    copy_strides(args.k_strides, k, 3)
    copy_strides(args.v_strides, v, 3)
    args.scale, args.causal = <float>(1.0 / sqrt(<double>k.shape[3])), causal is True
    args.cu_seqlens_q, args.kv_lengths = starts, <const int64_t *>np.PyArray_DATA(kv_lengths)
    args.block_table, args.block_table_stride = <const int32_t *>np.PyArray_DATA(block_table), block_table.strides[0]
    args.num_pages, args.page_size = k.shape[0], k.shape[2]
    args.kv_len = k.shape[2] * block_table.shape[1]
    args.isa, args.num_threads, args.threading = found.isa, found.num_threads, found.threading
    if PyThread_get_thread_ident() == main_thread:
        args.interrupted = interrupted
    with nogil:
        status = fastattn_attention(&args, NULL, 0)
    if status == FASTATTN_ERROR_INTERRUPTED:
        raise_pending()
    return out if status == FASTATTN_OK else None


def merge_states(outs, lses, np.ndarray out, np.ndarray lse):
    """Fill `out` and `lse` from the parts; the status."""
    cdef int64_t n, parts = len(outs)
    cdef fastattn_merge_args args
    cdef fastattn_status status
    cdef engine_settings found
    memset(&args, 0, sizeof(args))
    args.size = sizeof(args)
    args.num_parts, args.rows, args.v_head_dim = parts, out.shape[0], out.shape[1]
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


cdef bint take_rows(fastattn_store_args *args, rows, np.ndarray cache, int axes, const int64_t *slots, int64_t count) noexcept:
    """As many rows ``(B, H, L, D)``, or of three axes ``(L, H, D)``, as there are slots, of numbers for a cache ``(n, H, rows, D)`` of numbers."""
    cdef np.ndarray array
    cdef int type_num, length = 2 if axes == 4 else 0
    if not lies_well(rows) or np.PyArray_NDIM(<np.ndarray>rows) != axes or np.PyArray_TYPE(cache) == np.NPY_VOID:
        return False
    array = rows
    type_num = np.PyArray_TYPE(array)
    if type_num != np.NPY_FLOAT32 and type_num != np.NPY_FLOAT16 and type_num != bfloat16_type:
        return False
    if array.shape[1] != cache.shape[1] or array.shape[axes - 1] != cache.shape[3]:
        return False
    if array.strides[axes - 1] != np.PyArray_ITEMSIZE(array) and array.shape[axes - 1] > 1:
        return False
    if axes == 4 and array.shape[0] != cache.shape[0]:
        return False
    args.size = sizeof(fastattn_store_args)
    args.batch, args.new_len = array.shape[0] if axes == 4 else 1, array.shape[length]
    if args.batch * args.new_len != count:
        return False
    args.num_heads, args.head_dim = array.shape[1], cache.shape[3]
    args.from_, args.from_dtype = np.PyArray_DATA(array), dtype_code(array)
    args.from_strides[0], args.from_strides[1], args.from_strides[2] = array.strides[0], array.strides[length], array.strides[1]
    args.to, args.to_dtype = np.PyArray_DATA(cache), dtype_code(cache)
    args.num_pages, args.page_size = cache.shape[0], cache.shape[2]
    args.to_strides[0], args.to_strides[1], args.to_strides[2] = cache.strides[0], cache.strides[2], cache.strides[1]
    args.slots = slots
    return True


def store_plain(k, v, np.ndarray k_cache, np.ndarray v_cache, int axes, list slots):
    """Store a few ordinary rows, in the order of `slots`, into caches ``(n, H, rows, D)``; False, with nothing done, if anything is not."""
    cdef fastattn_store_args args[2]
    cdef int64_t places[MOST_ENTRIES]
    cdef engine_settings found
    cdef int64_t n, count = len(slots)
    cdef fastattn_status status
    if count > MOST_ENTRIES or find_settings(&found):
        return False
    for n in range(count):
        places[n] = slots[n]
    memset(args, 0, sizeof(args))
    if not take_rows(&args[0], k, k_cache, axes, places, count) or not take_rows(&args[1], v, v_cache, axes, places, count):
        return False
    for n in range(2):
        args[n].isa, args[n].num_threads, args[n].threading = found.isa, found.num_threads, found.threading
    args[0].also = &args[1]
    with nogil:
        status = fastattn_store(args)
    return status == FASTATTN_OK


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


cdef bint take_angles(table, np.ndarray x, int64_t *strides) noexcept:
    """A float32 table ``(L, pairs)``, ``(B, L, pairs)`` or as `x`: its strides for the rows of `x`."""
    cdef np.ndarray array
    cdef int axis, axes, own
    if not lies_well(table):
        return False
    array = table
    axes = np.PyArray_NDIM(array)
    if np.PyArray_TYPE(array) != np.NPY_FLOAT32 or not 2 <= axes <= 4:
        return False
    if array.strides[axes - 1] != 4 and array.shape[axes - 1] > 1:
        return False
    for axis in range(3):
        own = -axis if axes == 3 and axis < 2 else axis - 4 + axes  # (B, L) leaves heads out
        if own < 0 or (array.shape[own] == 1 and x.shape[axis] != 1):
            strides[axis] = 0
        elif array.shape[own] == x.shape[axis]:
            strides[axis] = array.strides[own]
        else:
            return False
    return True


def rope_plain(x, cos, sin, interleaved=False, rotary_dim=None, out=None):
    """What ``fastattn.apply_rope`` returns for ordinary arguments, or None where any of them is out of the ordinary."""
    cdef fastattn_rope_args args
    cdef engine_settings found
    cdef np.ndarray x_array, out_array
    cdef np.npy_intp pairs
    cdef int type_num
    if not np.PyArray_CheckExact(x):
        return None
    x_array, type_num = x, np.PyArray_TYPE(<np.ndarray>x)
    if type_num != np.NPY_FLOAT32 and type_num != np.NPY_FLOAT16 and type_num != bfloat16_type:
        return None
    memset(&args, 0, sizeof(args))
    if not is_plain(x, type_num) or not take_angles(cos, x_array, args.cos_strides) or not take_angles(sin, x_array, args.sin_strides):
        return None
    pairs = (<np.ndarray>cos).shape[np.PyArray_NDIM(<np.ndarray>cos) - 1]
    if (<np.ndarray>sin).shape[np.PyArray_NDIM(<np.ndarray>sin) - 1] != pairs or 2 * pairs > x_array.shape[3]:
        return None
    if rotary_dim is not None and (type(rotary_dim) is not int or rotary_dim != 2 * pairs):
        return None
    if interleaved is not True and interleaved is not False:
        return None
    args.interleaved = interleaved is True
    if out is None:
        out_array = PyArray_NewLikeArray(x_array, np.NPY_KEEPORDER, NULL, 0)
        if not is_plain(out_array, type_num):
            return None
    else:
        if not is_plain(out, type_num) or not np.PyArray_ISWRITEABLE(<np.ndarray>out) or not has_shape(out, x_array.shape):
            return None
        out_array = out
        if not are_apart(out_array, cos) or not are_apart(out_array, sin):
            return None
        if not lie_alike(out_array, x_array) and not are_apart(out_array, x_array):
            return None
    if find_settings(&found) or turn(&args, x_array, cos, sin, out_array, &found) != FASTATTN_OK:
        return None
    return out_array


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


cdef bint take_gates(value, int64_t *shape, int64_t *strides, const void **at, fastattn_dtype *dtype, int *rows) noexcept:
    """Numbers (B, H, L), or where `rows` is not NULL (B, H, L, Dk) too, which broadcast to a shape along the first three axes."""
    cdef int64_t all_strides[4]
    cdef np.ndarray array
    cdef int type_num, axis, axes
    if not lies_well(value):
        return False
    array = value
    type_num, axes = np.PyArray_TYPE(array), np.PyArray_NDIM(array)
    if type_num != np.NPY_FLOAT32 and type_num != np.NPY_FLOAT16 and type_num != bfloat16_type:
        return False
    if axes == 4 and (rows is NULL or not is_plain(value, type_num) or array.shape[3] != shape[3] or shape[3] <= 1):
        return False
    if axes < 3 or axes > 4 or not take_table(value, type_num, shape, all_strides, axes):
        return False
    for axis in range(3):
        strides[axis] = all_strides[axis]
    at[0], dtype[0] = np.PyArray_DATA(array), dtype_code(array)
    if rows is not NULL:
        rows[0] = axes == 4
    return True


cdef bint lie_alike(np.ndarray a, np.ndarray b) noexcept:
    """Whether two arrays of the same shape are one in memory."""
    cdef int axis
    for axis in range(np.PyArray_NDIM(a)):
        if a.strides[axis] != b.strides[axis]:
            return False
    return np.PyArray_DATA(a) == np.PyArray_DATA(b)


cdef bint has_shape(array, np.npy_intp *shape) noexcept:
    cdef int axis
    for axis in range(4):
        if (<np.ndarray>array).shape[axis] != shape[axis]:
            return False
    return True


def linear_plain(
    q, k, v, beta=None, decay=None, log_decay=None, default_scale=None, scale=None, feature_map="identity", causal=True, normalize=False,
    state=None, return_state=False, kv_lengths=None, cu_seqlens=None, out=None, state_out=None,
):  # fmt: skip
    """What the linear family returns for ordinary arguments, or None where any of them is out of the ordinary."""
    cdef fastattn_linear_args args
    cdef fastattn_status status
    cdef engine_settings found
    cdef np.ndarray q_array, k_array, v_array, out_array
    cdef np.npy_intp shape[4]
    cdef np.npy_intp state_shape[4]
    cdef int64_t tokens[4]
    cdef int type_num
    cdef int64_t states, heads
    cdef double factor = 0
    gates = decay if log_decay is None else log_decay

    if kv_lengths is not None or cu_seqlens is not None or not are_operands(q, k, v, &type_num):
        return None
    if causal is not True:
        return None
    if (normalize is not True and normalize is not False) or (return_state is not True and return_state is not False):
        return None
    q_array, k_array, v_array = q, k, v
    states = max(k_array.shape[1], v_array.shape[1])
    heads = max(q_array.shape[1], states)
    if k_array.shape[1] == 0 or v_array.shape[1] == 0 or q_array.shape[1] == 0:
        return None
    if states % k_array.shape[1] or states % v_array.shape[1] or heads % states or heads % q_array.shape[1]:
        return None
    if k_array.shape[0] != q_array.shape[0] or v_array.shape[0] != q_array.shape[0] or k_array.shape[3] != q_array.shape[3]:
        return None
    if k_array.shape[2] != q_array.shape[2] or v_array.shape[2] != q_array.shape[2]:
        return None
    shape[0], shape[1], shape[2], shape[3] = q_array.shape[0], heads, q_array.shape[2], v_array.shape[3]
    tokens[0], tokens[1], tokens[2], tokens[3] = shape[0], states, shape[2], k_array.shape[3]
    state_shape[0], state_shape[1], state_shape[2], state_shape[3] = shape[0], states, tokens[3], shape[3] + (normalize is True)

    fastattn_linear_args_init(&args, sizeof(args))
    if type(feature_map) is not str or feature_map not in FEATURE_MAPS:
        return None
    args.feature_map = <fastattn_feature_map><int>FEATURE_MAPS[feature_map]
    if scale is None:
        factor = 1.0 / sqrt(<double>max(tokens[3], 1)) if default_scale is None else default_scale
    elif not take_number(scale, &factor):
        return None
    if gates is not None:
        if not take_gates(gates, tokens, args.decay_strides, &args.decay, &args.decay_dtype, &args.decay_rows):
            return None
        args.decay_log = log_decay is not None
    if beta is not None and not take_gates(beta, tokens, args.beta_strides, &args.beta, &args.beta_dtype, NULL):
        return None
    if state is not None:
        if not np.PyArray_CheckExact(state) or not is_plain(state, np.NPY_FLOAT32) or not has_shape(state, state_shape):
            return None
        args.state = <const float *>np.PyArray_DATA(<np.ndarray>state)
        copy_strides(args.state_strides, state, 3)
    new_state = state_out
    if state_out is not None:
        if not is_plain(state_out, np.NPY_FLOAT32) or not has_shape(state_out, state_shape):
            return None
        if not np.PyArray_ISWRITEABLE(<np.ndarray>state_out):
            return None
        for array in (q, k, v, beta, gates):
            if not are_apart(state_out, array):
                return None
        if state is not None and not lie_alike(state_out, state) and not are_apart(state_out, state):
            return None
    elif return_state is True:
        new_state = np.PyArray_EMPTY(4, state_shape, np.NPY_FLOAT32, 0)
    if new_state is not None:
        args.new_state = <float *>np.PyArray_DATA(<np.ndarray>new_state)
        copy_strides(args.new_state_strides, new_state, 3)
    if out is None:
        out_array = np.PyArray_EMPTY(4, shape, type_num, 0)
    else:
        if not is_plain(out, type_num) or not np.PyArray_ISWRITEABLE(<np.ndarray>out) or not has_shape(out, shape):
            return None
        out_array = out
        for array in (q, k, v, beta, gates, state, state_out):
            if not are_apart(out_array, array):
                return None

    if find_settings(&found):
        return None
    args.batch, args.num_q_heads, args.num_k_heads, args.num_v_heads = shape[0], q_array.shape[1], k_array.shape[1], v_array.shape[1]
    args.q_len = args.kv_len = shape[2]
    args.head_dim, args.v_head_dim = tokens[3], shape[3]
    args.q_dtype, args.kv_dtype = dtype_code(q_array), dtype_code(k_array)
    args.q, args.k, args.v, args.out = (
        np.PyArray_DATA(q_array), np.PyArray_DATA(k_array), np.PyArray_DATA(v_array), np.PyArray_DATA(out_array)
    )  # fmt: skip
    copy_strides(args.q_strides, q_array, 3)
    copy_strides(args.k_strides, k_array, 3)
    copy_strides(args.v_strides, v_array, 3)
    copy_strides(args.out_strides, out_array, 3)
    args.scale, args.normalize, args.causal = <float>factor, normalize is True, True
    args.isa, args.num_threads, args.threading = found.isa, found.num_threads, found.threading
    with nogil:
        status = fastattn_linear_attention(&args, NULL, 0)
    if status != FASTATTN_OK:
        return None
    return (out_array, new_state) if return_state is True else out_array
