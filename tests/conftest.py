"""Every behavioural test runs on every engine: each backend, and for the native one each instruction set, that is here."""

import contextlib
import contextvars
import functools
import math
import mmap
import os

import hypothesis
import numpy as np
import pytest
from hypothesis import HealthCheck

from fastattn import runtime

BACKENDS = ("native", "numba", "numpy")
ISAS = ("portable", "avx2", "avx512", "amx", "neon")

# The engine, a fixture, stays the same for all examples of a test.
shared = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}
hypothesis.settings.register_profile("fixed", derandomize=True, max_examples=60, **shared)
hypothesis.settings.register_profile("seeded", max_examples=60, **shared)  # pytest --hypothesis-seed=7
hypothesis.settings.register_profile("search", max_examples=2000, **shared)  # HYPOTHESIS_PROFILE=search pytest ...
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


class Engine:
    """A backend at an instruction set; a context manager in which the package uses it."""

    def __init__(self, backend, isa=None):
        self.backend, self.isa = backend, isa

    def __repr__(self):
        return self.backend if self.isa is None else f"{self.backend}-{self.isa}"

    @contextlib.contextmanager
    def use(self):
        with contextlib.ExitStack() as stack:
            stack.enter_context(runtime.use_backend(self.backend))
            if self.isa is not None:
                stack.enter_context(runtime.limit_isa(self.isa))
            yield self


def _find_engines():
    present, absent = [], {}
    for backend in BACKENDS:
        for isa in ISAS if backend == "native" else (None,):
            engine = Engine(backend, isa)
            try:
                with engine.use():
                    present.append(engine)
            except (ImportError, ValueError, RuntimeError) as error:
                absent[repr(engine)] = str(error)
    return present, absent


ENGINES, ABSENT = _find_engines()


@pytest.fixture(params=ENGINES, ids=repr)
def engine(request):
    """The engine that the package uses during this test."""
    with request.param.use() as engine:
        yield engine


@pytest.fixture(params={engine.backend: engine for engine in ENGINES}.values(), ids=repr)
def backend(request):
    """Like `engine`, with the best instruction set only: for what no instruction set has a part in."""
    with request.param.use() as engine:
        yield engine


@pytest.fixture
def huge_zeros():
    """A maker of float32 arrays that are larger than memory, of zeros that cost nothing until they are written."""

    def make(shape):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        try:
            memory = mmap.mmap(-1, 4 * math.prod(shape), flags=flags)
        except OSError as error:
            pytest.skip(f"no address space for a huge array: {error}")
        return np.frombuffer(memory, np.float32).reshape(shape)

    return make


def pytest_configure(config):
    if config.getoption("hypothesis_seed", None) is not None and "HYPOTHESIS_PROFILE" not in os.environ:
        hypothesis.settings.load_profile("seeded")  # the fixed cases know no seed


# ---- pytest-run-parallel: a test in several threads at once (pytest --parallel-threads=4)

_of_fixtures = contextvars.Context()  # of the test that runs; a new thread's own context would know no engine


def pytest_collection_modifyitems(config, items):
    if config.getoption("parallel_threads", None):
        for item in items:
            if isinstance(item, pytest.Function):
                item.obj = _in_context_of_fixtures(item.obj)


def _in_context_of_fixtures(test):
    @functools.wraps(test)
    def run(*args, **kwargs):
        return _of_fixtures.copy().run(test, *args, **kwargs)

    return run


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    global _of_fixtures
    _of_fixtures = contextvars.copy_context()
    return (yield)


def pytest_report_header():
    return [f"fastattn engines: {', '.join(map(repr, ENGINES))}"] + [
        f"fastattn engine not tested: {name} ({reason})" for name, reason in ABSENT.items()
    ]


def pytest_terminal_summary(terminalreporter):
    if ABSENT:
        terminalreporter.write_line(f"fastattn engines not here, so not tested: {', '.join(ABSENT)}")
