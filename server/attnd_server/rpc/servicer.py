"""The gRPC side: bytes in, bytes out, errors as statuses. Everything else is in `service`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import grpc
from google.protobuf import any_pb2

from attnd.errors import STATUS_DETAILS_KEY, AttndError, InvalidRequest, Unauthenticated, to_message
from attnd.v1 import attention_pb2, error_pb2
from attnd_server.execution.executor import Executor
from attnd_server.execution.step import Call
from attnd_server.execution.work import Work
from attnd_server.identity import Principals, refuse_if_revoked, wanted_until_revoked
from attnd_server.rpc.handlers import LateReading
from attnd_server.rpc.reply_order import ReplyOrder
from attnd_server.rpc.until_revoked import TELL_S, until_revoked
from attnd_server.service.service import AttentionService, error_response
from attnd_server.service.session import AttendSession, BigStep

SERVICE_NAME = attention_pb2.DESCRIPTOR.services_by_name["AttentionService"].full_name
# Bytes of a message from which its check is worth a thread of its own: up to then it takes some milliseconds at most.
BIG_MESSAGE_BYTES = 1 << 20
# Such checks at one time.
MAX_CHECKS = 2
Result = TypeVar("Result")
# Messages pass as bytes, both ways.
if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[bytes, bytes]


class AttentionServicer(grpc.GenericRpcHandler):
    """Serves `attnd.v1.AttentionService` on an asyncio server.

    Messages pass as bytes: `service` parses them, because a deserializer that fails inside gRPC can only say INTERNAL.
    """

    def __init__(self, service: AttentionService, principals: Principals | None = None) -> None:
        """Serves `service` to those whom `principals` lets in; None: to everybody."""
        self._service = service
        self._principals = principals or Principals()
        # Of a method with messages either way: gRPC does not read the first one, however large, before it asks for it.
        self._refusing: Any = grpc.stream_stream_rpc_method_handler(self._refuse)
        self._drain = asyncio.Event()
        # Few, so that whoever sends big messages does not take the cores from everybody.
        self._checks = ThreadPoolExecutor(MAX_CHECKS, "checks")
        self._num_streams = 0  # Attend streams that are open
        unary: dict[str, Any] = {
            name: LateReading(self._unary(method), self._only_request) for name, method in service.unary.items()
        }
        self._handlers = {
            **unary,
            "Attend": grpc.stream_stream_rpc_method_handler(self._until_revoked(self.attend)),
            "StoreKv": grpc.stream_stream_rpc_method_handler(self._until_revoked(self.store_kv)),
            "ReadKv": LateReading(self._until_revoked(self.read_kv), self._only_request, streams=True),
        }

    def service_name(self) -> str:
        """For gRPC's registry."""
        return SERVICE_NAME

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        """The handler of a method, or None if it is not ours."""
        service, _, method = details.method.lstrip("/").partition("/")
        if service != SERVICE_NAME or method not in self._handlers:
            return None
        refusal = self._principals.refusal(details.invocation_metadata or ())
        return self._handlers[method] if refusal is None else self._refusing

    async def _only_request(self, context: Context) -> bytes:
        """The request of a method that has one. What comes behind it is never read."""
        data: Any = await context.read()
        if data is grpc.aio.EOF:
            await self._abort(context, InvalidRequest("the RPC has no message, but must have one"))
        return data  # type: ignore[no-any-return]

    def drain(self) -> None:
        """Refuses new steps and tells every stream."""
        self._service.drain()
        self._drain.set()

    def _unary(self, method: Callable[[bytes, str], bytes | Work]) -> Any:
        async def handler(data: bytes, context: Context) -> bytes:
            try:
                principal = self._principals.of(context)
                return await self._finish(await self._checked(method, data, principal), context, principal)
            except Exception as error:
                await self._abort(context, error)

        return handler

    def _until_revoked(self, method: Callable[[Any, Context], Awaitable[None]]) -> Any:
        """A method with a stream, which ends also where it waits for a client whose token has gone."""

        async def handler(request: Any, context: Context) -> None:
            try:
                with until_revoked(self._service.opened, self._principals.of(context)):
                    await method(request, context)
            except Unauthenticated as error:
                await asyncio.wait_for(self._abort(context, error), TELL_S)

        return handler

    async def _refuse(self, _: AsyncIterator[bytes], context: Context) -> None:
        """An RPC of nobody: ends it and reads nothing of it."""
        refusal = self._principals.refusal(context.invocation_metadata() or ())
        await self._abort(context, refusal or Unauthenticated("the tokens have just changed; send it again"))

    async def attend(self, requests: AsyncIterator[bytes], context: Context) -> None:
        """Attend: each message gets one answer, in order; an error is an answer too.

        The next message is read, checked and queued while a call runs.
        """
        try:
            principal = self._principals.of(context)
            session = self._service.open_session(principal)
            self._service.sessions.take(principal)
        except AttndError as error:
            await self._abort(context, error)
        self._num_streams += 1
        writing = asyncio.Lock()  # gRPC allows one write at a time

        async def write(answer: bytes) -> None:
            async with writing:
                await context.write(answer)

        going_away = asyncio.ensure_future(self._going_away(write))
        answers = ReplyOrder(write, partial(self._told, session))
        try:
            async for data in requests:
                # A lone worker waits for this answer, and nobody waits for the event loop.
                is_alone = self._num_streams == 1 and not answers.waiting
                answer = self._begin(session, data, is_alone, context)
                if isinstance(answer, BigStep):
                    answer = await self._opened(session, answer)
                # As `put` would, for whom it saves a task: a lone worker's answer takes no way round.
                if answers.waiting or not isinstance(answer, bytes):
                    await answers.put(answer)
                else:
                    await write(answer)
            await answers.finish()
        finally:
            self._service.sessions.give_back(principal)
            self._num_streams -= 1
            going_away.cancel()
            answers.close()

    def _begin(
        self, session: AttendSession, data: bytes, is_alone: bool, context: Context
    ) -> bytes | asyncio.Future[bytes] | BigStep:
        """The answer to a message of a stream, or what will be it once the executor has run its call."""
        executor = self._service.executor
        try:
            answer = session.request_in_parts(data)
            if isinstance(answer, (bytes, BigStep)):
                return answer
            if is_alone and isinstance(answer, Call) and answer.is_small:
                result = executor.run_now(answer)
                if result is not None:
                    return result
            return start_on(executor, answer, _soonest(context, answer), session.is_wanted)
        except Exception as error:
            return self._told(session, error)

    async def _opened(self, session: AttendSession, step: BigStep) -> bytes:
        """The answer to a step that others do not wait for. Its stream does: the next message may be a call of it."""
        try:
            return await self._beside(step.answer)
        except Exception as error:
            return self._told(session, error)

    async def _checked(self, check: Callable[[bytes, str], Result], data: bytes, principal: str) -> Result:
        """What `check` makes of a message; others do not wait for that of a big one."""
        if len(data) > BIG_MESSAGE_BYTES:
            return await self._beside(partial(check, data, principal))
        return check(data, principal)

    async def _beside(self, check: Callable[[], Result]) -> Result:
        """What `check` gives, on another thread: it takes long, and numpy lets the event loop go on meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self._checks, check)

    def _told(self, session: AttendSession, error: Exception) -> bytes:
        return error_response(attention_pb2.AttendResponse, session.told(error))

    async def _going_away(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        await self._drain.wait()
        reply = attention_pb2.AttendResponse(going_away=attention_pb2.GoingAway(reason="the server is draining"))
        await write(reply.SerializeToString())

    async def store_kv(self, requests: AsyncIterator[bytes], context: Context) -> None:
        """StoreKv: each chunk gets one answer, in order."""
        try:
            principal = self._principals.of(context)
            self._service.sessions.take(principal)
        except AttndError as error:
            await self._abort(context, error)
        try:
            async for data in requests:
                await context.write(await self._stored(data, principal, context))
        finally:
            self._service.sessions.give_back(principal)

    async def _stored(self, data: bytes, principal: str, context: Context) -> bytes:
        """The answer to a chunk of StoreKv."""
        try:
            refuse_if_revoked(principal)
            work = await self._checked(self._service.kv.store_kv, data, principal)
            return await self._finish(work, context, principal)
        except Exception as error:
            return error_response(attention_pb2.StoreKvResponse, self._service.told(error, principal))

    async def read_kv(self, data: bytes, context: Context) -> None:
        """ReadKv: one chunk after the other, so that no more than one waits in memory."""
        try:
            principal = self._principals.of(context)
            with self._service.sessions.held(principal):
                for work in await self._checked(self._service.kv.read_kv, data, principal):
                    await context.write(await self._finish(work, context, principal))
        except Exception as error:
            await self._abort(context, error)

    async def _finish(self, answer: bytes | Work, context: Context, principal: str) -> bytes:
        """The answer itself, or what its work gives on the executor if the principal's token is good at its turn."""
        if isinstance(answer, bytes):
            return answer
        timeout_s = _soonest(context, answer)
        return await start_on(self._service.executor, answer, timeout_s, wanted_until_revoked(principal))

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
        await context.abort(told.code, str(told), ((STATUS_DETAILS_KEY, status.SerializeToString()),))


