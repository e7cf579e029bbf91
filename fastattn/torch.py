"""Attention on PyTorch's tensors, as an operator that ``torch.compile``, ``torch.export`` and inference mode know.

Tensors on the CPU are read where they lie, whatever their strides. :func:`attention` is :func:`fastattn.attention` for tensors,
:func:`scaled_dot_product_attention` is torch's function with torch's meaning, and :func:`replaced` puts it in the place of
torch's own. There is no backward pass: where a gradient is needed, each of them says so.

A call uses ``torch.get_num_threads()`` threads, unless ``FASTATTN_NUM_THREADS`` or :func:`fastattn.set_num_threads` has said otherwise.
"""

import collections
import contextlib
import sys
import warnings

import numpy as np
import torch

from . import _check, runtime
from .attention import attention as _attention
from .varlen import attention_varlen as _attention_varlen

__all__ = ["FallbackWarning", "attention", "attention_varlen", "replaced", "scaled_dot_product_attention"]

_state = runtime._state
_NO_GRADIENT = "fastattn has no backward pass: call it under torch.inference_mode() or torch.no_grad(), or give it x.detach()"
_NO_DROPOUT = "fastattn has no dropout: dropout_p must be 0"


class FallbackWarning(RuntimeWarning):
    """A call is left to torch's own attention; the message says why."""


# ---- The operators --------------------------------------------------------------------------------------------------

_RULES = (
    "bool causal=False, SymInt? window_left=None, SymInt? window_right=None, SymInt? offset=None, Tensor? offsets=None, "
    "Tensor? kv_starts=None, Tensor? q_lengths=None, float? scale=None, float? softcap=None, Tensor? alibi_slopes=None, "
    "Tensor? sinks=None, str precision='highest'"
)
_DENSE = f"Tensor q, Tensor k, Tensor v, *, Tensor? mask=None, Tensor? kv_lengths=None, {_RULES}"
_PACKED = f"Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, *, {_RULES}"
library = torch.library.Library("fastattn", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)  # the strides of q say those of the output
for _name, _arguments in (("attention", _DENSE), ("attention_varlen", _PACKED)):
    library.define(f"{_name}({_arguments}) -> Tensor", tags=_TAGS)
    library.define(f"{_name}_lse({_arguments}) -> (Tensor, Tensor)", tags=_TAGS)
# The first of them with what torch's function needs: half a microsecond less, as each argument costs the dispatcher some.
_SDPA = "Tensor q, Tensor k, Tensor v, *, Tensor? mask=None, bool causal=False, SymInt? offset=None, float? scale=None"
library.define(f"scaled_dot_product_attention({_SDPA}) -> Tensor", tags=_TAGS)


def _needs_gradient(*arguments):
    return torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in arguments)


def _follow_torch_threads():
    if _state.threads != torch.get_num_threads() and _state.threads_from not in ("FASTATTN_NUM_THREADS", "set_num_threads"):
        runtime._set_threads(torch.get_num_threads(), "torch.get_num_threads()")


def _side_by_side(q):
    """Whether the heads of a token lie together in `q` (B, H, L, D), as a projection leaves them; then they do in the output."""
    return q.shape[2] > 1 and q.shape[1] > 1 and q.stride(1) < q.stride(2)


def _empty_out(q, v):
    batch, heads, length = q.shape[:3]
    if _side_by_side(q):
        return q.new_empty((batch, length, heads, v.shape[3])).transpose(1, 2)
    return q.new_empty((batch, heads, length, v.shape[3]))


try:
    from ._native import array_at
except ImportError:  # another backend computes, and a microsecond more is nothing to it
    array_at = None
_dtypes = {torch.float32: np.dtype(np.float32), torch.float16: np.dtype(np.float16)}  # bfloat16 when its package is needed


def as_array(tensor):
    """An array over the memory of a tensor in the memory of the CPU."""
    dtype = _dtypes.get(tensor.dtype)
    if dtype is None or array_at is None:
        array = _check.as_array("tensor", tensor.detach())
        if tensor.dtype is torch.bfloat16:
            _dtypes[torch.bfloat16] = array.dtype
        return array
    return array_at(tensor.data_ptr(), tensor.shape, tensor.stride(), dtype, tensor)


