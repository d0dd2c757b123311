"""Renewing leases in the background, in one task for each, as `attnd.renewal` does on a thread."""

from __future__ import annotations

import asyncio
import weakref
from typing import Any, Protocol

from attnd.errors import CacheLost
from attnd.renewal import RENEWALS, TRIES


class AsyncRenewable(Protocol):
    """A lease, which ends `ttl_s` seconds after it was renewed. Another `ref` says that it was adopted."""

    ref: Any
    ttl_s: float

    async def renew(self) -> None:
        """Starts the lease again. Raises CacheLost if it has gone."""


class AsyncRenewal:
    """Renews leases, each three times per time to live. Its tasks hold none, so that who is not used any more goes."""

    def __init__(self) -> None:
        """Each lease that is added gets a task of the running event loop."""
        self._tasks: dict[AsyncRenewable, asyncio.Future[None]] = {}
        self._running: set[asyncio.Future[None]] = set()
        weakref.finalize(self, _cancel, self._running).atexit = False

    def add(self, lease: AsyncRenewable) -> None:
        """Renews a lease from now on."""
        task = self._tasks.get(lease)
        if task is None or task.done():
            task = self._tasks[lease] = asyncio.ensure_future(_run(weakref.ref(self), weakref.ref(lease)))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    def remove(self, lease: AsyncRenewable) -> None:
        """Renews it no more."""
        task = self._tasks.pop(lease, None)
        if task is not None:
            task.cancel()

    def close(self) -> None:
        """Renews nothing any more."""
        for lease in list(self._tasks):
            self.remove(lease)

    def lost(self, lease: AsyncRenewable) -> None:
        """For the task: the lease has ended. The next step says so to the caller."""
        self._tasks.pop(lease, None)


async def _run(renewal: weakref.ref[AsyncRenewal], reference: weakref.ref[AsyncRenewable]) -> None:
    parts = RENEWALS
    while (lease := reference()) is not None:
        pause_s = lease.ttl_s / parts
        del lease
        await asyncio.sleep(pause_s)
        if (lease := reference()) is None:
            return
        parts = RENEWALS
        ref = lease.ref
        try:
            await lease.renew()
        except CacheLost:
            if lease.ref is ref:  # not adopted meanwhile
                if (owner := renewal()) is not None:
                    owner.lost(lease)
                return
        except Exception:  # of what gives the token, too
            parts = TRIES  # away for now; the lease may outlast it
        del lease


def _cancel(running: set[asyncio.Future[None]]) -> None:
    """Ends the tasks of a renewal that nobody has any more, from any thread."""
    for task in list(running):
        loop = task.get_loop()
        if not loop.is_closed():
            loop.call_soon_threadsafe(task.cancel)
