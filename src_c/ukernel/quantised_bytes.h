/* Few rows over quantised keys and values by AVX512-VNNI, which adds up the products of four bytes with four others in 32 bits, exactly: in two
 * planes of bytes as many a second as VDPBF16PS, and no integer has to become a number first. Included by quantised_avx512.c.
 *
 * A query, bfloat16 or float16, is a row of integers of 32 bits times a power of two. Its bytes are digits from -128 to 127, the two
 * upper ones of which are all that most numbers have: these make two planes. Of the lower two there is a list of the quads (four numbers
 * that follow each other) in which they are not all 0. A row whose numbers are further apart than 32 bits hold is multiplied in float32.
 *
 *     row of q     header, sums of the upper digits by group, plane of the first digits, plane of the second, list
 *
 * Powers times scales are integers of 16 bits times what makes the largest of a row and block 65535: two planes of bytes. An error of half a
 * unit is far below what rounding such weights to 16 bits would make of it, but of weights that are small anyway.
 *
 * In qk lanes are keys: quads of 64 keys are turned once for all rows. In pv they are numbers: quads of four keys that follow each other are made
 * in registers. One side has to be unsigned: weights are, and keys become so by what is taken away from the sums again (KEY_BIAS). */
#ifdef FA_HOLDS_AVX512_VNNI

enum {
    BYTES_KEYS = 64,      /* of a panel, four vectors */
    BYTES_NUMBERS = 128,  /* of a panel of keys, and of four groups of values */
    BYTES_LEAST_DIM = 32, /* which a row of q has room for */
    BYTES_ROWS = 16,      /* whose weights are there at a time */
    QUAD_BYTES = 4,
    STEP_VECTORS = 4,     /* of a panel, from one quad of a line to the next */
    PANEL_VECTORS = BYTES_KEYS / QUAD_BYTES * STEP_VECTORS /* of 64 numbers */
};

/* Below the largest integer all of whose digits are from -128 to 127. */
#define MOST_INTEGER 0x7f7f7f00

enum { MOST_WEIGHT = 65535 };

typedef struct bytes_row {
    float unit;      /* of the sums of the two upper digits; 0: a row of numbers as they were given, behind this header */
    uint16_t dtype;  /* of those */
    uint16_t ends[2]; /* in the list, of the third digits and of the fourth */
} bytes_row;

/* Where the parts of a row lie, in bytes. */
typedef struct bytes_layout {
    int64_t sums, planes, plane, list, places, room; /* the room is that of the list, in quads */
} bytes_layout;

FA_INLINE bytes_layout bytes_layout_of(int64_t dim) {
    bytes_layout x;
    x.plane = fa_round_up(dim, FA_GROUP);
    x.sums = 16;
    x.planes = x.sums + x.plane / FA_GROUP * 4;
    x.list = x.planes + 2 * x.plane;
    x.room = (fa_round_up(dim, FA_ROW_STEP) * 4 - x.list) / 6;
    x.places = x.list + x.room * QUAD_BYTES;
    return x;
}

static int fit_bytes(int64_t dim) { return dim >= BYTES_LEAST_DIM && dim <= INTEGERS_MOST_DIM; }

FA_INLINE __m512i quad_of(const char *at) {
    int32_t quad;
    memcpy(&quad, at, sizeof quad);
    return _mm512_set1_epi32(quad);
}

/* Queries */

/* Numbers times sign, rounded to bfloat16 but for those of float16. */
FA_INLINE void bytes_numbers(float *to, const void *from, int64_t dim, fastattn_dtype dtype, float sign) {
    for (int64_t d = 0; d < dim; d += SIMD_LANES) {
        const simd_f x = simd_mul(load_as((const char *)from + d * fa_size_of(dtype), dim - d, dtype), simd_set1(sign));
        simd_store(to + d, dtype == FASTATTN_FLOAT32 ? simd_from_bf16(simd_to_bf16(x)) : x);
    }
}

/* Quads of digits that are not all 0, into the list; 0 where it is full. */
FA_INLINE int list_digits(char *row, const bytes_layout *at, int *count, const char *digits) {
    for (int64_t d = 0; d < at->plane; d += QUAD_BYTES) {
        uint32_t quad;
        const uint16_t place = (uint16_t)(d / QUAD_BYTES);
        memcpy(&quad, digits + d, sizeof quad);
        if (!quad) continue;
        if (*count == at->room) return 0;
        memcpy(row + at->list + *count * QUAD_BYTES, &quad, sizeof quad);
        memcpy(row + at->places + *count * (int)sizeof place, &place, sizeof place);
        ++*count;
    }
    return 1;
}

