/* The contract between the engine (core/) and the micro-kernels (ukernel/).
 *
 * Queries are lanes. A panel is up to FA_PANEL_ROWS query rows of one key/value head, transposed once so that every vector
 * of the kernels holds one number of FA_ROW_STEP or more different rows. With that orientation
 *
 *     scores   S[key][row]  = sum_d   K[key][d] * Q[d][row]
 *     values   O[d][row]    = O[d][row] * alpha[row] + sum_key V[key][d] * P[key][row]
 *
 * are the same product: an element of a row-major K or V, read in place and broadcast, times a vector of the panel.
 * Nothing of K or V is rearranged (rows that lie apart are moved together, if many will read them), the maximum and the sum of the
 * softmax are plain vertical operations, and rows never mix.
 *
 * Reads and writes per key and 64 rows, in floats: K head_dim and V v_head_dim from L2, once; the panels Q, P and O, from
 * L1, once for every group of keys or values that a register tile holds (six with AVX-512). That is 2 bytes a cycle of
 * L2 traffic at full speed, so keys may stream and only the panels must stay near.
 *
 * Few rows would leave most lanes empty. There the same products change sides: keys, turned a few at a time, and values as they
 * lie are the vectors, numbers of Q and P the single elements, and Q, S, P and O lie row by row. Which way a table takes it
 * says itself (by_rows; o_by_rows: the second product alone; q_by_rows: the queries); the loop, which only moves pointers, asks for
 * the strides below. Sums are formed in the same order either way, so that float32 tables can give a row the same bits.
 *
 *                   lanes are rows                  by rows
 *     q             [head_dim][ld]                  [rows][head_dim, whole vectors]
 *     s, p, bias    [keys][ld]                      [rows][ld]
 *     o             [v_head_dim][ld]                [rows][v_head_dim, whole vectors]
 *     ld            rows, rounded up                keys of a block, rounded up
 *
 * Whole vectors are of FA_ROW_STEP floats, to which ld is rounded up, too. Slots that take `rows` work on so many from the row that
 * their pointers point at: where lanes are rows a multiple of FA_ROW_STEP, of which those beyond the panel's repeat its last one;
 * by rows any number. What fills up vectors by rows may be read and written: q is 0 there, s, p and o anything. Panels are aligned to
 * 64 bytes; K, V, masks and outputs to their element only. Edges (any number of keys, any head_dim) belong to the slots. No slot
 * reads or writes outside of what is said here. */
#ifndef FA_UKERNEL_H
#define FA_UKERNEL_H

#include "fastattn.h"

/* What one side promises the other, checked where a build asks for that (-DFASTATTN_ASSERT); a promise that is broken is a trap. */
#ifdef FASTATTN_ASSERT
#define FA_ASSERT(promise) ((promise) ? (void)0 : __builtin_trap())
#else
#define FA_ASSERT(promise) ((void)(0 && (promise)))
#endif
#define FA_ALIGNED(pointer) (((uintptr_t)(pointer) & 63) == 0)

enum {
    FA_PANEL_ROWS = 64,       /* rows of a panel, at most */
    FA_ROW_STEP = 16,         /* every ISA's vectors divide it */
    FA_TILE = 32,             /* what any products pad keys and head_dim to, at most */
    FA_MOST_BLOCK_KEYS = 256, /* of any products' block_keys */
    FA_ROTATED_HEADS = 4,     /* heads whose rows are best turned together, by angles that are loaded once */
    FA_MANY_KEYS = 2048,      /* which no near cache holds: reading them decides */
    FA_WIDE_OVER_MANY = 64,   /* numbers of a head that is read front to back rather than turned, if rows are few */
    FA_SUM_RUN = 16           /* keys whose powers the softmax sums before it adds them to the rest */
};

/* Products that do not follow the maximum of the scores step by step let no power grow to this. It must leave room for values of
 * most sizes: where they are larger than FLT_MAX / (FA_MOST_POWER * keys), o may overflow, and is computed again. */
#define FA_MOST_POWER 4096.0f

