/* The floating-point environment of a thread: rounding, flushing of subnormal numbers, exception flags.
 *
 * Results must not depend on what a caller or a pool of threads has set, and the caller must find it all as it was, so the
 * library computes between fa_fpenv_default and fa_fpenv_restore. On x86-64 that is one register, MXCSR; <fenv.h> would
 * save the x87 unit as well, which nothing here uses, at half the price of a small call. */
#ifndef FA_FPENV_H
#define FA_FPENV_H

#if defined(__x86_64__) || defined(_M_X64)

#include <xmmintrin.h>

typedef unsigned fa_fpenv;

static inline fa_fpenv fa_fpenv_default(void) {
    const unsigned found = _mm_getcsr(), all_exceptions_masked = 0x1f80;
    _mm_setcsr(all_exceptions_masked);
    return found;
}

static inline void fa_fpenv_restore(fa_fpenv found) { _mm_setcsr(found); }

#elif defined(__aarch64__) && defined(__GNUC__)

#include <stdint.h>

/* <fenv.h> may leave FZ16 as it is, by which FMLAL takes subnormal numbers of float16 for 0. */
typedef struct fa_fpenv {
    uint64_t control, status;
} fa_fpenv;

static inline fa_fpenv fa_fpenv_default(void) {
    fa_fpenv found;
    __asm__ volatile("mrs %0, fpcr\n\tmrs %1, fpsr\n\tmsr fpcr, xzr" : "=r"(found.control), "=r"(found.status) : : "memory");
    return found;
}

static inline void fa_fpenv_restore(fa_fpenv found) {
    __asm__ volatile("msr fpcr, %0\n\tmsr fpsr, %1" : : "r"(found.control), "r"(found.status) : "memory");
}

#else

#include <fenv.h>

typedef fenv_t fa_fpenv;

static inline fa_fpenv fa_fpenv_default(void) {
    fenv_t found;
    fegetenv(&found);
    fesetenv(FE_DFL_ENV);
    return found;
}

static inline void fa_fpenv_restore(fa_fpenv found) { fesetenv(&found); }

#endif

#endif
