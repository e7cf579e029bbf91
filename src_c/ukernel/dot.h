/* The products of attention by AVX512-BF16, which multiplies pairs: the register tile of tile.h, an element being a pair of
 * head_dim or of keys. Included by avx512.c. */
#ifdef FA_HOLDS_AVX512_BF16

enum {
    DOT_KEYS = 64,    /* of a block */
    MOST_TURNED = 11, /* rows for which keys are lanes; with more, lanes of rows are full enough */
    FEWEST_ALONE = 8, /* rows of a panel that is alone */
    MOST_ALONE = 32,
    MOST_FEW = 12 /* of these, for which no keys turn */
};

/* Keys whose pairs are aligned are read where they lie. */
static fa_matrix dot_keys(float *room, fa_matrix stored, int64_t keys, int64_t head_dim) {
    const int64_t misaligned = ((int64_t)(uintptr_t)stored.at | stored.stride) & 3;
    if (stored.dtype == FASTATTN_BFLOAT16 && head_dim % 2 == 0 && !misaligned && !stored.rows) return stored;
    return pairs_keys(1, 1, room, stored, keys, head_dim);
}

/* Where few rows read each key once, no copy pays: as many as share a pointer are read where they lie, too, if they fill a tile. */
static fa_matrix dot_alone_keys(float *room, fa_matrix stored, int64_t keys, int64_t head_dim) {
    enum { FEWEST_TOGETHER = 8 };
    const int64_t together = (int64_t)1 << stored.shift;
    uintptr_t places = (uintptr_t)stored.stride;
    if (!stored.rows || together < FEWEST_TOGETHER) return dot_keys(room, stored, keys, head_dim);
    for (int64_t j = 0; j < keys; j += together) places |= (uintptr_t)fa_row_at(stored, j);
    return stored.dtype == FASTATTN_BFLOAT16 && head_dim % 2 == 0 && (places & 3) == 0 ? stored : dot_keys(room, stored, keys, head_dim);
}

/* The product of pairs that lie side by side across. */
static FA_NOINLINE void dot_across(int rows, int64_t count, const tile_operands *operands) {
    tile_operands x = *operands;
    x.across = 1, x.ahead = 0;
    tile_product(TILE_BFLOAT16, rows, count, x);
}

static void dot_qk(float *s, const float *q, int ld, int rows, fa_matrix k, int64_t from, int64_t keys, int64_t head_dim) {
    const int64_t together = k.rows ? (int64_t)1 << k.shift : keys;
    k = fa_rows_from(k, from);
    for (int64_t j = 0; j < keys; j += together) {
        const char *row = fa_row_at(k, j);
        const tile_operands x = {.c = s + j * ld, .a = (const float *)(const void *)row, .across = k.stride / (int64_t)sizeof(float),
                                 .along = 1, TILE_PANEL(q, ld), .c_ld = ld, .steps = (head_dim + 1) / 2,
                                 .run = (tile_run(head_dim) + 1) / 2, .ahead = (int64_t)(fa_row_ahead(k, j) - (uintptr_t)row)};
        tile_product(TILE_BFLOAT16, rows, keys - j < together ? keys - j : together, x);
    }
}

/* Of a panel that is alone, whose rows need not fill the last vector up. */
static void dot_rows_qk(float *s, const float *q, int ld, int rows, fa_matrix k, int64_t from, int64_t keys, int64_t head_dim) {
    dot_qk(s, q, ld, (int)fa_round_up(rows, FA_ROW_STEP), k, from, keys, head_dim);
}

/* Values of two keys side by side, 0 where there is none, and then the 1 whose product is the sum of the powers. */
static fa_matrix dot_values(float *room, fa_matrix stored, int64_t keys, int64_t v_head_dim) {
    const int64_t sums = fa_sums_row(v_head_dim), size = fa_size_of(stored.dtype);
    const fa_matrix made = fa_matrix_at((const char *)room, (sums + SIMD_LANES) * (int64_t)sizeof(float), FASTATTN_BFLOAT16);
    for (int64_t j = 0; j < keys; j += 2) {
        float *to = room + j / 2 * (sums + SIMD_LANES);
        for (int64_t d = 0; d < sums; d += HALVES) {
            __m512i even[2], odd[2] = {_mm512_setzero_si512()};
            halves_of(1, even, fa_row_at(stored, j) + d * size, v_head_dim - d, stored.dtype, 1.0f);
            if (j + 1 < keys) halves_of(1, odd, fa_row_at(stored, j + 1) + d * size, v_head_dim - d, stored.dtype, 1.0f);
            simd_f first = _mm512_castsi512_ps(even[0]), last = _mm512_castsi512_ps(odd[0]);
            simd_zip_halves(&first, &last);
            simd_store(to + d, first);
            if (d + SIMD_LANES < sums) simd_store(to + d + SIMD_LANES, last);
        }
        _mm512_storeu_si512(to + sums, _mm512_set1_epi32(0x3f803f80));
    }
    return made;
}

