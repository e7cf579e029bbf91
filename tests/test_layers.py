"""Layers against their formulas in float64, in every arrangement of sequences."""

import math

import numpy as np
import pytest
from inputs import random

from fastattn import KVCache, PagedKVCache, layers
from fastattn.layers import FeedForward, LayerNorm, Linear, MultiHeadAttention, RMSNorm, Rope, TransformerBlock

WIDTH, HEADS, HIDDEN = 24, 4, 40


# The formulas: each function takes the rows of one sequence, in float64


def formula_norm(norm, x):
    x = x - x.mean(-1, keepdims=True) * norm.centred
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + norm.eps) * norm.weight
    return y if norm.bias is None else y + norm.bias


def formula_linear(layer, x):
    y = x @ layer.weight.T.astype(np.float64)
    return y if layer.bias is None else y + layer.bias


ACTIVATIONS = {
    "gelu": lambda x: x * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
}


def formula_feed_forward(layer, x):
    y = formula_linear(layer.up, x)
    if layer.gated:
        gate, y = np.split(y, 2, axis=1)
        return formula_linear(layer.down, ACTIVATIONS[layer.activation](gate) * y)
    return formula_linear(layer.down, ACTIVATIONS[layer.activation](y))


def formula_turned(rope, x, positions):
    """Pairs of numbers of (L, D) as complex numbers."""
    angle = positions[:, None] * rope.base ** (-np.arange(0, rope.dim, 2) / rope.dim)
    half, y = rope.dim // 2, x.copy()
    first, second = (slice(0, rope.dim, 2), slice(1, rope.dim, 2)) if rope.interleaved else (slice(0, half), slice(half, rope.dim))
    turned = (x[:, first] + 1j * x[:, second]) * np.exp(1j * angle)
    y[:, first], y[:, second] = turned.real, turned.imag
    return y


def formula_attention(layer, parts, x, context=None, positions=None):
    """`parts`: query, key, value as they were given."""
    source = x if context is None else context
    q, k, v = (formula_linear(part, rows) for part, rows in zip(parts, (x, source, source)))
    shape = {"q": layer.num_heads, "k": layer.num_kv_heads, "v": layer.num_kv_heads}
    q, k, v = (rows.reshape(len(rows), heads, -1) for rows, heads in zip((q, k, v), shape.values()))
    q = q if layer.q_norm is None else formula_norm(layer.q_norm, q)
    k = k if layer.k_norm is None else formula_norm(layer.k_norm, k)
    positions = np.arange(len(x)) if positions is None else positions
    out = []
    for h in range(layer.num_heads):
        q_h, k_h, v_h = q[:, h], k[:, h // (layer.num_heads // layer.num_kv_heads)], v[:, h // (layer.num_heads // layer.num_kv_heads)]
        if layer.rope is not None:
            q_h, k_h = formula_turned(layer.rope, q_h, positions), formula_turned(layer.rope, k_h, positions)
        s = q_h @ k_h.T * layer.rules.get("scale", 1 / math.sqrt(layer.head_dim))
        if layer.rules.get("causal"):
            s[np.triu_indices(len(s), 1)] = -np.inf
        p = np.exp(s - s.max(1, keepdims=True))
        out.append(p / p.sum(1, keepdims=True) @ v_h)
    return formula_linear(layer.out, np.concatenate(out, 1))


def formula_block(block, parts, x):
    def attend(x):
        return formula_attention(block.attention, parts, x)

    def forward(x):
        return formula_feed_forward(block.feed_forward, x)

    norms = block.attention_norm, block.feed_forward_norm
    if block.parallel:
        h = formula_norm(norms[0], x)
        return x + attend(h) + forward(h if norms[1] is None else formula_norm(norms[1], x))
    for layer, norm in zip((attend, forward), norms):
        x = x + layer(formula_norm(norm, x)) if block.norm_first else formula_norm(norm, x + layer(x))
    return x


def projections(kv_heads=HEADS, head_dim=6, v_head_dim=6, bias=True, seed=0, inputs=WIDTH, context=WIDTH):
    rows = (HEADS * head_dim, inputs), (kv_heads * head_dim, context), (kv_heads * v_head_dim, context), (WIDTH, HEADS * v_head_dim)
    return [Linear(random(*shape, seed=seed + n), random(shape[0], seed=seed + n) if bias else None) for n, shape in enumerate(rows)]


def a_norm(kind, size=WIDTH, seed=9):
    bias = random(size, seed=seed + 1) if kind is LayerNorm else None
    return kind(1 + random(size, seed=seed), bias, eps=1e-5)


ATTENTION = {
    "plain": ({}, {}),
    "causal": ({}, {"causal": True}),
    "no biases": ({"bias": False}, {}),
    "grouped": ({"kv_heads": 2}, {"num_kv_heads": 2, "causal": True}),
    "value size": ({"v_head_dim": 10}, {"scale": 0.7}),
    "norms": ({"kv_heads": 1}, {"num_kv_heads": 1, "q_norm": a_norm(RMSNorm, 6), "k_norm": a_norm(LayerNorm, 6, 3)}),
    "rope": ({}, {"rope": Rope(6), "causal": True}),
    "part of the head": ({"kv_heads": 2}, {"num_kv_heads": 2, "rope": Rope(4, 100.0, interleaved=True)}),
    "all": (
        {"kv_heads": 2, "head_dim": 8, "v_head_dim": 5},
        {"num_kv_heads": 2, "q_norm": a_norm(RMSNorm, 8), "k_norm": a_norm(RMSNorm, 8, 3), "rope": Rope(8), "causal": True},
    ),
}


@pytest.fixture(params=ATTENTION.values(), ids=ATTENTION)
def attend(request):
    """A layer, and its formula for the rows of one sequence."""
    sizes, keywords = request.param
    *parts, out = projections(**sizes)
    layer = MultiHeadAttention(*parts, out, num_heads=HEADS, **keywords)
    return layer, lambda x, **more: formula_attention(layer, parts, x.astype(np.float64), **more)


def close(actual, expected, tolerance=2e-6):
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * max(1, np.abs(expected).max(initial=0)))


