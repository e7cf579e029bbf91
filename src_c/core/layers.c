/* fastattn_normalize and fastattn_pointwise: rows, each by itself, shared among threads in runs of about as many bytes as L1 holds. */
#include "layers.h"
#include "check.h"
#include "ints.h"
#include "threads.h"

#ifdef FASTATTN_LAYERS

enum { ITEM_BYTES = 32 << 10 };

/* The table that goes with that of attention under the same limit; null where there is none. */
static const fa_layers *select_layers(fastattn_isa limit) {
    const fa_ukernel *uk = fastattn_ukernel_select(limit);
    if (!uk) return NULL;
    switch (uk->products->isa) {
#ifdef FA_HOLDS_AVX2
    case FASTATTN_ISA_AVX2: return &fastattn_layers_avx2;
#endif
#ifdef FA_HOLDS_AVX512
    case FASTATTN_ISA_AVX512: return &fastattn_layers_avx512;
#endif
#ifdef FA_HOLDS_NEON
    case FASTATTN_ISA_NEON: return &fastattn_layers_neon;
#endif
#ifdef FA_HOLDS_WASM
    case FASTATTN_ISA_WASM: return &fastattn_layers_wasm;
#endif
#ifdef FA_HOLDS_PORTABLE
    case FASTATTN_ISA_PORTABLE: return &fastattn_layers_portable;
#endif
    default: return NULL;
    }
}

/* Rows that have an item's bytes, and the threads that so many items are worth. */
static int64_t rows_of_item(int64_t width) { return fa_max(1, ITEM_BYTES / (4 * width)); }
static fa_team team_of(int64_t items, int threads, fastattn_threading threading) {
    return (fa_team){.threads = (int)fa_max(1, fa_min(threads, items / 2)), .threading = threading};
}

static int too_many(int64_t a, int64_t b) {
    const int64_t most = (int64_t)1 << 40; /* rows: bytes then have less than 63 bits */
    return a < 0 || b < 0 || a > most || b > most || (b > 0 && a > most / b);
}

typedef struct norm_call {
    const fastattn_norm_args *args;
    const fa_layers *kernels;
    int64_t rows; /* of an item */
} norm_call;

static float *at(const void *base, const int64_t strides[2], int64_t i, int64_t j) {
    return base ? (float *)((uintptr_t)base + (uintptr_t)(i * strides[0] + j * strides[1])) : NULL;
}

static void normalize_item(const void *context, int64_t item, int worker) {
    const norm_call *call = context;
    const fastattn_norm_args *a = call->args;
    const int64_t end = fa_min((item + 1) * call->rows, a->outer * a->inner);
    fa_norm row = {.weight = a->weight, .bias = a->bias, .add_bias = a->add_bias, .n = a->width, .eps = a->eps, .centred = a->centred};
    (void)worker;
    for (int64_t n = item * call->rows; n < end; n++) {
        const int64_t i = n / a->inner, j = n % a->inner;
        row.x = at(a->x, a->x_strides, i, j), row.add = at(a->add, a->add_strides, i, j);
        row.sum = at(a->sum, a->sum_strides, i, j), row.out = at(a->out, a->out_strides, i, j);
        call->kernels->normalize(&row);
    }
}

