/* The operations of simd/avx512.h, and those that it alone has. */
#include "ukernel/ukernel.h"

#ifdef FA_HOLDS_AVX512

#include "cpu/cpu.h"
#include "ukernel/target_avx512.h"

#include "simd/avx512.h"

#include "operations.h"

static void check_masks(void) {
    for (int n = 0; n < 16; n++)
        for (int i = 0; i < 16; i++) CHECK((simd_first(n) >> i & 1) == (i < n), "lane %d of the first %d", i, n);
}

/* Halves of 32 numbers, as they lie in a vector. */
static simd_f any_halves(uint16_t h[32], struct rng *rng) {
    simd_f v;
    for (int i = 0; i < 32; i++) h[i] = (uint16_t)random_bits(rng);
    memcpy(&v, h, sizeof v);
    return v;
}

static void check_squares(enum guard_side side, struct rng *rng) {
    uint16_t h[16][32], found[32];
    float x[4][SIMD_LANES];
    simd_f v[16], quads[4];
    for (int64_t bytes = 0; bytes <= 64; bytes++) {
        const unsigned char *some = guard_input("bytes", (size_t)bytes, 1, side);
        unsigned char of_vector[64];
        const simd_f loaded = simd_load_bytes(some, bytes);
        memcpy(of_vector, &loaded, sizeof of_vector);
        for (int i = 0; i < 64; i++) CHECK(of_vector[i] == (i < bytes ? some[i] : 0), "byte %d of %d of simd_load_bytes", i, (int)bytes);
        guard_check();
        guard_release();
    }
    for (int n = 0; n < TRIPLES / 16; n++) {
        for (int j = 0; j < 4; j++) quads[j] = any_vector(x[j], rng);
        simd_exchange_quads(quads);
        for (int j = 0; j < 4; j++) EXPECT_FLOATS(quads[j], x[i / 4][j * 4 + i % 4]);
        for (int j = 0; j < 16; j++) v[j] = any_halves(h[j], rng);
        simd_transpose_halves(v);
        for (int j = 0; j < 16; j++) {
            memcpy(found, &v[j], sizeof found);
            for (int i = 0; i < 32; i++)
                CHECK(found[i] == h[i % 16][j / 8 * 16 + i / 16 * 8 + j % 8], "half %d of vector %d of simd_transpose_halves", i, j);
        }
    }
}

#ifdef SIMD_PAIRS
static void check_pairs(struct rng *rng) {
    uint16_t x[32], y[32], found[32];
    float integers[16];
    for (int n = 0; n < TRIPLES / 16; n++) {
        simd_f a = any_halves(x, rng), b = any_halves(y, rng);
        const __m512i upper = simd_upper_halves(_mm512_castps_si512(a), _mm512_castps_si512(b));
        memcpy(found, &upper, sizeof found);
        for (int i = 0; i < 32; i++) CHECK(found[i] == (i < 16 ? x[2 * i + 1] : y[2 * (i - 16) + 1]), "half %d of simd_upper_halves", i);
        simd_zip_halves(&a, &b);
        memcpy(found, &a, sizeof found);
        for (int i = 0; i < 32; i++) CHECK(found[i] == (i % 2 ? y : x)[i / 2], "half %d of simd_zip_halves", i);
        memcpy(found, &b, sizeof found);
        for (int i = 0; i < 32; i++) CHECK(found[i] == (i % 2 ? y : x)[16 + i / 2], "half %d of simd_zip_halves", 32 + i);
        const simd_f of_x = any_halves(x, rng), riffled = simd_riffle_halves(of_x);
        uint16_t first[16], last[16];
        memcpy(found, &riffled, sizeof found);
        simd_store_h(first, simd_first_halves(of_x)), simd_store_h(last, simd_last_halves(of_x));
        for (int i = 0; i < 32; i++) {
            CHECK(found[i] == x[i / 2 + i % 2 * 16], "half %d of simd_riffle_halves", i);
            CHECK((i < 16 ? first : last)[i % 16] == x[i], "half %d of simd_first_halves and simd_last_halves", i);
        }
        a = any_halves(x, rng), b = any_halves(y, rng);
        simd_zip_near_halves(&a, &b);
        memcpy(found, &a, sizeof found);
        for (int i = 0; i < 32; i++)
            CHECK(found[i] == (i % 2 ? y : x)[i / 8 * 8 + i % 8 / 2], "half %d of simd_zip_near_halves", i);
        memcpy(found, &b, sizeof found);
        for (int i = 0; i < 32; i++)
            CHECK(found[i] == (i % 2 ? y : x)[i / 8 * 8 + 4 + i % 8 / 2], "half %d of simd_zip_near_halves", 32 + i);
        a = any_halves(x, rng), b = any_halves(y, rng);
        simd_zip_quarters(&a, &b);
        memcpy(found, &a, sizeof found);
        for (int i = 0; i < 32; i++) CHECK(found[i] == (i / 8 % 2 ? y : x)[i / 16 * 8 + i % 8], "half %d of simd_zip_quarters", i);
        memcpy(found, &b, sizeof found);
        for (int i = 0; i < 32; i++)
            CHECK(found[i] == (i / 8 % 2 ? y : x)[16 + i / 16 * 8 + i % 8], "half %d of simd_zip_quarters", 32 + i);
        EACH_LANE(i) integers[i] = fa_from_bits((uint32_t)random_bits(rng));
        EXPECT_FLOATS(simd_of_integers(simd_load(integers)), (float)(int32_t)fa_to_bits(integers[i]));
    }
}

