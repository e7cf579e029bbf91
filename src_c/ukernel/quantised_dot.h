/* Few rows over quantised keys and values by AVX512-BF16: integers are bfloat16 exactly, and so are queries that were. Powers times scales
 * are rounded to bfloat16, as those of other products of pairs. Included by quantised_avx512.c.
 *
 * A pair of int4 keys' numbers, or of two values of one number, is a dword; bytes are unpacked within quarters of a vector, so that a quarter
 * holds numbers of one group, whose scale then is that of its lanes. A permutation of words makes the numbers: it takes the five lowest
 * bits of its index, of which the table ignores the highest. */
#ifdef SIMD_PAIRS

enum {
    DOT_KEYS = 64,      /* of a block, at most */
    DOT_NUMBERS = 128,  /* four groups, at a time */
    DOT_MOST_DIM = 1024 /* and more are left to float32 */
};

/* The numbers of int4 as bfloat16, twice. */
#define INT4_NUMBERS                                                                                                               \
    _mm512_set_epi32(0x40e040c0, 0x40a04080, 0x40404000, 0x3f800000, (int)0xbf80c000u, (int)0xc040c080u, (int)0xc0a0c0c0u, (int)0xc0e0c100u, \
                     0x40e040c0, 0x40a04080, 0x40404000, 0x3f800000, (int)0xbf80c000u, (int)0xc040c080u, (int)0xc0a0c0c0u, (int)0xc0e0c100u)

/* Numbers of int8 from d on, 16 of them, 0 where there are none. */
FA_INLINE simd_f int8_lanes(const char *row, int64_t d, int64_t dim) {
    const int64_t left = dim - d;
    const __m128i bytes = left >= 16 ? _mm_loadu_si128((const __m128i *)(const void *)(row + d))
                                     : _mm_maskz_loadu_epi8(left > 0 ? simd_first(left) : 0, row + (left > 0 ? d : 0));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}

/* The bytes of up to four groups of int4 from d on, a quarter each. */
FA_INLINE __m512i int4_bytes(const char *row, int64_t d, int64_t dim) {
    if (dim - d >= DOT_NUMBERS) return _mm512_loadu_si512(row + d / 2);
    return _mm512_maskz_loadu_epi8(((__mmask64)1 << (dim - d) / 2) - 1, row + d / 2);
}

/* Their scales, in the first quarter; 0 where there are none. */
FA_INLINE __m128 int4_scales(const char *row, int64_t d, int64_t dim) {
    const char *at = row + dim / 2 + d / 16;
    const __m128i halves = dim - d >= DOT_NUMBERS ? _mm_loadl_epi64((const __m128i *)(const void *)at)
                                                  : _mm_maskz_loadu_epi16((__mmask8)((1u << (dim - d) / FA_GROUP) - 1u), at);
    return _mm_cvtph_ps(halves);
}

/* Number g of the first quarter, four times in quarter g. */
FA_INLINE simd_f to_quarters(__m128 x) {
    const __m512i quarter = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    return _mm512_permutexvar_ps(quarter, _mm512_castps128_ps512(x));
}

/* Queries as bfloat16 in the order in which keys are unpacked: of int8 that of memory, of int4 in four vectors for four groups, of the
 * first 8, the third, the second and the last 8 of each. */
FA_INLINE void dot_queries(uint16_t *to, int64_t step, const float *q, int64_t pitch, int rows, int64_t dim, fastattn_dtype dtype) {
    memset(to, 0, (size_t)(rows * step) * sizeof *to);
    for (int r = 0; r < rows; r++, to += step, q += pitch)
        for (int64_t d = 0; d < dim; d += SIMD_LANES) {
            uint16_t halves[SIMD_LANES];
            simd_store_h(halves, simd_to_bf16(simd_load(q + d)));
            const int64_t block = d / DOT_NUMBERS * DOT_NUMBERS, group = d % DOT_NUMBERS / FA_GROUP, upper = d % FA_GROUP / 16;
            if (dtype == FASTATTN_INT8) {
                memcpy(to + d, halves, sizeof halves);
                continue;
            }
            memcpy(to + block + upper * 32 + group * 8, halves, 16);
            memcpy(to + block + (2 + upper) * 32 + group * 8, halves + 8, 16);
        }
}

