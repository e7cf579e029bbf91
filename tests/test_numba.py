"""What is particular to the Numba backend: its disk cache, its threads, and the processors that it compiles for."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from inputs import DTYPES, random_qkv
from oracle import assert_matches
from processes import run_script

import fastattn

numba = pytest.importorskip("numba")

PACKAGE = Path(fastattn.__file__).parent

# Attention takes seconds to compile; merge_states goes the same way in a fraction of that.
MERGE = """
import sys, warnings
warnings.simplefilter("ignore")
import numpy as np
import fastattn
from fastattn.backends import numba as backend
fastattn.use_backend("numba")
out, lse = fastattn.merge_states([np.zeros((3, 5), np.float32), np.ones((3, 5), np.float32)], np.zeros((2, 3), np.float32))
np.testing.assert_allclose(out, 0.5)
np.testing.assert_allclose(lse, np.log(2), rtol=1e-6)
(kernel,) = backend._state.kernels.values()
hits, misses = sum(kernel.stats.cache_hits.values()), sum(kernel.stats.cache_misses.values())
print(kernel.stats.cache_path, hits, misses)
"""


def compiled(output):
    """The cache folder, and whether the kernel had to be compiled, as printed by MERGE."""
    path, hits, misses = output.rsplit(maxsplit=2)
    assert (hits, misses) in (("1", "0"), ("0", "1"), ("0", "0"))
    return path, hits == "0"


@pytest.fixture
def copied_package(tmp_path):
    """A copy of the package, its Python modules only, and MERGE for it."""
    shutil.copytree(PACKAGE, tmp_path / "fastattn", ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.pyd"))
    return tmp_path / "fastattn", f"import sys; sys.dont_write_bytecode = True; sys.path.insert(0, {str(tmp_path)!r})" + MERGE


# Import


def test_numba_is_imported_by_the_first_call():
    run_script(
        """
        import sys
        import numpy as np
        import fastattn
        assert "numba" not in sys.modules
        x = np.ones((1, 1, 1, 8), np.float32)
        fastattn.attention(x, x, x)
        assert "numba" in sys.modules and fastattn.explain(x, x, x)["backend"] == "numba"
        """,
        FASTATTN_BACKEND="numba",
    )


def test_without_compilation_the_backend_is_not_there():
    run_script(
        """
        import fastattn
        try:
            fastattn.use_backend("numba")
        except ImportError as error:
            assert "NUMBA_DISABLE_JIT" in str(error)
        else:
            raise AssertionError
        """,
        NUMBA_DISABLE_JIT="1",
    )


# The cache


def test_the_second_process_does_not_compile(tmp_path):
    for expected in (True, False):
        path, had_to = compiled(run_script(MERGE, NUMBA_CACHE_DIR=str(tmp_path)))
        assert had_to == expected and path.startswith(str(tmp_path))


def test_a_damaged_cache_is_no_obstacle(tmp_path):
    run_script(MERGE, NUMBA_CACHE_DIR=str(tmp_path))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".nbi", ".nbc"}
    for damaged in files:
        damaged.write_bytes(b"not what was written")
        run_script(MERGE, NUMBA_CACHE_DIR=str(tmp_path))


def test_a_change_of_any_source_is_noticed(copied_package):
    package, script = copied_package
    assert compiled(run_script(script, NUMBA_CACHE_DIR=""))[1]
    path, had_to = compiled(run_script(script, NUMBA_CACHE_DIR=""))
    assert not had_to and path == str(package / "backends" / "__pycache__")
    for source in (package / "backends").glob("_numba_*.py"):
        with open(source, "a", encoding="utf-8") as file:
            file.write("\n# another version\n")
        assert compiled(run_script(script, NUMBA_CACHE_DIR=""))[1]


@pytest.mark.skipif(os.name != "posix", reason="the user's cache folder is found in another way")
def test_without_a_folder_for_the_cache(copied_package, tmp_path):
    """A file stands where each folder would be made, which keeps out the superuser as well."""
    package, script = copied_package
    home = tmp_path / "home"
    for file in (package / "backends" / "__pycache__", home):
        file.write_bytes(b"")
    path, had_to = compiled(run_script(script, **dict.fromkeys(("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR"), str(home))))
    assert path == "None" and had_to


# Threads

USER_PROGRAM = """
import os, signal, sys, threading, warnings
import numba, numpy as np
import fastattn
from fastattn.backends import numba as backend

warnings.simplefilter("ignore")
fastattn.use_backend("numba")
backend._WORK_OF_A_THREAD = 1  # small problems on many threads
fastattn.set_num_threads(3)
q = np.random.default_rng(0).standard_normal((2, 4, 200, 32)).astype(np.float32)
expected = fastattn.attention(q, q, q)