/* Small integers, whose products and sums are exact in any order. */
static void check_dot_bf16(struct rng *rng) {
    uint16_t h[2][32];
    float x[2][32], c[16];
    simd_f v[2];
    for (int n = 0; n < TRIPLES / 16; n++) {
        for (int m = 0; m < 2; m++) {
            for (int i = 0; i < 32; i++) {
                x[m][i] = (float)random_between(rng, -128, 128);
                store(FASTATTN_BFLOAT16, &h[m][i], (double)x[m][i]);
            }
            memcpy(&v[m], h[m], sizeof v[m]);
        }
        EACH_LANE(i) c[i] = (float)random_between(rng, -1000, 1000);
        EXPECT_FLOATS(simd_dot_bf16(v[0], v[1], simd_load(c)), c[i] + x[0][2 * i] * x[1][2 * i] + x[0][2 * i + 1] * x[1][2 * i + 1]);
        float lanes[SIMD_LANES];
        simd_store(lanes, v[0]);
        EXPECT_FLOATS(simd_dot_bf16_of(lanes, v[1], simd_load(c)), c[i] + x[0][0] * x[1][2 * i] + x[0][1] * x[1][2 * i + 1]);
    }
}

/* Every exponent, both signs; what is subnormal becomes 0. */
static void check_halves_bf16(struct rng *rng) {
    float x[2][16];
    uint16_t found[32], wanted;
    for (int n = 0; n < TRIPLES / 16; n++) {
        for (int m = 0; m < 2; m++) EACH_LANE(i) x[m][i] = fa_from_bits((uint32_t)random_bits(rng));
        const simd_f halves = simd_halves_bf16(simd_load(x[0]), simd_load(x[1]));
        memcpy(found, &halves, sizeof found);
        int zeros = 0;
        for (int i = 0; i < 32; i++) {
            const float from = x[i / 16][i % 16];
            wanted = fa_to_bf16(fabsf(from) < FLT_MIN ? copysignf(0.0f, from) : from);
            zeros += (wanted & 0x7fff) == 0;
            CHECK(found[i] == wanted, "half %d of simd_halves_bf16 is %04x, not %04x", i, found[i], wanted);
        }
        CHECK(simd_any_zero_bf16(halves) == (zeros > 0), "simd_any_zero_bf16 with %d zeros", zeros);
    }
}

/* Of integers of 32 bits, which wrap around. */
static void check_dot_int16(struct rng *rng) {
    uint16_t x[32], y[32];
    uint32_t c[16], found[16];
    for (int n = 0; n < TRIPLES / 16; n++) {
        const simd_f a = any_halves(x, rng), b = any_halves(y, rng);
        simd_f sums;
        EACH_LANE(i) c[i] = (uint32_t)random_bits(rng);
        memcpy(&sums, c, sizeof sums);
        sums = simd_dot_int16(a, b, sums);
        memcpy(found, &sums, sizeof found);
        EACH_LANE(i) {
            int64_t wanted = c[i];
            for (int j = 2 * i; j < 2 * i + 2; j++) wanted += (int64_t)(int16_t)x[j] * (int16_t)y[j];
            CHECK(found[i] == (uint32_t)wanted, "lane %d of simd_dot_int16", i);
        }
    }
}

/* Four bytes, unsigned and signed. */
static void check_dot_bytes(struct rng *rng) {
    uint8_t x[64];
    int8_t y[64];
    uint32_t c[16], found[16];
    for (int n = 0; n < TRIPLES / 16; n++) {
        for (int i = 0; i < 64; i++) x[i] = (uint8_t)random_bits(rng), y[i] = (int8_t)random_bits(rng);
        EACH_LANE(i) c[i] = (uint32_t)random_bits(rng);
        _mm512_storeu_si512(found, simd_dot_bytes(_mm512_loadu_si512(x), _mm512_loadu_si512(y), _mm512_loadu_si512(c)));
        EACH_LANE(i) {
            int64_t wanted = c[i];
            for (int j = 4 * i; j < 4 * i + 4; j++) wanted += (int64_t)x[j] * y[j];
            CHECK(found[i] == (uint32_t)wanted, "lane %d of simd_dot_bytes", i);
        }
    }
}
#endif

#include "ukernel/target_end.h"

TEST(operations_of_avx512) {
    if (!fastattn_isa_available(FASTATTN_ISA_AVX512)) skip("no AVX-512");
    check_operations();
    check_masks();
    struct rng rng = {32};
    for (int side = 0; side < 2; side++) check_squares(side ? GUARD_BEFORE : GUARD_BEHIND, &rng);
#ifdef SIMD_PAIRS
    check_pairs(&rng);
    if (fastattn_cpu_has(FA_CPU_AVX512_BF16)) check_dot_bf16(&rng), check_halves_bf16(&rng);
    if (fastattn_cpu_has(FA_CPU_AVX512_VNNI)) check_dot_int16(&rng), check_dot_bytes(&rng);
#endif
}

#endif
