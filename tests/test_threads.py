"""Threads, processes and the floating-point environment: nothing that runs beside a call changes its bits."""

import contextvars
import ctypes
import ctypes.util
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from inputs import DTYPES, random_qkv
from processes import environment_of, run_script

import fastattn
from fastattn import runtime

NATIVE = fastattn.show_config("dicts")["openmp"]
THREADINGS = () if NATIVE is None else ("pool", "openmp") if NATIVE else ("pool",)
SHAPES = {
    "prefill": (dict(batch=1, heads=4, q_len=300, kv_len=333, head_dim=32, kv_heads=2), {"causal": True}),
    "decode": (dict(batch=1, heads=8, q_len=1, kv_len=9000, head_dim=64, kv_heads=2), {}),
    "few rows": (dict(batch=3, heads=2, q_len=5, kv_len=3000, head_dim=40), {"window": (2500, 0)}),
    "many entries": (dict(batch=60, heads=3, q_len=20, kv_len=20, head_dim=16), {"sinks": np.float32([0, 1, 2])}),
    "ragged": (dict(batch=3, heads=2, q_len=4, kv_len=5000, head_dim=16), {"kv_lengths": np.array([5000, 0, 2777])}),
}


def attention(*args, **options):
    return np.concatenate([x.ravel().view(np.uint8) for x in fastattn.attention(*args, return_lse=True, **options)])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads_gives_the_same_bits(engine, shape, dtype):
    sizes, options = SHAPES[shape]
    q, k, v = random_qkv(**sizes, dtype=dtype)
    with fastattn.threads(1):
        expected = attention(q, k, v, **options)
    for count in (2, 3, 7):
        with fastattn.threads(count):
            np.testing.assert_array_equal(attention(q, k, v, **options), expected)


@pytest.mark.parametrize("way", THREADINGS)
@pytest.mark.parametrize("shape", ["prefill", "decode"])
def test_any_way_of_threading_gives_the_same_bits(engine, shape, way):
    sizes, options = SHAPES[shape]
    q, k, v = random_qkv(**sizes)
    with fastattn.threads(1):
        expected = attention(q, k, v, **options)
    with fastattn.threads(3), runtime.use_threading(way):
        assert engine.backend != "native" or fastattn.explain(q, k, v, **options)["threading"] == way
        np.testing.assert_array_equal(attention(q, k, v, **options), expected)


