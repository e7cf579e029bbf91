"""PagedKVCache against a plain model of it: the tokens of each sequence, and attention over arrays made of them anew for each call."""

import copy
import pickle
import threading

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from inputs import DTYPES, dtype_of
from oracle import check

import fastattn
from fastattn import pagedcache

HEADS, GROUP, DIM, V_DIM = 2, 2, 20, 9


def tokens(rng, n, dtype="float32"):
    return tuple(rng.standard_normal((n, HEADS, d)).astype(dtype_of(dtype)) for d in (DIM, V_DIM))


def queries(rng, n, dtype="float32"):
    return rng.standard_normal((n, HEADS * GROUP, DIM)).astype(dtype_of(dtype))


def alone(q, k, v, **keywords):
    """Attention of one sequence over arrays of its own length, packed as those of the pool: out, or (out, lse)."""
    out = fastattn.attention(*(x.swapaxes(0, 1)[None] for x in (q, k, v)), **keywords)
    return (out[0][0].swapaxes(0, 1), out[1][0]) if isinstance(out, tuple) else out[0].swapaxes(0, 1)


class Model(RuleBasedStateMachine):
    """A pool and, beside it, the tokens of each sequence."""

    @initialize(
        pages=st.sampled_from([0, 5, 60, 60]),
        page_size=st.sampled_from([1, 3, 4]),
        dtype=st.sampled_from(["float32", "float16"]),
        seed=st.integers(0, 99),
    )
    def begin(self, pages, page_size, dtype, seed):
        self.rng, self.size = np.random.default_rng(seed), page_size
        self.pool = fastattn.PagedKVCache(pages, page_size, HEADS, DIM, V_DIM, dtype)
        self.dtype = self.pool.dtype
        self.held = {}  # the tokens of each live handle
        self.freed = []

    def pick(self, data, unique=True, least=0):
        return data.draw(st.lists(st.sampled_from(list(self.held)), unique=unique, min_size=least, max_size=5)) if self.held else []

    @rule()
    def new(self):
        if len(self.held) < 8:
            self.held[self.pool.new_sequence()] = tuple(x.astype(self.dtype) for x in tokens(self.rng, 0))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def fork(self, data):
        (parent,) = self.pick(data, least=1)[:1]
        if len(self.held) < 8:
            self.held[self.pool.fork(parent)] = self.held[parent]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data):
        (sequence,) = self.pick(data, least=1)[:1]
        self.pool.free(sequence)
        del self.held[sequence]
        self.freed.append(sequence)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def truncate(self, data):
        (sequence,) = self.pick(data, least=1)[:1]
        n = data.draw(st.integers(0, len(sequence)))
        self.pool.truncate(sequence, n)
        self.held[sequence] = tuple(x[:n] for x in self.held[sequence])

    @rule(data=st.data())
    def reorder(self, data):
        sequences = self.pick(data)
        indices = [data.draw(st.integers(0, len(sequences) - 1)) for _ in sequences]
        states = [self.held[sequences[n]] for n in indices]
        self.pool.reorder(sequences, np.array(indices, np.int32))
        self.held.update(zip(sequences, states))

    @rule(data=st.data())
    def append(self, data):
        sequences = self.pick(data, least=1)
        self.write(sequences, [data.draw(st.integers(0, 7)) for _ in sequences], data.draw(st.sampled_from(["float32", "float64"])))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def both_sides_of_a_fork_write(self, data):
        (parent,) = self.pick(data, least=1)[:1]
        if len(self.held) < 8:
            child = self.pool.fork(parent)
            self.held[child] = self.held[parent]
            for sequence in data.draw(st.permutations([parent, child])):
                self.write([sequence], [1])

    def write(self, sequences, counts, dtype="float32"):
        k, v = tokens(self.rng, sum(counts), dtype)
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        before = self.snapshot()
        try:
            self.pool.append(sequences, k, v, starts)
        except fastattn.CacheFullError:
            assert self.snapshot() == before
            return
        for n, sequence in enumerate(sequences):
            new = (x[starts[n] : starts[n + 1]].astype(np.float32).astype(self.dtype) for x in (k, v))
            self.held[sequence] = tuple(np.concatenate(pair) for pair in zip(self.held[sequence], new))

    @rule(data=st.data())
    def attend(self, data):
        sequences = self.pick(data, unique=False)
        counts = [data.draw(st.integers(0, min(len(s) + 1, 5))) for s in sequences]
        q, starts = queries(self.rng, sum(counts), self.dtype), np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        options = dict(causal=data.draw(st.booleans()), sinks=data.draw(st.none() | st.just(np.float32([0, 1, -1, -np.inf]))))
        out, lse = self.pool.attend(sequences, q, starts, return_lse=True, **options)
        merged, merged_lse = self.pool.attend(sequences, q, starts, return_lse=True, cascade=True, **options)
        for n, sequence in enumerate(sequences):
            rows = slice(starts[n], starts[n + 1])
            expected, expected_lse = alone(q[rows], *self.held[sequence], return_lse=True, **options)
            np.testing.assert_array_equal(out[rows], expected)
            np.testing.assert_array_equal(lse[:, rows], expected_lse)
            own = (x.swapaxes(0, 1) for x in (q[rows], *self.held[sequence]))
            check(merged[rows].swapaxes(0, 1), merged_lse[:, rows], *own, **options)

    @precondition(lambda self: self.freed)
    @rule()
    def freed_handles_are_refused(self):
        for use in (self.pool.free, self.pool.fork, lambda s: self.pool.truncate(s, 0), lambda s: self.pool.lengths([s])):
            with pytest.raises(ValueError, match="freed"):
                use(self.freed[-1])

    def snapshot(self):
        pool = self.pool
        sequences = [(s._length, list(s._pages)) for s in self.held]
        return [list(pool._free), pool._references.tolist(), pool._k.tobytes(), pool._v.tobytes(), sequences]

    @invariant()
    def every_page_is_free_or_counted(self):
        if not hasattr(self, "pool"):
            return
        counted = np.bincount(sum((s._pages for s in self.held), []), minlength=self.pool._references.size)
        np.testing.assert_array_equal(self.pool._references, counted)
        assert sorted(self.pool._free) == np.flatnonzero(counted == 0).tolist()
        live = list(self.held)
        np.testing.assert_array_equal(self.pool.lengths(live), [len(self.held[s][0]) for s in live])

    @invariant()
    def tokens_are_where_they_belong(self):
        for sequence, held in getattr(self, "held", {}).items():
            for array, wanted in zip((self.pool._k, self.pool._v), held):
                rows = array[sequence._pages].swapaxes(1, 2).reshape(-1, HEADS, array.shape[3])
                np.testing.assert_array_equal(rows[: len(sequence)], wanted)


