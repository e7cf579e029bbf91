/* Four float32 lanes: WebAssembly's SIMD128, which has neither a fused multiply-add nor float16. The operations are described in
 * portable.h. */
#ifndef FA_SIMD_WASM_H
#define FA_SIMD_WASM_H

#include <math.h>
#include <stdint.h>
#include <wasm_simd128.h>

#include "half.h"

#define SIMD_LANES 4
#define SIMD_TILE_VECTORS 2
#define SIMD_TILE_WIDTH(vectors) 4

typedef v128_t simd_f;
typedef v128_t simd_m;
typedef v128_t simd_h; /* in the lower half */

#define simd_fetch(p) ((void)(p))
static inline simd_f simd_set1(float x) { return wasm_f32x4_splat(x); }
static inline simd_f simd_load(const float *p) { return wasm_v128_load(p); }
static inline void simd_store(float *p, simd_f a) { wasm_v128_store(p, a); }
static inline simd_h simd_load_h(const uint16_t *p) { return wasm_v128_load64_zero(p); }
static inline void simd_store_h(uint16_t *p, simd_h a) { wasm_v128_store64_lane(p, a, 0); }
static inline simd_f simd_load_part(const float *p, int64_t n) {
    float part[4] = {0};
    for (int64_t i = 0; i < n; i++) part[i] = p[i];
    return wasm_v128_load(part);
}
static inline void simd_store_part(float *p, simd_f a, int64_t n) {
    float part[4];
    wasm_v128_store(part, a);
    for (int64_t i = 0; i < n; i++) p[i] = part[i];
}
static inline simd_h simd_load_h_part(const uint16_t *p, int64_t n) { return wasm_i64x2_make((int64_t)fa_load_four(p, n), 0); }
static inline void simd_store_h_part(uint16_t *p, simd_h a, int64_t n) {
    fa_store_four(p, (uint64_t)wasm_i64x2_extract_lane(a, 0), n);
}
/* As fa_from_f16 and fa_to_f16. */
static inline simd_f simd_from_f16(simd_h a) {
    const v128_t wide = wasm_u32x4_extend_low_u16x8(a), rest = wasm_v128_and(wide, wasm_i32x4_splat(0x7fff));
    const v128_t sign = wasm_i32x4_shl(wasm_v128_xor(wide, rest), 16), moved = wasm_i32x4_shl(rest, 13);
    const v128_t number = wasm_f32x4_mul(moved, wasm_i32x4_splat(0x77800000));
    const v128_t beyond = wasm_v128_or(moved, wasm_i32x4_splat(0x7f800000));
    return wasm_v128_or(sign, wasm_v128_bitselect(beyond, number, wasm_i32x4_ge(rest, wasm_i32x4_splat(0x7c00))));
}
static inline simd_f simd_from_bf16(simd_h a) { return wasm_i32x4_shl(wasm_u32x4_extend_low_u16x8(a), 16); }
static inline simd_f simd_load_i8(const void *p) {
    return wasm_f32x4_convert_i32x4(wasm_i32x4_extend_low_i16x8(wasm_i16x8_extend_low_i8x16(wasm_v128_load32_zero(p))));
}
static inline simd_f simd_load_i4(const void *p, int upper) {
    const v128_t pairs = wasm_u32x4_extend_low_u16x8(wasm_u16x8_extend_low_u8x16(wasm_v128_load32_zero(p)));
    const v128_t one = upper ? wasm_u32x4_shr(pairs, 4) : wasm_v128_and(pairs, wasm_i32x4_splat(15));
    return wasm_f32x4_convert_i32x4(wasm_i32x4_sub(one, wasm_i32x4_splat(8)));
}
static inline void simd_store_i8(void *p, simd_f a) {
    const v128_t integers = wasm_i32x4_trunc_sat_f32x4(wasm_f32x4_nearest(a)), halves = wasm_i16x8_narrow_i32x4(integers, integers);
    wasm_v128_store32_lane(p, wasm_i8x16_narrow_i16x8(halves, halves), 0);
}
static inline void simd_store_i4(void *p, simd_f low, simd_f high) { /* sums that leave no fraction have the integers in their lowest bits */
    const v128_t upper = wasm_f32x4_add(high, wasm_f32x4_splat(12582912.0f));
    const v128_t pairs = wasm_i32x4_add(wasm_f32x4_add(low, wasm_f32x4_splat(12582912.0f + 0x88)), wasm_i32x4_shl(upper, 4));
    wasm_v128_store32_lane(p, wasm_i8x16_shuffle(pairs, pairs, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12), 0);
}
static inline simd_f simd_first_bf16(simd_f a) { return wasm_i32x4_shl(a, 16); }
static inline simd_f simd_second_bf16(simd_f a) { return wasm_v128_and(a, wasm_i32x4_splat((int)0xffff0000u)); }
static inline simd_h simd_to_f16(simd_f a) {
    const v128_t rest = wasm_v128_and(a, wasm_i32x4_splat(0x7fffffff)), sign = wasm_u32x4_shr(wasm_v128_xor(a, rest), 16);
    const v128_t odd = wasm_v128_and(wasm_u32x4_shr(rest, 13), wasm_i32x4_splat(1));
    const v128_t rounded = wasm_i32x4_add(rest, wasm_i32x4_add(odd, wasm_i32x4_splat(0xfff - 0x38000000)));
    const v128_t small = wasm_i32x4_sub(wasm_f32x4_add(rest, wasm_f32x4_splat(0.5f)), wasm_i32x4_splat(0x3f000000));
    v128_t half = wasm_v128_bitselect(small, wasm_u32x4_shr(rounded, 13), wasm_i32x4_lt(rest, wasm_i32x4_splat(0x38800000)));
    half = wasm_v128_bitselect(wasm_i32x4_splat(0x7c00), half, wasm_i32x4_ge(rest, wasm_i32x4_splat(0x477ff000)));
    half = wasm_v128_bitselect(wasm_i32x4_splat(0x7e00), half, wasm_i32x4_gt(rest, wasm_i32x4_splat(0x7f800000)));
    half = wasm_v128_or(sign, half);
    return wasm_u16x8_narrow_i32x4(half, half);
}
static inline simd_h simd_to_bf16(simd_f a) {
    const v128_t odd = wasm_v128_and(wasm_u32x4_shr(a, 16), wasm_i32x4_splat(1));
    const v128_t number = wasm_i32x4_add(a, wasm_i32x4_add(odd, wasm_i32x4_splat(0x7fff)));
    const v128_t quiet = wasm_v128_or(a, wasm_i32x4_splat(0x400000));
    const v128_t half = wasm_u32x4_shr(wasm_v128_bitselect(number, quiet, wasm_f32x4_eq(a, a)), 16);
    return wasm_u16x8_narrow_i32x4(half, half);
}
static inline simd_f simd_load_bool(const uint8_t *p) {
    const v128_t wide = wasm_u32x4_extend_low_u16x8(wasm_u16x8_extend_low_u8x16(wasm_v128_load32_zero(p)));
    return wasm_v128_and(wasm_i32x4_eq(wide, wasm_i32x4_splat(0)), wasm_f32x4_splat(-INFINITY));
}
static inline simd_f simd_load_every_second_bool(const uint8_t *p) {
    const uint8_t four[4] = {p[0], p[2], p[4], p[6]};
    return simd_load_bool(four);
}
static inline v128_t simd_narrowed(const double *p) {
    const v128_t x = wasm_v128_load(p), largest = wasm_f64x2_splat(0x1.fffffep127);
    const v128_t difference = wasm_f64x2_sub(x, x), finite = wasm_f64x2_eq(difference, difference);
    const v128_t bounded = wasm_f64x2_max(wasm_f64x2_min(x, largest), wasm_f64x2_neg(largest));
    return wasm_f32x4_demote_f64x2_zero(wasm_v128_bitselect(bounded, x, finite));
}
static inline simd_f simd_load_double(const double *p) {
    return wasm_i64x2_shuffle(simd_narrowed(p), simd_narrowed(p + 2), 0, 2);
}
static inline simd_f simd_add(simd_f a, simd_f b) { return wasm_f32x4_add(a, b); }
static inline simd_f simd_sub(simd_f a, simd_f b) { return wasm_f32x4_sub(a, b); }
static inline simd_f simd_mul(simd_f a, simd_f b) { return wasm_f32x4_mul(a, b); }
static inline simd_f simd_div(simd_f a, simd_f b) { return wasm_f32x4_div(a, b); }
static inline simd_f simd_fma(simd_f a, simd_f b, simd_f c) { return wasm_f32x4_add(wasm_f32x4_mul(a, b), c); }
static inline simd_f simd_fms(simd_f a, simd_f b, simd_f c) { return wasm_f32x4_sub(wasm_f32x4_mul(a, b), c); }
static inline simd_f simd_max(simd_f a, simd_f b) { return wasm_f32x4_pmax(b, a); }
static inline simd_f simd_min(simd_f a, simd_f b) { return wasm_f32x4_pmin(b, a); }
static inline simd_f simd_abs(simd_f a) { return wasm_f32x4_abs(a); }
static inline simd_m simd_lt(simd_f a, simd_f b) { return wasm_f32x4_lt(a, b); }
static inline simd_m simd_eq(simd_f a, simd_f b) { return wasm_f32x4_eq(a, b); }
static inline simd_m simd_or(simd_m a, simd_m b) { return wasm_v128_or(a, b); }
static inline simd_m simd_not(simd_m a) { return wasm_v128_not(a); }
static inline int simd_any(simd_m a) { return wasm_v128_any_true(a); }
static inline simd_f simd_select(simd_m m, simd_f a, simd_f b) { return wasm_v128_bitselect(a, b, m); }
static inline simd_f simd_scale2(simd_m m, simd_f a, simd_f n) {
    const v128_t power = wasm_i32x4_add(wasm_i32x4_trunc_sat_f32x4(n), wasm_i32x4_splat(127));
    return wasm_v128_andnot(wasm_f32x4_mul(a, wasm_i32x4_shl(power, 23)), m);
}
static inline void simd_transpose(simd_f v[4]) {
    const v128_t low0 = wasm_i32x4_shuffle(v[0], v[1], 0, 4, 1, 5), high0 = wasm_i32x4_shuffle(v[0], v[1], 2, 6, 3, 7);
    const v128_t low1 = wasm_i32x4_shuffle(v[2], v[3], 0, 4, 1, 5), high1 = wasm_i32x4_shuffle(v[2], v[3], 2, 6, 3, 7);
    v[0] = wasm_i64x2_shuffle(low0, low1, 0, 2);
    v[1] = wasm_i64x2_shuffle(low0, low1, 1, 3);
    v[2] = wasm_i64x2_shuffle(high0, high1, 0, 2);
    v[3] = wasm_i64x2_shuffle(high0, high1, 1, 3);
}
static inline __attribute__((always_inline)) simd_f simd_spread(simd_f x, int n) {
    switch (n) {
    case 0: return wasm_i32x4_shuffle(x, x, 0, 0, 0, 0);
    case 1: return wasm_i32x4_shuffle(x, x, 1, 1, 1, 1);
    case 2: return wasm_i32x4_shuffle(x, x, 2, 2, 2, 2);
    default: return wasm_i32x4_shuffle(x, x, 3, 3, 3, 3);
    }
}
static inline void simd_unzip(simd_f *a, simd_f *b) {
    const simd_f x = *a, y = *b;
    *a = wasm_i32x4_shuffle(x, y, 0, 2, 4, 6);
    *b = wasm_i32x4_shuffle(x, y, 1, 3, 5, 7);
}
static inline void simd_zip(simd_f *a, simd_f *b) {
    const simd_f x = *a, y = *b;
    *a = wasm_i32x4_shuffle(x, y, 0, 4, 1, 5);
    *b = wasm_i32x4_shuffle(x, y, 2, 6, 3, 7);
}
static inline simd_f simd_butterfly(simd_f a, int apart) {
    if (apart == 2) return wasm_f32x4_add(wasm_i32x4_shuffle(a, a, 2, 3, 0, 1), wasm_f32x4_mul(a, wasm_f32x4_const(1, 1, -1, -1)));
    return wasm_f32x4_add(wasm_i32x4_shuffle(a, a, 1, 0, 3, 2), wasm_f32x4_mul(a, wasm_f32x4_const(1, -1, 1, -1)));
}
static inline simd_f simd_pair_sums(simd_f a, simd_f b) {
    return wasm_f32x4_add(wasm_i32x4_shuffle(a, b, 0, 2, 4, 6), wasm_i32x4_shuffle(a, b, 1, 3, 5, 7));
}
static inline simd_f simd_sum_lanes(const simd_f v[4]) {
    return simd_pair_sums(simd_pair_sums(v[0], v[1]), simd_pair_sums(v[2], v[3]));
}
static inline float simd_sum(simd_f a) {
    const simd_f pairs = simd_pair_sums(a, a);
    return wasm_f32x4_extract_lane(pairs, 0) + wasm_f32x4_extract_lane(pairs, 1);
}
static inline float simd_largest(simd_f a) {
    a = simd_max(a, wasm_i32x4_shuffle(a, a, 2, 3, 0, 1));
    return wasm_f32x4_extract_lane(simd_max(a, wasm_i32x4_shuffle(a, a, 1, 0, 3, 2)), 0);
}
static inline simd_f simd_largest_of_four(const simd_f v[4]) {
    const simd_f low = simd_max(wasm_i32x4_shuffle(v[0], v[1], 0, 4, 1, 5), wasm_i32x4_shuffle(v[0], v[1], 2, 6, 3, 7));
    const simd_f high = simd_max(wasm_i32x4_shuffle(v[2], v[3], 0, 4, 1, 5), wasm_i32x4_shuffle(v[2], v[3], 2, 6, 3, 7));
    return simd_max(wasm_i64x2_shuffle(low, high, 0, 2), wasm_i64x2_shuffle(low, high, 1, 3));
}

#endif
