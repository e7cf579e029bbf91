"""A tiny BERT of random weights in a folder, for the tests of the examples that embed text."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

numpy = pytest.importorskip("safetensors.numpy")
tokenizers = pytest.importorskip("tokenizers")

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import minilm  # noqa: E402

WORDS = "the cat sat on mat dog ran far away and came back again".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A BERT of one block and a few words."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("minilm")
    width, hidden = 24, 32

    def random(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    state = {
        "embeddings.word_embeddings.weight": random(len(WORDS) + 4, width),
        "embeddings.position_embeddings.weight": random(minilm.MOST_TOKENS, width),
        "embeddings.token_type_embeddings.weight": random(2, width),
    }
    block = "encoder.layer.0."
    shapes = {f"attention.self.{name}": (width, width) for name in ("query", "key", "value")}
    shapes |= {"attention.output.dense": (width, width), "intermediate.dense": (hidden, width), "output.dense": (width, hidden)}
    for name, shape in shapes.items():
        state |= {f"{block}{name}.weight": random(*shape) / 5, f"{block}{name}.bias": random(shape[0])}
    for name in ("embeddings.LayerNorm", f"{block}attention.output.LayerNorm", f"{block}output.LayerNorm"):
        state |= {f"{name}.weight": 1 + random(width) / 9, f"{name}.bias": random(width)}
    numpy.save_file(state, folder / "model.safetensors")
    config = {"model_type": "bert", "num_hidden_layers": 1, "num_attention_heads": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-12}
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": width, "intermediate_size": hidden}))
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.enable_padding(length=40)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
