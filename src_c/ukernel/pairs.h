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
 * for numbers that would round to infinity, where x may be so large. */
FA_INLINE void split(simd_f x, int large, __m512i *high, __m512i *low) {
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000u), infinity = _mm512_set1_epi32(0x7f800000);
    *high = _mm512_and_si512(rounded_up(x), upper);
    if (large) {
        const __mmask16 too_large = _mm512_cmpeq_epi32_mask(_mm512_and_si512(*high, infinity), infinity);
        *high = _mm512_mask_and_epi32(*high, too_large, _mm512_castps_si512(x), upper);
    }
    *low = rounded_up(simd_sub(x, _mm512_castsi512_ps(*high)));
}

/* 32 numbers, of which n are there and the others 0, times sign, as planes of bfloat16 in their order. */
FA_INLINE void halves_of(int planes, __m512i to[2], const char *at, int64_t n, fastattn_dtype dtype, float sign) {
    const int64_t size = fa_size_of(dtype);
    if (dtype == FASTATTN_BFLOAT16) {
        to[1] = _mm512_setzero_si512();
        if (n >= HALVES && sign == 1.0f) {
            to[0] = _mm512_loadu_si512(at);
            return;
        }
        const __mmask32 there = n >= HALVES ? 0xffffffffu : (1u << n) - 1u;
        const __m512i bits = _mm512_maskz_loadu_epi16(there, at);
        to[0] = sign == 0.0f ? _mm512_setzero_si512()
                             : _mm512_xor_si512(bits, _mm512_set1_epi16(sign < 0.0f ? (short)0x8000 : 0));
        return;
    }
    simd_h rounded[2];
    __m512i high[2], low[2];
    FA_UNROLL for (int i = 0; i < 2; i++) {
        const int64_t d = i * SIMD_LANES, left = n - d < 0 ? 0 : n - d;
        const simd_f x = simd_mul(load_as(at + (left ? d * size : 0), left, dtype), simd_set1(sign));
        if (planes == 1)
            rounded[i] = simd_to_bf16(x);
        else
            split(x, 1, &high[i], &low[i]);
    }
    if (planes == 1) {
        to[0] = _mm512_inserti64x4(_mm512_castsi256_si512(rounded[0]), rounded[1], 1);
        return;
    }
    to[0] = simd_upper_halves(high[0], high[1]);
    to[1] = simd_upper_halves(low[0], low[1]);
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
    const fa_matrix made = fa_matrix_at((const char *)room, planes * dim * 2, FASTATTN_BFLOAT16);
    for (int64_t j = 0; j < fa_round_up(keys, tile_keys); j++)
        for (int64_t d = 0; d < dim; d += HALVES) {
            __m512i halves[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
            if (j < keys)
                halves_of(planes, halves, fa_row_at(stored, j) + d * fa_size_of(stored.dtype), head_dim - d,
                          stored.dtype, 1.0f);
            if (j < keys && stored.rows) simd_fetch((const char *)(fa_row_ahead(stored, j) + (uintptr_t)(d * fa_size_of(stored.dtype))));
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

/* 2**x: the polynomial of degree 5 in the fraction with the smallest relative error (8e-8) and the value 1 at 0. */
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

/* 2**x as bfloat16: the upper halves are the nearest to a polynomial of degree 3 (7.5e-5). Half of their last place is part of
 * its constant, which is all that rounding takes where a number is between 1 and 2. */
FA_INLINE __m512i coarse_exp2(simd_f x) {
    const simd_f f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    simd_f p = simd_set1(0x1.3f96a4p-4f);
    p = simd_fma(p, f, simd_set1(0x1.cefc4cp-3f));
    p = simd_fma(p, f, simd_set1(0x1.64444cp-1f));
    p = simd_fma(p, f, simd_set1(0x1.fff632p-1f + 0x1p-8f));
    return _mm512_castps_si512(_mm512_scalef_ps(p, x));
}

/* How powers are made: relative to `base`, in units of 2**c. Beyond PAIRS_NEAR the product of base and c is not exact enough to
 * take it from that of the score, and either may overflow, as with a bias of -FLT_MAX; then the difference comes first. Which of them it
 * is, each row decides for itself; that all are near is what spares the others. */
#define PAIRS_NEAR 128.0f

typedef struct powers_of {
    simd_f c, base[4], product[4]; /* c * base */
    simd_m near[4];
} powers_of;

FA_INLINE simd_f exponent_of(int near, const powers_of *x, int v, const float *s) {
    const simd_f score = simd_load(s), quick = simd_fms(score, x->c, x->product[v]);
    return near ? quick : simd_select(x->near[v], quick, simd_mul(simd_sub(score, x->base[v]), x->c));
}

/* The powers of two keys, the second of which may be missing: in one plane rounded, with the larger of those so far in `largest`;
 * in two as split() does it. Where `summed`, their sum is added to `sum` as exactly as float32 is. */
FA_INLINE void power_pair(int planes, int summed, int near, const powers_of *x, int v, const float *s, ptrdiff_t ld, int both,
                          float *p, __m512i *largest, simd_f *sum) {
    const simd_f even = exponent_of(near, x, v, s);
    const simd_f odd = both ? exponent_of(near, x, v, s + ld) : simd_set1(-INFINITY);
    if (planes == 1) {
        const __m512i pair = upper_halves(coarse_exp2(even), coarse_exp2(odd));
        _mm512_storeu_si512(p, pair);
        *largest = _mm512_max_epu16(*largest, pair);
        if (summed) *sum = simd_add(*sum, simd_add(quick_exp2(even), quick_exp2(odd)));
        return;
    }
    const simd_f powers[2] = {quick_exp2(even), quick_exp2(odd)};
    __m512i high[2], low[2];
    FA_UNROLL for (int i = 0; i < 2; i++) split(powers[i], 0, &high[i], &low[i]);
    _mm512_storeu_si512(p, upper_halves(high[0], high[1]));
    _mm512_storeu_si512(p + ld, upper_halves(low[0], low[1]));
    *sum = simd_add(*sum, simd_add(powers[0], powers[1]));
}

/* The same for one vector, of any number of keys and where some row is not near: rare, but where scores are far apart. */
static FA_NOINLINE void far_pairs(int planes, int summed, const powers_of *x, int v, const float *s, float *p, ptrdiff_t ld, int64_t keys,
                                  __m512i *largest, simd_f *sum) {
    const powers_of own = {.c = x->c, .base = {x->base[v]}, .product = {x->product[v]}, .near = {x->near[v]}}; /* in registers */
#define FAR_PAIRS(of_planes, are_summed)                                                                                \
    for (int64_t j = 0; j < keys; j += 2)                                                                               \
        power_pair(of_planes, are_summed, 0, &own, 0, s + j * ld, ld, j + 1 < keys, p + j / 2 * of_planes * ld, largest, sum)
    if (planes > 1)
        FAR_PAIRS(2, 1);
    else if (summed)
        FAR_PAIRS(1, 1);
    else
        FAR_PAIRS(1, 0);
#undef FAR_PAIRS
}

/* What another unit has to do meanwhile, in pieces: as many as there are for the first `part` of `parts`. Returns the part before
 * which it has nothing more to do. */
typedef int64_t pairs_beside(void *work, int64_t part, int64_t parts);

FA_INLINE void power_pairs(int planes, int vectors, int summed, const powers_of *x, const float *s, float *p,
                           ptrdiff_t ld, int64_t keys, __m512i largest[4], simd_f sum[4], pairs_beside *beside, void *work) {
    int64_t j = 0, due = 0;
    for (; j + 2 <= keys; j += 2) {
        if (beside && j >= due) due = beside(work, j, keys);
        FA_UNROLL for (int v = 0; v < vectors; v++)
            power_pair(planes, summed, 1, x, v, s + j * ld + v * SIMD_LANES, ld, 1,
                       p + j / 2 * planes * ld + v * SIMD_LANES, &largest[v], &sum[v]);
    }
    for (int v = 0; j < keys && v < vectors; v++)
        far_pairs(planes, summed, x, v, s + j * ld + v * SIMD_LANES, p + j / 2 * planes * ld + v * SIMD_LANES, ld, 1, &largest[v], &sum[v]);
}

FA_INLINE void pairs_softmax_strip(int planes, int vectors, int summed, const float *s, float *p, ptrdiff_t ld, int64_t keys,
                                   float c, float *m, float *l, float *alpha, pairs_beside *beside, void *work) {
    const simd_f lowest = simd_set1(-INFINITY), zero = simd_set1(0.0f);
    powers_of x = {.c = simd_set1(c)};
    simd_f top[4], sum[4];
    simd_m stale[4];
    FA_UNROLL for (int v = 0; v < vectors; v++) {
        top[v] = simd_load(m + v * SIMD_LANES);
        stale[v] = simd_eq(top[v], lowest);
    }
    /* An old maximum serves as long as no power grows large, which the largest or the sum tells. Else it is looked for, once. */
    for (int looked = 0;; looked = 1) {
        int wanting = 0, near = 1;
        __m512i largest[4];
        FA_UNROLL for (int v = 0; v < vectors; v++) {
            if (simd_any(stale[v])) {
                simd_f highest = top[v];
                for (int64_t j = 0; j < keys; j++) highest = simd_max(highest, simd_load(s + j * ld + v * SIMD_LANES));
                top[v] = simd_select(stale[v], highest, top[v]);
            }
            /* While all is -inf, powers are taken relative to 0 and vanish; -inf - -inf would be NaN. */
            x.base[v] = simd_select(simd_eq(top[v], lowest), zero, top[v]);
            x.product[v] = simd_mul(x.base[v], x.c);
            x.near[v] = simd_lt(simd_abs(x.product[v]), simd_set1(PAIRS_NEAR));
            near &= !simd_any(simd_not(x.near[v]));
            largest[v] = _mm512_setzero_si512();
            sum[v] = zero;
        }
        if (near)
            power_pairs(planes, vectors, summed, &x, s, p, ld, keys, largest, sum, beside, work);
        else
            FA_UNROLL for (int v = 0; v < vectors; v++)
                far_pairs(planes, summed, &x, v, s + v * SIMD_LANES, p + v * SIMD_LANES, ld, keys, &largest[v], &sum[v]);
        FA_UNROLL for (int v = 0; v < vectors; v++) {
            const __m512i evens = _mm512_slli_epi32(largest[v], 16);
            const simd_f most = planes > 1 ? sum[v] : _mm512_castsi512_ps(_mm512_max_epu32(largest[v], evens));
            stale[v] = simd_not(simd_lt(most, simd_set1(FA_MOST_POWER)));
            wanting |= simd_any(stale[v]);
        }
        if (!wanting || looked) break;
    }
    for (int64_t j = (keys + 1) / 2; j < fa_round_up(keys, HALVES) / 2; j++)
        FA_UNROLL for (int v = 0; v < planes * vectors; v++)
            simd_store(p + (j * planes + v / vectors) * ld + v % vectors * SIMD_LANES, zero);
    FA_UNROLL for (int v = 0; v < vectors; v++) {
        const simd_f fade = exp2_of(simd_sub(simd_load(m + v * SIMD_LANES), x.base[v]), x.c);
        simd_store(m + v * SIMD_LANES, top[v]);
        simd_store(alpha + v * SIMD_LANES, fade);
        if (summed) simd_store(l + v * SIMD_LANES, simd_fma(simd_load(l + v * SIMD_LANES), fade, sum[v])); /* else l may be null */
    }
}

FA_INLINE void pairs_softmax_of(int planes, int summed, const float *s, float *p, int ld, int rows, int64_t keys, float c,
                                float *m, float *l, float *alpha, pairs_beside *beside, void *work) {
    const unsigned found = subnormals_are_zero();
    int row = 0;
#define PAIRS_STRIPS(vectors)                                                                                           \
    for (; row + vectors * SIMD_LANES <= rows; row += vectors * SIMD_LANES)                                             \
        pairs_softmax_strip(planes, vectors, summed, s + row, p + row, ld, keys, c, m + row, summed ? l + row : NULL,   \
                            alpha + row, beside, work);
    if (planes > 1 || !summed) { /* sums of one plane are seldom asked for */
        if (!beside) { PAIRS_STRIPS(4) }
        PAIRS_STRIPS(2)
    }
    PAIRS_STRIPS(1)
#undef PAIRS_STRIPS
    _mm_setcsr(found);
}

/* One plane is divided by the sums that pv forms, and has its own only for those who ask. */
FA_INLINE void pairs_softmax(int planes, const float *s, float *p, int ld, int rows, int64_t keys, float c, float *m, float *l,
                             float *alpha, pairs_beside *beside, void *work) {
    if (planes > 1 || l)
        pairs_softmax_of(planes, 1, s, p, ld, rows, keys, c, m, l, alpha, beside, work);
    else
        pairs_softmax_of(planes, 0, s, p, ld, rows, keys, c, m, NULL, alpha, beside, work);
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

/* The slots that the number of planes decides. */
#define PAIRS_SLOTS(planes)                                                                                         \
    static void pairs_pack_##planes(float *q, int ld, const void *const *rows_of, int rows, int64_t head_dim,       \
                                    fastattn_dtype dtype, float sign) {                                             \
        float factors[FA_PANEL_ROWS];                                                                               \
        for (int row = 0; row < rows; row++) factors[row] = sign;                                                   \
        pairs_pack(planes, halves_of, q, ld, rows_of, rows, head_dim, dtype, factors);                              \
    }                                                                                                               \
    static void pairs_softmax_##planes(float *s, float *p, int ld, int rows, int64_t keys, float c, float *m,       \
                                       float *l, float *alpha) {                                                    \
        pairs_softmax(planes, s, p, ld, rows, keys, c, m, l, alpha, NULL, NULL);                                    \
    }                                                                                                               \
    static float pairs_power_##planes(const float *p, int ld, int row, int64_t key) {                               \
        return pairs_power(planes, p, ld, row, key);                                                                \
    }

#if defined(FA_HOLDS_AVX512_BF16) || defined(FA_HOLDS_AMX)
PAIRS_SLOTS(1)
#endif
#ifdef FA_HOLDS_AMX
PAIRS_SLOTS(2)
#endif
#undef PAIRS_SLOTS
