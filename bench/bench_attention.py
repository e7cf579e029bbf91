"""Times of fastattn and its peers under pytest-benchmark, one group for each case.

    pytest bench/bench_attention.py -k "square and float32"

For ratios that a verdict can rest on, use compare.py: here the sides run one after the other.
"""

import peers
import pytest
import shapes

import fastattn
from fastattn import _bench

_SIDES = {"fastattn": _bench.fastattn_side, **{name: peers.PEERS[name] for name in ("numpy", "torch")}}


@pytest.fixture(scope="module", autouse=True)
def _threads():
    with peers.same_threads(fastattn.get_num_threads()):
        yield


@pytest.mark.parametrize("side", _SIDES)
@pytest.mark.parametrize("case", shapes.CASES, ids=lambda case: f"{case.name}-{case.dtype}-{case.precision}")
def test_attention(benchmark, case, side):
    if side == "torch":
        pytest.importorskip("torch")
    bound = _SIDES[side](case, *case.inputs())
    benchmark.group = f"{case.name} {case.dtype} {case.precision} ({case})"
    benchmark.extra_info["flops"] = case.flops
    bound.call()
    _bench.settle()
    benchmark(bound.call)