def as_tensor(array):
    """A tensor over the memory of an array; for bfloat16, which torch does not take from NumPy, by integers of the same bits."""
    if array.dtype.kind != "V":  # as which NumPy sees bfloat16
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def prepare(q, *others):
    """Before arrays of tensors are computed with: refuse a gradient, and use torch's number of threads."""
    if _needs_gradient(q, *others):
        raise RuntimeError(_NO_GRADIENT)
    _follow_torch_threads()


def _keywords(given):
    """Arguments of the operators as keywords of :func:`fastattn.attention`."""
    keywords = {name: as_array(value) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    sides = keywords.pop("window_left", None), keywords.pop("window_right", None)
    if sides != (None, None):
        keywords["window"] = sides
    for name in ("offset", "offsets"):
        if name in keywords:
            keywords["query_offset"] = keywords.pop(name)
    return keywords


# The dispatcher lets tensors in the memory of the CPU come here, and of the keywords those that differ from the default.


def _kernel(q, k, v, **given):
    prepare(q, k, v, *given.values())
    keywords = _keywords(given) if given else given
    if _side_by_side(q):
        out = _empty_out(q, v)
        _attention(as_array(q), as_array(k), as_array(v), out=as_array(out), **keywords)
        return out
    return as_tensor(_attention(as_array(q), as_array(k), as_array(v), **keywords))


def _kernel_lse(q, k, v, **given):
    prepare(q, k, v, *given.values())
    out = _empty_out(q, v)
    lse = _attention(as_array(q), as_array(k), as_array(v), return_lse=True, out=as_array(out), **_keywords(given))[1]
    return out, torch.from_numpy(lse)


def _varlen_kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, **given):
    return _varlen_kernel_lse(q, k, v, cu_seqlens_q, cu_seqlens_k, return_lse=False, **given)[0]


def _varlen_kernel_lse(q, k, v, cu_seqlens_q, cu_seqlens_k, return_lse=True, **given):
    prepare(q, k, v, *given.values())
    arrays = [as_array(x) for x in (q, k, v, cu_seqlens_q, cu_seqlens_k)]
    result = _attention_varlen(*arrays, return_lse=return_lse, **_keywords(given))
    out, lse = result if return_lse else (result, None)
    return as_tensor(out), None if lse is None else torch.from_numpy(lse)


def _fake(q, k, v, **keywords):
    return _empty_out(q, v)


def _fake_lse(q, k, v, **keywords):
    return _empty_out(q, v), q.new_empty(q.shape[:3], dtype=torch.float32)


def _varlen_fake(q, k, v, cu_seqlens_q, cu_seqlens_k, **keywords):
    return q.new_empty((*q.shape[:2], v.shape[2]))


def _varlen_fake_lse(q, k, v, cu_seqlens_q, cu_seqlens_k, **keywords):
    return q.new_empty((*q.shape[:2], v.shape[2])), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


for _name, _implementation, _shapes in (
    ("attention", _kernel, _fake),
    ("attention_lse", _kernel_lse, _fake_lse),
    ("scaled_dot_product_attention", _kernel, _fake),
    ("attention_varlen", _varlen_kernel, _varlen_fake),
    ("attention_varlen_lse", _varlen_kernel_lse, _varlen_fake_lse),
):
    library.impl(_name, _implementation, "CPU")
    torch.library.register_fake(f"fastattn::{_name}", _shapes, lib=library)
_op, _op_lse = torch.ops.fastattn.attention.default, torch.ops.fastattn.attention_lse.default
_sdpa_op = torch.ops.fastattn.scaled_dot_product_attention.default
_varlen_op, _varlen_op_lse = torch.ops.fastattn.attention_varlen.default, torch.ops.fastattn.attention_varlen_lse.default


# ---- Functions ------------------------------------------------------------------------------------------------------


