#include "problem.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BLANK_BYTE = 0x5A, GAP_BYTE = 0xFF /* a NaN in every float type */ };

/* Allocates an array of the given shape, sets its strides and returns the address of its first element. An output has a
 * block, which receives the allocation. */
static void *array_alloc(const char *name, const int64_t shape[4], fastattn_dtype dtype, enum layout layout,
                         int64_t strides[4], enum guard_side side, struct block *output) {
    static const int c_order[4] = {0, 1, 2, 3}, swapped[4] = {0, 2, 1, 3}, transposed[4] = {0, 1, 3, 2};
    const int *order = layout == SWAPPED ? swapped : layout == TRANSPOSED ? transposed : c_order;
    const int64_t item = (int64_t)dtype_size(dtype),
                  gap = layout == PADDED || layout == NEGATIVE || layout == BACKWARDS ? 3 : 0;
    const int same[4] = {layout == SAME_BATCH || layout == SAME_PLANE, layout == SAME_HEAD || layout == SAME_PLANE,
                         layout == SAME_ROW, layout == SAME_COLUMN};
    const int negative = layout == NEGATIVE ? 3 : layout == BACKWARDS ? 4 : 0;
    int64_t step = item, lowest = 0, highest = 0;
    int empty = 0;

    for (int n = 3; n >= 0; n--) {
        int axis = order[n];
        empty |= shape[axis] == 0;
        strides[axis] = same[axis] ? 0 : axis < negative ? -step : step;
        step *= same[axis] ? 1 : shape[axis] + (axis == 3 ? gap : 0);
        *(strides[axis] < 0 ? &lowest : &highest) += (shape[axis] - 1) * strides[axis];
    }
    size_t size = empty ? 0 : (size_t)(highest - lowest + item);
    char *start = (output ? guard_output : guard_input)(name, size, (size_t)item, side);
    memset(start, GAP_BYTE, size);
    if (output)
        *output = (struct block){start, size};
    return empty ? start : start - lowest;
}

static double uniform(struct rng *rng) { return (random_signed(rng) + 1) / 2; }

static void fill(void *base, const int64_t shape[4], const int64_t strides[4], fastattn_dtype dtype, double amplitude,
                 struct rng *rng) {
    for (int64_t b = 0; b < shape[0]; b++)
        for (int64_t h = 0; h < shape[1]; h++)
            for (int64_t i = 0; i < shape[2]; i++)
                for (int64_t j = 0; j < shape[3]; j++)
                    store(dtype, element(base, strides, dtype, b, h, i, j), amplitude * random_signed(rng));
}

static void build_mask(struct problem *problem, const struct spec *spec, struct rng *rng, enum guard_side side) {
    static const fastattn_dtype dtypes[] = {FASTATTN_BOOL,     FASTATTN_BOOL,    FASTATTN_FLOAT16,
                                            FASTATTN_BFLOAT16, FASTATTN_FLOAT32, FASTATTN_FLOAT64};
    fastattn_attention_args *a = &problem->args;
    const int64_t shape[4] = {a->batch, a->num_heads, a->q_len, a->kv_len};
    a->mask_dtype = dtypes[spec->mask];
    problem->mask = array_alloc("mask", shape, a->mask_dtype, spec->mask_layout, a->mask_strides, side, NULL);
    a->mask = problem->mask;
    for (int64_t b = 0; b < shape[0]; b++)
        for (int64_t h = 0; h < shape[1]; h++)
            for (int64_t i = 0; i < shape[2]; i++)
                for (int64_t j = 0; j < shape[3]; j++) {
                    int hide = uniform(rng) < spec->hidden;
                    double value = spec->mask == MASK_BOOL ? (hide ? 0 : (double)random_between(rng, 1, 255))
                                   : hide                  ? -(double)INFINITY
                                                           : 2 * random_signed(rng);
                    store(a->mask_dtype, mask_element(problem, b, h, i, j), value);
                }
}

