/* fastattn_normalize and fastattn_pointwise against their formulas, on guarded memory and in any layout; and hostile arguments. */
#include "problem.h"

#include "core/layers.h"

#include <math.h>
#include <string.h>

static const int64_t widths[] = {1, 3, 4, 15, 16, 17, 31, 33, 64, 100, 384, 1030};

static float *floats(struct rng *rng, const char *name, int64_t count, enum guard_side side) {
    float *x = guard_input(name, (size_t)count * 4, 4, side);
    for (int64_t n = 0; n < count; n++) x[n] = (float)(3 * random_signed(rng));
    return x;
}

/* What the layers compute of a row y, in double. */
static void formula_norm(double *out, const double *y, const fastattn_norm_args *a) {
    double mean = 0, square = 0;
    for (int64_t j = 0; j < a->width; j++) mean += y[j] / (double)a->width;
    if (!a->centred) mean = 0;
    for (int64_t j = 0; j < a->width; j++) square += (y[j] - mean) * (y[j] - mean) / (double)a->width;
    for (int64_t j = 0; j < a->width; j++)
        out[j] = (y[j] - mean) / sqrt(square + a->eps) * a->weight[j] + (a->bias ? a->bias[j] : 0);
}

TEST_EACH_ISA(layers_normalize_rows) {
    struct rng rng = {1};
    static double y[1030], wanted[1030];
    for (size_t w = 0; w < COUNT(widths); w++)
        for (int variant = 0; variant < 32; variant++) {
            context("width %lld, variant %d", (long long)widths[w], variant);
            const enum guard_side side = variant & 1 ? GUARD_BEFORE : GUARD_BEHIND;
            const int64_t n = widths[w], outer = random_between(&rng, 1, 5), inner = random_between(&rng, 1, 4), count = outer * inner * n;
            const int adds = variant & 4, keeps = adds && variant & 8;
            fastattn_norm_args a = {.size = sizeof a, .outer = outer, .inner = inner, .width = n, .eps = 1e-5f, .centred = variant & 2,
                                    .isa = test_isa, .num_threads = (int)random_between(&rng, 0, 3)};
            const float *x = floats(&rng, "x", count, side), *add = adds ? floats(&rng, "add", count, side) : NULL;
            a.weight = floats(&rng, "weight", n, side);
            a.bias = variant & 16 ? floats(&rng, "bias", n, side) : NULL;
            a.add_bias = adds && variant & 16 ? floats(&rng, "add_bias", n, side) : NULL;
            a.out = guard_output("out", (size_t)count * 4, 4, side);
            a.sum = keeps ? guard_output("sum", (size_t)count * 4, 4, side) : NULL;
            a.x = x, a.add = add;
            const int swapped = (int)random_between(&rng, 0, 1); /* the outer axis is the one whose rows lie side by side */
            const int64_t strides[2] = {(swapped ? 1 : inner) * n * 4, (swapped ? outer : 1) * n * 4};
            memcpy(a.x_strides, strides, sizeof strides);
            memcpy(a.add_strides, strides, sizeof strides);
            memcpy(a.sum_strides, strides, sizeof strides);
            memcpy(a.out_strides, strides, sizeof strides);
            if (keeps && variant & 1) { /* in place */
                memcpy(a.sum, add, (size_t)count * 4);
                a.add = a.sum;
            }
            guard_seal();
            CHECK_STATUS(fastattn_normalize(&a), FASTATTN_OK);
            for (int64_t row = 0; row < outer * inner; row++) {
                for (int64_t j = 0; j < n; j++) {
                    y[j] = (double)x[row * n + j] + (add ? (double)add[row * n + j] : 0) + (a.add_bias ? (double)a.add_bias[j] : 0);
                    CHECK(!keeps || fabs(a.sum[row * n + j] - y[j]) < 2e-6, "sum %g, should be %g", a.sum[row * n + j], y[j]);
                }
                formula_norm(wanted, y, &a);
                for (int64_t j = 0; j < n; j++)
                    CHECK(fabs(a.out[row * n + j] - wanted[j]) <= 2e-6 * (1 + fabs(wanted[j])) * (n == 1 ? 1000 : 1),
                          "row %lld, number %lld is %g, should be %g", (long long)row, (long long)j, a.out[row * n + j], wanted[j]);
            }
            guard_check();
            guard_release();
        }
}

