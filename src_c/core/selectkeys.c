/* Which keys queries choose: the loop of attention without its second half. A tile of queries meets all keys, a run at a time:
 *
 *     s = k q                                   by the products that attention would use
 *     score = sum over heads of w f(s)
 *     candidates of the query: those with a larger score than its num_keys-th so far
 *
 * Candidates are collected in ascending order until their room is full, and then all but the best are dropped. Where there are too few
 * tiles for the threads the keys are split, and the candidates of the parts are put together in a second phase: which keys are the
 * best depends on no split. */
#include "check.h"
#include "ints.h"
#include "memory.h"
#include "panel.h"
#include "threads.h"

#include "../ukernel/storage.h"
#include "../ukernel/ukernel.h"

#include <math.h>
#include <string.h>

enum {
    ITEMS_OF_A_THREAD = 2,     /* and fewer, where there are many tiles, are not worth parts, each of which begins with any candidates */
    FEWEST_KEYS = 2048,        /* of a part; and eight times as many as it keeps */
    COUNTED = 64,              /* scores that are counted together */
    LOOK = 16,                 /* that are looked at together: most hold no candidate */
    FEWEST_SPARE = 1024,       /* room for candidates beyond the best, lest these are looked for all the time */
    WORK_OF_A_THREAD = 2000000 /* multiplications for which it pays to wake one */
};

/* Keys or blocks with their scores, in ascending order. */
typedef struct fa_candidates {
    float *score;
    int32_t *at;
    int64_t count;
    float threshold; /* no other candidate needs more */
} fa_candidates;

typedef struct fa_select {
    fastattn_select_args args;
    const fa_ukernel *uk;
    const fa_products *products;
    int64_t group; /* query heads of a kv head: the rows of a query */
    int64_t tile_queries, tiles;
    int64_t panel_rows, panels; /* the rows of a tile: of several queries in one panel, or of one query in several */
    int ld;
    int64_t unit;           /* keys of a candidate */
    int64_t wanted, room;   /* candidates in the end, and at a time */
    int64_t run_keys, line; /* keys that are prepared at a time; and the same, rounded up */
    int64_t split_keys, splits, items;
    size_t q, k, s, turned, sums, weights, ones, pointers, candidates, bytes; /* scratch of a worker, as offsets in it, and all of it */
    size_t candidates_bytes, partial_bytes;
    char *scratch, *partials;
} fa_select;

static size_t take(size_t *bytes, int64_t count, size_t size) {
    const size_t at = *bytes;
    *bytes += ((size_t)count * size + 63) / 64 * 64;
    return at;
}

/* An integer that grows with the score, which is no NaN; and back. */
static int32_t rank_of(float score) {
    const int32_t bits = (int32_t)fa_to_bits(score + 0.0f); /* of a negative zero it makes the other one */
    return bits < 0 ? bits ^ INT32_MAX : bits;
}

static float score_of(int32_t rank) { return fa_from_bits((uint32_t)(rank < 0 ? rank ^ INT32_MAX : rank)); }

/* The number of candidates above a score, in runs that compilers turn into vectors. */
static int64_t count_above(const fa_candidates *c, float score) {
    int64_t above = 0, i = 0;
    for (; i + COUNTED <= c->count; i += COUNTED) {
        int32_t run = 0;
        for (int n = 0; n < COUNTED; n++) run += c->score[i + n] > score;
        above += run;
    }
    for (; i < c->count; i++) above += c->score[i] > score;
    return above;
}

/* The smallest and the largest score of candidates, of which there are some, likewise. */
static void extremes(const fa_candidates *c, float *smallest, float *largest) {
    enum { LANES = 16 };
    float low[LANES], high[LANES];
    int64_t i = 0;
    for (int n = 0; n < LANES; n++) low[n] = high[n] = c->score[0];
    for (; i + LANES <= c->count; i += LANES)
        for (int n = 0; n < LANES; n++) {
            const float score = c->score[i + n];
            low[n] = score < low[n] ? score : low[n];
            high[n] = score > high[n] ? score : high[n];
        }
    for (; i < c->count; i++) {
        low[0] = c->score[i] < low[0] ? c->score[i] : low[0];
        high[0] = c->score[i] > high[0] ? c->score[i] : high[0];
    }
    *smallest = low[0], *largest = high[0];
    for (int n = 1; n < LANES; n++) {
        *smallest = low[n] < *smallest ? low[n] : *smallest;
        *largest = high[n] > *largest ? high[n] : *largest;
    }
}

