/* The products of attention by AVX512-VNNI, which multiplies pairs of 16-bit integers at twice the rate of float32: the
 * register tile of tile.h on block floating point. Included by avx512.c.
 *
 * Numbers are integers times a power of two that they share: those of a query, those of a key, the powers of a query in a block,
 * and the values of a column in a block. The integers are as long as no sum of products can overflow 32 bits, which makes the
 * sums exact:
 *
 *     scores    |sum q k| <= |q| |k| (Cauchy and Schwarz), the lengths of both below 2**15
 *     values    64 keys * powers up to 2**13 * values below 2**12 <= 2**31
 *
 * Most bfloat16, having 8 bits, become integers exactly. A number far smaller than its neighbours loses bits, but then it adds
 * little to a sum of products; where it could be all of one, `fits` says so.
 *
 * The powers of two, the units, come first: in the first row of the panels and of the values, and as the first number of every
 * key. After the last key stands the largest of theirs. */
#ifdef FA_HOLDS_AVX512_VNNI

enum { MOST_LENGTH = 32767, POWER_BITS = 13, MOST_VALUE = 4095, FIXED_KEYS = 64 };

/* A power of two above x, twice x at most, for x >= 0; infinity for what is not finite. */
FA_INLINE __m512i units_above(simd_f x) {
    const __m512i exponent = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7f800000));
    return _mm512_min_epi32(_mm512_add_epi32(exponent, _mm512_set1_epi32(0x800000)), _mm512_set1_epi32(0x7f800000));
}

/* The units of SIMD_LANES queries or keys: any small one for zeros, and infinity where there is none, for NaN, infinities, and
 * numbers whose squares leave float32. */
FA_INLINE simd_f row_units(const char *const *rows, int64_t n, fastattn_dtype dtype) {
    simd_f squares[SIMD_LANES];
    for (int r = 0; r < SIMD_LANES; r++) {
        squares[r] = simd_set1(0.0f);
        for (int64_t d = 0; d < n; d += SIMD_LANES) {
            const simd_f x = load_as(rows[r] + d * fa_size_of(dtype), n - d, dtype);
            squares[r] = simd_fma(x, x, squares[r]);
        }
    }
    const simd_f square = simd_sum_lanes(squares);
    simd_f units = _mm512_castsi512_ps(units_above(simd_mul(_mm512_sqrt_ps(square), simd_set1(1.0f / MOST_LENGTH))));
    const unsigned odd = _mm512_cmp_ps_mask(square, simd_set1(0x1p-80f), _CMP_NGT_UQ) |
                         _mm512_cmp_ps_mask(square, simd_set1(0x1p80f), _CMP_NLT_UQ);
    for (int r = 0; r < SIMD_LANES && odd >> r; r++) {
        if (!(odd >> r & 1)) continue;
        __m512i bits = _mm512_setzero_si512();
        for (int64_t d = 0; d < n; d += SIMD_LANES)
            bits = _mm512_or_si512(bits, _mm512_castps_si512(simd_abs(load_as(rows[r] + d * fa_size_of(dtype), n - d, dtype))));
        units = simd_select((simd_m)(1 << r), simd_set1(_mm512_test_epi32_mask(bits, bits) ? INFINITY : 0x1p-100f), units);
    }
    return units;
}

/* 32 numbers, of which n are there and the others 0, times factor, as integers in their order. */
FA_INLINE void words_of(int planes, __m512i to[2], const char *at, int64_t n, fastattn_dtype dtype, float factor) {
    __m512i half[2];
    (void)planes;
    for (int i = 0; i < 2; i++) {
        const int64_t d = i * SIMD_LANES, left = n - d < 0 ? 0 : n - d;
        const simd_f x = load_as(at + (left ? d * fa_size_of(dtype) : 0), left, dtype);
        half[i] = _mm512_cvtps_epi32(simd_mul(x, simd_set1(factor)));
    }
    to[0] = _mm512_permutexvar_epi64(_mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0), _mm512_packs_epi32(half[0], half[1]));
}

