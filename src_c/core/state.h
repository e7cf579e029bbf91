/* The state of attention over a set of keys, for the rows of a panel: maximum m, denominator l, and o = sum of p * v, all
 * relative to 2**(c * m). States over disjoint sets merge exactly (Milakov and Gimelshein 2018; Dao et al. 2022). */
#ifndef FA_STATE_H
#define FA_STATE_H

#include "../ukernel/ukernel.h"

typedef struct fa_state {
    int64_t rows, v_head_dim;
    float *m;                  /* [rows] */
    float *l;                  /* [rows] */
    float *seen;               /* [rows] 1 where a key was visible: -inf scores alone cannot tell */
    float *o;                  /* number d of row r at o[r * of_row + d * of_number] */
    int64_t of_row, of_number; /* one of them is 1 */
    float *norm; /* the sum of row r's powers as they were multiplied by the values, rounded, at norm[r * of_norm]: what o is divided
                    by. Or l */
    int64_t of_norm;
} fa_state;

/* Room for a state of at most so many rows, a multiple of FA_ROW_STEP or 1. */
size_t fastattn_state_bytes(int64_t rows, int64_t v_head_dim);

/* state becomes the one in `memory` of fastattn_state_bytes, as it stands, with o and norm as these products lay it out and sum; null:
 * as float32 products do. ld is that of their panels. */
void fastattn_state_at(fa_state *state, void *memory, const fa_products *products, int64_t rows, int ld, int64_t v_head_dim);

/* The state of no keys. */
void fastattn_state_clear(fa_state *state);

/* state becomes the state of both sets of keys; c as in fa_products.softmax. That of no keys changes no bit of a row. */
void fastattn_state_merge(fa_state *state, const fa_state *other, float c);

/* What row r's o must be multiplied by, and its lse. Scores times unit are logits; sink points to one more logit of the
 * denominator; null and -inf are none. */
float fastattn_state_finish(const fa_state *state, int64_t r, double unit, const float *sink, float *lse);

#endif