static void dot_pv(float *o, const float *alpha, const float *p, int ld, int rows, fa_matrix v, int64_t from, int64_t keys,
                   int64_t v_head_dim) {
    const float *pairs = (const float *)(const void *)(v.at + from / 2 * v.stride);
    const int64_t steps = (keys + 1) / 2;
    const tile_operands x = {.c = o, .alpha = alpha, .a = pairs, .across = 1, .along = v.stride / (int64_t)sizeof(float),
                             TILE_PANEL(p, ld), .c_ld = ld, .steps = steps, .run = steps > 0 ? steps : 1};
    dot_across(rows, fa_sums_row(v_head_dim) + 1, &x);
}

/* Where a panel is alone, bfloat16 values of two keys need not be put side by side for others: rows and numbers change sides in the
 * second product, pairs are made as values are read, front to back, and no row is multiplied that is not there. A row gets the bits
 * that it has among many. */

/* 32 numbers of all rows. */
static void dot_strip(int rows, tile_operands x) {
    const tile_kind kind = {TILE_BFLOAT16, 1, 0, 1, 0};
    tile_strip(kind, 2, rows, x);
}

static void dot_sums(float *sums, int64_t pitch, const float *alpha, const float *p, int ld, int rows, int64_t keys) {
    const simd_f ones = _mm512_castsi512_ps(_mm512_set1_epi32(0x3f803f80));
    for (int row = 0; row < rows; row += SIMD_LANES) {
        float of_lane[SIMD_LANES];
        simd_f sum = simd_set1(0.0f);
        for (int64_t j = 0; j < keys; j += 2) sum = simd_dot_bf16(ones, simd_load(p + j / 2 * ld + row), sum);
        simd_store(of_lane, sum);
        for (int r = row; r < rows && r < row + SIMD_LANES; r++) sums[r * pitch] = fmaf(sums[r * pitch], alpha[r], of_lane[r - row]);
    }
}

/* Rows of o that end with the sum of their powers. */
static int64_t dot_pitch(int64_t v_head_dim) { return fa_round_up(v_head_dim, FA_TILE) + FA_ROW_STEP; }

/* Pair j of row r's powers is p[r * across + j * along]. Rows that end within a vector, and those of which the last has no partner, are
 * copied to where there are zeros beyond them. */
static FA_NOINLINE void dot_add_values(float *o, const float *alpha, const float *p, int64_t across, int64_t along, int rows, fa_matrix v,
                                       int64_t keys, int64_t v_head_dim) {
    for (int64_t d = 0; d < v_head_dim; d += HALVES) {
        const char *first_row;
        tile_operands x = {.c = o + d, .c_ld = dot_pitch(v_head_dim), .alpha = alpha, .a = p, .across = across, .along = along,
                           .rows = tile_rows_of(v, &first_row), .steps = (keys + 1) / 2, .run = DOT_KEYS, .ahead = keys};
        __m512i copy[DOT_KEYS];
        x.rows.column += d * 2;
        x.ends = v_head_dim - d <= HALVES;
        if (v_head_dim - d < HALVES || keys % 2 != 0) {
            for (int64_t j = 0; j < keys + keys % 2; j++) {
                __m512i halves[2] = {_mm512_setzero_si512()};
                if (j < keys) halves_of(1, halves, fa_row_at(v, j) + d * 2, v_head_dim - d, FASTATTN_BFLOAT16, 1.0f);
                copy[j] = halves[0];
            }
            x.rows = tile_rows_of(fa_matrix_at((const char *)copy, sizeof *copy, FASTATTN_BFLOAT16), &first_row);
            x.ahead = 0;
        }
        dot_strip(rows, x);
    }
}

