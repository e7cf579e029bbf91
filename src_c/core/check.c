#include "check.h"

#include "../ukernel/storage.h"
#include "indices.h"
#include "ints.h"
#include "threads.h"

#include <math.h>
#include <string.h>

/* Sizes are bounded so that no product in the plan overflows 63 bits: rows of a panel sequence, tiles, work items. */
static const int64_t most_heads = (int64_t)1 << 24, most_length = (int64_t)1 << 40, most_items = (int64_t)1 << 56;

static fastattn_status check_shape(const fastattn_attention_args *a) {
    if (FA_UNLIKELY((a->batch | a->num_heads | a->num_kv_heads | a->q_len | a->kv_len | a->head_dim | a->v_head_dim) < 0)) /* any of them */
        return FASTATTN_ERROR_SHAPE;
    if (a->num_kv_heads == 0 ? a->num_heads != 0 : a->num_heads % a->num_kv_heads != 0) return FASTATTN_ERROR_SHAPE;
    if (a->head_dim > FA_MOST_DIM || a->v_head_dim > FA_MOST_DIM || a->num_heads > most_heads || a->q_len > most_length ||
        a->kv_len > most_length)
        return FASTATTN_ERROR_SHAPE;
    if (a->kv_dtype == FASTATTN_INT4 && a->head_dim % FA_GROUP != 0) return FASTATTN_ERROR_SHAPE;
    if (a->v_dtype == FASTATTN_INT4 && a->v_head_dim % FA_GROUP != 0) return FASTATTN_ERROR_SHAPE;
    if (FA_UNLIKELY(a->block_table) && (a->num_pages < 0 || a->num_pages > most_length || a->page_size < 1 || a->page_size > most_length))
        return FASTATTN_ERROR_SHAPE;
    if (FA_UNLIKELY(a->indices) && (a->num_indices < 0 || a->num_indices > most_length)) return FASTATTN_ERROR_SHAPE;
    if (FA_UNLIKELY(a->segments) && (a->num_segments < 0 || a->num_segments > INT32_MAX || a->v_head_dim != 0 || a->indices))
        return FASTATTN_ERROR_SEGMENTS;
    if (a->batch > most_items || fa_product_exceeds(a->num_heads, a->q_len, most_items) ||
        fa_product_exceeds(a->batch, a->num_heads * (a->q_len > 0 ? a->q_len : 1), most_items))
        return FASTATTN_ERROR_SHAPE;
    return FASTATTN_OK;
}

/* fastattn_check_table of a table that is given in parts. */
static inline fastattn_status check_axes(const void *pointer, int64_t *strides, int axes, const int64_t *shape, int64_t packed,
                                         int64_t size, int required, int output) {
    int64_t bits = (int64_t)(uintptr_t)pointer;
    int empty = packed == 0, overlaps = 0;
    for (int axis = 0; axis < axes; axis++) {
        const int64_t count = shape[axis];
        strides[axis] = count == 1 ? 0 : strides[axis];
        empty |= count == 0;
        overlaps |= (count > 1) & (strides[axis] == 0);
        bits |= strides[axis];
    }
    if (FA_UNLIKELY(empty)) {
        for (int axis = 0; axis < axes; axis++) strides[axis] = 0;
        return FASTATTN_OK;
    }
    if (FA_UNLIKELY(!pointer)) return required ? FASTATTN_ERROR_ARGUMENT : FASTATTN_OK;
    return (output && overlaps) || (bits & (size - 1)) != 0 ? FASTATTN_ERROR_ARGUMENT : FASTATTN_OK;
}

fastattn_status fastattn_check_table(const fa_table *t) {
    return check_axes(t->pointer, t->strides, t->axes, t->shape, t->packed, t->size, t->required, t->output);
}

