"""What computes, and on how many threads: backend choice, thread count, instruction sets, and the means to ask.

The settings belong to the process, not to a thread: a change made in one thread is seen by the next call of every thread.
Calls that already run keep what they started with.
"""

import contextlib
import importlib
import importlib.util
import os
import platform
import warnings

import numpy as np

from . import _processors
from ._check import Call, known_keywords

BACKENDS = ("native", "numba", "numpy")
ISAS = ("portable", "avx2", "avx512", "amx", "neon")


class BackendWarning(RuntimeWarning):
    """The fastest backend cannot be used, and another one stands in for it."""


class _State:
    """The settings in force. `plain` is the short way into the native engine, or None where another backend is in use."""

    __slots__ = ("name", "module", "plain", "threads", "threads_from", "forked", "missing")


_state = _State()
_state.name = _state.module = _state.plain = None
_state.threads, _state.threads_from = 1, "default"
_state.forked = False
_state.missing = {}  # backend name: why it cannot be used


def _load(name):
    """Import a backend and give it the thread count; `ImportError`, remembered, where it cannot be imported."""
    try:
        module = importlib.import_module(f"fastattn.backends.{name}")
    except ImportError as error:
        _state.missing[name] = str(error)
        raise ImportError(f"the {name} backend cannot be used: {error}") from error
    module.set_num_threads(get_num_threads())
    return module


def backend():
    """The module of the backend in use."""
    if _state.module is None:  # Numba is chosen by name at import and imported by the first call
        try:
            _select("numba")
        except ImportError as error:
            warnings.warn(f"fastattn: {error}; using the numpy backend", BackendWarning, stacklevel=3)
            _select("numpy")
    return _state.module


def _select(name):
    module = _load(name)
    _state.name, _state.module, _state.plain = name, module, getattr(module, "attention_plain", None)


def _reinstate(choice):
    """Return to an earlier choice, be it of a module that has not been needed yet."""
    _state.name, _state.module, _state.plain = choice
    if _state.module is not None:
        _state.module.set_num_threads(get_num_threads())


class _Restore:
    """The setting is already made; leaving a ``with`` block undoes it."""

    def __init__(self, undo, *args):
        self._undo, self._args = undo, args

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._undo(*self._args)


