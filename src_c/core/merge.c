/* fastattn_merge_states: every row is a state of width 1 with m = lse and l = 1. */
#include "check.h"
#include "state.h"
#include "threads.h"

#include "../ukernel/storage.h"
#include "fastattn.h"

#include <math.h>
#include <stdlib.h>

typedef struct fa_merge {
    int64_t num_parts, v_head_dim;
    const void *const *outs;
    const float *const *lses;
    fastattn_dtype dtype;
    void *out;
    float *lse;
    fa_state sum, part;
} fa_merge;

static void merge_row(const void *context, int64_t row, int worker) {
    const fa_merge *x = context;
    const float log2_e = 1.44269504088896341f;
    const int64_t size = fa_size_of(x->dtype);
    fa_state sum = x->sum, part = x->part;
    (void)worker;
    fastattn_state_clear(&sum);
    for (int64_t n = 0; n < x->num_parts; n++) {
        const float lse = x->lses[n][row];
        if (lse == -INFINITY) continue;
        *part.m = lse;
        *part.l = *part.seen = 1.0f;
        for (int64_t d = 0; d < x->v_head_dim; d++)
            part.o[d] = fa_get((const char *)x->outs[n] + (row * x->v_head_dim + d) * size, x->dtype);
        fastattn_state_merge(&sum, &part, log2_e);
    }
    const float factor = fastattn_state_finish(&sum, 0, 1.0, NULL, &x->lse[row]);
    for (int64_t d = 0; d < x->v_head_dim; d++)
        fa_put((char *)x->out + (row * x->v_head_dim + d) * size, sum.o[d] * factor, x->dtype);
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

    const size_t bytes = fastattn_state_bytes(1, v_head_dim);
    char *memory = malloc(2 * bytes);
    if (!memory) return FASTATTN_ERROR_MEMORY;
    const fa_merge merge = {num_parts, v_head_dim, outs, lses, dtype, out, lse,
                            fastattn_state_at(memory, NULL, 1, 1, v_head_dim),
                            fastattn_state_at(memory + bytes, NULL, 1, 1, v_head_dim)};
    fastattn_for_range(0, rows, 0, merge_row, &merge);
    free(memory);
    return FASTATTN_OK;
}
