/* Hostile arguments: the right status, no fault, and nothing written. */
#include "problem.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { ANY_ERROR = -1 }; /* where the header does not say which */

/* The structs as the first published header had them ended here. */
#define END_OF(type, field) (offsetof(type, field) + sizeof(((type *)NULL)->field))
#define FIRST_ARGS END_OF(fastattn_attention_args, num_threads)
#define FIRST_BLOCK_MASK END_OF(fastattn_block_mask, num_element_masks)
#define FIRST_PLAN_INFO END_OF(fastattn_plan_info, visible_fraction)

static const struct spec valid = {.name = "valid", .batch = 2, .heads = 4, .kv_heads = 2, .q_len = 40, .kv_len = 50,
                                  .head_dim = 16, .offset = OFFSET_ZERO, .lengths = LENGTHS_RANDOM, .mask = MASK_BOOL,
                                  .hidden = 0.3, .sinks = 1, .alibi = ALIBI_ALL, .block_size = 16, .blocks_density = 1,
                                  .blocks_partial = 1, .blocks_by_head = 1, .blocks_by_batch = 1, .num_threads = 2};
static struct problem p;

static void build_valid(void) {
    problem_build(&p, &valid, 7, GUARD_BEHIND);
    p.workspace_size = fastattn_workspace_size(&p.args);
    p.workspace = guard_output("workspace", p.workspace_size, 64, GUARD_BEHIND);
}

/* Every function that takes the arguments refuses them, and none touches the outputs. */
static void check_refused(int expected) {
    fastattn_plan_info info = {.size = sizeof info};
    const int results[] = {(int)fastattn_explain(&p.args, &info),
                           (int)fastattn_attention(&p.args, p.workspace, p.workspace_size),
                           (int)fastattn_attention(&p.args, NULL, 0)};
    guard_seal();
    for (size_t n = 0; n < COUNT(results); n++)
        CHECK(expected == ANY_ERROR ? results[n] != FASTATTN_OK : results[n] == expected,
              "%s returned %d, should be %d", n ? "fastattn_attention" : "fastattn_explain", results[n], expected);
    CHECK(fastattn_workspace_size(&p.args) == 0, "invalid arguments have a workspace");
    const fastattn_plan *plan = NULL;
    CHECK(fastattn_attention_plan(&p.args, p.workspace, p.workspace_size, &plan) != FASTATTN_OK && !plan, "invalid arguments have a plan");
    problem_untouched(&p);
    guard_check();
    guard_release();
}

#define REFUSED(expected, spoil) (context("%s", #spoil), build_valid(), (void)(spoil), check_refused(expected))

/* The address so many bytes before a table. */
#define SHIFTED(table, bytes) (table = (void *)((char *)(uintptr_t)(table) - (bytes)))

/* A bias of two entries, the second of which is no number. */
static const float odd_bias[] = {0.5f, INFINITY, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f};

static void without_softmax(fastattn_activation activation) {
    p.args.lse = NULL, p.args.sinks = NULL;
    p.args.activation = activation;
    p.args.power = 3;
}

TEST(errors_activations) {
    REFUSED(FASTATTN_ERROR_ACTIVATION, without_softmax((fastattn_activation)4));
    REFUSED(FASTATTN_ERROR_ACTIVATION, without_softmax((fastattn_activation)-1));
    REFUSED(FASTATTN_ERROR_ACTIVATION, p.args.activation = FASTATTN_RELU); /* with lse and sinks */
    REFUSED(FASTATTN_ERROR_ACTIVATION, (without_softmax(FASTATTN_POLYNOMIAL), p.args.power = 0));
    REFUSED(FASTATTN_ERROR_ACTIVATION, (without_softmax(FASTATTN_POLYNOMIAL), p.args.power = 65));
    REFUSED(FASTATTN_ERROR_ACTIVATION, (without_softmax(FASTATTN_SIGMOID), p.args.activation_bias = odd_bias));
    REFUSED(FASTATTN_ERROR_ARGUMENT, (without_softmax(FASTATTN_SIGMOID), p.args.activation_bias = (const float *)((const char *)odd_bias + 2)));
    REFUSED(FASTATTN_ERROR_ARGUMENT, p.args.additive = (const float *)((const char *)odd_bias + 1));
    REFUSED(FASTATTN_ERROR_ARGUMENT, (p.args.additive = odd_bias, p.args.additive_stride = 6));
}

