"""Measuring attention, and the command ``python -m fastattn bench``.

Two implementations are compared by *alternating* them (A B A B ...) in one process on the same inputs with the same
number of threads, and by the medians of many rounds: on a shared machine the speed of one side alone says little, and
the ratio of two sides in the same minutes says a lot. Calls too short for the clock are repeated within a round.

Between two sides the process waits until all its threads are idle (`settle`). The worker threads of OpenMP and OpenBLAS
spin for a while after a parallel call (some milliseconds; OpenBLAS above a hundred) and would take a core from the side
that runs next. ``OMP_WAIT_POLICY=passive`` would prevent some of that, but nobody's program runs that way; waiting
leaves both sides their default settings.

Errors are judged against float64 on a sample of the rows.
"""

import argparse
import contextlib
import gc
import importlib.util
import itertools
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

import fastattn

_IDLE_STEP = 0.01
_IDLE_LIMIT = 0.5
_MIN_ROUNDS = 3


@dataclass(frozen=True)
class Case:
    """One call to measure.

    Parameters
    ----------
    name : str
        A short name.
    shape : tuple of int
        ``(B, Hq, Hkv, Lq, Lk, D)``.
    dtype : str
        Storage type of q, k, v and the output: float32, float16 or bfloat16.
    causal : bool
        Causal, the last query aligned with the last key.
    mask : str or None
        "bool" or "float": a random mask of shape ``(1, 1, Lq, Lk)`` that hides a quarter of the keys.
    logits : float
        Standard deviation of the scaled scores: 1 is benign, 25 gives logits of about 100.
    precision : str
        The argument of `fastattn.attention`.
    layout : str
        "BHLD", or "BLHD" for the heads of a position side by side in memory, as projections of a model leave them.
    """

    name: str
    shape: tuple[int, int, int, int, int, int]
    dtype: str = "float32"
    causal: bool = False
    mask: str | None = None
    logits: float = 1.0
    precision: str = "highest"
    layout: str = "BHLD"

    def __str__(self):
        batch, q_heads, kv_heads, q_len, kv_len, head_dim = self.shape
        return f"{batch}, {q_heads}/{kv_heads}, {q_len}, {kv_len}, {head_dim}"

    @property
    def flops(self):
        """``4 B Hq Lq Lk D``, half of it when causal and square."""
        batch, q_heads, _, q_len, kv_len, head_dim = self.shape
        whole = 4 * batch * q_heads * q_len * kv_len * head_dim
        return whole // 2 if self.causal and q_len == kv_len else whole

    @property
    def kv_bytes(self):
        """Bytes of K and V, read once."""
        batch, _, kv_heads, _, kv_len, head_dim = self.shape
        return 2 * batch * kv_heads * kv_len * head_dim * (4 if self.dtype == "float32" else 2)

    def speed(self, seconds):
        """How fast that is, as text.

        GF/s; for a single query, which memory limits, GB/s of K and V; for a call that is all overhead the time itself.
        """
        if self.flops < 1e6:
            return f"{_digits(seconds * 1e6)} us"
        if self.shape[3] == 1:
            return f"{_digits(self.kv_bytes / seconds / 1e9)} GB/s"
        return f"{_digits(self.flops / seconds / 1e9)} GF/s"

    def inputs(self):
        """The same random ``(q, k, v, mask)`` each time."""
        batch, q_heads, kv_heads, q_len, kv_len, head_dim = self.shape
        rng = np.random.default_rng(0)
        dtype = _dtype(self.dtype)
        q = rng.standard_normal((batch, q_heads, q_len, head_dim), np.float32)
        k, v = rng.standard_normal((2, batch, kv_heads, kv_len, head_dim), np.float32)
        q *= np.float32(self.logits)
        mask = None
        if self.mask is not None:
            mask = rng.random((1, 1, q_len, kv_len), np.float32) < 0.75
            mask[..., 0] = True
            if self.mask == "float":
                mask = np.where(mask, rng.standard_normal(mask.shape, np.float32), np.float32(-np.inf))
        q, k, v = (x.astype(dtype, copy=False) for x in (q, k, v))
        if self.layout == "BLHD":
            q, k, v = (np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (q, k, v))
        return q, k, v, mask


