"""Batches whose entries differ: lengths, starts and padded query rows. The shape of an entry is its own."""

import numpy as np
import pytest
from hypothesis import given, strategies as st
from inputs import DTYPES, random_qkv
from oracle import assert_matches, attention as oracle_attention

import fastattn
from fastattn import BlockMask

# (q_len, kv_len) is what the arrays have room for. Entries cross splits and panels, have few rows or none, and no keys.
BATCHES = {
    "prefill": dict(
        sizes=dict(heads=4, kv_heads=2, q_len=300, kv_len=400, head_dim=24),
        kv_lengths=[400, 0, 333, 65, 300, 1], kv_starts=[0, 0, 32, 64, 171, 0], q_lengths=[300, 7, 150, 1, 0, 6],
    ),
    "decode": dict(
        sizes=dict(heads=8, kv_heads=2, q_len=2, kv_len=9000, head_dim=16),
        kv_lengths=[9000, 5000, 2777, 1024, 6, 4097], kv_starts=[0, 100, 1, 0, 3, 4000], q_lengths=[2, 1, 2, 2, 1, 0],
    ),
    "mixed": dict(
        sizes=dict(heads=2, q_len=200, kv_len=5000, head_dim=16),
        kv_lengths=[5000, 5000, 4999, 200, 2100, 64], kv_starts=[0, 0, 1000, 0, 7, 0], q_lengths=[1, 200, 12, 200, 13, 64],
    ),
}  # fmt: skip


def lengths_of(batch):
    return {name: np.array(batch[name]) for name in ("kv_lengths", "kv_starts", "q_lengths")}


def alone(q, k, v, b, options):
    """Entry b as arrays that hold its rows and keys and nothing else."""
    options = dict(options)
    length, start, rows = (int(options.pop(name)[b]) for name in ("kv_lengths", "kv_starts", "q_lengths"))
    if "query_offset" in options:
        options["query_offset"] = options["query_offset"][b] - start
    if "mask" in options:
        options["mask"] = options["mask"][b : b + 1, :, :rows, start:length]
    own = q[b : b + 1, :, :rows], k[b : b + 1, :, start:length], v[b : b + 1, :, start:length]
    return fastattn.attention(*(x.copy() for x in own), return_lse=True, **options), rows


