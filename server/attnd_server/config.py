"""The settings of a server. Each is declared here once, with its default, unit, help, group and rule."""

from __future__ import annotations

from dataclasses import dataclass

from attnd_server.setting import Kind, setting

GENERAL = "Options"
LIMITS = "Limits of a step and of the server"
PRINCIPALS = "Limits of one principal"
LEASES = "Leases and shutdown"
SHARED_MEMORY = "Shared memory for clients on this host"
SECURITY = "Who may call, and encryption"
VERIFICATION = "Shadow verification"
OBSERVATION = "Logs, metrics and traces"

MAX_PORT = 65_535
# What clients take: `attnd.protocol.frames.MAX_MESSAGE_BYTES`. With an import of it gRPC would come, too.
MAX_MESSAGE_BYTES = 256 << 20
# Options of a call with slopes and sinks of 1024 heads, many times over.
_MAX_OTHER_HEADER_BYTES = 256 << 10
_HALF = "0: half or all"


@dataclass(frozen=True)
class PrincipalLimits:
    """What one principal may take of a server, so that something is left for the others.

    Attributes:
        kv_bytes: bytes of all its caches, with the buffers of their warm-ups.
        caches: caches at one time.
        sessions: streams and planes at one time.
        queue_depth: calls that may wait for the executor.
        step_bytes: bytes of its open steps.
    """

    kv_bytes: int
    caches: int
    sessions: int
    queue_depth: int
    step_bytes: int


