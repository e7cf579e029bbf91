#include "panel.h"

#include "ints.h"

#include <string.h>

static void *take(char **memory, int64_t count, size_t size) {
    void *at = *memory;
    *memory += (size_t)count * size;
    return at;
}

/* lo <= key < hi for the keys that query i may see by its position. */
static void visible_keys(const fastattn_attention_args *a, int64_t position, int64_t length, int64_t *lo, int64_t *hi) {
    int64_t begin = 0, end = length;
    if (a->causal) end = fa_min(end, position + 1);
    if (FA_UNLIKELY(a->window_right >= 0)) end = fa_min(end, position + fa_reach(a->window_right) + 1);
    if (FA_UNLIKELY(a->window_left >= 0)) begin = fa_max(begin, position - fa_reach(a->window_left));
    *lo = fa_min(begin, length);
    *hi = fa_max(end, 0);
}

size_t fastattn_panel_bytes(int ld) { return (size_t)ld * (4 * sizeof(int64_t) + 2 * sizeof(void *) + 8 * sizeof(float)); }

void fastattn_panel_of(fa_panel *p, const fa_call *call, const fa_entry *entry, int64_t panel, int64_t part, char *memory) {
    const fastattn_attention_args *a = call->args;
    const fa_shape *shape = &entry->shape;
    const fa_rows *rows = &shape->rows;
    const int ld = rows->ld;

    const int64_t sequence = fa_divide(panel, rows->panels);
    panel -= sequence * rows->panels;
    if (a->causal) panel = rows->panels - 1 - panel; /* the longest first: the last to finish is then short */
    p->entry = entry;
    p->head = sequence * call->heads.group;
    p->kv_head = fa_divide(p->head, call->heads.a_kv_head);

    const int64_t segment = fa_divide(panel, rows->panels_a_segment);
    const int64_t segment_end = fa_min(rows->count, (segment + 1) * rows->segment);
    p->first_row = segment * rows->segment + (panel - segment * rows->panels_a_segment) * rows->panel_rows;
    p->rows = (int)fa_min(rows->panel_rows, segment_end - p->first_row);
    p->way = fastattn_way_of(shape, p->rows);
    p->products = fastattn_ways(call, shape).of[p->way];
    p->padded = p->products->by_rows ? p->rows : (int)fa_round_up(p->rows, FA_ROW_STEP);
    p->ld = p->products->by_rows ? (int)fa_round_up(shape->block_keys, FA_ROW_STEP) : ld;

    p->first_key = part * shape->split_keys;
    p->end_key = fa_min(p->first_key + shape->split_keys, shape->kv_len);

    p->query = take(&memory, ld, sizeof *p->query);
    p->head_of = take(&memory, ld, sizeof *p->head_of);
    p->begin = take(&memory, ld, sizeof *p->begin);
    p->end = take(&memory, ld, sizeof *p->end);
    p->rows_of = take(&memory, ld, sizeof *p->rows_of);
    p->outputs = take(&memory, ld, sizeof *p->outputs);
    p->slopes = take(&memory, ld, sizeof(float));
    p->offset_of = take(&memory, ld, sizeof(float));
    p->begin_of = take(&memory, ld, sizeof(float));
    p->end_of = take(&memory, ld, sizeof(float));
    p->alpha = take(&memory, ld, sizeof(float));
    p->fade = take(&memory, ld, sizeof(float));
    p->base = take(&memory, ld, sizeof(float));
    p->rise = take(&memory, ld, sizeof(float));

    char *out = (char *)a->out + entry->batch * a->out_strides[0] + entry->query * a->out_strides[2];
    int64_t i = fa_divide(p->first_row, call->heads.group), h = p->head + p->first_row - i * call->heads.group;
    for (int r = 0; r < p->rows; r++) {
        p->query[r] = i;
        p->head_of[r] = h;
        visible_keys(a, i + entry->offset, entry->keys, &p->begin[r], &p->end[r]);
        p->outputs[r] = out + h * a->out_strides[1] + i * a->out_strides[2];
        if (FA_UNLIKELY(a->alibi_slopes))
            p->slopes[r] = *(const float *)((const char *)a->alibi_slopes + entry->batch * a->alibi_strides[0] + h * a->alibi_strides[1]);
        if (++h == p->head + call->heads.group) h = p->head, i++;
    }
    p->list = (fa_key_list){.at = NULL};
    if (FA_HOLDS_SPARSE && FA_UNLIKELY(a->indices)) {
        const char *list = fa_list_at(a, entry->batch, p->kv_head, entry->query + p->query[0]);
        p->list = (fa_key_list){list, a->indices_size, entry->start, p->begin[0], p->end[0]};
        for (int r = 0; r < p->rows; r++) p->begin[r] = 0, p->end[r] = shape->kv_len;
    }
    for (int r = p->rows, last = p->rows - 1; r < p->padded; r++) {
        p->query[r] = p->query[last];
        p->head_of[r] = p->head_of[last];
        p->begin[r] = p->begin[last];
        p->end[r] = p->end[last];
        p->outputs[r] = p->outputs[last];
        if (a->alibi_slopes) p->slopes[r] = p->slopes[last];
    }
}