/* What is done to the scores of a block, besides multiplying. Pointers marked [rows] are indexed by the row of the panel. */
typedef struct fa_score_rules {
    float scale;         /* applied first */
    float softcap;       /* 0: none */
    const float *slopes; /* [rows] ALiBi slopes, or null */
    const float *offset; /* [rows] p - j for the first key of the block; only with slopes */
    const float *begin;  /* [rows] first visible key, relative to the block, or null: all from the first */
    const float *end;    /* [rows] end of the visible keys, likewise; null exactly when begin is */
    const float *bias;   /* laid out as the scores; added; exactly -inf hides; or null */
} fa_score_rules;

/* Weights that are not a softmax, of a score s times scale: sigmoid(s + bias), factor * max(s, 0), factor * s**power. */
typedef struct fa_activation {
    fastattn_activation kind;
    int power;
    float scale, bias, factor;
} fa_activation;

/* Keys that follow each other: all of one segment, or, if it ascends, each of the segment after that of the key before. */
typedef struct fa_segment_run {
    int32_t segment; /* of the first; negative: of none */
    int keys, ascends;
} fa_segment_run;

/* What fa_products.mask found in a tile of mask. */
enum {
    FA_MASK_SHOWS = 1, /* some element is visible */
    FA_MASK_HIDES = 2  /* some element is hidden */
};

/* Rows in memory: at a stride, or, as those in pages, wherever pointers say. Rows of a page follow each other at the stride, and so
 * some of them share a pointer; but FA_SUM_RUN at most, so that whoever begins at a multiple of that begins with a pointer. Rows that have
 * pointers have them also for as many rows beyond those in use as a block has keys: what is read next. */
typedef struct fa_matrix {
    const char *at;
    int64_t stride; /* in bytes */
    fastattn_dtype dtype;
    const char *const *rows; /* or null: a pointer for every 2**shift of them, to where the first would be if all lay as these do */
    int shift;
    int64_t column;          /* with pointers, in the place of `at`: bytes from there on */
    int64_t ahead;      /* a hint: bytes, from any row to the one in its place among those that will be read next */
    int64_t rows_ahead; /* with pointers from the row so many on, a multiple of 2**shift; 0, or up to the keys of a block */
    int64_t beside;     /* bytes from what the panel's first row reads of any row to what the next one does; 0: all read the same */
} fa_matrix;

static inline fa_matrix fa_matrix_at(const char *at, int64_t stride, fastattn_dtype dtype) {
    const fa_matrix m = {.at = at, .stride = stride, .dtype = dtype};
    return m;
}

static inline const char *fa_row_at(fa_matrix m, int64_t row) {
    if (!m.rows) return m.at + row * m.stride;
    return (const char *)((uintptr_t)m.rows[row >> m.shift] + (uintptr_t)(row * m.stride + m.column));
}

/* Where what will be read next in the place of a row may be: nowhere, behind the last ones. */
static inline uintptr_t fa_row_ahead(fa_matrix m, int64_t row) {
    const int64_t later = row + (m.rows ? m.rows_ahead : 0);
    return (m.rows ? (uintptr_t)m.rows[later >> m.shift] + (uintptr_t)m.column : (uintptr_t)m.at) + (uintptr_t)(later * m.stride) +
           (uintptr_t)m.ahead;
}

/* The rows from one on; from one that is not the first of its pointer, those that share it. */
static inline fa_matrix fa_rows_from(fa_matrix m, int64_t row) {
    if (m.rows) m.rows += row >> m.shift, m.column += row * m.stride;
    else m.at += row * m.stride;
    return m;
}

/* What qk is called with. */
typedef struct fa_scores {
    float *s;
    const float *q;
    int ld, rows;
    fa_matrix k;
    int64_t from, keys, head_dim;
} fa_scores;

/* The two products and what is between them: how a panel of queries, keys, powers and values are laid out and multiplied.
 * Every panel has 4 bytes for a row (and, by rows, for a number), one float32 or a pair of halves. Keys and values of a block are
 * prepared once, into `room`, and then used from key `from` on, a multiple of FA_SUM_RUN. Stored rows may have pointers; prepared ones
 * have not, but where products by rows use them as stored. */
