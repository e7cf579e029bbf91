/* The whole operation against the oracle: every option, many shapes. Each case runs twice, with its buffers flush
 * against an inaccessible page behind and before, its inputs read-only and its workspace exactly as large as asked for.
 */
#include "problem.h"

#include <string.h>

/* Row counts around tile heights, key counts around panel widths, head sizes around vectors. */
TEST_EACH_ISA(attention_shapes) {
    static const int64_t rows[] = {1, 2, 5, 6, 7, 8, 13, 16, 33};
    static const int64_t keys[] = {1, 3, 8, 15, 16, 17, 31, 64, 65, 129};
    static const int64_t dims[] = {1, 2, 5, 8, 9, 16, 17, 31, 32, 33, 64, 65};
    static const fastattn_dtype dtypes[] = {FASTATTN_FLOAT32, FASTATTN_FLOAT16, FASTATTN_BFLOAT16};
    uint64_t n = 0; /* walks through the lists with co-prime steps: all pairs, not all triples */
    for (size_t r = 0; r < COUNT(rows); r++)
        for (size_t k = 0; k < COUNT(keys); k++, n++) {
            struct spec spec = {.name = "shape", .q_len = rows[r], .kv_len = keys[k], .head_dim = dims[n % COUNT(dims)],
                                .v_head_dim = dims[n * 5 % COUNT(dims)], .q_dtype = dtypes[n % 3]};
            spec.kv_dtype = spec.q_dtype;
            spec.causal = n % 4 == 3;
            spec_check(&spec, n);
        }
}

