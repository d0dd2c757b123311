"""The server's end of cuda planes: a step is a message of the socket, and is answered when its last layer is done.

One thread checks and enqueues steps as they come, the next while one runs, so that the worker never waits for that.
Another sleeps until the stream is done with a step, and the watchdog looks at its worker: if that goes away, or lets
too much time pass, nothing waits for it any more. Such a step failed, whatever the stream made of it, and any error
ends the plane, because the two sides' words may not agree afterwards.
"""

from __future__ import annotations

import logging
import queue
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

import torch

from attnd.errors import DeadlineExceeded, InvalidRequest, Unsupported
from attnd.protocol import frames
from attnd.protocol.shm import framing
from attnd.v1 import attention_pb2, backend_pb2, step_pb2
from attnd_server.attention.metadata import AttentionMetadata
from attnd_server.device.faults import is_device_fault
from attnd_server.execution.work import OnCache
from attnd_server.planes.cuda import watchdog as cuda_watchdog
from attnd_server.planes.cuda.channel import Channel, CudaPlanes
from attnd_server.planes.cuda.step import BACKENDS, CudaStep, layer_options
from attnd_server.planes.cuda.step_graphs import StepGraphs
from attnd_server.planes.open_planes import Plane, end
from attnd_server.service.service import AttentionService, error_response

log = logging.getLogger(__name__)

# As at `service.MAX_OPEN_STEPS`: steps whose page tables later ones may be told by.
MAX_KEPT_STEPS = 8
# Steps of a session that are enqueued at once: one that runs, and one that runs after it. Graphs have room for two.
MAX_STEPS_UNDER_WAY = 2


def cuda_planes(device: torch.device, num_bytes: int, max_planes: int) -> CudaPlanes | str:
    """The cuda planes of a server with a socket, or why there are none, for people."""
    try:
        return CudaPlanes(device, num_bytes, max_planes)
    except Unsupported as error:
        return str(error)
    except RuntimeError as error:  # of the driver
        if is_device_fault(error):
            raise
        log.warning("there are no cuda planes: %s", error)
        return f"the driver failed: {error}"


def serve_cuda(
    service: AttentionService,
    planes: CudaPlanes,
    plane: Plane,
    connection: socket.socket,
    let_in: Callable[[list[int]], None],
    send: Callable[[bytes], None],
) -> None:
    """Serves a cuda plane until its socket ends or a step fails.

    Args:
        service: what it serves.
        planes: that give it what it computes on.
        plane: that was claimed.
        connection: its socket.
        let_in: sends the descriptors of its memory, and closes them.
        send: sends a message.
    """
    service.executor.prepare_thread()
    lane = planes.open(plane.worker_gpu)
    try:
        let_in(lane.descriptors())
        session = CudaSession(service, plane.principal, lane, connection)
        _serve(service, session, connection, send)
    finally:
        planes.close(lane)


def _serve(
    service: AttentionService, session: CudaSession, connection: socket.socket, send: Callable[[bytes], None]
) -> None:
    """Begins steps as they come, while a thread waits for those that were begun and answers them."""
    answers = _Answers(service, session, connection, send)
    try:
        requests = framing.Requests(connection)
        while (request := requests.receive()) is not None and answers.begin(request.message):
            pass
    finally:
        answers.close()
        session.close()


class StepUnderWay(NamedTuple):
    """A step that was begun.

    Attributes:
        step: enqueued.
        arrived: when its message came, `time.perf_counter`.
        watch: by which the watchdog knows it.
        held: what is let go when it is over.
    """

    step: CudaStep
    arrived: float
    watch: cuda_watchdog.Watch
    held: ExitStack


