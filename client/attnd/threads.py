"""Threads beside the caller's, started and waited for in ways that an interrupt of the caller does not break."""

from __future__ import annotations

import _thread
import math
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from attnd.errors import Exhausted

Item = TypeVar("Item")
# Seconds of one wait on a thread that may be interrupted.
TURN_S = 0.5


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


def taken(items: queue.SimpleQueue[Item], timeout_s: float = math.inf) -> Item:
    """The next item of a queue. Raises queue.Empty: there is none after `timeout_s` seconds.

    Waits in turns. A signal ends a wait of the main thread; but one that comes just before the wait begins does not,
    and Ctrl-C would be heard when the wait is over.
    """
    if timeout_s <= TURN_S:
        return items.get(timeout=timeout_s)
    deadline = time.monotonic() + timeout_s
    while (left_s := deadline - time.monotonic()) > TURN_S:
        with suppress(queue.Empty):
            return items.get(timeout=TURN_S)
    return items.get(timeout=max(0.0, left_s))


def bounded(timeout_s: float) -> float:
    """`timeout_s` as a wait takes it: any number of seconds, infinity too."""
    return min(timeout_s, threading.TIMEOUT_MAX)


def _start(thread: threading.Thread) -> None:
    try:
        thread.start()
    except RuntimeError:
        thread.run()  # the system gives no more threads than this one
