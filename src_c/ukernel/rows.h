/* Template: the float32 products by rows. For a few rows, as in decoding, lanes of rows would be empty, so the operands of tile.h change
 * sides: its panel are keys, turned a few at a time, and values as they lie; its single elements are queries and powers. What memory
 * brings is read once, front to back, in its storage type, and widened in registers.
 *
 * Sums are formed in the order of the tables whose lanes are rows: scores number by number in the same runs, powers key by key in
 * runs of FA_SUM_RUN, values key by key. A row gets the same bits from either, unless there are only SHORT_ROWS rows or fewer
 * and a row may have other bits in company: the slots that begin with `turned` turn keys for any of them.
 *
 * Reads and writes per key, in floats: K and V once from memory, the keys turned once to L1 and back; q and p once from L1 for
 * every strip of keys or values, of which there are a few. Memory is asked a block ahead, at the pace of the arithmetic, so that
 * requests are in flight all the time: the processor foresees rows that follow each other, up to the end of a page, and rows
 * apart, as those of one head in a (length, heads, head_dim) cache, not at all. */

/* Vectors of turned keys: many, while one tile holds all rows, and else as few as let many rows share what is read. */
FA_INLINE int rows_vectors(int rows) {
    const int most = SIMD_TILE_VECTORS;
    return rows <= SIMD_TILE_WIDTH(most) || SIMD_TILE_WIDTH(2) == SIMD_TILE_WIDTH(most) ? most : 2;
}

/* Whether rows that have keys and values of their own, beside each other, share tiles. With four lanes there is so much to do for a row
 * that each is as well taken by itself. */
enum { BESIDE_TILES = SIMD_LANES > 4 };

/* What row r of these reads. */
FA_INLINE fa_matrix beside_of(fa_matrix m, int r) {
    if (m.rows) m.column += r * m.beside;
    else m.at += r * m.beside;
    m.beside = 0;
    return m;
}

enum {
    TURNED_NUMBERS = 64, /* of head_dim, at a time: no run of tile_run() is longer */
    SHORT_ROWS = 40,     /* and fewer are not worth turning keys for, */
    SHORT_WIDENED = 24,  /* if each tile has to widen these; */
    SHORT_POWERS = 12    /* nor for the softmax, which turns scores */
};

/* Memory is asked for a line of what will be read later. */
FA_INLINE void fetch_later(uintptr_t later, int64_t at) {
    if (at % 64 == 0) simd_fetch((const char *)(later + (uintptr_t)at));
}

/* Where some keys of a block lie, and what will be read in their place later. */
typedef struct key_places {
    const char *key[SIMD_LANES];
    uintptr_t later[SIMD_LANES];
} key_places;

/* turned[d][key] in float32, as many numbers from d on of SIMD_LANES keys. */
FA_INLINE void turn_square(float *turned, int ld, const key_places *x, int64_t d, fastattn_dtype dtype) {
    const int64_t at = d * fa_size_of(dtype);
    simd_f square[SIMD_LANES];
    FA_UNROLL for (int i = 0; i < SIMD_LANES; i++) {
        fetch_later(x->later[i], at);
        square[i] = load_full(x->key[i] + at, dtype);
    }
    simd_transpose(square);
    FA_UNROLL for (int i = 0; i < SIMD_LANES; i++) simd_store(turned + i * ld, square[i]);
}

static FA_NOINLINE void turn_edge(float *turned, int ld, const key_places *x, int64_t d, int64_t n, fastattn_dtype dtype) {
    const int64_t at = d * fa_size_of(dtype);
    simd_f square[SIMD_LANES];
    for (int i = 0; i < SIMD_LANES; i++) {
        fetch_later(x->later[i], at);
        square[i] = load_as(x->key[i] + at, n, dtype);
    }
    simd_transpose(square);
    for (int i = 0; i < n; i++) simd_store(turned + i * ld, square[i]);
}

/* turned[d - first][key] for the numbers of head_dim from `first` up to `end`, and `count` keys from key j on of a block, whole vectors,
 * which its last one fills up. */
