#include "threads.h"

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

void fastattn_for_each(int64_t items, int threads, fa_work_fn *work, const void *context) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        {
            const fa_fpenv found = fa_fpenv_default();
#pragma omp for schedule(dynamic, 1)
            for (int64_t item = 0; item < items; item++) work(context, item, omp_get_thread_num());
            fa_fpenv_restore(found);
        }
        return;
    }
#endif
    (void)threads;
    if (items > 0) fastattn_for_range(0, items, 0, work, context);
}
