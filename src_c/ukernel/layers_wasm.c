/* The kernels of layers for WebAssembly with SIMD128. */
#include "ukernel.h"

#ifdef FA_HOLDS_WASM

#include "../simd/wasm.h"
#include "layers_template.h"

FA_LAYERS_TABLE(wasm)

#endif
