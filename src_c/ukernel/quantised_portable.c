/* The kernels of quantised rows in plain C. */
#include "ukernel.h"

#ifndef FASTATTN_NO_QUANTISED

#include "../simd/portable.h"
#include "quantised_template.h"

FA_QUANTISED_TABLE(portable)

#endif
