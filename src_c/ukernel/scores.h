/* Template: everything that happens to a score between the product and the softmax, and the tile of a mask. */

/* tanh(x): odd polynomial (the Taylor series to x**11, error 1e-8) up to 0.35, then (1 - e) / (1 + e) with
 * e = exp(-2|x|), whose subtraction loses no more than a bit there. */
FA_INLINE simd_f tanh_of(simd_f x) {
    simd_f magnitude = simd_abs(x), square = simd_mul(x, x), one = simd_set1(1.0f);
    simd_f series = simd_set1(-1382.0f / 155925.0f);
    series = simd_fma(series, square, simd_set1(62.0f / 2835.0f));
    series = simd_fma(series, square, simd_set1(-17.0f / 315.0f));
    series = simd_fma(series, square, simd_set1(2.0f / 15.0f));
    series = simd_fma(series, square, simd_set1(-1.0f / 3.0f));
    series = simd_fma(simd_mul(series, square), x, x);
    simd_f e = exp2_of(magnitude, simd_set1(-2.885390081777927f));
    simd_f ratio = simd_div(simd_sub(one, e), simd_add(one, e));
    ratio = simd_select(simd_lt(x, simd_set1(0.0f)), simd_sub(simd_set1(0.0f), ratio), ratio);
    return simd_select(simd_lt(magnitude, simd_set1(0.35f)), series, ratio);
}

/* Constants tell which rules there are, so that each combination in use gets a loop without questions. */
FA_INLINE void scores_of(float *s, ptrdiff_t ld, int rows, int64_t first, int64_t keys, const fa_score_rules *rules,
                         float *seen, int bends, int sloped, int bounded, int biased) {
    const simd_f hidden = simd_set1(-INFINITY), zero = simd_set1(0.0f), one = simd_set1(1.0f);
    const simd_f scale = simd_set1(rules->scale), cap = simd_set1(rules->softcap);
    for (int row = 0; row < rows; row += SIMD_LANES) {
        simd_f slope = zero, offset = zero, begin = zero, end = zero;
        if (sloped) slope = simd_load(rules->slopes + row), offset = simd_load(rules->offset + row);
        if (bounded) begin = simd_load(rules->begin + row), end = simd_load(rules->end + row);
        simd_f visible = simd_load(seen + row);
        for (int64_t j = 0; j < keys; j++) {
            float *at = s + j * ld + row;
            simd_f x = simd_mul(simd_load(at), scale), key = simd_set1((float)(first + j)), shown = one;
            if (bends) x = simd_mul(cap, tanh_of(simd_div(x, cap)));
            if (biased) {
                simd_f bias = simd_load(rules->bias + j * ld + row);
                simd_m hides = simd_eq(bias, hidden);
                x = simd_select(hides, hidden, simd_add(x, bias));
                shown = simd_select(hides, zero, shown);
            }
            if (sloped) x = simd_sub(x, simd_mul(slope, simd_abs(simd_sub(offset, key))));
            if (bounded) {
                simd_m inside = simd_lt(key, end), before = simd_lt(key, begin);
                x = simd_select(before, hidden, simd_select(inside, x, hidden));
                shown = simd_select(before, zero, simd_select(inside, shown, zero));
            }
            simd_store(at, x);
            visible = simd_max(visible, shown);
        }
        simd_store(seen + row, visible);
    }
}

static void scores(float *s, int ld, int rows, int64_t first, int64_t keys, const fa_score_rules *rules, float *seen) {
    const int bends = rules->softcap != 0.0f, sloped = rules->slopes != NULL;
    const int bounded = rules->end != NULL, biased = rules->bias != NULL;
    if (bends || sloped) scores_of(s, ld, rows, first, keys, rules, seen, bends, sloped, bounded, biased);
    else if (biased && bounded) scores_of(s, ld, rows, first, keys, rules, seen, 0, 0, 1, 1);
    else if (biased) scores_of(s, ld, rows, first, keys, rules, seen, 0, 0, 0, 1);
    else scores_of(s, ld, rows, first, keys, rules, seen, 0, 0, bounded, 0);
}

