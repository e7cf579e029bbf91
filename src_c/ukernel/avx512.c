/* The micro-kernels for x86-64 with AVX-512 F, BW, DQ and VL, and beside them the products
 * of AVX512-BF16, AVX512-VNNI and AMX tiles. */
#include "ukernel.h"

#ifdef FA_HOLDS_AVX512

#include "target_avx512.h"

#include "../simd/avx512.h"
#include "template.h"

FA_FEW_QUANTISED(avx512, FASTATTN_ISA_AVX512, 64)
FA_TABLE(avx512, FASTATTN_ISA_AVX512, 64, &avx512_few_quantised)

#include "pairs.h"
#include "dot.h"
#include "rounded.h"
#include "fixed.h"
#include "amx.h"

#ifdef FA_HOLDS_AVX512_VNNI
const fa_products fastattn_products_bytes_avx512 =
    FA_QUANTISED_ROWS("bytes_rows_avx512", FASTATTN_ISA_AVX512, 64, FA_QUANTISED(fastattn_quantised_pack_vnni),
                      fastattn_quantised_qk_vnni, fastattn_quantised_pv_vnni);
#endif

#include "target_end.h"

#endif
