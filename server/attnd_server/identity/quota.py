"""Per-principal quotas of what a server has only so much of."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from attnd.errors import Exhausted


class Quota:
    """A limit on what all principals hold together, and one on what each holds. Any thread may call it."""

    def __init__(self, things: str, state: str, limit: int, principal_limit: int, remedy: str) -> None:
        """Nothing is held.

        Args:
            things: what they are, in the plural: "sessions".
            state: what they do while they are held: "are open".
            limit: most at one time.
            principal_limit: of these, most of one principal.
            remedy: what whoever is refused can do about it.
        """
        self._things = things
        self._state = state
        self._limit = limit
        self._principal_limit = principal_limit
        self._remedy = remedy
        self._held: Counter[str] = Counter()  # by principal; none is 0
        self._count = 0
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """What everybody holds."""
        return self._count

    def held_by(self, principal: str) -> int:
        """What a principal holds."""
        return self._held.get(principal, 0)

    def take(self, principal: str) -> None:
        """Gives one more to a principal, to be given back.

        Raises:
            Exhausted: the principal is at its limit, or the server is at its own.
        """
        with self._lock:
            own = self._held[principal]
            if self._count >= self._limit:
                use, limit = f"{self._count} {self._things} {self._state}", f"the server's limit is {self._limit}"
            elif own >= self._principal_limit:
                use = f"{own} {self._things} of this principal {self._state}"
                limit = f"a principal's limit is {self._principal_limit}"
            else:
                self._held[principal] = own + 1
                self._count += 1
                return
        raise Exhausted(f"{use}, but {limit}; 0 are free: {self._remedy}")

    def give_back(self, principal: str) -> None:
        """Takes back one of `take`."""
        with self._lock:
            self._count -= 1
            self._held[principal] -= 1
            if not self._held[principal]:
                del self._held[principal]

    @contextmanager
    def held(self, principal: str) -> Iterator[None]:
        """One for as long as the context lasts. Raises as `take` does."""
        self.take(principal)
        try:
            yield
        finally:
            self.give_back(principal)
