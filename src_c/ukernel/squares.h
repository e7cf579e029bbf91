/* Template: scores of few rows by keys that turn in registers and need not go through memory: squares, SQUARE_BYTES of SIMD_LANES keys each,
 * which a few rows at a time meet there. Elements are numbers or, where pairs are multiplied, pairs. The sums are those of keys that turn
 * in memory (rows.h). */
#ifdef SIMD_SQUARES

enum {
    SQUARE_BYTES = SIMD_LANES * (int)sizeof(float),
    SQUARES = 4, /* of keys side by side, for the sums of each are chains; */
    SQUARES_BYTES = 256, /* but one where keys have more: memory is slow to bring a line of each of many */
    SQUARE_WIDTH = 4, /* rows that meet a square together */
    SQUARES_ROWS = 12 /* at most */
};

/* Bytes from one on, of which there are `left`, of keys that are not all there, or not at one stride; the last stands for those beyond. */
static FA_NOINLINE void copy_square(float *to, const tile_rows *rows, int64_t j, int64_t keys, int64_t at, int64_t left) {
    for (int i = 0; i < SIMD_LANES; i++) {
        const int64_t key = j + i < keys ? j + i : keys - 1;
        simd_fetch((const char *)(tile_later(rows, key) + (uintptr_t)at));
        simd_store(to + i * SIMD_LANES, simd_load_bytes(tile_row(rows, key) + at, left < SQUARE_BYTES ? left : SQUARE_BYTES));
    }
}

/* Where the first key of each square lies, and what will be read in its place later; null where keys are not all there, or not at one stride.
 * Found before the products: compilers keep places in vectors else, which wait for these. */
typedef struct key_squares {
    const char *first[SQUARES];
    uintptr_t later[SQUARES];
} key_squares;

FA_INLINE void find_squares(key_squares *x, const tile_rows *rows, int64_t j, int64_t keys) {
    for (int n = 0; n < SQUARES; n++, j += SIMD_LANES) {
        const int64_t last = j + SIMD_LANES - 1;
        const int together = last < keys && j >> rows->shift == last >> rows->shift;
        x->first[n] = together ? tile_row(rows, j) : NULL;
        x->later[n] = together ? tile_later(rows, j) : 0;
    }
}

/* square[n][key], where n are 4 bytes or, of float16, two numbers. */
FA_INLINE void turn_in_registers(simd_f square[SIMD_LANES], const char *key, uintptr_t later, int64_t stride, fastattn_dtype dtype) {
    FA_UNROLL for (int i = 0; i < SIMD_LANES; i++, key += stride, later += (uintptr_t)stride) {
        simd_fetch((const char *)later);
        square[i] = load_full(key, FASTATTN_FLOAT32);
    }
    if (dtype == FASTATTN_FLOAT16) simd_transpose_halves(square);
    else simd_transpose(square);
}

/* How often a vector has room for the elements. */
FA_INLINE int square_halves(fastattn_dtype dtype) { return dtype == FASTATTN_FLOAT32 ? 1 : 2; }

/* Element i of those that a vector has room for, with `second` of the next so many: numbers of two bytes are twice as many. */
FA_INLINE simd_f square_element(const simd_f square[SIMD_LANES], int second, int i, fastattn_dtype dtype) {
    const simd_f *const half = square + (second ? SIMD_LANES / 2 : 0);
    switch (dtype) {
    case FASTATTN_FLOAT16: return simd_from_f16(i < SIMD_LANES / 2 ? simd_first_halves(half[i]) : simd_last_halves(half[i - SIMD_LANES / 2]));
    case FASTATTN_BFLOAT16: return i % 2 ? simd_second_bf16(half[i / 2]) : simd_first_bf16(half[i / 2]);
    default: return square[i];
    }
}

FA_INLINE simd_f square_multiply(int multiply, const float *a, simd_f b, simd_f c) {
#ifdef SIMD_PAIRS
    if (multiply == TILE_BFLOAT16) return simd_dot_bf16_of(a, b, c);
#endif
    return (void)multiply, simd_fma(simd_set1(*a), b, c);
}

/* sum[row] of all elements of a square, for `width` rows, a constant. */
FA_INLINE void square_step(int multiply, int width, simd_f *sum, const float *q, int64_t pitch, const simd_f square[SIMD_LANES],
                           fastattn_dtype dtype) {
    const int halves = square_halves(dtype);
    const float *of[SQUARE_WIDTH]; /* pointers, or compilers keep the place of each element */
    simd_f sum_of[SQUARE_WIDTH];
    FA_UNROLL for (int r = 0; r < width; r++) of[r] = q + r * pitch, sum_of[r] = sum[r];
    FA_UNROLL for (int second = 0; second < halves; second++)
        FA_UNROLL for (int i = 0; i < SIMD_LANES; i++) {
            const simd_f element = square_element(square, second, i, dtype);
            FA_UNROLL for (int r = 0; r < width; r++)
                sum_of[r] = square_multiply(multiply, of[r] + second * SIMD_LANES + i, element, sum_of[r]);
        }
    FA_UNROLL for (int r = 0; r < width; r++) sum[r] = sum_of[r];
}

