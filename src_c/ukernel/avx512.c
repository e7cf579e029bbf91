/* The micro-kernels for x86-64 with AVX-512 F, BW, DQ and VL, and beside them the products
 * of AVX512-BF16, AVX512-VNNI and AMX tiles. */
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
#include "template.h"

FA_TABLE(avx512, FASTATTN_ISA_AVX512, 64)

#include "pairs.h"
#include "dot.h"
#include "fixed.h"
#include "amx.h"

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

#endif
