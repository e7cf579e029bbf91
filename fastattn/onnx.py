"""ONNX: the operators of attention as defined, one by one, and a way to run graphs that hold them.

>>> outputs = fastattn.onnx.run("decoder.onnx", {"input_ids": ids})

:func:`run` lets onnx's reference evaluator walk the graph; the operators listed in :data:`ops` are computed here, all others by it. Each
is also a function of NumPy arrays, with the inputs of the operator in their order and its attributes as keywords; absent inputs are None.

Made for opsets 23 to 28 of ai.onnx, and for ``MultiHeadAttention`` and ``GroupQueryAttention`` of com.microsoft as their documentation
defines them, without quantised caches, buffers that are shared and beams.
"""

import numpy as np
import onnx
from onnx.backend.base import Backend as _Backend, BackendRep as _BackendRep
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from ._call import Call
from .attention import attention as _attention
from .backends import numpy as _oracle
from .inspect import attention_scores, attention_weights
from .linear import causal_conv, gated_delta_rule, gated_linear_attention, linear_attention as _linear_attention
from .rope import apply_rope

__all__ = [
    "Backend",
    "attention",
    "causal_conv_with_state",
    "group_query_attention",
    "linear_attention",
    "multi_head_attention",
    "ops",
    "rotary_embedding",
    "run",
]


# ---- ai.onnx --------------------------------------------------------------------------------------------------------


def attention(
    q, k, v, attn_mask=None, past_key=None, past_value=None, nonpad_kv_seqlen=None, *, is_causal=0, kv_num_heads=None,
    q_num_heads=None, qk_matmul_output_mode=0, scale=None, softcap=0.0, softmax_precision=None, left_window_size=-1,
    right_window_size=-1, num_outputs=4,
):  # fmt: skip
    """``Attention`` of opsets 23 to 25.

    Parameters
    ----------
    q, k, v : ndarray, (B, H, L, D) or (B, L, H * D)
        With three axes `q_num_heads` and `kv_num_heads` must be given.
    attn_mask : ndarray, optional
        Boolean or floating, broadcast to ``(B, Hq, Lq, total)``; keys beyond its end are not seen.
    past_key, past_value : ndarray, (B, Hkv, past, D), optional
        Keys and values before `k` and `v`.
    nonpad_kv_seqlen : ndarray of int, (B,), optional
        How many keys of each entry are real.
    is_causal : int
        Query ``i`` sees keys up to ``i + offset``; the offset is the length of the past, ``nonpad_kv_seqlen - Lq``, or 0.
    qk_matmul_output_mode : {0, 1, 2, 3}
        The fourth output holds the scores, those after softcap, those with the mask added, or the probabilities.
    scale, softcap, left_window_size, right_window_size
        As defined; a window of -1 is unbounded, a softcap of 0 is none.
    softmax_precision : int, optional
        An onnx data type. float64 is obeyed; otherwise the softmax is computed in float32 or better.
    num_outputs : int
        The fourth output, of Lq x total numbers for each head, is computed only where it is asked for.

    Returns
    -------
    y : ndarray
        Of the shape and dtype of `q`, with the head size of `v`.
    present_key, present_value : ndarray, (B, Hkv, total, D)
    qk_matmul_output : ndarray, (B, Hq, Lq, total), or None
    """
    if (past_key is None) != (past_value is None):
        raise ValueError("past_key and past_value must be given together")
    if nonpad_kv_seqlen is not None and past_key is not None:
        raise ValueError("nonpad_kv_seqlen must not be given together with past_key and past_value")
    packed = q.ndim == 3
    q, k, v = (_heads(name, x, n) for name, x, n in (("q", q, q_num_heads), ("k", k, kv_num_heads), ("v", v, kv_num_heads)))
    present_key = k if past_key is None else np.concatenate((past_key, k), axis=2)
    present_value = v if past_value is None else np.concatenate((past_value, v), axis=2)
    offset = 0 if past_key is None else past_key.shape[2]
    if nonpad_kv_seqlen is not None:
        offset = np.reshape(nonpad_kv_seqlen, -1) - q.shape[2]

    total = present_key.shape[2]
    keywords = {
        "mask": _whole_mask(attn_mask, total),
        "causal": bool(is_causal),
        "query_offset": offset,
        "kv_lengths": None if nonpad_kv_seqlen is None else np.reshape(nonpad_kv_seqlen, -1),
        "scale": scale,
        "softcap": softcap or None,
    }
    if left_window_size >= 0 or right_window_size >= 0:
        keywords["window"] = tuple(side if side >= 0 else None for side in (left_window_size, right_window_size))
    precise = softmax_precision == onnx.TensorProto.DOUBLE
    y = _compute(q, present_key, present_value, precise, keywords)
    scores = _scores(q, present_key, qk_matmul_output_mode, precise, keywords) if num_outputs > 3 else None
    return _packed(y) if packed else y, present_key, present_value, scores


