"""Spans of a step for OpenTelemetry's API, whatever then becomes of them.

attnd.step                 from the step's message until its last call was served
  attnd.plan               choosing a backend and preparing its launches
  attnd.call               one layer, from its message on; on a cuda plane all of them
    attnd.queue            waiting for the executor
    attnd.copy_in, attnd.kernel, attnd.copy_out
"""

from __future__ import annotations

from typing import Any

from opentelemetry import trace as api

from attnd._version import __version__
from attnd_server.observe.traces.record import StepTrace, TracedCall

NS_PER_US = 1_000


class SpanWriter:
    """Implements `SpanSink` with a provider of the API's kind, which it does not end."""

    def __init__(self, provider: api.TracerProvider) -> None:
        """Writes to `provider`."""
        self._tracer = provider.get_tracer("attnd_server", __version__)

    def write(self, trace: StepTrace) -> None:
        """Makes the spans of a step."""
        flags = api.TraceFlags(api.TraceFlags.SAMPLED)
        parent = api.SpanContext(trace.parent.trace_id, trace.parent.span_id, is_remote=True, trace_flags=flags)
        context = api.set_span_in_context(api.NonRecordingSpan(parent))
        ends = [trace.began_ns, *(ended for _, ended in trace.plans), *(call.ended_ns for call in trace.calls)]
        attributes = {**trace.attributes, "attnd.num_calls": len(trace.calls)}
        span = self._span("attnd.step", context, trace.began_ns, attributes, api.SpanKind.SERVER)
        inside = api.set_span_in_context(span)
        for began, ended in trace.plans:
            self._span("attnd.plan", inside, began).end(ended)
        for call in trace.calls:
            self._write_call(call, inside)
        span.end(max(ends))

    def close(self) -> None:
        """Nothing: the spans are their owner's."""

    def _write_call(self, call: TracedCall, context: Any) -> None:
        phases = {
            "queue": call.queue_us,
            "copy_in": call.copies.in_us,
            "kernel": call.kernel_us,
            "copy_out": call.copies.out_us,
        }
        began = call.ended_ns - sum(phases.values()) * NS_PER_US
        attributes: dict[str, Any] = {f"attnd.{phase}_us": value for phase, value in phases.items()}
        if call.layer is not None:
            attributes["attnd.layer"] = call.layer
        if call.backend:
            attributes["attnd.backend"] = call.backend
        span = self._span("attnd.call", context, began, attributes)
        inside = api.set_span_in_context(span)
        for phase, value in phases.items():
            if value:
                ended = began + value * NS_PER_US
                self._span(f"attnd.{phase}", inside, began).end(ended)
                began = ended
        span.end(call.ended_ns)

    def _span(
        self,
        name: str,
        context: Any,
        began_ns: int,
        attributes: dict[str, Any] | None = None,
        kind: api.SpanKind = api.SpanKind.INTERNAL,
    ) -> api.Span:
        return self._tracer.start_span(name, context, kind, attributes, start_time=began_ns)
