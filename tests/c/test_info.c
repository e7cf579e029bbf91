/* What the library says about itself and about a call. */
#include "problem.h"

#include "ukernel/ukernel.h"

#include <stdio.h>
#include <string.h>
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

TEST(info_names) {
    static const char *const names[] = {"portable", "avx2", "avx512", "amx", "neon", "wasm"};
    int major, minor, patch, end = 0;
    for (int isa = 0; isa < 6; isa++)
        CHECK(!strcmp(fastattn_isa_name((fastattn_isa)(isa + FASTATTN_ISA_PORTABLE)), names[isa]), "isa %d", isa);
    CHECK(!fastattn_isa_name((fastattn_isa)7) && !fastattn_isa_name((fastattn_isa)-1), "a name for what is none");
#if !defined(__aarch64__) && !defined(__wasm_simd128__) || defined(FASTATTN_PORTABLE)
    CHECK(fastattn_isa_available(FASTATTN_ISA_PORTABLE) == 1, "portable code is not available");
#else
    CHECK(fastattn_isa_available(FASTATTN_ISA_PORTABLE) == 0, "portable code, which no processor of this kind runs");
#endif
    CHECK(fastattn_isa_available(FASTATTN_ISA_BEST) == 1, "no instruction set at all");
    CHECK(!fastattn_isa_available((fastattn_isa)7) && !fastattn_isa_available((fastattn_isa)-1),
          "what is none is available");
    CHECK(sscanf(fastattn_version(), "%d.%d.%d%n", &major, &minor, &patch, &end) == 3 && !fastattn_version()[end],
          "version %s", fastattn_version());
#ifdef _OPENMP
    CHECK(fastattn_has_openmp() == 1, "built with OpenMP");
#else
    CHECK(fastattn_has_openmp() == 0, "built without OpenMP");
#endif
}

TEST_EACH_ISA(info_describes_the_call) {
    static const struct {
        struct spec spec;
        double least, most; /* of the visible fraction */
    } calls[] = {
        {{.name = "plain", .q_len = 100, .kv_len = 100, .head_dim = 16}, 1, 1},
        {{.name = "causal", .heads = 2, .q_len = 4000, .kv_len = 4000, .head_dim = 16, .causal = 1}, 0.5, 0.65},
        {{.name = "window", .q_len = 4000, .kv_len = 4000, .head_dim = 16, .windowed = 1, .window_left = 10,
          .window_right = 10}, 0.005, 0.35},
        {{.name = "empty blocks", .q_len = 100, .kv_len = 100, .head_dim = 16, .block_size = 32}, 0, 0},
        {{.name = "decode", .heads = 4, .q_len = 1, .kv_len = 9000, .head_dim = 16, .num_threads = 3}, 1, 1},
    };
    for (size_t n = 0; n < COUNT(calls); n++) {
        struct problem problem;
        fastattn_plan_info info = {.size = sizeof info};
        context("%s", calls[n].spec.name);
        problem_build(&problem, &calls[n].spec, n, GUARD_BEHIND);
        problem_seal(&problem, GUARD_BEHIND);
        const fastattn_plan *plan;
        CHECK_STATUS(fastattn_attention_plan(&problem.args, problem.workspace, problem.workspace_size, &plan), FASTATTN_OK);
        allocation_fails = 1;
        CHECK_STATUS(fastattn_explain(&problem.args, &info), FASTATTN_ERROR_MEMORY);
        allocation_fails = 0;
        CHECK_STATUS(fastattn_explain(&problem.args, &info), FASTATTN_OK);
        CHECK(fastattn_isa_available(info.isa) && (info.isa == test_isa || info.isa < test_isa), "isa %d",
              (int)info.isa);
        CHECK(info.kernel && strlen(info.kernel) > 0, "no name of a kernel");
        CHECK(info.tile_rows > 0 && info.tile_keys > 0 && info.splits > 0, "tile %lld x %lld, %lld splits",
              (long long)info.tile_rows, (long long)info.tile_keys, (long long)info.splits);
        CHECK(info.work_items == fastattn_plan_items(plan, 0), "%lld work items",
              (long long)info.work_items);
        CHECK(info.num_threads >= 1 && info.num_threads <= 3, "%d threads", info.num_threads);
        CHECK(info.workspace == fastattn_workspace_size(&problem.args), "workspace of %zu", info.workspace);
        CHECK(info.visible_fraction >= calls[n].least && info.visible_fraction <= calls[n].most, "visible fraction %g",
              info.visible_fraction);
        problem_untouched(&problem);
        guard_release();
    }
}

