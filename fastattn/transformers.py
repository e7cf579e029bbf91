"""Hugging Face transformers: ``register()``, and then ``attn_implementation="fastattn"``.

>>> fastattn.transformers.register()
>>> model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="fastattn")

transformers describes who sees whom by a function of indices, from which its own backends make a matrix of Lq x Lk. Here that function is
read instead: causal, sliding window, chunks, packed sequences and padding become the arguments of :func:`fastattn.attention`, and no
matrix is made. What models hand from layer to layer is a :class:`Visibility`, a tensor of booleans that takes no memory and becomes that
matrix only where somebody computes with it. In a graph of ``torch.compile`` or ``torch.export``, where the values of padding cannot be
looked at, it is a :class:`Traced` mask, whose rules become an operator's arguments and are resolved when the graph runs.

Made for transformers 5.20 to 5.24. What is not served goes to torch's own attention (to the model's eager one where torch's would
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
from .attention import attention
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
    for factory in _FACTORIES:
        function = getattr(masking_utils, factory, None)
        if function is not None and not hasattr(function, "__wrapped__"):
            setattr(masking_utils, factory, _noted(function))
    AttentionInterface.register(name, _forward)
    masking_utils.AttentionMaskInterface.register(name, _mask)


# ---- Who sees whom --------------------------------------------------------------------------------------------------


class Visibility(torch.Tensor):
    """A boolean mask ``(B, 1, Lq, Lk)`` that is kept as rules, and takes no memory until something is computed with it.

    Attributes
    ----------
    described : Described
        Who sees whom, as the graph of a compiled layer reads it.
    resolved : Resolved
        The same in numbers.
    dense : callable
        Makes the matrix.
    """

    @classmethod
    def of(cls, shape, described, dense):
        self = torch.ones((1, 1, 1, 1), dtype=torch.bool).expand(shape).as_subclass(cls)
        self.described, self.resolved = described, described.resolve(shape)
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


# What a model, or a tracer, may ask without an element being looked at.
_ATTRIBUTES = (
    "shape", "ndim", "dtype", "device", "layout", "requires_grad", "grad", "is_leaf", "is_cpu", "is_nested", "is_quantized", "is_sparse",
    "is_mkldnn", "_base",
)  # fmt: skip
_METHODS = (
    "size", "dim", "numel", "__len__", "stride", "storage_offset", "untyped_storage", "is_floating_point", "is_conj", "is_neg", "_is_view",
)  # fmt: skip
_OF_THE_SHAPE = {getattr(torch.Tensor, x).__get__ for x in _ATTRIBUTES} | {getattr(torch.Tensor, x) for x in _METHODS}


class Traced:
    """The same in a graph that is being traced: no tensor, and a matrix in the graph only where something is computed with it.

    Attributes
    ----------
    shape, dtype, ndim
        Those of the matrix.
    described : Described
        Who sees whom.
    dense : callable
        Makes the matrix.
    """

    dtype, ndim = torch.bool, 4

    def __init__(self, shape, described, dense):
        self.shape, self.described, self.dense = shape, described, dense

    def __getattr__(self, name):
        return getattr(self.dense(), name)

    def __getitem__(self, index):
        return self.dense()[index]

    def __and__(self, other):
        return self.dense() & other

    def __or__(self, other):
        return self.dense() | other

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        args, kwargs = torch.utils._pytree.tree_map(lambda x: x.dense() if isinstance(x, Traced) else x, (args, kwargs or {}))
        return function(*args, **kwargs)


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

    shape = batch_size, 1, q_length, kv_length
    kind = Traced if torch.compiler.is_compiling() else Visibility.of
    rules = _Rules()
    reason = rules.read(mask_function)
    if reason is not None:
        if kind is not Traced:
            _warn(reason)
        return dense()
    seen = extent = None
    if attention_mask is not None:
        seen = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)[:, kv_offset : kv_offset + kv_length]
        extent = _extent(seen)
    return kind(shape, Described(rules, q_offset, kv_offset, seen, extent), dense)


# What makes the mask functions that are read.
_FACTORIES = (
    "and_masks", "sliding_window_overlay", "sliding_window_bidirectional_overlay", "chunked_overlay", "packed_sequence_mask_function",
    "remap_positions_for_packed_sequence",
)  # fmt: skip


def _noted(factory):
    """A factory of mask functions which notes on them what they were made of: tracers do not look into closures."""

    name, names = factory.__name__, factory.__code__.co_varnames

    @functools.wraps(factory)
    def noted(*args):
        function = factory(*args)
        function.made_of = name, {"mask_functions": args} if name == "and_masks" else dict(zip(names, args))
        return function

    return noted


def _made_of(function):
    """The name of a mask function, and the variables that it has closed over."""
    for plain in (masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function):
        if function is plain:
            return plain.__name__, {}
    if hasattr(function, "made_of"):
        return function.made_of
    if torch.compiler.is_compiling():
        return "", {}
    name = getattr(function, "__qualname__", repr(function)).partition(".<locals>")[0]
    if getattr(function, "__module__", None) != masking_utils.__name__:
        return f"{name}, which is not one of transformers' own,", {}
    return name, {x: cell.cell_contents for x, cell in zip(function.__code__.co_freevars, function.__closure__ or ())}


@functools.cache
def _warn(reason):
    warnings.warn(f"attention is left to torch: {reason}", bridge.FallbackWarning, stacklevel=3)


class Packed(NamedTuple):
    """The sequences of one entry, for :func:`fastattn.attention_varlen`."""

    keys: slice  # of the entry's keys, those that anybody sees
    cu_seqlens_q: np.ndarray
    cu_seqlens_k: np.ndarray  # from 0, within `keys`
    query_offset: np.ndarray


class Resolved(NamedTuple):
    """Who sees whom, in numbers."""

    keywords: dict  # of fastattn.torch.attention: causal, window, query_offset, kv_starts, kv_lengths; mask (B, 1, 1, Lk) if it has holes
    packed: list | None = None  # of Packed, for each entry, if there are chunked or packed sequences
    q_lengths: torch.Tensor | None = None  # how many queries of each entry are real, if every query is the token of a key


class _Rules:
    """What a mask function of transformers says."""

    def __init__(self, causal=False, window=(None, None), chunk=None, left_padding=None, sequences=None):
        self.causal, self.window = causal, window
        self.chunk, self.left_padding, self.sequences = chunk, left_padding, sequences

    def read(self, function, remapped=False):
        """Add the rules of a function, or return why they are not served."""
        name, variables = _made_of(function)
        if name == "and_masks":
            for part in variables["mask_functions"]:
                reason = self.read(part, remapped)
                if reason is not None:
                    return reason
        elif name == "causal_mask_function":
            self.causal = True
        elif name == "sliding_window_overlay":
            self._narrow(variables["sliding_window"] - 1, None)
        elif name == "sliding_window_bidirectional_overlay":
            self._narrow(variables["sliding_window"], variables["sliding_window"])
        elif name == "chunked_overlay" and not remapped:
            self.chunk, self.left_padding = variables["chunk_size"], variables["left_padding"]
        elif name == "packed_sequence_mask_function":
            self.sequences = variables["packed_sequence_mask"]
        elif name == "remap_positions_for_packed_sequence":
            return self.read(variables["mask_function"], remapped=True)  # distances within a sequence are what they were
        elif name != "bidirectional_mask_function":
            return f"the mask function {name} is not served"
        return None

    def _narrow(self, *sides):
        self.window = tuple(b if a is None else a if b is None else min(a, b) for a, b in zip(self.window, sides))


class Described(NamedTuple):
    """Who sees whom, with tensors whose values have not been looked at."""

    rules: _Rules
    q_offset: int | torch.Tensor  # position of the first query
    kv_offset: int  # and of the first key
    seen: torch.Tensor | None  # (B, Lk), the padding mask
    extent: torch.Tensor | None  # what `_extent` finds in it

    def resolve(self, shape):
        """The same in numbers, for a mask of a shape."""
        rules, q_offset, kv_offset, seen, extent = self
        batch, _, q_len, kv_len = shape
        q_offset = int(q_offset)
        keywords = {"causal": rules.causal, "query_offset": q_offset - kv_offset}
        if rules.window != (None, None):
            keywords["window"] = rules.window
        starts, ends = ([0] * batch, [kv_len] * batch) if seen is None else extent.tolist()
        if -1 in ends:
            keywords["mask"] = seen[:, None, None, :]
            starts, ends = [0] * batch, [kv_len] * batch
        edges = self._edges(q_len, kv_len, q_offset)
        if edges is not None:
            del keywords["query_offset"]
            return Resolved(keywords, [_pack(*entry, q_len, q_offset, kv_offset) for entry in zip(edges, starts, ends)])
        q_lengths = None
        if any(starts):
            keywords["kv_starts"] = torch.tensor(starts)
        if min(ends, default=kv_len) < kv_len:
            keywords["kv_lengths"] = torch.tensor(ends)
            if not rules.causal and (q_len, q_offset) == (kv_len, kv_offset):
                q_lengths = keywords["kv_lengths"]
        return Resolved(keywords, None, q_lengths)

    def _edges(self, q_len, kv_len, q_offset):
        """For each entry the positions, in the whole sequence, at which sequences or chunks begin, from the first to behind the last."""
        rules, kv_offset = self.rules, self.kv_offset
        first, last = min(q_offset, kv_offset), max(q_offset + q_len, kv_offset + kv_len)
        if rules.chunk is not None:
            left_padding = rules.left_padding.tolist()
            if last - min(left_padding, default=0) > rules.chunk:
                begins = [first - (first - left) % rules.chunk for left in left_padding]
                return [np.arange(begin, last + rules.chunk, rules.chunk) for begin in begins]
        if rules.sequences is not None:
            changes = np.diff(rules.sequences.numpy()) != 0
            if changes.any():
                return [q_offset + np.concatenate(([0], np.flatnonzero(row) + 1, [q_len])) for row in changes]
        return None


def _pack(edges, start, end, q_len, q_offset, kv_offset):
    """The sequences of an entry which sees the keys `start` to `end`."""
    rows = np.clip(edges - q_offset, 0, q_len)
    keys = np.clip(edges - kv_offset, start, end)
    return Packed(slice(int(keys[0]), int(keys[-1])), rows, keys - keys[0], rows[:-1] + (q_offset - kv_offset) - keys[:-1])


def _extent(seen):
    """Where the keys that a padding mask ``(B, Lk)`` shows begin and end in each entry, ``(2, B)``; -1 everywhere if one has holes."""
    counts, starts = seen.sum(1), seen.to(torch.uint8).argmax(1)
    ends = torch.where(counts > 0, seen.shape[1] - seen.flip(1).to(torch.uint8).argmax(1), 0)
    return torch.where((ends - starts == counts).all(), torch.stack((starts, ends)), -1)


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
    if position_bias is not None:
        keywords["mask"] = position_bias
    if isinstance(attention_mask, (Visibility, Traced)):
        leaves_out_padding = _leaves_out_padding(type(module))
        if torch.compiler.is_compiling():
            return _attend_described(query, key, value, attention_mask.described, leaves_out_padding, keywords), None
        return _attend(query, key, value, attention_mask.resolved, leaves_out_padding, keywords), None
    if attention_mask is not None:
        keywords["mask"] = attention_mask
    elif (getattr(module, "is_causal", True) if is_causal is None else is_causal) and query.shape[2] > 1:
        keywords |= {"causal": True, "query_offset": 0}  # without a mask the first query sees the first key
    return bridge.attention(query, key, value, **keywords).transpose(1, 2).contiguous(), None


def _why_not(query, key, value, attention_mask, dropout, position_bias, sinks, others):
    if others.get("output_attentions"):
        return "attention weights are asked for (output_attentions=True)"
    if position_bias is not None:
        if attention_mask is not None and not _bears_a_bias(attention_mask):
            return "a position bias comes with a mask"
    elif attention_mask is not None and not isinstance(attention_mask, (Visibility, Traced)):
        if attention_mask.ndim != 4 or attention_mask.shape[-1] != key.shape[2]:
            return f"the mask has shape {tuple(attention_mask.shape)}"
    if isinstance(attention_mask, (Visibility, Traced)) and attention_mask.shape[2:] != (query.shape[2], key.shape[2]):
        return f"the mask is made for {tuple(attention_mask.shape[2:])} queries and keys; there are {query.shape[2]} and {key.shape[2]}"
    if query.dtype != key.dtype or not bridge._serves(query, key, value, None, dropout) or bridge._needs_gradient(sinks, position_bias):
        return bridge._why_not(query, key, value, sinks if position_bias is None else position_bias, dropout)
    return None


def _bears_a_bias(mask):
    """Whether a bias can be added to what a mask says."""
    if isinstance(mask, Traced) or (isinstance(mask, Visibility) and torch.compiler.is_compiling()):
        rules = mask.described.rules
        return mask.described.seen is rules.chunk is rules.sequences is None
    return isinstance(mask, Visibility) and "mask" not in mask.resolved.keywords and mask.resolved.packed is None


def _elsewhere(module, query, key, value, attention_mask, softcap, sinks, given):
    """torch's attention, or the model's own eager one for what torch's would leave out."""
    dense = attention_mask.dense() if isinstance(attention_mask, (Visibility, Traced)) else attention_mask
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


