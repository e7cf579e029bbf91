/* Work shared among threads: items that each of them takes one after another, until none is left. The threads are OpenMP's, which
 * this room alone knows, or those of the library's own pool. */
#ifndef FA_THREADS_H
#define FA_THREADS_H

#include "fastattn.h"

typedef void fa_work_fn(const void *context, int64_t item, int worker);

/* Who works, and who may end it. */
typedef struct fa_team {
    int threads;     /* at most; the calling one is among them */
    int64_t at_once; /* items that follow each other and are a thread's together, or 0: 1 */
    fastattn_threading threading;
    int (*interrupted)(void *); /* asked by the calling thread now and then, or null */
    void *interrupted_context;
} fa_team;

/* Calls work for every item below `items`, in the default floating-point environment; each thread's own is left as it was, its
 * exception flags too. `worker`, below team->threads, tells the threads apart. FASTATTN_ERROR_INTERRUPTED when work was
 * interrupted: then some items have not been done, and none is being done any more. */
fastattn_status fastattn_for_each(int64_t items, const fa_team *team, fa_work_fn *work, const void *context);

/* The same for the items from `first` up to `end` on this thread, as `worker`. */
void fastattn_for_range(int64_t first, int64_t end, int worker, fa_work_fn *work, const void *context);

/* What threads share. */
typedef struct fa_share {
    fa_work_fn *work;
    const void *context;
    int64_t items, at_once;
    int64_t turns, next;   /* each of at_once items; next is atomic */
    int64_t unheard_until; /* when on the clock helpers may be woken for it, or 0: the calling thread's alone */
} fa_share;

/* This thread works on the items of a turn that it has taken, and on all that it can take then. `team` is that of the calling thread,
 * which may be interrupted, and null for others; 0 if it was. */
int fastattn_take_part(fa_share *share, int64_t turn, int worker, const fa_team *team);

#endif