def start_on(
    executor: Executor, work: Work, timeout_s: float | None = None, is_wanted: Callable[[], bool] | None = None
) -> asyncio.Future[bytes]:
    """Queues `work` for the executor, unless the future is cancelled before its turn: what it will give.

    gRPC cancels whoever waits when the client cancels the RPC, its connection ends or its deadline passes.
    Raises what `Executor.submit` raises.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[bytes] = loop.create_future()

    def settle(result: bytes | None, error: BaseException | None) -> None:
        if future.done():  # the caller is gone
            return
        if error is None:
            future.set_result(result or b"")
        else:
            future.set_exception(error)

    def done(result: bytes | None, error: BaseException | None) -> None:
        loop.call_soon_threadsafe(settle, result, error)

    def cancel_if_cancelled(future: asyncio.Future[bytes]) -> None:
        if future.cancelled():
            executor.cancel(job)

    job = executor.submit(work, done, timeout_s, is_wanted)
    future.add_done_callback(cancel_if_cancelled)
    return future


def _soonest(context: Context, work: Work) -> float | None:
    """Seconds within which work must have started: those that its RPC has left or its call allows; None is forever."""
    left_s, timeout_s = context.time_remaining(), work.step.call_timeout_s if isinstance(work, Call) else None
    return min((each for each in (left_s, timeout_s) if each is not None), default=None)
