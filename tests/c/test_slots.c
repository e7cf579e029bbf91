/* Every slot of a table of products, those in float32 and by rows above all, against its sentence in ukernel.h, in double
 * precision, on edge sizes and guarded buffers. Bytes that a slot has no business with keep their pattern. */
#include "slots.h"

#include <float.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/cpu.h"

static const fa_products *products(void) { return table()->products; }

static float *random_panel(const char *name, int64_t rows, int ld, double amplitude) {
    float *x = panel(name, rows, ld);
    for (int64_t n = 0; n < rows * ld; n++)
        x[n] = (float)(amplitude * random_signed(&rng));
    return x;
}

/* Nothing outside of the columns was written. */
static void check_outside(const char *what, const float *x, int64_t rows, struct columns c) {
    for (int64_t n = 0; n < rows; n++)
        for (int i = 0; i < c.ld; i++)
            CHECK((i >= c.first && i < c.first + c.rows) || x[n * c.ld + i] == UNTOUCHED, "%s[%lld][%d] was written",
                  what, (long long)n, i);
    guard_check();
    guard_release();
}

static void check_pack(const fa_products *by) {
    for (size_t e = 0; e < COUNT(edges); e++)
        for (size_t n = 0; n < COUNT(columns) * COUNT(dtypes); n++) {
            const struct columns c = columns[n / COUNT(dtypes)];
            const fastattn_dtype dtype = dtypes[n % COUNT(dtypes)];
            const int64_t item = (int64_t)dtype_size(dtype);
            const float sign = n % 4 == 1 ? -1 : n % 4 == 2 ? 0 : 1;
            const void *rows_of[FA_PANEL_ROWS];
            if (c.first != 0)
                continue;
            const int pitch = by->by_rows ? (int)fa_round_up(edges[e], FA_ROW_STEP) : c.ld;
            context("%s, pack %lld x %d from dtype %d", by->name, (long long)edges[e], c.rows, (int)dtype);
            random_rows(rows_of, c.rows, (int)(e % (size_t)c.rows) + 1, edges[e], (edges[e] + 1) * item, dtype);
            float *q = panel("q", by->by_rows ? c.rows : edges[e], pitch);
            guard_seal();
            by->pack(q, c.ld, rows_of, c.rows, edges[e], dtype, sign);
            for (int64_t d = 0; d < edges[e]; d++)
                for (int r = 0; r < c.rows; r++)
                    check_close("q", d, r, q[number_at(by, c.ld, edges[e], r, d)], sign * load(dtype, (const char *)rows_of[r] + d * item), 0);
            for (int r = 0; by->by_rows && r < c.rows; r++)
                for (int64_t d = edges[e]; d < pitch; d++) check_close("q", r, d, q[r * pitch + d], 0, 0);
            if (by->by_rows)
                guard_check(), guard_release();
            else
                check_outside("q", q, edges[e], c);
        }
}

TEST_EACH_ISA(slot_pack) {
    const fa_ukernel *uk = table();
    check_pack(uk->products);
    check_pack(uk->few);
}

/* Every bit pattern of a 16-bit float, there and back. Only a NaN may come back as another NaN. */
TEST_EACH_ISA(slot_widen_and_unpack_all_halves) {
    enum { ROWS = 16, COLUMNS = 4096 };
    const fa_ukernel *uk = table();
    for (size_t n = 1; n < COUNT(dtypes); n++) {
        uint16_t *from = guard_input("from", ROWS * COLUMNS * 2, 2, GUARD_BEHIND);
        uint16_t *back = guard_output("back", ROWS * COLUMNS * 2, 2, GUARD_BEHIND);
        float *to = guard_output("to", ROWS * COLUMNS * 4, 64, GUARD_BEHIND), *o = panel("o", COLUMNS, ROWS),
              factor[ROWS];
        void *rows_of[ROWS];
        for (int x = 0; x < ROWS * COLUMNS; x++)
            from[x] = (uint16_t)x;
        guard_seal();
        uk->widen(to, fa_matrix_at((const char *)from, COLUMNS * 2, dtypes[n]), ROWS, COLUMNS);
        for (int x = 0; x < ROWS * COLUMNS; x++) {
            check_close("to", x / COLUMNS, x % COLUMNS, to[x], load(dtypes[n], &from[x]), 0);
            o[x % COLUMNS * ROWS + x / COLUMNS] = to[x];
        }
        for (int r = 0; r < ROWS; r++) {
            factor[r] = 1;
            rows_of[r] = back + r * COLUMNS;
        }
        uk->products->unpack(rows_of, ROWS, o, ROWS, factor, COLUMNS, dtypes[n]);
        for (int x = 0; x < ROWS * COLUMNS; x++)
            CHECK(back[x] == from[x] || (isnan(load(dtypes[n], &from[x])) && isnan(load(dtypes[n], &back[x]))),
                  "dtype %d: %#x came back as %#x", (int)dtypes[n], (unsigned)from[x], (unsigned)back[x]);
        guard_release();
    }
}

