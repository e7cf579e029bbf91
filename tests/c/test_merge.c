/* fastattn_merge_states against its formula, and against attention over the keys undivided. */
#include "problem.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_PARTS = 9 };

static const fastattn_dtype dtypes[] = {FASTATTN_FLOAT32, FASTATTN_FLOAT16, FASTATTN_BFLOAT16};

struct merge {
    int64_t parts, rows, columns;
    fastattn_dtype dtype;
    void *outs[MOST_PARTS], *out;
    float *lses[MOST_PARTS], *lse;
};

static void merge_build(struct merge *m, int64_t parts, int64_t rows, int64_t columns, fastattn_dtype dtype,
                        struct rng *rng, enum guard_side side) {
    const size_t item = dtype_size(dtype);
    *m = (struct merge){.parts = parts, .rows = rows, .columns = columns, .dtype = dtype};
    for (int64_t n = 0; n < parts; n++) {
        m->outs[n] = guard_input("a part", (size_t)(rows * columns) * item, item, side);
        m->lses[n] = guard_input("a part's lse", (size_t)rows * 4, 4, side);
        for (int64_t i = 0; i < rows * columns; i++)
            store(dtype, (char *)m->outs[n] + i * (int64_t)item, random_signed(rng));
        for (int64_t i = 0; i < rows; i++)
            m->lses[n][i] = (float)(10 * random_signed(rng));
    }
    m->out = guard_output("out", (size_t)(rows * columns) * item, item, side);
    m->lse = guard_output("lse", (size_t)rows * 4, 4, side);
}

static void merge_run(const struct merge *m, int threads) {
    const void *outs[MOST_PARTS];
    const float *lses[MOST_PARTS];
    for (int64_t n = 0; n < m->parts; n++) {
        outs[n] = m->outs[n];
        lses[n] = m->lses[n];
    }
    const fastattn_merge_args args = {.size = sizeof args, .num_parts = m->parts, .rows = m->rows, .v_head_dim = m->columns,
                                      .outs = outs, .lses = lses, .dtype = m->dtype, .out = m->out, .lse = m->lse,
                                      .isa = test_isa, .num_threads = threads};
    guard_seal();
    CHECK_STATUS(fastattn_merge(&args), FASTATTN_OK);
    guard_check();
}

static double out_at(const struct merge *m, const void *out, int64_t row, int64_t column) {
    return load(m->dtype, (const char *)out + (row * m->columns + column) * (int64_t)dtype_size(m->dtype));
}

static void merge_verify(const struct merge *m) {
    const double half_ulp = m->dtype == FASTATTN_FLOAT16 ? 0x1p-11 : m->dtype == FASTATTN_BFLOAT16 ? 0x1p-8 : 0x1p-24;
    for (int64_t i = 0; i < m->rows; i++) {
        double maximum = -(double)INFINITY, sum = 0;
        for (int64_t n = 0; n < m->parts; n++)
            maximum = fmax(maximum, m->lses[n][i]);
        for (int64_t n = 0; n < m->parts; n++)
            if (!isinf(m->lses[n][i]))
                sum += exp(m->lses[n][i] - maximum);
        const double lse = sum > 0 ? maximum + log(sum) : -(double)INFINITY;
        CHECK(sum > 0 ? fabs(m->lse[i] - lse) <= 1e-6 * (1 + fabs(lse)) : m->lse[i] == -INFINITY,
              "lse[%lld] is %g, should be %g", (long long)i, (double)m->lse[i], lse);
        for (int64_t d = 0; d < m->columns; d++) {
            double out = 0, spread = 0;
            for (int64_t n = 0; n < m->parts; n++)
                if (!isinf(m->lses[n][i])) {
                    const double term = exp(m->lses[n][i] - lse) * out_at(m, m->outs[n], i, d);
                    out += term;
                    spread += fabs(term) * (1 + fabs(m->lses[n][i]) + fabs(lse));
                }
            const double got = out_at(m, m->out, i, d);
            CHECK(fabs(got - out) <= 4e-7 * spread + half_ulp * fabs(out) + 1e-7 * (m->dtype == FASTATTN_FLOAT16),
                  "out[%lld,%lld] is %.9g, should be %.9g", (long long)i, (long long)d, got, out);
        }
    }
}

TEST_EACH_ISA(merge_follows_the_formula) {
    static const int64_t columns[] = {0, 1, 3, 8, 15, 16, 17, 64, 100};
    struct rng rng = {1};
    for (int64_t parts = 1; parts <= MOST_PARTS; parts++)
        for (size_t c = 0; c < COUNT(columns); c++)
            for (size_t t = 0; t < COUNT(dtypes); t++)
                for (int side = 0; side < 2; side++) {
                    struct merge m;
                    context("%lld parts, %lld columns, dtype %d", (long long)parts, (long long)columns[c],
                            (int)dtypes[t]);
                    merge_build(&m, parts, (int64_t)c, columns[c], dtypes[t], &rng, (enum guard_side)side);
                    merge_run(&m, 1);
                    merge_verify(&m);
                    guard_release();
                }
}

/* Parts with lse = -inf contribute nothing, whatever their out holds. */
TEST_EACH_ISA(merge_ignores_empty_parts) {
    struct rng rng = {2};
    for (int pattern = 0; pattern < 16; pattern++)
        for (size_t t = 0; t < COUNT(dtypes); t++) {
            struct merge m;
            context("empty parts %d, dtype %d", pattern, (int)dtypes[t]);
            merge_build(&m, 4, 3, 21, dtypes[t], &rng, GUARD_BEHIND);
            for (int64_t n = 0; n < 4; n++)
                if (pattern >> n & 1) {
                    m.lses[n][1] = -INFINITY; /* the middle row only */
                    for (int64_t d = 0; d < m.columns; d++)
                        store(m.dtype, (char *)m.outs[n] + (m.columns + d) * (int64_t)dtype_size(m.dtype),
                              n & 1 ? (double)NAN : (double)INFINITY);
                }
            merge_run(&m, 1);
            merge_verify(&m);
            if (pattern == 15)
                for (int64_t d = 0; d < m.columns; d++)
                    CHECK(out_at(&m, m.out, 1, d) == 0, "a row of nothing is not 0");
            guard_release();
        }
}

