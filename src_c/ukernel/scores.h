/* Template: everything that happens to a score between the product and the softmax, and the tile of a mask. */

/* tanh(x), to six units in the last place and never beyond 1: x P(x^2) / Q(x^2) of the smallest relative error (1e-8), up to 8.1,
 * where tanh is 1 but for 1.8e-7. */
FA_INLINE simd_f tanh_of(simd_f x) {
    const simd_f most = simd_set1(8.1f), z = simd_max(simd_set1(-8.1f), simd_min(most, x)), u = simd_mul(z, z);
    simd_f p = simd_fma(simd_set1(0x1.e84p-26f), u, simd_set1(0x1.592402p-15f));
    simd_f q = simd_fma(simd_set1(0x1.ac966cp-20f), u, simd_set1(0x1.50d8fcp-11f));
    p = simd_fma(p, u, simd_set1(0x1.b9887ep-8f));
    q = simd_fma(q, u, simd_set1(0x1.94ba1cp-5f));
    p = simd_fma(p, u, simd_set1(0x1.041e36p-2f));
    q = simd_fma(q, u, simd_set1(0x1.c4aa7p-1f));
    p = simd_fma(p, u, simd_set1(0x1.e3e904p+0f));
    q = simd_fma(q, u, simd_set1(0x1.e3e906p+0f));
    return simd_div(simd_mul(p, z), q);
}

/* Which rules there are: constants, so that each combination in use gets a loop without questions. */
typedef struct rules_kind {
    int bends, sloped, bounded, biased;
} rules_kind;

/* What the rules of some rows say of a vector, whose lanes are these rows, or keys of one of them. */
typedef struct rules_of {
    simd_f scale, cap, slope, offset, begin, end;
} rules_of;

/* Score x of `key` (counted from the block's first), and in `shown` whether it is: 1 or 0. */
FA_INLINE simd_f ruled(rules_kind kind, const rules_of *rules, simd_f x, simd_f key, const float *bias_at, simd_f *shown) {
    const simd_f hidden = simd_set1(-INFINITY), zero = simd_set1(0.0f);
    x = simd_mul(x, rules->scale);
    *shown = simd_set1(1.0f);
    if (kind.bends) x = simd_mul(rules->cap, tanh_of(simd_div(x, rules->cap)));
    if (kind.biased) {
        const simd_f bias = simd_load(bias_at);
        const simd_m hides = simd_eq(bias, hidden);
        x = simd_select(hides, hidden, simd_add(x, bias));
        *shown = simd_select(hides, zero, *shown);
    }
    if (kind.sloped) x = simd_sub(x, simd_mul(rules->slope, simd_abs(simd_sub(rules->offset, key))));
    if (kind.bounded) {
        const simd_m inside = simd_lt(key, rules->end), before = simd_lt(key, rules->begin);
        x = simd_select(before, hidden, simd_select(inside, x, hidden));
        *shown = simd_select(before, zero, simd_select(inside, *shown, zero));
    }
    return x;
}

FA_INLINE void scores_of(float *s, ptrdiff_t ld, int rows, int64_t first, int64_t keys, const fa_score_rules *rules,
                         float *seen, rules_kind kind) {
    rules_of of = {.scale = simd_set1(rules->scale), .cap = simd_set1(rules->softcap)};
    for (int row = 0; row < rows; row += SIMD_LANES) {
        if (kind.sloped) of.slope = simd_load(rules->slopes + row), of.offset = simd_load(rules->offset + row);
        if (kind.bounded) of.begin = simd_load(rules->begin + row), of.end = simd_load(rules->end + row);
        simd_f visible = simd_load(seen + row), shown;
        for (int64_t j = 0; j < keys; j++) {
            const int64_t at = j * ld + row;
            simd_store(s + at, ruled(kind, &of, simd_load(s + at), simd_set1((float)(first + j)), rules->bias + at, &shown));
            visible = simd_max(visible, shown);
        }
        simd_store(seen + row, visible);
    }
}

