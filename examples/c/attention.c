/* Causal attention with grouped heads through the C library, checked against the formula.
 *
 *     cc attention.c $(pkg-config --cflags --libs fastattn) -lm -o attention
 *
 * Four query heads share two key/value heads; the last of 64 queries sees the last of 96 keys. */
#include <fastattn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { HEADS = 4, KV_HEADS = 2, QUERIES = 64, KEYS = 96, DIM = 80 };

static float q[HEADS][QUERIES][DIM], k[KV_HEADS][KEYS][DIM], v[KV_HEADS][KEYS][DIM], out[HEADS][QUERIES][DIM];

static void fill(float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] = (float)rand() / (float)RAND_MAX - 0.5f;
}

/* The largest error of one head, in double precision and straight from the definition. */
static double head_error(int h, float scale)
{
    const int g = h / (HEADS / KV_HEADS);
    double worst = 0;
    for (int i = 0; i < QUERIES; i++) {
        double weight[KEYS], total = 0;
        const int visible = i + (KEYS - QUERIES) + 1;
        for (int j = 0; j < visible; j++) {
            double score = 0;
            for (int d = 0; d < DIM; d++)
                score += (double)q[h][i][d] * k[g][j][d];
            weight[j] = exp(scale * score);
            total += weight[j];
        }
        for (int d = 0; d < DIM; d++) {
            double expected = 0;
            for (int j = 0; j < visible; j++)
                expected += weight[j] / total * v[g][j][d];
            worst = fmax(worst, fabs(expected - out[h][i][d]));
        }
    }
    return worst;
}

int main(void)
{
    fill(&q[0][0][0], sizeof q / sizeof(float));
    fill(&k[0][0][0], sizeof k / sizeof(float));
    fill(&v[0][0][0], sizeof v / sizeof(float));

    /* Strides are in bytes: batch, head, row. There is one batch entry, so its stride is never used. */
    fastattn_attention_args args = FASTATTN_ATTENTION_ARGS_INIT; /* whatever is optional is absent */
    args.batch = 1, args.num_heads = HEADS, args.num_kv_heads = KV_HEADS;
    args.q_len = QUERIES, args.kv_len = KEYS, args.head_dim = args.v_head_dim = DIM;
    args.q = q, args.q_strides[1] = sizeof q[0], args.q_strides[2] = sizeof q[0][0];
    args.k = k, args.k_strides[1] = sizeof k[0], args.k_strides[2] = sizeof k[0][0];
    args.v = v, args.v_strides[1] = sizeof v[0], args.v_strides[2] = sizeof v[0][0];
    args.out = out, args.out_strides[1] = sizeof out[0], args.out_strides[2] = sizeof out[0][0];
    args.scale = 1.0f / sqrtf(DIM), args.causal = 1, args.num_threads = 2;

    fastattn_plan_info plan = {.size = sizeof plan};
    fastattn_status status = fastattn_explain(&args, &plan);
    if (status == FASTATTN_OK)
        status = fastattn_attention(&args, NULL, 0); /* no workspace: the library allocates its own */
    if (status != FASTATTN_OK) {
        fprintf(stderr, "fastattn: %s\n", fastattn_status_string(status));
        return 1;
    }

    double worst = 0;
    for (int h = 0; h < HEADS; h++)
        worst = fmax(worst, head_error(h, args.scale));
    printf("fastattn %s, %s, %d thread(s): largest error %.1e\n", fastattn_version(), plan.kernel, plan.num_threads, worst);
    return worst < 1e-6 ? 0 : 1;
}
