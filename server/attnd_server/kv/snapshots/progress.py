"""How far a snapshot is, in the log."""

from __future__ import annotations

import logging
import time

log = logging.getLogger(__name__)


class Progress:
    """Says in the log now and then how far a long thing is."""

    PERIOD_S = 5.0

    def __init__(self, event: str, num_bytes: int, **fields: object) -> None:
        """Of `event`, which comes to `num_bytes`; `fields` go into the log with it."""
        self._event, self._num_bytes, self._fields = event, num_bytes, fields
        self._done = 0
        self._said = time.monotonic()

    def advance(self, num_bytes: int) -> None:
        """So many more are done."""
        self._done += num_bytes
        now = time.monotonic()
        if now - self._said >= self.PERIOD_S:
            self._said = now
            percent = 100 * self._done // max(1, self._num_bytes)
            log.info(self._event, extra={**self._fields, "num_bytes": self._num_bytes, "percent": percent})