/* The products of key n with `rows` rows, a constant. */
FA_INLINE void dot_products(int rows, simd_f *sum, int apart, const uint16_t *q, int64_t step, const tile_rows *k, int64_t n, int64_t keys,
                            int64_t dim, fastattn_dtype dtype) {
    const __m512i numbers = INT4_NUMBERS, zero = _mm512_setzero_si512();
    const char *key = key_at(k, n, keys);
    simd_f products[QUANTISED_ROWS];
    fetch_key(k, n, keys, fa_row_bytes(dtype, dim));
    FA_UNROLL for (int r = 0; r < rows; r++) products[r] = simd_set1(0.0f);
    for (int64_t d = 0; dtype == FASTATTN_INT8 && d < dim; d += 2 * SIMD_LANES) {
        const __m512i even = _mm512_castps_si512(int8_lanes(key, d, dim)), odd = _mm512_castps_si512(int8_lanes(key, d + SIMD_LANES, dim));
        const simd_f pairs = _mm512_castsi512_ps(simd_upper_halves(even, odd));
        FA_UNROLL for (int r = 0; r < rows; r++)
            products[r] = simd_dot_bf16(pairs, simd_load((const float *)(const void *)(q + r * step + d)), products[r]);
    }
    for (int64_t d = 0; dtype == FASTATTN_INT4 && d < dim; d += DOT_NUMBERS) {
        const __m512i packed = int4_bytes(key, d, dim);
        const simd_f scale = to_quarters(int4_scales(key, d, dim));
        const __m512i low = _mm512_unpacklo_epi8(packed, zero), high = _mm512_unpackhi_epi8(packed, zero);
        const __m512i index[4] = {low, _mm512_srli_epi16(low, 4), high, _mm512_srli_epi16(high, 4)};
        simd_f dot[QUANTISED_ROWS];
        FA_UNROLL for (int r = 0; r < rows; r++) dot[r] = simd_set1(0.0f);
        FA_UNROLL for (int i = 0; i < 4; i++) {
            const simd_f pairs = _mm512_castsi512_ps(_mm512_permutexvar_epi16(index[i], numbers));
            FA_UNROLL for (int r = 0; r < rows; r++)
                dot[r] = simd_dot_bf16(pairs, simd_load((const float *)(const void *)(q + r * step + d + i * 32)), dot[r]);
        }
        FA_UNROLL for (int r = 0; r < rows; r++) products[r] = simd_fma(dot[r], scale, products[r]);
    }
    FA_UNROLL for (int r = 0; r < rows; r++) sum[r * apart] = products[r];
}

/* The scores of `rows` rows, and of as many keys at a time as there are sums. */
FA_INLINE void dot_scores(int rows, float *s, int ld, const uint16_t *q, int64_t step, const tile_rows *k, int64_t keys, int64_t dim,
                          fastattn_dtype dtype) {
    const int tile_keys = 16 / rows;
    for (int64_t first = 0; first < keys; first += tile_keys) {
        simd_f sum[16];
        for (int j = 0; j < tile_keys; j++) dot_products(rows, sum + j, tile_keys, q, step, k, first + j, keys, dim, dtype);
        put_scores(rows, tile_keys, s, ld, sum, k, first, keys, dim, dtype);
    }
}

FA_INLINE void dot_qk_of(float *s, const float *q, int ld, int rows, fa_matrix k, int64_t keys, int64_t dim, fastattn_dtype dtype) {
    const int64_t pitch = fa_round_up(dim, FA_ROW_STEP), step = fa_round_up(dim, DOT_NUMBERS);
    uint16_t queries[QUANTISED_ROWS * DOT_MOST_DIM];
    const char *first_row;
    const tile_rows x = tile_rows_of(k, &first_row);
    for (int n; rows > 0; rows -= n, s += n * ld, q += n * pitch) {
        n = rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
        dot_queries(queries, step, q, pitch, n, dim, dtype);
        if (n == 4) dot_scores(4, s, ld, queries, step, &x, keys, dim, dtype);
        else if (n == 2) dot_scores(2, s, ld, queries, step, &x, keys, dim, dtype);
        else dot_scores(1, s, ld, queries, step, &x, keys, dim, dtype);
    }
}

void fastattn_quantised_qk_bfloat16_avx512(float *s, const float *q, int ld, int rows, fa_matrix k, int64_t from, int64_t keys,
                                           int64_t head_dim) {
    const fa_matrix block = fa_rows_from(k, from);
    if (head_dim > DOT_MOST_DIM) quantised_qk(s, q, ld, rows, k, from, keys, head_dim);
    else FA_BY_QUANTISED(k.dtype, dot_qk_of, s, q, ld, rows, block, keys, head_dim);
}

/* Powers times scales as pairs of two keys: of int8 for each pair of keys, of int4 for each of four groups. Keys that are not there weigh 0. */
FA_INLINE __m512i weights_of(const float *p, int64_t keys, int64_t j, simd_f scales) {
    const int64_t left = keys - j < 0 ? 0 : keys - j;
    return _mm512_add_epi32(_mm512_castps_si512(simd_mul(load_as(p + (left ? j : 0), left, FASTATTN_FLOAT32), scales)),
                            _mm512_set1_epi32(0x8000));
}

