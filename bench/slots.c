/* Where the time of a block goes: every slot of every table of products that this machine can run, on data in its caches.
 * slots.sh builds and runs it. */
#define _POSIX_C_SOURCE 199309L

#include "ukernel/storage.h"
#include "ukernel/ukernel.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
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

#define COUNT(array) (sizeof(array) / sizeof *(array))

enum { PACK, UNPACK, KEYS, VALUES, QK, SOFTMAX, BESIDE, PV, SLOTS };
static const char *const names[SLOTS] = {"pack", "unpack", "keys", "values", "qk", "softmax", "+ qk", "pv"};

/* A panel of queries and a run of keys and values. */
struct block {
    const fa_ukernel *uk;
    const fa_products *by;
    fastattn_dtype dtype;
    int64_t dim;
    int rows;
    int64_t keys, part; /* of a run, and of one step of the softmax */
    const void *rows_of[FA_PANEL_ROWS];
    void *outputs[FA_PANEL_ROWS];
    fa_matrix k, v, keys_made, values_made;
    float *k_room, *v_room, *q, *s, *next, *p, *o, *m, *l, *alpha, *factor;
};

static float *room(int64_t floats) {
    const size_t bytes = ((size_t)floats * sizeof(float) + 63) / 64 * 64;
    float *p = aligned_alloc(64, bytes);
    if (!p) abort();
    memset(p, 0, bytes);
    return p;
}

/* Numbers around 1, whatever their type. */
static char *numbers(int64_t count, fastattn_dtype dtype) {
    char *at = (char *)room(count);
    for (int64_t i = 0; i < count; i++) fa_put(at + i * fa_size_of(dtype), 0.75f + (float)(i * 7 % 64) / 128, dtype);
    return at;
}

static void prepare(struct block *x) {
    const int64_t size = fa_size_of(x->dtype), ld = x->rows, tiled = fa_round_up(x->dim, FA_TILE) + FA_TILE;
    const int64_t keys = x->keys + 2 * FA_TILE;
    char *const q = numbers(x->rows * x->dim, x->dtype), *const out = numbers(x->rows * x->dim, x->dtype);
    for (int r = 0; r < x->rows; r++) {
        x->rows_of[r] = q + r * x->dim * size;
        x->outputs[r] = out + r * x->dim * size;
    }
    x->k = x->v = fa_matrix_at(numbers(x->keys * x->dim, x->dtype), x->dim * size, x->dtype);
    x->v.at = numbers(x->keys * x->dim, x->dtype);
    const int as_stored = x->by->in_place && x->dtype == FASTATTN_FLOAT32;
    x->k_room = as_stored ? NULL : room(keys * tiled);
    x->v_room = as_stored ? NULL : room(keys * tiled);
    x->q = room(tiled * ld);
    x->s = room(keys * ld);
    x->next = room(keys * ld);
    x->p = x->by->in_place ? x->s : room(keys * ld);
    x->o = room(tiled * ld);
    x->m = room(ld);
    x->l = room(ld);
    x->alpha = room(ld);
    x->factor = room(ld);
    for (int r = 0; r < x->rows; r++) x->m[r] = 100, x->factor[r] = x->alpha[r] = 1;
}

static void run(struct block *x, int slot) {
    const fa_products *by = x->by;
    float *const l = by->sums ? NULL : x->l;
    switch (slot) {
    case PACK: by->pack(x->q, x->rows, x->rows_of, x->rows, x->dim, x->dtype, 1.0f); break;
    case UNPACK: x->by->unpack(x->outputs, x->rows, x->o, x->rows, x->factor, x->dim, x->dtype); break;
    case KEYS: x->keys_made = by->keys(x->k_room, x->k, x->keys, x->dim); break;
    case VALUES: x->values_made = by->values(x->v_room, x->v, x->keys, x->dim); break;
    case QK: by->qk(x->s, x->q, x->rows, x->rows, x->keys_made, 0, x->part, x->dim); break;
    case SOFTMAX: by->softmax(x->s, x->p, x->rows, x->rows, x->part, 0.01f, x->m, l, x->alpha); break;
    case BESIDE: {
        const fa_scores next = {x->next, x->q, x->rows, x->rows, x->keys_made, 0, x->part, x->dim};
        by->softmax_beside(x->s, x->p, x->rows, x->rows, x->part, 0.01f, x->m, l, x->alpha, &next);
        break;
    }
    case PV: by->pv(x->o, x->alpha, x->p, x->rows, x->rows, x->values_made, 0, x->keys, x->dim);
    }
}

