"""The calls that are measured, and how much faster than a peer each has to be."""

from dataclasses import replace

from fastattn import _bench
from fastattn._bench import Case

# Beyond the shapes of `fastattn bench`: what the kernels meet in real programs, and what is hard on accuracy.
_MORE = (
    Case("decode-mha", (1, 8, 8, 1, 32768, 128)),
    Case("odd", (2, 6, 2, 333, 777, 72)),
    Case("cross", (1, 16, 16, 1024, 77, 64)),
    Case("biased", (1, 8, 8, 1500, 1500, 80), mask="float"),
    Case("chunk", (1, 32, 8, 256, 4096, 128), causal=True),
    Case("beside", (1, 24, 24, 1024, 1024, 128), layout="BLHD"),
    Case("wide", (1, 4, 4, 1024, 1024, 256)),
    Case("peaked", (1, 8, 8, 1024, 1024, 64), logits=25.0),
    Case("long", (1, 2, 2, 64, 65536, 128)),
    Case("long-peaked", (1, 2, 2, 64, 65536, 128), logits=25.0),
    Case("tokens-4", (256, 12, 12, 4, 4, 32)),
    Case("tokens-8", (128, 12, 12, 8, 8, 32)),
    Case("tokens-16", (16, 12, 12, 16, 16, 128)),
    Case("keys-77", (1, 16, 16, 1024, 77, 80)),
)

_FLOAT32 = (*_bench.CASES, *_MORE)

_TORCH_FLOAT32 = {
    "square-64": 1.3,
    "square-128": 1.15,
    "causal-64": 1.35,
    "causal-128": 1.35,
    "gqa-causal": 1.6,
    "batch": 1.5,
    "masked": 1.3,
    "call": 2.0,
}

_ONNXRUNTIME_FLOAT32 = {"batch": 1.2, "tokens-4": 1.1, "tokens-8": 1.1, "tokens-16": 1.1, "keys-77": 1.2}

# With AMX: bfloat16, float16, and float32 at precision="high", which competes with torch's float32.
_TORCH_AMX = {
    "square-64": (3.0, 4.0, 3.0),
    "square-128": (2.5, 4.0, 3.0),
    "causal-64": (2.7, 4.0, 3.0),
    "causal-128": (2.7, 4.0, 3.0),
    "gqa-causal": (3.0, 4.0, 3.0),
    "batch": (2.5, 3.0, 2.0),
}

CASES = (
    *_FLOAT32,
    *(replace(case, dtype="bfloat16") for case in _FLOAT32),
    *(replace(case, dtype="float16") for case in _FLOAT32),
    *(
        replace(case, dtype=dtype, precision=precision)
        for dtype, precision in (("float32", "high"), ("float32", "medium"), ("float16", "medium"))
        for case in _FLOAT32
        if case.name in _TORCH_AMX
    ),
)


def target(case, peer, isa):
    """The least ratio of the peer's time to ours when our kernel uses the instruction set `isa`, or None."""
    large = case.shape[3] >= 1000
    exact = case.dtype == "float32" and case.precision == "highest"
    if peer == "numpy":
        return 4.0 if exact and large and case in _bench.CASES else None
    if peer == "onnxruntime":
        return _ONNXRUNTIME_FLOAT32.get(case.name)
    if peer == "before":
        return 1 / 1.03
    if peer == "fastattn-float32":
        without_amx = {"bfloat16": 1.3, "float16": 0.95}
        return without_amx.get(case.dtype) if case.name == "square-128" and isa == "avx512" else None
    if exact and isa == "avx2":
        return 1.0 if large and case.name in _TORCH_FLOAT32 else None
    if exact:
        return _TORCH_FLOAT32.get(case.name)
    if isa == "amx" and case.name in _TORCH_AMX and case.precision != "medium":
        return _TORCH_AMX[case.name][("bfloat16", "float16", "float32").index(case.dtype)]
    return None


def error_limit(case, peer, peer_error, values):
    """The largest error allowed against float64, or None: torch's own, except where `precision` allows more.

    A single query has too few outputs for that: which side's largest error is the larger one would be chance.
    """
    if case.precision != "highest":
        return {"high": 2.0**-14, "medium": 2.0**-8}[case.precision] * float(abs(values).max())
    return peer_error if peer == "torch" and case.shape[3] > 1 else None
