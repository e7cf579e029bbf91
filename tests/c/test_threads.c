/* The same bits whoever computes: any number of threads, had either way, the caller's own threads, several callers at once, a
 * batch entry alone; and an environment left as it was found. */
#include "problem.h"

#include <fenv.h>
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

static const fastattn_threading ways[] = {FASTATTN_THREADING_POOL, FASTATTN_THREADING_OPENMP};

static const struct spec specs[] = {
    {.name = "prefill", .batch = 2, .heads = 3, .kv_heads = 3, .q_len = 130, .kv_len = 200, .head_dim = 24,
     .causal = 1},
    {.name = "grouped", .heads = 8, .kv_heads = 2, .q_len = 33, .kv_len = 150, .head_dim = 16, .mask = MASK_BOOL,
     .hidden = 0.3},
    {.name = "decode", .batch = 3, .heads = 8, .kv_heads = 2, .q_len = 1, .kv_len = 5000, .head_dim = 16, .sinks = 1,
     .lengths = LENGTHS_RANDOM},
    {.name = "decode, bfloat16", .heads = 4, .q_len = 2, .kv_len = 9000, .head_dim = 8, .q_dtype = FASTATTN_BFLOAT16,
     .kv_dtype = FASTATTN_BFLOAT16},
    {.name = "decode, float16", .heads = 4, .q_len = 3, .kv_len = 700, .head_dim = 32, .q_dtype = FASTATTN_FLOAT16,
     .kv_dtype = FASTATTN_FLOAT16},
    {.name = "blocks", .batch = 2, .heads = 2, .q_len = 300, .kv_len = 300, .head_dim = 8, .block_size = 32,
     .blocks_partial = 1, .blocks_by_head = 1, .blocks_density = 0.4},
    {.name = "ragged", .batch = 7, .heads = 2, .q_len = 70, .kv_len = 3000, .head_dim = 8, .lengths = LENGTHS_RAGGED, .causal = 1},
};

/* The outputs of a call by the calling thread alone. */
static uint8_t *reference(struct problem *problem) {
    problem->args.num_threads = 1;
    CHECK_STATUS(fastattn_attention(&problem->args, NULL, 0), FASTATTN_OK);
    uint8_t *bits = problem_snapshot(problem);
    problem_blank(problem);
    return bits;
}

TEST_EACH_ISA(threads_do_not_change_results) {
    static const int threads[] = {0, 1, 2, 3, 7, 64, -1};
    for (size_t n = 0; n < COUNT(specs); n++) {
        struct problem problem;
        problem_build(&problem, &specs[n], n, GUARD_BEHIND);
        uint8_t *bits = reference(&problem);
        for (size_t t = 0; t < COUNT(threads); t++)
            for (size_t way = 0; way < COUNT(ways); way++)
                for (int owned = 0; owned < 2; owned++) {
                    context("%s, %d threads by %s, %s workspace", specs[n].name, threads[t],
                            fastattn_threading_name(ways[way]), owned ? "its own" : "a null");
                    if (!fastattn_threading_available(ways[way]))
                        continue;
                    problem.args.threading = ways[way];
                    problem.args.num_threads = threads[t];
                    problem_blank(&problem);
                    if (owned)
                        problem_seal(&problem, GUARD_BEHIND);
                    CHECK_STATUS(fastattn_attention(&problem.args, owned ? problem.workspace : NULL,
                                                    owned ? problem.workspace_size : 0),
                                 FASTATTN_OK);
                    CHECK(problem_equals(&problem, bits), "other bits than with one thread");
                }
        guard_check();
        guard_release();
        free(bits);
    }
}

/* A list of items in random order, from which threads take one after another. */
struct queue {
    const fastattn_plan *plan;
    int phase;
    int64_t count, next;
    const int64_t *order;
};
struct worker {
    struct queue *queue;
    int number;
    pthread_t thread;
};

static void *work(void *argument) {
    const struct worker *worker = argument;
    struct queue *q = worker->queue;
    for (int64_t n; (n = __atomic_fetch_add(&q->next, 1, __ATOMIC_RELAXED)) < q->count;)
        CHECK_STATUS(fastattn_plan_run(q->plan, q->phase, q->order[n], worker->number), FASTATTN_OK);
    return NULL;
}