FA_INLINE void turn_keys(float *turned, int ld, const tile_rows *block, int64_t keys, int64_t j, int64_t count, int64_t first, int64_t end,
                         fastattn_dtype dtype) {
    const int64_t size = fa_size_of(dtype);
    for (const int64_t last = j + count; j < last; j += SIMD_LANES, turned += SIMD_LANES) {
        key_places x;
        int64_t d = first;
        tile_places(block, j, keys, SIMD_LANES, x.key, x.later);
        for (int i = 0; i < SIMD_LANES; i++)
            simd_fetch((const char *)(x.later[i] + (uintptr_t)(end * size - 1))); /* rows need not begin with a line */
        if (dtype == FASTATTN_BFLOAT16) /* pairs turn as lanes do */
            for (; d + 2 * SIMD_LANES <= end; d += 2 * SIMD_LANES) {
                simd_f square[SIMD_LANES];
                FA_UNROLL for (int i = 0; i < SIMD_LANES; i++) {
                    fetch_later(x.later[i], d * size);
                    square[i] = load_full(x.key[i] + d * size, FASTATTN_FLOAT32);
                }
                simd_transpose(square);
                FA_UNROLL for (int i = 0; i < SIMD_LANES; i++) {
                    simd_store(turned + (d - first + 2 * i) * ld, simd_first_bf16(square[i]));
                    simd_store(turned + (d - first + 2 * i + 1) * ld, simd_second_bf16(square[i]));
                }
            }
        for (; d + SIMD_LANES <= end; d += SIMD_LANES) turn_square(turned + (d - first) * ld, ld, &x, d, dtype);
        if (d < end) turn_edge(turned + (d - first) * ld, ld, &x, d, end - d, dtype);
    }
}

/* The numbers of the lanes. */
static const float lane_numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

/* The numbers of a row of q from d on. Queries are packed as float32; or as float16, for keys of that, where halves multiply as they
 * are: then they are whole vectors of SHORT_HALVES. */
enum {
    SHORT_HALVES = 2 * SIMD_LANES,
#ifdef SIMD_HALVES
    HALVES_MULTIPLY = FA_HOLDS_16BIT
#else
    HALVES_MULTIPLY = 0
#endif
};

FA_INLINE const float *packed_at(const float *q, int64_t d, fastattn_dtype packed) {
    return (const float *)(const void *)((const char *)q + d * fa_size_of(packed));
}

/* One row and a few keys, at most SIMD_LANES: one by one, or most sums across lanes would be of nothing. */
static FA_NOINLINE void few_scores(float *s, const float *q, const tile_rows *k, int64_t keys, int64_t head_dim, fastattn_dtype packed,
                                   fastattn_dtype dtype) {
    const simd_f lane = simd_load(lane_numbers);
    simd_f dots = simd_set1(0.0f);
    for (int64_t j = keys - 1; j >= 0; j--) {
        const char *key = tile_row(k, j);
        simd_f sum = simd_set1(0.0f);
        for (int64_t d = 0; d < head_dim; d += SIMD_LANES)
            sum = simd_fma(load_as(key + d * fa_size_of(dtype), head_dim - d, dtype), load_full(packed_at(q, d, packed), packed), sum);
        dots = simd_select(simd_lt(lane, simd_set1((float)(j + 1))), simd_set1(simd_sum(sum)), dots);
    }
    simd_store(s, dots);
}

/* Without turned keys lanes are the numbers of a key, whose products are summed across lanes, for so many keys and rows at a time. Here,
 * and in short_softmax, a row's bits depend on how many there are. */
enum {
    SHORT_SUMS = SIMD_TILE_VECTORS * SIMD_TILE_WIDTH(SIMD_TILE_VECTORS) >= 16 ? 16 : 8,
    SHORT_TILE = 4, /* rows of a tile, at most */
    SHORT_VECTORS = SIMD_LANES == 4 /* a key takes so many steps that tiles may ask how it is stored, and memory for a line at a time */
};

