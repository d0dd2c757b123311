"""A server whose device is busy: whose turn comes when, who is refused and comes back, and what is never started."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import grpc
import pytest
import torch

import attnd
from attnd.planes.grpc import SERVICE
from attnd.protocol import requests
from attnd_server.app import Server
from attnd_server.config import ServerConfig
from attnd_server.execution.step import Call, Result
from attnd_server.inproc import InprocTransport
from tests.held_device import held
from tests.server_thread import server_thread
from tests.servers import wait_for

GEOMETRY = {"num_layers": 4, "num_kv_heads": 2, "head_dim": 16, "num_pages": 8, "page_size": 4, "dtype": "float32"}
Q, K, V = torch.ones(1, 2, 16), torch.ones(1, 2, 16), torch.ones(1, 2, 16)
DECODE = attnd.StepMetadata([1], [0], [[0]], [0], kind="decode")
PLANES = ["inline", "shm"]
TOO_LATE = "the deadline passed while the call waited for the executor"


class Busy:
    """A server on a thread of this process whose device can be held.

    Attributes:
        launched: cache ids of the calls that ran, in their order.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.service = server.service
        self.executor = server.service.executor
        self.launched: list[bytes] = []
        attend = self.executor.runner.attend

        def recorded(call: Call) -> Result:
            self.launched.append(call.step.cache.id)
            return attend(call)

        self.executor.runner.attend = recorded  # type: ignore[method-assign]

    def held(self) -> AbstractContextManager[threading.Event]:
        """Keeps the device busy until the end, or until the event is set."""
        return held(self.executor)

    def wait_for_depth(self, depth: int) -> None:
        wait_for(lambda: self.executor.queue_depth == depth, f"{self.executor.queue_depth} calls wait, not {depth}")

    def num_refused(self) -> int:
        assert self.service.metrics is not None
        return self.service.metrics.refusals[attnd.Exhausted]


@contextmanager
def serving(folder: Path, **limits: int) -> Iterator[Busy]:
    config = ServerConfig(
        port=0, device="cpu", socket_dir=str(folder), region_bytes=1 << 20, metrics="127.0.0.1:0", drain_s=0, **limits
    )
    with server_thread(config) as (server, _):
        yield Busy(server)


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[Busy]:
    with serving(tmp_path) as server:
        yield server


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def attend(session: attnd.Session) -> torch.Tensor:
    output: torch.Tensor = session.step(DECODE).attend(0, Q, K, V)
    return output


@pytest.mark.parametrize("plane", PLANES)
def test_a_cache_that_floods_the_queue_does_not_hold_up_another(
    busy: Busy, threads: ThreadPoolExecutor, plane: str
) -> None:
    with attnd.connect(busy.server.address, plane=plane) as client:
        flooding, other = client.create_cache(**GEOMETRY), client.create_cache(**GEOMETRY)
        with other.session() as session:
            with busy.held():
                flood = [threads.submit(client.decode, flooding, DECODE, 0, Q, K, V) for _ in range(10)]
                busy.wait_for_depth(10)
                answer = threads.submit(attend, session)
                busy.wait_for_depth(11)
            for each in [answer, *flood]:
                assert torch.equal(each.result(), V)
    assert busy.launched.index(other.ref.id) <= 1
    assert len(busy.launched) == 11


def test_a_deleted_cache_still_serves_the_calls_that_came_before(busy: Busy, threads: ThreadPoolExecutor) -> None:
    with attnd.connect(busy.server.address) as client:
        cache = client.create_cache(**GEOMETRY)
        with busy.held():
            before = threads.submit(client.decode, cache, DECODE, 0, Q, K, V)
            busy.wait_for_depth(1)
            deleted = threads.submit(cache.delete)
            busy.wait_for_depth(2)
            after = threads.submit(client.decode, cache, DECODE, 0, Q, K, V)
            busy.wait_for_depth(3)
        assert torch.equal(before.result(), V)
        deleted.result()
        with pytest.raises(attnd.CacheLost):
            after.result()
    assert len(busy.launched) == 2  # the second was refused there, before it touched anything


