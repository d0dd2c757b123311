"""`grpc.health.v1`, which needs no token, without reading what is sent to it.

A probe's request names a service of a few bytes, but gRPC collects a whole message before anybody sees how long it is,
and its limit is one for all methods of a server. So nothing is read here, and every name is answered alike: all
services of this server share one state. A probe is answered whoever else probes, and however much they send.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from attnd_server.rpc.handlers import until_client_goes

SERVICE_NAME = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
# Watches at one time, of everybody: each is a stream that stays open.
MAX_WATCHES = 64


class HealthServicer(grpc.GenericRpcHandler):
    """Says whether the server serves. For one event loop."""

    def __init__(self) -> None:
        """It does not yet."""
        self._answer: bytes = _encoded(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._changed = asyncio.Event()
        self._is_ending = False
        self._num_watches = 0
        self._handlers: dict[str, Any] = {
            f"/{SERVICE_NAME}/Check": grpc.stream_unary_rpc_method_handler(self._check),
            f"/{SERVICE_NAME}/Watch": grpc.stream_stream_rpc_method_handler(self._watch),
        }

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        """The handler of a method, or None if it is not of this service."""
        return self._handlers.get(details.method)

    def set(self, status: health_pb2.HealthCheckResponse.ServingStatus, is_last: bool = False) -> None:
        """Tells those who watch; after the last status their streams end, so that nobody waits for them."""
        self._answer, self._is_ending = _encoded(status), is_last
        self._changed.set()
        self._changed = asyncio.Event()

    async def _check(self, _: AsyncIterator[bytes], context: Any) -> bytes:
        return self._answer

    async def _watch(self, _: AsyncIterator[bytes], context: Any) -> None:
        if self._num_watches >= MAX_WATCHES:
            why = f"{MAX_WATCHES} watches are open, and there may be no more; use Check"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, why)
        self._num_watches += 1
        told = b""
        try:
            while True:
                changed = self._changed
                if self._answer != told:
                    told = self._answer
                    with until_client_goes():
                        await context.write(told)
                elif self._is_ending:
                    return
                else:
                    await changed.wait()
        finally:
            self._num_watches -= 1


def _encoded(status: health_pb2.HealthCheckResponse.ServingStatus) -> bytes:
    answer: bytes = health_pb2.HealthCheckResponse(status=status).SerializeToString()
    return answer
