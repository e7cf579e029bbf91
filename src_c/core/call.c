#include "call.h"

#include "../cpu/fpenv.h"
#include "../ukernel/storage.h"
#include "ints.h"
#include "state.h"

#include <float.h>
#include <math.h>

static fa_rows plan_rows(const fastattn_attention_args *a, int most) {
    fa_rows r;
    const fastattn_block_mask *blocks = a->block_mask;
    r.group = a->num_heads / a->num_kv_heads;
    if (blocks && blocks->head_stride != 0) r.group = 1;
    r.sequences = a->num_heads / r.group;
    r.count = a->q_len * r.group;
    r.segment = blocks ? fa_min(blocks->block_size * r.group, r.count) : r.count;
    r.panels_a_segment = fa_ceil_div(r.segment, most);
    /* Panels of a long sequence are full; those of a block row share it evenly, or a ragged one would come with each. */
    const int64_t even = blocks ? fa_ceil_div(r.segment, r.panels_a_segment) : fa_min(r.segment, most);
    r.panel_rows = (int)fa_min(fa_round_up(even, FA_ROW_STEP), r.segment);
    r.panels_a_segment = fa_ceil_div(r.segment, r.panel_rows);
    r.panels = r.count / r.segment * r.panels_a_segment + fa_ceil_div(r.count % r.segment, r.panel_rows);
    r.ld = (int)fa_round_up(r.panel_rows, FA_ROW_STEP);
    return r;
}

/* Few rows over many keys leave threads idle, so the keys are split; the parts are merged exactly. The number depends on
 * one batch entry's shape alone, never on the threads or the batch: results must not. */
static void plan_splits(fa_call *call) {
    enum { WANTED_ITEMS = 64, FEWEST_KEYS = 1024 };
    const int64_t of_entry = call->rows.sequences * call->rows.panels, keys = call->args->kv_len;
    const int64_t wanted = fa_min(fa_ceil_div(WANTED_ITEMS, of_entry), keys / FEWEST_KEYS);
    call->split_keys = keys;
    if (wanted > 1) call->split_keys = fa_round_up(fa_ceil_div(keys, wanted), call->block_keys);
    call->splits = call->split_keys > 0 ? fa_ceil_div(keys, call->split_keys) : 1;
}

/* Whether rows of so many numbers leave gaps, as those of heads side by side do. */
static int apart(int64_t stride, int64_t dim, int64_t size) { return stride > dim * size || stride < -dim * size; }

/* Whether keys and values are multiplied where they lie. Rows apart are not, if more than one panel reads them: distances are
 * often such that all rows want the same few lines of a cache. */
static int as_stored(const fa_call *call, const fa_products *products) {
    return products->in_place && call->args->kv_dtype == FASTATTN_FLOAT32 && !(call->apart && call->rows.panels > 1);
}

/* What keys and values have to be turned into first is turned for several panels at a time, if there are enough for all
 * threads. Results do not depend on it. */
static void plan_bundles(fa_call *call) {
    enum { ITEMS_A_THREAD = 8, MOST_ROWS = FA_MOST_BUNDLE * FA_ROW_STEP };
    const fastattn_attention_args *a = call->args;
    const int64_t parts = call->panels * call->splits, threads = fa_max(a->num_threads, 1);
    const int64_t most = fa_min(parts / (threads * ITEMS_A_THREAD), MOST_ROWS / call->rows.ld);
    call->bundle = as_stored(call, call->products) ? 1 : fa_max(1, most);
    call->bundle = fa_min(call->bundle, call->rows.panels);
    call->bundles = fa_ceil_div(call->rows.panels, call->bundle);
    call->items = a->batch * call->rows.sequences * call->bundles * call->splits;
}

/* Some number of multiplications; a panel takes as long as a few more. */
static double work_of(const fa_call *call) {
    const double of_panel = 5e4;
    const fastattn_attention_args *a = call->args;
    return (double)call->items * (double)call->bundle *
           (of_panel + (double)call->rows.ld * (double)fa_min(call->split_keys, a->kv_len) *
                           (double)(a->head_dim + a->v_head_dim));
}

/* Threads cost microseconds to wake, far more on a busy machine; each must have `enough` to do, some 20 microseconds. Nobody needs
 * to interrupt what ends in milliseconds. Results do not depend on either. */
static void plan_team(fa_call *call, double work) {
    const double enough = 2e6, worth_interrupting = 1e9;
    const fastattn_attention_args *a = call->args;
    const double threads = fmin((double)fa_min(a->num_threads, call->items), work / enough);
    call->team.threads = threads < 2 ? 1 : (int)threads;
    call->team.threading = a->threading == FASTATTN_THREADING_DEFAULT ? FASTATTN_THREADING_POOL : a->threading;
    call->team.interrupted = work < worth_interrupting ? NULL : a->interrupted;
    call->team.interrupted_context = a->interrupted_context;
}

static size_t take(size_t *bytes, int64_t count, size_t size) {
    const size_t at = *bytes;
    *bytes += ((size_t)count * size + 63) / 64 * 64;
    return at;
}

