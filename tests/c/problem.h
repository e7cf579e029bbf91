/* A call of fastattn_attention with all its buffers, and what it ought to compute.
 *
 * A spec describes a call in a few words; problem_build gives it guarded buffers full of seeded random numbers. The
 * numbers depend on the spec and the seed alone, never on where the buffers lie.
 */
#ifndef TEST_PROBLEM_H
#define TEST_PROBLEM_H

#include "harness.h"

/* How the four axes of an array lie in memory. */
enum layout {
    PACKED,     /* C order */
    SWAPPED,    /* (batch, row, head, last) in memory */
    PADDED,     /* three elements between rows */
    NEGATIVE,   /* padded, and backwards on the first three axes */
    SAME_BATCH, /* stride 0 on the first axis */
    SAME_HEAD,  /* stride 0 on the second axis */
    SAME_ROW,   /* stride 0 on the third axis */
    LAST_VECTOR_LAYOUT = SAME_ROW,
    SAME_PLANE,  /* for masks: stride 0 on the first two axes */
    TRANSPOSED,  /* for masks: the third axis is the contiguous one */
    BACKWARDS,   /* for masks: negative on all axes */
    SAME_COLUMN, /* for masks: stride 0 on the last axis */
    LAST_LAYOUT = SAME_COLUMN
};

struct spec {
    const char *name;
    int64_t batch, heads, kv_heads, q_len, kv_len, head_dim,
        v_head_dim; /* 0: 1 of the first three, v_head_dim as head_dim */
    fastattn_dtype q_dtype, kv_dtype;
    enum layout q_layout, k_layout, v_layout, out_layout;
    double amplitude; /* of q and k; 0: 1 */
    fastattn_precision precision;
    float softcap;
    int causal, windowed;
    int64_t window_left, window_right; /* when windowed */
    enum { OFFSET_DEFAULT, OFFSET_ZERO, OFFSET_RANDOM } offset;
    enum { LENGTHS_FULL, LENGTHS_RANDOM, LENGTHS_RAGGED } lengths; /* of keys; of keys and queries, from starts on */
    enum { MASK_NONE, MASK_BOOL, MASK_FLOAT16, MASK_BFLOAT16, MASK_FLOAT32, MASK_FLOAT64 } mask;
    enum layout mask_layout;
    double hidden; /* the fraction of the mask's elements that hide */
    enum { ALIBI_NONE, ALIBI_HEADS, ALIBI_ALL } alibi;
    int sinks, no_lse;
    int64_t block_size; /* 0: no block mask */
    int blocks_partial, blocks_by_batch, blocks_by_head;
    double blocks_density;
    int num_threads; /* 0 as in the header */
    int invariant;
};

struct block {
    void *memory;
    size_t size;
};

struct problem {
    fastattn_attention_args args;
    fastattn_block_mask blocks;
    struct block out, lse; /* the whole allocations, gaps and all */
    void *workspace;
    size_t workspace_size;
    /* writable views of the inputs, for tests that plant values before the run */
    void *q, *k, *v, *mask;
    float *alibi_slopes, *sinks;
    int64_t *query_offset, *kv_lengths, *kv_starts, *q_lengths, *indptr;
    int32_t *indices, *partial;
    uint8_t *element_bits;
};

void problem_build(struct problem *problem, const struct spec *spec, uint64_t seed, enum guard_side side);

/* The inputs become read-only and the workspace is allocated, exactly as large as asked for. */
void problem_seal(struct problem *problem, enum guard_side side);

/* Fills the outputs with a pattern that problem_untouched and problem_verify look for. */
void problem_blank(const struct problem *problem);
void problem_untouched(const struct problem *problem);

/* Compares the outputs with the oracle, and every byte between their rows with the pattern. slack multiplies the
 * tolerance. */
void problem_verify(const struct problem *problem, double slack);

/* Seals, blanks, runs and verifies. */
void problem_check(struct problem *problem, enum guard_side side);

/* Seals and runs: the status is this one, for fastattn_explain as well, and if it is an error there is no workspace and nothing was written.
 * Releases all. */
void problem_ends_with(const struct problem *problem, int status, const char *what);

/* The spec on either side of its pages: right, and the same bits on both. */
void spec_check(const struct spec *spec, uint64_t seed);

/* A spec of random options over small odd shapes. */
struct spec spec_random(struct rng *rng);
void spec_context(const struct spec *spec, uint64_t seed);

/* A copy of both outputs, from malloc, for comparisons of bits. */
uint8_t *problem_snapshot(const struct problem *problem);
int problem_equals(const struct problem *problem, const uint8_t *snapshot);

/* The unit roundings that the arithmetic of a call may show: of a score's terms, of the weights p, and of the values, which may
 * share one with the largest of a column. */
struct rounding {
    double score, weight, column;
};
struct rounding oracle_rounding(const fastattn_attention_args *args);

/* One row of attention in double precision, with how far float32 arithmetic may be from it. */
struct oracle_row {
    int64_t visible;
    double lse, lse_tolerance;
    double *out, *out_tolerance; /* v_head_dim each */
};
void oracle_row(const fastattn_attention_args *args, int64_t batch, int64_t head, int64_t row, struct rounding rounding,
                struct oracle_row *result);

size_t dtype_size(fastattn_dtype dtype);
double load(fastattn_dtype dtype, const void *address);
void store(fastattn_dtype dtype, void *address, double value);

/* The address of an element of a strided array whose last axis is contiguous. */
void *element(const void *base, const int64_t strides[3], fastattn_dtype dtype, int64_t i0, int64_t i1, int64_t i2,
              int64_t i3);
void *mask_element(const struct problem *problem, int64_t b, int64_t h, int64_t i, int64_t j);

#endif
