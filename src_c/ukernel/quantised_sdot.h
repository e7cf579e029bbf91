/* Few rows over quantised keys and values by SDOT, which adds up the products of four bytes with four others in 32 bits, exactly: sixteen an
 * instruction, and no integer has to become a number first. Included by quantised_neon.c.
 *
 * A query, bfloat16 or float16, is a row of integers of 22 bits times a power of two: what is rounded is less than float32 sums round. Their
 * bytes are digits from -128 to 127, which make three planes:
 *
 *     row of q     header, plane of the first digits, of the second, of the third
 *
 * A row whose numbers are not finite, or all as good as nothing, is multiplied in float32.
 *
 * Powers times scales are integers of 15 bits and a sign times what makes the largest of a row and block 32639: two planes of digits. An error of
 * half a unit is far below what rounding such weights to 16 bits would make of it, but of weights that are small anyway. Blocks that have scales
 * which make no such weights are multiplied in float32, too.
 *
 * Lanes of either product are numbers: products with several keys are summed across lanes when a key, or a group of it, ends; and those of
 * values lie side by side for four keys at a time, as SDOT adds them. For vectors this short neither wants the panels of quantised_bytes.h,
 * turned once for all rows. In int8, of 42 instructions for 16 numbers of a row and eight keys 24 multiply, and of 31 for four values 8. */
#ifdef SIMD_BYTES

enum {
    SDOT_BYTES = 16,      /* of a vector */
    SDOT_TILE = 8,        /* keys that meet a row, at most */
    SDOT_KEYS = 64,       /* whose weights share what they are times */
    DIGITS = 3,
    MOST_WEIGHT = 0x7f7f, /* whose digits are 127 */
    INT4_TIMES = 16       /* what nibbles are times where they are the upper ones of bytes */
};

/* The lowest digits of 16 integers, which keep the others. */
FA_INLINE int8x16_t take_digits(int32x4_t x[4]) {
    const int16x8_t low = vuzp1q_s16(vreinterpretq_s16_s32(x[0]), vreinterpretq_s16_s32(x[1]));
    const int16x8_t high = vuzp1q_s16(vreinterpretq_s16_s32(x[2]), vreinterpretq_s16_s32(x[3]));
    FA_UNROLL for (int i = 0; i < 4; i++) x[i] = vrshrq_n_s32(x[i], 8);
    return vuzp1q_s8(vreinterpretq_s8_s16(low), vreinterpretq_s8_s16(high));
}

/* The bytes of a row of int8 that are no whole vector, and 0 beyond. */
static FA_NOINLINE const char *sdot_edge(char to[SDOT_BYTES], const char *row, int64_t dim) {
    const int64_t rest = dim % SDOT_BYTES;
    memset(to, 0, SDOT_BYTES);
    return memcpy(to, row + dim - rest, (size_t)rest);
}

/* The integers of a vector, those of int4 times INT4_TIMES: the first of each byte, and the last. */
FA_INLINE void sdot_split(int8x16_t to[2], int8x16_t bytes, fastattn_dtype dtype) {
    to[0] = bytes;
    if (dtype != FASTATTN_INT4) return;
    bytes = veorq_s8(bytes, vdupq_n_s8((int8_t)0x88));
    to[0] = vshlq_n_s8(bytes, 4);
    to[1] = vandq_s8(bytes, vdupq_n_s8((int8_t)0xf0));
}

/* What a row of q begins with, in the room of a vector. */
typedef struct sdot_row {
    float unit;          /* of the sums of the upper two digits; 0: a row of numbers as they were given, behind this header */
    fastattn_dtype kept; /* their type */
} sdot_row;

static int fit_sdot(int64_t dim) { return dim > 0 && dim <= INTEGERS_MOST_DIM; }

/* The same four bytes in each lane. */
FA_INLINE int8x16_t sdot_quad(const int8_t *at) {
    int32_t quad;
    memcpy(&quad, at, sizeof quad);
    return vreinterpretq_s8_s32(vdupq_n_s32(quad));
}

/* Queries */

