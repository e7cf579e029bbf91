/* Template: quantised keys and values, whose integers become numbers in registers, and what makes integers of numbers. Include it once, as
 * template.h, of which it takes loads, stores and what rows.h knows of keys; what else is there has no user here and is dropped.
 *
 * The products are those of rows.h for few rows: lanes are numbers, and up to four rows share what a key or value is turned into. Reads
 * per key: its integers once from memory, and again from the first-level cache for every four rows more; a block is small. */

#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wunused-function"
#endif
#include "quantised.h"
#include "template.h"

enum { QUANTISED_ROWS = 4, GROUP_VECTORS = FA_GROUP / SIMD_LANES };

/* Calls f(..., dtype) with the storage type as a constant. */
#define FA_BY_QUANTISED(dtype, f, ...)                      \
    if ((dtype) == FASTATTN_INT8) f(__VA_ARGS__, FASTATTN_INT8); \
    else f(__VA_ARGS__, FASTATTN_INT4)

/* Vector v of the group of numbers that begins with d, of which int8 may have fewer, as integers. */
FA_INLINE simd_f load_integers(const char *row, int64_t d, int v, int64_t dim, fastattn_dtype dtype) {
    if (dtype == FASTATTN_INT4) return simd_load_i4(row + d / 2 + v * SIMD_LANES % 16, v * SIMD_LANES >= 16);
    d += v * SIMD_LANES;
    if (d + SIMD_LANES <= dim) return simd_load_i8(row + d);
    char part[SIMD_LANES] = {0};
    for (int64_t i = d; i < dim; i++) part[i - d] = row[i];
    return simd_load_i8(part);
}

FA_INLINE void widen_quantised_of(float *to, fa_matrix from, int64_t keys, int64_t dim, fastattn_dtype dtype) {
    for (int64_t j = 0; j < keys; j++, to += dim) {
        const char *row = fa_row_at(from, j);
        for (int64_t d = 0; d < dim; d += FA_GROUP) {
            const simd_f scale = simd_set1(fa_scale_at(row, d, dim, dtype));
            FA_UNROLL for (int v = 0; v < GROUP_VECTORS; v++) {
                const int64_t left = dim - d - v * SIMD_LANES;
                if (left > 0) store_as(to + d + v * SIMD_LANES, simd_mul(load_integers(row, d, v, dim, dtype), scale), left, FASTATTN_FLOAT32);
            }
        }
    }
}

static void widen_quantised(float *to, fa_matrix from, int64_t keys, int64_t head_dim) {
    FA_BY_QUANTISED(from.dtype, widen_quantised_of, to, from, keys, head_dim);
}

static int scales_finite(fa_matrix rows, int64_t keys, int64_t dim) {
    const int64_t step = rows.dtype == FASTATTN_INT8 ? dim : FA_GROUP;
    float sum = 0.0f;
    for (int64_t j = 0; j < keys; j++)
        for (int64_t d = 0; d < dim; d += step) /* times any integer that a byte holds */
            sum += 128.0f * fa_scale_at(fa_row_at(rows, j), d, dim, rows.dtype) * 0.0f;
    return sum == 0.0f;
}

/* Key n of a block, or its last. */
FA_INLINE const char *key_at(const tile_rows *k, int64_t n, int64_t keys) { return tile_row(k, n < keys ? n : keys - 1); }

/* Asks for all of what will be read in the place of a key. */
FA_INLINE void fetch_key(const tile_rows *k, int64_t n, int64_t keys, int64_t bytes) {
    const uintptr_t later = tile_later(k, n < keys ? n : keys - 1);
    for (int64_t at = 0; at < bytes; at += 64) simd_fetch((const char *)(later + (uintptr_t)at));
}

/* The scores of some keys from `first` on, by the sums of their products; those beyond the block's end, up to whole vectors, may be
 * written. The scale of int8 comes last. */
