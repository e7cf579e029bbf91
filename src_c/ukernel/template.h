/* The slots of ukernel.h for one instruction set. Include it once, after the instruction set's SIMD header and inside its
 * target region; FA_TABLE then defines the table. */
#include "ukernel.h"
#include "storage.h"

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <string.h>

#if defined(__GNUC__)
#define FA_INLINE static inline __attribute__((always_inline))
#else
#define FA_INLINE static inline
#endif
#if defined(__clang__)
#define FA_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define FA_UNROLL _Pragma("GCC unroll 16")
#else
#define FA_UNROLL
#endif

#include "pack.h"
#include "softmax.h"
#include "scores.h"
#include "tile.h"
#include "few.h"
#include "rotate.h"

#define FA_TABLE(suffix, instructions, block_size)                                                              \
    static const fa_products suffix##_products = {                                                              \
        .name = "float32_" #suffix, .isa = instructions, .fewest_rows = 1, .panel_rows = FA_PANEL_ROWS,         \
        .block_keys = block_size, .score_keys = block_size, .pair_rows = 2, .in_place = 1, .pack = pack,        \
        .keys = widened, .values = widened, .qk = qk, .softmax = softmax, .pv = pv, .power = power};            \
    const fa_ukernel fastattn_ukernel_##suffix = {                                                              \
        .products = &suffix##_products, .widen = widen, .fetch = fetch, .mask = mask, .scores = scores,         \
        .qk_few = qk_few, .softmax_few = softmax_few, .pv_few = pv_few, .finite = all_finite, .unpack = unpack, \
        .narrow = narrow, .rotate = rotate};