def test_any_sequence_of_calls_is_as_the_model_says(engine):
    run_state_machine_as_test(Model, settings=settings(max_examples=60, stateful_step_count=40))


def filled(dtype="float32", lengths=(37, 5, 0, 64), page_size=8, num_pages=64, seed=0):
    """A pool with sequences of these lengths, and their keys and values."""
    rng = np.random.default_rng(seed)
    pool = fastattn.PagedKVCache(num_pages, page_size, HEADS, DIM, V_DIM, dtype)
    sequences = [pool.new_sequence() for _ in lengths]
    k, v = tokens(rng, sum(lengths))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    pool.append(sequences, k, v, starts)
    return pool, sequences, [tuple(x[a:b].astype(pool.dtype) for x in (k, v)) for a, b in zip(starts, starts[1:])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 16, 100])
def test_prefill_and_decoding_in_one_call(engine, dtype, page_size):
    pool, sequences, held = filled(dtype, (300, 40, 0, 2100), page_size, 2500)
    rng = np.random.default_rng(1)
    counts = [300, 1, 2, 5]
    q, starts = queries(rng, sum(counts), dtype), np.concatenate([[0], np.cumsum(counts)])
    out = pool.attend(sequences, q, starts)
    for n, (k, v) in enumerate(held):
        np.testing.assert_array_equal(out[starts[n] : starts[n + 1]], alone(q[starts[n] : starts[n + 1]], k, v, causal=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "how",
    [
        dict(activation="sigmoid", activation_bias=-2.0),
        dict(activation="polynomial", power=1),
        dict(activation="relu", score_function=lambda s, b, h, i, j: s + 0.25 * (h - j % 2)),
        dict(score_function=lambda s, b, h, i, j: s - 0.01 * abs(j - 7 * i), return_lse=True),
    ],
    ids=lambda how: "-".join(how),
)
def test_other_weights_and_scores(engine, dtype, how):
    """After a truncation and a fork, so that a sequence has pages of another and old tokens behind its last."""
    pool, sequences, held = filled(dtype, (300, 40, 1, 2100), 16, 400)
    pool.truncate(sequences[3], 2079)
    held[3] = tuple(x[:2079] for x in held[3])
    sequences.append(pool.fork(sequences[0]))
    held.append(held[0])
    counts = [300, 1, 1, 5, 2]
    q, starts = queries(np.random.default_rng(1), sum(counts), dtype), np.concatenate([[0], np.cumsum(counts)])
    result = pool.attend(sequences, q, starts, **how)
    out, lse = result if "return_lse" in how else (result, None)
    for n, (k, v) in enumerate(held):
        rows = slice(starts[n], starts[n + 1])
        expected = alone(q[rows], k, v, causal=True, **how)
        expected, expected_lse = expected if "return_lse" in how else (expected, None)
        np.testing.assert_array_equal(out[rows], expected)
        if lse is not None:
            np.testing.assert_array_equal(lse[:, rows], expected_lse)
        own = {name: value for name, value in how.items() if name != "return_lse"}
        check(out[rows].swapaxes(0, 1), None, *(x.swapaxes(0, 1) for x in (q[rows], k, v)), causal=True, **own)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cascade_of_a_tree_of_forks(engine, dtype):
    """A prompt, two continuations of it, and answers to each: three levels, the last of own pages."""
    rng = np.random.default_rng(3)
    pool = fastattn.PagedKVCache(200, 8, HEADS, DIM, V_DIM, dtype)
    prompt = pool.new_sequence()
    pool.append([prompt], *tokens(rng, 100))
    branches = [pool.fork(prompt) for _ in range(2)]
    pool.append(branches, *tokens(rng, 90))
    leaves = [pool.fork(branch) for branch in branches for _ in range(3)]
    pool.append(leaves, *tokens(rng, 6 * 9))
    levels = list(pagedcache._levels(pool.block_table(leaves), pool.lengths(leaves) // 8))
    assert [len(runs) for runs in levels] == [1, 2, 6]
    assert [run.pages for run in levels[0]] == [12] and sorted(levels[1][0].members + levels[1][1].members) == list(range(6))
    for count in (1, 4):
        q = queries(rng, 6 * count, dtype)
        out, lse = pool.attend(leaves, q, cascade=True, return_lse=True)
        target = np.empty_like(out)
        assert pool.attend(leaves, q, cascade=True, out=target) is target
        np.testing.assert_array_equal(target, out)
        for n, leaf in enumerate(leaves):
            rows, table = slice(n * count, (n + 1) * count), pool.block_table([leaf])[0]
            k, v = (x.swapaxes(1, 2)[table].reshape(-1, HEADS, x.shape[3])[: len(leaf)] for x in (pool._k, pool._v))
            check(out[rows].swapaxes(0, 1), lse[:, rows], *(x.swapaxes(0, 1) for x in (q[rows], k, v)), causal=True)


@pytest.mark.parametrize(
    "options",
    [
        dict(window=(10, None)),
        dict(alibi_slopes=np.float32([0.1, 0.2, 0.3, 0.4])),
        dict(q_lengths=[1, 2]),
        dict(activation="sigmoid"),
        dict(score_function=lambda s, b, h, i, j: s - 0.01 * (j + b)),
    ],
)
def test_cascade_is_left_out_where_distance_matters(backend, options):
    pool, (sequence, *_), _ = filled()
    other = pool.fork(sequence)
    q = queries(np.random.default_rng(0), 4)
    np.testing.assert_array_equal(
        pool.attend([sequence, other], q, cascade=True, **options), pool.attend([sequence, other], q, **options)
    )


def test_a_fork_shares_pages_until_one_writes(backend):
    pool, (sequence, *_), _ = filled()
    free = pool.num_free_pages
    forks = [pool.fork(sequence) for _ in range(3)]
    assert pool.num_free_pages == free
    pool.append(forks[:1], *tokens(np.random.default_rng(0), 1))
    assert pool.num_free_pages == free - 1  # 37 tokens: the last page is not full
    pool.append([sequence, *forks[1:]], *tokens(np.random.default_rng(0), 3))
    assert pool.num_free_pages == free - 3  # the last who writes to it has it for itself
    for s in (sequence, *forks):
        pool.free(s)
    assert pool.num_free_pages == free + 5


def test_full_pages_are_not_copied(backend):
    pool, (*_, sequence), _ = filled()  # 64 tokens in pages of 8
    fork = pool.fork(sequence)
    pool.append([fork], *tokens(np.random.default_rng(0), 1))
    np.testing.assert_array_equal(pool.block_table([fork])[0, :8], pool.block_table([sequence])[0])


def test_a_full_pool_changes_nothing(backend):
    pool, sequences, held = filled(num_pages=16)
    free = pool.num_free_pages
    with pytest.raises(fastattn.CacheFullError, match=r"has 2 free pages of 16; \d are wanted"):
        pool.append(sequences[:2], *tokens(np.random.default_rng(0), 40))
    assert pool.num_free_pages == free and pool.lengths(sequences).tolist() == [37, 5, 0, 64]
    q = queries(np.random.default_rng(0), 1)
    np.testing.assert_array_equal(pool.attend(sequences[:1], q), alone(q, *held[0], causal=True))
    pool.append(sequences[:1], *tokens(np.random.default_rng(0), 19))
    assert pool.num_free_pages == 0


def test_pickles_and_deep_copies_have_pages_of_their_own(backend):
    pool, sequences, held = filled()
    for clone, clones in (pickle.loads(pickle.dumps((pool, sequences))), copy.deepcopy((pool, sequences))):
        q = queries(np.random.default_rng(0), 4)
        expected = pool.attend(sequences, q)
        clone.append(clones, *tokens(np.random.default_rng(5), 4))
        np.testing.assert_array_equal(pool.attend(sequences, q), expected)
        assert clone.lengths(clones).tolist() == [38, 6, 1, 65]
        with pytest.raises(ValueError, match="of another"):
            pool.lengths(clones)
    for thing in (pool, sequences[0]):
        with pytest.raises(TypeError, match="cop|fork"):
            copy.copy(thing)


def test_threads_may_attend_at_once(engine):
    pool, sequences, _ = filled("float16", (700, 300, 90), 16, 100)
    q = queries(np.random.default_rng(0), 3, "float16")
    expected, found = pool.attend(sequences, q), []
    threads = [threading.Thread(target=lambda: found.extend(pool.attend(sequences, q) for _ in range(5))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20 and all(np.array_equal(out, expected) for out in found)


def test_sizes_and_words(backend):
    pool, (sequence, *_), _ = filled("bfloat16")
    assert pool.nbytes == 64 * 8 * HEADS * (DIM + V_DIM) * 2 and pool.page_size == 8 and pool.dtype == dtype_of("bfloat16")
    assert repr(pool) == "<PagedKVCache of 64 pages of 8 tokens, 50 free, 2 heads of 20, bfloat16>"
    assert repr(sequence) == "<Sequence of 37 tokens in 5 pages>" and len(sequence) == 37
    pool.free(sequence)
    assert repr(sequence) == "<freed Sequence>"


def test_bad_arguments(backend):
    pool, sequences, _ = filled()
    other = fastattn.PagedKVCache(4, 8, HEADS, DIM).new_sequence()
    k, v = tokens(np.random.default_rng(0), 2)
    q = queries(np.random.default_rng(0), 2)
    first, second = sequences[:2]
    before = pool.num_free_pages, pool._k.tobytes(), pool.lengths(sequences).tolist()
    for call, error, message in [
        (lambda: pool.append([first, first], k, v), ValueError, "sequences must not hold one twice"),
        (lambda: pool.append(first, k, v), TypeError, "sequences must be a list"),
        (lambda: pool.append([3], k, v), TypeError, "sequences must hold handles"),
        (lambda: pool.append([other], k, v), ValueError, "sequences must be of this pool; that at 0 is of another"),
        (lambda: pool.append([first], k[:, :1], v), ValueError, r"k must have shape \(n, 2, 20\)"),
        (lambda: pool.append([first], k, v[:1]), ValueError, r"v must have shape \(2, 2, 9\)"),
        (lambda: pool.append([first], k.astype(int), v), TypeError, "k must hold floats"),
        (lambda: pool.append([first, second], k, v, [0, 2]), ValueError, r"cu_seqlens must have shape \(3,\)"),
        (lambda: pool.append([first, second], k, v, [0, 2, 1]), ValueError, "cu_seqlens must not decrease"),
        (lambda: pool.append([first, second], k, v, [0, 1, 3]), ValueError, "cu_seqlens must end at the number of rows of k, 2; got 3"),
        (lambda: pool.append(sequences[:3], k, v), ValueError, "cu_seqlens must be given"),
        (lambda: pool.attend([first, other], q), ValueError, "of another"),
        (lambda: pool.attend(sequences[:3], q), ValueError, "cu_seqlens_q must be given"),
        (lambda: pool.attend([first], q[None]), ValueError, "q must have shape"),
        (lambda: pool.attend([first], q[..., :3]), ValueError, "k_pages must have the head size of q"),
        (lambda: pool.attend([first], q, query_offset=3), TypeError, "attend.. has no argument query_offset"),
        (lambda: pool.attend([first], q, kv_lengths=3), TypeError, "attend.. has no argument kv_lengths"),
        (lambda: pool.attend([first], q, mask=None), TypeError, "mask"),
        (lambda: pool.attend([first], q, cascade=1), TypeError, "cascade must be True or False"),
        (lambda: pool.truncate(first, 38), ValueError, "n must not exceed the length of the sequence, 37; got 38"),
        (lambda: pool.truncate(first, -1), ValueError, "n must be an int of at least 0"),
        (lambda: pool.truncate(other, 0), ValueError, "of another"),
        (lambda: pool.free(other), ValueError, "of another"),
        (lambda: pool.fork(None), TypeError, "handles"),
        (lambda: pool.reorder([first, second], [0]), ValueError, "indices must have shape"),
        (lambda: pool.reorder([first, second], [0, 2]), ValueError, "indices must lie between 0 and 1"),
        (lambda: fastattn.PagedKVCache(-1, 8, 2, 20), ValueError, "num_pages must be an int of at least 0"),
        (lambda: fastattn.PagedKVCache(2**31, 8, 2, 20), ValueError, "num_pages must be below"),
        (lambda: fastattn.PagedKVCache(4, 0, 2, 20), ValueError, "page_size must be an int of at least 1"),
        (lambda: fastattn.PagedKVCache(4, 8, 2, 20, dtype="float64"), TypeError, "dtype must be one of"),
    ]:
        with pytest.raises(error, match=message):
            call()
    assert (pool.num_free_pages, pool._k.tobytes(), pool.lengths(sequences).tolist()) == before


@pytest.mark.parametrize("shape", [(3, 3), (2, 3, 3), (3, 9)])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_drafts_in_pages_see_what_their_mask_says(engine, shape, page_size):
    """Bitwise what arrays side by side give, each sequence by itself."""
    lengths, tail = [70, 21], shape[-1]
    rng = np.random.default_rng(4)
    pool = fastattn.PagedKVCache(200, page_size, 2, 16, dtype="float32")
    sequences, stored = [pool.new_sequence() for _ in lengths], []
    for sequence, n in zip(sequences, lengths):
        k, v = rng.standard_normal((2, n, 2, 16), np.float32)
        pool.append([sequence], k, v)
        stored.append((k, v))
    q = rng.standard_normal((6, 4, 16), np.float32)
    tree = rng.random(shape) < 0.6
    out, lse = pool.attend(sequences, q, tail_mask=tree, return_lse=True)
    for b, (k, v) in enumerate(stored):
        mask = np.ones((3, lengths[b]), bool)
        mask[:, lengths[b] - tail :] = tree if tree.ndim == 2 else tree[b]
        some = q[3 * b : 3 * b + 3].swapaxes(0, 1)
        wanted, wanted_lse = fastattn.attention(some, k.swapaxes(0, 1), v.swapaxes(0, 1), mask=mask, return_lse=True)
        assert np.array_equal(out[3 * b : 3 * b + 3].swapaxes(0, 1), wanted)
        assert np.array_equal(lse[:, 3 * b : 3 * b + 3], wanted_lse)


def test_a_tail_mask_that_does_not_fit_is_refused(backend):
    pool = fastattn.PagedKVCache(20, 4, 1, 8, dtype="float32")
    long, short = pool.new_sequence(), pool.new_sequence()
    pool.append([long, short], *np.zeros((2, 12, 1, 8), np.float32), cu_seqlens=[0, 10, 12])
    q, tree = np.zeros((6, 1, 8), np.float32), np.ones((3, 3), bool)
    for message, error, mask, bounds in (
        ("tail_mask must not be longer than an entry; entry 1 has 2 keys", ValueError, tree, None),
        ("tail_mask must hold bools; got float64", TypeError, np.ones((3, 2)), None),
        (r"tail_mask must have shape \(3, Lt\) or \(2, 3, Lt\); got \(2, 2\)", ValueError, tree[:2, :2], None),
        ("tail_mask must be None where sequences have different numbers of queries", ValueError, tree[:, :2], [0, 4, 6]),
    ):
        with pytest.raises(error, match=message):
            pool.attend([long, short], q, bounds, tail_mask=mask)


def test_cascade_keeps_the_bits_of_invariant_rows(backend):
    rng = np.random.default_rng(5)
    pool = fastattn.PagedKVCache(40, 16, 2, 16, dtype="float32")
    parent = pool.new_sequence()
    pool.append([parent], *rng.standard_normal((2, 64, 2, 16), np.float32))
    sequences = [parent, pool.fork(parent), pool.fork(parent)]
    pool.append(sequences, *rng.standard_normal((2, 9, 2, 16), np.float32))
    q = rng.standard_normal((3, 4, 16), np.float32)
    together = pool.attend(sequences, q, cascade=True, invariant=True)
    for n, sequence in enumerate(sequences):
        assert np.array_equal(together[n : n + 1], pool.attend([sequence], q[n : n + 1], invariant=True))
