"""The judge: is fastattn as much faster than its peers as it has to be, and as exact?

    python bench/compare.py                              # float32 against every peer that is installed
    python bench/compare.py --peer torch --dtype bfloat16 --only square
    python bench/compare.py --isa avx2 --peer torch      # both sides limited to AVX2
    python bench/compare.py --before ../old              # what has changed since another build, in the tree ../old
    python bench/compare.py --list

`fastattn._bench` says how it measures. The exit status is 1 when a target is missed.
"""

import argparse
import os
import re
import statistics
import sys

import peers
import shapes

import fastattn
from fastattn import _bench

# What keeps each library from using more than an instruction set. Most of these are read when a library is loaded.
_LIMITS = {
    "avx2": {
        "FASTATTN_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
    },
    "avx512": {
        "FASTATTN_ISA": "avx512",
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_FP16",
        "OPENBLAS_CORETYPE": "SkylakeX",
    },
}


def main():
    args = _parser().parse_args()
    limits = _LIMITS.get(args.isa, {})
    if any(os.environ.get(name) != value for name, value in limits.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | limits)
    cases = [case for case in shapes.CASES if _selected(case, args)]
    if args.list:
        _bench.print_table(_HEADER[:3], [_names(case) for case in cases])
        return 0
    if args.before:
        peers.PEERS["before"] = peers.other_build(args.before)
    sides = args.peer or (["before"] if args.before else peers.installed())
    duels = [(case, peer) for case in cases for peer in sides if peers.sensible(case, peer)]
    results = []
    with peers.same_threads(args.threads), _bench.Progress(len(duels)) as progress:
        for case, peer in duels:
            progress.step(f"{' '.join(_names(case))} against {peer}")
            results.append(judge(case, peer, args))
    about = _bench.environment(args.threads) | peers.versions() | {"limited to": args.isa or "nothing"}
    _bench.print_environment(about, results)
    pairs = [(case, result) for (case, _), result in zip(duels, results)]
    _bench.print_table(_HEADER, [_row(*pair) for pair in pairs])
    if args.markdown:
        print_markdown(pairs)
    if args.json:
        _bench.write_json(args.json, {"environment": about, "results": results})
    return int(any(result["missed"] for result in results))


def judge(case, peer, args):
    """Measure `case` against one peer; what `fastattn._bench.duel` returns, with the targets and what was missed."""
    inputs = case.inputs()
    plan = _bench.plan(case, *inputs)
    other = peers.PEERS[peer](case, *inputs)
    result = _bench.duel(
        case,
        _bench.fastattn_side(case, *inputs),
        other,
        inputs,
        rounds=args.rounds,
        min_time=args.min_time,
        rows=args.rows,
    )
    target = shapes.target(case, peer, plan["isa"])
    limit = shapes.error_limit(case, peer, result["error"][peer], inputs[2])
    missed = []
    if target is not None and result["ratio"] < target:
        missed.append("slow")
    if limit is not None and not result["error"]["fastattn"] <= limit:
        missed.append("inexact")
    return {**result, "peer": peer, "plan": plan, "target": target, "error_limit": limit, "missed": missed}


def print_markdown(pairs):
    """Print the table of results of the README from pairs of a case and its result against one peer."""
    found = {}
    for case, result in pairs:
        found.setdefault(case, {})[result["peer"]] = result
    print("\n| B, Hq/Hkv, Lq, Lk, D | dtype | fastattn | NumPy | PyTorch | ratio to NumPy | ratio to PyTorch |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for case, by_peer in found.items():
        ours = statistics.median(result["median"]["fastattn"] for result in by_peer.values())
        theirs = [by_peer.get(peer) for peer in ("numpy", "torch")]
        cells = [
            f"{case}{', causal' * case.causal}{f', {case.mask} mask' if case.mask else ''}"
            f"{', peaked logits' * (case.logits > 1)}{', heads side by side' * (case.layout == 'BLHD')}",
            _dtype(case),
            case.speed(ours),
            *(case.speed(result["median"][result["peer"]]) if result else "-" for result in theirs),
            *(f"{result['ratio']:.2f} x" if result else "-" for result in theirs),
        ]
        print(f"| {' | '.join(cells)} |")


_HEADER = [
    *("case", "dtype", "B, Hq/Hkv, Lq, Lk, D", "isa", "peer", "ours", "peer's"),
    *("ratio", "quartiles", "target", "our error", "peer's", "verdict"),
]


def _row(case, result):
    peer, target = result["peer"], result["target"]
    ours, theirs = result["median"]["fastattn"], result["median"][peer]
    return [
        *_names(case),
        result["plan"]["isa"] or "-",
        peer,
        case.speed(ours),
        case.speed(theirs),
        f"{result['ratio']:.2f} x",
        "{:.2f}-{:.2f}".format(*result["spread"]),
        "-" if target is None else f"{target:g} x",
        f"{result['error']['fastattn']:.2e}",
        f"{result['error'][peer]:.2e}",
        ", ".join(result["missed"]) or ("-" if target is None and result["error_limit"] is None else "pass"),
    ]


def _names(case):
    return [case.name, _dtype(case), str(case)]


def _dtype(case):
    return case.dtype if case.precision == "highest" else f"{case.dtype} {case.precision}"


def _selected(case, args):
    return case.dtype in args.dtype and case.precision in args.precision and re.search(args.only, case.name) is not None


def _parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", choices=peers.PEERS, help="may be repeated; default: all installed")
    parser.add_argument("--before", metavar="FOLDER", help="the tree of another build, as the only peer unless others are named")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name matches")
    parser.add_argument(
        "--dtype", nargs="+", default=["float32"], choices=("float32", "bfloat16", "float16"), help="storage types"
    )
    parser.add_argument("--precision", nargs="+", default=["highest"], choices=("highest", "high", "medium"))
    parser.add_argument("--isa", choices=_LIMITS, help="limit every side to this instruction set")
    parser.add_argument("--threads", type=_bench.positive, default=fastattn.get_num_threads(), metavar="N")
    parser.add_argument("--rounds", type=_bench.positive, default=9, metavar="N")
    parser.add_argument("--min-time", type=float, default=0.05, metavar="S", help="seconds of calls in each round")
    parser.add_argument("--rows", type=_bench.positive, default=4096, metavar="N", help="rows checked against float64")
    parser.add_argument("--markdown", action="store_true", help="print the README's table of results as well")
    parser.add_argument("--json", metavar="FILE", help="write every figure of every round")
    parser.add_argument("--list", action="store_true", help="print the selected cases and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main())