/* A row of dim numbers, and as many zeros as fill up a group, as digits; 0 when they have no such digits. */
FA_INLINE int pack_digits(char *row, const float *x, int64_t dim) {
    const bytes_layout at = bytes_layout_of(dim);
    const __m512i half = _mm512_set1_epi32((int)0x80808080u);
    char third[INTEGERS_MOST_DIM], fourth[INTEGERS_MOST_DIM];
    bytes_row head = {1.0f, 0, {0, 0}};
    if (!within(x, dim, 0x1p100f)) return 0;
    const float largest = magnitude_of(x, dim);
    int exponent = 0, count = 0;
    if (largest > 0.0f) {
        if (largest < 0x1p-80f) return 0;
        exponent = 31 - (ilogbf(largest) + 1);
        if (ldexpf(largest, exponent) > (float)MOST_INTEGER) exponent--;
    }
    const simd_f factor = simd_set1(ldexpf(1.0f, exponent));
    head.unit = ldexpf(1.0f, 16 - exponent);
    for (int64_t d = 0; d < at.plane; d += FA_GROUP) {
        __m512i sum = _mm512_setzero_si512();
        for (int64_t i = d; i < d + FA_GROUP; i += SIMD_LANES) {
            const simd_f scaled = simd_mul(load_as(x + (i < dim ? i : 0), i < dim ? dim - i : 0, FASTATTN_FLOAT32), factor);
            const __m512i integers = _mm512_cvtps_epi32(scaled);
            if (simd_any(simd_not(simd_eq(_mm512_cvtepi32_ps(integers), scaled)))) return 0;
            const __m512i digits = _mm512_xor_si512(_mm512_add_epi32(integers, half), half);
            _mm_storeu_si128((__m128i *)(void *)(row + at.planes + i), _mm512_cvtepi32_epi8(_mm512_srli_epi32(digits, 24)));
            _mm_storeu_si128((__m128i *)(void *)(row + at.planes + at.plane + i), _mm512_cvtepi32_epi8(_mm512_srli_epi32(digits, 16)));
            _mm_storeu_si128((__m128i *)(void *)(third + i), _mm512_cvtepi32_epi8(_mm512_srli_epi32(digits, 8)));
            _mm_storeu_si128((__m128i *)(void *)(fourth + i), _mm512_cvtepi32_epi8(digits));
            sum = _mm512_add_epi32(sum, _mm512_srai_epi32(_mm512_add_epi32(integers, _mm512_set1_epi32(0x8080)), 16));
        }
        const int32_t of_group = _mm512_reduce_add_epi32(sum);
        memcpy(row + at.sums + d / FA_GROUP * 4, &of_group, sizeof of_group);
    }
    for (int n = 0; n < 2; n++) {
        if (!list_digits(row, &at, &count, n ? fourth : third)) return 0;
        head.ends[n] = (uint16_t)count;
    }
    memcpy(row, &head, sizeof head);
    return 1;
}

void fastattn_quantised_pack_vnni(float *q, int ld, const void *const *rows_of, int rows, int64_t head_dim, fastattn_dtype dtype, float sign) {
    const int64_t pitch = fa_round_up(head_dim, FA_ROW_STEP);
    (void)ld;
    for (int r = 0; r < rows; r++, q += pitch) {
        if (!fit_bytes(head_dim)) {
            FA_BY_STORAGE(dtype, rows_pack_of, q, rows_of + r, 1, head_dim, sign)
            continue;
        }
        float numbers[INTEGERS_MOST_DIM];
        bytes_numbers(numbers, rows_of[r], head_dim, dtype, sign);
        if (pack_digits((char *)q, numbers, head_dim)) continue;
        const bytes_row head = {0.0f, (uint16_t)(dtype == FASTATTN_FLOAT16 ? dtype : FASTATTN_BFLOAT16), {0, 0}};
        memcpy(q, &head, sizeof head);
        narrow((char *)q + sizeof head, numbers, 1.0f, head_dim, (fastattn_dtype)head.dtype);
    }
}

/* Both products */

/* Of the sums of two planes, the upper one first, the sums of the integers. */
FA_INLINE __m512i of_planes(__m512i upper, __m512i lower) { return _mm512_add_epi32(_mm512_slli_epi32(upper, 8), lower); }

