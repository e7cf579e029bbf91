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

enum { MINE = 1, THEIRS = 2 };

static float merged(float a, float b, float mine, float theirs, int taken) {
    return taken == (MINE | THEIRS) ? a * mine + b * theirs : taken == THEIRS ? b : a;
}

/* o = o * mine + added * theirs, a few at a time, for which compilers have vectors. */
static void scale_and_add(float *restrict o, float mine, const float *restrict added, float theirs, int64_t n) {
    enum { STEP = 16 };
    for (; n >= STEP; n -= STEP, o += STEP, added += STEP)
        for (int i = 0; i < STEP; i++) o[i] = o[i] * mine + added[i] * theirs;
    for (int64_t i = 0; i < n; i++) o[i] = o[i] * mine + added[i] * theirs;
}

void fastattn_state_merge(fa_state *state, const fa_state *other, float c) {
    float mine[FA_PANEL_ROWS], theirs[FA_PANEL_ROWS];
    int taken[FA_PANEL_ROWS]; /* which of the two have seen a key */
    int whole = 1;
    for (int64_t r = 0; r < state->rows; r++) {
        taken[r] = (state->seen[r] != 0.0f ? MINE : 0) | (other->seen[r] != 0.0f ? THEIRS : 0);
        whole &= taken[r] == (MINE | THEIRS);
        const float m = state->m[r] > other->m[r] ? state->m[r] : other->m[r];
        const float base = m == -INFINITY ? 0.0f : m;
        mine[r] = exp2f((state->m[r] - base) * c);
        theirs[r] = exp2f((other->m[r] - base) * c);
        if (taken[r] & THEIRS) state->m[r] = taken[r] == THEIRS ? other->m[r] : m;
        const int64_t norm = r * state->of_norm;
        if (state->norm != state->l) state->norm[norm] = merged(state->norm[norm], other->norm[norm], mine[r], theirs[r], taken[r]);
        state->l[r] = merged(state->l[r], other->l[r], mine[r], theirs[r], taken[r]);
        if (taken[r] & THEIRS) state->seen[r] = 1.0f;
    }
    /* Side by side, row by row or number by number. */
    if (state->of_row == 1 && whole) {
        for (int64_t d = 0; d < state->v_head_dim; d++) {
            float *o = state->o + d * state->of_number;
            const float *added = other->o + d * state->of_number;
            for (int64_t r = 0; r < state->rows; r++) o[r] = o[r] * mine[r] + added[r] * theirs[r];
        }
        return;
    }
    for (int64_t r = 0; r < state->rows; r++) {
        float *o = state->o + r * state->of_row;
        const float *added = other->o + r * state->of_row;
        if (state->of_number == 1 && taken[r] == (MINE | THEIRS)) {
            scale_and_add(o, mine[r], added, theirs[r], state->v_head_dim);
            continue;
        }
        for (int64_t d = 0; d < state->v_head_dim; d++) {
            const int64_t at = d * state->of_number;
            o[at] = merged(o[at], added[at], mine[r], theirs[r], taken[r]);
        }
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
