"""The RPCs that are open: for which of them a drain waits, and which end at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from attnd_server.service.session import SILENT_S

# How often a drain looks, in seconds.
PERIOD_S = 0.02


class OpenRpc:
    """One RPC."""

    def __init__(self, has_more: Callable[[], bool] | None = None) -> None:
        """Nothing is under way, unless `has_more` says so."""
        self._has_more = has_more
        self._num_busy = 0
        self._went_on_at = float("-inf")

    @property
    def is_under_way(self) -> bool:
        """Whether a drain waits for it."""
        if self._num_busy or (self._has_more is not None and self._has_more()):
            return True
        return time.monotonic() - self._went_on_at < SILENT_S

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Something is under way for as long as the context lasts."""
        self._num_busy += 1
        try:
            yield
        finally:
            self._num_busy -= 1

    def goes_on(self) -> None:
        """A part of the answer is made or about to be sent, and more comes if the client reads."""
        self._went_on_at = time.monotonic()

    async def idle(self) -> None:
        """Waits until nothing is under way."""
        while self.is_under_way:
            await asyncio.sleep(PERIOD_S)


class OpenRpcs:
    """All RPCs of a server but those of health checks and reflection. On the event loop."""

    def __init__(self) -> None:
        """None is open."""
        self._open: dict[OpenRpc, None] = {}
        self._drain = asyncio.Event()

    def add(self, has_more: Callable[[], bool] | None = None) -> OpenRpc:
        """One more, to be removed when it ends. `has_more` says whether something is under way; None: it does."""
        rpc = OpenRpc(has_more)
        self._open[rpc] = None
        return rpc

    def remove(self, rpc: OpenRpc) -> None:
        """It has ended."""
        del self._open[rpc]

    @contextmanager
    def busy(self) -> Iterator[None]:
        """One more, under way for as long as the context lasts."""
        with self.opened() as rpc, rpc.busy():
            yield

    @contextmanager
    def opened(self) -> Iterator[OpenRpc]:
        """One more for as long as the context lasts."""
        rpc = self.add()
        try:
            yield rpc
        finally:
            self.remove(rpc)

    def drain(self) -> None:
        """From now on whatever is idle is to end."""
        self._drain.set()

    async def drained(self) -> None:
        """Waits for `drain`."""
        await self._drain.wait()

    async def wait_until_idle(self, timeout_s: float) -> None:
        """Waits until nothing is under way, but not for longer."""
        deadline = time.monotonic() + timeout_s
        while any(rpc.is_under_way for rpc in self._open) and time.monotonic() < deadline:
            await asyncio.sleep(PERIOD_S)
