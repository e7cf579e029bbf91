/* Every slot of an instruction set's table against its sentence in ukernel.h, in double precision, on edge sizes and
 * guarded buffers. Bytes that a slot has no business with keep their pattern. */
#include "problem.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/cpu.h"
#include "ukernel/ukernel.h"

static const int64_t edges[] = {1,  2,  3,  4,  5,  6,  7,  8,  9,  11, 12,  13,  15,
                                16, 17, 23, 31, 32, 33, 48, 64, 65, 80, 127, 128, 130};
static const fastattn_dtype dtypes[] = {FASTATTN_FLOAT32, FASTATTN_FLOAT16, FASTATTN_BFLOAT16};
static struct rng rng;

static const fa_ukernel *table(void) {
    const fa_ukernel *uk = fastattn_ukernel_select(test_isa);
    CHECK(uk != NULL, "no table");
    rng.state = 1;
    return uk;
}

static const fa_products *products(void) { return table()->products; }

static fa_matrix matrix(const void *at, int64_t stride, fastattn_dtype dtype) {
    return (fa_matrix){at, stride, dtype};
}

/* Columns of a panel: its leading dimension, and the part of it that a slot is called for. */
static const struct columns {
    int ld, first, rows;
} columns[] = {{16, 0, 16}, {32, 0, 32}, {32, 16, 16}, {48, 0, 48}, {64, 0, 64}, {64, 16, 32}, {64, 48, 16}};

enum { UNTOUCHED = 12345 };

static float *random_floats(const char *name, int64_t count, double amplitude) {
    float *x = guard_input(name, (size_t)count * 4, 4, GUARD_BEHIND);
    for (int64_t n = 0; n < count; n++)
        x[n] = (float)(amplitude * random_signed(&rng));
    return x;
}

/* A panel is aligned and its size is a multiple of the alignment, so that it lies flush at both of its ends. */
static float *panel(const char *name, int64_t rows, int ld) {
    float *x = guard_output(name, (size_t)(rows * ld) * 4, 64, GUARD_BEHIND);
    for (int64_t n = 0; n < rows * ld; n++)
        x[n] = UNTOUCHED;
    return x;
}

static float *random_panel(const char *name, int64_t rows, int ld, double amplitude) {
    float *x = panel(name, rows, ld);
    for (int64_t n = 0; n < rows * ld; n++)
        x[n] = (float)(amplitude * random_signed(&rng));
    return x;
}

