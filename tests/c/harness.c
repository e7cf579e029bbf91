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

/* ------------------------------------------------------------------------------------------------- guarded memory */

struct guarded {
    const char *name;
    uint8_t *pages; /* the accessible ones; one inaccessible page on either side */
    size_t pages_size;
    uint8_t *data;
    size_t size;
    int is_input;
    void *map; /* what is released with it, if anything */
    size_t map_size;
    struct guarded *next;
};

enum { SLACK_BYTE = 0xA7 };

static struct guarded *guarded_list;

/* Opens the accessible pages behind the inaccessible one at `map`. */
static uint8_t *guard_open(uint8_t *map, const char *name, size_t size, size_t alignment, enum guard_side side, int is_input) {
    size_t page = system_page();
    size_t pages_size = (size + page - 1) / page * page;
    struct guarded *guarded = malloc(sizeof *guarded);
    CHECK(guarded != NULL, "out of memory");
    *guarded = (struct guarded){name, map + page, pages_size, map + page, size, is_input, NULL, 0, guarded_list};
    if (side == GUARD_BEHIND)
        guarded->data += (pages_size - size) / alignment * alignment;
    if (pages_size > 0) {
        CHECK(system_allow(guarded->pages, pages_size, PAGES_WRITE), "cannot make %s writable", name);
        memset(guarded->pages, SLACK_BYTE, pages_size);
    }
    guarded_list = guarded;
    return guarded->data;
}

/* So many buffers of this size, each between inaccessible pages, and the bytes from one to the next. */
static void *guard_alloc(const char *name, int64_t count, size_t size, size_t alignment, enum guard_side side, int is_input,
                         int64_t *stride) {
    const size_t page = system_page(), step = (size + page - 1) / page * page + page, all = (size_t)count * step + page;
    uint8_t *map = system_pages(all), *first = NULL;
    CHECK(map, "cannot map %zu bytes for %s", all, name);
    *stride = (int64_t)step;
    for (int64_t n = count - 1; n >= 0; n--)
        first = guard_open(map + (size_t)n * step, name, size, alignment, side, is_input);
    guarded_list->map = map;
    guarded_list->map_size = all;
    return first;
}

void *guard_inputs(const char *name, int64_t count, size_t size, size_t alignment, enum guard_side side, int64_t *stride) {
    return guard_alloc(name, count, size, alignment, side, 1, stride);
}

void *guard_input(const char *name, size_t size, size_t alignment, enum guard_side side) {
    int64_t stride;
    return guard_alloc(name, 1, size, alignment, side, 1, &stride);
}

void *guard_output(const char *name, size_t size, size_t alignment, enum guard_side side) {
    int64_t stride;
    return guard_alloc(name, 1, size, alignment, side, 0, &stride);
}

void guard_seal(void) {
    for (struct guarded *g = guarded_list; g; g = g->next)
        if (g->is_input && g->pages_size > 0)
            CHECK(system_allow(g->pages, g->pages_size, PAGES_READ), "cannot seal %s", g->name);
}

void guard_check(void) {
    for (struct guarded *g = guarded_list; g; g = g->next)
        for (size_t i = 0; i < g->pages_size; i++)
            if ((g->pages + i < g->data || g->pages + i >= g->data + g->size) && g->pages[i] != SLACK_BYTE)
                fail(__FILE__, __LINE__, "a byte was written %td bytes from the start of %s, whose size is %zu",
                     g->pages + i - g->data, g->name, g->size);
}

void guard_release(void) {
    while (guarded_list) {
        struct guarded *g = guarded_list;
        guarded_list = g->next;
        if (g->map) system_release(g->map, g->map_size);
        free(g);
    }
}

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

/* --------------------------------------------------------------------------------------------------- random numbers */

uint64_t random_bits(struct rng *rng) {
    uint64_t z = rng->state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

int64_t random_between(struct rng *rng, int64_t low, int64_t high) {
    return low + (int64_t)(random_bits(rng) % (uint64_t)(high - low + 1));
}

double random_signed(struct rng *rng) { return (double)(int64_t)random_bits(rng) * 0x1p-63; }

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

/* Says which buffer a faulting address lies next to. */
static void report_fault(const void *at) {
    const uint8_t *address = at;
    const struct guarded *nearest = NULL;
    ptrdiff_t distance = 0;
    for (const struct guarded *g = guarded_list; g && at; g = g->next) {
        ptrdiff_t d = address - g->data;
        if (!nearest || llabs((long long)d) < llabs((long long)distance)) {
            nearest = g;
            distance = d;
        }
    }
    snprintf(report->message, sizeof report->message, at ? "fault at %p" : "an instruction that is not known", at);
    if (nearest)
        snprintf(report->message, sizeof report->message,
                 "fault at byte %td of %s, whose size is %zu (an inaccessible page, or a write to an input)", distance,
                 nearest->name, nearest->size);
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

/* usage: program [effort in percent [part of a test's name [an instruction set, which then has to be available]]] */
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
        if (!strstr(test->name, wanted))
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
