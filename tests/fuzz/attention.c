/* fastattn_attention, its workspace, its plan and what explains it: dense, with lengths, packed, block-sparse, in pages, quantised, and of
 * chosen keys. */
#include "fuzz.h"

#include <string.h>

typedef struct call {
    fastattn_attention_args args;
    fastattn_block_mask blocks;
    fuzz_array out, lse;
    int exists; /* all of the memory that it speaks of */
} call;

static fuzz_array array(fuzz_input *in, call *x, int64_t batch, int64_t heads, int64_t rows, int64_t dim, int dtype, int64_t *strides) {
    const int64_t shape[3] = {batch, heads, rows};
    const fuzz_array made = fuzz_rows_make(in, shape, strides, dtype, dim);
    x->exists &= made.exists;
    return made;
}

/* Lengths of up to `most`, as a rule. */
static const int64_t *lengths(fuzz_input *in, int64_t batch, int64_t most) {
    int64_t *table = fuzz_table(batch);
    for (int64_t b = 0; table && b < batch; b++) table[b] = fuzz_chance(in, 250) ? fuzz_up_to(in, most) : fuzz_size(in, most);
    return table;
}

/* Where sequences of a few rows each begin, and in *total where they end. */
static const int64_t *seqlens(fuzz_input *in, int64_t batch, int64_t *total) {
    int64_t *table = batch < 64 ? fuzz_table(batch + 1) : NULL;
    int64_t sum = 0;
    for (int64_t b = 0; table && b <= batch; b++) {
        table[b] = sum;
        sum = (int64_t)((uint64_t)sum + (uint64_t)(fuzz_chance(in, 254) ? fuzz_up_to(in, 39) : fuzz_size(in, 40)));
        if (b < batch) *total = sum;
    }
    if (table && batch >= 0 && fuzz_chance(in, 252)) *total = table[batch];
    return table;
}

static void block_mask(fuzz_input *in, call *x) {
    fastattn_attention_args *a = &x->args;
    fastattn_block_mask *m = &x->blocks;
    m->size = fuzz_struct_size(in, sizeof *m);
    m->block_size = fuzz_size(in, 40);
    const int64_t size = m->block_size > 0 ? m->block_size : 1;
    const int64_t rows = a->q_len / size + (a->q_len % size > 0), columns = a->kv_len / size + (a->kv_len % size > 0);
    m->head_stride = fuzz_chance(in, 100) ? rows : fuzz_chance(in, 230) ? 0 : fuzz_size(in, 10);
    m->batch_stride = fuzz_chance(in, 100) && m->head_stride >= 0 && m->head_stride < 256 ? a->num_heads % 256 * m->head_stride
                      : fuzz_chance(in, 230)                                              ? 0
                                                                                          : fuzz_size(in, 10);
    if (a->batch > 0 && a->batch < 256 && a->num_heads > 0 && a->num_heads < 256 && rows >= 0 && rows < 256 && m->head_stride >= 0 &&
        m->head_stride < 256 && m->batch_stride >= 0 && m->batch_stride < 65536)
        m->num_rows = (a->batch - 1) * m->batch_stride + (a->num_heads - 1) * m->head_stride + rows;
    if (fuzz_chance(in, 16)) m->num_rows = fuzz_size(in, 20);
    int64_t *indptr = m->num_rows < 4096 ? fuzz_table(m->num_rows + 1) : NULL;
    m->indptr = indptr;
    int64_t listed = 0, most = 0;
    for (int64_t r = 0; indptr && r <= m->num_rows; r++) {
        indptr[r] = listed;
        most = most < listed ? listed : most;
        listed += columns > 0 && columns < 256 ? fuzz_up_to(in, columns) : 0;
        if (fuzz_chance(in, 3)) listed = fuzz_size(in, 100);
        if (listed > 4096) listed = 4096;
    }
    /* As many as the largest entry says: more than that nobody may look for. */
    int32_t *indices = (int32_t *)fuzz_table((most + 1) / 2),
            *partial = fuzz_chance(in, 128) ? (int32_t *)fuzz_table((most + 1) / 2) : NULL;
    m->indices = fuzz_chance(in, 250) ? indices : NULL;
    m->partial = partial;
    m->num_element_masks = fuzz_size(in, 6);
    for (int64_t r = 0; indptr && indices && r < m->num_rows; r++) {
        int64_t before = -1;
        for (int64_t t = indptr[r] > 0 ? indptr[r] : 0; t < indptr[r + 1] && t < most; t++) {
            const int64_t left = columns - 1 - before - (indptr[r + 1] - t - 1);
            before += 1 + (left > 1 ? fuzz_up_to(in, left - 1) : 0);
            indices[t] = fuzz_chance(in, 254) ? (int32_t)before : (int32_t)fuzz_size(in, 20);
            if (partial)
                partial[t] = fuzz_chance(in, 254) ? (int32_t)(fuzz_up_to(in, m->num_element_masks) - 1) : (int32_t)fuzz_size(in, 20);
        }
    }
    const int64_t element_shape[1] = {m->num_element_masks};
    int64_t element_stride[1];
    const int64_t packed = m->block_size > 0 && m->block_size < 4096 ? m->block_size * ((m->block_size + 7) / 8) : FUZZ_MOST_BYTES + 1;
    const fuzz_array bits = fuzz_array_make(in, element_shape, element_stride, 1, packed, 1, 0);
    m->element_bits = bits.exists && fuzz_chance(in, 250) && element_stride[0] == packed ? bits.at : NULL;
    a->block_mask = fuzz_struct(m, m->size, sizeof *m);
}