/* A score that n candidates are above, or, where equals forbid that, the one for which fewer are above it and more if it counts as well:
 * by halving, which takes a dozen turns where scores differ. There are at least n. */
static float separator(const fa_candidates *c, int64_t n, int64_t *above) {
    float smallest, largest;
    extremes(c, &smallest, &largest);
    /* At least n are above the bottom, and fewer above the top. */
    for (int64_t bottom = (int64_t)rank_of(smallest) - 1, top = rank_of(largest);;) {
        const int64_t middle = bottom + (top - bottom) / 2;
        if (top - bottom == 1) {
            *above = count_above(c, score_of((int32_t)top));
            return score_of((int32_t)top);
        }
        *above = count_above(c, score_of((int32_t)middle));
        if (*above == n) return score_of((int32_t)middle);
        if (*above > n) bottom = middle;
        else top = middle;
    }
}

/* All but the best n go, the later of equals first. */
static void keep_best(fa_candidates *c, int64_t n) {
    if (c->count < n || n == 0) return;
    int64_t above, kept = 0;
    float unused;
    const float edge = separator(c, n, &above);
    for (int64_t i = 0, equals = n - above; i < c->count; i++) {
        const float score = c->score[i];
        const int64_t equal = (score == edge) & (equals > 0);
        c->score[kept] = score;
        c->at[kept] = c->at[i];
        kept += (score > edge) | equal;
        equals -= equal;
    }
    c->count = kept;
    extremes(c, &c->threshold, &unused);
}

/* Whether any of LOOK scores is above a threshold. */
static int any_above(const float *score, float threshold) {
    int32_t any = 0;
    for (int n = 0; n < LOOK; n++) any |= score[n] > threshold;
    return any;
}

/* Candidates from `at` on that follow each other. */
static void offer(const fa_select *x, fa_candidates *c, const float *score, int64_t at, int64_t count) {
    for (int64_t j = 0; j < count; j += LOOK) {
        const int64_t end = fa_min(j + LOOK, count);
        if (end - j == LOOK && !any_above(score + j, c->threshold)) continue;
        if (c->count + LOOK > x->room) keep_best(c, x->wanted);
        for (int64_t i = j; i < end; i++) {
            c->score[c->count] = score[i];
            c->at[c->count] = (int32_t)(at + i);
            c->count += score[i] > c->threshold;
        }
    }
}

/* Who chooses, and from what: the keys from `first` up to `end`. */
typedef struct fa_chooser {
    int64_t batch, kv_head, query, queries; /* of a tile */
    int64_t offset;                         /* position of query 0 */
    int64_t first, end, kv_length;
} fa_chooser;

static int64_t length_of(const fastattn_select_args *a, int64_t b) { return a->kv_lengths ? a->kv_lengths[b] : a->kv_len; }

static int64_t offset_of(const fastattn_select_args *a, int64_t b) {
    return a->query_offset ? fa_reach(a->query_offset[b]) : length_of(a, b) - a->q_len;
}

/* The end of the keys that a query sees. */
static int64_t end_of(const fastattn_select_args *a, int64_t position, int64_t length) {
    return a->causal ? fa_max(0, fa_min(length, position + 1)) : length;
}

/* Rows of keys from `key` on, which follow on what they were, if that is not the first, and what is read next a run further on. */
static void find_rows(fa_matrix *rows, const fa_select *x, const fa_chooser *who, int64_t key, const char **pointers) {
    const fastattn_select_args *a = &x->args;
    const fa_matrix head = fa_matrix_at((const char *)a->k + who->kv_head * a->k_strides[1], a->k_strides[2], a->k_dtype);
    if (a->block_table) {
        const fa_pages pages = {head, a->k_strides[0], a->page_size, fastattn_pages_at(a->block_table, a->block_table_stride, who->batch)};
        fastattn_paged_rows(rows, &pages, key, who->end, x->run_keys, key > who->first, pointers);
    } else {
        *rows = head;
        rows->at += who->batch * a->k_strides[0] + key * a->k_strides[2];
    }
    if (rows->rows) rows->rows_ahead = x->run_keys;
    else rows->ahead = (int64_t)((uint64_t)x->run_keys * (uint64_t)rows->stride);
}