/* Whether the build has left a part out (-DFASTATTN_NO_16BIT and the like, which are 1, and of which the tests are told, too). */
#define WORDS(macro) #macro
#define WORDS_OF(macro) WORDS(macro)
#define LEFT_OUT(part) (WORDS_OF(FASTATTN_NO_##part)[0] == '1')
#define UNLESS_LEFT_OUT(part) (LEFT_OUT(part) ? FASTATTN_ERROR_LEFT_OUT : FASTATTN_OK)

/* What was left out is refused by name and leaves the output as it was; what the library holds works. */
static void check_parts_of_attention(void) {
    enum { DIM = 32, PLAIN, MASK, BLOCKS, LIST, ADDITIVE, ACTIVATION, SEGMENTS };
    const fastattn_status halves = LEFT_OUT(16BIT) ? FASTATTN_ERROR_DTYPE : FASTATTN_OK;
    const fastattn_status quantised = LEFT_OUT(QUANTISED) ? FASTATTN_ERROR_DTYPE : FASTATTN_OK;
    const fastattn_status masked = UNLESS_LEFT_OUT(MASK), sparse = UNLESS_LEFT_OUT(SPARSE);
    const struct { int part; fastattn_dtype q, kv, mask; fastattn_status status; } calls[] = {
        {PLAIN, FASTATTN_FLOAT32, FASTATTN_FLOAT32, FASTATTN_FLOAT32, FASTATTN_OK},
        {PLAIN, FASTATTN_FLOAT16, FASTATTN_FLOAT16, FASTATTN_FLOAT32, halves},
        {PLAIN, FASTATTN_FLOAT32, FASTATTN_BFLOAT16, FASTATTN_FLOAT32, halves},
        {PLAIN, FASTATTN_FLOAT32, FASTATTN_INT8, FASTATTN_FLOAT32, quantised},
        {PLAIN, FASTATTN_FLOAT32, FASTATTN_INT4, FASTATTN_FLOAT32, quantised},
        {MASK, FASTATTN_FLOAT32, FASTATTN_FLOAT32, FASTATTN_FLOAT32, masked},
        {MASK, FASTATTN_FLOAT32, FASTATTN_FLOAT32, FASTATTN_BOOL, masked},
        {MASK, FASTATTN_FLOAT32, FASTATTN_FLOAT32, FASTATTN_FLOAT16, LEFT_OUT(MASK) ? masked : halves},
        {MASK, FASTATTN_FLOAT32, FASTATTN_FLOAT32, FASTATTN_BFLOAT16, LEFT_OUT(MASK) ? masked : halves},
        {BLOCKS, FASTATTN_FLOAT32, FASTATTN_FLOAT32, FASTATTN_FLOAT32, sparse},
        {LIST, FASTATTN_FLOAT32, FASTATTN_FLOAT32, FASTATTN_FLOAT32, sparse},
        {ADDITIVE, FASTATTN_FLOAT32, FASTATTN_FLOAT32, FASTATTN_FLOAT32, UNLESS_LEFT_OUT(ADDITIVE)},
        {ACTIVATION, FASTATTN_FLOAT32, FASTATTN_FLOAT32, FASTATTN_FLOAT32, UNLESS_LEFT_OUT(ACTIVATION)},
        {SEGMENTS, FASTATTN_FLOAT32, FASTATTN_FLOAT32, FASTATTN_FLOAT32, UNLESS_LEFT_OUT(SEGMENTS)}};
    const float ones[DIM] = {1, 1, 1, 1}, zero = 0;
    const int64_t blocks_of_rows[] = {0, 1};
    const int32_t first = 0;
    const fastattn_block_mask blocks = {.size = sizeof blocks, .block_size = 1, .num_rows = 1, .indptr = blocks_of_rows, .indices = &first};
    float keys[DIM + 1] = {0}, out[DIM];
    for (size_t n = 0; n < COUNT(calls); n++) {
        fastattn_attention_args args;
        CHECK_STATUS(fastattn_attention_args_init(&args, sizeof args), FASTATTN_OK);
        args.batch = args.num_heads = args.num_kv_heads = args.q_len = args.kv_len = 1;
        args.head_dim = args.v_head_dim = DIM;
        args.q = ones, args.k = args.v = keys, args.out = out;
        args.q_dtype = calls[n].q, args.kv_dtype = calls[n].kv, args.mask_dtype = calls[n].mask;
        args.scale = 1.0f;
        if (calls[n].part == MASK) args.mask = &zero;
        if (calls[n].part == BLOCKS) args.block_mask = &blocks;
        if (calls[n].part == LIST) args.indices = &first, args.num_indices = 1, args.indices_size = sizeof first;
        if (calls[n].part == ADDITIVE) args.additive = ones;
        if (calls[n].part == ACTIVATION) args.activation = FASTATTN_RELU;
        if (calls[n].part == SEGMENTS) args.segments = &first, args.num_segments = 1, args.v_head_dim = 0;
        for (int d = 0; d < DIM; d++) out[d] = 42.0f;
        CHECK_STATUS(fastattn_attention(&args, NULL, 0), calls[n].status);
        CHECK((out[0] == 42.0f) == (calls[n].status != FASTATTN_OK), "call %zu: an output of %g", n, (double)out[0]);
    }
}