def _heads(name, x, num_heads):
    """``(B, L, H * D)`` as ``(B, H, L, D)``, a view."""
    if x.ndim == 4:
        return x
    if x.ndim != 3 or not num_heads or x.shape[2] % num_heads:
        raise ValueError(f"{name} must have 4 axes, or 3 of which the last is a multiple of {num_heads} heads; got shape {x.shape}")
    return x.reshape(*x.shape[:2], num_heads, x.shape[2] // num_heads).swapaxes(1, 2)


def _packed(x):
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], x.shape[1] * x.shape[3])


def _whole_mask(mask, total):
    """A mask for all keys: those beyond its end are hidden."""
    if mask is None or mask.ndim == 0 or mask.shape[-1] in (1, total):
        return mask
    hidden = False if mask.dtype == bool else -np.inf
    return np.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, total - mask.shape[-1])], constant_values=hidden)


def _compute(q, k, v, precise, keywords):
    """Attention in the dtype of `q`; in float64 by the NumPy backend, which alone has it."""
    if precise or q.dtype == np.float64:
        call = Call(_oracle, *(x.astype(np.float64, copy=False) for x in (q, k, v)), **keywords)
        _oracle.attention(call)
        return call.result().astype(q.dtype, copy=False)
    if not q.dtype == k.dtype == v.dtype:
        common = np.result_type(np.float32, *(x.dtype for x in (q, k, v)))
        return _attention(*(x.astype(common, copy=False) for x in (q, k, v)), **keywords).astype(q.dtype)
    return _attention(q, k, v, **keywords)


def _scores(q, k, mode, precise, keywords):
    """What stage `mode` of the scores is, in the dtype of `q`."""
    single = np.float64 if precise or q.dtype == np.float64 else np.float32
    arrays = q.astype(single), k.astype(single)
    if mode == 3:
        return attention_weights(*arrays, **keywords).astype(q.dtype)
    return attention_scores(*arrays, stage=("raw", "softcap", "bias")[mode], **keywords).astype(q.dtype)


def rotary_embedding(x, cos_cache, sin_cache, position_ids=None, *, interleaved=0, num_heads=0, rotary_embedding_dim=0):
    """``RotaryEmbedding`` of opset 23: the first `rotary_embedding_dim` numbers of each head are turned by their position.

    Parameters
    ----------
    x : ndarray, (B, H, L, D) or (B, L, H * D)
        With three axes `num_heads` must be given.
    cos_cache, sin_cache : ndarray, (positions, rotary / 2), or without `position_ids` (B, L, rotary / 2)
    position_ids : ndarray of int, (B, L), optional
    interleaved : int
        Numbers 0 and 1, 2 and 3, ... are pairs, rather than those of the first and second half.
    rotary_embedding_dim : int
        0 is all of D.

    Returns
    -------
    ndarray
        Of the shape and dtype of `x`; computed in float32.
    """
    heads = _heads("x", x, num_heads)
    size = rotary_embedding_dim or heads.shape[3]
    if position_ids is not None:
        cos_cache, sin_cache = cos_cache[position_ids], sin_cache[position_ids]
    for name, cache in (("cos_cache", cos_cache), ("sin_cache", sin_cache)):
        if cache.shape[-1] != size // 2:
            raise ValueError(f"{name} must have {size // 2} numbers for each position, half of what is rotated; got {cache.shape[-1]}")
    out = apply_rope(heads, cos_cache, sin_cache, interleaved=bool(interleaved))
    return _packed(out) if x.ndim == 3 else out