@dataclass(frozen=True)
class ServerConfig:
    """The settings of one server process. `python -m attnd_server.cli.settings_table` prints them as a table."""

    host: str = setting("127.0.0.1", Kind.HOST, GENERAL, "Address to listen on, or a name of it.")
    port: int = setting(
        7411, Kind.COUNT, GENERAL, "TCP port; 0 lets the system pick.", unit="number of a port", high=MAX_PORT
    )
    device: str = setting("auto", Kind.DEVICE, GENERAL, "cpu, cuda or cuda:N; auto: the first GPU, else the processor.")
    kv_bytes: int = setting(
        0,
        Kind.BYTES,
        GENERAL,
        "Memory of all caches; 0: 80% of the GPU's free or 25% of the processor's memory.",
    )
    # 0 leaves the other half to a worker on the same machine. With a GPU it is one thread.
    threads: int = setting(
        0, Kind.COUNT, GENERAL, "Threads of one call on the processor; 0: half of the cores.", unit="threads"
    )

    kernel_cache: str = setting(
        "",
        Kind.FOLDER,
        GENERAL,
        "Folder in which kernels compiled for the GPU are kept; made for this user alone if there is none.",
        default_text="in the user's caches",
    )

    max_step_tokens: int = setting(65_536, Kind.COUNT, LIMITS, "New tokens of one step.", unit="tokens", low=1)
    max_step_reqs: int = setting(4_096, Kind.COUNT, LIMITS, "Requests of one step.", unit="requests", low=1)
    max_page_table_elements: int = setting(
        1 << 21, Kind.COUNT, LIMITS, "Requests times pages of one step.", unit="elements", low=1
    )
    max_context_len: int = setting(1 << 20, Kind.COUNT, LIMITS, "Cached tokens of one request.", unit="tokens", low=1)
    max_call_s: float = setting(
        120.0,
        Kind.SECONDS,
        LIMITS,
        "Time that a call may have the processor, without the turns of others. Calls that surely need more are refused "
        "at once; on a GPU --device-timeout-s says which.",
        low=1,
    )
    max_caches: int = setting(256, Kind.COUNT, LIMITS, "Caches at one time.", unit="caches", low=1)
    max_step_bytes: int = setting(
        256 << 20, Kind.BYTES, LIMITS, "Page tables, slots and lengths of all steps that are open.", low=1 << 20
    )
    max_message_bytes: int = setting(
        MAX_MESSAGE_BYTES,
        Kind.BYTES,
        LIMITS,
        "One gRPC message to the server; at most 256MiB.",
        low=1 << 20,
        high=MAX_MESSAGE_BYTES,
        metavar="BYTES|8MiB",
    )
    max_sessions: int = setting(
        256,
        Kind.COUNT,
        LIMITS,
        "Attend, StoreKv and ReadKv streams, and planes, at one time.",
        unit="streams and planes",
        low=1,
    )
    max_connection_rpcs: int = setting(
        1_024, Kind.COUNT, LIMITS, "RPCs of one connection; more wait in their client.", unit="RPCs", low=1
    )
    max_queue_depth: int = setting(
        1_024, Kind.COUNT, LIMITS, "Calls that may wait for the device.", unit="calls", low=1
    )
    max_cache_queue_depth: int = setting(
        128, Kind.COUNT, LIMITS, "Calls of one cache that may wait for the device.", unit="calls", low=1
    )

    principal_kv_bytes: int = setting(
        0,
        Kind.BYTES,
        PRINCIPALS,
        "Memory of the caches of one principal. Here and below 0 is half of the server's limit where it asks who "
        "calls, and else all of it: there everybody is one principal.",
    )
    principal_caches: int = setting(
        0, Kind.COUNT, PRINCIPALS, "Caches of one principal.", unit="caches", default_text=_HALF
    )
    principal_sessions: int = setting(
        0,
        Kind.COUNT,
        PRINCIPALS,
        "Streams and planes of one principal.",
        unit="streams and planes",
        default_text=_HALF,
    )
    principal_queue_depth: int = setting(
        0,
        Kind.COUNT,
        PRINCIPALS,
        "Calls of one principal that may wait for the device.",
        unit="calls",
        default_text=_HALF,
    )
    principal_step_bytes: int = setting(
        0, Kind.BYTES, PRINCIPALS, "Likewise of the open steps of one principal.", default_text=_HALF
    )

    default_ttl_s: float = setting(60.0, Kind.SECONDS, LEASES, "Lease of a cache that asks for none.", low=1)
    max_ttl_s: float = setting(86_400.0, Kind.SECONDS, LEASES, "Longest lease.", low=1)
    drain_s: float = setting(10.0, Kind.SECONDS, LEASES, "Time that running calls have to finish after SIGTERM.")
    device_timeout_s: float = setting(
        600.0,
        Kind.SECONDS,
        LEASES,
        "A GPU that has not ended one piece of work by then has failed, and the server ends; 0: never.",
    )
    snapshot_dir: str = setting(
        "",
        Kind.FOLDER,
        LEASES,
        "Folder into which caches are written when the server has drained; made for this user if there is none.",
        default_text="caches end with the server",
    )
    restore: bool = setting(
        False, Kind.FLAG, LEASES, "Serve the caches in --snapshot-dir, each to whose it is, once its owner adopts it."
    )
    keepalive_s: float = setting(
        10.0, Kind.SECONDS, LEASES, "Time after which a client that answers no ping is taken for gone.", low=1
    )

    socket_dir: str = setting(
        "",
        Kind.FOLDER,
        SHARED_MEMORY,
        "Folder of the socket over which clients get shared memory; made for this user alone if there is none.",
        default_text="no shared memory",
    )
    socket_uids: frozenset[int] = setting(
        frozenset(),
        Kind.USERS,
        SHARED_MEMORY,
        "Users besides the server's own who may connect there.",
        default_text="none",
    )
    region_bytes: int = setting(
        512 << 20,
        Kind.BYTES,
        SHARED_MEMORY,
        "Shared memory of one session; what is never written to takes none, but with a GPU it is pinned whole.",
        low=1,
    )
    max_planes: int = setting(64, Kind.COUNT, SHARED_MEMORY, "Sessions with shared memory.", unit="sessions", low=1)
    cuda_region_bytes: int = setting(
        128 << 20,
        Kind.BYTES,
        SHARED_MEMORY,
        "Memory of the GPU that a session with a cuda plane takes for its tensors.",
        low=1,
    )
    # Each has a stream that waits, and a GPU has 32 hardware queues for streams: a stream that shares the queue of a
    # waiting one waits too.
    max_cuda_planes: int = setting(16, Kind.COUNT, SHARED_MEMORY, "Sessions with a cuda plane.", unit="sessions", low=1)

    tls_cert: str = setting(
        "",
        Kind.FILE,
        SECURITY,
        "The server's certificate, PEM; read again when it changes.",
        default_text="none",
    )
    tls_key: str = setting(
        "", Kind.FILE, SECURITY, "Its key, PEM, which others must not be able to read.", default_text="none"
    )
    tls_client_ca: str = setting(
        "",
        Kind.FILE,
        SECURITY,
        "Clients must have a certificate that one of these authorities, PEM, has signed. Without --tokens its name is "
        "whose their caches are.",
        default_text="none",
    )
    tokens: str = setting(
        "",
        Kind.FILE,
        SECURITY,
        "Clients must have a token whose digest is in this file; it says whose their caches are, and is read again "
        "when it changes. See attnd token.",
        default_text="none",
    )

    operators: frozenset[str] = setting(
        frozenset(),
        Kind.NAMES,
        SECURITY,
        "Principals to whom attnd top shows everybody's callers, and not their own alone.",
        default_text="none",
    )

    verify: float = setting(
        0.0,
        Kind.FRACTION,
        VERIFICATION,
        "Fraction of the calls to compute again on the processor, as it is written down, and to compare; not of steps "
        "on cuda planes.",
        unit="of all calls",
        high=1,
    )
    verify_action: str = setting(
        "log",
        Kind.CHOICE,
        VERIFICATION,
        "What a wrong output leads to. log: an error in the log, after the answer; refuse: these calls wait until "
        "they are verified, and are answered with an error if they are wrong.",
        choices=("log", "refuse"),
    )

    metrics: str = setting(
        "",
        Kind.ADDRESS,
        OBSERVATION,
        "Where Prometheus reads metrics over HTTP; of a PORT alone the host is 127.0.0.1.",
        default_text="off",
    )
    traces: int = setting(
        0,
        Kind.COUNT,
        OBSERVATION,
        "Steps a second, at the most, whose spans go to the collector that OTEL_EXPORTER_OTLP_ENDPOINT names, of those "
        "that clients sample; of one principal half of them where the server asks who calls.",
        unit="steps a second",
        default_text="off",
    )

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

        def quota(asked: int, whole: int) -> int:
            return min(asked or (-(-whole // 2) if self.asks_who_calls else whole), whole)

        return PrincipalLimits(
            kv_bytes=quota(self.principal_kv_bytes, kv_bytes),
            caches=quota(self.principal_caches, self.max_caches),
            sessions=quota(self.principal_sessions, self.max_sessions),
            queue_depth=quota(self.principal_queue_depth, self.max_queue_depth),
            step_bytes=quota(self.principal_step_bytes, self.max_step_bytes),
        )
