#define _POSIX_C_SOURCE 200809L /* posix_memalign */
#include "fuzz.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PATTERN = 0xA7, MOST_BLOCKS = 64 };

static void *blocks[MOST_BLOCKS];
static int block_count;

void fuzz_fail(const char *file, int line, const char *condition) {
    fprintf(stderr, "%s:%d: %s\n", file, line, condition);
    abort();
}

static void *keep(void *block) {
    FUZZ_ASSERT(block_count < MOST_BLOCKS);
    return blocks[block_count++] = block;
}

void fuzz_close(void) {
    while (block_count > 0) free(blocks[--block_count]);
}

fuzz_input fuzz_open(const uint8_t *data, size_t size) { return (fuzz_input){data, size, 88172645463325252u}; }

uint64_t fuzz_bytes(fuzz_input *in, int count) {
    uint64_t x = 0;
    for (; count > 0 && in->left > 0; count--, in->left--) x = x << 8 | *in->at++;
    return x;
}

int fuzz_chance(fuzz_input *in, int of_256) {
    const int byte = (int)fuzz_bytes(in, 1);
    return of_256 < 128 ? byte > 255 - of_256 : byte < of_256; /* 0 is what is likely */
}

int64_t fuzz_up_to(fuzz_input *in, int64_t most) {
    return most > 0 ? (int64_t)(fuzz_bytes(in, most > 254 ? 2 : 1) % ((uint64_t)most + 1)) : 0;
}

int64_t fuzz_size(fuzz_input *in, int64_t usual) {
    static const int64_t limits[] = {-1,
                                     1 << 16,
                                     1 << 20,
                                     (1 << 20) + 1,
                                     1 << 24,
                                     (1 << 24) + 1,
                                     INT32_MAX,
                                     (int64_t)INT32_MAX + 1,
                                     (int64_t)1 << 40,
                                     ((int64_t)1 << 40) + 1,
                                     (int64_t)1 << 56,
                                     INT64_MAX,
                                     INT64_MIN};
    const int kind = (int)fuzz_bytes(in, 1);
    if (kind == 0) return usual / 8 + 1;
    if (kind < 236) return usual > 0 ? kind % ((usual < 512 ? usual : 512) + 1) : 0;
    if (kind < 252) return limits[fuzz_up_to(in, sizeof limits / sizeof *limits - 1)];
    return (int64_t)fuzz_bytes(in, 8);
}

int fuzz_enum(fuzz_input *in, int count) {
    const int kind = (int)fuzz_bytes(in, 1);
    return kind < 252 ? kind % count : (int)(int32_t)fuzz_bytes(in, 4);
}

float fuzz_float(fuzz_input *in) {
    static const float special[] = {0.0f, -0.0f, 1.0f, -1.0f, 1e-30f, 1e30f, 3e38f, INFINITY, -INFINITY, NAN};
    const int kind = (int)fuzz_bytes(in, 1);
    if (kind < 224) return 1.0f - (float)kind / 64.0f;
    return special[kind % (int)(sizeof special / sizeof *special)];
}

size_t fuzz_struct_size(fuzz_input *in, size_t own) {
    const int kind = (int)fuzz_bytes(in, 1);
    if (kind < 192) return own;
    if (kind < 240) return own - (size_t)(kind - 192) * 4;
    return (size_t)fuzz_bytes(in, 8);
}

void *fuzz_struct(const void *from, size_t size, size_t own) {
    const size_t bytes = size < sizeof size ? sizeof size : size < own ? size : own;
    void *copy = keep(malloc(bytes));
    memcpy(copy, from, bytes);
    return copy;
}

static uint64_t next_random(fuzz_input *in) {
    in->random ^= in->random << 13;
    in->random ^= in->random >> 7;
    return in->random ^= in->random << 17;
}

static void fill(fuzz_input *in, char *memory, size_t bytes, int contents) {
    const int wild = fuzz_chance(in, 16);
    for (size_t n = 0; n < bytes; n++) memory[n] = (char)(next_random(in) >> 32);
    for (size_t n = 0; contents == FUZZ_FLOATS && !wild && n + 4 <= bytes; n += 4) {
        const float x = (float)((double)(int64_t)next_random(in) * 0x1p-63);
        memcpy(memory + n, &x, sizeof x);
    }
}

