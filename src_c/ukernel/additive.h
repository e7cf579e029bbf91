/* Template: additive scores (Bahdanau et al. 2014), s = sum over d of w[d] * tanh(q[d] + k[d]), in place of the product. A score takes a
 * tanh for each number, some fifteen times the arithmetic of a product, so that nothing but the tanh counts. The panel of queries
 * holds the weights, too, behind their numbers: heads have their own. */

enum { ADDITIVE_KEYS = 4 }; /* whose tanh are under way at a time, as none waits for another */

/* So many keys, a constant, and a vector of rows. */
FA_INLINE void additive_keys(int keys, float *s, const float *q, const float *weights, int ld, const char *k, int64_t stride,
                             int64_t head_dim) {
    simd_f sum[ADDITIVE_KEYS];
    FA_UNROLL for (int j = 0; j < keys; j++) sum[j] = simd_set1(0.0f);
    for (int64_t d = 0; d < head_dim; d++) {
        const simd_f number = simd_load(q + d * ld), weight = simd_load(weights + d * ld);
        FA_UNROLL for (int j = 0; j < keys; j++) {
            const simd_f key = simd_set1(((const float *)(const void *)(k + j * stride))[d]);
            sum[j] = simd_fma(weight, tanh_of(simd_add(number, key)), sum[j]);
        }
    }
    FA_UNROLL for (int j = 0; j < keys; j++) simd_store(s + j * ld, sum[j]);
}

static void additive_qk(float *s, const float *q, int ld, int rows, fa_matrix k, int64_t from, int64_t keys, int64_t head_dim) {
    const char *at = k.at + from * k.stride;
    for (int row = 0; row < rows; row += SIMD_LANES) {
        const float *weights = q + fa_sums_row(head_dim) * ld;
        int64_t j = 0;
        for (; j + ADDITIVE_KEYS <= keys; j += ADDITIVE_KEYS)
            additive_keys(ADDITIVE_KEYS, s + j * ld + row, q + row, weights + row, ld, at + j * k.stride, k.stride, head_dim);
        for (; j < keys; j++) additive_keys(1, s + j * ld + row, q + row, weights + row, ld, at + j * k.stride, k.stride, head_dim);
    }
}

/* By rows: lanes are numbers, which are summed across lanes for as many keys at a time as there are lanes. Beyond head_dim weights
 * are 0. */
FA_INLINE void additive_rows_of(float *s, const float *q, int ld, int rows, fa_matrix k, int64_t keys, int64_t head_dim,
                                fastattn_dtype dtype) {
    const int64_t pitch = fa_sums_row(head_dim), size = fa_size_of(dtype);
    for (int row = 0; row < rows; row++, s += ld, q += 2 * pitch)
        for (int64_t first = 0; first < keys; first += SIMD_LANES) {
            simd_f sum[SIMD_LANES];
            for (int i = 0; i < SIMD_LANES; i++) {
                const char *key = fa_row_at(k, first + i < keys ? first + i : keys - 1);
                sum[i] = simd_set1(0.0f);
                for (int64_t d = 0; d < head_dim; d += SIMD_LANES) {
                    const simd_f number = simd_add(simd_load(q + d), load_as(key + d * size, head_dim - d, dtype));
                    sum[i] = simd_fma(simd_load(q + pitch + d), tanh_of(number), sum[i]);
                }
            }
            simd_store(s + first, simd_sum_lanes(sum));
        }
}

static void additive_rows_qk(float *s, const float *q, int ld, int rows, fa_matrix k, int64_t from, int64_t keys, int64_t head_dim) {
    FA_BY_STORAGE_OF_KEYS(k.dtype, additive_rows_of, s, q, ld, rows, fa_rows_from(k, from), keys, head_dim)
}
