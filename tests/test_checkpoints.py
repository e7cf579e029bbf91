"""Layers whose weights come from elsewhere: mappings of names, safetensors and GGUF files."""

import json

import numpy as np
import pytest
from inputs import random

from fastattn import layers
from fastattn.layers import FeedForward, MultiHeadAttention, RMSNorm, Rope, TransformerBlock

WIDTH, HIDDEN = 24, 40

CONFIG = {
    "model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 1000.0, "tie_word_embeddings": True,
}  # fmt: skip


def llama_state():
    state = {"model.embed_tokens.weight": random(30, WIDTH), "model.norm.weight": 1 + random(WIDTH)}
    for n in range(2):
        prefix = f"model.layers.{n}."
        for name, rows in (("q", 24), ("k", 12), ("v", 12), ("o", 24)):
            state[f"{prefix}self_attn.{name}_proj.weight"] = random(rows, WIDTH, seed=ord(name) + n)
        for name, shape in (("gate", (HIDDEN, WIDTH)), ("up", (HIDDEN, WIDTH)), ("down", (WIDTH, HIDDEN))):
            state[f"{prefix}mlp.{name}_proj.weight"] = random(*shape, seed=ord(name[0]) + n)
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"{prefix}{name}.weight"] = 1 + random(WIDTH, seed=n + len(name))
    return state


def test_a_model_from_its_names_is_one_from_its_arrays(backend):
    state, tokens = llama_state(), np.arange(20).reshape(2, 10)
    decoder = layers.Decoder.from_state_dict(state, layout="llama", config=CONFIG)
    rope, blocks = Rope(6, 1000.0), []
    for n in range(2):
        w = {name[len("model.layers.0.") :]: array for name, array in state.items() if name.startswith(f"model.layers.{n}.")}
        attention = MultiHeadAttention(
            *(w[f"self_attn.{name}_proj.weight"] for name in "qkvo"), num_heads=4, num_kv_heads=2, rope=rope, causal=True
        )
        up, down, gate = (w[f"mlp.{name}_proj.weight"] for name in ("up", "down", "gate"))
        norms = (RMSNorm(w[f"{name}.weight"]) for name in ("input_layernorm", "post_attention_layernorm"))
        names = ("attention_norm", "feed_forward_norm")
        blocks.append(TransformerBlock(attention, FeedForward(up, down, gate=gate, activation="silu"), **dict(zip(names, norms))))
    by_hand = layers.Decoder(
        blocks, embedding=layers.TokenEmbedding(state["model.embed_tokens.weight"]), norm=RMSNorm(state["model.norm.weight"])
    )
    np.testing.assert_array_equal(decoder.logits(decoder(tokens)), by_hand.logits(by_hand(tokens)))
    one = TransformerBlock.from_state_dict(state, "model.layers.1.", layout="llama", config=CONFIG, block=1)
    x = random(2, 5, WIDTH)
    np.testing.assert_array_equal(one(x), decoder.blocks[1](x))
    attend = MultiHeadAttention.from_state_dict(state, "model.layers.1.", layout="llama", config=CONFIG)
    np.testing.assert_array_equal(attend(x), one.attention(x))


def changed(**changes):
    state, config = llama_state(), dict(CONFIG)
    for name, value in changes.items():
        place = state if "." in name else config
        if value is None:
            place.pop(name)
        else:
            place[name] = value
    return state, config


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, "state must hold model.layers.1.mlp.up_proj.weight"),
        ({"model.layers.0.mlp.norm.weight": np.ones(3)}, "state holds what the layout 'llama' does not know"),
        ({"model.layers.0.self_attn.k_proj.weight": random(10, WIDTH)}, "key must have outputs for 2 heads; got|of 6; got 10"),
        ({"num_hidden_layers": 1}, "config must say how many blocks there are; it has 1"),
        ({"num_hidden_layers": 3}, "state must hold model.layers.2"),
        ({"num_attention_heads": None}, "config must have num_attention_heads or n_head"),
        ({"hidden_act": "tanh"}, "activation must be one of"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "rope_type"),
    ],
)
def test_checkpoints_that_do_not_fit(changes, message):
    state, config = changed(**changes)
    with pytest.raises(ValueError, match=message):
        layers.Decoder.from_state_dict(state, layout="llama", config=config)