TEST(errors_arguments) {
    REFUSED(FASTATTN_ERROR_ARGUMENT, p.args.size = 0);
    REFUSED(FASTATTN_ERROR_ARGUMENT, p.args.size = FIRST_ARGS - 8);
    REFUSED(FASTATTN_ERROR_ARGUMENT, p.args.size += 1);
    REFUSED(FASTATTN_ERROR_ARGUMENT, p.args.size += 8);
    REFUSED(FASTATTN_ERROR_ARGUMENT, p.args.size = SIZE_MAX);
    REFUSED(FASTATTN_ERROR_ARGUMENT, p.args.q = NULL);
    REFUSED(FASTATTN_ERROR_ARGUMENT, p.args.k = NULL);
    REFUSED(FASTATTN_ERROR_ARGUMENT, p.args.v = NULL);
    REFUSED(FASTATTN_ERROR_ARGUMENT, p.args.out = NULL);
    REFUSED(FASTATTN_ERROR_ARGUMENT, p.args.precision = (fastattn_precision)3);
    REFUSED(FASTATTN_ERROR_ARGUMENT, p.args.precision = (fastattn_precision)-1);
    REFUSED(FASTATTN_ERROR_ARGUMENT, SHIFTED(p.args.q, 2));
    REFUSED(FASTATTN_ERROR_ARGUMENT, SHIFTED(p.args.k, 1));
    REFUSED(FASTATTN_ERROR_ARGUMENT, SHIFTED(p.args.v, 3));
    REFUSED(FASTATTN_ERROR_ARGUMENT, SHIFTED(p.args.out, 2));
    REFUSED(FASTATTN_ERROR_ARGUMENT, SHIFTED(p.args.lse, 2));
    REFUSED(FASTATTN_ERROR_ARGUMENT, SHIFTED(p.args.alibi_slopes, 2));
    REFUSED(FASTATTN_ERROR_ARGUMENT, (p.args.q_len = 0, SHIFTED(p.args.alibi_slopes, 2))); /* slopes are looked at all the same */
    REFUSED(FASTATTN_ERROR_ARGUMENT, SHIFTED(p.args.sinks, 2));
    REFUSED(FASTATTN_ERROR_ARGUMENT, SHIFTED(p.args.query_offset, 4));
    REFUSED(FASTATTN_ERROR_ARGUMENT, SHIFTED(p.args.kv_lengths, 1));
    REFUSED(FASTATTN_ERROR_ARGUMENT, SHIFTED(p.blocks.indptr, 4));
    REFUSED(FASTATTN_ERROR_ARGUMENT, SHIFTED(p.blocks.indices, 2));
    REFUSED(FASTATTN_ERROR_ARGUMENT, SHIFTED(p.blocks.partial, 1));
    REFUSED(FASTATTN_ERROR_ARGUMENT, p.args.q_strides[2] += 2);
    REFUSED(FASTATTN_ERROR_ARGUMENT, p.args.k_strides[0] += 1);
    REFUSED(FASTATTN_ERROR_ARGUMENT, p.args.alibi_strides[1] += 1);
    REFUSED(FASTATTN_ERROR_ARGUMENT, (p.args.mask_dtype = FASTATTN_FLOAT32, p.args.mask_strides[3] = 2));
    REFUSED(FASTATTN_ERROR_ARGUMENT, p.args.out_strides[0] = 0); /* an output on top of itself */
    REFUSED(FASTATTN_ERROR_ARGUMENT, p.args.out_strides[2] = 0);
    REFUSED(FASTATTN_ERROR_ARGUMENT, p.args.lse_strides[1] = 0);

    fastattn_plan_info info = {.size = sizeof info};
    build_valid();
    CHECK_STATUS(fastattn_attention(NULL, p.workspace, p.workspace_size), FASTATTN_ERROR_ARGUMENT);
    const fastattn_plan *plan = NULL;
    CHECK_STATUS(fastattn_attention_plan(NULL, p.workspace, p.workspace_size, &plan), FASTATTN_ERROR_ARGUMENT);
    CHECK_STATUS(fastattn_attention_plan(&p.args, p.workspace, p.workspace_size, NULL), FASTATTN_ERROR_ARGUMENT);
    CHECK_STATUS(fastattn_plan_run(NULL, 0, 0, 0), FASTATTN_ERROR_ARGUMENT);
    CHECK_STATUS(fastattn_explain(NULL, &info), FASTATTN_ERROR_ARGUMENT);
    CHECK_STATUS(fastattn_explain(&p.args, NULL), FASTATTN_ERROR_ARGUMENT);
    info.size = 8;
    CHECK_STATUS(fastattn_explain(&p.args, &info), FASTATTN_ERROR_ARGUMENT);
    CHECK(fastattn_workspace_size(NULL) == 0 && fastattn_plan_items(NULL, 0) == 0, "null arguments");
    problem_untouched(&p);
}

TEST(errors_shapes) {
    REFUSED(FASTATTN_ERROR_SHAPE, p.args.batch = -1);
    REFUSED(FASTATTN_ERROR_SHAPE, (p.args.batch = INT64_MAX, p.args.num_heads = p.args.num_kv_heads = 0));
    REFUSED(FASTATTN_ERROR_SHAPE, p.args.num_heads = -4);
    REFUSED(FASTATTN_ERROR_SHAPE, p.args.num_kv_heads = -2);
    REFUSED(FASTATTN_ERROR_SHAPE, p.args.q_len = -1);
    REFUSED(FASTATTN_ERROR_SHAPE, p.args.kv_len = INT64_MIN);
    REFUSED(FASTATTN_ERROR_SHAPE, p.args.head_dim = -1);
    REFUSED(FASTATTN_ERROR_SHAPE, p.args.v_head_dim = -16);
    REFUSED(FASTATTN_ERROR_SHAPE, p.args.num_heads = 3);
    REFUSED(FASTATTN_ERROR_SHAPE, p.args.num_kv_heads = 0);
    REFUSED(FASTATTN_ERROR_SHAPE, p.args.num_kv_heads = 8);
    REFUSED(FASTATTN_ERROR_SHAPE, p.args.head_dim = (1 << 20) + 1);
    REFUSED(FASTATTN_ERROR_SHAPE, p.args.v_head_dim = (1 << 20) + 1);
    REFUSED(FASTATTN_ERROR_SHAPE, p.args.q_len = (INT64_C(1) << 40) + 1);
    REFUSED(FASTATTN_ERROR_SHAPE, p.args.kv_len = (INT64_C(1) << 40) + 1);
    REFUSED(FASTATTN_ERROR_SHAPE, p.args.window_left = -2);
    REFUSED(FASTATTN_ERROR_SHAPE, p.args.window_right = INT64_MIN);
}

