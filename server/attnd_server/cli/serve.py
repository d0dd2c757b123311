"""The command `attnd serve`: what can be set of a server."""

from __future__ import annotations

import logging
import os
from typing import Annotated, Any

import typer

from attnd_server.cli import options
from attnd_server.cli.exposure import Access
from attnd_server.cli.options import number, setting, whole

log = logging.getLogger(__name__)

LIMITS = "Limits of a step and of the server"
SHARES = "Limits of one principal"
LEASES = "Leases and shutdown"
SECURITY = "Who may call, and encryption"
SHARED = "Shared memory for clients on this host"
VERIFICATION = "Shadow verification"
OBSERVATION = "Logs and metrics"


def let_idle_threads_sleep() -> None:
    """Before torch is imported, unless the operator has said otherwise.

    OpenMP's threads spin for milliseconds after each piece of work, on cores that a worker on the same machine needs
    right then. A worker's own threads had better spin: its next piece of work comes at once.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def let_streams_have_queues() -> None:
    """Before CUDA starts, unless the operator has said otherwise.

    A GPU has up to 32 hardware queues for the streams of a process, which uses 8 of them by default. A stream that
    waits for the worker of a cuda plane holds up others in its queue.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


def limit(envvar: str, text: str) -> Any:
    """A whole number from 1."""
    return setting(envvar, text, panel=LIMITS, parser=whole(1), metavar="N")


def share(envvar: str, text: str) -> Any:
    """A whole number from 1; 0 is automatic."""
    return setting(envvar, text, panel=SHARES, parser=whole(0), metavar="N", show_default="0: half or all")


def seconds(envvar: str, text: str, *, low: float) -> Any:
    """A time in seconds."""
    return setting(envvar, text, panel=LEASES, parser=number(low), metavar="SECONDS")


def file(envvar: str, text: str) -> Any:
    """A file that says who may call."""
    return setting(envvar, text, panel=SECURITY, metavar="FILE", show_default="none")