static int64_t rows_in_panel(const fa_select *x, const fa_chooser *who, int64_t panel) {
    return fa_min(x->panel_rows, who->queries * x->group - panel * x->panel_rows);
}

static int padded(const fa_select *x, int64_t rows) { return (int)(x->products->by_rows ? rows : fa_round_up(rows, FA_ROW_STEP)); }

static float *panel_at(const fa_select *x, char *scratch, int64_t panel) {
    return (float *)(void *)(scratch + x->q) +
           panel * fa_round_up(fa_max(x->args.head_dim, 1), FA_TILE) * fa_round_up(x->panel_rows, FA_ROW_STEP);
}

/* The queries of a tile, and the weight of each row. */
static void pack_tile(const fa_select *x, const fa_chooser *who, char *scratch) {
    const fastattn_select_args *a = &x->args;
    float *weights = (float *)(void *)(scratch + x->weights), *ones = (float *)(void *)(scratch + x->ones);
    for (int n = 0; n < FA_MOST_BLOCK_KEYS; n++) ones[n] = 1.0f;
    for (int64_t panel = 0; panel < x->panels; panel++) {
        const void *rows[FA_PANEL_ROWS];
        const int64_t count = rows_in_panel(x, who, panel);
        const int all = padded(x, count);
        for (int r = 0; r < all; r++) {
            const int64_t row = panel * x->panel_rows + fa_min(r, count - 1), i = who->query + row / x->group;
            const int64_t h = who->kv_head * x->group + row % x->group;
            rows[r] = (const char *)a->q + who->batch * a->q_strides[0] + h * a->q_strides[1] + i * a->q_strides[2];
            if (r < count)
                weights[row] = a->weights ? *(const float *)(const void *)((const char *)a->weights + who->batch * a->weights_strides[0] +
                                                                           h * a->weights_strides[1] + i * a->weights_strides[2])
                                          : 1.0f;
        }
        x->products->pack(panel_at(x, scratch, panel), x->ld, rows, all, a->head_dim, a->q_dtype, 1.0f);
    }
}

/* sums[query][key] of some keys of a run. Where lanes are rows, and the heads of a query fill vectors, sums go across them; else scores are
 * turned first. */
static void sum_scores(const fa_select *x, const fa_chooser *who, char *scratch, fa_matrix k, int64_t from, int64_t keys) {
    static const fa_activation rectifier = {FASTATTN_RELU, 0, 1.0f, 0.0f, 1.0f};
    const int across = !x->products->by_rows && x->panels == 1 && x->group % FA_ROW_STEP == 0, turns = !x->products->by_rows && !across;
    const int64_t whole = fa_round_up(keys, FA_ROW_STEP), ld = turns ? x->line : x->ld;
    const float *weights = (const float *)(const void *)(scratch + x->weights), *ones = (const float *)(const void *)(scratch + x->ones);
    float *s = (float *)(void *)(scratch + x->s), *turned = (float *)(void *)(scratch + x->turned), *lines = turns ? turned : s;
    float *sums = (float *)(void *)(scratch + x->sums), *line_of[FA_PANEL_ROWS];
    for (int64_t panel = 0; panel < x->panels; panel++) {
        const int64_t rows = rows_in_panel(x, who, panel), of_query = fa_min(x->group, rows);
        x->products->qk(s, panel_at(x, scratch, panel), x->ld, padded(x, rows), k, from, keys, x->args.head_dim);
        if (turns) {
            for (int64_t r = 0; r < rows; r++) line_of[r] = turned + r * ld;
            x->uk->products->unpack((void *const *)line_of, (int)rows, s, x->ld, ones, keys, FASTATTN_FLOAT32);
        }
        if (x->args.rectified) x->uk->activate(lines, ld, across ? keys : rows, across ? rows : whole, &rectifier);
        for (int64_t r = 0; r < rows; r += of_query) {
            float *const of = sums + r / of_query * x->line;
            if (across) x->uk->dense->dots(of, s + r, ld, whole, weights + r, of_query);
            else
                x->uk->dense->product(of, x->line, panel > 0 ? ones : NULL, weights + panel * x->panel_rows + r, of_query, 1,
                                      lines + r * ld, ld, 1, whole, of_query);
        }
    }
}