static void check_part(const char *name, fastattn_status status, int left_out, float *out) {
    CHECK(status == (left_out ? FASTATTN_ERROR_LEFT_OUT : FASTATTN_OK), "%s: status %d", name, (int)status);
    CHECK((*out == 42.0f) == left_out, "%s: an output of %g", name, (double)*out);
    *out = 42.0f;
}

TEST(info_what_was_left_out_is_refused) {
    enum { DIM = 32 };
    check_parts_of_attention();

    const int64_t slot = 0;
    const float ones[DIM] = {1, 1, 1, 1}, sine[DIM / 2] = {0}, lse = 0, *const lses = &lse;
    const void *const row = ones;
    float out[DIM] = {42.0f}, merged;
    union { int32_t index; float seen; } chosen = {.seen = 42.0f};
    const fastattn_store_args store = {.size = sizeof store, .batch = 1, .new_len = 1, .num_heads = 1, .head_dim = DIM, .from = ones, .to = out,
                                       .num_pages = 1, .page_size = 1, .slots = &slot, .num_threads = 1, .rotate = 1};
    const fastattn_rope_args rope = {.size = sizeof rope, .batch = 1, .num_heads = 1, .length = 1, .head_dim = DIM, .rotary_dim = DIM, .x = ones,
                                     .out = out, .cos = ones, .sin = sine, .num_threads = 1};
    const fastattn_merge_args merge = {.size = sizeof merge, .num_parts = 1, .rows = 1, .v_head_dim = DIM, .outs = &row, .lses = &lses,
                                       .out = out, .lse = &merged, .num_threads = 1};
    const fastattn_select_args select = {.size = sizeof select, .batch = 1, .num_heads = 1, .num_kv_heads = 1, .q_len = 1, .kv_len = 1,
                                         .head_dim = DIM, .q = ones, .k = ones, .num_keys = 1, .indices = &chosen.index, .num_threads = 1};
    fastattn_linear_args linear = FASTATTN_LINEAR_ARGS_INIT;
    linear.batch = linear.num_q_heads = linear.num_k_heads = linear.num_v_heads = linear.q_len = linear.kv_len = 1;
    linear.head_dim = linear.v_head_dim = DIM;
    linear.q = linear.k = linear.v = ones, linear.out = out, linear.scale = 1.0f;
    check_part("store", fastattn_store(&store), LEFT_OUT(QUANTISED), out);
    check_part("rope", fastattn_rope(&rope), LEFT_OUT(ROPE), out);
    check_part("merge", fastattn_merge(&merge), LEFT_OUT(MERGE), out);
    check_part("linear", fastattn_linear_attention(&linear, NULL, 0), LEFT_OUT(LINEAR), out);
    CHECK((fastattn_linear_workspace_size(&linear) == 0) == LEFT_OUT(LINEAR), "a workspace for what was left out, or none");
    check_part("select", fastattn_select_keys(&select), LEFT_OUT(SELECT), &chosen.seen);
}

