"""Builds a server from its parts, runs it, and ends it."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
from types import TracebackType
from typing import TYPE_CHECKING

import grpc
import torch
from grpc_health.v1 import health_pb2

from attnd._version import __version__
from attnd.errors import AttndError
from attnd.planes.grpc_options import keepalive_options
from attnd.planes.targets import join_host_port
from attnd.protocol import frames
from attnd.tuning import tune_process
from attnd.v1 import plane_pb2
from attnd_server.build import build_service
from attnd_server.config import ServerConfig
from attnd_server.device.faults import end_process
from attnd_server.identity import Principals, ServerCertificates, TokenFile, WatchedFiles
from attnd_server.kv.cache import Cache
from attnd_server.kv.snapshots import SnapshotStore
from attnd_server.observe.counts import Metrics
from attnd_server.observe.rpc_counts import RpcCounter
from attnd_server.observe.standard_output import say
from attnd_server.planes.negotiation import Planes
from attnd_server.planes.server import PlaneServer
from attnd_server.rpc import health, reflection
from attnd_server.rpc.listening import listen_address
from attnd_server.rpc.servicer import SERVICE_NAME, AttentionServicer
from attnd_server.service.service import AttentionService

if TYPE_CHECKING:
    from attnd_server.observe.endpoint import MetricsEndpoint

log = logging.getLogger(__name__)

# Least milliseconds between the pings of a client; who sends more is disconnected.
MIN_PING_INTERVAL_MS = 300
# Bytes of a stream that come in before its handler asks for them: gRPC's own estimate of what a connection carries
# grows to 16 MiB a stream, of up to a thousand. Frames may be larger than the 16 KiB that it begins with instead.
WINDOW_BYTES, MAX_FRAME_BYTES = 256 << 10, 4 << 20
# Milliseconds after which a connection without an RPC is closed; its client opens another when it needs one.
MAX_IDLE_MS = 300_000


def grpc_options(config: ServerConfig) -> list[tuple[str, int]]:
    """Options of the gRPC server: what a connection may cost, and when it is given up."""
    return [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", frames.MAX_MESSAGE_BYTES),
        ("grpc.max_concurrent_streams", config.max_connection_rpcs),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
        ("grpc.http2.max_frame_size", MAX_FRAME_BYTES),
        # Of a compressed message only the size on the wire would be bounded: 256 KiB unfold to 256 MiB. Tensors do not
        # shrink, and no client of ours compresses.
        ("grpc.compression_enabled_algorithms_bitset", 1 << grpc.Compression.NoCompression),
        *keepalive_options(config.keepalive_s),
        # Clients ping, too; without this the server answers "too many pings".
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
        # A connection that never becomes one costs a descriptor. gRPC's own patience is two minutes.
        ("grpc.server_handshake_timeout_ms", int(config.keepalive_s * 1e3)),
        # What answers pings and does nothing else costs one as well. No session is idle: its stream is an RPC. (There
        # is no oldest age of a connection: sessions may last for days.)
        ("grpc.max_connection_idle_ms", MAX_IDLE_MS),
        # Two servers on one port would each answer for caches of the other.
        ("grpc.so_reuseport", 0),
    ]


# Exit code of a server that should have left snapshots of its caches and could not write them all.
EXIT_CACHES_LOST = 3
# Seconds that a call may still run after the drain, before caches are given up that it may be writing to.
QUIET_S = 30.0
# Seconds after which changed tokens and certificates count at the latest.
RELOAD_S = 1.0


class Server:
    """A gRPC server in this process' event loop.

    Attributes:
        config: as given.
        address: "host:port" on which it listens.
        metrics_address: likewise of its metrics, or "".
        lost: once it has ended, the caches that should have become snapshots and did not.

    ```
    async with Server(ServerConfig(port=0)) as server:
        print(server.address)
    ```
    """

    def __init__(self, config: ServerConfig) -> None:
        """Nothing runs yet."""
        self.config = config
        self.address = self.metrics_address = ""
        self.lost: list[Cache] = []
        self._endpoint: MetricsEndpoint | None = None
        self._watched: list[WatchedFiles] = []

    async def __aenter__(self) -> Server:
        """Starts to listen."""
        metrics = Metrics() if self.config.metrics else None
        planes = Planes()
        self.service = build_service(self.config, metrics, planes)
        self.service.executor.prepare_thread()
        self._servicer = AttentionServicer(self.service, self._principals())
        self._health = health.HealthServicer()
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        contract = reflection.ReflectionServicer(names, self._servicer.arrivals)
        counters = [] if metrics is None else [RpcCounter(metrics, SERVICE_NAME)]
        self._server = grpc.aio.server(interceptors=counters, options=grpc_options(self.config))
        self._server.add_generic_rpc_handlers((self._servicer, self._health, contract))
        port = self._add_port(listen_address(self.config.host, self.config.port))
        self.address = join_host_port(self.config.host, port)
        if metrics is not None:
            self._open_endpoint(metrics)
        self._snapshots = SnapshotStore(self.config.snapshot_dir) if self.config.snapshot_dir else None
        if self._snapshots is not None and self.config.restore:
            self._snapshots.restore(self.service.caches, self.config.max_ttl_s)
        elif self._snapshots is not None and (found := self._snapshots.found()):
            log.warning("snapshots are left alone: restore is not set", extra={"num_snapshots": len(found)})
        self._plane_server = _plane_server(
            self.service, planes
        )  # now that nothing else can fail: it has a name in a folder
        if self._snapshots is not None:
            self._snapshots.consume()
        await self._server.start()
        self._reloading = asyncio.ensure_future(self._reload_for_ever())
        self._watching = asyncio.ensure_future(self._servicer.arrivals.watch_for_ever())
        self._health.set(health_pb2.HealthCheckResponse.SERVING)
        self._loop = asyncio.get_running_loop()
        self.service.executor.faults.listen(self._device_failed)
        if self.service.verifier is not None and plane_pb2.PLANE_CUDA not in planes.reasons():
            log.warning("steps on cuda planes are not verified, whatever --verify says")
        told = {"address": self.address, "device": str(self.service.executor.device), "metrics": self.metrics_address}
        log.info("serving", extra=told)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drains: no new steps; what runs has `drain_s` to finish."""
        log.info("draining", extra={"drain_s": self.config.drain_s})
        self._reloading.cancel()
        self._watching.cancel()
        if self._snapshots is not None:
            self.service.caches.keep_all()
        self._health.set(health_pb2.HealthCheckResponse.NOT_SERVING, is_last=True)
        self._servicer.drain()
        if self._plane_server is not None:
            await asyncio.to_thread(self._plane_server.drain)
            planes = asyncio.to_thread(self._plane_server.stop, self.config.drain_s)
            await asyncio.gather(self._server.stop(self.config.drain_s), planes)
        else:
            await self._server.stop(self.config.drain_s)
        await asyncio.to_thread(self.service.close)
        if self._snapshots is not None:
            self.lost = await asyncio.to_thread(self._write_snapshots, self._snapshots)
            self._snapshots.close()
        if self._endpoint is not None:  # the last to go, so that one can watch the server drain
            self._endpoint.close()
        log.info("stopped")

    def _write_snapshots(self, snapshots: SnapshotStore) -> list[Cache]:
        """Returns the caches that could not be written."""
        caches, executor = self.service.caches.all(), self.service.executor
        try:
            is_quiet = executor.is_quiet(QUIET_S)
        except RuntimeError as error:
            is_quiet = not executor.faults.look_at(error)
        if executor.faults.reason:
            why = "the device has failed"
        elif not is_quiet:
            why = "a call still runs, and no snapshot would be whole"
        else:
            return snapshots.write(caches)
        log.error("caches lost: %s", why, extra={"num_caches": len(caches)})
        return caches

    def _principals(self) -> Principals:
        tokens = TokenFile(self.config.tokens) if self.config.tokens else None
        if tokens is not None:
            self._watched.append(tokens)
        return Principals(tokens, by_certificate=bool(self.config.tls_client_ca))

    def _add_port(self, address: str) -> int:
        config = self.config
        if not config.tls_cert:
            return self._server.add_insecure_port(address)
        certificates = ServerCertificates(config.tls_cert, config.tls_key, config.tls_client_ca)
        self._watched.append(certificates)
        return self._server.add_secure_port(address, certificates.credentials())

    async def _reload_for_ever(self) -> None:
        while True:
            await asyncio.sleep(RELOAD_S)
            for files in self._watched:
                files.reload()
            self.service.opened.end_revoked()

    def _open_endpoint(self, metrics: Metrics) -> None:
        from attnd_server.observe.endpoint import MetricsEndpoint
        from attnd_server.observe.prometheus import ServerCollector

        collector = ServerCollector(
            metrics, self.service.executor, self.service.caches, self.config, self.service.verifier
        )
        self._endpoint = MetricsEndpoint(self.config.metrics, collector)
        self.metrics_address = self._endpoint.address

    def _device_failed(self, reason: str) -> None:
        """On whichever thread saw it."""
        failed = health_pb2.HealthCheckResponse.NOT_SERVING
        self._loop.call_soon_threadsafe(self._health.set, failed)


