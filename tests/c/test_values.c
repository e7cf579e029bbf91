/* NaN and infinity, empty rows, sizes of zero, and values at which arithmetic is tempted to go wrong. */
#include "problem.h"

#include <float.h>
#include <math.h>
#include <string.h>

static const fastattn_dtype dtypes[] = {FASTATTN_FLOAT32, FASTATTN_FLOAT16, FASTATTN_BFLOAT16};
static const double poisons[] = {(double)NAN, (double)INFINITY, -(double)INFINITY};

static void plant(void *base, const int64_t strides[3], fastattn_dtype dtype, int64_t row, int64_t columns,
                  double value) {
    for (int64_t d = 0; d < columns; d++)
        store(dtype, element(base, strides, dtype, 0, 0, row, d), value);
}

static double out_at(const struct problem *problem, int64_t i, int64_t d) {
    return load(problem->args.q_dtype,
                element(problem->args.out, problem->args.out_strides, problem->args.q_dtype, 0, 0, i, d));
}

/* Keys and values that one row sees and its neighbours in the tile do not: the oracle never touches what is invisible.
 */
TEST_EACH_ISA(values_poison_is_confined_to_rows_that_see_it) {
    static const struct spec specs[] = {
        {.name = "causal", .q_len = 40, .kv_len = 90, .head_dim = 20, .causal = 1},
        {.name = "window", .q_len = 40, .kv_len = 90, .head_dim = 20, .windowed = 1, .window_left = 9,
         .window_right = 4},
        {.name = "bool mask", .q_len = 40, .kv_len = 90, .head_dim = 20, .mask = MASK_BOOL, .hidden = 0.5},
        {.name = "float mask", .q_len = 40, .kv_len = 90, .head_dim = 20, .mask = MASK_FLOAT32, .hidden = 0.5},
        {.name = "grouped", .heads = 4, .q_len = 5, .kv_len = 90, .head_dim = 20, .causal = 1},
        {.name = "blocks", .q_len = 40, .kv_len = 90, .head_dim = 20, .block_size = 16, .blocks_density = 0.5},
        {.name = "element bits", .q_len = 40, .kv_len = 90, .head_dim = 20, .block_size = 20, .blocks_density = 0.8,
         .blocks_partial = 1},
        {.name = "softcap", .q_len = 40, .kv_len = 90, .head_dim = 20, .causal = 1, .softcap = 3},
        {.name = "split", .heads = 2, .q_len = 2, .kv_len = 3000, .head_dim = 20, .causal = 1, .mask = MASK_BOOL,
         .hidden = 0.5},
    };
    for (size_t n = 0; n < COUNT(specs) * COUNT(dtypes) * COUNT(poisons) * 2; n++) {
        struct spec spec = specs[n / 18];
        const fastattn_dtype dtype = dtypes[n % 3];
        const double poison = poisons[n / 3 % 3];
        const int in_values = n / 9 % 2;
        struct problem problem;
        spec.q_dtype = spec.kv_dtype = dtype;
        spec_context(&spec, n);
        problem_build(&problem, &spec, n, GUARD_BEHIND);
        for (int64_t key = spec.kv_len - 30; key < spec.kv_len; key += 13)
            if (in_values)
                plant(problem.v, problem.args.v_strides, dtype, key, spec.head_dim, poison);
            else
                plant(problem.k, problem.args.k_strides, dtype, key, spec.head_dim, poison);
        problem_check(&problem, GUARD_BEHIND);
        guard_release();
    }
}

TEST_EACH_ISA(values_poison_in_queries_and_biases) {
    for (size_t n = 0; n < COUNT(poisons); n++) {
        struct problem problem;
        struct spec spec = {.name = "query", .q_len = 20, .kv_len = 70, .head_dim = 20};
        spec_context(&spec, n);
        problem_build(&problem, &spec, n, GUARD_BEHIND);
        store(FASTATTN_FLOAT32, element(problem.q, problem.args.q_strides, FASTATTN_FLOAT32, 0, 0, 7, 3), poisons[n]);
        problem_check(&problem, GUARD_BEHIND);
        guard_release();

        spec.mask = MASK_FLOAT32 + n % 2;
        spec_context(&spec, n);
        problem_build(&problem, &spec, n, GUARD_BEHIND);
        store(problem.args.mask_dtype, mask_element(&problem, 0, 0, 7, 69),
              poisons[n]); /* -inf hides, the others are seen */
        problem_check(&problem, GUARD_BEHIND);
        guard_release();
    }
}

