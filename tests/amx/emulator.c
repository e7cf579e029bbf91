/* AMX for processors without it: the tile instructions of palette 1 and TDPBF16PS, for tests where AVX-512 is all there is.
 *
 * Preloaded into a program (LD_PRELOAD), it catches the SIGILL that a tile instruction raises, does what Intel's manual (SDM
 * volume 2, and section 2.10 for what is refused) says, and lets the program go on behind the instruction. What the
 * processor would refuse with #UD or #GP ends the program with SIGILL and one line on stderr that says why.
 *
 * Passing tests show that tiles are shaped, addressed, combined and summed as intended. They do not show how fast anything
 * is, or that the system keeps the tile registers across signals and switches of threads;
 * nor that this file has understood the manual: for that, test_emulator.c passes on a processor with AMX as well.
 *
 * An invalid instruction is slow to report, many times so in a virtual machine, whose host looks at it first; a breakpoint
 * is not. So once an instruction has been emulated, its first byte becomes INT3, and from then on it raises SIGTRAP. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <immintrin.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

/* ------------------------------------------------------------------------------------------------------ tile registers */

enum { TILES = 8, ROWS = 16, ROW_BYTES = 64, LANES = ROW_BYTES / 4 };

struct config { /* the operand of LDTILECFG and STTILECFG; palette 0: not configured */
    uint8_t palette, start_row, reserved[14];
    uint16_t colsb[16];
    uint8_t rows[16];
};
_Static_assert(sizeof(struct config) == 64, "the layout of the manual");

struct tile {
    _Alignas(ROW_BYTES) uint32_t row[ROWS][LANES];
};

/* Initial-exec, because a signal handler must not allocate. A new thread begins unconfigured, as on a processor. */
static __thread __attribute__((tls_model("initial-exec"))) struct {
    struct config config;
    struct tile tile[TILES];
} state;

static const char *check_config(const struct config *config) {
    static const uint8_t zeros[16];
    if (config->palette > 1) return "there is no such palette";
    if (config->palette == 0) return NULL;
    if (config->start_row != 0) return "start_row is not 0, which is not emulated";
    if (memcmp(config->reserved, zeros, sizeof config->reserved) != 0 || memcmp(config->colsb + TILES, zeros, 16) != 0 ||
        memcmp(config->rows + TILES, zeros, 8) != 0)
        return "a reserved byte is not 0";
    for (int tile = 0; tile < TILES; tile++) {
        if (config->colsb[tile] > ROW_BYTES || config->rows[tile] > ROWS) return "a tile is too large";
        if ((config->colsb[tile] == 0) != (config->rows[tile] == 0)) return "a tile has rows or columns, and not both";
    }
    return NULL;
}

static const char *configure(const struct config *config) {
    const char *refusal = check_config(config);
    if (refusal) return refusal;
    memset(&state, 0, sizeof state);
    if (config->palette != 0) state.config = *config;
    return NULL;
}

static const char *check_tile(unsigned tile) {
    if (state.config.palette == 0) return "the tiles are not configured";
    if (state.config.rows[tile] == 0) return "the tile is not configured"; /* as are tiles 8 to 15 always */
    return NULL;
}

static const char *check_elements(unsigned tile) {
    const char *refusal = check_tile(tile);
    return refusal ? refusal : state.config.colsb[tile] % 4 != 0 ? "the tile's colsb is not a multiple of 4" : NULL;
}

static const char *zero(unsigned tile) {
    const char *refusal = check_tile(tile);
    if (refusal) return refusal;
    memset(&state.tile[tile], 0, sizeof state.tile[tile]);
    return NULL;
}

static const char *load(unsigned tile, const char *memory, int64_t stride) {
    const char *refusal = check_elements(tile);
    if (refusal) return refusal;
    zero(tile); /* rows and columns beyond the configured ones */
    for (int r = 0; r < state.config.rows[tile]; r++)
        memcpy(state.tile[tile].row[r], memory + r * stride, state.config.colsb[tile]);
    return NULL;
}

static const char *store(unsigned tile, char *memory, int64_t stride) {
    const char *refusal = check_elements(tile);
    if (refusal) return refusal;
    for (int r = 0; r < state.config.rows[tile]; r++)
        memcpy(memory + r * stride, state.tile[tile].row[r], state.config.colsb[tile]);
    return NULL;
}

/* The even and the odd bfloat16 of each lane as float32. */
static __attribute__((target("avx512f"))) inline __m512 even(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
}
static __attribute__((target("avx512f"))) inline __m512 odd(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_epi32(pairs, _mm512_set1_epi32((int)0xffff0000u)));
}

/* Every row of c: two chains of FMAs over the pairs of a, one for each half of a pair, then their sum is added to c.
 * Not inline, so that the caller's MXCSR is in force for all of it. */
