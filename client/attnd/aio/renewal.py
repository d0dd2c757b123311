"""Renewing leases in the background, in one task for each, as `attnd.renewal` does on a thread."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from attnd.errors import AttndError, CacheLost
from attnd.renewal import RENEWALS, TRIES


class AsyncRenewable(Protocol):
    """A lease, which ends `ttl_s` seconds after it was renewed. Another `ref` says that it was adopted."""

    ref: Any
    ttl_s: float

    async def renew(self) -> None:
        """Starts the lease again. Raises CacheLost if it has gone."""


class AsyncRenewal:
    """Renews leases, each three times per time to live."""

    def __init__(self) -> None:
        """Each lease that is added gets a task of the running event loop."""
        self._tasks: dict[AsyncRenewable, asyncio.Future[None]] = {}

    def add(self, lease: AsyncRenewable) -> None:
        """Renews a lease from now on."""
        task = self._tasks.get(lease)
        if task is None or task.done():
            self._tasks[lease] = asyncio.ensure_future(self._run(lease))

    def remove(self, lease: AsyncRenewable) -> None:
        """Renews it no more."""
        task = self._tasks.pop(lease, None)
        if task is not None:
            task.cancel()

    def close(self) -> None:
        """Renews nothing any more."""
        for lease in list(self._tasks):
            self.remove(lease)

    async def _run(self, lease: AsyncRenewable) -> None:
        parts = RENEWALS
        while True:
            await asyncio.sleep(lease.ttl_s / parts)
            parts = RENEWALS
            ref = lease.ref
            try:
                await lease.renew()
            except CacheLost:
                if lease.ref is ref:  # not adopted meanwhile
                    self._tasks.pop(lease, None)
                    return  # the next step says so to the caller
            except AttndError:
                parts = TRIES  # away for now; the lease may outlast it
