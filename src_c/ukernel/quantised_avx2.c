/* The kernels of quantised rows for x86-64 with AVX2, FMA and F16C. */
#include "ukernel.h"

#ifdef FA_HOLDS_AVX2

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "../simd/avx2.h"
#include "quantised_template.h"

FA_QUANTISED_TABLE(avx2)

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

#endif
