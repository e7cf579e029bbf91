"""Threads that do not get a processor each, and the price of those that do: what is wanted and what is seen, for both ways.

    python bench/bench_threads.py [--rounds N] [--only PART]

Five parts: two threads on one processor against one thread; two threads against one where calls are a millisecond apart; two threads
beside two busy programs against the same alone; the pool against OpenMP, alone; and how busy a call each millisecond keeps the helpers.
Each measures in a fresh process, whose
threads have all been started before anything is made scarce. The exit status is 1 when the default way misses a target.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

import numpy as np

import fastattn
from fastattn import _bench, runtime

SHAPES = {
    "8 heads of 64 x 64": (8, 64, 64),
    "decoding over 4096 keys": (8, 1, 4096),
    "512 x 512": (8, 512, 512),
}
SMALL = {"1 head, 1 x 16": (1, 1, 16), **SHAPES}
DEFAULT = "pool"


def call_of(shape):
    heads, q_len, kv_len = shape
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, heads, length, 64), np.float32) for length in (q_len, kv_len, kv_len))
    return lambda: fastattn.attention(q, k, v)


def times(call, rounds):
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return taken


def confine(processors):
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), processors)


def one_processor(way, rounds):
    """The time of two threads on one processor, as a multiple of that of one thread in turn."""
    processor = {min(os.sched_getaffinity(0))}
    with runtime.use_threading(way):
        for name, shape in SHAPES.items():
            call, taken = call_of(shape), {1: [], 2: []}
            with fastattn.threads(2):
                times(call, 20)
            confine(processor)
            for _ in range(rounds):
                for count in taken:
                    with fastattn.threads(count):
                        taken[count] += times(call, 20)
            yield name, statistics.fmean(taken[2]) / statistics.fmean(taken[1]), 1.3


def pauses(way, rounds):
    """Calls a millisecond apart, for which helpers are woken: the time of two threads, as a multiple of that of one in turn."""
    with runtime.use_threading(way):
        for name in ("decoding over 4096 keys", "512 x 512"):
            call, taken = call_of(SHAPES[name]), {1: [], 2: []}
            for _ in range(10 * rounds):
                for count, of_count in taken.items():
                    with fastattn.threads(count):
                        time.sleep(0.001)
                        of_count += times(call, 1)
            yield name, statistics.median(taken[2]) / statistics.median(taken[1]), 0.75


def busy_programs(way, rounds):
    """Beside two programs that do nothing but work: median and 90th percentile, as multiples of the median alone."""
    call = call_of(SHAPES["512 x 512"])
    with runtime.use_threading(way), fastattn.threads(2):
        times(call, 50)
        alone = statistics.median(times(call, 20 * rounds))
        programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
        try:
            time.sleep(0.5)
            beside = times(call, 20 * rounds)
        finally:
            for program in programs:
                program.kill()
                program.wait()
        yield "median", statistics.median(beside) / alone, 2.2
        yield "90th percentile", statistics.quantiles(beside, n=10)[-1] / alone, 6.0


def alone(way, rounds):
    """The time of this way as a multiple of that of OpenMP, in turn, each in a process of its own: helpers of the one that idle would
    take the other's processor."""
    sides = [Caller(name) for name in (way, "openmp")]
    try:
        for name in SMALL:
            ratios = []
            for _ in range(2 * rounds):
                ours, theirs = (side.median(name) for side in sides)
                ratios.append(ours / theirs)
            yield name, statistics.median(ratios), 1.02
    finally:
        for side in sides:
            side.close()


class Caller:
    """A process that calls in one way and says how long it took."""

    def __init__(self, way):
        command = [sys.executable, __file__, "--serve", way]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def median(self, name):
        print(name, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def serve(way):
    """The other end of `Caller`: names of shapes in, medians of seconds out, all threads asleep between them."""
    calls = {name: call_of(shape) for name, shape in SMALL.items()}
    with runtime.use_threading(way), fastattn.threads(2):
        for line in sys.stdin:
            median = statistics.median(times(calls[line.rstrip("\n")], 200)[50:])
            _bench.settle()
            print(median, flush=True)


def millisecond(way, rounds):
    """With a call of 8 heads of 64 x 64 each millisecond: the share of a second processor that is used."""
    call = call_of(SHAPES["8 heads of 64 x 64"])
    with runtime.use_threading(way), fastattn.threads(2):
        times(call, 20)
        _bench.settle()
        start, used, own = time.perf_counter(), time.process_time(), time.thread_time()
        for _ in range(100 * rounds):
            call()
            time.sleep(0.001)
        own, used, wall = time.thread_time() - own, time.process_time() - used, time.perf_counter() - start
        yield "helpers", (used - own) / wall, 0.15


PARTS = {part.__name__: part for part in (one_processor, pauses, busy_programs, alone, millisecond)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=_bench.positive, default=20, metavar="N")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve)
    if args.measure:
        part, way = args.measure
        missed = 0
        for name, seen, wanted in PARTS[part](way, args.rounds):
            missed |= seen > wanted and way == DEFAULT
            print(f"{part:15}{way:9}{name:26}wanted {wanted:5.2f}  seen {seen:8.2f}{'  misses' if seen > wanted else ''}", flush=True)
        return missed
    status = 0
    for part in [args.only] if args.only else PARTS:
        for way in ("pool", "openmp") if fastattn.show_config("dicts")["openmp"] else ("pool",):
            command = [sys.executable, __file__, "--rounds", str(args.rounds), "--measure", part, way]
            status |= subprocess.run(command).returncode
    return status


if __name__ == "__main__":
    sys.exit(main())
