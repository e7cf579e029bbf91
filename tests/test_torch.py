"""Against PyTorch: the same meaning, and errors that are no larger."""

import numpy as np
import pytest
from inputs import random_qkv
from oracle import attention as exact_attention
from oracle import ulp

import fastattn

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("engine")]


def peer(q, k, v, mask=None, **options):
    """torch's scaled_dot_product_attention of NumPy arrays."""
    tensors = [torch.from_numpy(np.ascontiguousarray(x)) for x in (q, k, v)]
    mask = None if mask is None else torch.from_numpy(np.ascontiguousarray(mask))
    return torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask, **options).numpy()


def agree(q, k, v, mask=None, **options):
    ours = fastattn.scaled_dot_product_attention(q, k, v, mask, **options)
    theirs = peer(q, k, v, mask, **options)
    assert ours.dtype == theirs.dtype
    tolerance = 4 * ulp(q.dtype) if q.dtype != np.float32 else 3e-6
    np.testing.assert_allclose(ours.astype(np.float32), theirs.astype(np.float32), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("q_len, kv_len", [(1, 1), (33, 33), (20, 47), (47, 20), (1, 300)])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.7}, {"scale": -0.2, "is_causal": True}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_agrees(q_len, kv_len, options, dtype):
    agree(*random_qkv(2, 3, q_len, kv_len, 24, 16, dtype=dtype), **options)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 3])
def test_agrees_on_grouped_heads(is_causal, kv_heads):
    agree(*random_qkv(2, 6, 20, 33, 16, kv_heads=kv_heads), is_causal=is_causal, enable_gqa=True)


@pytest.mark.parametrize("shape", [(2, 3, 20, 47), (2, 1, 20, 47), (1, 1, 1, 47), (20, 47)])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_agrees_on_masks(shape, kind):
    q, k, v = random_qkv(2, 3, 20, 47, 16)
    rng = np.random.default_rng(0)
    mask = rng.random(shape) < 0.6
    mask[..., 0] = True
    if kind == "additive":
        mask = np.where(mask, rng.standard_normal(shape), -np.inf).astype(np.float32)
    agree(q, k, v, mask)


def test_tensors_are_arrays():
    """Tensors go in without a copy; so do those of bfloat16, which NumPy does not know."""
    q, k, v = random_qkv(1, 2, 9, 33, 16)
    tensors = [torch.from_numpy(x) for x in (q, k, v)]
    np.testing.assert_array_equal(fastattn.attention(*tensors), fastattn.attention(q, k, v))
    pytest.importorskip("ml_dtypes")
    ours = fastattn.attention(*(x.to(torch.bfloat16) for x in tensors))
    assert ours.dtype.name == "bfloat16"
    np.testing.assert_allclose(ours.astype(np.float32), fastattn.attention(q, k, v), atol=0.05)


# Accuracy


def random_input():
    return random_qkv(1, 4, 512, 512, 64), {}


def peaked_input():
    """Logits of about 100."""
    q, k, v = random_qkv(1, 4, 512, 512, 64)
    return (q * 25, k, v), {}


def long_input():
    return random_qkv(1, 1, 24, 65_536, 64), {}


def causal_input():
    return random_qkv(1, 4, 512, 512, 64), {"is_causal": True}


def masked_input():
    q, k, v = random_qkv(1, 4, 512, 512, 64)
    mask = np.random.default_rng(1).random((512, 512)) < 0.7
    return (q, k, v), {"mask": mask}


@pytest.mark.parametrize("case", [random_input, peaked_input, long_input, causal_input, masked_input])
def test_as_accurate_as_torch(engine, case):
    """The largest error against float64 is at most torch's on the same float32 input.

    The NumPy backend is the plain formula, neither better nor worse than torch: chance decides which of two has the
    larger maximum.
    """
    (q, k, v), options = case()
    keywords = {"mask": options["mask"]} if "mask" in options else {}
    if options.get("is_causal"):
        keywords = {"causal": True, "query_offset": 0}
    expected, _ = exact_attention(q, k, v, **keywords)
    ours = np.abs(fastattn.attention(q, k, v, **keywords) - expected).max()
    theirs = np.abs(peer(q, k, v, **options) - expected).max()
    assert ours <= theirs * (1.25 if engine.backend == "numpy" else 1)
