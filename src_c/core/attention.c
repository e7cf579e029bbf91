/* Attention: the loop over blocks of keys, written once.
 *
 *     m = -inf, l = 0, o = 0                                for the rows of a panel
 *     for each block of keys that some row sees:
 *         s = k q                                           scores, transposed: queries are lanes
 *         s = rules(s)                                      softcap, bias, ALiBi; hidden scores become -inf
 *         m' = max(m, max s);  alpha = 2**(c (m - m'))
 *         p = 2**(c (s - m'));  l = l alpha + sum p
 *         o = o alpha + v p
 *     out = o / l
 *
 * (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al., "FlashAttention", 2022.) Here is what
 * surrounds the loop: panels, items and parts of the keys. What is done to one block is in block.c. */
#include "block.h"
#include "ints.h"
#include "mass.h"
#include "memory.h"
#include "range.h"
#include "threads.h"

#include "../ukernel/storage.h"

#include <math.h>
#include <string.h>

static int finite_queries(fa_work *w) {
    const fa_call *call = w->call;
    int finite = 1;
    fastattn_panel_queries(call, &w->panel);
    for (int r = 0; r < w->panel.rows; r++) {
        const fa_matrix row = fa_matrix_at(w->panel.rows_of[r], 0, call->args->q_dtype);
        finite &= call->uk->finite(row, 1, call->args->head_dim);
    }
    return finite;
}

static float *lse_at(const fastattn_attention_args *a, const fa_entry *entry, int64_t head, int64_t query) {
    return (float *)((char *)a->lse + entry->batch * a->lse_strides[0] + head * a->lse_strides[1] +
                     (entry->query + query) * a->lse_strides[2]);
}

/* Everything that the caller will see of a panel. Of values that were scaled only what is missing in the outputs. Returns whether
 * it has to be computed again so. */
static int finish(const fa_call *call, fa_panel *p, const fa_state *state, float v_scale) {
    const fastattn_attention_args *a = call->args;
    float factor[FA_PANEL_ROWS];
    for (int r = p->rows; r < p->padded; r++) factor[r] = 0.0f;
    for (int r = 0; r < p->rows; r++) {
        const int64_t head = p->head_of[r];
        float *lse = FA_UNLIKELY(a->lse) ? lse_at(a, p->entry, head, p->query[r]) : NULL;
        factor[r] = a->activation != FASTATTN_SOFTMAX
                        ? state->seen[r]
                        : fastattn_state_finish(state, r, call->scoring.unit, FA_UNLIKELY(a->sinks) ? a->sinks + head : NULL, lse);
    }
    if (FA_HOLDS_SEGMENTS && FA_UNLIKELY(a->segments)) {
        fastattn_mass_finish(call, p, state, factor);
        return 0;
    }
    if (FA_UNLIKELY(v_scale != 1.0f)) {
        fastattn_replace_means(call, p, state, factor);
        return 0;
    }
    const int finite = p->products->unpack(p->outputs, p->rows, state->o, p->ld, factor, a->v_head_dim, a->q_dtype);
    /* Weights that no sum divides give what the formula does, which may overflow. */
    return FA_UNLIKELY(!finite) && a->activation == FASTATTN_SOFTMAX && fastattn_sums_overflow(call, p, state);
}

/* The workspace: the plan with its entries, scratch for each worker, and the states of the items where keys are split. */
static char *scratch_of(const fa_call *call, int worker) {
    return (char *)call + call->room.scratch + call->scratch.bytes * (size_t)worker;
}

static void state_at(fa_state *state, const fa_call *call, const fa_panel *p, void *memory) {
    fastattn_state_at(state, memory, p->products, p->padded, p->ld, call->args->v_head_dim);
}

static void *partial_memory(const fa_call *call, const fa_entry *entry, int64_t panel, int64_t part) {
    return (char *)call + entry->partials + entry->partial_bytes * (size_t)(panel * entry->shape.splits + part);
}

