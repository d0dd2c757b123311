"""What a session needs of its cache."""

from __future__ import annotations

from typing import Any, Protocol

from attnd.aio.open_stream import AsyncOpenedStream
from attnd.aio.transport import AsyncTransport
from attnd.planes.choice import PlaneOptions
from attnd.protocol.features import MissingFeatures
from attnd.v1 import cache_pb2


class AsyncLease(Protocol):
    """A lease on KV memory that steps can run on: an `attnd.aio.AsyncCache`.

    Attributes:
        ref: id and epoch, as requests carry them.
        config: geometry, as created.
        timeout_s: deadline of each request, in seconds.
        default_plane: of sessions that ask for none.
        missing: what the server lacks that steps may say; None: nothing.
    """

    ref: cache_pb2.CacheRef
    config: cache_pb2.CacheConfig
    timeout_s: float
    default_plane: PlaneOptions
    missing: MissingFeatures | None

    @property
    def transport(self) -> AsyncTransport:
        """The client's connection."""

    async def open_stream(self, wanted: PlaneOptions, timeout_s: float) -> AsyncOpenedStream:
        """A stream for a session."""

    async def warm_up(self, *, num_heads: int, max_reqs: int, query_len: int = 1, options: Any = ...) -> Any:
        """Has the server make decode steps of one shape ready."""