/* rows_of becomes pointers to rows at these strides. */
static void point_at(fa_panel *p, const char *base, int64_t head_stride, int64_t row_stride) {
    for (int r = 0; r < p->rows; r++) p->rows_of[r] = base + p->head_of[r] * head_stride + p->query[r] * row_stride;
    for (int r = p->rows; r < p->padded; r++) p->rows_of[r] = p->rows_of[p->rows - 1];
}

void fastattn_panel_queries(const fa_call *call, fa_panel *p) {
    const fastattn_attention_args *a = call->args;
    const char *q = (const char *)a->q + p->entry->batch * a->q_strides[0] + p->entry->query * a->q_strides[2];
    point_at(p, q, a->q_strides[1], a->q_strides[2]);
}

void fastattn_panel_mask(const fa_call *call, fa_panel *p, int64_t key) {
    const fastattn_attention_args *a = call->args;
    const char *mask = (const char *)a->mask + p->entry->batch * a->mask_strides[0] + p->entry->query * a->mask_strides[2] +
                       (p->entry->start + key) * a->mask_strides[3];
    point_at(p, mask, a->mask_strides[1], a->mask_strides[2]);
}

/* Whether the pages from one to another lie one after the other. */
static int pages_follow(const int32_t *table, int64_t page, int64_t last) {
    while (page < last && table[page + 1] == table[page] + 1) page++;
    return page == last;
}

/* The power of 2 that is the number of rows which share a pointer, from a key on: they are in one page. */
static int shift_of_pages(int64_t page_size, int64_t key) {
    int shift = 0;
    while (2 << shift <= FA_SUM_RUN && ((page_size | key) >> shift & 1) == 0) shift++;
    return shift;
}

void fastattn_paged_rows(fa_matrix *rows, const fa_pages *pages, int64_t key, int64_t end, int64_t run_keys, int follows,
                         const char **pointers) {
    const int32_t *table = pages->table;
    const int64_t size = pages->size, wanted = fastattn_row_pointers(run_keys), count = fa_min(wanted, end - key);
    const int64_t first_page = key / size, last_page = (key + count - 1) / size;
    const int adjacent = size == 1 || pages->stride == size * pages->head.stride, known = follows && rows->rows == pointers;
    const int64_t checked = follows && !rows->rows ? fa_min((key + run_keys - 1) / size, last_page) : first_page; /* so far they follow */
    *rows = pages->head;
    if (size == 1) rows->stride = pages->stride;
    if (first_page == last_page || (adjacent && pages_follow(table, checked, last_page))) {
        rows->at += table[first_page] * pages->stride + key % size * rows->stride;
        return;
    }
    if (size == 1) rows->stride = 0;
    rows->rows = pointers;
    rows->shift = shift_of_pages(size, key);
    const uintptr_t head = (uintptr_t)rows->at, stride = (uintptr_t)rows->stride;
    const int64_t step = (int64_t)1 << rows->shift;
    int64_t n = 0;
    for (; known && n < wanted - run_keys; n += step)
        pointers[n >> rows->shift] = (const char *)((uintptr_t)pointers[(n + run_keys) >> rows->shift] + (uintptr_t)run_keys * stride);
    for (int64_t page = (key + n) / size; n < count; page++) {
        const uintptr_t at = head + (uintptr_t)(table[page] * pages->stride) + (uintptr_t)(key - page * size) * stride;
        for (const int64_t last = fa_min((page + 1) * size - key, count); n < last; n += step)
            pointers[n >> rows->shift] = (const char *)at;
    }
    for (; n < wanted; n += step) pointers[n >> rows->shift] = pointers[(n >> rows->shift) - 1];
}