def causal_conv_with_state(x, weight, bias=None, past_state=None, *, activation="none"):
    """``CausalConvWithState`` of opset 27: each channel convolved with its own kernel over this and earlier positions.

    Parameters
    ----------
    x : ndarray, (B, C, L)
    weight : ndarray, (C, 1, k)
    bias : ndarray, (C,), optional
    past_state : ndarray, (B, C, k - 1), optional
        The positions before `x`; zeros unless given.
    activation : {"none", "silu", "swish"}

    Returns
    -------
    output : ndarray, (B, C, L)
    present_state : ndarray, (B, C, k - 1)
    """
    if activation not in ("none", "silu", "swish"):
        raise ValueError(f'activation must be "none", "silu" or "swish"; got {activation!r}')
    activation = None if activation == "none" else "silu"
    return causal_conv(x, weight, bias, activation=activation, state=past_state, return_state=True)


_UPDATE_RULES = {"linear": (False, False), "gated": (True, False), "delta": (False, True), "gated_delta": (True, True)}


def linear_attention(
    query, key, value, past_state=None, decay=None, beta=None, *, q_num_heads, kv_num_heads, update_rule="gated_delta", scale=0.0,
    chunk_size=64,
):  # fmt: skip
    """``LinearAttention`` of opset 27: :func:`fastattn.linear_attention`, gated or with the delta rule.

    Parameters
    ----------
    query : ndarray, (B, L, Hq * Dk)
    key : ndarray, (B, L, Hkv * Dk)
    value : ndarray, (B, L, Hkv * Dv)
    past_state : ndarray, (B, Hkv, Dk, Dv), optional
        Zeros unless given.
    decay : ndarray, (B, L, Hkv) or (B, L, Hkv * Dk)
        Logarithms of what remains of the state, for the rules "gated" and "gated_delta" alone.
    beta : ndarray, (B, L, Hkv) or (B, L, 1)
        For the rules "delta" and "gated_delta" alone.
    q_num_heads, kv_num_heads : int
    update_rule : {"linear", "gated", "delta", "gated_delta"}
    scale : float
        0 is ``1 / sqrt(Dk)``.
    chunk_size : int
        Accepted; chunks are chosen here.

    Returns
    -------
    output : ndarray, (B, L, Hq * Dv)
    present_state : ndarray, (B, Hkv, Dk, Dv)
        Of the dtype of `past_state`, without which it is that of `query`.
    """
    if update_rule not in _UPDATE_RULES:
        raise ValueError(f"update_rule must be one of {', '.join(_UPDATE_RULES)}; got {update_rule!r}")
    for name, x, wanted in zip(("decay", "beta"), (decay, beta), _UPDATE_RULES[update_rule]):
        if (x is not None) != wanted:
            raise ValueError(f'{name} must {"" if wanted else "not "}be given for the update rule "{update_rule}"')
    if not (kv_num_heads > 0 and q_num_heads > 0 and q_num_heads % kv_num_heads == 0):
        raise ValueError(f"q_num_heads must be a positive multiple of kv_num_heads; got {q_num_heads} and {kv_num_heads}")
    q, k, v = (
        _heads(name, x, n)
        for name, x, n in zip(("query", "key", "value"), (query, key, value), (q_num_heads, kv_num_heads, kv_num_heads))
    )
    single = np.float64 if q.dtype == np.float64 else np.float32
    keywords = {"scale": scale or 1 / np.sqrt(q.shape[3]), "return_state": True}
    if past_state is not None:
        keywords["state"] = past_state.astype(single, copy=False)
    if decay is not None:
        decay = decay.swapaxes(1, 2) if decay.shape[2] == kv_num_heads else _heads("decay", decay, kv_num_heads)
    if beta is not None:
        out, state = gated_delta_rule(q, k, v, beta.swapaxes(1, 2), log_decay=decay, **keywords)
    elif decay is not None:
        out, state = gated_linear_attention(q, k, v, log_decay=decay, **keywords)
    else:
        out, state = _linear_attention(q, k, v, feature_map="identity", normalize=False, **keywords)
    return _packed(out), state.astype(query.dtype if past_state is None else past_state.dtype, copy=False)


