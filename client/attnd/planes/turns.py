"""One thread at a time: what a session needs, noticed at once where it is not so."""

from __future__ import annotations

from threading import get_ident

from attnd import forks
from attnd.errors import InvalidRequest


class Turn:
    """Who is inside an object.

    A list whose methods are atomic instead of a lock, because an interrupt may come between taking a lock and noting
    that it was taken.
    """

    def __init__(self, what: str) -> None:
        """Nobody is inside `what`, which this process makes."""
        self._what = what
        self._inside: list[int] = []
        self._made = forks.generation

    def begin(self) -> bool:
        """Goes inside; False: this thread was inside already, and was interrupted there or interrupts itself.

        Raises:
            InvalidRequest: another thread is inside.
            Disconnected: another process has made the object.
        """
        inside, me = self._inside, get_ident()
        inside.append(me)
        if len(inside) == 1 and self._made == forks.generation:
            return True
        if self._made != forks.generation:
            inside.clear()
            forks.refuse(self._what, self._made)
        others = [thread for thread in inside if thread != me]
        if others:
            inside.remove(me)
            rule = f"one thread at a time may use it: give each thread a {self._what} of its own"
            raise InvalidRequest(f"the {self._what} is in use by another thread, but {rule}")
        was_inside = inside.count(me) > 1
        inside[:] = [me]
        return not was_inside

    def end(self) -> None:
        """Goes outside."""
        self._inside.remove(get_ident())

    def __enter__(self) -> None:
        """As `begin`, of whoever does not mind whether it was inside."""
        self.begin()

    def __exit__(self, *_: object) -> None:
        """As `end`."""
        self.end()

    @property
    def is_anothers(self) -> bool:
        """Whether another thread is inside, or another process has made the object."""
        me = get_ident()
        return self._made != forks.generation or any(thread != me for thread in list(self._inside))
