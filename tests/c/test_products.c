/* Every table of fa_products against its sentences in ukernel.h, in double precision, along the chain of its slots. */
#include "chain.h"

#include <string.h>

#include "cpu/cpu.h"

/* A chain, what softmax found, and the same slots run another time, after other garbage. */
struct trial {
    struct chain x, twin; /* with panels of its own for what is written from the scores on */
    double rounding;      /* of a term of the products, beyond that of float32 */
    double growth;        /* of the powers, in bits, where the maximum stays what it was */
    float *scores, old_m[FA_PANEL_ROWS]; /* s and m as softmax finds them */
};

enum { GARBAGE = 0xff, OTHER_GARBAGE = 0x3f }; /* NaN, and numbers near 1, in every type */

static const float unit = 0.7f;

/* Every third row has seen no key before, and has -inf for m. */
static float old_l(int row) { return row % 3 == 0 ? 0 : 3; }
static float old_o(int row, int64_t d) { return row % 3 == 0 ? 0 : (float)d; }

/* Integers have a rounding that they share, as fixed.h says. */
static int integers(const fa_products *by) { return strncmp(by->name, "int16_", 6) == 0; }

static float *o_of(const struct chain *x, int r, int64_t d) { return &x->o[o_at(x->by, x->c.ld, x->v_head_dim, r, d)]; }

/* The state before the block. */
static void begin(const struct trial *t, struct chain *x) {
    for (int r = x->c.first; r < x->c.first + x->c.rows; r++) {
        x->m[r] = t->old_m[r];
        x->l[r] = old_l(r);
        for (int64_t d = 0; d < fa_sums_of_o(x->by, x->v_head_dim) + 1; d++) *o_of(x, r, d) = old_o(r, d);
    }
}

static void prepare(struct trial *t) {
    struct chain *x = &t->x;
    const struct columns c = x->c;
    context("%s, %lld of %lld keys from %lld on, %lld and %lld numbers, columns %d to %d of %d, dtype %d", x->by->name,
            (long long)x->keys, (long long)x->block, (long long)x->from, (long long)x->head_dim, (long long)x->v_head_dim,
            c.first, c.first + c.rows, c.ld, (int)x->dtype);
    chain_lay_out(x);
    t->twin = *x;
    const int64_t tiled = fa_round_up(x->block + FA_TILE, FA_TILE) + FA_TILE;
    t->twin.s = panel("twin s", tiled, c.ld);
    t->twin.p = x->by->in_place ? t->twin.s : panel("twin p", tiled, c.ld);
    t->twin.o = panel("twin o", fa_round_up(x->v_head_dim, FA_TILE) + 2 * FA_TILE, c.ld);
    t->twin.m = panel("twin m", 1, c.ld);
    t->twin.l = panel("twin l", 1, c.ld);
    t->twin.alpha = panel("twin alpha", 1, c.ld);
    t->scores = panel("scores", x->keys, c.ld);
    for (int r = c.first; r < c.first + c.rows; r++)
        t->old_m[r] = r % 3 == 0 ? -INFINITY : (float)(r % 3 == 1 ? -t->growth / unit : 4 * random_signed(&rng));
    begin(t, x);
    begin(t, &t->twin);
}

/* Queries with their sign turned. */
static void make_operands(struct trial *t) {
    for (int slot = CHAIN_PACK; slot <= CHAIN_VALUES; slot++) chain_run_after(&t->x, (enum chain_slot)slot, GARBAGE);
    t->twin.keys_made = t->x.keys_made;
    t->twin.values_made = t->x.values_made;
}

static void check_same(const char *what, const struct columns c, int64_t count, const float *one, const float *other) {
    for (int64_t n = 0; n < count; n++)
        CHECK(memcmp(one + n * c.ld + c.first, other + n * c.ld + c.first, (size_t)c.rows * sizeof(float)) == 0,
              "%s, row %lld: not the same bits", what, (long long)n);
}

