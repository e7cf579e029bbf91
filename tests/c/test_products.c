/* Every table of fa_products against its sentences in ukernel.h, in double precision. What a slot has made, only others of the
 * same table can read, so they are tested as a chain, each on what the one before has really made. */
#include "slots.h"

#include <string.h>

#include "cpu/cpu.h"

/* A block of keys and values, a panel of queries, and what a table makes of them. */
struct chain {
    const fa_products *by;
    fastattn_dtype dtype;
    double rounding; /* of a term of the products, beyond that of float32 */
    struct columns c;
    int64_t head_dim, v_head_dim, gap; /* elements of a row, and between rows */
    int64_t block, from, keys;         /* keys of the block, and those of them that are used */
    double growth;                     /* of the powers, in bits, where the maximum stays what it was */
    int as_stored;                     /* there is no room for keys and values */

    const void *rows_of[FA_PANEL_ROWS];
    fa_matrix k, v, keys_made, values_made;
    float *k_room, *v_room, *q, *s, *p, *o, *m, *l, *alpha;
    float *scores, old_m[FA_PANEL_ROWS]; /* s and m as softmax finds them */
    float *next, *again, *twin_p, *twin_m, *twin_l, *twin_alpha; /* what softmax and qk make another time */
};

static const float unit = 0.7f;

/* Every third row has seen no key before, and has -inf for m. */
static float old_l(int row) { return row % 3 == 0 ? 0 : 3; }
static float old_o(int row, int64_t d) { return row % 3 == 0 ? 0 : (float)d; }

/* Integers have a rounding that they share, as fixed.h says. */
static int integers(const fa_products *by) { return strncmp(by->name, "int16_", 6) == 0; }

static float *o_of(const struct chain *x, int r, int64_t d) { return &x->o[o_at(x->by, x->c.ld, x->v_head_dim, r, d)]; }

static void prepare(struct chain *x) {
    const struct columns c = x->c;
    const int64_t item = (int64_t)dtype_size(x->dtype), tiled = fa_round_up(x->block + FA_TILE, FA_TILE) + FA_TILE;
    const int64_t dim = x->head_dim ? fa_round_up(x->head_dim, FA_TILE) : FA_TILE;
    const int64_t v_dim = x->v_head_dim ? fa_round_up(x->v_head_dim, FA_TILE) : FA_TILE;
    const int rows = c.first + c.rows;
    context("%s, %lld of %lld keys from %lld on, %lld and %lld numbers, columns %d to %d of %d, dtype %d", x->by->name,
            (long long)x->keys, (long long)x->block, (long long)x->from, (long long)x->head_dim, (long long)x->v_head_dim,
            c.first, rows, c.ld, (int)x->dtype);
    random_rows(x->rows_of, rows, rows, x->head_dim, (x->head_dim + x->gap) * item, x->dtype);
    for (int r = rows; r < c.ld; r++) x->rows_of[r] = x->rows_of[rows - 1];
    x->k = stored_rows("k", x->block, x->head_dim, (x->head_dim + x->gap) * item, x->dtype);
    x->v = stored_rows("v", x->block, x->v_head_dim, -(x->v_head_dim + x->gap) * item, x->dtype);
    x->k_room = x->as_stored ? NULL : panel("k room", tiled, (int)dim);
    x->v_room = x->as_stored ? NULL : panel("v room", tiled, (int)v_dim);
    x->q = panel("q", dim, c.ld);
    x->s = panel("s", tiled, c.ld);
    x->p = x->by->in_place ? x->s : panel("p", tiled, c.ld);
    x->o = panel("o", v_dim + FA_TILE, c.ld);
    x->m = panel("m", 1, c.ld);
    x->l = panel("l", 1, c.ld);
    x->alpha = panel("alpha", 1, c.ld);
    x->scores = panel("scores", x->keys, c.ld);
    x->next = panel("next", tiled, c.ld);
    x->again = panel("again", tiled, c.ld);
    x->twin_p = panel("twin p", tiled, c.ld);
    x->twin_m = panel("twin m", 1, c.ld);
    x->twin_l = panel("twin l", 1, c.ld);
    x->twin_alpha = panel("twin alpha", 1, c.ld);
    for (int r = c.first; r < rows; r++) {
        x->old_m[r] = x->m[r] = r % 3 == 0 ? -INFINITY : (float)(r % 3 == 1 ? -x->growth / unit : 4 * random_signed(&rng));
        x->l[r] = old_l(r);
        for (int64_t d = 0; d < fa_sums_of_o(x->by, x->v_head_dim) + 1; d++) *o_of(x, r, d) = old_o(r, d);
    }
    guard_seal();
}

