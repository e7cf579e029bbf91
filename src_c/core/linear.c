/* The linear family, chunk by chunk:
 *
 *     for each chunk of tokens, whose keys, queries and values are the rows of K, Q and V:
 *         U = V, or with the delta rule the solution of  (I + N) U = beta (V - K~ S),
 *             N[i][j] = beta[i] k[i] . (decay from j to i) k[j]  for j < i      (unit lower triangular)
 *         O = Q~ S + W U,  W[i][j] = q[i] . (decay from j to i) k[j]  for j <= i
 *         S = (decay of the chunk) S + K^' U
 *
 * where row i of Q~ and K~ is decayed by the factors from the beginning of the chunk to token i, and row j of K^ by those after j.
 * (Yang et al., "Gated linear attention transformers with hardware-efficient training", 2023, and "Parallelizing linear
 * transformers with the delta rule over sequence length", 2024, which solves the triangular system by an inverse.) A few tokens are
 * taken one by one.
 *
 * For a chunk of c tokens and a state of D x D that is 4 c D D + 2 c c D flops, 2 c D D + c c D more with the delta rule; S is read and
 * written once, from L1 or L2. */
#include "linear.h"

#include "../cpu/fpenv.h"
#include "../ukernel/storage.h"
#include "ints.h"
#include "memory.h"

#include <math.h>
#include <string.h>

typedef struct fa_linear_job {
    fa_linear_call call;
    float *workspace;
} fa_linear_job;

/* A worker's view of one state, or of some of its columns. */
typedef struct fa_linear_work {
    const fa_linear_call *call;
    const fastattn_linear_args *args;
    const fa_dense *dense;
    int64_t b, state;
    int64_t column, real, width; /* the first column, how many there are, and rounded up to FA_ROW_STEP: the pitch of u and o */
    int64_t dim;                 /* the pitch of keys, queries and factors */
    const float *from;           /* where the state is: the caller's before the first token, then s */
    float *s;
    int64_t ld_from, ld_s;
    float *z, *k, *q, *u, *o, *weighted, *keys, *weights, *own, *a, *before, *after, *within, *left, *between, *beta, *ones, *sums, *row;
    int64_t n, padded; /* tokens of the chunk, and rounded up to FA_ROW_STEP */
    int apart;         /* rows of the state have factors of their own */
    int careful;       /* some u is not finite */
} fa_linear_work;

enum { CHUNK = FA_LINEAR_CHUNK }; /* the pitch of what has a column for each token */

static const float one = 1.0f, minus_one = -1.0f;

static fa_matrix rows_at(const void *at, const int64_t *strides, int64_t b, int64_t head, int64_t row, fastattn_dtype dtype) {
    const fa_matrix rows = fa_matrix_at((const char *)at + b * strides[0] + head * strides[1] + row * strides[2], strides[2], dtype);
    return rows;
}

/* The entry that batch strides are for: packed sequences have none. */
static int64_t entry(const fa_linear_work *w) { return w->args->cu_seqlens ? 0 : w->b; }

/* Rows in float32, with zeros in the columns beyond `real`. */
static void stage(const fa_linear_work *w, float *to, int64_t pitch, fa_matrix from, int64_t rows, int64_t real) {
    if (pitch == real) {
        w->call->uk->widen(to, from, rows, real);
        return;
    }
    for (int64_t i = 0; i < rows; i++, to += pitch, from.at += from.stride) {
        w->call->uk->widen(to, from, 1, real);
        memset(to + real, 0, (size_t)(pitch - real) * sizeof(float));
    }
}

/* The same of keys or queries, as features. */
static void stage_features(const fa_linear_work *w, float *to, fa_matrix from, int64_t rows) {
    const int64_t real = w->args->head_dim;
    stage(w, to, w->dim, from, rows, real);
    if (w->args->feature_map == FASTATTN_FEATURE_IDENTITY) return;
    w->dense->features(to, rows * w->dim, w->args->feature_map);
    for (int64_t i = 0; i < rows && real < w->dim; i++) memset(to + i * w->dim + real, 0, (size_t)(w->dim - real) * sizeof(float));
}

