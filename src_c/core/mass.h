/* Attention without values: the weights of a row are summed for each segment of the keys, in the row of the output itself, which no
 * number of segments makes the state larger. */
#ifndef FA_MASS_H
#define FA_MASS_H

#include "block.h"

/* The rows of a panel before any key. */
void fastattn_mass_begin(fa_panel *panel, const fa_state *state);

/* Adds the weights p of some rows and keys, relative to a maximum that has moved by alpha to where it is now. */
void fastattn_mass_add(fa_work *w, const fa_operands *x, const float *alpha, const float *p, int row, int rows, int64_t from, int64_t keys);

/* The rows become sums of weights, relative to the maximum of the state of all keys, times factor[row]. */
void fastattn_mass_finish(const fa_call *call, fa_panel *panel, const fa_state *state, const float *factor);

#endif
