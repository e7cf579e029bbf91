/* The kernels of layers for AArch64. */
#include "ukernel.h"

#ifdef FA_HOLDS_NEON

#include "../simd/neon.h"
#include "layers_template.h"

FA_LAYERS_TABLE(neon)

#endif
