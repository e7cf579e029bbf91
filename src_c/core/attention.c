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
#include <string.h>

/* Few queries, row by row in float32. */
static void load_few(fa_work *w) {
    const fa_call *call = w->call;
    const fastattn_attention_args *a = call->args;
    fastattn_panel_queries(call, &w->panel);
    memset(w->q_rows, 0, (size_t)(w->panel.rows * w->q_pitch) * sizeof(float));
    memset(w->o_rows, 0, (size_t)(w->panel.rows * w->o_pitch) * sizeof(float));
    memset(w->shown, 0, (size_t)(call->block_keys * call->rows.ld) * sizeof(float)); /* rules see rows that are not there */
    for (int r = 0; r < w->panel.rows; r++) {
        float *q = w->q_rows + r * w->q_pitch;
        const fa_matrix row = {w->panel.rows_of[r], 0, a->q_dtype};
        call->uk->widen(q, row, 1, a->head_dim);
        if (call->sign != 1.0f)
            for (int64_t d = 0; d < a->head_dim; d++) q[d] *= call->sign;
    }
}

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

/* o in the orientation of a state, to be merged. */
static void settle(fa_work *w) {
    if (!w->few) return;
    for (int r = 0; r < w->panel.padded; r++)
        w->panel.rows_of[r] = w->o_rows + fa_min(r, w->panel.rows - 1) * w->o_pitch;
    w->call->uk->products->pack(w->state.o, (int)w->state.ld, w->panel.rows_of, w->panel.padded, w->state.v_head_dim,
                      FASTATTN_FLOAT32, 1.0f);
}

/* Everything that the caller will see of a panel; o is that of the state, or row-major with this pitch. Of values that were scaled
 * only what is missing in the outputs. Returns whether it has to be computed again so. */
static int finish(const fa_call *call, const fa_panel *p, const fa_state *state, const float *o_rows, int64_t pitch, float v_scale) {
    const fastattn_attention_args *a = call->args;
    float factor[FA_PANEL_ROWS] = {0};
    for (int r = 0; r < p->rows; r++) {
        const int64_t head = p->head_of[r];
        float *lse = a->lse ? (float *)((char *)a->lse + p->batch * a->lse_strides[0] + head * a->lse_strides[1] +
                                        p->query[r] * a->lse_strides[2])
                            : NULL;
        factor[r] = fastattn_state_finish(state, r, call->unit, a->sinks ? a->sinks + head : NULL, lse);
    }
    const fa_sums sums = {o_rows ? o_rows : state->o, o_rows ? pitch : 1, o_rows ? 1 : state->ld};
    if (v_scale != 1.0f) {
        fastattn_replace_means(call, p, sums, factor);
        return 0;
    }
    int finite = 1;
    if (!o_rows) finite = call->uk->unpack(p->outputs, p->rows, state->o, (int)state->ld, factor, a->v_head_dim, a->q_dtype);
    for (int r = 0; o_rows && r < p->rows; r++)
        finite &= call->uk->narrow(p->outputs[r], o_rows + r * pitch, factor[r], a->v_head_dim, a->q_dtype);
    return !finite && fastattn_sums_overflow(call, p, state, sums);
}

/* The workspace: scratch for each worker, then the states of the items where keys are split. */
typedef struct fa_job {
    fa_call call;
    char *workspace;
} fa_job;

static char *scratch_of(const fa_job *job, int worker) {
    return job->workspace + job->call.scratch.bytes * (size_t)worker;
}

/* Few rows go through float32 products whatever the others do. */
static const fa_products *products_of(const fa_call *call, const fa_panel *panel) {
    return panel->rows <= FA_FEW_ROWS ? call->uk->products : call->products;
}

static fa_state state_at(const fa_call *call, const fa_panel *panel, void *memory) {
    const int64_t dim = call->args->v_head_dim;
    return fastattn_state_at(memory, call->rows.ld, dim, products_of(call, panel)->sums ? fa_sums_row(dim) : 0);
}

static void *partial_memory(const fa_job *job, int64_t n) {
    const fa_call *call = &job->call;
    const int workers = call->args->num_threads > 1 ? call->args->num_threads : 1;
    return scratch_of(job, workers) + call->partial_bytes * (size_t)n;
}

/* Panel `panel` of all, as number `n` of a bundle, at its first block of keys. */
static fa_work start(const fa_job *job, int64_t panel, int64_t part, int64_t n, int worker, fa_run *run, float v_scale) {
    const fa_call *call = &job->call;
    const fastattn_attention_args *a = call->args;
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
                 .finite_v = scratch + at->finite_v,
                 .q_pitch = fa_round_up(a->head_dim, FA_ROW_STEP),
                 .s_pitch = fa_round_up(call->block_keys, FA_ROW_STEP),
                 .o_pitch = fa_round_up(a->v_head_dim, FA_ROW_STEP),
                 .q_rows = (float *)(own + at->panel.q_rows),
                 .o_rows = (float *)(own + at->panel.o_rows)};
    for (int way = 0; way < FA_WAYS; way++) w.q[way] = (float *)(own + at->panel.q[way]);
    w.few = w.panel.rows <= FA_FEW_ROWS;
    w.products = products_of(call, &w.panel);
    w.state = state_at(call, &w.panel,
                       call->splits > 1 ? partial_memory(job, panel * call->splits + part) : own + at->panel.o);
    fastattn_state_clear(&w.state, !w.few);
    if (w.few) load_few(&w);
    w.q_finite = !w.products->in_parts || finite_queries(&w);
    w.blocks = fastattn_key_blocks(call, &w.panel);
    w.pending = fastattn_next_key_block(&w.blocks, &w.block);
    return w;
}

/* Some consecutive panels over one part of the keys. Whichever is the furthest behind goes on, so that all come to a block
 * together. Returns a bit for each that has to be computed again. */
static uint32_t run_panels(const fa_job *job, int64_t first, int64_t panels, int64_t part, int worker, float v_scale) {
    const fa_call *call = &job->call;
    fa_run run = {.ways = {{.products = call->products}, {.products = call->uk->products}}};
    for (int way = 0; way < FA_WAYS; way++) {
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
    for (int64_t n = 0; n < panels; n++) {
        fa_work *w = works + n;
        if (call->splits > 1)
            settle(w);
        else if (finish(call, &w->panel, &w->state, w->few ? w->o_rows : NULL, w->o_pitch, v_scale))
            overflown |= (uint32_t)1 << n;
    }
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
    return finish(call, &p, &state, NULL, 0, v_scale);
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
