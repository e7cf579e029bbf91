/* Template: rows of memory to panels of lanes and back, and changes of storage type. A new storage type is a line in
 * fa_size_of, load_full and load_as, and (for outputs) store_full and store_as. */

FA_INLINE simd_f load_full(const void *from, fastattn_dtype dtype) {
    switch (FA_HELD_OF(dtype)) {
    case FASTATTN_FLOAT16: return simd_from_f16(simd_load_h((const uint16_t *)from));
    case FASTATTN_BFLOAT16: return simd_from_bf16(simd_load_h((const uint16_t *)from));
    case FASTATTN_BOOL: return simd_load_bool((const uint8_t *)from);
    case FASTATTN_FLOAT64: return simd_load_double((const double *)from);
    default: return simd_load((const float *)from);
    }
}

FA_INLINE void store_full(void *to, simd_f x, fastattn_dtype dtype) {
    switch (FA_HELD_OF(dtype)) {
    case FASTATTN_FLOAT16: simd_store_h((uint16_t *)to, simd_to_f16(x)); break;
    case FASTATTN_BFLOAT16: simd_store_h((uint16_t *)to, simd_to_bf16(x)); break;
    default: simd_store((float *)to, x);
    }
}

/* `native`, of bfloat16 alone: the processor rounds two vectors at once. Subnormal numbers become 0 so, which is why vectors with a 0 are
 * left to the rounding of lanes. */
FA_INLINE void store_both(void *first, void *second, simd_f a, simd_f b, fastattn_dtype dtype, int native) {
#ifdef SIMD_NATIVE_BF16
    if (native) {
        const simd_f halves = simd_halves_bf16(a, b);
        if (!simd_any_zero_bf16(halves)) {
            simd_store_h((uint16_t *)first, simd_first_halves(halves)), simd_store_h((uint16_t *)second, simd_last_halves(halves));
            return;
        }
    }
#endif
    (void)native;
    store_full(first, a, dtype), store_full(second, b, dtype);
}

/* 2 * SIMD_LANES elements in two vectors, and back: the first and the last of them, or, if native, the even and the odd ones. */
FA_INLINE void load_two(const void *from, simd_f *a, simd_f *b, fastattn_dtype dtype, int native) {
#ifdef SIMD_NATIVE_BF16
    if (native) {
        const simd_f halves = simd_load((const float *)from);
        *a = simd_first_bf16(halves), *b = simd_second_bf16(halves);
        return;
    }
#endif
    (void)native;
    *a = load_full(from, dtype), *b = load_full((const char *)from + SIMD_LANES * fa_size_of(dtype), dtype);
}

FA_INLINE void store_two(void *to, simd_f a, simd_f b, fastattn_dtype dtype, int native) {
#ifdef SIMD_NATIVE_BF16
    if (native) {
        const simd_f halves = simd_halves_bf16(a, b);
        if (!simd_any_zero_bf16(halves)) {
            simd_store((float *)to, simd_riffle_halves(halves));
            return;
        }
        simd_zip(&a, &b);
    }
#endif
    store_both(to, (char *)to + SIMD_LANES * fa_size_of(dtype), a, b, dtype, 0);
    (void)native;
}

/* The first n elements, and 0 in the lanes beyond, if there are any. */
FA_INLINE simd_f load_as(const void *from, int64_t n, fastattn_dtype dtype) {
    if (n >= SIMD_LANES) return load_full(from, dtype);
    switch (FA_HELD_OF(dtype)) {
    case FASTATTN_FLOAT16: return simd_from_f16(simd_load_h_part((const uint16_t *)from, n));
    case FASTATTN_BFLOAT16: return simd_from_bf16(simd_load_h_part((const uint16_t *)from, n));
    default: return simd_load_part((const float *)from, n);
    }
}

