"""The port from which Prometheus reads."""

from __future__ import annotations

import socket

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
from prometheus_client.registry import Collector

from attnd_server.observe.http_messages import METHODS, HttpRequest, answer_bytes
from attnd_server.observe.http_server import HttpServer

# Connections that wait to be accepted.
_BACKLOG = 64


class MetricsEndpoint:
    """Every path has the metrics, as with the library's own server, but for a browser's icon.

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
        self._app = make_wsgi_app(registry)
        host, _, port = address.rpartition(":")
        try:
            listener = _listener(host.strip("[]"), int(port))
        except OSError as error:
            raise RuntimeError(
                f"metrics is {address}, but must be an address to listen on: {error.strerror}"
            ) from error
        self.address = f"{host}:{listener.getsockname()[1]}"
        self._server = HttpServer(listener, self._answer)

    def close(self) -> None:
        """Closes the port."""
        self._server.close()

    def _answer(self, request: HttpRequest) -> bytes:
        if request.method == "OPTIONS":
            return answer_bytes("200 OK", [("Allow", ", ".join(METHODS))], b"", keeps_open=request.keeps_open)
        told: list[tuple[str, list[tuple[str, str]]]] = []
        environment = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": request.path,
            "QUERY_STRING": request.query,
            "HTTP_ACCEPT": request.headers.get("accept", ""),
            "HTTP_ACCEPT_ENCODING": request.headers.get("accept-encoding", ""),
        }
        body = b"".join(self._app(environment, lambda status, headers: told.append((status, headers))))
        ((status, headers),) = told
        return answer_bytes(status, headers, body, is_head=request.method == "HEAD", keeps_open=request.keeps_open)


def _listener(host: str, port: int) -> socket.socket:
    """Listens at the first address of a host. Raises OSError."""
    flags = socket.AI_PASSIVE
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener
