/* The products of attention on AMX tiles. Included by avx512.c, whose lanes do everything else.
 *
 * A tile holds 16 rows of 64 bytes. One product of tiles adds, to 16 x 16 float32, 16 rows of 32 bfloat16 times 32 x 16 that
 * lie in pairs: element (k, n) at half k % 2 of dword n of row k / 2. Scores are transposed here as everywhere, so
 *
 *     S^T[key][row]  A = K, as it lies in memory           B = Q in pairs of head_dim
 *     O^T[d][row]    A = V^T, transposed once for a panel   B = P in pairs of keys, as the softmax leaves them
 *
 * with the panels of pairs.h. The cross products of their planes, but for the smallest where that is exact enough, add up in the
 * same accumulators. */
#if defined(__GNUC__)

enum { AMX_ROWS = 16, AMX_BYTES = 64 };

/* Assembly, because gcc's intrinsics do not say which memory they touch; in its order the tiles stay interleaved as written. */
#define amx_load(tile, at, stride) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(at), "r"((int64_t)(stride)) : "memory")
#define amx_store(tile, at, stride) \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(at), "r"((int64_t)(stride)) : "memory")
#define amx_zero(tile) __asm__ volatile("tilezero %%tmm" #tile : :)
#define amx_dot(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c : :)

static void amx_enter(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } tiles = {1, 0, {0}, {0}, {0}};
    for (int i = 0; i < 8; i++) tiles.bytes[i] = AMX_BYTES, tiles.rows[i] = AMX_ROWS;
    __asm__ volatile("ldtilecfg %0" : : "m"(tiles) : "memory");
}

static void amx_leave(void) { __asm__ volatile("tilerelease"); }

/* An operand of a product: where its first tile is, the next one across and the next one along the sum, all in bytes. */
typedef struct amx_operand {
    const char *at;
    int64_t stride, across, along, plane;
} amx_operand;

/* c = [c +] a b for na x nb tiles: 1 x nb, 2 x 2 or 4 x 1 (constants), which is as many accumulators as hide the latency of a
 * product. `products` pairs of planes take part, the smallest first. */
FA_INLINE void amx_block(int na, int nb, float *c, int ld, amx_operand a, amx_operand b, int64_t steps, int products,
                         int accumulate) {
    static const int planes[4][2] = {{1, 1}, {1, 0}, {0, 1}, {0, 0}};
    const int64_t stride = ld * (int64_t)sizeof(float);
#define AMX_EACH(f)             \
    f(0);                       \
    if (na * nb > 1) { f(1); }  \
    if (na * nb > 2) { f(2); }  \
    if (na * nb > 3) { f(3); }
#define AMX_C(n) ((char *)c + (n) / nb * AMX_ROWS * stride + (n) % nb * AMX_BYTES)
#define AMX_LOAD(n) amx_load(n, AMX_C(n), stride)
#define AMX_STORE(n) amx_store(n, AMX_C(n), stride)
#define AMX_A(tile, i) amx_load(tile, at_a + (i) * a.across, a.stride)
#define AMX_B(tile, i) amx_load(tile, at_b + (i) * b.across, b.stride)
    if (accumulate) {
        AMX_EACH(AMX_LOAD)
    } else {
        AMX_EACH(amx_zero)
    }
    for (int n = 4 - products; n < 4; n++) {
        const char *at_a = a.at + planes[n][0] * a.plane, *at_b = b.at + planes[n][1] * b.plane;
        for (int64_t step = 0; step < steps; step++, at_a += a.along, at_b += b.along)
            if (na == 4) {
                AMX_B(4, 0); AMX_A(5, 0); amx_dot(0, 5, 4); AMX_A(6, 1); amx_dot(1, 6, 4);
                AMX_A(7, 2); amx_dot(2, 7, 4); AMX_A(5, 3); amx_dot(3, 5, 4);
            } else if (na == 2) {
                AMX_A(4, 0); AMX_B(5, 0); amx_dot(0, 4, 5); AMX_B(6, 1); amx_dot(1, 4, 6);
                AMX_A(7, 1); amx_dot(2, 7, 5); amx_dot(3, 7, 6);
            } else {
                AMX_A(4, 0); AMX_B(5, 0); amx_dot(0, 4, 5);
                if (nb > 1) { AMX_B(6, 1); amx_dot(1, 4, 6); }
                if (nb > 2) { AMX_B(7, 2); amx_dot(2, 4, 7); }
                if (nb > 3) { AMX_B(5, 3); amx_dot(3, 4, 5); }
            }
    }
    AMX_EACH(AMX_STORE)
#undef AMX_EACH
#undef AMX_C
#undef AMX_LOAD
#undef AMX_STORE
#undef AMX_A
#undef AMX_B
}

