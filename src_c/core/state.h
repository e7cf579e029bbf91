/* The state of attention over a set of keys, for the rows of a panel: maximum m, denominator l, and o = sum of p * v, all
 * relative to 2**(c * m). States over disjoint sets merge exactly (Milakov and Gimelshein 2018; Dao et al. 2022). */
#ifndef FA_STATE_H
#define FA_STATE_H

#include <stddef.h>
#include <stdint.h>

typedef struct fa_state {
    int64_t ld, v_head_dim;
    float *m;    /* [ld] */
    float *l;    /* [ld] */
    float *seen; /* [ld] 1 where a key was visible: -inf scores alone cannot tell */
    float *o;    /* [v_head_dim][ld] */
    float *norm; /* [ld] the sum of the powers as they were multiplied by the values, rounded: what o is divided by. Or l */
} fa_state;

size_t fastattn_state_bytes(int64_t ld, int64_t v_head_dim);

/* A state in `memory` of fastattn_state_bytes, as it stands. norm is row norm_row of o, beyond v_head_dim, or l if that is 0. */
fa_state fastattn_state_at(void *memory, int64_t ld, int64_t v_head_dim, int64_t norm_row);

/* The state of no keys, o included or not. */
void fastattn_state_clear(fa_state *state, int with_o);

/* state becomes the state of both sets of keys; c as in fa_products.softmax. */
void fastattn_state_merge(fa_state *state, const fa_state *other, float c);

/* What row r's o must be multiplied by, and its lse. Scores times unit are logits; sink points to one more logit of the
 * denominator; null and -inf are none. */
float fastattn_state_finish(const fa_state *state, int64_t r, double unit, const float *sink, float *lse);

#endif