/* Scores of -inf from the inputs are scores and hide nothing: in a row of nothing else the formula is 0 / 0. */
TEST_EACH_ISA(values_infinite_scores_are_not_masks) {
    struct spec spec = {.name = "scores", .q_len = 3, .kv_len = 40, .head_dim = 4};
    for (int all = 0; all < 2; all++) {
        struct problem problem;
        spec_context(&spec, (uint64_t)all);
        problem_build(&problem, &spec, 1, GUARD_BEHIND);
        for (int64_t j = all ? 0 : 5; j < (all ? spec.kv_len : 6); j++)
            for (int64_t d = 0; d < spec.head_dim; d++)
                store(FASTATTN_FLOAT32, element(problem.k, problem.args.k_strides, FASTATTN_FLOAT32, 0, 0, j, d),
                      -FLT_MAX);
        for (int64_t d = 0; d < spec.head_dim; d++)
            store(FASTATTN_FLOAT32, element(problem.q, problem.args.q_strides, FASTATTN_FLOAT32, 0, 0, 1, d), INFINITY);
        problem_seal(&problem, GUARD_BEHIND);
        CHECK_STATUS(fastattn_attention(&problem.args, problem.workspace, problem.workspace_size), FASTATTN_OK);
        CHECK(isnan(out_at(&problem, 1, 0)), "out is %g",
              out_at(&problem, 1, 0)); /* other keys score +inf when not all */
        guard_release();
    }
}

TEST_EACH_ISA(values_empty_rows_are_zero) {
    static const struct spec specs[] = {
        {.name = "causal", .q_len = 90, .kv_len = 20, .head_dim = 20, .causal = 1},
        {.name = "causal, sink", .heads = 3, .q_len = 90, .kv_len = 20, .head_dim = 20, .causal = 1, .sinks = 1},
        {.name = "mask", .heads = 2, .q_len = 20, .kv_len = 200, .head_dim = 20, .mask = MASK_BOOL, .hidden = 1},
        {.name = "mask, sink", .heads = 2, .q_len = 20, .kv_len = 200, .head_dim = 20, .mask = MASK_FLOAT16,
         .hidden = 1, .sinks = 1},
        {.name = "blocks", .q_len = 100, .kv_len = 100, .head_dim = 20, .block_size = 32},
        {.name = "no keys", .q_len = 20, .kv_len = 0, .head_dim = 20},
        {.name = "no keys, sink", .q_len = 20, .kv_len = 0, .head_dim = 20, .sinks = 1},
        {.name = "decode", .heads = 2, .q_len = 1, .kv_len = 4000, .head_dim = 8, .mask = MASK_BOOL, .hidden = 1},
        {.name = "decode, sink", .heads = 2, .q_len = 1, .kv_len = 4000, .head_dim = 8, .mask = MASK_BOOL, .hidden = 1,
         .sinks = 1},
    };
    for (size_t n = 0; n < COUNT(specs) * COUNT(dtypes); n++) {
        struct spec spec = specs[n / COUNT(dtypes)];
        spec.q_dtype = spec.kv_dtype = dtypes[n % COUNT(dtypes)];
        spec_check(&spec, n);
    }
}

/* The only live key comes after whole tiles of hidden ones. */
TEST_EACH_ISA(values_first_live_key_comes_late) {
    for (int live = 0; live < 1200; live += 171) {
        struct problem problem;
        struct spec spec = {.name = "late", .q_len = 9, .kv_len = 1200, .head_dim = 16, .mask = MASK_FLOAT32,
                            .hidden = 1};
        spec_context(&spec, (uint64_t)live);
        problem_build(&problem, &spec, 1, GUARD_BEHIND);
        for (int64_t i = 0; i < spec.q_len; i += 2)
            store(FASTATTN_FLOAT32, mask_element(&problem, 0, 0, i, live), 0);
        problem_check(&problem, GUARD_BEHIND);
        guard_release();
    }
}

/* One visible key has the weight 1: its value is copied, to the bit. */
TEST_EACH_ISA(values_single_key_is_exact) {
    for (size_t n = 0; n < COUNT(dtypes); n++) {
        struct problem problem;
        struct spec spec = {.name = "single", .heads = 2, .kv_heads = 2, .q_len = 30, .kv_len = 30, .head_dim = 37,
                            .windowed = 1, .q_dtype = dtypes[n], .kv_dtype = dtypes[n]};
        spec_context(&spec, n);
        problem_build(&problem, &spec, n, GUARD_BEHIND);
        problem_check(&problem, GUARD_BEHIND);
        CHECK(memcmp(problem.args.out, problem.args.v, problem.out.size) == 0, "the values were not copied");
        guard_release();
    }
}