/* The same of listed keys from a place on, in pages or not; where there is none, and beyond the list, it is the entry's first. */
static void find_listed_rows(const fa_call *call, const fa_panel *p, int64_t place, int64_t known, const char **k_rows,
                             const char **v_rows) {
    const fastattn_attention_args *a = call->args;
    const char *k_head = (const char *)a->k + p->kv_head * a->k_strides[1], *v_head = (const char *)a->v + p->kv_head * a->v_strides[1];
    const int32_t *table = fastattn_pages_at(a->block_table, a->block_table_stride, p->entry->batch);
    const int64_t wanted = fastattn_row_pointers(p->entry->shape.block_keys), there = fa_min(wanted, p->entry->shape.kv_len - place);
    const char *k_page = k_head + p->entry->batch * a->k_strides[0], *v_page = v_head + p->entry->batch * a->v_strides[0];
    const int64_t k_stride = a->k_strides[2], v_stride = a->v_strides[2], entry = p->entry->key;
    const fa_key_list list = p->list;      /* a copy, which no pointer that is written can change */
    int64_t n = known, first = 0, end = 0; /* keys of the page at hand */
    memcpy(k_rows, k_rows + wanted - known, (size_t)known * sizeof *k_rows);
    memcpy(v_rows, v_rows + wanted - known, (size_t)known * sizeof *v_rows);
    for (; n < there && !table; n++) {
        const int64_t key = entry + fa_max(fa_listed_key(&list, place + n), 0);
        k_rows[n] = k_page + key * k_stride;
        v_rows[n] = v_page + key * v_stride;
    }
    for (; n < wanted; n++) {
        const int64_t key = entry + (n < there ? fa_max(fa_listed_key(&list, place + n), 0) : 0);
        if (table && (key < first || key >= end)) {
            const int64_t page = key / a->page_size;
            first = page * a->page_size, end = first + a->page_size;
            k_page = k_head + table[page] * a->k_strides[0], v_page = v_head + table[page] * a->v_strides[0];
        }
        k_rows[n] = k_page + (key - first) * k_stride;
        v_rows[n] = v_page + (key - first) * v_stride;
    }
}

/* The caller's rows of keys or values from `key` on, unless they are listed. */
static void point_at_rows(fa_matrix *rows, const fa_call *call, const fa_panel *p, const void *base, const int64_t strides[3],
                          fastattn_dtype dtype, int64_t key, int follows, const char **pointers) {
    const fastattn_attention_args *a = call->args;
    const fa_entry *entry = p->entry;
    fa_matrix head = fa_matrix_at((const char *)base + p->kv_head * strides[1], strides[2], dtype);
    head.beside = call->heads.beside > 1 ? strides[1] : 0;
    if (FA_UNLIKELY(a->block_table)) {
        const fa_pages pages = {head, strides[0], a->page_size, fastattn_pages_at(a->block_table, a->block_table_stride, entry->batch)};
        fastattn_paged_rows(rows, &pages, entry->key + key, entry->key + entry->shape.kv_len, entry->shape.block_keys, follows, pointers);
        return;
    }
    *rows = head;
    rows->at += entry->batch * strides[0] + (entry->key + key) * strides[2];
}

void fastattn_panel_keys_and_values(fa_matrix *k, fa_matrix *v, const fa_call *call, const fa_panel *p, int64_t key, int follows,
                                    const char **k_rows, const char **v_rows) {
    const fastattn_attention_args *a = call->args;
    if (FA_HOLDS_SPARSE && FA_UNLIKELY(p->list.at)) {
        find_listed_rows(call, p, key, follows ? p->entry->shape.block_keys : 0, k_rows, v_rows);
        *k = fa_matrix_at(NULL, 0, a->kv_dtype), *v = fa_matrix_at(NULL, 0, a->v_dtype);
        k->rows = k_rows, v->rows = v_rows;
        return;
    }
    point_at_rows(k, call, p, a->k, a->k_strides, a->kv_dtype, key, follows, k_rows);
    point_at_rows(v, call, p, a->v, a->v_strides, a->v_dtype, key, follows, v_rows);
}