/* The products of a row with a key of its own, whole keys one after the other: they are read in the order of memory. */
FA_INLINE simd_f key_products(const float *q, const char *key, uintptr_t later, int64_t head_dim, fastattn_dtype dtype) {
    const int64_t size = fa_size_of(dtype);
    simd_f sum = simd_set1(0.0f);
    simd_fetch((const char *)(later + (uintptr_t)(head_dim * size - 1)));
    int64_t d = 0;
    for (; d + SIMD_LANES <= head_dim; d += SIMD_LANES) {
        fetch_later(later, d * size);
        sum = simd_fma(load_full(key + d * size, dtype), simd_load(q + d), sum);
    }
    return d < head_dim ? simd_fma(load_as(key + d * size, head_dim - d, dtype), simd_load(q + d), sum) : sum;
}

/* What a tile multiplies, and what will be read in the place of its keys later. */
typedef struct short_operands {
    const float *q[SHORT_TILE];
    const char *key[SHORT_SUMS];
    uintptr_t later[SHORT_SUMS];
} short_operands;

/* The products of a vector; of halves with the sums of two vectors of float32. (A macro: plain C spills sums that go through a function.) */
#ifdef SIMD_HALVES
#define SHORT_MULTIPLY(a, b, c, packed) ((packed) == FASTATTN_FLOAT16 ? simd_fma_f16(a, b, c) : simd_fma(a, b, c))
#else
#define SHORT_MULTIPLY(a, b, c, packed) simd_fma(a, b, c)
#endif

/* sum[row][key] of n numbers from d on: each that is loaded of a row is for all keys, and the reverse. */
FA_INLINE void short_step(int rows, simd_f *sum, const short_operands *x, int asks, int64_t d, int64_t n, fastattn_dtype packed,
                          fastattn_dtype dtype) {
    const int keys = SHORT_SUMS / rows;
    const int64_t at = d * fa_size_of(dtype);
    simd_f q[SHORT_TILE];
    FA_UNROLL for (int r = 0; r < rows; r++) q[r] = simd_load(packed_at(x->q[r], d, packed));
    FA_UNROLL for (int i = 0; i < keys; i++) {
        if (asks) fetch_later(x->later[i], at);
        const simd_f key = packed == FASTATTN_FLOAT16 ? load_full(x->key[i] + at, FASTATTN_FLOAT32) : load_as(x->key[i] + at, n, dtype);
        FA_UNROLL for (int r = 0; r < rows; r++) sum[r * keys + i] = SHORT_MULTIPLY(key, q[r], sum[r * keys + i], packed);
    }
}

FA_INLINE void short_tile(int rows, simd_f *sum, const short_operands *x, int asks, int64_t head_dim, fastattn_dtype packed,
                          fastattn_dtype dtype) {
    const int step = packed == FASTATTN_FLOAT16 ? SHORT_HALVES : SIMD_LANES, keys = SHORT_SUMS / rows;
    const int64_t size = fa_size_of(dtype), line = 64 / size, whole = head_dim - head_dim % SIMD_LANES;
    int64_t d = 0;
    FA_UNROLL for (int i = 0; i < SHORT_SUMS; i++) sum[i] = simd_set1(0.0f);
    while (SHORT_VECTORS && d < whole) {
        const int64_t end = asks && d + line <= whole ? d + line : whole;
        if (asks)
            FA_UNROLL for (int i = 0; i < keys; i++) simd_fetch((const char *)(x->later[i] + (uintptr_t)(d * size)));
        for (; d < end; d += step) short_step(rows, sum, x, 0, d, step, packed, dtype);
    }
    if (SHORT_VECTORS) return; /* short_rest has what is left */
    for (; d + SIMD_LANES <= head_dim; d += SIMD_LANES) short_step(rows, sum, x, asks, d, SIMD_LANES, packed, dtype);
    if (d < head_dim) short_step(rows, sum, x, asks, d, head_dim - d, packed, dtype);
}

/* As many numbers, fewer than lanes, of these keys from byte `at` on, each in a vector. */
static FA_NOINLINE void short_edges(float *to, const char *const *key, int keys, int64_t at, int64_t n, fastattn_dtype dtype) {
    for (int i = 0; i < keys; i++) simd_store(to + i * SIMD_LANES, load_as(key[i] + at, n, dtype));
}