FA_INLINE void int8_weights(uint32_t *to, const float *p, const float *scales, int64_t keys) {
    for (int64_t j = 0; j < keys; j += 32)
        _mm512_storeu_si512(to + j / 2, simd_upper_halves(weights_of(p, keys, j, simd_load(scales + j)),
                                                          weights_of(p, keys, j + 16, simd_load(scales + j + 16))));
}

/* scales[j] are those of key j, four. */
FA_INLINE void int4_weights(uint32_t *to, const float *p, const float *scales, int64_t keys) {
    const __m512i quarter = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    for (int64_t j = 0; j < keys; j += 8) {
        const int64_t left = keys - j < 8 ? keys - j : 8;
        const simd_f powers = load_as(p + j, left, FASTATTN_FLOAT32);
        __m512i made[2];
        FA_UNROLL for (int i = 0; i < 2; i++) {
            const simd_f of_keys = _mm512_permutexvar_ps(_mm512_add_epi32(quarter, _mm512_set1_epi32(4 * i)), powers);
            made[i] = _mm512_add_epi32(_mm512_castps_si512(simd_mul(of_keys, simd_load(scales + 4 * j + 16 * i))), _mm512_set1_epi32(0x8000));
        }
        const __m512i even = _mm512_shuffle_i32x4(made[0], made[1], 0x88), odd = _mm512_shuffle_i32x4(made[0], made[1], 0xdd);
        _mm512_storeu_si512(to + 2 * j, _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(even, 16), odd));
    }
}

FA_INLINE const char *value_row(fa_matrix v, int64_t j, int64_t keys) { return fa_row_at(v, j < keys ? j : keys - 1); }

FA_INLINE void fetch_values(fa_matrix v, int64_t j, int64_t keys, int64_t at) {
    simd_fetch((const char *)(fa_row_ahead(v, j < keys ? j : keys - 1) + (uintptr_t)at));
}

/* o = o alpha + sums, a vector. */
FA_INLINE void dot_add(float *o, float alpha, simd_f sum) { simd_store(o, simd_fma(simd_load(o), simd_set1(alpha), sum)); }

/* 64 values of `rows` rows, a constant, from d on. */
FA_INLINE void dot_int8_values(int rows, float *o, int64_t pitch, const float *alpha, const uint32_t *weights, fa_matrix v, int64_t keys,
                               int64_t d, int64_t dim) {
    simd_f sum[QUANTISED_ROWS][4];
    FA_UNROLL for (int r = 0; r < rows; r++)
        FA_UNROLL for (int i = 0; i < 4; i++) sum[r][i] = simd_set1(0.0f);
    for (int64_t j = 0; j < keys; j += 2) {
        const char *even = value_row(v, j, keys), *odd = value_row(v, j + 1, keys);
        simd_f pairs[4], weight[QUANTISED_ROWS];
        fetch_values(v, j, keys, d);
        fetch_values(v, j + 1, keys, d);
        FA_UNROLL for (int r = 0; r < rows; r++) weight[r] = _mm512_castsi512_ps(_mm512_set1_epi32((int)weights[r * DOT_KEYS / 2 + j / 2]));
        FA_UNROLL for (int i = 0; i < 4; i++) {
            const __m512i first = _mm512_castps_si512(int8_lanes(even, d + i * SIMD_LANES, dim));
            const __m512i second = _mm512_castps_si512(int8_lanes(odd, d + i * SIMD_LANES, dim));
            pairs[i] = _mm512_castsi512_ps(_mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(first, 16), second));
        }
        FA_UNROLL for (int i = 0; i < 4; i++)
            FA_UNROLL for (int r = 0; r < rows; r++) sum[r][i] = simd_dot_bf16(pairs[i], weight[r], sum[r][i]);
    }
    FA_UNROLL for (int r = 0; r < rows; r++)
        FA_UNROLL for (int i = 0; i < 4; i++)
            if (d + i * SIMD_LANES < dim) dot_add(o + r * pitch + d + i * SIMD_LANES, alpha[r], sum[r][i]);
}

