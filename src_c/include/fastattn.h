/* fastattn: exact attention on the CPU.
 *
 * This header is the whole public interface and its documentation. It is C99, may be used from C++, and needs nothing
 * but <stddef.h> and <stdint.h>.
 *
 * The library keeps nothing between calls but the features of the processor and, once a call has used more than one, its idle
 * threads (see fastattn_threading); no call depends on what another has set. It prints nothing, never aborts, and leaves the
 * floating-point environment as it found it. Every function may be called from several threads at once.
 *
 * The operation. For batch entry b, query head h, query row i and key j, with g = num_heads / num_kv_heads:
 *
 *     s[i,j] = scale * dot(q[b,h,i,:], k[b,h/g,j,:])
 *     s      = softcap * tanh(s / softcap)                       when softcap > 0
 *     s     += mask[b,h,i,j]                                     when the mask holds floats
 *     s     -= alibi[b,h] * |p - j|,  p = i + query_offset[b]    when ALiBi slopes are given
 *     p[i,:] = softmax of s[i,:] over the visible keys, in float32; sinks[h] is one more logit of the denominator
 *     out[b,h,i,:] = sum_j p[i,j] * v[b,h/g,j,:]
 *     lse[b,h,i]   = natural logarithm of the denominator; beyond the rounding of the scores its error is at most
 *                    2**-22 * max(1, |lse|)
 *
 * Three of these lines may be others: scores may be additive in place of a product (`additive`), a function of the caller's may
 * change them after the softcap (`score_function`), and weights need not be a softmax (`activation`).
 *
 * Key j is visible when kv_starts[b] <= j < kv_lengths[b], the mask does not hide it (false, or a float of exactly -inf),
 * causal implies j <= p, the window implies p - window_left <= j <= p + window_right, and the block mask or the indices, if
 * there are any, list it. Invisible keys and values are never used, whatever they hold. A row that sees no key is 0 with
 * lse = -inf (with a sink: lse = sink).
 *
 * Results are bitwise the same for any number of threads, and for a batch entry alone or among others. The shape of an entry is
 * its own: lengths below q_len and kv_len give what arrays of just these rows and keys give, bitwise, and take their time.
 */
#ifndef FASTATTN_H
#define FASTATTN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* How the functions are exported. Whoever compiles the library into a program of their own may define it as empty. */
#ifndef FASTATTN_API
#if defined(_WIN32) && defined(FASTATTN_SHARED)
#ifdef FASTATTN_BUILD
#define FASTATTN_API __declspec(dllexport)
#else
#define FASTATTN_API __declspec(dllimport)
#endif
#elif defined(__GNUC__)
#define FASTATTN_API __attribute__((visibility("default")))
#else
#define FASTATTN_API
#endif
#endif

/* The outcome of a call. Unless it is FASTATTN_OK or FASTATTN_ERROR_INTERRUPTED, nothing has been written to any output. */
typedef enum fastattn_status {
    FASTATTN_OK = 0,
    FASTATTN_ERROR_ARGUMENT = 1,     /* a null or misaligned pointer, an output that overlaps itself, or an unknown struct
                                        size or enum */
    FASTATTN_ERROR_SHAPE = 2,        /* a size that is negative or too large (2**20 for head_dim, 2**40 for
                                        lengths), or num_heads is no multiple of num_kv_heads */
    FASTATTN_ERROR_DTYPE = 3,        /* an unknown dtype, one that this library was built without, or a combination that is not
                                        supported */
    FASTATTN_ERROR_SCALE = 4,        /* scale, softcap or an ALiBi slope that is not finite, a negative softcap, or a
                                        sink that is NaN or +inf */
    FASTATTN_ERROR_KV_LENGTHS = 5,   /* a length below 0 or above kv_len, or a start below 0 or above the length */
    FASTATTN_ERROR_BLOCK_MASK = 6,   /* indptr, indices or bit tables out of order or out of range */
    FASTATTN_ERROR_WORKSPACE = 7,    /* the workspace is too small, or not aligned to 64 bytes */
    FASTATTN_ERROR_MEMORY = 8,       /* the library had to allocate and could not */
    FASTATTN_ERROR_ISA = 9,          /* the instruction set asked for is unknown or not available here */
    FASTATTN_ERROR_SLOT = 10,        /* a slot below -1, or beyond the pages */
    FASTATTN_ERROR_INTERRUPTED = 11, /* the caller's `interrupted` said so; outputs hold anything */
    FASTATTN_ERROR_THREADING = 12,   /* the way of threading asked for is unknown, or this library was built without it */
    FASTATTN_ERROR_Q_LENGTHS = 13,   /* a length below 0 or above q_len */
    FASTATTN_ERROR_SEQLENS = 14,     /* cu_seqlens that do not begin with 0, decrease, or do not end at the rows there are */
    FASTATTN_ERROR_DECAY = 15,       /* a decay outside of [0, 1], or above 0 as a logarithm */
    FASTATTN_ERROR_ACTIVATION = 16,  /* an unknown activation, a power or bias out of range, or lse or sinks without a softmax */
    FASTATTN_ERROR_BLOCK_TABLE = 17, /* within the length of an entry, a page below 0 or beyond num_pages */
    FASTATTN_ERROR_NOT_FINITE = 18,  /* a number that is to be quantised is NaN or infinite, or too large for the scale it needs */
    FASTATTN_ERROR_INDICES = 19,     /* a list of keys with one below -1 or beyond kv_len, or with one twice */
    FASTATTN_ERROR_SEGMENTS = 20,    /* a segment below -1 or beyond num_segments, that out of range, or values or indices beside them */
    FASTATTN_ERROR_LEFT_OUT = 21     /* this library was built without what the call asks for, which is no dtype */
} fastattn_status;

