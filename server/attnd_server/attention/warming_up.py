"""Whether this thread is warming up: preparing for steps that are yet to come, instead of serving one."""

from __future__ import annotations

import threading

_warm_up = threading.local()


def set_warming_up(is_warming_up: bool) -> None:
    """Says whether this thread is warming up. Others serve callers meanwhile, so that it is each thread's own."""
    _warm_up.is_on = is_warming_up


def is_warming_up() -> bool:
    """Whether this thread is warming up: what it launches now serves no caller, it compiles or is captured."""
    return getattr(_warm_up, "is_on", False)


def reset_warming_up() -> None:
    """Ends this thread's warm-up."""
    set_warming_up(False)
