"""The asyncio client: the same names as `attnd.client`, awaited.

```
async with await attnd.aio.connect("localhost:7411") as client:
    async with await client.create_cache(...) as cache, cache.session() as session:
        step = await session.step(metadata)
        output = await step.attend(layer, q, k, v)
```
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from functools import partial
from types import TracebackType
from typing import Any

import grpc
import grpc.aio

from attnd import requests, wire
from attnd.credentials import NO_CREDENTIALS, Credentials
from attnd.errors import (
    AttndError,
    CacheLost,
    DeadlineExceeded,
    Disconnected,
    InvalidRequest,
    ServerFault,
    from_message,
)
from attnd.kv_split import KVSplit
from attnd.options import AttentionOptions
from attnd.page_table_deltas import SentPageTables
from attnd.requests import DEFAULT_OPTIONS
from attnd.retries import Patience
from attnd.transport import GRPC_OPTIONS, SERVICE, WHY_S, explained, translate
from attnd.v1 import cache_pb2, capabilities_pb2
from attnd.warm_up import WarmUp


async def connect(
    address: str = "localhost:7411",
    *,
    timeout_s: float = 30.0,
    connect_timeout_s: float = 10.0,
    credentials: Credentials | None = None,
) -> AsyncClient:
    """Connects to a server. Arguments and errors as `attnd.connect`; "inproc://" has the sync client only."""
    if "://" in address:
        raise InvalidRequest(f'address is {address}, but must be "host:port" for the asyncio client', field="address")
    client = AsyncClient(address, timeout_s, connect_timeout_s, credentials or NO_CREDENTIALS)
    try:
        await client.capabilities()
    except AttndError:
        await client.close()
        raise
    return client


class AsyncClient:
    """A connection to one server, used from one event loop."""

    def __init__(
        self, address: str, timeout_s: float, connect_timeout_s: float, credentials: Credentials = NO_CREDENTIALS
    ) -> None:
        """Made by `connect`."""
        self.timeout_s = timeout_s
        self.epoch = 0
        self.address = address
        self._connect_timeout_s = connect_timeout_s
        self._metadata = credentials.metadata
        if credentials.tls:
            options = [*GRPC_OPTIONS, *credentials.channel_options()]
            self._channel = grpc.aio.secure_channel(address, credentials.channel_credentials(), options=options)
        else:
            self._channel = grpc.aio.insecure_channel(address, options=GRPC_OPTIONS)

    async def capabilities(self) -> capabilities_pb2.GetCapabilitiesResponse:
        """What the server is and can do; waits for a server that restarts."""
        data = await self.unary("GetCapabilities", b"", self._connect_timeout_s, wait=True)
        message: capabilities_pb2.GetCapabilitiesResponse = wire.parse(capabilities_pb2.GetCapabilitiesResponse, data)
        self.epoch = message.epoch
        return message

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
        return AsyncCache(self, wire.parse(cache_pb2.CreateCacheResponse, data).cache)

    async def list_caches(self) -> list[cache_pb2.CacheInfo]:
        """This principal's caches on the server, oldest first, without their ids."""
        return list(wire.parse(cache_pb2.ListCachesResponse, await self.unary("ListCaches", b"")).caches)

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
        patience = Patience(timeout_s)
        left_s = timeout_s
        while True:
            try:
                return await call(  # type: ignore[no-any-return]
                    request, timeout=left_s, metadata=self._metadata(), wait_for_ready=wait
                )
            except grpc.RpcError as error:
                told = translate(error, self.address, timeout_s if wait else 0)
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

    def __init__(self, client: AsyncClient, info: cache_pb2.CacheInfo) -> None:
        """Wraps what CreateCache answered, and starts renewing it."""
        self.ref = info.cache
        self.config = info.config
        self.ttl_s = info.ttl_s
        self.client = client
        self._renewal = asyncio.ensure_future(self._renew_for_ever())

    def session(self) -> AsyncSession:
        """A session: the way to run steps."""
        return AsyncSession(self)

    async def info(self) -> cache_pb2.CacheInfo:
        """The cache as the server sees it. Starts the lease again. Raises CacheLost if it has gone."""
        data = await self.client.unary("RenewCache", cache_pb2.RenewCacheRequest(cache=self.ref).SerializeToString())
        info: cache_pb2.CacheInfo = wire.parse(cache_pb2.RenewCacheResponse, data).cache
        return info

    async def renew(self) -> None:
        """Starts the lease again. Raises CacheLost if it has gone."""
        await self.info()

    async def delete(self) -> None:
        """Frees the cache. Raises CacheLost if it has gone already."""
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
            return requests.joined([wire.READ_KV_RESPONSE.decode(data) async for data in responses], like)
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
        while True:
            await asyncio.sleep(self.ttl_s / 3)
            try:
                await self.renew()
            except CacheLost:
                return  # the next step says so to the caller
            except AttndError:
                pass  # away for now; the lease may outlast it


