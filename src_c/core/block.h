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

/* A run of keys and values, which all panels of a sequence in an item that come to one of its blocks share. */
typedef struct fa_run {
    int64_t first, keys;
    int64_t abreast_before, abreast_after; /* heads of the item beside it */
    fa_matrix stored_k, stored_v;
    float *wide_k, *wide_v; /* room for them in float32, if they are quantised */
    fa_matrix widened_k, widened_v;
    int widened;                   /* they are there */
    const char **k_rows, **v_rows; /* room for pointers to rows in pages */
    int finite_k, finite_v;        /* -1: not known yet */
    fa_way ways[FA_WAYS];
} fa_run;

/* What a worker has at hand while it computes one panel of an item. */
typedef struct fa_work {
    const fa_call *call;
    fa_run *run;
    fa_panel panel;
    fa_state state, total; /* of a part, and of those before it that the item has taken */
    int64_t state_end;     /* keys from there on are for the next state */
    fa_activation activation;
    float *s, *p, *bias, *shown;
    char *finite_v;
    float *q[FA_WAYS];
    int packed[FA_WAYS]; /* q is there */
    int misfits;         /* blocks in a row that did not fit the products */
    float v_scale;       /* values are multiplied by it: 1, or FA_SHRINK of range.h */
    int q_finite;        /* all queries are, as far as that matters */
    fa_key_blocks blocks;
    fa_key_block block;                                /* the next one */
    int pending;                                       /* there is one */
    fa_key_range keys_of[FA_PANEL_ROWS / FA_ROW_STEP]; /* of a block that hides keys, what each group of rows may see */
} fa_work;

/* A block of keys and values, as the caller stores them and as the products want them, and what the rules say of them. */
typedef struct fa_operands {
    const fa_matrix *source_k, *source_v; /* what the whole run is prepared from */
    const fa_matrix *k, *v;               /* what has been prepared, or the source */
    int64_t first;                        /* key of the block, in its entry */
    int64_t before;                       /* keys of the run before the block */
    int64_t skip;                         /* keys of k and v before the block */
    const fa_products *products;
    const float *q;
    float *p;
    fa_score_rules rules;
    int ruled;   /* the rules change or hide some score, whichever keys are visible by their position */
    int mended;  /* some score has a part in an infinity, and the products are of numbers in parts */
    int careful; /* values are not taken as they are: some row must not be touched by one that is not finite, or the products
                    cannot take it, or they are scaled */
} fa_operands;

/* The keys and values of the block and what follows, as stored, or widened. */
static inline fa_matrix fa_stored_k(const fa_operands *x) { return fa_rows_from(*x->source_k, x->before); }
static inline fa_matrix fa_stored_v(const fa_operands *x) { return fa_rows_from(*x->source_v, x->before); }

/* The rules from a row and key on, in the layout of these products. */
static inline fa_score_rules fa_rules_at(const fa_operands *x, int row, int64_t key, int ld) {
    fa_score_rules moved = x->rules;
    if (moved.slopes) moved.slopes += row, moved.offset += row;
    if (moved.end) moved.begin += row, moved.end += row;
    if (moved.bias) moved.bias += key * fa_key_of_scores(x->products, ld) + row * fa_row_of_scores(x->products, ld);
    return moved;
}

/* Takes the block into the panel's state. */
void fastattn_run_block(fa_work *w, const fa_key_block *block);

#endif
