"""The transport over gRPC: bytes to a server and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import grpc

from attnd.credentials import NO_CREDENTIALS, Credentials
from attnd.errors import AttndError, Disconnected
from attnd.planes.channels import WHY_S, open_channel
from attnd.planes.grpc_errors import explained, translate
from attnd.planes.grpc_options import KEEPALIVE_S, grpc_options
from attnd.planes.grpc_stream import GrpcStream
from attnd.planes.retries import retried
from attnd.planes.targets import parse_target
from attnd.planes.transport import Stream

SERVICE = "/attnd.v1.AttentionService/"


class GrpcTransport:
    """A channel to a server."""

    def __init__(
        self, address: str, credentials: Credentials = NO_CREDENTIALS, keepalive_s: float = KEEPALIVE_S
    ) -> None:
        """Connects lazily."""
        self._target = parse_target(address)
        self._address = self._target.shown
        self._credentials = credentials
        self._metadata = credentials.metadata
        self._channel = open_channel(grpc, self._target, credentials, grpc_options(keepalive_s))
        self._unary: dict[str, Any] = {}
        self._attend: Any = self._channel.stream_stream(SERVICE + "Attend")
        self._store_kv: Any = self._channel.stream_stream(SERVICE + "StoreKv")
        self._read_kv: Any = self._channel.unary_stream(SERVICE + "ReadKv")

    def unary(self, method: str, request: bytes, timeout_s: float, wait: bool = False) -> bytes:
        """Calls a unary method."""
        call = self._unary.get(method)
        if call is None:
            call = self._unary[method] = self._channel.unary_unary(SERVICE + method)

        def send(left_s: float) -> bytes:
            try:
                return call(  # type: ignore[no-any-return]
                    request, timeout=left_s, metadata=self._metadata(), wait_for_ready=wait
                )
            except grpc.RpcError as error:
                told = translate(error, self._address, timeout_s if wait else 0)
            raise self._explained(told) if wait else told

        return retried(send, timeout_s, gone=b"" if method == "DeleteCache" else None)

    def _explained(self, told: AttndError) -> AttndError:
        """Adds why there is no connection: a call that waits for one hears nothing of handshakes that fail."""
        if isinstance(told, Disconnected):
            call: Any = self._channel.unary_unary(SERVICE + "GetCapabilities")
            try:
                call(b"", timeout=WHY_S)
            except grpc.RpcError as error:
                return explained(told, error, self._target, self._credentials)
        return told

    def attend(self) -> Stream:
        """Opens an Attend stream."""
        return GrpcStream(self._attend, self._address, self._metadata())

    def store_kv(self, requests: Iterable[bytes], timeout_s: float) -> Iterator[bytes]:
        """Calls StoreKv."""
        return self._responses(self._store_kv(iter(requests), timeout=timeout_s, metadata=self._metadata()))

    def read_kv(self, request: bytes, timeout_s: float) -> Iterator[bytes]:
        """Calls ReadKv."""
        return self._responses(self._read_kv(request, timeout=timeout_s, metadata=self._metadata()))

    def _responses(self, call: Iterator[bytes]) -> Iterator[bytes]:
        try:
            yield from call
        except grpc.RpcError as error:
            raise translate(error, self._address) from None

    def close(self) -> None:
        """Closes the channel; calls under way end."""
        self._channel.close()
