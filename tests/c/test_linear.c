/* fastattn_linear_attention against its recurrence in double precision, between guard pages, and its errors. */
#include "problem.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { DECAY_NONE, DECAY_SCALAR, DECAY_ROWS, DECAY_LOG };

struct linear {
    fastattn_linear_args args;
    double *out, *state; /* what they should be */
};

static void *numbers(const char *name, int64_t count, fastattn_dtype dtype, double low, double high, struct rng *rng, enum guard_side side) {
    const int64_t item = (int64_t)dtype_size(dtype);
    char *x = guard_input(name, (size_t)(count * item), (size_t)item, side);
    for (int64_t n = 0; n < count; n++) store(dtype, x + n * item, low + (high - low) * 0.5 * (1 + random_signed(rng)));
    return x;
}

static void packed(int64_t *strides, int64_t heads, int64_t rows, int64_t bytes) {
    strides[2] = bytes;
    strides[1] = rows * bytes;
    strides[0] = heads * rows * bytes;
}

static double at(const void *x, const int64_t *strides, int64_t b, int64_t h, int64_t t, int64_t d, fastattn_dtype dtype) {
    return load(dtype, (const char *)x + b * strides[0] + h * strides[1] + t * strides[2] + d * (int64_t)dtype_size(dtype));
}

static void linear_build(struct linear *x, int64_t length, int64_t dim, int64_t columns, int decay, int delta, int normalize,
                         fastattn_dtype dtype, struct rng *rng, enum guard_side side) {
    const int64_t batch = 1, states = 2, heads = 4, item = (int64_t)dtype_size(dtype), wide = columns + normalize;
    const fastattn_linear_args initial = FASTATTN_LINEAR_ARGS_INIT;
    fastattn_linear_args *a = &x->args;
    *a = initial;
    a->batch = batch, a->num_q_heads = heads, a->num_k_heads = a->num_v_heads = states;
    a->q_len = a->kv_len = length, a->head_dim = dim, a->v_head_dim = columns;
    a->q_dtype = a->kv_dtype = dtype;
    const double size = normalize ? 1 : 0.5 / sqrt((double)dim);
    a->q = numbers("q", batch * heads * length * dim, dtype, normalize ? 0 : -1, 1, rng, side);
    a->k = numbers("k", batch * states * length * dim, dtype, normalize ? 0 : -size, size, rng, side);
    a->v = numbers("v", batch * states * length * columns, dtype, -1, 1, rng, side);
    a->out = guard_output("out", (size_t)(batch * heads * length * columns * item), (size_t)item, side);
    packed(a->q_strides, heads, length, dim * item);
    packed(a->k_strides, states, length, dim * item);
    packed(a->v_strides, states, length, columns * item);
    packed(a->out_strides, heads, length, columns * item);
    if (decay != DECAY_NONE) {
        a->decay_rows = decay == DECAY_ROWS;
        a->decay_log = decay == DECAY_LOG;
        const int64_t each = a->decay_rows ? dim : 1;
        a->decay = numbers("decay", batch * states * length * each, dtype, a->decay_log ? -2 : 0, a->decay_log ? 0 : 1, rng, side);
        a->decay_dtype = dtype;
        packed(a->decay_strides, states, length, each * item);
    }
    if (delta) {
        a->beta = numbers("beta", batch * states * length, dtype, 0, 1, rng, side);
        a->beta_dtype = dtype;
        packed(a->beta_strides, states, length, item);
    }
    a->state = numbers("state", batch * states * dim * wide, FASTATTN_FLOAT32, 0, 1, rng, side);
    a->new_state = guard_output("new_state", (size_t)(batch * states * dim * wide) * 4, 4, side);
    packed(a->state_strides, states, dim, wide * 4);
    packed(a->new_state_strides, states, dim, wide * 4);
    a->scale = 0.5f;
    a->normalize = normalize;
    a->isa = test_isa;
    a->num_threads = 2;
}