/* The scores of one query and of keys that follow each other, of which it takes those that it sees. `peak` is the largest so far of a
 * block that goes on. */
static void take_scores(const fa_select *x, const fa_chooser *who, int64_t query, float *score, int64_t key, int64_t keys, float *peak,
                        fa_candidates *best) {
    const fastattn_select_args *a = &x->args;
    const int64_t position = who->offset + query, end = fa_min(who->end, end_of(a, position, who->kv_length));
    const int64_t count = fa_min(keys, end - key), recent = position - a->keep_recent + 1;
    for (int64_t j = 0; j < fa_min(count, a->keep_first - key); j++) score[j] = INFINITY;
    for (int64_t j = fa_max(0, recent - key); j < fa_min(count, position + 1 - key); j++) score[j] = INFINITY;
    if (x->unit == 1) {
        if (count > 0) offer(x, best, score, key, count);
        return;
    }
    for (int64_t j = 0; j < count; j++) {
        if (score[j] > *peak) *peak = score[j];
        if ((key + j + 1) % x->unit != 0 && key + j + 1 != end) continue;
        offer(x, best, peak, (key + j) / x->unit, 1);
        *peak = -INFINITY;
    }
}

static void clear(const fa_select *x, fa_candidates *c, char *memory) {
    c->score = (float *)(void *)memory;
    c->at = (int32_t *)(void *)(c->score + x->room);
    c->count = 0;
    c->threshold = -INFINITY;
}

/* The best candidates of each query of a tile among some keys. */
static void choose(const fa_select *x, const fa_chooser *who, char *scratch, fa_candidates *best) {
    const char **pointers = (const char **)(void *)(scratch + x->pointers);
    float *k_room = (float *)(void *)(scratch + x->k), *sums = (float *)(void *)(scratch + x->sums), peak[FA_PANEL_ROWS];
    const int as_stored = x->products->in_place && x->args.k_dtype == FASTATTN_FLOAT32 && !x->args.block_table;
    for (int64_t i = 0; i < who->queries; i++) {
        clear(x, &best[i], scratch + x->candidates + x->candidates_bytes * (size_t)i);
        peak[i] = -INFINITY;
    }
    fa_matrix stored;
    if (x->products->enter) x->products->enter();
    if (who->first < who->end) pack_tile(x, who, scratch);
    for (int64_t key = who->first; key < who->end; key += x->run_keys) {
        const int64_t keys = fa_min(x->run_keys, who->end - key);
        find_rows(&stored, x, who, key, pointers);
        const fa_matrix k = x->products->keys(as_stored ? NULL : k_room, stored, keys, x->args.head_dim);
        for (int64_t from = 0; from < keys; from += x->products->score_keys) {
            const int64_t n = fa_min(x->products->score_keys, keys - from);
            sum_scores(x, who, scratch, k, from, n);
            for (int64_t i = 0; i < who->queries; i++)
                take_scores(x, who, who->query + i, sums + i * x->line, key + from, n, &peak[i], &best[i]);
        }
    }
    if (x->products->leave) x->products->leave();
    for (int64_t i = 0; i < who->queries; i++) keep_best(&best[i], x->wanted);
}

static void write_indices(const fa_select *x, int64_t b, int64_t h, int64_t i, const fa_candidates *best) {
    const fastattn_select_args *a = &x->args;
    const int64_t end = end_of(a, offset_of(a, b) + i, length_of(a, b));
    int32_t *to = (int32_t *)(void *)((char *)a->indices + b * a->indices_strides[0] + h * a->indices_strides[1] +
                                      i * a->indices_strides[2]);
    int64_t n = 0;
    for (int64_t c = 0; c < best->count; c++)
        for (int64_t j = best->at[c] * x->unit; j < fa_min((best->at[c] + 1) * x->unit, end); j++) to[n++] = (int32_t)j;
    for (; n < a->num_keys; n++) to[n] = -1;
}

/* What is kept of a query from one part of the keys: their number, scores and places. */
static int64_t *partial_at(const fa_select *x, int64_t query, int64_t part) {
    return (int64_t *)(void *)(x->partials + x->partial_bytes * (size_t)(query * x->splits + part));
}