fuzz_array fuzz_array_make(fuzz_input *in, const int64_t *shape, int64_t *strides, int axes, int64_t packed, int64_t size, int contents) {
    static char beyond_use[64];
    fuzz_array made = {.at = beyond_use + 32, .exists = 1, .sound = 1};
    int empty = packed <= 0;
    double count = (double)packed;
    for (int axis = 0; axis < axes; axis++) {
        empty |= shape[axis] <= 0;
        count *= (double)shape[axis];
    }
    const int layout = axes > 0 ? (int)fuzz_bytes(in, 1) : 0;
    uint64_t stride = (uint64_t)packed * (uint64_t)size;
    for (int axis = axes - 1; axis >= 0; axis--) {
        if (layout < 160) { /* packed, maybe with a gap */
            strides[axis] = (int64_t)stride;
            stride = (stride + (uint64_t)(layout % 3 * size)) * (uint64_t)(shape[axis] > 0 ? shape[axis] : 1);
        } else if (layout < 240) {
            strides[axis] = (fuzz_up_to(in, 63) - 16) * size;
            made.sound = 0;
        } else {
            strides[axis] = (int64_t)fuzz_bytes(in, 8);
            made.sound = 0;
        }
    }
    const int hostile = (int)fuzz_bytes(in, 1);
    if (empty) {
        if (hostile > 200) made.at = NULL;
        return made;
    }
    double low = 0, high = (double)packed * (double)size;
    for (int axis = 0; axis < axes; axis++) {
        const double reach = (double)(shape[axis] - 1) * (double)strides[axis];
        if (reach < 0) low += reach;
        else high += reach;
    }
    if (high - low > FUZZ_MOST_BYTES || count > FUZZ_MOST_BYTES || low < -FUZZ_MOST_BYTES) {
        made.exists = 0;
        return made;
    }
    made.bytes = (size_t)(high - low);
    made.memory = keep(malloc(made.bytes));
    FUZZ_ASSERT(made.memory);
    fill(in, made.memory, made.bytes, contents);
    made.at = made.memory + (ptrdiff_t)-low;
    if (hostile == 255) made.at = NULL;
    if (hostile == 254 && size > 1) made.at = (char *)made.at + 1; /* not readable to its end, if it were accepted */
    return made;
}

int64_t fuzz_row(int dtype, int64_t dim, int64_t *size) {
    static const int64_t sizes[] = {4, 2, 2, 8, 1, 1, 1}; /* in the order of fastattn_dtype */
    *size = dtype >= 0 && dtype < (int)(sizeof sizes / sizeof *sizes) ? sizes[dtype] : 2;
    if (dim < 0 || dim >= 1 << 20) return dim;
    return dtype == FASTATTN_INT8 ? dim + 4 : dtype == FASTATTN_INT4 ? dim / 32 * 18 : dim;
}

fuzz_array fuzz_rows_make(fuzz_input *in, const int64_t *shape, int64_t *strides, int dtype, int64_t dim) {
    int64_t size;
    const int64_t packed = fuzz_row(dtype, dim, &size);
    return fuzz_array_make(in, shape, strides, 3, packed, size, size == 4 || size == 1 ? FUZZ_FLOATS : 0);
}

int64_t *fuzz_table(int64_t count) {
    if (count < 0 || count > FUZZ_MOST_BYTES / 8) return NULL;
    int64_t *table = keep(malloc((size_t)count * sizeof *table + (count == 0)));
    FUZZ_ASSERT(table);
    return table;
}

void fuzz_blank(const fuzz_array *array) {
    if (array->memory) memset(array->memory, PATTERN, array->bytes);
}

int fuzz_is_blank(const fuzz_array *array) {
    for (size_t n = 0; array->memory && n < array->bytes; n++)
        if ((uint8_t)array->memory[n] != PATTERN) return 0;
    return 1;
}

uint64_t fuzz_digest(const fuzz_array *array) { /* FNV-1a */
    uint64_t digest = 0xcbf29ce484222325u;
    for (size_t n = 0; array->memory && n < array->bytes; n++) digest = (digest ^ (uint8_t)array->memory[n]) * 0x100000001b3u;
    return digest;
}

void *fuzz_workspace(size_t size) {
    void *block = NULL;
    if (size > FUZZ_MOST_WORKSPACE) return NULL;
    FUZZ_ASSERT(posix_memalign(&block, 64, size + (size == 0)) == 0);
    return keep(block);
}
