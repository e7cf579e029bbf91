"""The public operations on arrays."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from . import runtime
from ._call import NAMES, Call, Names
from ._check import (
    as_array,
    as_dense,
    as_float32,
    broadcast_mask,
    check_dtype,
    dtype_name,
    finite,
    flag,
    is_block_mask,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray
    from typing_extensions import Unpack

    from ._typing import Activation, Array, Ints, Precision, Rules, Window
    from .sparse import BlockMask

_state = runtime._state
_SDPA_NAMES = Names(q="query", k="key", v="value", mask="attn_mask")


def _directly(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, but that ordinary arguments go straight to the engine: every keyword of a signature takes time, given or not."""

    @wraps(function)
    def attention(q, k, v, **rules):
        result = _state.attention_plain(q, k, v, **rules) if rules else _state.attention_plain(q, k, v)
        return function(q, k, v, **rules) if result is None else result

    return attention


@overload
def attention(
    q: Array, k: Array, v: Array, *, return_lse: Literal[False] = False, out: Array | None = None, **rules: Unpack[Rules]
) -> NDArray[Any]: ...
@overload
def attention(
    q: Array, k: Array, v: Array, *, return_lse: Literal[True], out: Array | None = None, **rules: Unpack[Rules]
) -> tuple[NDArray[Any], NDArray[np.float32]]: ...
@overload
def attention(q: Array, k: Array, v: Array, *, return_lse: bool, out: Array | None = None, **rules: Unpack[Rules]) -> Any: ...
@_directly
def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Array | BlockMask | None = None,
    causal: bool = False,
    window: Window | None = None,
    query_offset: Ints | None = None,
    kv_lengths: Ints | None = None,
    kv_starts: Ints | None = None,
    q_lengths: Ints | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    precision: Precision = "highest",
    activation: Activation = "softmax",
    activation_bias: Array | None = None,
    power: int = 3,
    score_function: Any = None,
    invariant: bool = False,
    return_lse: bool = False,
    out: Array | None = None,
) -> Any:
    """Exact scaled-dot-product attention.

    For query row ``i`` at position ``p = i + query_offset`` and key ``j`` of one head::

        s   = scale * dot(q[i], k[j])
        s   = softcap * tanh(s / softcap)             if softcap is given
        s   = score_function(s, b, h, i, j)           if score_function is given
        s  += mask[i, j]                              if mask holds floats
        s  -= alibi_slopes[h] * abs(p - j)            if alibi_slopes is given
        out[i] = sum(softmax(s over the visible keys)[j] * v[j])

    A key is visible when every one of `kv_starts`, `kv_lengths`, `mask`, `causal` and `window` lets it be seen. Invisible keys and values
    are skipped, whatever they hold. A row that sees no key gives 0, with an lse of -inf. Logits, softmax and
    accumulation are float32 for every dtype but float64.

    With ``causal=True`` and ``Lq != Lk`` the mask is aligned to the bottom right corner: the last query sees the last key, as a
    cache of earlier keys needs it. For ``Lq = 2, Lk = 5`` and for ``Lq = 5, Lk = 2`` (1 is visible)::

        1 1 1 1 0        0 0
        1 1 1 1 1        0 0
                         0 0
                         1 0
                         1 1

    and with ``query_offset=0`` to the top left corner::

        1 0 0 0 0        1 0
        1 1 0 0 0        1 1
                         1 1
                         1 1
                         1 1

    Parameters
    ----------
    q : array_like, (B, Hq, Lq, Dk)
        Queries. All three arrays may also have rank 3, ``(H, L, D)``, or rank 2, ``(L, D)``. float32, float16 or bfloat16
        (``ml_dtypes.bfloat16``); the NumPy backend takes float64 too. Any strides; only an array that is byte-swapped,
        unaligned or not contiguous along its last axis is copied. Whatever has ``__dlpack__`` or ``__array_interface__`` on
        the CPU is taken without a copy.
    k : array_like, (B, Hkv, Lk, Dk)
        Keys. `Hq` must be a multiple of `Hkv`; query head ``h`` reads kv head ``h // (Hq // Hkv)``.
    v : array_like, (B, Hkv, Lk, Dv)
        Values, of the dtype of `k`, which may be narrower than that of `q`.
    mask : array_like or BlockMask, optional
        Broadcast to ``(B, Hq, Lq, Lk)`` without a copy. Boolean: True is visible. Floating: added to the scores, and exactly
        -inf hides a key. By NumPy's rules two axes are ``(Lq, Lk)``: a mask of padding ``(B, Lk)`` has to be given as
        ``mask[:, None, None, :]``, or, better, as `kv_lengths`.
    causal : bool
        Key ``j`` is visible when ``j <= p``.
    window : (left, right), optional
        Key ``j`` is visible when ``p - left <= j <= p + right``; None, or -1 as in flash-attn, leaves a side unbounded. A row's
        own key and the ``n - 1`` before it, the "sliding window of n" of model configurations, are ``(n - 1, 0)``.
    query_offset : int or array_like of int, (B,), optional
        The position of the first query. Default: ``kv_lengths - q_lengths``.
    kv_lengths : int or array_like of int, (B,), optional
        Only the first ``kv_lengths[b]`` keys of entry ``b`` are visible. Default: ``Lk``.
    kv_starts : int or array_like of int, (B,), optional
        And of these, the keys before ``kv_starts[b]`` are not: padding on the left. Positions still count from key 0. At most
        ``kv_lengths``. Default: 0.
    q_lengths : int or array_like of int, (B,), optional
        The query rows from ``q_lengths[b]`` on are padding: they cost nothing, and give 0 with an lse of -inf, whether there are
        sinks or not. Default: ``Lq``.
    scale : float, optional
        Any finite value. Default: ``1 / sqrt(Dk)``.
    softcap : float, optional
        Bound of the scores; None or 0 is none.
    alibi_slopes : array_like, (Hq,) or (B, Hq), optional
        Finite.
    sinks : array_like, (Hq,), optional
        One extra logit for each head, which takes part in the denominator of the softmax only; -inf is none in that head.
    precision : {"highest", "high", "medium"}
        How exactly float32 and float16 operands are multiplied: in float32, to about 16 bits, or so that the largest error is
        no larger than that of bfloat16 arithmetic. A lower setting allows a faster unit and never demands one; products of
        bfloat16 operands are exact in all three.
    activation : {"softmax", "sigmoid", "relu", "polynomial"}
        What makes a score a weight. But for the softmax a key is weighed by its own score alone, with the number of keys
        ``n = kv_lengths - kv_starts`` in the place of a denominator, so that there are neither an lse nor sinks::

            1 / (1 + exp(-(s + activation_bias)))    "sigmoid", Ramapuram et al. 2024
            max(s, 0) / n                            "relu", Wortsman et al. 2023
            s**power / sqrt(n)                       "polynomial", Saratchandran et al. 2024

        A score of -inf weighs 0.
    activation_bias : float or array_like, (B,), optional
        Of the sigmoid; finite. Default: ``-log(n)``.
    power : int
        Of the polynomial, from 1 to 64.
    score_function : C function, callable, or (C function, context), optional
        Changes the scores of a query and of keys that follow each other: a C function of the signature that ``fastattn.h`` gives
        (of ctypes, cffi, a capsule or ``numba.cfunc``), or a callable ``f(s, b, h, i, j)`` of arrays that broadcast to the shape
        of `s`, ``(rows, keys)``, which is slow. What it raises reaches the caller, and nothing is written then.
    invariant : bool
        Let the bits of a row depend on its own query, the keys that it sees, their positions and the rules, and on nothing else: all
        at once or in chunks of any size, side by side or in pages, hidden by a `mask` or left out of a BlockMask, alone or in
        company. Positions count from `kv_starts`. Each backend and each instruction set has bits of its own, as without. It takes a
        little longer, above all on the numba and numpy backends. (Activations that depend on the number of keys still do.)
    return_lse : bool
        Return also the natural logarithm of the softmax denominator.
    out : array, (B, Hq, Lq, Dv), optional
        Where to write the result: of the dtype of `q`, writable, sharing no memory with an input.

    Returns
    -------
    out : ndarray, (B, Hq, Lq, Dv)
        Of the dtype of `q`; the caller's object if `out` was given.
    lse : ndarray, (B, Hq, Lq)
        float32, only with ``return_lse=True``. Beyond the rounding of the scores its error is at most
        ``2**-22 * max(1, abs(lse))``, two units in the last place: it is relative to the lse, so that of weights
        ``exp(s - lse)`` grows with its size.

    Notes
    -----
    The result has the same bits for any number of threads, and for a batch entry alone or among others. The shape of an entry is its
    own: one with `kv_starts`, `kv_lengths` or `q_lengths` gives the bits of arrays that hold its keys and rows and nothing else, and
    takes their time.

    Ctrl-C, or another signal whose handler raises, ends a long call of the main thread after the items of work that are being
    done; then `out`, if it was given, holds anything.

    Examples
    --------
    >>> q = k = v = np.random.default_rng(0).standard_normal((1, 8, 128, 64), np.float32)
    >>> fastattn.attention(q, k, v, causal=True).shape
    (1, 8, 128, 64)
    """
    return _attend(
        NAMES, q, k, v, mask=mask, causal=causal, window=window, query_offset=query_offset, kv_lengths=kv_lengths,
        kv_starts=kv_starts, q_lengths=q_lengths, scale=scale, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks, precision=precision,
        activation=activation, activation_bias=activation_bias, power=power, score_function=score_function, invariant=invariant,
        return_lse=return_lse, out=out,
    )  # fmt: skip