# ---- com.microsoft --------------------------------------------------------------------------------------------------


def multi_head_attention(
    query, key=None, value=None, bias=None, key_padding_mask=None, attention_bias=None, past_key=None, past_value=None,
    past_sequence_length=None, cache_indirection=None, *, num_heads, mask_filter_value=-10000.0, scale=0.0, unidirectional=0, num_outputs=4,
):  # fmt: skip
    """``MultiHeadAttention`` of com.microsoft.

    Parameters
    ----------
    query : ndarray, (B, L, H * D), or packed (B, L, H, 3, D)
    key : ndarray, (B, Lk, H * D), packed with values (B, Lk, H, 2, D), or (B, H, Lk, D)
    value : ndarray, (B, Lk, H * Dv) or (B, H, Lk, Dv)
    bias : ndarray, optional
        Added to the projections of `query`, `key` and `value`, one after the other.
    key_padding_mask : ndarray of int, (B,), (B, total) or (B, L, total), optional
        How many keys of each entry are real, or 1 where a key is.
    attention_bias : ndarray, broadcast to (B, H, L, total), optional
    past_key, past_value : ndarray, (B, H, past, D), optional
    past_sequence_length, cache_indirection
        Refused: a buffer that is shared, and beams that share it.
    mask_filter_value : float
        What is added to the scores of keys that `key_padding_mask` hides.
    scale : float
        0 is ``1 / sqrt(D)``.
    unidirectional : int
        Query ``i`` sees keys up to ``i`` and those of the past.
    num_outputs : int
        The fourth output is computed only where it is asked for.

    Returns
    -------
    output : ndarray, (B, L, H * Dv)
    present_key, present_value : ndarray, (B, H, total, D)
    qk : ndarray, (B, H, L, total), or None
        The scores, scaled, before anything is added to them.
    """
    _refuse(past_sequence_length=past_sequence_length, cache_indirection=cache_indirection)
    if query.ndim == 5:
        query, key, value = (_packed(query[:, :, :, n].swapaxes(1, 2)) for n in range(3))
    elif key is not None and key.ndim == 5:
        key, value = (_packed(key[:, :, :, n].swapaxes(1, 2)) for n in range(2))
    if bias is not None:
        sizes = np.cumsum([query.shape[2], key.shape[2] if key.ndim == 3 else 0])
        parts = np.split(bias, sizes)
        query, key, value = (x if x.ndim == 4 else x + part for x, part in zip((query, key, value), parts))
    q, k, v = (_heads(name, x, num_heads) for name, x in (("query", query), ("key", key), ("value", value)))
    past = 0 if past_key is None else past_key.shape[2]
    if past_key is not None:
        k, v = np.concatenate((past_key, k), axis=2), np.concatenate((past_value, v), axis=2)
    total = k.shape[2]
    keywords = {"mask": attention_bias, "causal": bool(unidirectional), "query_offset": past, "scale": scale or None}
    if key_padding_mask is not None:
        if key_padding_mask.ndim == 1:
            if key_padding_mask.shape[0] != q.shape[0]:
                raise NotImplementedError(
                    f"key_padding_mask of shape {key_padding_mask.shape} is not served: (B,), (B, total), (B, L, total)"
                )
            keywords["kv_lengths"] = key_padding_mask
        else:
            seen = key_padding_mask.reshape(q.shape[0], 1, -1, total) != 0
            hidden = np.where(seen, np.float32(0), np.float32(mask_filter_value))
            keywords["mask"] = hidden if attention_bias is None else attention_bias + hidden
    qk = _scores(q, k, 0, False, keywords) if num_outputs > 3 else None
    return _packed(_compute(q, k, v, False, keywords)), k, v, qk