static fastattn_status check_memory(fastattn_attention_args *a) {
    const int64_t batch = a->batch, heads = a->num_heads, kv_heads = a->num_kv_heads, rows = a->q_len, keys = a->kv_len;
    const int64_t q_batch = FA_UNLIKELY(a->cu_seqlens_q) ? 1 : batch, kv_batch = FA_UNLIKELY(a->cu_seqlens_k) ? 1 : batch;
    const int64_t q_size = fa_size_of(a->q_dtype), kv_size = fa_size_of(a->kv_dtype);
    const int64_t used = batch * heads * rows > 0; /* what no query needs is never read */
    const int paged = FA_UNLIKELY(a->block_table != NULL);
    const int64_t kv_parts = paged ? a->num_pages : kv_batch, kv_rows = paged ? a->page_size : keys;
    const int64_t q_shape[] = {q_batch, heads, rows}, kv_shape[] = {kv_parts, kv_heads, kv_rows};
    /* A quantised row without numbers still has a scale. */
    const int64_t k_bytes = fa_row_bytes(a->kv_dtype, a->head_dim), v_bytes = a->segments ? 0 : fa_row_bytes(a->v_dtype, a->v_head_dim);
    const int64_t out_dim = a->segments ? a->num_segments : a->v_head_dim, out_size = a->segments ? (int64_t)sizeof(float) : q_size;
    if (check_axes(a->q, a->q_strides, 3, q_shape, a->head_dim, q_size, 1, 0) != FASTATTN_OK ||
        check_axes(a->k, a->k_strides, 3, kv_shape, used * k_bytes, kv_size, 1, 0) != FASTATTN_OK ||
        check_axes(a->v, a->v_strides, 3, kv_shape, used * v_bytes, kv_size, 1, 0) != FASTATTN_OK ||
        check_axes(a->out, a->out_strides, 3, q_shape, out_dim, out_size, 1, 1) != FASTATTN_OK)
        return FASTATTN_ERROR_ARGUMENT;
    if (FA_LIKELY(!a->lse && !a->mask && !a->alibi_slopes && !a->sinks && !a->query_offset && !a->activation_bias && !a->additive &&
                  !a->block_table && !a->indices && !a->segments && !fastattn_ragged(a)))
        return FASTATTN_OK;
    const fa_table options[] = {
        {a->lse, a->lse_strides, 3, {q_batch, heads, rows}, 1, 4, 0, 1},
        {a->mask, a->mask_strides, 4, {q_batch, heads, rows, keys}, 1, fa_size_of(a->mask_dtype), 0, 0},
        {a->alibi_slopes, a->alibi_strides, 2, {batch, heads}, 1, 4, 0, 0},
        {a->sinks, NULL, 0, {0}, heads, 4, 0, 0},
        {a->query_offset, NULL, 0, {0}, batch, 8, 0, 0},
        {a->kv_lengths, NULL, 0, {0}, batch, 8, 0, 0},
        {a->kv_starts, NULL, 0, {0}, batch, 8, 0, 0},
        {a->q_lengths, NULL, 0, {0}, batch, 8, 0, 0},
        {a->cu_seqlens_q, NULL, 0, {0}, batch + 1, 8, 0, 0},
        {a->cu_seqlens_k, NULL, 0, {0}, batch + 1, 8, 0, 0},
        {a->activation_bias, NULL, 0, {0}, batch, 4, 0, 0},
        {a->additive, &a->additive_stride, 1, {heads}, used * a->head_dim, 4, 0, 0},
        {a->block_table, &a->block_table_stride, 1, {batch}, fastattn_pages_of(a, keys), 4, 0, 0},
        {a->indices, a->indices_strides, 3, {q_batch, kv_heads, rows}, used * a->num_indices, a->indices_size, 0, 0},
        {a->segments, &a->segments_stride, 1, {kv_batch}, keys, 4, 0, 0},
    };
    for (size_t n = 0; n < sizeof options / sizeof *options; n++)
        if (fastattn_check_table(&options[n]) != FASTATTN_OK) return FASTATTN_ERROR_ARGUMENT;
    return FASTATTN_OK;
}