/* One English sentence for a status; never null. */
FASTATTN_API const char *fastattn_status_string(fastattn_status status);

/* Storage types. FASTATTN_BOOL (one byte, zero or not) and FASTATTN_FLOAT64 are for masks only, FASTATTN_INT8 and FASTATTN_INT4 for
 * keys and values, which have been quantised: numbers are integers times a scale, and the scales of a row follow its integers, so that
 * a row is read from one place, wherever it lies. Of n numbers, and aligned to nothing:
 *
 *     INT8   n integers of a byte, -127 to 127; the float32 scale of them all                            n + 4 bytes
 *     INT4   for each 32 numbers 16 bytes, whose lower halves are the first 16 integers plus 8 and whose
 *            upper halves the last 16, -7 to 7; then their float16 scales. n is a multiple of 32     n / 32 * 18 bytes
 *
 * Strides of their rows are those of such rows. Arithmetic is float32 on the numbers; only where queries are bfloat16 and many rows share
 * what is prepared of keys and values, these are bfloat16 as well, rounded once. */
typedef enum fastattn_dtype {
    FASTATTN_FLOAT32 = 0,
    FASTATTN_FLOAT16 = 1,
    FASTATTN_BFLOAT16 = 2,
    FASTATTN_FLOAT64 = 3,
    FASTATTN_BOOL = 4,
    FASTATTN_INT8 = 5,
    FASTATTN_INT4 = 6,
    FASTATTN_DTYPE_OF_KEYS = 7 /* of values: what that of their keys is */
} fastattn_dtype;

/* Instruction sets, lowest first within a processor family. */
typedef enum fastattn_isa {
    FASTATTN_ISA_BEST = 0,           /* in a request: the best one that is available */
    FASTATTN_ISA_PORTABLE = 1,       /* plain C; for AArch64, and WebAssembly with SIMD128, where compiled with FASTATTN_PORTABLE */
    FASTATTN_ISA_AVX2 = 2,           /* AVX2, FMA and F16C */
    FASTATTN_ISA_AVX512 = 3,         /* AVX-512 F, BW, DQ and VL */
    FASTATTN_ISA_AMX = 4,
    FASTATTN_ISA_NEON = 5,           /* AArch64 */
    FASTATTN_ISA_WASM = 6            /* WebAssembly, where the library was compiled with SIMD128 */
} fastattn_isa;

/* The lower-case name of an instruction set ("avx512"), or null for a number that is none. */
FASTATTN_API const char *fastattn_isa_name(fastattn_isa isa);

/* 1 when this library holds kernels for the instruction set and this processor and its system can run them. */
FASTATTN_API int fastattn_isa_available(fastattn_isa isa);

/* How a call has more than one thread. Results do not depend on it.
 *
 * POOL: threads of the library's own, which the first call that needs them starts and all callers share. They sleep when there
 * has been nothing to do for 50 microseconds. A caller waits for those that have begun and never for one that has not got a
 * processor yet, so that more threads than processors cost little. After a fork the child starts threads of its own. They leave
 * the program's signals to its other threads.
 *
 * OPENMP: those of the OpenMP run-time, which the program may share with other libraries and set by OpenMP's environment
 * variables. A call waits for all of them. A child that has been forked after a call must not use it: few run-times survive. */
typedef enum fastattn_threading {
    FASTATTN_THREADING_DEFAULT = 0,  /* POOL */
    FASTATTN_THREADING_OPENMP = 1,
    FASTATTN_THREADING_POOL = 2
} fastattn_threading;

/* "openmp", "pool" or "default", or null for a number that is none of them. */
FASTATTN_API const char *fastattn_threading_name(fastattn_threading threading);

/* 1 when this library was built with it. */
FASTATTN_API int fastattn_threading_available(fastattn_threading threading);

/* 1 when the library was built with OpenMP. */
FASTATTN_API int fastattn_has_openmp(void);

/* Ends the threads of the pool and waits until they have ended, as must be done before the library is unloaded. Calls that run
 * meanwhile are finished by their callers; a later one starts threads again. */
FASTATTN_API void fastattn_threads_stop(void);

/* "MAJOR.MINOR.PATCH". */
FASTATTN_API const char *fastattn_version(void);

/* How exactly products of float32 and float16 operands are formed. A lower setting allows a faster unit and never
 * demands one; bfloat16 products are exact in all three. */
