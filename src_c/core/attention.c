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
#include "../ukernel/storage.h"
#include "elementmask.h"
#include "ints.h"
#include "state.h"
#include "threads.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Products, and what they make of the keys and values of a run. */
typedef struct fa_way {
    const fa_products *products;
    float *k_room, *v_room;
    fa_matrix k, v;
    int made; /* they are there */
} fa_way;

/* A run of keys and values, which all panels of an item that come to one of its blocks share. */
typedef struct fa_run {
    int64_t first, keys;
    fa_matrix stored_k, stored_v;
    int finite_k, finite_v; /* -1: not known yet */
    fa_way ways[FA_WAYS];
} fa_run;

/* What a worker has at hand while it computes one panel of an item. */
typedef struct fa_work {
    const fa_call *call;
    const fa_products *products;
    fa_run *run;
    fa_panel panel;
    fa_state state;
    float *s, *p, *bias, *shown;
    char *finite_v;
    float *q[FA_WAYS];
    int packed[FA_WAYS];      /* q is there */
    int misfits;              /* blocks in a row that did not fit the products */
    int q_finite;             /* all queries are, as far as that matters */
    int few;                  /* the panel's rows are few: q and o are row-major, o in o_rows until the last block */
    int64_t q_pitch, o_pitch; /* of them then */
    float *q_rows, *o_rows;
    fa_key_blocks blocks;
    fa_key_block block; /* the next one */
    int pending;        /* there is one */
    fa_key_range keys_of[FA_PANEL_ROWS / FA_ROW_STEP]; /* of the block, what each group of rows may see */
} fa_work;

static fa_matrix rows_from(fa_matrix m, int64_t row) {
    m.at += row * m.stride;
    return m;
}

/* A block of keys and values, as the caller stores them and as the products want them, and what the rules say of them. */
typedef struct fa_operands {
    fa_matrix stored_k, stored_v, k, v;
    int64_t skip; /* keys of k and v before the block */
    const fa_products *products;
    const float *q;
    float *p;
    fa_score_rules rules;
    int ruled;   /* the rules change or hide some score, whichever keys are visible by their position */
    int mended;  /* some score has a part in an infinity, and the products are of numbers in parts */
    int careful; /* some row must not be touched by some value that is not finite, or the products cannot take it */
} fa_operands;

