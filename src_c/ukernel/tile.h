/* Template: the two products of attention as one register tile.
 *
 * Parameters, from the SIMD header: simd_f, SIMD_LANES, SIMD_TILE_VECTORS (1 to 4) and SIMD_TILE_WIDTH(vectors) (at most
 * 12). A tile keeps width x vectors accumulators and reads, for every step, `vectors` vectors of the panel and
 * `width` single elements. */

#define FA_TILE_MAX_WIDTH 12

/* Elements are numbers or, where the instruction set has a product for them, pairs of bfloat16. */
#ifdef SIMD_DOT
#define TILE_MULTIPLY(paired, a, b, c) (paired ? simd_dot(a, b, c) : simd_fma(a, b, c))
#else
#define TILE_MULTIPLY(paired, a, b, c) ((void)(paired), simd_fma(a, b, c))
#endif

/* Steps of a full tile without a branch: fewer rounds are better foretold, and a misprediction costs two steps. */
#define FA_TILE_UNROLL 4

FA_INLINE void tile_step(int paired, int width, int vectors, simd_f acc[FA_TILE_MAX_WIDTH][4], const float *a, ptrdiff_t across,
                         const float *panel) {
    simd_f b[4];
    FA_UNROLL for (int v = 0; v < vectors; v++) b[v] = simd_load(panel + v * SIMD_LANES);
    FA_UNROLL for (int w = 0; w < width; w++) {
        const simd_f element = simd_set1(a[w * across]);
        FA_UNROLL for (int v = 0; v < vectors; v++) acc[w][v] = TILE_MULTIPLY(paired, element, b[v], acc[w][v]);
    }
}

/* c[w][v] = alpha[v] * c[w][v] + sum over steps of a[w * across + step * along] * panel[step][v]; without alpha, the sum
 * alone. The sum is formed in runs of `run` steps, each from 0 and then added, for its rounding error grows with their
 * length. paired, width, vectors, across or along, and alpha's presence are constants wherever this is inlined. */
FA_INLINE void tile(int paired, int width, int vectors, float *c, const float *alpha, const float *a, ptrdiff_t across,
                    ptrdiff_t along, const float *panel, ptrdiff_t ld, int64_t steps, int64_t run) {
    for (int64_t step = 0;;) {
        const int64_t end = step + run < steps ? step + run : steps;
        const int first = step == 0;
        simd_f acc[FA_TILE_MAX_WIDTH][4];
        FA_UNROLL for (int w = 0; w < width; w++)
            FA_UNROLL for (int v = 0; v < vectors; v++) acc[w][v] = simd_set1(0.0f);
        if (width == SIMD_TILE_WIDTH(vectors))
            for (; step + FA_TILE_UNROLL <= end; step += FA_TILE_UNROLL)
                FA_UNROLL for (int u = 0; u < FA_TILE_UNROLL; u++)
                    tile_step(paired, width, vectors, acc, a + (step + u) * along, across, panel + (step + u) * ld);
        for (; step < end; step++) tile_step(paired, width, vectors, acc, a + step * along, across, panel + step * ld);
        FA_UNROLL for (int v = 0; v < vectors; v++) {
            const simd_f factor = alpha && first ? simd_load(alpha + v * SIMD_LANES) : simd_set1(1.0f);
            FA_UNROLL for (int w = 0; w < width; w++) {
                float *to = c + w * ld + v * SIMD_LANES;
                simd_store(to, alpha || !first ? simd_fma(simd_load(to), factor, acc[w][v]) : acc[w][v]);
            }
        }
        if (step >= steps) break;
    }
}

