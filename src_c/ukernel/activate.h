/* Template: weights that are not a softmax. They are functions of one score, so that nothing here knows how scores lie. */

/* 1 / (1 + e**-x). */
FA_INLINE simd_f sigmoid_of(simd_f x) {
    const simd_f one = simd_set1(1.0f), e = exp2_of(simd_abs(x), simd_set1(-0x1.715476p+0f));
    const simd_f above = simd_div(one, simd_add(one, e));
    return simd_select(simd_lt(x, simd_set1(0.0f)), simd_mul(e, above), above);
}

FA_INLINE simd_f power_of(simd_f x, int power) {
    simd_f result = simd_set1(1.0f);
    for (;; x = simd_mul(x, x)) {
        if (power & 1) result = simd_mul(result, x);
        if (!(power >>= 1)) return result;
    }
}

/* The kind, and the powers that are common, are constants. Comparisons are such that a NaN stays one. */
FA_INLINE void activate_of(float *s, int64_t ld, int64_t lines, int64_t n, const fa_activation *by, fastattn_activation kind,
                           int power) {
    const simd_f zero = simd_set1(0.0f), hidden = simd_set1(-INFINITY), bias = simd_set1(by->bias);
    const simd_f scale = simd_set1(kind == FASTATTN_RELU ? by->scale * by->factor : by->scale), factor = simd_set1(by->factor);
    for (int64_t i = 0; i < lines; i++, s += ld)
        for (int64_t j = 0; j < n; j += SIMD_LANES) {
            const simd_f x = simd_load(s + j);
            simd_f weight;
            switch (kind) {
            case FASTATTN_SIGMOID: weight = sigmoid_of(simd_fma(x, scale, bias)); break;
            case FASTATTN_RELU: weight = simd_select(simd_lt(x, zero), zero, simd_mul(x, scale)); break;
            default: {
                const simd_f all = simd_mul(power_of(simd_mul(x, scale), power), factor);
                weight = simd_select(simd_eq(x, hidden), zero, all);
            }
            }
            simd_store(s + j, weight);
        }
}

static void activate(float *s, int64_t ld, int64_t lines, int64_t n, const fa_activation *by) {
    switch (by->kind) {
    case FASTATTN_SIGMOID: activate_of(s, ld, lines, n, by, FASTATTN_SIGMOID, 0); break;
    case FASTATTN_RELU: activate_of(s, ld, lines, n, by, FASTATTN_RELU, 0); break;
    default:
        switch (by->power) {
        case 2: activate_of(s, ld, lines, n, by, FASTATTN_POLYNOMIAL, 2); break;
        case 3: activate_of(s, ld, lines, n, by, FASTATTN_POLYNOMIAL, 3); break;
        default: activate_of(s, ld, lines, n, by, FASTATTN_POLYNOMIAL, by->power);
        }
    }
}
