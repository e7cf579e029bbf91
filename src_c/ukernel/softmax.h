/* Template: the exponential and the online softmax. Rows are lanes, so that nothing here crosses a lane. */

/* 2**y for y <= 0 (or NaN); 0 below -126. 2**n * 2**f with |f| <= 1/2; the polynomial is the one of degree 6 with the
 * smallest relative error (2e-9) and the exact value 1 at 0. */
FA_INLINE simd_f exp2_of(simd_f y) {
    simd_f n = simd_round(y), f = simd_sub(y, n);
    simd_f p = simd_set1(0x1.41fbbcp-13f);
    p = simd_fma(p, f, simd_set1(0x1.5f3e54p-10f));
    p = simd_fma(p, f, simd_set1(0x1.3b2d4cp-7f));
    p = simd_fma(p, f, simd_set1(0x1.c6aee8p-5f));
    p = simd_fma(p, f, simd_set1(0x1.ebfbdcp-3f));
    p = simd_fma(p, f, simd_set1(0x1.62e430p-1f));
    p = simd_fma(p, f, simd_set1(1.0f));
    return simd_select(simd_lt(y, simd_set1(-126.0f)), simd_set1(0.0f), simd_scale2(p, n));
}

FA_INLINE void softmax_strip(int vectors, float *s, ptrdiff_t ld, int64_t keys, float c, float *m, float *l,
                             float *alpha) {
    const simd_f scale = simd_set1(c), lowest = simd_set1(-INFINITY);
    simd_f top[4], sum[4];
    FA_UNROLL for (int v = 0; v < vectors; v++) top[v] = simd_load(m + v * SIMD_LANES);
    for (int64_t j = 0; j < keys; j++)
        FA_UNROLL for (int v = 0; v < vectors; v++)
            top[v] = simd_max(top[v], simd_load(s + j * ld + v * SIMD_LANES));
    FA_UNROLL for (int v = 0; v < vectors; v++) {
        const simd_f old = simd_load(m + v * SIMD_LANES);
        simd_store(m + v * SIMD_LANES, top[v]);
        /* While all is -inf, powers are taken relative to 0 and vanish; -inf - -inf would be NaN. */
        top[v] = simd_select(simd_eq(top[v], lowest), simd_set1(0.0f), top[v]);
        simd_store(alpha + v * SIMD_LANES, exp2_of(simd_mul(simd_sub(old, top[v]), scale)));
        sum[v] = simd_set1(0.0f);
    }
    /* The difference first: it is exact where it matters, and a product of large scores could overflow. */
    for (int64_t j = 0; j < keys; j++)
        FA_UNROLL for (int v = 0; v < vectors; v++) {
            float *at = s + j * ld + v * SIMD_LANES;
            const simd_f p = exp2_of(simd_mul(simd_sub(simd_load(at), top[v]), scale));
            simd_store(at, p);
            sum[v] = simd_add(sum[v], p);
        }
    FA_UNROLL for (int v = 0; v < vectors; v++) {
        float *at = l + v * SIMD_LANES;
        simd_store(at, simd_fma(simd_load(at), simd_load(alpha + v * SIMD_LANES), sum[v]));
    }
}

static void softmax(float *s, int ld, int rows, int64_t keys, float c, float *m, float *l, float *alpha) {
    int row = 0;
#if SIMD_TILE_VECTORS >= 4
    for (; row + 4 * SIMD_LANES <= rows; row += 4 * SIMD_LANES)
        softmax_strip(4, s + row, ld, keys, c, m + row, l + row, alpha + row);
#endif
    for (; row < rows; row += SIMD_LANES) softmax_strip(1, s + row, ld, keys, c, m + row, l + row, alpha + row);
}
