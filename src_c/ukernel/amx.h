/* The products of attention on AMX tiles. Included by avx512.c, whose lanes do everything else.
 *
 * A tile holds 16 rows of 64 bytes. One product of tiles adds, to 16 x 16 float32, 16 rows of 32 bfloat16 times 32 x 16 that
 * lie in pairs: element (k, n) at half k % 2 of dword n of row k / 2. Scores are transposed here as everywhere, so
 *
 *     S^T[key][row]  A = K, as it lies in memory           B = Q in pairs of head_dim
 *     O^T[d][row]    A = V^T, transposed once for a panel   B = P in pairs of keys, as the softmax leaves them
 *
 * with the panels of pairs.h. The cross products of their planes, but for the smallest where that is exact enough, add up in the
 * same accumulators. */
#ifdef FA_HOLDS_AMX

enum { AMX_ROWS = 16, AMX_BYTES = 64 };

/* Assembly, because gcc's intrinsics do not say which memory they touch; in its order the tiles stay interleaved as written. */
#define amx_load(tile, at, stride) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(at), "r"((int64_t)(stride)) : "memory")
#define amx_store(tile, at, stride) \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(at), "r"((int64_t)(stride)) : "memory")
#define amx_zero(tile) __asm__ volatile("tilezero %%tmm" #tile : :)
#define amx_dot(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c : :)

static void amx_enter(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } tiles = {1, 0, {0}, {0}, {0}};
    for (int i = 0; i < 8; i++) tiles.bytes[i] = AMX_BYTES, tiles.rows[i] = AMX_ROWS;
    __asm__ volatile("ldtilecfg %0" : : "m"(tiles) : "memory");
}

static void amx_leave(void) { __asm__ volatile("tilerelease"); }

/* An operand of a product: where its first tile is, the next one across and the next one along the sum, all in bytes. */
typedef struct amx_operand {
    const char *at;
    int64_t stride, across, along, plane;
} amx_operand;

/* c for na x nb tiles: 2 x 2 or 4 x 1 (constants), which is as many accumulators as hide the latency of a product, or what is
 * left of them. */
#define AMX_EACH(f)             \
    f(0);                       \
    if (na * nb > 1) { f(1); }  \
    if (na * nb > 2) { f(2); }  \
    if (na * nb > 3) { f(3); }
#define AMX_C(n) ((char *)c + (n) / nb * AMX_ROWS * stride + (n) % nb * AMX_BYTES)
#define AMX_LOAD(n) amx_load(n, AMX_C(n), stride)
#define AMX_STORE(n) amx_store(n, AMX_C(n), stride)

FA_INLINE void amx_begin(int na, int nb, const float *c, int64_t stride, int accumulate) {
    if (accumulate) {
        AMX_EACH(AMX_LOAD)
    } else {
        AMX_EACH(amx_zero)
    }
}

FA_INLINE void amx_end(int na, int nb, float *c, int64_t stride) { AMX_EACH(AMX_STORE) }

#undef AMX_EACH
#undef AMX_C
#undef AMX_LOAD
#undef AMX_STORE

/* One step along the sum. In blocks of 2 x 2 there may be one of both operands already, from the last step. */
FA_INLINE void amx_step(int na, int nb, amx_operand a, amx_operand b, int new_a, int new_b) {
#define AMX_A(tile, i) amx_load(tile, a.at + (i) * a.across, a.stride)
#define AMX_B(tile, i) amx_load(tile, b.at + (i) * b.across, b.stride)
    if (na == 2) {
        if (new_a) { AMX_A(4, 0); }
        if (new_b) { AMX_B(5, 0); }
        amx_dot(0, 4, 5);
        if (new_b) { AMX_B(6, 1); }
        amx_dot(1, 4, 6);
        if (new_a) { AMX_A(7, 1); }
        amx_dot(2, 7, 5); amx_dot(3, 7, 6);
        return;
    }
    AMX_A(4, 0); AMX_B(5, 0); amx_dot(0, 4, 5);
    if (nb == 2) {
        AMX_B(6, 1); amx_dot(1, 4, 6);
    } else if (na == 4) {
        AMX_A(6, 1); amx_dot(1, 6, 5); AMX_A(7, 2); amx_dot(2, 7, 5); AMX_A(4, 3); amx_dot(3, 4, 5);
    }
#undef AMX_A
#undef AMX_B
}