static void check_close(const char *what, int64_t row, int64_t column, double got, double wanted, double tolerance) {
    CHECK(isnan(wanted) ? isnan(got) : got == wanted || fabs(got - wanted) <= tolerance,
          "%s[%lld][%lld] is %.9g, should be %.9g", what, (long long)row, (long long)column, got, wanted);
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

/* Row pointers into an array of `rows` rows of `count` elements with a gap between them; the last rows may repeat. */
static char *random_rows(const void *rows_of[FA_PANEL_ROWS], int rows, int distinct, int64_t count, int64_t stride,
                         fastattn_dtype dtype) {
    char *x = guard_input("rows", (size_t)((distinct - 1) * stride + count * (int64_t)dtype_size(dtype)),
                          dtype_size(dtype), GUARD_BEHIND);
    for (int r = 0; r < rows; r++)
        rows_of[r] = x + (r < distinct ? r : distinct - 1) * stride;
    for (int r = 0; r < distinct; r++)
        for (int64_t d = 0; d < count; d++)
            store(dtype, x + r * stride + d * (int64_t)dtype_size(dtype),
                  dtype == FASTATTN_BOOL ? 1 : 3 * random_signed(&rng));
    return x;
}

TEST_EACH_ISA(slot_pack) {
    const fa_products *uk = products();
    for (size_t e = 0; e < COUNT(edges); e++)
        for (size_t n = 0; n < COUNT(columns) * COUNT(dtypes); n++) {
            const struct columns c = columns[n / COUNT(dtypes)];
            const fastattn_dtype dtype = dtypes[n % COUNT(dtypes)];
            const int64_t item = (int64_t)dtype_size(dtype);
            const float sign = n % 4 == 1 ? -1 : n % 4 == 2 ? 0 : 1;
            const void *rows_of[FA_PANEL_ROWS];
            if (c.first != 0)
                continue;
            context("pack %lld x %d from dtype %d", (long long)edges[e], c.rows, (int)dtype);
            random_rows(rows_of, c.rows, (int)(e % (size_t)c.rows) + 1, edges[e], (edges[e] + 1) * item, dtype);
            float *q = panel("q", edges[e], c.ld);
            guard_seal();
            uk->pack(q, c.ld, rows_of, c.rows, edges[e], dtype, sign);
            for (int64_t d = 0; d < edges[e]; d++)
                for (int r = 0; r < c.rows; r++)
                    check_close("q", d, r, q[d * c.ld + r], sign * load(dtype, (const char *)rows_of[r] + d * item), 0);
            check_outside("q", q, edges[e], c);
        }
}

TEST_EACH_ISA(slot_widen) {
    const fa_ukernel *uk = table();
    for (size_t e = 0; e < COUNT(edges); e++)
        for (size_t n = 1; n < COUNT(dtypes); n++)
            for (int64_t keys = 1; keys < 8; keys += 3) {
                const int64_t stride = (edges[e] + (int64_t)(e % 3)) * (e % 4 == 3 ? -2 : 2);
                const void *rows_of[FA_PANEL_ROWS];
                context("widen %lld x %lld from dtype %d", (long long)keys, (long long)edges[e], (int)dtypes[n]);
                random_rows(rows_of, (int)keys, (int)keys, edges[e], stride < 0 ? -stride : stride, dtypes[n]);
                const char *from = rows_of[stride < 0 ? keys - 1 : 0];
                float *to = guard_output("to", (size_t)(keys * edges[e]) * 4, 64, GUARD_BEHIND);
                guard_seal();
                uk->widen(to, matrix(from, stride, dtypes[n]), keys, edges[e]);
                for (int64_t j = 0; j < keys; j++)
                    for (int64_t d = 0; d < edges[e]; d++)
                        check_close("to", j, d, to[j * edges[e] + d], load(dtypes[n], from + j * stride + d * 2), 0);
                guard_check();
                guard_release();
            }
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
        uk->widen(to, matrix(from, COLUMNS * 2, dtypes[n]), ROWS, COLUMNS);
        for (int x = 0; x < ROWS * COLUMNS; x++) {
            check_close("to", x / COLUMNS, x % COLUMNS, to[x], load(dtypes[n], &from[x]), 0);
            o[x % COLUMNS * ROWS + x / COLUMNS] = to[x];
        }
        for (int r = 0; r < ROWS; r++) {
            factor[r] = 1;
            rows_of[r] = back + r * COLUMNS;
        }
        uk->unpack(rows_of, ROWS, o, ROWS, factor, COLUMNS, dtypes[n]);
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
        uk->qk(s + c.first, q + c.first, c.ld, c.rows, matrix(k, stride * 4, FASTATTN_FLOAT32), 0, keys, head_dim);
        for (int64_t j = 0; j < keys; j++)
            for (int r = c.first; r < c.first + c.rows; r++) {
                double sum = 0, magnitude = 0;
                for (int64_t d = 0; d < head_dim; d++) {
                    double term = (double)k[j * stride + d] * q[d * c.ld + r];
                    sum += term;
                    magnitude += fabs(term);
                }
                check_close("s", j, r, s[j * c.ld + r], sum, FLT_EPSILON * (2 + sqrt((double)head_dim)) * magnitude);
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
        uk->pv(o + c.first, alpha + c.first, p + c.first, c.ld, c.rows, matrix(v, stride * 4, FASTATTN_FLOAT32), 0, keys, dim);
        for (int64_t d = 0; d < dim; d++)
            for (int r = c.first; r < c.first + c.rows; r++) {
                double sum = (double)before[d * c.ld + r] * alpha[r], magnitude = fabs(sum);
                for (int64_t j = 0; j < keys; j++) {
                    double term = (double)v[j * stride + d] * p[j * c.ld + r];
                    sum += term;
                    magnitude += fabs(term);
                }
                check_close("o", d, r, o[d * c.ld + r], sum, FLT_EPSILON * (2 + sqrt((double)keys)) * magnitude);
            }
        check_outside("o", o, dim, c);
    }
}

/* `keys` rows of a storage type, flush against a guard page, with NaN in the gaps; the first of them in the order of reading. */
static const char *stored_rows(const char *name, int64_t keys, int64_t dim, int64_t stride, fastattn_dtype dtype) {
    const int64_t item = (int64_t)dtype_size(dtype), span = (keys - 1) * llabs((long long)stride);
    char *x = guard_input(name, (size_t)(span + dim * item), (size_t)item, GUARD_BEHIND);
    memset(x, 0xFF, (size_t)(span + dim * item));
    if (stride < 0)
        x += span;
    for (int64_t j = 0; j < keys; j++)
        for (int64_t d = 0; d < dim; d++)
            store(dtype, x + j * stride + d * item, random_signed(&rng));
    return x;
}

/* Sizes and a stride in bytes for case e of the two products of few rows. */
static int64_t few_case(size_t e, fastattn_dtype *dtype, int *rows, int64_t *dim, int64_t *keys) {
    *dtype = dtypes[e % COUNT(dtypes)];
    *rows = 1 + (int)(e % FA_FEW_ROWS);
    *dim = edges[e / (2 * FA_FEW_ROWS)];
    *keys = edges[e * 7 % COUNT(edges)];
    const int64_t gap = (int64_t)(e % 3);
    return (e % 4 == 1 ? -*dim - gap : e % 4 == 2 ? 0 : *dim + gap) * (int64_t)dtype_size(*dtype);
}

TEST_EACH_ISA(slot_qk_few) {
    const fa_ukernel *uk = table();
    for (size_t e = 0; e < COUNT(edges) * 2 * FA_FEW_ROWS; e++) {
        fastattn_dtype dtype;
        int rows;
        int64_t head_dim, keys;
        const int64_t stride = few_case(e, &dtype, &rows, &head_dim, &keys);
        const int64_t pitch = (head_dim + FA_ROW_STEP - 1) / FA_ROW_STEP * FA_ROW_STEP;
        const int ld = e % 5 ? FA_ROW_STEP : FA_PANEL_ROWS;
        context("qk_few %d rows, %lld x %lld, stride %lld, dtype %d", rows, (long long)keys, (long long)head_dim,
                (long long)stride, (int)dtype);
        float *q = panel("q", rows, (int)pitch);
        for (int r = 0; r < rows; r++)
            for (int64_t d = 0; d < pitch; d++)
                q[r * pitch + d] = d < head_dim ? (float)random_signed(&rng) : 0.0f;
        const char *k = stored_rows("k", keys, head_dim, stride, dtype);
        float *s = panel("s", keys, ld);
        guard_seal();
        uk->qk_few(s, ld, q, pitch, rows, matrix(k, stride, dtype), keys, head_dim);
        for (int64_t j = 0; j < keys; j++)
            for (int r = 0; r < rows; r++) {
                double sum = 0, magnitude = 0;
                for (int64_t d = 0; d < head_dim; d++) {
                    double term = load(dtype, k + j * stride + d * (int64_t)dtype_size(dtype)) * (double)q[r * pitch + d];
                    sum += term;
                    magnitude += fabs(term);
                }
                check_close("s", j, r, s[j * ld + r], sum, FLT_EPSILON * (2 + sqrt((double)head_dim)) * magnitude);
            }
        check_outside("s", s, keys, (struct columns){ld, 0, rows});
    }
}

TEST_EACH_ISA(slot_pv_few) {
    const fa_ukernel *uk = table();
    for (size_t e = 0; e < COUNT(edges) * 2 * FA_FEW_ROWS; e++) {
        fastattn_dtype dtype;
        int rows;
        int64_t dim, keys;
        const int64_t stride = few_case(e, &dtype, &rows, &dim, &keys);
        const int64_t pitch = (dim + FA_ROW_STEP - 1) / FA_ROW_STEP * FA_ROW_STEP;
        const int ld = e % 5 ? FA_ROW_STEP : FA_PANEL_ROWS;
        float before[FA_FEW_ROWS * 144];
        context("pv_few %d rows, %lld x %lld, stride %lld, dtype %d", rows, (long long)keys, (long long)dim,
                (long long)stride, (int)dtype);
        const float *p = random_panel("p", keys, ld, 1), *alpha = random_panel("alpha", 1, ld, 1);
        const char *v = stored_rows("v", keys, dim, stride, dtype);
        float *o = random_panel("o", rows, (int)pitch, 1);
        memcpy(before, o, (size_t)(rows * pitch) * 4);
        guard_seal();
        uk->pv_few(o, pitch, alpha, p, ld, rows, matrix(v, stride, dtype), keys, dim);
        for (int r = 0; r < rows; r++)
            for (int64_t d = 0; d < dim; d++) {
                double sum = (double)before[r * pitch + d] * alpha[r], magnitude = fabs(sum);
                for (int64_t j = 0; j < keys; j++) {
                    double term = load(dtype, v + j * stride + d * (int64_t)dtype_size(dtype)) * (double)p[j * ld + r];
                    sum += term;
                    magnitude += fabs(term);
                }
                check_close("o", r, d, o[r * pitch + d], sum, FLT_EPSILON * (2 + sqrt((double)keys)) * magnitude);
            }
        guard_check();
        guard_release();
    }
}

TEST_EACH_ISA(slot_mask) {
    static const fastattn_dtype kinds[] = {FASTATTN_BOOL, FASTATTN_FLOAT16, FASTATTN_BFLOAT16, FASTATTN_FLOAT32,
                                           FASTATTN_FLOAT64};
    const fa_ukernel *uk = table();
    for (size_t e = 0; e < COUNT(edges); e++)
        for (size_t n = 0; n < COUNT(kinds) * 12; n++) {
            const fastattn_dtype dtype = kinds[n / 12];
            const int64_t item = (int64_t)dtype_size(dtype), keys = edges[e];
            const int step = n % 3 == 0 ? 1 : n % 3 == 1 ? -2 : 3; /* elements between keys */
            const int hidden = n / 3 % 4;                          /* none, some, all, all but one */
            const int ld = 16 * (1 + (int)(e % 4)), distinct = n % 2 ? ld : 1;
            const void *rows_of[FA_PANEL_ROWS];
            unsigned shows = 0, hides = 0;
            context("mask %lld x %d of dtype %d, step %d, hidden %d", (long long)keys, ld, (int)dtype, step, hidden);
            const int64_t count = (keys - 1) * (step < 0 ? -step : step) + 1;
            random_rows(rows_of, ld, distinct, count, count * item, dtype);
            for (int r = 0; r < ld; r++)
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
            float *tile = panel("tile", keys, ld);
            guard_seal();
            const unsigned found = uk->mask(tile, ld, rows_of, ld, step * item, keys, dtype);
            CHECK(!!(found & FA_MASK_SHOWS) == shows && !!(found & FA_MASK_HIDES) == hides, "found %u", found);
            for (int64_t j = 0; j < keys; j++)
                for (int r = 0; r < ld; r++) {
                    double element = load(dtype, (const char *)rows_of[r] + j * step * item);
                    if (dtype == FASTATTN_BOOL)
                        element = element != 0 ? 0 : -(double)INFINITY;
                    check_close("tile", j, r, tile[j * ld + r], element, 0);
                }
            guard_check();
            guard_release();
        }
}

TEST_EACH_ISA(slot_scores) {
    const fa_ukernel *uk = table();
    for (unsigned kind = 0; kind < 16; kind++) /* every combination of rules */
        for (size_t e = 0; e < COUNT(edges); e++) {
            const struct columns c = columns[(e + kind) % COUNT(columns)];
            const int64_t keys = edges[e], first = (int64_t)(e % 3) * 5;
            context("scores by rules %u, %lld keys, columns %d to %d of %d", kind, (long long)keys, c.first,
                    c.first + c.rows, c.ld);
            float *slopes = random_panel("slopes", 1, c.ld, 1), *offset = panel("offset", 1, c.ld);
            float *begin = panel("begin", 1, c.ld), *end = panel("end", 1, c.ld),
                  *bias = random_panel("bias", keys, c.ld, 3);
            float *s = panel("s", keys, c.ld), *seen = panel("seen", 1, c.ld), before[130 * FA_PANEL_ROWS];
            for (int r = c.first; r < c.first + c.rows; r++) {
                offset[r] = (float)random_between(&rng, -20, 200);
                begin[r] = (float)random_between(&rng, -5, first + keys);
                end[r] = (float)random_between(&rng, -5, first + keys + 5);
                seen[r] = r % 3 == 0;
                for (int64_t j = 0; j < keys; j++) {
                    s[j * c.ld + r] = (float)(20 * random_signed(&rng));
                    if ((r + j) % 4 == 0)
                        bias[j * c.ld + r] = -INFINITY;
                }
            }
            memcpy(before, s, (size_t)(keys * c.ld) * 4);
            const fa_score_rules rules = {.scale = 0.7f,
                                          .softcap = kind & 1 ? 5 : 0,
                                          .slopes = kind & 2 ? slopes + c.first : NULL,
                                          .offset = kind & 2 ? offset + c.first : NULL,
                                          .begin = kind & 4 ? begin + c.first : NULL,
                                          .end = kind & 4 ? end + c.first : NULL,
                                          .bias = kind & 8 ? bias + c.first : NULL};
            uk->scores(s + c.first, c.ld, c.rows, first, keys, &rules, seen + c.first);
            for (int r = c.first; r < c.first + c.rows; r++) {
                int visible = r % 3 == 0;
                for (int64_t j = 0; j < keys; j++) {
                    double x = (double)rules.scale * before[j * c.ld + r];
                    if (kind & 1)
                        x = 5 * tanh(x / 5);
                    if (kind & 2)
                        x -= slopes[r] * fabs((double)offset[r] - (double)(first + j));
                    if (kind & 8)
                        x += bias[j * c.ld + r];
                    if (kind & 4 && ((double)(first + j) < begin[r] || (double)(first + j) >= end[r]))
                        x = -(double)INFINITY;
                    visible |= !isinf(x);
                    check_close("s", j, r, s[j * c.ld + r], x, 1e-5 + FLT_EPSILON * fabs(x));
                }
                check_close("seen", 0, r, seen[r], visible, 0);
            }
            check_outside("s", s, keys, c);
        }
}

TEST_EACH_ISA(slot_softmax) {
    const fa_products *uk = products();
    for (size_t e = 0; e < COUNT(edges) * 3; e++) {
        const struct columns c = columns[e % COUNT(columns)];
        const int64_t keys = edges[e / 3];
        const float unit = e % 2 ? 1.4426950f : 0.18f;
        float old_s[130 * FA_PANEL_ROWS], old_m[FA_PANEL_ROWS], old_l[FA_PANEL_ROWS];
        context("softmax of %lld keys, columns %d to %d of %d", (long long)keys, c.first, c.first + c.rows, c.ld);
        float *s = panel("s", keys, c.ld), *m = panel("m", 1, c.ld), *l = panel("l", 1, c.ld),
              *alpha = panel("alpha", 1, c.ld);
        for (int r = c.first; r < c.first + c.rows; r++) {
            m[r] = r % 3 == 0 ? -INFINITY : (float)(10 * random_signed(&rng));
            l[r] = r % 3 == 0 ? 0 : (float)(2 + random_signed(&rng));
            for (int64_t j = 0; j < keys; j++)
                s[j * c.ld + r] =
                    r % 6 == 0 || random_between(&rng, 0, 4) == 0 ? -INFINITY : (float)(12 * random_signed(&rng));
        }
        if (keys > 2 && c.rows > 1)
            s[2 * c.ld + c.first + 1] = NAN; /* in one row, which it takes whole */
        memcpy(old_s, s, (size_t)(keys * c.ld) * 4);
        memcpy(old_m, m, (size_t)c.ld * 4);
        memcpy(old_l, l, (size_t)c.ld * 4);
        uk->softmax(s + c.first, s + c.first, c.ld, c.rows, keys, unit, m + c.first, l + c.first, alpha + c.first);
        for (int r = c.first; r < c.first + c.rows; r++) {
            double top = old_m[r], sum = 0;
            int spoilt = 0;
            for (int64_t j = 0; j < keys; j++) {
                top = fmax(top, old_s[j * c.ld + r]);
                spoilt |= isnan(old_s[j * c.ld + r]);
            }
            if (spoilt) {
                CHECK(isnan(l[r]), "a NaN among the scores of row %d is gone: l is %g", r, (double)l[r]);
                continue;
            }
            check_close("m", 0, r, m[r], top, 0);
            for (int64_t j = 0; j < keys; j++) {
                double p = isinf(top) ? 0 : exp2((double)unit * (old_s[j * c.ld + r] - top));
                check_close("s", j, r, s[j * c.ld + r], p, 4e-6);
                sum += p;
            }
            if (!isinf(top)) {
                check_close("alpha", 0, r, alpha[r], exp2((double)unit * (old_m[r] - top)), 4e-6);
                sum += old_l[r] * exp2((double)unit * (old_m[r] - top));
            }
            check_close("l", 0, r, l[r], sum, 4e-6 * (1 + sum));
        }
        check_outside("s", s, keys, c);
    }
}

/* A block through any table of products: what is made of it, only its own slots can read, so they are tested as a chain, each on
 * what the one before has really made. Weights are taken as the table rounds them. */
static void check_block(const fa_products *x, fastattn_dtype dtype, double score_rounding, struct columns c, int64_t head_dim,
                        int64_t v_head_dim, int64_t block, int64_t from, int64_t keys, int64_t gap, double growth) {
    const int64_t item = (int64_t)dtype_size(dtype), rows = c.first + c.rows;
    const int64_t tiled = (block + 2 * FA_TILE - 1) / FA_TILE * FA_TILE + FA_TILE;
    const int64_t dim = (head_dim + FA_TILE - 1) / FA_TILE * FA_TILE, v_dim = (v_head_dim + FA_TILE - 1) / FA_TILE * FA_TILE;
    const int integers = strncmp(x->name, "int16_", 6) == 0; /* with a rounding that they share, as fixed.h says */
    const float unit = 0.7f;
    context("%s, %lld of %lld keys from %lld on, %lld and %lld numbers, columns %d to %d of %d, dtype %d", x->name,
            (long long)keys, (long long)block, (long long)from, (long long)head_dim, (long long)v_head_dim, c.first,
            c.first + c.rows, c.ld, (int)dtype);
    const void *rows_of[FA_PANEL_ROWS];
    random_rows(rows_of, (int)rows, (int)rows, head_dim, (head_dim + gap) * item, dtype);
    for (int r = (int)rows; r < c.ld; r++) rows_of[r] = rows_of[rows - 1];
    const char *k = stored_rows("k", block, head_dim, (head_dim + gap) * item, dtype);
    const char *v = stored_rows("v", block, v_head_dim, -(v_head_dim + gap) * item, dtype);
    float *q = panel("q", dim, c.ld), *s = panel("s", tiled, c.ld), *o = panel("o", v_dim + FA_TILE, c.ld);
    float *p = x->in_place ? s : panel("p", tiled, c.ld), *k_room = panel("k room", tiled, (int)dim);
    float *v_room = panel("v room", tiled, (int)v_dim), *m = panel("m", 1, c.ld), *l = panel("l", 1, c.ld);
    float *alpha = panel("alpha", 1, c.ld), old_m[FA_PANEL_ROWS];
    double *scores = malloc((size_t)(keys * c.ld) * sizeof *scores);
    CHECK(scores != NULL, "out of memory");
    for (int r = c.first; r < rows; r++) {
        old_m[r] = m[r] = r % 3 == 0 ? -INFINITY : (float)(r % 3 == 1 ? -growth / unit : 4 * random_signed(&rng));
        l[r] = r % 3 == 0 ? 0 : 3;
        for (int64_t d = 0; d < fa_sums_row(v_head_dim) + 1; d++) o[d * c.ld + r] = r % 3 == 0 ? 0 : (float)d;
    }
    guard_seal();
    if (x->enter) x->enter();
    x->pack(q, c.ld, rows_of, c.ld, head_dim, dtype, -1.0f);
    const fa_matrix keys_made = x->keys(k_room, matrix(k, (head_dim + gap) * item, dtype), block, head_dim);
    const fa_matrix values_made = x->values(v_room, matrix(v, -(v_head_dim + gap) * item, dtype), block, v_head_dim);
    x->qk(s + c.first, q + c.first, c.ld, c.rows, keys_made, from, keys, head_dim);
    for (int64_t j = 0; j < keys; j++)
        for (int r = c.first; r < rows; r++) {
            double sum = 0, magnitude = 0, of_query[2] = {0}, of_key[2] = {0}; /* the length, squared, and the sum */
            for (int64_t d = 0; d < head_dim; d++) {
                const double q_d = -load(dtype, (const char *)rows_of[r] + d * item);
                const double k_d = load(dtype, k + (from + j) * (head_dim + gap) * item + d * item);
                sum += q_d * k_d;
                magnitude += fabs(q_d * k_d);
                of_query[0] += q_d * q_d, of_query[1] += fabs(q_d);
                of_key[0] += k_d * k_d, of_key[1] += fabs(k_d);
            }
            const double shared = sqrt(of_query[0]) * of_key[1] + sqrt(of_key[0]) * of_query[1];
            check_close("s", j, r, s[j * c.ld + r], sum,
                        (FLT_EPSILON * (2 + sqrt((double)head_dim)) + score_rounding) * magnitude +
                            (integers ? 0x1.1p-15 * shared : 0));
            if (j % 7 == 3) s[j * c.ld + r] = -INFINITY; /* hidden */
            scores[j * c.ld + r] = s[j * c.ld + r];
        }
    x->softmax(s + c.first, p + c.first, c.ld, c.rows, keys, unit, m + c.first, l + c.first, alpha + c.first);
    for (int r = c.first; r < rows; r++) {
        double top = old_m[r], of_block = -INFINITY, sum = 0;
        for (int64_t j = 0; j < keys; j++) of_block = fmax(of_block, scores[j * c.ld + r]);
        top = fmax(top, of_block);
        const double shared = integers ? 0x1.1p-14 * exp2((double)unit * (of_block - m[r])) : 0;
        CHECK(m[r] >= old_m[r] && m[r] <= top && exp2(unit * (top - m[r])) <= FA_MOST_POWER, "m[%d] is %g, from %g to %g", r,
              (double)m[r], (double)old_m[r], top);
        for (int64_t j = 0; j < keys; j++) {
            double power = exp2((double)unit * (scores[j * c.ld + r] - m[r]));
            check_close("p", j, r, x->power(p, c.ld, r, j), power,
                        (x->sums ? 0x1.1p-8 : x->in_parts ? 0x1p-15 : 4e-6) * power + shared);
            sum += power;
        }
        const double fade = exp2((double)unit * (old_m[r] - m[r]));
        check_close("alpha", 0, r, alpha[r], fade, 4e-6 * fade);
        sum += fade * (r % 3 == 0 ? 0 : 3);
        check_close("l", 0, r, l[r], sum, 4e-6 * sum);
    }
    x->pv(o + c.first, alpha + c.first, p + c.first, c.ld, c.rows, values_made, from, keys, v_head_dim);
    if (x->leave) x->leave();
    for (int r = c.first; r < rows; r++) {
        double sums = (r % 3 == 0 ? 0 : (double)fa_sums_row(v_head_dim)) * alpha[r];
        for (int64_t j = 0; j < keys; j++) sums += x->power(p, c.ld, r, j);
        if (x->sums)
            check_close("sums", 0, r, o[fa_sums_row(v_head_dim) * c.ld + r], sums, 4e-6 * sums);
        for (int64_t d = 0; d < v_head_dim; d++) {
            double sum = (r % 3 == 0 ? 0 : (double)d) * alpha[r], magnitude = fabs(sum), largest = 0, powers = 0;
            for (int64_t j = 0; j < block; j++)
                largest = fmax(largest, fabs(load(dtype, v - j * (v_head_dim + gap) * item + d * item)));
            for (int64_t j = 0; j < keys; j++) {
                const double power = x->power(p, c.ld, r, j);
                const double term = power * load(dtype, v - (from + j) * (v_head_dim + gap) * item + d * item);
                sum += term;
                magnitude += fabs(term);
                powers += power;
            }
            check_close("o", d, r, o[d * c.ld + r], sum,
                        (FLT_EPSILON * (2 + sqrt((double)keys)) + score_rounding) * magnitude +
                            (integers ? 0x1p-12 * largest * powers : 0));
        }
    }
    free(scores);
    guard_check();
    guard_release();
}

static void check_blocks(const fa_products *x, fastattn_dtype dtype, double rounding) {
    static const int64_t blocks[] = {1, 15, 16, 17, 31, 33, 64, 100, 128}, dims[] = {1, 8, 31, 32, 33, 64, 72, 128, 160};
    for (size_t e = 0; e < COUNT(blocks) * COUNT(dims); e++) {
        const int64_t block = blocks[e % COUNT(blocks)], from = e % 3 == 2 && block > 16 ? 16 : 0;
        if (block > x->block_keys) continue;
        check_block(x, dtype, rounding, columns[e % COUNT(columns)], dims[e / COUNT(blocks)], dims[e * 5 % COUNT(dims)], block,
                    from, block - from, (int64_t)(e % 2), e % 4 == 0 ? 40 : 3);
    }
}

TEST_EACH_ISA(slot_products_as_a_chain) {
    static const struct { fastattn_dtype dtype; fastattn_precision precision; double rounding; } kinds[] = {
        {FASTATTN_FLOAT32, FASTATTN_PRECISION_HIGHEST, 0},     {FASTATTN_FLOAT32, FASTATTN_PRECISION_HIGH, 0x1p-15},
        {FASTATTN_FLOAT32, FASTATTN_PRECISION_MEDIUM, 0x1p-7}, {FASTATTN_FLOAT16, FASTATTN_PRECISION_HIGHEST, 0x1p-16},
        {FASTATTN_FLOAT16, FASTATTN_PRECISION_HIGH, 0x1p-15},  {FASTATTN_BFLOAT16, FASTATTN_PRECISION_HIGHEST, 0}};
    table();
    for (size_t n = 0; n < COUNT(kinds); n++) {
        const fa_products *x = fastattn_products_select(test_isa, kinds[n].dtype, kinds[n].precision);
        const int rounded = strncmp(x->name, "float32_", 8) != 0 && strncmp(x->name, "int16_", 6) != 0;
        check_blocks(x, kinds[n].dtype, rounded ? kinds[n].rounding : 0);
    }
#if defined(__x86_64__) && defined(__GNUC__)
    if (test_isa != FASTATTN_ISA_AVX512) return;
    /* Chosen or not. */
    if (fastattn_cpu_has(FA_CPU_AVX512_BF16)) check_blocks(&fastattn_products_bfloat16_avx512, FASTATTN_BFLOAT16, 0);
    for (size_t n = 0; n < COUNT(dtypes) && fastattn_cpu_has(FA_CPU_AVX512_VNNI); n++)
        check_blocks(&fastattn_products_int16_avx512, dtypes[n], 0);
#endif
}

/* Blocks of integers fit as long as what they share leaves enough to each. */
TEST_EACH_ISA(slot_fits) {
#if defined(__x86_64__) && defined(__GNUC__)
    enum { ROWS = 64, KEYS = 40, DIM = 72 };
    const fa_products *x = &fastattn_products_int16_avx512;
    static const struct { const char *what; float factor, offset; int fits[3]; } changes[] = {
        /* of one row of q, k and v */
        {"nothing", 1, 0, {1, 1, 1}},         {"zeros", 0, 0, {1, 1, 1}},          {"four times as large", 4, 0, {1, 1, 1}},
        {"four times as small", 0.25f, 0, {1, 1, 1}}, {"64 times as large", 64, 0, {0, 0, 0}},
        {"64 times as small", 0x1p-6f, 0, {1, 1, 0}}, {"tiny", 0x1p-60f, 0, {0, 0, 0}}, {"huge", 0x1p60f, 0, {0, 0, 0}},
        {"subnormal", 0x1p-130f, 0, {0, 0, 0}},       {"infinite", 1, INFINITY, {0, 0, 0}}, {"NaN", 1, NAN, {0, 0, 0}}};
    table();
    if (test_isa != FASTATTN_ISA_AVX512 || !fastattn_cpu_has(FA_CPU_AVX512_VNNI)) return;
    for (size_t e = 0; e < COUNT(changes) * 3 * 2; e++) {
        const fastattn_dtype dtype = e % 2 ? FASTATTN_BFLOAT16 : FASTATTN_FLOAT32;
        const size_t operand = e / 2 % 3, n = e / 6;
        const int64_t item = (int64_t)dtype_size(dtype), stride = DIM * item;
        context("%s in operand %d, of dtype %d", changes[n].what, (int)operand, (int)dtype);
        const void *rows_of[ROWS];
        char *rows[3] = {random_rows(rows_of, ROWS, ROWS, DIM, stride, dtype),
                         (char *)(uintptr_t)stored_rows("k", KEYS, DIM, stride, dtype),
                         (char *)(uintptr_t)stored_rows("v", KEYS, DIM, stride, dtype)};
        char *changed = rows[operand] + 17 * stride;
        for (int64_t d = 0; d < DIM; d++)
            store(dtype, changed + d * item, load(dtype, changed + d * item) * changes[n].factor + (d == 70 ? changes[n].offset : 0));
        float *q = panel("q", FA_TILE * 3, ROWS);
        float *k_room = panel("k room", KEYS + FA_TILE, FA_TILE * 3), *v_room = panel("v room", KEYS + FA_TILE, FA_TILE * 3);
        guard_seal();
        x->pack(q, ROWS, rows_of, ROWS, DIM, dtype, 1.0f);
        const fa_matrix k = x->keys(k_room, matrix(rows[1], stride, dtype), KEYS, DIM);
        const fa_matrix v = x->values(v_room, matrix(rows[2], stride, dtype), KEYS, DIM);
        CHECK(x->fits(q, ROWS, k, KEYS, v, -0.1f) == changes[n].fits[operand], "fits: %d", !changes[n].fits[operand]);
        guard_check();
        guard_release();
    }
#endif
}

TEST_EACH_ISA(slot_finite) {
    static const float poisons[] = {NAN, INFINITY, -INFINITY, FLT_MAX, -FLT_MAX, FLT_TRUE_MIN};
    const fa_ukernel *uk = table();
    for (size_t e = 0; e < COUNT(edges); e++)
        for (size_t n = 0; n < COUNT(poisons) * COUNT(dtypes); n++) {
            const fastattn_dtype dtype = dtypes[n / COUNT(poisons)];
            const int64_t item = (int64_t)dtype_size(dtype), dim = edges[e], keys = edges[e * 5 % COUNT(edges)];
            const int64_t stride = (n % 2 ? dim : -dim - 2) * item;
            context("finite %lld x %lld of dtype %d", (long long)keys, (long long)dim, (int)dtype);
            const char *v = stored_rows("v", keys, dim, stride, dtype);
            CHECK(uk->finite(matrix(v, stride, dtype), keys, dim) == 1, "finite numbers");
            char *victim = (char *)(uintptr_t)v + random_between(&rng, 0, keys - 1) * stride +
                           random_between(&rng, 0, dim - 1) * item;
            store(dtype, victim, poisons[n % COUNT(poisons)]);
            const double poison = load(dtype, victim);
            CHECK(uk->finite(matrix(v, stride, dtype), keys, dim) == isfinite(poison), "with %g", poison);
            guard_release();
        }
}

TEST_EACH_ISA(slot_unpack) {
    const fa_ukernel *uk = table();
    for (size_t e = 0; e < COUNT(edges); e++)
        for (size_t n = 0; n < COUNT(dtypes) * 9; n++) {
            const fastattn_dtype dtype = dtypes[n % 3];
            const int counts[] = {1, 2, 7, 15, 16, 17, 33, 63, 64};
            const int count = counts[n / 3], ld = (count + 15) / 16 * 16;
            const int64_t dim = edges[e], item = (int64_t)dtype_size(dtype), gap = (int64_t)(e % 3) * item;
            void *rows_of[FA_PANEL_ROWS];
            context("unpack %lld x %d to dtype %d", (long long)dim, count, (int)dtype);
            const float *o = random_panel("o", dim, ld, 2), *factor = random_panel("factor", 1, ld, 1);
            const size_t size = (size_t)(count * (dim * item + gap) - gap);
            char *out = guard_output("out", size, (size_t)item, GUARD_BEHIND);
            memset(out, 0x5A, size);
            for (int r = 0; r < count; r++)
                rows_of[r] = out + (count - 1 - r) * (dim * item + gap);
            uk->unpack(rows_of, count, o, ld, factor, dim, dtype);
            for (int r = 0; r < count; r++) {
                for (int64_t d = 0; d < dim; d++) {
                    double wanted; /* the product in float32, then to nearest even */
                    const volatile float product = o[d * ld + r] * factor[r];
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
