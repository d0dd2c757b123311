"""Whether somebody is warming up: preparing for steps that are yet to come, instead of serving one. One state for all.

A model runner says it of its process. A server says it of the one thread that compiles and captures, because its others
serve callers meanwhile, which may be layers of the same process.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class State(Protocol):
    """Where it is held whether the process is warming up."""

    def set_warming_up(self, is_warming_up: bool) -> None:
        """Says whether it is."""

    def is_warming_up(self) -> bool:
        """Whether it is."""


class _OwnState:
    """The process's, as long as no other package has it."""

    def __init__(self) -> None:
        self._is_on = False

    def set_warming_up(self, is_warming_up: bool) -> None:
        self._is_on = is_warming_up

    def is_warming_up(self) -> bool:
        return self._is_on


_own: State = _OwnState()
_state = _own
_thread = threading.local()


def set_warming_up(is_warming_up: bool) -> None:
    """Says whether the model runner of this process is warming up.

    Layers that are not attached to a server return zeros then. Attached ones run as ever, and before the first decode
    step of a shape (query heads, options, new tokens and number of requests) they have the server warm up for it.
    """
    _state.set_warming_up(is_warming_up)


def is_warming_up() -> bool:
    """Whether the model runner of this process is warming up, or this thread of a server is."""
    return getattr(_thread, "is_on", False) or _state.is_warming_up()


def reset_warming_up() -> None:
    """Ends the warm-up."""
    set_warming_up(False)


@contextmanager
def this_thread_warms_up() -> Iterator[None]:
    """What this thread launches inside serves no caller: it compiles or is captured. Others are not concerned."""
    before = getattr(_thread, "is_on", False)
    _thread.is_on = True
    try:
        yield
    finally:
        _thread.is_on = before


def hold_in(state: State | None) -> None:
    """Has another package hold the process's state, with a warm-up that runs; None: it is held here again."""
    global _state
    if state is not None and _own.is_warming_up():
        _own.set_warming_up(False)
        state.set_warming_up(True)
    _state = state or _own
