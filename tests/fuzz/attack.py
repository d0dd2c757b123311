"""Sends a world's server requests of every kind, valid, almost valid and wild, and checks each answer's effect."""

from __future__ import annotations

import asyncio
import mmap
import random
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from typing import Any

from google.protobuf.message import Message

from attnd.protocol.regions import Region
from attnd.protocol.shm import framing
from attnd.v1 import attention_pb2, cache_pb2, error_pb2, status_pb2, step_pb2, tensor_pb2
from attnd_server.planes.shm.connection import ShmConnection
from attnd_server.service.replies import RegionReplies
from tests.fuzz import tensors, valid
from tests.fuzz.context import Context, Ended
from tests.fuzz.decoder import FRAMES
from tests.fuzz.decoder import check as check_decoder
from tests.fuzz.mutations import mutate, mutate_bytes
from tests.fuzz.pool import Pool
from tests.fuzz.stream_model import REGION_BYTES, StreamModel, parsed_request
from tests.fuzz.valid_steps import Sent, with_deltas
from tests.fuzz.valid_steps import step as valid_step
from tests.fuzz.world import CALLER, World, integers

_REPLY = struct.Struct("<I28x")


class Attack:
    """Attacks `world` as `random_` decides.

    Attributes:
        outcomes: how often each method came to "done", or to the name of what it was refused for.
    """

    def __init__(self, world: World, random_: random.Random) -> None:
        """Has done nothing yet."""
        self.world = world
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self._random = random_
        self._methods = sorted({*world.service.unary, "ReadKv"})
        self._memory = mmap.mmap(-1, REGION_BYTES)
        self._memory[:] = (tensors.BYTES[tensor_pb2.DTYPE_FLOAT32] * 2)[:REGION_BYTES]
        self._ends = socket.socketpair()

    @property
    def num_requests(self) -> int:
        """Requests that were answered."""
        return self.outcomes.total()

    def __enter__(self) -> Attack:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Gives back what it has of the system."""
        for end in self._ends:
            end.close()

    async def go(self) -> None:
        """One RPC, with one request or a stream of them."""
        kind = self._random.random()
        if kind < 0.35:
            await self._attend()
        elif kind < 0.5:
            self._attend_in_region()
        elif kind < 0.6:
            await self._store_kv()
        else:
            await self._unary(self._random.choice(self._methods))

    # --- what is sent ------------------------------------------------------------------------------------------

    def _pool(self) -> Pool:
        return self._random.choice(self.world.own)

    def _spoiled(self, message: Any) -> bytes:
        """A message, mostly with one to three things wrong, sometimes with its bytes shuffled, sometimes any bytes."""
        kind = self._random.random()
        if kind < 0.02:
            return bytes(self._random.randrange(256) for _ in range(self._random.randrange(60)))
        if kind < 0.75:
            for _ in range(self._random.choice((1, 1, 1, 2, 3))):
                mutate(message, self._random, self.world.refs)
        data: bytes = message.SerializeToString()
        return mutate_bytes(data, self._random) if kind > 0.93 else data

    async def _unary(self, method: str) -> None:
        data = self._spoiled(valid.unary(self._random, method, self._pool().info))
        context, doing = Context(data), f"{method} {data.hex()}"
        handler: Any = self.world.servicer._handlers[method]
        try:
            if method == "ReadKv":
                await handler.stream_stream(None, context)
            else:
                context.answers.append(await handler.stream_unary(None, context))
        except Ended:
            assert context.code is not None
            self._count(method, context.code.name, doing)
        else:
            self._count(method, "done", doing)
            self._done(method, data, context.answers)
        finally:
            context.end()
        if f"{method}Request" in FRAMES:
            check_decoder(f"{method}Request", data)
        self.world.check(doing)

    async def _store_kv(self) -> None:
        sent = [
            self._spoiled(valid.store_kv(self._random, self._pool().info)) for _ in range(self._random.randint(1, 3))
        ]
        context, doing = Context(), f"StoreKv {[data.hex() for data in sent]}"
        await self.world.servicer.store_kv(_stream(sent), context)  # type: ignore[arg-type]
        context.end()
        for data, answer in zip(sent, context.answers, strict=True):
            reply = attention_pb2.StoreKvResponse.FromString(answer)
            self._count("StoreKv", _reason(reply), doing)
            if not reply.HasField("error"):
                request = attention_pb2.StoreKvRequest.FromString(data)
                slots = integers(request.slot_mapping)
                assert reply.num_slots == len(slots)
                self.world.pool(request.cache).stored(request.layer, slots, request.k.data, request.v.data)
            check_decoder("StoreKvRequest", data)
        self.world.check(doing)

    def _steps_and_calls(self) -> Iterable[Any]:
        """Messages of a stream, each valid if those before it are done."""
        last: Sent | None = None
        pool = self._pool()
        for step_id in sorted(self._random.sample(range(20), self._random.randint(1, 4))):
            if self._random.random() < 0.1:
                pool = self._pool()
            step = valid_step(self._random, pool.info, step_id)
            message = attention_pb2.AttendRequest(step=step)
            if last is not None and self._random.random() < 0.5:
                with_deltas(self._random, message.step, last)
            yield message
            for _ in range(self._random.randint(0, 3)):
                yield attention_pb2.AttendRequest(call=valid.call(self._random, pool.info, step))
            last = Sent.of(step)

    async def _attend(self) -> None:
        sent = [
            self._spoiled(message) if self._random.random() < 0.4 else message.SerializeToString()
            for message in self._steps_and_calls()
        ]
        context, doing = Context(), f"Attend {[data.hex() for data in sent]}"
        await self.world.servicer.attend(_stream(sent), context)  # type: ignore[arg-type]
        context.end()
        model = StreamModel(self.world)
        for data, answer in zip(sent, context.answers, strict=True):
            reply = attention_pb2.AttendResponse.FromString(answer)
            self._count("Attend", _reason(reply), doing)
            model.answered(parsed_request(data), reply, None)
            check_decoder("AttendRequest", data)
        self.world.check(doing)

    def _attend_in_region(self) -> None:
        """As a shm plane does it, with the server's own code behind the socket."""
        world, random_ = self.world, self._random
        session = world.service.open_session(CALLER, RegionReplies(Region(1, self._memory)))
        connection = ShmConnection(world.service, session, self._ends[0])
        model, doing = StreamModel(world), "a region's "
        for message in self._steps_and_calls():
            lane = random_.choice((0, 0, 0, 1, 3, 4, 2**32 - 1))
            if message.WhichOneof("message") == "call":
                self._move_to_region(message.call)
            data = self._spoiled(message) if random_.random() < 0.4 else message.SerializeToString()
            requests = [framing.Request(0, 0, lane, data)]
            while random_.random() < 0.3:
                step_id = random_.choice([*model.steps]) if model.steps and random_.random() < 0.9 else 7
                requests.append(framing.Request(random_.choice((0, 1, 0, 1, 0, 1, 2, 2**32 - 1)), step_id, lane, b""))
            for request in requests:
                doing += f"{request.layer} {request.step_id} {request.lane} {request.message.hex()}, "
                before = bytes(self._memory)
                answer = connection.finish(connection.begin(request))
                reply = attention_pb2.AttendResponse.FromString(answer[_REPLY.size :])
                assert _REPLY.unpack_from(answer)[0] == len(answer) - _REPLY.size
                is_repeated = len(answer) == _REPLY.size
                self._count("shm", "done" if is_repeated else _reason(reply), doing)
                model.answered_in_region(request, reply, is_repeated, before)
                world.check(doing)

    def _move_to_region(self, call: step_pb2.Call) -> None:
        """Puts the tensors of a call into the region, one behind the other."""
        offset = 64 * self._random.randint(0, 3)
        for name in ("q", "k", "v"):
            if call.HasField(name) and self._random.random() < 0.8:
                tensor = getattr(call, name)
                size = len(tensor.data)
                if offset + size > REGION_BYTES:  # of a cache that a request made
                    return
                self._memory[offset : offset + size] = tensor.data
                tensor.region.id, tensor.region.offset = 1, offset
                offset += -(-size // 64) * 64
        if self._random.random() < 0.7:
            call.reply.id, call.reply.offset = 1, offset

    # --- what came of it ---------------------------------------------------------------------------------------

    def _count(self, method: str, outcome: str, doing: str) -> None:
        self.outcomes[method, outcome] += 1
        assert outcome not in ("INTERNAL", "UNKNOWN"), doing

    def _done(self, method: str, data: bytes, answers: list[bytes]) -> None:
        """Follows a unary request that was done."""
        world = self.world
        if method == "CreateCache":
            world.created(cache_pb2.CreateCacheResponse.FromString(answers[0]).cache)
        elif method == "DeleteCache":
            world.deleted(cache_pb2.DeleteCacheRequest.FromString(data).cache)
        elif method == "CopyPages":
            request = cache_pb2.CopyPagesRequest.FromString(data)
            groups = world.pool(request.cache).groups
            assert request.group < len(groups), "pages were copied in a layer group that is none"
            groups[request.group].copied(integers(request.source_pages), integers(request.target_pages))
        elif method in ("Prefill", "Decode"):
            message_type = attention_pb2.PrefillRequest if method == "Prefill" else attention_pb2.DecodeRequest
            request = message_type.FromString(data)
            world.attended(request.step, request.call, request.call.k.data, request.call.v.data)
        elif method == "ReadKv":
            self._read(attention_pb2.ReadKvRequest.FromString(data), answers)
        elif method == "ListCaches":
            listed = cache_pb2.ListCachesResponse.FromString(answers[0]).caches
            assert len(listed) == sum(pool.cache.principal == CALLER for pool in world.pools.values())
        elif method == "GetStatus":
            self._told_status(status_pb2.GetStatusResponse.FromString(answers[0]))
        elif method not in ("GetCapabilities", "OpenPlane", "ClosePlane"):
            world.pool(cache_pb2.RenewCacheRequest.FromString(data).cache)  # all that name a cache do so alike

    def _told_status(self, status: status_pb2.GetStatusResponse) -> None:
        """The caller is no operator: it learns of itself."""
        own = [pool for pool in self.world.pools.values() if pool.cache.principal == CALLER]
        assert not status.shows_everybody
        assert [(row.principal, row.num_caches) for row in status.principals] == [(CALLER, len(own))]
        assert {row.principal for row in status.sessions} <= {CALLER}

    def _read(self, request: attention_pb2.ReadKvRequest, answers: list[bytes]) -> None:
        pool, slots = self.world.pool(request.cache), integers(request.slot_mapping)
        chunks = [attention_pb2.ReadKvResponse.FromString(answer) for answer in answers]
        group, layer = pool.place(request.layer)
        for part, name in enumerate(("k", "v")):
            read = b"".join(getattr(chunk, name).data for chunk in chunks)
            if part >= group.num_parts:
                assert not read
            elif group.is_exact(part):
                assert read == b"".join(group.row(part, layer, slot) for slot in slots)


def _reason(reply: Message | Any) -> str:
    """ "done", or why not."""
    if not reply.HasField("error"):
        return "done"
    return str(error_pb2.ErrorReason.Name(reply.error.reason).removeprefix("ERROR_REASON_"))


async def _stream(messages: list[bytes]) -> AsyncIterator[bytes]:
    for message in messages:
        yield message


async def attack(attack_: Attack, num_requests: int, told: Any = None) -> None:
    """Goes on until so many requests were answered; tells `told` of the count now and then."""
    while attack_.num_requests < num_requests:
        for _ in range(50):
            await attack_.go()
        if told is not None:
            told(attack_.num_requests)
        await asyncio.sleep(0)
