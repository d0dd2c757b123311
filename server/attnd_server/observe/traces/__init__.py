"""Traces of steps that their callers sample: how long each part of each layer took, for OpenTelemetry."""

from attnd_server.observe.traces.record import StepTrace
from attnd_server.observe.traces.traces import SpanSink, Traces

__all__ = ["SpanSink", "StepTrace", "Traces"]
