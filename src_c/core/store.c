/* Tokens into a cache: each row of a projection is cast to the cache's dtype or quantised, once, and put where its slot says. What cannot
 * be quantised must be known before anything is written, so that such rows are gone through twice. */
#include "../cpu/atomic.h"
#include "check.h"
#include "ints.h"
#include "threads.h"

#include "../ukernel/quantised.h"
#include "../ukernel/storage.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

enum {
    TOKENS_OF_AN_ITEM = 16,
    CHUNK = 256, /* numbers between two 16-bit types at a time, at least */
    NUMBERS_OF_A_THREAD = 1 << 17
};

typedef struct fa_store {
    fastattn_store_args args;
    const fa_ukernel *uk;
    int trial;        /* nothing is written yet */
    int64_t *refused; /* there: becomes 1 where a number cannot be quantised */
} fa_store;

/* A row in float32, where it lies or in `wide`. */
static const float *wide_row(const fa_store *x, float *wide, const char *from) {
    if (x->args.from_dtype == FASTATTN_FLOAT32) return (const float *)(const void *)from;
    x->uk->widen(wide, fa_matrix_at(from, 0, x->args.from_dtype), 1, x->args.head_dim);
    return wide;
}

/* Whether a row can be quantised: where it has a number of 7 times 65520 or more, the scale of int4 is infinite. Numbers below 4096 become
 * numbers below FA_MOST_QUANTISED**0.5 times as large when they are turned, and need not be turned to find out. */
static int row_fits(const fa_store *x, const char *from) {
    const fastattn_store_args *a = &x->args;
    const int64_t n = a->head_dim;
    float wide[FA_MOST_QUANTISED];
    const float *row = wide_row(x, wide, from);
    if (x->uk->quantised->within(row, n, 4096.0f)) return 1;
    if (a->rotate) x->uk->quantised->hadamard(wide, row, n);
    return x->uk->quantised->within(a->rotate ? wide : row, n, a->to_dtype == FASTATTN_INT4 ? 7.0f * 65520.0f : INFINITY);
}

/* A row that fits, turned, and what it is quantised to. */
static void make_row(const fa_store *x, char *to, const char *from) {
    const fastattn_store_args *a = &x->args;
    const int64_t n = a->head_dim;
    float wide[FA_MOST_QUANTISED];
    const float *row = wide_row(x, wide, from);
    if (a->rotate) {
        x->uk->quantised->hadamard(wide, row, n);
        row = wide;
    }
    if (fa_is_quantised(a->to_dtype)) x->uk->quantised->quantise(to, row, n, a->to_dtype);
    else x->uk->narrow(to, row, 1.0f, n, a->to_dtype);
}

/* n numbers from one storage type to another. */
static void cast_row(const fa_ukernel *uk, char *to, fastattn_dtype to_dtype, const char *from, fastattn_dtype from_dtype, int64_t n) {
    const int64_t to_size = fa_size_of(to_dtype), from_size = fa_size_of(from_dtype);
    if (to_dtype == from_dtype) {
        memcpy(to, from, (size_t)(n * to_size));
        return;
    }
    if (from_dtype == FASTATTN_FLOAT32) {
        uk->narrow(to, (const float *)(const void *)from, 1.0f, n, to_dtype);
        return;
    }
    for (int64_t d = 0; d < n; d += CHUNK) {
        const int64_t count = fa_min(CHUNK, n - d);
        const fa_matrix row = fa_matrix_at(from + d * from_size, 0, from_dtype);
        float wide[CHUNK];
        float *const direct = (float *)(void *)(to + d * to_size);
        uk->widen(to_dtype == FASTATTN_FLOAT32 ? direct : wide, row, 1, count);
        if (to_dtype != FASTATTN_FLOAT32) uk->narrow(direct, wide, 1.0f, count, to_dtype);
    }
}

static void store_item(const void *context, int64_t item, int worker) {
    const fa_store *x = context;
    const fastattn_store_args *a = &x->args;
    const int made = a->rotate || fa_is_quantised(a->to_dtype);
    int refused = 0;
    const int64_t end = fa_min((item + 1) * TOKENS_OF_AN_ITEM, a->batch * a->new_len);
    (void)worker;
    for (int64_t t = item * TOKENS_OF_AN_ITEM; t < end; t++) {
        if (a->slots[t] < 0) continue;
        const char *from = (const char *)a->from + t / a->new_len * a->from_strides[0] + t % a->new_len * a->from_strides[1];
        char *const to = (char *)a->to + a->slots[t] / a->page_size * a->to_strides[0] + a->slots[t] % a->page_size * a->to_strides[1];
        for (int64_t h = 0; h < a->num_heads; h++) {
            char *const row = to + h * a->to_strides[2];
            if (x->trial) refused |= !row_fits(x, from + h * a->from_strides[2]);
            else if (made) make_row(x, row, from + h * a->from_strides[2]);
            else cast_row(x->uk, row, a->to_dtype, from + h * a->from_strides[2], a->from_dtype, a->head_dim);
        }
    }
    if (x->trial && refused) fa_atomic_store(x->refused, 1);
}

