/* Every slot of an instruction set's table that works on rows where they lie in memory, not on panels, against its sentence in ukernel.h,
 * in double precision, on edge sizes and guarded buffers. */
#include "slots.h"

#include <float.h>
#include <string.h>

TEST_EACH_ISA(slot_widen) {
    const fa_ukernel *uk = table();
    for (size_t e = 0; e < COUNT(edges); e++)
        for (size_t n = 1; n < COUNT(dtypes); n++)
            for (int64_t keys = 1; keys < 8; keys += 3) {
                const int64_t stride = (edges[e] + (int64_t)(e % 3)) * (e % 4 == 3 ? -2 : 2);
                const void *rows_of[FA_PANEL_ROWS];
                context("widen %lld x %lld from dtype %d", (long long)keys, (long long)edges[e], (int)dtypes[n]);
                random_rows(rows_of, (int)keys, (int)keys, edges[e], stride < 0 ? -stride : stride, dtypes[n]);
                const char *from = rows_of[stride < 0 ? keys - 1 : 0];
                float *to = guard_output("to", (size_t)(keys * edges[e]) * 4, 64, GUARD_BEHIND);
                guard_seal();
                uk->widen(to, fa_matrix_at(from, stride, dtypes[n]), keys, edges[e]);
                for (int64_t j = 0; j < keys; j++)
                    for (int64_t d = 0; d < edges[e]; d++)
                        check_close("to", j, d, to[j * edges[e] + d], load(dtypes[n], from + j * stride + d * 2), 0);
                guard_check();
                guard_release();
            }
}

TEST_EACH_ISA(slot_gather) {
    enum { RUNS = 5, ROOM = 90 };
    const fa_ukernel *uk = table();
    for (int keys = 1; keys <= 17; keys++)
        for (int ascends = 0; ascends < 2; ascends++) {
            struct rng rng = {(uint64_t)(keys * 2 + ascends)};
            fa_segment_run runs[RUNS];
            float *sums = guard_output("sums", ROOM * sizeof *sums, sizeof *sums, GUARD_BEHIND);
            float *p = guard_input("p", (size_t)(RUNS * keys) * sizeof *p, sizeof *p, GUARD_BEHIND);
            double expected[ROOM];
            context("runs of %d keys, ascending %d", keys, ascends);
            for (int n = 0; n < RUNS; n++) runs[n] = (fa_segment_run){(int32_t)(n == 2 ? -1 : ROOM - keys - n % 3 * keys), keys, ascends && n != 2};
            for (int n = 0; n < ROOM; n++) expected[n] = sums[n] = (float)random_signed(&rng);
            for (int j = 0; j < RUNS * keys; j++) {
                p[j] = (float)random_signed(&rng);
                const fa_segment_run run = runs[j / keys];
                if (run.segment >= 0) expected[run.segment + (run.ascends ? j % keys : 0)] += 3.0 * (double)p[j];
            }
            guard_seal();
            uk->gather(sums, p, 3.0f, runs, RUNS);
            for (int n = 0; n < ROOM; n++) check_close("sums", n, 0, sums[n], expected[n], 1e-5);
            guard_check();
            guard_release();
        }
}

TEST_EACH_ISA(slot_finite) {
    static const float poisons[] = {NAN, INFINITY, -INFINITY, FLT_MAX, -FLT_MAX, FLT_TRUE_MIN};
    const fa_ukernel *uk = table();
    for (size_t e = 0; e < COUNT(edges); e++)
        for (size_t n = 0; n < COUNT(poisons) * COUNT(dtypes); n++) {
            const fastattn_dtype dtype = dtypes[n / COUNT(poisons)];
            const int64_t dim = edges[e], keys = edges[e * 5 % COUNT(edges)];
            const int64_t stride = (n % 2 ? dim : -dim - 2) * (int64_t)dtype_size(dtype);
            context("finite %lld x %lld of dtype %d", (long long)keys, (long long)dim, (int)dtype);
            const fa_matrix v = stored_rows("v", keys, dim, stride, dtype);
            CHECK(uk->finite(v, keys, dim) == 1, "finite numbers");
            const int64_t key = random_between(&rng, 0, keys - 1);
            char *victim = stored_at(v, key, random_between(&rng, 0, dim - 1));
            store(dtype, victim, poisons[n % COUNT(poisons)]);
            const double poison = load(dtype, victim);
            CHECK(uk->finite(v, keys, dim) == isfinite(poison), "with %g", poison);
            guard_release();
        }
}