CASES = (
    Case("call", (1, 1, 1, 1, 16, 64)),
    Case("batch", (8, 12, 12, 128, 128, 64)),
    Case("decode-gqa", (1, 32, 8, 1, 8192, 128)),
    Case("masked", (1, 8, 8, 1500, 1500, 80), mask="bool"),
    Case("gqa-causal", (1, 32, 8, 1024, 1024, 128), causal=True),
    Case("square-64", (1, 8, 8, 2048, 2048, 64)),
    Case("square-128", (1, 8, 8, 2048, 2048, 128)),
    Case("causal-64", (1, 8, 8, 2048, 2048, 64), causal=True),
    Case("causal-128", (1, 8, 8, 2048, 2048, 128), causal=True),
)
_QUICK = ("call", "batch", "decode-gqa", "masked", "gqa-causal")


@dataclass(frozen=True)
class Side:
    """One implementation with its inputs bound; `array` turns what `call` returns into a NumPy array."""

    name: str
    call: Callable[[], Any]
    array: Callable[[Any], np.ndarray] = np.asarray


def fastattn_side(case, q, k, v, mask, attention=fastattn.attention):
    """The `Side` that calls `attention`, naming only the arguments that the case needs, as a user would."""
    keywords = {}
    if case.causal:
        keywords["causal"] = True
    if mask is not None:
        keywords["mask"] = mask
    if case.precision != "highest":
        keywords["precision"] = case.precision
    return Side("fastattn", lambda: attention(q, k, v, **keywords))


def numpy_side(case, q, k, v, mask):
    """The `Side` that calls `numpy_attention`."""
    return Side("numpy", lambda: numpy_attention(q, k, v, mask, case.causal))


