#include "block.h"

#include "ints.h"
#include "listbias.h"
#include "mass.h"
#include "nonfinite.h"
#include "operands.h"

/* The block's bias: the mask, and the element mask; of listed keys ALiBi as well. */
static unsigned block_bias(fa_work *w, const fa_key_block *block) {
    const fastattn_attention_args *a = w->call->args;
    unsigned found = FA_MASK_SHOWS;
    if (FA_HOLDS_SPARSE && FA_UNLIKELY(a->indices))
        return fastattn_bias_of_list(w->call, &w->panel, block, w->panel.products, w->panel.ld, w->bias);
    if (FA_HOLDS_MASK && FA_UNLIKELY(a->mask)) {
        fastattn_panel_mask(w->call, &w->panel, block->first);
        found = w->panel.products->mask(w->bias, w->panel.ld, w->panel.rows_of, w->panel.padded, a->mask_strides[3], block->keys,
                                        a->mask_dtype);
    }
    if (FA_HOLDS_SPARSE && FA_UNLIKELY(fa_hides(block)) && found & FA_MASK_SHOWS) {
        const unsigned of_bits = fastattn_hide_by_bits(w->call, &w->panel, block, w->panel.products, w->panel.ld, w->bias, w->keys_of);
        found = (found | of_bits) & (of_bits & FA_MASK_SHOWS ? ~0u : ~(unsigned)FA_MASK_SHOWS);
    }
    return found;
}

static float relative(int64_t key, int64_t first, int64_t keys) { return (float)fa_max(0, fa_min(key - first, keys)); }

/* The rules of a block; the panel's vectors are filled for it. */
static void block_rules(fa_score_rules *rules, const fa_work *w, const fa_key_block *block, int biased) {
    const fastattn_attention_args *a = w->call->args;
    const fa_panel *p = &w->panel;
    rules->scale = w->call->scoring.natural && !a->score_function ? a->scale : 1.0f; /* a function has been given finished scores */
    rules->softcap = a->score_function ? 0.0f : a->softcap;
    const int sloped = FA_UNLIKELY(a->alibi_slopes) && !a->indices;
    rules->slopes = sloped ? p->slopes : NULL;
    rules->offset = sloped ? p->offset_of : NULL;
    rules->begin = block->partial ? p->begin_of : NULL;
    rules->end = block->partial ? p->end_of : NULL;
    rules->bias = biased ? w->bias : NULL;
    for (int r = 0; r < p->padded && sloped; r++) p->offset_of[r] = (float)(p->query[r] + p->entry->offset - block->first);
    for (int r = 0; r < p->padded && block->partial; r++) {
        p->begin_of[r] = relative(p->begin[r], block->first, block->keys);
        p->end_of[r] = relative(p->end[r], block->first, block->keys);
    }
}

/* The powers of a row and key. */
static float *powers_at(const fa_work *w, const fa_operands *x, int row, int64_t key) {
    return x->p + key / 2 * x->products->pair_rows * fa_key_of_scores(x->products, w->panel.ld) +
           row * fa_row_of_scores(x->products, w->panel.ld);
}

/* The scores of a row and key, the first of its part: where the powers will be, or in two places by turns. */
static float *scores_at(const fa_work *w, const fa_operands *x, int row, int64_t key) {
    if (x->products->in_place) return powers_at(w, x, row, key);
    const int64_t place = key / x->products->score_keys % 2 * x->products->score_keys;
    return w->s + place * fa_key_of_scores(x->products, w->panel.ld) + row * fa_row_of_scores(x->products, w->panel.ld);
}

static const float *queries_at(const fa_work *w, const fa_operands *x, int row) {
    return x->q + row * fa_row_of_numbers(x->products, w->call->panel_dim);
}

/* Those of so many rows that are there, if the products ask: where o is by rows they are for few. */
static int rows_there(const fa_work *w, const fa_operands *x, int row, int rows) {
    return x->products->o_by_rows ? (int)fa_min(rows, w->panel.rows - row) : rows;
}

