"""A gRPC server between a client and another server, that writes down each message."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

SERVICE = "attnd.v1.AttentionService"
STATUS = "grpc-status-details-bin"


@dataclass
class Exchange:
    """A request and what was answered to it.

    Attributes:
        rpc: name of the method.
        order: of the request among those of all RPCs.
        stream: counts the RPCs; messages of one stream have the same.
        request: its bytes.
        reply: bytes of the response; None: there was none.
        code: of an RPC that failed, by its name.
        status: of it, the bytes of attnd.v1.Status.
    """

    rpc: str
    order: int
    stream: int
    request: bytes
    reply: bytes | None = None
    code: str = ""
    status: bytes = b""


class Proxy(grpc.GenericRpcHandler):
    """Hands every message on as it is. On the wire, a unary RPC is a stream of one message.

    Attributes:
        exchanges: so far, by the order of their requests.
    """

    def __init__(self) -> None:
        """Goes nowhere yet."""
        self.exchanges: list[Exchange] = []
        self._num_streams = 0
        self._lock = threading.Lock()
        self._channel: Any = None

    def go_to(self, address: str) -> None:
        """RPCs go to the server at `address` from now on."""
        self.close()
        self._channel = grpc.insecure_channel(address)

    def close(self) -> None:
        """Hands nothing on any more."""
        if self._channel is not None:
            self._channel.close()

    def service(self, details: Any) -> Any:
        """gRPC asks here for each RPC."""
        method = details.method

        def forward(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
            yield from self._forward(method, requests, context)

        return grpc.stream_stream_rpc_method_handler(forward)

    def _forward(self, method: str, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        with self._lock:
            self._num_streams += 1
            stream = self._num_streams
        unanswered: list[Exchange] = []

        def recorded() -> Iterator[bytes]:
            try:
                for request in requests:
                    with self._lock:
                        exchange = Exchange(method.rpartition("/")[2], len(self.exchanges), stream, request)
                        self.exchanges.append(exchange)
                        unanswered.append(exchange)
                    yield request
            except grpc.RpcError:
                pass  # the client has gone

        call = self._channel.stream_stream(method)(recorded())
        context.add_callback(call.cancel)
        try:
            for reply in call:
                unanswered.pop(0).reply = reply
                yield reply
        except grpc.RpcError:
            if not context.is_active():
                return  # the client has gone
            metadata = {key: value for key, value in call.trailing_metadata() or () if key == STATUS}
            if unanswered:
                unanswered[0].code, unanswered[0].status = call.code().name, metadata.get(STATUS, b"")
            context.set_trailing_metadata(tuple(metadata.items()))
            context.abort(call.code(), call.details())


@contextmanager
def serving(handler: grpc.GenericRpcHandler) -> Iterator[str]:
    """Serves with `handler`; the address."""
    server = grpc.server(futures.ThreadPoolExecutor(16), handlers=[handler])
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield address
    finally:
        server.stop(0).wait()
