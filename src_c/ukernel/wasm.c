/* The micro-kernels for WebAssembly with SIMD128, which a module has or has not (-msimd128): nothing is found out when it runs. */
#include "ukernel.h"

#ifdef FA_HOLDS_WASM

#include "../simd/wasm.h"
#include "template.h"

FA_FEW_QUANTISED(wasm, FASTATTN_ISA_WASM, 64)
FA_TABLE(wasm, FASTATTN_ISA_WASM, 64, &wasm_few_quantised)

#endif
