/* Template: the two products and the softmax for few rows, as in decoding. Queries as lanes would leave most lanes empty there, so
 * the lanes are numbers of one key or value, and in the softmax keys: what memory brings is read once, front to back, in its
 * storage type, for all rows.
 *
 * A tile keeps FEW_SUMS accumulators: rows x keys of them for q.k, rows x vectors for p.v. */

#define FEW_SUMS (SIMD_TILE_VECTORS * SIMD_TILE_WIDTH(SIMD_TILE_VECTORS) >= 16 ? 16 : 8)

/* What is asked of memory ahead of its use. The processor foresees rows that follow each other, up to the end of a page; rows
 * that are apart, as those of one head in a (length, heads, head_dim) cache, it does not. Asking at the pace of the arithmetic
 * leaves the requests in flight to the loads. */
#define FEW_BYTES_AHEAD 8192

FA_INLINE uintptr_t few_ahead(int64_t stride, int64_t row_bytes, int64_t fewest_rows) {
    const int64_t rows = FEW_BYTES_AHEAD / (row_bytes + 1) + 1;
    return (uintptr_t)stride * (uintptr_t)(rows < fewest_rows ? fewest_rows : rows);
}

/* Vector i of a row, and a request for the same one `ahead`, which may be anywhere, once for every cache line. */
FA_INLINE simd_f few_load(const char *row, int64_t i, uintptr_t ahead, fastattn_dtype dtype) {
    const int64_t bytes = SIMD_LANES * fa_size_of(dtype);
    if (i * bytes % 64 == 0) simd_fetch((const char *)((uintptr_t)(row + i * bytes) + ahead));
    return load_full(row + i * bytes, dtype);
}

/* s[row][key] for `rows` rows (a constant that divides FEW_SUMS) and FEW_SUMS / rows keys, of which the last may repeat. */
FA_INLINE void few_scores(int rows, float *s, int64_t s_pitch, const float *q, int64_t pitch, const char *k, int64_t stride,
                          int keys, int64_t head_dim, uintptr_t ahead, fastattn_dtype dtype) {
    const int tile_keys = FEW_SUMS / rows;
    const char *key[FEW_SUMS];
    simd_f sum[FEW_SUMS];
    float dots[FEW_SUMS];
    FA_UNROLL for (int j = 0; j < tile_keys; j++) key[j] = k + (j < keys ? j : keys - 1) * stride;
    FA_UNROLL for (int i = 0; i < FEW_SUMS; i++) sum[i] = simd_set1(0.0f);
    int64_t d = 0;
    for (; d + SIMD_LANES <= head_dim; d += SIMD_LANES)
        FA_UNROLL for (int j = 0; j < tile_keys; j++) {
            const simd_f x = few_load(key[j], d / SIMD_LANES, ahead, dtype);
            FA_UNROLL for (int r = 0; r < rows; r++)
                sum[r * tile_keys + j] = simd_fma(x, simd_load(q + r * pitch + d), sum[r * tile_keys + j]);
        }
    if (d < head_dim)
        FA_UNROLL for (int j = 0; j < tile_keys; j++) {
            const simd_f x = load_as(key[j] + d * fa_size_of(dtype), head_dim - d, dtype);
            FA_UNROLL for (int r = 0; r < rows; r++)
                sum[r * tile_keys + j] = simd_fma(x, simd_load(q + r * pitch + d), sum[r * tile_keys + j]);
        }
    FA_UNROLL for (int i = 0; i < FEW_SUMS; i += SIMD_LANES) simd_store(dots + i, simd_sum_lanes(sum + i));
    FA_UNROLL for (int r = 0; r < rows; r++)
        memcpy(s + r * s_pitch, dots + r * tile_keys, (size_t)tile_keys * sizeof(float));
}

/* o[row] = o[row] * alpha[row] + p v for `rows` rows and `vectors` vectors of v_head_dim (both constants); of the last vector
 * `last` lanes are there, or all. */
FA_INLINE void few_values(int rows, int vectors, float *o, int64_t pitch, const float *alpha, const float *p, int64_t p_pitch,
                          const char *v, int64_t stride, int64_t keys, int64_t last, uintptr_t ahead,
                          fastattn_dtype dtype) {
    simd_f sum[FEW_SUMS];
    FA_UNROLL for (int i = 0; i < rows * vectors; i++) sum[i] = simd_set1(0.0f);
    for (int64_t j = 0; j < keys; j++, v += stride) {
        simd_f x[FEW_SUMS];
        FA_UNROLL for (int i = 0; i < vectors; i++) {
            x[i] = last < SIMD_LANES && i == vectors - 1 ? load_as(v + i * SIMD_LANES * fa_size_of(dtype), last, dtype)
                                                         : few_load(v, i, ahead, dtype);
        }
        FA_UNROLL for (int r = 0; r < rows; r++) {
            const simd_f weight = simd_set1(p[r * p_pitch + j]);
            FA_UNROLL for (int i = 0; i < vectors; i++) sum[r * vectors + i] = simd_fma(weight, x[i], sum[r * vectors + i]);
        }
    }
    FA_UNROLL for (int r = 0; r < rows; r++)
        FA_UNROLL for (int i = 0; i < vectors; i++) {
            float *at = o + r * pitch + i * SIMD_LANES;
            simd_store(at, simd_fma(simd_load(at), simd_set1(alpha[r]), sum[r * vectors + i]));
        }
}

