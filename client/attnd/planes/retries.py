"""Sending a request again: what the server refused without starting it, and what was lost with a connection.

The first is safe whatever the request does: only such refusals carry `AttndError.retry_after_s`. The second is safe
because the contract lets any unary request be sent twice.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from attnd.errors import AttndError, CacheLost, Disconnected

Result = TypeVar("Result")
# How much longer than told a client may wait, so that those who were refused together do not come back together.
_SPREAD = 0.5
# Seconds for which a lost connection is made again: a server that restarts on the spot is back by then. After the
# first loss there is a pause, and each is followed by a longer one.
RECONNECT_S = 2.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 0.25


# Seconds until a server is tried again that has just ended a call because it ends itself.
RECONNECT_PAUSE_S = 0.1


class Patience:
    """How long one request may be sent again."""

    def __init__(self, timeout_s: float, is_delete: bool = False) -> None:
        """Ends in `timeout_s` seconds. A deletion that is sent again may find nothing left, and is done then."""
        self._deadline = time.monotonic() + timeout_s
        self._is_delete = is_delete
        self._lost_at: float | None = None
        self._pause_s = _FIRST_PAUSE_S

    def pause_s(self, error: AttndError) -> float | None:
        """Seconds to wait before the request is sent again; None: it must not be, or the time is up before."""
        now = time.monotonic()
        if isinstance(error, Disconnected):
            self._lost_at = now if self._lost_at is None else self._lost_at
            base_s, deadline = self._pause_s, min(self._deadline, self._lost_at + RECONNECT_S)
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        elif error.retry_after_s is not None:
            base_s, deadline = error.retry_after_s, self._deadline
        else:
            return None
        pause_s = base_s * random.uniform(1, 1 + _SPREAD)
        return pause_s if now + pause_s < deadline else None

    def is_done(self, error: AttndError) -> bool:
        """Whether the request has come to its end, though its last try failed: a try before it did it."""
        return self._is_delete and self._lost_at is not None and isinstance(error, CacheLost)

    @property
    def left_s(self) -> float:
        """Seconds that are left, and never none at all."""
        return max(1e-3, self._deadline - time.monotonic())


def patiently(send: Callable[[float], Result], timeout_s: float, gone: Result | None = None) -> Result:
    """What `send` gives, called again where that is safe and of use, while the time lasts.

    Args:
        send: sends the request and waits for its answer, for as many seconds as it is given.
        timeout_s: seconds for all of it.
        gone: of a deletion, what to give when there is nothing left to delete the second time; None: it is none.
    """
    patience = Patience(timeout_s, is_delete=gone is not None)
    left_s = timeout_s
    while True:
        try:
            return send(left_s)
        except AttndError as error:
            if gone is not None and patience.is_done(error):
                return gone
            pause_s = patience.pause_s(error)
            if pause_s is None:
                raise
        time.sleep(pause_s)
        left_s = patience.left_s


def until_answered(send: Callable[[float], Result], timeout_s: float) -> Result:
    """What `send` gives, called again while the time lasts if the connection broke: a server that ends ends calls too.

    Args:
        send: waits for a server, and for its answer, for as many seconds as it is given. May be done twice.
        timeout_s: seconds for all of it.

    Raises:
        Disconnected: there was no answer in time.
    """
    patience, left_s = Patience(timeout_s), timeout_s
    while True:
        try:
            return send(left_s)
        except Disconnected:
            if patience.left_s <= RECONNECT_PAUSE_S:
                raise
        time.sleep(RECONNECT_PAUSE_S)
        left_s = patience.left_s
