/* fastattn_rope against its formula, on guarded memory and in any layout; and hostile arguments. */
#include "problem.h"

#include <math.h>
#include <string.h>

static const fastattn_dtype dtypes[] = {FASTATTN_FLOAT32, FASTATTN_FLOAT16, FASTATTN_BFLOAT16};

struct rope {
    fastattn_rope_args args;
    char *before; /* x, as it was */
};

static int64_t place(const int64_t strides[3], int64_t b, int64_t h, int64_t i) { return b * strides[0] + h * strides[1] + i * strides[2]; }

static struct rope rope_build(struct rng *rng, int64_t head_dim, int64_t rotary_dim, fastattn_dtype dtype, int in_place, enum guard_side side) {
    const int64_t batch = random_between(rng, 1, 2), heads = random_between(rng, 1, 9), length = random_between(rng, 1, 20);
    const int64_t item = (int64_t)dtype_size(dtype), count = batch * heads * length, pairs = rotary_dim / 2;
    struct rope r = {.args = {.size = sizeof r.args, .batch = batch, .num_heads = heads, .length = length, .head_dim = head_dim,
                              .rotary_dim = rotary_dim, .dtype = dtype, .interleaved = (int)random_between(rng, 0, 1), .isa = test_isa,
                              .num_threads = (int)random_between(rng, 0, 3)}};
    fastattn_rope_args *a = &r.args;
    const int swapped = (int)random_between(rng, 0, 1), shared = (int)random_between(rng, 0, 2);
    const int64_t strides[3] = {heads * length * head_dim * item, (swapped ? 1 : length) * head_dim * item,
                                (swapped ? heads : 1) * head_dim * item};
    memcpy(a->x_strides, strides, sizeof strides);
    memcpy(a->out_strides, strides, sizeof strides);
    /* One table for all, one for each entry, or one for each head. */
    const int64_t tables = shared == 0 ? 1 : shared == 1 ? batch : batch * heads;
    const int64_t table_strides[3] = {(shared == 0 ? 0 : shared == 1 ? length : heads * length) * pairs * 4,
                                      (shared == 2 ? length : 0) * pairs * 4, pairs * 4};
    memcpy(a->cos_strides, table_strides, sizeof table_strides);
    memcpy(a->sin_strides, table_strides, sizeof table_strides);
    float *cosines = guard_input("cos", (size_t)(tables * length * pairs) * 4, 4, side);
    float *sines = guard_input("sin", (size_t)(tables * length * pairs) * 4, 4, side);
    for (int64_t n = 0; n < tables * length * pairs; n++) {
        cosines[n] = (float)random_signed(rng);
        sines[n] = (float)random_signed(rng);
    }
    a->cos = cosines;
    a->sin = sines;
    r.before = guard_input("x before", (size_t)(count * head_dim * item), (size_t)item, side);
    for (int64_t n = 0; n < count * head_dim; n++) store(dtype, r.before + n * item, 3 * random_signed(rng));
    a->out = guard_output("out", (size_t)(count * head_dim * item), (size_t)item, side);
    if (in_place) memcpy(a->out, r.before, (size_t)(count * head_dim * item));
    a->x = in_place ? a->out : r.before;
    return r;
}

static void rope_verify(const struct rope *r) {
    const fastattn_rope_args *a = &r->args;
    const int64_t item = (int64_t)dtype_size(a->dtype), pairs = a->rotary_dim / 2;
    const double ulp = a->dtype == FASTATTN_FLOAT32 ? 0x1p-24 : a->dtype == FASTATTN_FLOAT16 ? 0x1p-11 : 0x1p-8;
    for (int64_t b = 0; b < a->batch; b++)
        for (int64_t h = 0; h < a->num_heads; h++)
            for (int64_t i = 0; i < a->length; i++) {
                const char *x = r->before + place(a->x_strides, b, h, i), *out = (char *)a->out + place(a->out_strides, b, h, i);
                for (int64_t n = 0; n < pairs; n++) {
                    const double c = *(const float *)((const char *)a->cos + place(a->cos_strides, b, h, i) + 4 * n);
                    const double s = *(const float *)((const char *)a->sin + place(a->sin_strides, b, h, i) + 4 * n);
                    const int64_t first = a->interleaved ? 2 * n : n, second = a->interleaved ? 2 * n + 1 : n + pairs;
                    const double p = load(a->dtype, x + first * item), q = load(a->dtype, x + second * item);
                    const double wanted[2] = {p * c - q * s, q * c + p * s};
                    const double got[2] = {load(a->dtype, out + first * item), load(a->dtype, out + second * item)};
                    for (int k = 0; k < 2; k++)
                        CHECK(fabs(got[k] - wanted[k]) <= ulp * fabs(wanted[k]) + 3e-7 * (fabs(p) + fabs(q)),
                              "(%lld, %lld, %lld), pair %lld is %g, should be %g", (long long)b, (long long)h, (long long)i, (long long)n,
                              got[k], wanted[k]);
                }
                CHECK(memcmp(out + a->rotary_dim * item, x + a->rotary_dim * item, (size_t)((a->head_dim - a->rotary_dim) * item)) == 0,
                      "the rest of a row has changed");
            }
}

