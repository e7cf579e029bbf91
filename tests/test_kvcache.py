"""KVCache against a plain model of it: lists of tokens, and attention over arrays that are put together anew for each call."""

import contextvars
import pickle
import threading

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from inputs import DTYPES, dtype_of, read_only

import fastattn

HEADS, GROUP, DIM, V_DIM = 2, 2, 20, 9


def tokens(rng, batch, n, dtype="float32"):
    """New keys and values."""
    return tuple(rng.standard_normal((batch, HEADS, n, d)).astype(dtype_of(dtype)) for d in (DIM, V_DIM))


def queries(rng, batch, n, dtype="float32"):
    return rng.standard_normal((batch, HEADS * GROUP, n, DIM)).astype(dtype_of(dtype))


def filled(rng, lengths, dtype="float32", capacity=96, **options):
    """A cache with entries of these lengths, and the keys and values in it, entry by entry."""
    batch, longest = len(lengths), max(lengths)
    k, v = tokens(rng, batch, longest)
    cache = fastattn.KVCache(batch, HEADS, capacity, DIM, V_DIM, dtype, **options)
    cache.append(k, v, lengths)
    return cache, [tuple(x[b, :, :n].astype(cache.dtype) for x in (k, v)) for b, n in enumerate(lengths)]


def alone(q, k, v, **keywords):
    """Attention of one entry, over arrays of its own length."""
    return fastattn.attention(q[None], k[None], v[None], **keywords)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_entry_gives_the_bits_of_arrays_of_its_length(engine, dtype):
    rng = np.random.default_rng(0)
    cache, entries = filled(rng, [5, 0, 96, 40], dtype)
    q = queries(rng, 4, 3, dtype)
    out, lse = cache.attend(q, return_lse=True)
    for b, (k, v) in enumerate(entries):
        expected, expected_lse = alone(q[b], k, v, causal=True, return_lse=True)
        np.testing.assert_array_equal(out[b], expected[0])
        np.testing.assert_array_equal(lse[b], expected_lse[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of", [*DTYPES, "float64"])
def test_tokens_are_cast_once_as_numpy_casts_them(engine, dtype, of):
    rng = np.random.default_rng(0)
    k, v = (x.astype(dtype_of(of)) for x in tokens(rng, 3, 7))
    special = np.array([0, -0.0, 1e-40, 70000, -70000, np.inf, -np.inf, np.nan, 1 + 2**-9, 3.4e38], np.float32)
    with np.errstate(over="ignore"):
        k[0, 0, 0, : special.size] = special.astype(k.dtype)
    cache = fastattn.KVCache(3, HEADS, 10, DIM, V_DIM, dtype)
    cache.append(k, v)
    with np.errstate(over="ignore"):
        expected = k.astype(np.float32).astype(cache.dtype)
    np.testing.assert_array_equal(cache._k[:, :, :7].astype(np.float32), expected.astype(np.float32))
    assert (np.signbit(cache._k[0, 0, 0, :2].astype(np.float32)) == [False, True]).all()


def test_large_appends_are_shared_among_threads(engine):
    rng = np.random.default_rng(0)
    k, v = (rng.standard_normal((2, 4, 700, 64), np.float32) for _ in range(2))
    for x in (k, np.swapaxes(np.ascontiguousarray(k.swapaxes(1, 2)), 1, 2)):
        cache = fastattn.KVCache(2, 4, 1000, 64, dtype="float16")
        cache.append(x[:, :, :300], v[:, :, :300])
        cache.append(x[:, :, 300:], v[:, :, 300:])
        np.testing.assert_array_equal(cache._k[:, :, :700], k.astype(np.float16))


class Model(RuleBasedStateMachine):
    """A cache and, beside it, the tokens of each entry."""

    window, keep_first = None, 0

    @initialize(
        batch=st.integers(0, 3),
        capacity=st.integers(0, 12),
        dtype=st.sampled_from(["float32", "float16"]),
        seed=st.integers(0, 99),
    )
    def begin(self, batch, capacity, dtype, seed):
        self.rng = np.random.default_rng(seed)
        self.batch = batch
        capacity += self.keep_first + (self.window or 0)
        self.cache = fastattn.KVCache(batch, HEADS, capacity, DIM, V_DIM, dtype, window=self.window, keep_first=self.keep_first)
        self.entries = [tuple(np.zeros((HEADS, 0, d), self.cache.dtype) for d in (DIM, V_DIM)) for _ in range(batch)]
        self.held = [0] * batch  # tokens that a ring has seen, truncated ones included

    def count(self, b):
        return self.entries[b][0].shape[1]

    @rule(n=st.integers(0, 7), data=st.data())
    def append(self, n, data):
        k, v = tokens(self.rng, self.batch, n)
        counts = data.draw(st.none() | st.lists(st.integers(0, n), min_size=self.batch, max_size=self.batch))
        real = [n] * self.batch if counts is None else counts
        before = self.cache.copy()
        if self.window is None and any(self.count(b) + real[b] > self.cache.capacity for b in range(self.batch)):
            with pytest.raises(fastattn.CacheFullError, match="room"):
                self.cache.append(k, v, counts)
            np.testing.assert_array_equal(self.cache.lengths, before.lengths)
            for b in range(self.batch):
                np.testing.assert_array_equal(self.cache._k[b, :, : self.count(b)], before._k[b, :, : self.count(b)])
            return
        self.cache.append(k, v, counts)
        for b in range(self.batch):
            self.entries[b] = tuple(
                np.concatenate([old, new[b, :, : real[b]].astype(old.dtype)], axis=1) for old, new in zip(self.entries[b], (k, v))
            )
            self.held[b] = max(self.held[b], self.count(b))

    @rule(data=st.data())
    def truncate(self, data):
        new = [data.draw(st.integers(0, self.count(b))) for b in range(self.batch)]
        if self.window is not None:
            ring = self.cache.capacity - self.keep_first
            lost = [max(new[b] - self.window, self.keep_first) < self.held[b] - ring for b in range(self.batch)]
            if any(lost):
                with pytest.raises(ValueError, match="lengths must leave a ring"):
                    self.cache.truncate(new)
                return
        self.cache.truncate(new)
        self.entries = [tuple(x[:, :n] for x in entry) for entry, n in zip(self.entries, new)]

    @rule(data=st.data())
    def reorder(self, data):
        if self.batch:
            order = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=self.batch, max_size=self.batch))
            self.cache.reorder(order)
            self.entries, self.held = ([of[b] for b in order] for of in (self.entries, self.held))

    @rule(how=st.sampled_from(["copy", "pickle"]))
    def leave_for_a_copy(self, how):
        former = self.cache
        self.cache = former.copy() if how == "copy" else pickle.loads(pickle.dumps(former))
        assert not np.shares_memory(self.cache._k, former._k)
        former._k.fill(7)
        former._lengths.fill(0)

    @precondition(lambda self: self.batch)
    @rule(
        n=st.integers(1, 4),
        causal=st.booleans(),
        sinks=st.booleans(),
        softcap=st.booleans(),
        slopes=st.booleans(),
        tail=st.integers(0, 5),
        data=st.data(),
    )
    def attend(self, n, causal, sinks, softcap, slopes, tail, data):
        q = queries(self.rng, self.batch, n)
        keywords = {"causal": causal, "return_lse": True}
        if sinks:
            keywords["sinks"] = self.rng.standard_normal(HEADS * GROUP)
        if softcap:
            keywords["softcap"] = 2.0
        if slopes:
            keywords["alibi_slopes"] = np.linspace(0, 1, HEADS * GROUP)
        if data.draw(st.booleans()):
            keywords["window"] = (data.draw(st.integers(0, 5)), data.draw(st.none() | st.integers(0, 2)))
        shortest = min(map(self.count, range(self.batch)))
        tail = min(tail, shortest)
        tree = self.rng.random((self.batch, n, tail)) < 0.6 if data.draw(st.booleans()) else None
        given = dict(keywords) if tree is None else {**keywords, "tail_mask": tree}
        if self.window is not None:
            ring = self.cache.capacity - self.keep_first
            if any(max(self.count(b) - n - self.window + 1, self.keep_first) < self.held[b] - ring for b in range(self.batch)):
                with pytest.raises(ValueError, match="q must have fewer rows"):
                    self.cache.attend(q, **given)
                return
        out, lse = self.cache.attend(q, **given)
        for b in range(self.batch):
            expected, expected_lse = alone(q[b], *self.entries[b], **{**keywords, **self.visibility(b, n, causal, tree)})
            if self.window is None:
                np.testing.assert_array_equal(out[b], expected[0])
                np.testing.assert_array_equal(lse[b], expected_lse[0])
            else:
                np.testing.assert_allclose(out[b], expected[0], rtol=1e-5, atol=2e-6)
                np.testing.assert_allclose(lse[b], expected_lse[0], rtol=1e-5, atol=2e-6)

    def visibility(self, b, n, causal, tree):
        """The mask that says for entry b what a ring keeps and what a tree lets be seen."""
        if self.window is None and tree is None:
            return {}
        count = self.count(b)
        position, key = np.arange(count - n, count)[:, None], np.arange(count)
        mask = np.ones((n, count), bool)
        if self.window is not None:
            mask &= (key < self.keep_first) | (key > position - self.window)
        if tree is not None:
            mask[:, count - tree.shape[2] :] &= tree[b]
            return {"mask": mask, "causal": False}
        return {"mask": mask}


