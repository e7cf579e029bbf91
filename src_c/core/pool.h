/* Threads of the library's own, which help whoever has work to share.
 *
 * They are started by the first call that could use them, serve all callers, and sleep while there is nothing to do. A caller
 * works too and does not depend on them: it waits for helpers that have taken an item, never for one that has not come. So a thread
 * that gets no processor delays a call by one item at most. */
#ifndef FA_POOL_H
#define FA_POOL_H

#include "threads.h"

typedef struct fa_offer {
    fa_share *share;
    int seats;             /* helpers that may come, as workers 1 to seats */
    int seated;            /* those that have */
    int64_t busy;          /* of them, those that have not left */
    int64_t caller_runs;   /* on this processor, or -1 */
    int64_t helper_runs;   /* the one that came last, or -1 */
    struct fa_offer *next; /* in the list of offers that helpers look through */
} fa_offer;

/* Offers the work of `share` to at most `seats` helpers. The offer lies in the caller's memory until it is withdrawn. */
void fastattn_pool_offer(fa_offer *offer, fa_share *share, int seats);

/* Wakes helpers for it whom it was too early to wake before share->unheard_until. */
void fastattn_pool_offer_again(fa_share *share);

/* No helper comes any more, and those that came have left when this returns. */
void fastattn_pool_withdraw(fa_offer *offer);

#endif