/* How an entry's scores become weights, if not by the softmax. */
static fa_activation activation_of(const fa_call *call, const fa_entry *entry) {
    const fastattn_attention_args *a = call->args;
    const double keys = (double)fa_max(entry->keys, 1);
    fa_activation activation = {a->activation, a->power, (float)call->scoring.unit, 0.0f, 1.0f};
    if (FA_LIKELY(a->activation == FASTATTN_SOFTMAX)) return activation;
    if (a->activation == FASTATTN_SIGMOID) activation.bias = a->activation_bias ? a->activation_bias[entry->batch] : (float)-log(keys);
    if (a->activation == FASTATTN_RELU) activation.factor = (float)(1 / keys);
    if (a->activation == FASTATTN_POLYNOMIAL) activation.factor = (float)(1 / sqrt(keys));
    return activation;
}

/* Whether an item takes several parts, one after the other. */
static int by_turns(const fa_shape *shape) { return FA_UNLIKELY(shape->split_keys > shape->state_keys); }

/* The state of the keys that come next. */
static void begin_state(fa_work *w) {
    fastattn_state_clear(&w->state);
    if (FA_LIKELY(w->activation.kind == FASTATTN_SOFTMAX)) return;
    for (int r = 0; r < w->panel.padded; r++) /* no maximum moves, so that states merge by adding */
        w->state.m[r] = 0.0f, w->panel.alpha[r] = w->panel.fade[r] = 1.0f;
}

/* A block of the next part. */
static void next_state(fa_work *w, int64_t key) {
    const int64_t keys = w->panel.entry->shape.state_keys;
    fastattn_state_merge(&w->total, &w->state, w->call->scoring.exponent);
    begin_state(w);
    w->state_end = (key / keys + 1) * keys;
}

/* Panel `panel` of an entry, as number `n` of a bundle, at its first block of keys. */
static void start(fa_work *w, const fa_call *call, const fa_entry *entry, int64_t panel, int64_t part, int64_t n, int worker, fa_run *run,
                  float v_scale) {
    const fa_scratch *at = &call->scratch;
    char *scratch = scratch_of(call, worker), *own = scratch + at->panels + at->panel.bytes * (size_t)n;
    w->call = call;
    w->run = run;
    w->v_scale = v_scale;
    w->misfits = 0;
    w->activation = activation_of(call, entry);
    w->s = (float *)(scratch + at->s);
    w->p = (float *)(scratch + at->p);
    w->bias = (float *)(scratch + at->bias);
    w->shown = (float *)(scratch + at->shown);
    w->finite_v = scratch + at->finite_v;
    for (int way = 0; way < FA_WAYS; way++) {
        w->q[way] = (float *)(own + at->panel.q[way]);
        w->packed[way] = 0;
    }
    fastattn_panel_of(&w->panel, call, entry, panel, part, own + at->panel.rows);
    state_at(&w->state, call, &w->panel, entry->shape.splits > 1 ? partial_memory(call, entry, panel, part) : own + at->panel.o);
    w->state_end = w->panel.first_key + entry->shape.state_keys;
    begin_state(w);
    if (by_turns(&entry->shape)) {
        state_at(&w->total, call, &w->panel, own + at->panel.total);
        fastattn_state_clear(&w->total);
    }
    if (FA_HOLDS_SEGMENTS && FA_UNLIKELY(call->args->segments)) fastattn_mass_begin(&w->panel, &w->state);
    w->q_finite = !w->panel.products->in_parts || finite_queries(w);
    fastattn_key_blocks(&w->blocks, call, &w->panel);
    w->pending = fastattn_next_key_block(&w->blocks, &w->block);
}

/* The rows of an entry beyond its q_length. */
static void clear_padding(const fa_call *call, const fa_entry *entry) {
    const fastattn_attention_args *a = call->args;
    const size_t bytes = (size_t)fastattn_out_bytes(a);
    for (int64_t h = 0; h < a->num_heads; h++)
        for (int64_t i = entry->shape.q_len; i < entry->q_room; i++) {
            char *row = (char *)a->out + entry->batch * a->out_strides[0] + h * a->out_strides[1] + (entry->query + i) * a->out_strides[2];
            if (bytes > 0) memset(row, 0, bytes);
            if (a->lse) *lse_at(a, entry, h, i) = -INFINITY;
        }
}

/* Some consecutive panels of an entry over one part of the keys. Whichever is the furthest behind goes on, so that all come to a
 * block together. Returns a bit for each that has to be computed again. */