class Ring(Model):
    window, keep_first = 5, 2


@pytest.mark.parametrize("machine", [Model, Ring])
def test_any_sequence_of_calls(backend, machine):
    run_state_machine_as_test(machine, settings=settings(max_examples=30, stateful_step_count=12))


def test_growth_is_asked_for(backend):
    rng = np.random.default_rng(0)
    cache = fastattn.KVCache(2, HEADS, None, DIM, V_DIM, "float32")
    ks = []
    for n in (1, 100, 3):
        k, v = tokens(rng, 2, n)
        cache.append(k, v)
        ks.append(k)
    np.testing.assert_array_equal(cache._k[:, :, :104], np.concatenate(ks, axis=2))
    assert cache.capacity >= 104


def test_a_ring_takes_the_memory_of_its_capacity(backend):
    cache = fastattn.KVCache(1, HEADS, 36, DIM, V_DIM, "float32", window=32, keep_first=4)
    rng, before = np.random.default_rng(0), cache.nbytes
    for _ in range(5):
        cache.append(*tokens(rng, 1, 100))
    assert cache.nbytes == before == 4 * HEADS * 36 * (DIM + V_DIM) and cache.lengths.tolist() == [500]
    k, v = tokens(rng, 1, 1)
    cache.append(k, v)
    assert cache.attend(queries(rng, 1, 1)).shape == (1, HEADS * GROUP, 1, V_DIM)