def _attend(query, key, value, resolved, leaves_out_padding, keywords):
    """Attention by rules: ``(B, Lq, Hq, Dv)``."""
    keywords = keywords | resolved.keywords
    if resolved.packed is not None:
        return _packed(query, key, value, resolved.packed, keywords)
    if resolved.q_lengths is not None and leaves_out_padding:
        keywords["q_lengths"] = resolved.q_lengths
    return bridge.attention(query, key, value, **keywords).transpose(1, 2).contiguous()


bridge.library.define(
    "attention_described(Tensor q, Tensor k, Tensor v, SymInt offset, Tensor? offset_at, SymInt kv_offset, Tensor? seen, Tensor? extent, "
    "bool causal, SymInt? left, SymInt? right, SymInt? chunk, Tensor? left_padding, Tensor? sequences, bool leaves_out_padding, *, "
    "Tensor? mask=None, float? scale=None, float? softcap=None, Tensor? sinks=None) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def _attend_described(query, key, value, described, leaves_out_padding, keywords):
    """:func:`_attend`, once the graph that is traced runs: the rules become arguments of an operator."""
    rules, at, *others = described
    offset = (0, at) if isinstance(at, torch.Tensor) else (at, None)
    return torch.ops.fastattn.attention_described(
        query, key, value, *offset, *others, rules.causal, *rules.window, rules.chunk, rules.left_padding, rules.sequences,
        leaves_out_padding, **keywords,
    )  # fmt: skip


def _described_kernel(
    q, k, v, offset, offset_at, kv_offset, seen, extent, causal, left, right, chunk, left_padding, sequences, leaves_out_padding,
    **keywords,
):  # fmt: skip
    rules = _Rules(causal, (left, right), chunk, left_padding, sequences)
    described = Described(rules, offset if offset_at is None else offset_at, kv_offset, seen, extent)
    resolved = described.resolve((q.shape[0], 1, q.shape[2], k.shape[2]))
    return _attend(q, k, v, resolved, leaves_out_padding, keywords)


def _described_fake(q, k, v, *others, **keywords):
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))


