"""The client and its caches in asyncio, as in `attnd.client`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any

import grpc
import grpc.aio

from attnd.aio.session import AsyncSession
from attnd.credentials import NO_CREDENTIALS, Credentials
from attnd.errors import AttndError, CacheLost, Disconnected, InvalidRequest, Unsupported
from attnd.planes.choice import PlaneOptions, check_plane, plane_refusals
from attnd.planes.grpc import KEEPALIVE_S, SERVICE, WHY_S, explained, grpc_options, translate
from attnd.planes.retries import RECONNECT_PAUSE_S, Patience
from attnd.protocol import frames, requests
from attnd.protocol.attention_options import AttentionOptions
from attnd.protocol.kv_split import KVSplit
from attnd.protocol.requests import DEFAULT_OPTIONS
from attnd.protocol.warm_up import WarmUp
from attnd.renewal import RENEWALS, TRIES
from attnd.v1 import cache_pb2, capabilities_pb2


async def connect(
    address: str = "localhost:7411",
    *,
    timeout_s: float = 30.0,
    connect_timeout_s: float = 10.0,
    plane: str = "auto",
    socket_dir: str = "",
    credentials: Credentials | None = None,
    keepalive_s: float = KEEPALIVE_S,
) -> AsyncClient:
    """Connects to a server. Arguments and errors as `attnd.connect`, but without "inproc://" and the cuda plane."""
    if "://" in address:
        raise InvalidRequest(f'address is {address}, but must be "host:port" for the asyncio client', field="address")
    planes = PlaneOptions(_check_plane(plane), socket_dir)
    client = AsyncClient(address, timeout_s, connect_timeout_s, planes, credentials or NO_CREDENTIALS, keepalive_s)
    try:
        await client.capabilities()
    except AttndError:
        await client.close()
        raise
    return client


def _check_plane(name: str) -> str:
    if check_plane(name) == "cuda":
        raise Unsupported("plane is cuda, which the sync client alone has", field="plane")
    return name


class AsyncClient:
    """A connection to one server, used from one event loop.

    Attributes:
        refusals: by the name of each better plane than inline, why the server does not give it.
    """

    def __init__(
        self,
        address: str,
        timeout_s: float,
        connect_timeout_s: float,
        plane: PlaneOptions,
        credentials: Credentials = NO_CREDENTIALS,
        keepalive_s: float = KEEPALIVE_S,
    ) -> None:
        """Made by `connect`."""
        self.timeout_s = timeout_s
        self.epoch = 0
        self.address = address
        self.plane = plane
        self.refusals: dict[str, str] = {}
        self._connect_timeout_s = connect_timeout_s
        self._metadata = credentials.metadata
        options = grpc_options(keepalive_s)
        if credentials.tls:
            secure = [*options, *credentials.channel_options()]
            self._channel = grpc.aio.secure_channel(address, credentials.channel_credentials(), options=secure)
        else:
            self._channel = grpc.aio.insecure_channel(address, options=options)

    async def capabilities(self) -> capabilities_pb2.GetCapabilitiesResponse:
        """What the server is and can do; waits for a server that restarts."""
        data = await self.wait_for_answer("GetCapabilities", b"")
        message: capabilities_pb2.GetCapabilitiesResponse = frames.parse(capabilities_pb2.GetCapabilitiesResponse, data)
        self.epoch = message.epoch
        self.refusals = plane_refusals(message)
        return message

    async def wait_for_answer(self, method: str, request: bytes) -> bytes:
        """Calls a unary method that may be sent twice; as `attnd.Client.wait_for_answer`."""
        patience, left_s = Patience(self._connect_timeout_s), self._connect_timeout_s
        while True:
            try:
                return await self.unary(method, request, left_s, wait=True)
            except Disconnected:
                if patience.left_s <= RECONNECT_PAUSE_S:
                    raise
            await asyncio.sleep(RECONNECT_PAUSE_S)
            left_s = patience.left_s

    async def create_cache(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_pages: int,
        page_size: int = 16,
        head_dim_v: int = 0,
        dtype: object = "bfloat16",
        layout: str = "unified",
        backend: str = "auto",
        precision: str = "auto",
        kv_dtype: object = None,
        k_scales: Any = None,
        v_scales: Any = None,
        kv_split: KVSplit | None = None,
        ttl_s: float = 60.0,
        name: str = "",
        renew: bool = True,
    ) -> AsyncCache:
        """Leases KV memory; a task renews the lease. Arguments and errors as `attnd.Client.create_cache`."""
        request = requests.create_cache(
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            num_pages=num_pages,
            page_size=page_size,
            head_dim_v=head_dim_v,
            dtype=dtype,
            layout=layout,
            backend=backend,
            precision=precision,
            kv_dtype=kv_dtype,
            k_scales=k_scales,
            v_scales=v_scales,
            kv_split=kv_split,
            ttl_s=ttl_s,
            name=name,
        )
        data = await self.unary("CreateCache", request, wait=True)
        return AsyncCache(self, frames.parse(cache_pb2.CreateCacheResponse, data).cache, renew)

    async def open_cache(self, cache_id: bytes | str, *, epoch: int | None = None) -> AsyncCache:
        """A cache that somebody else created. Arguments and errors as `attnd.Client.open_cache`."""
        now = (await self.capabilities()).epoch
        ref = cache_pb2.CacheRef(id=requests.cache_id(cache_id), epoch=now if epoch is None else epoch)
        method, request, response = requests.open_cache(ref, now)
        return AsyncCache(self, response.FromString(await self.unary(method, request)).cache)

    async def list_caches(self) -> list[cache_pb2.CacheInfo]:
        """This principal's caches on the server, oldest first, without their ids."""
        return list(frames.parse(cache_pb2.ListCachesResponse, await self.unary("ListCaches", b"")).caches)

    async def prefill(
        self,
        cache: AsyncCache,
        metadata: Any,
        layer: int,
        q: Any,
        k: Any,
        v: Any,
        options: AttentionOptions = DEFAULT_OPTIONS,
    ) -> Any:
        """One layer of a prefill step in one self-contained request."""
        return await self._unary_call("prefill", cache, metadata, layer, q, k, v, options)

    async def decode(
        self,
        cache: AsyncCache,
        metadata: Any,
        layer: int,
        q: Any,
        k: Any,
        v: Any,
        options: AttentionOptions = DEFAULT_OPTIONS,
    ) -> Any:
        """One layer of a decode step in one self-contained request."""
        return await self._unary_call("decode", cache, metadata, layer, q, k, v, options)

    async def _unary_call(
        self, kind: str, cache: AsyncCache, metadata: Any, layer: int, q: Any, k: Any, v: Any, options: AttentionOptions
    ) -> Any:
        request = requests.unary_call(kind, requests.as_step_metadata(metadata), cache.ref, layer, q, k, v, options)
        data = await self.unary(kind.capitalize(), request)
        return requests.unary_reply(kind, data, q, options.return_lse)

    async def close(self) -> None:
        """Ends the connection. Caches stay until their lease ends."""
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        """The client itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes."""
        await self.close()

    async def unary(self, method: str, request: bytes, timeout_s: float | None = None, wait: bool = False) -> bytes:
        """Calls a unary method with bytes."""
        call: Any = self._channel.unary_unary(SERVICE + method)
        timeout_s = timeout_s or self.timeout_s
        patience = Patience(timeout_s, is_delete=method == "DeleteCache")
        left_s = timeout_s
        while True:
            try:
                return await call(  # type: ignore[no-any-return]
                    request, timeout=left_s, metadata=self._metadata(), wait_for_ready=wait
                )
            except grpc.RpcError as error:
                told = translate(error, self.address, timeout_s if wait else 0)
                if patience.is_done(told):
                    return b""
                pause_s = patience.pause_s(told)
                if pause_s is None:
                    raise (await self._explained(told) if wait else told) from None
            await asyncio.sleep(pause_s)
            left_s = patience.left_s

    async def _explained(self, told: AttndError) -> AttndError:
        """Adds why there is no connection, as the sync client does."""
        if isinstance(told, Disconnected):
            call: Any = self._channel.unary_unary(SERVICE + "GetCapabilities")
            try:
                await call(b"", timeout=WHY_S)
            except grpc.RpcError as error:
                return explained(told, error)
        return told

    def stream(self, method: str, request: Any = None) -> Any:
        """Opens a stream of bytes."""
        if request is not None:
            call: Any = self._channel.unary_stream(SERVICE + method)
            return call(request, timeout=self.timeout_s, metadata=self._metadata())
        return self._channel.stream_stream(SERVICE + method)(metadata=self._metadata())


