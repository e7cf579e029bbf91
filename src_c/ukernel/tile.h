/* Template: the two products of attention as one register tile.
 *
 * Parameters, from the SIMD header: simd_f, SIMD_LANES, SIMD_TILE_VECTORS (2 or 4) and SIMD_TILE_WIDTH(vectors) (at most
 * 12). A tile keeps width x vectors accumulators and reads, for every step, `vectors` vectors of the panel and
 * `width` single elements. */

#define FA_TILE_MAX_WIDTH 12
#define FA_TILE_NARROW 6 /* up to which every width is worth a tile */

enum { TILE_MOST_BESIDE = 4 }; /* elements across that have panels of their own */

/* Vectors of a strip, at least, but for the last numbers of a row: rows come in FA_ROW_STEP, which is whole strips of the widest, or a vector. */
enum { TILE_FEWEST = SIMD_LANES == FA_ROW_STEP ? 1 : SIMD_TILE_VECTORS };

FA_ASSERT_CONSTANT(SIMD_TILE_VECTORS == 2 || SIMD_TILE_VECTORS == 4, strips_are_of_two_vectors_or_four);
FA_ASSERT_CONSTANT(SIMD_TILE_WIDTH(1) <= FA_TILE_MAX_WIDTH && SIMD_TILE_WIDTH(2) <= FA_TILE_MAX_WIDTH &&
                       SIMD_TILE_WIDTH(SIMD_TILE_VECTORS) <= FA_TILE_MAX_WIDTH, tile_of_knows_widths_up_to_this);
FA_ASSERT_CONSTANT(FA_ROW_STEP % (TILE_FEWEST * SIMD_LANES) == 0, rows_come_in_whole_strips);

/* What is multiplied: numbers or, where the instruction set has a product for them, pairs of halves. Integers come with a unit
 * for every element across and one for every lane. */
enum { TILE_FLOAT32, TILE_BFLOAT16, TILE_INT16 };

/* By rows, what a tile asks memory for: the first half of what will be read in the place of its strip, the last, and the line that it ends in. */
enum { TILE_ASKS_FIRST = 1, TILE_ASKS_LAST = 2, TILE_ASKS_END = 4 };

/* Else, of how many rows of elements it asks for a line each, in as many steps as the line lasts. */
enum { TILE_ASKED = 16 };

/* What is a constant wherever a tile is inlined. Pairs of halves are a panel of float32 to this file. */
typedef struct tile_kind {
    int multiply;
    int by_rows; /* elements across are rows, which alpha is for, not for the lanes */
    int ragged;  /* the only vector of the panel has fewer lanes */
    int paired;  /* by rows: a step is of two rows of the panel, whose bfloat16 become pairs; of an even number of vectors */
    int beside;  /* by rows: each element across has a panel of its own, beside that of the one before */
} tile_kind;

FA_INLINE simd_f tile_multiply(int multiply, simd_f a, simd_f b, simd_f c) {
#ifdef SIMD_PAIRS
    if (multiply == TILE_BFLOAT16) return simd_dot_bf16(a, b, c);
#endif
#ifdef SIMD_INT16
    if (multiply == TILE_INT16) return simd_dot_int16(a, b, c);
#endif
    return (void)multiply, simd_fma(a, b, c);
}

#ifdef SIMD_INT16
FA_INLINE simd_f tile_sum(simd_f sum, simd_f unit) { return simd_mul(simd_of_integers(sum), unit); }
#else
FA_INLINE simd_f tile_sum(simd_f sum, simd_f unit) { return (void)unit, sum; }
#endif

/* Rows that pointers find, or a stride from one on, without a question: row n is n * stride bytes from at[n >> shift], of which is
 * read from byte `column` on, and what is read in its place later is `ahead` bytes from where the pointer `skip` further on leads. */
typedef struct tile_rows {
    const char *const *at;
    int shift;
    int64_t stride, skip, ahead;
    int64_t beside; /* as in fa_matrix */
    int64_t column;
} tile_rows;

