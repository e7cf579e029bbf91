#include "pool.h"

#include "../cpu/atomic.h"
#include "../cpu/thread.h"
#include "fastattn.h"

#include <stddef.h>

enum {
    MOST_HELPERS = 1024,
    IDLE_NS = 50000,     /* how long a helper looks out for the next call, which often follows at once, before it sleeps */
    FINISH_NS = 100000,  /* and a caller for helpers with their last items, before it does: to wake it takes some 10 us */
    CROWDED_NS = 5000000 /* how long nobody is woken after a helper could not leave its caller's processor: there is one for both */
};

/* The lock guards everything but `quiet`, which is atomic and on a line of a cache that no one else writes: spinning helpers
 * look at it. */
static struct {
    int64_t quiet; /* neither offers nor a stop: nothing for a helper to do */
    char apart[56];
    int64_t caller_runs;   /* where the last offer was made */
    int64_t crowded_until; /* on the clock, or 0 */
    fa_mutex lock;
    fa_condition called; /* there is an offer, or helpers are to stop */
    fa_condition left;   /* helpers have left a call for which somebody sleeps, or all have stopped */
    fa_offer *offers;    /* with seats left, and items as far as is known; the newest first */
    int helpers;         /* started; of them */
    int idle;            /* not at work, and of them */
    int asleep;          /* not even spinning */
    int sleepers;        /* callers that wait for `left` */
    int stopping, at_fork, processors;
} pool = {.quiet = 1, .lock = FA_MUTEX_FREE, .called = FA_CONDITION_NEW, .left = FA_CONDITION_NEW};

static fa_thread threads[MOST_HELPERS]; /* those that were started: apart, for zeros take no place in a file */

static void note_quiet(void) { fa_atomic_store(&pool.quiet, !pool.offers && !pool.stopping); }

static void unlist(const fa_offer *offer) {
    fa_offer **at = &pool.offers;
    while (*at && *at != offer) at = &(*at)->next;
    if (*at) *at = offer->next;
    note_quiet();
}

/* Spins until the number is 0 or the clock has come to `end`. */
static void spin(int64_t *number, int64_t end) {
    enum { LOOKS = 16 }; /* cheaper than a reading of the clock */
    do {
        for (int look = 0; look < LOOKS; look++) {
            if (fa_atomic_load(number) == 0) return;
            fastattn_pause();
        }
    } while (fastattn_clock() < end);
}

/* Whether a thread that runs there cannot go on while this one does, so that to spin for it would be to wait for oneself. */
static int in_the_way_of(int64_t processor) { return pool.processors == 1 || (processor >= 0 && processor == fastattn_processor()); }

/* How many of those asleep are to be woken: two, who wake two more each, so that nobody wakes many in turn. Those who spin come
 * unasked. */
static int wanted_awake(void) {
    int seats = pool.asleep - pool.idle;
    for (const fa_offer *offer = pool.offers; offer; offer = offer->next) seats += offer->seats - offer->seated;
    const int most = pool.asleep < 2 ? pool.asleep : 2;
    return seats < most ? seats : most;
}

/* Lets the lock go and wakes whom offers need. Returns when on the clock that is worth another try, or 0. */
static int64_t unlock_and_wake(void) {
    const int64_t crowded = pool.crowded_until && fastattn_clock() < pool.crowded_until ? pool.crowded_until : 0;
    int count = crowded ? 0 : wanted_awake();
    fa_unlock(&pool.lock);
    for (; count > 0; count--) fa_wake_one(&pool.called);
    return crowded;
}

/* A helper, which holds the lock, takes a seat together with an item, so that nobody waits for one that has none. 0 if there is no
 * seat. `caller` becomes the processor of the call that was helped. */
static int serve(int64_t *caller) {
    fa_offer *offer = pool.offers;
    if (!offer || pool.stopping) return 0;
    const int64_t turn = fa_atomic_add(&offer->share->next, 1);
    if (turn >= offer->share->turns) {
        unlist(offer);
        return 1;
    }
    const int worker = ++offer->seated;
    fa_atomic_add(&offer->busy, 1);
    fa_atomic_store(&offer->helper_runs, fastattn_processor());
    if (worker == offer->seats) unlist(offer);
    *caller = offer->caller_runs;
    pool.idle--;
    unlock_and_wake();
    fastattn_take_part(offer->share, turn, worker, NULL);
    const int last = fa_atomic_add(&offer->busy, -1) == 1; /* from here on the offer may be gone */
    fa_lock(&pool.lock);
    if (last && pool.sleepers) fa_wake_all(&pool.left);
    pool.idle++;
    return 1;
}

/* A helper, which holds the lock, goes where the last caller does not run, and sleeps there: a system may wake it at its caller's side
 * although another processor is idle, and again at every call. In a virtual machine Linux takes a processor that was halted for one
 * that the host has given to others. Returns whom the helper keeps off now. */
