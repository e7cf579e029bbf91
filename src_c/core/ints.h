/* Whole-number helpers of the engine. */
#ifndef FA_INTS_H
#define FA_INTS_H

#include <stdint.h>

static inline int64_t fa_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t fa_max(int64_t a, int64_t b) { return a > b ? a : b; }
/* For a >= 0 and b > 0. */
static inline int64_t fa_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
/* Positions and windows are cut to 2**60, so that their sums cannot overflow. */
static inline int64_t fa_reach(int64_t x) {
    const int64_t far = (int64_t)1 << 60;
    return fa_max(-far, fa_min(far, x));
}

#endif
