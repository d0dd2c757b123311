"""Renewing leases in the background, so that a process that lives keeps its caches however idle it is."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from attnd.errors import AttndError, CacheLost

if TYPE_CHECKING:
    from attnd.client import Cache

# Parts of the time to live after which a lease is renewed, and after which that is tried again when it failed.
RENEWALS, TRIES = 3, 12


class Renewal:
    """Renews leases on one thread, each three times per time to live."""

    def __init__(self) -> None:
        """The thread starts with the first cache."""
        self._due: dict[Cache, float] = {}  # `time.monotonic` of the next renewal
        self._wake = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None

    def add(self, cache: Cache) -> None:
        """Renews a cache from now on."""
        self._due[cache] = time.monotonic() + cache.ttl_s / RENEWALS
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="attnd-renewal", daemon=True)
            self._thread.start()
        self._wake.set()

    def remove(self, cache: Cache) -> None:
        """Renews it no more."""
        self._due.pop(cache, None)

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
                continue  # a cache with a shorter lease, or the end
            for cache, due in list(self._due.items()):
                if due <= time.monotonic() and not self._closed:
                    self._renew(cache)

    def _renew(self, cache: Cache) -> None:
        ref = cache.ref
        try:
            cache.renew()
        except CacheLost:
            if cache.ref is ref:  # not adopted meanwhile
                self.remove(cache)  # the next step says so to the caller
                return
            parts = RENEWALS
        except AttndError:
            parts = TRIES  # away for now; the lease may outlast it
        else:
            parts = RENEWALS
        if cache in self._due:  # not deleted meanwhile
            self._due[cache] = time.monotonic() + cache.ttl_s / parts
