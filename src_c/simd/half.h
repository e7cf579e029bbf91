/* Scalar conversions between float32 and the 16-bit types; rounding is to nearest, ties to even. And up to four of these as one
 * integer, the first in the lowest bits. */
#ifndef FA_SIMD_HALF_H
#define FA_SIMD_HALF_H

#include <stdint.h>
#include <string.h>

/* For operations that are long and seldom what takes the time: one of each, not one wherever it is used. */
#if defined(__GNUC__)
#define FA_OUT_OF_LINE static __attribute__((noinline, unused))
#else
#define FA_OUT_OF_LINE static inline
#endif

static inline float fa_from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint32_t fa_to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float fa_from_bf16(uint16_t h) { return fa_from_bits((uint32_t)h << 16); }

/* Without branches, here and below: compilers make vectors of loops over these. */
static inline uint16_t fa_to_bf16(float x) {
    const uint32_t bits = fa_to_bits(x), quiet = bits | 0x400000u, rounded = bits + 0x7fffu + (bits >> 16 & 1u);
    return (uint16_t)(((int32_t)(bits & 0x7fffffffu) > 0x7f800000 ? quiet : rounded) >> 16); /* a NaN stays one */
}

static inline float fa_from_f16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, rest = h & 0x7fffu;
    /* Exponent and fraction moved into place are the value times 2**-112, exactly, for subnormal numbers too; the largest exponent is that
     * of infinity and NaN. */
    const uint32_t number = fa_to_bits(fa_from_bits(rest << 13) * fa_from_bits(0x77800000u));
    return fa_from_bits(sign | number | ((0u - (rest >= 0x7c00u)) & 0x7f800000u));
}

static inline uint16_t fa_to_f16(float x) {
    const uint32_t bits = fa_to_bits(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    const int32_t normal = (int32_t)((magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13);
    const int32_t small = (int32_t)fa_to_bits(fa_from_bits(magnitude) + 0.5f) - 0x3f000000; /* an addition rounds to units of 2**-24 */
    const int32_t below = -((int32_t)magnitude < 0x38800000); /* 2**-14 */
    const int32_t rounded = (small & below) | (normal & ~below), infinity = 0x7c00;
    const int32_t nan = ((int32_t)magnitude > 0x7f800000) << 9;
    return (uint16_t)(sign | (uint32_t)((rounded < infinity ? rounded : infinity) | nan));
}

static inline uint64_t fa_load_four(const uint16_t *p, int64_t n) {
    uint64_t x = 0;
    if (n == 4) memcpy(&x, p, sizeof x);
    else for (int64_t i = 0; i < n; i++) x |= (uint64_t)p[i] << 16 * i;
    return x;
}

static inline void fa_store_four(uint16_t *p, uint64_t x, int64_t n) {
    if (n == 4) memcpy(p, &x, sizeof x);
    else for (int64_t i = 0; i < n; i++) p[i] = (uint16_t)(x >> 16 * i);
}

#endif