typedef struct fa_products {
    const char *name;
    fastattn_isa isa;
    int by_rows;     /* panels lie row by row: see above */
    int most_beside; /* rows of a panel, at most, that may each have keys and values of its own, beside each other; 0: none may */
    int q_by_rows;   /* q does: the lanes of the first product are numbers, and its sums lie as ever */
    int o_by_rows;   /* o does, although the others do not: values are read front to back */
    int fewest_rows; /* of a panel, for which they pay off; fewer are for the products by rows */
    int fewest_rows_wide; /* the same of wide heads */
    int wide;        /* numbers of such a head, at least, but over FA_MANY_KEYS or more, where FA_WIDE_OVER_MANY do */
    const struct fa_products *alone; /* for so few rows over FA_MANY_KEYS or more in bfloat16 that no panel is beside theirs; or null */
    const struct fa_products *fewer; /* in the place of these, for still fewer rows, whose bits may differ from those among many; or null */
    const struct fa_products *turned; /* likewise, for rows whose bits may not; or null */
    const struct fa_products *few; /* as exact, by rows for few of them over bfloat16 keys, in the place of the table's; or null */
    int panel_rows; /* rows of a panel, at most: Q, S, P and O must stay near, beside the rows of K or V in use */
    int block_keys; /* keys that are prepared, and whose values are added, at a time, at most */
    int score_keys; /* of these, whose scores are there at a time, at most: a multiple of FA_TILE, or block_keys */
    int pair_rows;  /* of the panel of powers, for two keys */
    int in_place;   /* p may be s, and where there is no room (null) for float32 keys or values, they are used as stored */
    int sums;       /* pv also sums p as it is multiplied, rounded, as one more number of o: the better divisor */
    int in_parts;   /* numbers are sums of parts: where q or k is infinite s is not, and v has to be finite */

    /* Around everything else, on the thread that does it; or null. */
    void (*enter)(void);
    void (*leave)(void);

    /* The panel of queries from sign * rows_of[r][d]. */
    void (*pack)(float *q, int ld, const void *const *rows_of, int rows, int64_t head_dim, fastattn_dtype dtype,
                 float sign);

    /* The stored keys or values as qk and pv want them. (Where rows have pointers there is room.) */
    fa_matrix (*keys)(float *room, fa_matrix stored, int64_t keys, int64_t head_dim);
    fa_matrix (*values)(float *room, fa_matrix stored, int64_t keys, int64_t v_head_dim);

    /* Whether scale times the scores of these keys, and sums of these values, are as exact as those of bfloat16 that float32 adds
     * up. The float32 products take the block where they are not, so sums has to be 0. Null: always. */
    int (*fits)(const float *q, int ld, fa_matrix k, int64_t keys, fa_matrix v, float scale);

    /* s[key][row] = sum over d of k[from + key][d] * q[d][row]; s of keys up to a multiple of FA_SUM_RUN may be written. Where o alone is by
     * rows, any number of them, the last of which fills up the vector. */
    void (*qk)(float *s, const float *q, int ld, int rows, fa_matrix k, int64_t from, int64_t keys, int64_t head_dim);

    /* The online softmax, in units of 2**c:  m' >= m,  alpha = 2**(c*(m - m')),  p = 2**(c*(s - m')),  l = l * alpha + sum p.
     * m' is the maximum of m and all s, or less by as much as keeps the powers below FA_MOST_POWER. A row that has seen only
     * -inf keeps m = -inf and gets p = 0. Powers below 2**-100 are 0, so that no subnormal number slows the products. s is
     * left as it is, unless it is p. l may be null where there are sums; nothing else depends on whether it is. */
    void (*softmax)(float *s, float *p, int ld, int rows, int64_t keys, float c, float *m, float *l, float *alpha);

    /* softmax, and meanwhile, on another unit, the qk of other keys: twice score_keys are at most block_keys. Or null. */
    void (*softmax_beside)(float *s, float *p, int ld, int rows, int64_t keys, float c, float *m, float *l, float *alpha,
                           const fa_scores *next);

    /* o[d][row] = o[d][row] * alpha[row] + sum over keys of v[from + key][d] * p[key][row]. The sum of a block is formed apart
     * and added once, which keeps the error of long sequences small. Where o alone is by rows, any number of them. */
    void (*pv)(float *o, const float *alpha, const float *p, int ld, int rows, fa_matrix v, int64_t from, int64_t keys,
               int64_t v_head_dim);

    /* p[key][row] */
    float (*power)(const float *p, int ld, int row, int64_t key);

    /* What is around the products, in float32 whatever they are, in the layout of their panels. */

    /* bias[key][row] = the mask: floats as they are, true 0, false -inf. Returns FA_MASK_ bits. key_stride is in bytes. */
    unsigned (*mask)(float *bias, int ld, const void *const *rows_of, int rows, int64_t key_stride, int64_t keys,
                     fastattn_dtype dtype);

    /* Applies the rules to s; hidden scores become -inf. first is the block's key that s begins with. seen[row] becomes
     * 1 where a key was visible. rules' pointers are already moved to the row and, for bias, to the key. */
    void (*scores)(float *s, int ld, int rows, int64_t first, int64_t keys, const fa_score_rules *rules, float *seen);

    /* outputs[r][d] = o[d][r] * factor[r], rounded to dtype, for `count` rows. Returns 1 when all products, where lanes are rows
     * also those that fill up the last vector, are finite. */
    int (*unpack)(void *const *outputs, int count, const float *o, int ld, const float *factor, int64_t v_head_dim,
                  fastattn_dtype dtype);
} fa_products;