TEST_EACH_ISA(slot_qk) {
    const fa_products *uk = products();
    for (size_t e = 0; e < COUNT(edges) * 3; e++) {
        const int64_t head_dim = edges[e / 3], keys = edges[e * 7 % COUNT(edges)];
        const int64_t stride = e % 4 == 1 ? -head_dim - 1 : e % 4 == 2 ? 0 : head_dim + (int64_t)(e % 3);
        const struct columns c = columns[e % COUNT(columns)];
        context("qk %lld x %lld, stride %lld, columns %d to %d of %d", (long long)keys, (long long)head_dim,
                (long long)stride, c.first, c.first + c.rows, c.ld);
        const float *q = random_panel("q", head_dim, c.ld, 1);
        const float *k = random_floats("k", head_dim + (keys - 1) * llabs((long long)stride), 1);
        float *s = panel("s", keys, c.ld);
        if (stride < 0)
            k -= (keys - 1) * stride;
        guard_seal();
        uk->qk(s + c.first, q + c.first, c.ld, c.rows, fa_matrix_at((const char *)k, stride * 4, FASTATTN_FLOAT32), 0, keys, head_dim);
        for (int64_t j = 0; j < keys; j++)
            for (int r = c.first; r < c.first + c.rows; r++) {
                struct sum sum = {0, 0};
                for (int64_t d = 0; d < head_dim; d++)
                    add(&sum, (double)k[j * stride + d] * q[d * c.ld + r]);
                check_close("s", j, r, s[j * c.ld + r], sum.value, rounding_of_sum(head_dim) * sum.magnitude);
            }
        check_outside("s", s, keys, c);
    }
}

TEST_EACH_ISA(slot_pv) {
    const fa_products *uk = products();
    for (size_t e = 0; e < COUNT(edges) * 3; e++) {
        const int64_t dim = edges[e / 3], keys = edges[e * 7 % COUNT(edges)];
        const int64_t stride = e % 4 == 1 ? -dim - 1 : e % 4 == 2 ? 0 : dim + (int64_t)(e % 3);
        const struct columns c = columns[e % COUNT(columns)];
        float before[130 * FA_PANEL_ROWS];
        context("pv %lld x %lld, stride %lld, columns %d to %d of %d", (long long)keys, (long long)dim,
                (long long)stride, c.first, c.first + c.rows, c.ld);
        const float *p = random_panel("p", keys, c.ld, 1), *alpha = random_panel("alpha", 1, c.ld, 1);
        const float *v = random_floats("v", dim + (keys - 1) * llabs((long long)stride), 1);
        float *o = panel("o", dim, c.ld);
        for (int64_t d = 0; d < dim; d++)
            for (int r = c.first; r < c.first + c.rows; r++)
                o[d * c.ld + r] = (float)random_signed(&rng);
        memcpy(before, o, (size_t)(dim * c.ld) * 4);
        if (stride < 0)
            v -= (keys - 1) * stride;
        guard_seal();
        uk->pv(o + c.first, alpha + c.first, p + c.first, c.ld, c.rows, fa_matrix_at((const char *)v, stride * 4, FASTATTN_FLOAT32), 0, keys, dim);
        for (int64_t d = 0; d < dim; d++)
            for (int r = c.first; r < c.first + c.rows; r++) {
                struct sum sum = {0, 0};
                add(&sum, (double)before[d * c.ld + r] * alpha[r]);
                for (int64_t j = 0; j < keys; j++)
                    add(&sum, (double)v[j * stride + d] * p[j * c.ld + r]);
                check_close("o", d, r, o[d * c.ld + r], sum.value, rounding_of_sum(keys) * sum.magnitude);
            }
        check_outside("o", o, dim, c);
    }
}

