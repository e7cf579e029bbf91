#include "operands.h"

#include "../ukernel/quantised.h"
#include "../ukernel/storage.h"
#include "ints.h"
#include "nonfinite.h"

/* Whether a head is one panel and one run of keys, so that the head beside comes next. */
static int is_short(const fa_shape *shape) { return shape->rows.panels == 1 && shape->kv_len <= shape->block_keys; }

/* Next are the same keys of the head beside, or after the last one those that follow of the first, if any do. Heads that are rows of one
 * panel are read in the order of memory, of which little is asked ahead: rows a power of two apart share a few places of a cache. */
static void look_ahead(fa_matrix *rows, const fa_run *run, const fa_shape *shape, int64_t head_stride) {
    enum { NEXT_KEYS = 16 };
    const int64_t block_keys = shape->block_keys;
    const int last = run->abreast_after == 0 && !is_short(shape);
    rows->ahead = last ? -run->abreast_before * head_stride : head_stride;
    const int64_t keys = rows->beside ? fa_min(NEXT_KEYS, block_keys) : rows->rows ? block_keys : run->keys;
    rows->rows_ahead = last ? keys : 0;
    if (last && !rows->rows) rows->ahead = (int64_t)((uint64_t)keys * (uint64_t)rows->stride + (uint64_t)rows->ahead);
}

/* The rows of the head beside, which lie all as far from those of this one. */
static fa_matrix rows_beside(fa_matrix rows, int64_t head_stride) {
    if (rows.rows) rows.column += head_stride;
    else rows.at += head_stride;
    return rows;
}

/* Whether the head before has come to the same run. Its pointers stay what they are until all heads have left that. */
static int goes_beside(const fa_run *run) { return run->abreast_before > 0 && run[-1].first == run->first && run[-1].keys == run->keys; }

fa_run *fastattn_run_of(fa_work *w, const fa_key_block *block) {
    const fa_call *call = w->call;
    fa_run *run = w->run;
    if (run->first == block->run_first && run->keys == block->run_keys) return run;
    const fa_shape *shape = &w->panel.entry->shape;
    const int64_t block_keys = shape->block_keys, beside = call->heads.beside;
    const int follows = run->keys == block_keys && block->run_first == run->first + run->keys;
    run->first = block->run_first;
    run->keys = block->run_keys;
    if (FA_UNLIKELY(goes_beside(run))) {
        run->stored_k = rows_beside(run[-1].stored_k, call->args->k_strides[1]);
        run->stored_v = rows_beside(run[-1].stored_v, call->args->v_strides[1]);
    } else fastattn_panel_keys_and_values(&run->stored_k, &run->stored_v, call, &w->panel, run->first, follows, run->k_rows, run->v_rows);
    look_ahead(&run->stored_k, run, shape, call->args->k_strides[1] * beside);
    look_ahead(&run->stored_v, run, shape, call->args->v_strides[1] * beside);
    run->finite_k = run->finite_v = -1;
    run->widened = 0;
    for (int way = 0; way < FA_WAYS; way++) run->ways[way].made = 0;
    return run;
}

void fastattn_source_of(fa_work *w, fa_operands *x) {
    const fastattn_attention_args *a = w->call->args;
    fa_run *run = w->run;
    const int widens = w->call->stored.quantised && (w->panel.way != FA_FEW || w->call->stored.widened);
    x->source_k = widens ? &run->widened_k : &run->stored_k;
    x->source_v = widens ? &run->widened_v : &run->stored_v;
    if (FA_LIKELY(!widens) || run->widened) return;
    w->call->uk->quantised->widen(run->wide_k, run->stored_k, run->keys, a->head_dim);
    w->call->uk->quantised->widen(run->wide_v, run->stored_v, run->keys, a->v_head_dim);
    run->widened_k = fa_matrix_at((const char *)run->wide_k, a->head_dim * (int64_t)sizeof(float), FASTATTN_FLOAT32);
    run->widened_v = fa_matrix_at((const char *)run->wide_v, a->v_head_dim * (int64_t)sizeof(float), FASTATTN_FLOAT32);
    run->widened = 1;
}

int fastattn_all_finite(const fa_call *call, int *known, fa_matrix rows, int64_t keys, int64_t dim) {
    if (*known < 0) *known = (fa_is_quantised(rows.dtype) ? call->uk->quantised->finite : call->uk->finite)(rows, keys, dim);
    return *known;
}

/* The panel of queries as these products want it; of additive scores with their weights, which take the sign. */
static void pack_queries(fa_work *w, const fa_products *products, float *q) {
    const fa_call *call = w->call;
    const fastattn_attention_args *a = call->args;
    fastattn_panel_queries(call, &w->panel);
    const void *const *rows_of = w->panel.rows_of;
    if (FA_LIKELY(!a->additive)) {
        products->pack(q, w->panel.ld, rows_of, w->panel.padded, a->head_dim, a->q_dtype, call->scoring.sign);
        return;
    }
    const void *weights_of[FA_PANEL_ROWS];
    for (int r = 0; r < w->panel.padded; r++) weights_of[r] = (const char *)a->additive + w->panel.head_of[r] * a->additive_stride;
    const int64_t of_row = fa_row_of_numbers(products, call->panel_dim);
    const int64_t behind = fa_sums_row(a->head_dim) * fa_number_of_numbers(products, w->panel.ld);
    for (int r = 0, step = products->by_rows ? 1 : w->panel.padded; r < w->panel.padded; r += step) {
        products->pack(q + r * of_row, w->panel.ld, rows_of + r, step, a->head_dim, a->q_dtype, 1.0f);
        products->pack(q + r * of_row + behind, w->panel.ld, weights_of + r, step, a->head_dim, FASTATTN_FLOAT32, call->scoring.sign);
    }
}

