"""How many steps are traced: nobody fills the operator's store of traces, and nobody takes all of it from others."""

from __future__ import annotations

import time
from collections import OrderedDict

# Principals whose rate is remembered: more are forgotten, the one that asked longest ago first.
MAX_PRINCIPALS = 1_024


class _Bucket:
    """So many a second, and as many at once after a second without any."""

    def __init__(self, per_s: float, now: float) -> None:
        self._per_s = per_s
        self._most = max(1.0, per_s)
        self._left = self._most
        self._filled_at = now

    def has_one(self, now: float) -> bool:
        self._left = min(self._most, self._left + (now - self._filled_at) * self._per_s)
        self._filled_at = now
        return self._left >= 1

    def take(self) -> None:
        self._left -= 1


class Allowance:
    """Steps a second. With a lock, or on one thread."""

    def __init__(self, per_s: float, principal_per_s: float) -> None:
        """So many of all principals together, and so many of each."""
        now = time.monotonic()
        self._all = _Bucket(per_s, now)
        self._principal_per_s = principal_per_s
        self._principals: OrderedDict[str, _Bucket] = OrderedDict()

    def take(self, principal: str) -> bool:
        """Whether another step of a principal may be traced now; it counts, if so."""
        now = time.monotonic()
        own = self._principals.get(principal)
        if own is None:
            own = self._principals[principal] = _Bucket(self._principal_per_s, now)
            if len(self._principals) > MAX_PRINCIPALS:
                self._principals.popitem(last=False)
        self._principals.move_to_end(principal)
        if not (own.has_one(now) and self._all.has_one(now)):
            return False
        own.take()
        self._all.take()
        return True
