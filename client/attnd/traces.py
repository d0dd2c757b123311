"""Spans of OpenTelemetry around steps: off until `enable` is called, and then of those alone that are sampled.

    from attnd import traces

    traces.enable()
    with tracer.start_as_current_span("generate"):
        step = session.step(...)  # a span attnd.step below it, and below that the server's

The context goes to the server in the step itself. There spans of the same trace say how long each layer waited, was
planned, computed and copied, if the operator has turned traces on.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from attnd import extras
from attnd._version import __version__
from attnd.v1 import step_pb2

# What users call; the rest is for sessions.
__all__ = ["disable", "enable"]

_SAMPLED = 1
# What makes spans, and of whom; None: nothing does.
tracer: Any = None
provider: Any = None
_NOTHING = nullcontext()


def enable(tracer_provider: Any = None) -> None:
    """Makes a span of each step from now on, in both clients, if its sampler says so. For the whole process.

    Args:
        tracer_provider: that makes them; None: OpenTelemetry's global one.

    Raises:
        ModuleNotFoundError: OpenTelemetry's API is not installed; the message names the extra that brings it.
    """
    global tracer, provider
    try:
        from opentelemetry import trace
    except ModuleNotFoundError as error:
        raise extras.as_missing(error, "traces") from None
    provider = tracer_provider or trace.get_tracer_provider()
    tracer = provider.get_tracer("attnd", __version__)


def disable() -> None:
    """Makes no more spans."""
    global tracer, provider
    tracer = provider = None


class StepSpan:
    """The span of a step, from its message to the answer of its last layer, or until nobody holds the step any more.

    Attributes:
        traceparent: the span, as `Step.traceparent` names it.
    """

    __slots__ = ("_layers", "_noted_ns", "_slowest", "_span", "traceparent")

    def __init__(self, span: Any, layers: Iterable[int]) -> None:
        """Owns `span`, of a step that has calls of `layers`."""
        self._span = span
        context = span.get_span_context()
        self.traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"
        self._layers = set(layers)
        self._slowest = (0.0, -1)
        self._noted_ns = time.time_ns()

    def answered(self, layer: int, seconds: float) -> None:
        """A call was answered, on which the caller has spent so long."""
        if self._span is None:
            return
        self._noted_ns = time.time_ns()
        self._slowest = max(self._slowest, (seconds, layer))
        self._layers.discard(layer)
        if not self._layers:
            self.end()

    @contextmanager
    def of_layer(self, layer: int) -> Iterator[None]:
        """Around a call, whose outcome it notes."""
        started = time.perf_counter()
        try:
            yield
        except BaseException as error:
            self.failed(error)
            raise
        self.answered(layer, time.perf_counter() - started)

    def served(self, queue_us: int, step_us: int) -> None:
        """The whole step was answered, as on a cuda plane."""
        if self._span is not None:
            self._span.set_attributes({"attnd.queue_us": queue_us, "attnd.step_us": step_us})
            self._noted_ns = time.time_ns()
            self._layers.clear()
            self.end()

    def failed(self, error: BaseException) -> None:
        """The step or a call of it failed. It may be sent again."""
        if self._span is not None:
            self._noted_ns = time.time_ns()
            self._span.record_exception(error)
            self._span.set_attribute("error.type", type(error).__name__)

    def end(self) -> None:
        """Nothing more comes. Again does nothing."""
        span, self._span = self._span, None
        if span is None:
            return
        seconds, layer = self._slowest
        if self._layers:
            span.set_attribute("attnd.unanswered_layers", len(self._layers))
        if layer >= 0:
            span.set_attributes({"attnd.slowest_layer": layer, "attnd.slowest_call_us": int(seconds * 1e6)})
        span.end(self._noted_ns)

    def __del__(self) -> None:
        """The step has gone: it was the last, or it failed."""
        self.end()


def begin(message: step_pb2.Step, layers: Iterable[int], plane: str) -> StepSpan | None:
    """The span of a step that is about to be sent, whose message names it; None: it is not sampled, or nothing is.

    Args:
        message: of the step.
        layers: that it has calls of.
        plane: how its tensors travel.
    """
    if tracer is None:
        return None
    span = tracer.start_span("attnd.step", kind=_client_kind(), attributes=_attributes(message, plane))
    if not span.is_recording() or not span.get_span_context().trace_flags & _SAMPLED:
        return None
    began = StepSpan(span, layers)
    message.traceparent = began.traceparent
    return began


def of_request(message: step_pb2.Step, layer: int) -> AbstractContextManager[None]:
    """Around a self-contained request, whose step is about to be sent."""
    span = None if tracer is None else begin(message, [layer], "inline")
    return _NOTHING if span is None else _around(span, layer)


@contextmanager
def _around(span: StepSpan, layer: int) -> Iterator[None]:
    try:
        with span.of_layer(layer):
            yield
    finally:
        span.end()


def _client_kind() -> Any:
    from opentelemetry.trace import SpanKind

    return SpanKind.CLIENT


def _attributes(message: step_pb2.Step, plane: str) -> dict[str, Any]:
    ends = memoryview(message.cu_seqlens_q.data).cast("i")
    return {
        "attnd.plane": plane,
        "attnd.step_id": str(message.id),
        "attnd.is_decode": message.kind == step_pb2.STEP_KIND_DECODE,
        "attnd.num_reqs": max(0, len(ends) - 1),
        "attnd.num_tokens": ends[-1] if len(ends) else 0,
    }
