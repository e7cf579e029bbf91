#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* syscall */
#endif
#include "cpu.h"

#if defined(__x86_64__) || defined(_M_X64)

#include <stdint.h>
#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
static void cpuid(uint32_t leaf, uint32_t subleaf, uint32_t r[4]) { __cpuidex((int *)r, (int)leaf, (int)subleaf); }
static uint64_t xcr0(void) { return _xgetbv(0); }
#else
#include <cpuid.h>
static void cpuid(uint32_t leaf, uint32_t subleaf, uint32_t r[4]) { __cpuid_count(leaf, subleaf, r[0], r[1], r[2], r[3]); }
static uint64_t xcr0(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}
#endif

static int has(uint32_t word, int bit) { return (int)(word >> bit & 1u); }

/* Linux grants the 8 KiB of tile state once per process, for those who ask. Others would have to be known first; and a compiler
 * without inline assembly has no kernels for tiles. */
#if defined(__linux__) && defined(__GNUC__) && !defined(FASTATTN_NO_AMX)
#include <sys/syscall.h>
#include <unistd.h>
static int tiles_granted(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#else
static int tiles_granted(void) { return 0; }
#endif

static int has_amx(uint32_t seven_edx, uint64_t saved) {
#ifdef FASTATTN_ASSUME_AMX /* for tests on an emulator, which cpuid does not know of */
    (void)seven_edx, (void)saved;
    return tiles_granted();
#else
    const uint64_t tiles = 0x60000;
    return (saved & tiles) == tiles && has(seven_edx, 22) /* BF16 */ && has(seven_edx, 24) /* TILE */ && tiles_granted();
#endif
}

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
    if ((saved & ymm) == ymm && has(one[ECX], 12) /* FMA */ && has(one[ECX], 29) /* F16C */ && has(seven[EBX], 5)) features |= FA_CPU_AVX2;
    if (features && (saved & zmm) == zmm && has(seven[EBX], 16) /* F */ && has(seven[EBX], 17) /* DQ */ && has(seven[EBX], 30) /* BW */ &&
        has(seven[EBX], 31) /* VL */)
        features |= FA_CPU_AVX512;
    if (features & FA_CPU_AVX512 && has(seven[ECX], 11)) features |= FA_CPU_AVX512_VNNI;
    uint32_t seven_one[4] = {0};
    if (seven[EAX] >= 1) cpuid(7, 1, seven_one);
    if (features & FA_CPU_AVX512 && has(seven_one[EAX], 5)) {
        const uint32_t amd[] = {0x68747541, 0x444d4163, 0x69746e65}; /* AuthenticAMD */
        features |= FA_CPU_AVX512_BF16;
        if (top[EBX] == amd[0] && top[ECX] == amd[1] && top[EDX] == amd[2]) features |= FA_CPU_FAST_BF16;
    }
    if (features & FA_CPU_AVX512 && has_amx(seven[EDX], saved)) features |= FA_CPU_AMX;
    return features;
}

#elif defined(__aarch64__) && defined(__linux__)

#include <sys/auxv.h>
static unsigned detect(void) {
    /* HWCAP_ASIMDDP, HWCAP_ASIMDFHM and HWCAP2_BF16, which older headers do not name. */
    const unsigned long dotprod = 1ul << 20, fp16fml = 1ul << 23, bf16 = 1ul << 14, found = getauxval(AT_HWCAP);
    return (found & dotprod ? FA_CPU_DOTPROD : 0) | (found & fp16fml ? FA_CPU_FMLAL : 0) | (getauxval(AT_HWCAP2) & bf16 ? FA_CPU_BFDOT : 0);
}

#elif defined(__aarch64__)

static unsigned detect(void) {
    unsigned features = 0;
#ifdef __ARM_FEATURE_DOTPROD
    features |= FA_CPU_DOTPROD;
#endif
#ifdef __ARM_FEATURE_FP16_FML
    features |= FA_CPU_FMLAL;
#endif
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
    features |= FA_CPU_BFDOT;
#endif
    return features;
}

#else

static unsigned detect(void) { return 0; }

#endif

/* One word, found once. Threads may race to store it, all with the same value; C99 has no _Atomic. Finding it stays apart, so that it
 * costs nothing where it is known. */
#if defined(__GNUC__)
#define APART __attribute__((noinline))
static unsigned cached;
static unsigned recall(void) { return __atomic_load_n(&cached, __ATOMIC_RELAXED); }
static void keep(unsigned features) { __atomic_store_n(&cached, features, __ATOMIC_RELAXED); }
#else
#define APART
static volatile unsigned cached;
static unsigned recall(void) { return cached; }
static void keep(unsigned features) { cached = features; }
#endif

static APART unsigned find(void) {
    const unsigned known = 1u << 30, features = detect() | known;
    keep(features);
    return features;
}

int fastattn_cpu_has(unsigned features) {
    const unsigned now = recall();
    return ((now ? now : find()) & features) == features;
}