bridge.library.impl("attention_described", _described_kernel, "CPU")
torch.library.register_fake("fastattn::attention_described", _described_fake, lib=bridge.library)


def _packed(query, key, value, packed, keywords):
    """Attention of each sequence by itself: ``(B, Lq, Hq, Dv)``. Rows that see no key are 0."""
    bridge.prepare(query, key, value)
    keywords = {name: bridge.as_array(x) if isinstance(x, torch.Tensor) else x for name, x in keywords.items()}
    out = query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3]))
    q, k, v, o = (bridge.as_array(x) for x in (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), out))
    mask = keywords.pop("mask", None)
    for b, (keys, rows, ends, offset) in enumerate(packed):
        if mask is None:
            attention_varlen(q[b], k[b, keys], v[b, keys], rows, ends, query_offset=offset, out=o[b], **keywords)
            continue
        seen = mask[b, 0, :, keys]
        for i in range(len(offset)):
            own, theirs = slice(rows[i], rows[i + 1]), slice(ends[i], ends[i + 1])
            operands = (x.swapaxes(0, 1) for x in (q[b, own], k[b, keys][theirs], v[b, keys][theirs]))
            attention(*operands, mask=seen[:, theirs], query_offset=offset[i], out=o[b, own].swapaxes(0, 1), **keywords)
    return out


# Arguments of modules whose queries and keys are made of one and the same input.
_OF_ONE_INPUT = {
    "self", "hidden_states", "attention_mask", "cache", "past_key_values", "position_embeddings", "position_ids", "cache_position",
    "output_attentions", "kwargs",
}  # fmt: skip


@torch.compiler.assume_constant_result
def _leaves_out_padding(kind):
    """What :func:`_finds_padding_left_out` has found, which a tracer does not look into."""
    return _finds_padding_left_out(kind)


@functools.cache
def _finds_padding_left_out(kind):
    """Whether queries that are padding need no result in a class of modules.

    That is so where transformers' flash attention leaves them out too, as the models of the same file say, and where each query is
    the token of a key: in cross-attention padding is that of other tokens.
    """
    models = [x for x in vars(sys.modules[kind.__module__]).values() if isinstance(x, type) and issubclass(x, PreTrainedModel)]
    own = [model for model in models if model.__module__ == kind.__module__]
    of_one_input = set(inspect.signature(kind.forward).parameters) <= _OF_ONE_INPUT
    return of_one_input and bool(own) and all(model._supports_flash_attn for model in own)