/* o = o alpha + v p, for `rows` rows from `row` on and `keys` keys from `from` of the block on, whose first power p is. */
static void add_values(fa_work *w, const fa_operands *x, const float *alpha, const float *p, int row, int rows, int64_t from,
                       int64_t keys) {
    fa_state *t = &w->state;
    x->products->pv(t->o + row * t->of_row, alpha, p, w->panel.ld, rows_there(w, x, row, rows), *x->v, x->skip + from, keys, t->v_head_dim);
}

/* Whether the rules change or hide some score of these rows and keys. */
static int rules_matter(const fa_operands *x, int row, int rows, int64_t from, int64_t keys) {
    if (x->ruled) return 1;
    return x->rules.end && (x->rules.begin[row + rows - 1] > (float)from || x->rules.end[row] < (float)(from + keys));
}

/* The scores in the caller's hands, a run of keys at a time: what bends a score comes before, what hides it afterwards. Where lanes
 * are rows they turn to runs of keys and back. */
static void call_score_function(fa_work *w, const fa_operands *x, float *s, int row, int rows, int64_t from, int64_t keys) {
    const fastattn_attention_args *a = w->call->args;
    const fa_panel *p = &w->panel;
    const fa_products *products = x->products, *in_float32 = w->call->uk->products;
    const int ld = w->panel.ld, real = (int)fa_min(rows, p->rows - row), bends = a->softcap != 0.0f || products->by_rows;
    float *run_of[FA_PANEL_ROWS], factor[FA_PANEL_ROWS], unused[FA_PANEL_ROWS] = {0};
    if (bends) {
        const fa_score_rules rules = {.scale = a->scale, .softcap = a->softcap};
        products->scores(s, ld, rows, from, keys, &rules, unused);
    }
    for (int r = 0; r < rows; r++) {
        run_of[r] = products->by_rows ? s + r * ld : w->shown + fa_min(r, real - 1) * fa_round_up(keys, FA_ROW_STEP);
        factor[r] = bends ? 1.0f : a->scale;
    }
    if (!products->by_rows) in_float32->unpack((void *const *)run_of, real, s, ld, factor, keys, FASTATTN_FLOAT32);
    for (int64_t n = 0, key, count; n < keys; n += count) {
        count = fastattn_listed_run(&p->list, x->first + from + n, keys - n, &key);
        for (int r = 0; r < real && key >= 0; r++)
            a->score_function(run_of[r] + n, count, p->entry->batch, p->head_of[row + r], p->query[row + r], p->entry->start + key,
                              a->score_context);
    }
    if (!products->by_rows) in_float32->pack(s, ld, (const void *const *)run_of, rows, keys, FASTATTN_FLOAT32, 1.0f);
}

/* From products to finished scores. */
static void finish_scores(fa_work *w, const fa_operands *x, float *s, int row, int rows, int64_t from, int64_t keys) {
    if (FA_UNLIKELY(x->mended)) fastattn_mend_scores(w, x, s, row, rows, from, keys);
    if (FA_UNLIKELY(w->call->args->score_function)) call_score_function(w, x, s, row, rows, from, keys);
    if (rules_matter(x, row, rows, from, keys)) {
        const fa_score_rules rules = fa_rules_at(x, row, from, w->panel.ld);
        x->products->scores(s, w->panel.ld, rows, from, keys, &rules, w->state.seen + row);
    } else
        for (int r = row; r < row + rows; r++) w->state.seen[r] = 1.0f;
}

/* Scores become weights each by itself: nothing moves, and earlier weights stay. */
static void activate(fa_work *w, const fa_operands *x, float *s, int rows, int64_t keys) {
    const int by_rows = x->products->by_rows;
    w->call->uk->activate(s, w->panel.ld, by_rows ? rows : keys, by_rows ? fa_round_up(keys, FA_ROW_STEP) : rows, &w->activation);
}