static void sdot_pack_row(float *q, const float *numbers, int64_t dim, fastattn_dtype kept) {
    const int64_t pitch = fa_round_up(dim, FA_ROW_STEP);
    const float largest = magnitude_of(numbers, dim);
    int8_t *const to = (int8_t *)(void *)q + SDOT_BYTES;
    sdot_row head = {0.0f, kept};
    if (largest >= 0x1p-80f && within(numbers, dim, 0x1p100f)) {
        const int exponent = 21 - ilogbf(largest);
        const simd_f factor = simd_set1(ldexpf(1.0f, exponent));
        head.unit = ldexpf(1.0f, 8 - exponent);
        for (int64_t d = 0; d < pitch; d += SDOT_BYTES) {
            int32x4_t x[4];
            FA_UNROLL for (int i = 0; i < 4; i++) x[i] = vcvtnq_s32_f32(simd_mul(simd_load(numbers + d + i * SIMD_LANES), factor));
            FA_UNROLL for (int n = DIGITS - 1; n >= 0; n--) vst1q_s8(to + n * pitch + d, take_digits(x));
        }
    } else
        for (int64_t d = 0; d < pitch; d += SIMD_LANES) store_full(to + 2 * d, simd_load(numbers + d), kept);
    memcpy(q, &head, sizeof head);
}

void fastattn_quantised_pack_sdot(float *q, int ld, const void *const *rows_of, int rows, int64_t head_dim, fastattn_dtype dtype, float sign) {
    float numbers[INTEGERS_MOST_DIM];
    for (int r = 0; r < rows; r++, q += fa_round_up(head_dim, FA_ROW_STEP)) {
        rows_pack(fit_sdot(head_dim) ? numbers : q, ld, rows_of + r, 1, head_dim, dtype, sign);
        if (fit_sdot(head_dim)) sdot_pack_row(q, numbers, head_dim, dtype == FASTATTN_FLOAT16 ? dtype : FASTATTN_BFLOAT16);
    }
}

/* Scores */

/* The scale of number d, which a processor of this kind converts. */
FA_INLINE float sdot_scale(const char *row, int64_t d, int64_t dim, fastattn_dtype dtype) {
    float16_t half;
    if (dtype == FASTATTN_INT8) return fa_scale_at(row, d, dim, dtype);
    memcpy(&half, row + dim / 2 + d / 16, sizeof half);
    return (float)half;
}

/* sum = sum + scale times what the sums of the products with each digit come to, but for the unit. */
FA_INLINE simd_f add_digits(simd_f sum, const int32x4_t dots[DIGITS], simd_f scale) {
    const simd_f upper = vcvtq_f32_s32(vmlaq_s32(dots[1], dots[0], vdupq_n_s32(256)));
    return simd_fma(simd_fma(vcvtq_f32_s32(dots[2]), simd_set1(0x1p-8f), upper), scale, sum);
}

/* Where some keys lie, and what they end in. */
typedef struct sdot_keys {
    const char *row[SDOT_TILE], *edge[SDOT_TILE];
} sdot_keys;

/* Adds the products of each digit of a vector, or of two, with so many keys. */
FA_INLINE void add_products(int keys, int32x4_t dots[][DIGITS], const int8_t *planes, int64_t pitch, const char *const *key, int64_t at,
                            fastattn_dtype dtype) {
    const int vectors = dtype == FASTATTN_INT4 ? 2 : 1;
    int8x16_t digits[DIGITS][2];
    FA_UNROLL for (int n = 0; n < DIGITS; n++)
        FA_UNROLL for (int v = 0; v < vectors; v++) digits[n][v] = vld1q_s8(planes + n * pitch + v * SDOT_BYTES);
    FA_UNROLL for (int i = 0; i < keys; i++) {
        int8x16_t bytes[2];
        sdot_split(bytes, vld1q_s8((const int8_t *)key[i] + at), dtype);
        FA_UNROLL for (int v = 0; v < vectors; v++)
            FA_UNROLL for (int n = 0; n < DIGITS; n++) dots[i][n] = simd_dot_bytes(bytes[v], digits[n][v], dots[i][n]);
    }
}