static void run_items(const struct problem *problem, struct rng *rng) {
    struct worker workers[8];
    const fastattn_plan *plan;
    CHECK_STATUS(fastattn_attention_plan(&problem->args, problem->workspace, problem->workspace_size, &plan), FASTATTN_OK);
    for (int phase = 0; phase < 2; phase++) {
        const int64_t count = fastattn_plan_items(plan, phase);
        int64_t *order = malloc((size_t)(count + 1) * sizeof *order);
        CHECK(order && count >= 0 && (phase || count > 0), "%lld items in phase %d", (long long)count, phase);
        for (int64_t n = 0; n < count; n++) {
            int64_t other = random_between(rng, 0, n);
            order[n] = order[other];
            order[other] = n;
        }
        struct queue queue = {plan, phase, count, 0, order};
        for (int t = 0; t < problem->args.num_threads; t++) {
            workers[t] = (struct worker){.queue = &queue, .number = t};
            CHECK(pthread_create(&workers[t].thread, NULL, work, &workers[t]) == 0, "pthread_create");
        }
        for (int t = 0; t < problem->args.num_threads; t++)
            pthread_join(workers[t].thread, NULL);
        free(order);
    }
}

TEST_EACH_ISA(threads_of_the_caller) {
    struct rng rng = {5};
    for (size_t n = 0; n < COUNT(specs); n++)
        for (int threads = 1; threads < 8; threads += 2) {
            struct problem problem;
            context("%s, %d threads", specs[n].name, threads);
            problem_build(&problem, &specs[n], n, GUARD_BEHIND);
            uint8_t *bits = reference(&problem);
            problem.args.num_threads = threads;
            problem_seal(&problem, GUARD_BEFORE);
            run_items(&problem, &rng);
            CHECK(problem_equals(&problem, bits), "other bits than from fastattn_attention");
            guard_check();
            guard_release();
            free(bits);
        }
}

struct caller {
    struct problem problem;
    uint8_t *bits;
    pthread_t thread;
};

static void *call_often(void *argument) {
    struct caller *caller = argument;
    for (int round = 0; round < 5; round++) {
        problem_blank(&caller->problem);
        caller->problem.args.num_threads = round % 3;
        caller->problem.args.threading = round == 2 && fastattn_has_openmp() ? FASTATTN_THREADING_OPENMP
                                                                             : FASTATTN_THREADING_POOL;
        CHECK_STATUS(fastattn_attention(&caller->problem.args, NULL, 0), FASTATTN_OK);
        CHECK(problem_equals(&caller->problem, caller->bits), "other bits in company");
    }
    return NULL;
}

TEST_EACH_ISA(threads_calling_at_once) {
    struct caller callers[COUNT(specs)];
    for (size_t n = 0; n < COUNT(specs); n++) {
        problem_build(&callers[n].problem, &specs[n], n, GUARD_BEHIND);
        callers[n].bits = reference(&callers[n].problem);
    }
    guard_seal();
    for (size_t n = 0; n < COUNT(specs); n++)
        CHECK(pthread_create(&callers[n].thread, NULL, call_often, &callers[n]) == 0, "pthread_create");
    for (size_t n = 0; n < COUNT(specs); n++) {
        pthread_join(callers[n].thread, NULL);
        free(callers[n].bits);
    }
    guard_check();
}

/* A call that would take seconds at least, on operands of one row: their strides are 0. */
static int asked;
static pthread_t asking;

static int ask(void *context) {
    CHECK(context == &asked && pthread_equal(pthread_self(), asking), "asked by another thread, or for something else");
    return ++asked >= 2;
}

TEST_EACH_ISA(threads_are_interrupted) {
    enum { ROWS = 1 << 19, KEYS = 1 << 13, DIM = 8 }; /* so that an item is short, to an emulator as well */
    float row[DIM] = {0}, *out = malloc(sizeof(float) * ROWS * DIM);
    CHECK(out, "malloc");
    fastattn_attention_args args = {.size = sizeof args, .batch = 1, .num_heads = 1, .num_kv_heads = 1, .q_len = ROWS,
                                    .kv_len = KEYS, .head_dim = DIM, .v_head_dim = DIM, .q = row, .k = row, .v = row,
                                    .out = out, .out_strides = {0, 0, sizeof(float) * DIM}, .scale = 1, .window_left = -1,
                                    .window_right = -1, .isa = test_isa, .interrupted = ask, .interrupted_context = &asked};
    asking = pthread_self();
    for (int threads = 1; threads < 3; threads++)
        for (size_t way = 0; way < COUNT(ways); way++) {
            if (!fastattn_threading_available(ways[way]))
                continue;
            context("%d threads by %s", threads, fastattn_threading_name(ways[way]));
            args.num_threads = threads;
            args.threading = ways[way];
            asked = 0;
            CHECK_STATUS(fastattn_attention(&args, NULL, 0), FASTATTN_ERROR_INTERRUPTED);
            CHECK(asked == 2, "asked %d times", asked);
        }
    args.q_len = args.kv_len = 64; /* the next call is none the worse */
    CHECK_STATUS(fastattn_attention(&args, NULL, 0), FASTATTN_OK);
    free(out);
}