/* A product c = [c +] a b of `count` tiles of a by `rows` rows of b. `products` pairs of planes take part. */
typedef struct amx_product {
    float *c;
    int ld, rows;
    amx_operand a, b;
    int64_t count, steps;
    int products, accumulate;
} amx_product;

FA_INLINE int amx_first_pair(const amx_product *x) { return x->products == 1 ? 2 : 4 - x->products; }

/* A step for a pair of planes, in an order in which one of the two stays. */
FA_INLINE void amx_step_of(int na, int nb, const amx_product *x, amx_operand a, amx_operand b, int64_t step, int pair) {
    static const int planes[4][2] = {{1, 1}, {1, 0}, {0, 0}, {0, 1}};
    const int first = pair == amx_first_pair(x);
    a.at += planes[pair][0] * a.plane + step * a.along;
    b.at += planes[pair][1] * b.plane + step * b.along;
    amx_step(na, nb, a, b, first || pair == 2, first || pair != 2);
}

static FA_NOINLINE void amx_run(const amx_product *x) {
    const int64_t stride = x->ld * (int64_t)sizeof(float);
    amx_operand b = x->b;
#define AMX_BLOCKS(na, nb)                                                                                    \
    for (; i + na <= x->count; i += na, c += na * AMX_ROWS * x->ld, a.at += na * a.across) {                  \
        amx_begin(na, nb, c, stride, x->accumulate);                                                          \
        for (int64_t step = 0; step < x->steps; step++)                                                       \
            for (int n = 0; n < x->products; n++) amx_step_of(na, nb, x, a, b, step, amx_first_pair(x) + n);  \
        amx_end(na, nb, c, stride);                                                                           \
    }
    for (int row = 0; row < x->rows; row += 2 * AMX_ROWS, b.at += 2 * b.across) {
        float *c = x->c + row;
        amx_operand a = x->a;
        int64_t i = 0;
        if (row + AMX_ROWS < x->rows) {
            AMX_BLOCKS(2, 2) AMX_BLOCKS(1, 2)
        } else {
            AMX_BLOCKS(4, 1) AMX_BLOCKS(1, 1)
        }
    }
#undef AMX_BLOCKS
}

/* The same, for two strips of rows, in pieces, beside which vectors are busy with something else: each is a step of a block of
 * 2 x 2 tiles, four products. The out-of-order window reaches no further than that. */
typedef struct amx_pieces {
    amx_product x;
    int pair; /* of the next piece, from 0 on */
    int64_t step, done, pieces;
} amx_pieces;

FA_INLINE amx_pieces amx_pieces_of(amx_product x) {
    const int64_t blocks = x.rows == 2 * AMX_ROWS ? x.count / 2 : 0;
    const amx_pieces w = {x, 0, 0, 0, blocks * x.products * x.steps};
    return w;
}

/* Sums are stored a piece later, when they are there, or the stores would hold up all others. */
static void amx_piece(amx_pieces *w) {
    amx_product *x = &w->x;
    const int64_t stride = x->ld * (int64_t)sizeof(float);
    if (w->done && w->step == x->steps) {
        amx_end(2, 2, x->c, stride);
        x->c += 2 * AMX_ROWS * x->ld;
        x->a.at += 2 * x->a.across;
        x->count -= 2;
        w->step = 0;
    }
    if (w->done++ == w->pieces) return;
    if (w->step == 0 && w->pair == 0) amx_begin(2, 2, x->c, stride, x->accumulate);
    amx_step_of(2, 2, x, x->a, x->b, w->step, amx_first_pair(x) + w->pair);
    if (++w->pair == x->products) w->pair = 0, w->step++;
}