static void dot_rows_pv(float *o, const float *alpha, const float *p, int ld, int rows, fa_matrix v, int64_t from, int64_t keys,
                        int64_t v_head_dim) {
    dot_sums(o + fa_round_up(v_head_dim, FA_TILE), dot_pitch(v_head_dim), alpha, p, ld, rows, keys);
    dot_add_values(o, alpha, p, 1, ld, rows, fa_rows_from(v, from), keys, v_head_dim);
}

static int dot_rows_unpack(void *const *outputs, int count, const float *o, int ld, const float *factor, int64_t v_head_dim,
                           fastattn_dtype dtype) {
    (void)ld;
    return unpack_rows(outputs, count, o, dot_pitch(v_head_dim), factor, v_head_dim, dtype);
}

/* The fewest of these rows: lanes are pairs of a key's numbers, whose products are summed across lanes for a few keys and rows at a time, and
 * no key turns. Sums are formed in another order than among many rows. */

static void dot_few_pack(float *q, int ld, const void *const *rows_of, int rows, int64_t head_dim, fastattn_dtype dtype, float sign) {
    const int64_t pitch = fa_round_up(head_dim, FA_ROW_STEP);
    (void)ld;
    for (int row = 0; row < rows; row++)
        for (int64_t d = 0; d < head_dim; d += HALVES) {
            __m512i halves[2];
            halves_of(1, halves, (const char *)rows_of[row] + d * fa_size_of(dtype), head_dim - d, dtype, sign);
            _mm512_storeu_si512(q + row * pitch + d / 2, halves[0]);
        }
}

enum { FEW_WIDTH = 8, FEW_KEYS = 4 }; /* rows of a tile, at most, and keys that all rows meet before the next ones come */

typedef struct dot_few_keys {
    const char *key[FEW_KEYS];
    uintptr_t later[FEW_KEYS];
} dot_few_keys;

/* Keys from j on, the last of which stands for those that are not there; memory is asked for the lines that the later ones end in. Where keys
 * are `apart`, a constant, pointers that each lead to one key are followed here: a call would put all places into memory. */
FA_INLINE dot_few_keys dot_few_places(const tile_rows *rows, int apart, int64_t j, int64_t keys, int asks, int64_t head_dim) {
    dot_few_keys x;
    if (apart && j + FEW_KEYS <= keys) {
        FA_UNROLL for (int i = 0; i < FEW_KEYS; i++) x.key[i] = tile_row(rows, j + i), x.later[i] = tile_later(rows, j + i);
    } else
        tile_places(rows, j, keys, FEW_KEYS, x.key, x.later);
    FA_UNROLL for (int i = 0; i < FEW_KEYS; i++)
        if (asks) simd_fetch((const char *)(x.later[i] + (uintptr_t)(head_dim * 2 - 1))); /* rows need not begin with a line */
    return x;
}

/* sum[key * of_key + row * of_row] of the pairs of 32 numbers, or fewer, from d on, for `keys` keys from the first and `width` rows. */
FA_INLINE void dot_few_step(int width, int keys, int of_key, int of_row, int asks, simd_f *sum, const float *q, int64_t pitch,
                            const dot_few_keys *k, int first, int64_t d, __mmask32 there) {
    FA_UNROLL for (int i = 0; i < keys; i++) {
        const char *const at = k->key[first + i] + d * 2;
        const __m512i bits = there == 0xffffffffu ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi16(there, at);
        const simd_f pairs = _mm512_castsi512_ps(bits);
        if (asks) simd_fetch((const char *)(k->later[first + i] + (uintptr_t)(d * 2)));
        FA_UNROLL for (int r = 0; r < width; r++)
            sum[i * of_key + r * of_row] = simd_dot_bf16(pairs, simd_load(q + r * pitch + d / 2), sum[i * of_key + r * of_row]);
    }
}