/* Up to 64 rows, the last of which fills up a vector, and what will be read in their place later. */
typedef struct bytes_rows {
    const char *row[BYTES_KEYS];
    uintptr_t later[BYTES_KEYS];
} bytes_rows;

FA_INLINE void find_rows(bytes_rows *x, fa_matrix from, int64_t keys) {
    const char *first_row;
    const tile_rows places = tile_rows_of(from, &first_row);
    for (int64_t j = 0; j < keys; j += SIMD_LANES) tile_places(&places, j, keys, SIMD_LANES, x->row + j, x->later + j);
}

/* Which bytes there are of a row from number d on: 64 of int8, of int4 those of 128 numbers, four groups. */
FA_INLINE __mmask64 bytes_there(int64_t d, int64_t dim, fastattn_dtype dtype) {
    const int64_t left = dtype == FASTATTN_INT4 ? (dim - d) / 2 : dim - d;
    return left >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << left) - 1;
}

/* These, and 0 where there are none. */
FA_INLINE __m512i bytes_from(const bytes_rows *x, int64_t j, int64_t d, __mmask64 there, fastattn_dtype dtype) {
    const int64_t at = dtype == FASTATTN_INT4 ? d / 2 : d;
    simd_fetch((const char *)(x->later[j] + (uintptr_t)at));
    return _mm512_maskz_loadu_epi8(there, x->row[j] + at);
}

/* The scales of up to 64 rows, int8's, or int4's of the four groups from d on; 0 where there are none. */
FA_INLINE void scales_of(float scales[4][BYTES_KEYS], const bytes_rows *x, int64_t keys, int64_t d, int64_t dim, fastattn_dtype dtype) {
    const int64_t groups = dim - d < BYTES_NUMBERS ? (dim - d) / FA_GROUP : 4, at = dtype == FASTATTN_INT4 ? dim / 2 + d / 16 : dim;
    uint64_t halves[BYTES_KEYS];
    for (int64_t j = 0; j < keys; j++) {
        simd_fetch((const char *)(x->later[j] + (uintptr_t)at));
        if (dtype == FASTATTN_INT8) {
            memcpy(&scales[0][j], x->row[j] + at, sizeof scales[0][j]);
            continue;
        }
        halves[j] = 0;
        if (groups == 4) memcpy(halves + j, x->row[j] + at, 8);
        else memcpy(halves + j, x->row[j] + at, (size_t)groups * 2);
    }
    for (int64_t j = keys; j < fa_round_up(keys, SIMD_LANES); j++) halves[j] = 0, scales[0][j] = 0.0f;
    for (int64_t j = 0; dtype == FASTATTN_INT4 && j < keys; j += SIMD_LANES) {
        const __m512i low = _mm512_loadu_si512(halves + j), high = _mm512_loadu_si512(halves + j + 8);
        const __m512i fourths = _mm512_set_epi16(60, 56, 52, 48, 44, 40, 36, 32, 28, 24, 20, 16, 12, 8, 4, 0, 60, 56, 52, 48, 44, 40, 36, 32, 28,
                                                 24, 20, 16, 12, 8, 4, 0);
        FA_UNROLL for (int g = 0; g < 4; g++) {
            const __m512i of_group = _mm512_permutex2var_epi16(low, _mm512_add_epi16(fourths, _mm512_set1_epi16((short)g)), high);
            simd_store(scales[g] + j, simd_from_f16(_mm512_castsi512_si256(of_group)));
        }
    }
}

/* Scores */

enum { KEY_BIAS_INT8 = 128, KEY_BIAS_INT4 = 8 };

/* panel[quad][key] for the 128 numbers from d on of up to 64 keys. The nibbles of four bytes are two quads of int4. */
FA_INLINE void turn_bytes(__m512i *panel, const bytes_rows *k, int64_t keys, int64_t d, int64_t dim, fastattn_dtype dtype) {
    const int64_t end = dim - d < BYTES_NUMBERS ? dim : d + BYTES_NUMBERS, step = dtype == FASTATTN_INT4 ? BYTES_NUMBERS : 64;
    const __m512i nibbles = _mm512_set1_epi8(15), bias = _mm512_set1_epi8((char)0x80);
    for (int64_t n = d; n < end; n += step, panel += 16 * STEP_VECTORS) {
        const __mmask64 there = bytes_there(n, dim, dtype);
        for (int64_t first = 0; first < keys; first += SIMD_LANES) {
            __m512i *to = panel + first / SIMD_LANES;
            simd_f square[SIMD_LANES];
            FA_UNROLL for (int i = 0; i < SIMD_LANES; i++) square[i] = _mm512_castsi512_ps(bytes_from(k, first + i, n, there, dtype));
            simd_transpose(square);
            FA_UNROLL for (int i = 0; i < SIMD_LANES; i++) {
                const __m512i bytes = _mm512_castps_si512(square[i]);
                if (dtype == FASTATTN_INT8) {
                    to[i * STEP_VECTORS] = _mm512_xor_si512(bytes, bias);
                    continue;
                }
                __m512i *const of_group = to + (i / 4 * 8 + i % 4) * STEP_VECTORS;
                of_group[0] = _mm512_and_si512(bytes, nibbles);
                of_group[4 * STEP_VECTORS] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibbles);
            }
        }
    }
}

