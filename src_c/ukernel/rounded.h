/* The slots that read and write bfloat16 and do little between, with the rounding of AVX512-BF16. Included by avx512.c. */
#ifdef FA_HOLDS_AVX512_BF16

static void rounded_rotate(const fa_rotation *rotation) {
    if (rotation->dtype == FASTATTN_BFLOAT16) rotate_of(rotation, 1, FASTATTN_BFLOAT16);
    else rotate(rotation);
}

static int rounded_mix(void *out, const float *weights, const void *const *rows_of, int64_t parts, int64_t rows, int64_t dim,
                       fastattn_dtype dtype) {
    if (dtype != FASTATTN_BFLOAT16) return mix(out, weights, rows_of, parts, rows, dim, dtype);
    return mix_by(out, weights, rows_of, parts, rows, dim, FASTATTN_BFLOAT16, 1);
}

FA_UKERNEL(avx512_bf16, avx512, &avx512_few_quantised, rounded_rotate, rounded_mix)

#endif
