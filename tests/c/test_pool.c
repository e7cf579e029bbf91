/* Work without attention: what is shared, by whom and where, and threads that come, go, stop and are not there after a fork. */
#include "problem.h"

#include "core/threads.h"
#include "cpu/thread.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#ifdef __linux__
#include <dirent.h>
#endif
#ifndef _WIN32
#include <sys/wait.h>
#include <unistd.h>
#endif

static const fastattn_threading ways[] = {FASTATTN_THREADING_POOL, FASTATTN_THREADING_OPENMP};

static fa_team team_of(int threads, fastattn_threading threading) {
    return (fa_team){.threads = threads, .threading = threading};
}

struct roll {
    int done[1000], present[5];
};

static void answer(const void *context, int64_t item, int worker) {
    struct roll *roll = (struct roll *)context;
    CHECK(worker >= 0 && worker < (int)COUNT(roll->present), "worker %d", worker);
    CHECK(__atomic_exchange_n(&roll->present[worker], 1, __ATOMIC_RELAXED) == 0, "two are worker %d", worker);
    __atomic_add_fetch(&roll->done[item], 1, __ATOMIC_RELAXED);
    for (volatile int n = 0; n < 200; n++) continue;
    __atomic_store_n(&roll->present[worker], 0, __ATOMIC_RELAXED);
}

TEST(threads_do_each_item_once) {
    for (int round = 0; round < 40; round++)
        for (size_t way = 0; way < COUNT(ways); way++) {
            struct roll roll = {{0}, {0}};
            if (!fastattn_threading_available(ways[way]))
                continue;
            const fa_team team = team_of(COUNT(roll.present), ways[way]);
            const int64_t items = round % 4 == 0 ? round : (int64_t)COUNT(roll.done);
            context("%lld items by %s", (long long)items, fastattn_threading_name(ways[way]));
            CHECK_STATUS(fastattn_for_each(items, &team, answer, &roll), FASTATTN_OK);
            for (int64_t n = 0; n < (int64_t)COUNT(roll.done); n++)
                CHECK(roll.done[n] == (n < items), "item %lld was done %d times", (long long)n, roll.done[n]);
        }
}

#ifdef __linux__

/* Where threads run: a helper that is woken on its caller's processor leaves it, if it may. */

/* Two processors that this process may use, and the rest of its set. */
struct processors {
    cpu_set_t all, first;
    int one, other;
};

static struct processors two_processors(void) {
    struct processors p = {.one = -1, .other = -1};
    CHECK(sched_getaffinity(0, sizeof p.all, &p.all) == 0, "sched_getaffinity");
    for (int n = 0; n < CPU_SETSIZE && p.other < 0; n++)
        if (CPU_ISSET(n, &p.all))
            *(p.one < 0 ? &p.one : &p.other) = n;
    if (p.other < 0 || sched_getcpu() < 0)
        skip("one processor");
    CPU_ZERO(&p.first);
    CPU_SET(p.one, &p.first);
    return p;
}

static void confine(const cpu_set_t *helpers, const cpu_set_t *caller) {
    DIR *tasks = opendir("/proc/self/task");
    CHECK(tasks, "/proc/self/task");
    for (struct dirent *task; (task = readdir(tasks));)
        if (task->d_name[0] != '.')
            sched_setaffinity(atoi(task->d_name), sizeof *helpers, helpers);
    closedir(tasks);
    CHECK(sched_setaffinity(0, sizeof *caller, caller) == 0, "sched_setaffinity");
}

static void check_affinity(const cpu_set_t *wanted) {
    cpu_set_t set;
    CHECK(sched_getaffinity(0, sizeof set, &set) == 0 && CPU_EQUAL(&set, wanted), "other processors than wanted");
    CHECK(CPU_ISSET(sched_getcpu(), wanted), "on processor %d", sched_getcpu());
}

TEST(threads_keep_off_a_processor) {
    const struct processors p = two_processors();
    fa_affinity mine = {{0}, {0}};
    cpu_set_t wanted;
    for (int round = 0; round < 20; round++) {
        const int processor = round % 2 ? p.one : p.other;
        fastattn_keep_off(processor, &mine);
        wanted = p.all; /* the one before is free for it again */
        CPU_CLR(processor, &wanted);
        check_affinity(&wanted);
    }
    confine(&p.first, &p.first); /* by somebody else, who is obeyed */
    for (int processor = -1; processor <= p.other; processor++) {
        fastattn_keep_off(processor, &mine);
        check_affinity(&p.first);
    }
}

/* Helpers' items, and those that they did elsewhere than on the caller's processor. */
struct visits {
    int caller_runs, of_helpers, elsewhere;
};

/* The caller gives helpers a hundredth of a second for their first item. */
static void wait_for_helper(const void *context, int64_t item, int worker) {
    struct visits *visits = (struct visits *)context;
    (void)item;
    if (worker > 0) {
        if (sched_getcpu() != visits->caller_runs)
            __atomic_add_fetch(&visits->elsewhere, 1, __ATOMIC_SEQ_CST);
        __atomic_add_fetch(&visits->of_helpers, 1, __ATOMIC_SEQ_CST);
    } else {
        for (int n = 0; n < 100 && !__atomic_load_n(&visits->of_helpers, __ATOMIC_SEQ_CST); n++) usleep(100);
    }
}

static struct visits share_waiting(int64_t items, int caller_runs) {
    struct visits visits = {caller_runs, 0, 0};
    const fa_team team = team_of(2, FASTATTN_THREADING_POOL);
    CHECK_STATUS(fastattn_for_each(items, &team, wait_for_helper, &visits), FASTATTN_OK);
    return visits;
}

/* All on one processor: helpers that came are in the way, and none is woken for a while. A long call, which begins meanwhile, wakes
 * them when that is over; and when they may go elsewhere, they do. */
