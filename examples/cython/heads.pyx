# cython: language_level=3, boundscheck=False, wraparound=False
"""Attention on memoryviews by the C library that is installed with the package: no arrays are made, and no GIL is held.

    python setup.py build_ext --inplace && python -c "import heads; heads.check()"
"""

from libc.math cimport sqrt
from fastattn.libfastattn cimport (
    FASTATTN_OK, fastattn_attention, fastattn_attention_args, fastattn_attention_args_init, fastattn_status, fastattn_status_string
)

import numpy as np


def attend(const float[:, :, ::1] q, const float[:, :, ::1] k, const float[:, :, ::1] v, float[:, :, ::1] out, int threads=1):
    """Causal attention of (heads, queries, size) to (heads, keys, size), into `out`."""
    cdef fastattn_attention_args args
    cdef fastattn_status status
    if k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2] or out.shape[0] != q.shape[0] or out.shape[1] != q.shape[1]:
        raise ValueError("q, k and out do not belong together")
    if v.shape[0] != k.shape[0] or v.shape[1] != k.shape[1] or out.shape[2] != v.shape[2]:
        raise ValueError("k, v and out do not belong together")
    if out.shape[0] * out.shape[1] * out.shape[2] == 0:
        return
    if k.shape[1] == 0 or k.shape[2] == 0:
        raise ValueError("there are no keys")
    fastattn_attention_args_init(&args, sizeof(args))
    args.batch, args.num_heads, args.num_kv_heads = 1, q.shape[0], k.shape[0]
    args.q_len, args.kv_len, args.head_dim, args.v_head_dim = q.shape[1], k.shape[1], q.shape[2], v.shape[2]
    args.q, args.k, args.v, args.out = &q[0, 0, 0], &k[0, 0, 0], &v[0, 0, 0], &out[0, 0, 0]
    args.q_strides[1], args.q_strides[2] = q.strides[0], q.strides[1]
    args.k_strides[1], args.k_strides[2] = k.strides[0], k.strides[1]
    args.v_strides[1], args.v_strides[2] = v.strides[0], v.strides[1]
    args.out_strides[1], args.out_strides[2] = out.strides[0], out.strides[1]
    args.scale, args.causal, args.num_threads = 1 / sqrt(<double>q.shape[2]), 1, threads
    with nogil:
        status = fastattn_attention(&args, NULL, 0)
    if status != FASTATTN_OK:
        raise RuntimeError(fastattn_status_string(status).decode())


def check():
    import fastattn

    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 40, 64), dtype=np.float32)
    out = np.empty_like(q)
    attend(q, k, v, out)
    np.testing.assert_array_equal(out, fastattn.attention(q, k, v, causal=True))
    print("heads: the bits of fastattn.attention")