def group_query_attention(
    query, key=None, value=None, past_key=None, past_value=None, seqlens_k=None, total_sequence_length=None, cos_cache=None,
    sin_cache=None, position_ids=None, attention_bias=None, head_sink=None, k_scale=None, v_scale=None, q_norm_weight=None,
    k_norm_weight=None, query_seqlens=None, *, num_heads, kv_num_heads, causal=1, do_rotary=0, rotary_interleaved=0,
    local_window_size=-1, scale=0.0, softcap=0.0, smooth_softmax=0, qk_norm_epsilon=1e-6, q_norm_epsilon=None, k_norm_epsilon=None,
    qk_output=0, sliding_window_cache=0, k_quant_type="NONE", v_quant_type="NONE", kv_cache_bit_width=0, num_outputs=4,
):  # fmt: skip
    """``GroupQueryAttention`` of com.microsoft: causal attention behind a cache, with rotation.

    Parameters
    ----------
    query : ndarray, (B, L, Hq * D), or packed with keys and values (B, L, (Hq + 2 * Hkv) * D)
    key, value : ndarray, (B, L, Hkv * D), optional
    past_key, past_value : ndarray, (B, Hkv, capacity, D), optional
    seqlens_k : ndarray of int, (B,)
        One less than the number of tokens of each entry, new ones included.
    total_sequence_length : int or ndarray of one
        The largest number of tokens of an entry. If it is L, this is the prompt, which begins at 0 and may be padded on the right.
    cos_cache, sin_cache : ndarray, (positions, rotary / 2), optional
        Used if `do_rotary` is set.
    position_ids : ndarray of int, (B, L), optional
        By default the positions in the cache.
    attention_bias : ndarray, broadcast to (B, Hq, L, total_sequence_length), optional
    head_sink : ndarray, (Hq,), optional
        A logit for each head, of no key.
    q_norm_weight, k_norm_weight : ndarray, (D,), optional
        Queries and keys are normalised by their root mean square, and multiplied by these, before they are rotated.
    query_seqlens : ndarray of int, (B,), optional
        How many of the L new tokens of each entry are real; the others are padding on the right, and their outputs are 0.
    causal : int
        Query ``i`` sees keys up to its own; otherwise all.
    qk_norm_epsilon, q_norm_epsilon, k_norm_epsilon : float
        What is added to the mean square; the latter two take the place of the first.
    local_window_size : int
        How many keys a query sees, its own included; -1 is all.
    scale, softcap
        0 is ``1 / sqrt(D)``, and none.
    smooth_softmax : int
        A logit 0 of no key, for every head.
    qk_output : {0, 1, 2}
        The fourth output holds nothing, the scores with all that is done to them, or the probabilities.
    k_scale, v_scale, k_quant_type, v_quant_type, kv_cache_bit_width, sliding_window_cache
        Refused: caches that are quantised, or as long as the window.

    Returns
    -------
    output : ndarray, (B, L, Hq * D)
    present_key, present_value : ndarray, (B, Hkv, the larger of capacity and total_sequence_length, D)
    output_qk : ndarray, (B, Hq, L, total_sequence_length), or None
    """
    quantised = [x for x in (k_quant_type, v_quant_type) if x != "NONE"]
    _refuse(k_scale=k_scale, v_scale=v_scale, k_quant_type=quantised or None, sliding_window_cache=sliding_window_cache or None)
    if key is None:
        size = query.shape[2] // (num_heads + 2 * kv_num_heads)
        query, key, value = np.split(query, [num_heads * size, (num_heads + kv_num_heads) * size], axis=2)
    q, k, v = _heads("query", query, num_heads), _heads("key", key, kv_num_heads), _heads("value", value, kv_num_heads)
    batch, length = q.shape[0], q.shape[2]
    total = int(np.reshape(total_sequence_length, ()))
    lengths = np.reshape(seqlens_k, -1).astype(np.int64) + 1
    counts = np.full(batch, length) if query_seqlens is None else np.reshape(query_seqlens, -1).astype(np.int64)
    prompt = length == total and query_seqlens is None
    offsets = np.zeros(batch, np.int64) if prompt else lengths - counts
    if q_norm_weight is not None:
        epsilons = (qk_norm_epsilon if x is None else x for x in (q_norm_epsilon, k_norm_epsilon))
        q, k = (_normed(x, w, epsilon) for x, w, epsilon in zip((q, k), (q_norm_weight, k_norm_weight), epsilons))
    if do_rotary:
        if position_ids is None:
            position_ids = np.maximum(offsets[:, None] + np.arange(length), 0)
        position_ids = np.broadcast_to(position_ids, (batch, length))
        size = 2 * cos_cache.shape[1]
        options = {"interleaved": rotary_interleaved, "rotary_embedding_dim": size}
        q, k = (rotary_embedding(x, cos_cache, sin_cache, position_ids, **options) for x in (q, k))

    capacity = max(0 if past_key is None else past_key.shape[2], total)
    present_key, present_value = (np.zeros((batch, kv_num_heads, capacity, x.shape[3]), x.dtype) for x in (k, v))
    for b, (offset, count) in enumerate(zip(offsets, counts)):
        for present, past, new in ((present_key, past_key, k), (present_value, past_value, v)):
            if past is not None:
                present[b, :, :offset] = past[b, :, :offset]
            present[b, :, offset : offset + count] = new[b, :, :count]
    keywords = {
        "causal": bool(causal), "query_offset": offsets, "kv_lengths": lengths, "scale": scale or None, "softcap": softcap or None,
        "window": (local_window_size - 1, None) if local_window_size > 0 else None, "mask": _whole_mask(attention_bias, capacity),
        "sinks": head_sink if head_sink is not None else np.zeros(num_heads, np.float32) if smooth_softmax else None,
        "q_lengths": None if query_seqlens is None else counts,
    }  # fmt: skip
    qk = None
    if num_outputs > 3 and qk_output:
        qk = _scores(q, present_key, {1: 2, 2: 3}[qk_output], False, keywords)[..., :total]
    return _packed(_compute(q, present_key, present_value, False, keywords)), present_key, present_value, qk