static void stage_queries(const fa_linear_work *w, float *to, int64_t g, int64_t row, int64_t rows) {
    const fastattn_linear_args *a = w->args;
    const int64_t head = (w->state * w->call->group + g) * a->num_q_heads / w->call->heads;
    stage_features(w, to, rows_at(a->q, a->q_strides, entry(w), head, row, a->q_dtype), rows);
    if (a->scale != 1.0f) w->dense->scale(to, w->dim, rows, w->dim, &a->scale, 0, 0);
}

/* One number for each token. */
static void stage_numbers(float *to, fa_matrix from, int64_t rows) {
    for (int64_t i = 0; i < rows; i++) to[i] = fa_get(from.at + i * from.stride, from.dtype);
}

/* Everything of `n` tokens but their queries. */
static void take_tokens(fa_linear_work *w, int64_t row, int64_t n) {
    const fastattn_linear_args *a = w->args;
    const int64_t key_head = w->state * a->num_k_heads / w->call->states, value_head = w->state * a->num_v_heads / w->call->states;
    fa_matrix values = rows_at(a->v, a->v_strides, entry(w), value_head, row, a->kv_dtype);
    values.at += w->column * fa_size_of(a->kv_dtype);
    w->n = n;
    w->padded = fa_round_up(n, FA_ROW_STEP);
    stage_features(w, w->k, rows_at(a->k, a->k_strides, entry(w), key_head, row, a->kv_dtype), n);
    memset(w->k + n * w->dim, 0, (size_t)((w->padded - n) * w->dim) * sizeof(float));
    stage(w, w->u, w->width, values, n, w->real);
    if (a->decay) {
        const fa_matrix decays = rows_at(a->decay, a->decay_strides, entry(w), w->state, row, a->decay_dtype);
        const int64_t numbers = w->apart ? n * w->dim : n;
        if (w->apart) stage(w, w->a, w->dim, decays, n, a->head_dim);
        else stage_numbers(w->a, decays, n);
        if (a->decay_log) w->dense->exps(w->a, fa_round_up(numbers, FA_ROW_STEP));
    }
    if (a->beta) stage_numbers(w->beta, rows_at(a->beta, a->beta_strides, entry(w), w->state, row, a->beta_dtype), n);
}

/* Rows of some head's answers, divided by their sums of keys if there are any. */
static void put(const fa_linear_work *w, const float *o, const float *sums, int64_t g, int64_t row, int64_t rows) {
    const fastattn_linear_args *a = w->args;
    const fa_matrix out = rows_at(a->out, a->out_strides, entry(w), w->state * w->call->group + g, row, a->q_dtype);
    for (int64_t i = 0; i < rows; i++) {
        const float factor = !sums ? 1.0f : sums[i] == 0.0f ? 0.0f : 1.0f / sums[i];
        void *to = (char *)(uintptr_t)out.at + i * out.stride + w->column * fa_size_of(a->q_dtype);
        w->call->uk->narrow(to, o + i * w->width, factor, w->real, a->q_dtype);
    }
}

/* ---------------------------------------------------------------------------------------------------------- the state */

static const float *state_at(const fa_linear_work *w, const float *state, const int64_t *strides) {
    return (const float *)(const void *)((const char *)state + w->b * strides[0] + w->state * strides[1]) + w->column;
}

static void begin(fa_linear_work *w, float *scratch) {
    const fastattn_linear_args *a = w->args;
    const int64_t pitch = (int64_t)sizeof(float);
    const int whole = w->real == w->width; /* lanes read and write no more than there is */
    w->s = scratch;
    w->ld_s = w->width;
    if (whole && a->new_state) {
        w->s = (float *)(uintptr_t)state_at(w, a->new_state, a->new_state_strides);
        w->ld_s = a->new_state_strides[2] / pitch;
    }
    w->from = w->s;
    w->ld_from = w->ld_s;
    memset(w->z, 0, (size_t)w->dim * sizeof(float));
    if (!a->state) {
        for (int64_t d = 0; d < a->head_dim; d++) memset(w->s + d * w->ld_s, 0, (size_t)w->width * sizeof(float));
        return;
    }
    const float *given = state_at(w, a->state, a->state_strides);
    const int64_t ld = a->state_strides[2] / pitch;
    for (int64_t d = 0; a->normalize && d < a->head_dim; d++) w->z[d] = given[d * ld + a->v_head_dim - w->column];
    if (whole) {
        w->from = given;
        w->ld_from = ld;
        return;
    }
    const fa_matrix rows = fa_matrix_at((const char *)given, a->state_strides[2], FASTATTN_FLOAT32);
    stage(w, w->s, w->width, rows, a->head_dim, w->real);
}