def test_out_and_ranks(backend):
    rng = np.random.default_rng(0)
    for options in ({}, {"window": 8, "keep_first": 1}):
        cache, _ = filled(rng, [12, 12], capacity=12, **options)
        q = queries(rng, 2, 1)
        out = np.empty((2, HEADS * GROUP, 1, V_DIM), np.float32)
        assert cache.attend(q, out=out) is out
        np.testing.assert_array_equal(out, cache.attend(q))


def test_tokens_of_any_memory(backend):
    rng = np.random.default_rng(0)
    k, v = tokens(rng, 2, 6)
    expected = fastattn.KVCache(2, HEADS, 6, DIM, V_DIM)
    expected.append(k, v)
    for x, y in (
        (read_only(k), read_only(v)),
        (np.asfortranarray(k), v[:, :, ::-1][:, :, ::-1]),
        (k.astype(">f4"), np.swapaxes(np.ascontiguousarray(v.swapaxes(1, 2)), 1, 2)),
    ):
        cache = fastattn.KVCache(2, HEADS, 6, DIM, V_DIM)
        cache.append(x, y)
        np.testing.assert_array_equal(cache._k.view(np.uint16), expected._k.view(np.uint16))
        np.testing.assert_array_equal(cache._v.view(np.uint16), expected._v.view(np.uint16))