/* n, at least 0, up to a multiple of step; without signs, as dividing by a power of two costs least. */
static inline int64_t fa_round_up(int64_t n, int64_t step) {
    return (int64_t)(((uint64_t)n + (uint64_t)step - 1) / (uint64_t)step * (uint64_t)step);
}

/* The first row of o that no value has, rounded up to tiles. */
static inline int64_t fa_sums_row(int64_t v_head_dim) { return fa_round_up(v_head_dim, FA_ROW_STEP); }

/* Rows of numbers in pairs, and the angles by which the pairs are turned: the same for some heads. Strides are in bytes. */
typedef struct fa_rotation {
    const char *x;
    char *out; /* x with the same strides, or nothing of x */
    const char *cos, *sin;
    int64_t x_head, out_head;
    int64_t x_row, out_row, cos_row, sin_row;
    int64_t heads, rows, head_dim; /* all heads of a row are turned by the same angles */
    int64_t pairs;   /* of the first 2 * pairs numbers of a row, which is head_dim at most; the rest is copied */
    int interleaved; /* pair n is numbers 2 * n and 2 * n + 1, else n and pairs + n */
    fastattn_dtype dtype;
} fa_rotation;

/* The fewest rows of a panel for which these products pay off. */
static inline int fa_fewest_rows(const fa_products *by, int64_t head_dim, int64_t keys) {
    return head_dim >= (keys >= FA_MANY_KEYS ? FA_WIDE_OVER_MANY : by->wide) ? by->fewest_rows_wide : by->fewest_rows;
}

/* Where things lie in the panels of a table, in floats. */
static inline int64_t fa_row_of_scores(const fa_products *by, int ld) { return by->by_rows ? ld : 1; }
static inline int64_t fa_key_of_scores(const fa_products *by, int ld) { return by->by_rows ? 1 : ld; }
/* Of q; and of o, where the sums of powers come after the numbers, rounded up. */
static inline int64_t fa_row_of_numbers(const fa_products *by, int64_t dim) {
    return by->by_rows || by->q_by_rows ? fa_round_up(dim, FA_ROW_STEP) : 1;
}
static inline int64_t fa_number_of_numbers(const fa_products *by, int ld) { return by->by_rows ? 1 : ld; }
static inline int64_t fa_sums_of_o(const fa_products *by, int64_t dim) {
    return by->o_by_rows ? fa_round_up(dim, FA_TILE) : fa_sums_row(dim);
}
static inline int64_t fa_row_of_o(const fa_products *by, int64_t dim) {
    return by->o_by_rows ? fa_sums_of_o(by, dim) + FA_ROW_STEP : fa_row_of_numbers(by, dim);
}
static inline int64_t fa_number_of_o(const fa_products *by, int ld) { return by->o_by_rows ? 1 : fa_number_of_numbers(by, ld); }