/* The state is where it is to stay. */
static void settle(fa_linear_work *w) {
    if (w->from == w->s && w->ld_from == w->ld_s) return;
    for (int64_t d = 0; d < w->args->head_dim; d++) memmove(w->s + d * w->ld_s, w->from + d * w->ld_from, (size_t)w->width * sizeof(float));
    w->from = w->s;
    w->ld_from = w->ld_s;
}

static void end(fa_linear_work *w) {
    const fastattn_linear_args *a = w->args;
    if (!a->new_state) return;
    settle(w);
    float *to = (float *)(uintptr_t)state_at(w, a->new_state, a->new_state_strides);
    const int64_t ld = a->new_state_strides[2] / (int64_t)sizeof(float);
    for (int64_t d = 0; w->s != to && d < a->head_dim; d++) memcpy(to + d * ld, w->s + d * w->ld_s, (size_t)w->real * sizeof(float));
    for (int64_t d = 0; a->normalize && w->column == 0 && d < a->head_dim; d++) to[d * ld + a->v_head_dim] = w->z[d];
}

/* ---------------------------------------------------------------------------------------------------------- the chunk */

static void transpose_keys(const fa_linear_work *w, float *to, const float *k, int64_t rows) {
    const void *rows_of[FA_PANEL_ROWS];
    for (int64_t j = 0; j < rows; j++) rows_of[j] = k + j * w->dim;
    w->call->uk->products->pack(to, CHUNK, rows_of, (int)rows, w->args->head_dim, FASTATTN_FLOAT32, 1.0f);
}

/* Products of the factors: from the beginning of the chunk to each token, after each token to the end, and between any two tokens;
 * with a factor for each row of the state, in place of the latter, from the beginning of each FA_ROW_STEP tokens to each, and, times its
 * key, after each to their end. */
static void multiply_factors(const fa_linear_work *w) {
    const fa_dense *dense = w->dense;
    const int64_t n = w->n, dim = w->dim;
    if (w->apart) {
        dense->running(w->before, w->a, dim, n, dim, 0);
        dense->running(w->after, w->a, dim, n, dim, 1);
        for (int64_t i = 0; i < n; i += FA_ROW_STEP) {
            const int64_t rows = fa_min(FA_ROW_STEP, n - i);
            dense->running(w->within + i * dim, w->a + i * dim, dim, rows, dim, 0);
            dense->running(w->left + i * dim, w->a + i * dim, dim, rows, dim, 1);
        }
        dense->scale(w->left, dim, n, dim, w->k, dim, 1);
        return;
    }
    /* between[i] is between[i - 1] times a[i], and 1 for token i itself. */
    memset(w->between, 0, (size_t)w->padded * sizeof(float));
    w->between[0] = 1.0f;
    w->before[0] = w->a[0];
    for (int64_t i = 1; i < n; i++) {
        float *to = w->between + i * CHUNK;
        memcpy(to, to - CHUNK, (size_t)w->padded * sizeof(float));
        dense->scale(to, CHUNK, 1, fa_round_up(i, FA_ROW_STEP), w->a + i, 0, 0);
        to[i] = 1.0f;
        w->before[i] = to[0] * w->a[0];
    }
    memcpy(w->after, w->between + (n - 1) * CHUNK, (size_t)n * sizeof(float));
}

/* x[i] times the factors from the beginning of the chunk to token i, or after it. */
static void decay_rows_of(const fa_linear_work *w, float *x, const float *factors) {
    if (w->args->decay) w->dense->scale(x, w->dim, w->n, w->dim, factors, w->apart ? w->dim : 1, w->apart);
}

