/* The kernels of layers in plain C. */
#include "ukernel.h"

#ifdef FA_HOLDS_PORTABLE

#include "../simd/portable.h"
#include "layers_template.h"

FA_LAYERS_TABLE(portable)

#endif
