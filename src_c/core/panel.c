#include "panel.h"

#include "ints.h"

/* Positions and windows are cut to 2**60, so that their sums cannot overflow. */
static int64_t reach(int64_t x) {
    const int64_t far = (int64_t)1 << 60;
    return fa_max(-far, fa_min(far, x));
}

static void *take(char **memory, int64_t count, size_t size) {
    void *at = *memory;
    *memory += (size_t)count * size;
    return at;
}

/* lo <= key < hi for the keys that query i may see by its position. */
static void visible_keys(const fastattn_attention_args *a, int64_t position, int64_t length, int64_t *lo, int64_t *hi) {
    int64_t begin = 0, end = length;
    if (a->causal) end = fa_min(end, position + 1);
    if (a->window_right >= 0) end = fa_min(end, position + reach(a->window_right) + 1);
    if (a->window_left >= 0) begin = fa_max(begin, position - reach(a->window_left));
    *lo = fa_min(begin, length);
    *hi = fa_max(end, 0);
}

fa_panel fastattn_panel_of(const fa_call *call, int64_t panel, int64_t part, char *memory) {
    const fastattn_attention_args *a = call->args;
    const fa_rows *rows = &call->rows;
    fa_panel p;

    const int64_t sequence = panel / rows->panels;
    panel %= rows->panels;
    if (a->causal) panel = rows->panels - 1 - panel; /* the longest first: the last to finish is then short */
    p.batch = sequence / rows->sequences;
    p.head = sequence % rows->sequences * rows->group;
    p.kv_head = p.head / (a->num_heads / a->num_kv_heads);

    const int64_t segment = panel / rows->panels_a_segment;
    const int64_t segment_end = fa_min(rows->count, (segment + 1) * rows->segment);
    p.first_row = segment * rows->segment + panel % rows->panels_a_segment * rows->panel_rows;
    p.rows = (int)fa_min(rows->panel_rows, segment_end - p.first_row);
    p.padded = (int)fa_round_up(p.rows, FA_ROW_STEP);

    const int64_t length = a->kv_lengths ? a->kv_lengths[p.batch] : a->kv_len;
    p.offset = a->query_offset ? reach(a->query_offset[p.batch]) : length - a->q_len;
    p.first_key = part * call->split_keys;
    p.end_key = fa_min(p.first_key + call->split_keys, length);

    const int64_t ld = rows->ld;
    p.query = take(&memory, ld, sizeof *p.query);
    p.head_of = take(&memory, ld, sizeof *p.head_of);
    p.begin = take(&memory, ld, sizeof *p.begin);
    p.end = take(&memory, ld, sizeof *p.end);
    p.rows_of = take(&memory, ld, sizeof *p.rows_of);
    p.outputs = take(&memory, ld, sizeof *p.outputs);
    p.slopes = take(&memory, ld, sizeof(float));
    p.offset_of = take(&memory, ld, sizeof(float));
    p.begin_of = take(&memory, ld, sizeof(float));
    p.end_of = take(&memory, ld, sizeof(float));
    p.alpha = take(&memory, ld, sizeof(float));
    p.fade = take(&memory, ld, sizeof(float));

    int64_t i = p.first_row / rows->group, h = p.head + p.first_row % rows->group;
    for (int r = 0; r < p.padded; r++) {
        p.query[r] = i;
        p.head_of[r] = h;
        visible_keys(a, i + p.offset, length, &p.begin[r], &p.end[r]);
        p.outputs[r] = (char *)a->out + p.batch * a->out_strides[0] + h * a->out_strides[1] + i * a->out_strides[2];
        if (a->alibi_slopes)
            p.slopes[r] = *(const float *)((const char *)a->alibi_slopes + p.batch * a->alibi_strides[0] +
                                           h * a->alibi_strides[1]);
        if (r + 1 < p.rows && ++h == p.head + rows->group) h = p.head, i++;
    }
    return p;
}

void fastattn_panel_queries(const fa_call *call, fa_panel *p) {
    const fastattn_attention_args *a = call->args;
    for (int r = 0; r < p->padded; r++)
        p->rows_of[r] = (const char *)a->q + p->batch * a->q_strides[0] +
                        p->head_of[r] * a->q_strides[1] + p->query[r] * a->q_strides[2];
}

void fastattn_panel_mask(const fa_call *call, fa_panel *p, int64_t key) {
    const fastattn_attention_args *a = call->args;
    for (int r = 0; r < p->padded; r++)
        p->rows_of[r] = (const char *)a->mask + p->batch * a->mask_strides[0] +
                        p->head_of[r] * a->mask_strides[1] + p->query[r] * a->mask_strides[2] +
                        key * a->mask_strides[3];
}
