"""Decoding: GB/s of keys and values beside what the machine reads in the same minutes; pages, shared prefixes, drafts, appending.

    python bench/bench_decode.py [--torch] [--rounds N]

Sides alternate round by round, each on keys and values of its own: the caches hold none that the side before has read. Figures are
medians. The read bandwidth is that of a sum over as many bytes by as many threads; what
stands behind the share is the time of others over that of the call.
With --torch every shape of the first table also runs through torch's scaled_dot_product_attention.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import peers

import fastattn
from fastattn import _bench

SHAPES = [  # (batch, query heads, key/value heads, queries, keys, head_dim)
    (1, 32, 8, 1, 8192, 128),
    (1, 8, 8, 1, 32768, 128),
    (16, 32, 8, 1, 2048, 128),
    (1, 8, 1, 1, 32768, 64),
    (1, 32, 8, 4, 8192, 128),
]
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def paged(k, v, size, rng):
    """Keys and values in pages of this size, handed out in order or at random: (k_pages, v_pages, block_table)."""
    batch, heads, kv_len, _ = k.shape
    count = batch * kv_len // size
    order = np.arange(count) if rng is None else rng.permutation(count)
    pages = []
    for x in (k, v):
        rows = np.empty((count, heads, size, x.shape[3]), x.dtype)
        rows[order] = x.reshape(batch, heads, -1, size, x.shape[3]).swapaxes(1, 2).reshape(rows.shape)
        pages.append(rows.swapaxes(1, 2))
    return *pages, order.reshape(batch, -1)


def torch_side(q, k, v):
    """The same call by torch, or nothing where there is no torch."""
    import torch

    torch.set_num_threads(fastattn.get_num_threads())

    def tensor(x):
        return torch.from_numpy(x) if x.dtype.name != "bfloat16" else torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16)

    arrays = [tensor(x) for x in (q, k, v)]
    rows, keys = q.shape[2], k.shape[2]
    mask = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows) if rows > 1 else None
    return lambda: torch.nn.functional.scaled_dot_product_attention(*arrays, attn_mask=mask, enable_gqa=True)


def decoding(arguments, rng):
    threads = fastattn.get_num_threads()
    columns = f"{'shape':28} {'dtype':9} {'ms':>8} {'GB/s':>7} {'read':>7} {'share':>6}"
    print(f"{columns}  pages of 16, of 1 (in order), invariant {'torch' if arguments.torch else ''}")
    with ThreadPoolExecutor(threads) as pool:
        for shape in SHAPES:
            batch, heads, kv_heads, rows, keys, dim = shape
            for name, dtype in DTYPES.items():
                q = rng.standard_normal((batch, heads, rows, dim), np.float32).astype(dtype)
                k, v = (rng.standard_normal((batch, kv_heads, keys, dim), np.float32).astype(dtype) for _ in range(2))
                packed = np.ascontiguousarray(q.swapaxes(1, 2)).reshape(-1, heads, dim)
                both = np.empty(k.nbytes + v.nbytes, np.uint8)
                both[:] = 1
                sides = [lambda: fastattn.attention(q, k, v, causal=True), _bench.reader(both, threads, pool)]  # noqa: B023
                for size in (16, 1):
                    tables = paged(k, v, size, None)
                    sides.append(lambda x=tables: fastattn.paged_attention(packed, *x, keys, causal=True))  # noqa: B023
                copies = k.copy(), v.copy()
                sides.append(lambda x=copies: fastattn.attention(q, *x, causal=True, invariant=True))  # noqa: B023
                if arguments.torch:
                    sides.append(torch_side(q, k.copy(), v.copy()))
                own, read, *others = _bench.medians(*sides, rounds=arguments.rounds)
                size = both.size / 1e9
                ratios = "  ".join(f"{other / own:6.2f}" for other in others)
                print(f"{shape!s:28} {name:9} {1e3 * own:8.3f} {size / own:7.1f} {size / read:7.1f} {read / own:6.2f}  {ratios}")


def cascade(arguments, rng):
    """32 sequences, 8192 keys that they share and 128 of their own."""
    for name in ("float32", "bfloat16"):
        pool = fastattn.PagedKVCache(512 + 32 * 8, 16, 8, 128, dtype=name)
        prompt = pool.new_sequence()
        pool.append([prompt], *(rng.standard_normal((8192, 8, 128), np.float32) for _ in range(2)))
        forks = [pool.fork(prompt) for _ in range(32)]
        pool.append(forks, *(rng.standard_normal((32 * 128, 8, 128), np.float32) for _ in range(2)))
        q = rng.standard_normal((32, 32, 128), np.float32).astype(DTYPES[name])
        sides = lambda: pool.attend(forks, q), lambda: pool.attend(forks, q, cascade=True)  # noqa: B023
        apart, together = _bench.medians(*sides, rounds=arguments.rounds)
        print(f"cascade {name}: {1e3 * apart:.2f} ms apart, {1e3 * together:.2f} ms together, {apart / together:.2f} x")


def drafts(arguments, rng):
    """A tree of 32 drafts behind 8192 keys beside one step."""
    cache = fastattn.KVCache(1, 8, 8192 + 32, 128, dtype="bfloat16")
    cache.append(*(rng.standard_normal((1, 8, 8192 + 32, 128), np.float32) for _ in range(2)))
    q = rng.standard_normal((1, 32, 32, 128), np.float32).astype(ml_dtypes.bfloat16)
    tree = np.tril(rng.random((32, 32)) < 0.3) | np.eye(32, dtype=bool)
    sides = lambda: cache.attend(q[:, :, :1]), lambda: cache.attend(q, tail_mask=tree)
    one, all_of_them = _bench.medians(*sides, rounds=arguments.rounds)
    print(f"32 drafts over 8192 keys, bfloat16: {1e3 * all_of_them:.2f} ms beside a step of {1e3 * one:.2f}, {all_of_them / one:.2f} x")


def appending(arguments, rng):
    """One token of 8 heads of 128."""
    k = rng.standard_normal((1, 8, 1, 128), np.float32)
    cache, pool = fastattn.KVCache(1, 8, 4096, 128), fastattn.PagedKVCache(256, 16, 8, 128)
    sequence, rows = pool.new_sequence(), k[:, :, 0]

    def many(append, clear):
        def run():
            clear()
            for _ in range(1000):
                append()

        return run

    for name, seconds in zip(("KVCache", "PagedKVCache"), _bench.medians(
        many(lambda: cache.append(k, k), lambda: cache.truncate(0)),
        many(lambda: pool.append([sequence], rows, rows), lambda: pool.truncate(sequence, 0)),
        rounds=arguments.rounds,
    )):  # fmt: skip
        print(f"append to a {name}: {1e3 * seconds:.1f} us")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--torch", action="store_true")
    parser.add_argument("--rounds", type=_bench.positive, default=9)
    arguments = parser.parse_args()
    threads = fastattn.get_num_threads()
    _bench.print_environment({**_bench.environment(threads), **peers.versions()}, [])
    rng = np.random.default_rng(0)
    with peers.same_threads(threads):
        for part in (decoding, cascade, drafts, appending):
            part(arguments, rng)


if __name__ == "__main__":
    main()