static int ascending(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Medians of rounds in each of which every slot has its turn. */
static void measure(struct block *x, int rounds, double median[SLOTS]) {
    enum { MOST = 1000, TURNS = 20 };
    static double taken[SLOTS][MOST];
    if (rounds > MOST) rounds = MOST;
    for (int round = -1; round < rounds; round++) /* the first is not counted */
        for (int slot = 0; slot < SLOTS; slot++) {
            if (slot == BESIDE && !x->by->softmax_beside) continue;
            const double start = now();
            for (int turn = 0; turn < TURNS; turn++) run(x, slot);
            if (round >= 0) taken[slot][round] = (now() - start) / TURNS;
        }
    for (int slot = 0; slot < SLOTS; slot++) {
        qsort(taken[slot], (size_t)rounds, sizeof(double), ascending);
        median[slot] = taken[slot][rounds / 2];
    }
}

static void report(const fa_ukernel *uk, const fa_products *by, fastattn_dtype dtype, int64_t dim, int rounds) {
    static const char *const dtypes[] = {"float32", "float16", "bfloat16"};
    struct block x = {.uk = uk, .by = by, .dtype = dtype, .dim = dim, .rows = by->panel_rows, .keys = by->block_keys,
                      .part = by->score_keys};
    const double panel = 32.0 / x.rows, run_of_keys = 32.0 / (double)x.keys, scores = panel * 32.0 / (double)x.part;
    const double share[SLOTS] = {panel, panel, run_of_keys, run_of_keys, scores, scores, scores, panel * run_of_keys};
    double median[SLOTS];
    prepare(&x);
    if (by->enter) by->enter();
    measure(&x, rounds, median);
    if (by->leave) by->leave();
    printf("%-18s %-8s %5d", by->name, dtypes[dtype], (int)dim);
    for (int slot = 0; slot < SLOTS; slot++)
        if (slot == BESIDE && !by->softmax_beside) printf(" %8s", "-");
        else printf(" %8.0f", median[slot] * share[slot]);
    printf("\n");
    fflush(stdout);
}

int main(int argc, char **argv) {
    static const fastattn_isa isas[] = {FASTATTN_ISA_PORTABLE, FASTATTN_ISA_NEON, FASTATTN_ISA_AVX2, FASTATTN_ISA_AVX512,
                                        FASTATTN_ISA_AMX};
    static const struct { fastattn_dtype dtype; fastattn_precision precision; } kinds[] = {
        {FASTATTN_FLOAT32, FASTATTN_PRECISION_HIGHEST},  {FASTATTN_FLOAT32, FASTATTN_PRECISION_HIGH},
        {FASTATTN_FLOAT32, FASTATTN_PRECISION_MEDIUM},   {FASTATTN_FLOAT16, FASTATTN_PRECISION_HIGHEST},
        {FASTATTN_BFLOAT16, FASTATTN_PRECISION_HIGHEST}};
    const int rounds = argc > 1 ? atoi(argv[1]) : 0;
    if (rounds < 1 || argc < 3) return fprintf(stderr, "usage: %s ROUNDS HEAD_DIM ...\n", argv[0]), 2;
    printf("Medians of %d rounds, in %s: pack and unpack for 32 rows, keys and values for 32 keys, the rest for\n"
           "32 rows x 32 keys. \"+ qk\" is the softmax with the qk of other keys beside it.\n\n%-18s %-8s %5s", rounds, UNIT,
           "products", "storage", "dim");
    for (int slot = 0; slot < SLOTS; slot++) printf(" %8s", names[slot]);
    printf("\n");
    for (size_t i = 0; i < COUNT(isas); i++) {
        const fa_ukernel *uk = fastattn_ukernel_select(isas[i]);
        for (size_t n = 0; uk && n < COUNT(kinds); n++) {
            const fa_products *by = fastattn_products_select(isas[i], kinds[n].dtype, kinds[n].precision);
            const int again = by->isa != isas[i] || (kinds[n].precision != FASTATTN_PRECISION_HIGHEST && by == uk->products);
            for (int d = 2; d < argc && !again; d++) report(uk, by, kinds[n].dtype, atoi(argv[d]), rounds);
        }
    }
    return 0;
}
