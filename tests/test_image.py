"""The example that takes the noise out of an image by attention."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from fastattn import BlockMask

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import image  # noqa: E402


def an_image(seed=0):
    """Two halves, and noise."""
    clean = np.zeros((12, 12, 3), np.float32)
    clean[:, 6:] = 0.8
    return clean, clean + 0.1 * np.random.default_rng(seed).standard_normal(clean.shape, dtype=np.float32)


def test_patches_are_neighbourhoods():
    rows = image.patches(np.arange(12, dtype=np.float32).reshape(3, 4, 1), 1)
    assert rows.shape == (12, 9) and sorted(rows[5]) == [0, 1, 2, 4, 5, 6, 8, 9, 10]


@pytest.mark.parametrize("window", [None, 5])
def test_attention_is_the_mean_of_alike_patches(engine, window):
    _, noisy = an_image()
    rows = image.patches(noisy, 1)
    mask = None if window is None else BlockMask.neighborhood((12, 12), window=window, block_size=16)
    actual, _ = image.denoised(*image.queries_and_keys(rows, 0.7), noisy, mask)
    distance = ((rows[:, None].astype(np.float64) - rows[None]) ** 2).sum(-1)
    p = np.exp(-0.7 * distance) * (1 if mask is None else mask.to_dense()[0, 0])
    p /= p.sum(1, keepdims=True)
    np.testing.assert_allclose(actual.reshape(144, 3), p @ noisy.reshape(144, 3), atol=1e-5)


def test_noise_goes():
    clean, noisy = an_image()
    better, _ = image.denoised(*image.queries_and_keys(image.patches(noisy, 2), 1.0), noisy)
    assert image.quality(better, clean) > image.quality(noisy, clean) + 5


def test_program_draws_a_picture(tmp_path, capsys):
    path = tmp_path / "picture.png"
    image.main(["--size", "32", "--window", "9", "--output", str(path)])
    assert path.read_bytes().startswith(b"\x89PNG")
    assert re.search(r"full +[\d.]+ dB +[\d.]+ ms\n +window +[\d.]+ dB", capsys.readouterr().out)
    matplotlib.pyplot.imsave(tmp_path / "own.png", an_image()[0].clip(0, 1))
    image.main(["--image", str(tmp_path / "own.png"), "--size", "12", "--window", "5", "--output", str(path)])


@pytest.mark.parametrize("arguments", [["--size", "4"], ["--window", "200"], ["--noise", "0"]], ids=str)
def test_command_line_refuses_senseless_numbers(arguments, capsys):
    with pytest.raises(SystemExit):
        image.parse_arguments(arguments)
    assert "--size must be" in capsys.readouterr().err