static void build_blocks(struct problem *problem, const struct spec *spec, struct rng *rng, enum guard_side side) {
    const fastattn_attention_args *a = &problem->args;
    fastattn_block_mask *m = &problem->blocks;
    const int64_t rows = (a->q_len + spec->block_size - 1) / spec->block_size;
    const int64_t columns = (a->kv_len + spec->block_size - 1) / spec->block_size;
    const int64_t mask_bytes = spec->block_size * ((spec->block_size + 7) / 8);

    *m = (fastattn_block_mask){.size = sizeof *m, .block_size = spec->block_size};
    m->head_stride = spec->blocks_by_head ? rows : 0;
    m->batch_stride = spec->blocks_by_batch ? (spec->blocks_by_head ? a->num_heads * rows : rows) : 0;
    m->num_rows = rows * (spec->blocks_by_head ? a->num_heads : 1) * (spec->blocks_by_batch ? a->batch : 1);

    int32_t *indices = malloc((size_t)(m->num_rows * columns + 1) * sizeof *indices);
    int32_t *partial = malloc((size_t)(m->num_rows * columns + 1) * sizeof *partial);
    CHECK(indices && partial, "out of memory");
    int64_t count = 0;
    m->indptr = problem->indptr = guard_input("indptr", (size_t)(m->num_rows + 1) * 8, 8, side);
    for (int64_t row = 0; row < m->num_rows; row++) {
        problem->indptr[row] = count;
        for (int64_t column = 0; column < columns; column++)
            if (uniform(rng) < spec->blocks_density) {
                indices[count] = (int32_t)column;
                partial[count++] = spec->blocks_partial && uniform(rng) < 0.5 ? (int32_t)m->num_element_masks++ : -1;
            }
    }
    problem->indptr[m->num_rows] = count;
    m->indices = problem->indices = guard_input("indices", (size_t)count * 4, 4, side);
    memcpy(problem->indices, indices, (size_t)count * 4);
    if (spec->blocks_partial) {
        m->partial = problem->partial = guard_input("partial", (size_t)count * 4, 4, side);
        memcpy(problem->partial, partial, (size_t)count * 4);
        m->element_bits = problem->element_bits =
            guard_input("element_bits", (size_t)(m->num_element_masks * mask_bytes), 1, side);
        for (int64_t n = 0; n < m->num_element_masks * mask_bytes; n++)
            problem->element_bits[n] = (uint8_t)random_bits(rng);
    }
    free(indices);
    free(partial);
    problem->args.block_mask = m;
}

/* NaN or infinity in the rows of an array that no one may look at; arrays that repeat rows keep them. */
static void spoil(void *array, const int64_t strides[3], fastattn_dtype dtype, int64_t dim, int64_t heads, int64_t b,
                  int64_t first, int64_t end, double value) {
    if (strides[2] == 0 || strides[0] == 0)
        return;
    for (int64_t h = 0; h < heads; h++)
        for (int64_t j = first; j < end; j++)
            for (int64_t d = 0; d < dim; d++)
                store(dtype, element(array, strides, dtype, b, h, j, d), value);
}

static void build_lengths(struct problem *problem, const struct spec *spec, struct rng *rng, enum guard_side side) {
    fastattn_attention_args *a = &problem->args;
    const size_t bytes = (size_t)a->batch * 8;
    a->kv_lengths = problem->kv_lengths = guard_input("kv_lengths", bytes, 8, side);
    if (spec->lengths == LENGTHS_RAGGED) {
        a->kv_starts = problem->kv_starts = guard_input("kv_starts", bytes, 8, side);
        a->q_lengths = problem->q_lengths = guard_input("q_lengths", bytes, 8, side);
    }
    for (int64_t b = 0; b < a->batch; b++) {
        const int64_t length = random_between(rng, 0, 9) ? random_between(rng, 0, a->kv_len) : 0;
        problem->kv_lengths[b] = length;
        spoil(problem->k, a->k_strides, a->kv_dtype, a->head_dim, a->num_kv_heads, b, length, a->kv_len, NAN);
        spoil(problem->v, a->v_strides, a->kv_dtype, a->v_head_dim, a->num_kv_heads, b, length, a->kv_len, INFINITY);
        if (spec->lengths != LENGTHS_RAGGED)
            continue;
        problem->kv_starts[b] = random_between(rng, 0, 3) ? random_between(rng, 0, length / 2) : length;
        problem->q_lengths[b] = random_between(rng, 0, 5) ? random_between(rng, 0, a->q_len) : 0;
        spoil(problem->k, a->k_strides, a->kv_dtype, a->head_dim, a->num_kv_heads, b, 0, problem->kv_starts[b], NAN);
        spoil(problem->v, a->v_strides, a->kv_dtype, a->v_head_dim, a->num_kv_heads, b, 0, problem->kv_starts[b], NAN);
        spoil(problem->q, a->q_strides, a->q_dtype, a->head_dim, a->num_heads, b, problem->q_lengths[b], a->q_len, NAN);
    }
}

