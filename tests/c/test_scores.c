/* Other scores and other weights: additive scores, functions of the caller's, and what is not a softmax, between guard pages. */
#include "problem.h"

#include <math.h>
#include <string.h>

/* Anything that depends on all that it is given. */
static void changed(float *scores, int64_t keys, int64_t batch, int64_t head, int64_t query, int64_t first_key, void *context) {
    const float slope = *(const float *)context;
    for (int64_t n = 0; n < keys; n++)
        scores[n] = 0.75f * scores[n] + slope * (float)(head - batch) - 0.01f * (float)(query - first_key - n);
}

/* Weights of additive scores. */
static void make_additive(struct problem *problem, uint64_t seed, enum guard_side side) {
    fastattn_attention_args *a = &problem->args;
    struct rng rng = {seed};
    const int64_t heads = a->num_heads, dim = a->head_dim;
    float *weights = guard_input("additive", (size_t)(heads * dim) * sizeof *weights, 4, side);
    for (int64_t n = 0; n < heads * dim; n++) weights[n] = (float)random_signed(&rng);
    a->additive = weights;
    a->additive_stride = dim * 4;
}

/* A problem of a spec, changed in the ways that the bits of `how` ask for. */
enum { ADDITIVE = 1, FUNCTION = 2, WITH_BIAS = 4, ACTIVATIONS = 8 };

static void check_changed(struct spec spec, unsigned how, uint64_t seed) {
    static float slope = 0.3f;
    static float bias[64];
    const fastattn_activation activation = (fastattn_activation)(how / ACTIVATIONS % 4);
    if (activation != FASTATTN_SOFTMAX) spec.sinks = 0, spec.no_lse = 1;
    for (int side = 0; side < 2; side++) {
        struct problem problem;
        spec_context(&spec, seed);
        problem_build(&problem, &spec, seed, (enum guard_side)side);
        if (how & ADDITIVE) make_additive(&problem, seed, (enum guard_side)side);
        if (how & FUNCTION) problem.args.score_function = changed, problem.args.score_context = &slope;
        problem.args.activation = activation;
        problem.args.power = 1 + (int)(seed % 4);
        for (int64_t b = 0; b < 64; b++) bias[b] = -0.1f * (float)b;
        if (how & WITH_BIAS && activation == FASTATTN_SIGMOID && problem.args.batch <= 64) problem.args.activation_bias = bias;
        problem_check(&problem, (enum guard_side)side);
        guard_release();
    }
}

TEST_EACH_ISA(scores_additive_functions_and_activations) {
    static const struct spec specs[] = {
        {.name = "one row", .heads = 4, .kv_heads = 2, .q_len = 1, .kv_len = 70, .head_dim = 20},
        {.name = "few rows", .heads = 4, .kv_heads = 2, .q_len = 5, .kv_len = 61, .head_dim = 17, .causal = 1},
        {.name = "a panel", .heads = 2, .q_len = 70, .kv_len = 90, .head_dim = 20, .v_head_dim = 9, .mask = MASK_FLOAT32, .hidden = 0.4},
        {.name = "split", .heads = 2, .q_len = 2, .kv_len = 2100, .head_dim = 5, .windowed = 1, .window_left = 1500, .window_right = 3},
        {.name = "blocks", .q_len = 60, .kv_len = 90, .head_dim = 20, .block_size = 20, .blocks_density = 0.7, .blocks_partial = 1},
        {.name = "ragged", .batch = 3, .heads = 2, .q_len = 40, .kv_len = 90, .head_dim = 20, .lengths = LENGTHS_RAGGED, .softcap = 2},
        {.name = "halves", .heads = 2, .q_len = 40, .kv_len = 90, .head_dim = 20, .q_dtype = FASTATTN_FLOAT16,
         .kv_dtype = FASTATTN_FLOAT16, .alibi = ALIBI_HEADS},
        {.name = "bfloat16", .heads = 2, .q_len = 40, .kv_len = 90, .head_dim = 20, .q_dtype = FASTATTN_BFLOAT16,
         .kv_dtype = FASTATTN_BFLOAT16, .mask = MASK_BOOL, .hidden = 0.3},
        {.name = "no numbers", .q_len = 20, .kv_len = 30, .head_dim = 0, .v_head_dim = 4},
    };
    for (size_t n = 0; n < COUNT(specs); n++)
        for (unsigned how = 1; how < 4 * ACTIVATIONS; how++) check_changed(specs[n], how, n + how);
}

TEST_EACH_ISA(scores_of_random_problems) {
    struct rng rng = {2024};
    for (int n = 0; n < 3 * test_effort; n++) {
        const struct spec spec = spec_random(&rng);
        check_changed(spec, 1 + (unsigned)(random_bits(&rng) % (4 * ACTIVATIONS - 1)), (uint64_t)n);
    }
}

