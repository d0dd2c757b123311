"""The gRPC side: bytes in, bytes out, errors as statuses. Everything else is in `service`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc

from attnd.errors import AttndError, Exhausted, Unauthenticated
from attnd.v1 import attention_pb2
from attnd_server.execution.step import Call
from attnd_server.execution.work import Work
from attnd_server.identity import Principals, refuse_if_revoked
from attnd_server.rpc.arrivals import Reader
from attnd_server.rpc.calls_of_turn import CallsOfTurn
from attnd_server.rpc.handlers import GONE, reads_late, until_client_goes
from attnd_server.rpc.reply_order import ReplyOrder
from attnd_server.rpc.rpcs import Rpcs, large_bytes
from attnd_server.rpc.running import soonest
from attnd_server.rpc.shares import SMALL_BYTES
from attnd_server.rpc.until_revoked import TELL_S, until_revoked
from attnd_server.service.kv_requests import READ_CHUNK_BYTES
from attnd_server.service.service import AttentionService, error_response
from attnd_server.service.session import AttendSession, BigStep

SERVICE_NAME = attention_pb2.DESCRIPTOR.services_by_name["AttentionService"].full_name
# Unary methods whose requests have tensors: they wait while their principal's other messages hold enough. The others'
# do not, because a lease may depend on them.
LARGE = frozenset({"Prefill", "Decode", "CopyPages"})
NOTHING = nullcontext()
if TYPE_CHECKING:
    from attnd_server.rpc.rpcs import Context


class Messages:
    """The messages of a stream. gRPC's own iterator keeps each, however large, until the next one has come.

    They are counted here, not by `Reader.read`: a call's way down enters no file more for it.
    """

    def __init__(self, context: Context, reader: Reader) -> None:
        """Of the stream that `context` is of, which `reader` reads."""
        self._context = context
        self._reader = reader

    def __aiter__(self) -> Messages:
        """Itself."""
        return self

    async def __anext__(self) -> bytes:
        """The next one."""
        reader = self._reader
        reader.is_waiting = True
        data: Any = await self._context.read()
        reader.is_waiting = False
        if data is grpc.aio.EOF:
            raise StopAsyncIteration
        reader.handed.num_bytes += len(data)
        reader.handed.num_messages += 1
        return data  # type: ignore[no-any-return]


class AttentionServicer(Rpcs, grpc.GenericRpcHandler):
    """Serves `attnd.v1.AttentionService` on an asyncio server.

    Messages pass as bytes: `service` parses them. A deserializer that fails inside gRPC can only say INTERNAL.
    """

    def __init__(self, service: AttentionService, principals: Principals | None = None) -> None:
        """Serves `service` to those whom `principals` lets in; None: to everybody."""
        super().__init__(service, principals)
        # Reads no message, however large: gRPC waits until it asks for one.
        self._refusing: Any = grpc.stream_stream_rpc_method_handler(self._refuse)
        self._calls = CallsOfTurn(service.executor)
        self._num_streams = self._num_unary = 0  # Attend streams that are open; RPCs with one request
        unary: dict[str, Any] = {
            name: reads_late(self._unary(method), partial(self._only_request, waits=name in LARGE))
            for name, method in service.unary.items()
        }
        self._handlers = {
            **unary,
            "Attend": grpc.stream_stream_rpc_method_handler(self._until_revoked(self.attend)),
            "StoreKv": grpc.stream_stream_rpc_method_handler(self._until_revoked(self.store_kv)),
            "ReadKv": reads_late(self._until_revoked(self.read_kv), self._only_request, streams=True),
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

    def _unary(self, method: Callable[[bytes, str], bytes | Work]) -> Any:
        async def handler(data: bytes, context: Context) -> bytes:
            self._num_unary += 1
            try:
                principal = self._principals.of(context)
                is_small = len(data) <= SMALL_BYTES
                holding = NOTHING if is_small else self._shares.of(principal).holding(len(data))
                with self._open.busy(), holding:
                    work = await self._checked(method, data, principal)
                    answer = self._at_once(work)
                    return await self._answered(work, context, principal) if answer is None else answer
            except Exception as error:
                await self._abort(context, error)
            finally:
                self._num_unary -= 1

        return handler

    def _at_once(self, work: bytes | Work) -> bytes | None:
        """What a small call of a lone worker gives, without two switches of thread; None: it is none, or must wait.

        The worker may have one stream as well: what waits for the event loop then would wait for the device too.
        """
        if self._num_unary == 1 and self._num_streams <= 1 and isinstance(work, Call) and work.is_small:
            return self._service.executor.run_now(work)
        return None

    def _until_revoked(self, method: Callable[[Any, Context], Awaitable[None]]) -> Any:
        """A method with a stream, which ends also where it waits for a client whose token has gone."""

        async def handler(request: Any, context: Context) -> None:
            try:
                principal = self._principals.of(context)
                with until_revoked(self._service.opened, principal), until_client_goes():
                    if isinstance(request, bytes):
                        await method(request, context)
                    else:
                        with self.arrivals.reading(context, principal) as reader:
                            await method(Messages(context, reader), context)
            except (Unauthenticated, Exhausted) as error:
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

        share = self._shares.of(principal)
        answers = ReplyOrder(write, partial(self._told, session), share)
        rpc = self._open.add(lambda: bool(answers.waiting) or session.is_under_way())
        going_away = asyncio.ensure_future(self._going_away(rpc, writing, context))
        try:
            async for data in requests:
                is_alone = self._num_streams == 1 and not answers.waiting  # so that nobody waits for the event loop
                num_bytes, num_held = 0, share.take_message(len(data)) if len(data) > SMALL_BYTES else 0
                answer: Any = None
                try:
                    answer = self._begin(session, data, is_alone)
                    if isinstance(answer, BigStep):
                        answer = await self._opened(session, answer, principal)
                    elif not isinstance(answer, bytes):
                        with rpc.busy():
                            if num_bytes := large_bytes(answer):
                                await answers.room(num_bytes)
                            answer = await self._shared(session, answer, context)
                finally:
                    if num_held:
                        share.let_go(num_held, answer)
                del data  # while nothing comes, nothing is kept
                if num_bytes or answers.waiting or not isinstance(answer, bytes):
                    await answers.put(answer, num_bytes)
                else:
                    await write(answer)
                del answer
                while share.message_bytes >= share.most_message_bytes:
                    await share.wait()
            await answers.finish()
        finally:
            self._service.sessions.give_back(principal)
            self._num_streams -= 1
            self._open.remove(rpc)
            going_away.cancel()
            answers.close()
            session.close()

    def _begin(self, session: AttendSession, data: bytes, is_alone: bool) -> bytes | BigStep | Work:
        """The answer to a message of a stream; or work that is not begun: all but short calls of a lone stream."""
        try:
            answer = session.request_in_parts(data)
            if is_alone and isinstance(answer, Call) and answer.is_small:
                result = self._service.executor.run_now(answer)
                return answer if result is None else result
            return answer
        except Exception as error:
            return self._told(session, error)

    async def _shared(self, session: AttendSession, work: Work, context: Context) -> bytes | asyncio.Future[bytes]:
        """The answer to a short call, which runs with those that other streams bring in the same turn, or to an error.

        Or what will be the answer once the executor has run some work.
        """
        try:
            return await self._calls.answer(work, soonest(context, work), session.is_wanted)
        except Exception as error:
            return self._told(session, error)

    async def _opened(self, session: AttendSession, step: BigStep, principal: str) -> bytes:
        """The answer to a step that others do not wait for. Its stream does: the next message may be a call of it."""
        try:
            return await self._beside(step.answer, principal)
        except Exception as error:
            return self._told(session, error)

    def _told(self, session: AttendSession, error: Exception) -> bytes:
        return error_response(attention_pb2.AttendResponse, session.told(error))

    async def store_kv(self, requests: AsyncIterator[bytes], context: Context) -> None:
        """StoreKv: each chunk gets one answer, in order."""
        try:
            principal = self._principals.of(context)
            self._service.sessions.take(principal)
        except AttndError as error:
            await self._abort(context, error)
        share, writing, rpc = self._shares.of(principal), asyncio.Lock(), self._open.add()
        ending = asyncio.ensure_future(self._end_when_idle(rpc, writing, context))
        try:
            async for data in requests:
                with rpc.busy(), share.holding(len(data)):
                    answer = await self._stored(data, principal, context)
                    del data
                async with writing:
                    await context.write(answer)
                while not share.reads_on():
                    await share.wait()
        finally:
            self._service.sessions.give_back(principal)
            self._open.remove(rpc)
            ending.cancel()

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
            share = self._shares.of(principal)
            with self._service.sessions.held(principal), self._open.opened() as rpc:
                for work in await self._checked(self._service.kv.read_kv, data, principal):
                    rpc.goes_on()
                    async with share.answering(READ_CHUNK_BYTES):
                        answer = await self._finish(work, context, principal)
                        rpc.goes_on()
                        await context.write(answer)
        except GONE:
            raise  # see `until_client_goes`
        except Exception as error:
            await self._abort(context, error)