typedef enum fastattn_precision {
    FASTATTN_PRECISION_HIGHEST = 0,  /* every product in float32 */
    FASTATTN_PRECISION_HIGH = 1,     /* about 16 bits: operands split into two bfloat16 halves */
    FASTATTN_PRECISION_MEDIUM = 2    /* at least bfloat16; numbers may share exponents */
} fastattn_precision;

/* How scores become weights. n is the number of keys of the batch entry, seen or not: its kv_length less its kv_start. All but the
 * softmax weigh each key by itself, so that there is no denominator: no lse, and no sinks. A score of -inf, as hidden keys have it,
 * weighs 0. */
typedef enum fastattn_activation {
    FASTATTN_SOFTMAX = 0,
    FASTATTN_SIGMOID = 1,            /* 1 / (1 + exp(-(s + activation_bias))) */
    FASTATTN_RELU = 2,               /* max(s, 0) / n */
    FASTATTN_POLYNOMIAL = 3          /* s**power / sqrt(n) */
} fastattn_activation;

/* Changes the scores of one query and of `keys` keys that follow each other, in place: scores[n] is that of key first_key + n. batch,
 * head, query and key count from 0 in their arrays (of packed sequences: in their sequence). It is called for every query and key of
 * a block of which anything is visible, hidden ones as well, whose scores are then not used; by several threads at once. What it makes
 * of a score may depend on nothing but what it is given and what context points to. */
typedef void (*fastattn_score_function)(float *scores, int64_t keys, int64_t batch, int64_t head, int64_t query, int64_t first_key,
                                        void *context);

/* A block-sparse pattern: for each block of block_size query rows, the ascending list of visible blocks of block_size keys.
 *
 * The pattern of (b, h) starts at row_start = (b * batch_stride + h * head_stride) of the table of block rows; a stride of
 * 0 shares one pattern among batch entries or heads. Block row r of a pattern lists
 * indices[indptr[row_start + r]] ... indices[indptr[row_start + r + 1] - 1].
 * There are ceil(q_len / block_size) block rows in each pattern and ceil(kv_len / block_size) key blocks.
 *
 * partial, if not null, runs beside indices: -1 for a block that is wholly visible, else n for the n-th element mask.
 * An element mask is block_size rows of (block_size + 7) / 8 bytes, one row for each KEY of the block; bit i % 8 (least
 * significant first) of byte i / 8 is set when the key is visible to query row i of the block. */
typedef struct fastattn_block_mask {
    size_t size;                     /* sizeof(fastattn_block_mask) */
    int64_t block_size;              /* 1 or more */
    int64_t num_rows;                /* block rows in the whole table: indptr has num_rows + 1 entries */
    int64_t batch_stride;            /* in block rows */
    int64_t head_stride;             /* in block rows */
    const int64_t *indptr;
    const int32_t *indices;
    const int32_t *partial;          /* or null: every listed block is wholly visible */
    const uint8_t *element_bits;     /* or null where partial is null */
    int64_t num_element_masks;
} fastattn_block_mask;

/* The arguments of one call. Begin with FASTATTN_ATTENTION_ARGS_INIT, in which whatever is optional is absent, and set the
 * rest. A zeroed struct is not that: there a window of 0 is a window of one key, and a scale of 0 is a scale.
 *
 * All strides are in bytes and may be zero or negative; those of axes of length 1, and of arrays without elements, mean
 * nothing. The last axis of q, k, v and out is contiguous. Elements, of tables too, must be aligned to their own size. out
 * and lse must not overlap an input or themselves.
 *
 * Later versions may add fields at the end of this and of the other structs that begin with their size. A caller that was
 * compiled against an earlier header is understood: what lies beyond its size is absent. */
