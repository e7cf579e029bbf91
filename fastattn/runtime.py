"""What computes, and on how many threads: backend choice, thread count, instruction sets, and the means to ask.

Functions set for the process: the next call of every thread sees it. A ``with`` block sets for the calling context, be it a thread's
or an asyncio task's, and there it wins. Calls that already run keep what they started with.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import platform
import threading as _threading
import warnings
import weakref
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from . import _processors, _settings
from ._call import Call, known_keywords

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from typing_extensions import Unpack

    from ._typing import Array, Call as CallKeywords

BACKENDS = ("native", "numba", "numpy")
ISAS = ("portable", "avx2", "avx512", "amx", "neon")
THREADINGS = ("openmp", "pool")


class BackendWarning(RuntimeWarning):
    """The fastest backend cannot be used, and another one stands in for it."""


_SHORT_WAYS = ("attention_plain", "linear_plain", "paged_plain", "rope_plain", "store_plain")


def _no_short_way(*arguments, **keywords):
    """What stands for each of them where another backend than the native one is in use: nothing is ordinary."""
    return None


class _State:
    """The settings of the process, and the short ways into the engine in use, which give None for what is not ordinary to them."""

    __slots__ = ("choices", "modules", *_SHORT_WAYS, "threads", "threads_from", "forked", "missing", "lock")


_state = _State()
_state.choices = []  # (backend name, a weak reference to the object that may withdraw it); the last one holds
_state.modules = {}  # backend name: its module, once it has been needed
for _way in _SHORT_WAYS:
    setattr(_state, _way, _no_short_way)
_state.threads, _state.threads_from = 1, "default"
_state.forked = False
_state.missing = {}  # backend name: why it cannot be used
_state.lock = _threading.Lock()  # of choices

_NOT_BUILT = (
    "its extension, fastattn._native, was not built; install a C compiler and install fastattn again, with FASTATTN_REQUIRE_NATIVE=1 "
    "in the environment to see what fails"
)


def _load(name):
    """Import a backend; `ImportError`, remembered, where it cannot be imported."""
    try:
        module = importlib.import_module(f"fastattn.backends.{name}")
    except ImportError as error:
        _state.missing[name] = _NOT_BUILT if error.name == "fastattn._native" else str(error)
        raise ImportError(f"the {name} backend cannot be used: {_state.missing[name]}") from error
    if name not in _state.modules:
        module.set_num_threads(_state.threads)
        _state.modules[name] = module
    return module


def backend():
    """The module of the backend in use."""
    name = _settings.get("backend") or _state.choices[-1][0]
    module = _state.modules.get(name)
    return _load_late(name) if module is None else module


def _load_late(name):
    """Import Numba, which is chosen by name at import and imported by the first call."""
    try:
        return _load(name)
    except ImportError as error:
        warnings.warn(f"fastattn: {error}; using the numpy backend", BackendWarning, stacklevel=4)
        module = _load("numpy")
        with _state.lock:
            _state.choices = [("numpy" if chosen == name else chosen, owner) for chosen, owner in _state.choices]
        return module


def _nobody():
    return None


def _choose(name, owner=_nobody):
    """Let the process use a backend until `owner`, if there is one, withdraws the choice."""
    with _state.lock:
        # What lies below a choice that nobody can withdraw any more never comes up again.
        while len(_state.choices) > 1 and _state.choices[1][1]() is None:
            del _state.choices[0]
        _state.choices.append((name, owner))
        _note_plain()


def _withdraw(owner):
    with _state.lock:
        _state.choices = [choice for choice in _state.choices if choice[1]() is not owner]
        _note_plain()


def _note_plain():
    module = _state.modules.get(_state.choices[-1][0])
    for way in _SHORT_WAYS:
        setattr(_state, way, getattr(module, way, _no_short_way))


class _Choice:
    """The choice of a backend: of the process, until a ``with`` block takes it for the calling context."""

    def __init__(self, name):
        self._name, self._former = name, _settings.get("backend")
        if self._former is None:
            _choose(name, weakref.ref(self))
        else:
            _settings.change(backend=name)

    def __enter__(self):
        _settings.change(backend=self._name)
        if self._former is None:
            _withdraw(self)
        return self

    def __exit__(self, *exc_info):
        _settings.change(backend=self._former)


def use_backend(name: str) -> AbstractContextManager[Any]:
    """Compute with a backend from now on, or within a ``with`` block.

    Parameters
    ----------
    name : {"native", "numba", "numpy"}

    Returns
    -------
    context manager
        The backend is in use as soon as the function is called, in the whole process. As a context manager the result confines
        it to the block and the calling context: to this thread, or task of asyncio, and what it calls. Within such a block
        the function changes the backend of the block.

    Raises
    ------
    ImportError
        If the backend is not there: the extension was not built, or Numba is not installed.

    Examples
    --------
    >>> with fastattn.use_backend("numpy"):
    ...     reference = fastattn.attention(q, k, v)
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}; got {name!r}")
    _load(name)
    return _Choice(name)


