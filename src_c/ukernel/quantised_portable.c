/* The kernels of quantised rows in plain C. */
#include "../simd/portable.h"
#include "quantised_template.h"

FA_QUANTISED_TABLE(portable)
