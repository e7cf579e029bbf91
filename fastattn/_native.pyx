# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The door to the C library: pointers in, a call without the GIL, a status out.

Arrays arrive checked (see ``fastattn._check``), except in :func:`attention_plain`, which checks for itself. 16-bit storage is handled as
memory: nothing here computes with an element.
"""

from cpython.object cimport PyTypeObject
from cpython.ref cimport Py_INCREF
from libc.float cimport FLT_MAX
from libc.math cimport fabs, sqrt
from libc.stdint cimport int32_t, int64_t, uint8_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

cimport numpy as np

np.import_array()


cdef extern from "numpy/arrayobject.h":
    np.ndarray PyArray_NewFromDescr(
        PyTypeObject *subtype, np.dtype dtype, int rank, np.npy_intp *shape, np.npy_intp *strides, void *data, int flags, object context
    )


cdef extern from "fastattn.h" nogil:
    ctypedef enum fastattn_status:
        FASTATTN_OK
        FASTATTN_ERROR_MEMORY

    ctypedef enum fastattn_dtype:
        FASTATTN_FLOAT32
        FASTATTN_FLOAT16
        FASTATTN_BFLOAT16
        FASTATTN_FLOAT64
        FASTATTN_BOOL

    ctypedef enum fastattn_isa:
        FASTATTN_ISA_BEST

    ctypedef enum fastattn_precision:
        FASTATTN_PRECISION_HIGHEST
        FASTATTN_PRECISION_HIGH
        FASTATTN_PRECISION_MEDIUM

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

    ctypedef struct fastattn_plan_info:
        size_t size
        fastattn_isa isa
        const char *kernel
        int64_t tile_rows, tile_keys, splits, work_items
        int num_threads
        size_t workspace
        double visible_fraction

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

    const char *fastattn_status_string(fastattn_status status)
    const char *fastattn_isa_name(fastattn_isa isa)
    int fastattn_isa_available(fastattn_isa isa)
    int fastattn_has_openmp()
    const char *fastattn_version()
    fastattn_status fastattn_attention_args_init(fastattn_attention_args *args, size_t size)
    fastattn_status fastattn_attention(const fastattn_attention_args *args, void *workspace, size_t workspace_size)
    fastattn_status fastattn_explain(const fastattn_attention_args *args, fastattn_plan_info *info)
    fastattn_status fastattn_store(const fastattn_store_args *args)
    fastattn_status fastattn_merge_states(int64_t num_parts, const void *const *outs, const float *const *lses, int64_t rows,
                                          int64_t v_head_dim, fastattn_dtype dtype, void *out, float *lse)
    fastattn_status fastattn_rope(const fastattn_rope_args *args)


OK = FASTATTN_OK
ERROR_MEMORY = FASTATTN_ERROR_MEMORY

cdef dict PRECISIONS = {
    "highest": FASTATTN_PRECISION_HIGHEST,
    "high": FASTATTN_PRECISION_HIGH,
    "medium": FASTATTN_PRECISION_MEDIUM,
}

cdef int num_threads = 1
cdef fastattn_isa isa_limit = FASTATTN_ISA_BEST
cdef int bfloat16_type = -1  # the number NumPy gave to ml_dtypes.bfloat16, once such an array has been seen


def set_num_threads(int n):
    global num_threads
    num_threads = n


def set_isa(int code):
    global isa_limit
    isa_limit = <fastattn_isa>code


def get_isa():
    return <int>isa_limit


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
    """The library's name for a dtype that has been found to be one of its five."""
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
    bfloat16_type = type_num
    return FASTATTN_BFLOAT16


cdef inline void copy_strides(int64_t *strides, np.ndarray array, int count) noexcept:
    cdef int axis
    for axis in range(count):
        strides[axis] = np.PyArray_STRIDES(array)[axis]


