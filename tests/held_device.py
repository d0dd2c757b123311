"""A device that is busy."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from attnd_server.execution.executor import Executor


@contextmanager
def held(executor: Executor) -> Iterator[threading.Event]:
    """Keeps the executor's device busy until the end, or until the event is set."""
    release, started = threading.Event(), threading.Event()

    def hold() -> bytes:
        started.set()
        release.wait(60)
        return b""

    executor.submit(hold, lambda result, error: None)
    assert started.wait(30)
    try:
        yield release
    finally:
        release.set()
