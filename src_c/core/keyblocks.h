/* The keys of a panel, block by block: only those that some row may see. Dense, causal, windowed, of limited length or
 * block-sparse, the loop that asks cannot tell. */
#ifndef FA_KEYBLOCKS_H
#define FA_KEYBLOCKS_H

#include "panel.h"

typedef struct fa_key_block {
    int64_t first;                     /* key */
    int64_t keys;                      /* at most the entry's block_keys */
    int64_t run_first;                 /* the run of keys of which it is a part, whichever of them a panel sees: a multiple of FA_SUM_RUN */
    int64_t run_keys;                  /* before it, and at most the entry's block_keys */
    int partial;                       /* some row does not see some key by its position */
    const uint8_t *bits;               /* element mask (see fastattn_block_mask) from the first key on, or null */
    int64_t bits_stride;               /* bytes from one key's bits to the next */
    int64_t bits_query;                /* the query of bit 0 */
    const fastattn_block_mask *listed; /* or what the list from `entry` up to `last_entry` leaves of it, or null */
    int64_t listed_key;                /* the mask's key that is the block's first */
    int64_t entry, last_entry;
} fa_key_block;

typedef struct fa_key_blocks {
    int64_t next, end;          /* keys that some row sees by position */
    int64_t full_from, full_to; /* keys that every row sees by position */
    int64_t step;
    int64_t first_key, end_key; /* of the part; runs follow each other from its first key on */
    const fastattn_block_mask *mask;
    int whole_steps;           /* blocks are those that there are without a mask, whatever is listed of them */
    int64_t start;             /* the mask's key that is the entry's first */
    int64_t entry, last_entry; /* of the block row's list */
    int64_t run_end;           /* keys before it belong to blocks already taken from the list */
    int64_t block_row;
    const uint8_t *bits; /* element mask of the current block, at bits_first */
    int64_t bits_first;
} fa_key_blocks;

void fastattn_key_blocks(fa_key_blocks *blocks, const fa_call *call, const fa_panel *panel);

/* The next block, in ascending order of keys; 0 when there is none. */
int fastattn_next_key_block(fa_key_blocks *blocks, fa_key_block *block);

/* Whether the block hides keys by a list or an element mask. */
static inline int fa_hides(const fa_key_block *block) { return block->bits || block->listed; }

#endif
