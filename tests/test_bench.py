"""The figures of ``bench`` are computed right. A clock that is ours stands in for the real one: nothing is timed."""

import argparse
import functools
import importlib
import json
import math
import pathlib
import sys
import types
from dataclasses import replace

import numpy as np
import pytest

from fastattn import _bench
from fastattn._bench import Case, Side


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until its `advance` is called."""
    state = types.SimpleNamespace(now=0.0)

    def advance(seconds):
        state.now += seconds

    fake = types.SimpleNamespace(perf_counter=lambda: state.now, process_time=lambda: 0.0, sleep=advance)
    monkeypatch.setattr(_bench, "time", fake)
    return types.SimpleNamespace(advance=advance)


@pytest.mark.parametrize(
    ("case", "flops", "kv_bytes", "speed"),
    [
        (Case("a", (1, 8, 8, 2048, 2048, 64)), 8589934592, 8388608, "859 GF/s"),
        (Case("b", (1, 8, 8, 2048, 2048, 64), causal=True), 4294967296, 8388608, "429 GF/s"),
        (Case("c", (2, 8, 2, 16, 64, 32), causal=True), 2097152, 65536, "0.21 GF/s"),
        (Case("d", (1, 32, 8, 1, 8192, 128), "bfloat16"), 134217728, 33554432, "3.36 GB/s"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_work_and_speed(case, flops, kv_bytes, speed):
    assert (case.flops, case.kv_bytes, case.speed(0.01)) == (flops, kv_bytes, speed)


def test_speed_of_a_call_that_is_all_overhead():
    assert Case("e", (1, 1, 1, 1, 16, 64)).speed(4.25e-6) == "4.25 us"


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-6), ("float16", 2e-3)])
def test_baseline_agrees_with_float64(mask, causal, dtype, bound):
    case = Case("x", (2, 6, 2, 17, 29, 24), dtype, causal, mask)
    q, k, v, array = case.inputs()
    out = _bench.numpy_attention(q, k, v, array, causal)
    assert out.dtype == q.dtype and out.shape == q.shape
    assert 0 < _bench.max_error(out, q, k, v, array, causal) < bound


def test_error_is_found_in_first_and_last_row():
    q, k, v, _ = Case("x", (2, 4, 2, 50, 20, 8)).inputs()
    for position in [(0, 0, 0, 3), (-1, -1, -1, -1)]:
        out = _bench.numpy_attention(q, k, v)
        out[position] += 0.5
        assert _bench.max_error(out, q, k, v, rows=4) == pytest.approx(0.5, abs=1e-5)
        out[position] = np.nan
        assert math.isnan(_bench.max_error(out, q, k, v, rows=4))


def test_sides_alternate_and_short_calls_repeat(clock):
    order = []

    def side(name, seconds):
        def call():
            order.append(name)
            clock.advance(seconds)

        return call

    taken = _bench.alternate([side("a", 0.5), side("b", 2.0)], rounds=4, min_time=1.0)
    assert taken == [pytest.approx([0.5] * 4), pytest.approx([2.0] * 4)]
    assert order == ["a", "b"] + ["a", "a", "b"] * 4


def test_budget_ends_after_three_rounds(clock):
    taken = _bench.alternate([lambda: clock.advance(1.0)], rounds=9, min_time=0.1, budget=2.0)
    assert len(taken[0]) == 3


def test_duel(clock):
    case = Case("x", (1, 2, 1, 5, 7, 8))
    q, k, v, mask = case.inputs()
    right = _bench.numpy_attention(q, k, v)
    # The call that is judged, the one that counts repeats, then the rounds.
    durations = iter([1.0, 1.0, 1.0, 2.0, 4.0])

    def fast():
        clock.advance(next(durations))
        return right

    def slow():
        clock.advance(6.0)
        return list(right + np.float32(0.25))

    result = _bench.duel(case, Side("fast", fast), Side("slow", slow, np.array), (q, k, v, mask), rounds=3)
    assert result["seconds"] == {"fast": pytest.approx([1.0, 2.0, 4.0]), "slow": pytest.approx([6.0] * 3)}
    assert result["median"] == {"fast": pytest.approx(2.0), "slow": pytest.approx(6.0)}
    assert result["ratio"] == pytest.approx(3.0)
    assert result["spread"] == pytest.approx([2.25, 4.5])
    assert result["error"]["fast"] < 1e-6
    assert result["error"]["slow"] == pytest.approx(0.25, abs=1e-5)
    assert (result["name"], result["shape"], result["rounds"]) == ("x", case.shape, 3)


def test_table(capsys):
    _bench.print_table(["case", "time"], [["a", "10 ms"], ["longer", "1 s"]])
    assert capsys.readouterr().out.splitlines() == ["case     time", "------  -----", "a       10 ms", "longer    1 s"]


@pytest.fixture
def tiny(monkeypatch, clock):
    """Two small cases, and sides that take a known time."""
    cases = (Case("one", (1, 2, 1, 5, 7, 8)), Case("two", (1, 2, 2, 6, 6, 8), causal=True))
    monkeypatch.setattr(_bench, "CASES", cases)

    def slowed(side, seconds, *args):
        inner = side(*args)
        return Side(inner.name, lambda: clock.advance(seconds) or inner.call())

    for name, seconds in (("fastattn_side", 1.0), ("numpy_side", 2.5)):
        monkeypatch.setattr(_bench, name, functools.partial(slowed, getattr(_bench, name), seconds))


def test_command_prints_a_table(tiny, capsys):
    assert _bench.main(["--threads", "1"]) == 0
    captured = capsys.readouterr()
    rows = [line.split() for line in captured.out.splitlines() if line.startswith(("one", "two"))]
    assert [row[0] for row in rows] == ["one", "two"]
    for row in rows:
        assert " ".join(row).count("2.50 x") == 1
        assert float(row[-1]) < 1e-6
    assert captured.err.splitlines() == ["[1/2] one (1, 2/1, 5, 7, 8)", "[2/2] two (1, 2/2, 6, 6, 8)"]


def test_command_writes_json(tiny, capsys, tmp_path):
    assert _bench.main(["--json", "--dtype", "float16", "--backend", "numpy"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert _bench.main(["--json", str(tmp_path / "x.json")]) == 0
    written = json.loads((tmp_path / "x.json").read_text())
    assert [result["dtype"] for result in printed["results"]] == ["float16"] * 2
    for result in printed["results"] + written["results"]:
        assert result["ratio"] == pytest.approx(2.5)
        assert result["plan"]["backend"]
    assert {result["plan"]["backend"] for result in printed["results"]} == {"numpy"}
    assert printed["environment"]["threads"] >= 1


def test_command_leaves_out_what_it_has_no_time_for(tiny, clock, capsys, monkeypatch):
    monkeypatch.setattr(_bench, "environment", lambda threads: {})
    inputs = Case.inputs
    monkeypatch.setattr(Case, "inputs", lambda case: clock.advance(60.0) or inputs(case))
    assert _bench.main([]) == 0
    out = capsys.readouterr().out
    assert "left out: two (40 s were over)" in out
    assert not any(line.startswith("two") for line in out.splitlines())


def test_command_refuses_nonsense(capsys):
    for arguments in (["--threads", "0"], ["--dtype", "float64"], ["--backend", "none"]):
        with pytest.raises(SystemExit) as caught:
            _bench.main(arguments)
        assert caught.value.code == 2
    assert "0 is not positive" in capsys.readouterr().err


@pytest.fixture
def judge(monkeypatch):
    """The module bench/compare.py."""
    folder = pathlib.Path(__file__).parent.parent / "bench"
    if not folder.is_dir():
        pytest.skip("the folder bench is not here")
    monkeypatch.syspath_prepend(folder)
    return importlib.import_module("compare")


@pytest.mark.parametrize(
    ("ours", "our_error", "missed"),
    [(1.0, 0.0, []), (2.0, 0.0, ["slow"]), (1.0, 0.5, ["inexact"]), (2.0, np.nan, ["slow", "inexact"])],
)
def test_judge(judge, clock, monkeypatch, ours, our_error, missed):
    def side(name, seconds, error):
        def bind(case, q, k, v, mask):
            out = _bench.numpy_attention(q, k, v) + np.float32(error)
            return Side(name, lambda: clock.advance(seconds) or out)

        return bind

    monkeypatch.setattr(_bench, "fastattn_side", side("fastattn", ours, our_error))
    monkeypatch.setitem(judge.peers.PEERS, "torch", side("torch", 3.0, 0.25))
    monkeypatch.setattr(judge.shapes, "target", lambda case, peer, isa: 2.0)
    args = argparse.Namespace(rounds=3, min_time=0.1, rows=64)
    result = judge.judge(Case("x", (1, 2, 1, 5, 7, 8)), "torch", args)
    assert result["ratio"] == pytest.approx(3.0 / ours)
    assert (result["target"], result["missed"]) == (2.0, missed)


def test_another_build_is_a_peer(judge, tmp_path):
    package = tmp_path / "fastattn"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from fastattn._answer import ANSWER\n"
        "def set_num_threads(n): pass\n"
        "def attention(q, k, v, **keywords): return ANSWER, sorted(keywords)\n"
    )
    (package / "_answer.py").write_text("ANSWER = 'of the other build'\n")
    before = dict(sys.modules), list(sys.path)
    bind = judge.peers.other_build(str(tmp_path))
    assert (dict(sys.modules), list(sys.path)) == before
    side = bind(Case("x", (1, 1, 1, 1, 1, 1), causal=True), None, None, None, None)
    assert (side.name, side.call()) == ("before", ("of the other build", ["causal"]))


def test_peers_are_asked_for_what_they_compute(judge):
    case = Case("x", (1, 1, 1, 4, 8, 8))
    assert judge.peers.sensible(case, "onnxruntime")
    for change in ({"causal": True}, {"mask": "bool"}, {"dtype": "bfloat16"}, {"precision": "high"}, {"layout": "BLHD"}):
        assert not judge.peers.sensible(replace(case, **change), "onnxruntime")
        assert judge.peers.sensible(replace(case, **change), "torch")
    assert not judge.peers.sensible(case, "fastattn-float32")
    assert judge.peers.sensible(replace(case, dtype="float16"), "fastattn-float32")


def test_targets(judge):
    cases = {(case.name, case.dtype, case.precision): case for case in judge.shapes.CASES}
    assert len(cases) == len(judge.shapes.CASES)

    def target(name, dtype, precision, peer, isa):
        return judge.shapes.target(cases[name, dtype, precision], peer, isa)

    assert target("square-64", "float32", "highest", "torch", "avx512") == 1.3
    assert target("square-64", "float32", "highest", "torch", "avx2") == 1.0
    assert target("square-64", "float32", "highest", "numpy", "avx512") == 4.0
    assert target("square-64", "float32", "high", "torch", "amx") == 3.0
    assert target("batch", "bfloat16", "highest", "torch", "amx") == 2.5
    assert target("batch", "bfloat16", "highest", "torch", "avx512") is None
    assert target("batch", "float32", "highest", "torch", "avx2") is None
    assert target("square-128", "float16", "highest", "fastattn-float32", "avx512") == 0.95
    assert target("square-128", "bfloat16", "highest", "fastattn-float32", "avx512") == 1.3
    assert target("square-128", "float32", "medium", "torch", "amx") is None
    with_target = {name for (name, *_), case in cases.items() if judge.shapes.target(case, "torch", "avx512")}
    assert with_target == {
        *("call", "batch", "masked", "gqa-causal", "square-64", "square-128", "causal-64", "causal-128")
    }
