/* Template: rows of memory to panels of lanes and back, and changes of storage type. A new storage type is a line in
 * element_size, load_full, and (for outputs) store_full. */

FA_INLINE int64_t element_size(fastattn_dtype dtype) {
    return dtype == FASTATTN_BOOL ? 1 : dtype == FASTATTN_FLOAT32 ? 4 : dtype == FASTATTN_FLOAT64 ? 8 : 2;
}

FA_INLINE simd_f load_full(const void *from, fastattn_dtype dtype) {
    switch (dtype) {
    case FASTATTN_FLOAT16: return simd_load_f16((const uint16_t *)from);
    case FASTATTN_BFLOAT16: return simd_load_bf16((const uint16_t *)from);
    case FASTATTN_BOOL: return simd_load_bool((const uint8_t *)from);
    default: return simd_load((const float *)from);
    }
}

FA_INLINE void store_full(void *to, simd_f x, fastattn_dtype dtype) {
    switch (dtype) {
    case FASTATTN_FLOAT16: simd_store_f16((uint16_t *)to, x); break;
    case FASTATTN_BFLOAT16: simd_store_bf16((uint16_t *)to, x); break;
    default: simd_store((float *)to, x);
    }
}

/* The first n <= SIMD_LANES elements; the other lanes are 0. */
FA_INLINE simd_f load_as(const void *from, int64_t n, fastattn_dtype dtype) {
    if (n >= SIMD_LANES) return load_full(from, dtype);
    float part[SIMD_LANES] = {0.0f};
    memcpy(part, from, (size_t)(n * element_size(dtype)));
    return load_full(part, dtype);
}

FA_INLINE void store_as(void *to, simd_f x, int64_t n, fastattn_dtype dtype) {
    if (n >= SIMD_LANES) {
        store_full(to, x, dtype);
        return;
    }
    float part[SIMD_LANES];
    store_full(part, x, dtype);
    memcpy(to, part, (size_t)(n * element_size(dtype)));
}

FA_INLINE int64_t at_most_lanes(int64_t n) { return n < SIMD_LANES ? n : SIMD_LANES; }

static void pack(float *q, int ld, const void *const *rows_of, int rows, int64_t head_dim, fastattn_dtype dtype,
                 float sign) {
    const simd_f factor = simd_set1(sign);
    const int64_t itemsize = element_size(dtype);
    for (int row = 0; row < rows; row += SIMD_LANES)
        for (int64_t d = 0; d < head_dim; d += SIMD_LANES) {
            int64_t n = at_most_lanes(head_dim - d);
            simd_f square[SIMD_LANES];
            for (int i = 0; i < SIMD_LANES; i++)
                square[i] = load_as((const char *)rows_of[row + i] + d * itemsize, n, dtype);
            simd_transpose(square);
            for (int64_t i = 0; i < n; i++) simd_store(q + (d + i) * ld + row, simd_mul(square[i], factor));
        }
}

static void unpack(void *const *rows_of, int count, const float *o, int ld, const float *factor, int64_t v_head_dim,
                   fastattn_dtype dtype) {
    const int64_t itemsize = element_size(dtype);
    for (int row = 0; row < count; row += SIMD_LANES) {
        const simd_f scale = simd_load(factor + row);
        const int lanes = (int)at_most_lanes(count - row);
        for (int64_t d = 0; d < v_head_dim; d += SIMD_LANES) {
            int64_t n = at_most_lanes(v_head_dim - d);
            simd_f square[SIMD_LANES];
            for (int64_t i = 0; i < SIMD_LANES; i++)
                square[i] = i < n ? simd_mul(simd_load(o + (d + i) * ld + row), scale) : simd_set1(0.0f);
            simd_transpose(square);
            for (int i = 0; i < lanes; i++) store_as((char *)rows_of[row + i] + d * itemsize, square[i], n, dtype);
        }
    }
}

static void widen(float *to, const void *from, int64_t stride, int64_t keys, int64_t head_dim, fastattn_dtype dtype) {
    const int64_t itemsize = element_size(dtype);
    for (int64_t j = 0; j < keys; j++, to += head_dim) {
        const char *row = (const char *)from + j * stride;
        for (int64_t d = 0; d < head_dim; d += SIMD_LANES) {
            int64_t n = at_most_lanes(head_dim - d);
            store_as(to + d, load_as(row + d * itemsize, n, dtype), n, FASTATTN_FLOAT32);
        }
    }
}

static int finite(const float *v, int64_t stride, int64_t keys, int64_t v_head_dim) {
    /* x * 0 is 0 for finite x, and NaN else. */
    const simd_f zero = simd_set1(0.0f);
    simd_f sum = zero;
    for (int64_t j = 0; j < keys; j++)
        for (int64_t d = 0; d < v_head_dim; d += SIMD_LANES)
            sum = simd_fma(load_as(v + j * stride + d, v_head_dim - d, FASTATTN_FLOAT32), zero, sum);
    return simd_all(simd_eq(sum, zero));
}
