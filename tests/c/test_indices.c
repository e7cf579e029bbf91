/* Chosen keys: right by the oracle, to which a mask hides what is not listed; lists, keys and values between guard pages. */
#include "problem.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct lists {
    char *at;
    int64_t size, heads, places;
};

static int64_t listed(const struct lists *l, const fastattn_attention_args *a, int64_t b, int64_t h, int64_t i, int64_t n) {
    const int64_t place = ((b * l->heads + h % l->heads) * a->q_len + i) * l->places + n;
    return l->size == 8 ? ((int64_t *)(void *)l->at)[place] : ((int32_t *)(void *)l->at)[place];
}

static void put(const struct lists *l, int64_t place, int64_t key) {
    if (l->size == 8) ((int64_t *)(void *)l->at)[place] = key;
    else ((int32_t *)(void *)l->at)[place] = (int32_t)key;
}

/* A list of some keys for each row, in any order, none here and there. */
static struct lists list(struct problem *p, int64_t places, int64_t size, int shared, struct rng *rng, enum guard_side side) {
    fastattn_attention_args *a = &p->args;
    struct lists l = {NULL, size, shared ? 1 : a->num_kv_heads, places};
    const int64_t rows = a->batch * l.heads * a->q_len;
    l.at = guard_input("indices", (size_t)(rows * places * size), (size_t)size, side);
    int64_t *order = malloc((size_t)(a->kv_len + 1) * sizeof *order);
    CHECK(order != NULL, "out of memory");
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t j = 0; j < a->kv_len; j++) order[j] = j;
        for (int64_t n = 0; n < places; n++) {
            int64_t key = -1;
            if (n < a->kv_len && random_between(rng, 0, 9)) {
                const int64_t other = random_between(rng, n, a->kv_len - 1);
                key = order[other];
                order[other] = order[n];
            }
            put(&l, r * places + n, key);
        }
    }
    free(order);
    a->indices = l.at, a->indices_size = size, a->num_indices = places;
    a->indices_strides[2] = places * size;
    a->indices_strides[1] = shared ? 0 : a->q_len * places * size;
    a->indices_strides[0] = l.heads * a->q_len * places * size;
    return l;
}

/* What the oracle is given: the same call under a mask, with what the mask held before where a key is listed. */
static uint8_t *mask_of(const fastattn_attention_args *a, const struct lists *l, int64_t strides[4]) {
    strides[3] = sizeof(double), strides[2] = a->kv_len * strides[3];
    strides[1] = a->q_len * strides[2], strides[0] = a->num_heads * strides[1];
    uint8_t *mask = malloc((size_t)(a->batch * strides[0] + 1));
    CHECK(mask != NULL, "out of memory");
    for (int64_t b = 0; b < a->batch; b++)
        for (int64_t h = 0; h < a->num_heads; h++)
            for (int64_t i = 0; i < a->q_len; i++) {
                double *row = (double *)(void *)(mask + b * strides[0] + h * strides[1] + i * strides[2]);
                for (int64_t j = 0; j < a->kv_len; j++) row[j] = -INFINITY;
                for (int64_t n = 0; n < l->places; n++) {
                    const int64_t j = listed(l, a, b, h / (a->num_heads / a->num_kv_heads), i, n);
                    if (j < 0) continue;
                    const char *was = (const char *)a->mask + b * a->mask_strides[0] + h * a->mask_strides[1] + i * a->mask_strides[2] +
                                      j * a->mask_strides[3];
                    row[j] = !a->mask ? 0 : a->mask_dtype != FASTATTN_BOOL ? load(a->mask_dtype, was) : *was ? 0 : -INFINITY;
                }
            }
    return mask;
}

static void check_listed(const struct spec *spec, int64_t places, int64_t size, int shared, uint64_t seed, enum guard_side side) {
    struct problem p;
    struct rng rng = {seed};
    spec_context(spec, seed);
    problem_build(&p, spec, seed, side);
    const struct lists l = list(&p, places, size, shared, &rng, side);
    problem_seal(&p, side);
    CHECK_STATUS(fastattn_attention(&p.args, p.workspace, p.workspace_size), FASTATTN_OK);
    guard_check();
    struct problem wanted = p;
    uint8_t *mask = mask_of(&p.args, &l, wanted.args.mask_strides);
    wanted.args.mask = mask, wanted.args.mask_dtype = FASTATTN_FLOAT64;
    wanted.args.indices = NULL;
    problem_verify(&wanted, 1);
    guard_release();
    free(mask);
}