TEST_EACH_ISA(values_unusual_scales) {
    static const float scales[] = {0, -0.0f, -0.3f, 1e-30f, 40, -40};
    for (size_t n = 0; n < COUNT(scales) * COUNT(dtypes); n++) {
        struct problem problem;
        struct spec spec = {.name = "scale", .q_len = 20, .kv_len = 130, .head_dim = 16, .causal = 1,
                            .q_dtype = dtypes[n / 6], .kv_dtype = dtypes[n / 6]};
        spec_context(&spec, n);
        problem_build(&problem, &spec, n, GUARD_BEHIND);
        problem.args.scale = scales[n % 6];
        problem_check(&problem, GUARD_BEHIND);
        guard_release();
    }
}

/* Logits of 1e4 and more, of either sign, and growing so that the running maximum changes in every step. */
TEST_EACH_ISA(values_large_logits) {
    for (int n = 0; n < 6; n++) {
        struct problem problem;
        struct spec spec = {.name = "logits", .q_len = 20, .kv_len = 900, .head_dim = 16, .sinks = n & 1};
        spec_context(&spec, (uint64_t)n);
        problem_build(&problem, &spec, (uint64_t)n, GUARD_BEHIND);
        for (int64_t j = 0; j < spec.kv_len; j++)
            for (int64_t d = 0; d < spec.head_dim; d++) {
                float *key = element(problem.k, problem.args.k_strides, FASTATTN_FLOAT32, 0, 0, j, d);
                *key *= n < 2 ? 3e4f : n < 4 ? (float)j : (float)(spec.kv_len - j) * 100;
            }
        problem_check(&problem, GUARD_BEHIND);
        guard_release();
    }
}

/* Equal scores weigh the same in the first block of keys as in the last, however large they are. */
TEST_EACH_ISA(values_equal_logits_give_the_mean) {
    static const float logits[] = {0, 1.7f, -100, 100, 12345.678f, -12345.678f, 1e30f};
    for (size_t n = 0; n < COUNT(logits); n++) {
        struct problem problem;
        const struct spec spec = {.name = "equal", .q_len = 5, .kv_len = 9001, .head_dim = 3,
                                  .kv_dtype = FASTATTN_BFLOAT16};
        context("logits of %g", (double)logits[n]);
        problem_build(&problem, &spec, n, GUARD_BEHIND);
        for (int64_t d = 0; d < spec.head_dim; d++) {
            for (int64_t i = 0; i < spec.q_len; i++)
                store(FASTATTN_FLOAT32, element(problem.q, problem.args.q_strides, FASTATTN_FLOAT32, 0, 0, i, d),
                      d == 1 ? logits[n] : 0);
            for (int64_t j = 0; j < spec.kv_len; j++)
                store(spec.kv_dtype, element(problem.k, problem.args.k_strides, spec.kv_dtype, 0, 0, j, d), 1);
        }
        problem_seal(&problem, GUARD_BEHIND);
        CHECK_STATUS(fastattn_attention(&problem.args, problem.workspace, problem.workspace_size), FASTATTN_OK);
        for (int64_t d = 0; d < spec.head_dim; d++) {
            double mean = 0;
            for (int64_t j = 0; j < spec.kv_len; j++)
                mean += load(spec.kv_dtype, element(problem.v, problem.args.v_strides, spec.kv_dtype, 0, 0, j, d)) /
                        (double)spec.kv_len;
            for (int64_t i = 0; i < spec.q_len; i++)
                CHECK(fabs(out_at(&problem, i, d) - mean) < 1e-6, "row %lld: %.9g, not the mean %.9g", (long long)i,
                      out_at(&problem, i, d), mean);
        }
        guard_release();
    }
}

/* The mean of finite values is finite, whatever their sum is: that of powers 1 of the largest number is infinite after two. Other
 * columns must not lose by what these need. */
