"""The command that says what a quantised cache costs in perplexity."""

import sys

import numpy as np
import pytest
from tiny_model import smollm2, tiny_path  # noqa: F401

from fastattn import __main__, _quality as quality


@pytest.fixture(scope="module")
def tiny(tiny_path):
    return smollm2.load(tiny_path)


def test_perplexity_is_that_of_one_pass_over_the_text(tiny, monkeypatch):
    model, tokenizer = tiny
    tokens = tokenizer.encode("the cat sat at the mat, at the hat")
    logits = model.logits(model.forward(tokens, model.new_cache())).astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = np.exp(-np.log(p[np.arange(len(tokens) - 1), tokens[1:]]).mean())
    monkeypatch.setattr(quality, "PREFILL", 7)
    for dtype, options, tolerance in (("float32", {}, 1e-5), ("int8", {}, 0.02), ("int8", {"rotate": True}, 0.02)):
        perplexity, _, size = quality.measure(model, tokens, dtype, options)
        np.testing.assert_allclose(perplexity, expected, rtol=tolerance)
        assert size == 2 * 2 * 2 * (64 if dtype == "float32" else 20)  # blocks, keys and values, heads


def test_the_program_prints_a_table_and_saves_a_picture(tiny_path, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    text, picture = tmp_path / "text", tmp_path / "picture.png"
    text.write_text("the cat sat at the mat " * 5)
    assert __main__.main(["quality", "--model", str(tiny_path), "--text", str(text), "--tokens", "40", "--picture", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "40 tokens" in printed and "int8, rotated" in printed and "int4 needs heads" in printed
    assert picture.stat().st_size > 1000
    assert __main__.main(["quality", "--model", str(tmp_path / "none")]) == 1


def test_packages_that_are_not_there_are_named(tiny_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastattn.models.smollm2", None)
    assert __main__.main(["quality", "--model", str(tiny_path)]) == 2
    assert "fastattn[examples]" in capsys.readouterr().err
