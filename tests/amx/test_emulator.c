/* The tile instructions against plain loops: on a processor with AMX this tests what emulator.c takes AMX to be, elsewhere,
 * with the emulator preloaded, the emulator. */
#include "../c/problem.h"
#include "simd/half.h"

#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#include <xmmintrin.h>

enum { ROWS = 16, ROW_BYTES = 64, PAIRS = 16, LANES = 16, DEFAULT_MXCSR = 0x1f80 };

struct config {
    uint8_t palette, start_row, reserved[14];
    uint16_t colsb[16];
    uint8_t rows[16];
};

/* The clobber keeps the compiler from moving stores, to the configuration too, past the instruction. */
#define TILE(text, ...) __asm__ volatile(text : : __VA_ARGS__ : "memory")
#define TILE_LOAD(tile, memory, stride) \
    TILE("tileloadd (%0,%1,1), %%tmm" #tile, "r"(memory), "r"((ptrdiff_t)(stride)))
#define TILE_STORE(tile, memory, stride) \
    TILE("tilestored %%tmm" #tile ", (%0,%1,1)", "r"(memory), "r"((ptrdiff_t)(stride)))
#define TILE_ZERO(tile) TILE("tilezero %%tmm" #tile)
#define TILE_PRODUCT(c, a, b) TILE("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c)
#define TILE_RELEASE() TILE("tilerelease")

static void load_config(const struct config *config) { TILE("ldtilecfg (%0)", "r"(config)); }
static void store_config(struct config *config) { TILE("sttilecfg (%0)", "r"(config)); }

static struct config same_tiles(int rows, int colsb) {
    struct config config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        config.rows[tile] = (uint8_t)rows;
        config.colsb[tile] = (uint16_t)colsb;
    }
    return config;
}

static void configure(int rows, int colsb) {
    const struct config config = same_tiles(rows, colsb);
    load_config(&config);
}

static void random_bytes(struct rng *rng, void *memory, size_t size) {
    for (size_t i = 0; i < size; i++)
        ((uint8_t *)memory)[i] = (uint8_t)random_bits(rng);
}

/* Linux lets a process use the tile registers once it has asked; where there are none, asking fails and harms nothing. */
__attribute__((constructor)) static void ask_for_tiles(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}

/* A sandbox may refuse what the processor has: then other kernels serve. The emulator plays the system as well. */
TEST(amx_refused) {
    if (!getenv("AMX_REFUSED")) skip("granted");
    static const struct spec spec = {.name = "refused", .heads = 2, .q_len = 70, .kv_len = 90, .head_dim = 64,
                                     .q_dtype = FASTATTN_BFLOAT16, .kv_dtype = FASTATTN_BFLOAT16};
    struct problem problem;
    CHECK(syscall(SYS_arch_prctl, 0x1023, 18) == -1 && errno == EPERM, "nothing refuses");
    CHECK(!fastattn_isa_available(FASTATTN_ISA_AMX), "AMX, which the system refuses");
    problem_build(&problem, &spec, 1, GUARD_BEHIND);
    problem_seal(&problem, GUARD_BEHIND);
    CHECK_STATUS(fastattn_attention(&problem.args, NULL, 0), FASTATTN_OK);
    problem_verify(&problem, 1);
    problem.args.isa = FASTATTN_ISA_AMX;
    CHECK_STATUS(fastattn_attention(&problem.args, NULL, 0), FASTATTN_ERROR_ISA);
    guard_release();
}

/* -------------------------------------------------------------------------------------------------------- configuration */

TEST(emulator_configuration) {
    const struct config none = {0};
    struct config config = {.palette = 1}, found;
    memset(&found, 0xff, sizeof found);
    store_config(&found);
    CHECK(!memcmp(&found, &none, sizeof found), "configured from the start");
    for (int tile = 0; tile < 8; tile += 1 + (tile == 4)) { /* tile 5 is absent */
        config.rows[tile] = (uint8_t)(2 * tile + 1);
        config.colsb[tile] = (uint16_t)(64 - 3 * tile);
    }
    load_config(&config);
    store_config(&found);
    CHECK(!memcmp(&found, &config, sizeof found), "not the configuration that was loaded");
    TILE_RELEASE();
    store_config(&found);
    CHECK(!memcmp(&found, &none, sizeof found), "configured after tilerelease");
    load_config(&config);
    load_config(&none);
    store_config(&found);
    CHECK(!memcmp(&found, &none, sizeof found), "configured by palette 0");
}

TEST(emulator_configuration_addresses) {
    static struct config config, found, table[16];
    config = same_tiles(3, 20);
    TILE("ldtilecfg %0", "m"(config)); /* relative to RIP */
    TILE("sttilecfg %0", "m"(found));
    CHECK(!memcmp(&found, &config, sizeof found), "relative to RIP");
    table[3] = same_tiles(4, 24);
    TILE("ldtilecfg -64(%0,%1,8)", "r"(table + 2), "r"((ptrdiff_t)16));
    TILE("sttilecfg 0x200(%0,%1,4)", "r"(table + 5), "r"((ptrdiff_t)-32));
    CHECK(!memcmp(&table[11], &table[3], sizeof found), "base, index and displacement");
}

/* ------------------------------------------------------------------------------------------------------ loads and stores */

static char scene[4096];
static char *base_of_tile;
static ptrdiff_t index_of_tile;

/* Tile 0 holds eight rows of eight bytes, those at `at`. */
static void check_scene(const char *how, const char *at, ptrdiff_t stride) {
    char stored[8][8];
    TILE_STORE(0, stored, 8);
    for (int r = 0; r < 8; r++)
        CHECK(!memcmp(stored[r], at + r * stride, 8), "%s: row %d", how, r);
    TILE_ZERO(0);
}

#define TILE_LOAD_BY(base, index, scale, displacement)                                                                 \
    base_of_tile = scene + 2048 - (0 displacement);                                                                    \
    index_of_tile = 16 / scale;                                                                                        \
    __asm__ volatile("mov %0, %%" #base "\n mov %1, %%" #index "\n tileloadd " #displacement "(%%" #base ",%%" #index  \
                     "," #scale "), %%tmm0"                                                                            \
                     :                                                                                                 \
                     : "m"(base_of_tile), "m"(index_of_tile)                                                           \
                     : #base, #index, "memory");                                                                       \
    check_scene(#displacement "(" #base "," #index "," #scale ")", scene + 2048, 16)

/* Every register as base and as index, every scale, every kind of displacement. */
TEST(emulator_addresses) {
    struct rng rng = {1};
    random_bytes(&rng, scene, sizeof scene);
    configure(8, 8);
    TILE_LOAD_BY(rax, rbx, 1, );
    TILE_LOAD_BY(rbx, rax, 2, +64);
    TILE_LOAD_BY(rcx, rdx, 4, -64);
    TILE_LOAD_BY(rdx, rcx, 8, +1024);
    TILE_LOAD_BY(rsi, rdi, 1, -1024);
    TILE_LOAD_BY(rdi, rsi, 2, );
    TILE_LOAD_BY(rbp, r8, 4, );
    TILE_LOAD_BY(r8, rbp, 8, +127);
    TILE_LOAD_BY(r9, r10, 1, +128);
    TILE_LOAD_BY(r10, r9, 2, -128);
    TILE_LOAD_BY(r11, r12, 4, -129);
    TILE_LOAD_BY(r12, r11, 8, );
    TILE_LOAD_BY(r13, r14, 1, );
    TILE_LOAD_BY(r14, r13, 2, +8);
    TILE_LOAD_BY(r15, rax, 4, +512);
    TILE_LOAD_BY(rax, r15, 8, -8);

    uint64_t top;
    __asm__ volatile("tileloadd (%%rsp), %%tmm0\n mov (%%rsp), %0" : "=r"(top) : : "memory");
    check_scene("(rsp)", (const char *)&top, 0);
    TILE("tileloadd 24(%0), %%tmm0", "r"(scene));
    check_scene("24(register)", scene + 24, 0);
    void *const wanted = (void *)0x20000000;
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE;
    void *low = mmap(wanted, sizeof scene, PROT_READ | PROT_WRITE, flags, -1, 0);
    CHECK(low == wanted, "no memory at an address of 31 bits");
    memcpy(low, scene, sizeof scene);
    TILE("tileloadd 0x20000040(,%0,4), %%tmm0", "r"((ptrdiff_t)5));
    check_scene("address(,register,4)", scene + 64, 20);

    TILE_LOAD(0, scene, 16);
    TILE("tilestored %%tmm0, -64(%0,%1,2)", "r"(scene + 2048), "r"((ptrdiff_t)-20));
    check_scene("a store", scene + 2048 - 64, -40);
    TILE("tileloaddt1 7(%0,%1,1), %%tmm0", "r"(scene), "r"((ptrdiff_t)33));
    check_scene("tileloaddt1", scene + 7, 33);
}

/* Any shape, any stride: nothing is read or written beyond the rows and columns of the tile, in the order of the rows. */
TEST(emulator_loads_and_stores) {
    static uint8_t out[8192], expected[sizeof out];
    struct rng rng = {2};
    for (int round = 0; round < 300; round++) {
        const int rows = (int)random_between(&rng, 1, ROWS), colsb = 4 * (int)random_between(&rng, 1, ROW_BYTES / 4);
        const ptrdiff_t from_stride = random_between(&rng, 0, 3) ? colsb + random_between(&rng, 0, 70) : 0;
        const ptrdiff_t to_stride = random_between(&rng, -200, 200);
        context("%d rows of %d bytes, strides %td and %td", rows, colsb, from_stride, to_stride);
        const size_t size = (size_t)((rows - 1) * from_stride + colsb);
        uint8_t *in = guard_input("in", size, 1, round % 2 ? GUARD_BEHIND : GUARD_BEFORE);
        random_bytes(&rng, in, size);
        guard_seal();
        memset(out, 0xA7, sizeof out);
        memset(expected, 0xA7, sizeof expected);
        configure(rows, colsb);
        TILE_LOAD(7, in, from_stride);
        TILE_STORE(7, out + sizeof out / 2, to_stride);
        for (int r = 0; r < rows; r++)
            memcpy(expected + sizeof out / 2 + r * to_stride, in + r * from_stride, (size_t)colsb);
        CHECK(!memcmp(out, expected, sizeof out), "the bytes stored");
        guard_release();
    }
}

TEST(emulator_zeroes) {
    static uint32_t ones[ROWS][LANES], out[ROWS][LANES];
    static const uint32_t zeros[ROWS][LANES];
    memset(ones, 0xff, sizeof ones);
    configure(ROWS, ROW_BYTES);
    TILE_LOAD(1, ones, ROW_BYTES);
    TILE_LOAD(2, ones, ROW_BYTES);
    TILE_ZERO(1);
    TILE_STORE(1, out, ROW_BYTES);
    CHECK(!memcmp(out, zeros, sizeof out), "after tilezero");
    TILE_STORE(2, out, ROW_BYTES);
    CHECK(!memcmp(out, ones, sizeof out), "tilezero changed another tile");
    configure(ROWS, ROW_BYTES);
    TILE_STORE(2, out, ROW_BYTES);
    CHECK(!memcmp(out, zeros, sizeof out), "after a configuration");
}

/* ------------------------------------------------------------------------------------------------------------- products */

static float flushed(float value) { return fpclassify(value) == FP_SUBNORMAL ? copysignf(0, value) : value; }

static float fma_flushed(float a, float b, float c) { return flushed(fmaf(flushed(a), flushed(b), flushed(c))); }

/* The manual's loops: even and odd elements in a sum each, and both together into c. */
static void product(int rows, int pairs, int columns, uint32_t c[ROWS][LANES], uint32_t a[ROWS][PAIRS],
                    uint32_t b[PAIRS][LANES]) {
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < columns; n++) {
            float even = 0, odd = 0;
            for (int k = 0; k < pairs; k++) {
                even = fma_flushed(fa_from_bits(a[m][k] << 16), fa_from_bits(b[k][n] << 16), even);
                odd = fma_flushed(fa_from_bits(a[m][k] & 0xffff0000u), fa_from_bits(b[k][n] & 0xffff0000u), odd);
            }
            c[m][n] = fa_to_bits(flushed(flushed(fa_from_bits(c[m][n])) + flushed(even + odd)));
        }
}

enum kind { ORDINARY, ANY_FINITE, ANY_BITS, NEAR_UNDERFLOW, KINDS };

/* The upper half of a float32, or all of it. */
static uint32_t random_float(struct rng *rng, enum kind kind) {
    const uint32_t bits = (uint32_t)random_bits(rng), exponent = bits >> 23 & 0xff;
    switch (kind) {
    case ORDINARY: return fa_to_bits((float)random_signed(rng));
    case ANY_FINITE: return exponent == 0xff ? bits & ~(1u << 30) : exponent % 16 == 0 ? bits & 0x807fffff : bits;
    case ANY_BITS: return exponent % 32 == 0 ? bits | 0x7f800000 : exponent % 64 == 1 ? bits & 0x80000000 : bits;
    default: return (bits & 0x807fffff) | (uint32_t)random_between(rng, 60, 68) << 23; /* squares about 2**-126 */
    }
}

static uint32_t random_pair(struct rng *rng, enum kind kind) {
    return random_float(rng, kind) >> 16 | (random_float(rng, kind) & 0xffff0000u);
}

/* out = c + a * b in three tiles, whose numbers are part of the instructions; returns what becomes of mxcsr. */
#define DEFINE_MULTIPLY(name, tile_c, tile_a, tile_b)                                              \
    static unsigned name(void *out, const void *c, const void *a, const void *b, unsigned mxcsr) { \
        TILE_LOAD(tile_c, c, ROW_BYTES);                                                           \
        TILE_LOAD(tile_a, a, ROW_BYTES);                                                           \
        TILE_LOAD(tile_b, b, ROW_BYTES);                                                           \
        _mm_setcsr(mxcsr);                                                                         \
        TILE_PRODUCT(tile_c, tile_a, tile_b);                                                      \
        const unsigned after = _mm_getcsr();                                                       \
        _mm_setcsr(DEFAULT_MXCSR);                                                                 \
        TILE_STORE(tile_c, out, ROW_BYTES);                                                        \
        return after;                                                                              \
    }
DEFINE_MULTIPLY(multiply_012, 0, 1, 2)
DEFINE_MULTIPLY(multiply_673, 6, 7, 3)

/* With the caller's rounding, flushing and exceptions set at random: they change nothing, and nothing changes them. */
TEST(emulator_products) {
    static uint32_t a[ROWS][PAIRS], b[PAIRS][LANES], c[ROWS][LANES], out[ROWS][LANES];
    struct rng rng = {3};
    int nans = 0, flushed_to_zero = 0;
    for (int round = 0; round < 400; round++) {
        const enum kind kind = (enum kind)(round % KINDS);
        const int full = round % 3 == 0;
        const int rows = full ? ROWS : (int)random_between(&rng, 1, ROWS);
        const int pairs = full ? PAIRS : (int)random_between(&rng, 1, PAIRS);
        const int columns = full ? LANES : (int)random_between(&rng, 1, LANES);
        context("round %d: %d x %d pairs x %d, kind %d", round, rows, pairs, columns, kind);
        for (int i = 0; i < ROWS; i++)
            for (int j = 0; j < LANES; j++) {
                a[i][j] = random_pair(&rng, kind);
                b[i][j] = random_pair(&rng, kind);
                c[i][j] = kind == NEAR_UNDERFLOW ? (uint32_t)random_bits(&rng) & 0x80ffffff : random_float(&rng, kind);
            }

        struct config config = {.palette = 1};
        const int tiles[2][3] = {{0, 1, 2}, {6, 7, 3}};
        for (int i = 0; i < 2; i++) {
            config.rows[tiles[i][0]] = config.rows[tiles[i][1]] = (uint8_t)rows;
            config.rows[tiles[i][2]] = (uint8_t)pairs;
            config.colsb[tiles[i][0]] = config.colsb[tiles[i][2]] = (uint16_t)(4 * columns);
            config.colsb[tiles[i][1]] = (uint16_t)(4 * pairs);
        }
        load_config(&config);
        const unsigned mxcsr = DEFAULT_MXCSR | ((unsigned)random_bits(&rng) & (0xe040 | 0x3f));
        const unsigned after = (round % 2 ? multiply_012 : multiply_673)(out, c, a, b, mxcsr);
        CHECK(after == mxcsr, "MXCSR was %#x and became %#x", mxcsr, after);
        product(rows, pairs, columns, c, a, b);
        for (int m = 0; m < rows; m++)
            for (int n = 0; n < columns; n++) {
                const int both_nan = isnan(fa_from_bits(out[m][n])) && isnan(fa_from_bits(c[m][n]));
                CHECK(out[m][n] == c[m][n] || both_nan, "row %d, column %d: %08x (%a), not %08x (%a)", m, n, out[m][n],
                      fa_from_bits(out[m][n]), c[m][n], fa_from_bits(c[m][n]));
                nans += both_nan;
                flushed_to_zero += kind == NEAR_UNDERFLOW && fa_from_bits(c[m][n]) == 0;
            }
    }
    CHECK(nans > 100 && flushed_to_zero > 100, "%d NaN and %d flushed: the inputs are too tame", nans, flushed_to_zero);
}

/* ---------------------------------------------------------------------------------------------------------------- state */

TEST(emulator_leaves_vectors_alone) {
    uint8_t before[64], after[64];
    struct rng rng = {4};
    random_bytes(&rng, before, sizeof before);
    configure(ROWS, ROW_BYTES);
    __asm__ volatile("vmovdqu64 %1, %%zmm7\n kmovw %2, %%k3\n tdpbf16ps %%tmm2, %%tmm1, %%tmm0\n"
                     "vmovdqu64 %%zmm7, %0\n kmovw %%k3, %%eax\n cmp %%eax, %2\n je 1f\n ud2\n 1:"
                     : "=m"(after)
                     : "m"(before), "r"(0x5a5a)
                     : "rax", "cc", "xmm7", "memory");
    CHECK(!memcmp(before, after, sizeof before), "zmm7 has changed");
}

static void *use_tiles(void *found) {
    const uint32_t twos[4] = {2, 2, 2, 2};
    store_config(found);
    configure(4, 4);
    TILE_LOAD(0, twos, 4);
    return NULL;
}

TEST(emulator_threads_have_their_own_tiles) {
    const uint32_t ones[4] = {1, 1, 1, 1};
    const struct config none = {0};
    struct config found;
    uint32_t out[4];
    pthread_t thread;
    configure(4, 4);
    TILE_LOAD(0, ones, 4);
    CHECK(pthread_create(&thread, NULL, use_tiles, &found) == 0 && pthread_join(thread, NULL) == 0, "no thread");
    CHECK(!memcmp(&found, &none, sizeof none), "a thread begins with a configuration");
    TILE_STORE(0, out, 4);
    CHECK(!memcmp(out, ones, sizeof out), "a thread changed the tiles of another");
}

/* ------------------------------------------------------------------------------------------------------------- refusals */

static char memory[ROWS * ROW_BYTES];

/* A configuration or an instruction that the processor refuses; 0 when there is none with this number. */
static int do_something_wrong(int number) {
    static const struct {
        size_t at;
        uint8_t value;
    } changes[] = {
        {offsetof(struct config, palette), 2},
        {offsetof(struct config, reserved), 1},
        {offsetof(struct config, reserved) + 13, 1},
        {offsetof(struct config, colsb) + 2, 65},
        {offsetof(struct config, colsb) + 3, 1},
        {offsetof(struct config, colsb) + 6, 0},
        {offsetof(struct config, colsb) + 16, 4},
        {offsetof(struct config, rows) + 7, 17},
        {offsetof(struct config, rows) + 7, 0},
        {offsetof(struct config, rows) + 15, 1},
    };
    /* Tiles: 0, 1 and 2 fit a product; 3 has other rows, 4 other columns, 5 an odd number of bytes; 6 is absent. */
    struct config config = {.palette = 1, .rows = {8, 8, 4, 7, 8, 8, 0, 1}, .colsb = {24, 16, 24, 16, 20, 23, 0, 4}};
    load_config(&config);
    TILE_PRODUCT(0, 1, 2);
    TILE_LOAD(7, memory, ROW_BYTES);
    if (number < (int)COUNT(changes)) {
        ((uint8_t *)&config)[changes[number].at] = changes[number].value;
        load_config(&config);
        return 1;
    }
    switch (number - (int)COUNT(changes)) {
    case 0: TILE_LOAD(6, memory, ROW_BYTES); return 1;
    case 1: TILE_STORE(6, memory, ROW_BYTES); return 1;
    case 2: TILE_ZERO(6); return 1;
    case 3: TILE_PRODUCT(6, 1, 2); return 1;
    case 4: TILE_LOAD(5, memory, ROW_BYTES); return 1;
    case 5: TILE_STORE(5, memory, ROW_BYTES); return 1;
    case 6: TILE_PRODUCT(0, 3, 2); return 1;
    case 7: TILE_PRODUCT(4, 1, 2); return 1;
    case 8: TILE_PRODUCT(0, 4, 2); return 1;
    case 9: TILE_PRODUCT(0, 1, 7); return 1;
    case 10: TILE_RELEASE(); TILE_LOAD(7, memory, ROW_BYTES); return 1;
    case 11: TILE_RELEASE(); TILE_ZERO(7); return 1;
    /* What assemblers refuse as well: products that name a tile twice, tilezero tmm8, tileloadd without SIB byte. */
    case 12: configure(4, 16); TILE(".byte 0xc4, 0xe2, 0x72, 0x5c, 0xc0"); return 1; /* 0, 0, 1 */
    case 13: configure(4, 16); TILE(".byte 0xc4, 0xe2, 0x7a, 0x5c, 0xc1"); return 1; /* 0, 1, 0 */
    case 14: configure(4, 16); TILE(".byte 0xc4, 0xe2, 0x72, 0x5c, 0xc1"); return 1; /* 0, 1, 1 */
    case 15: TILE(".byte 0xc4, 0x62, 0x7b, 0x49, 0xc0"); return 1;
    case 16: TILE(".byte 0xc4, 0xe2, 0x7b, 0x4b, 0x00", "a"(memory)); return 1;
    case 17: TILE("ud2"); return 1;
    default: return 0;
    }
}

TEST(emulator_refuses_what_the_processor_refuses) {
    for (int number = 0;; number++) {
        int status;
        context("case %d", number);
        const pid_t child = fork();
        if (child == 0) {
            close(STDERR_FILENO); /* the emulator gives its reasons */
            _exit(do_something_wrong(number) ? 0 : 1);
        }
        CHECK(child > 0 && waitpid(child, &status, 0) == child, "no child");
        if (WIFEXITED(status) && WEXITSTATUS(status) == 1) {
            CHECK(number > 20, "no such case");
            return;
        }
        CHECK(WIFSIGNALED(status), "not refused");
        CHECK(WTERMSIG(status) == SIGILL || WTERMSIG(status) == SIGSEGV, "signal %d", WTERMSIG(status));
    }
}
