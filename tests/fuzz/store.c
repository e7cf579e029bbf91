/* fastattn_store: rows, pages and slots. */
#include "fuzz.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_input in = fuzz_open(data, size);
    fastattn_store_args a;
    memset(&a, 0, sizeof a);
    a.size = fuzz_chance(&in, 250) ? sizeof a : (size_t)fuzz_bytes(&in, 8);
    a.batch = fuzz_size(&in, 4);
    a.new_len = fuzz_size(&in, 40);
    a.num_heads = fuzz_size(&in, 4);
    a.head_dim = fuzz_size(&in, 70);
    a.num_pages = fuzz_size(&in, 9);
    a.page_size = fuzz_size(&in, 20);
    a.from_dtype = (fastattn_dtype)fuzz_enum(&in, 3);
    a.to_dtype = (fastattn_dtype)fuzz_enum(&in, 3);
    a.isa = (fastattn_isa)(fuzz_chance(&in, 128) ? 0 : fuzz_enum(&in, 6));
    a.num_threads = (int)fuzz_size(&in, 4);
    a.threading = (fastattn_threading)(fuzz_chance(&in, 240) ? 0 : fuzz_enum(&in, 3));
    const int64_t from_shape[3] = {a.batch, a.new_len, a.num_heads}, to_shape[3] = {a.num_pages, a.page_size, a.num_heads};
    const int from_size = a.from_dtype == FASTATTN_FLOAT32 ? 4 : 2, to_size = a.to_dtype == FASTATTN_FLOAT32 ? 4 : 2;
    const fuzz_array from = fuzz_array_make(&in, from_shape, a.from_strides, 3, a.head_dim, from_size, from_size == 4 ? FUZZ_FLOATS : 0);
    const fuzz_array to = fuzz_array_make(&in, to_shape, a.to_strides, 3, a.head_dim, to_size, 0);
    a.from = from.at;
    a.to = to.at;
    const int small = a.batch < 256 && a.new_len < 256 && a.batch >= 0 && a.new_len >= 0;
    const int64_t rows = a.num_pages >= 0 && a.num_pages < 256 && a.page_size >= 0 && a.page_size < 256 ? a.num_pages * a.page_size : 0;
    int64_t *slots = small ? fuzz_table(a.batch * a.new_len) : NULL;
    for (int64_t t = 0; slots && t < a.batch * a.new_len; t++)
        slots[t] = fuzz_chance(&in, 254) ? fuzz_up_to(&in, rows) - 1 : fuzz_size(&in, 40);
    a.slots = slots;
    if (from.exists && to.exists && (small || a.batch < 0 || a.new_len < 0)) {
        fuzz_blank(&to);
        const fastattn_store_args *args = fuzz_struct(&a, a.size, sizeof a);
        const fastattn_status status = fastattn_store(args);
        if (status != FASTATTN_OK) FUZZ_ASSERT(fuzz_is_blank(&to));
    }
    fuzz_close();
    return 0;
}
