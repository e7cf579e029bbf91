/* The kernels of quantised rows for x86-64 with AVX2, FMA and F16C. */
#include "ukernel.h"

#if defined(FA_HOLDS_AVX2) && !defined(FASTATTN_NO_QUANTISED)

#include "target_avx2.h"

#include "../simd/avx2.h"
#include "quantised_template.h"

FA_QUANTISED_TABLE(avx2)
FA_QUANTISED_PRODUCTS(avx2)

#include "target_end.h"

#endif
