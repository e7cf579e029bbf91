#include "linear.h"

#include "../ukernel/storage.h"
#include "check.h"
#include "ints.h"

#include <math.h>
#include <string.h>

static const int64_t most_heads = (int64_t)1 << 24, most_length = (int64_t)1 << 40, most_items = (int64_t)1 << 56;

fa_sequence fastattn_linear_sequence(const fastattn_linear_args *a, int64_t b, int of_queries) {
    fa_sequence s = {0, of_queries ? a->q_len : a->kv_len, 0};
    if (a->cu_seqlens) {
        s.first = a->cu_seqlens[b];
        s.rows = a->cu_seqlens[b + 1] - s.first;
    }
    s.real = a->kv_lengths && (a->causal || !of_queries) ? a->kv_lengths[b] : s.rows;
    return s;
}

static int divides(int64_t a, int64_t b) { return a > 0 && b % a == 0; }

static fastattn_status check_shape(const fastattn_linear_args *a) {
    const int64_t sizes[] = {a->batch, a->num_q_heads, a->num_k_heads, a->num_v_heads, a->q_len, a->kv_len, a->head_dim, a->v_head_dim};
    const int64_t most[] = {most_length, most_heads, most_heads, most_heads, most_length, most_length, FA_MOST_DIM, FA_MOST_DIM};
    for (size_t n = 0; n < sizeof sizes / sizeof *sizes; n++)
        if (sizes[n] < 0 || sizes[n] > most[n]) return FASTATTN_ERROR_SHAPE;
    const int64_t states = fa_max(a->num_k_heads, a->num_v_heads), heads = fa_max(states, a->num_q_heads);
    if (heads > 0 &&
        !(divides(a->num_k_heads, states) && divides(a->num_v_heads, states) && divides(states, heads) && divides(a->num_q_heads, heads)))
        return FASTATTN_ERROR_SHAPE;
    if ((a->causal || a->cu_seqlens) && a->q_len != a->kv_len) return FASTATTN_ERROR_SHAPE;
    if (a->batch > most_items / fa_max(heads, 1) / FA_MOST_DIM) return FASTATTN_ERROR_SHAPE;
    return FASTATTN_OK;
}

static fastattn_status check_numbers(const fastattn_linear_args *a) {
    if (!isfinite(a->scale)) return FASTATTN_ERROR_SCALE;
    if ((int)a->feature_map < FASTATTN_FEATURE_IDENTITY || a->feature_map > FASTATTN_FEATURE_RELU) return FASTATTN_ERROR_ARGUMENT;
    if ((a->normalize && a->beta) || (!a->causal && (a->beta || a->decay))) return FASTATTN_ERROR_ARGUMENT;
    for (int64_t b = 0; a->cu_seqlens && b <= a->batch; b++)
        if (a->cu_seqlens[b] < (b > 0 ? a->cu_seqlens[b - 1] : 0)) return FASTATTN_ERROR_SEQLENS;
    if (a->cu_seqlens && (a->cu_seqlens[0] != 0 || a->cu_seqlens[a->batch] != a->kv_len)) return FASTATTN_ERROR_SEQLENS;
    for (int64_t b = 0; a->kv_lengths && b < a->batch; b++)
        if (a->kv_lengths[b] < 0 || a->kv_lengths[b] > fastattn_linear_sequence(a, b, 0).rows) return FASTATTN_ERROR_KV_LENGTHS;
    return FASTATTN_OK;
}

