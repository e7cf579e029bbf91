/* Rows of one packed sequence, up to FA_PANEL_ROWS, and the keys that they may see. */
#ifndef FA_PANEL_H
#define FA_PANEL_H

#include "call.h"
#include "indices.h"

typedef struct fa_panel {
    const fa_entry *entry; /* from whose first query and key everything counts */
    int way;               /* the products that its number of rows asks for */
    const fa_products *products;
    int ld; /* as these lay it out */
    int64_t kv_head;
    int64_t head;               /* query head of the packed sequence's first */
    int64_t first_row;          /* of the panel, in its packed sequence */
    int64_t first_key, end_key; /* keys of this part */
    int rows;                   /* real rows */
    int padded;                 /* rows that the slots work on: where they are lanes, rounded up to FA_ROW_STEP */
    int64_t *query;             /* [padded] query index; padding repeats the last row everywhere */
    int64_t *head_of;           /* [padded] query head */
    int64_t *begin, *end;       /* [padded] visible keys by position: causal, window, lengths; both ascend */
    fa_key_list list;           /* the keys in their place, where the caller has chosen them: those of the panel's one query */
    float *slopes;              /* [padded] when there are ALiBi slopes */
    float *offset_of;           /* [padded] the rules' per-row vectors, refilled for each block */
    float *begin_of, *end_of;
    float *alpha, *fade;
    float *base, *rise;   /* of sums of weights by segment: see mass.c */
    int64_t cleared;      /* segments that have such sums, in all rows of the output */
    const void **rows_of; /* [padded] row pointers: of q, then of the mask */
    void **outputs;       /* [padded] row pointers of out */
} fa_panel;

/* The bytes of a panel's vectors. */
size_t fastattn_panel_bytes(int ld);

/* p becomes part `part` of the keys for panel `panel` of all of an entry (of a sequence, of all sequences); its vectors live in
 * `memory`, of fastattn_panel_bytes. */
void fastattn_panel_of(fa_panel *p, const fa_call *call, const fa_entry *entry, int64_t panel, int64_t part, char *memory);

/* rows_of becomes pointers to the rows of q, or to the mask's elements at `key`. */
void fastattn_panel_queries(const fa_call *call, fa_panel *panel);
void fastattn_panel_mask(const fa_call *call, fa_panel *panel, int64_t key);

/* k and v become the caller's rows of keys and values from `key` on. Those in pages, and those that are listed, may have pointers, as many as
 * fastattn_row_pointers, which are put into k_rows and v_rows. If it follows on what they were, of a whole block, so do these. */
void fastattn_panel_keys_and_values(fa_matrix *k, fa_matrix *v, const fa_call *call, const fa_panel *panel, int64_t key, int follows,
                                    const char **k_rows, const char **v_rows);

/* A head's keys or values in pages. */
typedef struct fa_pages {
    fa_matrix head;       /* those of page 0 */
    int64_t stride, size; /* of pages: bytes from one to the next, and rows of each */
    const int32_t *table; /* those of the entry's keys */
} fa_pages;

/* The rows in pages from `key` on, which is before `end`: at a stride, if these and what is read next lie one after the other, or else by
 * pointers, page after page; beyond the end they are those of its page. If they follow on what `rows` are, a run of so many keys, the first
 * of the pointers are the last of before. */
void fastattn_paged_rows(fa_matrix *rows, const fa_pages *pages, int64_t key, int64_t end, int64_t run_keys, int follows,
                         const char **pointers);

/* Pointers for the keys of a block and of the next. */
static inline int64_t fastattn_row_pointers(int64_t block_keys) { return 2 * block_keys; }

#endif
