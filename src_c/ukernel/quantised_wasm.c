/* The kernels of quantised rows for WebAssembly with SIMD128. */
#include "ukernel.h"

#if defined(FA_HOLDS_WASM) && !defined(FASTATTN_NO_QUANTISED)

#include "../simd/wasm.h"
#include "quantised_template.h"

FA_QUANTISED_TABLE(wasm)
FA_QUANTISED_PRODUCTS(wasm)

#endif