def _plane_server(service: AttentionService, planes: Planes) -> PlaneServer | None:
    """The server of shm planes, if it is configured.

    Raises:
        RuntimeError: its socket cannot be there.
    """
    if not service.config.socket_dir:
        return None
    if sys.platform != "linux":
        raise RuntimeError("socket_dir is given, but must be empty: sealed memory needs Linux")
    try:
        return PlaneServer(service, planes)
    except OSError as error:
        raise RuntimeError(f"socket_dir is {service.config.socket_dir}, but there can be no socket: {error}") from None


def run_server(config: ServerConfig) -> int:
    """Serves until SIGTERM or SIGINT, then drains. Returns the exit code."""
    tune_process()
    log.info("starting", extra={"version": __version__, "torch": torch.__version__})

    async def main() -> int:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        async with Server(config) as server:
            gc.freeze()  # what is there by now stays: to look at it again and again would hold up calls
            server.service.executor.faults.listen(end_process)
            metrics = f", metrics on http://{server.metrics_address}/metrics" if server.metrics_address else ""
            device = server.service.executor.device
            say(f"attnd {__version__} serves {server.address} on {device}{metrics}")
            await stop.wait()
        return EXIT_CACHES_LOST if server.lost else 0

    try:
        return asyncio.run(main())
    except (AttndError, OSError, RuntimeError) as error:
        log.error("cannot serve: %s", error)
        return 1