FA_INLINE void put_scores(int rows, int tile_keys, float *s, int ld, const simd_f *sum, const tile_rows *k, int64_t first, int64_t keys,
                          int64_t dim, fastattn_dtype dtype) {
    float dots[16], scales[16];
    FA_UNROLL for (int j = 0; j < tile_keys; j++) {
        const float scale = dtype == FASTATTN_INT8 ? fa_scale_at(key_at(k, first + j, keys), 0, dim, dtype) : 1.0f;
        FA_UNROLL for (int r = 0; r < rows; r++) scales[r * tile_keys + j] = scale;
    }
    FA_UNROLL for (int i = 0; i < rows * tile_keys; i += SIMD_LANES) {
        const simd_f all = simd_sum_lanes(sum + i);
        simd_store(dots + i, dtype == FASTATTN_INT8 ? simd_mul(all, simd_load(scales + i)) : all);
    }
    FA_UNROLL for (int r = 0; r < rows; r++) memcpy(s + r * ld + first, dots + r * tile_keys, (size_t)tile_keys * sizeof(float));
}

/* The products of key n with `rows` rows, a constant, number by number, as key_products makes them. */
FA_INLINE void quantised_products(int rows, simd_f *sum, int apart, const float *q, int64_t pitch, const tile_rows *k, int64_t n,
                                  int64_t keys, int64_t dim, fastattn_dtype dtype) {
    const char *key = key_at(k, n, keys);
    simd_f products[QUANTISED_ROWS];
    fetch_key(k, n, keys, fa_row_bytes(dtype, dim));
    FA_UNROLL for (int r = 0; r < rows; r++) products[r] = simd_set1(0.0f);
    for (int64_t d = 0; d < dim; d += FA_GROUP) {
        const simd_f scale = simd_set1(dtype == FASTATTN_INT4 ? fa_scale_at(key, d, dim, dtype) : 1.0f);
        FA_UNROLL for (int v = 0; v < GROUP_VECTORS; v++) {
            if (d + v * SIMD_LANES >= dim) break;
            simd_f numbers = load_integers(key, d, v, dim, dtype);
            if (dtype == FASTATTN_INT4) numbers = simd_mul(numbers, scale);
            FA_UNROLL for (int r = 0; r < rows; r++)
                products[r] = simd_fma(numbers, simd_load(q + r * pitch + d + v * SIMD_LANES), products[r]);
        }
    }
    FA_UNROLL for (int r = 0; r < rows; r++) sum[r * apart] = products[r];
}

/* The scores of `rows` rows as short_scores makes them. */
FA_INLINE void quantised_scores(int rows, float *s, int ld, const float *q, int64_t pitch, const tile_rows *k, int64_t keys, int64_t dim,
                                fastattn_dtype dtype) {
    const int tile_keys = SHORT_SUMS / rows;
    for (int64_t first = 0; first < keys; first += tile_keys) {
        simd_f sum[SHORT_SUMS];
        if (rows == 4 && SIMD_LANES > 4) /* of short vectors a key takes so many that a loop over keys is nothing beside them */
            FA_UNROLL for (int j = 0; j < SHORT_SUMS / 4; j++)
                quantised_products(4, sum + j, SHORT_SUMS / 4, q, pitch, k, first + j, keys, dim, dtype);
        else
            for (int j = 0; j < tile_keys; j++)
                quantised_products(rows, sum + j, tile_keys, q, pitch, k, first + j, keys, dim, dtype);
        put_scores(rows, tile_keys, s, ld, sum, k, first, keys, dim, dtype);
    }
}

FA_INLINE void quantised_qk_of(float *s, const float *q, int ld, int rows, fa_matrix k, int64_t keys, int64_t dim, fastattn_dtype dtype) {
    const int64_t pitch = fa_round_up(dim, FA_ROW_STEP);
    const char *first_row;
    const tile_rows x = tile_rows_of(k, &first_row);
    for (; rows >= 4; rows -= 4, s += 4 * ld, q += 4 * pitch) quantised_scores(4, s, ld, q, pitch, &x, keys, dim, dtype);
    if (rows & 2) quantised_scores(2, s, ld, q, pitch, &x, keys, dim, dtype);
    if (rows & 1) quantised_scores(1, s + (rows - 1) * ld, ld, q + (rows - 1) * pitch, pitch, &x, keys, dim, dtype);
}

static void quantised_qk(float *s, const float *q, int ld, int rows, fa_matrix k, int64_t from, int64_t keys, int64_t head_dim) {
    const fa_matrix block = fa_rows_from(k, from);
    FA_BY_QUANTISED(k.dtype, quantised_qk_of, s, q, ld, rows, block, keys, head_dim);
}

