/* fastattn_merge_states: any number of parts. */
#include "fuzz.h"

#include <math.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_input in = fuzz_open(data, size);
    const int64_t parts = fuzz_size(&in, 12), rows = fuzz_size(&in, 40), dim = fuzz_size(&in, 70);
    const fastattn_dtype dtype = (fastattn_dtype)fuzz_enum(&in, 3);
    const int64_t bytes = dtype == FASTATTN_FLOAT32 ? 4 : 2, shape[1] = {rows};
    int64_t stride;
    const void *outs[12];
    const float *lses[12];
    int exists = 1;
    for (int64_t n = 0; n < parts && n < 12; n++) {
        const fuzz_array out = fuzz_array_make(&in, NULL, NULL, 0, rows > 0 && dim > 0 && rows < 256 && dim < 256 ? rows * dim : 0, bytes,
                                               bytes == 4 ? FUZZ_FLOATS : 0);
        const fuzz_array lse = fuzz_array_make(&in, NULL, NULL, 0, rows, 4, FUZZ_FLOATS);
        outs[n] = out.at;
        lses[n] = lse.at;
        exists &= out.exists && lse.exists;
        for (int64_t r = 0; lse.memory && r < rows; r++)
            if (fuzz_chance(&in, 24)) {
                const float x = fuzz_float(&in);
                memcpy(lse.memory + r * 4, &x, sizeof x);
            }
    }
    const fuzz_array out = fuzz_array_make(&in, shape, &stride, 1, dim, bytes, 0), lse = fuzz_array_make(&in, NULL, NULL, 0, rows, 4, 0);
    /* Rows and their numbers that cannot exist have to be refused, and whoever asks for such has memory for none. */
    const int refused = parts < 0 || rows < 0 || dim < 0 || dim > 1 << 20;
    const int here = exists && parts <= 12 && rows < 256 && dim < 256 && out.exists && lse.exists &&
                     (rows < 2 || dim < 1 || stride == dim * bytes);
    if (refused || here) {
        fuzz_blank(&out);
        fuzz_blank(&lse);
        const fastattn_status status = fastattn_merge_states(parts, fuzz_chance(&in, 254) ? outs : NULL,
                                                             fuzz_chance(&in, 254) ? lses : NULL, rows, dim, dtype, out.at, lse.at);
        FUZZ_ASSERT(!refused || status == FASTATTN_ERROR_SHAPE);
        if (status != FASTATTN_OK) FUZZ_ASSERT(fuzz_is_blank(&out) && fuzz_is_blank(&lse));
    }
    fuzz_close();
    return 0;
}
