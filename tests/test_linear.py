"""The linear family against its recurrence in float64, on every engine."""

import functools
import zlib

import numpy as np
import oracle
import pytest
from hypothesis import given, strategies as st

import fastattn
from fastattn import runtime

FEATURES = {
    "identity": lambda x: x,
    "relu": lambda x: np.where(x < 0, 0, x),
    "elu": lambda x: np.where(x < 0, np.exp(np.minimum(x, 0)), x + 1),
}


def recurrence(
    q, k, v, *, beta=None, decay=None, log_decay=None, scale=None, feature_map="identity", normalize=False, causal=True, state=None,
    kv_lengths=None, compute=np.float64, store=None,
):  # fmt: skip
    """``(out, state)`` by definition, token by token, for arrays of rank 4."""
    batch, q_heads, q_len, head_dim = q.shape
    kv_len, columns = v.shape[2:]
    states = max(k.shape[1], v.shape[1])
    heads = max(states, q_heads)
    scale = 1 / np.sqrt(max(head_dim, 1)) if scale is None else scale
    a = None if decay is None else decay.astype(compute)
    if log_decay is not None:
        a = np.exp(log_decay.astype(compute))
    out = np.zeros((batch, heads, q_len, columns), store or compute)
    new = np.zeros((batch, states, head_dim, columns + normalize), compute)
    if state is not None:
        new += state
    phi = FEATURES[feature_map]
    lengths = np.broadcast_to(kv_len if kv_lengths is None else kv_lengths, batch)
    with np.errstate(all="ignore"):
        for b, s in np.ndindex(batch, states):
            S, z = new[b, s, :, :columns], new[b, s, :, columns:].sum(axis=-1)
            keys = phi(k[b, s * k.shape[1] // states].astype(compute))
            values = v[b, s * v.shape[1] // states].astype(compute)
            group = range(s * heads // states, (s + 1) * heads // states)
            queries = {h: phi(q[b, h * q_heads // heads].astype(compute)) * compute(scale) for h in group}

            def answer(i):
                for h in group:
                    y, divisor = queries[h][i] @ S, queries[h][i] @ z if normalize else 1
                    out[b, h, i] = 0 if divisor == 0 else y / divisor

            for t in range(lengths[b]):
                if a is not None:
                    S *= a[b, s, t, ..., None]
                    z *= a[b, s, t]
                u = values[t] if beta is None else compute(beta[b, s, t]) * (values[t] - keys[t] @ S)
                S += np.outer(keys[t], u)
                z += keys[t]
                if causal:
                    answer(t)
            for i in range(0 if causal else q_len):
                answer(i)
            if normalize:
                new[b, s, :, columns] = z
    return out, new


def random_case(kind, batch, heads, length, head_dim, v_head_dim, dtype=np.float32, seed=0):
    """Arguments of `kind`: the function, its arrays and its keywords, and those of the recurrence."""
    rng = np.random.default_rng([seed, zlib.crc32(kind.encode()), length, head_dim])
    q_heads, k_heads, v_heads = (heads, heads, heads) if isinstance(heads, int) else heads
    states = max(k_heads, v_heads)

    def normal(*shape):
        return rng.standard_normal(shape).astype(dtype)

    q = normal(batch, q_heads, length, head_dim)
    k = normal(batch, k_heads, length, head_dim).astype(np.float32)
    v = normal(batch, v_heads, length, v_head_dim)
    if "delta" in kind and head_dim:
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
    k = k.astype(dtype)
    keywords = {}
    if kind.endswith("rows"):
        keywords["decay"] = rng.uniform(0, 1, (batch, states, length, head_dim)) ** rng.uniform(0, 0.3, (1, 1, 1, head_dim))
    elif kind.endswith("log"):
        keywords["log_decay"] = -rng.exponential(1, (batch, states, length))
    elif kind.endswith("log_each"):
        keywords["log_decay"] = -rng.exponential(0.3, (batch, states, length, head_dim))
    elif kind.endswith("scalar"):
        keywords["decay"] = rng.uniform(0.5, 1, (batch, states, length))
        keywords["decay"][..., ::5] = 1
    for name in keywords:
        keywords[name] = keywords[name].astype(np.float32)
    if "delta" in kind:
        keywords["beta"] = rng.uniform(0, 1, (batch, states, length)).astype(np.float32)
    if kind.startswith("linear"):
        keywords.update({
            "linear": {"feature_map": "elu", "normalize": True, "scale": 1.0},
            "linear_relu": {"feature_map": "relu", "normalize": False, "scale": 0.5},
            "linear_identity": {"feature_map": "identity", "normalize": False, "scale": 1.0},
            "linear_whole": {"feature_map": "elu", "normalize": True, "scale": 1.0, "causal": False},
        }[kind])  # fmt: skip
    return q, k, v, keywords


KINDS = (
    "linear", "linear_relu", "linear_identity", "linear_whole", "gated_scalar", "gated_rows", "gated_log", "gated_log_each", "delta",
    "delta_scalar", "delta_rows", "delta_log_each",
)  # fmt: skip


def compute(q, k, v, keywords, **others):
    """The function of the package whose keywords these are."""
    keywords = {**keywords, **others}
    if "beta" in keywords:
        return fastattn.gated_delta_rule(q, k, v, keywords.pop("beta"), **keywords)
    if "feature_map" in keywords:
        return fastattn.linear_attention(q, k, v, **keywords)
    return fastattn.gated_linear_attention(q, k, v, **keywords)


_memo = {}


def expected(q, k, v, keywords, compute, store=None):
    key = (*(x.tobytes() for x in (q, k, v)), *((n, x.tobytes() if isinstance(x, np.ndarray) else repr(x)) for n, x in keywords.items()),
           compute, store, q.shape, k.shape, v.shape)  # fmt: skip
    key = hash(key)
    if key not in _memo:
        _memo[key] = recurrence(q, k, v, **keywords, compute=compute, store=store)
    return _memo[key]


def assert_right(out, state, q, k, v, keywords):
    """At most twice the error of the recurrence in float32, and a few roundings where that is right by luck."""
    exact, exact_state = expected(q, k, v, keywords, np.float64)
    plain, plain_state = expected(q, k, v, keywords, np.float32, q.dtype.type)
    largest = max(float(np.abs(x[np.isfinite(x)]).max(initial=0)) for x in (exact, exact_state))
    assert out.dtype == q.dtype
    few = 4 * oracle.ulp(np.float32)
    oracle.assert_close(out, exact, plain, (oracle.ulp(q.dtype) + few) * float(np.abs(exact[np.isfinite(exact)]).max(initial=0)))
    if state is not None:
        oracle.assert_close(state, exact_state, plain_state, few * largest, "state")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("batch", "heads", "length", "head_dim", "v_head_dim"),
    [
        (2, 2, 1, 16, 16), (1, 2, 3, 8, 8), (1, 1, 17, 7, 5), (1, 2, 64, 32, 32), (2, 3, 65, 16, 48), (1, 1, 130, 40, 24),
        (1, (4, 2, 2), 70, 16, 16), (1, (2, 2, 4), 70, 16, 17), (1, (6, 1, 3), 20, 33, 16), (1, 2, 200, 64, 64), (1, 1, 100, 1, 1),
    ],
)  # fmt: skip
def test_is_the_recurrence(engine, kind, batch, heads, length, head_dim, v_head_dim):
    q, k, v, keywords = random_case(kind, batch, heads, length, head_dim, v_head_dim)
    out, state = compute(q, k, v, keywords, return_state=True)
    assert state.dtype == np.float32
    assert_right(out, state, q, k, v, keywords)
    np.testing.assert_array_equal(compute(q, k, v, keywords), out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves(engine, kind, dtype):
    dtype = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else np.float16
    q, k, v, keywords = random_case(kind, 1, 2, 90, 24, 20, dtype)
    narrow = {n: x.astype(dtype) if isinstance(x, np.ndarray) else x for n, x in keywords.items()}
    for gates in (keywords, narrow):
        out, state = compute(q, k, v, gates, return_state=True)
        assert state.dtype == np.float32
        assert_right(out, state, q, k, v, gates)
    assert_right(*compute(q.astype(np.float32), k, v, keywords, return_state=True), q.astype(np.float32), k, v, keywords)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "linear_whole"])
@pytest.mark.parametrize("cuts", [(1,), (1, 2, 3, 4, 5), (64,), (63, 64, 65), (100,), (0, 149, 150)])
def test_may_be_cut_anywhere(engine, kind, cuts):
    q, k, v, keywords = random_case(kind, 1, (4, 2, 2), 150, 20, 16)
    state, outs = None, []
    for start, end in zip((0, *cuts), (*cuts, 150)):
        part = {n: x[:, :, start:end] if isinstance(x, np.ndarray) else x for n, x in keywords.items()}
        before = None if state is None else state.copy()
        out, new = compute(*(x[:, :, start:end] for x in (q, k, v)), part, state=state, return_state=True)
        if state is not None:
            np.testing.assert_array_equal(state, before)
        state = new
        outs.append(out)
    assert_right(np.concatenate(outs, axis=2), state, q, k, v, keywords)


@pytest.mark.parametrize("kind", ["linear", "gated_rows", "delta_scalar"])
@pytest.mark.parametrize("v_head_dim", [16, 48, 20])
def test_state_in_place(engine, kind, v_head_dim):
    q, k, v, keywords = random_case(kind, 1, 2, 40, 16, v_head_dim)
    _, state = compute(q, k, v, keywords, return_state=True)
    first = {n: x[:, :, :9] if isinstance(x, np.ndarray) else x for n, x in keywords.items()}
    rest = {n: x[:, :, 9:] if isinstance(x, np.ndarray) else x for n, x in keywords.items()}
    own = np.full_like(state, np.nan)
    result = compute(*(x[:, :, :9] for x in (q, k, v)), first, state_out=own, return_state=True)
    assert result[1] is own
    apart = compute(*(x[:, :, 9:] for x in (q, k, v)), rest, state=own, return_state=True)
    assert isinstance(compute(*(x[:, :, 9:] for x in (q, k, v)), rest, state=own, state_out=own), np.ndarray)
    np.testing.assert_array_equal(own, apart[1])
    np.testing.assert_allclose(own, state, rtol=1e-5, atol=1e-5 * np.abs(state).max())


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_are_sequences(engine, kind):
    lengths = [0, 1, 70, 0, 5, 64, 130]
    ends = np.cumsum([0, *lengths])
    q, k, v, keywords = random_case(kind, 1, (4, 2, 2), ends[-1], 12, 16)
    rng = np.random.default_rng(1)
    state = rng.standard_normal((len(lengths), 2, 12, 16 + keywords.get("normalize", False))).astype(np.float32) ** 2

    def packed(x):
        return x[0].swapaxes(0, 1) if isinstance(x, np.ndarray) else x

    packed_keywords = {n: packed(x) for n, x in keywords.items()}
    out, new = compute(*map(packed, (q, k, v)), packed_keywords, cu_seqlens=ends, state=state, return_state=True)
    assert out.shape == (ends[-1], 4, 16) and new.shape == state.shape
    for n, (start, end) in enumerate(zip(ends, ends[1:])):
        part = {name: x[:, :, start:end] if isinstance(x, np.ndarray) else x for name, x in keywords.items()}
        alone, alone_state = compute(
            *(x[:, :, start:end] for x in (q, k, v)), part, state=state[n : n + 1], return_state=True
        )  # fmt: skip
        np.testing.assert_array_equal(out[start:end].swapaxes(0, 1), alone[0])
        np.testing.assert_array_equal(new[n], alone_state[0])


@pytest.mark.parametrize("kind", KINDS)
def test_lengths(engine, kind):
    q, k, v, keywords = random_case(kind, 3, 2, 80, 8, 8)
    lengths = [0, 80, 66]
    for name, x in [("k", k), ("v", v), *keywords.items()]:
        if isinstance(x, np.ndarray):
            x[0] = x[2, :, 66:] = np.nan if name != "log_decay" else 7  # is not read
    if keywords.get("causal", True):
        q[2, :, 66:] = np.nan
    out, state = compute(q, k, v, keywords, kv_lengths=lengths, return_state=True)
    assert_right(out, state, q, k, v, {**keywords, "kv_lengths": lengths})
    assert not out[0].any() and not state[0].any()


@pytest.mark.parametrize("kind", KINDS)
def test_any_layout(engine, kind):
    q, k, v, keywords = random_case(kind, 2, 2, 70, 8, 12)
    right = compute(q, k, v, keywords, return_state=True)

    def turned(x):  # (B, L, H, ...) in memory
        return np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)

    def backwards(x):
        return np.ascontiguousarray(x[:, ::-1, ::-1])[:, ::-1, ::-1]

    def swapped(x):
        return x.astype(x.dtype.newbyteorder())

    def apart(x):
        return np.repeat(x, 2, axis=-1)[..., ::2]

    for change in (turned, backwards, swapped, apart):
        changed = {n: change(x) if isinstance(x, np.ndarray) else x for n, x in keywords.items()}
        room = turned(np.empty_like(right[0]))
        state_room = np.empty((*right[1].shape[:3], right[1].shape[3] + 3), np.float32)[..., : right[1].shape[3]]
        out, state = compute(*map(change, (q, k, v)), changed, return_state=True, out=room, state_out=state_room)
        assert out is room and state is state_room
        np.testing.assert_array_equal(out, right[0])
        np.testing.assert_array_equal(state, right[1])
    every_other = np.empty((*right[0].shape[:3], 24), np.float32)[..., ::2]
    np.testing.assert_array_equal(compute(q, k, v, keywords, out=every_other), right[0])
    for rank in (3, 2):
        lower = (0,) * (4 - rank)
        parts = {n: x[lower] if isinstance(x, np.ndarray) else x for n, x in keywords.items()}
        out, state = compute(*(x[lower] for x in (q, k, v)), parts, return_state=True)
        np.testing.assert_array_equal(out, right[0][lower])
        np.testing.assert_array_equal(state, right[1][lower])


def test_gates_are_broadcast(engine):
    q, k, v, _ = random_case("gated", 2, 3, 20, 8, 8)
    a = np.float32([0.9, 0.5, 1])
    right = fastattn.gated_linear_attention(q, k, v, np.broadcast_to(a[:, None], (2, 3, 20)))
    for decay in (a[None, :, None], a[None, :, None, None], np.broadcast_to(a[:, None, None], (2, 3, 20, 1))):
        np.testing.assert_array_equal(fastattn.gated_linear_attention(q, k, v, decay), right)
    rows = np.broadcast_to(a[:, None, None], (2, 3, 20, 8))
    np.testing.assert_allclose(fastattn.gated_linear_attention(q, k, v, rows), right, rtol=1e-5, atol=1e-5)
    ones = fastattn.gated_delta_rule(q, k / 4, v, np.ones((1, 1, 1), int), scale=1)
    np.testing.assert_array_equal(ones, fastattn.gated_delta_rule(q, k / 4, v, np.ones((2, 3, 20)), scale=1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 2, 5, 4, 4), (1, 0, 5, 4, 4), (2, 2, 0, 4, 4), (1, 2, 5, 0, 4), (1, 2, 5, 4, 0), (1, 1, 70, 0, 20)])
def test_empty_axes(engine, kind, shape):
    q, k, v, keywords = random_case(kind, *shape)
    out, state = compute(q, k, v, keywords, return_state=True)
    assert out.shape == (*shape[:3], shape[4]) and not np.isnan(out).any()
    assert state.shape == (shape[0], shape[1], shape[3], shape[4] + keywords.get("normalize", False))
    if shape[2] == 0:
        given = np.arange(state.size, dtype=np.float32).reshape(state.shape)
        np.testing.assert_array_equal(compute(q, k, v, keywords, state=given, return_state=True)[1], given)


SPOILED = [
    (kind, where, value)
    for kind in KINDS[:3] + KINDS[4:]
    for where in ("q", "k", "v", *(["beta"] if "delta" in kind else []))
    for value in (np.nan, np.inf, -np.inf, 3e38)
] + [(kind, "decay" if kind[-3:] in ("lar", "ows") else "log_decay", np.nan) for kind in KINDS[4:] if kind != "delta"]


@pytest.mark.parametrize(("kind", "where", "value"), SPOILED)
def test_the_past_does_not_see_the_future(engine, kind, where, value):
    """What is not finite reaches its own and later tokens; earlier ones are what they would be without it."""
    q, k, v, keywords = random_case(kind, 1, 2, 150, 16, 16)
    clean = compute(q, k, v, keywords)
    {"q": q, "k": k, "v": v, **keywords}[where][0, 1, 75, ...] = value
    out = compute(q, k, v, keywords)
    np.testing.assert_array_equal(out[:, :, :75], clean[:, :, :75])
    np.testing.assert_array_equal(out[:, 0], clean[:, 0])
    if np.isnan(value):
        assert np.isnan(out[0, 1, 75]).all()
        if where == "q":
            np.testing.assert_array_equal(out[0, 1, 76:], clean[0, 1, 76:])
        else:
            assert np.isnan(out[0, 1, 76:]).any()


@pytest.mark.parametrize("kind", ["gated_scalar", "gated_rows", "delta_scalar", "delta_rows"])
@pytest.mark.parametrize("smallest", [0.0, 1e-45, 1e-38, 1e-30, 1e-3])
def test_vanishing_decays(engine, kind, smallest):
    """The product over a chunk is far below the smallest float, and what it is made of still counts."""
    q, k, v, keywords = random_case(kind, 1, 2, 200, 16, 16)
    rng = np.random.default_rng(3)
    decay = keywords["decay"]
    decay[...] = np.where(rng.uniform(size=decay.shape) < 0.3, smallest, decay)
    decay[:, :, 100:140] = smallest
    with np.errstate(under="ignore"):
        out, state = compute(q, k, v, keywords, return_state=True)
        assert_right(out, state, q, k, v, keywords)
    if smallest == 0:
        logs = {**keywords, "log_decay": np.log(keywords.pop("decay"), where=decay > 0, out=np.full_like(decay, -np.inf))}
        del logs["decay"]
        np.testing.assert_allclose(compute(q, k, v, logs), out, rtol=1e-4, atol=1e-5)


def test_a_row_that_nothing_answers_is_zero(engine):
    q, k, v, _ = random_case("linear", 1, 1, 70, 4, 4)
    k[:, :, :10] = -1
    out = fastattn.linear_attention(q, k, v, feature_map="relu")
    assert not out[:, :, :10].any()
    assert np.isfinite(out).all()
    assert not fastattn.linear_attention(q, k, v, scale=0).any()


def test_queries_of_another_length(engine):
    q, k, v, keywords = random_case("linear_whole", 2, (4, 2, 2), 100, 12, 9)
    for rows in (0, 1, 33):
        out, state = compute(q[:, :, :rows], k, v, keywords, return_state=True)
        assert_right(out, state, q[:, :, :rows], k, v, keywords)


@functools.cache
def long_sequence():
    length, heads = 131072, 2
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, heads, length, 16), np.float32)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    log_decay = -rng.exponential(0.01, (1, heads, length)).astype(np.float32)
    beta = rng.uniform(0, 1, (1, heads, length)).astype(np.float32)
    with runtime.use_backend("numpy"):
        doubles = [x.astype(np.float64) for x in (q, k, v)]
        gated = fastattn.gated_linear_attention(*doubles, log_decay=log_decay.astype(np.float64))
        delta = fastattn.gated_delta_rule(*doubles, beta.astype(np.float64), log_decay=log_decay.astype(np.float64))
        sums = fastattn.linear_attention(*doubles)
    return q, k, v, beta, log_decay, gated, delta, sums


def test_errors_do_not_grow(engine):
    """The error over the last of 131,072 tokens is that over the first ones."""
    q, k, v, beta, log_decay, *rights = long_sequence()
    outs = (
        fastattn.gated_linear_attention(q, k, v, log_decay=log_decay),
        fastattn.gated_delta_rule(q, k, v, beta, log_decay=log_decay),
        fastattn.linear_attention(q, k, v),
    )
    for out, right in zip(outs, rights):
        errors = np.abs(out - right).max(axis=(0, 1, 3)).reshape(16, -1).max(axis=1)
        assert errors.max() <= 2e-5 * np.abs(right).max()
        assert errors[8:].max() <= 4 * errors[:4].max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [1, 3])
