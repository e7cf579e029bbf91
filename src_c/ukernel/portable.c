/* The micro-kernels in plain C: the reference for the others, and what runs where none of them does. */
#include "ukernel.h"

#ifdef FA_HOLDS_PORTABLE

#include "../simd/portable.h"
#include "template.h"

FA_TABLE(portable, FASTATTN_ISA_PORTABLE, 64, NULL)

#endif