/* A pairs_beside. No vector is in it, and no call of it moves one. */
__attribute__((noinline)) static int64_t amx_keep_up(void *work, int64_t part, int64_t parts) {
    amx_pieces *w = work;
    while (w->done < w->pieces && w->done * parts <= part * w->pieces) amx_piece(w);
    return w->done < w->pieces ? (w->done * parts + w->pieces - 1) / w->pieces : parts;
}

static FA_NOINLINE void amx_finish(amx_pieces *w) {
    while (w->done <= w->pieces) amx_piece(w);
    amx_run(&w->x); /* what is no block of 2 x 2 */
}

/* A panel of pairs as b. */
FA_INLINE amx_operand amx_panel(int planes, const float *panel, int ld) {
    const int64_t row = ld * (int64_t)sizeof(float), pairs = planes * row;
    const amx_operand b = {(const char *)panel, pairs, AMX_BYTES, AMX_ROWS * pairs, row};
    return b;
}

FA_INLINE amx_product amx_qk(int planes, int products, const fa_scores *x) {
    const int64_t dim = fa_round_up(x->head_dim, HALVES);
    const amx_product product = {
        .c = x->s, .ld = x->ld, .rows = x->rows,
        .a = {x->k.at + x->from * x->k.stride, x->k.stride, AMX_ROWS * x->k.stride, AMX_BYTES, dim * 2},
        .b = amx_panel(planes, x->q, x->ld),
        .count = fa_round_up(x->keys, AMX_ROWS) / AMX_ROWS, .steps = dim / HALVES, .products = products};
    return product;
}

FA_INLINE void amx_pv(int planes, int products, float *o, const float *alpha, const float *p, int ld, int rows, fa_matrix v,
                      int64_t from, int64_t keys, int64_t v_head_dim) {
    const amx_product product = {
        .c = o, .ld = ld, .rows = rows,
        .a = {v.at + from * 2, v.stride, AMX_ROWS * v.stride, AMX_BYTES, v.stride / 2},
        .b = amx_panel(planes, p, ld),
        .count = fa_sums_row(v_head_dim) / AMX_ROWS + (planes == 1), .steps = fa_round_up(keys, HALVES) / HALVES,
        .products = products, .accumulate = 1};
    for (int row = 0; row < rows; row += AMX_ROWS) {
        const simd_f factor = simd_load(alpha + row);
        if (!simd_any(simd_not(simd_eq(factor, simd_set1(1.0f))))) continue; /* the maximum stayed */
        for (int64_t d = 0; d < v_head_dim; d++)
            simd_store(o + d * ld + row, simd_mul(simd_load(o + d * ld + row), factor));
        float *sums = o + fa_sums_row(v_head_dim) * ld + row;
        if (planes == 1) simd_store(sums, simd_mul(simd_load(sums), factor));
    }
    amx_run(&product);
}

/* Whole tiles of bfloat16 keys, row after row, are read where they lie. The rows of a tile that lie apart may all want the same few
 * lines of a cache. */
FA_INLINE fa_matrix amx_keys(int planes, float *room, fa_matrix stored, int64_t keys, int64_t head_dim) {
    const int whole = keys % AMX_ROWS == 0 && head_dim % HALVES == 0;
    if (planes == 1 && stored.dtype == FASTATTN_BFLOAT16 && whole && !stored.rows && stored.stride == head_dim * 2) return stored;
    return pairs_keys(planes, AMX_ROWS, room, stored, keys, head_dim);
}

/* to[d][key] = from[key][d] for 8 numbers of 32 keys, strides in bytes. The four quarters of a vector take four runs of eight
 * keys, so that what is left crosses no quarter. */