static uint32_t run_panels(const fa_call *call, const fa_entry *entry, int64_t first, int64_t panels, int64_t part, int worker,
                           float v_scale) {
    const fa_shape *shape = &entry->shape;
    const fa_ways ways = fastattn_ways(call, shape);
    char *scratch = scratch_of(call, worker);
    const int64_t runs = FA_UNLIKELY(panels > 1) && shape->rows.panels == 1 ? panels : 1; /* heads abreast have their own */
    fa_run run[FA_MOST_ABREAST];
    for (int64_t n = 0; n < runs; n++) {
        run[n].first = run[n].keys = 0;
        run[n].abreast_before = n;
        run[n].abreast_after = runs - 1 - n;
        run[n].k_rows = (const char **)(void *)(scratch + call->scratch.k_rows) + n * call->pointers;
        run[n].v_rows = (const char **)(void *)(scratch + call->scratch.v_rows) + n * call->pointers;
        run[n].wide_k = (float *)(scratch + call->scratch.wide_k);
        run[n].wide_v = (float *)(scratch + call->scratch.wide_v);
        for (int way = 0; way < FA_WAYS; way++) {
            run[n].ways[way].products = ways.of[way];
            run[n].ways[way].k_room = shape->prepared[way] ? (float *)(scratch + call->scratch.k[way]) : NULL;
            run[n].ways[way].v_room = shape->prepared[way] ? (float *)(scratch + call->scratch.v[way]) : NULL;
        }
    }
    fa_work works[FA_MOST_BUNDLE];
    uint32_t overflown = 0;
    if (FA_UNLIKELY(shape->products->enter)) shape->products->enter();
    for (int64_t n = 0; n < panels; n++) start(&works[n], call, entry, first + n, part, n, worker, &run[n < runs ? n : 0], v_scale);
    for (;;) {
        fa_work *next = NULL;
        for (fa_work *w = works; w < works + panels; w++)
            if (w->pending && (!next || w->block.first < next->block.first)) next = w;
        if (!next) break;
        if (FA_UNLIKELY(next->block.first >= next->state_end)) next_state(next, next->block.first);
        fastattn_run_block(next, &next->block);
        next->pending = fastattn_next_key_block(&next->blocks, &next->block);
    }
    for (int64_t n = 0; n < panels && shape->splits == 1; n++) {
        fa_work *w = works + n;
        if (by_turns(shape)) fastattn_state_merge(&w->total, &w->state, call->scoring.exponent);
        if (finish(call, &w->panel, by_turns(shape) ? &w->total : &w->state, v_scale)) overflown |= (uint32_t)1 << n;
    }
    if (FA_UNLIKELY(shape->products->leave)) shape->products->leave();
    return overflown;
}

/* The parts of one panel become one. */
static int merge_parts(const fa_call *call, const fa_entry *entry, int64_t panel, int worker, float v_scale) {
    char *vectors = scratch_of(call, worker) + call->scratch.panels + call->scratch.panel.rows;
    fa_panel p;
    fastattn_panel_of(&p, call, entry, panel, 0, vectors);
    fa_state state, other;
    state_at(&state, call, &p, partial_memory(call, entry, panel, 0));
    for (int64_t part = 1; part < entry->shape.splits; part++) {
        state_at(&other, call, &p, partial_memory(call, entry, panel, part));
        fastattn_state_merge(&state, &other, call->scoring.exponent);
    }
    return finish(call, &p, &state, v_scale);
}

/* A panel whose sums left float32, with all its parts. */
static void run_again(const fa_call *call, const fa_entry *entry, int64_t panel, int worker) {
    for (int64_t part = 0; part < entry->shape.splits; part++) run_panels(call, entry, panel, 1, part, worker, FA_SHRINK);
    if (entry->shape.splits > 1) merge_parts(call, entry, panel, worker, FA_SHRINK);
}

