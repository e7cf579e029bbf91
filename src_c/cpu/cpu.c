#include "cpu.h"

#if defined(__x86_64__) || defined(_M_X64)

#include <stdatomic.h>
#include <stdint.h>
#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
static void cpuid(uint32_t leaf, uint32_t subleaf, uint32_t r[4]) { __cpuidex((int *)r, (int)leaf, (int)subleaf); }
static uint64_t xcr0(void) { return _xgetbv(0); }
#else
#include <cpuid.h>
static void cpuid(uint32_t leaf, uint32_t subleaf, uint32_t r[4]) {
    __cpuid_count(leaf, subleaf, r[0], r[1], r[2], r[3]);
}
static uint64_t xcr0(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}
#endif

static int has(uint32_t word, int bit) { return (int)(word >> bit & 1u); }

static unsigned detect(void) {
    enum { EAX, EBX, ECX, EDX };
    uint32_t top[4], one[4], seven[4];
    cpuid(0, 0, top);
    if (top[EAX] < 7) return 0;
    cpuid(1, 0, one);
    cpuid(7, 0, seven);
    if (!has(one[ECX], 27)) return 0; /* OSXSAVE: xgetbv may be asked */
    const uint64_t ymm = 0x06, zmm = 0xe6, saved = xcr0();
    unsigned features = 0;
    if ((saved & ymm) == ymm && has(one[ECX], 12) /* FMA */ && has(one[ECX], 29) /* F16C */ && has(seven[EBX], 5))
        features |= FA_CPU_AVX2;
    if (features && (saved & zmm) == zmm && has(seven[EBX], 16) /* F */ && has(seven[EBX], 17) /* DQ */ &&
        has(seven[EBX], 30) /* BW */ && has(seven[EBX], 31) /* VL */)
        features |= FA_CPU_AVX512;
    return features;
}

int fastattn_cpu_has(unsigned features) {
    /* Threads may race to store it, all with the same value. */
    enum { KNOWN = 1 << 30 };
    static _Atomic unsigned cached;
    unsigned now = atomic_load_explicit(&cached, memory_order_relaxed);
    if (!now) {
        now = detect() | KNOWN;
        atomic_store_explicit(&cached, now, memory_order_relaxed);
    }
    return (now & features) == features;
}

#else

int fastattn_cpu_has(unsigned features) { return features == 0; }

#endif
