/* The micro-kernels for AArch64, whose baseline has Advanced SIMD with fused multiply-add. */
#include "ukernel.h"

#ifdef FA_HOLDS_NEON

#include "../simd/neon.h"
#include "template.h"

FA_TABLE(neon, FASTATTN_ISA_NEON, 64)

#endif
