/* The kernels of layers for WebAssembly with SIMD128. */
#include "ukernel.h"

#if defined(FA_HOLDS_WASM) && defined(FASTATTN_LAYERS)

#include "../simd/wasm.h"
#include "layers_template.h"

FA_LAYERS_TABLE(wasm)

#endif
