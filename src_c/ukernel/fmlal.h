/* The products of few rows of float16 over float16 keys by FMLAL, which multiplies halves and adds to float32: those of rows.h, and the
 * same bits, but that queries stay halves if all vectors of these are whole. Included by neon.c. */
#ifdef FA_HOLDS_FMLAL

FA_INLINE int fit_fmlal(int64_t head_dim) { return head_dim % SHORT_HALVES == 0; }

static void fmlal_pack(float *q, int ld, const void *const *rows_of, int rows, int64_t head_dim, fastattn_dtype dtype, float sign) {
    const int64_t pitch = fa_round_up(head_dim, FA_ROW_STEP);
    rows_pack(q, ld, rows_of, rows, head_dim, dtype, sign);
    for (int r = 0; fit_fmlal(head_dim) && r < rows; r++, q += pitch) narrow(q, q, 1.0f, pitch, FASTATTN_FLOAT16);
}

static void fmlal_qk(float *s, const float *q, int ld, int rows, fa_matrix k, int64_t from, int64_t keys, int64_t head_dim) {
    if (fit_fmlal(head_dim)) short_qk(&k, s, q, ld, rows, from, keys, head_dim, FASTATTN_FLOAT16);
    else rows_qk(s, q, ld, rows, k, from, keys, head_dim);
}

const fa_products fastattn_products_float16_neon = {
    .name = "float16_rows_neon", .most_beside = TILE_MOST_BESIDE, .pack = fmlal_pack, .qk = fmlal_qk, .softmax = rows_softmax,
    FA_ROWS(FASTATTN_ISA_NEON, 64, rows_pv)};

#endif