/* Where queries are multiplied as integers: numbers of a head, at most, for their sums and for what is kept of a row; and the scores of one
 * that is no integers, but kept as it was given. */
enum { INTEGERS_MOST_DIM = 1024 };

static FA_NOINLINE void scores_of_numbers(float *s, const void *row, fastattn_dtype kept, int ld, fa_matrix k, int64_t from, int64_t keys,
                                          int64_t dim) {
    float numbers[INTEGERS_MOST_DIM];
    rows_pack(numbers, ld, &row, 1, dim, kept, 1.0f);
    quantised_qk(s, numbers, ld, 1, k, from, keys, dim);
}

/* A group of values of `rows` rows, a constant: powers take the scales. */
FA_INLINE void quantised_group(int rows, float *o, int64_t pitch, const float *alpha, const float *p, int ld, fa_matrix v, int64_t keys,
                               int64_t d, int64_t dim, fastattn_dtype dtype) {
    simd_f sum[QUANTISED_ROWS][GROUP_VECTORS];
    FA_UNROLL for (int r = 0; r < rows; r++)
        FA_UNROLL for (int i = 0; i < GROUP_VECTORS; i++) sum[r][i] = simd_set1(0.0f);
    for (int64_t j = 0; j < keys; j++) {
        const char *row = fa_row_at(v, j);
        const float scale = fa_scale_at(row, d, dim, dtype);
        simd_f numbers[GROUP_VECTORS];
        simd_fetch((const char *)(fa_row_ahead(v, j) + (uintptr_t)d));
        FA_UNROLL for (int i = 0; i < GROUP_VECTORS; i++)
            numbers[i] = d + i * SIMD_LANES < dim ? load_integers(row, d, i, dim, dtype) : simd_set1(0.0f);
        FA_UNROLL for (int r = 0; r < rows; r++) {
            const simd_f power = simd_set1(p[r * ld + j] * scale);
            FA_UNROLL for (int i = 0; i < GROUP_VECTORS; i++) sum[r][i] = simd_fma(power, numbers[i], sum[r][i]);
        }
    }
    FA_UNROLL for (int r = 0; r < rows; r++)
        FA_UNROLL for (int i = 0; i < GROUP_VECTORS; i++) {
            float *to = o + r * pitch + d + i * SIMD_LANES;
            if (d + i * SIMD_LANES < dim) simd_store(to, simd_fma(simd_load(to), simd_set1(alpha[r]), sum[r][i]));
        }
}

FA_INLINE void quantised_pv_of(float *o, const float *alpha, const float *p, int ld, int rows, fa_matrix v, int64_t keys, int64_t dim,
                               fastattn_dtype dtype) {
    const int64_t pitch = fa_round_up(dim, FA_ROW_STEP);
    for (int n; rows > 0; rows -= n, o += n * pitch, alpha += n, p += n * ld) {
        n = rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
        for (int64_t d = 0; d < dim; d += FA_GROUP) {
            if (n == 4) quantised_group(4, o, pitch, alpha, p, ld, v, keys, d, dim, dtype);
            else if (n == 2) quantised_group(2, o, pitch, alpha, p, ld, v, keys, d, dim, dtype);
            else quantised_group(1, o, pitch, alpha, p, ld, v, keys, d, dim, dtype);
        }
    }
}

static void quantised_pv(float *o, const float *alpha, const float *p, int ld, int rows, fa_matrix v, int64_t from, int64_t keys,
                         int64_t v_head_dim) {
    const fa_matrix block = fa_rows_from(v, from);
    FA_BY_QUANTISED(v.dtype, quantised_pv_of, o, alpha, p, ld, rows, block, keys, v_head_dim);
}

static int within(const float *row, int64_t n, float most) {
    const simd_f bound = simd_set1(most);
    simd_m beyond = simd_lt(bound, bound); /* none */
    int64_t d = 0;
    for (; d + SIMD_LANES <= n; d += SIMD_LANES) beyond = simd_or(beyond, simd_not(simd_lt(simd_abs(simd_load(row + d)), bound)));
    if (d < n) beyond = simd_or(beyond, simd_not(simd_lt(simd_abs(load_as(row + d, n - d, FASTATTN_FLOAT32)), bound)));
    return !simd_any(beyond);
}