/* All numbers of these keys and rows. */
FA_INLINE void dot_few_steps(int width, int keys, int of_key, int of_row, int asks, simd_f *sum, const float *q, int64_t pitch,
                             const dot_few_keys *k, int first, int64_t head_dim) {
    enum { OF_A_KEY = 4 * HALVES }; /* numbers of one key that come before those of the next, if one row alone reads them: so they lie in memory */
    int64_t d = 0;
    for (; width == 1 && d + OF_A_KEY <= head_dim; d += OF_A_KEY)
        FA_UNROLL for (int i = 0; i < keys; i++)
            FA_UNROLL for (int n = 0; n < OF_A_KEY; n += HALVES)
                dot_few_step(1, 1, of_key, of_row, asks, sum + i * of_key, q, pitch, k, first + i, d + n, 0xffffffffu);
    for (; d + HALVES <= head_dim; d += HALVES)
        dot_few_step(width, keys, of_key, of_row, asks, sum, q, pitch, k, first, d, 0xffffffffu);
    if (d < head_dim) dot_few_step(width, keys, of_key, of_row, asks, sum, q, pitch, k, first, d, (1u << (head_dim - d)) - 1u);
}

/* The scores of `width` rows, a constant as `first` and `asks` are, with as many keys as fill a vector. */
FA_INLINE simd_f dot_few_tile(int width, int asks, const float *q, int64_t pitch, const dot_few_keys *k, int first, int64_t head_dim) {
    simd_f sum[SIMD_LANES];
    FA_UNROLL for (int i = 0; i < SIMD_LANES; i++) sum[i] = simd_set1(0.0f);
    dot_few_steps(width, SIMD_LANES / width, width, 1, asks, sum, q, pitch, k, first, head_dim);
    return simd_sum_lanes(sum);
}

/* Stores them: of a vector of rows all lanes, or the last 8. Those beyond the rows take the last one's. */
FA_INLINE void dot_few_scores(int width, int whole, float *to, int ld, const float *q, int64_t pitch, int rows, const dot_few_keys *k,
                              int64_t head_dim) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i row = _mm512_min_epi32(lanes, _mm512_set1_epi32((rows < width ? rows : width) - 1));
    const int tile_keys = SIMD_LANES / width;
    FA_UNROLL for (int first = 0; first < FEW_KEYS; first += tile_keys) {
        const simd_f sums = dot_few_tile(width, whole, q, pitch, k, first, head_dim);
        FA_UNROLL for (int i = 0; i < tile_keys; i++, to += ld) {
            const simd_f scores = _mm512_permutexvar_ps(_mm512_add_epi32(row, _mm512_set1_epi32(i * width)), sums);
            if (whole) simd_store(to, scores);
            else _mm256_storeu_ps(to, _mm512_castps512_ps256(scores));
        }
    }
}

static void dot_few_qk(float *s, const float *q, int ld, int rows, fa_matrix k, int64_t from, int64_t keys, int64_t head_dim) {
    const int64_t pitch = fa_round_up(head_dim, FA_ROW_STEP);
    const char *first_row;
    const tile_rows places = tile_rows_of(fa_rows_from(k, from), &first_row);
    for (int64_t j = 0; j < keys; j += FEW_KEYS) {
        const dot_few_keys x = dot_few_places(&places, 0, j, keys, 1, head_dim);
        for (int row = 0; row < rows; row += SIMD_LANES) {
            float *const to = s + j * ld + row;
            const float *const of = q + row * pitch, *const last = of + FEW_WIDTH * pitch;
            const int left = rows - row - FEW_WIDTH;
            dot_few_scores(FEW_WIDTH, 1, to, ld, of, pitch, rows - row, &x, head_dim);
            if (left > FEW_WIDTH / 2) dot_few_scores(FEW_WIDTH, 0, to + FEW_WIDTH, ld, last, pitch, left, &x, head_dim);
            else if (left > 0) dot_few_scores(FEW_WIDTH / 2, 0, to + FEW_WIDTH, ld, last, pitch, left, &x, head_dim);
        }
    }
}

/* Fewer still: panels lie by rows, as those of the float32 products for so few, whose second product this is, too. */

enum { ROWS_WIDTH = 4 }; /* rows of a tile, at most */

