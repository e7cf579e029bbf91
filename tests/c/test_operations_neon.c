/* The operations of simd/neon.h. */
#include "ukernel/ukernel.h"

#ifdef FA_HOLDS_NEON

#include "simd/neon.h"

#include "operations.h"

TEST(operations_of_neon) { check_operations(); }

#endif
