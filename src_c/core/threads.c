#include "threads.h"

#include "fastattn.h"

#include <fenv.h>
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
    fenv_t found;
    fegetenv(&found);
    fesetenv(FE_DFL_ENV);
    for (int64_t item = first; item < end; item++) work(context, item, worker);
    fesetenv(&found);
}

void fastattn_for_each(int64_t items, int threads, fa_work_fn *work, const void *context) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        {
            fenv_t found;
            fegetenv(&found);
            fesetenv(FE_DFL_ENV);
#pragma omp for schedule(dynamic, 1)
            for (int64_t item = 0; item < items; item++) work(context, item, omp_get_thread_num());
            fesetenv(&found);
        }
        return;
    }
#endif
    (void)threads;
    if (items > 0) fastattn_for_range(0, items, 0, work, context);
}
