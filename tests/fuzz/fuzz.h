/* What the fuzzing targets share: numbers out of the bytes of the fuzzer, and arrays that are exactly as large as an argument struct says.
 *
 * A target decodes an argument struct from the bytes, most often one that could be valid, and hands it to the library. An array
 * lies in memory of its own, flush at both ends, so that the address sanitizer sees whatever is read or written beside it. What a
 * target asserts itself: an error writes nothing, and the ways to make one call agree, on the status and on every bit. */
#ifndef FUZZ_H
#define FUZZ_H

#include <stddef.h>
#include <stdint.h>

#include "fastattn.h"

typedef struct fuzz_input {
    const uint8_t *at;
    size_t left;
    uint64_t random; /* of the numbers in arrays */
} fuzz_input;

fuzz_input fuzz_open(const uint8_t *data, size_t size);

/* 0 when the bytes are used up. */
uint64_t fuzz_bytes(fuzz_input *in, int count);
int fuzz_chance(fuzz_input *in, int of_256);
int64_t fuzz_up_to(fuzz_input *in, int64_t most); /* at least 0; 65535 at most */

/* Of an axis: small as a rule, sometimes near a limit of the library or of int64_t, rarely anything. */
int64_t fuzz_size(fuzz_input *in, int64_t usual);
int fuzz_enum(fuzz_input *in, int count); /* below count as a rule */
float fuzz_float(fuzz_input *in);

/* sizeof the struct as a rule; a smaller one, of an earlier header perhaps; or anything. */
size_t fuzz_struct_size(fuzz_input *in, size_t own);

/* An array, whose last `packed` elements of `size` bytes are contiguous, and where it lies. */
typedef struct fuzz_array {
    void *at;
    char *memory;
    size_t bytes;
    int exists, sound; /* there is memory for all of it; no two of its elements overlap */
} fuzz_array;

enum { FUZZ_FLOATS = 1 }; /* contents: finite float32 numbers as a rule, and not random bytes */

/* Chooses strides (of `axes` axes; they may be null where there are none) and makes the array. `at` is null or misaligned at times, and
 * not null but not to be used where the array does not exist, for its size is beyond what is tried here, or no size at all. */
fuzz_array fuzz_array_make(fuzz_input *in, const int64_t *shape, int64_t *strides, int axes, int64_t packed, int64_t size, int contents);

/* A row of `dim` numbers: how many elements of `size` bytes; of quantised ones bytes, scales included (of sizes that are refused, whatever). */
int64_t fuzz_row(int dtype, int64_t dim, int64_t *size);

/* An array of such rows, (shape[0], shape[1], shape[2], dim): of finite numbers as a rule where a bit pattern is likely to be none. */
fuzz_array fuzz_rows_make(fuzz_input *in, const int64_t *shape, int64_t *strides, int dtype, int64_t dim);

/* A table of count numbers, filled by the caller; null when there are too many. */
int64_t *fuzz_table(int64_t count);

/* All memory of the input. */
void fuzz_close(void);

/* Copies of a struct's first `size` bytes, in memory of that size. */
void *fuzz_struct(const void *from, size_t size, size_t own);

/* Outputs hold a pattern before a call. */
void fuzz_blank(const fuzz_array *array);
int fuzz_is_blank(const fuzz_array *array);
uint64_t fuzz_digest(const fuzz_array *array);

/* 64-byte aligned memory of exactly so many bytes, or null. */
void *fuzz_workspace(size_t size);

enum { FUZZ_MOST_BYTES = 1 << 18, FUZZ_MOST_WORKSPACE = 1 << 26 };

#define FUZZ_ASSERT(condition)                                       \
    do {                                                             \
        if (!(condition)) fuzz_fail(__FILE__, __LINE__, #condition); \
    } while (0)
#if defined(__GNUC__)
__attribute__((noreturn))
#endif
void fuzz_fail(const char *file, int line, const char *condition);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#endif