void problem_build(struct problem *problem, const struct spec *spec, uint64_t seed, enum guard_side side) {
    struct rng rng = {seed};
    int64_t strides[4];
    *problem = (struct problem){.args = FASTATTN_ATTENTION_ARGS_INIT};
    fastattn_attention_args *a = &problem->args;

    a->batch = spec->batch ? spec->batch : 1;
    a->num_heads = spec->heads ? spec->heads : 1;
    a->num_kv_heads = spec->kv_heads ? spec->kv_heads : 1;
    a->q_len = spec->q_len;
    a->kv_len = spec->kv_len;
    a->head_dim = spec->head_dim;
    a->v_head_dim = spec->v_head_dim ? spec->v_head_dim : spec->head_dim;
    a->q_dtype = spec->q_dtype;
    a->kv_dtype = spec->kv_dtype;
    a->scale = a->head_dim ? (float)(1 / sqrt((double)a->head_dim)) : 1;
    a->softcap = spec->softcap;
    a->precision = spec->precision;
    a->causal = spec->causal;
    if (spec->windowed) {
        a->window_left = spec->window_left;
        a->window_right = spec->window_right;
    }
    a->isa = test_isa;
    a->num_threads = spec->num_threads;
    a->invariant = spec->invariant;

    const double amplitude = spec->amplitude != 0 ? spec->amplitude : 1;
    const int64_t q_shape[4] = {a->batch, a->num_heads, a->q_len, a->head_dim};
    a->q = problem->q = array_alloc("q", q_shape, a->q_dtype, spec->q_layout, strides, side, NULL);
    memcpy(a->q_strides, strides, sizeof a->q_strides);
    fill(problem->q, q_shape, strides, a->q_dtype, amplitude, &rng);

    const int64_t k_shape[4] = {a->batch, a->num_kv_heads, a->kv_len, a->head_dim};
    a->k = problem->k = array_alloc("k", k_shape, a->kv_dtype, spec->k_layout, strides, side, NULL);
    memcpy(a->k_strides, strides, sizeof a->k_strides);
    fill(problem->k, k_shape, strides, a->kv_dtype, amplitude, &rng);

    const int64_t v_shape[4] = {a->batch, a->num_kv_heads, a->kv_len, a->v_head_dim};
    a->v = problem->v = array_alloc("v", v_shape, a->kv_dtype, spec->v_layout, strides, side, NULL);
    memcpy(a->v_strides, strides, sizeof a->v_strides);
    fill(problem->v, v_shape, strides, a->kv_dtype, 1, &rng);

    const int64_t out_shape[4] = {a->batch, a->num_heads, a->q_len, a->v_head_dim};
    a->out = array_alloc("out", out_shape, a->q_dtype, spec->out_layout, strides, side, &problem->out);
    memcpy(a->out_strides, strides, sizeof a->out_strides);
    if (!spec->no_lse) {
        const int64_t lse_shape[4] = {a->batch, a->num_heads, a->q_len, 1};
        a->lse = array_alloc("lse", lse_shape, FASTATTN_FLOAT32, spec->out_layout, strides, side, &problem->lse);
        memcpy(a->lse_strides, strides, sizeof a->lse_strides);
    }

    if (spec->offset != OFFSET_DEFAULT) {
        a->query_offset = problem->query_offset = guard_input("query_offset", (size_t)a->batch * 8, 8, side);
        for (int64_t b = 0; b < a->batch; b++)
            problem->query_offset[b] =
                spec->offset == OFFSET_ZERO ? 0 : random_between(&rng, -a->q_len / 2 - 1, a->kv_len);
    }
    if (spec->lengths != LENGTHS_FULL)
        build_lengths(problem, spec, &rng, side);
    if (spec->mask != MASK_NONE)
        build_mask(problem, spec, &rng, side);
    if (spec->alibi != ALIBI_NONE) {
        const int64_t batches = spec->alibi == ALIBI_ALL ? a->batch : 1;
        a->alibi_slopes = problem->alibi_slopes =
            guard_input("alibi_slopes", (size_t)(batches * a->num_heads) * 4, 4, side);
        a->alibi_strides[0] = batches > 1 ? a->num_heads * 4 : 0;
        a->alibi_strides[1] = 4;
        for (int64_t n = 0; n < batches * a->num_heads; n++)
            problem->alibi_slopes[n] = (float)(0.2 * random_signed(&rng));
    }
    if (spec->sinks) {
        a->sinks = problem->sinks = guard_input("sinks", (size_t)a->num_heads * 4, 4, side);
        for (int64_t h = 0; h < a->num_heads; h++)
            problem->sinks[h] = (float)(3 * random_signed(&rng));
    }
    if (spec->block_size)
        build_blocks(problem, spec, &rng, side);
    problem_blank(problem);
}

