/* Four float32 lanes: AArch64 Advanced SIMD. The operations are described in portable.h. */
#ifndef FA_SIMD_NEON_H
#define FA_SIMD_NEON_H

#include <arm_neon.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "half.h"

#define SIMD_LANES 4
#define SIMD_TILE_VECTORS 4
#define SIMD_TILE_WIDTH(vectors) 6

typedef float32x4_t simd_f;
typedef uint32x4_t simd_m;
typedef uint16x4_t simd_h;

#define simd_fetch(p) __builtin_prefetch((p), 0, 2)
static inline simd_f simd_set1(float x) { return vdupq_n_f32(x); }
static inline simd_f simd_load(const float *p) { return vld1q_f32(p); }
static inline void simd_store(float *p, simd_f a) { vst1q_f32(p, a); }
static inline simd_h simd_load_h(const uint16_t *p) { return vld1_u16(p); }
static inline void simd_store_h(uint16_t *p, simd_h a) { vst1_u16(p, a); }
static inline simd_f simd_load_part(const float *p, int64_t n) {
    float part[4] = {0};
    for (int64_t i = 0; i < n; i++) part[i] = p[i];
    return vld1q_f32(part);
}
static inline void simd_store_part(float *p, simd_f a, int64_t n) {
    float part[4];
    vst1q_f32(part, a);
    for (int64_t i = 0; i < n; i++) p[i] = part[i];
}
static inline simd_h simd_load_h_part(const uint16_t *p, int64_t n) { return vcreate_u16(fa_load_four(p, n)); }
static inline void simd_store_h_part(uint16_t *p, simd_h a, int64_t n) {
    fa_store_four(p, vget_lane_u64(vreinterpret_u64_u16(a), 0), n);
}
static inline simd_f simd_from_f16(simd_h a) { return vcvt_f32_f16(vreinterpret_f16_u16(a)); }
static inline simd_f simd_from_bf16(simd_h a) { return vreinterpretq_f32_u32(vshll_n_u16(a, 16)); }
static inline simd_f simd_load_i8(const void *p) {
    uint32_t four;
    memcpy(&four, p, sizeof four);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four)))));
}
static inline simd_f simd_load_i4(const void *p, int upper) {
    uint32_t four;
    memcpy(&four, p, sizeof four);
    const uint32_t one = (upper ? four >> 4 : four) & 0x0f0f0f0fu;
    return vsubq_f32(vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(one))))), vdupq_n_f32(8.0f));
}
static inline void simd_store_i8(void *p, simd_f a) {
    const int16x4_t halves = vmovn_s32(vcvtnq_s32_f32(a));
    const uint32_t four = vget_lane_u32(vreinterpret_u32_s8(vmovn_s16(vcombine_s16(halves, halves))), 0);
    memcpy(p, &four, sizeof four);
}
static inline void simd_store_i4(void *p, simd_f low, simd_f high) {
    const int16x4_t pairs = vmovn_s32(vaddq_s32(vcvtnq_s32_f32(low), vshlq_n_s32(vcvtnq_s32_f32(high), 4)));
    const uint8x8_t bytes = vadd_u8(vreinterpret_u8_s8(vmovn_s16(vcombine_s16(pairs, pairs))), vdup_n_u8(0x88));
    const uint32_t four = vget_lane_u32(vreinterpret_u32_u8(bytes), 0);
    memcpy(p, &four, sizeof four);
}
static inline simd_f simd_first_bf16(simd_f a) { return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(a), 16)); }
static inline simd_f simd_second_bf16(simd_f a) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(a), vdupq_n_u32(0xffff0000u)));
}
static inline simd_h simd_to_f16(simd_f a) { return vreinterpret_u16_f16(vcvt_f16_f32(a)); }
static inline simd_h simd_to_bf16(simd_f a) {
    uint32x4_t bits = vreinterpretq_u32_f32(a), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    rounded = vbslq_u32(vceqq_f32(a, a), rounded, vorrq_u32(bits, vdupq_n_u32(0x400000)));
    return vshrn_n_u32(rounded, 16);
}
static inline simd_f simd_load_bool(const uint8_t *p) {
    uint32_t four;
    memcpy(&four, p, sizeof four);
    uint16x4_t wide = vget_low_u16(vmovl_u8(vcreate_u8(four)));
    uint32x4_t hidden = vceqq_u32(vmovl_u16(wide), vdupq_n_u32(0));
    return vreinterpretq_f32_u32(vandq_u32(hidden, vreinterpretq_u32_f32(vdupq_n_f32(-INFINITY))));
}
static inline simd_f simd_load_every_second_bool(const uint8_t *p) {
    const uint8_t four[4] = {p[0], p[2], p[4], p[6]};
    return simd_load_bool(four);
}
static inline float32x2_t simd_narrowed(const double *p) {
    const float64x2_t x = vld1q_f64(p), largest = vdupq_n_f64(0x1.fffffep127);
    const uint64x2_t finite = vceqzq_f64(vsubq_f64(x, x));
    return vcvt_f32_f64(vbslq_f64(finite, vmaxq_f64(vminq_f64(x, largest), vnegq_f64(largest)), x));
}
static inline simd_f simd_load_double(const double *p) { return vcombine_f32(simd_narrowed(p), simd_narrowed(p + 2)); }
static inline simd_f simd_add(simd_f a, simd_f b) { return vaddq_f32(a, b); }
static inline simd_f simd_sub(simd_f a, simd_f b) { return vsubq_f32(a, b); }
static inline simd_f simd_mul(simd_f a, simd_f b) { return vmulq_f32(a, b); }
static inline simd_f simd_div(simd_f a, simd_f b) { return vdivq_f32(a, b); }
static inline simd_f simd_fma(simd_f a, simd_f b, simd_f c) { return vfmaq_f32(c, a, b); }
static inline simd_f simd_fms(simd_f a, simd_f b, simd_f c) { return vfmaq_f32(vnegq_f32(c), a, b); }
#if defined(__GNUC__)
#define SIMD_PAIRS
/* c plus the dot products of pairs of bfloat16, and eight numbers as such: by the extension bf16, which the rest does not need. (Clang
 * takes the instructions where the function that they end up in is of target_bf16.h; the assembler of others has to be told.) */