class CudaSession:
    """The steps of one cuda plane, in order. A step is begun while the one before it runs."""

    def __init__(self, service: AttentionService, principal: str, lane: Channel, connection: socket.socket) -> None:
        """Starts without steps. The socket is only looked at, to see whether the worker is there."""
        self._service = service
        self._principal = principal
        self._lane = lane
        self._connection = connection
        self._graphs = StepGraphs(lane, service.caches, service.executor.ops, BACKENDS)
        self._kept: OrderedDict[int, AttentionMetadata] = OrderedDict()
        self._last_id = -1
        self._over_at = 0.0  # when the last step was over, `time.perf_counter`
        self._begun_in_part: list[tuple[CudaStep, ExitStack]] = []

    def begin(self, data: bytes) -> StepUnderWay:
        """Checks and enqueues the step of a message, behind those that were begun before.

        Raises:
            AttndError: it is refused. The plane is of no use any more.
        """
        arrived = time.perf_counter()
        self._refuse_if_stopped()
        step = self._checked(frames.parse(attention_pb2.AttendRequest, data))
        with ExitStack() as held:
            # Until the stream is done with the pages, whatever happens: of a deleted cache they would be unmapped.
            held.enter_context(step.step.cache.held())
            timeout_s = self._service.config.device_timeout_s
            watch = cuda_watchdog.Watch(self._lane.flags, self._connection, self._is_stuck, timeout_s)
            held.enter_context(cuda_watchdog.WATCHDOG.watching(watch))
            try:
                self._enqueue(step)
            except BaseException:
                # Some of its layers may wait behind a step that is all right: what they use stays until the plane ends.
                self._begun_in_part.append((step, held.pop_all()))
                raise
            return StepUnderWay(step, arrived, watch, held.pop_all())

    def finish(self, under_way: StepUnderWay) -> bytes:
        """Waits until a step is over, those before it being so, and answers it. On one thread.

        Raises:
            AttndError: it failed. The plane is of no use any more.
        """
        step = under_way.step
        with under_way.held:
            under_way.watch.restart()
            try:
                assert step.wait is not None
                step.wait()
            except BaseException:
                self._lane.drain()
                raise
        started_at, self._over_at = max(step.started_at, self._over_at), time.perf_counter()
        self._refuse_if_stopped()
        step.refuse_if_lost()
        queue_us = int((step.started_at - under_way.arrived) * 1e6)
        return self._reply(step, queue_us, step_us=int((self._over_at - started_at) * 1e6))

    def _reply(self, step: CudaStep, queue_us: int, step_us: int) -> bytes:
        """Counts a step that was served, and answers it."""
        if self._service.metrics is not None:
            num_calls, num_bytes = len(step.options), step.num_bytes(self._lane)
            self._service.metrics.step_served("cuda", step.backend, num_calls, num_bytes, queue_us, step_us)
        backend = backend_pb2.BACKEND_UNSPECIFIED
        if step.backend is not None:
            backend = backend_pb2.Backend.Value(f"BACKEND_{step.backend.name}")
        reply = attention_pb2.CudaStepReply(
            step_id=step.step.id,
            takes_deltas=True,
            backend=backend,
            queue_us=queue_us,
            step_us=step_us,
        )
        return attention_pb2.AttendResponse(cuda_step=reply).SerializeToString()

    def drop(self, under_way: StepUnderWay) -> None:
        """Lets a step go after one before it failed, and everything else that waits for the worker."""
        with under_way.held:
            self._lane.drain()

    def close(self) -> None:
        """Lets go of what waits for the worker, and frees the graphs."""
        self._lane.drain()
        for _, held in self._begun_in_part:
            held.close()
        self._begun_in_part.clear()
        self._graphs.close()

    def _is_stuck(self) -> None:
        timeout_s = self._service.config.device_timeout_s
        self._service.executor.faults.fail(f"a step on a cuda plane, let go, has not ended within {timeout_s:g} s")

    def _refuse_if_stopped(self) -> None:
        if self._lane.flags.is_stopped:
            raise DeadlineExceeded(
                f"the worker has gone, or did not hand over every layer within {cuda_watchdog.STEP_S:g} s"
            )

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

        def enqueue() -> bytes:
            step.enqueue(self._lane, self._graphs, executor.ops)
            return b""

        # In its turn among the cache's calls, copies and deletion.
        work = OnCache(step.step.cache.id, enqueue, step.step.cache.principal)
        if executor.run_now(work) is not None:
            return
        executor.submit(work, lambda result, error: outcome.put(error))
        error = outcome.get()
        if error is not None:
            raise error


class _Answers:
    """Answers steps in order, on a thread of its own, until one fails."""

    def __init__(
        self,
        service: AttentionService,
        session: CudaSession,
        connection: socket.socket,
        send: Callable[[bytes], None],
    ) -> None:
        """Starts the thread."""
        self._service, self._session, self._connection, self._send = service, session, connection, send
        self._under_way: queue.SimpleQueue[StepUnderWay | Exception | None] = queue.SimpleQueue()
        self._places = threading.Semaphore(MAX_STEPS_UNDER_WAY)
        self._thread = threading.Thread(target=self._run, name="cuda-plane-answers", daemon=True)
        self._thread.start()

    def begin(self, data: bytes) -> bool:
        """Begins the step of a message, once not too many are under way. False: there was an error, the last answer."""
        self._places.acquire()
        try:
            self._under_way.put(self._session.begin(data))
        except Exception as error:
            self._under_way.put(error)
            return False
        return True

    def close(self) -> None:
        """Waits until all that was begun is over."""
        self._under_way.put(None)
        self._thread.join()

    def _run(self) -> None:
        self._service.executor.prepare_thread()
        failed = False
        while (under_way := self._under_way.get()) is not None:
            if failed:
                if not isinstance(under_way, Exception):
                    self._session.drop(under_way)
            else:
                failed = not self._answered(under_way)
            del under_way  # holds the step's tensors
            self._places.release()

    def _answered(self, under_way: StepUnderWay | Exception) -> bool:
        """Answers a step; False: with an error, and the plane has ended."""
        error = under_way if isinstance(under_way, Exception) else None
        try:
            if not isinstance(under_way, Exception):
                self._send(framing.reply_bytes(self._session.finish(under_way)))
                return True
        except Exception as failure:
            error = failure
        assert error is not None
        try:
            self._send(framing.reply_bytes(error_response(attention_pb2.AttendResponse, self._service.told(error))))
        except OSError:
            pass  # the worker has gone
        end(self._connection)
        return False