/* What is left of a tile's numbers, of short vectors seldom anything: with loads of less than one in the tile they would be most of the code. */
FA_INLINE void short_rest(int rows, simd_f *sum, const short_operands *x, int64_t head_dim, fastattn_dtype dtype) {
    const int keys = SHORT_SUMS / rows;
    const int64_t d = head_dim / SIMD_LANES * SIMD_LANES;
    float edges[SHORT_SUMS * SIMD_LANES];
    short_operands rest;
    if (d == head_dim || !SHORT_VECTORS) return;
    short_edges(edges, x->key, keys, d * fa_size_of(dtype), head_dim - d, dtype);
    FA_UNROLL for (int r = 0; r < rows; r++) rest.q[r] = x->q[r] + d;
    FA_UNROLL for (int i = 0; i < keys; i++) rest.key[i] = (const char *)(edges + i * SIMD_LANES);
    short_step(rows, sum, &rest, 0, 0, SIMD_LANES, FASTATTN_FLOAT32, FASTATTN_FLOAT32);
}

/* Tiles are of `width` rows, a constant; the last row stands for those that a tile has too many. All rows meet a few keys before the next
 * ones come, and memory is asked with the first of them. Sums that are whole vectors of a row go where they belong; others lie tile by tile,
 * and those of a row come together when all are in memory. */
FA_INLINE void short_scores(int width, float *s, int ld, const float *q, int rows, const tile_rows *k, int64_t keys, int asks,
                            int64_t head_dim, fastattn_dtype packed, fastattn_dtype dtype) {
    const int tile_keys = SHORT_SUMS / width, vectors = SHORT_VECTORS && tile_keys % SIMD_LANES == 0;
    const int64_t pitch = fa_round_up(head_dim, FA_ROW_STEP), tiles = fa_round_up(keys, tile_keys) / tile_keys;
    float sums[FA_PANEL_ROWS * SHORT_SUMS];
    for (int64_t t = 0; t < tiles; t++) {
        short_operands x;
        tile_places(k, t * tile_keys, keys, tile_keys, x.key, x.later);
        FA_UNROLL for (int i = 0; i < tile_keys; i++)
            if (asks) simd_fetch((const char *)(x.later[i] + (uintptr_t)(head_dim * fa_size_of(dtype) - 1))); /* the line that a row ends in */
        for (int row = 0; row < rows; row += width) {
            simd_f sum[SHORT_SUMS];
            float *const to = sums + (row * tiles + t * width) * tile_keys;
            FA_UNROLL for (int r = 0; r < width; r++) x.q[r] = q + (row + r < rows ? row + r : rows - 1) * pitch;
            if (packed == FASTATTN_FLOAT16) short_tile(width, sum, &x, asks && row == 0, head_dim, FASTATTN_FLOAT16, FASTATTN_FLOAT16);
            else FA_BY_STORAGE_OF_KEYS(dtype, short_tile, width, sum, &x, asks && row == 0, head_dim, FASTATTN_FLOAT32)
            short_rest(width, sum, &x, head_dim, dtype);
            FA_UNROLL for (int i = 0; i < SHORT_SUMS; i += SIMD_LANES) {
                const int r = row + i / tile_keys;
                const simd_f dots = simd_sum_lanes(sum + i);
                if (!vectors) simd_store(to + i, dots);
                else if (r < rows) simd_store(s + r * ld + t * tile_keys + i % tile_keys, dots);
            }
        }
    }
    for (int row = 0; row < rows && !vectors; row++)
        for (int64_t t = 0; t < tiles; t++)
            memcpy(s + row * ld + t * tile_keys, sums + (row / width * tiles + t) * SHORT_SUMS + row % width * tile_keys,
                   (size_t)tile_keys * sizeof(float));
}