TEST_EACH_ISA(values_whose_sums_overflow) {
    static const struct spec specs[] = {
        {.name = "many", .heads = 2, .q_len = 70, .kv_len = 300, .head_dim = 20},
        {.name = "causal", .q_len = 40, .kv_len = 90, .head_dim = 32, .causal = 1, .sinks = 1},
        {.name = "few", .heads = 4, .kv_heads = 2, .q_len = 3, .kv_len = 300, .head_dim = 20, .mask = MASK_BOOL, .hidden = 0.5},
        {.name = "one", .q_len = 1, .kv_len = 90, .head_dim = 7},
        {.name = "split", .heads = 2, .q_len = 20, .kv_len = 3000, .head_dim = 20},
        {.name = "split, few", .heads = 2, .q_len = 2, .kv_len = 3000, .head_dim = 20},
        {.name = "blocks", .q_len = 90, .kv_len = 90, .head_dim = 20, .block_size = 16, .blocks_density = 0.5},
        {.name = "threads", .batch = 3, .heads = 4, .q_len = 200, .kv_len = 300, .head_dim = 20, .num_threads = 2},
    };
    for (size_t n = 0; n < COUNT(specs) * 4; n++) {
        struct spec spec = specs[n / 4];
        struct problem problem;
        const fastattn_dtype dtype = n % 2 ? FASTATTN_BFLOAT16 : FASTATTN_FLOAT32;
        const double most = dtype == FASTATTN_BFLOAT16 ? 0x1.fep127 : (double)FLT_MAX;
        spec.q_dtype = spec.kv_dtype = dtype;
        spec.precision = n / 2 % 2 ? FASTATTN_PRECISION_MEDIUM : FASTATTN_PRECISION_HIGHEST;
        spec_context(&spec, n);
        problem_build(&problem, &spec, n, GUARD_BEHIND);
        const int64_t batches = spec.batch ? spec.batch : 1;
        const int64_t heads = spec.kv_heads ? spec.kv_heads : 1;
        for (int64_t at = 0; at < batches * heads * spec.kv_len; at++) {
            const int64_t b = at / spec.kv_len / heads, h = at / spec.kv_len % heads, j = at % spec.kv_len;
            for (int64_t d = 0; d < 2; d++) /* all alike, and of both signs */
                store(dtype, element(problem.v, problem.args.v_strides, dtype, b, h, j, d), d && j % 3 == 0 ? -most : most);
        }
        problem_check(&problem, GUARD_BEHIND);
        guard_release();
    }
}

/* Only -inf hides. A row whose every bias is the lowest finite number is a row of equal scores. */
TEST_EACH_ISA(values_lowest_finite_bias_is_a_bias) {
    static const struct {
        int mask;
        double lowest;
    } kinds[] = {
        {MASK_FLOAT16, -65504}, {MASK_BFLOAT16, -0x1.FEp127}, {MASK_FLOAT32, -FLT_MAX}, {MASK_FLOAT64, -DBL_MAX}};
    for (size_t n = 0; n < COUNT(kinds); n++) {
        struct problem problem;
        struct spec spec = {.name = "lowest", .q_len = 5, .kv_len = 150, .head_dim = 16, .mask = kinds[n].mask,
                            .amplitude = 1e-4};
        spec_context(&spec, n);
        problem_build(&problem, &spec, n, GUARD_BEHIND);
        for (int64_t i = 0; i < spec.q_len; i++)
            for (int64_t j = 0; j < spec.kv_len; j++)
                store(problem.args.mask_dtype, mask_element(&problem, 0, 0, i, j),
                      i == 3 && j == 77   ? 0
                      : i == 4 && j < 140 ? -(double)INFINITY
                                          : kinds[n].lowest);
        problem_seal(&problem, GUARD_BEHIND);
        CHECK_STATUS(fastattn_attention(&problem.args, problem.workspace, problem.workspace_size), FASTATTN_OK);
        for (int64_t i = 0; i < spec.q_len; i++)
            for (int64_t d = 0; d < spec.head_dim; d++) {
                const int64_t first = i == 3 ? 77 : i == 4 ? 140 : 0, last = i == 3 ? 77 : 149;
                double mean = 0;
                for (int64_t j = first; j <= last; j++)
                    mean += load(FASTATTN_FLOAT32,
                                 element(problem.v, problem.args.v_strides, FASTATTN_FLOAT32, 0, 0, j, d));
                mean /= (double)(last - first + 1);
                CHECK(fabs(out_at(&problem, i, d) - mean) < 1e-5, "row %lld: %g, not the mean %g", (long long)i,
                      out_at(&problem, i, d), mean);
            }
        guard_release();
    }
}

