"""A program of a user's, for mypy: what it calls is typed, and its mistakes (marked) are found. It is read, never run."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastattn
from fastattn import BlockMask, KVCache

Floats = NDArray[Any]

q = np.zeros((1, 8, 16, 64), np.float32)
lengths = np.array([12])


class Tensor:
    def __dlpack__(self) -> object:
        return None

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


def plain() -> Floats:
    return fastattn.attention(q, q, q, causal=True, window=(128, None), kv_lengths=lengths, query_offset=3, scale=0.5)


def with_lse() -> tuple[Floats, NDArray[np.float32]]:
    return fastattn.attention(q, q, q, return_lse=True, mask=BlockMask.causal(16, block_size=16), precision="high")


def either(wanted: bool) -> Any:
    return fastattn.attention(Tensor(), Tensor(), Tensor(), return_lse=wanted, out=q)


def sparse() -> BlockMask:
    mask = BlockMask.sliding_window(4096, window=(255, 0)) | ~BlockMask.strided(4096, stride=64)
    print(mask.density, mask.shape[2], mask.indptr[0])
    return mask & BlockMask.top_k(q, q, 4, block_size=16)


def around() -> NDArray[np.float32]:
    out, lse = fastattn.merge_states([q, q], [q[..., 0], q[..., 0]])
    with fastattn.threads(2), fastattn.use_backend("native"):
        out = fastattn.scaled_dot_product_attention(q, q, q, is_causal=True)
    cache = KVCache(1, 8, 1024, 64)
    cache.append(q, q)
    cos, sin = fastattn.rope_table(16, 64)
    print(fastattn.explain(q, q, q, causal=True)["kernel"], fastattn.get_num_threads() + 1, out, lse, cache.lengths)
    print(fastattn.apply_rope(q, cos, sin), fastattn.attention_mass(q, q, np.zeros(16, int)))
    return fastattn.attention_weights(q, q, sinks=np.zeros(8))


def ragged() -> Floats:
    fastattn.attention(q, q, q, kv_starts=lengths, q_lengths=[12])
    return fastattn.attention_varlen(q[0], q[0], q[0], [0, 8], lengths, causal=True, q_lengths=4)


fastattn.attention(q, q, q, precision="low")  # error: arg-type, call-overload
fastattn.attention(q, q, q, casual=True)  # error: call-arg, call-overload
fastattn.attention_weights(q, q, causal="yes")  # error: arg-type
BlockMask.causal(64, 16)  # error: call-arg
fastattn.set_num_threads("2")  # error: arg-type
fastattn.attention_varlen(q[0], q[0], q[0], [0, 8], [0, 8], mask=None)  # error: call-arg, call-overload
number: int = fastattn.attention(q, q, q)  # error: assignment