def serve(
    host: Annotated[str, setting("ATTND_HOST", "Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, setting("ATTND_PORT", "TCP port; 0 lets the system pick.", parser=whole(0, options.MAX_PORT), metavar="N")
    ] = 7411,
    insecure: Annotated[
        bool,
        setting(
            "ATTND_INSECURE",
            "Listen where other machines reach it, though without TLS, or without asking anybody who they are.",
            flag="--insecure",
        ),
    ] = False,
    device: options.Device = "auto",
    kv_bytes: Annotated[
        int,
        setting(
            "ATTND_KV_BYTES",
            "Memory of all caches; 0: 80% of the GPU's free or 25% of the processor's memory.",
            parser=options.num_bytes,
            metavar="BYTES|8GiB",
        ),
    ] = 0,
    threads: Annotated[
        int,
        setting(
            "ATTND_THREADS", "Threads of one call on the processor; 0: half of the cores.", parser=whole(0), metavar="N"
        ),
    ] = 0,
    max_step_tokens: Annotated[int, limit("ATTND_MAX_STEP_TOKENS", "New tokens of one step.")] = 65_536,
    max_step_reqs: Annotated[int, limit("ATTND_MAX_STEP_REQS", "Requests of one step.")] = 4_096,
    max_page_table_elements: Annotated[
        int, limit("ATTND_MAX_PAGE_TABLE_ELEMENTS", "Requests times pages of one step.")
    ] = 1 << 21,
    max_context_len: Annotated[int, limit("ATTND_MAX_CONTEXT_LEN", "Cached tokens of one request.")] = 1 << 20,
    max_caches: Annotated[int, limit("ATTND_MAX_CACHES", "Caches at one time.")] = 256,
    max_message_bytes: Annotated[
        int,
        setting(
            "ATTND_MAX_MESSAGE_BYTES",
            "One gRPC message to the server; at most 256MiB.",
            panel=LIMITS,
            parser=options.num_bytes,
            metavar="BYTES|8MiB",
            show_default="256MiB",
        ),
    ] = 256 << 20,
    max_sessions: Annotated[
        int, limit("ATTND_MAX_SESSIONS", "Attend, StoreKv and ReadKv streams, and planes, at one time.")
    ] = 256,
    max_connection_rpcs: Annotated[
        int, limit("ATTND_MAX_CONNECTION_RPCS", "RPCs of one connection; more wait in their client.")
    ] = 1_024,
    max_queue_depth: Annotated[int, limit("ATTND_MAX_QUEUE_DEPTH", "Calls that may wait for the device.")] = 1_024,
    max_cache_queue_depth: Annotated[
        int, limit("ATTND_MAX_CACHE_QUEUE_DEPTH", "Calls of one cache that may wait for the device.")
    ] = 128,
    principal_kv_bytes: Annotated[
        int,
        setting(
            "ATTND_PRINCIPAL_KV_BYTES",
            "Memory of the caches of one principal. Here and below 0 is half of the server's limit where it asks who "
            "calls, and else all of it: there everybody is one principal.",
            panel=SHARES,
            parser=options.num_bytes,
            metavar="BYTES|8GiB",
        ),
    ] = 0,
    principal_caches: Annotated[int, share("ATTND_PRINCIPAL_CACHES", "Caches of one principal.")] = 0,
    principal_sessions: Annotated[int, share("ATTND_PRINCIPAL_SESSIONS", "Streams and planes of one principal.")] = 0,
    principal_queue_depth: Annotated[
        int, share("ATTND_PRINCIPAL_QUEUE_DEPTH", "Calls of one principal that may wait for the device.")
    ] = 0,
    default_ttl_s: Annotated[float, seconds("ATTND_DEFAULT_TTL_S", "Lease of a cache that asks for none.", low=1)] = 60,
    max_ttl_s: Annotated[float, seconds("ATTND_MAX_TTL_S", "Longest lease.", low=1)] = 86_400,
    drain_s: Annotated[
        float, seconds("ATTND_DRAIN_S", "Time that running calls have to finish after SIGTERM.", low=0)
    ] = 10,
    device_timeout_s: Annotated[
        float,
        seconds(
            "ATTND_DEVICE_TIMEOUT_S",
            "A GPU that has not ended one piece of work by then has failed, and the server ends; 0: never.",
            low=0,
        ),
    ] = 600,
    snapshot_dir: Annotated[
        str,
        setting(
            "ATTND_SNAPSHOT_DIR",
            "Folder into which caches are written when the server has drained; made for this user if there is none.",
            panel=LEASES,
            metavar="PATH",
            show_default="caches end with the server",
        ),
    ] = "",
    restore: Annotated[
        bool,
        setting(
            "ATTND_RESTORE",
            "Serve the caches in --snapshot-dir, each to whose it is, once its owner adopts it.",
            flag="--restore",
            panel=LEASES,
        ),
    ] = False,
    keepalive_s: Annotated[
        float,
        seconds("ATTND_KEEPALIVE_S", "Time after which a client that answers no ping is taken for gone.", low=1),
    ] = 10,
    socket_dir: Annotated[
        str,
        setting(
            "ATTND_SOCKET_DIR",
            "Folder of the socket over which clients get shared memory; made for this user alone if there is none.",
            panel=SHARED,
            metavar="PATH",
            show_default="no shared memory",
        ),
    ] = "",
    socket_uids: Annotated[
        frozenset,  # type: ignore[type-arg]  # typer takes no element types with a parser
        setting(
            "ATTND_SOCKET_UIDS",
            "Users besides the server's own who may connect there.",
            panel=SHARED,
            parser=options.users,
            metavar="UID,...",
            show_default="none",
        ),
    ] = frozenset(),
    region_bytes: Annotated[
        int,
        setting(
            "ATTND_REGION_BYTES",
            "Shared memory of one session; what is never written to takes none, but with a GPU it is pinned whole.",
            panel=SHARED,
            parser=options.num_bytes,
            metavar="BYTES|8GiB",
            show_default="512MiB",
        ),
    ] = 512 << 20,
    max_planes: Annotated[
        int,
        setting("ATTND_MAX_PLANES", "Sessions with shared memory.", panel=SHARED, parser=whole(1), metavar="N"),
    ] = 64,
    cuda_region_bytes: Annotated[
        int,
        setting(
            "ATTND_CUDA_REGION_BYTES",
            "Memory of the GPU that a session with a cuda plane takes for its tensors.",
            panel=SHARED,
            parser=options.num_bytes,
            metavar="BYTES|8GiB",
            show_default="64MiB",
        ),
    ] = 64 << 20,
    max_cuda_planes: Annotated[
        int,
        setting("ATTND_MAX_CUDA_PLANES", "Sessions with a cuda plane.", panel=SHARED, parser=whole(1), metavar="N"),
    ] = 16,
    tls_cert: Annotated[str, file("ATTND_TLS_CERT", "The server's certificate, PEM; read again when it changes.")] = "",
    tls_key: Annotated[str, file("ATTND_TLS_KEY", "Its key, PEM, which others must not be able to read.")] = "",
    tls_client_ca: Annotated[
        str,
        file(
            "ATTND_TLS_CLIENT_CA",
            "Clients must have a certificate that one of these authorities, PEM, has signed. Without --tokens its "
            "name is whose their caches are.",
        ),
    ] = "",
    tokens: Annotated[
        str,
        file(
            "ATTND_TOKENS",
            "Clients must have a token whose digest is in this file; it says whose their caches are, and is read "
            "again when it changes. See attnd token.",
        ),
    ] = "",
    verify: Annotated[
        float,
        setting(
            "ATTND_VERIFY",
            "Fraction of the calls to compute again on the processor, as it is written down, and to compare; not of "
            "steps on cuda planes.",
            panel=VERIFICATION,
            parser=number(0, 1),
            metavar="0..1",
        ),
    ] = 0,
    verify_action: Annotated[
        options.VerifyAction,
        setting(
            "ATTND_VERIFY_ACTION",
            "What a wrong output leads to. log: an error in the log, after the answer; refuse: these calls wait until "
            "they are verified, and are answered with an error if they are wrong.",
            panel=VERIFICATION,
        ),
    ] = options.VerifyAction.LOG,
    log_level: Annotated[
        options.LogLevel, setting("ATTND_LOG_LEVEL", "The least level that is written.", panel=OBSERVATION)
    ] = options.LogLevel.INFO,
    log_format: Annotated[
        options.LogFormat, setting("ATTND_LOG_FORMAT", "auto: text on a terminal, JSON otherwise.", panel=OBSERVATION)
    ] = options.LogFormat.AUTO,
    metrics: Annotated[
        str,
        setting(
            "ATTND_METRICS",
            "Where Prometheus reads metrics over HTTP; of a PORT alone the host is 127.0.0.1.",
            panel=OBSERVATION,
            parser=options.listen_address,
            metavar="[HOST:]PORT",
            show_default="off",
        ),
    ] = "",
) -> None:
    """Serve attention until SIGTERM or Ctrl-C.

    Every option is also read from the environment: ATTND_PORT is --port, ATTND_KV_BYTES is --kv-bytes, and so on.
    """
    access = Access(
        is_encrypted=bool(tls_cert), asks_for_certificates=bool(tls_client_ca), asks_for_tokens=bool(tokens)
    )
    if bool(tls_cert) != bool(tls_key) or (tls_client_ca and not tls_cert):
        raise typer.BadParameter(
            "tls_cert and tls_key must be given together, and tls_client_ca only with them", param_hint="--tls-cert"
        )
    if not insecure and not options.is_loopback(host) and (danger := access.danger):
        raise typer.BadParameter(
            f"host is {host}, but must be a loopback address unless --insecure is given, or {access.remedy}: {danger}",
            param_hint="--host",
        )
    if metrics and not insecure and not options.is_loopback(metrics.rpartition(":")[0]):
        raise typer.BadParameter(
            f"metrics is {metrics}, but must be at a loopback address unless --insecure is given: whoever reaches the "
            "port sees how the server is used",
            param_hint="--metrics",
        )
    if default_ttl_s > max_ttl_s:
        raise typer.BadParameter(
            f"default_ttl_s is {default_ttl_s:g}, but must be at most max_ttl_s, {max_ttl_s:g}",
            param_hint="--default-ttl-s",
        )
    if restore and not snapshot_dir:
        raise typer.BadParameter("snapshot_dir is absent, but must be given with restore", param_hint="--snapshot-dir")
    if not 1 << 20 <= max_message_bytes <= 256 << 20:
        raise typer.BadParameter(
            f"max_message_bytes is {max_message_bytes}, but must be 1MiB..256MiB", param_hint="--max-message-bytes"
        )
    if not region_bytes:
        raise typer.BadParameter("region_bytes is 0, but must be at least 1", param_hint="--region-bytes")
    if not cuda_region_bytes:
        raise typer.BadParameter("cuda_region_bytes is 0, but must be at least 1", param_hint="--cuda-region-bytes")
    let_idle_threads_sleep()
    let_streams_have_queues()
    from attnd_server.app import run_server
    from attnd_server.config import ServerConfig
    from attnd_server.observe import logs

    logs.setup(log_level.value, log_format.value)
    if access.missing and not options.is_loopback(host):
        log.warning("listening without %s", " and ".join(access.missing), extra={"host": host})
    config = ServerConfig(
        host=host,
        port=port,
        device=device,
        kv_bytes=kv_bytes,
        threads=threads,
        max_step_tokens=max_step_tokens,
        max_step_reqs=max_step_reqs,
        max_page_table_elements=max_page_table_elements,
        max_context_len=max_context_len,
        max_caches=max_caches,
        max_message_bytes=max_message_bytes,
        max_sessions=max_sessions,
        max_connection_rpcs=max_connection_rpcs,
        max_queue_depth=max_queue_depth,
        max_cache_queue_depth=max_cache_queue_depth,
        principal_kv_bytes=principal_kv_bytes,
        principal_caches=principal_caches,
        principal_sessions=principal_sessions,
        principal_queue_depth=principal_queue_depth,
        default_ttl_s=default_ttl_s,
        max_ttl_s=max_ttl_s,
        drain_s=drain_s,
        device_timeout_s=device_timeout_s,
        keepalive_s=keepalive_s,
        metrics=metrics,
        socket_dir=socket_dir,
        socket_uids=socket_uids,
        region_bytes=region_bytes,
        max_planes=max_planes,
        cuda_region_bytes=cuda_region_bytes,
        max_cuda_planes=max_cuda_planes,
        tls_cert=tls_cert,
        tls_key=tls_key,
        tls_client_ca=tls_client_ca,
        tokens=tokens,
        verify=verify,
        verify_action=verify_action.value,
        snapshot_dir=snapshot_dir,
        restore=restore,
    )
    raise typer.Exit(run_server(config))
