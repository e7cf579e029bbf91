/* The products of attention by AVX512-BF16, which multiplies pairs: the register tile of tile.h, an element being a pair of
 * head_dim or of keys. Included by avx512.c. */
#ifdef SIMD_PAIRS

/* Keys whose pairs are aligned are read where they lie. */
static fa_matrix dot_keys(float *room, fa_matrix stored, int64_t keys, int64_t head_dim) {
    const int64_t misaligned = ((int64_t)(uintptr_t)stored.at | stored.stride) & 3;
    if (stored.dtype == FASTATTN_BFLOAT16 && head_dim % 2 == 0 && !misaligned && !stored.rows) return stored;
    return pairs_keys(1, 1, room, stored, keys, head_dim);
}

static void dot_qk(float *s, const float *q, int ld, int rows, fa_matrix k, int64_t from, int64_t keys, int64_t head_dim) {
    const float *row = (const float *)(const void *)(k.at + from * k.stride);
    const tile_operands x = {.c = s, .a = row, .across = k.stride / (int64_t)sizeof(float), .along = 1,
                             TILE_PANEL(q, ld), .c_ld = ld, .steps = (head_dim + 1) / 2, .run = (tile_run(head_dim) + 1) / 2};
    tile_product(TILE_BFLOAT16, rows, keys, x);
}

/* Values of two keys side by side, 0 where there is none, and then the 1 whose product is the sum of the powers. */
static fa_matrix dot_values(float *room, fa_matrix stored, int64_t keys, int64_t v_head_dim) {
    const int64_t sums = fa_sums_row(v_head_dim), size = fa_size_of(stored.dtype);
    const fa_matrix made = fa_matrix_at((const char *)room, (sums + SIMD_LANES) * (int64_t)sizeof(float), FASTATTN_BFLOAT16);
    for (int64_t j = 0; j < keys; j += 2) {
        float *to = room + j / 2 * (sums + SIMD_LANES);
        for (int64_t d = 0; d < sums; d += HALVES) {
            __m512i even[2], odd[2] = {_mm512_setzero_si512()};
            halves_of(1, even, fa_row_at(stored, j) + d * size, v_head_dim - d, stored.dtype, 1.0f);
            if (j + 1 < keys) halves_of(1, odd, fa_row_at(stored, j + 1) + d * size, v_head_dim - d, stored.dtype, 1.0f);
            _mm512_storeu_si512(to + d, pairs_of_first(even[0], odd[0]));
            if (d + SIMD_LANES < sums) _mm512_storeu_si512(to + d + SIMD_LANES, pairs_of_last(even[0], odd[0]));
        }
        _mm512_storeu_si512(to + sums, _mm512_set1_epi32(0x3f803f80));
    }
    return made;
}

static void dot_pv(float *o, const float *alpha, const float *p, int ld, int rows, fa_matrix v, int64_t from, int64_t keys,
                   int64_t v_head_dim) {
    const float *pairs = (const float *)(const void *)(v.at + from / 2 * v.stride);
    const int64_t steps = (keys + 1) / 2;
    const tile_operands x = {.c = o, .alpha = alpha, .a = pairs, .across = 1, .along = v.stride / (int64_t)sizeof(float),
                             TILE_PANEL(p, ld), .c_ld = ld, .steps = steps, .run = steps > 0 ? steps : 1};
    tile_product(TILE_BFLOAT16, rows, fa_sums_row(v_head_dim) + 1, x);
}

PAIRS_SLOTS(dot, 1)

const fa_products fastattn_products_bfloat16_avx512 = {
    .name = "bfloat16_avx512", .isa = FASTATTN_ISA_AVX512, .fewest_rows = FEWEST_LANES,
    .fewest_rows_over_many = FEWEST_LANES, .panel_rows = FA_PANEL_ROWS,
    .block_keys = 64, .score_keys = 64, .pair_rows = 1, .sums = 1,
    .pack = dot_pack, .keys = dot_keys, .values = dot_values, .qk = dot_qk, .softmax = dot_softmax, .pv = dot_pv,
    .power = dot_power, FA_LANES_SLOTS};

#endif
