/* fastattn_store: tokens into the pages of a cache, against a cast of every number by itself. */
#include "problem.h"

#include <math.h>
#include <string.h>

static const fastattn_dtype dtypes[] = {FASTATTN_FLOAT32, FASTATTN_FLOAT16, FASTATTN_BFLOAT16};

/* New tokens and a cache in guarded memory; the slots are a random choice, each at most once, and some are -1. */
struct store {
    fastattn_store_args args;
    int64_t *slots;
};

static int64_t tokens_of(const struct store *s) { return s->args.batch * s->args.new_len; }

static struct store store_build(struct rng *rng, int64_t head_dim, fastattn_dtype from, fastattn_dtype to, enum guard_side side) {
    const int64_t batch = random_between(rng, 1, 3), new_len = random_between(rng, 1, 40), heads = random_between(rng, 1, 3);
    const int64_t page_size = random_between(rng, 1, 17), pages = (batch * new_len + page_size - 1) / page_size + random_between(rng, 0, 2);
    const int64_t from_size = (int64_t)dtype_size(from), to_size = (int64_t)dtype_size(to);
    struct store s = {.args = {.size = sizeof s.args, .batch = batch, .new_len = new_len, .num_heads = heads, .head_dim = head_dim,
                               .from_dtype = from, .to_dtype = to, .num_pages = pages, .page_size = page_size, .isa = test_isa,
                               .num_threads = (int)random_between(rng, 0, 3)}};
    fastattn_store_args *a = &s.args;
    /* The new tokens head by head, as after a projection's transposition; the cache page by page and head by head. */
    a->from_strides[0] = new_len * heads * head_dim * from_size;
    a->from_strides[1] = head_dim * from_size;
    a->from_strides[2] = new_len * head_dim * from_size;
    a->to_strides[0] = heads * page_size * head_dim * to_size;
    a->to_strides[1] = head_dim * to_size;
    a->to_strides[2] = page_size * head_dim * to_size;
    char *from_memory = guard_input("from", (size_t)(tokens_of(&s) * heads * head_dim * from_size), (size_t)from_size, side);
    for (int64_t i = 0; i < tokens_of(&s) * heads * head_dim; i++) store(from, from_memory + i * from_size, 9 * random_signed(rng));
    a->from = from_memory;
    a->to = guard_output("the cache", (size_t)(pages * heads * page_size * head_dim * to_size), (size_t)to_size, side);
    memset(a->to, 0x5a, (size_t)(pages * heads * page_size * head_dim * to_size));
    s.slots = guard_input("slots", (size_t)tokens_of(&s) * sizeof *s.slots, sizeof *s.slots, side);
    for (int64_t t = 0, slot = 0; t < tokens_of(&s); t++, slot++) s.slots[t] = random_between(rng, 0, 5) ? slot : -1;
    a->slots = s.slots;
    return s;
}

static const char *place(const fastattn_store_args *a, int64_t slot, int64_t head, int64_t d) {
    return (const char *)a->to + slot / a->page_size * a->to_strides[0] + slot % a->page_size * a->to_strides[1] +
           head * a->to_strides[2] + d * (int64_t)dtype_size(a->to_dtype);
}

static void store_verify(const struct store *s) {
    const fastattn_store_args *a = &s->args;
    static const unsigned char untouched[4] = {0x5a, 0x5a, 0x5a, 0x5a};
    const size_t size = dtype_size(a->to_dtype);
    int64_t next = 0; /* slots ascend, with gaps at those left out */
    for (int64_t t = 0; t < tokens_of(s); t++, next++)
        for (int64_t h = 0; h < a->num_heads; h++)
            for (int64_t d = 0; d < a->head_dim; d++) {
                const char *at = place(a, next, h, d);
                if (s->slots[t] < 0) {
                    CHECK(memcmp(at, untouched, size) == 0, "token %lld was left out, and slot %lld written", (long long)t, (long long)next);
                    continue;
                }
                char wanted[4];
                store(a->to_dtype, wanted,
                      load(a->from_dtype, (const char *)a->from + t / a->new_len * a->from_strides[0] + t % a->new_len * a->from_strides[1] +
                                              h * a->from_strides[2] + d * (int64_t)dtype_size(a->from_dtype)));
                CHECK(memcmp(at, wanted, size) == 0, "token %lld, head %lld, number %lld is %g", (long long)t, (long long)h, (long long)d,
                      load(a->to_dtype, at));
            }
}