TEST_EACH_ISA(listed_keys_on_each_way_of_taking_rows) {
    static const int64_t heads[] = {1, 3, 14, 40, 130};
    static const fastattn_dtype dtypes[] = {FASTATTN_FLOAT32, FASTATTN_FLOAT16, FASTATTN_BFLOAT16};
    static const int64_t places[] = {1, 15, 16, 130, 300};
    for (size_t h = 0; h < COUNT(heads); h++)
        for (size_t t = 0; t < COUNT(dtypes); t++)
            for (size_t n = 0; n < COUNT(places); n++) {
                struct spec spec = {.name = "listed", .batch = 2, .heads = heads[h], .q_len = 3, .kv_len = 150, .head_dim = 24,
                                    .v_head_dim = 40, .q_dtype = dtypes[t], .kv_dtype = dtypes[t], .num_threads = 2};
                check_listed(&spec, places[n], n % 2 ? 8 : 4, 0, h * 31 + t * 7 + n, (n + t + h) % 2 ? GUARD_BEHIND : GUARD_BEFORE);
            }
}

/* Lists in parts, and over more keys than a set of them holds at once. */
TEST_EACH_ISA(long_lists) {
    for (int wide = 0; wide < 2; wide++) {
        struct spec spec = {.name = "long lists", .heads = 4, .kv_heads = 2, .q_len = 1, .kv_len = wide ? 70000 : 2600, .head_dim = 8,
                            .kv_dtype = wide ? FASTATTN_BFLOAT16 : FASTATTN_FLOAT32};
        check_listed(&spec, 2500, 4, wide, (uint64_t)wide, GUARD_BEHIND);
    }
}

TEST_EACH_ISA(lists_under_random_options) {
    struct rng rng = {78};
    for (int n = 0; n < test_effort; n++) {
        const uint64_t seed = random_bits(&rng);
        struct rng own = {seed};
        struct spec spec = spec_random(&own);
        spec.block_size = 0;
        check_listed(&spec, random_between(&rng, 0, 70), n % 3 ? 4 : 8, n % 2, seed, n % 2 ? GUARD_BEHIND : GUARD_BEFORE);
    }
}

static struct problem bad;
static int32_t *bad_lists;

static void build_bad(void) {
    static const struct spec spec = {.name = "bad lists", .batch = 2, .heads = 4, .kv_heads = 2, .q_len = 3, .kv_len = 50, .head_dim = 16};
    struct rng rng = {5};
    problem_build(&bad, &spec, 7, GUARD_BEHIND);
    bad_lists = (int32_t *)(void *)list(&bad, 20, 4, 0, &rng, GUARD_BEHIND).at;
    for (int n = 0; n < 20; n++) bad_lists[n] = 2 * n; /* one that ascends */
    for (int n = 20; n < 40; n++) bad_lists[n] = n % 2 ? n : -1;
}

#define LISTS(status, spoil) (build_bad(), (void)(spoil), problem_ends_with(&bad, status, #spoil))

TEST(errors_indices) {
    static const int64_t cu_seqlens[3] = {0, 25, 50}, q_lengths[2] = {3, 2};
    static const fastattn_block_mask blocks = {.size = sizeof blocks, .block_size = 16};
    LISTS(FASTATTN_OK, 0);
    LISTS(FASTATTN_OK, bad_lists[0] = 49);
    LISTS(FASTATTN_ERROR_INDICES, bad_lists[0] = -2);
    LISTS(FASTATTN_ERROR_INDICES, bad_lists[0] = INT32_MIN);
    LISTS(FASTATTN_ERROR_INDICES, bad_lists[19] = 50);
    LISTS(FASTATTN_ERROR_INDICES, bad_lists[7] = INT32_MAX);
    LISTS(FASTATTN_ERROR_INDICES, bad_lists[7] = bad_lists[6]);
    LISTS(FASTATTN_ERROR_INDICES, bad_lists[22] = bad_lists[39]);
    LISTS(FASTATTN_ERROR_INDICES, bad_lists[2 * 2 * 3 * 20 - 1] = 50);
    LISTS(FASTATTN_OK, (bad_lists[2 * 2 * 3 * 20 - 1] = 50, bad.args.q_lengths = q_lengths));
    LISTS(FASTATTN_ERROR_INDICES, bad.args.kv_len = 38);
    LISTS(FASTATTN_OK, bad.args.num_indices = 0);
    LISTS(FASTATTN_ERROR_SHAPE, bad.args.num_indices = -1);
    LISTS(FASTATTN_ERROR_SHAPE, bad.args.num_indices = INT64_MAX);
    LISTS(FASTATTN_ERROR_ARGUMENT, bad.args.indices_size = 2);
    LISTS(FASTATTN_ERROR_ARGUMENT, bad.args.indices_size = 0);
    LISTS(FASTATTN_ERROR_ARGUMENT, bad.args.indices_size = INT64_MIN);
    LISTS(FASTATTN_ERROR_ARGUMENT, bad.args.indices_strides[2] += 2);
    LISTS(FASTATTN_ERROR_ARGUMENT, bad.args.indices = (const char *)bad.args.indices + 2);
    LISTS(FASTATTN_ERROR_ARGUMENT, bad.args.block_mask = &blocks);
    LISTS(FASTATTN_ERROR_ARGUMENT, bad.args.cu_seqlens_k = cu_seqlens);
}
