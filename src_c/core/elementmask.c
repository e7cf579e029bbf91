#include "elementmask.h"

#include "ints.h"

#include <math.h>
#include <string.h>

#ifndef FASTATTN_NO_SPARSE

/* The bits of one key, spread over the rows of the panel: bit r tells whether row r sees it. */
static uint64_t lanes_of_bits(const fa_panel *p, const uint8_t *bits, int64_t first, int64_t group) {
    const int64_t from = p->query[0] - first, count = p->query[p->rows - 1] - p->query[0] + 1;
    uint64_t lanes = 0;
    if (group == 1) { /* rows are queries */
        for (int64_t byte = from / 8; byte <= (from + count - 1) / 8; byte++) {
            const int64_t shift = byte * 8 - from;
            lanes |= shift >= 0 ? (uint64_t)bits[byte] << shift : (uint64_t)bits[byte] >> -shift;
        }
        return lanes;
    }
    for (int64_t i = 0, r = 0; i < count; i++) {
        const int64_t next = fa_min((p->query[0] + i + 1) * group - p->first_row, FA_PANEL_ROWS);
        const uint64_t heads = (next - r < 64 ? ((uint64_t)1 << (next - r)) - 1 : ~(uint64_t)0) << r;
        if (bits[(from + i) / 8] >> ((from + i) % 8) & 1) lanes |= heads;
        r = next;
    }
    return lanes;
}

/* Which rows the list lets see key j of the block; entry is that of the key before. */
static uint64_t lanes_of_list(const fa_panel *p, const fa_key_block *block, int64_t j, int64_t *entry, int64_t group) {
    const fastattn_block_mask *m = block->listed;
    const int64_t key = block->listed_key + j, size = m->block_size;
    while (*entry < block->last_entry && (m->indices[*entry] + 1) * size <= key) ++*entry;
    if (*entry == block->last_entry || m->indices[*entry] * size > key) return 0;
    const int32_t element_mask = m->partial ? m->partial[*entry] : -1;
    if (element_mask < 0) return ~(uint64_t)0;
    const int64_t row = element_mask * size + key - m->indices[*entry] * size;
    return lanes_of_bits(p, m->element_bits + row * block->bits_stride, block->bits_query, group);
}

unsigned fastattn_hide_by_bits(const fa_call *call, const fa_panel *p, const fa_key_block *block, const fa_products *products, int ld,
                               float *bias, fa_key_range *keys_of) {
    static const float hidden[16][4] = {
#define H -INFINITY
        {H, H, H, H}, {0, H, H, H}, {H, 0, H, H}, {0, 0, H, H}, {H, H, 0, H}, {0, H, 0, H}, {H, 0, 0, H}, {0, 0, 0, H},
        {H, H, H, 0}, {0, H, H, 0}, {H, 0, H, 0}, {0, 0, H, 0}, {H, H, 0, 0}, {0, H, 0, 0}, {H, 0, 0, 0}, {0, 0, 0, 0},
#undef H
    };
    const uint64_t real = p->rows < 64 ? ((uint64_t)1 << p->rows) - 1 : ~(uint64_t)0;
    const int groups = (int)fa_ceil_div(p->padded, FA_ROW_STEP);
    uint64_t lanes[FA_MOST_BLOCK_KEYS];
    unsigned found = 0;
    int64_t entry = block->entry;
    for (int g = 0; g < groups; g++) keys_of[g].from = block->keys, keys_of[g].to = 0;
    for (int64_t j = 0; j < block->keys; j++) {
        lanes[j] = real & (block->listed ? lanes_of_list(p, block, j, &entry, call->heads.group)
                                         : lanes_of_bits(p, block->bits + j * block->bits_stride, block->bits_query, call->heads.group));
        found |= (lanes[j] ? FA_MASK_SHOWS : 0u) | (lanes[j] != real ? FA_MASK_HIDES : 0u);
        for (int g = 0; g < groups; g++)
            if (lanes[j] >> (g * FA_ROW_STEP) & 0xffff) {
                keys_of[g].from = fa_min(keys_of[g].from, j);
                keys_of[g].to = j + 1;
            }
    }
    if (found != (FA_MASK_SHOWS | FA_MASK_HIDES)) return found;
    if (products->by_rows) {
        for (int r = 0; r < p->rows; r++)
            for (int64_t j = 0; j < block->keys; j++) {
                float *at = bias + r * ld + j;
                *at = lanes[j] >> r & 1 ? (call->args->mask ? *at : 0.0f) : -INFINITY;
            }
        return found;
    }
    for (int64_t j = 0; j < block->keys; j++)
        for (int r = 0; r < p->padded; r += 4) {
            const float *four = hidden[lanes[j] >> r & 15];
            float *at = bias + j * ld + r;
            if (!call->args->mask) memcpy(at, four, sizeof *hidden);
            else
                for (int i = 0; i < 4; i++) at[i] = four[i] == 0.0f ? at[i] : four[i];
        }
    return found;
}

#endif
