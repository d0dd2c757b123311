"""A cache in asyncio: a lease on KV memory, and what can be done with it."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from attnd.aio.connection import AsyncConnection
from attnd.aio.open_stream import AsyncOpenedStream, open_stream
from attnd.aio.sessions import AsyncSessions
from attnd.aio.transport import AsyncTransport
from attnd.errors import CacheLost, Disconnected
from attnd.planes.choice import PlaneOptions
from attnd.planes.grpc_options import checked_seconds
from attnd.protocol import frames, requests
from attnd.protocol.attention_options import AttentionOptions
from attnd.protocol.features import MissingFeatures
from attnd.protocol.head_dims import head_dim_v_of
from attnd.protocol.requests import DEFAULT_OPTIONS, WarmUp
from attnd.v1 import cache_pb2


class AsyncCache(AsyncSessions):
    """A lease on KV memory. Made by `Client.create_cache`; as a context manager it deletes itself.

    Attributes:
        ref: id and epoch, as requests carry them.
        config: geometry, as created.
    """

    def __init__(
        self,
        client: AsyncConnection,
        info: cache_pb2.CacheInfo,
        renew: bool = True,
        missing: MissingFeatures | None = None,
    ) -> None:
        """Wraps what CreateCache answered.

        Args:
            client: that asked.
            info: the answer.
            renew: whether the client renews the lease by itself.
            missing: what the server lacks that steps may say; None: nothing.
        """
        self.ref = info.cache
        self.config = info.config
        self.missing = missing
        self.ttl_s = info.ttl_s
        self.timeout_s = client.timeout_s
        self.default_plane = client.plane
        self._client = client
        self._renew = renew
        super().__init__()
        client.caches[id(self)] = self
        if renew:
            client.renewal.add(self)

    @property
    def transport(self) -> AsyncTransport:
        """The client's connection."""
        return self._client.transport

    async def open_stream(self, wanted: PlaneOptions, timeout_s: float) -> AsyncOpenedStream:
        """A stream for a session."""
        refused = await self._client.known_refusals()
        return await open_stream(self.transport, self.config, wanted, refused, timeout_s)

    async def info(self) -> cache_pb2.CacheInfo:
        """The cache as the server sees it. Starts the lease again. Raises CacheLost if it has gone."""
        request = cache_pb2.RenewCacheRequest(cache=self.ref).SerializeToString()
        data = await self._unary("RenewCache", request)
        info: cache_pb2.CacheInfo = frames.parse(cache_pb2.RenewCacheResponse, data, frames.MAX_CACHE_FIELDS).cache
        return info

    async def renew(self) -> None:
        """Starts the lease again. Raises CacheLost if it has gone."""
        await self.info()

    async def written_pages(self, *, group: int = 0) -> list[int]:
        """The ids of the pages into which something was stored, rising. Starts the lease again.

        Args:
            group: index of the layer group whose pages are told.

        Raises:
            CacheLost: the cache has gone.
            InvalidRequest: the cache has no such group.
        """
        return requests.written_pages(await self._unary("RenewCache", requests.ask_written_pages(self.ref, group)))

    async def adopt(self) -> cache_pb2.CacheInfo:
        """Goes on with the cache after a restart of the server, if that has restored it; see `EpochMismatch`.

        It holds all that was answered before the restart. A step that was not answered whole is to be sent again.
        Sessions go on with it, but one that has not noticed yet that its stream ended first raises Disconnected. What
        was warmed up must be so again. Without a restart nothing changes.

        Raises:
            EpochMismatch: what the server has restored may be older than what this client knows.
            CacheLost: the server has not restored it, or its lease has ended since.
            Disconnected: the server is away for longer than the connection timeout.
        """
        await self._client.capabilities()  # waits for it, and learns its epoch and planes
        request = cache_pb2.AdoptCacheRequest(cache=self.ref).SerializeToString()
        data = await self._client.wait_for_answer("AdoptCache", request)
        info: cache_pb2.CacheInfo = frames.parse(cache_pb2.AdoptCacheResponse, data, frames.MAX_CACHE_FIELDS).cache
        self.missing = await self._client.missing_in(info.cache.epoch)
        self.ref, self.ttl_s = info.cache, info.ttl_s
        if self._renew:
            self._client.renewal.add(self)
        return info

    async def delete(self) -> None:
        """Frees the cache, and ends its sessions. Raises CacheLost if it has gone already."""
        self._client.renewal.remove(self)
        await self.close_sessions(CacheLost(f"cache {self.ref.id.hex()} was deleted"))
        try:
            await self._unary("DeleteCache", cache_pb2.DeleteCacheRequest(cache=self.ref).SerializeToString())
        except Disconnected:
            await self.close_sessions()  # nobody knows that it is lost
            raise

    async def copy_pages(self, sources: list[int], targets: list[int], *, group: int = 0) -> None:
        """Copies whole pages in every layer of a group, `sources[i]` to `targets[i]`.

        Args:
            sources: page ids that are read.
            targets: page ids that are written, as many, none twice and none that is read too.
            group: index of the layer group of these pages.

        Raises:
            CacheLost: the cache has gone.
            InvalidRequest: the cache has no such group or page, or a target breaks the rule.
        """
        await self._unary("CopyPages", requests.copy_pages(self.ref, sources, targets, group))

    async def warm_up(
        self,
        *,
        num_heads: int,
        max_reqs: int,
        query_len: int = 1,
        max_context_len: int = 0,
        options: AttentionOptions = DEFAULT_OPTIONS,
        timeout_s: float = 120.0,
        group: int = 0,
    ) -> WarmUp:
        """Has the server compile and capture decode steps of one shape, so that their first call is as fast as any.

        Optional: a step that was not warmed up gives the same, only later. Call it once the cache is there, for each
        query_len and each kind of layer; the same again is free. Others are served while kernels compile, and wait for
        no more than one layer while graphs are captured. Where there is nothing to capture, on a processor for one,
        `num_graphs` is 0 and `reason` says why.

        Args:
            num_heads: query heads of the calls.
            max_reqs: most requests of a step; smaller batches are served too.
            query_len: new tokens of each request: 1, or those of a diffusion block.
            max_context_len: most cached tokens of a request; 0 is as many as the cache's pages hold.
            options: as in the calls.
            timeout_s: seconds to wait for it. The server finishes it all the same.
            group: index of the layer group whose layers these are.

        Raises:
            InvalidRequest: a value is out of its range.
            Exhausted: the server has no memory for the buffers.
            Unsupported: the backend cannot serve such steps at all.
        """
        request = requests.warm_up(
            self.ref,
            num_heads=num_heads,
            query_len=query_len,
            max_reqs=max_reqs,
            max_context_len=max_context_len,
            options=options,
            group=group,
        )
        timeout_s = checked_seconds(timeout_s, "timeout_s")
        return requests.warmed_up(await self.transport.unary("WarmUp", request, timeout_s))

    async def store_kv(self, layer: int, slots: Any, k: Any, v: Any = None) -> int:
        """Stores K and V of one layer, in chunks of a few MiB.

        Args:
            layer: 0 <= layer < num_layers.
            slots: int `[num_tokens]`, none twice.
            k: `[num_tokens, num_kv_heads, head_dim]` of the cache's dtype.
            v: `[num_tokens, num_kv_heads, head_dim_v]` of the cache's dtype; None of a latent layer, which has it in k.

        Returns:
            Slots that were written. After an error, whole chunks before the refused one are written.
        """
        chunks = requests.store_kv(self.ref, layer, slots, k, v)
        replies = self.transport.store_kv(chunks, self.timeout_s)
        return sum([requests.stored(data) async for data in replies])

    async def read_kv(self, layer: int, slots: Any, like: Any) -> tuple[Any, Any]:
        """Reads K and V of one layer back.

        Args:
            layer: 0 <= layer < num_layers.
            slots: int `[num_tokens]`.
            like: the answer is of its kind: a torch tensor on its device, a numpy array, or an `attnd.Array`.

        Returns:
            k `[num_tokens, num_kv_heads, head_dim]` and v `[num_tokens, num_kv_heads, head_dim_v]`: of a latent layer
            the first elements of k.
        """
        responses = self.transport.read_kv(requests.read_kv(self.ref, layer, slots), self.timeout_s)
        chunks = [frames.READ_KV_RESPONSE.decode(data) async for data in responses]
        return requests.joined(chunks, like, head_dim_v_of(self.config, layer))

    async def __aenter__(self) -> AsyncCache:
        """The cache itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Deletes; a cache that has gone, or a server that is away, is fine."""
        try:
            await self.delete()
        except (CacheLost, ConnectionError, TimeoutError):
            pass

    async def _unary(self, method: str, request: bytes) -> bytes:
        return await self.transport.unary(method, request, self.timeout_s)
