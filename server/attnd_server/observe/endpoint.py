"""The HTTP server from which Prometheus reads."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.registry import Collector


class MetricsEndpoint:
    """An HTTP server on a thread of its own, for Prometheus to read from.

    Attributes:
        address: "host:port" on which it listens.
    """

    def __init__(self, address: str, collector: Collector) -> None:
        """Listens on "host:port"; port 0 lets the system pick.

        Raises:
            RuntimeError: nothing can listen there; the port is taken, for example.
        """
        registry = CollectorRegistry()
        registry.register(collector)
        ProcessCollector(registry=registry)
        host, _, port = address.rpartition(":")
        try:
            self._server, self._thread = start_http_server(int(port), host.strip("[]"), registry)
        except OSError as error:
            raise RuntimeError(
                f"metrics is {address}, but must be an address to listen on: {error.strerror}"
            ) from error
        self.address = f"{host}:{self._server.server_port}"

    def close(self) -> None:
        """Closes the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
