"""An Attend stream for a session, over the plane that is wanted or the best that can be had."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from attnd.aio.streams import AsyncStream
from attnd.aio.transport import AsyncTransport
from attnd.planes.choice import (
    REFUSALS,
    PlaneOptions,
    inline_refusals,
    open_shm_request,
    opened_shm,
    refusals_after,
)
from attnd.v1 import cache_pb2


class AsyncOpenedStream(NamedTuple):
    """What was given.

    Attributes:
        stream: over the plane.
        refusals: by the name of each better plane, why it was not given; empty for a plane that was asked for.
    """

    stream: AsyncStream
    refusals: Mapping[str, str]


async def open_stream(
    transport: AsyncTransport,
    config: cache_pb2.CacheConfig,
    wanted: PlaneOptions,
    refused: Mapping[str, str],
    timeout_s: float,
) -> AsyncOpenedStream:
    """An Attend stream over the plane that is wanted, or with "auto" over the best that can be had.

    Args:
        transport: to the server.
        config: of the cache whose calls it will carry.
        wanted: what is asked for.
        refused: `plane_refusals` of the server.
        timeout_s: how long the server may take, in seconds.

    Raises:
        Unsupported: the plane cannot be had; the message says why.
        AttndError: the server refused or is away.
    """
    untried = inline_refusals(wanted, refused)
    if untried is not None:
        return AsyncOpenedStream(transport.attend(), untried)
    try:
        plane, refusals = opened_shm(await transport.unary("OpenPlane", open_shm_request(), timeout_s))
        from attnd.aio.shm import open_shm  # has modules that other systems have not

        return AsyncOpenedStream(await open_shm(plane, config, wanted.socket_dir, timeout_s), refusals)
    except REFUSALS as error:
        return AsyncOpenedStream(transport.attend(), refusals_after(error, wanted, refused))
