#include "call.h"

#include "../cpu/fpenv.h"
#include "../ukernel/storage.h"
#include "ints.h"
#include "panel.h"
#include "state.h"

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <string.h>

static fa_rows plan_rows(const fa_call *call, int64_t q_len, int most) {
    fa_rows r;
    const fastattn_block_mask *blocks = call->args->block_mask;
    r.count = q_len * call->heads.group;
    /* Queries that see the same blocks, or keys. */
    const int64_t queries = FA_UNLIKELY(blocks) ? blocks->block_size : FA_UNLIKELY(call->args->indices) ? 1 : q_len;
    r.segment = fa_min(queries, q_len) * call->heads.group;
    r.panels_a_segment = fa_ceil_div(r.segment, most);
    /* Panels of a long sequence are full; those of a segment share it evenly, or a ragged one would come with each. */
    const int64_t even = blocks || call->args->indices ? fa_ceil_div(r.segment, r.panels_a_segment) : fa_min(r.segment, most);
    r.panel_rows = (int)fa_min(fa_round_up(even, FA_ROW_STEP), r.segment);
    r.panels_a_segment = fa_ceil_div(r.segment, r.panel_rows);
    r.panels = r.count / r.segment * r.panels_a_segment + fa_ceil_div(r.count % r.segment, r.panel_rows);
    r.ld = (int)fa_round_up(r.panel_rows, FA_ROW_STEP);
    return r;
}

/* Few rows over many keys leave threads idle, so the keys are split; the parts are merged exactly. The number depends on
 * one batch entry's shape alone, never on the threads or the batch: results must not. Where rows are invariant, parts do not
 * depend on the number of rows or keys either, and an item that takes all of them merges them as those are merged that have items of
 * their own. */
static void plan_splits(const fa_call *call, fa_shape *shape) {
    enum { WANTED_ITEMS = 64, FEWEST_KEYS = 1024, MOST_PARTIALS = 1 << 26 };
    const int64_t of_entry = call->heads.sequences * call->heads.beside * shape->rows.panels;
    const int64_t keys = shape->kv_len, parts = fa_ceil_div(keys, FEWEST_KEYS), most = keys / FEWEST_KEYS;
    const int64_t wanted = most > 1 ? fa_min(fa_ceil_div(WANTED_ITEMS, of_entry), most) : 1;
    const double partials = (double)parts * (double)of_entry * (double)fastattn_state_bytes(shape->rows.ld, call->args->v_head_dim);
    shape->split_keys = keys;
    if (wanted > 1 && !call->args->invariant) shape->split_keys = fa_round_up(fa_ceil_div(keys, wanted), shape->block_keys);
    if (wanted > 1 && call->args->invariant && partials < MOST_PARTIALS) shape->split_keys = FEWEST_KEYS;
    if (FA_UNLIKELY(call->args->segments)) shape->split_keys = keys; /* sums are in the output, which parts would share */
    shape->splits = shape->split_keys > 0 ? fa_ceil_div(keys, shape->split_keys) : 1;
    shape->state_keys = call->args->invariant ? FEWEST_KEYS : fa_max(shape->split_keys, 1);
}

/* Whether rows of so many bytes leave gaps, as those of heads side by side do. */
static int apart(int64_t stride, int64_t bytes) { return stride > bytes || stride < -bytes; }

/* Whether keys and values are multiplied where they lie. Rows apart are not, if more than one panel reads them: distances are
 * often such that all rows want the same few lines of a cache; and those in pages, or chosen, have no stride. (Products by rows need none.) */
static int as_stored(const fa_call *call, const fa_shape *shape, const fa_products *products) {
    if (FA_UNLIKELY(call->stored.quantised)) return products->in_place;
    if (FA_UNLIKELY(call->args->block_table || call->args->indices)) return 0;
    return products->in_place && call->args->kv_dtype == FASTATTN_FLOAT32 && !(call->stored.apart && shape->rows.panels > 1);
}

/* Rows for which it pays to make float32 of quantised keys, and of that what their products want. */
enum { SHARE_WHAT_IS_DECODED = 49 };

