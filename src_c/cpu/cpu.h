/* What this processor and its system can run. */
#ifndef FA_CPU_H
#define FA_CPU_H

enum {
    FA_CPU_AVX2 = 1,   /* AVX2, FMA, F16C and the system saves ymm registers */
    FA_CPU_AVX512 = 2, /* AVX-512 F, BW, DQ, VL and the system saves zmm and mask registers */
    FA_CPU_AMX = 4,    /* AMX tiles of bfloat16, and the system lets this process use them */
    FA_CPU_AVX512_BF16 = 8,
    FA_CPU_AVX512_VNNI = 32,
    /* The extensions bf16, dotprod and fp16fml of AArch64, which Linux tells of; elsewhere the compiler, if all that it makes programs
     * for have them. */
    FA_CPU_BFDOT = 64,
    FA_CPU_DOTPROD = 128,
    FA_CPU_FMLAL = 256,
    FA_CPU_FAST_BF16 = 16 /* AVX512-BF16 that outruns float32: AMD's. On Sapphire and Emerald Rapids an instruction for two
                             multiplications takes the time of four float32 ones */
};

/* 1 when all of these features are there. The answer is found once and kept. */
int fastattn_cpu_has(unsigned features);

#endif
