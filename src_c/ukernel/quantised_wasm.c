/* The kernels of quantised rows for WebAssembly with SIMD128. */
#include "ukernel.h"

#ifdef FA_HOLDS_WASM

#include "../simd/wasm.h"
#include "quantised_template.h"

FA_QUANTISED_TABLE(wasm)

#endif