/* Those of `width` rows, a constant, and SIMD_LANES keys from j on: few keys at a time, that they are read nearly in the order of memory. */
FA_INLINE void dot_by_rows_scores(int width, int apart, int asks, float *s, int ld, const float *q, const tile_rows *places, int64_t j,
                                  int64_t keys, int64_t head_dim) {
    const int tile_keys = width > 2 ? SIMD_LANES / ROWS_WIDTH : SIMD_LANES / width;
    const int64_t pitch = fa_round_up(head_dim, FA_ROW_STEP), end = j + SIMD_LANES < keys ? j + SIMD_LANES : keys;
    for (; j < end; j += tile_keys) {
        simd_f sum[SIMD_LANES];
        FA_UNROLL for (int i = 0; i < SIMD_LANES; i++) sum[i] = simd_set1(0.0f);
        FA_UNROLL for (int i = 0; i < tile_keys; i += FEW_KEYS) {
            const dot_few_keys x = dot_few_places(places, apart, j + i, keys, asks, head_dim);
            dot_few_steps(width, FEW_KEYS, 1, tile_keys, asks, sum + i, q, pitch, &x, 0, head_dim);
        }
        const simd_f sums = simd_sum_lanes(sum);
        if (width == 1) simd_store(s + j, sums);
        else if (width == 2) {
            _mm256_storeu_si256((__m256i *)(void *)(s + j), simd_first_halves(sums));
            _mm256_storeu_si256((__m256i *)(void *)(s + j + ld), simd_last_halves(sums));
        } else {
            const __m128 of_row[ROWS_WIDTH] = {_mm512_castps512_ps128(sums), _mm512_extractf32x4_ps(sums, 1),
                                               _mm512_extractf32x4_ps(sums, 2), _mm512_extractf32x4_ps(sums, 3)};
            FA_UNROLL for (int r = 0; r < width; r++) _mm_storeu_ps(s + j + r * ld, of_row[r]);
        }
    }
}

/* Those of the rows of a tile, of as many as are left. */
FA_INLINE void dot_by_rows_tile(int left, int apart, int asks, float *s, int ld, const float *q, const tile_rows *places, int64_t j,
                                int64_t keys, int64_t head_dim) {
    switch (left) {
    case 1: dot_by_rows_scores(1, apart, asks, s, ld, q, places, j, keys, head_dim); break;
    case 2: dot_by_rows_scores(2, apart, asks, s, ld, q, places, j, keys, head_dim); break;
    case 3: dot_by_rows_scores(3, apart, asks, s, ld, q, places, j, keys, head_dim); break;
    default: dot_by_rows_scores(ROWS_WIDTH, apart, asks, s, ld, q, places, j, keys, head_dim); break;
    }
}

/* The scores of rows that have keys of their own, beside each other: whole keys one after the other, for so they lie in memory. */
static void dot_beside_qk(float *s, const float *q, int ld, int rows, fa_matrix k, int64_t keys, int64_t head_dim) {
    const int64_t pitch = fa_round_up(head_dim, FA_ROW_STEP);
    const char *first_row;
    const tile_rows places = tile_rows_of(k, &first_row);
    simd_f sum[SIMD_LANES] = {simd_set1(0.0f)};
    for (int64_t j = 0; j < keys; j += FEW_KEYS) {
        float sums[SIMD_LANES];
        dot_few_keys x = dot_few_places(&places, 0, j, keys, 0, head_dim);
        for (int i = 0; i < FEW_KEYS; i++)
            for (int r = 0; r < rows; r++, x.key[i] += k.beside, x.later[i] += (uintptr_t)k.beside) {
                simd_fetch((const char *)(x.later[i] + (uintptr_t)(head_dim * 2 - 1)));
                sum[r * FEW_KEYS + i] = simd_set1(0.0f);
                dot_few_steps(1, 1, 1, 1, 1, sum + r * FEW_KEYS + i, q + r * pitch, pitch, &x, i, head_dim);
            }
        simd_store(sums, simd_sum_lanes(sum));
        for (int r = 0; r < rows; r++) memcpy(s + r * ld + j, sums + r * FEW_KEYS, FEW_KEYS * sizeof(float));
    }
}

static void dot_by_rows_qk(float *s, const float *q, int ld, int rows, fa_matrix k, int64_t from, int64_t keys, int64_t head_dim) {
    const int64_t pitch = fa_round_up(head_dim, FA_ROW_STEP);
    const char *first_row;
    const tile_rows places = tile_rows_of(fa_rows_from(k, from), &first_row);
    if (k.beside) {
        dot_beside_qk(s, q, ld, rows, fa_rows_from(k, from), keys, head_dim);
        return;
    }
    for (int64_t j = 0; j < keys; j += SIMD_LANES)
        for (int row = 0; row < rows; row += ROWS_WIDTH) {
            float *const to = s + row * ld;
            const float *const of = q + row * pitch;
            if (row > 0) dot_by_rows_tile(rows - row, 0, 0, to, ld, of, &places, j, keys, head_dim);
            else if (places.shift > 0) dot_by_rows_tile(rows, 0, 1, to, ld, of, &places, j, keys, head_dim);
            else dot_by_rows_tile(rows, 1, 1, to, ld, of, &places, j, keys, head_dim);
        }
}

