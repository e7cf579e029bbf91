/* One block of keys and values for one panel: the body of the loop in attention.c, and what it works on. */
#ifndef FA_BLOCK_H
#define FA_BLOCK_H

#include "elementmask.h"
#include "state.h"

/* Products, and what they make of the keys and values of a run. */
typedef struct fa_way {
    const fa_products *products;
    float *k_room, *v_room;
    fa_matrix k, v;
    int made; /* they are there */
} fa_way;

/* A run of keys and values, which all panels of an item that come to one of its blocks share. */
typedef struct fa_run {
    int64_t first, keys;
    fa_matrix stored_k, stored_v;
    int finite_k, finite_v; /* -1: not known yet */
    fa_way ways[FA_WAYS];
} fa_run;

/* What a worker has at hand while it computes one panel of an item. */
typedef struct fa_work {
    const fa_call *call;
    const fa_products *products;
    fa_run *run;
    fa_panel panel;
    fa_state state;
    float *s, *p, *bias, *shown;
    char *finite_v;
    float *q[FA_WAYS];
    int packed[FA_WAYS];      /* q is there */
    int misfits;              /* blocks in a row that did not fit the products */
    float v_scale;            /* values are multiplied by it: 1, or FA_SHRINK of range.h */
    int q_finite;             /* all queries are, as far as that matters */
    int few;                  /* the panel's rows are few: q, s, p and o are row-major, o in o_rows until the last block */
    int64_t q_pitch, s_pitch, o_pitch; /* then */
    float *q_rows, *o_rows;
    fa_key_blocks blocks;
    fa_key_block block; /* the next one */
    int pending;        /* there is one */
    fa_key_range keys_of[FA_PANEL_ROWS / FA_ROW_STEP]; /* of the block, what each group of rows may see */
} fa_work;

/* Takes the block into the panel's state. */
void fastattn_run_block(fa_work *w, const fa_key_block *block);

#endif
