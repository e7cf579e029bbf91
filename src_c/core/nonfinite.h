/* NaN and infinities among queries, keys and values: what they reach and what they must not. */
#ifndef FA_NONFINITE_H
#define FA_NONFINITE_H

#include "block.h"

/* The scores of queries and keys that are not finite, one by one: in parts, an infinity is no number. s is that of the row and key. */
void fastattn_mend_scores(fa_work *w, const fa_operands *x, float *s, int row, int rows, int64_t from, int64_t keys);

/* The values with 0 for NaN and infinities, times v_scale, in their storage type. */
fa_matrix fastattn_finite_values(fa_work *w, fa_matrix v, int64_t keys);

/* o += v p for the values that are not finite, in the rows that see them: 0 * NaN must not reach the others. What is finite
 * has gone through the product as ever, so that no other row's bits change. */
void fastattn_add_non_finite(fa_work *w, const fa_operands *x, int row, int rows, int64_t from, int64_t keys);

#endif
