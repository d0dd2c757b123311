"""Spans where a test can look at them: of this process in memory, and of a server as a collector gets them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, Sampler

from attnd import traces


class Span(NamedTuple):
    """What tests ask of a span, whoever has made it; ids are hexadecimal digits."""

    name: str
    trace_id: str
    id: str
    parent_id: str
    began_ns: int
    ended_ns: int
    attributes: dict[str, Any]


class Memory:
    """A provider whose spans stay in this process."""

    def __init__(self, sampler: Sampler = ALWAYS_ON) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("a test")

    def spans(self, name: str = "") -> list[Span]:
        return [
            Span(
                each.name,
                f"{each.context.trace_id:032x}",
                f"{each.context.span_id:016x}",
                f"{each.parent.span_id:016x}" if each.parent else "",
                each.start_time or 0,
                each.end_time or 0,
                dict(each.attributes or {}),
            )
            for each in self.exporter.get_finished_spans()
            if each.name == name or not name
        ]


@contextmanager
def traced(sampler: Sampler = ALWAYS_ON) -> Iterator[Memory]:
    """Lets the clients of this process make spans."""
    memory = Memory(sampler)
    traces.enable(memory.provider)
    try:
        yield memory
    finally:
        traces.disable()


class Collector:
    """Takes spans over OTLP, as HTTP.

    Attributes:
        endpoint: its URL.
        resources: what the senders of spans say of themselves.
    """

    def __init__(self) -> None:
        self.resources: list[dict[str, Any]] = []
        self._spans: list[Span] = []
        self._taking = threading.Lock()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                collector.take(trace_service_pb2.ExportTraceServiceRequest.FromString(data))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def take(self, request: Any) -> None:
        with self._taking:
            for resource in request.resource_spans:
                self.resources.append(_values(resource.resource.attributes))
                for scope in resource.scope_spans:
                    self._spans += map(_span, scope.spans)

    def spans(self, name: str = "") -> list[Span]:
        with self._taking:
            return [span for span in self._spans if span.name == name or not name]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _span(message: Any) -> Span:
    return Span(
        message.name,
        message.trace_id.hex(),
        message.span_id.hex(),
        message.parent_span_id.hex(),
        message.start_time_unix_nano,
        message.end_time_unix_nano,
        _values(message.attributes),
    )


def _values(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}
