"""Attention through block masks, against the same mask as an array."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from inputs import DTYPES, random_qkv
from oracle import check
from patterns import BLOCK_SIZES, PATTERNS

import fastattn
from fastattn import BlockMask

EXAMPLES = Path(__file__).parents[1] / "examples"


def random_mask(shape, block_size, seed=0, listed=0.4):
    """Whole and random blocks, absent blocks, and block rows that see nothing."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((*shape[:2], *(-(-n // block_size) for n in shape[2:])))
    kind = np.where(coarse < listed / 2, 2, np.where(coarse < listed, 1, 0))
    kind[:, :, 1:2] = 0
    fine = kind.repeat(block_size, axis=2).repeat(block_size, axis=3)[:, :, : shape[2], : shape[3]]
    return BlockMask.from_dense((fine == 2) | ((fine == 1) & (rng.random(shape) < 0.5)), block_size)


def assert_attends(q, k, v, mask, **options):
    """Attention through the block mask is right; returns ``(out, lse)``."""
    out, lse = fastattn.attention(q, k, v, mask=mask, return_lse=True, **options)
    check(out, lse, q, k, v, mask=mask.to_dense(), **options)
    return out, lse


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(engine, block_size, dtype):
    q, k, v = random_qkv(1, 2, 333, 355, 32, 40, dtype=dtype)
    assert_attends(q, k, v, random_mask((1, 1, 333, 355), block_size))
    assert_attends(q, k, v, random_mask((1, 2, 333, 355), block_size, seed=1, listed=0.9))


@pytest.mark.parametrize("block_size", [1, 3, 7, 9, 33])
def test_attention_with_odd_blocks(engine, block_size):
    q, k, v = random_qkv(1, 2, 65, 70, 19)
    assert_attends(q, k, v, random_mask((1, 2, 65, 70), block_size))


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("patterns", [(1, 1), (2, 1), (1, None), (2, None)])
@pytest.mark.parametrize("q_len", [1, 75])
def test_attention_with_grouped_heads(engine, heads, kv_heads, patterns, q_len):
    """Heads that share keys may have patterns of their own."""
    q, k, v = random_qkv(2, heads, q_len, 130, 24, kv_heads=kv_heads, seed=q_len)
    assert_attends(q, k, v, random_mask((patterns[0], patterns[1] or heads, q_len, 130), 16, listed=0.6))


COMPANY = {
    "sinks": {"sinks": np.float32([0.5, -3, 2, 0])},
    "softcap": {"softcap": 2.5},
    "scale": {"scale": -0.3},
    "alibi": {"alibi_slopes": np.float32([0.1, 0.5, 0, 1])},
    "causal": {"causal": True},
    "causal from the top": {"causal": True, "query_offset": 0},
    "causal from before the keys": {"causal": True, "query_offset": -40},
    "causal with offsets": {"causal": True, "query_offset": np.array([37, 90])},
    "window": {"window": (40, 13)},
    "lengths": {"kv_lengths": np.array([0, 101])},
    "everything": {
        "causal": True,
        "window": (90, None),
        "kv_lengths": np.array([150, 77]),
        "softcap": 3.0,
        "sinks": np.float32([0, 1, 2, 3]),
        "alibi_slopes": np.float32([[0.1, 0.2, 0.3, 0.4], [0, 1, 0, 1]]),
        "query_offset": np.array([20, 50]),
    },
}


@pytest.mark.parametrize("name", COMPANY)
@pytest.mark.parametrize("block_size", [16, 48, 100])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_in_company(engine, name, block_size, dtype):
    q, k, v = random_qkv(2, 4, 110, 150, 20, kv_heads=2, dtype=dtype, seed=block_size)
    assert_attends(q, k, v, random_mask((1, 4, 110, 150), block_size, listed=0.7), **COMPANY[name])