FA_INLINE void short_qk_of(fa_matrix k, float *s, const float *q, int ld, int rows, int64_t keys, int64_t head_dim, fastattn_dtype packed,
                           fastattn_dtype dtype) {
    const int others = rows % SHORT_TILE == 1 ? rows - 1 : rows; /* than a last one that would be alone in its tile */
    float *const last_s = s + others * ld;
    const float *const last_q = q + others * fa_round_up(head_dim, FA_ROW_STEP);
    for (int64_t j = 0; j < keys; j += SHORT_SUMS) {
        const char *first_row;
        const tile_rows places = tile_rows_of(fa_rows_from(k, j), &first_row);
        const int64_t n = keys - j < SHORT_SUMS ? keys - j : SHORT_SUMS;
        if (others == 2) short_scores(2, s + j, ld, q, 2, &places, n, 1, head_dim, packed, dtype);
        else if (others > 0) short_scores(SHORT_TILE, s + j, ld, q, others, &places, n, 1, head_dim, packed, dtype);
        if (others == rows) continue;
        if (n <= SHORT_SUMS / 4) few_scores(last_s + j, last_q, &places, n, head_dim, packed, dtype);
        else short_scores(1, last_s + j, ld, last_q, 1, &places, n, others == 0 && tile_looks_ahead(&places), head_dim, packed, dtype);
    }
}

/* With short vectors, once for all that may be multiplied; rows that have keys of their own are taken one by one. */
static FA_NOINLINE void short_qk(const fa_matrix *k, float *s, const float *q, int ld, int rows, int64_t from, int64_t keys,
                                 int64_t head_dim, fastattn_dtype packed) {
    if (!k->beside) short_qk_of(fa_rows_from(*k, from), s, q, ld, rows, keys, head_dim, HALVES_MULTIPLY ? packed : FASTATTN_FLOAT32, k->dtype);
    for (int r = 0; k->beside && r < rows; r++, s += ld, q += fa_round_up(head_dim, FA_ROW_STEP)) {
        const fa_matrix own = beside_of(*k, r);
        short_qk(&own, s, q, ld, 1, from, keys, head_dim, packed);
    }
}

/* Rows that have keys of their own, beside each other. */
FA_INLINE void beside_qk_of(fa_matrix k, float *s, const float *q, int ld, int rows, int64_t keys, int64_t head_dim, fastattn_dtype dtype) {
    const int64_t pitch = fa_round_up(head_dim, FA_ROW_STEP);
    const char *first_row;
    const tile_rows places = tile_rows_of(k, &first_row);
    enum { TILE_KEYS = SHORT_SUMS / TILE_MOST_BESIDE };
    simd_f sum[SHORT_SUMS] = {simd_set1(0.0f)};
    for (int64_t first = 0; first < keys; first += TILE_KEYS) {
        float dots[SHORT_SUMS];
        for (int i = 0; i < TILE_KEYS; i++) {
            const int64_t n = first + i < keys ? first + i : keys - 1;
            const char *const key = tile_row(&places, n);
            const uintptr_t later = tile_later(&places, n);
            for (int r = 0; r < rows; r++)
                sum[r * TILE_KEYS + i] =
                    key_products(q + r * pitch, key + r * k.beside, later + (uintptr_t)(r * k.beside), head_dim, dtype);
        }
        FA_UNROLL for (int i = 0; i < SHORT_SUMS; i += SIMD_LANES) simd_store(dots + i, simd_sum_lanes(sum + i));
        for (int r = 0; r < rows; r++) memcpy(s + r * ld + first, dots + r * TILE_KEYS, TILE_KEYS * sizeof(float));
    }
}

FA_INLINE void turned_qk_of(fa_matrix k, float *s, const float *q, int ld, int rows, int64_t keys, int64_t head_dim,
                            fastattn_dtype dtype) {
    const int64_t pitch = fa_round_up(head_dim, FA_ROW_STEP), run = tile_run(head_dim);
    const char *first_row;
    const tile_rows places = tile_rows_of(k, &first_row);
    for (int64_t j = 0, n; j < keys; j += n) {
        int vectors = rows_vectors(rows);
        while (vectors > TILE_FEWEST && fa_round_up(keys - j, SIMD_LANES) < vectors * SIMD_LANES) vectors /= 2;
        n = vectors * SIMD_LANES;
        int64_t d = 0;
        do { /* once if there are no numbers, too: scores are 0 then */
            float turned[TURNED_NUMBERS * SIMD_TILE_VECTORS * SIMD_LANES];
            const int64_t steps = head_dim - d < run ? head_dim - d : run;
            turn_keys(turned, vectors * SIMD_LANES, &places, keys, j, n, d, d + steps, dtype);
            const tile_operands x = {.c = s + j, .c_ld = ld, .adds = d > 0, .a = q + d, .across = pitch, .along = 1,
                                     TILE_PANEL(turned, vectors * SIMD_LANES), .steps = steps, .run = run};
            product(vectors * SIMD_LANES, rows, &x);
            d += run;
        } while (d < head_dim);
    }
}