TEST_EACH_ISA(attention_options) {
    static const struct spec specs[] = {
        {.name = "plain", .batch = 2, .heads = 3, .kv_heads = 3, .q_len = 37, .kv_len = 53, .head_dim = 24},
        {.name = "causal", .heads = 2, .kv_heads = 2, .q_len = 150, .kv_len = 150, .head_dim = 32, .causal = 1},
        {.name = "causal, more queries", .q_len = 70, .kv_len = 40, .head_dim = 16, .causal = 1},
        {.name = "causal, more keys", .q_len = 40, .kv_len = 333, .head_dim = 16, .causal = 1},
        {.name = "causal, top left", .q_len = 40, .kv_len = 170, .head_dim = 16, .causal = 1, .offset = OFFSET_ZERO},
        {.name = "offsets", .batch = 5, .q_len = 33, .kv_len = 90, .head_dim = 16, .causal = 1,
         .offset = OFFSET_RANDOM},
        {.name = "window", .q_len = 100, .kv_len = 300, .head_dim = 16, .windowed = 1, .window_left = 20,
         .window_right = 5},
        {.name = "window left", .q_len = 100, .kv_len = 300, .head_dim = 16, .windowed = 1, .window_left = 7,
         .window_right = -1},
        {.name = "window right", .q_len = 100, .kv_len = 100, .head_dim = 16, .windowed = 1, .window_left = -1,
         .window_right = 0},
        {.name = "window, causal", .q_len = 200, .kv_len = 200, .head_dim = 16, .causal = 1, .windowed = 1,
         .window_left = 31, .window_right = 31},
        {.name = "window of the key itself", .q_len = 50, .kv_len = 50, .head_dim = 16, .windowed = 1},
        {.name = "lengths", .batch = 6, .heads = 2, .q_len = 9, .kv_len = 140, .head_dim = 16,
         .lengths = LENGTHS_RANDOM},
        {.name = "ragged, causal", .batch = 6, .heads = 2, .q_len = 70, .kv_len = 140, .head_dim = 16, .lengths = LENGTHS_RAGGED,
         .causal = 1, .sinks = 1},
        {.name = "ragged blocks", .batch = 6, .heads = 2, .q_len = 70, .kv_len = 140, .head_dim = 16, .lengths = LENGTHS_RAGGED,
         .block_size = 24, .blocks_partial = 1, .blocks_density = 0.6},
        {.name = "lengths, causal", .batch = 6, .q_len = 9, .kv_len = 140, .head_dim = 16, .lengths = LENGTHS_RANDOM,
         .causal = 1},
        {.name = "lengths and offsets", .batch = 6, .q_len = 50, .kv_len = 60, .head_dim = 16,
         .lengths = LENGTHS_RANDOM, .offset = OFFSET_RANDOM, .causal = 1, .windowed = 1, .window_left = 20,
         .window_right = -1},
        {.name = "softcap", .q_len = 20, .kv_len = 70, .head_dim = 32, .amplitude = 6, .softcap = 5},
        {.name = "softcap, small scores", .q_len = 20, .kv_len = 70, .head_dim = 32, .amplitude = 0.05, .softcap = 30},
        {.name = "alibi", .batch = 2, .heads = 4, .kv_heads = 2, .q_len = 40, .kv_len = 90, .head_dim = 16,
         .alibi = ALIBI_HEADS},
        {.name = "alibi by batch", .batch = 3, .heads = 2, .q_len = 20, .kv_len = 50, .head_dim = 16,
         .alibi = ALIBI_ALL, .causal = 1, .offset = OFFSET_RANDOM},
        {.name = "sinks", .heads = 4, .kv_heads = 2, .q_len = 20, .kv_len = 50, .head_dim = 16, .sinks = 1},
        {.name = "sinks, empty rows", .heads = 2, .q_len = 60, .kv_len = 30, .head_dim = 16, .sinks = 1, .causal = 1},
        {.name = "grouped heads", .batch = 2, .heads = 12, .kv_heads = 3, .q_len = 7, .kv_len = 80, .head_dim = 32,
         .causal = 1},
        {.name = "one kv head", .heads = 7, .kv_heads = 1, .q_len = 5, .kv_len = 66, .head_dim = 32},
        {.name = "wide values", .q_len = 20, .kv_len = 40, .head_dim = 8, .v_head_dim = 200},
        {.name = "narrow values", .q_len = 20, .kv_len = 40, .head_dim = 200, .v_head_dim = 3},
        {.name = "large heads", .q_len = 9, .kv_len = 70, .head_dim = 576, .v_head_dim = 512},
        {.name = "float16", .q_len = 40, .kv_len = 90, .head_dim = 33, .q_dtype = FASTATTN_FLOAT16,
         .kv_dtype = FASTATTN_FLOAT16},
        {.name = "bfloat16", .q_len = 40, .kv_len = 90, .head_dim = 33, .q_dtype = FASTATTN_BFLOAT16,
         .kv_dtype = FASTATTN_BFLOAT16},
        {.name = "float32 over float16", .q_len = 40, .kv_len = 90, .head_dim = 33, .kv_dtype = FASTATTN_FLOAT16},
        {.name = "float32 over bfloat16", .q_len = 40, .kv_len = 90, .head_dim = 33, .kv_dtype = FASTATTN_BFLOAT16},
        {.name = "precision high", .q_len = 20, .kv_len = 60, .head_dim = 32, .precision = FASTATTN_PRECISION_HIGH},
        {.name = "precision medium", .q_len = 20, .kv_len = 60, .head_dim = 32, .precision = FASTATTN_PRECISION_MEDIUM},
        {.name = "precision medium, float16", .q_len = 20, .kv_len = 60, .head_dim = 32,
         .precision = FASTATTN_PRECISION_MEDIUM, .q_dtype = FASTATTN_FLOAT16, .kv_dtype = FASTATTN_FLOAT16},
        {.name = "peaked", .q_len = 20, .kv_len = 200, .head_dim = 64, .amplitude = 12},
        {.name = "everything", .batch = 2, .heads = 6, .kv_heads = 2, .q_len = 45, .kv_len = 100, .head_dim = 40,
         .v_head_dim = 24, .q_layout = SWAPPED, .k_layout = NEGATIVE, .v_layout = PADDED, .out_layout = SWAPPED,
         .causal = 1, .windowed = 1, .window_left = 60, .window_right = 3, .offset = OFFSET_RANDOM,
         .lengths = LENGTHS_RANDOM, .softcap = 4, .mask = MASK_FLOAT32, .mask_layout = SAME_PLANE, .hidden = 0.2,
         .alibi = ALIBI_ALL, .sinks = 1, .block_size = 16, .blocks_partial = 1, .blocks_by_head = 1,
         .blocks_density = 0.8, .num_threads = 2},
    };
    for (size_t n = 0; n < COUNT(specs); n++)
        spec_check(&specs[n], n);
}

TEST_EACH_ISA(attention_layouts) {
    for (int layout = PACKED; layout <= LAST_VECTOR_LAYOUT; layout++)
        for (int array = 0; array < 4; array++) {
            struct spec spec = {.name = "layout", .batch = 2, .heads = 4, .kv_heads = 2, .q_len = 11, .kv_len = 35,
                                .head_dim = 20};
            *(enum layout *[]){&spec.q_layout, &spec.k_layout, &spec.v_layout, &spec.out_layout}[array] =
                (enum layout)layout;
            if (spec.out_layout <= NEGATIVE) /* rows of the output are distinct */
                spec_check(&spec, 0);
        }
}

