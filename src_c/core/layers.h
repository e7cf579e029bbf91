/* What the layers of a transformer do to rows one by one, for the Python package, whose build asks for it
 * (-DFASTATTN_LAYERS): it is no part of the library's public interface. */
#ifndef FA_CORE_LAYERS_H
#define FA_CORE_LAYERS_H

#include "../ukernel/layers.h"

/* Normalisation of rows by themselves, behind a residual connection if there is one:
 *
 *     y   = x, or  x + add + add_bias
 *     out = (y - mean(y)) / sqrt(mean((y - mean(y))**2) + eps) * weight + bias       layer norm (Ba et al., 2016)
 *     out = y / sqrt(mean(y**2) + eps) * weight + bias                                RMS norm (Zhang and Sennrich, 2019)
 *
 * All is float32. Strides are in bytes and may be zero (those of outputs may not) or negative; last axes are contiguous. out or sum
 * may be x or add, with the same strides; they must not overlap each other, nor an input in any other way. */
typedef struct fastattn_norm_args {
    size_t size; /* sizeof(fastattn_norm_args) */
    int64_t outer, inner, width;
    const float *x;   /* (outer, inner, width) */
    const float *add; /* likewise, or null */
    float *sum;       /* likewise: y, or null; null without add */
    float *out;       /* likewise */
    int64_t x_strides[2], add_strides[2], sum_strides[2], out_strides[2];
    const float *add_bias;      /* (width), or null; null without add */
    const float *weight, *bias; /* (width); bias may be null */
    float eps;
    int centred; /* layer norm, else RMS norm */
    fastattn_isa isa;
    int num_threads;
    fastattn_threading threading;
} fastattn_norm_args;

fastattn_status fastattn_normalize(const fastattn_norm_args *args);

/* What stands between the two products of a feed-forward layer: out = f(x + bias), or, gated, with x and bias of twice the width,
 * out = f(first half) * second half. The largest error of f is 3e-7 of the larger of 1 and its value. All is float32. */
typedef struct fastattn_pointwise_args {
    size_t size;         /* sizeof(fastattn_pointwise_args) */
    int64_t rows, width; /* of out */
    fastattn_pointwise_kind kind;
    int gated;
    const float *x;               /* (rows, width), gated (rows, 2 * width) */
    float *out;                   /* (rows, width); it may be x with the same stride, and must not overlap it in any other way */
    int64_t x_stride, out_stride; /* of rows, in bytes */
    const float *bias;            /* (width), gated (2 * width), or null */
    fastattn_isa isa;
    int num_threads;
    fastattn_threading threading;
} fastattn_pointwise_args;

fastattn_status fastattn_pointwise(const fastattn_pointwise_args *args);

#endif
