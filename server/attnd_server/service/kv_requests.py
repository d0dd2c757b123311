"""Requests about what a cache holds, without attention: StoreKv, ReadKv, CopyPages, RenewCache."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from attnd.errors import Exhausted
from attnd.protocol import frames
from attnd.protocol.packing import tensor
from attnd.protocol.tensors import to_array
from attnd.v1 import attention_pb2, cache_pb2
from attnd_server.attention.kernels.pages import StoredTokens
from attnd_server.config import ServerConfig
from attnd_server.execution.work import Pieces, Work, WorkInPieces, on_cache
from attnd_server.kv.cache import Cache
from attnd_server.kv.caches import CacheTable
from attnd_server.kv.layer_group import LayerGroup
from attnd_server.service import validation

# Bytes of K and V in one chunk of ReadKv.
READ_CHUNK_BYTES = 4 << 20
# Pages of a cache from which it takes milliseconds to look at all, and that are told in one answer.
MANY_PAGES, MAX_TOLD_PAGES = 1 << 20, 1 << 22


class KvRequests:
    """Each method checks all of a request, and returns work for the executor."""

    def __init__(self, config: ServerConfig, caches: CacheTable) -> None:
        """Of `caches`, within the limits of `config`."""
        self._config = config
        self._caches = caches

    def store_kv(self, data: bytes, principal: str) -> Work:
        """One chunk of StoreKv."""
        request = frames.STORE_KV_REQUEST.decode(data, max_header_bytes=self._config.max_header_bytes)
        cache = self._caches.get(request.message.cache, principal)
        group, layer = _place(cache, request.message.layer)
        slots, k, v = validation.store_kv(request.message, request.tensors, group.config)

        def work() -> bytes:
            cache.refuse_if_closed()
            on_device = k.to(cache.device), v.to(cache.device), StoredTokens(slots.to(cache.device))
            group.mark_written(slots)
            group.store(layer, *on_device)
            return attention_pb2.StoreKvResponse(num_slots=len(slots)).SerializeToString()

        return on_cache(cache, work)

    def read_kv(self, data: bytes, principal: str) -> Iterator[Work]:
        """ReadKv: the work of each chunk. Checks everything before the first."""
        request = frames.parse(attention_pb2.ReadKvRequest, data)
        cache = self._caches.get(request.cache, principal)
        group, layer = _place(cache, request.layer)
        config = group.config
        slots = validation.read_kv(request, config)
        dims = config.head_dim + (0 if config.latent else config.head_dim_v)
        per_slot = config.num_kv_heads * dims * config.dtype.itemsize
        chunk = max(1, READ_CHUNK_BYTES // per_slot)
        return (
            on_cache(cache, partial(self._read_chunk, cache, group, layer, slots, first, chunk))
            for first in range(0, len(slots), chunk)
        )

    def _read_chunk(
        self, cache: Cache, group: LayerGroup, layer: int, slots: torch.Tensor, first: int, chunk: int
    ) -> bytes:
        cache.refuse_if_closed()
        k, v = group.read(layer, slots[first : first + chunk].to(cache.device))
        header = attention_pb2.ReadKvResponse(first=first)
        tensors = {"k": to_array(k, "k")}
        if not group.config.latent:
            tensors["v"] = to_array(v, "v")
        return frames.READ_KV_RESPONSE.encode(header, tensors)

    def copy_pages(self, data: bytes, principal: str) -> Work:
        """CopyPages."""
        request = frames.parse(cache_pb2.CopyPagesRequest, data)
        cache = self._caches.get(request.cache, principal)
        group = cache.groups[validation.group(request.group, cache.shape)]
        sources, targets = validation.copy_pages(request, group.config)

        def work() -> Pieces:
            cache.refuse_if_closed()
            for _ in group.copy_pages_in_pieces(sources, targets):
                yield
                cache.refuse_if_closed()
            return cache_pb2.CopyPagesResponse(num_pages=len(sources)).SerializeToString()

        return WorkInPieces(cache.id, principal, work)

    def renew_cache(self, data: bytes, principal: str) -> bytes | Work:
        """RenewCache."""
        request = frames.parse(cache_pb2.RenewCacheRequest, data)
        cache = self._caches.get(request.cache, principal)
        group = cache.groups[validation.group(request.group, cache.shape)]
        if not request.with_written_pages:
            return cache_pb2.RenewCacheResponse(cache=cache.info()).SerializeToString()
        group.settle_written()
        if group.num_pages_written > MAX_TOLD_PAGES:
            use = f"{group.num_pages_written} pages of the cache were written"
            raise Exhausted(f"{use}, but an answer tells at most {MAX_TOLD_PAGES}", field="with_written_pages")

        def work() -> bytes:
            response = cache_pb2.RenewCacheResponse(cache=cache.info())
            pages = to_array(group.written_pages.to(torch.int32), "written_pages")
            response.written_pages.CopyFrom(tensor(pages))
            if len(cache.groups) == 1:
                response.cache.num_pages_written = pages.shape[0]  # of the same moment
            return response.SerializeToString()

        return on_cache(cache, work) if group.config.num_pages > MANY_PAGES else work()


def _place(cache: Cache, layer: int) -> tuple[LayerGroup, int]:
    """The layer group of a layer of the cache, and its index there. Raises InvalidRequest: there is no such layer."""
    group, index = validation.place(layer, cache.shape)
    return cache.groups[group], index
