/* Quantised keys and values: rows of any size between guard pages, against attention over the numbers that they stand for. */
#include "problem.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { HEADS = 4, KV_HEADS = 2, GROUP = 32 };

static int64_t row_bytes(fastattn_dtype dtype, int64_t dim) { return dtype == FASTATTN_INT8 ? dim + 4 : dim / GROUP * 18; }

/* Number d of a row, as the header lays rows out. */
static float number(const char *row, int64_t d, int64_t dim, fastattn_dtype dtype) {
    if (dtype == FASTATTN_INT8) {
        float scale;
        memcpy(&scale, row + dim, sizeof scale);
        return (float)(signed char)row[d] * scale;
    }
    const unsigned char pair = (unsigned char)row[d / GROUP * 16 + d % 16];
    const int integer = d % GROUP < 16 ? pair & 15 : pair >> 4;
    uint16_t half;
    memcpy(&half, row + dim / 2 + d / GROUP * 2, sizeof half);
    return (float)(integer - 8) * (float)load(FASTATTN_FLOAT16, (const char *)&half);
}

/* Quantised rows (pages of page_size rows of KV_HEADS heads), each page guarded, and their numbers side by side. */
static char *rows_build(struct rng *rng, int64_t keys, int64_t page_size, int64_t dim, fastattn_dtype dtype, enum guard_side side,
                        int64_t strides[3], float *numbers) {
    const int64_t bytes = row_bytes(dtype, dim), pages = (keys + page_size - 1) / page_size;
    char *to = guard_inputs("quantised rows", pages, (size_t)(KV_HEADS * page_size * bytes), 1, side, &strides[0]);
    float *from = malloc((size_t)(dim > 0 ? dim : 1) * sizeof *from);
    const int64_t slot = 0;
    CHECK(from != NULL, "out of memory");
    strides[1] = page_size * bytes;
    strides[2] = bytes;
    for (int64_t h = 0; h < KV_HEADS; h++)
        for (int64_t j = 0; j < keys; j++) {
            char *row = to + j / page_size * strides[0] + h * strides[1] + j % page_size * strides[2];
            for (int64_t d = 0; d < dim; d++) from[d] = (float)random_signed(rng) * 3;
            const fastattn_store_args args = {.size = sizeof args, .batch = 1, .new_len = 1, .num_heads = 1, .head_dim = dim, .from = from,
                                              .to = row, .to_dtype = dtype, .num_pages = 1, .page_size = 1, .slots = &slot, .isa = test_isa};
            CHECK_STATUS(fastattn_store(&args), FASTATTN_OK);
            for (int64_t d = 0; d < dim; d++) {
                const float kept = number(row, d, dim, dtype);
                numbers[(h * keys + j) * dim + d] = kept;
                CHECK(fabsf(kept - from[d]) <= (dtype == FASTATTN_INT8 ? 0.5001f * 3 / 127 : 0.51f * 3 / 7), "number %lld is kept as %g, not %g",
                      (long long)d, kept, from[d]);
            }
        }
    free(from);
    return to;
}