/* Case e of the products by rows: their sizes, and the keys or values. */
struct few {
    int rows;
    int64_t dim, pitch, keys, s_pitch;
    fa_matrix stored;
};

enum { FEW_ROWS = 32, FEW_CASES = (int)COUNT(edges) * 2 * FEW_ROWS };

static struct few few_case(const char *slot, size_t e) {
    const fastattn_dtype dtype = dtypes[e % COUNT(dtypes)];
    const int rows = 1 + (int)(e % FEW_ROWS);
    const int64_t dim = edges[e / (2 * FEW_ROWS)], keys = edges[e * 7 % COUNT(edges)], gap = (int64_t)(e % 3);
    const int64_t stride = (e % 4 == 1 ? -dim - gap : e % 4 == 2 ? 0 : dim + gap) * (int64_t)dtype_size(dtype);
    context("%s %d rows, %lld x %lld, stride %lld, dtype %d", slot, rows, (long long)keys, (long long)dim, (long long)stride,
            (int)dtype);
    return (struct few){rows, dim, fa_round_up(dim, FA_ROW_STEP), keys, fa_round_up(keys, FA_ROW_STEP) + (e % 5 ? 0 : FA_ROW_STEP),
                        stored_rows("stored", keys, dim, stride, dtype)};
}

static void check_rows_qk(const fa_products *by, fastattn_dtype q_dtype, const char *slot, int any_keys) {
    for (size_t e = 0; e < FEW_CASES; e++) {
        const struct few x = few_case(slot, e);
        const void *rows_of[FA_PANEL_ROWS];
        if (!any_keys && x.stored.dtype != q_dtype) {
            guard_release();
            continue;
        }
        float *q = panel("q", x.rows, (int)x.pitch), *s = panel("s", x.rows, (int)x.s_pitch);
        random_rows(rows_of, x.rows, x.rows, x.dim, x.dim * (int64_t)dtype_size(q_dtype), q_dtype);
        guard_seal();
        by->pack(q, (int)x.s_pitch, rows_of, x.rows, x.dim, q_dtype, 1.0f);
        by->qk(s, q, (int)x.s_pitch, x.rows, x.stored, 0, x.keys, x.dim);
        for (int64_t j = 0; j < x.keys; j++)
            for (int r = 0; r < x.rows; r++) {
                struct sum sum = {0, 0};
                for (int64_t d = 0; d < x.dim; d++)
                    add(&sum, stored_number(x.stored, j, d) * load(q_dtype, (const char *)rows_of[r] + d * (int64_t)dtype_size(q_dtype)));
                check_close("s", j, r, s[r * x.s_pitch + j], sum.value, rounding_of_sum(x.dim) * sum.magnitude);
            }
        check_outside("s", s, x.rows, (struct columns){(int)x.s_pitch, 0, (int)fa_round_up(x.keys, FA_ROW_STEP)});
    }
}

#ifdef FA_HOLDS_FMLAL
/* Halves that are multiplied as they are give what float32 numbers do: of so few rows that float32 turns no keys for them. */
static void check_qk_of_halves(const fa_products *by) {
    for (size_t e = 0; e < FEW_CASES; e++) {
        const struct few x = few_case("qk of halves", e);
        const void *rows_of[FA_PANEL_ROWS];
        if (x.stored.dtype != FASTATTN_FLOAT16 || x.rows > 24) {
            guard_release();
            continue;
        }
        const fa_products *const sides[2] = {by, table()->few};
        float *s[2];
        random_rows(rows_of, x.rows, x.rows, x.dim, x.dim * 2, FASTATTN_FLOAT16);
        for (int side = 0; side < 2; side++) {
            float *q = panel("q", x.rows, (int)x.pitch);
            s[side] = panel("s", x.rows, (int)x.s_pitch);
            sides[side]->pack(q, (int)x.s_pitch, rows_of, x.rows, x.dim, FASTATTN_FLOAT16, -1.0f);
            sides[side]->qk(s[side], q, (int)x.s_pitch, x.rows, x.stored, 0, x.keys, x.dim);
        }
        for (int r = 0; r < x.rows; r++)
            for (int64_t j = 0; j < x.keys; j++) check_close("s", r, j, s[0][r * x.s_pitch + j], s[1][r * x.s_pitch + j], 0);
        guard_check();
        guard_release();
    }
}
#endif

