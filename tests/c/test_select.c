/* Keys and blocks that queries choose: by scores that are whole numbers, exact in every order of summing, and full of equals. */
#include "harness.h"
#include "problem.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct selection {
    const char *name;
    int64_t batch, heads, kv_heads, q_len, kv_len, head_dim, num_keys, block_size, keep_first, keep_recent;
    fastattn_dtype dtype;
    int rectified, causal, weighted, lengths, page_size, num_threads;
};

static void *whole_numbers(const char *name, int64_t count, fastattn_dtype dtype, struct rng *rng, enum guard_side side) {
    const size_t size = dtype_size(dtype);
    char *at = guard_input(name, (size_t)count * size, size, side);
    for (int64_t n = 0; n < count; n++) store(dtype, at + (size_t)n * size, (double)random_between(rng, -2, 2));
    return at;
}

static void build(fastattn_select_args *a, const struct selection *s, struct rng *rng, enum guard_side side) {
    memset(a, 0, sizeof *a);
    a->size = sizeof *a;
    a->batch = s->batch, a->num_heads = s->heads, a->num_kv_heads = s->kv_heads;
    a->q_len = s->q_len, a->kv_len = s->kv_len, a->head_dim = s->head_dim;
    a->q_dtype = a->k_dtype = s->dtype;
    a->num_keys = s->num_keys, a->block_size = s->block_size, a->keep_first = s->keep_first, a->keep_recent = s->keep_recent;
    a->rectified = s->rectified, a->causal = s->causal;
    a->isa = test_isa, a->num_threads = s->num_threads;
    const int64_t size = (int64_t)dtype_size(s->dtype), row = s->head_dim * size;
    a->q = whole_numbers("q", s->batch * s->heads * s->q_len * s->head_dim, s->dtype, rng, side);
    a->q_strides[2] = row, a->q_strides[1] = s->q_len * row, a->q_strides[0] = s->heads * s->q_len * row;
    int64_t parts = s->batch, rows = s->kv_len;
    if (s->page_size) {
        const int64_t columns = (s->kv_len + s->page_size - 1) / s->page_size;
        parts = s->batch * columns, rows = s->page_size;
        int32_t *table = guard_input("block_table", (size_t)parts * sizeof *table, sizeof *table, side);
        for (int64_t n = 0; n < parts; n++) table[n] = (int32_t)(parts - 1 - n);
        a->block_table = table, a->block_table_stride = columns * (int64_t)sizeof *table;
        a->num_pages = parts, a->page_size = s->page_size;
    }
    a->k = whole_numbers("k", parts * s->kv_heads * rows * s->head_dim, s->dtype, rng, side);
    a->k_strides[2] = row, a->k_strides[1] = rows * row, a->k_strides[0] = s->kv_heads * rows * row;
    if (s->weighted) {
        a->weights = whole_numbers("weights", s->batch * s->heads * s->q_len, FASTATTN_FLOAT32, rng, side);
        a->weights_strides[2] = 4, a->weights_strides[1] = 4 * s->q_len, a->weights_strides[0] = 4 * s->q_len * s->heads;
    }
    if (s->lengths) {
        int64_t *lengths = guard_input("kv_lengths", (size_t)s->batch * 8, 8, side);
        for (int64_t b = 0; b < s->batch; b++) lengths[b] = random_between(rng, 0, s->kv_len);
        a->kv_lengths = lengths;
    }
    a->indices = guard_output("indices", (size_t)(s->batch * s->kv_heads * s->q_len * s->num_keys) * 4, 4, side);
    a->indices_strides[2] = 4 * s->num_keys, a->indices_strides[1] = s->q_len * 4 * s->num_keys;
    a->indices_strides[0] = s->kv_heads * s->q_len * 4 * s->num_keys;
}

static double score_of(const fastattn_select_args *a, int64_t b, int64_t h, int64_t i, int64_t j) {
    const int64_t group = a->num_heads / a->num_kv_heads;
    const char *key = (const char *)a->k + h * a->k_strides[1];
    if (a->block_table) {
        const int32_t *table = (const int32_t *)(const void *)((const char *)a->block_table + b * a->block_table_stride);
        key += table[j / a->page_size] * a->k_strides[0] + j % a->page_size * a->k_strides[2];
    } else
        key += b * a->k_strides[0] + j * a->k_strides[2];
    double sum = 0;
    for (int64_t g = h * group; g < (h + 1) * group; g++) {
        double dot = 0;
        for (int64_t d = 0; d < a->head_dim; d++)
            dot += load(a->q_dtype, element(a->q, a->q_strides, a->q_dtype, b, g, i, d)) *
                   load(a->k_dtype, key + d * (int64_t)dtype_size(a->k_dtype));
        if (a->rectified && dot < 0) dot = 0;
        sum += dot * (a->weights ? load(FASTATTN_FLOAT32, element(a->weights, a->weights_strides, FASTATTN_FLOAT32, b, g, i, 0)) : 1);
    }
    return sum;
}