static int any_moved(const float *alpha, int rows) {
    int moved = 0;
    for (int r = 0; r < rows; r++) moved |= alpha[r] != 1.0f;
    return moved;
}

/* What slots may rely on, whatever they are called with for this rectangle. */
static int as_promised(const fa_work *w, const fa_operands *x, int row, int rows, int64_t from, int64_t keys) {
    const fa_products *products = x->products;
    return rows > 0 && keys > 0 && row + rows <= w->panel.padded && w->panel.rows <= products->panel_rows &&
           w->panel.padded <= fa_round_up(products->panel_rows, FA_ROW_STEP) && w->panel.ld % FA_ROW_STEP == 0 &&
           (products->by_rows ? keys <= w->panel.ld : (row | rows) % FA_ROW_STEP == 0 && row + rows <= w->panel.ld) && from >= 0 &&
           from + keys <= FA_MOST_BLOCK_KEYS && (x->skip + from) % FA_SUM_RUN == 0 && FA_ALIGNED(scores_at(w, x, row, 0)) &&
           FA_ALIGNED(powers_at(w, x, row, 0)) && FA_ALIGNED(queries_at(w, x, row)) && FA_ALIGNED(w->state.o);
}

/* The body of the loop, for a rectangle of rows and keys. Scores, which take more room than anything else, come in parts. Values are
 * added for as many keys at a time as there are, since all of o is read and written for that: with the last part, or when the
 * maximum moves. By then the powers of the parts before are relative to an older maximum, which is why there are two factors: o
 * takes these powers times `fade`, which the softmax of their first part has given it, and only then `alpha`, that of the part which
 * moved the maximum, is the one that its own powers will want. */
static void attend_rectangle(fa_work *w, const fa_operands *x, int row, int rows, int64_t from, int64_t keys) {
    const fa_call *call = w->call;
    const fa_products *products = x->products;
    const int64_t dim = call->args->head_dim;
    const int ld = w->panel.ld;
    fa_state *t = &w->state;
    float *l = products->sums && !call->args->lse ? NULL : t->l + row; /* sums are the better divisor */
    float *alpha = w->panel.alpha + row, *fade = w->panel.fade + row;
    const int64_t end = from + keys;
    int64_t added = from;
    int there = 0; /* the scores of the next part */
    FA_ASSERT(as_promised(w, x, row, rows, from, keys));
    for (int64_t j = from, n; j < end; j += n) {
        n = fa_min(products->score_keys, end - j);
        const int64_t after = fa_min(products->score_keys, end - j - n);
        float *s = scores_at(w, x, row, j - from), *p = powers_at(w, x, row, j - from);
        if (!there) products->qk(s, queries_at(w, x, row), ld, rows_there(w, x, row, rows), *x->k, x->skip + j, n, dim);
        finish_scores(w, x, s, row, rows, j, n);
        if (FA_UNLIKELY(w->activation.kind != FASTATTN_SOFTMAX)) {
            activate(w, x, s, rows, n);
            if (FA_HOLDS_SEGMENTS && FA_UNLIKELY(call->args->segments)) fastattn_mass_add(w, x, alpha, s, row, rows, j, n);
            continue;
        }
        there = products->softmax_beside && after > 0;
        if (FA_UNLIKELY(there)) {
            const fa_scores next = {
                scores_at(w, x, row, j + n - from), queries_at(w, x, row), ld, rows, *x->k, x->skip + j + n, after, dim};
            products->softmax_beside(s, p, ld, rows, n, call->scoring.exponent, t->m + row, l, alpha, &next);
        } else products->softmax(s, p, ld, rows, n, call->scoring.exponent, t->m + row, l, alpha);
        if (FA_HOLDS_SEGMENTS && FA_UNLIKELY(call->args->segments)) {
            fastattn_mass_add(w, x, alpha, p, row, rows, j, n);
            continue;
        }
        if (j > from && !any_moved(alpha, rows)) continue;
        if (FA_UNLIKELY(j > added)) add_values(w, x, fade, powers_at(w, x, row, added - from), row, rows, added, j - added);
        float *const spare = fade;
        fade = alpha;
        alpha = spare;
        added = j;
    }
    add_values(w, x, fade, powers_at(w, x, row, added - from), row, rows, added, end - added);
    if (FA_UNLIKELY(x->careful)) fastattn_add_non_finite(w, x, row, rows, from, keys);
}

