/* Template: rotary position embedding. Each number is read and written once, and that is nearly all its price: cosines and sines are
 * loaded once for all heads of a bundle. */

FA_INLINE void turn(simd_f *a, simd_f *b, simd_f c, simd_f s) {
    const simd_f turned = simd_fms(*a, c, simd_mul(*b, s));
    *b = simd_fma(*b, c, simd_mul(*a, s));
    *a = turned;
}

/* The last pairs of a row, fewer than lanes; the second numbers lie `apart` bytes behind the first, or they alternate. */
static FA_NOINLINE void rotate_last(char *out, const char *x, const char *cos, const char *sin, int64_t pairs, int64_t apart,
                                    int interleaved, fastattn_dtype dtype) {
    const int64_t first = !interleaved ? pairs : pairs < SIMD_LANES / 2 ? 2 * pairs : SIMD_LANES;
    const int64_t second = !interleaved ? pairs : 2 * pairs - first;
    const int64_t split = interleaved ? SIMD_LANES * fa_size_of(dtype) : apart;
    simd_f a = load_as(x, first, dtype), b = load_as(x + split, second, dtype);
    if (interleaved) simd_unzip(&a, &b);
    turn(&a, &b, load_as(cos, pairs, FASTATTN_FLOAT32), load_as(sin, pairs, FASTATTN_FLOAT32));
    if (interleaved) simd_zip(&a, &b);
    store_as(out, a, first, dtype);
    store_as(out + split, b, second, dtype);
}

/* SIMD_LANES pairs of each of these heads. All is read before anything is written, for out may be x, and heads whose distance is that of
 * lines which share a place in the cache would wait for each other's. */
FA_INLINE void load_bundle(simd_f *a, simd_f *b, const char *x, const fa_rotation *r, int heads, int interleaved, fastattn_dtype dtype,
                           int native) {
    FA_UNROLL for (int h = 0; h < heads; h++, x += r->x_head) {
        if (interleaved) load_two(x, &a[h], &b[h], dtype, native);
        else a[h] = load_full(x, dtype), b[h] = load_full(x + r->pairs * fa_size_of(dtype), dtype);
        if (interleaved && !native) simd_unzip(&a[h], &b[h]);
    }
}

FA_INLINE void turn_bundle(simd_f *a, simd_f *b, const char *cos, const char *sin, char *out, const fa_rotation *r, int heads,
                           int interleaved, fastattn_dtype dtype, int native) {
    const simd_f c = load_full(cos, FASTATTN_FLOAT32), s = load_full(sin, FASTATTN_FLOAT32);
    FA_UNROLL for (int h = 0; h < heads; h++, out += r->out_head) {
        turn(&a[h], &b[h], c, s);
        if (interleaved && !native) simd_zip(&a[h], &b[h]);
        if (interleaved) store_two(out, a[h], b[h], dtype, native);
        else store_both(out, out + r->pairs * fa_size_of(dtype), a[h], b[h], dtype, native);
    }
}

/* The heads in bundles of this many. Where pairs are no multiple of the lanes but not fewer, the last SIMD_LANES of them are turned at
 * once: read before anything is written, and written last; what overlaps is written twice, the same. (Four lanes fill all
 * but odd rows.) */