/* Algebra on dense matrices, row-major in float32, for what is not attention's loop. Lanes are columns: n is a multiple of
 * FA_ROW_STEP, and so many columns are read and written. Leading dimensions (ld) and steps are in floats, and nothing need be
 * aligned but to its elements. */
typedef struct fa_dense {
    /* c[i][j] = alpha[j] * c[i][j] + sum over t of a[i * across + t * along] * b[t][j], for i below m, j below n and t below k;
     * where alpha is null the sum alone. along or across is 1, and b does not overlap c. */
    void (*product)(float *c, int64_t ldc, const float *alpha, const float *a, int64_t across, int64_t along, const float *b,
                    int64_t ldb, int64_t m, int64_t n, int64_t k);

    /* to[i] = sum over j of x[i][j] * z[j]; rows is a multiple of FA_ROW_STEP. */
    void (*dots)(float *to, const float *x, int64_t ld, int64_t rows, const float *z, int64_t n);

    /* x[i][j] *= f[i * f_row + j * f_column], f_column being 0 or 1. In this slot and the next two what would be subnormal is 0. */
    void (*scale)(float *x, int64_t ld, int64_t rows, int64_t n, const float *f, int64_t f_row, int f_column);

    /* Running products down the columns: to[i] = a[0] * ... * a[i], or backward to[i] = a[i + 1] * ... * a[rows - 1]. */
    void (*running)(float *to, const float *a, int64_t ld, int64_t rows, int64_t n, int backward);

    /* to[i][j] = f[i * f_step] * from[i][j] + a[i] * b[j]; to may be from. */
    void (*rank_one)(float *to, int64_t ld_to, const float *from, int64_t ld_from, const float *f, int64_t f_step, const float *a,
                     const float *b, int64_t rows, int64_t n);

    /* x = e**x for x <= 0, to an ulp; 0 below -87. */
    void (*exps)(float *x, int64_t n);

    /* x = map(x) */
    void (*features)(float *x, int64_t n, fastattn_feature_map map);

    /* 1 when a number of these rows, of any storage type and length, is less than low or greater than high; a NaN is neither. */
    int (*outside)(fa_matrix x, int64_t rows, int64_t n, float low, float high);
} fa_dense;