def attention(
    q, k, v, *, mask=None, causal=False, window=None, query_offset=None, kv_lengths=None, kv_starts=None, q_lengths=None, scale=None,
    softcap=None, alibi_slopes=None, sinks=None, precision="highest", return_lse=False,
):  # fmt: skip
    """:func:`fastattn.attention` for torch tensors on the CPU.

    Parameters
    ----------
    q, k, v : Tensor, (B, Hq, Lq, Dk), (B, Hkv, Lk, Dk), (B, Hkv, Lk, Dv)
        float32, bfloat16 or float16, of any strides; ranks 2 and 3 as in :func:`fastattn.attention`. Nothing is copied unless the
        last axis is not contiguous.
    mask, query_offset, kv_lengths, kv_starts, q_lengths, alibi_slopes, sinks
        Tensors (offsets and lengths also ints), and otherwise as in :func:`fastattn.attention`.
    causal, window, scale, softcap, precision, return_lse
        As in :func:`fastattn.attention`.

    Returns
    -------
    out : Tensor, (B, Hq, Lq, Dv)
        Of the dtype of `q`. It lies in memory as `q` does: where the heads of a token are side by side, ``out.transpose(1, 2)``
        is contiguous.
    lse : Tensor, (B, Hq, Lq)
        float32, only with ``return_lse=True``.

    Raises
    ------
    RuntimeError
        Where a gradient is needed: there is no backward pass.
    """
    if torch.compiler.is_compiling() and _needs_gradient(q, k, v, mask, alibi_slopes, sinks):
        raise RuntimeError(_NO_GRADIENT)
    lift = 4 - q.ndim
    if lift:
        q, k, v = (x[(None,) * lift] for x in (q, k, v))
    keywords = _rules(causal, window, query_offset, kv_starts, q_lengths, scale, softcap, alibi_slopes, sinks)
    if mask is not None:
        keywords["mask"] = mask
    if kv_lengths is not None:
        keywords["kv_lengths"] = torch.as_tensor(kv_lengths)
    if return_lse:
        out, lse = _op_lse(q, k, v, precision=precision, **keywords)
        return (out[(0,) * lift], lse[(0,) * lift]) if lift else (out, lse)
    out = _op(q, k, v, precision=precision, **keywords)
    return out[(0,) * lift] if lift else out


def attention_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, *, causal=False, window=None, query_offset=None, kv_starts=None, q_lengths=None, scale=None,
    softcap=None, alibi_slopes=None, sinks=None, precision="highest", return_lse=False,
):  # fmt: skip
    """:func:`fastattn.attention_varlen` for torch tensors on the CPU: packed sequences.

    Parameters
    ----------
    q, k, v : Tensor, (total_q, Hq, Dk), (total_k, Hkv, Dk), (total_k, Hkv, Dv)
        As for :func:`attention`.
    cu_seqlens_q, cu_seqlens_k : Tensor of int, (B + 1,)
        Where sequences begin and end.
    causal, window, query_offset, kv_starts, q_lengths, scale, softcap, alibi_slopes, sinks, precision, return_lse
        As for :func:`attention`, for each sequence.

    Returns
    -------
    out : Tensor, (total_q, Hq, Dv)
        Of the dtype of `q`.
    lse : Tensor, (Hq, total_q)
        float32, only with ``return_lse=True``.

    Raises
    ------
    RuntimeError
        Where a gradient is needed: there is no backward pass.
    """
    if torch.compiler.is_compiling() and _needs_gradient(q, k, v, alibi_slopes, sinks):
        raise RuntimeError(_NO_GRADIENT)
    keywords = _rules(causal, window, query_offset, kv_starts, q_lengths, scale, softcap, alibi_slopes, sinks)
    op = _varlen_op_lse if return_lse else _varlen_op
    return op(q, k, v, torch.as_tensor(cu_seqlens_q), torch.as_tensor(cu_seqlens_k), precision=precision, **keywords)


