/* The products of attention on AMX tiles. Included by avx512.c, whose lanes do everything else.
 *
 * A tile holds 16 rows of 64 bytes. One product of tiles adds, to 16 x 16 float32, 16 rows of 32 bfloat16 times 32 x 16 that
 * lie in pairs: element (k, n) at half k % 2 of dword n of row k / 2. Scores are transposed here as everywhere, so
 *
 *     S^T[key][row]  A = K, as it lies in memory           B = Q in pairs of head_dim
 *     O^T[d][row]    A = V^T, transposed once for a panel   B = P in pairs of keys, as the softmax leaves them
 *
 * and the panels have the 4 bytes for a row that float32 panels have.
 *
 * A number of more than 8 bits is the sum of `planes` bfloat16: planes of Q and P alternate within a row of pairs, those of K and
 * V within a row. Their cross products, but for the smallest where that is exact enough, add up in the same accumulators. */
#if defined(__GNUC__)
#define FA_HAS_AMX 1

enum { AMX_ROWS = 16, AMX_BYTES = 64, AMX_HALVES = 32 };

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

FA_INLINE int64_t amx_tiled(int64_t n, int64_t tile) { return (n + tile - 1) / tile * tile; }

FA_INLINE void amx_qk(int planes, int products, float *s, const float *q, int ld, int rows, fa_matrix k, int64_t from,
                      int64_t keys, int64_t head_dim) {
    const int64_t dim = amx_tiled(head_dim, AMX_HALVES), pairs = planes * ld * (int64_t)sizeof(float);
    const amx_operand a = {k.at + from * k.stride, k.stride, AMX_ROWS * k.stride, AMX_BYTES, dim * 2};
    const amx_operand b = {(const char *)q, pairs, AMX_BYTES, AMX_ROWS * pairs, ld * (int64_t)sizeof(float)};
    amx_product(s, ld, rows, a, amx_tiled(keys, AMX_ROWS) / AMX_ROWS, b, dim / AMX_HALVES, products, 0);
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
                amx_tiled(keys, AMX_HALVES) / AMX_HALVES, products, 1);
}

/* ---- Operands ------------------------------------------------------------------------------------------------------- */

/* Float32 to the nearest bfloat16, in the upper halves; what is below them is left over. For numbers, not for NaN. */
FA_INLINE __m512i amx_rounded(simd_f x) { return _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000)); }

/* The upper halves of `even` and `odd` in turn. */
FA_INLINE __m512i amx_pairs(__m512i even, __m512i odd) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(even, 16), odd);
}

/* x as a sum of two bfloat16, to 16 bits. The first is rounded, so that what the product of two second ones adds has no bias, but
 * for numbers that would round to infinity. */
FA_INLINE void amx_split(simd_f x, __m512i *high, __m512i *low) {
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000u), infinity = _mm512_set1_epi32(0x7f800000);
    const __m512i rounded = _mm512_and_si512(amx_rounded(x), upper);
    const __mmask16 too_large = _mm512_cmpeq_epi32_mask(_mm512_and_si512(rounded, infinity), infinity);
    *high = _mm512_mask_and_epi32(rounded, too_large, _mm512_castps_si512(x), upper);
    *low = amx_rounded(simd_sub(x, _mm512_castsi512_ps(*high)));
}

/* 32 numbers, of which n are there and the others 0, times sign, as planes of bfloat16 in their order. */
FA_INLINE void amx_halves(int planes, __m512i to[2], const char *at, int64_t n, fastattn_dtype dtype, float sign) {
    const int64_t size = fa_size_of(dtype);
    if (dtype == FASTATTN_BFLOAT16) {
        const __mmask32 there = n >= AMX_HALVES ? 0xffffffffu : (1u << n) - 1u;
        const __m512i bits = _mm512_maskz_loadu_epi16(there, at);
        to[1] = _mm512_setzero_si512();
        to[0] = sign == 0.0f ? _mm512_setzero_si512()
                             : _mm512_xor_si512(bits, _mm512_set1_epi16(sign < 0.0f ? (short)0x8000 : 0));
        return;
    }
    uint16_t planes_of[2][AMX_HALVES];
    for (int64_t d = 0; d < AMX_HALVES; d += SIMD_LANES) {
        const int64_t left = n - d < 0 ? 0 : n - d;
        const simd_f x = simd_mul(load_as(at + (left ? d * size : 0), left, dtype), simd_set1(sign));
        __m512i high, low;
        if (planes == 1) {
            simd_store_bf16(planes_of[0] + d, x);
            continue;
        }
        amx_split(x, &high, &low);
        _mm256_storeu_si256((__m256i *)(planes_of[0] + d), _mm512_cvtepi32_epi16(_mm512_srli_epi32(high, 16)));
        _mm256_storeu_si256((__m256i *)(planes_of[1] + d), _mm512_cvtepi32_epi16(_mm512_srli_epi32(low, 16)));
    }
    for (int plane = 0; plane < planes; plane++) to[plane] = _mm512_loadu_si512(planes_of[plane]);
}

