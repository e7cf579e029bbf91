"""fastattn: exact attention on the CPU, from NumPy arrays down to C micro-kernels.

>>> import numpy as np, fastattn
>>> q = np.random.default_rng(0).standard_normal((1, 8, 128, 64), dtype=np.float32)
>>> out = fastattn.attention(q, q, q, causal=True)

There is one operation, :func:`attention`, and every other name stands around it.

Which keys a query sees, and how scores are made, is data: masks, windows, lengths, offsets, biases, sinks. They compose, and
none of them costs a pass over a matrix of scores, since that matrix never exists. Key blocks which nobody can see are not
loaded, so that a causal call costs half of a full one.

Three backends compute the same thing. ``native`` is a C library with kernels for each instruction set, chosen at run time;
``numba`` stands in where the extension was not built; ``numpy`` is the oracle, readable and slow, and alone takes float64.
:func:`show_config` says which one is in use and why, :func:`explain` how one call would be computed. The C library is there for
programs in C and Cython as well, where :func:`get_include` and :func:`get_library_dir` say.

Batches need no padding: :func:`attention_varlen` takes sequences one after the other, and where there is padding (`kv_starts`,
`kv_lengths`, `q_lengths`) it costs nothing and changes no bit. :class:`KVCache` keeps the keys and values of sequences that grow;
:class:`PagedKVCache` in pages of a pool, which :func:`paged_attention` reads wherever they lie. Either takes a half or a quarter of
bfloat16's bytes when it quantises (``dtype="int8"``, ``"int4"``), and :func:`quantize` does it to arrays.

A call that sees only a part of the keys can say so (``return_lse=True``), and :func:`merge_states` joins such parts exactly:
splitting, caching and distributing all rest on that.

What a query looks at is said by :func:`attention_weights`, :func:`attention_mass` and others beside them; ``fastattn.plot`` draws it.

Scores and weights may be others: :func:`additive_attention` and :func:`luong_attention`, ``activation=`` in the place of the softmax,
and ``score_function=`` for whatever is not there yet (:func:`score_function`).

Beside it stands the linear family (:func:`linear_attention`, :func:`gated_linear_attention`, :func:`gated_delta_rule`), whose state
of a fixed size takes the place of the keys.

Around all this stand the layers of a transformer, in NumPy and without a framework: ``fastattn.layers``.

For programs of other makers there are ``fastattn.torch`` and more, modules that are imported when they are first named.

Where tokens stand is data as well: :func:`rope_table` and :func:`apply_rope` turn queries and keys by their positions,
:func:`alibi_slopes` and :func:`t5_bias` are biases that no array per head and batch entry has to hold.

Settings (threads, backend, instruction set) belong to the process, and those of a ``with`` block to the calling context. No result
depends on the number of threads or on how they are had.
"""

import importlib

from . import plot
from .attention import (
    attention,
    merge_states,
    scaled_dot_product_attention,
)
from .indexed import attention_indexed, select_keys
from .inspect import attention_entropy, attention_mass, attention_scores, attention_span, attention_weights, rollout
from .kvcache import CacheFullError, KVCache
from .linear import causal_conv, gated_delta_rule, gated_linear_attention, linear_attention
from .pagedcache import PagedKVCache
from .positions import alibi_slopes, rope_table, sinusoidal_positions, t5_bias
from .quantized import dequantize, quantize
from .rope import apply_rope
from .runtime import (
    BackendWarning,
    _initialize,
    cpu_info,
    explain,
    get_include,
    get_library_dir,
    get_num_threads,
    set_num_threads,
    show_config,
    threads,
    use_backend,
)
from .scores import additive_attention, luong_attention, score_function
from .sparse import BlockMask
from .varlen import attention_varlen, paged_attention

__version__ = "0.1.0"

__all__ = [
    "BackendWarning",
    "BlockMask",
    "CacheFullError",
    "KVCache",
    "PagedKVCache",
    "additive_attention",
    "alibi_slopes",
    "apply_rope",
    "attention",
    "attention_entropy",
    "attention_indexed",
    "attention_mass",
    "attention_scores",
    "attention_span",
    "attention_varlen",
    "attention_weights",
    "causal_conv",
    "cpu_info",
    "dequantize",
    "explain",
    "gated_delta_rule",
    "gated_linear_attention",
    "get_include",
    "get_library_dir",
    "get_num_threads",
    "linear_attention",
    "luong_attention",
    "merge_states",
    "paged_attention",
    "plot",
    "quantize",
    "rollout",
    "rope_table",
    "scaled_dot_product_attention",
    "score_function",
    "select_keys",
    "set_num_threads",
    "show_config",
    "sinusoidal_positions",
    "t5_bias",
    "threads",
    "use_backend",
]

_initialize()
del _initialize

_WHEN_NAMED = ("flash_attn", "layers", "onnx", "torch", "transformers")


def __getattr__(name):
    """A module that is imported when its name is first used, so that ``import fastattn`` stays light."""
    if name in _WHEN_NAMED:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