class AsyncSession:
    """One Attend stream of one cache. Calls of several tasks may be under way: answers come in order.

    With two halves of a batch as two steps of two tasks, the one's q, k and v are computed while the server attends the
    other's. The server reads 4 requests ahead; more wait their turn.
    """

    def __init__(self, cache: AsyncCache) -> None:
        """Opens no stream yet: the first step does."""
        self.cache = cache
        self._call: Any = None
        self._last_step_id = 0
        self._waiting: deque[asyncio.Future[tuple[str, Any, Any]]] = deque()
        self._reader: asyncio.Task[None] | None = None
        self._sent_tables = SentPageTables()
        self._going_away = ""
        self._writing = asyncio.Lock()  # gRPC allows one write at a time

    async def step(self, metadata: Any) -> AsyncStep:
        """Opens a step. Sends its metadata once, of page tables what changed; a refusal comes with its first call."""
        if self._going_away:
            reason, self._going_away = self._going_away, ""
            await self.close()
            raise Disconnected(f"{reason}; the next step reconnects")
        if self._call is None:
            self._sent_tables.forget()
        step_id = self._last_step_id = self._last_step_id + 1
        message = requests.as_step_metadata(metadata).to_message(step_id, self.cache.ref, self._sent_tables)
        message.call_timeout_ms = requests.timeout_ms(self.cache.client.timeout_s)
        if self._call is None:
            self._call = self.cache.client.stream("Attend")
            self._reader = asyncio.ensure_future(self._read(self._call))
        answer = await self._send(wire.step_request(message), self._call)
        answer.add_done_callback(partial(self._opened, step_id))
        return AsyncStep(self, step_id, answer)

    def _opened(self, step_id: int, answer: asyncio.Future[tuple[str, Any, Any]]) -> None:
        """What a step's answer says of its page tables."""
        if answer.cancelled() or answer.exception() is not None:
            return  # so has the stream ended
        kind, message, _ = answer.result()
        if kind == "error":
            self._sent_tables.forget()
        elif kind == "step" and message.takes_deltas:
            self._sent_tables.accept(step_id)

    async def close(self) -> None:
        """Ends the stream. The cache stays. The next step opens another stream."""
        call, self._call = self._call, None
        reader, self._reader = self._reader, None
        if call is not None:
            call.cancel()
        if reader is not None:
            await asyncio.wait([reader])

    async def __aenter__(self) -> AsyncSession:
        """The session itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes."""
        await self.close()

    async def attend(self, request: bytes) -> tuple[str, Any, Any]:
        """Sends a call and waits for its answer."""
        answer = await self._send(request)
        try:
            return await asyncio.wait_for(answer, self.cache.client.timeout_s)
        except asyncio.TimeoutError:
            await self.close()
            raise DeadlineExceeded(f"no answer within {self.cache.client.timeout_s:g} s") from None

    async def _send(self, request: bytes, stream: Any = None) -> asyncio.Future[tuple[str, Any, Any]]:
        """Sends to the stream that is open, which must be `stream` if that is given."""
        answer: asyncio.Future[tuple[str, Any, Any]] = asyncio.get_running_loop().create_future()
        async with self._writing:
            if self._call is None or stream not in (None, self._call):
                raise Disconnected("the step's stream has ended; open the step again")
            self._waiting.append(answer)
            try:
                await self._call.write(request)
            except (grpc.RpcError, asyncio.InvalidStateError):
                pass  # the reader learns why, and tells whoever waits
        return answer

    async def _read(self, call: Any) -> None:
        """Gives each answer to the oldest request without one; when the stream ends, all learn why."""
        told: AttndError = Disconnected("the server ended the stream")
        try:
            while (data := await call.read()) is not grpc.aio.EOF:
                answer = requests.attend_reply(data)[:3]
                if answer[0] == "going_away":
                    self._going_away = answer[1].reason
                elif not self._waiting:
                    told = ServerFault(f"the server sent {answer[0]} unasked")
                    break
                else:
                    future = self._waiting.popleft()
                    if not future.done():
                        future.set_result(answer)
        except grpc.RpcError as error:
            told = translate(error, self.cache.client.address)
        except (AttndError, asyncio.CancelledError) as error:
            told = error if isinstance(error, AttndError) else Disconnected("the session was closed")
        if self._call is call:
            self._call = None
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_exception(told)
                future.exception()  # read: a step whose reply nobody awaits is no reason to complain


class AsyncStep:
    """One forward pass: what its layers share has been sent."""

    def __init__(self, session: AsyncSession, step_id: int, answer: asyncio.Future[tuple[str, Any, Any]]) -> None:
        """Made by `AsyncSession.step`."""
        self.id = step_id
        self._session = session
        self._answer = answer

    async def attend(self, layer: int, q: Any, k: Any, v: Any, options: AttentionOptions = DEFAULT_OPTIONS) -> Any:
        """Attention of one layer. Arguments, result and errors as `attnd.Step.attend`."""
        request = requests.attend_call(self.id, layer, q, k, v, options)
        patience = Patience(self._session.cache.client.timeout_s)
        while True:
            kind, message, tensors = await self._session.attend(request)
            if kind != "error":
                break
            opened, refusal, _ = self._answer.result() if self._answer.done() else ("", message, None)
            error = from_message(refusal if opened == "error" else message)
            pause_s = patience.pause_s(error)
            if pause_s is None:
                raise error
            await asyncio.sleep(pause_s)
        if kind != "call" or (message.step_id, message.layer) != (self.id, layer):
            await self._session.close()  # nobody knows whose the next answer is
            raise ServerFault(f"the server answered layer {layer} of step {self.id} with {kind} {message}")
        return requests.reply(message, tensors, q, options.return_lse).output
