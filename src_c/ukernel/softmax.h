/* Template: the exponential and the online softmax. Rows are lanes, so that nothing here crosses a lane. */

/* 2**(x * c) for x * c <= 0 (or NaN); 0 below 2**-100, so that no product with it is a subnormal number, which would
 * cost a hundred cycles. Adding and taking away 1.5 * 2**23 rounds to the integer n; then 2**n * 2**f with |f| <= 1/2,
 * by the polynomial of degree 5 with the smallest relative error (9e-8) and the exact value 1 at 0. */
FA_INLINE simd_f exp2_of(simd_f x, simd_f c) {
    const simd_f shift = simd_set1(0x1.8p23f), shifted = simd_fma(x, c, shift), n = simd_sub(shifted, shift);
    const simd_f f = simd_fms(x, c, n);
    simd_f p = simd_set1(0x1.5bba14p-10f);
    p = simd_fma(p, f, simd_set1(0x1.3cea88p-7f));
    p = simd_fma(p, f, simd_set1(0x1.c6b752p-5f));
    p = simd_fma(p, f, simd_set1(0x1.ebf9bcp-3f));
    p = simd_fma(p, f, simd_set1(0x1.62e42ap-1f));
    p = simd_fma(p, f, simd_set1(1.0f));
    return simd_scale2(simd_lt(n, simd_set1(-100.0f)), p, n);
}

FA_INLINE void softmax_strip(int vectors, const float *s, float *p, ptrdiff_t ld, int64_t keys, float c, float *m,
                             float *l, float *alpha) {
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
        simd_store(alpha + v * SIMD_LANES, exp2_of(simd_sub(old, top[v]), scale));
        sum[v] = simd_set1(0.0f);
    }
    /* The difference first: it is exact where it matters, and a product of large scores could overflow. The sum is
     * formed in runs, for its error grows with their length. */
    for (int64_t j = 0; j < keys;) {
        const int64_t end = keys - j < FA_SUM_RUN ? keys : j + FA_SUM_RUN;
        simd_f run[4];
        FA_UNROLL for (int v = 0; v < vectors; v++) run[v] = simd_set1(0.0f);
        for (; j < end; j++)
            FA_UNROLL for (int v = 0; v < vectors; v++) {
                const int64_t at = j * ld + v * SIMD_LANES;
                const simd_f x = exp2_of(simd_sub(simd_load(s + at), top[v]), scale);
                simd_store(p + at, x);
                run[v] = simd_add(run[v], x);
            }
        FA_UNROLL for (int v = 0; v < vectors; v++) sum[v] = simd_add(sum[v], run[v]);
    }
    FA_UNROLL for (int v = 0; v < vectors; v++) {
        float *at = l + v * SIMD_LANES;
        simd_store(at, simd_fma(simd_load(at), simd_load(alpha + v * SIMD_LANES), sum[v]));
    }
}

static void softmax(float *s, float *p, int ld, int rows, int64_t keys, float c, float *m, float *l, float *alpha) {
    int row = 0;
#if SIMD_TILE_VECTORS >= 4
    for (; row + 4 * SIMD_LANES <= rows; row += 4 * SIMD_LANES)
        softmax_strip(4, s + row, p + row, ld, keys, c, m + row, l + row, alpha + row);
#endif
    for (; row < rows; row += SIMD_LANES) softmax_strip(1, s + row, p + row, ld, keys, c, m + row, l + row, alpha + row);
}
