/* fastattn_select_keys: keys one by one and in blocks, in pages or not. */
#include "fuzz.h"

#include <string.h>

/* Each list ascends, names keys that are there, and has -1 behind the last. */
static void look_through(const fastattn_select_args *a) {
    for (int64_t b = 0; b < a->batch; b++)
        for (int64_t h = 0; h < a->num_kv_heads; h++)
            for (int64_t i = 0; i < a->q_len; i++) {
                const char *list = (const char *)a->indices + b * a->indices_strides[0] + h * a->indices_strides[1] +
                                   i * a->indices_strides[2];
                int32_t before = -1, key;
                for (int64_t n = 0; n < a->num_keys; n++, before = key) {
                    memcpy(&key, list + n * 4, 4);
                    FUZZ_ASSERT(key < 0 ? key == -1 : key < a->kv_len && (n == 0 || (before >= 0 && key > before)));
                }
            }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_input in = fuzz_open(data, size);
    fastattn_select_args a;
    memset(&a, 0, sizeof a);
    a.size = fuzz_chance(&in, 250) ? sizeof a : (size_t)fuzz_bytes(&in, 8);
    const unsigned options = (unsigned)fuzz_bytes(&in, 1);
    a.batch = fuzz_size(&in, 4);
    a.num_kv_heads = fuzz_size(&in, 3);
    a.num_heads = fuzz_chance(&in, 250) && a.num_kv_heads < 1000 && a.num_kv_heads >= 0 ? a.num_kv_heads * (1 + fuzz_up_to(&in, 3))
                                                                                        : fuzz_size(&in, 8);
    a.q_len = fuzz_size(&in, 40);
    a.kv_len = fuzz_size(&in, 300);
    a.head_dim = fuzz_size(&in, 40);
    a.q_dtype = (fastattn_dtype)fuzz_enum(&in, 3);
    a.k_dtype = fuzz_chance(&in, 128) ? a.q_dtype : (fastattn_dtype)fuzz_enum(&in, 3);
    a.rectified = fuzz_chance(&in, 128);
    a.causal = fuzz_chance(&in, 128);
    a.block_size = options & 1 ? fuzz_size(&in, 20) : 0;
    a.num_keys = fuzz_size(&in, 50);
    if (a.block_size > 0 && fuzz_chance(&in, 250)) a.num_keys -= a.num_keys % a.block_size;
    a.keep_first = options & 2 ? fuzz_size(&in, 12) : 0;
    a.keep_recent = options & 4 ? fuzz_size(&in, 12) : 0;
    a.isa = (fastattn_isa)(fuzz_chance(&in, 128) ? 0 : fuzz_enum(&in, 6));
    a.num_threads = fuzz_chance(&in, 240) ? (int)fuzz_up_to(&in, 4) : (int)fuzz_size(&in, 100);
    a.threading = (fastattn_threading)(fuzz_chance(&in, 240) ? 0 : fuzz_enum(&in, 3));
    int64_t pages = a.batch, rows = a.kv_len;
    int exists = 1;
    if (options & 8) {
        a.num_pages = pages = fuzz_size(&in, 6);
        a.page_size = rows = fuzz_size(&in, 40);
        const int64_t columns = rows > 0 ? a.kv_len / rows + (a.kv_len % rows > 0) : 0;
        const fuzz_array made = fuzz_array_make(&in, &a.batch, &a.block_table_stride, 1, columns, 4, 0);
        a.block_table = made.exists ? made.at : NULL;
        exists &= a.block_table != NULL; /* keys would not lie in pages */
        for (size_t n = 0; n + 4 <= made.bytes; n += 4) {
            const int32_t page = (int32_t)(fuzz_chance(&in, 250) ? fuzz_up_to(&in, pages > 0 ? pages - 1 : 0) : fuzz_size(&in, 20));
            memcpy(made.memory + n, &page, 4);
        }
    }
    const int64_t q_shape[3] = {a.batch, a.num_heads, a.q_len}, k_shape[3] = {pages, a.num_kv_heads, rows};
    const int64_t out_shape[3] = {a.batch, a.num_kv_heads, a.q_len};
    const fuzz_array q = fuzz_rows_make(&in, q_shape, a.q_strides, (int)a.q_dtype, a.head_dim);
    const fuzz_array k = fuzz_rows_make(&in, k_shape, a.k_strides, (int)a.k_dtype, a.head_dim);
    const fuzz_array out = fuzz_array_make(&in, out_shape, a.indices_strides, 3, a.num_keys, 4, 0);
    exists &= q.exists && k.exists && out.exists;
    a.q = q.at;
    a.k = k.at;
    a.indices = out.at;
    if (options & 16) {
        const fuzz_array made = fuzz_array_make(&in, q_shape, a.weights_strides, 3, 1, 4, FUZZ_FLOATS);
        a.weights = made.exists ? made.at : NULL;
    }
    for (int which = 0; which < 2; which++) {
        if (!(options & (which ? 64 : 32))) continue;
        int64_t *table = fuzz_table(a.batch);
        exists &= table != NULL;
        for (int64_t b = 0; table && b < a.batch; b++) table[b] = fuzz_chance(&in, 250) ? fuzz_up_to(&in, a.kv_len) : fuzz_size(&in, 100);
        *(which ? &a.query_offset : &a.kv_lengths) = table;
    }
    const double factors[] = {(double)a.batch, (double)a.num_heads, (double)a.q_len, (double)a.kv_len + 16, (double)a.head_dim + 8};
    double work = 1;
    for (size_t n = 0; n < sizeof factors / sizeof *factors; n++) work *= factors[n] > 1 ? factors[n] : 1;
    if (exists && work < 4e6 && a.batch < 4096 && a.num_heads < 4096) {
        fuzz_blank(&out);
        const fastattn_status status = fastattn_select_keys(fuzz_struct(&a, a.size, sizeof a));
        if (status != FASTATTN_OK) FUZZ_ASSERT(fuzz_is_blank(&out));
        if (status == FASTATTN_OK && out.sound) {
            look_through(&a);
            const uint64_t digest = fuzz_digest(&out);
            a.num_threads = 1;
            fuzz_blank(&out);
            FUZZ_ASSERT(fastattn_select_keys(fuzz_struct(&a, a.size, sizeof a)) == FASTATTN_OK && fuzz_digest(&out) == digest);
        }
    }
    fuzz_close();
    return 0;
}
