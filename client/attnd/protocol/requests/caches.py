"""Requests about a cache as a whole, and what their responses say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attnd.errors import InvalidRequest, Unsupported
from attnd.protocol import frames
from attnd.protocol.packing import int32_tensor, ints, uint32
from attnd.v1 import cache_pb2

CACHE_ID_BYTES = 16


def cache_id(value: bytes | str) -> bytes:
    """A cache's id, of its bytes or their hexadecimal digits. Raises InvalidRequest."""
    try:
        data = bytes.fromhex(value) if isinstance(value, str) else value
    except ValueError:
        data = b""
    if len(data) != CACHE_ID_BYTES:
        rule = f"must be {CACHE_ID_BYTES} bytes or {2 * CACHE_ID_BYTES} hexadecimal digits"
        raise InvalidRequest(f"cache.id is {value!r}, but {rule}", field="cache.id")
    return data


def open_cache(ref: cache_pb2.CacheRef, epoch: int) -> tuple[str, bytes, Any]:
    """How to find a cache on a server with this epoch: method, request, and the type of its response."""
    if ref.epoch == epoch:
        return "RenewCache", cache_pb2.RenewCacheRequest(cache=ref).SerializeToString(), cache_pb2.RenewCacheResponse
    return "AdoptCache", cache_pb2.AdoptCacheRequest(cache=ref).SerializeToString(), cache_pb2.AdoptCacheResponse


def ask_written_pages(cache: cache_pb2.CacheRef, group: int = 0) -> bytes:
    """The request of RenewCache that also asks which pages of a layer group were written to. Raises InvalidRequest."""
    request = cache_pb2.RenewCacheRequest(cache=cache, with_written_pages=True, group=uint32(group, "group"))
    return request.SerializeToString()


def written_pages(data: bytes) -> list[int]:
    """The pages that RenewCache told of. Raises Unsupported: the server cannot tell."""
    response = frames.parse(cache_pb2.RenewCacheResponse, data, frames.MAX_CACHE_FIELDS)
    if not response.HasField("written_pages"):
        raise Unsupported("the server does not tell which pages were written to: it is of an earlier version")
    return ints(memoryview(response.written_pages.data).cast("i"), "written_pages")


def copy_pages(cache: cache_pb2.CacheRef, sources: Sequence[int], targets: Sequence[int], group: int = 0) -> bytes:
    """The request of CopyPages. Raises InvalidRequest."""
    return cache_pb2.CopyPagesRequest(
        cache=cache,
        source_pages=int32_tensor(sources, "source_pages"),
        target_pages=int32_tensor(targets, "target_pages"),
        group=uint32(group, "group"),
    ).SerializeToString()
