"""Layers of PyTorch's, by the arrays of their state. Weights are copied: training goes on without changing what was made here."""

from __future__ import annotations

from .layouts import Reader


def attention(module, rules):
    """A MultiHeadAttention from a ``torch.nn.MultiheadAttention``."""
    if module.bias_k is not None or module.add_zero_attn:
        raise ValueError("module must have neither add_bias_kv nor add_zero_attn")
    return Reader(_state(module, "self_attn."), "torch", {"num_attention_heads": module.num_heads}).attention("", rules=rules)


def block(module):
    """A TransformerBlock from a ``torch.nn.TransformerEncoderLayer`` or ``TransformerDecoderLayer``."""
    return Reader(_state(module), _layout(module), _config(module)).block("")


def stack(kind, module):
    """An Encoder or Decoder from a ``torch.nn.TransformerEncoder`` or ``TransformerDecoder``."""
    first = module.layers[0]
    config = {**_config(first), "num_hidden_layers": len(module.layers)}
    if any(_config(layer) != _config(first) for layer in module.layers):
        raise ValueError("module must have layers that differ in their weights only")
    return Reader(_state(module), _layout(first), config).stack(kind)


def _state(module, prefix=""):
    return {prefix + name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def _layout(layer):
    return "torch_decoder" if hasattr(layer, "multihead_attn") else "torch"


def _config(layer):
    return {
        "num_attention_heads": layer.self_attn.num_heads,
        "layer_norm_eps": layer.norm1.eps,
        "norm_first": layer.norm_first,
        "hidden_act": _activation(layer.activation),
    }


def _activation(function):
    """The name of an activation, which PyTorch has as a function or a module."""
    import torch

    if isinstance(function, torch.nn.GELU):
        return "gelu" if function.approximate == "none" else "gelu_tanh"
    known = {"relu": torch.nn.ReLU, "gelu": torch.nn.GELU, "silu": torch.nn.SiLU}
    for name, module in known.items():
        if function in (getattr(torch.nn.functional, name), getattr(torch, name, None)) or isinstance(function, module):
            return name
    raise ValueError(f"module must have an activation of {', '.join(known)}; got {function!r}")