/* One element of a mask as a bias. */
FA_INLINE float mask_element(const void *at, fastattn_dtype dtype) {
    switch (dtype) {
    case FASTATTN_BOOL: return *(const uint8_t *)at ? 0.0f : -INFINITY;
    case FASTATTN_FLOAT64: {
        /* A finite bias beyond float32 stays finite: only exact -inf hides. */
        const double x = *(const double *)at;
        return x < -FLT_MAX && x >= -DBL_MAX ? -FLT_MAX : x > FLT_MAX && x <= DBL_MAX ? FLT_MAX : (float)x;
    }
    default: return fa_get(at, dtype);
    }
}

/* What has been seen of a mask. */
typedef struct mask_census {
    simd_m hidden, shown;
} mask_census;

FA_INLINE void mask_store(float *to, simd_f bias, mask_census *seen) {
    const simd_m hides = simd_eq(bias, simd_set1(-INFINITY));
    seen->hidden = simd_or(seen->hidden, hides);
    seen->shown = simd_or(seen->shown, simd_not(hides));
    simd_store(to, bias);
}

FA_INLINE unsigned mask_of(float *tile, int ld, const void *const *rows_of, int rows, int64_t key_stride, int64_t keys,
                           fastattn_dtype dtype) {
    const int64_t itemsize = fa_size_of(dtype);
    const simd_m none = simd_lt(simd_set1(0.0f), simd_set1(0.0f));
    mask_census seen = {none, none};
    for (int row = 0; row < rows; row += SIMD_LANES) {
        const void *const *from = rows_of + row;
        int shared = 1;
        for (int i = 1; i < SIMD_LANES; i++) shared &= from[i] == from[0];
        int64_t j = 0;
        if (shared) /* as the heads of one query may */
            for (; j < keys; j++)
                mask_store(tile + j * ld + row, simd_set1(mask_element((const char *)from[0] + j * key_stride, dtype)), &seen);
        else if (key_stride == itemsize && dtype != FASTATTN_FLOAT64)
            for (; j + SIMD_LANES <= keys; j += SIMD_LANES) {
                simd_f square[SIMD_LANES];
                FA_UNROLL for (int i = 0; i < SIMD_LANES; i++)
                    square[i] = load_full((const char *)from[i] + j * itemsize, dtype);
                simd_transpose(square);
                FA_UNROLL for (int i = 0; i < SIMD_LANES; i++)
                    mask_store(tile + (j + i) * ld + row, square[i], &seen);
            }
        for (; j < keys; j++) {
            float lanes[SIMD_LANES];
            for (int i = 0; i < SIMD_LANES; i++)
                lanes[i] = mask_element((const char *)from[i] + j * key_stride, dtype);
            mask_store(tile + j * ld + row, simd_load(lanes), &seen);
        }
    }
    return (simd_any(seen.shown) ? FA_MASK_SHOWS : 0u) | (simd_any(seen.hidden) ? FA_MASK_HIDES : 0u);
}

static unsigned mask(float *tile, int ld, const void *const *rows_of, int rows, int64_t key_stride, int64_t keys,
                     fastattn_dtype dtype) {
    switch (dtype) {
    case FASTATTN_BOOL: return mask_of(tile, ld, rows_of, rows, key_stride, keys, FASTATTN_BOOL);
    case FASTATTN_FLOAT64: return mask_of(tile, ld, rows_of, rows, key_stride, keys, FASTATTN_FLOAT64);
    case FASTATTN_FLOAT16: return mask_of(tile, ld, rows_of, rows, key_stride, keys, FASTATTN_FLOAT16);
    case FASTATTN_BFLOAT16: return mask_of(tile, ld, rows_of, rows, key_stride, keys, FASTATTN_BFLOAT16);
    default: return mask_of(tile, ld, rows_of, rows, key_stride, keys, FASTATTN_FLOAT32);
    }
}