static void bend(float *scores, int64_t keys, int64_t batch, int64_t head, int64_t query, int64_t first_key, void *context) {
    FUZZ_ASSERT(keys > 0 && batch >= 0 && head >= 0 && query >= 0 && first_key >= 0);
    for (int64_t j = 0; j < keys; j++) scores[j] += *(const float *)context * (float)((head + query + first_key + j) % 5);
}

/* Other scores and other weights. */
static void kinds(fuzz_input *in, fastattn_attention_args *a) {
    static float slope = 0.25f;
    const unsigned options = (unsigned)fuzz_bytes(in, 1);
    if (options & 1) a->activation = (fastattn_activation)fuzz_enum(in, 4);
    if (options & 1 && fuzz_chance(in, 200)) a->sinks = a->lse = NULL;
    if (options & 2) a->power = fuzz_chance(in, 240) ? 1 + (int)fuzz_up_to(in, 64) : (int)fuzz_size(in, 100);
    if (options & 4) {
        const fuzz_array made = fuzz_array_make(in, NULL, NULL, 0, a->batch, 4, FUZZ_FLOATS);
        a->activation_bias = made.exists ? made.at : NULL;
    }
    if (options & 8) {
        const int64_t shape[1] = {a->num_heads};
        const fuzz_array made = fuzz_array_make(in, shape, &a->additive_stride, 1, a->head_dim, 4, FUZZ_FLOATS);
        a->additive = made.exists ? made.at : NULL;
    }
    if (options & 16) a->score_function = bend, a->score_context = &slope;
}

/* Lists that name keys which follow each other, either way, and so each once if there are as many. */
static void lists(fuzz_input *in, call *x) {
    fastattn_attention_args *a = &x->args;
    a->num_indices = fuzz_size(in, 20);
    a->indices_size = fuzz_chance(in, 250) ? (fuzz_chance(in, 128) ? 8 : 4) : fuzz_size(in, 8);
    const int64_t shape[3] = {a->cu_seqlens_q ? 1 : a->batch, a->num_kv_heads, a->q_len};
    const int wide = a->indices_size == 8;
    const fuzz_array made = fuzz_array_make(in, shape, a->indices_strides, 3, a->num_indices, wide ? 8 : 4, 0);
    a->indices = made.exists ? made.at : NULL;
    const int64_t keys = a->kv_len > 0 && a->kv_len < 1 << 20 ? a->kv_len : 1, step = fuzz_chance(in, 128) ? 1 : keys - 1;
    const int none = (int)fuzz_up_to(in, 9);
    for (int64_t n = 0, key = fuzz_up_to(in, keys - 1); made.memory && (n + 1) * (wide ? 8 : 4) <= (int64_t)made.bytes; n++) {
        key = (key + step) % keys;
        const int64_t wild = fuzz_chance(in, 2) ? fuzz_size(in, 100) : n % 10 < none ? -1 : key;
        const int32_t narrow = (int32_t)wild;
        if (wide) memcpy(made.memory + n * 8, &wild, 8);
        else memcpy(made.memory + n * 4, &narrow, 4);
    }
}

