#include "keyblocks.h"

#include "ints.h"

void fastattn_key_blocks(fa_key_blocks *it, const fa_call *call, const fa_panel *panel) {
    /* Bounds ascend with the row, so the first and the last row tell all. */
    const int last = panel->rows - 1;
    it->first_key = panel->first_key;
    it->end_key = panel->end_key;
    it->next = fa_max(panel->first_key, panel->begin[0]);
    it->end = fa_min(panel->end_key, panel->end[last]);
    it->full_from = panel->begin[last];
    it->full_to = panel->end[0];
    it->step = panel->entry->shape.block_keys;
    it->run_end = it->end;
    it->mask = FA_HOLDS_SPARSE ? call->args->block_mask : NULL;
    it->bits = NULL;
    if (FA_UNLIKELY(it->mask)) {
        it->start = panel->entry->start;
        it->block_row = panel->query[0] / it->mask->block_size;
        const int64_t row = panel->entry->batch * it->mask->batch_stride + panel->head * it->mask->head_stride + it->block_row;
        it->entry = it->mask->indptr[row];
        it->last_entry = it->mask->indptr[row + 1];
        it->run_end = it->next;
        it->whole_steps = call->args->invariant;
    } else it->next -= (it->next - it->first_key) % FA_SUM_RUN;
}

/* Takes the next listed block with a key in reach, and whole blocks that follow it without a gap. */
static int next_run(fa_key_blocks *it) {
    const fastattn_block_mask *m = it->mask;
    const int64_t size = m->block_size, start = it->start;
    while (it->entry < it->last_entry && (m->indices[it->entry] + 1) * size - start <= it->next) it->entry++;
    if (it->entry == it->last_entry || m->indices[it->entry] * size - start >= it->end) return 0;
    const int64_t first = m->indices[it->entry] * size - start;
    const int32_t element_mask = m->partial ? m->partial[it->entry] : -1;
    it->entry++;
    it->next = fa_max(it->next, first);
    it->run_end = first + size;
    it->bits = NULL;
    if (element_mask >= 0) {
        it->bits = m->element_bits + element_mask * size * ((size + 7) / 8);
        it->bits_first = first;
    } else
        while (it->entry < it->last_entry && m->indices[it->entry] * size - start == it->run_end &&
               (!m->partial || m->partial[it->entry] < 0)) {
            it->run_end += size;
            it->entry++;
        }
    it->run_end = fa_min(it->run_end, it->end);
    return 1;
}

static int64_t first_of(const fa_key_blocks *it, int64_t entry) { return it->mask->indices[entry] * it->mask->block_size - it->start; }

/* The next step of keys of which some are listed, from the first of these to the last. What is between them is hidden, so that they are
 * taken into the state as they are where all are there and a mask hides the others. */
static int next_step(fa_key_blocks *it, fa_key_block *block) {
    const fastattn_block_mask *m = it->mask;
    const int64_t size = m->block_size;
    while (it->entry < it->last_entry && first_of(it, it->entry) + size <= it->next) it->entry++;
    if (it->entry == it->last_entry || first_of(it, it->entry) >= it->end) return 0;
    const int64_t listed = fa_max(first_of(it, it->entry), it->next), from = listed - (listed - it->first_key) % FA_SUM_RUN;
    const int64_t step_end = fa_min(it->first_key + (from - it->first_key) / it->step * it->step + it->step, it->end);
    int64_t end = from, last = it->entry;
    int hides = 0;
    for (; last < it->last_entry && first_of(it, last) < step_end; last++) {
        hides |= first_of(it, last) > end || (m->partial && m->partial[last] >= 0);
        end = fa_min(first_of(it, last) + size, step_end);
    }
    block->first = block->run_first = from;
    block->keys = block->run_keys = end - from;
    block->listed = hides ? m : NULL;
    block->listed_key = from + it->start;
    block->entry = it->entry;
    block->last_entry = last;
    block->bits_stride = (size + 7) / 8;
    block->bits_query = it->block_row * size;
    it->next = end;
    return 1;
}

int fastattn_next_key_block(fa_key_blocks *it, fa_key_block *block) {
    block->bits = NULL;
    block->listed = NULL;
    const fastattn_block_mask *mask = FA_HOLDS_SPARSE ? it->mask : NULL;
    if (it->next >= it->end) return 0;
    if (FA_UNLIKELY(mask) && it->whole_steps) {
        if (!next_step(it, block)) return 0;
        block->partial = block->first < it->full_from || it->next > it->full_to;
        return 1;
    }
    if (it->next >= it->run_end && !(mask && next_run(it))) return 0;
    block->first = it->next;
    block->run_first = it->next;
    block->keys = fa_min(it->step, it->run_end - it->next);
    block->run_keys = block->keys;
    if (!mask) {
        const int64_t before = (it->next - it->first_key) % it->step;
        block->run_first -= before;
        block->run_keys = fa_min(it->step, it->end_key - block->run_first);
        block->keys = fa_min(block->keys, block->run_keys - before);
    }
    it->next += block->keys;
    block->partial = block->first < it->full_from || it->next > it->full_to;
    if (FA_UNLIKELY(mask && it->bits)) {
        block->bits_stride = (mask->block_size + 7) / 8;
        block->bits = it->bits + (block->first - it->bits_first) * block->bits_stride;
        block->bits_query = it->block_row * mask->block_size;
    }
    return 1;
}