/* Any number of rows, which have the bits that they have among more; in what is beyond them is the last one, or what a panel has there. */
static void check_few_scores(struct trial *t) {
    struct chain *few = &t->twin;
    const struct columns c = few->c;
    for (int rows = 1; rows < FA_ROW_STEP; rows += 1 + rows / 4) {
        few->c.rows = rows;
        chain_run_after(few, CHAIN_QK, OTHER_GARBAGE);
        for (int64_t j = 0; j < few->keys; j++)
            for (int r = c.first; r < c.first + FA_ROW_STEP; r++) {
                const float *found = &few->s[j * c.ld + r], *wanted = &t->x.s[j * c.ld + r], *last = &t->x.s[j * c.ld + c.first + rows - 1];
                CHECK(memcmp(found, wanted, sizeof *found) == 0 || (r >= c.first + rows && memcmp(found, last, sizeof *found) == 0),
                      "s[%lld][%d] of %d rows: other bits", (long long)j, r, rows);
            }
    }
    few->c = c;
}

static void check_scores(struct trial *t) {
    const struct chain *x = &t->x;
    const struct columns c = x->c;
    chain_run_after(&t->x, CHAIN_QK, GARBAGE);
    chain_run_after(&t->twin, CHAIN_QK, OTHER_GARBAGE);
    check_same("s", c, x->keys, x->s, t->twin.s);
    if (x->by->o_by_rows) check_few_scores(t);
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
                        (rounding_of_sum(x->head_dim) + t->rounding) * sum.magnitude +
                            (integers(x->by) ? 0x1.1p-15 * shared : 0));
            if (j % 7 == 3) *s = -INFINITY; /* hidden */
            t->scores[j * c.ld + r] = *s;
        }
}

static void check_powers(struct trial *t) {
    const struct chain *x = &t->x;
    const struct columns c = x->c;
    chain_run_after(&t->x, CHAIN_SOFTMAX, GARBAGE);
    for (int r = c.first; r < c.first + c.rows; r++) {
        const float m = x->m[r], old_m = t->old_m[r];
        double of_block = -INFINITY, sum = 0;
        for (int64_t j = 0; j < x->keys; j++) of_block = fmax(of_block, t->scores[j * c.ld + r]);
        const double top = fmax(old_m, of_block);
        CHECK(m >= old_m && m <= top && exp2(unit * (top - m)) <= FA_MOST_POWER, "m[%d] is %g, from %g to %g", r,
              (double)m, (double)old_m, top);
        const double shared = integers(x->by) ? 0x1.1p-14 * exp2(unit * (of_block - m)) : 0;
        const double rounding = x->by->sums ? 0x1.1p-8 : x->by->in_parts ? 0x1p-15 : 4e-6;
        for (int64_t j = 0; j < x->keys; j++) {
            const double power = exp2(unit * ((double)t->scores[j * c.ld + r] - m));
            check_close("p", j, r, x->by->power(x->p, c.ld, r, j), power, rounding * power + shared);
            sum += power;
        }
        const double fade = exp2((double)unit * (old_m - m));
        check_close("alpha", 0, r, x->alpha[r], fade, 4e-6 * fade);
        sum += fade * old_l(r);
        check_close("l", 0, r, x->l[r], sum, 4e-6 * sum);
    }
}

/* The softmax another time: to the bit what it was, whether l is wanted or not, and whatever it is computed beside. */
static void check_twin(struct trial *t, enum chain_slot slot, int with_l) {
    const struct chain *x = &t->x;
    struct chain twin = t->twin;
    const struct columns c = x->c;
    begin(t, &twin);
    for (int64_t n = 0; n < x->keys; n++)
        memcpy(twin.s + n * c.ld + c.first, t->scores + n * c.ld + c.first, (size_t)c.rows * sizeof(float));
    if (!with_l) twin.l = NULL;
    chain_run_after(&twin, slot, OTHER_GARBAGE);
    check_same("p", c, (x->keys + 1) / 2 * x->by->pair_rows, x->p, twin.p);
    check_same("m", c, 1, x->m, twin.m);
    check_same("alpha", c, 1, x->alpha, twin.alpha);
    if (with_l) check_same("l", c, 1, x->l, twin.l);
}

static void check_softmax_again(struct trial *t) {
    check_twin(t, CHAIN_SOFTMAX, 1);
    if (t->x.by->sums) check_twin(t, CHAIN_SOFTMAX, 0);
    if (!t->x.by->softmax_beside) return;
    if (t->x.by->sums) check_twin(t, CHAIN_BESIDE, 0);
    check_twin(t, CHAIN_BESIDE, 1);
    chain_run(&t->twin, CHAIN_QK);
    check_same("s", t->x.c, t->x.keys, t->twin.s, t->twin.next);
}