/* Where keys and values lie, how they are stored, and which of them there are to choose. */
static void keys(fuzz_input *in, call *x) {
    fastattn_attention_args *a = &x->args;
    const unsigned options = (unsigned)fuzz_bytes(in, 1);
    int64_t batch = a->cu_seqlens_k ? 1 : a->batch, rows = a->kv_len;
    if (options & 1) a->kv_dtype = fuzz_chance(in, 128) ? FASTATTN_INT4 : FASTATTN_INT8;
    if (a->size == sizeof *a && options & 8) a->v_dtype = fuzz_chance(in, 240) ? FASTATTN_INT4 : (fastattn_dtype)fuzz_enum(in, 8);
    const fastattn_dtype v_dtype = a->v_dtype == FASTATTN_DTYPE_OF_KEYS ? a->kv_dtype : a->v_dtype;
    if (options & 2) {
        a->num_pages = batch = fuzz_size(in, 6);
        a->page_size = rows = fuzz_size(in, 40);
        const int64_t columns = rows > 0 ? a->kv_len / rows + (a->kv_len % rows > 0) : 0;
        const fuzz_array made = fuzz_array_make(in, &a->batch, &a->block_table_stride, 1, columns, 4, 0);
        a->block_table = made.exists ? made.at : NULL;
        x->exists &= a->block_table != NULL; /* keys would not lie in pages */
        for (size_t n = 0; n + 4 <= made.bytes; n += 4) {
            const int32_t page = (int32_t)(fuzz_chance(in, 250) ? fuzz_up_to(in, a->num_pages > 0 ? a->num_pages - 1 : 0)
                                                                : fuzz_size(in, 20));
            memcpy(made.memory + n, &page, 4);
        }
    }
    if (options & 11) {
        a->k = array(in, x, batch, a->num_kv_heads, rows, a->head_dim, (int)a->kv_dtype, a->k_strides).at;
        a->v = array(in, x, batch, a->num_kv_heads, rows, a->v_head_dim, (int)v_dtype, a->v_strides).at;
    }
    if (options & 4) lists(in, x);
}

static void decode(fuzz_input *in, call *x) {
    static const fastattn_attention_args none = FASTATTN_ATTENTION_ARGS_INIT;
    fastattn_attention_args *a = &x->args;
    *a = none;
    x->exists = 1;
    a->size = fuzz_struct_size(in, sizeof *a);
    const unsigned options = (unsigned)fuzz_bytes(in, 2);
    a->batch = fuzz_size(in, 4);
    a->num_kv_heads = fuzz_size(in, 3);
    a->num_heads = fuzz_chance(in, 250) && a->num_kv_heads < 1000 && a->num_kv_heads >= 0 ? a->num_kv_heads * (1 + fuzz_up_to(in, 3))
                                                                                          : fuzz_size(in, 8);
    a->q_len = fuzz_size(in, 90);
    a->kv_len = fuzz_size(in, 200);
    a->head_dim = fuzz_size(in, 40);
    a->v_head_dim = fuzz_size(in, 40);
    a->q_dtype = (fastattn_dtype)fuzz_enum(in, 3);
    a->kv_dtype = fuzz_chance(in, 128) ? a->q_dtype : (fastattn_dtype)fuzz_enum(in, 3);
    a->scale = fuzz_float(in);
    a->precision = (fastattn_precision)fuzz_enum(in, 3);
    a->causal = fuzz_chance(in, 128);
    if (options & 1) a->softcap = fuzz_float(in);
    if (options & 2) a->window_left = fuzz_size(in, 100), a->window_right = fuzz_size(in, 100);
    a->isa = (fastattn_isa)(fuzz_chance(in, 128) ? 0 : fuzz_enum(in, 6));
    a->num_threads = fuzz_chance(in, 240) ? (int)fuzz_up_to(in, 4) : (int)fuzz_size(in, 100);
    const int tail = a->size == sizeof *a; /* else these fields are not the caller's */
    if (tail && fuzz_chance(in, 32)) a->threading = (fastattn_threading)fuzz_enum(in, 3);
    if (tail && options & 4) a->cu_seqlens_q = seqlens(in, a->batch, &a->q_len);
    if (tail && options & 8) a->cu_seqlens_k = seqlens(in, a->batch, &a->kv_len);
    if (options & 16) a->kv_lengths = lengths(in, a->batch, a->kv_len);
    if (tail && options & 32) a->q_lengths = lengths(in, a->batch, a->q_len);
    if (tail && options & 64) a->kv_starts = lengths(in, a->batch, fuzz_up_to(in, 7));
    if (options & 128) a->query_offset = lengths(in, a->batch, 100);
    const int64_t q_batch = a->cu_seqlens_q ? 1 : a->batch, kv_batch = a->cu_seqlens_k ? 1 : a->batch;
    a->q = array(in, x, q_batch, a->num_heads, a->q_len, a->head_dim, (int)a->q_dtype, a->q_strides).at;
    a->k = array(in, x, kv_batch, a->num_kv_heads, a->kv_len, a->head_dim, (int)a->kv_dtype, a->k_strides).at;
    a->v = array(in, x, kv_batch, a->num_kv_heads, a->kv_len, a->v_head_dim, (int)a->kv_dtype, a->v_strides).at;
    x->out = array(in, x, q_batch, a->num_heads, a->q_len, a->v_head_dim, (int)a->q_dtype, a->out_strides);
    a->out = x->out.at;
    if (options & 256) {
        x->lse = array(in, x, q_batch, a->num_heads, a->q_len, 1, FASTATTN_FLOAT32, a->lse_strides);
        a->lse = x->lse.at;
    }
    if (options & 512) {
        const int64_t shape[4] = {a->batch, a->num_heads, a->q_len, a->kv_len};
        a->mask_dtype = (fastattn_dtype)fuzz_enum(in, 5);
        int64_t bytes;
        fuzz_row((int)a->mask_dtype, 1, &bytes);
        const fuzz_array made = fuzz_array_make(in, shape, a->mask_strides, 4, 1, bytes, 0);
        x->exists &= made.exists;
        a->mask = made.at;
    }
    /* Tables that a check looks through have to exist, whatever the call comes to. */
    if (options & 1024) {
        const int64_t shape[2] = {a->batch, a->num_heads};
        const fuzz_array made = fuzz_array_make(in, shape, a->alibi_strides, 2, 1, 4, FUZZ_FLOATS);
        a->alibi_slopes = made.exists ? made.at : NULL;
    }
    if (options & 2048) {
        const fuzz_array made = fuzz_array_make(in, NULL, NULL, 0, a->num_heads, 4, FUZZ_FLOATS);
        a->sinks = made.exists ? made.at : NULL;
    }
    if (options & 4096 && (!(a->cu_seqlens_q || a->cu_seqlens_k) || fuzz_chance(in, 8))) block_mask(in, x);
    if (tail) kinds(in, a), keys(in, x);
}

