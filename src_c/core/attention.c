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
 * (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al., "FlashAttention", 2022.) */
#include "ints.h"
#include "keyblocks.h"
#include "state.h"
#include "threads.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* What a worker has at hand while it computes one item. */
typedef struct fa_work {
    const fa_call *call;
    fa_panel panel;
    fa_state state;
    float *q, *s, *bias, *shown, *k, *v, *finite_v;
    struct { int64_t from, to; } keys_of[FA_PANEL_ROWS / FA_ROW_STEP]; /* of the block, what each group of rows may see */
} fa_work;

/* The keys of a block in float32, and what the rules say of them. */
typedef struct fa_operands {
    const float *k, *v;
    int64_t k_stride, v_stride; /* in floats */
    fa_score_rules rules;
    int ruled;   /* the rules change or hide some score */
    int careful; /* some row must not be touched by some value that is not finite */
} fa_operands;

/* Rows of k or v from `first` on, in float32: the caller's own, or widened into `room`. */
static const float *block_rows(const fa_call *call, const void *base, const int64_t strides[3], const fa_panel *panel,
                               const fa_key_block *block, int64_t dim, float *room, int64_t *stride) {
    const char *at =
        (const char *)base + panel->batch * strides[0] + panel->kv_head * strides[1] + block->first * strides[2];
    if (call->args->kv_dtype == FASTATTN_FLOAT32) {
        *stride = strides[2] / (int64_t)sizeof(float);
        return (const float *)at;
    }
    call->uk->widen(room, at, strides[2], block->keys, dim, call->args->kv_dtype);
    *stride = dim;
    return room;
}

/* The bits of one key, spread over the rows of the panel: bit r tells whether row r sees it. */
static uint64_t lanes_of_bits(const fa_panel *p, const uint8_t *bits, int64_t first, int64_t group) {
    const int64_t from = p->query[0] - first, count = p->query[p->rows - 1] - p->query[0] + 1;
    uint64_t lanes = 0;
    if (group == 1) { /* rows are queries */
        for (int64_t byte = from / 8; byte <= (from + count - 1) / 8; byte++) {
            const int64_t shift = byte * 8 - from;
            lanes |= shift >= 0 ? (uint64_t)bits[byte] << shift : (uint64_t)bits[byte] >> -shift;
        }
        return lanes;
    }
    for (int64_t i = 0, r = 0; i < count; i++) {
        const int64_t next = fa_min((p->query[0] + i + 1) * group - p->first_row, FA_PANEL_ROWS);
        const uint64_t heads = (next - r < 64 ? ((uint64_t)1 << (next - r)) - 1 : ~(uint64_t)0) << r;
        if (bits[(from + i) / 8] >> ((from + i) % 8) & 1) lanes |= heads;
        r = next;
    }
    return lanes;
}

/* Adds an element mask of a block-sparse pattern to the bias, and narrows keys_of to it. */
static unsigned hide_by_bits(fa_work *w, const fa_key_block *block) {
    static const float hidden[16][4] = {
#define H -INFINITY
        {H, H, H, H}, {0, H, H, H}, {H, 0, H, H}, {0, 0, H, H}, {H, H, 0, H}, {0, H, 0, H}, {H, 0, 0, H}, {0, 0, 0, H},
        {H, H, H, 0}, {0, H, H, 0}, {H, 0, H, 0}, {0, 0, H, 0}, {H, H, 0, 0}, {0, H, 0, 0}, {H, 0, 0, 0}, {0, 0, 0, 0},
#undef H
    };
    const fa_panel *p = &w->panel;
    const uint64_t real = p->rows < 64 ? ((uint64_t)1 << p->rows) - 1 : ~(uint64_t)0;
    const int groups = p->padded / FA_ROW_STEP, ld = w->call->rows.ld;
    uint64_t lanes[FA_MOST_BLOCK_KEYS];
    unsigned found = 0;
    for (int g = 0; g < groups; g++) w->keys_of[g].from = block->keys, w->keys_of[g].to = 0;
    for (int64_t j = 0; j < block->keys; j++) {
        const uint8_t *bits = block->bits + j * block->bits_stride;
        lanes[j] = lanes_of_bits(p, bits, block->bits_query, w->call->rows.group) & real;
        found |= (lanes[j] ? FA_MASK_SHOWS : 0u) | (lanes[j] != real ? FA_MASK_HIDES : 0u);
        for (int g = 0; g < groups; g++)
            if (lanes[j] >> (g * FA_ROW_STEP) & 0xffff) {
                w->keys_of[g].from = fa_min(w->keys_of[g].from, j);
                w->keys_of[g].to = j + 1;
            }
    }
    if (found != (FA_MASK_SHOWS | FA_MASK_HIDES)) return found;
    for (int64_t j = 0; j < block->keys; j++)
        for (int r = 0; r < p->padded; r += 4) {
            const float *four = hidden[lanes[j] >> r & 15];
            float *bias = w->bias + j * ld + r;
            if (!w->call->args->mask)
                memcpy(bias, four, sizeof *hidden);
            else
                for (int i = 0; i < 4; i++) bias[i] = four[i] == 0.0f ? bias[i] : four[i];
        }
    return found;
}

