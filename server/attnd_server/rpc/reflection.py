"""`grpc.reflection.v1alpha`, which needs no token: few streams, few reads at a time, each with a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from attnd.errors import Exhausted, InvalidRequest
from attnd.protocol import frames
from attnd_server.rpc.arrivals import NOBODY, Arrivals
from attnd_server.rpc.handlers import until_client_goes

SERVICE_NAME = reflection.SERVICE_NAME
# Streams at one time, and of them those of which a message is being read: gRPC collects it whole.
MAX_STREAMS, MAX_READS = 16, 1
# Seconds in which a message must have come, once it is read, and seconds that it may wait for that.
READ_S, WAIT_S = 3.0, 10.0
# Bytes of a request: a name.
MAX_REQUEST_BYTES = 4 << 10


class ReflectionServicer(grpc.GenericRpcHandler):
    """Tells the contract of services. For one event loop."""

    def __init__(self, service_names: tuple[str, ...], arrivals: Arrivals) -> None:
        """Of services with these names; what comes of its messages counts in `arrivals`."""
        self._arrivals = arrivals
        self._reflection = reflection.aio.ReflectionServicer(service_names)
        self._num_streams = 0
        self._reads = asyncio.Semaphore(MAX_READS)
        self._method = f"/{SERVICE_NAME}/ServerReflectionInfo"
        self._handler: Any = grpc.stream_stream_rpc_method_handler(self._info)

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        """The handler of its method, or None if it is another."""
        return self._handler if details.method == self._method else None

    async def _info(self, _: AsyncIterator[bytes], context: Any) -> None:
        if self._num_streams >= MAX_STREAMS:
            told = f"{MAX_STREAMS} streams of reflection are open, and there may be no more; come again"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, told)
        self._num_streams += 1
        try:
            while (data := await self._read(context)) is not None:
                if len(data) > MAX_REQUEST_BYTES:
                    raise InvalidRequest(f"message has {len(data)} bytes, but must have at most {MAX_REQUEST_BYTES}")
                request = frames.parse(reflection_pb2.ServerReflectionRequest, data)
                async for answer in self._reflection.ServerReflectionInfo(_one(request), None):
                    with until_client_goes():
                        await context.write(answer.SerializeToString())
        except (InvalidRequest, Exhausted) as error:
            await context.abort(error.code, str(error))
        except asyncio.TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"no whole message came within {READ_S:g} s")
        finally:
            self._num_streams -= 1

    async def _read(self, context: Any) -> bytes | None:
        """The next message, or None at the end."""
        await asyncio.wait_for(self._reads.acquire(), WAIT_S)
        try:
            data: Any = await asyncio.wait_for(self._message(context), READ_S)
        finally:
            self._reads.release()
        return None if data is grpc.aio.EOF else data

    async def _message(self, context: Any) -> Any:
        with self._arrivals.reading(context, NOBODY) as reader:
            return await reader.read(context)


async def _one(request: reflection_pb2.ServerReflectionRequest) -> AsyncIterator[Any]:
    yield request