FA_INLINE void rotate_rows(const fa_rotation *r, int heads, int interleaved, int native, fastattn_dtype dtype) {
    const int64_t size = fa_size_of(dtype), step = interleaved ? 2 * size : size, apart = r->pairs * size;
    const int64_t rest = r->head_dim * size - 2 * apart, last = r->pairs - SIMD_LANES;
    const int overlaps = SIMD_LANES > 4 && last > 0 && r->pairs % SIMD_LANES != 0;
    const char *cos = r->cos, *sin = r->sin;
    if (r->heads < heads) return;
    for (int64_t row = 0; row < r->rows; row++, cos += r->cos_row, sin += r->sin_row) {
        const char *x = r->x + row * r->x_row;
        char *out = r->out + row * r->out_row;
        for (int64_t bundle = r->heads / heads; bundle > 0; bundle--, x += heads * r->x_head, out += heads * r->out_head) {
            simd_f a[FA_ROTATED_HEADS], b[FA_ROTATED_HEADS], last_a[FA_ROTATED_HEADS], last_b[FA_ROTATED_HEADS];
            int64_t n = 0;
            if (overlaps) load_bundle(last_a, last_b, x + last * step, r, heads, interleaved, dtype, native);
            for (; n <= last; n += SIMD_LANES) {
                load_bundle(a, b, x + n * step, r, heads, interleaved, dtype, native);
                turn_bundle(a, b, cos + 4 * n, sin + 4 * n, out + n * step, r, heads, interleaved, dtype, native);
            }
            if (overlaps)
                turn_bundle(last_a, last_b, cos + 4 * last, sin + 4 * last, out + last * step, r, heads, interleaved, dtype, native);
            for (int h = 0; !overlaps && n < r->pairs && h < heads; h++)
                rotate_last(out + h * r->out_head + n * step, x + h * r->x_head + n * step, cos + 4 * n, sin + 4 * n, r->pairs - n, apart,
                            interleaved, dtype);
            for (int h = 0; rest > 0 && out != x && h < heads; h++)
                memcpy(out + h * r->out_head + 2 * apart, x + h * r->x_head + 2 * apart, (size_t)rest);
        }
    }
}

FA_INLINE void rotate_of(const fa_rotation *r, int native, fastattn_dtype dtype) {
    const int64_t bundled = r->heads - r->heads % FA_ROTATED_HEADS;
    fa_rotation left = *r;
    left.x += bundled * r->x_head, left.out += bundled * r->out_head, left.heads -= bundled;
    if (r->interleaved) {
        rotate_rows(r, FA_ROTATED_HEADS, 1, native, dtype);
        rotate_rows(&left, 1, 1, native, dtype);
    } else {
        rotate_rows(r, FA_ROTATED_HEADS, 0, native, dtype);
        rotate_rows(&left, 1, 0, native, dtype);
    }
}

#ifdef SIMD_PLAIN
/* Numbers of 16 bits become float32 some pairs at a time, and back: what converts them takes most of the time either way. */
static void rotate_wide(const fa_rotation *r, const char *x, char *out, const char *cos, const char *sin) {
    enum { PAIRS = 128 };
    float wide[2 * PAIRS];
    const int64_t size = fa_size_of(r->dtype), apart = r->pairs * size;
    for (int64_t n = 0, pairs; n < r->pairs; n += pairs, cos += 4 * pairs, sin += 4 * pairs) {
        pairs = r->pairs - n < PAIRS ? r->pairs - n : PAIRS;
        const fa_rotation some = {.x = (const char *)wide, .out = (char *)wide, .cos = cos, .sin = sin, .heads = 1, .rows = 1,
                                  .head_dim = 2 * pairs, .pairs = pairs, .interleaved = r->interleaved};
        const int64_t first = n * (r->interleaved ? 2 * size : size), second = r->interleaved ? first + pairs * size : first + apart;
        widen(wide, fa_matrix_at(x + first, second - first, r->dtype), 2, pairs);
        rotate_of(&some, 0, FASTATTN_FLOAT32);
        narrow(out + first, wide, 1.0f, pairs, r->dtype);
        narrow(out + second, wide + pairs, 1.0f, pairs, r->dtype);
    }
    if (out != x) memcpy(out + 2 * apart, x + 2 * apart, (size_t)(r->head_dim * size - 2 * apart));
}

static void rotate(const fa_rotation *r) {
    if (r->dtype == FASTATTN_FLOAT32) {
        rotate_of(r, 0, FASTATTN_FLOAT32);
        return;
    }
    for (int64_t row = 0; row < r->rows; row++)
        for (int64_t head = 0; head < r->heads; head++)
            rotate_wide(r, r->x + row * r->x_row + head * r->x_head, r->out + row * r->out_row + head * r->out_head, r->cos + row * r->cos_row,
                        r->sin + row * r->sin_row);
}
#else
static void rotate(const fa_rotation *rotation) { FA_BY_STORAGE(rotation->dtype, rotate_of, rotation, 0) }
#endif