static void check_rows(struct rng *rng, fastattn_dtype dtype, fastattn_dtype v_dtype, int64_t q_len, int64_t keys, int64_t page_size, int64_t dim, int64_t v_dim,
                       enum guard_side side) {
    const int64_t pages = (keys + page_size - 1) / page_size;
    float *wide_k = malloc((size_t)(KV_HEADS * keys * dim + 1) * sizeof *wide_k), *wide_v = malloc((size_t)(KV_HEADS * keys * v_dim + 1) * sizeof *wide_v);
    float *out[2], *q = guard_input("q", (size_t)(HEADS * q_len * dim) * sizeof *q, sizeof *q, side);
    int32_t *table = guard_input("block_table", (size_t)pages * sizeof *table, sizeof *table, side);
    context("dtypes %d and %d, %lld queries, %lld keys in pages of %lld, %lld and %lld numbers", (int)dtype, (int)v_dtype, (long long)q_len,
            (long long)keys, (long long)page_size, (long long)dim, (long long)v_dim);
    CHECK(wide_k && wide_v, "out of memory");
    for (int64_t i = 0; i < HEADS * q_len * dim; i++) q[i] = (float)random_signed(rng);
    for (int64_t n = 0; n < pages; n++) table[n] = (int32_t)n;
    fastattn_attention_args args = FASTATTN_ATTENTION_ARGS_INIT;
    args.batch = 1, args.num_heads = HEADS, args.num_kv_heads = KV_HEADS, args.q_len = q_len, args.kv_len = keys;
    args.head_dim = dim, args.v_head_dim = v_dim, args.scale = 0.7f, args.causal = 1, args.isa = test_isa, args.q = q;
    args.q_strides[1] = q_len * dim * 4, args.q_strides[2] = dim * 4;
    args.out_strides[1] = q_len * v_dim * 4, args.out_strides[2] = v_dim * 4;
    fastattn_attention_args quantised = args;
    quantised.kv_dtype = dtype, quantised.v_dtype = v_dtype == dtype ? FASTATTN_DTYPE_OF_KEYS : v_dtype;
    quantised.block_table = table, quantised.num_pages = pages, quantised.page_size = page_size;
    quantised.block_table_stride = pages * 4;
    quantised.k = rows_build(rng, keys, page_size, dim, dtype, side, quantised.k_strides, wide_k);
    quantised.v = rows_build(rng, keys, page_size, v_dim, v_dtype, side, quantised.v_strides, wide_v);
    args.k = wide_k, args.v = wide_v;
    args.k_strides[1] = keys * dim * 4, args.k_strides[2] = dim * 4, args.v_strides[1] = keys * v_dim * 4, args.v_strides[2] = v_dim * 4;
    for (int n = 0; n < 2; n++) out[n] = guard_output("out", (size_t)(HEADS * q_len * v_dim) * sizeof(float), sizeof(float), side);
    args.out = out[0], quantised.out = out[1];
    guard_seal();
    CHECK_STATUS(fastattn_attention(&args, NULL, 0), FASTATTN_OK);
    CHECK_STATUS(fastattn_attention(&quantised, NULL, 0), FASTATTN_OK);
    guard_check();
    for (int64_t i = 0; i < HEADS * q_len * v_dim; i++)
        CHECK(fabsf(out[0][i] - out[1][i]) <= 2e-5f, "number %lld is %g, not %g", (long long)i, out[1][i], out[0][i]);
    guard_release();
    free(wide_k), free(wide_v);
}

TEST_EACH_ISA(quantised_rows_are_read_where_they_lie) {
    static const int64_t dims[] = {1, 5, 16, 31, 64, 65, 128}, grouped[] = {32, 64, 96, 160};
    static const int64_t q_lens[] = {1, 2, 3, 7, 40}, keys[] = {1, 9, 64, 100};
    struct rng rng = {5};
    for (size_t r = 0; r < COUNT(q_lens); r++)
        for (size_t n = 0; n < COUNT(keys); n++) {
            const enum guard_side side = (r + n) % 2 ? GUARD_BEFORE : GUARD_BEHIND;
            const int64_t page_size = n % 2 ? 1 : 1 + (int64_t)r * 8;
            for (size_t d = 0; d < COUNT(dims); d++)
                check_rows(&rng, FASTATTN_INT8, FASTATTN_INT8, q_lens[r], keys[n], page_size, dims[d], dims[(d + r) % COUNT(dims)], side);
            for (size_t d = 0; d < COUNT(grouped); d++) {
                const int64_t dim = grouped[d], v_dim = grouped[(d + r) % COUNT(grouped)];
                check_rows(&rng, FASTATTN_INT4, FASTATTN_INT4, q_lens[r], keys[n], page_size, dim, v_dim, side);
                check_rows(&rng, FASTATTN_INT8, FASTATTN_INT4, q_lens[r], keys[n], page_size, dims[d], v_dim, side);
                check_rows(&rng, FASTATTN_INT4, FASTATTN_INT8, q_lens[r], keys[n], page_size, dim, dims[d], side);
            }
        }
}

