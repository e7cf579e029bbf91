#include "nonfinite.h"

#include "../ukernel/storage.h"
#include "ints.h"

#include <math.h>
#include <string.h>

void fastattn_mend_scores(fa_work *w, const fa_operands *x, float *s, int row, int rows, int64_t from, int64_t keys) {
    const fa_call *call = w->call;
    const fastattn_attention_args *a = call->args;
    const fa_matrix k = fa_stored_k(x);
    const int64_t q_size = fa_size_of(a->q_dtype), k_size = fa_size_of(k.dtype);
    const int64_t of_row = fa_row_of_scores(x->products, w->panel.ld), of_key = fa_key_of_scores(x->products, w->panel.ld);
    int odd_row[FA_PANEL_ROWS];
    fastattn_panel_queries(call, &w->panel);
    for (int r = row; r < row + rows; r++) {
        const fa_matrix q = fa_matrix_at(w->panel.rows_of[r], 0, a->q_dtype);
        odd_row[r] = !call->uk->finite(q, 1, a->head_dim);
    }
    for (int64_t j = 0; j < keys; j++) {
        const char *key = fa_row_at(k, from + j);
        const int odd_key = !call->uk->finite(fa_matrix_at(key, 0, k.dtype), 1, a->head_dim);
        for (int r = row; r < row + rows; r++) {
            if (!odd_key && !odd_row[r]) continue;
            const char *q = w->panel.rows_of[r];
            float sum = 0.0f;
            for (int64_t d = 0; d < a->head_dim; d++)
                sum += call->scoring.sign * fa_get(q + d * q_size, a->q_dtype) * fa_get(key + d * k_size, k.dtype);
            s[j * of_key + (r - row) * of_row] = sum;
        }
    }
}

fa_matrix fastattn_finite_values(fa_work *w, fa_matrix v, int64_t keys) {
    const int64_t dim = w->state.v_head_dim * w->call->heads.beside, size = fa_size_of(v.dtype);
    fa_matrix finite = fa_matrix_at(w->finite_v, fa_row_bytes(v.dtype, dim), v.dtype);
    const int quantised = fa_is_quantised(v.dtype);
    finite.beside = v.beside;
    for (int64_t j = 0; j < keys; j++) {
        char *to = w->finite_v + j * finite.stride;
        memcpy(to, fa_row_at(v, j), (size_t)finite.stride);
        for (int64_t d = 0; d < dim && quantised; d += v.dtype == FASTATTN_INT8 ? dim : FA_GROUP) {
            const float scale = fa_scale_at(to, d, dim, v.dtype);
            fa_put_scale(to, isfinite(scale * 128.0f) ? scale * w->v_scale : 0.0f, d, dim, v.dtype);
        }
        for (int64_t d = 0; d < dim && !quantised; d++) {
            const float value = fa_get(to + d * size, v.dtype);
            if (!isfinite(value) || w->v_scale != 1.0f) fa_put(to + d * size, isfinite(value) ? value * w->v_scale : 0.0f, v.dtype);
        }
    }
    return finite;
}

void fastattn_add_non_finite(fa_work *w, const fa_operands *x, int row, int rows, int64_t from, int64_t keys) {
    const fa_state *t = &w->state;
    const int ld = w->panel.ld, real = (int)fa_min(rows, w->panel.rows - row);
    const fa_matrix v = fa_stored_v(x);
    const int64_t dim = t->v_head_dim;
    const int64_t of_row = fa_row_of_scores(x->products, ld), of_key = fa_key_of_scores(x->products, ld);
    const fa_score_rules rules = fa_rules_at(x, row, from, ld);
    float unused[FA_PANEL_ROWS] = {0};
    /* The rules applied to zeros: -inf exactly where hidden. */
    const int64_t whole = fa_round_up(keys, FA_ROW_STEP);
    for (int64_t j = 0; j < (of_key == 1 ? whole : keys); j++)
        for (int r = 0; r < rows; r++) w->shown[j * of_key + r * of_row] = 0.0f;
    x->products->scores(w->shown, ld, rows, from, keys, &rules, unused);
    for (int64_t j = 0; j < keys; j++)
        for (int64_t n = 0; n < dim * w->call->heads.beside; n++) {
            const float value = fa_get_of_row(fa_row_at(v, from + j), n, dim, v.dtype);
            if (isfinite(value)) continue;
            const int64_t head = n / dim, d = n - head * dim;
            for (int r = 0; r < real; r++)
                if (w->shown[j * of_key + r * of_row] != -INFINITY && (!v.beside || row + r == head))
                    t->o[(row + r) * t->of_row + d * t->of_number] += x->products->power(x->p, ld, row + r, j) * value;
        }
}
