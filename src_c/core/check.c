#include "check.h"

#include "../ukernel/storage.h"
#include "ints.h"

#include <math.h>

/* Sizes are bounded so that no product in the plan overflows 63 bits: rows of a panel sequence, tiles, work items. */
static const int64_t most_heads = (int64_t)1 << 24, most_length = (int64_t)1 << 40,
                     most_items = (int64_t)1 << 56;

static int product_exceeds(int64_t a, int64_t b, int64_t most) { return b != 0 && a > most / b; }

static int is_storage(fastattn_dtype dtype) {
    return dtype == FASTATTN_FLOAT32 || dtype == FASTATTN_FLOAT16 || dtype == FASTATTN_BFLOAT16;
}

static fastattn_status check_shape(const fastattn_attention_args *a) {
    if (a->batch < 0 || a->num_heads < 0 || a->num_kv_heads < 0 || a->q_len < 0 || a->kv_len < 0 || a->head_dim < 0 ||
        a->v_head_dim < 0)
        return FASTATTN_ERROR_SHAPE;
    if (a->num_kv_heads == 0 ? a->num_heads != 0 : a->num_heads % a->num_kv_heads != 0) return FASTATTN_ERROR_SHAPE;
    if (a->head_dim > FA_MOST_DIM || a->v_head_dim > FA_MOST_DIM || a->num_heads > most_heads || a->q_len > most_length ||
        a->kv_len > most_length)
        return FASTATTN_ERROR_SHAPE;
    if (product_exceeds(a->num_heads, a->q_len, most_items) ||
        product_exceeds(a->batch, a->num_heads * (a->q_len > 0 ? a->q_len : 1), most_items))
        return FASTATTN_ERROR_SHAPE;
    return FASTATTN_OK;
}

static int misaligned(const void *p, const int64_t *strides, int count, int64_t size) {
    int64_t bits = (int64_t)(uintptr_t)p;
    for (int i = 0; i < count; i++) bits |= strides[i];
    return (bits & (size - 1)) != 0;
}

static fastattn_status check_pointers(const fastattn_attention_args *a) {
    if (misaligned(a->q, a->q_strides, 3, fa_size_of(a->q_dtype)) ||
        misaligned(a->k, a->k_strides, 3, fa_size_of(a->kv_dtype)) ||
        misaligned(a->v, a->v_strides, 3, fa_size_of(a->kv_dtype)) ||
        misaligned(a->out, a->out_strides, 3, fa_size_of(a->q_dtype)) ||
        (a->lse && misaligned(a->lse, a->lse_strides, 3, 4)) ||
        (a->mask && misaligned(a->mask, a->mask_strides, 4, fa_size_of(a->mask_dtype))) ||
        (a->alibi_slopes && misaligned(a->alibi_slopes, a->alibi_strides, 2, 4)))
        return FASTATTN_ERROR_ARGUMENT;
    int64_t queries = a->batch * a->num_heads * a->q_len;
    if (queries == 0) return FASTATTN_OK;
    if (a->v_head_dim > 0 && !a->out) return FASTATTN_ERROR_ARGUMENT;
    if (a->head_dim > 0 && !a->q) return FASTATTN_ERROR_ARGUMENT;
    if (a->kv_len > 0 && ((a->head_dim > 0 && !a->k) || (a->v_head_dim > 0 && !a->v))) return FASTATTN_ERROR_ARGUMENT;
    return FASTATTN_OK;
}

static fastattn_status check_numbers(const fastattn_attention_args *a) {
    if (!isfinite(a->scale) || !isfinite(a->softcap) || a->softcap < 0) return FASTATTN_ERROR_SCALE;
    if (a->window_left < -1 || a->window_right < -1) return FASTATTN_ERROR_SHAPE;
    if ((int)a->precision < FASTATTN_PRECISION_HIGHEST || a->precision > FASTATTN_PRECISION_MEDIUM)
        return FASTATTN_ERROR_ARGUMENT;
    for (int64_t h = 0; a->sinks && h < a->num_heads; h++)
        if (!isfinite(a->sinks[h])) return FASTATTN_ERROR_SCALE;
    for (int64_t b = 0; a->kv_lengths && b < a->batch; b++)
        if (a->kv_lengths[b] < 0 || a->kv_lengths[b] > a->kv_len) return FASTATTN_ERROR_KV_LENGTHS;
    return FASTATTN_OK;
}

/* Every index that the engine will follow lies in its table. */
static fastattn_status check_block_mask(const fastattn_attention_args *a) {
    const fastattn_block_mask *m = a->block_mask;
    if (!m) return FASTATTN_OK;
    if (m->size != sizeof *m) return FASTATTN_ERROR_ARGUMENT;
    if (m->block_size < 1 || m->block_size > INT32_MAX || m->num_rows < 0 || m->batch_stride < 0 ||
        m->head_stride < 0 || !m->indptr || m->num_element_masks < 0 || m->num_element_masks > INT32_MAX)
        return FASTATTN_ERROR_BLOCK_MASK;
    const int64_t rows = fa_ceil_div(a->q_len, m->block_size);
    const int64_t columns = fa_ceil_div(a->kv_len, m->block_size);
    if (a->batch > 0 && a->num_heads > 0) {
        if (product_exceeds(a->batch - 1, m->batch_stride, most_items) ||
            product_exceeds(a->num_heads - 1, m->head_stride, most_items) ||
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
            if (m->partial && (m->partial[t] < -1 || m->partial[t] >= m->num_element_masks))
                return FASTATTN_ERROR_BLOCK_MASK;
            if (m->partial && m->partial[t] >= 0 && !m->element_bits) return FASTATTN_ERROR_BLOCK_MASK;
        }
    }
    return FASTATTN_OK;
}

fastattn_status fastattn_check_args(const fastattn_attention_args *a) {
    if (!a || a->size != sizeof *a) return FASTATTN_ERROR_ARGUMENT;
    if (!is_storage(a->q_dtype) || !is_storage(a->kv_dtype)) return FASTATTN_ERROR_DTYPE;
    if (a->q_dtype != a->kv_dtype && a->q_dtype != FASTATTN_FLOAT32) return FASTATTN_ERROR_DTYPE;
    if (a->mask && ((int)a->mask_dtype < FASTATTN_FLOAT32 || a->mask_dtype > FASTATTN_BOOL))
        return FASTATTN_ERROR_DTYPE;
    fastattn_status status = check_shape(a);
    if (status == FASTATTN_OK) status = check_numbers(a);
    if (status == FASTATTN_OK) status = check_pointers(a);
    if (status == FASTATTN_OK) status = check_block_mask(a);
    return status;
}
