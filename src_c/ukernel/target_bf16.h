/* From here to target_end.h functions may use the extension bf16 of AArch64, with whatever flags the compiler is called. */
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("bf16"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#endif
