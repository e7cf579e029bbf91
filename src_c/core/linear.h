/* One call of the linear family: the caller's arguments, checked, and what follows from them. */
#ifndef FA_LINEAR_H
#define FA_LINEAR_H

#include "../ukernel/ukernel.h"
#include "threads.h"

enum {
    FA_LINEAR_CHUNK = 64, /* tokens that are taken together, at most: a multiple of FA_ROW_STEP, and no more than a panel has rows */
    FA_LINEAR_STEPS = 4   /* so few are taken one by one */
};

/* Scratch of one worker, as offsets in floats from its beginning. Matrices of a chunk have a row for each token. */
typedef struct fa_linear_scratch {
    size_t s, z;                           /* the state, where it is not the caller's, and the sum of keys */
    size_t k, q, u, o;                     /* keys, queries, what is added for a key, answers */
    size_t weighted, keys;                 /* rows times factors; keys as columns */
    size_t weights, own;                   /* of the tokens of a chunk for each other: queries by keys, keys by keys */
    size_t a, before, after, within, left; /* factors of the tokens, and their products over parts of the chunk */
    size_t between;                        /* products from one token to another, of single factors */
    size_t beta, ones, sums, row;
    size_t floats;
} fa_linear_scratch;

typedef struct fa_linear_call {
    fastattn_linear_args own; /* what args points to: a call cannot be copied */
    const fastattn_linear_args *args;
    const fa_ukernel *uk;
    int64_t states, heads; /* of an entry; heads are those of out */
    int64_t group;         /* heads that a state answers */
    int64_t slices, slice; /* parts of the columns of v, which do not touch each other, and how many each has */
    int64_t items;         /* batch * states * slices */
    int64_t dim, columns;  /* head_dim and slice, rounded up to FA_ROW_STEP */
    fa_team team;
    fa_linear_scratch scratch;
    size_t workspace;
} fa_linear_call;

/* Where entry b lies along the axis of rows, and how many of its rows are real. */
typedef struct fa_sequence {
    int64_t first, rows, real;
} fa_sequence;

fa_sequence fastattn_linear_sequence(const fastattn_linear_args *args, int64_t b, int of_queries);

/* Everything but the check of the decays, which looks at all of them. */
fastattn_status fastattn_linear_prepare(fa_linear_call *call, const fastattn_linear_args *given);

#endif
