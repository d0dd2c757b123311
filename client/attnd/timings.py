"""Where the time of a session's calls went."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnd.protocol.requests import Reply

# Calls whose own times are kept, for quantiles.
KEPT_CALLS = 10_000


@dataclass
class Timings:
    """Where the time of a session's calls went; all times in microseconds.

    A call's time is what the caller spent in it, copies of its tensors included: in `attend`, or in `submit` and
    `PendingCall.wait`. What the server did for it between these two counts as the server's time alone, so with several
    calls under way the parts may add up to more than `total_us`.

    Attributes:
        num_steps: steps that were opened.
        num_calls: calls that were answered with a result.
        call_us: time of each of the last 10,000 calls.
        total_us: time of all calls, summed.
        queue_us: time that calls waited for the executor, summed.
        copy_in_us: time to bring q, k and v to the device, summed; 0 where nothing is copied.
        kernel_us: time of store and attention, summed.
        copy_out_us: time to bring output and lse back from the device, summed; 0 where nothing is copied.
        bytes_sent: bytes of all messages to the server; not those that travel in shared memory.
        bytes_received: bytes of all messages from the server; likewise.
        backend: what ran last.
        plane: how tensors travelled.
        resident: resident steps of a cuda plane that were done, of those that were finished.
    """

    num_steps: int = 0
    num_calls: int = 0
    call_us: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT_CALLS))
    total_us: float = 0.0
    queue_us: int = 0
    copy_in_us: int = 0
    kernel_us: int = 0
    copy_out_us: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    backend: str = ""
    plane: str = "inline"
    resident: int = 0

    @property
    def wire_us(self) -> float:
        """What is left of calls, summed: encoding, copies on the host, gRPC or the doorbell, the network."""
        served_us = self.queue_us + self.copy_in_us + self.kernel_us + self.copy_out_us
        return max(0.0, self.total_us - served_us)

    def add(self, reply: Reply, seconds: float) -> None:
        """Counts a call that was answered, and on which the caller spent `seconds`."""
        call_us = seconds * 1e6
        self.num_calls += 1
        self.call_us.append(call_us)
        self.total_us += call_us
        self.queue_us += reply.queue_us
        self.copy_in_us += reply.copy_in_us
        self.kernel_us += reply.kernel_us
        self.copy_out_us += reply.copy_out_us
        self.backend = reply.backend or self.backend


def summed(parts: Iterable[Timings], plane: str) -> Timings:
    """The timings of several sessions together, of which the last one's plane is `plane`."""
    total = Timings(plane=plane)
    for part in parts:
        total.call_us += part.call_us
        total.backend = part.backend or total.backend
        for name in _SUMS:
            setattr(total, name, getattr(total, name) + getattr(part, name))
    return total


_SUMS = (
    "num_steps",
    "num_calls",
    "total_us",
    "queue_us",
    "copy_in_us",
    "kernel_us",
    "copy_out_us",
    "bytes_sent",
    "bytes_received",
    "resident",
)