/* The call of queries of 16 bits, and of the same in float32, `wide`, by the sizes, keys and values of args, which are of these queries'
 * layout: (head, query, number). An lse is off by up to 4e-6, an output by up to `tolerance`, or both are NaN where the queries are `odd`.
 * Returns the output of the former, which lives as long as what guards it. The lse says how exact scores are. */
static const uint16_t *check_both(fastattn_attention_args args, fastattn_dtype q_dtype, const uint16_t *q, const float *wide, enum guard_side side,
                                  double tolerance, int odd) {
    const int64_t q_len = args.q_len, dim = args.head_dim, v_dim = args.v_head_dim, lses = HEADS * q_len, numbers = lses * v_dim;
    float *lse[2], *out = guard_output("wide out", (size_t)numbers * sizeof *out, sizeof *out, side);
    uint16_t *half_out = guard_output("out", (size_t)numbers * sizeof *half_out, sizeof *half_out, side);
    for (int n = 0; n < 2; n++) lse[n] = guard_output("lse", (size_t)lses * sizeof(float), sizeof(float), side);
    args.batch = 1, args.num_heads = HEADS, args.num_kv_heads = KV_HEADS, args.scale = 0.3f, args.isa = test_isa;
    args.lse_strides[1] = q_len * 4, args.lse_strides[2] = 4;
    fastattn_attention_args halves = args;
    args.q = wide, args.q_strides[1] = q_len * dim * 4, args.q_strides[2] = dim * 4;
    halves.q = q, halves.q_dtype = q_dtype, halves.q_strides[1] = q_len * dim * 2, halves.q_strides[2] = dim * 2;
    args.out = out, args.out_strides[1] = q_len * v_dim * 4, args.out_strides[2] = v_dim * 4, args.lse = lse[0];
    halves.out = half_out, halves.out_strides[1] = q_len * v_dim * 2, halves.out_strides[2] = v_dim * 2, halves.lse = lse[1];
    guard_seal();
    CHECK_STATUS(fastattn_attention(&args, NULL, 0), FASTATTN_OK);
    CHECK_STATUS(fastattn_attention(&halves, NULL, 0), FASTATTN_OK);
    guard_check();
    for (int64_t i = 0; i < lses; i++)
        CHECK(fabsf(lse[0][i] - lse[1][i]) <= 4e-6f || (odd && isnan(lse[0][i]) && isnan(lse[1][i])), "lse %lld is %.9g, not %.9g", (long long)i,
              (double)lse[1][i], (double)lse[0][i]);
    for (int64_t i = 0; i < numbers; i++) {
        const double found = load(q_dtype, half_out + i);
        CHECK(fabs(found - out[i]) <= tolerance || (odd && isnan(found) && isnan(out[i])), "number %lld is %g, not %g", (long long)i, found,
              (double)out[i]);
    }
    return half_out;
}