typedef struct fastattn_attention_args {
    size_t size;                     /* sizeof(fastattn_attention_args) */

    int64_t batch, num_heads, num_kv_heads, q_len, kv_len, head_dim, v_head_dim;
    fastattn_dtype q_dtype;          /* also the dtype of out */
    fastattn_dtype kv_dtype;         /* k, and v unless v_dtype says otherwise; q_dtype may be wider, and of quantised ones is any. These
                                        are for products alone, not for `additive` */

    const void *q;                   /* (batch, num_heads, q_len, head_dim) */
    const void *k;                   /* (batch, num_kv_heads, kv_len, head_dim) */
    const void *v;                   /* (batch, num_kv_heads, kv_len, v_head_dim) */
    void *out;                       /* (batch, num_heads, q_len, v_head_dim) */
    float *lse;                      /* (batch, num_heads, q_len), or null */
    int64_t q_strides[3];            /* batch, head, row */
    int64_t k_strides[3];
    int64_t v_strides[3];
    int64_t out_strides[3];
    int64_t lse_strides[3];

    float scale;                     /* any finite value, commonly 1 / sqrt(head_dim); there is no default */
    float softcap;                   /* 0: none */
    fastattn_precision precision;

    int causal;                      /* non-zero: j <= i + query_offset */
    int64_t window_left;             /* -1: unbounded */
    int64_t window_right;            /* -1: unbounded */
    const int64_t *query_offset;     /* (batch), or null: kv_length - q_length; cut to +-2**60, as the window is */
    const int64_t *kv_lengths;       /* (batch), or null: kv_len */

    const void *mask;                /* (batch, num_heads, q_len, kv_len), or null */
    fastattn_dtype mask_dtype;       /* any of fastattn_dtype */
    int64_t mask_strides[4];
    const float *alibi_slopes;       /* (batch, num_heads), finite, or null */
    int64_t alibi_strides[2];
    const float *sinks;              /* (num_heads), finite or -inf (none in that head), or null */
    const fastattn_block_mask *block_mask; /* or null */

    fastattn_isa isa;                /* the highest instruction set to use; FASTATTN_ISA_BEST for no limit */
    int num_threads;                 /* at most so many; 0 or 1: the calling thread alone */
    fastattn_threading threading;    /* how they are had */

    int (*interrupted)(void *context); /* or null. Called by the thread that called, between items of work, about every 50 ms of a
                                        call that takes longer: non-zero ends it with FASTATTN_ERROR_INTERRUPTED, as soon as
                                        every thread has finished its item */
    void *interrupted_context;       /* what it is given */

    const int64_t *kv_starts;        /* (batch), or null: 0; keys before them are padding */
    const int64_t *q_lengths;        /* (batch), or null: q_len; rows from there on are padding: out 0, lse -inf, sink or not */

    const int64_t *cu_seqlens_q;     /* (batch + 1), or null. Packed sequences: q, out and lse have no batch axis (their first stride is
                                        not used), q_len is the number of all their rows, and those of entry b are
                                        cu_seqlens_q[b] to cu_seqlens_q[b + 1]; from 0, never decreasing, to q_len. Its q_len, for
                                        q_lengths and query_offset, is the difference. A mask has the rows of q then. No block mask */
    const int64_t *cu_seqlens_k;     /* (batch + 1), or null; the same for k, v and kv_len. No mask then */

    fastattn_activation activation;
    int power;                       /* of FASTATTN_POLYNOMIAL, 1 to 64 */
    const float *activation_bias;    /* of FASTATTN_SIGMOID: (batch), finite, or null: -log(n) */

    const float *additive;           /* (num_heads, head_dim), or null. In place of the product, before the scale:
                                        s[i,j] = sum over d of additive[h,d] * tanh(q[b,h,i,d] + k[b,h/g,j,d]), so that q and k are
                                        what the caller has projected queries and keys to (Bahdanau et al. 2014) */
    int64_t additive_stride;         /* from one head to the next */

    fastattn_score_function score_function; /* or null. After the softcap, before mask, ALiBi and visibility */
    void *score_context;             /* what it is given */

    const int32_t *block_table;      /* (batch, ceil(kv_len / page_size)), or null. Keys in pages: k and v are (num_pages, num_kv_heads,
                                        page_size, dim), the first of their strides is that of pages, and key j of entry b is row
                                        j % page_size of page block_table[b, j / page_size]. kv_len is the largest length that the
                                        table has room for. Entries may share pages; what the table holds outside of an entry's
                                        starts and lengths is not looked at. Without cu_seqlens_k. Bits are those that the same keys
                                        give side by side, whatever the size of the pages */
    int64_t block_table_stride;      /* from one entry's row to the next, in bytes */
    int64_t num_pages, page_size;    /* page_size at least 1 */

    int invariant;                   /* non-zero: the bits of a row depend on its query, the keys that it sees, their positions (from
                                        kv_starts on) and the rules alone: not on the rows that are computed beside it, on keys that
                                        it does not see, or on how its keys are given, in pages or not, hidden by a mask or left out of
                                        a block mask. Work is cut where the keys say, which takes a little longer */

    const void *indices;             /* (batch, num_kv_heads, q_len, num_indices), or null. Chosen keys: of the visible ones a query sees
                                        those that its list names, in any order, each at most once, none of them for -1. Time and
                                        memory traffic are those of num_indices keys. In pages as well, and with cu_seqlens_q, where
                                        there is no batch axis. Without a block mask and cu_seqlens_k; lists of the rows beyond
                                        q_lengths are not looked at */
    int64_t indices_size;            /* bytes of an index: 4 (int32_t) or 8 (int64_t) */
    int64_t indices_strides[3];      /* batch, kv head, row; 0 shares a list among heads */
    int64_t num_indices;

    const int32_t *segments;         /* (batch, kv_len), or null; of packed keys (kv_len). The weights of each segment of the keys in place
                                        of values times weights: out is (batch, num_heads, q_len, num_segments), float32 whatever
                                        q_dtype is, out[b,h,i,n] the sum of the weights of the keys whose segment is n. A key at -1 is in
                                        none. v_head_dim is 0, and v is not read. Without indices */
    int64_t segments_stride;         /* from one entry's row to the next, in bytes */
    int64_t num_segments;            /* 0 to 2**31 - 1 */

    fastattn_dtype v_dtype;          /* of v: FASTATTN_DTYPE_OF_KEYS, as initially, or what kv_dtype is; where that is one of the quantised
                                        types, either of them. Values bear four bits far better than keys do */
} fastattn_attention_args;