TEST_EACH_ISA(slot_rows_qk) {
    check_rows_qk(table()->few, FASTATTN_FLOAT32, "qk by rows", table()->few_quantised != NULL);
#ifdef FA_HOLDS_AVX512_BF16
    if (test_isa == FASTATTN_ISA_AVX512 && fastattn_cpu_has(FA_CPU_AVX512_BF16))
        check_rows_qk(fastattn_products_bfloat16_avx512.few, FASTATTN_BFLOAT16, "bfloat16 qk by rows", 0);
#endif
#ifdef FA_HOLDS_FMLAL
    if (test_isa == FASTATTN_ISA_NEON && fastattn_cpu_has(FA_CPU_FMLAL)) {
        check_rows_qk(&fastattn_products_float16_neon, FASTATTN_FLOAT16, "float16 qk by rows", 0);
        check_qk_of_halves(&fastattn_products_float16_neon);
    }
#endif
}

TEST_EACH_ISA(slot_rows_pv) {
    const fa_ukernel *uk = table();
    for (size_t e = 0; e < FEW_CASES; e++) {
        const struct few x = few_case("pv by rows", e);
        const float *p = random_panel("p", x.rows, (int)x.s_pitch, 1), *alpha = random_panel("alpha", 1, 2 * FA_ROW_STEP, 1);
        float *o = random_panel("o", x.rows, (int)x.pitch, 1), before[FEW_ROWS * 144];
        memcpy(before, o, (size_t)(x.rows * x.pitch) * 4);
        guard_seal();
        uk->few->pv(o, alpha, p, (int)x.s_pitch, x.rows, x.stored, 0, x.keys, x.dim);
        for (int r = 0; r < x.rows; r++)
            for (int64_t d = 0; d < x.dim; d++) {
                struct sum sum = {0, 0};
                add(&sum, (double)before[r * x.pitch + d] * alpha[r]);
                for (int64_t j = 0; j < x.keys; j++)
                    add(&sum, stored_number(x.stored, j, d) * (double)p[r * x.s_pitch + j]);
                check_close("o", r, d, o[r * x.pitch + d], sum.value, rounding_of_sum(x.keys) * sum.magnitude);
            }
        guard_check();
        guard_release();
    }
}