/* Queries of one size or up to 2**-spread of it. */
static void check_halves(struct rng *rng, fastattn_dtype q_dtype, int spread, fastattn_dtype dtype, fastattn_dtype v_dtype, int64_t q_len,
                         int64_t keys, int64_t dim, int64_t v_dim, enum guard_side side) {
    float *wide_k = malloc((size_t)(KV_HEADS * keys * dim) * sizeof *wide_k), *wide_v = malloc((size_t)(KV_HEADS * keys * v_dim) * sizeof *wide_v);
    float *wide_q = guard_input("wide q", (size_t)(HEADS * q_len * dim) * sizeof *wide_q, sizeof *wide_q, side);
    uint16_t *q = guard_input("q", (size_t)(HEADS * q_len * dim) * sizeof *q, sizeof *q, side);
    context("queries of dtype %d down to 2**-%d, dtypes %d and %d, %lld queries, %lld keys, %lld and %lld numbers", (int)q_dtype, spread, (int)dtype,
            (int)v_dtype, (long long)q_len, (long long)keys, (long long)dim, (long long)v_dim);
    CHECK(wide_k && wide_v, "out of memory");
    for (int64_t i = 0; i < HEADS * q_len * dim; i++) {
        store(q_dtype, q + i, ldexp(random_signed(rng), -(int)random_between(rng, 0, spread)));
        wide_q[i] = (float)load(q_dtype, q + i);
    }
    fastattn_attention_args args = FASTATTN_ATTENTION_ARGS_INIT;
    args.q_len = q_len, args.kv_len = keys, args.head_dim = dim, args.v_head_dim = v_dim, args.kv_dtype = dtype, args.v_dtype = v_dtype;
    args.k = rows_build(rng, keys, keys, dim, dtype, side, args.k_strides, wide_k);
    args.v = rows_build(rng, keys, keys, v_dim, v_dtype, side, args.v_strides, wide_v);
    check_both(args, q_dtype, q, wide_q, side, q_dtype == FASTATTN_FLOAT16 ? 2e-3 : 1.2e-2, 0);
    guard_release();
    free(wide_k), free(wide_v);
}

TEST_EACH_ISA(queries_of_16_bits_are_multiplied_exactly_however_far_apart) {
    static const int64_t q_lens[] = {1, 2, 5, 12}, keys[] = {1, 17, 64, 131};
    static const int spreads[] = {0, 8, 11, 14}; /* two digits of most numbers, three, four, and more */
    struct rng rng = {6};
    for (size_t r = 0; r < COUNT(q_lens); r++)
        for (size_t n = 0; n < COUNT(keys); n++)
            for (size_t x = 0; x < COUNT(spreads); x++) {
                static const int64_t dims[] = {16, 33, 64, 65, 128, 200, 1030}, grouped[] = {32, 64, 96, 128, 288};
                const enum guard_side side = (r + n) % 2 ? GUARD_BEFORE : GUARD_BEHIND;
                const fastattn_dtype q_dtype = (r + n + x) % 2 ? FASTATTN_FLOAT16 : FASTATTN_BFLOAT16;
                const int64_t dim = dims[(r + 2 * n + x) % COUNT(dims)], v_dim = dims[(r + n) % COUNT(dims)];
                const int64_t of_groups = grouped[(r + n + x) % COUNT(grouped)], v_of_groups = grouped[(n + x) % COUNT(grouped)];
                check_halves(&rng, q_dtype, spreads[x], FASTATTN_INT8, FASTATTN_INT8, q_lens[r], keys[n], dim, v_dim, side);
                check_halves(&rng, q_dtype, spreads[x], FASTATTN_INT8, FASTATTN_INT4, q_lens[r], keys[n], dim, v_of_groups, side);
                check_halves(&rng, q_dtype, spreads[x], FASTATTN_INT4, FASTATTN_INT4, q_lens[r], keys[n], of_groups, v_of_groups, side);
            }
}

/* Rows of one size, times a power of two, and scales of theirs: what fits no integers is multiplied in float32, and all else as ever. */
static void scale_rows(char *rows, int64_t keys, int64_t dim, int power, float *numbers) {
    for (int64_t n = 0; n < KV_HEADS * keys; n++) {
        float scale;
        char *at = rows + n * row_bytes(FASTATTN_INT8, dim) + dim;
        memcpy(&scale, at, sizeof scale);
        scale = ldexpf(scale, power);
        memcpy(at, &scale, sizeof scale);
        for (int64_t d = 0; d < dim; d++) numbers[n * dim + d] = ldexpf(numbers[n * dim + d], power);
    }
}