/* Heads that lie beside each other, some of which are an item: any number of them, of short rows and of long ones, over a block of
 * keys, some, and parts. */
TEST_EACH_ISA(attention_heads_abreast) {
    static const fastattn_dtype dtypes[] = {FASTATTN_FLOAT32, FASTATTN_FLOAT16, FASTATTN_BFLOAT16};
    static const int64_t keys[] = {3, 300, 2500}, dims[] = {16, 200};
    for (int64_t kv_heads = 2; kv_heads <= 9; kv_heads++)
        for (size_t n = 0; n < COUNT(keys); n++) {
            struct spec spec = {.name = "abreast", .batch = 2, .heads = kv_heads * (1 + kv_heads % 2), .kv_heads = kv_heads,
                                .q_len = kv_heads % 3 + 1, .kv_len = keys[n], .head_dim = dims[kv_heads % 5 == 0], .v_head_dim = 24,
                                .q_dtype = dtypes[kv_heads % 3], .kv_dtype = dtypes[kv_heads % 3], .q_layout = SWAPPED,
                                .k_layout = SWAPPED, .v_layout = SWAPPED, .out_layout = SWAPPED, .lengths = LENGTHS_RAGGED,
                                .causal = kv_heads & 1, .sinks = 1, .num_threads = kv_heads == 8 ? 3 : 1};
            spec_check(&spec, 0);
            spec.lengths = LENGTHS_FULL;
            spec.mask = MASK_BOOL;
            spec.hidden = 0.5;
            spec_check(&spec, 1);
        }
}

TEST_EACH_ISA(attention_masks) {
    for (int mask = MASK_BOOL; mask <= MASK_FLOAT64; mask++)
        for (int layout = PACKED; layout <= LAST_LAYOUT; layout++) {
            struct spec spec = {.name = "mask", .batch = 2, .heads = 4, .kv_heads = 2, .q_len = 19, .kv_len = 83,
                                .head_dim = 16, .mask = mask, .mask_layout = (enum layout)layout, .hidden = 0.4};
            spec_check(&spec, 0);
            spec.hidden = 0.97; /* whole tiles masked, some rows empty */
            spec.causal = 1;
            spec_check(&spec, 1);
        }
}

TEST_EACH_ISA(attention_block_masks) {
    static const int64_t sizes[] = {1, 7, 16, 17, 20, 32, 48, 64, 100, 128, 256};
    for (size_t n = 0; n < COUNT(sizes); n++)
        for (int kind = 0; kind < 8; kind++) {
            struct spec spec = {.name = "blocks", .batch = 2, .heads = 4, .kv_heads = 2, .q_len = 70, .kv_len = 150,
                                .head_dim = 16, .block_size = sizes[n], .blocks_density = kind < 4 ? 0.5 : 0.15,
                                .blocks_partial = kind & 1, .blocks_by_head = kind >> 1 & 1,
                                .blocks_by_batch = kind >> 2 & 1, .causal = kind == 3,
                                .lengths = kind == 5 ? LENGTHS_RANDOM : LENGTHS_FULL,
                                .mask = kind == 6 ? MASK_BOOL : MASK_NONE, .hidden = 0.3, .invariant = (int)(n + (size_t)kind) % 2};
            spec_check(&spec, n * 8 + (uint64_t)kind);
        }
}

