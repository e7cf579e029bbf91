"""The example with attention on three levels."""

import numpy as np
import pytest
from tiny_encoder import folder, minilm  # noqa: F401

from fastattn.models import weights

import hierarchical  # isort: skip # tiny_encoder says where the examples are

BOUNDS = np.array([0, 3, 4, 9, 11]), np.array([0, 1, 4])  # sentences in words, documents in sentences


def unit_rows(count, seed=0):
    return hierarchical.unit(np.random.default_rng(seed).standard_normal((count, 24), dtype=np.float32))


def softmax_mean(query, members):
    p = np.exp(hierarchical.SHARPNESS * (members.astype(np.float64) @ query))
    p /= p.sum()
    mean = p @ members
    return mean / np.linalg.norm(mean), p


def test_each_level_is_a_softmax_over_the_members_of_its_groups(engine):
    words, (query,) = unit_rows(11), unit_rows(1, 1)
    levels = hierarchical.hierarchy(query, words, *BOUNDS)
    members, level_of = words, list(levels)
    for level, bounds in zip(level_of, [*BOUNDS, np.array([0, 2])]):
        expected = [softmax_mean(query, members[a:b]) for a, b in zip(bounds, bounds[1:])]
        np.testing.assert_allclose(level.vectors, [vector for vector, _ in expected], atol=1e-5)
        np.testing.assert_allclose(level.weights, np.concatenate([p for _, p in expected]), atol=1e-5)
        members = level.vectors
    assert levels.documents.vectors.shape == (1, 24)


def test_shares_of_all_words_sum_to_one():
    words, (query,) = unit_rows(11), unit_rows(1, 1)
    levels = hierarchical.hierarchy(query, words, *BOUNDS)
    of_sentence = np.repeat(np.arange(4), np.diff(BOUNDS[0]))
    of_document = np.repeat(np.arange(2), np.diff(BOUNDS[1]))
    shares = levels.words.weights * (levels.sentences.weights * levels.documents.weights[of_document])[of_sentence]
    assert shares.sum() == pytest.approx(1, abs=1e-5)


def test_sentences_end_at_stops_and_blank_lines():
    assert hierarchical.sentences_of("One two. Three\nfour?\n\nFive six\n\n***\n") == ["One two.", "Three four?", "Five six"]


def test_words_are_those_between_the_ends(folder):
    embedder = minilm.Embedder(folder)
    hidden, names, bounds = embedder.words(["the cat", "dog ran far"])
    assert names.tolist() == ["the", "cat", "dog", "ran", "far"] and bounds.tolist() == [0, 2, 5] and hidden.shape == (5, 24)
    whole = embedder.encoder(np.array(embedder.tokens(["dog ran far"])[0]))
    np.testing.assert_allclose(hidden[2:], whole[1:-1], atol=1e-5)


def test_program_shows_what_each_level_looked_at(folder, tmp_path, capsys):
    for name, text in (("one", "The cat sat on the mat. It ran away."), ("two", "The dog came back again.")):
        (tmp_path / name).write_text(text)
    hierarchical.main([str(tmp_path / "one"), str(tmp_path / "two"), "--model", str(folder), "--query", "cat on mat"])
    output = capsys.readouterr()
    assert output.out.startswith("cat on mat\n\n") and output.out.count("%  ") == 5
    assert "attention over 17 words on three levels" in output.err
    (tmp_path / "one").write_text("*")
    with pytest.raises(weights.ModelError, match="no sentence"):
        hierarchical.main([str(tmp_path / "one"), "--model", str(folder)])