static fastattn_status check_numbers(const fastattn_attention_args *a) {
    if (!isfinite(a->scale) || !isfinite(a->softcap) || a->softcap < 0) return FASTATTN_ERROR_SCALE;
    if (a->window_left < -1 || a->window_right < -1) return FASTATTN_ERROR_SHAPE;
    if ((int)a->precision < FASTATTN_PRECISION_HIGHEST || a->precision > FASTATTN_PRECISION_MEDIUM) return FASTATTN_ERROR_ARGUMENT;
    for (int64_t h = 0; FA_UNLIKELY(a->sinks) && h < a->num_heads; h++)
        if (!isfinite(a->sinks[h]) && a->sinks[h] != -INFINITY) return FASTATTN_ERROR_SCALE;
    const int64_t slopes = a->alibi_strides[0] == 0 ? fa_min(a->batch, 1) : a->batch;
    for (int64_t b = 0; FA_UNLIKELY(a->alibi_slopes) && b < slopes; b++)
        for (int64_t h = 0; h < a->num_heads; h++)
            if (!isfinite(*(const float *)((const char *)a->alibi_slopes + b * a->alibi_strides[0] + h * a->alibi_strides[1])))
                return FASTATTN_ERROR_SCALE;
    return FASTATTN_OK;
}

static fastattn_status check_activation(const fastattn_attention_args *a) {
    if (a->activation == FASTATTN_SOFTMAX) return FASTATTN_OK;
    if ((int)a->activation < FASTATTN_SOFTMAX || a->activation > FASTATTN_POLYNOMIAL || a->lse || a->sinks)
        return FASTATTN_ERROR_ACTIVATION;
    if (a->activation == FASTATTN_POLYNOMIAL && (a->power < 1 || a->power > FA_MOST_EXPONENT)) return FASTATTN_ERROR_ACTIVATION;
    for (int64_t b = 0; a->activation == FASTATTN_SIGMOID && a->activation_bias && b < a->batch; b++)
        if (!isfinite(a->activation_bias[b])) return FASTATTN_ERROR_ACTIVATION;
    return FASTATTN_OK;
}

static int in_order(const int64_t *cu_seqlens, int64_t batch, int64_t total) {
    if (cu_seqlens[0] != 0 || cu_seqlens[batch] != total) return 0;
    for (int64_t b = 0; b < batch; b++)
        if (cu_seqlens[b + 1] < cu_seqlens[b]) return 0;
    return 1;
}

/* The shape that each entry is said to have fits into what there is. */
static fastattn_status check_lengths(const fastattn_attention_args *a) {
    if (FA_UNLIKELY(a->cu_seqlens_q) && a->block_mask) return FASTATTN_ERROR_ARGUMENT;
    if (FA_UNLIKELY(a->cu_seqlens_k) && (a->mask || a->block_mask || a->block_table || a->indices)) return FASTATTN_ERROR_ARGUMENT;
    if (FA_UNLIKELY(a->indices) && a->block_mask) return FASTATTN_ERROR_ARGUMENT;
    if ((FA_UNLIKELY(a->cu_seqlens_q) && !in_order(a->cu_seqlens_q, a->batch, a->q_len)) ||
        (FA_UNLIKELY(a->cu_seqlens_k) && !in_order(a->cu_seqlens_k, a->batch, a->kv_len)))
        return FASTATTN_ERROR_SEQLENS;
    if (FA_LIKELY(!a->kv_lengths && !a->kv_starts && !a->q_lengths)) return FASTATTN_OK;
    for (int64_t b = 0; b < a->batch; b++) {
        const int64_t q_room = fastattn_q_room(a, b), kv_room = fastattn_kv_room(a, b);
        const int64_t length = a->kv_lengths ? a->kv_lengths[b] : kv_room, start = a->kv_starts ? a->kv_starts[b] : 0;
        if (length < 0 || length > kv_room || start < 0 || start > length) return FASTATTN_ERROR_KV_LENGTHS;
        if (a->q_lengths && (a->q_lengths[b] < 0 || a->q_lengths[b] > q_room)) return FASTATTN_ERROR_Q_LENGTHS;
    }
    return FASTATTN_OK;
}