static __attribute__((target("avx512f"), noinline)) void multiply(struct tile *c, const struct tile *a, const struct tile *b,
                                                                  int rows, int pairs, int columns) {
    const __mmask16 written = (__mmask16)((1u << columns) - 1);
    for (int m = 0; m < rows; m++) {
        __m512 evens = _mm512_setzero_ps(), odds = _mm512_setzero_ps();
        for (int k = 0; k < pairs; k++) {
            const __m512i left = _mm512_set1_epi32((int)a->row[m][k]), right = _mm512_load_si512(b->row[k]);
            evens = _mm512_fmadd_ps(even(left), even(right), evens);
            odds = _mm512_fmadd_ps(odd(left), odd(right), odds);
        }
        const __m512 sum = _mm512_add_ps(_mm512_load_ps(c->row[m]), _mm512_add_ps(evens, odds));
        _mm512_mask_store_ps(c->row[m], written, sum);
    }
}

static const char *tdpbf16ps(unsigned c, unsigned a, unsigned b) {
    const struct config *config = &state.config;
    const unsigned operands[] = {c, a, b};
    for (int i = 0; i < 3; i++) {
        const char *refusal = check_elements(operands[i]);
        if (refusal) return refusal;
    }
    if (c == a || c == b || a == b) return "two operands are the same tile";
    if (config->rows[c] != config->rows[a]) return "destination and first source differ in rows";
    if (config->colsb[c] != config->colsb[b]) return "destination and second source differ in columns";
    if (config->colsb[a] != 4 * config->rows[b]) return "the sources differ in their inner dimension";
    /* To nearest, subnormal numbers are 0, no exceptions; the system gives the program its own MXCSR back. */
    _mm_setcsr(0x1f80 | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON);
    multiply(&state.tile[c], &state.tile[a], &state.tile[b], config->rows[c], config->rows[b], config->colsb[c] / 4);
    return NULL;
}

/* -------------------------------------------------------------------------------------------------------- instructions */

enum { /* prefix and opcode in map 0F 38, VEX.128.W0; prefixes: none, 66, F3, F2 */
    LDTILECFG_TILERELEASE = 0x049,
    STTILECFG = 0x149,
    TILEZERO = 0x349,
    TILELOADDT1 = 0x14b,
    TILESTORED = 0x24b,
    TILELOADD = 0x34b,
    TDPBF16PS = 0x25c
};

struct instruction {
    unsigned opcode, mod, reg, rm, vvvv;
    int sib;        /* the operand in memory is addressed with a SIB byte */
    uint64_t start; /* its address, without the index register */
    int64_t index;  /* index register << scale: added to the address, or the stride of a tile's rows */
    const uint8_t *end;
};