def test_threads_change_no_bit(engine, kind, heads):
    q, k, v, keywords = random_case(kind, 1, heads, 300, 64, 128)
    v[0, 0, 200, 100] = np.nan
    results = []
    for threads in (1, 2, 5):
        with fastattn.threads(threads):
            results.append(compute(q, k, v, keywords, return_state=True))
    for out, state in results[1:]:
        np.testing.assert_array_equal(out, results[0][0])
        np.testing.assert_array_equal(state, results[0][1])


@pytest.mark.parametrize("kind", KINDS)
def test_company_changes_no_bit(engine, kind):
    q, k, v, keywords = random_case(kind, 3, 2, 90, 16, 16)
    out = compute(q, k, v, keywords)
    for b in range(3):
        part = {n: x[b : b + 1] if isinstance(x, np.ndarray) else x for n, x in keywords.items()}
        np.testing.assert_array_equal(compute(*(x[b : b + 1] for x in (q, k, v)), part), out[b : b + 1])


def test_float64_is_numpys(backend):
    q, k, v, keywords = random_case("delta_scalar", 1, 2, 50, 8, 8)
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    if backend.backend != "numpy":
        with pytest.raises(TypeError, match="q must be .*float64"):
            compute(q, k, v, keywords)
        return
    out, state = compute(q, k, v, keywords, return_state=True)
    right, right_state = recurrence(q, k, v, **keywords)
    assert out.dtype == state.dtype == np.float64
    np.testing.assert_allclose(out, right, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(state, right_state, rtol=1e-12, atol=1e-12)


@given(
    st.sampled_from(KINDS),
    st.integers(1, 2),
    st.sampled_from([1, 2, (2, 1, 1), (4, 2, 2), (1, 2, 4), (3, 1, 3)]),
    st.integers(0, 140),
    st.integers(1, 40),
    st.integers(0, 40),
    st.sampled_from([np.float32, np.float16]),
    st.integers(0, 140),
)
def test_random_calls(engine, kind, batch, heads, length, head_dim, v_head_dim, dtype, cut):
    q, k, v, keywords = random_case(kind, batch, heads, length, head_dim, v_head_dim, dtype, seed=7)
    cut = 0 if kind == "linear_whole" else min(cut, length)
    first = {n: x[:, :, :cut] if isinstance(x, np.ndarray) else x for n, x in keywords.items()}
    rest = {n: x[:, :, cut:] if isinstance(x, np.ndarray) else x for n, x in keywords.items()}
    if cut == 0:
        out, state = compute(q, k, v, keywords, return_state=True)
    else:
        head, state = compute(*(x[:, :, :cut] for x in (q, k, v)), first, return_state=True)
        tail, state = compute(*(x[:, :, cut:] for x in (q, k, v)), rest, state=state, return_state=True)
        out = np.concatenate([head, tail], axis=2)
    assert_right(out, state, q, k, v, keywords)


# Errors

GOOD = {name: np.zeros((2, 4, 5, 8), np.float32) for name in "qkv"}
GATE = np.ones((2, 4, 5), np.float32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"decay": GATE * 1.5}, ValueError, "decay must lie between 0 and 1.*1.5"),
        ({"decay": -GATE}, ValueError, "decay must lie between 0 and 1.*-1"),
        ({"decay": np.where(np.arange(5) == 4, np.float32(-0.25), np.nan * GATE)}, ValueError, "decay must lie .*-0.25"),
        ({"log_decay": GATE}, ValueError, "log_decay must be at most 0"),
        ({"log_decay": np.full((2, 4, 5, 8), 1e-3, np.float16)}, ValueError, "log_decay must be at most 0"),
        ({}, TypeError, "decay or log_decay"),
        ({"decay": GATE, "log_decay": -GATE}, TypeError, "not both"),
        ({"decay": GATE[:, :3]}, ValueError, r"decay must have shape \(2, 4, 5\) or \(2, 4, 5, 8\); got \(2, 3, 5\)"),
        ({"decay": GATE[0]}, ValueError, "decay must have shape"),
        ({"decay": np.ones((2, 4, 5, 7))}, ValueError, "decay must have shape"),
        ({"decay": GATE.astype(complex)}, TypeError, "decay must hold real numbers"),
        ({"decay": GATE, **dict.fromkeys("kv", np.zeros((2, 4, 6, 8), np.float32))}, ValueError, "k must have the length"),
        ({"decay": GATE, "k": np.zeros((2, 3, 5, 8), np.float32)}, ValueError, "k must have a number of heads that divides 4; got 3"),
        ({"decay": GATE, "q": np.zeros((2, 3, 5, 8), np.float32)}, ValueError, "q must have a number of heads"),
        ({"decay": GATE, "v": np.zeros((2, 4, 4, 8), np.float32)}, ValueError, "v must have the batch size"),
        ({"decay": GATE, "k": np.zeros((2, 4, 5, 9), np.float32)}, ValueError, "k must have the head size"),
        ({"decay": GATE, "v": np.zeros((2, 4, 5, 8), np.float16)}, TypeError, "v must have the dtype of k"),
        ({"decay": GATE, "q": np.zeros((2, 4, 5, 8), np.float16)}, TypeError, "q must have the dtype of k"),
        ({"decay": GATE, "q": np.zeros((2, 4, 5, 8), int)}, TypeError, "q must be"),
        ({"decay": GATE, "q": np.zeros(8, np.float32)}, ValueError, "q must have shape"),
        ({"decay": GATE, "scale": np.inf}, ValueError, "scale must be finite"),
        ({"decay": GATE, "state": np.zeros((2, 4, 8, 9), np.float32)}, ValueError, r"state must have shape \(2, 4, 8, 8\); got"),
        ({"decay": GATE, "state": np.zeros((2, 4, 8, 8), bool)}, TypeError, "state must hold real"),
        ({"decay": GATE, "state_out": np.zeros((2, 4, 8, 8))}, TypeError, "state_out must be float32"),
        ({"decay": GATE, "state_out": np.zeros((2, 4, 8, 9), np.float32)}, ValueError, "state_out must have shape"),
        ({"decay": GATE, "state_out": np.zeros((2, 4, 8, 16), np.float32)[..., ::2]}, ValueError, "state_out must be .*contiguous"),
        ({"decay": GATE, "out": np.zeros((2, 4, 5, 7), np.float32)}, ValueError, "out must have shape"),
        ({"decay": GATE, "return_state": 1}, TypeError, "return_state must be True or False"),
        ({"decay": GATE, "kv_lengths": [1, 6]}, ValueError, "kv_lengths must lie between 0 and 5"),
        ({"decay": GATE, "cu_seqlens": [0, 5]}, ValueError, "q must have shape .total, H, D. with cu_seqlens"),
    ],
)  # fmt: skip
def test_errors(backend, changes, error, message):
    keywords = {**GOOD, **changes}
    out = keywords.setdefault("out", np.full((2, 4, 5, 8), 7, np.float32))
    before = out.copy()
    with pytest.raises(error, match=message):
        fastattn.gated_linear_attention(**keywords)
    np.testing.assert_array_equal(out, before)


