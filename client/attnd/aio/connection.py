"""A connection to a server: what a client and its caches share."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import Any, TypeVar

from attnd.aio.choice import check_plane
from attnd.aio.renewal import AsyncRenewal
from attnd.aio.retries import until_answered
from attnd.aio.transport import AsyncTransport
from attnd.planes.choice import PlaneOptions, plane_refusals
from attnd.planes.grpc_options import checked_seconds
from attnd.protocol import frames
from attnd.protocol.features import MissingFeatures, missing_features
from attnd.v1 import capabilities_pb2, status_pb2

Self = TypeVar("Self", bound="AsyncConnection")


class AsyncConnection:
    """A connection to one server, and what is known of it.

    Attributes:
        transport: to the server.
        timeout_s: deadline of each request, in seconds.
        plane: how the tensors of a session's calls travel, unless the session says otherwise.
        renewal: what renews the leases of the caches.
        caches: those that somebody has, by their `id`.
        missing: what the server lacked when it was last asked; None: nothing.
    """

    def __init__(
        self,
        transport: AsyncTransport,
        *,
        timeout_s: float = 30.0,
        connect_timeout_s: float = 10.0,
        plane: str = "auto",
        socket_dir: str = "",
    ) -> None:
        """Owns `transport`; asks the server nothing yet. Other arguments as those of `connect`."""
        self.transport = transport
        self.timeout_s = checked_seconds(timeout_s, "timeout_s")
        self.plane = PlaneOptions(check_plane(plane), socket_dir)
        self.renewal = AsyncRenewal()
        self.caches: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._connect_timeout_s = checked_seconds(connect_timeout_s, "connect_timeout_s")
        self._epoch = 0
        self._refusals: Mapping[str, str] | None = None
        self.missing: MissingFeatures | None = None

    @property
    def epoch(self) -> int:
        """The server's epoch when it was last asked."""
        return self._epoch

    async def capabilities(self) -> capabilities_pb2.GetCapabilitiesResponse:
        """What the server is and can do; waits for a server that restarts.

        Raises:
            Disconnected: the server is away for longer than the connection timeout.
        """
        data = await self.wait_for_answer("GetCapabilities", b"")
        message: capabilities_pb2.GetCapabilitiesResponse = frames.parse(capabilities_pb2.GetCapabilitiesResponse, data)
        self._epoch = message.epoch
        self._refusals = plane_refusals(message)
        self.missing = missing_features(message)
        return message

    async def status(self) -> status_pb2.GetStatusResponse:
        """What the server does now: one's own sessions and caches, and everybody's if one is an operator of it."""
        data = await self.transport.unary("GetStatus", b"", self.timeout_s)
        message: status_pb2.GetStatusResponse = frames.parse(status_pb2.GetStatusResponse, data)
        return message

    @property
    def refusals(self) -> Mapping[str, str]:
        """By the name of each better plane than inline, why the server does not give it; empty before it was asked."""
        return self._refusals or {}

    async def known_refusals(self) -> Mapping[str, str]:
        """`refusals`, of a server that was asked."""
        if self._refusals is None:
            await self.capabilities()
        return self.refusals

    async def missing_in(self, epoch: int) -> MissingFeatures | None:
        """What the server lacks in its life of this epoch; None: nothing. Asks it, if it was another that was asked."""
        if epoch != self._epoch:
            await self.capabilities()
        return self.missing

    async def wait_for_answer(self, method: str, request: bytes) -> bytes:
        """Calls a unary method that may be sent twice; waits for a server that restarts, and not for one that ends.

        Raises:
            Disconnected: the server is away for longer than the connection timeout.
        """
        return await until_answered(
            lambda left_s: self.transport.unary(method, request, left_s, wait=True), self._connect_timeout_s
        )

    async def close(self) -> None:
        """Ends the connection and its sessions. Caches stay until their lease ends; delete them first to free them now.

        In a process that was forked from the one that connected it does nothing: the connection is the parent's.
        """
        if not self.transport.may_close():
            return
        self.renewal.close()
        for reference in self.caches.valuerefs():
            cache = reference()
            if cache is not None:
                await cache.close_sessions()
        await self.transport.close()

    async def __aenter__(self: Self) -> Self:
        """The client itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes."""
        await self.close()
