"""How checkpoints name their weights, as data, and the one reader that builds layers from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .attention import MultiHeadAttention, Rope
from .block import TransformerBlock
from .dense import FeedForward, LayerNorm, Linear, RMSNorm, weights
from .embedding import PatchEmbedding, TokenEmbedding


@dataclass(frozen=True)
class Layout:
    """Names of weights; ``{}`` is ``weight`` or ``bias``, but in `blocks`, where it is the number. Of several, the first that is there."""

    blocks: str
    attention: dict[str, str]  # of query, key and value, or of qkv; of out, and where there are any of q_norm and k_norm
    feed_forward: dict[str, str]  # of up and down, and of gate
    norms: dict[str, str]  # of attention_norm and feed_forward_norm, and of cross_norm
    embedding: dict[str, tuple[str, ...]] = field(default_factory=dict)
    cross: dict[str, str] | None = None
    norm: tuple[str, ...] = ()  # behind the last block
    head: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()  # that may stand before all names
    norm_kind: type[LayerNorm] = LayerNorm
    norm_first: bool = True
    causal: bool = False
    transposed: bool = False  # weights are (inputs, outputs)
    settings: dict[str, tuple[str, ...]] = field(default_factory=dict)  # where the configuration has another name for something


_SETTINGS = {  # what a layer needs to know: its names in configurations
    "num_blocks": ("num_hidden_layers", "n_layer"),
    "num_heads": ("num_attention_heads", "n_head"),
    "num_kv_heads": ("num_key_value_heads",),
    "eps": ("layer_norm_eps", "rms_norm_eps", "layer_norm_epsilon"),
    "activation": ("hidden_act", "activation_function", "activation"),
}
_BART = Layout(
    blocks="decoder.layers.{}.",
    attention={name: f"self_attn.{part}_proj.{{}}" for name, part in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "out"))},
    cross={name: f"encoder_attn.{part}_proj.{{}}" for name, part in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "out"))},
    feed_forward={"up": "fc1.{}", "down": "fc2.{}"},
    norms={
        "attention_norm": "self_attn_layer_norm.{}",
        "cross_norm": "encoder_attn_layer_norm.{}",
        "feed_forward_norm": "final_layer_norm.{}",
    },
    embedding={
        "table": ("decoder.embed_tokens.weight", "shared.weight"),
        "positions": ("decoder.embed_positions.weight",),
        "norm": ("decoder.layernorm_embedding.{}",),
    },
    head=("lm_head.weight",),
    prefixes=("model.",),
    norm_first=False,
    causal=True,
    settings={"num_blocks": ("decoder_layers",), "num_heads": ("decoder_attention_heads",)},
)
_TORCH = {"query": "q_proj_weight", "key": "k_proj_weight", "value": "v_proj_weight", "qkv": "in_proj_{}", "out": "out_proj.{}"}

LAYOUTS = {
    "bert": Layout(
        blocks="encoder.layer.{}.",
        attention={
            "query": "attention.self.query.{}",
            "key": "attention.self.key.{}",
            "value": "attention.self.value.{}",
            "out": "attention.output.dense.{}",
        },
        feed_forward={"up": "intermediate.dense.{}", "down": "output.dense.{}"},
        norms={"attention_norm": "attention.output.LayerNorm.{}", "feed_forward_norm": "output.LayerNorm.{}"},
        embedding={
            "table": ("embeddings.word_embeddings.weight",),
            "positions": ("embeddings.position_embeddings.weight",),
            "types": ("embeddings.token_type_embeddings.weight",),
            "norm": ("embeddings.LayerNorm.{}",),
        },
        prefixes=("bert.", "roberta."),
        norm_first=False,
    ),
    "vit": Layout(
        blocks="encoder.layer.{}.",
        attention={
            "query": "attention.attention.query.{}",
            "key": "attention.attention.key.{}",
            "value": "attention.attention.value.{}",
            "out": "attention.output.dense.{}",
        },
        feed_forward={"up": "intermediate.dense.{}", "down": "output.dense.{}"},
        norms={"attention_norm": "layernorm_before.{}", "feed_forward_norm": "layernorm_after.{}"},
        embedding={
            "patches": ("embeddings.patch_embeddings.projection.{}",),
            "first": ("embeddings.cls_token",),
            "positions": ("embeddings.position_embeddings",),
        },
        norm=("layernorm.{}",),
        prefixes=("vit.",),
    ),
    "gpt2": Layout(
        blocks="h.{}.",
        attention={"qkv": "attn.c_attn.{}", "out": "attn.c_proj.{}"},
        feed_forward={"up": "mlp.c_fc.{}", "down": "mlp.c_proj.{}"},
        norms={"attention_norm": "ln_1.{}", "feed_forward_norm": "ln_2.{}"},
        embedding={"table": ("wte.weight",), "positions": ("wpe.weight",)},
        norm=("ln_f.{}",),
        head=("lm_head.weight",),
        prefixes=("transformer.",),
        causal=True,
        transposed=True,
    ),
    "llama": Layout(
        blocks="layers.{}.",
        attention={
            "query": "self_attn.q_proj.{}",
            "key": "self_attn.k_proj.{}",
            "value": "self_attn.v_proj.{}",
            "out": "self_attn.o_proj.{}",
            "q_norm": "self_attn.q_norm.{}",
            "k_norm": "self_attn.k_norm.{}",
        },
        feed_forward={"up": "mlp.up_proj.{}", "down": "mlp.down_proj.{}", "gate": "mlp.gate_proj.{}"},
        norms={"attention_norm": "input_layernorm.{}", "feed_forward_norm": "post_attention_layernorm.{}"},
        embedding={"table": ("embed_tokens.weight",)},
        norm=("norm.{}",),
        head=("lm_head.weight",),
        prefixes=("model.",),
        norm_kind=RMSNorm,
        causal=True,
    ),
    "bart_decoder": _BART,
    "bart_encoder": replace(
        _BART,
        blocks="encoder.layers.{}.",
        cross=None,
        norms={name: _BART.norms[name] for name in ("attention_norm", "feed_forward_norm")},
        embedding={
            "table": ("encoder.embed_tokens.weight", "shared.weight"),
            "positions": ("encoder.embed_positions.weight",),
            "norm": ("encoder.layernorm_embedding.{}",),
        },
        head=(),
        causal=False,
        settings={"num_blocks": ("encoder_layers",), "num_heads": ("encoder_attention_heads",)},
    ),
    "torch": Layout(  # nn.TransformerEncoderLayer and nn.TransformerEncoder
        blocks="layers.{}.",
        attention={name: f"self_attn.{place}" for name, place in _TORCH.items()},
        feed_forward={"up": "linear1.{}", "down": "linear2.{}"},
        norms={"attention_norm": "norm1.{}", "feed_forward_norm": "norm2.{}"},
        norm=("norm.{}",),
    ),
    "torch_decoder": Layout(  # nn.TransformerDecoderLayer and nn.TransformerDecoder
        blocks="layers.{}.",
        attention={name: f"self_attn.{place}" for name, place in _TORCH.items()},
        cross={name: f"multihead_attn.{place}" for name, place in _TORCH.items()},
        feed_forward={"up": "linear1.{}", "down": "linear2.{}"},
        norms={"attention_norm": "norm1.{}", "cross_norm": "norm2.{}", "feed_forward_norm": "norm3.{}"},
        norm=("norm.{}",),
        causal=True,
    ),
}
_MODEL_TYPES = {  # of configurations: layouts
    "bert": "bert",
    "roberta": "bert",
    "xlm-roberta": "bert",
    "vit": "vit",
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "llama",
    "qwen3": "llama",
}
_NO_WEIGHTS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")  # what old checkpoints have among the weights of a block


def layout_of(config: Mapping[str, Any]) -> str:
    """The layout of the checkpoint that a configuration belongs to."""
    kind = config.get("model_type")
    if kind not in _MODEL_TYPES:
        raise ValueError(f"config must have a model_type of {', '.join(_MODEL_TYPES)}; got {kind!r}")
    return _MODEL_TYPES[kind]


class Reader:
    """Builds layers from the arrays of a checkpoint."""

    def __init__(self, state: Mapping[str, Any], layout: str, config: Mapping[str, Any], prefix: str = ""):
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")
        self._names, self._state, self._config, self._layout = LAYOUTS[layout], state, config, layout
        self._used = set()
        first = self._names.blocks.format(0)
        found = [p for p in ("", *self._names.prefixes) if any(name.startswith(f"{prefix}{p}{first}") for name in state)]
        self._prefix = prefix + (found[0] if found else "")
        self._ropes = {}

    # Tensors

    def _tensor(self, *names):
        """The first of these that is there."""
        for name in names:
            if name in self._state:
                self._used.add(name)
                return self._state[name]
        raise ValueError(f"state must hold {' or '.join(names)}, as the layout {self._layout!r} has it")

    def _pair(self, name):
        """A weight, (outputs, inputs), and a bias or None."""
        weight = self._tensor(name.format("weight"))
        bias = self._tensor(name.format("bias")) if "{}" in name and name.format("bias") in self._state else None
        return (np.asarray(weight).T if self._names.transposed else weight), bias

    def _linear(self, name):
        weight, bias = self._pair(name)
        return Linear(weights(name.format("weight"), weight, -1, -1), bias)

    def _norm(self, name, kind=None):
        weight = self._tensor(name.format("weight"))
        bias = self._tensor(name.format("bias")) if name.format("bias") in self._state else None
        return (kind or self._names.norm_kind)(weight, bias, eps=self._setting("eps", 1e-5))

    def _has(self, name):
        return name.format("weight") in self._state

    def _setting(self, name, default=None):
        for key in (*self._names.settings.get(name, ()), *_SETTINGS[name]):
            if self._config.get(key) is not None:
                return self._config[key]
        if default is None:
            raise ValueError(f"config must have {' or '.join(self._names.settings.get(name, _SETTINGS[name]))}")
        return default

    # Layers

    def attention(
        self, prefix: str, block: int = 0, *, cross: bool = False, rules: Mapping[str, Any] | None = None
    ) -> MultiHeadAttention:
        """The attention of the block whose names begin so; by these rules, or those of the model."""
        names = self._names.cross if cross else self._names.attention
        if names is None:
            raise ValueError(f"cross must be False: the layout {self._layout!r} has none")
        num_heads = self._setting("num_heads")
        if "qkv" in names and self._has(prefix + names["qkv"]):
            whole = self._linear(prefix + names["qkv"])
            if whole.outputs % 3:
                raise ValueError(f"{prefix}{names['qkv']} must have outputs for queries, keys and values; got {whole.outputs}")
            n = whole.outputs // 3
            parts = [whole.part(start, start + n) for start in (0, n, 2 * n)]
        else:
            parts = [self._linear(prefix + names[name]) for name in ("query", "key", "value")]
            if "qkv" in names and prefix + names["qkv"].format("bias") in self._state:  # PyTorch's, of three weights and one bias
                biases = np.split(np.asarray(self._tensor(prefix + names["qkv"].format("bias"))), 3)
                parts = [Linear(part.weight, bias) for part, bias in zip(parts, biases)]
        norms = {
            name: self._norm(prefix + names[name]) for name in ("q_norm", "k_norm") if name in names and self._has(prefix + names[name])
        }
        if rules is None:
            rules = {"causal": True, "window": self._window(block)} if self._names.causal and not cross else {}
        return MultiHeadAttention(
            *parts, self._linear(prefix + names["out"]), num_heads=num_heads,
            num_kv_heads=num_heads if cross else self._setting("num_kv_heads", num_heads),
            rope=None if cross else self._rope(parts[0].outputs // num_heads), **norms, **rules,
        )  # fmt: skip

    def _rope(self, head_dim):
        given = dict(self._config.get("rope_parameters") or self._config.get("rope_scaling") or {})
        base = self._config.get("rope_theta", given.pop("rope_theta", None))
        if self._layout != "llama" or (base is None and not given):
            return None
        part = given.pop("partial_rotary_factor", None) or self._config.get("partial_rotary_factor") or 1.0
        given.pop("rope_theta", None)
        base = 10000.0 if base is None else base
        plain = (given.get("rope_type") or given.get("type") or "default") == "default"
        dim = int(head_dim * part)
        if dim not in self._ropes:
            self._ropes[dim] = Rope(dim, base, scaling=None if plain else given)
        return self._ropes[dim]

    def _window(self, block):
        """That of a block which sees the latest tokens only."""
        size, kinds = self._config.get("sliding_window"), self._config.get("layer_types")
        if size is None or not self._config.get("use_sliding_window", True):
            return None
        if kinds:
            return (size - 1, 0) if kinds[block] == "sliding_attention" else None
        return (size - 1, 0) if block >= self._config.get("max_window_layers", 0) else None

    def block(self, prefix: str, block: int = 0) -> TransformerBlock:
        """The block whose names begin so."""
        names, read = self._names, self._names.feed_forward
        gate = self._linear(prefix + read["gate"]) if "gate" in read else None
        made = TransformerBlock(
            self.attention(prefix, block),
            FeedForward(
                self._linear(prefix + read["up"]), self._linear(prefix + read["down"]), gate=gate, activation=self._setting("activation")
            ),
            cross_attention=None if names.cross is None else self.attention(prefix, block, cross=True),
            norm_first=self._config.get("norm_first", names.norm_first),
            **{name: self._norm(prefix + place) for name, place in names.norms.items()},
        )
        unknown = [name for name in self._state if name.startswith(prefix) and name not in self._used and not name.endswith(_NO_WEIGHTS)]
        if unknown and prefix:
            raise ValueError(f"state holds what the layout {self._layout!r} does not know, which would be left out: {sorted(unknown)[:4]}")
        return made

    def embedding(self) -> TokenEmbedding | PatchEmbedding | None:
        """What stands before the blocks, or None where there is nothing."""
        names = {part: [self._prefix + name for name in places] for part, places in self._names.embedding.items()}
        if "patches" in names:
            weight, bias = self._pair(names["patches"][0])
            first, positions = (np.asarray(self._tensor(*names[part])) for part in ("first", "positions"))
            return PatchEmbedding(weight, bias, first=first.reshape(-1, first.shape[-1]), positions=positions.reshape(-1, first.shape[-1]))
        if "table" not in names:
            return None
        table = weights("table", self._tensor(*names["table"]), -1, -1)
        kind = self._config.get("model_type")
        padding = self._config.get("pad_token_id")
        offset = 2 if self._layout.startswith("bart") else 1 + (1 if padding is None else padding) if "roberta" in str(kind) else 0
        return TokenEmbedding(
            table,
            norm=self._norm(names["norm"][0]) if "norm" in names else None,
            scale=math.sqrt(table.shape[1]) if self._config.get("scale_embedding") else 1.0,
            position_offset=offset,
            **{part: self._tensor(*names[part]) for part in ("positions", "types") if part in names},
        )

    def stack(self, kind):
        """The whole model as this kind of stack."""
        names = self._names
        blocks = [self.block(self._prefix + names.blocks.format(n), n) for n in range(self._setting("num_blocks"))]
        norm = [self._prefix + name for name in names.norm if self._has(self._prefix + name)]
        parts = {"embedding": self.embedding(), "norm": self._norm(norm[0]) if norm else None}
        head = [name for name in names.head if name in self._state]
        if hasattr(kind, "logits") and head and not self._config.get("tie_word_embeddings", False):
            parts["head"] = self._tensor(*head)
        beyond = self._prefix + names.blocks.format(len(blocks))
        if any(name.startswith(beyond) for name in self._state):
            raise ValueError(f"config must say how many blocks there are; it has {len(blocks)}, and state holds {beyond}...")
        return kind(blocks, **parts)
