/* fastattn_rope: out of place and in place. */
#include "fuzz.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_input in = fuzz_open(data, size);
    fastattn_rope_args a;
    memset(&a, 0, sizeof a);
    a.size = fuzz_chance(&in, 250) ? sizeof a : (size_t)fuzz_bytes(&in, 8);
    a.batch = fuzz_size(&in, 4);
    a.num_heads = fuzz_size(&in, 9);
    a.length = fuzz_size(&in, 40);
    a.head_dim = fuzz_size(&in, 70);
    a.rotary_dim = fuzz_chance(&in, 240) && a.head_dim >= 0 && a.head_dim < 256 ? fuzz_up_to(&in, a.head_dim / 2) * 2 : fuzz_size(&in, 70);
    a.dtype = (fastattn_dtype)fuzz_enum(&in, 3);
    a.interleaved = fuzz_chance(&in, 128);
    a.isa = (fastattn_isa)(fuzz_chance(&in, 128) ? 0 : fuzz_enum(&in, 6));
    a.num_threads = (int)fuzz_size(&in, 4);
    a.threading = (fastattn_threading)(fuzz_chance(&in, 240) ? 0 : fuzz_enum(&in, 3));
    const int64_t shape[3] = {a.batch, a.num_heads, a.length}, bytes = a.dtype == FASTATTN_FLOAT32 ? 4 : 2;
    const int contents = bytes == 4 ? FUZZ_FLOATS : 0;
    const fuzz_array x = fuzz_array_make(&in, shape, a.x_strides, 3, a.head_dim, bytes, contents);
    fuzz_array out = x;
    if (fuzz_chance(&in, 192)) out = fuzz_array_make(&in, shape, a.out_strides, 3, a.head_dim, bytes, 0);
    else memcpy(a.out_strides, a.x_strides, sizeof a.out_strides);
    const fuzz_array cosines = fuzz_array_make(&in, shape, a.cos_strides, 3, a.rotary_dim / 2, 4, FUZZ_FLOATS);
    const fuzz_array sines = fuzz_array_make(&in, shape, a.sin_strides, 3, a.rotary_dim / 2, 4, FUZZ_FLOATS);
    a.x = x.at;
    a.out = out.at;
    a.cos = cosines.at;
    a.sin = sines.at;
    if (x.exists && out.exists && cosines.exists && sines.exists) {
        const uint64_t before = fuzz_digest(&out);
        const fastattn_status status = fastattn_rope(fuzz_struct(&a, a.size, sizeof a));
        if (status != FASTATTN_OK) FUZZ_ASSERT(before == fuzz_digest(&out));
    }
    fuzz_close();
    return 0;
}
