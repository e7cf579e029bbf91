/* fastattn: exact attention on the CPU.
 *
 * This header is the whole public interface and its documentation. It is C99, may be used from C++, and needs nothing
 * but <stddef.h> and <stdint.h>.
 *
 * The library keeps no state between calls but the cached features of the processor, prints nothing, never aborts, and
 * leaves the floating-point environment as it found it. Every function may be called from several threads at once.
 *
 * The operation. For batch entry b, query head h, query row i and key j, with g = num_heads / num_kv_heads:
 *
 *     s[i,j] = scale * dot(q[b,h,i,:], k[b,h/g,j,:])
 *     s      = softcap * tanh(s / softcap)                       when softcap > 0
 *     s     += mask[b,h,i,j]                                     when the mask holds floats
 *     s     -= alibi[b,h] * |p - j|,  p = i + query_offset[b]    when ALiBi slopes are given
 *     p[i,:] = softmax of s[i,:] over the visible keys, in float32; sinks[h] is one more logit of the denominator
 *     out[b,h,i,:] = sum_j p[i,j] * v[b,h/g,j,:]
 *     lse[b,h,i]   = natural logarithm of the denominator
 *
 * Key j is visible when j < kv_lengths[b], the mask does not hide it (false, or a float of exactly -inf),
 * causal implies j <= p, the window implies p - window_left <= j <= p + window_right, and the block mask, if there is
 * one, lists it. Invisible keys and values are never used, whatever they hold. A row that sees no key is 0 with
 * lse = -inf (with a sink: lse = sink).
 *
 * Results are bitwise the same for any number of threads, and for a batch entry alone or among others.
 */
#ifndef FASTATTN_H
#define FASTATTN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

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

/* The outcome of a call. Unless it is FASTATTN_OK, nothing has been written to any output. */
typedef enum fastattn_status {
    FASTATTN_OK = 0,
    FASTATTN_ERROR_ARGUMENT = 1,     /* a null or misaligned pointer, or an unknown struct size or enum */
    FASTATTN_ERROR_SHAPE = 2,        /* a size that is negative or too large (2**20 for head_dim, 2**31 for
                                        lengths), or num_heads is no multiple of num_kv_heads */
    FASTATTN_ERROR_DTYPE = 3,        /* an unknown dtype, or a combination that is not supported */
    FASTATTN_ERROR_SCALE = 4,        /* scale, softcap or a sink that is not finite, or a negative softcap */
    FASTATTN_ERROR_KV_LENGTHS = 5,   /* a length below 0 or above kv_len */
    FASTATTN_ERROR_BLOCK_MASK = 6,   /* indptr, indices or bit tables out of order or out of range */
    FASTATTN_ERROR_WORKSPACE = 7,    /* the workspace is too small, or not aligned to 64 bytes */
    FASTATTN_ERROR_MEMORY = 8,       /* the library had to allocate and could not */
    FASTATTN_ERROR_ISA = 9           /* the instruction set asked for is unknown or not available here */
} fastattn_status;

/* One English sentence for a status; never null. */
FASTATTN_API const char *fastattn_status_string(fastattn_status status);

/* Storage types. FASTATTN_BOOL (one byte, zero or not) and FASTATTN_FLOAT64 are for masks only. */
typedef enum fastattn_dtype {
    FASTATTN_FLOAT32 = 0,
    FASTATTN_FLOAT16 = 1,
    FASTATTN_BFLOAT16 = 2,
    FASTATTN_FLOAT64 = 3,
    FASTATTN_BOOL = 4
} fastattn_dtype;

/* Instruction sets, lowest first within a processor family. */
typedef enum fastattn_isa {
    FASTATTN_ISA_BEST = 0,           /* in a request: the best one that is available */
    FASTATTN_ISA_PORTABLE = 1,
    FASTATTN_ISA_AVX2 = 2,           /* AVX2, FMA and F16C */
    FASTATTN_ISA_AVX512 = 3,         /* AVX-512 F, BW, DQ and VL */
    FASTATTN_ISA_AMX = 4,
    FASTATTN_ISA_NEON = 5
} fastattn_isa;

/* The lower-case name of an instruction set ("avx512"), or null for a number that is none. */
FASTATTN_API const char *fastattn_isa_name(fastattn_isa isa);

/* 1 when this library holds kernels for the instruction set and this processor and its system can run them. */
FASTATTN_API int fastattn_isa_available(fastattn_isa isa);

/* 1 when the library was built with OpenMP; without it, num_threads has no effect. */
FASTATTN_API int fastattn_has_openmp(void);

/* "MAJOR.MINOR.PATCH". */
FASTATTN_API const char *fastattn_version(void);

/* How exactly products of float32 and float16 operands are formed. A lower setting allows a faster unit and never
 * demands one; bfloat16 products are exact in all three. */