/* tanh, by the lse of one key of 0: to six units in the last place, for one row and for many. */
TEST_EACH_ISA(scores_tanh) {
    enum { ROWS = 4096 };
    static float q[2 * ROWS], lse[2 * ROWS], out[2 * ROWS];
    const float zero = 0, one = 1;
    for (int n = 0; n < ROWS; n++) {
        q[n] = n < ROWS / 2 ? ldexpf(1.0f + (float)(n % 16) / 16, n / 16 - 120) : 10.0f * (float)(n - ROWS / 2) / (ROWS / 2);
        q[ROWS + n] = -q[n];
    }
    for (int many = 0; many < 2; many++) {
        fastattn_attention_args a = FASTATTN_ATTENTION_ARGS_INIT;
        a.batch = many ? 1 : 2 * ROWS, a.q_len = many ? 2 * ROWS : 1;
        a.num_heads = a.num_kv_heads = a.kv_len = a.head_dim = a.v_head_dim = 1;
        a.q = q, a.k = a.v = &zero, a.out = out, a.lse = lse, a.additive = &one, a.scale = 1, a.isa = test_isa;
        a.q_strides[0] = a.out_strides[0] = a.lse_strides[0] = a.q_strides[2] = a.out_strides[2] = a.lse_strides[2] = 4;
        CHECK_STATUS(fastattn_attention(&a, NULL, 0), FASTATTN_OK);
        for (int n = 0; n < 2 * ROWS; n++) {
            const double exact = tanh((double)q[n]), ulp = ldexp(1.0, ilogb(exact == 0 ? 0x1p-126 : exact) - 23);
            CHECK(fabs(lse[n] - exact) <= 6 * ulp, "tanh(%.9g) is %.9g, should be %.9g", (double)q[n], (double)lse[n], exact);
        }
    }
}

/* Luong's local attention around predicted positions, as docs/scores.md says how. */
struct around {
    const double *position;
    double reach;
    int with_gaussian;
};

static double gaussian(const struct around *c, int64_t query, int64_t key) {
    const double away = ((double)key - c->position[query]) / c->reach;
    return fabs(away) > 1 ? -(double)INFINITY : -2 * away * away;
}

static void local(float *scores, int64_t keys, int64_t batch, int64_t head, int64_t query, int64_t first_key, void *context) {
    const struct around *c = context;
    (void)batch, (void)head;
    for (int64_t n = 0; n < keys; n++) {
        const double added = gaussian(c, query, first_key + n);
        scores[n] += c->with_gaussian || added == -(double)INFINITY ? (float)added : 0.0f;
    }
}

TEST_EACH_ISA(scores_of_luong) {
    enum { ROWS = 19, KEYS = 50, DIM = 8 };
    static float q[ROWS * DIM], k[KEYS * DIM], v[KEYS * DIM], out[ROWS * DIM], lse[2][ROWS];
    double position[ROWS];
    struct rng rng = {7};
    for (int n = 0; n < ROWS * DIM; n++) q[n] = (float)random_signed(&rng);
    for (int n = 0; n < KEYS * DIM; n++) k[n] = (float)random_signed(&rng), v[n] = (float)random_signed(&rng);
    for (int i = 0; i < ROWS; i++) position[i] = KEYS * (0.5 + 0.5 * random_signed(&rng));
    struct around context = {position, 4, 0};
    fastattn_attention_args a = FASTATTN_ATTENTION_ARGS_INIT;
    a.batch = a.num_heads = a.num_kv_heads = 1, a.q_len = ROWS, a.kv_len = KEYS, a.head_dim = a.v_head_dim = DIM;
    a.q = q, a.k = k, a.v = v, a.out = out, a.scale = 1, a.isa = test_isa;
    a.q_strides[2] = a.k_strides[2] = a.v_strides[2] = a.out_strides[2] = DIM * 4, a.lse_strides[2] = 4;
    a.score_function = local, a.score_context = &context;
    for (context.with_gaussian = 0; context.with_gaussian < 2; context.with_gaussian++) {
        a.lse = lse[context.with_gaussian];
        CHECK_STATUS(fastattn_attention(&a, NULL, 0), FASTATTN_OK);
    }
    for (int i = 0; i < ROWS; i++) {
        double weights = 0, sums[DIM] = {0};
        for (int j = 0; j < KEYS; j++) {
            const double added = gaussian(&context, i, j);
            double s = 0;
            for (int d = 0; d < DIM; d++) s += (double)q[i * DIM + d] * (double)k[j * DIM + d];
            if (added > -(double)INFINITY) weights += exp(s);
            for (int d = 0; d < DIM; d++) sums[d] += exp(s + added) * (double)v[j * DIM + d];
        }
        for (int d = 0; d < DIM; d++) {
            const double found = (double)out[i * DIM + d] * exp((double)lse[1][i] - (double)lse[0][i]);
            CHECK(fabs(found - sums[d] / weights) < 1e-5, "row %d is %.9g, should be %.9g", i, found, sums[d] / weights);
        }
    }
}