@pytest.mark.parametrize("cu_seqlens", [[1, 5], [0, 4], [0, 6], [0, 4, 3, 5], []])
def test_errors_of_cu_seqlens(backend, cu_seqlens):
    q = np.zeros((5, 2, 8), np.float32)
    with pytest.raises(ValueError, match="cu_seqlens must"):
        fastattn.gated_linear_attention(q, q, q, np.ones((5, 2)), cu_seqlens=np.array(cu_seqlens, int))


def test_other_errors(backend):
    q = np.zeros((1, 2, 5, 8), np.float32)
    state = np.zeros((1, 2, 8, 8), np.float32)
    with pytest.raises(ValueError, match="feature_map must be one of .*softmax"):
        fastattn.linear_attention(q, q, q, feature_map="softmax")
    with pytest.raises(ValueError, match=r"state must have shape \(1, 2, 8, 9\); got \(1, 2, 8, 8\); with normalize"):
        fastattn.linear_attention(q, q, q, state=state)
    with pytest.raises(TypeError, match="normalize must be True or False"):
        fastattn.linear_attention(q, q, q, normalize=None)
    with pytest.raises(TypeError, match="beta must be an array"):
        fastattn.gated_delta_rule(q, q, q, None)
    with pytest.raises(TypeError, match="not have both"):
        fastattn.gated_delta_rule(q, q, q, np.ones((1, 2, 5)), np.ones((1, 2, 5)), log_decay=np.zeros((1, 2, 5)))
    with pytest.raises(ValueError, match=r"beta must have shape \(1, 2, 5\); got"):
        fastattn.gated_delta_rule(q, q, q, np.ones((1, 2, 5, 8)))
    with pytest.raises(ValueError, match="out must not overlap an input; it overlaps q"):
        fastattn.linear_attention(q, q.copy(), q.copy(), out=q)
    with pytest.raises(ValueError, match="state_out must not overlap an input; it overlaps state"):
        both = np.zeros((1, 2, 9, 8), np.float32)
        fastattn.linear_attention(q, q, q, normalize=False, state=both[:, :, :8], state_out=both[:, :, 1:])
    with pytest.raises(ValueError, match="out must not overlap an input; it overlaps state_out"):
        shared = np.zeros((1, 2, 8, 8), np.float32)
        fastattn.linear_attention(q, q, q, normalize=False, state_out=shared, out=shared[:, :, :5])
    assert fastattn.linear_attention(q, q, q, normalize=False, state=state.astype(np.float64)).dtype == np.float32


