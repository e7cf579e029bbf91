"""A tiny model of random weights in a GGUF file, for the tests of the example that runs a language model."""

import sys
from pathlib import Path

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

from fastattn.models import smollm2  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

F32, Q4_1, Q8_0 = (gguf.GGMLQuantizationType[name] for name in ("F32", "Q4_1", "Q8_0"))
LAYERS, HIDDEN, HEADS, KV_HEADS, FFN = 2, 64, 4, 2, 96
LETTERS = sorted(smollm2._byte_alphabet(), key=smollm2._byte_alphabet().get)
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "a t", "c at", "Ã ©"]
TOKENS = CONTROLS + LETTERS + [merge.replace(" ", "") for merge in MERGES]
END = TOKENS.index("<|im_end|>")


def fields():
    """Metadata of the tiny model."""
    return {
        "llama.block_count": LAYERS,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": FFN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.context_length": 512,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] * len(CONTROLS) + [1] * (len(TOKENS) - len(CONTROLS)),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.eos_token_id": END,
    }


def tensors():
    """Weights of the tiny model in the encodings of the real one: name -> (stored array, encoding)."""
    rng = np.random.default_rng(1)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {"token_embd": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,)}
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.attn_{name}": (rows, HIDDEN) for name, rows in zip("qkv", (HIDDEN, kv, kv))}
        shapes |= {f"blk.{i}.attn_output": (HIDDEN, HIDDEN), f"blk.{i}.ffn_down": (HIDDEN, FFN)}
        shapes |= {f"blk.{i}.ffn_gate": (FFN, HIDDEN), f"blk.{i}.ffn_up": (FFN, HIDDEN)}
        shapes |= {f"blk.{i}.attn_norm": (HIDDEN,), f"blk.{i}.ffn_norm": (HIDDEN,)}
    result = {}
    for name, shape in shapes.items():
        encoding = F32 if len(shape) == 1 else Q8_0 if name == "token_embd" else Q4_1
        values = rng.standard_normal(shape, dtype=np.float32) * 0.2 + np.float32(len(shape) == 1)
        result[f"{name}.weight"] = (gguf.quantize(values, encoding), encoding)
    return result


def write(path, fields, tensors, architecture="llama"):
    """Write a GGUF file and return its path."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, (array, encoding) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=encoding)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("model") / "tiny.gguf", fields(), tensors())
