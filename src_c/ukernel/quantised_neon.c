/* The kernels of quantised rows for AArch64. */
#include "ukernel.h"

#ifdef FA_HOLDS_NEON

#include "../simd/neon.h"
#include "quantised_template.h"

FA_QUANTISED_TABLE(neon)

#endif