FA_INLINE void store_as(void *to, simd_f x, int64_t n, fastattn_dtype dtype) {
    if (n >= SIMD_LANES) {
        store_full(to, x, dtype);
        return;
    }
    switch (FA_HELD_OF(dtype)) {
    case FASTATTN_FLOAT16: simd_store_h_part((uint16_t *)to, simd_to_f16(x), n); break;
    case FASTATTN_BFLOAT16: simd_store_h_part((uint16_t *)to, simd_to_bf16(x), n); break;
    default: simd_store_part((float *)to, x, n);
    }
}

/* Calls f(..., dtype) with the storage type as a constant, so that no loop asks for it. */
#define FA_BY_STORAGE(dtype, f, ...)                                                 \
    switch (FA_HELD_OF(dtype)) {                                                     \
    case FASTATTN_FLOAT16: f(__VA_ARGS__, FASTATTN_FLOAT16); break;                  \
    case FASTATTN_BFLOAT16: f(__VA_ARGS__, FASTATTN_BFLOAT16); break;                \
    default: f(__VA_ARGS__, FASTATTN_FLOAT32);                                       \
    }

/* The same of keys by rows, which plain C turns into float32 first. */
#ifdef SIMD_PLAIN
#define FA_BY_STORAGE_OF_KEYS(dtype, f, ...) f(__VA_ARGS__, FASTATTN_FLOAT32);
#define KEYS_OF_ROWS widened
#else
#define FA_BY_STORAGE_OF_KEYS FA_BY_STORAGE
#define KEYS_OF_ROWS as_stored
#endif

/* SIMD_LANES rows, as many elements of each, to vectors of lanes; and back. */
FA_INLINE void pack_square(float *q, int ld, const void *const *rows_of, int64_t d, simd_f sign, fastattn_dtype dtype) {
    simd_f square[SIMD_LANES];
    FA_UNROLL for (int i = 0; i < SIMD_LANES; i++)
        square[i] = load_full((const char *)rows_of[i] + d * fa_size_of(dtype), dtype);
    simd_transpose(square);
    FA_UNROLL for (int i = 0; i < SIMD_LANES; i++) simd_store(q + (d + i) * ld, simd_mul(square[i], sign));
}

/* x * 0 is 0 for finite x, and NaN else: what such products add up to tells whether all were finite. */
FA_INLINE int were_finite(simd_f sum) { return !simd_any(simd_not(simd_eq(sum, simd_set1(0.0f)))); }

FA_INLINE void unpack_square(void *const *rows_of, const float *o, int ld, int64_t d, simd_f factor, simd_f *sum,
                             fastattn_dtype dtype) {
    const simd_f zero = simd_set1(0.0f);
    simd_f square[SIMD_LANES];
    FA_UNROLL for (int i = 0; i < SIMD_LANES; i++) {
        square[i] = simd_mul(simd_load(o + (d + i) * ld), factor);
        sum[i % 4] = simd_fma(square[i], zero, sum[i % 4]);
    }
    simd_transpose(square);
    FA_UNROLL for (int i = 0; i < SIMD_LANES; i++) store_full((char *)rows_of[i] + d * fa_size_of(dtype), square[i], dtype);
}

/* Edges, which are few: their storage type need not be a constant, nor their loops be unrolled. */
static FA_NOINLINE void pack_edge(float *q, int ld, const void *const *rows_of, int64_t d, int64_t n, simd_f sign, fastattn_dtype dtype) {
    simd_f square[SIMD_LANES];
    for (int i = 0; i < SIMD_LANES; i++) square[i] = load_as((const char *)rows_of[i] + d * fa_size_of(dtype), n, dtype);
    simd_transpose(square);
    for (int i = 0; i < n; i++) simd_store(q + (d + i) * ld, simd_mul(square[i], sign));
}