/* Sees to it that there is all that the products of this way want of queries, keys and values. */
static void prepare(fa_work *w, fa_operands *x, int way, int64_t block_keys) {
    const fa_call *call = w->call;
    const fastattn_attention_args *a = call->args;
    fa_run *run = w->run;
    fa_way *by = &run->ways[way];
    if (!w->packed[way]) {
        pack_queries(w, by->products, w->q[way]);
        w->packed[way] = 1;
    }
    x->products = by->products;
    x->q = w->q[way];
    const int as_stored = !by->k_room && !x->careful;
    x->k = as_stored ? x->source_k : &by->k;
    x->v = as_stored ? x->source_v : &by->v;
    if (FA_UNLIKELY(x->careful)) { /* for this panel alone */
        x->skip = 0;
        by->made = 0;
        by->k = by->products->keys(by->k_room, fa_stored_k(x), block_keys, a->head_dim);
        by->v = by->products->values(by->v_room, fastattn_finite_values(w, fa_stored_v(x), block_keys), block_keys, a->v_head_dim);
        return;
    }
    x->skip = x->before;
    if (as_stored || by->made) return;
    by->k = by->products->keys(by->k_room, *x->source_k, run->keys, a->head_dim);
    const int for_both = call->stored.v_in_k && by->products->values == by->products->keys;
    by->v = for_both ? by->k : by->products->values(by->v_room, *x->source_v, run->keys, a->v_head_dim);
    by->made = 1;
}

/* A power that is 0 to products must still meet an infinity; and where run after run does not fit them, the rest of the panel is
 * not tried. */
void fastattn_choose_operands(fa_work *w, fa_operands *x, const fa_key_block *block) {
    enum { TRIALS = 4 };
    const fa_products *products = w->panel.products;
    if (!products->fits || (!x->careful && w->misfits < TRIALS)) {
        prepare(w, x, w->panel.way, block->keys);
        const int fits = !products->fits || products->fits(x->q, w->panel.ld, *x->k, w->run->keys, *x->v, w->call->args->scale);
        w->misfits = fits ? 0 : w->misfits + 1;
        if (fits) return;
    }
    prepare(w, x, FA_EXACT, block->keys);
}

/* Rows that follow each other are one. */
static void fetch(const fa_call *call, fa_matrix rows, int64_t count, int64_t bytes) {
    const int together = !rows.rows && rows.stride == bytes;
    if (bytes > 0 && count > 0) call->uk->fetch(rows, together ? 1 : count, together ? count * bytes : bytes); /* else it may be null */
}

/* The queries of the heads beside those of the panel; behind the last head there may be none. */
static void fetch_next_queries(const fa_call *call, const fa_panel *p) {
    enum { FORESEEN = 2048 }; /* bytes of a head, which the processor reads ahead by itself */
    const fastattn_attention_args *a = call->args;
    const int64_t bytes = a->head_dim * fa_size_of(a->q_dtype), q_len = p->entry->shape.q_len;
    if (q_len * bytes < FORESEEN) return;
    const uintptr_t first = (uintptr_t)a->q + (uintptr_t)(p->entry->batch * a->q_strides[0] + p->entry->query * a->q_strides[2]);
    for (int64_t h = p->head + call->heads.group; h < p->head + 2 * call->heads.group; h++) {
        const char *at = (const char *)(first + (uintptr_t)h * (uintptr_t)a->q_strides[1]);
        fetch(call, fa_matrix_at(at, a->q_strides[2], a->q_dtype), q_len, bytes);
    }
}

/* With one vector of rows, or one panel and rows apart, the loop waits for memory, and the columns in which pv walks through V hide
 * from the hardware what comes next: ask for this block's values, and for as many keys after it. (What is widened is read in
 * order anyway, and products by rows look ahead themselves.) Where a block is a whole head, what comes next is the head beside. */
void fastattn_fetch_ahead(const fa_work *w, const fa_operands *x, const fa_key_block *block) {
    const fastattn_attention_args *a = w->call->args;
    const fa_shape *shape = &w->panel.entry->shape;
    const int next_head = is_short(shape);
    if (next_head) fetch_next_queries(w->call, &w->panel);
    const int waits = next_head || w->panel.padded <= FA_ROW_STEP || (w->call->stored.apart && shape->rows.panels == 1);
    if (w->panel.products->by_rows || !waits || a->kv_dtype != FASTATTN_FLOAT32) return;
    const int64_t after = w->panel.end_key - block->first - block->keys, size = fa_size_of(a->kv_dtype);
    const fa_matrix k = fa_stored_k(x);
    fa_matrix next_k = fa_rows_from(k, block->keys);
    if (next_head && !next_k.rows) next_k.at = (const char *)((uintptr_t)k.at + (uintptr_t)k.ahead);
    fetch(w->call, fa_stored_v(x), block->keys, a->v_head_dim * size);
    fetch(w->call, next_k, next_head ? block->keys : fa_min(block->keys, after), a->head_dim * size);
}