TEST(threads_come_again_after_a_crowd) {
    enum { MOST = 500 }; /* calls, of which each gives up after a hundredth of a second */
    const struct processors p = two_processors();
    int came = 0;
    share_waiting(2, p.one);
    confine(&p.first, &p.first);
    for (int call = 0; call < MOST && !came; call++) came = share_waiting(2, p.one).of_helpers;
    CHECK(came, "nobody came while all had one processor");
    usleep(1000); /* they sleep */
    CHECK(share_waiting(MOST, p.one).of_helpers, "nobody came to a long call");
    confine(&p.all, &p.first);
    for (int call = 0; call < MOST; call++)
        if (share_waiting(2, p.one).elsewhere)
            return;
    CHECK(0, "helpers stay on the caller's processor");
}

#endif

struct gate {
    int waiting, open;
};

static void wait_at(const void *context, int64_t item, int worker) {
    struct gate *gate = (struct gate *)context;
    (void)item, (void)worker;
    __atomic_add_fetch(&gate->waiting, 1, __ATOMIC_SEQ_CST);
    while (!__atomic_load_n(&gate->open, __ATOMIC_SEQ_CST)) sched_yield();
}

static void *keep_all_busy(void *gate) {
    const fa_team team = team_of(3, FASTATTN_THREADING_POOL);
    CHECK_STATUS(fastattn_for_each(3, &team, wait_at, gate), FASTATTN_OK);
    return NULL;
}

/* Two callers hold whatever helpers there are; a third does not wait for them. */
TEST(threads_that_do_not_come_are_not_waited_for) {
    struct gate gate = {0, 0};
    pthread_t callers[2];
    for (size_t n = 0; n < COUNT(callers); n++)
        CHECK(pthread_create(&callers[n], NULL, keep_all_busy, &gate) == 0, "pthread_create");
    while (__atomic_load_n(&gate.waiting, __ATOMIC_SEQ_CST) < 4) sched_yield(); /* both, and two helpers at least */
    for (int round = 0; round < 20; round++) {
        struct roll roll = {{0}, {0}};
        const fa_team team = team_of(COUNT(roll.present), FASTATTN_THREADING_POOL);
        CHECK_STATUS(fastattn_for_each(100, &team, answer, &roll), FASTATTN_OK);
    }
    __atomic_store_n(&gate.open, 1, __ATOMIC_SEQ_CST);
    for (size_t n = 0; n < COUNT(callers); n++)
        pthread_join(callers[n], NULL);
}

static void *stop_often(void *open) {
    for (int round = 0; round < 20 || !__atomic_load_n((int *)open, __ATOMIC_SEQ_CST); round++) {
        fastattn_threads_stop();
        sched_yield();
    }
    return NULL;
}

static void *share_often(void *unused) {
    (void)unused;
    for (int round = 0; round < 100; round++) {
        struct roll roll = {{0}, {0}};
        const fa_team team = team_of(COUNT(roll.present), FASTATTN_THREADING_POOL);
        CHECK_STATUS(fastattn_for_each((int64_t)COUNT(roll.done), &team, answer, &roll), FASTATTN_OK);
        for (size_t n = 0; n < COUNT(roll.done); n++)
            CHECK(roll.done[n] == 1, "item %zu was done %d times", n, roll.done[n]);
    }
    return NULL;
}

TEST(threads_stop_and_start_again) {
    fastattn_threads_stop(); /* before there are any */
    share_often(NULL);
    fastattn_threads_stop();
    fastattn_threads_stop();
    share_often(NULL);
    fastattn_threads_stop();
}

TEST(threads_are_stopped_while_others_call) {
    pthread_t callers[3], stoppers[2];
    int over = 0;
    for (size_t n = 0; n < COUNT(callers); n++)
        CHECK(pthread_create(&callers[n], NULL, share_often, NULL) == 0, "pthread_create");
    for (size_t n = 0; n < COUNT(stoppers); n++)
        CHECK(pthread_create(&stoppers[n], NULL, stop_often, &over) == 0, "pthread_create");
    for (size_t n = 0; n < COUNT(callers); n++)
        pthread_join(callers[n], NULL);
    __atomic_store_n(&over, 1, __ATOMIC_SEQ_CST);
    for (size_t n = 0; n < COUNT(stoppers); n++)
        pthread_join(stoppers[n], NULL);
    fastattn_threads_stop();
}

#ifndef _WIN32 /* where processes do not fork */

static void compute_in_a_child(void) {
    const pid_t child = fork();
    CHECK(child >= 0, "fork");
    if (child == 0) {
        alarm(60);
        share_often(NULL);
        fastattn_threads_stop();
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0, "the child ended with status %#x", status);
}

static void skip_if_forks_may_not_thread(void) {
    if (getenv("TEST_UNDER_QEMU")) skip("qemu-user ends with an assertion when a forked child starts threads");
#if defined(__SANITIZE_THREAD__)
    skip("the thread sanitizer knows no threads after a fork");
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
    skip("the thread sanitizer knows no threads after a fork");
#endif
#endif
}

/* With idle helpers, and while other threads call and have helpers at work. */
TEST(threads_after_a_fork) {
    skip_if_forks_may_not_thread();
    pthread_t callers[2];
    share_often(NULL);
    compute_in_a_child();
    for (size_t n = 0; n < COUNT(callers); n++)
        CHECK(pthread_create(&callers[n], NULL, share_often, NULL) == 0, "pthread_create");
    for (int round = 0; round < 5; round++)
        compute_in_a_child();
    for (size_t n = 0; n < COUNT(callers); n++)
        pthread_join(callers[n], NULL);
    share_often(NULL);
}

#endif
