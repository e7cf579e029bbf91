/* Template: states of width 1, put together: rows of `out` with the lse of each. Rows are lanes while weights are made of their lse,
 * and numbers of one row are while it is summed. */

/* weights[n][r] = exp(lses[n][r] - lse[r]), which sum to 1, for FA_ROW_STEP rows of which `rows` are there; lse[r] becomes
 * top[r] + log(total[r]). Where all are -inf, total is 0 and so are the weights. */
static void weigh(float *weights, float *top, float *total, const float *const *lses, int64_t parts, int64_t first, int64_t rows) {
    const simd_f lowest = simd_set1(-INFINITY), zero = simd_set1(0.0f), log2_e = simd_set1(1.44269504088896341f);
    for (int64_t row = 0; row < FA_ROW_STEP; row += SIMD_LANES) {
        const int64_t left = rows - row < 0 ? 0 : rows - row;
        simd_f most = lowest, sum = zero;
        for (int64_t n = 0; n < parts; n++) most = simd_max(most, load_as(lses[n] + first + (left ? row : 0), left, FASTATTN_FLOAT32));
        const simd_f base = simd_select(simd_eq(most, lowest), zero, most);
        for (int64_t n = 0; n < parts; n++) {
            const simd_f lse = load_as(lses[n] + first + (left ? row : 0), left, FASTATTN_FLOAT32);
            const simd_f weight = exp2_of(simd_sub(lse, base), log2_e);
            simd_store(weights + n * FA_ROW_STEP + row, weight);
            sum = simd_add(sum, weight);
        }
        const simd_f whole = simd_select(simd_eq(sum, zero), simd_set1(1.0f), sum);
        for (int64_t n = 0; n < parts; n++) {
            float *at = weights + n * FA_ROW_STEP + row;
            simd_store(at, simd_div(simd_load(at), whole));
        }
        simd_store(top + row, base);
        simd_store(total + row, sum);
    }
}

FA_INLINE void mix_of(void *out, const float *weights, const void *const *rows, int64_t parts, int64_t dim, simd_f *checked,
                      fastattn_dtype dtype) {
    const int64_t size = fa_size_of(dtype);
    int64_t d = 0;
    for (; d + 4 * SIMD_LANES <= dim; d += 4 * SIMD_LANES) {
        simd_f sum[4];
        FA_UNROLL for (int i = 0; i < 4; i++) sum[i] = simd_set1(0.0f);
        for (int64_t n = 0; n < parts; n++) {
            const simd_f weight = simd_set1(weights[n]);
            FA_UNROLL for (int i = 0; i < 4; i++)
                sum[i] = simd_fma(weight, load_full((const char *)rows[n] + (d + i * SIMD_LANES) * size, dtype), sum[i]);
        }
        FA_UNROLL for (int i = 0; i < 4; i++) {
            checked[i] = simd_fma(sum[i], simd_set1(0.0f), checked[i]);
            store_full((char *)out + (d + i * SIMD_LANES) * size, sum[i], dtype);
        }
    }
    for (; d < dim; d += SIMD_LANES) {
        simd_f sum = simd_set1(0.0f);
        for (int64_t n = 0; n < parts; n++)
            sum = simd_fma(simd_set1(weights[n]), load_as((const char *)rows[n] + d * size, dim - d, dtype), sum);
        checked[0] = simd_fma(sum, simd_set1(0.0f), checked[0]);
        store_as((char *)out + d * size, sum, dim - d, dtype);
    }
}

/* out = sum of weights[n] * rows[n]; 1 when all of it is finite. */
static int mix(void *out, const float *weights, const void *const *rows, int64_t parts, int64_t dim, fastattn_dtype dtype) {
    const simd_f zero = simd_set1(0.0f);
    simd_f checked[4] = {zero, zero, zero, zero};
    FA_BY_STORAGE(dtype, mix_of, out, weights, rows, parts, dim, checked)
    return were_finite(simd_add(simd_add(checked[0], checked[1]), simd_add(checked[2], checked[3])));
}
