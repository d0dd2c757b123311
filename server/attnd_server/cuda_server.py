"""The server's end of cuda planes: a step is a message of the socket, and is answered when its last layer is done.

While a step runs, its thread sleeps until the stream is done, and the watchdog looks at its worker: if that goes away,
or lets too much time pass, nothing waits for it any more. Such a step failed, whatever the stream made of it, and any
error ends the plane, because the two sides' words may not agree afterwards.
"""

from __future__ import annotations

import logging
import queue
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from attnd import wire
from attnd.errors import DeadlineExceeded, InvalidRequest, Unsupported
from attnd.planes import doorbell
from attnd.v1 import attention_pb2, backend_pb2, step_pb2
from attnd_server.cuda_graphs import StepGraphs
from attnd_server.cuda_steps import BACKENDS, CudaStep, layer_options
from attnd_server.metadata import AttentionMetadata
from attnd_server.planes import Plane
from attnd_server.planes.cuda import CudaPlanes, Flags, Lane
from attnd_server.planes.table import has_ended
from attnd_server.service import AttentionService, error_response
from attnd_server.work import OnCache

log = logging.getLogger(__name__)

# Seconds that a step may take, the worker's work between the layers included.
STEP_S = 60.0
# As at `service.MAX_OPEN_STEPS`: steps whose page tables later ones may be told by.
MAX_KEPT_STEPS = 8


def cuda_planes(device: torch.device, num_bytes: int, max_planes: int) -> CudaPlanes | str:
    """The cuda planes of a server with a socket, or why there are none, for people."""
    try:
        return CudaPlanes(device, num_bytes, max_planes)
    except Unsupported as error:
        return str(error)
    except RuntimeError as error:  # of the driver
        log.warning("there are no cuda planes: %s", error)
        return f"the driver failed: {error}"


def serve_cuda(
    service: AttentionService,
    plane: Plane,
    connection: socket.socket,
    let_in: Callable[[list[int]], None],
    send: Callable[[bytes], None],
) -> None:
    """Serves a cuda plane until its socket ends or a step fails.

    Args:
        service: what it serves.
        plane: that was claimed.
        connection: its socket.
        let_in: sends the descriptors of its memory, and closes them.
        send: sends a message.
    """
    assert isinstance(service.cuda, CudaPlanes)
    service.executor.prepare_thread()
    lane = service.cuda.open(plane.worker_gpu)
    try:
        let_in(lane.descriptors())
        session = CudaSession(service, plane.principal, lane, connection)
        _serve(service, session, connection, send)
    finally:
        service.cuda.close(lane)


def _serve(
    service: AttentionService, session: CudaSession, connection: socket.socket, send: Callable[[bytes], None]
) -> None:
    try:
        requests = doorbell.Requests(connection)
        while (request := requests.receive()) is not None:
            try:
                answer = session.run(request.message)
            except Exception as error:
                send(doorbell.reply_bytes(error_response(attention_pb2.AttendResponse, service.told(error))))
                return
            send(doorbell.reply_bytes(answer))
    finally:
        session.close()