static uint64_t register_value(const greg_t *registers, unsigned number) {
    static const int places[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                   REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return (uint64_t)registers[places[number]];
}

/* The operand in memory: ModRM without register, its SIB byte and displacement. `at` is behind the ModRM byte. */
static void decode_memory(struct instruction *i, const uint8_t *at, const greg_t *registers, unsigned extend_index) {
    enum { NO_INDEX = 4, BY_SIB = 4, NO_BASE = 5 }; /* NO_BASE with mod 0: 32 bits, behind a SIB absolute, else from RIP */
    unsigned base = i->rm;
    i->sib = base % 8 == BY_SIB;
    if (i->sib) {
        const unsigned sib = *at++, index = (sib >> 3 & 7) + extend_index;
        if (index != NO_INDEX) i->index = (int64_t)(register_value(registers, index) << (sib >> 6));
        base = base - BY_SIB + (sib & 7);
    }
    const int no_base = i->mod == 0 && base % 8 == NO_BASE;
    if (!no_base) i->start = register_value(registers, base);
    if (i->mod == 1) {
        i->start += (uint64_t)(int8_t)*at++;
    } else if (i->mod == 2 || no_base) {
        int32_t displacement;
        memcpy(&displacement, at, sizeof displacement);
        at += sizeof displacement;
        i->start += (uint64_t)displacement + (no_base && !i->sib ? (uint64_t)at : 0);
    }
    i->end = at;
}

enum { VEX = 0xc4, INT3 = 0xcc };

/* 0 when the bytes do not begin with VEX.128.0F38.W0, or what mark() made of it. */
static int decode(struct instruction *i, const uint8_t *bytes, const greg_t *registers) {
    if ((bytes[0] != VEX && bytes[0] != INT3) || (bytes[1] & 0x1f) != 2 || (bytes[2] & 0x84) != 0) return 0;
    const uint8_t extend = (uint8_t)~bytes[1]; /* bits 7, 6, 5: of reg, of the index, of rm or the base */
    *i = (struct instruction){.opcode = (bytes[2] & 3u) << 8 | bytes[3],
                              .mod = bytes[4] >> 6,
                              .reg = (bytes[4] >> 3 & 7u) | (extend >> 7 & 1u) << 3,
                              .rm = (bytes[4] & 7u) | (extend >> 5 & 1u) << 3,
                              .vvvv = (uint8_t)~bytes[2] >> 3 & 15u,
                              .end = bytes + 5};
    if (i->mod != 3) decode_memory(i, bytes + 5, registers, (extend >> 6 & 1u) << 3);
    return 1;
}

static const char UNKNOWN[] = "none of the instructions here";

/* NULL, or why the processor would refuse, or UNKNOWN. */
static const char *execute(const struct instruction *i) {
    const int in_memory = i->mod != 3;
    char *memory = (char *)i->start;
    if (i->opcode == TDPBF16PS && !in_memory) return tdpbf16ps(i->reg, i->rm, i->vvvv);
    if (i->vvvv != 0) return UNKNOWN;
    switch (i->opcode) {
    case LDTILECFG_TILERELEASE:
        if (i->reg != 0 || (!in_memory && i->rm != 0)) return UNKNOWN;
        return configure(in_memory ? (const struct config *)(memory + i->index) : &(const struct config){.palette = 0});
    case STTILECFG:
        if (i->reg != 0 || !in_memory) return UNKNOWN;
        memcpy(memory + i->index, &state.config, sizeof state.config);
        return NULL;
    case TILEZERO: return in_memory || i->rm != 0 ? UNKNOWN : zero(i->reg);
    case TILELOADDT1:
    case TILELOADD: return in_memory && i->sib ? load(i->reg, memory, i->index) : UNKNOWN;
    case TILESTORED: return in_memory && i->sib ? store(i->reg, memory, i->index) : UNKNOWN;
    default: return UNKNOWN;
    }
}

/* ------------------------------------------------------------------------------------------------------------- signals */

static struct sigaction others[SIGTRAP + 1]; /* what the rest of the program wants done about SIGILL and SIGTRAP */

static int next_sigaction(int number, const struct sigaction *action, struct sigaction *old) {
    typedef int function(int, const struct sigaction *, struct sigaction *);
    return ((function *)dlsym(RTLD_NEXT, "sigaction"))(number, action, old);
}

/* In the place of the C library's: test harnesses and interpreters set a handler of their own for SIGILL. */
int sigaction(int number, const struct sigaction *action, struct sigaction *old) {
    if (number != SIGILL && number != SIGTRAP) return next_sigaction(number, action, old);
    if (old) *old = others[number];
    if (action) others[number] = *action;
    return 0;
}

static void die(int number) {
    signal(number, SIG_DFL);
    raise(number);
}

static void pass_on(int number, siginfo_t *info, void *context) {
    const struct sigaction *other = &others[number];
    if (other->sa_flags & SA_SIGINFO)
        other->sa_sigaction(number, info, context);
    else if (other->sa_handler != SIG_DFL && other->sa_handler != SIG_IGN)
        other->sa_handler(number);
    else
        die(number);
}

/* One byte, so that other threads find the one instruction or the other. Where code may not be changed it stays as it is. */
static void mark(uint8_t *at) {
    enum { PAGE = 4096 };
    if (mprotect(at - (uintptr_t)at % PAGE, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC) == 0) *(volatile uint8_t *)at = INT3;
}

static void on_instruction(int number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const int marked = number == SIGTRAP; /* then RIP is behind the first byte */
    uint8_t *at = (uint8_t *)registers[REG_RIP] - marked;
    struct instruction i;
    const char *refusal = decode(&i, at, registers) ? execute(&i) : UNKNOWN;
    if (!refusal) {
        registers[REG_RIP] = (greg_t)i.end;
        if (!marked) mark(at);
    } else if (refusal == UNKNOWN) {
        pass_on(number, info, context);
    } else {
        char line[160];
        int length = snprintf(line, sizeof line, "AMX emulator: opcode %02x at %p: %s\n", i.opcode & 0xff, (void *)at, refusal);
        const ssize_t written = write(STDERR_FILENO, line, (size_t)length);
        (void)written;
        die(SIGILL);
    }
}

/* The system is not asked for tiles, which it would not know of: a filter of system calls grants them in its place, or refuses them, as
 * sandboxes do, where AMX_REFUSED is in the environment. */
static void answer_for_the_system(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023 };
    const unsigned answer = getenv("AMX_REFUSED") ? EPERM : 0;
    struct sock_filter rules[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_arch_prctl, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ARCH_REQ_XCOMP_PERM, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | answer),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    const struct sock_fprog filter = {sizeof rules / sizeof *rules, rules};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) != 0)
        perror("AMX emulator: no filter of system calls");
}

__attribute__((constructor)) static void install(void) {
    answer_for_the_system();
    const struct sigaction action = {.sa_sigaction = on_instruction, .sa_flags = SA_SIGINFO | SA_NODEFER};
    next_sigaction(SIGILL, &action, NULL);
    next_sigaction(SIGTRAP, &action, NULL);
}