static int64_t make_way(fa_affinity *mine) {
    const int64_t caller = pool.caller_runs;
    fa_unlock(&pool.lock);
    fastattn_keep_off((int)caller, mine);
    fa_lock(&pool.lock);
    pool.crowded_until = in_the_way_of(caller) ? fastattn_clock() + CROWDED_NS : 0;
    return caller;
}

static void help(void) {
    enum { NOBODY = -2 };
    fa_affinity mine = {{0}, {0}};
    int64_t awake_until = 0, kept_off = NOBODY; /* until it is in the way for once, where it runs is the system's affair */
    fa_lock(&pool.lock);
    for (;;) {
        int64_t caller = NOBODY;
        if (in_the_way_of(pool.caller_runs)) kept_off = make_way(&mine);
        while (serve(&caller)) continue;
        if (pool.stopping) break;
        if (caller != NOBODY) awake_until = in_the_way_of(caller) ? 0 : fastattn_clock() + IDLE_NS;
        if (awake_until && fastattn_clock() < awake_until) {
            fa_unlock(&pool.lock);
            spin(&pool.quiet, awake_until);
            fa_lock(&pool.lock);
        } else if (kept_off != NOBODY && kept_off != pool.caller_runs) {
            kept_off = make_way(&mine);
        } else {
            pool.asleep++;
            fa_wait(&pool.called, &pool.lock);
            pool.asleep--;
        }
    }
    fa_unlock(&pool.lock);
}

/* A fork leaves the child one thread, and the lock as it is at that moment. */
static void before_fork(void) { fa_lock(&pool.lock); }
static void after_fork_in_parent(void) { fa_unlock(&pool.lock); }
static void after_fork_in_child(void) {
    const fa_mutex lock = FA_MUTEX_FREE;
    const fa_condition condition = FA_CONDITION_NEW;
    pool.lock = lock;
    pool.called = pool.left = condition;
    pool.offers = NULL;
    pool.helpers = pool.idle = pool.asleep = pool.sleepers = pool.stopping = 0;
    note_quiet();
}

/* Starts what helpers are missing. All callers together have one for each other processor, or as many as one asks for. */
static void hire(int seats) {
    if (!pool.at_fork) {
        fastattn_thread_at_fork(before_fork, after_fork_in_parent, after_fork_in_child);
        pool.at_fork = 1;
        pool.processors = fastattn_processors();
    }
    int most = seats > pool.processors - 1 ? seats : pool.processors - 1;
    if (most > MOST_HELPERS) most = MOST_HELPERS;
    while (!pool.stopping && pool.idle < seats && pool.helpers < most) {
        if (!fastattn_thread_start(&threads[pool.helpers], help)) break; /* fewer will do */
        pool.helpers++;
        pool.idle++;
    }
}

void fastattn_pool_offer(fa_offer *offer, fa_share *share, int seats) {
    const fa_offer made = {.share = share, .seats = seats, .caller_runs = fastattn_processor(), .helper_runs = -1};
    *offer = made;
    fa_lock(&pool.lock);
    hire(seats);
    offer->next = pool.offers;
    pool.offers = offer;
    pool.caller_runs = offer->caller_runs;
    note_quiet();
    share->unheard_until = unlock_and_wake();
}

void fastattn_pool_offer_again(fa_share *share) {
    fa_lock(&pool.lock);
    share->unheard_until = unlock_and_wake();
}

void fastattn_pool_withdraw(fa_offer *offer) {
    fa_lock(&pool.lock);
    unlist(offer);
    fa_unlock(&pool.lock);
    if (fa_atomic_load(&offer->busy) && !in_the_way_of(fa_atomic_load(&offer->helper_runs)))
        spin(&offer->busy, fastattn_clock() + FINISH_NS);
    if (fa_atomic_load(&offer->busy) == 0) return;
    fa_lock(&pool.lock);
    pool.sleepers++;
    while (fa_atomic_load(&offer->busy)) fa_wait(&pool.left, &pool.lock);
    pool.sleepers--;
    fa_unlock(&pool.lock);
}

void fastattn_threads_stop(void) {
    fa_lock(&pool.lock);
    while (pool.stopping) fa_wait(&pool.left, &pool.lock); /* another thread is doing it */
    pool.stopping = 1;
    note_quiet();
    const int helpers = pool.helpers;
    fa_wake_all(&pool.called);
    fa_unlock(&pool.lock);
    for (int n = 0; n < helpers; n++) fastattn_thread_join(threads[n]);
    fa_lock(&pool.lock);
    pool.helpers = pool.idle = pool.stopping = 0;
    note_quiet();
    fa_wake_all(&pool.left);
    fa_unlock(&pool.lock);
}