/* Phase 0: attention of a bundle of panels over one part of the keys. */
static void run_item(const void *context, int64_t item, int worker) {
    const fa_call *call = context;
    if (FA_UNLIKELY(item >= call->items[FA_COMPUTE])) {
        clear_padding(call, call->entries + (item - call->items[FA_COMPUTE]));
        return;
    }
    const fa_entry *entry = fastattn_entry_of(call, FA_COMPUTE, item);
    item -= entry->first[FA_COMPUTE];
    const int64_t splits = entry->shape.splits, whole = fa_divide(item, splits), part = item - whole * splits;
    const int64_t line = fa_divide(whole, entry->bundles), bundle = whole - line * entry->bundles;
    const int64_t first = bundle * entry->bundle, panels = fa_min(entry->bundle, entry->line - first);
    const int64_t panel = line * entry->line + first;
    uint32_t overflown = run_panels(call, entry, panel, panels, part, worker, 1.0f);
    for (int64_t n = 0; FA_UNLIKELY(overflown); n++, overflown >>= 1)
        if (overflown & 1) run_again(call, entry, panel + n, worker);
}

/* Phase 1, where the keys are in parts. */
static void merge_item(const void *context, int64_t item, int worker) {
    const fa_call *call = context;
    const fa_entry *entry = fastattn_entry_of(call, FA_MERGE, item);
    const int64_t panel = item - entry->first[FA_MERGE];
    if (merge_parts(call, entry, panel, worker, 1.0f)) run_again(call, entry, panel, worker);
}

static int64_t phase_items(const fa_call *call, int phase) {
    if (phase == FA_COMPUTE) return call->items[FA_COMPUTE] + call->paddings;
    return phase == FA_MERGE ? call->items[FA_MERGE] : 0;
}

/* A call is prepared where it will lie, but for one whose workspace is not there, or will not do. */
static fa_call *prepared_at(fa_call *elsewhere, void *workspace, size_t workspace_size) {
    return workspace && workspace_size >= sizeof *elsewhere && (uintptr_t)workspace % 64 == 0 ? workspace : elsewhere;
}

fastattn_status fastattn_attention(const fastattn_attention_args *args, void *workspace, size_t workspace_size) {
    fa_call elsewhere, *prepared = prepared_at(&elsewhere, workspace, workspace_size);
    fastattn_status status = fastattn_call_prepare(prepared, args);
    if (status != FASTATTN_OK || prepared->room.entries == 0) return status;
    void *own = NULL;
    if (FA_UNLIKELY(!workspace)) {
        own = FASTATTN_MALLOC(prepared->room.bytes + 63);
        if (!own) return FASTATTN_ERROR_MEMORY;
        workspace = (void *)(((uintptr_t)own + 63) / 64 * 64);
    } else if (workspace_size < prepared->room.bytes || prepared == &elsewhere) return FASTATTN_ERROR_WORKSPACE;
    const fa_call *call = fastattn_call_enter(prepared, workspace);
    status = fastattn_for_each(phase_items(call, FA_COMPUTE), &call->team, run_item, call);
    if (status == FASTATTN_OK) status = fastattn_for_each(phase_items(call, FA_MERGE), &call->team, merge_item, call);
    if (FA_UNLIKELY(own)) FASTATTN_FREE(own);
    return status;
}

size_t fastattn_workspace_size(const fastattn_attention_args *args) {
    fa_call call;
    return fastattn_call_prepare(&call, args) == FASTATTN_OK ? call.room.bytes : 0;
}

fastattn_status fastattn_attention_plan(const fastattn_attention_args *args, void *workspace, size_t workspace_size,
                                        const fastattn_plan **plan) {
    fa_call elsewhere, *prepared = prepared_at(&elsewhere, workspace, workspace_size);
    if (!plan || !workspace) return FASTATTN_ERROR_ARGUMENT;
    const fastattn_status status = fastattn_call_prepare(prepared, args);
    if (status != FASTATTN_OK) return status;
    if (workspace_size < prepared->room.bytes || prepared == &elsewhere) return FASTATTN_ERROR_WORKSPACE;
    *plan = fastattn_call_enter(prepared, workspace);
    return FASTATTN_OK;
}

int64_t fastattn_plan_items(const fastattn_plan *plan, int phase) { return plan ? phase_items(plan, phase) : 0; }

fastattn_status fastattn_plan_run(const fastattn_plan *plan, int phase, int64_t item, int worker) {
    if (!plan || item < 0 || item >= phase_items(plan, phase) || worker < 0 || worker >= plan->workers) return FASTATTN_ERROR_ARGUMENT;
    fastattn_for_range(item, item + 1, worker, phase == FA_COMPUTE ? run_item : merge_item, plan);
    return FASTATTN_OK;
}