/* Entry b of a batch, called as a batch of one whose arrays hold its own rows and keys and nothing else. */
TEST_EACH_ISA(batch_entry_alone) {
    static const struct spec batches[] = {
        {.name = "plain", .batch = 4, .heads = 2, .kv_heads = 2, .q_len = 40, .kv_len = 90, .head_dim = 16},
        {.name = "lengths", .batch = 4, .heads = 4, .kv_heads = 2, .q_len = 5, .kv_len = 300, .head_dim = 16,
         .causal = 1, .lengths = LENGTHS_RANDOM, .offset = OFFSET_RANDOM, .alibi = ALIBI_ALL, .mask = MASK_FLOAT16,
         .hidden = 0.2},
        {.name = "decode", .batch = 5, .heads = 4, .kv_heads = 1, .q_len = 1, .kv_len = 9000, .head_dim = 8,
         .lengths = LENGTHS_RANDOM},
        {.name = "decode, short", .batch = 32, .heads = 2, .q_len = 1, .kv_len = 2000, .head_dim = 8},
        {.name = "ragged", .batch = 9, .heads = 4, .kv_heads = 2, .q_len = 150, .kv_len = 500, .head_dim = 16, .causal = 1,
         .lengths = LENGTHS_RAGGED, .alibi = ALIBI_ALL, .mask = MASK_BOOL, .hidden = 0.2},
        {.name = "ragged, bfloat16", .batch = 9, .heads = 2, .kv_heads = 1, .q_len = 150, .kv_len = 500, .head_dim = 16,
         .q_dtype = FASTATTN_BFLOAT16, .kv_dtype = FASTATTN_BFLOAT16, .lengths = LENGTHS_RAGGED, .windowed = 1,
         .window_left = 100, .window_right = 100},
        {.name = "ragged, split", .batch = 7, .heads = 2, .kv_heads = 1, .q_len = 70, .kv_len = 9000, .head_dim = 8,
         .lengths = LENGTHS_RAGGED},
    };
    for (size_t n = 0; n < COUNT(batches); n++) {
        struct problem problem;
        problem_build(&problem, &batches[n], n, GUARD_BEHIND);
        uint8_t *bits = reference(&problem);
        const fastattn_attention_args *whole = &problem.args;
        problem.args.num_threads = 3;
        CHECK_STATUS(fastattn_attention(&problem.args, NULL, 0), FASTATTN_OK);
        for (int64_t b = 0; b < whole->batch; b++) {
            fastattn_attention_args one = *whole;
            context("%s, entry %lld", batches[n].name, (long long)b);
            const int64_t start = whole->kv_starts ? whole->kv_starts[b] : 0;
            const int64_t length = whole->kv_lengths ? whole->kv_lengths[b] : whole->kv_len;
            const int64_t offset = whole->query_offset ? whole->query_offset[b] - start : 0;
            one.batch = 1;
            one.q_len = whole->q_lengths ? whole->q_lengths[b] : whole->q_len;
            one.kv_len = length - start;
            one.kv_lengths = one.kv_starts = one.q_lengths = NULL;
            one.q = element(whole->q, whole->q_strides, whole->q_dtype, b, 0, 0, 0);
            one.k = element(whole->k, whole->k_strides, whole->kv_dtype, b, 0, start, 0);
            one.v = element(whole->v, whole->v_strides, whole->kv_dtype, b, 0, start, 0);
            one.out = element(whole->out, whole->out_strides, whole->q_dtype, b, 0, 0, 0);
            one.lse = element(whole->lse, whole->lse_strides, FASTATTN_FLOAT32, b, 0, 0, 0);
            if (whole->mask)
                one.mask = mask_element(&problem, b, 0, 0, start);
            if (whole->alibi_slopes)
                one.alibi_slopes = whole->alibi_slopes + b * whole->alibi_strides[0] / 4;
            if (whole->query_offset)
                one.query_offset = &offset;
            for (int64_t h = 0; h < whole->num_heads; h++) /* so that it is seen to be written */
                for (int64_t i = 0; i < one.q_len; i++)
                    store(FASTATTN_FLOAT32, element(whole->lse, whole->lse_strides, FASTATTN_FLOAT32, b, h, i, 0), -1e9);
            CHECK_STATUS(fastattn_attention(&one, NULL, 0), FASTATTN_OK);
        }
        CHECK(problem_equals(&problem, bits), "other bits alone than among others");
        guard_release();
        free(bits);
    }
}

