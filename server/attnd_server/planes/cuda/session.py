"""A session on a cuda plane: its steps are checked, enqueued in order, and waited for.

The watchdog looks at a step's worker while the step is under way: if that goes away, or lets too much time pass,
nothing waits for it any more. Such a step failed, whatever the stream made of it.

From before its first launch until its stream is done with it, a step counts as one that waits in the GPU. It is held
back where nothing may for a moment (`QuietGpu`), on the plane's own thread.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

from attnd.errors import AttndError, DeadlineExceeded, InvalidRequest, Unsupported
from attnd.protocol import frames
from attnd.v1 import attention_pb2, backend_pb2
from attnd_server.device.kernels.launch import KernelMissing
from attnd_server.execution.step import Step
from attnd_server.execution.work import on_cache
from attnd_server.identity import is_revoked, refuse_if_revoked
from attnd_server.planes.cuda import watchdog as cuda_watchdog
from attnd_server.planes.cuda.channel import Channel
from attnd_server.planes.cuda.checks import layer_options, places_of, refuse_costly, refuse_wrong_heads
from attnd_server.planes.cuda.in_turn import run_in_turn
from attnd_server.planes.cuda.resident.session import ResidentSteps
from attnd_server.planes.cuda.step import BACKENDS, CudaStep
from attnd_server.planes.cuda.step_graphs import StepGraphs
from attnd_server.service.kept_steps import KeptSteps, bases_of
from attnd_server.service.service import AttentionService

# As `MAX_OPEN_STEPS` of a stream: steps whose page tables later ones may be told by.
MAX_KEPT_STEPS = 8
# Fields of a step's message, which has the options of each layer: of a thousand layers, with slopes and sinks.
MAX_STEP_FIELDS = 1 << 14


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

    def __init__(
        self,
        service: AttentionService,
        principal: str,
        channel: Channel,
        connection: socket.socket,
        tell: Callable[[attention_pb2.AttendResponse | Exception], None],
    ) -> None:
        """Starts without steps. The socket is only looked at, to see whether the worker is there.

        `tell` sends what answers nothing; an exception ends the plane, too.
        """
        self._service = service
        self._principal = principal
        self._channel = channel
        self._connection = connection
        self._graphs = StepGraphs(channel, service.caches, service.executor.ops, BACKENDS)
        self._kept = KeptSteps(service.step_room, principal, MAX_KEPT_STEPS)
        self._last_id = -1
        self._over_at = 0.0  # when the last step was over, `time.perf_counter`
        self._counts = service.callers.open(principal, "cuda")
        self._begun_in_part: list[tuple[CudaStep, ExitStack]] = []
        self._resident = ResidentSteps(service, principal, channel, tell, self._counts)

    @property
    def is_under_way(self) -> bool:
        """Whether a resident step is."""
        return self._resident.is_under_way

    def begin(self, data: bytes) -> StepUnderWay | bytes:
        """Checks and enqueues the step of a message, behind those that were begun before; or answers what is no step.

        Raises:
            AttndError: it is refused. The plane is of no use any more.
        """
        arrived = time.perf_counter()
        self._refuse_if_stopped()
        message = frames.parse(attention_pb2.AttendRequest, data, MAX_STEP_FIELDS)
        if (answer := self._resident.answer(message)) is not None:
            return answer
        step = self._checked(message)
        with self._resident.paused(message.cuda_step.after_resident):
            return self._begun(step, arrived)

    def _begun(self, step: CudaStep, arrived: float) -> StepUnderWay:
        """Enqueues a step that was checked."""
        with ExitStack() as held:
            # Until the stream is done with the pages, whatever happens: of a deleted cache they would be unmapped.
            held.enter_context(step.step.cache.held())
            timeout_s = self._service.config.device_timeout_s
            is_refused = partial(is_revoked, self._principal)
            watch = cuda_watchdog.Watch(self._channel.flags, self._connection, self._is_stuck, timeout_s, is_refused)
            held.enter_context(cuda_watchdog.WATCHDOG.watching(watch))
            while (missing := self._enqueued(step, held)) is not None:
                missing.ready.result()  # not in the GPU, where kernels are loaded while nobody waits
                watch.restart()
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
                self._channel.drain()
                raise
        started_at, self._over_at = max(step.started_at, self._over_at), time.perf_counter()
        self._refuse_if_stopped()
        step.refuse_if_lost()
        queue_us = int((step.started_at - under_way.arrived) * 1e6)
        return self._reply(step, queue_us, step_us=int((self._over_at - started_at) * 1e6))

    def _reply(self, step: CudaStep, queue_us: int, step_us: int) -> bytes:
        """Counts a step that was served, and answers it."""
        num_calls = len(step.options)
        self._counts.step_served(num_calls, queue_us, step_us)
        if step.step.trace is not None:
            step.step.trace.step_served(queue_us, step_us, "" if step.backend is None else step.backend.value)
        if self._service.metrics is not None:
            num_bytes = step.num_bytes()
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
            self._channel.drain()

    def close(self) -> None:
        """Lets go of what waits for the worker, and frees the graphs."""
        self._service.callers.close(self._counts)
        self._channel.drain()
        self._resident.close()
        for _, held in self._begun_in_part:
            held.close()
        self._begun_in_part.clear()
        self._kept.clear()
        self._graphs.close()

    def told(self, error: Exception) -> AttndError:
        """What the worker is told of an error, which counts as refused."""
        return self._service.told(error, self._principal)

    def _is_stuck(self) -> None:
        timeout_s = self._service.config.device_timeout_s
        self._service.executor.faults.fail(f"a step on a cuda plane, let go, has not ended within {timeout_s:g} s")

    def _refuse_if_stopped(self) -> None:
        refuse_if_revoked(self._principal)
        if self._channel.flags.is_stopped:
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
        take = partial(self._kept.take, bases_of(request.step))
        step, *others = service.step(request.step, self._principal, self._kept.metadata(), "cuda", take)
        if others:
            raise Unsupported(
                f"the cache has {1 + len(others)} layer groups, but a cuda plane serves caches of one: its region has "
                "the same tensors for all layers; use another plane",
                field="cache",
            )
        self._counts.step_opened(step.metadata.num_tokens)
        self._last_id = request.step.id
        # Without what its layers share on the device, for which nobody asks again.
        self._kept.add((Step(step.id, step.cache, step.group, step.metadata, held=step.held),))
        config, heads = step.group.config, request.num_heads
        if not step.metadata.store_only:
            refuse_wrong_heads(heads, config)
        options = layer_options(service, request.options, config, heads, step.metadata.window)
        refuse_costly(options, step.cost, service.executor.most_work)
        num_tokens, region_bytes = step.metadata.num_tokens, self._resident.tensor_bytes
        return CudaStep(step, options, heads, places_of(config, num_tokens, heads, region_bytes, request.layout_tokens))

    def _enqueued(self, step: CudaStep, held: ExitStack) -> KernelMissing | None:
        """Enqueues a step, or says which kernel it needs first; then nothing of it waits.

        Args:
            step: to be enqueued.
            held: what is let go when it is over: from now on also that it may be waiting.
        """
        with ExitStack() as waiting:
            waiting.enter_context(self._service.executor.quiet.waits())
            try:
                missing = self._enqueue(step)
            except BaseException:
                # Some of its layers may wait behind a step that is all right: what they use stays until the plane ends.
                held.push(waiting.pop_all())
                self._begun_in_part.append((step, held.pop_all()))
                raise
            if missing is None:
                held.push(waiting.pop_all())
            return missing

    def _enqueue(self, step: CudaStep) -> KernelMissing | None:
        executor = self._service.executor
        missing: list[KernelMissing] = []

        def enqueue() -> bytes:
            try:
                step.enqueue(self._channel, self._graphs, executor.ops)
            except KernelMissing as kernel:  # before any of its layers
                missing.append(kernel)
            return b""

        run_in_turn(executor, on_cache(step.step.cache, enqueue))
        return missing[0] if missing else None