/* The only part that is not empty is copied, to the bit. */
TEST_EACH_ISA(merge_of_one_part_is_exact) {
    struct rng rng = {3};
    for (size_t t = 0; t < COUNT(dtypes); t++)
        for (int64_t live = 0; live < 3; live++) {
            struct merge m;
            merge_build(&m, 3, 5, 19, dtypes[t], &rng, GUARD_BEFORE);
            for (int64_t n = 0; n < 3; n++)
                for (int64_t i = 0; n != live && i < m.rows; i++)
                    m.lses[n][i] = -INFINITY;
            merge_run(&m, 1);
            CHECK(memcmp(m.out, m.outs[live], (size_t)(m.rows * m.columns) * dtype_size(m.dtype)) == 0, "out differs");
            CHECK(memcmp(m.lse, m.lses[live], (size_t)m.rows * 4) == 0, "lse differs");
            guard_release();
        }
}

TEST_EACH_ISA(merge_survives_extreme_states) {
    static const float extremes[] = {-3e38f, -1e30f, -1e4f, 0, 1e4f, 1e30f, 3e38f};
    struct rng rng = {4};
    for (size_t a = 0; a < COUNT(extremes); a++)
        for (size_t b = 0; b < COUNT(extremes); b++) {
            struct merge m;
            context("lse %g and %g", (double)extremes[a], (double)extremes[b]);
            merge_build(&m, 2, 1, 9, FASTATTN_FLOAT32, &rng, GUARD_BEHIND);
            m.lses[0][0] = extremes[a];
            m.lses[1][0] = extremes[b];
            merge_run(&m, 1);
            merge_verify(&m);
            guard_release();
        }
}

TEST_EACH_ISA(merge_carries_nan) {
    struct rng rng = {5};
    struct merge m;
    merge_build(&m, 3, 3, 5, FASTATTN_FLOAT32, &rng, GUARD_BEHIND);
    ((float *)m.outs[1])[0] = NAN;
    m.lses[2][1] = NAN;
    merge_run(&m, 1);
    CHECK(isnan(out_at(&m, m.out, 0, 0)) && !isnan(out_at(&m, m.out, 0, 1)), "a NaN of a part that counts");
    CHECK(isnan(out_at(&m, m.out, 1, 3)) && isnan(m.lse[1]), "a NaN of an lse");
    CHECK(!isnan(out_at(&m, m.out, 2, 0)) && !isnan(m.lse[2]), "a NaN of another row");
}

/* Rows that several items share, on one thread and on three; the last item is not whole. */
TEST_EACH_ISA(merge_is_shared_among_threads) {
    struct rng rng = {7};
    for (size_t t = 0; t < COUNT(dtypes); t++) {
        struct merge m;
        context("dtype %d", (int)dtypes[t]);
        merge_build(&m, 3, 2000 + 13, 129, dtypes[t], &rng, GUARD_BEHIND);
        const size_t bytes = (size_t)(m.rows * m.columns) * dtype_size(m.dtype), lse_bytes = (size_t)m.rows * 4;
        void *alone = malloc(bytes + lse_bytes);
        merge_run(&m, 1);
        merge_verify(&m);
        memcpy(alone, m.out, bytes);
        memcpy((char *)alone + bytes, m.lse, lse_bytes);
        memset(m.out, 0x55, bytes);
        memset(m.lse, 0x55, lse_bytes);
        merge_run(&m, 3);
        CHECK(memcmp(m.out, alone, bytes) == 0 && memcmp(m.lse, (char *)alone + bytes, lse_bytes) == 0, "threads change bits");
        free(alone);
        guard_release();
    }
}

/* Attention over three pieces of the keys, merged, is attention over all of them. */
TEST_EACH_ISA(merge_of_attention_is_attention) {
    static const int64_t bounds[] = {0, 17, 18, 60};
    const struct spec spec = {.name = "whole", .q_len = 12, .kv_len = 60, .head_dim = 24, .offset = OFFSET_ZERO,
                              .causal = 1};
    struct problem problem;
    struct rng rng = {6};
    struct merge m;
    problem_build(&problem, &spec, 1, GUARD_BEHIND);
    problem.query_offset[0] = 20; /* the last piece is invisible to some rows and partly visible to others */
    merge_build(&m, 3, spec.q_len, spec.head_dim, FASTATTN_FLOAT32, &rng, GUARD_BEHIND);
    for (int64_t n = 0; n < 3; n++) {
        fastattn_attention_args piece = problem.args;
        const int64_t offset = problem.query_offset[0] - bounds[n];
        piece.query_offset = &offset;
        piece.kv_len = bounds[n + 1] - bounds[n];
        piece.k = (const char *)piece.k + bounds[n] * piece.k_strides[2];
        piece.v = (const char *)piece.v + bounds[n] * piece.v_strides[2];
        piece.out = m.outs[n];
        piece.lse = m.lses[n];
        CHECK_STATUS(fastattn_attention(&piece, NULL, 0), FASTATTN_OK);
    }
    merge_run(&m, 1);
    memcpy(problem.args.out, m.out, problem.out.size);
    memcpy(problem.args.lse, m.lse, problem.lse.size);
    problem_verify(&problem, 2);
}
