/* The slots of ukernel.h for one instruction set. Include it once, after the instruction set's SIMD header and inside its
 * target region; FA_TABLE then defines the table. */
#include "ukernel.h"
#include "quantised.h"
#include "storage.h"

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <string.h>

/* Without optimisation nothing that is constant would be left out of what is inlined: files would take minutes and gigabytes. */
#if defined(__GNUC__) && defined(__OPTIMIZE__)
#define FA_INLINE static inline __attribute__((always_inline))
#else
#define FA_INLINE static inline
#endif
#if defined(__GNUC__)
#define FA_NOINLINE __attribute__((noinline))
#else
#define FA_NOINLINE
#endif
#if defined(__clang__)
#define FA_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define FA_UNROLL _Pragma("GCC unroll 16")
#else
#define FA_UNROLL
#endif
/* C99 has no _Static_assert: an array of a negative size does not compile. */
#define FA_ASSERT_CONSTANT(condition, reason) typedef char reason[(condition) ? 1 : -1]

#include "pack.h"
#include "softmax.h"
#include "scores.h"
#include "activate.h"
#include "tile.h"
#include "squares.h"
#include "rows.h"
#include "additive.h"
#include "gather.h"
#include "merge.h"
#include "rotate.h"
#include "dense.h"

/* What is around the products of panels whose lanes are rows, whatever they multiply. */
#define FA_LANES_SLOTS .mask = FA_HELD(FA_HOLDS_MASK, mask), .scores = scores, .unpack = unpack

/* Where lanes of rows pay off: later where heads are wide, for by rows neither queries nor outputs are turned, and keys that come from
 * memory are read front to back. */
enum { FEWEST_LANES = 13, FEWEST_LANES_WIDE = 61, WIDE = SIMD_LANES == 16 ? 128 : INT32_MAX, MOST_ROWS = FA_PANEL_ROWS };

FA_ASSERT_CONSTANT(FEWEST_LANES <= MOST_ROWS + 1 && FEWEST_LANES_WIDE <= MOST_ROWS + 1, any_number_of_rows_has_products);

/* The slots of float32 products whose lanes are rows, and by rows, but for the first product. */
#define FA_FLOAT32_LANES(instructions, block_size)                                                                       \
    .isa = instructions, .panel_rows = FA_PANEL_ROWS, .block_keys = block_size, .score_keys = block_size, .pair_rows = 2, \
    .in_place = 1, .pack = pack, .keys = widened, .values = widened, .softmax = softmax, .pv = pv, .power = power, FA_LANES_SLOTS
#define FA_FLOAT32_ROWS(instructions, block_size) .pack = rows_pack, FA_ROWS(instructions, block_size, rows_pv)
#define FA_ROWS(instructions, block_size, second)                                                                        \
    .isa = instructions, .by_rows = 1, .fewest_rows = 1, .panel_rows = MOST_ROWS, .block_keys = block_size,              \
    .score_keys = block_size, .pair_rows = 2, .in_place = 1, .keys = KEYS_OF_ROWS, .values = as_stored, .pv = second,    \
    .power = rows_power, .mask = FA_HELD(FA_HOLDS_MASK, rows_mask), .scores = rows_scores, .unpack = rows_unpack

/* What reads quantised rows as they are stored: a table of its way of packing and of its two products, and that in float32. */
#define FA_QUANTISED_ROWS(title, instructions, block_size, packing, first, second)                                       \
    {.name = title, .pack = packing, .qk = FA_QUANTISED(first), .softmax = rows_softmax,                                 \
     FA_ROWS(instructions, block_size, FA_QUANTISED(second))}
#define FA_FEW_QUANTISED(suffix, instructions, block_size)                                                               \
    static const fa_products suffix##_few_quantised =                                                                    \
        FA_QUANTISED_ROWS("quantised_rows_" #suffix, instructions, block_size, rows_pack,                                \
                          fastattn_quantised_qk_##suffix, fastattn_quantised_pv_##suffix);

/* few_quantised may be null. */
#define FA_TABLE(suffix, instructions, block_size, quantised_products)                                                   \
    static const fa_products suffix##_products = {                                                                       \
        .name = "float32_" #suffix, .fewest_rows = FEWEST_LANES, .fewest_rows_wide = FEWEST_LANES_WIDE,                  \
        .wide = WIDE, .qk = qk, FA_FLOAT32_LANES(instructions, block_size)};                                             \
    static const fa_products suffix##_few = {                                                                            \
        .name = "float32_rows_" #suffix, .most_beside = TILE_MOST_BESIDE, .qk = rows_qk, .softmax = rows_softmax,        \
        FA_FLOAT32_ROWS(instructions, block_size)};                                                                      \
    static const fa_products suffix##_turned = {                                                                         \
        .name = "float32_turned_" #suffix, .qk = turned_qk, .softmax = turned_softmax,                                   \
        FA_FLOAT32_ROWS(instructions, block_size)};                                                                      \
    static const fa_products suffix##_additive = {                                                                       \
        .name = "float32_additive_" #suffix, .fewest_rows = FEWEST_LANES, .fewest_rows_wide = FEWEST_LANES,              \
        .qk = additive_qk, FA_FLOAT32_LANES(instructions, block_size)};                                                  \
    static const fa_products suffix##_additive_few = {                                                                   \
        .name = "float32_additive_rows_" #suffix, .qk = additive_rows_qk, .softmax = rows_softmax,                       \
        FA_FLOAT32_ROWS(instructions, block_size)};                                                                      \
    static const fa_dense suffix##_dense = {.product = FA_HELD(FA_HOLDS_LINEAR || FA_HOLDS_SELECT, dense_product),       \
                                            FA_DENSE(dots), FA_DENSE(scale), FA_DENSE(running), FA_DENSE(rank_one),      \
                                            FA_DENSE(exps), FA_DENSE(features), FA_DENSE(outside)};                      \
    FA_UKERNEL(suffix, suffix, quantised_products, rotate, mix)

/* A slot that the linear family alone asks for. */
#define FA_DENSE(slot) .slot = FA_HELD(FA_HOLDS_LINEAR, dense_##slot)

/* The table `name`, of these products, and the slots that may differ from those of the template. */
#define FA_UKERNEL(name, of, quantised_products, rotating, mixing)                                                       \
    const fa_ukernel fastattn_ukernel_##name = {.products = &of##_products, .few = &of##_few, .turned = &of##_turned,    \
                                                .dense = &of##_dense, .few_quantised = (quantised_products),             \
                                                .quantised = FA_QUANTISED(&fastattn_quantised_##of),                     \
                                                .additive = FA_HELD(FA_HOLDS_ADDITIVE, &of##_additive),                  \
                                                .additive_few = FA_HELD(FA_HOLDS_ADDITIVE, &of##_additive_few),          \
                                                .activate = FA_HELD(FA_HOLDS_ACTIVATION || FA_HOLDS_SELECT, activate),   \
                                                .gather = FA_HELD(FA_HOLDS_SEGMENTS, gather),                            \
                                                .widen = widen, .fetch = fetch, .narrow = narrow, .finite = all_finite,  \
                                                .rotate = FA_HELD(FA_HOLDS_ROPE, rotating),                             \
                                                .weigh = FA_HELD(FA_HOLDS_MERGE, weigh), .mix = FA_HELD(FA_HOLDS_MERGE, mixing)};