TEST_EACH_ISA(slot_narrow) {
    const fa_ukernel *uk = table();
    for (size_t e = 0; e < COUNT(edges); e++)
        for (size_t n = 0; n < COUNT(dtypes); n++) {
            const int64_t dim = edges[e];
            context("narrow %lld to dtype %d", (long long)dim, (int)dtypes[n]);
            const float *from = random_floats("from", dim, 2), factor = (float)random_signed(&rng);
            char *to = guard_output("to", (size_t)dim * dtype_size(dtypes[n]), dtype_size(dtypes[n]), GUARD_BEHIND);
            guard_seal();
            uk->narrow(to, from, factor, dim, dtypes[n]);
            for (int64_t d = 0; d < dim; d++) {
                double wanted; /* the product in float32, then to nearest even */
                const volatile float product = from[d] * factor;
                store(dtypes[n], &wanted, product);
                check_close("to", 0, d, load(dtypes[n], to + d * (int64_t)dtype_size(dtypes[n])), load(dtypes[n], &wanted), 0);
            }
            guard_check();
            guard_release();
        }
}

/* Numbers of every size, some of which become subnormal. */
static void fill_any_size(void *to, int64_t count, fastattn_dtype dtype) {
    for (int64_t n = 0; n < count; n++)
        store(dtype, (char *)to + n * (int64_t)dtype_size(dtype), random_signed(&rng) * (n % 7 == 0 ? 0x1p-127 : n % 31 == 0 ? 0 : 1));
}

static void check_mix(const fa_ukernel *uk) {
    for (size_t e = 0; e < COUNT(edges) * COUNT(dtypes); e++) {
        const fastattn_dtype dtype = dtypes[e % COUNT(dtypes)];
        const int64_t dim = edges[e / COUNT(dtypes)], item = (int64_t)dtype_size(dtype), parts = 1 + (int64_t)e % 3;
        const int64_t rows = 1 + (int64_t)(e * 7 % FA_ROW_STEP);
        const float *const weights = random_floats("weights", parts * FA_ROW_STEP, 1);
        const void *rows_of[3];
        context("mix %lld parts of %lld x %lld of dtype %d", (long long)parts, (long long)rows, (long long)dim, (int)dtype);
        for (int64_t n = 0; n < parts; n++) {
            void *part = guard_input("part", (size_t)(rows * dim * item), (size_t)item, n % 2 ? GUARD_BEFORE : GUARD_BEHIND);
            fill_any_size(part, rows * dim, dtype);
            rows_of[n] = part;
        }
        char *out = guard_output("out", (size_t)(rows * dim * item), (size_t)item, e % 2 ? GUARD_BEFORE : GUARD_BEHIND);
        guard_seal();
        CHECK(uk->mix(out, weights, rows_of, parts, rows, dim, dtype) == 1, "finite numbers");
        for (int64_t i = 0; i < rows * dim; i++) {
            float sum = 0; /* by fused operations, as lanes do; portable ones may not */
            double wanted, magnitude = 0;
            for (int64_t n = 0; n < parts; n++) {
                const float x = (float)load(dtype, (const char *)rows_of[n] + i * item), weight = weights[n * FA_ROW_STEP + i / dim];
                sum = fused(weight, x, sum);
                magnitude += fabs((double)weight * x);
            }
            store(dtype, &wanted, sum);
            const double ulp = uk->products->isa == FASTATTN_ISA_PORTABLE || uk->products->isa == FASTATTN_ISA_WASM ? magnitude * 0x1p-8 : 0;
            check_close("out", i / dim, i % dim, load(dtype, out + i * item), load(dtype, &wanted), ulp);
        }
        guard_check();
        guard_release();
    }
}

