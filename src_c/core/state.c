#include "state.h"

#include "../ukernel/ukernel.h"
#include "ints.h"

#include <math.h>
#include <string.h>

static size_t padded(int64_t floats) { return ((size_t)floats * sizeof(float) + 63) / 64 * 64; }

/* o has room for whole tiles, and one more. */
static int64_t o_floats(int64_t rows, int64_t v_head_dim) { return rows * (fa_round_up(v_head_dim, FA_TILE) + FA_TILE); }

size_t fastattn_state_bytes(int64_t rows, int64_t v_head_dim) { return 3 * padded(rows) + padded(o_floats(rows, v_head_dim)); }

void fastattn_state_at(fa_state *state, void *memory, const fa_products *products, int64_t rows, int ld, int64_t v_head_dim) {
    const size_t vector = padded(fa_round_up(rows, FA_ROW_STEP));
    state->rows = rows;
    state->v_head_dim = v_head_dim;
    state->m = memory;
    state->l = (float *)((char *)memory + vector);
    state->seen = (float *)((char *)memory + 2 * vector);
    state->o = (float *)((char *)memory + 3 * vector);
    state->of_row = products ? fa_row_of_o(products, v_head_dim) : 1;
    state->of_number = products ? fa_number_of_o(products, ld) : ld;
    const int sums = products && products->sums;
    state->norm = sums ? state->o + fa_sums_of_o(products, v_head_dim) * state->of_number : state->l;
    state->of_norm = sums ? state->of_row : 1;
}

void fastattn_state_clear(fa_state *state) {
    for (int64_t r = 0; r < state->rows; r++) {
        state->m[r] = -INFINITY;
        state->l[r] = 0.0f;
        state->seen[r] = 0.0f;
    }
    const int64_t all = state->of_row == 1 ? state->v_head_dim * state->of_number : state->rows * state->of_row;
    memset(state->o, 0, (size_t)all * sizeof(float));
    for (int64_t r = 0; r < state->rows && state->norm != state->l; r++) state->norm[r * state->of_norm] = 0.0f;
}

void fastattn_state_merge(fa_state *state, const fa_state *other, float c) {
    for (int64_t r = 0; r < state->rows; r++) {
        if (other->seen[r] == 0.0f) continue;
        const float m = state->m[r] > other->m[r] ? state->m[r] : other->m[r];
        const float base = m == -INFINITY ? 0.0f : m;
        const float mine = exp2f((state->m[r] - base) * c), theirs = exp2f((other->m[r] - base) * c);
        state->m[r] = m;
        const int64_t norm = r * state->of_norm;
        if (state->norm != state->l) state->norm[norm] = state->norm[norm] * mine + other->norm[norm] * theirs;
        state->l[r] = state->l[r] * mine + other->l[r] * theirs;
        state->seen[r] = 1.0f;
        const int64_t step = state->of_number;
        float *o = state->o + r * state->of_row;
        const float *added = other->o + r * state->of_row;
        for (int64_t d = 0; d < state->v_head_dim; d++) o[d * step] = o[d * step] * mine + added[d * step] * theirs;
    }
}

float fastattn_state_finish(const fa_state *state, int64_t r, double unit, const float *sink, float *lse) {
    if (sink && *sink == -INFINITY) sink = NULL;
    if (state->seen[r] == 0.0f) {
        if (lse) *lse = sink ? *sink : -INFINITY;
        return 0.0f;
    }
    const double m = state->m[r] * unit;
    if (!sink) {
        if (lse) *lse = (float)(m + log(state->l[r]));
        return 1.0f / state->norm[r * state->of_norm];
    }
    const double top = m > *sink ? m : *sink;
    const double mine = exp(m - top), others = exp(*sink - top);
    if (lse) *lse = (float)(top + log(state->l[r] * mine + others));
    return (float)(mine / (state->norm[r * state->of_norm] * mine + others));
}
