/* Each operation of a header of simd/ alone, against plain C, with every tail: to be included behind that header, once for each
 * instruction set, within whose region these functions are compiled. tests/test_architecture.py sees to it that none is missing.
 *
 * Numbers come in threes that meet each other's special values; what is compared are bits, but that any NaN is as good as another. Memory
 * lies flush against guard pages, so that a load or a store of some lanes that touches one more is found. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "problem.h"
#include "simd/half.h"

#define EACH_LANE(i) for (int i = 0; i < SIMD_LANES; i++)

enum { TRIPLES = 4096 };

static int same(float a, float b) { return fa_to_bits(a) == fa_to_bits(b) || (isnan(a) && isnan(b)); }

/* Special values, numbers of ordinary size, integers, and any bits whatever. */
static float any_number(struct rng *rng) {
    static const float special[] = {0.0f, -0.0f, 1.0f, -1.0f, INFINITY, -INFINITY, NAN, FLT_MAX, -FLT_MAX, FLT_MIN, -FLT_MIN, 1e-45f, -1e-45f};
    switch (random_between(rng, 0, 3)) {
    case 0: return special[random_between(rng, 0, COUNT(special) - 1)];
    case 1: return (float)random_signed(rng) * 8;
    case 2: return (float)random_between(rng, -9, 9);
    default: return fa_from_bits((uint32_t)random_bits(rng));
    }
}

static simd_f any_vector(float x[SIMD_LANES], struct rng *rng) {
    EACH_LANE(i) x[i] = any_number(rng);
    return simd_load(x);
}

