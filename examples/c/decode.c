/* Decoding with a static cache: one token after the other, and not one call of malloc. From the folder above src_c and examples:
 *
 *     cc -O2 -Isrc_c -Isrc_c/include examples/c/decode.c $(sed -n 's|^[a-z]|src_c/&|p' src_c/sources.txt) -lm -pthread -o decode
 *
 * Eight query heads share two heads of keys and values, which are cast to bfloat16 as they enter the cache. The last step is checked
 * against the formula. */
#include <fastattn.h>
#include <math.h>
#include <stdalign.h>
#include <stdio.h>

enum { STEPS = 300, CAPACITY = 512, HEADS = 8, KV_HEADS = 2, DIM = 64, WORKSPACE = 256 * 1024 };

static uint16_t keys[CAPACITY][KV_HEADS][DIM], values[CAPACITY][KV_HEADS][DIM];
static alignas(64) unsigned char workspace[WORKSPACE];
static float q[HEADS][DIM], k[KV_HEADS][DIM], v[KV_HEADS][DIM], out[HEADS][DIM];

/* In the place of a model. */
static void compute_token(int step)
{
    for (int h = 0; h < HEADS; h++)
        for (int d = 0; d < DIM; d++) {
            q[h][d] = sinf((float)(step + 7 * h + d * d));
            if (h < KV_HEADS)
                k[h][d] = cosf((float)(step * (d + 1) + h)), v[h][d] = sinf((float)(3 * step + d + 11 * h));
        }
}

/* A token's rows, cast, to the place of that token. Strides are in bytes: batch, token, head; of the cache page, row, head. */
static fastattn_status append(int64_t step)
{
    fastattn_store_args of_v = {.size = sizeof of_v, .batch = 1, .new_len = 1, .num_heads = KV_HEADS, .head_dim = DIM,
        .from = v, .from_dtype = FASTATTN_FLOAT32, .from_strides = {0, 0, sizeof v[0]},
        .to = values, .to_dtype = FASTATTN_BFLOAT16, .num_pages = 1, .page_size = CAPACITY,
        .to_strides = {0, sizeof values[0], sizeof values[0][0]}, .slots = &step};
    fastattn_store_args of_k = of_v;
    of_k.from = k, of_k.to = keys, of_k.also = &of_v;
    return fastattn_store(&of_k);
}

static fastattn_attention_args attention_of(const int64_t *length)
{
    fastattn_attention_args args = FASTATTN_ATTENTION_ARGS_INIT;
    args.batch = 1, args.num_heads = HEADS, args.num_kv_heads = KV_HEADS, args.q_len = 1, args.kv_len = CAPACITY;
    args.head_dim = args.v_head_dim = DIM, args.kv_dtype = FASTATTN_BFLOAT16, args.kv_lengths = length;
    args.q = q, args.q_strides[1] = sizeof q[0];
    args.k = keys, args.k_strides[1] = sizeof keys[0][0], args.k_strides[2] = sizeof keys[0];
    args.v = values, args.v_strides[1] = sizeof values[0][0], args.v_strides[2] = sizeof values[0];
    args.out = out, args.out_strides[1] = sizeof out[0];
    args.scale = 1.0f / sqrtf(DIM);
    return args;
}

static float number(uint16_t bfloat16)
{
    union { uint32_t bits; float number; } as = {(uint32_t)bfloat16 << 16};
    return as.number;
}

static double largest_error(int64_t length)
{
    double worst = 0;
    for (int h = 0; h < HEADS; h++) {
        const int g = h / (HEADS / KV_HEADS);
        double total = 0, sum[DIM] = {0};
        for (int64_t j = 0; j < length; j++) {
            double score = 0;
            for (int d = 0; d < DIM; d++)
                score += (double)q[h][d] * number(keys[j][g][d]);
            const double weight = exp(score / sqrt(DIM));
            total += weight;
            for (int d = 0; d < DIM; d++)
                sum[d] += weight * number(values[j][g][d]);
        }
        for (int d = 0; d < DIM; d++) {
            const double error = fabs(sum[d] / total - out[h][d]);
            worst = error > worst ? error : worst;
        }
    }
    return worst;
}

int main(void)
{
    fastattn_status status = FASTATTN_OK;
    for (int64_t step = 0; step < STEPS && status == FASTATTN_OK; step++) {
        const int64_t length = step + 1;
        const fastattn_attention_args args = attention_of(&length);
        compute_token((int)step);
        status = append(step);
        if (status == FASTATTN_OK) /* with a workspace of the caller's the library allocates nothing */
            status = fastattn_attention(&args, workspace, sizeof workspace);
    }
    if (status != FASTATTN_OK)
        return fprintf(stderr, "fastattn: %s\n", fastattn_status_string(status)), 1;
    printf("%d tokens, %zu KiB of cache: largest error %.1e\n", STEPS, (sizeof keys + sizeof values) / 1024, largest_error(STEPS));
    return largest_error(STEPS) < 1e-6 ? 0 : 1;
}
