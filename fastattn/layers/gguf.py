"""GGUF files, as what they were converted from: transformers' names, shapes and configuration.

A file is not trusted. Every length, count and offset in it is checked before it is used, and tensors may not share bytes, so that
memory stays in proportion to the file's size.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

import numpy as np

_ENCODINGS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
_SETTINGS = {  # behind the architecture's name: transformers' names
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "attention.sliding_window": "sliding_window",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
}
_LLAMA = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BERT = {
    "token_embd": "embeddings.word_embeddings",
    "position_embd": "embeddings.position_embeddings",
    "token_types": "embeddings.token_type_embeddings",
    "token_embd_norm": "embeddings.LayerNorm",
    "attn_q": "attention.self.query",
    "attn_k": "attention.self.key",
    "attn_v": "attention.self.value",
    "attn_output": "attention.output.dense",
    "attn_output_norm": "attention.output.LayerNorm",
    "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense",
    "layer_output_norm": "output.LayerNorm",
}
_GPT2 = {
    "token_embd": "wte",
    "position_embd": "wpe",
    "output_norm": "ln_f",
    "output": "lm_head",
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_ARCHITECTURES = {  # of files: names, what stands before those of a block, activation
    "llama": (_LLAMA, "model.layers.{}.", "silu"),
    "qwen2": (_LLAMA, "model.layers.{}.", "silu"),
    "qwen3": (_LLAMA, "model.layers.{}.", "silu"),
    "bert": (_BERT, "encoder.layer.{}.", "gelu"),
    "gpt2": (_GPT2, "h.{}.", "gelu_new"),
}


@functools.cache
def checked_reader(most=4_000_000):
    """``gguf.GGUFReader`` for files from anywhere, with at most so many entries of metadata: five for each token of a vocabulary."""
    from gguf import GGUFReader

    class CheckedReader(GGUFReader):
        """The base class slices past the end of the file without noticing, so that a forged count makes it loop and allocate for
        ever. All its reads pass through ``_get``: here each must lie inside the file, and their number is limited."""

        max_reads = most

        def _get(self, offset, dtype, count=1, override_order=None):
            self.max_reads -= 1
            if self.max_reads < 0:
                raise ValueError("too many metadata entries")
            if self.byte_order != "I":
                raise ValueError("big-endian files are not supported")
            return np.frombuffer(self.data, np.dtype(dtype).newbyteorder("<"), int(count), int(offset))

    return CheckedReader


def read(path):
    """The arrays of a file, dequantised when they are asked for, and its configuration."""
    try:
        with np.errstate(over="raise"):  # the sum of two offsets must not wrap round
            reader = checked_reader()(path)
        return from_reader(reader)
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a readable GGUF file: {error}") from error


def from_reader(reader):
    """The same of a file that has been opened."""
    architecture = _value(reader, "general.architecture")
    if architecture not in _ARCHITECTURES:
        raise ValueError(f"general.architecture must be one of {', '.join(_ARCHITECTURES)}; got {architecture!r}")
    names, block, activation = _ARCHITECTURES[architecture]
    config = {"model_type": architecture, "hidden_act": activation}
    for key, name in _SETTINGS.items():
        value = _value(reader, f"{architecture}.{key}")
        if value is not None:
            config[name] = value
    kind = _value(reader, f"{architecture}.rope.scaling.type")
    if kind not in (None, "none"):
        config["rope_scaling"] = _scaling(reader, architecture, kind)
    tensors = {}
    for tensor in _side_by_side(reader):
        if tensor.tensor_type.name not in _ENCODINGS:
            raise ValueError(f"{tensor.name} is stored as {tensor.tensor_type.name}, which is not supported")
        tensors[_translated(tensor.name, names, block)] = tensor
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    return _Tensors(tensors, config), config


def _value(reader, key):
    """A number or text, or None."""
    from gguf import GGUFValueType

    field = reader.get_field(key)
    if field is None:
        return None
    if field.types[0] == GGUFValueType.ARRAY:
        raise ValueError(f"{key} must be one value; it is an array")
    return field.contents()


def _scaling(reader, architecture, kind):
    names = {"factor": "factor"}
    if kind != "linear":
        names["original_context_length"] = "original_max_position_embeddings"
    return {"rope_type": kind, **{name: _value(reader, f"{architecture}.rope.scaling.{key}") for key, name in names.items()}}


def _side_by_side(reader):
    """The tensors, after checking that no two share bytes."""
    tensors, end = sorted(reader.tensors, key=lambda tensor: tensor.data_offset), reader.data_offset
    for tensor in tensors:
        if tensor.data_offset < end:
            raise ValueError(f"{tensor.name} overlaps other data")
        end = tensor.data_offset + tensor.n_bytes
    return tensors


def _translated(name, names, block):
    """A tensor's name in transformers' words."""
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if not found or found[2] not in names:
        raise ValueError(f"unexpected tensor {name}")
    number, part, kind = found.groups()
    return f"{'' if number is None else block.format(int(number))}{names[part]}.{kind}"


class _Tensors(Mapping):
    """Arrays by transformers' names, dequantised to float32 when they are asked for."""

    def __init__(self, tensors, config):
        self._tensors, self._config = tensors, config

    def __iter__(self):
        return iter(self._tensors)

    def __len__(self):
        return len(self._tensors)

    def __getitem__(self, name):
        from gguf import dequantize

        tensor, config = self._tensors[name], self._config
        array = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(tensor.shape[::-1].tolist())
        turned = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        part = name.split(".")[-2]
        if config["model_type"] == "llama" and part in turned:
            # Numbers that rotate together lie side by side in these files, and half a head apart in transformers' checkpoints.
            heads = config.get(turned[part]) or config["num_attention_heads"]
            return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        return array.T if config["model_type"] == "gpt2" and part.startswith("c_") and array.ndim == 2 else array
