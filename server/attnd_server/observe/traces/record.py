"""What is noted of a step that is traced, while it runs. Spans are made of it later, on another thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from attnd_server.device.copy_timer import NO_COPIES, Copies
from attnd_server.execution.step import Step
from attnd_server.observe.traces.parent import Parent

# Calls of one step of which is told; no model has more layers.
MAX_CALLS = 1_024


class TracedCall(NamedTuple):
    """A call that was served, or the calls of a step that came as one message.

    Attributes:
        layer: that it attended; None: all of them.
        ended_ns: when it was done, `time.time_ns`.
        queue_us: how long it waited for the executor, in microseconds.
        kernel_us: how long storing and attending took, planning included.
        copies: what copies took.
        backend: what computed it; "" for calls that only store.
    """

    layer: int | None
    ended_ns: int
    queue_us: int
    kernel_us: int
    copies: Copies
    backend: str


class StepTrace:
    """Implements `execution.step.StepTrace`: a step, from its message until every layer was served or it is dropped.

    Attributes:
        parent: the client's span.
        began_ns: when the message came, `time.time_ns`.
        attributes: of the span, by OpenTelemetry's kind of name.
        plans: when each plan was begun and done, likewise.
        calls: in the order in which they were served.
    """

    __slots__ = ("_done", "_left", "_num_kept", "attributes", "began_ns", "calls", "parent", "plans")

    def __init__(
        self, parent: Parent, steps: Sequence[Step], plane: str, began_ns: int, done: Callable[[StepTrace], None]
    ) -> None:
        """Begins; `done` gets it once, at its end. `steps` has the step for each layer group."""
        self.parent = parent
        self.began_ns = began_ns
        step = steps[0]
        metadata, num_layers = step.metadata, step.cache.shape.num_layers
        self.attributes: dict[str, str | int | bool] = {
            "attnd.plane": plane,
            "attnd.cache": step.cache.name,
            "attnd.step_id": str(step.id),  # numbers of OpenTelemetry have 63 bits
            "attnd.is_decode": metadata.is_decode,
            "attnd.num_reqs": metadata.num_reqs,
            "attnd.num_tokens": metadata.num_tokens,
            "attnd.num_layers": num_layers,
        }
        self.plans: list[tuple[int, int]] = []
        self.calls: list[TracedCall] = []
        self._left = set(range(min(num_layers, MAX_CALLS)))
        self._done: Callable[[StepTrace], None] | None = done
        self._num_kept = len(steps)

    def planned(self, began_ns: int) -> None:
        """A plan for layers with equal options was made."""
        if self._done is not None and len(self.plans) < MAX_CALLS:
            self.plans.append((began_ns, time.time_ns()))

    def call_served(self, layer: int, queue_us: int, kernel_us: int, copies: Copies, backend: str) -> None:
        """A call was served. By whoever has the device: no more than a note."""
        if self._done is None or len(self.calls) >= MAX_CALLS:
            return
        self.calls.append(TracedCall(layer, time.time_ns(), queue_us, kernel_us, copies, backend))
        self._left.discard(layer)
        if not self._left:
            self.end()

    def step_served(self, queue_us: int, step_us: int, backend: str) -> None:
        """The whole step was served, which came as one message."""
        if self._done is not None:
            self.calls.append(TracedCall(None, time.time_ns(), queue_us, step_us, NO_COPIES, backend))
            self.end()

    def dropped(self) -> None:
        """One of its steps is dropped, after which nothing more comes of that layer group."""
        self._num_kept -= 1
        if self._num_kept <= 0:
            self.end()

    def end(self) -> None:
        """Nothing more comes. Again does nothing. Takes no lock: Python may call it anywhere, to free the step."""
        done, self._done = self._done, None
        if done is not None:
            done(self)
