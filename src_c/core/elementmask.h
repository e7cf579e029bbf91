/* The element masks of a block-sparse pattern, turned from bits into what the rows of a panel see. */
#ifndef FA_ELEMENTMASK_H
#define FA_ELEMENTMASK_H

#include "keyblocks.h"

/* Keys of a block. */
typedef struct fa_key_range {
    int64_t from, to;
} fa_key_range;

/* Hides in the bias of these products, which holds the mask if the call has one and else nothing yet, what the block's bits or list hide, and
 * sets keys_of to the keys that some row of each group of FA_ROW_STEP sees. Returns FA_MASK_ bits; the bias is whole only if both. */
unsigned fastattn_hide_by_bits(const fa_call *call, const fa_panel *panel, const fa_key_block *block, const fa_products *products, int ld,
                               float *bias, fa_key_range *keys_of);

#endif
