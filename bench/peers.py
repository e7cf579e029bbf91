"""The implementations that fastattn is measured against, each bound to its inputs as a `Side`."""

import contextlib
import importlib.util
from dataclasses import replace

import numpy as np

from fastattn import _bench
from fastattn._bench import Side


def numpy(case, q, k, v, mask):
    """Plain NumPy, as written by someone who knows it well."""
    return _bench.numpy_side(case, q, k, v, mask)


def tensor(array):
    """The torch tensor that shares the memory of an array."""
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def torch(case, q, k, v, mask):
    """``torch.nn.functional.scaled_dot_product_attention``, told to compute what `case` asks for.

    Its ``is_causal`` aligns the first query with the first key, ours the last with the last: the same thing for square
    scores. Elsewhere torch needs a mask, which is made here, outside the measured time.
    """
    import torch

    keywords = {}
    q_len, kv_len = case.shape[3:5]
    if case.causal and q_len == kv_len:
        keywords["is_causal"] = True
    elif case.causal:
        keywords["attn_mask"] = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
    if mask is not None:
        # A float mask has to have the dtype of the queries.
        keywords["attn_mask"] = tensor(mask if mask.dtype == bool else mask.astype(q.dtype, copy=False))
    if case.shape[1] != case.shape[2]:
        keywords["enable_gqa"] = True
    attend = torch.nn.functional.scaled_dot_product_attention
    tensors = [tensor(array) for array in (q, k, v)]
    return Side("torch", lambda: attend(*tensors, **keywords), lambda out: out.float().numpy())


def fastattn_float32(case, q, k, v, mask):
    """Our own float32 call on the same numbers, at the highest precision."""
    case = replace(case, dtype="float32", precision="highest")
    side = _bench.fastattn_side(case, *(array.astype(np.float32) for array in (q, k, v)), mask)
    return Side("fastattn-float32", side.call)


PEERS = {"torch": torch, "numpy": numpy, "fastattn-float32": fastattn_float32}


def installed():
    """The names of the peers that can run here."""
    return [name for name in PEERS if name != "torch" or importlib.util.find_spec("torch")]


@contextlib.contextmanager
def same_threads(n):
    """Run fastattn, NumPy's BLAS and torch with `n` threads each."""
    if importlib.util.find_spec("torch"):
        # Before threadpoolctl looks for the libraries that are loaded.
        import torch

        torch.set_num_threads(n)
    with _bench.same_threads(n):
        yield


def versions():
    """Which peers are installed, and what they run on."""
    if not importlib.util.find_spec("torch"):
        return {}
    import torch

    return {"torch": f"{torch.__version__} ({torch.backends.cpu.get_cpu_capability()})"}