/* Queries with their sign turned. */
static void lay_out(struct chain *x) {
    x->by->pack(x->q, x->c.ld, x->rows_of, x->c.ld, x->head_dim, x->dtype, -1.0f);
    x->keys_made = x->by->keys(x->k_room, x->k, x->block, x->head_dim);
    x->values_made = x->by->values(x->v_room, x->v, x->block, x->v_head_dim);
}

static void check_scores(struct chain *x) {
    const struct columns c = x->c;
    x->by->qk(x->s + c.first, x->q + c.first, c.ld, c.rows, x->keys_made, x->from, x->keys, x->head_dim);
    for (int64_t j = 0; j < x->keys; j++)
        for (int r = c.first; r < c.first + c.rows; r++) {
            struct sum sum = {0, 0};
            double of_query[2] = {0}, of_key[2] = {0}; /* the length, squared, and the sum */
            float *s = &x->s[j * c.ld + r];
            for (int64_t d = 0; d < x->head_dim; d++) {
                const double q_d = -load(x->dtype, (const char *)x->rows_of[r] + d * (int64_t)dtype_size(x->dtype));
                const double k_d = stored_number(x->k, x->from + j, d);
                add(&sum, q_d * k_d);
                of_query[0] += q_d * q_d, of_query[1] += fabs(q_d);
                of_key[0] += k_d * k_d, of_key[1] += fabs(k_d);
            }
            const double shared = sqrt(of_query[0]) * of_key[1] + sqrt(of_key[0]) * of_query[1];
            check_close("s", j, r, *s, sum.value,
                        (rounding_of_sum(x->head_dim) + x->rounding) * sum.magnitude +
                            (integers(x->by) ? 0x1.1p-15 * shared : 0));
            if (j % 7 == 3) *s = -INFINITY; /* hidden */
            x->scores[j * c.ld + r] = *s;
        }
}

static void check_powers(struct chain *x) {
    const struct columns c = x->c;
    x->by->softmax(x->s + c.first, x->p + c.first, c.ld, c.rows, x->keys, unit, x->m + c.first, x->l + c.first,
                   x->alpha + c.first);
    for (int r = c.first; r < c.first + c.rows; r++) {
        const float m = x->m[r], old_m = x->old_m[r];
        double of_block = -INFINITY, sum = 0;
        for (int64_t j = 0; j < x->keys; j++) of_block = fmax(of_block, x->scores[j * c.ld + r]);
        const double top = fmax(old_m, of_block);
        CHECK(m >= old_m && m <= top && exp2(unit * (top - m)) <= FA_MOST_POWER, "m[%d] is %g, from %g to %g", r,
              (double)m, (double)old_m, top);
        const double shared = integers(x->by) ? 0x1.1p-14 * exp2(unit * (of_block - m)) : 0;
        const double rounding = x->by->sums ? 0x1.1p-8 : x->by->in_parts ? 0x1p-15 : 4e-6;
        for (int64_t j = 0; j < x->keys; j++) {
            const double power = exp2(unit * ((double)x->scores[j * c.ld + r] - m));
            check_close("p", j, r, x->by->power(x->p, c.ld, r, j), power, rounding * power + shared);
            sum += power;
        }
        const double fade = exp2((double)unit * (old_m - m));
        check_close("alpha", 0, r, x->alpha[r], fade, 4e-6 * fade);
        sum += fade * old_l(r);
        check_close("l", 0, r, x->l[r], sum, 4e-6 * sum);
    }
}

static void check_same(const char *what, const struct columns c, int64_t count, const float *one, const float *other) {
    for (int64_t n = 0; n < count; n++)
        CHECK(memcmp(one + n * c.ld + c.first, other + n * c.ld + c.first, (size_t)c.rows * sizeof(float)) == 0,
              "%s, row %lld: not the same bits", what, (long long)n);
}

