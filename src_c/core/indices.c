#include "indices.h"

#include "check.h"
#include "ints.h"

#include <string.h>

int64_t fastattn_listed_run(const fa_key_list *list, int64_t place, int64_t places, int64_t *key) {
    *key = fa_listed_key(list, place);
    if (!list->at) return places;
    int64_t n = 1;
    while (n < places && fa_listed_key(list, place + n) == (*key < 0 ? -1 : *key + n)) n++;
    return n;
}

/* A key that is not there is far above all others as an unsigned number. */
int64_t fastattn_listed_keys(const fa_key_list *list, int64_t place, int64_t places) {
    const uint64_t low = (uint64_t)(list->start + list->from), count = (uint64_t)fa_max(list->to - list->from, 0);
    int64_t there = 0;
    if (list->size == 8) {
        const int64_t *at = (const int64_t *)(const void *)list->at + place;
        for (int64_t n = 0; n < places; n++) there += (uint64_t)at[n] - low < count;
    } else {
        const int32_t *at = (const int32_t *)(const void *)list->at + place;
        for (int64_t n = 0; n < places; n++) there += (uint64_t)(int64_t)at[n] - low < count;
    }
    return there;
}

/* Whether the keys of a list are there, each once. Most lists ascend, and -1 is at their end, if anywhere: then they are if the first and the
 * last are there at all. (In steps that compilers turn into vectors.) Any other is looked through in as many turns as keys come in sets of
 * bits: those of other sets are far above as unsigned numbers. */
#define LISTS_EACH_ONCE(type)                                                                   \
    static int ascends_##type(const type *list, int64_t n, int64_t keys) {                      \
        enum { STEP = 16 };                                                                     \
        int rises = 1;                                                                          \
        int64_t i = 1;                                                                          \
        while (n > 0 && list[n - 1] == -1) n--;                                                 \
        for (; i + STEP <= n; i += STEP)                                                        \
            for (int s = 0; s < STEP; s++) rises &= list[i + s - 1] < list[i + s];              \
        for (; i < n; i++) rises &= list[i - 1] < list[i];                                      \
        return n == 0 || (rises && list[0] >= 0 && list[n - 1] < keys);                         \
    }                                                                                           \
    static int holds_each_once_##type(const type *list, int64_t n, int64_t keys) {              \
        enum { SET = 1 << 17 };                                                                 \
        uint64_t seen[SET / 64], twice = 0;                                                     \
        int absent = 0;                                                                         \
        for (int64_t i = 0; i < n; i++) absent |= list[i] < -1 || list[i] >= keys;              \
        for (int64_t first = 0; first < keys && !absent && !twice; first += SET) {              \
            memset(seen, 0, (size_t)fa_ceil_div(fa_min(keys - first, SET), 64) * sizeof *seen); \
            for (int64_t i = 0; i < n; i++) {                                                   \
                const uint64_t bit = (uint64_t)(list[i] - first);                               \
                if (bit >= SET) continue;                                                       \
                twice |= seen[bit / 64] >> (bit % 64) & 1;                                      \
                seen[bit / 64] |= (uint64_t)1 << (bit % 64);                                    \
            }                                                                                   \
        }                                                                                       \
        return !absent && !twice;                                                               \
    }                                                                                           \
    static int lists_each_once_##type(const void *list, int64_t n, int64_t keys) {              \
        return ascends_##type(list, n, keys) || holds_each_once_##type(list, n, keys);          \
    }
LISTS_EACH_ONCE(int32_t)
LISTS_EACH_ONCE(int64_t)
#undef LISTS_EACH_ONCE

fastattn_status fastattn_check_indices(const fastattn_attention_args *a) {
    if (!FA_HOLDS_SPARSE) return FASTATTN_OK;
    if (!a->indices || a->num_heads == 0) return FASTATTN_OK;
    const int64_t heads = a->indices_strides[1] == 0 ? 1 : a->num_kv_heads;
    for (int64_t b = 0; b < a->batch; b++) {
        const int64_t first = a->cu_seqlens_q ? a->cu_seqlens_q[b] : 0;
        const int64_t rows = a->q_lengths ? a->q_lengths[b] : fastattn_q_room(a, b);
        for (int64_t h = 0; h < heads; h++)
            for (int64_t i = first; i < first + rows; i++) {
                const char *list = fa_list_at(a, b, h, i);
                if (!(a->indices_size == 8 ? lists_each_once_int64_t : lists_each_once_int32_t)(list, a->num_indices, a->kv_len))
                    return FASTATTN_ERROR_INDICES;
            }
    }
    return FASTATTN_OK;
}
