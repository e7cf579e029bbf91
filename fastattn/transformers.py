"""Hugging Face transformers: ``register()``, and then ``attn_implementation="fastattn"``.

>>> fastattn.transformers.register()
>>> model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="fastattn")

transformers describes who sees whom by a function of indices, from which its own backends make a matrix of Lq x Lk. Here that function is
read instead: causal, sliding window, chunks, packed sequences and padding become the arguments of :func:`fastattn.attention`, and no
matrix is made. What models hand from layer to layer is a :class:`Visibility`, a tensor of booleans that takes no memory and becomes that
matrix only where somebody computes with it.

Made for transformers 5.4 to 5.24. What is not served goes to torch's own attention (to the model's eager one where torch's would
leave something out), with one :class:`fastattn.torch.FallbackWarning` for each reason: gradients, dropout, attention weights as
outputs, tensors elsewhere, masks of other makers.
"""

import functools
import inspect
import sys
import warnings
from typing import NamedTuple

import numpy as np
import torch
from transformers import AttentionInterface, PreTrainedModel, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from . import torch as bridge
from .varlen import attention_varlen

__all__ = ["Visibility", "register"]


def register(name="fastattn"):
    """Make fastattn known to transformers, as a value of ``attn_implementation``.

    Works for every model that asks transformers' attention interface, encoders and decoders, and so for sentence-transformers:
    ``SentenceTransformer(path, model_kwargs={"attn_implementation": "fastattn"})``.

    Parameters
    ----------
    name : str
        The name to register.

    Examples
    --------
    >>> fastattn.transformers.register()
    >>> model.set_attn_implementation("fastattn")
    """
    AttentionInterface.register(name, _forward)
    masking_utils.AttentionMaskInterface.register(name, _mask)


# ---- Who sees whom --------------------------------------------------------------------------------------------------


class Visibility(torch.Tensor):
    """A boolean mask ``(B, 1, Lq, Lk)`` that is kept as rules, and takes no memory until something is computed with it.

    Attributes
    ----------
    keywords : dict
        `causal`, `window`, `query_offset`, `kv_starts`, `kv_lengths`, and for padding with holes `mask` ``(B, 1, 1, Lk)``, for
        :func:`fastattn.torch.attention`.
    packed : list of Packed or None
        For chunked and packed sequences, one for each entry.
    q_lengths : Tensor or None
        The queries that are real, if every query is the token of a key: how many there are of each entry.
    dense : callable
        Makes the matrix.
    """

    @classmethod
    def of(cls, shape, rules, dense):
        self = torch.ones((1, 1, 1, 1), dtype=torch.bool).expand(shape).as_subclass(cls)
        self.keywords, self.packed, self.q_lengths = rules
        self.dense = functools.cache(dense)
        return self

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.contiguous, torch.Tensor.detach):
            return args[0]
        if function in _OF_THE_SHAPE:
            return super().__torch_function__(function, types, args, kwargs)

        def plain(x):
            return x.dense() if isinstance(x, Visibility) else x

        args, kwargs = torch.utils._pytree.tree_map(plain, (args, kwargs or {}))
        return function(*args, **kwargs)


# What a model may ask without an element being looked at.
_OF_THE_SHAPE = {
    torch.Tensor.shape.__get__, torch.Tensor.ndim.__get__, torch.Tensor.dtype.__get__, torch.Tensor.device.__get__,
    torch.Tensor.layout.__get__, torch.Tensor.requires_grad.__get__, torch.Tensor.is_cpu.__get__, torch.Tensor.size, torch.Tensor.dim,
    torch.Tensor.is_floating_point, torch.Tensor.numel, torch.Tensor.__len__,
}  # fmt: skip


def _mask(
    batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=masking_utils.causal_mask_function,
    attention_mask=None, **others,
):  # fmt: skip
    """transformers' mask interface."""

    def dense():
        given = {**others, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return masking_utils.sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
            mask_function=mask_function, attention_mask=attention_mask, **given,
        )  # fmt: skip

    if torch.compiler.is_compiling():
        return dense()  # what the padding is cannot be asked of a graph
    shape = batch_size, 1, q_length, kv_length
    try:
        rules = _Rules()
        rules.read(mask_function)
        return Visibility.of(shape, rules.resolve(*shape, int(q_offset), kv_offset, attention_mask), dense)
    except _NotServed as reason:
        _warn(str(reason))
        return dense()


class _NotServed(Exception):
    """Why something is left to torch."""


@functools.cache
def _warn(reason):
    warnings.warn(f"attention is left to torch: {reason}", bridge.FallbackWarning, stacklevel=3)


class Packed(NamedTuple):
    """The sequences of one entry, for :func:`fastattn.attention_varlen`."""

    keys: slice  # of the entry's keys, those that anybody sees
    cu_seqlens_q: np.ndarray
    cu_seqlens_k: np.ndarray  # from 0, within `keys`
    query_offset: np.ndarray


