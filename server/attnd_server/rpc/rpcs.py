"""What all methods of the service have in common: how they read, wait for the executor, and end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import grpc
from google.protobuf import any_pb2

from attnd.errors import STATUS_DETAILS_KEY, AttndError, Disconnected, InvalidRequest, to_message
from attnd.v1 import attention_pb2, error_pb2
from attnd_server.execution.step import Call
from attnd_server.execution.work import Work
from attnd_server.identity import Principals, wanted_until_revoked
from attnd_server.rpc.arrivals import Arrivals
from attnd_server.rpc.handlers import until_client_goes
from attnd_server.rpc.open_rpcs import OpenRpc, OpenRpcs
from attnd_server.rpc.running import soonest, start_on
from attnd_server.rpc.shares import SMALL_BYTES, Shares
from attnd_server.service.service import AttentionService

# Bytes of a message from which its check is worth a thread of its own: up to then it takes some milliseconds at most.
BIG_MESSAGE_BYTES = 1 << 20
# Checks of big messages at one time: few, so that whoever sends them does not take the cores from everybody.
MAX_CHECKS = 2
Result = TypeVar("Result")
# Messages pass as bytes, both ways.
if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[bytes, bytes]


class Rpcs:
    """A service and those who call it.

    Attributes:
        arrivals: what has come of their messages, and is not whole.
    """

    def __init__(self, service: AttentionService, principals: Principals | None) -> None:
        """Serves `service` to those whom `principals` lets in; None: to everybody."""
        self._service = service
        self._principals = principals or Principals()
        self._open = OpenRpcs()
        self._checks = ThreadPoolExecutor(MAX_CHECKS, "checks")
        num_checks = max(1, MAX_CHECKS // 2) if service.config.asks_who_calls else MAX_CHECKS
        self.arrivals = Arrivals(service.config.max_message_bytes)
        self._shares = Shares(service.config, num_checks, 2 * service.caches.share.queue_depth)

    def drain(self) -> None:
        """Refuses new steps and tells every stream."""
        self._service.drain()
        self._open.drain()

    async def wait_until_idle(self, timeout_s: float) -> None:
        """Waits until nothing is under way any more, but not for longer; streams with nothing under way have ended."""
        await self._open.wait_until_idle(timeout_s)

    async def _only_request(self, context: Context, waits: bool = False) -> bytes:
        """The request of a method that has one. What comes behind it is never read.

        Args:
            context: of its RPC.
            waits: whether it is read only once the principal's other messages leave room for it.
        """
        try:
            principal = self._principals.of(context)
            share = self._shares.of(principal)
            if waits and not share.reads_on():
                await share.until_it_reads_on()
            share.begin_unary()
            finished: Any = context.add_done_callback
            finished(share.finish_unary)
            with self.arrivals.reading(context, principal, once=True) as reader:
                data: Any = await reader.read(context)
        except AttndError as error:
            await self._abort(context, error)
        if data is grpc.aio.EOF:
            await self._abort(context, InvalidRequest("the RPC has no message, but must have one"))
        return data  # type: ignore[no-any-return]

    async def _answered(self, answer: bytes | Work, context: Context, principal: str) -> bytes:
        """As `_finish`, once there is room for the answer. It counts until the RPC has ended, and was taken."""
        if num_bytes := large_bytes(answer):
            share = self._shares.of(principal)
            await share.room(num_bytes)
            done: Any = context.add_done_callback
            done(lambda _: share.give_back_answer(num_bytes))
        return await self._finish(answer, context, principal)

    async def _checked(self, check: Callable[[bytes, str], Result], data: bytes, principal: str) -> Result:
        """What `check` makes of a message; others do not wait for that of a big one."""
        if len(data) > BIG_MESSAGE_BYTES:
            return await self._beside(partial(check, data, principal), principal)
        return check(data, principal)

    async def _beside(self, check: Callable[[], Result], principal: str) -> Result:
        """What `check` gives, on another thread: it takes long, and numpy lets the event loop go on meanwhile.

        Principals take turns: those of one wait for each other, even if nobody waits for what a thread does any more.
        """
        loop, turns = asyncio.get_running_loop(), self._shares.of(principal).checks
        await turns.acquire()
        checking = self._checks.submit(check)
        checking.add_done_callback(lambda _: loop.call_soon_threadsafe(turns.release))
        return await asyncio.wrap_future(checking)

    async def _finish(self, answer: bytes | Work, context: Context, principal: str) -> bytes:
        """The answer itself, or what its work gives on the executor if the principal's token is good at its turn."""
        if isinstance(answer, bytes):
            return answer
        timeout_s = soonest(context, answer)
        return await start_on(self._service.executor, answer, timeout_s, wanted_until_revoked(principal))

    async def _going_away(self, rpc: OpenRpc, writing: asyncio.Lock, context: Context) -> None:
        """Tells a stream that the server drains, and ends it as soon as it has nothing under way."""
        await self._open.drained()
        reply = attention_pb2.AttendResponse(going_away=attention_pb2.GoingAway(reason="the server is draining"))
        async with writing:
            with until_client_goes():
                await context.write(reply.SerializeToString())
        await self._end_when_idle(rpc, writing, context)

    async def _end_when_idle(self, rpc: OpenRpc, writing: asyncio.Lock, context: Context) -> None:
        await self._open.drained()
        await rpc.idle()
        async with writing:
            try:
                await self._abort(context, Disconnected("the server is draining: reconnect elsewhere or later"))
            except grpc.aio.AbortError:
                pass  # so does whoever reads from the stream or writes to it, which ends it

    def _known(self, context: Context) -> str:
        """The principal of an RPC; "": it proves nobody."""
        try:
            return self._principals.of(context)
        except AttndError:
            return ""

    async def _abort(self, context: Context, error: Exception) -> NoReturn:
        """Ends an RPC with the status of `error`, and with its details in the trailer that gRPC has for them."""
        told = self._service.told(error, self._known(context))
        detail = any_pb2.Any()
        detail.Pack(to_message(told))
        status = error_pb2.Status(code=told.code.value[0], message=str(told), details=[detail])
        with until_client_goes():
            await context.abort(told.code, str(told), ((STATUS_DETAILS_KEY, status.SerializeToString()),))


def large_bytes(work: bytes | Work) -> int:
    """Bytes of the tensors that some work will answer with, known before it starts; 0 where they are not many."""
    if not isinstance(work, Call) or work.q is None:
        return 0
    config = work.step.group.config
    num_rows = work.q.numel() // config.head_dim
    num_bytes = num_rows * (config.head_dim_v * config.dtype.itemsize + 4 * work.options.return_lse)
    return num_bytes if num_bytes > SMALL_BYTES else 0
