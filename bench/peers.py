"""The implementations that fastattn is measured against, each bound to its inputs as a `Side`."""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import sys
from dataclasses import replace

import numpy as np

import fastattn
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


def onnxruntime(case, q, k, v, mask):
    """The operator ``Attention`` of ONNX's opset 23, as onnxruntime computes it; `sensible` says for which cases."""
    import onnxruntime
    from onnx import TensorProto, helper

    arrays = dict(zip("qkv", (q, k, v)))
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in arrays.items()]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, q.shape)
    node = helper.make_node("Attention", list(arrays), ["out"], is_causal=int(case.causal))
    model = helper.make_model(
        helper.make_graph([node], "attention", inputs, [output]), opset_imports=[helper.make_opsetid("", 23)], ir_version=10
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = fastattn.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Side("onnxruntime", lambda: session.run(None, arrays)[0])


def other_build(folder):
    """The peer that is another build of this package, whose folder `fastattn` lies in `folder`: what has a change cost?"""

    def modules():
        return [name for name in sys.modules if name.partition(".")[0] == "fastattn"]

    ours = {name: sys.modules.pop(name) for name in modules()}
    sys.path.insert(0, folder)
    try:
        other = importlib.import_module("fastattn")
        row = np.zeros((1, 1, 1, 4), np.float32)
        other.attention(row, row, row)  # whatever it loads late is its own as well
    finally:
        sys.path.remove(folder)
        for name in modules():
            del sys.modules[name]
        sys.modules.update(ours)

    def bind(case, q, k, v, mask):
        other.set_num_threads(ours["fastattn"].get_num_threads())
        return replace(_bench.fastattn_side(case, q, k, v, mask, attention=other.attention), name="before")

    return bind


PEERS = {"torch": torch, "onnxruntime": onnxruntime, "numpy": numpy, "fastattn-float32": fastattn_float32}
_NEEDS = {"torch": ("torch",), "onnxruntime": ("onnxruntime", "onnx")}


def installed():
    """The names of the peers that can run here."""
    return [name for name in PEERS if all(importlib.util.find_spec(package) for package in _NEEDS.get(name, ()))]


def sensible(case, peer):
    """Whether `peer` computes what `case` asks for, and not just what our own side computes."""
    if peer == "fastattn-float32":
        return (case.dtype, case.precision) != ("float32", "highest")
    if peer == "onnxruntime":
        aligned = not case.causal or case.shape[3] == case.shape[4]
        return (case.dtype, case.precision, case.mask) == ("float32", "highest", None) and aligned and case.layout == "BHLD"
    return True


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
    found = {}
    if importlib.util.find_spec("torch"):
        import torch

        found["torch"] = f"{torch.__version__} ({torch.backends.cpu.get_cpu_capability()})"
    if importlib.util.find_spec("onnxruntime"):
        found["onnxruntime"] = importlib.metadata.version("onnxruntime")
    return found