TEST_EACH_ISA(queries_of_16_bits_are_multiplied_whatever_their_size) {
    enum { QUERIES = 3, KEYS = 70, DIM = 64 };
    static const struct { int q, k, v; float odd; } cases[] = {
        {0, 0, 0, 0}, {-95, 95, 0, 0}, {110, -110, 0, 0}, {0, 0, -110, 0}, {0, 0, 90, 0}, {0, 0, 0, NAN}, {0, 0, 0, INFINITY}};
    struct rng rng = {8};
    for (size_t n = 0; n < COUNT(cases); n++) {
        float numbers[2][KV_HEADS * KEYS * DIM], wide_q[HEADS * QUERIES * DIM];
        uint16_t q[HEADS * QUERIES * DIM];
        fastattn_attention_args args = FASTATTN_ATTENTION_ARGS_INIT;
        context("queries times 2**%d, keys 2**%d, values 2**%d, one number %g", cases[n].q, cases[n].k, cases[n].v, (double)cases[n].odd);
        for (int i = 0; i < HEADS * QUERIES * DIM; i++) store(FASTATTN_BFLOAT16, q + i, ldexp(random_signed(&rng), cases[n].q));
        if (cases[n].odd != 0) store(FASTATTN_BFLOAT16, q + DIM + 5, (double)cases[n].odd);
        for (int i = 0; i < HEADS * QUERIES * DIM; i++) wide_q[i] = (float)load(FASTATTN_BFLOAT16, q + i);
        char *k = rows_build(&rng, KEYS, KEYS, DIM, FASTATTN_INT8, GUARD_BEHIND, args.k_strides, numbers[0]);
        char *v = rows_build(&rng, KEYS, KEYS, DIM, FASTATTN_INT8, GUARD_BEHIND, args.v_strides, numbers[1]);
        scale_rows(k, KEYS, DIM, cases[n].k, numbers[0]), scale_rows(v, KEYS, DIM, cases[n].v, numbers[1]);
        args.q_len = QUERIES, args.kv_len = KEYS, args.head_dim = args.v_head_dim = DIM, args.kv_dtype = FASTATTN_INT8, args.k = k, args.v = v;
        const int odd = cases[n].odd != 0;
        const uint16_t *out = check_both(args, FASTATTN_BFLOAT16, q, wide_q, GUARD_BEHIND, ldexp(1.2e-2, cases[n].v), odd);
        for (int i = 0; i < HEADS * QUERIES * DIM; i++) {
            const double found = load(FASTATTN_BFLOAT16, out + i);
            CHECK(odd || (isfinite(found) && found != 0), "number %d is %g", i, found);
        }
        guard_release();
    }
}