static void plan_shape(fa_shape *shape, const fa_call *call, int64_t q_len, int64_t kv_len) {
    const fa_products *products = call->products;
    if (FA_UNLIKELY(q_len == 0)) {
        *shape = (fa_shape){.kv_len = kv_len, .products = products, .splits = 1};
        return;
    }
    const fa_products *alone = call->args->kv_dtype == FASTATTN_BFLOAT16 ? products->alone : NULL;
    /* Lanes give a row the same bits however few there are, and none other do but float32 where keys are turned. */
    const int many = kv_len >= FA_MANY_KEYS, decodes = call->args->additive || call->stored.quantised;
    const int any_rows = call->args->invariant && (products != call->exact || decodes);
    const int64_t together = (FA_UNLIKELY(call->args->indices) ? 1 : q_len) * call->heads.group; /* rows that could be in one panel */
    const fa_products *fewer = !alone ? NULL : call->args->invariant ? alone->turned : alone->fewer;
    if (fewer && together <= fewer->panel_rows) alone = fewer;
    if (alone && (many || any_rows) && together <= alone->panel_rows) products = alone;
    shape->rows = plan_rows(call, q_len, products->panel_rows);
    if (products != call->exact && shape->rows.panel_rows < products->fewest_rows && !any_rows) {
        products = call->exact;
        shape->rows = plan_rows(call, q_len, products->panel_rows);
    }
    shape->q_len = q_len;
    shape->kv_len = kv_len;
    shape->products = products;
    shape->block_keys = fa_min(products->block_keys, kv_len > 0 ? kv_len : 1);
    const int decoded = call->stored.quantised && !call->stored.widened; /* by the products for few rows */
    const int fewest = decoded ? SHARE_WHAT_IS_DECODED : fa_fewest_rows(products, call->args->head_dim, kv_len);
    shape->few_below = any_rows ? 1 : fewest;
    shape->full_lanes = products == call->uk->products && !call->stored.quantised;
    plan_splits(call, shape);
    const fa_ways ways = fastattn_ways(call, shape);
    const int taken[FA_WAYS] = {1, products->fits != NULL, call->stored.widened}; /* for more than what is as it has to be */
    for (int way = 0; way < FA_WAYS; way++) shape->prepared[way] = taken[way] && !as_stored(call, shape, ways.of[way]);
}

static int64_t keys_of(const fastattn_attention_args *a, int64_t b) {
    return (FA_UNLIKELY(a->kv_lengths) ? a->kv_lengths[b] : fastattn_kv_room(a, b)) - (FA_UNLIKELY(a->kv_starts) ? a->kv_starts[b] : 0);
}

/* The shape of entry b, as far as the caller gives it. */
static void lengths_of(const fastattn_attention_args *a, int64_t b, int64_t *q_len, int64_t *kv_len) {
    *q_len = FA_UNLIKELY(a->q_lengths) ? a->q_lengths[b] : fastattn_q_room(a, b);
    *kv_len = FA_UNLIKELY(a->indices) ? a->num_indices : keys_of(a, b);
}

/* Where entry b lies: what is not its shape. */
static void place(const fastattn_attention_args *a, int64_t b, fa_entry *entry) {
    entry->batch = b;
    entry->query = FA_UNLIKELY(a->cu_seqlens_q) ? a->cu_seqlens_q[b] : 0;
    entry->q_room = fastattn_q_room(a, b);
    entry->start = FA_UNLIKELY(a->kv_starts) ? a->kv_starts[b] : 0;
    entry->key = (FA_UNLIKELY(a->cu_seqlens_k) ? a->cu_seqlens_k[b] : 0) + entry->start;
    entry->keys = keys_of(a, b);
    entry->offset = FA_UNLIKELY(a->query_offset) ? fa_reach(a->query_offset[b]) - entry->start : entry->keys - entry->shape.q_len;
}

static int of_shape(const fa_shape *shape, int64_t q_len, int64_t kv_len) { return shape->q_len == q_len && shape->kv_len == kv_len; }

/* What all entries come to. */
typedef struct fa_totals {
    double parts, work, partials;        /* panels times parts of their keys, multiplications, and bytes of states */
    int64_t queries, panels, block_keys; /* the most that an entry has */
    int ld, prepared[FA_WAYS];           /* the most, and whether any has them */
    int p_apart, by_turns;               /* powers need room of their own, and so do states of several parts */
} fa_totals;