static void select_item(const void *context, int64_t item, int worker) {
    const fa_select *x = context;
    const fastattn_select_args *a = &x->args;
    const int64_t part = item % x->splits, tile = item / x->splits % x->tiles, line = item / x->splits / x->tiles;
    const int64_t b = line / a->num_kv_heads, length = length_of(a, b), first = part * x->split_keys;
    fa_chooser who = {.batch = b,
                      .kv_head = line % a->num_kv_heads,
                      .query = tile * x->tile_queries,
                      .offset = offset_of(a, b),
                      .first = first,
                      .kv_length = length};
    who.queries = fa_min(x->tile_queries, a->q_len - who.query);
    who.end = fa_min(end_of(a, who.offset + who.query + who.queries - 1, length), first + x->split_keys);
    fa_candidates best[FA_PANEL_ROWS];
    choose(x, &who, x->scratch + x->bytes * (size_t)worker, best);
    for (int64_t i = 0; i < who.queries; i++) {
        if (x->splits == 1) {
            write_indices(x, b, who.kv_head, who.query + i, &best[i]);
            continue;
        }
        int64_t *count = partial_at(x, line * a->q_len + who.query + i, part);
        float *score = (float *)(void *)(count + 1);
        *count = best[i].count;
        memcpy(score, best[i].score, (size_t)best[i].count * sizeof *score);
        memcpy(score + x->wanted, best[i].at, (size_t)best[i].count * sizeof *best[i].at);
    }
}

/* The parts of the keys become one. */
static void merge_item(const void *context, int64_t item, int worker) {
    const fa_select *x = context;
    const fastattn_select_args *a = &x->args;
    fa_candidates best;
    clear(x, &best, x->scratch + x->bytes * (size_t)worker + x->candidates);
    for (int64_t part = 0; part < x->splits; part++) {
        const int64_t *count = partial_at(x, item, part);
        const float *score = (const float *)(const void *)(count + 1);
        if (best.count + *count > x->room) keep_best(&best, x->wanted);
        memcpy(best.score + best.count, score, (size_t)*count * sizeof *score);
        memcpy(best.at + best.count, score + x->wanted, (size_t)*count * sizeof *best.at);
        best.count += *count;
    }
    keep_best(&best, x->wanted);
    const int64_t line = item / a->q_len;
    write_indices(x, line / a->num_kv_heads, line % a->num_kv_heads, item % a->q_len, &best);
}

static fastattn_status check_shapes(const fastattn_select_args *a) {
    const int64_t most = INT32_MAX;
    const int64_t sizes[] = {a->batch,    a->num_heads, a->num_kv_heads, a->q_len,      a->kv_len,
                             a->head_dim, a->num_keys,  a->block_size,   a->keep_first, a->keep_recent};
    for (size_t n = 0; n < sizeof sizes / sizeof *sizes; n++)
        if (sizes[n] < 0 || sizes[n] > most) return FASTATTN_ERROR_SHAPE;
    if (a->num_kv_heads == 0 ? a->num_heads != 0 : a->num_heads % a->num_kv_heads != 0) return FASTATTN_ERROR_SHAPE;
    if (a->head_dim > FA_MOST_DIM || a->num_keys > 1 << 24 ||
        fa_product_exceeds(a->batch * fa_max(a->num_heads, 1), a->q_len, (int64_t)1 << 44))
        return FASTATTN_ERROR_SHAPE;
    if (a->block_table && (a->num_pages < 0 || a->num_pages > most || a->page_size < 1 || a->page_size > most)) return FASTATTN_ERROR_SHAPE;
    const int64_t unit = fa_max(a->block_size, 1), recent = a->keep_recent > 0 ? (a->keep_recent + unit - 2) / unit + 1 : 0;
    if (a->num_keys % unit != 0 || fa_ceil_div(a->keep_first, unit) + recent > a->num_keys / unit) return FASTATTN_ERROR_SHAPE;
    return FASTATTN_OK;
}