cdef void take_arrays(fastattn_attention_args *args, np.ndarray q, np.ndarray k, np.ndarray v, np.ndarray out) noexcept:
    """Initialise `args` and fill in what every call has."""
    fastattn_attention_args_init(args, sizeof(fastattn_attention_args))
    args.batch, args.num_heads, args.q_len, args.head_dim = q.shape[0], q.shape[1], q.shape[2], q.shape[3]
    args.num_kv_heads, args.kv_len, args.v_head_dim = v.shape[1], v.shape[2], v.shape[3]
    args.q = np.PyArray_DATA(q)
    args.k = np.PyArray_DATA(k)
    args.v = np.PyArray_DATA(v)
    args.out = np.PyArray_DATA(out)
    copy_strides(args.q_strides, q, 3)
    copy_strides(args.k_strides, k, 3)
    copy_strides(args.v_strides, v, 3)
    copy_strides(args.out_strides, out, 3)
    args.isa = isa_limit
    args.num_threads = num_threads


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


cdef take_call(fastattn_attention_args *args, fastattn_block_mask *block_mask, call):
    """Fill `args`, and `block_mask` if there is one, from a ``Call``, which keeps the arrays alive."""
    cdef np.ndarray q = call.q, k = call.k, array
    take_arrays(args, q, k, call.v, call.out)
    args.q_dtype, args.kv_dtype = dtype_code(q), dtype_code(k)
    if call.lse is not None:
        array = call.lse
        args.lse = <float *>np.PyArray_DATA(array)
        copy_strides(args.lse_strides, array, 3)
    args.scale, args.softcap = call.scale, call.softcap
    args.precision = <fastattn_precision><int>PRECISIONS[call.precision]
    args.causal = call.causal
    args.window_left, args.window_right = call.window
    array = call.query_offset
    args.query_offset = <const int64_t *>np.PyArray_DATA(array)
    array = call.kv_lengths
    args.kv_lengths = <const int64_t *>np.PyArray_DATA(array)
    if call.mask is not None:
        array = call.mask
        args.mask = np.PyArray_DATA(array)
        args.mask_dtype = dtype_code(array)
        copy_strides(args.mask_strides, array, 4)
    if call.alibi_slopes is not None:
        array = call.alibi_slopes
        args.alibi_slopes = <const float *>np.PyArray_DATA(array)
        copy_strides(args.alibi_strides, array, 2)
    if call.sinks is not None:
        array = call.sinks
        args.sinks = <const float *>np.PyArray_DATA(array)
    if call.block_mask is not None:
        take_block_mask(block_mask, call.block_mask)
        args.block_mask = block_mask


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
    take_call(&args, &block_mask, call)
    with nogil:
        status = fastattn_attention(&args, NULL, 0)
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
        "workspace_bytes": info.workspace,
        "visible_fraction": info.visible_fraction,
    }


cdef inline bint is_plain(array, int type_num) noexcept:
    """Whether `array` is an ndarray that the library can read as it lies, of rank 4 and of this dtype."""
    cdef np.ndarray a
    if not np.PyArray_CheckExact(array):
        return False
    a = array
    return (
        np.PyArray_NDIM(a) == 4
        and np.PyArray_TYPE(a) == type_num
        and np.PyArray_ISALIGNED(a)
        and np.PyArray_ISNOTSWAPPED(a)
        and (a.strides[3] == np.PyArray_ITEMSIZE(a) or a.shape[3] == 1)
    )


def attention_plain(q, k, v, causal, scale):
    """`out` of a call that needs nothing but these arguments, or None when anything about them is out of the ordinary."""
    cdef fastattn_attention_args args
    cdef fastattn_status status
    cdef np.ndarray q_array, k_array, v_array, out
    cdef np.npy_intp shape[4]
    cdef int type_num, axis
    cdef double factor

    if not np.PyArray_CheckExact(q):
        return None
    type_num = np.PyArray_TYPE(<np.ndarray>q)
    if type_num != np.NPY_FLOAT32 and type_num != np.NPY_FLOAT16 and type_num != bfloat16_type:
        return None
    if not (is_plain(q, type_num) and is_plain(k, type_num) and is_plain(v, type_num)):
        return None
    q_array, k_array, v_array = q, k, v
    for axis in range(3):
        shape[axis] = q_array.shape[axis]
        if k_array.shape[axis] != v_array.shape[axis]:
            return None
    shape[3] = v_array.shape[3]
    if (
        k_array.shape[0] != shape[0]
        or k_array.shape[3] != q_array.shape[3]
        or k_array.shape[1] == 0
        or shape[1] % k_array.shape[1]
        or q_array.shape[3] == 0
    ):
        return None
    if scale is None:
        factor = 1.0 / sqrt(<double>q_array.shape[3])
    elif type(scale) is float and fabs(<double>scale) <= FLT_MAX:
        factor = scale
    else:
        return None
    if causal is not True and causal is not False:
        return None

    out = np.PyArray_EMPTY(4, shape, type_num, 0)
    take_arrays(&args, q_array, k_array, v_array, out)
    args.q_dtype = args.kv_dtype = dtype_code(q_array)
    args.scale = <float>factor
    args.causal = causal is True
    with nogil:
        status = fastattn_attention(&args, NULL, 0)
    return out if status == FASTATTN_OK else None