/* What an operation has made of lanes, and in plain C. */
#define EXPECT_FLOATS(made, wanted) \
    do { \
        float found_[SIMD_LANES]; \
        simd_store(found_, made); \
        EACH_LANE(i) CHECK(same(found_[i], wanted), "lane %d of %s is %a, not %a", i, #made, (double)found_[i], (double)(wanted)); \
    } while (0)

/* A mask as it chooses. */
#define EXPECT_MASK(made, wanted) \
    do { \
        float found_[SIMD_LANES]; \
        int some_ = 0; \
        simd_store(found_, simd_select(made, simd_set1(1.0f), simd_set1(-0.0f))); \
        EACH_LANE(i) { \
            CHECK(same(found_[i], (wanted) ? 1.0f : -0.0f), "lane %d of %s", i, #made); \
            some_ |= (wanted); \
        } \
        CHECK(!simd_any(made) == !some_, "any of %s", #made); \
    } while (0)

static void check_arithmetic(struct rng *rng) {
    float x[SIMD_LANES], y[SIMD_LANES], z[SIMD_LANES], found[SIMD_LANES];
    for (int n = 0; n < TRIPLES; n++) {
        const simd_f a = any_vector(x, rng), b = any_vector(y, rng), c = any_vector(z, rng);
        EXPECT_FLOATS(simd_set1(x[0]), x[0]);
        EXPECT_FLOATS(simd_add(a, b), x[i] + y[i]);
        EXPECT_FLOATS(simd_sub(a, b), x[i] - y[i]);
        EXPECT_FLOATS(simd_mul(a, b), x[i] * y[i]);
        EXPECT_FLOATS(simd_div(a, b), x[i] / y[i]);
        EXPECT_FLOATS(simd_max(a, b), x[i] > y[i] ? x[i] : y[i]);
        EXPECT_FLOATS(simd_min(a, b), x[i] < y[i] ? x[i] : y[i]);
        EXPECT_FLOATS(simd_abs(a), fabsf(x[i]));
        for (int minus = 0; minus < 2; minus++) { /* fused or not */
            simd_store(found, minus ? simd_fms(a, b, c) : simd_fma(a, b, c));
            EACH_LANE(i) {
                volatile float product = x[i] * y[i];
                const float term = minus ? -z[i] : z[i];
                CHECK(same(found[i], fmaf(x[i], y[i], term)) || same(found[i], product + term), "%s of %a, %a, %a is %a",
                      minus ? "simd_fms" : "simd_fma", (double)x[i], (double)y[i], (double)z[i], (double)found[i]);
            }
        }
        const simd_m less = simd_lt(a, b), equal = simd_eq(a, b);
        EXPECT_MASK(less, x[i] < y[i]);
        EXPECT_MASK(equal, x[i] == y[i]);
        EXPECT_MASK(simd_or(less, equal), x[i] <= y[i]);
        EXPECT_MASK(simd_not(less), !(x[i] < y[i]));
        EXPECT_FLOATS(simd_select(less, b, c), x[i] < y[i] ? y[i] : z[i]);
        EACH_LANE(i) y[i] = x[i] < 1 ? NAN : (float)random_between(rng, -126, 127);
        EXPECT_FLOATS(simd_scale2(simd_lt(a, simd_set1(1.0f)), c, simd_load(y)), x[i] < 1 ? 0.0f : ldexpf(z[i], (int)y[i]));
        EXPECT_FLOATS(simd_first_bf16(a), fa_from_bits(fa_to_bits(x[i]) << 16));
        EXPECT_FLOATS(simd_second_bf16(a), fa_from_bits(fa_to_bits(x[i]) & 0xffff0000u));
    }
}

/* Lanes change places, or are added up: of integers exactly, whichever are added first. */
static void check_lanes(struct rng *rng) {
    float x[SIMD_LANES][SIMD_LANES], found[SIMD_LANES];
    simd_f v[SIMD_LANES];
    for (int n = 0; n < TRIPLES / 16; n++) {
        EACH_LANE(j) v[j] = any_vector(x[j], rng);
        simd_f a = v[0], b = v[1];
        simd_unzip(&a, &b);
        EXPECT_FLOATS(a, x[2 * i / SIMD_LANES][2 * i % SIMD_LANES]);
        EXPECT_FLOATS(b, x[2 * i / SIMD_LANES][2 * i % SIMD_LANES + 1]);
        a = v[0], b = v[1];
        simd_zip(&a, &b);
        EXPECT_FLOATS(a, x[i % 2][i / 2]);
        EXPECT_FLOATS(b, x[i % 2][(SIMD_LANES + i) / 2]);
        EXPECT_FLOATS(simd_spread(v[0], 0), x[0][i / 4 * 4]);
        EXPECT_FLOATS(simd_spread(v[0], 1), x[0][i / 4 * 4 + 1]);
        EXPECT_FLOATS(simd_spread(v[0], 2), x[0][i / 4 * 4 + 2]);
        EXPECT_FLOATS(simd_spread(v[0], 3), x[0][i / 4 * 4 + 3]);
        EXPECT_FLOATS(simd_butterfly(v[0], 1), i & 1 ? x[0][i ^ 1] - x[0][i] : x[0][i] + x[0][i ^ 1]);
        EXPECT_FLOATS(simd_butterfly(v[0], 2), i & 2 ? x[0][i ^ 2] - x[0][i] : x[0][i] + x[0][i ^ 2]);
#if SIMD_LANES > 4
        EXPECT_FLOATS(simd_butterfly(v[0], 4), i & 4 ? x[0][i ^ 4] - x[0][i] : x[0][i] + x[0][i ^ 4]);
#endif
#if SIMD_LANES > 8
        EXPECT_FLOATS(simd_butterfly(v[0], 8), i & 8 ? x[0][i ^ 8] - x[0][i] : x[0][i] + x[0][i ^ 8]);
#endif
        simd_transpose(v);
        EACH_LANE(j) EXPECT_FLOATS(v[j], x[i][j]);

        float sum[SIMD_LANES] = {0}, largest[SIMD_LANES];
        EACH_LANE(j) {
            EACH_LANE(i) {
                x[j][i] = (float)random_between(rng, -1000, 1000);
                sum[j] += x[j][i];
            }
            v[j] = simd_load(x[j]);
            CHECK(simd_sum(v[j]) == sum[j], "simd_sum of integers is %a, not %a", (double)simd_sum(v[j]), (double)sum[j]);
        }
        EXPECT_FLOATS(simd_sum_lanes(v), sum[i]);
        EACH_LANE(j) {
            EACH_LANE(i) x[j][i] = (float)random_signed(rng);
            v[j] = simd_load(x[j]);
        }
        EXPECT_FLOATS(simd_sum_lanes(v), simd_sum(v[i]));
        EACH_LANE(j) {
            EACH_LANE(i) {
                do x[j][i] = any_number(rng);
                while (isnan(x[j][i]) || x[j][i] == 0);
                largest[j] = i == 0 || x[j][i] > largest[j] ? x[j][i] : largest[j];
            }
            found[j] = simd_largest(simd_load(x[j]));
            CHECK(same(found[j], largest[j]), "simd_largest is %a, not %a", (double)found[j], (double)largest[j]);
            v[j] = simd_load(x[j]);
        }
        EXPECT_FLOATS(simd_largest_of_four(v), largest[i % 4]);
    }
}

/* Every number of 16 bits, and float32 numbers on both sides of every border between two of them. */
static void check_halves(fastattn_dtype dtype) {
    const int is_f16 = dtype == FASTATTN_FLOAT16;
    uint16_t h[SIMD_LANES], made[SIMD_LANES];
    float x[SIMD_LANES];
    for (int first = 0; first < 1 << 16; first += SIMD_LANES) {
        EACH_LANE(i) h[i] = (uint16_t)(first + i);
        const simd_h halves = simd_load_h(h);
        EXPECT_FLOATS(is_f16 ? simd_from_f16(halves) : simd_from_bf16(halves), (float)load(dtype, &h[i]));
        for (int side = -1; side <= 1; side++) {
            EACH_LANE(i) {
                const uint16_t next = h[i] + 1;
                const double middle = (load(dtype, &h[i]) + load(dtype, &next)) / 2;
                x[i] = side == 0 ? (float)middle : nextafterf((float)middle, side < 0 ? -INFINITY : INFINITY);
            }
            simd_store_h(made, is_f16 ? simd_to_f16(simd_load(x)) : simd_to_bf16(simd_load(x)));
            EACH_LANE(i) {
                uint16_t wanted;
                store(dtype, &wanted, (double)x[i]);
                CHECK(isnan(x[i]) ? isnan(load(dtype, &made[i])) : made[i] == wanted, "%a becomes %04x, not %04x", (double)x[i],
                      made[i], wanted);
            }
        }
    }
}

/* Loads and stores of all lanes and of every number of them, at both ends of their memory. */
static void check_memory(enum guard_side side, struct rng *rng) {
    float x[SIMD_LANES];
    uint16_t h[SIMD_LANES], halves[SIMD_LANES];
    for (int n = 0; n <= SIMD_LANES; n++) {
        const int all = n == SIMD_LANES;
        float *from = guard_input("numbers", (size_t)n * sizeof *from, sizeof *from, side);
        float *to = guard_output("numbers stored", (size_t)n * sizeof *to, sizeof *to, side);
        uint16_t *from_h = guard_input("halves", (size_t)n * sizeof *from_h, sizeof *from_h, side);
        uint16_t *to_h = guard_output("halves stored", (size_t)n * sizeof *to_h, sizeof *to_h, side);
        for (int i = 0; i < n; i++) {
            from[i] = any_number(rng);
            from_h[i] = (uint16_t)random_bits(rng);
        }
        guard_seal();
        const simd_f a = all ? simd_load(from) : simd_load_part(from, n);
        EXPECT_FLOATS(a, i < n ? from[i] : 0.0f);
        simd_f sink = any_vector(x, rng);
        if (all) simd_store(to, sink);
        else simd_store_part(to, sink, n);
        for (int i = 0; i < n; i++) CHECK(same(to[i], x[i]), "lane %d of %d stored", i, n);
        simd_store_h(halves, all ? simd_load_h(from_h) : simd_load_h_part(from_h, n));
        EACH_LANE(i) {
            CHECK(halves[i] == (i < n ? from_h[i] : 0), "half %d of %d loaded", i, n);
            h[i] = (uint16_t)random_bits(rng);
        }
        if (all) simd_store_h(to_h, simd_load_h(h));
        else simd_store_h_part(to_h, simd_load_h(h), n);
        for (int i = 0; i < n; i++) CHECK(to_h[i] == h[i], "half %d of %d stored", i, n);
        guard_check();
        guard_release();
    }
}

/* A double as float32: what is finite stays so. */
static float narrowed(double x) {
    return (float)(isfinite(x) ? fmax(fmin(x, (double)FLT_MAX), -(double)FLT_MAX) : x);
}

/* What is loaded from, and stored to, other types: as many elements as there are lanes, whatever their size. */
static void check_types(enum guard_side side, struct rng *rng) {
    float x[SIMD_LANES], y[SIMD_LANES];
    uint8_t *bytes = guard_input("bytes", SIMD_LANES, 1, side), *to = guard_output("bytes stored", SIMD_LANES, 1, side);
    uint8_t *apart = guard_input("bytes apart", 2 * SIMD_LANES - 1, 1, side);
    double *doubles = guard_input("doubles", SIMD_LANES * sizeof *doubles, sizeof *doubles, side);
    for (int n = 0; n < 1024; n++) {
        EACH_LANE(i) {
            bytes[i] = (uint8_t)(n < 256 ? n + i : random_between(rng, 0, 1) * (int64_t)(random_bits(rng) & 255));
            apart[2 * i] = bytes[i];
            if (i > 0) apart[2 * i - 1] = (uint8_t)random_bits(rng);
            doubles[i] = n % 2 ? (double)any_number(rng) : random_signed(rng) * ldexp(1, (int)random_between(rng, -160, 160));
            if (n % 8 == 0) doubles[i] = i % 2 ? (double)FLT_MAX * 1.5 : -(double)FLT_MAX * (1 + 0x1p-26);
        }
        simd_fetch((const char *)bytes);
        EXPECT_FLOATS(simd_load_i8(bytes), (float)(signed char)bytes[i]);
        EXPECT_FLOATS(simd_load_i4(bytes, 0), (float)((bytes[i] & 15) - 8));
        EXPECT_FLOATS(simd_load_i4(bytes, 1), (float)((bytes[i] >> 4) - 8));
        EXPECT_FLOATS(simd_load_bool(bytes), bytes[i] ? 0.0f : -INFINITY);
        EXPECT_FLOATS(simd_load_every_second_bool(apart), bytes[i] ? 0.0f : -INFINITY);
        EXPECT_FLOATS(simd_load_double(doubles), narrowed(doubles[i]));
        EACH_LANE(i) x[i] = (float)random_between(rng, -254, 254) / 2 + (n % 2 ? (float)random_signed(rng) / 4 : 0.0f);
        simd_store_i8(to, simd_load(x));
        EACH_LANE(i) CHECK((signed char)to[i] == (signed char)nearbyintf(x[i]), "%a becomes %d", (double)x[i], (signed char)to[i]);
        EACH_LANE(i) {
            x[i] = (float)random_between(rng, -16, 14) / 2;
            y[i] = x[i] + (float)random_signed(rng) / 4;
        }
        simd_store_i4(to, simd_load(x), simd_load(y));
        EACH_LANE(i) CHECK(to[i] == ((int)nearbyintf(y[i]) + 8) * 16 + (int)nearbyintf(x[i]) + 8, "%a and %a become %d", (double)x[i],
                               (double)y[i], to[i]);
    }
    guard_check();
    guard_release();
}

static void check_operations(void) {
    struct rng rng = {SIMD_LANES};
    check_arithmetic(&rng);
    check_lanes(&rng);
    check_halves(FASTATTN_FLOAT16);
    check_halves(FASTATTN_BFLOAT16);
    for (int side = 0; side < 2; side++) {
        check_memory(side ? GUARD_BEFORE : GUARD_BEHIND, &rng);
        check_types(side ? GUARD_BEFORE : GUARD_BEHIND, &rng);
    }
}