class CudaSession:
    """The steps of one cuda plane, one at a time. On the plane's thread."""

    def __init__(self, service: AttentionService, principal: str, lane: Lane, connection: socket.socket) -> None:
        """Starts without steps. The socket is only looked at, to see whether the worker is there."""
        self._service = service
        self._principal = principal
        self._lane = lane
        self._connection = connection
        self._graphs = StepGraphs(lane, service.caches, service.executor.ops, BACKENDS)
        self._kept: OrderedDict[int, AttentionMetadata] = OrderedDict()
        self._last_id = -1

    def run(self, data: bytes) -> bytes:
        """Runs the step of a message, and answers it once it is over.

        Raises:
            AttndError: it was refused, or failed. The plane is of no use any more.
        """
        arrived = time.perf_counter()
        step = self._checked(wire.parse(attention_pb2.AttendRequest, data))
        # Until the stream is done with the pages, also if the step fails: of a deleted cache they would be unmapped.
        with step.step.cache.held():
            self._run_on_lane(step)
        if self._lane.flags.is_stopped:
            raise DeadlineExceeded(f"the worker has gone, or did not hand over every layer within {STEP_S:g} s")
        step.refuse_if_lost()
        backend = backend_pb2.BACKEND_UNSPECIFIED
        if step.backend is not None:
            backend = backend_pb2.Backend.Value(f"BACKEND_{step.backend.name}")
        reply = attention_pb2.CudaStepReply(
            step_id=step.step.id,
            takes_deltas=True,
            backend=backend,
            queue_us=int((step.started_at - arrived) * 1e6),
            step_us=int((time.perf_counter() - step.started_at) * 1e6),
        )
        return attention_pb2.AttendResponse(cuda_step=reply).SerializeToString()

    def _run_on_lane(self, step: CudaStep) -> None:
        with WATCHDOG.watching(self._lane.flags, self._connection, time.monotonic() + STEP_S):
            try:
                self._enqueue(step)
                assert step.wait is not None
                step.wait()
            except BaseException:
                self._lane.drain()
                raise

    def close(self) -> None:
        """Lets go of what waits for the worker, and frees the graphs."""
        self._lane.drain()
        self._graphs.close()

    def _checked(self, message: attention_pb2.AttendRequest) -> CudaStep:
        if message.WhichOneof("message") != "cuda_step":
            raise InvalidRequest("message is not cuda_step, which it must be on a cuda plane", field="message")
        request = message.cuda_step
        if request.step.id <= self._last_id:
            raise InvalidRequest(
                f"step.id is {request.step.id}, but must be greater than the plane's last, {self._last_id}",
                field="step.id",
            )
        service = self._service
        step = service.step(request.step, self._principal, self._kept)
        self._last_id = request.step.id
        self._kept[step.id] = step.metadata
        if len(self._kept) > MAX_KEPT_STEPS:
            self._kept.popitem(last=False)
        config, heads = step.cache.config, request.num_heads
        if not step.metadata.store_only and (heads == 0 or heads % config.num_kv_heads):
            rule = f"must be a multiple of the cache's {config.num_kv_heads} KV heads"
            raise InvalidRequest(f"num_heads is {heads}, but {rule}", field="num_heads")
        messages = list(request.options) or [step_pb2.AttentionOptions()]
        options = [service.checked_options(each, config, heads) for each in messages]
        return CudaStep(step, layer_options(options, config.num_layers), heads)

    def _enqueue(self, step: CudaStep) -> None:
        executor = self._service.executor
        outcome: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def work() -> bytes:
            step.enqueue(self._lane, self._graphs, executor.ops)
            return b""

        # In its turn among the cache's calls, copies and deletion.
        executor.submit(OnCache(step.step.cache.id, work), lambda result, error: outcome.put(error))
        error = outcome.get()
        if error is not None:
            raise error


class Watchdog:
    """Lets streams go that wait for workers which have gone or are too late. One thread for all planes."""

    # Seconds until a look at new steps and at the clock, and between two tries to let go of what waits.
    PERIOD_S, STOP_PERIOD_S = 0.05, 0.001

    def __init__(self) -> None:
        """The thread starts with the first step."""
        self._watched: dict[Flags, tuple[socket.socket, float]] = {}
        self._lock = threading.Lock()
        self._news = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def watching(self, flags: Flags, connection: socket.socket, deadline: float) -> Iterator[None]:
        """Stops `flags` if the worker's side of the socket ends meanwhile, or `time.monotonic` passes `deadline`."""
        with self._lock:
            self._watched[flags] = connection, deadline
            self._news.set()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="cuda-watchdog", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                del self._watched[flags]

    def _run(self) -> None:
        while True:
            self._news.wait()
            with self._lock:
                watched = list(self._watched.items())
                if not watched:
                    self._news.clear()
                    continue
            stopped = False
            for flags, (connection, deadline) in watched:
                if flags.is_stopped or time.monotonic() > deadline or has_ended(connection):
                    stopped = True
                    with self._lock:  # or its memory may have gone
                        if flags in self._watched:
                            flags.stop()
            if stopped:
                time.sleep(self.STOP_PERIOD_S)
            else:
                has_ended(*(connection for _, (connection, _) in watched), timeout_s=self.PERIOD_S)


WATCHDOG = Watchdog()
