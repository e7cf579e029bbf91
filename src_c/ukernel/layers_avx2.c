/* The kernels of layers for x86-64 with AVX2, FMA and F16C. */
#include "ukernel.h"

#if defined(FA_HOLDS_AVX2) && defined(FASTATTN_LAYERS)

#include "target_avx2.h"

#include "../simd/avx2.h"
#include "layers_template.h"

FA_LAYERS_TABLE(avx2)

#include "target_end.h"

#endif
