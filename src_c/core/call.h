/* One call: the caller's arguments, checked, and what follows from them. */
#ifndef FA_CALL_H
#define FA_CALL_H

#include "../ukernel/ukernel.h"
#include "check.h"
#include "threads.h"

enum {
    FA_MOST_BUNDLE = 32, /* panels of an item, if they are of FA_ROW_STEP rows, and fewer of more */
    FA_MOST_ABREAST = 8  /* heads of an item, if each is a panel */
};

/* The products of an entry, those in float32 for the blocks that do not fit the others, and those for panels of few rows. */
enum { FA_PREFERRED, FA_EXACT, FA_FEW, FA_WAYS };

typedef struct fa_ways {
    const fa_products *of[FA_WAYS];
} fa_ways;

/* Items of phase 0 compute; those of phase 1 merge the parts of a panel whose keys are split. */
enum { FA_COMPUTE, FA_MERGE, FA_PHASES };

/* How the rows of one (batch entry, key/value head) become panels.
 *
 * The `group` query heads that share a key/value head are packed into one sequence of rows, query by query:
 * row = query * group + head, so that a panel spans few queries and its causal edge stays short. A segment is a run of
 * rows that no panel crosses: all rows, or with a block mask the rows of one block row, with lists of keys those of one query. Where a block mask differs
 * between the heads of a group, each head is packed alone (group 1, heads_alone query heads in turn). The only rows of up to
 * most_beside key/value heads are a sequence as well, if their keys lie beside each other. */
typedef struct fa_rows {
    int64_t count;            /* rows of a packed sequence */
    int64_t segment;          /* rows of a segment, the last one may have fewer */
    int64_t panels_a_segment; /* each of panel_rows rows, the last one may have fewer */
    int64_t panels;           /* panels of a packed sequence */
    int panel_rows;           /* at most FA_PANEL_ROWS */
    int ld;                   /* panel_rows rounded up to FA_ROW_STEP */
} fa_rows;

/* How a batch entry of so many queries and keys is computed: all that its bits depend on, and nothing about its neighbours, the
 * threads, or what the caller's arrays hold besides. */
typedef struct fa_shape {
    int64_t q_len, kv_len; /* queries, and keys or places in a list of keys */
    const fa_products *products;
    fa_rows rows;
    int64_t block_keys;    /* keys in one step */
    int64_t splits;        /* parts of the keys, each an item of work */
    int64_t split_keys;    /* keys of a part, a multiple of block_keys */
    int64_t state_keys;    /* keys that are summed in one state: those of a part, unless an item takes several parts by turns */
    int prepared[FA_WAYS]; /* keys and values are not used as stored */
    int few_below;         /* panels of fewer rows are for the products by rows */
    int full_lanes;        /* and so are those of which a quarter of the lanes would be empty */
} fa_shape;

/* A batch entry: where it lies in the caller's arrays, and what of the call's work is its own. Its queries and keys count from 0. */
typedef struct fa_entry {
    fa_shape shape;
    int64_t batch;                  /* of arrays that have such an axis */
    int64_t query, q_room;          /* its first query among the rows of q, and all rows there that are its own, padding included */
    int64_t key;                    /* its first key among the rows of k and v */
    int64_t start;                  /* of its keys, those before the first, which no query sees: masks count from there */
    int64_t keys;                   /* that it has: as many as its shape, but where lists of keys are what the loop goes through */
    int64_t offset;                 /* position of its first query, where that of its first key is 0 */
    int64_t bundle;                 /* consecutive panels of an item: they share what is made of a block of keys, or lines of its rows */
    int64_t line;                   /* panels that bundles are cut from: of a packed sequence, or, if each has but one, of all */
    int64_t bundles;                /* of a line */
    int64_t first[FA_PHASES];       /* items of the entries before it */
    size_t partials, partial_bytes; /* the states of its parts, from the first partial on, and the bytes of each */
} fa_entry;

