"""Against PyTorch: the same meaning, and errors that are no larger."""

import functools
import re

import numpy as np
import pytest
from inputs import random_qkv
from oracle import attention as exact_attention, ulp

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


class ByDLPack:
    """A tensor of a library that speaks DLPack and nothing else."""

    def __init__(self, tensor):
        self._tensor = tensor

    def __dlpack__(self):
        return self._tensor.__dlpack__()

    def __dlpack_device__(self):
        return self._tensor.__dlpack_device__()


def test_bfloat16_by_dlpack():
    pytest.importorskip("ml_dtypes")
    tensors = [torch.from_numpy(x).to(torch.bfloat16) for x in random_qkv(1, 2, 9, 33, 16)]
    np.testing.assert_array_equal(fastattn.attention(*map(ByDLPack, tensors)), fastattn.attention(*tensors))


UNFIT = [
    *[
        (
            lambda dtype=dtype: torch.ones(2, 5, 8, dtype=dtype, requires_grad=True),
            f"must not require a gradient, since there is no backward pass; got a {dtype} tensor that does: give NAME.detach()",
        )
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    ],
    (
        lambda: torch.ones(2, 5, 8, device="meta"),
        "must be an array in the memory of the CPU; got a tensor on the meta device, without numbers",
    ),
    (
        lambda: torch.ones(2, 5, 8).to(torch.float8_e4m3fn),
        "must be an array that NumPy can see; got a torch.float8_e4m3fn tensor",
    ),
    (
        lambda: torch.ones(5, 8).to_sparse(),
        "must be a strided array; got a tensor of layout torch.sparse_coo: give NAME.to_dense()",
    ),
]


@pytest.mark.parametrize("make, message", UNFIT, ids=[message[-40:] for _, message in UNFIT])
def test_tensors_that_are_no_arrays(make, message):
    """Each error says what is missing, and what to do."""
    good = torch.ones(2, 5, 8)
    for position, name in enumerate(["q", "k", "v"]):
        arguments = [good] * 3
        arguments[position] = make()
        with pytest.raises(TypeError, match=re.escape(f"{name} {message.replace('NAME', name)}")):
            fastattn.attention(*arguments)
    with pytest.raises(TypeError, match=re.escape(f"sinks {message.replace('NAME', 'sinks')}")):
        fastattn.attention(good, good, good, sinks=make())


# Accuracy


def random_input(seed):
    return random_qkv(1, 4, 512, 512, 64, seed=seed), {}


def peaked_input(seed):
    """Logits of about 100."""
    q, k, v = random_qkv(1, 4, 512, 512, 64, seed=seed)
    return (q * 25, k, v), {}


def long_input(seed):
    return random_qkv(1, 1, 8, 65_536, 64, seed=seed), {}


def causal_input(seed):
    return random_qkv(1, 4, 512, 512, 64, seed=seed), {"is_causal": True}


def masked_input(seed):
    mask = np.random.default_rng(seed).random((512, 512)) < 0.7
    return random_qkv(1, 4, 512, 512, 64, seed=seed), {"mask": mask}


INPUTS = [random_input, peaked_input, long_input, causal_input, masked_input]


@functools.cache
def exact_and_peer(make, seed):
    """The input, the float64 answer and torch's largest error in each head."""
    (q, k, v), options = make(seed)
    keywords = {"mask": options["mask"]} if "mask" in options else {}
    if options.get("is_causal"):
        keywords = {"causal": True, "query_offset": 0}
    expected, _ = exact_attention(q, k, v, **keywords)
    return (q, k, v), keywords, expected, largest_errors(peer(q, k, v, **options), expected)


def largest_errors(actual, expected):
    return np.abs(actual - expected).max(axis=(0, 2, 3))


@pytest.mark.parametrize("make", INPUTS)
def test_as_accurate_as_torch(engine, make):
    """The largest error against float64 is at most torch's on the same float32 input.

    A maximum is a matter of luck, hence its mean over heads and seeds. The engine sums products in parts and is better; the
    other backends are as good as the plain formula, and get some slack.
    """
    ours, theirs = [], []
    for seed in range(3):
        qkv, keywords, expected, peer_errors = exact_and_peer(make, seed)
        ours.append(largest_errors(fastattn.attention(*qkv, **keywords), expected))
        theirs.append(peer_errors)
    assert np.mean(ours) <= np.mean(theirs) * (1 if engine.backend == "native" else 1.25)
