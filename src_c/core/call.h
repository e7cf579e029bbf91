/* One call: the caller's arguments, checked, and what follows from them. */
#ifndef FA_CALL_H
#define FA_CALL_H

#include "../ukernel/ukernel.h"
#include "check.h"
#include "threads.h"

enum { FA_MOST_BUNDLE = 32 }; /* panels of an item, if they are of FA_ROW_STEP rows, and fewer of more */

/* The products of the call, those in float32 for the blocks that do not fit the others, and those for panels of few rows. */
enum { FA_PREFERRED, FA_EXACT, FA_FEW, FA_WAYS };

typedef struct fa_ways {
    const fa_products *of[FA_WAYS];
} fa_ways;

/* How the rows of one (batch entry, key/value head) become panels.
 *
 * The `group` query heads that share a key/value head are packed into one sequence of rows, query by query:
 * row = query * group + head, so that a panel spans few queries and its causal edge stays short. A segment is a run of
 * rows that no panel crosses: all rows, or with a block mask the rows of one block row. Where a block mask differs
 * between the heads of a group, each head is packed alone (group 1, heads_alone query heads in turn). */
typedef struct fa_rows {
    int64_t group;            /* query heads in a packed sequence */
    int64_t sequences;        /* packed sequences per batch entry */
    int64_t count;            /* rows of a packed sequence */
    int64_t segment;          /* rows of a segment, the last one may have fewer */
    int64_t panels_a_segment; /* each of panel_rows rows, the last one may have fewer */
    int64_t panels;           /* panels of a packed sequence */
    int panel_rows;           /* at most FA_PANEL_ROWS */
    int ld;                   /* panel_rows rounded up to FA_ROW_STEP */
} fa_rows;

/* Scratch of one worker, as offsets in bytes from its beginning, and within it that of each panel of an item. */
typedef struct fa_scratch {
    int prepared[FA_WAYS]; /* there is room for keys and values, which are not used as stored */
    size_t s, p, bias, shown, k[FA_WAYS], v[FA_WAYS], finite_v, panels;
    size_t bytes;
    struct { size_t q[FA_WAYS], o, rows, bytes; } panel; /* rows: vectors of one float a row, and row pointers */
} fa_scratch;

typedef struct fa_call {
    fa_args own;           /* what args points to: a call cannot be copied */
    const fastattn_attention_args *args;
    const fa_ukernel *uk;
    const fa_products *products;
    fa_rows rows;
    int64_t panels;        /* of all batch entries */
    int apart;             /* there are gaps between the rows of keys or values */
    int64_t block_keys;    /* keys in one step */
    int64_t splits;        /* parts of the keys, each an item of work */
    int64_t split_keys;    /* keys of a part, a multiple of block_keys */
    int64_t bundle;        /* consecutive panels of an item, which share what is made of a block of keys */
    int64_t bundles;       /* of a packed sequence */
    int64_t items;         /* batch * sequences * bundles * splits */
    fa_team team;          /* as many threads as pay off, at most args->num_threads */
    int natural;           /* scores are finished by the rules; else the softmax scales them itself */
    float sign;            /* multiplies q while packing */
    float exponent;        /* of the softmax: powers are 2**(exponent * (score - maximum)) */
    double unit;           /* scores times unit are logits */
    fa_scratch scratch;
    size_t partial_bytes;  /* of the state of one part of a panel, where keys are split */
    size_t workspace;      /* bytes in all */
} fa_call;

static inline fa_ways fastattn_ways(const fa_call *call) {
    return (fa_ways){{call->products, call->uk->products, call->uk->few}};
}

/* The way of a panel of so many rows. */
static inline int fastattn_way_of(const fa_call *call, int rows) {
    return rows <= call->uk->few->panel_rows ? FA_FEW : FA_PREFERRED;
}

/* Checks the arguments and fills call. Reads the tables of lengths and of the block mask, and no other data. */
fastattn_status fastattn_call_prepare(fa_call *call, const fastattn_attention_args *args);

#endif