/* Token by token. */
static void linear_verify(const struct linear *x) {
    const fastattn_linear_args *a = &x->args;
    const int64_t dim = a->head_dim, columns = a->v_head_dim, wide = columns + a->normalize;
    const double rounding = a->q_dtype == FASTATTN_FLOAT32 ? 0 : a->q_dtype == FASTATTN_FLOAT16 ? 0x1p-11 : 0x1p-8;
    double *s = malloc((size_t)(dim * wide + 1) * sizeof *s), *u = malloc((size_t)(wide + 1) * sizeof *u);
    CHECK(s && u, "no memory");
    for (int64_t h = 0; h < a->num_k_heads; h++) {
        for (int64_t d = 0; d < dim; d++)
            for (int64_t e = 0; e < wide; e++) s[d * wide + e] = at(a->state, a->state_strides, 0, h, d, e, FASTATTN_FLOAT32);
        for (int64_t t = 0; t < a->kv_len; t++) {
            for (int64_t d = 0; d < dim && a->decay; d++) {
                double factor = at(a->decay, a->decay_strides, 0, h, t, a->decay_rows ? d : 0, a->decay_dtype);
                if (a->decay_log) factor = exp(factor);
                for (int64_t e = 0; e < wide; e++) s[d * wide + e] *= factor;
            }
            for (int64_t e = 0; e < wide; e++) {
                u[e] = e < columns ? at(a->v, a->v_strides, 0, h, t, e, a->kv_dtype) : 1;
                for (int64_t d = 0; d < dim && a->beta; d++) u[e] -= s[d * wide + e] * at(a->k, a->k_strides, 0, h, t, d, a->kv_dtype);
                if (a->beta) u[e] *= at(a->beta, a->beta_strides, 0, h, t, 0, a->beta_dtype);
            }
            for (int64_t d = 0; d < dim; d++)
                for (int64_t e = 0; e < wide; e++) s[d * wide + e] += at(a->k, a->k_strides, 0, h, t, d, a->kv_dtype) * u[e];
            for (int64_t head = 2 * h; head < 2 * h + 2; head++) {
                double divisor = a->normalize ? 0 : 1;
                for (int64_t d = 0; d < dim && a->normalize; d++)
                    divisor += 0.5 * at(a->q, a->q_strides, 0, head, t, d, a->q_dtype) * s[d * wide + columns];
                for (int64_t e = 0; e < columns; e++) {
                    double sum = 0, magnitude = 0;
                    for (int64_t d = 0; d < dim; d++) {
                        const double term = 0.5 * at(a->q, a->q_strides, 0, head, t, d, a->q_dtype) * s[d * wide + e];
                        sum += term;
                        magnitude += fabs(term);
                    }
                    sum = divisor == 0 ? 0 : sum / divisor;
                    const double got = at(a->out, a->out_strides, 0, head, t, e, a->q_dtype);
                    CHECK(fabs(got - sum) <= 2e-5 * (1 + magnitude / fmax(divisor, 1)) + rounding * fabs(sum), "out[%lld,%lld,%lld] is %.9g, should be %.9g",
                          (long long)head, (long long)t, (long long)e, got, sum);
                }
            }
        }
        for (int64_t d = 0; d < dim; d++)
            for (int64_t e = 0; e < wide; e++) {
                const double got = at(a->new_state, a->new_state_strides, 0, h, d, e, FASTATTN_FLOAT32), should = s[d * wide + e];
                CHECK(fabs(got - should) <= 2e-5 * (1 + fabs(should)), "state[%lld,%lld,%lld] is %.9g, should be %.9g", (long long)h,
                      (long long)d, (long long)e, got, should);
            }
    }
    free(s);
    free(u);
}

