/* What the library says of itself and of a call. */
#include "ints.h"
#include "keyblocks.h"
#include "memory.h"

#include <string.h>

#ifndef FASTATTN_VERSION
#define FASTATTN_VERSION "unknown"
#endif

const char *fastattn_version(void) { return FASTATTN_VERSION; }

const char *fastattn_status_string(fastattn_status status) {
    switch (status) {
    case FASTATTN_OK: return "success";
    case FASTATTN_ERROR_ARGUMENT:
        return "a pointer is null or misaligned, an output overlaps itself, or a struct size or an enum is unknown";
    case FASTATTN_ERROR_SHAPE: return "a size is negative or too large, or num_heads is no multiple of num_kv_heads";
    case FASTATTN_ERROR_DTYPE: return "the dtypes of q, k, v and mask are unknown or do not go together";
    case FASTATTN_ERROR_SCALE: return "scale, softcap or an ALiBi slope is not finite, softcap is negative, or a sink is NaN or +inf";
    case FASTATTN_ERROR_KV_LENGTHS: return "an entry of kv_lengths is negative or larger than kv_len, or one of kv_starts than it";
    case FASTATTN_ERROR_SEQLENS: return "cu_seqlens do not begin with 0, decrease, or do not end at the number of rows";
    case FASTATTN_ERROR_Q_LENGTHS: return "an entry of q_lengths is negative or larger than q_len";
    case FASTATTN_ERROR_BLOCK_MASK: return "the tables of block_mask are out of order or out of range";
    case FASTATTN_ERROR_WORKSPACE: return "workspace is too small or not aligned to 64 bytes";
    case FASTATTN_ERROR_MEMORY: return "out of memory";
    case FASTATTN_ERROR_DECAY: return "a decay lies outside of [0, 1], or above 0 as a logarithm";
    case FASTATTN_ERROR_ACTIVATION:
        return "the activation is unknown, its power or bias out of range, or lse or sinks are asked for without a softmax";
    case FASTATTN_ERROR_ISA: return "the instruction set is unknown or not available";
    case FASTATTN_ERROR_SLOT: return "a slot is below -1 or beyond the pages";
    case FASTATTN_ERROR_BLOCK_TABLE: return "block_table has, within the length of an entry, a page below 0 or beyond num_pages";
    case FASTATTN_ERROR_NOT_FINITE: return "a number that is to be quantised is NaN, infinite or too large";
    case FASTATTN_ERROR_INDICES: return "indices have a key below -1 or beyond kv_len, or one twice in a list";
    case FASTATTN_ERROR_LEFT_OUT: return "this library was built without what the call asks for";
    case FASTATTN_ERROR_SEGMENTS:
        return "a segment is below -1 or beyond num_segments, that is out of range, or there are values or indices beside them";
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
    case FASTATTN_ISA_WASM: return "wasm";
    }
    return NULL;
}

int fastattn_isa_available(fastattn_isa isa) { return fastattn_ukernel_select(isa) != NULL; }

/* (row, key) pairs of the blocks that the loop would visit in an entry, as told by its own iterator. */
static double visited_pairs(const fa_call *call, const fa_entry *entry, char *memory) {
    const int64_t panels = call->heads.sequences * entry->shape.rows.panels, splits = entry->shape.splits;
    double pairs = 0;
    for (int64_t n = 0; n < panels * splits; n++) {
        fa_panel panel;
        fa_key_blocks blocks;
        fa_key_block block;
        fastattn_panel_of(&panel, call, entry, n / splits, n % splits, memory);
        fastattn_key_blocks(&blocks, call, &panel);
        if (!blocks.mask) pairs += (double)fa_max(blocks.end - blocks.next, 0) * panel.rows;
        else
            while (fastattn_next_key_block(&blocks, &block)) pairs += (double)block.keys * panel.rows;
    }
    return pairs;
}

fastattn_status fastattn_explain(const fastattn_attention_args *args, fastattn_plan_info *info) {
    enum { FIRST_INFO = FA_END_OF(fastattn_plan_info, visible_fraction) };
    if (!info || !fastattn_known_size(info->size, FIRST_INFO, sizeof *info)) return FASTATTN_ERROR_ARGUMENT;
    fa_call prepared;
    const fastattn_status status = fastattn_call_prepare(&prepared, args);
    if (status != FASTATTN_OK) return status;
    /* The plan, and the vectors of a panel. */
    char *memory = FASTATTN_MALLOC(prepared.room.entries ? prepared.room.scratch + prepared.scratch.panel.bytes : prepared.room.bytes);
    if (!memory) return FASTATTN_ERROR_MEMORY;
    const fa_call *call = fastattn_call_enter(&prepared, memory);
    const fastattn_attention_args *a = call->args;
    double visited = 0, pairs = 0;
    const fa_products *products = call->products;
    fastattn_plan_info found = {.size = info->size, .splits = 1};
    for (int64_t n = 0; call->entries && n < a->batch; n++) {
        const fa_entry *entry = call->entries + n;
        pairs += (double)a->num_heads * (double)entry->q_room * (double)fastattn_kv_room(a, entry->batch);
        visited += visited_pairs(call, entry, memory + call->room.scratch);
        if (entry->shape.rows.panel_rows > found.tile_rows) {
            found.tile_rows = entry->shape.rows.panel_rows;
            products = entry->shape.products;
        }
        found.tile_keys = fa_max(found.tile_keys, entry->shape.block_keys);
        found.splits = fa_max(found.splits, entry->shape.splits);
    }
    found.isa = products->isa;
    found.kernel = products->name;
    found.work_items = call->items[FA_COMPUTE];
    found.num_threads = call->team.threads;
    found.threading = call->team.threading;
    found.workspace = call->room.bytes;
    found.visible_fraction = pairs > 0 ? visited / pairs : 0;
    memcpy(info, &found, info->size);
    FASTATTN_FREE(memory);
    return FASTATTN_OK;
}