TEST(errors_dtypes) {
    REFUSED(FASTATTN_ERROR_DTYPE, p.args.q_dtype = FASTATTN_FLOAT64);
    REFUSED(FASTATTN_ERROR_DTYPE, p.args.q_dtype = FASTATTN_BOOL);
    REFUSED(FASTATTN_ERROR_DTYPE, p.args.q_dtype = (fastattn_dtype)5);
    REFUSED(FASTATTN_ERROR_DTYPE, p.args.q_dtype = (fastattn_dtype)-1);
    REFUSED(FASTATTN_ERROR_DTYPE, p.args.kv_dtype = FASTATTN_FLOAT64);
    REFUSED(FASTATTN_ERROR_DTYPE, p.args.kv_dtype = (fastattn_dtype)1000);
    REFUSED(FASTATTN_ERROR_DTYPE, p.args.q_dtype = FASTATTN_FLOAT16); /* narrower than k and v */
    REFUSED(FASTATTN_ERROR_DTYPE, p.args.q_dtype = FASTATTN_BFLOAT16);
    REFUSED(FASTATTN_ERROR_DTYPE, p.args.mask_dtype = (fastattn_dtype)5);
    REFUSED(FASTATTN_ERROR_DTYPE, p.args.mask_dtype = (fastattn_dtype)-7);
}

TEST(errors_scales) {
    REFUSED(FASTATTN_ERROR_SCALE, p.args.scale = NAN);
    REFUSED(FASTATTN_ERROR_SCALE, p.args.scale = INFINITY);
    REFUSED(FASTATTN_ERROR_SCALE, p.args.scale = -INFINITY);
    REFUSED(FASTATTN_ERROR_SCALE, p.args.softcap = NAN);
    REFUSED(FASTATTN_ERROR_SCALE, p.args.softcap = INFINITY);
    REFUSED(FASTATTN_ERROR_SCALE, p.args.softcap = -1);
    REFUSED(FASTATTN_ERROR_SCALE, p.args.softcap = -FLT_MIN);
    REFUSED(FASTATTN_ERROR_SCALE, p.sinks[0] = NAN);
    REFUSED(FASTATTN_ERROR_SCALE, p.sinks[3] = INFINITY);
    REFUSED(FASTATTN_ERROR_SCALE, p.alibi_slopes[0] = NAN);
    REFUSED(FASTATTN_ERROR_SCALE, p.alibi_slopes[7] = INFINITY);
    REFUSED(FASTATTN_ERROR_SCALE, p.alibi_slopes[5] = -INFINITY);
}

TEST(errors_lengths) {
    REFUSED(FASTATTN_ERROR_KV_LENGTHS, p.kv_lengths[0] = -1);
    REFUSED(FASTATTN_ERROR_KV_LENGTHS, p.kv_lengths[1] = 51);
    REFUSED(FASTATTN_ERROR_KV_LENGTHS, p.kv_lengths[1] = INT64_MAX);
    REFUSED(FASTATTN_ERROR_KV_LENGTHS, p.kv_lengths[1] = INT64_MIN);
}

/* Every list of the valid mask has the key blocks 0, 1, 2, 3; there are 24 rows of them. */
TEST(errors_block_masks) {
    REFUSED(FASTATTN_ERROR_ARGUMENT, p.blocks.size = 0);
    REFUSED(FASTATTN_ERROR_ARGUMENT, p.blocks.size = FIRST_BLOCK_MASK - 8);
    REFUSED(FASTATTN_ERROR_ARGUMENT, p.blocks.size += 8);
    REFUSED(ANY_ERROR, p.blocks.indptr = NULL);
    REFUSED(ANY_ERROR, p.blocks.indices = NULL);
    REFUSED(ANY_ERROR, p.blocks.element_bits = NULL);
    REFUSED(FASTATTN_ERROR_BLOCK_MASK, p.blocks.block_size = 0);
    REFUSED(FASTATTN_ERROR_BLOCK_MASK, p.blocks.block_size = -16);
    REFUSED(FASTATTN_ERROR_BLOCK_MASK, p.blocks.block_size = INT64_MIN);
    REFUSED(FASTATTN_ERROR_BLOCK_MASK, p.blocks.block_size = 13); /* more rows than there are */
    REFUSED(FASTATTN_ERROR_BLOCK_MASK, p.blocks.block_size = 17); /* fewer columns */
    REFUSED(FASTATTN_ERROR_BLOCK_MASK, p.blocks.num_rows = 23);
    REFUSED(FASTATTN_ERROR_BLOCK_MASK, p.blocks.num_rows = 0);
    REFUSED(FASTATTN_ERROR_BLOCK_MASK, p.blocks.num_rows = -1);
    REFUSED(FASTATTN_ERROR_BLOCK_MASK, p.blocks.batch_stride = 13);
    REFUSED(FASTATTN_ERROR_BLOCK_MASK, p.blocks.batch_stride = -12);
    REFUSED(FASTATTN_ERROR_BLOCK_MASK, p.blocks.batch_stride = INT64_MAX);
    REFUSED(FASTATTN_ERROR_BLOCK_MASK, p.blocks.batch_stride = INT64_MIN);
    REFUSED(FASTATTN_ERROR_BLOCK_MASK, p.blocks.head_stride = -1);
    REFUSED(FASTATTN_ERROR_BLOCK_MASK, p.blocks.head_stride = 4);
    REFUSED(FASTATTN_ERROR_BLOCK_MASK, p.blocks.head_stride = INT64_MAX / 2);
    REFUSED(FASTATTN_ERROR_BLOCK_MASK, p.blocks.head_stride = INT64_MAX / 3 + 1);
    REFUSED(FASTATTN_ERROR_BLOCK_MASK, p.indptr[0] = -1);
    REFUSED(FASTATTN_ERROR_BLOCK_MASK, p.indptr[0] = INT64_MIN);
    REFUSED(FASTATTN_ERROR_BLOCK_MASK, p.indptr[5] = 3); /* decreases */
    REFUSED(FASTATTN_ERROR_BLOCK_MASK, p.indptr[24] = 0);
    REFUSED(FASTATTN_ERROR_BLOCK_MASK,
            p.indptr[24] += 1); /* more than there are key blocks: refused before it is read */
    REFUSED(FASTATTN_ERROR_BLOCK_MASK, p.indptr[24] = INT64_MAX);
    REFUSED(FASTATTN_ERROR_BLOCK_MASK, p.indptr[1] = INT64_C(1) << 40);
    REFUSED(FASTATTN_ERROR_BLOCK_MASK, p.indices[0] = -1);
    REFUSED(FASTATTN_ERROR_BLOCK_MASK, p.indices[3] = 4);
    REFUSED(FASTATTN_ERROR_BLOCK_MASK, p.indices[95] = INT32_MAX);
    REFUSED(FASTATTN_ERROR_BLOCK_MASK, p.indices[95] = INT32_MIN);
    REFUSED(FASTATTN_ERROR_BLOCK_MASK, p.indices[9] = 0);                      /* repeated: 0, 0, 2, 3 */
    REFUSED(FASTATTN_ERROR_BLOCK_MASK, (p.indices[9] = 2, p.indices[10] = 1)); /* unsorted: 0, 2, 1, 3 */
    REFUSED(FASTATTN_ERROR_BLOCK_MASK, p.partial[0] = (int32_t)p.blocks.num_element_masks);
    REFUSED(FASTATTN_ERROR_BLOCK_MASK, p.partial[95] = INT32_MAX);
    REFUSED(FASTATTN_ERROR_BLOCK_MASK, p.partial[17] = -2);
    REFUSED(FASTATTN_ERROR_BLOCK_MASK, p.partial[17] = INT32_MIN);
    REFUSED(FASTATTN_ERROR_BLOCK_MASK, p.blocks.num_element_masks = 1);
    REFUSED(FASTATTN_ERROR_BLOCK_MASK, p.blocks.num_element_masks = -1);
}