/* Keys and values are read where they lie. */
static fa_matrix as_stored(float *room, fa_matrix stored, int64_t keys, int64_t dim) {
    (void)room, (void)keys, (void)dim;
    return stored;
}

static FA_NOINLINE void turned_in_memory(float *s, const float *q, int ld, int rows, fa_matrix k, int64_t keys, int64_t head_dim) {
    FA_BY_STORAGE_OF_KEYS(k.dtype, turned_qk_of, k, s, q, ld, rows, keys, head_dim)
}

static void turned_qk(float *s, const float *q, int ld, int rows, fa_matrix k, int64_t from, int64_t keys, int64_t head_dim) {
#ifdef SIMD_SQUARES
    if (rows <= SQUARES_ROWS && fill_squares(head_dim, k.dtype)) {
        FA_BY_STORAGE_OF_KEYS(k.dtype, squares_qk, TILE_FLOAT32, fa_rows_from(k, from), s, q, ld, rows, keys, head_dim)
        return;
    }
#endif
    turned_in_memory(s, q, ld, rows, fa_rows_from(k, from), keys, head_dim);
}

static void rows_qk(float *s, const float *q, int ld, int rows, fa_matrix k, int64_t from, int64_t keys, int64_t head_dim) {
    if (rows > (k.dtype == FASTATTN_FLOAT32 ? SHORT_ROWS : SHORT_WIDENED))
        turned_qk(s, q, ld, rows, k, from, keys, head_dim);
    else if (SHORT_VECTORS)
        short_qk(&k, s, q, ld, rows, from, keys, head_dim, FASTATTN_FLOAT32);
    else if (k.beside) {
        FA_BY_STORAGE_OF_KEYS(k.dtype, beside_qk_of, fa_rows_from(k, from), s, q, ld, rows, keys, head_dim)
    } else {
        FA_BY_STORAGE_OF_KEYS(k.dtype, short_qk_of, fa_rows_from(k, from), s, q, ld, rows, keys, head_dim, FASTATTN_FLOAT32)
    }
}

FA_INLINE void rows_pv_by(int beside, fa_matrix v, float *o, const float *alpha, const float *p, int ld, int rows, int64_t keys,
                          int64_t v_head_dim, fastattn_dtype dtype) {
    const tile_kind kind = {TILE_FLOAT32, 1, 0, 0, beside}, ragged = {TILE_FLOAT32, 1, 1, 0, beside};
    const char *first_row;
    tile_operands x = {.c = o, .c_ld = fa_round_up(v_head_dim, FA_ROW_STEP), .alpha = alpha, .a = p, .across = ld, .along = 1,
                       .rows = tile_rows_of(v, &first_row), .storage = dtype, .steps = keys, .run = keys > 0 ? keys : 1,
                       .ahead = keys};
    int vectors = SIMD_TILE_VECTORS;
    for (int64_t left = v_head_dim; left > 0; left -= vectors * SIMD_LANES) {
        while (vectors > 1 && left < vectors * SIMD_LANES) vectors /= 2;
        x.ends = left <= vectors * SIMD_LANES;
        switch (vectors) {
#if SIMD_TILE_VECTORS >= 4
        case 4: tile_strip(kind, 4, rows, x); break;
#endif
        case 2: tile_strip(kind, 2, rows, x); break;
        default:
            x.lanes = left < SIMD_LANES ? left : SIMD_LANES;
            tile_strip(ragged, 1, rows, x);
        }
        x.c += vectors * SIMD_LANES;
        x.rows.column += vectors * SIMD_LANES * fa_size_of(dtype);
    }
}

