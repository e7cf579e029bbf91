/* The contract of the kernels of layers: a table of its own for each instruction set, for they share nothing with attention's but lanes. */
#ifndef FA_LAYERS_H
#define FA_LAYERS_H

#include "ukernel.h"

/* Activations of a feed-forward layer. The largest error is 3e-7 of the larger of 1 and the value. */
typedef enum fastattn_pointwise_kind {
    FASTATTN_POINTWISE_GELU = 0,      /* x * Phi(x), by the error function (Hendrycks and Gimpel, 2016) */
    FASTATTN_POINTWISE_GELU_TANH = 1, /* its approximation, x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x**3))) */
    FASTATTN_POINTWISE_SILU = 2,      /* x / (1 + e**-x) */
    FASTATTN_POINTWISE_RELU = 3       /* max(x, 0) */
} fastattn_pointwise_kind;

/* A row of n numbers that is normalised: (y - mean) / sqrt(mean of (y - mean)**2 + eps) * weight + bias, where mean is 0 unless
 * `centred` and y is x, or x + add + add_bias, which then goes to sum too. out may be x or add, and so may sum, but out is not sum. */
typedef struct fa_norm {
    const float *x, *add, *add_bias, *weight, *bias; /* all but x and weight may be null */
    float *sum, *out;                                /* sum may be null */
    int64_t n;
    float eps;
    int centred;
} fa_norm;

/* A row of n numbers, out = f(x + bias) * (factor + factor_bias). out may be x. */
typedef struct fa_pointwise {
    const float *x, *bias, *factor, *factor_bias; /* all but x may be null */
    float *out;
    int64_t n;
    fastattn_pointwise_kind kind;
} fa_pointwise;

/* One row each. */
typedef struct fa_layers {
    void (*normalize)(const fa_norm *row);
    void (*pointwise)(const fa_pointwise *row);
} fa_layers;

extern const fa_layers fastattn_layers_portable, fastattn_layers_avx2, fastattn_layers_avx512, fastattn_layers_neon,
    fastattn_layers_wasm;

#endif
