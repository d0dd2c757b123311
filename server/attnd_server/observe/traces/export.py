"""Sends spans to a collector by OTLP, as the variables OTEL_... of the environment say."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from importlib import import_module
from typing import Any

from attnd._version import __version__
from attnd_server.config import ServerConfig

log = logging.getLogger(__name__)

# Seconds between two lines of the log about spans that cannot be sent.
COMPLAINT_PERIOD_S = 60.0
_EXPORTERS = {
    "http/protobuf": "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "grpc": "opentelemetry.exporter.otlp.proto.grpc.trace_exporter",
}


class Exporter:
    """Implements `SpanSink`: a provider of OpenTelemetry's SDK, whose spans go to a collector in the background."""

    def __init__(self, config: ServerConfig) -> None:
        """Connects to nobody yet.

        Raises:
            RuntimeError: the libraries are missing, or the environment asks for what there is not.
        """
        try:
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor

            from attnd_server.observe.traces.spans import SpanWriter

            exporter = _exporter()
        except ModuleNotFoundError as error:
            raise RuntimeError(f"traces is {config.traces}, but {_what_is_missing(error)}") from None
        _complain_seldom()
        self._provider = TracerProvider(resource=_resource(config), shutdown_on_exit=False)
        # It drops spans where the collector is too slow for them; nobody waits.
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._writer = SpanWriter(self._provider)
        self.write = self._writer.write

    def close(self) -> None:
        """Sends off what was written."""
        self._provider.shutdown()


def _exporter() -> Any:
    protocol = next(
        filter(None, map(os.environ.get, ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"))),
        "http/protobuf",
    )
    if protocol not in _EXPORTERS:
        rule = f"must be one of {', '.join(_EXPORTERS)}"
        raise RuntimeError(f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}, but {rule}")
    return import_module(_EXPORTERS[protocol]).OTLPSpanExporter()


def _what_is_missing(error: ModuleNotFoundError) -> str:
    if error.name and error.name.startswith("opentelemetry.exporter.otlp.proto.grpc"):
        return "the package opentelemetry-exporter-otlp-proto-grpc is not installed, which OTEL_..._PROTOCOL asks for"
    return f"{error.name} is not installed, which attnd[otel] brings; in a checkout: pip install '.[otel]'"


def _resource(config: ServerConfig) -> Any:
    """What all spans say of this server, unless OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say otherwise."""
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource

    host = socket.gethostname()
    own = {
        "service.name": "attnd",
        "service.version": __version__,
        "service.instance.id": f"{host}:{config.port or os.getpid()}",
        "host.name": host,
    }
    given = OTELResourceDetector().detect().attributes
    return Resource.create({name: value for name, value in own.items() if name not in given})


class _Complaints(logging.Handler):
    """One line of our own log a minute, whatever the libraries write while the collector is away."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said_at = -COMPLAINT_PERIOD_S
        self._number = 0
        self._counting = threading.Lock()

    def emit(self, record: logging.LogRecord) -> None:
        with self._counting:
            self._number += 1
            now = time.monotonic()
            if now - self._said_at < COMPLAINT_PERIOD_S:
                return
            number, self._number, self._said_at = self._number, 0, now
        log.warning("traces cannot be sent: %s", record.getMessage(), extra={"num_complaints": number})


def _complain_seldom() -> None:
    logger = logging.getLogger("opentelemetry")
    logger.handlers = [kept for kept in logger.handlers if not isinstance(kept, _Complaints)] + [_Complaints()]
    logger.propagate = False