class AsyncCache:
    """A lease on KV memory. Made by `AsyncClient.create_cache`; as a context manager it deletes itself."""

    def __init__(self, client: AsyncClient, info: cache_pb2.CacheInfo, renew: bool = True) -> None:
        """Wraps what CreateCache answered, and starts renewing it if it is to."""
        self.ref = info.cache
        self.config = info.config
        self.ttl_s = info.ttl_s
        self.client = client
        self._renewal = asyncio.ensure_future(self._renew_for_ever()) if renew else None

    def session(self, *, plane: str = "") -> AsyncSession:
        """A session: the way to run steps.

        Args:
            plane: how tensors travel, as in `connect`; "" is what was said there.

        Raises:
            InvalidRequest: no such plane.
            Unsupported: the asyncio client does not have it.
        """
        wanted = self.client.plane
        return AsyncSession(self, wanted._replace(name=_check_plane(plane)) if plane else wanted)

    async def info(self) -> cache_pb2.CacheInfo:
        """The cache as the server sees it. Starts the lease again. Raises CacheLost if it has gone."""
        data = await self.client.unary("RenewCache", cache_pb2.RenewCacheRequest(cache=self.ref).SerializeToString())
        info: cache_pb2.CacheInfo = frames.parse(cache_pb2.RenewCacheResponse, data).cache
        return info

    async def renew(self) -> None:
        """Starts the lease again. Raises CacheLost if it has gone."""
        await self.info()

    async def written_pages(self) -> list[int]:
        """The ids of the pages into which something was stored. As `attnd.Cache.written_pages`."""
        return requests.written_pages(await self.client.unary("RenewCache", requests.ask_written_pages(self.ref)))

    async def adopt(self) -> cache_pb2.CacheInfo:
        """Goes on with the cache after a restart of the server. Result and errors as `attnd.Cache.adopt`."""
        await self.client.capabilities()
        request = cache_pb2.AdoptCacheRequest(cache=self.ref).SerializeToString()
        data = await self.client.wait_for_answer("AdoptCache", request)
        info: cache_pb2.CacheInfo = frames.parse(cache_pb2.AdoptCacheResponse, data).cache
        self.ref, self.ttl_s = info.cache, info.ttl_s
        if self._renewal is not None and self._renewal.done():
            self._renewal = asyncio.ensure_future(self._renew_for_ever())
        return info

    async def delete(self) -> None:
        """Frees the cache. Raises CacheLost if it has gone already."""
        if self._renewal is not None:
            self._renewal.cancel()
        await self.client.unary("DeleteCache", cache_pb2.DeleteCacheRequest(cache=self.ref).SerializeToString())

    async def copy_pages(self, sources: list[int], targets: list[int]) -> None:
        """Copies whole pages in every layer, `sources[i]` to `targets[i]`; no page is in both."""
        await self.client.unary("CopyPages", requests.copy_pages(self.ref, sources, targets))

    async def warm_up(
        self,
        *,
        num_heads: int,
        max_reqs: int,
        query_len: int = 1,
        max_context_len: int = 0,
        options: AttentionOptions = DEFAULT_OPTIONS,
        timeout_s: float = 120.0,
    ) -> WarmUp:
        """Has the server compile and capture decode steps. Arguments, result and errors as `attnd.Cache.warm_up`."""
        request = requests.warm_up(
            self.ref,
            num_heads=num_heads,
            query_len=query_len,
            max_reqs=max_reqs,
            max_context_len=max_context_len,
            options=options,
        )
        return requests.warmed_up(await self.client.unary("WarmUp", request, timeout_s))

    async def store_kv(self, layer: int, slots: Any, k: Any, v: Any) -> int:
        """Stores K and V of one layer. Arguments and result as `attnd.Cache.store_kv`."""
        call = self.client.stream("StoreKv")
        num_slots = 0
        try:
            for chunk in requests.store_kv(self.ref, layer, slots, k, v):
                await call.write(chunk)
                num_slots += requests.stored(await call.read())
            await call.done_writing()
        except grpc.RpcError as error:
            raise translate(error, self.client.address) from None
        finally:
            call.cancel()
        return num_slots

    async def read_kv(self, layer: int, slots: Any, like: Any) -> tuple[Any, Any]:
        """Reads K and V of one layer back. Arguments and result as `attnd.Cache.read_kv`."""
        responses: AsyncIterator[bytes] = self.client.stream("ReadKv", requests.read_kv(self.ref, layer, slots))
        try:
            return requests.joined([frames.READ_KV_RESPONSE.decode(data) async for data in responses], like)
        except grpc.RpcError as error:
            raise translate(error, self.client.address) from None

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

    async def _renew_for_ever(self) -> None:
        parts = RENEWALS
        while True:
            await asyncio.sleep(self.ttl_s / parts)
            parts = RENEWALS
            ref = self.ref
            try:
                await self.renew()
            except CacheLost:
                if self.ref is ref:  # not adopted meanwhile
                    return  # the next step says so to the caller
            except AttndError:
                parts = TRIES  # away for now; the lease may outlast it
