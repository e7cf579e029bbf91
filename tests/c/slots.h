/* What the tests of slots share: layouts to try, guarded panels and rows of random numbers, and comparisons.
 *
 * table() makes the random numbers of a test begin anew, so that they depend on the test alone. */
#ifndef TEST_SLOTS_H
#define TEST_SLOTS_H

#include <math.h>

#include "problem.h"
#include "ukernel/ukernel.h"

/* Columns of a panel: its leading dimension, and the part of it that a slot is called for. */
struct columns {
    int ld, first, rows;
};
extern const struct columns columns[7];
extern const fastattn_dtype dtypes[3];
extern const int64_t edges[26]; /* numbers of a row */
extern struct rng rng;

const fa_ukernel *table(void);

enum { UNTOUCHED = 12345 }; /* what a panel is full of */

/* A panel is aligned and its size is a multiple of the alignment, so that it lies flush at both of its ends. */
float *panel(const char *name, int64_t rows, int ld);

float *random_floats(const char *name, int64_t count, double amplitude);

/* Row pointers into an array of `rows` rows of `count` elements with a gap between them; the last rows may repeat. */
char *random_rows(const void *rows_of[FA_PANEL_ROWS], int rows, int distinct, int64_t count, int64_t stride,
                  fastattn_dtype dtype);

/* `keys` rows of a storage type, flush against a guard page, with NaN in the gaps; stride is in bytes. */
fa_matrix stored_rows(const char *name, int64_t keys, int64_t dim, int64_t stride, fastattn_dtype dtype);
char *stored_at(fa_matrix stored, int64_t key, int64_t d);
double stored_number(fa_matrix stored, int64_t key, int64_t d);

/* Where the score of a row and key, or a row's number of q or o, lies in the panels of a table. */
static inline int64_t score_at(const fa_products *by, int ld, int64_t row, int64_t key) {
    return row * fa_row_of_scores(by, ld) + key * fa_key_of_scores(by, ld);
}
static inline int64_t number_at(const fa_products *by, int ld, int64_t dim, int64_t row, int64_t d) {
    return row * fa_row_of_numbers(by, dim) + d * fa_number_of_numbers(by, ld);
}

/* The same of o. */
static inline int64_t o_at(const fa_products *by, int ld, int64_t dim, int64_t row, int64_t d) {
    return row * fa_row_of_o(by, dim) + d * fa_number_of_o(by, ld);
}

/* A sum in double precision, and the magnitudes of its terms, which the error of the same sum in float32 grows with. */
struct sum {
    double value, magnitude;
};
static inline void add(struct sum *sum, double term) {
    sum->value += term;
    sum->magnitude += fabs(term);
}
double rounding_of_sum(int64_t terms); /* relative to the magnitudes */
float fused(float a, float b, float c); /* a b + c, rounded once; not every system's fmaf does that (MinGW-w64's) */

void check_close(const char *what, int64_t row, int64_t column, double got, double wanted, double tolerance);

#endif
