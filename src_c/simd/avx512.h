/* Sixteen float32 lanes: AVX-512 F, BW, DQ, VL. The operations are described in portable.h. */
#ifndef FA_SIMD_AVX512_H
#define FA_SIMD_AVX512_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>

#define SIMD_LANES 16
#define SIMD_TILE_VECTORS 4
#define SIMD_TILE_WIDTH(vectors) ((vectors) == 4 ? 6 : (vectors) == 3 ? 8 : 12)

typedef __m512 simd_f;
typedef __mmask16 simd_m;
typedef __m256i simd_h;

#define simd_fetch(p) _mm_prefetch((p), _MM_HINT_T1)
static inline simd_f simd_set1(float x) { return _mm512_set1_ps(x); }
static inline simd_f simd_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void simd_store(float *p, simd_f a) { _mm512_storeu_ps(p, a); }
static inline simd_h simd_load_h(const uint16_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
static inline void simd_store_h(uint16_t *p, simd_h a) { _mm256_storeu_si256((__m256i *)p, a); }
static inline __mmask16 simd_first(int64_t n) { return (__mmask16)((1u << n) - 1u); }
static inline simd_f simd_load_part(const float *p, int64_t n) { return _mm512_maskz_loadu_ps(simd_first(n), p); }
static inline void simd_store_part(float *p, simd_f a, int64_t n) { _mm512_mask_storeu_ps(p, simd_first(n), a); }
static inline simd_h simd_load_h_part(const uint16_t *p, int64_t n) { return _mm256_maskz_loadu_epi16(simd_first(n), p); }
static inline void simd_store_h_part(uint16_t *p, simd_h a, int64_t n) { _mm256_mask_storeu_epi16(p, simd_first(n), a); }
static inline simd_f simd_from_f16(simd_h a) { return _mm512_cvtph_ps(a); }
/* One permutation instead of a widening and a shift: each half to the upper half of its lane. */
static inline simd_f simd_from_bf16(simd_h a) {
    const __m512i halves = _mm512_castsi256_si512(a);
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, _mm512_slli_epi32(lanes, 16), halves));
}
static inline simd_f simd_load_i8(const void *p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p))); }
/* A permutation looks up the number: it takes the lower half of its index alone. */
static inline simd_f simd_load_i4(const void *p, int upper) {
    const __m512 numbers = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
    const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm512_permutexvar_ps(upper ? _mm512_srli_epi32(pairs, 4) : pairs, numbers);
}
static inline void simd_store_i8(void *p, simd_f a) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a))); }
static inline void simd_store_i4(void *p, simd_f low, simd_f high) { /* sums that leave no fraction have the integers in their lowest bits */
    const __m512i lower = _mm512_castps_si512(_mm512_add_ps(low, _mm512_set1_ps(12582912.0f + 0x88)));
    const __m512i upper = _mm512_castps_si512(_mm512_add_ps(high, _mm512_set1_ps(12582912.0f)));
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(_mm512_add_epi32(lower, _mm512_slli_epi32(upper, 4))));
}
static inline simd_f simd_first_bf16(simd_f a) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a), 16)); }
static inline simd_f simd_second_bf16(simd_f a) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32((int)0xffff0000u)));
}
static inline simd_h simd_to_f16(simd_f a) { /* all lanes; gcc's name for that converts a sign where it does not optimise */
    return _mm512_maskz_cvtps_ph(0xffff, a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
/* Permutations of halves: the odd ones of one vector, or of two. */
#define SIMD_ODD_HALVES                                                                                              \
    _mm512_set_epi32(0x3f003d, 0x3b0039, 0x370035, 0x330031, 0x2f002d, 0x2b0029, 0x270025, 0x230021, 0x1f001d, 0x1b0019, \
                     0x170015, 0x130011, 0x0f000d, 0x0b0009, 0x070005, 0x030001)
/* The upper halves of all lanes of the first, then those of the second. */
static inline __m512i simd_upper_halves(__m512i first, __m512i second) {
    return _mm512_permutex2var_epi16(first, SIMD_ODD_HALVES, second);
}
static inline simd_h simd_to_bf16(simd_f a) {
    const __m512i bits = _mm512_castps_si512(a);
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    __m512i rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    rounded = _mm512_mask_sub_epi32(rounded, odd, rounded, _mm512_set1_epi32(-1));
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_castsi512_si256(_mm512_permutexvar_epi16(SIMD_ODD_HALVES, rounded));
}
static inline simd_f simd_load_bool(const uint8_t *p) {
    __mmask16 shown = _cvtu32_mask16(_mm_test_epi8_mask(_mm_loadu_si128((const __m128i *)p), _mm_set1_epi8(-1)));
    return _mm512_mask_blend_ps(shown, _mm512_set1_ps(-INFINITY), _mm512_setzero_ps());
}
static inline simd_f simd_load_every_second_bool(const uint8_t *p) {
    const __m128i first = _mm_loadu_si128((const __m128i *)p), last = _mm_loadu_si128((const __m128i *)(p + 15));
    const __m256i words = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_slli_epi16(first, 8)), _mm_srli_epi16(last, 8), 1);
    return _mm512_mask_blend_ps(_mm256_test_epi16_mask(words, words), _mm512_set1_ps(-INFINITY), _mm512_setzero_ps());
}
static inline __m256 simd_narrowed(const double *p) {
    const __m512d x = _mm512_loadu_pd(p), largest = _mm512_set1_pd(0x1.fffffep127);
    const __mmask8 finite = _mm512_cmp_pd_mask(_mm512_sub_pd(x, x), _mm512_setzero_pd(), _CMP_EQ_OQ);
    const __m512d high = _mm512_mask_min_pd(x, finite, x, largest);
    return _mm512_cvtpd_ps(_mm512_mask_max_pd(high, finite, high, _mm512_sub_pd(_mm512_setzero_pd(), largest)));
}
static inline simd_f simd_load_double(const double *p) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(simd_narrowed(p)), simd_narrowed(p + 8), 1);
}
static inline simd_f simd_add(simd_f a, simd_f b) { return _mm512_add_ps(a, b); }
static inline simd_f simd_sub(simd_f a, simd_f b) { return _mm512_sub_ps(a, b); }
static inline simd_f simd_mul(simd_f a, simd_f b) { return _mm512_mul_ps(a, b); }
static inline simd_f simd_div(simd_f a, simd_f b) { return _mm512_div_ps(a, b); }
static inline simd_f simd_fma(simd_f a, simd_f b, simd_f c) { return _mm512_fmadd_ps(a, b, c); }
#if defined(__GNUC__)
#define SIMD_PAIRS
#define SIMD_INT16
#define SIMD_NATIVE_BF16
/* c plus the dot products of pairs: of bfloat16 by AVX512-BF16, of 16-bit integers by AVX512-VNNI, where c is an integer too; and those of
 * four bytes, unsigned times signed. The rest needs neither. */
