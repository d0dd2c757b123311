"""Page tables told by what changed, through a server: the bytes of a step, and that outputs are the same."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

import attnd
from attnd.pages import page_tables
from attnd.protocol import frames, requests
from attnd.protocol.packing import int32_tensor
from attnd.protocol.page_table_deltas import KEPT_TABLES
from attnd.v1 import attention_pb2, step_pb2

PAGE = 4
NUM_REQS = 4
GEOMETRY = {"num_layers": 1, "num_kv_heads": 2, "head_dim": 16, "num_pages": 4096, "page_size": PAGE}
# Bytes of a step of these requests, whatever its context: lengths, slots, a delta with some new pages.
STEP_BYTES = 360


class Worker:
    """Requests that decode a token a step, all in one cache."""

    def __init__(self, cache: attnd.Cache, num_reqs: int = NUM_REQS, context_len: int = 0) -> None:
        self.cache = cache
        self.pool = attnd.PagePool(GEOMETRY["num_pages"], PAGE)
        self.sequences = [attnd.PagedSequence(self.pool) for _ in range(num_reqs)]
        for index, sequence in enumerate(self.sequences):
            slots = sequence.extend(context_len + index)  # they gain their pages at different steps
            if slots:
                cache.store_kv(0, slots, *self.tensors(len(slots))[1:])

    @staticmethod
    def tensors(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return torch.randn(num_tokens, 4, 16), torch.randn(num_tokens, 2, 16), torch.randn(num_tokens, 2, 16)

    def metadata(self) -> attnd.StepMetadata:
        """One more token of each sequence."""
        context_lens = [sequence.length for sequence in self.sequences]
        slots = [slot for sequence in self.sequences for slot in sequence.extend(1)]
        tables = page_tables(self.sequences)
        return attnd.StepMetadata([1] * len(slots), context_lens, tables, slots, kind="decode")


@pytest.fixture
def steps_sent(monkeypatch: pytest.MonkeyPatch) -> list[step_pb2.Step]:
    """Every step that a session sends."""
    steps: list[step_pb2.Step] = []

    def step_request(step: step_pb2.Step) -> bytes:
        steps.append(step)
        return attention_pb2.AttendRequest(step=step).SerializeToString()

    monkeypatch.setattr(frames, "step_request", step_request)
    return steps


def in_full(steps: list[step_pb2.Step]) -> list[bool]:
    """Of each step, whether its page tables went in full."""
    assert all(step.HasField("page_tables") != step.HasField("page_table_delta") for step in steps)
    return [step.HasField("page_tables") for step in steps]


def create(client: attnd.Client) -> attnd.Cache:
    return client.create_cache(**GEOMETRY, dtype="float32")


def test_bytes_of_a_step_do_not_grow_with_the_context(
    any_client: attnd.Client, steps_sent: list[step_pb2.Step]
) -> None:
    with create(any_client) as cache, cache.session() as session:
        worker = Worker(cache, context_len=600)
        sizes = []
        for _ in range(200):
            metadata = worker.metadata()
            q, k, v = worker.tensors(NUM_REQS)
            before = session.timings().bytes_sent
            step = session.step(metadata)
            sizes.append(session.timings().bytes_sent - before)
            in_session = step.attend(0, q, k, v)
            assert torch.equal(in_session, any_client.decode(cache, metadata, 0, q, k, v))  # which sends it in full
    assert in_full(steps_sent) == [True] + [False] * 199
    assert sizes[0] > 4 * NUM_REQS * 600 / PAGE
    assert max(sizes[1:]) < STEP_BYTES
    assert max(sizes[150:]) <= max(sizes[1:50]) + 8


def test_requests_that_end_come_and_move_cost_their_own_pages(
    client: attnd.Client, steps_sent: list[step_pb2.Step]
) -> None:
    with create(client) as cache, cache.session() as session:
        worker = Worker(cache, num_reqs=8, context_len=300)
        changes = {
            2: lambda: worker.sequences.pop(3).free(),
            4: lambda: worker.sequences.reverse(),
            6: lambda: worker.sequences.insert(2, attnd.PagedSequence(worker.pool)),
            8: lambda: worker.sequences.sort(key=lambda sequence: sequence.length),
        }
        for number in range(12):
            changes.get(number, lambda: None)()
            metadata = worker.metadata()
            q, k, v = worker.tensors(len(worker.sequences))
            output = session.step(metadata).attend(0, q, k, v)
            assert torch.equal(output, client.decode(cache, metadata, 0, q, k, v))
    assert in_full(steps_sent) == [True] + [False] * 11
    assert max(step.ByteSize() for step in steps_sent[1:]) < 2 * STEP_BYTES


def test_two_batches_in_flight_each_build_upon_their_own_last_step(
    any_client: attnd.Client, steps_sent: list[step_pb2.Step]
) -> None:
    with create(any_client) as cache, cache.session() as session:
        worker = Worker(cache, num_reqs=2 * NUM_REQS, context_len=300)
        halves = worker.sequences[:NUM_REQS], worker.sequences[NUM_REQS:]
        under_way: list[tuple[attnd.Step, attnd.StepMetadata]] = []
        for number in range(20):
            worker.sequences = halves[number % 2]
            metadata = worker.metadata()
            under_way.append((session.step(metadata), metadata))
            if len(under_way) == 2:
                step, metadata = under_way.pop(0)
                q, k, v = worker.tensors(NUM_REQS)
                assert torch.equal(step.attend(0, q, k, v), any_client.decode(cache, metadata, 0, q, k, v))
    assert in_full(steps_sent) == [True] * 2 + [False] * 18
    assert [step.page_table_delta.base_step_id for step in steps_sent[2:]] == list(range(1, 19))


def test_after_a_refused_step_and_on_a_new_stream_the_table_goes_in_full(
    any_client: attnd.Client, steps_sent: list[step_pb2.Step]
) -> None:
    with create(any_client) as cache, cache.session() as session:
        worker = Worker(cache, context_len=300)

        def attend(metadata: attnd.StepMetadata) -> None:
            q, k, v = worker.tensors(NUM_REQS)
            output = session.step(metadata).attend(0, q, k, v)
            assert torch.equal(output, any_client.decode(cache, metadata, 0, q, k, v))

        attend(worker.metadata())
        attend(worker.metadata())
        lost = worker.metadata()
        lost.page_tables[1][5] = 4096
        with pytest.raises(attnd.InvalidRequest, match=r"^page_tables\[1, 5\] is 4096, but the cache has"):
            attend(lost)
        attend(worker.metadata())
        attend(worker.metadata())
        session.close()
        attend(worker.metadata())
        attend(worker.metadata())
    assert in_full(steps_sent) == [True, False, False, True, False, True, False]


def test_a_refused_step_does_not_take_those_behind_it_along(
    client: attnd.Client, steps_sent: list[step_pb2.Step]
) -> None:
    with create(client) as cache, cache.session() as session:
        worker = Worker(cache, context_len=300)
        session.step(worker.metadata()).attend(0, *worker.tensors(NUM_REQS))
        broken = worker.metadata()
        broken.page_tables[0][0] = -9
        refused, sound = session.step(broken), session.step(metadata := worker.metadata())
        with pytest.raises(attnd.InvalidRequest, match="is -9"):
            refused.attend(0, *worker.tensors(NUM_REQS))
        q, k, v = worker.tensors(NUM_REQS)
        assert torch.equal(sound.attend(0, q, k, v), client.decode(cache, metadata, 0, q, k, v))
    assert [step.page_table_delta.base_step_id for step in steps_sent] == [0, 1, 1]


def test_many_steps_opened_ahead_are_told_by_what_the_server_still_has(
    any_client: attnd.Client, steps_sent: list[step_pb2.Step]
) -> None:
    with create(any_client) as cache, cache.session() as session:
        worker = Worker(cache, context_len=300)
        session.step(worker.metadata()).attend(0, *worker.tensors(NUM_REQS))
        for _ in range(12):
            step = session.step(metadata := worker.metadata())
        q, k, v = worker.tensors(NUM_REQS)
        assert torch.equal(step.attend(0, q, k, v), any_client.decode(cache, metadata, 0, q, k, v))
    assert in_full(steps_sent) == [True] + [False] * KEPT_TABLES + [True] * (12 - KEPT_TABLES)


def test_a_server_that_keeps_less_than_it_says_costs_one_step(
    steps_sent: list[step_pb2.Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnd_server.service.session.MAX_OPEN_STEPS", 1)
    with attnd.connect("inproc://") as client, create(client) as cache, cache.session() as session:
        worker = Worker(cache, context_len=300)
        session.step(worker.metadata()).attend(0, *worker.tensors(NUM_REQS))
        session.step(worker.metadata()), session.step(worker.metadata())
        opened = session.step(worker.metadata())
        with pytest.raises(attnd.InvalidRequest, match=r"base_step_id is 1, but the stream's open steps are: 2; send"):
            opened.attend(0, *worker.tensors(NUM_REQS))
        metadata, (q, k, v) = worker.metadata(), worker.tensors(NUM_REQS)
        output = session.step(metadata).attend(0, q, k, v)
        assert torch.equal(output, client.decode(cache, metadata, 0, q, k, v))
    assert in_full(steps_sent) == [True, False, False, False, True]


def test_hostile_deltas_are_refused_and_the_stream_goes_on(client: attnd.Client) -> None:
    with create(client) as cache, create(client) as foreign, foreign.session() as other:
        worker = Worker(cache)
        metadata = worker.metadata()
        q, k, v = worker.tensors(NUM_REQS)
        other.step(worker.metadata()).attend(0, q, k, v)  # step 1 of another stream
        stream, same = client.transport.attend(), list(range(NUM_REQS))

        def answer(message: step_pb2.Step) -> Any:
            stream.send(frames.step_request(message))
            return stream.receive(30).message

        def changed(step_id: int, base_step_id: int, max_pages: int, source_rows: list[int]) -> step_pb2.Step:
            message = metadata.to_message(step_id, cache.ref)
            message.page_table_delta.CopyFrom(
                step_pb2.PageTableDelta(
                    base_step_id=base_step_id,
                    source_rows=int32_tensor(source_rows, "source_rows"),
                    max_pages=max_pages,
                    indices=int32_tensor([], "indices"),
                    pages=int32_tensor([], "pages"),
                )
            )
            message.ClearField("page_tables")
            return message

        try:
            refused = answer(changed(7, 1, 1, same))
            assert refused.field == "page_table_delta.base_step_id"
            assert refused.message.endswith("the stream's open steps are: none; send page_tables instead")
            assert answer(metadata.to_message(8, cache.ref)).takes_deltas
            refused = answer(changed(9, 8, 2**32 - 1, same))
            assert refused.field == "page_table_delta.max_pages"
            refused = answer(changed(9, 8, 1, [0] * NUM_REQS))  # who stores into what another now reads
            assert refused.field == "slot_mapping"
            assert answer(changed(9, 8, 1, same)).step_id == 9
            call = requests.attend_call(9, 0, q, k, v, attnd.AttentionOptions())
            stream.send(call)
            reply = stream.receive(30)
            output = requests.reply(reply.message, reply.tensors, requests.Wanted(q)).output
            assert torch.equal(output, client.decode(cache, metadata, 0, q, k, v))
        finally:
            stream.close()


def test_unary_requests_take_no_delta(client: attnd.Client) -> None:
    with create(client) as cache:
        worker = Worker(cache)
        message = worker.metadata().to_message(0, cache.ref)
        message.ClearField("page_tables")
        message.page_table_delta.max_pages = 1
        request = attention_pb2.DecodeRequest(step=message).SerializeToString()
        with pytest.raises(attnd.InvalidRequest, match="base_step_id is 0, but the stream's open steps are: none;"):
            client.transport.unary("Decode", request, 30)


def test_asyncio_sends_what_changed(server_address: str, steps_sent: list[step_pb2.Step]) -> None:
    async def decode() -> None:
        async with await attnd.aio.connect(server_address) as client:
            async with await client.create_cache(**GEOMETRY, dtype="float32") as cache, cache.session() as session:
                sequence = attnd.PagedSequence(attnd.PagePool(GEOMETRY["num_pages"], PAGE))
                slots = sequence.extend(600)
                await cache.store_kv(0, slots, *Worker.tensors(600)[1:])
                for number in range(12):
                    context_len, slots = sequence.length, sequence.extend(1)
                    tables = page_tables([sequence])
                    if number == 6:
                        tables[0][0] = 4096
                    metadata = attnd.StepMetadata([1], [context_len], tables, slots, kind="decode")
                    q, k, v = Worker.tensors(1)
                    step = await session.step(metadata)
                    if number == 6:
                        with pytest.raises(attnd.InvalidRequest, match="is 4096"):
                            await step.attend(0, q, k, v)
                        continue
                    output = await step.attend(0, q, k, v)
                    assert torch.equal(output, await client.decode(cache, metadata, 0, q, k, v))
                    if number == 9:
                        await session.close()

    asyncio.run(decode())
    assert in_full(steps_sent) == [number in (0, 7, 10) for number in range(12)]
    assert max(step.ByteSize() for step in steps_sent if step.HasField("page_table_delta")) < STEP_BYTES
