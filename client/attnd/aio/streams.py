"""Attend streams of the asyncio client: whose answer is whose, on every plane."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from attnd import forks
from attnd.aio.homes import Home
from attnd.errors import AttndError, DeadlineExceeded, Disconnected, Exhausted, ServerFault
from attnd.protocol import frames, requests
from attnd.protocol.attention_options import AttentionOptions
from attnd.protocol.requests import AttendReply
from attnd.v1 import step_pb2

Told = Callable[[grpc.RpcError], Awaitable[AttndError]]
_ENDED = "the step's stream has ended"


class AsyncStream:
    """An Attend stream. Several tasks may ask; answers come in order. Derived classes carry the bytes.

    Attributes:
        plane: how the tensors of calls travel.
        is_open: until it is closed or breaks.
        going_away: why the server wants no more steps; "": it does.
        lost: what is raised of the cache, once it was deleted.
    """

    plane = "inline"

    def __init__(self) -> None:
        """Nothing is under way."""
        self.is_open = True
        self.going_away = ""
        # What was sent and not answered, in order, and what takes its answer.
        self._waiting: deque[tuple[asyncio.Future[Any], Callable[[AttendReply], Any]]] = deque()
        self._writing = asyncio.Lock()
        self._progress: asyncio.Future[None] | None = None  # of who cannot send before something is answered
        self._home = Home("session")
        self.lost: AttndError | None = None

    def step_request(self, step: step_pb2.Step) -> bytes:
        """What opens a step, for `ask`."""
        return frames.step_request(step)

    def call_request(self, step_id: int, layer: int, q: Any, k: Any, v: Any, options: AttentionOptions) -> bytes:
        """A call, for `ask`. Raises InvalidRequest for what cannot be sent, Exhausted if there is no room yet."""
        return requests.attend_call(step_id, layer, q, k, v, options)

    async def ask(
        self, request: Callable[[], bytes], timeout_s: float, take: Callable[[AttendReply], Any] = lambda answer: answer
    ) -> asyncio.Future[Any]:
        """Sends a message when its turn has come and there is room for it.

        Args:
            request: makes it, with `step_request` or `call_request`, right before it is sent.
            timeout_s: how long nothing may be answered while there is no room, in seconds.
            take: makes of the answer what is wanted, as soon as it comes: what its tensors lie in may be used again
                then. If it raises ServerFault, the stream is over.

        Returns:
            What `take` will give. Who gives it up lets the answer come all the same, but it is not taken.

        Raises:
            Disconnected: the stream has ended.
            DeadlineExceeded: there was no room in time. The stream is over then.
            InvalidRequest: the stream belongs to another event loop.
        """
        self._home.check()
        async with self._writing:
            data = await self._made(request, timeout_s)
            answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            self._waiting.append((answer, take))
            await self._send(data)
        return answer

    async def _made(self, request: Callable[[], bytes], timeout_s: float) -> bytes:
        while True:
            if not self.is_open:
                raise self.lost or Disconnected(f"{self.going_away or _ENDED}; open the step again")
            try:
                return request()
            except Exhausted:
                if not self._waiting:
                    raise
            await self._next_answer(timeout_s)

    async def _next_answer(self, timeout_s: float) -> None:
        """Waits until something has been answered, or the stream has ended. For the one task that may write."""
        self._progress = asyncio.get_running_loop().create_future()
        try:
            await asyncio.wait_for(self._progress, timeout_s)
        except asyncio.TimeoutError:
            await self.close()
            raise DeadlineExceeded(f"no answer within {timeout_s:g} s") from None
        finally:
            self._progress = None

    async def _send(self, data: bytes) -> None:
        """Sends bytes. If the stream breaks, `_end` says so to whoever waits."""
        raise NotImplementedError

    async def finish(self, timeout_s: float) -> None:
        """Closes when all that is under way has been answered, which a server that drains still does."""
        async with self._writing:
            try:
                while self._waiting:
                    await self._next_answer(timeout_s)
            except DeadlineExceeded:
                pass  # their waits say so
        await self.close()

    async def close(self) -> None:
        """Ends the stream, and all that is under way."""
        self._end(Disconnected("the session was closed"))

    def _answered(self, answer: AttendReply) -> None:
        """Gives an answer to what was sent first. Raises ServerFault if that is nothing."""
        if answer.kind == "going_away":
            self.going_away = answer.message.reason
            return
        if not self._waiting:
            raise ServerFault(f"the server sent {answer.kind} unasked")
        future, take = self._waiting.popleft()
        try:
            if not future.done():  # else whoever waited has given up
                future.set_result(take(answer))
        except Exception as error:
            future.set_exception(error)
            if isinstance(error, AttndError):
                raise  # nobody knows whose the next answer is
        self._go_on()

    def _end(self, error: AttndError) -> None:
        """The stream is over: all that is under way learns why. Again does nothing."""
        self.is_open = False
        while self._waiting:
            future, _ = self._waiting.popleft()
            if not future.done():
                future.set_exception(error)
                future.exception()  # read: a step whose reply nobody awaits is no reason to complain
        self._go_on()

    def _go_on(self) -> None:
        if self._progress is not None and not self._progress.done():
            self._progress.set_result(None)


class AsyncGrpcStream(AsyncStream):
    """Over gRPC, which holds back who sends more than the server has read."""

    def __init__(self, call: Any, told: Told) -> None:
        """Reads from `call`, in a task, until it ends; `told` makes of gRPC's error what whoever waits is told."""
        super().__init__()
        self._call = call
        self._reader = asyncio.ensure_future(_read(weakref.ref(self), call, told))
        loop = asyncio.get_running_loop()
        weakref.finalize(self, _cancel, call, loop, self._home).atexit = False

    async def _send(self, data: bytes) -> None:
        try:
            await self._call.write(data)
        except (grpc.RpcError, asyncio.InvalidStateError):
            pass  # the reader learns why, and tells whoever waits

    async def close(self) -> None:
        """Ends the stream, and all that is under way."""
        await super().close()
        self._call.cancel()
        await asyncio.wait([self._reader])


async def _read(reference: weakref.ref[AsyncGrpcStream], call: Any, told: Told) -> None:
    """Gives answers to a stream for as long as somebody has it."""
    end: AttndError = Disconnected("the server ended the stream")
    try:
        while (data := await call.read()) is not grpc.aio.EOF:
            stream = reference()
            if stream is None:
                return
            stream._answered(requests.attend_reply(data))
            del stream
    except grpc.RpcError as error:
        end = await told(error)
    except (AttndError, asyncio.CancelledError) as error:
        end = error if isinstance(error, AttndError) else Disconnected("the session was closed")
    stream = reference()
    if stream is not None:
        stream._end(end)


def _cancel(call: Any, loop: asyncio.AbstractEventLoop, home: Home) -> None:
    """Ends a call whose stream nobody has any more, from any thread."""
    if home.is_here and not loop.is_closed():
        loop.call_soon_threadsafe(call.cancel)
    else:
        forks.keep(call)