OPTIONS = {
    "plain": lambda shape, rng: {},
    "causal": lambda shape, rng: {"causal": True},
    "window": lambda shape, rng: {"window": (200, 50), "query_offset": rng.integers(-50, 400, shape[0])},
    "mask": lambda shape, rng: {"mask": rng.random(shape) < 0.8},
    "bias": lambda shape, rng: {"mask": rng.standard_normal(shape, np.float32), "alibi_slopes": np.full(shape[1], 0.1)},
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_and_company_change_no_bit(engine, batch, options, dtype):
    batch, rng = BATCHES[batch], np.random.default_rng(1)
    q, k, v = random_qkv(batch=6, **batch["sizes"], dtype=dtype)
    options = {**lengths_of(batch), **OPTIONS[options]((6, q.shape[1], q.shape[2], k.shape[2]), rng)}
    out, lse = fastattn.attention(q, k, v, return_lse=True, **options)
    for b in range(len(q)):
        (own, own_lse), rows = alone(q, k, v, b, options)
        np.testing.assert_array_equal(out[b : b + 1, :, :rows], own)
        np.testing.assert_array_equal(lse[b : b + 1, :, :rows], own_lse)
        assert not out[b, :, rows:].any() and (lse[b, :, rows:] == -np.inf).all()


@pytest.mark.parametrize("batch", BATCHES)
def test_any_number_of_threads_gives_the_same_bits(engine, batch):
    q, k, v = random_qkv(batch=6, **BATCHES[batch]["sizes"], dtype="bfloat16")
    results = []
    for count in (1, 2, 5):
        with fastattn.threads(count):
            results.append(fastattn.attention(q, k, v, causal=True, return_lse=True, **lengths_of(BATCHES[batch])))
    for out, lse in results[1:]:
        np.testing.assert_array_equal(out, results[0][0])
        np.testing.assert_array_equal(lse, results[0][1])


def test_what_is_padding_is_not_looked_at(engine):
    """NaN and inf beyond the lengths and before the starts; and a sink has no part in rows that are padding."""
    q, k, v = random_qkv(batch=3, heads=2, q_len=20, kv_len=50, head_dim=8)
    lengths = dict(kv_lengths=[50, 31, 0], kv_starts=[10, 0, 0], q_lengths=[20, 3, 20])
    sinks = np.float32([0.5, -1])
    expected = fastattn.attention(q, k, v, sinks=sinks, return_lse=True, **lengths)
    for b in range(3):
        for x in k, v:
            x[b, :, : lengths["kv_starts"][b]] = x[b, :, lengths["kv_lengths"][b] :] = np.nan
        q[b, :, lengths["q_lengths"][b] :] = np.inf
    out, lse = fastattn.attention(q, k, v, sinks=sinks, return_lse=True, **lengths)
    np.testing.assert_array_equal(out, expected[0])
    np.testing.assert_array_equal(lse, expected[1])
    assert (lse[1, :, 3:] == -np.inf).all() and (lse[2] == sinks[:, None]).all() and not out[2].any()


@given(st.data())
def test_ragged_batches_are_right(engine, data):
    batch, q_len, kv_len = 3, data.draw(st.integers(0, 40)), data.draw(st.integers(0, 90))
    q, k, v = random_qkv(batch=batch, heads=2, kv_heads=1, q_len=q_len, kv_len=kv_len, head_dim=5)
    kv_lengths = [data.draw(st.integers(0, kv_len)) for _ in range(batch)]
    options = dict(
        kv_lengths=kv_lengths,
        kv_starts=[data.draw(st.integers(0, length)) for length in kv_lengths],
        q_lengths=[data.draw(st.integers(0, q_len)) for _ in range(batch)],
        causal=data.draw(st.booleans()),
        window=data.draw(st.none() | st.tuples(st.integers(0, 30), st.none() | st.integers(0, 30))),
        query_offset=data.draw(st.none() | st.integers(-50, 100)),
        sinks=data.draw(st.none() | st.just([0.5, -0.5])),
    )  # fmt: skip
    assert_matches(q, k, v, **options)


@pytest.mark.parametrize("block_size", [16, 24])
def test_block_masks_count_from_key_0(engine, block_size):
    """A pattern is one of the arrays' keys: where it begins does not move with `kv_starts`."""
    q, k, v = random_qkv(batch=3, heads=2, q_len=50, kv_len=100, head_dim=8)
    dense = np.random.default_rng(0).random((3, 2, 50, 100)) < 0.5
    lengths = dict(kv_lengths=[100, 77, 12], kv_starts=[0, 33, 12], q_lengths=[50, 20, 49])
    out = fastattn.attention(q, k, v, mask=BlockMask.from_dense(dense, block_size), **lengths)
    expected, _ = oracle_attention(q, k, v, mask=dense, **lengths)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_explain_counts_what_is_computed(backend):
    q, k, v = random_qkv(batch=2, heads=2, q_len=64, kv_len=64, head_dim=8)
    whole = fastattn.explain(q, k, v)
    half = fastattn.explain(q, k, v, q_lengths=[64, 0])
    assert half["visible_fraction"] == whole["visible_fraction"] / 2 and 2 * half["work_items"] == whole["work_items"]
    assert fastattn.explain(q, k, v, kv_starts=[64, 64])["visible_fraction"] == 0


BAD = [
    (dict(kv_starts=-1), ValueError, "kv_starts must lie between 0 and 9"),
    (dict(kv_starts=10), ValueError, "kv_starts must lie between 0 and 9"),
    (dict(kv_starts=[3, 4], kv_lengths=[3, 3]), ValueError, "kv_starts must be at most kv_lengths"),
    (dict(kv_starts=[0, 0, 0]), ValueError, "kv_starts must be an int or have shape"),
    (dict(kv_starts=0.5), TypeError, "kv_starts must be an int or an integer array"),
    (dict(q_lengths=-1), ValueError, "q_lengths must lie between 0 and 4"),
    (dict(q_lengths=[4, 5]), ValueError, "q_lengths must lie between 0 and 4"),
    (dict(q_lengths=[[4, 4]]), ValueError, "q_lengths must be an int or have shape"),
    (dict(q_lengths="4"), TypeError, "q_lengths must be an int or an integer array"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_lengths(backend, options, error, message):
    q, k, v = random_qkv(batch=2, q_len=4, kv_len=9)
    out = np.full_like(q[..., : v.shape[-1]], 7)
    with pytest.raises(error, match=message):
        fastattn.attention(q, k, v, out=out, **options)
    assert (out == 7).all()