def set_num_threads(n: int) -> None:
    """Use at most `n` threads in each later call, in the whole process; within ``with threads(...)``, in that block.

    The initial count is ``FASTATTN_NUM_THREADS``, else ``OMP_NUM_THREADS``, else the number of processors that this process may use:
    those of its affinity, or fewer where the quota of a control group (a container's limit) leaves it fewer whole ones. It is found at
    import; :func:`show_config` says where it came from.
    Results do not depend on it. A forked child has threads too, unless they are OpenMP's, whose run-time does not survive a fork:
    then it has 1.

    Parameters
    ----------
    n : int
        1 or more.
    """
    n = _thread_count(n)
    if _settings.get("threads") is None:
        _set_threads(n, "set_num_threads")
    else:
        _settings.change(threads=n)


def _thread_count(n):
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)):
        raise TypeError(f"n must be an int; got {n!r}")
    if not 1 <= n <= 2**16:
        raise ValueError(f"n must lie between 1 and {2**16}; got {n}")
    return int(n)


def _set_threads(n, source):
    """Let the process use `n` threads from now on; `source` is what :func:`show_config` says of where the number came from."""
    _state.threads, _state.threads_from = n, source
    for module in list(_state.modules.values()):
        module.set_num_threads(n)


def get_num_threads() -> int:
    """The number of threads that a call may use; see :func:`set_num_threads`."""
    if _state.forked and _way_of_threading() == "openmp":
        return 1
    return _settings.get("threads") or _state.threads


def _way_of_threading():
    """How the native backend has threads, or None without that backend."""
    native = _state.modules.get("native")
    return None if native is None else native.get_threading()


@contextlib.contextmanager
def _scope(**changes):
    former = {field: _settings.get(field) for field in changes}
    _settings.change(**changes)
    try:
        yield
    finally:
        _settings.change(**former)


def threads(n: int) -> AbstractContextManager[Any]:
    """Use at most `n` threads within a ``with`` block, in the calling context: this thread, or task of asyncio.

    Parameters
    ----------
    n : int
        1 or more.
    """
    return _scope(threads=_thread_count(n))


def limit_isa(name):
    """Let the native backend use no instruction set above `name` within a ``with`` block, in the calling context.

    For tests and measurements; ``FASTATTN_ISA`` sets the limit of the process at import.

    Parameters
    ----------
    name : {"portable", "avx2", "avx512", "amx", "neon"} or None
        None lifts the limit.
    """
    return _scope(isa=_isa_code(_load("native"), name, "name"))


def use_threading(name):
    """Let the native backend have threads in this way within a ``with`` block, in the calling context.

    For tests and measurements; ``FASTATTN_THREADING`` sets the way of the process at import.

    Parameters
    ----------
    name : {"openmp", "pool"}
    """
    return _scope(threading=_threading_code(_load("native"), name, "name"))


def _isa_code(native, name, argument):
    if name is not None and name not in ISAS:
        raise ValueError(f"{argument} must be one of {ISAS}; got {name!r}")
    if name is not None and name not in native.available_isas():
        raise ValueError(f"{argument} must be available here, one of {native.available_isas()}; got {name!r}")
    return native.isa_code(name)


