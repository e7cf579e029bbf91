#include "chain.h"

#include <string.h>

void chain_lay_out(struct chain *x) {
    const struct columns c = x->c;
    const int64_t item = (int64_t)dtype_size(x->dtype), tiled = fa_round_up(x->block + FA_TILE, FA_TILE) + FA_TILE;
    const int64_t dim = x->head_dim ? fa_round_up(x->head_dim, FA_TILE) : FA_TILE;
    const int64_t v_dim = x->v_head_dim ? fa_round_up(x->v_head_dim, FA_TILE) : FA_TILE;
    const int rows = c.first + c.rows;
    random_rows(x->rows_of, rows, rows, x->head_dim, (x->head_dim + x->gap) * item, x->dtype);
    for (int r = rows; r < c.ld; r++) x->rows_of[r] = x->rows_of[rows - 1];
    x->k = stored_rows("k", x->block, x->head_dim, (x->head_dim + x->gap) * item, x->dtype);
    x->v = stored_rows("v", x->block, x->v_head_dim, -(x->v_head_dim + x->gap) * item, x->dtype);
    x->k_room = x->as_stored ? NULL : panel("k room", tiled, (int)dim);
    x->v_room = x->as_stored ? NULL : panel("v room", tiled, (int)v_dim);
    x->q = panel("q", dim, c.ld);
    x->s = panel("s", tiled, c.ld);
    x->p = x->by->in_place ? x->s : panel("p", tiled, c.ld);
    x->o = panel("o", v_dim + FA_TILE, c.ld);
    x->m = panel("m", 1, c.ld);
    x->l = panel("l", 1, c.ld);
    x->alpha = panel("alpha", 1, c.ld);
    x->factor = panel("factor", 1, c.ld);
    x->next = panel("next", tiled, c.ld);
    char *out = guard_output("out", (size_t)(c.ld * x->v_head_dim * item), (size_t)item, GUARD_BEHIND);
    for (int r = 0; r < c.ld; r++) x->outputs[r] = out + r * x->v_head_dim * item;
    guard_seal();
}

void chain_run(struct chain *x, enum chain_slot slot) {
    const fa_products *by = x->by;
    const struct columns c = x->c;
    float *const s = x->s + c.first, *const p = x->p + c.first, *const q = x->q + c.first * fa_row_of_numbers(x->by, x->head_dim);
    float *const o = x->o + o_at(by, c.ld, x->v_head_dim, c.first, 0), *const l = x->l ? x->l + c.first : NULL;
    const fa_scores next = {x->next + c.first, q, c.ld, c.rows, x->keys_made, x->from, x->part, x->head_dim};
    switch (slot) {
    case CHAIN_PACK: by->pack(x->q, c.ld, x->rows_of, c.ld, x->head_dim, x->dtype, x->sign); break;
    case CHAIN_KEYS: x->keys_made = by->keys(x->k_room, x->k, x->block, x->head_dim); break;
    case CHAIN_VALUES: x->values_made = by->values(x->v_room, x->v, x->block, x->v_head_dim); break;
    case CHAIN_QK: by->qk(s, q, c.ld, c.rows, x->keys_made, x->from, x->part, x->head_dim); break;
    case CHAIN_SOFTMAX: by->softmax(s, p, c.ld, c.rows, x->part, x->unit, x->m + c.first, l, x->alpha + c.first); break;
    case CHAIN_BESIDE: by->softmax_beside(s, p, c.ld, c.rows, x->part, x->unit, x->m + c.first, l, x->alpha + c.first, &next); break;
    case CHAIN_PV: by->pv(o, x->alpha + c.first, p, c.ld, c.rows, x->values_made, x->from, x->keys, x->v_head_dim); break;
    case CHAIN_UNPACK: by->unpack(x->outputs, c.ld, x->o, c.ld, x->factor, x->v_head_dim, x->dtype); break;
    case CHAIN_SLOTS: break;
    }
}

/* ---- Garbage ---------------------------------------------------------------------------------------------------------------- */

#define EIGHT(what, a, b, c, d, e, f, g, h) what(a) what(b) what(c) what(d) what(e) what(f) what(g) what(h)
#define FIRST_16(what) EIGHT(what, 0, 1, 2, 3, 4, 5, 6, 7) EIGHT(what, 8, 9, 10, 11, 12, 13, 14, 15)
#define SECOND_16(what) EIGHT(what, 16, 17, 18, 19, 20, 21, 22, 23) EIGHT(what, 24, 25, 26, 27, 28, 29, 30, 31)

#if defined(__x86_64__) && defined(__GNUC__)
#define CLOBBERED_16                                                                                                               \
    "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14",   \
        "xmm15"
#define SET_XMM(n) "movd %0, %%xmm" #n "\n\tpshufd $0, %%xmm" #n ", %%xmm" #n "\n\t"
#define SET_YMM(n) "vpbroadcastd %0, %%ymm" #n "\n\t"
#define SET_ZMM(n) "vpbroadcastd %0, %%zmm" #n "\n\t"
#define SET_MASK(n) "kmovw %0, %%k" #n "\n\t"

static void fill_xmm(uint32_t word) { __asm__ volatile(FIRST_16(SET_XMM) : : "m"(word) : CLOBBERED_16); }

__attribute__((target("avx2"))) static void fill_ymm(uint32_t word) {
    __asm__ volatile(FIRST_16(SET_YMM) : : "m"(word) : CLOBBERED_16);
}

__attribute__((target("avx512f"))) static void fill_zmm(uint32_t word) {
    __asm__ volatile(FIRST_16(SET_ZMM) SECOND_16(SET_ZMM) EIGHT(SET_MASK, 1, 2, 3, 4, 5, 6, 7, 7)
                     :
                     : "m"(word)
                     : CLOBBERED_16, "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25",
                       "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31", "k1", "k2", "k3", "k4", "k5", "k6", "k7");
}

static void fill_registers(uint32_t word) {
    if (__builtin_cpu_supports("avx512f")) fill_zmm(word);
    else if (__builtin_cpu_supports("avx2")) fill_ymm(word);
    else fill_xmm(word);
}
#elif defined(__aarch64__) && defined(__GNUC__)
#define SET_V(n) "dup v" #n ".4s, %w0\n\t"

static void fill_registers(uint32_t word) {
    __asm__ volatile(FIRST_16(SET_V) SECOND_16(SET_V)
                     :
                     : "r"(word)
                     : "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11", "v12", "v13", "v14", "v15", "v16",
                       "v17", "v18", "v19", "v20", "v21", "v22", "v23", "v24", "v25", "v26", "v27", "v28", "v29", "v30", "v31");
}
#else
static void fill_registers(uint32_t word) { (void)word; }
#endif

/* Where the frames of what is called next will lie. */
__attribute__((noinline)) static void fill_stack(uint8_t garbage) {
    volatile uint8_t below[1 << 14];
    for (size_t n = 0; n < sizeof below; n++) below[n] = garbage;
}

void chain_run_after(struct chain *x, enum chain_slot slot, uint8_t garbage) {
    fill_stack(garbage);
    fill_registers(garbage * 0x01010101u);
    chain_run(x, slot);
}