static void check_mask(const fa_products *by) {
    static const fastattn_dtype kinds[] = {FASTATTN_BOOL, FASTATTN_FLOAT16, FASTATTN_BFLOAT16, FASTATTN_FLOAT32,
                                           FASTATTN_FLOAT64};
    for (size_t e = 0; e < COUNT(edges); e++)
        for (size_t n = 0; n < COUNT(kinds) * 16; n++) {
            static const int steps[] = {1, 2, -2, 3}; /* elements between keys */
            const fastattn_dtype dtype = kinds[n / 16];
            const int64_t item = (int64_t)dtype_size(dtype), keys = edges[e];
            const int step = steps[n % 4], hidden = n / 4 % 4; /* none, some, all, all but one */
            const int rows = by->by_rows ? 1 + (int)(e % 20) : 16 * (1 + (int)(e % 4)), distinct = (n + n / 4) % 2 ? rows : 1;
            const int ld = by->by_rows ? (int)fa_round_up(keys, FA_ROW_STEP) : rows;
            const void *rows_of[FA_PANEL_ROWS];
            unsigned shows = 0, hides = 0;
            context("%s, mask %lld x %d of dtype %d, step %d, hidden %d", by->name, (long long)keys, rows, (int)dtype, step, hidden);
            const int64_t count = (keys - 1) * (step < 0 ? -step : step) + 1;
            random_rows(rows_of, rows, distinct, count, count * item, dtype);
            for (int r = 0; r < rows; r++)
                if (step < 0)
                    rows_of[r] = (const char *)rows_of[r] + (count - 1) * item;
            for (int r = 0; r < distinct; r++)
                for (int64_t j = 0; j < keys; j++) {
                    int hide = hidden == 1 ? random_between(&rng, 0, 1) : hidden == 2 || (hidden == 3 && (r || j));
                    void *at = (char *)(uintptr_t)rows_of[r] + j * step * item;
                    store(dtype, at,
                          dtype == FASTATTN_BOOL ? (hide ? 0 : 7)
                          : hide                 ? -(double)INFINITY
                                                 : (double)(float)random_signed(&rng));
                    shows |= !hide;
                    hides |= hide != 0;
                }
            float *tile = panel("tile", by->by_rows ? rows : keys, ld);
            guard_seal();
            const unsigned found = by->mask(tile, ld, rows_of, rows, step * item, keys, dtype);
            CHECK(!!(found & FA_MASK_SHOWS) == shows && !!(found & FA_MASK_HIDES) == hides, "found %u", found);
            for (int64_t j = 0; j < keys; j++)
                for (int r = 0; r < rows; r++) {
                    double element = load(dtype, (const char *)rows_of[r] + j * step * item);
                    if (dtype == FASTATTN_BOOL)
                        element = element != 0 ? 0 : -(double)INFINITY;
                    check_close("tile", j, r, tile[score_at(by, ld, r, j)], element, 0);
                }
            guard_check();
            guard_release();
        }
}

TEST_EACH_ISA(slot_mask) {
    const fa_ukernel *uk = table();
    check_mask(uk->products);
    check_mask(uk->few);
}

static void check_rules(const fa_products *by) {
    for (unsigned kind = 0; kind < 16; kind++) /* every combination of rules */
        for (size_t e = 0; e < COUNT(edges); e++) {
            const struct columns c = columns[(e + kind) % COUNT(columns)];
            const int64_t keys = edges[e], first = (int64_t)(e % 3) * 5;
            const int ld = by->by_rows ? (int)fa_round_up(keys, FA_ROW_STEP) : c.ld;
            const int rows = by->by_rows ? c.rows - (int)(e % 4) : c.rows;
            context("%s, scores by rules %u, %lld keys, rows %d to %d of %d", by->name, kind, (long long)keys, c.first,
                    c.first + rows, c.ld);
            float *slopes = random_panel("slopes", 1, c.ld, 1), *offset = panel("offset", 1, c.ld);
            float *begin = panel("begin", 1, c.ld), *end = panel("end", 1, c.ld),
                  *bias = random_panel("bias", by->by_rows ? c.ld : keys, ld, 3);
            float *s = panel("s", by->by_rows ? c.ld : keys, ld), *seen = panel("seen", 1, c.ld), before[144 * FA_PANEL_ROWS];
            for (int r = c.first; r < c.first + rows; r++) {
                offset[r] = (float)random_between(&rng, -20, 200);
                begin[r] = (float)random_between(&rng, -5, first + keys);
                end[r] = (float)random_between(&rng, -5, first + keys + 5);
                seen[r] = r % 3 == 0;
                for (int64_t j = 0; j < keys; j++) {
                    s[score_at(by, ld, r, j)] = (float)(20 * random_signed(&rng));
                    if ((r + j) % 4 == 0)
                        bias[score_at(by, ld, r, j)] = -INFINITY;
                }
            }
            memcpy(before, s, (size_t)(by->by_rows ? c.ld : keys) * (size_t)ld * 4);
            const fa_score_rules rules = {.scale = 0.7f,
                                          .softcap = kind & 1 ? 5 : 0,
                                          .slopes = kind & 2 ? slopes + c.first : NULL,
                                          .offset = kind & 2 ? offset + c.first : NULL,
                                          .begin = kind & 4 ? begin + c.first : NULL,
                                          .end = kind & 4 ? end + c.first : NULL,
                                          .bias = kind & 8 ? bias + score_at(by, ld, c.first, 0) : NULL};
            by->scores(s + score_at(by, ld, c.first, 0), ld, rows, first, keys, &rules, seen + c.first);
            for (int r = c.first; r < c.first + rows; r++) {
                int visible = r % 3 == 0;
                for (int64_t j = 0; j < keys; j++) {
                    double x = (double)rules.scale * before[score_at(by, ld, r, j)];
                    if (kind & 1)
                        x = 5 * tanh(x / 5);
                    if (kind & 2)
                        x -= slopes[r] * fabs((double)offset[r] - (double)(first + j));
                    if (kind & 8)
                        x += bias[score_at(by, ld, r, j)];
                    if (kind & 4 && ((double)(first + j) < begin[r] || (double)(first + j) >= end[r]))
                        x = -(double)INFINITY;
                    visible |= !isinf(x);
                    check_close("s", j, r, s[score_at(by, ld, r, j)], x, 1e-5 + FLT_EPSILON * fabs(x));
                }
                check_close("seen", 0, r, seen[r], visible, 0);
            }
            if (by->by_rows) {
                for (int64_t n = 0; n < (int64_t)c.ld * ld; n++)
                    CHECK((n >= (int64_t)c.first * ld && n < (int64_t)(c.first + rows) * ld) || s[n] == UNTOUCHED, "s[%lld] was written", (long long)n);
                guard_check();
                guard_release();
            } else
                check_outside("s", s, keys, c);
        }
}