def _attend(names, q, k, v, **keywords):
    """:func:`attention` with every argument checked, for a function that calls its own by these `names`."""
    backend = runtime.backend()
    call = Call(backend, q, k, v, names, **keywords)
    backend.attention(call)
    return call.result()


def scaled_dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | BlockMask | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> NDArray[Any]:
    """PyTorch's ``torch.nn.functional.scaled_dot_product_attention`` for NumPy arrays, with PyTorch's meaning.

    Parameters
    ----------
    query : array_like, (N, ..., Hq, L, E)
        At least rank 2. Leading axes broadcast among the three arrays.
    key : array_like, (N, ..., H, S, E)
    value : array_like, (N, ..., H, S, Ev)
    attn_mask : array_like or BlockMask, optional
        Broadcast to ``(N, ..., Hq, L, S)``. Boolean: True takes part. Floating: added to the scores. A BlockMask has the last
        of the leading axes as its heads and the one before as its batch.
    dropout_p : float
        Must be 0: this is inference.
    is_causal : bool
        Query ``i`` sees keys ``j <= i``: aligned to the top left corner, unlike :func:`attention`. Excludes `attn_mask`.
    scale : float, optional
        Default: ``1 / sqrt(E)``.
    enable_gqa : bool
        Let `Hq` be a multiple of the number of heads of `key` and `value`.

    Returns
    -------
    ndarray, (N, ..., Hq, L, Ev)
        Of the dtype of `query`.
    """
    if finite("dropout_p", dropout_p) != 0.0:
        raise ValueError(f"dropout_p must be 0: dropout is for training; got {dropout_p!r}")
    is_causal, enable_gqa = flag("is_causal", is_causal), flag("enable_gqa", enable_gqa)
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask must be None when is_causal is True")
    arrays = [as_array(name, x) for name, x in (("query", query), ("key", key), ("value", value))]
    for name, x in zip(("query", "key", "value"), arrays):
        if x.ndim < 2:
            raise ValueError(f"{name} must have at least 2 axes, (..., L, E); got shape {x.shape}")
    lead, (query, key, value) = _broadcast_leads(arrays, enable_gqa)
    shape = (*lead, query.shape[-2], key.shape[-2])
    of_blocks = is_block_mask(attn_mask)
    if attn_mask is not None and not of_blocks:
        attn_mask = broadcast_mask("attn_mask", as_array("attn_mask", attn_mask), shape, "(N, ..., Hq, L, S)")
    offset = 0 if is_causal and shape[-2] != shape[-1] else None  # a square is aligned to both corners
    keywords = {"causal": is_causal, "query_offset": offset, "scale": scale}
    if len(lead) <= 2:
        result = _state.attention_plain(query, key, value, mask=attn_mask, **keywords)
        return _attend(_SDPA_NAMES, query, key, value, mask=attn_mask, **keywords) if result is None else result

    # Axes before (batch, heads) cannot be merged without copying broadcast arrays, so they are walked through.
    out = np.empty((*shape[:-1], value.shape[-1]), query.dtype.newbyteorder("="))
    for index in np.ndindex(lead[:-2]):
        mask = attn_mask if attn_mask is None or of_blocks else attn_mask[index]
        _attend(_SDPA_NAMES, query[index], key[index], value[index], mask=mask, out=out[index], **keywords)
    return out