void *mask_element(const struct problem *problem, int64_t b, int64_t h, int64_t i, int64_t j) {
    const int64_t *strides = problem->args.mask_strides;
    return (char *)problem->mask + b * strides[0] + h * strides[1] + i * strides[2] + j * strides[3];
}

void problem_seal(struct problem *problem, enum guard_side side) {
    const fastattn_attention_args *a = &problem->args;
    problem->workspace_size = fastattn_workspace_size(a);
    problem->workspace = guard_output("workspace", problem->workspace_size, 64, side);
    guard_seal();
}

void problem_blank(const struct problem *problem) {
    memset(problem->out.memory, BLANK_BYTE, problem->out.size);
    if (problem->lse.memory)
        memset(problem->lse.memory, BLANK_BYTE, problem->lse.size);
}

static void check_blank(const char *name, const uint8_t *memory, size_t size, const uint8_t *owned) {
    for (size_t n = 0; n < size; n++)
        CHECK((owned && owned[n]) || memory[n] == BLANK_BYTE, "byte %zu of %s was written", n, name);
}

void problem_untouched(const struct problem *problem) {
    check_blank("out", problem->out.memory, problem->out.size, NULL);
    if (problem->lse.memory)
        check_blank("lse", problem->lse.memory, problem->lse.size, NULL);
}

static void compare(const char *what, double got, double wanted, double tolerance, int64_t b, int64_t h, int64_t i,
                    int64_t d) {
    int right = isnan(wanted) ? isnan(got) : isinf(wanted) ? got == wanted : fabs(got - wanted) <= tolerance;
    CHECK(right, "%s[%lld,%lld,%lld,%lld] is %.9g, should be %.9g within %.2g", what, (long long)b, (long long)h,
          (long long)i, (long long)d, got, wanted, tolerance);
}

void problem_verify(const struct problem *problem, double slack) {
    const fastattn_attention_args *a = &problem->args;
    const size_t item = dtype_size(a->q_dtype);
    const struct rounding rounding = oracle_rounding(a);
    struct oracle_row row = {0};
    row.out = malloc((size_t)(a->v_head_dim + 1) * sizeof *row.out);
    row.out_tolerance = malloc((size_t)(a->v_head_dim + 1) * sizeof *row.out_tolerance);
    uint8_t *out_owned = calloc(problem->out.size + 1, 1), *lse_owned = calloc(problem->lse.size + 1, 1);
    CHECK(row.out && row.out_tolerance && out_owned && lse_owned, "out of memory");

    guard_check();
    for (int64_t b = 0; b < a->batch; b++)
        for (int64_t h = 0; h < a->num_heads; h++)
            for (int64_t i = 0; i < a->q_len; i++) {
                oracle_row(a, b, h, i, rounding, &row);
                for (int64_t d = 0; d < a->v_head_dim; d++) {
                    const char *address = element(a->out, a->out_strides, a->q_dtype, b, h, i, d);
                    memset(out_owned + (address - (char *)problem->out.memory), 1, item);
                    compare("out", load(a->q_dtype, address), row.out[d], slack * row.out_tolerance[d], b, h, i, d);
                }
                if (a->lse) {
                    const char *address = element(a->lse, a->lse_strides, FASTATTN_FLOAT32, b, h, i, 0);
                    memset(lse_owned + (address - (char *)problem->lse.memory), 1, 4);
                    double lse = load(FASTATTN_FLOAT32, address);
                    if (!(isnan(row.lse) && isinf(lse))) /* of infinite scores either may come */
                        compare("lse", lse, row.lse, slack * row.lse_tolerance, b, h, i, 0);
                }
            }
    check_blank("out", problem->out.memory, problem->out.size, out_owned);
    if (problem->lse.memory)
        check_blank("lse", problem->lse.memory, problem->lse.size, lse_owned);
    free(row.out);
    free(row.out_tolerance);
    free(out_owned);
    free(lse_owned);
}

