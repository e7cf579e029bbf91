"""The linear family: a state that each token decays and adds to takes the place of the softmax over all keys."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from . import runtime
from ._arrays import as_array
from ._check import check_dtype, check_out, dtype_name, finite, flag, integers, is_kernel_ready, kernel_ready

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ._typing import Array, Ints

FEATURE_MAPS = ("identity", "elu", "relu")  # in the order of the C library


def linear_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    feature_map: Literal["elu", "relu", "identity"] = "elu",
    causal: bool = True,
    normalize: bool = True,
    scale: float | None = None,
    state: Array | None = None,
    return_state: bool = False,
    kv_lengths: Ints | None = None,
    cu_seqlens: Ints | None = None,
    out: Array | None = None,
    state_out: Array | None = None,
) -> NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]:
    """Linear attention: similarity is a dot product of features, so that keys and values can be summed up once and for all.

    For token ``t`` of one head, with ``x = phi(k[t])`` and ``y = scale * phi(q[t])``::

        S = S + outer(x, v[t])
        z = z + x
        out[t] = (y @ S) / (y @ z)           without normalize  y @ S;  0 where y @ z is 0

    Work is proportional to the length of the sequence. Without `causal` the state of the whole sequence answers every query, and there
    may be more or fewer of them than keys.

    Parameters
    ----------
    q : array_like, (B, Hq, L, Dk)
        Queries. All arrays may also have one axis less, ``(H, L, D)``, or two, ``(L, D)``. float32, float16 or bfloat16
        (``ml_dtypes.bfloat16``); the NumPy backend takes float64 too. Any strides, as for :func:`attention`.
    k : array_like, (B, Hk, L, Dk)
    v : array_like, (B, Hv, L, Dv)
        Keys and values, of one dtype, which may be narrower than that of `q`. There are ``Hs = max(Hk, Hv)`` states and
        ``Ho = max(Hq, Hs)`` heads of the result; the smaller numbers of heads must divide the larger, and head ``h`` of ``n`` belongs to
        head ``h * m // n`` of ``m``. So queries may share states (grouped-query attention), or values keys.
    feature_map : {"elu", "relu", "identity"}
        ``phi``: ``elu(x) + 1`` (``x + 1`` above 0, else ``exp(x)``), ``max(x, 0)``, or ``x``.
    causal : bool
        Token ``t`` is answered by the tokens up to its own; else by all.
    normalize : bool
        Divide by the sum of the similarities.
    scale : float, optional
        Multiplies the features of the queries, so that it cancels where sums are normalised. Default: 1.
    state : array_like, (B, Hs, Dk, Dv), optional
        What earlier tokens have left, as an earlier call returned it: float32, or float64 with float64 inputs. With `normalize` there is
        one more column, ``(B, Hs, Dk, Dv + 1)``, which holds ``z``. Default: zeros.
    return_state : bool
        Return also the state after the last token. A sequence may be cut anywhere: what the parts give, each with the state of the one
        before, is what the whole would give, but for rounding.
    kv_lengths : int or array_like of int, (B,), optional
        Tokens from there on are padding: they are not read, and if `causal` their outputs are 0.
    cu_seqlens : array_like of int, (N + 1,), optional
        Sequences packed one behind the other, from ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``: arrays are ``(total, H, D)`` as for
        packed attention, and the states are ``(N, Hs, Dk, Dv)``.
    out : array, (B, Ho, L, Dv), optional
        Where to write the result: of the dtype of `q`, writable, sharing no memory with an input.
    state_out : array, optional
        Where to write the new state: float32, C-contiguous along its last axis. It may be `state` itself, which is then updated in place.

    Returns
    -------
    out : ndarray, (B, Ho, L, Dv)
        Of the dtype of `q`; the caller's object if `out` was given.
    state : ndarray, (B, Hs, Dk, Dv)
        Only with ``return_state=True``; the caller's object if `state_out` was given.

    Notes
    -----
    State, products and sums are float32 whatever the storage type. The result has the same bits for any number of threads. NaN or inf
    of a token reaches its own and later outputs, never earlier ones.

    Katharopoulos, Vyas, Pappas and Fleuret, "Transformers are RNNs", 2020.

    Examples
    --------
    A prompt at once, then token by token:

    >>> out, state = fastattn.linear_attention(q, k, v, return_state=True)
    >>> out, state = fastattn.linear_attention(q1, k1, v1, state=state, return_state=True, state_out=state)
    """
    return _compute(
        q, k, v, default_scale=1.0, scale=scale, feature_map=feature_map, causal=causal, normalize=normalize, state=state,
        return_state=return_state, kv_lengths=kv_lengths, cu_seqlens=cu_seqlens, out=out, state_out=state_out,
    )  # fmt: skip


def gated_linear_attention(
    q: Array,
    k: Array,
    v: Array,
    decay: Array | None = None,
    *,
    log_decay: Array | None = None,
    scale: float | None = None,
    state: Array | None = None,
    return_state: bool = False,
    kv_lengths: Ints | None = None,
    cu_seqlens: Ints | None = None,
    out: Array | None = None,
    state_out: Array | None = None,
) -> NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]:
    """Linear attention that forgets: RetNet, Mamba-2 and GLA.

    For token ``t`` of one head, with ``a = decay[t]``, a number or one for each row of the state::

        S = a * S + outer(k[t], v[t])
        out[t] = scale * q[t] @ S

    Parameters
    ----------
    q, k, v
        As for :func:`linear_attention`.
    decay : array_like, (B, Hs, L) or (B, Hs, L, Dk)
        Factors from 0 to 1: one for each token and head (RetNet, whose factors are the same for all tokens; Mamba-2), or one for each
        row of the state as well (GLA). Axes of length 1 are broadcast. Packed: ``(total, Hs)`` or ``(total, Hs, Dk)``.
    log_decay : array_like
        In place of `decay`, its natural logarithm, at most 0; -inf forgets everything.
    scale : float, optional
        Default: ``1 / sqrt(Dk)``.
    state, return_state, kv_lengths, cu_seqlens, out, state_out
        As for :func:`linear_attention` without `normalize`.

    Returns
    -------
    out : ndarray, (B, Ho, L, Dv)
    state : ndarray, (B, Hs, Dk, Dv)
        Only with ``return_state=True``.

    Notes
    -----
    A decay from one token to another is formed as the product of the factors between them: nothing is divided by a product that may
    vanish, and factors of 0 are as good as any.

    Sun et al., "Retentive network", 2023; Yang et al., "Gated linear attention transformers with hardware-efficient training", 2023;
    Dao and Gu, "Transformers are SSMs", 2024.

    Examples
    --------
    >>> retention = np.broadcast_to(1 - 2.0 ** -np.arange(5, 5 + heads)[:, None], (batch, heads, length))
    >>> out = fastattn.gated_linear_attention(q, k, v, retention)
    """
    if (decay is None) == (log_decay is None):
        raise TypeError("gated_linear_attention() must have decay or log_decay, and not both")
    return _compute(
        q, k, v, decay=decay, log_decay=log_decay, scale=scale, state=state, return_state=return_state, kv_lengths=kv_lengths,
        cu_seqlens=cu_seqlens, out=out, state_out=state_out,
    )  # fmt: skip


def gated_delta_rule(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    decay: Array | None = None,
    *,
    log_decay: Array | None = None,
    scale: float | None = None,
    state: Array | None = None,
    return_state: bool = False,
    kv_lengths: Ints | None = None,
    cu_seqlens: Ints | None = None,
    out: Array | None = None,
    state_out: Array | None = None,
) -> NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]:
    """The delta rule: a token replaces what the state holds for its key, in part. DeltaNet, Gated DeltaNet and Kimi Delta Attention.

    For token ``t`` of one head, with ``a = decay[t]``, a number or one for each row of the state::

        S = a * S
        S = S + outer(k[t], beta[t] * (v[t] - k[t] @ S))
        out[t] = scale * q[t] @ S

    Keys should have a Euclidean norm of 1, and beta lie between 0 and 1 (or 2): else the state may grow without bound.

    Parameters
    ----------
    q, k, v
        As for :func:`linear_attention`.
    beta : array_like, (B, Hs, L)
        How much of the old value is replaced. Axes of length 1 are broadcast. Packed: ``(total, Hs)``.
    decay, log_decay : array_like, (B, Hs, L) or (B, Hs, L, Dk), optional
        As for :func:`gated_linear_attention`; one of them (Gated DeltaNet; with a factor for each row Kimi Delta Attention) or neither
        (DeltaNet).
    scale : float, optional
        Default: ``1 / sqrt(Dk)``.
    state, return_state, kv_lengths, cu_seqlens, out, state_out
        As for :func:`linear_attention` without `normalize`.

    Returns
    -------
    out : ndarray, (B, Ho, L, Dv)
    state : ndarray, (B, Hs, Dk, Dv)
        Only with ``return_state=True``.

    Notes
    -----
    Within a chunk of tokens the corrections are the solution of a unit lower triangular system, found by substitution.

    Yang et al., "Parallelizing linear transformers with the delta rule over sequence length", 2024, and "Gated delta networks", 2024;
    Kimi Team, "Kimi Linear", 2025.

    Examples
    --------
    >>> k /= np.linalg.norm(k, axis=-1, keepdims=True)
    >>> out, state = fastattn.gated_delta_rule(q, k, v, beta, log_decay=g, return_state=True)
    """
    if decay is not None and log_decay is not None:
        raise TypeError("gated_delta_rule() must not have both decay and log_decay")
    if beta is None:
        raise TypeError("beta must be an array; got None")
    return _compute(
        q, k, v, beta=beta, decay=decay, log_decay=log_decay, scale=scale, state=state, return_state=return_state,
        kv_lengths=kv_lengths, cu_seqlens=cu_seqlens, out=out, state_out=state_out,
    )  # fmt: skip


def causal_conv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    activation: Literal["silu"] | None = None,
    state: Array | None = None,
    return_state: bool = False,
) -> NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]:
    """A causal convolution along the last axis, each channel with its own kernel: what stands before the linear layers of hybrid models.

    ::

        out[b, c, t] = activation(bias[c] + sum over i of weight[c, i] * x[b, c, t - (K - 1) + i])

    Parameters
    ----------
    x : array_like, (B, C, L)
        float32, float16, bfloat16 or float64.
    weight : array_like, (C, K)
        The last weight is that of the token itself. ``(C, 1, K)`` is accepted too.
    bias : array_like, (C,), optional
    activation : {"silu"}, optional
        ``y / (1 + exp(-y))``
    state : array_like, (B, C, K - 1), optional
        The tokens before the first one. Default: zeros.
    return_state : bool
        Return also the last ``K - 1`` tokens, for the next call.

    Returns
    -------
    out : ndarray, (B, C, L)
        Of the dtype of `x`; sums are float32, of float64 in float64.
    state : ndarray, (B, C, K - 1)
        Of the dtype of `x`; only with ``return_state=True``.

    Notes
    -----
    Computed with NumPy on every backend. Dao and Gu, "Transformers are SSMs", 2024; the operator ``CausalConvWithState`` of ONNX.
    """
    x, weight = as_array("x", x), as_array("weight", weight)
    if x.ndim != 3:
        raise ValueError(f"x must have shape (B, C, L); got {x.shape}")
    batch, channels, length = x.shape
    if dtype_name(x.dtype) not in ("float16", "bfloat16", "float32", "float64"):
        raise TypeError(f"x must be bfloat16, float16, float32 or float64; got {x.dtype}")
    if weight.ndim == 3 and weight.shape[1] == 1:
        weight = weight[:, 0]
    if weight.ndim != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise ValueError(f"weight must have shape ({channels}, K) with K at least 1; got {weight.shape}")
    if activation not in (None, "silu"):
        raise ValueError(f'activation must be None or "silu"; got {activation!r}')
    kernel = weight.shape[1]
    dtype = np.dtype(np.float64 if dtype_name(x.dtype) == "float64" else np.float32)
    padded = np.zeros((batch, channels, kernel - 1 + length), x.dtype.newbyteorder("="))
    padded[..., kernel - 1 :] = x
    if state is not None:
        state = as_array("state", state)
        if state.shape != (batch, channels, kernel - 1):
            raise ValueError(f"state must have shape {(batch, channels, kernel - 1)}; got {state.shape}")
        padded[..., : kernel - 1] = state
    total = np.zeros((batch, channels, length), dtype)
    if bias is not None:
        bias = as_array("bias", bias)
        if bias.shape != (channels,):
            raise ValueError(f"bias must have shape ({channels},); got {bias.shape}")
        total += bias.astype(dtype)[:, None]
    with np.errstate(all="ignore"):
        for i in range(kernel):
            total += weight[:, i, None].astype(dtype) * padded[..., i : i + length].astype(dtype)
        if activation == "silu":
            total /= 1 + np.exp(-total)
        out = total.astype(padded.dtype)
    return (out, padded[..., length:].copy()) if flag("return_state", return_state) else out


def _compute(q, k, v, **keywords):
    result = runtime._state.linear_plain(q, k, v, **keywords)
    if result is not None:
        return result
    backend = runtime.backend()
    call = LinearCall(backend, q, k, v, **keywords)
    backend.linear_attention(call)
    return call.result()


class LinearCall:
    """One call of the family, validated and normalised: what every backend receives.

    Attributes
    ----------
    q, k, v, out : ndarray
        ``(B, H, L, D)``, or ``(1, H, total, D)`` of packed sequences; as in :class:`fastattn._call.Call`.
    decay : ndarray or None
        ``(B, Hs, L)`` or ``(B, Hs, L, Dk)``: factors or, with `decay_log`, logarithms.
    beta : ndarray or None
        ``(B, Hs, L)``; its absence means no delta rule.
    state, new_state : ndarray or None
        ``(N, Hs, Dk, Dv)``, with one more column if `normalize`; float32, or float64 with float64 inputs.
    scale : float
    feature_map : int
        Index into `FEATURE_MAPS`.
    normalize, causal, decay_log : bool
    lengths : ndarray
        ``(N,)`` int64: how many tokens of each sequence are real.
    cu_seqlens : ndarray or None
        ``(N + 1,)`` int64.
    """

    def __init__(
        self, backend, q, k, v, *, beta=None, decay=None, log_decay=None, default_scale=None, scale=None, feature_map="identity",
        causal=True, normalize=False, state=None, return_state=False, kv_lengths=None, cu_seqlens=None, out=None, state_out=None,
    ):  # fmt: skip
        given = {"q": as_array("q", q), "k": as_array("k", k), "v": as_array("v", v)}
        self._packed = cu_seqlens is not None
        self._take_qkv(given, backend)
        batch, _, kv_len, head_dim = self.k.shape
        if not isinstance(feature_map, str) or feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map must be one of {FEATURE_MAPS}; got {feature_map!r}")
        self.feature_map = FEATURE_MAPS.index(feature_map)
        self.causal, self.normalize = flag("causal", causal), flag("normalize", normalize)
        q_len = self.q.shape[2]
        if (self.causal or self._packed) and q_len != kv_len:
            raise ValueError(f"k must have the length of q, {q_len}, if causal or with cu_seqlens; got shape {given['k'].shape}")
        if scale is None:
            self.scale = default_scale or 1.0 / math.sqrt(max(head_dim, 1))
        else:
            self.scale = finite("scale", scale)
        self._take_lengths(batch, kv_len, kv_lengths, cu_seqlens)

        self.decay_log = log_decay is not None
        self._decay_name = "log_decay" if self.decay_log else "decay"
        gates = log_decay if self.decay_log else decay
        self.decay = None if gates is None else self._take_gates(self._decay_name, gates, given, backend, head_dim)
        self.beta = None if beta is None else self._take_gates("beta", beta, given, backend, None)

        self._returns_state = flag("return_state", return_state)
        self._take_states(state, state_out, given)
        self._take_out(out, given)

    def _lift(self, array):
        """`array` with the axes (B, H, L, ...), whatever it has come with."""
        if self._packed:
            return array.swapaxes(0, 1)[None]
        return array[(None,) * self._missing] if self._missing else array

    def _lower(self, array):
        """The reverse of `_lift`, for results."""
        if self._packed:
            return array[0].swapaxes(0, 1)
        return array[(0,) * self._missing] if self._missing else array

    def _take_qkv(self, given, backend):
        q, k, v = given.values()
        if self._packed and q.ndim != 3:
            raise ValueError(f"q must have shape (total, H, D) with cu_seqlens; got {q.shape}")
        if q.ndim not in (2, 3, 4):
            raise ValueError(f"q must have shape (B, H, L, D), (H, L, D) or (L, D); got {q.shape}")
        for name in ("k", "v"):
            if given[name].ndim != q.ndim:
                raise ValueError(f"{name} must have as many axes as q, {q.ndim}; got shape {given[name].shape}")
        for name, array in given.items():
            check_dtype(name, array, backend)
        if dtype_name(v.dtype) != dtype_name(k.dtype):
            raise TypeError(f"v must have the dtype of k, {k.dtype}; got {v.dtype}")
        if dtype_name(q.dtype) != dtype_name(k.dtype) and q.itemsize <= k.itemsize:
            raise TypeError(f"q must have the dtype of k and v, {k.dtype}, or a wider one; got {q.dtype}")
        self._missing = 4 - q.ndim
        self.q, self.k, self.v = (self._lift(kernel_ready(array)) for array in given.values())
        self.dtype = np.dtype(np.float32) if self.q.itemsize <= 4 else self.q.dtype  # of the state
        batch, q_heads, _, head_dim = self.q.shape
        if self.k.shape[0] != batch:
            raise ValueError(f"k must have the batch size of q, {batch}; got shape {k.shape}")
        if self.k.shape[3] != head_dim:
            raise ValueError(f"k must have the head size of q, {head_dim}; got shape {k.shape}")
        if (self.v.shape[0], self.v.shape[2]) != (batch, self.k.shape[2]):
            raise ValueError(f"v must have the batch size and the length of k, {(batch, self.k.shape[2])}; got shape {v.shape}")
        k_heads, v_heads = self.k.shape[1], self.v.shape[1]
        self.states = max(k_heads, v_heads)
        self.heads = max(q_heads, self.states)
        alike = k_heads == v_heads == q_heads
        for name, heads, whole in () if alike else (("k", k_heads, self.states), ("v", v_heads, self.states), ("q", q_heads, self.heads),
                                                    ("k and v", self.states, self.heads)):  # fmt: skip
            if whole and (not heads or whole % heads):
                raise ValueError(f"{name} must have a number of heads that divides {whole}; got {heads}")

    def _take_lengths(self, batch, kv_len, kv_lengths, cu_seqlens):
        self.cu_seqlens = None
        most = np.full(batch, kv_len, np.int64)
        if self._packed:
            array = np.array(as_array("cu_seqlens", cu_seqlens))
            if array.dtype.kind not in "iu":
                raise TypeError(f"cu_seqlens must hold ints; got {array.dtype}")
            if array.ndim != 1 or not array.size:
                raise ValueError(f"cu_seqlens must have shape (N + 1,); got {array.shape}")
            array = self.cu_seqlens = array.astype(np.int64)
            most = np.diff(array)
            if array[0] != 0 or array[-1] != kv_len or (most < 0).any():
                raise ValueError(f"cu_seqlens must go from 0 to the number of tokens, {kv_len}, without decreasing; got {cu_seqlens!r}")
        self.lengths = most
        if kv_lengths is not None:
            self.lengths = integers("kv_lengths", kv_lengths, most.size, 0, kv_len)
            if (self.lengths > most).any():
                raise ValueError(f"kv_lengths must not exceed the lengths of the sequences, {most}; got {kv_lengths!r}")

    def _take_gates(self, name, value, given, backend, head_dim):
        """Decays, which may have a factor for each of `head_dim` rows, or betas: broadcast, in a dtype that the backend reads."""
        array = given[name] = as_array(name, value)
        if array.dtype.kind not in "fiu" and dtype_name(array.dtype) != "bfloat16":
            raise TypeError(f"{name} must hold real numbers; got {array.dtype}")
        if dtype_name(array.dtype) not in backend.dtypes:
            array = array.astype(np.float32)
        axes = given["q"].ndim - 1
        batch, _, kv_len, _ = self.k.shape
        shape = (batch, self.states, kv_len)
        if array.ndim not in (axes, axes + (head_dim is not None)):
            raise ValueError(f"{name} must have shape {self._gates_shown(head_dim)}; got {array.shape}")
        if array.ndim == axes + 1 and array.shape[-1] == 1:
            array = array[..., 0]  # one factor for all rows
        ready = array.flags.aligned and array.dtype.isnative
        if array.ndim == axes + 1:
            array, shape = kernel_ready(array), (*shape, head_dim)
        elif not ready:
            array = np.array(array, dtype=array.dtype.newbyteorder("="), subok=False)
        array = self._lift(array)
        if array.shape == shape:
            return array
        try:
            return np.broadcast_to(array, shape)
        except ValueError as error:
            raise ValueError(f"{name} must have shape {self._gates_shown(head_dim)}; got {given[name].shape}") from error

    def _gates_shown(self, head_dim):
        """The shapes of gates, for messages."""
        batch, _, kv_len, _ = self.k.shape
        shown = str((kv_len, self.states) if self._packed else (batch, self.states, kv_len)[self._missing :])
        return shown if head_dim is None else f"{shown} or {shown[:-1]}, {head_dim})"

    def _take_states(self, state, state_out, given):
        count = self.lengths.size if self._packed else self.q.shape[0]
        shape = (count, self.states, self.k.shape[3], self.v.shape[3] + self.normalize)
        missing = 0 if self._packed else self._missing
        self.state = self.new_state = self._given_state = None
        if state is not None:
            array = given["state"] = as_array("state", state)
            if array.dtype.kind not in "fiu" and dtype_name(array.dtype) != "bfloat16":
                raise TypeError(f"state must hold real numbers; got {array.dtype}")
            if array.shape != shape[missing:]:
                hint = "; with normalize the last column holds the sums of the keys" if self.normalize else ""
                raise ValueError(f"state must have shape {shape[missing:]}; got {array.shape}{hint}")
            array = array if array.dtype == self.dtype else array.astype(self.dtype)
            self.state = kernel_ready(array)[(None,) * missing]
        if state_out is None:
            if self._returns_state:
                self.new_state = np.empty(shape, self.dtype)
            return
        same = isinstance(state_out, np.ndarray) and isinstance(state, np.ndarray) and (
            state_out.__array_interface__["data"] == state.__array_interface__["data"] and state_out.strides == state.strides
        )  # fmt: skip
        others = [(name, array) for name, array in given.items() if not (same and name == "state")]
        array = check_out(state_out, shape[missing:], self.dtype, others, "states", "state_out")
        if not is_kernel_ready(array):
            raise ValueError(f"state_out must be aligned and contiguous along its last axis; got strides {array.strides}")
        given["state_out"] = array
        self._given_state = state_out
        self.new_state = array[(None,) * missing]

    def _take_out(self, out, given):
        shape = (self.q.shape[0], self.heads, self.q.shape[2], self.v.shape[3])
        self._given_out, self._copy_to = out, None
        if out is None:
            if self._packed:  # the caller's order is the one in memory
                self.out = np.empty((shape[2], shape[1], shape[3]), self.q.dtype).swapaxes(0, 1)[None]
            else:
                self.out = np.empty(shape, self.q.dtype)
            return
        lowered = (shape[2], shape[1], shape[3]) if self._packed else shape[self._missing :]
        target = check_out(out, lowered, self.q.dtype, given.items())
        ready = is_kernel_ready(target)
        target = self._lift(target)
        self.out = target if ready else np.empty(shape, self.q.dtype)
        self._copy_to = None if ready else target

    def sequences(self):
        """Yield ``(n, b, first, rows, real)`` for each sequence: its number, batch entry, first row, rows, and how many are real."""
        for n, real in enumerate(self.lengths.tolist()):
            if self._packed:
                first, end = self.cu_seqlens[n : n + 2].tolist()
                yield n, 0, first, end - first, real
            else:
                yield n, n, 0, self.k.shape[2], real

    def check_decay(self):
        """Raise unless the decays of all real tokens are what they must be. NaN passes, and will be seen in the result."""
        if self.decay is None:
            return
        low, high = (-np.inf, 0.0) if self.decay_log else (0.0, 1.0)
        for _, b, first, _, real in self.sequences():
            part = self.decay[b, :, first : first + real]
            if part.size and not (np.fmin.reduce(part, axis=None) >= low or np.isnan(part).all()):
                self._refuse_decay(np.fmin.reduce(part, axis=None))
            if part.size and np.fmax.reduce(part, axis=None) > high:
                self._refuse_decay(np.fmax.reduce(part, axis=None))

    def _refuse_decay(self, found):
        wanted = "be at most 0: it is a logarithm" if self.decay_log else "lie between 0 and 1; log_decay takes logarithms"
        raise ValueError(f"{self._decay_name} must {wanted}; got {found}")

    def result(self):
        """What the caller is given once the backend has filled `out` and `new_state`."""
        if self._copy_to is not None:
            self._copy_to[...] = self.out
        out = self._lower(self.out) if self._given_out is None else self._given_out
        if not self._returns_state:
            return out
        if self._given_state is not None:
            return out, self._given_state
        return out, self.new_state[(0,) * (0 if self._packed else self._missing)]