/* sum[line][vector] = sum over quads of panel[quad][vector] times line[quad]. */
FA_INLINE void quad_tile(int lines, int vectors, __m512i *sum, const char *const *line, const __m512i *panel, int64_t quads) {
    __m512i dots[4][4];
    FA_UNROLL for (int i = 0; i < lines; i++)
        FA_UNROLL for (int v = 0; v < vectors; v++) dots[i][v] = _mm512_setzero_si512();
    for (int64_t n = 0; n < quads; n++, panel += STEP_VECTORS)
        FA_UNROLL for (int i = 0; i < lines; i++) {
            const __m512i quad = quad_of(line[i] + n * QUAD_BYTES);
            FA_UNROLL for (int v = 0; v < vectors; v++) dots[i][v] = simd_dot_bytes(panel[v], quad, dots[i][v]);
        }
    FA_UNROLL for (int i = 0; i < lines; i++)
        FA_UNROLL for (int v = 0; v < vectors; v++) sum[i * vectors + v] = dots[i][v];
}

/* What a row of q is multiplied with next. */
typedef struct bytes_query {
    const char *row;
    bytes_row head;
    int next[2]; /* quads of the list */
} bytes_query;

/* Adds the products of third or fourth digits, times factor, of the numbers from d on up to `end`; the panel begins with number `first`. */
FA_INLINE void add_listed(int vectors, simd_f *sum, bytes_query *q, int n, const bytes_layout *at, const __m512i *panel, int64_t first, int64_t end,
                          int bias, float factor) {
    __m512i dots[4], of_bias = _mm512_setzero_si512();
    uint16_t place;
    FA_UNROLL for (int v = 0; v < vectors; v++) dots[v] = _mm512_setzero_si512();
    for (; q->next[n] < q->head.ends[n]; q->next[n]++) {
        memcpy(&place, q->row + at->places + q->next[n] * 2, sizeof place);
        if (place * QUAD_BYTES >= end) break;
        const __m512i quad = quad_of(q->row + at->list + q->next[n] * QUAD_BYTES);
        const __m512i *lanes = panel + (place - first / QUAD_BYTES) * STEP_VECTORS;
        of_bias = simd_dot_bytes(_mm512_set1_epi8((char)bias), quad, of_bias);
        FA_UNROLL for (int v = 0; v < vectors; v++) dots[v] = simd_dot_bytes(lanes[v], quad, dots[v]);
    }
    FA_UNROLL for (int v = 0; v < vectors; v++)
        sum[v] = simd_fma(_mm512_cvtepi32_ps(_mm512_sub_epi32(dots[v], of_bias)), simd_set1(factor), sum[v]);
}

/* The scores of `rows` rows and 16 times `vectors` keys, constants, with the numbers from `first` on that a panel holds: those of int4 group by
 * group. Scores of the numbers before are there. */
