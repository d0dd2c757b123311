"""How a server's process ends: the signals that ask for it, its caches as files, and the last instruction."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from attnd.errors import Disconnected
from attnd_server.execution.executor import Executor
from attnd_server.kv.cache import Cache
from attnd_server.kv.snapshots import SnapshotStore

log = logging.getLogger(__name__)

# Exit code of a server that should have left snapshots of its caches and could not write them all.
EXIT_CACHES_LOST = 3
# Seconds that a call may still run once it was told to end: on a processor it ends with its piece, within a second or
# two. Then everybody else's cache is written first, and the call gets this time once more.
QUIET_S = 5.0
# Seconds that the last lines of the log may take: whoever reads them may not.
FLUSH_S = 2.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """SIGTERM and SIGINT: the first one asks for the end, the second one ends the process.

    A thread of its own reads their numbers from a socket, into which the system's handler writes them: whatever the
    other threads do, and however long, the second signal counts.

    Attributes:
        asked: set once the end was asked for.
    """

    def __init__(self) -> None:
        """From now on they count. On the main thread."""
        self.asked = threading.Event()
        self._listener: Callable[[], object] = _do_nothing
        self._exit_code: Callable[[], int] = lambda: 0
        self._lock = threading.Lock()
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, _ignore)
        threading.Thread(target=self._run, name="stop-signals", daemon=True).start()

    def listen(self, listener: Callable[[], object], exit_code: Callable[[], int]) -> None:
        """Has `listener` called at the first signal, at once if there was one, and `exit_code` at the second.

        Args:
            listener: called on another thread. Must not block or raise.
            exit_code: what the process would leave behind if it ended now.
        """
        with self._lock:
            self._listener, self._exit_code = listener, exit_code
            was_asked = self.asked.is_set()
        if was_asked:
            listener()

    def _run(self) -> None:
        while data := self._reader.recv(16):
            for number in data:
                if number in _SIGNALS:
                    self._came(signal.Signals(number).name)

    def _came(self, name: str) -> None:
        with self._lock:
            is_first = not self.asked.is_set()
            self.asked.set()
            listener, exit_code = self._listener, self._exit_code
        if is_first:
            listener()
            return
        code = exit_code()
        log.warning("ended by a second signal", extra={"signal": name, "exit_code": code})
        leave(code)


def leave(code: int) -> NoReturn:
    """Ends the process at once, with `code`; the log and the standard streams are flushed before.

    Python's own way out ends threads wherever they are. One that is inside torch then aborts the process.
    """
    try:
        flushing = threading.Thread(target=_flush, name="flush", daemon=True)
        flushing.start()
        flushing.join(FLUSH_S)
    except RuntimeError:
        pass  # there can be no more threads
    os._exit(code)


def save_caches(caches: Sequence[Cache], executor: Executor, snapshots: SnapshotStore) -> list[Cache]:
    """Writes every cache that nothing touches: the others' at once, that of a call that still runs once it has ended.

    Args:
        caches: to be written.
        executor: that was told to end and was closed.
        snapshots: to which they are written.

    Returns:
        Those that could not be written; the log says why.
    """
    faults = executor.faults
    try:
        faults.refuse()
        if executor.is_quiet(QUIET_S):
            return snapshots.write(caches)
        running = executor.running_cache_id
        # Of a turn of a warm-up nobody knows here which cache it may touch.
        others = [cache for cache in caches if running and cache.id != running]
        lost = snapshots.write(others)
        left = [cache for cache in caches if cache not in others]
        if left and executor.is_quiet(QUIET_S):
            return lost + snapshots.write(left)
        _log_lost(left, "a call of it still runs, and its snapshot would not be whole")
        return lost + left
    except (Disconnected, RuntimeError) as error:
        if not faults.reason and not faults.look_at(error):
            raise
    left = [cache for cache in caches if cache.id not in snapshots.written]
    _log_lost(left, "the device has failed")
    return left


def _log_lost(caches: Sequence[Cache], why: str) -> None:
    for cache in caches:
        told = {"cache": cache.id.hex(), "label": cache.name, "principal": str(cache.principal)}
        log.error("cache lost: %s", why, extra=told)


def _flush() -> None:
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):
            pass  # closed, or nobody reads it


def _do_nothing() -> None:
    pass


def _ignore(number: int, frame: FrameType | None) -> None:
    """Python's own handler, on the main thread: the thread of `StopSignals` does the rest."""
