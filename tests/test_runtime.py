"""Which backend, instruction set and how many threads; the environment variables; and the means to ask."""

import asyncio
import re
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import ENGINES, ISAS
from inputs import random_qkv
from processes import environment_of, run_script

import fastattn
from fastattn import runtime

native_only = pytest.mark.skipif(not any(e.backend == "native" for e in ENGINES), reason="the extension was not built")


# Backends


def test_use_backend_as_a_function_and_as_a_context(backend):
    assert fastattn.show_config("dicts")["backend"] == backend.backend
    with fastattn.use_backend("numpy"):
        assert fastattn.show_config("dicts")["backend"] == "numpy"
        with fastattn.use_backend(backend.backend):
            assert fastattn.show_config("dicts")["backend"] == backend.backend
        assert fastattn.show_config("dicts")["backend"] == "numpy"
    assert fastattn.show_config("dicts")["backend"] == backend.backend
    run_script("""
        import fastattn
        fastattn.use_backend("numpy")
        assert fastattn.show_config("dicts")["backend"] == "numpy"
        """)


def test_use_backend_restores_when_the_block_raises(backend):
    with pytest.raises(KeyError), fastattn.use_backend("numpy"):
        raise KeyError
    assert fastattn.show_config("dicts")["backend"] == backend.backend


def test_unknown_backend():
    with pytest.raises(ValueError, match=re.escape("backend must be one of ('native', 'numba', 'numpy'); got 'cuda'")):
        fastattn.use_backend("cuda")


WITHOUT = """
import sys, warnings
for name in {names!r}:
    sys.modules[name] = None  # its import raises ImportError
warnings.simplefilter("ignore")
import fastattn
"""


@pytest.mark.parametrize("numba", ["numba", "fastattn.backends.numba"])  # not installed, or not usable
def test_a_backend_that_is_not_there_is_an_error_and_changes_nothing(numba):
    run_script(WITHOUT.format(names=["fastattn._native", numba]) + """
for name in ("native", "numba"):
    try:
        fastattn.use_backend(name)
    except ImportError as error:
        assert f"the {name} backend cannot be used" in str(error), error
    else:
        raise AssertionError(name)
with fastattn.use_backend("numpy"):
    pass
assert fastattn.show_config("dicts")["backend"] == "numpy"
""")


def test_without_the_extension_one_warning_and_another_backend():
    run_script("""
        import sys, warnings
        sys.modules["fastattn._native"] = None
        sys.modules["numba"] = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import fastattn, numpy as np
            x = np.ones((1, 1, 4, 8), np.float32)
            assert (fastattn.attention(x, x, x) == 1).all()
        (warning,) = caught
        assert warning.category is fastattn.BackendWarning and "numpy backend" in str(warning.message), warning
        config = fastattn.show_config("dicts")
        assert config["backend"] == "numpy" and config["backends"]["native"].startswith("missing"), config
        assert config["isa"] is None and fastattn.cpu_info()["isas"] == ()
        """)


def test_without_the_extension_the_warning_says_what_to_do():
    run_script("""
        import sys, warnings
        sys.modules["fastattn._native"] = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import fastattn
        (warning,) = caught
        for text in ("C compiler", "FASTATTN_REQUIRE_NATIVE=1"):
            assert text in str(warning.message), warning
        """)


# Contexts


def test_blocks_that_overlap_in_time(backend):
    """Threads that enter and leave blocks in any order see their own settings, and leave the process as it was."""
    before = fastattn.show_config("dicts")
    others = ["numpy", backend.backend]

    def job(n):
        wanted, count = others[n % 2], n % 5 + 1
        with fastattn.use_backend(wanted), fastattn.threads(count):
            time.sleep(0.002 * (n % 3))
            assert fastattn.show_config("dicts")["backend"] == wanted and fastattn.get_num_threads() == count
            with fastattn.threads(count + 1), fastattn.use_backend("numpy"):
                time.sleep(0.001)
                assert fastattn.show_config("dicts")["backend"] == "numpy" and fastattn.get_num_threads() == count + 1
            assert fastattn.show_config("dicts")["backend"] == wanted and fastattn.get_num_threads() == count
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(job, range(40)))
    after = fastattn.show_config("dicts")
    assert {name: after[name] for name in ("backend", "threads", "isa")} == {
        name: before[name] for name in ("backend", "threads", "isa")
    }


def test_tasks_of_asyncio_have_settings_of_their_own(backend):
    async def task(name, count):
        with fastattn.use_backend(name), fastattn.threads(count):
            for _ in range(3):
                await asyncio.sleep(0)
                assert fastattn.show_config("dicts")["backend"] == name and fastattn.get_num_threads() == count

    async def all_tasks():
        await asyncio.gather(*(task(name, count) for count, name in enumerate(("numpy", backend.backend) * 3, start=1)))

    before = fastattn.get_num_threads()
    asyncio.run(all_tasks())
    assert fastattn.show_config("dicts")["backend"] == backend.backend and fastattn.get_num_threads() == before