static FA_NOINLINE void unpack_edge(void *const *rows_of, int lanes, const float *o, int ld, int64_t d, int64_t n, simd_f factor, simd_f *sum,
                                    fastattn_dtype dtype) {
    simd_f square[SIMD_LANES];
    for (int i = 0; i < SIMD_LANES; i++) {
        square[i] = i < n ? simd_mul(simd_load(o + (d + i) * ld), factor) : simd_set1(0.0f);
        *sum = simd_fma(square[i], simd_set1(0.0f), *sum);
    }
    simd_transpose(square);
    for (int i = 0; i < lanes; i++) store_as((char *)rows_of[i] + d * fa_size_of(dtype), square[i], n, dtype);
}

FA_INLINE void pack_of(float *q, int ld, const void *const *rows_of, int rows, int64_t head_dim, float sign,
                       fastattn_dtype dtype) {
    const simd_f factor = simd_set1(sign);
    for (int row = 0; row < rows; row += SIMD_LANES) {
        int64_t d = 0;
        for (; d + SIMD_LANES <= head_dim; d += SIMD_LANES)
            pack_square(q + row, ld, rows_of + row, d, factor, dtype);
        if (d < head_dim) pack_edge(q + row, ld, rows_of + row, d, head_dim - d, factor, dtype);
    }
}

FA_INLINE void unpack_of(void *const *rows_of, int count, const float *o, int ld, const float *factors,
                         int64_t v_head_dim, simd_f *sum, fastattn_dtype dtype) {
    for (int row = 0; row < count; row += SIMD_LANES) {
        const simd_f factor = simd_load(factors + row);
        const int lanes = count - row < SIMD_LANES ? count - row : SIMD_LANES;
        int64_t d = 0;
        if (lanes == SIMD_LANES)
            for (; d + SIMD_LANES <= v_head_dim; d += SIMD_LANES)
                unpack_square(rows_of + row, o + row, ld, d, factor, sum, dtype);
        for (; d < v_head_dim; d += SIMD_LANES) {
            const int64_t n = v_head_dim - d < SIMD_LANES ? v_head_dim - d : SIMD_LANES;
            unpack_edge(rows_of + row, lanes, o + row, ld, d, n, factor, sum, dtype);
        }
    }
}

/* In plain C numbers of 16 bits are converted so many at a time: compilers make vectors of such a loop as wide as these allow. */
enum { PLAIN_STEP = 4 * SIMD_LANES };

FA_INLINE void widen_of(float *to, fa_matrix from, int64_t keys, int64_t head_dim, fastattn_dtype dtype) {
    for (int64_t j = 0; j < keys; j++, to += head_dim) {
        const char *row = fa_row_at(from, j);
        int64_t d = 0;
#ifdef SIMD_PLAIN
        for (; dtype != FASTATTN_FLOAT32 && d + PLAIN_STEP <= head_dim; d += PLAIN_STEP)
            for (int i = 0; i < PLAIN_STEP; i++) to[d + i] = fa_get(row + (d + i) * fa_size_of(dtype), dtype);
#endif
        for (; d + SIMD_LANES <= head_dim; d += SIMD_LANES)
            simd_store(to + d, load_full(row + d * fa_size_of(dtype), dtype));
        if (d < head_dim)
            store_as(to + d, load_as(row + d * fa_size_of(dtype), head_dim - d, dtype), head_dim - d,
                     FASTATTN_FLOAT32);
    }
}

static void pack(float *q, int ld, const void *const *rows_of, int rows, int64_t head_dim, fastattn_dtype dtype,
                 float sign) {
    FA_BY_STORAGE(dtype, pack_of, q, ld, rows_of, rows, head_dim, sign)
}

static int unpack(void *const *rows_of, int count, const float *o, int ld, const float *factor, int64_t v_head_dim,
                  fastattn_dtype dtype) {
    const simd_f zero = simd_set1(0.0f);
    simd_f sum[4] = {zero, zero, zero, zero};
    FA_BY_STORAGE(dtype, unpack_of, rows_of, count, o, ld, factor, v_head_dim, sum)
    return were_finite(simd_add(simd_add(sum[0], sum[1]), simd_add(sum[2], sum[3])));
}

