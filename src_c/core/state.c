#include "state.h"

#include "../ukernel/ukernel.h"
#include "ints.h"

#include <math.h>
#include <string.h>

static size_t padded(int64_t floats) { return ((size_t)floats * sizeof(float) + 63) / 64 * 64; }

/* o has room for whole tiles. */
size_t fastattn_state_bytes(int64_t ld, int64_t v_head_dim) {
    return 3 * padded(ld) + padded(ld * fa_round_up(v_head_dim, FA_TILE));
}

fa_state fastattn_state_at(void *memory, int64_t ld, int64_t v_head_dim) {
    char *at = memory;
    fa_state state = {ld, v_head_dim, (float *)at, (float *)(at + padded(ld)), (float *)(at + 2 * padded(ld)),
                      (float *)(at + 3 * padded(ld))};
    return state;
}

void fastattn_state_clear(fa_state *state) {
    for (int64_t r = 0; r < state->ld; r++) {
        state->m[r] = -INFINITY;
        state->l[r] = 0.0f;
        state->seen[r] = 0.0f;
    }
    memset(state->o, 0, (size_t)(state->ld * state->v_head_dim) * sizeof(float));
}

void fastattn_state_merge(fa_state *state, const fa_state *other, float c) {
    for (int64_t r = 0; r < state->ld; r++) {
        if (other->seen[r] == 0.0f) continue;
        const float m = state->m[r] > other->m[r] ? state->m[r] : other->m[r];
        const float base = m == -INFINITY ? 0.0f : m;
        const float mine = exp2f((state->m[r] - base) * c), theirs = exp2f((other->m[r] - base) * c);
        state->m[r] = m;
        state->l[r] = state->l[r] * mine + other->l[r] * theirs;
        state->seen[r] = 1.0f;
        for (int64_t d = r; d < state->ld * state->v_head_dim; d += state->ld)
            state->o[d] = state->o[d] * mine + other->o[d] * theirs;
    }
}

float fastattn_state_finish(const fa_state *state, int64_t r, double unit, const float *sink, float *lse) {
    if (state->seen[r] == 0.0f) {
        if (lse) *lse = sink ? *sink : -INFINITY;
        return 0.0f;
    }
    const double m = state->m[r] * unit;
    if (!sink) {
        if (lse) *lse = (float)(m + log(state->l[r]));
        return 1.0f / state->l[r];
    }
    const double top = m > *sink ? m : *sink;
    const double mine = exp(m - top), denominator = state->l[r] * mine + exp(*sink - top);
    if (lse) *lse = (float)(top + log(denominator));
    return (float)(mine / denominator);
}
