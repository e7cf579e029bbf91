"""The short ways into the engine, a part of ``_native.pyx``: ordinary arguments, checked without a Python object being made.

Whatever is not ordinary, errors included, is left to ``fastattn._call`` and its like, whose messages have one source.
"""

from cpython.tuple cimport PyTuple_GET_ITEM, PyTuple_GET_SIZE
from libc.float cimport FLT_MAX
from libc.math cimport fabs, sqrt

cdef extern from "Python.h":
    long long PyLong_AsLongLongAndOverflow(object value, int *overflow)

cdef extern from "numpy/arrayobject.h":
    bint PyArray_IS_C_CONTIGUOUS(np.ndarray array)
    np.ndarray PyArray_NewLikeArray(np.ndarray prototype, np.NPY_ORDER order, void *dtype, int subok)


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


cdef inline bint is_storage_type(int type_num) noexcept:
    return type_num == np.NPY_FLOAT32 or type_num == np.NPY_FLOAT16 or type_num == bfloat16_type


cdef inline bint is_mask_type(int type_num) noexcept:
    return type_num == np.NPY_BOOL or type_num == np.NPY_FLOAT64 or is_storage_type(type_num)


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


cdef inline bint go_together(int type_num, int kv_type_num) noexcept:
    """Whether queries of the one dtype may meet keys of the other."""
    return is_storage_type(kv_type_num) and (type_num == kv_type_num or type_num == np.NPY_FLOAT32)


cdef bint are_operands(q, k, v, int *type_num) noexcept:
    """Whether these are plain arrays of dtypes that go together; that of `q`."""
    cdef int kv_type_num
    if not (np.PyArray_CheckExact(q) and np.PyArray_CheckExact(k)):
        return False
    type_num[0], kv_type_num = np.PyArray_TYPE(<np.ndarray>q), np.PyArray_TYPE(<np.ndarray>k)
    if not go_together(type_num[0], kv_type_num):
        return False
    return is_plain(q, type_num[0]) and is_plain(k, kv_type_num) and is_plain(v, kv_type_num)


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


cdef np.ndarray take_lists(fastattn_attention_args *args, indices, int axes, np.npy_intp heads, np.npy_intp rows):
    """A copy of lists ``(B, heads or 1, rows, n)``, or of three axes ``(rows, heads or 1, n)``, which nobody else can change between their
    check and their use, or None."""
    cdef np.ndarray lists
    cdef int of_head = 1, of_row = 2 if axes == 4 else 0
    if not lies_well(indices) or np.PyArray_NDIM(<np.ndarray>indices) != axes:
        return None
    if np.PyArray_TYPE(<np.ndarray>indices) != np.NPY_INT32 and np.PyArray_TYPE(<np.ndarray>indices) != np.NPY_INT64:
        return None
    lists = np.PyArray_NewCopy(<np.ndarray>indices, np.NPY_CORDER)
    if lists.shape[of_row] != rows or (lists.shape[of_head] != 1 and lists.shape[of_head] != heads):
        return None
    args.indices, args.indices_size, args.num_indices = np.PyArray_DATA(lists), np.PyArray_ITEMSIZE(lists), lists.shape[axes - 1]
    args.indices_strides[0] = lists.strides[0] if axes == 4 else 0
    args.indices_strides[1] = lists.strides[of_head] if lists.shape[of_head] > 1 else 0
    args.indices_strides[2] = lists.strides[of_row]
    return lists


def attention_plain(
    q, k, v, indices=None, /, mask=None, causal=False, window=None, query_offset=None, kv_lengths=None, kv_starts=None, q_lengths=None, scale=None,
    softcap=None, alibi_slopes=None, sinks=None, precision="highest", activation=SOFTMAX, activation_bias=None, power=3, score_function=None,
    invariant=False, return_lse=False, out=None, **others,
):  # fmt: skip
    """What ``fastattn.attention``, or with `indices` ``fastattn.attention_indexed``, returns for ordinary arguments, or None where any of
    them, or another, is out of the ordinary."""
    cdef fastattn_attention_args args
    cdef fastattn_status status
    cdef np.ndarray q_array, k_array, v_array, out_array, lse, lists
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
    if indices is not None:
        lists = take_lists(&args, indices, 4, k_array.shape[1], shape[2])
        if lists is None or lists.shape[0] != shape[0]:
            return None

    if out is None:
        out_array = np.PyArray_EMPTY(4, shape, type_num, 0)
    else:
        if not is_plain(out, type_num) or not np.PyArray_ISWRITEABLE(<np.ndarray>out) or not has_shape(out, shape):
            return None
        out_array = out
        for array in (q, k, v, mask, alibi_slopes, sinks, indices):
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