static const struct spec ragged = {.name = "ragged", .batch = 2, .heads = 2, .kv_heads = 2, .q_len = 20, .kv_len = 50, .head_dim = 16,
                                   .lengths = LENGTHS_RAGGED};

static void build_ragged(void) {
    problem_build(&p, &ragged, 7, GUARD_BEHIND);
    p.workspace_size = fastattn_workspace_size(&p.args);
    p.workspace = guard_output("workspace", p.workspace_size, 64, GUARD_BEHIND);
}

/* The same entries, packed: all that the batch axis was for is now in the tables. */
static int64_t *cu_seqlens;

static void build_packed(void) {
    static const struct spec packed = {.name = "packed", .q_len = 20, .kv_len = 20, .heads = 2, .kv_heads = 2, .head_dim = 16};
    problem_build(&p, &packed, 7, GUARD_BEHIND);
    cu_seqlens = guard_input("cu_seqlens", 4 * 8, 8, GUARD_BEHIND);
    const int64_t table[4] = {0, 7, 7, 20};
    memcpy(cu_seqlens, table, sizeof table);
    p.args.batch = 3;
    p.args.cu_seqlens_q = p.args.cu_seqlens_k = cu_seqlens;
    p.workspace_size = fastattn_workspace_size(&p.args);
    p.workspace = guard_output("workspace", p.workspace_size, 64, GUARD_BEHIND);
}

TEST(errors_packed) {
    static const uint8_t mask = 1;
#define PACKED_REFUSED(expected, spoil) (context("%s", #spoil), build_packed(), (void)(spoil), check_refused(expected))
    PACKED_REFUSED(FASTATTN_ERROR_SEQLENS, cu_seqlens[0] = 1);
    PACKED_REFUSED(FASTATTN_ERROR_SEQLENS, cu_seqlens[0] = -1);
    PACKED_REFUSED(FASTATTN_ERROR_SEQLENS, cu_seqlens[1] = -1);
    PACKED_REFUSED(FASTATTN_ERROR_SEQLENS, cu_seqlens[1] = 8);
    PACKED_REFUSED(FASTATTN_ERROR_SEQLENS, cu_seqlens[2] = INT64_MAX);
    PACKED_REFUSED(FASTATTN_ERROR_SEQLENS, cu_seqlens[2] = INT64_MIN);
    PACKED_REFUSED(FASTATTN_ERROR_SEQLENS, cu_seqlens[3] = 21);
    PACKED_REFUSED(FASTATTN_ERROR_SEQLENS, cu_seqlens[3] = 19);
    PACKED_REFUSED(FASTATTN_ERROR_SEQLENS, p.args.q_len = 19);
    PACKED_REFUSED(FASTATTN_ERROR_SEQLENS, p.args.kv_len = 21);
    PACKED_REFUSED(FASTATTN_ERROR_ARGUMENT, p.args.cu_seqlens_q = (const int64_t *)(const void *)((const char *)cu_seqlens + 4));
    PACKED_REFUSED(FASTATTN_ERROR_ARGUMENT, (p.args.mask = &mask, p.args.mask_dtype = FASTATTN_BOOL)); /* of packed keys, that is */
    static const int64_t too_long[3] = {7, 1, 0}, fits[3] = {7, 0, 13}, beyond[3] = {0, 0, 14};
    PACKED_REFUSED(FASTATTN_ERROR_KV_LENGTHS, p.args.kv_lengths = too_long);
    PACKED_REFUSED(FASTATTN_ERROR_KV_LENGTHS, p.args.kv_starts = beyond);
    PACKED_REFUSED(FASTATTN_ERROR_Q_LENGTHS, (p.args.kv_lengths = fits, p.args.q_lengths = too_long));
#undef PACKED_REFUSED
}

