/* The operations of simd/avx2.h. */
#include "ukernel/ukernel.h"

#ifdef FA_HOLDS_AVX2

#include "ukernel/target_avx2.h"

#include "simd/avx2.h"

#include "operations.h"

#include "ukernel/target_end.h"

TEST(operations_of_avx2) {
    if (!fastattn_isa_available(FASTATTN_ISA_AVX2)) skip("no AVX2");
    check_operations();
}

#endif