FA_INLINE void fixed_pack_of(float *q, int ld, const void *const *rows_of, int rows, int64_t head_dim, float sign,
                             fastattn_dtype dtype) {
    float factors[FA_PANEL_ROWS];
    for (int row = 0; row < rows; row += SIMD_LANES) {
        const simd_f units = row_units((const char *const *)(rows_of + row), head_dim, dtype);
        simd_store(q + row, units);
        simd_store(factors + row, simd_div(simd_set1(sign), units));
    }
    pairs_pack(1, words_of, q + ld, ld, rows_of, rows, head_dim, dtype, factors);
}

static int64_t key_pitch(int64_t head_dim) { return 1 + fa_round_up(head_dim, HALVES) / 2; }

FA_INLINE void fixed_keys_of(float *room, fa_matrix from, int64_t keys, int64_t head_dim, fastattn_dtype dtype) {
    simd_f largest = simd_set1(0.0f);
    for (int64_t first = 0; first < keys; first += SIMD_LANES) {
        const char *rows[SIMD_LANES];
        float units[SIMD_LANES], factors[SIMD_LANES];
        for (int r = 0; r < SIMD_LANES; r++) rows[r] = fa_row_at(from, first + r < keys ? first + r : keys - 1);
        const simd_f found = row_units(rows, head_dim, dtype);
        largest = simd_max(largest, found);
        simd_store(units, found);
        simd_store(factors, simd_div(simd_set1(1.0f), found));
        for (int r = 0; r < SIMD_LANES && first + r < keys; r++) {
            float *to = room + (first + r) * key_pitch(head_dim);
            to[0] = units[r];
            for (int64_t d = 0; d < head_dim; d += HALVES) {
                __m512i words[2];
                words_of(1, words, rows[r] + d * fa_size_of(dtype), head_dim - d, dtype, factors[r]);
                _mm512_storeu_si512(to + 1 + d / 2, words[0]);
            }
        }
    }
    room[keys * key_pitch(head_dim)] = _mm512_reduce_max_ps(largest);
}

