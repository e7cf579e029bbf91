/* Keys and values in pages, each of them between guard pages: the bits are those of the same keys side by side. */
#include "problem.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { NOT_A_PAGE = -7 };

/* Moves an array (batch, heads, rows, dim) into pages by a table, what is not in use left as NaN. */
static void *into_pages(const char *name, const struct problem *p, const void *from, const int64_t from_strides[3], int64_t dim,
                        const int32_t *table, int64_t columns, int heads_first, enum guard_side side, int64_t strides[3]) {
    const fastattn_attention_args *a = &p->args;
    const int64_t item = (int64_t)dtype_size(a->kv_dtype), rows = a->page_size;
    const size_t bytes = (size_t)(a->num_kv_heads * rows * dim * item);
    char *pages = guard_inputs(name, a->num_pages, bytes, (size_t)item, side, &strides[0]);
    strides[1] = (heads_first ? rows : 1) * dim * item;
    strides[2] = (heads_first ? 1 : a->num_kv_heads) * dim * item;
    for (int64_t n = 0; n < a->num_pages; n++) memset(pages + n * strides[0], 0xFF, bytes);
    for (int64_t b = 0; b < a->batch; b++)
        for (int64_t j = a->kv_starts ? a->kv_starts[b] : 0; j < (a->kv_lengths ? a->kv_lengths[b] : a->kv_len); j++)
            for (int64_t h = 0; h < a->num_kv_heads; h++)
                memcpy(pages + table[b * columns + j / rows] * strides[0] + h * strides[1] + j % rows * strides[2],
                       element(from, from_strides, a->kv_dtype, b, h, j, 0), (size_t)(dim * item));
    return pages;
}

/* The keys and values of a problem move into pages of this size, handed out at random; some entries may share none. */
static void page(struct problem *p, int64_t page_size, struct rng *rng, enum guard_side side) {
    fastattn_attention_args *a = &p->args;
    const int64_t columns = (a->kv_len + page_size - 1) / page_size, wanted = a->batch * columns;
    a->page_size = page_size;
    a->num_pages = wanted + random_between(rng, 0, 3);
    int32_t *table = guard_input("block_table", (size_t)wanted * sizeof *table, sizeof *table, side);
    int32_t *order = malloc((size_t)(a->num_pages + 1) * sizeof *order);
    CHECK(order != NULL, "out of memory");
    for (int64_t n = 0; n < a->num_pages; n++) order[n] = (int32_t)n;
    for (int64_t n = 0; n < wanted; n++) {
        const int64_t other = random_between(rng, n, a->num_pages - 1);
        table[n] = order[other];
        order[other] = order[n];
    }
    free(order);
    int64_t k_strides[3], v_strides[3];
    const int heads_first = random_between(rng, 0, 1) == 1;
    void *k = into_pages("a page of k", p, a->k, a->k_strides, a->head_dim, table, columns, heads_first, side, k_strides);
    const int other_way = random_between(rng, 0, 1) == 1;
    void *v = into_pages("a page of v", p, a->v, a->v_strides, a->v_head_dim, table, columns, heads_first ^ other_way, side, v_strides);
    a->k = k, a->v = v;
    memcpy(a->k_strides, k_strides, sizeof k_strides);
    memcpy(a->v_strides, v_strides, sizeof v_strides);
    for (int64_t b = 0; b < a->batch; b++) /* what lies outside of the lengths is not looked at */
        for (int64_t n = 0; n < columns; n++) {
            const int64_t start = a->kv_starts ? a->kv_starts[b] : 0, length = a->kv_lengths ? a->kv_lengths[b] : a->kv_len;
            if (n < start / page_size || n * page_size >= length) table[b * columns + n] = NOT_A_PAGE;
        }
    a->block_table = table;
    a->block_table_stride = columns * (int64_t)sizeof *table;
}

static void run(struct problem *p, enum guard_side side) {
    problem_seal(p, side);
    CHECK_STATUS(fastattn_attention(&p->args, p->workspace, p->workspace_size), FASTATTN_OK);
    guard_check();
}

typedef void change(struct problem *p);

/* A problem that is changed before its keys move into pages, and after. */
static void check_changed(const struct spec *spec, int64_t page_size, uint64_t seed, enum guard_side side, change *before, change *after) {
    struct problem problem;
    uint8_t *bits = NULL;
    spec_context(spec, seed);
    for (int paged = 0; paged < 2; paged++) {
        struct rng rng = {seed};
        problem_build(&problem, spec, seed, side);
        if (before) before(&problem);
        if (paged) page(&problem, page_size, &rng, side);
        if (after) after(&problem);
        run(&problem, side);
        if (paged) CHECK(problem_equals(&problem, bits), "pages of %lld give other bits", (long long)page_size);
        else bits = problem_snapshot(&problem);
        guard_release();
    }
    free(bits);
}

