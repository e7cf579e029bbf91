/* The end of what target_avx2.h, target_avx512.h or target_bf16.h has begun. */
#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif
