"""One thread for the resident steps of all sessions: it parks the idle ones and wakes them, and ends what is late."""

from __future__ import annotations

import logging
import threading
import time
from typing import Protocol

log = logging.getLogger(__name__)

# Seconds between two looks while a session may have to be woken, and else; and between two looks whether a session may
# go on.
PERIOD_S, LONG_PERIOD_S, CHECK_S = 0.0005, 0.01, 0.25
# Seconds without a step of any session after which they need not be woken so soon.
IDLE_S = 5.0


class Kept(Protocol):
    """What is looked after: `ResidentLaunches`."""

    @property
    def num_done(self) -> int:
        """Steps that are done."""

    @property
    def is_parked(self) -> bool:
        """Whether nothing is launched for it."""

    def look(self, now: float) -> None:
        """Parks, wakes, or ends what is late."""

    def check(self) -> None:
        """Ends it if it may not go on."""


class Keeper:
    """Looks after sessions. One thread, which ends when there are none."""

    def __init__(self) -> None:
        """The thread starts with the first session."""
        self._kept: list[Kept] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def keep(self, session: Kept) -> None:
        """From now on."""
        with self._lock:
            self._kept.append(session)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="cuda-resident-keeper", daemon=True)
                self._thread.start()

    def forget(self, session: Kept) -> None:
        """No more. Waits for a look that is under way."""
        with self._lock:
            self._kept.remove(session)

    def _run(self) -> None:
        checked_at = happened_at = time.monotonic()
        num_done = 0
        while True:
            now = time.monotonic()
            is_check = now > checked_at + CHECK_S
            checked_at = now if is_check else checked_at
            with self._lock:
                if not self._kept:
                    self._thread = None
                    return
                for session in self._kept:
                    _look(session, now, is_check)
                if num_done != (num_done := sum(session.num_done for session in self._kept)):
                    happened_at = now
                may_wake = now < happened_at + IDLE_S and any(session.is_parked for session in self._kept)
            time.sleep(PERIOD_S if may_wake else LONG_PERIOD_S)


def _look(session: Kept, now: float, is_check: bool) -> None:
    """At one of them, whose errors are not the others'."""
    try:
        session.look(now)
        if is_check:
            session.check()
    except Exception:
        log.exception("resident steps cannot be looked after")


KEEPER = Keeper()