/* Every page that an entry's keys are said to be in is there. */
static fastattn_status check_block_table(const fastattn_attention_args *a) {
    if (FA_LIKELY(!a->block_table)) return FASTATTN_OK;
    const uint64_t pages = (uint64_t)a->num_pages;
    for (int64_t b = 0; b < a->batch; b++) {
        const int32_t *table = fastattn_pages_at(a->block_table, a->block_table_stride, b);
        const int64_t start = a->kv_starts ? a->kv_starts[b] : 0, length = a->kv_lengths ? a->kv_lengths[b] : a->kv_len;
        int absent = 0;
        for (int64_t n = start / a->page_size; n < fastattn_pages_of(a, length) && start < length; n++)
            absent |= (uint64_t)(int64_t)table[n] >= pages; /* as are negative ones */
        if (absent) return FASTATTN_ERROR_BLOCK_TABLE;
    }
    return FASTATTN_OK;
}

/* Every key's segment is there, or none. */
static fastattn_status check_segments(const fastattn_attention_args *a) {
    if (!FA_HOLDS_SEGMENTS || FA_LIKELY(!a->segments)) return FASTATTN_OK;
    const int64_t tables = a->cu_seqlens_k || a->segments_stride == 0 ? fa_min(a->batch, 1) : a->batch;
    for (int64_t b = 0; b < tables; b++) {
        const int32_t *of_key = (const int32_t *)(const void *)((const char *)a->segments + b * a->segments_stride);
        int absent = 0;
        for (int64_t j = 0; j < a->kv_len; j++) absent |= of_key[j] < -1 || of_key[j] >= a->num_segments;
        if (absent) return FASTATTN_ERROR_SEGMENTS;
    }
    return FASTATTN_OK;
}

/* Every index that the engine will follow lies in its table. */
static fastattn_status check_block_mask(const fastattn_attention_args *a) {
    const fastattn_block_mask *m = a->block_mask;
    if (!FA_HOLDS_SPARSE || FA_LIKELY(!m)) return FASTATTN_OK;
    if (fa_misaligned(m->indptr, 8) || fa_misaligned(m->indices, 4) || fa_misaligned(m->partial, 4)) return FASTATTN_ERROR_ARGUMENT;
    if (m->block_size < 1 || m->block_size > INT32_MAX || m->num_rows < 0 || m->batch_stride < 0 || m->head_stride < 0 || !m->indptr ||
        m->num_element_masks < 0 || m->num_element_masks > INT32_MAX)
        return FASTATTN_ERROR_BLOCK_MASK;
    const int64_t rows = fa_ceil_div(a->q_len, m->block_size);
    const int64_t columns = fa_ceil_div(a->kv_len, m->block_size);
    if (a->batch > 0 && a->num_heads > 0) {
        if (fa_product_exceeds(a->batch - 1, m->batch_stride, most_items) ||
            fa_product_exceeds(a->num_heads - 1, m->head_stride, most_items) ||
            (a->batch - 1) * m->batch_stride + (a->num_heads - 1) * m->head_stride + rows > m->num_rows)
            return FASTATTN_ERROR_BLOCK_MASK;
    }
    if (m->indptr[0] != 0) return FASTATTN_ERROR_BLOCK_MASK;
    for (int64_t r = 0; r < m->num_rows; r++) {
        const int64_t first = m->indptr[r], last = m->indptr[r + 1];
        if (last < first || last - first > columns) return FASTATTN_ERROR_BLOCK_MASK;
        if (last > first && !m->indices) return FASTATTN_ERROR_BLOCK_MASK;
        int64_t before = -1;
        for (int64_t t = first; t < last; t++) {
            if (m->indices[t] <= before || m->indices[t] >= columns) return FASTATTN_ERROR_BLOCK_MASK;
            before = m->indices[t];
            if (m->partial && (m->partial[t] < -1 || m->partial[t] >= m->num_element_masks)) return FASTATTN_ERROR_BLOCK_MASK;
            if (m->partial && m->partial[t] >= 0 && !m->element_bits) return FASTATTN_ERROR_BLOCK_MASK;
        }
    }
    return FASTATTN_OK;
}

int fastattn_known_size(size_t size, size_t first, size_t own) { return size >= first && size <= own && size % sizeof(void *) == 0; }

/* What fields are that an older caller does not have. */
static const fastattn_attention_args absent = FASTATTN_ATTENTION_ARGS_INIT;
static const fastattn_block_mask absent_from_mask = {0};

