#include "block.h"

#include "../ukernel/storage.h"
#include "ints.h"

#include <math.h>
#include <string.h>

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
    int careful; /* values are not taken as they are: some row must not be touched by one that is not finite, or the products
                    cannot take it, or they are scaled */
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

/* The powers of a row and key, or of the first of few rows and a key. */
static float *powers_at(const fa_work *w, const fa_operands *x, int row, int64_t key) {
    if (w->few) return x->p + key;
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
        call->uk->qk_few(s, w->s_pitch, w->q_rows, w->q_pitch, w->panel.rows, rows_from(x->k, from), keys, dim);
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
        call->uk->pv_few(w->o_rows, w->o_pitch, alpha, p, w->s_pitch, w->panel.rows, rows_from(x->v, from), keys, dim);
    else
        x->products->pv(w->state.o + row, alpha, p, ld, rows, x->v, x->skip + from, keys, dim);
}

/* The values with 0 for NaN and infinities, times v_scale, in their storage type. */
static fa_matrix finite_values(fa_work *w, fa_matrix v, int64_t keys) {
    const int64_t dim = w->state.v_head_dim, size = fa_size_of(v.dtype);
    const fa_matrix finite = {w->finite_v, dim * size, v.dtype};
    for (int64_t j = 0; j < keys; j++) {
        char *to = w->finite_v + j * finite.stride;
        memcpy(to, rows_from(v, j).at, (size_t)finite.stride);
        for (int64_t d = 0; d < dim; d++) {
            const float value = fa_get(to + d * size, v.dtype);
            if (!isfinite(value) || w->v_scale != 1.0f) fa_put(to + d * size, isfinite(value) ? value * w->v_scale : 0.0f, v.dtype);
        }
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
                const float power = w->few ? x->p[r * w->s_pitch + j] : x->products->power(x->p, ld, row + r, j);
                if (w->shown[j * ld + r] != -INFINITY) *o += power * value;
            }
        }
}

/* s by the rules, likewise. Those of few rows are turned for it, and back. */
static void rule_scores(fa_work *w, const fa_operands *x, float *s, int row, int rows, int64_t from, int64_t keys) {
    const fa_call *call = w->call;
    const int ld = call->rows.ld;
    const fa_score_rules rules = rules_at(&x->rules, row, from, ld);
    float *const turned = w->few ? w->shown : s;
    for (int r = 0; w->few && r < w->panel.rows; r++)
        for (int64_t j = 0; j < keys; j++) turned[j * ld + r] = s[r * w->s_pitch + j];
    call->uk->scores(turned, ld, rows, from, keys, &rules, w->state.seen + row);
    for (int r = 0; w->few && r < w->panel.rows; r++)
        for (int64_t j = 0; j < keys; j++) s[r * w->s_pitch + j] = turned[j * ld + r];
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
        if (rules_matter(x, row, rows, j, n))
            rule_scores(w, x, s, row, rows, j, n);
        else
            for (int r = row; r < row + rows; r++) t->seen[r] = 1.0f;
        there = products->softmax_beside && after > 0;
        if (there) {
            const fa_scores next = {scores_at(w, x, row, j + n - from), x->q + row, ld, rows, x->k, x->skip + j + n, after,
                                    call->args->head_dim};
            products->softmax_beside(s, p, ld, rows, n, call->exponent, t->m + row, l, alpha, &next);
        } else if (w->few)
            call->uk->softmax_few(s, w->s_pitch, w->panel.rows, n, call->exponent, t->m, l, alpha);
        else
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

/* With one vector of rows, or one panel and rows apart, the loop waits for memory, and the columns in which pv walks through V hide
 * from the hardware what comes next: ask for this block's values, and for as many keys after it. (What is widened is read in
 * order anyway, and the products of few rows look ahead themselves.) */
static void fetch_ahead(const fa_work *w, fa_matrix k, fa_matrix v, const fa_key_block *block) {
    const fastattn_attention_args *a = w->call->args;
    const int waits = w->panel.padded <= FA_ROW_STEP || (w->call->apart && w->call->rows.panels == 1);
    if (w->few || !waits || a->kv_dtype != FASTATTN_FLOAT32) return;
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

void fastattn_run_block(fa_work *w, const fa_key_block *block) {
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
    x.careful = w->v_scale != 1.0f ||
                ((block->partial || found & FA_MASK_HIDES || in_parts || block->keys < run->keys) &&
                 !all_finite(call, &run->finite_v, run->stored_v, run->keys, a->v_head_dim));
    if (w->few) {
        x.products = call->uk->products;
        x.k = x.stored_k;
        x.v = x.careful ? finite_values(w, x.stored_v, block->keys) : x.stored_v;
    } else
        choose_way(w, &x, block);
    x.p = x.products->in_place ? w->s : w->p;
    steps(w, &x, block);
}
