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
#include "range.h"
#include "threads.h"

#include <stdlib.h>

static int finite_queries(fa_work *w) {
    const fa_call *call = w->call;
    int finite = 1;
    fastattn_panel_queries(call, &w->panel);
    for (int r = 0; r < w->panel.rows; r++) {
        const fa_matrix row = {w->panel.rows_of[r], 0, call->args->q_dtype};
        finite &= call->uk->finite(row, 1, call->args->head_dim);
    }
    return finite;
}

/* The rows of a panel as its products lay it out: by rows as many as there are, else in whole vectors. */
static int rows_by(const fa_products *products, const fa_panel *panel) {
    return products->by_rows ? panel->rows : panel->padded;
}

static int ld_by(const fa_call *call, const fa_products *products) {
    return products->by_rows ? (int)fa_round_up(call->block_keys, FA_ROW_STEP) : call->rows.ld;
}

static const fa_products *products_of(const fa_call *call, const fa_panel *panel) {
    return fastattn_ways(call).of[fastattn_way_of(call, panel->rows)];
}

/* Everything that the caller will see of a panel. Of values that were scaled only what is missing in the outputs. Returns whether
 * it has to be computed again so. */
static int finish(const fa_call *call, const fa_panel *p, const fa_state *state, float v_scale) {
    const fastattn_attention_args *a = call->args;
    const fa_products *products = products_of(call, p);
    float factor[FA_PANEL_ROWS] = {0};
    for (int r = 0; r < p->rows; r++) {
        const int64_t head = p->head_of[r];
        float *lse = a->lse ? (float *)((char *)a->lse + p->batch * a->lse_strides[0] + head * a->lse_strides[1] +
                                        p->query[r] * a->lse_strides[2])
                            : NULL;
        factor[r] = fastattn_state_finish(state, r, call->unit, a->sinks ? a->sinks + head : NULL, lse);
    }
    if (v_scale != 1.0f) {
        fastattn_replace_means(call, p, state, factor);
        return 0;
    }
    const int finite =
        products->unpack(p->outputs, p->rows, state->o, ld_by(call, products), factor, a->v_head_dim, a->q_dtype);
    return !finite && fastattn_sums_overflow(call, p, state);
}

/* The workspace: scratch for each worker, then the states of the items where keys are split. */
typedef struct fa_job {
    fa_call call;
    char *workspace;
} fa_job;

static char *scratch_of(const fa_job *job, int worker) {
    return job->workspace + job->call.scratch.bytes * (size_t)worker;
}

static fa_state state_at(const fa_call *call, const fa_panel *panel, void *memory) {
    const fa_products *products = products_of(call, panel);
    return fastattn_state_at(memory, products, rows_by(products, panel), ld_by(call, products), call->args->v_head_dim);
}

static void *partial_memory(const fa_job *job, int64_t n) {
    const fa_call *call = &job->call;
    const int workers = call->args->num_threads > 1 ? call->args->num_threads : 1;
    return scratch_of(job, workers) + call->partial_bytes * (size_t)n;
}

/* Panel `panel` of all, as number `n` of a bundle, at its first block of keys. */
static fa_work start(const fa_job *job, int64_t panel, int64_t part, int64_t n, int worker, fa_run *run, float v_scale) {
    const fa_call *call = &job->call;
    const fa_scratch *at = &call->scratch;
    char *scratch = scratch_of(job, worker), *own = scratch + at->panels + at->panel.bytes * (size_t)n;
    fa_work w = {.call = call,
                 .run = run,
                 .v_scale = v_scale,
                 .panel = fastattn_panel_of(call, panel, part, own + at->panel.rows),
                 .s = (float *)(scratch + at->s),
                 .p = (float *)(scratch + at->p),
                 .bias = (float *)(scratch + at->bias),
                 .shown = (float *)(scratch + at->shown),
                 .finite_v = scratch + at->finite_v};
    for (int way = 0; way < FA_WAYS; way++) w.q[way] = (float *)(own + at->panel.q[way]);
    w.way = fastattn_way_of(call, w.panel.rows);
    w.products = run->ways[w.way].products;
    w.rows = rows_by(w.products, &w.panel);
    w.ld = ld_by(call, w.products);
    w.state = state_at(call, &w.panel,
                       call->splits > 1 ? partial_memory(job, panel * call->splits + part) : own + at->panel.o);
    fastattn_state_clear(&w.state);
    w.q_finite = !w.products->in_parts || finite_queries(&w);
    w.blocks = fastattn_key_blocks(call, &w.panel);
    w.pending = fastattn_next_key_block(&w.blocks, &w.block);
    return w;
}

/* Some consecutive panels over one part of the keys. Whichever is the furthest behind goes on, so that all come to a block
 * together. Returns a bit for each that has to be computed again. */
