/* What the products of a panel work on: queries as they want them, keys and values of a run as they lie or prepared. */
#ifndef FA_OPERANDS_H
#define FA_OPERANDS_H

#include "block.h"

/* The run that a block is part of. */
fa_run *fastattn_run_of(fa_work *w, const fa_key_block *block);

/* Whether all of these rows of a run are finite, found out once. */
int fastattn_all_finite(const fa_call *call, int *known, fa_matrix rows, int64_t keys, int64_t dim);

/* The keys and values of the whole run that the panel's products are made from: as stored, but quantised ones in float32, unless the
 * products read them. */
void fastattn_source_of(fa_work *w, fa_operands *x);

/* Queries, keys and values as the panel's products want them, or, for what does not fit those, as float32 products do. */
void fastattn_choose_operands(fa_work *w, fa_operands *x, const fa_key_block *block);

/* Asks for what this block and the next one will read, where the loop would wait for it. */
void fastattn_fetch_ahead(const fa_work *w, const fa_operands *x, const fa_key_block *block);

#endif