TEST_EACH_ISA(rope_turns_pairs) {
    static const int64_t dims[][2] = {{2, 2}, {3, 2}, {8, 6}, {16, 16}, {24, 24}, {33, 30}, {34, 34}, {64, 64}, {70, 62}, {80, 80}, {128, 128}, {5, 0}};
    struct rng rng = {1};
    for (size_t d = 0; d < COUNT(dims); d++)
        for (size_t t = 0; t < COUNT(dtypes); t++)
            for (int variant = 0; variant < 8; variant++) {
                context("%lld of %lld numbers, dtype %d, variant %d", (long long)dims[d][1], (long long)dims[d][0], (int)dtypes[t], variant);
                const struct rope r = rope_build(&rng, dims[d][0], dims[d][1], dtypes[t], variant & 1,
                                                 variant & 2 ? GUARD_BEFORE : GUARD_BEHIND);
                guard_seal();
                CHECK_STATUS(fastattn_rope(&r.args), FASTATTN_OK);
                rope_verify(&r);
                guard_check();
                guard_release();
            }
}

TEST(rope_refuses_what_it_cannot_do) {
    struct rng rng = {2};
    const struct rope r = rope_build(&rng, 16, 12, FASTATTN_FLOAT16, 0, GUARD_BEHIND);
    const fastattn_rope_args good = r.args;
    const size_t bytes = (size_t)(good.batch * good.num_heads * good.length * good.head_dim) * 2;
    memset(good.out, 0x5a, bytes);
    guard_seal();
    CHECK_STATUS(fastattn_rope(NULL), FASTATTN_ERROR_ARGUMENT);
#define REFUSED(change, status)                           \
    do {                                                  \
        fastattn_rope_args a = good;                      \
        change;                                           \
        context("%s", #change);                           \
        CHECK_STATUS(fastattn_rope(&a), status);          \
    } while (0)
    REFUSED(a.size = 8, FASTATTN_ERROR_ARGUMENT);
    REFUSED(a.dtype = FASTATTN_FLOAT64, FASTATTN_ERROR_DTYPE);
    REFUSED(a.batch = -1, FASTATTN_ERROR_SHAPE);
    REFUSED(a.length = (int64_t)1 << 60, FASTATTN_ERROR_SHAPE);
    REFUSED((a.num_heads = (int64_t)1 << 39, a.length = 4), FASTATTN_ERROR_SHAPE);
    REFUSED(a.rotary_dim = 11, FASTATTN_ERROR_SHAPE);
    REFUSED(a.rotary_dim = 18, FASTATTN_ERROR_SHAPE);
    REFUSED(a.rotary_dim = -2, FASTATTN_ERROR_SHAPE);
    REFUSED(a.x = NULL, FASTATTN_ERROR_ARGUMENT);
    REFUSED(a.out = NULL, FASTATTN_ERROR_ARGUMENT);
    REFUSED(a.sin = NULL, FASTATTN_ERROR_ARGUMENT);
    REFUSED(a.x = (const char *)a.x + 1, FASTATTN_ERROR_ARGUMENT);
    REFUSED(a.cos = (const float *)((const char *)a.cos + 2), FASTATTN_ERROR_ARGUMENT);
    REFUSED((a.length = 2, a.cos_strides[2] = 6), FASTATTN_ERROR_ARGUMENT);
    REFUSED((a.length = 2, a.out_strides[2] = 0), FASTATTN_ERROR_ARGUMENT);
    REFUSED((a.length = 2, a.x = a.out, a.x_strides[2] += 2), FASTATTN_ERROR_ARGUMENT);
    REFUSED(a.isa = (fastattn_isa)77, FASTATTN_ERROR_ISA);
    REFUSED(a.threading = (fastattn_threading)77, FASTATTN_ERROR_THREADING);
    REFUSED((a.length = 0, a.x = NULL, a.out = NULL), FASTATTN_OK);
    REFUSED((a.length = 0, a.batch = INT64_MAX), FASTATTN_OK);
    for (size_t n = 0; n < bytes; n++) CHECK(((unsigned char *)good.out)[n] == 0x5a, "byte %d was written", (int)n);
    guard_check();
}
