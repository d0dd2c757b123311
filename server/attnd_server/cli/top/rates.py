"""What happens a second, and how long calls take: the difference of two answers of GetStatus."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from attnd.v1 import status_pb2

PHASES = ("queue", "copy_in", "kernel", "copy_out")
# Answers over which the times of calls are taken: one call of 16 is timed, and in one second may be none.
KEPT_ANSWERS = 10


class Quantiles(NamedTuple):
    """Microseconds within which half of the calls, and 99 of 100, were done with a phase."""

    p50: float
    p99: float


class Row(NamedTuple):
    """A principal or a session, with what it was served a second.

    Attributes:
        told: what the server says of it.
        steps: a second.
        tokens: a second.
        calls: a second.
        times: by phase, of the last calls; a phase of which nothing is known is left out.
    """

    told: Any
    steps: float
    tokens: float
    calls: float
    times: dict[str, Quantiles]


class Now(NamedTuple):
    """A server as it is now.

    Attributes:
        told: its last answer.
        principals: as it has them.
        sessions: likewise.
    """

    told: status_pb2.GetStatusResponse
    principals: list[Row]
    sessions: list[Row]


class Answers:
    """The last answers of a server."""

    def __init__(self) -> None:
        """None yet."""
        self._kept: deque[tuple[float, status_pb2.GetStatusResponse]] = deque(maxlen=KEPT_ANSWERS + 1)

    def add(self, asked_at: float, told: status_pb2.GetStatusResponse) -> None:
        """Takes an answer; `asked_at` is a clock's time in seconds. After a restart of the server all begins anew."""
        if self._kept and self._kept[-1][1].epoch != told.epoch:
            self._kept.clear()
        self._kept.append((asked_at, told))

    def now(self) -> Now | None:
        """What is so now; None: nobody has answered."""
        if not self._kept:
            return None
        asked_at, told = self._kept[-1]
        before_at, before = self._kept[-2] if len(self._kept) > 1 else (asked_at, status_pb2.GetStatusResponse())
        # Of one answer alone, what happened since the server began.
        seconds = asked_at - before_at or told.uptime_s
        oldest = self._kept[0][1] if len(self._kept) > 1 else before
        return Now(
            told,
            [
                _row(
                    row,
                    row.served,
                    _of(row.principal, before.principals),
                    _of(row.principal, oldest.principals),
                    seconds,
                )
                for row in told.principals
            ],
            [
                _row(row, row.served, _with(row.id, before.sessions), _with(row.id, oldest.sessions), seconds)
                for row in told.sessions
            ],
        )


def quantiles(counts: Sequence[int]) -> Quantiles | None:
    """Those of a histogram of `PhaseTimes`, each as the bucket's upper end; None: it is empty."""
    total = sum(counts)
    if total <= 0:
        return None
    return Quantiles(_quantile(counts, total * 0.50), _quantile(counts, total * 0.99))


def _quantile(counts: Sequence[int], rank: float) -> float:
    seen = 0
    for digits, count in enumerate(counts):
        seen += count
        if count and seen >= rank:
            return float(1 << digits) if digits else 0.0
    return float(1 << len(counts))


def _of(principal: str, rows: Iterable[status_pb2.PrincipalStatus]) -> status_pb2.ServedCounts:
    return next((row.served for row in rows if row.principal == principal), status_pb2.ServedCounts())


def _with(session_id: int, rows: Iterable[status_pb2.SessionStatus]) -> status_pb2.ServedCounts:
    return next((row.served for row in rows if row.id == session_id), status_pb2.ServedCounts())


def _row(
    told: Any,
    served: status_pb2.ServedCounts,
    before: status_pb2.ServedCounts,
    oldest: status_pb2.ServedCounts,
    seconds: float,
) -> Row:
    def per_s(count: int, count_before: int) -> float:
        return max(0, count - count_before) / max(seconds, 1e-3)

    times = {}
    for phase in PHASES:
        counts, earlier = list(getattr(served.times, phase)), list(getattr(oldest.times, phase))
        recent = [count - (earlier[index] if index < len(earlier) else 0) for index, count in enumerate(counts)]
        found = quantiles(recent) or quantiles(counts)  # of no call lately, those before
        if found is not None:
            times[phase] = found
    return Row(
        told,
        per_s(served.steps, before.steps),
        per_s(served.tokens, before.tokens),
        per_s(served.calls, before.calls),
        times,
    )
