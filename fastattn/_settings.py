"""What the calling context has set for its calls, over what the process has.

A ``with`` block changes settings for the code that it encloses and for nobody else: a context variable holds them, so that threads
and asyncio's tasks, which have contexts of their own, do not see each other's, and blocks may overlap in time.
"""

from contextvars import ContextVar
from typing import NamedTuple


class Settings(NamedTuple):
    """Settings of a context; None is that of the process. `isa` and `threading` are the numbers that the C library gives them."""

    backend: str | None = None
    threads: int | None = None
    isa: int | None = None
    threading: int | None = None


_NOTHING = Settings()

# None where a context has set nothing, which is what nearly every call finds.
scoped = ContextVar("fastattn", default=None)


def get(field):
    """A setting of the calling context, or None."""
    settings = scoped.get()
    return None if settings is None else getattr(settings, field)


def change(**fields):
    """Set fields for the calling context; None gives one back to the process."""
    settings = (scoped.get() or _NOTHING)._replace(**fields)
    scoped.set(None if settings == _NOTHING else settings)
