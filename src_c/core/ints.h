/* Whole-number helpers of the engine. */
#ifndef FA_INTS_H
#define FA_INTS_H

#include "unlikely.h"

#include <stdint.h>

static inline int64_t fa_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t fa_max(int64_t a, int64_t b) { return a > b ? a : b; }
/* For a >= 0 and b > 0, which is mostly not less: to ask takes less than to divide. */
static inline int64_t fa_ceil_div(int64_t a, int64_t b) { return a <= b ? a > 0 : (a + b - 1) / b; }
/* Whether the product of an a and a b >= 0 is more than `most`, which may be too large for it to be told by multiplying. */
static inline int fa_product_exceeds(int64_t a, int64_t b, int64_t most) {
    return (a | b) <= INT32_MAX ? a * b > most : b != 0 && a > most / b;
}
/* a / b for an a >= 0 and a b > 0 that is mostly 1. (A test for 1 itself is one that compilers leave out.) */
static inline int64_t fa_divide(int64_t a, int64_t b) { return FA_UNLIKELY(b > 1) ? a / b : a; }
/* Positions and windows are cut to 2**60, so that their sums cannot overflow. */
static inline int64_t fa_reach(int64_t x) {
    const int64_t furthest = (int64_t)1 << 60;
    return fa_max(-furthest, fa_min(furthest, x));
}

#endif