def _refuse(**given):
    for name, x in given.items():
        if x is not None:
            raise NotImplementedError(f"{name} is not served; it must not be given")


def _normed(x, weight, epsilon):
    single = x.astype(np.float32)
    mean = np.square(single).mean(axis=3, keepdims=True)
    return (single / np.sqrt(mean + np.float32(epsilon)) * weight.astype(np.float32)).astype(x.dtype)


# ---- Graphs ---------------------------------------------------------------------------------------------------------


def _operator(name, function, domain="", outputs=None):
    """A class of onnx's reference evaluator that computes an operator with a function; `outputs`: it wants their number."""

    def _run(self, *inputs, **attributes):
        given = {key: value for key, value in attributes.items() if value is not None}
        if outputs:
            given[outputs] = len(self.onnx_node.output)
        result = function(*inputs, **given)
        result = result if isinstance(result, tuple) else (result,)
        return result[: len(self.onnx_node.output)]

    doc = f"``{name}``, computed by :func:`{function.__name__}`."
    return type(name, (OpRun,), {"_run": _run, "__doc__": doc, "op_domain": domain})


#: The operators as classes for ``ReferenceEvaluator(model, new_ops=fastattn.onnx.ops)``.
ops = [
    _operator("Attention", attention, outputs="num_outputs"),
    _operator("RotaryEmbedding", rotary_embedding),
    _operator("CausalConvWithState", causal_conv_with_state),
    _operator("LinearAttention", linear_attention),
    _operator("MultiHeadAttention", multi_head_attention, "com.microsoft", outputs="num_outputs"),
    _operator("GroupQueryAttention", group_query_attention, "com.microsoft", outputs="num_outputs"),
]


def run(model, inputs, outputs=None):
    """Run a model with onnx's reference evaluator, its operators of attention by fastattn.

    Parameters
    ----------
    model : ModelProto, bytes, str or path
    inputs : dict of str to array_like
    outputs : list of str, optional
        Which outputs; all by default.

    Returns
    -------
    list of ndarray
    """
    return ReferenceEvaluator(model, new_ops=ops).run(outputs, inputs)


class Backend(_Backend):
    """onnx's interface for those who run models, as its test-suite asks for it."""

    @classmethod
    def prepare(cls, model, device="CPU", **options):
        """A model that is ready to run."""
        return _Prepared(model)

    @classmethod
    def supports_device(cls, device):
        """Whether models run there: on the CPU."""
        return device == "CPU"


class _Prepared(_BackendRep):
    def __init__(self, model):
        self._evaluator = ReferenceEvaluator(model, new_ops=ops)

    def run(self, inputs, **options):
        if not isinstance(inputs, dict):
            inputs = dict(zip(self._evaluator.input_names, inputs))
        return tuple(self._evaluator.run(None, inputs))