void problem_check(struct problem *problem, enum guard_side side) {
    problem_seal(problem, side);
    CHECK_STATUS(fastattn_attention(&problem->args, problem->workspace, problem->workspace_size), FASTATTN_OK);
    problem_verify(problem, 1);
}

void problem_ends_with(const struct problem *problem, int status, const char *what) {
    fastattn_plan_info info = {.size = sizeof info};
    context("%s", what);
    guard_seal();
    CHECK_STATUS(fastattn_attention(&problem->args, NULL, 0), (fastattn_status)status);
    CHECK_STATUS(fastattn_explain(&problem->args, &info), (fastattn_status)status);
    CHECK(status == FASTATTN_OK || fastattn_workspace_size(&problem->args) == 0, "invalid arguments have a workspace");
    if (status != FASTATTN_OK) problem_untouched(problem);
    guard_check();
    guard_release();
}

uint8_t *problem_snapshot(const struct problem *problem) {
    uint8_t *copy = malloc(problem->out.size + problem->lse.size + 1);
    CHECK(copy != NULL, "out of memory");
    memcpy(copy, problem->out.memory, problem->out.size);
    if (problem->lse.memory)
        memcpy(copy + problem->out.size, problem->lse.memory, problem->lse.size);
    return copy;
}

int problem_equals(const struct problem *problem, const uint8_t *snapshot) {
    return memcmp(snapshot, problem->out.memory, problem->out.size) == 0 &&
           (!problem->lse.memory || memcmp(snapshot + problem->out.size, problem->lse.memory, problem->lse.size) == 0);
}

void spec_context(const struct spec *s, uint64_t seed) {
    context(
        "%s seed %llu: B%lld H%lld/%lld L%lld/%lld D%lld/%lld dtype %d/%d layout %d %d %d %d prec %d cap %g causal %d "
        "window %d:%lld,%lld offset %d lengths %d mask %d/%d alibi %d sinks %d blocks %lld/%d/%d/%d threads %d invariant %d",
        s->name ? s->name : "case", (unsigned long long)seed, (long long)s->batch, (long long)s->heads,
        (long long)s->kv_heads, (long long)s->q_len, (long long)s->kv_len, (long long)s->head_dim,
        (long long)s->v_head_dim, s->q_dtype, s->kv_dtype, s->q_layout, s->k_layout, s->v_layout, s->out_layout,
        s->precision, (double)s->softcap, s->causal, s->windowed, (long long)s->window_left, (long long)s->window_right,
        s->offset, s->lengths, s->mask, s->mask_layout, s->alibi, s->sinks, (long long)s->block_size, s->blocks_partial,
        s->blocks_by_batch, s->blocks_by_head, s->num_threads, s->invariant);
}

void spec_check(const struct spec *spec, uint64_t seed) {
    struct problem problem;
    spec_context(spec, seed);
    problem_build(&problem, spec, seed, GUARD_BEHIND);
    problem_check(&problem, GUARD_BEHIND);
    uint8_t *bits = problem_snapshot(&problem);
    guard_release();

    problem_build(&problem, spec, seed, GUARD_BEFORE);
    problem_seal(&problem, GUARD_BEFORE);
    CHECK_STATUS(fastattn_attention(&problem.args, problem.workspace, problem.workspace_size), FASTATTN_OK);
    guard_check();
    CHECK(problem_equals(&problem, bits), "the result depends on where the buffers lie");
    guard_release();
    free(bits);
}