TEST_EACH_ISA(linear_follows_the_recurrence) {
    static const int64_t lengths[] = {1, 2, 5, 16, 17, 64, 65, 131}, dims[] = {1, 7, 16, 33}, columns[] = {1, 15, 16, 40, 64};
    static const fastattn_dtype dtypes[] = {FASTATTN_FLOAT32, FASTATTN_FLOAT16, FASTATTN_BFLOAT16};
    struct rng rng = {1};
    for (int n = 0; n < (test_effort >= 100 ? 240 : 60); n++) {
        struct linear x;
        const int decay = n % 4, delta = n / 4 % 2, normalize = !delta && n / 8 % 2;
        const int64_t length = lengths[n / 3 % 8], dim = dims[random_between(&rng, 0, 3)], wide = columns[random_between(&rng, 0, 4)];
        context("length %lld, %lld x %lld, decay %d, delta %d, normalize %d, dtype %d", (long long)length, (long long)dim,
                (long long)wide, decay, delta, normalize, n % 3);
        linear_build(&x, length, dim, wide, decay, delta, normalize, dtypes[n % 3], &rng, n % 2 ? GUARD_BEFORE : GUARD_BEHIND);
        const size_t size = fastattn_linear_workspace_size(&x.args);
        void *workspace = guard_output("workspace", size, 64, GUARD_BEFORE);
        guard_seal();
        const int before = allocation_count;
        CHECK_STATUS(fastattn_linear_attention(&x.args, workspace, size), FASTATTN_OK);
        CHECK(allocation_count == before || x.args.num_threads > 1, "memory was allocated beside the workspace");
        guard_check();
        linear_verify(&x);
        guard_release();
    }
}

TEST(linear_errors) {
    struct linear x;
    struct rng rng = {2};
    linear_build(&x, 20, 8, 16, DECAY_SCALAR, 1, 0, FASTATTN_FLOAT32, &rng, GUARD_BEHIND);
    const fastattn_linear_args good = x.args;
    float decays[40];
    int64_t table[] = {0, 3, 2};
#define REFUSED(change, status)                                        \
    do {                                                               \
        fastattn_linear_args a = good;                                 \
        change;                                                        \
        CHECK_STATUS(fastattn_linear_attention(&a, NULL, 0), status);  \
    } while (0)
    memset(decays, 0, sizeof decays);
    decays[39] = 1.0001f;
    REFUSED(a.decay = decays, FASTATTN_ERROR_DECAY);
    REFUSED((a.decay = decays, a.decay_log = 1), FASTATTN_ERROR_DECAY);
    REFUSED(a.size = 8, FASTATTN_ERROR_ARGUMENT);
    REFUSED(a.k = NULL, FASTATTN_ERROR_ARGUMENT);
    REFUSED(a.v = (const char *)a.v + 1, FASTATTN_ERROR_ARGUMENT);
    REFUSED(a.out_strides[2] = 0, FASTATTN_ERROR_ARGUMENT);
    REFUSED(a.causal = 0, FASTATTN_ERROR_ARGUMENT);
    REFUSED(a.normalize = 1, FASTATTN_ERROR_ARGUMENT);
    REFUSED(a.head_dim = -1, FASTATTN_ERROR_SHAPE);
    REFUSED(a.num_k_heads = 3, FASTATTN_ERROR_SHAPE);
    REFUSED(a.q_len = 19, FASTATTN_ERROR_SHAPE);
    REFUSED(a.q_dtype = FASTATTN_FLOAT16, FASTATTN_ERROR_DTYPE);
    REFUSED(a.beta_dtype = FASTATTN_FLOAT64, FASTATTN_ERROR_DTYPE);
    REFUSED(a.scale = NAN, FASTATTN_ERROR_SCALE);
    REFUSED((a.kv_lengths = table, table[0] = 21), FASTATTN_ERROR_KV_LENGTHS);
    REFUSED((a.cu_seqlens = table, a.batch = 2, table[0] = 0), FASTATTN_ERROR_SEQLENS);
    REFUSED(a.isa = (fastattn_isa)99, FASTATTN_ERROR_ISA);
    REFUSED(allocation_fails = 1, FASTATTN_ERROR_MEMORY);
    allocation_fails = 0;
#undef REFUSED
    fastattn_linear_args a;
    CHECK_STATUS(fastattn_linear_args_init(&a, sizeof a), FASTATTN_OK);
    CHECK_STATUS(fastattn_linear_attention(&a, NULL, 0), FASTATTN_ERROR_SCALE);
    CHECK_STATUS(fastattn_linear_args_init(&a, 3), FASTATTN_ERROR_ARGUMENT);
    CHECK_STATUS(fastattn_linear_attention(NULL, NULL, 0), FASTATTN_ERROR_ARGUMENT);
    char space[64];
    CHECK_STATUS(fastattn_linear_attention(&good, space, sizeof space), FASTATTN_ERROR_WORKSPACE);
    guard_check();
    guard_release();
}
