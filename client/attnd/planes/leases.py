"""What a session needs of its cache."""

# Generated from attnd/aio/leases.py by `make generate`. Not to be edited.

from __future__ import annotations

from typing import Any, Protocol

from attnd.planes.choice import PlaneOptions
from attnd.planes.open_stream import OpenedStream
from attnd.planes.transport import Transport
from attnd.protocol.features import MissingFeatures
from attnd.v1 import cache_pb2


class Lease(Protocol):
    """A lease on KV memory that steps can run on: an `attnd.Cache`.

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
    def transport(self) -> Transport:
        """The client's connection."""

    def open_stream(self, wanted: PlaneOptions, timeout_s: float) -> OpenedStream:
        """A stream for a session."""

    def warm_up(self, *, num_heads: int, max_reqs: int, query_len: int = 1, options: Any = ...) -> Any:
        """Has the server make decode steps of one shape ready."""