/* The largest magnitude of n numbers, none of which is NaN. */
FA_INLINE float magnitude_of(const float *x, int64_t n) {
    enum { CHAINS = 4 };
    simd_f largest[CHAINS];
    int64_t d = 0;
    FA_UNROLL for (int v = 0; v < CHAINS; v++) largest[v] = simd_set1(0.0f);
    for (; d + CHAINS * SIMD_LANES <= n; d += CHAINS * SIMD_LANES)
        FA_UNROLL for (int v = 0; v < CHAINS; v++) largest[v] = simd_max(simd_abs(simd_load(x + d + v * SIMD_LANES)), largest[v]);
    for (; d < n; d += SIMD_LANES) largest[0] = simd_max(simd_abs(load_as(x + d, n - d, FASTATTN_FLOAT32)), largest[0]);
    return simd_largest(simd_max(simd_max(largest[0], largest[1]), simd_max(largest[2], largest[3])));
}

/* Whole vectors are asked nothing: several rows then fit what the processor looks at, and wait for their divisions together. */
static void quantise_int8(char *to, const float *row, int64_t dim) {
    const float quotient = magnitude_of(row, dim) / 127.0f, scale = quotient >= FLT_MIN ? quotient : 0.0f;
    const simd_f factor = simd_set1(scale > 0.0f ? 1.0f / scale : 0.0f);
    int64_t d = 0;
    memcpy(to + dim, &scale, sizeof scale);
    for (; d + SIMD_LANES <= dim; d += SIMD_LANES) /* the largest is 127 but for rounding */
        simd_store_i8(to + d, simd_mul(simd_load(row + d), factor));
    if (d < dim) {
        char part[SIMD_LANES];
        simd_store_i8(part, simd_mul(load_as(row + d, dim - d, FASTATTN_FLOAT32), factor));
        memcpy(to + d, part, (size_t)(dim - d));
    }
}

/* Numbers times a factor; `bounded` ones, a constant, up to 7. */
FA_INLINE simd_f times(const float *x, simd_f factor, int bounded) {
    const simd_f product = simd_mul(simd_load(x), factor);
    return bounded ? simd_max(simd_min(product, simd_set1(7.0f)), simd_set1(-7.0f)) : product;
}

FA_INLINE void store_group(char *to, const float *row, simd_f factor, int bounded) {
    FA_UNROLL for (int i = 0; i < FA_GROUP / 2; i += SIMD_LANES)
        simd_store_i4(to + i, times(row + i, factor, bounded), times(row + FA_GROUP / 2 + i, factor, bounded));
}

/* The largest magnitudes in the lanes of a group. */
FA_INLINE simd_f group_magnitudes(const float *row) {
    simd_f largest = simd_abs(simd_load(row));
    FA_UNROLL for (int v = 1; v < GROUP_VECTORS; v++) largest = simd_max(largest, simd_abs(simd_load(row + v * SIMD_LANES)));
    return largest;
}

/* Up to four groups, whose scales are in one vector. Of one that is next to nothing float16 may leave so little that the largest number is
 * more than 7.5 times as large. */
FA_INLINE void quantise_groups(char *to, char *to_scales, const float *row, int64_t groups) {
    enum { AT_ONCE = 4 };
    simd_f largest[AT_ONCE];
    uint16_t scales[SIMD_LANES];
    FA_UNROLL for (int g = 0; g < AT_ONCE; g++) largest[g] = group_magnitudes(row + (g < groups ? g : 0) * FA_GROUP);
    const simd_f quotient = simd_div(simd_largest_of_four(largest), simd_set1(7.0f)), zero = simd_set1(0.0f);
    const simd_h scale = simd_to_f16(quotient); /* 0 up to 2**-25 */
    const simd_f factors = simd_select(simd_lt(simd_set1(0x1p-25f), quotient), simd_div(simd_set1(1.0f), simd_from_f16(scale)), zero);
    const int bounded = simd_any(simd_lt(quotient, simd_set1(0x1p-21f)));
    simd_store_h(scales, scale);
    FA_UNROLL for (int g = 0; g < AT_ONCE; g++)
        if (g < groups) {
            if (bounded) store_group(to + g * FA_GROUP / 2, row + g * FA_GROUP, simd_spread(factors, g), 1);
            else store_group(to + g * FA_GROUP / 2, row + g * FA_GROUP, simd_spread(factors, g), 0);
            memcpy(to_scales + g * (int)sizeof *scales, scales + g, sizeof *scales);
        }
}