def _threading_code(native, name, argument):
    if name not in THREADINGS:
        raise ValueError(f"{argument} must be one of {THREADINGS}; got {name!r}")
    if name == "openmp" and not native.has_openmp():
        raise ValueError(f"{argument} must be 'pool' in a build without OpenMP; got {name!r}")
    return native.threading_code(name)


def _after_fork():
    """A forked child inherits an OpenMP run-time without its threads, which would wait for them for ever."""
    _state.forked = True
    _state.lock = _threading.Lock()
    if "native" in _state.modules:
        _state.modules["native"].note_fork()


def _initial_threads():
    """The number of threads to begin with, and where it came from."""
    text = os.environ.get("FASTATTN_NUM_THREADS")
    if text is not None:
        if not (text.strip().isdecimal() and 1 <= int(text) <= 2**16):
            raise ValueError(f"FASTATTN_NUM_THREADS must be an int between 1 and {2**16}; got {text!r}")
        return int(text), "FASTATTN_NUM_THREADS"
    outermost = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if outermost.isdecimal() and int(outermost) >= 1:
        return int(outermost), "OMP_NUM_THREADS"
    return _processors.usable()


def cpu_info() -> dict[str, Any]:
    """What is known about the processor.

    Returns
    -------
    dict
        ``machine`` and ``model``, names; ``cpus``, how many there are; ``usable_cpus``, how many this process may use
        by its affinity and by the quota of its control group, in whole processors;
        ``isas``, the instruction sets for which the native backend has kernels that can run here, lowest first (empty
        without that backend).
    """
    try:
        isas = _load("native").available_isas()
    except ImportError:
        isas = ()
    return {
        "machine": platform.machine(),
        "model": _cpu_model(),
        "cpus": os.cpu_count() or 1,
        "usable_cpus": _processors.usable()[0],
        "isas": isas,
    }