def of_each(function, x, lengths):
    """A padded array of what a function makes of each sequence; zeros behind them."""
    results = [function(rows[:n]) if n else np.zeros((0, WIDTH)) for rows, n in zip(x, lengths)]
    out = np.zeros((*x.shape[:2], WIDTH))
    for rows, result, n in zip(out, results, lengths):
        rows[:n] = result
    return out


LENGTHS = [7, 12, 0, 1]


def test_attention_is_its_formula(engine, attend):
    layer, formula = attend
    x = random(3, 11, WIDTH)
    expected = np.stack(list(map(formula, x)))
    close(layer(x), expected)
    close(layer(x[1]), expected[1])


def test_padding_is_left_out_and_comes_back_as_zeros(backend, attend):
    layer, formula = attend
    x = random(4, 12, WIDTH)
    x[0, 9] = np.nan  # padding
    expected = of_each(formula, x, LENGTHS)
    real = np.arange(12) < np.array(LENGTHS)[:, None]
    for actual in (layer(x, lengths=LENGTHS), layer(x, attention_mask=real), layer(x, attention_mask=real.astype(np.int64))):
        close(actual, expected)
    close(layer(x[0], lengths=7), expected[0])
    left = np.zeros_like(x)
    for b, n in enumerate(LENGTHS):
        left[b, 12 - n :] = x[b, :n]
    actual = layer(left, attention_mask=real[:, ::-1])
    for b, n in enumerate(LENGTHS):
        close(actual[b, 12 - n :], expected[b, :n])


def test_packed_rows_are_those_of_each_sequence(backend, attend):
    layer, formula = attend
    bounds = np.cumsum([0, *LENGTHS])
    x = random(bounds[-1], WIDTH)
    expected = np.concatenate([formula(x[a:b]) for a, b in zip(bounds, bounds[1:]) if b > a])
    close(layer(x, cu_seqlens=bounds), expected)


def test_a_mask_is_added_and_padding_stays_out(backend, attend):
    layer, formula = attend
    x, mask = random(2, 9, WIDTH), np.tril(np.ones((9, 9), bool))
    causal = MultiHeadAttention.__new__(MultiHeadAttention)
    vars(causal).update(vars(layer), rules={**layer.rules, "causal": True})
    close(layer(x, mask=mask), causal(x))
    close(layer(x, mask=mask, lengths=[4, 9]), causal(x, lengths=[4, 9]))


