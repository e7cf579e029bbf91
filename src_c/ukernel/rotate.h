/* Template: rotary position embedding. Each number is read and written once, and that is nearly all its price: cosines and sines are
 * loaded once for all heads of a bundle. */

FA_INLINE void turn(simd_f *a, simd_f *b, simd_f c, simd_f s, int interleaved) {
    if (interleaved) simd_unzip(a, b);
    const simd_f turned = simd_fms(*a, c, simd_mul(*b, s));
    *b = simd_fma(*b, c, simd_mul(*a, s));
    *a = turned;
    if (interleaved) simd_zip(a, b);
}

/* `pairs` pairs, SIMD_LANES at most, by their angles from x to out; the second numbers lie `apart` bytes behind the first, or they
 * alternate. All is read before anything is written, for out may be x. */
FA_INLINE void rotate_pairs(char *out, const char *x, simd_f c, simd_f s, int64_t pairs, int64_t apart, int interleaved,
                            fastattn_dtype dtype) {
    const int64_t first = !interleaved ? pairs : pairs < SIMD_LANES / 2 ? 2 * pairs : SIMD_LANES;
    const int64_t second = !interleaved ? pairs : 2 * pairs - first;
    const int64_t split = interleaved ? SIMD_LANES * fa_size_of(dtype) : apart;
    simd_f a = load_as(x, first, dtype), b = load_as(x + split, second, dtype);
    turn(&a, &b, c, s, interleaved);
    store_as(out, a, first, dtype);
    store_as(out + split, b, second, dtype);
}

/* The last pairs of a row, fewer than lanes. */
static FA_NOINLINE void rotate_last(char *out, const char *x, const char *cos, const char *sin, int64_t pairs, int64_t apart,
                                    int interleaved, fastattn_dtype dtype) {
    const simd_f c = load_as(cos, pairs, FASTATTN_FLOAT32), s = load_as(sin, pairs, FASTATTN_FLOAT32);
    rotate_pairs(out, x, c, s, pairs, apart, interleaved, dtype);
}

/* Where pairs are no multiple of the lanes but not fewer, the last SIMD_LANES of them are turned at once: read before anything is
 * written, for out may be x, and written last; what overlaps is written twice, the same. */
FA_INLINE void rotate_rows(const fa_rotation *r, int heads, int interleaved, fastattn_dtype dtype) {
    const int64_t size = fa_size_of(dtype), step = interleaved ? 2 * size : size, apart = r->pairs * size;
    const int64_t rest = r->head_dim * size - 2 * apart, last = r->pairs - SIMD_LANES;
    const int64_t split = interleaved ? SIMD_LANES * size : apart;
    const int overlaps = last > 0 && r->pairs % SIMD_LANES != 0;
    const char *x = r->x, *cos = r->cos, *sin = r->sin;
    char *out = r->out;
    for (int64_t row = 0; row < r->rows; row++) {
        simd_f a[FA_ROTATED_HEADS], b[FA_ROTATED_HEADS];
        int64_t n = 0;
        FA_UNROLL for (int h = 0; h < heads; h++) {
            if (!overlaps) break;
            a[h] = load_full(x + h * r->x_head + last * step, dtype);
            b[h] = load_full(x + h * r->x_head + last * step + split, dtype);
        }
        for (; n + SIMD_LANES <= r->pairs; n += SIMD_LANES) {
            const simd_f c = load_full(cos + 4 * n, FASTATTN_FLOAT32), s = load_full(sin + 4 * n, FASTATTN_FLOAT32);
            FA_UNROLL for (int h = 0; h < heads; h++)
                rotate_pairs(out + h * r->out_head + n * step, x + h * r->x_head + n * step, c, s, SIMD_LANES, apart, interleaved, dtype);
        }
        FA_UNROLL for (int h = 0; h < heads; h++) {
            if (!overlaps) break;
            const simd_f c = load_full(cos + 4 * last, FASTATTN_FLOAT32), s = load_full(sin + 4 * last, FASTATTN_FLOAT32);
            turn(&a[h], &b[h], c, s, interleaved);
            store_full(out + h * r->out_head + last * step, a[h], dtype);
            store_full(out + h * r->out_head + last * step + split, b[h], dtype);
        }
        for (int h = 0; !overlaps && n < r->pairs && h < heads; h++)
            rotate_last(out + h * r->out_head + n * step, x + h * r->x_head + n * step, cos + 4 * n, sin + 4 * n, r->pairs - n, apart, interleaved,
                        dtype);
        for (int h = 0; rest > 0 && out != x && h < heads; h++)
            memcpy(out + h * r->out_head + 2 * apart, x + h * r->x_head + 2 * apart, (size_t)rest);
        x += r->x_row, out += r->out_row, cos += r->cos_row, sin += r->sin_row;
    }
}

FA_INLINE void rotate_of(const fa_rotation *r, fastattn_dtype dtype) {
    if (r->heads == FA_ROTATED_HEADS) {
        if (r->interleaved) rotate_rows(r, FA_ROTATED_HEADS, 1, dtype);
        else rotate_rows(r, FA_ROTATED_HEADS, 0, dtype);
    } else {
        fa_rotation one = *r;
        for (int h = 0; h < r->heads; h++, one.x += r->x_head, one.out += r->out_head) {
            if (r->interleaved) rotate_rows(&one, 1, 1, dtype);
            else rotate_rows(&one, 1, 0, dtype);
        }
    }
}

static void rotate(const fa_rotation *rotation) { FA_BY_STORAGE(rotation->dtype, rotate_of, rotation) }