@pytest.mark.parametrize("name", ["causal", "window", "strided", "fixed", "longformer", "widely dilated"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_through_patterns(engine, name, dtype):
    build, options, _ = PATTERNS[name]
    q, k, v = random_qkv(1, 2, 300, 333, 32, dtype=dtype)
    assert_attends(q, k, v, build(300, k_len=333, **options, block_size=32))


def test_attention_when_some_rows_see_much_more_than_others(engine):
    q, k, v = random_qkv(1, 2, 1000, 1000, 16)
    assert_attends(q, k, v, BlockMask.longformer(1000, window=20, global_tokens=[0, 500], block_size=32))


def test_a_mask_of_everything_is_no_mask(engine):
    if engine.backend == "numba":
        pytest.skip("steps from block to block, and so through the keys in another rhythm than without a mask")
    q, k, v = random_qkv(1, 3, 200, 700, 32)
    full = ~BlockMask(64, np.zeros(5, int), [], (200, 700))
    expected = fastattn.attention(q, k, v, return_lse=True, causal=True)
    for actual, wanted in zip(fastattn.attention(q, k, v, return_lse=True, causal=True, mask=full), expected):
        np.testing.assert_array_equal(actual, wanted)


def test_a_mask_of_nothing(engine):
    q, k, v = random_qkv(1, 2, 50, 70, 8)
    nothing = BlockMask(32, [0, 0, 0], [], (50, 70))
    out, lse = assert_attends(q, k, v, nothing)
    assert not out.any() and (lse == -np.inf).all()
    _, lse = assert_attends(q, k, v, nothing, sinks=np.float32([0.5, 1]))
    np.testing.assert_array_equal(lse[0, :, 0], np.float32([0.5, 1]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("block_size", [16, 48])
def test_absent_blocks_are_not_touched(engine, bad, block_size):
    q, k, v = random_qkv(1, 2, 100, 300, 24)
    listed = np.arange(300) // block_size % 3 != 1
    mask = BlockMask.causal(100, k_len=300, block_size=block_size) & BlockMask.from_dense(np.tile(listed, (100, 1)), block_size)
    clean = fastattn.attention(q, k, v, mask=mask)
    k[:, :, ~listed], v[:, :, ~listed] = bad, bad
    np.testing.assert_array_equal(fastattn.attention(q, k, v, mask=mask), clean)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("block_size", [16, 48])
def test_hidden_elements_are_not_touched(engine, bad, block_size):
    """The poison of a key reaches the rows that see it, and of the others in the same block none."""
    q, k, v = random_qkv(1, 2, 100, 160, 24)
    mask = random_mask((1, 1, 100, 160), block_size)
    visible = mask.to_dense()[0, 0]
    for key in (*np.flatnonzero(~visible.any(axis=0))[:3], *np.flatnonzero(visible.any(axis=0) & ~visible.all(axis=0))[::50]):
        v[:, :, key] = bad
        k[:, :, key] = bad
        assert_attends(q, k, v, mask)


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_company_change_no_bits(engine, dtype, precision):
    q, k, v = random_qkv(3, 4, 200, 600, 32, kv_heads=2, dtype=dtype)
    mask = random_mask((3, 4, 200, 600), 48)

    def results(q, k, v, mask):
        return fastattn.attention(q, k, v, mask=mask, causal=True, precision=precision, return_lse=True)

    with fastattn.threads(1):
        expected = results(q, k, v, mask)
    for count in (2, 3, 7):
        with fastattn.threads(count):
            for got, wanted in zip(results(q, k, v, mask), expected):
                np.testing.assert_array_equal(got, wanted)
    dense = mask.to_dense()
    for b in range(3):
        alone = results(q[b], k[b], v[b], BlockMask.from_dense(dense[b], 48))
        for got, wanted in zip(alone, expected):
            np.testing.assert_array_equal(got, wanted[b])


def test_decoding_through_a_mask(engine):
    """One query and many keys: the split over keys must not depend on what is listed."""
    q, k, v = random_qkv(1, 4, 1, 9000, 32, kv_heads=1)
    for listed in (0.02, 0.3, 1.0):
        assert_attends(q, k, v, BlockMask.from_dense(np.random.default_rng(0).random((1, 142)).repeat(64, axis=1)[:, :9000] < listed, 64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_example_runs(tmp_path, dtype):
    picture = tmp_path / "picture.png"
    plots = importlib.util.find_spec("matplotlib") is not None
    result = subprocess.run(
        [sys.executable, EXAMPLES / "long_context.py", "--length", "3000", "--dtype", dtype, "--picture", picture],
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0
    for name in ("window 1024", "strided 1024", "bigbird", "top-k 48", "top-k 90 %", "dense", "int8", "2048 of an index", "32 top pages"):
        assert name in result.stdout
    assert picture.exists() == plots


@pytest.mark.parametrize("shape", [(1, 1, 50, 41), (1, 1, 51, 40), (3, 1, 50, 40), (1, 3, 50, 40)])
def test_attention_refuses_a_mask_for_other_arrays(engine, shape):
    q, k, v = random_qkv(2, 2, 50, 40, 8)
    rows = shape[0] * shape[1] * -(-shape[2] // 16)
    with pytest.raises(ValueError, match=r"mask must be a BlockMask for \(2, 2, 50, 40\)"):
        fastattn.attention(q, k, v, mask=BlockMask(16, np.zeros(rows + 1, int), [], shape))