def merge_states(outs, lses, np.ndarray out, np.ndarray lse):
    """Fill `out` and `lse` from the parts; the status."""
    cdef int64_t n, parts = len(outs), rows = out.shape[0], v_head_dim = out.shape[1]
    cdef fastattn_dtype dtype = dtype_code(out)
    cdef const void **out_pointers = <const void **>malloc(2 * parts * sizeof(void *))
    cdef const float **lse_pointers = <const float **>(out_pointers + parts)
    cdef fastattn_status status
    if out_pointers is NULL:
        return <int>FASTATTN_ERROR_MEMORY
    for n in range(parts):
        out_pointers[n] = np.PyArray_DATA(<np.ndarray>outs[n])
        lse_pointers[n] = <const float *>np.PyArray_DATA(<np.ndarray>lses[n])
    with nogil:
        status = fastattn_merge_states(
            parts, out_pointers, lse_pointers, rows, v_head_dim, dtype, np.PyArray_DATA(out), <float *>np.PyArray_DATA(lse)
        )
        free(out_pointers)
    return <int>status


def store(np.ndarray rows, np.ndarray cache, np.ndarray slots):
    """Cast `rows` into `cache` at `slots`; the status."""
    cdef fastattn_store_args args
    cdef fastattn_status status
    memset(&args, 0, sizeof(args))
    args.size = sizeof(args)
    args.batch, args.new_len, args.num_heads, args.head_dim = rows.shape[0], rows.shape[1], rows.shape[2], rows.shape[3]
    args.from_ = np.PyArray_DATA(rows)
    args.from_dtype = dtype_code(rows)
    copy_strides(args.from_strides, rows, 3)
    args.to = np.PyArray_DATA(cache)
    args.to_dtype = dtype_code(cache)
    args.num_pages, args.page_size = cache.shape[0], cache.shape[1]
    copy_strides(args.to_strides, cache, 3)
    args.slots = <const int64_t *>np.PyArray_DATA(slots)
    args.isa = isa_limit
    args.num_threads = num_threads
    with nogil:
        status = fastattn_store(&args)
    return <int>status


def apply_rope(np.ndarray x, np.ndarray cos, np.ndarray sin, np.ndarray out, interleaved):
    """Fill `out` with the rows of `x` turned by the angles of the tables, all of rank 4; the status."""
    cdef fastattn_rope_args args
    cdef fastattn_status status
    memset(&args, 0, sizeof(args))
    args.size = sizeof(args)
    args.batch, args.num_heads, args.length, args.head_dim = x.shape[0], x.shape[1], x.shape[2], x.shape[3]
    args.rotary_dim = 2 * cos.shape[3]
    args.dtype = dtype_code(x)
    args.interleaved = interleaved
    args.x = np.PyArray_DATA(x)
    args.out = np.PyArray_DATA(out)
    args.cos = <const float *>np.PyArray_DATA(cos)
    args.sin = <const float *>np.PyArray_DATA(sin)
    copy_strides(args.x_strides, x, 3)
    copy_strides(args.out_strides, out, 3)
    copy_strides(args.cos_strides, cos, 3)
    copy_strides(args.sin_strides, sin, 3)
    args.isa = isa_limit
    args.num_threads = num_threads
    with nogil:
        status = fastattn_rope(&args)
    return <int>status
