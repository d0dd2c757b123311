"""The sync client: a connection, and the caches leased over it."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Literal, overload

from attnd.credentials import Credentials
from attnd.errors import AttndError, CacheLost
from attnd.planes.choice import OpenedStream, PlaneOptions, check_plane, open_stream, plane_refusals
from attnd.planes.cuda.session import CudaSession
from attnd.planes.grpc import KEEPALIVE_S, Transport, open_transport
from attnd.planes.retries import until_answered
from attnd.protocol import frames, requests
from attnd.protocol.attention_options import AttentionOptions
from attnd.protocol.kv_split import KVSplit
from attnd.protocol.requests import DEFAULT_OPTIONS
from attnd.protocol.warm_up import WarmUp
from attnd.renewal import Renewal
from attnd.session import Session
from attnd.v1 import cache_pb2, capabilities_pb2


def connect(
    address: str = "localhost:7411",
    *,
    timeout_s: float = 30.0,
    connect_timeout_s: float = 10.0,
    plane: str = "auto",
    socket_dir: str = "",
    credentials: Credentials | None = None,
    keepalive_s: float = KEEPALIVE_S,
) -> Client:
    """Connects to a server.

    Args:
        address: "host:port", or "inproc://" for a server in this process (needs `attnd[server]`).
        timeout_s: deadline of each request, in seconds.
        connect_timeout_s: how long to wait for a server that is not there yet.
        plane: how the tensors of a session's calls travel: "inline" in messages; "shm" in memory that server and client
            share, on one host; "cuda" in memory of the server's GPU, from a GPU of the same host (see `CudaSession`);
            "auto" in the better of the first two that can be had. One that was named and cannot be had is an error of
            the session's first step; what "auto" came to is in `Session.plane`, and why in `Session.refusals`.
        socket_dir: the folder of the server's sockets as this process sees it, if that is not where the server does.
        credentials: TLS, and who the client is; None: the connection is not encrypted, and nobody's.
        keepalive_s: seconds in which a server that vanished without a word is noticed, from 1; calls that wait for it
            end with Disconnected then.

    Raises:
        Disconnected: nobody answers at the address, or the two ends do not trust each other's certificates.
        Unauthenticated: the server asks for a token, or does not know this one.
    """
    check_plane(plane)
    return Client(
        open_transport(address, credentials, keepalive_s),
        timeout_s=timeout_s,
        connect_timeout_s=connect_timeout_s,
        plane=plane,
        socket_dir=socket_dir,
    )


class Client:
    """A connection to one server. Any thread may use it. Close it, or use it as a context manager."""

    def __init__(
        self,
        transport: Transport,
        *,
        timeout_s: float = 30.0,
        connect_timeout_s: float = 10.0,
        plane: str = "auto",
        socket_dir: str = "",
    ) -> None:
        """Asks the server for its capabilities; use `attnd.connect`."""
        self.transport = transport
        self.timeout_s = timeout_s
        self.plane = PlaneOptions(check_plane(plane), socket_dir)
        self._connect_timeout_s = connect_timeout_s
        self._renewal = Renewal()
        try:
            self.capabilities()
        except AttndError:
            transport.close()
            raise

    @property
    def epoch(self) -> int:
        """The server's epoch when it was last asked."""
        return self._epoch

    def capabilities(self) -> capabilities_pb2.GetCapabilitiesResponse:
        """What the server is and can do; waits for a server that restarts.

        Raises:
            Disconnected: the server is away for longer than the connection timeout.
        """
        data = self.wait_for_answer("GetCapabilities", b"")
        message: capabilities_pb2.GetCapabilitiesResponse = frames.parse(capabilities_pb2.GetCapabilitiesResponse, data)
        self._epoch = message.epoch
        self._refusals = plane_refusals(message)
        return message

    def wait_for_answer(self, method: str, request: bytes) -> bytes:
        """Calls a unary method that may be sent twice; waits for a server that restarts, and not for one that ends.

        Raises:
            Disconnected: the server is away for longer than the connection timeout.
        """
        return until_answered(
            lambda left_s: self.transport.unary(method, request, left_s, wait=True), self._connect_timeout_s
        )

    def create_cache(
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
    ) -> Cache:
        """Leases KV memory. The lease is renewed in the background until the cache is deleted or the process ends.

        Args:
            num_layers: layers of the model.
            num_kv_heads: KV heads per layer.
            head_dim: elements per head of q and k, a multiple of 8.
            num_pages: pages of the cache; page ids are 0..num_pages-1.
            page_size: token slots per page.
            head_dim_v: elements per head of v and of the output; 0 means head_dim.
            dtype: "float32", "float16", "bfloat16" or torch's own; of q, k, v.
            layout: "unified" or "distinct".
            backend: "auto", or the name of the backend that calls use.
            precision: "auto", "fp32", "fp16" or "bf16": the type in which backends multiply.
            kv_dtype: "float8_e4m3fn" for pages of one byte per element, or None: pages have `dtype`.
            k_scales: of "float8_e4m3fn" pages, one number or one for each KV head: K is stored as k / scale, clamped to
                -448..448 and rounded, and read as the stored value times scale. None is 1.
            v_scales: likewise for V.
            kv_split: how the KV of a request is cut into chunks, and whether output bits may depend on the batch; None
                is automatic.
            ttl_s: seconds after the client's last sign of life when the server frees the cache.
            name: a label for people.
            renew: whether a thread renews the lease for as long as this process lives and the client is open, however
                idle it is. Without it only steps, calls, stores and `Cache.renew` do.

        Raises:
            InvalidRequest: a value is out of its range.
            Exhausted: the server has not enough memory, or too many caches.
        """
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
        data = self.transport.unary("CreateCache", request, self.timeout_s, wait=True)
        return Cache(self, frames.parse(cache_pb2.CreateCacheResponse, data).cache, renew)

    def open_cache(self, cache_id: bytes | str, *, epoch: int | None = None) -> Cache:
        """A cache that somebody else created, with its lease renewed in the background like one's own.

        Args:
            cache_id: its id, `Cache.ref.id`: 16 bytes, or their hexadecimal digits.
            epoch: the epoch under which the caller knows it, `Cache.ref.epoch`; None is the server's of now. After a
                restart it is adopted under this one, see `Cache.adopt`.

        Raises:
            InvalidRequest: that is no id.
            CacheLost: there is no such cache, or it is another principal's.
        """
        now = self.capabilities().epoch
        ref = cache_pb2.CacheRef(id=requests.cache_id(cache_id), epoch=now if epoch is None else epoch)
        method, request, response = requests.open_cache(ref, now)
        return Cache(self, response.FromString(self.transport.unary(method, request, self.timeout_s)).cache)

    def list_caches(self) -> list[cache_pb2.CacheInfo]:
        """This principal's caches on the server, oldest first, without their ids."""
        data = self.transport.unary("ListCaches", b"", self.timeout_s)
        return list(frames.parse(cache_pb2.ListCachesResponse, data).caches)

    def prefill(
        self,
        cache: Cache,
        metadata: Any,
        layer: int,
        q: Any,
        k: Any,
        v: Any,
        options: AttentionOptions = DEFAULT_OPTIONS,
    ) -> Any:
        """One layer of a prefill step in one self-contained request. Arguments and result as in `Step.attend`."""
        return self._unary_call("prefill", cache, metadata, layer, q, k, v, options)

    def decode(
        self,
        cache: Cache,
        metadata: Any,
        layer: int,
        q: Any,
        k: Any,
        v: Any,
        options: AttentionOptions = DEFAULT_OPTIONS,
    ) -> Any:
        """One layer of a decode step in one self-contained request. Arguments and result as in `Step.attend`."""
        return self._unary_call("decode", cache, metadata, layer, q, k, v, options)

    def _unary_call(
        self, kind: str, cache: Cache, metadata: Any, layer: int, q: Any, k: Any, v: Any, options: AttentionOptions
    ) -> Any:
        request = requests.unary_call(kind, requests.as_step_metadata(metadata), cache.ref, layer, q, k, v, options)
        data = self.transport.unary(kind.capitalize(), request, self.timeout_s)
        return requests.unary_reply(kind, data, q, options.return_lse)

    def close(self) -> None:
        """Ends the connection. Caches stay until their lease ends; delete them first to free them now."""
        self._renewal.close()
        self.transport.close()

    def __enter__(self) -> Client:
        """The client itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes."""
        self.close()


