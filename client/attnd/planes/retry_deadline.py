"""How long a request is sent again: what the server refused without starting it, and what was lost with a connection.

The first is safe whatever the request does: only such refusals carry `AttndError.retry_after_s`. The second is safe
because the contract lets any unary request be sent twice.
"""

from __future__ import annotations

import random
import time

from attnd.errors import AttndError, CacheLost, Disconnected

# How much longer than told a client may wait, so that those who were refused together do not come back together.
_SPREAD = 0.5
# Seconds that a request which was refused must have left to be sent again: in fewer it learns nothing but that they are
# over, and not what it was refused for.
_LEAST_S = 0.05
# Seconds for which a lost connection is made again: a server that restarts on the spot is back by then. After the
# first loss there is a pause, and each is followed by a longer one.
RECONNECT_S = 2.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 0.25
# Seconds until a server is tried again that has just ended a call because it ends itself.
RECONNECT_PAUSE_S = 0.1


class RetryDeadline:
    """Until when one request may be sent again, and after which pauses."""

    def __init__(self, timeout_s: float, is_delete: bool = False) -> None:
        """Ends in `timeout_s` seconds. A deletion that is sent again may find nothing left, and is done then."""
        self._deadline = time.monotonic() + timeout_s
        self._is_delete = is_delete
        self._lost_at: float | None = None
        self._pause_s = _FIRST_PAUSE_S

    def pause_s(self, error: AttndError) -> float | None:
        """Seconds to wait before the request is sent again; None: it must not be, or the time is up before."""
        now = time.monotonic()
        if isinstance(error, Disconnected) and error.is_final:
            return None
        if isinstance(error, Disconnected):
            self._lost_at = now if self._lost_at is None else self._lost_at
            base_s, deadline = self._pause_s, min(self._deadline, self._lost_at + RECONNECT_S)
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        elif error.retry_after_s is not None:
            base_s, deadline = error.retry_after_s, self._deadline - _LEAST_S
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