def test_threads_may_attend_at_once(backend):
    rng = np.random.default_rng(0)
    cache, _ = filled(rng, [90, 60])
    qs = [queries(rng, 2, 2) for _ in range(8)]
    expected = [cache.attend(q) for q in qs]
    got = [None] * len(qs)

    def work(i):
        for _ in range(20):
            got[i] = cache.attend(qs[i])

    # With the engine of this context, which is not that of other threads.
    workers = [threading.Thread(target=contextvars.copy_context().run, args=(work, i)) for i in range(len(qs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for out, wanted in zip(got, expected):
        np.testing.assert_array_equal(out, wanted)


BAD_MAKES = [
    ((-1, 1, 4, 8), {}, ValueError, "batch must be an int of at least 0"),
    ((1, 1, -4, 8), {}, ValueError, "capacity must be"),
    ((1, 1, 4.0, 8), {}, TypeError, "capacity must be an int"),
    ((1, 1, 4, True), {}, ValueError, "head_dim must be"),
    ((1, 1, 4, 8), {"dtype": "int16"}, TypeError, "dtype must be one of"),
    ((1, 1, 4, 8), {"dtype": "no"}, TypeError, "dtype must be one of"),
    ((1, 1, 4, 8), {"window": 4, "keep_first": 1}, ValueError, "capacity must be at least keep_first [+] window, 5"),
    ((1, 1, None, 8), {"window": 4}, ValueError, "capacity must be at least"),
    ((1, 1, 4, 8), {"keep_first": 1}, ValueError, "keep_first must be 0"),
    ((1, 1, 4, 8), {"window": 0}, ValueError, "window must be an int of at least 1"),
]


@pytest.mark.parametrize("args, keywords, error, message", BAD_MAKES)
def test_bad_caches(args, keywords, error, message):
    with pytest.raises(error, match=message):
        fastattn.KVCache(*args, **keywords)


def x(*shape, dtype="float32"):
    return np.zeros(shape, dtype)


BAD_CALLS = [
    (lambda c: c.append(x(2, 2, 3, 20), x(2, 2, 4, 9)), ValueError, "v must have shape"),
    (lambda c: c.append(x(2, 2, 3, 21), x(2, 2, 3, 9)), ValueError, "k must have shape"),
    (lambda c: c.append(x(1, 2, 3, 20), x(1, 2, 3, 9)), ValueError, "k must have shape"),
    (lambda c: c.append(x(2, 3, 20), x(2, 3, 9)), ValueError, "k must have shape"),
    (lambda c: c.append(x(2, 2, 3, 20, dtype="i4"), x(2, 2, 3, 9)), TypeError, "k must hold floats"),
    (lambda c: c.append(x(2, 2, 3, 20), x(2, 2, 3, 9), [4, 0]), ValueError, "lengths must lie between 0 and 3"),
    (lambda c: c.append(x(2, 2, 3, 20), x(2, 2, 3, 9), [1.0, 0]), TypeError, "lengths must be an int"),
    (lambda c: c.append(x(2, 2, 3, 20), x(2, 2, 3, 9), [1, 0, 0]), ValueError, "lengths must be an int or have shape"),
    (lambda c: c.append(x(2, 2, 9, 20), x(2, 2, 9, 9)), fastattn.CacheFullError, "entry 0 has 12 and would get 9 more"),
    (lambda c: c.attend(x(1, 4, 1, 20)), ValueError, "q must have shape"),
    (lambda c: c.attend(x(4, 1, 20)), ValueError, "q must have shape"),
    (lambda c: c.attend(x(2, 4, 1, 21)), ValueError, "head size"),
    (lambda c: c.attend(x(2, 4, 1, 20), query_offset=0), TypeError, "attend[(][)] has no argument query_offset"),
    (lambda c: c.attend(x(2, 4, 1, 20), tail_mask=x(1, 9, dtype=bool)), ValueError, "tail_mask must not be longer than an entry"),
    (lambda c: c.attend(x(2, 4, 1, 20), tail_mask=x(2, 3, dtype=bool)), ValueError, "tail_mask must have shape"),
    (lambda c: c.attend(x(2, 4, 1, 20), tail_mask=x(1, 3)), TypeError, "tail_mask must hold bools"),
    (lambda c: c.attend(x(2, 4, 1, 20), tail_mask=x(1, 3, dtype=bool), mask=x(1, 12, dtype=bool)), TypeError, "either mask or tail_mask"),
    (lambda c: c.truncate([13, 0]), ValueError, "lengths must lie between 0 and 12"),
    (lambda c: c.truncate([3, 9]), ValueError, "entry 1 has 8, got 9"),
    (lambda c: c.reorder([0, 2]), ValueError, "indices must lie between 0 and 1"),
    (lambda c: c.reorder([0]), ValueError, "indices must have shape"),
]


@pytest.mark.parametrize("call, error, message", BAD_CALLS)
def test_bad_calls_leave_the_cache_as_it_was(backend, call, error, message):
    cache, _ = filled(np.random.default_rng(0), [12, 8], capacity=16)
    k, v, lengths = cache._k.copy(), cache._v.copy(), cache.lengths
    with pytest.raises(error, match=message):
        call(cache)
    assert (cache._k.tobytes(), cache._v.tobytes()) == (k.tobytes(), v.tobytes())
    np.testing.assert_array_equal(cache.lengths, lengths)
