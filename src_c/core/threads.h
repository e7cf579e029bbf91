/* Work shared among threads. The only place that knows OpenMP. */
#ifndef FA_THREADS_H
#define FA_THREADS_H

#include <stdint.h>

typedef void fa_work_fn(const void *context, int64_t item, int worker);

/* Calls work for the items from `first` up to `end` on this thread, as `worker`, in the default floating-point
 * environment; the thread's own is left as it was, its exception flags too. */
void fastattn_for_range(int64_t first, int64_t end, int worker, fa_work_fn *work, const void *context);

/* The same for every item below `items`, on at most `threads` threads; worker tells them apart. */
void fastattn_for_each(int64_t items, int threads, fa_work_fn *work, const void *context);

#endif