@pytest.mark.parametrize("cuts", [[12], [1] * 12, [5, 0, 4, 3]], ids=str)
def test_a_cache_in_any_cuts_gives_what_one_pass_gives(backend, cuts):
    sizes, keywords = ATTENTION["all"]
    *parts, out = projections(**sizes)
    layer = MultiHeadAttention(*parts, out, num_heads=HEADS, **keywords)
    x = random(2, 12, WIDTH)
    cache = KVCache(2, 2, 12, 8, 5, "float32")
    bounds = np.cumsum([0, *cuts])
    close(np.concatenate([layer(x[:, a:b], cache=cache) for a, b in zip(bounds, bounds[1:])], 1), layer(x))


def test_a_ragged_cache_goes_on_where_each_entry_stands(backend):
    *parts, out = projections()
    layer = MultiHeadAttention(*parts, out, num_heads=HEADS, rope=Rope(6), causal=True)
    x, cache = random(2, 12, WIDTH), KVCache(2, HEADS, 16, 6, dtype="float32")
    first = layer(x[:, :7], lengths=[3, 7], cache=cache)
    second = layer(np.stack([x[0, 3:7], x[1, 7:11]]), lengths=[4, 2], cache=cache)
    close(np.concatenate([first[0, :3], second[0]]), layer(x[0, :7]))
    close(np.concatenate([first[1], second[1, :2]]), layer(x[1, :9]))
    assert not first[0, 3:].any() and not second[1, 2:].any()


RAGGED = [[3, 7], [1, 1], [4, 0], [2, 4]]  # new tokens of two sequences, call by call


@pytest.mark.parametrize("kind", ["entries", "pages"])
@pytest.mark.parametrize("given", ["packed", "padded"])
def test_caches_take_packed_and_padded_rows(backend, kind, given):
    *parts, out = projections()
    layer = MultiHeadAttention(*parts, out, num_heads=HEADS, rope=Rope(6), causal=True, window=(5, None))
    x, pool = random(2, 12, WIDTH), PagedKVCache(8, 4, HEADS, 6, dtype="float32")
    pages = layers.Pages(pool, [pool.new_sequence() for _ in x])
    cache = pages if kind == "pages" else KVCache(2, HEADS, 16, 6, dtype="float32")
    done, results = np.zeros(2, int), [[], []]
    for counts in RAGGED:
        new = [x[b, done[b] : done[b] + n] for b, n in enumerate(counts)]
        if given == "packed":
            y = np.split(layer(np.concatenate(new), cu_seqlens=[0, counts[0], sum(counts)], cache=cache), [counts[0]])
        else:
            padded = np.full((2, max(counts), WIDTH), 9, np.float32)
            for row, tokens in zip(padded, new):
                row[: len(tokens)] = tokens
            y = layer(padded, lengths=counts, cache=cache)
            assert not any(row[n:].any() for row, n in zip(y, counts))
        done += counts
        np.testing.assert_array_equal(cache.lengths, done)
        for result, row, n in zip(results, y, counts):
            result.append(row[:n])
    for b, result in enumerate(results):
        close(np.concatenate(result), layer(x[b, : done[b]]))


def test_a_decoder_over_pages(backend):
    blocks = [a_block(seed=seed)[0] for seed in (1, 2)]
    decoder = layers.Decoder(blocks)
    x, pools = random(2, 9, WIDTH), [PagedKVCache(8, 4, HEADS, 6, dtype="float32") for _ in blocks]
    cache = [layers.Pages(pool, [pool.new_sequence() for _ in x]) for pool in pools]
    first = decoder(np.concatenate((x[0, :4], x[1, :6])), cu_seqlens=[0, 4, 10], cache=cache)
    second = decoder(x[[0, 1], [4, 6]][:, None], cache=cache)
    close(np.concatenate((first[:4], second[0])), decoder(x[0, :5]), 5e-6)
    close(np.concatenate((first[4:], second[1])), decoder(x[1, :7]), 5e-6)