FA_INLINE void bytes_scores(int rows, int vectors, float *s, int ld, bytes_query *q, const __m512i *panel, const float *scales, int64_t first,
                            int64_t dim, fastattn_dtype dtype) {
    const bytes_layout at = bytes_layout_of(dim);
    const int64_t last = dim - first < BYTES_NUMBERS ? dim : first + BYTES_NUMBERS, step = dtype == FASTATTN_INT4 ? FA_GROUP : BYTES_NUMBERS;
    const int bias = dtype == FASTATTN_INT4 ? KEY_BIAS_INT4 : KEY_BIAS_INT8;
    for (int64_t d = first; d < last; d += step, scales += BYTES_KEYS) {
        const int64_t end = last - d < step ? last : d + step;
        const char *lines[4];
        __m512i sum[4 * 4];
        FA_UNROLL for (int i = 0; i < 2 * rows; i++) lines[i] = q[i / 2].row + at.planes + i % 2 * at.plane + d;
        quad_tile(2 * rows, vectors, sum, lines, panel + (d - first) / QUAD_BYTES * STEP_VECTORS,
                  fa_round_up(end - d, QUAD_BYTES) / QUAD_BYTES);
        FA_UNROLL for (int r = 0; r < rows; r++) {
            simd_f dots[4];
            uint32_t of_bias = 0, of_group;
            for (int64_t g = d / FA_GROUP; g * FA_GROUP < end; g++) {
                memcpy(&of_group, q[r].row + at.sums + g * 4, sizeof of_group);
                of_bias += of_group * (uint32_t)bias;
            }
            FA_UNROLL for (int v = 0; v < vectors; v++) {
                const __m512i of_integers = of_planes(sum[2 * r * vectors + v], sum[(2 * r + 1) * vectors + v]);
                dots[v] = _mm512_cvtepi32_ps(_mm512_sub_epi32(of_integers, _mm512_set1_epi32((int)of_bias)));
            }
            if (q[r].next[0] < q[r].head.ends[0]) add_listed(vectors, dots, &q[r], 0, &at, panel, first, end, bias, 0x1p-8f);
            if (q[r].next[1] < q[r].head.ends[1]) add_listed(vectors, dots, &q[r], 1, &at, panel, first, end, bias, 0x1p-16f);
            FA_UNROLL for (int v = 0; v < vectors; v++) {
                float *to = s + r * ld + v * SIMD_LANES;
                const simd_f scale = simd_load(scales + v * SIMD_LANES), dot = simd_mul(dots[v], simd_set1(q[r].head.unit));
                simd_store(to, d > 0 ? simd_fma(dot, scale, simd_load(to)) : simd_mul(dot, scale));
            }
        }
    }
}

FA_INLINE void bytes_qk_of(float *s, const float *q, int ld, int rows, fa_matrix k, int64_t keys, int64_t dim, fastattn_dtype dtype) {
    const int64_t pitch = fa_round_up(dim, FA_ROW_STEP);
    bytes_rows x;
    find_rows(&x, k, keys);
    bytes_query queries[FA_PANEL_ROWS];
    for (int r = 0; r < rows; r++) {
        bytes_query *of = queries + r;
        of->row = (const char *)(q + r * pitch);
        memcpy(&of->head, of->row, sizeof of->head);
        of->next[0] = 0, of->next[1] = of->head.ends[0];
    }
    for (int64_t d = 0; d < dim; d += BYTES_NUMBERS) {
        __m512i panel[2 * PANEL_VECTORS];
        float scales[4][BYTES_KEYS];
        turn_bytes(panel, &x, keys, d, dim, dtype);
        scales_of(scales, &x, keys, d, dim, dtype);
        for (int r = 0; r < rows; r += 2)
            if (keys > 3 * SIMD_LANES) {
                if (r + 1 < rows) bytes_scores(2, 4, s + r * ld, ld, queries + r, panel, scales[0], d, dim, dtype);
                else bytes_scores(1, 4, s + r * ld, ld, queries + r, panel, scales[0], d, dim, dtype);
            } else
                for (int64_t j = 0; j < keys; j += SIMD_LANES) {
                    bytes_query again[2] = {queries[r], queries[r + 1 < rows ? r + 1 : r]};
                    bytes_query *of = j + SIMD_LANES < keys ? again : queries + r;
                    const __m512i *strip = panel + j / SIMD_LANES;
                    if (r + 1 < rows) bytes_scores(2, 1, s + r * ld + j, ld, of, strip, scales[0] + j, d, dim, dtype);
                    else bytes_scores(1, 1, s + r * ld + j, ld, of, strip, scales[0] + j, d, dim, dtype);
                }
    }
}

void fastattn_quantised_qk_vnni(float *s, const float *q, int ld, int rows, fa_matrix k, int64_t from, int64_t keys, int64_t head_dim) {
    const int64_t pitch = fa_round_up(head_dim, FA_ROW_STEP);
    if (!fit_bytes(head_dim)) {
        quantised_qk(s, q, ld, rows, k, from, keys, head_dim);
        return;
    }
    for (int64_t j = 0; j < keys; j += BYTES_KEYS) {
        const int64_t n = keys - j < BYTES_KEYS ? keys - j : BYTES_KEYS;
        FA_BY_QUANTISED(k.dtype, bytes_qk_of, s + j, q, ld, rows, fa_rows_from(k, from + j), n, head_dim);
    }
    for (int r = 0; r < rows; r++, q += pitch, s += ld) {
        bytes_row head;
        memcpy(&head, q, sizeof head);
        if (head.unit == 0.0f) scores_of_numbers(s, (const char *)q + sizeof head, (fastattn_dtype)head.dtype, ld, k, from, keys, head_dim);
    }
}