/* Powers are taken as the table has rounded them. */
static void check_values(struct trial *t) {
    const struct chain *x = &t->x;
    struct chain twin = *x; /* the same powers, other sums */
    const struct columns c = x->c;
    const int64_t sums_at = fa_sums_of_o(x->by, x->v_head_dim);
    twin.o = t->twin.o;
    chain_run_after(&t->x, CHAIN_PV, GARBAGE);
    chain_run_after(&twin, CHAIN_PV, OTHER_GARBAGE);
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
            CHECK(memcmp(o_of(x, r, d), o_of(&twin, r, d), sizeof(float)) == 0, "o[%lld][%d]: not the same bits", (long long)d, r);
            check_close("o", d, r, *o_of(x, r, d), sum.value,
                        (rounding_of_sum(x->keys) + t->rounding) * sum.magnitude +
                            (integers(x->by) ? 0x1p-12 * largest * sum_of_powers : 0));
        }
    }
}

static void check_chain(struct trial t) {
    prepare(&t);
    if (t.x.by->enter) t.x.by->enter();
    make_operands(&t);
    check_scores(&t);
    check_powers(&t);
    check_softmax_again(&t);
    check_values(&t);
    if (t.x.by->leave) t.x.by->leave();
    guard_check();
    guard_release();
}

static void check_table(const fa_products *by, fastattn_dtype dtype, double rounding) {
    static const int64_t blocks[] = {1, 15, 16, 17, 31, 33, 64, 100, 128}, dims[] = {0, 1, 8, 31, 32, 33, 64, 72, 128, 160};
    for (size_t e = 0; e < COUNT(blocks) * COUNT(dims); e++) {
        const int64_t block = blocks[e % COUNT(blocks)], from = e % 3 == 2 && block > 16 ? 16 : 0;
        if (block > by->block_keys) continue;
        const struct chain x = {.by = by, .dtype = dtype, .c = columns[e % COUNT(columns)], .head_dim = dims[e / COUNT(blocks)],
                                .v_head_dim = dims[e * 5 % COUNT(dims)], .gap = (int64_t)(e % 2), .block = block, .from = from,
                                .keys = block - from, .part = block - from, .sign = -1, .unit = unit,
                                .as_stored = by->in_place && dtype == FASTATTN_FLOAT32 && e % 5 < 3};
        check_chain((struct trial){.x = x, .rounding = rounding, .growth = e % 4 == 0 ? 40 : 3});
    }
}

TEST_EACH_ISA(products_as_a_chain) {
    static const struct { fastattn_dtype dtype; fastattn_precision precision; double rounding; } kinds[] = {
        {FASTATTN_FLOAT32, FASTATTN_PRECISION_HIGHEST, 0},     {FASTATTN_FLOAT32, FASTATTN_PRECISION_HIGH, 0x1p-15},
        {FASTATTN_FLOAT32, FASTATTN_PRECISION_MEDIUM, 0x1p-7}, {FASTATTN_FLOAT16, FASTATTN_PRECISION_HIGHEST, 0x1p-16},
        {FASTATTN_FLOAT16, FASTATTN_PRECISION_HIGH, 0x1p-15},  {FASTATTN_BFLOAT16, FASTATTN_PRECISION_HIGHEST, 0}};
    const fa_ukernel *uk = table();
    for (size_t n = 0; n < COUNT(kinds); n++) {
        const fa_products *by = fastattn_products_select(uk, test_isa, kinds[n].dtype, kinds[n].precision, 0);
        const int rounded = strncmp(by->name, "float32_", 8) != 0 && !integers(by);
        check_table(by, kinds[n].dtype, rounded ? kinds[n].rounding : 0);
    }
#ifdef FA_HOLDS_AVX512_BF16
    /* Chosen or not. */
    if (test_isa == FASTATTN_ISA_AVX512 && fastattn_cpu_has(FA_CPU_AVX512_BF16)) {
        check_table(&fastattn_products_bfloat16_avx512, FASTATTN_BFLOAT16, 0);
        check_table(&fastattn_products_bfloat16_rows_avx512, FASTATTN_BFLOAT16, 0);
        check_table(&fastattn_products_bfloat16_few_avx512, FASTATTN_BFLOAT16, 0);
    }
#endif
#ifdef FA_HOLDS_AVX512_VNNI
    for (size_t n = 0; n < COUNT(dtypes) && test_isa == FASTATTN_ISA_AVX512 && fastattn_cpu_has(FA_CPU_AVX512_VNNI); n++)
        check_table(&fastattn_products_int16_avx512, dtypes[n], 0);
#endif
}

