/* The micro-kernels for AArch64, whose baseline has Advanced SIMD with fused multiply-add, and beside them the products of the
 * extension bf16. */
#include "ukernel.h"

#ifdef FA_HOLDS_NEON

#include "../simd/neon.h"
#include "template.h"

FA_FEW_QUANTISED(neon, FASTATTN_ISA_NEON, 64)
FA_TABLE(neon, FASTATTN_ISA_NEON, 64, &neon_few_quantised)

#include "target_bf16.h"
#include "bfdot.h"
#include "target_end.h"

#endif
