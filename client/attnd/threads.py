"""Threads beside the caller's, started and waited for in ways that an interrupt of the caller does not break."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable

from attnd.errors import Exhausted


def start_thread(target: Callable[[], object], name: str) -> None:
    """Starts a daemon thread.

    `threading.Thread.start` waits for the thread under a lock that an interrupt leaves locked. So another thread does
    that, which nobody interrupts.

    Raises:
        Exhausted: the system gives no more threads, or the interpreter ends.
    """
    thread = threading.Thread(target=target, name=name, daemon=True)
    try:
        _thread.start_new_thread(_start, (thread,))
    except RuntimeError as error:
        raise Exhausted(f"no thread can be started: {error}") from None


def bounded(timeout_s: float) -> float:
    """`timeout_s` as a wait takes it: any number of seconds, infinity too."""
    return min(timeout_s, threading.TIMEOUT_MAX)


def _start(thread: threading.Thread) -> None:
    try:
        thread.start()
    except RuntimeError:
        thread.run()  # the system gives no more threads than this one