/* The same by rows: lanes are keys. */
FA_INLINE void rows_scores_of(float *s, ptrdiff_t ld, int rows, int64_t first, int64_t keys, const fa_score_rules *rules,
                              float *seen, rules_kind kind) {
    float ascending[SIMD_LANES];
    for (int i = 0; i < SIMD_LANES; i++) ascending[i] = (float)(first + i);
    rules_of of = {.scale = simd_set1(rules->scale), .cap = simd_set1(rules->softcap)};
    const simd_f zero = simd_set1(0.0f), last = simd_set1((float)(first + keys));
    for (int row = 0; row < rows; row++) {
        if (kind.sloped) of.slope = simd_set1(rules->slopes[row]), of.offset = simd_set1(rules->offset[row]);
        if (kind.bounded) of.begin = simd_set1(rules->begin[row]), of.end = simd_set1(rules->end[row]);
        simd_f visible = zero, shown, key = simd_load(ascending);
        for (int64_t j = 0; j < keys; j += SIMD_LANES) {
            const int64_t at = row * ld + j;
            simd_store(s + at, ruled(kind, &of, simd_load(s + at), key, rules->bias + at, &shown));
            visible = simd_max(visible, simd_select(simd_lt(key, last), shown, zero));
            key = simd_add(key, simd_set1((float)SIMD_LANES));
        }
        if (simd_any(simd_lt(zero, visible))) seen[row] = 1.0f;
    }
}

/* Calls f with the combination of rules as constants, of which the rare ones share a loop that asks. */
#define BY_RULES(f, ...)                                                                                            \
    const int bounded = rules->end != NULL, biased = rules->bias != NULL;                                           \
    if (rules->softcap != 0.0f || rules->slopes) {                                                                  \
        const rules_kind kind = {rules->softcap != 0.0f, rules->slopes != NULL, bounded, biased};                   \
        f(__VA_ARGS__, kind);                                                                                       \
    } else if (biased && bounded)                                                                                   \
        f(__VA_ARGS__, (rules_kind){0, 0, 1, 1});                                                                   \
    else if (biased)                                                                                                \
        f(__VA_ARGS__, (rules_kind){0, 0, 0, 1});                                                                   \
    else                                                                                                            \
        f(__VA_ARGS__, (rules_kind){0, 0, bounded, 0});

static void scores(float *s, int ld, int rows, int64_t first, int64_t keys, const fa_score_rules *rules, float *seen) {
    BY_RULES(scores_of, s, ld, rows, first, keys, rules, seen)
}

static void rows_scores(float *s, int ld, int rows, int64_t first, int64_t keys, const fa_score_rules *rules, float *seen) {
    BY_RULES(rows_scores_of, s, ld, rows, first, keys, rules, seen)
}
#undef BY_RULES

/* What has been seen of a mask. */
typedef struct mask_census {
    simd_m hidden, shown;
} mask_census;

FA_INLINE void mask_store(float *to, simd_f bias, mask_census *seen) {
    const simd_m hides = simd_eq(bias, simd_set1(-INFINITY));
    seen->hidden = simd_or(seen->hidden, hides);
    seen->shown = simd_or(seen->shown, simd_not(hides));
    simd_store(to, bias);
}

/* A vector of a mask's elements, which lie apart: room for them in their own type, so that they are moved and then loaded as one. */
typedef union mask_line {
    double doubles[SIMD_LANES];
    float floats[SIMD_LANES];
    uint16_t halves[SIMD_LANES];
    uint8_t bytes[SIMD_LANES];
} mask_line;

/* `keys` elements of a row, at most SIMD_LANES, of so many bytes each; what is beyond them repeats the last. */
static FA_NOINLINE void mask_collect(mask_line *line, const char *from, int64_t key_stride, int64_t keys, int64_t itemsize) {
    if (itemsize == 1 && keys == SIMD_LANES) { /* four at a time: as many bytes stored one by one would take longer */
        FA_UNROLL for (int j = 0; j < SIMD_LANES; j += 4) {
            const uint8_t *at = (const uint8_t *)from + j * key_stride;
            const uint8_t four[4] = {at[0], at[key_stride], at[2 * key_stride], at[3 * key_stride]};
            memcpy(line->bytes + j, four, sizeof four);
        }
        return;
    }
#define MASK_COLLECT(items, type)                                                                                                  \
    FA_UNROLL for (int j = 0; j < SIMD_LANES; j++)                                                                                 \
        line->items[j] = *(const type *)(const void *)(from + (keys == SIMD_LANES || j < keys ? j : keys - 1) * key_stride);
    switch (itemsize) {
    case 1: MASK_COLLECT(bytes, uint8_t) break;
    case 2: MASK_COLLECT(halves, uint16_t) break;
    case 4: MASK_COLLECT(floats, float) break;
    default: MASK_COLLECT(doubles, double)
    }
#undef MASK_COLLECT
}

