/* Single elements of any storage type. */
#ifndef FA_STORAGE_H
#define FA_STORAGE_H

#include "../simd/half.h"
#include "fastattn.h"

/* Bytes of an element. */
static inline int64_t fa_size_of(fastattn_dtype dtype) {
    return dtype == FASTATTN_BOOL ? 1 : dtype == FASTATTN_FLOAT32 ? 4 : dtype == FASTATTN_FLOAT64 ? 8 : 2;
}

/* Float32, float16 and bfloat16 alone: what q, k, v and out may be. */
static inline float fa_get(const void *at, fastattn_dtype dtype) {
    switch (dtype) {
    case FASTATTN_FLOAT16: return fa_from_f16(*(const uint16_t *)at);
    case FASTATTN_BFLOAT16: return fa_from_bf16(*(const uint16_t *)at);
    default: return *(const float *)at;
    }
}

static inline void fa_put(void *at, float x, fastattn_dtype dtype) {
    switch (dtype) {
    case FASTATTN_FLOAT16: *(uint16_t *)at = fa_to_f16(x); break;
    case FASTATTN_BFLOAT16: *(uint16_t *)at = fa_to_bf16(x); break;
    default: *(float *)at = x;
    }
}

#endif