/* The rows of a matrix; where they have no pointers, `first` holds that of the first. */
FA_INLINE tile_rows tile_rows_of(fa_matrix m, const char **first) {
    *first = m.at;
    const int shift = m.rows ? m.shift : 63;
    const int64_t skip = m.rows ? m.rows_ahead : 0;
    return (tile_rows){m.rows ? m.rows : first, shift, m.stride, skip >> shift, skip * m.stride + m.ahead, m.beside, m.column};
}

FA_INLINE const char *tile_row(const tile_rows *x, int64_t n) {
    return (const char *)((uintptr_t)x->at[n >> x->shift] + (uintptr_t)(n * x->stride + x->column));
}

/* Nothing is read there yet: what is ahead of the last rows may be nowhere. */
FA_INLINE uintptr_t tile_later(const tile_rows *x, int64_t n) {
    return (uintptr_t)x->at[(n >> x->shift) + x->skip] + (uintptr_t)(n * x->stride + x->column + x->ahead);
}

/* Of rows that have a pointer each, or fewer share one. */
static FA_NOINLINE void places_apart(const tile_rows *x, int64_t first, int64_t rows, int count, const char **at, uintptr_t *later) {
    const char *const *const pointers = x->at;
    const int64_t stride = x->stride, skip = x->skip, ahead = x->ahead, last = rows - 1;
    const int shift = x->shift;
    int64_t row = first < rows ? first : last;
    uintptr_t column = (uintptr_t)(row * stride + x->column);
    for (int i = 0; i < count; i++) {
        const char *const *const pointer = pointers + (row >> shift);
        at[i] = (const char *)((uintptr_t)pointer[0] + column), later[i] = (uintptr_t)pointer[skip] + column + (uintptr_t)ahead;
        if (row < last) row++, column += (uintptr_t)stride;
    }
}

/* Where `count` rows from one on lie, a constant, and what will be read in their place later; the last of so many rows stands for those
 * beyond. */
FA_INLINE void tile_places(const tile_rows *x, int64_t first, int64_t rows, int count, const char **at, uintptr_t *later) {
    if (first + count <= rows && first >> x->shift == (first + count - 1) >> x->shift) {
        const char *here = tile_row(x, first);
        uintptr_t there = tile_later(x, first);
        FA_UNROLL for (int i = 0; i < count; i++, here += x->stride, there += (uintptr_t)x->stride) at[i] = here, later[i] = there;
    } else
        places_apart(x, first, rows, count, at, later);
}

/* Whether anything will be read later but the rows themselves. */
FA_INLINE int tile_looks_ahead(const tile_rows *x) { return x->ahead != 0 || x->skip != 0; }

/* One product: c[w][lane] = alpha * c[w][lane] + sum over steps of a[w * across + step * along] * panel[step][lane]; without alpha
 * the sum alone, or with `adds` alpha is 1. The sum is formed in runs of `run` steps, each from 0 and then added, for its rounding
 * error grows with their length. Of integers there is one run, and the sum is times units[w * across] * lane_units[lane]. */
typedef struct tile_operands {
    float *c;
    int64_t c_ld;
    const float *alpha;
    int adds;
    const float *a;
    int64_t across, along;
    const char *panel;
    int64_t stride;      /* bytes from one step of the panel to the next */
    tile_rows rows;      /* by rows, in place of these two, */
    fastattn_dtype storage; /* and what their numbers are: the panel is of float32 else */
    int64_t lanes;       /* of a ragged panel */
    int64_t steps, run;
    int64_t ahead; /* bytes from the elements in use (whose `along` is 1) to what will be read next, which memory is asked for meanwhile; by
                      rows any but 0, and `rows` says where; 0: nothing */
    int ends, asks; /* by rows: whether the strip is the last of its rows, and what the tile asks for */
    const float *units, *lane_units;
} tile_operands;