static fastattn_status check_tables(fastattn_select_args *a) {
    const int64_t q_size = fa_size_of(a->q_dtype), k_size = fa_size_of(a->k_dtype), pages = a->block_table ? a->num_pages : a->batch;
    const int64_t keys = a->block_table ? a->page_size : a->kv_len;
    const int64_t columns = a->block_table ? fa_ceil_div(a->kv_len, a->page_size) : 0;
    const fa_table tables[] = {
        {a->q, a->q_strides, 3, {a->batch, a->num_heads, a->q_len}, a->head_dim, q_size, 1, 0},
        {a->k, a->k_strides, 3, {pages, a->num_kv_heads, keys}, a->head_dim, k_size, 1, 0},
        {a->weights, a->weights_strides, 3, {a->batch, a->num_heads, a->q_len}, 1, 4, 0, 0},
        {a->indices, a->indices_strides, 3, {a->batch, a->num_kv_heads, a->q_len}, a->num_keys, 4, 1, 1},
        {a->query_offset, NULL, 0, {0}, a->batch, 8, 0, 0},
        {a->kv_lengths, NULL, 0, {0}, a->batch, 8, 0, 0},
        {a->block_table, &a->block_table_stride, 1, {a->batch}, columns, 4, 0, 0},
    };
    for (size_t n = 0; n < sizeof tables / sizeof *tables; n++)
        if (fastattn_check_table(&tables[n]) != FASTATTN_OK) return FASTATTN_ERROR_ARGUMENT;
    for (int64_t b = 0; b < a->batch; b++) {
        const int64_t length = length_of(a, b);
        if (length < 0 || length > a->kv_len) return FASTATTN_ERROR_KV_LENGTHS;
        const int32_t *table = fastattn_pages_at(a->block_table, a->block_table_stride, b);
        for (int64_t n = 0; a->block_table && n * a->page_size < length; n++)
            if (table[n] < 0 || table[n] >= a->num_pages) return FASTATTN_ERROR_BLOCK_TABLE;
        for (int64_t h = 0; a->weights && h < a->num_heads; h++)
            for (int64_t i = 0; i < a->q_len; i++)
                if (!isfinite(*(const float *)(const void *)((const char *)a->weights + b * a->weights_strides[0] +
                                                             h * a->weights_strides[1] + i * a->weights_strides[2])))
                    return FASTATTN_ERROR_SCALE;
    }
    return FASTATTN_OK;
}

static int64_t common_factor(int64_t a, int64_t b) { return b == 0 ? a : common_factor(b, a % b); }

static void plan(fa_select *x, int64_t threads) {
    const fastattn_select_args *a = &x->args;
    x->group = a->num_heads / a->num_kv_heads;
    x->products = fastattn_products_select(x->uk, a->isa, a->q_dtype, FASTATTN_PRECISION_HIGHEST, 0);
    const int fewest = fa_fewest_rows(x->products, a->head_dim, a->kv_len);
    if (fa_min(a->q_len, fa_max(1, x->products->panel_rows / x->group)) * x->group < fewest)
        x->products = fastattn_few_select(x->uk, x->products, a->isa, a->q_dtype, a->k_dtype);
    const int64_t most = x->products->panel_rows;
    x->tile_queries = fa_max(1, fa_min(a->q_len, most / x->group));
    x->tiles = fa_ceil_div(a->q_len, x->tile_queries);
    x->panel_rows = fa_min(x->tile_queries * x->group, most);
    x->panels = fa_ceil_div(x->tile_queries * x->group, x->panel_rows);
    x->run_keys = fa_max(1, fa_min(x->products->block_keys, a->kv_len));
    x->line = fa_round_up(x->run_keys, FA_ROW_STEP);
    x->ld = (int)(x->products->by_rows ? x->line : fa_round_up(x->panel_rows, FA_ROW_STEP));
    x->unit = fa_max(a->block_size, 1);
    x->wanted = a->num_keys / x->unit;
    x->room = x->wanted + fa_max(2 * x->wanted, FEWEST_SPARE);
    const int64_t lines = a->batch * a->num_kv_heads, items = threads > 1 ? ITEMS_OF_A_THREAD * threads : 1;
    const int64_t wanted = fa_min(fa_ceil_div(items, lines * x->tiles), a->kv_len / fa_max(FEWEST_KEYS, 8 * a->num_keys));
    /* Whole runs and whole blocks: a score has the same bits whatever the parts. */
    x->split_keys = wanted > 1 ? fa_round_up(fa_ceil_div(a->kv_len, wanted), x->run_keys * (x->unit / common_factor(x->unit, x->run_keys)))
                               : a->kv_len;
    x->splits = x->split_keys > 0 ? fa_ceil_div(a->kv_len, x->split_keys) : 1;
    x->items = lines * x->tiles * x->splits;

    const int64_t tiled_dim = fa_round_up(fa_max(a->head_dim, 1), FA_TILE), tiled_keys = fa_round_up(x->run_keys, FA_TILE);
    x->q = take(&x->bytes, x->panels * tiled_dim * fa_round_up(x->panel_rows, FA_ROW_STEP), sizeof(float));
    x->k = take(&x->bytes, (tiled_keys + FA_TILE) * tiled_dim, sizeof(float));
    x->s = take(&x->bytes, tiled_keys * fa_round_up(x->panel_rows, FA_ROW_STEP), sizeof(float));
    x->turned = take(&x->bytes, x->panel_rows * x->line, sizeof(float));
    x->sums = take(&x->bytes, x->tile_queries * x->line, sizeof(float));
    x->weights = take(&x->bytes, x->panels * x->panel_rows, sizeof(float));
    x->ones = take(&x->bytes, FA_MOST_BLOCK_KEYS, sizeof(float));
    x->pointers = take(&x->bytes, a->block_table ? fastattn_row_pointers(x->run_keys) : 0, sizeof(char *));
    x->candidates_bytes = (size_t)x->room * (sizeof(float) + sizeof(int32_t));
    x->candidates = take(&x->bytes, x->tile_queries, x->candidates_bytes);
    x->partial_bytes = sizeof(int64_t) + (size_t)fa_round_up(x->wanted, 2) * (sizeof(float) + sizeof(int32_t));
}

