/* Template: what layers do to a row by itself, for one instruction set. Lanes are numbers of the row. Include it once, as template.h,
 * of which it takes loads, stores and powers; what else is there has no user here and is dropped. */
#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wunused-function"
#endif
#include "layers.h"
#include "template.h"

/* x / 2 * erfc(-x / sqrt(2)), with half of erfc(|x| / sqrt(2)) as e**(-x**2 / 2) times a polynomial in t = 1 / (1 + 0.3 |x|): the one
 * of degree 8, without a constant, that has the smallest relative error (9e-8) up to |x| = 12, from where on the power is 0. */
FA_INLINE simd_f gelu_of(simd_f x) {
    const simd_f one = simd_set1(1.0f);
    const simd_f t = simd_div(one, simd_fma(simd_abs(x), simd_set1(0.3f), one));
    simd_f p = simd_set1(0x1.2cfecep-5f);
    p = simd_fma(p, t, simd_set1(-0x1.4b20b0p-3f));
    p = simd_fma(p, t, simd_set1(0x1.b68ee8p-3f));
    p = simd_fma(p, t, simd_set1(-0x1.f31b14p-5f));
    p = simd_fma(p, t, simd_set1(0x1.0f3e64p-3f));
    p = simd_fma(p, t, simd_set1(0x1.9459b2p-4f));
    p = simd_fma(p, t, simd_set1(0x1.ef686ep-4f));
    p = simd_fma(p, t, simd_set1(0x1.e9f2bep-4f));
    const simd_f below = simd_mul(simd_mul(p, t), exp2_of(simd_mul(x, x), simd_set1(-0x1.715476p-1f)));
    return simd_mul(x, simd_select(simd_lt(x, simd_set1(0.0f)), below, simd_sub(one, below)));
}

FA_INLINE simd_f pointwise_of(simd_f x, fastattn_pointwise_kind kind) {
    switch (kind) {
    case FASTATTN_POINTWISE_GELU: return gelu_of(x);
    case FASTATTN_POINTWISE_GELU_TANH: { /* 1 + tanh(y) is 2 / (1 + e**(-2 y)) */
        const simd_f cubic = simd_fma(simd_mul(x, x), simd_set1(0x1.2444f2p-4f), simd_set1(0x1.988454p+0f));
        return simd_mul(x, sigmoid_of(simd_mul(x, cubic)));
    }
    case FASTATTN_POINTWISE_SILU: return simd_mul(x, sigmoid_of(x));
    default: return simd_max(simd_set1(0.0f), x); /* which NaN passes */
    }
}

FA_INLINE simd_f layer_load(const float *at, int64_t left) { return load_as(at, left, FASTATTN_FLOAT32); }

FA_INLINE void pointwise_as(const fa_pointwise *row, fastattn_pointwise_kind kind) {
    for (int64_t j = 0; j < row->n; j += SIMD_LANES) {
        const int64_t left = row->n - j;
        simd_f x = layer_load(row->x + j, left);
        if (row->bias) x = simd_add(x, layer_load(row->bias + j, left));
        x = pointwise_of(x, kind);
        if (row->factor) {
            simd_f factor = layer_load(row->factor + j, left);
            if (row->factor_bias) factor = simd_add(factor, layer_load(row->factor_bias + j, left));
            x = simd_mul(x, factor);
        }
        store_as(row->out + j, x, left, FASTATTN_FLOAT32);
    }
}

static void pointwise(const fa_pointwise *row) {
    switch (row->kind) {
    case FASTATTN_POINTWISE_GELU: pointwise_as(row, FASTATTN_POINTWISE_GELU); break;
    case FASTATTN_POINTWISE_GELU_TANH: pointwise_as(row, FASTATTN_POINTWISE_GELU_TANH); break;
    case FASTATTN_POINTWISE_SILU: pointwise_as(row, FASTATTN_POINTWISE_SILU); break;
    default: pointwise_as(row, FASTATTN_POINTWISE_RELU);
    }
}

FA_INLINE float sum_of_lanes(simd_f a, simd_f b) {
    float lanes[SIMD_LANES], sum = 0;
    simd_store(lanes, simd_add(a, b));
    for (int i = 0; i < SIMD_LANES; i++) sum += lanes[i];
    return sum;
}

/* The numbers of a row without `mean`; in lanes beyond its end 0. */
FA_INLINE simd_f centred_load(const float *at, int64_t left, simd_f mean) {
    if (left >= SIMD_LANES) return simd_sub(simd_load(at), mean);
    float lanes[SIMD_LANES] = {0};
    for (int64_t i = 0; i < left; i++) lanes[i] = 1;
    return simd_mul(simd_sub(layer_load(at, left), mean), simd_load(lanes));
}

/* Three passes over a row that is in L1: its sum, that of its squares, and what becomes of it. Each sum has two vectors, so that its
 * error grows with an even smaller part of the row. */
static void normalize(const fa_norm *row) {
    const int64_t n = row->n;
    const float *x = row->x;
    simd_f even = simd_set1(0.0f), odd = even;
    if (row->add) {
        float *sum = row->sum ? row->sum : row->out;
        for (int64_t j = 0; j < n; j += SIMD_LANES) {
            simd_f y = simd_add(layer_load(x + j, n - j), layer_load(row->add + j, n - j));
            if (row->add_bias) y = simd_add(y, layer_load(row->add_bias + j, n - j));
            store_as(sum + j, y, n - j, FASTATTN_FLOAT32);
        }
        x = sum;
    }
    float mean = 0;
    if (row->centred) {
        for (int64_t j = 0; j < n; j += 2 * SIMD_LANES) {
            even = simd_add(even, layer_load(x + j, n - j));
            if (j + SIMD_LANES < n) odd = simd_add(odd, layer_load(x + j + SIMD_LANES, n - j - SIMD_LANES));
        }
        mean = sum_of_lanes(even, odd) / (float)n;
    }
    const simd_f shift = simd_set1(mean);
    even = odd = simd_set1(0.0f);
    for (int64_t j = 0; j < n; j += 2 * SIMD_LANES) {
        const simd_f a = centred_load(x + j, n - j, shift);
        even = simd_fma(a, a, even);
        if (j + SIMD_LANES < n) {
            const simd_f b = centred_load(x + j + SIMD_LANES, n - j - SIMD_LANES, shift);
            odd = simd_fma(b, b, odd);
        }
    }
    const simd_f scale = simd_set1(1.0f / sqrtf(sum_of_lanes(even, odd) / (float)n + row->eps));
    for (int64_t j = 0; j < n; j += SIMD_LANES) {
        simd_f y = simd_mul(simd_sub(layer_load(x + j, n - j), shift), simd_mul(scale, layer_load(row->weight + j, n - j)));
        if (row->bias) y = simd_add(y, layer_load(row->bias + j, n - j));
        store_as(row->out + j, y, n - j, FASTATTN_FLOAT32);
    }
}

#define FA_LAYERS_TABLE(suffix) const fa_layers fastattn_layers_##suffix = {.normalize = normalize, .pointwise = pointwise};
