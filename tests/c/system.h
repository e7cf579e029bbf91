/* What the harness asks of a system: pages that fault, and tests that run apart.
 *
 * POSIX forks a child for each test; Windows starts the program anew. WebAssembly has neither processes nor pages that fault: there
 * tests follow each other in one, the first crash is the end, and a stray access is found only where it writes beside a buffer. */
#ifndef TEST_SYSTEM_H
#define TEST_SYSTEM_H

#include <stddef.h>

enum page_access { PAGES_NONE, PAGES_READ, PAGES_WRITE };

size_t system_page(void);
void *system_pages(size_t size); /* inaccessible; null when there are none */
int system_allow(void *pages, size_t size, enum page_access access);
void system_release(void *pages, size_t size);

/* Memory that a test has in common with whoever runs it. */
void *system_shared(size_t size, int argc, char **argv);

/* The test and the instruction set that this process was started for by system_run, or null where it has to find tests itself. */
const char *system_asked_for(int argc, char **argv, int *isa);

/* Runs a test apart, and returns its exit status; or -1, and in `how` what it ended by. */
int system_run(void (*run)(void), const char *name, int isa, int effort, char *how, size_t size);
__attribute__((noreturn)) void system_exit(int status); /* of a test */

/* Has a fault reported, before it ends the test. `at` is null for an instruction that the processor does not know. */
void system_on_fault(void (*report)(const void *at));

#endif
