/* The kernels of quantised rows for x86-64 with AVX-512. */
#include "ukernel.h"

#ifdef FA_HOLDS_AVX512

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#include "../simd/avx512.h"
#include "quantised_template.h"

FA_QUANTISED_TABLE(avx512)

#include "quantised_dot.h"

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

#endif
