/* Template: algebra on dense row-major matrices in float32 (fa_dense in ukernel.h). Lanes are columns; the product is the register
 * tile of tile.h. */

/* Runs do not depend on k, so that terms of 0 at the end change nothing. */
static void dense_product(float *c, int64_t ldc, const float *alpha, const float *a, int64_t across, int64_t along, const float *b,
                          int64_t ldb, int64_t m, int64_t n, int64_t k) {
    const tile_operands x = {.c = c, .c_ld = ldc, .alpha = alpha, .a = a, .across = across, .along = along, TILE_PANEL(b, ldb),
                             .steps = k, .run = 32};
    product((int)n, m, &x);
}

/* Subnormal numbers, which cost a hundred cycles wherever they go, become 0. */
FA_INLINE simd_f normal_or_zero(simd_f x) {
    return simd_select(simd_lt(simd_abs(x), simd_set1(FLT_MIN)), simd_set1(0.0f), x);
}

static void dense_dots(float *to, const float *x, int64_t ld, int64_t rows, const float *z, int64_t n) {
    for (int64_t i = 0; i < rows; i += SIMD_LANES) {
        simd_f sum[SIMD_LANES];
        FA_UNROLL for (int r = 0; r < SIMD_LANES; r++) sum[r] = simd_set1(0.0f);
        for (int64_t d = 0; d < n; d += SIMD_LANES) {
            const simd_f factor = simd_load(z + d);
            FA_UNROLL for (int r = 0; r < SIMD_LANES; r++) sum[r] = simd_fma(simd_load(x + (i + r) * ld + d), factor, sum[r]);
        }
        simd_store(to + i, simd_sum_lanes(sum));
    }
}

static void dense_scale(float *x, int64_t ld, int64_t rows, int64_t n, const float *f, int64_t f_row, int f_column) {
    for (int64_t i = 0; i < rows; i++, x += ld, f += f_row)
        if (f_column)
            for (int64_t d = 0; d < n; d += SIMD_LANES)
                simd_store(x + d, normal_or_zero(simd_mul(simd_load(x + d), simd_load(f + d))));
        else
            for (int64_t d = 0; d < n; d += SIMD_LANES)
                simd_store(x + d, normal_or_zero(simd_mul(simd_load(x + d), simd_set1(*f))));
}

static void dense_running(float *to, const float *a, int64_t ld, int64_t rows, int64_t n, int backward) {
    for (int64_t d = 0; d < n; d += SIMD_LANES) {
        simd_f x = simd_set1(1.0f);
        for (int64_t i = 0; i < rows; i++) {
            const int64_t at = (backward ? rows - 1 - i : i) * ld + d;
            if (backward) simd_store(to + at, x);
            x = normal_or_zero(simd_mul(x, simd_load(a + at)));
            if (!backward) simd_store(to + at, x);
        }
    }
}

static void dense_rank_one(float *to, int64_t ld_to, const float *from, int64_t ld_from, const float *f, int64_t f_step,
                           const float *a, const float *b, int64_t rows, int64_t n) {
    for (int64_t i = 0; i < rows; i++) {
        const simd_f factor = simd_set1(f[i * f_step]), element = simd_set1(a[i]);
        for (int64_t d = 0; d < n; d += SIMD_LANES) {
            const simd_f x = simd_fma(element, simd_load(b + d), simd_mul(factor, simd_load(from + i * ld_from + d)));
            simd_store(to + i * ld_to + d, normal_or_zero(x));
        }
    }
}

/* e**x for x <= 0 (or NaN) to an ulp; 0 where that would be subnormal. x = n ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts of which
 * n times the first is exact, and e**r by the polynomial of Cephes' expf. */
FA_INLINE simd_f exp_of(simd_f x) {
    const simd_f shift = simd_set1(0x1.8p23f), shifted = simd_fma(x, simd_set1(0x1.715476p+0f), shift), n = simd_sub(shifted, shift);
    simd_f r = simd_fma(n, simd_set1(-0.693359375f), x);
    r = simd_fma(n, simd_set1(2.12194440e-4f), r);
    simd_f p = simd_set1(1.9875691500e-4f);
    p = simd_fma(p, r, simd_set1(1.3981999507e-3f));
    p = simd_fma(p, r, simd_set1(8.3334519073e-3f));
    p = simd_fma(p, r, simd_set1(4.1665795894e-2f));
    p = simd_fma(p, r, simd_set1(1.6666665459e-1f));
    p = simd_fma(p, r, simd_set1(5.0000001201e-1f));
    p = simd_add(simd_fma(p, simd_mul(r, r), r), simd_set1(1.0f));
    return simd_scale2(simd_lt(x, simd_set1(-87.0f)), p, n);
}

static void dense_exps(float *x, int64_t n) {
    for (int64_t d = 0; d < n; d += SIMD_LANES) simd_store(x + d, exp_of(simd_load(x + d)));
}

/* A NaN is not less than 0, and stays. */
static void dense_features(float *x, int64_t n, fastattn_feature_map map) {
    const simd_f zero = simd_set1(0.0f), one = simd_set1(1.0f);
    if (map == FASTATTN_FEATURE_IDENTITY) return;
    for (int64_t d = 0; d < n; d += SIMD_LANES) {
        const simd_f at = simd_load(x + d);
        const simd_f below = map == FASTATTN_FEATURE_ELU ? exp_of(at) : zero, above = map == FASTATTN_FEATURE_ELU ? simd_add(at, one) : at;
        simd_store(x + d, simd_select(simd_lt(at, zero), below, above));
    }
}

FA_INLINE void outside_of(simd_m *found, const char *x, int64_t stride, int64_t rows, int64_t n, simd_f low, simd_f high,
                          fastattn_dtype dtype) {
    for (int64_t i = 0; i < rows; i++, x += stride) {
        int64_t d = 0;
        for (; d + SIMD_LANES <= n; d += SIMD_LANES) {
            const simd_f at = load_full(x + d * fa_size_of(dtype), dtype);
            *found = simd_or(*found, simd_or(simd_lt(at, low), simd_lt(high, at)));
        }
        for (; d < n; d++) { /* one by one: the lanes beyond the end hold zeros, which may be outside */
            const simd_f at = simd_set1(fa_get(x + d * fa_size_of(dtype), dtype));
            *found = simd_or(*found, simd_or(simd_lt(at, low), simd_lt(high, at)));
        }
    }
}

static int dense_outside(fa_matrix x, int64_t rows, int64_t n, float low, float high) {
    const simd_f bottom = simd_set1(low), top = simd_set1(high);
    simd_m found = simd_lt(top, top);
    FA_BY_STORAGE(x.dtype, outside_of, &found, x.at, x.stride, rows, n, bottom, top)
    return simd_any(found);
}