/* Up to four groups of values likewise, the lower or the upper halves of their bytes. */
FA_INLINE void dot_int4_values(int rows, int upper, float *o, int64_t pitch, const float *alpha, const uint32_t *weights, fa_matrix v,
                               int64_t keys, int64_t d, int64_t dim) {
    const __m512i numbers = INT4_NUMBERS, zero = _mm512_setzero_si512();
    simd_f sum[QUANTISED_ROWS][4];
    FA_UNROLL for (int r = 0; r < rows; r++)
        FA_UNROLL for (int i = 0; i < 4; i++) sum[r][i] = simd_set1(0.0f);
    for (int64_t j = 0; j < keys; j += 2) {
        const char *even = value_row(v, j, keys), *odd = value_row(v, j + 1, keys);
        if (!upper) fetch_values(v, j, keys, d / 2), fetch_values(v, j + 1, keys, d / 2);
        const __m512i first = int4_bytes(even, d, dim), second = int4_bytes(odd, d, dim);
        const __m512i low = _mm512_unpacklo_epi8(first, second), high = _mm512_unpackhi_epi8(first, second);
        __m512i index[4] = {_mm512_unpacklo_epi8(low, zero), _mm512_unpackhi_epi8(low, zero), _mm512_unpacklo_epi8(high, zero),
                            _mm512_unpackhi_epi8(high, zero)};
        simd_f weight[QUANTISED_ROWS];
        FA_UNROLL for (int r = 0; r < rows; r++)
            weight[r] = to_quarters(_mm_loadu_ps((const float *)(const void *)(weights + (r * DOT_KEYS + j) * 2)));
        FA_UNROLL for (int i = 0; i < 4; i++) {
            if (upper) index[i] = _mm512_srli_epi16(index[i], 4);
            const simd_f pairs = _mm512_castsi512_ps(_mm512_permutexvar_epi16(index[i], numbers));
            FA_UNROLL for (int r = 0; r < rows; r++) sum[r][i] = simd_dot_bf16(pairs, weight[r], sum[r][i]);
        }
    }
    FA_UNROLL for (int r = 0; r < rows; r++) {
        simd_exchange_quads(sum[r]);
        FA_UNROLL for (int g = 0; g < 4; g++)
            if (d + g * FA_GROUP < dim) dot_add(o + r * pitch + d + g * FA_GROUP + upper * 16, alpha[r], sum[r][g]);
    }
}

FA_INLINE void dot_rows(int rows, float *o, int64_t pitch, const float *alpha, const float *p, int ld, fa_matrix v, int64_t keys, int64_t dim,
                        fastattn_dtype dtype) {
    float scales[4 * DOT_KEYS];
    uint32_t weights[QUANTISED_ROWS * DOT_KEYS * 2];
    if (dtype == FASTATTN_INT8) {
        for (int64_t j = 0; j < fa_round_up(keys, 32); j++) scales[j] = j < keys ? fa_scale_at(fa_row_at(v, j), 0, dim, dtype) : 0.0f;
        for (int r = 0; r < rows; r++) int8_weights(weights + r * DOT_KEYS / 2, p + r * ld, scales, keys);
        for (int64_t d = 0; d < dim; d += 64) dot_int8_values(rows, o, pitch, alpha, weights, v, keys, d, dim);
        return;
    }
    for (int64_t d = 0; d < dim; d += DOT_NUMBERS) {
        for (int64_t j = 0; j < fa_round_up(keys, 8); j++)
            _mm_storeu_ps(scales + 4 * j, j < keys ? int4_scales(fa_row_at(v, j), d, dim) : _mm_setzero_ps());
        for (int r = 0; r < rows; r++) int4_weights(weights + r * DOT_KEYS * 2, p + r * ld, scales, keys);
        dot_int4_values(rows, 0, o, pitch, alpha, weights, v, keys, d, dim);
        dot_int4_values(rows, 1, o, pitch, alpha, weights, v, keys, d, dim);
    }
}

FA_INLINE void dot_pv_of(float *o, const float *alpha, const float *p, int ld, int rows, fa_matrix v, int64_t keys, int64_t dim,
                         fastattn_dtype dtype) {
    const int64_t pitch = fa_round_up(dim, FA_ROW_STEP);
    for (int n; rows > 0; rows -= n, o += n * pitch, alpha += n, p += n * ld) {
        n = rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
        if (n == 4) dot_rows(4, o, pitch, alpha, p, ld, v, keys, dim, dtype);
        else if (n == 2) dot_rows(2, o, pitch, alpha, p, ld, v, keys, dim, dtype);
        else dot_rows(1, o, pitch, alpha, p, ld, v, keys, dim, dtype);
    }
}

void fastattn_quantised_pv_bfloat16_avx512(float *o, const float *alpha, const float *p, int ld, int rows, fa_matrix v, int64_t from,
                                           int64_t keys, int64_t v_head_dim) {
    const fa_matrix block = fa_rows_from(v, from);
    FA_ASSERT(keys <= DOT_KEYS);
    FA_BY_QUANTISED(v.dtype, dot_pv_of, o, alpha, p, ld, rows, block, keys, v_head_dim);
}

#endif