#ifdef __clang__
#define SIMD_WITH_BF16 ""
#else
#define SIMD_WITH_BF16 ".arch_extension bf16\n\t"
#endif
static inline simd_f simd_dot_bf16(simd_f a, simd_f b, simd_f c) {
    __asm__(SIMD_WITH_BF16 "bfdot %0.4s, %1.8h, %2.8h" : "+w"(c) : "w"(a), "w"(b));
    return c;
}
static inline simd_f simd_halves_bf16(simd_f a, simd_f b) {
    __asm__(SIMD_WITH_BF16 "bfcvtn %0.4h, %0.4s\n\tbfcvtn2 %0.8h, %1.4s" : "+&w"(a) : "w"(b));
    return a;
}
/* The last four halves before the first. */
static inline simd_f simd_swap_halves(simd_f a) { return vextq_f32(a, a, 2); }
/* The halves of both, in turn: the first 4 of each, and the last. */
static inline void simd_zip_halves(simd_f *a, simd_f *b) {
    const uint16x8_t x = vreinterpretq_u16_f32(*a), y = vreinterpretq_u16_f32(*b);
    *a = vreinterpretq_f32_u16(vzip1q_u16(x, y));
    *b = vreinterpretq_f32_u16(vzip2q_u16(x, y));
}
/* The same within each quarter of a vector, of which there is one here; and lanes that lie so, in order. */
static inline void simd_zip_near_halves(simd_f *a, simd_f *b) { simd_zip_halves(a, b); }
static inline void simd_zip_quarters(simd_f *a, simd_f *b) { (void)a, (void)b; }
/* An instruction by its encoding, of c and of a and b, for assemblers know it of architectures alone that the rest need not be of. */
#define SIMD_ENCODED(code, c, a, b)                                                                                      \
    __asm__(".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n\t"           \
            ".equ .Lv\\n, \\n\n\t.endr\n\t.inst " code " | .L%2 << 16 | .L%1 << 5 | .L%0" : "+w"(c) : "w"(a), "w"(b))
