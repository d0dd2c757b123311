"""What each caller was served: by session, and by principal with the sessions that have ended.

Calls add to the `ServedCounts` of their step. Whoever is asked for the numbers adds up the rest.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Collection

from attnd.errors import AttndError
from attnd.v1 import error_pb2
from attnd_server.device.copy_timer import NO_COPIES, Copies
from attnd_server.observe.tallies import PhaseHistogram

# As many as numbers of JSON have.
ID_BITS = 53
# Principals without sessions that are remembered.
MAX_PRINCIPALS = 4_096


class ServedCounts:
    """Implements `StepCounts`: steps and calls that were served, and how long some of the calls took.

    Attributes:
        steps: that were opened.
        tokens: new tokens of these steps.
        calls: that were answered with a result.
        times: of calls that were timed, by phase.
    """

    __slots__ = ("calls", "steps", "times", "tokens")

    PHASES = ("queue", "copy_in", "kernel", "copy_out")

    def __init__(self) -> None:
        """Nothing yet."""
        self.steps = self.tokens = self.calls = 0
        self.times = {phase: PhaseHistogram() for phase in self.PHASES}

    def add(self, *others: ServedCounts) -> None:
        """Counts what others have, too."""
        for other in others:
            self.steps += other.steps
            self.tokens += other.tokens
            self.calls += other.calls
        timed = [each.times for each in (self, *others)]
        for phase, times in self.times.items():
            times.counts = list(map(sum, zip(*(each[phase].counts for each in timed), strict=True)))

    def time(self, queue_us: int, copies: Copies, kernel_us: int, num_calls: int = 1) -> None:
        """Takes the times of a call, or of so many alike. By whoever has the device, or the plane of a session."""
        values = (queue_us, copies.in_us, kernel_us, copies.out_us)
        for times, value in zip(self.times.values(), values, strict=True):
            times.observe(value, num_calls)


class SessionCounts:
    """An Attend stream, or what is like it on a plane, and what it was served.

    Attributes:
        id: tells its row from others'.
        principal: whose it is.
        plane: how its tensors travel.
        opened_at: `time.monotonic`.
        used_at: when its last step was opened, or itself, likewise.
        served: what it was served.
    """

    __slots__ = ("id", "opened_at", "plane", "principal", "served", "used_at")

    def __init__(self, session_id: int, principal: str, plane: str) -> None:
        """Opened now."""
        self.id = session_id
        self.principal = principal
        self.plane = plane
        self.opened_at = self.used_at = time.monotonic()
        self.served = ServedCounts()

    def step_opened(self, num_tokens: int) -> None:
        """Counts a step. By the thread that serves the session."""
        self.served.steps += 1
        self.served.tokens += num_tokens
        self.used_at = time.monotonic()

    def step_served(self, num_calls: int, queue_us: int, step_us: int) -> None:
        """Counts the calls of a step that came as one message, as `Metrics.step_served` does."""
        each_us = step_us // num_calls
        self.served.time(queue_us, NO_COPIES, each_us)
        self.served.time(0, NO_COPIES, each_us, num_calls - 1)
        self.served.calls += num_calls


class PrincipalCounts:
    """One principal.

    Attributes:
        ended: what sessions that have ended were served.
        unary: its requests of Prefill and Decode, as a session.
        refusals: errors that it was told, by kind.
    """

    def __init__(self, unary: SessionCounts) -> None:
        """Nothing yet."""
        self.ended = ServedCounts()
        self.unary = unary
        self.refusals: Counter[error_pb2.ErrorReason.ValueType] = Counter()


class Callers:
    """Everybody who calls. Any thread may use it."""

    def __init__(self) -> None:
        """Nobody yet."""
        self._sessions: dict[SessionCounts, None] = {}  # in the order in which they were opened
        self._principals: dict[str, PrincipalCounts] = {}  # the one that came last is last
        self._ended: deque[SessionCounts] = deque()  # that have not been added up yet
        self._refusals: Counter[error_pb2.ErrorReason.ValueType] = Counter()  # everybody's
        self._lock = threading.Lock()

    def open(self, principal: str, plane: str) -> SessionCounts:
        """A session that begins, to be closed."""
        with self._lock:
            self._add_up_ended()
            self._of(principal)
            session = self._new(principal, plane)
            self._sessions[session] = None
            return session

    def close(self, session: SessionCounts) -> None:
        """A session has ended. Again does nothing. Takes no lock: Python may call it anywhere, to free the session."""
        self._ended.append(session)

    def unary_step(self, principal: str, num_tokens: int) -> SessionCounts:
        """Counts a step of a unary request; returns what counts its call."""
        with self._lock:
            unary = self._of(principal).unary
            unary.step_opened(num_tokens)
            return unary

    def refused(self, principal: str, error: AttndError) -> None:
        """Counts an error that a principal is told; "": that nobody knows who is told."""
        with self._lock:
            self._of(principal).refusals[error.reason] += 1
            self._refusals[error.reason] += 1

    def principals(self) -> list[str]:
        """Their names."""
        with self._lock:
            return [principal for principal in self._principals if principal]

    def sessions(self) -> list[SessionCounts]:
        """Those that are open."""
        with self._lock:
            self._add_up_ended()
            return list(self._sessions)

    def served(self, principals: Collection[str]) -> dict[str, ServedCounts]:
        """What each of these was served, whatever way."""
        parts: dict[str, list[ServedCounts]] = {principal: [] for principal in principals}
        with self._lock:
            self._add_up_ended()
            for principal, each in parts.items():
                known = self._principals.get(principal)
                if known is not None:
                    each += (known.ended, known.unary.served)
            for session in self._sessions:
                if session.principal in parts:
                    parts[session.principal].append(session.served)
        totals = {principal: ServedCounts() for principal in parts}
        for principal, total in totals.items():
            total.add(*parts[principal])
        return totals

    def refusals(self, principal: str) -> dict[error_pb2.ErrorReason.ValueType, int]:
        """Errors that a principal was told, by kind."""
        with self._lock:
            known = self._principals.get(principal)
            return {} if known is None else dict(known.refusals)

    def all_refusals(self) -> Counter[error_pb2.ErrorReason.ValueType]:
        """Errors that anybody was told, by kind."""
        with self._lock:
            return self._refusals.copy()

    def _add_up_ended(self) -> None:
        """With the lock."""
        while self._ended:
            session = self._ended.popleft()
            if session in self._sessions:
                del self._sessions[session]
                self._of(session.principal).ended.add(session.served)

    def _new(self, principal: str, plane: str) -> SessionCounts:
        # Random: from numbers that rise one could tell how many sessions others open.
        return SessionCounts(secrets.randbits(ID_BITS), principal, plane)

    def _of(self, principal: str) -> PrincipalCounts:
        """With the lock."""
        known = self._principals.get(principal)
        if known is None:
            known = self._principals[str(principal)] = PrincipalCounts(self._new(principal, "inline"))
            if len(self._principals) > MAX_PRINCIPALS:
                self._forget_one()
        return known

    def _forget_one(self) -> None:
        """With the lock."""
        kept = {session.principal for session in self._sessions} | {next(reversed(self._principals))}
        for principal in self._principals:
            if principal not in kept:
                del self._principals[principal]
                return