TEST(errors_ragged) {
#define RAGGED_REFUSED(expected, spoil) (context("%s", #spoil), build_ragged(), (void)(spoil), check_refused(expected))
    RAGGED_REFUSED(FASTATTN_ERROR_KV_LENGTHS, p.kv_starts[1] = -1);
    RAGGED_REFUSED(FASTATTN_ERROR_KV_LENGTHS, p.kv_starts[0] = INT64_MIN);
    RAGGED_REFUSED(FASTATTN_ERROR_KV_LENGTHS, p.kv_starts[1] = p.kv_lengths[1] + 1);
    RAGGED_REFUSED(FASTATTN_ERROR_KV_LENGTHS, (p.args.kv_lengths = NULL, p.kv_starts[1] = 51));
    RAGGED_REFUSED(FASTATTN_ERROR_ARGUMENT, p.args.kv_starts = (const int64_t *)(const void *)((const char *)p.args.kv_starts + 4));
    RAGGED_REFUSED(FASTATTN_ERROR_ARGUMENT, p.args.q_lengths = (const int64_t *)(const void *)((const char *)p.args.q_lengths + 1));
    RAGGED_REFUSED(FASTATTN_ERROR_Q_LENGTHS, p.q_lengths[0] = -1);
    RAGGED_REFUSED(FASTATTN_ERROR_Q_LENGTHS, p.q_lengths[1] = 21);
    RAGGED_REFUSED(FASTATTN_ERROR_Q_LENGTHS, p.q_lengths[1] = INT64_MAX);
#undef RAGGED_REFUSED
}

TEST(errors_isas_and_ways_of_threading) {
    REFUSED(FASTATTN_ERROR_ISA, p.args.isa = (fastattn_isa)7);
    REFUSED(FASTATTN_ERROR_ISA, p.args.isa = (fastattn_isa)-1);
    REFUSED(FASTATTN_ERROR_THREADING, p.args.threading = (fastattn_threading)3);
    REFUSED(FASTATTN_ERROR_THREADING, p.args.threading = (fastattn_threading)-1);
    if (!fastattn_has_openmp())
        REFUSED(FASTATTN_ERROR_THREADING, p.args.threading = FASTATTN_THREADING_OPENMP);
    for (int isa = FASTATTN_ISA_PORTABLE; isa <= FASTATTN_ISA_WASM; isa++)
        if (!fastattn_isa_available((fastattn_isa)isa))
            REFUSED(FASTATTN_ERROR_ISA, p.args.isa = (fastattn_isa)isa);
}

static void check_workspace_refused(void *workspace, size_t size) {
    CHECK_STATUS(fastattn_attention(&p.args, workspace, size), FASTATTN_ERROR_WORKSPACE);
    const fastattn_plan *plan = NULL;
    CHECK_STATUS(fastattn_attention_plan(&p.args, workspace, size, &plan), FASTATTN_ERROR_WORKSPACE);
    CHECK(!plan, "a plan in spite of its workspace");
    problem_untouched(&p);
}

TEST(errors_workspaces) {
    build_valid();
    guard_seal();
    CHECK(p.workspace_size > 0, "no workspace for a call with queries");
    context("too small");
    check_workspace_refused(p.workspace, p.workspace_size - 1);
    check_workspace_refused(p.workspace, 0);
    context("not aligned");
    check_workspace_refused((char *)p.workspace - 32, p.workspace_size + 32);
    check_workspace_refused((char *)p.workspace + 1, p.workspace_size);
    context("null for a plan");
    const fastattn_plan *plan = NULL;
    CHECK_STATUS(fastattn_attention_plan(&p.args, NULL, 0, &plan), FASTATTN_ERROR_ARGUMENT);
    CHECK_STATUS(fastattn_attention_plan(&p.args, NULL, SIZE_MAX, &plan), FASTATTN_ERROR_ARGUMENT);
    problem_untouched(&p);
    guard_check();
}

TEST(errors_items) {
    build_valid();
    guard_seal();
    const fastattn_plan *plan;
    CHECK_STATUS(fastattn_attention_plan(&p.args, p.workspace, p.workspace_size, &plan), FASTATTN_OK);
    const int64_t items = fastattn_plan_items(plan, 0), merges = fastattn_plan_items(plan, 1);
    const struct {
        int phase;
        int64_t item;
        int worker;
    } wrong[] = {{0, -1, 0}, {0, items, 0}, {0, INT64_MAX, 0}, {0, INT64_MIN, 0}, {1, merges, 0},    {1, -1, 0},
                 {2, 0, 0},  {-1, 0, 0},    {0, 0, -1},        {0, 0, 2},         {0, 0, INT32_MAX}, {0, 0, INT32_MIN}};
    for (size_t n = 0; n < COUNT(wrong); n++) {
        context("phase %d item %lld worker %d", wrong[n].phase, (long long)wrong[n].item, wrong[n].worker);
        CHECK(fastattn_plan_run(plan, wrong[n].phase, wrong[n].item, wrong[n].worker) != FASTATTN_OK, "it ran");
    }
    CHECK(fastattn_plan_items(plan, 2) == 0 && fastattn_plan_items(plan, -1) == 0, "a phase too many");
    problem_untouched(&p);
    guard_check();
}

/* What a call must have and was not given is refused: an initialised struct never computes something by chance. */
TEST(errors_of_omission) {
    const fastattn_attention_args initial = FASTATTN_ATTENTION_ARGS_INIT;
    REFUSED(FASTATTN_ERROR_SCALE, p.args.scale = initial.scale);
    REFUSED(FASTATTN_ERROR_SHAPE, p.args.num_kv_heads = initial.num_kv_heads);
    REFUSED(FASTATTN_ERROR_ARGUMENT, memcpy(p.args.out_strides, initial.out_strides, sizeof initial.out_strides));
}