FA_INLINE void square_steps(int multiply, int rows, simd_f *sum, const float *q, int64_t pitch, const simd_f square[SIMD_LANES],
                            fastattn_dtype dtype) {
    for (; rows >= SQUARE_WIDTH; rows -= SQUARE_WIDTH, sum += SQUARE_WIDTH, q += SQUARE_WIDTH * pitch)
        square_step(multiply, SQUARE_WIDTH, sum, q, pitch, square, dtype);
    switch (rows) {
    case 3: square_step(multiply, 3, sum, q, pitch, square, dtype); break;
    case 2: square_step(multiply, 2, sum, q, pitch, square, dtype); break;
    case 1: square_step(multiply, 1, sum, q, pitch, square, dtype); break;
    }
}

/* The same of the first elements. */
FA_INLINE void square_part(int multiply, int rows, simd_f *sum, const float *q, int64_t pitch, const simd_f square[SIMD_LANES], int64_t count) {
    simd_f elements[SIMD_LANES];
    FA_UNROLL for (int i = 0; i < SIMD_LANES; i++) elements[i] = square[i];
    for (int r = 0; r < rows; r++)
        for (int64_t i = 0; i < count; i++) sum[r] = square_multiply(multiply, q + r * pitch + i, elements[i], sum[r]);
}

/* Elements of `size` bytes, a pair being one of float32, of which those of a run are summed apart. Of pairs alone there may be any number. */
FA_INLINE void squares_qk(int multiply, fa_matrix k, float *s, const float *q, int ld, int rows, int64_t keys, int64_t head_dim,
                          fastattn_dtype dtype) {
    const int of_element = multiply == TILE_BFLOAT16 ? 2 : 1;
    const fastattn_dtype element = multiply == TILE_BFLOAT16 ? FASTATTN_FLOAT32 : dtype;
    const int64_t size = fa_size_of(element), bytes = head_dim * fa_size_of(dtype), at_once = SQUARE_BYTES / size;
    const int64_t pitch = fa_round_up(head_dim, FA_ROW_STEP), elements = (head_dim + of_element - 1) / of_element;
    const int64_t run = (tile_run(head_dim) + of_element - 1) / of_element;
    const char *first_row;
    const tile_rows places = tile_rows_of(k, &first_row);
    const int64_t beside = (bytes <= SQUARES_BYTES ? SQUARES : 1) * SIMD_LANES;
    for (int64_t first = 0; first < keys; first += beside, s += beside) {
        const int64_t last = first + beside < keys ? first + beside : keys;
        const int squares = (int)((last - first + SIMD_LANES - 1) / SIMD_LANES);
        simd_f sum[SQUARES][SQUARES_ROWS];
        key_squares x;
        find_squares(&x, &places, first, last);
        for (int64_t j = first; j < last; j++) simd_fetch((const char *)(tile_later(&places, j) + (uintptr_t)(bytes - 1)));
        int64_t d = 0;
        do { /* once if there are no numbers, too */
            const int64_t end = d + run < elements ? d + run : elements;
            for (int i = 0; i < squares; i++)
                for (int r = 0; r < rows; r++) sum[i][r] = simd_set1(0.0f);
            for (int64_t n = d; n < end; n += at_once)
                for (int i = 0; i < squares; i++) {
                    simd_f square[SIMD_LANES];
                    float copy[SIMD_LANES * SIMD_LANES];
                    const int64_t at = n * size;
                    const char *key = x.first[i];
                    uintptr_t later = x.later[i] + (uintptr_t)at;
                    int64_t stride = places.stride;
                    if (key && bytes - at >= SQUARE_BYTES)
                        key += at;
                    else {
                        copy_square(copy, &places, first + i * SIMD_LANES, last, at, bytes - at);
                        key = (const char *)copy, later = (uintptr_t)copy, stride = SQUARE_BYTES;
                    }
                    turn_in_registers(square, key, later, stride, element);
                    if (multiply != TILE_FLOAT32 && end - n < at_once) square_part(multiply, rows, sum[i], q + n, pitch, square, end - n);
                    else square_steps(multiply, rows, sum[i], q + n, pitch, square, element);
                }
            for (int r = 0; r < rows; r++)
                for (int i = 0; i < squares; i++) {
                    float *const to = s + r * ld + i * SIMD_LANES;
                    simd_store(to, d > 0 ? simd_add(simd_load(to), sum[i][r]) : sum[i][r]);
                }
            d += run;
        } while (d < elements);
    }
}

/* Whether whole squares make up a run, and whole runs the numbers: most of what a square has would else be in vain. */
static int fill_squares(int64_t head_dim, fastattn_dtype dtype) {
    const int64_t run = tile_run(head_dim);
    return head_dim % run == 0 && run * fa_size_of(dtype) % SQUARE_BYTES == 0;
}

#endif