/* Values */

/* The weights of a row and 64 keys, in either plane a quad of keys after the other, and what they are times. A row has four of these: those of
 * the groups of int4, or one of int8. */
enum { WEIGHT_GROUPS = 4 };

typedef struct bytes_weights {
    __m512i planes[2];
    float unit;
} bytes_weights;

/* Whether all scales can be part of a weight. */
FA_INLINE int weigh_well(float scales[4][BYTES_KEYS], int groups, int64_t keys) {
    const simd_f zero = simd_set1(0.0f);
    simd_m well = simd_eq(zero, zero);
    for (int g = 0; g < groups; g++)
        for (int64_t j = 0; j < keys; j += SIMD_LANES) {
            const simd_f scale = simd_load(scales[g] + j);
            well &= simd_not(simd_lt(scale, zero)) & simd_lt(scale, simd_set1(INFINITY));
        }
    return !simd_any(simd_not(well));
}

/* Dword n of quarter l becomes dword l of quarter n. */
FA_INLINE __m512i turn_dwords(__m512i x) {
    return _mm512_permutexvar_epi32(_mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0), x);
}

/* Powers times scales as such weights; 0 where they are too small, and then float32 has the row. */
FA_INLINE int weigh_bytes(bytes_weights *to, const float *p, const float *scales, int64_t keys) {
    const __m512i low = _mm512_set1_epi16(255);
    simd_f weights[4], most = simd_set1(0.0f);
    FA_UNROLL for (int v = 0; v < 4; v++) {
        const int64_t left = keys - v * SIMD_LANES;
        weights[v] = simd_set1(0.0f);
        if (left > 0) weights[v] = simd_mul(load_as(p + v * SIMD_LANES, left, FASTATTN_FLOAT32), simd_load(scales + v * SIMD_LANES));
        most = simd_max(weights[v], most);
    }
    const float largest = simd_largest(most);
    const simd_f factor = simd_set1(largest > 0.0f ? (float)MOST_WEIGHT / largest : 0.0f);
    __m512i of[4];
    FA_UNROLL for (int v = 0; v < 4; v++) of[v] = _mm512_cvtps_epi32(simd_mul(weights[v], factor));
    const __m512i first = _mm512_packus_epi32(of[0], of[1]), last = _mm512_packus_epi32(of[2], of[3]);
    to->planes[0] = turn_dwords(_mm512_packus_epi16(_mm512_srli_epi16(first, 8), _mm512_srli_epi16(last, 8)));
    to->planes[1] = turn_dwords(_mm512_packus_epi16(_mm512_and_si512(first, low), _mm512_and_si512(last, low)));
    to->unit = largest * (1.0f / (float)MOST_WEIGHT);
    return largest >= 0x1p-100f || largest == 0.0f;
}

/* Quads of 64 bytes of four rows: quad n of quarter l of vector i has their bytes 16 l + 4 i + n. All four vectors, or two from `first` on. */
FA_INLINE void zip_bytes(__m512i *to, int first, int count, const char *const *row, int64_t at, __mmask64 there) {
    __m512i bytes[4];
    FA_UNROLL for (int i = 0; i < 4; i++) bytes[i] = _mm512_maskz_loadu_epi8(there, row[i] + at);
    FA_UNROLL for (int i = first / 2; i < (first + count) / 2; i++) {
        const __m512i front = i ? _mm512_unpackhi_epi8(bytes[0], bytes[1]) : _mm512_unpacklo_epi8(bytes[0], bytes[1]);
        const __m512i back = i ? _mm512_unpackhi_epi8(bytes[2], bytes[3]) : _mm512_unpacklo_epi8(bytes[2], bytes[3]);
        to[2 * i - first] = _mm512_unpacklo_epi16(front, back), to[2 * i - first + 1] = _mm512_unpackhi_epi16(front, back);
    }
}

