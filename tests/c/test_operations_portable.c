/* The operations of simd/portable.h. */
#include "simd/portable.h"

#include "operations.h"

TEST(operations_of_portable) { check_operations(); }
