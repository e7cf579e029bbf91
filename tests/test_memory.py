"""What memory a call touches, and how much of it it takes."""

import ctypes
import importlib
import mmap
import signal
import subprocess
import sys

import numpy as np
import pytest
from inputs import DTYPES, dtype_of, random_qkv
from oracle import check
from processes import environment_of, run_script

import fastattn
from fastattn._call import Call

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="uses mprotect and /proc")

PAGE = mmap.PAGESIZE
PROT_NONE, PROT_READ_WRITE = 0, 3
SIDES = ("before", "behind")
libc = ctypes.CDLL(None, use_errno=True)


class Guarded:
    """Makes arrays that touch a page nobody may read or write: directly before them, or directly behind."""

    def __init__(self, side):
        assert side in SIDES
        self.side = side
        self.protected = []

    def empty(self, shape, dtype):
        dtype = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        pages = max(1, -(-size // PAGE))
        memory = mmap.mmap(-1, (pages + 2) * PAGE)
        whole = np.frombuffer(memory, np.uint8)
        self._protect(whole.ctypes.data)
        self._protect(whole.ctypes.data + (pages + 1) * PAGE)
        start = PAGE if self.side == "before" else (pages + 1) * PAGE - size
        return whole[start : start + size].view(dtype).reshape(shape)

    def copy(self, array):
        array = np.asarray(array)
        guarded = self.empty(array.shape, array.dtype)
        guarded[...] = array
        return guarded

    def _protect(self, address):
        if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
        self.protected.append(address)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for address in self.protected:
            libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), PROT_READ_WRITE)


@pytest.mark.parametrize("side, offset", [("before", -1), ("behind", 20)])
def test_the_guards_guard(side, offset):
    """Else the tests below could not fail."""
    script = f"""
import ctypes, sys
sys.path[:0] = {sys.path!r}
from test_memory import Guarded
array = Guarded({side!r}).empty((5,), "float32")
array[...] = 1
ctypes.string_at(array.ctypes.data + {offset}, 1)
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == -signal.SIGSEGV


SHAPES = [  # heads, kv_heads, q_len, kv_len, head_dim, v_head_dim
    (1, 1, 1, 1, 1, 1),
    (2, 1, 1, 67, 33, 31),
    (2, 2, 3, 15, 7, 5),
    (3, 3, 13, 33, 17, 19),
    (4, 2, 37, 129, 64, 64),
    (1, 1, 65, 257, 40, 72),
    (2, 1, 20, 520, 15, 127),
    (8, 1, 1, 2100, 9, 3),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", SIDES)
def test_no_access_outside_the_arrays(engine, side, dtype, shape):
    heads, kv_heads, q_len, kv_len, head_dim, v_head_dim = shape
    with Guarded(side) as guarded:
        q, k, v = random_qkv(2, heads, q_len, kv_len, head_dim, v_head_dim, kv_heads=kv_heads, dtype=dtype)
        options = dict(
            causal=True,
            query_offset=guarded.copy([kv_len - q_len, kv_len]),
            kv_lengths=guarded.copy([kv_len, kv_len // 2]),
            alibi_slopes=guarded.copy(np.full(heads, 0.1, np.float32)),
            sinks=guarded.copy(np.zeros(heads, np.float32)),
        )
        run_guarded(engine, guarded, q, k, v)
        run_guarded(engine, guarded, q, k, v, **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["bool", "float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("side", SIDES)
def test_no_access_outside_the_mask(engine, side, dtype, shape):
    heads, kv_heads, q_len, kv_len, head_dim, v_head_dim = shape
    q, k, v = random_qkv(1, heads, q_len, kv_len, head_dim, v_head_dim, kv_heads=kv_heads)
    visible = np.random.default_rng(0).random((heads, q_len, kv_len)) < 0.7
    mask = visible if dtype == "bool" else np.where(visible, 0.5, -np.inf).astype(dtype_of(dtype))
    with Guarded(side) as guarded:
        run_guarded(engine, guarded, q, k, v, mask=guarded.copy(mask))
        row = guarded.copy(mask[0, 0])
        run_guarded(engine, guarded, q, k, v, mask=np.broadcast_to(row, mask.shape))
        column = guarded.copy(mask[0, :, :1])
        run_guarded(engine, guarded, q, k, v, mask=np.broadcast_to(column, mask.shape))
        transposed = guarded.copy(mask.T).T
        run_guarded(engine, guarded, q, k, v, mask=transposed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", SIDES)
def test_no_access_outside_strided_arrays(engine, side, dtype):
    """(L, H, D) memory seen as (H, L, D), and rows backwards: the last row read is the first of the memory."""
    q, k, v = random_qkv(1, 3, 37, 71, 13, 21, dtype=dtype)
    with Guarded(side) as guarded:
        swapped = [guarded.copy(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (q, k, v)]
        out, lse = fastattn.attention(*swapped, return_lse=True, causal=True)
        check(out, lse, q, k, v, causal=True)
        backwards = [guarded.copy(x[:, ::-1, ::-1])[:, ::-1, ::-1] for x in (q, k, v)]
        out, lse = fastattn.attention(*backwards, return_lse=True, causal=True)
        check(out, lse, q, k, v, causal=True)


def run_guarded(engine, guarded, q, k, v, **options):
    """One call in which q, k, v, out and lse, which a caller cannot hand in, have guards."""
    backend = importlib.import_module(f"fastattn.backends.{engine.backend}")
    out = guarded.empty((*q.shape[:3], v.shape[3]), q.dtype)
    call = Call(backend, *map(guarded.copy, (q, k, v)), out=out, **options)
    call.lse = guarded.empty(q.shape[:3], np.float32)
    backend.attention(call)
    check(out, call.lse, q, k, v, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", SIDES)
def test_merge_states_stays_inside_its_arrays(backend, side, dtype):
    rng = np.random.default_rng(0)
    with Guarded(side) as guarded:
        outs = [guarded.copy(rng.standard_normal((3, 7, 5)).astype(dtype_of(dtype))) for _ in range(3)]
        lses = [guarded.copy(rng.standard_normal((3, 7)).astype(np.float32)) for _ in range(3)]
        out, lse = fastattn.merge_states(outs, lses)
    assert np.isfinite(out.astype(np.float32)).all() and np.isfinite(lse).all()


# No copies


def peak_extra(backend, setup, call):
    """Bytes by which `call` raises the peak of a fresh process's memory, after a small call has warmed up."""
    script = f"""
import sys
import numpy as np
import fastattn

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

fastattn.set_num_threads(2)
small = np.ones((1, 2, 300, 128), np.float32)
fastattn.attention(small, small, small)
{setup}
before = status("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts again from here
{call}
print(status("VmHWM") - before)
"""
    return int(run_script(script, **environment_of(backend)))