/* The block's bias: the mask, and the element mask. */
static unsigned block_bias(fa_work *w, const fa_key_block *block) {
    const fastattn_attention_args *a = w->call->args;
    unsigned found = FA_MASK_SHOWS;
    for (int g = 0; g < w->panel.padded / FA_ROW_STEP; g++) w->keys_of[g].from = 0, w->keys_of[g].to = block->keys;
    if (a->mask) {
        fastattn_panel_mask(w->call, &w->panel, block->first);
        found = w->call->uk->mask(w->bias, w->call->rows.ld, w->panel.rows_of, w->panel.padded, a->mask_strides[3],
                                  block->keys, a->mask_dtype);
    }
    if (block->bits && found & FA_MASK_SHOWS) {
        const unsigned of_bits = hide_by_bits(w, block);
        found = (found | of_bits) & (of_bits & FA_MASK_SHOWS ? ~0u : ~(unsigned)FA_MASK_SHOWS);
    }
    return found;
}

static float relative(int64_t key, int64_t first, int64_t keys) {
    return (float)fa_max(0, fa_min(key - first, keys));
}

/* The rules of a block; the panel's vectors are filled for it. */
static fa_score_rules block_rules(const fa_work *w, const fa_key_block *block, int biased) {
    const fastattn_attention_args *a = w->call->args;
    const fa_panel *p = &w->panel;
    fa_score_rules rules = {w->call->natural ? a->scale : 1.0f, a->softcap, NULL, NULL, NULL, NULL, NULL};
    if (a->alibi_slopes) {
        for (int r = 0; r < p->padded; r++) p->offset_of[r] = (float)(p->query[r] + p->offset - block->first);
        rules.slopes = p->slopes;
        rules.offset = p->offset_of;
    }
    if (block->partial) {
        for (int r = 0; r < p->padded; r++) {
            p->begin_of[r] = relative(p->begin[r], block->first, block->keys);
            p->end_of[r] = relative(p->end[r], block->first, block->keys);
        }
        rules.begin = p->begin_of;
        rules.end = p->end_of;
    }
    if (biased) rules.bias = w->bias;
    return rules;
}

static fa_score_rules rules_from(const fa_score_rules *rules, int row, int64_t key, int ld) {
    fa_score_rules moved = *rules;
    if (rules->slopes) moved.slopes += row, moved.offset += row;
    if (rules->end) moved.begin += row, moved.end += row;
    if (rules->bias) moved.bias += key * ld + row;
    return moved;
}

/* o = o * alpha + v p where v holds NaN or infinities and some row does not see some key: 0 * NaN must not reach such a
 * row. What is finite goes through pv as ever, so that no other row's bits change; the rest is added to the rows that
 * see it. */
static void careful_pv(fa_work *w, const fa_operands *x, const fa_score_rules *rules, int row, int rows, int64_t from,
                       int64_t keys) {
    const int ld = w->call->rows.ld;
    const int64_t dim = w->state.v_head_dim;
    float *o = w->state.o + row, unused[FA_PANEL_ROWS] = {0};
    /* The rules applied to zeros: -inf exactly where hidden. */
    for (int64_t j = 0; j < keys; j++)
        for (int r = 0; r < rows; r++) w->shown[j * ld + r] = 0.0f;
    w->call->uk->scores(w->shown, ld, rows, from, keys, rules, unused);

    for (int64_t j = 0; j < keys; j++)
        for (int64_t d = 0; d < dim; d++) {
            const float v = x->v[(from + j) * x->v_stride + d];
            w->finite_v[j * dim + d] = isfinite(v) ? v : 0.0f;
        }
    w->call->uk->pv(o, w->panel.alpha + row, w->s + row, ld, rows, w->finite_v, dim, keys, dim);
    for (int64_t j = 0; j < keys; j++)
        for (int64_t d = 0; d < dim; d++) {
            const float v = x->v[(from + j) * x->v_stride + d];
            if (isfinite(v)) continue;
            for (int r = 0; r < rows; r++)
                if (w->shown[j * ld + r] != -INFINITY) o[d * ld + r] += w->s[j * ld + row + r] * v;
        }
}

