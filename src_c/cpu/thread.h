/* Threads of the system, POSIX's or Windows', reduced to what a pool needs. */
#ifndef FA_THREAD_H
#define FA_THREAD_H

#include <stdint.h>

#ifdef _WIN32

#ifndef WIN32_LEAN_AND_MEAN
#define WIN32_LEAN_AND_MEAN
#endif
#include <windows.h>

typedef HANDLE fa_thread;
typedef SRWLOCK fa_mutex;
typedef CONDITION_VARIABLE fa_condition;
#define FA_MUTEX_FREE SRWLOCK_INIT
#define FA_CONDITION_NEW CONDITION_VARIABLE_INIT

static inline void fa_lock(fa_mutex *m) { AcquireSRWLockExclusive(m); }
static inline void fa_unlock(fa_mutex *m) { ReleaseSRWLockExclusive(m); }
static inline void fa_wait(fa_condition *c, fa_mutex *m) { SleepConditionVariableSRW(c, m, INFINITE, 0); }
static inline void fa_wake_one(fa_condition *c) { WakeConditionVariable(c); }
static inline void fa_wake_all(fa_condition *c) { WakeAllConditionVariable(c); }

#else

#include <pthread.h>

typedef pthread_t fa_thread;
typedef pthread_mutex_t fa_mutex;
typedef pthread_cond_t fa_condition;
#define FA_MUTEX_FREE PTHREAD_MUTEX_INITIALIZER
#define FA_CONDITION_NEW PTHREAD_COND_INITIALIZER

static inline void fa_lock(fa_mutex *m) { pthread_mutex_lock(m); }
static inline void fa_unlock(fa_mutex *m) { pthread_mutex_unlock(m); }
static inline void fa_wait(fa_condition *c, fa_mutex *m) { pthread_cond_wait(c, m); }
static inline void fa_wake_one(fa_condition *c) { pthread_cond_signal(c); }
static inline void fa_wake_all(fa_condition *c) { pthread_cond_broadcast(c); }

#endif

/* Starts a thread that leaves the program's signals to others; 0 when the system has none to give. */
int fastattn_thread_start(fa_thread *thread, void (*run)(void));

/* Returns when the thread has ended. */
void fastattn_thread_join(fa_thread thread);

/* Has `before` called ahead of every fork of the process, and the others after it, in the parent and in the child. Where
 * processes do not fork nothing is to be done. */
void fastattn_thread_at_fork(void (*before)(void), void (*in_parent)(void), void (*in_child)(void));

/* Processors that are switched on. */
int fastattn_processors(void);

/* The number of the processor that runs this thread at the moment, or -1 where the system does not tell. */
int fastattn_processor(void);

/* Where this thread may run: as it was found, and as fastattn_keep_off has left it. Zeros at first. */
typedef struct fa_affinity {
    uint64_t found[16], left[16]; /* a bit for each processor */
} fa_affinity;

/* Has this thread run on another processor from now on, among those that it may use, if there is one and the system is Linux; the
 * processor given last is free for it again. */
void fastattn_keep_off(int processor, fa_affinity *mine);

/* Nanoseconds since some moment. */
int64_t fastattn_clock(void);

/* Tells the processor that this thread is waiting for another. */
void fastattn_pause(void);

#endif