static inline simd_f simd_dot_bf16(simd_f a, simd_f b, simd_f c) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
}
static inline simd_f simd_dot_bf16_of(const float *a, simd_f b, simd_f c) { /* one pair with all of b */
    __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(c) : "v"(b), "m"(*a));
    return c;
}
static inline simd_f simd_dot_int16(simd_f a, simd_f b, simd_f c) {
    __asm__("vpdpwssd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
}
static inline __m512i simd_dot_bytes(__m512i a, __m512i b, __m512i c) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
}
/* The halves of both, in turn: the first 16 of each, and the last. */
static inline void simd_zip_halves(simd_f *a, simd_f *b) {
    const __m512i firsts = _mm512_set_epi32(0x2f000f, 0x2e000e, 0x2d000d, 0x2c000c, 0x2b000b, 0x2a000a, 0x290009, 0x280008,
                                            0x270007, 0x260006, 0x250005, 0x240004, 0x230003, 0x220002, 0x210001, 0x200000);
    const __m512i lasts = _mm512_or_si512(firsts, _mm512_set1_epi16(16)), x = _mm512_castps_si512(*a), y = _mm512_castps_si512(*b);
    *a = _mm512_castsi512_ps(_mm512_permutex2var_epi16(x, firsts, y));
    *b = _mm512_castsi512_ps(_mm512_permutex2var_epi16(x, lasts, y));
}
/* Both as bfloat16, in halves in the order of the lanes: AVX512-BF16 takes what is subnormal for 0. And whether a half is 0. */
static inline simd_f simd_halves_bf16(simd_f a, simd_f b) {
    __asm__("vcvtne2ps2bf16 %1, %2, %0" : "=v"(a) : "v"(a), "v"(b));
    return a;
}
static inline int simd_any_zero_bf16(simd_f a) {
    return _mm512_testn_epi16_mask(_mm512_castps_si512(a), _mm512_set1_epi16(0x7fff)) != 0;
}
static inline simd_h simd_first_halves(simd_f a) { return _mm512_castsi512_si256(_mm512_castps_si512(a)); }
static inline simd_h simd_last_halves(simd_f a) { return _mm512_extracti64x4_epi64(_mm512_castps_si512(a), 1); }
/* These two in turn. */
static inline simd_f simd_riffle_halves(simd_f a) {
    const __m512i order = _mm512_set_epi32(0x1f000f, 0x1e000e, 0x1d000d, 0x1c000c, 0x1b000b, 0x1a000a, 0x190009, 0x180008,
                                           0x170007, 0x160006, 0x150005, 0x140004, 0x130003, 0x120002, 0x110001, 0x100000);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, _mm512_castps_si512(a)));
}
/* The same within each quarter, which takes less time: the first 4 of each quarter, and the last; and lanes that lie so, in order. */
static inline void simd_zip_near_halves(simd_f *a, simd_f *b) {
    const __m512i x = _mm512_castps_si512(*a), y = _mm512_castps_si512(*b);
    *a = _mm512_castsi512_ps(_mm512_unpacklo_epi16(x, y));
    *b = _mm512_castsi512_ps(_mm512_unpackhi_epi16(x, y));
}
static inline void simd_zip_quarters(simd_f *a, simd_f *b) {
    const __m512i firsts = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), lasts = _mm512_add_epi64(firsts, _mm512_set1_epi64(4));
    const __m512d x = _mm512_castps_pd(*a), y = _mm512_castps_pd(*b);
    *a = _mm512_castpd_ps(_mm512_permutex2var_pd(x, firsts, y));
    *b = _mm512_castpd_ps(_mm512_permutex2var_pd(x, lasts, y));
}
static inline simd_f simd_of_integers(simd_f x) { return _mm512_cvtepi32_ps(_mm512_castps_si512(x)); }
#endif
static inline simd_f simd_fms(simd_f a, simd_f b, simd_f c) { return _mm512_fmsub_ps(a, b, c); }
static inline simd_f simd_max(simd_f a, simd_f b) { return _mm512_max_ps(a, b); }
static inline simd_f simd_min(simd_f a, simd_f b) { return _mm512_min_ps(a, b); }
static inline simd_f simd_abs(simd_f a) { return _mm512_abs_ps(a); }
static inline simd_m simd_lt(simd_f a, simd_f b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
static inline simd_m simd_eq(simd_f a, simd_f b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
static inline simd_m simd_or(simd_m a, simd_m b) { return _kor_mask16(a, b); }
static inline simd_m simd_not(simd_m a) { return _knot_mask16(a); }
static inline int simd_any(simd_m a) { return a != 0; }
static inline simd_f simd_select(simd_m m, simd_f a, simd_f b) { return _mm512_mask_blend_ps(m, b, a); }
static inline simd_f simd_scale2(simd_m m, simd_f a, simd_f n) { return _mm512_maskz_scalef_ps(_knot_mask16(m), a, n); }
/* Pairs, then quadruples within 128-bit quarters, then the quarters themselves. */
static inline __attribute__((always_inline)) void simd_transpose(simd_f v[16]) {
    __m512 a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
        a[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 4) {
        b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
        b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
        b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
        b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; i++) {
        __m512 low0 = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88), low1 = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
        __m512 high0 = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
        __m512 high1 = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
        v[i] = _mm512_shuffle_f32x4(low0, high0, 0x88);
        v[i + 4] = _mm512_shuffle_f32x4(low1, high1, 0x88);
        v[i + 8] = _mm512_shuffle_f32x4(low0, high0, 0xdd);
        v[i + 12] = _mm512_shuffle_f32x4(low1, high1, 0xdd);
    }
}
#define SIMD_SQUARES
/* Bits of 64 bytes at most, and 0. */
static inline simd_f simd_load_bytes(const void *p, int64_t n) {
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi8(n < 64 ? (1ull << n) - 1u : ~0ull, p));
}
/* The same of 32 halves of 16 vectors: vector i of the first 8 has halves i and 8 + i of them all, and of the others 16 + i and 24 + i. */
static inline __attribute__((always_inline)) void simd_transpose_halves(simd_f v[16]) {
    const __m512i firsts = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), lasts = _mm512_add_epi64(firsts, _mm512_set1_epi64(4));
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {
        const __m512i even = _mm512_castps_si512(v[i]), odd = _mm512_castps_si512(v[i + 1]);
        a[i] = _mm512_unpacklo_epi16(even, odd);
        a[i + 1] = _mm512_unpackhi_epi16(even, odd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 4) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi32(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi32(a[i + 1], a[i + 3]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; i++) {
        const __m512i even0 = _mm512_unpacklo_epi64(b[i], b[i + 4]), even1 = _mm512_unpacklo_epi64(b[i + 8], b[i + 12]);
        const __m512i odd0 = _mm512_unpackhi_epi64(b[i], b[i + 4]), odd1 = _mm512_unpackhi_epi64(b[i + 8], b[i + 12]);
        v[2 * i] = _mm512_castsi512_ps(_mm512_permutex2var_epi64(even0, firsts, even1));
        v[2 * i + 1] = _mm512_castsi512_ps(_mm512_permutex2var_epi64(odd0, firsts, odd1));
        v[2 * i + 8] = _mm512_castsi512_ps(_mm512_permutex2var_epi64(even0, lasts, even1));
        v[2 * i + 9] = _mm512_castsi512_ps(_mm512_permutex2var_epi64(odd0, lasts, odd1));
    }
}
/* Quads are the quarters of a vector: they change places with vectors. */
static inline void simd_exchange_quads(simd_f v[4]) {
    const __m512 low01 = _mm512_shuffle_f32x4(v[0], v[1], 0x44), high01 = _mm512_shuffle_f32x4(v[0], v[1], 0xee);
    const __m512 low23 = _mm512_shuffle_f32x4(v[2], v[3], 0x44), high23 = _mm512_shuffle_f32x4(v[2], v[3], 0xee);
    v[0] = _mm512_shuffle_f32x4(low01, low23, 0x88);
    v[1] = _mm512_shuffle_f32x4(low01, low23, 0xdd);
    v[2] = _mm512_shuffle_f32x4(high01, high23, 0x88);
    v[3] = _mm512_shuffle_f32x4(high01, high23, 0xdd);
}
static inline __attribute__((always_inline)) simd_f simd_spread(simd_f x, int n) {
    switch (n) {
    case 0: return _mm512_permute_ps(x, 0x00);
    case 1: return _mm512_permute_ps(x, 0x55);
    case 2: return _mm512_permute_ps(x, 0xaa);
    default: return _mm512_permute_ps(x, 0xff);
    }
}
static inline void simd_unzip(simd_f *a, simd_f *b) {
    const __m512i evens = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512 x = *a, y = *b;
    *a = _mm512_permutex2var_ps(x, evens, y);
    *b = _mm512_permutex2var_ps(x, _mm512_or_si512(evens, _mm512_set1_epi32(1)), y);
}
static inline void simd_zip(simd_f *a, simd_f *b) {
    const __m512i firsts = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512 x = *a, y = *b;
    *a = _mm512_permutex2var_ps(x, firsts, y);
    *b = _mm512_permutex2var_ps(x, _mm512_or_si512(firsts, _mm512_set1_epi32(8)), y);
}
static inline simd_f simd_butterfly(simd_f a, int apart) {
    const __m512 b = apart == 8   ? _mm512_shuffle_f32x4(a, a, 0x4e)
                     : apart == 4 ? _mm512_shuffle_f32x4(a, a, 0xb1)
                     : apart == 2 ? _mm512_shuffle_ps(a, a, 0x4e)
                                  : _mm512_shuffle_ps(a, a, 0xb1);
    const __mmask16 seconds = apart == 8 ? 0xff00 : apart == 4 ? 0xf0f0 : apart == 2 ? 0xcccc : 0xaaaa;
    return _mm512_fmadd_ps(a, _mm512_mask_blend_ps(seconds, _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f)), b);
}
/* Sums of neighbours, which are interleaved with those of the next vector; likewise with quarters. */
static inline simd_f simd_sum_lanes(const simd_f v[16]) {
    __m512 a[8], b[4];
#pragma GCC unroll 16
    for (int i = 0; i < 8; i++)
        a[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 16
    for (int i = 0; i < 4; i++)
        b[i] = _mm512_add_ps(_mm512_shuffle_ps(a[2 * i], a[2 * i + 1], 0x44), _mm512_shuffle_ps(a[2 * i], a[2 * i + 1], 0xee));
    __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(b[0], b[1], 0x88), _mm512_shuffle_f32x4(b[0], b[1], 0xdd));
    __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(b[2], b[3], 0x88), _mm512_shuffle_f32x4(b[2], b[3], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
}
static inline float simd_sum(simd_f a) {
    a = _mm512_add_ps(a, _mm512_shuffle_ps(a, a, 0x4e));
    a = _mm512_add_ps(a, _mm512_shuffle_ps(a, a, 0xb1));
    a = _mm512_add_ps(a, _mm512_shuffle_f32x4(a, a, 0xb1));
    return _mm512_cvtss_f32(_mm512_add_ps(a, _mm512_shuffle_f32x4(a, a, 0x4e)));
}
static inline float simd_largest(simd_f a) {
    a = _mm512_max_ps(a, _mm512_shuffle_ps(a, a, 0x4e));
    a = _mm512_max_ps(a, _mm512_shuffle_ps(a, a, 0xb1));
    a = _mm512_max_ps(a, _mm512_shuffle_f32x4(a, a, 0xb1));
    return _mm512_cvtss_f32(_mm512_max_ps(a, _mm512_shuffle_f32x4(a, a, 0x4e)));
}
static inline simd_f simd_largest_of_four(const simd_f v[4]) {
    const __m512 low = _mm512_max_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const __m512 high = _mm512_max_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    __m512 a = _mm512_max_ps(_mm512_shuffle_ps(low, high, 0x44), _mm512_shuffle_ps(low, high, 0xee));
    a = _mm512_max_ps(a, _mm512_shuffle_f32x4(a, a, 0xb1));
    return _mm512_max_ps(a, _mm512_shuffle_f32x4(a, a, 0x4e));
}

#endif