/* Multiplications that a panel takes as long as, besides its own. */
enum { WORK_OF_PANEL = 50000 };

static void count_shape(const fa_call *call, fa_totals *t, const fa_shape *shape, int64_t entries) {
    const fastattn_attention_args *a = call->args;
    if (FA_UNLIKELY(shape->q_len == 0)) return;
    const double parts = (double)entries * (double)(call->heads.sequences * shape->rows.panels * shape->splits);
    const double dims = (double)(a->head_dim + a->v_head_dim);
    t->parts += parts;
    t->work += parts * (WORK_OF_PANEL + (double)shape->rows.ld * (double)shape->split_keys * dims);
    if (shape->splits > 1) t->partials += parts * (double)fastattn_state_bytes(shape->rows.ld, a->v_head_dim);
    t->ld = t->ld > shape->rows.ld ? t->ld : shape->rows.ld;
    t->queries = fa_max(t->queries, shape->q_len);
    t->panels = fa_max(t->panels, shape->rows.panels);
    t->block_keys = fa_max(t->block_keys, shape->block_keys);
    for (int way = 0; way < FA_WAYS; way++) t->prepared[way] |= shape->prepared[way];
    t->p_apart |= !shape->products->in_place;
    t->by_turns |= shape->split_keys > shape->state_keys;
}

static fa_totals survey(fa_call *call) {
    const fastattn_attention_args *a = call->args;
    fa_shape *shape = &call->shape;
    fa_totals t = {0};
    int64_t entries = 0; /* of this shape, not counted yet */
    if (!fastattn_ragged(a)) {
        plan_shape(shape, call, a->q_len, FA_UNLIKELY(a->indices) ? a->num_indices : a->kv_len);
        entries = a->batch;
    }
    for (int64_t b = 0; b < a->batch && fastattn_ragged(a); b++) {
        int64_t q_len, kv_len;
        lengths_of(a, b, &q_len, &kv_len);
        if (b == 0 || !of_shape(shape, q_len, kv_len)) {
            if (entries > 0) count_shape(call, &t, shape, entries);
            plan_shape(shape, call, q_len, kv_len);
            entries = 0;
        }
        entries++;
    }
    count_shape(call, &t, shape, entries);
    return t;
}

/* What keys and values have to be turned into first is turned for several panels at a time, if there are enough for all
 * threads. Results do not depend on it. */
static void plan_bundles(fa_call *call, const fa_totals *totals) {
    enum { ITEMS_A_THREAD = 8, MOST_ROWS = FA_MOST_BUNDLE * FA_ROW_STEP };
    call->most_bundle = 1;
    if (!(totals->prepared[FA_PREFERRED] || call->stored.quantised)) return;
    const double enough = (double)fa_max(call->args->num_threads, 1) * ITEMS_A_THREAD;
    const int64_t most = fa_min(MOST_ROWS / fa_max(totals->ld, 1), totals->panels);
    call->most_bundle = fa_max(1, totals->parts / enough < (double)most ? (int64_t)(totals->parts / enough) : most);
}

/* Whether the rows of a key, one of each head, lie side by side, as those of a single key do in any memory, or in pages at least in the
 * same page. */
static int heads_together(const fa_call *call) {
    const fastattn_attention_args *a = call->args;
    if (a->indices || call->stored.widened || call->heads.sequences != a->num_kv_heads) return 0;
    if (a->block_table) return a->k_strides[1] < a->k_strides[0] && a->v_strides[1] < a->v_strides[0];
    return a->k_strides[1] == call->stored.k_bytes && a->v_strides[1] == call->stored.v_bytes;
}

/* Heads that lie together are read together, if each is a panel of few rows: what one of them has of a page, of memory's or of the
 * caller's, is a piece that nothing foresees, and shares its first line and its last with the rows of other heads. They take a run of
 * keys by turns; but side by side, heads of one row are one panel, for which memory is read in its own order, unless pointers lead to it, as
 * in pages: turns are quicker then. Such panels are all alike, so that one for each thread is enough. No bit depends on it. */
