"""The example that drafts by looking up: its trees, and that its text is the one of plain greedy decoding."""

import numpy as np
import pytest
from tiny_model import END, TOKENS, smollm2, tiny_path  # noqa: F401

import generate  # isort: skip # tiny_model says where the examples are
import speculative  # isort: skip


@pytest.fixture(scope="module")
def tiny(tiny_path):
    return smollm2.load(tiny_path)


def test_what_followed_the_same_tokens_is_a_draft():
    text = [1, 2, 3, 4, 5, 9, 1, 2, 3, 7, 8, 1, 2, 3]
    assert speculative.look_up(text, 2, 3) == [[7, 8, 1], [4, 5, 9]]
    assert speculative.look_up(text, 1, 2) == [[7, 8]]
    assert speculative.look_up([1, 2, 3], 2, 3) == []


def test_drafts_that_share_their_beginning_are_a_tree():
    tokens, parents = speculative.tree_of(0, [[5, 6, 7], [5, 8], [9]])
    assert (tokens, parents) == ([0, 5, 6, 7, 8, 9], [-1, 0, 1, 2, 1, 0])
    mask, depth = speculative.visible(parents)
    assert depth.tolist() == [0, 1, 2, 3, 2, 1]
    assert np.flatnonzero(mask[4]).tolist() == [0, 1, 4]


@pytest.mark.parametrize("drafts", [1, 2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_the_text_is_that_of_greedy_decoding(tiny, drafts, seed):
    model = tiny[0]
    prompt = np.random.default_rng(seed).integers(0, len(TOKENS), 12).tolist() * 3
    plain = list(generate.generate(model, prompt, 60, generate.sampler(0, 1, 0)))
    passes = list(speculative.speculate(model, prompt, 60, drafts, 6))
    assert sum(passes, []) == plain
    assert len(passes) <= len(plain)


def test_branches_that_are_not_the_first_are_kept(tiny, monkeypatch):
    """The right continuation behind a wrong one: what was accepted has to move to its place in the cache."""
    model = tiny[0]
    prompt = list(range(40, 60))
    plain = list(generate.generate(model, prompt, 40, generate.sampler(0, 1, 0)))

    def both(text, drafts, length):
        right = plain[len(text) - len(prompt) :][:length]
        return [[(right[0] + 1) % len(TOKENS)], right] if right else []

    monkeypatch.setattr(speculative, "look_up", both)
    passes = list(speculative.speculate(model, prompt, 40, 2, 5))
    assert sum(passes, []) == plain
    assert len(passes) < 15


def test_the_program_says_what_was_accepted(tiny_path, capsys):
    speculative.main(["the cat sat on the mat the cat", "--model", str(tiny_path), "--max-tokens", "20"])
    report = capsys.readouterr().err
    assert "a pass" in report and "tokens/s" in report and "the same text: yes" in report