FA_INLINE void rows_pv_of(fa_matrix v, float *o, const float *alpha, const float *p, int ld, int rows, int64_t keys,
                          int64_t v_head_dim, fastattn_dtype dtype) {
    if (v.beside && BESIDE_TILES) rows_pv_by(1, v, o, alpha, p, ld, rows, keys, v_head_dim, dtype);
    else rows_pv_by(0, v, o, alpha, p, ld, rows, keys, v_head_dim, dtype);
}

static void rows_pv(float *o, const float *alpha, const float *p, int ld, int rows, fa_matrix v, int64_t from, int64_t keys,
                    int64_t v_head_dim) {
    if (v.beside && !BESIDE_TILES) {
        for (int r = 0; r < rows; r++, o += fa_round_up(v_head_dim, FA_ROW_STEP))
            rows_pv(o, alpha + r, p + r * ld, ld, 1, beside_of(v, r), from, keys, v_head_dim);
        return;
    }
#ifdef SIMD_PLAIN /* a tile for each storage type: compilers keep the sums of one that serves all of them in memory */
    FA_BY_STORAGE(v.dtype, rows_pv_of, fa_rows_from(v, from), o, alpha, p, ld, rows, keys, v_head_dim)
#else
    rows_pv_of(fa_rows_from(v, from), o, alpha, p, ld, rows, keys, v_head_dim, v.dtype);
#endif
}

/* Scores beyond the keys, in the last vector of a row, become -inf. */
FA_INLINE void hide_beyond(float *s, int64_t keys) {
    const int64_t last = (keys - 1) / SIMD_LANES * SIMD_LANES;
    const simd_m there = simd_lt(simd_load(lane_numbers), simd_set1((float)(keys - last)));
    simd_store(s + last, simd_select(there, simd_load(s + last), simd_set1(-INFINITY)));
}

FA_INLINE float first_lane(simd_f x) {
    float lanes[SIMD_LANES];
    simd_store(lanes, x);
    return lanes[0];
}

/* The softmax of up to SHORT_POWERS rows, whose keys stay lanes throughout. */
FA_INLINE void short_softmax(float *s, float *p, int ld, int rows, int64_t keys, float c, float *m, float *l, float *alpha) {
    const simd_f scale = simd_set1(c);
    for (int r = 0; r < rows; r++, s += ld, p += ld) {
        hide_beyond(s, keys);
        simd_f most = simd_load(s), sum = simd_set1(0.0f);
        for (int64_t j = SIMD_LANES; j < keys; j += SIMD_LANES) most = simd_max(most, simd_load(s + j));
        const float old = m[r], largest = simd_largest(most), top = largest > old ? largest : old;
        const float base = top == -INFINITY ? 0.0f : top;
        for (int64_t j = 0; j < keys; j += SIMD_LANES) {
            const simd_f x = exp2_of(simd_sub(simd_load(s + j), simd_set1(base)), scale);
            simd_store(p + j, x);
            sum = simd_add(sum, x);
        }
        const simd_f fade = exp2_of(simd_set1(old - base), scale);
        m[r] = top;
        alpha[r] = first_lane(fade);
        l[r] = first_lane(simd_fma(simd_set1(l[r]), fade, simd_set1(simd_sum(sum))));
    }
}

