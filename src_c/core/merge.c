/* fastattn_merge_states: the weights of the parts sum to 1 in every row, so that nothing is divided and no sum of finite numbers is
 * larger than the largest of them. */
#include "check.h"
#include "ints.h"
#include "memory.h"
#include "threads.h"

#include "../cpu/atomic.h"
#include "../ukernel/storage.h"
#include "../ukernel/ukernel.h"
#include "fastattn.h"

#include <float.h>
#include <math.h>

/* Of the parts and the result together: what pays for taking rows, and for waking a thread. */
enum { TURN_BYTES = 1 << 16, THREAD_BYTES = 1 << 18, LINE = 64 };

typedef struct fa_merge {
    const fastattn_merge_args *args;
    const fa_ukernel *uk;
    int64_t row_bytes;
    int64_t shares, share_rows, turn_rows; /* the last two multiples of FA_ROW_STEP */
    char *memory; /* of_worker bytes for each share and thread: how many rows were taken of it, and a line further on a mixture */
    size_t of_worker;
} fa_merge;

/* What a thread needs for the rows that it is at. */
typedef struct fa_mixture {
    float *weights;       /* [num_parts][FA_ROW_STEP] */
    float *weights_of;    /* likewise, but of the first row alone, and of the parts that have seen a key */
    const void **rows_of; /* [num_parts]: of these parts the rows */
} fa_mixture;

static size_t mixture_bytes(size_t parts) { return parts * (sizeof(void *) + 2 * FA_ROW_STEP * sizeof(float)); }

static fa_mixture mixture_in(void *memory, int64_t parts) {
    const void **rows = memory;
    float *weights = (float *)(void *)(rows + parts);
    return (fa_mixture){weights, weights + parts * FA_ROW_STEP, rows};
}

/* A row that left float32, in double. Rounding alone may do that, where all numbers are near the largest; then it is that. */
static void mix_exactly(const fastattn_merge_args *a, const fa_mixture *of, char *out, int64_t parts) {
    const double largest = a->dtype == FASTATTN_BFLOAT16 ? 0x1.fep127 : a->dtype == FASTATTN_FLOAT16 ? 65504 : FLT_MAX;
    const int64_t size = fa_size_of(a->dtype);
    for (int64_t d = 0; d < a->v_head_dim; d++) {
        double sum = 0;
        for (int64_t n = 0; n < parts; n++)
            sum += (double)of->weights_of[n * FA_ROW_STEP] * fa_get((const char *)of->rows_of[n] + d * size, a->dtype);
        fa_put(out + d * size, fa_narrowed(sum, largest), a->dtype);
    }
}

/* Row i alone, whose weights are the r-th: of the parts that have seen a key, for the others may hold anything. */
static void mix_row(const fa_merge *x, const fa_mixture *of, int64_t i, int64_t r) {
    const fastattn_merge_args *a = x->args;
    const int64_t at = i * x->row_bytes;
    int64_t parts = 0;
    for (int64_t n = 0; n < a->num_parts; n++) {
        if (a->lses[n][i] == -INFINITY) continue;
        of->weights_of[parts * FA_ROW_STEP] = of->weights[n * FA_ROW_STEP + r];
        of->rows_of[parts++] = (const char *)a->outs[n] + at;
    }
    if (!x->uk->mix((char *)a->out + at, of->weights_of, of->rows_of, parts, 1, a->v_head_dim, a->dtype))
        mix_exactly(a, of, (char *)a->out + at, parts);
}

static void merge_rows(const fa_merge *x, const fa_mixture *of, int64_t first, int64_t end) {
    const fastattn_merge_args *a = x->args;
    for (int64_t i = first; i < end; i += FA_ROW_STEP) {
        const int64_t rows = fa_min(FA_ROW_STEP, end - i);
        const int all = x->uk->weigh(of->weights, a->lse + i, a->lses, a->num_parts, i, rows);
        if (a->v_head_dim == 0) continue;
        for (int64_t n = 0; n < a->num_parts; n++) of->rows_of[n] = (const char *)a->outs[n] + i * x->row_bytes;
        if (all && x->uk->mix((char *)a->out + i * x->row_bytes, of->weights, of->rows_of, a->num_parts, rows, a->v_head_dim, a->dtype))
            continue;
        for (int64_t r = 0; r < rows; r++) mix_row(x, of, i + r, r);
    }
}

static int64_t *taken_of(const fa_merge *x, int64_t share) { return (int64_t *)(void *)(x->memory + (size_t)share * x->of_worker); }

