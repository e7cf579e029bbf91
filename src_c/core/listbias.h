/* What is added to the scores of listed keys. */
#ifndef FA_LISTBIAS_H
#define FA_LISTBIAS_H

#include "keyblocks.h"

/* Fills the bias of a block of places: mask and ALiBi of the key that is there, -inf where there is none that the panel's query sees.
 * Returns FA_MASK_ bits, and writes nothing if all that they say is that every place has a key. */
unsigned fastattn_bias_of_list(const fa_call *call, const fa_panel *panel, const fa_key_block *block, const fa_products *products, int ld,
                               float *bias);

#endif
