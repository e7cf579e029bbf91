"""attend(top_pages=): the pages whose keys could score highest, whatever became of the sequences before."""

import copy

import numpy as np
import pytest
from inputs import DTYPES, dtype_of

import fastattn


class Twin:
    """A pool with bounds, and beside it the tokens of each of its sequences."""

    def __init__(self, page_size=16, heads=2, head_dim=16, dtype="float32", num_pages=200, seed=0):
        self.pool = fastattn.PagedKVCache(num_pages, page_size, heads, head_dim, dtype=dtype, bounds=True)
        self.rng, self.dtype, self.shape, self.tokens = np.random.default_rng(seed), dtype_of(dtype), (heads, head_dim), {}

    def grow(self, sequences, counts):
        k, v = self.rng.standard_normal((2, sum(counts), *self.shape)).astype(self.dtype)
        self.pool.append(sequences, k, v, np.cumsum([0, *counts]))
        for sequence, new_k, new_v in zip(sequences, np.split(k, np.cumsum(counts)[:-1]), np.split(v, np.cumsum(counts)[:-1])):
            old_k, old_v = self.tokens.get(sequence, (k[:0], v[:0]))
            self.tokens[sequence] = np.concatenate([old_k, new_k]), np.concatenate([old_v, new_v])

    def fork(self, sequence):
        child = self.pool.fork(sequence)
        self.tokens[child] = self.tokens[sequence]
        return child

    def truncate(self, sequence, n):
        self.pool.truncate(sequence, n)
        self.tokens[sequence] = tuple(x[:n] for x in self.tokens[sequence])

    def reorder(self, sequences, indices):
        self.pool.reorder(sequences, indices)
        self.tokens |= dict(zip(sequences, [self.tokens[sequences[n]] for n in indices]))

    def lists(self, q, sequence, top_pages, keep_first=0, keep_recent=1, causal=True, sign=1):
        """The keys (rows, heads, n) of the best pages by definition, -1 for none."""
        k, page_size = self.tokens[sequence][0].astype(np.float64), self.pool.page_size
        heads, length = self.shape[0], len(k)
        result = np.full((len(q), heads, top_pages * page_size), -1)
        for i, h in np.ndindex(len(q), heads):
            p = length - len(q) + i
            own = sign * q[i].astype(np.float64).reshape(heads, -1, q.shape[2])[h]
            best = []
            for first in range(0, p + 1 if causal else length, page_size):
                page = k[first : first + page_size, h]
                bound = np.maximum(own * page.min(axis=0), own * page.max(axis=0)).sum()
                kept = first < keep_first or (first <= p and first + page_size > p - keep_recent + 1 and keep_recent)
                best.append((-np.inf if kept else -bound, first))
            listed = np.sort([first for _, first in sorted(best)[:top_pages]])
            keys = (listed[:, None] + np.arange(page_size)).ravel()
            result[i, h, : keys.size] = np.where(keys < length, keys, -1)
        return result

    def check(self, sequences, rows=1, num_heads=4, top_pages=3, **options):
        q = self.rng.standard_normal((rows * len(sequences), num_heads, self.shape[1])).astype(self.dtype)
        out, lse, mass = self.pool.attend(sequences, q, top_pages=top_pages, return_lse=True, return_mass=True, **options)
        sign = -1 if options.get("scale", 1) < 0 else 1
        kept = {name: options.pop(name) for name in ("keep_first", "keep_recent") if name in options}
        for n, sequence in enumerate(sequences):
            own = slice(n * rows, (n + 1) * rows)
            lists = self.lists(q[own], sequence, top_pages, causal=options.get("causal", True), sign=sign, **kept)
            arrays = [x.swapaxes(0, 1) for x in (q[own], *self.tokens[sequence])]
            options.setdefault("causal", True)
            expected, expected_lse = fastattn.attention_indexed(*arrays, lists.swapaxes(0, 1), return_lse=True, **options)
            close = dict(rtol=1e-2 if q.itemsize == 2 else 2e-5, atol=2e-5)
            np.testing.assert_allclose(out[own].swapaxes(0, 1).astype(np.float32), expected.astype(np.float32), **close)
            np.testing.assert_allclose(lse[:, own], expected_lse, rtol=1e-5, atol=1e-5)
            without = {name: x for name, x in options.items() if name != "sinks"}
            chosen = fastattn.attention_indexed(*arrays, lists.swapaxes(0, 1), return_lse=True, **without)[1]
            everything = fastattn.attention(*arrays, return_lse=True, **without)[1]
            np.testing.assert_allclose(mass[:, own], np.where(everything == -np.inf, 1, np.exp(chosen - everything)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 7, 16])
def test_the_best_pages_are_read(engine, dtype, page_size):
    twin = Twin(page_size, dtype=dtype)
    sequences = [twin.pool.new_sequence() for _ in range(3)]
    twin.grow(sequences, [130, 3, 64])
    twin.check(sequences)
    twin.check(sequences, rows=3, num_heads=2, top_pages=4)
    twin.check(sequences, top_pages=5, keep_first=2 * page_size, keep_recent=page_size + 1)
    twin.check(sequences, causal=False, keep_recent=0)