def _cpu_model():
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def show_config(mode: Literal["stdout", "dicts"] = "stdout") -> dict[str, Any] | None:
    """Report what would compute the next call, and why not something faster.

    Parameters
    ----------
    mode : {"stdout", "dicts"}
        Print the report, or return it as a dict.

    Returns
    -------
    dict or None
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(f'mode must be "stdout" or "dicts"; got {mode!r}')
    from . import __version__

    name = backend().__name__.rpartition(".")[2]
    config = {
        "version": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "backend": name,
        "backends": {
            other: "in use" if other == name else f"missing: {_state.missing[other]}" if other in _state.missing else "available"
            for other in BACKENDS
        },
        "cpu": cpu_info(),
        "isa": None,
        "openmp": None,
        "threads": get_num_threads(),
        "threads_from": "threads" if _settings.get("threads") else _state.threads_from,
        "threading": None,
        "forked": _state.forked,
    }
    if "native" not in _state.missing:
        native = _load("native")
        config["isa"] = native.get_isa() or native.available_isas()[-1]
        config["openmp"] = native.has_openmp()
        config["threading"] = native.get_threading()
    if mode == "dicts":
        return config

    cpu, threading = config["cpu"], config["threading"]
    alone = ", in a forked child: the OpenMP run-time does not survive a fork" if _state.forked and threading == "openmp" else ""
    ways = {None: "no native backend", True: "openmp and pool are there", False: "pool alone is there: built without OpenMP"}
    rows = [
        ("fastattn", f"{__version__}, Python {config['python']}, NumPy {config['numpy']}"),
        *((f"{other} backend", status) for other, status in config["backends"].items()),
        ("processor", f"{cpu['model']} ({cpu['machine']}), {cpu['usable_cpus']} of {cpu['cpus']} cpus usable"),
        ("instruction sets", f"{', '.join(cpu['isas']) or 'none'}; highest to use: {config['isa']}"),
        ("threads", f"{config['threads']}, from {config['threads_from']}{alone}"),
        ("threading", f"{threading or 'none'} ({ways[config['openmp']]})"),
    ]
    print("\n".join(f"{label:18}{text}" for label, text in rows))
    return None


def get_include() -> str:
    """The folder of ``fastattn.h``, for programs in C and Cython that call the engine themselves.

    Returns
    -------
    str
        A path inside the package. ``from fastattn.libfastattn cimport fastattn_attention`` finds the same declarations in Cython.

    Raises
    ------
    FileNotFoundError
        If the package was installed without its native backend.

    See Also
    --------
    get_library_dir
    """
    return _installed("include")


def get_library_dir() -> str:
    """The folder of the static library ``fastattn``, for programs that are linked with the engine.

    What they need besides is a library of threads (``-pthread``), that of mathematics (``-lm``) and, where the engine was built
    with OpenMP (``show_config("dicts")["openmp"]``), that as well (``-fopenmp``).

    Returns
    -------
    str
        A path inside the package.

    Raises
    ------
    FileNotFoundError
        If the package was installed without its native backend.

    See Also
    --------
    get_include
    """
    return _installed("lib")


def _installed(folder):
    path = os.path.join(os.path.dirname(__file__), folder)
    if not os.path.isdir(path):
        raise FileNotFoundError(f"{path}: fastattn was installed without its native backend, and so without its C library")
    return path


class Explanation(dict):
    """A dict that prints as a table."""

    def __repr__(self):
        return "\n".join(f"{key:18}{value}" for key, value in self.items())


def explain(q: Array, k: Array, v: Array, **keywords: Unpack[CallKeywords]) -> dict[str, Any]:
    """How :func:`attention` would compute a call, without computing it.

    Parameters
    ----------
    q, k, v, **keywords
        As for :func:`attention`.

    Returns
    -------
    dict
        ``backend``; ``isa``, the instruction set (None where the backend leaves that to a library); ``kernel``;
        ``tile_rows`` and ``tile_keys``, the query rows and keys in one step of the loop; ``splits``, the parts into which the
        keys are cut; ``work_items``, the pieces to share among ``threads``; ``threading``, how these are had: "pool", of the
        library's own, or "openmp", and None where that is left to a library; ``workspace_bytes``; ``visible_fraction``, the part
        of all (query, key) pairs that is computed. It prints as a table.
    """
    known_keywords("explain", keywords)
    module = backend()
    return Explanation(module.explain(Call(module, q, k, v, **keywords)))


def _initialize():
    """Read the environment and choose the backend; once, at import."""
    _state.threads, _state.threads_from = _initial_threads()
    wanted = os.environ.get("FASTATTN_BACKEND") or None
    isa = os.environ.get("FASTATTN_ISA") or None
    threading = os.environ.get("FASTATTN_THREADING") or None
    if wanted is not None and wanted not in BACKENDS:
        raise ValueError(f"FASTATTN_BACKEND must be one of {BACKENDS}; got {wanted!r}")
    if isa is not None and isa not in ISAS:
        raise ValueError(f"FASTATTN_ISA must be one of {ISAS}; got {isa!r}")
    if threading is not None and threading not in THREADINGS:
        raise ValueError(f"FASTATTN_THREADING must be one of {THREADINGS}; got {threading!r}")
    if importlib.util.find_spec("numba") is None:
        _state.missing["numba"] = "No module named 'numba'"
    try:
        native = _load("native")
    except ImportError as error:
        for variable, value in (("FASTATTN_ISA", isa), ("FASTATTN_THREADING", threading)):
            if value is not None:
                raise ValueError(f"{variable} is for the native backend, which is not here; got {value!r}") from error
        if wanted is None:
            wanted = "numpy" if "numba" in _state.missing else "numba"
            warnings.warn(f"fastattn: {error}; using the {wanted} backend, which is slower", BackendWarning, stacklevel=3)
    else:
        if isa is not None:
            native.set_isa(_isa_code(native, isa, "FASTATTN_ISA"))
        if threading is not None:
            native.set_threading(_threading_code(native, threading, "FASTATTN_THREADING"))
    wanted = wanted or "native"
    if wanted != "numba" or "numba" in _state.missing:
        _load(wanted)  # numba is imported by the first call
    _choose(wanted)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_after_fork)