typedef enum fastattn_precision {
    FASTATTN_PRECISION_HIGHEST = 0,  /* every product in float32 */
    FASTATTN_PRECISION_HIGH = 1,     /* about 16 bits: operands split into two bfloat16 halves */
    FASTATTN_PRECISION_MEDIUM = 2    /* at least bfloat16 */
} fastattn_precision;

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

/* The arguments of one call. Zero the struct, set size, then what differs from "absent".
 *
 * All strides are in bytes and may be zero or negative; the last axis of q, k, v and out is contiguous. Elements must be
 * aligned to their own size. out and lse must not overlap an input. */
typedef struct fastattn_attention_args {
    size_t size;                     /* sizeof(fastattn_attention_args) */

    int64_t batch, num_heads, num_kv_heads, q_len, kv_len, head_dim, v_head_dim;
    fastattn_dtype q_dtype;          /* also the dtype of out */
    fastattn_dtype kv_dtype;         /* k and v; q_dtype may be wider */

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

    float scale;                     /* any finite value */
    float softcap;                   /* 0: none */
    fastattn_precision precision;

    int causal;                      /* non-zero: j <= i + query_offset */
    int64_t window_left;             /* -1: unbounded */
    int64_t window_right;            /* -1: unbounded */
    const int64_t *query_offset;     /* (batch), or null: kv_length - q_len */
    const int64_t *kv_lengths;       /* (batch), or null: kv_len */

    const void *mask;                /* (batch, num_heads, q_len, kv_len), or null */
    fastattn_dtype mask_dtype;       /* any of fastattn_dtype */
    int64_t mask_strides[4];
    const float *alibi_slopes;       /* (batch, num_heads), or null */
    int64_t alibi_strides[2];
    const float *sinks;              /* (num_heads), or null */
    const fastattn_block_mask *block_mask; /* or null */

    fastattn_isa isa;                /* the highest instruction set to use; FASTATTN_ISA_BEST for no limit */
    int num_threads;                 /* at most so many; 0 or 1: the calling thread alone */
} fastattn_attention_args;

/* Attention as defined at the top of this file.
 *
 * workspace is memory of at least fastattn_workspace_size(args) bytes aligned to 64, which the library may overwrite;
 * then it allocates nothing. A null workspace makes it allocate and free its own. */
FASTATTN_API fastattn_status fastattn_attention(const fastattn_attention_args *args, void *workspace,
                                                size_t workspace_size);

/* The bytes of workspace that a call with these arguments needs: num_threads times a few tiles, plus, where the keys
 * are split, the partial states of the splits. 0 when the arguments are invalid or the result is empty. */
FASTATTN_API size_t fastattn_workspace_size(const fastattn_attention_args *args);

/* What a call would do, for inspection. */
typedef struct fastattn_plan_info {
    size_t size;                     /* sizeof(fastattn_plan_info), set by the caller */
    fastattn_isa isa;                /* the instruction set whose kernels run */
    const char *kernel;              /* the name of the micro-kernel table, e.g. "float32_avx512" */
    int64_t tile_rows;               /* query rows (of one group of heads) in a work item, at most */
    int64_t tile_keys;               /* keys in one step of the loop, at most */
    int64_t splits;                  /* parts into which the keys of one work item are split */
    int64_t work_items;
    int num_threads;                 /* threads that will share the items */
    size_t workspace;                /* bytes */
    double visible_fraction;         /* of all (row, key) pairs, those in blocks that causal, window, lengths and the block
                                        mask leave to be computed */
} fastattn_plan_info;

FASTATTN_API fastattn_status fastattn_explain(const fastattn_attention_args *args, fastattn_plan_info *info);

/* The same call in parts, for callers with threads of their own. Phase 0 computes, phase 1 merges the splits (it may
 * have no items). Run every item of phase 0, in any order and on any threads, then every item of phase 1. worker tells the
 * scratch memory apart: items that run at the same time must have different numbers below args->num_threads.
 * workspace must not be null. */
FASTATTN_API int64_t fastattn_attention_items(const fastattn_attention_args *args, int phase);
FASTATTN_API fastattn_status fastattn_attention_run(const fastattn_attention_args *args, int phase, int64_t item,
                                                    int worker, void *workspace, size_t workspace_size);

/* Exact combination of attention over disjoint sets of keys (softmax is associative in its log-sum-exp):
 *
 *     lse = log(sum_p exp(lse_p)),   out = sum_p exp(lse_p - lse) * out_p
 *
 * outs holds num_parts pointers to contiguous (rows, v_head_dim) arrays of dtype, lses as many pointers to (rows)
 * float32. A part with lse = -inf contributes nothing, whatever its out holds. out may not overlap the parts. */
FASTATTN_API fastattn_status fastattn_merge_states(int64_t num_parts, const void *const *outs, const float *const *lses,
                                                   int64_t rows, int64_t v_head_dim, fastattn_dtype dtype, void *out,
                                                   float *lse);

#ifdef __cplusplus
}
#endif

#endif