class Cache:
    """A lease on KV memory. Made by `Client.create_cache`; as a context manager it deletes itself.

    Attributes:
        ref: id and epoch, as requests carry them.
        config: geometry, as created.
    """

    def __init__(self, client: Client, info: cache_pb2.CacheInfo, renew: bool = True) -> None:
        """Wraps what CreateCache answered; `renew`: whether the client renews the lease by itself."""
        self.ref = info.cache
        self.config = info.config
        self.ttl_s = info.ttl_s
        self._client = client
        self._renew = renew
        if renew:
            client._renewal.add(self)

    @property
    def transport(self) -> Transport:
        """The client's connection."""
        return self._client.transport

    @overload
    def session(self, *, plane: Literal["cuda"]) -> CudaSession: ...  # type: ignore[overload-overlap]  # a str, too

    @overload
    def session(self, *, plane: str = "") -> Session: ...

    def session(self, *, plane: str = "") -> Session | CudaSession:
        """A session: the way to run steps.

        Args:
            plane: how tensors travel, as in `attnd.connect`; "" is what was said there. Of "cuda" it is a CudaSession.

        Raises:
            InvalidRequest: no such plane.
        """
        wanted = self._client.plane
        if plane:
            wanted = wanted._replace(name=check_plane(plane))
        kind = CudaSession if wanted.name == "cuda" else Session
        return kind(self, self._client.timeout_s, wanted)

    def open_stream(self, wanted: PlaneOptions, timeout_s: float) -> OpenedStream:
        """A stream for a session."""
        return open_stream(self.transport, self.config, wanted, self._client._refusals, timeout_s)

    def info(self) -> cache_pb2.CacheInfo:
        """The cache as the server sees it. Starts the lease again. Raises CacheLost if it has gone."""
        request = cache_pb2.RenewCacheRequest(cache=self.ref).SerializeToString()
        data = self._unary("RenewCache", request)
        info: cache_pb2.CacheInfo = frames.parse(cache_pb2.RenewCacheResponse, data).cache
        return info

    def renew(self) -> None:
        """Starts the lease again. Raises CacheLost if it has gone."""
        self.info()

    def written_pages(self) -> list[int]:
        """The ids of the pages into which something was stored, rising. Starts the lease again. Raises CacheLost."""
        return requests.written_pages(self._unary("RenewCache", requests.ask_written_pages(self.ref)))

    def adopt(self) -> cache_pb2.CacheInfo:
        """Goes on with the cache after a restart of the server, if that has restored it; see `EpochMismatch`.

        It holds all that was answered before the restart. A step that was not answered whole is to be sent again.
        Sessions go on with it, but one that has not noticed yet that its stream ended first raises Disconnected. What
        was warmed up must be so again. Without a restart nothing changes.

        Raises:
            EpochMismatch: what the server has restored may be older than what this client knows.
            CacheLost: the server has not restored it, or its lease has ended since.
            Disconnected: the server is away for longer than the connection timeout.
        """
        self._client.capabilities()  # waits for it, and learns its epoch and planes
        request = cache_pb2.AdoptCacheRequest(cache=self.ref).SerializeToString()
        data = self._client.wait_for_answer("AdoptCache", request)
        info: cache_pb2.CacheInfo = frames.parse(cache_pb2.AdoptCacheResponse, data).cache
        self.ref, self.ttl_s = info.cache, info.ttl_s
        if self._renew:
            self._client._renewal.add(self)
        return info

    def delete(self) -> None:
        """Frees the cache. Raises CacheLost if it has gone already."""
        self._client._renewal.remove(self)
        self._unary("DeleteCache", cache_pb2.DeleteCacheRequest(cache=self.ref).SerializeToString())

    def copy_pages(self, sources: list[int], targets: list[int]) -> None:
        """Copies whole pages in every layer, `sources[i]` to `targets[i]`; no page is in both."""
        self._unary("CopyPages", requests.copy_pages(self.ref, sources, targets))

    def warm_up(
        self,
        *,
        num_heads: int,
        max_reqs: int,
        query_len: int = 1,
        max_context_len: int = 0,
        options: AttentionOptions = DEFAULT_OPTIONS,
        timeout_s: float = 120.0,
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
        )
        return requests.warmed_up(self.transport.unary("WarmUp", request, timeout_s))

    def store_kv(self, layer: int, slots: Any, k: Any, v: Any) -> int:
        """Stores K and V of one layer, in chunks of a few MiB.

        Args:
            layer: 0 <= layer < num_layers.
            slots: int `[num_tokens]`, none twice.
            k: `[num_tokens, num_kv_heads, head_dim]` of the cache's dtype.
            v: `[num_tokens, num_kv_heads, head_dim_v]` of the cache's dtype.

        Returns:
            Slots that were written. After an error, whole chunks before the refused one are written.
        """
        chunks = requests.store_kv(self.ref, layer, slots, k, v)
        return sum(requests.stored(data) for data in self.transport.store_kv(chunks, self._client.timeout_s))

    def read_kv(self, layer: int, slots: Any, like: Any) -> tuple[Any, Any]:
        """Reads K and V of one layer back.

        Args:
            layer: 0 <= layer < num_layers.
            slots: int `[num_tokens]`.
            like: the answer is of its kind: a torch tensor on its device, a numpy array, or an `attnd.Array`.

        Returns:
            k `[num_tokens, num_kv_heads, head_dim]` and v `[num_tokens, num_kv_heads, head_dim_v]`.
        """
        responses = self.transport.read_kv(requests.read_kv(self.ref, layer, slots), self._client.timeout_s)
        return requests.joined([frames.READ_KV_RESPONSE.decode(data) for data in responses], like)

    def __enter__(self) -> Cache:
        """The cache itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Deletes; a cache that has gone, or a server that is away, is fine."""
        try:
            self.delete()
        except (CacheLost, ConnectionError, TimeoutError):
            pass

    def _unary(self, method: str, request: bytes) -> bytes:
        return self.transport.unary(method, request, self._client.timeout_s)