class _Rules:
    """What a mask function of transformers says."""

    def __init__(self):
        self.causal = False
        self.window = [None, None]
        self.chunk = self.left_padding = self.sequences = None

    def read(self, function, remapped=False):
        """Add the rules of a function, which are found by its name and in the variables that it has closed over."""
        name = getattr(function, "__qualname__", repr(function)).partition(".<locals>")[0]
        if getattr(function, "__module__", None) != masking_utils.__name__:
            raise _NotServed(f"the mask function {name} is not one of transformers' own")
        variables = {x: cell.cell_contents for x, cell in zip(function.__code__.co_freevars, function.__closure__ or ())}
        if name == "and_masks":
            for part in variables["mask_functions"]:
                self.read(part, remapped)
        elif name == "causal_mask_function":
            self.causal = True
        elif name == "sliding_window_overlay":
            self._narrow(variables["sliding_window"] - 1, None)
        elif name == "sliding_window_bidirectional_overlay":
            self._narrow(variables["sliding_window"], variables["sliding_window"])
        elif name == "chunked_overlay" and not remapped:
            self.chunk, self.left_padding = variables["chunk_size"], variables["left_padding"].tolist()
        elif name == "packed_sequence_mask_function":
            self.sequences = variables["packed_sequence_mask"]
        elif name == "remap_positions_for_packed_sequence":
            self.read(variables["mask_function"], remapped=True)  # distances within a sequence are what they were
        elif name != "bidirectional_mask_function":
            raise _NotServed(f"the mask function {name} is not served")

    def _narrow(self, *sides):
        self.window = [b if a is None else a if b is None else min(a, b) for a, b in zip(self.window, sides)]

    def resolve(self, batch, _, q_len, kv_len, q_offset, kv_offset, padding):
        """The rules of a :class:`Visibility`; positions of keys in the cache begin at `kv_offset`."""
        keywords = {"causal": self.causal, "query_offset": q_offset - kv_offset}
        if self.window != [None, None]:
            keywords["window"] = tuple(self.window)
        starts, ends = [0] * batch, [kv_len] * batch
        if padding is not None:
            seen = masking_utils.prepare_padding_mask(padding, kv_len, kv_offset)[:, kv_offset : kv_offset + kv_len]
            starts, ends = _extent(seen)
        edges = self._edges(q_len, kv_len, q_offset, kv_offset)
        if edges is not None:
            if starts is None:
                raise _NotServed("a padding mask with holes, of chunked or packed sequences")
            del keywords["query_offset"]
            packed = [_pack(*entry, q_len, q_offset, kv_offset) for entry in zip(edges, starts, ends)]
            return keywords, packed, None
        q_lengths = None
        if starts is None:
            keywords["mask"] = seen[:, None, None, :]
        else:
            if any(starts):
                keywords["kv_starts"] = torch.tensor(starts)
            if min(ends, default=kv_len) < kv_len:
                keywords["kv_lengths"] = torch.tensor(ends)
                if not self.causal and (q_len, q_offset) == (kv_len, kv_offset):
                    q_lengths = keywords["kv_lengths"]
        return keywords, None, q_lengths

    def _edges(self, q_len, kv_len, q_offset, kv_offset):
        """For each entry the positions, in the whole sequence, at which sequences or chunks begin, from the first to behind the last."""
        first, last = min(q_offset, kv_offset), max(q_offset + q_len, kv_offset + kv_len)
        if self.chunk is not None and last - min(self.left_padding, default=0) > self.chunk:
            begins = [first - (first - left) % self.chunk for left in self.left_padding]
            return [np.arange(begin, last + self.chunk, self.chunk) for begin in begins]
        if self.sequences is not None:
            numbers = self.sequences.numpy()
            changes = [np.flatnonzero(np.diff(row)) + 1 for row in numbers]
            return [q_offset + np.concatenate(([0], at, [q_len])) for at in changes]
        return None


def _pack(edges, start, end, q_len, q_offset, kv_offset):
    """The sequences of an entry which sees the keys `start` to `end`."""
    rows = np.clip(edges - q_offset, 0, q_len)
    keys = np.clip(edges - kv_offset, start, end)
    return Packed(slice(int(keys[0]), int(keys[-1])), rows, keys - keys[0], rows[:-1] + (q_offset - kv_offset) - keys[:-1])


def _extent(seen):
    """Where the run of keys that a padding mask ``(B, Lk)`` shows begins and ends in each entry; None twice where one has holes."""
    counts, starts = seen.sum(1), seen.to(torch.uint8).argmax(1)
    ends = torch.where(counts > 0, seen.shape[1] - seen.flip(1).to(torch.uint8).argmax(1), 0)
    if not torch.equal(ends - starts, counts):
        return None, None
    return starts.tolist(), ends.tolist()


# ---- Attention ------------------------------------------------------------------------------------------------------


