#include "state.h"

#include <math.h>
#include <string.h>

static const double ln_2 = 0.693147180559945309;

static size_t padded(int64_t floats) { return ((size_t)floats * sizeof(float) + 63) / 64 * 64; }

size_t fastattn_state_bytes(int64_t ld, int64_t v_head_dim) { return 3 * padded(ld) + padded(ld * v_head_dim); }

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
        /* The base is rounded as in the softmax slot, so that the powers agree. */
        const float base = m == -INFINITY ? 0.0f : m * c;
        const float mine = exp2f(fmaf(state->m[r], c, -base)), theirs = exp2f(fmaf(other->m[r], c, -base));
        state->m[r] = m;
        state->l[r] = state->l[r] * mine + other->l[r] * theirs;
        state->seen[r] = 1.0f;
        for (int64_t d = r; d < state->ld * state->v_head_dim; d += state->ld)
            state->o[d] = state->o[d] * mine + other->o[d] * theirs;
    }
}

float fastattn_state_finish(const fa_state *state, int64_t r, float c, const float *sink, float *lse) {
    if (state->seen[r] == 0.0f) {
        if (lse) *lse = sink ? *sink : -INFINITY;
        return 0.0f;
    }
    const float base = state->m[r] == -INFINITY ? 0.0f : state->m[r] * c;
    if (!sink) {
        if (lse) *lse = (float)(base * ln_2 + log(state->l[r]));
        return 1.0f / state->l[r];
    }
    const double one_more = *sink / ln_2, top = base > one_more ? base : one_more;
    const double mine = exp2(base - top), denominator = state->l[r] * mine + exp2(one_more - top);
    if (lse) *lse = (float)((top + log2(denominator)) * ln_2);
    return (float)(mine / denominator);
}
