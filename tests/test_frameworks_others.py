"""Arrays of other libraries go in as they lie, and results go back: whatever speaks DLPack or the array interface on the CPU."""

import numpy as np
import pytest
from inputs import random_qkv

import fastattn

pytestmark = pytest.mark.torch


def inputs():
    q, k, v = random_qkv(2, 3, 5, 17, 8)
    return (q, k, v), fastattn.attention(q, k, v, causal=True)


@pytest.fixture
def jax():
    jax = pytest.importorskip("jax")
    return jax, jax.devices("cpu")[0]


def test_jax_arrays(jax):
    jax, cpu = jax
    arrays, expected = inputs()
    given = [jax.device_put(x, cpu) for x in arrays]
    out = fastattn.attention(*given, causal=True)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(np.asarray(jax.dlpack.from_dlpack(out)), expected)  # and back
    narrow = [x.astype(jax.numpy.bfloat16) for x in given]
    assert fastattn.attention(*narrow).dtype.name == "bfloat16"
    with pytest.raises(ValueError, match="read-only"):
        fastattn.attention(*given, out=jax.numpy.zeros(out.shape))  # JAX's arrays never change


def test_jax_calls_back(jax):
    """Inside a compiled function, by way of a callback to the host."""
    jax, cpu = jax
    (q, k, v), expected = inputs()

    @jax.jit
    def attend(q, k, v):
        result = jax.ShapeDtypeStruct((*q.shape[:-1], v.shape[-1]), q.dtype)
        return jax.pure_callback(lambda *x: fastattn.attention(*x, causal=True), result, q, k, v)

    with jax.default_device(cpu):
        np.testing.assert_array_equal(np.asarray(attend(q, k, v)), expected)


def test_pyarrow_tensors():
    pyarrow = pytest.importorskip("pyarrow")
    arrays, expected = inputs()
    tensors = [pyarrow.Tensor.from_numpy(x) for x in arrays]
    np.testing.assert_array_equal(fastattn.attention(*tensors, causal=True), expected)
    np.testing.assert_array_equal(pyarrow.Tensor.from_numpy(expected).to_numpy(), expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_results_go_into_a_tensor(dtype):
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in random_qkv(2, 3, 5, 17, 8))
    out = torch.zeros(2, 5, 3, 8, dtype=q.dtype).transpose(1, 2)
    assert fastattn.attention(q, k, v, causal=True, out=out) is out
    torch.testing.assert_close(out, fastattn.torch.attention(q, k, v, causal=True), rtol=0, atol=0)


def test_arrays_elsewhere_are_named():
    torch = pytest.importorskip("torch")
    (q, k, v), _ = inputs()
    with pytest.raises(TypeError, match="k must be an array in the memory of the CPU"):
        fastattn.attention(q, torch.empty(2, 3, 17, 8, device="meta"), v)

    class OnADevice:
        """As CuPy's arrays are."""

        def __dlpack__(self, **options):
            raise BufferError("only its own device can read it")

        def __dlpack_device__(self):
            return 2, 0

    with pytest.raises(TypeError, match="v must be an array in the memory of the CPU"):
        fastattn.attention(q, k, OnADevice())
