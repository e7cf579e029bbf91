/* fastattn_store: rows, pages and slots; values beside their keys. */
#include "fuzz.h"

#include <string.h>

typedef struct store {
    fastattn_store_args args;
    fuzz_array to;
    int exists; /* all of the memory that it speaks of */
} store;

static store make(fuzz_input *in) {
    store x;
    fastattn_store_args *const a = &x.args;
    memset(a, 0, sizeof *a);
    a->size = fuzz_chance(in, 250) ? sizeof *a : (size_t)fuzz_bytes(in, 8);
    a->batch = fuzz_size(in, 4);
    a->new_len = fuzz_size(in, 40);
    a->num_heads = fuzz_size(in, 4);
    a->head_dim = fuzz_size(in, 70);
    a->num_pages = fuzz_size(in, 9);
    a->page_size = fuzz_size(in, 20);
    a->from_dtype = (fastattn_dtype)fuzz_enum(in, 3);
    a->to_dtype = (fastattn_dtype)fuzz_enum(in, 7);
    a->isa = (fastattn_isa)(fuzz_chance(in, 128) ? 0 : fuzz_enum(in, 6));
    a->num_threads = (int)fuzz_size(in, 4);
    a->threading = (fastattn_threading)(fuzz_chance(in, 240) ? 0 : fuzz_enum(in, 3));
    const int64_t from_shape[3] = {a->batch, a->new_len, a->num_heads}, to_shape[3] = {a->num_pages, a->page_size, a->num_heads};
    const fuzz_array from = fuzz_rows_make(in, from_shape, a->from_strides, (int)a->from_dtype, a->head_dim);
    x.to = fuzz_rows_make(in, to_shape, a->to_strides, (int)a->to_dtype, a->head_dim);
    a->from = from.at;
    a->to = x.to.at;
    const int small = a->batch < 256 && a->new_len < 256 && a->batch >= 0 && a->new_len >= 0;
    const int64_t rows = a->num_pages >= 0 && a->num_pages < 256 && a->page_size >= 0 && a->page_size < 256 ? a->num_pages * a->page_size
                                                                                                            : 0;
    int64_t *slots = small ? fuzz_table(a->batch * a->new_len) : NULL;
    for (int64_t t = 0; slots && t < a->batch * a->new_len; t++)
        slots[t] = fuzz_chance(in, 254) ? fuzz_up_to(in, rows) - 1 : fuzz_size(in, 40);
    a->slots = slots;
    a->rotate = !fuzz_chance(in, 176);
    x.exists = from.exists && x.to.exists && (small || a->batch < 0 || a->new_len < 0);
    return x;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_input in = fuzz_open(data, size);
    store first = make(&in), second = {.exists = 1};
    if (!fuzz_chance(&in, 176)) {
        second = make(&in);
        first.args.also = fuzz_struct(&second.args, second.args.size, sizeof second.args);
    }
    if (first.exists && second.exists) {
        fuzz_blank(&first.to);
        fuzz_blank(&second.to);
        const fastattn_store_args *args = fuzz_struct(&first.args, first.args.size, sizeof first.args);
        const fastattn_status status = fastattn_store(args);
        if (status != FASTATTN_OK) FUZZ_ASSERT(fuzz_is_blank(&first.to) && fuzz_is_blank(&second.to));
    }
    fuzz_close();
    return 0;
}