static fastattn_status check_tables(fastattn_linear_args *a) {
    const int64_t states = fa_max(a->num_k_heads, a->num_v_heads), heads = fa_max(states, a->num_q_heads);
    const int64_t entries = a->cu_seqlens ? fa_min(a->batch, 1) : a->batch, tokens = a->kv_len, columns = a->v_head_dim + !!a->normalize;
    const int64_t used = a->v_head_dim > 0 && heads > 0, numbers = a->decay_rows ? a->head_dim : 1;
    const int64_t q_size = fa_size_of(a->q_dtype), kv_size = fa_size_of(a->kv_dtype);
    const fa_table tables[] = {
        {a->q, a->q_strides, 3, {entries, a->num_q_heads, a->q_len}, used * a->head_dim, q_size, 1, 0},
        {a->k, a->k_strides, 3, {entries, a->num_k_heads, tokens}, a->head_dim, kv_size, 1, 0},
        {a->v, a->v_strides, 3, {entries, a->num_v_heads, tokens}, a->v_head_dim, kv_size, 1, 0},
        {a->out, a->out_strides, 3, {entries, heads, a->q_len}, a->v_head_dim, q_size, 1, 1},
        {a->decay, a->decay_strides, 3, {entries, states, tokens}, numbers, fa_size_of(a->decay_dtype), 0, 0},
        {a->beta, a->beta_strides, 3, {entries, states, tokens}, 1, fa_size_of(a->beta_dtype), 0, 0},
        {a->state, a->state_strides, 3, {a->batch, states, a->head_dim}, columns, 4, 0, 0},
        {a->new_state, a->new_state_strides, 3, {a->batch, states, a->head_dim}, columns, 4, 0, 1},
        {a->kv_lengths, NULL, 0, {0}, a->batch, 8, 0, 0},
        {a->cu_seqlens, NULL, 0, {0}, a->batch + 1, 8, 0, 0},
    };
    fastattn_status status = FASTATTN_OK;
    for (size_t n = 0; n < sizeof tables / sizeof *tables && status == FASTATTN_OK; n++) status = fastattn_check_table(&tables[n]);
    return status;
}

enum { FIRST_ARGS = FA_END_OF(fastattn_linear_args, num_threads) };

fastattn_status fastattn_linear_args_init(fastattn_linear_args *args, size_t size) {
    const fastattn_linear_args absent = FASTATTN_LINEAR_ARGS_INIT;
    if (!args || !fastattn_known_size(size, FIRST_ARGS, sizeof absent)) return FASTATTN_ERROR_ARGUMENT;
    memcpy(args, &absent, size);
    memcpy(args, &size, sizeof size);
    return FASTATTN_OK;
}

static fastattn_status check(fastattn_linear_args *a, const fastattn_linear_args *given) {
    const fastattn_linear_args absent = FASTATTN_LINEAR_ARGS_INIT;
    if (!given) return FASTATTN_ERROR_ARGUMENT;
    fastattn_status status = fastattn_take_struct(a, given, FIRST_ARGS, &absent, sizeof absent);
    if (status != FASTATTN_OK) return status;
    if (!fa_is_storage(a->q_dtype) || !fa_is_storage(a->kv_dtype)) return FASTATTN_ERROR_DTYPE;
    if (a->q_dtype != a->kv_dtype && a->q_dtype != FASTATTN_FLOAT32) return FASTATTN_ERROR_DTYPE;
    if (!fastattn_threading_available(a->threading)) return FASTATTN_ERROR_THREADING;
    if ((a->decay && !fa_is_storage(a->decay_dtype)) || (a->beta && !fa_is_storage(a->beta_dtype))) return FASTATTN_ERROR_DTYPE;
    status = check_shape(a);
    if (status == FASTATTN_OK) status = check_tables(a);
    if (status == FASTATTN_OK) status = check_numbers(a);
    return status;
}

/* Columns of v never meet, so where there are fewer states than threads they are shared out; what only keys and queries take
 * part in is then done for each slice. No bit depends on it. */
static void plan_slices(fa_linear_call *call) {
    enum { FEWEST = 2 * FA_ROW_STEP };
    const fastattn_linear_args *a = call->args;
    const int64_t threads = fa_max(a->num_threads, 1), apart = fa_max(a->batch * call->states, 1);
    const int in_place = a->normalize && a->state == a->new_state && a->state; /* the sums of keys are read by all slices */
    const int64_t wanted = in_place ? 1 : fa_min(fa_ceil_div(threads, apart), a->v_head_dim / FEWEST);
    call->slice = wanted > 1 ? fa_round_up(fa_ceil_div(a->v_head_dim, wanted), FA_ROW_STEP) : a->v_head_dim;
    call->slices = call->slice > 0 ? fa_ceil_div(a->v_head_dim, call->slice) : 1;
    call->items = a->batch * call->states * call->slices;
}

