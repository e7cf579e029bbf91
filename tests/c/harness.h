/* The harness of the C tests: registration, checks, random numbers, guarded memory.
 *
 * Every test runs in a process of its own, where the system has such, so that a crash or a hang is the failure of one test and not the end
 * of the run. What a test wants to say about the case at hand goes into context(), which is printed only when it fails.
 */
#ifndef TEST_HARNESS_H
#define TEST_HARNESS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* pthread barriers */
#endif
#include <stddef.h>
#include <stdint.h>
#include <stdio.h> /* the names of formats */

#include "fastattn.h"

#define COUNT(array) (sizeof(array) / sizeof(array)[0])

struct test {
    const char *name;
    void (*run)(void);
    int each_isa;
    struct test *next;
};

void test_register(struct test *test);

#define TEST_DEFINE(function, isas)                                      \
    static void function(void);                                          \
    __attribute__((constructor)) static void register_##function(void) { \
        static struct test test = {#function, function, isas, NULL};     \
        test_register(&test);                                            \
    }                                                                    \
    static void function(void)

/* TEST runs once. TEST_EACH_ISA runs once for every instruction set that is available, which is then in test_isa. */
#define TEST(function) TEST_DEFINE(function, 0)
#define TEST_EACH_ISA(function) TEST_DEFINE(function, 1)

extern fastattn_isa test_isa;

/* How much random testing to do, in percent: emulation and sanitizers ask for less. */
extern int test_effort;

#ifdef __MINGW_PRINTF_FORMAT /* C's own, and not Windows' */
#define PRINTF __MINGW_PRINTF_FORMAT
#else
#define PRINTF __printf__
#endif
__attribute__((format(PRINTF, 1, 2))) void context(const char *format, ...);
__attribute__((noreturn, format(PRINTF, 3, 4))) void fail(const char *file, int line, const char *format, ...);
__attribute__((noreturn)) void skip(const char *reason);

#define CHECK(condition, ...)                      \
    do {                                           \
        if (!(condition))                          \
            fail(__FILE__, __LINE__, __VA_ARGS__); \
    } while (0)
#define CHECK_STATUS(expression, expected)                                                               \
    do {                                                                                                 \
        fastattn_status status_ = (expression);                                                          \
        CHECK(status_ == (expected), "%s: status %d, not %s (%d)", #expression, (int)status_, #expected, \
              (int)(expected));                                                                          \
    } while (0)

/* Random numbers: splitmix64, the same on every machine. */
struct rng {
    uint64_t state;
};
uint64_t random_bits(struct rng *rng);
int64_t random_between(struct rng *rng, int64_t low, int64_t high); /* both included */
double random_signed(struct rng *rng);                              /* uniform in [-1, 1) */

/* Memory between two inaccessible pages. The bytes lie flush against the page behind (as flush as the alignment lets
 * them) or against the page before; a stray access faults, and one into the slack is found by guard_check. */
enum guard_side { GUARD_BEHIND, GUARD_BEFORE };

void *guard_input(const char *name, size_t size, size_t alignment, enum guard_side side);
void *guard_output(const char *name, size_t size, size_t alignment, enum guard_side side);
/* One or more inputs of the same size, each between such pages; stride is the bytes from one to the next. */
void *guard_inputs(const char *name, int64_t count, size_t size, size_t alignment, enum guard_side side, int64_t *stride);
void guard_seal(void);    /* from now on a write to an input faults */
void guard_check(void);   /* the slack around every live buffer is as it was */
void guard_release(void); /* all buffers */
/* The buffer that an address lies next to, or a null name, and the bytes from its start. */
ptrdiff_t guard_nearest(const void *at, const char **name, size_t *size);

/* Calls of malloc and its kin by the objects linked into the test program (not by shared libraries). While
 * allocation_fails is set, they return null. */
extern int allocation_count, allocation_fails;

#endif
