/* What the library says of itself and of a call. */
#include "ints.h"
#include "keyblocks.h"

#include <stdlib.h>
#include <string.h>

#ifndef FASTATTN_VERSION
#define FASTATTN_VERSION "unknown"
#endif

const char *fastattn_version(void) { return FASTATTN_VERSION; }

const char *fastattn_status_string(fastattn_status status) {
    switch (status) {
    case FASTATTN_OK: return "success";
    case FASTATTN_ERROR_ARGUMENT: return "a pointer is null or misaligned, an output overlaps itself, or a struct size or an enum is unknown";
    case FASTATTN_ERROR_SHAPE: return "a size is negative or too large, or num_heads is no multiple of num_kv_heads";
    case FASTATTN_ERROR_DTYPE: return "the dtypes of q, k, v and mask are unknown or do not go together";
    case FASTATTN_ERROR_SCALE: return "scale, softcap or an ALiBi slope is not finite, softcap is negative, or a sink is NaN or +inf";
    case FASTATTN_ERROR_KV_LENGTHS: return "an entry of kv_lengths is negative or larger than kv_len";
    case FASTATTN_ERROR_BLOCK_MASK: return "the tables of block_mask are out of order or out of range";
    case FASTATTN_ERROR_WORKSPACE: return "workspace is too small or not aligned to 64 bytes";
    case FASTATTN_ERROR_MEMORY: return "out of memory";
    case FASTATTN_ERROR_ISA: return "the instruction set is unknown or not available";
    case FASTATTN_ERROR_SLOT: return "a slot is below -1 or beyond the pages";
    case FASTATTN_ERROR_INTERRUPTED: return "interrupted by the caller";
    case FASTATTN_ERROR_THREADING: return "the way of threading is unknown or not available";
    }
    return "unknown status";
}

const char *fastattn_isa_name(fastattn_isa isa) {
    switch (isa) {
    case FASTATTN_ISA_BEST: return "best";
    case FASTATTN_ISA_PORTABLE: return "portable";
    case FASTATTN_ISA_AVX2: return "avx2";
    case FASTATTN_ISA_AVX512: return "avx512";
    case FASTATTN_ISA_AMX: return "amx";
    case FASTATTN_ISA_NEON: return "neon";
    }
    return NULL;
}

int fastattn_isa_available(fastattn_isa isa) { return fastattn_ukernel_select(isa) != NULL; }

/* (row, key) pairs of the blocks that the loop would visit, as told by its own iterator. */
static double visited_pairs(const fa_call *call, char *memory) {
    double pairs = 0;
    for (int64_t n = 0; n < call->panels * call->splits; n++) {
        const fa_panel panel = fastattn_panel_of(call, n / call->splits, n % call->splits, memory);
        fa_key_blocks blocks = fastattn_key_blocks(call, &panel);
        fa_key_block block;
        if (!blocks.mask)
            pairs += (double)fa_max(blocks.end - blocks.next, 0) * panel.rows;
        else
            while (fastattn_next_key_block(&blocks, &block)) pairs += (double)block.keys * panel.rows;
    }
    return pairs;
}

fastattn_status fastattn_explain(const fastattn_attention_args *args, fastattn_plan_info *info) {
    enum { FIRST_INFO = FA_END_OF(fastattn_plan_info, visible_fraction) };
    if (!info || !fastattn_known_size(info->size, FIRST_INFO, sizeof *info)) return FASTATTN_ERROR_ARGUMENT;
    fa_call call;
    const fastattn_status status = fastattn_call_prepare(&call, args);
    if (status != FASTATTN_OK) return status;
    double visited = 0;
    if (call.items > 0) {
        char *memory = malloc(call.scratch.panel.bytes - call.scratch.panel.rows);
        if (!memory) return FASTATTN_ERROR_MEMORY;
        visited = visited_pairs(&call, memory);
        free(memory);
    }
    const double pairs = (double)args->batch * (double)args->num_heads * (double)args->q_len * (double)args->kv_len;
    const fastattn_plan_info found = {
        .size = info->size,
        .isa = call.products->isa,
        .kernel = call.products->name,
        .tile_rows = call.items > 0 ? call.rows.panel_rows : 0,
        .tile_keys = call.block_keys,
        .splits = call.splits,
        .work_items = call.items,
        .num_threads = call.team.threads,
        .workspace = call.workspace,
        .visible_fraction = pairs > 0 ? visited / pairs : 0,
        .threading = call.team.threading,
    };
    memcpy(info, &found, info->size);
    return FASTATTN_OK;
}