static double formula_pointwise(double x, fastattn_pointwise_kind kind) {
    switch (kind) {
    case FASTATTN_POINTWISE_GELU: return x / 2 * erfc(-x / sqrt(2));
    case FASTATTN_POINTWISE_GELU_TANH: return x / 2 * (1 + tanh(sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
    case FASTATTN_POINTWISE_SILU: return x / (1 + exp(-x));
    default: return x > 0 ? x : 0;
    }
}

TEST_EACH_ISA(layers_activate_rows) {
    struct rng rng = {2};
    for (size_t w = 0; w < COUNT(widths); w++)
        for (int variant = 0; variant < 32; variant++) {
            context("width %lld, variant %d", (long long)widths[w], variant);
            const enum guard_side side = variant & 1 ? GUARD_BEFORE : GUARD_BEHIND;
            const int64_t n = widths[w], rows = random_between(&rng, 1, 12);
            fastattn_pointwise_args a = {.size = sizeof a, .rows = rows, .width = n, .gated = variant >> 1 & 1, .isa = test_isa,
                                         .kind = (fastattn_pointwise_kind)(variant >> 3), .num_threads = (int)random_between(&rng, 0, 3)};
            const int64_t both = a.gated ? 2 * n : n;
            a.x = floats(&rng, "x", rows * both, side);
            a.bias = variant & 4 ? floats(&rng, "bias", both, side) : NULL;
            a.out = guard_output("out", (size_t)(rows * n) * 4, 4, side);
            a.x_stride = both * 4, a.out_stride = n * 4;
            guard_seal();
            CHECK_STATUS(fastattn_pointwise(&a), FASTATTN_OK);
            for (int64_t i = 0; i < rows; i++)
                for (int64_t j = 0; j < n; j++) {
                    const float *x = a.x + i * both;
                    double wanted = formula_pointwise(a.bias ? x[j] + a.bias[j] : x[j], a.kind);
                    if (a.gated) wanted *= (double)x[n + j] + (a.bias ? (double)a.bias[n + j] : 0);
                    CHECK(fabs(a.out[i * n + j] - wanted) <= 1e-6 * (1 + fabs(wanted)), "(%lld, %lld) is %g, should be %g", (long long)i,
                          (long long)j, a.out[i * n + j], wanted);
                }
            guard_check();
            guard_release();
        }
}

TEST_EACH_ISA(activations_at_their_ends) {
    const float x[] = {0.0f, -0.0f, 1e-30f, -1e-30f, 12.0f, -12.0f, 80.0f, -80.0f, 3e38f, -1e4f, INFINITY, NAN};
    for (int kind = FASTATTN_POINTWISE_GELU; kind <= FASTATTN_POINTWISE_RELU; kind++) {
        float out[COUNT(x)];
        const fastattn_pointwise_args a = {.size = sizeof a, .rows = 1, .width = COUNT(x), .kind = (fastattn_pointwise_kind)kind, .x = x,
                                           .out = out, .isa = test_isa};
        CHECK_STATUS(fastattn_pointwise(&a), FASTATTN_OK);
        for (size_t n = 0; n < COUNT(x); n++) {
            const double wanted = isinf(x[n]) ? INFINITY : formula_pointwise(x[n], a.kind);
            CHECK(isnan(x[n]) ? isnan(out[n]) : out[n] == wanted || fabs(out[n] - wanted) <= 1e-6 * (1 + fabs(wanted)), "kind %d of %g is %g",
                  kind, x[n], out[n]);
        }
    }
}

TEST(layers_refuse_what_they_cannot_do) {
    struct rng rng = {3};
    float *x = floats(&rng, "x", 4 * 16, GUARD_BEHIND), *out = guard_output("out", 4 * 16 * 4, 4, GUARD_BEHIND);
    float *weight = floats(&rng, "weight", 16, GUARD_BEHIND);
    memset(out, 0x5a, 4 * 16 * 4);
    const fastattn_norm_args norm = {.size = sizeof norm, .outer = 2, .inner = 2, .width = 16, .x = x, .out = out, .weight = weight,
                                     .x_strides = {128, 64}, .out_strides = {128, 64}};
    const fastattn_pointwise_args pointwise = {.size = sizeof pointwise, .rows = 4, .width = 16, .x = x, .out = out, .x_stride = 64,
                                               .out_stride = 64};
    CHECK_STATUS(fastattn_normalize(NULL), FASTATTN_ERROR_ARGUMENT);
    CHECK_STATUS(fastattn_pointwise(NULL), FASTATTN_ERROR_ARGUMENT);
#define REFUSED(type, call, good, change, status)         \
    do {                                                  \
        type a = good;                                    \
        change;                                           \
        context("%s", #change);                           \
        CHECK_STATUS(call(&a), status);                   \
    } while (0)
#define NORM_REFUSED(change, status) REFUSED(fastattn_norm_args, fastattn_normalize, norm, change, status)
#define POINTWISE_REFUSED(change, status) REFUSED(fastattn_pointwise_args, fastattn_pointwise, pointwise, change, status)
    NORM_REFUSED(a.size = 8, FASTATTN_ERROR_ARGUMENT);
    NORM_REFUSED(a.x = NULL, FASTATTN_ERROR_ARGUMENT);
    NORM_REFUSED(a.weight = NULL, FASTATTN_ERROR_ARGUMENT);
    NORM_REFUSED(a.weight = (const float *)((const char *)weight + 2), FASTATTN_ERROR_ARGUMENT);
    NORM_REFUSED(a.add_bias = weight, FASTATTN_ERROR_ARGUMENT);
    NORM_REFUSED(a.sum = out, FASTATTN_ERROR_ARGUMENT);
    NORM_REFUSED(a.out_strides[0] = 0, FASTATTN_ERROR_ARGUMENT);
    NORM_REFUSED(a.width = -1, FASTATTN_ERROR_SHAPE);
    NORM_REFUSED((a.outer = (int64_t)1 << 30, a.inner = (int64_t)1 << 30), FASTATTN_ERROR_SHAPE);
    NORM_REFUSED(a.isa = (fastattn_isa)77, FASTATTN_ERROR_ISA);
    NORM_REFUSED(a.threading = (fastattn_threading)77, FASTATTN_ERROR_THREADING);
    NORM_REFUSED((a.outer = 0, a.x = NULL, a.out = NULL, a.weight = NULL), FASTATTN_OK);
    POINTWISE_REFUSED(a.size = 8, FASTATTN_ERROR_ARGUMENT);
    POINTWISE_REFUSED(a.kind = (fastattn_pointwise_kind)4, FASTATTN_ERROR_ARGUMENT);
    POINTWISE_REFUSED(a.out = NULL, FASTATTN_ERROR_ARGUMENT);
    POINTWISE_REFUSED(a.x_stride = 6, FASTATTN_ERROR_ARGUMENT);
    POINTWISE_REFUSED(a.rows = (int64_t)1 << 60, FASTATTN_ERROR_SHAPE);
    POINTWISE_REFUSED(a.isa = (fastattn_isa)77, FASTATTN_ERROR_ISA);
    POINTWISE_REFUSED((a.rows = 0, a.x = NULL, a.out = NULL), FASTATTN_OK);
    for (size_t n = 0; n < 4 * 16 * 4; n++) CHECK(((unsigned char *)out)[n] == 0x5a, "byte %d was written", (int)n);
    guard_check();
    guard_release();
}