FA_INLINE void few_scores_of(int rows, float *s, int64_t s_pitch, const float *q, int64_t pitch, const char *k, int64_t stride,
                             int64_t keys, int64_t head_dim, fastattn_dtype dtype) {
    const int tile_keys = FEW_SUMS / rows;
    const uintptr_t ahead = few_ahead(stride, head_dim * fa_size_of(dtype), tile_keys);
    for (int64_t j = 0; j < keys; j += tile_keys)
        few_scores(rows, s + j, s_pitch, q, pitch, k + j * stride, stride, keys - j < tile_keys ? (int)(keys - j) : tile_keys,
                   head_dim, ahead, dtype);
}

FA_INLINE void few_values_of(int rows, float *o, int64_t pitch, const float *alpha, const float *p, int64_t p_pitch, const char *v,
                             int64_t stride, int64_t keys, int64_t v_head_dim, fastattn_dtype dtype) {
    const uintptr_t ahead = few_ahead(stride, v_head_dim * fa_size_of(dtype), 1);
    int64_t d = 0;
/* As many vectors at a time as there are accumulators, which hide each other's latency. */
#define FEW_STRIPS(vectors)                                                                                     \
    if (rows * vectors <= FEW_SUMS)                                                                             \
        for (; v_head_dim - d > (vectors - 1) * SIMD_LANES; d += vectors * SIMD_LANES)                          \
            few_values(rows, vectors, o + d, pitch, alpha, p, p_pitch, v + d * fa_size_of(dtype), stride, keys, \
                       v_head_dim - d - (vectors - 1) * SIMD_LANES, ahead, dtype);
    FEW_STRIPS(8)
    FEW_STRIPS(4)
    FEW_STRIPS(2)
    FEW_STRIPS(1)
#undef FEW_STRIPS
}

/* Calls f(rows, ..., dtype) for the rows in groups of 4, 2 and 1, as constants, as is the storage type. */
#define FEW_BY_ROWS(dtype, f, at, ...)                                         \
    for (int row = 0; row < rows;) {                                           \
        if (rows - row >= 4) {                                                 \
            FA_BY_STORAGE(dtype, f, 4, at, __VA_ARGS__)                        \
            row += 4;                                                          \
        } else if (rows - row >= 2) {                                          \
            FA_BY_STORAGE(dtype, f, 2, at, __VA_ARGS__)                        \
            row += 2;                                                          \
        } else {                                                               \
            FA_BY_STORAGE(dtype, f, 1, at, __VA_ARGS__)                        \
            row += 1;                                                          \
        }                                                                      \
    }

static void qk_few(float *s, int64_t s_pitch, const float *q, int64_t pitch, int rows, fa_matrix k, int64_t keys,
                   int64_t head_dim) {
    FEW_BY_ROWS(k.dtype, few_scores_of, s + row * s_pitch, s_pitch, q + row * pitch, pitch, k.at, k.stride, keys, head_dim)
}

/* The largest lane of x, or `least`. */
FA_INLINE float few_largest(simd_f x, float least) {
    float lanes[SIMD_LANES];
    simd_store(lanes, x);
    FA_UNROLL for (int n = SIMD_LANES / 2; n > 0; n /= 2)
        FA_UNROLL for (int i = 0; i < n; i++) lanes[i] = lanes[i] > lanes[i + n] ? lanes[i] : lanes[i + n];
    return lanes[0] > least ? lanes[0] : least;
}

/* As in softmax.h, but for the orientation. */
static void softmax_few(float *s, int64_t s_pitch, int rows, int64_t keys, float c, float *m, float *l, float *alpha) {
    const simd_f scale = simd_set1(c);
    const int64_t whole = fa_round_up(keys, SIMD_LANES);
    for (int row = 0; row < rows; row += SIMD_LANES, s += SIMD_LANES * s_pitch) {
        simd_f sums[SIMD_LANES];
        float moved[SIMD_LANES];
        for (int r = 0; r < SIMD_LANES; r++) {
            sums[r] = simd_set1(0.0f);
            moved[r] = 0.0f;
            if (row + r >= rows) continue;
            float *at = s + r * s_pitch;
            for (int64_t j = keys; j < whole; j++) at[j] = -INFINITY;
            simd_f most = simd_load(at);
            for (int64_t j = SIMD_LANES; j < whole; j += SIMD_LANES) most = simd_max(most, simd_load(at + j));
            const float old = m[row + r], top = few_largest(most, old), base = top == -INFINITY ? 0.0f : top;
            m[row + r] = top;
            moved[r] = old - base;
            for (int64_t j = 0; j < whole; j += SIMD_LANES) {
                const simd_f x = exp2_of(simd_sub(simd_load(at + j), simd_set1(base)), scale);
                simd_store(at + j, x);
                sums[r] = simd_add(sums[r], x);
            }
        }
        const simd_f fade = exp2_of(simd_load(moved), scale);
        simd_store(alpha + row, fade);
        simd_store(l + row, simd_fma(simd_load(l + row), fade, simd_sum_lanes(sums)));
    }
}

static void pv_few(float *o, int64_t pitch, const float *alpha, const float *p, int64_t p_pitch, int rows, fa_matrix v,
                   int64_t keys, int64_t v_head_dim) {
    FEW_BY_ROWS(v.dtype, few_values_of, o + row * pitch, pitch, alpha + row, p + row * p_pitch, p_pitch, v.at, v.stride, keys,
                v_head_dim)
}