/* The initial value of fastattn_attention_args: size is set, and everything optional is absent. Sizes are 0, and scale is a
 * NaN, which is refused: no call goes through for which they were forgotten.
 *
 *     fastattn_attention_args args = FASTATTN_ATTENTION_ARGS_INIT;
 */
#define FASTATTN_ATTENTION_ARGS_INIT                                                                                \
    {                                                                                                               \
        sizeof(fastattn_attention_args), 0, 0, 0, 0, 0, 0, 0, FASTATTN_FLOAT32, FASTATTN_FLOAT32, NULL, NULL, NULL, \
            NULL, NULL, {0, 0, 0}, {0, 0, 0}, {0, 0, 0}, {0, 0, 0}, {0, 0, 0}, FASTATTN_NAN, 0.0f,                  \
            FASTATTN_PRECISION_HIGHEST, 0, -1, -1, NULL, NULL, NULL, FASTATTN_FLOAT32, {0, 0, 0, 0}, NULL, {0, 0},  \
            NULL, NULL, FASTATTN_ISA_BEST, 0, FASTATTN_THREADING_DEFAULT, NULL, NULL, NULL, NULL, NULL, NULL,       \
            FASTATTN_SOFTMAX, 0, NULL, NULL, 0, NULL, NULL, NULL, 0, 0, 0, 0, NULL, 0, {0, 0, 0}, 0, NULL, 0, 0,    \
            FASTATTN_DTYPE_OF_KEYS                                                                                  \
    }

/* A constant expression, which C99 has in <math.h> only. */
#ifdef __GNUC__
#define FASTATTN_NAN __builtin_nanf("")
#else
#define FASTATTN_NAN ((float)1e300 * 0.0f)
#endif

/* The same for callers that cannot use the macro. size is the caller's sizeof(fastattn_attention_args): no byte beyond it is
 * written. FASTATTN_ERROR_ARGUMENT for null, or a size that no version of this header has. */
FASTATTN_API fastattn_status fastattn_attention_args_init(fastattn_attention_args *args, size_t size);

/* Attention as defined at the top of this file.
 *
 * workspace is memory of at least fastattn_workspace_size(args) bytes aligned to 64, which the library may overwrite;
 * then it allocates nothing. A null workspace makes it allocate and free its own. */
FASTATTN_API fastattn_status fastattn_attention(const fastattn_attention_args *args, void *workspace,
                                                size_t workspace_size);

/* The bytes of workspace that a call with these arguments needs: the plan, num_threads times a few tiles, and, where the
 * keys are split, the partial states of the splits. 0 when the arguments are invalid. */
FASTATTN_API size_t fastattn_workspace_size(const fastattn_attention_args *args);

/* What a call would do, for inspection; where entries differ, what is done to that with the most query rows. */
typedef struct fastattn_plan_info {
    size_t size;                     /* sizeof(fastattn_plan_info), set by the caller */
    fastattn_isa isa;                /* the instruction set whose kernels run */
    const char *kernel;              /* the name of the micro-kernel table, e.g. "float32_avx512" */
    int64_t tile_rows;               /* query rows (of one group of heads) in a work item, at most */
    int64_t tile_keys;               /* keys in one step of the loop, at most */
    int64_t splits;                  /* parts into which the keys of a batch entry are split, at most */
    int64_t work_items;
    int num_threads;                 /* threads that will share the items */
    size_t workspace;                /* bytes */
    double visible_fraction;         /* of all (row, key) pairs, those in blocks that causal, window, lengths and the block
                                        mask leave to be computed */
    fastattn_threading threading;    /* how threads are had, if there are more than one */
} fastattn_plan_info;

FASTATTN_API fastattn_status fastattn_explain(const fastattn_attention_args *args, fastattn_plan_info *info);

/* The same call in parts, for callers with threads of their own, planned once and run item by item.
 *
 * fastattn_attention_plan checks the arguments and lays out their plan in the workspace, where it stays: workspace must not be null,
 * and belongs to the plan until its last item has run. The arguments, the struct of the block mask and the tables of lengths are
 * copied; everything else that they point to must stay as it is.
 *
 * Phase 0 computes, phase 1 merges the splits (it may have no items). Run every item of phase 0, in any order and on any
 * threads, then every item of phase 1; those that come first take the longest. worker tells the scratch memory apart: items that run
 * at the same time must have different numbers below num_threads. A plan may be run again, with new contents of the arrays. */
typedef struct fastattn_plan fastattn_plan;
FASTATTN_API fastattn_status fastattn_attention_plan(const fastattn_attention_args *args, void *workspace,
                                                     size_t workspace_size, const fastattn_plan **plan);
FASTATTN_API int64_t fastattn_plan_items(const fastattn_plan *plan, int phase);
FASTATTN_API fastattn_status fastattn_plan_run(const fastattn_plan *plan, int phase, int64_t item, int worker);