/* Long key sequences: many steps of the loop, splits, and the running maximum of grouped decoding. */
TEST_EACH_ISA(attention_long) {
    static const struct spec specs[] = {
        {.name = "decode", .q_len = 1, .kv_len = 5000, .head_dim = 16},
        {.name = "grouped decode", .batch = 2, .heads = 8, .kv_heads = 2, .q_len = 1, .kv_len = 2500, .head_dim = 16,
         .lengths = LENGTHS_RANDOM, .num_threads = 2},
        {.name = "grouped decode, bfloat16", .heads = 4, .kv_heads = 1, .q_len = 3, .kv_len = 3001, .head_dim = 24,
         .causal = 1, .q_dtype = FASTATTN_BFLOAT16, .kv_dtype = FASTATTN_BFLOAT16, .num_threads = 3},
        {.name = "decode, sinks", .heads = 2, .kv_heads = 1, .q_len = 1, .kv_len = 4100, .head_dim = 8, .sinks = 1,
         .mask = MASK_FLOAT16, .hidden = 0.99, .num_threads = 2},
        {.name = "decode, window", .q_len = 1, .kv_len = 6000, .head_dim = 8, .windowed = 1, .window_left = 50,
         .window_right = -1},
        {.name = "prefill", .q_len = 300, .kv_len = 700, .head_dim = 8, .causal = 1, .num_threads = 2},
        {.name = "long blocks", .q_len = 2, .kv_len = 4000, .head_dim = 8, .block_size = 64, .blocks_partial = 1,
         .blocks_density = 0.3},
    };
    for (size_t n = 0; n < 2 * COUNT(specs); n++) {
        struct spec spec = specs[n / 2];
        spec.invariant = n % 2;
        spec_check(&spec, n);
    }
}

/* A row alone, over the keys that it sees, has the bits that it has among others; attention_random tells whether they are right. */
TEST_EACH_ISA(attention_invariant_rows) {
    static const fastattn_dtype dtypes[] = {FASTATTN_FLOAT32, FASTATTN_FLOAT16, FASTATTN_BFLOAT16};
    static const struct spec specs[] = {
        {.name = "a panel", .heads = 4, .kv_heads = 2, .q_len = 40, .kv_len = 70, .head_dim = 24, .causal = 1},
        {.name = "parts", .heads = 2, .kv_heads = 1, .q_len = 90, .kv_len = 2300, .head_dim = 8, .causal = 1, .num_threads = 2},
        {.name = "parts by turns", .batch = 2, .heads = 16, .kv_heads = 8, .q_len = 200, .kv_len = 2100, .head_dim = 8, .causal = 1},
        {.name = "a window, softcap, sinks", .heads = 2, .kv_heads = 2, .q_len = 70, .kv_len = 1300, .head_dim = 33, .causal = 1,
         .windowed = 1, .window_left = 200, .window_right = -1, .softcap = 3, .sinks = 1},
        {.name = "large scores", .heads = 2, .kv_heads = 1, .q_len = 50, .kv_len = 300, .head_dim = 64, .causal = 1, .amplitude = 9},
    };
    for (size_t n = 0; n < COUNT(specs) * COUNT(dtypes); n++) {
        struct spec spec = specs[n / COUNT(dtypes)];
        spec.invariant = 1;
        spec.q_dtype = spec.kv_dtype = dtypes[n % COUNT(dtypes)];
        struct problem problem;
        spec_context(&spec, n);
        problem_build(&problem, &spec, n, GUARD_BEHIND);
        const fastattn_attention_args *all = &problem.args;
        guard_seal();
        CHECK_STATUS(fastattn_attention(all, NULL, 0), FASTATTN_OK);
        guard_check();
        for (int64_t row = 0; row < all->q_len; row += 13) {
            fastattn_attention_args one = *all;
            double out[64 * 33];
            float lse[64];
            const int64_t row_bytes = one.v_head_dim * (int64_t)dtype_size(one.q_dtype);
            one.q = (const char *)all->q + row * all->q_strides[2];
            one.q_len = 1;
            one.kv_len = all->kv_len - all->q_len + row + 1;
            one.out = out, one.out_strides[1] = row_bytes, one.out_strides[0] = one.num_heads * row_bytes;
            one.lse = lse, one.lse_strides[1] = 4, one.lse_strides[0] = 4 * one.num_heads;
            CHECK_STATUS(fastattn_attention(&one, NULL, 0), FASTATTN_OK);
            for (int64_t b = 0; b < one.batch; b++)
                for (int64_t h = 0; h < one.num_heads; h++) {
                    const char *whole = (const char *)all->out + b * all->out_strides[0] + h * all->out_strides[1] + row * all->out_strides[2];
                    const char *alone = (const char *)out + (b * one.num_heads + h) * row_bytes;
                    CHECK(memcmp(whole, alone, (size_t)row_bytes) == 0, "row %lld of head %lld has other bits alone", (long long)row,
                          (long long)h);
                }
        }
        guard_release();
    }
}

TEST_EACH_ISA(attention_random) {
    struct rng rng = {2024};
    for (int n = 0; n < 4 * test_effort; n++) {
        uint64_t seed = random_bits(&rng);
        struct rng own = {seed};
        struct spec spec = spec_random(&own);
        spec_check(&spec, seed);
    }
}
