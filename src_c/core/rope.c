/* fastattn_rope: rows are turned where they lie.
 *
 * A pass over the positions of a head reads as many cosines and sines as there are numbers in the head, so that heads which share them
 * are turned in bundles, in blocks of positions whose part of the tables stays in L2. Where the heads of a position lie side by side and
 * come from memory, they are turned one after the other: several places of a page at a time are slower to read than one (1.8 times,
 * of 16 MiB), and the angles come from L1 then. */
#include "../ukernel/storage.h"
#include "../ukernel/ukernel.h"
#include "check.h"
#include "ints.h"
#include "threads.h"

#include <stdlib.h>

enum {
    ITEM_BYTES = 128 << 10, /* of x or of the tables: what is worth an item of its own, and stays in L2 */
    NEAR_BYTES = 8 << 20    /* of x: what may stay in a cache between calls */
};

typedef struct fa_rope {
    const fastattn_rope_args *args;
    const fa_ukernel *uk;
    int by_heads;        /* what the kernel takes as rows are the heads of a position, not the positions of heads */
    int64_t bundle;      /* heads that it is given then, at most */
    int64_t heads, rows; /* of an item, at most */
    int64_t head_items, row_items;
} fa_rope;

static void rotate_item(const void *context, int64_t item, int worker) {
    const fa_rope *x = context;
    const fastattn_rope_args *a = x->args;
    const int64_t h0 = item % x->head_items * x->heads, i0 = item / x->head_items % x->row_items * x->rows;
    const int64_t b = item / x->head_items / x->row_items;
    const int64_t heads = fa_min(x->heads, a->num_heads - h0), rows = fa_min(x->rows, a->length - i0);
    const int axis = x->by_heads ? 1 : 2; /* along which the kernel's rows lie */
    fa_rotation r = {.x_head = a->x_strides[1],
                     .out_head = a->out_strides[1],
                     .x_row = a->x_strides[axis],
                     .out_row = a->out_strides[axis],
                     .cos_row = a->cos_strides[axis],
                     .sin_row = a->sin_strides[axis],
                     .rows = x->by_heads ? heads : rows,
                     .head_dim = a->head_dim,
                     .pairs = a->rotary_dim / 2,
                     .interleaved = a->interleaved,
                     .dtype = a->dtype};
    (void)worker;
    for (int64_t n = 0; n < (x->by_heads ? rows : heads); n += r.heads) {
        const int64_t h = h0 + (x->by_heads ? 0 : n), i = i0 + (x->by_heads ? n : 0);
        r.x = (const char *)a->x + b * a->x_strides[0] + h * a->x_strides[1] + i * a->x_strides[2];
        r.out = (char *)a->out + b * a->out_strides[0] + h * a->out_strides[1] + i * a->out_strides[2];
        r.cos = (const char *)a->cos + b * a->cos_strides[0] + h * a->cos_strides[1] + i * a->cos_strides[2];
        r.sin = (const char *)a->sin + b * a->sin_strides[0] + h * a->sin_strides[1] + i * a->sin_strides[2];
        r.heads = x->by_heads ? 1 : fa_min(x->bundle, heads - n);
        x->uk->rotate(&r);
    }
}

static fastattn_status check_rope(fastattn_rope_args *a) {
    const int64_t most = (int64_t)1 << 40; /* rows: bytes then have less than 63 bits */
    if (!fa_is_storage(a->dtype)) return FASTATTN_ERROR_DTYPE;
    if (!fastattn_threading_available(a->threading)) return FASTATTN_ERROR_THREADING;
    if (a->batch < 0 || a->num_heads < 0 || a->length < 0 || a->head_dim < 0 || a->rotary_dim < 0 || a->rotary_dim % 2 != 0 ||
        a->rotary_dim > a->head_dim || a->head_dim > FA_MOST_DIM || a->num_heads > most || a->length > most ||
        (a->length > 0 && a->num_heads > most / a->length) ||
        (a->length > 0 && a->num_heads > 0 && a->batch > most / (a->num_heads * a->length)))
        return FASTATTN_ERROR_SHAPE;
    const fa_table tables[] = {
        {a->x, a->x_strides, 3, {a->batch, a->num_heads, a->length}, a->head_dim, fa_size_of(a->dtype), 1, 0},
        {a->out, a->out_strides, 3, {a->batch, a->num_heads, a->length}, a->head_dim, fa_size_of(a->dtype), 1, 1},
        {a->cos, a->cos_strides, 3, {a->batch, a->num_heads, a->length}, a->rotary_dim / 2, 4, 1, 0},
        {a->sin, a->sin_strides, 3, {a->batch, a->num_heads, a->length}, a->rotary_dim / 2, 4, 1, 0},
    };
    for (size_t n = 0; n < sizeof tables / sizeof *tables; n++)
        if (fastattn_check_table(&tables[n]) != FASTATTN_OK) return FASTATTN_ERROR_ARGUMENT;
    for (int axis = 0; a->out == a->x && axis < 3; axis++)
        if (a->out_strides[axis] != a->x_strides[axis]) return FASTATTN_ERROR_ARGUMENT;
    return FASTATTN_OK;
}

fastattn_status fastattn_rope(const fastattn_rope_args *given) {
    if (!FA_HOLDS_ROPE) return FASTATTN_ERROR_LEFT_OUT;
    if (!given || given->size != sizeof *given) return FASTATTN_ERROR_ARGUMENT;
    fastattn_rope_args args = *given;
    const fastattn_status status = check_rope(&args);
    if (status != FASTATTN_OK) return status;
    fa_rope x = {.args = &args, .uk = fastattn_ukernel_select(args.isa)};
    if (!x.uk) return FASTATTN_ERROR_ISA;
    if (args.batch == 0 || args.num_heads == 0 || args.length == 0 || args.head_dim == 0) return FASTATTN_OK;
    const int64_t row_bytes = args.head_dim * fa_size_of(args.dtype), table_bytes = args.rotary_dim * 4;
    const int64_t bytes = args.batch * args.num_heads * args.length * row_bytes;

    const int64_t most_rows = ITEM_BYTES / fa_max(row_bytes, table_bytes);
    const int side_by_side = args.length == 1 || llabs(args.x_strides[1]) < llabs(args.x_strides[2]);
    const int shared = args.cos_strides[1] == 0 && args.sin_strides[1] == 0;
    x.by_heads = side_by_side && (!shared || bytes > NEAR_BYTES);
    x.heads = side_by_side ? args.num_heads : fa_min(args.num_heads, FA_ROTATED_HEADS);
    x.bundle = shared ? x.heads : 1;
    x.rows = fa_max(1, fa_min(args.length, side_by_side ? most_rows / x.heads : most_rows));
    x.head_items = fa_ceil_div(args.num_heads, x.heads);
    x.row_items = fa_ceil_div(args.length, x.rows);
    const fa_team team = {.threads = (int)fa_max(1, fa_min(args.num_threads, bytes / ITEM_BYTES)), .threading = args.threading};
    return fastattn_for_each(args.batch * x.row_items * x.head_items, &team, rotate_item, &x);
}