def overload(busy: Busy, first: Callable[[], Future[torch.Tensor]], second: Callable[[], Future[torch.Tensor]]) -> None:
    """Two calls of one cache where one may wait: the second is refused, and comes back once the first was served."""
    with busy.held():
        answers = [first()]
        busy.wait_for_depth(1)
        answers.append(second())
        wait_for(lambda: busy.num_refused() > 0, "nobody was refused")
        assert busy.executor.queue_depth == 1
    for answer in answers:
        assert torch.equal(answer.result(30), V)
    assert len(busy.launched) == 2


@pytest.mark.parametrize("plane", PLANES)
def test_a_session_beyond_its_caches_share_comes_back_by_itself(
    tmp_path: Path, threads: ThreadPoolExecutor, plane: str
) -> None:
    with serving(tmp_path, max_cache_queue_depth=1) as busy, attnd.connect(busy.server.address, plane=plane) as client:
        cache = client.create_cache(**GEOMETRY)
        with cache.session() as one, cache.session() as other:
            overload(busy, lambda: threads.submit(attend, one), lambda: threads.submit(attend, other))


def test_a_unary_call_beyond_its_caches_share_comes_back_by_itself(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    with serving(tmp_path, max_cache_queue_depth=1) as busy, attnd.connect(busy.server.address) as client:
        cache = client.create_cache(**GEOMETRY)

        def call() -> Future[torch.Tensor]:
            return threads.submit(client.decode, cache, DECODE, 0, Q, K, V)

        overload(busy, call, call)


@pytest.mark.parametrize("plane", PLANES)
def test_asyncio_calls_beyond_their_caches_share_come_back_by_themselves(
    tmp_path: Path, threads: ThreadPoolExecutor, plane: str
) -> None:
    with serving(tmp_path, max_cache_queue_depth=1) as busy:
        loop = asyncio.new_event_loop()
        running = threads.submit(loop.run_forever)
        connected = attnd.aio.connect(busy.server.address, plane=plane)
        client = asyncio.run_coroutine_threadsafe(connected, loop).result(30)

        async def make() -> attnd.aio.AsyncCache:
            return await client.create_cache(**GEOMETRY)

        cache = asyncio.run_coroutine_threadsafe(make(), loop).result(30)

        async def call_of_a_session() -> torch.Tensor:
            async with cache.session() as session:
                output: torch.Tensor = await (await session.step(DECODE)).attend(0, Q, K, V)
                return output

        async def unary_call() -> torch.Tensor:
            output: torch.Tensor = await client.decode(cache, DECODE, 0, Q, K, V)
            return output

        for call in (call_of_a_session, unary_call):
            busy.launched.clear()
            busy.service.metrics.refusals[attnd.Exhausted] = 0  # type: ignore[union-attr]
            overload(busy, *[lambda call=call: asyncio.run_coroutine_threadsafe(call(), loop)] * 2)  # type: ignore[misc]

        async def end() -> None:
            await cache.delete()
            await client.close()

        asyncio.run_coroutine_threadsafe(end(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        running.result(30)
        loop.close()


@pytest.mark.parametrize("plane", PLANES)
def test_whoever_gives_up_a_call_takes_nobody_elses_answer_and_frees_no_lane(busy: Busy, plane: str) -> None:
    """Of asyncio: a call that runs, calls that wait behind it, and on the shm plane one for which there is no lane."""
    inputs = [(torch.randn(1, 2, 16), torch.randn(1, 2, 16), torch.randn(1, 2, 16)) for _ in range(7)]

    async def give_up() -> None:
        async with await attnd.aio.connect(busy.server.address, plane=plane) as client:
            async with await client.create_cache(**GEOMETRY) as cache, cache.session() as session:
                step = await session.step(DECODE)
                with busy.held():
                    calls = [asyncio.ensure_future(step.attend(0, *inputs[0]))]
                    while busy.executor.queue_depth == 0:
                        await asyncio.sleep(0.005)
                    calls += [asyncio.ensure_future(step.attend(layer, *inputs[layer])) for layer in (1, 2, 3)]
                    await asyncio.sleep(0.05)
                    calls += [asyncio.ensure_future(step.attend(layer - 4, *inputs[layer])) for layer in (4, 5, 6)]
                    await asyncio.sleep(0.05)
                    for call in (0, 2, 5):
                        calls[call].cancel()
                    await asyncio.sleep(0.05)
                for index, call in enumerate(calls):
                    if index in (0, 2, 5):
                        with pytest.raises(asyncio.CancelledError):
                            await call
                    else:
                        assert torch.equal(await call, inputs[index][2])
                # What the last call of each layer that was not given up has stored.
                for layer, sent in ((0, 4), (3, 3), (2, 6)):
                    assert torch.equal((await cache.read_kv(layer, [0], like=V))[1], inputs[sent][2])
                assert torch.equal(await step.attend(0, *inputs[0]), inputs[0][2])
                assert session.plane == plane

    asyncio.run(asyncio.wait_for(give_up(), 60))
    # The sixth was sent before it was given up only where gRPC holds the messages.
    assert len(busy.launched) == (7 if plane == "shm" else 8)


def test_a_call_given_up_keeps_its_place_in_the_region_until_it_was_answered(busy: Busy) -> None:
    async def give_up() -> None:
        async with await attnd.aio.connect(busy.server.address, plane="shm") as client:
            async with await client.create_cache(**GEOMETRY) as cache, cache.session() as session:
                step = await session.step(DECODE)
                with busy.held():
                    given_up = asyncio.ensure_future(step.attend(0, Q, K, V))
                    while busy.executor.queue_depth == 0:
                        await asyncio.sleep(0.005)
                    given_up.cancel()
                    await asyncio.wait([given_up])
                    await asyncio.sleep(0)
                    after = asyncio.ensure_future(step.attend(1, 2 * Q, 2 * K, 2 * V))
                    await asyncio.sleep(0.05)
                assert torch.equal(await after, 2 * V)
                assert given_up.cancelled()
                read_k, read_v = await cache.read_kv(0, [0], like=V)
                assert torch.equal(read_k, K)
                assert torch.equal(read_v, V)

    asyncio.run(asyncio.wait_for(give_up(), 60))


def test_a_submitted_call_that_is_refused_says_when_to_come_back(tmp_path: Path) -> None:
    with serving(tmp_path, max_cache_queue_depth=2) as busy, attnd.connect(busy.server.address) as client:
        with client.create_cache(**GEOMETRY) as cache, cache.session(plane="inline") as session:
            step = session.step(DECODE)
            with busy.held():
                calls = [step.submit(layer, Q, K, V) for layer in range(3)]
                wait_for(lambda: busy.num_refused() > 0, "nobody was refused")
            assert all(torch.equal(call.wait(), V) for call in calls[:2])
            with pytest.raises(attnd.Exhausted, match="2 calls of this cache wait, but the limit of one") as refused:
                calls[2].wait()
            assert refused.value.retry_after_s is not None
            assert torch.equal(step.submit(2, Q, K, V).wait(), V)


def test_all_calls_of_a_session_that_ends_leave_the_queue(busy: Busy) -> None:
    with attnd.connect(busy.server.address) as client, client.create_cache(**GEOMETRY) as cache:
        with busy.held():
            with cache.session(plane="inline") as session:
                step = session.step(DECODE)
                for layer in range(3):
                    step.submit(layer, Q, K, V)
                busy.wait_for_depth(3)
            busy.wait_for_depth(0)
    assert busy.launched == []


def test_who_has_no_time_left_is_told_how_much_waits_and_when_to_come_back(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    with (
        serving(tmp_path, max_queue_depth=1) as busy,
        attnd.connect(busy.server.address) as client,
        attnd.connect(busy.server.address, timeout_s=0.3) as hasty,
    ):
        cache, other = client.create_cache(**GEOMETRY), client.create_cache(**GEOMETRY)
        with busy.held():
            first = threads.submit(client.decode, cache, DECODE, 0, Q, K, V)
            busy.wait_for_depth(1)
            with pytest.raises(attnd.Exhausted, match="1 calls wait, but the queue's limit is 1; retry in") as refused:
                hasty.decode(other, DECODE, 0, Q, K, V)
        assert refused.value.retry_after_s is not None
        assert 0 < refused.value.retry_after_s <= 10
        assert torch.equal(first.result(), V)


@pytest.mark.parametrize("plane", PLANES)
def test_a_session_that_gave_up_is_not_served(busy: Busy, plane: str) -> None:
    with (
        attnd.connect(busy.server.address) as client,
        attnd.connect(busy.server.address, timeout_s=0.3, plane=plane) as hasty,
    ):
        cache = client.create_cache(**GEOMETRY)
        # Its word in the step would end the call too: here only the end of the stream is to tell.
        with hasty.create_cache(**GEOMETRY).session() as session, pytest.MonkeyPatch.context() as patch:
            patch.setattr(requests, "timeout_ms", lambda timeout_s: 0)
            with busy.held():
                with pytest.raises(attnd.DeadlineExceeded):
                    attend(session)
                if plane == "inline":  # of a socket's end one learns when the call's turn has come
                    busy.wait_for_depth(0)
            assert torch.equal(client.decode(cache, DECODE, 0, Q, K, V), V)
            assert busy.launched == [cache.ref.id]
            assert torch.equal(attend(session), V)


@pytest.mark.parametrize("plane", PLANES)
def test_a_call_whose_time_is_up_is_not_started(
    busy: Busy, plane: str, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "timeout_ms", lambda timeout_s: 20)
    with attnd.connect(busy.server.address, plane=plane) as client, client.create_cache(**GEOMETRY) as cache:
        with cache.session() as session:
            with busy.held():
                late = threads.submit(attend, session)
                busy.wait_for_depth(1)
                time.sleep(0.1)
            with pytest.raises(attnd.DeadlineExceeded, match=TOO_LATE):
                late.result()
            assert busy.launched == []
            assert torch.equal(attend(session), V)


def test_a_unary_call_that_was_cancelled_or_is_late_is_not_started(busy: Busy) -> None:
    with attnd.connect(busy.server.address) as client, client.create_cache(**GEOMETRY) as cache:
        request = requests.unary_call("decode", DECODE, cache.ref, 0, Q, K, V, requests.DEFAULT_OPTIONS)
        with grpc.insecure_channel(busy.server.address) as channel, busy.held():
            decode = channel.unary_unary(f"{SERVICE}Decode")
            cancelled = decode.future(request)
            busy.wait_for_depth(1)
            cancelled.cancel()
            busy.wait_for_depth(0)
            late = decode.future(request, timeout=0.2)
            busy.wait_for_depth(1)
            assert late.exception().code() is grpc.StatusCode.DEADLINE_EXCEEDED
            busy.wait_for_depth(0)
            broken = decode.future(request)
            busy.wait_for_depth(1)
            channel.close()
            assert broken.done()
            busy.wait_for_depth(0)
        assert torch.equal(client.decode(cache, DECODE, 0, Q, K, V), V)
        assert len(busy.launched) == 1


def test_in_process_calls_that_are_late_are_not_started(busy: Busy) -> None:
    with attnd.connect(busy.server.address) as client, client.create_cache(**GEOMETRY):
        transport = InprocTransport(busy.service)
        hasty = attnd.Client(transport, timeout_s=0.2)
        cache = hasty.create_cache(**GEOMETRY)
        with busy.held():
            with pytest.raises(attnd.DeadlineExceeded):
                hasty.decode(cache, DECODE, 0, Q, K, V)
            busy.wait_for_depth(0)
        hasty.renewal.close()
        assert busy.launched == []
