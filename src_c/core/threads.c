#include "threads.h"

#include "../cpu/atomic.h"
#include "../cpu/fpenv.h"
#include "../cpu/thread.h"
#include "ints.h"
#include "pool.h"

#include <stddef.h>

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

int fastattn_threading_available(fastattn_threading threading) {
    return threading == FASTATTN_THREADING_OPENMP ? fastattn_has_openmp()
                                                  : threading == FASTATTN_THREADING_DEFAULT || threading == FASTATTN_THREADING_POOL;
}

const char *fastattn_threading_name(fastattn_threading threading) {
    switch (threading) {
    case FASTATTN_THREADING_DEFAULT: return "default";
    case FASTATTN_THREADING_OPENMP: return "openmp";
    case FASTATTN_THREADING_POOL: return "pool";
    }
    return NULL;
}

/* When the caller is asked: at most every 50 ms. The clock is read between items, between all of them where they are long. */
typedef struct fa_lookout {
    int64_t asked, read, stride, left;
} fa_lookout;

static int is_interrupted(fa_lookout *look, const fa_team *team) {
    enum { MOST_STRIDE = 32, READ_NS = 1000000, ASK_NS = 50000000 };
    if (--look->left > 0) return 0;
    const int64_t now = fastattn_clock();
    if (!look->asked) look->asked = now;
    look->stride = now - look->read > READ_NS ? 1 : look->stride < MOST_STRIDE ? 2 * look->stride : MOST_STRIDE;
    look->left = look->stride;
    look->read = now;
    if (now - look->asked < ASK_NS) return 0;
    look->asked = now;
    return team->interrupted(team->interrupted_context) != 0;
}

int fastattn_take_part(fa_share *share, int64_t turn, int worker, const fa_team *team) {
    const int asks = team && team->interrupted;
    fa_lookout look = {0, 0, 1, 1};
    int interrupted = 0;
    fa_fpenv found = fa_fpenv_default();
    for (; turn < share->turns; turn = fa_atomic_add(&share->next, 1)) {
        const int64_t first = turn * share->at_once, left = share->items - first;
        for (int64_t n = 0; n < share->at_once && n < left; n++) share->work(share->context, first + n, worker);
        if (team && share->unheard_until && fastattn_clock() >= share->unheard_until) fastattn_pool_offer_again(share);
        if (!asks) continue;
        fa_fpenv_restore(found);
        interrupted = is_interrupted(&look, team);
        found = fa_fpenv_default();
        if (interrupted) {
            fa_atomic_store(&share->next, share->turns);
            break;
        }
    }
    fa_fpenv_restore(found);
    return !interrupted;
}

fastattn_status fastattn_for_each(int64_t items, const fa_team *team, fa_work_fn *work, const void *context) {
    if (items <= 0) return FASTATTN_OK;
    const int64_t at_once = team->at_once > 1 ? team->at_once : 1, turns = fa_ceil_div(items, at_once);
    fa_share share = {work, context, items, at_once, turns, 1, 0}; /* the caller begins with turn 0 */
    int done = 1;
    if (team->threads < 2) {
        done = fastattn_take_part(&share, 0, 0, team);
    } else if (team->threading == FASTATTN_THREADING_OPENMP) {
#ifdef _OPENMP
#pragma omp parallel num_threads(team->threads)
        { /* without a loop of OpenMP's, which would end in a barrier beside that of the region */
            const int worker = omp_get_thread_num();
            if (worker == 0) done = fastattn_take_part(&share, 0, 0, team);
            else fastattn_take_part(&share, fa_atomic_add(&share.next, 1), worker, NULL);
        }
#endif
    } else {
        fa_offer offer;
        fastattn_pool_offer(&offer, &share, team->threads - 1);
        done = fastattn_take_part(&share, 0, 0, team);
        fastattn_pool_withdraw(&offer);
    }
    return done ? FASTATTN_OK : FASTATTN_ERROR_INTERRUPTED;
}

void fastattn_for_range(int64_t first, int64_t end, int worker, fa_work_fn *work, const void *context) {
    fa_share share = {work, context, end, 1, end, first + 1, 0};
    fastattn_take_part(&share, first, worker, NULL);
}