def numpy_attention(q, k, v, mask=None, causal=False):
    """``softmax(q @ k.T) @ v`` as NumPy does it best: batched BLAS products in float32, everything else in place.

    The query heads of one key head are stacked as rows of one product, and the sum divides the output, which is
    smaller than the scores.
    """
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    rows = (batch, kv_heads, q_heads // kv_heads * q_len)
    q, k, v, dtype = *(x.astype(np.float32, copy=False) for x in (q, k, v)), q.dtype
    s = (q * np.float32(1 / math.sqrt(head_dim))).reshape(*rows, head_dim) @ k.swapaxes(-1, -2)
    scores = s.reshape(batch, q_heads, q_len, kv_len)
    if causal:
        np.copyto(scores, -np.inf, where=~np.tri(q_len, kv_len, kv_len - q_len, dtype=bool))
    if mask is not None and mask.dtype == bool:
        np.copyto(scores, -np.inf, where=~mask)
    elif mask is not None:
        scores += mask
    s -= s.max(axis=-1, keepdims=True)
    np.exp(s, out=s)
    out = s @ v
    out /= s.sum(axis=-1, keepdims=True)
    return out.reshape(batch, q_heads, q_len, -1).astype(dtype, copy=False)


def max_error(out, q, k, v, mask=None, causal=False, rows=256):
    """Largest absolute difference of `out` from attention in float64, over about `rows` rows picked at random.

    The first and the last row are among them. NaN in a picked row gives NaN.
    """
    batch, q_heads, q_len, head_dim = q.shape
    group, kv_len = q_heads // k.shape[1], k.shape[2]
    total = batch * q_heads * q_len
    picked = np.random.default_rng(1).integers(0, total, rows) if rows < total else np.arange(total)
    head, row = np.divmod(np.union1d(picked, [0, total - 1]), q_len)
    worst = []
    for n in np.unique(head):
        (b, h), i = divmod(int(n), q_heads), row[head == n]
        keys, values = (x[b, h // group].astype(np.float64) for x in (k, v))
        s = q[b, h, i].astype(np.float64) @ keys.T / math.sqrt(head_dim)
        if mask is not None:
            seen = np.broadcast_to(mask, (batch, q_heads, q_len, kv_len))[b, h, i]
            s = np.where(seen, s, -np.inf) if mask.dtype == bool else s + seen
        if causal:
            s = np.where(np.arange(kv_len) <= i[:, None] + kv_len - q_len, s, -np.inf)
        p = np.exp(s - s.max(axis=-1, keepdims=True))
        exact = p @ values / p.sum(axis=-1, keepdims=True)
        worst.append(np.abs(out[b, h, i].astype(np.float64) - exact).max())
    return float(np.max(worst))


@contextlib.contextmanager
def same_threads(n):
    """Run fastattn and, where threadpoolctl is installed, NumPy's BLAS with `n` threads each."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(fastattn.threads(n))
        if _installed("threadpoolctl"):
            from threadpoolctl import threadpool_limits

            stack.enter_context(threadpool_limits(n))
        yield


def settle():
    """Wait until the worker threads of this process have stopped spinning, at most half a second."""
    deadline = time.perf_counter() + _IDLE_LIMIT
    while time.perf_counter() < deadline:
        used = time.process_time()
        time.sleep(_IDLE_STEP)
        if time.process_time() - used < 0.1 * _IDLE_STEP:
            return


def alternate(calls, *, rounds, min_time, budget=math.inf):
    """Time `calls` in turn, `rounds` times, and return for each the list of seconds per call.

    Parameters
    ----------
    calls : sequence of callable
    rounds : int
    min_time : float
        In each round a call is repeated often enough to last about this many seconds.
    budget : float
        Fewer rounds, but at least three, are made when they would take more seconds than this.
    """
    start = time.perf_counter()
    repeats = [_repeats(call, min_time) for call in calls]
    seconds = [[] for _ in calls]
    collecting = gc.isenabled()
    gc.disable()
    try:
        for done in range(rounds):
            if done >= _MIN_ROUNDS and time.perf_counter() - start > budget:
                break
            for call, repeat, taken in zip(calls, repeats, seconds):
                settle()
                taken.append(_time(call, repeat) / repeat)
    finally:
        if collecting:
            gc.enable()
    return seconds


def medians(*calls, rounds, min_time=0.05):
    """The median seconds of each of the calls, which :func:`alternate`."""
    return [statistics.median(taken) for taken in alternate(calls, rounds=rounds, min_time=min_time)]


def reader(array, threads, pool):
    """A function that reads all of an array, by threads of a pool."""
    parts = np.array_split(array.view(np.uint8).reshape(-1).view(np.uint64), threads)
    return lambda: list(pool.map(np.bitwise_or.reduce, parts))


def duel(case, first, second, inputs, *, rounds, min_time=0.05, budget=math.inf, rows=256):
    """Measure the side `first` against `second` and return a dictionary of plain values.

    ``ratio`` is the median time of `second` divided by that of `first`; ``spread`` holds the quartiles of the ratios of
    single rounds.
    """
    sides = (first, second)
    q, k, v, mask = inputs
    # The call that warms a side up is also the one that is judged.
    errors = [max_error(side.array(side.call()), q, k, v, mask, case.causal, rows) for side in sides]
    seconds = alternate([side.call for side in sides], rounds=rounds, min_time=min_time, budget=budget)
    medians = [statistics.median(taken) for taken in seconds]
    ratios = [b / a for a, b in zip(*seconds)]
    return {
        **asdict(case),
        "flops": case.flops,
        "kv_bytes": case.kv_bytes,
        "rounds": len(ratios),
        "seconds": {side.name: taken for side, taken in zip(sides, seconds)},
        "median": {side.name: median for side, median in zip(sides, medians)},
        "error": {side.name: error for side, error in zip(sides, errors)},
        "ratio": medians[1] / medians[0],
        "spread": [float(x) for x in np.quantile(ratios, (0.25, 0.75))],
    }


def plan(case, q, k, v, mask):
    """Which backend, instruction set and kernel `fastattn_side` uses, as `fastattn.explain` names them."""
    found = fastattn.explain(q, k, v, mask=mask, causal=case.causal, precision=case.precision)
    return {name: found[name] for name in ("backend", "isa", "kernel")}


def environment(threads):
    """What a reader must know to judge the figures: versions, processor, BLAS, threads."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    cpu = fastattn.cpu_info()
    about = {
        "fastattn": fastattn.__version__,
        "NumPy": f"{np.__version__} with {blas.get('name')} {blas.get('version')}",
        "Python": platform.python_version(),
        "processor": f"{cpu['model']}, {cpu['usable_cpus']} of {cpu['cpus']} cpus usable",
        "system": platform.platform(),
        "threads": threads,
    }
    if hasattr(os, "getloadavg"):
        about["load"] = f"{os.getloadavg()[0]:.1f} processes in the last minute, this one among them"
    if not _installed("threadpoolctl"):
        about["note"] = "without the package threadpoolctl, NumPy's BLAS runs with its own number of threads"
    return about


def print_environment(about, results):
    """Print what `environment` returned, one line each, and the plans of `results`; without any, what all calls have in common."""
    config = fastattn.show_config("dicts")
    plans = sorted({" ".join(str(part) for part in result["plan"].values() if part) for result in results})
    about = {**about, "kernels": ", ".join(plans) or config["isa"] or config["backend"]}
    width = max(map(len, about)) + 2
    for name, value in about.items():
        print(f"{name + ':':<{width}}{value}")
    print()


def print_table(header, rows):
    """Print a table to stdout, the first column flush left, the others flush right."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    for first, *others in lines:
        print("  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]))


class Progress:
    """What runs now, on stderr: on a terminal one line that is overwritten, else one line for each step."""

    def __init__(self, total):
        self._total = total
        self._done = 0
        self._live = sys.stderr.isatty()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        if self._live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def step(self, what):
        """Announce the next step."""
        self._done += 1
        text = f"[{self._done}/{self._total}] {what}"
        if self._live:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)


def write_json(path, content):
    """Write `content` to the file `path`, or to stdout when it is "-"."""
    text = json.dumps(content, indent=1) + "\n"
    if path == "-":
        sys.stdout.write(text)
    else:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)


def positive(text):
    """An argument of the command line that must be a positive integer."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def main(argv=None):
    """Run the command ``bench`` and return its exit status."""
    args = _parser().parse_args(argv)
    if args.dtype == "bfloat16" and not _installed("ml_dtypes"):
        print("fastattn bench: bfloat16 arrays need the package ml_dtypes", file=sys.stderr)
        return 2
    cases = [replace(case, dtype=args.dtype) for case in CASES if not args.quick or case.name in _QUICK]
    rounds, limit = (_MIN_ROUNDS, 15.0) if args.quick else (7, 40.0)
    threads = args.threads or fastattn.get_num_threads()
    try:
        backend = fastattn.use_backend(args.backend) if args.backend else contextlib.nullcontext()
    except ImportError as error:
        print(f"fastattn bench: {error}", file=sys.stderr)
        return 2
    results = []
    with backend, same_threads(threads), Progress(len(cases)) as progress:
        deadline = time.perf_counter() + limit
        for case in cases:
            share = (deadline - time.perf_counter()) / (len(cases) - len(results))
            if share < 0:
                break
            progress.step(f"{case.name} ({case})")
            results.append(_against_numpy(case, rounds, share))
    about = environment(threads)
    if len(results) < len(cases):
        about["left out"] = f"{', '.join(case.name for case in cases[len(results) :])} ({limit:.0f} s were over)"
    if args.json != "-":
        print_environment(about, results)
        print_table(
            ["case", "B, Hq/Hkv, Lq, Lk, D", "fastattn", "NumPy", "ratio", "max error"],
            [_row(result) for result in results],
        )
    if args.json:
        write_json(args.json, {"environment": about, "results": results})
    return 0


def _parser():
    parser = argparse.ArgumentParser(
        prog="fastattn bench",
        description="Measure fastattn against NumPy on this machine, in less than a minute.",
        epilog="Medians of alternating rounds. GF/s count 4 B Hq Lq Lk D operations, half of it if causal and square; "
        "decoding is given in GB/s of keys and values. The error is the largest against float64 on sampled rows.",
    )
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="storage type")
    parser.add_argument("--threads", type=positive, metavar="N", help="threads of both sides")
    parser.add_argument("--backend", choices=("native", "numba", "numpy"), help="backend of fastattn")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="all figures as JSON, to FILE or stdout")
    return parser


def _against_numpy(case, rounds, budget):
    inputs = case.inputs()
    first, second = fastattn_side(case, *inputs), numpy_side(case, *inputs)
    result = duel(case, first, second, inputs, rounds=rounds, min_time=0.03, budget=budget)
    return {**result, "plan": plan(case, *inputs)}


def _row(result):
    case = Case(**{field.name: result[field.name] for field in fields(Case)})
    return [
        case.name,
        str(case),
        *(case.speed(result["median"][side]) for side in ("fastattn", "numpy")),
        f"{result['ratio']:.2f} x",
        f"{result['error']['fastattn']:.1e}",
    ]


def _time(call, repeat):
    start = time.perf_counter()
    for _ in itertools.repeat(None, repeat):
        call()
    return time.perf_counter() - start


def _repeats(call, min_time):
    """How many calls last about `min_time` seconds."""
    repeat = 1
    while (taken := _time(call, repeat)) < 0.1 * min_time:
        repeat *= 10
    return math.ceil(repeat * max(1.0, min_time / taken))


def _digits(value):
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _dtype(name):
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def _installed(package):
    return importlib.util.find_spec(package) is not None