def _parts(name, value):
    try:
        return list(value)
    except TypeError as error:
        raise TypeError(f"{name} must be a sequence of arrays; got {value!r}") from error


def _broadcast_leads(arrays, enable_gqa):
    """The leading shape of the result of PyTorch's call, and `query`, `key`, `value` with leads that :func:`attention` takes."""
    leads = [x.shape[:-2] for x in arrays]
    if enable_gqa and min(map(len, leads)) < 1:
        raise ValueError(f"enable_gqa must have arrays with a heads axis; got leading shapes {leads}")
    keep = 1 if enable_gqa else 0
    try:
        lead = np.broadcast_shapes(*(shape[: len(shape) - keep] for shape in leads))
    except ValueError as error:
        hint = "" if enable_gqa else "; heads may differ with enable_gqa=True"
        raise ValueError(f"query, key and value must have leading axes that broadcast; got {leads}{hint}") from error
    if not enable_gqa:
        targets = [lead] * 3
    else:
        if leads[1][-1] != leads[2][-1]:
            raise ValueError(f"value must have the number of heads of key, {leads[1][-1]}; got {leads[2][-1]}")
        targets = [(*lead, shape[-1]) for shape in leads]
    arrays = [
        x if x.shape[:-2] == target else np.broadcast_to(x, (*target, *x.shape[-2:])) for x, target in zip(arrays, targets)
    ]
    return targets[0], arrays