@pytest.mark.parametrize("shape", ["few rows", "many entries", "ragged"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_entry_alone_and_in_company_gives_the_same_bits(engine, shape, dtype):
    sizes, options = SHAPES[shape][0], dict(SHAPES[shape][1])
    q, k, v = random_qkv(**sizes, dtype=dtype)
    lengths = options.pop("kv_lengths", np.full(len(q), k.shape[2]))
    together, together_lse = fastattn.attention(q, k, v, return_lse=True, kv_lengths=lengths, **options)
    for b in range(len(q)):
        entry, keys = slice(b, b + 1), slice(lengths[b])
        alone, lse = fastattn.attention(q[entry], k[entry, :, keys], v[entry, :, keys], return_lse=True, **options)
        np.testing.assert_array_equal(alone, together[entry])
        np.testing.assert_array_equal(lse, together_lse[entry])


def test_repetition_gives_the_same_bits(engine):
    sizes, options = SHAPES["decode"]
    q, k, v = random_qkv(**sizes)
    expected = attention(q, k, v, **options)
    for _ in range(5):
        np.testing.assert_array_equal(attention(q, k, v, **options), expected)


def test_concurrent_callers(engine):
    """Python threads that call at once, each with its own problem, get what they get alone."""
    problems = [(random_qkv(**sizes, seed=seed), options) for seed in range(4) for sizes, options in SHAPES.values()]
    expected = [attention(*qkv, **options) for qkv, options in problems]

    def call(problem):
        return attention(*problem[0], **problem[1])

    with ThreadPoolExecutor(4) as pool:  # with the engine of this context, which is not that of other threads
        calls = [pool.submit(contextvars.copy_context().run, call, problem) for problem in problems]
    for result, same in zip(calls, expected):
        np.testing.assert_array_equal(result.result(), same)


on_posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@on_posix
@pytest.mark.parametrize("way", THREADINGS or (None,))
def test_fork_after_use(engine, way):
    """A child of a process that has computed with threads computes too, and with threads where they can be had; it does not hang."""
    script = """
        import os, signal, sys, warnings
        import numpy as np
        import fastattn

        warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of threads and fork
        fastattn.set_num_threads(3)
        q = np.random.default_rng(0).standard_normal((2, 4, 200, 32)).astype(np.float32)
        expected = fastattn.attention(q, q, q)
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            same = all((fastattn.attention(q, q, q) == expected).all() for _ in range(3))
            config = fastattn.show_config("dicts")
            os._exit(0 if same and config["threads"] == (1 if config["threading"] == "openmp" else 3) else 1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        again = (fastattn.attention(q, q, q) == expected).all()
        sys.exit(status or not again)
        """
    run_script(script, **environment_of(engine), **({"FASTATTN_THREADING": way} if way else {}))


@on_posix
@pytest.mark.skipif(not THREADINGS, reason="the extension was not built")
def test_fork_while_others_call():
    """Children compute, whatever the threads of their parent were doing."""
    run_script("""
        import os, signal, threading, warnings
        import numpy as np
        import fastattn

        warnings.simplefilter("ignore", DeprecationWarning)
        fastattn.set_num_threads(3)
        q = np.random.default_rng(0).standard_normal((2, 4, 200, 32)).astype(np.float32)
        expected = fastattn.attention(q, q, q)
        over = threading.Event()

        def work():
            while not over.is_set():
                fastattn.attention(q, q, q)

        callers = [threading.Thread(target=work) for _ in range(2)]
        for caller in callers:
            caller.start()
        statuses = []
        for _ in range(10):
            child = os.fork()
            if child == 0:
                signal.alarm(30)
                os._exit(0 if (fastattn.attention(q, q, q) == expected).all() else 1)
            statuses.append(os.waitpid(child, 0)[1])
        over.set()
        for caller in callers:
            caller.join()
        assert not any(statuses), statuses
        """)


@pytest.mark.parametrize("way", THREADINGS)
def test_the_interpreter_ends_while_a_thread_calls(way):
    run_script(
        """
        import threading, time
        import numpy as np
        import fastattn

        q = np.zeros((1, 8, 4000, 64), np.float32)
        fastattn.attention(q, q, q)

        def work():
            while True:
                fastattn.attention(q, q, q)

        threading.Thread(target=work, daemon=True).start()
        time.sleep(0.05)
        """,
        FASTATTN_THREADING=way,
        FASTATTN_NUM_THREADS="3",
    )


INTERRUPTED = """
    import signal, sys, threading, time
    import numpy as np
    import fastattn

    class Alarm(Exception):
        pass

    def ring(*_):
        raise Alarm

    fastattn.set_num_threads({threads})
    row = np.zeros(64, np.float32)
    small = np.zeros((1, 1, 8, 64), np.float32)
    fastattn.attention(small, small, small)
    x = np.broadcast_to(row, (1, 8, 60_000, 64))  # many seconds, were it not interrupted
    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    start = time.monotonic()
    try:
        fastattn.attention(x, x, x{options})
    except Alarm:
        assert time.monotonic() - start < 60
    else:
        raise AssertionError("the call was not interrupted")
    assert (fastattn.attention(small, small, small) == 0).all()  # the next call is none the worse
    """


@on_posix
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("options", ["", ", return_lse=True"])
def test_signals_are_handled_during_a_call(engine, threads, options):
    run_script(INTERRUPTED.format(threads=threads, options=options), **environment_of(engine))


@on_posix
@pytest.mark.skipif("openmp" not in THREADINGS, reason="no OpenMP here")
def test_signals_are_handled_with_openmp():
    run_script(INTERRUPTED.format(threads=3, options=""), FASTATTN_THREADING="openmp", FASTATTN_BACKEND="native")


# The floating-point environment

libm = ctypes.CDLL(ctypes.util.find_library("m"))
on_x86 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux", reason="reads MXCSR out of glibc's fenv_t"
)


class FloatEnvironment:
    """glibc's fenv_t on x86-64: 28 bytes of x87 state, then MXCSR."""

    FLAGS = 0x3F  # the sticky exception flags, which any arithmetic may raise
    FLUSH_SUBNORMAL = 1 << 15 | 1 << 6  # results, and operands
    ROUND_DOWN = 1 << 13

    def __init__(self):
        self.bytes = ctypes.create_string_buffer(32)
        libm.fegetenv(self.bytes)

    @property
    def mxcsr(self):
        return int.from_bytes(self.bytes[28:32], "little")

    def set(self, bits):
        changed = ctypes.create_string_buffer(self.bytes.raw, 32)
        changed[28:32] = (self.mxcsr | bits).to_bytes(4, "little")
        libm.fesetenv(changed)

    def restore(self):
        libm.fesetenv(self.bytes)


@on_x86
@pytest.mark.parametrize("bits", [0, FloatEnvironment.FLUSH_SUBNORMAL, FloatEnvironment.ROUND_DOWN])
@pytest.mark.parametrize("dtype", DTYPES)
def test_calls_leave_the_float_environment_alone(engine, bits, dtype):
    q, k, v = random_qkv(2, 2, 40, 300, 16, dtype=dtype)
    v[0, 0, 3] = np.inf
    before = FloatEnvironment()
    before.set(bits)
    try:
        fastattn.attention(q, k, v, causal=True, scale=1e3)
        after = FloatEnvironment()
    finally:
        before.restore()
    assert after.mxcsr & ~FloatEnvironment.FLAGS == (before.mxcsr | bits) & ~FloatEnvironment.FLAGS


@on_x86
def test_import_leaves_the_float_environment_alone():
    run_script("""
        import ctypes, ctypes.util
        libm = ctypes.CDLL(ctypes.util.find_library("m"))
        before, after = (ctypes.create_string_buffer(32) for _ in range(2))
        import numpy
        libm.fegetenv(before)
        import fastattn
        libm.fegetenv(after)
        assert before[28:32] == after[28:32] and 5e-324 * 1.0 > 0
        """)


def test_subnormal_numbers_survive(engine):
    """Nothing is flushed to zero, in the calling thread or in any other."""
    q, k, v = random_qkv(2, 4, 300, 65, 8)
    v[...] = 1e-40
    for count in (1, 3):
        with fastattn.threads(count):
            np.testing.assert_allclose(fastattn.attention(q, k, v), 1e-40, rtol=1e-4)
    assert np.float32(1e-40) * np.float32(0.5) > 0
