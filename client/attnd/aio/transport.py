"""The transport over gRPC in asyncio, as `attnd.planes.grpc` is in threads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from functools import partial
from typing import Any

import grpc
import grpc.aio

from attnd import forks
from attnd.aio.homes import Home
from attnd.aio.retries import retried
from attnd.aio.streams import AsyncGrpcStream, AsyncStream
from attnd.credentials import NO_CREDENTIALS, Credentials, metadata_after
from attnd.errors import AttndError, Disconnected, Unauthenticated, ended
from attnd.planes.channels import WHY_S, open_channel
from attnd.planes.grpc import SERVICE
from attnd.planes.grpc_errors import explained, translate
from attnd.planes.grpc_options import KEEPALIVE_S, grpc_options
from attnd.planes.targets import parse_target

# What grpc.aio says of a stream whose message came after the server's refusal and before that was read, whatever it is.
HIDDEN = "Internal error from Core"


class AsyncTransport:
    """A channel to a server, used from one event loop. The methods of `attnd.planes.transport.Transport`, awaited."""

    def __init__(
        self, address: str, credentials: Credentials = NO_CREDENTIALS, keepalive_s: float = KEEPALIVE_S
    ) -> None:
        """Connects lazily."""
        self._home = Home("client")
        self._is_closed = False
        self._target = parse_target(address)
        self._address = self._target.shown
        self._credentials = credentials
        self._metadata = credentials.metadata
        self._channel = open_channel(grpc.aio, self._target, credentials, grpc_options(keepalive_s))

    async def unary(self, method: str, request: bytes, timeout_s: float, wait: bool = False) -> bytes:
        """Calls a unary method."""

        async def send(left_s: float) -> bytes:
            metadata = self._metadata()
            ask = partial(self._ask, method, request, left_s, wait, timeout_s if wait else 0)
            try:
                return await ask(metadata)
            except Unauthenticated:
                renewed = metadata_after(metadata, self._metadata)
                if renewed is None:
                    raise
            return await ask(renewed)

        return await retried(send, timeout_s, gone=b"" if method == "DeleteCache" else None)

    async def _ask(
        self, method: str, request: bytes, timeout_s: float, wait: bool, waited_s: float, metadata: Any
    ) -> bytes:
        """One attempt."""
        self._refuse_if_ended()
        call: Any = self._channel.unary_unary(SERVICE + method)
        try:
            return await call(request, timeout=timeout_s, metadata=metadata, wait_for_ready=wait)  # type: ignore[no-any-return]
        except grpc.RpcError as error:
            told = translate(error, self._address, waited_s)
        except asyncio.CancelledError:
            self._refuse_if_ended()  # cancelled by `close`
            raise
        raise await self._explained(told) if wait else told

    def _refuse_if_ended(self) -> None:
        self._home.check()
        if self._is_closed:
            raise ended("the client was closed; connect again")

    async def _explained(self, told: AttndError) -> AttndError:
        """Adds why there is no connection: a call that waits for one hears nothing of handshakes that fail."""
        if isinstance(told, Disconnected):
            call: Any = self._channel.unary_unary(SERVICE + "GetCapabilities")
            try:
                await call(b"", timeout=WHY_S)
            except grpc.RpcError as error:
                return await asyncio.to_thread(explained, told, error, self._target, self._credentials)
        return told

    async def _told(self, error: grpc.RpcError) -> AttndError:
        """What the error of a stream that is written to is for the caller: what the server says, hidden or not."""
        told = translate(error, self._address)
        if error.details() == HIDDEN:
            try:
                await self._ask("GetCapabilities", b"", WHY_S, False, 0, self._metadata())
            except AttndError as reason:
                return reason
        return told

    def attend(self) -> AsyncStream:
        """Opens an Attend stream."""
        self._refuse_if_ended()
        call: Any = self._channel.stream_stream(SERVICE + "Attend")
        return AsyncGrpcStream(call(metadata=self._metadata()), self._told)

    async def store_kv(self, requests: Iterable[bytes], timeout_s: float) -> AsyncIterator[bytes]:
        """Calls StoreKv."""
        self._refuse_if_ended()
        method: Any = self._channel.stream_stream(SERVICE + "StoreKv")
        call = method(timeout=timeout_s, metadata=self._metadata())
        try:
            for request in requests:
                await call.write(request)
                yield await call.read()
            await call.done_writing()
        except grpc.RpcError as error:
            raise await self._told(error) from None
        finally:
            call.cancel()

    async def read_kv(self, request: bytes, timeout_s: float) -> AsyncIterator[bytes]:
        """Calls ReadKv."""
        self._refuse_if_ended()
        method: Any = self._channel.unary_stream(SERVICE + "ReadKv")
        try:
            async for response in method(request, timeout=timeout_s, metadata=self._metadata()):
                yield response
        except grpc.RpcError as error:
            raise translate(error, self._address) from None

    def may_close(self) -> bool:
        """Whether it is this process that has connected. Raises InvalidRequest in another event loop."""
        if self._home.is_here:
            self._home.check()
            return True
        forks.keep(self._channel)
        return False

    async def close(self) -> None:
        """Closes the channel; calls under way end."""
        self._is_closed = True
        await self._channel.close()