/* Scratch of one worker, as offsets in bytes from its beginning, and within it that of each panel of an item. */
typedef struct fa_scratch {
    size_t s, p, bias, shown, k[FA_WAYS], v[FA_WAYS], wide_k, wide_v, k_rows, v_rows, finite_v, panels;
    size_t bytes;
    struct {
        size_t q[FA_WAYS], o, total, rows, bytes;
    } panel; /* rows: vectors of one float a row, and row pointers */
} fa_scratch;

/* Query heads as rows. */
typedef struct fa_heads {
    int64_t a_kv_head; /* that read the same key/value head */
    int64_t beside;    /* key/value heads of a packed sequence: more than one where their rows lie beside each other */
    int64_t group;     /* in a packed sequence */
    int64_t sequences; /* packed ones, per batch entry */
} fa_heads;

/* How keys and values lie. */
typedef struct fa_stored {
    int quantised;            /* the products by rows read them, others what they become in float32, run by run */
    int widened;              /* few rows read keys of float32 alone, which these are not */
    int apart;                /* there are gaps between the rows of keys or values, as between pages */
    int v_in_k;               /* values are the first numbers of their keys, as those of latents are */
    int64_t k_bytes, v_bytes; /* of a row */
} fa_stored;

/* What becomes of products of queries and keys. */
typedef struct fa_scoring {
    int natural;    /* scores are finished by the rules; else the softmax scales them itself */
    int ruled;      /* the rules change every score */
    float sign;     /* multiplies q while packing */
    float exponent; /* of the softmax: powers are 2**(exponent * (score - maximum)) */
    double unit;    /* scores times unit are logits */
} fa_scoring;

/* What lies in the workspace, from its beginning in bytes. */
typedef struct fa_room {
    size_t entries, scratch, partials;
    size_t bytes; /* in all */
} fa_room;

/* A call in its workspace, to which it belongs: the public plan. */
typedef struct fastattn_plan {
    const fastattn_attention_args *args;
    const fa_ukernel *uk;
    const fa_products *products, *exact, *few; /* those that are preferred, those in float32, and those for few rows */
    int64_t panel_dim;                         /* numbers of a row in the panel of queries */
    fa_heads heads;
    fa_stored stored;
    fa_scoring scoring;
    fa_team team; /* as many threads as pay off, at most args->num_threads */
    int workers;  /* for which there is scratch */
    int64_t most_bundle, abreast;
    int64_t pointers; /* to rows, that a run has for keys and for values each */
    fa_shape shape;   /* that of the last entry */
    fa_scratch scratch;
    fa_room room;

    /* From here on set by fastattn_call_enter. */
    fa_entry *entries;        /* [batch], the longest first */
    int64_t items[FA_PHASES]; /* in all */
    int64_t alike[FA_PHASES]; /* items of each entry, if they are all of one shape, or 0 */
    int64_t paddings;         /* items of phase 0 after these, none or one for each entry: they clear the rows beyond q_lengths */

    fa_args own; /* the arguments, where args points to them */
} fa_call;

static inline fa_ways fastattn_ways(const fa_call *call, const fa_shape *shape) {
    return (fa_ways){{shape->products, call->exact, call->few}};
}

/* The way of a panel of so many rows of an entry. */
static inline int fastattn_way_of(const fa_shape *shape, int rows) {
    const int empty = shape->full_lanes && 4 * rows <= 3 * fa_round_up(rows, FA_ROW_STEP);
    return rows < shape->few_below || empty ? FA_FEW : FA_PREFERRED;
}

/* Checks the arguments and fills call. Reads the tables of lengths and of the block mask, and no other data. Without rows to compute or
 * to clear, entries and items stay 0. */
fastattn_status fastattn_call_prepare(fa_call *call, const fastattn_attention_args *args);

/* The call as it lies in a workspace of call->room.bytes bytes from now on, where it may have been prepared, with its entries: the tables
 * of lengths have been read for the last time. */
fa_call *fastattn_call_enter(const fa_call *call, void *workspace);

/* The entry that an item of a phase belongs to. */
const fa_entry *fastattn_entry_of(const fa_call *call, int phase, int64_t item);

#endif