/* As few rows, each of which gets the bits that it has among many. Panels lie by rows, and lanes are keys: their pairs turn in registers,
 * where rows meet them, and powers stay lanes. */

FA_ASSERT_CONSTANT((int)MOST_TURNED <= (int)SQUARES_ROWS, rows_that_turn_have_sums);

static void dot_turned_qk(float *s, const float *q, int ld, int rows, fa_matrix k, int64_t from, int64_t keys, int64_t head_dim) {
    squares_qk(TILE_BFLOAT16, fa_rows_from(k, from), s, q, ld, rows, keys, head_dim, FASTATTN_BFLOAT16);
}

/* What pairs_softmax_strip() does for a lane. */
FA_INLINE void dot_turned_powers(int summed, float *s, float *p, int64_t keys, float c, float *m, float *l, float *alpha) {
    powers_of x = {.c = simd_set1(c)};
    float top = *m, most, sum = 0.0f, exact[DOT_KEYS];
    hide_beyond(s, keys);
    for (int stale = top == -INFINITY, looked = 0;; looked = 1) {
        __m512i largest = _mm512_setzero_si512();
        if (stale) {
            simd_f highest = simd_set1(top);
            for (int64_t j = 0; j < keys; j += SIMD_LANES) highest = simd_max(highest, simd_load(s + j));
            top = simd_largest(highest);
        }
        x.base[0] = simd_set1(top == -INFINITY ? 0.0f : top);
        x.product[0] = simd_mul(x.base[0], x.c);
        x.near[0] = simd_lt(simd_abs(x.product[0]), simd_set1(PAIRS_NEAR));
        const int near = simd_any(x.near[0]);
        for (int64_t j = 0; j < keys; j += HALVES) {
            const int both = j + SIMD_LANES < keys;
            const simd_f first = exponent_of(near, &x, 0, s + j);
            const simd_f last = both ? exponent_of(near, &x, 0, s + j + SIMD_LANES) : simd_set1(-INFINITY);
            const __m512i pairs = simd_upper_halves(coarse_exp2(first), coarse_exp2(last));
            _mm512_storeu_si512(p + j / 2, pairs);
            largest = _mm512_max_epu16(largest, pairs);
            if (summed) simd_store(exact + j, quick_exp2(first)), simd_store(exact + j + SIMD_LANES, quick_exp2(last));
        }
        const uint32_t bits = _mm512_reduce_max_epu32(_mm512_max_epu32(largest, _mm512_slli_epi32(largest, 16)));
        memcpy(&most, &bits, sizeof most);
        stale = !(most < FA_MOST_POWER);
        if (!stale || looked) break;
    }
    *alpha = first_lane(exp2_of(simd_sub(simd_set1(*m), x.base[0]), x.c));
    *m = top;
    for (int64_t j = 0; summed && j < keys; j += 2) sum += exact[j] + exact[j + 1];
    if (summed) *l = fmaf(*l, *alpha, sum);
}

static void dot_turned_softmax(float *s, float *p, int ld, int rows, int64_t keys, float c, float *m, float *l, float *alpha) {
    const unsigned found = subnormals_are_zero();
    for (int r = 0; r < rows; r++, s += ld, p += ld) {
        if (l) dot_turned_powers(1, s, p, keys, c, m + r, l + r, alpha + r);
        else dot_turned_powers(0, s, p, keys, c, m + r, NULL, alpha + r);
    }
    _mm_setcsr(found);
}

static float dot_turned_power(const float *p, int ld, int row, int64_t key) {
    uint16_t power;
    memcpy(&power, (const char *)(p + row * ld) + key * (int64_t)sizeof power, sizeof power);
    return fa_from_bf16(power);
}