/* Calls tile() with width as a constant. */
FA_INLINE void tile_of(int paired, int width, int vectors, float *c, const float *alpha, const float *a, ptrdiff_t across,
                       ptrdiff_t along, const float *panel, ptrdiff_t ld, int64_t steps, int64_t run) {
#define FA_CASE(n)                                                                  \
    case n:                                                                         \
        if (n <= SIMD_TILE_WIDTH(vectors)) tile(paired, n, vectors, c, alpha, a, across, along, panel, ld, steps, run); \
        break;
    switch (width) {
        FA_CASE(1) FA_CASE(2) FA_CASE(3) FA_CASE(4) FA_CASE(5) FA_CASE(6)
        FA_CASE(7) FA_CASE(8) FA_CASE(9) FA_CASE(10) FA_CASE(11) FA_CASE(12)
    }
#undef FA_CASE
}

/* All `count` elements across, for `vectors` vectors of rows. The last two tiles share what is left evenly, because a
 * narrow tile cannot keep the multipliers busy. */
FA_INLINE void tile_strip(int paired, int vectors, int64_t count, float *c, const float *alpha, const float *a, ptrdiff_t across,
                          ptrdiff_t along, const float *panel, ptrdiff_t ld, int64_t steps, int64_t run) {
    const int widest = SIMD_TILE_WIDTH(vectors);
    while (count > 0) {
        int width = (int)(count >= 2 * widest || count == widest ? widest
                          : count > widest                       ? (count + 1) / 2
                                                                 : count);
        tile_of(paired, width, vectors, c, alpha, a, across, along, panel, ld, steps, run);
        c += width * ld;
        a += width * across;
        count -= width;
    }
}

/* The whole product: strips of the widest vectors, then what is left of the rows. */
FA_INLINE void tile_product(int paired, int rows, int64_t count, float *c, const float *alpha, const float *a, ptrdiff_t across,
                            ptrdiff_t along, const float *panel, ptrdiff_t ld, int64_t steps, int64_t run) {
    for (int row = 0; row < rows;) {
        int vectors = (rows - row) / SIMD_LANES;
        if (vectors > SIMD_TILE_VECTORS) vectors = SIMD_TILE_VECTORS;
        float *to = c + row;
        const float *from = panel + row, *factor = alpha ? alpha + row : alpha;
        switch (vectors) {
#if SIMD_TILE_VECTORS >= 4
        case 4: tile_strip(paired, 4, count, to, factor, a, across, along, from, ld, steps, run); break;
        case 3: tile_strip(paired, 3, count, to, factor, a, across, along, from, ld, steps, run); break;
#endif
        case 2: tile_strip(paired, 2, count, to, factor, a, across, along, from, ld, steps, run); break;
        case 1: tile_strip(paired, 1, count, to, factor, a, across, along, from, ld, steps, run); break;
        }
        row += vectors * SIMD_LANES;
    }
}

/* A dot product is summed in two runs or more, of at most 64 steps: its rounding error limits the accuracy of large
 * scores. */
FA_INLINE int64_t tile_run(int64_t head_dim) {
    const int64_t runs = head_dim <= 32 ? 1 : head_dim <= 64 ? 2 : (head_dim + 63) / 64;
    return head_dim > 0 ? (head_dim + runs - 1) / runs : 1;
}

static void qk(float *s, const float *q, int ld, int rows, fa_matrix k, int64_t from, int64_t keys, int64_t head_dim) {
    const float *row = (const float *)(const void *)(k.at + from * k.stride);
    tile_product(0, rows, keys, s, NULL, row, k.stride / (int64_t)sizeof(float), 1, q, ld, head_dim, tile_run(head_dim));
}

static void pv(float *o, const float *alpha, const float *p, int ld, int rows, fa_matrix v, int64_t from, int64_t keys,
               int64_t v_head_dim) {
    const float *row = (const float *)(const void *)(v.at + from * v.stride);
    tile_product(0, rows, v_head_dim, o, alpha, row, 1, v.stride / (int64_t)sizeof(float), p, ld, keys, keys > 0 ? keys : 1);
}

static float power(const float *p, int ld, int row, int64_t key) { return p[key * ld + row]; }
