#if (defined(__linux__) || defined(__EMSCRIPTEN__)) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* sched_getcpu, clock_gettime and sysconf */
#endif
#include "thread.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>
void fastattn_pause(void) { _mm_pause(); }
#elif defined(__aarch64__) && defined(__GNUC__)
void fastattn_pause(void) { __asm__ volatile("yield"); }
#else
void fastattn_pause(void) {}
#endif

#ifdef _WIN32

#include <process.h>

static unsigned __stdcall call(void *run) {
    ((void (*)(void))(uintptr_t)run)();
    return 0;
}

int fastattn_thread_start(fa_thread *thread, void (*run)(void)) {
    *thread = (HANDLE)_beginthreadex(NULL, 0, call, (void *)(uintptr_t)run, 0, NULL);
    return *thread != NULL;
}

void fastattn_thread_join(fa_thread thread) {
    WaitForSingleObject(thread, INFINITE);
    CloseHandle(thread);
}

void fastattn_thread_at_fork(void (*before)(void), void (*in_parent)(void), void (*in_child)(void)) {
    (void)before, (void)in_parent, (void)in_child;
}

int fastattn_processors(void) {
    SYSTEM_INFO system;
    GetSystemInfo(&system);
    return (int)system.dwNumberOfProcessors;
}

int fastattn_processor(void) { return (int)GetCurrentProcessorNumber(); }

void fastattn_keep_off(int processor, fa_affinity *mine) { (void)processor, (void)mine; }

int64_t fastattn_clock(void) {
    LARGE_INTEGER ticks, a_second;
    QueryPerformanceCounter(&ticks);
    QueryPerformanceFrequency(&a_second);
    return (int64_t)((double)ticks.QuadPart / (double)a_second.QuadPart * 1e9);
}

#else

#include <sched.h>
#include <signal.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static void *call(void *run) {
    ((void (*)(void))(uintptr_t)run)();
    return NULL;
}

int fastattn_thread_start(fa_thread *thread, void (*run)(void)) {
    static const int of_the_thread[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGPROF};
    sigset_t others, found;
    sigfillset(&others);
    for (unsigned n = 0; n < sizeof of_the_thread / sizeof *of_the_thread; n++) sigdelset(&others, of_the_thread[n]);
    pthread_sigmask(SIG_SETMASK, &others, &found); /* a new thread has the mask of the one that starts it */
    const int error = pthread_create(thread, NULL, call, (void *)(uintptr_t)run);
    pthread_sigmask(SIG_SETMASK, &found, NULL);
    return error == 0;
}

void fastattn_thread_join(fa_thread thread) { pthread_join(thread, NULL); }

void fastattn_thread_at_fork(void (*before)(void), void (*in_parent)(void), void (*in_child)(void)) {
    pthread_atfork(before, in_parent, in_child);
}

int fastattn_processors(void) {
    const long count = sysconf(_SC_NPROCESSORS_ONLN);
    return count < 1 ? 1 : (int)count;
}

#ifdef __linux__

int fastattn_processor(void) { return sched_getcpu(); }

void fastattn_keep_off(int processor, fa_affinity *mine) {
    cpu_set_t set;
    if (processor < 0 || sizeof set != sizeof mine->found || sched_getaffinity(0, sizeof set, &set) != 0) return;
    if (memcmp(&set, mine->left, sizeof set) != 0) memcpy(mine->found, &set, sizeof set); /* at first, or since others have set it */
    memcpy(&set, mine->found, sizeof set);
    CPU_CLR((unsigned)processor, &set);
    memcpy(mine->left, &set, sizeof set);
    if (CPU_COUNT(&set) > 0) sched_setaffinity(0, sizeof set, &set);
}

#else

int fastattn_processor(void) { return -1; }

void fastattn_keep_off(int processor, fa_affinity *mine) { (void)processor, (void)mine; }

#endif

int64_t fastattn_clock(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

#endif
