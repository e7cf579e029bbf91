/* Attention in double precision, written from the prose at the top of fastattn.h and from nothing else. */
#include "problem.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

size_t dtype_size(fastattn_dtype dtype) {
    static const size_t sizes[] = {4, 2, 2, 8, 1};
    return sizes[dtype];
}

static double half_to_double(uint16_t bits) {
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    double magnitude = exponent == 31  ? (fraction ? (double)NAN : INFINITY)
                       : exponent == 0 ? ldexp(fraction, -24)
                                       : ldexp(1024 + fraction, exponent - 25);
    return bits >> 15 ? -magnitude : magnitude;
}

/* To nearest even. */
static uint16_t double_to_half(double value) {
    uint16_t sign = signbit(value) ? 0x8000 : 0;
    double magnitude = fabs(value);
    if (isnan(value))
        return 0x7E00;
    if (magnitude >= 65520)
        return sign | 0x7C00;
    int exponent = magnitude < 0x1p-14 ? -14 : ilogb(magnitude);
    /* the significand counts its leading 1, which adds 1 to the exponent field */
    return sign | (uint16_t)(((exponent + 14) << 10) + (int)nearbyint(ldexp(magnitude, 10 - exponent)));
}

double load(fastattn_dtype dtype, const void *address) {
    union {
        uint8_t byte;
        uint16_t half;
        uint32_t word;
        float single;
        double full;
    } x;
    memcpy(&x, address, dtype_size(dtype));
    switch (dtype) {
    case FASTATTN_FLOAT16:
        return half_to_double(x.half);
    case FASTATTN_BFLOAT16:
        x.word = (uint32_t)x.half << 16;
        return x.single;
    case FASTATTN_FLOAT64:
        return x.full;
    case FASTATTN_BOOL:
        return x.byte != 0;
    default:
        return x.single;
    }
}

void store(fastattn_dtype dtype, void *address, double value) {
    union {
        uint8_t byte;
        uint16_t half;
        uint32_t word;
        float single;
        double full;
    } x = {.full = value};
    switch (dtype) {
    case FASTATTN_FLOAT16:
        x.half = double_to_half(value);
        break;
    case FASTATTN_BFLOAT16:
        x.single = (float)value;
        x.word = isnan(value) ? 0x7FC0 : (x.word + 0x7FFF + (x.word >> 16 & 1)) >> 16;
        break;
    case FASTATTN_FLOAT64:
        break;
    case FASTATTN_BOOL:
        x.byte = (uint8_t)value;
        break;
    default:
        x.single = (float)value;
    }
    memcpy(address, &x, dtype_size(dtype));
}

void *element(const void *base, const int64_t strides[3], fastattn_dtype dtype, int64_t i0, int64_t i1, int64_t i2,
              int64_t i3) {
    return (char *)(uintptr_t)base + i0 * strides[0] + i1 * strides[1] + i2 * strides[2] +
           i3 * (int64_t)dtype_size(dtype);
}

/* Is row i's key j listed by the block mask? */
static int block_visible(const fastattn_attention_args *a, int64_t b, int64_t h, int64_t i, int64_t j) {
    const fastattn_block_mask *m = a->block_mask;
    int64_t row = b * m->batch_stride + h * m->head_stride + i / m->block_size;
    for (int64_t n = m->indptr[row]; n < m->indptr[row + 1]; n++) {
        if (m->indices[n] != j / m->block_size)
            continue;
        if (!m->partial || m->partial[n] < 0)
            return 1;
        int64_t row_bytes = (m->block_size + 7) / 8, bit = i % m->block_size;
        const uint8_t *bits = m->element_bits + (m->partial[n] * m->block_size + j % m->block_size) * row_bytes;
        return bits[bit / 8] >> bit % 8 & 1;
    }
    return 0;
}

struct rounding oracle_rounding(const fastattn_attention_args *a) {
    struct rounding rounding = {FLT_EPSILON / 2, FLT_EPSILON / 2, 0};
    fastattn_plan_info info = {.size = sizeof info};
    CHECK_STATUS(fastattn_explain(a, &info), FASTATTN_OK);
    if (strncmp(info.kernel, "float32_", 8) == 0)
        return rounding;
    if (strncmp(info.kernel, "int16_", 6) == 0) {
        rounding.score = rounding.column = 0x1p-12;
        rounding.weight = 0x1p-8;
    } else if (strncmp(info.kernel, "bfloat16_", 9) == 0) {
        rounding.weight = 0x1p-8;
        if (a->q_dtype != FASTATTN_BFLOAT16)
            rounding.score = 0x1p-8;
    } else if (a->precision == FASTATTN_PRECISION_HIGH)
        rounding.score = rounding.weight = 0x1p-15;
    else
        rounding.weight = 0x1p-16; /* a sum of two bfloat16, as the values are */
    return rounding;
}

