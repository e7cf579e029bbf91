/* Every check of the C interface: what it lets pass cannot lead outside of the caller's memory. */
#ifndef FA_CHECK_H
#define FA_CHECK_H

#include "../ukernel/storage.h"
#include "fastattn.h"
#include "unlikely.h"

enum {
    FA_MOST_DIM = 1 << 20, /* the largest head_dim and v_head_dim */
    FA_MOST_EXPONENT = 64  /* of a polynomial activation */
};

/* The arguments as the engine sees them: of this version's size, whatever header the caller had, and with strides of 0 for
 * the axes along which nothing is ever reached. */
typedef struct fa_args {
    fastattn_attention_args attention;
    fastattn_block_mask block_mask; /* attention.block_mask points to it, if to anything */
} fa_args;

/* Checks the caller's arguments and copies them, which changes nothing else: tables stay the caller's. */
fastattn_status fastattn_check_args(fa_args *args, const fastattn_attention_args *given);

/* Whether entries have lengths of their own. */
static inline int fastattn_ragged(const fastattn_attention_args *a) {
    return FA_UNLIKELY(a->kv_lengths || a->kv_starts || a->q_lengths || a->cu_seqlens_q || a->cu_seqlens_k);
}

/* The rows of q, and of k and v, that are entry b's, padding included. */
static inline int64_t fastattn_q_room(const fastattn_attention_args *a, int64_t b) {
    return FA_UNLIKELY(a->cu_seqlens_q) ? a->cu_seqlens_q[b + 1] - a->cu_seqlens_q[b] : a->q_len;
}
static inline int64_t fastattn_kv_room(const fastattn_attention_args *a, int64_t b) {
    return FA_UNLIKELY(a->cu_seqlens_k) ? a->cu_seqlens_k[b + 1] - a->cu_seqlens_k[b] : a->kv_len;
}

/* The bytes of a row of out. */
static inline int64_t fastattn_out_bytes(const fastattn_attention_args *a) {
    return a->segments ? a->num_segments * (int64_t)sizeof(float) : a->v_head_dim * fa_size_of(a->q_dtype);
}

/* The pages of entry b; null without a table. */
static inline const int32_t *fastattn_pages_at(const int32_t *block_table, int64_t stride, int64_t b) {
    return block_table ? (const int32_t *)(const void *)((const char *)block_table + b * stride) : NULL;
}

/* The pages that so many keys need. */
static inline int64_t fastattn_pages_of(const fastattn_attention_args *a, int64_t keys) {
    return a->block_table ? (keys + a->page_size - 1) / a->page_size : 0;
}

/* Whether a struct of this size is that of a version which had the fields up to `first`, or of a later one up to this. */
int fastattn_known_size(size_t size, size_t first, size_t own);
/* Copies a struct that begins with such a size, and completes it from `rest`. */
fastattn_status fastattn_take_struct(void *to, const void *from, size_t first, const void *rest, size_t own);
#define FA_END_OF(type, field) (offsetof(type, field) + sizeof(((type *)NULL)->field))

/* Whether a pointer is no multiple of size, a power of two. */
static inline int fa_misaligned(const void *pointer, size_t size) { return ((uintptr_t)pointer & (size - 1)) != 0; }

/* What q and out may hold; k, v and a cache. */
static inline int fa_is_storage(fastattn_dtype dtype) {
    return fa_holds(dtype) && (dtype == FASTATTN_FLOAT32 || dtype == FASTATTN_FLOAT16 || dtype == FASTATTN_BFLOAT16);
}
static inline int fa_is_cached(fastattn_dtype dtype) { return fa_is_storage(dtype) || (fa_holds(dtype) && fa_is_quantised(dtype)); }

/* An array of the caller's, and what is known of it. */
typedef struct fa_table {
    const void *pointer;
    int64_t *strides;         /* of all axes but those packed at the end, or null */
    int axes;                 /* that have strides */
    int64_t shape[4], packed; /* of those axes, and the elements of the others */
    int64_t size;             /* bytes of an element */
    int required, output;     /* may not be null; may not overlap itself */
} fa_table;

/* Whether the table can be used as it is said to be. No stride along an axis of length 1, or of an array without elements, is ever
 * used: NumPy, for one, leaves anything there. Such strides become 0. */
fastattn_status fastattn_check_table(const fa_table *t);

#endif
