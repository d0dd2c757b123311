"""Renewing leases in the background, so that a process that lives keeps its caches however idle it is."""

from __future__ import annotations

import queue
import time
import weakref
from functools import partial
from typing import Any, Protocol

from attnd.errors import CacheLost
from attnd.threads import bounded, start_thread

# Parts of the time to live after which a lease is renewed, and after which that is tried again when it failed.
RENEWALS, TRIES = 3, 12
# Seconds for which the end of a connection waits for a renewal that is under way.
CLOSING_S = 5.0


class Renewable(Protocol):
    """A lease, which ends `ttl_s` seconds after it was renewed. Another `ref` says that it was adopted."""

    ref: Any
    ttl_s: float

    def renew(self) -> None:
        """Starts the lease again. Raises CacheLost if it has gone."""


class Renewal:
    """Renews leases on one thread, each three times per time to live.

    The thread holds neither this nor a lease while it waits, so that a client that nobody has any more goes with its
    caches.
    """

    def __init__(self) -> None:
        """The thread starts with the first lease, and ends with the last."""
        # `time.monotonic` of the next renewal. No lock guards it: an interrupt could leave that locked for the thread.
        self._due: dict[Renewable, float] = {}
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._closed = False
        # Where the thread that renews says that it has ended; of two that were started, the later goes on.
        self._runner: queue.SimpleQueue[None] | None = None
        weakref.finalize(self, self._wake.put, None).atexit = False

    def add(self, lease: Renewable) -> None:
        """Renews a lease from now on."""
        self._due[lease] = time.monotonic() + lease.ttl_s / RENEWALS
        if self._runner is None:
            start_thread(partial(_run, weakref.ref(self), self._wake), "attnd-renewal")
        self._wake.put(None)

    def remove(self, lease: Renewable) -> None:
        """Renews it no more."""
        self._due.pop(lease, None)
        self._wake.put(None)

    def close(self) -> None:
        """Renews nothing any more."""
        self._closed = True
        self._due.clear()
        self._wake.put(None)
        if (runner := self._runner) is not None:
            try:
                runner.get(timeout=CLOSING_S)
            except queue.Empty:
                pass  # it waits for an answer, and ends then

    def begin(self) -> queue.SimpleQueue[None]:
        """For the thread: what `pause_s` is to be asked with. From now on another thread ends."""
        runner: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._runner = runner
        return runner

    def pause_s(self, runner: queue.SimpleQueue[None]) -> float | None:
        """For the thread: renews what is due, and says in how many seconds the next is; None: it is to end."""
        for lease, due in list(self._due.items()):
            if due <= time.monotonic() and not self._closed:
                self._renew(lease)
        if self._runner is runner and not self._due:
            self._runner = None
            if self._due:  # added just now, by whom no other thread was started
                self._runner = runner
        if self._runner is not runner:
            runner.put(None)
            return None
        return max(0.0, min(list(self._due.values()), default=0.0) - time.monotonic())

    def _renew(self, lease: Renewable) -> None:
        ref = lease.ref
        try:
            lease.renew()
        except CacheLost:
            if lease.ref is ref:  # not adopted meanwhile
                self.remove(lease)  # the next step says so to the caller
                return
            parts = RENEWALS
        except Exception:  # of what gives the token, too
            parts = TRIES  # away for now; the lease may outlast it
        else:
            parts = RENEWALS
        if lease in self._due:  # not deleted meanwhile
            self._due[lease] = time.monotonic() + lease.ttl_s / parts


def _run(reference: weakref.ref[Renewal], wake: queue.SimpleQueue[None]) -> None:
    """The thread."""
    renewal = reference()
    if renewal is None:
        return
    runner = renewal.begin()
    while renewal is not None:
        pause_s = renewal.pause_s(runner)
        del renewal
        if pause_s is None:
            return
        try:
            wake.get(timeout=bounded(pause_s))
        except queue.Empty:
            pass
        renewal = reference()
