"""The public header for Cython: ``from fastattn.libfastattn cimport fastattn_attention, ...``. Enumerations name what is used."""

from libc.stdint cimport int32_t, int64_t, uint8_t

cdef extern from "fastattn.h" nogil:
    ctypedef enum fastattn_status:
        FASTATTN_OK
        FASTATTN_ERROR_MEMORY
        FASTATTN_ERROR_INTERRUPTED
        FASTATTN_ERROR_DECAY
        FASTATTN_ERROR_NOT_FINITE
        FASTATTN_ERROR_INDICES

    ctypedef enum fastattn_dtype:
        FASTATTN_FLOAT32
        FASTATTN_FLOAT16
        FASTATTN_BFLOAT16
        FASTATTN_FLOAT64
        FASTATTN_BOOL
        FASTATTN_INT8
        FASTATTN_INT4

    ctypedef enum fastattn_isa:
        FASTATTN_ISA_BEST

    ctypedef enum fastattn_threading:
        FASTATTN_THREADING_POOL

    ctypedef enum fastattn_precision:
        FASTATTN_PRECISION_HIGHEST
        FASTATTN_PRECISION_HIGH
        FASTATTN_PRECISION_MEDIUM

    ctypedef enum fastattn_activation:
        FASTATTN_SOFTMAX

    ctypedef void (*fastattn_score_function)(
        float *scores, int64_t keys, int64_t batch, int64_t head, int64_t query, int64_t first_key, void *context
    ) noexcept

    ctypedef struct fastattn_block_mask:
        size_t size
        int64_t block_size, num_rows, batch_stride, head_stride
        const int64_t *indptr
        const int32_t *indices
        const int32_t *partial
        const uint8_t *element_bits
        int64_t num_element_masks

    ctypedef struct fastattn_attention_args:
        size_t size
        int64_t batch, num_heads, num_kv_heads, q_len, kv_len, head_dim, v_head_dim
        fastattn_dtype q_dtype, kv_dtype
        const void *q
        const void *k
        const void *v
        void *out
        float *lse
        int64_t q_strides[3]
        int64_t k_strides[3]
        int64_t v_strides[3]
        int64_t out_strides[3]
        int64_t lse_strides[3]
        float scale, softcap
        fastattn_precision precision
        int causal
        int64_t window_left, window_right
        const int64_t *query_offset
        const int64_t *kv_lengths
        const void *mask
        fastattn_dtype mask_dtype
        int64_t mask_strides[4]
        const float *alibi_slopes
        int64_t alibi_strides[2]
        const float *sinks
        const fastattn_block_mask *block_mask
        fastattn_isa isa
        int num_threads
        fastattn_threading threading
        int (*interrupted)(void *context)
        void *interrupted_context
        const int64_t *kv_starts
        const int64_t *q_lengths
        const int64_t *cu_seqlens_q
        const int64_t *cu_seqlens_k
        fastattn_activation activation
        int power
        const float *activation_bias
        const float *additive
        int64_t additive_stride
        fastattn_score_function score_function
        void *score_context
        const int32_t *block_table
        int64_t block_table_stride, num_pages, page_size
        int invariant
        const void *indices
        int64_t indices_size
        int64_t indices_strides[3]
        int64_t num_indices
        const int32_t *segments
        int64_t segments_stride, num_segments
        fastattn_dtype v_dtype

    ctypedef struct fastattn_plan_info:
        size_t size
        fastattn_isa isa
        const char *kernel
        int64_t tile_rows, tile_keys, splits, work_items
        int num_threads
        size_t workspace
        double visible_fraction
        fastattn_threading threading

    ctypedef struct fastattn_merge_args:
        size_t size
        int64_t num_parts, rows, v_head_dim
        const void *const *outs
        const float *const *lses
        fastattn_dtype dtype
        void *out
        float *lse
        fastattn_isa isa
        int num_threads
        fastattn_threading threading

    ctypedef struct fastattn_store_args:
        size_t size
        int64_t batch, new_len, num_heads, head_dim
        const void *from_ "from"
        fastattn_dtype from_dtype
        int64_t from_strides[3]
        void *to
        fastattn_dtype to_dtype
        int64_t num_pages, page_size
        int64_t to_strides[3]
        const int64_t *slots
        fastattn_isa isa
        int num_threads
        fastattn_threading threading
        const fastattn_store_args *also
        int rotate

    ctypedef struct fastattn_select_args:
        size_t size
        int64_t batch, num_heads, num_kv_heads, q_len, kv_len, head_dim
        fastattn_dtype q_dtype, k_dtype
        const void *q
        const void *k
        int64_t q_strides[3]
        int64_t k_strides[3]
        const float *weights
        int64_t weights_strides[3]
        int rectified, causal
        const int64_t *query_offset
        const int64_t *kv_lengths
        const int32_t *block_table
        int64_t block_table_stride, num_pages, page_size
        int64_t num_keys, block_size, keep_first, keep_recent
        int32_t *indices
        int64_t indices_strides[3]
        fastattn_isa isa
        int num_threads
        fastattn_threading threading

    ctypedef struct fastattn_rope_args:
        size_t size
        int64_t batch, num_heads, length, head_dim, rotary_dim
        fastattn_dtype dtype
        int interleaved
        const void *x
        void *out
        const float *cos
        const float *sin
        int64_t x_strides[3]
        int64_t out_strides[3]
        int64_t cos_strides[3]
        int64_t sin_strides[3]
        fastattn_isa isa
        int num_threads
        fastattn_threading threading

    ctypedef enum fastattn_feature_map:
        FASTATTN_FEATURE_IDENTITY
        FASTATTN_FEATURE_ELU
        FASTATTN_FEATURE_RELU

    ctypedef struct fastattn_linear_args:
        size_t size
        int64_t batch, num_q_heads, num_k_heads, num_v_heads, q_len, kv_len, head_dim, v_head_dim
        fastattn_dtype q_dtype, kv_dtype
        const void *q
        const void *k
        const void *v
        void *out
        int64_t q_strides[3]
        int64_t k_strides[3]
        int64_t v_strides[3]
        int64_t out_strides[3]
        const void *decay
        fastattn_dtype decay_dtype
        int decay_rows, decay_log
        int64_t decay_strides[3]
        const void *beta
        fastattn_dtype beta_dtype
        int64_t beta_strides[3]
        const float *state
        float *new_state
        int64_t state_strides[3]
        int64_t new_state_strides[3]
        float scale
        fastattn_feature_map feature_map
        int normalize, causal
        const int64_t *kv_lengths
        const int64_t *cu_seqlens
        fastattn_isa isa
        int num_threads
        fastattn_threading threading

    const char *fastattn_status_string(fastattn_status status)
    const char *fastattn_isa_name(fastattn_isa isa)
    int fastattn_isa_available(fastattn_isa isa)
    int fastattn_has_openmp()
    const char *fastattn_threading_name(fastattn_threading threading)
    const char *fastattn_version()
    fastattn_status fastattn_attention_args_init(fastattn_attention_args *args, size_t size)
    fastattn_status fastattn_attention(const fastattn_attention_args *args, void *workspace, size_t workspace_size)
    fastattn_status fastattn_explain(const fastattn_attention_args *args, fastattn_plan_info *info)
    fastattn_status fastattn_store(const fastattn_store_args *args)
    fastattn_status fastattn_merge(const fastattn_merge_args *args)
    fastattn_status fastattn_select_keys(const fastattn_select_args *args)
    fastattn_status fastattn_rope(const fastattn_rope_args *args)
    fastattn_status fastattn_linear_args_init(fastattn_linear_args *args, size_t size)
    fastattn_status fastattn_linear_attention(const fastattn_linear_args *args, void *workspace, size_t workspace_size)
