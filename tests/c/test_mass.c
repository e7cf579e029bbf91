/* Weights summed by segment: what attention to values gives that say which segment a key is in. */
#include "problem.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* The segment of each key: runs that ascend or stay, single keys, and keys of none. */
static int32_t *make_segments(int64_t tables, int64_t keys, int64_t num_segments, struct rng *rng, enum guard_side side) {
    int32_t *segments = guard_input("segments", (size_t)(tables * keys) * sizeof *segments, sizeof *segments, side);
    for (int64_t j = 0, next = -1; j < tables * keys; j++) {
        const int64_t turn = random_between(rng, 0, 9);
        next = turn == 0 ? random_between(rng, -1, num_segments - 1) : turn < 5 && next + 1 < num_segments ? next + 1 : next;
        segments[j] = (int32_t)next;
    }
    return segments;
}

static void check_mass(const struct spec *given, uint64_t seed, enum guard_side side) {
    struct spec spec = *given;
    struct problem p;
    struct rng rng = {seed};
    spec.q_dtype = FASTATTN_FLOAT32, spec.precision = FASTATTN_PRECISION_HIGHEST, spec.v_layout = PACKED;
    const int64_t count = spec.v_head_dim = random_between(&rng, 1, 70);
    const int shared = random_between(&rng, 0, 1) == 1;
    spec_context(&spec, seed);

    problem_build(&p, &spec, seed, side);
    fastattn_attention_args *a = &p.args;
    int32_t *segments = make_segments(shared ? 1 : a->batch, a->kv_len, count, &rng, side);
    const int64_t of_entry = shared ? 0 : a->kv_len, rows = a->batch * a->num_heads * a->q_len;
    for (int64_t b = 0; b < a->batch; b++)
        for (int64_t h = 0; h < a->num_kv_heads; h++)
            for (int64_t j = 0; j < a->kv_len; j++)
                for (int64_t d = 0; d < count; d++)
                    store(a->kv_dtype, element(p.v, a->v_strides, a->kv_dtype, b, h, j, d), segments[b * of_entry + j] == d);
    problem_seal(&p, side);
    CHECK_STATUS(fastattn_attention(a, p.workspace, p.workspace_size), FASTATTN_OK);
    float *expected = malloc((size_t)(rows * count + 1) * sizeof *expected), *at = expected;
    CHECK(expected != NULL, "out of memory");
    for (int64_t r = 0; r < rows; r++)
        for (int64_t d = 0; d < count; d++)
            *at++ = *(float *)element(a->out, a->out_strides, FASTATTN_FLOAT32, r / a->q_len / a->num_heads,
                                      r / a->q_len % a->num_heads, r % a->q_len, d);
    guard_check();
    guard_release();

    struct rng again = {seed};
    random_between(&again, 1, 70), random_between(&again, 0, 1);
    problem_build(&p, &spec, seed, side);
    a->segments = make_segments(shared ? 1 : a->batch, a->kv_len, count, &again, side);
    a->segments_stride = of_entry * (int64_t)sizeof *segments;
    a->num_segments = count;
    a->v_head_dim = 0;
    a->v = NULL;
    problem_seal(&p, side);
    CHECK_STATUS(fastattn_attention(a, p.workspace, p.workspace_size), FASTATTN_OK);
    at = expected;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t d = 0; d < count; d++, at++) {
            const float found = *(float *)element(a->out, a->out_strides, FASTATTN_FLOAT32, r / a->q_len / a->num_heads,
                                                  r / a->q_len % a->num_heads, r % a->q_len, d);
            CHECK(fabsf(found - *at) <= 3e-6f, "segment %lld of row %lld has %.9g instead of %.9g", (long long)d, (long long)r, (double)found,
                  (double)*at);
        }
    guard_check();
    guard_release();
    free(expected);
}

TEST_EACH_ISA(mass_is_attention_to_values_that_name_segments) {
    static const int64_t rows[] = {1, 3, 14, 40, 130}; /* each way of taking rows: one, few, by rows, lanes, panels */
    static const int64_t keys[] = {1, 15, 64, 200, 2100};
    static const fastattn_dtype dtypes[] = {FASTATTN_FLOAT32, FASTATTN_FLOAT16, FASTATTN_BFLOAT16};
    for (size_t r = 0; r < COUNT(rows); r++)
        for (size_t k = 0; k < COUNT(keys); k++) {
            const struct spec spec = {.name = "mass", .batch = 2, .heads = 4, .kv_heads = 2, .q_len = rows[r], .kv_len = keys[k], .head_dim = 24,
                                      .kv_dtype = dtypes[(r + k) % 3], .causal = k % 2 == 0, .lengths = (r + k) % 3, .out_layout = r % 4,
                                      .num_threads = 2};
            check_mass(&spec, r * 5 + k, (r + k) % 2 ? GUARD_BEHIND : GUARD_BEFORE);
        }
}

TEST_EACH_ISA(mass_under_random_options) {
    struct rng rng = {78};
    for (int n = 0; n < test_effort; n++) {
        const uint64_t seed = random_bits(&rng);
        struct rng own = {seed};
        const struct spec spec = spec_random(&own);
        check_mass(&spec, seed, n % 2 ? GUARD_BEHIND : GUARD_BEFORE);
    }
}

