#include "mass.h"

#include "ints.h"

#include <math.h>
#include <string.h>

#ifndef FASTATTN_NO_SEGMENTS

/* The sums of a row are relative to a maximum of its own, `base`. It is not moved with every other one, for that would take all of the
 * row each time: weights are multiplied by `rise`, 2**(exponent * (m - base)), as long as this leaves float32 room for any sum of
 * them. */
static const double most_rise = 60;

void fastattn_mass_begin(fa_panel *p, const fa_state *state) {
    p->cleared = 0;
    for (int r = 0; r < p->rows; r++) {
        p->base[r] = state->m[r];
        p->rise[r] = 1.0f;
    }
}

/* The sums of segments below `end` are there from now on, and 0 if they were not: just before they are added to, for rows of many
 * segments leave the caches. */
static void clear_up_to(fa_panel *p, int64_t end) {
    if (end <= p->cleared) return;
    for (int r = 0; r < p->rows; r++) memset((float *)p->outputs[r] + p->cleared, 0, (size_t)(end - p->cleared) * sizeof(float));
    p->cleared = end;
}

static void follow_maximum(const fa_call *call, fa_panel *p, int r, float m) {
    if (m == -INFINITY) return;
    double rise = call->scoring.exponent * ((double)m - p->base[r]);
    if (!(rise <= most_rise)) {
        if (p->base[r] != -INFINITY) call->uk->narrow(p->outputs[r], p->outputs[r], (float)exp2(-rise), p->cleared, FASTATTN_FLOAT32);
        p->base[r] = m;
        rise = call->scoring.exponent * ((double)m - m);
    }
    p->rise[r] = (float)exp2(rise);
}

/* The segments of some keys of an entry, in runs; their number, and in `beyond` one more than the largest. */
static int64_t find_runs(fa_segment_run *runs, int64_t *beyond, const fa_work *w, int64_t key, int64_t keys) {
    const fastattn_attention_args *a = w->call->args;
    const fa_entry *entry = w->panel.entry;
    const char *table = (const char *)a->segments + (a->cu_seqlens_k ? 0 : entry->batch * a->segments_stride);
    const int32_t *segment = (const int32_t *)(const void *)table + entry->key + key;
    int64_t count = 0;
    *beyond = 0;
    for (int64_t j = 0, end; j < keys; j = end) {
        const int32_t first = segment[j];
        const int ascends = first >= 0 && j + 1 < keys && segment[j + 1] == first + 1;
        for (end = j + 1; end < keys && segment[end] == (ascends ? first + (int32_t)(end - j) : first);) end++;
        runs[count++] = (fa_segment_run){first, (int)(end - j), ascends};
        *beyond = fa_max(*beyond, first + (ascends ? end - j : 1));
    }
    return count;
}

void fastattn_mass_add(fa_work *w, const fa_operands *x, const float *alpha, const float *p, int row, int rows, int64_t from,
                       int64_t keys) {
    const fa_call *call = w->call;
    fa_panel *panel = &w->panel;
    const int real = (int)fa_min(rows, panel->rows - row);
    const int64_t pitch = x->products->by_rows ? w->panel.ld : fa_round_up(keys, FA_ROW_STEP);
    fa_segment_run runs[FA_MOST_BLOCK_KEYS];
    int64_t end;
    const int64_t count = find_runs(runs, &end, w, x->first + from, keys);
    clear_up_to(panel, end);
    if (!x->products->by_rows) { /* lanes of rows turn to rows */
        void *turned[FA_PANEL_ROWS];
        float ones[FA_PANEL_ROWS];
        for (int r = 0; r < rows; r++) turned[r] = w->shown + r * pitch, ones[r] = 1.0f;
        x->products->unpack(turned, real, p, w->panel.ld, ones, keys, FASTATTN_FLOAT32);
        p = w->shown;
    }
    for (int r = 0; r < real; r++) {
        if (alpha[r] != 1.0f) follow_maximum(call, panel, row + r, w->state.m[row + r]);
        call->uk->gather(panel->outputs[row + r], p + r * pitch, panel->rise[row + r], runs, count);
    }
}

void fastattn_mass_finish(const fa_call *call, fa_panel *p, const fa_state *state, const float *factor) {
    const int64_t segments = call->args->num_segments, added = p->cleared;
    clear_up_to(p, segments);
    for (int r = 0; r < p->rows; r++) {
        const double fall = p->base[r] == -INFINITY ? 0 : call->scoring.exponent * (p->base[r] - (double)state->m[r]);
        const float by = (float)(factor[r] * exp2(fall)); /* a NaN is for all */
        call->uk->narrow(p->outputs[r], p->outputs[r], by, isfinite(by) ? added : segments, FASTATTN_FLOAT32);
    }
}

#endif
