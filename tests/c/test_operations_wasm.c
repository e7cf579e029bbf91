/* The operations of simd/wasm.h. */
#include "ukernel/ukernel.h"

#ifdef FA_HOLDS_WASM

#include "simd/wasm.h"

#include "operations.h"

TEST(operations_of_wasm) { check_operations(); }

#endif