/* All optional arguments of an initialised struct are absent: it computes the plain formula. */
TEST(errors_none_after_initialisation) {
    const struct spec plain = {.name = "plain", .batch = 2, .heads = 4, .kv_heads = 2, .q_len = 9, .kv_len = 50, .head_dim = 16};
    fastattn_attention_args args, initial = FASTATTN_ATTENTION_ARGS_INIT;
    memset(&args, 0x5A, sizeof args);
    CHECK_STATUS(fastattn_attention_args_init(&args, sizeof args), FASTATTN_OK);
    CHECK(args.size == sizeof args && args.window_left == -1 && args.window_right == -1 && isnan(args.scale) &&
              isnan(initial.scale), "not what absent is");
    args.scale = initial.scale = 1;
    for (int by_function = 0; by_function < 2; by_function++) {
        problem_build(&p, &plain, 3, GUARD_BEHIND);
        fastattn_attention_args *a = by_function ? &args : &initial;
        a->batch = 2, a->num_heads = 4, a->num_kv_heads = 2, a->q_len = 9, a->kv_len = 50, a->head_dim = a->v_head_dim = 16;
        a->scale = p.args.scale, a->q = p.args.q, a->k = p.args.k, a->v = p.args.v, a->out = p.args.out, a->lse = p.args.lse;
        memcpy(a->q_strides, p.args.q_strides, sizeof a->q_strides);
        memcpy(a->k_strides, p.args.k_strides, sizeof a->k_strides);
        memcpy(a->v_strides, p.args.v_strides, sizeof a->v_strides);
        memcpy(a->out_strides, p.args.out_strides, sizeof a->out_strides);
        memcpy(a->lse_strides, p.args.lse_strides, sizeof a->lse_strides);
        p.args = *a;
        problem_check(&p, GUARD_BEHIND);
        guard_release();
    }
    CHECK_STATUS(fastattn_attention_args_init(NULL, sizeof args), FASTATTN_ERROR_ARGUMENT);
    CHECK_STATUS(fastattn_attention_args_init(&args, FIRST_ARGS - 8), FASTATTN_ERROR_ARGUMENT);
    CHECK_STATUS(fastattn_attention_args_init(&args, sizeof args + 8), FASTATTN_ERROR_ARGUMENT);
}

/* Callers that were compiled against the first header: their structs end before a page that cannot be read. */
TEST(errors_none_of_older_callers) {
    build_valid();
    guard_seal();
    CHECK_STATUS(fastattn_attention(&p.args, p.workspace, p.workspace_size), FASTATTN_OK);
    uint8_t *bits = problem_snapshot(&p);
    guard_release();

    build_valid();
    fastattn_block_mask *blocks = guard_input("block mask", FIRST_BLOCK_MASK, 8, GUARD_BEHIND);
    fastattn_attention_args *args = guard_input("arguments", FIRST_ARGS, 8, GUARD_BEHIND);
    fastattn_attention_args *blank = guard_output("initialised arguments", FIRST_ARGS, 8, GUARD_BEHIND);
    fastattn_plan_info *info = guard_output("plan", FIRST_PLAN_INFO, 8, GUARD_BEHIND);
    p.blocks.size = FIRST_BLOCK_MASK;
    memcpy(blocks, &p.blocks, FIRST_BLOCK_MASK);
    p.args.size = FIRST_ARGS;
    p.args.block_mask = blocks;
    memcpy(args, &p.args, FIRST_ARGS);
    guard_seal();
    CHECK_STATUS(fastattn_attention(args, p.workspace, p.workspace_size), FASTATTN_OK);
    CHECK(problem_equals(&p, bits), "an older caller gets another result");
    CHECK(fastattn_workspace_size(args) == p.workspace_size, "another plan");
    info->size = FIRST_PLAN_INFO;
    CHECK_STATUS(fastattn_explain(args, info), FASTATTN_OK);
    CHECK(info->size == FIRST_PLAN_INFO && info->workspace == p.workspace_size, "another plan is explained");
    CHECK_STATUS(fastattn_attention_args_init(blank, FIRST_ARGS), FASTATTN_OK);
    CHECK(blank->size == FIRST_ARGS && blank->window_right == -1, "not initialised");
    guard_check();
    free(bits);
}