def use_backend(name):
    """Compute with a backend from now on, or within a ``with`` block.

    Parameters
    ----------
    name : {"native", "numba", "numpy"}

    Returns
    -------
    context manager
        The backend is in use as soon as the function is called. As a context manager the result restores the former
        one at the end of the block. The choice holds for the whole process, all its threads included.

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
    former = _state.name, _state.module, _state.plain
    _select(name)
    return _Restore(_reinstate, former)


def set_num_threads(n):
    """Use at most `n` threads in each later call, in the whole process.

    The initial count is ``FASTATTN_NUM_THREADS``, else ``OMP_NUM_THREADS``, else the number of processors that this process may use:
    those of its affinity, or fewer where the quota of a control group (a container's limit) leaves it fewer whole ones. It is found at
    import; :func:`show_config` says where it came from.
    Results do not depend on it. In a forked child process it stays 1: the OpenMP run-time does not survive a fork.

    Parameters
    ----------
    n : int
        1 or more.
    """
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)):
        raise TypeError(f"n must be an int; got {n!r}")
    if not 1 <= n <= 2**16:
        raise ValueError(f"n must lie between 1 and {2**16}; got {n}")
    _set_threads(int(n), "set_num_threads")


def _set_threads(n, source):
    """Use `n` threads from now on; `source` is what :func:`show_config` says of where the number came from."""
    _state.threads, _state.threads_from = n, source
    if _state.module is not None:
        _state.module.set_num_threads(get_num_threads())


def get_num_threads():
    """The number of threads that a call may use; see :func:`set_num_threads`."""
    return 1 if _state.forked else _state.threads


@contextlib.contextmanager
def threads(n):
    """Use at most `n` threads within a ``with`` block; see :func:`set_num_threads`."""
    former = _state.threads, _state.threads_from
    set_num_threads(n)
    try:
        yield
    finally:
        set_num_threads(former[0])
        _state.threads_from = former[1]


@contextlib.contextmanager
def limit_isa(name):
    """Let the native backend use no instruction set above `name` within a ``with`` block.

    For tests and measurements, and for the whole process; ``FASTATTN_ISA`` sets the limit at import.

    Parameters
    ----------
    name : {"portable", "avx2", "avx512", "amx", "neon"} or None
        None lifts the limit.
    """
    native = _load("native")
    former = native.get_isa()
    _set_isa(native, name, "name")
    try:
        yield
    finally:
        native.set_isa(former)


def _set_isa(native, name, argument):
    if name is not None and name not in ISAS:
        raise ValueError(f"{argument} must be one of {ISAS}; got {name!r}")
    if name is not None and name not in native.available_isas():
        raise ValueError(f"{argument} must be available here, one of {native.available_isas()}; got {name!r}")
    native.set_isa(name)


def _after_fork():
    """A forked child inherits an OpenMP run-time without its threads, which would wait for them for ever."""
    _state.forked = True
    if _state.module is not None:
        _state.module.set_num_threads(1)


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


def cpu_info():
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


def show_config(mode="stdout"):
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
        "threads_from": _state.threads_from,
        "forked": _state.forked,
    }
    if "native" not in _state.missing:
        native = _load("native")
        config["isa"] = native.get_isa() or native.available_isas()[-1]
        config["openmp"] = native.has_openmp()
    if mode == "dicts":
        return config

    cpu, forked = config["cpu"], " (a forked child: the OpenMP run-time does not survive a fork)" if _state.forked else ""
    openmp = {None: "no native backend", True: "yes", False: "no: the native backend runs on one thread"}[config["openmp"]]
    rows = [
        ("fastattn", f"{__version__}, Python {config['python']}, NumPy {config['numpy']}"),
        *((f"{other} backend", status) for other, status in config["backends"].items()),
        ("processor", f"{cpu['model']} ({cpu['machine']}), {cpu['usable_cpus']} of {cpu['cpus']} cpus usable"),
        ("instruction sets", f"{', '.join(cpu['isas']) or 'none'}; highest to use: {config['isa']}"),
        ("OpenMP", openmp),
        ("threads", f"{config['threads']}, from {config['threads_from']}{forked}"),
    ]
    print("\n".join(f"{label:18}{text}" for label, text in rows))
    return None


class Explanation(dict):
    """A dict that prints as a table."""

    def __repr__(self):
        return "\n".join(f"{key:18}{value}" for key, value in self.items())


def explain(q, k, v, **keywords):
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
        keys are cut; ``work_items``, the pieces to share among ``threads``; ``workspace_bytes``; ``visible_fraction``, the part
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
    if wanted is not None and wanted not in BACKENDS:
        raise ValueError(f"FASTATTN_BACKEND must be one of {BACKENDS}; got {wanted!r}")
    if isa is not None and isa not in ISAS:
        raise ValueError(f"FASTATTN_ISA must be one of {ISAS}; got {isa!r}")
    if importlib.util.find_spec("numba") is None:
        _state.missing["numba"] = "No module named 'numba'"
    try:
        native = _load("native")
    except ImportError as error:
        if isa is not None:
            raise ValueError(f"FASTATTN_ISA limits the native backend, which is not here; got {isa!r}") from error
        if wanted is None:
            wanted = "numpy" if "numba" in _state.missing else "numba"
            warnings.warn(f"fastattn: {error}; using the {wanted} backend, which is slower", BackendWarning, stacklevel=3)
    else:
        if isa is not None:
            _set_isa(native, isa, "FASTATTN_ISA")
    wanted = wanted or "native"
    if wanted == "numba" and "numba" not in _state.missing:
        _state.name = wanted  # to be imported by the first call
    else:
        _select(wanted)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_after_fork)