static void plan_abreast(fa_call *call, const fa_totals *totals) {
    enum { ITEMS_A_THREAD = 2, BYTES = 4096 };
    const fastattn_attention_args *a = call->args;
    if (!heads_together(call)) return;
    const int64_t row_bytes = fa_max(fa_max(call->stored.k_bytes, call->stored.v_bytes), 1);
    const int64_t most = fa_min(BYTES / row_bytes, fa_min(FA_MOST_ABREAST, call->heads.sequences));
    const double of_thread = totals->parts / (double)fa_max(a->num_threads, 1);
    const int64_t parts = of_thread < (double)FA_MOST_ABREAST * ITEMS_A_THREAD ? (int64_t)of_thread : FA_MOST_ABREAST * ITEMS_A_THREAD;
    const int64_t one_row = totals->queries == 1 && call->heads.group == 1 && !a->block_mask && !a->block_table;
    int64_t beside = fa_max(1, fa_min(fa_min(parts, most), one_row * call->few->most_beside));
    while (call->heads.sequences % beside != 0) beside--;
    if (beside == 1) {
        call->abreast = fa_max(1, fa_min(parts / ITEMS_A_THREAD, most));
        return;
    }
    call->heads.beside = call->heads.group = beside;
    call->heads.sequences /= beside;
}

/* Threads cost microseconds to wake, far more on a busy machine; each must have so many multiplications to do, some 20
 * microseconds. Nobody needs to interrupt what ends in milliseconds. Results do not depend on either. */
enum { WORTH_A_THREAD = 2000000 };

static void plan_team(fa_call *call, double work) {
    const double worth_interrupting = 1e9;
    const fastattn_attention_args *a = call->args;
    const double threads = work / WORTH_A_THREAD;
    call->team = (fa_team){.threads = a->num_threads < 2 || threads < 2 ? 1
                                      : threads < a->num_threads        ? (int)threads
                                                                        : a->num_threads,
                           .threading = a->threading == FASTATTN_THREADING_DEFAULT ? FASTATTN_THREADING_POOL : a->threading,
                           .interrupted = work < worth_interrupting ? NULL : a->interrupted,
                           .interrupted_context = a->interrupted_context};
}

/* Room for so many of a size. */
static size_t take(uint64_t *bytes, int64_t count, size_t size) {
    const uint64_t at = *bytes;
    *bytes = at + ((uint64_t)count * size + 63) / 64 * 64;
    return (size_t)at;
}

/* No worker's scratch is more than 2**48 bytes, so that only what there are many of has to be counted with care. */
static fastattn_status plan_memory(fa_call *call, const fa_totals *totals) {
    const double most_bytes = (double)(SIZE_MAX / 8);
    const fastattn_attention_args *a = call->args;
    const int64_t ld = totals->ld, keys = totals->block_keys;
    fa_scratch *m = &call->scratch;
    uint64_t bytes = 0, panel = 0;
    /* Products may pad keys and the numbers of one to whole tiles, of which there is one at least, and values by half a tile
     * more. */
    const int64_t tiled_keys = fa_round_up(keys, FA_TILE), tiled_dim = fa_round_up(fa_max(call->panel_dim, 1), FA_TILE);
    const int64_t tiled_v_dim = fa_round_up(fa_max(a->v_head_dim, 1), FA_TILE);
    m->s = take(&bytes, tiled_keys * ld, sizeof(float));
    m->p = take(&bytes, totals->p_apart * tiled_keys * ld, sizeof(float));
    m->bias = take(&bytes, tiled_keys * ld, sizeof(float));
    m->shown = take(&bytes, tiled_keys * ld, sizeof(float));
    for (int way = 0; way < FA_WAYS; way++) {
        const int64_t wanted = way == FA_PREFERRED || (way == FA_EXACT && call->products->fits), prepared = totals->prepared[way];
        m->k[way] = take(&bytes, prepared * (tiled_keys + FA_TILE) * tiled_dim, sizeof(float));
        m->v[way] = take(&bytes, prepared * (tiled_keys + FA_TILE) * tiled_v_dim, sizeof(float));
        m->panel.q[way] = take(&panel, wanted * tiled_dim * ld, sizeof(float));
    }
    m->panel.q[FA_FEW] = m->panel.q[FA_PREFERRED]; /* a panel takes one of these ways */
    call->pointers = FA_UNLIKELY(a->block_table || a->indices) ? fastattn_row_pointers(keys) : 0;
    m->k_rows = take(&bytes, call->abreast * call->pointers, sizeof(char *));
    m->v_rows = take(&bytes, call->abreast * call->pointers, sizeof(char *));
    m->wide_k = take(&bytes, call->stored.quantised * keys * a->head_dim, sizeof(float));
    m->wide_v = take(&bytes, call->stored.quantised * keys * a->v_head_dim, sizeof(float));
    const int64_t wide = call->stored.quantised * a->v_head_dim * (int64_t)sizeof(float);
    m->finite_v = take(&bytes, keys * fa_max(call->stored.v_bytes * call->heads.beside, wide), 1);
    const size_t state = fastattn_state_bytes(ld, a->v_head_dim);
    m->panel.o = take(&panel, 1, state);
    m->panel.total = take(&panel, totals->by_turns, state);
    m->panel.rows = take(&panel, 1, fastattn_panel_bytes((int)ld));
    m->panel.bytes = (size_t)panel;
    m->panels = take(&bytes, fa_max(call->most_bundle, call->abreast), (size_t)panel);
    m->bytes = (size_t)bytes;
    const double all = (double)a->batch * (double)sizeof(fa_entry) + (double)call->workers * (double)bytes + totals->partials;
    if (FA_UNLIKELY(all > most_bytes)) return FASTATTN_ERROR_MEMORY;
    uint64_t room = call->room.bytes;
    call->room.entries = take(&room, a->batch, sizeof(fa_entry));
    call->room.scratch = take(&room, call->workers, m->bytes);
    call->room.partials = take(&room, 1, (size_t)totals->partials);
    call->room.bytes = (size_t)room;
    return FASTATTN_OK;
}