/* Of a row and so many keys, a constant, group by group. */
FA_INLINE void sdot_scores(int keys, float *s, const float *q, const sdot_keys *k, int64_t dim, fastattn_dtype dtype) {
    const int grouped = dtype == FASTATTN_INT4;
    const int64_t pitch = fa_round_up(dim, FA_ROW_STEP), group = grouped ? FA_GROUP : dim, whole = grouped ? 0 : dim / SDOT_BYTES * SDOT_BYTES;
    const int8_t *const planes = (const int8_t *)(const void *)q + SDOT_BYTES;
    simd_f sum[SDOT_TILE];
    FA_UNROLL for (int i = 0; i < keys; i++) sum[i] = simd_set1(0.0f);
    for (int64_t first = 0; first < dim; first += group) {
        int32x4_t dots[SDOT_TILE][DIGITS];
        FA_UNROLL for (int i = 0; i < keys; i++)
            FA_UNROLL for (int n = 0; n < DIGITS; n++) dots[i][n] = vdupq_n_s32(0);
        if (grouped) add_products(keys, dots, planes + first, pitch, k->row, first / 2, dtype);
        for (int64_t d = 0; d < whole; d += SDOT_BYTES) add_products(keys, dots, planes + d, pitch, k->row, d, dtype);
        if (!grouped && whole < dim) add_products(keys, dots, planes + whole, pitch, k->edge, 0, dtype);
        FA_UNROLL for (int i = 0; i < keys; i++) sum[i] = add_digits(sum[i], dots[i], simd_set1(sdot_scale(k->row[i], first, dim, dtype)));
    }
    FA_UNROLL for (int i = 0; i < keys; i += 4) simd_store(s + i, simd_mul(simd_sum_lanes(sum + i), simd_set1(grouped ? *q / INT4_TIMES : *q)));
}

FA_INLINE void sdot_qk_of(float *s, const float *q, int ld, int rows, fa_matrix k, int64_t keys, int64_t dim, fastattn_dtype dtype) {
    const int at_once = dtype == FASTATTN_INT4 ? SDOT_TILE / 2 : SDOT_TILE; /* of int4 there are sums over groups besides */
    const int64_t pitch = fa_round_up(dim, FA_ROW_STEP);
    const char *first_row;
    const tile_rows x = tile_rows_of(k, &first_row);
    for (int64_t j = 0; j < keys; j += at_once) {
        uintptr_t later[SDOT_TILE];
        char edges[SDOT_TILE][SDOT_BYTES];
        sdot_keys of;
        tile_places(&x, j, keys, at_once, of.row, later);
        if (dtype == FASTATTN_INT8 && dim % SDOT_BYTES)
            for (int i = 0; i < at_once; i++) of.edge[i] = sdot_edge(edges[i], of.row[i], dim);
        for (int64_t at = 0; at < fa_row_bytes(dtype, dim); at += 64)
            FA_UNROLL for (int i = 0; i < at_once; i++) simd_fetch((const char *)(later[i] + (uintptr_t)at));
        for (int r = 0; r < rows; r++) sdot_scores(at_once, s + r * ld + j, q + r * pitch, &of, dim, dtype);
    }
}

void fastattn_quantised_qk_sdot(float *s, const float *q, int ld, int rows, fa_matrix k, int64_t from, int64_t keys, int64_t head_dim) {
    const fa_matrix block = fa_rows_from(k, from);
    if (!fit_sdot(head_dim)) {
        quantised_qk(s, q, ld, rows, k, from, keys, head_dim);
        return;
    }
    FA_BY_QUANTISED(k.dtype, sdot_qk_of, s, q, ld, rows, block, keys, head_dim);
    for (int r = 0; r < rows; r++, q += fa_round_up(head_dim, FA_ROW_STEP), s += ld) {
        sdot_row head;
        memcpy(&head, q, sizeof head);
        if (head.unit == 0.0f) scores_of_numbers(s, (const char *)q + SDOT_BYTES, head.kept, ld, k, from, keys, head_dim);
    }
}

/* Values */

/* Up to SDOT_KEYS rows, the last of which fills up a vector, and their scales by group: of int8 there is one. */
typedef struct sdot_values {
    const char *row[SDOT_KEYS], *edge[SDOT_KEYS];
    char edges[SDOT_KEYS][SDOT_BYTES];
    float scales[INTEGERS_MOST_DIM / FA_GROUP][SDOT_KEYS];
    int64_t keys;
} sdot_values;