def test_layouts_that_are_not_known():
    with pytest.raises(ValueError, match="layout must be one of bert, .*; got 'mamba'"):
        layers.Decoder.from_state_dict({}, layout="mamba", config={})
    with pytest.raises(ValueError, match="model_type of bert, .*; got 'mamba'"):
        layers.layouts.layout_of({"model_type": "mamba"})


def test_windows_of_blocks_follow_the_configuration():
    for more, expected in [
        ({"model_type": "mistral", "sliding_window": 4}, [(3, 0), (3, 0)]),
        ({"model_type": "qwen2", "sliding_window": 4, "use_sliding_window": False}, [None, None]),
        ({"model_type": "qwen2", "sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}, [None, (3, 0)]),
        ({"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}, [(3, 0), None]),
    ]:
        decoder = layers.Decoder.from_state_dict(llama_state(), layout="llama", config={**CONFIG, **more})
        assert [block.attention.rules["window"] for block in decoder.blocks] == expected


@pytest.mark.parametrize("parts", [1, 2])
def test_safetensors(tmp_path, parts):
    numpy = pytest.importorskip("safetensors.numpy")
    state, tokens = llama_state(), np.arange(10)[None]
    names = sorted(state)
    for n in range(parts):
        numpy.save_file({name: state[name] for name in names[n::parts]}, tmp_path / f"model-{n}.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    expected = layers.Decoder.from_state_dict(state, layout="llama", config=CONFIG)(tokens)
    np.testing.assert_array_equal(layers.Decoder.from_pretrained(tmp_path)(tokens), expected)
    found, config = layers.read_checkpoint(tmp_path if parts == 2 else tmp_path / "model-0.safetensors")
    assert found.keys() == state.keys() and config == CONFIG
    (tmp_path / "model-0.safetensors").write_bytes(b"\x10" + bytes(20))
    with pytest.raises(ValueError, match="model-0.safetensors is not a readable safetensors file"):
        layers.read_checkpoint(tmp_path)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors file"):
        layers.read_checkpoint(tmp_path)


def write_gguf(path, architecture, fields, tensors):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        writer.add_key_value(f"{architecture}.{key}", value, gguf.GGUFValueType.get_type(value))
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


LLAMA_FIELDS = {
    "block_count": 2, "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 1000.0,
}  # fmt: skip


def llama_tensors():
    """The state as converters write it: rows of queries and keys by pairs."""
    from fastattn.layers.gguf import _LLAMA

    names = {ours: theirs for theirs, ours in _LLAMA.items()}
    tensors = {}
    for name, array in llama_state().items():
        part = name.removesuffix(".weight")
        if part in names:
            tensors[f"{names[part]}.weight"] = array
            continue
        _, _, number, part = part.split(".", 3)
        if part in ("self_attn.q_proj", "self_attn.k_proj"):
            array = array.reshape(len(array) // 6, 2, 3, WIDTH).swapaxes(1, 2).reshape(array.shape)
        tensors[f"blk.{number}.{names[part]}.weight"] = array
    return tensors


def test_gguf(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "llama", LLAMA_FIELDS, llama_tensors())
    tokens = np.arange(10)[None]
    expected = layers.Decoder.from_state_dict(llama_state(), layout="llama", config=CONFIG)
    actual = layers.Decoder.from_pretrained(path)
    np.testing.assert_array_equal(actual.logits(actual(tokens)), expected.logits(expected(tokens)))


@pytest.mark.parametrize(
    "architecture, change, message",
    [
        ("mamba", lambda fields, tensors: None, "general.architecture must be one of llama"),
        ("llama", lambda fields, tensors: tensors.update({"blk.0.spare.weight": np.ones(3, np.float32)}), "unexpected tensor blk.0.spare"),
        ("llama", lambda fields, tensors: tensors.update({"output_norm.weight": np.ones(3, np.int32)}), "stored as I32"),
        ("llama", lambda fields, tensors: fields.update({"block_count": [2]}), "llama.block_count must be one value"),
    ],
)
def test_gguf_files_that_cannot_be(tmp_path, architecture, change, message):
    fields, tensors = dict(LLAMA_FIELDS), llama_tensors()
    change(fields, tensors)
    path = write_gguf(tmp_path / "model.gguf", architecture, fields, tensors)
    with pytest.raises(ValueError, match=message):
        layers.read_checkpoint(path)


def test_damaged_gguf_files(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "llama", LLAMA_FIELDS, llama_tensors())
    content = path.read_bytes()
    for size in (0, 10, 100, 1000, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match="is not a readable GGUF file"):
            layers.read_checkpoint(path)


def bert_state():
    state = {f"embeddings.{name}_embeddings.weight": random(n, WIDTH) for name, n in (("word", 30), ("position", 16), ("token_type", 2))}
    names = {f"attention.self.{name}": (WIDTH, WIDTH) for name in ("query", "key", "value")} | {"attention.output.dense": (WIDTH, WIDTH)}
    names |= {"intermediate.dense": (HIDDEN, WIDTH), "output.dense": (WIDTH, HIDDEN)}
    norms = ["embeddings.LayerNorm", *(f"encoder.layer.{n}.{part}.LayerNorm" for n in range(2) for part in ("attention.output", "output"))]
    for n in range(2):
        for seed, (name, shape) in enumerate(names.items()):
            state[f"encoder.layer.{n}.{name}.weight"] = random(*shape, seed=seed + 10 * n)
            state[f"encoder.layer.{n}.{name}.bias"] = random(shape[0], seed=seed + 10 * n)
    for seed, name in enumerate(norms):
        state |= {f"{name}.weight": 1 + random(WIDTH, seed=seed), f"{name}.bias": random(WIDTH, seed=seed + 50)}
    return state


def gpt2_state():
    state = {"wte.weight": random(30, WIDTH), "wpe.weight": random(16, WIDTH), "ln_f.weight": 1 + random(WIDTH), "ln_f.bias": random(WIDTH)}
    shapes = {"attn.c_attn": (WIDTH, 3 * WIDTH), "attn.c_proj": (WIDTH, WIDTH), "mlp.c_fc": (WIDTH, HIDDEN), "mlp.c_proj": (HIDDEN, WIDTH)}
    for n in range(2):
        for seed, (name, shape) in enumerate(shapes.items()):
            state |= {f"h.{n}.{name}.weight": random(*shape, seed=seed + 9 * n), f"h.{n}.{name}.bias": random(shape[1], seed=seed + 9 * n)}
        for seed, name in enumerate(("ln_1", "ln_2")):
            state |= {f"h.{n}.{name}.weight": 1 + random(WIDTH, seed=seed + n), f"h.{n}.{name}.bias": random(WIDTH, seed=seed + 5)}
    return state


def qwen3_state():
    state = llama_state()
    for n in range(2):
        state |= {f"model.layers.{n}.self_attn.{part}_norm.weight": 1 + random(6, seed=n + 3) for part in "qk"}
    return state


PLAIN = {"block_count": 2, "attention.head_count": 4}
CONVERTED = {  # architecture: state, fields of the file, kind of stack, layout, configuration
    "bert": (
        bert_state, {**PLAIN, "attention.layer_norm_epsilon": 1e-12}, layers.Encoder, "bert",
        {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-12},
    ),
    "gpt2": (
        gpt2_state, {**PLAIN, "attention.layer_norm_epsilon": 1e-5}, layers.Decoder, "gpt2",
        {"n_layer": 2, "n_head": 4, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5},
    ),
    "qwen3": (qwen3_state, LLAMA_FIELDS, layers.Decoder, "llama", CONFIG),
}  # fmt: skip


@pytest.mark.parametrize("architecture", CONVERTED)
def test_gguf_files_of_other_architectures(tmp_path, architecture):
    """Written by the names of the package gguf, which has a table of its own."""
    gguf = pytest.importorskip("gguf")
    make, fields, kind, layout, config = CONVERTED[architecture]
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), 2)
    tensors = {}
    for name, array in make().items():
        part, _, suffix = name.rpartition(".")
        transposed = architecture == "gpt2" and ".c_" in name and array.ndim == 2
        tensors[f"{names.get_name(part)}.{suffix}"] = np.ascontiguousarray(array.T) if transposed else array
    path = write_gguf(tmp_path / "model.gguf", architecture, fields, tensors)
    tokens = np.arange(12).reshape(2, 6)
    expected = kind.from_state_dict(make(), layout=layout, config=config)(tokens)
    # GPT-2's matrices lie the other way round in a file, where BLAS may sum in another order.
    np.testing.assert_allclose(kind.from_pretrained(path)(tokens), expected, rtol=1e-5, atol=1e-5)
