/* The products of attention by BFDOT, which multiplies pairs of bfloat16: the register tile of tile.h, an element being a pair of
 * head_dim or of keys. A pair has the 4 bytes of a float32. Included by neon.c. */
#ifdef SIMD_PAIRS

enum { BFDOT_KEYS = 64 /* of a block */, HALVES = 2 * SIMD_LANES };

/* So many numbers, of which n are there and the others 0, times sign. */
FA_INLINE simd_f halves_of(const char *at, int64_t n, fastattn_dtype dtype, float sign) {
    if (dtype == FASTATTN_BFLOAT16 && n >= HALVES && sign == 1.0f) return load_full(at, FASTATTN_FLOAT32);
    const simd_f factor = simd_set1(sign), zero = simd_set1(0.0f);
    const simd_f first = load_as(at, n, dtype);
    const simd_f last = n > SIMD_LANES ? load_as(at + SIMD_LANES * fa_size_of(dtype), n - SIMD_LANES, dtype) : zero;
    return simd_halves_bf16(simd_mul(first, factor), simd_mul(last, factor));
}

static void bfdot_pack(float *q, int ld, const void *const *rows_of, int rows, int64_t head_dim, fastattn_dtype dtype, float sign) {
    for (int row = 0; row < rows; row += SIMD_LANES)
        for (int64_t d = 0; d < head_dim; d += HALVES) {
            simd_f square[SIMD_LANES];
            for (int i = 0; i < SIMD_LANES; i++)
                square[i] = halves_of((const char *)rows_of[row + i] + d * fa_size_of(dtype), head_dim - d, dtype, sign);
            simd_transpose(square);
            for (int i = 0; i < SIMD_LANES && d + 2 * i < head_dim; i++) simd_store(q + (d / 2 + i) * ld + row, square[i]);
        }
}

/* Keys whose pairs are aligned are read where they lie. */
static fa_matrix bfdot_keys(float *room, fa_matrix stored, int64_t keys, int64_t head_dim) {
    const int64_t misaligned = ((int64_t)(uintptr_t)stored.at | stored.stride) & 3, dim = fa_round_up(head_dim, HALVES);
    if (stored.dtype == FASTATTN_BFLOAT16 && head_dim % 2 == 0 && !misaligned && !stored.rows) return stored;
    for (int64_t j = 0; j < keys; j++)
        for (int64_t d = 0; d < dim; d += HALVES)
            simd_store(room + (j * dim + d) / 2,
                       halves_of(fa_row_at(stored, j) + d * fa_size_of(stored.dtype), head_dim - d, stored.dtype, 1.0f));
    return fa_matrix_at((const char *)room, dim * 2, FASTATTN_BFLOAT16);
}

static void bfdot_qk(float *s, const float *q, int ld, int rows, fa_matrix k, int64_t from, int64_t keys, int64_t head_dim) {
    const float *row = (const float *)(const void *)(k.at + from * k.stride);
    const tile_operands x = {.c = s, .a = row, .across = k.stride / (int64_t)sizeof(float), .along = 1, TILE_PANEL(q, ld), .c_ld = ld,
                             .steps = (head_dim + 1) / 2, .run = (tile_run(head_dim) + 1) / 2};
    tile_product(TILE_BFLOAT16, rows, keys, x);
}

/* Float32 powers, of which two keys' become pairs in the row of the first. */
static void bfdot_softmax(float *s, float *p, int ld, int rows, int64_t keys, float c, float *m, float *l, float *alpha) {
    float unused[FA_PANEL_ROWS] = {0};
    softmax(s, p, ld, rows, keys, c, m, l ? l : unused, alpha);
    for (int64_t j = 0; j < keys; j += 2)
        for (int row = 0; row < rows; row += SIMD_LANES) {
            float *at = p + j * ld + row;
            simd_f pairs = simd_halves_bf16(simd_load(at), j + 1 < keys ? simd_load(at + ld) : simd_set1(0.0f));
            simd_f last = simd_swap_halves(pairs);
            simd_zip_halves(&pairs, &last);
            simd_store(at, pairs);
        }
}

static float bfdot_power(const float *p, int ld, int row, int64_t key) {
    uint16_t pair[2];
    memcpy(pair, p + key / 2 * 2 * ld + row, sizeof pair);
    return fa_from_bf16(pair[key % 2]);
}

/* Values of two keys side by side, 0 where there is none, and then the 1 whose product is the sum of the powers. */
static fa_matrix bfdot_values(float *room, fa_matrix stored, int64_t keys, int64_t v_head_dim) {
    const int64_t sums = fa_sums_row(v_head_dim), size = fa_size_of(stored.dtype);
    for (int64_t j = 0; j < keys; j += 2) {
        float *to = room + j / 2 * (sums + SIMD_LANES);
        for (int64_t d = 0; d < sums; d += HALVES) {
            simd_f first = simd_set1(0.0f), last = first;
            if (d < v_head_dim) first = halves_of(fa_row_at(stored, j) + d * size, v_head_dim - d, stored.dtype, 1.0f);
            if (d < v_head_dim && j + 1 < keys) last = halves_of(fa_row_at(stored, j + 1) + d * size, v_head_dim - d, stored.dtype, 1.0f);
            simd_zip_halves(&first, &last);
            simd_store(to + d, first);
            simd_store(to + d + SIMD_LANES, last);
        }
        simd_store(to + sums, simd_set1(fa_from_bits(0x3f803f80)));
    }
    return fa_matrix_at((const char *)room, (sums + SIMD_LANES) * (int64_t)sizeof(float), FASTATTN_BFLOAT16);
}

static void bfdot_pv(float *o, const float *alpha, const float *p, int ld, int rows, fa_matrix v, int64_t from, int64_t keys,
                     int64_t v_head_dim) {
    const float *pairs = (const float *)(const void *)(v.at + from / 2 * v.stride);
    const int64_t steps = (keys + 1) / 2;
    const tile_operands x = {.c = o, .alpha = alpha, .a = pairs, .across = 1, .along = v.stride / (int64_t)sizeof(float),
                             TILE_PANEL(p, 2 * ld), .c_ld = ld, .steps = steps, .run = steps > 0 ? steps : 1};
    tile_product(TILE_BFLOAT16, rows, fa_sums_row(v_head_dim) + 1, x);
}

const fa_products fastattn_products_bfloat16_neon = {
    .name = "bfloat16_neon", .isa = FASTATTN_ISA_NEON, .fewest_rows = FEWEST_LANES, .fewest_rows_wide = FEWEST_LANES_WIDE,
    .wide = WIDE, .panel_rows = FA_PANEL_ROWS, .block_keys = BFDOT_KEYS, .score_keys = BFDOT_KEYS, .pair_rows = 2, .sums = 1,
    .pack = bfdot_pack, .keys = bfdot_keys, .values = bfdot_values, .qk = bfdot_qk, .softmax = bfdot_softmax, .pv = bfdot_pv,
    .power = bfdot_power, FA_LANES_SLOTS};

#endif