/* Rows i to i + rows of the weights where each row of the state has factors of its own. Keys of earlier FA_ROW_STEPs are decayed to the
 * beginning of this one and x from there on; within it keys are decayed token by token. */
static void weigh_apart(const fa_linear_work *w, float *to, const float *x, int64_t i, int64_t rows) {
    const fa_dense *dense = w->dense;
    const int64_t dim = w->dim, block = (int64_t)sizeof(float) * FA_ROW_STEP * dim;
    if (i > 0) {
        const int64_t last = i - FA_ROW_STEP;
        dense->scale(w->keys, CHUNK, w->args->head_dim, last, w->within + (i - 1) * dim, 1, 0);
        transpose_keys(w, w->keys + last, w->left + last * dim, FA_ROW_STEP);
        memcpy(w->row, x + i * dim, (size_t)(rows * dim) * sizeof(float));
        dense->scale(w->row, dim, rows, dim, w->within + i * dim, dim, 1);
        dense->product(to + i * CHUNK, CHUNK, NULL, w->row, dim, 1, w->keys, CHUNK, rows, i, w->args->head_dim);
    }
    memcpy(w->row, w->k + i * dim, (size_t)block);
    for (int64_t r = 0; r < rows; r++) {
        dense->scale(w->row, dim, r, dim, w->a + (i + r) * dim, 0, 1);
        dense->dots(to + (i + r) * CHUNK + i, w->row, dim, FA_ROW_STEP, x + (i + r) * dim, dim);
    }
}

/* to[i][j] = x[i] . (decay from j to i) k[j] for j <= i, and 0 up to the end of the FA_ROW_STEP that i is in. */
static void weigh(const fa_linear_work *w, float *to, const float *x) {
    for (int64_t i = 0; i < w->n; i += FA_ROW_STEP) {
        const int64_t rows = fa_min(FA_ROW_STEP, w->n - i), until = i + FA_ROW_STEP;
        if (w->apart) weigh_apart(w, to, x, i, rows);
        else {
            w->dense->product(to + i * CHUNK, CHUNK, NULL, x + i * w->dim, w->dim, 1, w->keys, CHUNK, rows, until, w->args->head_dim);
            if (w->args->decay) w->dense->scale(to + i * CHUNK, CHUNK, rows, until, w->between + i * CHUNK, CHUNK, 1);
        }
        for (int64_t r = i; r < i + rows; r++)
            for (int64_t j = r + 1; j < until; j++) to[r * CHUNK + j] = 0.0f;
    }
}

/* The delta rule: what is to be added for each key. */
static void solve(fa_linear_work *w) {
    const fa_dense *dense = w->dense;
    const int64_t n = w->n, dim = w->dim, width = w->width;
    memcpy(w->weighted, w->k, (size_t)(n * dim) * sizeof(float));
    decay_rows_of(w, w->weighted, w->before);
    dense->scale(w->weighted, dim, n, dim, &minus_one, 0, 0);
    dense->product(w->u, width, w->ones, w->weighted, dim, 1, w->s, w->ld_s, n, width, w->args->head_dim);
    dense->scale(w->u, width, n, width, w->beta, 1, 0);
    weigh(w, w->own, w->k);
    for (int64_t i = 0; i < n; i++) w->sums[i] = -w->beta[i];
    dense->scale(w->own, CHUNK, n, w->padded, w->sums, 1, 0);
    for (int64_t i = 0; i < n; i++) {
        const int64_t first = i / FA_ROW_STEP * FA_ROW_STEP;
        if (i == first && i > 0)
            dense->product(w->u + i * width, width, w->ones, w->own + i * CHUNK, CHUNK, 1, w->u, width, fa_min(FA_ROW_STEP, n - i), width,
                           i);
        if (i > first)
            dense->product(w->u + i * width, width, w->ones, w->own + i * CHUNK + first, CHUNK, 1, w->u + first * width, width, 1, width,
                           i - first);
    }
}

/* o += W u. Where some u is not finite it must not meet the 0 that W has in the rows before its own: these sums end earlier, which
 * changes nothing but that. */