TEST_EACH_ISA(values_largest_finite_bias) {
    static const double biases[] = {FLT_MAX, 3e38, 1e30};
    for (size_t n = 0; n < COUNT(biases); n++) {
        struct problem problem;
        struct spec spec = {.name = "largest", .q_len = 5, .kv_len = 150, .head_dim = 16, .mask = MASK_FLOAT32,
                            .amplitude = 1e-4};
        spec_context(&spec, n);
        problem_build(&problem, &spec, n, GUARD_BEHIND);
        for (int64_t i = 0; i < spec.q_len; i++)
            store(FASTATTN_FLOAT32, mask_element(&problem, 0, 0, i, 20 * i + 60), biases[n]);
        problem_seal(&problem, GUARD_BEHIND);
        CHECK_STATUS(fastattn_attention(&problem.args, problem.workspace, problem.workspace_size), FASTATTN_OK);
        for (int64_t i = 0; i < spec.q_len; i++) /* that key takes all */
            for (int64_t d = 0; d < spec.head_dim; d++)
                CHECK(out_at(&problem, i, d) == load(FASTATTN_FLOAT32, element(problem.v, problem.args.v_strides,
                                                                               FASTATTN_FLOAT32, 0, 0, 20 * i + 60, d)),
                      "row %lld is not the value of its key", (long long)i);
        guard_release();
    }
}

TEST_EACH_ISA(values_sizes_of_zero) {
    for (int axis = 0; axis < 6; axis++)
        for (int options = 0; options < 2; options++) {
            struct problem problem;
            struct spec spec = {.name = "zero", .batch = 2, .heads = 2, .kv_heads = 2, .q_len = 3, .kv_len = 4,
                                .head_dim = 5, .causal = options, .sinks = options,
                                .mask = options ? MASK_BOOL : MASK_NONE, .hidden = 0.2,
                                .alibi = options ? ALIBI_ALL : ALIBI_NONE};
            spec_context(&spec, (uint64_t)axis);
            spec.v_head_dim = spec.head_dim;
            if (axis >= 2 && axis < 5)
                *(int64_t *[]){&spec.q_len, &spec.kv_len, &spec.head_dim}[axis - 2] = 0;
            problem_build(&problem, &spec, 0, GUARD_BEHIND);
            if (axis == 0)
                problem.args.batch = 0;
            if (axis == 1)
                problem.args.num_heads = problem.args.num_kv_heads = 0;
            if (axis == 5)
                problem.args.v_head_dim = 0;
            problem_seal(&problem, GUARD_BEHIND);
            CHECK_STATUS(fastattn_attention(&problem.args, problem.workspace, problem.workspace_size), FASTATTN_OK);
            if (axis >= 2)
                problem_verify(&problem, 1);
            else
                problem_untouched(&problem);
            guard_release();
        }
}

/* Positions near the ends of 64 bits: no sum of them may wrap. */
TEST_EACH_ISA(values_extreme_positions) {
    static const int64_t extremes[] = {INT64_MIN, INT64_MIN + 1, INT64_MIN / 2, -1,
                                       0,         INT64_MAX / 2, INT64_MAX - 1, INT64_MAX};
    for (size_t n = 0; n < COUNT(extremes); n++)
        for (int kind = 0; kind < 8; kind++) {
            struct problem problem;
            struct spec spec = {.name = "position", .q_len = 9, .kv_len = 70, .head_dim = 8, .offset = OFFSET_ZERO,
                                .causal = kind & 1, .windowed = 1, .window_left = kind & 2 ? INT64_MAX : 5,
                                .window_right = kind & 4 ? INT64_MAX : 5};
            if ((kind & 4 && extremes[n] < -1) || (kind & 2 && extremes[n] > 0))
                continue; /* an offset and a window that cancel each other far beyond every length: both may be cut */
            spec_context(&spec, n);
            problem_build(&problem, &spec, n, GUARD_BEHIND);
            problem.query_offset[0] = extremes[n];
            problem_check(&problem, GUARD_BEHIND);
            guard_release();
        }
}

/* An absurd kv_len of which next to nothing is live. */
TEST_EACH_ISA(values_length_is_what_counts) {
    struct problem problem;
    struct spec spec = {.name = "length", .q_len = 4, .kv_len = 40, .head_dim = 16, .lengths = LENGTHS_RANDOM,
                        .causal = 1};
    context("kv_len of 2**31, all but 33 beyond kv_lengths");
    problem_build(&problem, &spec, 1, GUARD_BEHIND);
    problem.kv_lengths[0] = 33;
    for (int64_t j = 0; j < 40; j++)
        for (int64_t d = 0; d < spec.head_dim; d++) {
            store(FASTATTN_FLOAT32, element(problem.k, problem.args.k_strides, FASTATTN_FLOAT32, 0, 0, j, d),
                  (double)(j % 5));
            store(FASTATTN_FLOAT32, element(problem.v, problem.args.v_strides, FASTATTN_FLOAT32, 0, 0, j, d),
                  (double)(d - j));
        }
    problem.args.kv_len = INT64_C(1) << 31;
    problem_check(&problem, GUARD_BEHIND);
    guard_release();
}