/* Each thread has a share of its own, rows that follow each other: it finds in its cache what it has left there, and in fresh memory no
 * page is cleared for two. Whoever is done helps with the shares of others. */
static void merge_item(const void *context, int64_t item, int worker) {
    const fa_merge *x = context;
    const fa_mixture of = mixture_in(x->memory + (size_t)worker * x->of_worker + LINE, x->args->num_parts);
    for (int64_t n = 0; n < x->shares; n++) {
        const int64_t share = (item + n) % x->shares, first = share * x->share_rows;
        const int64_t rows = fa_min(x->share_rows, x->args->rows - first);
        for (int64_t at; (at = fa_atomic_add(taken_of(x, share), x->turn_rows)) < rows;)
            merge_rows(x, &of, first + at, first + fa_min(at + x->turn_rows, rows));
    }
}

static fastattn_status check_merge(const fastattn_merge_args *a) {
    if (a->num_parts < 0 || a->rows < 0 || a->v_head_dim < 0 || a->v_head_dim > FA_MOST_DIM) return FASTATTN_ERROR_SHAPE;
    if (!fa_is_storage(a->dtype)) return FASTATTN_ERROR_DTYPE;
    if (!fastattn_threading_available(a->threading)) return FASTATTN_ERROR_THREADING;
    if (a->rows == 0) return FASTATTN_OK;
    const size_t size = (size_t)fa_size_of(a->dtype);
    const int values = a->v_head_dim > 0;
    if (!a->lse || fa_misaligned(a->lse, 4) || (values && (!a->out || fa_misaligned(a->out, size))) ||
        (a->num_parts > 0 && (!a->outs || !a->lses)))
        return FASTATTN_ERROR_ARGUMENT;
    for (int64_t n = 0; n < a->num_parts; n++)
        if (!a->lses[n] || fa_misaligned(a->lses[n], 4) || (values && (!a->outs[n] || fa_misaligned(a->outs[n], size))))
            return FASTATTN_ERROR_ARGUMENT;
    return FASTATTN_OK;
}

fastattn_status fastattn_merge(const fastattn_merge_args *given) {
    if (!FA_HOLDS_MERGE) return FASTATTN_ERROR_LEFT_OUT;
    if (!given || given->size != sizeof *given) return FASTATTN_ERROR_ARGUMENT;
    const fastattn_merge_args args = *given;
    fastattn_status status = check_merge(&args);
    if (status != FASTATTN_OK || args.rows == 0) return status;
    fa_merge x = {.args = &args, .uk = fastattn_ukernel_select(args.isa)};
    if (!x.uk) return FASTATTN_ERROR_ISA;

    x.row_bytes = args.v_head_dim * fa_size_of(args.dtype);
    const double of_row = (double)(args.num_parts + 1) * (double)(x.row_bytes + 4);
    x.turn_rows = fa_round_up((int64_t)(TURN_BYTES / of_row) + 1, FA_ROW_STEP);
    const double paying = of_row * (double)args.rows / THREAD_BYTES;
    fa_team team = {.threads = paying < args.num_threads ? (int)paying : args.num_threads, .threading = args.threading};
    if (team.threads < 1) team.threads = 1;
    x.shares = team.threads;
    x.share_rows = fa_round_up(fa_ceil_div(args.rows, x.shares), FA_ROW_STEP);

    const size_t parts = (size_t)args.num_parts, threads = (size_t)team.threads;
    if (parts > SIZE_MAX / 2 / threads / mixture_bytes(1)) return FASTATTN_ERROR_MEMORY;
    x.of_worker = (mixture_bytes(parts) / LINE + 3) * LINE; /* no thread writes to another's line, wherever memory begins */
    x.memory = FASTATTN_MALLOC(threads * x.of_worker);
    if (!x.memory) return FASTATTN_ERROR_MEMORY;
    for (int64_t share = 0; share < x.shares; share++) *taken_of(&x, share) = 0;
    status = fastattn_for_each(x.shares, &team, merge_item, &x);
    FASTATTN_FREE(x.memory);
    return status;
}

fastattn_status fastattn_merge_states(int64_t num_parts, const void *const *outs, const float *const *lses, int64_t rows,
                                      int64_t v_head_dim, fastattn_dtype dtype, void *out, float *lse) {
    const fastattn_merge_args args = {sizeof args, num_parts, rows, v_head_dim,        outs, lses,
                                      dtype,       out,       lse,  FASTATTN_ISA_BEST, 1,    FASTATTN_THREADING_DEFAULT};
    return fastattn_merge(&args);
}
