/* The contract of the kernels of quantised rows, which fastattn.h lays out: a table of its own for each instruction set, and the two products
 * of few rows of queries, which the tables of ukernel.h name. */
#ifndef FA_QUANTISED_H
#define FA_QUANTISED_H

#include "ukernel.h"

/* What a table has of them: null, where the build leaves them out. */
#define FA_QUANTISED(slot) FA_HELD(FA_HOLDS_QUANTISED, slot)

typedef struct fa_quantised {
    /* to[key][dim] = from[key][d] in float32. */
    void (*widen)(float *to, fa_matrix from, int64_t keys, int64_t dim);

    /* 1 when all numbers are finite, whatever the integers are. */
    int (*finite)(fa_matrix rows, int64_t keys, int64_t dim);

    /* 1 when the magnitudes of n numbers are all below `most`, which that of NaN is not. */
    int (*within)(const float *row, int64_t n, float most);

    /* A row of dim numbers, quantised, where they are within what can be. */
    void (*quantise)(char *to, const float *row, int64_t dim, fastattn_dtype dtype);

    /* Each block of the largest power of two that divides dim, times the orthonormal Hadamard matrix; to may be from. */
    void (*hadamard)(float *to, const float *from, int64_t dim);
} fa_quantised;

#define FA_QUANTISED_OF(suffix)                                                                                                 \
    extern const fa_quantised fastattn_quantised_##suffix;                                                                      \
    void fastattn_quantised_qk_##suffix(float *s, const float *q, int ld, int rows, fa_matrix k, int64_t from, int64_t keys,     \
                                        int64_t head_dim);                                                                      \
    void fastattn_quantised_pv_##suffix(float *o, const float *alpha, const float *p, int ld, int rows, fa_matrix v, int64_t from, \
                                        int64_t keys, int64_t v_head_dim);

FA_QUANTISED_OF(portable)
FA_QUANTISED_OF(avx2)
FA_QUANTISED_OF(avx512)
FA_QUANTISED_OF(neon)
FA_QUANTISED_OF(wasm)

/* The same two by AVX512-VNNI, of queries in bfloat16 or float16, which a slot of their own packs, and weights of 16 bits. */
void fastattn_quantised_pack_vnni(float *q, int ld, const void *const *rows_of, int rows, int64_t head_dim, fastattn_dtype dtype, float sign);
void fastattn_quantised_qk_vnni(float *s, const float *q, int ld, int rows, fa_matrix k, int64_t from, int64_t keys, int64_t head_dim);
void fastattn_quantised_pv_vnni(float *o, const float *alpha, const float *p, int ld, int rows, fa_matrix v, int64_t from, int64_t keys,
                                int64_t v_head_dim);

/* And by SDOT of AArch64. */
void fastattn_quantised_pack_sdot(float *q, int ld, const void *const *rows_of, int rows, int64_t head_dim, fastattn_dtype dtype, float sign);
void fastattn_quantised_qk_sdot(float *s, const float *q, int ld, int rows, fa_matrix k, int64_t from, int64_t keys, int64_t head_dim);
void fastattn_quantised_pv_sdot(float *o, const float *alpha, const float *p, int ld, int rows, fa_matrix v, int64_t from, int64_t keys,
                                int64_t v_head_dim);

#endif
