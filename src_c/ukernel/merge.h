/* Template: states of width 1, put together: rows of `out` with the lse of each. Rows are lanes while weights are made of their lse,
 * and numbers of one row are while it is summed. */

/* log(x) for x from 1 on, or NaN, to two units in the last place: by 2 artanh((m - 1) / (m + 1)), where m is x, halved until none of
 * it is beyond the square root of 2. Few parts sum to little: that is a step for each doubling of them. */
FA_INLINE simd_f log_of(simd_f x) {
    const simd_f one = simd_set1(1.0f), half = simd_set1(0.5f), most = simd_set1(1.41421356f);
    simd_f halvings = simd_set1(0.0f);
    for (simd_m beyond = simd_lt(most, x); simd_any(beyond); beyond = simd_lt(most, x)) {
        x = simd_select(beyond, simd_mul(x, half), x);
        halvings = simd_select(beyond, simd_add(halvings, one), halvings);
    }
    const simd_f s = simd_div(simd_sub(x, one), simd_add(x, one)), z = simd_mul(s, s);
    simd_f sum = simd_fma(z, simd_set1(2.0f / 9), simd_set1(2.0f / 7));
    sum = simd_fma(z, sum, simd_set1(2.0f / 5));
    sum = simd_fma(z, sum, simd_set1(2.0f / 3));
    sum = simd_fma(z, sum, simd_set1(2.0f));
    return simd_fma(halvings, simd_set1(0.693147181f), simd_mul(s, sum));
}

static int weigh(float *weights, float *lse, const float *const *lses, int64_t parts, int64_t first, int64_t rows) {
    const simd_f lowest = simd_set1(-INFINITY), zero = simd_set1(0.0f), log2_e = simd_set1(1.44269504088896341f);
    int unseen = 0;
    for (int64_t row = 0; row < rows; row += SIMD_LANES) {
        simd_f most = lowest, sum = zero;
        for (int64_t n = 0; n < parts; n++) most = simd_max(most, load_as(lses[n] + first + row, rows - row, FASTATTN_FLOAT32));
        const simd_f base = simd_select(simd_eq(most, lowest), zero, most);
        for (int64_t n = 0; n < parts; n++) {
            const simd_f of = load_as(lses[n] + first + row, rows - row, FASTATTN_FLOAT32), weight = exp2_of(simd_sub(of, base), log2_e);
            unseen |= simd_any(simd_eq(of, lowest));
            simd_store(weights + n * FA_ROW_STEP + row, weight);
            sum = simd_add(sum, weight);
        }
        const simd_m nothing = simd_eq(sum, zero);
        const simd_f whole = simd_select(nothing, simd_set1(1.0f), sum);
        for (int64_t n = 0; n < parts; n++) {
            float *at = weights + n * FA_ROW_STEP + row;
            simd_store(at, simd_div(simd_load(at), whole));
        }
        store_as(lse + row, simd_select(nothing, lowest, simd_add(base, log_of(whole))), rows - row, FASTATTN_FLOAT32);
    }
    return !unseen;
}

FA_INLINE void mix_of(char *out, const float *weights, const void *const *rows_of, int64_t parts, int64_t rows, int64_t dim,
                      simd_f *checked, int native, fastattn_dtype dtype) {
    const int64_t size = fa_size_of(dtype), pair = 2 * SIMD_LANES * size;
    for (int64_t row = 0; row < rows; row++, weights++) {
        int64_t d = row * dim;
        const int64_t end = d + dim;
        for (; d + 4 * SIMD_LANES <= end; d += 4 * SIMD_LANES) {
            simd_f sum[4], x[4];
            FA_UNROLL for (int i = 0; i < 4; i++) sum[i] = simd_set1(0.0f);
            for (int64_t n = 0; n < parts; n++) {
                const simd_f weight = simd_set1(weights[n * FA_ROW_STEP]);
                FA_UNROLL for (int i = 0; i < 4; i += 2)
                    load_two((const char *)rows_of[n] + d * size + i / 2 * pair, &x[i], &x[i + 1], dtype, native);
                FA_UNROLL for (int i = 0; i < 4; i++) sum[i] = simd_fma(weight, x[i], sum[i]);
            }
            FA_UNROLL for (int i = 0; i < 4; i++) checked[i] = simd_fma(sum[i], simd_set1(0.0f), checked[i]);
            FA_UNROLL for (int i = 0; i < 4; i += 2) store_two(out + d * size + i / 2 * pair, sum[i], sum[i + 1], dtype, native);
        }
        for (; d < end; d += SIMD_LANES) {
            simd_f sum = simd_set1(0.0f);
            for (int64_t n = 0; n < parts; n++)
                sum = simd_fma(simd_set1(weights[n * FA_ROW_STEP]), load_as((const char *)rows_of[n] + d * size, end - d, dtype), sum);
            checked[0] = simd_fma(sum, simd_set1(0.0f), checked[0]);
            store_as(out + d * size, sum, end - d, dtype);
        }
    }
}

FA_INLINE int mix_by(void *out, const float *weights, const void *const *rows_of, int64_t parts, int64_t rows, int64_t dim,
                     fastattn_dtype dtype, int native) {
    const simd_f zero = simd_set1(0.0f);
    simd_f checked[4] = {zero, zero, zero, zero};
    FA_BY_STORAGE(dtype, mix_of, out, weights, rows_of, parts, rows, dim, checked, native)
    return were_finite(simd_add(simd_add(checked[0], checked[1]), simd_add(checked[2], checked[3])));
}

static int mix(void *out, const float *weights, const void *const *rows_of, int64_t parts, int64_t rows, int64_t dim,
               fastattn_dtype dtype) {
    return mix_by(out, weights, rows_of, parts, rows, dim, dtype, 0);
}
