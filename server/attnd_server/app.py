"""Builds a server from its parts, runs it, and ends it."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

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
from attnd_server.ending import EXIT_CACHES_LOST, StopSignals, leave, save_caches
from attnd_server.identity import Principals, ServerCertificates, TokenFile, WatchedFiles
from attnd_server.kv.cache import Cache
from attnd_server.kv.snapshots import RestoreStopped, SnapshotStore
from attnd_server.observe.counts import Metrics
from attnd_server.observe.rpc_counts import RpcCounter
from attnd_server.observe.standard_output import say
from attnd_server.planes.negotiation import Planes
from attnd_server.planes.server import PlaneServer
from attnd_server.rpc import health, reflection
from attnd_server.rpc.handlers import GRPC_LOGGER, is_worth_telling
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
WINDOW_BYTES, MAX_FRAME_BYTES = 512 << 10, 4 << 20
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


# Seconds for answers that were given to leave the process, once nothing is under way any more.
LAST_ANSWERS_S = 0.5
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

    def __init__(self, config: ServerConfig, is_stopped: Callable[[], bool] = lambda: False) -> None:
        """Nothing runs yet. `is_stopped` says whether it is to end before it serves."""
        self.config = config
        self._is_stopped = is_stopped
        self.address = self.metrics_address = ""
        self._saves_caches = False  # whether caches are lost that are not written
        self.lost: list[Cache] = []
        self._endpoint: MetricsEndpoint | None = None
        self._watched: list[WatchedFiles] = []

    async def __aenter__(self) -> Server:
        """Starts to listen. Raises RestoreStopped: it is to end, and has restored nothing."""
        metrics = Metrics() if self.config.metrics else None
        planes = Planes()
        self.service = build_service(self.config, metrics, planes)
        self.service.executor.prepare_thread()
        self._servicer = AttentionServicer(self.service, self._principals())
        self._health = health.HealthServicer()
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        contract = reflection.ReflectionServicer(names, self._servicer.arrivals)
        counters = [] if metrics is None else [RpcCounter(metrics, SERVICE_NAME)]
        logging.getLogger(GRPC_LOGGER).addFilter(is_worth_telling)
        self._server = grpc.aio.server(interceptors=counters, options=grpc_options(self.config))
        self._server.add_generic_rpc_handlers((self._servicer, self._health, contract))
        port = self._add_port(listen_address(self.config.host, self.config.port))
        self.address = join_host_port(self.config.host, port)
        if metrics is not None:
            self._open_endpoint(metrics)
        self._snapshots = SnapshotStore(self.config.snapshot_dir) if self.config.snapshot_dir else None
        if self._snapshots is not None and self.config.restore:
            self._snapshots.restore(self.service.caches, self.config.max_ttl_s, self._refuse_if_stopped)
        elif self._snapshots is not None and (found := self._snapshots.found()):
            log.warning("snapshots are left alone: restore is not set", extra={"num_snapshots": len(found)})
        self._plane_server = _plane_server(
            self.service, planes
        )  # now that nothing else can fail: it has a name in a folder
        if self._snapshots is not None:
            self._refuse_if_stopped()
            self._snapshots.consume()
            self._saves_caches = True
        await self._server.start()
        self._reloading = asyncio.ensure_future(self._reload_for_ever())
        self._servicer.arrivals.start()
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
        """Drains: no new steps; what is under way has `drain_s` to finish, and what is idle ends at once."""
        drain_s = self.config.drain_s
        log.info("draining; a second signal ends the process at once", extra={"drain_s": drain_s})
        self._reloading.cancel()
        if self._snapshots is not None:
            self.service.caches.keep_all()
        self._health.set(health_pb2.HealthCheckResponse.NOT_SERVING, is_last=True)
        self._servicer.drain()
        stopping = asyncio.ensure_future(self._server.stop(drain_s))  # takes no new RPCs
        await asyncio.gather(self._servicer.wait_until_idle(drain_s), asyncio.to_thread(self._drain_planes))
        # What is left is idle, half sent, or not read: probes that watch, for example.
        await self._server.stop(LAST_ANSWERS_S)
        await stopping
        self.service.executor.end_running("the server's drain has ended")
        self._servicer.arrivals.stop()
        await asyncio.to_thread(self.service.close)
        if self._snapshots is not None:
            caches = self.service.caches.all()
            self.lost = await asyncio.to_thread(save_caches, caches, self.service.executor, self._snapshots)
            self._snapshots.close()
        if self._endpoint is not None:  # the last to go, so that one can watch the server drain
            self._endpoint.close()
        log.info("stopped")

    @property
    def exit_code(self) -> int:
        """That of a process which ends now, whatever its threads do. From any thread."""
        if not self._saves_caches or self._snapshots is None:
            return 0
        written = self._snapshots.written
        return EXIT_CACHES_LOST if any(cache.id not in written for cache in self.service.caches.all()) else 0

    def _refuse_if_stopped(self) -> None:
        if self._is_stopped():
            raise RestoreStopped("asked to end")

    def _drain_planes(self) -> None:
        if self._plane_server is not None:
            self._plane_server.drain()
            self._plane_server.stop(self.config.drain_s)

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


def run_server(config: ServerConfig) -> NoReturn:
    """Serves until SIGTERM or SIGINT, then drains; ends the process, at a second signal at once."""
    tune_process()
    log.info("starting", extra={"version": __version__, "torch": torch.__version__})
    signals = StopSignals()

    async def main() -> int:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        server = Server(config, signals.asked.is_set)
        async with server:
            gc.freeze()  # what is there by now stays: to look at it again and again would hold up calls
            server.service.executor.faults.listen(end_process)
            metrics = f", metrics on http://{server.metrics_address}/metrics" if server.metrics_address else ""
            device = server.service.executor.device
            say(f"attnd {__version__} serves {server.address} on {device}{metrics}")
            signals.listen(lambda: loop.call_soon_threadsafe(stop.set), lambda: server.exit_code)
            await stop.wait()
        return EXIT_CACHES_LOST if server.lost else 0

    try:
        code = asyncio.run(main())
    except RestoreStopped:
        log.info("stopped while it started: the snapshots are as they were")
        code = 0
    except (AttndError, OSError, RuntimeError) as error:
        log.error("cannot serve: %s", error)
        code = 1
    leave(code)