/* What of a block some row sees, in rectangles. At an edge, where it saves a quarter of the work or more, every FA_ROW_STEP rows take
 * just the keys that one of them sees, in whole runs of the softmax's sum, so that leaving keys out changes no bit. */
static void attend_visible(fa_work *w, const fa_operands *x, const fa_key_block *block) {
    const fa_panel *p = &w->panel;
    if (!block->partial && !fa_hides(block)) {
        attend_rectangle(w, x, 0, p->padded, 0, block->keys);
        return;
    }
    const int groups = (int)fa_ceil_div(p->padded, FA_ROW_STEP);
    int64_t narrowed = 0, first = block->keys, end = 0;
    for (int g = 0; g < groups; g++) {
        int64_t from = fa_hides(block) ? w->keys_of[g].from : 0, to = fa_hides(block) ? w->keys_of[g].to : block->keys;
        if (block->partial) {
            from = fa_max(from, (int64_t)p->begin_of[g * FA_ROW_STEP]);
            to = fa_min(to, (int64_t)p->end_of[fa_min((g + 1) * FA_ROW_STEP, p->padded) - 1]);
        }
        w->keys_of[g].from = from / FA_SUM_RUN * FA_SUM_RUN;
        w->keys_of[g].to = from < to ? fa_min(fa_round_up(to, FA_SUM_RUN), block->keys) : w->keys_of[g].from;
        if (from >= to) continue;
        narrowed += w->keys_of[g].to - w->keys_of[g].from;
        first = fa_min(first, w->keys_of[g].from);
        end = fa_max(end, w->keys_of[g].to);
    }
    if (narrowed > 0 && 4 * narrowed > 3 * groups * (end - first)) {
        attend_rectangle(w, x, 0, w->panel.padded, first, end - first);
        return;
    }
    for (int g = 0; g < groups; g++) {
        const int row = g * FA_ROW_STEP;
        const int64_t from = w->keys_of[g].from, keys = w->keys_of[g].to - from;
        if (keys > 0) attend_rectangle(w, x, row, (int)fa_min(FA_ROW_STEP, w->panel.padded - row), from, keys);
    }
}

void fastattn_run_block(fa_work *w, const fa_key_block *block) {
    const fa_call *call = w->call;
    const fastattn_attention_args *a = call->args;
    const unsigned found = block_bias(w, block);
    if (FA_UNLIKELY(!(found & FA_MASK_SHOWS))) return;
    const int biased = found & FA_MASK_HIDES || (a->mask && a->mask_dtype != FASTATTN_BOOL) || (a->indices && a->alibi_slopes);
    const int in_parts = w->panel.products->in_parts;
    fa_run *run = fastattn_run_of(w, block);
    fa_operands x;
    fastattn_source_of(w, &x);
    x.first = block->first;
    x.before = block->first - run->first;
    block_rules(&x.rules, w, block, biased);
    fastattn_fetch_ahead(w, &x, block);
    x.ruled = call->scoring.ruled || biased;
    const int64_t beside = call->heads.beside;
    x.mended = in_parts && !(w->q_finite && fastattn_all_finite(call, &run->finite_k, run->stored_k, run->keys, a->head_dim * beside));
    x.careful = w->v_scale != 1.0f || ((block->partial || found & FA_MASK_HIDES || in_parts || block->keys < run->keys) &&
                                       !fastattn_all_finite(call, &run->finite_v, run->stored_v, run->keys, a->v_head_dim * beside));
    fastattn_choose_operands(w, &x, block);
    x.p = x.products->in_place ? w->s : w->p;
    attend_visible(w, &x, block);
}