static fastattn_status check_store(fastattn_store_args *a) {
    const int64_t most = (int64_t)1 << 40, most_dim = a->rotate || fa_is_quantised(a->to_dtype) ? FA_MOST_QUANTISED : FA_MOST_DIM;
    if (!fa_is_storage(a->from_dtype) || !fa_is_cached(a->to_dtype)) return FASTATTN_ERROR_DTYPE;
    if (a->rotate && !FA_HOLDS_QUANTISED) return FASTATTN_ERROR_LEFT_OUT;
    if (!fastattn_threading_available(a->threading)) return FASTATTN_ERROR_THREADING;
    if (a->batch < 0 || a->new_len < 0 || a->num_heads < 0 || a->head_dim < 0 || a->num_pages < 0 || a->page_size < 0 ||
        a->head_dim > most_dim || a->num_heads > most || (a->page_size > 0 && a->num_pages > most / a->page_size) ||
        (a->new_len > 0 && a->batch > most / a->new_len) || (a->to_dtype == FASTATTN_INT4 && a->head_dim % FA_GROUP != 0))
        return FASTATTN_ERROR_SHAPE;
    const int64_t tokens = a->batch * a->new_len, slots = a->num_pages * a->page_size;
    const fa_table tables[] = {
        {a->from, a->from_strides, 3, {a->batch, a->new_len, a->num_heads}, a->head_dim, fa_size_of(a->from_dtype), 1, 0},
        {a->to, a->to_strides, 3, {a->num_pages, a->page_size, a->num_heads}, a->head_dim, fa_size_of(a->to_dtype), 1, 1},
        {a->slots, NULL, 0, {0}, tokens, sizeof *a->slots, 1, 0},
    };
    for (size_t n = 0; n < sizeof tables / sizeof *tables; n++)
        if (fastattn_check_table(&tables[n]) != FASTATTN_OK) return FASTATTN_ERROR_ARGUMENT;
    for (int64_t t = 0; t < tokens; t++)
        if (a->slots[t] < -1 || a->slots[t] >= slots) return FASTATTN_ERROR_SLOT;
    return FASTATTN_OK;
}

static fastattn_status run_store(const fa_store *x) {
    const fastattn_store_args *a = &x->args;
    const int64_t tokens = a->batch * a->new_len;
    if (a->num_heads == 0 || a->head_dim == 0) return FASTATTN_OK;
    const int64_t paying = tokens * a->num_heads * a->head_dim / NUMBERS_OF_A_THREAD;
    const fa_team team = {.threads = (int)fa_max(1, fa_min(a->num_threads, paying)), .threading = a->threading};
    return fastattn_for_each(fa_ceil_div(tokens, TOKENS_OF_AN_ITEM), &team, store_item, x);
}

/* What a caller has that was compiled before rows could be turned. */
enum { FIRST_STORE = FA_END_OF(fastattn_store_args, threading) };
static const fastattn_store_args absent = {0};

/* All that can be wrong with one of the stores. */
static fastattn_status prepare(fa_store *x, const fastattn_store_args *given) {
    fastattn_status status = fastattn_take_struct(&x->args, given, FIRST_STORE, &absent, sizeof absent);
    if (status == FASTATTN_OK) status = check_store(&x->args);
    if (status != FASTATTN_OK) return status;
    x->uk = fastattn_ukernel_select(x->args.isa);
    if (!x->uk) return FASTATTN_ERROR_ISA;
    int64_t refused = 0;
    x->refused = &refused;
    x->trial = fa_is_quantised(x->args.to_dtype);
    if (x->trial) status = run_store(x);
    x->trial = 0;
    return status != FASTATTN_OK || !refused ? status : FASTATTN_ERROR_NOT_FINITE;
}

fastattn_status fastattn_store(const fastattn_store_args *given) {
    fa_store first, second;
    if (!given) return FASTATTN_ERROR_ARGUMENT;
    fastattn_status status = prepare(&first, given);
    if (status != FASTATTN_OK) return status;
    const int both = first.args.also != NULL;
    if (both) status = prepare(&second, first.args.also);
    if (both && status == FASTATTN_OK && second.args.also) status = FASTATTN_ERROR_ARGUMENT;
    if (status == FASTATTN_OK) status = run_store(&first);
    return both && status == FASTATTN_OK ? run_store(&second) : status;
}
