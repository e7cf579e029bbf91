#include "listbias.h"

#include "../ukernel/storage.h"
#include "ints.h"

#include <math.h>

#ifndef FASTATTN_NO_SPARSE

static float bias_of_key(const fa_call *call, const fa_panel *p, int row, int64_t key) {
    const fastattn_attention_args *a = call->args;
    float bias = 0.0f;
    if (a->mask)
        bias = fa_mask_element((const char *)a->mask + p->entry->batch * a->mask_strides[0] + p->head_of[row] * a->mask_strides[1] +
                                   (p->entry->query + p->query[row]) * a->mask_strides[2] + (p->entry->start + key) * a->mask_strides[3],
                               a->mask_dtype);
    if (a->alibi_slopes) bias -= p->slopes[row] * fabsf((float)(p->query[row] + p->entry->offset - key));
    return bias;
}

unsigned fastattn_bias_of_list(const fa_call *call, const fa_panel *p, const fa_key_block *block, const fa_products *products, int ld,
                               float *bias) {
    const fastattn_attention_args *a = call->args;
    const int64_t of_row = fa_row_of_scores(products, ld), of_key = fa_key_of_scores(products, ld);
    const int64_t there = fastattn_listed_keys(&p->list, block->first, block->keys);
    if (there == 0) return FA_MASK_HIDES;
    if (there == block->keys && !a->mask && !a->alibi_slopes) return FA_MASK_SHOWS;
    unsigned found = 0;
    for (int64_t j = 0; j < block->keys; j++) {
        const int64_t key = fa_listed_key(&p->list, block->first + j);
        for (int r = 0; r < p->padded; r++) {
            const float x = key < 0 ? -INFINITY : bias_of_key(call, p, r, key);
            bias[j * of_key + r * of_row] = x;
            found |= x == -INFINITY ? FA_MASK_HIDES : FA_MASK_SHOWS;
        }
    }
    return found;
}

#endif
