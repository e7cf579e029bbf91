/* The kernels of quantised rows in plain C. */
#include "ukernel.h"

#if defined(FA_HOLDS_PORTABLE) && !defined(FASTATTN_NO_QUANTISED)

#include "../simd/portable.h"
#include "quantised_template.h"

FA_QUANTISED_TABLE(portable)

#endif
