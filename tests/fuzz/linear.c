/* fastattn_linear_attention: with and without decay, the delta rule, states, lengths and packed sequences. */
#include "fuzz.h"

#include <string.h>

static fuzz_array array(fuzz_input *in, int *exist, int64_t batch, int64_t heads, int64_t rows, int64_t numbers, int dtype,
                        int64_t *strides) {
    const int64_t shape[3] = {batch, heads, rows};
    const fuzz_array made = fuzz_rows_make(in, shape, strides, dtype, numbers);
    *exist &= made.exists;
    return made;
}

/* Makes factors of random numbers, so that a check lets them pass; a few stay as they are. */
static void squeeze(fuzz_input *in, const fuzz_array *decay, int dtype, int logarithms) {
    const size_t size = dtype == FASTATTN_FLOAT32 ? 4 : 2;
    if (fuzz_chance(in, 16)) return;
    for (size_t n = 0; decay->memory && n + size <= decay->bytes; n += size) {
        if (dtype == FASTATTN_FLOAT32) {
            float x;
            memcpy(&x, decay->memory + n, sizeof x);
            x = x < 0 ? -x : x;
            x = x < 1 ? x : 1;
            x = logarithms ? -x : x;
            memcpy(decay->memory + n, &x, sizeof x);
        } else {
            uint16_t x;
            memcpy(&x, decay->memory + n, sizeof x);
            x = (uint16_t)((x & 0x3bff) | (logarithms ? 0x8000 : 0));
            memcpy(decay->memory + n, &x, sizeof x);
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_input in = fuzz_open(data, size);
    fastattn_linear_args a = FASTATTN_LINEAR_ARGS_INIT;
    int exist = 1;
    a.size = fuzz_struct_size(&in, sizeof a);
    const unsigned options = (unsigned)fuzz_bytes(&in, 2);
    a.batch = fuzz_size(&in, 3);
    a.num_k_heads = fuzz_size(&in, 3);
    a.num_v_heads = fuzz_chance(&in, 128) ? a.num_k_heads : fuzz_size(&in, 6);
    a.num_q_heads = fuzz_chance(&in, 128) ? a.num_v_heads : fuzz_size(&in, 6);
    a.q_len = fuzz_size(&in, 150);
    a.kv_len = options & 1 ? fuzz_size(&in, 150) : a.q_len;
    a.causal = fuzz_chance(&in, 192);
    a.head_dim = fuzz_size(&in, 40);
    a.v_head_dim = fuzz_size(&in, 70);
    a.q_dtype = (fastattn_dtype)fuzz_enum(&in, 3);
    a.kv_dtype = fuzz_chance(&in, 128) ? a.q_dtype : (fastattn_dtype)fuzz_enum(&in, 3);
    a.scale = fuzz_float(&in);
    a.feature_map = (fastattn_feature_map)fuzz_enum(&in, 3);
    a.normalize = fuzz_chance(&in, 64);
    a.isa = (fastattn_isa)(fuzz_chance(&in, 128) ? 0 : fuzz_enum(&in, 6));
    a.num_threads = fuzz_chance(&in, 240) ? (int)fuzz_up_to(&in, 4) : (int)fuzz_size(&in, 100);
    if (a.size == sizeof a && fuzz_chance(&in, 32)) a.threading = (fastattn_threading)fuzz_enum(&in, 3);
    if (options & 2 && a.batch >= 0 && a.batch < 64) {
        int64_t *table = fuzz_table(a.batch + 1), sum = 0;
        for (int64_t b = 0; b <= a.batch; b++) {
            table[b] = sum;
            if (b < a.batch) sum = (int64_t)((uint64_t)sum + (uint64_t)(fuzz_chance(&in, 254) ? fuzz_up_to(&in, 99) : fuzz_size(&in, 40)));
        }
        a.cu_seqlens = table;
        a.q_len = a.kv_len = sum;
    }
    if (options & 4) {
        int64_t *table = fuzz_table(a.batch);
        for (int64_t b = 0; table && b < a.batch; b++)
            table[b] = fuzz_chance(&in, 250) ? fuzz_up_to(&in, a.cu_seqlens ? 50 : a.kv_len) : fuzz_size(&in, 100);
        a.kv_lengths = table;
    }
    const int64_t states = a.num_k_heads > a.num_v_heads ? a.num_k_heads : a.num_v_heads,
                  heads = states > a.num_q_heads ? states : a.num_q_heads;
    const int64_t entries = a.cu_seqlens ? a.batch > 0 : a.batch,
                  columns = a.v_head_dim < INT64_MAX ? a.v_head_dim + !!a.normalize : a.v_head_dim;
    a.q = array(&in, &exist, entries, a.num_q_heads, a.q_len, a.head_dim, (int)a.q_dtype, a.q_strides).at;
    a.k = array(&in, &exist, entries, a.num_k_heads, a.kv_len, a.head_dim, (int)a.kv_dtype, a.k_strides).at;
    a.v = array(&in, &exist, entries, a.num_v_heads, a.kv_len, a.v_head_dim, (int)a.kv_dtype, a.v_strides).at;
    const fuzz_array out = array(&in, &exist, entries, heads, a.q_len, a.v_head_dim, (int)a.q_dtype, a.out_strides);
    a.out = out.at;
    if (options & 8) {
        a.decay_dtype = (fastattn_dtype)fuzz_enum(&in, 3);
        a.decay_rows = fuzz_chance(&in, 128);
        a.decay_log = fuzz_chance(&in, 128);
        const fuzz_array decay = array(&in, &exist, entries, states, a.kv_len, a.decay_rows ? a.head_dim : 1, (int)a.decay_dtype,
                                       a.decay_strides);
        squeeze(&in, &decay, (int)a.decay_dtype, a.decay_log);
        a.decay = decay.at;
    }
    if (options & 16) {
        a.beta_dtype = (fastattn_dtype)fuzz_enum(&in, 3);
        a.beta = array(&in, &exist, entries, states, a.kv_len, 1, (int)a.beta_dtype, a.beta_strides).at;
    }
    if (options & 32) a.state = array(&in, &exist, a.batch, states, a.head_dim, columns, FASTATTN_FLOAT32, a.state_strides).at;
    fuzz_array new_state;
    memset(&new_state, 0, sizeof new_state);
    if (options & 64) {
        new_state = array(&in, &exist, a.batch, states, a.head_dim, columns, FASTATTN_FLOAT32, a.new_state_strides);
        a.new_state = new_state.at;
    }
    const fastattn_linear_args *args = fuzz_struct(&a, a.size, sizeof a);
    const double factors[] = {(double)a.batch, (double)heads, (double)(a.q_len > a.kv_len ? a.q_len : a.kv_len) / 2 + 8,
                              (double)a.head_dim + 16, (double)a.v_head_dim + 16};
    double work = 1;
    for (size_t n = 0; n < sizeof factors / sizeof *factors; n++) work *= factors[n] > 1 ? factors[n] : 1;
    if (exist && work < 1e7) {
        fuzz_blank(&out);
        fuzz_blank(&new_state);
        const size_t bytes = fastattn_linear_workspace_size(args);
        void *workspace = fuzz_workspace(bytes);
        const fastattn_status status = workspace ? fastattn_linear_attention(args, workspace, bytes) : FASTATTN_ERROR_MEMORY;
        if (status != FASTATTN_OK) FUZZ_ASSERT(fuzz_is_blank(&out) && fuzz_is_blank(&new_state));
        if (status == FASTATTN_OK) {
            const uint64_t before = fuzz_digest(&out), state = fuzz_digest(&new_state);
            fuzz_blank(&out);
            fuzz_blank(&new_state);
            FUZZ_ASSERT(fastattn_linear_attention(args, NULL, 0) == FASTATTN_OK);
            if (out.sound && (!new_state.memory || new_state.sound))
                FUZZ_ASSERT(before == fuzz_digest(&out) && state == fuzz_digest(&new_state));
        }
    }
    fuzz_close();
    return 0;
}