/* Strides along axes of length 1, and all those of arrays without elements, may be anything. */
TEST_EACH_ISA(errors_none_of_unused_strides) {
    const struct spec specs[] = {
        {.name = "one of each", .q_len = 1, .kv_len = 1, .head_dim = 16, .mask = MASK_FLOAT32, .alibi = ALIBI_ALL},
        {.name = "one query", .q_len = 1, .kv_len = 50, .head_dim = 16, .mask = MASK_FLOAT32, .alibi = ALIBI_ALL},
        {.name = "one key", .q_len = 70, .kv_len = 1, .head_dim = 16, .mask = MASK_FLOAT64, .alibi = ALIBI_ALL},
        {.name = "one entry and head", .q_len = 70, .kv_len = 50, .head_dim = 16, .mask = MASK_FLOAT16, .alibi = ALIBI_ALL},
        {.name = "no keys", .batch = 2, .heads = 4, .q_len = 70, .head_dim = 16, .mask = MASK_FLOAT64},
        {.name = "no numbers in a query", .batch = 2, .heads = 4, .q_len = 7, .kv_len = 9, .v_head_dim = 16},
    };
    static const int64_t odd[] = {897, -1, INT64_MAX, INT64_MIN};
    for (size_t n = 0; n < COUNT(specs); n++)
        for (size_t value = 0; value < COUNT(odd); value++) {
            context("%s, strides %lld", specs[n].name, (long long)odd[value]);
            problem_build(&p, &specs[n], n, GUARD_BEHIND);
            fastattn_attention_args *a = &p.args;
            const fastattn_attention_args sane = *a;
            const int64_t lengths[4] = {a->batch, a->num_heads, a->q_len, a->kv_len};
            for (int axis = 0; axis < 3; axis++) {
                const int64_t queries = lengths[axis], keys = axis == 1 ? a->num_kv_heads : axis == 2 ? a->kv_len : a->batch;
                if (queries == 1 || a->head_dim == 0) a->q_strides[axis] = odd[value];
                if (keys == 1 || a->head_dim == 0 || a->kv_len == 0) a->k_strides[axis] = odd[value];
                if (keys == 1 || a->kv_len == 0) a->v_strides[axis] = odd[value];
                if (queries == 1) a->out_strides[axis] = a->lse_strides[axis] = odd[value];
                if (axis < 2 && queries == 1) a->alibi_strides[axis] = odd[value];
            }
            for (int axis = 0; axis < 4; axis++)
                if (lengths[axis] == 1 || a->kv_len == 0) a->mask_strides[axis] = odd[value];
            problem_seal(&p, GUARD_BEHIND);
            CHECK_STATUS(fastattn_attention(a, p.workspace, p.workspace_size), FASTATTN_OK);
            p.args = sane;
            problem_verify(&p, 1);
            guard_release();
        }
}

/* A sink of -inf is none: the head has the bits that it has without sinks. */
TEST_EACH_ISA(errors_none_of_absent_sinks) {
    const struct spec spec = {.name = "sinks", .heads = 4, .kv_heads = 2, .q_len = 40, .kv_len = 50, .head_dim = 16,
                              .offset = OFFSET_RANDOM, .mask = MASK_BOOL, .hidden = 0.9, .sinks = 1, .causal = 1};
    const struct spec bare = {.name = "no sinks", .heads = 4, .kv_heads = 2, .q_len = 40, .kv_len = 50, .head_dim = 16,
                              .offset = OFFSET_RANDOM, .mask = MASK_BOOL, .hidden = 0.9, .causal = 1};
    problem_build(&p, &bare, 5, GUARD_BEHIND);
    problem_check(&p, GUARD_BEHIND);
    uint8_t *bits = problem_snapshot(&p);
    guard_release();
    problem_build(&p, &spec, 5, GUARD_BEHIND);
    for (int head = 0; head < 4; head++) p.sinks[head] = -INFINITY;
    problem_check(&p, GUARD_BEHIND);
    CHECK(problem_equals(&p, bits), "a sink of -inf is not no sink");
    guard_release();
    problem_build(&p, &spec, 5, GUARD_BEHIND);
    p.sinks[1] = -INFINITY;
    problem_check(&p, GUARD_BEHIND);
    guard_release();
    free(bits);
}

/* Sizes whose products do not fit in 64 bits. A call is refused, or wants so much memory that it cannot have it. */
TEST(errors_overflows) {
    static const int64_t huge[] = {INT64_C(1) << 31, INT64_C(1) << 32, INT64_C(1) << 47, INT64_C(1) << 58,
                                   INT64_C(1) << 61, INT64_C(1) << 62, INT64_MAX - 63,   INT64_MAX};
    for (int which = 0; which < 31; which++)
        for (size_t n = 0; n < COUNT(huge); n++) {
            build_valid();
            p.args.mask = NULL;
            p.args.alibi_slopes = NULL;
            p.args.block_mask = NULL;
            p.args.sinks = NULL;
            p.args.kv_lengths = p.args.query_offset = NULL;
            int64_t *const axes[] = {&p.args.head_dim, &p.args.v_head_dim, &p.args.kv_len, &p.args.q_len,
                                     &p.args.batch};
            context("axes %d are %lld", which + 1, (long long)huge[n]);
            for (size_t axis = 0; axis < COUNT(axes); axis++)
                if ((which + 1) >> axis & 1)
                    *axes[axis] = huge[n];
            guard_seal();
            const size_t needed = fastattn_workspace_size(&p.args);
            const fastattn_status status =
                fastattn_attention(&p.args, p.workspace, needed > p.workspace_size ? p.workspace_size : 0);
            CHECK(status == (needed ? FASTATTN_ERROR_WORKSPACE : FASTATTN_ERROR_SHAPE) ||
                      (!needed && status == FASTATTN_ERROR_MEMORY),
                  "status %d, workspace %zu", (int)status, needed);
            if (*axes[0] == huge[n] || *axes[1] == huge[n]) /* one row exceeds any memory */
                CHECK(needed == 0 || needed > (size_t)huge[n], "%zu bytes of workspace", needed);
            problem_untouched(&p);
            guard_check();
            guard_release();
        }
}

/* An empty result needs no memory, whatever the other sizes. */
TEST(errors_overflows_of_nothing) {
    build_valid();
    p.args.mask = NULL;
    p.args.block_mask = NULL;
    p.args.alibi_slopes = NULL;
    p.args.kv_lengths = p.args.query_offset = NULL;
    p.args.batch = INT64_MAX;
    p.args.q_len = 0;
    guard_seal();
    const fastattn_status status = fastattn_attention(&p.args, p.workspace, p.workspace_size);
    CHECK(status == FASTATTN_OK || status == FASTATTN_ERROR_SHAPE, "status %d", (int)status);
    problem_untouched(&p);
}