/* How the elements that a vector of rows has for one key lie: as one, one behind the other, or anyhow. */
typedef enum mask_lanes { MASK_ONE, MASK_NEIGHBOURS, MASK_APART } mask_lanes;

FA_INLINE mask_lanes mask_lanes_of(const void *const *from, int64_t itemsize) {
    int one = 1, neighbours = 1;
    for (int i = 1; i < SIMD_LANES; i++) {
        one &= from[i] == from[0];
        neighbours &= (const char *)from[i] == (const char *)from[0] + i * itemsize;
    }
    return one ? MASK_ONE : neighbours ? MASK_NEIGHBOURS : MASK_APART;
}

/* Asks for what a row has in the next block: a few lines of each of many rows are nothing that the processor foresees. */
FA_INLINE void mask_fetch(uintptr_t later, int64_t bytes) {
    simd_fetch((const char *)later);
    if (bytes > 64) simd_fetch((const char *)(later + 64));
}

/* What elements are loaded as, besides their type: booleans of which every second counts; nothing, before they are collected. */
enum { MASK_EVERY_SECOND = -1, MASK_COLLECTED = -2 };

/* Calls f(..., storage) with it as a constant. */
#define BY_MASK(storage, f, ...)                                         \
    switch ((int)FA_HELD_OF((fastattn_dtype)(storage))) {                \
    case MASK_EVERY_SECOND: f(__VA_ARGS__, MASK_EVERY_SECOND); break;    \
    case FASTATTN_BOOL: f(__VA_ARGS__, FASTATTN_BOOL); break;            \
    case FASTATTN_FLOAT64: f(__VA_ARGS__, FASTATTN_FLOAT64); break;      \
    case FASTATTN_FLOAT16: f(__VA_ARGS__, FASTATTN_FLOAT16); break;      \
    case FASTATTN_BFLOAT16: f(__VA_ARGS__, FASTATTN_BFLOAT16); break;    \
    default: f(__VA_ARGS__, FASTATTN_FLOAT32);                           \
    }

FA_INLINE simd_f mask_load(const void *from, int storage) {
    return storage == MASK_EVERY_SECOND ? simd_load_every_second_bool((const uint8_t *)from) : load_full(from, (fastattn_dtype)storage);
}

FA_INLINE void mask_run_of(float *to, int64_t to_step, const char *from, int64_t from_step, int64_t count, mask_census *seen, int storage) {
    for (; count > 0; count--, to += to_step, from += from_step) mask_store(to, mask_load(from, storage), seen);
}

/* Vectors of elements that lie side by side, from_step bytes apart, to places that are to_step floats apart. */
static FA_NOINLINE void mask_run(float *to, int64_t to_step, const void *from, int64_t from_step, int64_t count, mask_census *seen,
                                 int storage) {
    mask_census all = *seen;
    BY_MASK(storage, mask_run_of, to, to_step, from, from_step, count, &all)
    *seen = all;
}

FA_INLINE void mask_square(simd_f square[SIMD_LANES], const void *const *from, int64_t offset, int storage) {
    FA_UNROLL for (int i = 0; i < SIMD_LANES; i++) square[i] = mask_load((const char *)from[i] + offset, storage);
}

/* As what vectors of a row's elements are loaded from where they lie, if they can be. */
FA_INLINE int mask_whole(int64_t key_stride, fastattn_dtype dtype) {
    return key_stride == fa_size_of(dtype) ? (int)dtype : dtype == FASTATTN_BOOL && key_stride == 2 ? MASK_EVERY_SECOND : MASK_COLLECTED;
}

