"""Sessions and steps of the asyncio client."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from types import TracebackType
from typing import Any

from attnd import traces
from attnd.aio.homes import Home
from attnd.aio.leases import AsyncLease
from attnd.aio.streams import AsyncStream
from attnd.errors import (
    AttndError,
    CacheLost,
    DeadlineExceeded,
    Disconnected,
    Unauthenticated,
    from_message,
)
from attnd.foreign_metadata import as_step_metadata, check_options
from attnd.planes.choice import PlaneOptions
from attnd.planes.retry_deadline import RetryDeadline
from attnd.planes.sent_steps import SentSteps
from attnd.protocol import requests
from attnd.protocol.attention_options import AttentionOptions
from attnd.protocol.requests import DEFAULT_OPTIONS, AttendReply, CallTensors, Reply, StepShape
from attnd.protocol.step_metadata import StepMetadata
from attnd.traces import StepSpan


class AsyncSession:
    """One Attend stream of one cache. Calls of several tasks may be under way: answers come in order.

    With two halves of a batch as two steps of two tasks, the one's q, k and v are computed while the server attends the
    other's. The server reads 4 requests ahead; more wait their turn. On the shm plane so do calls for which the region
    has no room beside those under way.

    Attributes:
        plane: how tensors travel, "inline" or "shm"; "" before the first step.
        refusals: by the name of each better plane, why the session does not have it.
    """

    def __init__(self, cache: AsyncLease, timeout_s: float, plane: PlaneOptions) -> None:
        """Opens no stream yet: the first step does."""
        self.cache = cache
        self.timeout_s = timeout_s
        self.plane = ""
        self.refusals: Mapping[str, str] = {}
        self._wanted = plane
        self._stream: AsyncStream | None = None
        self._opening = asyncio.Lock()  # one task opens the stream; nobody closes it meanwhile
        self._steps = SentSteps()
        self._home = Home("session")

    async def step(self, metadata: Any) -> AsyncStep:
        """Opens a step. Sends its metadata once, of page tables what changed; a refusal comes with its first call.

        Arguments and errors as `attnd.Session.step`.
        """
        self._home.check()
        timeout_s = self.timeout_s
        stream = await self._opened_stream()
        if stream.going_away:
            if self._stream is stream:
                self._stream = None
            await stream.finish(timeout_s)
            raise Disconnected(f"{stream.going_away}; the next step reconnects")
        metadata = as_step_metadata(metadata)
        message = self._steps.message(metadata, self.cache.ref, timeout_s, self.cache.missing)
        span = None
        if traces.tracer is not None:
            span = traces.begin(message, range(self.cache.config.num_layers), stream.plane)
        answer = await stream.ask(partial(stream.step_request, message), timeout_s)
        answer.add_done_callback(partial(self._opened, message.id))
        shape = requests.step_shape(message, self.cache.config)
        return AsyncStep(timeout_s, stream, message.id, metadata, shape, answer, span)

    async def _opened_stream(self) -> AsyncStream:
        """The stream: the one there is, or a new one. What is told of its end is told before there is a new one."""
        async with self._opening:
            stream = self._stream
            if stream is None or not (stream.is_open or stream.going_away):
                self._steps.forget()
                stream, self.refusals = await self.cache.open_stream(self._wanted, self.timeout_s)
                self._stream, self.plane = stream, stream.plane
            return stream

    def _opened(self, step_id: int, answer: asyncio.Future[AttendReply]) -> None:
        """What a step's answer says of its page tables."""
        if answer.cancelled() or answer.exception() is not None:
            return  # so has the stream ended
        kind, message, *_ = answer.result()
        self._steps.answered(step_id, kind, message)

    async def close(self, lost: CacheLost | None = None) -> None:
        """Ends the stream. The cache stays. The next step opens another stream.

        Args:
            lost: what steps of the stream raise from now on; None: Disconnected.
        """
        if not self._home.is_here:
            return  # it is the parent's
        self._home.check()
        async with self._opening:
            stream, self._stream = self._stream, None
        if stream is not None:
            stream.lost = lost
            await stream.close()

    async def __aenter__(self) -> AsyncSession:
        """The session itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes."""
        await self.close()


class AsyncStep:
    """One forward pass: what its layers share has been sent."""

    def __init__(
        self,
        timeout_s: float,
        stream: AsyncStream,
        step_id: int,
        metadata: StepMetadata,
        shape: StepShape,
        answer: asyncio.Future[AttendReply],
        span: StepSpan | None = None,
    ) -> None:
        """Made by `AsyncSession.step`."""
        self.id = step_id
        self.metadata = metadata
        self.shape = shape
        self.stream = stream
        self._timeout_s = timeout_s
        self._answer = answer
        self._span = span

    async def attend(
        self, layer: int, q: Any, k: Any, v: Any, options: AttentionOptions = DEFAULT_OPTIONS, out: Any = None
    ) -> Any:
        """Attention of one layer. Arguments, result and errors as `attnd.Step.attend`.

        Whoever gives up waiting, as by a timeout of its own, gives up the output alone: the call may still run.
        """
        check_options(self.metadata, options)
        tensors = requests.call_tensors(self.shape, layer, q, k, v, options, out)
        if self._span is None:
            return await self._attend(layer, tensors, options)
        with self._span.of_layer(layer):
            return await self._attend(layer, tensors, options)

    async def _attend(self, layer: int, tensors: CallTensors, options: AttentionOptions) -> Any:
        q, k, v, wanted = tensors
        request = partial(self.stream.call_request, self.id, layer, q, k, v, options)
        take = partial(requests.taken, self.id, layer, wanted)
        deadline = RetryDeadline(self._timeout_s)
        while True:
            reply = await self._answered(await self.stream.ask(request, self._timeout_s, take))
            if isinstance(reply, Reply):
                return reply.output
            error = self._error(reply)
            pause_s = deadline.pause_s(error)
            if pause_s is None:
                if isinstance(error, Unauthenticated):
                    await self.stream.close()  # the next step opens a stream with the token of then
                raise error
            await asyncio.sleep(pause_s)

    async def _answered(self, answer: asyncio.Future[Any]) -> Any:
        try:
            return await asyncio.wait_for(answer, self._timeout_s)
        except asyncio.TimeoutError:
            await self.stream.close()
            raise DeadlineExceeded(f"no answer within {self._timeout_s:g} s") from None

    def _error(self, answer: AttendReply) -> AttndError:
        """What a refused call raises: its step's refusal, if that was refused."""
        if self._answer.done() and self._answer.result().kind == "error":
            answer = self._answer.result()
        return from_message(answer.message)