/* The caller's rows of k or v from `first` on. */
static fa_matrix stored_rows(const fa_call *call, const void *base, const int64_t strides[3], const fa_panel *panel,
                             int64_t first) {
    const fa_matrix m = {(const char *)base + panel->batch * strides[0] + panel->kv_head * strides[1], strides[2],
                         call->args->kv_dtype};
    return rows_from(m, first);
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
        const unsigned of_bits = fastattn_hide_by_bits(w->call, &w->panel, block, w->bias, w->keys_of);
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

/* The powers of a row and key. */
static float *powers_at(const fa_work *w, const fa_operands *x, int row, int64_t key) {
    return x->p + key / 2 * x->products->pair_rows * w->call->rows.ld + row;
}

/* The scores of a row and key, the first of its part: where the powers will be, or in two places by turns. */
static float *scores_at(const fa_work *w, const fa_operands *x, int row, int64_t key) {
    if (x->products->in_place) return powers_at(w, x, row, key);
    const int64_t place = key / x->products->score_keys % 2 * x->products->score_keys;
    return w->s + place * w->call->rows.ld + row;
}

static fa_score_rules rules_at(const fa_score_rules *rules, int row, int64_t key, int ld) {
    fa_score_rules moved = *rules;
    if (rules->slopes) moved.slopes += row, moved.offset += row;
    if (rules->end) moved.begin += row, moved.end += row;
    if (rules->bias) moved.bias += key * ld + row;
    return moved;
}

/* s = k q, for `rows` rows from `row` on and `keys` keys from `from` of the block on. */
static void multiply_keys(fa_work *w, const fa_operands *x, float *s, int row, int rows, int64_t from, int64_t keys) {
    const fa_call *call = w->call;
    const int64_t dim = call->args->head_dim;
    const int ld = call->rows.ld;
    if (w->few)
        call->uk->qk_few(s, ld, w->q_rows, w->q_pitch, w->panel.rows, rows_from(x->k, from), keys, dim);
    else
        x->products->qk(s, x->q + row, ld, rows, x->k, x->skip + from, keys, dim);
}

/* The scores of queries and keys that are not finite, one by one: in parts, an infinity is no number. */
static void mend_scores(fa_work *w, float *s, fa_matrix k, int row, int rows, int64_t from, int64_t keys) {
    const fa_call *call = w->call;
    const fastattn_attention_args *a = call->args;
    const int64_t q_size = fa_size_of(a->q_dtype), k_size = fa_size_of(a->kv_dtype);
    int odd_row[FA_PANEL_ROWS];
    fastattn_panel_queries(call, &w->panel);
    for (int r = row; r < row + rows; r++) {
        const fa_matrix q = {w->panel.rows_of[r], 0, a->q_dtype};
        odd_row[r] = !call->uk->finite(q, 1, a->head_dim);
    }
    for (int64_t j = 0; j < keys; j++) {
        const fa_matrix key = rows_from(k, from + j);
        const int odd_key = !call->uk->finite(key, 1, a->head_dim);
        for (int r = row; r < row + rows; r++) {
            if (!odd_key && !odd_row[r]) continue;
            const char *q = w->panel.rows_of[r];
            float sum = 0.0f;
            for (int64_t d = 0; d < a->head_dim; d++)
                sum += call->sign * fa_get(q + d * q_size, a->q_dtype) * fa_get(key.at + d * k_size, a->kv_dtype);
            s[j * call->rows.ld + r - row] = sum;
        }
    }
}

/* o = o alpha + v p, likewise. */
static void add_values(fa_work *w, const fa_operands *x, const float *alpha, const float *p, int row, int rows, int64_t from,
                       int64_t keys) {
    const fa_call *call = w->call;
    const int64_t dim = w->state.v_head_dim;
    const int ld = call->rows.ld;
    if (w->few)
        call->uk->pv_few(w->o_rows, w->o_pitch, alpha, p, ld, w->panel.rows, rows_from(x->v, from), keys, dim);
    else
        x->products->pv(w->state.o + row, alpha, p, ld, rows, x->v, x->skip + from, keys, dim);
}

/* The values with 0 for NaN and infinities, in their storage type. */
static fa_matrix finite_values(fa_work *w, fa_matrix v, int64_t keys) {
    const int64_t dim = w->state.v_head_dim, size = fa_size_of(v.dtype);
    const fa_matrix finite = {w->finite_v, dim * size, v.dtype};
    for (int64_t j = 0; j < keys; j++) {
        char *to = w->finite_v + j * finite.stride;
        memcpy(to, rows_from(v, j).at, (size_t)finite.stride);
        for (int64_t d = 0; d < dim; d++)
            if (!isfinite(fa_get(to + d * size, v.dtype))) fa_put(to + d * size, 0.0f, v.dtype);
    }
    return finite;
}

/* o += v p for the values that are not finite, in the rows that see them: 0 * NaN must not reach the others. What is finite
 * has gone through the product as ever, so that no other row's bits change. */
static void add_non_finite(fa_work *w, const fa_operands *x, const fa_score_rules *rules, int row, int rows, int64_t from,
                           int64_t keys) {
    const fa_call *call = w->call;
    const int ld = call->rows.ld, real = (int)fa_min(rows, w->panel.rows - row);
    const fa_matrix v = x->stored_v;
    const int64_t dim = w->state.v_head_dim, size = fa_size_of(v.dtype);
    float unused[FA_PANEL_ROWS] = {0};
    /* The rules applied to zeros: -inf exactly where hidden. */
    for (int64_t j = 0; j < keys; j++)
        for (int r = 0; r < rows; r++) w->shown[j * ld + r] = 0.0f;
    call->uk->scores(w->shown, ld, rows, from, keys, rules, unused);
    for (int64_t j = 0; j < keys; j++)
        for (int64_t d = 0; d < dim; d++) {
            const float value = fa_get(rows_from(v, from + j).at + d * size, v.dtype);
            if (isfinite(value)) continue;
            for (int r = 0; r < real; r++) {
                float *o = w->few ? w->o_rows + r * w->o_pitch + d : w->state.o + d * ld + row + r;
                if (w->shown[j * ld + r] != -INFINITY) *o += x->products->power(x->p, ld, row + r, j) * value;
            }
        }
}

/* Whether the rules change or hide some score of these rows and keys. */
static int rules_matter(const fa_operands *x, int row, int rows, int64_t from, int64_t keys) {
    if (x->ruled) return 1;
    return x->rules.end && (x->rules.begin[row + rows - 1] > (float)from || x->rules.end[row] < (float)(from + keys));
}

static int any_moved(const float *alpha, int rows) {
    int moved = 0;
    for (int r = 0; r < rows; r++) moved |= alpha[r] != 1.0f;
    return moved;
}

/* One step of the loop. Scores, which take more room than anything else, come in parts. Values are added for as many keys at a
 * time as there are, since all of o is read and written for that: with the last part, or when the maximum moves. */
static void step(fa_work *w, const fa_operands *x, int row, int rows, int64_t from, int64_t keys) {
    const fa_call *call = w->call;
    const fa_products *products = x->products;
    const int ld = call->rows.ld;
    fa_state *t = &w->state;
    float *l = products->sums && !call->args->lse ? NULL : t->l + row; /* sums are the better divisor */
    float *alpha = w->panel.alpha + row, *fade = w->panel.fade + row;
    const int real = (int)fa_min(rows, w->panel.rows - row); /* few rows have nothing of their own beside them */
    const int64_t end = from + keys;
    int64_t added = from;
    int there = 0; /* the scores of the next part */
    for (int64_t j = from, n; j < end; j += n) {
        n = fa_min(products->score_keys, end - j);
        const int64_t after = fa_min(products->score_keys, end - j - n);
        float *s = scores_at(w, x, row, j - from), *p = powers_at(w, x, row, j - from);
        if (!there) multiply_keys(w, x, s, row, rows, j, n);
        if (x->mended) mend_scores(w, s, x->stored_k, row, rows, j, n);
        if (rules_matter(x, row, rows, j, n)) {
            const fa_score_rules rules = rules_at(&x->rules, row, j, ld);
            call->uk->scores(s, ld, rows, j, n, &rules, t->seen + row);
        } else
            for (int r = row; r < row + rows; r++) t->seen[r] = 1.0f;
        there = products->softmax_beside && after > 0;
        if (there) {
            const fa_scores next = {scores_at(w, x, row, j + n - from), x->q + row, ld, rows, x->k, x->skip + j + n, after,
                                    call->args->head_dim};
            products->softmax_beside(s, p, ld, rows, n, call->exponent, t->m + row, l, alpha, &next);
        } else
            products->softmax(s, p, ld, rows, n, call->exponent, t->m + row, l, alpha);
        if (j > from && !any_moved(alpha, real)) continue;
        if (j > added) add_values(w, x, fade, powers_at(w, x, row, added - from), row, rows, added, j - added);
        float *const spare = fade;
        fade = alpha;
        alpha = spare;
        added = j;
    }
    add_values(w, x, fade, powers_at(w, x, row, added - from), row, rows, added, end - added);
    if (x->careful) {
        const fa_score_rules rules = rules_at(&x->rules, row, from, ld);
        add_non_finite(w, x, &rules, row, rows, from, keys);
    }
}

/* The steps of a block. At an edge, where it saves a quarter of the work or more, every FA_ROW_STEP rows take just the
 * keys that one of them sees, in whole runs of the softmax's sum, so that leaving keys out changes no bit. */
static void steps(fa_work *w, const fa_operands *x, const fa_key_block *block) {
    const fa_panel *p = &w->panel;
    const int groups = p->padded / FA_ROW_STEP;
    int64_t narrowed = 0, first = block->keys, end = 0;
    for (int g = 0; g < groups; g++) {
        int64_t from = w->keys_of[g].from, to = w->keys_of[g].to;
        if (block->partial) {
            from = fa_max(from, (int64_t)p->begin_of[g * FA_ROW_STEP]);
            to = fa_min(to, (int64_t)p->end_of[(g + 1) * FA_ROW_STEP - 1]);
        }
        w->keys_of[g].from = from / FA_SUM_RUN * FA_SUM_RUN;
        w->keys_of[g].to = from < to ? fa_min(fa_round_up(to, FA_SUM_RUN), block->keys) : w->keys_of[g].from;
        if (from >= to) continue;
        narrowed += w->keys_of[g].to - w->keys_of[g].from;
        first = fa_min(first, w->keys_of[g].from);
        end = fa_max(end, w->keys_of[g].to);
    }
    if (narrowed > 0 && 4 * narrowed > 3 * groups * (end - first)) {
        step(w, x, 0, p->padded, first, end - first);
        return;
    }
    for (int g = 0; g < groups; g++) {
        const int64_t from = w->keys_of[g].from, keys = w->keys_of[g].to - from;
        if (keys > 0) step(w, x, g * FA_ROW_STEP, FA_ROW_STEP, from, keys);
    }
}

/* With one vector of rows the loop waits for memory, and the columns in which pv walks through V hide from the hardware what
 * comes next: ask for this block's values, and for as many keys after it. (What is widened is read in order anyway, and the
 * products of few rows look ahead themselves.) */
static void fetch_ahead(const fa_work *w, fa_matrix k, fa_matrix v, const fa_key_block *block) {
    const fastattn_attention_args *a = w->call->args;
    if (w->few || w->panel.padded > FA_ROW_STEP || a->kv_dtype != FASTATTN_FLOAT32) return;
    const int64_t after = w->panel.end_key - block->first - block->keys, size = fa_size_of(a->kv_dtype);
    w->call->uk->fetch(v, block->keys, a->v_head_dim * size);
    w->call->uk->fetch(rows_from(k, block->keys), fa_min(block->keys, after), a->head_dim * size);
}

/* The run that a block is part of. */
static fa_run *run_of(fa_work *w, const fa_key_block *block) {
    const fa_call *call = w->call;
    const fastattn_attention_args *a = call->args;
    fa_run *run = w->run;
    if (run->first == block->run_first && run->keys == block->run_keys) return run;
    run->first = block->run_first;
    run->keys = block->run_keys;
    run->stored_k = stored_rows(call, a->k, a->k_strides, &w->panel, run->first);
    run->stored_v = stored_rows(call, a->v, a->v_strides, &w->panel, run->first);
    run->finite_k = run->finite_v = -1;
    for (int way = 0; way < FA_WAYS; way++) run->ways[way].made = 0;
    return run;
}

static int all_finite(const fa_call *call, int *known, fa_matrix rows, int64_t keys, int64_t dim) {
    if (*known < 0) *known = call->uk->finite(rows, keys, dim);
    return *known;
}

/* Sees to it that there is all that these products want of queries, keys and values. */
static void prepare_operands(fa_work *w, fa_operands *x, int way, const fa_key_block *block) {
    const fa_call *call = w->call;
    const fastattn_attention_args *a = call->args;
    fa_run *run = w->run;
    fa_way *by = &run->ways[way];
    if (!w->packed[way]) {
        fastattn_panel_queries(call, &w->panel);
        by->products->pack(w->q[way], call->rows.ld, w->panel.rows_of, w->panel.padded, a->head_dim, a->q_dtype, call->sign);
        w->packed[way] = 1;
    }
    x->products = by->products;
    x->q = w->q[way];
    x->skip = block->first - run->first;
    if (x->careful) { /* for this panel alone */
        x->skip = 0;
        by->made = 0;
        x->k = by->products->keys(by->k_room, x->stored_k, block->keys, a->head_dim);
        x->v = by->products->values(by->v_room, finite_values(w, x->stored_v, block->keys), block->keys, a->v_head_dim);
        return;
    }
    if (!by->made) {
        by->k = by->products->keys(by->k_room, run->stored_k, run->keys, a->head_dim);
        by->v = by->products->values(by->v_room, run->stored_v, run->keys, a->v_head_dim);
        by->made = 1;
    }
    x->k = by->k;
    x->v = by->v;
}

/* The operands as the products of the call want them, or, for what does not fit those, as float32 products do. A power that is 0
 * to them must still meet an infinity; and where run after run does not fit, the rest of the panel is not tried. */
static void choose_way(fa_work *w, fa_operands *x, const fa_key_block *block) {
    enum { TRIALS = 4 };
    const fa_products *products = w->products;
    if (!products->fits || (!x->careful && w->misfits < TRIALS)) {
        prepare_operands(w, x, FA_PREFERRED, block);
        const int fits = !products->fits ||
                         products->fits(x->q, w->call->rows.ld, x->k, w->run->keys, x->v, w->call->args->scale);
        w->misfits = fits ? 0 : w->misfits + 1;
        if (fits) return;
    }
    prepare_operands(w, x, FA_EXACT, block);
}

static void run_block(fa_work *w, const fa_key_block *block) {
    const fa_call *call = w->call;
    const fastattn_attention_args *a = call->args;
    const unsigned found = block_bias(w, block);
    if (!(found & FA_MASK_SHOWS)) return;
    const int biased = found & FA_MASK_HIDES || (a->mask && a->mask_dtype != FASTATTN_BOOL);
    const int in_parts = w->products->in_parts;
    fa_run *run = run_of(w, block);
    fa_operands x = {.stored_k = rows_from(run->stored_k, block->first - run->first),
                     .stored_v = rows_from(run->stored_v, block->first - run->first),
                     .rules = block_rules(w, block, biased)};
    fetch_ahead(w, x.stored_k, x.stored_v, block);
    x.ruled = call->natural || biased;
    x.mended = in_parts && !(w->q_finite && all_finite(call, &run->finite_k, run->stored_k, run->keys, a->head_dim));
    x.careful = (block->partial || found & FA_MASK_HIDES || in_parts || block->keys < run->keys) &&
                !all_finite(call, &run->finite_v, run->stored_v, run->keys, a->v_head_dim);
    if (w->few) {
        x.products = call->uk->products;
        x.k = x.stored_k;
        x.v = x.careful ? finite_values(w, x.stored_v, block->keys) : x.stored_v;
    } else
        choose_way(w, &x, block);
    x.p = x.products->in_place ? w->s : w->p;
    steps(w, &x, block);
}

/* Few queries, row by row in float32. */
static void load_few(fa_work *w) {
    const fa_call *call = w->call;
    const fastattn_attention_args *a = call->args;
    memset(w->q_rows, 0, (size_t)(w->panel.rows * w->q_pitch) * sizeof(float));
    memset(w->o_rows, 0, (size_t)(w->panel.rows * w->o_pitch) * sizeof(float));
    memset(w->s, 0, (size_t)(call->block_keys * call->rows.ld) * sizeof(float)); /* the columns that qk_few leaves alone */
    for (int r = 0; r < w->panel.rows; r++) {
        float *q = w->q_rows + r * w->q_pitch;
        const fa_matrix row = {w->panel.rows_of[r], 0, a->q_dtype};
        call->uk->widen(q, row, 1, a->head_dim);
        for (int64_t d = 0; d < a->head_dim; d++) q[d] *= call->sign;
    }
}

static int finite_queries(const fa_work *w) {
    const fa_call *call = w->call;
    int finite = 1;
    for (int r = 0; r < w->panel.rows; r++) {
        const fa_matrix row = {w->panel.rows_of[r], 0, call->args->q_dtype};
        finite &= call->uk->finite(row, 1, call->args->head_dim);
    }
    return finite;
}

/* o in the orientation of a state. */
static void settle(fa_work *w) {
    if (!w->few) return;
    for (int r = 0; r < w->panel.padded; r++)
        w->panel.rows_of[r] = w->o_rows + fa_min(r, w->panel.rows - 1) * w->o_pitch;
    w->call->uk->products->pack(w->state.o, (int)w->state.ld, w->panel.rows_of, w->panel.padded, w->state.v_head_dim,
                      FASTATTN_FLOAT32, 1.0f);
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
static fa_work start(const fa_job *job, int64_t panel, int64_t part, int64_t n, int worker, fa_run *run) {
    const fa_call *call = &job->call;
    const fastattn_attention_args *a = call->args;
    const fa_scratch *at = &call->scratch;
    char *scratch = scratch_of(job, worker), *own = scratch + at->panels + at->panel.bytes * (size_t)n;
    fa_work w = {.call = call,
                 .run = run,
                 .panel = fastattn_panel_of(call, panel, part, own + at->panel.rows),
                 .s = (float *)(scratch + at->s),
                 .p = (float *)(scratch + at->p),
                 .bias = (float *)(scratch + at->bias),
                 .shown = (float *)(scratch + at->shown),
                 .finite_v = scratch + at->finite_v,
                 .q_pitch = fa_round_up(a->head_dim, FA_ROW_STEP),
                 .o_pitch = fa_round_up(a->v_head_dim, FA_ROW_STEP),
                 .q_rows = (float *)(own + at->panel.q_rows),
                 .o_rows = (float *)(own + at->panel.o_rows)};
    for (int way = 0; way < FA_WAYS; way++) w.q[way] = (float *)(own + at->panel.q[way]);
    w.few = w.panel.rows <= FA_FEW_ROWS;
    w.products = products_of(call, &w.panel);
    w.state = state_at(call, &w.panel,
                       call->splits > 1 ? partial_memory(job, panel * call->splits + part) : own + at->panel.o);
    fastattn_state_clear(&w.state);
    fastattn_panel_queries(call, &w.panel);
    if (w.few) load_few(&w);
    w.q_finite = !w.products->in_parts || finite_queries(&w);
    w.blocks = fastattn_key_blocks(call, &w.panel);
    w.pending = fastattn_next_key_block(&w.blocks, &w.block);
    return w;
}

/* Phase 0: attention of a bundle of panels over one part of the keys. Whichever panel is the furthest behind goes on, so that
 * all come to a block together. */
static void run_item(const void *context, int64_t item, int worker) {
    const fa_job *job = context;
    const fa_call *call = &job->call;
    const int64_t part = item % call->splits, bundle = item / call->splits % call->bundles;
    const int64_t sequence = item / call->splits / call->bundles, first = bundle * call->bundle;
    const int64_t panels = fa_min(call->bundle, call->rows.panels - first);
    fa_run run = {.ways = {{.products = call->products}, {.products = call->uk->products}}};
    for (int way = 0; way < FA_WAYS; way++) {
        run.ways[way].k_room = (float *)(scratch_of(job, worker) + call->scratch.k[way]);
        run.ways[way].v_room = (float *)(scratch_of(job, worker) + call->scratch.v[way]);
    }
    fa_work works[FA_MOST_BUNDLE];
    if (call->products->enter) call->products->enter();
    for (int64_t n = 0; n < panels; n++)
        works[n] = start(job, sequence * call->rows.panels + first + n, part, n, worker, &run);
    for (;;) {
        fa_work *next = NULL;
        for (fa_work *w = works; w < works + panels; w++)
            if (w->pending && (!next || w->block.first < next->block.first)) next = w;
        if (!next) break;
        run_block(next, &next->block);
        next->pending = fastattn_next_key_block(&next->blocks, &next->block);
    }
    for (fa_work *w = works; w < works + panels; w++) {
        settle(w);
        if (call->splits == 1) finish(call, &w->panel, &w->state);
    }
    if (call->products->leave) call->products->leave();
}

/* Phase 1: the parts of one panel become one. */
static void merge_item(const void *context, int64_t item, int worker) {
    const fa_job *job = context;
    const fa_call *call = &job->call;
    char *rows = scratch_of(job, worker) + call->scratch.panels + call->scratch.panel.rows;
    const fa_panel panel = fastattn_panel_of(call, item, 0, rows);
    fa_state state = state_at(call, &panel, partial_memory(job, item * call->splits));
    for (int64_t part = 1; part < call->splits; part++) {
        const fa_state other = state_at(call, &panel, partial_memory(job, item * call->splits + part));
        fastattn_state_merge(&state, &other, call->exponent);
    }
    finish(call, &panel, &state);
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