/* The softmax another time: to the bit what it was. */
static void check_twin(struct chain *x, int with_l, const fa_scores *next) {
    const struct columns c = x->c;
    float *l = with_l ? x->twin_l + c.first : NULL;
    for (int r = c.first; r < c.first + c.rows; r++) x->twin_m[r] = x->old_m[r], x->twin_l[r] = old_l(r);
    if (next)
        x->by->softmax_beside(x->s + c.first, x->twin_p + c.first, c.ld, c.rows, x->keys, unit, x->twin_m + c.first, l,
                              x->twin_alpha + c.first, next);
    else
        x->by->softmax(x->s + c.first, x->twin_p + c.first, c.ld, c.rows, x->keys, unit, x->twin_m + c.first, l,
                       x->twin_alpha + c.first);
    check_same("p", c, (x->keys + 1) / 2 * x->by->pair_rows, x->p, x->twin_p);
    check_same("m", c, 1, x->m, x->twin_m);
    check_same("alpha", c, 1, x->alpha, x->twin_alpha);
    if (with_l) check_same("l", c, 1, x->l, x->twin_l);
}

/* Nothing depends on whether l is wanted, nor on a qk meanwhile, nor that on the softmax. */
static void check_softmax_again(struct chain *x) {
    const struct columns c = x->c;
    const fa_products *by = x->by;
    const fa_scores next = {x->next + c.first, x->q + c.first, c.ld, c.rows, x->keys_made, x->from, x->keys, x->head_dim};
    if (by->sums) check_twin(x, 0, NULL);
    if (!by->softmax_beside) return;
    if (by->sums) check_twin(x, 0, &next);
    check_twin(x, 1, &next);
    by->qk(x->again + c.first, x->q + c.first, c.ld, c.rows, x->keys_made, x->from, x->keys, x->head_dim);
    check_same("s", c, x->keys, x->again, x->next);
}

/* Powers are taken as the table has rounded them. */
static void check_values(struct chain *x) {
    const struct columns c = x->c;
    const int64_t sums_at = fa_sums_of_o(x->by, x->v_head_dim);
    x->by->pv(o_of(x, c.first, 0), x->alpha + c.first, x->p + c.first, c.ld, c.rows, x->values_made, x->from, x->keys,
              x->v_head_dim);
    for (int r = c.first; r < c.first + c.rows; r++) {
        const double alpha = x->alpha[r];
        double powers[FA_MOST_BLOCK_KEYS], sum_of_powers = 0;
        for (int64_t j = 0; j < x->keys; j++) {
            powers[j] = x->by->power(x->p, c.ld, r, j);
            sum_of_powers += powers[j];
        }
        const double sums = old_o(r, sums_at) * alpha + sum_of_powers;
        if (x->by->sums) check_close("sums", 0, r, *o_of(x, r, sums_at), sums, 4e-6 * sums);
        for (int64_t d = 0; d < x->v_head_dim; d++) {
            struct sum sum = {0, 0};
            double largest = 0;
            for (int64_t j = 0; j < x->block; j++) largest = fmax(largest, fabs(stored_number(x->v, j, d)));
            add(&sum, old_o(r, d) * alpha);
            for (int64_t j = 0; j < x->keys; j++) add(&sum, powers[j] * stored_number(x->v, x->from + j, d));
            check_close("o", d, r, *o_of(x, r, d), sum.value,
                        (rounding_of_sum(x->keys) + x->rounding) * sum.magnitude +
                            (integers(x->by) ? 0x1p-12 * largest * sum_of_powers : 0));
        }
    }
}

static void check_chain(struct chain x) {
    prepare(&x);
    if (x.by->enter) x.by->enter();
    lay_out(&x);
    check_scores(&x);
    check_powers(&x);
    check_softmax_again(&x);
    check_values(&x);
    if (x.by->leave) x.by->leave();
    guard_check();
    guard_release();
}

static void check_table(const fa_products *by, fastattn_dtype dtype, double rounding) {
    static const int64_t blocks[] = {1, 15, 16, 17, 31, 33, 64, 100, 128}, dims[] = {0, 1, 8, 31, 32, 33, 64, 72, 128, 160};
    for (size_t e = 0; e < COUNT(blocks) * COUNT(dims); e++) {
        const int64_t block = blocks[e % COUNT(blocks)], from = e % 3 == 2 && block > 16 ? 16 : 0;
        if (block > by->block_keys) continue;
        check_chain((struct chain){.by = by, .dtype = dtype, .rounding = rounding, .c = columns[e % COUNT(columns)],
                                   .head_dim = dims[e / COUNT(blocks)], .v_head_dim = dims[e * 5 % COUNT(dims)],
                                   .gap = (int64_t)(e % 2), .block = block, .from = from, .keys = block - from,
                                   .growth = e % 4 == 0 ? 40 : 3,
                                   .as_stored = by->in_place && dtype == FASTATTN_FLOAT32 && e % 5 < 3});
    }
}

