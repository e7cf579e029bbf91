/* Attention on the caller's own threads: a plan is made once, and its items are taken by whoever is free.
 *
 *     cc threads.c $(pkg-config --cflags --libs fastattn) -lm -pthread -o threads
 *
 * The library starts no thread here and allocates nothing; results have the same bits as on one thread. */
#include <fastattn.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { THREADS = 3, HEADS = 4, QUERIES = 3, KEYS = 5000, DIM = 64, PHASES = 2 };

static float q[HEADS][QUERIES][DIM], k[HEADS][KEYS][DIM], v[HEADS][KEYS][DIM], out[HEADS][QUERIES][DIM], alone[HEADS][QUERIES][DIM];

static struct {
    const fastattn_plan *plan;
    atomic_llong next[PHASES];
    pthread_barrier_t between; /* phase 1 puts together what phase 0 has left in the workspace */
    atomic_int failures;
} work;

static void *take_items(void *number)
{
    const int worker = *(const int *)number; /* whose scratch memory the items may use */
    for (int phase = 0; phase < PHASES; phase++) {
        const int64_t items = fastattn_plan_items(work.plan, phase);
        for (int64_t item; (item = atomic_fetch_add(&work.next[phase], 1)) < items;)
            if (fastattn_plan_run(work.plan, phase, item, worker) != FASTATTN_OK)
                atomic_fetch_add(&work.failures, 1);
        pthread_barrier_wait(&work.between);
    }
    return NULL;
}

static void fill(float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] = (float)rand() / (float)RAND_MAX - 0.5f;
}

int main(void)
{
    fill(&q[0][0][0], sizeof q / sizeof(float));
    fill(&k[0][0][0], sizeof k / sizeof(float));
    fill(&v[0][0][0], sizeof v / sizeof(float));

    fastattn_attention_args args = FASTATTN_ATTENTION_ARGS_INIT;
    args.batch = 1, args.num_heads = args.num_kv_heads = HEADS, args.q_len = QUERIES, args.kv_len = KEYS;
    args.head_dim = args.v_head_dim = DIM, args.scale = 1.0f / sqrtf(DIM), args.causal = 1;
    args.q = q, args.q_strides[1] = sizeof q[0], args.q_strides[2] = sizeof q[0][0];
    args.k = k, args.k_strides[1] = sizeof k[0], args.k_strides[2] = sizeof k[0][0];
    args.v = v, args.v_strides[1] = sizeof v[0], args.v_strides[2] = sizeof v[0][0];
    args.out_strides[1] = sizeof out[0], args.out_strides[2] = sizeof out[0][0];
    args.out = alone;
    fastattn_status status = fastattn_attention(&args, NULL, 0);

    args.out = out, args.num_threads = THREADS;
    const size_t size = fastattn_workspace_size(&args);
    void *workspace = aligned_alloc(64, (size + 63) / 64 * 64);
    if (status == FASTATTN_OK)
        status = workspace ? fastattn_attention_plan(&args, workspace, size, &work.plan) : FASTATTN_ERROR_MEMORY;
    if (status != FASTATTN_OK)
        return fprintf(stderr, "fastattn: %s\n", fastattn_status_string(status)), 1;

    pthread_t threads[THREADS];
    int numbers[THREADS];
    pthread_barrier_init(&work.between, NULL, THREADS);
    for (int n = 0; n < THREADS; n++) {
        numbers[n] = n;
        if (pthread_create(&threads[n], NULL, take_items, &numbers[n]) != 0)
            return perror("pthread_create"), 1;
    }
    for (int n = 0; n < THREADS; n++)
        pthread_join(threads[n], NULL);

    const int same = memcmp(out, alone, sizeof out) == 0;
    printf("%d threads, %lld items and %lld merges: %s as on one\n", THREADS, (long long)fastattn_plan_items(work.plan, 0),
           (long long)fastattn_plan_items(work.plan, 1), same ? "the same bits" : "OTHER BITS");
    free(workspace);
    return same && work.failures == 0 ? 0 : 1;
}