def _forward(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, position_bias=None, softcap=None,
    s_aux=None, **others,
):  # fmt: skip
    """transformers' attention interface: ``(out, None)``, `out` (B, Lq, Hq, Dv)."""
    reason = _why_not(query, key, value, attention_mask, dropout, position_bias, s_aux, others)
    if reason is not None:
        if not torch.compiler.is_compiling():
            _warn(reason)
        given = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, "position_bias": position_bias, **others}
        return _elsewhere(module, query, key, value, attention_mask, softcap, s_aux, given)
    if query.shape[0] != key.shape[0]:  # queries that were learned, one for all
        query = query.expand(key.shape[0], -1, -1, -1)
    keywords = {"scale": scaling, "softcap": softcap, "sinks": s_aux}
    if isinstance(attention_mask, Visibility):
        keywords |= attention_mask.keywords
        if attention_mask.packed is not None:
            return _packed(query, key, value, attention_mask.packed, keywords), None
        if attention_mask.q_lengths is not None and _leaves_out_padding(type(module)):
            keywords["q_lengths"] = attention_mask.q_lengths
    elif attention_mask is not None:
        keywords["mask"] = attention_mask
    elif (getattr(module, "is_causal", True) if is_causal is None else is_causal) and query.shape[2] > 1:
        keywords |= {"causal": True, "query_offset": 0}  # without a mask the first query sees the first key
    if position_bias is not None:
        keywords["mask"] = position_bias
    return bridge.attention(query, key, value, **keywords).transpose(1, 2).contiguous(), None


def _why_not(query, key, value, attention_mask, dropout, position_bias, sinks, others):
    if others.get("output_attentions"):
        return "attention weights are asked for (output_attentions=True)"
    if position_bias is not None:
        is_rules = isinstance(attention_mask, Visibility)
        if attention_mask is not None and (not is_rules or "mask" in attention_mask.keywords or attention_mask.packed is not None):
            return "a position bias comes with a mask"
    elif attention_mask is not None and not isinstance(attention_mask, Visibility):
        if attention_mask.ndim != 4 or attention_mask.shape[-1] != key.shape[2]:
            return f"the mask has shape {tuple(attention_mask.shape)}"
    if isinstance(attention_mask, Visibility) and attention_mask.shape[2:] != (query.shape[2], key.shape[2]):
        return f"the mask is made for {tuple(attention_mask.shape[2:])} queries and keys; there are {query.shape[2]} and {key.shape[2]}"
    if query.dtype != key.dtype or not bridge._serves(query, key, value, None, dropout) or bridge._needs_gradient(sinks, position_bias):
        return bridge._why_not(query, key, value, sinks if position_bias is None else position_bias, dropout)
    return None


def _elsewhere(module, query, key, value, attention_mask, softcap, sinks, given):
    """torch's attention, or the model's own eager one for what torch's would leave out."""
    dense = attention_mask.dense() if isinstance(attention_mask, Visibility) else attention_mask
    if softcap is None and sinks is None and not given.get("output_attentions"):
        return sdpa_attention_forward(module, query, key, value, dense, **given)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise NotImplementedError(f"{type(module).__name__} has no eager attention to fall back to: set attn_implementation to another")
    if dense is not None and dense.dtype == torch.bool:
        dense = torch.where(dense, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
    given = {name: x for name, x in given.items() if name not in ("is_causal", "position_bias") or x is not None}
    if softcap is not None:
        given["softcap"] = softcap
    if sinks is not None:
        given["s_aux"] = sinks
    return eager(module, query, key, value, dense, **given)


def _packed(query, key, value, packed, keywords):
    """Attention of each sequence by itself: ``(B, Lq, Hq, Dv)``. Rows that see no key are 0."""
    bridge.prepare(query, key, value)
    keywords = {name: bridge.as_array(x) if isinstance(x, torch.Tensor) else x for name, x in keywords.items()}
    out = query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3]))
    q, k, v, o = (bridge.as_array(x) for x in (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), out))
    for b, (keys, rows, ends, offset) in enumerate(packed):
        attention_varlen(q[b], k[b, keys], v[b, keys], rows, ends, query_offset=offset, out=o[b], **keywords)
    return out


# Arguments of modules whose queries and keys are made of one and the same input.
_OF_ONE_INPUT = {
    "self", "hidden_states", "attention_mask", "cache", "past_key_values", "position_embeddings", "position_ids", "cache_position",
    "output_attentions", "kwargs",
}  # fmt: skip


@functools.cache
def _leaves_out_padding(kind):
    """Whether queries that are padding need no result in a class of modules.

    That is so where transformers' flash attention leaves them out too, as the models of the same file say, and where each query is
    the token of a key: in cross-attention padding is that of other tokens.
    """
    models = [x for x in vars(sys.modules[kind.__module__]).values() if isinstance(x, type) and issubclass(x, PreTrainedModel)]
    own = [model for model in models if model.__module__ == kind.__module__]
    of_one_input = set(inspect.signature(kind.forward).parameters) <= _OF_ONE_INPUT
    return of_one_input and bool(own) and all(model._supports_flash_attn for model in own)