/* Exact combination of attention over disjoint sets of keys (softmax is associative in its log-sum-exp):
 *
 *     lse = log(sum_p exp(lse_p)),   out = sum_p exp(lse_p - lse) * out_p
 *
 * A part with lse = -inf contributes nothing, whatever its out holds. out may not overlap the parts. */
typedef struct fastattn_merge_args {
    size_t size;                     /* sizeof(fastattn_merge_args) */
    int64_t num_parts, rows, v_head_dim;
    const void *const *outs;         /* num_parts pointers to contiguous (rows, v_head_dim) arrays */
    const float *const *lses;        /* as many to (rows) */
    fastattn_dtype dtype;            /* float32, float16 or bfloat16, of the parts and out */
    void *out;                       /* (rows, v_head_dim), contiguous */
    float *lse;                      /* (rows) */
    fastattn_isa isa;                /* as in fastattn_attention_args */
    int num_threads;
    fastattn_threading threading;
} fastattn_merge_args;

FASTATTN_API fastattn_status fastattn_merge(const fastattn_merge_args *args);

/* The same on the calling thread alone. */
FASTATTN_API fastattn_status fastattn_merge_states(int64_t num_parts, const void *const *outs, const float *const *lses,
                                                   int64_t rows, int64_t v_head_dim, fastattn_dtype dtype, void *out,
                                                   float *lse);

/* New tokens for a cache: rows are cast to the cache's dtype, or quantised, once, and put where they belong.
 *
 * A cache is an array of pages, (num_pages, page_size, num_heads, head_dim) of any strides; a cache of one stretch for each
 * sequence has one page for each. Rounding is to nearest, even; what is too large for float16 becomes an infinity.
 *
 * The scale of integers is the largest magnitude among their numbers divided by the largest integer, 127 or 7, as float32 or rounded to
 * float16, and 0 where that is below 2**-126 or rounds to 0: then all are 0. A number x becomes x * (1 / scale), rounded, at most the
 * largest integer. So it is stored to half a scale, and to what the rounding of a float16 scale adds: 2**-11 of the number, or, where the
 * largest of a group of int4 is below 7 * 2**-14 and its scale a multiple of 2**-24, up to 7 * 2**-25. A group whose numbers are all that
 * small, 7 * 2**-25 at most, becomes zeros. */
typedef struct fastattn_store_args {
    size_t size;                     /* sizeof(fastattn_store_args) */
    int64_t batch, new_len, num_heads, head_dim; /* head_dim at most 8192, if it is turned or quantised */
    const void *from;                /* (batch, new_len, num_heads, head_dim), the last axis contiguous */
    fastattn_dtype from_dtype;       /* float32, float16 or bfloat16, as the cache's */
    int64_t from_strides[3];         /* batch, token, head; in bytes, as all strides */
    void *to;                        /* the cache, which may not overlap from */
    fastattn_dtype to_dtype;
    int64_t num_pages, page_size;
    int64_t to_strides[3];           /* page, row of a page, head */
    const int64_t *slots;            /* (batch, new_len): page * page_size + row, each at most once; -1 leaves a token out */
    fastattn_isa isa;
    int num_threads;
    fastattn_threading threading;

    const struct fastattn_store_args *also; /* or null: what is stored together with this or not at all, as values with their keys; its
                                        own `also` is null */
    int rotate;                      /* non-zero: rows are first multiplied by the orthonormal Hadamard matrix (Sylvester's) of the largest
                                        power of two that divides head_dim, block by block, which is its own inverse; in float32 */
} fastattn_store_args;

/* Checks all slots, and that all numbers which are to be quantised can be, before it writes anything. Needs no memory. */
FASTATTN_API fastattn_status fastattn_store(const fastattn_store_args *args);

/* Which keys, or which blocks of keys, a query would choose: an index of few and narrow numbers in front of attention over chosen keys.
 *
 * For query row i and key j of a kv head, whose group of query heads is h, with position p = i + query_offset[b]:
 *
 *     s[j] = sum over h of weights[b,h,i] * f(dot(q[b,h,i,:], k[b,kv head,j,:])),   f(x) = max(x, 0) when rectified, else x
 *
 * A key is visible when j < kv_lengths[b], and j <= p when causal. Of the visible keys the num_keys with the largest s are chosen, among
 * equals those that come first. With a block_size whole blocks are chosen, as many as num_keys holds, by the largest s of a visible key of
 * each, and all their visible keys are listed. What lies among the first keep_first keys or the keep_recent up to p comes before all
 * else, and with it its block. A key whose s is NaN or -inf is not chosen.
 *
 * That is the indexer of DeepSeek-V3.2 (2025) rectified, MiniMax Sparse Attention (2026) with blocks of 128 and without weights, and,
 * over the largest and smallest numbers of pages in the place of keys, Quest (Tang et al., 2024). Scores exist for a tile of keys at a
 * time, and of each query the largest num_keys so far. */
