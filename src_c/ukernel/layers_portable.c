/* The kernels of layers in plain C. */
#include "ukernel.h"

#if defined(FA_HOLDS_PORTABLE) && defined(FASTATTN_LAYERS)

#include "../simd/portable.h"
#include "layers_template.h"

FA_LAYERS_TABLE(portable)

#endif