/* Quads of a group of int4 of four rows, times 16: its first 16 numbers, and the others. */
FA_INLINE void zip_nibbles(__m512i to[2], const char *const *row, int64_t at) {
    __m256i halves[2];
    FA_UNROLL for (int i = 0; i < 2; i++)
        halves[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)(row[2 * i] + at))),
                                            _mm_loadu_si128((const __m128i *)(const void *)(row[2 * i + 1] + at)), 1);
    const __m512i by_row = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
    const __m512i upper = _mm512_set1_epi8((char)0xf0), bias = _mm512_set1_epi8((char)0x80);
    const __m512i quads = turn_dwords(_mm512_inserti64x4(_mm512_castsi256_si512(halves[0]), halves[1], 1));
    const __m512i bytes = _mm512_shuffle_epi8(quads, by_row);
    to[0] = _mm512_and_si512(_mm512_xor_si512(_mm512_slli_epi16(bytes, 4), bias), upper);
    to[1] = _mm512_and_si512(_mm512_xor_si512(bytes, bias), upper);
}

/* sum[row][vector] of `count` vectors from vector `first` on, constants, of the 64 numbers from d on. Past the end of int4 is the last group
 * again. */
FA_INLINE void bytes_tile(int rows, int first, int count, __m512i sum[4][4], const bytes_weights *weights, const bytes_rows *v, int64_t keys,
                          int asks, int64_t d, int64_t dim, fastattn_dtype dtype) {
    const int by_group = dtype == FASTATTN_INT4, group = by_group ? (int)(d % BYTES_NUMBERS) / FA_GROUP + first / 2 : 0;
    const int64_t last = dim / 2 - FA_GROUP / 2, begin = by_group ? d / 2 + first / 2 * (FA_GROUP / 2) : d;
    const int64_t at = by_group && begin > last ? last : begin, next = at < last ? at + FA_GROUP / 2 : last;
    const __mmask64 there = bytes_there(d, dim, dtype);
    const char *line = (const char *)(weights + group);
    __m512i dots[8][4];
    FA_UNROLL for (int i = 0; i < 2 * rows; i++)
        FA_UNROLL for (int n = 0; n < count; n++) dots[i][n] = _mm512_setzero_si512();
    for (int64_t j = 0; j < keys; j += QUAD_BYTES, line += QUAD_BYTES) {
        __m512i values[4];
        FA_UNROLL for (int i = 0; i < QUAD_BYTES; i++)
            if (asks) simd_fetch((const char *)(v->later[j + i] + (uintptr_t)at));
        if (by_group) {
            zip_nibbles(values, v->row + j, at);
            if (count == 4) zip_nibbles(values + 2, v->row + j, next);
        } else
            zip_bytes(values, first, count, v->row + j, at, there);
        FA_UNROLL for (int i = 0; i < 2 * rows; i++)
            FA_UNROLL for (int n = 0; n < count; n++) {
                const size_t of = (size_t)(i / 2 * WEIGHT_GROUPS + (by_group ? n / 2 : 0)) * sizeof(bytes_weights) + (size_t)(i % 2) * sizeof(__m512i);
                dots[i][n] = simd_dot_bytes(quad_of(line + of), values[n], dots[i][n]);
            }
    }
    FA_UNROLL for (int r = 0; r < rows; r++)
        FA_UNROLL for (int n = 0; n < count; n++) sum[r][first + n] = of_planes(dots[2 * r][n], dots[2 * r + 1][n]);
    __asm__ volatile("" : : "r"(sum) : "memory"); /* not in registers, which the next tile needs */
}

/* o = o alpha + what up to 64 values come to, for 1, 2 or 4 rows, a constant, and the 64 numbers from d on. The quads are made in registers, as
 * many at a time as the products of all rows have accumulators for. */
FA_INLINE void bytes_add(int rows, float *o, int64_t pitch, const float *alpha, const bytes_weights *weights, const bytes_rows *v,
                         int64_t keys, int first_rows, int64_t d, int64_t dim, fastattn_dtype dtype) {
    const int asks = first_rows && (dtype == FASTATTN_INT8 || d % BYTES_NUMBERS == 0);
    __m512i sum[4][4];
    if (rows == 4) {
        bytes_tile(4, 0, 2, sum, weights, v, keys, asks, d, dim, dtype);
        bytes_tile(4, 2, 2, sum, weights, v, keys, 0, d, dim, dtype);
    } else
        bytes_tile(rows, 0, 4, sum, weights, v, keys, asks, d, dim, dtype);
    FA_UNROLL for (int r = 0; r < rows; r++) {
        simd_f values[4];
        FA_UNROLL for (int n = 0; n < 4; n++) {
            const bytes_weights *of = weights + r * WEIGHT_GROUPS + (dtype == FASTATTN_INT4 ? d % BYTES_NUMBERS / FA_GROUP + n / 2 : 0);
            const float unit = dtype == FASTATTN_INT4 ? of->unit / 16.0f : of->unit;
            values[n] = simd_mul(_mm512_cvtepi32_ps(sum[r][n]), simd_set1(unit));
        }
        if (dtype == FASTATTN_INT8) simd_exchange_quads(values);
        FA_UNROLL for (int n = 0; n < 4; n++) {
            float *to = o + r * pitch + d + n * SIMD_LANES;
            if (d + n * SIMD_LANES < dim) simd_store(to, simd_fma(simd_load(to), simd_set1(alpha[r]), values[n]));
        }
    }
}