fastattn_status fastattn_select_keys(const fastattn_select_args *given) {
    if (!FA_HOLDS_SELECT) return FASTATTN_ERROR_LEFT_OUT;
    if (!given || given->size != sizeof *given) return FASTATTN_ERROR_ARGUMENT;
    fa_select x = {.args = *given};
    fastattn_select_args *a = &x.args;
    if (!fa_is_storage(a->q_dtype) || !fa_is_storage(a->k_dtype)) return FASTATTN_ERROR_DTYPE;
    if (a->q_dtype != a->k_dtype && a->q_dtype != FASTATTN_FLOAT32) return FASTATTN_ERROR_DTYPE;
    if (!fastattn_threading_available(a->threading)) return FASTATTN_ERROR_THREADING;
    fastattn_status status = check_shapes(a);
    if (status == FASTATTN_OK) status = check_tables(a);
    if (status != FASTATTN_OK) return status;
    x.uk = fastattn_ukernel_select(a->isa);
    if (!x.uk) return FASTATTN_ERROR_ISA;
    if (a->batch == 0 || a->num_kv_heads == 0 || a->q_len == 0 || a->num_keys == 0) return FASTATTN_OK;
    if (a->num_heads == 0) { /* a sum over no heads is what one of no numbers comes to */
        a->num_heads = a->num_kv_heads;
        a->head_dim = 0;
        a->weights = NULL;
    }
    const double work = (double)a->batch * (double)a->num_heads * (double)a->q_len * (double)a->kv_len * (double)(a->head_dim + 16);
    const double paid = work / WORK_OF_A_THREAD;
    const int64_t threads = paid < 2 ? 1 : fa_max(1, paid < a->num_threads ? (int64_t)paid : a->num_threads);
    plan(&x, threads);
    const fa_team team = {.threads = (int)fa_min(threads, x.items), .threading = a->threading};
    const int64_t queries = a->batch * a->num_kv_heads * a->q_len;
    const size_t partials = x.splits > 1 ? x.partial_bytes * (size_t)(queries * x.splits) : 0;
    char *memory = FASTATTN_MALLOC(x.bytes * (size_t)team.threads + partials + 63);
    if (!memory) return FASTATTN_ERROR_MEMORY;
    x.scratch = (char *)(((uintptr_t)memory + 63) / 64 * 64);
    x.partials = x.scratch + x.bytes * (size_t)team.threads;
    status = fastattn_for_each(x.items, &team, select_item, &x);
    if (status == FASTATTN_OK && x.splits > 1) status = fastattn_for_each(queries, &team, merge_item, &x);
    FASTATTN_FREE(memory);
    return status;
}