cdef np.ndarray own_pages(block_table):
    """A copy of a table of pages, int32 and contiguous, which nobody can change while a kernel runs; None if it is no ordinary one.

    A page beyond int32 becomes -1, which the library refuses where it would read it."""
    cdef np.ndarray table, own
    cdef np.npy_intp b, n
    cdef int64_t page
    cdef const char *at
    cdef int32_t *to
    if not lies_well(block_table) or np.PyArray_NDIM(<np.ndarray>block_table) != 2:
        return None
    table = block_table
    if np.PyArray_SIZE(table) == 0 or (np.PyArray_TYPE(table) != np.NPY_INT64 and np.PyArray_TYPE(table) != np.NPY_INT32):
        return None
    own = np.PyArray_EMPTY(2, table.shape, np.NPY_INT32, 0)
    to = <int32_t *>np.PyArray_DATA(own)
    for b in range(table.shape[0]):
        at = <const char *>np.PyArray_DATA(table) + b * table.strides[0]
        for n in range(table.shape[1]):
            page = (<const int64_t *>at)[0] if np.PyArray_ITEMSIZE(table) == 8 else (<const int32_t *>at)[0]
            to[n] = <int32_t>page if <int32_t>page == page else -1
            at += table.strides[1]
        to += table.shape[1]
    return own


def paged_plain(q, k_pages, v_pages, block_table, kv_lengths, causal, indices=None):
    """What pages ``(n, H, rows, D)`` give for an equal share of ordinary queries ``(L, H, D)`` to each sequence of a table, or with
    `indices` for the lists of each, or None."""
    cdef fastattn_attention_args args
    cdef fastattn_status status
    cdef engine_settings found
    cdef np.ndarray queries, k, v, out, lists, table = own_pages(block_table)
    cdef np.npy_intp shape[3]
    cdef int64_t starts[MOST_ENTRIES + 1]
    cdef int64_t lengths[MOST_ENTRIES]
    cdef int64_t b, batch
    cdef int axis, type_num, kv_type_num
    if table is None or not lies_well(q) or np.PyArray_NDIM(<np.ndarray>q) != 3 or (causal is not True and causal is not False):
        return None
    queries, type_num, batch = q, np.PyArray_TYPE(<np.ndarray>q), table.shape[0]
    kv_type_num = np.PyArray_TYPE(<np.ndarray>k_pages) if lies_well(k_pages) else np.NPY_VOID
    if not go_together(type_num, kv_type_num) or not is_plain(k_pages, kv_type_num) or not is_plain(v_pages, kv_type_num):
        return None
    k, v = k_pages, v_pages
    for axis in range(3):
        if k.shape[axis] != v.shape[axis]:
            return None
    if k.shape[2] == 0 or queries.shape[2] != k.shape[3] or queries.shape[2] == 0:
        return None
    if queries.strides[2] != np.PyArray_ITEMSIZE(queries) and queries.shape[2] > 1:
        return None
    if k.shape[1] == 0 or queries.shape[1] % k.shape[1] or batch == 0 or queries.shape[0] % batch:
        return None
    if not take_ints(kv_lengths, batch, 0, k.shape[2] * table.shape[1], lengths):
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
    args.cu_seqlens_q, args.kv_lengths = starts, lengths
    args.block_table, args.block_table_stride = <const int32_t *>np.PyArray_DATA(table), table.strides[0]
    args.num_pages, args.page_size = k.shape[0], k.shape[2]
    args.kv_len = k.shape[2] * table.shape[1]
    if indices is not None:
        lists = take_lists(&args, indices, 3, k.shape[1], shape[0])
        if lists is None:
            return None
    args.isa, args.num_threads, args.threading = found.isa, found.num_threads, found.threading
    if PyThread_get_thread_ident() == main_thread:
        args.interrupted = interrupted
    with nogil:
        status = fastattn_attention(&args, NULL, 0)
    if status == FASTATTN_ERROR_INTERRUPTED:
        raise_pending()
    return out if status == FASTATTN_OK else None


cdef bint take_rows(fastattn_store_args *args, rows, np.ndarray cache, int axes, const int64_t *slots, int64_t count) noexcept:
    """As many rows ``(B, H, L, D)``, or of three axes ``(L, H, D)``, as there are slots, of numbers for a cache ``(n, H, rows, D)`` of numbers."""
    cdef np.ndarray array
    cdef int type_num, length = 2 if axes == 4 else 0
    if not lies_well(rows) or np.PyArray_NDIM(<np.ndarray>rows) != axes or np.PyArray_TYPE(cache) == np.NPY_VOID:
        return False
    array = rows
    type_num = np.PyArray_TYPE(array)
    if not is_storage_type(type_num):
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
