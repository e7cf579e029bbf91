/* Tokens into a cache: each row of a projection is cast to the cache's dtype, once, and put where its slot says. */
#include "check.h"
#include "ints.h"
#include "threads.h"

#include "../ukernel/storage.h"
#include "../ukernel/ukernel.h"

#include <string.h>

enum {
    TOKENS_OF_AN_ITEM = 16,
    CHUNK = 256,              /* numbers between two 16-bit types at a time */
    NUMBERS_OF_A_THREAD = 1 << 17
};

typedef struct fa_store {
    const fastattn_store_args *args;
    const fa_ukernel *uk;
} fa_store;

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
    const fastattn_store_args *a = x->args;
    const int64_t end = fa_min((item + 1) * TOKENS_OF_AN_ITEM, a->batch * a->new_len);
    (void)worker;
    for (int64_t t = item * TOKENS_OF_AN_ITEM; t < end; t++) {
        if (a->slots[t] < 0) continue;
        const char *from = (const char *)a->from + t / a->new_len * a->from_strides[0] + t % a->new_len * a->from_strides[1];
        char *to = (char *)a->to + a->slots[t] / a->page_size * a->to_strides[0] + a->slots[t] % a->page_size * a->to_strides[1];
        for (int64_t h = 0; h < a->num_heads; h++)
            cast_row(x->uk, to + h * a->to_strides[2], a->to_dtype, from + h * a->from_strides[2], a->from_dtype, a->head_dim);
    }
}

static fastattn_status check_store(fastattn_store_args *a) {
    const int64_t most = (int64_t)1 << 40;
    if (!fa_is_storage(a->from_dtype) || !fa_is_storage(a->to_dtype)) return FASTATTN_ERROR_DTYPE;
    if (!fastattn_threading_available(a->threading)) return FASTATTN_ERROR_THREADING;
    if (a->batch < 0 || a->new_len < 0 || a->num_heads < 0 || a->head_dim < 0 || a->num_pages < 0 || a->page_size < 0 ||
        a->head_dim > FA_MOST_DIM || a->num_heads > most || (a->page_size > 0 && a->num_pages > most / a->page_size) ||
        (a->new_len > 0 && a->batch > most / a->new_len))
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

fastattn_status fastattn_store(const fastattn_store_args *given) {
    if (!given || given->size != sizeof *given) return FASTATTN_ERROR_ARGUMENT;
    fastattn_store_args args = *given;
    const fastattn_status status = check_store(&args);
    if (status != FASTATTN_OK) return status;
    const fa_store store = {&args, fastattn_ukernel_select(args.isa)};
    if (!store.uk) return FASTATTN_ERROR_ISA;
    const int64_t tokens = args.batch * args.new_len;
    if (args.num_heads == 0 || args.head_dim == 0) return FASTATTN_OK;
    const int64_t paying = tokens * args.num_heads * args.head_dim / NUMBERS_OF_A_THREAD;
    const fa_team team = {.threads = (int)fa_max(1, fa_min(args.num_threads, paying)), .threading = args.threading};
    return fastattn_for_each(fa_ceil_div(tokens, TOKENS_OF_AN_ITEM), &team, store_item, &store);
}
