#include "threads.h"

#include "../cpu/atomic.h"
#include "../cpu/fpenv.h"
#include "fastattn.h"

#ifdef _OPENMP
#include <omp.h>
#endif

int fastattn_has_openmp(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

void fastattn_for_range(int64_t first, int64_t end, int worker, fa_work_fn *work, const void *context) {
    const fa_fpenv found = fa_fpenv_default();
    for (int64_t item = first; item < end; item++) work(context, item, worker);
    fa_fpenv_restore(found);
}

/* Items from which threads take one after another until none is left. */
typedef struct fa_share {
    fa_work_fn *work;
    const void *context;
    int64_t items, next;
} fa_share;

static void take_part(fa_share *share, int worker) {
    const fa_fpenv found = fa_fpenv_default();
    for (int64_t item; (item = fa_atomic_add(&share->next, 1)) < share->items;) share->work(share->context, item, worker);
    fa_fpenv_restore(found);
}

void fastattn_for_each(int64_t items, int threads, fa_work_fn *work, const void *context) {
    fa_share share = {work, context, items, 0};
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        take_part(&share, omp_get_thread_num()); /* and not a loop of OpenMP's, which would end in a barrier of its own */
        return;
    }
#endif
    (void)threads;
    if (items > 0) take_part(&share, 0);
}