/* Pairs of head_dim are dwords, and turn as such. */
FA_INLINE void amx_pack(int planes, float *q, int ld, const void *const *rows_of, int rows, int64_t head_dim,
                        fastattn_dtype dtype, float sign) {
    for (int row = 0; row < rows; row += AMX_ROWS)
        for (int64_t d = 0; d < head_dim; d += AMX_HALVES) {
            simd_f square[2][AMX_ROWS];
            for (int i = 0; i < AMX_ROWS; i++) {
                __m512i halves[2];
                amx_halves(planes, halves, (const char *)rows_of[row + i] + d * fa_size_of(dtype), head_dim - d, dtype, sign);
                for (int plane = 0; plane < planes; plane++) square[plane][i] = _mm512_castsi512_ps(halves[plane]);
            }
            for (int plane = 0; plane < planes; plane++) {
                simd_transpose(square[plane]);
                for (int i = 0; i < AMX_ROWS; i++)
                    simd_store(q + ((d / 2 + i) * planes + plane) * ld + row, square[plane][i]);
            }
        }
}

/* Whole tiles of bfloat16 keys are read where they lie. */
FA_INLINE fa_matrix amx_keys(int planes, float *room, fa_matrix stored, int64_t keys, int64_t head_dim) {
    const int64_t dim = amx_tiled(head_dim, AMX_HALVES);
    if (planes == 1 && stored.dtype == FASTATTN_BFLOAT16 && keys % AMX_ROWS == 0 && dim == head_dim) return stored;
    const fa_matrix tiled = {(const char *)room, planes * dim * 2, FASTATTN_BFLOAT16};
    for (int64_t j = 0; j < amx_tiled(keys, AMX_ROWS); j++)
        for (int64_t d = 0; d < dim; d += AMX_HALVES) {
            __m512i halves[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
            if (j < keys)
                amx_halves(planes, halves, stored.at + j * stored.stride + d * fa_size_of(stored.dtype), head_dim - d,
                           stored.dtype, 1.0f);
            for (int plane = 0; plane < planes; plane++)
                _mm512_storeu_si512((char *)room + j * tiled.stride + (plane * dim + d) * 2, halves[plane]);
        }
    return tiled;
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
    const int64_t row_bytes = (amx_tiled(keys, AMX_HALVES) + AMX_HALVES) * 2, size = fa_size_of(stored.dtype);
    const fa_matrix turned = {(const char *)room, planes * row_bytes, FASTATTN_BFLOAT16};
    for (int64_t d = 0; d < amx_tiled(v_head_dim, AMX_ROWS); d += AMX_HALVES) {
        const int64_t columns = amx_tiled(v_head_dim, AMX_ROWS) - d < AMX_HALVES ? AMX_ROWS : AMX_HALVES;
        char *to = (char *)room + d * turned.stride;
        for (int64_t j = 0; j < keys; j += AMX_HALVES) {
            const char *from = stored.at + j * stored.stride + d * size;
            if (planes == 1 && stored.dtype == FASTATTN_BFLOAT16 && keys - j >= AMX_HALVES && v_head_dim - d >= columns) {
                for (int64_t n = 0; n < columns; n += 8)
                    amx_transpose(to + n * turned.stride + j * 2, turned.stride, from + n * 2, stored.stride);
                continue;
            }
            __m512i square[2][AMX_HALVES];
            for (int i = 0; i < AMX_HALVES; i++) {
                __m512i halves[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
                if (j + i < keys)
                    amx_halves(planes, halves, from + i * stored.stride, v_head_dim - d, stored.dtype, 1.0f);
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

/* ---- Softmax -------------------------------------------------------------------------------------------------------- */

/* 2**x. The powers are rounded to bfloat16, but their sum is not: the polynomial of degree 5 in the fraction with the smallest
 * relative error (8e-8) and the value 1 at 0. */
FA_INLINE simd_f amx_exp2(simd_f x) {
    const simd_f f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    simd_f p = simd_set1(0x1.e97522p-10f);
    p = simd_fma(p, f, simd_set1(0x1.27784ap-7f));
    p = simd_fma(p, f, simd_set1(0x1.c91ce8p-5f));
    p = simd_fma(p, f, simd_set1(0x1.ebdb56p-3f));
    p = simd_fma(p, f, simd_set1(0x1.62e4bap-1f));
    p = simd_fma(p, f, simd_set1(1.0f));
    return _mm512_scalef_ps(p, x);
}

/* The powers of one key; scaled_top is c * top. Where they are rounded to bfloat16 one rounding more does no harm. */
FA_INLINE simd_f amx_power(int planes, const float *s, simd_f top, simd_f c, simd_f scaled_top) {
    const simd_f x = simd_load(s);
    return planes == 1 ? amx_exp2(simd_fms(x, c, scaled_top)) : exp2_of(simd_sub(x, top), c);
}

FA_INLINE void amx_softmax_strip(int planes, int vectors, const float *s, float *p, ptrdiff_t ld, int64_t keys, float c,
                                 float *m, float *l, float *alpha) {
    const simd_f scale = simd_set1(c), lowest = simd_set1(-INFINITY), zero = simd_set1(0.0f);
    simd_f top[4], base[4], scaled[4], sum[4];
    simd_m stale[4];
    FA_UNROLL for (int v = 0; v < vectors; v++) {
        top[v] = simd_load(m + v * SIMD_LANES);
        stale[v] = simd_eq(top[v], lowest);
    }
    /* An old maximum serves as long as no power grows large, which their sum tells. Else it is looked for, once. */
    for (int looked = 0;; looked = 1) {
        int wanting = 0;
        FA_UNROLL for (int v = 0; v < vectors; v++) {
            if (simd_any(stale[v])) {
                simd_f highest = top[v];
                for (int64_t j = 0; j < keys; j++) highest = simd_max(highest, simd_load(s + j * ld + v * SIMD_LANES));
                top[v] = simd_select(stale[v], highest, top[v]);
            }
            /* While all is -inf, powers are taken relative to 0 and vanish; -inf - -inf would be NaN. */
            base[v] = simd_select(simd_eq(top[v], lowest), zero, top[v]);
            scaled[v] = simd_mul(base[v], scale);
            sum[v] = zero;
        }
        for (int64_t j = 0; j < keys; j += 2)
            FA_UNROLL for (int v = 0; v < vectors; v++) {
                const float *from = s + j * ld + v * SIMD_LANES;
                float *to = p + j / 2 * planes * ld + v * SIMD_LANES;
                const simd_f even = amx_power(planes, from, base[v], scale, scaled[v]);
                const simd_f odd = j + 1 < keys ? amx_power(planes, from + ld, base[v], scale, scaled[v]) : zero;
                sum[v] = simd_add(sum[v], simd_add(even, odd));
                if (planes == 1) {
                    _mm512_storeu_si512(to, amx_pairs(amx_rounded(even), amx_rounded(odd)));
                    continue;
                }
                __m512i high[2], low[2];
                amx_split(even, &high[0], &low[0]);
                amx_split(odd, &high[1], &low[1]);
                _mm512_storeu_si512(to, amx_pairs(high[0], high[1]));
                _mm512_storeu_si512(to + ld, amx_pairs(low[0], low[1]));
            }
        FA_UNROLL for (int v = 0; v < vectors; v++) {
            stale[v] = simd_not(simd_lt(sum[v], simd_set1(FA_MOST_POWER)));
            wanting |= simd_any(stale[v]);
        }
        if (!wanting || looked) break;
    }
    for (int64_t j = (keys + 1) / 2; j < amx_tiled(keys, AMX_HALVES) / 2; j++)
        FA_UNROLL for (int v = 0; v < planes * vectors; v++)
            simd_store(p + (j * planes + v / vectors) * ld + v % vectors * SIMD_LANES, zero);
    FA_UNROLL for (int v = 0; v < vectors; v++) {
        const simd_f fade = exp2_of(simd_sub(simd_load(m + v * SIMD_LANES), base[v]), scale);
        float *at = l + v * SIMD_LANES;
        simd_store(m + v * SIMD_LANES, top[v]);
        simd_store(alpha + v * SIMD_LANES, fade);
        simd_store(at, simd_fma(simd_load(at), fade, sum[v]));
    }
}

FA_INLINE void amx_softmax(int planes, const float *s, float *p, int ld, int rows, int64_t keys, float c, float *m, float *l,
                           float *alpha) {
    const unsigned found = _mm_getcsr(), subnormals_are_zero = 0x8040;
    _mm_setcsr(found | subnormals_are_zero);
    int row = 0;
    for (; row + 64 <= rows; row += 64)
        amx_softmax_strip(planes, 4, s + row, p + row, ld, keys, c, m + row, l + row, alpha + row);
    for (; row < rows; row += SIMD_LANES)
        amx_softmax_strip(planes, 1, s + row, p + row, ld, keys, c, m + row, l + row, alpha + row);
    _mm_setcsr(found);
}

FA_INLINE float amx_power_at(int planes, const float *p, int ld, int row, int64_t key) {
    float sum = 0.0f;
    for (int plane = planes - 1; plane >= 0; plane--) {
        uint16_t pair[2];
        memcpy(pair, p + (key / 2 * planes + plane) * ld + row, sizeof pair);
        sum += fa_from_bf16(pair[key % 2]);
    }
    return sum;
}

/* A table of products of numbers in so many planes, with so many cross products. */
#define AMX_TABLE(suffix, planes, qk_products, pv_products, block_keys)                                                      \
    static void suffix##_pack(float *q, int ld, const void *const *rows_of, int rows, int64_t head_dim,                      \
                              fastattn_dtype dtype, float sign) {                                                            \
        amx_pack(planes, q, ld, rows_of, rows, head_dim, dtype, sign);                                                       \
    }                                                                                                                        \
    static fa_matrix suffix##_keys(float *room, fa_matrix stored, int64_t keys, int64_t head_dim) {                          \
        return amx_keys(planes, room, stored, keys, head_dim);                                                               \
    }                                                                                                                        \
    static fa_matrix suffix##_values(float *room, fa_matrix stored, int64_t keys, int64_t v_head_dim) {                      \
        return amx_values(planes, room, stored, keys, v_head_dim);                                                           \
    }                                                                                                                        \
    static void suffix##_qk(float *s, const float *q, int ld, int rows, fa_matrix k, int64_t from, int64_t keys,             \
                            int64_t head_dim) {                                                                              \
        amx_qk(planes, qk_products, s, q, ld, rows, k, from, keys, head_dim);                                                \
    }                                                                                                                        \
    static void suffix##_softmax(float *s, float *p, int ld, int rows, int64_t keys, float c, float *m, float *l,            \
                                 float *alpha) {                                                                             \
        amx_softmax(planes, s, p, ld, rows, keys, c, m, l, alpha);                                                           \
    }                                                                                                                        \
    static void suffix##_pv(float *o, const float *alpha, const float *p, int ld, int rows, fa_matrix v, int64_t from,       \
                            int64_t keys, int64_t v_head_dim) {                                                              \
        amx_pv(planes, pv_products, o, alpha, p, ld, rows, v, from, keys, v_head_dim);                                       \
    }                                                                                                                        \
    static float suffix##_power(const float *p, int ld, int row, int64_t key) {                                              \
        return amx_power_at(planes, p, ld, row, key);                                                                        \
    }                                                                                                                        \
    const fa_products fastattn_products_amx_##suffix = {                                                                     \
        #suffix "_amx", FASTATTN_ISA_AMX, block_keys, 0, planes == 1, planes > 1, amx_enter, amx_leave, suffix##_pack, suffix##_keys,                 \
        suffix##_values, suffix##_qk, suffix##_softmax, suffix##_pv, suffix##_power};

AMX_TABLE(bfloat16, 1, 1, 1, 128)
AMX_TABLE(bfloat16x3, 2, 3, 3, 64)
AMX_TABLE(float16, 2, 4, 3, 64) /* the scores exactly: a float16 is a sum of two bfloat16 */

#endif
