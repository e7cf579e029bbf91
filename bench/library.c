/* Calls of the C library beside the same thing done otherwise: one head, D = 64, one thread, workspace given. library.sh builds and runs it:
 *
 *     library QUERIES KEYS ROUNDS CALLS SIDE...
 *
 * prints for each side the smallest mean of CALLS calls in nanoseconds; the sides take turns ROUNDS times. A side is an instruction
 * set ("best", "neon", ...), with "+bfloat16" on arrays of that type, with "+int8" or "+int4" on keys and values that are kept so and queries
 * of bfloat16, with "+planned" run again and again by a plan made once; "plain", the online softmax as a C programmer writes it down; or,
 * where the program is linked with OpenBLAS, "gemms", its two products with a softmax between. */
#define _POSIX_C_SOURCE 199309L

#include <fastattn.h>
#include <math.h>
#include <stdalign.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifdef WITH_OPENBLAS
void scipy_cblas_sgemm(int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha, const float *a, int lda,
                       const float *b, int ldb, float beta, float *c, int ldc);
#endif

enum { DIM = 64, MOST_QUERIES = 64, MOST_KEYS = 8192, MOST_SIDES = 8 };

static alignas(64) float q[MOST_QUERIES * DIM], k[MOST_KEYS * DIM], v[MOST_KEYS * DIM], out[MOST_QUERIES * DIM];
static alignas(64) uint16_t q16[MOST_QUERIES * DIM], k16[MOST_KEYS * DIM], v16[MOST_KEYS * DIM], out16[MOST_QUERIES * DIM];
static alignas(64) unsigned char quantised[2][2][MOST_KEYS * (DIM + 4)]; /* int8 and int4, keys and values */
static alignas(64) unsigned char workspace[1 << 20], of_plan[1 << 20];
static int queries, keys;

/* Milakov and Gimelshein's recurrence, a key at a time. */
static void plain(void) {
    for (int i = 0; i < queries; i++) {
        float m = -INFINITY, l = 0.0f, o[DIM] = {0};
        for (int j = 0; j < keys; j++) {
            float s = 0.0f;
            for (int d = 0; d < DIM; d++) s += q[i * DIM + d] * k[j * DIM + d];
            s *= 0.125f;
            const float larger = s > m ? s : m, alpha = expf(m - larger), p = expf(s - larger);
            for (int d = 0; d < DIM; d++) o[d] = o[d] * alpha + p * v[j * DIM + d];
            l = l * alpha + p;
            m = larger;
        }
        for (int d = 0; d < DIM; d++) out[i * DIM + d] = o[d] / l;
    }
}

#ifdef WITH_OPENBLAS
/* As compilers make vectors of it: the largest of a row, powers with a polynomial for e**r, and sums, LANES numbers at a time. */
static void softmax(float *s, int count) {
    enum { LANES = 16 };
    float m = -INFINITY, l = 0.0f, largest[LANES], sums[LANES] = {0};
    for (int n = 0; n < LANES; n++) largest[n] = -INFINITY;
    for (int j = 0; j < count; j += LANES)
        for (int n = 0; n < LANES; n++) largest[n] = s[j + n] > largest[n] ? s[j + n] : largest[n];
    for (int n = 0; n < LANES; n++) m = largest[n] > m ? largest[n] : m;
    for (int j = 0; j < count; j += LANES)
        for (int n = 0; n < LANES; n++) {
            const float x = s[j + n] - m > -87.0f ? s[j + n] - m : -87.0f, whole = rintf(x * 1.44269504f), r = x - whole * 0.693147181f;
            const float e = 1 + r * (1 + r * (0.5f + r * (0.166666667f + r * (0.0416666667f + r * 0.00833333333f))));
            union {
                int32_t bits;
                float number;
            } two_to = {((int32_t)whole + 127) * (1 << 23)};
            sums[n] += s[j + n] = e * two_to.number;
        }
    for (int n = 0; n < LANES; n++) l += sums[n];
    for (int j = 0; j < count; j++) s[j] *= 1 / l;
}
#endif

static void gemms(void) {
#ifdef WITH_OPENBLAS
    static float scores[MOST_QUERIES * MOST_KEYS];
    enum { ROW_MAJOR = 101, AS_IT_IS = 111, TRANSPOSED = 112 };
    scipy_cblas_sgemm(ROW_MAJOR, AS_IT_IS, TRANSPOSED, queries, keys, DIM, 0.125f, q, DIM, k, DIM, 0.0f, scores, keys);
    for (int i = 0; i < queries; i++) softmax(scores + i * keys, keys);
    scipy_cblas_sgemm(ROW_MAJOR, AS_IT_IS, AS_IT_IS, queries, DIM, keys, 1.0f, scores, keys, v, DIM, 0.0f, out, DIM);
#else
    exit(77);
#endif
}

static void expect_ok(fastattn_status status) {
    if (status == FASTATTN_OK) return;
    fprintf(stderr, "library: %s\n", fastattn_status_string(status));
    exit(1);
}

struct side {
    const char *name;
    void (*run)(void);
    int bfloat16;
    float tolerance;
    fastattn_attention_args args;
    const fastattn_plan *plan;
};

static void call(const struct side *side) {
    if (side->run) side->run();
    else if (!side->plan) expect_ok(fastattn_attention(&side->args, workspace, sizeof workspace));
    else
        for (int phase = 0; phase < 2; phase++)
            for (int64_t item = 0; item < fastattn_plan_items(side->plan, phase); item++)
                expect_ok(fastattn_plan_run(side->plan, phase, item, 0));
}