/* Entries of one head, one query and one key are heads of one entry, where nothing is said of an entry or a head by itself: there may be
 * thousands of them, and heads have less of their own. */
static void join_entries(fastattn_attention_args *a) {
    if (a->batch < 2 || a->num_heads != 1 || a->q_len != 1 || a->kv_len != 1) return;
    const int told_apart = fastattn_ragged(a) || a->query_offset || a->mask || a->alibi_slopes || a->sinks || a->block_mask ||
                           a->block_table || a->indices || a->segments || a->activation_bias || a->additive || a->score_function;
    if (told_apart) return;
    a->num_heads = a->num_kv_heads = a->batch;
    a->batch = 1;
    a->q_strides[1] = a->q_strides[0];
    a->k_strides[1] = a->k_strides[0];
    a->v_strides[1] = a->v_strides[0];
    a->out_strides[1] = a->out_strides[0];
    a->lse_strides[1] = a->lse_strides[0];
}

static fastattn_status plan(fa_call *call, const fastattn_attention_args *given) {
    const fastattn_attention_args *args = &call->own.attention;
    fastattn_status status = fastattn_check_args(&call->own, given);
    if (status != FASTATTN_OK) return status;
    join_entries(&call->own.attention);
    call->args = args;
    call->room.entries = 0;
    call->room.bytes = (sizeof *call + 63) / 64 * 64;
    call->uk = fastattn_ukernel_select(args->isa);
    if (!call->uk) return FASTATTN_ERROR_ISA;
    call->exact = FA_UNLIKELY(args->additive) ? call->uk->additive : call->uk->products;
    call->stored.quantised = fa_is_quantised(args->kv_dtype);
    call->panel_dim = FA_UNLIKELY(args->additive) ? 2 * fa_sums_row(args->head_dim) : args->head_dim;
    /* Other products round the powers, and sum them as a softmax does. */
    const int rounds = !FA_UNLIKELY(args->additive || args->activation != FASTATTN_SOFTMAX || args->segments);
    call->products = rounds ? fastattn_products_select(call->uk, args->isa, args->q_dtype, args->precision, args->invariant) : call->exact;
    if (FA_UNLIKELY(args->additive)) call->few = call->uk->additive_few;
    else if (args->invariant) call->few = call->uk->turned;
    else call->few = fastattn_few_select(call->uk, call->products, args->isa, args->q_dtype, args->kv_dtype);
    call->stored.widened = args->kv_dtype != FASTATTN_FLOAT32 && !call->uk->few_quantised;
    if (FA_UNLIKELY(call->stored.quantised)) {
        const fa_products *few = rounds ? fastattn_quantised_select(call->uk, args->isa, args->q_dtype, args->precision)
                                        : call->uk->few_quantised;
        if (few) call->few = few;
    }
    call->workers = args->num_threads > 1 ? args->num_threads : 1;
    if (FA_UNLIKELY(args->batch == 0 || args->num_heads == 0 || args->q_len == 0)) {
        plan_team(call, 0);
        return FASTATTN_OK;
    }

    /* A scale of one sign is left to the softmax, which multiplies anyway; the sign goes into q, and so does a scale
     * of 0. Other rules need the finished score. */
    call->scoring.ruled = args->softcap != 0.0f || args->alibi_slopes || (args->mask && args->mask_dtype != FASTATTN_BOOL);
    call->scoring.natural = call->scoring.ruled || args->score_function;
    call->scoring.sign = call->scoring.natural || args->scale > 0 ? 1.0f : args->scale < 0 ? -1.0f : 0.0f;
    call->scoring.unit = call->scoring.natural || args->scale == 0 ? 1.0 : fabs((double)args->scale);
    const double exponent = call->scoring.unit * 1.44269504088896341; /* log2(e) */
    call->scoring.exponent = exponent < FLT_MAX ? (float)exponent : FLT_MAX;

    call->heads.a_kv_head = call->heads.group = fa_divide(args->num_heads, args->num_kv_heads);
    if (FA_UNLIKELY(args->block_mask) && args->block_mask->head_stride != 0) call->heads.group = 1;
    call->heads.sequences = fa_divide(args->num_heads, call->heads.group);
    call->heads.beside = call->abreast = 1;
    call->stored.v_in_k = args->v == args->k && memcmp(args->v_strides, args->k_strides, sizeof args->k_strides) == 0 &&
                          args->v_head_dim <= args->head_dim && !call->stored.quantised;
    call->stored.k_bytes = fa_row_bytes(args->kv_dtype, args->head_dim);
    call->stored.v_bytes = fa_row_bytes(args->v_dtype, args->v_head_dim);
    call->stored.apart = apart(args->k_strides[2], call->stored.k_bytes) ||
                         (!call->stored.v_in_k && apart(args->v_strides[2], call->stored.v_bytes));
    fa_totals totals = survey(call);
    plan_team(call, totals.work);
    plan_abreast(call, &totals);
    if (call->heads.beside > 1) totals = survey(call);
    plan_bundles(call, &totals);
    return plan_memory(call, &totals);
}