/* The whole product: `count` tiles of a, one after the other so that each is read once, by `rows` rows of b. */
FA_INLINE void amx_product(float *c, int ld, int rows, amx_operand a, int64_t count, amx_operand b, int64_t steps,
                           int products, int accumulate) {
#define AMX_BLOCKS(na, nb)                                                                       \
    for (; i + na <= count; i += na, c += na * AMX_ROWS * ld, a.at += na * a.across)             \
        amx_block(na, nb, c, ld, a, b, steps, products, accumulate);
    int64_t i = 0;
    switch (rows / AMX_ROWS) {
    case 1: AMX_BLOCKS(4, 1) AMX_BLOCKS(1, 1) break;
    case 2: AMX_BLOCKS(2, 2) AMX_BLOCKS(1, 2) break;
    case 3: AMX_BLOCKS(1, 3) break;
    case 4: AMX_BLOCKS(1, 4) break;
    }
#undef AMX_BLOCKS
}

FA_INLINE void amx_qk(int planes, int products, float *s, const float *q, int ld, int rows, fa_matrix k, int64_t from,
                      int64_t keys, int64_t head_dim) {
    const int64_t dim = fa_round_up(head_dim, HALVES), pairs = planes * ld * (int64_t)sizeof(float);
    const amx_operand a = {k.at + from * k.stride, k.stride, AMX_ROWS * k.stride, AMX_BYTES, dim * 2};
    const amx_operand b = {(const char *)q, pairs, AMX_BYTES, AMX_ROWS * pairs, ld * (int64_t)sizeof(float)};
    amx_product(s, ld, rows, a, fa_round_up(keys, AMX_ROWS) / AMX_ROWS, b, dim / HALVES, products, 0);
}

FA_INLINE void amx_pv(int planes, int products, float *o, const float *alpha, const float *p, int ld, int rows, fa_matrix v,
                      int64_t from, int64_t keys, int64_t v_head_dim) {
    const int64_t pairs = planes * ld * (int64_t)sizeof(float);
    const amx_operand a = {v.at + from * 2, v.stride, AMX_ROWS * v.stride, AMX_BYTES, v.stride / 2};
    const amx_operand b = {(const char *)p, pairs, AMX_BYTES, AMX_ROWS * pairs, ld * (int64_t)sizeof(float)};
    for (int row = 0; row < rows; row += AMX_ROWS) {
        const simd_f factor = simd_load(alpha + row);
        if (!simd_any(simd_not(simd_eq(factor, simd_set1(1.0f))))) continue; /* the maximum stayed */
        for (int64_t d = 0; d < v_head_dim; d++)
            simd_store(o + d * ld + row, simd_mul(simd_load(o + d * ld + row), factor));
        float *sums = o + fa_sums_row(v_head_dim) * ld + row;
        if (planes == 1) simd_store(sums, simd_mul(simd_load(sums), factor));
    }
    amx_product(o, ld, rows, a, fa_sums_row(v_head_dim) / AMX_ROWS + (planes == 1), b,
                fa_round_up(keys, HALVES) / HALVES, products, 1);
}

/* Whole tiles of bfloat16 keys are read where they lie. */
FA_INLINE fa_matrix amx_keys(int planes, float *room, fa_matrix stored, int64_t keys, int64_t head_dim) {
    if (planes == 1 && stored.dtype == FASTATTN_BFLOAT16 && keys % AMX_ROWS == 0 && head_dim % HALVES == 0) return stored;
    return pairs_keys(planes, AMX_ROWS, room, stored, keys, head_dim);
}

/* to[d][key] = from[key][d] for 8 numbers of 32 keys, strides in bytes. The four quarters of a vector take four runs of eight
 * keys, so that what is left crosses no quarter. */
FA_INLINE void amx_transpose(char *to, int64_t to_stride, const char *from, int64_t stride) {
    __m512i a[8], b[8];
    FA_UNROLL for (int i = 0; i < 8; i++) {
        a[i] = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(from + i * stride)));
        FA_UNROLL for (int quarter = 1; quarter < 4; quarter++)
            a[i] = _mm512_mask_broadcast_i32x4(a[i], (__mmask16)(15 << 4 * quarter),
                                               _mm_loadu_si128((const __m128i *)(from + (8 * quarter + i) * stride)));
    }
    FA_UNROLL for (int i = 0; i < 8; i += 2) {
        b[i] = _mm512_unpacklo_epi16(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi16(a[i], a[i + 1]);
    }
    FA_UNROLL for (int i = 0; i < 8; i += 4)
        FA_UNROLL for (int n = 0; n < 2; n++) {
            a[i + 2 * n] = _mm512_unpacklo_epi32(b[i + n], b[i + 2 + n]);
            a[i + 2 * n + 1] = _mm512_unpackhi_epi32(b[i + n], b[i + 2 + n]);
        }
    FA_UNROLL for (int n = 0; n < 4; n++) {
        _mm512_storeu_si512(to + 2 * n * to_stride, _mm512_unpacklo_epi64(a[n], a[n + 4]));
        _mm512_storeu_si512(to + (2 * n + 1) * to_stride, _mm512_unpackhi_epi64(a[n], a[n + 4]));
    }
}