static void add_within(const fa_linear_work *w) {
    const int64_t width = w->width;
    for (int64_t i = 0, rows, until; i < w->n; i += rows) {
        rows = w->careful ? 1 : fa_min(FA_ROW_STEP, w->n - i);
        until = w->careful ? i + 1 : i + rows;
        w->dense->product(w->o + i * width, width, w->ones, w->weights + i * CHUNK, CHUNK, 1, w->u, width, rows, width, until);
    }
}

static void answer(fa_linear_work *w, int64_t g, int64_t row) {
    const fa_dense *dense = w->dense;
    const int64_t n = w->n, dim = w->dim, width = w->width;
    float *before = w->sums, *within = w->sums + CHUNK;
    stage_queries(w, w->q, g, row, n);
    weigh(w, w->weights, w->q);
    decay_rows_of(w, w->q, w->before);
    dense->product(w->o, width, NULL, w->q, dim, 1, w->s, w->ld_s, n, width, w->args->head_dim);
    add_within(w);
    if (w->args->normalize) {
        for (int64_t i = 0; i < n; i += FA_ROW_STEP)
            dense->dots(within + i, w->weights + i * CHUNK, CHUNK, FA_ROW_STEP, w->ones, i + FA_ROW_STEP);
        dense->dots(before, w->q, dim, w->padded, w->z, dim);
        for (int64_t i = 0; i < n; i++) before[i] += within[i];
    }
    put(w, w->o, w->args->normalize ? before : NULL, g, row, n);
}

/* The chunk becomes part of the state. */
static void absorb(fa_linear_work *w) {
    const fastattn_linear_args *a = w->args;
    const fa_dense *dense = w->dense;
    const int64_t n = w->n, dim = w->dim;
    if (a->decay) {
        const float *all = w->apart ? w->before + (n - 1) * dim : w->before + n - 1;
        dense->scale(w->s, w->ld_s, a->head_dim, w->width, all, w->apart, 0);
        if (a->normalize) dense->scale(w->z, dim, 1, dim, all, 0, w->apart);
    }
    decay_rows_of(w, w->k, w->after);
    dense->product(w->s, w->ld_s, w->ones, w->k, 1, dim, w->u, w->width, a->head_dim, w->width, n);
    if (a->normalize) dense->product(w->z, dim, w->ones, w->ones, 1, 1, w->k, dim, 1, dim, n);
}

/* Tokens one by one, as the definition has them, but for one pass over the state that serves key and queries:
 * S' q = a (S before)' q + u (k . q). */
static void step(fa_linear_work *w, int64_t i, int64_t row) {
    const fastattn_linear_args *a = w->args;
    const fa_dense *dense = w->dense;
    const int64_t group = w->call->group, rows = fa_round_up(group + 1, FA_ROW_STEP), dim = w->dim, width = w->width;
    const float *k = w->k + i * dim, *factor = !a->decay ? &one : w->a + i * (w->apart ? dim : 1);
    const int delta = a->beta != NULL;
    float *u = w->u + i * width, *products = w->sums, *divisors = w->sums + rows;
    memcpy(w->q, k, (size_t)dim * sizeof(float));
    for (int64_t g = 0; g < group; g++) stage_queries(w, w->q + (g + 1) * dim, g, row, 1);
    if (a->normalize) {
        if (a->decay) dense->scale(w->z, dim, 1, dim, factor, 0, w->apart);
        dense->rank_one(w->z, dim, w->z, dim, &one, 0, &one, k, 1, dim);
        dense->dots(divisors, w->q, dim, rows, w->z, dim);
    }
    dense->dots(products, w->q, dim, rows, k, dim);
    if (a->decay) dense->scale(w->q, dim, group + 1, dim, factor, 0, w->apart);
    dense->product(w->o, width, NULL, w->q, dim, 1, w->from, w->ld_from, group + 1, width, a->head_dim);
    for (int64_t d = 0; delta && d < width; d++) u[d] = w->beta[i] * (u[d] - w->o[d]);
    dense->rank_one(w->o + width, width, w->o + width, width, &one, 0, products + 1, u, group, width);
    for (int64_t g = 0; g < group; g++) put(w, w->o + (g + 1) * width, a->normalize ? divisors + g + 1 : NULL, g, row, 1);
    dense->rank_one(w->s, w->ld_s, w->from, w->ld_from, factor, w->apart, k, u, a->head_dim, width);
    w->from = w->s;
    w->ld_from = w->ld_s;
}

