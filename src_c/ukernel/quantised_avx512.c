/* The kernels of quantised rows for x86-64 with AVX-512. */
#include "ukernel.h"

#if defined(FA_HOLDS_AVX512) && !defined(FASTATTN_NO_QUANTISED)

#include "target_avx512.h"

#include "../simd/avx512.h"
#include "quantised_template.h"

FA_QUANTISED_TABLE(avx512)
FA_QUANTISED_PRODUCTS(avx512)

#include "quantised_bytes.h"

#include "target_end.h"

#endif