/* Values transposed, with zeros in the place of numbers and keys that are not there, and for half a tile of keys beyond. A
 * value of 1 for every key follows where the powers are rounded coarsely: its product is their sum. */
FA_INLINE fa_matrix amx_values(int planes, float *room, fa_matrix stored, int64_t keys, int64_t v_head_dim) {
    const int64_t row_bytes = (fa_round_up(keys, HALVES) + HALVES) * 2, size = fa_size_of(stored.dtype);
    const fa_matrix turned = {(const char *)room, planes * row_bytes, FASTATTN_BFLOAT16};
    for (int64_t d = 0; d < fa_round_up(v_head_dim, AMX_ROWS); d += HALVES) {
        const int64_t columns = fa_round_up(v_head_dim, AMX_ROWS) - d < HALVES ? AMX_ROWS : HALVES;
        char *to = (char *)room + d * turned.stride;
        for (int64_t j = 0; j < keys; j += HALVES) {
            const char *from = stored.at + j * stored.stride + d * size;
            if (planes == 1 && stored.dtype == FASTATTN_BFLOAT16 && keys - j >= HALVES && v_head_dim - d >= columns) {
                for (int64_t n = 0; n < columns; n += 8)
                    amx_transpose(to + n * turned.stride + j * 2, turned.stride, from + n * 2, stored.stride);
                continue;
            }
            __m512i square[2][HALVES];
            for (int i = 0; i < HALVES; i++) {
                __m512i halves[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
                if (j + i < keys)
                    halves_of(planes, halves, from + i * stored.stride, v_head_dim - d, stored.dtype, 1.0f);
                for (int plane = 0; plane < planes; plane++) square[plane][i] = halves[plane];
            }
            for (int plane = 0; plane < planes; plane++)
                for (int64_t n = 0; n < columns; n += 8)
                    amx_transpose(to + n * turned.stride + plane * row_bytes + j * 2, turned.stride,
                                  (const char *)square[plane] + n * 2, AMX_BYTES);
        }
        for (int64_t n = 0; n < columns; n++)
            for (int plane = 0; plane < planes; plane++)
                _mm512_storeu_si512(to + n * turned.stride + (plane + 1) * row_bytes - AMX_BYTES, _mm512_setzero_si512());
    }
    for (int n = 0; n < AMX_ROWS && planes == 1; n++)
        for (int64_t j = 0; j < row_bytes; j += AMX_BYTES)
            _mm512_storeu_si512((char *)room + (fa_sums_row(v_head_dim) + n) * turned.stride + j,
                                _mm512_set1_epi16(n == 0 ? 0x3f80 : 0));
    return turned;
}

/* A table of products of numbers in so many planes, with so many cross products. */
#define AMX_TABLE(suffix, planes, qk_products, pv_products, block_size)                                              \
    PAIRS_SLOTS(suffix, planes)                                                                                      \
    static fa_matrix suffix##_keys(float *room, fa_matrix stored, int64_t keys, int64_t head_dim) {                  \
        return amx_keys(planes, room, stored, keys, head_dim);                                                       \
    }                                                                                                                \
    static fa_matrix suffix##_values(float *room, fa_matrix stored, int64_t keys, int64_t v_head_dim) {              \
        return amx_values(planes, room, stored, keys, v_head_dim);                                                   \
    }                                                                                                                \
    static void suffix##_qk(float *s, const float *q, int ld, int rows, fa_matrix k, int64_t from, int64_t keys,     \
                            int64_t head_dim) {                                                                      \
        amx_qk(planes, qk_products, s, q, ld, rows, k, from, keys, head_dim);                                        \
    }                                                                                                                \
    static void suffix##_pv(float *o, const float *alpha, const float *p, int ld, int rows, fa_matrix v,             \
                            int64_t from, int64_t keys, int64_t v_head_dim) {                                        \
        amx_pv(planes, pv_products, o, alpha, p, ld, rows, v, from, keys, v_head_dim);                               \
    }                                                                                                                \
    const fa_products fastattn_products_##suffix = {                                                                 \
        .name = #suffix, .isa = FASTATTN_ISA_AMX, .fewest_rows = FA_FEW_ROWS + 1, .block_keys = block_size,          \
        .sums = planes == 1, .in_parts = planes > 1, .enter = amx_enter, .leave = amx_leave, .pack = suffix##_pack,  \
        .keys = suffix##_keys, .values = suffix##_values, .qk = suffix##_qk, .softmax = suffix##_softmax,            \
        .pv = suffix##_pv, .power = suffix##_power};

AMX_TABLE(bfloat16_amx, 1, 1, 1, 128)
AMX_TABLE(bfloat16x3_amx, 2, 3, 3, 64)
AMX_TABLE(float16_amx, 2, 4, 3, 64) /* the scores exactly: a float16 is a sum of two bfloat16 */

#endif