static void widen(float *to, fa_matrix from, int64_t keys, int64_t head_dim) {
    FA_BY_STORAGE(from.dtype, widen_of, to, from, keys, head_dim)
}

FA_INLINE void narrow_of(void *to, const float *from, float factor, int64_t v_head_dim, simd_f *sum, fastattn_dtype dtype) {
    int64_t d = 0;
#ifdef SIMD_PLAIN
    for (; dtype != FASTATTN_FLOAT32 && d + PLAIN_STEP <= v_head_dim; d += PLAIN_STEP) {
        float x[PLAIN_STEP];
        for (int i = 0; i < PLAIN_STEP; i += SIMD_LANES) {
            const simd_f scaled = simd_mul(simd_load(from + d + i), simd_set1(factor));
            *sum = simd_fma(scaled, simd_set1(0.0f), *sum);
            simd_store(x + i, scaled);
        }
        for (int i = 0; i < PLAIN_STEP; i++) ((uint16_t *)to)[d + i] = dtype == FASTATTN_FLOAT16 ? fa_to_f16(x[i]) : fa_to_bf16(x[i]);
    }
#endif
    for (; d < v_head_dim; d += SIMD_LANES) {
        const simd_f x = simd_mul(load_as(from + d, v_head_dim - d, FASTATTN_FLOAT32), simd_set1(factor));
        *sum = simd_fma(x, simd_set1(0.0f), *sum);
        store_as((char *)to + d * fa_size_of(dtype), x, v_head_dim - d, dtype);
    }
}

static int narrow(void *to, const float *from, float factor, int64_t v_head_dim, fastattn_dtype dtype) {
    simd_f sum = simd_set1(0.0f);
    FA_BY_STORAGE(dtype, narrow_of, to, from, factor, v_head_dim, &sum)
    return were_finite(sum);
}

/* Row after row in float32, or, where there is no room, as they are. */
static fa_matrix widened(float *room, fa_matrix stored, int64_t keys, int64_t dim) {
    if (!room) return stored;
    widen(room, stored, keys, dim);
    const fa_matrix wide = fa_matrix_at((const char *)room, dim * (int64_t)sizeof(float), FASTATTN_FLOAT32);
    return wide;
}

static void fetch(fa_matrix rows, int64_t keys, int64_t bytes) {
    for (int64_t j = 0; j < keys; j++)
        for (int64_t at = 0; at < bytes + 63; at += 64) simd_fetch(fa_row_at(rows, j) + (at < bytes ? at : bytes - 1));
}

FA_INLINE void all_finite_of(simd_f *sum, fa_matrix rows, int64_t keys, int64_t v_head_dim, fastattn_dtype dtype) {
    const simd_f zero = simd_set1(0.0f);
    for (int64_t j = 0; j < keys; j++) {
        const char *v = fa_row_at(rows, j);
        int64_t d = 0;
        for (; d + 4 * SIMD_LANES <= v_head_dim; d += 4 * SIMD_LANES)
            FA_UNROLL for (int i = 0; i < 4; i++)
                sum[i] = simd_fma(load_full(v + (d + i * SIMD_LANES) * fa_size_of(dtype), dtype), zero, sum[i]);
        for (; d < v_head_dim; d += SIMD_LANES)
            sum[0] = simd_fma(load_as(v + d * fa_size_of(dtype), v_head_dim - d, dtype), zero, sum[0]);
    }
}

static int all_finite(fa_matrix v, int64_t keys, int64_t v_head_dim) {
    const simd_f zero = simd_set1(0.0f);
    simd_f sum[4] = {zero, zero, zero, zero};
    FA_BY_STORAGE(v.dtype, all_finite_of, sum, v, keys, v_head_dim)
    return were_finite(simd_add(simd_add(sum[0], sum[1]), simd_add(sum[2], sum[3])));
}