def _rules(causal, window, query_offset, kv_starts, q_lengths, scale, softcap, alibi_slopes, sinks):
    """Keywords as arguments of the operators; those that say nothing are left out, since each costs the dispatcher some time."""
    keywords = {"scale": scale, "softcap": softcap, "alibi_slopes": alibi_slopes, "sinks": sinks}
    keywords = {name: value for name, value in keywords.items() if value is not None}
    if causal:
        keywords["causal"] = causal
    if window is not None:
        keywords["window_left"], keywords["window_right"] = window
    if query_offset is not None:
        keywords["offsets" if isinstance(query_offset, torch.Tensor) else "offset"] = query_offset
    if kv_starts is not None:
        keywords["kv_starts"] = torch.as_tensor(kv_starts)
    if q_lengths is not None:
        keywords["q_lengths"] = torch.as_tensor(q_lengths)
    return keywords


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """``torch.nn.functional.scaled_dot_product_attention``, its arguments and its meaning, on the CPU without a gradient.

    Parameters
    ----------
    query : Tensor, (N, ..., Hq, L, E)
        float32, bfloat16 or float16. Leading axes broadcast among the three tensors.
    key : Tensor, (N, ..., H, S, E)
    value : Tensor, (N, ..., H, S, Ev)
    attn_mask : Tensor, optional
        Broadcast to ``(N, ..., Hq, L, S)``. Boolean: True takes part. Floating: added to the scores.
    dropout_p : float
        Must be 0.
    is_causal : bool
        Query ``i`` sees keys ``j <= i``. Excludes `attn_mask`.
    scale : float, optional
        Default: ``1 / sqrt(E)``.
    enable_gqa : bool
        Let `Hq` be a multiple of the number of heads of `key` and `value`.

    Returns
    -------
    Tensor, (N, ..., Hq, L, Ev)
        Of the dtype of `query`. A row that sees no key is 0.

    Raises
    ------
    NotImplementedError, RuntimeError, TypeError, ValueError
        For what fastattn does not serve: dropout, tensors elsewhere, a gradient, another dtype, shapes that do not fit.
    """
    if dropout_p != 0.0:
        raise NotImplementedError(f"{_NO_DROPOUT}; it is {dropout_p}")
    return _sdpa(query, key, value, attn_mask, is_causal, scale, enable_gqa)


def _serves(query, key, value, attn_mask, dropout_p):
    """Whether a call of torch's function is served, in as few steps as that takes; :func:`_why_not` has the reasons."""
    dtype = query.dtype
    return (
        dropout_p == 0.0
        and (dtype is torch.float32 or dtype is torch.bfloat16 or dtype is torch.float16)
        and key.dtype is dtype
        and value.dtype is dtype
        and query.is_cpu
        and key.is_cpu
        and value.is_cpu
        and query.layout is key.layout is value.layout is torch.strided
        and not (query.is_nested or key.is_nested or value.is_nested)
        and not torch.is_autocast_enabled("cpu")
        and not _needs_gradient(query, key, value, attn_mask)
        and (attn_mask is None or (attn_mask.is_cpu and attn_mask.layout is torch.strided and not attn_mask.is_nested))
    )


def _why_not(query, key, value, attn_mask, dropout_p):
    """Why a call of torch's function is not served."""
    tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    for x in tensors:
        if not x.is_cpu:
            return f"tensors must be in the memory of the CPU; one is on {x.device}"
        if x.layout is not torch.strided or x.is_nested:
            return "tensors must be dense; one is nested, sparse or of another layout"
    if dropout_p != 0.0:
        return f"{_NO_DROPOUT}; it is {dropout_p}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is not followed: cast the model instead"
    if _needs_gradient(query, key, value, attn_mask):
        return _NO_GRADIENT
    return (
        "query, key and value must be float32, bfloat16 or float16, all of them the same; "
        f"they are {query.dtype}, {key.dtype} and {value.dtype}"
    )


def _sdpa(query, key, value, attn_mask, is_causal, scale, enable_gqa):
    if torch.compiler.is_compiling() and _needs_gradient(query, key, value, attn_mask):
        raise RuntimeError(_NO_GRADIENT)  # in the very frame that holds the operator, or a graph break passes the check by
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask must be None when is_causal is True")
    q, k, v = query.shape, key.shape, value.shape
    if not len(q) == len(k) == len(v) == 4:
        return _sdpa_of_rank(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    if not (q[1] == k[1] == v[1] and q[0] == k[0] == v[0]):
        query, key, value = _with_leads(query, key, value, enable_gqa)
    keywords = {}  # those that say something: each costs the dispatcher some time
    if scale is not None:
        keywords["scale"] = scale
    if attn_mask is not None:
        keywords["mask"] = attn_mask
    elif is_causal:
        keywords["causal"] = True
        if q[2] != k[2]:  # a square is aligned to both corners
            keywords["offset"] = 0
    return _sdpa_op(query, key, value, **keywords)


def _sdpa_of_rank(query, key, value, attn_mask, is_causal, scale, enable_gqa):
    """The call for ranks that are not all 4: axes are added, or those before (heads, length, size) made one."""
    if min(query.ndim, key.ndim, value.ndim) < (3 if enable_gqa else 2):
        raise ValueError(f"query, key and value must have axes (..., L, E); got shapes {query.shape}, {key.shape}, {value.shape}")
    rank = max(query.ndim, key.ndim, value.ndim)
    query, key, value = (x[(None,) * max(rank - x.ndim, 4 - x.ndim)] for x in (query, key, value))
    query, key, value = _with_leads(query, key, value, enable_gqa)
    lead = query.shape[:-3]
    if attn_mask is not None and query.ndim > 4:
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2]).reshape(-1, *query.shape[-3:-1], key.shape[-2])
    query, key, value = (x.reshape(-1, *x.shape[-3:]) if x.ndim > 4 else x for x in (query, key, value))
    out = _sdpa(query, key, value, attn_mask, is_causal, scale, True)
    out = out.reshape(*lead, *out.shape[1:])
    return out[(0,) * max(4 - rank, 0)]