/* The weight of a score where there is no softmax, and how far an error of the score may move it. */
static double activated(const fastattn_attention_args *a, int64_t b, double n, double s, double error, double *moved) {
    switch (a->activation) {
    case FASTATTN_SIGMOID: {
        double x = s + (a->activation_bias ? a->activation_bias[b] : -log(n)), weight = 1 / (1 + exp(-x));
        *moved = weight * (error + 2 * FLT_EPSILON * fabs(x));
        return weight;
    }
    case FASTATTN_RELU: *moved = error / n; return s < 0 ? 0 : s / n;
    default:
        *moved = a->power * pow(fabs(s) + error, a->power - 1) * (error + 2 * FLT_EPSILON * fabs(s)) / sqrt(n);
        return pow(s, a->power) / sqrt(n);
    }
}

/* The largest value of a column among the visible keys, and those that may share a block with them. */
static double largest_nearby(const fastattn_attention_args *a, int64_t b, int64_t h_kv, int64_t d, const char *visible,
                             int64_t length) {
    enum { BLOCK_KEYS = 64 };
    int64_t first = length, last = 0;
    for (int64_t j = 0; j < length; j++)
        if (visible[j]) {
            first = j < first ? j : first;
            last = j;
        }
    double largest = 0;
    for (int64_t j = first - BLOCK_KEYS < 0 ? 0 : first - BLOCK_KEYS; j < length && j <= last + BLOCK_KEYS; j++) {
        const double value = fabs(load(a->kv_dtype, element(a->v, a->v_strides, a->kv_dtype, b, h_kv, j, d)));
        if (isfinite(value)) largest = fmax(largest, value);
    }
    return largest;
}

/* x - y, or the end of what there is. */
static int64_t less(int64_t x, int64_t y) {
    if (y < 0 && x > INT64_MAX + y) return INT64_MAX;
    if (y > 0 && x < INT64_MIN + y) return INT64_MIN;
    return x - y;
}