/* The plan, too, is made in the default floating-point environment, so that neither do results depend on the caller's
 * rounding nor its exception flags on the plan. */
fastattn_status fastattn_call_prepare(fa_call *call, const fastattn_attention_args *args) {
    const fa_fpenv found = fa_fpenv_default();
    const fastattn_status status = plan(call, args);
    fa_fpenv_restore(found);
    return status;
}

/* The power of 2 that an item of so many queries and keys is about as long as. */
static int magnitude(int64_t q_len, int64_t kv_len) {
    int m = 0;
    for (uint64_t pairs = (uint64_t)fa_min(q_len, FA_PANEL_ROWS) * (uint64_t)kv_len; pairs > 0; pairs >>= 1) m++;
    return m;
}

/* Where in the table of entries those of a magnitude begin: the longest first, so that the last to finish is short. */
static void longest_first(const fastattn_attention_args *a, int64_t begin[64]) {
    int64_t count[64] = {0}, at = 0, q_len, kv_len;
    for (int64_t b = 0; b < a->batch; b++) {
        lengths_of(a, b, &q_len, &kv_len);
        count[magnitude(q_len, kv_len)]++;
    }
    for (int m = 63; m >= 0; m--) {
        begin[m] = at;
        at += count[m];
    }
}

static void enter_all(const fa_call *call, fa_entry *entries) {
    const fastattn_attention_args *a = call->args;
    const int sorted = a->batch > 1 && fastattn_ragged(a);
    int64_t begin[64], q_len, kv_len;
    if (FA_UNLIKELY(sorted)) longest_first(a, begin);
    const fa_shape *shape = &call->shape;
    for (int64_t b = 0; b < a->batch; b++) {
        lengths_of(a, b, &q_len, &kv_len);
        fa_entry *entry = entries + (sorted ? begin[magnitude(q_len, kv_len)]++ : b);
        if (of_shape(shape, q_len, kv_len)) entry->shape = *shape;
        else plan_shape(&entry->shape, call, q_len, kv_len);
        shape = &entry->shape;
        place(a, b, entry);
        const int abreast = shape->rows.panels == 1 && fastattn_way_of(shape, shape->rows.panel_rows) == FA_FEW;
        entry->line = abreast ? call->heads.sequences : FA_UNLIKELY(a->indices) ? shape->rows.panels_a_segment : shape->rows.panels;
        const int shared = shape->prepared[FA_PREFERRED] || call->stored.quantised;
        entry->bundle = abreast ? call->abreast : shared ? fa_max(fa_min(call->most_bundle, entry->line), 1) : 1;
        entry->bundles = entry->bundle > 1 ? fa_ceil_div(entry->line, entry->bundle) : entry->line;
        entry->partial_bytes = shape->splits > 1 ? fastattn_state_bytes(shape->rows.ld, a->v_head_dim) : 0;
    }
}

