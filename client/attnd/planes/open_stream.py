"""An Attend stream for a session, over the plane that is wanted or the best that can be had."""

# Generated from attnd/aio/open_stream.py by `make generate`. Not to be edited.

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from attnd.planes.choice import (
    REFUSALS,
    PlaneOptions,
    inline_refusals,
    open_shm_request,
    opened_shm,
    refusals_after,
)
from attnd.planes.transport import Stream, Transport
from attnd.v1 import cache_pb2


class OpenedStream(NamedTuple):
    """What was given.

    Attributes:
        stream: over the plane.
        refusals: by the name of each better plane, why it was not given; empty for a plane that was asked for.
    """

    stream: Stream
    refusals: Mapping[str, str]


def open_stream(
    transport: Transport,
    config: cache_pb2.CacheConfig,
    wanted: PlaneOptions,
    refused: Mapping[str, str],
    timeout_s: float,
) -> OpenedStream:
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
        return OpenedStream(transport.attend(), untried)
    try:
        plane, refusals = opened_shm(transport.unary("OpenPlane", open_shm_request(), timeout_s))
        from attnd.planes.shm.stream import open_shm  # has modules that other systems have not

        return OpenedStream(open_shm(plane, config, wanted.socket_dir, timeout_s), refusals)
    except REFUSALS as error:
        return OpenedStream(transport.attend(), refusals_after(error, wanted, refused))
