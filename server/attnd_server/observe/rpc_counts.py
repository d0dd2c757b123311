"""Counts RPCs as gRPC's proposal A66 does: started, how long they took, how many bytes went each way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any

import grpc

from attnd_server.observe.counts import Metrics

# A66's name for methods that the server does not have: clients may make up any number of them.
OTHER = "other"

Behaviour = Callable[[Any, Any], Awaitable[Any]]


class RpcCounter(grpc.aio.ServerInterceptor):
    """Counts the RPCs of one service, and those that nobody serves.

    Its messages pass as bytes, and its handlers read them from gRPC's context: `reads_late` makes those of methods with
    one request.
    Health checks and reflection are left alone: they are others' and say nothing about attention.
    """

    def __init__(self, metrics: Metrics, service_name: str) -> None:
        """Counts the RPCs of `service_name` in `metrics`."""
        self._metrics = metrics
        self._prefix = f"{service_name}/"
        self._counted: dict[tuple[str, Any], Any] = {}  # a method has another handler for those who are refused

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """The handler of a method, made to count; None if there is none."""
        handler = await continuation(details)
        method = details.method.lstrip("/")
        if handler is None:
            self._metrics.rpc_started(OTHER)
            self._metrics.rpc_ended(OTHER, grpc.StatusCode.UNIMPLEMENTED.name, 0.0, 0, 0)
            return None
        if not method.startswith(self._prefix):
            return handler
        counted = self._counted.get((method, handler))
        if counted is None:
            counted = self._counted[method, handler] = self._count(method, handler)
        return counted

    def _count(self, method: str, handler: Any) -> Any:
        if handler.stream_unary is not None:
            return grpc.stream_unary_rpc_method_handler(self._stream_unary(method, handler.stream_unary))
        return grpc.stream_stream_rpc_method_handler(self._stream_stream(method, handler.stream_stream))

    def _stream_unary(self, method: str, behaviour: Behaviour) -> Any:
        async def handler(requests: AsyncIterator[bytes], context: Any) -> bytes:
            with _Rpc(self._metrics, method, context) as rpc:
                response: bytes = await behaviour(requests, rpc)
                rpc.sent_bytes = len(response)
                return response

        return handler

    def _stream_stream(self, method: str, behaviour: Behaviour) -> Any:
        async def handler(requests: AsyncIterator[bytes], context: Any) -> None:
            with _Rpc(self._metrics, method, context) as rpc:
                await behaviour(requests, rpc)

        return handler


class _Rpc:
    """One RPC, from its start to its end: gRPC's context as its handler sees it, which notes what is done with it."""

    def __init__(self, metrics: Metrics, method: str, context: Any) -> None:
        self._metrics = metrics
        self._method = method
        self._context = context
        self._aborted: grpc.StatusCode | None = None
        self.received_bytes = self.sent_bytes = 0

    def __enter__(self) -> _Rpc:
        self._metrics.rpc_started(self._method)
        self._started = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = time.perf_counter() - self._started
        self._metrics.rpc_ended(self._method, self._status(error), seconds, self.received_bytes, self.sent_bytes)

    def _status(self, error: BaseException | None) -> str:
        """The name of the status that the client gets: the handler's own, or what gRPC makes of an exception."""
        code = grpc.StatusCode.OK
        if self._aborted is not None:
            code = self._aborted
        elif error is not None:
            cancelled = isinstance(error, asyncio.CancelledError)
            code = grpc.StatusCode.CANCELLED if cancelled else grpc.StatusCode.UNKNOWN
        return code.name

    async def abort(self, code: grpc.StatusCode, *details: Any) -> None:
        """Ends the RPC with an error; gRPC's context does not tell afterwards with which."""
        self._aborted = code
        await self._context.abort(code, *details)

    async def read(self) -> Any:
        """The next message of the stream, as bytes, or gRPC's EOF."""
        message = await self._context.read()
        if message is not grpc.aio.EOF:
            self.received_bytes += len(message)
        return message

    def write(self, message: bytes) -> Awaitable[None]:
        """Sends a message of the stream."""
        self.sent_bytes += len(message)
        written: Awaitable[None] = self._context.write(message)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)