FA_INLINE mask_census mask_unseen(void) {
    const simd_m none = simd_lt(simd_set1(0.0f), simd_set1(0.0f));
    return (mask_census){none, none};
}

FA_INLINE unsigned mask_found(const mask_census *seen) {
    return (simd_any(seen->shown) ? FA_MASK_SHOWS : 0u) | (simd_any(seen->hidden) ? FA_MASK_HIDES : 0u);
}

/* Elements come in vectors, of keys or of rows, where they lie so; else a square of them is collected, all of it before the first is
 * read again, and turned. */
static unsigned mask(float *tile, int ld, const void *const *rows_of, int rows, int64_t key_stride, int64_t keys, fastattn_dtype dtype) {
    const int64_t itemsize = fa_size_of(dtype);
    const int whole = mask_whole(key_stride, dtype);
    mask_line lines[SIMD_LANES];
    const void *line_of[SIMD_LANES];
    mask_census seen = mask_unseen();
    for (int i = 0; i < SIMD_LANES; i++) line_of[i] = &lines[i];
    for (int row = 0; row < rows; row += SIMD_LANES) {
        const void *const *from = rows_of + row;
        const mask_lanes lanes = mask_lanes_of(from, itemsize);
        if (lanes == MASK_ONE) { /* as the heads of one query may be */
            for (int64_t j = 0; j < keys; j++)
                mask_store(tile + j * ld + row, simd_set1(fa_mask_element((const char *)from[0] + j * key_stride, dtype)), &seen);
            continue;
        }
        if (lanes == MASK_NEIGHBOURS) { /* as those of a transposed mask are */
            mask_run(tile + row, ld, from[0], key_stride, keys, &seen, (int)dtype);
            continue;
        }
        for (int64_t j = 0; j < keys; j += SIMD_LANES) {
            const int64_t n = keys - j < SIMD_LANES ? keys - j : SIMD_LANES;
            const int collected = n < SIMD_LANES || whole == MASK_COLLECTED;
            simd_f square[SIMD_LANES];
            for (int i = 0; i < SIMD_LANES; i++) mask_fetch((uintptr_t)from[i] + (uintptr_t)((j + keys) * key_stride), SIMD_LANES * key_stride);
            for (int i = 0; collected && i < SIMD_LANES; i++)
                mask_collect(&lines[i], (const char *)from[i] + j * key_stride, key_stride, n, itemsize);
            BY_MASK(collected ? (int)dtype : whole, mask_square, square, collected ? line_of : from, collected ? 0 : j * key_stride)
            simd_transpose(square);
            FA_UNROLL for (int i = 0; i < SIMD_LANES; i++)
                if (i < n) mask_store(tile + (j + i) * ld + row, square[i], &seen);
        }
    }
    return mask_found(&seen);
}

/* The same by rows. Rows that share their elements, as the heads of one query may, are copies. */
static unsigned rows_mask(float *bias, int ld, const void *const *rows_of, int rows, int64_t key_stride, int64_t keys, fastattn_dtype dtype) {
    const int whole = mask_whole(key_stride, dtype);
    const int64_t vectors = whole == MASK_COLLECTED ? 0 : keys / SIMD_LANES;
    mask_census seen = mask_unseen();
    for (int row = 0; row < rows; row++, bias += ld) {
        const char *from = rows_of[row];
        if (row > 0 && from == (const char *)rows_of[row - 1]) {
            memcpy(bias, bias - ld, (size_t)keys * sizeof(float));
            continue;
        }
        mask_run(bias, SIMD_LANES, from, SIMD_LANES * key_stride, vectors, &seen, whole);
        for (int64_t j = vectors * SIMD_LANES; j < keys; j += SIMD_LANES) {
            mask_line line;
            mask_collect(&line, from + j * key_stride, key_stride, keys - j < SIMD_LANES ? keys - j : SIMD_LANES, fa_size_of(dtype));
            mask_run(bias + j, SIMD_LANES, &line, 0, 1, &seen, (int)dtype);
        }
    }
    return mask_found(&seen);
}
#undef BY_MASK