#if defined(__aarch64__) && defined(__linux__)
/* The products of bfloat16, and those of bytes and of float16, where the system says that the processor has them, and there alone. */
TEST(info_chooses_products_by_the_processor) {
    static const struct spec spec = {.name = "bfloat16", .q_len = 100, .kv_len = 100, .head_dim = 16,
                                     .q_dtype = FASTATTN_BFLOAT16, .kv_dtype = FASTATTN_BFLOAT16};
    struct problem problem;
    fastattn_plan_info info = {.size = sizeof info};
    problem_build(&problem, &spec, 1, GUARD_BEHIND);
    CHECK_STATUS(fastattn_explain(&problem.args, &info), FASTATTN_OK);
    const char *wanted = getauxval(AT_HWCAP2) >> 14 & 1 ? "bfloat16_neon" : "float32_neon";
    CHECK(!strcmp(info.kernel, wanted), "%s, not %s", info.kernel, wanted);
    const fa_products *few = fastattn_quantised_select(&fastattn_ukernel_neon, FASTATTN_ISA_BEST, FASTATTN_BFLOAT16, FASTATTN_PRECISION_HIGHEST);
    wanted = getauxval(AT_HWCAP) >> 20 & 1 ? "bytes_rows_neon" : "quantised_rows_neon";
    CHECK(!strcmp(few->name, wanted), "%s, not %s", few->name, wanted);
    static const fastattn_dtype dtypes[] = {FASTATTN_FLOAT32, FASTATTN_FLOAT16, FASTATTN_BFLOAT16};
    for (size_t n = 0; n < COUNT(dtypes) * COUNT(dtypes); n++) {
        const fastattn_dtype q = dtypes[n % COUNT(dtypes)], kv = dtypes[n / COUNT(dtypes)];
        few = fastattn_few_select(&fastattn_ukernel_neon, fastattn_ukernel_neon.products, FASTATTN_ISA_BEST, q, kv);
        wanted = getauxval(AT_HWCAP) >> 23 & 1 && q == FASTATTN_FLOAT16 && kv == q ? "float16_rows_neon" : "float32_rows_neon";
        CHECK(!strcmp(few->name, wanted), "%s, not %s", few->name, wanted);
    }
}
#endif

/* The workspace is tiles, not keys: it does not grow with the square of the length. */
TEST_EACH_ISA(info_workspace_is_small) {
    struct problem problem;
    const struct spec spec = {.name = "long", .heads = 8, .kv_heads = 8, .q_len = 2, .kv_len = 3, .head_dim = 128};
    problem_build(&problem, &spec, 0, GUARD_BEHIND);
    problem.args.q_len = 256;
    problem.args.kv_len = 131072; /* only asked about, never computed */
    problem.args.num_threads = 2;
    CHECK(fastattn_workspace_size(&problem.args) < (size_t)64 << 20, "%zu bytes",
          fastattn_workspace_size(&problem.args));
    problem.args.q_len = 131072;
    CHECK(fastattn_workspace_size(&problem.args) < (size_t)64 << 20, "%zu bytes",
          fastattn_workspace_size(&problem.args));
}
