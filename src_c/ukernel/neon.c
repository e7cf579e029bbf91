/* The micro-kernels for AArch64, whose baseline has Advanced SIMD with fused multiply-add, and beside them the products of the
 * extensions bf16, dotprod and fp16fml. */
#include "ukernel.h"

#ifdef FA_HOLDS_NEON

#include "../simd/neon.h"
#include "template.h"

FA_FEW_QUANTISED(neon, FASTATTN_ISA_NEON, 64)
FA_TABLE(neon, FASTATTN_ISA_NEON, 64, &neon_few_quantised)

#include "target_bf16.h"
#include "bfdot.h"
#include "target_end.h"

#include "fmlal.h"

#ifdef SIMD_BYTES
const fa_products fastattn_products_bytes_neon =
    FA_QUANTISED_ROWS("bytes_rows_neon", FASTATTN_ISA_NEON, 64, FA_QUANTISED(fastattn_quantised_pack_sdot), fastattn_quantised_qk_sdot,
                      fastattn_quantised_pv_sdot);
#endif

#endif
