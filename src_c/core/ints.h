/* Whole-number helpers of the engine. */
#ifndef FA_INTS_H
#define FA_INTS_H

#include <stdint.h>

static inline int64_t fa_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t fa_max(int64_t a, int64_t b) { return a > b ? a : b; }
/* For a >= 0 and b > 0. */
static inline int64_t fa_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#endif
