"""Tallies: the numbers of one plane and backend, and of one method and status."""

from __future__ import annotations

from attnd_server.attention.config import AttentionBackend
from attnd_server.observe.histogram import Histogram

# Upper bounds of the buckets of a phase, in microseconds: up to 8 seconds.
PHASE_BOUNDS_US = tuple(2**exponent for exponent in range(24))
# Of an RPC, in seconds and bytes: what gRPC's proposal A66 names.
SECONDS_BOUNDS = (
    *(0.0, 0.00001, 0.00005, 0.0001, 0.0003, 0.0006, 0.0008, 0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008),
    *(0.01, 0.013, 0.016, 0.02, 0.025, 0.03, 0.04, 0.05, 0.065, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5),
    *(0.65, 0.8, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0),
)
BYTES_BOUNDS = (0, 1024, 2048, *(4**exponent for exponent in range(6, 17)))


class PhaseHistogram(Histogram):
    """Times of one phase of calls, in whole microseconds, rounded down."""

    __slots__ = ()

    def __init__(self) -> None:
        """Starts empty."""
        super().__init__(PHASE_BOUNDS_US)

    def observe(self, value: int, times: int = 1) -> None:  # type: ignore[override]  # whole numbers only
        """Adds a time, so many times. What was rounded down to fewer than n + 1 bits is shorter than 2**n."""
        self.counts[min(value.bit_length(), len(PHASE_BOUNDS_US))] += times
        self.sum += value * times


class CallTally:
    """Calls of one plane and backend.

    Attributes:
        plane: how their tensors came.
        backend: what computed them; None: they only store.
        queue_us: how long each waited for the executor, in microseconds.
        kernel_us: how long storing and attending took, copies between host and device included, in microseconds.
        received_bytes: of q, k and v.
        sent_bytes: of output and lse.
    """

    __slots__ = (
        "backend",
        "copy_in_us",
        "copy_out_us",
        "kernel_us",
        "plane",
        "queue_us",
        "received_bytes",
        "sent_bytes",
    )

    def __init__(self, plane: str, backend: AttentionBackend | None) -> None:
        """Starts empty."""
        self.plane = plane
        self.backend = backend
        self.queue_us = PhaseHistogram()
        self.copy_in_us = PhaseHistogram()
        self.kernel_us = PhaseHistogram()
        self.copy_out_us = PhaseHistogram()
        self.received_bytes = 0
        self.sent_bytes = 0


class RpcTally:
    """RPCs of one method that ended with one status.

    Attributes:
        seconds: how long each took; a stream's is its whole life.
        received_bytes: of all request messages of each.
        sent_bytes: of all response messages of each.
    """

    __slots__ = ("received_bytes", "seconds", "sent_bytes")

    def __init__(self) -> None:
        """Starts empty."""
        self.seconds = Histogram(SECONDS_BOUNDS)
        self.received_bytes = Histogram(BYTES_BOUNDS)
        self.sent_bytes = Histogram(BYTES_BOUNDS)