static void run_chunk(fa_linear_work *w, int64_t row, int64_t n) {
    take_tokens(w, row, n);
    if (n <= FA_LINEAR_STEPS) {
        for (int64_t i = 0; i < n; i++) step(w, i, row + i);
        return;
    }
    settle(w);
    if (w->args->decay) multiply_factors(w);
    if (!w->apart) transpose_keys(w, w->keys, w->k, w->padded);
    if (w->args->beta) solve(w);
    const fa_matrix u = fa_matrix_at((const char *)w->u, w->width * (int64_t)sizeof(float), FASTATTN_FLOAT32);
    w->careful = !w->call->uk->finite(u, n, w->width);
    for (int64_t g = 0; g < w->call->group; g++) answer(w, g, row);
    absorb(w);
}

/* Without causal: all tokens first, and then the queries. */
static void run_whole(fa_linear_work *w, fa_sequence keys, fa_sequence queries) {
    const fastattn_linear_args *a = w->args;
    settle(w);
    for (int64_t done = 0; done < keys.real; done += w->n) {
        take_tokens(w, keys.first + done, fa_min(CHUNK, keys.real - done));
        absorb(w);
    }
    for (int64_t g = 0; g < w->call->group; g++)
        for (int64_t done = 0, n; done < queries.real; done += n) {
            n = fa_min(CHUNK, queries.real - done);
            stage_queries(w, w->q, g, queries.first + done, n);
            w->dense->product(w->o, w->width, NULL, w->q, w->dim, 1, w->s, w->ld_s, n, w->width, a->head_dim);
            if (a->normalize) w->dense->dots(w->sums, w->q, w->dim, fa_round_up(n, FA_ROW_STEP), w->z, w->dim);
            put(w, w->o, a->normalize ? w->sums : NULL, g, queries.first + done, n);
        }
}

/* Rows that are no tokens. Where values have no numbers there may be no output. */
static void clear(const fa_linear_work *w, int64_t row, int64_t rows) {
    const fastattn_linear_args *a = w->args;
    const int64_t size = fa_size_of(a->q_dtype);
    if (w->real == 0) return;
    for (int64_t g = 0; g < w->call->group; g++) {
        const fa_matrix out = rows_at(a->out, a->out_strides, entry(w), w->state * w->call->group + g, row, a->q_dtype);
        for (int64_t i = 0; i < rows; i++)
            memset((char *)(uintptr_t)out.at + i * out.stride + w->column * size, 0, (size_t)(w->real * size));
    }
}

static void run_item(const void *context, int64_t item, int worker) {
    const fa_linear_job *job = context;
    const fa_linear_call *call = &job->call;
    const fastattn_linear_args *a = call->args;
    const fa_linear_scratch *at = &call->scratch;
    float *scratch = job->workspace + at->floats * (size_t)worker;
    const int64_t column = item % call->slices * call->slice, real = fa_min(call->slice, a->v_head_dim - column);
    fa_linear_work w = {.call = call,
                        .args = a,
                        .dense = call->uk->dense,
                        .b = item / call->slices / call->states,
                        .state = item / call->slices % call->states,
                        .column = column,
                        .apart = a->decay && a->decay_rows,
                        .real = real,
                        .width = fa_round_up(real, FA_ROW_STEP),
                        .dim = call->dim,
                        .z = scratch + at->z,
                        .k = scratch + at->k,
                        .q = scratch + at->q,
                        .u = scratch + at->u,
                        .o = scratch + at->o,
                        .weighted = scratch + at->weighted,
                        .keys = scratch + at->keys,
                        .weights = scratch + at->weights,
                        .own = scratch + at->own,
                        .a = scratch + at->a,
                        .before = scratch + at->before,
                        .after = scratch + at->after,
                        .within = scratch + at->within,
                        .left = scratch + at->left,
                        .between = scratch + at->between,
                        .beta = scratch + at->beta,
                        .ones = scratch + at->ones,
                        .sums = scratch + at->sums,
                        .row = scratch + at->row};
    const int64_t ones = fa_max(fa_max(call->dim, call->columns), CHUNK);
    for (int64_t d = 0; d < ones; d++) w.ones[d] = 1.0f;
    const fa_sequence keys = fastattn_linear_sequence(a, w.b, 0), queries = fastattn_linear_sequence(a, w.b, 1);
    begin(&w, scratch + at->s);
    if (!a->causal) run_whole(&w, keys, queries);
    else
        for (int64_t done = 0; done < keys.real; done += w.n) run_chunk(&w, keys.first + done, fa_min(CHUNK, keys.real - done));
    clear(&w, queries.first + queries.real, queries.rows - queries.real);
    end(&w);
}

