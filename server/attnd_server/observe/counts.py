"""What a server counts about itself, in plain numbers.

Counting is in the path of every call, and its data is out of the processor's cache by the next one: so there are no
locks, no text and no searches in it, just a few additions. Whoever is asked for the numbers turns them into what a
monitoring system reads (see `prometheus`). No number knows whose call it was.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from attnd import errors
from attnd_server.attention.config import AttentionBackend
from attnd_server.observe.histogram import Histogram
from attnd_server.observe.tallies import CallTally, RpcTally

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from attnd_server.execution.joined.repeat import Repeat, Repeated
    from attnd_server.execution.step import Call, Result

# Of the calls of a launch.
CALLS_BOUNDS = (1, 2, 4, 8, 16, 32, 64)

_REASONS = (
    errors.InvalidRequest,
    errors.Unsupported,
    errors.CacheLost,
    errors.EpochMismatch,
    errors.Exhausted,
    errors.PermissionDenied,
    errors.Unauthenticated,
    errors.DeadlineExceeded,
    errors.Disconnected,
    errors.ServerFault,
)


def _num_bytes(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.nbytes


class Metrics:
    """All that a server counts. Any thread may read.

    Attributes:
        calls: by plane and `id` of the backend, which takes a tenth of the time of an enumeration's hash.
        launches: calls of each launch.
        refusals: errors that clients were told, by class.
        rpcs_started: by method.
        rpcs: those that ended, by method and name of the status.
    """

    def __init__(self) -> None:
        """Starts with nothing counted."""
        self.calls: dict[tuple[str, int], CallTally] = {}
        self.launches = Histogram(CALLS_BOUNDS)
        self.refusals: dict[type[errors.AttndError], int] = dict.fromkeys(_REASONS, 0)
        self._refusing = threading.Lock()
        self._counting_steps = threading.Lock()
        self.rpcs_started: dict[str, int] = {}
        self.rpcs: dict[tuple[str, str], RpcTally] = {}

    def call_served(self, plane: str, call: Call, result: Result, queue_us: int, kernel_us: int) -> None:
        """Counts a call that was served. By the thread that has the device.

        Args:
            plane: how its tensors came: "inline".
            call: with its tensors.
            result: likewise, and what copies took.
            queue_us: how long it waited for the executor, in microseconds.
            kernel_us: how long storing and attending took, in microseconds; of all calls of its launch.
        """
        tally = self._tally(plane, result.backend)
        tally.queue_us.observe(queue_us)
        tally.copy_in_us.observe(result.copies.in_us)
        tally.kernel_us.observe(kernel_us)
        tally.copy_out_us.observe(result.copies.out_us)
        tally.received_bytes += _num_bytes(call.q) + _num_bytes(call.k) + _num_bytes(call.v)
        tally.sent_bytes += _num_bytes(result.output) + _num_bytes(result.lse)

    def calls_served(self, plane: str, repeats: Sequence[Repeat], result: Repeated) -> None:
        """As `call_served`, of calls that ran in one launch and had not waited. By the thread that has the device."""
        tally, num_calls = self._tally(plane, result.backend), len(repeats)
        tally.queue_us.observe(0, num_calls)
        tally.copy_in_us.observe(result.copies.in_us, num_calls)
        tally.kernel_us.observe(result.kernel_us, num_calls)
        tally.copy_out_us.observe(result.copies.out_us, num_calls)
        tally.received_bytes += sum(each.of.received_bytes for each in repeats)
        tally.sent_bytes += sum(each.of.sent_bytes for each in repeats)

    def step_served(
        self,
        plane: str,
        backend: AttentionBackend | None,
        num_calls: int,
        num_bytes: tuple[int, int],
        queue_us: int,
        step_us: int,
    ) -> None:
        """Counts the calls of a step that came as one message, on a plane where no call comes alone. By any thread.

        Args:
            plane: how its tensors came: "cuda".
            backend: what computed them; None: they only store.
            num_calls: layers of the step.
            num_bytes: of q, k and v of all of them, and of all output and lse.
            queue_us: how long the step waited for the executor, in microseconds: its first call did, the others not.
            step_us: how long it took, in microseconds, what the worker did between its layers included: of each call
                an equal part.
        """
        with self._counting_steps:
            tally = self._tally(plane, backend)
            tally.queue_us.observe(queue_us)
            tally.queue_us.observe(0, num_calls - 1)
            tally.kernel_us.observe(step_us // num_calls, num_calls)
            tally.copy_in_us.observe(0, num_calls)
            tally.copy_out_us.observe(0, num_calls)
            tally.received_bytes += num_bytes[0]
            tally.sent_bytes += num_bytes[1]

    def _tally(self, plane: str, backend: AttentionBackend | None) -> CallTally:
        key = plane, id(backend)
        tally = self.calls.get(key)
        if tally is None:
            tally = self.calls[key] = CallTally(plane, backend)
        return tally

    def launched(self, num_calls: int) -> None:
        """Counts a launch of so many calls. By the thread that has the device."""
        self.launches.observe(num_calls)

    def refused(self, error: errors.AttndError) -> None:
        """Counts an error that a client is told. By any thread."""
        kind = type(error)
        with self._refusing:
            self.refusals[kind] = self.refusals.get(kind, 0) + 1

    def rpc_started(self, method: str) -> None:
        """Counts an RPC that begins. In the event loop."""
        self.rpcs_started[method] = self.rpcs_started.get(method, 0) + 1

    def rpc_ended(self, method: str, status: str, seconds: float, received_bytes: int, sent_bytes: int) -> None:
        """Counts an RPC that ends. In the event loop."""
        tally = self.rpcs.get((method, status))
        if tally is None:
            tally = self.rpcs[method, status] = RpcTally()
        tally.seconds.observe(seconds)
        tally.received_bytes.observe(received_bytes)
        tally.sent_bytes.observe(sent_bytes)
