"""Random calls, shapes, strides and rules all at once, against the oracle; and laws that need no oracle."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from inputs import DTYPES, dtype_of
from oracle import assert_matches, ulp

import fastattn

pytestmark = pytest.mark.usefixtures("engine")
few = settings(max_examples=settings().max_examples // 3)


@st.composite
def arrays(draw, random, shape, dtype):
    """Normal numbers in memory of drawn axis order, direction and padding; some axes repeat one slice."""
    order = draw(st.permutations(range(len(shape))))
    repeated = draw(st.sampled_from([None, None, None, *range(len(shape))]))
    stored = [1 if axis == repeated else n for axis, n in enumerate(shape)]
    padding = draw(st.lists(st.integers(0, 2), min_size=len(shape), max_size=len(shape)))
    whole = random.standard_normal([stored[axis] + padding[axis] for axis in order]).astype(dtype)
    view = whole.transpose(np.argsort(order))
    view = view[tuple(slice(pad, None) for pad in padding)]
    view = view[tuple(slice(None, None, step) for step in draw(st.tuples(*[st.sampled_from([1, -1])] * len(shape))))]
    return np.broadcast_to(view, shape)


@st.composite
def masks(draw, random, shape):
    shape = tuple(1 if draw(st.booleans()) else n for n in shape)
    shape = shape[draw(st.integers(0, len(shape))) :]
    visible = random.random(shape) < draw(st.sampled_from([0.0, 0.1, 0.8, 1.0]))
    dtype = draw(st.sampled_from(["bool", "float16", "float32", "float64"]))
    if dtype == "bool":
        return np.asarray(visible)
    return np.where(visible, random.standard_normal(shape), -np.inf).astype(dtype)


def maybe(strategy):
    return st.none() | strategy


class Call:
    """Arrays and options; hypothesis prints what matters of them."""

    def __init__(self, arrays, options):
        self.arrays, self.options = arrays, options

    def __repr__(self):
        arrays = ", ".join(f"{name} {x.dtype} {x.shape} {x.strides}" for name, x in zip("qkv", self.arrays))
        return f"Call({arrays}, {self.options})"


@st.composite
def calls(draw):
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    heads = kv_heads * group
    q_len, kv_len = draw(st.integers(0, 40)), draw(st.integers(0, 70) | st.integers(250, 600))
    head_dim, v_head_dim = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    kv_dtype = draw(st.sampled_from(DTYPES))
    dtype = draw(st.sampled_from([kv_dtype, "float32"]))
    q = draw(arrays(random, (batch, heads, q_len, head_dim), dtype_of(dtype)))
    k = draw(arrays(random, (batch, kv_heads, kv_len, head_dim), dtype_of(kv_dtype)))
    v = draw(arrays(random, (batch, kv_heads, kv_len, v_head_dim), dtype_of(kv_dtype)))
    per_entry = lambda values: values | st.lists(values, min_size=batch, max_size=batch).map(np.array)  # noqa: E731
    side = maybe(st.integers(0, 80))
    sinks = draw(st.booleans())
    slopes = draw(st.sampled_from([None, (heads,), (batch, heads)]))
    options = {
        "mask": draw(masks(random, (batch, heads, q_len, kv_len))) if draw(st.booleans()) else None,
        "causal": draw(st.booleans()),
        "window": draw(maybe(st.tuples(side, side))),
        "query_offset": draw(maybe(per_entry(st.integers(-50, 100)))),
        "kv_lengths": draw(maybe(per_entry(st.integers(0, kv_len)))),
        "scale": draw(maybe(st.floats(-3, 3, width=32))),
        "softcap": draw(maybe(st.floats(0.5, 50, width=32))),
        "alibi_slopes": None if slopes is None else random.standard_normal(slopes).astype(np.float32) / 10,
        "sinks": random.standard_normal(heads).astype(np.float32) if sinks else None,
    }
    return Call((q, k, v), {name: value for name, value in options.items() if value is not None})


@given(calls())
def test_any_call(call):
    assert_matches(*call.arrays, **call.options)


@st.composite
def plain_calls(draw):
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    heads, kv_len, dim = draw(st.integers(1, 3)), draw(st.integers(1, 600)), draw(st.integers(1, 70))
    q_len = draw(st.integers(1, 40))
    return tuple(random.standard_normal((1, heads, n, dim)).astype(np.float32) for n in (q_len, kv_len, kv_len))


@few
@given(plain_calls(), st.randoms())
def test_the_order_of_the_keys_does_not_matter(qkv, random):
    q, k, v = qkv
    order = random.sample(range(k.shape[2]), k.shape[2])
    np.testing.assert_allclose(fastattn.attention(q, k[:, :, order], v[:, :, order]), fastattn.attention(q, k, v), atol=5e-6)


@few
@given(plain_calls(), st.floats(-100, 100, width=32))
def test_a_constant_bias_moves_lse_alone(qkv, shift):
    out, lse = fastattn.attention(*qkv, return_lse=True)
    bias = np.float32([[shift]])
    moved, moved_lse = fastattn.attention(*qkv, mask=bias, return_lse=True)
    np.testing.assert_allclose(moved, out, atol=20 * ulp("float32") * max(1, abs(shift)))
    np.testing.assert_allclose(moved_lse, lse + shift, atol=4 * ulp("float32") * max(1, abs(shift), abs(lse).max()))


@few
@given(plain_calls())
def test_out_lies_between_the_least_and_the_largest_value(qkv):
    q, k, v = qkv
    out = fastattn.attention(q, k, v, scale=5.0)
    room = 1e-5 * np.abs(v).max()
    assert (out <= v.max(axis=2, keepdims=True) + room).all() and (out >= v.min(axis=2, keepdims=True) - room).all()


@few
@given(plain_calls(), st.integers(0, 600))
def test_a_row_depends_on_nothing_but_its_own_query(qkv, row):
    """As the only row of a call or one among others: the same number, to rounding."""
    q, k, v = qkv
    row %= q.shape[2]
    alone = fastattn.attention(q[:, :, row : row + 1], k, v)
    np.testing.assert_allclose(alone, fastattn.attention(q, k, v)[:, :, row : row + 1], atol=5e-6)