/* As for attention: each thread must have enough to do, which is less here, for one step waits for memory: as much as takes no longer
 * when the other thread has to be woken first. One that is awake still would pay from a quarter of that on. What is short is not
 * interrupted. */
static void plan_team(fa_linear_call *call) {
    const double enough = 5e5, worth_interrupting = 1e9;
    const fastattn_linear_args *a = call->args;
    const double tokens = a->cu_seqlens ? (double)a->kv_len : (double)a->batch * (double)fa_max(a->kv_len, a->q_len);
    const double work = (tokens + (double)a->batch) * (double)(call->states + call->heads) * (double)a->head_dim * (double)a->v_head_dim;
    const double threads = fmin((double)fa_min(a->num_threads, call->items), work / enough);
    call->team = (fa_team){.threads = threads < 2 ? 1 : (int)threads,
                           .threading = a->threading == FASTATTN_THREADING_DEFAULT ? FASTATTN_THREADING_POOL : a->threading,
                           .interrupted = work < worth_interrupting ? NULL : a->interrupted,
                           .interrupted_context = a->interrupted_context};
}

static size_t take(uint64_t *floats, int64_t rows, int64_t columns) {
    const size_t at = (size_t)*floats;
    *floats += (uint64_t)fa_round_up(rows * columns, FA_ROW_STEP);
    return at;
}

static fastattn_status plan_memory(fa_linear_call *call) {
    const fastattn_linear_args *a = call->args;
    const int64_t c = FA_LINEAR_CHUNK, dim = call->dim, columns = call->columns;
    const int64_t rows = fa_max(c, fa_round_up(call->group + 1, FA_ROW_STEP)); /* of a token: its key and its queries */
    const int apart = a->decay && a->decay_rows;
    fa_linear_scratch *m = &call->scratch;
    uint64_t floats = 0;
    m->s = take(&floats, dim, columns);
    m->z = take(&floats, 1, dim);
    m->k = take(&floats, c, dim);
    m->q = take(&floats, rows, dim);
    m->u = take(&floats, c, columns);
    m->o = take(&floats, rows, columns);
    m->weighted = take(&floats, a->beta ? c : 0, dim);
    m->keys = take(&floats, dim, c);
    m->weights = take(&floats, c, c);
    m->own = take(&floats, a->beta ? c : 0, c);
    m->a = take(&floats, c, apart ? dim : 1);
    m->before = take(&floats, a->decay ? c : 0, apart ? dim : 1);
    m->after = take(&floats, a->decay ? c : 0, apart ? dim : 1);
    m->within = take(&floats, apart ? c : 0, dim);
    m->left = take(&floats, apart ? c : 0, dim);
    m->between = take(&floats, a->decay && !apart ? c : 0, c);
    m->beta = take(&floats, 1, c);
    m->ones = take(&floats, 1, fa_max(fa_max(dim, columns), c));
    m->sums = take(&floats, 2, rows);
    m->row = take(&floats, FA_ROW_STEP, fa_max(dim, columns));
    m->floats = (size_t)floats;
    const size_t workers = (size_t)fa_max(a->num_threads, 1);
    if (floats > SIZE_MAX / 16 / workers) return FASTATTN_ERROR_MEMORY;
    call->workspace = call->items > 0 ? m->floats * workers * sizeof(float) : 0;
    return FASTATTN_OK;
}

fastattn_status fastattn_linear_prepare(fa_linear_call *call, const fastattn_linear_args *given) {
    if (!FA_HOLDS_LINEAR) return FASTATTN_ERROR_LEFT_OUT;
    const fastattn_linear_args *args = &call->own;
    const fastattn_status status = check(&call->own, given);
    if (status != FASTATTN_OK) return status;
    call->args = args;
    call->uk = fastattn_ukernel_select(args->isa);
    if (!call->uk) return FASTATTN_ERROR_ISA;
    call->states = fa_max(args->num_k_heads, args->num_v_heads);
    call->heads = fa_max(call->states, args->num_q_heads);
    call->group = call->states > 0 ? call->heads / call->states : 1;
    plan_slices(call);
    call->dim = fa_round_up(args->head_dim, FA_ROW_STEP);
    call->columns = fa_round_up(call->slice, FA_ROW_STEP);
    plan_team(call);
    return plan_memory(call);
}