/* The maximum, and what follows from it, of SIMD_LANES rows at a time, which are lanes when their vectors of keys have turned. */
static void turned_softmax(float *s, float *p, int ld, int rows, int64_t keys, float c, float *m, float *l, float *alpha) {
    const simd_f scale = simd_set1(c), lowest = simd_set1(-INFINITY), zero = simd_set1(0.0f);
    const int64_t whole = fa_round_up(keys, SIMD_LANES);
    for (int row = 0; row < rows; row += SIMD_LANES, s += SIMD_LANES * ld, p += SIMD_LANES * ld) {
        const int lanes = rows - row < SIMD_LANES ? rows - row : SIMD_LANES;
        simd_f square[SIMD_LANES], sum = zero, run = zero;
        float base[SIMD_LANES];
        for (int r = 0; r < SIMD_LANES; r++) {
            square[r] = lowest;
            if (r >= lanes) continue;
            hide_beyond(s + r * ld, keys);
            for (int64_t j = 0; j < whole; j += SIMD_LANES) square[r] = simd_max(square[r], simd_load(s + r * ld + j));
        }
        simd_transpose(square);
        const simd_f old = load_as(m + row, lanes, FASTATTN_FLOAT32);
        simd_f top = old;
        FA_UNROLL for (int i = 0; i < SIMD_LANES; i++) top = simd_max(top, square[i]);
        store_as(m + row, top, lanes, FASTATTN_FLOAT32);
        top = simd_select(simd_eq(top, lowest), zero, top);
        simd_store(base, top);
        const simd_f fade = exp2_of(simd_sub(old, top), scale);
        store_as(alpha + row, fade, lanes, FASTATTN_FLOAT32);
        for (int r = 0; r < lanes; r++)
            for (int64_t j = 0; j < whole; j += SIMD_LANES)
                simd_store(p + r * ld + j, exp2_of(simd_sub(simd_load(s + r * ld + j), simd_set1(base[r])), scale));
        for (int64_t j = 0; j < whole; j += SIMD_LANES) {
            FA_UNROLL for (int r = 0; r < SIMD_LANES; r++) square[r] = r < lanes ? simd_load(p + r * ld + j) : zero;
            simd_transpose(square);
            FA_UNROLL for (int i = 0; i < SIMD_LANES; i++) run = simd_add(run, square[i]);
            if ((j + SIMD_LANES) % FA_SUM_RUN && j + SIMD_LANES < whole) continue;
            sum = simd_add(sum, run);
            run = zero;
        }
        store_as(l + row, simd_fma(load_as(l + row, lanes, FASTATTN_FLOAT32), fade, sum), lanes, FASTATTN_FLOAT32);
    }
}

static void rows_softmax(float *s, float *p, int ld, int rows, int64_t keys, float c, float *m, float *l, float *alpha) {
    if (rows > SHORT_POWERS)
        turned_softmax(s, p, ld, rows, keys, c, m, l, alpha);
    else
        short_softmax(s, p, ld, rows, keys, c, m, l, alpha);
}

static float rows_power(const float *p, int ld, int row, int64_t key) { return p[row * ld + key]; }

FA_INLINE void rows_pack_of(float *q, const void *const *rows_of, int rows, int64_t head_dim, float sign, fastattn_dtype dtype) {
    const int64_t pitch = fa_round_up(head_dim, FA_ROW_STEP);
    for (int row = 0; row < rows; row++, q += pitch)
        for (int64_t d = 0; d < pitch; d += SIMD_LANES) {
            const int64_t left = head_dim - d < 0 ? 0 : head_dim - d;
            const char *at = (const char *)rows_of[row] + (left ? d * fa_size_of(dtype) : 0);
            simd_store(q + d, simd_mul(load_as(at, left, dtype), simd_set1(sign)));
        }
}

static void rows_pack(float *q, int ld, const void *const *rows_of, int rows, int64_t head_dim, fastattn_dtype dtype,
                      float sign) {
    (void)ld;
    FA_BY_STORAGE(dtype, rows_pack_of, q, rows_of, rows, head_dim, sign)
}

/* Rows of sums that are `pitch` numbers apart. */
FA_INLINE int unpack_rows(void *const *outputs, int count, const float *o, int64_t pitch, const float *factor, int64_t v_head_dim,
                          fastattn_dtype dtype) {
    int finite = 1;
    for (int row = 0; row < count; row++) finite &= narrow(outputs[row], o + row * pitch, factor[row], v_head_dim, dtype);
    return finite;
}

static int rows_unpack(void *const *outputs, int count, const float *o, int ld, const float *factor, int64_t v_head_dim,
                       fastattn_dtype dtype) {
    (void)ld;
    return unpack_rows(outputs, count, o, fa_round_up(v_head_dim, FA_ROW_STEP), factor, v_head_dim, dtype);
}
