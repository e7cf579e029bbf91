/* The kernels of quantised rows for AArch64, and beside them those of the extension dotprod. */
#include "ukernel.h"

#if defined(FA_HOLDS_NEON) && !defined(FASTATTN_NO_QUANTISED)

#include "../simd/neon.h"
#include "quantised_template.h"

FA_QUANTISED_TABLE(neon)
FA_QUANTISED_PRODUCTS(neon)

#include "quantised_sdot.h"

#endif
