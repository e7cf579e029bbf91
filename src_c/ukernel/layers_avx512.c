/* The kernels of layers for x86-64 with AVX-512. */
#include "ukernel.h"

#if defined(FA_HOLDS_AVX512) && defined(FASTATTN_LAYERS)

#include "target_avx512.h"

#include "../simd/avx512.h"
#include "layers_template.h"

FA_LAYERS_TABLE(avx512)

#include "target_end.h"

#endif
