"""One event loop, in one process: what an asyncio object needs, noticed at once where it is not so."""

from __future__ import annotations

import asyncio

from attnd import forks
from attnd.errors import InvalidRequest


class Home:
    """The event loop in which an object was first used, and the process."""

    def __init__(self, what: str) -> None:
        """Of `what`, which this process makes. A loop that runs now is its loop."""
        self._what = what
        self._made = forks.generation
        try:
            self._loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            self._loop = None

    @property
    def is_here(self) -> bool:
        """Whether it is this process that has made the object."""
        return self._made == forks.generation

    def check(self) -> None:
        """To be called first in whatever is awaited.

        Raises:
            InvalidRequest: another event loop runs.
            Disconnected: another process has made the object.
        """
        forks.refuse(self._what, self._made)
        running = asyncio.get_running_loop()
        if running is self._loop:
            return
        if self._loop is None:
            self._loop = running
        elif running is not self._loop:
            state = "has been closed" if self._loop.is_closed() else "is not this one"
            raise InvalidRequest(
                f"the {self._what} belongs to an event loop that {state}, and must be awaited in its own: connect again"
            )