TEST(what_cannot_be_quantised_is_refused_and_nothing_is_written) {
    float from[2][64] = {{0}};
    char to[2][64 + 4];
    const int64_t slots[2] = {0, 1};
    fastattn_store_args k = {.size = sizeof k, .batch = 1, .new_len = 2, .num_heads = 1, .head_dim = 64, .from = from, .from_strides = {0, 256, 0},
                             .to = to, .to_dtype = FASTATTN_INT8, .num_pages = 2, .page_size = 1, .to_strides = {68, 0, 0}, .slots = slots};
    fastattn_store_args v = k, other = k;
    const float bad[] = {NAN, INFINITY, -INFINITY};
    float fine[2][64] = {{1, 2}, {3}};
    memset(to, 0x5a, sizeof to);
    other.from = fine;
    v.also = &k, other.also = &k;
    for (int n = 0; n < 6; n++) {
        from[1][63] = bad[n / 2];
        k.to_dtype = n % 2 ? FASTATTN_INT4 : FASTATTN_INT8;
        CHECK_STATUS(fastattn_store(&k), FASTATTN_ERROR_NOT_FINITE);
        CHECK_STATUS(fastattn_store(&other), FASTATTN_ERROR_NOT_FINITE);
        k.rotate = 1;
        CHECK_STATUS(fastattn_store(&k), FASTATTN_ERROR_NOT_FINITE);
        k.rotate = 0;
    }
    from[1][63] = 1e6f;
    k.to_dtype = FASTATTN_INT4;
    CHECK_STATUS(fastattn_store(&k), FASTATTN_ERROR_NOT_FINITE);
    for (int n = 0; n < 64; n++) from[1][n] = 6e4f; /* eight times as large when turned */
    k.rotate = 1;
    CHECK_STATUS(fastattn_store(&k), FASTATTN_ERROR_NOT_FINITE);
    k.rotate = 0;
    k.head_dim = 48;
    CHECK_STATUS(fastattn_store(&k), FASTATTN_ERROR_SHAPE);
    k.head_dim = 1 << 14, k.to_dtype = FASTATTN_INT8;
    CHECK_STATUS(fastattn_store(&k), FASTATTN_ERROR_SHAPE);
    k.head_dim = 64, k.also = &v;
    CHECK_STATUS(fastattn_store(&other), FASTATTN_ERROR_ARGUMENT);
    for (size_t i = 0; i < sizeof to; i++) CHECK(((const char *)to)[i] == 0x5a, "byte %zu was written", i);
    k.also = NULL;
    CHECK_STATUS(fastattn_store(&other), FASTATTN_OK);

    fastattn_attention_args args = FASTATTN_ATTENTION_ARGS_INIT;
    float out[64];
    args.batch = args.num_heads = args.num_kv_heads = args.q_len = args.kv_len = 1, args.scale = 1;
    args.head_dim = args.v_head_dim = 48, args.q = from, args.k = args.v = to, args.out = out;
    args.kv_dtype = FASTATTN_INT4;
    CHECK_STATUS(fastattn_attention(&args, NULL, 0), FASTATTN_ERROR_SHAPE);
    args.head_dim = 64;
    CHECK_STATUS(fastattn_attention(&args, NULL, 0), FASTATTN_ERROR_SHAPE);
    args.head_dim = 48, args.v_head_dim = 48, args.kv_dtype = FASTATTN_INT8, args.v_dtype = FASTATTN_INT4;
    CHECK_STATUS(fastattn_attention(&args, NULL, 0), FASTATTN_ERROR_SHAPE);
    args.v_dtype = FASTATTN_FLOAT16;
    CHECK_STATUS(fastattn_attention(&args, NULL, 0), FASTATTN_ERROR_DTYPE);
    args.v_dtype = (fastattn_dtype)1000;
    CHECK_STATUS(fastattn_attention(&args, NULL, 0), FASTATTN_ERROR_DTYPE);
    args.kv_dtype = FASTATTN_FLOAT32, args.v_dtype = FASTATTN_INT8;
    CHECK_STATUS(fastattn_attention(&args, NULL, 0), FASTATTN_ERROR_DTYPE);
    args.kv_dtype = FASTATTN_INT4, args.v_dtype = FASTATTN_DTYPE_OF_KEYS;
    args.head_dim = args.v_head_dim = 64, args.additive = fine[0];
    CHECK_STATUS(fastattn_attention(&args, NULL, 0), FASTATTN_ERROR_DTYPE);
    args.additive = NULL, args.q_dtype = FASTATTN_INT8, args.kv_dtype = FASTATTN_INT8;
    CHECK_STATUS(fastattn_attention(&args, NULL, 0), FASTATTN_ERROR_DTYPE);
    args.q_dtype = FASTATTN_FLOAT32, args.head_dim = 0, args.k = NULL; /* a row of no numbers has a scale */
    CHECK_STATUS(fastattn_attention(&args, NULL, 0), FASTATTN_ERROR_ARGUMENT);
}