static int affordable(const fastattn_attention_args *a) {
    const double factors[] = {(double)a->batch, (double)a->num_heads, (double)a->q_len, (double)a->kv_len + 16,
                              (double)a->head_dim + (double)a->v_head_dim + 8};
    double work = 1;
    for (size_t n = 0; n < sizeof factors / sizeof *factors; n++) work *= factors[n] > 1 ? factors[n] : 1;
    return work < 4e6 && a->batch < 4096 && a->num_heads < 4096;
}

static fastattn_status by_items(const fastattn_attention_args *args, void *workspace, size_t size) {
    const fastattn_plan *plan;
    const fastattn_status status = fastattn_attention_plan(args, workspace, size, &plan);
    for (int phase = 0; status == FASTATTN_OK && phase < 2; phase++)
        for (int64_t n = fastattn_plan_items(plan, phase); n-- > 0;) FUZZ_ASSERT(fastattn_plan_run(plan, phase, n, 0) == FASTATTN_OK);
    return status;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_input in = fuzz_open(data, size);
    call x;
    memset(&x, 0, sizeof x);
    decode(&in, &x);
    const fastattn_attention_args *args = fuzz_struct(&x.args, x.args.size, sizeof x.args);
    fuzz_blank(&x.out);
    fuzz_blank(&x.lse);
    const size_t bytes = fastattn_workspace_size(args);
    if (x.exists && affordable(&x.args)) {
        void *workspace = fuzz_workspace(bytes);
        fastattn_plan_info info = {.size = sizeof info};
        const fastattn_status explained = fastattn_explain(args, &info);
        const fastattn_status status = workspace ? fastattn_attention(args, workspace, bytes) : explained;
        FUZZ_ASSERT(status == explained);
        FUZZ_ASSERT((status == FASTATTN_OK) == (bytes > 0) || status == FASTATTN_ERROR_MEMORY);
        if (status != FASTATTN_OK) FUZZ_ASSERT(fuzz_is_blank(&x.out) && fuzz_is_blank(&x.lse));
        if (status == FASTATTN_OK && workspace) {
            FUZZ_ASSERT(info.workspace == bytes);
            const int nothing = x.args.batch == 0 || x.args.num_heads == 0 || x.args.q_len == 0; /* to be done, nor to be done it in */
            FUZZ_ASSERT(fastattn_attention(args, workspace, bytes - 1) == (nothing ? FASTATTN_OK : FASTATTN_ERROR_WORKSPACE));
            const uint64_t out = fuzz_digest(&x.out), lse = fuzz_digest(&x.lse);
            for (int way = 0; way < 2; way++) {
                fuzz_blank(&x.out);
                fuzz_blank(&x.lse);
                FUZZ_ASSERT((way ? by_items(args, workspace, bytes) : fastattn_attention(args, NULL, 0)) == FASTATTN_OK);
                if (x.out.sound && (!x.lse.memory || x.lse.sound)) FUZZ_ASSERT(out == fuzz_digest(&x.out) && lse == fuzz_digest(&x.lse));
            }
        }
    }
    fuzz_close();
    return 0;
}
