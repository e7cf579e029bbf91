/* Single elements of any storage type. */
#ifndef FA_STORAGE_H
#define FA_STORAGE_H

#include "../simd/half.h"
#include "ukernel.h"

#include <float.h>
#include <math.h>
#include <string.h>

enum {
    FA_GROUP = 32,              /* numbers that share a scale, in int4 */
    FA_MOST_QUANTISED = 1 << 13 /* numbers of a row that is turned or quantised on its way into a cache */
};

static inline int fa_is_quantised(fastattn_dtype dtype) { return dtype == FASTATTN_INT8 || dtype == FASTATTN_INT4; }

/* Whether this library has kernels for it. */
static inline int fa_holds(fastattn_dtype dtype) {
    const int halves = dtype == FASTATTN_FLOAT16 || dtype == FASTATTN_BFLOAT16;
    return (FA_HOLDS_16BIT || !halves) && (FA_HOLDS_QUANTISED || !fa_is_quantised(dtype));
}

/* The same dtype, for compilers to see what it cannot be. (A macro: with nothing left out there is nothing left of it.) */
#define FA_HELD_OF(dtype) \
    (FA_HOLDS_16BIT || ((dtype) != FASTATTN_FLOAT16 && (dtype) != FASTATTN_BFLOAT16) ? (dtype) : FASTATTN_FLOAT32)

/* Bytes of an element; of quantised rows, to which they are aligned. */
static inline int64_t fa_size_of(fastattn_dtype dtype) {
    return dtype == FASTATTN_BOOL || fa_is_quantised(dtype) ? 1 : dtype == FASTATTN_FLOAT32 ? 4 : dtype == FASTATTN_FLOAT64 ? 8 : 2;
}

/* Bytes of a row, the scales included. */
static inline int64_t fa_row_bytes(fastattn_dtype dtype, int64_t dim) {
    return dtype == FASTATTN_INT8 ? dim + 4 : dtype == FASTATTN_INT4 ? dim / FA_GROUP * 18 : dim * fa_size_of(dtype);
}

/* The scale of number d of a quantised row. */
static inline float fa_scale_at(const char *row, int64_t d, int64_t dim, fastattn_dtype dtype) {
    float scale;
    uint16_t half;
    if (dtype == FASTATTN_INT8) {
        memcpy(&scale, row + dim, sizeof scale);
        return scale;
    }
    memcpy(&half, row + dim / 2 + d / FA_GROUP * (int64_t)sizeof half, sizeof half);
    return fa_from_f16(half);
}

/* Float32, float16 and bfloat16 alone: what q, k, v and out may be. */
static inline float fa_get(const void *at, fastattn_dtype dtype) {
    switch (dtype) {
    case FASTATTN_FLOAT16: return fa_from_f16(*(const uint16_t *)at);
    case FASTATTN_BFLOAT16: return fa_from_bf16(*(const uint16_t *)at);
    default: return *(const float *)at;
    }
}

/* Rounded; what is finite stays so, and within what is the largest of the type that it is for. */
static inline float fa_narrowed(double x, double largest) {
    return (float)(x < -largest && x >= -DBL_MAX ? -largest : x > largest && x <= DBL_MAX ? largest : x);
}

/* One element of a mask as a bias. A finite one beyond float32 stays finite: only exact -inf hides. */
static inline float fa_mask_element(const void *at, fastattn_dtype dtype) {
    switch (dtype) {
    case FASTATTN_BOOL: return *(const uint8_t *)at ? 0.0f : -INFINITY;
    case FASTATTN_FLOAT64: return fa_narrowed(*(const double *)at, FLT_MAX);
    default: return fa_get(at, dtype);
    }
}

static inline void fa_put_scale(char *row, float scale, int64_t d, int64_t dim, fastattn_dtype dtype) {
    const uint16_t half = fa_to_f16(scale);
    if (dtype == FASTATTN_INT8) memcpy(row + dim, &scale, sizeof scale);
    else memcpy(row + dim / 2 + d / FA_GROUP * (int64_t)sizeof half, &half, sizeof half);
}

/* Number d of a row, quantised or not. */
static inline float fa_get_of_row(const char *row, int64_t d, int64_t dim, fastattn_dtype dtype) {
    if (!fa_is_quantised(dtype)) return fa_get(row + d * fa_size_of(dtype), dtype);
    const unsigned char pair = (unsigned char)row[d / FA_GROUP * 16 + d % 16];
    const int integer = dtype == FASTATTN_INT8 ? (signed char)row[d] : (d & 16 ? pair >> 4 : pair & 15) - 8;
    return (float)integer * fa_scale_at(row, d, dim, dtype);
}

static inline void fa_put(void *at, float x, fastattn_dtype dtype) {
    switch (dtype) {
    case FASTATTN_FLOAT16: *(uint16_t *)at = fa_to_f16(x); break;
    case FASTATTN_BFLOAT16: *(uint16_t *)at = fa_to_bf16(x); break;
    default: *(float *)at = x;
    }
}

#endif