/* A thread takes short items several at a time: they are neighbours in memory, so that it knows what it will read next. In integers: the
 * floating-point environment is the caller's here. */
static int64_t at_once(const fa_call *call) {
    enum { TURNS_A_THREAD = 8 };
    const fa_shape *longest = &call->entries->shape;
    const int64_t of_key = longest->rows.ld * (call->args->head_dim + call->args->v_head_dim);
    if (call->team.threads < 2 || fa_product_exceeds(longest->split_keys, of_key, WORTH_A_THREAD)) return 1;
    const int64_t turn = (WORK_OF_PANEL + longest->split_keys * of_key) * call->entries->bundle;
    return fa_min(WORTH_A_THREAD / turn, call->items[FA_COMPUTE] / (call->team.threads * TURNS_A_THREAD));
}

fa_call *fastattn_call_enter(const fa_call *prepared, void *workspace) {
    fa_call *call = workspace;
    if (FA_UNLIKELY(call != prepared)) memcpy(call, prepared, offsetof(fa_call, entries));
    call->entries = NULL;
    call->paddings = 0;
    memset(call->items, 0, sizeof call->items);
    memset(call->alike, 0, sizeof call->alike);
    if (FA_UNLIKELY(call->room.entries == 0)) return call;
    const fastattn_attention_args *a = call->args;
    call->entries = (fa_entry *)((char *)workspace + call->room.entries);
    enter_all(call, call->entries);
    size_t partials = call->room.partials;
    for (fa_entry *entry = call->entries; entry < call->entries + a->batch; entry++) {
        const int64_t panels = call->heads.sequences * entry->shape.rows.panels, splits = entry->shape.splits;
        memcpy(entry->first, call->items, sizeof entry->first);
        entry->partials = partials;
        if (panels > 0) call->items[FA_COMPUTE] += fa_divide(panels, entry->line) * entry->bundles * splits;
        call->items[FA_MERGE] += splits > 1 ? panels : 0;
        partials += entry->partial_bytes * (size_t)(panels * splits);
        if (FA_UNLIKELY(entry->shape.q_len < entry->q_room)) call->paddings = a->batch;
    }
    FA_ASSERT(partials <= call->room.bytes);
    for (int phase = 0; phase < FA_PHASES && !fastattn_ragged(a); phase++) call->alike[phase] = fa_divide(call->items[phase], a->batch);
    call->team.threads = (int)fa_max(1, fa_min(call->team.threads, call->items[FA_COMPUTE] + call->paddings));
    call->team.at_once = at_once(call);
    return call;
}

const fa_entry *fastattn_entry_of(const fa_call *call, int phase, int64_t item) {
    int64_t low = 0, high = call->args->batch;
    if (call->alike[phase]) return call->entries + fa_divide(item, call->alike[phase]);
    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        if (call->entries[middle].first[phase] <= item) low = middle;
        else high = middle;
    }
    return call->entries + low;
}