/* Whether `well` and these scales, times any power that matters, make weights: no float16 is too small for that. */
FA_INLINE simd_m weigh_well(simd_m well, simd_f scales, fastattn_dtype dtype) {
    const simd_f most = simd_set1(0x1p60f), least = simd_set1(0x1p-60f);
    if (dtype == FASTATTN_INT8) well = vandq_u32(well, vorrq_u32(vceqzq_f32(scales), vcageq_f32(scales, least)));
    return vandq_u32(well, vcaltq_f32(scales, most));
}

/* Returns 1 when all scales do. Those of four groups are read at once, up to the row's last, and what lies before its first is none. */
FA_INLINE int find_values(sdot_values *x, fa_matrix v, int64_t keys, int64_t dim, fastattn_dtype dtype) {
    const char *first_row;
    const tile_rows places = tile_rows_of(v, &first_row);
    simd_m well = vdupq_n_u32(~0u);
    x->keys = fa_round_up(keys, SDOT_BYTES);
    for (int64_t j = 0; j < x->keys; j += 4) {
        const char **const row = x->row + j;
        uintptr_t later[4];
        simd_f square[4];
        tile_places(&places, j, keys, 4, row, later);
        if (dtype == FASTATTN_INT8 && dim % SDOT_BYTES)
            for (int i = 0; i < 4; i++) x->edge[j + i] = sdot_edge(x->edges[j + i], row[i], dim);
        for (int64_t at = 0; at < fa_row_bytes(dtype, dim); at += 64)
            FA_UNROLL for (int i = 0; i < 4; i++) simd_fetch((const char *)(later[i] + (uintptr_t)at));
        if (dtype == FASTATTN_INT8) {
            FA_UNROLL for (int i = 0; i < 4; i++) x->scales[0][j + i] = fa_scale_at(row[i], 0, dim, dtype);
            well = weigh_well(well, simd_load(x->scales[0] + j), dtype);
            continue;
        }
        for (int64_t g = dim / FA_GROUP - 4; g > -4; g -= 4) {
            FA_UNROLL for (int i = 0; i < 4; i++) square[i] = load_full(row[i] + dim / 2 + g * 2, FASTATTN_FLOAT16);
            simd_transpose(square);
            FA_UNROLL for (int i = 0; i < 4; i++)
                if (g + i >= 0) {
                    simd_store(x->scales[g + i] + j, square[i]);
                    well = weigh_well(well, square[i], dtype);
                }
        }
    }
    return !simd_any(simd_not(well));
}

/* Powers times scales as two planes of digits, the upper ones first, and what they are times. Of weights that are all next to nothing, 0 may be
 * left, and of NaN what they are times is. */
static FA_NOINLINE float sdot_weigh(int8_t planes[2][SDOT_KEYS], const float *p, const float *scales, int64_t keys) {
    simd_f weights[SDOT_KEYS / SIMD_LANES], most = simd_set1(0x1p-100f);
    const int64_t whole = fa_round_up(keys < SDOT_KEYS ? keys : SDOT_KEYS, SDOT_BYTES);
    for (int64_t j = 0; j < whole; j += SIMD_LANES) {
        const simd_f powers = j < keys ? load_as(p + j, keys - j, FASTATTN_FLOAT32) : simd_set1(0.0f);
        weights[j / SIMD_LANES] = simd_mul(powers, simd_load(scales + j));
        most = vmaxq_f32(simd_abs(weights[j / SIMD_LANES]), most); /* NaN, if one is */
    }
    const float largest = simd_largest(most);
    for (int64_t j = 0; j < whole; j += SDOT_BYTES) {
        int32x4_t x[4];
        FA_UNROLL for (int i = 0; i < 4; i++) x[i] = vcvtnq_s32_f32(simd_mul(weights[j / SIMD_LANES + i], simd_set1((float)MOST_WEIGHT / largest)));
        for (int n = 1; n >= 0; n--) vst1q_s8(planes[n] + j, take_digits(x));
    }
    return largest * (1.0f / (float)MOST_WEIGHT);
}

