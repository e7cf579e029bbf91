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

/* The scores of `rows` rows, a constant, as short_scores makes them. The scale of int8 comes last. */
FA_INLINE void quantised_scores(int rows, float *s, int ld, const float *q, int64_t pitch, const tile_rows *k, int64_t keys,
                                int64_t dim, fastattn_dtype dtype) {
    enum { SUMS = SIMD_TILE_VECTORS * SIMD_TILE_WIDTH(SIMD_TILE_VECTORS) >= 16 ? 16 : 8 };
    const int tile_keys = SUMS / rows;
    const int64_t bytes = fa_row_bytes(dtype, dim);
    for (int64_t first = 0; first < keys; first += tile_keys) {
        const int count = keys - first < tile_keys ? (int)(keys - first) : tile_keys;
        simd_f sum[SUMS];
        float dots[SUMS];
        FA_UNROLL for (int i = 0; i < SUMS; i++) sum[i] = simd_set1(0.0f);
        FA_UNROLL for (int j = 0; j < tile_keys; j++) {
            const int64_t n = first + (j < count ? j : count - 1);
            const char *key = tile_row(k, n);
            for (int64_t at = 0; at < bytes + 63; at += 64) simd_fetch((const char *)(tile_later(k, n) + (uintptr_t)(at < bytes ? at : bytes - 1)));
            for (int64_t d = 0; d < dim; d += FA_GROUP) {
                const simd_f scale = simd_set1(dtype == FASTATTN_INT4 ? fa_scale_at(key, d, dim, dtype) : 1.0f);
                FA_UNROLL for (int v = 0; v < GROUP_VECTORS; v++) {
                    if (d + v * SIMD_LANES >= dim) break;
                    simd_f numbers = load_integers(key, d, v, dim, dtype);
                    if (dtype == FASTATTN_INT4) numbers = simd_mul(numbers, scale);
                    FA_UNROLL for (int r = 0; r < rows; r++)
                        sum[r * tile_keys + j] = simd_fma(numbers, simd_load(q + r * pitch + d + v * SIMD_LANES), sum[r * tile_keys + j]);
                }
            }
        }
        FA_UNROLL for (int i = 0; i < SUMS; i += SIMD_LANES) simd_store(dots + i, simd_sum_lanes(sum + i));
        for (int j = 0; j < count; j++) {
            const float scale = dtype == FASTATTN_INT8 ? fa_scale_at(tile_row(k, first + j), 0, dim, dtype) : 1.0f;
            FA_UNROLL for (int r = 0; r < rows; r++) s[r * ld + first + j] = dots[r * tile_keys + j] * scale;
        }
    }
}

FA_INLINE void quantised_qk_of(float *s, const float *q, int ld, int rows, fa_matrix k, int64_t keys, int64_t dim, fastattn_dtype dtype) {
    const int64_t pitch = fa_round_up(dim, FA_ROW_STEP);
    const char *room[2];
    const tile_rows x = tile_rows_of(k, keys, room);
    for (; rows >= 4; rows -= 4, s += 4 * ld, q += 4 * pitch) quantised_scores(4, s, ld, q, pitch, &x, keys, dim, dtype);
    if (rows & 2) quantised_scores(2, s, ld, q, pitch, &x, keys, dim, dtype);
    if (rows & 1) quantised_scores(1, s + (rows - 1) * ld, ld, q + (rows - 1) * pitch, pitch, &x, keys, dim, dtype);
}

