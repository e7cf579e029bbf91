/* Panels of bfloat16 pairs, for products that take two numbers at a time: queries in pairs of head_dim, powers in pairs of keys.
 * Included by avx512.c; a pair is a dword, so that the panels have the 4 bytes for a row that float32 panels have.
 *
 * A number of more than 8 bits is the sum of `planes` bfloat16. Planes of queries and powers alternate within a row of pairs,
 * those of keys within a row. */
enum { HALVES = 32 }; /* of a vector */

/* Float32 to the nearest bfloat16, in the upper halves; what is below them is left over. For numbers, not for NaN. */
FA_INLINE __m512i rounded_up(simd_f x) { return _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000)); }

/* The upper halves of `even` and `odd` in turn. */
FA_INLINE __m512i upper_halves(__m512i even, __m512i odd) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(even, 16), odd);
}

/* x as a sum of two bfloat16, to 16 bits. The first is rounded, so that what the product of two second ones adds has no bias, but
 * for numbers that would round to infinity. */
FA_INLINE void split(simd_f x, __m512i *high, __m512i *low) {
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000u), infinity = _mm512_set1_epi32(0x7f800000);
    const __m512i rounded = _mm512_and_si512(rounded_up(x), upper);
    const __mmask16 too_large = _mm512_cmpeq_epi32_mask(_mm512_and_si512(rounded, infinity), infinity);
    *high = _mm512_mask_and_epi32(rounded, too_large, _mm512_castps_si512(x), upper);
    *low = rounded_up(simd_sub(x, _mm512_castsi512_ps(*high)));
}

/* 32 numbers, of which n are there and the others 0, times sign, as planes of bfloat16 in their order. */
FA_INLINE void halves_of(int planes, __m512i to[2], const char *at, int64_t n, fastattn_dtype dtype, float sign) {
    const int64_t size = fa_size_of(dtype);
    if (dtype == FASTATTN_BFLOAT16) {
        const __mmask32 there = n >= HALVES ? 0xffffffffu : (1u << n) - 1u;
        const __m512i bits = _mm512_maskz_loadu_epi16(there, at);
        to[1] = _mm512_setzero_si512();
        to[0] = sign == 0.0f ? _mm512_setzero_si512()
                             : _mm512_xor_si512(bits, _mm512_set1_epi16(sign < 0.0f ? (short)0x8000 : 0));
        return;
    }
    uint16_t planes_of[2][HALVES];
    for (int64_t d = 0; d < HALVES; d += SIMD_LANES) {
        const int64_t left = n - d < 0 ? 0 : n - d;
        const simd_f x = simd_mul(load_as(at + (left ? d * size : 0), left, dtype), simd_set1(sign));
        __m512i high, low;
        if (planes == 1) {
            simd_store_bf16(planes_of[0] + d, x);
            continue;
        }
        split(x, &high, &low);
        _mm256_storeu_si256((__m256i *)(planes_of[0] + d), _mm512_cvtepi32_epi16(_mm512_srli_epi32(high, 16)));
        _mm256_storeu_si256((__m256i *)(planes_of[1] + d), _mm512_cvtepi32_epi16(_mm512_srli_epi32(low, 16)));
    }
    for (int plane = 0; plane < planes; plane++) to[plane] = _mm512_loadu_si512(planes_of[plane]);
}

typedef void halves_maker(int planes, __m512i to[2], const char *at, int64_t n, fastattn_dtype dtype, float factor);

/* Row r times factors[r]. Pairs of head_dim are dwords, and turn as such. */
FA_INLINE void pairs_pack(int planes, halves_maker *make, float *q, int ld, const void *const *rows_of, int rows,
                          int64_t head_dim, fastattn_dtype dtype, const float *factors) {
    for (int row = 0; row < rows; row += SIMD_LANES)
        for (int64_t d = 0; d < head_dim; d += HALVES) {
            simd_f square[2][SIMD_LANES];
            for (int i = 0; i < SIMD_LANES; i++) {
                __m512i halves[2];
                make(planes, halves, (const char *)rows_of[row + i] + d * fa_size_of(dtype), head_dim - d, dtype,
                     factors[row + i]);
                for (int plane = 0; plane < planes; plane++) square[plane][i] = _mm512_castsi512_ps(halves[plane]);
            }
            for (int plane = 0; plane < planes; plane++) {
                simd_transpose(square[plane]);
                for (int i = 0; i < SIMD_LANES; i++)
                    simd_store(q + ((d / 2 + i) * planes + plane) * ld + row, square[plane][i]);
            }
        }
}