/* Sequences packed one after the other between guard pages, by this many threads, and each of them alone. */
TEST_EACH_ISA(packed_sequences_alone) {
    static const int64_t tables[2][6] = {{0, 1, 1, 140, 156, 300}, {0, 70, 75, 75, 375, 2900}};
    for (int side = 0; side < 2; side++)
        for (int dtype = FASTATTN_FLOAT32; dtype <= FASTATTN_BFLOAT16; dtype++) {
            const struct spec spec = {.name = "packed", .heads = 4, .kv_heads = 2, .q_len = 300, .kv_len = 2900, .head_dim = 16,
                                      .q_dtype = dtype, .kv_dtype = dtype, .causal = 1, .q_layout = SWAPPED, .k_layout = SWAPPED,
                                      .out_layout = SWAPPED};
            struct problem problem;
            context("dtype %d, side %d", dtype, side);
            problem_build(&problem, &spec, 3, side ? GUARD_BEFORE : GUARD_BEHIND);
            int64_t *queries = guard_input("cu_seqlens_q", sizeof tables[0], 8, GUARD_BEHIND);
            int64_t *keys = guard_input("cu_seqlens_k", sizeof tables[1], 8, GUARD_BEHIND);
            memcpy(queries, tables[0], sizeof tables[0]);
            memcpy(keys, tables[1], sizeof tables[1]);
            const fastattn_attention_args whole = problem.args;
            problem.args.batch = 5;
            problem.args.cu_seqlens_q = queries;
            problem.args.cu_seqlens_k = keys;
            problem.args.q_strides[0] = problem.args.out_strides[0] = 1; /* which nobody looks at */
            problem.args.num_threads = 3;
            problem_seal(&problem, GUARD_BEHIND);
            CHECK_STATUS(fastattn_attention(&problem.args, problem.workspace, problem.workspace_size), FASTATTN_OK);
            uint8_t *bits = problem_snapshot(&problem);
            for (int b = 0; b < 5; b++) {
                fastattn_attention_args one = whole;
                one.q_len = queries[b + 1] - queries[b];
                one.kv_len = keys[b + 1] - keys[b];
                one.q = element(whole.q, whole.q_strides, whole.q_dtype, 0, 0, queries[b], 0);
                one.k = element(whole.k, whole.k_strides, whole.kv_dtype, 0, 0, keys[b], 0);
                one.v = element(whole.v, whole.v_strides, whole.kv_dtype, 0, 0, keys[b], 0);
                one.out = element(whole.out, whole.out_strides, whole.q_dtype, 0, 0, queries[b], 0);
                one.lse = element(whole.lse, whole.lse_strides, FASTATTN_FLOAT32, 0, 0, queries[b], 0);
                for (int64_t h = 0; h < whole.num_heads; h++)
                    for (int64_t i = 0; i < one.q_len; i++)
                        store(FASTATTN_FLOAT32, element(one.lse, one.lse_strides, FASTATTN_FLOAT32, 0, h, i, 0), -1e9);
                CHECK_STATUS(fastattn_attention(&one, NULL, 0), FASTATTN_OK);
            }
            CHECK(problem_equals(&problem, bits), "other bits alone than packed");
            guard_check();
            guard_release();
            free(bits);
        }
}