enum { FIRST_ARGS = FA_END_OF(fastattn_attention_args, num_threads), FIRST_BLOCK_MASK = FA_END_OF(fastattn_block_mask, num_element_masks) };

fastattn_status fastattn_take_struct(void *to, const void *from, size_t first, const void *rest, size_t own) {
    size_t size;
    memcpy(&size, from, sizeof size);
    if (!fastattn_known_size(size, first, own)) return FASTATTN_ERROR_ARGUMENT;
    memcpy(to, from, size);
    if (FA_UNLIKELY(size < own)) memcpy((char *)to + size, (const char *)rest + size, own - size);
    memcpy(to, &own, sizeof own);
    return FASTATTN_OK;
}

fastattn_status fastattn_attention_args_init(fastattn_attention_args *args, size_t size) {
    if (!args || !fastattn_known_size(size, FIRST_ARGS, sizeof absent)) return FASTATTN_ERROR_ARGUMENT;
    memcpy(args, &absent, size);
    memcpy(args, &size, sizeof size);
    return FASTATTN_OK;
}

/* What this library was built without, but for dtypes, which are checked with what goes together. */
static int was_left_out(const fastattn_attention_args *a) {
    return (!FA_HOLDS_ADDITIVE && a->additive) || (!FA_HOLDS_ACTIVATION && a->activation != FASTATTN_SOFTMAX) ||
           (!FA_HOLDS_SEGMENTS && a->segments) || (!FA_HOLDS_MASK && a->mask) || (!FA_HOLDS_SPARSE && (a->block_mask || a->indices));
}

fastattn_status fastattn_check_args(fa_args *args, const fastattn_attention_args *given) {
    fastattn_attention_args *a = &args->attention;
    if (!given) return FASTATTN_ERROR_ARGUMENT;
    fastattn_status status = fastattn_take_struct(a, given, FIRST_ARGS, &absent, sizeof absent);
    if (status != FASTATTN_OK) return status;
    if (was_left_out(a)) return FASTATTN_ERROR_LEFT_OUT;
    if (FA_UNLIKELY(a->block_mask)) {
        status = fastattn_take_struct(&args->block_mask, a->block_mask, FIRST_BLOCK_MASK, &absent_from_mask, sizeof absent_from_mask);
        if (status != FASTATTN_OK) return status;
        a->block_mask = &args->block_mask;
    }
    const int quantised = fa_is_quantised(a->kv_dtype);
    if (a->v_dtype == FASTATTN_DTYPE_OF_KEYS) a->v_dtype = a->kv_dtype;
    if (FA_UNLIKELY(a->v_dtype != a->kv_dtype) && !(quantised && fa_is_quantised(a->v_dtype))) return FASTATTN_ERROR_DTYPE;
    if (!fa_is_storage(a->q_dtype) || !fa_is_cached(a->kv_dtype) || (quantised && a->additive)) return FASTATTN_ERROR_DTYPE;
    if (a->q_dtype != a->kv_dtype && a->q_dtype != FASTATTN_FLOAT32 && !quantised) return FASTATTN_ERROR_DTYPE;
    if (FA_UNLIKELY(a->mask) && ((int)a->mask_dtype < FASTATTN_FLOAT32 || a->mask_dtype > FASTATTN_BOOL || !fa_holds(a->mask_dtype)))
        return FASTATTN_ERROR_DTYPE;
    if (FA_UNLIKELY(a->indices) && a->indices_size != 4 && a->indices_size != 8) return FASTATTN_ERROR_ARGUMENT;
    if (!fastattn_threading_available(a->threading)) return FASTATTN_ERROR_THREADING;
    status = check_shape(a);
    if (status == FASTATTN_OK) status = check_memory(a);
    if (status == FASTATTN_OK) status = check_numbers(a);
    if (status == FASTATTN_OK) status = check_activation(a);
    if (status == FASTATTN_OK) status = check_lengths(a);
    if (status == FASTATTN_OK) status = check_block_table(a);
    if (status == FASTATTN_OK) status = check_block_mask(a);
    if (status == FASTATTN_OK) status = fastattn_check_indices(a);
    if (status == FASTATTN_OK) status = check_segments(a);
    return status;
}