/* Float32 products give a row the same bits whether lanes are rows or not, and those that turn keys whatever number there is of them: what
 * it is computed beside must not matter. */
TEST_EACH_ISA(products_by_rows_have_the_same_bits) {
    static const int64_t dims[] = {1, 8, 33, 64, 72, 128, 160}, blocks[] = {1, 15, 16, 17, 40, 64};
    enum { ROWS = 51, LD = 64, DIM = 160, KEYS = 64 }; /* more rows than are summed across lanes */
    const fa_ukernel *uk = table();
    for (size_t e = 0; e < COUNT(dims) * COUNT(blocks) * 3 * 2; e++) {
        static const int turned_rows[] = {1, 2, 3, 4, 12, ROWS};
        const fastattn_dtype dtype = dtypes[e % 3];
        const int64_t dim = dims[e / 6 % COUNT(dims)], keys = blocks[e / 6 / COUNT(dims)], item = (int64_t)dtype_size(dtype);
        const fa_products *const sides[2] = {uk->products, e / 3 % 2 ? uk->turned : uk->few};
        const int few = sides[1] == uk->few ? ROWS : turned_rows[e / 6 % COUNT(turned_rows)];
        static float s[2][KEYS * LD], p[2][KEYS * LD], o[2][DIM * LD];
        float m[2][LD], l[2][LD], alpha[2][LD];
        const void *rows_of[FA_PANEL_ROWS];
        context("%lld keys, %lld numbers, dtype %d", (long long)keys, (long long)dim, (int)dtype);
        random_rows(rows_of, LD, ROWS, dim, dim * item, dtype);
        const fa_matrix k = stored_rows("k", keys, dim, dim * item, dtype), v = stored_rows("v", keys, dim, dim * item, dtype);
        for (int side = 0; side < 2; side++) {
            const fa_products *by = sides[side];
            const int rows = by->by_rows ? few : LD, ld = by->by_rows ? KEYS : LD;
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
        for (int r = 0; r < few; r++) {
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

/* Pointers to the rows of a matrix whose runs of 2**shift lie in the reverse order, as many as 2 * keys rows have. */
static fa_matrix rows_by_pointers(fa_matrix m, const char **rows, int64_t keys, int shift) {
    const int64_t step = (int64_t)1 << shift, runs = (keys + step - 1) >> shift;
    for (int64_t n = 0; n < 2 * keys; n += step) {
        const int64_t run = n < keys ? n >> shift : runs - 1, place = (runs - 1 - run) << shift;
        rows[n >> shift] = (const char *)((uintptr_t)m.at + (uintptr_t)((place - (run << shift)) * m.stride) - 4);
    }
    m.rows = rows, m.shift = shift, m.column = 4;
    return m;
}

#ifdef FA_HOLDS_AVX512_BF16
/* Of pairs, too: a few rows by themselves, over keys side by side or wherever pointers say, have the bits that they have in a panel. The
 * maximum is far below the scores, above them, or not there yet, and l may be unwanted. */
static void check_turned_pairs(const fa_products *lanes, const fa_products *by_rows) {
    static const int64_t dims[] = {1, 8, 33, 64, 72, 80, 128, 160}, blocks[] = {1, 15, 16, 17, 31, 33, 40, 64};
    enum { ROWS = FA_ROW_STEP, DIM = 160, KEYS = 64 };
    for (size_t e = 0; e < COUNT(dims) * COUNT(blocks) * 12; e++) {
        const int rows = 1 + (int)(e % (size_t)by_rows->panel_rows), in_pages = e / 3 % 2 == 1, shift = in_pages ? (int)(e % 5) : 0;
        const int64_t dim = dims[e % COUNT(dims)], keys = blocks[e / COUNT(dims) % COUNT(blocks)], stride = dim * 2;
        const float c = e % 4 == 3 ? 60.0f : unit, first_m[] = {-INFINITY, -40.0f, 100.0f, 0.25f};
        const void *rows_of[FA_PANEL_ROWS];
        const char *k_rows[2 * KEYS], *v_rows[2 * KEYS];
        float *s[2], *p[2], *o[2], m[2][ROWS], l[2][ROWS], alpha[2][ROWS];
        context("%d rows, %lld keys, %lld numbers, pointers %d to 2**%d", rows, (long long)keys, (long long)dim, in_pages, shift);
        random_rows(rows_of, rows, rows, dim, stride, FASTATTN_BFLOAT16);
        for (int r = rows; r < ROWS; r++) rows_of[r] = rows_of[rows - 1];
        const int64_t stored = fa_round_up(keys, (int64_t)1 << shift);
        fa_matrix k = stored_rows("k", stored, dim, stride, FASTATTN_BFLOAT16), v = stored_rows("v", stored, dim, stride, FASTATTN_BFLOAT16);
        if (in_pages) k = rows_by_pointers(k, k_rows, keys, shift), v = rows_by_pointers(v, v_rows, keys, shift);
        float *q[2], *room = panel("k room", KEYS, DIM);
        for (int side = 0; side < 2; side++) {
            q[side] = panel("q", DIM, ROWS), s[side] = panel("s", KEYS, ROWS), p[side] = panel("p", KEYS, ROWS);
            o[side] = panel("o", ROWS, (int)fa_row_of_o(lanes, DIM));
            for (int r = 0; r < ROWS; r++) m[side][r] = first_m[(e + (size_t)r) % COUNT(first_m)], l[side][r] = 2.0f;
            for (int64_t n = 0; n < ROWS * fa_row_of_o(lanes, dim); n++) o[side][n] = 0.5f;
        }
        guard_seal();
        for (int side = 0; side < 2; side++) {
            const fa_products *by = side ? by_rows : lanes;
            const int panel_rows = side ? rows : ROWS, ld = side ? KEYS : ROWS;
            by->pack(q[side], ld, rows_of, panel_rows, dim, FASTATTN_BFLOAT16, 1.0f);
            by->qk(s[side], q[side], ld, panel_rows, by->keys(room, k, keys, dim), 0, keys, dim);
            by->softmax(s[side], p[side], ld, panel_rows, keys, c, m[side], e % 2 ? l[side] : NULL, alpha[side]);
            by->pv(o[side], alpha[side], p[side], ld, rows, by->values(NULL, v, keys, dim), 0, keys, dim);
        }
        for (int r = 0; r < rows; r++) {
            for (int64_t j = 0; j < keys; j++) {
                check_close("s", r, j, s[1][r * KEYS + j], s[0][j * ROWS + r], 0);
                check_close("p", r, j, by_rows->power(p[1], KEYS, r, j), lanes->power(p[0], ROWS, r, j), 0);
            }
            check_close("m", 0, r, m[1][r], m[0][r], 0);
            check_close("l", 0, r, l[1][r], l[0][r], 0);
            check_close("alpha", 0, r, alpha[1][r], alpha[0][r], 0);
            for (int64_t d = 0; d <= fa_sums_of_o(lanes, dim); d++)
                if (d < dim || d == fa_sums_of_o(lanes, dim))
                    check_close("o", r, d, o[1][o_at(by_rows, KEYS, dim, r, d)], o[0][o_at(lanes, ROWS, dim, r, d)], 0);
        }
        guard_check();
        guard_release();
    }
}
#endif

TEST_EACH_ISA(products_of_pairs_by_rows_have_the_same_bits) {
    table();
#ifdef FA_HOLDS_AVX512_BF16
    if (test_isa == FASTATTN_ISA_AVX512 && fastattn_cpu_has(FA_CPU_AVX512_BF16))
        check_turned_pairs(&fastattn_products_bfloat16_rows_avx512, fastattn_products_bfloat16_rows_avx512.turned);
#endif
}

/* Rows with keys and values of their own, beside each other, get the bits that each gets from its own alone. */
static void check_beside(const fa_products *by, const fastattn_dtype *kinds, size_t count) {
    static const int64_t dims[] = {1, 8, 33, 64, 72, 128, 160}, blocks[] = {1, 3, 4, 5, 16, 17, 40, 64};
    enum { ROWS = 4, DIM = 160, KEYS = 64 };
    CHECK(by->most_beside <= ROWS, "%d rows", by->most_beside);
    for (size_t e = 0; e < COUNT(dims) * COUNT(blocks) * 3 * 2; e += test_effort < 10 ? 5 : 1) {
        const fastattn_dtype dtype = kinds[e % count];
        const int in_pages = e / 3 % 2, rows = 1 + (int)(e / 6 % (size_t)by->most_beside), shift = in_pages ? (int)(e / 12 % 5) : 0;
        const int64_t dim = dims[e / 6 % COUNT(dims)], keys = blocks[e / 6 / COUNT(dims)], beside = dim * (int64_t)dtype_size(dtype);
        const int64_t pitch = fa_round_up(dim, FA_ROW_STEP);
        context("%d rows, %lld keys, %lld numbers, dtype %d, pointers %d to 2**%d", rows, (long long)keys, (long long)dim, (int)dtype, in_pages, shift);
        const void *rows_of[FA_PANEL_ROWS];
        const char *k_rows[2 * KEYS], *v_rows[2 * KEYS], *k_own[2 * KEYS], *v_own[2 * KEYS];
        const int64_t stored = fa_round_up(keys, (int64_t)1 << shift);
        random_rows(rows_of, ROWS, rows, dim, beside, dtype);
        fa_matrix k = stored_rows("k", stored, dim * rows, beside * rows, dtype), v = stored_rows("v", stored, dim * rows, beside * rows, dtype);
        if (in_pages) k = rows_by_pointers(k, k_rows, keys, shift), v = rows_by_pointers(v, v_rows, keys, shift);
        k.beside = v.beside = beside;
        float *q = panel("q", ROWS, (int)pitch), *s = panel("s", ROWS, KEYS), *o = panel("o", ROWS, (int)pitch);
        float *alone_s = panel("alone s", ROWS, KEYS), *alone_o = panel("alone o", ROWS, (int)pitch), alpha[ROWS] = {1, 0.5f, 0, 0.75f};
        for (int64_t n = 0; n < ROWS * pitch; n++) o[n] = alone_o[n] = 0.5f;
        guard_seal();
        by->pack(q, KEYS, rows_of, rows, dim, dtype, 1.0f);
        by->qk(s, q, KEYS, rows, k, 0, keys, dim);
        by->pv(o, alpha, s, KEYS, rows, v, 0, keys, dim);
        for (int r = 0; r < rows; r++) {
            fa_matrix own_k = fa_matrix_at(NULL, 0, dtype), own_v = own_k;
            for (int64_t j = 0; j < 2 * keys; j++)
                k_own[j] = fa_row_at(k, j < keys ? j : keys - 1) + r * beside, v_own[j] = fa_row_at(v, j < keys ? j : keys - 1) + r * beside;
            own_k.rows = k_own, own_v.rows = v_own;
            by->qk(alone_s + r * KEYS, q + r * pitch, KEYS, 1, own_k, 0, keys, dim);
            by->pv(alone_o + r * pitch, alpha + r, alone_s + r * KEYS, KEYS, 1, own_v, 0, keys, dim);
            for (int64_t j = 0; j < keys; j++) check_close("s", r, j, s[r * KEYS + j], alone_s[r * KEYS + j], 0);
            for (int64_t d = 0; d < dim; d++) check_close("o", r, d, o[r * pitch + d], alone_o[r * pitch + d], 0);
        }
        guard_check();
        guard_release();
    }
}

TEST_EACH_ISA(products_of_rows_beside_each_other) {
    check_beside(table()->few, dtypes, table()->few_quantised ? COUNT(dtypes) : 1); /* else float32 alone, which is the first */
#ifdef FA_HOLDS_AVX512_BF16
    static const fastattn_dtype pairs[] = {FASTATTN_BFLOAT16};
    if (test_isa == FASTATTN_ISA_AVX512 && fastattn_cpu_has(FA_CPU_AVX512_BF16))
        check_beside(fastattn_products_bfloat16_avx512.few, pairs, COUNT(pairs));
#endif
#ifdef FA_HOLDS_FMLAL
    static const fastattn_dtype halves[] = {FASTATTN_FLOAT16};
    if (test_isa == FASTATTN_ISA_NEON && fastattn_cpu_has(FA_CPU_FMLAL)) check_beside(&fastattn_products_float16_neon, halves, COUNT(halves));
#endif
}

/* Blocks of integers fit as long as what they share leaves enough to each. */
TEST_EACH_ISA(products_fit) {
#ifdef FA_HOLDS_AVX512_VNNI
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