TEST_EACH_ISA(slot_scores) {
    const fa_ukernel *uk = table();
    check_rules(uk->products);
    check_rules(uk->few);
}

/* The softmax of columns of a panel, or of few rows of their own. */
static void check_softmax(struct columns c, int few, int64_t keys, float unit) {
    const fa_ukernel *uk = table();
    const int64_t pitch = fa_round_up(keys, FA_ROW_STEP) + FA_ROW_STEP;
    const int64_t of_row = few ? pitch : 1, of_key = few ? 1 : c.ld, rows = few ? c.rows : keys, ld = few ? pitch : c.ld;
    float *s = panel("s", rows, (int)ld), *m = panel("m", 1, c.ld), *l = panel("l", 1, c.ld), *alpha = panel("alpha", 1, c.ld);
    float old_s[160 * FA_PANEL_ROWS], old_m[FA_PANEL_ROWS], old_l[FA_PANEL_ROWS];
    for (int r = c.first; r < c.first + c.rows; r++) {
        m[r] = r % 3 == 0 ? -INFINITY : (float)(10 * random_signed(&rng));
        l[r] = r % 3 == 0 ? 0 : (float)(2 + random_signed(&rng));
        for (int64_t j = 0; j < keys; j++)
            s[j * of_key + r * of_row] =
                r % 6 == 0 || random_between(&rng, 0, 4) == 0 ? -INFINITY : (float)(12 * random_signed(&rng));
    }
    if (keys > 2 && c.rows > 1)
        s[2 * of_key + (c.first + 1) * of_row] = NAN; /* in one row, which it takes whole */
    memcpy(old_s, s, (size_t)(rows * ld) * 4);
    memcpy(old_m, m, (size_t)c.ld * 4);
    memcpy(old_l, l, (size_t)c.ld * 4);
    guard_seal();
    if (few)
        uk->few->softmax(s, s, (int)pitch, c.rows, keys, unit, m, l, alpha);
    else
        uk->products->softmax(s + c.first, s + c.first, c.ld, c.rows, keys, unit, m + c.first, l + c.first, alpha + c.first);
    for (int r = c.first; r < c.first + c.rows; r++) {
        double top = old_m[r], sum = 0;
        int spoilt = 0;
        for (int64_t j = 0; j < keys; j++) {
            top = fmax(top, old_s[j * of_key + r * of_row]);
            spoilt |= isnan(old_s[j * of_key + r * of_row]);
        }
        if (spoilt) {
            CHECK(isnan(l[r]), "a NaN among the scores of row %d is gone: l is %g", r, (double)l[r]);
            continue;
        }
        check_close("m", 0, r, m[r], top, 0);
        for (int64_t j = 0; j < keys; j++) {
            double p = isinf(top) ? 0 : exp2((double)unit * (old_s[j * of_key + r * of_row] - top));
            check_close("s", j, r, s[j * of_key + r * of_row], p, 4e-6);
            sum += p;
        }
        if (!isinf(top)) {
            check_close("alpha", 0, r, alpha[r], exp2((double)unit * (old_m[r] - top)), 4e-6);
            sum += old_l[r] * exp2((double)unit * (old_m[r] - top));
        }
        check_close("l", 0, r, l[r], sum, 4e-6 * (1 + sum));
    }
    for (int r = c.first + c.rows; few && r < c.ld; r++) check_close("m", 0, r, m[r], UNTOUCHED, 0);
    check_outside("s", s, rows, few ? (struct columns){(int)pitch, 0, (int)fa_round_up(keys, FA_ROW_STEP)} : c);
}