/* Sequences packed one after the other, of one table of segments, and each of them alone. */
TEST_EACH_ISA(mass_of_packed_sequences) {
    enum { BATCH = 5, ROWS = 300, KEYS = 2900, SEGMENTS = 130 };
    static const int64_t tables[2][BATCH + 1] = {{0, 1, 1, 140, 156, ROWS}, {0, 70, 75, 75, 375, KEYS}};
    for (int dtype = FASTATTN_FLOAT32; dtype <= FASTATTN_BFLOAT16; dtype++) {
        const struct spec spec = {.name = "packed mass", .heads = 4, .kv_heads = 2, .q_len = ROWS, .kv_len = KEYS, .head_dim = 16,
                                  .v_head_dim = SEGMENTS, .kv_dtype = dtype, .causal = 1, .q_layout = SWAPPED, .k_layout = SWAPPED,
                                  .out_layout = SWAPPED, .num_threads = 3};
        struct problem p;
        struct rng rng = {(uint64_t)dtype};
        context("packed mass, dtype %d", dtype);
        problem_build(&p, &spec, 3, GUARD_BEHIND);
        const int64_t *of[2]; /* the first of the queries, and of the keys, of each */
        for (int n = 0; n < 2; n++) {
            int64_t *table = guard_input("cu_seqlens", sizeof tables[n], 8, GUARD_BEHIND);
            memcpy(table, tables[n], sizeof tables[n]);
            of[n] = table;
        }
        p.args.segments = make_segments(1, KEYS, SEGMENTS, &rng, GUARD_BEHIND);
        p.args.num_segments = SEGMENTS;
        p.args.v_head_dim = 0;
        p.args.v = NULL;
        const fastattn_attention_args whole = p.args;
        p.args.batch = BATCH;
        p.args.cu_seqlens_q = of[0];
        p.args.cu_seqlens_k = of[1];
        problem_seal(&p, GUARD_BEHIND);
        CHECK_STATUS(fastattn_attention(&p.args, NULL, 0), FASTATTN_OK);
        uint8_t *bits = problem_snapshot(&p);
        for (int b = 0; b < BATCH; b++) {
            fastattn_attention_args one = whole;
            one.q_len = of[0][b + 1] - of[0][b];
            one.kv_len = of[1][b + 1] - of[1][b];
            one.q = element(whole.q, whole.q_strides, whole.q_dtype, 0, 0, of[0][b], 0);
            one.k = element(whole.k, whole.k_strides, whole.kv_dtype, 0, 0, of[1][b], 0);
            one.segments = whole.segments + of[1][b];
            one.out = element(whole.out, whole.out_strides, FASTATTN_FLOAT32, 0, 0, of[0][b], 0);
            if (whole.lse) one.lse = element(whole.lse, whole.lse_strides, FASTATTN_FLOAT32, 0, 0, of[0][b], 0);
            for (int64_t n = 0; n < whole.num_heads * one.q_len; n++)
                store(FASTATTN_FLOAT32, element(one.out, one.out_strides, FASTATTN_FLOAT32, 0, n % whole.num_heads, n / whole.num_heads, 7), -1e9);
            CHECK_STATUS(fastattn_attention(&one, NULL, 0), FASTATTN_OK);
        }
        CHECK(problem_equals(&p, bits), "other sums alone than packed");
        guard_check();
        guard_release();
        free(bits);
    }
}

static struct problem bad;
static int32_t *bad_segments;

static void build_bad(void) {
    static const struct spec spec = {.name = "bad segments", .batch = 2, .heads = 2, .kv_heads = 2, .q_len = 3, .kv_len = 50, .head_dim = 16,
                                     .v_head_dim = 8};
    struct rng rng = {5};
    problem_build(&bad, &spec, 7, GUARD_BEHIND);
    bad_segments = make_segments(2, 50, 8, &rng, GUARD_BEHIND);
    bad.args.segments = bad_segments;
    bad.args.segments_stride = 50 * (int64_t)sizeof *bad_segments;
    bad.args.num_segments = 8;
    bad.args.v_head_dim = 0;
}

#define SEGMENTS(status, spoil) (build_bad(), (void)(spoil), problem_ends_with(&bad, status, #spoil))

TEST(errors_segments) {
    SEGMENTS(FASTATTN_OK, 0);
    SEGMENTS(FASTATTN_OK, bad.args.v = NULL);
    SEGMENTS(FASTATTN_ERROR_SEGMENTS, bad_segments[0] = -2);
    SEGMENTS(FASTATTN_ERROR_SEGMENTS, bad_segments[49] = 8);
    SEGMENTS(FASTATTN_ERROR_SEGMENTS, bad_segments[99] = INT32_MAX);
    SEGMENTS(FASTATTN_ERROR_SEGMENTS, bad_segments[50] = INT32_MIN);
    SEGMENTS(FASTATTN_ERROR_SEGMENTS, bad.args.num_segments = -1);
    SEGMENTS(FASTATTN_ERROR_SEGMENTS, bad.args.num_segments = INT64_MAX);
    SEGMENTS(FASTATTN_ERROR_SEGMENTS, bad.args.v_head_dim = 8);
    SEGMENTS(FASTATTN_ERROR_SEGMENTS, (bad.args.indices = bad_segments, bad.args.indices_size = 4));
    SEGMENTS(FASTATTN_ERROR_ARGUMENT, bad.args.segments_stride += 2);
    SEGMENTS(FASTATTN_ERROR_ARGUMENT, bad.args.segments = (const int32_t *)(const void *)((const char *)bad_segments + 2));
    SEGMENTS(FASTATTN_ERROR_ARGUMENT, bad.args.out = NULL);
}