static void check_rotate(const fa_ukernel *uk) {
    for (size_t e = 0; e < COUNT(edges) * COUNT(dtypes) * 4; e++) {
        const fastattn_dtype dtype = dtypes[e % COUNT(dtypes)];
        const int64_t item = (int64_t)dtype_size(dtype), pairs = edges[e / COUNT(dtypes) / 4], dim = 2 * pairs + (int64_t)e % 2;
        const int64_t heads = 1 + (int64_t)e % 9, rows = 2, count = heads * rows * dim;
        const int interleaved = (int)(e / COUNT(dtypes) % 2), in_place = (int)(e / COUNT(dtypes) / 2 % 2);
        context("rotate %lld heads, %lld pairs, dtype %d, interleaved %d, in place %d", (long long)heads, (long long)pairs, (int)dtype,
                interleaved, in_place);
        const float *const cosines = random_floats("cos", rows * pairs, 1), *const sines = random_floats("sin", rows * pairs, 1);
        char *x = guard_input("x", (size_t)(count * item), (size_t)item, GUARD_BEFORE);
        fill_any_size(x, count, dtype);
        char *out = guard_output("out", (size_t)(count * item), (size_t)item, GUARD_BEHIND);
        memcpy(out, x, (size_t)(count * item));
        guard_seal();
        const fa_rotation rotation = {.x = in_place ? out : x, .out = out, .cos = (const char *)cosines, .sin = (const char *)sines,
                                      .x_head = dim * item, .out_head = dim * item, .x_row = heads * dim * item,
                                      .out_row = heads * dim * item, .cos_row = 4 * pairs, .sin_row = 4 * pairs, .heads = heads,
                                      .rows = rows, .head_dim = dim, .pairs = pairs, .interleaved = interleaved, .dtype = dtype};
        uk->rotate(&rotation);
        for (int64_t row = 0; row < rows * heads; row++)
            for (int64_t n = 0; n < pairs; n++) {
                const int64_t first = row * dim + (interleaved ? 2 * n : n), second = interleaved ? first + 1 : first + pairs;
                const float a = (float)load(dtype, x + first * item), b = (float)load(dtype, x + second * item);
                const float c = cosines[row / heads * pairs + n], s = sines[row / heads * pairs + n];
                const volatile float bs = b * s, as = a * s;
                const double ulp = uk->products->isa == FASTATTN_ISA_PORTABLE || uk->products->isa == FASTATTN_ISA_WASM
                                       ? (fabs((double)a) + fabs((double)b)) * 0x1p-8 : 0;
                double wanted[2];
                store(dtype, &wanted[0], fused(a, c, -bs)), store(dtype, &wanted[1], fused(b, c, as));
                check_close("first", row, n, load(dtype, out + first * item), load(dtype, &wanted[0]), ulp);
                check_close("second", row, n, load(dtype, out + second * item), load(dtype, &wanted[1]), ulp);
            }
        guard_check();
        guard_release();
    }
}

/* Where the processor rounds, the table without that is there, too. */
#ifdef FA_HOLDS_AVX512_BF16
#define EACH_ROUNDING(check)                                                      \
    check(table());                                                               \
    if (test_isa == FASTATTN_ISA_AVX512) check(&fastattn_ukernel_avx512)
#else
#define EACH_ROUNDING(check) check(table())
#endif

TEST_EACH_ISA(slot_mix) {
    EACH_ROUNDING(check_mix);
}

TEST_EACH_ISA(slot_rotate) {
    EACH_ROUNDING(check_rotate);
}