TEST(errors_no_memory) {
    build_valid();
    guard_seal();
    allocation_fails = 1;
    const fastattn_status status = fastattn_attention(&p.args, NULL, 0);
    allocation_fails = 0;
    CHECK(status == FASTATTN_ERROR_MEMORY, "status %d", (int)status);
    problem_untouched(&p);
    CHECK_STATUS(fastattn_attention(&p.args, NULL, 0), FASTATTN_OK);
    problem_verify(&p, 1);
}

TEST(errors_merge_states) {
    float part[6] = {0}, lse[2] = {0}, out[6] = {42, 42, 42, 42, 42, 42}, out_lse[2] = {42, 42};
    const void *outs[] = {part, part}, *null_outs[] = {part, NULL};
    const float *lses[] = {lse, lse}, *null_lses[] = {NULL, lse};
    _Alignas(8) char odd[24] = {0};
    const void *odd_outs[] = {part, odd + 2};
    const float *odd_lses[] = {lse, (const void *)(odd + 1)};
    static const fastattn_dtype f32 = FASTATTN_FLOAT32;
    const struct {
        const char *name;
        fastattn_status got, expected;
    } calls[] = {
        {"parts", fastattn_merge_states(-1, outs, lses, 2, 3, f32, out, out_lse), FASTATTN_ERROR_SHAPE},
        {"rows", fastattn_merge_states(2, outs, lses, -2, 3, f32, out, out_lse), FASTATTN_ERROR_SHAPE},
        {"columns", fastattn_merge_states(2, outs, lses, 2, -3, f32, out, out_lse), FASTATTN_ERROR_SHAPE},
        {"float64", fastattn_merge_states(2, outs, lses, 2, 3, FASTATTN_FLOAT64, out, out_lse), FASTATTN_ERROR_DTYPE},
        {"bool", fastattn_merge_states(2, outs, lses, 2, 3, FASTATTN_BOOL, out, out_lse), FASTATTN_ERROR_DTYPE},
        {"dtype", fastattn_merge_states(2, outs, lses, 2, 3, (fastattn_dtype)99, out, out_lse), FASTATTN_ERROR_DTYPE},
        {"outs", fastattn_merge_states(2, NULL, lses, 2, 3, f32, out, out_lse), FASTATTN_ERROR_ARGUMENT},
        {"lses", fastattn_merge_states(2, outs, NULL, 2, 3, f32, out, out_lse), FASTATTN_ERROR_ARGUMENT},
        {"a null out", fastattn_merge_states(2, null_outs, lses, 2, 3, f32, out, out_lse), FASTATTN_ERROR_ARGUMENT},
        {"a null lse", fastattn_merge_states(2, outs, null_lses, 2, 3, f32, out, out_lse), FASTATTN_ERROR_ARGUMENT},
        {"out", fastattn_merge_states(2, outs, lses, 2, 3, f32, NULL, out_lse), FASTATTN_ERROR_ARGUMENT},
        {"an odd part", fastattn_merge_states(2, odd_outs, lses, 2, 3, f32, out, out_lse), FASTATTN_ERROR_ARGUMENT},
        {"an odd lse", fastattn_merge_states(2, outs, odd_lses, 2, 3, f32, out, out_lse), FASTATTN_ERROR_ARGUMENT},
        {"odd out", fastattn_merge_states(2, outs, lses, 2, 3, f32, odd + 2, out_lse), FASTATTN_ERROR_ARGUMENT},
        {"odd out_lse", fastattn_merge_states(2, outs, lses, 2, 3, f32, out, (void *)(odd + 1)), FASTATTN_ERROR_ARGUMENT},
    };
    for (size_t n = 0; n < COUNT(calls); n++)
        CHECK(calls[n].got == calls[n].expected, "%s: status %d, not %d", calls[n].name, (int)calls[n].got,
              (int)calls[n].expected);
    for (int n = 0; n < 6; n++)
        CHECK(out[n] == 42 && out_lse[n / 3] == 42, "an output was written");
}

/* What fastattn_merge asks beyond that. */
TEST(errors_merge) {
    float part[2] = {1, 2}, lse = 0, out[2] = {42, 42}, out_lse = 42;
    const void *outs[] = {part};
    const float *lses[] = {&lse};
    const fastattn_merge_args good = {.size = sizeof good, .num_parts = 1, .rows = 1, .v_head_dim = 2, .outs = outs, .lses = lses,
                                      .out = out, .lse = &out_lse, .num_threads = 2};
    fastattn_merge_args size = good, isa = good, threading = good;
    size.size--;
    isa.isa = (fastattn_isa)99;
    threading.threading = (fastattn_threading)99;
    CHECK_STATUS(fastattn_merge(NULL), FASTATTN_ERROR_ARGUMENT);
    CHECK_STATUS(fastattn_merge(&size), FASTATTN_ERROR_ARGUMENT);
    CHECK_STATUS(fastattn_merge(&isa), FASTATTN_ERROR_ISA);
    CHECK_STATUS(fastattn_merge(&threading), FASTATTN_ERROR_THREADING);
    allocation_fails = 1;
    const fastattn_status status = fastattn_merge(&good);
    allocation_fails = 0;
    CHECK(status == FASTATTN_ERROR_MEMORY, "status %d", (int)status);
    CHECK(out[0] == 42 && out[1] == 42 && out_lse == 42, "an output was written");
    CHECK_STATUS(fastattn_merge(&good), FASTATTN_OK);
    CHECK(out[0] == 1 && out[1] == 2 && out_lse == 0, "one part is not itself");
}

TEST(errors_have_sentences) {
    for (int status = -2; status <= FASTATTN_ERROR_LEFT_OUT + 1; status++) {
        const char *sentence = fastattn_status_string((fastattn_status)status);
        CHECK(sentence && strlen(sentence) > 1, "status %d", status);
    }
}