/* An alpha that changes nothing. */
static const float unchanged[FA_PANEL_ROWS] = {
    1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
    1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

/* Steps of a full tile without a branch: fewer rounds are better foretold, and a misprediction costs two steps. By rows there are as many
 * rounds as keys. */
#define FA_TILE_UNROLL 2

FA_INLINE const char *tile_panel(tile_kind kind, const tile_operands *x, int64_t n, int w) {
    const int64_t beside = kind.beside ? w * x->rows.beside : 0;
    return kind.by_rows ? tile_row(&x->rows, n) + beside : x->panel + n * x->stride;
}

/* By rows, what will be read in the place of a row. Else rows of elements come as their lines are used up: one line with each step, those
 * of up to 16 rows in the 16 steps that a line lasts. With many rows in the panel the processor is in time itself. */
FA_INLINE void tile_fetch(tile_kind kind, int vectors, const tile_operands *x, int64_t n, int w, fastattn_dtype storage) {
    if (kind.paired) { /* a line that has been asked for costs less than to ask whether it has */
        const uintptr_t later = tile_later(&x->rows, n);
        const int64_t bytes = vectors * SIMD_LANES * fa_size_of(storage);
        FA_UNROLL for (int64_t at = 0; at < bytes; at += 64) simd_fetch((const char *)(later + (uintptr_t)at));
        simd_fetch((const char *)(later + (uintptr_t)(bytes - 1)));
        return;
    }
    if (!x->ahead) return;
    if (kind.by_rows) {
        const uintptr_t later = tile_later(&x->rows, n) + (uintptr_t)(kind.beside ? w * x->rows.beside : 0);
        const int64_t bytes = vectors * SIMD_LANES * fa_size_of(storage), half = bytes / 128 * 64;
        if (x->asks & TILE_ASKS_FIRST)
            FA_UNROLL for (int64_t at = 0; at < half; at += 64) simd_fetch((const char *)(later + (uintptr_t)at));
        if (x->asks & TILE_ASKS_LAST)
            FA_UNROLL for (int64_t at = half; at < bytes; at += 64) simd_fetch((const char *)(later + (uintptr_t)at));
        if (x->asks & TILE_ASKS_END) simd_fetch((const char *)(later + (uintptr_t)(bytes - 1))); /* a row need not end with a line */
    } else if (vectors <= 3) {
        const int64_t element = n + n % TILE_ASKED * x->across;
        simd_fetch((const char *)((uintptr_t)x->a + (uintptr_t)(element * (int64_t)sizeof(float) + x->ahead)));
    }
}

/* A step's vectors of the panel, or of that of element w. */
FA_INLINE void tile_vectors(tile_kind kind, int vectors, simd_f b[4], const tile_operands *x, int64_t step, int w, fastattn_dtype storage) {
    const int64_t bytes = SIMD_LANES * fa_size_of(storage);
#ifdef SIMD_PAIRS
    if (kind.paired) {
        const char *even = tile_panel(kind, x, 2 * step, w), *odd = tile_panel(kind, x, 2 * step + 1, w);
        tile_fetch(kind, vectors, x, 2 * step, w, storage);
        tile_fetch(kind, vectors, x, 2 * step + 1, w, storage);
        FA_UNROLL for (int v = 0; v < vectors; v += 2) {
            b[v] = load_full(even + v * bytes, FASTATTN_FLOAT32);
            b[v + 1] = load_full(odd + v * bytes, FASTATTN_FLOAT32);
            simd_zip_near_halves(&b[v], &b[v + 1]);
        }
        return;
    }
#endif
    const char *panel = tile_panel(kind, x, step, w);
    tile_fetch(kind, vectors, x, step, w, storage);
    FA_UNROLL for (int v = 0; v < vectors; v++)
        b[v] = kind.ragged ? load_as(panel, x->lanes, storage) : load_full(panel + v * bytes, storage);
}

FA_INLINE void tile_step(tile_kind kind, int width, int vectors, simd_f acc[FA_TILE_MAX_WIDTH][4], const tile_operands *x, int64_t step,
                         fastattn_dtype storage) {
    const float *a = x->a + step * x->along;
    simd_f b[4];
    if (!kind.beside) tile_vectors(kind, vectors, b, x, step, 0, storage);
    FA_UNROLL for (int w = 0; w < width; w++) {
        if (kind.beside) tile_vectors(kind, vectors, b, x, step, w, storage);
        const simd_f element = simd_set1(a[w * x->across]);
        FA_UNROLL for (int v = 0; v < vectors; v++) acc[w][v] = tile_multiply(kind.multiply, element, b[v], acc[w][v]);
    }
}

FA_INLINE void tile_steps(tile_kind kind, int width, int vectors, simd_f acc[FA_TILE_MAX_WIDTH][4], const tile_operands *x, int64_t step,
                          int64_t end, fastattn_dtype storage) {
    if (width == SIMD_TILE_WIDTH(vectors) && !kind.by_rows)
        for (; step + FA_TILE_UNROLL <= end; step += FA_TILE_UNROLL)
            FA_UNROLL for (int u = 0; u < FA_TILE_UNROLL; u++) tile_step(kind, width, vectors, acc, x, step + u, storage);
    for (; step < end; step++) tile_step(kind, width, vectors, acc, x, step, storage);
}

/* Sums of integers as numbers, and those of pairs that were made within quarters in order. */
FA_INLINE void tile_sums(tile_kind kind, int width, int vectors, simd_f acc[FA_TILE_MAX_WIDTH][4], const tile_operands *x) {
#ifdef SIMD_PAIRS
    if (kind.paired)
        FA_UNROLL for (int w = 0; w < width; w++)
            FA_UNROLL for (int v = 0; v < vectors; v += 2) simd_zip_quarters(&acc[w][v], &acc[w][v + 1]);
#endif
    if (kind.multiply != TILE_INT16) return;
    FA_UNROLL for (int v = 0; v < vectors; v++) {
        const simd_f lane_unit = simd_load(x->lane_units + v * SIMD_LANES);
        FA_UNROLL for (int w = 0; w < width; w++)
            acc[w][v] = tile_sum(acc[w][v], simd_mul(simd_set1(x->units[w * x->across]), lane_unit));
    }
}

/* By rows, each number of rows up to the widest has a tile of its own, so that what is read is read once. Else there are the narrow ones and
 * the widest, which are nearly as good; and for the last vectors of a row the narrow ones, which keep the multipliers busy. */
FA_INLINE int tile_widest(tile_kind kind, int vectors) {
    const int widest = kind.beside ? TILE_MOST_BESIDE : SIMD_TILE_WIDTH(vectors);
    (void)vectors;
    return kind.by_rows && !kind.paired && widest > FA_TILE_NARROW ? FA_TILE_NARROW : widest;
}

/* width and vectors are constants, too. What becomes of c is asked once for a tile, not for each of its vectors: those questions
 * would be most of the code. So is how numbers are stored: each type has its steps, but what is around them, which is most of a
 * tile, they share. */
FA_INLINE void tile(tile_kind kind, int width, int vectors, const tile_operands *x) {
    for (int64_t step = 0;;) {
        const int64_t end = step + x->run < x->steps ? step + x->run : x->steps;
        const int first = step == 0;
        simd_f acc[FA_TILE_MAX_WIDTH][4];
        FA_UNROLL for (int w = 0; w < width; w++)
            FA_UNROLL for (int v = 0; v < vectors; v++) acc[w][v] = simd_set1(0.0f);
        if (kind.by_rows && !kind.paired) {
            FA_BY_STORAGE(x->storage, tile_steps, kind, width, vectors, acc, x, step, end)
        } else {
            tile_steps(kind, width, vectors, acc, x, step, end, kind.paired ? FASTATTN_BFLOAT16 : FASTATTN_FLOAT32);
        }
        step = end;
        tile_sums(kind, width, vectors, acc, x);
        float *to = x->c;
        if (!first || x->alpha || x->adds) {
            const float *alpha = first && x->alpha ? x->alpha : unchanged;
            FA_UNROLL for (int w = 0; w < width; w++, to += x->c_ld)
                FA_UNROLL for (int v = 0; v < vectors; v++) {
                    const simd_f factor = kind.by_rows ? simd_set1(alpha[w]) : simd_load(alpha + v * SIMD_LANES);
                    simd_store(to + v * SIMD_LANES, simd_fma(simd_load(to + v * SIMD_LANES), factor, acc[w][v]));
                }
        } else {
            FA_UNROLL for (int w = 0; w < width; w++, to += x->c_ld)
                FA_UNROLL for (int v = 0; v < vectors; v++) simd_store(to + v * SIMD_LANES, acc[w][v]);
        }
        if (step >= x->steps) break;
    }
}

FA_INLINE int tile_has(tile_kind kind, int width, int vectors) {
    const int widest = tile_widest(kind, vectors);
    return width == widest || (width < widest && (width <= FA_TILE_NARROW || kind.by_rows));
}

/* Calls tile() with width as a constant. */
FA_INLINE void tile_of(tile_kind kind, int width, int vectors, const tile_operands *x) {
#define FA_CASE(n)                                                         \
    case n:                                                                \
        if (tile_has(kind, n, vectors)) tile(kind, n, vectors, x);         \
        break;
    switch (width) {
        FA_CASE(1) FA_CASE(2) FA_CASE(3) FA_CASE(4) FA_CASE(5) FA_CASE(6)
        FA_CASE(7) FA_CASE(8) FA_CASE(9) FA_CASE(10) FA_CASE(11) FA_CASE(12)
    }
#undef FA_CASE
}

/* All `count` elements across, for `vectors` vectors of the panel. The last two tiles share what is left evenly, because a
 * narrow tile cannot keep the multipliers busy. By rows the first two share what memory is asked for, or it would
 * be in a hurry and then idle. */
FA_INLINE void tile_strip(tile_kind kind, int vectors, int64_t count, tile_operands x) {
    const int widest = tile_widest(kind, vectors);
    const int64_t tiles = (count + widest - 1) / widest;
    for (int64_t n = 1; count > 0; n++) {
        int width = (int)count;
        if (count > widest) width = count >= 2 * widest ? widest : (int)((count + 1) / 2);
        if (!tile_has(kind, width, vectors)) width = count >= widest ? widest : (width + 1) / 2;
        if (kind.by_rows) {
            x.asks = kind.beside || n == 1 ? TILE_ASKS_FIRST : 0;
            if (kind.beside || n == 2 || tiles == 1) x.asks |= TILE_ASKS_LAST | (x.ends ? TILE_ASKS_END : 0);
        }
        tile_of(kind, width, vectors, &x);
        if (!kind.by_rows && count <= TILE_ASKED) x.ahead = 0; /* all have been asked for */
        x.c += width * x.c_ld;
        x.a += width * x.across;
        if (kind.by_rows && x.alpha) x.alpha += width;
        if (kind.multiply == TILE_INT16) x.units += width * x.across;
        if (kind.beside) x.rows.column += width * x.rows.beside;
        count -= width;
    }
}

/* Whether strips of three vectors pay for their code: those of pairs of 48 rows, where a vector is as many as rows come in. */
FA_INLINE int tile_takes_three(int multiply) { return SIMD_TILE_VECTORS == 4 && SIMD_LANES == FA_ROW_STEP && multiply == TILE_BFLOAT16; }

/* Vectors of the next strip of so many rows, which are whole strips. */
FA_INLINE int tile_strip_vectors(int multiply, int rows) {
    const int most = rows / SIMD_LANES;
    if (TILE_FEWEST == SIMD_TILE_VECTORS || most >= SIMD_TILE_VECTORS) return SIMD_TILE_VECTORS;
    return most == 3 && !tile_takes_three(multiply) ? 2 : most;
}

/* A strip of elements of which, with `either`, it is not known yet whether they lie side by side along the steps or across: each way has its
 * tiles, but where one multiplies for so long that addresses at any strides cost nothing. */
FA_INLINE void tile_strip_lying(tile_kind kind, int either, int vectors, int64_t count, tile_operands x) {
    if (!either || (SIMD_LANES == FA_ROW_STEP && vectors > 1)) {
        tile_strip(kind, vectors, count, x);
    } else if (x.along == 1) {
        x.along = 1;
        tile_strip(kind, vectors, count, x);
    } else {
        x.across = 1;
        tile_strip(kind, vectors, count, x);
    }
}

/* The whole product of a panel of float32 or pairs: strips of the widest vectors, then what is left of the rows. */
FA_INLINE void tile_product_of(int multiply, int either, int rows, int64_t count, tile_operands x) {
    const tile_kind kind = {multiply, 0, 0, 0, 0};
    for (int row = 0; row < rows;) {
        const int vectors = tile_strip_vectors(multiply, rows - row);
        tile_operands strip = x;
        strip.c += row;
        strip.panel += row * (int64_t)sizeof(float);
        if (x.alpha) strip.alpha += row;
        if (multiply == TILE_INT16) strip.lane_units += row;
        switch (vectors) {
#if SIMD_TILE_VECTORS >= 4
        case 4: tile_strip_lying(kind, either, 4, count, strip); break;
        case 3: if (tile_takes_three(multiply)) tile_strip_lying(kind, either, 3, count, strip); break;
#endif
        case 2: if (TILE_FEWEST <= 2) tile_strip_lying(kind, either, 2, count, strip); break;
        case 1: if (TILE_FEWEST == 1) tile_strip_lying(kind, either, 1, count, strip); break;
        }
        row += vectors * SIMD_LANES;
    }
}

/* Along or across are constants. */
FA_INLINE void tile_product(int multiply, int rows, int64_t count, tile_operands x) { tile_product_of(multiply, 0, rows, count, x); }

/* A panel with this leading dimension in floats. */
#define TILE_PANEL(at, panel_ld) .panel = (const char *)(at), .stride = (panel_ld) * (int64_t)sizeof(float)

/* A dot product is summed in two runs or more, of at most 64 steps: its rounding error limits the accuracy of large
 * scores. */
FA_INLINE int64_t tile_run(int64_t head_dim) {
    const int64_t runs = head_dim <= 32 ? 1 : head_dim <= 64 ? 2 : (head_dim + 63) / 64;
    return head_dim > 0 ? (head_dim + runs - 1) / runs : 1;
}

/* The product of float32, of elements that lie side by side along the steps, or across. */
static FA_NOINLINE void product(int rows, int64_t count, const tile_operands *operands) {
    tile_operands x = *operands;
    x.ahead = 0;
    tile_product_of(TILE_FLOAT32, 1, rows, count, x);
}

static void qk(float *s, const float *q, int ld, int rows, fa_matrix k, int64_t from, int64_t keys, int64_t head_dim) {
    const float *row = (const float *)(const void *)(k.at + from * k.stride);
    const tile_operands x = {.c = s, .a = row, .across = k.stride / (int64_t)sizeof(float), .along = 1, TILE_PANEL(q, ld),
                             .c_ld = ld, .steps = head_dim, .run = tile_run(head_dim)};
    product(rows, keys, &x);
}

static void pv(float *o, const float *alpha, const float *p, int ld, int rows, fa_matrix v, int64_t from, int64_t keys,
               int64_t v_head_dim) {
    const float *row = (const float *)(const void *)(v.at + from * v.stride);
    const tile_operands x = {.c = o, .alpha = alpha, .a = row, .across = 1, .along = v.stride / (int64_t)sizeof(float),
                             TILE_PANEL(p, ld), .c_ld = ld, .steps = keys, .run = keys > 0 ? keys : 1};
    product(rows, v_head_dim, &x);
}

static float power(const float *p, int ld, int row, int64_t key) { return p[key * ld + row]; }
