"""Sending a request again that the server refused without starting it.

Only such refusals carry `AttndError.retry_after_s`, so it is safe whatever the request does.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from attnd.errors import AttndError, Disconnected

Result = TypeVar("Result")
# How much longer than told a client may wait, so that those who were refused together do not come back together.
_SPREAD = 0.5


# Seconds until a server is tried again that has just ended a call because it ends itself.
RECONNECT_PAUSE_S = 0.1


class Patience:
    """How long one request may be sent again."""

    def __init__(self, timeout_s: float) -> None:
        """Ends in `timeout_s` seconds."""
        self._deadline = time.monotonic() + timeout_s

    def pause_s(self, error: AttndError) -> float | None:
        """Seconds to wait before the request is sent again; None: it must not be, or the time is up before."""
        if error.retry_after_s is None:
            return None
        pause_s = error.retry_after_s * random.uniform(1, 1 + _SPREAD)
        return pause_s if time.monotonic() + pause_s < self._deadline else None

    @property
    def left_s(self) -> float:
        """Seconds that are left, and never none at all."""
        return max(1e-3, self._deadline - time.monotonic())


def patiently(send: Callable[[float], Result], timeout_s: float) -> Result:
    """What `send` gives, called again after each refusal that says when to retry, while the time lasts.

    Args:
        send: sends the request and waits for its answer, for as many seconds as it is given.
        timeout_s: seconds for all of it.
    """
    patience = Patience(timeout_s)
    left_s = timeout_s
    while True:
        try:
            return send(left_s)
        except AttndError as error:
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
