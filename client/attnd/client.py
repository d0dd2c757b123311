"""The client: a connection, and the caches leased over it."""

# Generated from attnd/aio/client.py by `make generate`. Not to be edited.

from __future__ import annotations

from typing import Any

from attnd import traces
from attnd.cache import Cache
from attnd.connection import Connection
from attnd.credentials import Credentials
from attnd.errors import AttndError, Unsupported
from attnd.foreign_metadata import as_step_metadata, check_options
from attnd.planes.addresses import open_transport
from attnd.planes.choice import check_plane
from attnd.planes.grpc_options import KEEPALIVE_S
from attnd.protocol import frames, requests
from attnd.protocol.attention_options import AttentionOptions
from attnd.protocol.cache_spec import CacheSpec, takes_fields_of
from attnd.protocol.features import needs_features
from attnd.protocol.requests import DEFAULT_OPTIONS
from attnd.v1 import cache_pb2


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
        address: "host:port", the port 7411 if absent, or "inproc://" for a server in this process (needs
            `attnd[server]`).
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
    client = Client(
        open_transport(address, credentials, keepalive_s),
        timeout_s=timeout_s,
        connect_timeout_s=connect_timeout_s,
        plane=plane,
        socket_dir=socket_dir,
    )
    try:
        client.capabilities()
    except AttndError:
        client.close()
        raise
    return client


class Client(Connection):
    """A connection to one server. Any thread may use it. Close it, or use it as a context manager."""

    @takes_fields_of(CacheSpec)
    def create_cache(self, spec: CacheSpec) -> Cache:
        """Leases KV memory. The lease is renewed in the background until the cache is deleted, or the client closed.

        Raises:
            InvalidRequest: a value is out of its range.
            Exhausted: the server has not enough memory, or too many caches.
            Unsupported: the server is of a version that does not know what is asked for.
        """
        request = spec.to_message()
        if needs_features(request):
            self.capabilities()  # the server may be another by now
            if self.missing is not None:
                self.missing.check_cache(request)
        data = self.transport.unary("CreateCache", request.SerializeToString(), self.timeout_s, wait=True)
        info = frames.parse(cache_pb2.CreateCacheResponse, data, frames.MAX_CACHE_FIELDS).cache
        cache = Cache(self, info, spec.renew, self.missing_in(info.cache.epoch))
        try:
            if cache.missing is not None:
                cache.missing.check_cache(request)
        except Unsupported:  # the server was replaced by an older one meanwhile, and has not read all of the request
            with cache:
                raise
        return cache

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
        now = self.capabilities()
        ref = cache_pb2.CacheRef(id=requests.cache_id(cache_id), epoch=now.epoch if epoch is None else epoch)
        method, request, response = requests.open_cache(ref, now.epoch)
        data = self.transport.unary(method, request, self.timeout_s)
        info = frames.parse(response, data, frames.MAX_CACHE_FIELDS).cache
        return Cache(self, info, missing=self.missing_in(info.cache.epoch))

    def list_caches(self) -> list[cache_pb2.CacheInfo]:
        """This principal's caches on the server, oldest first, without their ids."""
        data = self.transport.unary("ListCaches", b"", self.timeout_s)
        return list(frames.parse(cache_pb2.ListCachesResponse, data, frames.MAX_LIST_FIELDS).caches)

    def prefill(
        self,
        cache: Cache,
        metadata: Any,
        layer: int,
        q: Any,
        k: Any,
        v: Any,
        options: AttentionOptions = DEFAULT_OPTIONS,
        out: Any = None,
    ) -> Any:
        """One layer of a prefill step in one self-contained request. Arguments and result as in `Step.attend`."""
        return self._unary_call("prefill", cache, metadata, layer, (q, k, v), options, out)

    def decode(
        self,
        cache: Cache,
        metadata: Any,
        layer: int,
        q: Any,
        k: Any,
        v: Any,
        options: AttentionOptions = DEFAULT_OPTIONS,
        out: Any = None,
    ) -> Any:
        """One layer of a decode step in one self-contained request. Arguments and result as in `Step.attend`."""
        return self._unary_call("decode", cache, metadata, layer, (q, k, v), options, out)

    def _unary_call(
        self,
        kind: str,
        cache: Cache,
        metadata: Any,
        layer: int,
        given: tuple[Any, Any, Any],
        options: AttentionOptions,
        out: Any,
    ) -> Any:
        metadata = as_step_metadata(metadata)
        check_options(metadata, options)
        step = metadata.to_message(0, cache.ref)
        if cache.missing is not None:
            cache.missing.check_step(step)
        shape = requests.step_shape(step, cache.config)
        q, k, v, wanted = requests.call_tensors(shape, layer, *given, options, out)
        with traces.of_request(step, layer):
            request = requests.unary_call_of(kind, step, layer, q, k, v, options)
            data = self.transport.unary(kind.capitalize(), request, self.timeout_s)
        return requests.unary_reply(kind, data, wanted)