/* What 128 numbers from d on of a row come to in float32. */
static FA_NOINLINE void values_of_numbers(float *o, const float *p, int ld, fa_matrix v, int64_t keys, int64_t d, int64_t dim, fastattn_dtype dtype) {
    const int64_t end = dim - d < BYTES_NUMBERS ? dim : d + BYTES_NUMBERS;
    for (; d < end; d += FA_GROUP) quantised_group(1, o, 0, unchanged, p, ld, v, keys, d, dim, dtype);
}

/* As many rows as there is room for the weights of, and up to BYTES_KEYS values. */
FA_INLINE void bytes_pv_of(float *o, const float *alpha, const float *p, int ld, int rows, fa_matrix v, int64_t keys, int64_t dim,
                           fastattn_dtype dtype) {
    const int64_t pitch = fa_round_up(dim, FA_ROW_STEP);
    const int groups = dtype == FASTATTN_INT4 ? WEIGHT_GROUPS : 1;
    bytes_rows x;
    bytes_weights weights[BYTES_ROWS][WEIGHT_GROUPS];
    unsigned odd = 0;
    find_rows(&x, v, keys);
    for (int64_t d = 0; d < dim; d += BYTES_NUMBERS) {
        if (d == 0 || dtype == FASTATTN_INT4) {
            float scales[4][BYTES_KEYS];
            scales_of(scales, &x, keys, d, dim, dtype);
            const int well = weigh_well(scales, groups, keys);
            odd = 0;
            for (int r = 0; r < rows; r++) {
                int fits = well;
                for (int g = 0; g < groups; g++) fits &= weigh_bytes(&weights[r][g], p + r * ld, scales[g], keys);
                for (int g = 0; g < groups && !fits; g++) weights[r][g].unit = 0.0f;
                odd |= (unsigned)!fits << r;
            }
        }
        const int64_t end = dim - d < BYTES_NUMBERS ? dim : d + BYTES_NUMBERS;
        for (int64_t n = d; n < end; n += 64) {
            int r = 0;
            for (; rows - r >= 4; r += 4) bytes_add(4, o + r * pitch, pitch, alpha + r, weights[r], &x, keys, r == 0, n, dim, dtype);
            if (rows & 2) bytes_add(2, o + r * pitch, pitch, alpha + r, weights[r], &x, keys, r == 0, n, dim, dtype), r += 2;
            if (rows & 1) bytes_add(1, o + r * pitch, pitch, alpha + r, weights[r], &x, keys, r == 0, n, dim, dtype);
        }
        for (int r = 0; r < rows; r++)
            if (odd >> r & 1) values_of_numbers(o + r * pitch, p + r * ld, ld, v, keys, d, dim, dtype);
    }
}

void fastattn_quantised_pv_vnni(float *o, const float *alpha, const float *p, int ld, int rows, fa_matrix v, int64_t from, int64_t keys,
                                int64_t v_head_dim) {
    const int64_t pitch = fa_round_up(v_head_dim, FA_ROW_STEP);
    for (int n; rows > 0; rows -= n, o += n * pitch, alpha += n, p += n * ld) {
        n = rows < BYTES_ROWS ? rows : BYTES_ROWS;
        for (int64_t j = 0, some; j < keys; j += some) { /* at most up to a multiple of BYTES_KEYS, whatever is left out before */
            const int64_t left = BYTES_KEYS - (from + j) % BYTES_KEYS;
            some = keys - j < left ? keys - j : left;
            FA_BY_QUANTISED(v.dtype, bytes_pv_of, o, j ? unchanged : alpha, p + j, ld, n, fa_rows_from(v, from + j), some, v_head_dim);
        }
    }
}

#undef MOST_INTEGER
#endif