struct spec spec_random(struct rng *rng) {
    static const int lengths[] = {1,  1,  2,  3,  4,  5,  7,  8,  9,  15,  16,  17,
                                  23, 31, 32, 33, 47, 63, 64, 65, 96, 100, 127, 129};
    static const int dims[] = {1, 2, 3, 4, 7, 8, 12, 15, 16, 17, 24, 31, 32, 33, 40, 48, 64, 65, 80, 96, 128};
    static const int blocks[] = {16, 17, 20, 24, 32, 48};
    static const fastattn_dtype pairs[][2] = {{FASTATTN_FLOAT32, FASTATTN_FLOAT32},
                                              {FASTATTN_FLOAT16, FASTATTN_FLOAT16},
                                              {FASTATTN_BFLOAT16, FASTATTN_BFLOAT16},
                                              {FASTATTN_FLOAT32, FASTATTN_FLOAT16},
                                              {FASTATTN_FLOAT32, FASTATTN_BFLOAT16}};
#define PICK(array) array[random_between(rng, 0, (int64_t)COUNT(array) - 1)]
#define ONE_IN(n) (random_between(rng, 1, n) == 1)
    struct spec s = {.name = "random"};
    const fastattn_dtype *pair = PICK(pairs);
    s.batch = random_between(rng, 1, 3);
    s.kv_heads = random_between(rng, 1, 2);
    s.heads = s.kv_heads * (ONE_IN(2) ? 1 : random_between(rng, 1, 5));
    s.q_len = PICK(lengths);
    s.kv_len = PICK(lengths);
    s.head_dim = PICK(dims);
    s.v_head_dim = ONE_IN(3) ? PICK(dims) : s.head_dim;
    s.q_dtype = pair[0];
    s.kv_dtype = pair[1];
    s.q_layout = (enum layout)random_between(rng, 0, LAST_VECTOR_LAYOUT);
    s.k_layout = (enum layout)random_between(rng, 0, LAST_VECTOR_LAYOUT);
    s.v_layout = (enum layout)random_between(rng, 0, LAST_VECTOR_LAYOUT);
    s.out_layout = (enum layout)random_between(rng, 0, NEGATIVE);
    s.amplitude = ONE_IN(4) ? 4 : 1;
    s.precision = ONE_IN(4) ? (fastattn_precision)random_between(rng, 0, 2) : FASTATTN_PRECISION_HIGHEST;
    s.softcap = ONE_IN(5) ? 2.5f : 0;
    s.causal = ONE_IN(3);
    s.windowed = ONE_IN(4);
    s.window_left = random_between(rng, -1, 40);
    s.window_right = random_between(rng, -1, 20);
    s.offset = random_between(rng, 0, 2);
    s.lengths = ONE_IN(3) ? random_between(rng, 1, LENGTHS_RAGGED) : LENGTHS_FULL;
    s.mask = ONE_IN(2) ? random_between(rng, 1, MASK_FLOAT64) : MASK_NONE;
    s.mask_layout = (enum layout)random_between(rng, 0, LAST_LAYOUT);
    s.hidden = ONE_IN(3) ? 0.95 : 0.3;
    s.alibi = ONE_IN(4) ? random_between(rng, 1, ALIBI_ALL) : ALIBI_NONE;
    s.sinks = ONE_IN(4);
    s.no_lse = ONE_IN(4);
    s.block_size = ONE_IN(4) ? PICK(blocks) : 0;
    s.blocks_partial = ONE_IN(2);
    s.blocks_by_batch = ONE_IN(2);
    s.blocks_by_head = ONE_IN(2);
    s.blocks_density = ONE_IN(3) ? 0.2 : 0.6;
    s.num_threads = (int)random_between(rng, 0, 3);
    s.invariant = ONE_IN(3);
    return s;
#undef PICK
#undef ONE_IN
}