static void quantise_int4(char *to, const float *row, int64_t dim) {
    for (int64_t d = 0; d < dim; d += 4 * FA_GROUP) quantise_groups(to + d / 2, to + dim / 2 + d / 16, row + d, (dim - d) / FA_GROUP);
}

static void quantise(char *to, const float *row, int64_t dim, fastattn_dtype dtype) {
    if (dtype == FASTATTN_INT8) quantise_int8(to, row, dim);
    else quantise_int4(to, row, dim);
}

/* Numbers `apart` vectors from each other, of so many, become their sums and differences. */
FA_INLINE void butterflies(simd_f *x, int vectors, int apart) {
    FA_UNROLL for (int first = 0; first < vectors; first += 2 * apart)
        FA_UNROLL for (int i = first; i < first + apart; i++) {
            const simd_f a = x[i], b = x[i + apart];
            x[i] = simd_add(a, b);
            x[i + apart] = simd_sub(a, b);
        }
}

/* A block of so many vectors, a constant, in registers: its halves, the halves of these, and so on within each vector. */
FA_INLINE void hadamard_block(float *to, const float *from, int vectors, simd_f factor) {
    simd_f x[8];
    FA_UNROLL for (int i = 0; i < vectors; i++) x[i] = simd_load(from + i * SIMD_LANES);
    if (vectors > 4) butterflies(x, vectors, 4);
    if (vectors > 2) butterflies(x, vectors, 2);
    if (vectors > 1) butterflies(x, vectors, 1);
    FA_UNROLL for (int i = 0; i < vectors; i++) {
        if (SIMD_LANES > 8) x[i] = simd_butterfly(x[i], 8);
        if (SIMD_LANES > 4) x[i] = simd_butterfly(x[i], 4);
        simd_store(to + i * SIMD_LANES, simd_mul(simd_butterfly(simd_butterfly(x[i], 2), 1), factor));
    }
}

/* Blocks that do not fit the registers are halved until they do, and those that are less than a vector are turned one number after the
 * other. Rounding is the same: butterflies that are half a block apart come first. */
static void hadamard(float *to, const float *from, int64_t dim) {
    const int64_t block = dim & -dim;
    const float scale = (float)(1.0 / sqrt((double)block));
    const simd_f factor = simd_set1(scale);
    int64_t apart = block / 2;
    for (; apart > 0 && (2 * apart > 8 * SIMD_LANES || 2 * apart < SIMD_LANES); apart /= 2, from = to)
        for (int64_t d = 0; d < dim; d += 2 * apart)
            for (int64_t i = d; i < d + apart; i++) {
                const float a = from[i], b = from[i + apart];
                to[i] = a + b;
                to[i + apart] = a - b;
            }
    for (int64_t d = 0; d < dim && apart > 0; d += 2 * apart)
        switch (2 * apart / SIMD_LANES) {
        case 1: hadamard_block(to + d, from + d, 1, factor); break;
        case 2: hadamard_block(to + d, from + d, 2, factor); break;
        case 4: hadamard_block(to + d, from + d, 4, factor); break;
        case 8: hadamard_block(to + d, from + d, 8, factor); break;
        }
    for (int64_t d = 0; d < dim && apart == 0; d++) to[d] = from[d] * scale;
}

#define FA_QUANTISED_TABLE(suffix)                                                                                                  \
    const fa_quantised fastattn_quantised_##suffix = {widen_quantised, scales_finite, within, quantise, hadamard};

#define FA_QUANTISED_PRODUCTS(suffix)                                                                                               \
    void fastattn_quantised_qk_##suffix(float *s, const float *q, int ld, int rows, fa_matrix k, int64_t from, int64_t keys,         \
                                        int64_t head_dim) {                                                                         \
        quantised_qk(s, q, ld, rows, k, from, keys, head_dim);                                                                      \
    }                                                                                                                               \
    void fastattn_quantised_pv_##suffix(float *o, const float *alpha, const float *p, int ld, int rows, fa_matrix v, int64_t from,   \
                                        int64_t keys, int64_t v_head_dim) {                                                         \
        quantised_pv(o, alpha, p, ld, rows, v, from, keys, v_head_dim);                                                             \
    }
