/* The operations of simd/neon.h, and those of the extensions bf16, dotprod and fp16fml. */
#include "ukernel/ukernel.h"

#ifdef FA_HOLDS_NEON

#include "cpu/cpu.h"
#include "simd/neon.h"

#include "operations.h"

#ifdef SIMD_PAIRS
#include "ukernel/target_bf16.h"

static simd_f vector_of(const uint16_t h[8]) { return vreinterpretq_f32_u16(vld1q_u16(h)); }
static void halves_of(uint16_t h[8], simd_f v) { vst1q_u16(h, vreinterpretq_u16_f32(v)); }

static void check_permutations(struct rng *rng) {
    uint16_t x[8], y[8], found[8];
    for (int n = 0; n < TRIPLES / 4; n++) {
        for (int i = 0; i < 8; i++) x[i] = (uint16_t)random_bits(rng), y[i] = (uint16_t)random_bits(rng);
        simd_f a = vector_of(x), b = vector_of(y);
        halves_of(found, simd_swap_halves(a));
        for (int i = 0; i < 8; i++) CHECK(found[i] == x[(i + 4) % 8], "half %d of simd_swap_halves", i);
        simd_zip_halves(&a, &b);
        halves_of(found, a);
        for (int i = 0; i < 8; i++) CHECK(found[i] == (i % 2 ? y : x)[i / 2], "half %d of simd_zip_halves", i);
        halves_of(found, b);
        for (int i = 0; i < 8; i++) CHECK(found[i] == (i % 2 ? y : x)[4 + i / 2], "half %d of simd_zip_halves", 8 + i);
        a = vector_of(x), b = vector_of(y);
        simd_zip_quarters(&a, &b);
        simd_zip_near_halves(&a, &b);
        halves_of(found, a);
        for (int i = 0; i < 8; i++) CHECK(found[i] == (i % 2 ? y : x)[i / 2], "half %d of simd_zip_near_halves", i);
        halves_of(found, b);
        for (int i = 0; i < 8; i++) CHECK(found[i] == (i % 2 ? y : x)[4 + i / 2], "half %d of simd_zip_near_halves", 8 + i);
    }
}

/* Small integers, whose products and sums are exact in any order; and as numbers that have to be rounded, normal ones. */
static void check_bf16(struct rng *rng) {
    uint16_t h[2][8], found[8];
    float x[2][8], c[4];
    for (int n = 0; n < TRIPLES / 4; n++) {
        for (int m = 0; m < 2; m++)
            for (int i = 0; i < 8; i++) {
                x[m][i] = (float)random_between(rng, -128, 128);
                store(FASTATTN_BFLOAT16, &h[m][i], (double)x[m][i]);
            }
        EACH_LANE(i) c[i] = (float)random_between(rng, -1000, 1000);
        EXPECT_FLOATS(simd_dot_bf16(vector_of(h[0]), vector_of(h[1]), simd_load(c)),
                      c[i] + x[0][2 * i] * x[1][2 * i] + x[0][2 * i + 1] * x[1][2 * i + 1]);
        for (int i = 0; i < 8; i++) {
            x[0][i] = (float)random_signed(rng) + 2.0f;
            store(FASTATTN_BFLOAT16, &h[0][i], (double)x[0][i]);
        }
        halves_of(found, simd_halves_bf16(simd_load(x[0]), simd_load(x[0] + 4)));
        for (int i = 0; i < 8; i++) CHECK(found[i] == h[0][i], "half %d of simd_halves_bf16 is %04x, not %04x", i, found[i], h[0][i]);
    }
}

#include "ukernel/target_end.h"
#endif

#ifdef SIMD_BYTES
static void check_bytes(struct rng *rng) {
    int8_t x[2][16];
    int32_t c[4], found[4];
    for (int n = 0; n < TRIPLES / 4; n++) {
        for (int m = 0; m < 2; m++)
            for (int i = 0; i < 16; i++) x[m][i] = (int8_t)random_between(rng, -128, 127);
        EACH_LANE(i) c[i] = (int32_t)random_between(rng, -1000000, 1000000);
        vst1q_s32(found, simd_dot_bytes(vld1q_s8(x[0]), vld1q_s8(x[1]), vld1q_s32(c)));
        EACH_LANE(i) {
            for (int m = 4 * i; m < 4 * i + 4; m++) c[i] += x[0][m] * x[1][m];
            CHECK(found[i] == c[i], "lane %d of simd_dot_bytes is %d, not %d", i, (int)found[i], (int)c[i]);
        }
    }
}
#endif

#ifdef SIMD_HALVES
/* Any finite numbers, subnormal ones too. */
static void check_f16(struct rng *rng) {
    uint16_t h[2][8];
    float x[2][8], c[4];
    for (int n = 0; n < TRIPLES / 4; n++) {
        for (int m = 0; m < 2; m++)
            for (int i = 0; i < 8; i++) {
                h[m][i] = (uint16_t)random_bits(rng);
                if ((h[m][i] & 0x7c00) == 0x7c00 || n % 4 == 0) h[m][i] &= 0x83ff;
            }
        EACH_LANE(i) c[i] = (float)random_signed(rng) * (n % 4 == 0 ? 0x1p-30f : 1.0f);
        for (int m = 0; m < 2; m++)
            for (int i = 0; i < 8; i++) x[m][i] = (float)load(FASTATTN_FLOAT16, &h[m][i]);
        EXPECT_FLOATS(simd_fma_f16(vreinterpretq_f32_u16(vld1q_u16(h[0])), vreinterpretq_f32_u16(vld1q_u16(h[1])), simd_load(c)),
                      fmaf(x[0][i + 4], x[1][i + 4], fmaf(x[0][i], x[1][i], c[i])));
    }
}
#endif

TEST(operations_of_neon) {
    check_operations();
#ifdef SIMD_PAIRS
    struct rng rng = {4};
    check_permutations(&rng);
    if (fastattn_cpu_has(FA_CPU_BFDOT)) check_bf16(&rng);
#endif
#ifdef SIMD_BYTES
    struct rng of_bytes = {5};
    if (fastattn_cpu_has(FA_CPU_DOTPROD)) check_bytes(&of_bytes);
#endif
#ifdef SIMD_HALVES
    struct rng of_halves = {6};
    if (fastattn_cpu_has(FA_CPU_FMLAL)) check_f16(&of_halves);
#endif
}

#endif