/* o = o alpha + what a vector of each row comes to: 16 numbers, or of int4 a group. */
FA_INLINE void sdot_add(float *o, float alpha, int8_t planes[2][SDOT_KEYS], float unit, const char *const *row, int64_t at, int64_t keys,
                        fastattn_dtype dtype) {
    const int vectors = dtype == FASTATTN_INT4 ? 8 : 4;
    int32x4_t dots[8][2];
    FA_UNROLL for (int i = 0; i < vectors; i++) dots[i][0] = dots[i][1] = vdupq_n_s32(0);
    for (int64_t j = 0; j < keys; j += 4) {
        const int8x16_t upper = sdot_quad(planes[0] + j), lower = sdot_quad(planes[1] + j);
        int8x16_t b[4];
        FA_UNROLL for (int i = 0; i < 4; i++) b[i] = vld1q_s8((const int8_t *)row[j + i] + at);
        const int16x8_t low01 = vreinterpretq_s16_s8(vzip1q_s8(b[0], b[1])), low23 = vreinterpretq_s16_s8(vzip1q_s8(b[2], b[3]));
        const int16x8_t high01 = vreinterpretq_s16_s8(vzip2q_s8(b[0], b[1])), high23 = vreinterpretq_s16_s8(vzip2q_s8(b[2], b[3]));
        const int16x8_t quads[4] = {vzip1q_s16(low01, low23), vzip2q_s16(low01, low23), vzip1q_s16(high01, high23), vzip2q_s16(high01, high23)};
        FA_UNROLL for (int i = 0; i < 4; i++) {
            int8x16_t bytes[2];
            sdot_split(bytes, vreinterpretq_s8_s16(quads[i]), dtype);
            FA_UNROLL for (int v = i; v < vectors; v += 4) {
                dots[v][0] = simd_dot_bytes(bytes[v / 4], upper, dots[v][0]);
                dots[v][1] = simd_dot_bytes(bytes[v / 4], lower, dots[v][1]);
            }
        }
    }
    FA_UNROLL for (int i = 0; i < vectors; i++) {
        float *const to = o + i * SIMD_LANES;
        const simd_f sum = vcvtq_f32_s32(vmlaq_s32(dots[i][1], dots[i][0], vdupq_n_s32(256)));
        simd_store(to, simd_fma(simd_load(to), simd_set1(alpha), simd_mul(sum, simd_set1(unit))));
    }
}

FA_INLINE void sdot_pv_of(float *o, const float *alpha, const float *p, int ld, int rows, fa_matrix v, int64_t keys, int64_t dim,
                          fastattn_dtype dtype) {
    const int64_t pitch = fa_round_up(dim, FA_ROW_STEP), step = dtype == FASTATTN_INT4 ? FA_GROUP : dim;
    sdot_values x;
    if (!find_values(&x, v, keys, dim, dtype)) {
        quantised_pv(o, alpha, p, ld, rows, v, 0, keys, dim);
        return;
    }
    for (int r = 0; r < rows; r++, o += pitch, p += ld)
        for (int64_t d = 0; d < dim; d += step) {
            int8_t planes[2][SDOT_KEYS];
            const float unit = sdot_weigh(planes, p, x.scales[d / step], keys);
            if (dtype == FASTATTN_INT4) {
                sdot_add(o + d, alpha[r], planes, unit / INT4_TIMES, x.row, d / 2, x.keys, dtype);
                continue;
            }
            for (int64_t n = 0; n < dim; n += SDOT_BYTES) {
                const int edge = n + SDOT_BYTES > dim;
                sdot_add(o + n, alpha[r], planes, unit, edge ? x.edge : x.row, edge ? 0 : n, x.keys, dtype);
            }
        }
}

void fastattn_quantised_pv_sdot(float *o, const float *alpha, const float *p, int ld, int rows, fa_matrix v, int64_t from, int64_t keys,
                                int64_t v_head_dim) {
    if (!fit_sdot(v_head_dim)) {
        quantised_pv(o, alpha, p, ld, rows, v, from, keys, v_head_dim);
        return;
    }
    for (int64_t j = 0, some; j < keys; j += some) { /* up to a multiple of SDOT_KEYS, whatever is left out before */
        const int64_t left = SDOT_KEYS - (from + j) % SDOT_KEYS;
        some = keys - j < left ? keys - j : left;
        FA_BY_QUANTISED(v.dtype, sdot_pv_of, o, j ? unchanged : alpha, p + j, ld, rows, fa_rows_from(v, from + j), some, v_head_dim);
    }
}

#endif