/* One choice after the other: the largest that is left. */
static void check_row(const fastattn_select_args *a, int64_t b, int64_t h, int64_t i, double *best) {
    const int64_t unit = a->block_size ? a->block_size : 1, length = a->kv_lengths ? a->kv_lengths[b] : a->kv_len;
    const int64_t p = i + (a->query_offset ? a->query_offset[b] : length - a->q_len);
    const int64_t end = a->causal ? (p + 1 < 0 ? 0 : p + 1 < length ? p + 1 : length) : length, units = (a->kv_len + unit - 1) / unit;
    const int32_t *got = element(a->indices, a->indices_strides, FASTATTN_FLOAT32, b, h, i, 0);
    for (int64_t u = 0; u < units; u++) best[u] = -INFINITY;
    for (int64_t j = 0; j < end; j++) {
        const double s = j < a->keep_first || (j > p - a->keep_recent && j <= p) ? (double)INFINITY : score_of(a, b, h, i, j);
        if (s > best[j / unit]) best[j / unit] = s;
    }
    for (int64_t n = 0; n < a->num_keys / unit; n++) { /* chosen ones become NaN */
        int64_t top = -1;
        for (int64_t u = 0; u < units; u++)
            if (best[u] > -INFINITY && (top < 0 || best[u] > best[top])) top = u;
        if (top < 0) break;
        best[top] = NAN;
    }
    int64_t n = 0;
    for (int64_t j = 0; j < end; j++)
        if (isnan(best[j / unit])) {
            CHECK(got[n] == j, "indices[%lld,%lld,%lld,%lld] is %d, should be %lld", (long long)b, (long long)h, (long long)i, (long long)n,
                  got[n], (long long)j);
            n++;
        }
    for (; n < a->num_keys; n++) CHECK(got[n] == -1, "behind the last chosen key stands %d", got[n]);
}

static void check_selection(const struct selection *s, uint64_t seed, enum guard_side side) {
    struct rng rng = {seed};
    fastattn_select_args a;
    context("%s seed %llu heads %lld/%lld lengths %lld/%lld dim %lld dtype %d keys %lld block %lld", s->name, (unsigned long long)seed,
            (long long)s->heads, (long long)s->kv_heads, (long long)s->q_len, (long long)s->kv_len, (long long)s->head_dim, s->dtype,
            (long long)s->num_keys, (long long)s->block_size);
    build(&a, s, &rng, side);
    guard_seal();
    CHECK_STATUS(fastattn_select_keys(&a), FASTATTN_OK);
    guard_check();
    double *best = malloc((size_t)(a.kv_len + 1) * sizeof *best);
    CHECK(best != NULL, "out of memory");
    for (int64_t b = 0; b < a.batch; b++)
        for (int64_t h = 0; h < a.num_kv_heads; h++)
            for (int64_t i = 0; i < a.q_len; i++) check_row(&a, b, h, i, best);
    free(best);
    guard_release();
}

TEST_EACH_ISA(selection_on_each_way_of_taking_rows) {
    static const fastattn_dtype dtypes[] = {FASTATTN_FLOAT32, FASTATTN_FLOAT16, FASTATTN_BFLOAT16};
    static const int64_t heads[] = {1, 5, 16, 64, 70};
    for (size_t t = 0; t < COUNT(dtypes); t++)
        for (size_t h = 0; h < COUNT(heads); h++)
            for (int blocks = 0; blocks < 2; blocks++) {
                const struct selection s = {.name = "rows", .batch = 1, .heads = heads[h], .kv_heads = 1, .q_len = 1 + (int64_t)h % 3 * 4,
                                            .kv_len = 300, .head_dim = 24, .num_keys = 60, .block_size = blocks ? 12 : 0,
                                            .dtype = dtypes[t], .rectified = !blocks, .causal = t % 2 == 0, .weighted = h % 2 == 0};
                check_selection(&s, t * 31 + h, (t + h) % 2 ? GUARD_BEHIND : GUARD_BEFORE);
            }
}

TEST_EACH_ISA(selection_in_parts_and_pages) {
    for (int page_size = 0; page_size < 40; page_size += 13) {
        const struct selection s = {.name = "parts", .batch = 2, .heads = 32, .kv_heads = 1, .q_len = 1, .kv_len = 9000, .head_dim = 8,
                                    .num_keys = 200, .block_size = page_size == 13 ? 100 : 0, .lengths = page_size > 0,
                                    .page_size = page_size, .num_threads = 4, .keep_recent = 3};
        check_selection(&s, (uint64_t)page_size, GUARD_BEHIND);
    }
}

