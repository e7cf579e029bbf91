#include "harness.h"
#include "system.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#elif defined(__has_feature)
#define SANITIZED (__has_feature(address_sanitizer) || __has_feature(thread_sanitizer))
#else
#define SANITIZED 0
#endif

enum { EXIT_FAILED = 1, EXIT_SKIPPED = 77 };

fastattn_isa test_isa;
int test_effort = 100;

/* ------------------------------------------------------------------------------------------- allocations, by --wrap */

int allocation_count, allocation_fails;

void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__real_realloc(void *memory, size_t size);

static int allocation_refused(void) {
    __atomic_add_fetch(&allocation_count, 1, __ATOMIC_RELAXED);
    return __atomic_load_n(&allocation_fails, __ATOMIC_RELAXED);
}

void *__wrap_malloc(size_t size);
void *__wrap_malloc(size_t size) { return allocation_refused() ? NULL : __real_malloc(size); }

void *__wrap_calloc(size_t count, size_t size);
void *__wrap_calloc(size_t count, size_t size) { return allocation_refused() ? NULL : __real_calloc(count, size); }

void *__wrap_realloc(void *memory, size_t size);
void *__wrap_realloc(void *memory, size_t size) { return allocation_refused() ? NULL : __real_realloc(memory, size); }

#ifndef _WIN32 /* where there is neither */
void *__real_aligned_alloc(size_t alignment, size_t size);
void *__wrap_aligned_alloc(size_t alignment, size_t size);
void *__wrap_aligned_alloc(size_t alignment, size_t size) {
    return allocation_refused() ? NULL : __real_aligned_alloc(alignment, size);
}

int __real_posix_memalign(void **memory, size_t alignment, size_t size);
int __wrap_posix_memalign(void **memory, size_t alignment, size_t size);
int __wrap_posix_memalign(void **memory, size_t alignment, size_t size) {
    return allocation_refused() ? ENOMEM : __real_posix_memalign(memory, alignment, size);
}
#endif

/* ------------------------------------------------------------------------------------------------------- the runner */

/* What the child tells its parent; shared memory, so that it survives a crash. */
struct report {
    char context[1024];
    char message[2048];
};
static struct report *report;

void context(const char *format, ...) {
    va_list list;
    va_start(list, format);
    vsnprintf(report->context, sizeof report->context, format, list);
    va_end(list);
}

void fail(const char *file, int line, const char *format, ...) {
    va_list list;
    const char *name = strrchr(file, '/');
    size_t used = (size_t)snprintf(report->message, sizeof report->message, "%s:%d: ", name ? name + 1 : file, line);
    va_start(list, format);
    vsnprintf(report->message + used, sizeof report->message - used, format, list);
    va_end(list);
    system_exit(EXIT_FAILED);
}

void skip(const char *reason) {
    snprintf(report->message, sizeof report->message, "%s", reason);
    system_exit(EXIT_SKIPPED);
}

static void report_fault(const void *at) {
    const char *name;
    size_t size;
    const ptrdiff_t distance = guard_nearest(at, &name, &size);
    snprintf(report->message, sizeof report->message, at ? "fault at %p" : "an instruction that is not known", at);
    if (name)
        snprintf(report->message, sizeof report->message,
                 "fault at byte %td of %s, whose size is %zu (an inaccessible page, or a write to an input)", distance, name, size);
}

static struct test *tests, **tests_end = &tests;

void test_register(struct test *test) {
    *tests_end = test;
    tests_end = &test->next;
}

static int counts[3]; /* passed, failed, skipped */

static void conclude(int outcome, const char *name, const char *detail) {
    static const char *const words[] = {"pass", "FAIL", "skip"};
    counts[outcome]++;
    printf("%s %s%s%s\n", words[outcome], name, *detail ? ": " : "", detail);
    fflush(stdout);
}

static const struct test *running;

static void run_apart(void) {
    if (!SANITIZED) /* which has a report of its own, with a stack */
        system_on_fault(report_fault);
    running->run();
    guard_release();
}

static void run_test(const struct test *test, const char *name) {
    char how[256] = "", detail[sizeof *report + sizeof how + 8];
    memset(report, 0, sizeof *report);
    running = test;
    const int status = system_run(run_apart, test->name, (int)test_isa, test_effort, how, sizeof how);
    if (status == 0 || status == EXIT_SKIPPED) {
        conclude(status == 0 ? 0 : 2, name, report->message);
        return;
    }
    if (status > 0 && !*report->message)
        snprintf(how, sizeof how, "exit status %d", status);
    snprintf(detail, sizeof detail, "%s%s%s%s%s", how, *how && *report->message ? "; " : "", report->message,
             *report->context ? "; " : "", report->context);
    conclude(1, name, detail);
}

/* Where a process has been started for one test. */
static int run_one(const char *name) {
    for (running = tests; running && strcmp(running->name, name); running = running->next) continue;
    if (!running)
        return 2;
    run_apart();
    return 0;
}

/* Whether the name holds one of the parts, which commas separate. */
static int is_wanted(const char *name, const char *parts) {
    for (const char *comma;; parts = comma + 1) {
        char part[128];
        comma = strchr(parts, ',');
        snprintf(part, sizeof part, "%.*s", comma ? (int)(comma - parts) : (int)strlen(parts), parts);
        if (strstr(name, part)) return 1;
        if (!comma) return 0;
    }
}

/* usage: program [effort in percent [parts of tests' names [an instruction set, which then has to be available]]] */
int main(int argc, char **argv) {
    const char *wanted = argc > 2 ? argv[2] : "", *wanted_isa = argc > 3 ? argv[3] : "";
    if (argc > 1)
        test_effort = atoi(argv[1]);
    int isa;
    report = system_shared(sizeof *report, argc, argv);
    if (!report)
        return 2;
    const char *asked_for = system_asked_for(argc, argv, &isa);
    if (asked_for) {
        test_isa = (fastattn_isa)isa;
        return run_one(asked_for);
    }
    for (const struct test *test = tests; test; test = test->next) {
        if (!is_wanted(test->name, wanted))
            continue;
        if (!test->each_isa) {
            test_isa = FASTATTN_ISA_BEST;
            run_test(test, test->name);
            continue;
        }
        for (isa = FASTATTN_ISA_PORTABLE; fastattn_isa_name((fastattn_isa)isa); isa++) {
            char name[128];
            test_isa = (fastattn_isa)isa;
            if (*wanted_isa && strcmp(wanted_isa, fastattn_isa_name(test_isa)))
                continue;
            snprintf(name, sizeof name, "%s[%s]", test->name, fastattn_isa_name(test_isa));
            if (fastattn_isa_available(test_isa))
                run_test(test, name);
            else
                conclude(*wanted_isa ? 1 : 2, name, "not available");
        }
    }
    printf("%d passed, %d failed, %d skipped\n", counts[0], counts[1], counts[2]);
    return counts[1] > 0;
}