TEST_EACH_ISA(products_as_a_chain) {
    static const struct { fastattn_dtype dtype; fastattn_precision precision; double rounding; } kinds[] = {
        {FASTATTN_FLOAT32, FASTATTN_PRECISION_HIGHEST, 0},     {FASTATTN_FLOAT32, FASTATTN_PRECISION_HIGH, 0x1p-15},
        {FASTATTN_FLOAT32, FASTATTN_PRECISION_MEDIUM, 0x1p-7}, {FASTATTN_FLOAT16, FASTATTN_PRECISION_HIGHEST, 0x1p-16},
        {FASTATTN_FLOAT16, FASTATTN_PRECISION_HIGH, 0x1p-15},  {FASTATTN_BFLOAT16, FASTATTN_PRECISION_HIGHEST, 0}};
    table();
    for (size_t n = 0; n < COUNT(kinds); n++) {
        const fa_products *by = fastattn_products_select(test_isa, kinds[n].dtype, kinds[n].precision);
        const int rounded = strncmp(by->name, "float32_", 8) != 0 && !integers(by);
        check_table(by, kinds[n].dtype, rounded ? kinds[n].rounding : 0);
    }
#if defined(FA_HOLDS_AVX512) && defined(__GNUC__)
    if (test_isa != FASTATTN_ISA_AVX512) return;
    /* Chosen or not. */
    if (fastattn_cpu_has(FA_CPU_AVX512_BF16)) {
        check_table(&fastattn_products_bfloat16_avx512, FASTATTN_BFLOAT16, 0);
        check_table(&fastattn_products_bfloat16_rows_avx512, FASTATTN_BFLOAT16, 0);
    }
    for (size_t n = 0; n < COUNT(dtypes) && fastattn_cpu_has(FA_CPU_AVX512_VNNI); n++)
        check_table(&fastattn_products_int16_avx512, dtypes[n], 0);
#endif
}

/* Float32 products give a row the same bits whether lanes are rows or not: what it is computed beside must not matter. */
TEST_EACH_ISA(products_by_rows_have_the_same_bits) {
    static const int64_t dims[] = {1, 8, 33, 64, 72, 128, 160}, blocks[] = {1, 15, 16, 17, 40, 64};
    enum { ROWS = 19, LD = 32, DIM = 160, KEYS = 64 };
    const fa_ukernel *uk = table();
    for (size_t e = 0; e < COUNT(dims) * COUNT(blocks) * 3; e++) {
        const fastattn_dtype dtype = dtypes[e % 3];
        const int64_t dim = dims[e / 3 % COUNT(dims)], keys = blocks[e / 3 / COUNT(dims)], item = (int64_t)dtype_size(dtype);
        const fa_products *const sides[2] = {uk->products, uk->few};
        static float s[2][KEYS * LD], p[2][KEYS * LD], o[2][DIM * LD];
        float m[2][LD], l[2][LD], alpha[2][LD];
        const void *rows_of[FA_PANEL_ROWS];
        context("%lld keys, %lld numbers, dtype %d", (long long)keys, (long long)dim, (int)dtype);
        random_rows(rows_of, LD, ROWS, dim, dim * item, dtype);
        const fa_matrix k = stored_rows("k", keys, dim, dim * item, dtype), v = stored_rows("v", keys, dim, dim * item, dtype);
        for (int side = 0; side < 2; side++) {
            const fa_products *by = sides[side];
            const int rows = by->by_rows ? ROWS : LD, ld = by->by_rows ? KEYS : LD;
            float *q = panel("q", DIM, LD), *k_room = panel("k room", KEYS, DIM), *v_room = panel("v room", KEYS, DIM);
            for (int r = 0; r < LD; r++) m[side][r] = -1.0f, l[side][r] = 2.0f;
            for (int n = 0; n < DIM * LD; n++) o[side][n] = 0.5f;
            by->pack(q, ld, rows_of, rows, dim, dtype, 1.0f);
            const fa_matrix keys_made = by->keys(k_room, k, keys, dim), values_made = by->values(v_room, v, keys, dim);
            by->qk(s[side], q, ld, rows, keys_made, 0, keys, dim);
            memcpy(p[side], s[side], sizeof p[side]);
            by->softmax(p[side], p[side], ld, rows, keys, unit, m[side], l[side], alpha[side]);
            by->pv(o[side], alpha[side], p[side], ld, rows, values_made, 0, keys, dim);
        }
        for (int r = 0; r < ROWS; r++) {
            for (int64_t j = 0; j < keys; j++) {
                check_close("s", r, j, s[1][r * KEYS + j], s[0][j * LD + r], 0);
                check_close("p", r, j, p[1][r * KEYS + j], p[0][j * LD + r], 0);
            }
            check_close("m", 0, r, m[1][r], m[0][r], 0);
            check_close("l", 0, r, l[1][r], l[0][r], 0);
            check_close("alpha", 0, r, alpha[1][r], alpha[0][r], 0);
            for (int64_t d = 0; d < dim; d++) check_close("o", r, d, o[1][number_at(uk->few, KEYS, dim, r, d)], o[0][d * LD + r], 0);
        }
        guard_release();
    }
}