static void check_paged(const struct spec *spec, int64_t page_size, uint64_t seed, enum guard_side side) {
    check_changed(spec, page_size, seed, side, NULL, NULL);
}

TEST_EACH_ISA(pages_of_any_size_give_the_bits_of_keys_side_by_side) {
    static const int64_t sizes[] = {1, 2, 7, 16, 33, 64, 200};
    static const fastattn_dtype dtypes[] = {FASTATTN_FLOAT32, FASTATTN_FLOAT16, FASTATTN_BFLOAT16};
    static const int64_t rows[] = {1, 3, 14, 40, 130}; /* each way of taking rows: one, few, by rows, lanes, panels */
    for (size_t n = 0; n < COUNT(sizes); n++)
        for (size_t t = 0; t < COUNT(dtypes); t++)
            for (size_t r = 0; r < COUNT(rows); r++) {
                struct spec spec = {.name = "pages", .batch = 3, .heads = 2, .kv_heads = 2, .q_len = rows[r], .kv_len = 150,
                                    .head_dim = 24, .v_head_dim = 40, .q_dtype = dtypes[t], .kv_dtype = dtypes[t], .causal = r % 2 == 0,
                                    .lengths = n % 3, .num_threads = 2};
                check_paged(&spec, sizes[n], n * 31 + t * 7 + r, (n + t + r) % 2 ? GUARD_BEHIND : GUARD_BEFORE);
            }
}

/* Keys in parts, and runs that follow each other. */
TEST_EACH_ISA(pages_of_long_sequences) {
    static const int64_t sizes[] = {1, 16, 50};
    for (size_t n = 0; n < COUNT(sizes); n++)
        for (int few = 0; few < 2; few++) {
            struct spec spec = {.name = "long pages", .batch = 2, .heads = 4, .kv_heads = 1, .q_len = few ? 1 : 20, .kv_len = 2500,
                                .head_dim = 16, .causal = 1, .lengths = LENGTHS_RAGGED, .kv_dtype = few ? FASTATTN_BFLOAT16 : FASTATTN_FLOAT32};
            check_paged(&spec, sizes[n], n, GUARD_BEHIND);
        }
}

/* Heads of a page, some of which are an item. */
TEST_EACH_ISA(pages_of_heads_abreast) {
    static const int64_t sizes[] = {1, 16, 50};
    static const fastattn_dtype dtypes[] = {FASTATTN_FLOAT32, FASTATTN_FLOAT16, FASTATTN_BFLOAT16};
    for (int64_t kv_heads = 2; kv_heads <= 9; kv_heads++) {
        struct spec spec = {.name = "abreast", .batch = 2, .heads = kv_heads * (1 + kv_heads % 2), .kv_heads = kv_heads,
                            .q_len = kv_heads % 4 ? kv_heads % 3 + 1 : 1, .kv_len = kv_heads % 4 ? 300 : 2500, .head_dim = 16, .v_head_dim = 24,
                            .q_dtype = dtypes[kv_heads % 3], .kv_dtype = dtypes[kv_heads % 3], .lengths = LENGTHS_RAGGED,
                            .causal = kv_heads & 1, .num_threads = kv_heads == 8 ? 3 : 1};
        for (size_t n = 0; n < COUNT(sizes); n++)
            check_paged(&spec, sizes[n], (uint64_t)kv_heads * 7 + n, kv_heads % 2 ? GUARD_BEHIND : GUARD_BEFORE);
    }
}

TEST_EACH_ISA(pages_under_random_options) {
    struct rng rng = {77};
    for (int n = 0; n < test_effort; n++) {
        const uint64_t seed = random_bits(&rng);
        struct rng own = {seed};
        const struct spec spec = spec_random(&own);
        check_paged(&spec, random_between(&rng, 1, 40), seed, n % 2 ? GUARD_BEHIND : GUARD_BEFORE);
    }
}

static void spoil(struct problem *p) {
    for (int64_t j = 3; j < 150; j += 41) {
        store(FASTATTN_FLOAT32, element(p->v, p->args.v_strides, FASTATTN_FLOAT32, 0, 0, j, j % 24), (double)INFINITY);
        store(FASTATTN_FLOAT32, element(p->k, p->args.k_strides, FASTATTN_FLOAT32, 0, 0, j + 20, j % 24), (double)NAN);
    }
}

