"""What a soak counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from benchmarks.attackers import ATTACKS
from tests.soak.resources import Resources

# What is done to whom, and how often; those of the server only while it may die. An attack is another principal's.
FAULTS = {
    "client SIGKILL": 45,
    "client SIGTERM": 10,
    "client SIGSTOP": 12,
    "server SIGSTOP": 8,
    "server SIGKILL": 13,
    "server SIGTERM": 12,
    **{f"attack {name}": 1 for name in ATTACKS},
}
KILLS = tuple(name for name in FAULTS if name.endswith(("KILL", "TERM")))


@dataclass
class Result:
    """What came of a soak.

    Attributes:
        faults: how often each was injected.
        recovery_s: by fault, seconds from the kill or the end of the stop or attack until every client had a right
            answer again.
        reconnect_s: of a server's restart, seconds from its first "serves" until then.
        not_recovered: faults after which somebody did not, in time.
        exit_codes: of servers that were told to end.
        before: what a server held at rest, before its clients were killed.
        after: likewise, afterwards.
        rss: `(seconds, MiB)` of that server, in between.
        caches_left: that it still had when every lease had ended.
        server_faults: lines of servers' logs that tell of an internal error.
        totals: sums of the clients' counts.
        seconds: of all of it.
    """

    faults: Counter[str] = field(default_factory=Counter)
    recovery_s: dict[str, list[float]] = field(default_factory=dict)
    reconnect_s: list[float] = field(default_factory=list)
    not_recovered: int = 0
    exit_codes: Counter[int] = field(default_factory=Counter)
    before: Resources | None = None
    after: Resources | None = None
    rss: list[tuple[float, float]] = field(default_factory=list)
    caches_left: int = 0
    server_faults: list[str] = field(default_factory=list)
    totals: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def num_kills(self) -> int:
        """Processes that were killed or told to end."""
        return sum(self.faults[name] for name in KILLS)

    @property
    def num_attacks(self) -> int:
        """Attacks of another principal."""
        return sum(count for name, count in self.faults.items() if name.startswith("attack "))
