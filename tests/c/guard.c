/* Guarded memory, and the random numbers that go into it. */
#include "harness.h"
#include "system.h"

#include <stdlib.h>
#include <string.h>

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

ptrdiff_t guard_nearest(const void *at, const char **name, size_t *size) {
    const uint8_t *address = at;
    ptrdiff_t distance = 0;
    *name = NULL;
    for (const struct guarded *g = guarded_list; g && at; g = g->next) {
        const ptrdiff_t d = address - g->data;
        if (*name && llabs((long long)d) >= llabs((long long)distance)) continue;
        distance = d, *name = g->name, *size = g->size;
    }
    return distance;
}

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