/* Looks through the decays of one state, and leaves word in the worker's scratch. */
static void check_item(const void *context, int64_t item, int worker) {
    const fa_linear_job *job = context;
    const fa_linear_call *call = &job->call;
    const fastattn_linear_args *a = call->args;
    const int64_t b = item / call->states;
    const fa_sequence tokens = fastattn_linear_sequence(a, b, 0);
    fa_matrix rows = rows_at(a->decay, a->decay_strides, a->cu_seqlens ? 0 : b, item % call->states, tokens.first, a->decay_dtype);
    const int in_a_row = !a->decay_rows && rows.stride == fa_size_of(a->decay_dtype);
    const int64_t count = in_a_row ? 1 : tokens.real, each = in_a_row ? tokens.real : a->decay_rows ? a->head_dim : 1;
    const float low = a->decay_log ? -INFINITY : 0.0f, high = a->decay_log ? 0.0f : 1.0f;
    if (call->uk->dense->outside(rows, count, each, low, high)) job->workspace[call->scratch.floats * (size_t)worker] = 1.0f;
}

static fastattn_status check_decays(const fa_linear_job *job) {
    const fa_linear_call *call = &job->call;
    const int64_t workers = fa_max(call->args->num_threads, 1), step = (int64_t)call->scratch.floats;
    if (!call->args->decay) return FASTATTN_OK;
    for (int64_t n = 0; n < workers; n++) job->workspace[n * step] = 0.0f;
    const fastattn_status status = fastattn_for_each(call->args->batch * call->states, &call->team, check_item, job);
    int found = 0;
    for (int64_t n = 0; n < workers; n++) found |= job->workspace[n * step] != 0.0f;
    return status == FASTATTN_OK && found ? FASTATTN_ERROR_DECAY : status;
}

static fastattn_status prepare(fa_linear_call *call, const fastattn_linear_args *args) {
    const fa_fpenv found = fa_fpenv_default();
    const fastattn_status status = fastattn_linear_prepare(call, args);
    fa_fpenv_restore(found);
    return status;
}

fastattn_status fastattn_linear_attention(const fastattn_linear_args *args, void *workspace, size_t workspace_size) {
    if (!FA_HOLDS_LINEAR) return FASTATTN_ERROR_LEFT_OUT;
    fa_linear_job job;
    fastattn_status status = prepare(&job.call, args);
    if (status != FASTATTN_OK || job.call.items == 0) return status;
    if (workspace && (workspace_size < job.call.workspace || (uintptr_t)workspace % 64 != 0)) return FASTATTN_ERROR_WORKSPACE;
    void *own = NULL;
    job.workspace = workspace;
    if (!workspace) {
        own = FASTATTN_MALLOC(job.call.workspace + 63);
        if (!own) return FASTATTN_ERROR_MEMORY;
        job.workspace = (float *)(void *)(((uintptr_t)own + 63) / 64 * 64);
    }
    status = check_decays(&job);
    if (status == FASTATTN_OK) status = fastattn_for_each(job.call.items, &job.call.team, run_item, &job);
    FASTATTN_FREE(own);
    return status;
}

size_t fastattn_linear_workspace_size(const fastattn_linear_args *args) {
    fa_linear_call call;
    return prepare(&call, args) == FASTATTN_OK ? call.workspace : 0;
}
