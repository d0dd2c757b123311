"""Resident steps as a session on a cuda plane sees them: messages that are answered, and pauses for other steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from attnd.errors import Exhausted, InvalidRequest, Unsupported
from attnd.v1 import attention_pb2
from attnd_server.device.kernels.launch import KernelMissing
from attnd_server.device.kernels.loading import num_standing_in
from attnd_server.execution.work import on_cache
from attnd_server.observe.callers import SessionCounts
from attnd_server.planes.cuda.channel import Channel
from attnd_server.planes.cuda.in_turn import run_in_turn
from attnd_server.planes.cuda.resident.opening import ResidentSession, refusal
from attnd_server.planes.cuda.resident.told import StepsDone
from attnd_server.service.service import AttentionService

# Seconds for which kernels in the second context are waited for, and between two looks.
STANDING_IN_S, _PERIOD_S = 10.0, 0.02
_ON_THEIR_WAY = "their kernels are on their way to the GPU"


class ResidentSteps:
    """Those of one session, none before its worker asks for them."""

    def __init__(
        self,
        service: AttentionService,
        principal: str,
        channel: Channel,
        tell: Callable[[attention_pb2.AttendResponse | Exception], None],
        counts: SessionCounts,
    ) -> None:
        """See `CudaSession`; `counts` has what it was served."""
        self._service, self._principal, self._channel = service, principal, channel
        self._tell, self._counts = tell, counts
        self._ready: ResidentSession | None = None
        self._num_done = 0

    @property
    def is_under_way(self) -> bool:
        """Whether a step is."""
        return self._ready is not None and self._ready.launches.is_under_way

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the region that are for tensors: behind them lies the metadata, if there is any."""
        return self._channel.num_bytes if self._ready is None else self._ready.where.word

    def answer(self, message: attention_pb2.AttendRequest) -> bytes | None:
        """Answers a message that is of resident steps; None: it is not.

        Raises:
            AttndError: it breaks a rule, and the plane ends.
        """
        kind = message.WhichOneof("message")
        if kind == "resident_steps":
            return self._opened(message.resident_steps)
        if kind == "resident_resume":
            if self._ready is None:
                raise InvalidRequest("message is resident_resume, but there are no resident steps", field="message")
            return self._ready.resume()
        return None

    @contextmanager
    def paused(self, after: int) -> Iterator[None]:
        """A block in which none is launched, once so many of the plane's life are done."""
        if self._ready is None:
            if after > self._num_done:
                rule = f"must be at most the {self._num_done} that are done, where there are no resident steps"
                raise InvalidRequest(f"after_resident is {after}, but {rule}", field="after_resident")
            yield
            return
        launches = self._ready.launches
        launches.pause(after)
        try:
            yield
        finally:
            launches.go_on()

    def close(self) -> None:
        """Ends them, when nothing waits for the worker any more."""
        if self._ready is not None:
            self._num_done = self._ready.launches.num_done
            self._ready.close()
            self._ready = None

    def _opened(self, message: attention_pb2.ResidentSteps) -> bytes:
        self._service.refuse_if_draining()
        with self.paused(message.after_resident):  # those before are done, and none may be counted before the answer
            self.close()
        try:
            if message.if_ready and num_standing_in(self._service.executor.device):
                return refusal(Unsupported(_ON_THEIR_WAY), is_late=True)
            _await_own_context(self._service.executor.device)
            while isinstance(made := self._made(message), KernelMissing):
                if message.if_ready:
                    return refusal(Unsupported(_ON_THEIR_WAY), is_late=True)
                made.ready.result()
        except (Unsupported, Exhausted) as reason:
            return refusal(self._service.told(reason, self._principal))
        self._ready = made
        return made.reply()

    def _made(self, message: attention_pb2.ResidentSteps) -> ResidentSession | KernelMissing:
        """Made ready in its turn among the cache's calls; or a kernel that is missing."""
        made: list[ResidentSession | KernelMissing] = []

        def make() -> bytes:
            try:
                made.append(
                    ResidentSession(
                        self._service,
                        self._principal,
                        self._channel,
                        message,
                        self._num_done,
                        self._tell,
                        self._count,
                    )
                )
            except KernelMissing as kernel:
                made.append(kernel)
            return b""

        cache = self._service.caches.get(message.cache, self._principal)
        run_in_turn(self._service.executor, on_cache(cache, make))
        return made[0]

    def _count(self, done: StepsDone) -> None:
        """Counts steps that were served; one that was refused is none."""
        ready = self._ready
        if ready is None or not done.num_reqs:
            return
        num_calls = len(ready.options)
        for _ in range(done.count):
            self._counts.step_opened(done.num_reqs * ready.sizes.query_len)
            self._counts.step_served(num_calls, 0, done.step_us)
            if self._service.metrics is not None:
                num_bytes = ready.num_bytes(done.num_reqs)
                self._service.metrics.step_served("cuda", ready.graph.backend, num_calls, num_bytes, 0, done.step_us)


def _await_own_context(device: torch.device) -> None:
    """Waits until no kernel runs in the second context, where a graph would keep it.

    Raises:
        Unsupported: some do all the time.
    """
    deadline = time.monotonic() + STANDING_IN_S
    while num_standing_in(device):
        if time.monotonic() > deadline:
            raise Unsupported("kernels wait to be loaded, for which others' steps leave no time; ask again later")
        time.sleep(_PERIOD_S)
