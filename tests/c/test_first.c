/* A caller that was compiled against the first header: its structs, which end at inaccessible pages, say all that it can ask for. */
#include "first/fastattn.h"
#include "harness.h"

#include <math.h>

enum { HEADS = 2, ROWS = 5, KEYS = 40, DIM = 24 };

/* The largest error of a head, whose row i sees the keys up to i + KEYS - ROWS, with a sink. */
static double head_error(const float *q, const float *k, const float *v, const float *out, const float *lse, double sink) {
    double worst = 0;
    for (int i = 0; i < ROWS; i++) {
        double weight[KEYS], total = exp(sink);
        const int visible = i + KEYS - ROWS + 1;
        for (int j = 0; j < visible; j++) {
            double score = 0;
            for (int d = 0; d < DIM; d++) score += (double)q[i * DIM + d] * k[j * DIM + d];
            total += weight[j] = exp(0.25 * score);
        }
        worst = fmax(worst, fabs(log(total) - lse[i]));
        for (int d = 0; d < DIM; d++) {
            double sum = 0;
            for (int j = 0; j < visible; j++) sum += weight[j] / total * v[j * DIM + d];
            worst = fmax(worst, fabs(sum - out[i * DIM + d]));
        }
    }
    return worst;
}

TEST_EACH_ISA(first_header_is_understood) {
    struct rng rng = {1};
    float *const q = guard_input("q", sizeof(float[ROWS][HEADS][DIM]), 4, GUARD_BEHIND);
    float *const k = guard_input("k", sizeof(float[KEYS][DIM]), 4, GUARD_BEHIND), *const v = guard_input("v", sizeof(float[KEYS][DIM]), 4, GUARD_BEHIND);
    float *const sinks = guard_input("sinks", sizeof(float[HEADS]), 4, GUARD_BEHIND);
    float *const out = guard_output("out", sizeof(float[HEADS][ROWS][DIM]), 4, GUARD_BEHIND);
    float *const lse = guard_output("lse", sizeof(float[HEADS][ROWS]), 4, GUARD_BEHIND);
    fastattn_attention_args *const args = guard_input("args", sizeof *args, sizeof(int64_t), GUARD_BEHIND);
    fastattn_plan_info *const info = guard_output("info", sizeof *info, sizeof(int64_t), GUARD_BEHIND);
    for (int n = 0; n < HEADS * ROWS * DIM; n++) q[n] = (float)random_signed(&rng);
    for (int n = 0; n < KEYS * DIM; n++) k[n] = (float)random_signed(&rng), v[n] = (float)random_signed(&rng);
    sinks[0] = 0.5f, sinks[1] = -0.5f;
    *args = (fastattn_attention_args){.size = sizeof *args, .window_left = -1, .window_right = -1};
    args->batch = 1, args->num_heads = HEADS, args->num_kv_heads = 1, args->q_len = ROWS, args->kv_len = KEYS;
    args->head_dim = args->v_head_dim = DIM;
    args->q = q, args->q_strides[1] = sizeof(float[ROWS][DIM]), args->q_strides[2] = sizeof(float[DIM]);
    args->k = k, args->k_strides[2] = sizeof(float[DIM]);
    args->v = v, args->v_strides[2] = sizeof(float[DIM]);
    args->out = out, args->out_strides[1] = sizeof(float[ROWS][DIM]), args->out_strides[2] = sizeof(float[DIM]);
    args->lse = lse, args->lse_strides[1] = sizeof(float[ROWS]), args->lse_strides[2] = sizeof(float);
    args->scale = 0.25f, args->causal = 1, args->sinks = sinks, args->isa = test_isa, args->num_threads = 2;
    info->size = sizeof *info;
    guard_seal();
    CHECK_STATUS(fastattn_explain(args, info), FASTATTN_OK);
    const fastattn_isa runs = test_isa == FASTATTN_ISA_AMX ? FASTATTN_ISA_AVX512 : test_isa; /* which float32 is left to */
    CHECK(info->isa == runs && info->workspace == fastattn_workspace_size(args), "isa %d", (int)info->isa);
    CHECK_STATUS(fastattn_attention(args, NULL, 0), FASTATTN_OK);
    for (int h = 0; h < HEADS; h++) {
        const double error = head_error(q + h * ROWS * DIM, k, v, out + h * ROWS * DIM, lse + h * ROWS, sinks[h]);
        CHECK(error < 2e-6, "head %d: an error of %g", h, error);
    }
    guard_check();

    const void *const outs[] = {out, out};
    const float *const lses[] = {lse, lse};
    float merged[ROWS * DIM], merged_lse[ROWS];
    CHECK_STATUS(fastattn_merge_states(2, outs, lses, ROWS, DIM, FASTATTN_FLOAT32, merged, merged_lse), FASTATTN_OK);
    for (int i = 0; i < ROWS; i++)
        CHECK(fabs(merged_lse[i] - lse[i] - log(2)) < 1e-6 && fabsf(merged[i * DIM] - out[i * DIM]) < 1e-6f, "row %d of two equal parts", i);
}