FA_INLINE void amx_transpose(char *to, int64_t to_stride, const char *from, int64_t stride) {
    __m512i a[8], b[8];
    FA_UNROLL for (int i = 0; i < 8; i++) {
        a[i] = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(from + i * stride)));
        FA_UNROLL for (int quarter = 1; quarter < 4; quarter++)
            a[i] = _mm512_mask_broadcast_i32x4(a[i], (__mmask16)(15 << 4 * quarter),
                                               _mm_loadu_si128((const __m128i *)(from + (8 * quarter + i) * stride)));
    }
    FA_UNROLL for (int i = 0; i < 8; i += 2) {
        b[i] = _mm512_unpacklo_epi16(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi16(a[i], a[i + 1]);
    }
    FA_UNROLL for (int i = 0; i < 8; i += 4)
        FA_UNROLL for (int n = 0; n < 2; n++) {
            a[i + 2 * n] = _mm512_unpacklo_epi32(b[i + n], b[i + 2 + n]);
            a[i + 2 * n + 1] = _mm512_unpackhi_epi32(b[i + n], b[i + 2 + n]);
        }
    FA_UNROLL for (int n = 0; n < 4; n++) {
        _mm512_storeu_si512(to + 2 * n * to_stride, _mm512_unpacklo_epi64(a[n], a[n + 4]));
        _mm512_storeu_si512(to + (2 * n + 1) * to_stride, _mm512_unpackhi_epi64(a[n], a[n + 4]));
    }
}

/* Values transposed, with zeros in the place of numbers and keys that are not there, and for half a tile of keys beyond. A
 * value of 1 for every key follows where the powers are rounded coarsely: its product is their sum. */
FA_INLINE fa_matrix amx_values(int planes, float *room, fa_matrix stored, int64_t keys, int64_t v_head_dim) {
    const int64_t row_bytes = (fa_round_up(keys, HALVES) + HALVES) * 2, size = fa_size_of(stored.dtype);
    const fa_matrix turned = fa_matrix_at((const char *)room, planes * row_bytes, FASTATTN_BFLOAT16);
    for (int64_t d = 0; d < fa_round_up(v_head_dim, AMX_ROWS); d += HALVES) {
        const int64_t columns = fa_round_up(v_head_dim, AMX_ROWS) - d < HALVES ? AMX_ROWS : HALVES;
        char *to = (char *)room + d * turned.stride;
        for (int64_t j = 0; j < keys; j += HALVES) {
            const int whole = keys - j >= HALVES && v_head_dim - d >= columns;
            if (planes == 1 && stored.dtype == FASTATTN_BFLOAT16 && whole && !stored.rows) {
                const char *from = stored.at + j * stored.stride + d * size;
                for (int64_t n = 0; n < columns; n += 8)
                    amx_transpose(to + n * turned.stride + j * 2, turned.stride, from + n * 2, stored.stride);
                continue;
            }
            __m512i square[2][HALVES];
            for (int i = 0; i < HALVES; i++) {
                __m512i halves[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
                if (j + i < keys)
                    halves_of(planes, halves, fa_row_at(stored, j + i) + d * size, v_head_dim - d, stored.dtype, 1.0f);
                for (int plane = 0; plane < planes; plane++) square[plane][i] = halves[plane];
            }
            for (int plane = 0; plane < planes; plane++)
                for (int64_t n = 0; n < columns; n += 8)
                    amx_transpose(to + n * turned.stride + plane * row_bytes + j * 2, turned.stride,
                                  (const char *)square[plane] + n * 2, AMX_BYTES);
        }
        for (int64_t n = 0; n < columns; n++)
            for (int plane = 0; plane < planes; plane++)
                _mm512_storeu_si512(to + n * turned.stride + (plane + 1) * row_bytes - AMX_BYTES, _mm512_setzero_si512());
    }
    for (int n = 0; n < AMX_ROWS && planes == 1; n++)
        for (int64_t j = 0; j < row_bytes; j += AMX_BYTES)
            _mm512_storeu_si512((char *)room + (fa_sums_row(v_head_dim) + n) * turned.stride + j,
                                _mm512_set1_epi16(n == 0 ? 0x3f80 : 0));
    return turned;
}

/* The softmax of so many planes beside a product. */
#define AMX_SOFTMAX(planes)                                                                                          \
    static FA_NOINLINE void amx_softmax_##planes(float *s, float *p, int ld, int rows, int64_t keys, float c,        \
                                                 float *m, float *l, float *alpha, amx_pieces *work) {               \
        pairs_softmax(planes, s, p, ld, rows, keys, c, m, l, alpha, amx_keep_up, work);                              \
    }