# The convolution before it


def test_causal_conv():
    rng = np.random.default_rng(0)
    x, weight, bias = rng.standard_normal((2, 3, 20)), rng.standard_normal((3, 4)), rng.standard_normal(3)
    padded = np.concatenate([np.zeros((2, 3, 3)), x], axis=2)
    right = bias[:, None] + sum(weight[:, i, None] * padded[..., i : i + 20] for i in range(4))
    out, state = fastattn.causal_conv(x, weight[:, None], bias, return_state=True)
    np.testing.assert_allclose(out, right, rtol=1e-12)
    np.testing.assert_array_equal(state, x[..., -3:])
    silu = fastattn.causal_conv(x, weight, bias, activation="silu")
    np.testing.assert_allclose(silu, right / (1 + np.exp(-right)), rtol=1e-12)
    state, parts = None, []
    for start, end in ((0, 1), (1, 2), (2, 12), (12, 20)):
        part, state = fastattn.causal_conv(x[..., start:end], weight, bias, state=state, return_state=True)
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, axis=-1), right, rtol=1e-12)
    half = fastattn.causal_conv(x.astype(np.float16), weight.astype(np.float16), bias.astype(np.float16))
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, right, rtol=0.02, atol=0.02)
    for changes, message in (
        ({"x": x[0]}, "x must"), ({"weight": weight[:2]}, "weight must"), ({"bias": bias[:2]}, "bias must"),
        ({"activation": "relu"}, "activation must"), ({"state": x}, "state must"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            fastattn.causal_conv(**{"x": x, "weight": weight, **changes})