RULES = {
    "scale": dict(scale=-0.5),
    "sinks": dict(sinks=np.float32([0, 1, -1, 3])),
    "window": dict(window=(50, None)),
    "softcap": dict(softcap=2.0),
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_other_rules_still_hold(engine, rules):
    twin = Twin()
    sequences = [twin.pool.new_sequence(), twin.pool.new_sequence()]
    twin.grow(sequences, [200, 70])
    twin.check(sequences, **rules)
    twin.check(sequences, rows=2, keep_recent=0, **rules)


@pytest.mark.parametrize("keep_recent", [0, 1])
def test_bounds_follow_whatever_happens_to_sequences(engine, keep_recent):
    """Appending by one, over several pages, into shared pages; forks, rejected drafts, beams, pages of others used again."""
    twin = Twin(page_size=8)
    rng = np.random.default_rng(5)
    sequences = [twin.pool.new_sequence()]
    twin.grow(sequences, [61])
    for step in range(40):
        n = int(rng.integers(len(sequences)))
        kind = step % 5
        if kind == 0 and len(sequences) < 4:
            sequences.append(twin.fork(sequences[n]))
        elif kind == 1:
            twin.truncate(sequences[n], int(rng.integers(1, len(sequences[n]) + 1)))
        elif kind == 2:
            twin.reorder(sequences, rng.integers(0, len(sequences), len(sequences)))
        elif kind == 3 and len(sequences) > 2:
            twin.pool.free(sequences.pop(n))
        twin.grow(sequences, [int(rng.integers(0, 20)) for _ in sequences])
        twin.check(sequences, keep_recent=keep_recent)


def test_long_calls_are_taken_in_parts(engine, monkeypatch):
    from fastattn import pagedcache

    twin = Twin(page_size=4)
    sequences = [twin.pool.new_sequence() for _ in range(3)]
    twin.grow(sequences, [50, 20, 33])
    q = twin.rng.standard_normal((60, 4, 16), np.float32)
    cu = [0, 40, 40, 60]
    expected = twin.pool.attend(sequences, q, cu, top_pages=2, return_lse=True, return_mass=True)
    monkeypatch.setattr(pagedcache, "_INDICES", 7 * 2 * 2 * 4)
    found = twin.pool.attend(sequences, q, cu, top_pages=2, return_lse=True, return_mass=True)
    for part, whole in zip(found[:2], expected):
        np.testing.assert_array_equal(part, whole)
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-5)


@pytest.mark.parametrize("options", [{}, dict(dtype="int8"), dict(dtype="int4"), dict(dtype="int8", rotate=True)], ids=str)
def test_a_strong_key_is_found(engine, options):
    pool = fastattn.PagedKVCache(70, 16, 1, 32, bounds=True, **{"dtype": "float32", **options})
    sequence, rng = pool.new_sequence(), np.random.default_rng(0)
    k = 0.1 * rng.standard_normal((1000, 1, 32)).astype(np.float32)
    q = rng.standard_normal((1, 1, 32)).astype(np.float32)
    k[333, 0] = 5 * q[0, 0]
    pool.append([sequence], k, k)
    out, mass = pool.attend([sequence], q, top_pages=2, return_mass=True)
    assert mass.shape == (1, 1) and mass[0, 0] > 0.99
    np.testing.assert_allclose(out, pool.attend([sequence], q), rtol=0.01, atol=0.01)


def test_outputs_copies_and_nothing(engine):
    twin = Twin()
    sequences = [twin.pool.new_sequence(), twin.pool.new_sequence()]
    twin.grow(sequences, [100, 40])
    q = twin.rng.standard_normal((2, 4, 16), np.float32)
    expected = twin.pool.attend(sequences, q, top_pages=2)
    out = np.empty_like(expected)
    assert twin.pool.attend(sequences, q, top_pages=2, out=out) is out
    np.testing.assert_array_equal(out, expected)
    pool, own = copy.deepcopy((twin.pool, sequences))
    np.testing.assert_array_equal(pool.attend(own, q, top_pages=2), expected)
    out, lse = twin.pool.attend(sequences, q[:0], top_pages=2, return_lse=True)
    assert out.shape == (0, 4, 16) and lse.shape == (4, 0)
    empty = twin.pool.new_sequence()
    out, mass = twin.pool.attend([empty], q[:1], top_pages=2, return_mass=True)
    assert not out.any() and (mass == 1).all()
    assert twin.pool.nbytes == fastattn.PagedKVCache(200, 16, 2, 16, dtype="float32").nbytes + 200 * 2 * 2 * 16 * 4


def test_arguments_that_do_not_fit(engine):
    twin = Twin()
    sequence = twin.pool.new_sequence()
    twin.grow([sequence], [100])
    q = np.ones((1, 4, 16), np.float32)
    plain = fastattn.PagedKVCache(4, 16, 2, 16, dtype="float32")
    with pytest.raises(ValueError, match="top_pages must be None in a pool without bounds=True"):
        plain.attend([plain.new_sequence()], q, top_pages=2)
    with pytest.raises(TypeError, match="either indices or top_pages"):
        twin.pool.attend([sequence], q, top_pages=2, indices=[[[0]]])
    with pytest.raises(ValueError, match="top_pages must be an int of at least 1; got 0"):
        twin.pool.attend([sequence], q, top_pages=0)
    with pytest.raises(ValueError, match="keep_first and keep_recent must fit into top_pages, 2 of 16 tokens; got 17 and 1"):
        twin.pool.attend([sequence], q, top_pages=2, keep_first=17)
    with pytest.raises(ValueError, match="return_mass must be False without top_pages"):
        twin.pool.attend([sequence], q, return_mass=True)
    with pytest.raises(TypeError, match="bounds must be True or False"):
        fastattn.PagedKVCache(4, 16, 2, 16, bounds=1)
