"""Answers leave in the order of their requests, and the next request is read while a call runs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable

import pytest
import torch

import attnd
from attnd.protocol import frames, requests
from attnd.v1 import cache_pb2, tensor_pb2
from attnd_server.build import build_service
from attnd_server.config import ServerConfig
from attnd_server.identity import ANYBODY
from attnd_server.rpc.reply_order import ReplyOrder
from attnd_server.rpc.servicer import AttentionServicer
from attnd_server.service.service import AttentionService


def ordered(written: list[bytes]) -> ReplyOrder:
    async def write(answer: bytes) -> None:
        await asyncio.sleep(0)
        written.append(answer)

    return ReplyOrder(write, lambda error: f"told {error}".encode())


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never came")


def test_answers_leave_in_the_order_of_their_requests() -> None:
    async def test() -> None:
        written: list[bytes] = []
        answers = ordered(written)
        futures = [asyncio.get_running_loop().create_future() for _ in range(2)]
        await answers.put(b"first")
        assert written == [b"first"]
        assert not answers.waiting
        for answer in (futures[0], b"third", futures[1]):
            await answers.put(answer)
        futures[1].set_exception(ValueError("why"))
        await asyncio.sleep(0.01)
        assert (written, not answers.waiting) == ([b"first"], False)
        futures[0].set_result(b"second")
        await answers.finish()
        assert (written, not answers.waiting) == ([b"first", b"second", b"third", b"told why"], True)
        await answers.put(b"fifth")
        assert written[-1] == b"fifth"

    asyncio.run(test())


def test_no_more_answers_than_the_limit_wait() -> None:
    async def test() -> None:
        written: list[bytes] = []
        answers = ordered(written)
        futures = [asyncio.get_running_loop().create_future() for _ in range(5)]
        for future in futures[:4]:
            await answers.put(future)
        fifth = asyncio.ensure_future(answers.put(futures[4]))
        await asyncio.sleep(0.01)
        assert not fifth.done()
        for number, future in enumerate(futures):
            future.set_result(b"%d" % number)
        await fifth
        await answers.finish()
        assert written == [b"0", b"1", b"2", b"3", b"4"]

    asyncio.run(test())


def test_whoever_puts_the_next_answer_learns_that_one_could_not_be_written() -> None:
    async def test() -> None:
        async def write(answer: bytes) -> None:
            raise BrokenPipeError("gone")

        answers = ReplyOrder(write, lambda error: b"")
        future = asyncio.get_running_loop().create_future()
        future.set_result(b"lost")
        await answers.put(future)
        await asyncio.sleep(0.01)
        with pytest.raises(BrokenPipeError):
            await answers.put(future)
        with pytest.raises(BrokenPipeError):
            await answers.finish()
        answers.close()

    asyncio.run(test())


def test_close_gives_up_what_nobody_reads() -> None:
    async def test() -> None:
        written: list[bytes] = []
        answers = ordered(written)
        futures = [asyncio.get_running_loop().create_future() for _ in range(2)]
        for future in futures:
            await answers.put(future)
        answers.close()
        await asyncio.sleep(0.01)
        assert all(future.cancelled() for future in futures)
        assert written == []

    asyncio.run(test())


class _Context:
    """What a servicer needs of gRPC's."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    async def write(self, answer: bytes) -> None:
        self.written.append(answer)

    def time_remaining(self) -> float | None:
        return None


def make_cache(service: AttentionService) -> cache_pb2.CacheRef:
    dtype = tensor_pb2.DTYPE_FLOAT32
    config = cache_pb2.CacheConfig(num_layers=2, num_kv_heads=2, head_dim=8, page_size=16, num_pages=4, dtype=dtype)
    work = service.create_cache(cache_pb2.CreateCacheRequest(config=config).SerializeToString(), ANYBODY)
    return cache_pb2.CreateCacheResponse.FromString(work()).cache.cache


def test_the_next_call_is_read_and_queued_while_one_runs() -> None:
    service = build_service(ServerConfig(device="cpu"))
    runs, go_on = threading.Event(), threading.Event()

    def hold() -> bytes:
        runs.set()
        assert go_on.wait(10)
        return b""

    async def test() -> None:
        metadata = attnd.StepMetadata([3], [0], [[0]])
        step = metadata.to_message(1, make_cache(service))
        q, k, v = torch.randn(3, 4, 8), torch.randn(3, 2, 8), torch.randn(3, 2, 8)
        calls = [requests.attend_call(1, layer, q, k, v, attnd.AttentionOptions()) for layer in (0, 7, 1)]
        num_read = 0

        async def stream() -> AsyncIterator[bytes]:
            nonlocal num_read
            for data in (frames.step_request(step), *calls):
                num_read += 1
                yield data

        service.executor.submit(hold, lambda result, error: None)
        assert runs.wait(10)
        context, servicer = _Context(), AttentionServicer(service)
        handler = asyncio.ensure_future(servicer.attend(stream(), context))  # type: ignore[arg-type]
        await until(lambda: num_read == 4 and service.executor.queue_depth >= 2)
        assert len(context.written) == 1  # the step's answer: no call has run yet
        go_on.set()
        await handler
        answers = [requests.attend_reply(data) for data in context.written]
        assert [answer.kind for answer in answers] == ["step", "call", "error", "call"]
        assert [answers[1].message.layer, answers[3].message.layer] == [0, 1]
        assert "layer is 7" in answers[2].message.message

    try:
        asyncio.run(test())
    finally:
        go_on.set()
        service.executor.close()
