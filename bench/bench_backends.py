"""The Numba backend against the NumPy baseline and the C library: is it fast enough to stand in?

    python bench/bench_backends.py
    python bench/bench_backends.py --only decode --rounds 15
    python bench/bench_backends.py --avx2        # every side limited to AVX2
    python bench/bench_backends.py --start       # how long the first call of a process takes

All sides run in turn, in one process, with the same threads; the ratios are of medians. The exit status is 1 when a
target is missed.
"""

import argparse
import contextlib
import os
import re
import statistics
import subprocess
import sys
import tempfile

import peers
import shapes

import fastattn
from fastattn import _bench
from fastattn._bench import Side

# case: (of the speed of the NumPy baseline, of the speed of the native backend), at least
_TARGETS = {
    "square-64": (4.0, 0.35),
    "square-128": (4.0, 0.35),
    "causal-64": (8.0, 0.35),
    "causal-128": (8.0, 0.35),
    "decode-gqa": (4.0, 0.5),
    "decode-mha": (None, 0.5),
}
_MORE = ("masked", "gqa-causal", "batch", "long")
_START_LIMIT = 2.0

_AVX2 = {
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+64bit,+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+avx,+avx2,+fma,+f16c,+bmi,+bmi2",
    "FASTATTN_ISA": "avx2",
    "OPENBLAS_CORETYPE": "Haswell",
}

_START = """
import time
start = time.perf_counter()
import numpy as np
numpy = time.perf_counter()
import fastattn
x = np.ones((1, 8, 256, 64), np.float32)
fastattn.attention(x, x, x)
print(time.perf_counter() - numpy)
"""


def main():
    args = _parser().parse_args()
    if args.avx2 and any(os.environ.get(name) != value for name, value in _AVX2.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | _AVX2)
    if args.start:
        return start(args.rounds)
    chosen = [case for case in shapes.CASES if case.dtype == args.dtype and case.precision == "highest"]
    chosen = [case for case in chosen if case.name in (*_TARGETS, *_MORE) and re.search(args.only, case.name)]
    rows, missed = [], False
    with peers.same_threads(args.threads), _bench.Progress(len(chosen)) as progress:
        for case in chosen:
            progress.step(f"{case.name} ({case})")
            row, reached = judge(case, args)
            rows.append(row)
            missed |= not reached
    for name, value in _bench.environment(args.threads).items():
        print(f"{name + ':':<11} {value}")
    print()
    _bench.print_table(["case", "B, Hq/Hkv, Lq, Lk, D", "numba", "native", "NumPy", "x NumPy", "x native", "max error", ""], rows)
    return int(missed)


def judge(case, args):
    """One row of the table, and whether the case's targets have been reached."""
    inputs = case.inputs()
    sides = [on_backend("numba", case, inputs), peers.numpy(case, *inputs)]
    with contextlib.suppress(ImportError):
        sides.append(on_backend("native", case, inputs))
    error = _bench.max_error(sides[0].call(), *inputs, case.causal)
    for side in sides[1:]:
        side.call()
    seconds = _bench.alternate([side.call for side in sides], rounds=args.rounds, min_time=0.05)
    median = {side.name: statistics.median(taken) for side, taken in zip(sides, seconds)}
    of_numpy, of_native = median["numpy"] / median["numba"], median.get("native", float("nan")) / median["numba"]
    targets = _TARGETS.get(case.name, (None, None)) if case.dtype == "float32" else (None, None)
    ratios = {"NumPy": of_numpy, "native": of_native}
    missed = [name for (name, ratio), least in zip(ratios.items(), targets) if least and ratio < least]
    speeds = [case.speed(median[name]) if name in median else "-" for name in ("numba", "native", "numpy")]
    verdict = f"misses {' and '.join(missed)}" if missed else "ok" if any(targets) else ""
    return [case.name, str(case), *speeds, f"{of_numpy:.2f}", f"{of_native:.2f}", f"{error:.1e}", verdict], not missed


def on_backend(name, case, inputs):
    """The `Side` of one of our backends; choosing it costs well below a microsecond."""
    call = _bench.fastattn_side(case, *inputs).call
    with fastattn.use_backend(name):
        pass  # ImportError where it is not there

    def chosen():
        with fastattn.use_backend(name):
            return call()

    return Side(name, chosen)


def start(rounds):
    """The time of import and first call in fresh processes, the first of which fills the cache."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "FASTATTN_BACKEND": "numba", "NUMBA_CACHE_DIR": cache}

        def run():
            return float(subprocess.run([sys.executable, "-c", _START], env=environment, check=True, capture_output=True).stdout)

        print(f"compiling  {run():.2f} s")
        warm = statistics.median(run() for _ in range(rounds))
        print(f"from cache {warm:.2f} s, at most {_START_LIMIT} allowed")
    return int(warm > _START_LIMIT)


def _parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name matches")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="storage type")
    parser.add_argument("--avx2", action="store_true", help="limit every side to AVX2")
    parser.add_argument("--start", action="store_true", help="measure the first call of a process instead")
    parser.add_argument("--threads", type=_bench.positive, default=fastattn.get_num_threads(), metavar="N")
    parser.add_argument("--rounds", type=_bench.positive, default=9, metavar="N")
    return parser


if __name__ == "__main__":
    sys.exit(main())
