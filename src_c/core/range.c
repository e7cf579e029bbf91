#include "range.h"

#include "../ukernel/storage.h"

#include <float.h>
#include <math.h>

int fastattn_sums_overflow(const fa_call *call, const fa_panel *panel, const fa_state *state) {
    const int64_t dim = call->args->v_head_dim;
    const fastattn_dtype dtype = call->args->v_dtype;
    if (dtype == FASTATTN_FLOAT16 || dtype == FASTATTN_INT4) return 0; /* no number of keys makes 2**16 or seven times that too large */
    for (int r = 0; r < panel->rows; r++)
        for (int64_t d = 0; d < dim && isfinite(state->norm[r * state->of_norm]); d++)
            if (!isfinite(state->o[r * state->of_row + d * state->of_number])) return 1;
    return 0;
}

void fastattn_replace_means(const fa_call *call, const fa_panel *panel, const fa_state *state, const float *factor) {
    const fastattn_attention_args *a = call->args;
    const int64_t size = fa_size_of(a->q_dtype);
    const double largest = a->q_dtype == FASTATTN_BFLOAT16 ? 0x1.fep127 : FLT_MAX; /* no mean of what is finite is larger */
    for (int r = 0; r < panel->rows; r++)
        for (int64_t d = 0; d < a->v_head_dim; d++) {
            char *at = (char *)panel->outputs[r] + d * size;
            if (isfinite(fa_get(at, a->q_dtype))) continue;
            const double mean = (double)state->o[r * state->of_row + d * state->of_number] * factor[r] / FA_SHRINK;
            fa_put(at, fa_narrowed(mean, largest), a->q_dtype);
        }
}
