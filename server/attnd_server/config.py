"""Settings of a server. Frozen: a value that exists is a valid one."""

from __future__ import annotations

from dataclasses import dataclass

from attnd.protocol.frames import MAX_MESSAGE_BYTES


@dataclass(frozen=True)
class PrincipalLimits:
    """What one principal may take of a server, so that something is left for the others.

    Attributes:
        kv_bytes: bytes of all its caches, with the buffers of their warm-ups.
        caches: caches at one time.
        sessions: streams and planes at one time.
        queue_depth: calls that may wait for the executor.
    """

    kv_bytes: int
    caches: int
    sessions: int
    queue_depth: int


@dataclass(frozen=True)
class ServerConfig:
    """What one server process takes and gives.

    Attributes:
        host: address to listen on.
        port: TCP port; 0 lets the system pick.
        device: torch's name of the device that holds the caches, or "auto": the first GPU, else the processor.
        kv_bytes: bytes that all caches may take; 0 means 80% of the GPU's free memory or 25% of the processor's.
        threads: threads of one attention call on the processor; 0 takes half of the cores and leaves a worker on
            the same machine the others, and with a GPU one.
        max_step_tokens: new tokens of one step.
        max_step_reqs: requests of one step.
        max_page_table_elements: requests times pages of one step.
        max_context_len: cached tokens of one request.
        max_caches: caches at one time.
        max_message_bytes: of one gRPC message to the server; at most `wire.MAX_MESSAGE_BYTES`, which clients take.
        max_sessions: Attend, StoreKv and ReadKv streams, and planes, at one time.
        max_connection_rpcs: RPCs of one connection at one time; more wait in their client.
        max_queue_depth: calls that may wait for the executor.
        max_cache_queue_depth: of these, calls of one cache.
        principal_kv_bytes: of `kv_bytes`, what one principal may take. Here and below 0 is half of the server's where
            it asks who calls, so that nobody alone can take everything, and else all of it: there everybody is one
            principal.
        principal_caches: of `max_caches`.
        principal_sessions: of `max_sessions`.
        principal_queue_depth: of `max_queue_depth`.
        default_ttl_s: lease of a cache that asks for none, in seconds.
        max_ttl_s: longest lease, in seconds.
        device_timeout_s: seconds after which a GPU that has not ended a piece of work counts as failed; 0: never.
        drain_s: seconds that running calls have to finish after SIGTERM.
        keepalive_s: seconds after which a client that answers no ping is taken for gone, and its streams end.
        metrics: address for Prometheus, "host:port", where port 0 lets the system pick; "" is none.
        socket_dir: folder of the Unix socket over which clients on this host get shared memory; "": there is none.
        socket_uids: users besides the server's own who may connect there.
        region_bytes: shared memory of one session; what is never written to takes none, but with a GPU it is pinned
            whole.
        max_planes: sessions with shared memory at one time.
        cuda_region_bytes: memory of the GPU that a session with a cuda plane takes for its tensors.
        max_cuda_planes: sessions with a cuda plane at one time. Each has a stream that waits, and a GPU has 32 hardware
            queues for streams: one that shares the queue of a waiting one waits too.
        tls_cert: file of the server's certificate, PEM; "": nothing is encrypted.
        tls_key: file of its key.
        tls_client_ca: file of the authorities that sign clients' certificates; "": clients need none.
        tokens: file of bearer tokens and whose they are; "": nobody needs one.
        verify: fraction of the calls that are computed a second time, and compared; see `shadow`. Not on cuda planes.
        verify_action: what a wrong output leads to: "log", or "refuse": it is not sent.
        snapshot_dir: folder into which the server writes its caches when it has drained; "": they end with it.
        restore: also serve what an earlier server wrote there.
    """

    host: str = "127.0.0.1"
    port: int = 7411
    device: str = "auto"
    kv_bytes: int = 0
    threads: int = 0
    max_step_tokens: int = 65_536
    max_step_reqs: int = 4_096
    max_page_table_elements: int = 1 << 21
    max_context_len: int = 1 << 20
    max_caches: int = 256
    max_message_bytes: int = MAX_MESSAGE_BYTES
    max_sessions: int = 256
    max_connection_rpcs: int = 1_024
    max_queue_depth: int = 1_024
    max_cache_queue_depth: int = 128
    principal_kv_bytes: int = 0
    principal_caches: int = 0
    principal_sessions: int = 0
    principal_queue_depth: int = 0
    default_ttl_s: float = 60.0
    max_ttl_s: float = 86_400.0
    device_timeout_s: float = 600.0
    drain_s: float = 10.0
    keepalive_s: float = 10.0
    metrics: str = ""
    socket_dir: str = ""
    socket_uids: frozenset[int] = frozenset()
    region_bytes: int = 512 << 20
    max_planes: int = 64
    cuda_region_bytes: int = 64 << 20
    max_cuda_planes: int = 16
    tls_cert: str = ""
    tls_key: str = ""
    tls_client_ca: str = ""
    tokens: str = ""
    verify: float = 0.0
    verify_action: str = "log"
    snapshot_dir: str = ""
    restore: bool = False

    @property
    def asks_who_calls(self) -> bool:
        """Whether there can be more than one principal."""
        return bool(self.tokens or self.tls_client_ca)

    @property
    def max_header_bytes(self) -> int:
        """Bytes of a message beside the tensors of a call: a little more than the largest step can have.

        Its page tables, or the indices and pages of a delta; an int64 slot of each token; six int32 of each request.
        """
        most = 8 * self.max_page_table_elements + 8 * self.max_step_tokens + 24 * self.max_step_reqs
        return most + _MAX_OTHER_HEADER_BYTES

    def principal_limits(self, kv_bytes: int) -> PrincipalLimits:
        """What one principal may take of a server whose caches may take `kv_bytes`."""

        def share(asked: int, whole: int) -> int:
            return min(asked or (-(-whole // 2) if self.asks_who_calls else whole), whole)

        return PrincipalLimits(
            kv_bytes=share(self.principal_kv_bytes, kv_bytes),
            caches=share(self.principal_caches, self.max_caches),
            sessions=share(self.principal_sessions, self.max_sessions),
            queue_depth=share(self.principal_queue_depth, self.max_queue_depth),
        )


# Options of a call with slopes and sinks of 1024 heads, many times over.
_MAX_OTHER_HEADER_BYTES = 256 << 10