typedef struct fastattn_select_args {
    size_t size;                     /* sizeof(fastattn_select_args) */

    int64_t batch, num_heads, num_kv_heads, q_len, kv_len, head_dim;
    fastattn_dtype q_dtype;
    fastattn_dtype k_dtype;          /* that of q, or a narrower one */
    const void *q;                   /* (batch, num_heads, q_len, head_dim) */
    const void *k;                   /* (batch, num_kv_heads, kv_len, head_dim), or in pages as for attention */
    int64_t q_strides[3];            /* batch, head, row; in bytes, as all strides */
    int64_t k_strides[3];
    const float *weights;            /* (batch, num_heads, q_len), finite, or null: 1 */
    int64_t weights_strides[3];
    int rectified;

    int causal;
    const int64_t *query_offset;     /* (batch), or null: kv_length - q_len */
    const int64_t *kv_lengths;       /* (batch), or null: kv_len */
    const int32_t *block_table;      /* (batch, ceil(kv_len / page_size)), or null */
    int64_t block_table_stride;
    int64_t num_pages, page_size;

    int64_t num_keys;                /* with a block_size a multiple of it */
    int64_t block_size;              /* 0: keys are chosen one by one */
    int64_t keep_first, keep_recent; /* together they, or the blocks that they lie in, are no more than num_keys */
    int32_t *indices;                /* (batch, num_kv_heads, q_len, num_keys): ascending, and -1 behind the last. kv_len is below 2**31 */
    int64_t indices_strides[3];      /* batch, kv head, row */

    fastattn_isa isa;
    int num_threads;
    fastattn_threading threading;
} fastattn_select_args;

/* Allocates its memory: num_threads times a tile and the candidates of its queries; and where the keys are split the candidates of
 * each part. */
FASTATTN_API fastattn_status fastattn_select_keys(const fastattn_select_args *args);

/* Rotary position embedding (Su et al., "RoFormer", 2021). With angles theta of each row, given as cosines and sines, every pair of
 * numbers of a row is turned by the angle that is its own:
 *
 *     out[a] = x[a] * cos[n] - x[b] * sin[n]
 *     out[b] = x[b] * cos[n] + x[a] * sin[n]       for n < rotary_dim / 2
 *
 * where (a, b) is (n, n + rotary_dim / 2), or (2 * n, 2 * n + 1) when interleaved. Numbers from rotary_dim on are copied. Arithmetic is
 * float32, rounded once to dtype.
 *
 * All strides are in bytes and may be zero (out's may not) or negative; the last axes are contiguous, and elements aligned to their own
 * size. out may be x, with the same strides; it must not overlap x otherwise, nor cos or sin. */
typedef struct fastattn_rope_args {
    size_t size;                     /* sizeof(fastattn_rope_args) */

    int64_t batch, num_heads, length, head_dim;
    int64_t rotary_dim;              /* even, at most head_dim */
    fastattn_dtype dtype;            /* of x and out */
    int interleaved;

    const void *x;                   /* (batch, num_heads, length, head_dim) */
    void *out;                       /* likewise */
    const float *cos, *sin;          /* (batch, num_heads, length, rotary_dim / 2) */
    int64_t x_strides[3];            /* batch, head, row */
    int64_t out_strides[3];
    int64_t cos_strides[3];          /* 0 shares a table */
    int64_t sin_strides[3];

    fastattn_isa isa;                /* as in fastattn_attention_args */
    int num_threads;
    fastattn_threading threading;
} fastattn_rope_args;

FASTATTN_API fastattn_status fastattn_rope(const fastattn_rope_args *args);

/* Linear attention and its kin: the softmax gives way to a state S of (head_dim, v_head_dim) numbers, which each token of the
 * sequence decays and adds to, so that work grows with the length and not with its square. For token t of one head, with
 * x = map(k[t]) and y = scale * map(q[t]):
 *
 *     S   = a[t] S                                  a[t] = decay: one factor, or one for each row of S; 1 without
 *     u   = v[t], or with beta  beta[t] (v[t] - S' x)     (S' is S transposed: what S already answers for this key)
 *     S   = S + x u'
 *     out[t] = S' y,  with normalize divided by z' y, where z = a[t] z + x is the sum of all keys; 0 where that is 0
 *
 * That is linear attention (Katharopoulos et al., 2020), with decay RetNet (Sun et al., 2023), GLA (Yang et al., 2023) and
 * Mamba-2 (Dao and Gu, 2024), with beta DeltaNet (Yang et al., 2024), and with both Gated DeltaNet (Yang et al., 2024) and Kimi
 * Delta Attention (2025). Without causal the state of the whole sequence answers every query.
 *
 * Tokens are taken in chunks: what lies before a chunk by products with its state, what lies within by products of the chunk
 * with itself. A decay from one token to another is a product of the factors between them, never a quotient and never the
 * difference of two logarithms, so that factors may be small, or 0, at any length. State, products and sums are float32. A number
 * that is not finite reaches its own and later tokens, and never earlier ones.
 *
 * Heads are shared as in attention: a head count of q, k or v divides the largest of the three, which is that of out; there
 * is a state for each head of k or v, of whichever has more, and decay and beta have those heads. */
