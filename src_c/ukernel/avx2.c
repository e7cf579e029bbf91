/* The micro-kernels for x86-64 with AVX2, FMA and F16C. */
#include "ukernel.h"

#ifdef FA_HOLDS_AVX2

#include "target_avx2.h"

#include "../simd/avx2.h"
#include "template.h"

FA_TABLE(avx2, FASTATTN_ISA_AVX2, 64)

#include "target_end.h"

#endif