/* One step of the loop, for `rows` rows from `row` on and `keys` keys from `from` of the block on. */
static void step(fa_work *w, const fa_operands *x, int row, int rows, int64_t from, int64_t keys) {
    const fa_call *call = w->call;
    const fa_ukernel *uk = call->uk;
    const int ld = call->rows.ld;
    const fa_score_rules rules = rules_from(&x->rules, row, from, ld);
    fa_state *t = &w->state;
    float *s = w->s + row, *alpha = w->panel.alpha + row;

    uk->qk(s, w->q + row, ld, rows, x->k + from * x->k_stride, x->k_stride, keys, call->args->head_dim);
    if (x->ruled)
        uk->scores(s, ld, rows, from, keys, &rules, t->seen + row);
    else
        for (int r = row; r < row + rows; r++) t->seen[r] = 1.0f;
    uk->softmax(s, ld, rows, keys, call->exponent, t->m + row, t->l + row, alpha);
    if (x->careful)
        careful_pv(w, x, &rules, row, rows, from, keys);
    else
        uk->pv(t->o + row, alpha, s, ld, rows, x->v + from * x->v_stride, x->v_stride, keys, t->v_head_dim);
}

/* The steps of a block. At an edge, where it saves a quarter of the work or more, every FA_ROW_STEP rows take just the
 * keys that one of them sees, in whole runs of the softmax's sum, so that leaving keys out changes no bit. */
static void steps(fa_work *w, const fa_operands *x, const fa_key_block *block) {
    const fa_panel *p = &w->panel;
    const int groups = p->padded / FA_ROW_STEP;
    int64_t narrowed = 0;
    for (int g = 0; g < groups; g++) {
        int64_t from = w->keys_of[g].from, to = w->keys_of[g].to;
        if (block->partial) {
            from = fa_max(from, (int64_t)p->begin_of[g * FA_ROW_STEP]);
            to = fa_min(to, (int64_t)p->end_of[(g + 1) * FA_ROW_STEP - 1]);
        }
        w->keys_of[g].from = from / FA_SUM_RUN * FA_SUM_RUN;
        w->keys_of[g].to = from < to ? fa_min(fa_round_up(to, FA_SUM_RUN), block->keys) : w->keys_of[g].from;
        narrowed += w->keys_of[g].to - w->keys_of[g].from;
    }
    if (4 * narrowed > 3 * groups * block->keys) {
        step(w, x, 0, p->padded, 0, block->keys);
        return;
    }
    for (int g = 0; g < groups; g++) {
        const int64_t from = w->keys_of[g].from, keys = w->keys_of[g].to - from;
        if (keys > 0) step(w, x, g * FA_ROW_STEP, FA_ROW_STEP, from, keys);
    }
}

/* With few rows the loop waits for memory, and the columns in which pv walks through V hide from the hardware what comes
 * next: ask for this block's values, and for as many keys after it. (What is widened is read in order anyway.) */
static void fetch_ahead(const fa_call *call, const fa_panel *p, const fa_key_block *block) {
    const fastattn_attention_args *a = call->args;
    const int64_t after = block->first + block->keys, itemsize = sizeof(float);
    const char *k = (const char *)a->k + p->batch * a->k_strides[0] + p->kv_head * a->k_strides[1];
    const char *v = (const char *)a->v + p->batch * a->v_strides[0] + p->kv_head * a->v_strides[1];
    call->uk->fetch(v + block->first * a->v_strides[2], a->v_strides[2], block->keys, a->v_head_dim * itemsize);
    call->uk->fetch(k + after * a->k_strides[2], a->k_strides[2], fa_min(block->keys, p->end_key - after),
                    a->head_dim * itemsize);
}

static void run_block(fa_work *w, const fa_key_block *block) {
    const fa_call *call = w->call;
    const fastattn_attention_args *a = call->args;
    const fa_panel *p = &w->panel;
    const unsigned found = block_bias(w, block);
    if (!(found & FA_MASK_SHOWS)) return;
    if (p->padded == FA_ROW_STEP && a->kv_dtype == FASTATTN_FLOAT32) fetch_ahead(call, p, block);
    const int biased = found & FA_MASK_HIDES || (a->mask && a->mask_dtype != FASTATTN_BOOL);
    fa_operands x;
    x.k = block_rows(call, a->k, a->k_strides, p, block, a->head_dim, w->k, &x.k_stride);
    x.v = block_rows(call, a->v, a->v_strides, p, block, a->v_head_dim, w->v, &x.v_stride);
    x.rules = block_rules(w, block, biased);
    x.ruled = call->natural || block->partial || biased;
    x.careful = (block->partial || found & FA_MASK_HIDES) &&
                !call->uk->finite(x.v, x.v_stride, block->keys, a->v_head_dim);
    steps(w, &x, block);
}

