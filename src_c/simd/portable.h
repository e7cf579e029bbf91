/* The float32 lanes of the kernels in plain C: four at a time, in a shape that compilers turn into whatever the
 * baseline offers. The other headers of this folder define the same names in the same order. */
#ifndef FA_SIMD_PORTABLE_H
#define FA_SIMD_PORTABLE_H

#include "half.h"

#include <math.h>

#define SIMD_LANES 4
#define SIMD_TILE_VECTORS 2 /* vectors of rows in a register tile, at most */
#define SIMD_TILE_WIDTH(vectors) 4 /* broadcast elements beside them */
#define SIMD_PLAIN /* vectors are what compilers make of loops: keys of 16 bits become float32 a run at a time, for few rows too */

typedef struct simd_f { float lane[4]; } simd_f;
typedef struct simd_m { int lane[4]; } simd_m;
typedef struct simd_h { uint16_t lane[4]; } simd_h; /* as many 16-bit numbers */

#define SIMD_EACH(i) for (int i = 0; i < 4; i++)

/* Asks the second-level cache for the line at p, to be read soon. (A macro: gcc drops calls of functions that only prefetch.) */
#define simd_fetch(p) ((void)(p))
static inline simd_f simd_set1(float x) { return (simd_f){{x, x, x, x}}; }
static inline simd_f simd_load(const float *p) { simd_f r; memcpy(&r, p, sizeof r); return r; }
static inline void simd_store(float *p, simd_f a) { memcpy(p, &a, sizeof a); }
static inline simd_h simd_load_h(const uint16_t *p) { simd_h r; memcpy(&r, p, sizeof r); return r; }
static inline void simd_store_h(uint16_t *p, simd_h a) { memcpy(p, &a, sizeof a); }
/* The first n lanes, which are not all: nothing else is read, but for 0 in its place, or written. */
static inline simd_f simd_load_part(const float *p, int64_t n) { simd_f r = {{0}}; SIMD_EACH(i) if (i < n) r.lane[i] = p[i]; return r; }
FA_OUT_OF_LINE void simd_store_part(float *p, simd_f a, int64_t n) { SIMD_EACH(i) if (i < n) p[i] = a.lane[i]; }
static inline simd_h simd_load_h_part(const uint16_t *p, int64_t n) { simd_h r = {{0}}; SIMD_EACH(i) if (i < n) r.lane[i] = p[i]; return r; }
FA_OUT_OF_LINE void simd_store_h_part(uint16_t *p, simd_h a, int64_t n) { SIMD_EACH(i) if (i < n) p[i] = a.lane[i]; }
static inline simd_f simd_from_f16(simd_h a) { simd_f r; SIMD_EACH(i) r.lane[i] = fa_from_f16(a.lane[i]); return r; }
static inline simd_f simd_from_bf16(simd_h a) { simd_f r; SIMD_EACH(i) r.lane[i] = fa_from_bf16(a.lane[i]); return r; }
/* Integers of a byte; the lower or the upper halves of bytes, less 8; and back to bytes, rounded to nearest, of what fits. */
static inline simd_f simd_load_i8(const void *p) {
    const signed char *const n = p;
    return (simd_f){{n[0], n[1], n[2], n[3]}};
}
static inline simd_f simd_load_i4(const void *p, int upper) {
    const uint8_t *const n = p;
    const int shift = upper ? 4 : 0;
    return (simd_f){{(float)((n[0] >> shift & 15) - 8), (float)((n[1] >> shift & 15) - 8), (float)((n[2] >> shift & 15) - 8),
                     (float)((n[3] >> shift & 15) - 8)}};
}
static inline void simd_store_i8(void *p, simd_f a) { /* the addition leaves no fraction, and the integer in the lowest bits */
    SIMD_EACH(i) ((uint8_t *)p)[i] = (uint8_t)(fa_to_bits(a.lane[i] + 12582912.0f) & 0xffu);
}
/* Numbers that fit, rounded likewise: the lower and the upper halves of bytes, plus 8. */
static inline void simd_store_i4(void *p, simd_f low, simd_f high) {
    SIMD_EACH(i) {
        const uint32_t upper = fa_to_bits(high.lane[i] + 12582912.0f) << 4;
        ((uint8_t *)p)[i] = (uint8_t)((fa_to_bits(low.lane[i] + (12582912.0f + 0x88)) + upper) & 0xffu);
    }
}
/* Of lanes that are pairs of bfloat16, the first numbers, which are the lower halves, and the second. */
static inline simd_f simd_first_bf16(simd_f a) { SIMD_EACH(i) a.lane[i] = fa_from_bits(fa_to_bits(a.lane[i]) << 16); return a; }
static inline simd_f simd_second_bf16(simd_f a) { SIMD_EACH(i) a.lane[i] = fa_from_bits(fa_to_bits(a.lane[i]) & 0xffff0000u); return a; }
FA_OUT_OF_LINE simd_h simd_to_f16(simd_f a) { simd_h r; SIMD_EACH(i) r.lane[i] = fa_to_f16(a.lane[i]); return r; }
FA_OUT_OF_LINE simd_h simd_to_bf16(simd_f a) { simd_h r; SIMD_EACH(i) r.lane[i] = fa_to_bf16(a.lane[i]); return r; }
static inline simd_f simd_load_bool(const uint8_t *p) { simd_f r; SIMD_EACH(i) r.lane[i] = p[i] ? 0.0f : -INFINITY; return r; }
static inline simd_f simd_load_every_second_bool(const uint8_t *p) { simd_f r; SIMD_EACH(i) r.lane[i] = p[2 * i] ? 0.0f : -INFINITY; return r; }
/* Doubles, rounded; what is finite stays so. */
FA_OUT_OF_LINE simd_f simd_load_double(const double *p) {
    simd_f r;
    SIMD_EACH(i) {
        const double largest = 0x1.fffffep127, x = p[i];
        r.lane[i] = (float)(x - x != 0 ? x : x < -largest ? -largest : x > largest ? largest : x);
    }
    return r;
}
static inline simd_f simd_add(simd_f a, simd_f b) { SIMD_EACH(i) a.lane[i] += b.lane[i]; return a; }
static inline simd_f simd_sub(simd_f a, simd_f b) { SIMD_EACH(i) a.lane[i] -= b.lane[i]; return a; }
static inline simd_f simd_mul(simd_f a, simd_f b) { SIMD_EACH(i) a.lane[i] *= b.lane[i]; return a; }
static inline simd_f simd_div(simd_f a, simd_f b) { SIMD_EACH(i) a.lane[i] /= b.lane[i]; return a; }
/* a * b + c; fused where the instruction set has it. */
static inline simd_f simd_fma(simd_f a, simd_f b, simd_f c) { SIMD_EACH(i) a.lane[i] = a.lane[i] * b.lane[i] + c.lane[i]; return a; }
/* a * b - c, likewise. */
static inline simd_f simd_fms(simd_f a, simd_f b, simd_f c) { SIMD_EACH(i) a.lane[i] = a.lane[i] * b.lane[i] - c.lane[i]; return a; }
/* The larger one; b where either is NaN. */
static inline simd_f simd_max(simd_f a, simd_f b) { SIMD_EACH(i) a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; return a; }
/* The smaller one; b where either is NaN. */
static inline simd_f simd_min(simd_f a, simd_f b) { SIMD_EACH(i) a.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; return a; }
static inline simd_f simd_abs(simd_f a) { SIMD_EACH(i) a.lane[i] = fabsf(a.lane[i]); return a; }
static inline simd_m simd_lt(simd_f a, simd_f b) { simd_m r; SIMD_EACH(i) r.lane[i] = a.lane[i] < b.lane[i]; return r; }
static inline simd_m simd_eq(simd_f a, simd_f b) { simd_m r; SIMD_EACH(i) r.lane[i] = a.lane[i] == b.lane[i]; return r; }
static inline simd_m simd_or(simd_m a, simd_m b) { SIMD_EACH(i) a.lane[i] |= b.lane[i]; return a; }
static inline simd_m simd_not(simd_m a) { SIMD_EACH(i) a.lane[i] = !a.lane[i]; return a; }
static inline int simd_any(simd_m a) { return a.lane[0] | a.lane[1] | a.lane[2] | a.lane[3]; }
static inline simd_f simd_select(simd_m m, simd_f a, simd_f b) { SIMD_EACH(i) a.lane[i] = m.lane[i] ? a.lane[i] : b.lane[i]; return a; }
/* a * 2**n, or 0 where m, for an integer n from -126 to 127 (or NaN). */
static inline simd_f simd_scale2(simd_m m, simd_f a, simd_f n) {
    SIMD_EACH(i) a.lane[i] = m.lane[i] ? 0.0f : a.lane[i] * fa_from_bits((fa_to_bits(n.lane[i] + 12583039.0f) & 0xffu) << 23);
    return a;
}
/* Exchanges rows and lanes of a square of SIMD_LANES vectors. */
static inline void simd_transpose(simd_f v[4]) {
    SIMD_EACH(i) for (int j = 0; j < i; j++) {
        float x = v[i].lane[j];
        v[i].lane[j] = v[j].lane[i];
        v[j].lane[i] = x;
    }
}
/* Lane n of every four, a constant, in all of these. */
static inline simd_f simd_spread(simd_f x, int n) { return simd_set1(x.lane[n]); }
/* Two vectors of pairs to their first numbers, in a, and their second ones, in b; and back. */
static inline void simd_unzip(simd_f *a, simd_f *b) {
    const simd_f x = *a, y = *b;
    *a = (simd_f){{x.lane[0], x.lane[2], y.lane[0], y.lane[2]}};
    *b = (simd_f){{x.lane[1], x.lane[3], y.lane[1], y.lane[3]}};
}
static inline void simd_zip(simd_f *a, simd_f *b) {
    const simd_f x = *a, y = *b;
    *a = (simd_f){{x.lane[0], y.lane[0], x.lane[1], y.lane[1]}};
    *b = (simd_f){{x.lane[2], y.lane[2], x.lane[3], y.lane[3]}};
}
/* Lanes that are `apart` from each other, a power of two and a constant, become their sum and the first less the second. */
static inline simd_f simd_butterfly(simd_f a, int apart) {
    simd_f r;
    SIMD_EACH(i) r.lane[i] = i & apart ? a.lane[i ^ apart] - a.lane[i] : a.lane[i] + a.lane[i ^ apart];
    return r;
}
/* Lane i is the sum of the lanes of v[i], for SIMD_LANES vectors. */
static inline simd_f simd_sum_lanes(const simd_f v[4]) {
    simd_f r;
    SIMD_EACH(i) r.lane[i] = (v[i].lane[0] + v[i].lane[1]) + (v[i].lane[2] + v[i].lane[3]);
    return r;
}
/* The sum of the lanes, to the same bits, and the largest of them. */
static inline float simd_sum(simd_f a) { return (a.lane[0] + a.lane[1]) + (a.lane[2] + a.lane[3]); }
static inline float simd_largest(simd_f a) {
    float largest = a.lane[0];
    SIMD_EACH(i) largest = a.lane[i] > largest ? a.lane[i] : largest;
    return largest;
}
/* Lane i is the largest lane of v[i % 4]. */
static inline simd_f simd_largest_of_four(const simd_f v[4]) {
    simd_f r;
    SIMD_EACH(i) r.lane[i] = simd_largest(v[i]);
    return r;
}

#undef SIMD_EACH

#endif
