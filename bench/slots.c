/* Where the time of a block goes: every slot of every table of products that this machine can run, on the operands that the tests
 * check it with, in its caches. slots.sh builds and runs it. */
#define _POSIX_C_SOURCE 199309L

#include "../tests/c/chain.h"

#include <stdarg.h>
#include <stdlib.h>
#include <time.h>

#if defined(__x86_64__)
#include <x86intrin.h>
#define UNIT "cycles of the time stamp counter"
static double now(void) { return (double)__rdtsc(); }
#else
#define UNIT "nanoseconds"
static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e9 * (double)t.tv_sec + (double)t.tv_nsec;
}
#endif

static const char *const names[CHAIN_SLOTS] = {"pack", "keys", "values", "qk", "softmax", "+ qk", "pv", "unpack"};

fastattn_isa test_isa;

void fail(const char *file, int line, const char *format, ...) {
    va_list list;
    va_start(list, format);
    fprintf(stderr, "%s:%d: ", file, line);
    vfprintf(stderr, format, list);
    va_end(list);
    exit(1);
}

static int ascending(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Medians of rounds in each of which every slot has its turn. */
static void measure(struct chain *x, int rounds, double median[CHAIN_SLOTS]) {
    enum { MOST = 1000, TURNS = 20 };
    static double taken[CHAIN_SLOTS][MOST];
    if (rounds > MOST) rounds = MOST;
    for (int round = -1; round < rounds; round++) /* the first is not counted */
        for (int slot = 0; slot < CHAIN_SLOTS; slot++) {
            if (slot == CHAIN_BESIDE && !x->by->softmax_beside) continue;
            const double start = now();
            for (int turn = 0; turn < TURNS; turn++) chain_run(x, (enum chain_slot)slot);
            if (round >= 0) taken[slot][round] = (now() - start) / TURNS;
        }
    for (int slot = 0; slot < CHAIN_SLOTS; slot++) {
        qsort(taken[slot], (size_t)rounds, sizeof(double), ascending);
        median[slot] = taken[slot][rounds / 2];
    }
}

static void report(const fa_products *by, fastattn_dtype dtype, int64_t dim, int rounds) {
    static const char *const storage[] = {"float32", "float16", "bfloat16"};
    struct chain x = {.by = by,
                      .dtype = dtype,
                      .c = {by->panel_rows, 0, by->panel_rows},
                      .head_dim = dim,
                      .v_head_dim = dim,
                      .block = by->block_keys,
                      .keys = by->block_keys,
                      .part = by->score_keys,
                      .sign = 1,
                      .unit = 0.01f,
                      .as_stored = by->in_place && dtype == FASTATTN_FLOAT32};
    const double panel = 32.0 / x.c.rows, run_of_keys = 32.0 / (double)x.keys, scores = panel * 32.0 / (double)x.part;
    const double share[CHAIN_SLOTS] = {panel, run_of_keys, run_of_keys, scores, scores, scores, panel * run_of_keys, panel};
    double median[CHAIN_SLOTS];
    chain_lay_out(&x);
    for (int r = 0; r < x.c.rows; r++) x.m[r] = 100, x.l[r] = 0, x.factor[r] = x.alpha[r] = 1; /* no score is above the maximum */
    if (by->sums) x.l = NULL;
    if (by->enter) by->enter();
    measure(&x, rounds, median);
    if (by->leave) by->leave();
    guard_release();
    printf("%-18s %-8s %5d", by->name, storage[dtype], (int)dim);
    for (int slot = 0; slot < CHAIN_SLOTS; slot++)
        if (slot == CHAIN_BESIDE && !by->softmax_beside) printf(" %8s", "-");
        else printf(" %8.0f", median[slot] * share[slot]);
    printf("\n");
    fflush(stdout);
}

int main(int argc, char **argv) {
    static const fastattn_isa isas[] = {FASTATTN_ISA_PORTABLE, FASTATTN_ISA_NEON, FASTATTN_ISA_AVX2, FASTATTN_ISA_AVX512, FASTATTN_ISA_AMX};
    static const struct {
        fastattn_dtype dtype;
        fastattn_precision precision;
    } kinds[] = {{FASTATTN_FLOAT32, FASTATTN_PRECISION_HIGHEST},
                 {FASTATTN_FLOAT32, FASTATTN_PRECISION_HIGH},
                 {FASTATTN_FLOAT32, FASTATTN_PRECISION_MEDIUM},
                 {FASTATTN_FLOAT16, FASTATTN_PRECISION_HIGHEST},
                 {FASTATTN_BFLOAT16, FASTATTN_PRECISION_HIGHEST}};
    const int rounds = argc > 1 ? atoi(argv[1]) : 0;
    if (rounds < 1 || argc < 3) return fprintf(stderr, "usage: %s ROUNDS HEAD_DIM ...\n", argv[0]), 2;
    printf("Medians of %d rounds, in %s: pack and unpack for 32 rows, keys and values for 32 keys, the rest for\n"
           "32 rows x 32 keys. \"+ qk\" is the softmax with the qk of other keys beside it.\n\n%-18s %-8s %5s",
           rounds, UNIT, "products", "storage", "dim");
    for (int slot = 0; slot < CHAIN_SLOTS; slot++) printf(" %8s", names[slot]);
    printf("\n");
    for (size_t i = 0; i < COUNT(isas); i++) {
        test_isa = isas[i];
        if (!fastattn_isa_available(test_isa)) continue;
        const fa_ukernel *uk = table();
        for (size_t n = 0; n < COUNT(kinds); n++) {
            const fa_products *by = fastattn_products_select(uk, isas[i], kinds[n].dtype, kinds[n].precision, 0);
            const int again = by->isa != isas[i] || (kinds[n].precision != FASTATTN_PRECISION_HIGHEST && by == uk->products);
            for (int d = 2; d < argc && !again; d++) report(by, kinds[n].dtype, atoi(argv[d]), rounds);
        }
    }
    return 0;
}