/* Blocks of integers fit as long as what they share leaves enough to each. */
TEST_EACH_ISA(products_fit) {
#if defined(FA_HOLDS_AVX512) && defined(__GNUC__)
    enum { ROWS = 64, KEYS = 40, DIM = 72, CHANGED = 17 };
    static const struct { const char *what; float factor, offset; int fits[3]; } changes[] = {
        /* of one row of q, k and v */
        {"nothing", 1, 0, {1, 1, 1}},
        {"zeros", 0, 0, {1, 1, 1}},
        {"four times as large", 4, 0, {1, 1, 1}},
        {"four times as small", 0.25f, 0, {1, 1, 1}},
        {"64 times as large", 64, 0, {0, 0, 0}},
        {"64 times as small", 0x1p-6f, 0, {1, 1, 0}},
        {"tiny", 0x1p-60f, 0, {0, 0, 0}},
        {"huge", 0x1p60f, 0, {0, 0, 0}},
        {"subnormal", 0x1p-130f, 0, {0, 0, 0}},
        {"infinite", 1, INFINITY, {0, 0, 0}},
        {"NaN", 1, NAN, {0, 0, 0}}};
    const fa_products *by = &fastattn_products_int16_avx512;
    table();
    if (test_isa != FASTATTN_ISA_AVX512 || !fastattn_cpu_has(FA_CPU_AVX512_VNNI)) return;
    for (size_t e = 0; e < COUNT(changes) * 3 * 2; e++) {
        const fastattn_dtype dtype = e % 2 ? FASTATTN_BFLOAT16 : FASTATTN_FLOAT32;
        const size_t operand = e / 2 % 3, n = e / 6;
        const int64_t stride = DIM * (int64_t)dtype_size(dtype);
        context("%s in operand %d, of dtype %d", changes[n].what, (int)operand, (int)dtype);
        const void *rows_of[ROWS];
        const fa_matrix q = fa_matrix_at(random_rows(rows_of, ROWS, ROWS, DIM, stride, dtype), stride, dtype);
        const fa_matrix k = stored_rows("k", KEYS, DIM, stride, dtype), v = stored_rows("v", KEYS, DIM, stride, dtype);
        const fa_matrix changed = operand == 0 ? q : operand == 1 ? k : v;
        for (int64_t d = 0; d < DIM; d++)
            store(dtype, stored_at(changed, CHANGED, d),
                  stored_number(changed, CHANGED, d) * changes[n].factor + (d == 70 ? changes[n].offset : 0));
        float *q_made = panel("q", FA_TILE * 3, ROWS);
        float *k_room = panel("k room", KEYS + FA_TILE, FA_TILE * 3), *v_room = panel("v room", KEYS + FA_TILE, FA_TILE * 3);
        guard_seal();
        by->pack(q_made, ROWS, rows_of, ROWS, DIM, dtype, 1.0f);
        const fa_matrix keys_made = by->keys(k_room, k, KEYS, DIM), values_made = by->values(v_room, v, KEYS, DIM);
        CHECK(by->fits(q_made, ROWS, keys_made, KEYS, values_made, -0.1f) == changes[n].fits[operand], "fits: %d",
              !changes[n].fits[operand]);
        guard_check();
        guard_release();
    }
#endif
}