/* What is done in float32 lanes whatever the products. */
typedef struct fa_ukernel {
    const fa_dense *dense;
    const struct fa_quantised *quantised; /* of quantised.h, or null */
    const fa_products *products; /* in float32, for every storage type: lanes are rows */
    const fa_products *few;      /* the same by rows, for fewer than any products want */
    const fa_products *turned;   /* as few, but that any number of rows gets the bits of `products` */
    const fa_products *few_quantised; /* these over quantised keys and values, which become numbers in registers; or null: then products by
                                         rows read keys of float32 alone, which a run at a time becomes for few rows as for many */

    /* The same two for additive scores, s[key][row] = sum over d of w[row][d] * tanh(k[from + key][d] + q[d][row]), with tanh to six
     * units in the last place: in the panel of queries those of w follow the numbers of q, from number fa_sums_row(head_dim) on. */
    const fa_products *additive, *additive_few;

    /* Scores become weights, in place: `lines` lines of n numbers, ld apart; -inf becomes 0. n is a multiple of FA_ROW_STEP. */
    void (*activate)(float *s, int64_t ld, int64_t lines, int64_t n, const fa_activation *activation);

    /* sums[segment] += factor * p[key] for the keys of these runs, one run after the other. */
    void (*gather)(float *sums, const float *p, float factor, const fa_segment_run *runs, int64_t count);

    /* to[key][head_dim] = from[key][d] in float32. */
    void (*widen)(float *to, fa_matrix from, int64_t keys, int64_t head_dim);

    /* Asks the caches for `bytes` of each of these rows. A hint: nothing else changes. */
    void (*fetch)(fa_matrix rows, int64_t keys, int64_t bytes);

    /* 1 when all of v is finite. */
    int (*finite)(fa_matrix v, int64_t keys, int64_t v_head_dim);

    /* to[d] = from[d] * factor, rounded to dtype; to may be from. Returns 1 when all are finite. */
    int (*narrow)(void *to, const float *from, float factor, int64_t count, fastattn_dtype dtype);

    /* weights[n][r] = exp(lses[n][first + r] - lse[r]) for `rows` rows, FA_ROW_STEP at most, where lse[r] is the logarithm of the sum;
     * where all are -inf, lse is, and the weights are 0. Returns 1 when none is -inf. Weights beyond the rows may be written. */
    int (*weigh)(float *weights, float *lse, const float *const *lses, int64_t parts, int64_t first, int64_t rows);

    /* out[r] = sum of weights[n * FA_ROW_STEP + r] * rows_of[n][r] in float32, rounded to dtype, which is that of the rows too: they lie
     * beside each other. Returns 1 when all of it is finite. */
    int (*mix)(void *out, const float *weights, const void *const *rows_of, int64_t parts, int64_t rows, int64_t dim,
               fastattn_dtype dtype);

    /* Pair n (a, b) of each row becomes (a * cos[n] - b * sin[n], b * cos[n] + a * sin[n]). Or null. */
    void (*rotate)(const fa_rotation *rotation);
} fa_ukernel;

/* The best table at or below the limit (FASTATTN_ISA_BEST: no limit) that this processor can run; null when the limit
 * names an instruction set that is not available. */
const fa_ukernel *fastattn_ukernel_select(fastattn_isa limit);

/* The fastest products under the same limit, beside that table's own, that are exact enough for queries of this dtype, which no key is wider
 * than; where a row is to be invariant, of those that give it bits of its own: float32, or such as give them alone as well. */
const fa_products *fastattn_products_select(const fa_ukernel *uk, fastattn_isa limit, fastattn_dtype q_dtype, fastattn_precision precision,
                                            int invariant);

/* What goes with those for few rows: their own if pairs are multiplied, else in float32 and with the bits of the table's; */
const fa_products *fastattn_few_select(const fa_ukernel *uk, const fa_products *products, fastattn_isa limit, fastattn_dtype q_dtype,
                                       fastattn_dtype kv_dtype);

/* and over quantised keys. */
const fa_products *fastattn_quantised_select(const fa_ukernel *uk, fastattn_isa limit, fastattn_dtype q_dtype, fastattn_precision precision);

/* The tables that a library holds: those of its architecture, but for what the build has left out (-DFASTATTN_NO_AVX512), which is
 * then not available. */
#if (defined(__x86_64__) || defined(_M_X64)) && !defined(FASTATTN_NO_AVX2)
#define FA_HOLDS_AVX2
#endif
#if (defined(__x86_64__) || defined(_M_X64)) && !defined(FASTATTN_NO_AVX512)
#define FA_HOLDS_AVX512
#endif
/* Besides AVX-512's, which do for all that is asked: what multiplies pairs of bfloat16, integers, and AMX's tiles, by inline assembly. */
#if defined(FA_HOLDS_AVX512) && defined(__GNUC__) && !defined(FASTATTN_NO_AVX512_BF16)
#define FA_HOLDS_AVX512_BF16
#endif
#if defined(FA_HOLDS_AVX512) && defined(__GNUC__) && !defined(FASTATTN_NO_AVX512_VNNI)
#define FA_HOLDS_AVX512_VNNI
#endif
#if defined(FA_HOLDS_AVX512) && defined(__GNUC__) && !defined(FASTATTN_NO_AMX)
#define FA_HOLDS_AMX
#endif
#if (defined(__aarch64__) || defined(_M_ARM64)) && !defined(FASTATTN_NO_NEON)
#define FA_HOLDS_NEON
#endif
#if defined(FA_HOLDS_NEON) && defined(__GNUC__) && !defined(FASTATTN_NO_16BIT)
#define FA_HOLDS_FMLAL
#endif
#ifdef __wasm_simd128__
#define FA_HOLDS_WASM
#endif
/* Plain C runs where nothing else does. Where every processor has vectors it is held for those who ask for it, with -DFASTATTN_PORTABLE. */
#if !(defined(FA_HOLDS_NEON) || defined(FA_HOLDS_WASM)) || defined(FASTATTN_PORTABLE)
#define FA_HOLDS_PORTABLE
#endif