AMX_SOFTMAX(1)
AMX_SOFTMAX(2)

/* A table of products of numbers in so many planes, with so many cross products. */
#define AMX_TABLE(suffix, planes, qk_products, pv_products, block_size, score_size)                                  \
    static fa_matrix suffix##_keys(float *room, fa_matrix stored, int64_t keys, int64_t head_dim) {                  \
        return amx_keys(planes, room, stored, keys, head_dim);                                                       \
    }                                                                                                                \
    static fa_matrix suffix##_values(float *room, fa_matrix stored, int64_t keys, int64_t v_head_dim) {              \
        return amx_values(planes, room, stored, keys, v_head_dim);                                                   \
    }                                                                                                                \
    static void suffix##_qk(float *s, const float *q, int ld, int rows, fa_matrix k, int64_t from, int64_t keys,     \
                            int64_t head_dim) {                                                                      \
        const fa_scores x = {s, q, ld, rows, k, from, keys, head_dim};                                               \
        const amx_product product = amx_qk(planes, qk_products, &x);                                                 \
        amx_run(&product);                                                                                           \
    }                                                                                                                \
    static void suffix##_softmax_beside(float *s, float *p, int ld, int rows, int64_t keys, float c, float *m,       \
                                        float *l, float *alpha, const fa_scores *next) {                             \
        amx_pieces work = amx_pieces_of(amx_qk(planes, qk_products, next));                                          \
        amx_softmax_##planes(s, p, ld, rows, keys, c, m, l, alpha, &work);                                           \
        amx_finish(&work);                                                                                           \
    }                                                                                                                \
    static void suffix##_pv(float *o, const float *alpha, const float *p, int ld, int rows, fa_matrix v,             \
                            int64_t from, int64_t keys, int64_t v_head_dim) {                                        \
        amx_pv(planes, pv_products, o, alpha, p, ld, rows, v, from, keys, v_head_dim);                               \
    }                                                                                                                \
    const fa_products fastattn_products_##suffix = {                                                                 \
        .name = #suffix, .isa = FASTATTN_ISA_AMX, .fewest_rows = FEWEST_LANES,                       \
        .fewest_rows_wide = FEWEST_LANES, .panel_rows = 2 * AMX_ROWS,                                           \
        .block_keys = block_size, .score_keys = score_size, .pair_rows = planes,                                     \
        .sums = planes == 1, .in_parts = planes > 1, .enter = amx_enter, .leave = amx_leave, .pack = pairs_pack_##planes, \
        .keys = suffix##_keys, .values = suffix##_values, .qk = suffix##_qk, .softmax = pairs_softmax_##planes, \
        .softmax_beside = suffix##_softmax_beside, .pv = suffix##_pv, .power = pairs_power_##planes, \
        FA_LANES_SLOTS};

AMX_TABLE(bfloat16_amx, 1, 1, 1, 256, 64)
AMX_TABLE(bfloat16x3_amx, 2, 3, 3, 128, 64)
AMX_TABLE(float16_amx, 2, 4, 3, 128, 64) /* the scores exactly: a float16 is a sum of two bfloat16 */

#endif
