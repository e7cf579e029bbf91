/* Numbers that several threads change at once, in the one order that is easy to reason about (sequential consistency): they are
 * touched once for each item of work, beside which that is nothing. C11's _Atomic would not do for C99 and older MSVC. */
#ifndef FA_ATOMIC_H
#define FA_ATOMIC_H

#include <stdint.h>

#if defined(_MSC_VER) && !defined(__clang__)

#include <intrin.h>

static inline int64_t fa_atomic_add(int64_t *at, int64_t n) { return _InterlockedExchangeAdd64((volatile __int64 *)at, n); }
static inline int64_t fa_atomic_load(int64_t *at) { return _InterlockedExchangeAdd64((volatile __int64 *)at, 0); }
static inline void fa_atomic_store(int64_t *at, int64_t n) { _InterlockedExchange64((volatile __int64 *)at, n); }

#else

/* Returns what was there before. */
static inline int64_t fa_atomic_add(int64_t *at, int64_t n) { return __atomic_fetch_add(at, n, __ATOMIC_SEQ_CST); }
static inline int64_t fa_atomic_load(int64_t *at) { return __atomic_load_n(at, __ATOMIC_SEQ_CST); }
static inline void fa_atomic_store(int64_t *at, int64_t n) { __atomic_store_n(at, n, __ATOMIC_SEQ_CST); }

#endif

#endif