def test_what_pages_refuse():
    *parts, out = projections()
    layer, pool = MultiHeadAttention(*parts, out, num_heads=HEADS), PagedKVCache(8, 4, HEADS, 6)
    sequence = pool.new_sequence()
    with pytest.raises(ValueError, match="cache must hold 2 sequences, as many as x; got 1"):
        layer(random(2, 3, WIDTH), cache=layers.Pages(pool, [sequence]))
    with pytest.raises(TypeError, match="mask is not for a cache of pages"):
        layer(random(1, 3, WIDTH), mask=np.ones((3, 3), bool), cache=layers.Pages(pool, [sequence]))
    assert pool.lengths([sequence]) == 0


def test_given_positions_turn_queries_and_keys(backend):
    *parts, out = projections()
    layer = MultiHeadAttention(*parts, out, num_heads=HEADS, rope=Rope(6, 10.0))
    x, positions = random(2, 8, WIDTH), np.array([[3, 1, 4, 1, 5, 9, 2, 6], [0, 0, 1, 1, 2, 2, 3, 3]])
    expected = np.stack([formula_attention(layer, parts, rows.astype(np.float64), positions=p) for rows, p in zip(x, positions)])
    close(layer(x, positions=positions), expected)
    close(layer(x, positions=positions[0])[0], expected[0])


@pytest.mark.parametrize("width", [WIDTH, 10])
def test_cross_attention(engine, width):
    *parts, out = projections(context=width)
    layer = MultiHeadAttention(*parts, out, num_heads=HEADS)
    x, context = random(3, 5, WIDTH), random(3, 9, width, seed=1)

    def expected(lengths, context_lengths):
        rows = zip(x, context, lengths, context_lengths)
        return [formula_attention(layer, parts, r[:n].astype(np.float64), c[:m].astype(np.float64)) for r, c, n, m in rows]

    close(layer(x, context), np.stack(expected([5] * 3, [9] * 3)))
    few = np.stack(expected([5] * 3, [4, 9, 2]))
    close(layer(x, context, context_lengths=[4, 9, 2]), few)
    close(layer(x, layer.keys(context, lengths=[4, 9, 2])), few)
    close(layer(x, layer.keys(context, attention_mask=np.arange(9) < np.array([4, 9, 2])[:, None])), few)
    close(layer(x, context, context_lengths=[4, 9, 2], mask=np.ones((5, 9), bool)), few)
    both = layer(x, context, lengths=[2, 5, 1], context_lengths=[4, 9, 2])
    close(np.concatenate([r[:n] for r, n in zip(both, [2, 5, 1])]), np.concatenate(expected([2, 5, 1], [4, 9, 2])))
    packed = np.concatenate([r[:n] for r, n in zip(context, [4, 9, 2])])
    close(layer(x, packed, context_cu_seqlens=[0, 4, 13, 15]), few)


# Blocks and stacks

BLOCKS = {
    "pre": {"norm_first": True},
    "post": {"norm_first": False},
    "parallel": {"parallel": True},
    "parallel, one norm": {"parallel": True, "feed_forward_norm": None},
}


def a_feed_forward(activation="gelu", gated=False, bias=True, seed=20):
    def layer(outputs, inputs, n):
        return Linear(random(outputs, inputs, seed=seed + n), random(outputs, seed=seed + n) if bias else None)

    gate = layer(HIDDEN, WIDTH, 2) if gated else None
    return FeedForward(layer(HIDDEN, WIDTH, 0), layer(WIDTH, HIDDEN, 1), gate=gate, activation=activation)


def a_block(kind=LayerNorm, activation="gelu", gated=False, seed=0, **keywords):
    *parts, out = projections(seed=seed)
    attention = MultiHeadAttention(*parts, out, num_heads=HEADS, causal=True)
    norms = {"attention_norm": a_norm(kind), "feed_forward_norm": a_norm(kind, seed=12)}
    return TransformerBlock(attention, a_feed_forward(activation, gated), **{**norms, **keywords}), parts