typedef enum fastattn_feature_map {
    FASTATTN_FEATURE_IDENTITY = 0,
    FASTATTN_FEATURE_ELU = 1,        /* elu(x) + 1: x + 1 above 0, else e**x */
    FASTATTN_FEATURE_RELU = 2        /* max(x, 0) */
} fastattn_feature_map;

/* The arguments of one call. Begin with FASTATTN_LINEAR_ARGS_INIT. Strides and alignment as in fastattn_attention_args. */
typedef struct fastattn_linear_args {
    size_t size;                     /* sizeof(fastattn_linear_args) */

    int64_t batch;                   /* of sequences */
    int64_t num_q_heads, num_k_heads, num_v_heads;
    int64_t q_len, kv_len;           /* equal if causal, or with cu_seqlens: then the tokens of all sequences */
    int64_t head_dim, v_head_dim;
    fastattn_dtype q_dtype;          /* also the dtype of out */
    fastattn_dtype kv_dtype;         /* k and v; q_dtype may be wider */

    const void *q;                   /* (batch, num_q_heads, q_len, head_dim) */
    const void *k;                   /* (batch, num_k_heads, kv_len, head_dim) */
    const void *v;                   /* (batch, num_v_heads, kv_len, v_head_dim) */
    void *out;                       /* (batch, heads, q_len, v_head_dim) */
    int64_t q_strides[3];            /* batch, head, row */
    int64_t k_strides[3];
    int64_t v_strides[3];
    int64_t out_strides[3];

    const void *decay;               /* (batch, states, kv_len), or null: 1 */
    fastattn_dtype decay_dtype;      /* float32, float16 or bfloat16 */
    int decay_rows;                  /* non-zero: (batch, states, kv_len, head_dim), the last axis contiguous */
    int decay_log;                   /* non-zero: logarithms, at most 0 (-inf is a factor of 0), and not factors from 0 to 1 */
    int64_t decay_strides[3];
    const void *beta;                /* (batch, states, kv_len), or null: no delta rule */
    fastattn_dtype beta_dtype;
    int64_t beta_strides[3];

    const float *state;              /* (batch, states, head_dim, v_head_dim), or null: 0. With normalize there is one more
                                        column, which is z */
    float *new_state;                /* of the same shape, or null; may be state, with the same strides */
    int64_t state_strides[3];        /* batch, head, row; the last axis is contiguous */
    int64_t new_state_strides[3];

    float scale;                     /* any finite value; there is no default */
    fastattn_feature_map feature_map;
    int normalize;                   /* non-zero, without beta: divide by the sum of the keys */
    int causal;                      /* zero, without decay and beta: every query is answered by the whole sequence */
    const int64_t *kv_lengths;       /* (batch), or null: tokens from there on are neither read nor, if causal, answered: 0 */
    const int64_t *cu_seqlens;       /* (batch + 1), from 0 to kv_len, or null. Then the sequences follow each other along the
                                        axis of rows, and batch strides, but those of states, are not used */

    fastattn_isa isa;                /* the highest instruction set to use; FASTATTN_ISA_BEST for no limit */
    int num_threads;                 /* at most so many; 0 or 1: the calling thread alone */
    fastattn_threading threading;    /* how they are had */
    int (*interrupted)(void *context); /* as for attention, between sequences and heads */
    void *interrupted_context;
} fastattn_linear_args;

/* As for attention: size is set, causal too, everything optional is absent, and scale is a NaN, which is refused. */
#define FASTATTN_LINEAR_ARGS_INIT                                                                                         \
    {                                                                                                                     \
        sizeof(fastattn_linear_args), 0, 0, 0, 0, 0, 0, 0, 0, FASTATTN_FLOAT32, FASTATTN_FLOAT32, NULL, NULL, NULL, NULL, \
            {0, 0, 0}, {0, 0, 0}, {0, 0, 0}, {0, 0, 0}, NULL, FASTATTN_FLOAT32, 0, 0, {0, 0, 0}, NULL, FASTATTN_FLOAT32,  \
            {0, 0, 0}, NULL, NULL, {0, 0, 0}, {0, 0, 0}, FASTATTN_NAN, FASTATTN_FEATURE_IDENTITY, 0, 1, NULL, NULL,       \
            FASTATTN_ISA_BEST, 0, FASTATTN_THREADING_DEFAULT, NULL, NULL                                                  \
    }
FASTATTN_API fastattn_status fastattn_linear_args_init(fastattn_linear_args *args, size_t size);

/* Linear attention as defined above. workspace as for fastattn_attention: at least fastattn_linear_workspace_size(args) bytes,
 * aligned to 64, or null. Decays are looked through before anything is written. */
FASTATTN_API fastattn_status fastattn_linear_attention(const fastattn_linear_args *args, void *workspace,
                                                       size_t workspace_size);

/* The bytes of workspace that a call with these arguments needs: num_threads times a state and a few chunks. 0 when the
 * arguments are invalid or there is nothing to do. */
FASTATTN_API size_t fastattn_linear_workspace_size(const fastattn_linear_args *args);

#ifdef __cplusplus
}
#endif

#endif