@numba.njit(parallel=True, nogil=True)
def total(x):
    s = 0.0
    for i in numba.prange(x.size):
        s += x[i]
    return s

def same():
    return all((fastattn.attention(q, q, q) == expected).all() for _ in range(20))
"""


def test_nothing_of_numbas_own_threads_is_touched():
    run_script(
        USER_PROGRAM
        + """
assert same()
try:
    numba.threading_layer()
except ValueError:
    pass  # none has been started
else:
    raise AssertionError
numba.set_num_threads(1)
assert same() and numba.get_num_threads() == 1
"""
    )


@pytest.mark.parametrize("layer", ["workqueue", "omp"])
def test_concurrent_callers_beside_a_threading_layer(layer):
    """The workqueue layer ends the process when two threads use it at once; we are four beside its user."""
    output = run_script(
        USER_PROGRAM
        + f"""
try:
    total(np.ones(1000))
except ValueError:
    print("no such layer")
    sys.exit()
assert numba.threading_layer() == {layer!r}
results = []
threads = [threading.Thread(target=lambda: results.append(same())) for _ in range(4)]
for thread in threads:
    thread.start()
for _ in range(100):
    assert total(np.ones(1000)) == 1000
for thread in threads:
    thread.join()
assert results == [True] * 4
""",
        NUMBA_THREADING_LAYER=layer,
        NUMBA_NUM_THREADS="2",
    )
    if "no such layer" in output:
        pytest.skip("Numba has no such threading layer here")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("layer", ["workqueue", "omp"])
def test_a_forked_child_computes_with_threads(layer):
    """GNU OpenMP's threads are gone in a child, and Numba ends one that asks for them; ours are started anew."""
    output = run_script(
        USER_PROGRAM
        + """
try:
    total(np.ones(1000))
except ValueError:
    print("no such layer")
    sys.exit()
busy = threading.Thread(target=same)  # the child is forked while a call runs
busy.start()
child = os.fork()
if child == 0:
    signal.alarm(60)
    backend.set_num_threads(3)
    ok = same() and len(backend._state.pool._threads) > 0
    os._exit(0 if ok else 1)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
busy.join()
sys.exit(status or not same())
""",
        NUMBA_THREADING_LAYER=layer,
        NUMBA_NUM_THREADS="2",
    )
    if "no such layer" in output:
        pytest.skip("Numba has no such threading layer here")


def test_calls_when_no_thread_can_be_started():
    run_script(
        USER_PROGRAM
        + """
def refuse(*args):
    raise RuntimeError("can't start new thread")
backend._state.pool = None
threading.Thread.start = refuse
assert same()
"""
    )