TEST_EACH_ISA(workspace_is_all_the_memory) {
    for (size_t n = 0; n < COUNT(specs); n++) {
        struct problem problem;
        context("%s", specs[n].name);
        problem_build(&problem, &specs[n], n, GUARD_BEHIND);
        problem_seal(&problem, GUARD_BEHIND);
        const int before = allocation_count;
        const fastattn_status status = fastattn_attention(&problem.args, problem.workspace, problem.workspace_size);
        const int after = allocation_count;
        CHECK_STATUS(status, FASTATTN_OK);
        CHECK(after == before, "%d allocations in spite of a workspace", after - before);
        guard_release();
    }
}

/* The register of rounding, flushing and traps, and with x86 of the sticky flags. */
static uint64_t environment(void) {
#if defined(__x86_64__)
    uint32_t mxcsr;
    __asm__ volatile("stmxcsr %0" : "=m"(mxcsr));
    return mxcsr;
#elif defined(__aarch64__)
    uint64_t fpcr;
    __asm__ volatile("mrs %0, fpcr" : "=r"(fpcr));
    return fpcr;
#else
    return (uint64_t)fegetround();
#endif
}

static void set_environment(uint64_t bits) {
#if defined(__x86_64__)
    uint32_t mxcsr = (uint32_t)bits;
    __asm__ volatile("ldmxcsr %0" : : "m"(mxcsr));
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"(bits));
#else
    fesetround((int)bits);
#endif
}

/* Float16 times a power of two. */
static void scale_halves(void *base, const int64_t strides[3], int64_t heads, int64_t rows, int64_t dim, int exponent) {
    for (int64_t n = 0; n < heads * rows * dim; n++) {
        void *const x = element(base, strides, FASTATTN_FLOAT16, 0, n / (rows * dim), n / dim % rows, n % dim);
        store(FASTATTN_FLOAT16, x, ldexp(load(FASTATTN_FLOAT16, x), exponent));
    }
}

/* Keys of float16 become subnormal, and queries large. */
static void make_subnormal(const struct problem *problem) {
    const fastattn_attention_args *a = &problem->args;
    scale_halves(problem->q, a->q_strides, a->num_heads, a->q_len, a->head_dim, 15);
    scale_halves(problem->k, a->k_strides, a->num_kv_heads, a->kv_len, a->head_dim, -15);
}

/* A caller may round and flush as it likes: it finds its settings again, and the same results. */
TEST_EACH_ISA(environment_is_left_as_found) {
#if defined(__x86_64__)
    /* FTZ, DAZ, down, up, to zero; the flags of an inexact result and of a division by zero */
    static const uint64_t changes[] = {0, 0x8000, 0x8040, 0x2000, 0x4000, 0x6000, 0xE040, 0x0020, 0x0004};
    const uint64_t usual = environment() & ~UINT64_C(0x3F);
#elif defined(__aarch64__)
    enum { FZ16 = 1 << 19 }; /* which some processors do not have */
    static const uint64_t changes[] = {0, 1 << 24, 1 << 25, FZ16, 1 << 22, 2 << 22, 3 << 22}; /* FZ, DN, FZ16, up, down, to zero */
    const uint64_t usual = environment();
#else
    static const uint64_t changes[] = {0};
    const uint64_t usual = environment();
#endif
    for (size_t n = 0; n < COUNT(specs); n++) {
        struct problem problem;
        problem_build(&problem, &specs[n], n, GUARD_BEHIND);
        if (specs[n].kv_dtype == FASTATTN_FLOAT16) make_subnormal(&problem);
        uint8_t *bits = reference(&problem);
        problem.args.num_threads = 2;
        problem_seal(&problem, GUARD_BEHIND);
        for (size_t c = 0; c < COUNT(changes); c++)
            for (int threads = 1; threads < 3; threads++) {
                context("%s, %d threads, environment changed by %#llx", specs[n].name, threads,
                        (unsigned long long)changes[c]);
                problem_blank(&problem);
                problem.args.num_threads = threads;
                set_environment(usual | changes[c]);
                uint64_t wanted = usual | changes[c];
#if defined(__aarch64__)
                if (changes[c] == FZ16) wanted = environment();
#endif
                const fastattn_status status =
                    fastattn_attention(&problem.args, problem.workspace, problem.workspace_size);
                const uint64_t after = environment();
                set_environment(usual);
                CHECK_STATUS(status, FASTATTN_OK);
                CHECK(after == wanted, "%#llx became %#llx", (unsigned long long)wanted, (unsigned long long)after);
                CHECK(problem_equals(&problem, bits), "other bits than in the usual environment");
            }
        guard_release();
        free(bits);
    }
}