TEST_EACH_ISA(selection_at_random) {
    struct rng rng = {79};
    for (int n = 0; n < test_effort; n++) {
        struct selection s = {.name = "random", .batch = random_between(&rng, 1, 3), .kv_heads = random_between(&rng, 1, 3)};
        s.heads = s.kv_heads * random_between(&rng, 1, 20);
        s.q_len = random_between(&rng, 1, 12), s.kv_len = random_between(&rng, 0, 90), s.head_dim = random_between(&rng, 0, 40);
        s.block_size = random_between(&rng, 0, 1) ? random_between(&rng, 1, 20) : 0;
        s.num_keys = random_between(&rng, 0, 12) * (s.block_size ? s.block_size : 1);
        s.keep_first = s.num_keys >= 6 * (s.block_size ? s.block_size : 1) ? random_between(&rng, 0, 2) : 0;
        s.keep_recent = s.keep_first ? random_between(&rng, 0, 3) : 0;
        s.dtype = (fastattn_dtype)random_between(&rng, 0, 2);
        s.rectified = (int)random_between(&rng, 0, 1), s.causal = (int)random_between(&rng, 0, 1);
        s.weighted = (int)random_between(&rng, 0, 1), s.lengths = (int)random_between(&rng, 0, 1);
        s.page_size = (int)(random_between(&rng, 0, 1) * random_between(&rng, 1, 20)), s.num_threads = (int)random_between(&rng, 0, 3);
        check_selection(&s, random_bits(&rng), n % 2 ? GUARD_BEHIND : GUARD_BEFORE);
    }
}

static fastattn_select_args bad;
static int32_t *bad_table;
static int64_t *bad_lengths;
static float *bad_weights;

static void build_bad(void) {
    static const struct selection s = {.name = "bad", .batch = 2, .heads = 4, .kv_heads = 2, .q_len = 2, .kv_len = 48, .head_dim = 16,
                                       .num_keys = 16, .block_size = 4, .weighted = 1, .lengths = 1, .page_size = 16};
    struct rng rng = {5};
    build(&bad, &s, &rng, GUARD_BEHIND);
    bad_table = (int32_t *)(uintptr_t)bad.block_table;
    bad_lengths = (int64_t *)(uintptr_t)bad.kv_lengths;
    bad_weights = (float *)(uintptr_t)bad.weights;
    bad_lengths[0] = 48, bad_lengths[1] = 17;
    for (int64_t n = 0; n < 2 * 2 * 2 * 16; n++) bad.indices[n] = 7;
}

static void check_bad(int status, const char *what) {
    context("%s", what);
    guard_seal();
    CHECK_STATUS(fastattn_select_keys(&bad), (fastattn_status)status);
    for (int64_t n = 0; n < 2 * 2 * 2 * 16 && status != FASTATTN_OK && bad.indices; n++) CHECK(bad.indices[n] == 7, "something was written");
    guard_check();
    guard_release();
}

#define SELECT(status, spoil) (build_bad(), (void)(spoil), check_bad(status, #spoil))

TEST(errors_selection) {
    CHECK_STATUS(fastattn_select_keys(NULL), FASTATTN_ERROR_ARGUMENT);
    SELECT(FASTATTN_OK, 0);
    SELECT(FASTATTN_OK, bad_table[5] = -1); /* beyond the length */
    SELECT(FASTATTN_ERROR_BLOCK_TABLE, bad_table[4] = -1);
    SELECT(FASTATTN_ERROR_BLOCK_TABLE, bad_table[2] = 6);
    SELECT(FASTATTN_ERROR_KV_LENGTHS, bad_lengths[0] = 49);
    SELECT(FASTATTN_ERROR_KV_LENGTHS, bad_lengths[1] = -1);
    SELECT(FASTATTN_ERROR_SCALE, bad_weights[3] = NAN);
    SELECT(FASTATTN_ERROR_ARGUMENT, bad.size = 8);
    SELECT(FASTATTN_ERROR_ARGUMENT, bad.q = NULL);
    SELECT(FASTATTN_ERROR_ARGUMENT, bad.k_strides[0] += 2);
    SELECT(FASTATTN_ERROR_ARGUMENT, bad.indices_strides[2] = 0);
    SELECT(FASTATTN_ERROR_SHAPE, bad.num_keys = 15);
    SELECT(FASTATTN_ERROR_SHAPE, bad.num_keys = -4);
    SELECT(FASTATTN_ERROR_SHAPE, bad.keep_first = 17);
    SELECT(FASTATTN_ERROR_SHAPE, (bad.keep_first = 1, bad.keep_recent = 13));
    SELECT(FASTATTN_ERROR_SHAPE, bad.keep_recent = -1);
    SELECT(FASTATTN_ERROR_SHAPE, bad.num_heads = 3);
    SELECT(FASTATTN_ERROR_SHAPE, bad.page_size = 0);
    SELECT(FASTATTN_ERROR_SHAPE, bad.kv_len = (int64_t)1 << 31);
    SELECT(FASTATTN_ERROR_DTYPE, bad.k_dtype = FASTATTN_BOOL);
    SELECT(FASTATTN_ERROR_DTYPE, bad.q_dtype = FASTATTN_BFLOAT16);
    SELECT(FASTATTN_ERROR_ISA, bad.isa = (fastattn_isa)99);
    SELECT(FASTATTN_ERROR_THREADING, bad.threading = (fastattn_threading)9);
    SELECT(FASTATTN_ERROR_MEMORY, allocation_fails = 1);
    allocation_fails = 0;
}
