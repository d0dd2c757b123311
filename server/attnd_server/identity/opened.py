"""What principals have opened and may keep for days: it ends when their tokens have gone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from attnd_server.identity.principals import is_revoked
from attnd_server.identity.tokens import TokenPrincipal


@dataclass(eq=False)
class _Open:
    """A stream or plane.

    Attributes:
        principal: who opened it.
        end: ends it.
        revoked_at: when its token was first found to have gone, `time.monotonic`; 0: it has not.
    """

    principal: TokenPrincipal
    end: Callable[[], None]
    revoked_at: float = 0.0


class OpenByToken:
    """The streams and planes that tokens have opened. Any thread may use it.

    Whoever sends something is told at once why it is refused. What is silent, does not read or waits for its worker is
    ended a little later.
    """

    # Seconds from the end of a token to the end of what it opened: who works has been told by then.
    NOTICE_S = 5.0

    def __init__(self) -> None:
        """Nothing is open."""
        self._open: dict[_Open, None] = {}
        self._lock = threading.Lock()

    @contextmanager
    def held(self, principal: str, end: Callable[[], None]) -> Iterator[None]:
        """For as long as something is open.

        Args:
            principal: who opened it.
            end: ends it, whatever its thread or task does. Called by `end_revoked`, once.
        """
        if not isinstance(principal, TokenPrincipal):
            yield
            return
        opened = _Open(principal, end)
        with self._lock:
            self._open[opened] = None
        try:
            yield
        finally:
            with self._lock:
                self._open.pop(opened, None)

    def end_revoked(self) -> None:
        """Ends what was opened by tokens that have gone for `NOTICE_S`. To be called every second or so."""
        now = time.monotonic()
        with self._lock:
            for opened in list(self._open):
                if not is_revoked(opened.principal):
                    opened.revoked_at = 0.0
                elif not opened.revoked_at:
                    opened.revoked_at = now
                elif now - opened.revoked_at >= self.NOTICE_S:
                    del self._open[opened]
                    opened.end()