static fastattn_status plan_memory(fa_call *call) {
    const fastattn_attention_args *a = call->args;
    const int64_t ld = call->rows.ld, keys = call->block_keys;
    fa_scratch *m = &call->scratch;
    size_t bytes = 0;
    /* Products may pad keys and the numbers of one to whole tiles, of which there is one at least, and values by half a tile
     * more. */
    const int64_t tiled_keys = fa_round_up(keys, FA_TILE), tiled_dim = fa_round_up(fa_max(a->head_dim, 1), FA_TILE);
    const int64_t tiled_v_dim = fa_round_up(fa_max(a->v_head_dim, 1), FA_TILE);
    const int in_place = call->products->in_place;
    m->s = take(&bytes, tiled_keys * ld, sizeof(float));
    m->p = take(&bytes, in_place ? 0 : tiled_keys * ld, sizeof(float));
    m->bias = take(&bytes, tiled_keys * ld, sizeof(float));
    m->shown = take(&bytes, tiled_keys * ld, sizeof(float));
    const fa_ways ways = fastattn_ways(call);
    size_t panel = 0;
    for (int way = 0; way < FA_WAYS; way++) {
        const int64_t wanted = way == FA_PREFERRED || (way == FA_EXACT && call->products->fits);
        const int64_t prepared = wanted && !as_stored(call, ways.of[way]);
        m->k[way] = take(&bytes, prepared * (tiled_keys + FA_TILE) * tiled_dim, sizeof(float));
        m->v[way] = take(&bytes, prepared * (tiled_keys + FA_TILE) * tiled_v_dim, sizeof(float));
        m->prepared[way] = (int)prepared;
        m->panel.q[way] = take(&panel, wanted * tiled_dim * ld, sizeof(float));
    }
    m->panel.q[FA_FEW] = m->panel.q[FA_PREFERRED]; /* a panel takes one of these ways */
    m->finite_v = take(&bytes, keys * a->v_head_dim, (size_t)fa_size_of(a->kv_dtype));
    m->panel.o = take(&panel, 1, fastattn_state_bytes(ld, a->v_head_dim));
    m->panel.rows = take(&panel, ld, 6 * sizeof(float) + 2 * sizeof(void *) + 4 * sizeof(int64_t));
    m->panel.bytes = panel;
    m->panels = take(&bytes, call->bundle, panel);
    m->bytes = bytes;
    call->partial_bytes = call->splits > 1 ? fastattn_state_bytes(ld, a->v_head_dim) : 0;
    const int64_t partials = call->panels * call->splits;
    const int workers = a->num_threads > 1 ? a->num_threads : 1;
    const size_t most = SIZE_MAX / 4;
    if (m->bytes > most / (size_t)workers ||
        (call->partial_bytes > 0 && (size_t)partials > most / call->partial_bytes))
        return FASTATTN_ERROR_MEMORY;
    call->workspace = m->bytes * (size_t)workers + call->partial_bytes * (size_t)partials;
    return FASTATTN_OK;
}

static fastattn_status plan(fa_call *call, const fastattn_attention_args *given) {
    const fastattn_attention_args *args = &call->own.attention;
    fastattn_status status = fastattn_check_args(&call->own, given);
    if (status != FASTATTN_OK) return status;
    call->args = args;
    call->uk = fastattn_ukernel_select(args->isa);
    if (!call->uk) return FASTATTN_ERROR_ISA;
    call->products = fastattn_products_select(args->isa, args->q_dtype, args->precision);
    call->items = call->panels = 0;
    call->workspace = 0;
    call->splits = 1;
    call->block_keys = 0;
    plan_team(call, 0);
    if (args->batch == 0 || args->num_heads == 0 || args->q_len == 0) return FASTATTN_OK;

    /* A scale of one sign is left to the softmax, which multiplies anyway; the sign goes into q, and so does a scale
     * of 0. Other rules need the finished score. */
    call->natural = args->softcap != 0.0f || args->alibi_slopes || (args->mask && args->mask_dtype != FASTATTN_BOOL);
    const double log2_e = 1.44269504088896341;
    call->sign = call->natural || args->scale > 0 ? 1.0f : args->scale < 0 ? -1.0f : 0.0f;
    call->unit = call->natural || args->scale == 0 ? 1.0 : fabs((double)args->scale);
    call->exponent = (float)fmin(call->unit * log2_e, FLT_MAX);

    call->rows = plan_rows(args, call->products->panel_rows);
    if (call->rows.panel_rows < call->products->fewest_rows) {
        call->products = call->uk->products;
        call->rows = plan_rows(args, call->products->panel_rows);
    }
    const int64_t size = fa_size_of(args->kv_dtype);
    call->apart = apart(args->k_strides[2], args->head_dim, size) || apart(args->v_strides[2], args->v_head_dim, size);
    call->panels = args->batch * call->rows.sequences * call->rows.panels;
    call->block_keys = fa_min(call->products->block_keys, args->kv_len > 0 ? args->kv_len : 1);
    plan_splits(call);
    plan_bundles(call);
    plan_team(call, work_of(call));
    return plan_memory(call);
}

/* The plan, too, is made in the default floating-point environment, so that neither do results depend on the caller's
 * rounding nor its exception flags on the plan. */
fastattn_status fastattn_call_prepare(fa_call *call, const fastattn_attention_args *args) {
    const fa_fpenv found = fa_fpenv_default();
    const fastattn_status status = plan(call, args);
    fa_fpenv_restore(found);
    return status;
}
