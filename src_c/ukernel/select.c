/* Which table of micro-kernels runs. */
#include "../cpu/cpu.h"
#include "ukernel.h"

#ifdef FA_HOLDS_AVX512
static const fa_ukernel *avx512(void) {
#ifdef FA_HOLDS_AVX512_BF16
    if (fastattn_cpu_has(FA_CPU_AVX512_BF16)) return &fastattn_ukernel_avx512_bf16;
#endif
    return &fastattn_ukernel_avx512;
}
#endif

const fa_ukernel *fastattn_ukernel_select(fastattn_isa limit) {
    if (limit == FASTATTN_ISA_BEST) {
        static const fastattn_isa best_first[] = {FASTATTN_ISA_AVX512, FASTATTN_ISA_AVX2, FASTATTN_ISA_NEON, FASTATTN_ISA_WASM};
        for (size_t i = 0; i < sizeof best_first / sizeof *best_first; i++) {
            const fa_ukernel *uk = fastattn_ukernel_select(best_first[i]);
            if (uk) return uk;
        }
        return fastattn_ukernel_select(FASTATTN_ISA_PORTABLE);
    }
    switch (limit) {
#ifdef FA_HOLDS_PORTABLE
    case FASTATTN_ISA_PORTABLE: return &fastattn_ukernel_portable;
#endif
#ifdef FA_HOLDS_AVX2
    case FASTATTN_ISA_AVX2: return fastattn_cpu_has(FA_CPU_AVX2) ? &fastattn_ukernel_avx2 : NULL;
#endif
#ifdef FA_HOLDS_AVX512
    case FASTATTN_ISA_AVX512: return fastattn_cpu_has(FA_CPU_AVX512) ? avx512() : NULL;
#endif
#ifdef FA_HOLDS_AMX
    case FASTATTN_ISA_AMX: return fastattn_cpu_has(FA_CPU_AVX512 | FA_CPU_AMX) ? avx512() : NULL;
#endif
#ifdef FA_HOLDS_NEON
    case FASTATTN_ISA_NEON: return &fastattn_ukernel_neon;
#endif
#ifdef FA_HOLDS_WASM
    case FASTATTN_ISA_WASM: return &fastattn_ukernel_wasm;
#endif
    default: return NULL;
    }
}

const fa_products *fastattn_products_select(const fa_ukernel *uk, fastattn_isa limit, fastattn_dtype q_dtype, fastattn_precision precision,
                                            int invariant) {
    if (q_dtype == FASTATTN_FLOAT32 && precision == FASTATTN_PRECISION_HIGHEST) return uk->products;
#ifdef FA_HOLDS_AMX
    if (!invariant && (limit == FASTATTN_ISA_BEST || limit == FASTATTN_ISA_AMX) && fastattn_ukernel_select(FASTATTN_ISA_AMX)) {
        if (q_dtype == FASTATTN_BFLOAT16 || precision == FASTATTN_PRECISION_MEDIUM) return &fastattn_products_bfloat16_amx;
        if (precision == FASTATTN_PRECISION_HIGH) return &fastattn_products_bfloat16x3_amx;
        if (q_dtype == FASTATTN_FLOAT16) return &fastattn_products_float16_amx;
    }
#endif
#ifdef FA_HOLDS_AVX512
    if (limit == FASTATTN_ISA_BEST || limit == FASTATTN_ISA_AVX512 || limit == FASTATTN_ISA_AMX) {
        const int exact = q_dtype == FASTATTN_BFLOAT16, medium = precision == FASTATTN_PRECISION_MEDIUM && !invariant;
        (void)exact, (void)medium;
#ifdef FA_HOLDS_AVX512_BF16
        if ((exact || medium) && fastattn_cpu_has(FA_CPU_FAST_BF16)) return &fastattn_products_bfloat16_avx512;
#endif
#ifdef FA_HOLDS_AVX512_VNNI
        if (!exact && medium && fastattn_cpu_has(FA_CPU_AVX512_VNNI)) return &fastattn_products_int16_avx512;
#endif
    }
#elif defined(FA_HOLDS_NEON) && defined(__GNUC__)
    if (!invariant && (limit == FASTATTN_ISA_BEST || limit == FASTATTN_ISA_NEON) && fastattn_cpu_has(FA_CPU_BFDOT) &&
        (q_dtype == FASTATTN_BFLOAT16 || precision == FASTATTN_PRECISION_MEDIUM))
        return &fastattn_products_bfloat16_neon;
#else
    (void)limit, (void)invariant;
#endif
    return uk->products;
}

const fa_products *fastattn_few_select(const fa_ukernel *uk, const fa_products *products, fastattn_isa limit, fastattn_dtype q_dtype,
                                       fastattn_dtype kv_dtype) {
    if (products->few && q_dtype == FASTATTN_BFLOAT16 && kv_dtype == FASTATTN_BFLOAT16) return products->few;
#ifdef FA_HOLDS_FMLAL
    if (q_dtype == FASTATTN_FLOAT16 && kv_dtype == FASTATTN_FLOAT16 && (limit == FASTATTN_ISA_BEST || limit == FASTATTN_ISA_NEON) &&
        fastattn_cpu_has(FA_CPU_FMLAL))
        return &fastattn_products_float16_neon;
#else
    (void)limit;
#endif
    return uk->few;
}

const fa_products *fastattn_quantised_select(const fa_ukernel *uk, fastattn_isa limit, fastattn_dtype q_dtype, fastattn_precision precision) {
#ifdef FA_HOLDS_AVX512_VNNI
    const int halves = q_dtype != FASTATTN_FLOAT32 || precision == FASTATTN_PRECISION_MEDIUM;
    if (halves && (limit == FASTATTN_ISA_BEST || limit == FASTATTN_ISA_AVX512 || limit == FASTATTN_ISA_AMX) &&
        fastattn_cpu_has(FA_CPU_AVX512_VNNI))
        return &fastattn_products_bytes_avx512;
#elif defined(FA_HOLDS_NEON) && defined(__GNUC__)
    const int halves = q_dtype != FASTATTN_FLOAT32 || precision == FASTATTN_PRECISION_MEDIUM;
    if (halves && (limit == FASTATTN_ISA_BEST || limit == FASTATTN_ISA_NEON) && fastattn_cpu_has(FA_CPU_DOTPROD))
        return &fastattn_products_bytes_neon;
#else
    (void)limit, (void)q_dtype, (void)precision;
#endif
    return uk->few_quantised;
}
