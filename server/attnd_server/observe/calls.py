"""What sees each call that ran: counts, and verification of a sample."""

from __future__ import annotations

from collections.abc import Sequence

from attnd_server.execution.joined.repeat import Repeat, Repeated
from attnd_server.execution.step import Call, Result
from attnd_server.observe.counts import Metrics
from attnd_server.observe.verify import Verifier


class CallObserver:
    """Implements `Observer` of the executor."""

    def __init__(self, metrics: Metrics | None, verifier: Verifier | None) -> None:
        """Counts in `metrics`, and lets `verifier` take a sample; None: does not."""
        self._metrics = metrics
        self._verifier = verifier

    def begins(self, call: Call) -> Call:
        """The call itself, or one that verification will look at, whose tensors nobody else writes to."""
        if self._verifier is None or not self._verifier.is_due():
            return call
        return self._verifier.sampled(call)

    def launched(self, num_calls: int) -> None:
        """A launch had so many calls."""
        if self._metrics is not None:
            self._metrics.launched(num_calls)

    def served(self, call: Call, result: Result, queue_us: int, kernel_us: int) -> None:
        """A call has run. Raises ServerFault: verification withholds its output."""
        if self._metrics is not None:
            self._metrics.call_served(call.plane, call, result, queue_us, kernel_us)
        if self._verifier is not None and call.is_sampled:
            self._verifier.take(call, result)

    def takes_one_of(self, num_calls: int) -> bool:
        """Whether verification will look at one of the next calls, so many; if not, it has passed them over."""
        return self._verifier is not None and not self._verifier.passes_over(num_calls)

    def served_alike(self, repeats: Sequence[Repeat], result: Repeated) -> None:
        """Calls that differ in little have run in one launch."""
        if self._metrics is not None:
            self._metrics.launched(len(repeats))
            self._metrics.calls_served(repeats[0].of.call.plane, repeats, result)