def _with_leads(query, key, value, enable_gqa):
    """The three with leading axes that broadcast made equal, without a copy."""
    try:
        if enable_gqa:
            lead = torch.broadcast_shapes(*(x.shape[:-3] for x in (query, key, value)))
            leads = [(*lead, x.shape[-3]) for x in (query, key, value)]
            if leads[1] != leads[2] or leads[0][-1] % max(leads[1][-1], 1):
                raise RuntimeError("heads")
        else:
            leads = [torch.broadcast_shapes(*(x.shape[:-2] for x in (query, key, value)))] * 3
    except RuntimeError as error:
        hint = "" if enable_gqa else "; heads may differ with enable_gqa=True"
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise ValueError(f"query, key and value must have leading axes that fit together; got shapes {shapes}{hint}") from error
    return [x if x.shape[:-2] == lead else x.expand(*lead, *x.shape[-2:]) for x, lead in zip((query, key, value), leads)]


# ---- In the place of torch's own ------------------------------------------------------------------------------------


class Replaced:
    """What became of the calls within :func:`replaced`.

    Attributes
    ----------
    served : int
        Calls that fastattn computed. Calls out of compiled code are not counted.
    refused : collections.Counter
        Why calls went to torch instead, and how often each.
    """

    def __init__(self):
        self.served = 0
        self.refused = collections.Counter()

    def __repr__(self):
        lines = [f"{self.served} calls served by fastattn, {self.refused.total()} left to torch"]
        return "\n".join(lines + [f"{count:6} x {reason}" for reason, count in self.refused.most_common()])


@contextlib.contextmanager
def replaced():
    """Within a ``with`` block, calls of ``torch.nn.functional.scaled_dot_product_attention`` are fastattn's.

    The name is replaced in ``torch.nn.functional`` and in every module that has imported it from there, for all threads. Calls
    that fastattn cannot serve (a gradient, another device or dtype, dropout) go to torch, with one :class:`FallbackWarning` for
    each reason. Attention that torch computes without this function (the fused path of ``nn.TransformerEncoderLayer``, for
    one) is not touched.

    Yields
    ------
    Replaced
        A report, filled as calls come: ``served``, ``refused``; it prints as a table.

    Examples
    --------
    >>> with torch.inference_mode(), fastattn.torch.replaced() as report:
    ...     model(**inputs)
    >>> print(report)
    """
    original = torch.nn.functional.scaled_dot_product_attention
    report = Replaced()

    def scaled_dot_product_attention(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):
        if _serves(query, key, value, attn_mask, dropout_p):
            if not torch.compiler.is_compiling():
                report.served += 1
            return _sdpa(query, key, value, attn_mask, is_causal, scale, enable_gqa)
        if not torch.compiler.is_compiling():
            reason = _why_not(query, key, value, attn_mask, dropout_p)
            report.refused[reason] += 1
            if report.refused[reason] == 1:
                warnings.warn(f"attention is left to torch: {reason}", FallbackWarning, stacklevel=2)
        return original(
            query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )

    places = _names_bound_to(original)
    try:
        for module, name in places:
            setattr(module, name, scaled_dot_product_attention)
        yield report
    finally:
        for module, name in places:
            setattr(module, name, original)


def _names_bound_to(function):
    """``(module, name)`` of each global through which Python code outside of torch's C++ bindings calls a function."""
    return [
        (module, name)
        for title, module in list(sys.modules.items())
        if module is not None and not title.startswith(("torch._", "torch.ops"))
        for name, value in list(getattr(module, "__dict__", {}).items())
        if value is function
    ]
