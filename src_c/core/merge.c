/* fastattn_merge_states: the weights of the parts sum to 1 in every row, so that nothing is divided and no sum of finite numbers is
 * larger than the largest of them. */
#include "check.h"
#include "ints.h"
#include "memory.h"
#include "threads.h"

#include "../ukernel/storage.h"
#include "../ukernel/ukernel.h"
#include "fastattn.h"

#include <float.h>
#include <math.h>

typedef struct fa_merge {
    const fa_ukernel *uk;
    int64_t num_parts, rows, v_head_dim;
    const void *const *outs;
    const float *const *lses;
    fastattn_dtype dtype;
    void *out;
    float *lse;
    float *weights;       /* [num_parts][FA_ROW_STEP] */
    float *weights_of;    /* [num_parts] of one row, of the parts that have seen a key */
    const void **rows_of; /* [num_parts] likewise */
} fa_merge;

/* A row that left float32, in double. Rounding alone may do that, where all numbers are near the largest; then it is that. */
static void mix_exactly(const fa_merge *x, char *out, int64_t parts) {
    const double largest = x->dtype == FASTATTN_BFLOAT16 ? 0x1.fep127 : x->dtype == FASTATTN_FLOAT16 ? 65504 : FLT_MAX;
    const int64_t size = fa_size_of(x->dtype);
    for (int64_t d = 0; d < x->v_head_dim; d++) {
        double sum = 0;
        for (int64_t n = 0; n < parts; n++)
            sum += (double)x->weights_of[n] * fa_get((const char *)x->rows_of[n] + d * size, x->dtype);
        if (isfinite(sum)) sum = fmax(-largest, fmin(sum, largest));
        fa_put(out + d * size, (float)sum, x->dtype);
    }
}

static void merge_rows(const void *context, int64_t item, int worker) {
    const fa_merge *x = context;
    const int64_t first = item * FA_ROW_STEP, rows = fa_min(FA_ROW_STEP, x->rows - first);
    const int64_t row_bytes = x->v_head_dim * fa_size_of(x->dtype);
    float top[FA_ROW_STEP], total[FA_ROW_STEP];
    (void)worker;
    x->uk->weigh(x->weights, top, total, x->lses, x->num_parts, first, rows);
    for (int64_t r = 0; r < rows; r++) {
        char *out = (char *)x->out + (first + r) * row_bytes;
        int64_t parts = 0;
        for (int64_t n = 0; n < x->num_parts; n++) {
            if (x->lses[n][first + r] == -INFINITY) continue;
            x->weights_of[parts] = x->weights[n * FA_ROW_STEP + r];
            x->rows_of[parts++] = (const char *)x->outs[n] + (first + r) * row_bytes;
        }
        x->lse[first + r] = total[r] == 0.0f ? -INFINITY : (float)(top[r] + log(total[r]));
        if (x->v_head_dim > 0 && !x->uk->mix(out, x->weights_of, x->rows_of, parts, x->v_head_dim, x->dtype))
            mix_exactly(x, out, parts);
    }
}

fastattn_status fastattn_merge_states(int64_t num_parts, const void *const *outs, const float *const *lses,
                                      int64_t rows, int64_t v_head_dim, fastattn_dtype dtype, void *out, float *lse) {
    if (num_parts < 0 || rows < 0 || v_head_dim < 0 || v_head_dim > FA_MOST_DIM) return FASTATTN_ERROR_SHAPE;
    if (dtype != FASTATTN_FLOAT32 && dtype != FASTATTN_FLOAT16 && dtype != FASTATTN_BFLOAT16)
        return FASTATTN_ERROR_DTYPE;
    if (rows == 0) return FASTATTN_OK;
    if (!lse || (v_head_dim > 0 && !out) || (num_parts > 0 && (!outs || !lses))) return FASTATTN_ERROR_ARGUMENT;
    const size_t size = (size_t)fa_size_of(dtype);
    if (fa_misaligned(lse, 4) || (v_head_dim > 0 && fa_misaligned(out, size))) return FASTATTN_ERROR_ARGUMENT;
    for (int64_t n = 0; n < num_parts; n++)
        if (!lses[n] || fa_misaligned(lses[n], 4) || (v_head_dim > 0 && (!outs[n] || fa_misaligned(outs[n], size))))
            return FASTATTN_ERROR_ARGUMENT;

    const size_t parts = (size_t)num_parts, of_part = (FA_ROW_STEP + 1) * sizeof(float) + sizeof(void *);
    if ((uint64_t)num_parts > SIZE_MAX / 2 / of_part) return FASTATTN_ERROR_MEMORY;
    const void **memory = FASTATTN_MALLOC(parts * of_part + 1);
    if (!memory) return FASTATTN_ERROR_MEMORY;
    float *weights = (float *)(void *)(memory + parts);
    const fa_merge merge = {fastattn_ukernel_select(FASTATTN_ISA_BEST), num_parts, rows, v_head_dim, outs, lses, dtype, out, lse,
                            weights, weights + parts * FA_ROW_STEP, memory};
    fastattn_for_range(0, fa_ceil_div(rows, FA_ROW_STEP), 0, merge_rows, &merge);
    FASTATTN_FREE(memory);
    return FASTATTN_OK;
}
