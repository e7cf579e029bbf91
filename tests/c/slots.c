#include "slots.h"

#include <float.h>
#include <stdlib.h>
#include <string.h>

const struct columns columns[] = {{16, 0, 16}, {32, 0, 32}, {32, 16, 16}, {48, 0, 48}, {64, 0, 64}, {64, 16, 32}, {64, 48, 16}};
const fastattn_dtype dtypes[] = {FASTATTN_FLOAT32, FASTATTN_FLOAT16, FASTATTN_BFLOAT16};
const int64_t edges[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 15, 16, 17, 23, 31, 32, 33, 48, 64, 65, 80, 127, 128, 130};
struct rng rng;

const fa_ukernel *table(void) {
    const fa_ukernel *uk = fastattn_ukernel_select(test_isa);
    CHECK(uk != NULL, "no table");
    rng.state = 1;
    return uk;
}

float *panel(const char *name, int64_t rows, int ld) {
    float *x = guard_output(name, (size_t)(rows * ld) * 4, 64, GUARD_BEHIND);
    for (int64_t n = 0; n < rows * ld; n++)
        x[n] = UNTOUCHED;
    return x;
}

float *random_floats(const char *name, int64_t count, double amplitude) {
    float *x = guard_input(name, (size_t)count * 4, 4, GUARD_BEHIND);
    for (int64_t n = 0; n < count; n++)
        x[n] = (float)(amplitude * random_signed(&rng));
    return x;
}

char *random_rows(const void *rows_of[FA_PANEL_ROWS], int rows, int distinct, int64_t count, int64_t stride,
                  fastattn_dtype dtype) {
    char *x = guard_input("rows", (size_t)((distinct - 1) * stride + count * (int64_t)dtype_size(dtype)),
                          dtype_size(dtype), GUARD_BEHIND);
    for (int r = 0; r < rows; r++)
        rows_of[r] = x + (r < distinct ? r : distinct - 1) * stride;
    for (int r = 0; r < distinct; r++)
        for (int64_t d = 0; d < count; d++)
            store(dtype, x + r * stride + d * (int64_t)dtype_size(dtype),
                  dtype == FASTATTN_BOOL ? 1 : 3 * random_signed(&rng));
    return x;
}

fa_matrix stored_rows(const char *name, int64_t keys, int64_t dim, int64_t stride, fastattn_dtype dtype) {
    const int64_t item = (int64_t)dtype_size(dtype), span = (keys - 1) * llabs((long long)stride);
    char *x = guard_input(name, (size_t)(span + dim * item), (size_t)item, GUARD_BEHIND);
    memset(x, 0xFF, (size_t)(span + dim * item));
    const fa_matrix stored = fa_matrix_at(stride < 0 ? x + span : x, stride, dtype);
    for (int64_t j = 0; j < keys; j++)
        for (int64_t d = 0; d < dim; d++)
            store(dtype, stored_at(stored, j, d), random_signed(&rng));
    return stored;
}

char *stored_at(fa_matrix stored, int64_t key, int64_t d) {
    return (char *)(uintptr_t)stored.at + key * stored.stride + d * (int64_t)dtype_size(stored.dtype);
}

double stored_number(fa_matrix stored, int64_t key, int64_t d) { return load(stored.dtype, stored_at(stored, key, d)); }

double rounding_of_sum(int64_t terms) { return FLT_EPSILON * (2 + sqrt((double)terms)); }

/* The product is exact in double precision. Their sum is rounded to odd there (Boldo and Melquiond 2008), which is harmless
 * to the rounding that follows, since double precision has more than twice the digits. */
float fused(float a, float b, float c) {
    const volatile double product = (double)a * b, sum = product + c, of_c = sum - product;
    const volatile double of_product = sum - of_c, missing = (product - of_product) + (c - of_c);
    uint64_t bits;
    double odd = sum;
    memcpy(&bits, &odd, sizeof bits);
    if (missing != 0 && bits % 2 == 0) bits = (missing > 0) == (odd > 0) ? bits + 1 : bits - 1;
    memcpy(&odd, &bits, sizeof bits);
    return (float)odd;
}

void check_close(const char *what, int64_t row, int64_t column, double got, double wanted, double tolerance) {
    CHECK(isnan(wanted) ? isnan(got) : got == wanted || fabs(got - wanted) <= tolerance,
          "%s[%lld][%lld] is %.9g, should be %.9g", what, (long long)row, (long long)column, got, wanted);
}