def test_blocks_that_are_left_in_another_order(backend):
    before = fastattn.get_num_threads()
    counts, backends = fastattn.threads(before + 1), fastattn.use_backend("numpy")
    counts.__enter__()
    backends.__enter__()
    counts.__exit__(None, None, None)
    assert fastattn.get_num_threads() == before and fastattn.show_config("dicts")["backend"] == "numpy"
    backends.__exit__(None, None, None)
    assert fastattn.show_config("dicts")["backend"] == backend.backend


def test_a_block_is_not_seen_by_other_threads():
    run_script("""
        from concurrent.futures import ThreadPoolExecutor
        import fastattn

        def look():
            seen.append((fastattn.show_config("dicts")["backend"], fastattn.get_num_threads()))

        other = ThreadPoolExecutor(1)

        def elsewhere():
            other.submit(look).result()  # its thread is there before the block: one that starts in it may inherit it, as Python is told to
            return seen[-1]

        seen = []
        process = elsewhere()
        with fastattn.use_backend("numpy"), fastattn.threads(7):
            assert elsewhere() == process
            fastattn.set_num_threads(6)  # of the block
            fastattn.use_backend("numpy")
            assert elsewhere() == process and fastattn.get_num_threads() == 6
        look()
        assert seen[-1] == process
        fastattn.set_num_threads(5)
        chosen = fastattn.use_backend("numpy")
        assert elsewhere() == ("numpy", 5)
        with chosen:
            assert elsewhere() == (process[0], 5)
        for _ in range(100):
            fastattn.use_backend("numpy")
        assert elsewhere() == ("numpy", 5) and len(fastattn.runtime._state.choices) < 4
        """)


@native_only
def test_limits_of_instruction_sets_that_overlap():
    available = fastattn.cpu_info()["isas"]

    def job(n):
        with runtime.limit_isa(available[n % len(available)]):
            time.sleep(0.001)
            return fastattn.show_config("dicts")["isa"] == available[n % len(available)]

    before = fastattn.show_config("dicts")["isa"]
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(job, range(40)))
    assert fastattn.show_config("dicts")["isa"] == before


# Threads


def test_threads(backend):
    before = fastattn.get_num_threads()
    with fastattn.threads(5):
        assert fastattn.get_num_threads() == 5
        with fastattn.threads(2):
            assert fastattn.get_num_threads() == 2
        with pytest.raises(KeyError), fastattn.threads(3):
            raise KeyError
        assert fastattn.get_num_threads() == 5
        fastattn.set_num_threads(np.int64(4))
        assert fastattn.get_num_threads() == 4
    assert fastattn.get_num_threads() == before


@pytest.mark.parametrize("n", [0, -1, 2**16 + 1, 1.0, True, "2"])
def test_bad_thread_counts(n):
    error = ValueError if type(n) is int else TypeError
    before = fastattn.get_num_threads()
    with pytest.raises(error, match=r"^n must .*; got "):
        fastattn.set_num_threads(n)
    with pytest.raises(error), fastattn.threads(n):
        pass
    assert fastattn.get_num_threads() == before


def test_the_thread_count_reaches_a_backend_chosen_later(backend):
    q, k, v = random_qkv(4, 8, 200, 200, 32)
    with fastattn.use_backend("numpy"), fastattn.threads(3), fastattn.use_backend(backend.backend):
        threads = fastattn.explain(q, k, v)["threads"]
    assert threads == {"numpy": 1}.get(backend.backend, 3) or not fastattn.show_config("dicts")["openmp"]


# Instruction sets


@native_only
def test_limit_isa():
    q, k, v = random_qkv()
    available = fastattn.cpu_info()["isas"]
    assert available and set(available) <= set(ISAS)
    with fastattn.use_backend("native"):
        for name in available:
            with runtime.limit_isa(name):
                isa = fastattn.explain(q, k, v)["isa"]
                assert available.index(isa) <= available.index(name)
                assert fastattn.show_config("dicts")["isa"] == name
        with runtime.limit_isa(available[0]), runtime.limit_isa(None):
            assert fastattn.show_config("dicts")["isa"] == available[-1]


@native_only
def test_each_instruction_set_has_kernels_of_its_own():
    q, k, v = random_qkv()
    with fastattn.use_backend("native"):
        for name in set(fastattn.cpu_info()["isas"]) - {"amx"}:  # a matrix unit has nothing for exact float32 products
            with runtime.limit_isa(name):
                assert fastattn.explain(q, k, v)["isa"] == name


@native_only
def test_isa_that_is_unknown_or_not_here():
    with pytest.raises(ValueError, match=re.escape(f"name must be one of {ISAS}; got 'sse2'")), runtime.limit_isa("sse2"):
        pass
    foreign, *_ = set(ISAS) - set(fastattn.cpu_info()["isas"])
    with pytest.raises(ValueError, match=f"name must be available here, .*; got '{foreign}'"), runtime.limit_isa(foreign):
        pass


# The environment


def test_environment_chooses_the_engine(engine):
    run_script(
        f"""
        import fastattn
        config = fastattn.show_config("dicts")
        assert config["backend"] == {engine.backend!r} and {engine.isa!r} in (None, config["isa"]), config
        """,
        **environment_of(engine),
    )