static void quantised_qk(float *s, const float *q, int ld, int rows, fa_matrix k, int64_t from, int64_t keys, int64_t head_dim) {
    const fa_matrix block = fa_rows_from(k, from);
    FA_BY_QUANTISED(k.dtype, quantised_qk_of, s, q, ld, rows, block, keys, head_dim);
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
        simd_fetch((const char *)(v.rows ? (uintptr_t)v.rows[j + keys] : (uintptr_t)row + (uintptr_t)v.ahead) + d);
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

/* The largest magnitude of n numbers, or NaN where one is not finite. */
FA_INLINE float magnitude_of(const float *x, int64_t n) {
    const simd_f zero = simd_set1(0.0f);
    simd_f largest = zero, sum = zero;
    for (int64_t d = 0; d < n; d += SIMD_LANES) {
        const simd_f numbers = load_as(x + d, n - d, FASTATTN_FLOAT32);
        largest = simd_max(simd_abs(numbers), largest);
        sum = simd_fma(numbers, zero, sum);
    }
    return were_finite(sum) ? simd_largest(largest) : NAN;
}

/* n numbers times factor as integers up to `most`, rounded. */
FA_INLINE void store_integers(void *to, const float *x, int64_t n, float factor, float most) {
    for (int64_t d = 0; d < n; d += SIMD_LANES) {
        const simd_f number = simd_mul(load_as(x + d, n - d, FASTATTN_FLOAT32), simd_set1(factor));
        const simd_f integer = simd_max(simd_min(number, simd_set1(most)), simd_set1(-most));
        char part[SIMD_LANES];
        if (n - d >= SIMD_LANES) simd_store_i8((char *)to + d, integer);
        else simd_store_i8(part, integer), memcpy((char *)to + d, part, (size_t)(n - d));
    }
}

FA_INLINE float factor_of(float scale) { return scale >= FLT_MIN ? 1.0f / scale : 0.0f; }

static int quantise_int8(char *to, const float *row, int64_t dim) {
    const float largest = magnitude_of(row, dim), quotient = largest / 127.0f, scale = quotient >= FLT_MIN ? quotient : 0.0f;
    if (!(largest <= FLT_MAX)) return 0;
    if (!to) return 1;
    store_integers(to, row, dim, factor_of(scale), 127.0f);
    memcpy(to + dim, &scale, sizeof scale);
    return 1;
}

static int quantise_int4(char *to, const float *row, int64_t dim) {
    int possible = 1;
    for (int64_t d = 0; d < dim; d += FA_GROUP) {
        const uint16_t scale = fa_to_f16(magnitude_of(row + d, FA_GROUP) / 7.0f);
        uint8_t integers[FA_GROUP];
        possible &= scale < 0x7c00;
        if (!to) continue;
        store_integers(integers, row + d, FA_GROUP, factor_of(fa_from_f16(scale)), 7.0f);
        for (int i = 0; i < 16; i++) to[d / 2 + i] = (char)(((integers[i] + 8) & 15) | (integers[i + 16] + 8) << 4);
        memcpy(to + dim / 2 + d / 16, &scale, sizeof scale);
    }
    return possible;
}

static int quantise(char *to, const float *row, int64_t dim, fastattn_dtype dtype) {
    return dtype == FASTATTN_INT8 ? quantise_int8(to, row, dim) : quantise_int4(to, row, dim);
}

/* x[i] and x[i + step] become their sum and their difference, times factor; then twice as far apart. Within a vector and for what is
 * shorter one by one. */
static void hadamard(float *row, int64_t dim) {
    const int64_t block = dim & -dim;
    int64_t step = 1;
    for (; step < block && step < SIMD_LANES; step *= 2)
        for (int64_t d = 0; d < dim; d += 2 * step)
            for (int64_t i = d; i < d + step; i++) {
                const float a = row[i], b = row[i + step];
                row[i] = a + b;
                row[i + step] = a - b;
            }
    for (; step < block; step *= 2)
        for (int64_t d = 0; d < dim; d += 2 * step)
            for (int64_t i = d; i < d + step; i += SIMD_LANES) {
                const simd_f a = simd_load(row + i), b = simd_load(row + i + step);
                simd_store(row + i, simd_add(a, b));
                simd_store(row + i + step, simd_sub(a, b));
            }
    const simd_f factor = simd_set1((float)(1.0 / sqrt((double)block)));
    for (int64_t d = 0; d < dim; d += SIMD_LANES)
        store_as(row + d, simd_mul(load_as(row + d, dim - d, FASTATTN_FLOAT32), factor), dim - d, FASTATTN_FLOAT32);
}

#define FA_QUANTISED_TABLE(suffix)                                                                                                  \
    const fa_quantised fastattn_quantised_##suffix = {widen_quantised, scales_finite, quantise, hadamard};                          \
    void fastattn_quantised_qk_##suffix(float *s, const float *q, int ld, int rows, fa_matrix k, int64_t from, int64_t keys,         \
                                        int64_t head_dim) {                                                                         \
        quantised_qk(s, q, ld, rows, k, from, keys, head_dim);                                                                      \
    }                                                                                                                               \
    void fastattn_quantised_pv_##suffix(float *o, const float *alpha, const float *p, int ld, int rows, fa_matrix v, int64_t from,   \
                                        int64_t keys, int64_t v_head_dim) {                                                         \
        quantised_pv(o, alpha, p, ld, rows, v, from, keys, v_head_dim);                                                             \
    }
