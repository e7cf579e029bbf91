"""Packed sequences beside the same in a padded batch, and beside the sum of what each takes alone.

    python bench/bench_varlen.py                             # the judge: exit status 1 when a limit is missed
    python bench/bench_varlen.py --rounds 11 --only mixed

Sides alternate in one process; ratios are those of a round, whose sides ran one after the other, and figures are medians. In brackets are
the quartiles of the ratio to the sum. Padded is our own `attention` of arrays that are as long as the longest sequence,
which is told nothing of lengths. The sum is that of one call after the other on one thread, divided by the threads: what a perfect
distribution takes, where each thread has a processor of its own. Outputs are there before, for the system hands out memory at a pace of
its own. Wanted: at least 1.7 times the speed of the padded batch, and at most 1.05 times the sum.
"""

import argparse
import sys

import numpy as np
import peers

import fastattn
from fastattn import _bench

LEAST_OF_PADDED, MOST_OF_SUM = 1.7, 1.05
HEADS, DIMS = 12, (32, 64)
# Lengths of text: their shares up to which a sequence is so short.
QUANTILES = {0: 16, 0.1: 68, 0.5: 314, 0.9: 465, 1: 512}
LENGTHS = {
    "mixed": np.interp((np.arange(512) + 0.5) / 512, list(QUANTILES), list(QUANTILES.values())).astype(int),
    "one long": np.array([4000] + 16 * [40]),
}


def sides(lengths, dim, rng):
    """The packed call, the padded one, and one call after the other."""
    ends = np.append(0, lengths.cumsum())
    q, k, v, out = rng.standard_normal((4, ends[-1], HEADS, dim), np.float32)
    *padded, padded_out = rng.standard_normal((4, len(lengths), HEADS, lengths.max(), dim), np.float32)
    parts = [[x[i0:i1].swapaxes(0, 1) for x in (q, k, v, out)] for i0, i1 in zip(ends, ends[1:])]

    def alone():
        with fastattn.threads(1):
            for *part, part_out in parts:
                fastattn.attention(*part, out=part_out)

    return (
        lambda: fastattn.attention_varlen(q, k, v, ends, ends, out=out),
        lambda: fastattn.attention(*padded, out=padded_out),
        alone,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=_bench.positive, default=7)
    parser.add_argument("--only", choices=LENGTHS)
    arguments = parser.parse_args()
    threads = fastattn.get_num_threads()
    _bench.print_environment({**_bench.environment(threads), **peers.versions()}, [])
    rng, missed = np.random.default_rng(0), False
    print(f"{'lengths':10} {'heads':>8} {'packed ms':>10} {'padded':>8} {'sum':>8}")
    for name, lengths in LENGTHS.items():
        for dim in DIMS if arguments.only in (None, name) else ():
            calls = sides(rng.permutation(lengths), dim, rng)
            packed, padded, alone = map(np.array, _bench.alternate(calls, rounds=arguments.rounds, min_time=0.05))
            of_padded = np.median(padded / packed)
            lower, of_sum, upper = np.quantile(packed * threads / alone, (0.25, 0.5, 0.75))
            missed |= of_padded < LEAST_OF_PADDED or of_sum > MOST_OF_SUM
            figures = f"{1e3 * np.median(packed):10.2f} {of_padded:6.2f} x {of_sum:6.2f} x  [{lower:.2f}, {upper:.2f}]"
            print(f"{name:10} {HEADS:3} x {dim:2} {figures}")
    print(f"wanted: at least {LEAST_OF_PADDED} x padded, at most {MOST_OF_SUM} x the sum: {'missed' if missed else 'reached'}")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