def merge_states(outs: Iterable[Array], lses: Iterable[Array]) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Combine attention over disjoint sets of keys, exactly: softmax is associative in its log-sum-exp.

    ::

        lse = log(sum(exp(lse_p)))
        out = sum(exp(lse_p - lse) * out_p)

    Parameters
    ----------
    outs : sequence of array_like, each (..., Dv)
        What :func:`attention` returned for each set of keys; one shape and dtype. An array ``(P, ..., Dv)`` is such a sequence.
    lses : sequence of array_like, each (...)
        The float32 `lse` of each. Where it is -inf, a part has seen no key and contributes nothing.

    Returns
    -------
    out : ndarray, (..., Dv)
    lse : ndarray, (...)

    Examples
    --------
    >>> left = fastattn.attention(q, k[:, :, :n], v[:, :, :n], return_lse=True)
    >>> right = fastattn.attention(q, k[:, :, n:], v[:, :, n:], return_lse=True)
    >>> out, lse = fastattn.merge_states(*zip(left, right))
    """
    backend = runtime.backend()
    outs = [as_array(f"outs[{n}]", part) for n, part in enumerate(_parts("outs", outs))]
    lses = [as_float32(f"lses[{n}]", part) for n, part in enumerate(_parts("lses", lses))]
    if not outs or len(outs) != len(lses):
        raise ValueError(f"outs and lses must have the same number of parts, 1 or more; got {len(outs)} and {len(lses)}")
    first = outs[0]
    if first.ndim < 1:
        raise ValueError("outs[0] must have shape (..., Dv); got a scalar")
    check_dtype("outs[0]", first, backend)
    shape, stored = first.shape, first.dtype
    for n, (part, part_lse) in enumerate(zip(outs, lses)):
        if part.shape != shape:
            raise ValueError(f"outs[{n}] must have the shape of outs[0], {shape}; got {part.shape}")
        if part.dtype is not stored and dtype_name(part.dtype) != dtype_name(stored):
            raise TypeError(f"outs[{n}] must have the dtype of outs[0], {stored}; got {part.dtype}")
        if part_lse.shape != shape[:-1]:
            raise ValueError(f"lses[{n}] must have shape {shape[:-1]}; got {part_lse.shape}")
    dtype = stored.newbyteorder("=")
    out, lse = np.empty(shape, dtype), np.empty(shape[:-1], np.float32)
    backend.merge_states([as_dense(part, dtype) for part in outs], lses, out, lse)
    return out, lse
