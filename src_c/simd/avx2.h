/* Eight float32 lanes: AVX2, FMA and F16C. The operations are described in portable.h. */
#ifndef FA_SIMD_AVX2_H
#define FA_SIMD_AVX2_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>

#include "half.h"

#define SIMD_LANES 8
#define SIMD_TILE_VECTORS 2
#define SIMD_TILE_WIDTH(vectors) 6

typedef __m256 simd_f;
typedef __m256 simd_m;
typedef __m128i simd_h;

#define simd_fetch(p) _mm_prefetch((p), _MM_HINT_T1)
static inline simd_f simd_set1(float x) { return _mm256_set1_ps(x); }
static inline simd_f simd_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void simd_store(float *p, simd_f a) { _mm256_storeu_ps(p, a); }
static inline simd_h simd_load_h(const uint16_t *p) { return _mm_loadu_si128((const __m128i *)p); }
static inline void simd_store_h(uint16_t *p, simd_h a) { _mm_storeu_si128((__m128i *)p, a); }
static inline __m256i simd_first(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
}
static inline simd_f simd_load_part(const float *p, int64_t n) { return _mm256_maskload_ps(p, simd_first(n)); }
static inline void simd_store_part(float *p, simd_f a, int64_t n) { _mm256_maskstore_ps(p, simd_first(n), a); }
static inline simd_h simd_load_h_part(const uint16_t *p, int64_t n) {
    const int64_t low = n < 4 ? n : 4;
    return _mm_set_epi64x((int64_t)fa_load_four(p + low, n - low), (int64_t)fa_load_four(p, low));
}
static inline void simd_store_h_part(uint16_t *p, simd_h a, int64_t n) {
    const int64_t low = n < 4 ? n : 4;
    fa_store_four(p, (uint64_t)_mm_extract_epi64(a, 0), low);
    fa_store_four(p + low, (uint64_t)_mm_extract_epi64(a, 1), n - low);
}
static inline simd_f simd_from_f16(simd_h a) { return _mm256_cvtph_ps(a); }
static inline simd_f simd_from_bf16(simd_h a) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16)); }
static inline simd_f simd_load_i8(const void *p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p))); }
static inline simd_f simd_load_i4(const void *p, int upper) {
    const __m256i pairs = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
    const __m256i one = upper ? _mm256_srli_epi32(pairs, 4) : _mm256_and_si256(pairs, _mm256_set1_epi32(15));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(one, _mm256_set1_epi32(8)));
}
static inline void simd_store_i8(void *p, simd_f a) {
    const __m256i integers = _mm256_cvtps_epi32(a);
    const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(integers), _mm256_extracti128_si256(integers, 1));
    _mm_storel_epi64((__m128i *)p, _mm_packs_epi16(halves, halves));
}
static inline void simd_store_i4(void *p, simd_f low, simd_f high) { /* sums that leave no fraction have the integers in their lowest bits */
    const __m256i lower = _mm256_castps_si256(_mm256_add_ps(low, _mm256_set1_ps(12582912.0f + 0x88)));
    const __m256i upper = _mm256_castps_si256(_mm256_add_ps(high, _mm256_set1_ps(12582912.0f)));
    const __m256i pairs = _mm256_add_epi32(lower, _mm256_slli_epi32(upper, 4));
    const __m256i bytes = _mm256_shuffle_epi8(pairs, _mm256_set1_epi32(0x0c080400));
    _mm_storel_epi64((__m128i *)p, _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
}
static inline simd_f simd_first_bf16(simd_f a) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a), 16)); }
static inline simd_f simd_second_bf16(simd_f a) {
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32((int)0xffff0000u)));
}
static inline simd_h simd_to_f16(simd_f a) { return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline simd_h simd_to_bf16(simd_f a) {
    __m256i bits = _mm256_castps_si256(a), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}
static inline simd_f simd_load_bool(const uint8_t *p) {
    __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
    __m256 hidden = _mm256_castsi256_ps(_mm256_cmpeq_epi32(x, _mm256_setzero_si256()));
    return _mm256_and_ps(hidden, _mm256_set1_ps(-INFINITY));
}
static inline simd_f simd_load_every_second_bool(const uint8_t *p) {
    const __m128i first = _mm_slli_epi16(_mm_loadl_epi64((const __m128i *)p), 8), last = _mm_srli_epi16(_mm_loadl_epi64((const __m128i *)(p + 7)), 8);
    const __m256i x = _mm256_cvtepu16_epi32(_mm_unpacklo_epi64(first, last));
    return _mm256_and_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(x, _mm256_setzero_si256())), _mm256_set1_ps(-INFINITY));
}
static inline __m128 simd_narrowed(const double *p) {
    const __m256d x = _mm256_loadu_pd(p), largest = _mm256_set1_pd(0x1.fffffep127), zero = _mm256_setzero_pd();
    const __m256d finite = _mm256_cmp_pd(_mm256_sub_pd(x, x), zero, _CMP_EQ_OQ);
    const __m256d bounded = _mm256_max_pd(_mm256_min_pd(x, largest), _mm256_sub_pd(zero, largest));
    return _mm256_cvtpd_ps(_mm256_blendv_pd(x, bounded, finite));
}
static inline simd_f simd_load_double(const double *p) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(simd_narrowed(p)), simd_narrowed(p + 4), 1);
}
static inline simd_f simd_add(simd_f a, simd_f b) { return _mm256_add_ps(a, b); }
static inline simd_f simd_sub(simd_f a, simd_f b) { return _mm256_sub_ps(a, b); }
static inline simd_f simd_mul(simd_f a, simd_f b) { return _mm256_mul_ps(a, b); }
static inline simd_f simd_div(simd_f a, simd_f b) { return _mm256_div_ps(a, b); }
static inline simd_f simd_fma(simd_f a, simd_f b, simd_f c) { return _mm256_fmadd_ps(a, b, c); }
static inline simd_f simd_fms(simd_f a, simd_f b, simd_f c) { return _mm256_fmsub_ps(a, b, c); }
static inline simd_f simd_max(simd_f a, simd_f b) { return _mm256_max_ps(a, b); }
static inline simd_f simd_min(simd_f a, simd_f b) { return _mm256_min_ps(a, b); }
static inline simd_f simd_abs(simd_f a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
static inline simd_m simd_lt(simd_f a, simd_f b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
static inline simd_m simd_eq(simd_f a, simd_f b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
static inline simd_m simd_or(simd_m a, simd_m b) { return _mm256_or_ps(a, b); }
static inline simd_m simd_not(simd_m a) { return _mm256_xor_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32(-1))); }
static inline int simd_any(simd_m a) { return _mm256_movemask_ps(a) != 0; }
static inline simd_f simd_select(simd_m m, simd_f a, simd_f b) { return _mm256_blendv_ps(b, a, m); }
static inline simd_f simd_scale2(simd_m m, simd_f a, simd_f n) {
    __m256i power = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_andnot_ps(m, _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(power, 23))));
}
static inline void simd_transpose(simd_f v[8]) {
    __m256 a[8], b[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 4) {
        b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
        b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
        b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
        b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
        v[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
}
static inline __attribute__((always_inline)) simd_f simd_spread(simd_f x, int n) {
    switch (n) {
    case 0: return _mm256_permute_ps(x, 0x00);
    case 1: return _mm256_permute_ps(x, 0x55);
    case 2: return _mm256_permute_ps(x, 0xaa);
    default: return _mm256_permute_ps(x, 0xff);
    }
}
static inline void simd_unzip(simd_f *a, simd_f *b) {
    const __m256 low = _mm256_permute2f128_ps(*a, *b, 0x20), high = _mm256_permute2f128_ps(*a, *b, 0x31);
    *a = _mm256_shuffle_ps(low, high, 0x88);
    *b = _mm256_shuffle_ps(low, high, 0xdd);
}
static inline void simd_zip(simd_f *a, simd_f *b) {
    const __m256 low = _mm256_unpacklo_ps(*a, *b), high = _mm256_unpackhi_ps(*a, *b);
    *a = _mm256_permute2f128_ps(low, high, 0x20);
    *b = _mm256_permute2f128_ps(low, high, 0x31);
}
static inline simd_f simd_butterfly(simd_f a, int apart) {
    if (apart == 4) return _mm256_fmadd_ps(a, _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1), _mm256_permute2f128_ps(a, a, 0x01));
    if (apart == 2) return _mm256_fmadd_ps(a, _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1), _mm256_shuffle_ps(a, a, 0x4e));
    return _mm256_fmadd_ps(a, _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1), _mm256_shuffle_ps(a, a, 0xb1));
}
static inline simd_f simd_sum_lanes(const simd_f v[8]) {
    __m256 a[4], b[2];
#pragma GCC unroll 8
    for (int i = 0; i < 4; i++)
        a[i] = _mm256_add_ps(_mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 8
    for (int i = 0; i < 2; i++)
        b[i] = _mm256_add_ps(_mm256_shuffle_ps(a[2 * i], a[2 * i + 1], 0x44), _mm256_shuffle_ps(a[2 * i], a[2 * i + 1], 0xee));
    return _mm256_add_ps(_mm256_permute2f128_ps(b[0], b[1], 0x20), _mm256_permute2f128_ps(b[0], b[1], 0x31));
}
static inline float simd_sum(simd_f a) {
    a = _mm256_add_ps(a, _mm256_shuffle_ps(a, a, 0x4e));
    a = _mm256_add_ps(a, _mm256_shuffle_ps(a, a, 0xb1));
    return _mm256_cvtss_f32(_mm256_add_ps(a, _mm256_permute2f128_ps(a, a, 0x01)));
}
static inline float simd_largest(simd_f a) {
    a = _mm256_max_ps(a, _mm256_shuffle_ps(a, a, 0x4e));
    a = _mm256_max_ps(a, _mm256_shuffle_ps(a, a, 0xb1));
    return _mm256_cvtss_f32(_mm256_max_ps(a, _mm256_permute2f128_ps(a, a, 0x01)));
}
static inline simd_f simd_largest_of_four(const simd_f v[4]) {
    const __m256 low = _mm256_max_ps(_mm256_unpacklo_ps(v[0], v[1]), _mm256_unpackhi_ps(v[0], v[1]));
    const __m256 high = _mm256_max_ps(_mm256_unpacklo_ps(v[2], v[3]), _mm256_unpackhi_ps(v[2], v[3]));
    const __m256 a = _mm256_max_ps(_mm256_shuffle_ps(low, high, 0x44), _mm256_shuffle_ps(low, high, 0xee));
    return _mm256_max_ps(a, _mm256_permute2f128_ps(a, a, 0x01));
}

#endif