void oracle_row(const fastattn_attention_args *a, int64_t b, int64_t h, int64_t i, struct rounding rounding,
                struct oracle_row *result) {
    const int64_t h_kv = h / (a->num_heads / a->num_kv_heads);
    const int64_t length = a->kv_lengths ? a->kv_lengths[b] : a->kv_len;
    const int64_t start = a->kv_starts ? a->kv_starts[b] : 0, queries = a->q_lengths ? a->q_lengths[b] : a->q_len;
    const int64_t offset = a->query_offset ? a->query_offset[b] : length - queries;
    double *s = malloc((size_t)(length + 1) * sizeof *s);         /* scores; the last is the sink */
    double *terms = malloc((size_t)(length + 1) * sizeof *terms); /* the sum of the magnitudes a score is made of */
    char *visible = calloc((size_t)length + 1, 1);
    double maximum = -INFINITY;
    CHECK(s && terms && visible, "out of memory");

    result->visible = 0;
    for (int64_t j = i < queries ? start : length; j < length; j++) {
        double bias = 0;
        if (a->mask) {
            bias = load(a->mask_dtype, (const char *)a->mask + b * a->mask_strides[0] + h * a->mask_strides[1] +
                                           i * a->mask_strides[2] + j * a->mask_strides[3]);
            if (a->mask_dtype == FASTATTN_BOOL ? bias == 0 : bias == -(double)INFINITY)
                continue;
            if (a->mask_dtype == FASTATTN_BOOL)
                bias = 0;
        }
        const int64_t behind = less(offset, j - i); /* its query */
        if ((a->causal && behind < 0) || (a->window_left >= 0 && behind > a->window_left) ||
            (a->window_right >= 0 && behind < -a->window_right) || (a->block_mask && !block_visible(a, b, h, i, j)))
            continue;

        double dot = 0, magnitude = 0;
        for (int64_t d = 0; d < a->head_dim; d++) {
            double x = load(a->q_dtype, element(a->q, a->q_strides, a->q_dtype, b, h, i, d));
            double y = load(a->kv_dtype, element(a->k, a->k_strides, a->kv_dtype, b, h_kv, j, d));
            double term = x * y;
            if (a->additive) {
                double weight = ((const float *)((const char *)a->additive + h * a->additive_stride))[d];
                term = weight * tanh(x + y);
                magnitude += 6 * fabs(weight); /* of a tanh of a rounded sum */
            }
            dot += term;
            magnitude += fabs(term);
        }
        double score = a->scale * dot;
        magnitude *= fabs(a->scale);
        if (a->softcap > 0) {
            score = a->softcap * tanh(score / a->softcap);
            magnitude += a->softcap;
        }
        if (a->score_function) {
            float changed = (float)score;
            a->score_function(&changed, 1, b, h, i, j, a->score_context);
            score = changed;
            magnitude += fabs(score);
        }
        score += bias;
        magnitude += fabs(bias);
        if (a->alibi_slopes) {
            double distance = fabs((double)behind);
            double slope =
                *(const float *)((const char *)a->alibi_slopes + b * a->alibi_strides[0] + h * a->alibi_strides[1]);
            score -= slope * distance;
            magnitude += fabs(slope * distance);
        }
        visible[j] = 1;
        s[j] = score;
        terms[j] = magnitude;
        result->visible++;
        if (!(score <= maximum)) /* so that a NaN stays */
            maximum = isnan(maximum) ? maximum : score;
    }
    visible[length] = a->sinks != NULL;
    if (a->sinks) {
        s[length] = a->sinks[h];
        terms[length] = fabs(s[length]);
        maximum = isnan(maximum) ? maximum : fmax(maximum, s[length]);
    }

    double sum = 0, unsure = 0; /* the denominator, and how much of it the rounding of scores may move */
    for (int64_t d = 0; d < a->v_head_dim; d++)
        result->out[d] = result->out_tolerance[d] = 0;
    if (result->visible == 0) {
        result->lse = a->sinks && i < queries ? s[length] : -(double)INFINITY;
        result->lse_tolerance = 0;
    } else if (a->activation != FASTATTN_SOFTMAX) {
        const double accumulation = FLT_EPSILON / 2 * (8 + sqrt((double)length));
        for (int64_t j = 0; j < length; j++) {
            if (!visible[j])
                continue;
            double moved, weight = activated(a, b, (double)(length - start), s[j], 2 * rounding.score * terms[j], &moved);
            for (int64_t d = 0; d < a->v_head_dim; d++) {
                double value = load(a->kv_dtype, element(a->v, a->v_strides, a->kv_dtype, b, h_kv, j, d));
                result->out[d] += weight * value;
                result->out_tolerance[d] += fabs(value) * (moved + fabs(weight) * accumulation);
            }
        }
        for (int64_t d = 0; d < a->v_head_dim; d++)
            result->out_tolerance[d] += fabs(result->out[d]) * (a->q_dtype == FASTATTN_FLOAT16    ? 0x1p-11
                                                                : a->q_dtype == FASTATTN_BFLOAT16 ? 0x1p-8
                                                                                                  : 0x1p-24) + 0x1p-25;
    } else {
        const double accumulation = FLT_EPSILON / 2 * (8 + sqrt((double)length)); /* of sums over the keys */
        for (int64_t j = 0; j <= length; j++) {
            if (!visible[j])
                continue;
            s[j] = exp(s[j] - maximum);
            sum += s[j];
            terms[j] = isfinite(terms[j]) ? 2 * rounding.score * (terms[j] + fabs(maximum)) : 0;
            unsure += s[j] * terms[j];
        }
        for (int64_t j = 0; j < length; j++) {
            if (!visible[j])
                continue;
            double weight = s[j] / sum;
            for (int64_t d = 0; d < a->v_head_dim; d++) {
                double value = load(a->kv_dtype, element(a->v, a->v_strides, a->kv_dtype, b, h_kv, j, d));
                result->out[d] += weight * value;
                result->out_tolerance[d] += weight * fabs(value) * (terms[j] + 2 * rounding.weight + accumulation);
            }
        }
        for (int64_t d = 0; d < a->v_head_dim && rounding.column > 0; d++)
            result->out_tolerance[d] += rounding.column * largest_nearby(a, b, h_kv, d, visible, length);
        result->lse = maximum + log(sum);
        result->lse_tolerance = unsure / sum + accumulation + rounding.weight + 2 * FLT_EPSILON * fabs(result->lse);
        for (int64_t d = 0; d < a->v_head_dim; d++) {
            double out = fabs(result->out[d]);
            result->out_tolerance[d] += out * unsure / sum +
                                        (a->q_dtype == FASTATTN_FLOAT16    ? out * 0x1p-11 + 0x1p-25
                                         : a->q_dtype == FASTATTN_BFLOAT16 ? out * 0x1p-8
                                                                           : out * 0x1p-24) +
                                        FLT_MIN;
        }
    }
    free(s);
    free(terms);
    free(visible);
}