/* Values that are not finite, hidden and seen, on every way of looking for them. */
TEST_EACH_ISA(pages_with_nan_and_infinity) {
    static const int64_t rows[] = {1, 14, 70};
    for (size_t r = 0; r < COUNT(rows); r++) {
        const struct spec spec = {.name = "not finite", .heads = 2, .q_len = rows[r], .kv_len = 150, .head_dim = 24, .causal = 1};
        check_changed(&spec, 16, r, GUARD_BEHIND, spoil, NULL);
    }
}

enum { BATCH = 2, KEYS = 150, SEGMENTS = 70 };

static void ask_for_mass(struct problem *p) {
    int32_t *segments = guard_input("segments", BATCH * KEYS * sizeof *segments, sizeof *segments, GUARD_BEHIND);
    for (int j = 0; j < BATCH * KEYS; j++) segments[j] = j % KEYS * SEGMENTS / KEYS - (j % 11 == 0);
    p->args.segments = segments;
    p->args.segments_stride = KEYS * (int64_t)sizeof *segments;
    p->args.num_segments = SEGMENTS;
    p->args.v_head_dim = 0;
    p->args.v = NULL;
}

/* Weights summed by segments that no page divides. */
TEST_EACH_ISA(mass_of_keys_in_pages) {
    static const int64_t rows[] = {1, 3, 14, 40, 130};
    for (size_t r = 0; r < COUNT(rows); r++) {
        const struct spec spec = {.name = "mass in pages", .batch = BATCH, .heads = 4, .kv_heads = 4, .q_len = rows[r], .kv_len = KEYS, .head_dim = 24,
                                  .v_head_dim = SEGMENTS, .causal = r % 2 == 0, .lengths = LENGTHS_RAGGED, .num_threads = 2};
        check_changed(&spec, 16, r, GUARD_BEHIND, NULL, ask_for_mass);
    }
}

static struct problem bad;
static int32_t *bad_table;

static void build_bad(void) {
    static const struct spec spec = {.name = "bad pages", .batch = 2, .heads = 2, .kv_heads = 2, .q_len = 3, .kv_len = 50, .head_dim = 16,
                                     .lengths = LENGTHS_RANDOM};
    struct rng rng = {5};
    problem_build(&bad, &spec, 7, GUARD_BEHIND);
    bad.kv_lengths[0] = 50, bad.kv_lengths[1] = 17; /* four pages, and two */
    page(&bad, 16, &rng, GUARD_BEHIND);
    bad_table = (int32_t *)(uintptr_t)bad.args.block_table;
}

#define PAGES(status, spoil) (build_bad(), (void)(spoil), problem_ends_with(&bad, status, #spoil))

TEST(errors_pages) {
    PAGES(FASTATTN_OK, 0);
    PAGES(FASTATTN_ERROR_BLOCK_TABLE, bad_table[0] = -1);
    PAGES(FASTATTN_ERROR_BLOCK_TABLE, bad_table[3] = INT32_MIN);
    PAGES(FASTATTN_ERROR_BLOCK_TABLE, bad_table[5] = (int32_t)bad.args.num_pages);
    PAGES(FASTATTN_ERROR_BLOCK_TABLE, bad_table[4] = INT32_MAX);
    PAGES(FASTATTN_OK, bad_table[6] = INT32_MAX); /* beyond the length */
    PAGES(FASTATTN_ERROR_BLOCK_TABLE, bad.args.num_pages = 1);
    PAGES(FASTATTN_ERROR_BLOCK_TABLE, bad.args.num_pages = 0);
    PAGES(FASTATTN_ERROR_SHAPE, bad.args.num_pages = -1);
    PAGES(FASTATTN_ERROR_SHAPE, bad.args.num_pages = INT64_MAX);
    PAGES(FASTATTN_ERROR_SHAPE, bad.args.page_size = 0);
    PAGES(FASTATTN_ERROR_SHAPE, bad.args.page_size = -16);
    PAGES(FASTATTN_ERROR_SHAPE, bad.args.page_size = INT64_MAX);
    PAGES(FASTATTN_ERROR_KV_LENGTHS, bad.kv_lengths[0] = 51);
    PAGES(FASTATTN_ERROR_ARGUMENT, bad.args.block_table = (const int32_t *)(const void *)((const char *)bad.args.block_table + 2));
    PAGES(FASTATTN_ERROR_ARGUMENT, bad.args.block_table_stride += 2);
    PAGES(FASTATTN_ERROR_ARGUMENT, bad.args.k_strides[0] += 2);
    PAGES(FASTATTN_ERROR_ARGUMENT, bad.args.v_strides[2] += 1);
    PAGES(FASTATTN_ERROR_ARGUMENT, bad.args.k = NULL);
    static const int64_t cu_seqlens[3] = {0, 25, 50};
    PAGES(FASTATTN_ERROR_ARGUMENT, bad.args.cu_seqlens_k = cu_seqlens);
}