/* Everything that the caller will see of a panel. */
static void finish(const fa_call *call, const fa_panel *p, const fa_state *state) {
    const fastattn_attention_args *a = call->args;
    float factor[FA_PANEL_ROWS] = {0};
    for (int r = 0; r < p->rows; r++) {
        const int64_t head = p->head_of[r];
        float *lse = a->lse ? (float *)((char *)a->lse + p->batch * a->lse_strides[0] + head * a->lse_strides[1] +
                                        p->query[r] * a->lse_strides[2])
                            : NULL;
        factor[r] = fastattn_state_finish(state, r, call->unit, a->sinks ? a->sinks + head : NULL, lse);
    }
    call->uk->unpack(p->outputs, p->rows, state->o, (int)state->ld, factor, a->v_head_dim, a->q_dtype);
}

/* The workspace: scratch for each worker, then the states of the items where keys are split. */
typedef struct fa_job {
    fa_call call;
    char *workspace;
} fa_job;

static char *scratch_of(const fa_job *job, int worker) {
    return job->workspace + job->call.scratch.bytes * (size_t)worker;
}

static fa_state partial_state(const fa_job *job, int64_t item) {
    const fa_call *call = &job->call;
    const int workers = call->args->num_threads > 1 ? call->args->num_threads : 1;
    return fastattn_state_at(scratch_of(job, workers) + call->partial_bytes * (size_t)item, call->rows.ld,
                             call->args->v_head_dim);
}

/* Phase 0: attention of one panel over one part of the keys. */
static void run_item(const void *context, int64_t item, int worker) {
    const fa_job *job = context;
    const fa_call *call = &job->call;
    const fastattn_attention_args *a = call->args;
    const fa_scratch *at = &call->scratch;
    char *scratch = scratch_of(job, worker);
    fa_work w = {.call = call,
                 .panel = fastattn_panel_of(call, item, scratch + at->rows),
                 .q = (float *)(scratch + at->q),
                 .s = (float *)(scratch + at->s),
                 .bias = (float *)(scratch + at->bias),
                 .shown = (float *)(scratch + at->shown),
                 .k = (float *)(scratch + at->k),
                 .v = (float *)(scratch + at->v),
                 .finite_v = (float *)(scratch + at->finite_v)};
    w.state = call->splits > 1 ? partial_state(job, item)
                               : fastattn_state_at(scratch + at->o, call->rows.ld, a->v_head_dim);
    fastattn_state_clear(&w.state);
    fastattn_panel_queries(call, &w.panel);
    call->uk->pack(w.q, call->rows.ld, w.panel.rows_of, w.panel.padded, a->head_dim, a->q_dtype, call->sign);

    fa_key_blocks blocks = fastattn_key_blocks(call, &w.panel);
    fa_key_block block;
    while (fastattn_next_key_block(&blocks, &block)) run_block(&w, &block);
    if (call->splits == 1) finish(call, &w.panel, &w.state);
}

/* Phase 1: the parts of one panel become one. */
static void merge_item(const void *context, int64_t item, int worker) {
    const fa_job *job = context;
    const fa_call *call = &job->call;
    const fa_panel panel = fastattn_panel_of(call, item * call->splits, scratch_of(job, worker) + call->scratch.rows);
    fa_state state = partial_state(job, item * call->splits);
    for (int64_t part = 1; part < call->splits; part++) {
        const fa_state other = partial_state(job, item * call->splits + part);
        fastattn_state_merge(&state, &other, call->exponent);
    }
    finish(call, &panel, &state);
}

static int64_t phase_items(const fa_call *call, int phase) {
    if (phase == 0) return call->items;
    return phase == 1 && call->splits > 1 ? call->items / call->splits : 0;
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
    fastattn_for_each(phase_items(&job.call, 0), job.call.threads, run_item, &job);
    fastattn_for_each(phase_items(&job.call, 1), job.call.threads, merge_item, &job);
    free(own);
    return FASTATTN_OK;
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
        worker >= (args->num_threads > 1 ? args->num_threads : 1))
        return FASTATTN_ERROR_ARGUMENT;
    fastattn_for_range(item, item + 1, worker, phase == 0 ? run_item : merge_item, &job);
    return FASTATTN_OK;
}
