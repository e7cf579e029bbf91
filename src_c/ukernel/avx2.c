/* The micro-kernels for x86-64 with AVX2, FMA and F16C. */
#include "ukernel.h"

#ifdef FA_HOLDS_AVX2

#include "target_avx2.h"

#include "../simd/avx2.h"
#include "template.h"

FA_FEW_QUANTISED(avx2, FASTATTN_ISA_AVX2, 64)
FA_TABLE(avx2, FASTATTN_ISA_AVX2, 64, &avx2_few_quantised)

#include "target_end.h"

#endif
