/* The kernels of layers for AArch64. */
#include "ukernel.h"

#if defined(FA_HOLDS_NEON) && defined(FASTATTN_LAYERS)

#include "../simd/neon.h"
#include "layers_template.h"

FA_LAYERS_TABLE(neon)

#endif
