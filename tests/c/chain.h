/* A panel of queries that meets a block of keys and values, through the slots of one table of products. What a slot has made, only
 * others of the same table can read, so they run as a chain, each on what the one before has really made.
 *
 * The operands are laid out here once: test_products.c checks what each slot makes of them, bench/slots.c times it. */
#ifndef TEST_CHAIN_H
#define TEST_CHAIN_H

#include "slots.h"

enum chain_slot { CHAIN_PACK, CHAIN_KEYS, CHAIN_VALUES, CHAIN_QK, CHAIN_SOFTMAX, CHAIN_BESIDE, CHAIN_PV, CHAIN_UNPACK, CHAIN_SLOTS };

struct chain {
    /* What the caller sets. */
    const fa_products *by;
    fastattn_dtype dtype;
    struct columns c;
    int64_t head_dim, v_head_dim, gap; /* elements of a row, and between rows */
    int64_t block, from, keys;         /* keys of the block, and those of them that are used: by pv, */
    int64_t part;                      /* and by one step of qk and softmax */
    float sign, unit;                  /* of the queries, and of the scores' exponents */
    int as_stored;                     /* there is no room for keys and values */

    /* What chain_lay_out allocates: guarded, inputs random, panels UNTOUCHED. */
    const void *rows_of[FA_PANEL_ROWS];
    void *outputs[FA_PANEL_ROWS];
    fa_matrix k, v, keys_made, values_made;
    float *k_room, *v_room, *q, *s, *p, *o, *m, *l, *alpha, *factor; /* l may be null where there are sums */
    float *next;                                                     /* scores that are made beside the softmax */
};

/* Allocates the operands; guard_release frees them. */
void chain_lay_out(struct chain *x);

/* Runs a slot; CHAIN_BESIDE is there when the table has it. */
void chain_run(struct chain *x, enum chain_slot slot);

/* The same after the vector registers and the stack have been filled with a byte, so that what a slot makes of either shows. */
void chain_run_after(struct chain *x, enum chain_slot slot, uint8_t garbage);

#endif