static void dot_turned_pv(float *o, const float *alpha, const float *p, int ld, int rows, fa_matrix v, int64_t from, int64_t keys,
                          int64_t v_head_dim) {
    const simd_f ones = _mm512_castsi512_ps(_mm512_set1_epi32(0x3f803f80));
    float *const sums = o + fa_round_up(v_head_dim, FA_TILE);
    for (int row = 0; row < rows; row += ROWS_WIDTH) { /* chains side by side */
        simd_f sum[ROWS_WIDTH];
        FA_UNROLL for (int i = 0; i < ROWS_WIDTH; i++) sum[i] = simd_set1(0.0f);
        for (int64_t j = 0; j < keys; j += 2)
            FA_UNROLL for (int i = 0; i < ROWS_WIDTH; i++)
                sum[i] = simd_dot_bf16(ones, simd_set1(p[(row + i < rows ? row + i : row) * ld + j / 2]), sum[i]);
        FA_UNROLL for (int i = 0; i < ROWS_WIDTH; i++) {
            float *const to = sums + (row + i) * dot_pitch(v_head_dim);
            if (row + i < rows) *to = fmaf(*to, alpha[row + i], first_lane(sum[i]));
        }
    }
    dot_add_values(o, alpha, p, ld, 1, rows, fa_rows_from(v, from), keys, v_head_dim);
}

#define DOT_SLOTS .softmax = pairs_softmax_1, .power = pairs_power_1, .mask = FA_HELD(FA_HOLDS_MASK, mask), .scores = scores
#define DOT_LANES .pack = pairs_pack_1, DOT_SLOTS
#define DOT_ALONE                                                                                                                  \
    .isa = FASTATTN_ISA_AVX512, .o_by_rows = 1, .fewest_rows = FEWEST_ALONE, .fewest_rows_wide = FEWEST_ALONE,                \
    .block_keys = DOT_KEYS, .score_keys = DOT_KEYS, .pair_rows = 1, .sums = 1, .values = as_stored, .unpack = dot_rows_unpack

const fa_products fastattn_products_bfloat16_turned_avx512 = {
    .name = "bfloat16_turned_avx512", .by_rows = 1, .panel_rows = MOST_TURNED, .pack = dot_few_pack, .keys = as_stored,
    .qk = dot_turned_qk, .softmax = dot_turned_softmax, .pv = dot_turned_pv, .power = dot_turned_power, .mask = FA_HELD(FA_HOLDS_MASK, rows_mask),
    .scores = rows_scores, DOT_ALONE};

const fa_products fastattn_products_bfloat16_few_avx512 = {
    .name = "bfloat16_few_avx512", .q_by_rows = 1, .panel_rows = MOST_FEW, .pack = dot_few_pack, .keys = as_stored, .qk = dot_few_qk,
    .pv = dot_rows_pv, DOT_SLOTS, DOT_ALONE};

const fa_products fastattn_products_bfloat16_rows_avx512 = {
    .name = "bfloat16_rows_avx512", .panel_rows = MOST_ALONE, .fewer = &fastattn_products_bfloat16_few_avx512,
    .turned = &fastattn_products_bfloat16_turned_avx512, .keys = dot_alone_keys, .qk = dot_rows_qk, .pv = dot_rows_pv, DOT_LANES, DOT_ALONE};

static const fa_products dot_few = {
    .name = "bfloat16_by_rows_avx512", .most_beside = TILE_MOST_BESIDE, .pack = dot_few_pack, .qk = dot_by_rows_qk, .softmax = rows_softmax,
    FA_ROWS(FASTATTN_ISA_AVX512, DOT_KEYS, rows_pv)};

const fa_products fastattn_products_bfloat16_avx512 = {
    .name = "bfloat16_avx512", .isa = FASTATTN_ISA_AVX512, .fewest_rows = FEWEST_LANES, .fewest_rows_wide = FEWEST_LANES,
    .alone = &fastattn_products_bfloat16_rows_avx512, .few = &dot_few, .panel_rows = FA_PANEL_ROWS,
    .block_keys = DOT_KEYS, .score_keys = DOT_KEYS, .pair_rows = 1, .sums = 1, .keys = dot_keys, .values = dot_values, .qk = dot_qk,
    .pv = dot_pv, .unpack = unpack, DOT_LANES};

#undef DOT_ALONE
#undef DOT_LANES
#undef DOT_SLOTS
#endif
