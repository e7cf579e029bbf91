/* Keys that queries list: what the loop counts are places in a list, and which key is in a place is said here. */
#ifndef FA_INDICES_H
#define FA_INDICES_H

#include "fastattn.h"

/* The list of one query. Keys count from the first of the entry. */
typedef struct fa_key_list {
    const char *at;   /* its indices, or null: places are keys */
    int64_t size;     /* bytes of an index */
    int64_t start;    /* the index of key 0 */
    int64_t from, to; /* keys that the query sees by their position */
} fa_key_list;

static inline int64_t fa_index_at(const char *list, int64_t size, int64_t place) {
    return size == 8 ? ((const int64_t *)(const void *)list)[place] : ((const int32_t *)(const void *)list)[place];
}

/* The key in a place; -1 where there is none, or none that the query sees. */
static inline int64_t fa_listed_key(const fa_key_list *list, int64_t place) {
    if (!list->at) return place;
    const int64_t key = fa_index_at(list->at, list->size, place) - list->start;
    return key >= list->from && key < list->to ? key : -1;
}

/* How many of `places` from one on hold keys that follow each other, and the first of them; -1 for places that hold none. */
int64_t fastattn_listed_run(const fa_key_list *list, int64_t place, int64_t places, int64_t *key);

/* How many of `places` from one on hold a key. */
int64_t fastattn_listed_keys(const fa_key_list *list, int64_t place, int64_t places);

static inline const char *fa_list_at(const fastattn_attention_args *a, int64_t batch, int64_t kv_head, int64_t row) {
    return (const char *)a->indices + batch * a->indices_strides[0] + kv_head * a->indices_strides[1] + row * a->indices_strides[2];
}

/* Whether all keys that lists name are there, each once in its list. */
fastattn_status fastattn_check_indices(const fastattn_attention_args *a);

#endif
