"""Looks at the workers of steps on cuda planes that are under way, so that no stream waits for one that has gone."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from attnd_server.planes.cuda.channel import Flags
from attnd_server.planes.socket_ends import has_ended

# Seconds that a step may take, the worker's work between the layers included.
STEP_S = 60.0


@dataclass(eq=False)
class Watch:
    """A step that the watchdog looks at.

    Attributes:
        flags: of its session.
        connection: to its worker.
        stuck: called if it does not even end when nothing waits any more: a kernel does not.
        stuck_s: seconds until then; 0: never.
        is_refused: whether it must not go on, whatever its worker does.
        deadline: until when it must be over, `time.monotonic`.
        stopped_at: when it was first let go, likewise; 0: it was not.
    """

    flags: Flags
    connection: socket.socket
    stuck: Callable[[], None] = lambda: None
    stuck_s: float = 0.0
    is_refused: Callable[[], bool] = lambda: False
    deadline: float = 0.0
    stopped_at: float = 0.0

    def is_over(self) -> bool:
        """Whether nothing of it is to wait any more."""
        is_late = time.monotonic() > self.deadline
        return self.flags.is_stopped or is_late or has_ended(self.connection) or self.is_refused()

    def restart(self) -> None:
        """The time of a step starts now."""
        self.deadline = time.monotonic() + STEP_S

    def stop(self) -> None:
        """Lets the stream go, once more."""
        self.stopped_at = self.stopped_at or time.monotonic()
        self.flags.stop()
        if self.stuck_s and time.monotonic() - self.stopped_at > self.stuck_s:
            self.stuck()


class Watchdog:
    """Lets streams go that wait for workers which have gone or are too late. One thread for all planes."""

    # Seconds until a look at new steps and at the clock, and between two tries to let go of what waits.
    PERIOD_S, STOP_PERIOD_S = 0.05, 0.001

    def __init__(self) -> None:
        """The thread starts with the first step."""
        self._watched: set[Watch] = set()
        self._lock = threading.Lock()
        self._news = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def watching(self, watch: Watch) -> Iterator[Watch]:
        """Stops its flags if the worker's side of the socket ends meanwhile, or the step takes longer than `STEP_S`."""
        watch.restart()
        with self._lock:
            self._watched.add(watch)
            self._news.set()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="cuda-watchdog", daemon=True)
                self._thread.start()
        try:
            yield watch
        finally:
            with self._lock:
                self._watched.remove(watch)

    def _run(self) -> None:
        while True:
            self._news.wait()
            with self._lock:
                watched = list(self._watched)
                if not watched:
                    self._news.clear()
                    continue
            stopped = False
            for watch in watched:
                if watch.is_over():
                    stopped = True
                    with self._lock:  # or its memory may have gone
                        if watch in self._watched:
                            watch.stop()
            if stopped:
                time.sleep(self.STOP_PERIOD_S)
            else:
                has_ended(*(watch.connection for watch in watched), timeout_s=self.PERIOD_S)


WATCHDOG = Watchdog()