SHAPES = {  # what is split, what is merged where, and what is neither
    "few units": (dict(batch=1, heads=2, q_len=3, kv_len=3000, head_dim=16), {}),
    "many entries": (dict(batch=40, heads=1, q_len=3, kv_len=1500, head_dim=16), {"causal": True}),
    "many rows": (dict(batch=2, heads=6, q_len=150, kv_len=700, head_dim=16, kv_heads=2), {"sinks": np.arange(6.0)}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_where_parts_are_merged_does_not_matter(shape, monkeypatch):
    """With many units a thread merges the parts of one as it goes; with few they are merged when all have been computed."""
    with fastattn.use_backend("numba"):
        from fastattn.backends import numba as backend

        monkeypatch.setattr(backend, "_WORK_OF_A_THREAD", 1)
        sizes, options = SHAPES[shape]
        q, k, v = random_qkv(**sizes)
        results = []
        for threads in (1, 2, 3, 7, 30):
            with fastattn.threads(threads):
                results.append(fastattn.attention(q, k, v, return_lse=True, **options))
                plan = fastattn.explain(q, k, v, **options)
                assert plan["threads"] == min(threads, plan["work_items"])
        for out, lse in results[1:]:
            np.testing.assert_array_equal(out, results[0][0])
            np.testing.assert_array_equal(lse, results[0][1])
        assert plan["splits"] == {"few units": 6, "many entries": 3, "many rows": 1}[shape]
        for b in range(len(q)):
            entry = slice(b, b + 1)
            alone = fastattn.attention(q[entry], k[entry], v[entry], **options)
            np.testing.assert_array_equal(alone, results[0][0][entry])


# Few query rows, whose products run along the head dimension


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q_len", [1, 2, 5, 16])
@pytest.mark.parametrize("head_dim, v_head_dim", [(1, 130), (15, 17), (64, 80), (130, 1)])
def test_few_rows_and_numbers_of_keys(head_dim, v_head_dim, q_len, dtype):
    """Fewer keys than a group of them, groups that overlap, rows that end within a register."""
    with fastattn.use_backend("numba"):
        for kv_len in (1, 3, 15, 16, 17, 129, 131, 300):
            assert_matches(*random_qkv(1, 2, q_len, kv_len, head_dim, v_head_dim, dtype=dtype, seed=kv_len))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q_len", [1, 2, 5, 16])
@pytest.mark.parametrize("key", [0, 130, 290, 299])
def test_poison_among_few_rows(key, q_len, dtype):
    """It reaches the rows that see it, not those beside them in the registers."""
    with fastattn.use_backend("numba"):
        for which in range(3):
            inputs = random_qkv(1, 2, q_len, 300, 20, 19, dtype=dtype)
            inputs[which][0, 1, key if which else -1, 3] = np.nan
            assert_matches(*inputs, causal=True)
            assert_matches(*inputs, causal=True, mask=np.arange(300) != key)


@pytest.mark.skipif(os.name != "posix", reason="pages are protected in another way")
@pytest.mark.parametrize("q_len", [1, 5, 80])
def test_nothing_is_read_beyond_the_arrays(q_len):
    """Behind each array begins a page that nobody may read."""
    run_script(
        f"""
        import ctypes, mmap, warnings
        import ml_dtypes
        import numpy as np
        import fastattn
        libc = ctypes.CDLL(None, use_errno=True)
        rng = np.random.default_rng(0)

        def guarded(*shape):
            x = rng.standard_normal(shape).astype(dtype)
            size = -(-x.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
            memory = np.frombuffer(mmap.mmap(-1, size + mmap.PAGESIZE), np.uint8)
            assert libc.mprotect(ctypes.c_void_p(memory.ctypes.data + size), mmap.PAGESIZE, 0) == 0
            result = memory[size - x.nbytes : size].view(dtype).reshape(shape)
            result[...] = x
            return result

        for dtype in ("float32", "float16", ml_dtypes.bfloat16):
            for kv_len in (1, 15, 17, 131):
                for head_dim, v_head_dim in ((19, 21), (3, 130), (80, 1)):
                    q, k, v = guarded({q_len}, head_dim), guarded(kv_len, head_dim), guarded(kv_len, v_head_dim)
                    out = fastattn.attention(q, k, v, out=guarded({q_len}, v_head_dim), mask=guarded({q_len}, kv_len))
                    assert np.isfinite(out.astype(np.float32)).all()
        """,
        FASTATTN_BACKEND="numba",
    )


# Processors

PROCESSORS = {
    "avx2": ("haswell", "+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+64bit"),
    "portable": ("x86-64", "+sse,+sse2,+64bit"),
}


def runs_here(features):
    from llvmlite import binding

    return set(features.split(",")) <= set(binding.get_host_cpu_features().flatten().split(","))


@pytest.mark.parametrize("name", PROCESSORS)
def test_other_register_shapes(name):
    """The kernels as older processors get them, against the NumPy backend."""
    processor, features = PROCESSORS[name]
    if not runs_here(features):
        pytest.skip(f"this processor cannot do what {processor} does")
    output = run_script(
        """
        import warnings
        import numpy as np
        import fastattn
        rng = np.random.default_rng(0)
        for rows, kv_heads, dtype, mask_dtype in [(1, 4, "f4", bool), (3, 2, "f2", "f2"), (70, 2, "f4", "f4"), (129, 2, "f2", "f8")]:
            for head_dim in (1, 19, 64):
                q = rng.standard_normal((2, 4, rows, head_dim)).astype(dtype)
                k, v = rng.standard_normal((2, 2, kv_heads, 700, head_dim)).astype(dtype)
                k[0, 0, 0, 0] = 3e-8 if dtype == "f2" else 1  # subnormal in float16
                mask = rng.random((4, rows, 700)) < 0.5
                if mask_dtype is not bool:
                    mask = np.where(mask, rng.standard_normal(mask.shape), -np.inf).astype(mask_dtype)
                options = dict(mask=mask, window=(500, 100), softcap=5.0, alibi_slopes=rng.random(4), sinks=rng.random(4))
                results = []
                for backend in ("numpy", "numba"):
                    with fastattn.use_backend(backend):
                        results.append(fastattn.attention(q, k, v, return_lse=True, **options))
                        name = fastattn.explain(q, k, v)["isa"]
                for expected, actual in zip(*results):
                    tolerance = 2e-5 if actual.dtype == np.float32 else 2e-3
                    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)
        print(name)
        """,
        NUMBA_CPU_NAME=processor,
        NUMBA_CPU_FEATURES=features,
    )
    assert output.strip() == name