static uint32_t run_panels(const fa_job *job, int64_t first, int64_t panels, int64_t part, int worker, float v_scale) {
    const fa_call *call = &job->call;
    const fa_ways ways = fastattn_ways(call);
    fa_run run = {.keys = 0};
    for (int way = 0; way < FA_WAYS; way++) {
        run.ways[way].products = ways.of[way];
        if (!call->scratch.prepared[way]) continue;
        run.ways[way].k_room = (float *)(scratch_of(job, worker) + call->scratch.k[way]);
        run.ways[way].v_room = (float *)(scratch_of(job, worker) + call->scratch.v[way]);
    }
    fa_work works[FA_MOST_BUNDLE];
    uint32_t overflown = 0;
    if (call->products->enter) call->products->enter();
    for (int64_t n = 0; n < panels; n++) works[n] = start(job, first + n, part, n, worker, &run, v_scale);
    for (;;) {
        fa_work *next = NULL;
        for (fa_work *w = works; w < works + panels; w++)
            if (w->pending && (!next || w->block.first < next->block.first)) next = w;
        if (!next) break;
        fastattn_run_block(next, &next->block);
        next->pending = fastattn_next_key_block(&next->blocks, &next->block);
    }
    for (int64_t n = 0; n < panels && call->splits == 1; n++)
        if (finish(call, &works[n].panel, &works[n].state, v_scale)) overflown |= (uint32_t)1 << n;
    if (call->products->leave) call->products->leave();
    return overflown;
}

/* The parts of one panel become one. */
static int merge_parts(const fa_job *job, int64_t panel, int worker, float v_scale) {
    const fa_call *call = &job->call;
    char *rows = scratch_of(job, worker) + call->scratch.panels + call->scratch.panel.rows;
    const fa_panel p = fastattn_panel_of(call, panel, 0, rows);
    fa_state state = state_at(call, &p, partial_memory(job, panel * call->splits));
    for (int64_t part = 1; part < call->splits; part++) {
        const fa_state other = state_at(call, &p, partial_memory(job, panel * call->splits + part));
        fastattn_state_merge(&state, &other, call->exponent);
    }
    return finish(call, &p, &state, v_scale);
}

/* A panel whose sums left float32, with all its parts. */
static void run_again(const fa_job *job, int64_t panel, int worker) {
    for (int64_t part = 0; part < job->call.splits; part++) run_panels(job, panel, 1, part, worker, FA_SHRINK);
    if (job->call.splits > 1) merge_parts(job, panel, worker, FA_SHRINK);
}

/* Phase 0: attention of a bundle of panels over one part of the keys. */
static void run_item(const void *context, int64_t item, int worker) {
    const fa_job *job = context;
    const fa_call *call = &job->call;
    const int64_t part = item % call->splits, bundle = item / call->splits % call->bundles;
    const int64_t sequence = item / call->splits / call->bundles, first = bundle * call->bundle;
    const int64_t panels = fa_min(call->bundle, call->rows.panels - first), panel = sequence * call->rows.panels + first;
    uint32_t overflown = run_panels(job, panel, panels, part, worker, 1.0f);
    for (int64_t n = 0; overflown; n++, overflown >>= 1)
        if (overflown & 1) run_again(job, panel + n, worker);
}

/* Phase 1, where the keys are in parts. */
static void merge_item(const void *context, int64_t item, int worker) {
    const fa_job *job = context;
    if (merge_parts(job, item, worker, 1.0f)) run_again(job, item, worker);
}

static int64_t phase_items(const fa_call *call, int phase) {
    if (phase == 0) return call->items;
    return phase == 1 && call->splits > 1 ? call->panels : 0;
}

static fastattn_status prepare(fa_job *job, const fastattn_attention_args *args, void *workspace, size_t size) {
    fastattn_status status = fastattn_call_prepare(&job->call, args);
    if (status != FASTATTN_OK) return status;
    if (workspace && (size < job->call.workspace || (uintptr_t)workspace % 64 != 0)) return FASTATTN_ERROR_WORKSPACE;
    job->workspace = workspace;
    return FASTATTN_OK;
}

fastattn_status fastattn_attention(const fastattn_attention_args *args, void *workspace, size_t workspace_size) {
    fa_job job;
    fastattn_status status = prepare(&job, args, workspace, workspace_size);
    if (status != FASTATTN_OK || job.call.items == 0) return status;
    void *own = NULL;
    if (!workspace) {
        own = malloc(job.call.workspace + 63);
        if (!own) return FASTATTN_ERROR_MEMORY;
        job.workspace = (char *)(((uintptr_t)own + 63) / 64 * 64);
    }
    status = fastattn_for_each(phase_items(&job.call, 0), &job.call.team, run_item, &job);
    if (status == FASTATTN_OK) status = fastattn_for_each(phase_items(&job.call, 1), &job.call.team, merge_item, &job);
    free(own);
    return status;
}

size_t fastattn_workspace_size(const fastattn_attention_args *args) {
    fa_call call;
    return fastattn_call_prepare(&call, args) == FASTATTN_OK ? call.workspace : 0;
}

int64_t fastattn_attention_items(const fastattn_attention_args *args, int phase) {
    fa_call call;
    return fastattn_call_prepare(&call, args) == FASTATTN_OK ? phase_items(&call, phase) : 0;
}

fastattn_status fastattn_attention_run(const fastattn_attention_args *args, int phase, int64_t item, int worker,
                                       void *workspace, size_t workspace_size) {
    fa_job job;
    fastattn_status status = prepare(&job, args, workspace, workspace_size);
    if (status != FASTATTN_OK) return status;
    if (!workspace || item < 0 || item >= phase_items(&job.call, phase) || worker < 0 ||
        worker >= (job.call.args->num_threads > 1 ? job.call.args->num_threads : 1))
        return FASTATTN_ERROR_ARGUMENT;
    fastattn_for_range(item, item + 1, worker, phase == 0 ? run_item : merge_item, &job);
    return FASTATTN_OK;
}