/* Keys and values as they are kept in a cache of int8 or int4. */
static void quantise(fastattn_attention_args *a, fastattn_dtype dtype) {
    const int64_t bytes = dtype == FASTATTN_INT8 ? DIM + 4 : DIM / 32 * 18;
    static int64_t slots[MOST_KEYS];
    unsigned char (*const to)[sizeof quantised[0][0]] = quantised[dtype == FASTATTN_INT4];
    for (int n = 0; n < keys; n++) slots[n] = n;
    for (int n = 0; n < 2; n++) {
        const fastattn_store_args store = {.size = sizeof store,
                                           .batch = 1,
                                           .new_len = keys,
                                           .num_heads = 1,
                                           .head_dim = DIM,
                                           .from = n ? v : k,
                                           .from_strides = {0, DIM * 4, 0},
                                           .to = to[n],
                                           .to_dtype = dtype,
                                           .num_pages = keys,
                                           .page_size = 1,
                                           .to_strides = {bytes, 0, 0},
                                           .slots = slots};
        expect_ok(fastattn_store(&store));
    }
    a->kv_dtype = dtype, a->k = to[0], a->v = to[1];
    a->k_strides[2] = a->v_strides[2] = bytes;
}

static struct side side_of(const char *name) {
    struct side side = {
        name, !strcmp(name, "plain") ? plain : !strcmp(name, "gemms") ? gemms : NULL, 0, 1e-4f, FASTATTN_ATTENTION_ARGS_INIT, NULL};
    if (side.run) return side;
    const size_t length = strcspn(name, "+");
    fastattn_attention_args *a = &side.args;
    const fastattn_dtype kept = !strcmp(name + length, "+int8")   ? FASTATTN_INT8
                                : !strcmp(name + length, "+int4") ? FASTATTN_INT4
                                                                  : FASTATTN_BFLOAT16;
    side.bfloat16 = kept != FASTATTN_BFLOAT16 || !strcmp(name + length, "+bfloat16");
    a->isa = (fastattn_isa)-1; /* no such set, which is an error */
    for (int isa = FASTATTN_ISA_BEST; fastattn_isa_name((fastattn_isa)isa); isa++) {
        const char *known = fastattn_isa_name((fastattn_isa)isa);
        if (strlen(known) == length && !strncmp(known, name, length)) a->isa = (fastattn_isa)isa;
    }
    const int64_t bytes = side.bfloat16 ? 2 : 4;
    a->q_dtype = a->kv_dtype = side.bfloat16 ? FASTATTN_BFLOAT16 : FASTATTN_FLOAT32;
    a->batch = a->num_heads = a->num_kv_heads = 1;
    a->q_len = queries, a->kv_len = keys, a->head_dim = a->v_head_dim = DIM;
    a->q = side.bfloat16 ? (void *)q16 : q, a->k = side.bfloat16 ? (void *)k16 : k, a->v = side.bfloat16 ? (void *)v16 : v;
    a->out = side.bfloat16 ? (void *)out16 : out;
    a->q_strides[2] = a->k_strides[2] = a->v_strides[2] = a->out_strides[2] = DIM * bytes;
    a->scale = 0.125f;
    if (side.bfloat16) side.tolerance = kept == FASTATTN_INT4 ? 0.2f : kept == FASTATTN_INT8 ? 2e-2f : 1e-2f;
    if (kept != FASTATTN_BFLOAT16) quantise(a, kept);
    if (!strcmp(name + length, "+planned")) expect_ok(fastattn_attention_plan(a, of_plan, sizeof of_plan, &side.plan));
    return side;
}

/* Numbers that bfloat16 holds. */
static void fill(float *array, uint16_t *halves, int count) {
    static uint32_t state = 1;
    for (int n = 0; n < count; n++) {
        state = state * 1664525u + 1013904223u;
        array[n] = (float)(int)((state >> 24) - 128) / 64.0f;
        uint32_t bits;
        memcpy(&bits, array + n, sizeof bits);
        halves[n] = (uint16_t)(bits >> 16);
    }
}

/* Sides that compute something else are not compared. */
static void check(const struct side *side, const float *right) {
    call(side);
    for (int n = 0; n < queries * DIM; n++) {
        uint32_t bits = (uint32_t)out16[n] << 16;
        float number = out[n];
        if (side->bfloat16) memcpy(&number, &bits, sizeof number);
        if (fabsf(number - right[n]) <= side->tolerance) continue;
        fprintf(stderr, "library: %s is wrong\n", side->name);
        exit(1);
    }
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e9 * (double)t.tv_sec + (double)t.tv_nsec;
}

int main(int argc, char **argv) {
    if (argc < 6 || argc > 5 + MOST_SIDES) return 2;
    const int rounds = atoi(argv[3]), calls = atoi(argv[4]), count = argc - 5;
    static struct side sides[MOST_SIDES];
    static float right[MOST_QUERIES * DIM];
    double least[MOST_SIDES];
    queries = atoi(argv[1]), keys = atoi(argv[2]);
    if (queries < 1 || queries > MOST_QUERIES || keys < 1 || keys > MOST_KEYS) return 2;
    fill(q, q16, MOST_QUERIES * DIM), fill(k, k16, MOST_KEYS * DIM), fill(v, v16, MOST_KEYS * DIM);
    plain();
    memcpy(right, out, sizeof right);
    for (int n = 0; n < count; n++) {
        sides[n] = side_of(argv[5 + n]);
        least[n] = INFINITY;
        check(&sides[n], right);
    }
    for (int round = 0; round < rounds; round++)
        for (int n = 0; n < count; n++) {
            const double start = now();
            for (int i = 0; i < calls; i++) call(&sides[n]);
            const double taken = (now() - start) / calls;
            least[n] = taken < least[n] ? taken : least[n];
        }
    for (int n = 0; n < count; n++) printf("%s %.0f\n", sides[n].name, least[n]);
    return 0;
}