fastattn_status fastattn_normalize(const fastattn_norm_args *given) {
    if (!given || given->size != sizeof *given) return FASTATTN_ERROR_ARGUMENT;
    fastattn_norm_args a = *given;
    if (!fastattn_threading_available(a.threading)) return FASTATTN_ERROR_THREADING;
    if (too_many(a.outer, a.inner) || a.width < 0 || a.width > FA_MOST_DIM) return FASTATTN_ERROR_SHAPE;
    const int64_t rows = a.outer * a.inner, vector = rows > 0 ? a.width : 0;
    const fa_table tables[] = {
        {a.x, a.x_strides, 2, {a.outer, a.inner}, a.width, 4, 1, 0},
        {a.add, a.add_strides, 2, {a.outer, a.inner}, a.width, 4, 0, 0},
        {a.sum, a.sum_strides, 2, {a.outer, a.inner}, a.width, 4, 0, 1},
        {a.out, a.out_strides, 2, {a.outer, a.inner}, a.width, 4, 1, 1},
        {a.weight, NULL, 0, {0}, vector, 4, 1, 0},
        {a.bias, NULL, 0, {0}, vector, 4, 0, 0},
        {a.add_bias, NULL, 0, {0}, vector, 4, 0, 0},
    };
    for (size_t n = 0; n < sizeof tables / sizeof *tables; n++)
        if (fastattn_check_table(&tables[n]) != FASTATTN_OK) return FASTATTN_ERROR_ARGUMENT;
    if (!a.add && (a.sum || a.add_bias)) return FASTATTN_ERROR_ARGUMENT;
    const norm_call call = {.args = &a, .kernels = select_layers(a.isa), .rows = rows_of_item(fa_max(1, a.width))};
    if (!call.kernels) return FASTATTN_ERROR_ISA;
    if (rows == 0 || a.width == 0) return FASTATTN_OK;
    const int64_t items = fa_ceil_div(rows, call.rows);
    const fa_team team = team_of(items, a.num_threads, a.threading);
    return fastattn_for_each(items, &team, normalize_item, &call);
}

typedef struct pointwise_call {
    const fastattn_pointwise_args *args;
    const fa_layers *kernels;
    int64_t rows, pieces, width; /* of an item: rows, or, where there are few, a piece of one */
} pointwise_call;

static void pointwise_item(const void *context, int64_t item, int worker) {
    const pointwise_call *call = context;
    const fastattn_pointwise_args *a = call->args;
    const int64_t first = item / call->pieces * call->rows, end = fa_min(first + call->rows, a->rows);
    const int64_t from = item % call->pieces * call->width;
    fa_pointwise row = {.n = fa_min(call->width, a->width - from),
                        .kind = a->kind,
                        .bias = a->bias ? a->bias + from : NULL,
                        .factor_bias = a->bias && a->gated ? a->bias + a->width + from : NULL};
    (void)worker;
    for (int64_t i = first; i < end; i++) {
        row.x = (const float *)((const char *)a->x + i * a->x_stride) + from;
        row.factor = a->gated ? row.x + a->width : NULL;
        row.out = (float *)((char *)a->out + i * a->out_stride) + from;
        call->kernels->pointwise(&row);
    }
}

fastattn_status fastattn_pointwise(const fastattn_pointwise_args *given) {
    if (!given || given->size != sizeof *given) return FASTATTN_ERROR_ARGUMENT;
    fastattn_pointwise_args a = *given;
    if (!fastattn_threading_available(a.threading)) return FASTATTN_ERROR_THREADING;
    if (a.kind < FASTATTN_POINTWISE_GELU || a.kind > FASTATTN_POINTWISE_RELU) return FASTATTN_ERROR_ARGUMENT;
    if (too_many(a.rows, 1) || a.width < 0 || a.width > FA_MOST_DIM) return FASTATTN_ERROR_SHAPE;
    const int64_t both = a.gated ? 2 * a.width : a.width;
    const fa_table tables[] = {
        {a.x, &a.x_stride, 1, {a.rows}, both, 4, 1, 0},
        {a.out, &a.out_stride, 1, {a.rows}, a.width, 4, 1, 1},
        {a.bias, NULL, 0, {0}, a.rows > 0 ? both : 0, 4, 0, 0},
    };
    for (size_t n = 0; n < sizeof tables / sizeof *tables; n++)
        if (fastattn_check_table(&tables[n]) != FASTATTN_OK) return FASTATTN_ERROR_ARGUMENT;
    pointwise_call call = {.args = &a, .kernels = select_layers(a.isa)};
    if (!call.kernels) return FASTATTN_ERROR_ISA;
    if (a.rows == 0 || a.width == 0) return FASTATTN_OK;
    call.rows = rows_of_item(a.width);
    call.width = fa_min(a.width, ITEM_BYTES / 4);
    call.pieces = fa_ceil_div(a.width, call.width);
    const int64_t items = fa_ceil_div(a.rows, call.rows) * call.pieces;
    const fa_team team = team_of(items, a.num_threads, a.threading);
    return fastattn_for_each(items, &team, pointwise_item, &call);
}

#endif