def test_long_sequences_need_no_memory(backend):
    """1, 8/8, 131072 keys, 256 queries, D = 128. One head's keys are 64 MiB, so not even one head may be copied."""
    q_len = 8 if backend.backend == "numpy" else 256  # it would take its time
    extra = peak_extra(
        backend,
        setup=f"""
rng = np.random.default_rng(0)
q = rng.standard_normal((1, 8, {q_len}, 128), np.float32)
k, v = (np.broadcast_to(rng.standard_normal((1, 1, 131072, 128), np.float32), (1, 8, 131072, 128)) for _ in range(2))
""",
        call="out = fastattn.attention(q, k, v)",
    )
    assert extra < 64 << 20


def test_pages_are_not_copied(backend):
    """1, 2/2, 65536 keys in pages of 16, D = 128, for one query and for a panel. One head's keys are 16 MiB."""
    extra = peak_extra(
        backend,
        setup="""
pool = fastattn.PagedKVCache(4130, 16, 2, 128, dtype="float16")
rows = np.ones((8192, 2, 128), np.float16)
short, long = pool.new_sequence(), pool.new_sequence()
pool.append([short], rows[:300], rows[:300])
for _ in range(8):
    pool.append([long], rows, rows)
for n in (1, 64):  # warm up each kind of call: a backend may compile for it
    pool.attend([short], rows[:n])
""",
        call="""
for n in (1, 64):
    pool.attend([long], rows[:n])
""",
    )
    assert extra < 16 << 20


def test_views_and_masks_are_not_copied(backend):
    """(B, L, H, D) views, a boolean mask broadcast over heads, and a mask of floats, each far larger than the limit."""
    extra = peak_extra(
        backend,
        setup="""
x = np.zeros((1, 30_000, 2, 128), np.float16).swapaxes(1, 2)
x[...] = 1
q = x[:, :, :8]
boolean = np.broadcast_to(np.ones((8, 30_000), bool), (1, 2, 8, 30_000))
additive = np.broadcast_to(np.zeros((30_000,)), (8, 30_000))
few = x[:, :, :300]  # warm up each kind of call: a backend may compile for it
for mask in (None, boolean[..., :300], additive[..., :300]):
    fastattn.attention(q, few, few, mask=mask)
""",
        call="""
fastattn.attention(q, x, x)
fastattn.attention(q, x, x, mask=boolean)
fastattn.attention(q, x, x, mask=additive)
""",
    )
    assert extra < 12 << 20


@pytest.mark.parametrize("where", ["arrays", "pages"])
def test_chosen_keys_are_not_copied(backend, where):
    """Lists of 4,096 of 30,000 keys: neither the keys of all rows, 128 MiB, nor those of all that may be chosen, 59 MiB, lie together."""
    extra = peak_extra(
        backend,
        setup=f"""
x = np.zeros((1, 30_000, 2, 128), np.float32).swapaxes(1, 2)
x[...] = 1
q = x[:, :4, :32].repeat(2, axis=1)
indices = np.broadcast_to(np.arange(0, 28_672, 7, dtype=np.int32), (1, 2, 32, 4096))
pages, table = x.swapaxes(1, 2).reshape(300, 100, 2, 128), np.arange(300, dtype=np.int32)[None]
packed, lists = q[0].swapaxes(0, 1), indices[0].swapaxes(0, 1)
def attend(q, packed, indices, lists):
    if "{where}" == "arrays":
        return fastattn.attention_indexed(q, x, x, indices)
    return fastattn.paged_attention(packed, pages, pages, table, [30_000], indices=lists)
attend(q[:, :, :2], packed[:2], indices[:, :, :2, :40], lists[:2, :, :40])  # a backend may compile for it
""",
        call="attend(q, packed, indices, lists)",
    )
    assert extra < 12 << 20


def test_no_scores_of_all_keys_are_kept(backend):
    """8 heads of 64 queries have 195 MiB of scores over 100,000 keys."""
    extra = peak_extra(
        backend,
        setup="""
rng = np.random.default_rng(0)
q, k = rng.standard_normal((1, 8, 64, 32), np.float32), rng.standard_normal((1, 1, 100_000, 32), np.float32)
fastattn.select_keys(q[:, :, :2], k[:, :, :5000], 64)
""",
        call="fastattn.select_keys(q, k, 64)",
    )
    assert extra < 48 << 20
