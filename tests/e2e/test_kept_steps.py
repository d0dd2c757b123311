"""What the open steps of a client take of the server's memory: so much, however few bytes ask for it."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

import attnd
from attnd.errors import from_message
from attnd.planes.grpc import SERVICE
from attnd.protocol import frames
from attnd.protocol.packing import int32_tensor
from attnd.protocol.shm import framing
from attnd.v1 import attention_pb2, step_pb2
from attnd_server.identity.tokens import add_token
from tests.raw_shm import RawClient
from tests.servers import ServerProcess, wait_for

GEOMETRY: dict[str, Any] = {
    "num_layers": 1,
    "num_kv_heads": 2,
    "head_dim": 16,
    "num_pages": 8,
    "page_size": 4,
    "dtype": "float32",
}
Q = K = V = torch.ones(1, 2, 16)
DECODE = attnd.StepMetadata([1], [0], [[0]], [0], kind="decode")
# Elements of the largest page table: 8 MiB, which a delta of some bytes may ask for.
MOST_ELEMENTS = 1 << 21
TABLE_BYTES = 4 * MOST_ELEMENTS
# Steps of as many streams: eight times 8 MiB of each where all are kept.
NUM_STREAMS, NUM_STEPS = 40, 9
# Half of the server's, where there are several principals.
PRINCIPAL_BYTES = 128 << 20


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[tuple[ServerProcess, attnd.Credentials, attnd.Credentials]]:
    tokens = str(folder / "tokens")
    names = [attnd.Credentials(add_token(tokens, name), tls=False) for name in ("mallory", "worker")]
    with ServerProcess(folder / "log", "--device", "cpu", "--tokens", tokens, "--drain-s", "0", *options) as server:
        yield server, names[0], names[1]
        log = server.log
    assert "internal error" not in log, log


def unfolding(cache: attnd.Cache, step_id: int, base_id: int, num_columns: int = MOST_ELEMENTS) -> bytes:
    """A step of a hundred bytes with a page table of many columns, the last of which is a page."""
    message = DECODE.to_message(step_id, cache.ref)
    message.ClearField("page_tables")
    delta = step_pb2.PageTableDelta(
        base_step_id=base_id,
        source_rows=int32_tensor([0], "source_rows"),
        max_pages=num_columns,
        indices=int32_tensor([num_columns - 1], "indices"),
        pages=int32_tensor([step_id % 8], "pages"),
    )
    message.page_table_delta.CopyFrom(delta)
    request = frames.step_request(message)
    assert len(request) < 250
    return request


Asks = Callable[[bytes], attention_pb2.AttendResponse]


@contextmanager
def inline(
    server: ServerProcess, client: attnd.Client, cache: attnd.Cache, credentials: attnd.Credentials
) -> Iterator[Asks]:
    asked: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    with grpc.insecure_channel(server.address) as channel:
        answers = channel.stream_stream(f"{SERVICE}Attend")(iter(asked.get, b""), metadata=credentials.metadata())

        def ask(request: bytes) -> attention_pb2.AttendResponse:
            asked.put(request)
            return attention_pb2.AttendResponse.FromString(next(answers))

        ask(frames.step_request(DECODE.to_message(1, cache.ref)))
        yield ask
        asked.put(b"")
        assert not list(answers)


@contextmanager
def shm(server: ServerProcess, client: attnd.Client, cache: attnd.Cache, _: attnd.Credentials) -> Iterator[Asks]:
    raw = RawClient(client, cache)

    def ask(request: bytes) -> attention_pb2.AttendResponse:
        raw.socket.sendall(framing.request_bytes(request))
        reply = raw.replies.receive()
        assert reply is not None
        return attention_pb2.AttendResponse.FromString(reply.message)

    try:
        yield ask
    finally:
        raw.socket.close()


@pytest.mark.parametrize("plane", [inline, shm])
def test_a_few_bytes_hold_no_more_than_a_principals_share(plane: Any, tmp_path: Path) -> None:
    with serving(tmp_path, "--socket-dir", str(tmp_path / "sockets")) as (server, mallorys, workers):
        with ExitStack() as stack:
            client = stack.enter_context(attnd.connect(server.address, credentials=mallorys))
            other = stack.enter_context(attnd.connect(server.address, credentials=workers))
            cache = stack.enter_context(client.create_cache(**GEOMETRY))
            with plane(server, client, cache, mallorys) as ask:  # what comes with the first of its kind is no table
                assert ask(unfolding(cache, 2, 1)).HasField("step")
            before = server.resident_bytes
            with ExitStack() as streams:
                errors = []
                for _ in range(NUM_STREAMS):
                    ask = streams.enter_context(plane(server, client, cache, mallorys))
                    base_id = 1
                    for step_id in range(2, 2 + NUM_STEPS):
                        answer = ask(unfolding(cache, step_id, base_id))
                        if answer.HasField("step"):
                            base_id = step_id
                        else:
                            errors.append(answer.error)
                taken = server.resident_bytes - before
                # One more may be in the making, and memory that was given back is not always the system's.
                assert taken < PRINCIPAL_BYTES + 8 * TABLE_BYTES
                assert errors
                refusals = [from_message(error) for error in errors]
                assert {type(refusal) for refusal in refusals} == {attnd.Exhausted}
                assert "open steps take" in str(refusals[0])
                assert f"a principal's limit is {PRINCIPAL_BYTES}" in str(refusals[0])

                # Another principal has its own share, and so have small steps of this one.
                theirs = streams.enter_context(other.create_cache(**GEOMETRY))
                with theirs.session() as session:
                    assert torch.equal(session.step(DECODE).attend(0, Q, K, V), V)
                with plane(server, other, theirs, workers) as ask:
                    assert ask(unfolding(theirs, 2, 1)).HasField("step")

            def is_free() -> bool:
                with plane(server, client, cache, mallorys) as ask:
                    return all(ask(unfolding(cache, step_id, step_id - 1)).HasField("step") for step_id in range(2, 12))

            wait_for(is_free, "the ends of streams give nothing back")


def test_calls_of_a_step_that_had_to_go_say_so(tmp_path: Path) -> None:
    with serving(tmp_path) as (server, mallorys, _):
        with attnd.connect(server.address, credentials=mallorys) as client, client.create_cache(**GEOMETRY) as cache:
            with inline(server, client, cache, mallorys) as ask:
                for step_id in range(2, 8):
                    assert ask(unfolding(cache, step_id, step_id - 1)).HasField("step")
                call = attention_pb2.AttendRequest(call=step_pb2.Call(step_id=2)).SerializeToString()
                error = ask(call).error
                assert error.field == "call.step_id"
                assert "call.step_id is 2, but the stream's open steps are: 4, 5, 6, 7" in error.message
                error = ask(unfolding(cache, 8, 2)).error
                assert "send page_tables instead" in error.message


# As many elements as a step may have: 512 requests with 4096 pages each.
BIG = attnd.StepMetadata([1] * 512, [0] * 512, [[0] * 4096] * 512, [-1] * 512, kind="decode")
Q_BIG = torch.ones(512, 2, 16)


def test_honest_sessions_have_several_of_the_largest_steps_under_way(tmp_path: Path) -> None:
    with serving(tmp_path) as (server, _, workers):
        with attnd.connect(server.address, credentials=workers, plane="inline") as client, ExitStack() as stack:
            sessions = [
                stack.enter_context(stack.enter_context(client.create_cache(**GEOMETRY)).session()) for _ in range(2)
            ]
            for _ in range(4):
                pending = []
                for session in sessions:
                    for _ in range(2):
                        pending.append(session.step(BIG).submit(0, Q_BIG, Q_BIG, Q_BIG))
                for call in pending:
                    assert torch.equal(call.wait(), Q_BIG)

        async def as_tasks() -> None:
            async with await attnd.aio.connect(server.address, credentials=workers, plane="inline") as client:
                cache = await client.create_cache(**GEOMETRY)
                async with cache.session() as session:
                    for _ in range(4):
                        steps = [await session.step(BIG) for _ in range(2)]
                        for output in await asyncio.gather(*(step.attend(0, *[Q_BIG] * 3) for step in steps)):
                            assert torch.equal(output, Q_BIG)
                await cache.delete()

        asyncio.run(as_tasks())
