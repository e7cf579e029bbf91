#include "state.h"

#include "../ukernel/ukernel.h"
#include "ints.h"

#include <math.h>
#include <string.h>

static size_t padded(int64_t floats) { return ((size_t)floats * sizeof(float) + 63) / 64 * 64; }

/* o has room for whole tiles, and one more. */
static int64_t o_floats(int64_t ld, int64_t v_head_dim) { return ld * (fa_round_up(v_head_dim, FA_TILE) + FA_TILE); }

size_t fastattn_state_bytes(int64_t ld, int64_t v_head_dim) { return 3 * padded(ld) + padded(o_floats(ld, v_head_dim)); }

fa_state fastattn_state_at(void *memory, int64_t ld, int64_t v_head_dim, int64_t norm_row) {
    float *m = memory, *l = (float *)((char *)memory + padded(ld)), *seen = (float *)((char *)memory + 2 * padded(ld));
    float *o = (float *)((char *)memory + 3 * padded(ld));
    const fa_state state = {ld, v_head_dim, m, l, seen, o, norm_row > 0 ? o + norm_row * ld : l};
    return state;
}

void fastattn_state_clear(fa_state *state, int with_o) {
    for (int64_t r = 0; r < state->ld; r++) {
        state->m[r] = -INFINITY;
        state->l[r] = 0.0f;
        state->seen[r] = 0.0f;
    }
    if (with_o) memset(state->o, 0, (size_t)(state->ld * state->v_head_dim) * sizeof(float));
    memset(state->norm, 0, (size_t)state->ld * sizeof(float));
}

void fastattn_state_merge(fa_state *state, const fa_state *other, float c) {
    for (int64_t r = 0; r < state->ld; r++) {
        if (other->seen[r] == 0.0f) continue;
        const float m = state->m[r] > other->m[r] ? state->m[r] : other->m[r];
        const float base = m == -INFINITY ? 0.0f : m;
        const float mine = exp2f((state->m[r] - base) * c), theirs = exp2f((other->m[r] - base) * c);
        state->m[r] = m;
        if (state->norm != state->l) state->norm[r] = state->norm[r] * mine + other->norm[r] * theirs;
        state->l[r] = state->l[r] * mine + other->l[r] * theirs;
        state->seen[r] = 1.0f;
        for (int64_t d = r; d < state->ld * state->v_head_dim; d += state->ld)
            state->o[d] = state->o[d] * mine + other->o[d] * theirs;
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
        return 1.0f / state->norm[r];
    }
    const double top = m > *sink ? m : *sink;
    const double mine = exp(m - top), others = exp(*sink - top);
    if (lse) *lse = (float)(top + log(state->l[r] * mine + others));
    return (float)(mine / (state->norm[r] * mine + others));
}