/* Keys in whole tiles of 32 halves and so many keys. */
FA_INLINE fa_matrix pairs_keys(int planes, int64_t tile_keys, float *room, fa_matrix stored, int64_t keys,
                               int64_t head_dim) {
    const int64_t dim = fa_round_up(head_dim, HALVES);
    const fa_matrix made = {(const char *)room, planes * dim * 2, FASTATTN_BFLOAT16};
    for (int64_t j = 0; j < fa_round_up(keys, tile_keys); j++)
        for (int64_t d = 0; d < dim; d += HALVES) {
            __m512i halves[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
            if (j < keys)
                halves_of(planes, halves, stored.at + j * stored.stride + d * fa_size_of(stored.dtype), head_dim - d,
                          stored.dtype, 1.0f);
            for (int plane = 0; plane < planes; plane++)
                _mm512_storeu_si512((char *)room + j * made.stride + (plane * dim + d) * 2, halves[plane]);
        }
    return made;
}

/* Powers below 2**-126 become 0 at no cost until the control word that this returns is set again. */
FA_INLINE unsigned subnormals_are_zero(void) {
    const unsigned found = _mm_getcsr(), both_ways = 0x8040;
    _mm_setcsr(found | both_ways);
    return found;
}

/* 2**x. The powers are rounded to bfloat16, but their sum is not: the polynomial of degree 5 in the fraction with the smallest
 * relative error (8e-8) and the value 1 at 0. */
FA_INLINE simd_f quick_exp2(simd_f x) {
    const simd_f f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    simd_f p = simd_set1(0x1.e97522p-10f);
    p = simd_fma(p, f, simd_set1(0x1.27784ap-7f));
    p = simd_fma(p, f, simd_set1(0x1.c91ce8p-5f));
    p = simd_fma(p, f, simd_set1(0x1.ebdb56p-3f));
    p = simd_fma(p, f, simd_set1(0x1.62e4bap-1f));
    p = simd_fma(p, f, simd_set1(1.0f));
    return _mm512_scalef_ps(p, x);
}

/* The powers of one key. The difference first: c times a score may overflow, as with a bias of -FLT_MAX. */
FA_INLINE simd_f power_of(int planes, const float *s, simd_f top, simd_f c) {
    const simd_f x = simd_sub(simd_load(s), top);
    return planes == 1 ? quick_exp2(simd_mul(x, c)) : exp2_of(x, c);
}

FA_INLINE void pairs_softmax_strip(int planes, int vectors, const float *s, float *p, ptrdiff_t ld, int64_t keys, float c,
                                 float *m, float *l, float *alpha) {
    const simd_f scale = simd_set1(c), lowest = simd_set1(-INFINITY), zero = simd_set1(0.0f);
    simd_f top[4], base[4], sum[4];
    simd_m stale[4];
    FA_UNROLL for (int v = 0; v < vectors; v++) {
        top[v] = simd_load(m + v * SIMD_LANES);
        stale[v] = simd_eq(top[v], lowest);
    }
    /* An old maximum serves as long as no power grows large, which their sum tells. Else it is looked for, once. */
    for (int looked = 0;; looked = 1) {
        int wanting = 0;
        FA_UNROLL for (int v = 0; v < vectors; v++) {
            if (simd_any(stale[v])) {
                simd_f highest = top[v];
                for (int64_t j = 0; j < keys; j++) highest = simd_max(highest, simd_load(s + j * ld + v * SIMD_LANES));
                top[v] = simd_select(stale[v], highest, top[v]);
            }
            /* While all is -inf, powers are taken relative to 0 and vanish; -inf - -inf would be NaN. */
            base[v] = simd_select(simd_eq(top[v], lowest), zero, top[v]);
            sum[v] = zero;
        }
        for (int64_t j = 0; j < keys; j += 2)
            FA_UNROLL for (int v = 0; v < vectors; v++) {
                const float *from = s + j * ld + v * SIMD_LANES;
                float *to = p + j / 2 * planes * ld + v * SIMD_LANES;
                const simd_f even = power_of(planes, from, base[v], scale);
                const simd_f odd = j + 1 < keys ? power_of(planes, from + ld, base[v], scale) : zero;
                sum[v] = simd_add(sum[v], simd_add(even, odd));
                if (planes == 1) {
                    _mm512_storeu_si512(to, upper_halves(rounded_up(even), rounded_up(odd)));
                    continue;
                }
                __m512i high[2], low[2];
                split(even, &high[0], &low[0]);
                split(odd, &high[1], &low[1]);
                _mm512_storeu_si512(to, upper_halves(high[0], high[1]));
                _mm512_storeu_si512(to + ld, upper_halves(low[0], low[1]));
            }
        FA_UNROLL for (int v = 0; v < vectors; v++) {
            stale[v] = simd_not(simd_lt(sum[v], simd_set1(FA_MOST_POWER)));
            wanting |= simd_any(stale[v]);
        }
        if (!wanting || looked) break;
    }
    for (int64_t j = (keys + 1) / 2; j < fa_round_up(keys, HALVES) / 2; j++)
        FA_UNROLL for (int v = 0; v < planes * vectors; v++)
            simd_store(p + (j * planes + v / vectors) * ld + v % vectors * SIMD_LANES, zero);
    FA_UNROLL for (int v = 0; v < vectors; v++) {
        const simd_f fade = exp2_of(simd_sub(simd_load(m + v * SIMD_LANES), base[v]), scale);
        float *at = l + v * SIMD_LANES;
        simd_store(m + v * SIMD_LANES, top[v]);
        simd_store(alpha + v * SIMD_LANES, fade);
        simd_store(at, simd_fma(simd_load(at), fade, sum[v]));
    }
}

FA_INLINE void pairs_softmax(int planes, const float *s, float *p, int ld, int rows, int64_t keys, float c, float *m, float *l,
                           float *alpha) {
    const unsigned found = subnormals_are_zero();
    int row = 0;
    for (; row + 64 <= rows; row += 64)
        pairs_softmax_strip(planes, 4, s + row, p + row, ld, keys, c, m + row, l + row, alpha + row);
    for (; row < rows; row += SIMD_LANES)
        pairs_softmax_strip(planes, 1, s + row, p + row, ld, keys, c, m + row, l + row, alpha + row);
    _mm_setcsr(found);
}

FA_INLINE float pairs_power(int planes, const float *p, int ld, int row, int64_t key) {
    float sum = 0.0f;
    for (int plane = planes - 1; plane >= 0; plane--) {
        uint16_t pair[2];
        memcpy(pair, p + (key / 2 * planes + plane) * ld + row, sizeof pair);
        sum += fa_from_bf16(pair[key % 2]);
    }
    return sum;
}

/* The slots of a table that the panels alone decide. */
#define PAIRS_SLOTS(suffix, planes)                                                                               \
    static void suffix##_pack(float *q, int ld, const void *const *rows_of, int rows, int64_t head_dim,           \
                              fastattn_dtype dtype, float sign) {                                                 \
        float factors[FA_PANEL_ROWS];                                                                             \
        for (int row = 0; row < rows; row++) factors[row] = sign;                                                 \
        pairs_pack(planes, halves_of, q, ld, rows_of, rows, head_dim, dtype, factors);                            \
    }                                                                                                             \
    static void suffix##_softmax(float *s, float *p, int ld, int rows, int64_t keys, float c, float *m, float *l, \
                                 float *alpha) {                                                                  \
        pairs_softmax(planes, s, p, ld, rows, keys, c, m, l, alpha);                                              \
    }                                                                                                             \
    static float suffix##_power(const float *p, int ld, int row, int64_t key) {                                   \
        return pairs_power(planes, p, ld, row, key);                                                              \
    }
