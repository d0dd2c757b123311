"""Renewing leases in the background, so that a process that lives keeps its caches however idle it is."""

from __future__ import annotations

import threading
import time
from typing import Any, Protocol

from attnd.errors import AttndError, CacheLost

# Parts of the time to live after which a lease is renewed, and after which that is tried again when it failed.
RENEWALS, TRIES = 3, 12


class Renewable(Protocol):
    """A lease, which ends `ttl_s` seconds after it was renewed. Another `ref` says that it was adopted."""

    ref: Any
    ttl_s: float

    def renew(self) -> None:
        """Starts the lease again. Raises CacheLost if it has gone."""


class Renewal:
    """Renews leases on one thread, each three times per time to live."""

    def __init__(self) -> None:
        """The thread starts with the first lease."""
        self._due: dict[Renewable, float] = {}  # `time.monotonic` of the next renewal
        self._wake = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None

    def add(self, lease: Renewable) -> None:
        """Renews a lease from now on."""
        self._due[lease] = time.monotonic() + lease.ttl_s / RENEWALS
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="attnd-renewal", daemon=True)
            self._thread.start()
        self._wake.set()

    def remove(self, lease: Renewable) -> None:
        """Renews it no more."""
        self._due.pop(lease, None)

    def close(self) -> None:
        """Renews nothing any more."""
        self._closed = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=5.0)

    def _run(self) -> None:
        while not self._closed:
            self._wake.clear()
            next_due = min(list(self._due.values()), default=None)
            pause_s = None if next_due is None else max(0.0, next_due - time.monotonic())
            if self._closed or self._wake.wait(pause_s):
                continue  # a shorter lease, or the end
            for lease, due in list(self._due.items()):
                if due <= time.monotonic() and not self._closed:
                    self._renew(lease)

    def _renew(self, lease: Renewable) -> None:
        ref = lease.ref
        try:
            lease.renew()
        except CacheLost:
            if lease.ref is ref:  # not adopted meanwhile
                self.remove(lease)  # the next step says so to the caller
                return
            parts = RENEWALS
        except AttndError:
            parts = TRIES  # away for now; the lease may outlast it
        else:
            parts = RENEWALS
        if lease in self._due:  # not deleted meanwhile
            self._due[lease] = time.monotonic() + lease.ttl_s / parts