@pytest.mark.parametrize("keywords", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
def test_block_is_its_formula(engine, keywords, kind):
    block, parts = a_block(kind, **keywords)
    x = random(4, 12, WIDTH)
    before = x.copy()
    close(block(x), np.stack([formula_block(block, parts, rows.astype(np.float64)) for rows in x]), 5e-6)
    expected = of_each(lambda rows: formula_block(block, parts, rows.astype(np.float64)), x, LENGTHS)
    close(block(x, lengths=LENGTHS), expected, 5e-6)
    cache = KVCache(4, HEADS, None, 6, dtype="float32")
    close(np.concatenate([block(x[:, :5], cache=cache), block(x[:, 5:], cache=cache)], 1), block(x), 5e-6)
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_feed_forward_is_its_formula(engine, activation, bias, gated):
    layer = a_feed_forward(activation, gated, bias)
    for shape in ((5, 7, WIDTH), (1, WIDTH), (0, WIDTH)):
        x = random(*shape, scale=3)
        close(layer(x), formula_feed_forward(layer, x.astype(np.float64).reshape(-1, WIDTH)).reshape(shape))


@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
@pytest.mark.parametrize("size", [1, 3, 16, 33, 384, 1000])
def test_norms_are_their_formulas(engine, kind, size):
    norm, x = a_norm(kind, size), random(3, 5, size, scale=2)
    close(norm(x), formula_norm(norm, x.astype(np.float64)))
    x += 300  # the mean is large beside what is left of it
    close(norm(x), formula_norm(norm, x.astype(np.float64)), 1e-4)


def test_stacks_embed_and_end_in_a_norm(backend):
    table, positions, types = random(30, WIDTH), random(16, WIDTH, seed=1), random(2, WIDTH, seed=2)
    embedding = layers.TokenEmbedding(table, positions=positions, types=types, norm=a_norm(LayerNorm), scale=2.0, position_offset=2)
    (first, first_parts), (second, second_parts) = a_block(), a_block(seed=40)
    encoder = layers.Encoder([first, second], embedding=embedding, norm=a_norm(RMSNorm))
    tokens, kinds = np.arange(24).reshape(2, 12) % 30, np.array([[0] * 5 + [1] * 7] * 2)

    def formula(numbers, kinds):
        x = 2.0 * table[numbers].astype(np.float64) + positions[2 : 2 + len(numbers)] + types[kinds]
        x = formula_block(second, second_parts, formula_block(first, first_parts, formula_norm(embedding.norm, x)))
        return formula_norm(encoder.norm, x)

    expected = np.zeros((2, 12, WIDTH))
    expected[0], expected[1, :8] = formula(tokens[0], kinds[0]), formula(tokens[1, :8], kinds[1, :8])
    close(encoder(tokens, types=kinds, lengths=[12, 8]), expected, 5e-6)
    packed = encoder(np.concatenate([tokens[0], tokens[1, :8]]), types=np.concatenate([kinds[0], kinds[1, :8]]), cu_seqlens=[0, 12, 20])
    close(packed, np.concatenate([expected[0], expected[1, :8]]), 5e-6)

    decoder = layers.Decoder([first, second], embedding=embedding, norm=encoder.norm)
    cache = decoder.new_cache(2, 12)
    hidden = np.concatenate([decoder(tokens[:, :5], cache=cache), decoder(tokens[:, 5:], cache=cache)], 1)
    close(hidden, decoder(tokens), 5e-6)
    close(decoder.logits(hidden), hidden @ table.T)


def test_patches_are_a_convolution():
    weight, bias, first = random(8, 3, 4, 2), random(8), random(1, 8)
    images = random(2, 3, 8, 6)
    embedding = layers.PatchEmbedding(weight, bias, first=first, positions=random(7, 8, seed=3))
    expected = np.tile(first, (2, 7, 1)).astype(np.float64)
    for n, (y, x) in enumerate((y, x) for y in range(2) for x in range(3)):
        expected[:, 1 + n] = np.einsum("bcij,ecij->be", images[:, :, 4 * y : 4 * y + 4, 2 * x : 2 * x + 2], weight) + bias
    expected[:, 0] = first
    close(embedding(images), expected + embedding.positions)


def test_weights_of_16_bits_become_float32():
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    for dtype in (np.float16, bfloat16):
        assert Linear(random(3, 2).astype(dtype), random(3).astype(dtype)).weight.dtype == np.float32


# What cannot be


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Linear(random(3)), r"weight must have shape \(n, n\); got \(3,\)"),
        (lambda: Linear(random(3, 2), random(2)), r"bias must have shape \(3,\); got \(2,\)"),
        (lambda: Linear(np.ones((3, 2), int)), "weight must hold floats; got int64"),
        (lambda: LayerNorm(random(3), eps=-1.0), "eps must be at least 0"),
        (lambda: FeedForward(random(4, 3), random(3, 5)), "down must have inputs for the outputs of up, 4"),
        (lambda: FeedForward(random(4, 3), random(3, 4), gate=random(5, 3)), r"gate must have the shape of up, \(4, 3\)"),
        (lambda: FeedForward(random(4, 3), random(3, 4), activation="tanhh"), "activation must be one of gelu, .*; got 'tanhh'"),
        (lambda: MultiHeadAttention(*projections(), num_heads=5), "query must have outputs for 5 heads; got 24"),
        (lambda: MultiHeadAttention(*projections(), num_heads=0), "num_heads must be at least 1"),
        (lambda: MultiHeadAttention(*projections(), num_heads=4, num_kv_heads=3), "num_kv_heads must divide num_heads, 4; got 3"),
        (lambda: MultiHeadAttention(*projections(), num_heads=4, num_kv_heads=2), "key must have outputs for 2 heads of 6; got 24"),
        (lambda: MultiHeadAttention(*projections(), num_heads=4, q_norm=RMSNorm(random(5))), "q_norm must be of the head size, 6"),
        (lambda: MultiHeadAttention(*projections(), num_heads=4, rope=Rope(8)), "rope must turn at most the head size, 6; got 8"),
        (lambda: MultiHeadAttention(*projections(), num_heads=4, kv_lengths=3), "has no argument kv_lengths"),
        (lambda: a_block(feed_forward_norm=None), "feed_forward_norm must be given"),
        (lambda: a_block(parallel=True, norm_first=False), "parallel blocks must have norm_first"),
        (lambda: a_block(cross_norm=a_norm(RMSNorm)), "cross_attention and cross_norm must be given together"),
        (lambda: layers.TokenEmbedding(random(5, 4), positions=random(3, 3)), r"positions must have shape \(n, 4\); got \(3, 3\)"),
    ],
)
def test_layers_that_cannot_be(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"lengths": [3, 13]}, "lengths must lie between 0 and 12"),
        ({"lengths": [3, 12], "cu_seqlens": [0, 24]}, "exclude each other"),
        ({"attention_mask": np.ones((2, 11))}, "attention_mask must hold bools"),
        ({"attention_mask": np.ones((2, 11), bool)}, r"attention_mask must have shape \(2, 12\); got \(2, 11\)"),
        ({"cu_seqlens": [0, 24]}, r"x must have shape \(total, E\) with cu_seqlens"),
        ({"positions": np.zeros((3, 12), int)}, r"positions must have shape \(2, 12\)"),
        ({"positions": np.full(12, -1)}, "positions must be ints of at least 0"),
        ({"context": np.zeros((3, 4, WIDTH), np.float32)}, "context must have as many sequences as x, 2; got 3"),
        ({"context": np.zeros((2, 4, WIDTH), np.float32), "context_lengths": [1, 5]}, "context_lengths must lie between 0 and 4"),
        ({"context": np.zeros((2, 4, WIDTH), np.float32), "cache": 1}, "cache is for self-attention"),
        ({"cache": KVCache(2, HEADS, 16, 6), "attention_mask": np.arange(12) % 2 == [[0], [1]]}, "padding on the right"),
    ],
)
def test_calls_that_cannot_be(keywords, message):
    layer = MultiHeadAttention(*projections(), num_heads=HEADS, rope=Rope(6))
    with pytest.raises((TypeError, ValueError), match=message):
        layer(random(2, 12, WIDTH), **keywords)


def test_tokens_beyond_the_table_are_refused():
    encoder = layers.Encoder([a_block()[0]], embedding=layers.TokenEmbedding(random(5, WIDTH)))
    for tokens in ([[5]], [[-1]]):
        with pytest.raises(ValueError, match="tokens must lie between 0 and 4"):
            encoder(tokens)
    with pytest.raises(TypeError, match="no kinds of tokens"):
        encoder([[1]], types=[[0]])