TEST_EACH_ISA(stored_tokens_are_cast_and_where_their_slots_say) {
    static const int64_t dims[] = {1, 7, 15, 16, 17, 64, 100, 255, 256, 257, 600};
    struct rng rng = {11};
    for (size_t n = 0; n < COUNT(dims); n++)
        for (size_t from = 0; from < COUNT(dtypes); from++)
            for (size_t to = 0; to < COUNT(dtypes); to++) {
                const enum guard_side side = (n + from + to) % 2 ? GUARD_BEFORE : GUARD_BEHIND;
                const struct store s = store_build(&rng, dims[n], dtypes[from], dtypes[to], side);
                context("head_dim %lld, dtype %d to %d", (long long)dims[n], (int)dtypes[from], (int)dtypes[to]);
                guard_seal();
                CHECK_STATUS(fastattn_store(&s.args), FASTATTN_OK);
                guard_check();
                store_verify(&s);
                guard_release();
            }
}

TEST(bad_stores_are_refused_and_nothing_is_written) {
    struct rng rng = {12};
    const struct store good = store_build(&rng, 24, FASTATTN_FLOAT32, FASTATTN_BFLOAT16, GUARD_BEHIND);
    const int64_t last = tokens_of(&good) - 1, slots = good.args.num_pages * good.args.page_size;
    CHECK_STATUS(fastattn_store(NULL), FASTATTN_ERROR_ARGUMENT);
#define REFUSED(change, status)                  \
    do {                                         \
        fastattn_store_args a = good.args;       \
        change;                                  \
        CHECK_STATUS(fastattn_store(&a), status); \
    } while (0)
    REFUSED(a.size = 8, FASTATTN_ERROR_ARGUMENT);
    REFUSED(a.from = NULL, FASTATTN_ERROR_ARGUMENT);
    REFUSED(a.to = NULL, FASTATTN_ERROR_ARGUMENT);
    REFUSED(a.slots = NULL, FASTATTN_ERROR_ARGUMENT);
    REFUSED(a.from = (const char *)a.from + 1, FASTATTN_ERROR_ARGUMENT);
    REFUSED(a.slots = (const int64_t *)(const void *)((const char *)a.slots + 4), FASTATTN_ERROR_ARGUMENT);
    REFUSED(a.to_strides[1]++, FASTATTN_ERROR_ARGUMENT);
    REFUSED(a.from_dtype = FASTATTN_BOOL, FASTATTN_ERROR_DTYPE);
    REFUSED(a.to_dtype = FASTATTN_FLOAT64, FASTATTN_ERROR_DTYPE);
    REFUSED(a.batch = -1, FASTATTN_ERROR_SHAPE);
    REFUSED(a.page_size = -1, FASTATTN_ERROR_SHAPE);
    REFUSED(a.new_len = (int64_t)1 << 50, FASTATTN_ERROR_SHAPE);
    REFUSED(a.num_pages = INT64_MAX, FASTATTN_ERROR_SHAPE);
    good.slots[last] = slots;
    REFUSED((void)0, FASTATTN_ERROR_SLOT);
    good.slots[last] = -2;
    REFUSED((void)0, FASTATTN_ERROR_SLOT);
    const unsigned char *to = good.args.to;
    for (int64_t i = 0; i < slots * good.args.num_heads * 24 * 2; i++) CHECK(to[i] == 0x5a, "byte %lld was written", (long long)i);
    fastattn_store_args none = {.size = sizeof none, .to_dtype = FASTATTN_FLOAT16};
    CHECK_STATUS(fastattn_store(&none), FASTATTN_OK);
}