#define SIMD_BYTES
/* c plus the dot products of four signed bytes: SDOT, of the extension dotprod. */
static inline int32x4_t simd_dot_bytes(int8x16_t a, int8x16_t b, int32x4_t c) {
    SIMD_ENCODED("0x4e809400", c, a, b);
    return c;
}
#define SIMD_HALVES
/* c plus the products of the first four float16 numbers, and then of the last: FMLAL and FMLAL2, of the extension fp16fml. As exact as if
 * float32 numbers were made of them first. */
static inline simd_f simd_fma_f16(simd_f a, simd_f b, simd_f c) {
    SIMD_ENCODED("0x4e20ec00", c, a, b);
    SIMD_ENCODED("0x6e20cc00", c, a, b);
    return c;
}
#endif
static inline simd_f simd_max(simd_f a, simd_f b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
static inline simd_f simd_min(simd_f a, simd_f b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
static inline simd_f simd_abs(simd_f a) { return vabsq_f32(a); }
static inline simd_m simd_lt(simd_f a, simd_f b) { return vcltq_f32(a, b); }
static inline simd_m simd_eq(simd_f a, simd_f b) { return vceqq_f32(a, b); }
static inline simd_m simd_or(simd_m a, simd_m b) { return vorrq_u32(a, b); }
static inline simd_m simd_not(simd_m a) { return vmvnq_u32(a); }
static inline int simd_any(simd_m a) { return vmaxvq_u32(a) != 0; }
static inline simd_f simd_select(simd_m m, simd_f a, simd_f b) { return vbslq_f32(m, a, b); }
static inline simd_f simd_scale2(simd_m m, simd_f a, simd_f n) {
    const int32x4_t power = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
    const float32x4_t scaled = vmulq_f32(a, vreinterpretq_f32_s32(vshlq_n_s32(power, 23)));
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(scaled), m));
}
static inline void simd_transpose(simd_f v[4]) {
    float32x4x2_t low = vtrnq_f32(v[0], v[1]), high = vtrnq_f32(v[2], v[3]);
    v[0] = vcombine_f32(vget_low_f32(low.val[0]), vget_low_f32(high.val[0]));
    v[1] = vcombine_f32(vget_low_f32(low.val[1]), vget_low_f32(high.val[1]));
    v[2] = vcombine_f32(vget_high_f32(low.val[0]), vget_high_f32(high.val[0]));
    v[3] = vcombine_f32(vget_high_f32(low.val[1]), vget_high_f32(high.val[1]));
}
static inline __attribute__((always_inline)) simd_f simd_spread(simd_f x, int n) {
    switch (n) {
    case 0: return vdupq_laneq_f32(x, 0);
    case 1: return vdupq_laneq_f32(x, 1);
    case 2: return vdupq_laneq_f32(x, 2);
    default: return vdupq_laneq_f32(x, 3);
    }
}
static inline void simd_unzip(simd_f *a, simd_f *b) {
    const simd_f x = *a, y = *b;
    *a = vuzp1q_f32(x, y);
    *b = vuzp2q_f32(x, y);
}
static inline void simd_zip(simd_f *a, simd_f *b) {
    const simd_f x = *a, y = *b;
    *a = vzip1q_f32(x, y);
    *b = vzip2q_f32(x, y);
}
static inline simd_f simd_butterfly(simd_f a, int apart) {
    const float32x4_t halves = {1, 1, -1, -1}, pairs = {1, -1, 1, -1};
    return apart == 2 ? vfmaq_f32(vextq_f32(a, a, 2), a, halves) : vfmaq_f32(vrev64q_f32(a), a, pairs);
}
static inline simd_f simd_sum_lanes(const simd_f v[4]) {
    return vpaddq_f32(vpaddq_f32(v[0], v[1]), vpaddq_f32(v[2], v[3]));
}
static inline float simd_sum(simd_f a) { return vaddvq_f32(a); }
static inline float simd_largest(simd_f a) { return vmaxvq_f32(a); }
static inline simd_f simd_largest_of_four(const simd_f v[4]) {
    return vpmaxq_f32(vpmaxq_f32(v[0], v[1]), vpmaxq_f32(v[2], v[3]));
}

#endif