/* Values of two keys side by side; and the largest value of each key, as bits: an order in which NaN is above infinity. */
FA_INLINE void fixed_values_of(float *room, uint32_t *largest_of, fa_matrix from, int64_t keys, int64_t v_head_dim,
                               fastattn_dtype dtype) {
    const int64_t dim = fa_sums_row(v_head_dim);
    __m512i most[FIXED_KEYS];
    for (int64_t j = 0; j < keys; j++) most[j] = _mm512_setzero_si512();
    for (int64_t d = 0; d < dim; d += SIMD_LANES) {
        const int64_t at = d * fa_size_of(dtype);
        __m512i largest = _mm512_setzero_si512();
        for (int64_t j = 0; j < keys; j++) {
            const __m512i x = _mm512_castps_si512(simd_abs(load_as(fa_row_at(from, j) + at, v_head_dim - d, dtype)));
            largest = _mm512_max_epu32(largest, x);
            most[j] = _mm512_max_epu32(most[j], x);
        }
        const simd_f unit = _mm512_castsi512_ps(
            units_above(simd_mul(_mm512_castsi512_ps(largest), simd_set1(1.0f / MOST_VALUE))));
        const simd_f factor = simd_div(simd_set1(1.0f), unit);
        simd_store(room + d, unit);
        for (int64_t j = 0; j < keys; j += 2) {
            __m512i pair[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
            for (int odd = 0; odd < 2 && j + odd < keys; odd++)
                pair[odd] = _mm512_cvtps_epi32(simd_mul(load_as(fa_row_at(from, j + odd) + at, v_head_dim - d, dtype), factor));
            _mm512_storeu_si512(room + (1 + j / 2) * dim + d,
                                _mm512_mask_blend_epi16(0xaaaaaaaa, pair[0], _mm512_slli_epi32(pair[1], 16)));
        }
    }
    for (int64_t j = 0; j < keys; j++) largest_of[j] = _mm512_reduce_max_epu32(most[j]);
}

static void fixed_pack(float *q, int ld, const void *const *rows_of, int rows, int64_t head_dim, fastattn_dtype dtype,
                       float sign) {
    FA_BY_STORAGE(dtype, fixed_pack_of, q, ld, rows_of, rows, head_dim, sign)
}

static fa_matrix fixed_keys(float *room, fa_matrix stored, int64_t keys, int64_t head_dim) {
    FA_BY_STORAGE(stored.dtype, fixed_keys_of, room, stored, keys, head_dim)
    const fa_matrix made = fa_matrix_at((const char *)room, key_pitch(head_dim) * (int64_t)sizeof(float), stored.dtype);
    return made;
}

/* When one key's largest value is not within the factor SPREAD of another's, a row that sees but the smaller ones would see too
 * little of them, and of tiny values the products with a power may underflow: no unit is right then, and nothing is returned.
 * (Keys whose values are all 0 are no matter.) */
static fa_matrix fixed_values(float *room, fa_matrix stored, int64_t keys, int64_t v_head_dim) {
    enum { SPREAD = 8 };
    uint32_t largest_of[FIXED_KEYS], most = 0, least = 0x7f800000;
    FA_BY_STORAGE(stored.dtype, fixed_values_of, room, largest_of, stored, keys, v_head_dim)
    for (int64_t j = 0; j < keys; j++) {
        most = largest_of[j] > most ? largest_of[j] : most;
        least = largest_of[j] > 0 && largest_of[j] < least ? largest_of[j] : least;
    }
    float bounds[2];
    memcpy(&bounds[0], &least, sizeof least);
    memcpy(&bounds[1], &most, sizeof most);
    const int right = most == 0 || (bounds[1] > 0x1p-60f && bounds[1] < INFINITY && bounds[1] <= SPREAD * bounds[0]);
    const fa_matrix made = fa_matrix_at(right ? (const char *)room : NULL, fa_sums_row(v_head_dim) * (int64_t)sizeof(float), stored.dtype);
    return made;
}

/* What the rounding to integers adds to a score is up to half a unit in every number of the query, times the key, and the other
 * way round: at random, 2**14 times the product of the units. With the scale that may be 2**-9, what rounding the power to
 * bfloat16 would add. */
static int fixed_fits(const float *q, int ld, fa_matrix k, int64_t keys, fa_matrix v, float scale) {
    simd_f largest = simd_load(q);
    for (int row = SIMD_LANES; row < ld; row += SIMD_LANES) largest = simd_max(largest, simd_load(q + row));
    const float of_keys = *(const float *)(const void *)(k.at + keys * k.stride);
    return v.at && fabsf(scale) * (_mm512_reduce_max_ps(largest) * of_keys) <= 0x1p-23f;
}

static void fixed_qk(float *s, const float *q, int ld, int rows, fa_matrix k, int64_t from, int64_t keys, int64_t head_dim) {
    const float *row = (const float *)(const void *)(k.at + from * k.stride);
    const int64_t steps = (head_dim + 1) / 2;
    const tile_operands x = {.c = s, .a = row + 1, .across = k.stride / (int64_t)sizeof(float), .along = 1,
                             TILE_PANEL(q + ld, ld), .c_ld = ld, .steps = steps, .run = steps > 0 ? steps : 1, .units = row, .lane_units = q};
    tile_product(TILE_INT16, rows, keys, x);
}

/* Powers are taken relative to the largest of this block, so that they fill the integers; their unit is what it makes of them. */
FA_INLINE void fixed_softmax_strip(int vectors, const float *s, float *p, ptrdiff_t ld, int64_t keys, float c, float *m,
                                   float *l, float *alpha) {
    const simd_f scale = simd_set1(c), lowest = simd_set1(-INFINITY), zero = simd_set1(0.0f);
    const simd_f bits = simd_set1((float)POWER_BITS);
    simd_f top[4], base[4], sum[4];
    FA_UNROLL for (int v = 0; v < vectors; v++) top[v] = lowest, sum[v] = zero;
    for (int64_t j = 0; j < keys; j++)
        FA_UNROLL for (int v = 0; v < vectors; v++) top[v] = simd_max(top[v], simd_load(s + j * ld + v * SIMD_LANES));
    FA_UNROLL for (int v = 0; v < vectors; v++) base[v] = simd_select(simd_eq(top[v], lowest), zero, top[v]);
    for (int64_t j = 0; j < keys; j += 2)
        FA_UNROLL for (int v = 0; v < vectors; v++) {
            const float *from = s + j * ld + v * SIMD_LANES;
            const simd_f even = quick_exp2(simd_fma(simd_sub(simd_load(from), base[v]), scale, bits));
            const simd_f odd =
                j + 1 < keys ? quick_exp2(simd_fma(simd_sub(simd_load(from + ld), base[v]), scale, bits)) : zero;
            sum[v] = simd_add(sum[v], simd_add(even, odd));
            _mm512_storeu_si512(p + (1 + j / 2) * ld + v * SIMD_LANES,
                                _mm512_or_si512(_mm512_cvtps_epi32(even), _mm512_slli_epi32(_mm512_cvtps_epi32(odd), 16)));
        }
    FA_UNROLL for (int v = 0; v < vectors; v++) {
        const simd_f old = simd_load(m + v * SIMD_LANES), highest = simd_max(old, top[v]);
        const simd_f reference = simd_select(simd_eq(highest, lowest), zero, highest);
        const simd_f fade = exp2_of(simd_sub(old, reference), scale);
        const simd_f unit = simd_mul(simd_set1(1.0f / (1 << POWER_BITS)),
                                     simd_select(simd_eq(top[v], lowest), zero, exp2_of(simd_sub(top[v], highest), scale)));
        float *at = l + v * SIMD_LANES;
        simd_store(m + v * SIMD_LANES, highest);
        simd_store(alpha + v * SIMD_LANES, fade);
        simd_store(p + v * SIMD_LANES, unit);
        simd_store(at, simd_fma(simd_load(at), fade, simd_mul(sum[v], unit)));
    }
}

static void fixed_softmax(float *s, float *p, int ld, int rows, int64_t keys, float c, float *m, float *l, float *alpha) {
    const unsigned found = subnormals_are_zero();
    int row = 0;
    for (; row + 64 <= rows; row += 64)
        fixed_softmax_strip(4, s + row, p + row, ld, keys, c, m + row, l + row, alpha + row);
    for (; row < rows; row += SIMD_LANES)
        fixed_softmax_strip(1, s + row, p + row, ld, keys, c, m + row, l + row, alpha + row);
    _mm_setcsr(found);
}

static void fixed_pv(float *o, const float *alpha, const float *p, int ld, int rows, fa_matrix v, int64_t from, int64_t keys,
                     int64_t v_head_dim) {
    const unsigned found = subnormals_are_zero();
    const int64_t steps = (keys + 1) / 2;
    const float *units = (const float *)(const void *)v.at;
    const float *pairs = (const float *)(const void *)(v.at + (1 + from / 2) * v.stride);
    const tile_operands x = {.c = o, .alpha = alpha, .a = pairs, .across = 1, .along = v.stride / (int64_t)sizeof(float),
                             TILE_PANEL(p + ld, ld), .c_ld = ld, .steps = steps, .run = steps > 0 ? steps : 1, .units = units,
                             .lane_units = p};
    tile_product(TILE_INT16, rows, v_head_dim, x);
    _mm_setcsr(found);
}

static float fixed_power(const float *p, int ld, int row, int64_t key) {
    int16_t pair[2];
    memcpy(pair, p + (1 + key / 2) * ld + row, sizeof pair);
    return (float)pair[key % 2] * p[row];
}

const fa_products fastattn_products_int16_avx512 = {
    .name = "int16_avx512", .isa = FASTATTN_ISA_AVX512, .fewest_rows = SIMD_LANES + 1,
    .fewest_rows_wide = SIMD_LANES + 1, .panel_rows = FA_PANEL_ROWS,
    .block_keys = FIXED_KEYS, .score_keys = FIXED_KEYS, .pair_rows = 1,
    .pack = fixed_pack, .keys = fixed_keys, .values = fixed_values, .fits = fixed_fits,
    .qk = fixed_qk, .softmax = fixed_softmax, .pv = fixed_pv, .power = fixed_power, FA_LANES_SLOTS};

#endif