TEST_EACH_ISA(slot_softmax) {
    for (size_t e = 0; e < COUNT(edges) * 3; e++) {
        const struct columns c = columns[e % COUNT(columns)];
        const int64_t keys = edges[e / 3];
        context("softmax of %lld keys, columns %d to %d of %d", (long long)keys, c.first, c.first + c.rows, c.ld);
        check_softmax(c, 0, keys, e % 2 ? 1.4426950f : 0.18f);
    }
}

TEST_EACH_ISA(slot_rows_softmax) {
    for (size_t e = 0; e < COUNT(edges) * FEW_ROWS; e++) {
        const struct columns c = {2 * FA_ROW_STEP, 0, 1 + (int)(e % FEW_ROWS)};
        const int64_t keys = edges[e / FEW_ROWS];
        context("softmax by rows of %lld keys, %d rows", (long long)keys, c.rows);
        check_softmax(c, 1, keys, e % 2 ? 1.4426950f : 0.18f);
    }
}

static void check_unpack(const fa_products *by) {
    for (size_t e = 0; e < COUNT(edges); e++)
        for (size_t n = 0; n < COUNT(dtypes) * 9; n++) {
            const fastattn_dtype dtype = dtypes[n % 3];
            const int counts[] = {1, 2, 7, 15, 16, 17, 33, 63, 64};
            const int count = counts[n / 3], ld = (count + 15) / 16 * 16;
            const int64_t dim = edges[e], item = (int64_t)dtype_size(dtype), gap = (int64_t)(e % 3) * item;
            void *rows_of[FA_PANEL_ROWS];
            context("%s, unpack %lld x %d to dtype %d", by->name, (long long)dim, count, (int)dtype);
            const int by_rows = by->by_rows || by->o_by_rows;
            const float *const o = random_panel("o", by_rows ? count : dim, by_rows ? (int)fa_row_of_o(by, dim) : ld, 2);
            const float *const factor = random_panel("factor", 1, ld, 1);
            const size_t size = (size_t)(count * (dim * item + gap) - gap);
            char *out = guard_output("out", size, (size_t)item, GUARD_BEHIND);
            memset(out, 0x5A, size);
            for (int r = 0; r < count; r++)
                rows_of[r] = out + (count - 1 - r) * (dim * item + gap);
            by->unpack(rows_of, count, o, ld, factor, dim, dtype);
            for (int r = 0; r < count; r++) {
                for (int64_t d = 0; d < dim; d++) {
                    double wanted; /* the product in float32, then to nearest even */
                    const volatile float product = o[o_at(by, ld, dim, r, d)] * factor[r];
                    store(dtype, &wanted, product);
                    check_close("out", r, d, load(dtype, (char *)rows_of[r] + d * item), load(dtype, &wanted), 0);
                }
                for (int64_t n_gap = 0; r > 0 && n_gap < gap; n_gap++)
                    CHECK(((char *)rows_of[r])[dim * item + n_gap] == 0x5A, "a byte between the rows was written");
            }
            guard_check();
            guard_release();
        }
}

TEST_EACH_ISA(slot_unpack) {
    const fa_ukernel *uk = table();
    check_unpack(uk->products);
    check_unpack(uk->few);
#ifdef FA_HOLDS_AVX512_BF16
    if (test_isa == FASTATTN_ISA_AVX512) check_unpack(&fastattn_products_bfloat16_rows_avx512);
#endif
}