/* What a build may leave out of all tables; a call that asks for it is refused. */
enum {
#ifdef FASTATTN_NO_16BIT
    FA_HOLDS_16BIT = 0, /* storage types: float16, bfloat16 */
#else
    FA_HOLDS_16BIT = 1,
#endif
#ifdef FASTATTN_NO_QUANTISED
    FA_HOLDS_QUANTISED = 0, /* int8, int4, and rows that are turned on their way into a cache: the sources quantised_*.c */
#else
    FA_HOLDS_QUANTISED = 1,
#endif
#ifdef FASTATTN_NO_MASK
    FA_HOLDS_MASK = 0,
#else
    FA_HOLDS_MASK = 1,
#endif
#ifdef FASTATTN_NO_SPARSE
    FA_HOLDS_SPARSE = 0, /* block masks, and lists of keys */
#else
    FA_HOLDS_SPARSE = 1,
#endif
#ifdef FASTATTN_NO_ADDITIVE
    FA_HOLDS_ADDITIVE = 0,
#else
    FA_HOLDS_ADDITIVE = 1,
#endif
#ifdef FASTATTN_NO_ACTIVATION
    FA_HOLDS_ACTIVATION = 0, /* weights that are not a softmax */
#else
    FA_HOLDS_ACTIVATION = 1,
#endif
#ifdef FASTATTN_NO_SEGMENTS
    FA_HOLDS_SEGMENTS = 0,
#else
    FA_HOLDS_SEGMENTS = 1,
#endif
#ifdef FASTATTN_NO_LINEAR
    FA_HOLDS_LINEAR = 0,
#else
    FA_HOLDS_LINEAR = 1,
#endif
#ifdef FASTATTN_NO_SELECT
    FA_HOLDS_SELECT = 0,
#else
    FA_HOLDS_SELECT = 1,
#endif
#ifdef FASTATTN_NO_MERGE
    FA_HOLDS_MERGE = 0,
#else
    FA_HOLDS_MERGE = 1,
#endif
#ifdef FASTATTN_NO_ROPE
    FA_HOLDS_ROPE = 0
#else
    FA_HOLDS_ROPE = 1
#endif
};
#define FA_HELD(held, slot) ((held) ? (slot) : NULL)

extern const fa_ukernel fastattn_ukernel_portable;
extern const fa_ukernel fastattn_ukernel_avx2;
extern const fa_ukernel fastattn_ukernel_avx512;
#ifdef FA_HOLDS_AVX512_BF16
extern const fa_ukernel fastattn_ukernel_avx512_bf16; /* the same, but that AVX512-BF16 rounds what `rotate` and `mix` write */
#endif
extern const fa_ukernel fastattn_ukernel_neon;
extern const fa_ukernel fastattn_ukernel_wasm;
extern const fa_products fastattn_products_bfloat16_avx512, fastattn_products_bfloat16_rows_avx512, fastattn_products_bfloat16_few_avx512;
extern const fa_products fastattn_products_bfloat16_turned_avx512;
extern const fa_products fastattn_products_int16_avx512, fastattn_products_bytes_avx512;
extern const fa_products fastattn_products_bfloat16_neon, fastattn_products_bytes_neon, fastattn_products_float16_neon;
extern const fa_products fastattn_products_bfloat16_amx;
extern const fa_products fastattn_products_bfloat16x3_amx, fastattn_products_float16_amx;

#endif