@pytest.mark.parametrize(
    "variables, threads",
    [
        ({"FASTATTN_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, 3),
        ({"OMP_NUM_THREADS": "5"}, 5),
        ({"OMP_NUM_THREADS": "4,2"}, 4),
        ({"OMP_NUM_THREADS": "many"}, "fastattn.cpu_info()['usable_cpus']"),
        ({}, "fastattn.cpu_info()['usable_cpus']"),
    ],
    ids=str,
)
def test_environment_sets_the_threads(variables, threads, monkeypatch):
    monkeypatch.delenv("FASTATTN_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run_script(f"import fastattn\nassert fastattn.get_num_threads() == {threads}", **variables)


@native_only
@pytest.mark.parametrize("way", ["pool", "openmp"])
def test_environment_chooses_the_way_of_threading(way):
    if way == "openmp" and not fastattn.show_config("dicts")["openmp"]:
        pytest.skip("a build without OpenMP")
    run_script(
        f"""
        import numpy as np
        import fastattn
        x = np.zeros((1, 1, 2, 8), np.float32)
        assert fastattn.show_config("dicts")["threading"] == {way!r} == fastattn.explain(x, x, x)["threading"]
        """,
        FASTATTN_THREADING=way,
        FASTATTN_BACKEND="native",
    )


@pytest.mark.parametrize(
    "variable, value, message",
    [
        ("FASTATTN_NUM_THREADS", "0", "FASTATTN_NUM_THREADS must be an int between 1 and 65536; got '0'"),
        ("FASTATTN_NUM_THREADS", "two", "FASTATTN_NUM_THREADS must be an int between 1 and 65536; got 'two'"),
        ("FASTATTN_BACKEND", "cuda", "FASTATTN_BACKEND must be one of"),
        ("FASTATTN_ISA", "sse2", "FASTATTN_ISA must be one of"),
        ("FASTATTN_THREADING", "tbb", "FASTATTN_THREADING must be one of ('openmp', 'pool'); got 'tbb'"),
        pytest.param("FASTATTN_ISA", "foreign", "FASTATTN_ISA must be available here", marks=native_only),
    ],
)
def test_environment_that_makes_no_sense(variable, value, message):
    if value == "foreign":
        value = min(set(ISAS) - set(fastattn.cpu_info()["isas"]))
    run_script(
        f"""
        try:
            import fastattn
        except ValueError as error:
            assert {message!r} in str(error), error
        else:
            raise AssertionError("no error")
        """,
        **{variable: value},
    )


# Means to ask


def test_cpu_info():
    info = fastattn.cpu_info()
    assert set(info) == {"machine", "model", "cpus", "usable_cpus", "isas"}
    assert 1 <= info["usable_cpus"] <= info["cpus"] and info["model"]


def test_show_config(backend, capsys):
    config = fastattn.show_config("dicts")
    assert config["version"] == fastattn.__version__
    assert config["backends"][backend.backend] == "in use"
    assert capsys.readouterr().out == ""
    assert fastattn.show_config() is None
    printed = capsys.readouterr().out
    assert fastattn.__version__ in printed and f"{backend.backend} backend" in printed
    with pytest.raises(ValueError, match="mode must be"):
        fastattn.show_config("json")


EXPLAINED = set(
    "backend isa kernel tile_rows tile_keys splits work_items threads threading workspace_bytes visible_fraction".split()
)


def test_explain(backend):
    q, k, v = random_qkv(2, 4, 100, 300, 64, kv_heads=2)
    plan = fastattn.explain(q, k, v)
    assert set(plan) == EXPLAINED
    assert plan["backend"] == backend.backend
    assert plan["visible_fraction"] == 1
    assert plan["work_items"] >= 1 and plan["splits"] >= 1 and plan["tile_rows"] >= 1 and plan["tile_keys"] >= 1
    assert plan["workspace_bytes"] < 64 << 20
    assert all(name in repr(plan) for name in EXPLAINED)
    with pytest.raises(ValueError, match="kv_lengths"):
        fastattn.explain(q, k, v, kv_lengths=301)


def test_explain_tells_what_is_skipped(backend):
    """Work that nobody can see is not done: causal costs about half, a window its width, padding nothing."""
    q, k, v = random_qkv(1, 1, 2048, 2048, 8)

    def fraction(**options):
        return fastattn.explain(q, k, v, **options)["visible_fraction"]

    assert 0.5 <= fraction(causal=True) < 0.65
    assert fraction(window=(64, 64)) < 0.35
    assert fraction(kv_lengths=512) <= 0.26
    assert fraction(kv_lengths=0) == 0
    assert fraction(causal=True, query_offset=-2048) == 0
    assert fastattn.explain(q[:, :, :0], k, v)["visible_fraction"] in (0, 1)


def test_explain_of_long_sequences(backend):
    """The workspace does not grow with the sequence."""
    shape = (1, 8, 131_072, 128)
    k = np.broadcast_to(np.zeros(128, np.float32), shape)
    plan = fastattn.explain(k[:, :, :256], k, k)
    assert plan["workspace_bytes"] < 64 << 20
