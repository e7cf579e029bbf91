/* Template: sums by segment, in place of the product with values. */

static void gather(float *sums, const float *p, float factor, const fa_segment_run *runs, int64_t count) {
    const simd_f by = simd_set1(factor);
    for (const fa_segment_run *run = runs; run < runs + count; p += run->keys, run++) {
        if (run->segment < 0) continue;
        float *at = sums + run->segment;
        const int64_t n = run->keys;
        if (run->ascends) {
            for (int64_t j = 0; j < n; j += SIMD_LANES) {
                const simd_f before = load_as(at + j, n - j, FASTATTN_FLOAT32);
                store_as(at + j, simd_fma(load_as(p + j, n - j, FASTATTN_FLOAT32), by, before), n - j, FASTATTN_FLOAT32);
            }
        } else if (n == 1)
            *at += factor * *p;
        else {
            simd_f sum = simd_set1(0.0f);
            for (int64_t j = 0; j < n; j += SIMD_LANES) sum = simd_add(sum, load_as(p + j, n - j, FASTATTN_FLOAT32));
            *at += factor * simd_sum(sum);
        }
    }
}
